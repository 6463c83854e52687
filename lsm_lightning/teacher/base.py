"""A teacher scores what the student wrote."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lsm_lightning.rollout.base import Sampling
from lsm_lightning.rollout.collect import Player
from lsm_lightning.serving.fleet import Fleet
from lsm_lightning.types import Support, Turn
from tokenalign import Pair


class Teacher(ABC):
    """One stronger model, asked for its top tokens at every position of the student's answers."""

    pair: Pair
    """The student's tokenizer against the teacher's; there after `setup`."""
    tokenizer: PreTrainedTokenizerBase
    """The teacher's own, with its chat template; there after `setup`."""
    context: int | None = None
    """Most tokens of a prompt and its answer that it reads, None where no limit is known; there after `setup`. About
    what is longer it says nothing, as if no token started on both sides."""
    sharded: bool = False
    """Whether processes share its weights, so that each has to hold all of them while it writes."""

    elsewhere: bool = False
    """Whether its model runs on other machines, so that it may score in a thread while the student writes."""

    fleet: Fleet | None = None
    """The servers that it asks, if any."""

    @abstractmethod
    def check(self) -> None:
        """Fail early where `setup` could not work, without loading weights.

        Raises:
            ConfigurationError: Naming what is missing and the remedy.
        """

    @abstractmethod
    def setup(
        self,
        student: PreTrainedTokenizerBase,
        *,
        vocabulary: int,
        respell: bool,
        tokens: int | None,
        device: torch.device,
        added: int = 0,
    ) -> None:
        """Load or reach the model and compare tokenizers; called once, before the first step.

        Args:
            student: The student's tokenizer.
            vocabulary: Rows of the student's output matrix; no id beyond it enters a support.
            respell: Whether the teacher reads its own spelling of the student's texts, or the student's tokens as they
                stand.
            tokens: How many of its top tokens `score` is going to be asked for; None: all that both sides have.
            device: Where supports are wanted.
            added: How many further ids at a position `score` is going to be asked about, besides the sampled token.

        Raises:
            ConfigurationError: The teacher cannot score this student's tokens.
        """

    @abstractmethod
    def score(self, turns: Sequence[Turn], added: Int[Tensor, "n c"]) -> Support:
        """The teacher's top tokens at each response position of the turns, laid end to end.

        Args:
            turns: What the student wrote; a process whose episodes were over before they began has none.
            added: Ids of the student's vocabulary whose log-probs are wanted as well; those that are among the top
                tokens already are no members a second time.
        """

    @abstractmethod
    def player(self, sampling: Sampling) -> Player:
        """The teacher as a writer of answers, to measure how good it is."""

    def cancel(self) -> None:  # noqa: B027 - most have nothing that waits
        """Give up what another thread is scoring, which then raises an error of whatever kind."""

    def close(self) -> None:  # noqa: B027 - many hold nothing
        """Give back what the teacher holds outside this process."""
