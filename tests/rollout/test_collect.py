from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from fake_vllm import serving
from scripted import EchoEpisode, ScriptedEngine
from tiny import STUDENT_END

from lsm_lightning.pretrained import load_model, render
from lsm_lightning.rollout import LocalEngine, Sampling, VLLMEngine
from lsm_lightning.rollout.base import Request
from lsm_lightning.rollout.collect import Player, collect
from lsm_lightning.seeds import seed_of
from lsm_lightning.serving import Servers
from lsm_lightning.tasks.base import Episode
from lsm_lightning.types import Completion, Message, Trajectory

LENGTHS = [2, 1, 3]


def player_saying(tokenizer, text_of) -> Player:
    end = tokenizer.convert_tokens_to_ids(STUDENT_END)

    def answer(request: Request) -> Completion:
        ids = [*tokenizer(text_of(request), add_special_tokens=False)["input_ids"], end]
        return Completion(ids=ids, log_probs=[0.0] * len(ids), truncated=False)

    return Player(engine=ScriptedEngine(answer), tokenizer=tokenizer, turn_end=frozenset({end}), sampling=Sampling())


@pytest.fixture
def player(student_tokenizer) -> Player:
    """Says apple, always."""
    return player_saying(student_tokenizer, lambda request: "apple")


def games() -> list[EchoEpisode]:
    return [EchoEpisode(word, turns) for word, turns in zip(("apple", "river", "stone"), LENGTHS, strict=True)]


def play(episodes: list[EchoEpisode], player: Player, **options) -> list[Trajectory]:
    keyed = [(("run", number), episode) for number, episode in enumerate(episodes)]
    return collect(keyed, player, max_new_tokens=8, **options)


def test_trajectories_tell_invalid_actions_by_kind(player):
    trajectories = play(games(), player)
    assert [t.invalid_kinds for t in trajectories] == [{}, {"another": 1}, {"another": 3}]
    assert [t.invalid_actions for t in trajectories] == [0, 1, 3]


def test_episodes_whose_answers_come_together_ask_together(player):
    play(games(), player)
    assert [len(call) for call in player.engine.calls] == [3, 2, 1]


def test_trajectories_come_in_the_order_of_the_episodes(player):
    trajectories = play(games(), player)
    assert [t.kind for t in trajectories] == ["apple", "river", "stone"]
    assert [len(t.turns) for t in trajectories] == LENGTHS
    assert [t.reward for t in trajectories] == [1.0, 0.0, 0.0]


def test_every_turn_holds_what_was_asked_and_what_was_said(player, student_tokenizer):
    episodes = games()
    for trajectory, episode in zip(play(episodes, player), episodes, strict=True):
        assert [turn.answer for turn in trajectory.turns] == episode.answers == ["apple"] * len(trajectory.turns)
        for turn in trajectory.turns:
            assert [list(turn.prompt.ids)] == render(student_tokenizer, [list(turn.prompt.messages)])
    assert "You said nothing" in str(episodes and play(games(), player)[0].turns[0].prompt.messages)
    assert "You said apple" in str(play(games(), player)[0].turns[1].prompt.messages)


def test_an_answer_in_text_has_no_end_of_turn_and_a_truncated_one_all_its_tokens(student_tokenizer):
    ids = student_tokenizer("apple river", add_special_tokens=False)["input_ids"]
    engine = ScriptedEngine(lambda request: Completion(ids=ids, log_probs=[0.0] * len(ids), truncated=True))
    player = Player(engine=engine, tokenizer=student_tokenizer, turn_end=frozenset({1}), sampling=Sampling())
    assert play(games(), player)[0].turns[0].answer == "apple river"


def test_seeds_come_from_the_key_and_the_number_of_the_turn(player):
    play(games(), player)
    for turn, call in enumerate(player.engine.calls):
        going = [number for number, length in enumerate(LENGTHS) if turn < length]
        assert [request.seed for request in call] == [seed_of("run", number, turn) for number in going]


