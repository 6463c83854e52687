"""Real runs of a few steps: what training, stopping, going on and sharing out the work must not change."""

import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from peft import LoraConfig
from processes import LIGHTNINGS_ADVICE
from scripted import EchoGames
from slow import all_response_logits, sampled_ids
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

from lsm_lightning import module as module_module
from lsm_lightning import update as update_module
from lsm_lightning.batching import TokenBatch
from lsm_lightning.cli import TRAINER_DEFAULTS
from lsm_lightning.datamodule import AlternatingTasks
from lsm_lightning.errors import ConfigurationError
from lsm_lightning.module import OnPolicyDistillation
from lsm_lightning.objectives import FullVocabulary, LocalSupportMatching, SampledToken
from lsm_lightning.rollout import LocalEngine, Sampling
from lsm_lightning.tasks.math import AdditionProblems
from lsm_lightning.teacher import LocalTeacher
from lsm_lightning.types import Support

pytestmark = LIGHTNINGS_ADVICE


@dataclass
class History(Callback):
    """What every step logged, times left out."""

    steps: list[dict[str, float]] = field(default_factory=list)

    def on_train_batch_end(self, trainer: Trainer, *_: Any) -> None:
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if "/seconds/" not in name}
        task = ("sums", "echo")[(trainer.global_step - 1) % 2]
        self.steps.append({name: value for name, value in metrics.items() if name.startswith((task, "optimizer"))})


@dataclass
class Run:
    """A run on tiny models, ready to start."""

    trainer: Trainer
    module: OnPolicyDistillation
    data: AlternatingTasks
    history: History

    def fit(self, checkpoint: Path | None = None) -> "Run":
        self.trainer.fit(self.module, self.data, ckpt_path=checkpoint, weights_only=False)
        return self

    @property
    def weights(self) -> dict[str, Tensor]:
        return {name: value.detach().clone() for name, value in self.module.student.state_dict().items()}


Prepare = Callable[..., Run]


def halving(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)


@pytest.fixture
def prepare(student_folder: Path, teacher_folder: Path, tmp_path: Path) -> Iterator[Prepare]:
    """Builds runs of two tasks in turn, each with its own teacher."""

    def prepare(
        steps: int, folder: str = "run", teacher: Path = teacher_folder, optimizer: Any = torch.optim.AdamW,
        lr: float = 1e-2, **settings: Any,
    ) -> Run:  # fmt: skip
        root = tmp_path / folder
        module = OnPolicyDistillation(
            **{
                "student": str(student_folder),
                "teachers": {name: LocalTeacher(str(teacher)) for name in ("sums", "echo")},
                "objective": LocalSupportMatching(k=8),
                "optimizer": lambda parameters: optimizer(parameters, lr=lr, weight_decay=0.0),
                "lr_scheduler": halving,
                "engine": LocalEngine(),
                "micro_batch_tokens": 200,
                **settings,
            }
        )
        data = AlternatingTasks(
            tasks={"sums": AdditionProblems(digits=1, max_new_tokens=8, test_size=5), "echo": EchoGames(test_size=3)},
            prompts_per_step={"sums": 3, "echo": 2},
            samples_per_prompt=2,
        )
        history = History()
        checkpoint = ModelCheckpoint(
            dirpath=root / "checkpoints", filename="last", save_top_k=0, save_last=True, every_n_train_steps=20,
            save_on_exception=True, enable_version_counter=False,
        )  # fmt: skip
        trainer = Trainer(
            accelerator="cpu", devices=1, max_steps=steps, default_root_dir=root, enable_progress_bar=False,
            logger=TensorBoardLogger(root, name=None), callbacks=[history, checkpoint], limit_val_batches=0,
            **TRAINER_DEFAULTS,
        )  # fmt: skip
        return Run(trainer=trainer, module=module, data=data, history=history)

    before = signal.getsignal(signal.SIGINT)
    yield prepare
    signal.signal(signal.SIGINT, before)


