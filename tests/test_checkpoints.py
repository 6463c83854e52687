"""A run that is killed, stopped or out of disk loses nothing that was saved, and goes on as if nothing had been."""

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jsonargparse import Namespace
from processes import records, started
from tiny import save_tiny
from torch.distributed import checkpoint as sharded

from lsm_lightning import checkpoints
from lsm_lightning.callbacks import atomic
from lsm_lightning.callbacks.signals import StopSignals
from lsm_lightning.cli import CLI
from lsm_lightning.errors import ConfigurationError
from lsm_lightning.module import OnPolicyDistillation

ROOT = Path(__file__).parent.parent
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


CHANGES = {"fsync", "mkdir", "open", "rename", "replace", "rmdir", "sendfile", "symlink", "unlink", "write"}
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
LAYOUTS: dict[str, dict[str, Any]] = {
    "one": {"devices": 1, "strategy": "auto"},
    "ddp": {"devices": 2, "strategy": "ddp"},
    "shards": {"devices": 2, "strategy": SHARDED},
}
"""One process, two, and two with half of the weights each, whose checkpoints are folders."""
TOLERANCE = {"one": 0.0, "ddp": 1e-6, "shards": 1e-6}
STEPS = 6

Prepare = Callable[..., Path]


@pytest.fixture(scope="module")
def prepare(forgetful: Path, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Prepare:
    """Writes the settings of a run into a folder of its own, where it logs and is recorded."""

    def prepare(
        layout: str = "one", steps: int = STEPS, every: int = 20, pause: float = 0.0, student: Path = forgetful,
        model: dict[str, Any] | None = None,
    ) -> Path:  # fmt: skip
        folder = tmp_path_factory.mktemp("run")
        teacher = {"class_path": "lsm_lightning.teacher.LocalTeacher", "init_args": {"path": str(teacher_folder)}}
        task = {
            "class_path": "lsm_lightning.tasks.math.AdditionProblems",
            "init_args": {"max_new_tokens": 4, "test_size": 2},
        }
        settings = {
            "model": {
                "student": str(student),
                "teachers": {"sums": teacher},
                "objective": {"class_path": "lsm_lightning.objectives.LocalSupportMatching", "init_args": {"k": 8}},
                "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 1e-2, "eps": 1e-3}},
                "lr_scheduler": {
                    "class_path": "torch.optim.lr_scheduler.ExponentialLR",
                    "init_args": {"gamma": 0.9},
                },
                **(model or {}),
            },
            "data": {"tasks": {"sums": task}, "prompts_per_step": 3, "samples_per_prompt": 1},
            "trainer": {
                "max_steps": steps,
                "accelerator": "cpu",
                "default_root_dir": str(folder),
                "callbacks": [
                    {"class_path": "processes.Recorder", "init_args": {"path": str(folder / "steps"), "pause": pause}}
                ],
                **LAYOUTS[layout],
            },
            "checkpoint": {"every_n_train_steps": every},
            "summary": {"evaluate": False},
        }
        (folder / "run.yaml").write_text(yaml.safe_dump(settings))
        return folder

    return prepare


def fit(folder: Path, *more: str) -> list[str]:
    """The arguments of the run of a folder."""
    return ["fit", "--config", str(folder / "run.yaml"), *more]


def go_on(folder: Path, *more: str) -> list[str]:
    """Of the same, from where it stands."""
    return fit(folder, "--ckpt_path", "last", *more)


def finish(folder: Path, layout: str, *more: str) -> str:
    """Run it in processes of its own, and return what the first one said."""
    processes = LAYOUTS[layout]["devices"]
    with started(fit(folder, *more), folder / "output", processes=processes) as run:
        assert run.wait() == [0] * processes, run.said()
        return run.said()


@pytest.fixture(scope="module")
def whole(prepare: Prepare) -> Callable[[str, int], Path]:
    """The folder of a run that nobody disturbed, by its layout and length."""

    @cache
    def whole(layout: str = "one", steps: int = STEPS) -> Path:
        folder = prepare(layout, steps)
        finish(folder, layout)
        return folder

    return whole


def newest(folder: Path) -> Path:
    """The last checkpoint of the run of a folder."""
    path = checkpoints.newest(folder)
    assert path is not None
    return path


def steps_of(folder: Path, rank: int = 0) -> list[int]:
    """Which were done, in order."""
    return [step["step"] for step in records(folder / f"steps{rank or ''}")]


def assert_same(folder: Path, other: Path, layout: str = "one") -> None:
    """The last weights, and every step however often it was done, on every process."""
    ours, theirs = (checkpoints.load(newest(each))["state_dict"] for each in (folder, other))
    tolerance = TOLERANCE[layout]
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=tolerance, atol=tolerance)
    for rank in range(LAYOUTS[layout]["devices"]):
        expected = {step["step"]: step for step in records(other / f"steps{rank or ''}")}
        done = records(folder / f"steps{rank or ''}")
        assert {step["step"] for step in done} == expected.keys()
        for step in done:
            right = dict(expected[step["step"]])
            assert step.pop("sampled") == right.pop("sampled")
            assert step == (pytest.approx(right, rel=tolerance, abs=tolerance) if tolerance else right)


