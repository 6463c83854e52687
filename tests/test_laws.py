"""What must not change a step's loss and gradient, each with a control that shows the check can fail.

`objectives/test_every_objective` has the laws of positions by themselves; `test_update` compares steps with slow ones.
"""

import dataclasses
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from slow import (
    all_response_logits,
    even_weights,
    joined,
    random_support,
    sampled_ids,
    top_support,
    turn_of,
)
from tiny import random_ids, tiny_model
from torch import Tensor, distributed
from transformers import PreTrainedModel
from two import by_two

from lsm_lightning import update as update_module
from lsm_lightning.batching import TokenBatch, spans
from lsm_lightning.objectives import FullVocabulary, LocalSupportMatching, Loss, Objective, Positions, SampledToken
from lsm_lightning.objectives import head as head_module
from lsm_lightning.objectives.head import OutputHead
from lsm_lightning.pretrained import load_model
from lsm_lightning.reductions import position_weights
from lsm_lightning.types import Completion, Prompt, Support, Turn
from lsm_lightning.update import StepTotals, accumulate_gradients, micro_batches

K = 8
OBJECTIVES: dict[str, Objective] = {
    "teacher": LocalSupportMatching(k=K),
    "student": LocalSupportMatching(k=K, source="student", divergence="forward_kl"),
    "union": LocalSupportMatching(k=K, source="union", support="tail_bucket", divergence="jsd"),
    "sampled_added": LocalSupportMatching(k=K, source="sampled_added", support="generalised"),
    "full": FullVocabulary(),
    "sampled": SampledToken(gamma=0.5, reward_clip=5.0),
}
REDUCTIONS = ["token_mean", "sequence_mean", "task_mean"]
EXACT = 1e-9
"""Relative, in float64; the promise is 1e-5."""

each_objective = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


@dataclass(frozen=True, kw_only=True)
class Lesson:
    """Turns that a student wrote, what a teacher says to them, and which positions count."""

    turns: list[Turn]
    support: Support
    keep: Tensor

    def of(self, numbers: Sequence[int]) -> "Lesson":
        """Some of the turns, in this order."""
        places = spans([len(turn.completion.ids) for turn in self.turns])
        rows = torch.tensor([place for i in numbers for place in places[i]], dtype=torch.long)
        return Lesson(turns=[self.turns[i] for i in numbers], support=self.support.rows(rows), keep=self.keep[rows])


def lesson(
    student: PreTrainedModel, teacher: PreTrainedModel, turns: list[Turn], objective: Objective, kept: float = 0.65
) -> Lesson:
    """What the objective asks of both, one turn at a time, about turns that the student itself sampled."""
    sampled = sampled_ids(turns)
    with torch.no_grad():
        student_says, teacher_says = (all_response_logits(model, turns) for model in (student, teacher))
    own = student_says.log_softmax(-1).gather(1, sampled[:, None])[:, 0].tolist()
    added = [sampled[:, None]] if objective.adds_sampled else []
    added.append(student_says.topk(objective.student_tokens, -1).indices)
    k = teacher_says.shape[1] if objective.teacher_tokens is None else objective.teacher_tokens
    completions = [
        dataclasses.replace(turn.completion, log_probs=[own[i] for i in places])
        for turn, places in zip(turns, spans([len(turn.completion.ids) for turn in turns]), strict=True)
    ]
    return Lesson(
        turns=[dataclasses.replace(turn, completion=c) for turn, c in zip(turns, completions, strict=True)],
        support=top_support(teacher_says, sampled, k, torch.cat(added, -1)),
        keep=torch.rand(len(sampled), generator=torch.Generator().manual_seed(1)) < kept,
    )


@pytest.fixture(scope="module")
def teacher() -> PreTrainedModel:
    return tiny_model(seed=5).double()


@dataclass(frozen=True, kw_only=True)
class Step:
    """What came of it."""

    totals: StepTotals
    gradient: Tensor
    """Of all weights, end to end."""


