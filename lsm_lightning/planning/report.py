"""A plan for people, and one for programs."""

from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from lsm_lightning.planning.plan import GIB, USABLE, Plan, TaskPlan

SHOWN = 0.005
"""Smaller shares of a peak are left out."""


def show(plan: Plan, console: Console) -> None:
    """Print the tables and what follows from them."""
    first = plan.tasks[0].rehearsal
    machine = plan.machine
    spread = f", sharded over {machine.shards}" if machine.shards > 1 else ""
    console.print(
        f"{plan.student}: {first.parameters / 1e6:,.0f} million parameters, precision {machine.precision}, "
        f"{machine.processes} process{'es' if machine.processes > 1 else ''}{spread}; each has "
        f"{plan.device.memory / GIB:.1f} GiB ({plan.device.name})"
    )
    if first.quantised:
        console.print(
            f"{first.quantised / 1e6:,.0f} million of them are quantised: counted with their scales, without what the "
            "kernels of bitsandbytes need besides."
        )
    prompts = ", ".join(f"{of_task.lengths.prompt} tokens in {of_task.task}" for of_task in plan.tasks)
    console.print(
        f"Assumed, not looked at: prompts of {prompts} (--prompt_tokens sets it, up to what the student's context "
        "leaves), and every answer as long as its max_new_tokens."
    )
    for of_task in plan.tasks:
        console.print(_memory(of_task))
        console.print(_time(of_task, machine.processes))
    task, phase = plan.peak
    share = phase.peak / plan.device.memory
    console.print(
        f"Peak: {phase.peak / GIB:.2f} GiB in '{phase.name}' of {task}, {100 * share:.0f} % of the device; "
        f"{'it fits' if plan.fits else 'it does not fit'} ({100 * USABLE:.0f} % count as usable)."
    )
    if machine.gpu:
        when = "With the student in it" if machine.offloaded else "While it loads"
        console.print(f"{when}, a process takes {first.host / GIB:.1f} GiB of the machine's memory.")
    if machine.offloaded:
        console.print(
            f"Offloaded layers and the optimiser are counted at {plan.device.host_bandwidth / 1e9:.0f} GB/s to and in "
            "main memory; layers may well move while others compute."
        )
    if plan.served:
        console.print(f"Without {', '.join(plan.served)}: servers have devices, memory and time of their own.")
    for line in plan.advice:
        console.print(f"- {line}")


def as_dict(plan: Plan) -> dict[str, Any]:
    """The same as plain numbers: bytes, FLOPs and seconds of one process."""
    task, phase = plan.peak
    return {
        "student": plan.student,
        "device": asdict(plan.device),
        "machine": asdict(plan.machine),
        "tasks": {
            of_task.task: {
                "lengths": asdict(of_task.lengths),
                **asdict(of_task.rehearsal),
                "seconds": of_task.seconds,
                "tokens": of_task.tokens,
            }
            for of_task in plan.tasks
        },
        "peak": {"task": task, "phase": phase.name, "bytes": phase.peak},
        "fits": plan.fits,
        "advice": plan.advice,
    }


def _memory(of_task: TaskPlan) -> Table:
    rehearsal, lengths = of_task.rehearsal, of_task.lengths
    table = Table(
        title=f"{of_task.task}: peaks of one device ({lengths.episodes} episodes of up to {lengths.turns} turns, "
        f"{lengths.prompt} + {lengths.new} tokens)"
    )
    table.add_column("phase")
    table.add_column("GiB", justify="right")
    table.add_column("of these")
    highest = max(phase.peak for phase in rehearsal.phases)
    for phase in rehearsal.phases:
        kinds = sorted(phase.bytes.items(), key=lambda item: -item[1])
        where = ", ".join(f"{kind} {_gib(size)}" for kind, size in kinds if size >= SHOWN * phase.peak)
        table.add_row(phase.name, _gib(phase.peak), where, style="bold" if phase.peak == highest else None)
    table.caption = (
        f"Logits of the whole vocabulary, which are never made, would add {_gib(rehearsal.logits_never_made)} GiB to "
        "the update (float32, and their gradient)."
    )
    return table


def _gib(size: int) -> str:
    return f"{size / GIB:.2f}" if size >= GIB / 100 else f"{size / GIB:.4f}"


def _time(of_task: TaskPlan, processes: int) -> Table:
    flops = {part: value for phase in of_task.rehearsal.phases for part, value in phase.flops.items()}
    table = Table(title=f"{of_task.task}: a step in which every answer and episode is as long as can be")
    for column in ("", "TFLOP", "seconds"):
        table.add_column(column, justify="right" if column else "left")
    for part, seconds in of_task.seconds.items():
        table.add_row(part, f"{flops[part] / 1e12:,.2f}" if part in flops else "", f"{seconds:,.2f}")
    table.add_section()
    whole = sum(of_task.seconds.values())
    table.add_row("all", f"{sum(flops.values()) / 1e12:,.2f}", f"{whole:,.2f}")
    table.caption = f"{processes * of_task.tokens / whole:,.0f} response tokens a second over all processes."
    return table
