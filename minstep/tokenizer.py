"""Text to token ids and back, by the `tokenizers` package and the checkpoint's tokenizer.json."""

from codecs import getincrementaldecoder
from collections.abc import Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.decoders import DecodeStream

from minstep.reply import END_THINK, THINK, unfinished
from minstep.tokenizer_file import contained, read_tokenizer
from minstep.toolcalls import CALL, END_CALL

# Special tokens stand at both ends of the real vocabulary, with ordinary ones between.
FRONT = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
BACK = ("<|im_start|>", "<|im_end|>")
TAGS = (THINK, END_THINK, CALL, END_CALL)
BROKEN = "\ufffd"  # what the tokenizers package decodes bytes to that are no UTF-8
# The letters that byte-level tokens are written in: bytes that print stand for themselves and come
# first in this order, the others follow in theirs.
ALPHABET = sorted(pre_tokenizers.ByteLevel.alphabet())
PRINTED = [ord(letter) for letter in ALPHABET if ord(letter) < 256]
BYTE_OF = dict(zip(ALPHABET, [*PRINTED, *sorted({*range(256)} - {*PRINTED})], strict=True))


def load_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer beside a checkpoint, None where there is none.

    Raises InputError when tokenizer.json is there but cannot be understood, or could do harm.
    """
    file = folder / "tokenizer.json"
    return read_tokenizer(file) if file.exists() else None


def text_of(tokenizer: Tokenizer | None, token: int) -> str | None:
    """What one token says; None where it is no whole character, or there is no tokenizer."""
    if tokenizer is None:
        return None
    with contained(f"token {token} cannot be decoded"):
        text: str = tokenizer.decode([token], skip_special_tokens=False)
    return text if text and BROKEN not in text else None


def byte_level_tokenizer() -> Tokenizer:
    """The tokenizer of the untrained tiny model: one token per byte, and the special tokens.

    A byte-level BPE as the real one is, but without merges: 3 + 256 + 2 ids. Any text can be
    encoded and comes back as it was.
    """
    vocabulary = {token: n for n, token in enumerate([*FRONT, *ALPHABET, *BACK])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in (*FRONT, *BACK)])
    return tokenizer


def encode(tokenizer: Tokenizer, text: str, is_rendered: bool = False) -> list[int]:
    """The token ids of `text`; a rendered conversation brings its own bos.

    Raises InputError for what the tokenizer cannot take.
    """
    with contained(f"the prompt {text[:80]!r} cannot be encoded"):
        text.encode()  # else the package says of a lone surrogate something of a type
        return list(tokenizer.encode(text, add_special_tokens=not is_rendered).ids)


class StreamingText:
    """Turns token ids into text as they come, and ends it before any of the `stops`.

    A character is given out once it is whole, bytes that are no UTF-8 never. Special tokens are not
    shown, but for the tags that chat parsing reads. What may yet become a stop text is held back.
    Of several stops the first to be complete ends the text, of those complete at once the longest,
    so that how the text is cut into tokens makes no difference.
    Differs: the package's DecodeStream cannot tell a U+FFFD in the text from broken bytes, and
        decodes a run of those again from its start at each token. It serves only the tokenizers
        that are not byte-level, which Step's is.
    Checked by: tests/test_tokenizer.py
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.stopped = False  # whether one of the stops has come
        self._tokenizer, self._stops, self._held = tokenizer, stops, ""
        added = tokenizer.get_added_tokens_decoder().items()
        self._added = {i for i, _ in added}  # these stand as text, not in the byte-level alphabet
        self._hidden = {i for i, token in added if token.special and token.content not in TAGS}
        self._utf8 = getincrementaldecoder("utf-8")("ignore")
        byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self._stream = None if byte_level else DecodeStream(skip_special_tokens=False)

    def add(self, token: int) -> str:
        """The text that `token` makes certain."""
        if token in self._hidden or self.stopped:
            return ""
        self._held += self._decode(token)
        found = [(n + len(stop), n) for stop in self._stops if (n := self._held.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, self._held[: min(found)[1]]
            return self.finish()
        begins = (unfinished(self._held, stop) for stop in self._stops)
        certain = min(begins, default=len(self._held))
        text, self._held = self._held[:certain], self._held[certain:]
        return text

    def finish(self) -> str:
        """The text that was held back: the tokens have ended."""
        text, self._held = self._held, ""
        return text

    def _decode(self, token: int) -> str:
        """The characters that `token` completes."""
        if self._stream:
            with contained(f"token {token} cannot be decoded"):
                try:
                    text = self._stream.step(self._tokenizer, token)
                except Exception:  # behind broken bytes it may decode what it gave out another way
                    self._stream = DecodeStream(skip_special_tokens=False)
                    text = self._stream.step(self._tokenizer, token)
            return (text or "").replace(BROKEN, "")
        letters = self._tokenizer.id_to_token(token) or ""  # a model has more rows than tokens
        is_written = token not in self._added and BYTE_OF.keys() >= {*letters}
        written = bytes(BYTE_OF[letter] for letter in letters) if is_written else letters.encode()
        return self._utf8.decode(written)