def test_an_episode_does_not_depend_on_the_others(student_tokenizer):
    """What is said is a function of prompt and seed, so it is the same alone and in company."""
    player = player_saying(student_tokenizer, lambda request: f"{request.seed % 97} {sum(request.ids) % 97}")
    together = play(games(), player)
    for number, episode in enumerate(games()):
        (alone,) = collect([(("run", number), episode)], player, max_new_tokens=8)
        assert alone == together[number]


def test_every_episode_is_closed(player):
    episodes = games()
    play(episodes, player)
    assert all(episode.closed for episode in episodes)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_every_episode_is_closed_also_when_an_error_ends_the_play(student_tokenizer, error):
    def fail(request: Request) -> str:
        if "stone" in student_tokenizer.decode(request.ids):
            raise error
        return "apple"

    episodes = games()
    with pytest.raises(error):
        play(episodes, player_saying(student_tokenizer, fail))
    assert all(episode.closed for episode in episodes)
    assert not any(episode.done for episode in episodes)


def test_progress_is_told_as_episodes_end(player):
    told: list[tuple[int, int]] = []
    play(games(), player, on_progress=lambda finished, total: told.append((finished, total)))
    assert told == [(0, 3), (1, 3), (2, 3), (3, 3)]


def test_episodes_can_be_left_off_after_some_turns(player):
    episodes = games()
    trajectories = play(episodes, player, max_turns=2)
    assert [len(t.turns) for t in trajectories] == [2, 1, 2]
    assert [t.unfinished for t in trajectories] == [False, False, True]
    assert all(episode.closed for episode in episodes)
    assert trajectories[2].turns == play(games(), player)[2].turns[:2]


def test_no_episode_is_no_trajectory(player):
    assert play([], player) == []


class SlowEpisode(Episode):
    """Notes when it takes a step and when it is asked whether it is over."""

    def __init__(self, turns: int, log: list[str]) -> None:
        self.left, self.log = turns, log

    def messages(self) -> list[Message]:
        return [{"role": "user", "content": "Say apple."}]

    def step(self, answer: str) -> None:
        self.left -= 1
        self.log.append("step")

    @property
    def done(self) -> bool:
        self.log.append("asked")
        return self.left == 0


def test_all_episodes_take_their_step_before_any_is_asked_how_it_went(player):
    log: list[str] = []
    play([SlowEpisode(length, log) for length in LENGTHS], player)
    rounds = "".join("s" if entry == "step" else "a" for entry in log)
    assert [len(part) for part in rounds.split("a") if part] == [3, 2, 1]


class GrowingEpisode(EchoEpisode):
    """Each prompt is longer than the last."""

    def messages(self) -> list[Message]:
        return [{"role": "user", "content": "apple " * 20 * (1 + len(self.answers))}]


def test_an_episode_whose_prompt_outgrows_the_context_ends_without_a_reward(player, student_tokenizer):
    (third,) = render(student_tokenizer, [[{"role": "user", "content": "apple " * 60}]])
    player.engine.context = len(third)
    growing, short = GrowingEpisode("apple", 5), EchoEpisode("apple", 4)
    cut, whole = play([growing, short], player)
    assert (cut.outgrown, len(cut.turns), cut.reward) == (True, 2, 0.0)
    assert (whole.outgrown, len(whole.turns), whole.reward) == (False, 4, 1.0)
    assert growing.closed
    assert not growing.done


def test_the_room_left_is_the_limit_of_an_answer(player, student_tokenizer):
    episodes = games()
    longest = max(len(render(student_tokenizer, [list(episode.messages())])[0]) for episode in episodes)
    player.engine.context = longest + 3
    play(episodes, player)
    for request in player.engine.calls[0]:
        assert request.limit == longest + 3 - len(request.ids)


