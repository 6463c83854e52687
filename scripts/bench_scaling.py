"""How a step's cost grows: with processes, micro-batches, tokens and lengths, and what is spent outside of the models.

    python scripts/bench_scaling.py --quick   # under three minutes on two CPU cores
    python scripts/bench_scaling.py           # larger models, longer answers: about half an hour

1. One process against two (DDP, FSDP2), one thread each, on the same step: its problems are shared out.
2. Where the seconds of a step go: models (forward and backward passes, from the ids to the loss and back), environment
   (questions, grades, games), and everything else, which is ours; also for steps as in the quickstart, and the two of
   them together.
3. Micro-batch sizes: seconds and memory of the update; the result is the same.
4. Cost against tokens at one length: the exponent of a power law, 1 where cost is linear.
5. Cost a token against length at one number of tokens: a + b * length, where b is attention, which is quadratic in a
   sequence. The model is made on the spot, with random weights and a context of 8,192.

Writes runs/bench_scaling.json. Compare inside a table, not across machines. Other processes on the machine slow
everything down, most of all two processes on two cores: `busy` is how many cores they kept from ours (of two processes
the other is one of them), and `core s` the seconds that the first process's own core worked, which is what a machine of
one's own would take. Fits, and the ratios of 3 to 5, are made of the latter.
"""

import argparse
import json
import math
import os
import socket
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from bench_head import Memory, busy_elsewhere
from bench_step import show
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch import Tensor, multiprocessing
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from lsm_lightning.cli import TRAINER_DEFAULTS
from lsm_lightning.datamodule import AlternatingTasks
from lsm_lightning.module import Clock, OnPolicyDistillation
from lsm_lightning.objectives import LocalSupportMatching
from lsm_lightning.objectives.head import OutputHead
from lsm_lightning.pretrained import load_tokenizer, locate, turn_end_ids
from lsm_lightning.reductions import position_weights
from lsm_lightning.rollout import LocalEngine, Sampling
from lsm_lightning.rollout.base import Request
from lsm_lightning.tasks.alfworld import AlfworldGames
from lsm_lightning.tasks.alfworld.workers import WorkerPool
from lsm_lightning.tasks.base import Episode, Task
from lsm_lightning.tasks.math import AdditionProblems
from lsm_lightning.teacher import LocalTeacher
from lsm_lightning.types import Completion, Prompt, Support, Turn
from lsm_lightning.update import accumulate_gradients, micro_batches

K = 32
WARM_UP = 1
"""Steps that are not measured."""
PHASES = ("rollout", "support", "teacher", "mask", "update")
BETWEEN = "between"
"""The rest of a step: logging, and Lightning's loop."""


# ---- models made on the spot ----------------------------------------------------------------------------------------


def make_model(folder: Path, *, width: int, layers: int, context: int = 8192) -> Path:
    """A model like the embedded student in other sizes, with random weights, and its tokenizer."""
    heads = width // 32
    config = AutoConfig.from_pretrained(
        locate("embedded:student"), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=max(1, heads // 2), max_position_embeddings=context + 128,
    )  # fmt: skip
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(folder)
    load_tokenizer("embedded:student").save_pretrained(folder)
    return folder


def parameters_of(model: PreTrainedModel) -> str:
    """In millions."""
    return f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f} M"


QUICKSTART = "quickstart"
"""Steps of the size that configs/quickstart.yaml has."""

# ---- one process against two, and what is spent outside of the models -----------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """A run of some steps."""

    task: str
    student: str
    label: str
    strategy: str
    prompts: int
    steps: int
    samples: int = 2


