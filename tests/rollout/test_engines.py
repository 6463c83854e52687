"""What every engine keeps to: the one of this process, one on servers, and, with `make test-vllm`, one on vLLM."""

import dataclasses
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_vllm import COMPLETIONS, FakeServer, Fault, serving
from slow import response_logits
from talks import Talks
from tiny import random_ids, save_tiny
from torch.testing import assert_close
from transformers import PreTrainedModel
from vllm_python import vllm_launch

from lsm_lightning.errors import ConfigurationError, TrainingDivergedError
from lsm_lightning.pretrained import load_model
from lsm_lightning.rollout import Engine, LocalEngine, Sampling, VLLMEngine
from lsm_lightning.rollout import vllm as vllm_module
from lsm_lightning.rollout.base import Request
from lsm_lightning.rollout.vllm import PROBES, _Probe
from lsm_lightning.serving import Launch, ServerError, Servers
from lsm_lightning.serving import client as client_module
from lsm_lightning.types import Completion

GREEDY = Sampling(temperature=0.0)
ENDS = frozenset(range(0, 340, 9))
PROMPTS = [random_ids(seed, length) for seed, length in enumerate([3, 17, 9, 1, 9, 30])]
WIDE = {"hidden_size": 64, "initializer_range": 0.1}
"""Heads of 32, the least that vLLM's kernels know."""


@pytest.fixture(scope="module")
def folder(student_tokenizer, tmp_path_factory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("wide"), student_tokenizer, seed=1, **WIDE)


@pytest.fixture
def model(folder) -> PreTrainedModel:
    return load_model(str(folder), "float32")


@pytest.fixture(scope="module")
def vllm() -> Iterator[VLLMEngine]:
    engine = VLLMEngine(Servers(launch=vllm_launch()))
    yield engine
    engine.close()


@pytest.fixture(params=["local", "served", pytest.param("vllm", marks=pytest.mark.vllm)])
def engine(request, model, folder) -> Iterator[Engine]:
    """With the weights of `model`."""
    if request.param == "vllm":
        made = request.getfixturevalue("vllm")
        made.sync(model)
        yield made
    elif request.param == "local":
        made = LocalEngine()
        made.sync(model)
        yield made
    else:
        with serving(folder) as fake:
            made = VLLMEngine(Servers(urls=[fake.url]))
            made.sync(model)
            yield made
            made.close()


def write(
    engine: Engine, requests: list[Request], sampling: Sampling = Sampling(), new: int = 16,
    ends: frozenset[int] = ENDS, tokenizer: Any = None,
) -> list[Completion]:  # fmt: skip
    return engine.generate(requests, sampling, max_new_tokens=new, turn_end=ends, tokenizer=tokenizer)


def requests_of(samples: int = 2) -> list[Request]:
    return [Request(ids=prompt, seed=100 * number + j) for number, prompt in enumerate(PROMPTS) for j in range(samples)]


def ids_of(completions: list[Completion]) -> list[list[int]]:
    return [list(completion.ids) for completion in completions]


def log_probs_of(model: PreTrainedModel, request: Request, answer: Completion) -> torch.Tensor:
    with torch.no_grad():
        log_probs = response_logits(model, request.ids, answer.ids).log_softmax(-1)
    return log_probs.gather(1, torch.tensor([answer.ids]).T)[:, 0]


# ---- laws -----------------------------------------------------------------------------------------------------------


def test_greedy_answers_are_those_of_transformers(engine, model):
    answers = write(engine, [Request(ids=prompt, seed=0) for prompt in PROMPTS], GREEDY, new=12)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        generated = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
            max_new_tokens=12, eos_token_id=sorted(ENDS), pad_token_id=0,
        )  # fmt: skip
        assert list(answer.ids) == generated[0, len(prompt) :].tolist()


def test_log_probs_are_raw_whatever_the_sampling(engine, model):
    requests = requests_of()
    for answer, request in zip(write(engine, requests, Sampling(temperature=0.6, top_p=0.7)), requests, strict=True):
        assert_close(torch.tensor(answer.log_probs), log_probs_of(model, request, answer), rtol=1e-4, atol=1e-4)


