"""`scripts/make_alfworld_games.py` writes folders that the task and alfworld itself can read."""

import importlib.util
import json
from pathlib import Path

import pytest

pytest.importorskip("textworld", reason="needs the alfworld extra")

from lsm_lightning.tasks.alfworld import AlfworldGames
from lsm_lightning.tasks.alfworld.engine import Engine
from lsm_lightning.tasks.alfworld.files import find_games, read_game
from lsm_lightning.tasks.alfworld.games import generate

SCRIPT = Path(__file__).parents[2] / "scripts" / "make_alfworld_games.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("make_alfworld_games", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_written_games_are_read_back_and_verified(script, tmp_path, capsys):
    out = tmp_path / "games"
    assert script.main(["--out", str(out), "--count", "6", "--split", "test", "--verify"]) == 0
    assert "6 games in" in capsys.readouterr().out
    read = {read_game(path).problem for path in find_games(str(out))}
    assert read == {generate(0, index, split="test").problem for index in range(6)}
    assert AlfworldGames(test_games=str(out)).test_size() == 6


def test_traj_data_holds_what_alfworlds_own_expert_reads(script, tmp_path):
    game = generate(0, 1)
    script.write(game, tmp_path)
    content = json.loads((tmp_path / game.name / "traj_data.json").read_text())
    assert content["task_type"] == "look_at_obj_in_light"
    assert content["pddl_params"]["toggle_target"] == "DeskLamp"
    assert content["pddl_params"]["parent_target"] == ""


def test_folder_in_use_is_refused(script, tmp_path, capsys):
    (tmp_path / "mine.txt").touch()
    assert script.main(["--out", str(tmp_path), "--count", "1"]) == 2
    assert "is not empty" in capsys.readouterr().err


def test_plan_that_does_not_win_is_told(script):
    game = generate(0, 0)
    shorter = type(game)(**{**{name: getattr(game, name) for name in game.__slots__}, "plan": game.plan[:-1]})
    assert script.plan_wins(Engine(), game)
    assert not script.plan_wins(Engine(), shorter)
