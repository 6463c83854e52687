"""Where memory and time of a run will go, and which settings to change where it does not fit."""

import copy
import math
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, SingleDeviceStrategy
from transformers import AutoConfig

from lsm_lightning.datamodule import AlternatingTasks
from lsm_lightning.errors import ConfigurationError
from lsm_lightning.module import OnPolicyDistillation
from lsm_lightning.optimizers import check_step
from lsm_lightning.planning.hardware import Device, cpu, gpu
from lsm_lightning.planning.step import STUDENT, Lengths, Machine, Phase, Rehearsal, optimizer_of, rehearse, served
from lsm_lightning.pretrained import check_model, context_of, locate
from lsm_lightning.rollout import LocalEngine, VLLMEngine
from lsm_lightning.sharding import OffloadedModelParallelStrategy, shards_of
from lsm_lightning.tasks.base import Task
from lsm_lightning.teacher import LocalTeacher

USABLE = 0.9
"""Of a device's memory: the rest is for the GPU's context, for what an allocator loses, and for a plan's errors."""
GIB = 2**30
VARIABLE = {
    "rollout": ("KV cache", "decoding logits", "rollout's activations", "vLLM server's cache"),
    "evaluation": ("KV cache", "decoding logits", "rollout's activations"),
    "teacher": ("teacher's activations",),
    "update": ("activations",),
}
"""What grows with the rows of a phase's batches, or with what a server may take."""


@dataclass(frozen=True, kw_only=True)
class TaskPlan:
    """A step of one task on one process."""

    task: str
    lengths: Lengths
    rehearsal: Rehearsal
    seconds: dict[str, float]
    """By part."""

    @property
    def tokens(self) -> int:
        """Response tokens of a step and process."""
        return self.lengths.episodes * self.lengths.turns * self.lengths.new


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A run's plan; made by `plan`."""

    student: str
    device: Device
    machine: Machine
    tasks: list[TaskPlan]
    advice: list[str]
    """What to change so that it fits; empty where it does."""
    served: list[str]
    """What is done elsewhere, and is left out."""

    @property
    def peak(self) -> tuple[str, Phase]:
        """The task and phase that need most memory."""
        phases = [(of_task.task, phase) for of_task in self.tasks for phase in of_task.rehearsal.phases]
        return max(phases, key=lambda pair: pair[1].peak)

    @property
    def fits(self) -> bool:
        """Whether the peak stays within the usable part of the device's memory."""
        return self.peak[1].peak <= USABLE * self.device.memory


def plan(
    module: OnPolicyDistillation,
    data: AlternatingTasks,
    trainer: Mapping[str, Any],
    *,
    evaluate: bool = True,
    prompt_tokens: int = 512,
    device_memory: float | None = None,
    tflops: float | None = None,
    bandwidth: float | None = None,
) -> Plan:
    """Plan a run.

    Args:
        module: As the command line builds it.
        data: Likewise.
        trainer: The trainer's settings: accelerator, devices, num_nodes, strategy, precision.
        evaluate: Whether teachers play the test split before training.
        prompt_tokens: Of the longest prompt.
        device_memory: GiB of one device.
        tflops: That one device achieves, in 10^12 FLOPs a second.
        bandwidth: Bytes that one device reads a second, in GB.

    Raises:
        ConfigurationError: A model cannot be read, or an answer does not fit into the student's context.
    """
    machine = machine_of(trainer)
    check_step(
        optimizer_of(module, machine), module.lr_scheduler_of, device=torch.device("cpu"),
        max_steps=trainer.get("max_steps", -1),
    )  # fmt: skip
    half = machine.precision.startswith(("bf16", "16"))
    rates = {
        "flops": None if tflops is None else tflops * 1e12,
        "bandwidth": None if bandwidth is None else bandwidth * 1e9,
    }
    on_cpu = partial(cpu, _devices(trainer, gpu=False))
    device = (gpu if machine.gpu else on_cpu)(half=half, **rates)
    if device_memory is not None:
        device = replace(device, memory=device_memory * GIB)
    tasks = []
    for name, task in data.tasks.items():
        lengths = _lengths(module, data, name, task, machine, prompt_tokens, evaluate=evaluate)
        rehearsal = rehearse(module, lengths, machine, task=name, memory=device.memory)
        seconds = _seconds(rehearsal.phases, device)
        tasks.append(TaskPlan(task=name, lengths=lengths, rehearsal=rehearsal, seconds=seconds))
    advice = _advice(module, tasks, machine, device.memory)
    return Plan(
        student=module.student_name, device=device, machine=machine, tasks=tasks, advice=advice, served=served(module)
    )


