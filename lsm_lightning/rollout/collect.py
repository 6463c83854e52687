"""Episodes × engine → trajectories: every open episode is a conversation, which goes on when its answer is there."""

from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from lsm_lightning.pretrained import render
from lsm_lightning.rollout.base import Conversations, Engine, Request, Sampling
from lsm_lightning.seeds import seed_of
from lsm_lightning.tasks.base import Episode
from lsm_lightning.types import Completion, Message, Prompt, Trajectory, Turn


@dataclass(frozen=True, kw_only=True)
class Player:
    """Who writes the answers: an engine, the tokenizer of its model, and how it samples."""

    engine: Engine
    tokenizer: PreTrainedTokenizerBase
    turn_end: AbstractSet[int]
    sampling: Sampling

    def read(self, conversations: list[list[Message]]) -> list[Prompt]:
        """The conversations as prompts of the engine's model."""
        ids = render(self.tokenizer, conversations)
        return [Prompt(messages=messages, ids=prompt) for messages, prompt in zip(conversations, ids, strict=True)]

    def has_room(self, prompt: Prompt) -> bool:
        """Whether the model's context leaves room for an answer."""
        room = self.engine.room(len(prompt.ids))
        return room is None or room > 0

    def request(self, prompt: Prompt, seed: int) -> Request:
        """Asks for one answer; where the context has room for less than the longest, that is its limit."""
        return Request(ids=prompt.ids, seed=seed, limit=self.engine.room(len(prompt.ids)))

    def converse(self, conversations: Conversations, max_new_tokens: int) -> None:
        """Answer until every conversation is over."""
        self.engine.converse(
            conversations,
            self.sampling,
            max_new_tokens=max_new_tokens,
            turn_end=self.turn_end,
            tokenizer=self.tokenizer,
        )

    def turns(self, prompts: Sequence[Prompt], completions: Sequence[Completion]) -> list[Turn]:
        """Prompts and their answers, these as text too."""
        texts = self.tokenizer.batch_decode([self._text_ids(c) for c in completions], skip_special_tokens=False)
        return [
            Turn(prompt=prompt, completion=completion, answer=text)
            for prompt, completion, text in zip(prompts, completions, texts, strict=True)
        ]

    def _text_ids(self, completion: Completion) -> list[int]:
        whole = completion.truncated or completion.stopped
        return list(completion.ids if whole else completion.ids[:-1])


@dataclass(kw_only=True)
class _Game:
    episode: Episode
    key: tuple[int | str, ...]
    turns: list[Turn] = field(default_factory=list)
    prompt: Prompt | None = None
    """What its next turn answers."""
    outgrown: bool = False
    unfinished: bool = False

    def trajectory(self) -> Trajectory:
        return Trajectory(
            kind=self.episode.kind,
            turns=self.turns,
            reward=0.0 if self.outgrown else self.episode.reward,
            invalid_actions=self.episode.invalid_actions,
            invalid_kinds=dict(self.episode.invalid_kinds),
            outgrown=self.outgrown,
            unfinished=self.unfinished,
        )


@dataclass(kw_only=True)
class _Play(Conversations):
    """Episodes as conversations, each under its place in the list."""

    games: Sequence[_Game]
    player: Player
    max_turns: int | None
    on_progress: Callable[[int, int], None] | None
    on_turns: Callable[[Sequence[Turn]], None] | None
    span: Callable[[str], AbstractContextManager[object]]
    finished: int = 0

    def __post_init__(self) -> None:
        self._moved = list(range(len(self.games)))
        """Which of them have taken a step since they were last asked for a prompt."""

    def take(self, answers: Mapping[int, Completion]) -> None:
        prompts = [self.games[number].prompt for number in answers]
        turns = self.player.turns([prompt for prompt in prompts if prompt is not None], list(answers.values()))
        with self.span("environments"):
            for number, turn in zip(answers, turns, strict=True):
                self.games[number].turns.append(turn)
                self.games[number].episode.step(turn.answer)
        self._moved += answers
        if self.on_turns is not None:
            self.on_turns(turns)

    def requests(self) -> dict[int, Request]:
        moved, self._moved = self._moved, []
        with self.span("environments"):
            going = [number for number in moved if not self._is_over(self.games[number])]
            conversations = [list(self.games[number].episode.messages()) for number in going]
        asked = {}
        for number, prompt in zip(going, self.player.read(conversations), strict=True):
            game = self.games[number]
            game.prompt, game.outgrown = prompt, not self.player.has_room(prompt)
            if game.outgrown:
                game.episode.close()
            else:
                asked[number] = self.player.request(prompt, seed_of(*game.key, len(game.turns)))
        self.finished += len(moved) - len(asked)
        if self.on_progress is not None and moved:
            self.on_progress(self.finished, len(self.games))
        return asked

    def _is_over(self, game: _Game) -> bool:
        done = game.episode.done
        game.unfinished = not done and len(game.turns) == self.max_turns
        if done or game.unfinished:
            game.episode.close()
        return done or game.unfinished


def collect(
    episodes: Sequence[tuple[tuple[int | str, ...], Episode]],
    player: Player,
    *,
    max_new_tokens: int,
    max_turns: int | None = None,
    on_progress: Callable[[int, int], None] | None = None,
    on_turns: Callable[[Sequence[Turn]], None] | None = None,
    span: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> list[Trajectory]:
    """Play episodes to their end, side by side; each goes on when its answer is there, whatever the others are at.

    An episode whose prompt leaves no room for an answer in the model's context ends there, without a reward.

    Args:
        episodes: Each with the key that its random numbers derive from; the turn's number is added to it.
        player: Writes the answers.
        max_new_tokens: Longest answer in one turn.
        max_turns: Leave off after so many turns of an episode.
        on_progress: Told (finished, all) now and then, for a progress bar.
        on_turns: Given turns as they end, while their environments may be at work still.
        span: Entered, by name, around each thing that takes time: `answers` holds all the play, `environments` in it
            their steps and the waiting for them.

    Returns:
        One trajectory for each episode, in their order. Every episode is closed, also when an error ends the play.
    """
    games = [_Game(episode=episode, key=key) for key, episode in episodes]
    play = _Play(games=games, player=player, max_turns=max_turns, on_progress=on_progress, on_turns=on_turns, span=span)
    try:
        with span("answers"):
            player.converse(play, max_new_tokens)
    finally:
        for game in games:
            game.episode.close()
    return [game.trajectory() for game in games]
