"""The task: episodes, splits, and genuine games."""

import gc
import json
import sys
import tarfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.tasks.alfworld import AlfworldGames, PromptTemplate
from lsm_lightning.tasks.base import Task

pytest.importorskip("textworld", reason="needs the alfworld extra")

from lsm_lightning.tasks.alfworld.engine import EnginePool
from lsm_lightning.tasks.alfworld.files import FILE_NAME, find_games, kind_of, read_game
from lsm_lightning.tasks.alfworld.games import generate

ARCHIVE = Path(__file__).parents[3] / "shared" / "data" / "alfworld" / "games.tar.xz"
LONGEST_PROMPT = 4000
"""Characters; about a thousand tokens, while the paper's code allows 2048."""


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def say(command: str) -> str:
    return f"<think>well.</think><action>{command}</action>"


def test_plan_of_a_game_earns_the_reward():
    game = generate(0, 3)
    episode = AlfworldGames(workers=0).episode("train", 3)
    assert episode.kind == game.kind == "heat"
    for command in game.plan:
        assert not episode.done
        assert [message["role"] for message in episode.messages()] == ["user"]
        episode.step(say(command))
    assert (episode.done, episode.reward, episode.invalid_actions) == (True, 1.0, 0)
    with pytest.raises(RuntimeError, match="over"):
        episode.messages()


def test_unusable_answer_costs_a_turn_and_is_not_played():
    task = AlfworldGames(workers=0, max_turns=3, give_up_after=None)
    episode = task.episode("train", 0)
    first = episode.messages()[0]["content"]
    episode.step("no command at all")
    second = episode.messages()[0]["content"]
    assert "\nNothing happens.\n" in second
    assert second.splitlines()[-1] == first.splitlines()[-1], "the room is as it was"
    episode.step(say("go to the moon"))
    assert " > go to the moon\n" in episode.messages()[0]["content"]
    episode.step(say("look"))
    assert (episode.done, episode.reward, episode.invalid_actions) == (True, 0.0, 2)


def test_training_gives_up_after_unusable_answers_in_a_row_and_tests_never():
    task = AlfworldGames(workers=0, max_turns=6, give_up_after=2)
    training, test = task.episode("train", 0), task.episode("test", 0)
    for command in ("fly", "look", "fly", "fly"):
        training.step(say(command))
    assert (training.done, training.reward, training.invalid_actions) == (True, 0.0, 3)
    for _ in range(5):
        test.step("")
    assert not test.done
    test.step("")
    assert (test.done, test.invalid_actions) == (True, 6)


def test_history_and_paper_projection_are_settings():
    episode = AlfworldGames(workers=0, history=0, projection="paper").episode("train", 0)
    episode.step("I say <ACTION>LOOK</ACTION>")
    assert episode.invalid_actions == 0
    assert " > " not in episode.messages()[0]["content"]


def test_episodes_share_engines_and_give_them_back(monkeypatch):
    pool, task = EnginePool(), AlfworldGames(workers=0)
    monkeypatch.setattr("lsm_lightning.tasks.alfworld.running.engine_pool", lambda: pool)
    engines = [pool.acquire(), pool.acquire()]
    for engine in engines:
        pool.release(engine)
    closed, forgotten = task.episode("train", 0), task.episode("train", 1)
    assert len(pool._idle) == 2, "none is taken before the first turn"
    for episode in (closed, forgotten):
        episode.messages()
    assert not pool._idle
    closed.close()
    closed.close()
    del episode, forgotten
    gc.collect()
    assert sorted(map(id, pool._idle)) == sorted(map(id, engines)), "each is given back, and once"


def test_episodes_in_lock_step_do_not_disturb_each_other():
    task = AlfworldGames(workers=0)
    games = [generate(0, index) for index in (0, 6)]
    episodes = [task.episode("train", index) for index in (0, 6)]
    for commands in zip(*[game.plan for game in games], strict=False):
        for episode, command in zip(episodes, commands, strict=True):
            episode.step(say(command))
    assert [episode.reward for episode in episodes if episode.done]
    assert all(episode.invalid_actions == 0 for episode in episodes)