def told(stderr: str) -> str:
    """The only line."""
    (line,) = [line for line in stderr.splitlines() if line.strip()]
    return line


# ---- going on -------------------------------------------------------------------------------------------------------


def test_random_states_go_on_where_they_stood(prepare, whole, run):
    """Dropout draws the same numbers; the control has lost them."""
    folder = prepare()
    assert run(*fit(folder, "--trainer.max_steps", "5")) == 0
    path = newest(folder)
    state = torch.load(path)
    assert run(*go_on(folder)) == 0
    assert_same(folder, whole())
    torch.save({**state, "random_states": []}, path)
    assert run(*fit(folder, "--ckpt_path", str(path))) == 0
    with pytest.raises(AssertionError, match="not equal"):
        assert_same(folder, whole())


def test_the_last_step_is_saved_whatever_the_interval(prepare, run):
    folder = prepare(steps=3, every=2)
    assert run(*fit(folder)) == 0
    assert torch.load(newest(folder))["global_step"] == 3
    assert [inside.name for inside in newest(folder).parent.iterdir()] == ["last.ckpt"]


def test_last_is_an_error_without_a_checkpoint_and_auto_starts_anew(prepare, run, capfd):
    folder = prepare(steps=1)
    assert run(*go_on(folder)) == 2
    assert told(capfd.readouterr().err).startswith("error: ckpt_path: last: no checkpoint below")
    assert run(*fit(folder, "--ckpt_path", "auto")) == 0
    assert run(*fit(folder, "--ckpt_path", "auto", "--trainer.max_steps", "2")) == 0
    assert run(*go_on(folder, "--trainer.max_steps", "3")) == 0
    assert steps_of(folder) == [0, 1, 2]


def test_the_newest_of_several_runs_is_taken(tmp_path):
    for age, name in enumerate(("version_2/checkpoints", "version_10/checkpoints", "version_1/checkpoints")):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "last.ckpt").touch()
        os.utime(tmp_path / name / "last.ckpt", (1e9 - age, 1e9 - age))
    (tmp_path / "version_11" / "checkpoints").mkdir(parents=True)
    assert checkpoints.newest(tmp_path) == tmp_path / "version_2" / "checkpoints" / "last.ckpt"
    assert checkpoints.newest(tmp_path / "version_11") is None


LOGGERS = {
    "named": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"name": "experiment"}},
    "elsewhere": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"name": None}},
}


