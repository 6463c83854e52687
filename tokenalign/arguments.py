"""What callers hand in: ids, masks and padding."""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tokenalign.chunks import Ints
from tokenalign.vocabulary import Vocabulary


def as_array(values: ArrayLike, name: str) -> NDArray[Any]:
    """Lists, arrays and whatever else has `__array__`, as an array.

    Raises:
        ValueError: The rows have several lengths, or the object cannot be read.
    """
    try:
        return np.asarray(values)
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(
            f"{name} cannot be read as an array ({error}). Give numbers in rows of equal length, in main memory."
        ) from error


def integers(values: ArrayLike, name: str) -> NDArray[Any]:
    """Integers of any width, with or without sign; an empty list counts.

    Raises:
        ValueError: They are floats, booleans, strings or other objects.
    """
    array = as_array(values, name)
    if not array.size and array.dtype == np.float64:  # what numpy makes of an empty list
        return array.astype(np.int64)
    if not np.issubdtype(array.dtype, np.integer):
        example = f", not {array.flat[0]!r}" if array.size else ""
        raise ValueError(f"{name} are {array.dtype}, expected integers of at most 64 bits{example}.")
    return array


def checked_ids(ids: ArrayLike, vocabulary: Vocabulary, *, axes: tuple[int, ...] = (1, 2)) -> Ints:
    """A copy of the ids as int32, each within the vocabulary.

    Raises:
        ValueError: They are no integers, have another number of axes, or one is out of range.
    """
    array = integers(ids, "ids")
    if array.ndim not in axes:
        expected = "one text [N]" if 2 not in axes else "[B, T] or one row [T]"
        raise ValueError(f"ids have shape {array.shape}, expected {expected}.")
    if array.size and (array.min() < 0 or array.max() >= vocabulary.size):
        wrong = array[(array < 0) | (array >= vocabulary.size)][0]
        raise ValueError(
            f"id {wrong} is outside the tokenizer's 0..{vocabulary.size - 1}. Pad with the pad token, and state "
            "a padded model's output size by Pair(..., student_size=, teacher_size=)."
        )
    return array.astype(np.int32)


def checked_mask(mask: ArrayLike, shape: tuple[int, ...]) -> NDArray[np.bool_]:
    """A mask as bool.

    Raises:
        ValueError: It has another shape than the ids (nothing is broadcast), or values other than 0 and 1.
    """
    array = as_array(mask, "response_mask")
    if array.shape != shape:
        raise ValueError(f"response_mask has shape {array.shape}, ids have {shape}. Give one value per id.")
    if not (array.dtype == bool or np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating)):
        raise ValueError(f"response_mask is {array.dtype}, expected booleans.")
    wrong = array[(array != 0) & (array != 1)] if array.dtype != bool else array[:0]
    if wrong.size:
        raise ValueError(f"response_mask has values other than 0 and 1, such as {wrong.flat[0]}. Give booleans.")
    return array.astype(bool)


def padding(pad: NDArray[np.bool_], end: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """`[..., T]` True in the runs of pad tokens that open or close a row.

    Args:
        pad: `[..., T]` True at pad tokens.
        end: `[..., T]` True at end-of-turn tokens. Where the pad token also ends turns, the first of a closing run is
            the end of the turn, unless another one ended it.

    >>> padding(np.array([[1, 0, 1, 0, 1, 1]], bool), np.zeros((1, 6), bool)).astype(int).tolist()
    [[1, 0, 0, 0, 1, 1]]
    >>> padding(np.array([[0, 1, 1]], bool), np.array([[0, 1, 1]], bool)).astype(int).tolist()
    [[0, 0, 1]]
    """
    opening = np.logical_and.accumulate(pad, axis=-1)
    closing = np.logical_and.accumulate(pad[..., ::-1], axis=-1)[..., ::-1]
    real = np.zeros_like(pad)
    real[..., 1:] = closing[..., 1:] & ~closing[..., :-1] & end[..., 1:] & ~end[..., :-1]
    return opening | (closing & ~real)