def step(
    student: PreTrainedModel, objective: Objective, taught: Lesson, *,
    weights: Tensor | None = None, at_once: int = 100, packed: bool = False,
) -> Step:  # fmt: skip
    """A step's loss and gradient, so many turns at once."""
    student.zero_grad()
    numbers = list(range(len(taught.turns)))
    totals = accumulate_gradients(
        student, objective, taught.turns, taught.support, even_weights(taught.keep) if weights is None else weights,
        groups=[numbers[i : i + at_once] for i in range(0, len(numbers), at_once)],
        backward=lambda loss: loss.backward(), packed=packed,
    )  # fmt: skip
    return Step(totals=totals, gradient=torch.cat([p.grad.flatten() for p in student.parameters()]))


def assert_same(ours: Step, theirs: Step, relative: float = EXACT) -> None:
    assert ours.totals.kept == theirs.totals.kept
    assert ours.totals.loss == pytest.approx(theirs.totals.loss, rel=relative)
    assert ours.totals.metrics.keys() == theirs.totals.metrics.keys()
    for name, value in theirs.totals.metrics.items():
        assert ours.totals.metrics[name] == pytest.approx(value, rel=relative, abs=1e-9), name
    assert theirs.gradient.norm() > 0
    assert (ours.gradient - theirs.gradient).norm() <= relative * theirs.gradient.norm()


# ---- teacher and student --------------------------------------------------------------------------------------------


@each_objective
def test_a_student_taught_by_itself_has_no_loss_and_no_gradient(student, turns, objective):
    still = step(student, objective, lesson(student, student, turns, objective))
    rounding = 1e-6 if objective.compares_sampled else 1e-12  # what was sampled is noted in float32
    assert abs(still.totals.loss) < rounding
    assert still.gradient.norm() < 10 * rounding


@each_objective
def test_a_student_taught_by_another_has_both(student, teacher, turns, objective):
    moved = step(student, objective, lesson(student, teacher, turns, objective))
    assert abs(moved.totals.loss) > 0.01
    assert moved.gradient.norm() > 0.01


def slope(student: PreTrainedModel, objective: Objective, taught: Lesson) -> tuple[float, float]:
    """In a random direction of all weights: by the gradient, and by a central difference of the loss."""
    generator = torch.Generator().manual_seed(2)
    directions = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in student.parameters()]
    by_gradient = step(student, objective, taught).gradient @ torch.cat([d.flatten() for d in directions])
    losses = []
    for size in (1e-6, -2e-6):
        with torch.no_grad():
            for parameter, direction in zip(student.parameters(), directions, strict=True):
                parameter.add_(direction, alpha=size)
        losses.append(step(student, objective, taught).totals.loss)
    return by_gradient.item(), (losses[0] - losses[1]) / 2e-6


@each_objective
def test_the_gradient_equals_a_finite_difference(teacher, turns, objective):
    student = tiny_model("phi-bias").double()  # other families normalise in float32
    by_gradient, by_difference = slope(student, objective, lesson(student, teacher, turns, objective))
    assert by_gradient == pytest.approx(by_difference, rel=1e-6)


def test_the_finite_difference_sees_one_percent_missing(teacher, turns, monkeypatch):
    """Of the gradient of the head's rows."""
    right = head_module.gather_logits

    def held_back(hidden, weight, ids, bias):
        return right(hidden, 0.99 * weight + 0.01 * weight.detach(), ids, bias)

    monkeypatch.setattr(head_module, "gather_logits", held_back)
    with pytest.raises(AssertionError):
        test_the_gradient_equals_a_finite_difference(teacher, turns, OBJECTIVES["teacher"])


# ---- layouts --------------------------------------------------------------------------------------------------------


def left_padded(model: PreTrainedModel, batch: TokenBatch, *, masked: bool = True) -> Tensor:
    """Hidden states of the batch moved to the right, with padding on the left and an attention mask."""
    width = batch.ids.shape[1]
    shift = torch.stack([width - 1 - row.nonzero().max() for row in batch.ids])  # 0 pads, and no turn ends with it
    place = torch.arange(width) - shift[:, None]
    output = model.base_model(
        input_ids=batch.ids.gather(1, place % width),
        attention_mask=((place >= 0) | (not masked)).long(),
        position_ids=place.clamp(min=0),
        use_cache=False,
    )
    return output.last_hidden_state[batch.row, batch.column + shift[batch.row]]


