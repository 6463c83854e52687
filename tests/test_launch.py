"""Every way to start several processes, for real on this machine: each learns and tells what one process does.

`test_processes` has the laws of a step; here it is about who starts the processes, and how they find each other.
"""

import csv
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from processes import LIGHTNINGS_ADVICE
from torch import Tensor

from lsm_lightning.cli import main

ROOT = Path(__file__).parent.parent
SBATCH = ROOT / "scripts" / "slurm.sbatch"
WATCHDOG = 120
SHARDED = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1, "save_distributed_checkpoint": False},
}
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]

pytestmark = LIGHTNINGS_ADVICE


# ---- ways to start --------------------------------------------------------------------------------------------------

FAKE_SRUN = """\
#!{python}
# Starts SLURM_NTASKS copies of a command and tells each its rank, as srun does; here a node has one task.
import os, subprocess, sys
first = next(i for i, argument in enumerate(sys.argv[1:], 1) if not argument.startswith("-"))
assert "--kill-on-bad-exit=1" in sys.argv[1:first]
ranks = map(str, range(int(os.environ["SLURM_NTASKS"])))
where = [{{"SLURM_PROCID": rank, "SLURM_NODEID": rank, "SLURM_LOCALID": "0"}} for rank in ranks]
tasks = [subprocess.Popen(sys.argv[first:], env={{**os.environ, **rank}}) for rank in where]
sys.exit(max(task.wait() for task in tasks))
"""


def free_port(first: int = 0) -> int:
    """One from `first` on; 0 leaves the choice to the system."""
    for port in range(first, first + 1000):
        with socket.socket() as listener, suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return listener.getsockname()[1]
    raise AssertionError("no port is free")


def alone(arguments: list[str], folder: Path) -> None:
    """In this process, which has loaded everything."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["lsm-lightning", *arguments])
        for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # seeding leaves traces in the environment
            patch.setenv(name, "0")
        assert main() == 0


def by_lightning(arguments: list[str], folder: Path) -> None:
    finish([[sys.executable, "-m", "lsm_lightning", *arguments, "--trainer.devices=2"]], folder)


def by_torchrun(arguments: list[str], folder: Path) -> None:
    finish(
        [[*TORCHRUN, "--standalone", "--nproc-per-node=2", "-m", "lsm_lightning", *arguments, "--trainer.devices=2"]],
        folder,
    )


def by_torchrun_on_two_nodes(arguments: list[str], folder: Path) -> None:
    meeting = ["--nnodes=2", "--nproc-per-node=1", "--master-addr=127.0.0.1", f"--master-port={free_port()}"]
    training = ["-m", "lsm_lightning", *arguments, "--trainer.devices=1", "--trainer.num_nodes=2"]
    finish([[*TORCHRUN, *meeting, f"--node-rank={node}", *training] for node in (0, 1)], folder)


def slurm(folder: Path, python: str = "") -> dict[str, str]:
    """The environment of a job on two nodes with a task each, with our `srun`, and a `python` that is another one."""
    programs = folder / "bin"
    programs.mkdir()
    for name, text in (("srun", FAKE_SRUN.format(python=sys.executable)), ("python", python)):
        if text:
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
    return {
        "SLURM_JOB_ID": str(free_port(21_000) - 15_000),  # the port where they meet follows from it
        "SLURM_JOB_NAME": "lsm",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NNODES": "2",
        "SLURM_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2",
        "SLURM_NTASKS_PER_NODE": "1",
        "SLURM_CPUS_PER_TASK": "1",
        "PATH": os.pathsep.join([str(programs), str(Path(sys.executable).parent), os.environ["PATH"]]),
    }


def by_slurm_on_two_nodes(arguments: list[str], folder: Path) -> None:
    finish([["bash", str(SBATCH), *arguments[1:]]], folder, **slurm(folder))  # the script says `fit` itself


Launch = Callable[[list[str], Path], None]
LAUNCHES: dict[str, tuple[Launch, dict[str, Any] | str, str]] = {
    "Lightning": (by_lightning, "ddp", "token_mean"),
    "torchrun": (by_torchrun, SHARDED, "sequence_mean"),
    "torchrun on two nodes": (by_torchrun_on_two_nodes, "ddp", "token_mean"),
    "SLURM on two nodes": (by_slurm_on_two_nodes, SHARDED, "sequence_mean"),
}
"""Who starts two processes, the strategy, and the reduction."""


@contextmanager
def group(command: list[str], output: Path, folder: Path, **more: str) -> Iterator[subprocess.Popen[bytes]]:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1", **more}
    with output.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, cwd=folder, env=environment, process_group=0)
    try:
        yield process
    finally:  # a second process that lost the first would wait for it for long
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def finish(commands: list[list[str]], folder: Path, **environment: str) -> None:
    """Run them side by side to their end."""
    outputs = [folder / f"output-{number}.txt" for number in range(len(commands))]
    with ExitStack() as groups:
        processes = [
            groups.enter_context(group(command, output, folder, **environment))
            for command, output in zip(commands, outputs, strict=True)
        ]
        for process, output in zip(processes, outputs, strict=True):
            assert process.wait(timeout=WATCHDOG) == 0, output.read_text()[-3000:]


# ---- the run --------------------------------------------------------------------------------------------------------


def arguments_of(
    folder: Path, student: Path, teacher: Path, strategy: dict[str, Any] | str, reduction: str
) -> list[str]:
    """A run of two steps from the command line, on an odd number of problems."""
    local = {"class_path": "lsm_lightning.teacher.LocalTeacher", "init_args": {"path": str(teacher)}}
    settings = {
        "model": {
            "student": str(student),
            "teachers": {"sums": local, "echo": local},
            "objective": {"class_path": "lsm_lightning.objectives.LocalSupportMatching", "init_args": {"k": 8}},
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}},
            "micro_batch_tokens": 100,
            "reduction": reduction,
        },
        "data": {
            "tasks": {
                "sums": {
                    "class_path": "lsm_lightning.tasks.math.AdditionProblems",
                    "init_args": {"digits": 1, "max_new_tokens": 8, "test_size": 3},
                },
                "echo": {"class_path": "scripted.EchoGames", "init_args": {"test_size": 3}},
            },
            "prompts_per_step": 5,
            "samples_per_prompt": 1,
        },
        "trainer": {
            "max_steps": 2,
            "accelerator": "cpu",
            "devices": 1,
            "strategy": strategy,
            "default_root_dir": str(folder),
            "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(folder)}},
        },
        "summary": {"evaluate": False},
        "checkpoint": {"dirpath": str(folder)},
    }
    folder.mkdir()
    (folder / "settings.yaml").write_text(yaml.safe_dump(settings))
    return ["fit", "--config", str(folder / "settings.yaml")]


Finished = Callable[[str], Path]


@pytest.fixture(scope="module")
def finished(student_folder: Path, teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The folder of a run by who started it; by a reduction, if one process did it."""
    root = tmp_path_factory.mktemp("processes")

    @cache
    def finish(name: str) -> Path:
        launch, strategy, reduction = LAUNCHES.get(name, (alone, "auto", name))
        folder = root / name.replace(" ", "-")
        launch(arguments_of(folder, student_folder, teacher_folder, strategy, reduction), folder)
        return folder

    return finish


