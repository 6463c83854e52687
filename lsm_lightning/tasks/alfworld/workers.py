"""Games in worker processes: many in each, all of them at work at the same time, and none lost when one dies.

A game is a function of its file and of the commands given so far. So when a worker dies, another starts and plays the
commands of its games again, which takes milliseconds; the player notices nothing. A game over which workers die again
and again is given up, with its name.
"""

import atexit
import itertools
import os
import subprocess
import threading
import weakref
from collections import deque
from dataclasses import asdict, dataclass, field
from functools import cache
from multiprocessing import Pipe

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.tasks import child
from lsm_lightning.tasks.alfworld.game import Game
from lsm_lightning.tasks.alfworld.running import RunningGame, Scene
from lsm_lightning.tasks.alfworld.translation import TranslationCache
from lsm_lightning.tasks.alfworld.worker import READY, Packet, receive, send

DEATHS_ALLOWED = 3
"""Workers that may die over one game, or at their start, before it is given up."""
ANSWER_LIMIT = 120.0
"""Seconds after which a worker that was asked something and says nothing counts as dead."""
_MODULE = "lsm_lightning.tasks.alfworld.worker"


@dataclass(eq=False, kw_only=True, slots=True)
class _State:
    """A game as the pool sees it."""

    number: int
    game: Game
    kept: TranslationCache | None
    worker: "_Worker | None" = None
    """Who plays it; None if that one has died since."""
    commands: list[str] = field(default_factory=list)
    """All of them, to begin anew elsewhere."""
    scene: Scene | None = None
    """None while an answer is awaited."""
    error: str | None = None
    deaths: int = 0
    """Workers that died over the command that waits for an answer."""
    ended: bool = False
    """Nobody plays it any more."""


