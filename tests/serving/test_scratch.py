"""Weights on their way to servers leave nothing behind, even of runs that were killed."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lsm_lightning.serving.scratch import PREFIX, scratch_folder

RUN = """
import sys, tempfile, time
tempfile.tempdir = sys.argv[1]
from lsm_lightning.serving.scratch import scratch_folder
class Owner: pass
owner = Owner()
print(scratch_folder(owner)[0], flush=True)
time.sleep(1000)
"""


class Owner:
    """Something that can be referred to weakly."""


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_it_lasts_as_long_as_its_owner(place):
    owner = Owner()
    folder, remove = scratch_folder(owner)
    (Path(folder) / "weights").write_text("1")
    assert Path(folder).parent == place
    del owner
    assert not Path(folder).exists()
    remove()  # twice is harmless


def test_what_a_killed_run_left_is_removed_and_what_another_uses_is_not(place):
    run = subprocess.Popen([sys.executable, "-c", RUN, str(place)], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    used = Path(run.stdout.readline().strip())
    young = place / f"{PREFIX}being-made"
    young.mkdir()
    scratch_folder(Owner())
    assert used.exists()
    run.kill()
    run.wait()
    run.stdout.close()
    assert used.exists()
    scratch_folder(Owner())
    assert not used.exists()
    assert young.exists()
