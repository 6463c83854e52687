"""Laws of a step on two gloo processes, in which one has little to do and the other much.

Both processes go through all `CASES` one after the other and write down what they saw; the tests compare it with one
process, which runs here. `test_laws` has the gradient without a trainer, `test_launch` how processes are started.
"""

import os
import queue
import socket
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from tiny import save_tiny
from torch import Tensor, distributed, multiprocessing
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from lsm_lightning import checkpoints
from lsm_lightning import module as module_module
from lsm_lightning import update as update_module
from lsm_lightning.callbacks.checkpoint import Checkpoint
from lsm_lightning.cli import TRAINER_DEFAULTS
from lsm_lightning.datamodule import AlternatingTasks
from lsm_lightning.errors import ConfigurationError
from lsm_lightning.module import OnPolicyDistillation
from lsm_lightning.objectives import LocalSupportMatching
from lsm_lightning.rollout import LocalEngine, Sampling
from lsm_lightning.rollout.base import Conversations, Request
from lsm_lightning.sharding import OffloadedModelParallelStrategy
from lsm_lightning.tasks.base import Episode, Split, Task
from lsm_lightning.teacher import LocalTeacher

WATCHDOG, PATIENCE = 60, 8
"""Seconds in which a process must get on to its next case; and in which one that cannot has not done so."""
SHORT, LONG = "Say now", "A shop sold 7 cards on Monday and 5 on Tuesday. How many cards were sold? Say it again"
COLLECTIVES = (
    *("all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "all_to_all", "barrier", "broadcast"),
    *("broadcast_object_list", "gather", "gather_object", "reduce", "reduce_scatter_tensor", "scatter"),
)
IN_THE_MODEL = ("accumulate_gradients", "student_top_tokens")

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec"),
]


# ---- a task and an engine with two speeds ---------------------------------------------------------------------------


class UnevenEpisode(Episode):
    def __init__(self, question: str, turns: int) -> None:
        self.question, self.left = question, turns
        self.done = turns == 0

    def messages(self) -> list[dict[str, str]]:
        return [{"role": "user", "content": self.question}]

    def step(self, answer: str) -> None:
        self.left -= 1
        self.done = self.left == 0
        self.reward = float(len(answer) % 2)


class Uneven(Task):
    """Even problems are short and of one turn, odd ones long and of `turns`; it notes which ones were played."""

    max_new_tokens = 60

    def __init__(self, turns: int = 2, test_size: int = 1) -> None:
        self.turns, self.size = turns, test_size
        self.played: list[tuple[Split, int]] = []

    def setup(self) -> None:
        self.played.clear()

    def test_size(self) -> int:
        return self.size

    def episode(self, split: Split, index: int) -> UnevenEpisode:
        self.played.append((split, index))
        return UnevenEpisode(LONG, self.turns) if index % 2 else UnevenEpisode(SHORT, 1)


class UnevenEngine(LocalEngine):
    """Writes 4 tokens to a short question and 60 to a long one: it never ends a turn itself."""

    def converse(self, conversations: Conversations, sampling: Sampling, **settings: Any) -> None:
        right = conversations.requests

        def limited() -> dict[int, Request]:
            asked = right().items()
            return {number: r if is_long(r.ids) else replace(r, limit=4) for number, r in asked}

        conversations.requests = limited
        super().converse(conversations, sampling, **settings | {"turn_end": frozenset()})


def is_long(prompt: Sequence[int]) -> bool:
    return len(prompt) > 30


# ---- cases ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """One step, or one evaluation."""

    strategy: str = "ddp"
    student: str = "tied"
    """Tied or untied: the head is a shard of its own or not."""
    source: str = "teacher"
    """Of the support; with the student's tokens, it runs before its update too."""
    reduction: str = "token_mean"
    turns: int = 2
    """Of the long episodes; 0: they are over before they begin."""
    silent: bool = False
    """Whether nothing of a long episode may be learned from."""
    evaluate: bool = False
    fault: str | None = None


