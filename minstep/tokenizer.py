"""Text to token ids and back, by the `tokenizers` package and the checkpoint's tokenizer.json."""

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from minstep.files import InputError


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


class StreamingText:
    """Turns token ids into text as they come, holding back a character that is not yet whole."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._stream = DecodeStream(skip_special_tokens=True)

    def add(self, token: int) -> str:
        """The text that `token` completes; empty while a character is unfinished."""
        return self._stream.step(self._tokenizer, token) or ""
