"""The student's output head, without logits for the whole vocabulary.

Local support matching needs K logits a position, so only K rows of the output matrix are multiplied. What needs the
normaliser (a tail, the sampled token's log-prob) gets it in chunks that are recomputed in the backward pass.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lsm_lightning.errors import ConfigurationError

GATHER_ELEMENTS = 2**24
"""At most so many weights are gathered at once (64 MiB in float32)."""
NORMALISER_ELEMENTS = 2**25
"""At most so many logits exist at once while the normaliser is computed (128 MiB in float32)."""


def gather_logits(
    hidden: Float[Tensor, "n d"],
    weight: Float[Tensor, "v d"],
    ids: Int[Tensor, "n k"],
    bias: Float[Tensor, " v"] | None = None,
) -> Float[Tensor, "n k"]:
    """The logits `hidden @ weight.T + bias` at K chosen ids a position, and no others.

    >>> gather_logits(torch.tensor([[1.0, 2.0]]), torch.eye(2), torch.tensor([[1, 0]]))
    tensor([[2., 1.]])
    """
    logits: Float[Tensor, "n k"] = _GatherLogits.apply(hidden, weight, ids)
    return logits if bias is None else logits + bias[ids]


class _GatherLogits(torch.autograd.Function):
    """Gathers rows of the weight chunk by chunk, in the backward pass once more instead of keeping them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        """`[N, K]` logits."""
        ctx.save_for_backward(hidden, weight, ids)
        logits = hidden.new_empty(ids.shape)
        for part in _chunks(ids, weight):
            torch.bmm(weight[ids[part]], hidden[part].unsqueeze(-1), out=logits[part].unsqueeze(-1))
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        """Gradients of hidden states and weight; all chunks add into one weight gradient."""
        hidden, weight, ids = ctx.saved_tensors
        hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.zeros_like(weight)
        for part in _chunks(ids, weight):
            gradient = gradients[0][part]
            hidden_gradient[part] = torch.bmm(gradient.unsqueeze(1), weight[ids[part]]).squeeze(1)
            outer = gradient.unsqueeze(-1) * hidden[part].unsqueeze(1)
            weight_gradient.index_add_(0, ids[part].reshape(-1), outer.reshape(-1, outer.shape[-1]))
        return hidden_gradient, weight_gradient, None


def _chunks(ids: Int[Tensor, "n k"], weight: Float[Tensor, "v d"]) -> Iterator[slice]:
    """Positions to be handled together."""
    rows = max(1, GATHER_ELEMENTS // max(1, ids.shape[1] * weight.shape[1]))
    for first in range(0, len(ids), rows):
        yield slice(first, first + rows)


@dataclass(frozen=True, kw_only=True)
class OutputHead:
    """A linear output layer with what some model families do to its logits."""

    weight: Float[Tensor, "v d"]
    bias: Float[Tensor, " v"] | None = None
    scale: float = 1.0
    soft_cap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "OutputHead":
        """The head of a causal language model.

        Raises:
            ConfigurationError: Its output layer is not linear, so single logits cannot be computed.
        """
        layer = model.get_output_embeddings()
        if not isinstance(layer, nn.Linear):
            raise ConfigurationError(
                f"The output layer of {type(model).__name__} is {type(layer).__name__}, not a linear layer: "
                "its logits cannot be computed one by one. Use a model with a linear head."
            )
        weight, bias = (_whole(parameter) for parameter in (layer.weight, layer.bias))
        assert weight is not None
        config = model.config
        scale = getattr(config, "logit_scale", None) or 1.0
        if scaling := getattr(config, "logits_scaling", None):
            scale = 1.0 / scaling
        return cls(
            weight=weight,
            bias=bias,
            scale=float(scale),
            soft_cap=getattr(config, "final_logit_softcapping", None),
        )

    def logits(self, hidden: Float[Tensor, "n d"], ids: Int[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """Logits at K ids a position, in float32 or wider."""
        hidden = hidden.to(self.weight.dtype)
        return self._finish(gather_logits(hidden, self.weight, ids, self.bias))

    def log_normaliser(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Log-sum-exp of all logits a position; subtract it from logits to get log-probs."""
        rows = max(1, NORMALISER_ELEMENTS // self.weight.shape[0])
        parts = [
            checkpoint(self._log_sum_exp, part, use_reentrant=False) if torch.is_grad_enabled() else
            self._log_sum_exp(part)
            for part in hidden.split(rows)
        ]  # fmt: skip
        return torch.cat(parts)

    def all_logits(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n v"]:
        """Logits of the whole vocabulary, for callers that take a few rows at a time."""
        return self._finish(nn.functional.linear(hidden.to(self.weight.dtype), self.weight, self.bias))

    def _log_sum_exp(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        return self.all_logits(hidden).logsumexp(-1)

    def _finish(self, logits: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * self.scale
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)


@torch.no_grad()
def check_head(model: PreTrainedModel) -> None:
    """Compare the model's own logits with those of its `OutputHead`, at one position.

    Raises:
        ConfigurationError: They differ: the model does something to its logits that `OutputHead` does not know.
    """
    ids = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    own = model(input_ids=ids, use_cache=False).logits[0].float()
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    ours = OutputHead.of(model).all_logits(hidden).float()
    if not torch.allclose(own, ours, rtol=0.02, atol=0.02 * float(own.abs().max())):
        raise ConfigurationError(
            f"{type(model).__name__} changes its logits in a way this library does not know (largest difference "
            f"{float((own - ours).abs().max()):.3g}), so single logits cannot be computed. Use another model."
        )


def _whole(parameter: Tensor | None) -> Tensor | None:
    """A sharded parameter gathered from all processes; its gradient is averaged over them, as FSDP2 does."""
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)
