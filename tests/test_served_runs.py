"""Runs whose rollouts and teachers come from servers: equal to local ones, and what a fault does to them."""

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import FakeServer, Fault, serving
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from processes import LIGHTNINGS_ADVICE
from scripted import EchoGames
from tiny import save_tiny
from vllm_python import vllm_launch

from lsm_lightning.cli import TRAINER_DEFAULTS
from lsm_lightning.datamodule import AlternatingTasks
from lsm_lightning.module import OnPolicyDistillation
from lsm_lightning.objectives import LocalSupportMatching
from lsm_lightning.rollout import LocalEngine, VLLMEngine
from lsm_lightning.serving import Launch, ServerError, Servers
from lsm_lightning.serving import client as client_module
from lsm_lightning.teacher import LocalTeacher, ServedTeacher

pytestmark = LIGHTNINGS_ADVICE
K = 8
RETRIES = "echo/train/server_retries"
"""Logged by runs on servers only."""


@pytest.fixture
def student_server(student_folder) -> Iterator[FakeServer]:
    with serving(student_folder) as server:
        yield server


@pytest.fixture
def teacher_server(teacher_folder) -> Iterator[FakeServer]:
    with serving(teacher_folder) as server:
        yield server


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(client_module, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(client_module, "SECONDS_BETWEEN_LOOKS", 0.0)


class Numbers(Callback):
    """What every step logged, times left out."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.steps.append({name: value for name, value in outputs.items() if "/seconds/" not in name})


class Run:
    """Steps of two turns each, with SGD, which does not blow rounding up to full steps."""

    def __init__(self, student: Path, teacher: Any, engine: Any, root: Path, steps: int, **settings: Any) -> None:
        self.module = OnPolicyDistillation(
            str(student),
            {"echo": teacher},
            objective=LocalSupportMatching(k=K),
            engine=engine,
            optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05),
            **settings,
        )
        self.data = AlternatingTasks(tasks={"echo": EchoGames(test_size=2)}, prompts_per_step=2, samples_per_prompt=2)
        self.numbers = Numbers()
        checkpoint = ModelCheckpoint(
            dirpath=root, filename="last", save_top_k=0, save_last=True, every_n_train_steps=20,
            save_on_exception=True, enable_version_counter=False,
        )  # fmt: skip
        self.trainer = Trainer(
            accelerator="cpu", devices=1, max_steps=steps, default_root_dir=root, enable_progress_bar=False,
            logger=False, callbacks=[self.numbers, checkpoint], limit_val_batches=0, **TRAINER_DEFAULTS,
        )  # fmt: skip

    def fit(self, checkpoint: Path | None = None) -> "Run":
        before = signal.getsignal(signal.SIGINT)
        self.trainer.fit(self.module, self.data, ckpt_path=checkpoint, weights_only=False)
        signal.signal(signal.SIGINT, before)
        return self


@pytest.fixture(scope="module")
def local(student_folder, teacher_folder, tmp_path_factory) -> Run:
    root = tmp_path_factory.mktemp("local")
    return Run(student_folder, LocalTeacher(str(teacher_folder)), LocalEngine(), root, 3).fit()


@pytest.fixture
def prepare(student_folder, teacher_folder, student_server, teacher_server, tmp_path) -> Callable[..., Run]:
    def prepare(steps: int = 3, attempts: int = 3, timeout: float = 20.0, **settings: Any) -> Run:
        def servers(server: FakeServer) -> Servers:
            return Servers(urls=[server.url], attempts=attempts, timeout=timeout)

        teacher = ServedTeacher(str(teacher_folder), servers(teacher_server))
        engine = VLLMEngine(servers(student_server))
        return Run(student_folder, teacher, engine, tmp_path / "served", steps, **settings)

    return prepare


def assert_same_steps(ours: Run, theirs: Run, first: int = 0) -> None:
    assert len(ours.numbers.steps) == len(theirs.numbers.steps) - first
    for one, other in zip(ours.numbers.steps, theirs.numbers.steps[first:], strict=True):
        # An end of a turn that is no top token counts as impossible.
        names = one.keys() - {"echo/train/teacher_turn_end", "echo/train/sampler_gap", "echo/train/sampler_gap_max"}
        assert one.keys() ^ other.keys() <= {RETRIES}
        names -= {RETRIES}
        assert {name: one[name] for name in names} == pytest.approx({name: other[name] for name in names}, abs=1e-4)


def test_a_run_on_servers_is_the_local_one(prepare, local, student_server, caplog):
    run = prepare().fit()
    assert_same_steps(run, local)
    assert local.numbers.steps[0]["echo/train/kl"] > 0.1
    weights = [dict(of_run.module.student.state_dict()) for of_run in (run, local)]
    assert all(torch.allclose(weights[0][name], weights[1][name], atol=1e-5) for name in weights[0])
    for of_run in (run, local):
        for step in of_run.numbers.steps:
            assert step["echo/train/sampler_gap"] <= step["echo/train/sampler_gap_max"] < 1e-4
    assert not [record for record in caplog.records if "differ from the student's" in record.message]


@pytest.mark.parametrize("bound", [0.1, 1e9])
def test_rollouts_of_other_weights_are_told_once(prepare, student_server, monkeypatch, caplog, bound):
    """A server that keeps what it cached of prompts, where nobody looks."""
    monkeypatch.setattr(VLLMEngine, "_check", lambda *_: None)
    student_server.deaf = True
    run = prepare(steps=4, sampler_gap_bound=bound)
    run.module.optimizer_of = lambda parameters: torch.optim.SGD(parameters, lr=20.0)
    run.module.gradient_clip = 1e9
    run.fit()
    gaps = [step["echo/train/sampler_gap"] for step in run.numbers.steps]
    assert gaps[0] < 1e-4
    assert max(gaps) > 0.1
    told = [record.message for record in caplog.records if "differ from the student's" in record.message]
    assert len(told) == (bound == 0.1)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_faults_that_pass_change_nothing(prepare, local, student_server, teacher_server, side):
    server = student_server if side == "student" else teacher_server
    run = prepare(timeout=3.0, attempts=6)
    right, called = run.module.rollout, []
    kinds = ("500", "hangs up", "truncated JSON", "a log-prob too few", "slow")

    def rollout(batch: Any, **options: Any) -> Any:
        called.append(batch)
        if len(called) == 2:
            server.faults.extend(Fault(kind, seconds=6.0 * (kind == "slow")) for kind in kinds)
        return right(batch, **options)

    run.module.rollout = rollout
    assert_same_steps(run.fit(), local)
    assert [fault.times for fault in server.faults] == [0] * len(kinds)
    retries = [step[RETRIES] for step in run.numbers.steps]
    assert retries[0] == retries[2] == 0
    assert retries[1] >= len(kinds) - 1  # nobody reads the log-probs of one question
    assert not any(RETRIES in step for step in local.numbers.steps)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_a_server_that_dies_in_a_step_ends_the_run_with_its_name_after_a_checkpoint(
    prepare, local, student_server, teacher_server, tmp_path, side
):
    server = student_server if side == "student" else teacher_server
    run = prepare()
    right, called = run.module.rollout, []

    def rollout(batch: Any, **options: Any) -> Any:
        called.append(batch)
        if len(called) == 3:
            server.faults.append(Fault("dies"))
        return right(batch, **options)

    run.module.rollout = rollout
    with pytest.raises(ServerError, match=f"{server.url} failed to .*3 times.*go on with --ckpt_path"):
        run.fit()
    assert len(run.numbers.steps) == 2
    server.restart()
    resumed = prepare().fit(tmp_path / "served" / "last.ckpt")
    assert_same_steps(resumed, local, first=2)


def test_one_that_dies_and_comes_back_holds_the_run_up_and_changes_nothing(prepare, local, student_server):
    """It comes back with its first weights, and is given the present ones."""
    run = prepare(attempts=8)
    right, called = run.module.rollout, []

    def rollout(batch: Any, **options: Any) -> Any:
        called.append(batch)
        if len(called) == 3:
            student_server.faults.append(Fault("dies"))
            back.start()
        return right(batch, **options)

    def restart() -> None:
        while student_server.lives == 0:
            time.sleep(0.01)
        time.sleep(0.1)
        student_server.restart()

    back = threading.Thread(target=restart)
    run.module.rollout = rollout
    run.fit()
    back.join()
    assert_same_steps(run, local)


@pytest.mark.parametrize("side", ["student", "teacher"])
def test_what_a_server_said_that_does_not_start_lies_in_the_runs_folder(
    prepare, student_folder, teacher_folder, tmp_path, side
):
    broken = Servers(launch=Launch(command=[sys.executable, "-c", "raise ValueError('no such device')"]))
    run = prepare()
    if side == "student":
        run.module.engine = VLLMEngine(broken)
    else:
        run.module.teachers["echo"] = ServedTeacher(str(teacher_folder), broken)
    with pytest.raises(ServerError, match=r"ValueError: no such device.* Its output is in ") as error:
        run.fit()
    (log,) = (tmp_path / "served").glob("*.log")
    assert str(error.value).endswith(f"{log}.")
    assert "no such device" in log.read_text()


@pytest.mark.vllm
@pytest.mark.parametrize("mask", ["repair", "tags"])
def test_a_run_on_vllm(student_tokenizer, teacher_tokenizer, tmp_path, mask):
    """Both sides, on servers that the run starts and ends."""
    servers = Servers(launch=vllm_launch())
    folders = [
        save_tiny(tmp_path / name, tokenizer, seed=seed, hidden_size=64, initializer_range=0.1)
        for name, tokenizer, seed in (("student", student_tokenizer, 1), ("teacher", teacher_tokenizer, 2))
    ]
    engine, teacher = VLLMEngine(servers), ServedTeacher(str(folders[1]), servers)
    run = Run(folders[0], teacher, engine, tmp_path / "run", 2, mask=mask).fit()
    control = Run(folders[0], LocalTeacher(str(folders[1])), LocalEngine(), tmp_path / "local", 2, mask=mask).fit()
    for step, other in zip(run.numbers.steps, control.numbers.steps, strict=True):
        print({name: round(value, 7) for name, value in step.items() if "gap" in name or name.endswith("/kl")})
        assert step["echo/train/sampler_gap"] <= step["echo/train/sampler_gap_max"] < 1e-4
        assert step["echo/train/kl"] == pytest.approx(other["echo/train/kl"], rel=0.5)  # other samples
        assert step.keys() == other.keys() | {RETRIES}