def test_prompts_that_never_fit_are_episodes_without_a_turn(player):
    player.engine.context = 1
    assert [(t.turns, t.outgrown) for t in play(games(), player)] == [([], True)] * 3


def test_turns_are_handed_on_before_their_environments_are_asked(player):
    log: list[str] = []
    numbers: list[int] = []

    def on_turns(turns):
        numbers.append(len(turns))
        log.append("turns")

    play([SlowEpisode(length, log) for length in LENGTHS], player, on_turns=on_turns)
    assert numbers == [3, 2, 1]
    assert all(log[place - 1] == "step" for place, entry in enumerate(log) if entry == "turns")


def test_what_takes_time_lies_in_a_span(player):
    names: list[str] = []

    @contextmanager
    def span(name: str) -> Iterator[None]:
        names.append(name)
        yield
        names.append(f"end of {name}")

    play(games(), player, span=span)
    # At the beginning episodes are asked once, and after each turn they take their step and are asked again.
    environments = ["environments", "end of environments"] * (1 + 2 * max(LENGTHS))
    assert names == ["answers", *environments, "end of answers"]


# ---- without rounds -------------------------------------------------------------------------------------------------


def in_lock_step(episodes: list[EchoEpisode], player: Player, new: int) -> list[list[tuple[list[int], str]]]:
    """Prompts and answers as a plain loop gets them: a turn of all open episodes, then the next, each answer alone."""
    turns: list[list[tuple[list[int], str]]] = [[] for _ in episodes]
    while any(not episode.done for episode in episodes):
        for number, episode in enumerate(episodes):
            if not episode.done:
                (ids,) = render(player.tokenizer, [list(episode.messages())])
                request = Request(ids=ids, seed=seed_of("run", number, len(turns[number])))
                (answer,) = player.engine.generate(
                    [request], player.sampling, max_new_tokens=new, turn_end=player.turn_end
                )
                said = answer.ids if answer.truncated else answer.ids[:-1]
                turns[number].append((ids, player.tokenizer.decode(said)))
                episode.step(turns[number][-1][1])
    return turns


def many_games() -> list[EchoEpisode]:
    """Some of them equal, so that prompts are too; and their later prompts are longer."""
    return [LongerEpisode(("apple", "river", "stone")[number % 3], 2 + number % 4) for number in range(11)]


class LongerEpisode(EchoEpisode):
    """Shows all that was said."""

    def messages(self) -> list[Message]:
        return [{"role": "user", "content": f"{self.kind}? {' '.join(said[:20] for said in self.answers)}"}]


@pytest.fixture(params=["local, 3 rows", "local, 256 rows", "served"])
def writer(request, student_tokenizer, student_folder) -> Iterator[Player]:
    """Writes answers of many lengths."""
    model = load_model(str(student_folder), "float32")
    settings = {"tokenizer": student_tokenizer, "turn_end": frozenset(range(0, 340, 9)), "sampling": Sampling()}
    if request.param == "served":
        with serving(student_folder) as fake:
            engine = VLLMEngine(Servers(urls=[fake.url], concurrency=5))
            engine.sync(model)
            yield Player(engine=engine, **settings)
            engine.close()
    else:
        engine = LocalEngine(batch_size=int(request.param.split()[1]))
        engine.sync(model)
        yield Player(engine=engine, **settings)


def test_turns_are_those_of_episodes_in_lock_step(writer):
    expected = in_lock_step(many_games(), writer, new=24)
    keyed = [(("run", number), episode) for number, episode in enumerate(many_games())]
    took: list[int] = []
    trajectories = collect(keyed, writer, max_new_tokens=24, on_turns=lambda turns: took.append(len(turns)))
    assert [[(list(turn.prompt.ids), turn.answer) for turn in t.turns] for t in trajectories] == expected
    assert len({len(answer) for turns in expected for _, answer in turns}) > 5  # uneven enough to tell
    assert len(took) > max(map(len, expected))  # not in rounds
    assert sum(took) == sum(map(len, expected))