def weights_in(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "last.ckpt", weights_only=False)["state_dict"]


def logged(folder: Path) -> dict[str, float]:
    """The last value of every number that has nothing to do with time."""
    values: dict[str, float] = {}
    for path in folder.rglob("metrics.csv"):
        for row in csv.DictReader(path.read_text().splitlines()):
            values |= {name: float(value) for name, value in row.items() if value and "/seconds/" not in name}
    return {name: value for name, value in values.items() if name not in ("epoch", "step")}


def largest_change(before: dict[str, Tensor], after: dict[str, Tensor]) -> float:
    assert before.keys() == after.keys()
    return max((after[name] - before[name]).abs().max().item() for name in before)


each_launch = pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow) if name in ("Lightning", "torchrun") else name for name in LAUNCHES],
)


@each_launch
def test_two_processes_learn_what_one_learns(finished, student, name):
    reduction = LAUNCHES[name][2]
    one = weights_in(finished(reduction))
    assert largest_change(one, weights_in(finished(name))) < 1e-6
    start = {f"student.{name}": value.float() for name, value in student.state_dict().items()}
    assert largest_change(one, start) > 1e-3  # there was something to learn


@each_launch
def test_two_processes_tell_what_one_tells(finished, name):
    assert logged(finished(name)) == pytest.approx(logged(finished(LAUNCHES[name][2])), rel=1e-4, abs=1e-6)


def test_the_reductions_of_these_runs_differ(finished):
    token, sequence = (weights_in(finished(reduction)) for reduction in ("token_mean", "sequence_mean"))
    assert largest_change(token, sequence) > 1e-4


# ---- the script for SLURM -------------------------------------------------------------------------------------------


def test_the_script_is_bash_and_asks_slurm_for_a_process_a_gpu():
    assert subprocess.run(["bash", "-n", SBATCH], check=False).returncode == 0
    lines = SBATCH.read_text().splitlines()
    asked = dict(re.fullmatch(r"#SBATCH --([a-z-]+)=?(.*)", line).groups() for line in lines if "#SBATCH" in line)
    assert asked["ntasks-per-node"] == asked["gpus-per-node"]
    warning = int(asked["signal"].removeprefix("SIGUSR1@"))
    assert 3 * 221 <= warning <= 3600  # of the seconds that a plan tells for the longest step of paper_8gpu
    assert "requeue" in asked
    first_command = next(number for number, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any("#SBATCH" in line for line in lines[first_command:])  # sbatch would not read them


def job(folder: Path, python: str) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, **slurm(folder, python), "SLURM_CPUS_PER_TASK": "5"}
    command = ["bash", SBATCH, "--config", "my run.yaml"]
    return subprocess.run(command, cwd=folder, env=environment, check=False, timeout=WATCHDOG)


def test_every_task_is_told_what_it_needs(tmp_path):
    tell = '#!/bin/sh\nprintf "%s|" "$OMP_NUM_THREADS" "$@" > "told-$SLURM_PROCID"\n'
    assert job(tmp_path, tell).returncode == 0
    says = "5|-m|lsm_lightning|fit|--config|my run.yaml|--trainer.num_nodes|2|--trainer.devices|1|--ckpt_path|auto|"
    assert [(tmp_path / f"told-{rank}").read_text() for rank in (0, 1)] == [says, says]


def test_a_task_that_fails_fails_the_job(tmp_path):
    assert job(tmp_path, '#!/bin/sh\nexit "$SLURM_PROCID"\n').returncode == 1
