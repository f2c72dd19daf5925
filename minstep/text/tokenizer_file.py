"""tokenizer.json, checked: on what is refused the `tokenizers` package panics or never ends.

Its regular expressions are checked too: a few characters of one can take ages to match.
"""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from minstep.errors import InputError, shown
from minstep.store.files import read_file
from minstep.store.json_file import unique

LARGEST = 40 << 20  # bytes of a file; the released one has about 8 MB
MOST_CONTAINERS = 2_000_000  # lists and objects in it: each merge may be one
MOST_ADDED = 30_000  # the oldest allowed package takes their square in time
MOST_ADDED_CHARACTERS = 1_000_000  # of them all: the package may normalize and index each
MOST_COMPONENTS = 50  # of one part
MOST_GROWTH = 200  # how many times longer a text may become
LONGEST_TOKEN = 4096  # characters; Claude's has 1024 spaces
LONGEST_PIECE, LONGEST_WORD = 128, 1000  # a Unigram, a WordPiece try all lengths at each place
LONGEST_TEXT = 100  # characters that stand for others
LONGEST_COMPONENT = 50_000  # characters as JSON: some look for a text of theirs at each token
LONGEST_TEMPLATE = 100  # special tokens around a text
LONGEST_PATTERN = 5000  # characters of a regular expression
UNLIMITED, MOST_REPEATS = 10**6, 1000  # times that one repeats; at most in braces
MOST_CHOICES = 17  # of an alternative: `?` is one choice, alternatives their bits
REPETITION = 6  # choices that a repetition counts as

# The kinds of component that any text passes through unharmed, once `_check_component` has looked.
# Not among them is Precompiled: the package believes a table of its that nobody has checked.
KINDS = {
    "normalizer": "Sequence NFC NFD NFKC NFKD Nmt BertNormalizer Lowercase Strip StripAccents "
    "Replace Prepend ByteLevel",
    "pre_tokenizer": "Sequence ByteLevel Split Digits Punctuation Whitespace WhitespaceSplit "
    "BertPreTokenizer Metaspace CharDelimiterSplit UnicodeScripts FixedLength",
    "post_processor": "Sequence ByteLevel TemplateProcessing BertProcessing RobertaProcessing",
    "decoder": "Sequence ByteLevel ByteFallback Fuse Replace Strip Metaspace WordPiece BPEDecoder "
    "CTC",
    "model": "BPE Unigram WordPiece WordLevel",
}
LISTS = ("normalizers", "pretokenizers", "processors", "decoders")  # what a Sequence holds
GROWTH = {"ByteLevel": 2, "NFKC": 11, "NFKD": 11, "NFC": 3, "NFD": 4, "Metaspace": 3}

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


@contextmanager
def contained(place: str) -> Iterator[None]:
    """Make an InputError of all that the package raises: a panic in its Rust is no Exception."""
    try:
        yield
    except (InputError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise InputError(f"{place}: {error}") from error


def read_tokenizer(file: Path) -> Tokenizer:
    """The tokenizer in a tokenizer.json, without padding and truncation: a prompt has neither.

    Raises InputError for a file that is missing, broken or too large, and for what the package
    would panic at, need far more memory or time for than the text has, or do at random.
    """
    content = read_file(file, LARGEST)
    with contained(f"{file}: is not a tokenizer"):
        if content.count(b"[") + content.count(b"{") > MOST_CONTAINERS:
            raise InputError(f"{file}: has more than {MOST_CONTAINERS:,} lists and objects")
        text = content.decode("utf-8-sig")
        raw = json.loads(text, object_pairs_hook=unique)  # the package may read the other of two
        try:
            _check(raw)
        except InputError as error:
            raise InputError(f"{file}: {error}") from error
        if any(raw.get(part) is not None for part in ("truncation", "padding")):
            text = json.dumps(raw | {"truncation": None, "padding": None})
        tokenizer = Tokenizer.from_str(text)
        for token in tokenizer.get_added_tokens_decoder().values():
            if token.normalized and tokenizer.normalizer and token.content:
                if not tokenizer.normalizer.normalize_str(token.content):
                    raise InputError(f"{file}: the normalizer leaves nothing of {token.content!r}")
    return tokenizer


def _check(raw: dict[str, Any]) -> None:
    """Refuse what could do harm in the parts of a tokenizer.json.

    What is of another type than it should be raises whatever comes of that.
    """
    growth = {"decoder": 1.0, "text": 1.0}
    kinds = [each["type"] for each in _components(raw.get("post_processor"), "post_processor")]
    if sum(kind.endswith("Processing") for kind in kinds) > 1:
        raise InputError("post_processor: one puts tokens around what another has, expected one")
    for part in ("normalizer", "pre_tokenizer", "post_processor", "decoder"):
        for component in _components(raw.get(part), part):
            key = "decoder" if part == "decoder" else "text"
            growth[key] *= _check_component(component, part)
            if growth[key] > MOST_GROWTH:
                raise InputError(f"the {part} makes a text more than {MOST_GROWTH} times longer")
    model = raw.get("model")
    if not isinstance(model, dict):
        raise ValueError("it has no model")
    if model.get("type", "BPE") not in KINDS["model"].split():
        raise InputError(f"model: expected one of the types {KINDS['model']}")
    if model.get("dropout"):
        raise InputError("model: dropout encodes a text otherwise each time, expected none")
    if "merges" in model and model.get("continuing_subword_prefix"):
        raise InputError("model: continuing_subword_prefix with merges, expected none")
    if not 0 <= model.get("max_input_chars_per_word", 0) <= LONGEST_WORD:
        raise InputError(f"model: max_input_chars_per_word, expected at most {LONGEST_WORD}")
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "unk_token"):
        _limit(model.get(key) or "", LONGEST_TEXT, f"model: {key}")
    vocabulary, added = model.get("vocab", {}), raw.get("added_tokens", [])
    if len(added) > MOST_ADDED:
        raise InputError(f"added_tokens: {len(added)}, expected at most {MOST_ADDED}")
    if sum(len(token["content"]) for token in added) > MOST_ADDED_CHARACTERS:
        raise InputError(f"added_tokens: more than {MOST_ADDED_CHARACTERS:,} characters")
    tokens = vocabulary if isinstance(vocabulary, dict) else [token for token, _ in vocabulary]
    most = LONGEST_TOKEN if isinstance(vocabulary, dict) else LONGEST_PIECE
    longest = max(map(len, (*tokens, *(token["content"] for token in added))), default=0)
    if longest > most:
        raise InputError(f"a token of {longest} characters, expected at most {most}")


