"""Servers on the trainer's own devices: they sleep while the student is trained, and write as if they had not."""

import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from fake_servers import InProcess
from fake_vllm import COMPLETIONS, Fault
from tiny import random_ids, save_tiny
from transformers import PreTrainedModel
from vllm_python import vllm_launch

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.pretrained import load_model
from lsm_lightning.rollout import Engine, LocalEngine, Sampling, VLLMEngine
from lsm_lightning.rollout import vllm as vllm_module
from lsm_lightning.rollout.base import Request
from lsm_lightning.rollout.vllm import RENEWAL, SLEEP, WAKING
from lsm_lightning.serving import Launch, ServerError, Servers
from lsm_lightning.serving import client as client_module
from lsm_lightning.serving import fleet as fleet_module
from lsm_lightning.serving import gpu as gpu_module
from lsm_lightning.serving.gpu import only_own_gpu
from lsm_lightning.serving.launch import MEMORY_SHARE
from lsm_lightning.teacher import ServedTeacher

FAKE = str(Path(__file__).parents[1] / "fake_vllm.py")
COLOCATED = Servers(launch=Launch(command=["vllm"], colocated=True), attempts=3, timeout=20)
REQUESTS = [Request(ids=random_ids(seed, length), seed=seed) for seed, length in enumerate([3, 30, 30, 9])]
WIDE = {"hidden_size": 64, "initializer_range": 0.1}
"""Heads of 32, the least that vLLM's kernels know."""


@pytest.fixture(autouse=True)
def _logs_go_with_the_test(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))


@pytest.fixture(scope="module")
def folder(student_tokenizer, tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("colocated"), student_tokenizer, seed=1, **WIDE)


@pytest.fixture
def model(folder) -> PreTrainedModel:
    return load_model(str(folder), "float32")


@pytest.fixture
def own(monkeypatch) -> list[InProcess]:
    """The servers that are started, in this process."""
    monkeypatch.setattr(client_module, "FIRST_PAUSE", 0.02)
    monkeypatch.setattr(client_module, "SECONDS_BETWEEN_LOOKS", 0.0)
    return InProcess.in_place_of_servers(monkeypatch)


@pytest.fixture
def engine(own, model) -> Iterator[VLLMEngine]:
    """Asleep after its first rollout, which its server's log shows."""
    made = VLLMEngine(COLOCATED)
    made.sync(model)
    written(made)
    made.rest()
    yield made
    made.close()


def written(engine: Engine, sampling: Sampling = Sampling()) -> list[list[int]]:
    answers = engine.generate(REQUESTS, sampling, max_new_tokens=16, turn_end=frozenset(range(0, 340, 9)))
    return [list(answer.ids) for answer in answers]


def changed(model: PreTrainedModel) -> None:
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.03)


def locally(model: PreTrainedModel, sampling: Sampling = Sampling()) -> list[list[int]]:
    engine = LocalEngine()
    engine.sync(model)
    return written(engine, sampling)


# ---- sleep ----------------------------------------------------------------------------------------------------------


def test_a_server_sleeps_after_the_rollouts_and_wakes_with_new_weights(engine, own, model):
    engine.sync(model)
    (server,) = own
    assert "--enable-sleep-mode" in server.options
    paths = [path for path, _ in server.fake.log]
    asleep = paths.index("/sleep?level=2")
    assert paths[: len(RENEWAL)] == [*RENEWAL]
    # The cache has no place before the weights are there, and nothing is asked before both are.
    assert paths[asleep + 1 : asleep + 7] == [
        "/wake_up?tags=weights", "/collective_rpc", "/wake_up?tags=kv_cache", "/reset_prefix_cache",
        "/update_weight_version", COMPLETIONS,
    ]  # fmt: skip
    assert not server.fake.asleep


def test_answers_are_those_of_a_server_that_never_sleeps(own, model):
    engine, awake = VLLMEngine(COLOCATED), VLLMEngine(Servers(launch=Launch(command=["vllm"])))
    for _ in range(3):
        for each in (engine, awake):
            each.sync(model)
        assert written(engine) == written(awake) == locally(model)
        engine.rest()
        changed(model)
    assert [SLEEP in [path for path, _ in server.fake.log] for server in own] == [True, False]
    for each in (engine, awake):
        each.close()


def test_one_that_sleeps_knows_nothing(engine, own, model):
    """The control: the weights that it had are gone, and so is what it knew of prompts."""
    (server,) = own
    assert server.fake.asleep == {"weights", "kv_cache"}
    assert not any(parameter.any() for parameter in server.fake.model.parameters())
    with pytest.raises(AssertionError):
        written(engine)
    engine._asleep = False
    with pytest.raises(ServerError, match="asleep"):
        written(engine)


