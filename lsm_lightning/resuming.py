"""Going on from a checkpoint: what a run notes of itself in it, and what of that the next one may change."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.objectives import Objective
from lsm_lightning.student import is_adapters
from lsm_lightning.teacher import Teacher

NOTE = "run"
"""Where a checkpoint keeps what is noted here."""
ANEW = "start without --ckpt_path; to start from its weights, export it and set model.student to that folder"
"""What helps where a checkpoint cannot be gone on from."""

Note = Mapping[str, Any]
"""Plain values, which any process can read without running code of the checkpoint."""


def trained(module: nn.Module) -> dict[str, Any]:
    """What is trained, as a note: shapes by name, and the factors of adapters, which are no weights."""
    return {
        "trained": {name: tuple(p.shape) for name, p in module.named_parameters() if p.requires_grad},
        "scaling": {name: dict(m.scaling) for name, m in module.named_modules() if isinstance(m, LoraLayer)},
    }


def check_trained(note: Note, module: nn.Module) -> None:
    """Refuse to go on where other weights are trained than before.

    Raises:
        ConfigurationError: Their names, their shapes or the factors of adapters differ.
    """
    now = trained(module)
    names, before = now["trained"].keys(), note["trained"].keys()
    if wrong := sorted(names ^ before):
        setting = "model.lora" if is_adapters(wrong[0]) or not names & before else "model.freeze"
        whose = "was trained by the checkpoint's run" if wrong[0] in before else "was not trained by the checkpoint's"
        raise ConfigurationError(f"The checkpoint and {setting} do not agree: {wrong[0]} {whose} run. {_same(setting)}")
    for name, shape in now["trained"].items():
        if shape != note["trained"][name]:
            setting = "model.lora.r" if is_adapters(name) else "model.student"
            raise ConfigurationError(
                f"The checkpoint and {setting} do not agree: {name} is {note['trained'][name]}, not {shape}. "
                f"{_same(setting)}"
            )
    for name, scaling in now["scaling"].items():
        if scaling != note["scaling"][name]:
            raise ConfigurationError(
                f"The checkpoint's adapters were trained with other factors: {name} has {note['scaling'][name]}, not "
                f"{scaling}. {_same('model.lora.lora_alpha')}"
            )


def of_step(objective: Objective, teachers: Mapping[str, Teacher], **settings: object) -> dict[str, str]:
    """What a step teaches with, by setting, as a note.

    Args:
        objective: As it was made.
        teachers: By task.
        settings: Others of the step.
    """
    note = {"model.objective": _described(objective)}
    note |= {
        f"model.teachers.{task}": str(getattr(of_task, "path", _kind(of_task))) for task, of_task in teachers.items()
    }
    return note | {f"model.{name}": str(value) for name, value in settings.items()}


def told(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """What of two notes differs, for people; empty where nothing does."""
    return ", ".join(
        f"{name} {now.get(name, 'none')} instead of {before.get(name, 'none')}"
        for name in {**before, **now}
        if before.get(name) != now.get(name)
    )


def of_optimizer(optimizer: Optimizer, module: nn.Module) -> dict[str, Any]:
    """An optimiser as it was configured, as a note; to be taken before a schedule changes it."""
    names = {parameter: name for name, parameter in module.named_parameters()}
    return {
        "optimizer": _kind(optimizer),
        "groups": [{**_plain(g), "params": [names[p] for p in g["params"]]} for g in optimizer.param_groups],
    }


def of_schedule(scheduler: Any) -> dict[str, Any]:
    """A fresh schedule as it was configured, as a note; what follows from the learning rate is left out."""
    if scheduler is None:
        return {"schedule": {}}
    state = {name: value for name, value in _plain(scheduler.state_dict()).items() if name[0] != "_"}
    state.pop("base_lrs", None)
    return {"schedule": {"class": _kind(scheduler), **state}}


@dataclass(frozen=True, kw_only=True, slots=True)
class Changes:
    """What the command line says otherwise than the run that wrote the checkpoint."""

    told: str
    """For people; empty where nothing has changed."""
    groups: list[dict[str, Any]]
    """What replaces settings of each group of parameters."""
    schedule: bool
    """Whether the schedule stands already where it belongs, and is not to be restored."""


def changes(note: Note, now: Note, optimizer: Optimizer, scheduler: Any, steps: int) -> Changes:
    """What has to be set anew once the optimiser is restored. A learning rate or schedule that was changed holds as if
    from the first step; the schedule is brought to the present one.

    Args:
        note: The checkpoint's.
        now: The same of this run.
        optimizer: As it was made.
        scheduler: As it was made, or None.
        steps: How many were done.

    Raises:
        ConfigurationError: The optimiser is another, or the schedule ends before.
    """
    if note["optimizer"] is None:
        raise ConfigurationError(
            f"The checkpoint holds weights only (checkpoint.save_weights_only), so training cannot go on: {ANEW}."
        )
    if note["optimizer"] != now["optimizer"]:
        raise ConfigurationError(
            f"The checkpoint holds the state of {note['optimizer']}, which model.optimizer {now['optimizer']} cannot "
            f"go on with: give the same optimiser, or {ANEW}."
        )
    differing = [
        {name: value for name, value in group.items() if value != before.get(name)}
        for group, before in zip(now["groups"], note["groups"], strict=False)
    ]
    regrouped = len(now["groups"]) != len(note["groups"]) or any("params" in group for group in differing)
    schedule = regrouped or note["schedule"] != now["schedule"] or any("lr" in group for group in differing)
    pairs = [(note["schedule"], now["schedule"]), *zip(note["groups"], now["groups"], strict=False)]
    told = {
        f"{name} {_shown(new.get(name))} instead of {_shown(old.get(name))}": None  # a set in order
        for old, new in pairs
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name) and name != "params"
    }
    if regrouped:
        told["other groups of parameters"] = None
    if schedule and scheduler is not None and not isinstance(scheduler, ReduceLROnPlateau):
        _advance(scheduler, steps)
    return Changes(
        told=", ".join(told),
        groups=[_plain(group) for group in optimizer.param_groups] if schedule else differing,
        schedule=schedule,
    )


def by_name(state: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """An optimiser's state with names for the numbers of parameters; every name has one, be it empty.

    Numbers depend on what else is trained and on how many processes it is spread over.

    Args:
        state: Of `Optimizer.state_dict`.
        names: Of its parameters, by number.
    """
    groups = [{**group, "params": [names[number] for number in group["params"]]} for group in state["param_groups"]]
    used = [number for group in state["param_groups"] for number in group["params"]]
    return {"state": {names[number]: state["state"].get(number, {}) for number in used}, "param_groups": groups}


def by_number(state: dict[str, Any], groups: list[list[str]]) -> dict[str, Any]:
    """The reverse of `by_name`.

    Args:
        state: With names; a sharded checkpoint keeps no empty ones.
        groups: The names in each group of the optimiser that is to be restored, in order.
    """
    numbers = _numbers(groups)
    saved = {name: group for group in state["param_groups"] for name in group["params"]}
    return {
        "state": {numbers[name]: value for name, value in state.get("state", {}).items() if value},
        "param_groups": [{**saved[group[0]], "params": [numbers[name] for name in group]} for group in groups],
    }


def _numbers(groups: list[list[str]]) -> dict[str, int]:
    return {name: number for number, name in enumerate(name for group in groups for name in group)}


def _advance(scheduler: LRScheduler, steps: int) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")  # the steps were done before
        try:
            for _ in range(steps):
                scheduler.step()
        except ValueError as error:
            raise ConfigurationError(f"model.lr_scheduler cannot reach step {steps}: {error}") from error


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _described(thing: object) -> str:
    settings = ", ".join(f"{name}={_shown(value)}" for name, value in _plain(vars(thing)).items())
    return f"{type(thing).__name__}({settings})"


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else "none" if value is None else str(value)


def _kind(thing: object) -> str:
    return f"{type(thing).__module__}.{type(thing).__qualname__}"


def _same(setting: str) -> str:
    return f"Give {setting} as it was, or {ANEW}."
