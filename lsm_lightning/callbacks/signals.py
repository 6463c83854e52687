"""Ctrl-C, SIGTERM and SLURM's warning: a run stops where nothing is lost."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

SECONDS_TO_A_SECOND_CTRL_C = 1.0
"""Launchers pass on a Ctrl-C that their processes have got from the terminal already."""


class Stopped(KeyboardInterrupt):
    """A signal asked for the end of the run.

    Args:
        signum: Which.
        agreed: All processes have stopped here.
    """

    def __init__(self, signum: int, agreed: bool = False) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum
        self.agreed = agreed


class StopSignals(Callback):
    """Raises `Stopped` where a run may end after a signal; `Checkpoint` saves then, and calls `end_of_step`.

    One process stops at once, but never between the optimiser's step and the end of the training step: what a step
    changes and what it logs belong together. Several finish their step, or a task of their validation, agree, and stop
    together. A second Ctrl-C ends all processes at once and saves nothing.
    """

    def __init__(self) -> None:
        self.received = 0
        """The number of the signal that came, or 0."""
        self._since = 0.0
        self._listening = False
        self._held = False
        self._together = False
        self._trainer: Trainer | None = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals until the end of the block; does nothing in other threads than the main one."""
        before = {signum: signal.getsignal(signum) for signum in _signals()}
        self._listening = threading.current_thread() is threading.main_thread()
        self._listen()
        try:
            yield
        finally:
            for signum, handler in before.items():
                if handler is not None and self._listening:
                    signal.signal(signum, handler)
            self._listening = False

    def hold(self) -> None:
        """Do not stop before `end_of_step`."""
        self._held = True

    def end_of_step(self, trainer: Trainer) -> None:
        """Stop here if a process got a signal; all call it together.

        Raises:
            Stopped: One of them did.
        """
        received = self.received
        if trainer.world_size > 1:
            votes = torch.tensor(received, device=trainer.strategy.root_device)
            received = int(trainer.strategy.reduce(votes, reduce_op="max"))
        if received:
            self.received = received
            raise Stopped(received, agreed=True)
        self._held = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lightning has put its own handlers in place by now; they save, or talk to other processes, at any moment."""
        self._trainer = trainer
        self._together = trainer.world_size > 1
        self._listen()

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """From here on the step has to be finished."""
        self.hold()

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Several processes stop between two tasks too: the rest of a validation and another step may be long."""
        self.end_of_step(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """All is saved; what comes now can be left out."""
        self._together = False

    def _listen(self) -> None:
        if self._listening:
            for signum in _signals():
                signal.signal(signum, self._receive)

    def _receive(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received:
            if signum == signal.SIGINT and now - self._since > SECONDS_TO_A_SECOND_CTRL_C:
                self._die()
            return
        self.received, self._since = signum, now
        if not (self._together or self._held):
            raise Stopped(signum)
        if self._trainer is not None and self._trainer.is_global_zero:
            name = signal.Signals(signum).name
            told = f"{name}: stopping at the end of this step or evaluation; Ctrl-C stops at once, without saving.\n"
            os.write(2, told.encode())  # not print: the handler may have interrupted one

    def _die(self) -> None:
        launcher = self._trainer.strategy.launcher if self._trainer is not None else None
        if launcher is not None:
            launcher.kill(signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)


def _signals() -> list[signal.Signals]:
    """SLURM sends SIGUSR1 ahead of time where a job asks for it (`--signal=USR1@90`)."""
    slurm = [signal.SIGUSR1] if "SLURM_JOB_ID" in os.environ else []
    return [signal.SIGINT, signal.SIGTERM, *slurm]
