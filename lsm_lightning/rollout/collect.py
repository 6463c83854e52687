"""Episodes × engine → trajectories: every open episode writes one turn at a time, all of them in one batch."""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from lsm_lightning.pretrained import render
from lsm_lightning.rollout.base import Engine, Request, Sampling
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

    def answer(self, prompts: Sequence[Prompt], seeds: Sequence[int], max_new_tokens: int) -> list[Turn]:
        """One turn for each prompt; where the context has room for less than `max_new_tokens`, it is the limit."""
        requests = [
            Request(ids=prompt.ids, seed=seed, limit=self.engine.room(len(prompt.ids)))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        completions = self.engine.generate(
            requests,
            self.sampling,
            max_new_tokens=max_new_tokens,
            turn_end=self.turn_end,
            tokenizer=self.tokenizer,
        )
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
    outgrown: bool = False

    @property
    def over(self) -> bool:
        return self.outgrown or self.episode.done

    def trajectory(self) -> Trajectory:
        return Trajectory(
            kind=self.episode.kind,
            turns=self.turns,
            reward=0.0 if self.outgrown else self.episode.reward,
            invalid_actions=self.episode.invalid_actions,
            invalid_kinds=dict(self.episode.invalid_kinds),
            outgrown=self.outgrown,
        )


def collect(
    episodes: Sequence[tuple[tuple[int | str, ...], Episode]],
    player: Player,
    *,
    max_new_tokens: int,
    on_progress: Callable[[int, int], None] | None = None,
    on_round: Callable[[Sequence[Turn]], None] | None = None,
    span: Callable[[str], AbstractContextManager[object]] = nullcontext,
) -> list[Trajectory]:
    """Play episodes to their end, in lock step.

    An episode whose prompt leaves no room for an answer in the model's context ends there, without a reward.

    Args:
        episodes: Each with the key that its random numbers derive from; the turn's number is added to it.
        player: Writes the answers.
        max_new_tokens: Longest answer in one turn.
        on_progress: Told (finished, all) after each round, for a progress bar.
        on_round: Given the turns of each round, while their environments may be at work still.
        span: Entered, by name, around each thing that takes time.

    Returns:
        One trajectory for each episode, in their order. Every episode is closed, also when an error ends the play.
    """
    games = [_Game(episode=episode, key=key) for key, episode in episodes]
    try:
        while going := [game for game in games if not game.over]:
            with span("environments"):
                conversations = [list(game.episode.messages()) for game in going]
            prompts = player.read(conversations)
            for game, prompt in zip(going, prompts, strict=True):
                game.outgrown = not player.has_room(prompt)
            asked = [(game, prompt) for game, prompt in zip(going, prompts, strict=True) if not game.outgrown]
            with span("answers"):
                turns = player.answer(
                    [prompt for _, prompt in asked],
                    [seed_of(*game.key, len(game.turns)) for game, _ in asked],
                    max_new_tokens,
                )
            for (game, _), turn in zip(asked, turns, strict=True):
                game.turns.append(turn)
                game.episode.step(turn.answer)
            if on_round is not None:
                on_round(turns)
            with span("environments"):
                for game in going:  # not before all have taken their step: environments may be at work side by side
                    if game.over:
                        game.episode.close()
            if on_progress is not None:
                on_progress(sum(game.over for game in games), len(games))
    finally:
        for game in games:
            game.episode.close()
    return [game.trajectory() for game in games]
