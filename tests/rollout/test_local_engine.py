import copy

import pytest
import torch
from slow import response_logits
from tiny import FAMILIES, random_ids, tiny_model
from torch.testing import assert_close
from transformers import PreTrainedModel

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.rollout import LocalEngine, Sampling
from lsm_lightning.rollout.base import Request
from lsm_lightning.types import Completion

GREEDY = Sampling(temperature=0.0)
NUCLEUS = Sampling(temperature=1.0, top_p=0.9)
LENGTHS = [3, 17, 9, 1, 9, 30]
NEVER = frozenset({10**6})
PROMPTS = [random_ids(seed, length) for seed, length in enumerate(LENGTHS)]
ENDS = frozenset(range(0, 340, 9))
"""So many tokens end a turn that untrained models write answers of many lengths."""


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model(seed=1, initializer_range=0.1)


def engine_of(model: PreTrainedModel, **settings: int) -> LocalEngine:
    engine = LocalEngine(**settings)
    engine.sync(model)
    return engine


def write(
    engine: LocalEngine,
    requests: list[Request],
    sampling: Sampling = NUCLEUS,
    new: int = 24,
    ends: frozenset[int] = ENDS,
) -> list[Completion]:
    return engine.generate(requests, sampling, max_new_tokens=new, turn_end=ends)


def requests_of(samples: int = 2) -> list[Request]:
    return [Request(ids=prompt, seed=100 * number + j) for number, prompt in enumerate(PROMPTS) for j in range(samples)]


def ids_of(completions: list[Completion]) -> list[list[int]]:
    return [list(completion.ids) for completion in completions]


# ---- against transformers -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_transformers_one_prompt_at_a_time(family):
    model = tiny_model(family, seed=1)
    answers = write(engine_of(model), [Request(ids=prompt, seed=0) for prompt in PROMPTS], GREEDY, new=12)
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        generated = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
            max_new_tokens=12, eos_token_id=sorted(ENDS), pad_token_id=0,
        )  # fmt: skip
        assert list(answer.ids) == generated[0, len(prompt) :].tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_are_those_of_a_forward_pass_at_temperature_one(family):
    model = tiny_model(family, seed=1)
    requests = requests_of()
    answers = write(engine_of(model), requests, Sampling(temperature=0.7, top_p=0.8))
    for request, answer in zip(requests, answers, strict=True):
        with torch.no_grad():
            log_probs = response_logits(model, request.ids, answer.ids).log_softmax(-1)
        expected = log_probs.gather(1, torch.tensor([answer.ids]).T)[:, 0]
        assert_close(torch.tensor(answer.log_probs), expected, rtol=1e-4, atol=1e-4)


def test_half_precision_keeps_what_the_model_keeps_wider(model):
    """Rotary angles stay float32 in a bf16 model; a replica that rounds them writes other answers."""
    half = copy.deepcopy(model)
    for parameter in half.parameters():
        parameter.data = parameter.data.bfloat16()
    engine = engine_of(half)
    assert engine._replica is not None
    for (name, ours), (_, theirs) in zip(engine._replica.named_buffers(), half.named_buffers(), strict=True):
        assert ours.dtype == theirs.dtype, name
        assert_close(ours, theirs)


# ---- one answer does not know of the others -------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 2, 5, 256], ids="batch_size={}".format)
def test_an_answer_depends_on_its_prompt_and_seed_only(model, batch_size):
    requests = requests_of()
    alone = [write(engine_of(model), [request])[0].ids for request in requests]
    assert [answer.ids for answer in write(engine_of(model, batch_size=batch_size), requests)] == alone


def test_order_of_requests_is_the_order_of_answers(model):
    requests = requests_of()
    order = torch.randperm(len(requests), generator=torch.Generator().manual_seed(0)).tolist()
    engine = engine_of(model)
    answers = write(engine, requests)
    shuffled = write(engine, [requests[i] for i in order])
    assert [answer.ids for answer in shuffled] == [answers[i].ids for i in order]


def test_the_independence_checks_look_at_different_answers(model):
    answers = write(engine_of(model), requests_of())
    assert len({tuple(answer.ids) for answer in answers}) == len(answers)
    assert len({len(answer.ids) for answer in answers}) > 4