def test_no_token_is_outside_the_nucleus(engine, model):
    sampling, outside = Sampling(temperature=0.8, top_p=0.5), 0
    requests = requests_of(samples=6)
    for answer, request in zip(write(engine, requests, sampling), requests, strict=True):
        with torch.no_grad():
            probs = (response_logits(model, request.ids, answer.ids) / sampling.temperature).softmax(-1)
        for row, token in zip(probs, answer.ids, strict=True):
            assert row[row > row[token]].sum() < sampling.top_p + 1e-4
            outside += int(row[row > row[token]].sum() > 0.3)
    assert outside > 0  # not all of them were the most probable one


def test_an_answer_depends_on_its_prompt_and_seed_only(engine):
    requests = requests_of()
    together = ids_of(write(engine, requests))
    assert [ids_of(write(engine, [request]))[0] for request in requests] == together
    assert ids_of(write(engine, requests[::-1]))[::-1] == together
    assert len({tuple(ids) for ids in together}) == len(together)


def test_a_conversation_is_what_it_would_be_alone(engine):
    turns, limits = [3, 1, 2, 4, 1], [16] * 5
    together = Talks(PROMPTS[:5], turns, limits)
    engine.converse(together, Sampling(), max_new_tokens=16, turn_end=ENDS)
    for number in range(5):
        alone = Talks(PROMPTS[:5], [count if place == number else 0 for place, count in enumerate(turns)], limits)
        engine.converse(alone, Sampling(), max_new_tokens=16, turn_end=ENDS)
        assert alone.texts[number] == together.texts[number]


def test_an_answer_ends_with_its_first_end_of_turn_or_is_truncated(engine):
    answers = write(engine, requests_of(samples=6), new=5)
    for answer in answers:
        assert not ENDS & set(answer.ids[:-1])
        assert (answer.ids[-1] in ENDS) is not answer.truncated
        assert len(answer.ids) == 5 or not answer.truncated
        assert len(answer.log_probs) == len(answer.ids)
    assert {answer.truncated for answer in answers} == {True, False}


def test_no_other_token_ends_a_turn(engine, model, student_tokenizer):
    """Neither the tokenizer's end of a text nor the generation settings' do it by themselves."""
    everything = frozenset(range(340))
    assert student_tokenizer.eos_token_id == model.generation_config.eos_token_id in everything
    answers = write(engine, requests_of(samples=8), Sampling(top_p=1.0), new=40, ends=frozenset())
    assert all(answer.truncated and len(answer.ids) == 40 for answer in answers)
    assert any(student_tokenizer.eos_token_id in answer.ids[:-1] for answer in answers)


def test_a_prompt_too_long_for_the_context_is_refused(engine):
    with pytest.raises(ConfigurationError, match=r"250 tokens and max_new_tokens=7 exceed .* 256"):
        write(engine, [Request(ids=random_ids(0, 250), seed=0)], new=7)
    assert len(write(engine, [Request(ids=random_ids(0, 250), seed=0)], new=6)) == 1


def test_the_room_behind_a_prompt_is_what_it_may_fill(engine):
    room = engine.room(200)
    assert room == 56
    request = Request(ids=random_ids(0, 200), seed=0, limit=room)
    (answer,) = write(engine, [request], new=1000, ends=frozenset())
    assert (len(answer.ids), answer.truncated) == (room, True)


def test_a_limit_of_its_own_cuts_an_answer_short(engine):
    whole = write(engine, requests_of(), ends=frozenset())
    cut = write(engine, [dataclasses.replace(request, limit=3) for request in requests_of()], ends=frozenset())
    assert ids_of(cut) == [ids[:3] for ids in ids_of(whole)]