@pytest.mark.filterwarnings("ignore:Experiment logs directory")  # the run's config.yaml is there
@pytest.mark.parametrize("place", LOGGERS)
def test_auto_finds_the_checkpoint_wherever_the_logger_puts_it(prepare, run, capfd, tmp_path, place):
    """And whatever it is called. The control: without the note of the place there is none to be found."""
    folder = prepare(steps=1, every=1)
    settings = yaml.safe_load((folder / "run.yaml").read_text())
    save_dir = folder if place == "named" else tmp_path
    logger = {**LOGGERS[place], "init_args": {**LOGGERS[place]["init_args"], "save_dir": str(save_dir)}}
    settings["trainer"]["logger"] = logger
    settings["checkpoint"] |= {"save_last": False, "save_top_k": -1, "filename": "{step}"}
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    assert run(*fit(folder, "--ckpt_path", "auto")) == 0
    assert "No checkpoint below" in capfd.readouterr().out
    first = newest(folder)
    assert run(*fit(folder, "--ckpt_path", "auto", "--trainer.max_steps", "2")) == 0
    assert f"Going on from {first}, after step 1." in capfd.readouterr().out
    assert steps_of(folder) == [0, 1]
    (folder / checkpoints.POINTER).unlink()
    assert checkpoints.newest(folder) is None


def test_a_run_that_was_moved_is_found(prepare, run, tmp_path):
    folder = prepare(steps=1)
    assert run(*fit(folder)) == 0
    for name in ("version_0", checkpoints.POINTER):
        shutil.copytree(folder / name, tmp_path / name) if name[0] == "v" else shutil.copy(folder / name, tmp_path)
    shutil.rmtree(folder / "version_0")
    assert checkpoints.newest(tmp_path) == tmp_path / "version_0" / "checkpoints" / "last.ckpt"
    assert checkpoints.newest(folder) is None


def test_a_finished_run_says_that_nothing_is_left(short, run, capfd):
    folder = short("plain")
    assert run(*go_on(folder)) == 0
    said = capfd.readouterr().out
    assert f"Nothing left to train: {newest(folder)} is of step 1, and trainer.max_steps is 1." in said
    assert f"checkpoint   {newest(folder)}" in said
    assert steps_of(folder) == [0]


def test_a_checkpoint_does_not_override_the_command_line(prepare, whole, run, monkeypatch):
    seen = []
    monkeypatch.setattr(CLI, "fit", lambda self, model, **_: seen.append(model))
    assert run(*go_on(whole(), "--model.gradient_clip", "0.25", "--model.micro_batch_tokens", "77")) == 0
    assert (seen[0].gradient_clip, seen[0].micro_batch_tokens) == (0.25, 77)


OTHER_SETTINGS: dict[str, dict[str, Any]] = {
    "all weights": {},
    "adapters": {
        "lora": {
            "class_path": "peft.LoraConfig",
            "init_args": {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]},
        }
    },
    "frozen": {"freeze": ["*.embed_tokens.*", "*.layers.0.*"]},
}
"""With each the optimiser knows other parameters."""


@pytest.mark.parametrize(
    ("variables", "looks"), [({}, True), ({"SLURM_LOCALID": "1"}, False), ({"LOCAL_RANK": "1"}, False)]
)
def test_one_process_of_a_node_reads_a_checkpoint_against_its_checksums(short, monkeypatch, variables, looks):
    """Under srun too, which sets other variables."""
    seen = []
    monkeypatch.setattr(checkpoints, "check", lambda path, every_byte=True: seen.append(every_byte))
    with monkeypatch.context() as patch:
        for name in ("LOCAL_RANK", "SLURM_LOCALID"):
            patch.delenv(name, raising=False)
        for name, value in variables.items():
            patch.setenv(name, value)
        command = CLI.__new__(CLI)
        command.config = Namespace(subcommand="fit", fit=Namespace(ckpt_path=str(newest(short("plain")))))
        command._parse_ckpt_path()
    assert seen == [looks]


