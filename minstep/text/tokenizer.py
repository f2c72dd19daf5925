"""Text to token ids and back, by the `tokenizers` package and the checkpoint's tokenizer.json."""

from codecs import getincrementaldecoder
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Encoding, Tokenizer, decoders, models, pre_tokenizers
from tokenizers.decoders import DecodeStream

from minstep.errors import InputError
from minstep.text.prompt import IMAGE, SPECIAL, TEMPLATE_TAGS, Prompt, refuse_foreign
from minstep.text.reply import END_THINK, THINK
from minstep.text.tokenizer_file import contained, read_tokenizer
from minstep.text.tool_calls import CALL, END_CALL

# Special tokens stand at both ends of the real vocabulary, with ordinary ones between.
FRONT = ("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>")
BACK = ("<|im_start|>", "<|im_end|>")
TAGS = (THINK, END_THINK, CALL, END_CALL)
BROKEN = "\ufffd"  # what the tokenizers package decodes bytes to that are no UTF-8
# The letters that byte-level tokens are written in: bytes that print are their own letters and come
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


def piece(tokenizer: Tokenizer | None, token: int) -> str:
    """A token's text, or its number in ⟨⟩ where it has none."""
    return text_of(tokenizer, token) or f"⟨{token}⟩"


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

    Special tokens that a text spells are tokens, but for those in a Prompt's messages that is to
    have them "plain" or to "refuse" them.
    Raises InputError for what the tokenizer cannot take, and for what a Prompt is to refuse.
    Checked by: tests/text/test_tokenizer.py, tests/text/test_special_tokens.py
    """
    with contained(f"the prompt {text[:80]!r} cannot be encoded"):
        text.encode()  # else the package says of a lone surrogate something of a type
        if isinstance(text, Prompt) and text.special_tokens != "released":
            encoding = _encode_guarded(tokenizer, text)
            encoding = tokenizer.post_process(encoding, add_special_tokens=not is_rendered)
        else:
            encoding = tokenizer.encode(text, add_special_tokens=not is_rendered)
        return list(encoding.ids)


def _encode_guarded(tokenizer: Tokenizer, prompt: Prompt) -> Encoding:
    """A prompt in which only the template's special tokens are tokens.

    One that a message spells is cut behind its first character, and each part is encoded by itself:
    as no part has it, it is ordinary text. Where no message spells one, nothing is cut, and the ids
    are the released ones.
    A normalizer may make a special token of other text: then, or where a message hides one of the
    template's, InputError.
    """
    special = special_tokens(tokenizer)
    if prompt.special_tokens == "refuse":
        refuse_foreign(prompt, special)
    numbers = {*special.values()}
    cuts = {begin + 1 for begin, _, _ in prompt.foreign(special)}
    parts, found = [], []
    for begin, end in pairwise([0, *sorted(cuts), len(prompt)]):
        part = tokenizer.encode(prompt[begin:end], add_special_tokens=False)
        parts.append(part)
        for number, (first, last) in zip(part.ids, part.offsets, strict=True):
            if number in numbers:
                written = prompt[begin + first : begin + last]  # may have white space around it
                first += begin + len(written) - len(written.lstrip())
                found.append((number, prompt.place(first, first + len(written.strip()))))
    own = tokenizer.encode(prompt.template, add_special_tokens=False).ids
    if found != [(number, "") for number in own if number in numbers]:
        reason = "this tokenizer finds other special tokens in it than the template's"
        raise InputError(f"the prompt {prompt[:80]!r} cannot be encoded as plain text: {reason}")
    return Encoding.merge(parts)


def special_tokens(tokenizer: Tokenizer) -> dict[str, int]:
    """The tokens that mean something to the model, with their ids: the special ones, and tags.

    Those of the template count even where the tokenizer does not call them special. What stands for
    an image is none of them: it begins no turn, and messages may have images.
    """
    known = {*SPECIAL, *TEMPLATE_TAGS}
    return {
        token.content: number
        for number, token in tokenizer.get_added_tokens_decoder().items()
        if (token.special or token.content in known) and token.content not in ("", IMAGE)
    }


class _Stop:
    """A stop text, and how much of its beginning the text so far ends with.

    Source: Knuth, Morris, Pratt 1977: each character is looked at about once, whatever they are.
    """

    def __init__(self, text: str) -> None:
        if not isinstance(text, str) or not text:
            raise InputError(f"the stop text {text!r:.80}, expected a text that is not empty")
        self.text, self.begun = text, 0
        self._shorter = [0, 0]  # for each beginning the longest shorter one that it ends with
        for letter in text[1:]:
            self._shorter.append(self._behind(letter, self._shorter[-1]))

    def _behind(self, letter: str, begun: int) -> int:
        while begun and self.text[begun] != letter:
            begun = self._shorter[begun]
        return begun + (self.text[begun] == letter)

    def feed(self, text: str) -> int:
        """How many characters of `text` complete the stop; 0 where it stays incomplete."""
        for n, letter in enumerate(text, start=1):
            self.begun = self._behind(letter, self.begun)
            if self.begun == len(self.text):
                return n
        return 0


class StreamingText:
    """Turns token ids into text as they come, and ends it before any of the `stops`.

    A character is given out once it is whole, bytes that are no UTF-8 never. Special tokens are not
    shown, but for the tags that chat parsing reads. What may yet become a stop text is held back.
    Of several stops the first to be complete ends the text, of those complete at once the longest,
    so that how the text is cut into tokens makes no difference.
    Differs: the package's DecodeStream cannot tell a U+FFFD in the text from broken bytes, and
        decodes a run of those again from its start at each token. It serves only the tokenizers
        that are not byte-level, which Step's is.
    Checked by: tests/text/test_tokenizer.py
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()) -> None:
        self.stopped = False  # whether one of the stops has come
        self._tokenizer = tokenizer
        self._stops = [_Stop(text) for text in stops]
        self._held: deque[str] = deque()  # the characters that are held back
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
        text, known = self._decode(token), len(self._held)
        self._held += text
        found = [(n, n - len(stop.text)) for stop in self._stops if (n := stop.feed(text))]
        if found:
            self.stopped = True
            text = self._take(known + min(found)[1])
            self._held.clear()
            return text
        begun = max((stop.begun for stop in self._stops), default=0)
        return self._take(len(self._held) - begun)

    def _take(self, count: int) -> str:
        """The first characters of those that are held back, which now are certain."""
        return "".join(self._held.popleft() for _ in range(count))

    def finish(self) -> str:
        """The text that was held back: the tokens have ended."""
        return self._take(len(self._held))

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
