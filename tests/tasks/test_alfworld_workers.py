"""Games in worker processes: they play as games here do, side by side, and outlive the process that plays them."""

import gc
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from scripted import ScriptedEngine

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.rollout import Sampling
from lsm_lightning.rollout.collect import Player, collect
from lsm_lightning.types import Completion, Message, Prompt, Trajectory, Turn

pytest.importorskip("textworld", reason="needs the alfworld extra")

from lsm_lightning.tasks.alfworld import AlfworldGames, workers
from lsm_lightning.tasks.alfworld.expert import decide
from lsm_lightning.tasks.alfworld.games import generate
from lsm_lightning.tasks.alfworld.running import LocalGame, RunningGame, Scene
from lsm_lightning.tasks.alfworld.translation import TranslationCache, _digest, _write, translate
from lsm_lightning.tasks.alfworld.workers import WorkerPool, default_workers

REPOSITORY = Path(__file__).parents[2]
PATIENCE = 30.0
"""Seconds for what happens in another process."""


@pytest.fixture(scope="module")
def shared() -> Iterator[WorkerPool]:
    """Two workers for all tests; those that die are replaced."""
    pool = WorkerPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def pool() -> Iterator[WorkerPool]:
    """The same with one worker."""
    pool = WorkerPool(1)
    yield pool
    pool.close()


def play(game: RunningGame, seed: int, steps: int, before: Callable[[int], None] = lambda step: None) -> list[Scene]:
    """Scenes along random commands; `before` is called before each."""
    choose, scenes = random.Random(seed), [game.scene()]
    for step in range(steps):
        before(step)
        game.send(choose.choice(scenes[-1].admissible))
        scenes.append(game.scene())
    return [Scene(scene.text, list(scene.admissible), scene.won) for scene in scenes]


def wait_until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.01)


def alive(pid: int) -> bool:
    """Whether there is such a process, be it a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


# ---- play -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", range(3))
def test_a_game_plays_as_it_does_in_this_process(shared, index):
    game = generate(31, index)
    assert play(shared.open(game), 0, 12) == play(LocalGame(game), 0, 12)


def test_games_are_at_work_side_by_side(shared):
    """Shown without a clock: one worker stands still, and the other plays on."""
    games = [shared.open(generate(32, index)) for index in (0, 1)]
    starts = [game.scene() for game in games]
    stopped, going = (game._state.worker.process.pid for game in games)
    assert stopped != going
    os.kill(stopped, signal.SIGSTOP)
    try:
        for game, start in zip(games, starts, strict=True):
            game.send(start.admissible[0])
        assert games[1].scene() != starts[1]
        games[1].send("look")
        games[1].scene()
    finally:
        os.kill(stopped, signal.SIGCONT)
    assert games[0].scene() != starts[0]


def test_a_game_played_twice_stays_with_its_worker_and_others_take_the_other_one(shared):
    shared._sweep()
    games = [shared.open(generate(33, index)) for index in (0, 0, 1, 0, 1)]
    homes = [game._state.worker for game in games]
    assert homes[0] is homes[1] is homes[3] is not homes[2]
    assert homes[2] is homes[4]


def test_games_that_are_closed_or_forgotten_end(pool):
    closed, forgotten, played = (pool.open(generate(34, index)) for index in range(3))
    for game in (closed, forgotten, played):
        game.scene()
    (worker,) = pool._workers
    closed.close()
    closed.close()
    del forgotten, game
    gc.collect()
    played.send("look")
    played.scene()
    assert list(worker.games.values()) == [played._state]


def test_a_game_that_is_none_is_named_and_disturbs_nobody(pool):
    good, bad = pool.open(generate(35, 0)), pool.open(replace(generate(35, 1), problem="(define", name="the bad one"))
    good.scene()
    before = pool.processes
    with pytest.raises(ConfigurationError, match="the bad one: the engine cannot load this game"):
        bad.scene()
    bad.close()
    good.send("look")
    assert "look" in good.scene().admissible
    assert pool.processes == before


def test_any_number_of_games_may_begin_before_an_answer_is_read(pool):
    """Neither side waits for the other to read: these answers are larger than a pipe's buffer, and so are requests."""
    games = [pool.open(replace(generate(0, 0), problem="(define", name=f"{n} {'x' * 20_000}")) for n in range(60)]
    for number, game in enumerate(games):
        with pytest.raises(ConfigurationError, match=f"^{number} xx"):
            game.scene()


