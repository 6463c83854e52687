"""One on-policy step: collect, score, mask, then micro-batches, then the optimiser."""

import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from jsonargparse import lazy_instance  # type: ignore[attr-defined]
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.profilers import Profiler
from lightning.pytorch.strategies import ModelParallelStrategy, ParallelStrategy
from lightning.pytorch.trainer.states import TrainerFn
from peft import LoraConfig
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import BitsAndBytesConfig, PreTrainedModel

from lsm_lightning import resuming
from lsm_lightning.batching import check_packing, sampled_ids
from lsm_lightning.datamodule import AlternatingTasks
from lsm_lightning.errors import ConfigurationError, TrainingDivergedError
from lsm_lightning.evaluation import evaluate
from lsm_lightning.export import write_student
from lsm_lightning.masks import LossMask, MaskPolicy, kept, loss_mask
from lsm_lightning.metrics import SuccessRate, global_means
from lsm_lightning.objectives import LocalSupportMatching, Objective
from lsm_lightning.objectives.base import SAMPLER_GAP
from lsm_lightning.objectives.head import check_head
from lsm_lightning.optimizers import check_step, make_optimizer, make_schedule
from lsm_lightning.pretrained import (
    DType,
    check_model,
    check_vocabulary,
    load_model,
    load_skeleton,
    load_tokenizer,
    turn_end_ids,
)
from lsm_lightning.processes import gather, together
from lsm_lightning.random_states import RandomStates, random_states, restore_random_states
from lsm_lightning.reductions import Reduction, position_weights
from lsm_lightning.rollout import Engine, LocalEngine, Sampling
from lsm_lightning.rollout.collect import Player, collect
from lsm_lightning.serving import Fleet
from lsm_lightning.sharding import OffloadedModelParallelStrategy, load_sharded, shards_of
from lsm_lightning.student import (
    adapt,
    check_lora,
    checkpoint_activations,
    compile_layers,
    freeze,
    is_adapters,
    plain_state_dict,
)
from lsm_lightning.teacher import Teacher
from lsm_lightning.teacher.ahead import ScoringAhead
from lsm_lightning.types import StepBatch, Support, Trajectory, Turn
from lsm_lightning.update import StepTotals, accumulate_gradients, micro_batches, student_top_tokens

log = logging.getLogger(__name__)

SKIPPED_STEPS_ALLOWED = 10
"""In a row, before a run that learns nothing is ended."""

PAPERS_OBJECTIVE = lazy_instance(LocalSupportMatching)
"""As a default that the command line can show; it has no attributes before one of its methods is called."""


