"""Optimizer and learning rate schedule of a student, known to work before training begins."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from lsm_lightning.errors import ConfigurationError

MakeOptimizer = Callable[[Iterable[Any]], Optimizer]
MakeSchedule = Callable[[Optimizer], LRScheduler]


def make_optimizer(make: MakeOptimizer, model: nn.Module, no_decay: Sequence[str] = ()) -> Optimizer:
    """The optimizer over what is trained of a model.

    Args:
        make: Called with parameters, or groups of them.
        model: Whose parameters with `requires_grad` are trained.
        no_decay: Shell patterns of names of parameters that form a second group, without weight decay.

    Raises:
        ConfigurationError: The optimizer refuses its settings or these parameters, or a pattern matches none.
    """
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for pattern in no_decay:
        if not any(fnmatchcase(name, pattern) for name in trained):
            raise ConfigurationError(
                f"model.no_decay: no trained weight of the student is called like '{pattern}'. There are "
                f"{', '.join([*trained][:3])}, ..."
            )
    free = {name for name in trained if any(fnmatchcase(name, pattern) for pattern in no_decay)}
    with _told("model.optimizer"):
        if not free:
            return make(trained.values())
        decayed = [trained[name] for name in trained if name not in free]
        spared = {"params": [trained[name] for name in trained if name in free], "weight_decay": 0.0}
        return make([{"params": decayed}, spared] if decayed else [spared])


def make_schedule(make: MakeSchedule, optimizer: Optimizer, *, max_steps: int) -> LRScheduler:
    """The schedule of its learning rates.

    Args:
        make: Called with the optimizer.
        optimizer: Whose.
        max_steps: Of the run; -1: no end.

    Raises:
        ConfigurationError: The schedule refuses its settings, or cannot be followed to the end of the run.
    """
    with _told("model.lr_scheduler"):
        schedule = make(optimizer)
    if isinstance(schedule, ReduceLROnPlateau):
        raise ConfigurationError(
            f"model.lr_scheduler: {type(schedule).__name__} waits for a number that falls, and what a step measures is "
            "that of its own rollouts and task: choose one that counts steps, such as "
            "lsm_lightning.learning_rates.WarmupCosine."
        )
    if isinstance(schedule, OneCycleLR) and not 0 <= max_steps <= schedule.total_steps:
        raise ConfigurationError(
            f"model.lr_scheduler: OneCycleLR ends after total_steps={schedule.total_steps}, trainer.max_steps is "
            f"{max_steps}: make them equal."
        )
    return schedule


def check_step(
    make: MakeOptimizer, make_lr_scheduler: MakeSchedule | None, *, device: torch.device, max_steps: int
) -> None:
    """Make a step with a parameter that is thrown away, as training will: one gradient, and no loss to compute again.

    Raises:
        ConfigurationError: The optimizer or its schedule cannot.
    """
    parameter = nn.Parameter(torch.zeros(2, 2, device=device))
    parameter.grad = torch.zeros_like(parameter)
    with _told("model.optimizer"):
        optimizer = make([parameter])
    schedule = None if make_lr_scheduler is None else make_schedule(make_lr_scheduler, optimizer, max_steps=max_steps)
    with _told(
        f"model.optimizer: {type(optimizer).__name__} cannot make a step here, choose other settings or another"
    ):
        optimizer.step(lambda: None)  # type: ignore[arg-type,return-value]  # as Lightning calls it
    if schedule is not None:
        with _told(f"model.lr_scheduler: {type(schedule).__name__} cannot make a step, choose other settings"):
            schedule.step()


@contextmanager
def _told(setting: str) -> Iterator[None]:
    """As a setting that is wrong, whatever a class of torch or of another package makes of it."""
    try:
        yield
    except (ValueError, TypeError, KeyError, ArithmeticError, AssertionError, RuntimeError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        raise ConfigurationError(f"{setting}: {text}") from error