@pytest.mark.parametrize(
    "model",
    ["adapters", *(pytest.param(name, marks=pytest.mark.slow) for name in OTHER_SETTINGS if name != "adapters")],
)
def test_another_number_of_processes_goes_on_and_is_told_what_changes(prepare, student_folder, model):
    """One, then two with half of the weights each, then one; without dropout, which draws other numbers."""
    alone, folder = (prepare(student=student_folder, model=OTHER_SETTINGS[model]) for _ in range(2))
    finish(alone, "one")
    assert "Going on" not in finish(folder, "one", "--trainer.max_steps", "2")
    for layout, steps, line in (
        ("shards", 4, "Going on with 2 instead of 1 processes"),
        ("one", 6, "Going on with 1 instead of 2 processes"),
    ):
        settings = yaml.safe_load((folder / "run.yaml").read_text())
        settings["trainer"] |= {**LAYOUTS[layout], "max_steps": steps}
        (folder / "run.yaml").write_text(yaml.safe_dump(settings))
        measure = ["validate", "--config", str(folder / "run.yaml"), "--ckpt_path", "last"]
        if layout == "one":
            with started(measure, folder / "measured") as run:
                assert run.wait() == [0], run.said()
        assert line in finish(folder, layout, "--ckpt_path", "last")
        assert newest(folder).is_dir() == (layout == "shards")
    ours, theirs = (checkpoints.load(newest(each)) for each in (folder, alone))
    assert ours["state_dict"].keys() == theirs["state_dict"].keys()
    for name, weight in theirs["state_dict"].items():
        torch.testing.assert_close(ours["state_dict"][name], weight, rtol=1e-4, atol=1e-5)
    (ours,), (theirs,) = ours["optimizer_states"], theirs["optimizer_states"]
    assert ours["state"].keys() == theirs["state"].keys()
    for name, state in theirs["state"].items():
        torch.testing.assert_close(ours["state"][name], state, rtol=1e-3, atol=1e-5)
    assert steps_of(folder) == steps_of(alone)


@pytest.mark.slow
def test_an_optimiser_without_state_goes_on_in_shards_and_from_them(prepare, student_folder):
    """Not from a file into shards, which torch cannot; that is told before anything is restored."""
    sgd = {"optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}}
    alone, folder = (prepare(student=student_folder, model=sgd) for _ in range(2))
    finish(alone, "one")
    for layout, steps in (("shards", 2), ("shards", 3), ("one", 6)):
        settings = yaml.safe_load((folder / "run.yaml").read_text())
        settings["trainer"] |= {**LAYOUTS[layout], "max_steps": steps}
        (folder / "run.yaml").write_text(yaml.safe_dump(settings))
        finish(folder, layout, "--ckpt_path", "auto")
    ours, theirs = (checkpoints.load(newest(each))["state_dict"] for each in (folder, alone))
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight, rtol=1e-4, atol=1e-5)
    settings["trainer"] |= {**LAYOUTS["shards"], "max_steps": 7}
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    with started(go_on(folder), folder / "refused", processes=2) as run:
        assert run.wait() == [2, 2]
        assert "SGD keeps no state" in run.said()


# ---- a command line that says otherwise than the checkpoint ---------------------------------------------------------

SCHEDULE = {"class_path": "torch.optim.lr_scheduler.ExponentialLR", "init_args": {"gamma": 0.5}}
DECAY = ("--model.lr_scheduler.init_args.gamma", "0.8")
ADAPTERS = OTHER_SETTINGS["adapters"]


def rates(folder: Path) -> list[float]:
    """The learning rates of the steps, in order."""
    return [step["optimizer/lr"] for step in records(folder / "steps")]


