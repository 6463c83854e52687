"""What makes a model a student in training: adapters, frozen parts, checkpointed activations, compiled layers."""

import dataclasses
import re
import warnings
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.integrations import dequantize_bnb_weight, get_bnb_param_type
from torch import Tensor, distributed, nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.objectives.head import OutputHead
from lsm_lightning.sharding import decoder_layers

PLAIN_LORA = frozenset(
    {
        *("r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora", "lora_dropout", "init_lora_weights"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out"),
        *("task_type", "peft_version"),
    }
)
"""Settings of `LoraConfig` with which a model is itself plus low-rank products, whatever their values."""
INITIALISATIONS = (True, False, "gaussian", "orthogonal")
"""Of adapters, that leave the weights under them as they are."""


def check_lora(lora: LoraConfig) -> None:
    """Make sure that adapters can be merged into the weights, and that nothing but adapters is changed.

    Raises:
        ConfigurationError: A setting asks for more than plain low-rank adapters, or changes the weights under them.
    """
    if lora.init_lora_weights not in INITIALISATIONS:
        raise ConfigurationError(
            f"model.lora.init_lora_weights={lora.init_lora_weights!r}: checkpoints hold adapters only, so the weights "
            "under them must stay as they are; use true, false, gaussian or orthogonal."
        )
    plain = LoraConfig()
    for name in (each.name for each in dataclasses.fields(lora)):
        if name not in PLAIN_LORA and (value := getattr(lora, name)) != getattr(plain, name):
            raise ConfigurationError(
                f"model.lora.{name}={value!r}: rollouts and export merge adapters into the weights, and checkpoints "
                "hold nothing else, which only plain LoRA allows; remove it."
            )


def adapt(model: PreTrainedModel, lora: LoraConfig) -> None:
    """Add low-rank adapters, in place; everything else is frozen.

    Raises:
        ConfigurationError: `check_lora` refuses the settings, peft finds nothing to adapt, or the adapted model could
            not be written as a plain one.
    """
    check_lora(lora)
    try:
        with torch.device(model.device), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")  # refused below
            inject_adapter_in_model(lora, model)
    except (ValueError, RuntimeError, re.error) as error:
        raise ConfigurationError(f"model.lora: {str(error).splitlines()[0]}") from error
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    if model.config.tie_word_embeddings and any(isinstance(layer, BaseTunerLayer) for layer in ends):
        raise ConfigurationError(
            "model.lora.target_modules reaches the embedding or the output layer, which share their weights in this "
            "model: an adapter of one could not be merged. Leave both out."
        )
    OutputHead.of(model)  # refuses adapters that logits of single tokens cannot follow


def freeze(model: PreTrainedModel, patterns: Sequence[str]) -> None:
    """Take the parameters whose names match shell patterns such as `*.embed_tokens.*` out of training.

    Raises:
        ConfigurationError: A pattern matches nothing, or together they leave nothing to train.
    """
    names = dict(model.named_parameters())
    for pattern in patterns:
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            some = ", ".join([*names][:3])
            raise ConfigurationError(
                f"model.freeze: no weight of the student is called like '{pattern}'. There are {some}, ..."
            )
        for name in matching:
            names[name].requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ConfigurationError(f"model.freeze={list(patterns)} leaves nothing of the student to train.")


def checkpoint_activations(model: PreTrainedModel) -> None:
    """Keep only what enters each decoder layer, and compute the rest once more in the backward pass.

    Raises:
        ConfigurationError: The model does not know how.
    """
    if not model.supports_gradient_checkpointing:
        raise ConfigurationError(
            f"model.activation_checkpointing: {type(model).__name__} does not support it; set it to false."
        )
    model.activation_checkpointing_enable({"use_reentrant": False})


def compile_layers(model: PreTrainedModel) -> None:
    """Compile decoder layers, which share their code, each in place: names of weights stay."""
    for layer in decoder_layers(model):
        layer.compile(dynamic=True)


def merged_parameters(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Names and values of a plain model that computes the same: adapters merged, sharded weights gathered one by one,
    quantised ones at full size.

    All processes iterate together where weights are sharded.
    """
    for name, parameter in model.named_parameters():
        if is_adapters(name):
            continue
        owner, _, kind = name.rpartition(".")
        value = whole(_full_size(parameter, model.get_submodule(owner)))
        layer = model.get_submodule(owner.removesuffix(".base_layer"))
        if kind == "weight" and isinstance(layer, BaseTunerLayer):
            value = _merged(layer, value)
        yield name.replace(".base_layer.", "."), value


def plain_state_dict(
    model: PreTrainedModel, *, keep: bool | None = None, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """`merged_parameters` and persistent buffers, on the CPU; all processes call it together.

    Args:
        model: The student, sharded or not.
        keep: Whether this process gets them, or nothing; by default the first does.
        dtype: That parameters are converted to; None: they keep theirs.
    """
    if keep is None:
        keep = not distributed.is_initialized() or distributed.get_rank() == 0
    weights = {name: value.to("cpu", dtype) for name, value in merged_parameters(model) if keep}
    buffers = dict(model.named_buffers())
    return weights | {name: value.cpu() for name, value in model.state_dict().items() if keep and name in buffers}


def is_adapters(name: str) -> bool:
    """Whether a weight of this name belongs to an adapter."""
    return re.search(r"\.lora_(A|B|embedding_A|embedding_B)\b", name) is not None


def adapter_state_dict(model: PreTrainedModel) -> dict[str, Tensor]:
    """The adapters alone, by the names under which peft saves and loads them."""
    weights: dict[str, Tensor] = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {f"base_model.model.{name}": weight.contiguous() for name, weight in weights.items()}


def whole(parameter: Tensor) -> Tensor:
    """A parameter without its gradient, gathered from all processes where it is sharded."""
    value = parameter.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value


def _full_size(parameter: nn.Parameter, layer: nn.Module) -> Tensor:
    """A parameter of this layer, dequantised; the layer stays as it is."""
    if not get_bnb_param_type(parameter):
        return parameter
    return dequantize_bnb_weight(parameter, state=getattr(layer, "state", None))


def _merged(layer: Any, weight: Tensor) -> Tensor:
    wide = torch.promote_types(weight.dtype, torch.float32)
    changes = [whole(layer.get_delta_weight(name)).to(wide) for name in layer.active_adapters]
    return torch.stack([weight.to(wide), *changes]).sum(0).to(weight.dtype)
