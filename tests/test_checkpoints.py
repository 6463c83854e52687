"""A run that is killed, stopped or out of disk loses nothing that was saved, and goes on as if nothing had been."""

import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from processes import records, started
from tiny import save_tiny
from torch import Tensor
from torch.distributed import checkpoint as sharded

from lsm_lightning import checkpoints
from lsm_lightning.callbacks import atomic
from lsm_lightning.callbacks.signals import StopSignals
from lsm_lightning.cli import CLI
from lsm_lightning.errors import ConfigurationError
from lsm_lightning.module import OnPolicyDistillation

STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}

# ---- files and folders that are whole at every instant --------------------------------------------------------------

Write = Callable[[Path, str], None]


def write_file(path: Path, text: str) -> None:
    path.write_text(text * 100)


def write_folder(path: Path, text: str) -> None:
    path.mkdir()
    for name in ("one", "two"):
        (path / name).write_text(text * 100)


def contents(place: Path) -> set[str]:
    """What is visible there, as a set of one if it is whole."""
    files = sorted(place.iterdir()) if place.is_dir() else [place]
    assert len(files) == (2 if place.is_dir() else 1)
    return {text[:1] if (text := file.read_text()) == text[:1] * 100 else "damaged" for file in files}


class Killed(BaseException):
    """As nothing catches it, the disk is left as by SIGKILL at that call."""


CHANGES = {"fsync", "mkdir", "open", "rename", "replace", "rmdir", "symlink", "unlink", "write"}
"""The names of C functions that change the disk; open, which may, and fsync are there for good measure."""


@contextmanager
def killed_at(call: int) -> Iterator[None]:
    """Instead of the n-th call that changes the disk; a kill between two of them leaves the same."""
    left = call

    def count(frame: Any, event: str, function: Any) -> None:
        nonlocal left
        if event == "c_call" and function.__name__ in CHANGES:
            left -= 1
            if left < 0:
                raise Killed

    sys.setprofile(count)
    try:
        yield
    finally:
        sys.setprofile(None)


@pytest.mark.parametrize("before", [write_file, write_folder])
@pytest.mark.parametrize("after", [write_file, write_folder])
def test_a_kill_at_any_call_leaves_the_old_or_the_new_state(tmp_path, before: Write, after: Write):
    place = tmp_path / "last.ckpt"
    seen = []
    for call in range(100):
        shutil.rmtree(tmp_path)
        tmp_path.mkdir()
        before(atomic.partial(place), "a")
        atomic.publish(place)
        after(atomic.partial(place), "b")
        try:
            with killed_at(call):
                atomic.publish(place)
            killed = False
        except Killed:
            killed = True
        (state,) = contents(place)
        seen.append(state)
        atomic.clear(place)
        assert contents(place) == {state}
        after(atomic.partial(place), "c")
        atomic.publish(place)
        assert contents(place) == {"c"}
        assert len(list(tmp_path.iterdir())) == (2 if after is write_folder else 1)  # a link and its folder, or a file
        if not killed:
            break
    assert not killed
    assert len(seen) > 5
    assert set(seen) == {"a", "b"}
    assert sorted(seen) == seen  # once new, it stays


def test_a_real_folder_in_the_place_is_replaced_too(tmp_path):
    place = tmp_path / "last.ckpt"
    write_folder(place, "a")
    write_folder(atomic.partial(place), "b")
    atomic.publish(place)
    assert contents(place) == {"b"}
    assert place.is_symlink()
    shutil.move(tmp_path, tmp_path.with_name("moved"))
    assert contents(tmp_path.with_name("moved") / "last.ckpt") == {"b"}
    atomic.remove(tmp_path.with_name("moved") / "last.ckpt")
    assert list(tmp_path.with_name("moved").iterdir()) == []


# ---- checkpoints that cannot be used --------------------------------------------------------------------------------


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    folder = tmp_path / "shards.ckpt"
    state = {"state_dict": {f"weight{n}": torch.arange(1000.0) for n in range(3)}}
    with pytest.warns(UserWarning, match="single process"):
        sharded.save(state, checkpoint_id=folder, no_dist=True)
    torch.save({"student": "x"}, folder / checkpoints.EXTRA)
    return folder


