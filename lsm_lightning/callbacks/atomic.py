"""Files and folders that are whole at every instant: written beside their place, then swapped in.

A file is moved over the old one. A folder cannot be, so the place of a sharded checkpoint is a symbolic link to one of
two data folders beside it, and the link is what is swapped: `last.ckpt` → `last.ckpt.0` or `last.ckpt.1`.
"""

import os
import shutil
from contextlib import suppress
from pathlib import Path


def partial(place: Path) -> Path:
    """Where to write what `publish` shall make visible."""
    return place.with_name(f"{place.name}.partial")


def publish(place: Path) -> None:
    """Put what was written to `partial(place)` in its place, and what was there before away.

    A kill at any instant leaves the old or the new state there, whole. One exception: where a real folder lies, put
    there by other means, there is nothing for the moment between two system calls.

    Raises:
        OSError: It cannot be done; the old state is still there.
    """
    written = partial(place)
    _sync(written)
    if place.is_dir() and not place.is_symlink():
        os.replace(place, _slots(place)[0])
        point(place, _slots(place)[0])
    if written.is_dir():
        slot = next(slot for slot in _slots(place) if slot != _target(place))
        _remove(slot)
        os.replace(written, slot)
        point(place, slot)
    else:
        os.replace(written, place)
        _sync_folder(place.parent)
    clear(place)


def point(link: Path, target: Path) -> None:
    """Make `link` a symbolic link to what lies beside it, in one instant, whatever file or link was there.

    Raises:
        OSError: The file system has no links, or cannot be written.
    """
    fresh = link.with_name(f"{link.name}.link")
    _remove(fresh)
    fresh.symlink_to(os.path.relpath(target, link.parent))
    os.replace(fresh, link)
    _sync_folder(link.parent)


def clear(place: Path) -> None:
    """Remove what a killed `publish` left beside the place, never what is visible there."""
    for leftover in (partial(place), place.with_name(f"{place.name}.link"), *_slots(place)):
        if leftover != _target(place):
            _remove(leftover)


def remove(place: Path) -> None:
    """Remove a file, or a link together with its data folder."""
    _remove(place)
    clear(place)


def _slots(place: Path) -> tuple[Path, Path]:
    return place.with_name(f"{place.name}.0"), place.with_name(f"{place.name}.1")


def _target(place: Path) -> Path | None:
    return place.with_name(os.readlink(place)) if place.is_symlink() else None


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """To the disk itself, since a move may outlive a power failure that the data do not."""
    if path.is_dir():
        for inside in path.iterdir():
            _sync(inside)
        _sync_folder(path)
        return
    with path.open("rb") as file:
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):  # some network file systems know no such thing for folders
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