def test_kept_translations_are_used(pool, tmp_path):
    game, kept = generate(36, 0), TranslationCache(tmp_path)
    _write(tmp_path / f"{_digest(game)}.json.gz", replace(translate(game), objects={}))
    with pytest.raises(ConfigurationError, match="cannot load"):
        pool.open(game, kept).scene()
    assert LocalGame(game).scene() is not None


# ---- death ----------------------------------------------------------------------------------------------------------


def kill(pool: WorkerPool) -> None:
    for pid in pool.processes:
        os.kill(pid, signal.SIGKILL)


def test_a_game_goes_on_when_its_worker_is_killed_between_commands(pool):
    game = generate(37, 0)
    assert play(pool.open(game), 1, 8, before=lambda step: kill(pool) if step in (2, 5) else None) == play(
        LocalGame(game), 1, 8
    )


def test_games_go_on_when_their_worker_is_killed_at_work(pool):
    games = [generate(38, index) for index in range(3)]
    remote, local = [pool.open(game) for game in games], [LocalGame(game) for game in games]
    commands = [game.scene().admissible[0] for game in local]
    assert [game.scene().admissible[0] for game in remote] == commands
    (pid,) = pool.processes
    os.kill(pid, signal.SIGSTOP)
    for game, command in zip([*remote, *local], commands * 2, strict=True):
        game.send(command)
    os.kill(pid, signal.SIGKILL)
    assert [game.scene().text for game in remote] == [game.scene().text for game in local]
    assert pool.processes != [pid]
    assert not alive(pid), "no zombie is left"


def test_a_game_over_which_workers_die_again_and_again_is_named(pool, tmp_path, monkeypatch):
    """The planner library ends its process where it does not understand a translation."""
    monkeypatch.setattr(workers, "DEATHS_ALLOWED", 2)
    game, kept = replace(generate(39, 1), name="the deadly one"), TranslationCache(tmp_path)
    _write(tmp_path / f"{_digest(game)}.json.gz", replace(translate(game), sas="nonsense"))
    good = pool.open(generate(39, 0))
    before = good.scene()
    bad, late = pool.open(game, kept), pool.open(generate(39, 2))
    with pytest.raises(
        ConfigurationError, match=r"^the deadly one: 2 worker processes died over this game .*status 33"
    ):
        bad.scene()
    assert late.scene() is not None
    good.send("look")
    assert good.scene().admissible == before.admissible


def test_workers_that_do_not_start_are_told(monkeypatch):
    monkeypatch.setattr(workers, "_MODULE", "lsm_lightning.no_such_module")
    pool = WorkerPool(1)  # of its own, for it has never had a worker
    with pytest.raises(ConfigurationError, match=r"do not start \(exit status 1\): run `.*no_such_module` to see why"):
        pool.open(generate(0, 0)).scene()
    assert pool.processes == []


def test_a_worker_that_says_nothing_counts_as_dead(pool, monkeypatch):
    game = pool.open(generate(40, 0))
    before = game.scene()
    (pid,) = pool.processes
    os.kill(pid, signal.SIGSTOP)
    game.send("look")
    monkeypatch.setattr(workers, "ANSWER_LIMIT", 0.01)
    with monkeypatch.context() as patched:
        patched.setattr(pool, "_replace", lambda worker: pool._bury(worker) and None)
        pool._take_answer(game._state.worker)
    monkeypatch.undo()
    assert not alive(pid)
    assert game.scene().admissible == before.admissible