def test_generated_test_split_has_96_games_unless_told_otherwise():
    assert AlfworldGames().test_size() == 96
    assert AlfworldGames(test_size=12).test_size() == 12
    with pytest.raises(IndexError, match="12 test games"):
        AlfworldGames(test_size=12).episode("test", 12)


@pytest.mark.parametrize("setting", ["test_size", "max_turns", "give_up_after", "max_new_tokens"])
def test_numbers_out_of_range_are_refused(setting):
    with pytest.raises(ConfigurationError, match=rf"{setting}=0"):
        AlfworldGames(**{setting: 0})


@pytest.mark.parametrize("setting", ["history", "workers"])
def test_negative_numbers_are_refused(setting):
    with pytest.raises(ConfigurationError, match=rf"{setting}=-1"):
        AlfworldGames(**{setting: -1})


def instantiate(settings: dict) -> AlfworldGames:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--task", type=Task)
    config = {"task": {"class_path": "lsm_lightning.tasks.alfworld.AlfworldGames", "init_args": settings}}
    return parser.instantiate(parser.parse_object(config)).task


def test_own_prompt_comes_from_the_command_line_configuration():
    task = instantiate({"prompt": {"text": "Do: {task}\n{actions}", "hide": ["help"]}, "workers": 0})
    text = task.episode("train", 0).messages()[0]["content"]
    assert text.startswith("Do: put ")
    assert "inventory|look" in text


def test_admissible_commands_are_shown_if_the_prompt_has_a_place_for_them():
    blind = {"text": "{task} {observation}", "short_start": False}
    shown, hidden = (
        instantiate({"prompt": prompt, "workers": 0}).episode("train", 0).messages()[0]["content"]
        for prompt in ("compact", blind)
    )
    command = "go to nightstand 1"
    assert command in shown
    assert command not in hidden
    assert "nightstand 1" in hidden, "the start lists the places"


@pytest.mark.parametrize("history", [0, 1, 3])
def test_a_prompt_shows_so_many_earlier_turns(history):
    episode = instantiate({"history": history, "workers": 0}).episode("test", 0)
    for turn in range(5):
        assert episode.messages()[0]["content"].count(" > ") == min(turn, history)
        episode.step(say("look"))


@pytest.mark.parametrize("turns", [1, 4])
def test_an_episode_ends_after_so_many_turns(turns):
    episode = instantiate({"max_turns": turns, "workers": 0}).episode("test", 0)
    for _ in range(turns):
        assert not episode.done
        episode.step(say("look"))
    assert episode.done


def test_every_setting_is_explained_on_the_command_line(capsys):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(AlfworldGames, "task")
    text = " ".join(parser.format_help().split())
    for said in ("--task.history", "--task.max_turns", "with the admissible commands or without", "$ALFWORLD_DATA"):
        assert said in text


def test_unusable_answers_are_counted_by_kind():
    task = AlfworldGames(workers=0, give_up_after=None)
    episode = task.episode("train", 0)
    for answer in ("look", say(""), say("Look."), say("fly"), say("fly"), say("go to moon 1"), say("look"), say("fly")):
        episode.step(answer)
    expected = {"untagged": 1, "empty": 1, "spelling": 1, "unknown": 2, "repeated": 1, "inadmissible": 1}
    assert episode.invalid_kinds == expected
    assert episode.invalid_actions == 7
    assert set(expected) == set(task.invalid_kinds)


def test_unknown_prompt_field_in_a_configuration_is_named():
    with pytest.raises(ConfigurationError, match=r"unknown field \{goal\}; known are task"):
        instantiate({"prompt": {"text": "{goal}"}})
    with pytest.raises(ConfigurationError, match="unknown field"):
        AlfworldGames(prompt=PromptTemplate(text="{goal}"))


# Folders of games


def write(folder: Path, index: int, **changes: object) -> Path:
    """A generated game as a genuine file; a change to None leaves the key out."""
    game = generate(9, index)
    path = folder / game.name / FILE_NAME
    path.parent.mkdir(parents=True)
    content = {**game.to_dict(), **changes}
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))
    return path


