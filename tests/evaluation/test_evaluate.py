import sys

import pytest
from scripted import EchoGames, ScriptedEngine

from lsm_lightning.evaluation import evaluate
from lsm_lightning.rollout import Sampling
from lsm_lightning.rollout.collect import Player
from lsm_lightning.types import Completion


@pytest.fixture
def player(student_tokenizer) -> Player:
    """Says one of a hundred words, by the seed."""

    def answer(request):
        ids = [200 + request.seed % 100, 1]
        return Completion(ids=ids, log_probs=[0.0, 0.0], truncated=False)

    return Player(
        engine=ScriptedEngine(answer), tokenizer=student_tokenizer, turn_end=frozenset({1}), sampling=Sampling()
    )


def test_one_episode_of_each_problem_in_their_order(player):
    played = evaluate(EchoGames(), player, indices=[3, 0, 4], seed=0)
    assert [trajectory.kind for trajectory in played] == ["apple", "apple", "river"]
    assert [len(trajectory.turns) for trajectory in played] == [3, 2, 2]


def test_how_many_play_at_once_changes_nothing(player, monkeypatch):
    module = sys.modules["lsm_lightning.evaluation.evaluate"]
    whole, told = evaluate(EchoGames(), player, indices=range(7), seed=1), []
    monkeypatch.setattr(module, "EPISODES_AT_ONCE", 3)
    parts = evaluate(EchoGames(), player, indices=range(7), seed=1, on_progress=lambda *done: told.append(done))
    assert parts == whole
    assert told[-1] == (7, 7)
    assert [finished for finished, _ in told] == sorted(finished for finished, _ in told)


def test_the_draws_depend_on_seed_and_problem_only(player):
    all_of_them = evaluate(EchoGames(), player, indices=range(6), seed=1)
    assert evaluate(EchoGames(), player, indices=[4], seed=1) == [all_of_them[4]]
    assert evaluate(EchoGames(), player, indices=[4], seed=2) != [all_of_them[4]]
