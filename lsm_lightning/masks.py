"""Which response positions the loss may look at, and why not: tokenalign's flags, laid end to end."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from lsm_lightning.batching import padded_responses
from lsm_lightning.types import Support, Turn
from tokenalign import Flag, Pair, TokenFlags

MaskPolicy = Literal["repair", "none", "paper", "tags", "canonical", "strict"]
"""What to do where the teacher would spell the student's text otherwise.

`repair`: the teacher reads its own spelling, and every position counts at which a token starts on both sides. With the
others it reads the student's tokens as they stand: `none` leaves nothing out, the rest are tokenalign's policies
(`tokenalign.TokenFlags.keep`).
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossMask:
    """One bool a position, and how many positions carry each of tokenalign's flags."""

    keep: Bool[Tensor, " n"]
    reasons: dict[str, int]
    """Positions by flag name. A position can carry several, and the policy decides which of them matter."""


def loss_mask(pair: Pair, turns: Sequence[Turn], policy: MaskPolicy) -> LossMask:
    """The mask of the turns' response positions, one turn after the other.

    A position is left out where comparing student and teacher is about spelling conventions and not about the text,
    and, where the teacher reads the student's tokens, if its vocabulary has no such token. What `repair` leaves out
    follows from the teacher's reading (`Support.comparable`), not from here.
    """
    ids, response = padded_responses(turns)
    flags = pair.flags(ids, response)
    keep = response if policy == "repair" or policy == "none" else flags.keep(policy)
    if policy != "repair":
        keep = keep & ~flags.has(Flag.UNMAPPED)
    counts = TokenFlags(ids=flags.ids[response], bits=flags.bits[response]).count()
    reasons = {name: count for name, count in counts.items() if name not in ("PAD", "PROMPT")}
    return LossMask(keep=torch.from_numpy(keep[response]), reasons=reasons)


def kept(mask: LossMask, support: Support, *, sampled: bool) -> Bool[Tensor, " n"]:
    """The positions that count: the mask keeps them, and a token starts there on both sides.

    Args:
        mask: Of the turns' positions.
        support: What the teacher says at them.
        sampled: Whether the teacher must read the very token that the student sampled.
    """
    keep = mask.keep.to(support.comparable.device) & support.comparable
    return keep & support.alike if sampled else keep
