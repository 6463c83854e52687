"""tokenalign once more, slow and obvious: one token after the other, in plain Python, from what its documents say.

Covers tokenizers whose tokens tell which bytes they stand for: byte-level ones, and those that mark blanks with `▁` and
have `<0x0A>` for a byte, with or without a normaliser and added tokens.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise

from tokenizers import Tokenizer, pre_tokenizers

from tokenalign import Flag

TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<action>", "</action>")


def printable_bytes() -> dict[str, int]:
    """Byte-level BPE writes each byte as one printable character; those that are none move up to U+0100 and on."""
    alphabet, moved = {}, 0
    for byte in range(256):
        if 33 <= byte <= 126 or 161 <= byte <= 172 or 174 <= byte <= 255:
            alphabet[chr(byte)] = byte
        else:
            alphabet[chr(256 + moved)] = byte
            moved += 1
    return alphabet


ALPHABET = printable_bytes()


@dataclass(frozen=True, kw_only=True)
class Side:
    """A tokenizer and the conventions that the test gave it."""

    tokenizer: Tokenizer
    marked: bool = False
    """True where `▁` stands for a blank and `<0x0A>` for a byte, else byte-level."""
    ends: frozenset[int] = frozenset()
    own_end: int | None = None
    pad: int | None = None
    bos: int | None = None
    surplus: int = 0
    """Ids of the model beyond its tokenizer."""

    @cached_property
    def added(self):
        return self.tokenizer.get_added_tokens_decoder()

    @cached_property
    def pieces(self) -> list[bytes]:
        """Bytes per id, empty where there is no token."""
        tokens = self.tokenizer.get_vocab(with_added_tokens=False)
        table = [b""] * (1 + max([*tokens.values(), *self.added]) + self.surplus)
        for token, id in tokens.items():
            table[id] = self._piece(token)
        for id, token in self.added.items():
            literal = token.special or not self.marked
            table[id] = (token.content if literal else token.content.replace("▁", " ")).encode()
        return table

    def _piece(self, token: str) -> bytes:
        if not self.marked:
            written = set(token) <= set(ALPHABET)
            return bytes(ALPHABET[character] for character in token) if written else token.encode()
        if token.startswith("<0x") and token.endswith(">") and len(token) == 6:
            return bytes([int(token[3:5], 16)])
        return token.replace("▁", " ").encode()

    def special(self, id: int) -> bool:
        return id in self.added and self.added[id].special

    def key(self, id: int) -> tuple[bytes, bool]:
        """What a token is: its bytes and its role."""
        return self.pieces[id], self.special(id)

    @cached_property
    def encoder(self) -> Tokenizer:
        """The tokenizer where nothing is added to a text, neither before it nor to split it."""
        copy = Tokenizer.from_str(self.tokenizer.to_str())
        copy.encode_special_tokens = True
        copy.no_padding()
        copy.no_truncation()
        if isinstance(copy.pre_tokenizer, pre_tokenizers.Metaspace):
            copy.pre_tokenizer.prepend_scheme = "never"
        return copy

    def normalized(self, text: str) -> str:
        """What the tokenizer reads."""
        if self.encoder.normalizer is not None:
            text = self.encoder.normalizer.normalize_str(text)
        return text.replace("▁", " ") if self.marked else text


@dataclass
class Spelling:
    """A tokenizer's own spelling of one text."""

    ids: list[int] = field(default_factory=list)
    ends: list[int | None] = field(default_factory=list)
    """Where each token ends in the bytes of the text; None: at no place of it."""
    changed: set[int] = field(default_factory=set)
    """Bytes of the text that the tokens do not spell."""


def runs(text: bytes) -> list[tuple[int, int, bool]]:
    """Start, end and validity of each stretch that is text, or that is no UTF-8."""
    valid = []
    while len(valid) < len(text):
        start = len(valid)
        for size in (1, 2, 3, 4):
            try:
                text[start : start + size].decode()
            except UnicodeDecodeError:
                continue
            valid += [True] * len(text[start : start + size])
            break
        else:
            valid.append(False)
    bounds = [i for i in range(len(valid) + 1) if i in (0, len(valid)) or valid[i] != valid[i - 1]]
    return [(start, end, valid[start]) for start, end in pairwise(bounds)]