LAYOUTS: dict[str, dict[str, object]] = {
    **{f"{n} at once": {"at_once": n} for n in (1, 2, 4, 8)},
    "packed": {"packed": True},
    "packed, 2 at once": {"packed": True, "at_once": 2},
    "left padded": {"left": True},
    "left padded, 2 at once": {"left": True, "at_once": 2},
    "few rows gathered": {"head": {"GATHER_ELEMENTS": 3000}},
    "one position gathered": {"head": {"GATHER_ELEMENTS": 1}},
    "tiles of few tokens": {"head": {"NORMALISER_ELEMENTS": 3000}},
    "tiles of few positions": {"head": {"NORMALISER_ELEMENTS": 3000, "NORMALISER_POSITIONS": 7}},
}


def laid_out(
    patch: pytest.MonkeyPatch, student: PreTrainedModel, objective: Objective, taught: Lesson, *,
    left: bool = False, head: dict[str, int] | None = None, **options: object,
) -> Step:  # fmt: skip
    """The same step otherwise laid out; `head` are constants of its module."""
    with patch.context() as inside:
        if left:
            inside.setattr(update_module, "hidden_states", left_padded)
        for name, size in (head or {}).items():
            inside.setattr(head_module, name, size)
        return step(student, objective, taught, **options)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@each_objective
def test_layout_changes_nothing(monkeypatch, student, teacher, turns, objective, layout):
    taught = lesson(student, teacher, turns, objective)
    assert_same(laid_out(monkeypatch, student, objective, taught, **layout), step(student, objective, taught))


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_layout_changes_next_to_nothing_in_float32(monkeypatch, student_folder, teacher, turns, layout):
    """In the sums alone, by rounding; the metrics that are differences to 1 aside."""
    student, objective = load_model(str(student_folder), "float32"), OBJECTIVES["union"]
    taught = lesson(student.double(), teacher, turns, objective)
    student.float()
    ours, whole = laid_out(monkeypatch, student, objective, taught, **layout), step(student, objective, taught)
    assert ours.totals.loss == pytest.approx(whole.totals.loss, rel=1e-5)
    assert (ours.gradient - whole.gradient).norm() < 1e-5 * whole.gradient.norm()


class BatchMean(LocalSupportMatching):
    """A reduction in the wrong place: divides by the positions of its micro-batch."""

    def __call__(self, head: OutputHead, positions: Positions) -> Loss:
        loss = super().__call__(head, positions)
        return dataclasses.replace(loss, value=loss.value / max(len(loss.value), 1))


def no_positions(patch: pytest.MonkeyPatch) -> None:
    right = TokenBatch.pack
    patch.setattr(update_module.TokenBatch, "pack", lambda *a: dataclasses.replace(right(*a), position_ids=None))


def no_attention_mask(patch: pytest.MonkeyPatch) -> None:
    right = left_padded
    patch.setitem(globals(), "left_padded", lambda model, batch: right(model, batch, masked=False))


def a_chunk_is_forgotten(patch: pytest.MonkeyPatch) -> None:
    right = head_module._chunks
    patch.setattr(head_module, "_chunks", lambda ids, weight: [*right(ids, weight)][1:] or right(ids, weight))


def normalised_by_tile(patch: pytest.MonkeyPatch) -> None:
    right = OutputHead._log_sum_exp

    def wrong(head: OutputHead, hidden: Tensor) -> Tensor:
        return right(head, hidden) + len(hidden) * len(head.weight) / 1e6

    patch.setattr(OutputHead, "_log_sum_exp", wrong)