def test_folder_of_games_is_played_in_a_new_order_each_time_round(tmp_path):
    for index in range(7):
        write(tmp_path, index)
    task = AlfworldGames(train_games=str(tmp_path), test_games=str(tmp_path), test_size=5)
    task.setup()
    names = [task._game("train", index).name for index in range(21)]
    rounds = [names[:7], names[7:14], names[14:]]
    assert all(len(set(played)) == 7 for played in rounds)
    assert len({tuple(played) for played in rounds}) == 3
    assert [task._game("train", index).name for index in range(21)] == names
    other = AlfworldGames(train_games=str(tmp_path), seed=1)
    other.setup()
    assert [other._game("train", index).name for index in range(7)] != rounds[0]
    assert task.test_size() == 5
    assert len({task._game("test", index).name for index in range(5)}) == 5


def test_game_read_back_from_a_file_plays_alike(tmp_path):
    path = write(tmp_path, 4)
    game, written = read_game(path), generate(9, 4)
    assert (game.kind, game.problem, game.plan) == (written.kind, written.problem, written.plan)


def test_type_is_read_from_traj_data_before_the_folder_name(tmp_path):
    path = write(tmp_path, 0)
    assert kind_of(path) == "place"
    path.with_name("traj_data.json").write_text(json.dumps({"task_type": "pick_two_obj_and_place"}))
    assert kind_of(path) == "two"


def test_a_folder_may_be_named_by_an_environment_variable(tmp_path, monkeypatch):
    write(tmp_path / "json_2.1.1" / "train", 0)
    task = AlfworldGames(train_games="$ALFWORLD_DATA/json_2.1.1/train")
    monkeypatch.delenv("ALFWORLD_DATA", raising=False)
    with pytest.raises(ConfigurationError, match="ALFWORLD_DATA is not set"):
        task.setup()
    monkeypatch.setenv("ALFWORLD_DATA", str(tmp_path))
    task.setup()
    assert task._game("train", 0).problem == generate(9, 0).problem


@pytest.mark.parametrize("split", ["train", "test"])
def test_translations_are_kept_of_games_in_folders_only(tmp_path, split):
    folder, cache = tmp_path / "games", tmp_path / "cache"
    write(folder, 0)
    settings = {"cache_folder": str(cache), "workers": 0}
    AlfworldGames(**settings).episode(split, 0).messages()
    assert not cache.exists()
    AlfworldGames(**{f"{split}_games": str(folder)}, **settings).episode(split, 0).messages()
    assert len(list(cache.iterdir())) == 1


def test_missing_and_empty_folders_are_refused(tmp_path):
    with pytest.raises(ConfigurationError, match=r"nowhere is no folder"):
        AlfworldGames(train_games=str(tmp_path / "nowhere")).setup()
    with pytest.raises(ConfigurationError, match=r"no playable game.tw-pddl below .*there is none"):
        AlfworldGames(test_games=str(tmp_path)).setup()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "holds no JSON object"),
        ("{}", "lacks pddl_domain, grammar, pddl_problem, walkthrough, solvable"),
    ],
)
def test_file_that_is_no_game_is_named(tmp_path, content, reason):
    write(tmp_path, 0)
    path = write(tmp_path, 1)
    path.write_text(content)
    with pytest.raises(ConfigurationError) as error:
        AlfworldGames(train_games=str(tmp_path)).setup()
    assert str(path) in str(error.value)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"grammar": None}, "lacks grammar"),
        ({"pddl_problem": 3}, "pddl_problem is no text"),
        ({"walkthrough": "look"}, "walkthrough is no list"),
        ({"solvable": False}, "1 marked unsolvable"),
    ],
)
def test_game_with_a_bad_value_is_named(tmp_path, changes, reason):
    path = write(tmp_path, 0, **changes)
    with pytest.raises(ConfigurationError) as error:
        AlfworldGames(train_games=str(tmp_path)).setup()
    assert str(path) in str(error.value)
    assert reason in str(error.value)


