"""Text to token ids and back, by the `tokenizers` package and the checkpoint's tokenizer.json."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.decoders import DecodeStream

from minstep.files import InputError

# Special tokens stand at both ends of the real vocabulary, with ordinary ones between.
FRONT = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
BACK = ("<|im_start|>", "<|im_end|>")


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer beside a checkpoint, None where there is none.

    Raises InputError when tokenizer.json is there but cannot be understood.
    """
    file = folder / "tokenizer.json"
    if not file.exists():
        return None
    try:
        return Tokenizer.from_file(str(file))
    except Exception as error:  # the package raises nothing more precise
        raise InputError(f"{file}: is not a tokenizer: {error}") from error


def byte_level_tokenizer() -> Tokenizer:
    """The tokenizer of the untrained tiny model: one token per byte, and the special tokens.

    A byte-level BPE as the real one is, but without merges: 3 + 256 + 2 ids. Any text can be
    encoded and comes back as it was.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: n for n, token in enumerate([*FRONT, *alphabet, *BACK])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (*FRONT, *BACK)])
    return tokenizer


def encode(tokenizer: Tokenizer, text: str) -> list[int]:
    """The token ids of `text`. Raises InputError for what the tokenizer cannot take."""
    try:
        return list(tokenizer.encode(text).ids)
    except Exception as error:  # such as a lone surrogate, from bytes that are no UTF-8
        raise InputError(f"the prompt {text!r:.80} cannot be encoded: {error}") from error


class StreamingText:
    """Turns token ids into text as they come, holding back a character that is not yet whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def add(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        return self._stream.step(self._tokenizer, token) or ""
