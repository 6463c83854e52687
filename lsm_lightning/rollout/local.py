"""A rollout engine on transformers: a replica of the student, a KV cache, and prompts shared by their samples."""

import copy
from collections.abc import Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lsm_lightning.errors import ConfigurationError, TrainingDivergedError
from lsm_lightning.pretrained import DType
from lsm_lightning.rollout.base import Engine, Request, Sampling
from lsm_lightning.student import merged_parameters
from lsm_lightning.types import Completion

NUCLEUS_GUESS = 256
"""Most probable tokens looked at first; a full sort of a large vocabulary costs a third of the decoding."""


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

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, max_new_tokens: int, turn_end: AbstractSet[int]
    ) -> list[Completion]:
        """See `Engine.generate`.

        Raises:
            ConfigurationError: A prompt and the longest answer exceed the model's context.
        """
        assert self._replica is not None, "sync() comes before generate()"
        _check_context(self._replica, requests, max_new_tokens)
        # Prompts of like length side by side need the least padding; equal prompts end up in one batch.
        order = sorted(range(len(requests)), key=lambda i: (len(requests[i].ids), tuple(requests[i].ids)))
        completions: dict[int, Completion] = {}
        for first in range(0, len(order), self.batch_size):
            part = order[first : first + self.batch_size]
            with torch.autocast(self._replica.device.type, enabled=False):  # the replica's dtype decides
                rows = _Rows.start(self._replica, [requests[i] for i in part], max_new_tokens, turn_end)
                completions.update(zip(part, rows.decode(sampling), strict=True))
        return [completions[i] for i in range(len(requests))]

    def room(self, prompt_tokens: int) -> int | None:
        """See `Engine.room`."""
        assert self._replica is not None, "sync() comes before room()"
        limit = getattr(self._replica.config, "max_position_embeddings", None)
        return None if limit is None else limit - prompt_tokens


@dataclass
class _Rows:
    """The answers being written side by side. Row `r` of every tensor belongs to answer `alive[r]`."""

    model: PreTrainedModel
    cache: DynamicCache
    logits: Float[Tensor, "rows v"]
    mask: Int[Tensor, "rows t"]
    """1 where the cache holds a token, 0 where it holds left padding."""
    alive: Int[Tensor, " rows"]
    uniform: Float[Tensor, "b new"]
    """The random numbers of every answer, drawn beforehand from its own seed."""
    turn_end: Int[Tensor, " e"]
    tokens: Int[Tensor, "b new"]
    log_probs: Float[Tensor, "b new"]
    lengths: Int[Tensor, " b"]
    ended: Bool[Tensor, " b"]

    @classmethod
    @torch.no_grad()
    def start(
        cls, model: PreTrainedModel, requests: Sequence[Request], max_new_tokens: int, turn_end: AbstractSet[int]
    ) -> "_Rows":
        """Prefill each distinct prompt once and give every answer a row."""
        device = model.device
        distinct = {tuple(request.ids): None for request in requests}
        row_of = {prompt: row for row, prompt in enumerate(distinct)}
        ids, mask = left_pad(list(distinct), device)
        cache = DynamicCache(config=model.config)
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=_positions(mask), cache=cache, use_cache=True,
            logits_to_keep=1,
        )  # fmt: skip
        rows = torch.tensor([row_of[tuple(request.ids)] for request in requests], device=device)
        if len(distinct) < len(requests):
            cache.batch_select_indices(rows)
        size = (len(requests), max_new_tokens)
        draws = np.stack([np.random.default_rng(request.seed).random(max_new_tokens) for request in requests])
        return cls(
            model=model,
            cache=cache,
            logits=output.logits[rows, -1].float(),
            mask=mask[rows],
            alive=torch.arange(len(requests), device=device),
            uniform=torch.tensor(draws, dtype=torch.float32, device=device),
            turn_end=torch.tensor(sorted(turn_end), dtype=torch.long, device=device),
            tokens=torch.zeros(size, dtype=torch.long, device=device),
            log_probs=torch.zeros(size, device=device),
            lengths=torch.zeros(len(requests), dtype=torch.long, device=device),
            ended=torch.zeros(len(requests), dtype=torch.bool, device=device),
        )

    @torch.no_grad()
    def decode(self, sampling: Sampling) -> Iterator[Completion]:
        """Write every answer to its end, then hand them out in order."""
        for position in range(self.tokens.shape[1]):
            tokens = sample(self.logits, self.uniform[self.alive, position], sampling)
            self._record(position, tokens)
            going = ~self.ended[self.alive]
            if position + 1 == self.tokens.shape[1] or not going.any():
                break
            # Dropping rows copies the cache, so wait until a quarter of them is done.
            if going.float().mean() <= 0.75:
                tokens = tokens[going]
                self._keep(going)
            self._advance(tokens)
        if not self.log_probs.isfinite().all():
            raise TrainingDivergedError(
                "The model's log-probs are not finite. Either training has diverged: lower the learning rate and go on "
                "from an earlier checkpoint. Or its weights are broken."
            )
        for tokens, log_probs, length, ended in zip(
            self.tokens.tolist(), self.log_probs.tolist(), self.lengths.tolist(), self.ended.tolist(), strict=True
        ):
            yield Completion(ids=tokens[:length], log_probs=log_probs[:length], truncated=not ended)

    def _record(self, position: int, tokens: Int[Tensor, " rows"]) -> None:
        log_probs = self.logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
        open_rows = ~self.ended[self.alive]
        rows = self.alive[open_rows]
        self.tokens[rows, position] = tokens[open_rows]
        self.log_probs[rows, position] = log_probs[open_rows]
        self.lengths[rows] = position + 1
        self.ended[rows] = torch.isin(tokens[open_rows], self.turn_end)

    def _keep(self, rows: Bool[Tensor, " rows"]) -> None:
        self.cache.batch_select_indices(rows.nonzero()[:, 0])
        self.alive, self.mask = self.alive[rows], self.mask[rows]

    def _advance(self, tokens: Int[Tensor, " rows"]) -> None:
        positions = self.mask.sum(-1, keepdim=True)
        self.mask = torch.nn.functional.pad(self.mask, (0, 1), value=1)
        output = self.model(
            input_ids=tokens[:, None], attention_mask=self.mask, position_ids=positions, cache=self.cache,
            use_cache=True,
        )  # fmt: skip
        self.logits = output.logits[:, -1].float()