@pytest.mark.parametrize(
    ("schedule", "more", "last"),
    [
        (None, ("--model.optimizer.init_args.lr", "0.004"), 0.004),
        (SCHEDULE, ("--model.optimizer.init_args.lr", "0.004"), 0.004 * 0.5**2),
        (SCHEDULE, DECAY, 0.01 * 0.8**2),
        (SCHEDULE, ("--model.lr_scheduler", "null"), 0.01),
        (SCHEDULE, ("--model.optimizer.init_args.weight_decay", "0.3"), 0.01 * 0.5**2),
        (None, (), 0.01),
    ],
)
def test_what_the_command_line_changes_holds(prepare, run, capfd, schedule, more, last):
    """The schedule goes on at the step reached, as if it had been so from the start; the rest is as it was."""
    folder = prepare(steps=2, model={"lr_scheduler": schedule})
    assert run(*fit(folder)) == 0
    assert run(*go_on(folder, "--trainer.max_steps", "3", *more)) == 0
    assert rates(folder)[-1] == pytest.approx(last, rel=1e-9)
    assert ("Going on with other settings of the optimiser" in capfd.readouterr().out) == bool(more)
    (group,) = torch.load(newest(folder))["optimizer_states"][0]["param_groups"]
    assert group["weight_decay"] == (0.3 if "0.3" in more else 0.01)
    # What was changed is now the run's own, and stays without being said to be new.
    assert run(*go_on(folder, "--trainer.max_steps", "4", *more)) == 0
    assert "other settings" not in capfd.readouterr().out
    factor = {None: 1.0, "null": 1.0, "0.8": 0.8}.get(more[-1] if more else None, 0.5 if schedule else 1.0)
    assert rates(folder)[-1] == pytest.approx(last * factor, rel=1e-9)


def test_other_settings_of_the_step_are_told(prepare, run, capfd):
    folder = prepare(steps=1)
    assert run(*fit(folder)) == 0
    changed = ("--model.objective.init_args.temperature", "2.0", "--model.sampling.top_p", "0.8")
    told = []
    for steps, more in ((2, ()), (3, changed), (4, changed)):
        assert run(*go_on(folder, "--trainer.max_steps", str(steps), *more)) == 0
        told += [line for line in capfd.readouterr().out.splitlines() if "settings of the step" in line]
    (line,) = told
    assert "temperature=2) instead of LocalSupportMatching(" in line
    assert "top_p=0.8" in line
    assert "model.mask" not in line


@pytest.mark.slow
def test_what_the_command_line_changes_holds_in_shards(prepare):
    """A learning rate, and a schedule where there was none; then the same from one process."""
    folder = prepare("shards", steps=2, model={"lr_scheduler": None})
    finish(folder, "shards")
    settings = yaml.safe_load((folder / "run.yaml").read_text())
    settings["model"]["lr_scheduler"] = SCHEDULE
    settings["model"]["optimizer"]["init_args"]["lr"] = 0.004
    for layout, steps in (("shards", 3), ("shards", 4), ("one", 5)):
        settings["trainer"] |= {**LAYOUTS[layout], "max_steps": steps}
        (folder / "run.yaml").write_text(yaml.safe_dump(settings))
        said = finish(folder, layout, "--ckpt_path", "last")
        assert said.count("lr 0.004 instead of 0.01") == 1  # by the first of the three
    assert rates(folder)[2:] == pytest.approx([0.004 * 0.5**step for step in (3, 4, 5)], rel=1e-9)


@pytest.fixture(scope="module")
def short(prepare: Prepare) -> Callable[[str], Path]:
    """The folder of a run of a step, with or without adapters."""

    @cache
    def short(kind: str) -> Path:
        folder = prepare(steps=1, model=ADAPTERS if kind == "adapters" else {})
        weights_only = ("--checkpoint.save_weights_only", "true") if kind == "weights only" else ()
        finish(folder, "one", *weights_only)
        return folder

    return short