def test_a_string_ends_an_answer_with_the_token_that_completes_it(engine, student_tokenizer):
    requests = requests_of(samples=4)
    plain = write(engine, requests, Sampling(), new=24, ends=frozenset())
    answers = write(engine, requests, Sampling(stop=["e"]), new=24, ends=frozenset(), tokenizer=student_tokenizer)
    assert {answer.stopped for answer in answers} == {True, False}
    for answer, whole in zip(answers, plain, strict=True):
        assert answer.ids == whole.ids[: len(answer.ids)]
        assert "e" not in student_tokenizer.decode(answer.ids[:-1])
        assert answer.stopped == ("e" in student_tokenizer.decode(answer.ids))
        assert answer.truncated is not answer.stopped


def test_new_weights_count_from_the_next_sync_on(engine, model):
    long = [Request(ids=random_ids(seed, 200), seed=seed) for seed in range(3)]  # more than a block of a prefix cache
    requests = requests_of() + long
    before = ids_of(write(engine, requests))
    changed(model)
    assert ids_of(write(engine, requests)) == before
    engine.sync(model)
    answers = write(engine, requests)
    assert ids_of(answers) != before
    for request, answer in zip(requests, answers, strict=True):
        assert_close(torch.tensor(answer.log_probs), log_probs_of(model, request, answer), rtol=1e-4, atol=1e-4)


def changed(model: PreTrainedModel, by: float = 0.03) -> None:
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            generator = torch.Generator().manual_seed(number)
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=by)


STALE = {
    "old weights": ("/pause?mode=wait", "/reset_prefix_cache", "/update_weight_version", "/resume"),
    "old prompts": ("/pause?mode=wait&clear_cache=false", "/collective_rpc", "/update_weight_version", "/resume"),
}


@pytest.mark.vllm
@pytest.mark.parametrize("what", STALE)
def test_what_vllm_has_kept_is_noticed(vllm, model, monkeypatch, what):
    vllm.sync(model)
    changed(model)
    monkeypatch.setattr(vllm_module, "RENEWAL", STALE[what])
    with pytest.raises(ServerError, match=r"differ from the student's by \d"):
        vllm.sync(model)
    monkeypatch.undo()
    vllm.sync(model)


