"""The GPU that a process shares with a server of its own."""

import os

import torch

from lsm_lightning.serving.launch import VISIBLE_GPUS


def only_own_gpu() -> dict[str, str]:
    """Variables by which a child sees this process's GPU and no other; none where nothing is computed on one."""
    if not torch.cuda.is_initialized():
        return {}
    number, visible = torch.cuda.current_device(), os.environ.get(VISIBLE_GPUS)
    return {VISIBLE_GPUS: visible.split(",")[number].strip() if visible else str(number)}


def give_back_cache() -> None:
    """Let others have what torch keeps for tensors to come."""
    torch.cuda.empty_cache()  # does nothing without a GPU


def free_memory() -> int | None:
    """Bytes of this process's GPU that nobody holds; None where nothing is computed on one."""
    return torch.cuda.mem_get_info()[0] if torch.cuda.is_initialized() else None
