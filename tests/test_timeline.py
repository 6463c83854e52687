"""The trace of a run: real spans, nested as they were, readable at any time."""

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from lsm_lightning.callbacks import Timeline
from lsm_lightning.callbacks.timeline import STEP


def spans(path: Path) -> list[dict[str, Any]]:
    """As a viewer reads a trace whose end is missing."""
    return json.loads(path.read_text().rstrip().rstrip(",") + "]")


@pytest.fixture
def timeline(tmp_path: Path) -> Timeline:
    timeline = Timeline(shortest=0.005)
    timeline.setup("fit", 0, str(tmp_path))
    return timeline


def test_spans_hold_what_passed_and_lie_inside_each_other(timeline, tmp_path):
    with timeline.profile(STEP):
        with timeline.profile("rollout"):
            time.sleep(0.02)
        with timeline.profile("short"):
            pass
        assert list(tmp_path.iterdir()) == []  # not before the first step is over
    rollout, step = spans(tmp_path / "timeline.json")
    assert (rollout["name"], step["name"]) == ("rollout", STEP)
    assert step["ts"] <= rollout["ts"]
    assert rollout["ts"] + rollout["dur"] <= step["ts"] + step["dur"] + 1
    assert 20_000 <= rollout["dur"] < 2_000_000


def test_threads_have_rows_of_their_own_under_one_name(timeline, tmp_path):
    def work(seconds: float) -> None:
        with timeline.profile("score"):
            time.sleep(seconds)

    threads = [threading.Thread(target=work, args=(seconds,)) for seconds in (0.03, 0.06)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with timeline.profile(STEP):
        pass
    short, long = spans(tmp_path / "timeline.json")
    assert short["tid"] != long["tid"]
    assert short["dur"] < long["dur"]


def test_an_end_without_a_beginning_is_nothing(timeline, tmp_path):
    timeline.stop("never begun")
    with timeline.profile(STEP):
        pass
    timeline.teardown("fit")
    timeline.stop("after the end")
    assert (tmp_path / "timeline.json").read_text() == "[\n"


def test_a_run_writes_the_phases_of_every_step(run, settings, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(settings))
    assert run("fit", "--config", str(config), "--trainer.max_steps", "2", "--summary.evaluate", "false") == 0
    (path,) = tmp_path.rglob("timeline.json")
    for name in ("rollout", "teacher", "update"):
        assert sum(span["name"] == name for span in spans(path)) == 2, name
