"""A teacher scores what the student wrote."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from lsm_lightning.rollout.base import Sampling
from lsm_lightning.rollout.collect import Player
from lsm_lightning.types import Support, Turn
from tokenalign import Pair


class Teacher(ABC):
    """One stronger model, asked for its top tokens at every position of the student's answers."""

    pair: Pair
    """The student's tokenizer against the teacher's; there after `setup`."""

    @abstractmethod
    def check(self) -> None:
        """Fail early where `setup` could not work, without loading weights.

        Raises:
            ConfigurationError: Naming what is missing and the remedy.
        """

    @abstractmethod
    def setup(self, student: PreTrainedTokenizerBase, student_vocabulary: int, device: torch.device) -> None:
        """Load or reach the model and compare tokenizers; called once, before the first step.

        Args:
            student: The student's tokenizer.
            student_vocabulary: Rows of the student's output matrix; no id beyond it enters a support.
            device: Where supports are wanted.

        Raises:
            ConfigurationError: The teacher cannot score this student's tokens.
        """

    @abstractmethod
    def score(self, turns: Sequence[Turn], k: int) -> Support:
        """The teacher's top K at each response position of the turns, laid end to end."""

    @abstractmethod
    def player(self, sampling: Sampling) -> Player:
        """The teacher as a writer of answers, to measure how good it is."""