class _Worker:
    """A worker process, from the trainer's side."""

    def __init__(self) -> None:
        self.channel, theirs = Pipe()
        self.process = child.start(
            _MODULE,
            str(theirs.fileno()),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
        theirs.close()
        self.owner = os.getpid()
        self.ready = False
        self.games: dict[int, _State] = {}
        self.waiting: deque[_State] = deque()
        """Games that it owes an answer, in the order in which they asked."""

    def end(self) -> int:
        """Kill it, if it is ours. Returns its exit status."""
        self.channel.close()
        if self.owner == os.getpid():
            self.process.kill()
            return self.process.wait()
        child.disown(self.process)
        return 0


class WorkerPool:
    """A bounded number of worker processes; each starts when there is a first game for it.

    Threads take turns. What goes wrong half-way, an interrupt included, costs the worker concerned and nothing else.

    Args:
        size: Most workers at a time.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._workers: list[_Worker] = []
        self._numbers = itertools.count()
        self._failed_starts = 0
        self._ended: deque[_State] = deque()
        """Games nobody plays any more. Filled by finalisers, which run anywhere, so nothing is sent from there."""
        self._lock = threading.Lock()
        atexit.register(self.close)

    @property
    def processes(self) -> list[int]:
        """The workers' process ids."""
        return [worker.process.pid for worker in self._workers]

    def open(self, game: Game, kept: TranslationCache | None = None) -> "RemoteGame":
        """Begin a game; returns at once.

        Args:
            game: Which.
            kept: Where its translation may be found.
        """
        state = _State(number=next(self._numbers), game=game, kept=kept)
        with self._lock:
            self._sweep()
            self._place(state)
        return RemoteGame(self, state)

    def act(self, state: _State, command: str) -> None:
        """Give a command to a game; returns at once."""
        with self._lock:
            self._sweep()
            state.commands.append(command)
            state.scene = None
            if state.worker is None:
                self._place(state)
            else:
                self._ask(state, {"do": "act", "commands": [command]})

    def scene(self, state: _State) -> Scene:
        """Wait for a game's answer.

        Raises:
            ConfigurationError: The game cannot be played, or workers do not start or do not live.
        """
        with self._lock:
            while state.scene is None and state.error is None:
                if state.worker is None:
                    self._place(state)
                else:
                    self._take_answer(state.worker)
        if state.error is not None:
            raise ConfigurationError(state.error)
        assert state.scene is not None
        return state.scene

    def forget(self, state: _State) -> None:
        """Note that nobody plays a game any more; its worker is told with the next request."""
        state.ended = True
        self._ended.append(state)

    def close(self) -> None:
        """End all workers. Games go on in new ones, should anybody ask."""
        with self._lock:
            for worker in list(self._workers):
                self._bury(worker)

    def _place(self, state: _State) -> None:
        """Begin a game, or begin it anew up to its last command."""
        worker = state.worker = self._worker_for(state.game)
        worker.games[state.number] = state
        kept = None if state.kept is None else str(state.kept.folder)
        self._ask(state, {"do": "start", "game": asdict(state.game), "kept": kept, "commands": state.commands})

    def _worker_for(self, game: Game) -> _Worker:
        """One that plays the same game, so that it is translated once; else a new one; else that with fewest games."""
        for worker in self._workers:
            if any(state.game == game for state in worker.games.values()):
                return worker
        if len(self._workers) < self._size:
            self._workers.append(_Worker())
            return self._workers[-1]
        return min(self._workers, key=lambda worker: len(worker.games))

    def _ask(self, state: _State, request: Packet) -> None:
        worker = state.worker
        assert worker is not None
        try:
            worker.waiting.append(state)
            send(worker.channel, request | {"number": state.number})
        except OSError:
            self._replace(worker)
        except BaseException:
            self._bury(worker)
            raise

    def _take_answer(self, worker: _Worker) -> None:
        """Wait for whatever a worker says next."""
        try:
            if not worker.channel.poll(ANSWER_LIMIT):
                raise TimeoutError
            answer = receive(worker.channel)
            if answer == READY:
                worker.ready = True
                self._failed_starts = 0
                return
            state = worker.waiting[0]
            if answer.pop("number") != state.number:  # an interrupt has swallowed one
                raise EOFError
            worker.waiting.popleft()
        except (EOFError, OSError):
            self._replace(worker)
        except BaseException:
            self._bury(worker)
            raise
        else:
            state.deaths = 0
            state.error = answer.get("error")
            state.scene = None if state.error else Scene(**answer)

    def _bury(self, worker: _Worker) -> int:
        """End a worker; its games go on elsewhere when they are asked. Returns its exit status."""
        self._workers.remove(worker)
        for state in worker.games.values():
            state.worker = None
        return worker.end()

    def _replace(self, worker: _Worker) -> None:
        """Bury a worker that failed, and begin those of its games anew that wait for an answer."""
        status = self._bury(worker)
        waiting = [state for state in worker.waiting if not state.ended]
        if not worker.ready:
            self._failed_starts += 1
        elif waiting:
            waiting[0].deaths += 1
        for state in waiting:
            if self._failed_starts >= DEATHS_ALLOWED:
                state.error = (
                    f"The processes that play ALFWorld games do not start (exit status {status}): run "
                    f"`{' '.join(child.command(_MODULE))}` to see why, or set workers: 0."
                )
            elif state.deaths >= DEATHS_ALLOWED:
                state.error = (
                    f"{state.game.name}: {state.deaths} worker processes died over this game after "
                    f"{len(state.commands)} commands (exit status {status}): leave it out, or see that there is memory."
                )
            else:
                self._place(state)

    def _sweep(self) -> None:
        """Tell workers of games that nobody plays any more."""
        while self._ended:
            state = self._ended.popleft()
            worker = state.worker
            if worker is not None:
                del worker.games[state.number]
                state.worker = None
                try:
                    send(worker.channel, {"do": "close", "number": state.number})
                except OSError:
                    self._replace(worker)


class RemoteGame(RunningGame):
    """A game in a worker process; it ends when it is closed or forgotten. Made by `WorkerPool.open`.

    Args:
        pool: Whose workers play it.
        state: How the pool knows it.
    """

    def __init__(self, pool: WorkerPool, state: _State) -> None:
        self._pool, self._state = pool, state
        self._forget = weakref.finalize(self, pool.forget, state)

    def send(self, command: str) -> None:
        """Give a command; returns at once."""
        self._pool.act(self._state, command)

    def scene(self) -> Scene:
        """Wait for the scene that the last command led to."""
        return self._pool.scene(self._state)

    def close(self) -> None:
        """Let it end."""
        self._forget()


def worker_pool(size: int) -> WorkerPool:
    """The pool of this process with so many workers."""
    return _pool(size, os.getpid())


@cache
def _pool(size: int, process: int) -> WorkerPool:
    return WorkerPool(size)


def default_workers() -> int:
    """One for each core this process may count on beside others of the same run, at most 8."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    beside = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or "1"
    return min(8, max(1, cores // int(beside)))
