"""Tokenizers of the sentencepiece library, from the bytes of a `.model` file.

Texts are split by the library itself. It does not tell which pieces its user defined nor how it normalises, so the
file, a protocol-buffers message, is read for that.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property, partial
from itertools import chain
from typing import Any

from tokenalign.kinds.kind import Added, Kind, Spelled, as_piece, by_id
from tokenalign.splitting import BLANK_RUN, Splitting

# Numbers of fields and values in sentencepiece_model.proto.
_PIECES, _TRAINER, _NORMALIZER = 1, 2, 3
_SCORE, _TYPE = 2, 3
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_UNIGRAM, _BPE = 1, 2
_MODEL_TYPE, _BLANK_LAST, _BYTE_FALLBACK = 3, 24, 35
_CHARSMAP, _DUMMY_PREFIX, _ONE_BLANK, _ESCAPED = 2, 3, 4, 5
_ROLES = {40: ("unk_token", 0), 41: ("bos_token", 1), 42: ("eos_token", 2), 43: ("pad_token", -1)}
"""Field of the trainer's settings: role and default id."""


def _with_dummy_prefix(model: bytes, value: bool) -> bytes:
    """The model with one setting changed: of a field that occurs twice, also in nested messages, the last counts."""
    return model + bytes([_NORMALIZER << 3 | 2, 2, _DUMMY_PREFIX << 3, value])


def kind_of(model: bytes, more: Mapping[int, Added]) -> Kind:
    """The kind of a sentencepiece model.

    Args:
        model: The content of the file.
        more: Further tokens by id, which are matched before the model splits a text; those with an id of the model's
            own have no say.

    Raises:
        ValueError: It is no sentencepiece model, or the library is missing.
    """
    processor = _processor(model)
    fields = list(_fields(model))
    settings = [dict(_fields(value)) for number, value in fields if number == _PIECES]
    trainer, normalizer = (
        dict(chain.from_iterable(_fields(value) for number, value in fields if number == wanted))
        for wanted in (_TRAINER, _NORMALIZER)
    )
    types = [setting.get(_TYPE, _NORMAL) for setting in settings]
    texts = [processor.id_to_piece(id) for id in range(len(types))]
    own = {
        id: Added(content=texts[id], special=type != _USER_DEFINED)
        for id, type in enumerate(types)
        if type in (_UNKNOWN, _CONTROL, _USER_DEFINED)
    }
    more = {id: entry for id, entry in more.items() if id >= len(types)}
    added = own | dict(more)
    contents = {entry.content: id for id, entry in added.items()}
    unknown = types.index(_UNKNOWN) if _UNKNOWN in types else None
    marked = normalizer.get(_ESCAPED, 1) != 0
    roles = {role: trainer.get(number, default) for number, (role, default) in _ROLES.items()}

    def piece(text: str, type: int) -> bytes:
        if type == _BYTE:
            return bytes([int(text[3:-1], 16)])
        return as_piece(text if type in (_UNKNOWN, _CONTROL) or not marked else text.replace("▁", " "))

    def id_of(content: str) -> int | None:
        try:
            id = contents[content] if content in contents else processor.piece_to_id(content)
        except TypeError:  # a lone surrogate, which is part of no text
            return None
        return None if id == unknown and contents.get(content) != unknown else id

    return Kind(
        pieces=by_id(
            chain(enumerate(map(piece, texts, types)), ((id, as_piece(entry.content)) for id, entry in more.items()))
        ),
        added=added,
        id_of=id_of,
        encoder=partial(
            _Encoder,
            model,
            added=own,
            more=more,
            byte_ids=frozenset(id for id, type in enumerate(types) if type == _BYTE),
            one_blank=normalizer.get(_ONE_BLANK, 1) != 0 and not trainer.get(_BLANK_LAST),
        ),
        splitting=partial(
            _splitting,
            local=trainer.get(_MODEL_TYPE, _UNIGRAM) == _BPE,
            identity=not normalizer.get(_CHARSMAP),
            one_blank=normalizer.get(_ONE_BLANK, 1) != 0,
        ),
        rules={
            "settings": [trainer.get(number) for number in (_MODEL_TYPE, _BLANK_LAST, _BYTE_FALLBACK)],
            "normalizer": [normalizer.get(number) for number in (_CHARSMAP, _ONE_BLANK, _ESCAPED)],
            "pieces": [(setting.get(_TYPE), setting.get(_SCORE)) for setting in settings],
            "added": sorted(entry.content for entry in more.values() if not entry.special),
        },
        dummy_prefix=normalizer.get(_DUMMY_PREFIX, 1) != 0 and not trainer.get(_BLANK_LAST),
        unknown=unknown,
        declared={role: texts[id] for role, id in roles.items() if 0 <= id < len(texts)},
    )


