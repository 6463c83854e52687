"""Chunks: what two tokenizations of one text have in common.

Every token stands for bytes, so the byte ends of a sequence are a cumulative sum of lengths. Between two byte positions
where *both* sides have a token end lies a chunk of m student tokens against n teacher tokens.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Ints = NDArray[np.integer[Any]]
"""int32 where the values fit, else int64."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Alignment:
    """Two tokenizations of one text, cut at their shared byte ends.

    A top-K comparison is about the text wherever a chunk starts on both sides; a sampled-token comparison sums
    over a chunk.
    """

    student_chunk: NDArray[np.int32]
    """`[m]` chunk of each student token, -1 for a token outside the text (bos, padding, prompt) or
    at an end of it that the other tokenizer drops."""
    teacher_chunk: NDArray[np.int32]
    """`[n]` chunk of each teacher token."""
    chunks: NDArray[np.int32]
    """`[C, 2]` tokens per chunk: student, teacher; both at least 1."""
    ok: bool
    """True where both sides are known to be the same text: byte for byte, or because one side's tokenizer makes just
    these tokens of the other's text. End-of-turn tokens count as equal."""

    @property
    def starts(self) -> NDArray[np.int32]:
        """`[C, 2]` positions of each chunk's first student token and first teacher token.

        Here both models predict what follows the same text, so their next-token distributions can be compared (each in
        its own vocabulary, see `project_topk`). Logits that predict the token at position p stand at p - 1.

        >>> two = alignment(np.array([-1, 0, 0, 1]), np.array([0, 1]), ok=True)  # bos "a" "b" "c" against "ab" "c"
        >>> two.starts.tolist()
        [[1, 0], [3, 1]]
        """
        # Chunks ascend, but for the -1 of tokens outside the text.
        sides = (np.maximum.accumulate(side) for side in (self.student_chunk, self.teacher_chunk))
        firsts = [np.searchsorted(side, np.arange(len(self.chunks))) for side in sides]
        return np.stack(firsts, axis=1).astype(np.int32)

    def log_ratios(self, student_logp: ArrayLike, teacher_logp: ArrayLike) -> NDArray[np.float64]:
        r"""`[C]` log-ratio of each chunk, in nats: what its text is worth to the teacher less what to the student.

        $r_c = \sum_{j \in c} \log q(t_j) - \sum_{i \in c} \log \pi(s_i)$ over the chunk's teacher tokens t and student
        tokens s. The ratios telescope: their sum is $\log q(text) - \log \pi(text)$ over all tokens that are in a
        chunk. Where every chunk is 1:1, $r$ is the sampled-token reward that arXiv 2603.25562 compares with. A token in
        no chunk (-1) has no say, whatever its log-probability.

        Args:
            student_logp: `[m]` log-probability of each student token, given those before it.
            teacher_logp: `[n]` likewise for the teacher.

        Raises:
            ValueError: There is not one number per token.

        >>> two = alignment(np.array([0, 0, 1]), np.array([0, 1]), ok=True)
        >>> two.log_ratios([-1.0, -2.0, -0.5], [-2.5, -1.0]).tolist()
        [0.5, -0.5]
        """
        return self._summed(teacher_logp, self.teacher_chunk, "teacher") - self._summed(
            student_logp, self.student_chunk, "student"
        )

    def _summed(self, logp: ArrayLike, chunk: NDArray[np.int32], side: str) -> NDArray[np.float64]:
        values = np.asarray(logp, np.float64)
        if values.shape != chunk.shape:
            raise ValueError(f"{side}_logp has shape {values.shape}, expected one number per token: {chunk.shape}.")
        inside = chunk >= 0
        # Of no token at all, numpy counts in integers.
        return np.bincount(chunk[inside], weights=values[inside], minlength=len(self.chunks)).astype(np.float64)