@pytest.mark.parametrize(
    ("kind", "more", "line"),
    [
        ("plain", ["--model.optimizer", "torch.optim.SGD"], "model.optimizer torch.optim.sgd.SGD cannot go on with"),
        ("plain", ["--model.freeze", '["*.embed_tokens.*"]'], "The checkpoint and model.freeze do not agree"),
        ("plain", ["--model.lora", "peft.LoraConfig"], "The checkpoint and model.lora do not agree"),
        ("plain", ["--seed_everything", "1"], "a run with seed_everything=0, not 1"),
        ("adapters", ["--model.lora", "null"], "The checkpoint and model.lora do not agree"),
        ("adapters", ["--model.lora.init_args.r", "2"], "The checkpoint and model.lora.r do not agree"),
        ("adapters", ["--model.lora.init_args.lora_alpha", "32"], "trained with other factors"),
        ("adapters", ["--model.lora.init_args.target_modules", "[q_proj]"], "model.lora do not agree"),
        ("weights only", [], "holds weights only"),
    ],
)
def test_a_checkpoint_of_another_kind_of_run_is_refused_in_one_line(short, run, capfd, kind, more, line):
    folder = short(kind)
    assert run(*go_on(folder, "--trainer.max_steps", "2", *more)) == 2
    *_, said = capfd.readouterr().err.splitlines()  # before it, bitsandbytes may tell of kernels
    assert said.startswith("error: ")
    assert line in said
    assert steps_of(folder) == [0]


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


@pytest.mark.parametrize(
    ("layout", "rank"),
    [("shards", 1), *(pytest.param(layout, 0, marks=pytest.mark.slow) for layout in ("shards", "ddp"))],
)
def test_where_one_disk_is_full_no_process_waits_for_another(prepare, whole, layout, rank):
    """And the checkpoint that both had saved is there."""
    folder = prepare(layout, steps=STEPS + 1)
    saved = newest(whole(layout))
    place = folder / saved.name
    shutil.copytree(saved, place) if saved.is_dir() else shutil.copy(saved, place)
    more = ("--ckpt_path", str(place), "--checkpoint.dirpath", str(folder))
    with started(fit(folder, *more), folder / "output", processes=2, full={rank: 60_000}) as run:
        assert run.wait() == [2, 2], run.said() + run.said(1)
        for said in (run.said(), run.said(1)):
            assert f"error: Cannot save {place}: " in said
            assert "File too large" in said
            assert "Traceback" not in said
    assert torch.load(place / "meta.pt" if place.is_dir() else place)["global_step"] == STEPS
    checkpoints.check(place)