class Stopwatch:
    """Seconds by (phase, kind); what is nested counts for the outermost kind only."""

    def __init__(self) -> None:
        self.seconds: dict[tuple[str, str], float] = defaultdict(float)
        self.phase = BETWEEN
        self._running = False

    def around(self, owner: Any, name: str, kind: str) -> None:
        """Measure every call of a method or function, for good."""
        right = getattr(owner, name)

        def timed(*arguments: Any, **options: Any) -> Any:
            if self._running:
                return right(*arguments, **options)
            self._running, started = True, time.perf_counter()
            try:
                return right(*arguments, **options)
            finally:
                self._running = False
                self.seconds[self.phase, kind] += time.perf_counter() - started

        setattr(owner, name, timed)

    @contextmanager
    def phases(self, clock: Clock, name: str) -> Iterator[None]:
        """Stands for the module's own clock."""
        self.phase, started = name, time.perf_counter()
        yield
        clock.seconds[name] = time.perf_counter() - started
        self.seconds[name, "all"] += clock.seconds[name]
        self.phase = BETWEEN

    def install(self) -> None:
        """Into the classes of the models, heads, loss, episodes, and the module."""
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(locate("embedded:student")))
        for kind in (type(model), type(model.base_model)):
            self.around(kind, "forward", "model")
        for name in ("logits", "all_logits", "log_normaliser"):
            self.around(OutputHead, name, "model")
        self.around(LocalSupportMatching, "__call__", "model")
        self.around(OnPolicyDistillation, "manual_backward", "model")
        self.around(LocalEngine, "sync", "replica")
        for episode in _subclasses(Episode):
            for name in ("messages", "step"):
                self.around(episode, name, "environment")
        for task in (AdditionProblems, AlfworldGames):
            self.around(task, "episode", "environment")
        self.around(WorkerPool, "scene", "environment")  # an episode that is asked whether it is over waits there
        Clock.phase = lambda clock, name: self.phases(clock, name)  # type: ignore[method-assign]


def _subclasses(kind: type) -> Iterator[type]:
    for child in kind.__subclasses__():
        yield child
        yield from _subclasses(child)


