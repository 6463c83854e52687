"""Why a position may not count, and the policies that turn reasons into a mask."""

from dataclasses import dataclass
from enum import IntFlag
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

Policy = Literal["paper", "tags", "canonical", "strict"]


class Flag(IntFlag):
    """One bit per reason; a position may carry several."""

    SPECIAL = 1
    """A control token of the student."""
    TAG = 2
    """Part of a reasoning tag such as `<think>`, in any segmentation."""
    NONCANONICAL = 4
    """The teacher spells this stretch of text otherwise, or ends a turn otherwise."""
    MISALIGNED = 8
    """The teacher has no token that starts here."""
    INVALID_UTF8 = 16
    """Touches bytes that are no text, such as half a character before a control token."""
    NORMALISED = 32
    """The teacher's tokenizer changes the text here, so it cannot spell what the student wrote."""
    UNMAPPED = 64
    """The teacher has no token with these bytes and this role."""
    PAD = 128
    """Padding before or after the row's text."""
    EOS_CLASS = 256
    """One of the student's end-of-turn tokens."""
    PROMPT = 512
    """Outside the response mask."""


OUTSIDE = Flag.PAD | Flag.PROMPT


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenFlags:
    """Reasons per position of a batch of student tokens, `[B, T]`, or of one row, `[T]`."""

    ids: NDArray[np.integer[Any]]
    """`[B, T]` or `[T]` the student's tokens."""
    bits: NDArray[np.uint16]
    """`[B, T]` or `[T]` a sum of `Flag`s; 0 is an ordinary token that the teacher spells alike."""

    def has(self, flag: Flag) -> NDArray[np.bool_]:
        """True where at least one of the flag's bits is set."""
        return (self.bits & np.uint16(flag)) != 0

    def count(self) -> dict[str, int]:
        """Positions per reason, every reason named.

        >>> bits = np.array([[0, Flag.TAG | Flag.NONCANONICAL, Flag.PAD]], np.uint16)
        >>> counts = TokenFlags(ids=np.zeros((1, 3), int), bits=bits).count()
        >>> counts["TAG"], counts["PAD"], counts["SPECIAL"]
        (1, 1, 0)
        """
        return {str(flag.name): int(self.has(flag).sum()) for flag in Flag}

    def keep(self, policy: Policy, end_class: bool = False) -> NDArray[np.bool_]:
        """True where the loss may look, in the shape of `bits`. No policy keeps padding or prompt.

        Args:
            policy: `paper` drops the first occurrence in each row of each piece of a tag that the teacher spells
                otherwise, and of an end-of-turn token. `tags` drops every such piece, and end-of-turn tokens that the
                teacher spells otherwise. `canonical` drops every position that the teacher spells otherwise. `strict`
                drops whatever carries any flag but EOS_CLASS.
            end_class: Keep end-of-turn tokens, for a loss that scores them as one class; `strict` drops them still.

        Raises:
            ValueError: The policy has another name.

        >>> bits = np.array([[Flag.TAG | Flag.NONCANONICAL, Flag.TAG | Flag.NONCANONICAL, 0, Flag.PAD]], np.uint16)
        >>> flags = TokenFlags(ids=np.array([[27, 27, 5, 0]]), bits=bits)
        >>> flags.keep("paper").tolist(), flags.keep("tags").tolist()
        ([[False, True, True, False]], [[False, False, True, False]])
        """
        if policy not in get_args(Policy):
            raise ValueError(f"policy {policy!r} is unknown. Use one of {', '.join(map(repr, get_args(Policy)))}.")
        inside, end = ~self.has(OUTSIDE), self.has(Flag.EOS_CLASS)
        if policy == "strict":
            return inside & ((self.bits & ~np.uint16(Flag.EOS_CLASS)) == 0)
        drop = self._dropped(policy)
        return inside & ~(drop & ~end if end_class else drop)

    def _dropped(self, policy: Policy) -> NDArray[np.bool_]:
        otherwise = self.has(Flag.NONCANONICAL)
        if policy == "canonical":
            return otherwise
        tag = self.has(Flag.TAG) & otherwise
        if policy == "tags":
            return tag | (self.has(Flag.EOS_CLASS) & otherwise)
        inside, end = ~self.has(OUTSIDE), self.has(Flag.EOS_CLASS)
        # All end-of-turn tokens are one kind of piece, so they share the key -1.
        return _first_in_row(np.where(end, -1, self.ids), (tag | end) & inside)


def _first_in_row(keys: NDArray[np.integer[Any]], where: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """`[..., T]` True at the first position of each key, -1 or more, in its row, among the positions `where`."""
    places = np.flatnonzero(where)
    found = keys.ravel()[places].astype(np.int64) + 1
    row_and_key = places // max(1, where.shape[-1]) * (1 + found.max(initial=0)) + found
    result = np.zeros_like(where)
    result.flat[places[np.unique(row_and_key, return_index=True)[1]]] = True
    return result
