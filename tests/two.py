"""Work that two processes do together."""

import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import distributed, multiprocessing


def by_two(work: Callable[..., Any], folder: Path, *arguments: Any) -> list[Any]:
    """What each of two processes makes of it; their ranks are those of `distributed`.

    Args:
        work: A function at the top of a module.
        folder: An empty one, where they meet.
        arguments: Of the function.
    """
    multiprocessing.spawn(_one, (work, folder, *arguments), nprocs=2)
    return [torch.load(folder / f"found-{rank}", weights_only=False) for rank in (0, 1)]


def _one(rank: int, work: Callable[..., Any], folder: Path, *arguments: Any) -> None:
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"file://{folder / 'meeting'}", rank=rank, world_size=2)
    try:
        found = work(*arguments)
    except Exception:
        traceback.print_exc()
        raise
    torch.save(found, folder / f"found-{rank}")
    distributed.destroy_process_group()
