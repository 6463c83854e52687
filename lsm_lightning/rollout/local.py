"""A rollout engine on transformers: a replica of the student writes, in this process and on the student's device."""

import copy
from collections.abc import Set as AbstractSet
from functools import cached_property

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.pretrained import DType, context_of
from lsm_lightning.rollout.base import Conversations, Engine, Sampling
from lsm_lightning.rollout.batch import Answer, Batch, Ends
from lsm_lightning.rollout.stops import stop_strings
from lsm_lightning.student import merged_parameters


class LocalEngine(Engine):
    """Generates in this process, on the student's device.

    Args:
        batch_size: Answers written side by side; lower it where memory is short.
        dtype: Of the replica's weights; `auto` is the student's own.
    """

    def __init__(self, batch_size: int = 256, dtype: DType = "auto") -> None:
        if batch_size < 1:
            raise ConfigurationError(f"LocalEngine(batch_size={batch_size}): at least one answer at a time is needed.")
        self.batch_size = batch_size
        self.dtype: DType = dtype
        self._replica: PreTrainedModel | None = None

    @classmethod
    def around(cls, model: PreTrainedModel, batch_size: int = 256) -> "LocalEngine":
        """An engine that writes with `model` itself, not with a copy: for frozen models such as a teacher."""
        engine = cls(batch_size)
        engine._replica = model
        return engine

    def sync(self, model: PreTrainedModel) -> None:
        """Copy the weights into the replica, made at the first call: adapters merged, sharded ones gathered."""
        if self._replica is None:
            self._replica = _plain_copy(model, model.dtype if self.dtype == "auto" else getattr(torch, self.dtype))
        mine = dict(self._replica.named_parameters())
        with torch.no_grad():
            for name, theirs in merged_parameters(model):
                mine.pop(name).copy_(theirs)
        assert not mine, f"not copied: {', '.join(mine)}"

    def converse(
        self,
        conversations: Conversations,
        sampling: Sampling,
        *,
        max_new_tokens: int,
        turn_end: AbstractSet[int],
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        """See `Engine.converse`.

        Raises:
            ConfigurationError: A prompt and its longest answer exceed the model's context, the model has layers that
                cannot be kept, or strings are to end an answer and the tokenizer is missing.
        """
        assert self._replica is not None, "sync() comes before converse()"
        if sampling.stop and tokenizer is None:
            raise ConfigurationError(f"stop={list(sampling.stop)} is looked for in texts: give the engine a tokenizer.")
        stops = stop_strings(tokenizer, tuple(sampling.stop)) if sampling.stop and tokenizer is not None else None

        def ask() -> list[Answer]:
            asked = conversations.requests()
            remedy = "take a model with a longer context"
            self.check_room(asked.values(), max_new_tokens, whose="student", remedy=remedy)
            return [Answer.of(number, request, max_new_tokens) for number, request in asked.items()]

        ends = Ends(turn=turn_end, stops=stops)
        with torch.autocast(self._replica.device.type, enabled=False):  # the replica's dtype decides
            Batch(self._replica, ask, conversations.take, sampling, ends, self.batch_size).run()

    def room(self, prompt_tokens: int) -> int | None:
        """See `Engine.room`; `sync` comes before."""
        assert self._replica is not None, "sync() comes before room()"
        return None if self._context is None else self._context - prompt_tokens

    @cached_property
    def _context(self) -> int | None:
        """Tokens; asked for with every answer, and slow to read from a configuration."""
        assert self._replica is not None
        return context_of(self._replica.config)


def _plain_copy(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """A frozen eval-mode model of the same shape; its weights are still to be filled in."""
    # It draws weights to throw away, which the random numbers of training must not notice.
    gpus = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=gpus), torch.device(model.device):
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # so that a large replica is never there in float32
        try:
            replica = type(model)(copy.deepcopy(model.config))
        finally:
            torch.set_default_dtype(before)
    for parameter in replica.parameters():
        parameter.data = parameter.data.to(dtype)
    # Buffers, such as rotary frequencies, keep the model's own precision.
    for mine, theirs in zip(replica.buffers(), model.buffers(), strict=True):
        mine.data = theirs.detach().clone()
    return replica.eval().requires_grad_(False)
