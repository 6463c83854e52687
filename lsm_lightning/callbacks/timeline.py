"""Who works when, and who waits: the spans of every step as a trace that browsers draw."""

import json
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import TextIO

from lightning.pytorch.profilers import Profiler

SHORTEST = 1e-3
STEP = "run_training_batch"
"""What Lightning calls a step."""


class Timeline(Profiler):
    """Writes `timeline.json` into the run's folder, in the format of Chrome's tracing: open it in ui.perfetto.dev.

    A row for each thread of a process. It holds the phases of a step, their parts, and what of Lightning's own work
    takes long enough. It is written at the end of every step, and may be read at any time, also after a kill.

    Args:
        shortest: Seconds; what is over sooner is left out.
    """

    def __init__(self, shortest: float = SHORTEST) -> None:
        super().__init__()
        self._shortest = shortest
        self._open: defaultdict[tuple[int, str], list[float]] = defaultdict(list)
        self._path: Path | None = None
        self._file: TextIO | None = None
        self._spans: list[str] = []

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """Choose this process's file."""
        super().setup(stage, local_rank, log_dir)
        if stage == "fit" and log_dir is not None:
            self._path = Path(log_dir, f"timeline_{local_rank}.json" if local_rank else "timeline.json")

    def start(self, action_name: str) -> None:
        """A span begins in this thread."""
        self._open[threading.get_ident(), action_name].append(time.perf_counter())

    def stop(self, action_name: str) -> None:
        """The last span of this name ends."""
        begun = self._open[threading.get_ident(), action_name]
        if not begun or self._path is None:
            begun.clear()
            return
        started = begun.pop()
        seconds = time.perf_counter() - started
        if seconds >= self._shortest:
            span = {
                "name": action_name,
                "ph": "X",  # a complete span
                "ts": round(started * 1e6),
                "dur": round(seconds * 1e6),
                "pid": self.local_rank,
                "tid": threading.get_native_id(),
            }
            self._spans.append(json.dumps(span) + ",\n")
        if action_name == STEP:
            self._write(self._path)

    def teardown(self, stage: str | None) -> None:
        """Close it."""
        super().teardown(stage)
        if self._file is not None and self._path is not None:
            self._write(self._path)
            self._file.close()
            self._file = self._path = None

    def _write(self, path: Path) -> None:
        if self._file is None:  # not before the first step, or loggers would take the folder for another run's
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("w", buffering=1)
            self._file.write("[\n")  # the format does without the bracket at the end
        spans, self._spans = self._spans, []
        self._file.writelines(spans)
