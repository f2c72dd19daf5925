"""Regular expressions out of a file, checked: a few characters of one can take ages to match."""

import re

from minstep.errors import InputError, shown

LONGEST = 5000  # characters
UNLIMITED = 10**6  # times
MOST_REPEATS = 1000  # in braces
MOST_CHOICES, REPETITION = 17, 6  # of an alternative: `?` is one choice, alternatives their bits
# What an expression is made of, character classes apart. `{` is itself where it counts nothing.
PIECE = re.compile(
    r"(?P<anchor>\^|\$|\\[bBAzZGK])"
    r"|(?P<look>\(\?<?[=!])"
    r"|(?P<flag>\(\?i\))"
    r"|(?P<open>\((?:\?(?:i?:|>))?(?!\?))"
    r"|(?P<close>\))"
    r"|(?P<or>\|)"
    r"|(?P<repeat>[*+?][?+]?"
    r"|\{(?:[0-9]{1,6},?[0-9]{0,6}|,[0-9]{1,6})\}\??)"
    r"|(?P<atom>\\(?:[pP]\{[^{}]*\}|x\{[0-9a-fA-F]*\}|[^gkcCM1-9])|[^\\()[])",
    re.DOTALL,
)
IN_CLASS = re.compile(r"\\.|\[\^?\]?|\]", re.DOTALL)  # a bracket that closes first is itself


class _Group:
    """A group of an expression while it is read; the outermost is the expression itself."""

    def __init__(self, is_look: bool) -> None:
        self.is_look = is_look  # such takes no characters
        self.least, self.most_choices, self.alternatives = LONGEST, 0, 0  # of those that ended
        self.begin()

    def begin(self) -> None:
        """An alternative begins."""
        self.width = self.choices = 0  # characters that it takes at least, and its choices
        self.last: tuple[int, _Group | None] | None = None  # its last atom: width, and the group

    def end(self) -> None:
        """An alternative ends."""
        self.least = min(self.least, self.width)
        self.most_choices = max(self.most_choices, self.choices)
        self.alternatives += 1
        self.begin()

    def add(self, width: int, inner: "_Group | None" = None) -> None:
        """An atom, perhaps a group."""
        self.width, self.last = self.width + width, (width, inner)
        if inner:
            self.choices += inner.most_choices + (inner.alternatives - 1).bit_length()


def check_pattern(pattern: str, place: str) -> int:
    """How many characters a regular expression takes at least wherever it matches.

    Raises InputError for what may take exponential time, or a high power of the text's length: what
    is repeated may hold no choice, an alternative has few, and nothing refers to a group. The
    expressions of tokenizers that people use need none of that.
    """
    if not isinstance(pattern, str) or len(pattern) > LONGEST:
        raise InputError(f"{place}: a pattern, expected a text of at most {LONGEST} characters")

    def require(holds: object, reason: str) -> None:
        if not holds:
            raise InputError(f"{place}: the pattern {shown(pattern, 60)} {reason}")

    groups, at = [_Group(is_look=False)], 0
    while at < len(pattern):
        group = groups[-1]
        if pattern[at] == "[":
            at = _class_end(pattern, at)
            group.add(1)
            continue
        piece = PIECE.match(pattern, at)
        require(piece, f"has something unusual at character {at}")
        assert piece
        at, kind = piece.end(), piece.lastgroup
        if kind == "repeat":
            width, inner = group.last or (0, None)
            require(width, "repeats what cannot be repeated")
            least, most = _times(piece["repeat"])
            has_choice = inner and (inner.most_choices or inner.alternatives > 1)
            require(most < 2 or not has_choice, "repeats what can match in several ways")
            group.width += width * (least - 1)
            group.choices += 0 if least == most else 1 if most == 1 else REPETITION
            group.last = None
            often = least if most == UNLIMITED else most
            require(often <= MOST_REPEATS and group.width <= LONGEST, "repeats too often")
        elif kind in ("open", "look"):
            groups.append(_Group(is_look=kind == "look"))
        elif kind == "close":
            require(len(groups) > 1, "closes a group that is not open")
            group.end()
            groups.pop()
            groups[-1].add(0 if group.is_look else group.least, group)
        elif kind == "or":
            group.end()
        elif kind == "atom":
            group.add(1)
        few = groups[-1].choices <= MOST_CHOICES
        require(few, "can match in too many ways in one alternative")
    require(len(groups) == 1, "does not close a group")
    groups[0].end()
    return groups[0].least


def _times(repeat: str) -> tuple[int, int]:
    """The least and the most times of a repetition."""
    if repeat[0] != "{":
        return int(repeat[0] == "+"), 1 if repeat[0] == "?" else UNLIMITED
    least, comma, most = repeat.rstrip("?")[1:-1].partition(",")
    return int(least or 0), int((most or UNLIMITED) if comma else least)


def _class_end(pattern: str, at: int) -> int:
    """The end of the character class that begins at `at`; others may stand in it."""
    depth = 0
    for bracket in IN_CLASS.finditer(pattern, at):
        depth += {"[": 1, "]": -1}.get(bracket[0][0], 0)
        if depth == 0:
            return bracket.end()
    return len(pattern)
