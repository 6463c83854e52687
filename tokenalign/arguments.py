"""What callers hand in: ids, masks and padding."""

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokenalign.chunks import Ints
from tokenalign.vocabulary import Vocabulary


def checked_ids(ids: ArrayLike, vocabulary: Vocabulary, *, axes: int) -> Ints:
    """Ids as int64, each within the vocabulary.

    Raises:
        ValueError: They are no integers, have another number of axes, or one is out of range.
    """
    array = np.asarray(ids)
    if array.ndim != axes:
        shape = "[B, T]: give one text as ids[None]" if axes == 2 else "[N]: give one text at a time"
        raise ValueError(f"ids have shape {array.shape}, expected {shape}.")
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"ids are {array.dtype}, expected integers.")
    array = array.astype(np.int64)
    wrong = array[(array < 0) | (array >= vocabulary.size)]
    if wrong.size:
        raise ValueError(
            f"id {wrong[0]} is outside the tokenizer's 0..{vocabulary.size - 1}. Pad with the pad token, and state "
            "a padded model's output size by Pair(..., student_size=, teacher_size=)."
        )
    return array


def checked_mask(mask: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """A mask as bool.

    Raises:
        ValueError: It has another shape than the ids (nothing is broadcast), or values other than 0 and 1.
    """
    array = np.asarray(mask)
    if array.shape != shape:
        raise ValueError(f"response_mask has shape {array.shape}, ids have {shape}. Give one value per id.")
    if array.dtype != bool and not np.isin(array, (0, 1)).all():
        raise ValueError(f"response_mask has values other than 0 and 1, such as {array.max()}. Give booleans.")
    return array.astype(bool)


def padding(pad: NDArray[np.bool_], end: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """`[B, T]` True in the runs of pad tokens that open or close a row.

    Args:
        pad: `[B, T]` True at pad tokens.
        end: `[B, T]` True at end-of-turn tokens. Where the pad token also ends turns, the first of a closing run is the
            end of the turn, unless another one ended it.

    >>> padding(np.array([[1, 0, 1, 0, 1, 1]], bool), np.zeros((1, 6), bool)).astype(int).tolist()
    [[1, 0, 0, 0, 1, 1]]
    >>> padding(np.array([[0, 1, 1]], bool), np.array([[0, 1, 1]], bool)).astype(int).tolist()
    [[0, 0, 1]]
    """
    opening = np.logical_and.accumulate(pad, axis=1)
    closing = np.logical_and.accumulate(pad[:, ::-1], axis=1)[:, ::-1]
    real = np.zeros_like(pad)
    real[:, 1:] = closing[:, 1:] & ~closing[:, :-1] & end[:, 1:] & ~end[:, :-1]
    return opening | (closing & ~real)
