r"""Which characters may stand side by side in a match of a pattern, such as those by which tokenizers split text.

A pattern is read into positions, one per character that it names, and the pairs of positions that may match two
neighbours (Glushkov's construction). That tells where a text can be cut: a search finds the same matches in both parts
as in the whole if no match, not even a partial one, reaches across the cut.

Only what such patterns are made of is read: sequences, alternatives, groups, classes, repetitions and looking one
character ahead. Which characters a class holds is left to the engine that the tokenizers library uses.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, pre_tokenizers

_ESCAPED = re.compile(r"\\(?:[pP]\{\^?\w+\}|x[0-9A-Fa-f]{2}|x\{[0-9A-Fa-f]+\}|u[0-9A-Fa-f]{4}|[sSdDwWrntfv]|\W)")
_END = re.compile(r"\$|\\[zZ]")
_REPEAT = re.compile(r"(?:[?*+]|\{(\d*)(,?)(\d*)\})[?+]?")
_GROUP = re.compile(r"\((?:\?(?P<flags>[a-z]*):|\?(?P<look>[=!])|\?(?P<atomic>>)|(?!\?))")


@dataclass(frozen=True, slots=True)
class _Part:
    """A piece of a pattern."""

    empty: bool
    """It can match nothing."""
    first: frozenset[int] = frozenset()
    """Positions that its first character may have."""
    last: frozenset[int] = frozenset()
    ahead: bool = False
    """It may look at the next character before it has matched one."""


_NOTHING = _Part(True)
_AHEAD = _Part(True, ahead=True)


@dataclass(slots=True)
class Adjacency:
    """What a pattern says about neighbours.

    Args:
        pattern: A regular expression.

    Raises:
        ValueError: It looks back, asks where a line starts, or holds something else that is not read here.
    """

    pattern: str
    classes: list[str] = field(default_factory=list)
    """Per position a pattern that matches one character."""
    follow: set[tuple[int, int]] = field(default_factory=set)
    """Positions of two neighbours in a match."""
    ahead: set[int] = field(default_factory=set)
    """Positions after which the pattern looks at the next character without matching it."""
    counted: set[int] = field(default_factory=set)
    """Positions that are repeated a limited number of times, more than once."""
    _at: int = 0
    _flags: str = ""

    def __post_init__(self) -> None:
        whole = self._alternatives()
        if self._at < len(self.pattern):
            self._refuse()
        if whole.empty:
            raise ValueError(f"pattern {self.pattern!r} matches nothing at all, everywhere.")

    def members(self, chars: str) -> NDArray[np.bool_]:
        """`[P, C]` which of C characters may stand at each position."""
        held = {source: _members(source, chars) for source in set(self.classes)}
        return np.stack([held[source] for source in self.classes])

    def joined(self, members: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """`[C, C]` True where a match may hold two characters side by side, or the pattern look from one to the other.

        Args:
            members: `[P, C]` as `members` gives it.
        """
        pairs = np.zeros((len(self.classes), len(self.classes)), np.float32)
        pairs[tuple(np.array([*self.follow], int).reshape(-1, 2).T)] = 1
        looking = np.any(members[sorted(self.ahead)], axis=0, keepdims=True)
        held = members.astype(np.float32)
        return (held.T @ pairs @ held > 0) | looking.T

    def _refuse(self) -> None:
        rest = self.pattern[self._at : self._at + 10]
        raise ValueError(f"pattern {self.pattern!r}: {rest!r} at {self._at} is not read here.")

    def _peek(self) -> str:
        return self.pattern[self._at : self._at + 1]

    def _alternatives(self) -> _Part:
        parts = [self._sequence()]
        while self._peek() == "|":
            self._at += 1
            parts.append(self._sequence())
        return _Part(
            any(part.empty for part in parts),
            frozenset().union(*(part.first for part in parts)),
            frozenset().union(*(part.last for part in parts)),
            any(part.ahead for part in parts),
        )

    def _sequence(self) -> _Part:
        whole = _NOTHING
        while self._peek() not in ("", "|", ")"):
            whole = self._joined(whole, self._repeated())
        return whole

    def _joined(self, left: _Part, right: _Part) -> _Part:
        self._neighbours(left, right)
        return _Part(
            left.empty and right.empty,
            left.first | (right.first if left.empty else frozenset()),
            right.last | (left.last if right.empty else frozenset()),
            left.ahead or (left.empty and right.ahead),
        )

    def _neighbours(self, left: _Part, right: _Part) -> None:
        self.follow |= {(before, after) for before in left.last for after in right.first}
        if right.ahead:
            self.ahead |= left.last

    def _repeated(self) -> _Part:
        part = self._atom()
        while repeat := _REPEAT.match(self.pattern, self._at):
            self._at = repeat.end()
            least, comma, most = repeat.groups()
            once = repeat[0][0] == "?" or (least == "1" and not comma) or most == "1"
            if not once:
                self._neighbours(part, part)
                self.counted |= (part.first | part.last) if comma or least else set()
            may_be_none = repeat[0][0] in "?*" or (repeat[0][0] == "{" and int(least or 0) == 0)
            part = replace(part, empty=part.empty or may_be_none)
        return part

    def _atom(self) -> _Part:
        char = self._peek()
        if char == "(":
            return self._group()
        if char == "[":
            return self._position(self._bracket())
        if end := _END.match(self.pattern, self._at):
            self._at = end.end()
            return _AHEAD
        if char == "\\":
            escaped = _ESCAPED.match(self.pattern, self._at)
            return self._position(escaped[0]) if escaped else self._unread()
        return self._unread() if char in "^?*+{" else self._position(char)

    def _unread(self) -> _Part:
        self._refuse()
        return _NOTHING

    def _group(self) -> _Part:
        group = _GROUP.match(self.pattern, self._at)
        if not group or (group["flags"] or "").strip("i"):
            return self._unread()
        outside, self._flags = self._flags, group["flags"] or self._flags
        self._at, known = group.end(), set(self.follow)
        part = self._alternatives()
        # What is looked at is not matched, and more than one character of it could lie beyond any neighbour.
        if self._peek() != ")" or (group["look"] and (self.follow != known or part.empty or part.ahead)):
            return self._unread()
        self._at += 1
        self._flags = outside
        return _AHEAD if group["look"] else part

    def _bracket(self) -> str:
        """The text of a class, in which others may be nested."""
        start, depth = self._at, 0
        while self._at < len(self.pattern):
            char = self._peek()
            self._at += 2 if char == "\\" else 1
            depth += (char == "[") - (char == "]")
            if not depth:
                text = self.pattern[start : self._at]
                self._at = start
                return text
        self._at = start
        self._refuse()
        return ""

    def _position(self, source: str) -> _Part:
        self._at += len(source)
        literal = source if source[0] in "[\\." else re.escape(source)
        if self._flags and not source.isascii():  # one such letter may stand for two of the other case
            self._refuse()
        self.classes.append(f"(?i:{literal})" if self._flags else literal)
        only = frozenset({len(self.classes) - 1})
        return _Part(False, only, only)


def _members(source: str, chars: str) -> NDArray[np.bool_]:
    """`[C]` True for the characters that a class holds."""
    found = np.ones(len(chars), bool)
    try:
        others = pre_tokenizers.Split(Regex(source), "removed").pre_tokenize_str(chars) if chars else []
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"class {source!r} of a pattern cannot be read: {error}.") from error
    for _, (start, end) in others:
        found[start:end] = False
    return found


def is_read(pattern: str) -> bool:
    r"""True if a pattern holds nothing but what is read here.

    >>> is_read(r"\p{L}+(?!x)"), is_read(r"(?<=x)y")
    (True, False)
    """
    try:
        Adjacency(pattern)
    except ValueError:
        return False
    return True


def counts(pattern: str, chars: str) -> bool:
    r"""True if a pattern limits how often one of these characters is repeated.

    >>> counts(r"\s{2,4}x", " "), counts(r"\p{N}{1,3}|\s+", " ")
    (True, False)
    """
    read = Adjacency(pattern)
    return bool(read.members(chars)[sorted(read.counted)].any())


def neighbours(patterns: Sequence[str], chars: str) -> tuple[NDArray[np.intp], NDArray[np.bool_]]:
    r"""Which characters must not be torn apart.

    Args:
        patterns: Those by which a text is searched.
        chars: C distinct characters.

    Returns:
        `[C]` a group for each character, of those that no pattern tells apart; and `[G, G]` True where a match of one
        of the patterns may hold characters of two groups side by side, or may look from the one at the other.

    Raises:
        ValueError: A pattern holds something that is not read here.

    >>> group, joined = neighbours([r"\p{L}+|\s+(?!\S)"], "ab .")
    >>> joined[np.ix_(group, group)].astype(int).tolist()
    [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]
    """
    read = [Adjacency(pattern) for pattern in patterns]
    members = [one.members(chars) for one in read]
    every = np.concatenate([*members, np.zeros((1, len(chars)), bool)])
    _, first, group = np.unique(every, axis=1, return_index=True, return_inverse=True)
    joined = np.zeros((len(first), len(first)), bool)
    for one, held in zip(read, members, strict=True):
        joined |= one.joined(held[:, first])
    return group.reshape(-1), joined
