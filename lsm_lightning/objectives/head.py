"""The student's output head, without logits for the whole vocabulary.

Local support matching needs K logits a position, so only K rows of the output matrix are multiplied. What needs the
normaliser (a tail, the sampled token's log-prob) gets it in chunks that are recomputed in the backward pass.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor, Partial
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from lsm_lightning.errors import ConfigurationError

GATHER_ELEMENTS = 2**20
"""At most so many weights are gathered at once (4 MiB in float32: they stay in a processor's cache)."""
GATHER_ELEMENTS_GPU = 2**24
"""The same on a GPU, where a small chunk is computed before the next one is launched."""
NORMALISER_ELEMENTS = 2**23
"""At most so many logits exist at once while the normaliser is computed (32 MiB in float32)."""
NORMALISER_POSITIONS = 4096
"""So many positions share a tile of these logits, and with it a pass over the gradient of the weight."""
SCALES = ("logit_scale", "lm_head_multiplier")
"""What configurations call a factor of all logits."""
DIVISORS = ("logits_scaling",)
"""A number that divides them."""
SOFT_CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
"""A number that they stay below."""
CHECKED_TOKENS = 8
"""So many tokens tell whether a head is the model's own."""


def gather_logits(
    hidden: Float[Tensor, "n d"],
    weight: Float[Tensor, "v d"],
    ids: Int[Tensor, "n k"],
    bias: Float[Tensor, " v"] | None = None,
) -> Float[Tensor, "n k"]:
    """The logits `hidden @ weight.T + bias` at K chosen ids a position, and no others.

    Products are summed in float32 or wider, whatever the weight's type; so are the gradients.

    Raises:
        ValueError: Hidden states and weight differ in width, bias and weight in length, ids and hidden states in
            number, or an id has no row in the weight.

    >>> gather_logits(torch.tensor([[1.0, 2.0]]), torch.eye(2), torch.tensor([[1, 0]]))
    tensor([[2., 1.]])
    """
    if hidden.shape[1] != weight.shape[1]:
        raise ValueError(
            f"hidden states are {hidden.shape[1]} wide and the output matrix {weight.shape[1]}: they are of two models."
        )
    if len(ids) != len(hidden):
        raise ValueError(f"ids are of {len(ids)} positions and hidden states of {len(hidden)}: give a row for each.")
    if bias is not None and len(bias) != len(weight):
        raise ValueError(f"the bias has {len(bias)} numbers and the output matrix {len(weight)} rows: one for each.")
    if ids.numel() and not ids.is_cuda and not 0 <= int(ids.min()) <= int(ids.max()) < len(weight):
        # On a GPU the indexing itself asserts this; looking here would wait for it.
        raise ValueError(
            f"ids reach from {int(ids.min())} to {int(ids.max())}, but the output matrix has rows 0 to "
            f"{len(weight) - 1}: give ids of the student's vocabulary."
        )
    logits: Float[Tensor, "n k"] = _GatherLogits.apply(hidden, weight, ids)
    # Widened first, or an id that recurs would add up its gradients in the bias's type.
    return logits if bias is None else logits + bias.to(logits.dtype)[ids]


class _GatherLogits(torch.autograd.Function):
    """Gathers rows of the weight chunk by chunk, in the backward pass once more instead of keeping them."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, ids: Tensor) -> Tensor:
        """`[N, K]` logits."""
        ctx.save_for_backward(hidden, weight, ids)
        wide = _wide(hidden, weight)
        logits = hidden.new_empty(ids.shape, dtype=wide)
        for part in _chunks(ids, weight):
            # The row vector on the left: three times as fast on a CPU as rows times a column vector.
            rows = _rows(weight, ids[part], wide)
            torch.bmm(hidden[part].to(wide).unsqueeze(1), rows.mT, out=logits[part].unsqueeze(1))
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """Gradients of hidden states and weight, each summed in the wide type."""
        hidden, weight, ids = ctx.saved_tensors
        wide = _wide(hidden, weight)
        hidden_gradient = weight_gradient = None
        if ctx.needs_input_grad[0]:
            hidden_gradient = torch.empty_like(hidden)
            for part in _chunks(ids, weight):
                of_part = torch.bmm(gradients[0][part].unsqueeze(1), _rows(weight, ids[part], wide))
                hidden_gradient[part] = of_part.squeeze(1).to(hidden.dtype)
        if ctx.needs_input_grad[1]:
            weight_gradient = _weight_gradient(gradients[0], hidden.to(wide), ids, len(weight)).to(weight.dtype)
        return hidden_gradient, weight_gradient, None


def _rows(weight: Float[Tensor, "v d"], ids: Int[Tensor, "n k"], dtype: torch.dtype) -> Float[Tensor, "n k d"]:
    return nn.functional.embedding(ids, weight).to(dtype)


def _weight_gradient(
    gradient: Float[Tensor, "n k"], hidden: Float[Tensor, "n d"], ids: Int[Tensor, "n k"], size: int
) -> Float[Tensor, "v d"]:
    """Row v is the sum of `gradient * hidden` over all places where `ids` is v.

    Sorted by id, the places of a row lie side by side and are summed in one go: without an outer product in memory,
    and in the same order every time.
    """
    sorted_ids, places = ids.flatten().sort(stable=True)
    return nn.functional.embedding_bag(
        places // max(1, ids.shape[1]),
        hidden,
        torch.searchsorted(sorted_ids, torch.arange(size, device=ids.device)),
        mode="sum",
        per_sample_weights=gradient.flatten()[places],
    )


def _wide(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """The type in which products are summed."""
    return torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)


def _chunks(ids: Int[Tensor, "n k"], weight: Float[Tensor, "v d"]) -> Iterator[slice]:
    """Positions to be handled together."""
    elements = GATHER_ELEMENTS if weight.device.type == "cpu" else GATHER_ELEMENTS_GPU
    rows = max(1, elements // max(1, ids.shape[1] * weight.shape[1]))
    for first in range(0, len(ids), rows):
        yield slice(first, first + rows)


def _wide_product(hidden: Float[Tensor, "n d"], weight: Float[Tensor, "v d"]) -> Float[Tensor, "n v"]:
    """`hidden @ weight.T` in float32 or wider."""
    if weight.dtype == _wide(hidden, weight):
        return nn.functional.linear(hidden, weight)
    product: Float[Tensor, "n v"] = _WideProduct.apply(hidden, weight)
    return product


class _WideProduct(torch.autograd.Function):
    """Of factors in half precision: `linear` would round to their type, or keep wide copies for the backward pass."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        """`[N, V]` in float32."""
        ctx.save_for_backward(hidden, weight)
        if hidden.is_cuda:
            return torch.mm(hidden, weight.T, out_dtype=torch.float32)
        return hidden.float() @ weight.float().T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        """In the factors' type, which their gradients are rounded to anyway."""
        hidden, weight = ctx.saved_tensors
        gradient = gradients[0].to(weight.dtype)
        return gradient @ weight, gradient.T @ hidden


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A low-rank addition to the output matrix (LoRA): `scale * up @ down`."""

    down: Float[Tensor, "r d"]
    up: Float[Tensor, "v r"]
    scale: float


@dataclass(frozen=True, kw_only=True)
class OutputHead:
    """A linear output layer with what some model families do to its logits."""

    weight: Float[Tensor, "v d"]
    bias: Float[Tensor, " v"] | None = None
    adapters: tuple[Adapter, ...] = ()
    scale: float = 1.0
    soft_cap: float | None = None

    @classmethod
    def of(cls, model: PreTrainedModel) -> "OutputHead":
        """The head of a causal language model; a LoRA adapter of peft on it is seen through.

        Raises:
            ConfigurationError: Its output layer is not linear, or its configuration scales logits by something that is
                no number, so single logits cannot be computed.
        """
        layer = model.get_output_embeddings()
        adapters: tuple[Adapter, ...] = ()
        if hasattr(layer, "lora_A"):
            adapters, layer = _adapters(layer), layer.base_layer
        if type(layer).__module__.startswith("bitsandbytes."):
            name = next(name for name, module in model.named_modules() if module is layer)
            raise ConfigurationError(
                f"The output layer of {type(model).__name__} is quantised, so its logits cannot be computed one by "
                f"one: add '{name}' to model.quantization.llm_int8_skip_modules."
            )
        if not isinstance(layer, nn.Linear):
            raise ConfigurationError(
                f"The output layer of {type(model).__name__} is {type(layer).__name__}, not a linear layer: "
                "its logits cannot be computed one by one. Use a model with a linear head."
            )
        weight, bias = (_whole(parameter) for parameter in (layer.weight, layer.bias))
        assert weight is not None
        scale = _number(model, SCALES) or 1.0
        if divisor := _number(model, DIVISORS):
            scale = 1.0 / divisor
        return cls(weight=weight, bias=bias, adapters=adapters, scale=scale, soft_cap=_number(model, SOFT_CAPS))

    def logits(self, hidden: Float[Tensor, "n d"], ids: Int[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        """Logits at K ids a position, in float32 or wider."""
        logits = gather_logits(hidden, self.weight, ids, self.bias)
        for adapter in self.adapters:
            logits = logits + adapter.scale * gather_logits(_down(adapter, hidden), adapter.up, ids)
        return self._finish(logits)

    def log_normaliser(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        """Log-sum-exp of all logits a position; subtract it from logits to get log-probs.

        Computed tile by tile, and once more in the backward pass. Tiles are cut along the vocabulary, so that each
        touches its own part of the weight's gradient only.
        """
        return torch.cat(
            [torch.stack([t._log_sum_exp(b) for t in tiles]).logsumexp(0) for b, tiles in self._blocks(hidden)]
        )

    @torch.no_grad()
    def entropy_and_normaliser(self, hidden: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Of the distribution over the whole vocabulary, both in nats; tile by tile, in one pass, without gradient."""
        entropies, normalisers = [], []
        for block, tiles in self._blocks(hidden):
            masses, within = (
                torch.stack(of_all) for of_all in zip(*(t._tile_entropy(block) for t in tiles), strict=True)
            )
            shares = masses.softmax(0)
            entropies.append((torch.special.entr(shares) + shares * within).sum(0))
            normalisers.append(masses.logsumexp(0))
        return torch.cat(entropies), torch.cat(normalisers)

    def all_logits(self, hidden: Float[Tensor, "n d"], *, exact: bool = False) -> Float[Tensor, "n v"]:
        """Logits of the whole vocabulary, for callers that take a few rows at a time.

        Args:
            hidden: Last hidden states.
            exact: Summed in float32 or wider, as `logits` are. Otherwise rounded to the weight's type on the way, as
                the model itself does it; that is faster in half precision.
        """
        product = _wide_product if exact else nn.functional.linear
        logits = product(hidden.to(self.weight.dtype), self.weight)
        if self.bias is not None:
            logits = logits + self.bias
        for adapter in self.adapters:
            logits = logits + adapter.scale * product(_down(adapter, hidden).to(adapter.up.dtype), adapter.up)
        return self._finish(logits)

    def _blocks(self, hidden: Float[Tensor, "n d"]) -> Iterator[tuple[Float[Tensor, "m d"], list["OutputHead"]]]:
        """Positions that are handled together, each time with heads whose logits there may exist at once."""
        # Widened first, or the gradients of the tiles would be added up in the hidden states' type.
        blocks = hidden.to(_wide(hidden, self.weight)).split(NORMALISER_POSITIONS)
        tiles = self._tiles(max(1, NORMALISER_ELEMENTS // max(1, len(blocks[0]))))
        return ((block, tiles) for block in blocks)

    def _tiles(self, size: int) -> list["OutputHead"]:
        """Heads of so many tokens each."""
        weights = self.weight.split(size)
        biases = [None] * len(weights) if self.bias is None else self.bias.split(size)
        adapters = [[replace(adapter, up=up) for up in adapter.up.split(size)] for adapter in self.adapters]
        return [
            replace(self, weight=weight, bias=bias, adapters=tuple(of_all[i] for of_all in adapters))
            for i, (weight, bias) in enumerate(zip(weights, biases, strict=True))
        ]

    def _log_sum_exp(self, hidden: Float[Tensor, "n d"]) -> Float[Tensor, " n"]:
        # As exact as the logits it is subtracted from, or a confident student's probabilities would exceed 1.
        def run(hidden: Tensor) -> Tensor:
            return self.all_logits(hidden, exact=True).logsumexp(-1)

        if not torch.is_grad_enabled():
            return run(hidden)
        return checkpoint(run, hidden, use_reentrant=False, preserve_rng_state=False)

    def _tile_entropy(self, hidden: Float[Tensor, "n d"]) -> tuple[Float[Tensor, " n"], Float[Tensor, " n"]]:
        """Log of a tile's mass, and the entropy of the choice within it; 0 where nothing in it can be chosen."""
        logits = self.all_logits(hidden, exact=True)
        mass = logits.logsumexp(-1)
        log_probs = logits - mass.clamp(min=torch.finfo(mass.dtype).min).unsqueeze(-1)
        return mass, torch.special.entr(log_probs.exp()).sum(-1)

    def _finish(self, logits: Float[Tensor, "n k"]) -> Float[Tensor, "n k"]:
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        logits = logits if self.scale == 1 else logits * self.scale
        return logits if self.soft_cap is None else self.soft_cap * torch.tanh(logits / self.soft_cap)


@torch.no_grad()
def check_head(model: PreTrainedModel, name: str) -> None:
    """Compare the model's own logits with those of its `OutputHead`, after a few tokens.

    Raises:
        ConfigurationError: They are not finite, or they differ by more than rounding: the model does something to its
            logits that `OutputHead` does not know.
    """
    head = OutputHead.of(model)
    ids = torch.arange(min(CHECKED_TOKENS, len(head.weight)), device=model.device).unsqueeze(0)
    own = model(input_ids=ids, use_cache=False).logits[0].float()
    if not own.isfinite().all():
        raise ConfigurationError(
            f"The model '{name}' gives logits that are not finite: its weights are damaged, or {model.dtype} is too "
            "narrow for them (set its dtype to float32)."
        )
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    ours = head.all_logits(hidden).float()
    tolerance = 1e-5 if torch.finfo(head.weight.dtype).bits > 16 else 0.02
    if not torch.allclose(own, ours, rtol=tolerance, atol=tolerance * float(own.abs().max())):
        raise ConfigurationError(
            f"{type(model).__name__} ('{name}') changes its logits in a way this library does not know (by up "
            f"to {float((own - ours).abs().max()):.3g}), so single logits cannot be computed. Use another model."
        )


def _number(model: PreTrainedModel, names: Sequence[str]) -> float | None:
    """The first of these settings that the model's configuration has."""
    for name in names:
        value = getattr(model.config, name, None)
        if value is not None and not isinstance(value, int | float):
            raise ConfigurationError(
                f"{type(model).__name__} has {name}={value!r} in its configuration, which is no number: single logits "
                "cannot be computed. Put the number into its config.json, or use another model."
            )
        if value:
            return float(value)
    return None


def _down(adapter: Adapter, hidden: Float[Tensor, "n d"]) -> Float[Tensor, "n r"]:
    return nn.functional.linear(hidden.to(adapter.down.dtype), adapter.down)


def _adapters(layer: Any) -> tuple[Adapter, ...]:
    """The active LoRA adapters of a peft layer, unless they are merged into its weight already.

    Raises:
        ConfigurationError: An adapter is more than a low-rank addition.
    """
    if layer.merged or layer.disable_adapters:
        return ()
    active = [name for name in layer.active_adapters if name in layer.lora_A]
    variants: Container[str] = getattr(layer, "lora_variant", ())
    dora: Mapping[str, bool] = getattr(layer, "use_dora", {})
    for name in active:
        plain = isinstance(layer.lora_dropout[name], nn.Identity) and layer.lora_B[name].bias is None
        if not plain or name in variants or dora.get(name):
            raise ConfigurationError(
                f"The LoRA adapter '{name}' on the output layer uses dropout, a bias or a variant such as DoRA, which "
                "logits of single tokens cannot follow: set lora_dropout to 0, lora_bias and use_dora to false, or "
                "leave the output layer unadapted."
            )
    return tuple(
        Adapter(down=_weight(layer.lora_A[name]), up=_weight(layer.lora_B[name]), scale=float(layer.scaling[name]))
        for name in active
    )


def _weight(layer: nn.Linear) -> Tensor:
    weight = _whole(layer.weight)
    assert weight is not None
    return weight


def _whole(parameter: Tensor | None) -> Tensor | None:
    """A sharded parameter gathered from all processes; its gradient is averaged over them, as FSDP2 does."""
    if not isinstance(parameter, DTensor):
        return parameter
    mesh = parameter.device_mesh
    on_device: Any = parameter.to(mesh.device_type)  # an offloaded one lies in main memory
    gathered: Tensor = on_device.full_tensor(grad_placements=[Partial("avg")] * mesh.ndim)
    return gathered