class Steps(Callback):
    """The stopwatch's numbers of every step, from the start of one to the start of the next."""

    def __init__(self, watch: Stopwatch) -> None:
        self.watch, self.steps, self.tokens = watch, [], 0.0
        self._started: tuple[float, float] | None = None

    def on_train_batch_start(self, *_: Any) -> None:
        """The last step is over."""
        self._close()
        self.watch.seconds.clear()
        self._started = time.perf_counter(), time.process_time()

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Note its size: response tokens over all processes."""
        per_turn, turns = (outputs[f"{batch.task}/train/{name}"] for name in ("response_tokens", "turns"))
        self.tokens = per_turn * turns * module._data.prompts_per_step[batch.task] * batch.samples_per_prompt

    def on_train_end(self, *_: Any) -> None:
        """The last one too."""
        self._close()

    def _close(self) -> None:
        if self._started is not None:
            step = {f"{phase}/{kind}": value for (phase, kind), value in self.watch.seconds.items()}
            clock, core = self._started
            step |= {"all": time.perf_counter() - clock, "core": time.process_time() - core}
            self.steps.append(step | {"tokens": self.tokens})


def run_case(case: Case, processes: int, watch: Stopwatch) -> dict[str, Any]:
    """Train some steps on this process's share; the numbers of the step that took the median time."""
    strategy: Strategy | str = "auto" if processes == 1 else "ddp"
    if case.strategy == "FSDP2":
        strategy = ModelParallelStrategy(data_parallel_size=processes, tensor_parallel_size=1)
    tasks: dict[str, Task] = {"math": AdditionProblems(), "alfworld": AlfworldGames()}
    module = OnPolicyDistillation(
        case.student,
        {case.task: LocalTeacher(f"embedded:{case.task}-teacher")},
        objective=LocalSupportMatching(k=K),
        engine=LocalEngine(),
        micro_batch_tokens=8192,
    )
    data = AlternatingTasks(
        {case.task: tasks[case.task]}, prompts_per_step=case.prompts, samples_per_prompt=case.samples
    )
    steps = Steps(watch)
    Trainer(
        accelerator="cpu", devices=processes, strategy=strategy, max_steps=WARM_UP + case.steps, callbacks=[steps],
        logger=False, enable_checkpointing=False, enable_progress_bar=False, **TRAINER_DEFAULTS,
    ).fit(module, data)  # fmt: skip
    measured = sorted(steps.steps[WARM_UP:], key=lambda step: step["all"])
    return measured[len(measured) // 2]


def run_cases(rank: int, cases: list[Case], processes: int, port: int, folder: Path) -> None:
    """All cases on one of several processes; the first writes down what it saw."""
    torch.set_num_threads(1)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": processes, "NODE_RANK": 0}
    os.environ.update({name: str(value) for name, value in (where | {"LOCAL_RANK": rank}).items()})
    watch = Stopwatch()
    watch.install()
    results = []
    for case in cases:
        started, others = time.perf_counter(), busy_elsewhere()
        result = run_case(case, processes, watch)
        others = (busy_elsewhere() - others) / (time.perf_counter() - started)
        results.append(asdict(case) | {"processes": processes, "busy_elsewhere": others} | result)
    if rank == 0:
        (folder / f"{processes}.json").write_text(json.dumps(results))


def bench_processes(quick: bool, folder: Path) -> list[dict[str, Any]]:
    """Every case on one process, then on two."""
    made = str(make_model(folder / "made", width=256 if quick else 512, layers=4 if quick else 8))
    steps, prompts = (3, 16) if quick else (9, 64)
    math_cases = [
        {"task": "math", "label": label, "student": student, "prompts": prompts, "steps": steps}
        for label, student in (("embedded", "embedded:student"), ("made", made))
    ]
    quickstart = [
        {"task": task, "label": QUICKSTART, "student": "embedded:student", "steps": steps, **sizes}
        for task, sizes in (("math", {"prompts": 32, "samples": 1}), ("alfworld", {"prompts": 4, "samples": 4}))
    ]
    cases = {
        1: [Case(**case, strategy="-") for case in (*math_cases, *quickstart)],
        2: [Case(**case, strategy=strategy) for case in math_cases for strategy in ("DDP", "FSDP2")],
    }
    results = []
    for processes, of_them in cases.items():
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
        multiprocessing.spawn(run_cases, (of_them, processes, port, folder), nprocs=processes)
        results += json.loads((folder / f"{processes}.json").read_text())
    return results


def compared(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Seconds a step beside those of one process."""
    rows = []
    for result in results:
        if result["label"] == QUICKSTART:
            continue
        one = next(r for r in results if r["processes"] == 1 and (r["task"], r["label"]) == ("math", result["label"]))
        rows.append(
            {
                "student": result["label"],
                "processes": f"{result['processes']} {result['strategy']}",
                "s/step": result["all"],
                "tokens/s": result["tokens"] / result["all"],
                "faster": one["all"] / result["all"],
                "core s": result["core"],
                "less": one["core"] / result["core"],
                **{name: result.get(f"{name}/all", 0.0) for name in ("rollout", "teacher", "update")},
                "replica": result.get("rollout/replica", 0.0),
                "busy": result["busy_elsewhere"],
            }
        )
    return rows


def outside(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What a step takes besides models and environment, by phase, in milliseconds."""
    rows = []
    for result in results:
        spent = {
            kind: sum(value for name, value in result.items() if name.endswith(f"/{kind}"))
            for kind in ("model", "environment")
        }
        rest = {phase: result.get(f"{phase}/all", 0.0) for phase in PHASES}
        rest[BETWEEN] = result["all"] - sum(rest.values())
        for phase in rest:
            rest[phase] -= result.get(f"{phase}/model", 0.0) + result.get(f"{phase}/environment", 0.0)
        rows.append(
            {
                "task": result["task"],
                "student": result["label"],
                "processes": f"{result['processes']} {result['strategy']}",
                "all": 1000 * result["all"],
                "model": 1000 * spent["model"],
                "environment": 1000 * spent["environment"],
                "outside": 1000 * sum(rest.values()),
                "%": 100 * sum(rest.values()) / result["all"],
                **{phase: 1000 * seconds for phase, seconds in rest.items() if phase != "support"},
            }
        )
    if both := [row for row in rows if row["student"] == QUICKSTART]:
        summed = {name: sum(row[name] for row in both) for name, value in both[0].items() if isinstance(value, float)}
        rows.append(both[0] | summed | {"task": "both", "%": 100 * summed["outside"] / summed["all"]})
    return rows


# ---- micro-batches, tokens, lengths ---------------------------------------------------------------------------------


def made_up_turns(number: int, length: int, vocabulary: int, prompt: int = 32) -> list[Turn]:
    """Turns of `length` tokens, prompt included."""
    ids = torch.randint(10, vocabulary, (number, length), generator=torch.Generator().manual_seed(0)).tolist()
    messages = [{"role": "user", "content": "Go on."}]
    return [
        Turn(
            prompt=Prompt(messages=messages, ids=row[:prompt]),
            completion=Completion(ids=row[prompt:], log_probs=[-5.0] * (length - prompt), truncated=True),
            answer="",
        )
        for row in ids
    ]


class Update:
    """Forward and backward passes of one student over turns, with a teacher's answer made up beforehand."""

    def __init__(self, student: PreTrainedModel, turns: list[Turn]) -> None:
        self.student, self.turns = student.train(), turns
        lengths = torch.tensor([len(turn.completion.ids) for turn in turns])
        n, vocabulary = int(lengths.sum()), OutputHead.of(student).weight.shape[0]
        generator = torch.Generator().manual_seed(0)
        log_probs = torch.randn(n, K, generator=generator).log_softmax(-1)
        yes = torch.ones(n, dtype=torch.bool)
        self.support = Support(
            ids=torch.randint(vocabulary, (n, K), generator=generator), log_probs=log_probs, sampled=log_probs[:, 0],
            turn_end=log_probs[:, 0], lost=torch.zeros(n), comparable=yes, alike=yes,
        )  # fmt: skip
        turn = torch.arange(len(turns)).repeat_interleave(lengths)
        self.weights: Tensor = position_weights("token_mean", yes, turn=turn, task=torch.zeros_like(turn), tasks=1)

    def __call__(self, micro_batch_tokens: int) -> None:
        """The gradient of a step."""
        self.student.zero_grad()
        accumulate_gradients(
            self.student, LocalSupportMatching(k=K), self.turns, self.support, self.weights,
            groups=micro_batches(self.turns, micro_batch_tokens), backward=lambda loss: loss.backward(),
        )  # fmt: skip


def timed(run: Callable[[], Any], times: int, *, warm_up: bool = True) -> dict[str, float]:
    """Seconds of the best of some runs, after a first one if wanted, on the clock and on this process's core."""
    if warm_up:
        run()
    started, others = time.perf_counter(), busy_elsewhere()
    runs = []
    for _ in range(times):
        clock, core = time.perf_counter(), time.process_time()
        run()
        runs.append((time.perf_counter() - clock, time.process_time() - core))
    busy = (busy_elsewhere() - others) / (time.perf_counter() - started)
    seconds, core_seconds = (min(values) for values in zip(*runs, strict=True))
    return {"seconds": seconds, "core s": core_seconds, "busy": busy}


def bench_micro_batches(student: PreTrainedModel, times: int) -> list[dict[str, Any]]:
    """One step of 32 turns of 64 to 512 tokens, cut otherwise."""
    vocabulary = OutputHead.of(student).weight.shape[0]
    turns = [turn for length in (64, 128, 256, 512) for turn in made_up_turns(8, length, vocabulary)]
    tokens = sum(len(turn.prompt.ids) + len(turn.completion.ids) for turn in turns)
    update, rows = Update(student, turns), []
    for size in (512, 1024, 2048, 4096, 8192):
        update(size)
        memory = Memory("cpu")
        memory.start()
        update(size)
        row = {"micro_batch_tokens": size, "micro-batches": len(micro_batches(turns, size))}
        rows.append(row | {"extra MiB": memory.peak() / 2**20} | timed(lambda size=size: update(size), times))
    for row in rows:
        row["tokens/s"] = tokens / row["core s"]
        row["to the best"] = row["core s"] / min(row["core s"] for row in rows)
    return rows


def works(student: PreTrainedModel, teacher: LocalTeacher, turns: list[Turn]) -> dict[str, Callable[[], Any]]:
    """The parts of a step whose cost follows from the turns' tokens."""
    nothing = torch.zeros((sum(len(turn.completion.ids) for turn in turns), 0), dtype=torch.long)
    update = Update(student, turns)
    return {"update": lambda: update(8192), "teacher": lambda: teacher.score(turns, nothing)}


def bench_tokens(student: PreTrainedModel, teacher: LocalTeacher, times: int) -> list[dict[str, Any]]:
    """Seconds of update and scoring at one length, for 512 to 8,192 tokens."""
    vocabulary, rows = OutputHead.of(student).weight.shape[0], []
    for number in (1, 2, 4, 8, 16):
        parts = works(student, teacher, made_up_turns(number, 512, vocabulary))
        rows += [{"part": part, "tokens": 512 * number} | timed(run, times) for part, run in parts.items()]
    return rows


def bench_lengths(
    student: PreTrainedModel, teacher: LocalTeacher, tokens: int, times: int, longest_answer: int
) -> list[dict[str, Any]]:
    """Seconds of update and scoring of so many tokens in sequences of 256 to 8,192, and of answers that long."""
    vocabulary, rows = OutputHead.of(student).weight.shape[0], []
    for length in (256, 512, 1024, 2048, 4096, 8192):
        parts = works(student, teacher, made_up_turns(tokens // length, length, vocabulary))
        for part, run in parts.items():
            rows.append({"part": part, "length": length, "tokens": tokens} | timed(run, times))
    engine = LocalEngine.around(student.eval())
    for length in (256, 512, 1024, 2048, 4096, 8192):
        if length > longest_answer:
            break
        requests = [Request(ids=turn.prompt.ids, seed=i) for i, turn in enumerate(made_up_turns(8, 64, vocabulary))]

        def write(length: int = length, requests: list[Request] = requests) -> None:
            engine.generate(requests, Sampling(), max_new_tokens=length, turn_end=frozenset())

        row = {"part": "rollout, 8 answers", "length": length, "tokens": 8 * length}
        rows.append(row | timed(write, 1, warm_up=length == 256))
    for row in rows:
        row["µs/token"] = 1e6 * row["core s"] / row["tokens"]
    return rows


def exponents(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Of tokens in the seconds on the core, by part."""
    fits = {}
    for part in dict.fromkeys(row["part"] for row in rows):
        points = [(math.log(row["tokens"]), math.log(row["core s"])) for row in rows if row["part"] == part]
        fits[part] = statistics.linear_regression(*zip(*points, strict=True)).slope
    return fits


def growth(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Cost a token = a + b * length, by part, and the share of the second at the longest."""
    fits = []
    for part in dict.fromkeys(row["part"] for row in rows):
        lengths, costs = zip(*((row["length"], row["µs/token"]) for row in rows if row["part"] == part), strict=True)
        b, a = statistics.linear_regression(lengths, costs)
        longest = max(lengths)
        share = 100 * b * longest / (a + b * longest)
        fits.append({"part": part, "a, µs": a, "b, µs per 1,000": 1000 * b, "longest": longest, "b's share %": share})
    return fits


# ---- the program ----------------------------------------------------------------------------------------------------


def main() -> None:
    """Measure, print tables, write them down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("runs/bench_scaling.json"))
    arguments = parser.parse_args()
    quick = arguments.quick
    os.environ.setdefault("COLUMNS", "120")  # of the tables, where the output is no terminal
    torch.set_num_threads(1)
    times = 1 if quick else 3
    results: dict[str, Any] = {"quick": quick}

    arguments.out.parent.mkdir(parents=True, exist_ok=True)

    def report(title: str, rows: list[dict[str, Any]]) -> None:
        """Written down at once: what is measured is not lost with what is interrupted."""
        results[title] = rows
        show(title, rows)
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        long = make_model(folder / "long", width=128 if quick else 256, layers=3 if quick else 4)
        student = AutoModelForCausalLM.from_pretrained(long)
        tokenizer = load_tokenizer(str(long))
        assert turn_end_ids(student, tokenizer)
        teacher = LocalTeacher(str(long))
        size = OutputHead.of(student).weight.shape[0]
        teacher.setup(tokenizer, vocabulary=size, respell=False, tokens=K, device=torch.device("cpu"))
        print(f"One thread a process; the model of the last tables has {parameters_of(student)} parameters.")

        processes = bench_processes(quick, folder)
        report("1. The same step on one process and on two", compared(processes))
        report("2. Outside of models and environment, milliseconds a step", outside(processes))
        report("3. Micro-batch sizes, one update", bench_micro_batches(student, times))
        rows = bench_tokens(student, teacher, times)
        report("4. Tokens, in sequences of 512", rows)
        results["exponents"] = exponents(rows)
        print("Exponent of tokens:", ", ".join(f"{part} {value:.3f}" for part, value in results["exponents"].items()))
        lengths = bench_lengths(student, teacher, 8192 if quick else 16_384, times, 1024 if quick else 8192)
        report("5. Lengths, at one number of tokens", lengths)
        report("Cost a token = a + b * length", growth(lengths))


if __name__ == "__main__":
    main()