def checkpoint_of(tmp_path: Path, folder: str = "run") -> Path:
    return tmp_path / folder / "checkpoints" / "last.ckpt"


def largest_change(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    return max((after[name] - before[name]).abs().max().item() for name in before)


def assert_identical(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


# ---- learning -------------------------------------------------------------------------------------------------------


def test_a_student_taught_by_itself_stays(prepare, student, student_folder):
    """Plain gradient descent: Adam would blow rounding up to full steps."""
    run = prepare(2, teacher=student_folder, optimizer=torch.optim.SGD, lr=0.1).fit()
    start = {name: value.float() for name, value in student.state_dict().items()}
    assert largest_change(start, run.weights) < 1e-6
    assert all(
        abs(step[f"{task}/train/kl"]) < 1e-6 for step, task in zip(run.history.steps, ("sums", "echo"), strict=True)
    )


def test_a_student_taught_by_another_moves(prepare, student):
    run = prepare(2, optimizer=torch.optim.SGD, lr=0.1).fit()
    start = {name: value.float() for name, value in student.state_dict().items()}
    assert largest_change(start, run.weights) > 1e-3
    assert run.history.steps[0]["sums/train/kl"] > 0.1


@pytest.mark.parametrize("objective", [LocalSupportMatching(k=8), LocalSupportMatching(k=8, support="tail_bucket")])
def test_the_divergence_falls(prepare, objective):
    run = prepare(12, objective=objective, lr_scheduler=None).fit()
    first, *_, last = [step["sums/train/kl"] for step in run.history.steps[::2]]
    assert last < 0.9 * first


def test_tasks_take_turns_and_every_step_is_one_optimiser_step(prepare):
    run = prepare(4).fit()
    assert run.trainer.global_step == 4
    assert run.data.step == 4
    told = [{name.split("/")[0] for name in step} - {"optimizer"} for step in run.history.steps]
    assert told == [{"sums"}, {"echo"}, {"sums"}, {"echo"}]


@pytest.mark.parametrize(
    "layout", [{"micro_batch_tokens": 1}, {"micro_batch_tokens": 10_000}, {"packing": True}], ids=str
)
def test_layout_changes_no_step(prepare, layout):
    whole = prepare(2, "whole", optimizer=torch.optim.SGD).fit()
    parts = prepare(2, "parts", optimizer=torch.optim.SGD, **layout).fit()
    assert largest_change(whole.weights, parts.weights) < 1e-5


def test_the_same_settings_give_the_same_run_bit_for_bit(prepare):
    one, other = prepare(2, "one").fit(), prepare(2, "other").fit()
    assert_identical(one.weights, other.weights)
    assert one.history.steps == other.history.steps
    reseeded = prepare(2, "reseeded", seed=1).fit()
    assert largest_change(one.weights, reseeded.weights) > 1e-4


def test_a_step_whose_mask_keeps_nothing_is_skipped_and_the_run_goes_on(prepare, monkeypatch, caplog):
    right, calls = module_module.loss_mask, []

    def nothing_at_the_second(*arguments: Any) -> Any:
        mask = right(*arguments)
        calls.append(run.weights)
        return replace(mask, keep=torch.zeros_like(mask.keep)) if len(calls) == 2 else mask

    monkeypatch.setattr(module_module, "loss_mask", nothing_at_the_second)
    run = prepare(3)
    run.fit()
    told = [(record.name, record.levelname) for record in caplog.records if "Skipped a step" in record.message]
    assert told == [("lsm_lightning.module", "WARNING")]
    assert_identical(calls[1], calls[2])  # nothing moved, not even by momentum
    assert run.trainer.global_step == 3
    assert run.data.step == 4
    assert all(value.isfinite().all() for value in run.weights.values())


@pytest.mark.parametrize("mask", ["repair", "none"])
def test_the_sampled_token_baseline_trains_too(prepare, mask):
    run = prepare(2, objective=SampledToken(reward_clip=5.0), sampling=Sampling(top_p=1.0), mask=mask).fit()
    for step, task in zip(run.history.steps, ("sums", "echo"), strict=True):
        assert step[f"{task}/train/gradient_norm"] > 0
        assert 0 < step[f"{task}/train/reward_positive"] < 1
        # One update a step, from its own samples: only rounding tells the student from the one that sampled.
        assert step[f"{task}/train/ratio_clipped"] == 0


OTHERS = [
    *(LocalSupportMatching(k=8, source=source) for source in ("student", "union", "sampled_added")),
    FullVocabulary(),
]


@pytest.mark.parametrize("mask", ["repair", "tags"])
@pytest.mark.parametrize("objective", OTHERS, ids=lambda objective: getattr(objective, "source", "full"))
def test_every_objective_trains(prepare, objective, mask):
    run = prepare(2, objective=objective, mask=mask).fit()
    for step, task in zip(run.history.steps, ("sums", "echo"), strict=True):
        assert step[f"{task}/train/kl"] > 0
        assert step[f"{task}/train/gradient_norm"] > 0
        assert 0 < step[f"{task}/mask/kept"] <= 1
    assert all(value.isfinite().all() for value in run.weights.values())


@pytest.mark.parametrize(("source", "width"), [("teacher", 0), ("student", 8), ("union", 8), ("sampled_added", 1)])
def test_the_teacher_is_asked_about_what_the_objective_compares(prepare, monkeypatch, source, width):
    run = prepare(1, objective=LocalSupportMatching(k=8, source=source))
    right, asked = run.module.teachers["sums"].score, []

    def listening(turns: Any, added: Tensor) -> Support:
        asked.append((sampled_ids(turns), all_response_logits(run.module.student, turns), added))
        return right(turns, added)

    monkeypatch.setattr(run.module.teachers["sums"], "score", listening)
    run.fit()
    ((sampled, logits, added),) = asked
    expected = sampled[:, None] if source == "sampled_added" else logits.topk(width, -1).indices
    assert added.tolist() == expected.tolist()
    assert run.module.teachers["sums"].tokens == (0 if source == "student" else 8)


def test_packing_leaves_no_padding(prepare, monkeypatch):
    """In none of the student's two passes."""

    class Packed:
        pack = TokenBatch.pack

    monkeypatch.setattr(update_module, "TokenBatch", Packed)
    objective = LocalSupportMatching(k=8, source="union")
    prepare(1, "packed", objective=objective, packing=True).fit()
    with pytest.raises(AttributeError, match="pad"):
        prepare(1, "padded", objective=objective).fit()


def test_what_cannot_be_compared_is_left_out_and_told(prepare, monkeypatch):
    """Positions where the teacher has no token that starts there, and its mass on tokens that the student lacks."""
    run = prepare(1)
    right = run.module.teachers["sums"].score

    def every_other(*arguments: Any) -> Support:
        support = right(*arguments)
        here = torch.arange(len(support.ids)) % 2 == 0
        return replace(
            support,
            comparable=here,
            log_probs=support.log_probs.masked_fill(~here[:, None], -torch.inf),
            lost=torch.where(here, 0.25, torch.nan),
            turn_end=torch.where(here, torch.tensor([0.2, 0.6]).log()[torch.arange(len(here)) % 4 // 2], torch.nan),
        )

    monkeypatch.setattr(run.module.teachers["sums"], "score", every_other)
    (step,) = run.fit().history.steps
    assert step["sums/mask/lost"] == step["sums/mask/kept"] == pytest.approx(0.5, abs=0.02)
    assert step["sums/train/lost_mass"] == pytest.approx(0.25)
    assert step["sums/train/teacher_turn_end"] == pytest.approx(0.4, abs=0.02)


@pytest.mark.parametrize(("objective", "kept"), [(SampledToken(), 0.5), (LocalSupportMatching(k=8), 1.0)])
def test_a_reward_is_paid_only_where_the_teacher_reads_the_very_token(prepare, monkeypatch, objective, kept):
    run = prepare(1, objective=objective)
    right = run.module.teachers["sums"].score

    def every_other(*arguments: Any) -> Support:
        support = right(*arguments)
        alike = torch.arange(len(support.ids)) % 2 == 0
        return replace(support, alike=alike, sampled=torch.where(alike, -3.0, -torch.inf))

    monkeypatch.setattr(run.module.teachers["sums"], "score", every_other)
    (step,) = run.fit().history.steps
    assert step["sums/mask/kept"] == pytest.approx(kept, abs=0.02)


# ---- stopping and going on ------------------------------------------------------------------------------------------


@pytest.fixture
def uninterrupted(prepare: Prepare) -> Run:
    return prepare(4, "uninterrupted").fit()


def assert_same_from(resumed: Run, whole: Run, first: int) -> None:
    assert_identical(resumed.weights, whole.weights)
    assert resumed.history.steps == whole.history.steps[first:]
    assert resumed.trainer.global_step == whole.trainer.global_step
    assert resumed.data.step == whole.data.step


@pytest.mark.parametrize("done", [1, 2, 3])
def test_a_resumed_run_is_the_uninterrupted_one_bit_for_bit(prepare, uninterrupted, tmp_path, done):
    prepare(done, "first").fit()
    resumed = prepare(4, "first").fit(checkpoint_of(tmp_path, "first"))
    assert_same_from(resumed, uninterrupted, done)


def adapters(*targets: str) -> LoraConfig:
    """With dropout, whose random numbers must go on too."""
    return LoraConfig(r=2, target_modules=[*targets], lora_dropout=0.3)


def test_a_resumed_run_of_adapters_is_the_uninterrupted_one_bit_for_bit(prepare, tmp_path):
    torch.manual_seed(5)  # fresh adapters are random
    whole = prepare(4, "whole", lora=adapters("q_proj")).fit()
    torch.manual_seed(5)
    prepare(2, "first", lora=adapters("q_proj")).fit()
    saved = torch.load(checkpoint_of(tmp_path, "first"), weights_only=False)["state_dict"]
    assert saved
    assert all("lora_" in name for name in saved)
    resumed = prepare(4, "first", lora=adapters("q_proj")).fit(checkpoint_of(tmp_path, "first"))
    assert_same_from(resumed, whole, 2)
    torch.manual_seed(6)
    other = prepare(4, "other", lora=adapters("q_proj")).fit()
    with pytest.raises(AssertionError):
        assert_identical(other.weights, whole.weights)


def test_a_checkpoint_of_other_adapters_is_refused(prepare, tmp_path):
    prepare(1, "first", lora=adapters("q_proj")).fit()
    with pytest.raises(ConfigurationError, match=r"model\.lora do not agree"):
        prepare(2, "first", lora=adapters("q_proj", "v_proj")).fit(checkpoint_of(tmp_path, "first"))


def interrupt_at(run: Run, where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C at the third step."""
    owner, name = {
        "rollout": (run.module.engine, "converse"),
        "teacher": (run.module.teachers["sums"], "score"),
        "backward": (run.module, "manual_backward"),
        "schedule": (run.module, "lr_schedulers"),
        "logging": (run.module, "_log_step"),
    }[where]
    right = getattr(owner, name)

    def interrupted(*arguments: Any, **options: Any) -> Any:
        # `advance` comes before logging, so the step's number is one up by then
        if run.data.step == (3 if where == "logging" else 2):
            raise KeyboardInterrupt
        return right(*arguments, **options)

    monkeypatch.setattr(owner, name, interrupted)


@pytest.mark.parametrize("where", ["rollout", "teacher", "backward", "schedule", "logging"])
def test_a_run_interrupted_inside_a_step_can_go_on_as_if_nothing_was(
    prepare, uninterrupted, tmp_path, monkeypatch, where
):
    run = prepare(4, "first")
    interrupt_at(run, where, monkeypatch)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        run.fit()
    resumed = prepare(4, "first").fit(checkpoint_of(tmp_path, "first"))
    # An interrupt after the optimiser's step costs what that step would have logged, and nothing else.
    assert_same_from(resumed, uninterrupted, 3 if where == "logging" else 2)


def test_an_error_inside_a_step_saves_a_checkpoint_too(prepare, tmp_path, monkeypatch):
    run = prepare(4, "first")

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory left")

    monkeypatch.setattr(run.module.teachers["echo"], "score", fail)
    with pytest.raises(RuntimeError, match="no memory left"):
        run.fit()
    assert prepare(2, "first").fit(checkpoint_of(tmp_path, "first")).history.steps[0].keys() >= {"echo/train/kl"}


def test_runs_in_one_process_share_no_engine(student_folder, teacher_folder):
    """An engine holds a replica of one student."""
    one, other = (
        OnPolicyDistillation(str(student_folder), {"sums": LocalTeacher(str(teacher_folder))}) for _ in range(2)
    )
    assert one.engine is not other.engine


# ---- what is left behind --------------------------------------------------------------------------------------------


def test_a_checkpoint_holds_the_student_and_where_the_run_stands(prepare, tmp_path, student_folder):
    run = prepare(3).fit()
    checkpoint = torch.load(checkpoint_of(tmp_path), weights_only=False)
    assert {name.split(".")[0] for name in checkpoint["state_dict"]} == {"student"}
    assert len(checkpoint["state_dict"]) == len(run.module.student.state_dict())
    assert checkpoint["AlternatingTasks"] == {"step": 3, "tasks": ["sums", "echo"]}
    assert checkpoint["student"] == str(student_folder)


def test_curves_of_every_task_are_written(prepare, tmp_path):
    run = prepare(4).fit()
    events = EventAccumulator(run.trainer.logger.log_dir).Reload()
    for task, first in (("sums", 0), ("echo", 1)):
        points = events.Scalars(f"{task}/train/kl")
        assert [point.value for point in points] == pytest.approx(
            [step[f"{task}/train/kl"] for step in run.history.steps[first::2]], rel=1e-6
        )
        for name in ("train/reward", "train/loss", "train/response_tokens", "mask/kept", "train/gradient_norm"):
            assert len(events.Scalars(f"{task}/{name}")) == 2


def test_answers_that_cannot_be_used_are_told_by_kind(prepare):
    sums, echo = prepare(2).fit().history.steps
    kinds = [echo[f"echo/train/invalid/{kind}"] for kind in ("blank", "another")]
    assert sum(kinds) == pytest.approx(echo["echo/train/invalid_actions"])
    assert sum(kinds) > 0
    assert not [name for name in sums if "/invalid/" in name], "this task tells no kinds apart"


def test_numbers_of_a_step_are_in_their_bounds(prepare):
    run = prepare(4).fit()
    for step in run.history.steps:
        for name, value in step.items():
            assert value == value, name
            if "/mask/" in name or name.endswith(
                ("reward", "truncated", "mass_outside", "lost_mass", "turn_end", "agreement")
            ):
                assert -1e-6 <= value <= 1 + 1e-6, name


def test_validation_measures_every_task(prepare):
    run = prepare(1)
    run.trainer.limit_val_batches = 1.0
    (scores,) = run.trainer.validate(run.module, run.data, verbose=False)
    assert scores["sums/eval/n"] == 5
    assert scores["echo/eval/n"] == 3
    for task in ("sums", "echo"):
        assert 0 <= scores[f"{task}/eval/low"] <= scores[f"{task}/eval/value"] <= scores[f"{task}/eval/high"] <= 1