def test_an_interrupt_while_waiting_costs_the_worker_only(pool, monkeypatch):
    game = generate(41, 0)
    running = pool.open(game)

    def interrupted(channel: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(workers, "receive", interrupted)
        with pytest.raises(KeyboardInterrupt):
            running.scene()
    assert pool.processes == []
    assert play(running, 2, 4) == play(LocalGame(game), 2, 4)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_signals_for_the_run_are_left_to_the_trainer(shared, signum):
    game = shared.open(generate(42, 0))
    game.scene()
    pid = game._state.worker.process.pid
    os.kill(pid, signum)
    game.send("look")
    game.scene()
    assert game._state.worker.process.pid == pid


SCRIPT = """
import os, signal, sys
from lsm_lightning.errors import ConfigurationError
from lsm_lightning.tasks.alfworld.game import Game
from lsm_lightning.tasks.alfworld.workers import WorkerPool
pool = WorkerPool(1)
game = pool.open(Game(name="none", kind="place", domain="", grammar="", problem="", plan=()))
try:
    game.scene()
except ConfigurationError:
    print(*pool.processes, flush=True)
"""


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "sys.exit(0)"])
def test_workers_die_with_the_trainer(end):
    done = subprocess.run([sys.executable, "-c", SCRIPT + end], cwd=REPOSITORY, capture_output=True, text=True)
    pid = int(done.stdout)
    # The parent that inherits an orphan reaps it in its own time.
    wait_until(lambda: not alive(pid) or Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z")


def test_a_forked_child_has_workers_of_its_own(shared):
    game = shared.open(generate(43, 0))
    game.scene()
    pids = shared.processes
    child = os.fork()
    if child == 0:
        shared.close()
        os._exit(0 if workers.worker_pool(1) is not shared and not shared.processes else 1)
    assert os.waitpid(child, 0)[1] == 0
    assert shared.processes == pids
    game.send("look")
    assert game.scene() is not None


def test_a_worker_imports_neither_torch_nor_transformers():
    code = """
import sys
from lsm_lightning.tasks.alfworld import extra, worker
extra.require()
assert not {"torch", "transformers", "lightning", "spacy"} & set(sys.modules), sorted(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY)


@pytest.mark.parametrize(
    ("variables", "beside"),
    [({}, 1), ({"LOCAL_WORLD_SIZE": "3"}, 3), ({"WORLD_SIZE": "2"}, 2), ({"WORLD_SIZE": "999"}, 999)],
)
def test_processes_of_a_run_share_the_cores(variables, beside, monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(12)))
    assert default_workers() == {1: 8, 2: 6, 3: 4, 999: 1}[beside]


# ---- episodes -------------------------------------------------------------------------------------------------------


class Expert(Player):
    """Answers as the expert does, with every fifth command wrong; calls `hook` before each round of games."""

    hook: Callable[[int], None] = staticmethod(lambda call: None)
    calls = 0

    def turns(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Turn]:
        self.hook(type(self).calls)
        type(self).calls += 1
        return [_answered(prompt.messages, said.ids[0]) for prompt, said in zip(prompts, completions, strict=True)]


def _answered(messages: Sequence[Message], seed: int) -> Turn:
    task, *history, observation, actions = messages[0]["content"].split("\n")
    action = decide(task, [tuple(line.split(" > ")) for line in history], observation, actions.split("|")).action
    text = f"<think>well.</think><action>{action if seed % 5 else 'fly away'}</action>"
    completion = Completion(ids=[1], log_probs=[0.0], truncated=True)
    return Turn(prompt=Prompt(messages=messages, ids=[seed % 97]), completion=completion, answer=text)


def trajectories(tokenizer, size: int, hook: Callable[[int], None] = lambda call: None) -> list[Trajectory]:
    task = AlfworldGames(workers=size, give_up_after=None)
    engine = ScriptedEngine(lambda request: Completion(ids=[request.seed], log_probs=[0.0], truncated=True))
    player = type("Hooked", (Expert,), {"hook": staticmethod(hook)})(
        engine=engine, tokenizer=tokenizer, turn_end=frozenset({1}), sampling=Sampling()
    )
    episodes = [((index, sample), task.episode("train", index)) for index in range(3) for sample in range(2)]
    return collect(episodes, player, max_new_tokens=8)


def test_trajectories_do_not_depend_on_workers_and_their_deaths(student_tokenizer, shared, monkeypatch):
    undisturbed = trajectories(student_tokenizer, 0)
    monkeypatch.setattr("lsm_lightning.tasks.alfworld.task.worker_pool", lambda size: shared)
    standing: list[int] = []
    killed: list[int] = []

    def strike(call: int) -> None:
        """After two rounds one worker stands still, to be killed at work; after four all are killed at rest."""
        if call == 2:
            standing.append(shared.processes[0])
            os.kill(standing[0], signal.SIGSTOP)
        elif call == 4:
            killed.extend(shared.processes)
            kill(shared)

    right = WorkerPool._take_answer

    def taken(self: WorkerPool, worker: object) -> None:
        if standing and worker.process.pid == standing[0]:
            os.kill(standing[0], signal.SIGKILL)
            killed.append(standing.pop())
        right(self, worker)

    monkeypatch.setattr(WorkerPool, "_take_answer", taken)
    assert trajectories(student_tokenizer, 2, strike) == undisturbed
    assert len(set(killed)) == 3
    assert not set(killed) & set(shared.processes)
    assert sum(trajectory.reward for trajectory in undisturbed) > 0
    assert sum(trajectory.invalid_actions for trajectory in undisturbed) > 0
    assert any(len(trajectory.turns) > 5 for trajectory in undisturbed)
