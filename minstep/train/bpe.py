"""A byte-level BPE tokenizer of one's own text, special tokens at the ends as in the real one."""

from collections.abc import Iterable

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from minstep.errors import InputError
from minstep.text.tokenizer import ALPHABET, BACK, FRONT

SMALLEST = len(FRONT) + len(ALPHABET) + len(BACK)  # 261: one token per byte, and the special tokens


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn the merges that leave `texts` the fewest tokens, until there are `vocab_size` ids.

    Ids are FRONT, the 256 bytes, the merges in the order they were learned, then BACK. Any text can
    be encoded and comes back as it was; bos is put in front. The same texts give the same file.
    Raises InputError for fewer than 261 ids, and for a text with too little to merge.
    Source: Sennrich et al., arXiv 1508.07909; bytes and the cuts between words as in GPT-2.
    Differs: Step's own tokenizer has 128,815 ids and DeepSeek-V3's rules for the cuts.
    Checked by: tests/train/test_bpe.py
    """
    if vocab_size < SMALLEST:
        raise InputError(f"a vocabulary of {vocab_size} tokens, expected at least {SMALLEST}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(BACK),
        min_frequency=2,  # what stands once saves nothing
        show_progress=False,
        special_tokens=[*FRONT],
        initial_alphabet=ALPHABET,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([*FRONT, *BACK])
    if tokenizer.get_vocab_size() < vocab_size:
        found = tokenizer.get_vocab_size()
        raise InputError(f"the text gives {found} tokens, expected {vocab_size}: it is too short")
    bos = FRONT[0]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return tokenizer