def test_a_whole_sharded_checkpoint_passes(shards):
    checkpoints.check(shards)


@pytest.mark.parametrize("name", [".metadata", "meta.pt", "__0_0.distcp"])
@pytest.mark.parametrize("left", [None, 0.0, 0.5, 0.999])
def test_a_sharded_checkpoint_that_lacks_something_is_refused(shards, name, left):
    (path,) = shards.glob(name)
    data = path.read_bytes()
    path.unlink()
    if left is not None:
        path.write_bytes(data[: int(left * len(data))])
    with pytest.raises(ConfigurationError, match=name):
        checkpoints.check(shards)


@pytest.mark.parametrize("left", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_file_that_was_cut_off_is_refused(tmp_path, left):
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {"weight": torch.arange(1000.0)}}, path)
    checkpoints.check(path)
    path.write_bytes(path.read_bytes()[: int(left * path.stat().st_size)])
    with pytest.raises(ConfigurationError, match=r"last\.ckpt"):
        checkpoints.check(path)


@pytest.mark.parametrize("place", [0.1, 0.3, 0.5, 0.7])
def test_a_damaged_file_is_refused(tmp_path, place):
    """Which torch would load."""
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": {f"weight{n}": torch.arange(1000.0) for n in range(3)}}, path)
    data = bytearray(path.read_bytes())
    data[int(place * len(data))] ^= 1
    path.write_bytes(data)
    with pytest.raises(ConfigurationError, match=r"last\.ckpt"):
        checkpoints.check(path)


# ---- runs -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def forgetful(student_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A student with dropout, so that random states matter."""
    return save_tiny(tmp_path_factory.mktemp("forgetful") / "student", student_tokenizer, seed=1, attention_dropout=0.2)


SHARDED = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1, "process_group_backend": "gloo"},
}
STRATEGIES: dict[str, dict[str, Any]] = {
    "ddp": {"devices": 2, "strategy": "ddp"},
    "shards": {"devices": 2, "strategy": SHARDED},
}
several = pytest.mark.parametrize("strategy", STRATEGIES)

Prepare = Callable[..., list[str]]


@pytest.fixture
def prepare(settings: dict[str, Any], forgetful: Path, tmp_path: Path) -> Prepare:
    """Arguments of a run in a folder of its own, which is recorded."""

    def prepare(name: str, steps: int, every: int = 20, **trainer: Any) -> list[str]:
        folder = tmp_path / name
        folder.mkdir()
        settings["model"]["student"] = str(forgetful)
        settings["model"]["optimizer"] = {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2}}
        settings["model"]["lr_scheduler"] = {
            "class_path": "torch.optim.lr_scheduler.ExponentialLR", "init_args": {"gamma": 0.9},
        }  # fmt: skip
        settings["data"] |= {"prompts_per_step": 3}
        recorder = {"class_path": "processes.Recorder", "init_args": {"path": str(folder / "steps")}}
        settings["trainer"] |= {
            "max_steps": steps, "devices": 1, "logger": True, "default_root_dir": str(folder), "callbacks": [recorder],
            **trainer,
        }  # fmt: skip
        settings["checkpoint"] = {"every_n_train_steps": every}
        settings["summary"] = {"evaluate": False}
        (folder / "run.yaml").write_text(yaml.safe_dump(settings))
        return ["fit", "--config", str(folder / "run.yaml")]

    return prepare


def weights_of(folder: Path) -> dict[str, Tensor]:
    """Of the newest checkpoint below a folder."""
    path = checkpoints.newest(folder)
    assert path is not None
    return checkpoints.load(path)["state_dict"]


def assert_same(folder: Path, other: Path, tolerance: float = 0.0, ranks: int = 1) -> None:
    """The last weights, and every step however often it was done, on every process."""
    ours, theirs = weights_of(folder), weights_of(other)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance)
    for rank in range(ranks):
        expected = {step["step"]: step for step in records(other / f"steps{rank or ''}")}
        done = records(folder / f"steps{rank or ''}")
        assert {step["step"] for step in done} == expected.keys()
        for step in done:
            assert step["sampled"] == expected[step["step"]]["sampled"]
            assert step == (
                pytest.approx(expected[step["step"]], rel=tolerance) if tolerance else expected[step["step"]]
            )


