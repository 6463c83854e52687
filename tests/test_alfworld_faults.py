"""A run whose ALFWorld workers die: it goes on as if nothing had happened, or stops with the name of the game."""

import json
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from torch import equal

pytest.importorskip("textworld", reason="needs the alfworld extra")

from processes import LIGHTNINGS_ADVICE

from lsm_lightning.rollout.collect import Player
from lsm_lightning.tasks.alfworld import AlfworldGames, workers
from lsm_lightning.tasks.alfworld.files import FILE_NAME
from lsm_lightning.tasks.alfworld.games import generate
from lsm_lightning.tasks.alfworld.prompts import PROJECTIONS, Projected
from lsm_lightning.tasks.alfworld.translation import TranslationCache, _digest, _write, translate

pytestmark = LIGHTNINGS_ADVICE
COMMANDS = ("look", "inventory")
"""Every game takes them at any time, and answers differently."""


@pytest.fixture
def fit(settings, run, tmp_path, monkeypatch) -> Callable[..., tuple[int, Path]]:
    """Trains on ALFWorld; returns the exit status and the run's folder. Whatever a tiny model says is a command."""
    monkeypatch.setitem(
        PROJECTIONS, "strict", lambda answer: Projected(COMMANDS[len(answer) % len(COMMANDS)], tagged=True)
    )

    def fit(name: str, steps: int, **init_args: Any) -> tuple[int, Path]:
        task = {"prompt": {"text": "{step}: {observation:.40}"}, "max_turns": 3, "max_new_tokens": 5, "workers": 1}
        settings["data"]["tasks"] = {
            "alfworld": {
                "class_path": "lsm_lightning.tasks.alfworld.AlfworldGames",
                "init_args": task | {"cache_folder": str(tmp_path / "cache"), "history": 0} | init_args,
            }
        }
        settings["model"]["teachers"] = {"alfworld": settings["model"]["teachers"].popitem()[1]}
        settings["data"]["prompts_per_step"] = 1
        settings["trainer"] |= {"max_steps": steps, "default_root_dir": str(tmp_path / name)}
        path = tmp_path / f"{name}.yaml"
        path.write_text(yaml.safe_dump(settings))
        more = ("--summary.evaluate", "false", "--probing.texts", "0")  # a probe plays too
        return run("fit", "--config", str(path), *more), tmp_path / name

    return fit


def test_a_run_goes_on_when_its_workers_are_killed_in_every_turn(fit, monkeypatch):
    status, undisturbed = fit("undisturbed", 1)
    assert status == 0
    right, killed = Player.read, []

    def read(self: Player, *arguments: Any) -> Any:
        for pid in workers.worker_pool(1).processes:
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
        return right(self, *arguments)

    monkeypatch.setattr(Player, "read", read)
    status, disturbed = fit("disturbed", 1)
    assert status == 0
    assert len(set(killed)) >= 3
    ours, theirs = (load_file(folder / "student" / "model.safetensors") for folder in (undisturbed, disturbed))
    assert all(equal(ours[name], theirs[name]) for name in ours)


def test_a_run_stops_with_the_name_of_a_deadly_game_and_a_checkpoint(fit, tmp_path, monkeypatch, capfd):
    """The planner library ends its process where it does not understand a translation."""
    monkeypatch.setattr(workers, "DEATHS_ALLOWED", 2)
    games, kept = tmp_path / "games", TranslationCache(tmp_path / "cache")
    for index in range(2):
        game = generate(9, index)
        path = games / game.name / FILE_NAME
        path.parent.mkdir(parents=True)
        path.write_text(json.dumps(game.to_dict()))
    task = AlfworldGames(train_games=str(games))
    task.setup()
    second = task._game("train", 1)
    kept.translation(second)
    _write(kept.folder / f"{_digest(second)}.json.gz", replace(translate(second), sas="nonsense"))
    status, folder = fit("deadly", 2, train_games=str(games))
    assert status == 2
    (told,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert second.name in told
    assert "2 worker processes died over this game" in told
    assert (folder / "checkpoints" / "last.ckpt").exists()