def spell(side: Side, text: bytes, tags: Sequence[str]) -> Spelling:
    """The tokenizer's own spelling in the middle of a text: special tokens are text, but for tags."""
    out = Spelling()
    for start, end, valid in runs(text):
        if valid:
            _spell_text(side, text[start:end].decode(), start, tags, out)
        else:
            for place in range(start, end):
                out.ids.append(side.pieces.index(text[place : place + 1]))
                out.ends.append(place + 1)
    return out


def is_blank(character: str) -> bool:
    """Unicode's White_Space, which is what tokenizers go by; Python counts four separators besides."""
    return character.isspace() and character not in "\x1c\x1d\x1e\x1f"


def _spell_text(side: Side, text: str, offset: int, tags: Sequence[str], out: Spelling) -> None:
    """Added tokens first, the leftmost and of those the longest; what lies between is split by itself."""
    wholes = {token.content: id for id, token in side.added.items() if not token.special or token.content in tags}
    start = place = 0
    while place < len(text):
        content = max((one for one in wholes if text.startswith(one, place)), key=len, default=None)
        if content is None:
            place += 1
            continue
        token, first, last = side.added[wholes[content]], place, place + len(content)
        while token.lstrip and first > start and is_blank(text[first - 1]):
            first -= 1
        while token.rstrip and last < len(text) and is_blank(text[last]):
            last += 1
        _spell_plain(side, text[start:first], offset + len(text[:start].encode()), out)
        out.ids.append(wholes[content])
        out.ends.append(offset + len(text[:last].encode()))
        for blanks in ((first, place), (place + len(content), last)):
            out.changed.update(range(*(offset + len(text[:end].encode()) for end in blanks)))
        start = place = last
    _spell_plain(side, text[start:], offset + len(text[:start].encode()), out)


def _spell_plain(side: Side, text: str, offset: int, out: Spelling) -> None:
    """A text without added tokens. The normaliser may change it; where cutting it changes nothing, both sides meet."""
    if not text:
        return
    whole = side.normalized(text)
    cuts = [0]
    met = {0: 0}
    for place in range(1, len(text) + 1):
        before, after = side.normalized(text[:place]), side.normalized(text[place:])
        if before + after == whole:
            cuts.append(place)
            left, right = cuts[-2:]
            source, became = text[left:right].encode(), side.normalized(text[left:right]).encode()
            at, end = len(text[:left].encode()), len(side.normalized(text[:left]).encode())
            if source == became:
                met.update({end + i: at + i for i in range(len(source))})
            else:
                out.changed.update(range(offset + at, offset + at + len(source)))
            met[len(before.encode())] = len(text[:place].encode())
    written = 0
    for id in _gap_ids(side, text):
        out.ids.append(id)
        written += len(side.pieces[id])
        out.ends.append(offset + met[written] if written in met else None)
    assert written == len(whole.encode()), (text, whole)


def _gap_ids(side: Side, text: str) -> list[int]:
    return side.encoder.encode(text, add_special_tokens=False).ids


@dataclass(frozen=True, kw_only=True)
class Row:
    """What is said about one row."""

    bits: list[int]
    teacher_ids: list[int]
    student_chunk: list[int]
    teacher_chunk: list[int]
    ok: bool
    changed: bool
    """True where the teacher changes text. Its tokenizer tells where tokens end by whole characters, so that the
    package may join chunks that are told apart here."""
    broken: bool
    """True where it changes text beside bytes that are no UTF-8. Of such text the package promises the ids alone."""