def told(stderr: str) -> str:
    """The only line."""
    (line,) = [line for line in stderr.splitlines() if line.strip()]
    return line


quiet = pytest.mark.filterwarnings("ignore:.*your dataloader is not resumable", "ignore:.*AFTER optimization")


def resume(folder: Path, *more: str, path: str = "last") -> list[str]:
    """Arguments of the same run, going on."""
    return ["fit", "--config", str(folder / "run.yaml"), "--ckpt_path", path, *more]


# ---- going on -------------------------------------------------------------------------------------------------------


def test_random_states_go_on_where_they_stood(prepare, run, tmp_path):
    """Dropout draws the same numbers; the control has lost them."""
    assert run(*prepare("whole", 3)) == 0
    for name in ("resumed", "lost"):
        assert run(*prepare(name, 1)) == 0
        path = checkpoints.newest(tmp_path / name)
        assert path is not None
        if name == "lost":
            torch.save({**torch.load(path), "random_states": []}, path)
        assert run(*resume(tmp_path / name, "--trainer.max_steps", "3")) == 0
    assert_same(tmp_path / "resumed", tmp_path / "whole")
    with pytest.raises(AssertionError, match="not equal"):
        assert_same(tmp_path / "lost", tmp_path / "whole")


def test_the_last_step_is_saved_whatever_the_interval(prepare, run, tmp_path):
    assert run(*prepare("run", 3, every=2)) == 0
    path = checkpoints.newest(tmp_path / "run")
    assert path is not None
    assert torch.load(path)["global_step"] == 3
    assert [inside.name for inside in path.parent.iterdir()] == ["last.ckpt"]


def test_last_is_an_error_without_a_checkpoint_and_auto_starts_anew(prepare, run, tmp_path, capfd):
    prepare("run", 1)
    assert run(*resume(tmp_path / "run", path="last")) == 2
    assert told(capfd.readouterr().err).startswith("error: ckpt_path: last: no last.ckpt below")
    assert run(*resume(tmp_path / "run", path="auto")) == 0
    assert run(*resume(tmp_path / "run", "--trainer.max_steps", "2", path="auto")) == 0
    assert run(*resume(tmp_path / "run", "--trainer.max_steps", "3", path="last")) == 0
    assert [step["step"] for step in records(tmp_path / "run" / "steps")] == [0, 1, 2]


def test_the_newest_of_several_runs_is_taken(tmp_path):
    for age, name in enumerate(("version_2/checkpoints", "version_10/checkpoints", "version_1/checkpoints")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "last.ckpt").touch()
        os.utime(tmp_path / name / "last.ckpt", (1e9 - age, 1e9 - age))
    (tmp_path / "version_11" / "checkpoints").mkdir(parents=True)
    assert checkpoints.newest(tmp_path) == tmp_path / "version_2" / "checkpoints" / "last.ckpt"
    assert checkpoints.newest(tmp_path / "version_11") is None


def test_a_checkpoint_does_not_override_the_command_line(prepare, run, tmp_path, monkeypatch):
    assert run(*prepare("run", 1)) == 0
    seen = []
    monkeypatch.setattr(CLI, "fit", lambda self, model, **_: seen.append(model))
    assert run(*resume(tmp_path / "run", "--model.gradient_clip", "0.25", "--model.micro_batch_tokens", "77")) == 0
    assert (seen[0].gradient_clip, seen[0].micro_batch_tokens) == (0.25, 77)


