"""Who works when, and who waits: the spans of every step as a trace that browsers draw."""

import json
import threading
import time
from collections import defaultdict
from pathlib import Path
from typing import TextIO

from lightning.pytorch.profilers import Profiler

SHORTEST = 1e-3


class Timeline(Profiler):
    """Writes `timeline.json` into the run's folder, in the format of Chrome's tracing: open it in ui.perfetto.dev.

    A row for each thread of a process. It holds the phases of a step, their parts, and what of Lightning's own work
    takes long enough. The file may be read at any time, also after a kill.

    Args:
        shortest: Seconds; what is over sooner is left out.
    """

    def __init__(self, shortest: float = SHORTEST) -> None:
        super().__init__()
        self._shortest = shortest
        self._open: defaultdict[tuple[int, str], list[float]] = defaultdict(list)
        self._file: TextIO | None = None

    def setup(self, stage: str, local_rank: int | None = None, log_dir: str | None = None) -> None:
        """Open this process's file."""
        super().setup(stage, local_rank, log_dir)
        if stage != "fit" or log_dir is None or self._file is not None:
            return
        name = f"timeline_{local_rank}.json" if local_rank else "timeline.json"
        Path(log_dir).mkdir(parents=True, exist_ok=True)
        self._file = Path(log_dir, name).open("w", buffering=1)  # noqa: SIM115 - open as long as the run is
        self._file.write("[\n")  # the format does without the bracket at the end

    def start(self, action_name: str) -> None:
        """A span begins in this thread."""
        self._open[threading.get_ident(), action_name].append(time.perf_counter())

    def stop(self, action_name: str) -> None:
        """The last span of this name ends."""
        begun = self._open[threading.get_ident(), action_name]
        if not begun or self._file is None:
            begun.clear()
            return
        started = begun.pop()
        seconds = time.perf_counter() - started
        if seconds < self._shortest:
            return
        span = {
            "name": action_name,
            "ph": "X",  # a complete span
            "ts": round(started * 1e6),
            "dur": round(seconds * 1e6),
            "pid": self.local_rank,
            "tid": threading.get_native_id(),
        }
        self._file.write(json.dumps(span) + ",\n")

    def teardown(self, stage: str | None) -> None:
        """Close it."""
        super().teardown(stage)
        if self._file is not None:
            self._file.close()
            self._file = None
