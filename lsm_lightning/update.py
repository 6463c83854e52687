"""The gradient of one step: micro-batches of turns whose losses are summed and divided by one global count."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import PreTrainedModel

from lsm_lightning.batching import TokenBatch, group_by_length, hidden_states, spans
from lsm_lightning.objectives import Objective, Positions
from lsm_lightning.objectives.head import OutputHead
from lsm_lightning.types import Support, Turn


@dataclass(kw_only=True)
class StepTotals:
    """Sums over this process's kept positions; divided by `kept` they are means."""

    kept: int = 0
    loss: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)


def micro_batches(turns: Sequence[Turn], max_tokens: int) -> list[list[int]]:
    """Numbers of the turns that go through the student together, padded size at most `max_tokens` where possible."""
    return group_by_length([len(turn.prompt.ids) + len(turn.completion.ids) for turn in turns], max_tokens)


def accumulate_gradients(
    student: PreTrainedModel,
    objective: Objective,
    turns: Sequence[Turn],
    support: Support,
    keep: Bool[Tensor, " n"],
    *,
    groups: Sequence[Sequence[int]],
    scale: float,
    backward: Callable[[Float[Tensor, ""]], None],
) -> StepTotals:
    """Run the student over micro-batches and add up the gradient of `scale` times the sum of the kept losses.

    Args:
        student: In train mode or not as the caller wants it; its logits over the vocabulary are never made.
        objective: Gives the loss at each position.
        turns: What was sampled.
        support: The teacher's answer at the turns' response positions, laid end to end.
        keep: Which of those positions count.
        groups: Micro-batches, as numbers of turns. A process with fewer than the others appends empty ones, which
            run the student all the same (sharded weights are gathered by all processes together).
        scale: 1 / (kept positions of all processes), times the number of processes if gradients are averaged.
        backward: Called once for each micro-batch.
    """
    places = spans([len(turn.completion.ids) for turn in turns])
    totals = StepTotals()
    for group in groups:
        members = group or [0]
        batch = TokenBatch.pad(
            [turns[i].prompt.ids for i in members], [turns[i].completion.ids for i in members], student.device
        )
        rows = torch.tensor([place for i in members for place in places[i]], device=student.device)
        # Masked positions are left out before anything is computed: they may hold infinities.
        kept = keep[rows] if group else torch.zeros_like(keep[rows])
        positions = Positions(
            hidden=hidden_states(student, batch)[kept],
            sampled=batch.targets[kept],
            turn=batch.row[kept],
            support=support.rows(rows[kept]),
        )
        with torch.autocast(student.device.type, enabled=False):  # K logits are cheap enough for full precision
            loss = objective(OutputHead.of(student), positions)
        summed = loss.value.sum()
        backward(summed * scale)
        totals.kept += int(kept.sum())
        totals.loss += summed.item()
        for name, value in loss.metrics.items():
            totals.metrics[name] = totals.metrics.get(name, 0.0) + value.sum().item()
    return totals
