"""Where the global random number generators of a process stand, in types that every checkpoint can hold."""

import random
from typing import Any

import numpy as np
import torch

RandomStates = dict[str, Any]
"""Of Python, numpy, torch and, on a GPU, of that GPU."""


def random_states(device: torch.device) -> RandomStates:
    """Where they stand now.

    Args:
        device: The one that the process computes on.
    """
    _, keys, *position = np.random.get_state(legacy=True)
    states = {
        "python": random.getstate(),
        "numpy": (np.asarray(keys).tolist(), *position),
        "torch": torch.get_rng_state(),
    }
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def restore_random_states(states: RandomStates, device: torch.device) -> None:
    """Put them back there; a GPU's only where there was and is one."""
    random.setstate(states["python"])
    keys, *position = states["numpy"]
    np.random.set_state(("MT19937", np.array(keys, dtype=np.uint32), *position))
    torch.set_rng_state(states["torch"].cpu())
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"].cpu(), device)
