"""One line that tells where the run is; plain lines, now and then, where the output is no terminal."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

SECONDS_BETWEEN_PLAIN_LINES = 15.0


@contextmanager
def progress(description: str, *, shown: bool = True) -> Iterator[Callable[[int, int], None]]:
    """A bar for work that reports (finished, all); one plain line where the output is no terminal.

    Args:
        description: What is going on.
        shown: False on all processes but the first.
    """
    if shown and not sys.stdout.isatty():
        print(f"{description} ...", flush=True)
    with _bar(shown) as bar:
        task = bar.add_task(description, total=None, note="")
        yield lambda finished, total: bar.update(task, completed=finished, total=total)


class ProgressLine(ProgressBar):
    """Step, task, reward and KL of the last step of each task, and the time left."""

    def __init__(self) -> None:
        super().__init__()
        self._bar: Progress | None = None
        self._notes: dict[str, str] = {}
        self._printed = 0.0

    def disable(self) -> None:
        """Say nothing; Lightning calls it on all processes but the first."""
        self._enabled = False

    def enable(self) -> None:
        """Speak again."""
        self._enabled = True

    _enabled = True

    @property
    def is_enabled(self) -> bool:
        """Whether the line is shown; Lightning asks before it prints."""
        return self._enabled

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Print above the line."""
        if self._bar is not None and sys.stdout.isatty():
            self._bar.console.print(*args)
        else:
            print(*args, flush=True)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Show the line, and how far the step's episodes are."""
        if not self._enabled:
            return
        if self._bar is None:
            self._bar = _bar()
            self._bar.start()
            self._line = self._bar.add_task("training", total=trainer.max_steps, note="")
        bar, line = self._bar, self._line
        notes = " · ".join(self._notes.values())
        bar.update(line, completed=trainer.global_step, description=f"training · {batch.task}", note=notes)
        pl_module.on_rollout_progress = lambda done, total: bar.update(  # type: ignore[assignment]
            line, note=f"{notes} · episodes {done}/{total}"
        )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note what the step measured."""
        reward, kl = outputs.get(f"{batch.task}/train/reward"), outputs.get(f"{batch.task}/train/kl")
        if not self._enabled or reward is None or kl is None:
            return
        self._notes[batch.task] = f"{batch.task}: reward {reward:.2f}, KL {kl:.3f}"
        if self._bar is not None:
            self._bar.update(self._line, completed=trainer.global_step, note=" · ".join(self._notes.values()))
        if not sys.stdout.isatty() and time.monotonic() - self._printed > SECONDS_BETWEEN_PLAIN_LINES:
            self._printed = time.monotonic()
            print(f"step {trainer.global_step}/{trainer.max_steps} · {' · '.join(self._notes.values())}", flush=True)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the line away."""
        self._stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Take the line away, so that the message stands alone."""
        self._stop()

    def _stop(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


def _bar(shown: bool = True) -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(),
        disable=not (shown and sys.stdout.isatty()),
        transient=True,
    )