@pytest.mark.vllm
@pytest.mark.parametrize("change", ["embed_tokens", "q_proj", "o_proj", "gate_proj", "down_proj", "layernorm"])
def test_every_kind_of_weight_goes_over(vllm, model, change):
    """The embedding is the output matrix too."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(1.1 if change in name else 1.0)
    vllm.sync(model)  # raises where what the server says is not what the model says


# ---- engines on servers ---------------------------------------------------------------------------------------------


@pytest.fixture
def fake(folder) -> Iterator[FakeServer]:
    with serving(folder) as server:
        yield server


@pytest.fixture
def served(fake) -> Iterator[VLLMEngine]:
    engine = VLLMEngine(Servers(urls=[fake.url], attempts=2, timeout=20))
    yield engine
    engine.close()


def test_weights_go_over_in_the_right_order(served, fake, model):
    served.sync(model)
    paths = [path.partition("?")[0] for path, _ in fake.log]
    assert paths[:5] == ["/pause", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version", "/resume"]
    folder = Path(fake.log[1][1]["kwargs"]["weights_path"])
    assert_close(load_model(str(folder), "auto").state_dict(), model.state_dict(), rtol=0, atol=0)
    served.close()
    assert not folder.exists()


@pytest.mark.parametrize("by", [0.03, 1e-4], ids="changed by {}".format)
@pytest.mark.parametrize("defect", ["keeps its weights", "keeps its prefix cache"])
def test_a_server_that_answers_with_old_weights_is_told_by_name(served, fake, model, defect, by):
    """Also where a step has changed so little that it would pass for rounding in half precision."""
    served.sync(model)
    fake.deaf, fake.forgets = defect == "keeps its weights", defect != "keeps its prefix cache"
    changed(model, by)
    with pytest.raises(ServerError, match=rf"{fake.url} was told to load .* from those before"):
        served.sync(model)
    fake.deaf, fake.forgets = False, True
    served.sync(model)


def test_another_model_on_the_server_is_told(fake, student_tokenizer, tmp_path):
    fake.deaf = True
    other = load_model(str(save_tiny(tmp_path, student_tokenizer, seed=2, **WIDE)), "float32")
    with pytest.raises(ServerError, match=r"differ from the student's by \d.*tolerance=0\.001"):
        VLLMEngine(Servers(urls=[fake.url])).sync(other)


def test_first_weights_are_told_from_the_present_ones_through_rounding():
    """A step changes less than a short type rounds, so that weights of the step before say nothing."""
    first, former, present = (
        _Probe(texts=[[1]], log_probs=torch.tensor([[-1.0, -2.0, -3.0]]) + moved) for moved in (0.0, 0.095, 0.1)
    )
    told = [{0: -0.98, 1: -2.02, 2: -2.98}]  # of the first ones, rounded
    engine = VLLMEngine(Servers(urls=["http://10.0.0.1:8000"]), tolerance=0.25)
    engine._limit = 0.25
    engine._check("http://10.0.0.1:8000", told, present, [former])
    with pytest.raises(ServerError, match="from those before"):
        engine._check("http://10.0.0.1:8000", told, present, [first, former])


def test_weights_that_are_no_numbers_are_not_sent(served, fake, model):
    with torch.no_grad():
        model.get_input_embeddings().weight.fill_(torch.nan)
    with pytest.raises(TrainingDivergedError):
        served.sync(model)
    assert not fake.log


@pytest.mark.parametrize("training", [True, False])
def test_a_sync_leaves_the_model_as_it_was(served, model, training):
    model.train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    served.sync(model)
    assert model.training is training
    assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_server_that_comes_back_with_its_first_weights_gets_the_present_ones(served, fake, model, monkeypatch):
    served.sync(model)
    changed(model)
    served.sync(model)
    undisturbed = ids_of(write(served, requests_of()))
    fake.stop()
    fake.restart()
    assert ids_of(write(served, requests_of())) == undisturbed  # told by its version
    monkeypatch.setattr(served.fleet._client, "_proof", None)
    fake.stop()
    fake.restart()
    assert ids_of(write(served, requests_of())) != undisturbed  # the control


def test_a_server_that_two_runs_use_is_told(served, fake, model, folder):
    other = VLLMEngine(Servers(urls=[fake.url]))
    served.sync(model)
    other.sync(model)
    right = fake.answer

    def quarrel(path, body):
        answer = right(path, body)
        fake.version = "another's"
        return answer

    fake.answer = quarrel
    with pytest.raises(ServerError, match=f"{fake.url} loses the student's weights again"):
        write(served, requests_of())
    other.close()


def test_equal_prompts_share_a_server_and_others_are_dealt_out(folder, model):
    with serving(folder) as one, serving(folder) as other:
        engine = VLLMEngine(Servers(urls=[one.url, other.url]))
        engine.sync(model)
        for fake in (one, other):
            fake.log.clear()
        write(engine, requests_of(samples=4))
        asked = [{tuple(body["prompt"]) for _, body in fake.log} for fake in (one, other)]
        assert not asked[0] & asked[1]
        assert [len(prompts) for prompts in asked] == [3, 3]
        engine.close()


@pytest.fixture
def two(folder, monkeypatch) -> Iterator[tuple[VLLMEngine, FakeServer, FakeServer]]:
    """Both of its servers answer."""
    monkeypatch.setattr(client_module, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(client_module, "SECONDS_BETWEEN_LOOKS", 0.0)
    with serving(folder) as one, serving(folder) as other:
        engine = VLLMEngine(Servers(urls=[one.url, other.url], attempts=2, timeout=20))
        yield engine, one, other
        engine.close()


@pytest.mark.parametrize("back", ["during rollouts", "at a sync", "twice"])
def test_a_server_that_is_away_at_a_sync_is_left_out_until_it_is_back(two, model, caplog, back):
    engine, _, other = two
    engine.sync(model)
    write(engine, requests_of())
    other.stop()
    asked, local = len(other.log), LocalEngine()
    for by in (0.03, 0.02):
        changed(model, by)
        engine.sync(model)
        local.sync(model)
        assert ids_of(write(engine, requests_of())) == ids_of(write(local, requests_of()))
    assert len(other.log) == asked
    (told,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert f"{other.url} is away. The others (1 of 2)" in told
    other.restart()
    if back == "at a sync":
        engine.sync(model)
    if back == "twice":
        other.faults.append(Fault("dies", path="/collective_rpc"))
        assert ids_of(write(engine, requests_of())) == ids_of(write(local, requests_of()))
        assert COMPLETIONS not in [path for path, _ in other.log[asked:]]
        other.restart()
    assert ids_of(write(engine, requests_of())) == ids_of(write(local, requests_of()))
    since = [path for path, _ in other.log[asked:]]
    assert since.index("/collective_rpc") < since.index("/resume") < since.index(COMPLETIONS)
    new = torch.cat([p.flatten() for p in other.model.parameters()])
    assert_close(new, torch.cat([p.flatten() for p in model.parameters()]), rtol=0, atol=0)
    assert len([path for path in since if path == COMPLETIONS]) > PROBES


def test_where_all_are_away_the_run_ends(two, model):
    engine, one, other = two
    engine.sync(model)
    one.stop()
    other.stop()
    with pytest.raises(ServerError, match=f"({one.url}|{other.url}) failed to take over new weights .* 2 times"):
        engine.sync(model)


def test_one_that_is_there_with_other_weights_ends_the_run_though_another_is_right(two, model):
    engine, _, other = two
    engine.sync(model)
    other.deaf = True
    changed(model)
    with pytest.raises(ServerError, match=f"{other.url} was told to load"):
        engine.sync(model)
    other.deaf = False
    engine.sync(model)
    other.stop()
    changed(model)
    engine.sync(model)
    other.deaf = True
    other.restart()
    with pytest.raises(ServerError, match=f"{other.url} was told to load"):
        write(engine, requests_of())


def test_all_have_to_be_there_at_first(two, model):
    engine, _, other = two
    other.stop()
    with pytest.raises(ServerError, match=f"{other.url} failed to say what model it has"):
        engine.sync(model)


def test_servers_of_different_lengths_are_refused(folder, student_tokenizer, model, tmp_path):
    longer = save_tiny(tmp_path, student_tokenizer, max_position_embeddings=512, **WIDE)
    told = pytest.raises(ConfigurationError, match="256 and 512 tokens")
    with serving(folder) as one, serving(longer) as other, told:
        VLLMEngine(Servers(urls=[one.url, other.url])).sync(model)


@pytest.mark.slow
def test_a_server_of_ones_own_starts_with_the_weights_is_started_again_and_ends(model):
    fake = str(Path(__file__).parents[1] / "fake_vllm.py")
    environment = {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    engine = VLLMEngine(Servers(launch=Launch(command=[sys.executable, fake], environment=environment)))
    local = LocalEngine()
    for by in (0.0, 0.03):
        changed(model, by)
        for each in (engine, local):
            each.sync(model)
        assert ids_of(write(engine, requests_of())) == ids_of(write(local, requests_of()))
    own = engine.fleet._own
    assert own is not None
    assert own._process is not None
    os.killpg(own._process.pid, 9)
    assert ids_of(write(engine, requests_of())) == ids_of(write(local, requests_of()))
    again = own._process
    engine.close()
    assert again.poll() is not None


@pytest.mark.parametrize(
    "settings",
    [
        {"urls": []},
        {"urls": ["http://a"], "launch": Launch(command=["x"])},
        {"urls": ["http://a"], "timeout": 0.0},
        {"urls": ["http://a"], "attempts": 0},
        {"urls": ["http://a"], "concurrency": 0},
    ],
    ids=str,
)
def test_impossible_settings_are_refused(settings):
    with pytest.raises(ConfigurationError, match="servers"):
        Servers(**settings)
