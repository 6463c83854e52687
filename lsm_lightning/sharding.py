"""A model spread over processes (FSDP2), which only the first of them has ever held as a whole."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities.device_dtype_mixin import _update_properties
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from lsm_lightning.errors import ConfigurationError


@dataclass(frozen=True, kw_only=True)
class _Told:
    """What the other processes have to know of the model that the first one has loaded."""

    dtypes: dict[str, torch.dtype]
    buffers: dict[str, Tensor]


class OffloadedModelParallelStrategy(ModelParallelStrategy):
    """FSDP2 whose shards, gradients and optimizer stay in main memory: a layer is on its GPU only while it works.

    Takes the arguments of Lightning's strategy, which would move the shards to the GPUs.
    """

    def model_to_device(self) -> None:
        """Move what is no shard: buffers and metrics."""
        assert self.model is not None
        self.model._apply(lambda tensor: tensor if isinstance(tensor, DTensor) else tensor.to(self.root_device))
        _update_properties(self.model, device=self.root_device)

    def _get_process_group_backend(self) -> str:
        """Shards in main memory are gathered and summed up there, too: for a clipped norm, a replica, a checkpoint."""
        if self._process_group_backend is None and self.root_device.type == "cuda":
            return "cpu:gloo,cuda:nccl"
        backend: str = super()._get_process_group_backend()
        return backend


def shards_of(strategy: ModelParallelStrategy, *, nodes: int, devices: int) -> int:
    """Over how many processes the strategy spreads a model.

    Args:
        strategy: Of the trainer, set up or not.
        nodes: Of the run.
        devices: Of a node.

    Raises:
        ConfigurationError: Its sizes are not those of the run, or it splits otherwise than by data parallelism.
    """
    split, size, processes = strategy._tensor_parallel_size, strategy._data_parallel_size, nodes * devices
    split = devices if split == "auto" else int(split)
    size = nodes if size == "auto" else int(size)
    if split > 1:
        # Nothing would fail: the members of such a group would each train a student of their own.
        raise ConfigurationError(
            f"trainer.strategy: tensor_parallel_size={split} ('auto' takes all devices of a node), but the student "
            f"can only be sharded by data parallelism: set data_parallel_size={processes} and tensor_parallel_size=1."
        )
    if size != processes:
        raise ConfigurationError(
            f"trainer.strategy: data_parallel_size={size}, but {nodes} x {devices} processes (trainer.num_nodes x "
            f"trainer.devices): set it to {processes}, or those to what makes {size}."
        )
    return size


def load_sharded(
    load: Callable[[], PreTrainedModel],
    shape: Callable[[], PreTrainedModel],
    mesh: DeviceMesh,
    *,
    device: torch.device,
    compute_dtype: torch.dtype | None = None,
    offload: bool = False,
) -> PreTrainedModel:
    """Load a model in the first process and hand each process its part; all processes call this together.

    Every weight is NaN before it arrives, so that one which never does is noticed.

    Args:
        load: Gives the model on the CPU; called by the first process only.
        shape: Gives the same model on the meta device; called by all.
        mesh: The processes.
        device: Of this process's part.
        compute_dtype: Type in which layers are gathered and run, while the parts, gradients and their sums over the
            processes keep full precision; None: the weights' own.
        offload: Leave the parts, their gradients and the buffers on the CPU; layers are brought to `device` to work.

    Raises:
        ConfigurationError: The first process cannot load it; all processes raise the same.
        RuntimeError: A weight was not loaded.
    """
    weights: dict[str, Any] = {}
    told: _Told | ConfigurationError | None = None
    if distributed.get_rank() == 0:
        try:
            whole = load()
        except ConfigurationError as error:
            told = error
        else:
            weights = whole.state_dict()
            told = _Told(
                dtypes={name: parameter.dtype for name, parameter in whole.named_parameters()},
                buffers=dict(whole.named_buffers()),
            )
    box = [told]
    distributed.broadcast_object_list(box)
    (told,) = box
    if isinstance(told, ConfigurationError):
        raise told
    assert told is not None
    model = shape()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(told.dtypes[name])
    shard(model, mesh, compute_dtype=compute_dtype, offload=offload)
    model.to_empty(device="cpu" if offload else device)
    _tie(model)
    _fill(model, weights, told.buffers)
    return model


def shard(
    model: PreTrainedModel, mesh: DeviceMesh, *, compute_dtype: torch.dtype | None = None, offload: bool = False
) -> None:
    """Make decoder layers and body FSDP2 units; so is the head, which is used apart from the body, unless it is tied.

    Args:
        model: Is changed in place.
        mesh: The processes.
        compute_dtype: See `load_sharded`.
        offload: Likewise.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=None if compute_dtype is None else torch.float32
    )
    resting = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if offload else OffloadPolicy()
    body: Any = model.base_model
    head: Any = model.get_output_embeddings()
    for unit in (*decoder_layers(model), body, *(() if _is_tied(model) else (head,))):
        fully_shard(unit, mesh=mesh, mp_policy=policy, offload_policy=resting)
    _tie(model)


def decoder_layers(model: PreTrainedModel) -> list[nn.Module]:
    """The blocks that the model's author names as what belongs on one device."""
    kinds = set(model._no_split_modules or ())
    return [module for module in model.base_model.modules() if type(module).__name__ in kinds]


def gathered(model: PreTrainedModel) -> None:
    """Have every process hold the whole of a sharded model until it is `spread` again; all call it together."""
    for unit in _units(model):
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    _tie(model)


def spread(model: PreTrainedModel) -> None:
    """Give back what `gathered` took."""
    for unit in _units(model):
        unit.set_reshard_after_forward(True, recurse=False)
    rest(model)


def rest(model: PreTrainedModel) -> None:
    """Give back what a forward pass without a backward one left gathered; of a model that is not sharded, nothing."""
    units = _units(model)
    for unit in units:
        unit.reshard()
    if units:
        _tie(model)


def _units(model: PreTrainedModel) -> list[FSDPModule]:
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def _is_tied(model: PreTrainedModel) -> bool:
    head: Any = model.get_output_embeddings()
    embedding: Any = model.get_input_embeddings()
    return head.weight is embedding.weight


def _tie(model: PreTrainedModel) -> None:
    """Sharding, gathering and moving replace the body's parameter; a head that is no unit keeps the old one."""
    head: Any = model.get_output_embeddings()
    if not isinstance(head, FSDPModule):
        embedding: Any = model.get_input_embeddings()
        head.weight = embedding.weight


@torch.no_grad()
def _fill(model: PreTrainedModel, weights: dict[str, Any], buffers: dict[str, Tensor]) -> None:
    """Weights of the first process to all, tensor by tensor, and buffers that are in no state dict."""
    for parameter in model.parameters():
        parameter.fill_(torch.nan)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
    set_model_state_dict(model, weights, options=options)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    empty = [name for name, parameter in model.named_parameters() if _local(parameter).isnan().any()]
    if empty:
        raise RuntimeError(f"{len(empty)} weights were not loaded, or are not numbers: {', '.join(empty[:3])}.")


def _local(parameter: Tensor) -> Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter
