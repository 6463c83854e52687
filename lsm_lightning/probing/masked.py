"""What a mask would leave out of the student's answers, by reason."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lsm_lightning.batching import padded_responses
from lsm_lightning.probing.finding import Finding, ok, refused, warning
from lsm_lightning.types import Support, Turn
from tokenalign import Flag, Pair
from tokenalign.visible import visible

LITTLE = 0.1
"""Share of tokens below which little is left to learn from."""
MUCH_LOST = 0.2
REASONS = {
    Flag.INVALID_UTF8: "no valid text",
    Flag.NORMALISED: "the teacher's tokenizer changes the text",
    Flag.TAG: "part of a tag",
    Flag.EOS_CLASS: "end of the turn",
    Flag.SPECIAL: "control token",
    Flag.UNMAPPED: "the teacher has no such token",
    Flag.MISALIGNED: "the teacher has no token that starts here",
    Flag.NONCANONICAL: "the teacher spells it otherwise",
}
"""Most telling first: a token that is left out counts for the first that holds."""
OTHER = "the teacher reads another token"


@dataclass(frozen=True, kw_only=True, slots=True)
class Masked:
    """The tokens left out for one reason."""

    reason: str
    share: float
    """Of all tokens."""
    examples: list[str]
    """The most frequent ones, made visible."""


def masked(pair: Pair, turns: Sequence[Turn], keep: NDArray[np.bool_]) -> list[Masked]:
    """Tokens that are left out, the most frequent reason first.

    Args:
        pair: Student and teacher.
        turns: What the student wrote.
        keep: `[n]` True at positions that count, the turns laid end to end.
    """
    ids, response = padded_responses(turns)
    flags = pair.flags(ids, response)
    found: dict[str, Counter[int]] = {}
    bits = flags.bits[response]
    left = ~keep
    for flag, reason in REASONS.items():
        here = left & ((bits & np.uint16(flag)) != 0)
        found[reason] = Counter(ids[response][here].tolist())
        left &= ~here
    found[OTHER] = Counter(ids[response][left].tolist())
    rows = [
        Masked(
            reason=reason,
            share=counts.total() / len(keep),
            examples=[visible(pair.student.pieces[i]) for i, _ in counts.most_common(3)],
        )
        for reason, counts in found.items()
        if counts
    ]
    return sorted(rows, key=lambda row: -row.share)


def check_kept(keep: NDArray[np.bool_], support: Support, mask: str, tokens: int | None) -> Finding:
    """Something is left to learn from.

    Args:
        keep: `[n]` True at positions that count.
        support: What the teacher says at all of them.
        mask: See `MaskPolicy`.
        tokens: How many of its top tokens the teacher was asked for; with 0 a position needs none.
    """
    check = "mask"
    share = float(keep.mean()) if len(keep) else 0.0
    text = f"{share:.1%} of {len(keep)} tokens of the student's would count (model.mask {mask})"
    if not share:
        return refused(check, text, "Choose another model.mask, or a teacher whose tokenizer is nearer.")
    here = support.log_probs[keep]
    empty = 0.0 if tokens == 0 else float(((here > -np.inf).sum(-1) < 2).double().mean())
    if empty == 1:
        return refused(
            check,
            f"{text}, none of them with two tokens to compare",
            "Raise model.objective.init_args.k, or take a teacher whose vocabulary is nearer.",
        )
    if share * (1 - empty) < LITTLE:
        return warning(check, f"{text}, {empty:.0%} of these without two tokens to compare", "Expect to learn slowly.")
    lost = float(support.lost[keep].double().mean())
    if lost > MUCH_LOST:
        return warning(
            check,
            f"{text}; {lost:.0%} of the teacher's probability is on tokens that the student lacks",
            "Take a teacher whose vocabulary is nearer.",
        )
    return ok(check, f"{text}; the teacher has {lost:.1%} of its probability on tokens that the student lacks")