@pytest.mark.parametrize("forgotten", ["/wake_up?tags=weights", "/wake_up?tags=kv_cache"])
def test_half_awake_is_not_awake(engine, model, monkeypatch, forgotten):
    monkeypatch.setattr(vllm_module, "WAKING", [path for path in WAKING if path != forgotten])
    with pytest.raises(ServerError, match=r"no memory to load|asleep"):
        engine.sync(model)


def test_engines_elsewhere_have_nothing_to_give_back(own, model):
    for engine in (LocalEngine(), VLLMEngine(Servers(launch=Launch(command=["vllm"])))):
        engine.sync(model)
        before = written(engine)
        engine.rest()
        assert written(engine) == before
        engine.close()
    assert "--enable-sleep-mode" not in own[0].options


def test_what_rests_needs_no_rest(engine, own):
    (server,) = own
    told = len(server.fake.log)
    engine.rest()
    assert len(server.fake.log) == told
    VLLMEngine(COLOCATED).rest()  # has no server yet
    assert len(own) == 1


# ---- faults ---------------------------------------------------------------------------------------------------------


def test_a_server_that_dies_in_its_sleep_is_started_again(engine, own, model):
    (server,) = own
    server.die()
    changed(model)
    engine.sync(model)
    assert (server.starts, server.fake.asleep) == (2, set())
    assert written(engine) == locally(model)
    engine.rest()
    assert server.fake.asleep


def test_a_server_that_dies_while_it_writes_is_started_again(engine, own, model):
    (server,) = own
    engine.sync(model)
    server.fake.faults.append(Fault("dies"))
    assert written(engine) == locally(model)
    assert server.starts == 2
    engine.rest()
    assert server.fake.asleep


def test_one_that_has_died_needs_not_sleep(engine, own, model):
    (server,) = own
    engine.sync(model)
    server.die()
    engine.rest()
    engine.sync(model)
    assert written(engine) == locally(model)


def test_one_that_cannot_be_reached_is_told(engine, own, model):
    """It lives, so it may hold memory."""
    (server,) = own
    engine.sync(model)
    server.fake.faults.append(Fault("500", times=99, path="/sleep"))
    with pytest.raises(ServerError, match=rf"{server.url} failed to sleep .*out of memory"):
        engine.rest()


def test_one_that_stays_awake_is_told(engine, own, model):
    (server,) = own
    engine.sync(model)
    server.fake.sleepless = True
    with pytest.raises(ServerError, match=rf"{server.url} was told to sleep and says that it is awake.*sleep-mode"):
        engine.rest()


@pytest.mark.parametrize("given", [0.0, 0.4, 0.6, 3.0], ids="{:g} of its weights".format)
def test_memory_that_does_not_come_back_is_told(engine, own, model, monkeypatch, given):
    """It says that it sleeps, as vLLM does without its sleep mode; the GPU is asked, too."""
    engine.sync(model)
    weights = sum(file.stat().st_size for file in engine._weights.glob("*.safetensors"))
    free = iter([10**9, 10**9 + int(given * weights)])
    monkeypatch.setattr(vllm_module, "free_memory", lambda: next(free))
    if given > 0.5:
        engine.rest()
        return
    with pytest.raises(ServerError, match=r"has given back 0\.00 GiB of its GPU's memory, less than its weights"):
        engine.rest()


# ---- where it runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("visible", "number", "shown"),
    [(None, 3, "3"), ("", 0, "0"), ("4,5,6,7", 2, "6"), ("GPU-8a, GPU-9b", 1, "GPU-9b")],
)
def test_a_server_sees_the_gpu_of_its_process(monkeypatch, visible, number, shown):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: number)
    assert only_own_gpu() == {"CUDA_VISIBLE_DEVICES": shown}


def test_without_a_gpu_nothing_is_set():
    assert only_own_gpu() == {}
    assert gpu_module.free_memory() is None


def test_it_is_told_its_gpu_and_others_are_not(own, model, monkeypatch):
    monkeypatch.setattr(fleet_module, "only_own_gpu", lambda: {"CUDA_VISIBLE_DEVICES": "5"})
    for servers in (COLOCATED, Servers(launch=Launch(command=["vllm"]))):
        engine = VLLMEngine(servers)
        engine.sync(model)
        engine.close()
    assert [server.environment.get("CUDA_VISIBLE_DEVICES") for server in own] == ["5", None]