def machine_of(trainer: Mapping[str, Any]) -> Machine:
    """What the trainer's settings come to; nothing is asked of the hardware but whether there is a GPU.

    Raises:
        ConfigurationError: A run would refuse them, or a plan does not know them.
    """
    if (asked := str(trainer.get("precision"))) in ("16", "16-mixed") or asked.startswith("transformer-engine"):
        raise ConfigurationError(f"trainer.precision={asked} is not trained in here: use bf16-mixed or 32-true.")
    accelerator = trainer.get("accelerator") or "auto"
    if accelerator not in ("auto", "cpu", "gpu", "cuda"):
        raise ConfigurationError(f"A plan knows trainer.accelerator=cpu and gpu, not {accelerator!r}: choose one.")
    on_gpu = accelerator in ("gpu", "cuda") or (accelerator == "auto" and torch.cuda.is_available())
    devices, nodes = _devices(trainer, gpu=on_gpu), int(trainer.get("num_nodes", 1))
    if nodes < 1:
        raise ConfigurationError(f"trainer.num_nodes={nodes}: use a positive number.")
    strategy, processes, shards = trainer.get("strategy") or "auto", devices * nodes, 1
    if isinstance(strategy, ModelParallelStrategy):
        shards = shards_of(strategy, nodes=nodes, devices=devices)
    elif isinstance(strategy, SingleDeviceStrategy) or strategy == "single_device":
        processes = 1
    elif not (isinstance(strategy, DDPStrategy) or str(strategy).startswith("ddp") or strategy == "auto"):
        raise ConfigurationError(
            f"A plan knows one process, DDP and ModelParallelStrategy, not trainer.strategy={strategy!r}: choose one."
        )
    precision = {None: "32-true", "32": "32-true", "bf16": "bf16-mixed", "16": "16-mixed", "64": "64-true"}
    chosen = trainer.get("precision")
    chosen = None if chosen is None else str(chosen)
    return Machine(
        processes=processes,
        shards=shards,
        offloaded=on_gpu and isinstance(strategy, OffloadedModelParallelStrategy),
        precision=precision.get(chosen, chosen or ""),
        gpu=on_gpu,
    )


def _devices(trainer: Mapping[str, Any], *, gpu: bool) -> int:
    """Of a node, counted as Lightning does.

    Raises:
        ConfigurationError: It would not take them.
    """
    devices = trainer.get("devices")
    if devices in (None, "auto"):
        return max(1, torch.cuda.device_count()) if gpu else 1
    text = ",".join(map(str, devices)) + "," if isinstance(devices, list) else str(devices)
    several = [number for number in text.split(",") if number.strip()]
    if gpu and text in ("-1", "-1,"):
        return max(1, torch.cuda.device_count())
    if gpu and "," in text and several and all(number.strip().isdigit() for number in several):
        return len(several)
    if not text.isdigit() or int(text) < 1:
        ways = "a number of GPUs, a list of them or -1" if gpu else "the number of processes, from 1 on"
        raise ConfigurationError(f"trainer.devices={devices}: give {ways}.")
    return int(text)


def _lengths(
    module: OnPolicyDistillation,
    data: AlternatingTasks,
    name: str,
    task: Task,
    machine: Machine,
    prompt_tokens: int,
    *,
    evaluate: bool,
) -> Lengths:
    check_model(module.student_name)
    context = context_of(AutoConfig.from_pretrained(locate(module.student_name)))
    prompt = prompt_tokens if context is None else min(prompt_tokens, context - task.max_new_tokens)
    if prompt < 1:
        raise ConfigurationError(
            f"max_new_tokens={task.max_new_tokens} of the task '{name}' leaves no room for a prompt in the student's "
            f"context of {context} tokens: lower it."
        )
    problems = 10**9  # files that are not there yet hold many
    with suppress(ConfigurationError):
        problems = task.test_size()
    if data.eval_problems is not None:
        problems = min(problems, data.eval_problems)
    samples = data.samples_per_prompt[name]
    return Lengths(
        prompt=prompt,
        new=task.max_new_tokens,
        episodes=math.ceil(data.prompts_per_step[name] / machine.processes) * samples,
        samples=samples,
        turns=task.max_turns,
        test_episodes=math.ceil(problems / machine.processes) if evaluate else 0,
    )


def _seconds(phases: list[Phase], device: Device) -> dict[str, float]:
    """FLOPs over what is achieved; decoding takes as long as reading weights and cache if that is longer.

    Moving offloaded layers is counted on its own, as if nothing were computed meanwhile.
    """
    seconds: dict[str, float] = {}
    for phase in phases:
        for part, flops in phase.flops.items():
            reading = phase.read / device.bandwidth if part == "decode" else 0.0
            seconds[part] = max(flops / device.flops, reading)
        if phase.moved:
            seconds["offloaded layers"] = phase.moved / device.host_bandwidth
        if phase.name == "optimiser":  # everything is read and written once
            here = sum(phase.bytes.get(kind, 0) for kind in STUDENT)
            seconds["optimiser"] = 2 * (here / device.bandwidth + phase.offloaded / device.host_bandwidth)
    return seconds


# ---- what to change -------------------------------------------------------------------------------------------------