@pytest.fixture
def saved(whole: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint in a folder that may be spoilt."""
    return Path(shutil.copy(newest(whole()), tmp_path))


def test_a_full_disk_is_told_in_one_line_and_leaves_the_previous_checkpoint(prepare, run, saved, capfd):
    before = saved.read_bytes()
    more = ("--ckpt_path", str(saved), "--trainer.max_steps", "7", "--checkpoint.dirpath", str(saved.parent))
    with full_disk(len(before) // 2):
        assert run(*fit(prepare(), *more)) == 2
    line = told(capfd.readouterr().err)
    assert line.startswith(f"error: Cannot save {saved}: ")
    assert "File too large" in line
    assert saved.read_bytes() == before
    assert run(*fit(prepare(), *more)) == 0
    assert torch.load(saved)["global_step"] == 7
    assert list(saved.parent.iterdir()) == [saved]


def test_a_folder_that_cannot_be_written_is_told_before_the_first_step(prepare, run, tmp_path, capfd):
    (tmp_path / "file").touch()
    folder = prepare()
    assert run(*fit(folder, "--checkpoint.dirpath", str(tmp_path / "file" / "checkpoints"))) == 2
    assert told(capfd.readouterr().err).startswith(f"error: Cannot save {tmp_path / 'file' / 'checkpoints'}: ")
    assert steps_of(folder) == []


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_read_only_folder_is_told_before_the_first_step(prepare, run, tmp_path, capfd):
    (tmp_path / "fixed").mkdir(mode=0o500)
    assert run(*fit(prepare(), "--checkpoint.dirpath", str(tmp_path / "fixed"))) == 2
    assert "Permission denied" in told(capfd.readouterr().err)


def test_a_run_that_cannot_be_restored_does_not_overwrite_its_checkpoint(prepare, run, saved):
    """When it breaks off, weights and optimiser are of different steps."""
    state = torch.load(saved)
    state["optimizer_states"][0]["param_groups"].clear()
    torch.save(state, saved)
    before = saved.read_bytes()
    with pytest.raises(KeyError, match="embed_tokens"):
        run(*fit(prepare(), "--ckpt_path", str(saved), "--checkpoint.dirpath", str(saved.parent)))
    assert saved.read_bytes() == before


class OutOfMemory(torch.optim.SGD):
    """Fails in its fourth step, when half of the weights are new."""

    def step(self, closure=None):
        self.times = getattr(self, "times", 0) + 1
        everything = self.param_groups[0]["params"]
        if self.times == 4:
            self.param_groups[0]["params"] = everything[: len(everything) // 2]
        super().step(closure)
        if self.times == 4:
            raise MemoryError("in the middle of the weights")


def test_weights_that_are_half_updated_are_not_saved(prepare, run):
    folder = prepare()
    optimizer = ("--model.optimizer", f"{__name__}.OutOfMemory", "--model.optimizer.lr", "0.1")
    with pytest.raises(MemoryError):
        run(*fit(folder, *optimizer, "--checkpoint.every_n_train_steps", "2"))
    assert torch.load(newest(folder))["global_step"] == 2


# ---- signals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("place", "signum"),
    [
        ("rollout", signal.SIGTERM),
        ("optimiser", signal.SIGINT),
        ("logging", signal.SIGTERM),
        ("validation", signal.SIGTERM),
    ],
)
def test_a_signal_costs_nothing_wherever_it_comes(prepare, whole, run, monkeypatch, capfd, place, signum):
    """Before the optimiser's step the run stops there and repeats the step; after it the step is finished first."""
    owner, name = {
        "rollout": (OnPolicyDistillation, "rollout"),
        "optimiser": (torch.optim.AdamW, "step"),
        "logging": (OnPolicyDistillation, "_log_step"),
        "validation": (OnPolicyDistillation, "validation_step"),
    }[place]
    right, calls = getattr(owner, name), []
    second = 3 if place == "optimiser" else 2  # the first step of an optimiser is a trial
    more = ["--trainer.val_check_interval", "1"] if place == "validation" else []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == second and place != "optimiser":
            signal.raise_signal(signum)
        done = right(*arguments, **options)
        if len(calls) == second and place == "optimiser":
            signal.raise_signal(signum)
        return done

    folder = prepare()
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupted)
        assert run(*fit(folder, *more)) == STATUS[signum]
    stopped = 1 if place == "rollout" else 2
    assert f"Interrupted after step {stopped}. Saved {newest(folder)}; " in capfd.readouterr().err
    assert steps_of(folder) == list(range(stopped))
    assert run(*go_on(folder, *more)) == 0
    assert steps_of(folder) == list(range(STEPS))
    assert_same(folder, whole())
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


def test_several_processes_stop_within_a_validation(prepare, run, monkeypatch):
    """One process, told that it is not alone: it may not stop at any moment, but need not finish all tasks."""
    begin, validate, validated = StopSignals.on_train_start, OnPolicyDistillation.validation_step, []

    def together(self: StopSignals, *arguments: Any) -> None:
        begin(self, *arguments)
        self._together = True

    def interrupted(self: OnPolicyDistillation, batch: Any, batch_idx: int) -> None:
        validated.append(batch.task)
        if len(validated) == 3:
            signal.raise_signal(signal.SIGTERM)
        validate(self, batch, batch_idx)

    monkeypatch.setattr(StopSignals, "on_train_start", together)
    monkeypatch.setattr(OnPolicyDistillation, "validation_step", interrupted)
    folder = prepare()
    settings = yaml.safe_load((folder / "run.yaml").read_text())
    for part in (settings["data"]["tasks"], settings["model"]["teachers"]):
        part["more"] = part["sums"]
    settings["trainer"]["val_check_interval"] = 1
    (folder / "run.yaml").write_text(yaml.safe_dump(settings))
    assert run(*fit(folder)) == STATUS[signal.SIGTERM]
    assert validated == ["more", "sums", "more"]
    assert len(steps_of(folder)) == torch.load(newest(folder))["global_step"] == 2


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
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    right = OnPolicyDistillation._log_step

    def warned(*arguments: Any) -> Any:
        signal.raise_signal(signal.SIGUSR1)
        return right(*arguments)

    monkeypatch.setattr(OnPolicyDistillation, "_log_step", warned)
    folder = prepare()
    assert run(*fit(folder)) == status
    assert (tmp_path / "asked").read_text() == "requeue 4711\n"
    assert "4711" in told(capfd.readouterr().err.split("without saving.")[-1])
    assert torch.load(newest(folder))["global_step"] == 1


