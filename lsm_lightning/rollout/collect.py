"""Episodes × engine → trajectories: every open episode writes one turn at a time, all of them in one batch."""

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
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

    def answer(self, conversations: list[list[Message]], seeds: Sequence[int], max_new_tokens: int) -> list[Turn]:
        """One turn for each conversation."""
        ids = render(self.tokenizer, conversations)
        requests = [Request(ids=prompt, seed=seed) for prompt, seed in zip(ids, seeds, strict=True)]
        completions = self.engine.generate(
            requests,
            self.sampling,
            max_new_tokens=max_new_tokens,
            turn_end=self.turn_end,
            tokenizer=self.tokenizer,
        )
        texts = self.tokenizer.batch_decode([self._text_ids(c) for c in completions], skip_special_tokens=False)
        return [
            Turn(prompt=Prompt(messages=messages, ids=prompt), completion=completion, answer=text)
            for messages, prompt, completion, text in zip(conversations, ids, completions, texts, strict=True)
        ]

    def _text_ids(self, completion: Completion) -> list[int]:
        whole = completion.truncated or completion.stopped
        return list(completion.ids if whole else completion.ids[:-1])


@dataclass(kw_only=True)
class _Game:
    episode: Episode
    key: tuple[int | str, ...]
    turns: list[Turn] = field(default_factory=list)


def collect(
    episodes: Sequence[tuple[tuple[int | str, ...], Episode]],
    player: Player,
    *,
    max_new_tokens: int,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Trajectory]:
    """Play episodes to their end, in lock step.

    Args:
        episodes: Each with the key that its random numbers derive from; the turn's number is added to it.
        player: Writes the answers.
        max_new_tokens: Longest answer in one turn.
        on_progress: Told (finished, all) after each round, for a progress bar.

    Returns:
        One trajectory for each episode, in their order. Every episode is closed, also when an error ends the play.
    """
    games = [_Game(episode=episode, key=key) for key, episode in episodes]
    try:
        while going := [game for game in games if not game.episode.done]:
            conversations = [list(game.episode.messages()) for game in going]
            seeds = [seed_of(*game.key, len(game.turns)) for game in going]
            for game, turn in zip(going, player.answer(conversations, seeds, max_new_tokens), strict=True):
                game.turns.append(turn)
                game.episode.step(turn.answer)
            for game in going:  # not before all have taken their step: environments may be at work side by side
                if game.episode.done:
                    game.episode.close()
            if on_progress is not None:
                on_progress(sum(game.episode.done for game in games), len(games))
    finally:
        for game in games:
            game.episode.close()
    return [
        Trajectory(
            kind=game.episode.kind,
            turns=game.turns,
            reward=game.episode.reward,
            invalid_actions=game.episode.invalid_actions,
            invalid_kinds=dict(game.episode.invalid_kinds),
        )
        for game in games
    ]