def _splitting(*, local: bool, identity: bool, one_blank: bool) -> Splitting | None:
    """How a model splits: merges are local; of two paths of equal weight, rounding chooses by what stands before."""

    def normalize(char: str) -> str:
        return " " if char in " ▁" else char if identity or (char.isalnum() and char.isascii()) else ""

    if not local:
        return None
    # Blanks are dropped after a text, so that a cut must leave none there.
    return Splitting(patterns=(BLANK_RUN,) if one_blank else (), normalize=normalize, opens=" " if one_blank else None)


def _processor(model: bytes) -> Any:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ValueError(
            'it is split by the sentencepiece library. Install that: pip install "tokenalign[sentencepiece]".'
        ) from error
    try:
        return SentencePieceProcessor(model_proto=model)
    except (OSError, RuntimeError, ValueError) as error:
        raise ValueError(f"it is no sentencepiece model ({error}). Download it again.") from error


def _fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protocol-buffers message; numbers of fixed width are left as bytes.

    >>> list(_fields(bytes([0x08, 0x96, 0x01, 0x12, 2, 97, 98])))
    [(1, 150), (2, b'ab')]
    """
    place, end = 0, len(message)
    while place < end:
        key, place = _varint(message, place)
        wire = key & 7
        if wire == 0:
            value, place = _varint(message, place)
            yield key >> 3, value - (1 << 64) if value >> 63 else value
            continue
        size = {1: 8, 5: 4}.get(wire)
        if size is None:
            size, place = _varint(message, place)
        yield key >> 3, message[place : place + size]
        place += size


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """A number of variable width, and the place after it."""
    value = shift = 0
    while True:
        byte = message[place]
        value, place, shift = value | (byte & 0x7F) << shift, place + 1, shift + 7
        if byte < 0x80:
            return value, place


class _Encoder:
    """See `Encoder`. Tokens beyond the model, and control tokens that are tags, are matched before it splits a text."""

    def __init__(
        self,
        model: bytes,
        tags: tuple[str, ...],
        *,
        added: Mapping[int, Added],
        more: Mapping[int, Added],
        byte_ids: frozenset[int],
        one_blank: bool,
    ) -> None:
        self._model, self._byte_ids, self._one_blank = model, byte_ids, one_blank
        texts = {entry.content: id for id, entry in more.items() if not entry.special}
        controls = {entry.content: id for id, entry in chain(added.items(), more.items()) if entry.special}
        self._whole = texts | {tag: controls[tag] for tag in tags if tag in controls}
        longest_first = sorted(self._whole, key=len, reverse=True)
        self._continuing = _processor(_with_dummy_prefix(model, False))
        self._splitter = re.compile(f"({'|'.join(map(re.escape, longest_first))})" if longest_first else r"(?!)")

    @cached_property
    def _opening(self) -> Any:
        return _processor(self._model)

    @cached_property
    def _after_blank(self) -> Any:
        return _processor(_with_dummy_prefix(self._model, True))

    def _processor_of(self, text: str) -> Any:
        # Where the library drops blanks before a text, the dummy prefix stands for those that a continued text has.
        return self._after_blank if self._one_blank and text[:1].isspace() else self._continuing

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        return [[id for part, whole in self._cut(text) for id in self._ids(part, whole)] for text in texts]

    def spelled(self, texts: Sequence[str], *, opening: bool = False) -> list[Spelled]:
        return [self._spelled(text, opening) for text in texts]

    def _cut(self, text: str) -> Iterator[tuple[str, int | None]]:
        """Alternately text for the model and tokens that are matched before, the latter with their id."""
        for index, part in enumerate(self._splitter.split(text)):
            yield part, self._whole[part] if index % 2 else None

    def _ids(self, text: str, whole: int | None) -> list[int]:
        return self._processor_of(text).encode(text) if whole is None else [whole]

    def _spelled(self, text: str, opening: bool) -> Spelled:
        found: list[tuple[int, int, int]] = []
        start = 0
        for part, whole in self._cut(text):
            if whole is None:
                processor = self._opening if opening and not start else self._processor_of(part)
                pieces = list(_pieces(processor.encode(part, out_type="serialized_proto"), self._byte_ids))
            else:
                pieces = [(whole, 0, len(part.encode()))]
            found += ((id, start + first, start + end) for id, first, end in pieces)
            start += len(part.encode())
        ids, starts, ends = zip(*found, strict=True) if found else ((), (), ())
        return Spelled(ids=ids, starts=starts, ends=ends)


def _pieces(split: bytes, byte_ids: frozenset[int]) -> list[tuple[int, int, int]]:
    """Id, start and end of each piece of a serialised `SentencePieceText`, in bytes."""
    pieces = []
    later = 0
    for piece in reversed([dict(_fields(value)) for number, value in _fields(split) if number == 2]):
        id, start, end = piece[2], piece.get(4, 0), piece.get(5, 0)
        # Of the bytes of one character only the last one reaches over it.
        later = later if id in byte_ids and start == end else end
        pieces.append((id, start, later))
    return pieces[::-1]