def test_unsolvable_games_among_others_are_left_out_with_a_warning(tmp_path):
    good, bad = write(tmp_path, 0), write(tmp_path, 1, solvable=False)
    with pytest.warns(UserWarning, match="1 marked unsolvable") as warned:
        assert find_games(str(tmp_path)) == [good]
    assert str(bad) in str(warned[0].message)


def test_task_of_an_unknown_type_is_refused(tmp_path):
    path = tmp_path / "juggle_three-Apple-None-Fridge-1" / "trial_1" / FILE_NAME
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(generate(0, 0).to_dict()))
    with pytest.raises(ConfigurationError, match="'juggle_three' is none of pick_and_place_simple"):
        find_games(str(tmp_path))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("changes", [{"pddl_problem": "(define"}, {"pddl_domain": ""}, {"grammar": "nonsense"}])
def test_text_the_engine_cannot_load_is_named_when_it_is_played(tmp_path, changes, workers):
    path = write(tmp_path, 0, **changes)
    arguments = sys.argv
    episode = AlfworldGames(train_games=str(tmp_path), workers=workers).episode("train", 0)
    with pytest.raises(ConfigurationError) as error:
        episode.messages()
    assert f"{path}: the engine cannot load this game" in str(error.value)
    assert sys.argv is arguments


def test_more_test_games_than_there_are_is_refused(tmp_path):
    write(tmp_path, 0)
    with pytest.raises(ConfigurationError, match=r"test_size=2, but .* holds 1 games"):
        AlfworldGames(test_games=str(tmp_path), test_size=2).setup()


# Genuine games


@pytest.fixture(scope="module")
def genuine(tmp_path_factory) -> Path:
    """One genuine game of each type."""
    if not ARCHIVE.is_file():
        pytest.skip("the archive of genuine games is not there")
    folder = tmp_path_factory.mktemp("genuine")
    with tarfile.open(ARCHIVE) as archive:
        by_type = {
            Path(member.name).parts[2].partition("-")[0]: member
            for member in archive
            if "/valid_seen/" in member.name and member.name.endswith(FILE_NAME)
        }
        for member in by_type.values():
            archive.extract(member, folder, filter="data")
    return folder


def assert_won_by_their_plans(paths: Sequence[Path]) -> Counter[str]:
    """By the paper's prompt and projection, as an episode plays them. Returns how many there were of each type."""
    kinds: Counter[str] = Counter()
    for path in paths:
        game = read_game(path)
        task = AlfworldGames(test_games=str(path.parent), prompt="paper", projection="paper", max_turns=50, workers=0)
        episode = task.episode("test", 0)
        for command in game.plan:
            (message,) = episode.messages()
            assert len(message["content"]) <= LONGEST_PROMPT, path
            episode.step(say(command))
        assert (episode.done, episode.reward, episode.invalid_actions) == (True, 1.0, 0), path
        kinds[game.kind] += 1
    return kinds


def test_stored_plans_of_genuine_games_win(genuine):
    kinds = assert_won_by_their_plans(find_games(str(genuine)))
    assert kinds == dict.fromkeys(("place", "look", "clean", "heat", "cool", "two"), 1)


@pytest.mark.slow
def test_stored_plans_of_all_genuine_test_games_win(tmp_path):
    if not ARCHIVE.is_file():
        pytest.skip("the archive of genuine games is not there")
    with tarfile.open(ARCHIVE) as archive:
        members = [m for m in archive if "/valid_seen/" in m.name and m.name.endswith(FILE_NAME)]
        archive.extractall(tmp_path, members, filter="data")
    assert assert_won_by_their_plans(find_games(str(tmp_path))).total() == 140


def test_genuine_test_games_are_all_of_the_folder(genuine):
    task = AlfworldGames(test_games=str(genuine), prompt="paper", workers=1)
    assert task.test_size() == 6
    episode = task.episode("test", 0)
    assert "Your task is to: " in episode.messages()[0]["content"]
    episode.close()
