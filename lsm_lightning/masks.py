"""Which response positions the loss may look at, and why not: tokenalign's flags, laid end to end."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool
from torch import Tensor

from lsm_lightning.types import Turn
from tokenalign import Flag, Pair, TokenFlags

MaskPolicy = Literal["none", "paper", "tags", "canonical", "strict"]
"""What to leave out; `none` keeps everything, the others are tokenalign's (see `tokenalign.TokenFlags.keep`)."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossMask:
    """One bool a position, and how many positions carry each of tokenalign's flags."""

    keep: Bool[Tensor, " n"]
    reasons: dict[str, int]
    """Positions by flag name. A position can carry several, and the policy decides which of them matter."""


def loss_mask(pair: Pair, turns: Sequence[Turn], policy: MaskPolicy) -> LossMask:
    """The mask of the turns' response positions, one turn after the other.

    A position is left out where comparing student and teacher is about spelling conventions and not about the text,
    and, whatever the policy, where the teacher's vocabulary has no such token.
    """
    width = max((len(turn.completion.ids) for turn in turns), default=0)
    ids = np.zeros((len(turns), width), dtype=np.int64)
    response = np.zeros((len(turns), width), dtype=bool)
    for row, turn in enumerate(turns):
        ids[row, : len(turn.completion.ids)] = turn.completion.ids
        response[row, : len(turn.completion.ids)] = True
    flags = pair.flags(ids, response)
    keep = (response if policy == "none" else flags.keep(policy)) & ~flags.has(Flag.UNMAPPED)
    counts = TokenFlags(ids=flags.ids[response], bits=flags.bits[response]).count()
    reasons = {name: count for name, count in counts.items() if name not in ("PAD", "PROMPT")}
    return LossMask(keep=torch.from_numpy(keep[response]), reasons=reasons)