def test_a_gpu_chosen_by_hand_is_refused():
    environment = {"CUDA_VISIBLE_DEVICES": "3"}
    assert Launch(command=["vllm"], environment=environment).environment == environment
    with pytest.raises(ConfigurationError, match="CUDA_VISIBLE_DEVICES=3"):
        Launch(command=["vllm"], environment=environment, colocated=True)


def test_a_teachers_server_is_no_sleeper():
    with pytest.raises(ConfigurationError, match=r"'a/teacher': launch\.colocated"):
        ServedTeacher("a/teacher", COLOCATED)


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ([], MEMORY_SHARE),
        (["--gpu-memory-utilization", "0.5"], 0.5),
        (["--enforce-eager", "--gpu-memory-utilization=0.5", "--max-model-len", "4096"], 0.5),
        (["--gpu_memory_utilization", "0.5"], 0.5),
        (["--gpu-memory-utilization", "0.4", "--gpu-memory-utilization", "0.5"], 0.5),
    ],
)
def test_the_command_says_what_share_of_a_gpu_it_takes(options, share):
    assert Launch(command=["python", "-m", "vllm", *options]).memory_share == share


@pytest.mark.parametrize("options", [["--gpu-memory-utilization", "half"], ["--gpu-memory-utilization"]])
def test_a_share_that_is_no_number_is_refused(options):
    with pytest.raises(ConfigurationError, match="--gpu-memory-utilization is no number"):
        _ = Launch(command=["vllm", *options]).memory_share


# ---- whole runs -----------------------------------------------------------------------------------------------------


@pytest.fixture
def config(settings, tmp_path) -> Path:
    """A run with a look before it, an evaluation after each step, and its rollouts from such a server."""
    launch = {"command": ["vllm"], "colocated": True}
    settings["model"]["engine"] = {
        "class_path": "lsm_lightning.rollout.VLLMEngine",
        "init_args": {"servers": {"launch": launch}},
    }
    settings["model"]["optimizer"] = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.05}}
    settings["trainer"] |= {"max_steps": 2, "val_check_interval": 1}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def test_a_run_wakes_its_server_for_all_that_is_written_and_for_nothing_else(run, config, own):
    assert run("fit", "--config", str(config)) == 0
    (server,) = own
    log = [path for path, _ in server.fake.log]
    assert COMPLETIONS in log
    # A look, two steps, an evaluation after each, one before all and one after: between them, and at last, it sleeps.
    assert log.count(SLEEP) == 7
    assert log.count(WAKING[0]) == 6
    assert server.fake.asleep
    assert not server.alive


def test_a_look_before_a_run_wakes_it_too(run, config, own):
    assert run("probe", "--config", str(config)) == 0
    (server,) = own
    assert COMPLETIONS in [path for path, _ in server.fake.log]
    assert server.fake.asleep


@pytest.mark.slow
def test_a_process_of_its_own_sleeps_dies_and_comes_back(model):
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    launch = Launch(command=[sys.executable, FAKE], environment=environment, colocated=True)
    engine = VLLMEngine(Servers(launch=launch))
    for dies in (False, True, False):
        engine.sync(model)
        assert written(engine) == locally(model)
        engine.rest()
        changed(model)
        if dies:
            kill(engine)
    engine.close()


def kill(engine: VLLMEngine) -> None:
    process = engine.fleet._own._process
    os.killpg(process.pid, 9)
    process.wait()


# ---- vLLM -----------------------------------------------------------------------------------------------------------


def vllm_servers() -> Servers:
    launch = vllm_launch()
    return Servers(launch=Launch(command=launch.command, environment=launch.environment, colocated=True))


@pytest.mark.vllm
def test_vllm_has_no_sleep_on_a_cpu_and_says_so(model):
    with pytest.raises(ServerError, match=r"ended before it was ready.*Sleep mode is not supported"):
        VLLMEngine(vllm_servers()).sync(model)


@pytest.mark.vllm
def test_vllm_takes_every_request_and_is_none_the_worse(model, monkeypatch):
    """Its CPU worker answers as if it slept, and keeps all: what is tried are the requests and their order, and that it
    is started again where it dies meanwhile."""
    monkeypatch.setattr(fleet_module, "SLEEP_MODE", ())
    engine, greedy = VLLMEngine(vllm_servers()), Sampling(temperature=0.0)
    for dies in (False, False, True, False):
        engine.sync(model)
        (url,) = engine.fleet.urls
        assert not engine._sleeps(url)
        assert written(engine, greedy) == locally(model, greedy)
        engine.rest()
        assert engine._sleeps(url)
        changed(model)
        if dies:
            kill(engine)
    engine.close()
