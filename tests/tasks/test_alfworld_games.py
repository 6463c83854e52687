"""Generated games: reproducible, solvable, and disjoint between the splits."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsm_lightning.tasks.alfworld.layout import APPLIANCES, KINDS, TASK_TYPES, Layout, Thing, draw
from lsm_lightning.tasks.alfworld.world import LAMP, OBJECTS, RECEPTACLES, WORLDS, fits

pytest.importorskip("textworld", reason="needs the alfworld extra")

from lsm_lightning.tasks.alfworld.engine import Engine, ground
from lsm_lightning.tasks.alfworld.game import Game
from lsm_lightning.tasks.alfworld.games import generate


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine()


@given(seed=st.integers(), kind=st.sampled_from(KINDS), world=st.sampled_from(sorted(WORLDS)))
def test_layout_keeps_the_rules_of_its_world(seed, kind, world):
    rules = WORLDS[world]
    layout = draw(Random(seed), kind, rules)
    fewest, most = rules.receptacles_in_room
    assert fewest <= len(layout.receptacles) <= most
    assert len(set(layout.receptacles)) == len(layout.receptacles)
    assert rules.objects_in_room[0] <= len(layout.places) <= rules.objects_in_room[1]
    assert all(place in layout.receptacles and fits(place.kind, thing.kind) for thing, place in layout.places.items())
    assert {place.kind for place in layout.receptacles} <= set(rules.receptacles)
    assert len(layout.things(layout.wanted)) >= (2 if kind == "two" else 1)
    assert len(layout.things(LAMP)) == (1 if kind == "look" else 0)
    if kind in APPLIANCES:
        assert Thing(APPLIANCES[kind], 1) in layout.receptacles
        assert kind in OBJECTS[layout.wanted].can


@given(seed=st.integers(), kind=st.sampled_from(KINDS))
def test_fingerprint_ignores_numbering_and_order_of_objects_only(seed, kind):
    layout = draw(Random(seed), kind, WORLDS["mini"])
    turned = dict(reversed(layout.places.items()))
    counts = Counter(thing.kind for thing in turned)
    renumbered = {Thing(t.kind, counts[t.kind] + 1 - t.number): place for t, place in turned.items()}
    same = {name: getattr(layout, name) for name in ("kind", "wanted", "target", "receptacles")}
    assert Layout(**same, places=renumbered).fingerprint() == layout.fingerprint()
    fewer = dict(list(layout.places.items())[1:])
    assert Layout(**same, places=fewer).fingerprint() != layout.fingerprint()


def test_worlds_have_the_advertised_size():
    mini, full = WORLDS["mini"], WORLDS["full"]
    assert (len(mini.rooms), len(mini.receptacles), len(mini.objects)) == (3, 14, 20)
    assert (len(full.rooms), len(full.receptacles), len(full.objects)) == (8, 29, 52)
    assert set(full.receptacles) == set(RECEPTACLES)


def assert_plans_win(engine: Engine, seed: int, world: str, split: str, count: int) -> None:
    seen = Counter()
    for index in range(count):
        game = generate(seed, index, world, split)
        engine.start(ground(game))
        assert not engine.won, game.name
        for command in game.plan:
            assert command in engine.admissible, game.name
            engine.act(command)
        assert engine.won, game.name
        seen[game.kind] += 1
    assert seen == dict.fromkeys(KINDS, count // len(KINDS))


@pytest.mark.parametrize(("world", "count"), [("mini", 84), ("full", 24)])
@pytest.mark.parametrize("split", ["train", "test"])
def test_plans_win_and_no_game_is_won_at_the_start(engine, world, count, split):
    assert_plans_win(engine, 11, world, split, count)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("world", ["mini", "full"])
@pytest.mark.parametrize("split", ["train", "test"])
def test_plans_of_very_many_games_win(engine, world, split):
    assert_plans_win(engine, 12, world, split, 288)


def test_a_game_is_a_function_of_its_arguments():
    assert generate(3, 7) == generate(3, 7)
    others = [generate(3, 8), generate(4, 7), generate(3, 7, "full"), generate(3, 7, split="test")]
    assert len({game.problem for game in [generate(3, 7), *others]}) == 5


def facts(game: Game) -> str:
    """The problem without its name, which differs between the splits anyway."""
    return game.problem.partition("(:domain")[2]


def test_train_and_test_games_are_disjoint_under_the_same_seed():
    train = {facts(generate(0, index)) for index in range(600)}
    test = {facts(generate(0, index, split="test")) for index in range(200)}
    assert len(train) == 600
    assert not train & test


@pytest.mark.parametrize("split", ["train", "test"])
def test_the_fingerprint_decides_the_split(split, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "lsm_lightning.tasks.alfworld.games.draw", lambda *arguments: drawn.append(draw(*arguments)) or drawn[-1]
    )
    for index in range(60):
        generate(5, index, split=split)
        assert (drawn[-1].fingerprint() % 4 == 0) == (split == "test")
    assert len(drawn) > 60, "some layouts were of the other split and drawn again"


def test_file_content_has_the_five_keys_and_the_task_sentence():
    game = generate(0, 1)
    content = game.to_dict()
    assert sorted(content) == ["grammar", "pddl_domain", "pddl_problem", "solvable", "walkthrough"]
    assert "UNKNOWN GOAL" not in content["grammar"]
    assert content["walkthrough"] == list(game.plan)
    assert game.name.startswith(TASK_TYPES[game.kind] + "-")