def _advice(module: OnPolicyDistillation, tasks: list[TaskPlan], machine: Machine, memory: float) -> list[str]:
    """A sentence for each way out, for every phase that is too large."""
    lines: list[str] = []
    limit = USABLE * memory
    for of_task in tasks:
        for phase in of_task.rehearsal.phases:
            if phase.peak > limit:
                over = f"{phase.name} of {of_task.task} needs {(phase.peak - limit) / GIB:.2f} GiB more than is usable"
                lines += [f"{over}: {way}" for way in _ways(module, of_task, phase, machine, memory)]
    return lines


def _ways(
    module: OnPolicyDistillation, of_task: TaskPlan, phase: Phase, machine: Machine, memory: float
) -> Iterator[str]:
    limit = USABLE * memory
    if phase.name == "update" and not module.activation_checkpointing:
        patient = copy.copy(module)
        patient.activation_checkpointing = True
        phases = rehearse(patient, of_task.lengths, machine, task=of_task.task, memory=memory).phases
        peak = next(other.peak for other in phases if other.name == phase.name)
        yield f"model.activation_checkpointing=true makes it {peak / GIB:.2f} GiB"
    variable = sum(phase.bytes.get(kind, 0) for kind in VARIABLE.get(phase.name, ()))
    room = limit - (phase.peak - variable)
    if phase.name == "update":  # of which smaller ones have the gradients of those before them beside them
        gradients = of_task.rehearsal.phases[-1].bytes.get("gradients", 0)
        room -= max(0, gradients - phase.bytes.get("gradients", 0))
    if room > 0 and phase.name == "rollout" and isinstance(module.engine, VLLMEngine):
        of_server = sum(size for kind, size in phase.bytes.items() if kind.startswith("vLLM server"))
        share = (of_server - variable + room) / memory
        yield f"lower --gpu-memory-utilization of its server to {math.floor(share * 1000) / 1000:g}"
    elif room > 0:
        yield _smaller(module, of_task, phase.name, room / variable)
    else:
        yield from _lighter(module, phase, machine, limit)


def _smaller(module: OnPolicyDistillation, of_task: TaskPlan, phase: str, share: float) -> str:
    """A smaller batch, or where it holds one sequence already, a shorter one."""
    lengths, teacher, engine = of_task.lengths, module.teachers[of_task.task], module.engine
    of_teacher = f"model.teachers.{of_task.task}.init_args"
    setting, rows, unit = "model.micro_batch_tokens", lengths.rows(module.micro_batch_tokens), lengths.sequence
    if phase == "rollout":
        assert isinstance(engine, LocalEngine)
        setting, rows, unit = "model.engine.init_args.batch_size", min(engine.batch_size, lengths.episodes), 1
    elif phase != "update":
        assert isinstance(teacher, LocalTeacher)
        setting, rows, unit = {
            "evaluation": (f"{of_teacher}.batch_size", min(teacher.batch_size, lengths.test_episodes), 1),
            "teacher": (f"{of_teacher}.batch_tokens", lengths.rows(teacher.batch_tokens), lengths.sequence),
        }[phase]
    fitting = math.floor(rows * share)
    if fitting >= 1:
        return f"lower {setting} to {fitting * unit} (from {rows * unit})"
    shorter = math.floor(lengths.sequence * rows * share) - lengths.prompt
    if shorter < 1:
        return f"even one prompt of {lengths.prompt} tokens is too long; shorten it"
    return (
        f"one sequence alone is too long: lower {setting} to {unit} and data.tasks.{of_task.task}.init_args."
        f"max_new_tokens to {shorter} (from {lengths.new})"
    )


def _lighter(module: OnPolicyDistillation, phase: Phase, machine: Machine, limit: float) -> Iterator[str]:
    """Ways to make what stands in memory whatever the batches smaller, each with what it saves."""
    replica, student = phase.bytes.get("rollout replica", 0), sum(phase.bytes.get(kind, 0) for kind in STUDENT)
    if replica and isinstance(module.engine, LocalEngine) and module.engine.dtype not in ("bfloat16", "float16"):
        yield f"model.engine.init_args.dtype=bfloat16 saves up to {replica / 2 / GIB:.2f} GiB"
    for name, teacher in module.teachers.items():
        if isinstance(teacher, LocalTeacher) and teacher.dtype in ("auto", "float32"):
            yield f"model.teachers.{name}.init_args.dtype=bfloat16 halves that teacher if it is in float32"
    fixed = phase.peak - sum(phase.bytes.get(kind, 0) for kind in VARIABLE.get(phase.name, ()))
    if 0 < fixed - limit < student:
        shards = 2 ** math.ceil(math.log2(student * machine.shards / (student - fixed + limit)))
        yield f"ModelParallelStrategy over {shards} devices or more (now {machine.shards}) leaves room for batches"
    if machine.precision not in ("bf16-true", "16-true"):
        yield f"trainer.precision=bf16-true saves {student / 2 / GIB:.2f} GiB and costs accuracy of the updates"
    yield "a smaller student or teacher, or a device with more memory"
