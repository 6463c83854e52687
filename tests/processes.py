"""Runs of the program in processes of their own, to be signalled and killed; forked from one that has imported all."""

import json
import multiprocessing
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer

LIGHTNINGS_ADVICE = [
    # On loaders and checkpoints; the command line leaves it out too (`cli._quieten`).
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*treespec, LeafSpec"),
    pytest.mark.filterwarnings("ignore:.*Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*AFTER optimization"),
    pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable"),
]
SECONDS_ALLOWED = 60.0
"""Before a process counts as hanging."""

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["lsm_lightning.cli", "lsm_lightning.tasks.math", "torch.utils.tensorboard", "transformers.generation"]
)


class Recorder(Callback):
    """Appends what every step sampled and measured to a file, times left out; a step done twice stands there twice.

    Args:
        path: The file; each process but the first adds its rank.
        pause: Seconds to wait after each step, for what shall happen before the next.
    """

    def __init__(self, path: str, pause: float = 0.0) -> None:
        self.path = path
        self.pause = pause

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rollout: Any = pl_module.rollout

        def remembered(batch: Any, **options: Any) -> Any:
            trajectories = rollout(batch, **options)
            self.sampled = [turn.completion.ids for trajectory in trajectories for turn in trajectory.turns]
            return trajectories

        pl_module.rollout = remembered

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        measured = {name: value for name, value in outputs.items() if "/seconds/" not in name}
        line = json.dumps({"step": batch.step, "sampled": self.sampled, **measured})
        with open(f"{self.path}{trainer.global_rank or ''}", "ab", buffering=0) as file:
            file.write(f"{line}\n".encode())
        time.sleep(self.pause)


def records(path: Path) -> list[dict[str, Any]]:
    """What a `Recorder` wrote so far."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Run:
    """The program with these arguments, on one or several processes.

    Args:
        arguments: Of the command line.
        output: A file for what each process prints; each but the first adds its rank.
        processes: How many.
        full: A process that may write no file larger than so many bytes, as if its disk were full.
    """

    def __init__(
        self, arguments: Sequence[str], output: Path, processes: int = 1, full: Mapping[int, int] | None = None
    ) -> None:
        self.outputs = [output.with_name(f"{output.name}{rank or ''}") for rank in range(processes)]
        launched = _launched(processes)
        self.processes: list[BaseProcess] = []
        for rank, path in enumerate(self.outputs):
            variables = launched(rank) if processes > 1 else {}
            limit = (full or {}).get(rank)
            self.processes.append(_CONTEXT.Process(target=_main, args=(list(arguments), str(path), variables, limit)))
        for process in self.processes:
            process.start()

    def send(self, signum: int, ranks: Sequence[int] | None = None) -> None:
        """Send a signal to some, or all."""
        for rank in range(len(self.processes)) if ranks is None else ranks:
            pid = self.processes[rank].pid
            if pid is not None and self.processes[rank].is_alive():
                os.kill(pid, signum)

    def wait(self) -> list[int | None]:
        """The exit statuses; a negative one is the signal that killed it."""
        end = time.monotonic() + SECONDS_ALLOWED
        for process in self.processes:
            process.join(max(0.0, end - time.monotonic()))
        hanging = [process for process in self.processes if process.is_alive()]
        self.kill()
        assert not hanging, self.said()
        return [process.exitcode for process in self.processes]

    def kill(self) -> None:
        """At once, all of them."""
        self.send(signal.SIGKILL)
        for process in self.processes:
            process.join()

    def said(self, rank: int = 0) -> str:
        """What a process printed."""
        return self.outputs[rank].read_text() if self.outputs[rank].exists() else ""

    def wait_for(self, path: Path, steps: int) -> None:
        """Until a `Recorder` has written so many lines, or the first process has ended."""
        end = time.monotonic() + SECONDS_ALLOWED
        while self.processes[0].is_alive() and len(records(path)) < steps:
            assert time.monotonic() < end, self.said()
            time.sleep(0.005)


@contextmanager
def started(*arguments: Any, **settings: Any) -> Iterator[Run]:
    """A run that does not outlive the block."""
    run = Run(*arguments, **settings)
    try:
        yield run
    finally:
        run.kill()


def _launched(processes: int) -> Any:
    """The variables that torchrun sets, by rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    def variables(rank: int) -> dict[str, str]:
        return {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes), "RANK": str(rank),
            "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(processes), "GROUP_RANK": "0",
            "TORCHELASTIC_RUN_ID": str(port),
        }  # fmt: skip

    return variables


def _main(arguments: list[str], output: str, variables: dict[str, str], limit: int | None) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.environ.update(variables)
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    sys.argv = ["lsm-lightning", *arguments]
    import torch

    from lsm_lightning.cli import main

    torch.set_num_threads(1)
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Not the usual way out: it waits for loggers' threads that a run ended in order does not need.
    os._exit(status)