def test_equal_prompts_share_one_prefill_and_differ_by_seed(model):
    engine = engine_of(model)
    prefilled: list[int] = []
    assert engine._replica is not None
    engine._replica.register_forward_pre_hook(
        lambda _, args, kwargs: (
            prefilled.append(kwargs["input_ids"].numel()) if kwargs["input_ids"].shape[1] > 1 else None
        ),
        with_kwargs=True,
    )
    answers = write(engine, [Request(ids=PROMPTS[2], seed=seed) for seed in range(8)])
    assert prefilled == [len(PROMPTS[2])]
    assert len({tuple(answer.ids) for answer in answers}) == 8


def test_the_same_seed_gives_the_same_answer(model):
    engine = engine_of(model)
    first, again = write(engine, [Request(ids=PROMPTS[1], seed=5)] * 2)
    assert first == again


# ---- where an answer ends -------------------------------------------------------------------------------------------


def test_an_answer_ends_with_its_first_end_of_turn_or_is_truncated(model):
    answers = write(engine_of(model), requests_of(samples=6), new=5)
    for answer in answers:
        assert not ENDS & set(answer.ids[:-1])
        assert (answer.ids[-1] in ENDS) is not answer.truncated
        assert len(answer.ids) == 5 or not answer.truncated
        assert len(answer.log_probs) == len(answer.ids)
    assert {answer.truncated for answer in answers} == {True, False}


def test_an_end_at_the_last_place_is_no_truncation(model):
    engine, request = engine_of(model), [Request(ids=PROMPTS[0], seed=1)]
    (free,) = write(engine, request, new=6, ends=NEVER)
    assert free.truncated
    (ended,) = write(engine, request, new=6, ends=frozenset({free.ids[5]} - set(free.ids[:5])))
    assert ended.ids == free.ids
    assert not ended.truncated


def test_a_model_that_knows_no_end_writes_to_the_limit(model):
    answers = write(engine_of(model), requests_of(), new=6, ends=frozenset())
    assert all(answer.truncated and len(answer.ids) == 6 for answer in answers)


def test_a_longer_limit_only_adds(model):
    engine = engine_of(model)
    short, long = (ids_of(write(engine, requests_of(), new=new)) for new in (5, 24))
    assert [ids[:5] for ids in long] == short


def test_a_prompt_too_long_for_the_context_is_refused(model):
    with pytest.raises(ConfigurationError, match=r"250 tokens and max_new_tokens=7 exceed .* 256"):
        write(engine_of(model), [Request(ids=random_ids(0, 250), seed=0)], new=7)
    assert len(write(engine_of(model), [Request(ids=random_ids(0, 250), seed=0)], new=6)) == 1


def test_a_batch_of_none_is_refused():
    with pytest.raises(ConfigurationError, match="batch_size=0"):
        LocalEngine(batch_size=0)


# ---- weights --------------------------------------------------------------------------------------------------------


def test_the_replica_changes_with_sync_and_not_before():
    student = tiny_model(seed=1)
    engine = engine_of(student)
    before = ids_of(write(engine, requests_of()))
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)), alpha=0.3)
    assert ids_of(write(engine, requests_of())) == before
    engine.sync(student)
    assert ids_of(write(engine, requests_of())) == ids_of(write(engine_of(student), requests_of())) != before


@pytest.mark.parametrize("family", FAMILIES)
def test_a_replica_is_frozen_and_shares_nothing(family):
    student = tiny_model(family).train()
    engine = engine_of(student)
    assert engine._replica is not None
    assert not engine._replica.training
    assert not any(parameter.requires_grad for parameter in engine._replica.parameters())
    assert student.training
    assert all(parameter.requires_grad for parameter in student.parameters())
    mine = {parameter.data_ptr() for parameter in engine._replica.parameters()}
    assert mine.isdisjoint(parameter.data_ptr() for parameter in student.parameters())
    assert_close(engine._replica.state_dict(), student.state_dict())


def test_around_a_model_is_that_model(model):
    around, copied = (write(engine, requests_of()) for engine in (LocalEngine.around(model), engine_of(model)))
    assert ids_of(around) == ids_of(copied)
    assert LocalEngine.around(model)._replica is model
