"""The one kind of error for wrong input, and text made fit to be shown in it."""

LONGEST_MESSAGE = 2000  # characters of an InputError


class InputError(ValueError):
    """Something handed to minstep is wrong: the message names it and says what was expected.

    Raised for a path, file, tensor, config key or token id. The command line prints the message
    as one line on stderr and exits with 2. What a terminal would act on is escaped here, so that no
    message can carry it from a file, and a message has at most LONGEST_MESSAGE characters.
    """

    def __init__(self, message: str) -> None:
        super().__init__(shown(" ".join(message.split()), LONGEST_MESSAGE))


def shown(text: str, longest: int = 120) -> str:
    """A name from a file as a message or table shows it: printable, and cut in its middle.

    Escape sequences, line ends, bidirectional controls and lone surrogates become escapes such as
    `\\x1b`. Text of more than `longest` characters keeps its two ends around an ellipsis.
    """
    if len(text) > longest:
        text = f"{text[: longest // 2]}…{text[len(text) - longest // 2 + 1 :]}"
    return printable(text)


def printable(text: str, kept: str = "") -> str:
    """The text with an escape such as `\\x1b` for each character that is neither printable nor one
    of those `kept`.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else repr(c)[1:-1] for c in text)
