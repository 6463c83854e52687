"""A folder for weights on their way to servers, which lasts as long as the run."""

import fcntl
import os
import shutil
import weakref
from collections.abc import Callable
from pathlib import Path
from tempfile import gettempdir, mkdtemp

PREFIX = "lsm-lightning-weights-"
LOCK = "in-use"
"""A file that the run which uses a folder keeps locked, so that the lock ends with the run, however that ends."""


def scratch_folder(owner: object) -> tuple[str, Callable[[], object]]:
    """A fresh folder among the temporary ones; those that killed runs have left there are removed.

    Args:
        owner: The folder is removed when it goes.

    Returns:
        The folder, and what removes it.
    """
    for folder in Path(gettempdir()).glob(f"{PREFIX}*"):
        _remove_unless_used(folder)
    made = mkdtemp(prefix=PREFIX)
    lock = _locked(Path(made) / f"{LOCK}-soon")
    os.rename(Path(made) / f"{LOCK}-soon", Path(made) / LOCK)  # it has that name only once it is locked

    def remove() -> None:
        shutil.rmtree(made, ignore_errors=True)
        os.close(lock)

    return made, weakref.finalize(owner, remove)


def _remove_unless_used(folder: Path) -> None:
    """Another machine's or user's is left alone, and one that is being made."""
    try:
        lock = os.open(folder / LOCK, os.O_RDWR)
    except OSError:
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    except OSError:
        pass  # in use
    finally:
        os.close(lock)


def _locked(file: Path) -> int:
    lock = os.open(file, os.O_RDWR | os.O_CREAT)
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return lock
