"""The engine: the same texts as textworld's own, and no traces in the process."""

import os
import random
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

pytest.importorskip("textworld", reason="needs the alfworld extra")

from lsm_lightning.tasks.alfworld import extra
from lsm_lightning.tasks.alfworld.engine import NOTHING_HAPPENS, Engine, EnginePool, ground
from lsm_lightning.tasks.alfworld.facts import Facts
from lsm_lightning.tasks.alfworld.files import FILE_NAME, read_game
from lsm_lightning.tasks.alfworld.game import Game
from lsm_lightning.tasks.alfworld.games import generate
from lsm_lightning.tasks.alfworld.grammar import Scope, TextGrammar, _symbols

REPOSITORY = Path(__file__).parents[2]
ARCHIVE = REPOSITORY.parent / "shared" / "data" / "alfworld" / "games.tar.xz"


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine()


@pytest.fixture(scope="module")
def stock():
    """textworld's environment with alfworld's names, as alfworld's own loader puts them together."""
    arguments = sys.argv
    textworld, pddl = extra.load("textworld"), extra.load("textworld.envs.pddl")
    alfred = extra.load("alfworld.agents.environment.alfred_tw_env")
    infos = textworld.EnvInfos(won=True, admissible_commands=True)
    yield alfred.AlfredDemangler(pddl.PddlEnv(infos), shuffle=False)
    sys.argv = arguments


def assert_same_play(engine, stock, game, steps):
    """Plan first, so that all the texts of the task come up, then at random, with commands the game does not know."""
    choose = random.Random(game.name)
    stock.load(game.to_dict())
    state, text = stock.reset(), engine.start(ground(game))
    assert state.feedback == text
    for step in range(steps):
        known = step < len(game.plan)
        command = game.plan[step] if known else choose.choice([*engine.admissible, "", "go to moon 1", " look "])
        state, _, _ = stock.step(command)
        assert state.feedback == engine.act(command)
        assert list(state.admissible_commands) == list(engine.admissible)
        assert bool(state["won"]) == engine.won


@pytest.mark.parametrize("index", range(6))
def test_texts_equal_the_stock_engines(engine, stock, index):
    assert_same_play(engine, stock, generate(21, index), steps=20)


def test_texts_equal_the_stock_engines_in_a_full_room(engine, stock):
    assert_same_play(engine, stock, generate(21, 4, "full"), steps=20)


def unpack(folder: Path, count: int) -> list[Game]:
    """So many genuine games from all over the archive, whose members are sorted by task type."""
    if not ARCHIVE.is_file():
        pytest.skip("the archive of genuine games is not there")
    with tarfile.open(ARCHIVE) as archive:
        members = [member for member in archive if member.name.endswith(FILE_NAME)]
        chosen = [members[number * len(members) // count] for number in range(count)]
        archive.extractall(folder, chosen, filter="data")
    return [read_game(folder / member.name) for member in chosen]


def test_texts_equal_the_stock_engines_in_a_genuine_game(engine, stock, tmp_path):
    (game,) = unpack(tmp_path, 1)
    assert_same_play(engine, stock, game, steps=12)


@pytest.mark.slow
def test_texts_equal_the_stock_engines_on_a_thousand_random_steps_of_genuine_games(engine, stock, tmp_path):
    games = unpack(tmp_path, 25)
    assert len({game.kind for game in games}) == 6
    for game in games:
        assert_same_play(engine, stock, game, steps=len(game.plan) + 40)


def test_the_comparison_can_fail(engine, stock, monkeypatch):
    monkeypatch.setattr(TextGrammar, "_listed", lambda self, items, scope: items)
    with pytest.raises(AssertionError):
        assert_same_play(engine, stock, generate(21, 0), steps=1)


def test_a_task_sentence_of_any_letters_is_told(engine):
    game = generate(0, 0)
    sentence = game.grammar.partition("Your task is to: ")[2].partition(".")[0]
    changed = type(game)(
        **{
            **{name: getattr(game, name) for name in game.__slots__},
            "grammar": game.grammar.replace(sentence, "put it there, \\u00e9l\\u00e8ve"),
        }
    )
    assert engine.start(ground(changed)).endswith("Your task is to: put it there, élève.")


def test_engine_starts_over_and_plays_another_game(engine):
    first, second = ground(generate(0, 0)), ground(generate(0, 1))
    start = engine.start(first)
    engine.act(engine.admissible[0])
    assert engine.start(second) != start
    assert engine.start(first) == start


def test_engines_do_not_disturb_each_other(engine):
    grounding, other = ground(generate(0, 3)), Engine()
    engine.start(grounding)
    before = list(engine.admissible)
    other.start(grounding)
    other.act("go to fridge 1")
    assert list(engine.admissible) == before


def test_unknown_command_changes_nothing(engine):
    engine.start(ground(generate(0, 0)))
    before = list(engine.admissible)
    assert engine.act("fly away") == NOTHING_HAPPENS
    assert list(engine.admissible) == before


def test_arguments_of_the_process_stay():
    arguments = sys.argv
    ground(generate(0, 2))
    assert sys.argv is arguments


def test_expressions_of_a_grammar_run_no_code():
    symbols = TextGrammar({})
    scope = Scope(Facts(None), {}, {}, {})
    with pytest.raises(ValueError, match="none of ALFWorld's"):
        symbols.derive("{__import__('os').getcwd()}", scope)
    assert _symbols("plain")[0].symbol == "plain"


def test_pool_reuses_engines_and_forgets_old_groundings():
    pool, games = EnginePool(groundings=2), [generate(0, index) for index in range(3)]
    engine = pool.acquire()
    pool.release(engine)
    assert pool.acquire() is engine
    first = pool.grounding(games[0])
    assert pool.grounding(generate(0, 0)) is first
    pool.grounding(games[1])
    assert pool.grounding(games[0]) is first, "used again, so not the oldest"
    pool.grounding(games[2])
    assert pool.grounding(games[0]) is first
    assert len(pool._groundings) == 2


def run_python(code: str, **environment: str) -> None:
    kept = {key: value for key, value in os.environ.items() if key != "ALFWORLD_DATA"}
    subprocess.run([sys.executable, "-c", code], check=True, cwd=REPOSITORY, env={**kept, **environment})


def test_playing_leaves_no_folder_no_variable_and_no_heavy_import(tmp_path):
    code = """
import os, sys
from lsm_lightning.tasks.alfworld.engine import Engine, ground
from lsm_lightning.tasks.alfworld.facts import Facts
from lsm_lightning.tasks.alfworld.files import FILE_NAME, read_game
from lsm_lightning.tasks.alfworld.game import Game
from lsm_lightning.tasks.alfworld.games import generate
Engine().start(ground(generate(0, 0)))
assert "ALFWORLD_DATA" not in os.environ
assert not {"spacy", "ai2thor", "torchvision"} & set(sys.modules)
"""
    run_python(code, HOME=str(tmp_path), PYTHONDONTWRITEBYTECODE="1")
    assert not list(tmp_path.rglob("*alfworld*"))


def test_without_the_extra_the_package_imports_and_setup_says_what_to_install():
    code = """
import sys
sys.modules.update(alfworld=None, textworld=None, fast_downward=None)
from lsm_lightning.errors import ConfigurationError
from lsm_lightning.tasks.alfworld import AlfworldGames
try:
    AlfworldGames().setup()
except ConfigurationError as error:
    assert 'pip install "lsm-lightning[alfworld]"' in str(error), error
    assert "C++ compiler" in str(error), error
else:
    raise AssertionError("setup went through")
"""
    run_python(code)
