"""The expert wins from what a prompt shows, and its demonstrations read as an episode does."""

from itertools import pairwise

import pytest

pytest.importorskip("textworld", reason="needs the alfworld extra")

from lsm_lightning.tasks.alfworld import AlfworldGames
from lsm_lightning.tasks.alfworld.demonstrations import MAX_TURNS, demonstrations, invalid_action_rows
from lsm_lightning.tasks.alfworld.engine import NOTHING_HAPPENS, Engine, ground
from lsm_lightning.tasks.alfworld.expert import decide
from lsm_lightning.tasks.alfworld.games import generate
from lsm_lightning.tasks.alfworld.play import Play
from lsm_lightning.tasks.alfworld.prompts import PROMPTS, render
from lsm_lightning.tasks.alfworld.running import EngineGame


def shown(prompt: str) -> tuple:
    """What stands in a compact prompt, so that a test can give the expert no more than that."""
    task, *history, observation, actions = prompt.split("\n")
    pairs = [tuple(line.split(" > ")) for line in history]
    return task, pairs, observation, actions.split("|")


def turns_to_win(engine: Engine, index: int, world: str, limit: int) -> int:
    """Turns the expert needed, `limit + 1` if it did not win; it reads the prompt."""
    play = Play(EngineGame(engine, ground(generate(77, index, world))))
    while not play.won and play.taken < limit:
        compact = PROMPTS["compact"]
        prompt = render(compact, play.task, play.taken, play.history, play.observation, play.admissible)
        assert play.act(decide(*shown(prompt)).action)
    return play.taken if play.won else limit + 1


def test_expert_wins_mini_games_within_thirty_turns():
    engine = Engine()
    turns = [turns_to_win(engine, index, "mini", 30) for index in range(30)]
    assert sum(turn <= 30 for turn in turns) >= 0.95 * len(turns), turns


def test_expert_wins_full_games_within_fifty_turns():
    engine = Engine()
    turns = [turns_to_win(engine, index, "full", 50) for index in range(12)]
    assert sum(turn <= 50 for turn in turns) >= 11, turns


@pytest.fixture(scope="module")
def rows():
    return list(demonstrations(5, 0, 12))


def test_demonstrations_are_reproducible_and_split_at_any_game(rows):
    again = [*demonstrations(5, 0, 5), *demonstrations(5, 5, 7)]
    assert again == rows


def test_demonstrations_are_bounded_and_labelled_by_the_expert(rows):
    assert all(row.taken < MAX_TURNS and len(row.history) <= 2 for row in rows)
    for row in rows:
        assert (row.thought, row.action) == decide(row.task, row.history, row.observation, row.admissible)
        assert row.action in row.admissible


def played(rows):
    """The command after each turn but the last of its game, with the expert's own."""
    return [(later.history[-1][1], row.action) for row, later in pairwise(rows) if later.taken > row.taken]


def test_every_fourth_game_follows_the_expert_and_the_others_stray():
    assert all(done == meant for done, meant in played(list(demonstrations(5, 4, 1, random_share=1.0))))
    assert all(done == meant for done, meant in played(list(demonstrations(5, 1, 3, random_share=0.0))))
    strays = [done != meant for done, meant in played(list(demonstrations(5, 1, 3, random_share=1.0)))]
    assert sum(strays) > len(strays) / 2


def test_prompts_of_demonstrations_equal_those_of_an_episode():
    rows = list(demonstrations(0, 4, 1, random_share=0.0))
    episode = AlfworldGames(seed=0, workers=0).episode("train", 4)
    for row in rows:
        assert episode.messages() == [{"role": "user", "content": row.prompt(PROMPTS["compact"])}]
        episode.step(row.answer())
    assert episode.done
    assert episode.reward == 1.0


def test_rows_after_invalid_commands_are_what_the_game_would_show(rows):
    extra = list(invalid_action_rows(rows, seed=1, share=0.5))
    assert extra == list(invalid_action_rows(rows, seed=1, share=0.5))
    assert 0.4 * len(rows) < len(extra) < 1.2 * len(rows)
    for row in extra:
        assert row.observation == NOTHING_HAPPENS
        assert row.history[-1][1] not in row.admissible
        assert row.action in row.admissible


def test_expert_goes_on_after_an_invalid_command():
    play = Play(EngineGame(Engine(), ground(generate(77, 3))))
    while not play.won:
        assert play.taken < 60
        if play.observation != NOTHING_HAPPENS:
            assert not play.act("go to the moon")
        play.act(decide(play.task, play.history, play.observation, play.admissible).action)