@pytest.mark.parametrize(
    ("fault", "layout"),
    [
        (no_positions, "packed"),
        (no_attention_mask, "left padded"),
        (a_chunk_is_forgotten, "few rows gathered"),
        (normalised_by_tile, "tiles of few tokens"),
        (normalised_by_tile, "tiles of few positions"),
    ],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_a_faulty_layout_is_seen(monkeypatch, student, teacher, turns, fault, layout):
    taught = lesson(student, teacher, turns, OBJECTIVES["union"])
    whole = step(student, OBJECTIVES["union"], taught)
    fault(monkeypatch)
    with pytest.raises(AssertionError):
        assert_same(laid_out(monkeypatch, student, OBJECTIVES["union"], taught, **LAYOUTS[layout]), whole)


def test_a_division_by_the_micro_batch_is_seen(monkeypatch, student, teacher, turns):
    with pytest.raises(AssertionError):
        test_layout_changes_nothing(monkeypatch, student, teacher, turns, BatchMean(k=K), LAYOUTS["2 at once"])


@each_objective
def test_order_of_turns_changes_nothing(student, teacher, turns, objective):
    taught = lesson(student, teacher, turns, objective)
    shuffled = taught.of([3, 0, 7, 5, 1, 4, 2, 6])
    assert_same(step(student, objective, shuffled, at_once=3), step(student, objective, taught, at_once=3))


def test_turns_that_move_without_their_supports_are_another_step(student, teacher, turns):
    taught = lesson(student, teacher, turns, OBJECTIVES["teacher"], kept=1.0)
    moved = dataclasses.replace(taught, turns=taught.turns[::-1])
    with pytest.raises(AssertionError):
        assert_same(step(student, OBJECTIVES["teacher"], moved), step(student, OBJECTIVES["teacher"], taught))


# ---- more than one process ------------------------------------------------------------------------------------------


def share(
    student: PreTrainedModel, objective: Objective, taught: Lesson, reduction: str, processes: int, rank: int
) -> Tensor:
    """The gradient of one process's share of a step, averaged over all as DDP and FSDP do it; last, the loss."""

    def total(values: Tensor) -> Tensor:
        if processes > 1:
            distributed.all_reduce(values)
        return values

    own = taught if processes == 1 else taught.of([[0, 1, 3], [2, 4, 5, 6, 7]][rank])
    lengths = torch.tensor([len(turn.completion.ids) for turn in own.turns])
    turn = torch.arange(len(own.turns)).repeat_interleave(lengths)
    tasks = [0, 0, 1, 1, 0, 1, 1, 0] if processes == 1 else [[0, 0, 1], [1, 0, 1, 1, 0]][rank]
    weights = position_weights(
        reduction, own.keep, turn=turn, task=torch.tensor(tasks)[turn], tasks=2, total=total
    )  # fmt: skip
    groups = micro_batches(own.turns, 40)
    most = torch.tensor(len(groups))
    if processes > 1:
        distributed.all_reduce(most, distributed.ReduceOp.MAX)
    student.zero_grad()
    totals = accumulate_gradients(
        student, objective, own.turns, own.support, weights, scale=processes,
        groups=groups + [[]] * (int(most) - len(groups)), backward=lambda loss: loss.backward(),
    )  # fmt: skip
    gradient = torch.cat([p.grad.flatten() for p in student.parameters()]) / processes
    return total(torch.cat((gradient, torch.tensor([totals.loss], dtype=gradient.dtype))))


def shares(student_folder: Path, lessons: Path) -> dict[tuple[str, str], Tensor]:
    """One of two processes works on its share of all lessons, which lie in a file: their gradients and losses."""
    student = load_model(str(student_folder), "float32").double()
    return {
        (name, reduction): share(student, OBJECTIVES[name], taught, reduction, 2, distributed.get_rank())
        for name, taught in pickle.loads(lessons.read_bytes()).items()
        for reduction in REDUCTIONS
    }


@pytest.fixture(scope="module")
def by_two_processes(student_folder, teacher, turns, tmp_path_factory) -> dict[tuple[str, str], Tensor]:
    folder = tmp_path_factory.mktemp("two")
    student = load_model(str(student_folder), "float32").double()
    lessons = {name: lesson(student, teacher, turns, objective) for name, objective in OBJECTIVES.items()}
    (folder / "lessons").write_bytes(pickle.dumps(lessons))
    ours, theirs = by_two(shares, folder, student_folder, folder / "lessons")
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    return ours


@pytest.mark.parametrize("reduction", REDUCTIONS)
@each_objective
def test_two_processes_have_gradient_and_loss_of_one(by_two_processes, student, teacher, turns, objective, reduction):
    """With other numbers of turns, positions and micro-batches."""
    (name,) = (name for name, other in OBJECTIVES.items() if other is objective)
    alone = share(student, objective, lesson(student, teacher, turns, objective), reduction, 1, 0)
    together = by_two_processes[name, reduction]
    assert (together - alone)[:-1].norm() < EXACT * alone[:-1].norm()
    assert together[-1].item() == pytest.approx(alone[-1].item(), rel=EXACT)


def test_the_reductions_of_the_processes_above_differ(by_two_processes):
    token, sequence, task = (by_two_processes["teacher", reduction] for reduction in REDUCTIONS)
    for one, other in ((token, sequence), (token, task), (sequence, task)):
        assert (one - other)[:-1].norm() > 0.01 * one[:-1].norm()
        assert one[-1].item() != pytest.approx(other[-1].item(), rel=1e-4)


# ---- what is no target ----------------------------------------------------------------------------------------------


def gradient_at_places(student: PreTrainedModel, taught: Lesson, objective: Objective) -> tuple[Tensor, Tensor]:
    """Whether the loss of a padded batch of all turns feels a place `[b, t]`, and whether it should."""
    places: list[Tensor] = []

    def watch(_module: object, _args: object, output: object) -> None:
        places.append(output.last_hidden_state)
        output.last_hidden_state.retain_grad()

    handle = student.base_model.register_forward_hook(watch)
    step(student, objective, taught)
    handle.remove()
    (hidden,) = places
    feels = (hidden.grad != 0).any(-1)
    should, at = torch.zeros_like(feels), 0
    for row, turn in enumerate(taught.turns):
        for j in range(len(turn.completion.ids)):
            should[row, len(turn.prompt.ids) + j - 1] = taught.keep[at]
            at += 1
    return feels, should


@each_objective
def test_prompts_environments_padding_and_masked_positions_have_no_gradient(student, teacher, turns, objective):
    """What a task says stands in prompts. The place before a kept token is where it is predicted, and no other is."""
    feels, should = gradient_at_places(student, lesson(student, teacher, turns, objective), objective)
    assert feels.tolist() == should.tolist()
    everything, _ = gradient_at_places(student, lesson(student, teacher, turns, objective, kept=1.0), objective)
    assert everything.sum() > should.sum()  # a mask is what made the difference


def test_a_prompt_that_ends_later_leaves_fewer_targets(student, teacher, turns):
    """A turn cut elsewhere into prompt and answer is the same sequence with other positions to learn."""
    objective = OBJECTIVES["teacher"]
    whole = lesson(student, teacher, [turn_of(turns[1], random_ids(seed=5, length=10))], objective, kept=1.0)
    (turn,) = whole.turns
    written = turn.completion
    later = Turn(
        prompt=Prompt(messages=turn.prompt.messages, ids=[*turn.prompt.ids, *written.ids[:4]]),
        completion=dataclasses.replace(written, ids=written.ids[4:], log_probs=written.log_probs[4:]),
        answer="",
    )
    only_last = dataclasses.replace(whole, keep=torch.arange(10) >= 4)
    rest = Lesson(turns=[later], support=whole.support.rows(torch.arange(4, 10)), keep=torch.ones(6, dtype=torch.bool))
    assert_same(step(student, objective, rest), step(student, objective, only_last))
    with pytest.raises(AssertionError):
        assert_same(step(student, objective, only_last), step(student, objective, whole))


@each_objective
def test_a_masked_position_may_hold_anything(student, teacher, turns, objective):
    taught = lesson(student, teacher, turns, objective)
    gone = ~taught.keep
    broken = dataclasses.replace(
        taught.support,
        ids=taught.support.ids.masked_fill(gone[:, None], 7),
        log_probs=taught.support.log_probs.masked_fill(gone[:, None], -torch.inf),
        sampled=taught.support.sampled.masked_fill(gone, torch.nan),
        lost=taught.support.lost.masked_fill(gone, torch.nan),
    )
    assert_same(step(student, objective, dataclasses.replace(taught, support=broken)), step(student, objective, taught))


@each_objective
def test_a_masked_position_is_as_if_it_were_deleted(student, teacher, turns, objective):
    """At the end of a turn, where nothing that counts reads it."""
    taught = lesson(student, teacher, turns, objective)
    lengths = [len(turn.completion.ids) for turn in turns]
    cut = [max(1, length - 2) for length in lengths]
    inside = torch.tensor([j < short for length, short in zip(lengths, cut, strict=True) for j in range(length)])
    shorter = [
        dataclasses.replace(
            turn,
            completion=Completion(
                ids=turn.completion.ids[:short], log_probs=turn.completion.log_probs[:short], truncated=True
            ),
        )
        for turn, short in zip(taught.turns, cut, strict=True)
    ]
    deleted = Lesson(turns=shorter, support=taught.support.rows(inside.nonzero()[:, 0]), keep=taught.keep[inside])
    masked = dataclasses.replace(taught, keep=taught.keep & inside)
    assert_same(step(student, objective, deleted), step(student, objective, masked))
    with pytest.raises(AssertionError):
        assert_same(step(student, objective, deleted), step(student, objective, taught))


def with_a_long_turn(taught: Lesson, *, counts: bool) -> Lesson:
    """The same lesson and a turn of 120 tokens, so that every other one is padded far."""
    long = turn_of(taught.turns[0], random_ids(seed=8, length=120))
    return Lesson(
        turns=[*taught.turns, long],
        support=joined([taught.support, random_support([long], K, seed=9)]),
        keep=torch.cat((taught.keep, torch.full((120,), counts))),
    )


def test_a_long_turn_that_does_not_count_changes_nothing(student, teacher, turns):
    objective = OBJECTIVES["teacher"]
    taught = lesson(student, teacher, turns, objective)
    assert_same(step(student, objective, with_a_long_turn(taught, counts=False)), step(student, objective, taught))
    with pytest.raises(AssertionError):
        assert_same(step(student, objective, with_a_long_turn(taught, counts=True)), step(student, objective, taught))


@each_objective
def test_a_step_with_nothing_kept_has_a_zero_gradient(student, teacher, turns, objective):
    taught = lesson(student, teacher, turns, objective, kept=0.0)
    nothing = step(student, objective, taught, at_once=3)
    assert nothing.totals.kept == nothing.totals.loss == 0
    assert all(total == (0, 0) for total in nothing.totals.metrics.values())
    assert (nothing.gradient == 0).all()


@each_objective
def test_turns_without_tokens_change_nothing(student, teacher, turns, objective):
    taught = lesson(student, teacher, turns, objective)
    empty = turn_of(turns[0], [])
    more = dataclasses.replace(taught, turns=[empty, *taught.turns[:3], empty, *taught.turns[3:]])
    assert_same(step(student, objective, more, at_once=1), step(student, objective, taught))


# ---- half precision -------------------------------------------------------------------------------------------------


def bf16_errors(
    student: PreTrainedModel, teacher: PreTrainedModel, turns: list[Turn], objective: Objective, *, coarse: bool = False
) -> tuple[float, float]:
    """Relative errors of loss and gradient in bf16 against float64 with the same weights.

    Args:
        coarse: Give the bf16 student weights of 4 bits in place of 8.
    """
    exact = student.bfloat16().double()
    taught = lesson(exact, teacher, turns, objective, kept=1.0)
    true = step(exact, objective, taught)
    if coarse:
        for parameter in student.parameters():
            parameter.data = parameter.data.to(torch.float8_e4m3fn).double()
    ours = step(student.bfloat16(), objective, taught)
    of_loss = abs(ours.totals.loss - true.totals.loss) / abs(true.totals.loss)
    return of_loss, ((ours.gradient.double() - true.gradient).norm() / true.gradient.norm()).item()


@each_objective
def test_a_bf16_students_step_is_that_of_float64_within_rounding(student, teacher, turns, objective):
    """A weight is rounded by up to 0.4 %, and so is what follows from it, layer after layer."""
    of_loss, of_gradient = bf16_errors(student, teacher, turns, objective)
    assert of_loss < 0.02
    assert of_gradient < 0.04
    assert bf16_errors(student.double(), teacher, turns, objective, coarse=True)[1] > 0.06  # the check can fail