def _components(component: Any, part: str) -> list[dict[str, Any]]:
    """The components of a part, those inside a Sequence too; each of a known kind."""
    found, ahead = list[dict[str, Any]](), [] if component is None else [component]
    while ahead:
        component = ahead.pop()
        kind = component.get("type") if isinstance(component, dict) else None
        if kind not in KINDS[part].split():
            shown_kind = shown(str(kind))
            raise InputError(f"{part}: the type {shown_kind}, expected one of {KINDS[part]}")
        found.append(component)
        for key in LISTS if kind == "Sequence" else ():
            ahead += component.get(key, [])
        if len(found) + len(ahead) > MOST_COMPONENTS:
            raise InputError(f"{part}: more than {MOST_COMPONENTS} components")
    return found


def _check_component(component: dict[str, Any], part: str) -> float:
    """Refuse a component that could do harm; how many times longer it may make a text."""
    kind, place = component["type"], f"{part}: {component['type']}"
    if kind != "Sequence" and len(json.dumps(component)) > LONGEST_COMPONENT:
        raise InputError(f"{place}: more than {LONGEST_COMPONENT:,} characters")
    pattern, least = component.get("pattern"), 1
    if isinstance(pattern, dict):
        least = len(pattern.get("String", " "))  # characters that it takes wherever it matches
        if "Regex" in pattern:
            least = check_pattern(pattern["Regex"], place)
        if kind == "Replace" and not least:
            raise InputError(f"{place}: the pattern matches where there is no text")
    if kind == "Prepend":
        _limit(component.get("prepend"), LONGEST_TEXT, place)
        if not component["prepend"]:
            raise InputError(f"{place}: is empty, expected some text")
    if kind == "Strip" and component.get("stop"):
        raise InputError(f"{place}: stop is {component['stop']!r:.80}, expected 0")
    if kind == "FixedLength" and not component.get("length"):
        raise InputError(f"{place}: length is missing or 0, expected more")
    if kind == "TemplateProcessing":
        _check_template(component, place)
    if kind == "Replace":
        content = component["content"]
        _limit(content, LONGEST_TEXT, f"{place}: content")
        return max(1.0, len(content.encode()) / least)
    return GROWTH.get(kind, 1)


def _check_template(template: dict[str, Any], place: str) -> None:
    """Refuse a template that repeats the text; one without a token that it names is a KeyError."""
    pieces, known = template["single"], template["special_tokens"]
    named = [piece["SpecialToken"]["id"] for piece in pieces if "SpecialToken" in piece]
    texts = [piece["Sequence"]["id"] for piece in pieces if "Sequence" in piece]
    if texts not in ([], ["A"]):
        raise InputError(f"{place}: expected the text A once")
    count = sum(len(known[name]["ids"]) + len(known[name]["tokens"]) for name in named)
    if count > 2 * LONGEST_TEMPLATE or len(named) > LONGEST_TEMPLATE:
        raise InputError(f"{place}: more than {LONGEST_TEMPLATE} special tokens")


def _limit(text: Any, longest: int, place: str) -> None:
    """Refuse what is no text, or longer than anybody needs."""
    if not isinstance(text, str) or len(text) > longest:
        raise InputError(f"{place}: {text!r:.40}, expected a text of at most {longest} characters")


class _Group:
    """A group of an expression while it is read; the outermost is the expression itself."""

    def __init__(self, is_look: bool) -> None:
        self.is_look = is_look  # such takes no characters
        self.least = LONGEST_PATTERN  # of the alternatives that ended, as the next two
        self.most_choices = self.alternatives = 0
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
    if not isinstance(pattern, str) or len(pattern) > LONGEST_PATTERN:
        expected = f"expected a text of at most {LONGEST_PATTERN} characters"
        raise InputError(f"{place}: a pattern, {expected}")

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
            require(often <= MOST_REPEATS and group.width <= LONGEST_PATTERN, "repeats too often")
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
