"""Layers with quantised weights, as a plan rehearses them: as large as those of bitsandbytes, and as busy."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.quantizers.quantizers_utils import should_convert_module

BLOCK = 64
"""Weights of 4 bits that share a scale, in float32, or with double quantisation in a byte."""
SCALES = 256
"""Such scales that share one in float32, with double quantisation."""


def quantise(model: PreTrainedModel, quantization: BitsAndBytesConfig) -> int:
    """Put packed weights in the place of those that transformers would quantise (`nn.Linear`, not the head).

    Returns:
        How many weights that are.
    """
    whole = list(model._keep_in_fp32_modules or ())
    kept = HfQuantizer.get_modules_to_not_convert(model, quantization.llm_int8_skip_modules, whole)
    layers = [
        (name, layer)
        for name, layer in model.named_modules()
        if type(layer) is nn.Linear and should_convert_module(name, kept)
    ]
    for name, layer in layers:
        model.set_submodule(name, _Packed(layer, packed_bytes(layer, quantization)))
    return sum(layer.in_features * layer.out_features for _, layer in layers)


def packed_bytes(layer: nn.Linear, quantization: BitsAndBytesConfig) -> int:
    """Of its quantised weights and their scales."""
    weights = layer.in_features * layer.out_features
    if quantization.load_in_8bit:
        return weights + 4 * layer.out_features
    blocks = -(-weights // BLOCK)
    if not quantization.bnb_4bit_use_double_quant:
        return -(-weights // 2) + 4 * blocks
    return -(-weights // 2) + blocks + 4 * -(-blocks // SCALES)


class _Packed(nn.Linear):
    """Holds bytes, and makes the whole weight each time it is needed."""

    def __init__(self, layer: nn.Linear, size: int) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.weight = nn.Parameter(torch.empty(size, dtype=torch.uint8), requires_grad=False)
        self.bias = layer.bias

    def forward(self, input: Tensor) -> Tensor:
        """See `nn.Linear`."""
        product: Tensor = _Product.apply(input, (self.out_features, self.in_features))
        return product if self.bias is None else product + self.bias


class _Product(torch.autograd.Function):
    """Keeps no whole weight for the backward pass, and makes it once more there."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, shape: tuple[int, int]) -> Tensor:
        ctx.shape = shape
        return hidden @ torch.empty(shape, dtype=hidden.dtype).T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient @ torch.empty(ctx.shape, dtype=gradient.dtype), None
