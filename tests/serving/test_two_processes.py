"""Two processes with a sharded student, which share servers out and renew each of them once."""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_servers import InProcess
from fake_vllm import FakeServer, serving
from tiny import random_ids, save_tiny
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from transformers import PreTrainedModel
from two import by_two

from lsm_lightning.pretrained import load_model, load_skeleton
from lsm_lightning.processes import gather, share
from lsm_lightning.rollout import LocalEngine, Sampling, VLLMEngine
from lsm_lightning.rollout.base import Request
from lsm_lightning.serving import Launch, ServerError, Servers
from lsm_lightning.sharding import load_sharded

REQUESTS = [Request(ids=random_ids(seed, 6), seed=seed) for seed in range(4)]
ENDS = frozenset(range(0, 340, 9))


def written(engine: Any) -> list[list[int]]:
    answers = engine.generate(REQUESTS, Sampling(), max_new_tokens=8, turn_end=ENDS)
    return [list(answer.ids) for answer in answers]


@torch.no_grad()
def scale(model: PreTrainedModel, by: float) -> None:
    for parameter in model.parameters():
        parameter.mul_(by)


def written_locally(folder: Path) -> tuple[list[list[int]], list[list[int]]]:
    """What a local engine writes with the whole student, before and after its weights change."""
    model, local = load_model(str(folder), "float32"), LocalEngine()
    local.sync(model)
    before = written(local)
    scale(model, 1.05)
    local.sync(model)
    after = written(local)
    assert before != after
    return before, after


def sharded(model: str) -> PreTrainedModel:
    mesh = init_device_mesh("cpu", (2,))
    return load_sharded(
        lambda: load_model(model, "float32"), lambda: load_skeleton(model), mesh, device=torch.device("cpu")
    )


def asking_servers(model: str, urls: dict[str, list[str]]) -> dict[str, Any]:
    student, found = sharded(model), {}
    for name, servers in urls.items():
        engine = VLLMEngine(Servers(urls=servers, attempts=1))
        try:
            engine.sync(student)
            found[name] = written(engine)
            scale(student, 1.05)
            engine.sync(student)
            found[f"{name}, changed"] = written(engine)
            scale(student, 1 / 1.05)
        except ServerError as error:
            found[name] = str(error)
        engine.close()
    return found


def test_all_have_the_whole_students_answers_and_one_renews_a_server(tmp_path, student_tokenizer):
    folder = save_tiny(tmp_path / "student", student_tokenizer, seed=1)
    with serving(folder) as shared, serving(folder) as first, serving(folder) as second, serving(folder) as deaf:
        deaf.deaf = True
        urls = {"shared": [shared.url], "own": [first.url, second.url], "deaf": [deaf.url]}
        found = by_two(asking_servers, tmp_path, str(folder), urls)
    before, after = written_locally(folder)
    for of_process in found:
        assert of_process["shared"] == of_process["own"] == before
        assert of_process["shared, changed"] == of_process["own, changed"] == after
        assert deaf.url in of_process["deaf"]  # also in the process that had asked nothing
    for fake in (shared, first, second):
        assert [path for path, _ in fake.log].count("/collective_rpc") == 2


def beside_its_server(model: str) -> dict[str, Any]:
    """Two steps, each with a server on this process's device; the second process's dies in its sleep."""
    student, rank, found = sharded(model), distributed.get_rank(), {}
    with pytest.MonkeyPatch.context() as patch:
        own = InProcess.in_place_of_servers(patch)
        engine = VLLMEngine(Servers(launch=Launch(command=["vllm"], colocated=True), attempts=2))
        for step in ("first", "second"):
            engine.sync(student)
            found[step] = written(engine)
            engine.rest()
            found[f"asleep after the {step}"] = set(own[0].fake.asleep)
            scale(student, 1.05)
            if step == "first" and rank == 1:
                own[0].die()
        found["urls"], found["starts"] = [server.url for server in own], own[0].starts
        found["folder"] = str(engine._weights)
        (server,) = own
        server.fake.sleepless = rank == 0
        engine.sync(student)
        try:
            engine.rest()
        except ServerError as error:
            found["told"] = str(error)
        engine.close()
    return found


def test_each_process_has_a_server_beside_it_which_sleeps_between_steps(tmp_path, student_tokenizer):
    folder = save_tiny(tmp_path / "student", student_tokenizer, seed=1)
    found = by_two(beside_its_server, tmp_path, str(folder))
    before, after = written_locally(folder)
    for of_process in found:
        assert (of_process["first"], of_process["second"]) == (before, after)
        assert of_process["asleep after the first"] == of_process["asleep after the second"] == {"weights", "kv_cache"}
        assert len(of_process["urls"]) == 1
        # That the first process's server does not sleep is told in both.
        assert found[0]["urls"][0] in of_process["told"]
    assert found[0]["urls"] != found[1]["urls"]
    assert found[0]["folder"] == found[1]["folder"]
    assert [of_process["starts"] for of_process in found] == [1, 2]


def with_one_away(model: str) -> dict[str, Any]:
    """A server for each process; that of the second goes, comes back, and then both go."""
    student, found, told = load_model(model, "float32"), {}, []
    handler = logging.Handler()
    handler.emit = lambda record: told.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("lsm_lightning").addHandler(handler)
    fakes = [FakeServer(Path(model)) for _ in range(2)] if distributed.get_rank() == 0 else []
    urls = gather([fake.url for fake in fakes])[0]
    engine = VLLMEngine(Servers(urls=urls, attempts=2))

    def step(name: str, by: float) -> None:
        scale(student, by)
        engine.sync(student)
        found[name] = written(engine)
        gather(None)
        found[f"asked, {name}"] = [len(fake.log) for fake in fakes]

    step("all are there", 1.0)
    if fakes:
        fakes[1].stop()
    step("one is away", 1.05)
    if fakes:
        fakes[1].restart()
    step("it is back", 1.0)
    if fakes:
        fakes[0].stop()
        fakes[1].stop()
    try:
        engine.sync(student)
    except ServerError as error:
        found["all are away"], found["agreed"] = str(error), error.agreed
    engine.close()
    return found | {"told": told, "urls": urls}


def test_while_the_server_of_one_process_is_away_it_asks_the_others(tmp_path, student_tokenizer):
    folder = save_tiny(tmp_path / "student", student_tokenizer, seed=1)
    found = by_two(with_one_away, tmp_path, str(folder))
    before, after = written_locally(folder)
    _, second = found[0]["urls"]
    for of_process in found:
        assert of_process["all are there"] == before
        assert of_process["one is away"] == of_process["it is back"] == after
        assert "failed to take over new weights" in of_process["all are away"]
        assert of_process["agreed"]
    (told,) = [text for of_process in found for text in of_process["told"] if "is away" in text]
    assert told == f"The server {second} is away. The others (1 of 2) answer in its place until it is back."
    asked = [found[0][f"asked, {name}"] for name in ("all are there", "one is away", "it is back")]
    assert asked[0][1] == asked[1][1] < asked[2][1]
    assert asked[1][0] - asked[0][0] > asked[2][0] - asked[1][0]  # it has answered for both


@pytest.mark.parametrize(("servers", "processes"), [(1, 1), (1, 4), (2, 4), (3, 2), (4, 2), (5, 8)])
def test_every_server_is_used_and_every_process_has_one(servers, processes):
    urls = [f"http://{number}" for number in range(servers)]
    shares = [share(urls, rank, processes) for rank in range(processes)]
    assert all(shares)
    assert {url for of_one in shares for url in of_one} == set(urls)
    if servers >= processes:
        assert sum(map(len, shares)) == servers