# ---- saves that fail ------------------------------------------------------------------------------------------------


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file may grow larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_told_in_one_line_and_leaves_the_previous_checkpoint(prepare, run, tmp_path, capfd):
    into = ("--checkpoint.dirpath", str(tmp_path / "run" / "checkpoints"))
    assert run(*prepare("run", 1), *into) == 0
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    before = path.read_bytes()
    capfd.readouterr()
    with full_disk(len(before) // 2):
        assert run(*resume(tmp_path / "run", "--trainer.max_steps", "2", *into)) == 2
    line = told(capfd.readouterr().err)
    assert line.startswith(f"error: Cannot save {path}: ")
    assert "File too large" in line
    assert path.read_bytes() == before
    assert run(*resume(tmp_path / "run", "--trainer.max_steps", "2", *into)) == 0
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_cannot_be_written_is_told_before_the_first_step(prepare, run, tmp_path, capfd):
    (tmp_path / "file").touch()
    assert run(*prepare("run", 1), "--checkpoint.dirpath", str(tmp_path / "file" / "checkpoints")) == 2
    line = told(capfd.readouterr().err)
    assert line.startswith(f"error: Cannot save {tmp_path / 'file' / 'checkpoints'}: ")
    assert records(tmp_path / "run" / "steps") == []


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_told_before_the_first_step(prepare, run, tmp_path, capfd):
    folder = tmp_path / "fixed"
    folder.mkdir(mode=0o500)
    assert run(*prepare("run", 1), "--checkpoint.dirpath", str(folder)) == 2
    assert "Permission denied" in told(capfd.readouterr().err)


def test_a_run_that_cannot_be_restored_does_not_overwrite_its_checkpoint(prepare, run, tmp_path, capfd):
    """When it breaks off, weights and optimiser are of different steps."""
    into = ("--checkpoint.dirpath", str(tmp_path / "run" / "checkpoints"))
    assert run(*prepare("run", 1), *into) == 0
    path = tmp_path / "run" / "checkpoints" / "last.ckpt"
    state = torch.load(path)
    state["optimizer_states"][0]["param_groups"].clear()
    torch.save(state, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="parameter group"):
        run(*resume(tmp_path / "run", "--trainer.max_steps", "2", *into))
    assert path.read_bytes() == before


# ---- signals --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted() -> dict[str, Path]:
    """Folders of whole runs, by what they are."""
    return {}


@pytest.mark.parametrize("signum", STATUS)
@pytest.mark.parametrize("place", ["rollout", "optimiser", "logging"])
def test_a_signal_costs_nothing_wherever_it_comes(prepare, run, tmp_path, monkeypatch, capfd, signum, place):
    """Before the optimiser's step the run stops there and repeats the step; after it the step is finished first."""
    assert run(*prepare("whole", 3)) == 0
    owner, name = {
        "rollout": (OnPolicyDistillation, "rollout"),
        "optimiser": (torch.optim.AdamW, "step"),
        "logging": (OnPolicyDistillation, "_log_step"),
    }[place]
    right, calls = getattr(owner, name), []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == 2 and place != "optimiser":
            signal.raise_signal(signum)
        done = right(*arguments, **options)
        if len(calls) == 2 and place == "optimiser":
            signal.raise_signal(signum)
        return done

    arguments = prepare("stopped", 3)
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        assert run(*arguments) == STATUS[signum]
    stopped = 1 if place == "rollout" else 2
    assert f"Interrupted after step {stopped}. Saved " in capfd.readouterr().err
    assert len(records(tmp_path / "stopped" / "steps")) == stopped
    assert run(*resume(tmp_path / "stopped")) == 0
    assert_same(tmp_path / "stopped", tmp_path / "whole")
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_a_second_ctrl_c_ends_the_process_at_once(monkeypatch):
    killed: list[int] = []
    monkeypatch.setattr(StopSignals, "_die", lambda self: killed.append(1))
    signals = StopSignals()
    signals.hold()
    with signals.listening():
        for wait in (0.0, 0.0, 1.1):  # a launcher's echo is no second one
            time.sleep(wait)
            signal.raise_signal(signal.SIGINT)
        assert signals.received == signal.SIGINT
    assert killed == [1]


@pytest.mark.parametrize(("works", "status"), [(True, 0), (False, 138)])
def test_slurm_is_asked_to_run_the_job_again(prepare, run, tmp_path, monkeypatch, capfd, works, status):
    (tmp_path / "scontrol").write_text(f"#!/bin/sh\necho $@ >> {tmp_path}/asked\nexit {0 if works else 1}\n")
    (tmp_path / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    arguments = prepare("run", 3)
    assert run(*arguments, "--trainer.max_steps", "1") == 0  # without SLURM nothing listens
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    right = OnPolicyDistillation._log_step

    def warned(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGUSR1)
        return right(*arguments)

    monkeypatch.setattr(OnPolicyDistillation, "_log_step", warned)
    assert run(*arguments) == status
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    assert "4711" in told(capfd.readouterr().err.split("stops at once, without saving.")[-1])
    path = checkpoints.newest(tmp_path / "run")
    assert path is not None
    assert torch.load(path)["global_step"] == 1


@several
@pytest.mark.parametrize("signum", STATUS)
def test_several_processes_stop_together(prepare, tmp_path, strategy, signum):
    """A signal reaches one of them, or all; both stop after the same step."""
    arguments = prepare("stopped", 200, **STRATEGIES[strategy])
    folder, ranks = tmp_path / "stopped", ([1] if signum == signal.SIGTERM else None)
    with started(arguments, folder / "output", processes=2) as run:
        run.wait_for(folder / "steps", 2)
        run.send(signum, ranks)
        assert run.wait() == [STATUS[signum], 0], run.said()
        assert "Saved" in run.said()
        assert "Traceback" not in run.said() + run.said(1)
    done = len(records(folder / "steps"))
    assert 2 <= done == len(records(folder / "steps1")) < 200
    more = ("--trainer.max_steps", str(done + 2))
    with started(resume(folder, *more), folder / "output", processes=2) as run:
        assert run.wait() == [0, 0], run.said()
    arguments = prepare("whole", done + 2, **STRATEGIES[strategy])
    with started(arguments, tmp_path / "whole" / "output", processes=2) as run:
        assert run.wait() == [0, 0], run.said()
    assert_same(folder, tmp_path / "whole", tolerance=1e-6, ranks=2)


@several
def test_another_number_of_processes_goes_on_and_is_told_what_changes(prepare, tmp_path, strategy):
    """Two, then one, then two again, and each learns what one learns; without dropout, which draws other numbers."""


# ---- SIGKILL --------------------------------------------------------------------------------------------------------


def kill_and_go_on(arguments: list[str], folder: Path, kills: int, processes: int, seed: int) -> None:
    """Kill the run at random moments, and start it again each time until it ends."""
    moments = random.Random(seed)
    arguments = [*arguments, "--ckpt_path", "auto"]
    for _ in range(kills):
        done = len(records(folder / "steps"))
        with started(arguments, folder / "output", processes=processes) as run:
            run.wait_for(folder / "steps", done + moments.randrange(2))
            time.sleep(moments.uniform(0, 0.15))
            run.kill()
    with started(arguments, folder / "output", processes=processes) as run:
        assert run.wait() == [0] * processes, run.said()


def check_kills(prepare: Prepare, tmp_path: Path, steps: int, kills: int, strategy: str | None) -> None:
    layout = STRATEGIES[strategy] if strategy else {}
    processes = layout.get("devices", 1)
    arguments = prepare("whole", steps, every=1, **layout)
    with started(arguments, tmp_path / "whole" / "output", processes=processes) as run:
        assert run.wait() == [0] * processes, run.said()
    arguments = prepare("killed", steps, every=1, **layout)
    kill_and_go_on(arguments, tmp_path / "killed", kills, processes, seed=steps)
    assert_same(tmp_path / "killed", tmp_path / "whole", tolerance=1e-6 if strategy else 0.0, ranks=processes)


@pytest.mark.parametrize("strategy", [None, "shards"])
def test_a_run_killed_thrice_ends_as_the_uninterrupted_one(prepare, tmp_path, strategy):
    check_kills(prepare, tmp_path, steps=6, kills=3, strategy=strategy)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", [None, *STRATEGIES])
def test_a_run_killed_twenty_times_ends_as_the_uninterrupted_one(prepare, tmp_path, strategy):
    check_kills(prepare, tmp_path, steps=30, kills=20, strategy=strategy)
