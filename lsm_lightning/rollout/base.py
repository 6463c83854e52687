"""An engine is a replica of the student that writes answers."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lsm_lightning.errors import ConfigurationError, TrainingDivergedError
from lsm_lightning.serving.fleet import Fleet
from lsm_lightning.types import Completion

COLDEST = 1e-6
"""Lowest temperature but 0: logits divided by less may overflow."""


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn.

    Args:
        temperature: Divides the logits; 0 takes the most probable token.
        top_p: Draw from the smallest set of tokens that holds this much probability (paper: 0.9; 1 for the
            sampled-token baseline).
        stop: An answer also ends with the token that completes one of these strings; the string is part of it.
    """

    temperature: float = 1.0
    top_p: float = 0.9
    stop: Sequence[str] = ()

    def __post_init__(self) -> None:
        if self.temperature != 0 and not COLDEST <= self.temperature < math.inf:
            raise ConfigurationError(
                f"temperature={self.temperature}: use 0 (greedy) or a finite number from {COLDEST:g} on."
            )
        if not 0 < self.top_p <= 1:
            raise ConfigurationError(f"top_p={self.top_p}: use a number above 0, at most 1.")
        if isinstance(self.stop, str) or not all(self.stop):
            raise ConfigurationError(f"stop={self.stop!r}: use a list of strings, none of them empty.")


@dataclass(frozen=True, kw_only=True, slots=True)
class Request:
    """One answer to be written."""

    ids: Sequence[int]
    """The prompt's tokens. Requests with equal prompts share one prefill."""
    seed: int
    """The answer is a function of the weights, the prompt, the sampling settings and this, whatever else is asked."""
    limit: int | None = None
    """Most tokens of this answer, where `max_new_tokens` is more than there is room for."""

    def longest(self, max_new_tokens: int) -> int:
        """Most tokens of this answer."""
        return max_new_tokens if self.limit is None else min(self.limit, max_new_tokens)


def check_finite(finite: bool) -> None:
    """Refuse to go on with log-probs of a model that are not finite.

    Raises:
        TrainingDivergedError: They are not.
    """
    if not finite:
        raise TrainingDivergedError(
            "The model's log-probs are not finite. Either training has diverged: lower the learning rate and go on "
            "from an earlier checkpoint. Or its weights are broken."
        )


class Conversations(ABC):
    """Who asks: conversations, by number, each of which asks again when its answer is there, or is over.

    An engine takes turns with it in one thread: it hands answers over as soon as they are complete, and fetches what
    follows from them when it has time for more. So the environments that an answer is for may be at work in between.
    """

    @abstractmethod
    def take(self, answers: Mapping[int, Completion]) -> None:
        """Take answers to what was asked; what they lead to need not be waited for.

        Args:
            answers: By the number of the conversation, at most one for each.
        """

    @abstractmethod
    def requests(self) -> dict[int, Request]:
        """What those ask next whose answers have been taken since the last call; at the first call, what all ask.

        A conversation that is over is left out.
        """


class _Questions(Conversations):
    """Conversations of one answer each."""

    def __init__(self, requests: Sequence[Request]) -> None:
        self._asked = dict(enumerate(requests))
        self.answers: dict[int, Completion] = {}

    def take(self, answers: Mapping[int, Completion]) -> None:
        self.answers.update(answers)

    def requests(self) -> dict[int, Request]:
        asked, self._asked = self._asked, {}
        return asked


class Engine(ABC):
    """Writes answers with its own copy of the student's weights, which `sync` brings up to date."""

    fleet: Fleet | None = None
    """The servers that it asks, if any."""

    @abstractmethod
    def sync(self, model: PreTrainedModel) -> None:
        """Take over the model's weights; every rank calls it together."""

    @abstractmethod
    def converse(
        self,
        conversations: Conversations,
        sampling: Sampling,
        *,
        max_new_tokens: int,
        turn_end: AbstractSet[int],
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """Answer until every conversation is over; none waits for the answer of another.

        Args:
            conversations: Who asks.
            sampling: How tokens are drawn.
            max_new_tokens: Longest answer.
            turn_end: Tokens of which each ends an answer, as its last one.
            tokenizer: The model's; needed with `sampling.stop` only.
        """

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        max_new_tokens: int,
        turn_end: AbstractSet[int],
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> list[Completion]:
        """Answers in the order of the requests, of which none follows from another; for the rest see `converse`."""
        questions = _Questions(requests)
        self.converse(questions, sampling, max_new_tokens=max_new_tokens, turn_end=turn_end, tokenizer=tokenizer)
        return [questions.answers[number] for number in range(len(requests))]

    def room(self, prompt_tokens: int) -> int | None:
        """How many tokens fit into the model's context behind a prompt; below 1 is none, None is no limit."""
        return None

    def check_room(self, requests: Iterable[Request], max_new_tokens: int, *, whose: str, remedy: str) -> None:
        """Make sure that the context holds every prompt and its longest answer.

        Args:
            requests: What is asked.
            max_new_tokens: Longest answer, where a request sets no other limit.
            whose: The context, for the error.
            remedy: Besides a shorter prompt or answer.

        Raises:
            ConfigurationError: One does not fit.
        """
        for request in requests:
            if not request.ids:
                raise ConfigurationError(
                    f"A prompt for the {whose} is empty: its chat template makes nothing of the task's messages."
                )
            prompt, new, room = len(request.ids), request.longest(max_new_tokens), self.room(len(request.ids))
            if room is not None and new > room:
                raise ConfigurationError(
                    f"A prompt of {prompt} tokens and max_new_tokens={new} exceed the {whose}'s context of "
                    f"{prompt + room} tokens. Lower the task's max_new_tokens, shorten its prompt, or {remedy}."
                )

    def rest(self) -> None:  # noqa: B027 - many need none of it for others
        """Give back memory of the student's device that writing takes; all processes call it together.

        What was written stays, and nothing is written before the next `sync`.
        """

    def close(self) -> None:  # noqa: B027 - many hold nothing
        """Give back what the engine holds outside this process; another `sync` brings it back."""
