"""Where a step's time goes, and what the two shortcuts of a step save, as ratios measured side by side in one run.

    python scripts/bench_step.py            # about a minute on one core; writes runs/bench_step.json

1. The phases of one step of each task of configs/quickstart.yaml, on the embedded models.
2. The head: forward and backward of K=32 logits a position against log-softmax over the whole vocabulary, at the
   sizes of a 135 M model (d=576, V=49,152).
3. Rollouts: `LocalEngine` against `model.generate` of transformers, same student, prompts and sampling.

Seconds are the best of several runs; compare inside a table, not across machines.
"""

import argparse
import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.nn.functional import linear

from lsm_lightning.masks import loss_mask
from lsm_lightning.objectives import LocalSupportMatching
from lsm_lightning.objectives.functional import support_divergence
from lsm_lightning.objectives.head import OutputHead, gather_logits
from lsm_lightning.pretrained import load_model, load_tokenizer, render, turn_end_ids
from lsm_lightning.rollout import LocalEngine, Sampling
from lsm_lightning.rollout.base import Request
from lsm_lightning.rollout.collect import Player, collect
from lsm_lightning.tasks.alfworld import AlfworldGames
from lsm_lightning.tasks.base import Task
from lsm_lightning.tasks.math import AdditionProblems
from lsm_lightning.teacher import LocalTeacher
from lsm_lightning.update import accumulate_gradients, micro_batches

K = 32


def best(run: Callable[[], Any], times: int = 3) -> float:
    """Seconds of the fastest of several runs, after one to warm up."""
    run()
    seconds = []
    for _ in range(times):
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


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
        teacher.setup(tokenizer, OutputHead.of(student).weight.shape[0], torch.device("cpu"))
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
            support = teacher.score(turns, K)
            clock.append(time.perf_counter())
            mask = loss_mask(teacher.pair, turns, "tags")
            clock.append(time.perf_counter())
            accumulate_gradients(
                student, objective, turns, support, mask.keep, groups=micro_batches(turns, 8192),
                scale=1 / int(mask.keep.sum()), backward=lambda loss: loss.backward(),
            )  # fmt: skip
            clock.append(time.perf_counter())
        spent = [after - before for before, after in pairwise(clock)]
        names = ("rollout", "teacher", "mask", "update")
        rows.append(
            {"task": name, "turns": len(turns), "tokens": sum(len(turn.completion.ids) for turn in turns)}
            | dict(zip(names, spent, strict=True))
        )
    return rows


def bench_head() -> list[dict[str, Any]]:
    """Forward and backward of the loss from hidden states, K rows against all rows."""
    return [_bench_head(positions) for positions in (512, 2048)]  # one chunk of positions, and several


def _bench_head(positions: int, width: int = 576, vocabulary: int = 49_152) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(positions, width, generator=generator, requires_grad=True)
    weight = torch.randn(vocabulary, width, generator=generator).div_(width**0.5).requires_grad_()
    ids = torch.randint(vocabulary, (positions, K), generator=generator)
    teacher = torch.randn(positions, K, generator=generator)

    def k_rows() -> float:
        return _backward(support_divergence(gather_logits(hidden, weight, ids), teacher).sum(), hidden, weight)

    def all_rows() -> float:
        log_probs = linear(hidden, weight).log_softmax(-1)
        return _backward(support_divergence(log_probs.gather(-1, ids), teacher).sum(), hidden, weight)

    relative = abs(k_rows() - all_rows()) / abs(all_rows())
    seconds = {"K rows": best(k_rows), "all logits": best(all_rows)}
    faster = seconds["all logits"] / seconds["K rows"]
    return {"positions": positions, **seconds, "times faster": faster, "loss differs by": relative}


def _backward(loss: torch.Tensor, *leaves: torch.Tensor) -> float:
    for leaf in leaves:
        leaf.grad = None
    loss.backward()  # type: ignore[no-untyped-call]
    return loss.item()


def bench_rollout(prompts: int = 64, samples: int = 4) -> list[dict[str, Any]]:
    """Tokens a second of math answers."""
    model, tokenizer = load_model("embedded:student", "float32"), load_tokenizer("embedded:student")
    turn_end, task = turn_end_ids(model, tokenizer), AdditionProblems()
    messages = [list(task.episode("train", index).messages()) for index in range(prompts) for _ in range(samples)]
    ids = render(tokenizer, messages)
    engine, written = LocalEngine.around(model), {}

    def ours() -> None:
        requests = [Request(ids=prompt, seed=seed) for seed, prompt in enumerate(ids)]
        done = engine.generate(requests, Sampling(), max_new_tokens=64, turn_end=turn_end)
        written["ours"] = sum(len(completion.ids) for completion in done)

    def theirs() -> None:
        batch = tokenizer.pad({"input_ids": ids}, padding_side="left", return_tensors="pt")
        output = model.generate(
            **batch, max_new_tokens=64, do_sample=True, top_p=0.9, top_k=0, pad_token_id=tokenizer.pad_token_id
        )
        written["theirs"] = int((output[:, batch["input_ids"].shape[1] :] != tokenizer.pad_token_id).sum())

    seconds = {"ours": best(ours), "theirs": best(theirs)}
    names = {"ours": "LocalEngine", "theirs": "model.generate"}
    return [{"engine": names[key], "tokens/s": written[key] / seconds[key]} for key in names]


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows of one shape as a table."""
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{value:.3g}" if isinstance(value, float) else f"{value}" for value in row.values()))
    Console().print(table)


def main() -> None:
    """Run the three measurements, print them, write them down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_step.json"))
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    results: dict[str, Any] = {"threads": arguments.threads}
    for title, run in {
        "One step of the quickstart, seconds by phase": bench_phases,
        "Loss from hidden states, forward and backward, seconds (d=576, V=49,152, K=32)": bench_head,
        "Rollouts of 64 prompts × 4 samples, embedded student": bench_rollout,
    }.items():
        results[title] = run()
        show(title, results[title])
    rollout = list(results.values())[-1]
    print(f"LocalEngine writes {rollout[0]['tokens/s'] / rollout[1]['tokens/s']:.1f} times as fast as model.generate.")
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
