"""Write generated ALFWorld games to a folder, in the layout of ALFWorld's own download.

    python scripts/make_alfworld_games.py --out games/test --split test --count 96 --verify

`AlfworldGames(test_games="games/test")` reads them, and so does alfworld itself (hence `traj_data.json`).
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.progress import track

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.tasks.alfworld import extra
from lsm_lightning.tasks.alfworld.engine import Engine, ground
from lsm_lightning.tasks.alfworld.files import FILE_NAME
from lsm_lightning.tasks.alfworld.games import Game, generate


def write(game: Game, out: Path) -> None:
    """Write one game to its own folder below `out`."""
    folder = out / game.name
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE_NAME).write_text(json.dumps(game.to_dict()), encoding="utf-8")
    task_type, wanted, _, target, _ = game.name.partition("/")[0].split("-")
    look = game.kind == "look"
    parameters = {
        "object_target": wanted,
        "parent_target": "" if look else target,
        "toggle_target": target if look else "",
        "mrecep_target": "",
        "object_sliced": False,
    }
    trajectory = {"task_type": task_type, "pddl_params": parameters}
    (folder / "traj_data.json").write_text(json.dumps(trajectory), encoding="utf-8")


def plan_wins(engine: Engine, game: Game) -> bool:
    """Whether the game is not won at the start, but once its plan was played."""
    engine.start(ground(game))
    won_at_start = engine.won
    for command in game.plan:
        engine.act(command)
    return engine.won and not won_at_start


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder to write to; new or empty")
    parser.add_argument("--count", type=int, default=96, help="how many games (default: 96)")
    parser.add_argument("--first", type=int, default=0, help="number of the first one (default: 0)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world", choices=("mini", "full"), default="mini")
    parser.add_argument("--split", choices=("train", "test"), default="train")
    parser.add_argument("--verify", action="store_true", help="play the plan of every game on the engine")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 if a plan does not win, 2 if something is missing."""
    options = parse(arguments)
    if options.out.exists() and any(options.out.iterdir()):
        print(f"{options.out} is not empty", file=sys.stderr)
        return 2
    try:
        extra.require()
    except ConfigurationError as error:
        print(error, file=sys.stderr)
        return 2
    engine = Engine() if options.verify else None
    failed = 0
    for index in track(range(options.first, options.first + options.count), description="games"):
        game = generate(options.seed, index, options.world, options.split)
        write(game, options.out)
        if engine is not None and not plan_wins(engine, game):
            print(f"{game.name}: its plan does not win", file=sys.stderr)
            failed += 1
    print(f"{options.count} games in {options.out}" + (f", {failed} without a winning plan" if options.verify else ""))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