BOTH = [("ddp", signal.SIGTERM, [1]), ("shards", signal.SIGINT, [0, 1])]
OTHERS = [("ddp", signal.SIGINT, [0]), ("shards", signal.SIGTERM, [0, 1])]


@pytest.mark.parametrize(
    ("layout", "signum", "ranks"), [*BOTH, *(pytest.param(*other, marks=pytest.mark.slow) for other in OTHERS)]
)
def test_several_processes_stop_together(prepare, whole, layout, signum, ranks):
    """A signal reaches one of them, or all; both stop after the same step."""
    folder = prepare(layout, pause=0.3)
    with started(fit(folder), folder / "output", processes=2) as run:
        run.wait_for(folder / "steps", 2)
        run.send(signum, ranks)
        assert run.wait() == [STATUS[signum], 0], run.said()
        assert f"Saved {newest(folder)}; " in run.said()
        assert "Traceback" not in run.said() + run.said(1)
    assert steps_of(folder) == steps_of(folder, rank=1)
    assert 2 <= len(steps_of(folder)) < STEPS
    finish(folder, layout, "--ckpt_path", "last")
    assert_same(folder, whole(layout), layout)


@pytest.mark.slow
def test_a_signal_to_the_first_process_reaches_those_it_launched(prepare, whole):
    """As `kill` does, where Lightning has started the others."""
    folder = prepare("ddp", pause=0.3)
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lsm_lightning", *fit(folder)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, process_group=0) as process:
        try:
            while process.poll() is None and len(steps_of(folder)) < 2:
                time.sleep(0.05)
            process.terminate()
            _, said = process.communicate(timeout=60)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == STATUS[signal.SIGTERM], said
    assert f"Saved {newest(folder)}; " in said
    finish(folder, "ddp", "--ckpt_path", "last")
    assert_same(folder, whole("ddp"), "ddp")


# ---- SIGKILL --------------------------------------------------------------------------------------------------------


def check_kills(prepare: Prepare, whole: Callable[[str, int], Path], layout: str, steps: int, kills: int) -> None:
    """Kill a run that saves every step at random moments, start it again each time, and compare.

    A third of the kills come while it is being set up; between a step's record and its checkpoint it waits a little.
    """
    moments = random.Random(steps)
    folder = prepare(layout, steps, every=1, pause=0.05)
    processes = LAYOUTS[layout]["devices"]
    for _ in range(kills):
        done = len(steps_of(folder))
        with started(fit(folder, "--ckpt_path", "auto"), folder / "output", processes=processes) as run:
            run.wait_for(folder / "steps", done + moments.choice((0, 1, 1)))
            time.sleep(moments.uniform(0, 0.1))
            assert all(process.is_alive() for process in run.processes), run.said()
            run.kill()
    assert len(steps_of(folder)) > kills // 2
    finish(folder, layout, "--ckpt_path", "auto")
    assert_same(folder, whole(layout, steps), layout)


@pytest.mark.parametrize("layout", ["one", pytest.param("shards", marks=pytest.mark.slow)])
def test_a_run_killed_thrice_ends_as_the_undisturbed_one(prepare, whole, layout):
    check_kills(prepare, whole, layout, STEPS, kills=3)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_run_killed_twenty_times_ends_as_the_undisturbed_one(prepare, whole, layout):
    check_kills(prepare, whole, layout, steps=30, kills=20)