@dataclass
class Clock:
    """Takes the time of a step's phases, for the curves and for Lightning's profiler."""

    profiler: Profiler
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Until the end of the block."""
        started = time.perf_counter()
        with self.profiler.profile(name):
            yield
        self.seconds[name] = time.perf_counter() - started


@contextmanager
def _float32_by_default() -> Iterator[None]:
    """Lightning's half and double precision convert the student, and also set the default type of a step's new tensors;
    log-probs, weights of positions and sums are to stay float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class OnPolicyDistillation(LightningModule):
    """Trains a student on what it writes itself, under the eyes of one teacher a task.

    Args:
        student: An embedded model (`embedded:student`), a folder in transformers format, or a hub id.
        teachers: Task name → teacher; one for each task of the data module.
        objective: What is compared, and how.
        engine: Writes the rollouts; null is a `LocalEngine`.
        sampling: How rollouts draw tokens.
        eval_sampling: How evaluations do, the teachers' too; the paper's way is the default.
        mask: What to do where the two tokenizers merely spell differently: `repair` lets the teacher read its own
            spelling, the others leave positions out (the paper's way, for comparison).
        reduction: What counts alike in a step's loss: tokens, sequences (turns) or tasks. A step has one task here, so
            that tasks, each with its own steps, count alike anyway, and `task_mean` is `token_mean`.
        optimizer: Called with the student's parameters.
        lr_scheduler: Called with the optimizer; stepped once a training step. Besides torch's there is
            `lsm_lightning.learning_rates.WarmupCosine`.
        no_decay: Shell patterns of names of the student's weights that weight decay leaves alone, such as `*norm*`, and
            `*.bias` where it has some.
        micro_batch_tokens: Tokens (prompt, response and padding) that go through the student together; changes memory
            and speed, not the result.
        packing: Lay the sequences of a micro-batch in one row, without padding; changes memory and speed only. Pays
            where lengths differ much and attention skips what is masked (flash attention), not on a CPU. A student that
            cannot keep packed sequences apart is refused.
        gradient_clip: Largest norm of the gradient.
        dtype: Of the student's weights. With `trainer.precision` bf16-mixed these stay as they are and the computing is
            done in bfloat16.
        lora: Train low-rank adapters instead of the weights; `lora.r`, `lora.target_modules` and so on are those of
            `peft.LoraConfig`. The student is written with its adapters merged. Only plain LoRA: what trains anything
            else (`modules_to_save`, `bias`) or is more than a low-rank sum (`use_dora`) is refused.
        quantization: Keep the frozen weights under `lora` in 4 or 8 bits (QLoRA), as `load_in_4bit: true` and the other
            settings of `transformers.BitsAndBytesConfig` say; needs the package bitsandbytes. Not with sharding. On a
            GPU `load_in_8bit` rounds activations too, which rollouts do not: they differ a little from the student.
        freeze: Shell patterns of names of the student's weights that are not trained, such as `*.embed_tokens.*`.
        activation_checkpointing: Keep only what enters each layer and compute the rest again in the backward pass:
            much less memory, about a third more time.
        compile_layers: Compile the student's layers (torch.compile); pays in long runs on a GPU.
        chat_template: A jinja2 template that replaces the student tokenizer's own.
        sampler_gap_bound: Nats by which the student's log-probs of the sampled tokens may differ on average from those
            they were sampled with, before a warning tells it (`train/sampler_gap` is logged at every step): 1e-6 is
            rounding in float32, some hundredths in bfloat16; more means another student's tokens, or dropout.
        seed: Of the rollouts; the command line links it to `seed_everything`.
    """

    def __init__(
        self,
        student: str,
        teachers: dict[str, Teacher],
        objective: Objective = PAPERS_OBJECTIVE,
        engine: Engine | None = None,
        sampling: Sampling = Sampling(),
        eval_sampling: Sampling = Sampling(),
        mask: MaskPolicy = "repair",
        reduction: Reduction = "token_mean",
        optimizer: OptimizerCallable = lambda parameters: torch.optim.AdamW(parameters, lr=2e-6, weight_decay=0.01),
        lr_scheduler: LRSchedulerCallable | None = None,
        no_decay: list[str] = [],  # noqa: B006 - never changed; the command line shows it
        micro_batch_tokens: int = 16384,
        packing: bool = False,
        gradient_clip: float = 1.0,
        dtype: DType = "float32",
        lora: LoraConfig | None = None,
        quantization: BitsAndBytesConfig | None = None,
        freeze: list[str] = [],  # noqa: B006 - never changed; the command line shows it
        activation_checkpointing: bool = False,
        compile_layers: bool = False,
        chat_template: str | None = None,
        sampler_gap_bound: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        if micro_batch_tokens < 1 or gradient_clip <= 0:
            raise ConfigurationError(
                f"model.micro_batch_tokens={micro_batch_tokens} and model.gradient_clip={gradient_clip}: both must be "
                "positive (a very large gradient_clip leaves gradients alone)."
            )
        if not sampler_gap_bound > 0:
            raise ConfigurationError(f"model.sampler_gap_bound={sampler_gap_bound:g}: use a positive number of nats.")
        self.student_name = student
        self.teachers = teachers
        self.objective = LocalSupportMatching() if objective is PAPERS_OBJECTIVE else objective
        self.engine = LocalEngine() if engine is None else engine
        self.sampling = sampling
        self.eval_sampling = eval_sampling
        self.mask: MaskPolicy = mask
        self.reduction: Reduction = reduction
        self.optimizer_of = optimizer
        self.lr_scheduler_of = lr_scheduler
        self.no_decay = no_decay
        self.micro_batch_tokens = micro_batch_tokens
        self.packing = packing
        self.gradient_clip = gradient_clip
        self.dtype_name: DType = dtype
        if quantization is not None and lora is None:
            raise ConfigurationError(
                "model.quantization: quantised weights cannot be trained; add adapters with model.lora, or remove it."
            )
        if lora is not None:
            check_lora(lora)
        self.lora = lora
        self.strict_loading = lora is None  # checkpoints hold the adapters only, see `on_save_checkpoint`
        self.quantization = quantization
        self.freeze_patterns = freeze
        self.activation_checkpointing = activation_checkpointing
        self.compile_layers = compile_layers
        self.chat_template = chat_template
        self.sampler_gap_bound = sampler_gap_bound
        self._gap_told = False
        self._retries = 0
        self.seed = seed
        self.half_updated = False
        """While the optimiser is at work: what it leaves behind when it fails is no state to go on from."""
        self._skipped = 0
        self._continued: resuming.Note | None = None
        self._restoring: dict[str, Any] = {}
        self._changes: resuming.Changes | None = None
        self._before_step: RandomStates | None = None
        self._restored: RandomStates | None = None
        self.on_rollout_progress: Callable[[int, int], None] | None = None
        """Told (finished, all) episodes while rollouts run; a progress bar sets it."""

    # ---- set-up -----------------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Check, before anything heavy is loaded, that tasks and teachers match and that the models can be found.

        Raises:
            ConfigurationError: A task has no teacher, a teacher no task, a model or tokenizer is not usable, the
                optimizer or its schedule cannot make a step, or the strategy splits the student in a way that is not
                done here.
        """
        tasks = self._data.tasks
        if missing := sorted(tasks.keys() - self.teachers.keys()):
            raise ConfigurationError(
                f"No teacher for the task '{missing[0]}': add model.teachers.{missing[0]}, or remove the task."
            )
        if idle := sorted(self.teachers.keys() - tasks.keys()):
            raise ConfigurationError(
                f"model.teachers.{idle[0]} belongs to no task: data.tasks has {', '.join(sorted(tasks))}."
            )
        if self.trainer.precision == "16-mixed":
            raise ConfigurationError(
                "precision=16-mixed scales gradients before they are clipped here: use bf16-mixed or 32-true."
            )
        if isinstance(strategy := self.trainer.strategy, ModelParallelStrategy):
            shards_of(strategy, nodes=self.trainer.num_nodes, devices=self.trainer.num_devices)
        if stage == "fit":
            device = torch.device("cpu") if self._offloaded else strategy.root_device
            check_step(self.optimizer_of, self.lr_scheduler_of, device=device, max_steps=self.trainer.max_steps)
        check_model(self.student_name)
        if stage == "fit":
            folder = Path(self.trainer.log_dir or self.trainer.default_root_dir)  # a collective
            for fleet in self._fleets:
                fleet.logs = folder
        for teacher in self.teachers.values():
            teacher.check()

    @property
    def _fleets(self) -> list[Fleet]:
        """The servers of rollouts and teachers."""
        asking: list[Engine | Teacher] = [self.engine, *self.teachers.values()]
        return [part.fleet for part in asking if part.fleet is not None]

    @property
    def _offloaded(self) -> bool:
        """Whether the student and its optimizer rest in main memory."""
        return isinstance(self.trainer.strategy, OffloadedModelParallelStrategy)

    def configure_model(self) -> None:
        """Load student and teachers; shard the student where the strategy is FSDP2 (`ModelParallelStrategy`)."""
        if hasattr(self, "student"):
            return
        # Lightning calls this with the accelerator as torch's default device and moves the student there later.
        with torch.device("cpu"):
            self.tokenizer = load_tokenizer(self.student_name, self.chat_template)
            self.student = self._load_student() if self.device_mesh is None else self._load_student_sharded()
            self.turn_end = turn_end_ids(self.student, self.tokenizer)
            self.student.train()
            if self._continued is not None:
                resuming.check_trained(self._continued[resuming.NOTE], self)
            vocabulary = len(self.student.get_output_embeddings().weight)
            if self.objective.student_tokens > vocabulary:
                raise ConfigurationError(
                    f"A support of k={self.objective.student_tokens} tokens was asked for, but the student "
                    f"'{self.student_name}' has only {vocabulary}. Lower model.objective.init_args.k."
                )
            for teacher in self.teachers.values():
                teacher.setup(
                    self.tokenizer,
                    vocabulary=vocabulary,
                    respell=self.mask == "repair",
                    tokens=self.objective.teacher_tokens,
                    device=self.trainer.strategy.root_device,
                    added=self.objective.student_tokens,
                )

    def _load_student(self) -> PreTrainedModel:
        student = load_model(self.student_name, self.dtype_name, self.quantization)
        if self.lora is None and getattr(student, "is_quantized", False):
            raise ConfigurationError(
                f"model.student: the weights of '{self.student_name}' are quantised, and those cannot be trained; add "
                "adapters with model.lora, or use weights at full size."
            )
        check_head(student, self.student_name)
        if self.packing:
            check_packing(student, self.student_name)
        check_vocabulary(student, self.tokenizer, self.student_name)
        return self._compiled(self.prepared(student))

    def _load_student_sharded(self) -> PreTrainedModel:
        assert self.device_mesh is not None
        if self.quantization is not None:
            raise ConfigurationError(
                "model.quantization: quantised weights cannot be sharded; use the strategy ddp, or remove it."
            )
        return load_sharded(
            self._load_student,
            lambda: self._compiled(self.prepared(load_skeleton(self.student_name))),
            self.device_mesh["data_parallel"],
            device=self.trainer.strategy.root_device,
            compute_dtype=torch.bfloat16 if self.trainer.precision == "bf16-mixed" else None,
            offload=self._offloaded,
        )

    def prepared(self, student: PreTrainedModel) -> PreTrainedModel:
        """A student just loaded, with adapters, frozen parts and checkpointed activations; changed in place."""
        if self.lora is not None:
            adapt(student, self.lora)
        freeze(student, self.freeze_patterns)
        if self.activation_checkpointing:
            checkpoint_activations(student)
        return student

    def _compiled(self, student: PreTrainedModel) -> PreTrainedModel:
        if self.compile_layers:
            compile_layers(student)
        return student

    def configure_optimizers(self) -> Any:
        """The optimizer over the student, and its schedule; they stand where a checkpoint is gone on from."""
        optimizer = make_optimizer(self.optimizer_of, self.student, self.no_decay)
        self._optimizer_note = resuming.of_optimizer(optimizer, self)
        scheduler = None
        if self.lr_scheduler_of is not None:
            scheduler = make_schedule(self.lr_scheduler_of, optimizer, max_steps=self.trainer.max_steps)
        self._optimizer_note |= resuming.of_schedule(scheduler)
        if self._continued is not None:
            self._prepare_restoring(optimizer, scheduler)
        return optimizer if scheduler is None else ([optimizer], [scheduler])

    def _prepare_restoring(self, optimizer: Optimizer, scheduler: Any) -> None:
        """Let the command line's settings hold, whatever the checkpoint says."""
        assert self._continued is not None
        states = self._continued.get("optimizer_states", [])  # none in a sharded checkpoint
        if self.device_mesh is not None and states and not any(states[0]["state"].values()):
            raise ConfigurationError(
                f"model.optimizer: {type(optimizer).__name__} keeps no state, and torch cannot restore that in shards "
                "from a single file: go on with the strategy ddp or in one process."
            )
        self._changes = resuming.changes(
            self._continued[resuming.NOTE],
            self._optimizer_note,
            optimizer,
            scheduler,
            steps=self._continued["global_step"],
        )
        if self._changes.told:
            self.print(f"Going on with other settings of the optimiser: {self._changes.told}.")
        if self.device_mesh is not None and self._changes.schedule:
            # Torch looks for every setting in the sharded checkpoint; those of the schedule come back in `_change`.
            for group, configured in zip(optimizer.param_groups, self._optimizer_note["groups"], strict=True):
                for name in group.keys() & self._changes.groups[0].keys() - configured.keys():
                    del group[name]
        if self._restoring:
            groups = [group["params"] for group in self._optimizer_note["groups"]]
            states = [resuming.by_number(state, groups) for state in self._restoring["optimizer_states"]]
            self._restoring["optimizer_states"] = states
            self._change(states[0]["param_groups"], self._restoring)
            self._restoring = {}

    def _change(self, groups: list[dict[str, Any]], checkpoint: dict[str, Any]) -> None:
        if self._changes is not None:
            for group, values in zip(groups, self._changes.groups, strict=True):
                group.update(values)
            if self._changes.schedule:
                checkpoint["lr_schedulers"] = []

    def on_train_start(self) -> None:
        """Let random numbers go on where the checkpoint stood; what has been set up since has drawn some."""
        if self._restored is not None:
            restore_random_states(self._restored, self.device)
            self._restored = None

    def teardown(self, stage: str) -> None:
        """End servers that were started."""
        self.engine.close()
        for teacher in self.teachers.values():
            teacher.close()

    # ---- one step ---------------------------------------------------------------------------------------------------

    @_float32_by_default()
    def training_step(self, batch: StepBatch, batch_idx: int) -> dict[str, float]:
        """Play the batch's episodes, let the task's teacher score them, and make one update.

        Returns:
            What was measured, for callbacks; the same numbers are logged.
        """
        self._before_step = random_states(self.device)
        clock = Clock(self.trainer.profiler)  # type: ignore[attr-defined]
        teacher = self.teachers[batch.task]
        with self._ahead(teacher) as ahead:
            with clock.phase("rollout"):
                trajectories = self.rollout(batch, on_turns=ahead.submit if ahead else None)
            turns = [turn for trajectory in trajectories for turn in trajectory.turns]
            groups = self._micro_batches(turns)
            with clock.phase("support"):
                added = self._added_tokens(turns, groups)
            with clock.phase("teacher"):
                support = self._scored(teacher, ahead, turns, added)
        with clock.phase("mask"):
            mask = loss_mask(teacher.pair, turns, self.mask)
            keep = kept(mask, support, sampled=self.objective.compares_sampled)
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        with clock.phase("update"):
            totals, gradient_norm = self.update(
                batch.task, turns, support, keep, groups, done=lambda: self._advance(batch)
            )
        return self._log_step(batch.task, trajectories, mask, support, totals, gradient_norm, rate, clock.seconds)

    def _advance(self, batch: StepBatch) -> None:
        """A checkpoint from here on resumes after this step; one from before repeats it, with its random numbers."""
        self._data.advance(batch)
        self._before_step = None

    def _micro_batches(self, turns: list[Turn]) -> list[list[int]]:
        """Sharded weights are gathered by all processes together, so all run equally many."""
        groups = micro_batches(turns, self.micro_batch_tokens, packed=self.packing)
        most = int(self._over_processes(torch.tensor(len(groups)), "max"))
        return groups + [[]] * (most - len(groups))

    def _ahead(self, teacher: Teacher) -> AbstractContextManager[ScoringAhead | None]:
        """A teacher elsewhere scores turns while the student writes others."""
        if not teacher.elsewhere or self.objective.student_tokens:
            return nullcontext()
        return ScoringAhead(lambda turns: teacher.score(turns, self._sampled_tokens(turns)), teacher.cancel)

    def _scored(
        self, teacher: Teacher, ahead: ScoringAhead | None, turns: list[Turn], added: Int[Tensor, "n c"]
    ) -> Support:
        def score() -> Support:
            return ahead.result(turns) if ahead else teacher.score(turns, added)

        # Processes may share a local teacher, and wait for each other in there.
        return together(score) if teacher.elsewhere else score()

    def _added_tokens(self, turns: list[Turn], groups: list[list[int]]) -> Int[Tensor, "n c"]:
        """Student ids that the objective compares besides the teacher's top tokens."""
        sampled = self._sampled_tokens(turns)
        if not (k := self.objective.student_tokens):
            return sampled
        top = student_top_tokens(self.student, turns, k, groups=groups, packed=self.packing)
        return torch.cat((sampled, top), -1)

    def _sampled_tokens(self, turns: Sequence[Turn]) -> Int[Tensor, "n c"]:
        """The sampled ones, if the objective wants them among these."""
        sampled = sampled_ids(turns, self.device).unsqueeze(-1)
        return sampled if self.objective.adds_sampled else sampled[:, :0]

    def rollout(self, batch: StepBatch, on_turns: Callable[[Sequence[Turn]], None] | None = None) -> list[Trajectory]:
        """The student's episodes of a step; their random numbers depend on the seed, the step and the sample only.

        Args:
            batch: Which episodes.
            on_turns: Given turns as they end, while others are being written.
        """
        self.engine.sync(self.student)
        task = self._data.tasks[batch.task]
        episodes = [
            ((self.seed, batch.step, index, sample), task.episode("train", index))
            for index in batch.indices
            for sample in range(batch.samples_per_prompt)
        ]
        trajectories = together(
            lambda: collect(
                episodes,
                self.player(self.sampling),
                max_new_tokens=task.max_new_tokens,
                on_progress=self.on_rollout_progress,
                on_turns=on_turns,
                span=self.trainer.profiler.profile,  # type: ignore[attr-defined]
            )
        )
        self.engine.rest()
        return trajectories

    def update(
        self,
        task: str,
        turns: list[Turn],
        support: Support,
        keep: Bool[Tensor, " n"],
        groups: list[list[int]],
        done: Callable[[], None],
    ) -> tuple[StepTotals, float]:
        """One optimiser step; none, with a warning, where no process has a position to learn from.

        Args:
            task: Whose turns they are.
            turns: What was sampled.
            support: The teacher's answer at its positions.
            keep: Which of them count.
            groups: Micro-batches, equally many on all processes.
            done: Called right after the optimiser's step, so that an interrupt cannot fall between the two.

        Returns:
            What this process summed up, and the norm of the whole gradient before clipping.
        """
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        weights, kept = self._weights(task, turns, keep)
        totals = accumulate_gradients(
            self.student,
            self.objective,
            turns,
            support,
            weights,
            groups=groups,
            backward=self._backward(len(groups)),
            scale=self.trainer.world_size,  # gradients are averaged over processes
            packed=self.packing,
        )
        norm = torch.nn.utils.clip_grad_norm_(self.student.parameters(), self.gradient_clip)
        norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
        if not math.isfinite(float(norm)):
            raise TrainingDivergedError(
                f"The gradient of step {self.trainer.global_step + 1} is not finite: lower the learning rate "
                f"({optimizer.param_groups[0]['lr']:g}) or model.gradient_clip ({self.gradient_clip:g})."
            )
        scheduler = self.lr_schedulers()
        self._skipped = 0 if kept else self._skipped + 1
        if self._skipped > SKIPPED_STEPS_ALLOWED:
            raise ConfigurationError(
                f"The mask '{self.mask}' left no position to learn from in {self._skipped} steps in a row: choose "
                "another model.mask, or see tokenalign's report on the two tokenizers."
            )
        if kept == 0:
            if self.trainer.is_global_zero:
                nothing = f"the mask '{self.mask}' left no position to learn from" if turns else "no answer was written"
                log.warning("Skipped a step: %s.", nothing)
        else:
            self.half_updated = True
            optimizer.step()
            if isinstance(scheduler, LRScheduler):
                scheduler.step()
        done()
        self.half_updated = False
        optimizer.zero_grad()
        return totals, float(norm)

    def _backward(self, times: int) -> Callable[[Tensor], None]:
        """For so many micro-batches: DDP averages gradients over processes at the last one only.

        FSDP2 goes on doing it at each, or every process would hold the gradient of the whole student in between.
        """
        strategy, left = self.trainer.strategy, times

        def backward(loss: Tensor) -> None:
            nonlocal left
            left -= 1
            if left > 0 and isinstance(strategy, ParallelStrategy):
                with strategy.block_backward_sync():
                    self.manual_backward(loss)
            else:
                self.manual_backward(loss)

        return backward

    def _weights(self, task: str, turns: list[Turn], keep: Bool[Tensor, " n"]) -> tuple[Float[Tensor, " n"], int]:
        """The weight of each position, and how many are kept over all processes; summed up in one go."""
        tasks = sorted(self._data.tasks)
        lengths = torch.tensor([len(turn.completion.ids) for turn in turns], dtype=torch.long, device=self.device)
        turn = torch.arange(len(turns), device=self.device).repeat_interleave(lengths)
        kept = 0

        def total(counts: Tensor) -> Tensor:
            nonlocal kept
            summed = self._total(torch.cat((counts.flatten(), keep.sum().to(counts.dtype).reshape(1))))
            kept = int(summed[-1])
            return summed[:-1].reshape(counts.shape)

        weights = position_weights(
            self.reduction,
            keep,
            turn=turn,
            task=torch.full_like(turn, tasks.index(task)),
            tasks=len(tasks),
            total=total,
        )
        return weights, kept

    # ---- evaluation -------------------------------------------------------------------------------------------------

    @_float32_by_default()
    def validation_step(self, batch: StepBatch, batch_idx: int) -> None:
        """Measure the student on a task's test split."""
        score = self.evaluate(batch.task)
        self.log_dict({f"{batch.task}/eval/{name}": value for name, value in score.items()}, batch_size=1)

    def predict_step(self, batch: StepBatch, batch_idx: int) -> str:
        """The task's name, and no more: the command `probe` has Lightning set up a prediction, and looks before it."""
        return batch.task

    def evaluate(
        self,
        task: str,
        player: Player | None = None,
        on_progress: Callable[[int, int], None] | None = None,
    ) -> dict[str, float]:
        """Success on the task's test split, over all processes: `value`, `n`, `low` and `high` (95 %).

        Args:
            task: Its name.
            player: Who plays; the student as it is now, if not given.
            on_progress: Told (finished, all) episodes of this process.
        """
        students = player is None
        if player is None:
            self.engine.sync(self.student)
            player = self.player(self.eval_sampling)
        indices, of_task = self._data.eval_indices(task), self._data.tasks[task]
        played = together(lambda: evaluate(of_task, player, indices=indices, seed=self.seed, on_progress=on_progress))
        if students:
            self.engine.rest()
        rate = SuccessRate().to(self.device)
        rate.update(torch.tensor([trajectory.reward for trajectory in played], device=self.device))
        score = {name: value.item() for name, value in rate.compute().items()}
        return score | {"n": int(score["n"])}

    def player(self, sampling: Sampling) -> Player:
        """The student as a writer of answers, with the weights of the last `engine.sync`."""
        return Player(engine=self.engine, tokenizer=self.tokenizer, turn_end=self.turn_end, sampling=sampling)

    # ---- the rest ---------------------------------------------------------------------------------------------------

    def _log_step(
        self,
        task: str,
        trajectories: list[Trajectory],
        mask: LossMask,
        support: Support,
        totals: StepTotals,
        gradient_norm: float,
        rate: float,
        seconds: dict[str, float],
    ) -> dict[str, float]:
        """Log `task/group/name` numbers, each a mean over all processes."""
        turns = [turn for trajectory in trajectories for turn in trajectory.turns]
        tokens = sum(len(turn.completion.ids) for turn in turns)
        turn_end, lost = support.turn_end[support.comparable].exp(), support.lost[support.comparable]
        sums: dict[str, tuple[float, float]] = {
            "train/reward": (sum(t.reward for t in trajectories), len(trajectories)),
            "train/turns": (len(turns), len(trajectories)),
            "train/outgrown": (sum(t.outgrown for t in trajectories), len(trajectories)),
            "train/invalid_actions": (sum(t.invalid_actions for t in trajectories), len(turns)),
            **{
                f"train/invalid/{kind}": (sum(t.invalid_kinds.get(kind, 0) for t in trajectories), len(turns))
                for kind in self._data.tasks[task].invalid_kinds
            },
            "train/truncated": (sum(turn.completion.truncated for turn in turns), len(turns)),
            "train/response_tokens": (tokens, len(turns)),
            "train/loss": (totals.loss, 1 / self.trainer.world_size),
            **{f"train/{name}": total for name, total in totals.metrics.items()},
            "train/lost_mass": (float(lost.sum()), len(lost)),
            "train/teacher_turn_end": (float(turn_end.sum()), len(turn_end)),
            "mask/kept": (totals.kept, tokens),
            "mask/lost": (int((~support.comparable).sum()), tokens),
            **{f"mask/{reason.lower()}": (count, tokens) for reason, count in mask.reasons.items()},
            **{f"seconds/{name}": (value, 1) for name, value in seconds.items()},
        }
        metrics = {f"{task}/{name}": value for name, value in global_means(sums, self._total).items()}
        metrics[f"{task}/train/gradient_norm"] = gradient_norm
        largest = self._over_processes(torch.tensor(totals.largest_sampler_gap), "max")
        metrics[f"{task}/train/sampler_gap_max"] = float(largest)
        self._watch_sampler(metrics.get(f"{task}/train/{SAMPLER_GAP}", 0.0))
        if (retries := self._new_retries()) is not None:
            metrics[f"{task}/train/server_retries"] = retries
        metrics["optimizer/lr"] = rate
        self.log_dict(metrics, batch_size=1, logger=False)
        # Past Lightning's logging, which would repeat the other tasks' last values at this step.
        for logger in self.loggers:
            logger.log_metrics(metrics, self.trainer.global_step)
        return metrics

    def _new_retries(self) -> float | None:
        """How often all processes have sent servers a request again since the last step; None without servers."""
        if not self._fleets:
            return None
        before, self._retries = self._retries, sum(fleet.retries for fleet in self._fleets)
        return float(self._total(torch.tensor(float(self._retries - before))))

    def _watch_sampler(self, gap: float) -> None:
        """Warn once where what wrote the rollouts was not the student as it is."""
        if gap <= self.sampler_gap_bound or self._gap_told:
            return
        self._gap_told = True
        if self.trainer.is_global_zero:
            log.warning(
                "Rollouts were sampled with log-probs that differ from the student's by %.2g nats on average "
                "(model.sampler_gap_bound=%g): with old weights, cached prompts of old weights, another precision, or "
                "without the student's dropout. Told once; train/sampler_gap shows every step.",
                gap,
                self.sampler_gap_bound,
            )

    def save_student(self, folder: Path, card: str) -> None:
        """Write the student in transformers format, see `write_student`; all processes call it together.

        Args:
            folder: Where to.
            card: The text of its README.md.
        """
        weights = plain_state_dict(self.student)
        if self.trainer.is_global_zero:
            write_student(
                folder, self.student, weights, self.tokenizer, turn_end=self.turn_end, sampling=self.sampling, card=card
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Note what the run is, so that a checkpoint tells what it continues, and the random states of all processes.

        Frozen weights under adapters are left out, unless they are sharded: they are those of the base student.
        All processes call it together; a sharded checkpoint keeps what the first one adds.
        """
        checkpoint["student"] = self.student_name
        if self._keeps_adapters_only:
            checkpoint["state_dict"] = {n: w for n, w in checkpoint["state_dict"].items() if is_adapters(n)}
        checkpoint[resuming.NOTE] = {
            "seed": self.seed, "step": self._step_note, **resuming.trained(self), "optimizer": None
        }  # fmt: skip
        if "optimizer_states" in checkpoint:
            checkpoint[resuming.NOTE] |= self._optimizer_note
            checkpoint["optimizer_states"] = [self._named(state) for state in checkpoint["optimizer_states"]]
        checkpoint["skipped_steps"] = self._skipped
        checkpoint["random_states"] = gather(self._before_step or random_states(self.device))

    def _named(self, state: dict[str, Any]) -> dict[str, Any]:
        """Sharded weights' states come with names, or where one file is written with the numbers of all weights, in the
        first process only."""
        if self.device_mesh is None:
            return resuming.by_name(
                state, [name for group in self._optimizer_note["groups"] for name in group["params"]]
            )
        if any(isinstance(number, str) for group in state.get("param_groups", ()) for number in group["params"]):
            return state
        return resuming.by_name(state, [name for name, _ in self.named_parameters()]) if state else state

    def go_on_from(self, checkpoint: Mapping[str, Any], *, training: bool) -> None:
        """Tell what is gone on from, before anything is loaded: strategies that shard weights restore them before
        `on_load_checkpoint`, and Lightning reads the checkpoint only after all models.

        Args:
            checkpoint: All that is no tensor of model or optimiser.
            training: Whether more is done with it than measuring.

        Raises:
            ConfigurationError: The checkpoint is of another student, seed or version of this package.
        """
        if checkpoint.get("student", self.student_name) != self.student_name:
            raise ConfigurationError(
                f"The checkpoint is of the student '{checkpoint['student']}', not of '{self.student_name}': set "
                "model.student to that one, or start without --ckpt_path."
            )
        if resuming.NOTE not in checkpoint:
            raise ConfigurationError(
                "The checkpoint does not say what it trains; one of an earlier version of this package can be exported "
                f"only: {resuming.ANEW}."
            )
        if training and (seed := checkpoint[resuming.NOTE]["seed"]) != self.seed:
            raise ConfigurationError(
                f"The checkpoint is of a run with seed_everything={seed}, not {self.seed}: give that seed to go on, or "
                "another trainer.default_root_dir for a run of its own."
            )
        self._continued = checkpoint

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse to go on with another student; tell what another number of processes changes.

        Raises:
            ConfigurationError: See `go_on_from`; or other weights are trained.
        """
        training = self.trainer.state.fn == TrainerFn.FITTING
        self.go_on_from(checkpoint, training=training)
        resuming.check_trained(checkpoint[resuming.NOTE], self)
        if self._keeps_adapters_only:  # a sharded one has all weights
            checkpoint["state_dict"] = {n: w for n, w in checkpoint["state_dict"].items() if is_adapters(n)}
        if training:
            if self.device_mesh is None:
                self._restoring = checkpoint
            else:
                self._change(self.trainer.optimizers[0].param_groups, checkpoint)
            if other := resuming.told(checkpoint[resuming.NOTE].get("step", self._step_note), self._step_note):
                self.print(f"Going on with other settings of the step: {other}.")
        self._skipped = checkpoint.get("skipped_steps", 0)
        states: list[RandomStates] = checkpoint.get("random_states", [])
        if len(states) == self.trainer.world_size:
            self._restored = states[self.global_rank]
        elif states and training:
            self.print(
                f"Going on with {self.trainer.world_size} instead of {len(states)} processes: every step has the same "
                "problems and rollouts, dealt out anew, so results agree up to rounding; dropout draws other numbers."
            )

    @property
    def _step_note(self) -> dict[str, str]:
        return resuming.of_step(
            self.objective, self.teachers, mask=self.mask, reduction=self.reduction, sampling=self.sampling
        )

    @property
    def _keeps_adapters_only(self) -> bool:
        return self.lora is not None and self.device_mesh is None

    def _total(self, values: Tensor) -> Tensor:
        """Summed over all processes, which call it together."""
        return self._over_processes(values, "sum")

    def _over_processes(self, values: Tensor, operation: str) -> Tensor:
        if self.trainer.world_size == 1:
            return values
        return self.trainer.strategy.reduce(values.to(self.device), reduce_op=operation)

    @property
    def _data(self) -> AlternatingTasks:
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(data, AlternatingTasks)
        return data
