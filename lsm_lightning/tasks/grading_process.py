"""Symbolic comparison in a process that can be killed: model text can freeze the interpreter that reads it."""

import atexit
import contextlib
import json
import os
import subprocess
import threading
from collections.abc import Iterator

from lsm_lightning.tasks import child

TIME_LIMIT = 3.0
"""Seconds of wall time for one comparison."""
START_LIMIT = 60.0
"""Seconds of wall time for the process to import what it needs."""
WORKER = "lsm_lightning.tasks.grading_worker"


class SymbolicComparer:
    """Compares two expressions in a child process that starts with the first comparison.

    A comparison over the time limit, or one that brings the process down, is given up as None, and a fresh process
    starts in the background for the next one. Threads take turns; a forked child starts its own process.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._ready = False
        self._owner = 0
        self._lock = threading.Lock()
        atexit.register(self.close)

    @property
    def running(self) -> bool:
        """Whether there is a process."""
        return self._process is not None

    def equal(self, gold: str, answer: str) -> bool | None:
        """Whether two LaTeX expressions are equal; None if that could not be found out within `TIME_LIMIT`.

        Raises:
            RuntimeError: The process does not start.
        """
        with self._lock:
            process = self._started()
            reply = ""
            with contextlib.suppress(BrokenPipeError), _killed_after(process, TIME_LIMIT):
                assert process.stdin is not None
                process.stdin.write(json.dumps({"gold": gold, "answer": answer}) + "\n")
                process.stdin.flush()
                reply = _line(process)
            if not reply:
                self._stop()
                self._spawn()
            return json.loads(reply) if reply else None

    def close(self) -> None:
        """End the process, if there is one; the next comparison starts another."""
        with self._lock:
            self._stop()

    def _started(self) -> subprocess.Popen[str]:
        if self._process is not None and self._owner != os.getpid():
            self._stop()
        process = self._process or self._spawn()
        if not self._ready:
            with _killed_after(process, START_LIMIT):
                self._ready = bool(_line(process))
        if not self._ready:
            self._stop()
            raise RuntimeError(
                f"The grading process did not start (exit status {process.returncode}). Run "
                f"`{' '.join(child.command(WORKER))}` to see why; math-verify has to be installed."
            )
        return process

    def _spawn(self) -> subprocess.Popen[str]:
        self._process = child.start(WORKER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8")
        self._ready = False
        self._owner = os.getpid()
        return self._process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if self._owner != os.getpid():
            child.disown(process)
            return
        process.kill()
        with contextlib.suppress(BrokenPipeError):
            process.communicate()


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


@contextlib.contextmanager
def _killed_after(process: subprocess.Popen[str], seconds: float) -> Iterator[None]:
    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
