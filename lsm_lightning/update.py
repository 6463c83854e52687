"""The gradient of one step: micro-batches of turns whose losses are weighed and summed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from lsm_lightning.batching import TokenBatch, group_by_length, hidden_states, rows_of, spans
from lsm_lightning.objectives import Objective, Positions
from lsm_lightning.objectives.base import SAMPLER_GAP
from lsm_lightning.objectives.head import NORMALISER_ELEMENTS, OutputHead
from lsm_lightning.top_k import top_k
from lsm_lightning.types import Support, Turn

WATCHED_POSITIONS = 256
"""A step and process looks at about so many positions (fewer than twice) where a measurement needs all logits."""


@dataclass(kw_only=True)
class StepTotals:
    """Sums over this process's kept positions."""

    kept: int = 0
    loss: float = 0.0
    """Already weighed: over all processes this is the step's loss."""
    metrics: dict[str, tuple[float, int]] = field(default_factory=dict)
    """Sum and number of values."""
    largest_sampler_gap: float = 0.0
    """Nats, at the watched positions."""


def micro_batches(turns: Sequence[Turn], max_tokens: int, *, packed: bool = False) -> list[list[int]]:
    """Numbers of the turns that go through the student together, at most `max_tokens` of them where possible."""
    lengths = [len(turn.prompt.ids) + len(turn.completion.ids) for turn in turns]
    return group_by_length(lengths, max_tokens, packed=packed)


def accumulate_gradients(
    student: PreTrainedModel,
    objective: Objective,
    turns: Sequence[Turn],
    support: Support,
    weights: Float[Tensor, " n"],
    *,
    groups: Sequence[Sequence[int]],
    backward: Callable[[Float[Tensor, ""]], None],
    scale: float = 1.0,
    packed: bool = False,
) -> StepTotals:
    """Run the student over micro-batches and add up the gradient of `scale` times the weighted sum of the losses.

    Args:
        student: In train mode or not as the caller wants it; its logits over the vocabulary are never made.
        objective: Gives the loss at each position.
        turns: What was sampled.
        support: The teacher's answer at the turns' response positions, laid end to end.
        weights: Of those positions (`reductions.position_weights`); 0 leaves one out.
        groups: Micro-batches, as numbers of turns. A process with fewer than the others appends empty ones, which
            run the student on one token all the same (sharded weights are gathered by all processes together).
        backward: Called once for each micro-batch.
        scale: The number of processes, where gradients are averaged over them.
        packed: Lay the sequences of a micro-batch in one row, without padding.
    """
    places = spans([len(turn.completion.ids) for turn in turns])
    watched = torch.arange(len(weights), device=weights.device) % max(1, len(weights) // WATCHED_POSITIONS) == 0
    totals = StepTotals()
    for group in groups:
        batch = _batch(turns, group, packed, student.device)
        rows = rows_of(places, group, student.device)
        # Masked positions are left out before anything is computed: they may hold infinities.
        kept = weights[rows] > 0
        sampler = [value for i in group for value in turns[i].completion.log_probs]
        positions = Positions(
            hidden=hidden_states(student, batch)[kept],
            sampled=batch.targets[kept],
            sampler_log_probs=torch.tensor(sampler, dtype=torch.float32, device=student.device)[kept],
            turn=batch.sequence[kept],
            watched=watched[rows[kept]],
            support=support.rows(rows[kept]),
        )
        with torch.autocast(student.device.type, enabled=False):  # K logits are cheap enough for full precision
            loss = objective(OutputHead.of(student), positions)
        summed = (loss.value * weights[rows[kept]].to(loss.value.dtype)).sum()
        backward(summed * scale)
        totals.kept += int(kept.sum())
        totals.loss += summed.item()
        for name, values in loss.metrics.items():
            total, count = totals.metrics.get(name, (0.0, 0))
            totals.metrics[name] = total + values.sum().item(), count + len(values)
            if name == SAMPLER_GAP and len(values):
                totals.largest_sampler_gap = max(totals.largest_sampler_gap, values.max().item())
    return totals


@torch.no_grad()
def student_top_tokens(
    student: PreTrainedModel,
    turns: Sequence[Turn],
    k: int,
    *,
    groups: Sequence[Sequence[int]],
    packed: bool = False,
) -> Int[Tensor, "n k"]:
    """The student's own K most probable tokens at each response position of the turns, laid end to end.

    Args and order as `accumulate_gradients`; a chunk of logits exists at a time.
    """
    places = spans([len(turn.completion.ids) for turn in turns])
    top = torch.zeros((sum(map(len, places)), k), dtype=torch.long, device=student.device)
    for group in groups:
        rows = rows_of(places, group, student.device)
        hidden = hidden_states(student, _batch(turns, group, packed, student.device))
        head = OutputHead.of(student)
        chunk = max(1, NORMALISER_ELEMENTS // head.weight.shape[0])
        for part, places_of_part in zip(hidden.split(chunk), rows.split(chunk), strict=True):
            top[places_of_part] = top_k(head.all_logits(part), k)[1]
    return top


def _batch(turns: Sequence[Turn], group: Sequence[int], packed: bool, device: torch.device) -> TokenBatch:
    lay = TokenBatch.pack if packed else TokenBatch.pad
    return lay([turns[i].prompt.ids for i in group], [turns[i].completion.ids for i in group], device)