class Reference:
    """Both sides of a pair."""

    def __init__(self, student: Side, teacher: Side, tags: Sequence[str] = TAGS) -> None:
        self.student, self.teacher, self.tags = student, teacher, tags
        self.to_teacher = mapping(student, teacher)
        self.to_student = mapping(teacher, student)

    @property
    def collisions(self) -> list[int]:
        both = range(min(len(self.student.pieces), len(self.teacher.pieces)))
        known = [id for id in both if self.student.pieces[id] and self.teacher.pieces[id]]
        return [id for id in known if self.student.key(id) != self.teacher.key(id)]

    def is_control(self, id: int) -> bool:
        """A token that stands for no text: a segment of its own."""
        piece = self.student.pieces[id]
        silent = (self.student.special(id) or not piece) and piece.decode(errors="replace") not in self.tags
        return silent or id in self.student.ends

    def answer(self, id: int) -> int | None:
        """What the teacher writes for a control token; None: its text."""
        same = self.to_teacher[id] if self.to_teacher[id] >= 0 else None
        ends_turn = id in self.student.ends and self.teacher.ends
        return self.teacher.own_end if ends_turn and same not in self.teacher.ends else same

    def padding(self, ids: Sequence[int]) -> list[bool]:
        pads = {self.student.pad, None if self.teacher.pad is None else self.to_student[self.teacher.pad]} - {None}
        first, last = 0, len(ids)
        while first < len(ids) and ids[first] in pads:
            first += 1
        while last > first and ids[last - 1] in pads:
            last -= 1
        # A pad token that also ends turns ends this one, if no other did.
        if first < last < len(ids) and ids[last] in self.student.ends and ids[last - 1] not in self.student.ends:
            last += 1
        return [not first <= place < last for place in range(len(ids))]

    def row(self, ids: Sequence[int], mask: Sequence[bool] | None = None) -> Row:
        """Flags and the teacher's text of one row."""
        outside = []
        bits = []
        for id, pad, inside in zip(ids, self.padding(ids), mask or [True] * len(ids), strict=True):
            outside.append(pad or not inside)
            bits.append((Flag.PAD if pad else 0) | (0 if inside else Flag.PROMPT))
            bits[-1] |= Flag.SPECIAL if self.student.special(id) else 0
            bits[-1] |= Flag.UNMAPPED if self.to_teacher[id] < 0 else 0
            bits[-1] |= Flag.EOS_CLASS if id in self.student.ends and not outside[-1] else 0
        teacher_ids: list[int] = []
        teacher_chunk: list[int] = []
        student_chunk = [-1] * len(ids)
        chunks, ok, changed, broken = 0, True, False, False
        for places in self.segments(ids, outside):
            own = [ids[place] for place in places]
            if self.is_control(own[0]):
                spelled = self._control(own[0], ours := [-1], theirs := [])
                ok &= bool(spelled)
                found = [0]
            else:
                spelling = self._text(own, ours := [], theirs := [], found := [])
                spelled = spelling.ids
                text = b"".join(self.student.pieces[id] for id in own)
                changed |= bool(spelling.changed)
                broken |= bool(spelling.changed) and not all(valid for _, _, valid in runs(text))
            sizes, by_chunk = (Counter(ours), Counter(theirs)), dict(zip(theirs, spelled, strict=True))
            for place, chunk, before, flags, id in zip(places, ours, [None, *ours], found, own, strict=False):
                alone = chunk >= 0 and sizes[0][chunk] == sizes[1][chunk] == 1
                alike = alone and self._alike(id, by_chunk[chunk])
                begins = chunk not in (-1, before)
                bits[place] |= flags | (0 if alike else Flag.NONCANONICAL) | (0 if begins else Flag.MISALIGNED)
                student_chunk[place] = chunk + chunks if chunk >= 0 else -1
            teacher_ids += spelled
            teacher_chunk += [chunk + chunks for chunk in theirs]
            chunks += 1 + max(theirs, default=-1)
        return Row(
            bits=bits, teacher_ids=teacher_ids, student_chunk=student_chunk, teacher_chunk=teacher_chunk, ok=ok,
            changed=changed, broken=broken,
        )  # fmt: skip

    def segments(self, ids: Sequence[int], outside: Sequence[bool]) -> Iterable[list[int]]:
        """Places of each stretch of text, and of each control token."""
        current: list[int] = []
        for place, id in enumerate(ids):
            if outside[place] or self.is_control(id):
                yield from [current] if current else []
                yield from [] if outside[place] else [[place]]
                current = []
            else:
                current.append(place)
        yield from [current] if current else []

    def _control(self, id: int, ours: list[int], theirs: list[int]) -> list[int]:
        answer = self.answer(id)
        ids = spell(self.teacher, self.student.pieces[id], self.tags).ids if answer is None else [answer]
        theirs += [0] * len(ids)
        ours[0] = 0 if ids else -1
        return ids

    def _text(self, ids: list[int], ours: list[int], theirs: list[int], found: list[int]) -> Spelling:
        text = b"".join(self.student.pieces[id] for id in ids)
        spelling = spell(self.teacher, text, self.tags)
        ends, end = [], 0
        for id in ids:
            end += len(self.student.pieces[id])
            ends.append(end)
        ours += walk(ends, spelling.ends)
        theirs += walk(spelling.ends, ends)
        tagged = {
            byte
            for tag in self.tags
            for start in occurrences(text, tag)
            for byte in range(start, start + len(tag.encode()))
        }
        broken = {byte for start, end, valid in runs(text) if not valid for byte in range(start, end)}
        for start, end in pairwise([0, *ends]):
            touched = set(range(start, end))
            found.append(
                (Flag.TAG if touched & tagged else 0)
                | (Flag.INVALID_UTF8 if touched & broken else 0)
                | (Flag.NORMALISED if touched & spelling.changed else 0)
            )
        return spelling

    def _alike(self, id: int, spelled: int) -> bool:
        """Does the teacher mean by its token what the student means by its own?"""
        if self.to_teacher[id] >= 0:
            return self.to_teacher[id] == spelled
        return not self.is_control(id)