def align_ends(student_ends: Ints, teacher_ends: Ints) -> tuple[Ints, Ints]:
    """Chunk of every token `[m]`, `[n]` from ascending byte ends `[m]`, `[n]` whose last entries are equal.

    A token without bytes (bos, padding) joins the chunk before it, or the first one.

    >>> student, teacher = np.array([1, 6, 7]), np.array([3, 6, 7])  # "<" "think" ">" against "<th" "ink" ">"
    >>> [side.tolist() for side in align_ends(student, teacher)]
    [[0, 0, 1], [0, 0, 1]]
    """
    # Marks on the scale of the bytes: linear, where searching or sorting the ends of the other side is not.
    size = 1 + max(student_ends.max(initial=0), teacher_ends.max(initial=0))
    ours, theirs = (ends if (ends[:1] >= 0).all() else np.maximum(ends, 0) for ends in (student_ends, teacher_ends))
    shared = _marked(ours, size)
    shared &= _marked(theirs, size)
    shared[0] = False
    return _chunk_of(ours, shared), _chunk_of(theirs, shared)


def _marked(ends: Ints, size: int) -> NDArray[np.bool_]:
    mark = np.zeros(size, bool)
    mark[ends] = True
    return mark


def _chunk_of(ends: Ints, shared: NDArray[np.bool_]) -> NDArray[np.int32]:
    """How many shared ends lie before each end, ascending: those up to it, less itself."""
    closes = shared[ends]
    first = closes.copy()
    first[1:] &= ends[1:] != ends[:-1]
    chunk = np.cumsum(first, dtype=np.int32)
    chunk -= closes
    return chunk


def chunk_sizes(student_chunk: Ints, teacher_chunk: Ints) -> NDArray[np.int32]:
    """Tokens per chunk `[C, 2]` from the chunk of every token; -1 is no chunk.

    >>> chunk_sizes(np.array([0, 0, 1]), np.array([0, 1])).tolist()
    [[2, 1], [1, 1]]
    """
    count = 1 + max(student_chunk.max(initial=-1), teacher_chunk.max(initial=-1))
    sizes = np.empty((count, 2), np.int32)
    for column, side in enumerate((student_chunk, teacher_chunk)):
        sizes[:, column] = np.bincount(side[side >= 0], minlength=count)
    return sizes


def alignment(student_chunk: Ints, teacher_chunk: Ints, *, ok: bool) -> Alignment:
    """The alignment with these chunks `[m]`, `[n]`."""
    return Alignment(
        student_chunk=student_chunk.astype(np.int32, copy=False),
        teacher_chunk=teacher_chunk.astype(np.int32, copy=False),
        chunks=chunk_sizes(student_chunk, teacher_chunk),
        ok=ok,
    )


def common_ends(student: bytes, teacher: bytes) -> tuple[int, int]:
    """Length of the longest common prefix, and of the longest common suffix of what follows it.

    >>> common_ends(b"caf\\xc3\\xa9!", b"cafe!")
    (3, 1)
    """
    a, b = np.frombuffer(student, np.uint8), np.frombuffer(teacher, np.uint8)
    short = min(len(a), len(b))
    prefix = _equal_run(a[:short], b[:short])
    rest = short - prefix
    suffix = _equal_run(a[len(a) - rest :][::-1], b[len(b) - rest :][::-1])
    return prefix, suffix


def _equal_run(a: NDArray[np.uint8], b: NDArray[np.uint8]) -> int:
    different = a != b
    return int(different.argmax()) if different.any() else len(a)


def comparable_ends(student: bytes, teacher: bytes, teacher_ends: Ints) -> Ints:
    """The teacher's ends in the student's text although the two texts differ, nobody knows how.

    Positions are doubled. Ends in the common prefix and suffix keep their place in the student's text; those in
    between get an odd position, which no student end has, so that everything between lies in one chunk.
    """
    prefix, suffix = common_ends(student, teacher)
    after = teacher_ends >= len(teacher) - suffix
    # Where the teacher only inserts, what it inserts joins the chunk before, so that no chunk lacks a student token.
    inserts = prefix + suffix == len(student)
    before = (teacher_ends < prefix) | ((teacher_ends == prefix) & (not inserts))
    between = 2 * prefix + (-1 if inserts else 1)
    shifted = 2 * (teacher_ends + len(student) - len(teacher))
    return np.where(after, shifted, np.where(before, teacher_ends * 2, between))


def ranges(starts: Ints, counts: Ints) -> Ints:
    """The integers of several ranges, one after the other.

    >>> ranges(np.array([5, 0]), np.array([2, 3])).tolist()
    [5, 6, 0, 1, 2]
    """
    before = np.cumsum(counts) - counts
    return np.arange(counts.sum()) + np.repeat(starts - before, counts)
