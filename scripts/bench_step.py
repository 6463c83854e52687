"""Where a step's time goes: the phases of one step of each task of configs/quickstart.yaml, on the embedded models.

    python scripts/bench_step.py            # half a minute on one core; writes runs/bench_step.json

The output head and the rollouts have benches of their own, `bench_head.py` and `bench_rollout.py`.
Compare inside a table, not across machines.
"""

import argparse
import json
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from lsm_lightning.masks import loss_mask
from lsm_lightning.objectives import LocalSupportMatching
from lsm_lightning.objectives.head import OutputHead
from lsm_lightning.pretrained import load_model, load_tokenizer, turn_end_ids
from lsm_lightning.reductions import position_weights
from lsm_lightning.rollout import LocalEngine, Sampling
from lsm_lightning.rollout.collect import Player, collect
from lsm_lightning.tasks.alfworld import AlfworldGames
from lsm_lightning.tasks.base import Task
from lsm_lightning.tasks.math import AdditionProblems
from lsm_lightning.teacher import LocalTeacher
from lsm_lightning.update import accumulate_gradients, micro_batches

K = 32


def bench_phases() -> list[dict[str, Any]]:
    """Seconds of each phase of a step, by task."""
    student, tokenizer = load_model("embedded:student", "float32"), load_tokenizer("embedded:student")
    player = Player(
        engine=LocalEngine(), tokenizer=tokenizer, turn_end=turn_end_ids(student, tokenizer), sampling=Sampling()
    )
    objective = LocalSupportMatching(k=K)
    rows = []
    tasks: dict[str, tuple[Task, int, int]] = {
        "math": (AdditionProblems(), 32, 1),
        "alfworld": (AlfworldGames(), 4, 4),
    }
    for name, (task, prompts, samples) in tasks.items():
        task.setup()
        teacher = LocalTeacher(f"embedded:{name}-teacher")
        vocabulary = OutputHead.of(student).weight.shape[0]
        teacher.setup(tokenizer, vocabulary=vocabulary, respell=True, tokens=K, device=torch.device("cpu"))
        for step in range(2):  # the first one warms up
            clock = [time.perf_counter()]
            player.engine.sync(student)
            episodes = [
                ((step, i, j), task.episode("train", step * prompts + i))
                for i in range(prompts)
                for j in range(samples)
            ]
            turns = [
                turn
                for trajectory in collect(episodes, player, max_new_tokens=task.max_new_tokens)
                for turn in trajectory.turns
            ]
            clock.append(time.perf_counter())
            lengths = torch.tensor([len(turn.completion.ids) for turn in turns])
            support = teacher.score(turns, torch.zeros((int(lengths.sum()), 0), dtype=torch.long))
            clock.append(time.perf_counter())
            keep = loss_mask(teacher.pair, turns, "repair").keep & support.comparable
            clock.append(time.perf_counter())
            turn = torch.arange(len(turns)).repeat_interleave(lengths)
            accumulate_gradients(
                student,
                objective,
                turns,
                support,
                position_weights("token_mean", keep, turn=turn, task=torch.zeros_like(turn), tasks=1),
                groups=micro_batches(turns, 8192),
                backward=lambda loss: loss.backward(),
            )
            clock.append(time.perf_counter())
        spent = [after - before for before, after in pairwise(clock)]
        names = ("rollout", "teacher", "mask", "update")
        rows.append(
            {"task": name, "turns": len(turns), "tokens": sum(len(turn.completion.ids) for turn in turns)}
            | dict(zip(names, spent, strict=True))
        )
    return rows


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows of one shape as a table."""
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else f"{value}" for value in row.values()))
    Console().print(table)


def main() -> None:
    """Measure, print, write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_step.json"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    title, rows = "One step of the quickstart, seconds by phase", bench_phases()
    show(title, rows)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"threads": arguments.threads, title: rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