STEPS = {
    "uneven": Case(),
    "own tokens": Case(student="untied", source="union", reduction="sequence_mean"),
    "nothing kept": Case(silent=True),
    "no turns": Case(turns=0, source="union", reduction="task_mean"),
}
"""Of three problems rank 0 plays the first and last, which are short, and rank 1 the second."""
STRATEGIES = ("ddp", "fsdp2", "fsdp2, offloaded")
FAULTS = ("averaged by the processes", "counted apart", "never averaged", "averaged every time", "metric by metric")
CASES = [
    *(replace(case, strategy=strategy) for strategy in STRATEGIES for case in STEPS.values()),
    *(Case(strategy=strategy, evaluate=True) for strategy in STRATEGIES),
    *(Case(fault=fault) for fault in FAULTS),
    Case(evaluate=True, fault="everyone plays all"),
    Case(strategy="auto"),
]
BREAKS = {strategy: Case(strategy=strategy, fault="one cannot play on") for strategy in STRATEGIES}
HANGS = Case(strategy="fsdp2", fault="other numbers of micro-batches")


def strategy_of(case: Case) -> Strategy | str:
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return "auto"
    if case.strategy == "fsdp2":
        return ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    if case.strategy == "fsdp2, offloaded":
        return OffloadedModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1)
    if case.strategy == "auto":
        return ModelParallelStrategy()
    return "ddp"


@contextmanager
def made_wrong(fault: str | None) -> Iterator[None]:
    right = module_module.accumulate_gradients
    with pytest.MonkeyPatch.context() as patch:
        if fault == "averaged by the processes":
            patch.setattr(
                module_module, "accumulate_gradients", lambda *a, scale, **options: right(*a, scale=1.0, **options)
            )
        elif fault == "counted apart":
            alone = module_module.position_weights
            patch.setattr(
                module_module,
                "position_weights",
                lambda *a, total, **options: (total(torch.zeros(1)), alone(*a, **options))[1],
            )
        elif fault in ("never averaged", "averaged every time"):
            times = {"never averaged": 10**9, "averaged every time": 0}[fault]
            closure = OnPolicyDistillation._backward
            patch.setattr(OnPolicyDistillation, "_backward", lambda self, _: closure(self, times))
        elif fault == "metric by metric":
            means = module_module.global_means
            patch.setattr(
                module_module,
                "global_means",
                lambda sums, total: {k: v for name in sums for k, v in means({name: sums[name]}, total).items()},
            )
        elif fault == "other numbers of micro-batches":
            patch.setattr(
                OnPolicyDistillation,
                "_micro_batches",
                lambda self, turns: update_module.micro_batches(turns, self.micro_batch_tokens),
            )
        elif fault == "everyone plays all":
            patch.setattr(AlternatingTasks, "eval_indices", lambda self, name: range(self.tasks[name].test_size()))
        elif fault == "one cannot play on":
            patch.setattr(module_module, "collect", breaking_second_step(module_module.collect))
        yield


def breaking_second_step(right: Any) -> Any:
    steps: list[object] = []

    def collect(*arguments: Any, **options: Any) -> Any:
        steps.append(arguments)
        if len(steps) == 2 and distributed.get_rank() == 1:
            raise ConfigurationError("The game is lost.")
        return right(*arguments, **options)

    return collect


class Gradients(Callback):
    """The whole gradient, as the optimiser is about to use it, and how often DDP averaged it."""

    def __init__(self, seen: dict[str, Any]) -> None:
        self.seen = seen

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        def hook(_: object, bucket: distributed.GradBucket) -> torch.futures.Future[Tensor]:
            self.seen["averaged"] += 1
            return allreduce_hook(None, bucket)

        if isinstance(trainer.model, DistributedDataParallel):
            trainer.model.register_comm_hook(None, hook)

    def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: Any) -> None:
        gradients = [parameter.grad for parameter in module.student.parameters()]
        whole = [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients]
        self.seen["gradient"] = torch.cat([gradient.flatten() for gradient in whole]).clone()


