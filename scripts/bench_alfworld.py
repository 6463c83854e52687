"""How fast ALFWorld is played, beside the stock engine, in one run.

    python scripts/bench_alfworld.py                                          # generated games, a minute
    python scripts/bench_alfworld.py --games '$ALFWORLD_DATA/json_2.1.1/valid_seen'    # genuine ones as well

Both engines get the same commands: admissible ones at random. Times are of the processor, so that they mean something
on a busy machine too; those of episodes in lock step are wall time unless they are called otherwise. Writes
runs/bench_alfworld.json.
"""

import argparse
import json
import os
import random
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from lsm_lightning.tasks.alfworld import extra
from lsm_lightning.tasks.alfworld.engine import Engine, EnginePool, ground
from lsm_lightning.tasks.alfworld.files import find_games, read_game
from lsm_lightning.tasks.alfworld.game import Game
from lsm_lightning.tasks.alfworld.games import generate
from lsm_lightning.tasks.alfworld.running import LocalGame, RunningGame
from lsm_lightning.tasks.alfworld.translation import TranslationCache
from lsm_lightning.tasks.alfworld.workers import WorkerPool
from lsm_lightning.tasks.alfworld.world import WORLDS, WorldName

Row = dict[str, Any]


@dataclass
class Timer:
    """Seconds of a block, on the processor and on the wall."""

    cpu: float = 0.0
    wall: float = 0.0

    def __enter__(self) -> "Timer":
        self._start = time.process_time(), time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu += time.process_time() - self._start[0]
        self.wall += time.perf_counter() - self._start[1]


class Stock:
    """textworld's environment with alfworld's names, as alfworld's own loader puts them together."""

    def __init__(self) -> None:
        textworld, pddl = extra.load("textworld"), extra.load("textworld.envs.pddl")
        alfred = extra.load("alfworld.agents.environment.alfred_tw_env")
        infos = textworld.EnvInfos(won=True, admissible_commands=True)
        self._env = alfred.AlfredDemangler(pddl.PddlEnv(infos), shuffle=False)

    def start(self, game: Game) -> Sequence[str]:
        """Load and reset; returns the admissible commands."""
        arguments = sys.argv  # it replaces them
        self._env.load(game.to_dict())
        state = self._env.reset()
        sys.argv = arguments
        return state.admissible_commands

    def act(self, command: str) -> Sequence[str]:
        """Returns the admissible commands afterwards."""
        return self._env.step(command)[0].admissible_commands


class Ours:
    """The engine of this project, without anything kept."""

    def __init__(self) -> None:
        self._engine = Engine()

    def start(self, game: Game) -> Sequence[str]:
        """Ground and start; returns the admissible commands."""
        self._engine.start(ground(game))
        return self._engine.admissible

    def act(self, command: str) -> Sequence[str]:
        """Returns the admissible commands afterwards."""
        self._engine.act(command)
        return self._engine.admissible


def bench_engines(sets: dict[str, list[Game]], commands: int) -> list[Row]:
    """Both engines, on some games of each set."""
    rows = []
    for name, games in sets.items():
        for engine in (Stock(), Ours()):
            engine.start(games[0])  # what is parsed once a process
            begin, play = Timer(), Timer()
            for game in games:
                choose = random.Random(game.name)
                with begin:
                    admissible = engine.start(game)
                with play:
                    for _ in range(commands):
                        admissible = engine.act(choose.choice(admissible))
            total = commands * len(games)
            rows.append(
                {
                    "games": name,
                    "engine": type(engine).__name__.lower(),
                    "begin, ms": 1000 * begin.cpu / len(games),
                    "command, ms": 1000 * play.cpu / total,
                    "commands/s": total / play.cpu,
                    "by wall time": total / play.wall,
                }
            )
    return rows


def bench_beginning(sets: dict[str, list[Game]]) -> list[Row]:
    """The ways in which a game may begin."""
    rows = []
    engine = Engine()
    for name, games in sets.items():
        with tempfile.TemporaryDirectory() as folder:
            kept, pool = TranslationCache(Path(folder)), EnginePool()

            def milliseconds(prepare: Callable[[Game], Any], games: list[Game] = games) -> float:
                with Timer() as timer:
                    for game in games:
                        engine.start(prepare(game))
                return 1000 * timer.cpu / len(games)

            rows.append(
                {
                    "games": name,
                    "anew, ms": milliseconds(ground),
                    "anew and kept, ms": milliseconds(lambda game, kept=kept: ground(game, kept)),
                    "kept in a file, ms": milliseconds(lambda game, kept=kept: ground(game, kept)),
                    "in memory, ms": [milliseconds(pool.grounding) for _ in range(2)][-1],
                    "KB a file": sum(path.stat().st_size for path in kept.folder.iterdir()) / len(games) / 1000,
                }
            )
    return rows


