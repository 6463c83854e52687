"""Processes of our own beside the trainer: how one is started from a module of this package, and let go of."""

import contextlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any


def command(module: str, *arguments: str) -> list[str]:
    """The command line that runs a module of this package."""
    return [sys.executable, "-P", "-m", module, *arguments]


def start(module: str, *arguments: str, **options: Any) -> "subprocess.Popen[Any]":
    """Run a module of this package in a process that inherits neither a GPU nor a group of processes.

    An interrupt from the keyboard does not reach it: that is for the trainer.

    Args:
        module: Its full name.
        *arguments: Of its command line.
        **options: Of `subprocess.Popen`.
    """
    package_root = str(Path(__file__).resolve().parents[2])
    search_path = os.pathsep.join(filter(None, [package_root, os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        command(module, *arguments),
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": search_path, "OMP_NUM_THREADS": "1"},
        **options,
    )


def disown(process: "subprocess.Popen[Any]") -> None:
    """In a forked child: let go of the parent's process without touching it."""
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):
                pipe.close()
    process.returncode = 0  # it is not ours to wait for