@contextmanager
def watched(seen: dict[str, Any]) -> Iterator[None]:
    """Notes micro-batches, runs of the student, and collectives of a step outside of it."""
    state = {"outside": False}

    def inside(right: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            before, state["outside"] = state["outside"], False
            try:
                return right(*arguments, **options)
            finally:
                state["outside"] = before

        return run

    def counting(name: str, right: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            if state["outside"]:
                seen["collectives"].append(name)
            return right(*arguments, **options)

        return run

    def step(right: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            state["outside"] = True
            try:
                return right(*arguments, **options)
            finally:
                state["outside"] = False

        return run

    def micro_batches(right: Any) -> Any:
        def run(turns: Any, *arguments: Any, **options: Any) -> Any:
            groups = right(turns, *arguments, **options)
            seen["micro-batches"] = len(groups)
            seen["lengths"] = [len(turn.completion.ids) for turn in turns]
            return groups

        return run

    def hidden_states(right: Any) -> Any:
        def run(*arguments: Any) -> Any:
            seen["runs"] += 1
            return right(*arguments)

        return run

    with pytest.MonkeyPatch.context() as patch:
        for name in COLLECTIVES:
            patch.setattr(distributed, name, counting(name, getattr(distributed, name)))
        for name in IN_THE_MODEL:
            patch.setattr(module_module, name, inside(getattr(module_module, name)))
        patch.setattr(UnevenEngine, "sync", inside(UnevenEngine.sync))
        patch.setattr(torch.nn.utils, "clip_grad_norm_", inside(torch.nn.utils.clip_grad_norm_))
        patch.setattr(OnPolicyDistillation, "training_step", step(OnPolicyDistillation.training_step))
        for owner in {module_module, update_module}:
            patch.setattr(owner, "micro_batches", micro_batches(owner.micro_batches))
        patch.setattr(update_module, "hidden_states", hidden_states(update_module.hidden_states))
        yield


@contextmanager
def masked(case: Case) -> Iterator[None]:
    right = module_module.loss_mask

    def silent(pair: Any, turns: Any, policy: Any) -> Any:
        mask = right(pair, turns, policy)
        short = [not is_long(turn.prompt.ids) for turn in turns for _ in turn.completion.ids]
        return replace(mask, keep=mask.keep & torch.tensor(short, dtype=torch.bool))

    with pytest.MonkeyPatch.context() as patch:
        if case.silent:
            patch.setattr(module_module, "loss_mask", silent)
        yield


def see(case: Case, models: Path) -> dict[str, Any]:
    """Run it on this process's share and tell what there was to see."""
    seen: dict[str, Any] = {"averaged": 0, "collectives": [], "runs": 0}
    sizes = {"five": 5, "one": 1} if case.evaluate else {"five": 1}
    tasks = {name: Uneven(case.turns, size) for name, size in sizes.items()}
    module = OnPolicyDistillation(
        str(models / case.student),
        {name: LocalTeacher(str(models / "teacher")) for name in tasks},
        objective=LocalSupportMatching(k=8, source=case.source),  # type: ignore[arg-type]
        engine=UnevenEngine(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        reduction=case.reduction,  # type: ignore[arg-type]
        micro_batch_tokens=120,
        gradient_clip=1e9,
    )
    data = AlternatingTasks(tasks, prompts_per_step=3, samples_per_prompt=2)  # type: ignore[arg-type]
    saved = models / f"saved-{case.strategy}"
    checkpoint = Checkpoint(dirpath=saved, filename="last", save_top_k=0, save_last=True, save_on_exception=True)
    breaks = case in BREAKS.values()
    trainer = Trainer(
        accelerator="cpu", devices=int(os.environ.get("WORLD_SIZE", "1")), strategy=strategy_of(case),
        max_steps=2 if breaks else 1, logger=False, enable_checkpointing=breaks, enable_progress_bar=False,
        callbacks=[Gradients(seen), *([checkpoint] if breaks else [])], **TRAINER_DEFAULTS,
    )  # fmt: skip
    with made_wrong(case.fault), masked(case), watched(seen):
        try:
            trainer.validate(module, data, verbose=False) if case.evaluate else trainer.fit(module, data)
        except ConfigurationError as error:
            return seen | {"error": str(error), "saved": sorted(path.name for path in saved.glob("*"))}
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items() if "/seconds/" not in name}
    split = "test" if case.evaluate else "train"
    played = {name: [index for of, index in task.played if of == split] for name, task in tasks.items()}
    if not case.evaluate:
        played["five"] = played["five"][1:]  # the data module looks at the first problem before training
    return seen | {"metrics": metrics, "played": played}


# ---- two processes --------------------------------------------------------------------------------------------------


def one_of_two(rank: int, cases: list[Case], models: Path, folder: Path, port: int, done: Any) -> None:
    torch.set_num_threads(1)
    where = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": 2, "NODE_RANK": 0, "LOCAL_RANK": rank}
    done.put(f"rank {rank} is ready")
    for number, case in enumerate(cases):
        os.environ.update({name: str(value) for name, value in where.items()})  # a trainer takes some of it away
        try:
            seen = see(case, models)
        except BaseException:
            done.put(f"rank {rank} failed at {case}:\n{traceback.format_exc()}")
            raise
        torch.save(seen, folder / f"{number}-{rank}.pt")
        done.put(f"rank {rank} has done {case}")


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def by_two(cases: list[Case], models: Path, folder: Path) -> tuple[dict[Case, list[Any]], bool]:
    """What both processes saw of each case but the last; and whether they came to the end of that one.

    Raises:
        TimeoutError: One of them did not get on within the watchdog's time.
    """
    context = multiprocessing.get_context("spawn")
    done, port = context.Queue(), free_port()
    processes = [context.Process(target=one_of_two, args=(rank, cases, models, folder, port, done)) for rank in (0, 1)]
    for process in processes:
        process.start()
    said: list[str] = []
    try:
        for _ in range(2 * len(cases)):  # as often as they say something before the last case is done
            said.append(done.get(timeout=WATCHDOG))
            assert "failed" not in said[-1], said[-1]
        with suppress(queue.Empty):
            said += [done.get(timeout=PATIENCE), done.get(timeout=PATIENCE)]
    except queue.Empty:
        raise TimeoutError(f"No process got on for {WATCHDOG} s; at last {said[-2:]}") from None
    finally:
        for process in processes:
            process.kill()
            process.join()
    seen = {
        case: [torch.load(folder / f"{number}-{rank}.pt") for rank in (0, 1)] for number, case in enumerate(cases[:-1])
    }
    return seen, sum("has done" in words for words in said) == 2 * len(cases)


@pytest.fixture(scope="module")
def models(student_tokenizer, teacher_tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny(folder / "tied", student_tokenizer, seed=1)
    save_tiny(folder / "untied", student_tokenizer, family="qwen2-untied", seed=1)
    save_tiny(folder / "teacher", teacher_tokenizer, seed=2)
    return folder


@pytest.fixture(scope="module")
def seen_by_two(models: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[Case, list[Any]], bool]:
    return by_two([*CASES, *BREAKS.values(), HANGS], models, tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def two(seen_by_two: tuple[dict[Case, list[Any]], bool]) -> dict[Case, list[dict[str, Any]]]:
    """What each of two processes saw."""
    return seen_by_two[0]


@pytest.fixture(scope="module")
def one(models: Path) -> Any:
    """What a single process sees of a case."""

    @cache
    def alone(case: Case) -> dict[str, Any]:
        return see(replace(case, strategy="ddp", fault=None), models)

    return lambda case: alone(replace(case, strategy="ddp", fault=None))


each_step = pytest.mark.parametrize("name", STEPS)
each_strategy = pytest.mark.parametrize("strategy", STRATEGIES)


def difference(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).norm() / theirs.norm()).item()


# ---- gradients ------------------------------------------------------------------------------------------------------


@each_step
@each_strategy
def test_the_gradient_of_two_processes_is_that_of_one(one, two, strategy, name):
    case = replace(STEPS[name], strategy=strategy)
    alone = one(case)["gradient"]
    assert alone.norm() > 0.1
    for share in two[case]:
        assert difference(share["gradient"], alone) < 1e-6


@pytest.mark.parametrize(
    ("fault", "off"), [("averaged by the processes", 0.49), ("counted apart", 0.1), ("never averaged", 0.1)]
)
def test_a_gradient_that_is_put_together_wrongly_is_seen(one, two, fault, off):
    case = Case(fault=fault)
    assert any(difference(share["gradient"], one(case)["gradient"]) > off for share in two[case])


@each_step
@each_strategy
def test_numbers_told_by_two_processes_are_those_of_one(one, two, strategy, name):
    case = replace(STEPS[name], strategy=strategy)
    for share in two[case]:
        assert share["metrics"] == pytest.approx(one(case)["metrics"], rel=1e-5, abs=1e-6)


def test_numbers_of_another_step_are_others(one):
    assert one(STEPS["uneven"])["metrics"] != pytest.approx(one(STEPS["nothing kept"])["metrics"], rel=1e-3)


# ---- nobody waits ---------------------------------------------------------------------------------------------------


@each_strategy
def test_these_processes_had_very_different_work(two, strategy):
    """Or the laws here would say little."""
    short, long = two[replace(STEPS["uneven"], strategy=strategy)]
    assert short["lengths"] == [4] * 4
    assert long["lengths"] == [60] * 4
    assert (short["micro-batches"], long["micro-batches"]) == (1, 4)
    nothing, none = (two[replace(STEPS[name], strategy=strategy)] for name in ("nothing kept", "no turns"))
    assert nothing[1]["lengths"] == [60] * 4
    assert none[1]["lengths"] == []


@each_step
@each_strategy
def test_the_student_runs_equally_often_on_all_processes(two, strategy, name):
    short, long = two[replace(STEPS[name], strategy=strategy)]
    most = max(short["micro-batches"], long["micro-batches"])
    assert short["runs"] == long["runs"] == most * (2 if STEPS[name].source == "union" else 1)


def test_processes_that_run_it_in_other_numbers_do_not_come_to_an_end(seen_by_two):
    _, ended = seen_by_two
    assert not ended


# ---- what is played -------------------------------------------------------------------------------------------------


@each_strategy
def test_processes_play_different_problems(one, two, strategy):
    case = replace(STEPS["uneven"], strategy=strategy)
    shares = [share["played"]["five"] for share in two[case]]
    assert shares == [[0, 0, 2, 2], [1, 1]]
    assert sorted([*shares[0], *shares[1]]) == one(case)["played"]["five"]


def test_a_strategy_that_would_give_each_process_a_student_of_its_own_is_refused(two):
    for share in two[Case(strategy="auto")]:
        assert "set data_parallel_size=2 and tensor_parallel_size=1" in share["error"]
        assert "gradient" not in share


@each_strategy
def test_evaluation_plays_every_test_problem_once(one, two, strategy):
    """An odd number of them, and fewer than there are processes."""
    case = Case(strategy=strategy, evaluate=True)
    shares = [share["played"] for share in two[case]]
    assert [share["five"] for share in shares] == [[0, 2, 4], [1, 3]]
    assert [share["one"] for share in shares] == [[0], []]
    for share in two[case]:
        assert share["metrics"] == pytest.approx(one(case)["metrics"], rel=1e-9)
    assert (one(case)["metrics"]["five/eval/n"], one(case)["metrics"]["one/eval/n"]) == (5, 1)


def test_problems_that_are_played_twice_are_seen(two):
    (score, _) = (share["metrics"] for share in two[Case(evaluate=True, fault="everyone plays all")])
    assert (score["five/eval/n"], score["one/eval/n"]) == (10, 2)


# ---- collectives ----------------------------------------------------------------------------------------------------


@each_step
@each_strategy
def test_a_step_needs_four_sums_outside_of_the_student(two, strategy, name):
    """Micro-batches, counts, metrics and the largest gap of the sampler; Lightning puts a barrier before each.

    Before them processes tell each other that they have played their episodes.
    """
    for share in two[replace(STEPS[name], strategy=strategy)]:
        assert share["collectives"] == ["all_gather_object", *["barrier", "all_reduce"] * 4]


def test_metrics_that_are_summed_one_by_one_are_counted(two):
    for share in two[Case(fault="metric by metric")]:
        assert len(share["collectives"]) > 40


@each_strategy
def test_what_ends_one_process_ends_all_after_a_checkpoint(two, models, strategy):
    for share in two[BREAKS[strategy]]:
        assert share["error"] == "The game is lost."
        assert "last.ckpt" in share["saved"]
    saved = checkpoints.load(models / f"saved-{strategy}" / "last.ckpt")
    assert saved["global_step"] == 1


@each_step
def test_ddp_averages_gradients_once_a_step(two, name):
    for share in two[STEPS[name]]:
        assert share["averaged"] == 1


def test_averaging_them_at_every_micro_batch_is_counted_and_gives_the_same(one, two):
    for share in two[Case(fault="averaged every time")]:
        assert share["averaged"] == 4
        assert difference(share["gradient"], one(STEPS["uneven"])["gradient"]) < 1e-6
