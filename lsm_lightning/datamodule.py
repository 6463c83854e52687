"""Batches of one task each, in the schedule's order; the position is part of the checkpoint."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from jsonargparse import lazy_instance  # type: ignore[attr-defined]
from lightning.pytorch import LightningDataModule
from torch.utils.data import DataLoader, Dataset, Sampler

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.schedules import Alternating, Schedule
from lsm_lightning.tasks.base import Task
from lsm_lightning.types import StepBatch

PROBLEMS_PER_SEED = 10**9
"""Runs of different seeds draw from different stretches of a task's train problems."""


class AlternatingTasks(LightningDataModule):
    """Hands out, step by step, which problems of which task are played.

    Args:
        tasks: Name → task. The names appear in metrics and connect each task with its teacher.
        schedule: Which step belongs to which task.
        prompts_per_step: Problems a step, over all processes: one number, or one for each task.
        samples_per_prompt: Episodes that play each problem: one number, or one for each task.
        eval_problems: Play only so many test problems of each task; all of them if not given.
        seed: Of the order of the train problems; the command line links it to `seed_everything`.
    """

    def __init__(
        self,
        tasks: dict[str, Task],
        schedule: Schedule = lazy_instance(Alternating),
        prompts_per_step: int | dict[str, int] = 16,
        samples_per_prompt: int | dict[str, int] = 8,
        eval_problems: int | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if not tasks:
            raise ConfigurationError("data.tasks is empty: name at least one task.")
        if eval_problems is not None and eval_problems < 1:
            raise ConfigurationError(f"data.eval_problems={eval_problems}: use at least 1, or null for all.")
        self.tasks = tasks
        self.schedule = schedule
        self.prompts_per_step = _per_task("prompts_per_step", prompts_per_step, tasks)
        self.samples_per_prompt = _per_task("samples_per_prompt", samples_per_prompt, tasks)
        self.eval_problems = eval_problems
        self.seed = seed
        self.step = 0
        """The next step to be trained; everything else about the position follows from it and the settings."""

    def setup(self, stage: str) -> None:
        """Let every task check what it needs, before the first step.

        Raises:
            ConfigurationError: A task lacks something or has no problems; the schedule names another task; there are
                fewer prompts than processes; the run has no end.
        """
        for name, task in self.tasks.items():
            try:
                task.setup()
                if stage == "fit":
                    task.episode("train", self.seed * PROBLEMS_PER_SEED).close()
            except ConfigurationError as error:
                raise ConfigurationError(f"Task '{name}': {error}") from error
            if task.test_size() == 0:
                raise ConfigurationError(f"Task '{name}' has no test problems: give it some, or remove the task.")
            if self.prompts_per_step[name] < self._world_size:
                raise ConfigurationError(
                    f"prompts_per_step={self.prompts_per_step[name]} of task '{name}' is less than the "
                    f"{self._world_size} processes: raise it, so that each has something to play."
                )
        self.schedule.check(list(self.tasks))
        if stage == "fit" and self.trainer is not None and self.trainer.max_steps < 1:
            raise ConfigurationError("A run needs an end: set trainer.max_steps to the number of training steps.")

    def batch(self, step: int) -> StepBatch:
        """This process's share of a step: a pure function of the settings and the step."""
        names = list(self.tasks)
        name = self.schedule.task_of(step, names)
        earlier = sum(self.schedule.task_of(before, names) == name for before in range(step))
        size = self.prompts_per_step[name]
        first = self.seed * PROBLEMS_PER_SEED + earlier * size
        return StepBatch(
            task=name,
            step=step,
            indices=tuple(range(first + self._rank, first + size, self._world_size)),
            samples_per_prompt=self.samples_per_prompt[name],
        )

    def eval_indices(self, name: str) -> range:
        """This process's share of a task's test problems."""
        size = self.tasks[name].test_size()
        if self.eval_problems is not None:
            size = min(size, self.eval_problems)
        return range(self._rank, size, self._world_size)

    def advance(self, batch: StepBatch) -> None:
        """Note that a step is done, so that a checkpoint from here on resumes after it."""
        self.step = batch.step + 1

    def train_dataloader(self) -> "DataLoader[StepBatch]":
        """Batches from the current position on."""
        assert self.trainer is not None
        sampler = _FromHere(self, length=self.trainer.max_steps)
        return DataLoader(_Steps(self), sampler=sampler, batch_size=None, generator=_unused())

    def val_dataloader(self) -> "DataLoader[StepBatch]":
        """The test split, one batch a task."""
        batches = [
            StepBatch(task=name, step=0, indices=tuple(self.eval_indices(name)), samples_per_prompt=1)
            for name in self.tasks
        ]
        return DataLoader(batches, batch_size=None, generator=_unused())  # type: ignore[arg-type]

    def predict_dataloader(self) -> "DataLoader[StepBatch]":
        """As for evaluation; a probe, which is a prediction of nothing, looks at the tasks and not at batches."""
        return self.val_dataloader()

    def transfer_batch_to_device(self, batch: StepBatch, device: torch.device, dataloader_idx: int) -> StepBatch:
        """A step's plan holds no tensors."""
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The position in the schedule."""
        return {"step": self.step, "tasks": list(self.tasks)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on where the checkpoint stood.

        Raises:
            ConfigurationError: It was training on other tasks.
        """
        if state_dict["tasks"] != list(self.tasks):
            raise ConfigurationError(
                f"The checkpoint is of a run on {', '.join(state_dict['tasks'])}, not on {', '.join(self.tasks)}: "
                "give the same tasks in the same order, or start without --ckpt_path."
            )
        self.step = state_dict["step"]

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer is not None else 0

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer is not None else 1


class _Steps(Dataset[StepBatch]):
    """Batches of the schedule by step."""

    def __init__(self, data: AlternatingTasks) -> None:
        self.data = data

    def __getitem__(self, step: int) -> StepBatch:
        return self.data.batch(step)


class _FromHere(Sampler[int]):
    """Steps from the current position on. The length is the whole run's: Lightning counts from its beginning, and
    reads ahead where there is no length."""

    def __init__(self, data: AlternatingTasks, length: int) -> None:
        self.data = data
        self.length = length

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.data.step, max(self.length, self.data.step + 1)))

    def __len__(self) -> int:
        return self.length


def _unused() -> torch.Generator:
    """A loader draws a number whenever it starts; not from the global generator, which a resumed run must find as an
    undisturbed one does."""
    return torch.Generator()


def _per_task(name: str, value: int | dict[str, int], tasks: Mapping[str, Task]) -> dict[str, int]:
    values = dict.fromkeys(tasks, value) if isinstance(value, int) else value
    if unknown := sorted(values.keys() ^ tasks.keys()):
        raise ConfigurationError(
            f"data.{name} and data.tasks disagree about {', '.join(unknown)}: give one number for all, or one each."
        )
    if wrong := {task: number for task, number in values.items() if number < 1}:
        raise ConfigurationError(f"data.{name}: {wrong} must be at least 1.")
    return values
