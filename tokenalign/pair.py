"""A pair of tokenizers and every question one can ask about it."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokenalign.arguments import checked_ids, checked_mask, padding
from tokenalign.chunks import Alignment, Ints, align_ends, alignment
from tokenalign.convention import Convention, all_tags, detect
from tokenalign.flags import Flag, TokenFlags
from tokenalign.matching import Row, matched
from tokenalign.relation import Relation, VocabMap, collisions, relation
from tokenalign.report import Report, make_report
from tokenalign.respelling import Respelling, TeacherText, teacher_text
from tokenalign.source import load
from tokenalign.speller import Speller
from tokenalign.tags import checked_tags, holding
from tokenalign.vocabulary import ByteTable, Vocabulary, vocabulary_of

END = b"\xff"
"""Stands for any end of turn; no text contains this byte."""


class Pair:
    """A student's and a teacher's tokenizer.

    Args:
        student: A Hugging Face folder; a `tokenizer.json`, a `tekken.json` or a sentencepiece model; a
            `tokenizers.Tokenizer`, a `tiktoken.Encoding`, a `sentencepiece.SentencePieceProcessor`; or an object that
            has one as its `.backend_tokenizer` or `.sp_model`.
        teacher: Likewise.
        tags: Tags besides the usual ones and those that the chat templates show, see `Pair.tags`.
        student_size: Ids of the student's output where the model is padded beyond its tokenizer; such ids are UNMAPPED.
        teacher_size: Likewise.

    Raises:
        FileNotFoundError: A path does not exist or holds no tokenizer.
        ValueError: A tokenizer is of an unsupported kind, a size is smaller than its tokenizer, or a tag is no text.
    """

    tags: tuple[str, ...]
    """What TAG flags mark, in any segmentation: `<think>`, `<tool_call>`, `<action>` and what closes them, the tags
    around reasoning and tool calls in either chat template, and those that the caller named."""

    def __init__(
        self,
        student: Any,
        teacher: Any,
        *,
        tags: Sequence[str] = (),
        student_size: int | None = None,
        teacher_size: int | None = None,
    ) -> None:
        named = checked_tags(tags)
        sources = load(student), load(teacher)
        self.names = sources[0].name, sources[1].name
        self.student = vocabulary_of(sources[0], student_size)
        self.teacher = vocabulary_of(sources[1], teacher_size)
        self._conventions: tuple[Convention, Convention] = (
            detect(sources[0], self.student, sources[0].chat_template),
            detect(sources[1], self.teacher, sources[1].chat_template),
        )
        self.tags = all_tags(*self._conventions, named=named)

    @cached_property
    def spellers(self) -> tuple[Speller, Speller]:
        """The two tokenizers as they spell bytes in the middle of a text, student's and teacher's."""
        return Speller(self.student, self.tags), Speller(self.teacher, self.tags)

    @cached_property
    def conventions(self) -> tuple[Convention, Convention]:
        """How the student's side and the teacher's open and end turns, and how each holds the tags."""
        ours, theirs = (
            replace(convention, tags=holding(speller, self.tags))
            for convention, speller in zip(self._conventions, self.spellers, strict=True)
        )
        return ours, theirs

    @cached_property
    def vocab(self) -> VocabMap:
        """Which ids of one side mean the same as which of the other."""
        return VocabMap.between(self.student, self.teacher)

    @cached_property
    def collisions(self) -> NDArray[np.int64]:
        """Ids that both vocabularies have but that mean different bytes or roles, ascending."""
        return collisions(self.student, self.teacher)

    @cached_property
    def relation(self) -> Relation:
        """How the two tokenizers are related, conventions aside."""
        return relation(self.student, self.teacher)

    def align(self, student_ids: ArrayLike, teacher_ids: ArrayLike) -> Alignment:
        """Chunks of one text that both sides tokenized.

        End-of-turn tokens of the two sides count as equal text; bos, padding and ids without a token are no text, so
        they lie in no chunk; nor is a blank that a tokenizer puts before a text. Where one side is what its tokenizer
        makes of the other's text, chunks follow that tokenizer's own offsets, and what it drops at the end lies in no
        chunk. Where the texts differ otherwise, `ok` is False and the difference lies in one chunk.

        Args:
            student_ids: `[m]`, a list, an array of any integer type, or an object with `__array__`.
            teacher_ids: `[n]`

        Raises:
            ValueError: An id is no integer, negative or beyond its tokenizer, or an argument has not one axis.
        """
        ours = checked_ids(student_ids, self.student, axes=(1,))
        theirs = checked_ids(teacher_ids, self.teacher, axes=(1,))
        student, teacher = (
            Row(ids=ids, table=table, control=control, speller=speller)
            for ids, (table, control), speller in zip((ours, theirs), self._neutral, self.spellers, strict=True)
        )
        found = matched(student, teacher)
        student_chunk, teacher_chunk = align_ends(*found.ends)
        student_chunk[(student.lengths == 0) | (not teacher.text) | found.dropped[0]] = -1
        teacher_chunk[(teacher.lengths == 0) | (not student.text) | found.dropped[1]] = -1
        return alignment(student_chunk, teacher_chunk, ok=found.ok)

    @cached_property
    def _neutral(self) -> list[tuple[ByteTable, NDArray[np.bool_]]]:
        """Per side the bytes of each id, without its ways of opening, ending and padding a text, and the controls."""
        sides = zip((self.student, self.teacher), self._conventions, strict=True)
        return [_neutral(vocabulary, convention, self.tags) for vocabulary, convention in sides]

    def flags(self, ids: ArrayLike, response_mask: ArrayLike | None = None) -> TokenFlags:
        """Why each position of a batch may be about spelling rather than text.

        Every run of unmasked tokens is read as the middle of a text, on its own: neither padding nor prompt has a say.

        Args:
            ids: `[B, T]` student tokens, padded on either side, or one row `[T]`; the result has the same shape. A
                list, an array of any integer type, or an object with `__array__`.
            response_mask: In the shape of the ids, True where the student wrote; everything else is PROMPT.

        Raises:
            ValueError: An id is no integer, negative or beyond the tokenizer, or the mask has another shape.
        """
        ids, outside = self._outside(ids, response_mask)
        live = outside == 0
        bits = outside | self._id_bits[ids] | np.where(live & self._ends[ids], Flag.EOS_CLASS, 0).astype(np.uint16)
        for segments in self._respelling.look_up(ids, live):
            bits.flat[segments.places] |= segments.bits
        return TokenFlags(ids=ids, bits=bits)

    def to_teacher(self, ids: ArrayLike, response_mask: ArrayLike | None = None) -> TeacherText:
        """The teacher's own spelling of each row's text, aligned with the student's tokens.

        A turn that the student ended is ended as the teacher ends turns; no bos is added. Arguments and errors as
        `flags`; one row gives lists with one entry.
        """
        ids, outside = self._outside(ids, response_mask)
        return teacher_text(ids.shape, self._respelling.look_up(ids, outside == 0))

    def report(self) -> Report:
        """What a user must know about the two before training."""
        return make_report(self)

    @cached_property
    def _respelling(self) -> Respelling:
        to_teacher = self.vocab.to_teacher
        return Respelling(
            self.student,
            self.spellers[1],
            to_teacher=to_teacher,
            controls=self._controls(to_teacher),
            tags=self.tags,
        )

    def _controls(self, to_teacher: NDArray[np.int32]) -> dict[int, int | None]:
        """Student ids that stand for no text, and the teacher's token for each, None where it has none."""
        student, teacher = self._conventions
        silent = np.flatnonzero(self.student.special | (self.student.lengths == 0)).tolist()
        tags = {tag.encode() for tag in self.tags}
        ids = {id for id in silent if self.student.pieces[id] not in tags} | student.turn_end
        controls = {id: int(to_teacher[id]) if to_teacher[id] >= 0 else None for id in ids}
        for id in student.turn_end:
            if teacher.turn_end and controls[id] not in teacher.turn_end:
                controls[id] = teacher.own_turn_end
        return controls

    @cached_property
    def _id_bits(self) -> NDArray[np.uint16]:
        """`[V_s]` what an id alone tells."""
        bits = np.where(self.student.special, Flag.SPECIAL, 0) | np.where(self.vocab.to_teacher < 0, Flag.UNMAPPED, 0)
        return bits.astype(np.uint16)

    @cached_property
    def _ends(self) -> NDArray[np.bool_]:
        return _member(self.student, self._conventions[0].turn_end)

    @cached_property
    def _pads(self) -> NDArray[np.bool_]:
        """Padding by the student's token, or by the teacher's where the student has it too."""
        own, teacher = self._conventions[0].pad, self._conventions[1].pad
        pads = [own, None if teacher is None else int(self.vocab.to_student[teacher])]
        return _member(self.student, (id for id in pads if id is not None and id >= 0))

    def _outside(self, ids: ArrayLike, response_mask: ArrayLike | None) -> tuple[Ints, NDArray[np.uint16]]:
        """The checked ids and where they are PAD or PROMPT, both in the shape given."""
        ids = checked_ids(ids, self.student)
        mask = np.ones(ids.shape, bool) if response_mask is None else checked_mask(response_mask, ids.shape)
        pad = padding(self._pads[ids], self._ends[ids])
        return ids, np.where(mask, 0, Flag.PROMPT).astype(np.uint16) | np.where(pad, Flag.PAD, 0).astype(np.uint16)


def _neutral(
    vocabulary: Vocabulary, convention: Convention, tags: Iterable[str]
) -> tuple[ByteTable, NDArray[np.bool_]]:
    pieces = list(vocabulary.pieces)
    texts = {tag.encode() for tag in tags}
    special = set(np.flatnonzero(vocabulary.special).tolist()) - {vocabulary.kind.unknown}
    controls = [id for id in special if pieces[id] not in texts]
    for id in (convention.bos, convention.pad):
        if id is not None:
            pieces[id] = b""
    for id in convention.turn_end:
        pieces[id] = END
    return ByteTable(pieces), _member(vocabulary, [*controls, *convention.turn_end])


def _member(vocabulary: Vocabulary, ids: Iterable[int]) -> NDArray[np.bool_]:
    member = np.zeros(vocabulary.size, bool)
    member[list(ids)] = True
    return member
