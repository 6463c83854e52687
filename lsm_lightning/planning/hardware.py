"""What a device can do: from a table by its name, or measured."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

ACHIEVED_FLOPS = 0.4
"""Of the peak that matrix products reach in training: what well-tuned trainers report (MFU of 30 to 50 %)."""
ACHIEVED_BANDWIDTH = 0.7
"""Of the peak that decoding reaches, likewise."""
HOST_BANDWIDTH = 25e9
"""Bytes a second between a GPU and main memory, and within it: what PCIe 4.0 x16 reaches of its 32 GB/s, and about what
one of eight processes gets of a server's main memory."""


@dataclass(frozen=True, kw_only=True)
class Device:
    """One device as a plan sees it."""

    name: str
    memory: float
    """Bytes."""
    flops: float
    """That are achieved a second."""
    bandwidth: float
    """Bytes a second that are achieved."""
    host_bandwidth: float = HOST_BANDWIDTH
    """Bytes a second to and in main memory, where the student is offloaded."""


@dataclass(frozen=True)
class _Peak:
    half: float
    """TFLOP/s of dense matrix products in bfloat16 (float16 where there is none)."""
    single: float
    """In float32 as torch does it by default, without TF32."""
    bandwidth: float
    """GB/s."""


PEAKS = {
    "H200": _Peak(989, 67, 4800),
    "H100": _Peak(989, 67, 3350),
    "A100": _Peak(312, 19.5, 2039),
    "L40S": _Peak(362, 91, 864),
    "A10": _Peak(125, 31, 600),
    "L4": _Peak(121, 30, 300),
    "RTX 4090": _Peak(165, 83, 1008),
    "RTX 3090": _Peak(71, 36, 936),
    "V100": _Peak(125, 16, 900),
    "T4": _Peak(65, 8, 320),
}
"""From the makers' data sheets, by a part of the name that the driver gives; longer names are looked for first."""
PLANNED_GPU = "H100"
"""Where a configuration asks for GPUs and none is at hand."""
PLANNED_GPU_MEMORY = 80 * 2**30


def gpu(*, half: bool, flops: float | None = None, bandwidth: float | None = None) -> Device:
    """The GPU at hand, or else an 80 GB H100; what is not given is a share of its peak in half or single precision."""
    name, memory = PLANNED_GPU, PLANNED_GPU_MEMORY
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        name, memory = properties.name, properties.total_memory
    known = next((part for part in sorted(PEAKS, key=len, reverse=True) if part in name), PLANNED_GPU)
    peak = PEAKS[known]
    return Device(
        name=name if known in name else f"{name}, as fast as one {known}",
        memory=memory,
        flops=flops or ACHIEVED_FLOPS * 1e12 * (peak.half if half else peak.single),
        bandwidth=bandwidth or ACHIEVED_BANDWIDTH * 1e9 * peak.bandwidth,
    )


def cpu(processes: int, *, half: bool, flops: float | None = None, bandwidth: float | None = None) -> Device:
    """This machine's processor, and its memory, shared by so many processes; what is not given is measured."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / processes
    if flops is None:
        factor = torch.ones(512, 512, dtype=torch.bfloat16 if half else torch.float32)
        flops = 2 * 512**3 * _rate(lambda: factor @ factor)
    if bandwidth is None:
        buffer = torch.ones(2**25)
        bandwidth = 2 * buffer.nbytes * _rate(buffer.clone)
    return Device(name=f"CPU, {torch.get_num_threads()} threads", memory=memory, flops=flops, bandwidth=bandwidth)


def _rate(work: Callable[[], object], seconds: float = 0.5) -> float:
    """How often a second something can be done."""
    work()
    started, times = time.perf_counter(), 0
    while (spent := time.perf_counter() - started) < seconds:
        work()
        times += 1
    return times / spent