def walk(ends: Sequence[int | None], others: Sequence[int | None]) -> list[int]:
    """Chunk of each token: a new one begins after each end that the other side has too."""
    shared = {end for end in others if end is not None}
    chunk, chunks = 0, []
    for end in ends:
        chunks.append(chunk)
        chunk += end in shared
    return chunks


def mapping(source: Side, target: Side) -> list[int]:
    """Id of the other side with equal bytes and role per id: the same id, or else the lowest; -1 for none."""
    lowest: dict[tuple[bytes, bool], int] = {}
    for id in range(len(target.pieces)):
        if target.pieces[id]:
            lowest.setdefault(target.key(id), id)
    mapped = []
    for id in range(len(source.pieces)):
        same = source.pieces[id] and id < len(target.pieces) and source.key(id) == target.key(id)
        mapped.append(id if same else lowest.get(source.key(id), -1))
    return mapped


def occurrences(text: bytes, tag: str) -> list[int]:
    """Where a tag starts; one occurrence does not overlap the next."""
    starts, place = [], 0
    while place <= len(text) - len(tag.encode()):
        if text.startswith(tag.encode(), place):
            starts.append(place)
            place += len(tag.encode())
        else:
            place += 1
    return starts


def keep(ids: Sequence[int], bits: Sequence[int], policy: str, end_class: bool) -> list[bool]:
    """A policy over one row, read from the left."""
    seen: set[object] = set()
    kept = []
    for id, bit in zip(ids, bits, strict=True):
        otherwise, end = bool(bit & Flag.NONCANONICAL), bool(bit & Flag.EOS_CLASS)
        piece_of_tag = otherwise and bool(bit & Flag.TAG)
        if bit & (Flag.PAD | Flag.PROMPT):
            kept.append(False)
            continue
        if policy == "strict":
            kept.append(bit in (0, Flag.EOS_CLASS))
            continue
        if policy == "canonical":
            drop = otherwise
        elif policy == "tags":
            drop = piece_of_tag or (end and otherwise)
        else:
            piece = "an end of turn" if end else id
            drop = (piece_of_tag or end) and piece not in seen
            seen |= {piece} if drop else set()
        kept.append(not drop or (end and end_class))
    return kept


def tag_spans(side: Side, ids: Sequence[int], tags: Iterable[str]) -> list[tuple[int, int, str]]:
    """First token, one past the last, and tag, for every occurrence."""
    owner = [place for place, id in enumerate(ids) for _ in side.pieces[id]]
    text = b"".join(side.pieces[id] for id in ids)
    return sorted(
        (owner[start], owner[start + len(tag.encode()) - 1] + 1, tag)
        for tag in set(tags)
        for start in occurrences(text, tag)
    )


def project_topk(
    to_student: Sequence[int], ids: Sequence[int], logp: Sequence[float]
) -> tuple[list[int], list[float], float]:
    """A teacher's support over the student's ids; the first of several that mean one student token holds their sum."""
    out_ids, out_p, lost = [-1] * len(ids), [0.0] * len(ids), 0.0
    for place, (id, value) in enumerate(zip(ids, logp, strict=True)):
        mapped = -1 if id < 0 else to_student[id]
        if mapped < 0:
            lost += math.exp(value)
            continue
        first = out_ids.index(mapped) if mapped in out_ids else place
        out_ids[first] = mapped
        out_p[first] += math.exp(value)
    return out_ids, [math.log(p) if p else -math.inf for p in out_p], lost


def merge_class(logp: Sequence[float], ids: Sequence[int], classes: Sequence[Iterable[int]]) -> list[float]:
    """The first member present of each class holds the class's probability."""
    out = [math.exp(value) for value in logp]
    for members in map(set, classes):
        places = [place for place, id in enumerate(ids) if id in members]
        for place in places[1:]:
            out[places[0]] += out[place]
            out[place] = 0.0
    return [math.log(p) if p else -math.inf for p in out]