def sample(logits: Float[Tensor, "b v"], uniform: Float[Tensor, " b"], sampling: Sampling) -> Int[Tensor, " b"]:
    """One token a row, by inverting the cumulative distribution of its nucleus at `uniform`.

    The nucleus is the smallest set of most probable tokens that holds `top_p`, as in vLLM. Taking the random numbers
    as an argument makes a row independent of the rest of the batch.

    >>> sample(torch.tensor([[0.0, 3.0, 1.0]]), torch.tensor([0.5]), Sampling(temperature=0.0))
    tensor([1])
    """
    if sampling.temperature == 0:
        return logits.argmax(-1)
    probs = (logits / sampling.temperature).softmax(-1)
    ordered, ids = probs.topk(min(NUCLEUS_GUESS, probs.shape[-1]), -1)
    tokens = _draw(ordered, ids, uniform, sampling.top_p)
    flat = ordered.sum(-1) < sampling.top_p
    if ordered.shape[-1] < probs.shape[-1] and bool(flat.any()):
        # Only rows whose nucleus is larger are sorted: a row's order must not depend on the others.
        tokens[flat] = _draw(*probs[flat].sort(-1, descending=True), uniform[flat], sampling.top_p)
    return tokens


def _draw(
    ordered: Float[Tensor, "b k"], ids: Int[Tensor, "b k"], uniform: Float[Tensor, " b"], top_p: float
) -> Int[Tensor, " b"]:
    """Invert the cumulative distribution of the nucleus; `ordered` holds probabilities in falling order."""
    before = ordered.cumsum(-1) - ordered
    inside = ordered.masked_fill(before >= top_p, 0.0).cumsum(-1)
    rank = torch.searchsorted(inside, uniform[:, None] * inside[:, -1:], right=True)
    # Rounding may put the draw at the very end; the last token with any mass is the first to reach the total.
    last = torch.searchsorted(inside, inside[:, -1:].contiguous())
    return ids.gather(-1, torch.minimum(rank, last).clamp(max=ids.shape[-1] - 1))[:, 0]


def left_pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]:
    """Token ids and a 0/1 mask, ends flush right; padding holds token 0, which the mask hides."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask


def _positions(mask: Int[Tensor, "b t"]) -> Int[Tensor, "b t"]:
    return (mask.cumsum(-1) - 1).clamp(min=0)


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


def _check_context(model: PreTrainedModel, requests: Sequence[Request], max_new_tokens: int) -> None:
    limit = getattr(model.config, "max_position_embeddings", None)
    longest = max((len(request.ids) for request in requests), default=0)
    if limit is not None and longest + max_new_tokens > limit:
        raise ConfigurationError(
            f"A prompt of {longest} tokens and max_new_tokens={max_new_tokens} exceed the student's context of {limit} "
            "tokens. Lower the task's max_new_tokens, shorten its prompt, or take a model with a longer context."
        )