def bench_generator(worlds: Sequence[WorldName], count: int, played: int) -> list[Row]:
    """Games made a second, and how many of them are won by their plan."""
    rows = []
    engine = Engine()
    for world in worlds:
        generate(0, 0, world)
        with Timer() as timer:
            games = [generate(1, index, world) for index in range(count)]
        won = 0
        for game in games[:played]:
            engine.start(ground(game))
            won_before = engine.won
            for command in game.plan:
                engine.act(command)
            won += engine.won and not won_before
        kinds = len({game.kind for game in games})
        rows.append(
            {"world": world, "games/s": count / timer.cpu, "task types": kinds, "plans played": played, "won": won}
        )
    return rows


def bench_workers(sets: dict[str, list[Game]], sizes: Sequence[int], samples: int, rounds: int) -> list[Row]:
    """Many episodes in lock step: each game by several players, so many commands each.

    Wall time until the workers have shown a first scene, until all games have begun, and for all commands; then the
    processor's time in this process and in the workers, their start included, and the workers' memory.
    """
    return [
        {"games": name, "workers": size, **_lock_step(games, size, samples, rounds)}
        for name, games in sets.items()
        for size in sizes
    ]


def _lock_step(games: list[Game], size: int, samples: int, rounds: int) -> Row:
    pool = WorkerPool(size) if size else None
    started = time.perf_counter()
    if pool:
        for game in [pool.open(game) for game in games[:size]]:
            game.scene()
    ready = time.perf_counter() - started
    before = time.process_time()

    def opened(game: Game) -> RunningGame:
        return pool.open(game) if pool else LocalGame(game)

    with Timer() as begin:
        episodes = [(opened(game), random.Random(n)) for game in games for n in range(samples)]
        for episode, _ in episodes:
            episode.scene()
    with Timer() as play:
        for _ in range(rounds):
            for episode, choose in episodes:
                episode.send(choose.choice(episode.scene().admissible))
            for episode, _ in episodes:
                episode.scene()
    own = time.process_time() - before
    memory = _resident(pool.processes) if pool else _resident([os.getpid()])
    for episode, _ in episodes:
        episode.close()
    earlier = resource.getrusage(resource.RUSAGE_CHILDREN)
    if pool:
        pool.close()
    later = resource.getrusage(resource.RUSAGE_CHILDREN)
    children = max(0.0, later.ru_utime + later.ru_stime - earlier.ru_utime - earlier.ru_stime)
    total = rounds * len(episodes)
    return {
        "first, s": ready if pool else 0.0,
        "begin, s": begin.wall,
        "play, s": play.wall,
        "commands/s": total / play.wall,
        "CPU here, s": own,
        "of workers, s": children,
        "MB": memory / 1e6,
    }


def _resident(processes: Sequence[int]) -> int:
    """Bytes of memory, where the system tells; of the workers, or of this process and all it did before."""
    total = 0
    for process in processes:
        try:
            total += int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except OSError:
            return 0
    return total


def show(title: str, rows: list[Row]) -> None:
    """Print rows of one shape as a table."""
    table = Table(title=title)
    for name in rows[0]:
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(*(f"{value:,.3g}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)


def spread(folder: str, count: int) -> list[Game]:
    """So many genuine games, from all over the folder."""
    paths = find_games(folder)
    return [read_game(paths[number * len(paths) // count]) for number in range(min(count, len(paths)))]


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the measurements, print them, write them down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--games", help="folder of genuine games")
    parser.add_argument("--worlds", nargs="*", choices=sorted(WORLDS), default=sorted(WORLDS), help="to generate")
    parser.add_argument("--count", type=int, default=8, help="games of each sort")
    parser.add_argument("--commands", type=int, default=20, help="commands a game")
    parser.add_argument("--samples", type=int, default=4, help="players of each game, with workers")
    parser.add_argument("--generate", type=int, default=600, help="games to generate")
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("runs/bench_alfworld.json"))
    options = parser.parse_args(arguments)
    sets = {world: [generate(0, index, world) for index in range(options.count)] for world in options.worlds}
    if options.games:
        sets["genuine"] = spread(options.games, options.count)
    results: dict[str, Any] = {"cores": os.cpu_count(), "load": os.getloadavg(), "python": sys.version.split()[0]}
    for title, run in {
        "The engines": lambda: bench_engines(sets, options.commands),
        "Beginning a game": lambda: bench_beginning(sets),
        "The generator": lambda: bench_generator(options.worlds, options.generate, min(60, options.generate)),
        "Episodes in lock step, wall time": lambda: bench_workers(
            sets, options.workers, options.samples, options.commands
        ),
    }.items():
        results[title] = run()
        show(title, results[title])
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
