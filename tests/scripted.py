"""A game without an engine, and an engine without a model, for tests of everything around them."""

from collections import Counter
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet

from transformers import PreTrainedTokenizerBase

from lsm_lightning.rollout.base import Conversations, Engine, Request, Sampling
from lsm_lightning.rollout.collect import Player
from lsm_lightning.tasks.base import Episode, Split, Task
from lsm_lightning.types import Completion, Message, Turn

WORDS = ("apple", "river", "stone")


class EchoEpisode(Episode):
    """Asks for a word again and again: `turns` turns, the reward is the share that was echoed."""

    def __init__(self, word: str, turns: int) -> None:
        self.kind = word
        self.invalid_kinds: Counter[str] = Counter()
        self.answers: list[str] = []
        self.closed = 0
        self._turns = turns

    def messages(self) -> Sequence[Message]:
        assert not self.done
        said = self.answers[-1] if self.answers else "nothing"
        return [{"role": "user", "content": f"You said {said[:8]}, now say {self.kind}."}]

    def step(self, answer: str) -> None:
        assert not self.done
        self.answers.append(answer)
        if self.kind not in answer:
            self.invalid_actions += 1
            self.invalid_kinds["another" if answer.strip() else "blank"] += 1
        self.done = len(self.answers) == self._turns
        self.reward = sum(self.kind in said for said in self.answers) / self._turns

    def close(self) -> None:
        self.closed += 1


class EchoGames(Task):
    """Every other game is one turn longer.

    Args:
        turns: Of the shorter games.
        test_size: Number of test games.
        max_new_tokens: Longest answer.
    """

    invalid_kinds = ("blank", "another")

    def __init__(self, turns: int = 2, test_size: int = 4, max_new_tokens: int = 6) -> None:
        self.turns = turns
        self.max_new_tokens = max_new_tokens
        self._test_size = test_size

    def setup(self) -> None:
        pass

    def test_size(self) -> int:
        return self._test_size

    def episode(self, split: Split, index: int) -> EchoEpisode:
        return EchoEpisode(WORDS[index % len(WORDS)], self.turns + index % 2)


class ScriptedEngine(Engine):
    """Writes what `answer` makes of a request, and remembers what it was asked."""

    def __init__(self, answer: Callable[[Request], Completion], context: int | None = None) -> None:
        self.answer = answer
        self.context = context
        self.calls: list[list[Request]] = []
        """What was asked together, all of which is answered together too."""

    def sync(self, model: object) -> None:
        pass

    def converse(
        self,
        conversations: Conversations,
        sampling: Sampling,
        *,
        max_new_tokens: int,
        turn_end: AbstractSet[int],
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        while requests := conversations.requests():
            self.calls.append(list(requests.values()))
            conversations.take({number: self.answer(request) for number, request in requests.items()})

    def room(self, prompt_tokens: int) -> int | None:
        return None if self.context is None else self.context - prompt_tokens


def say(player: Player, conversations: list[list[Message]], max_new_tokens: int) -> list[Turn]:
    """A turn of the player's in each; seeds are their places."""
    prompts = player.read(conversations)
    requests = [player.request(prompt, seed) for seed, prompt in enumerate(prompts)]
    how = {"max_new_tokens": max_new_tokens, "turn_end": player.turn_end}
    return player.turns(prompts, player.engine.generate(requests, player.sampling, **how))
