"""The command `plan`."""

import json as json_format
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from lsm_lightning.datamodule import AlternatingTasks
from lsm_lightning.errors import ConfigurationError
from lsm_lightning.module import OnPolicyDistillation
from lsm_lightning.planning.plan import plan
from lsm_lightning.planning.report import as_dict, show


def tell_plan(
    model: OnPolicyDistillation,
    datamodule: AlternatingTasks,
    trainer: Mapping[str, Any],
    evaluate: bool,
    prompt_tokens: int = 512,
    device_memory: float | None = None,
    tflops: float | None = None,
    bandwidth: float | None = None,
    json: str | None = None,
) -> None:
    """Tell where memory and time of a run will go and what will not fit; needs no GPU, no weights and no data.

    Args:
        model: The module.
        datamodule: The tasks.
        trainer: The trainer's settings.
        evaluate: Whether teachers play the test split before training.
        prompt_tokens: Length of the longest prompt, in tokens.
        device_memory: Of one device, in GiB; the GPU's at hand, 80 if there is none, or a CPU process's share.
        tflops: That a device achieves, in 10^12 a second; 40 % of its peak, or what is measured on the CPU.
        bandwidth: That a device achieves, in GB a second; 70 % of its peak, or what is measured on the CPU.
        json: Also write the plan to this file.

    Raises:
        ConfigurationError: The run cannot be planned, or the file not be written.
    """
    for name, value in {"prompt_tokens": prompt_tokens, "device_memory": device_memory, "tflops": tflops,
                        "bandwidth": bandwidth}.items():  # fmt: skip
        if value is not None and value <= 0:
            raise ConfigurationError(f"--{name}={value}: use a positive number.")
    made = plan(
        model,
        datamodule,
        trainer,
        evaluate=evaluate,
        prompt_tokens=prompt_tokens,
        device_memory=device_memory,
        tflops=tflops,
        bandwidth=bandwidth,
    )
    show(made, Console(soft_wrap=True))
    if json is not None:
        try:
            Path(json).write_text(json_format.dumps(as_dict(made), indent=2) + "\n")
        except OSError as error:
            raise ConfigurationError(f"--json: '{json}' cannot be written: {error.strerror}.") from error
