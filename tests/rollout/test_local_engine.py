import copy
from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
from slow import response_logits
from tiny import FAMILIES, random_ids, tiny_model
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel
from writing import ENDS, NUCLEUS, engine_of, ids_of, write

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.rollout import LocalEngine, Sampling
from lsm_lightning.rollout.base import Request
from lsm_lightning.types import Completion

LENGTHS = [3, 17, 9, 1, 9, 30]
NEVER = frozenset({10**6})
PROMPTS = [random_ids(seed, length) for seed, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model(seed=1, initializer_range=0.1)


def requests_of(samples: int = 2) -> list[Request]:
    return [Request(ids=prompt, seed=100 * number + j) for number, prompt in enumerate(PROMPTS) for j in range(samples)]


# ---- against transformers -------------------------------------------------------------------------------------------


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


@dataclass(frozen=True, kw_only=True)
class Drawn:
    """How often each token was drawn behind the same tokens, and how probable it is there."""

    ours: Tensor
    theirs: Tensor
    exact: Tensor


def nucleus(logits: Tensor, sampling: Sampling) -> Tensor:
    probs, order = (logits.double() / sampling.temperature).softmax(-1).sort(descending=True)
    probs[probs.cumsum(-1) - probs >= sampling.top_p] = 0.0
    return torch.zeros_like(probs).scatter(0, order, probs / probs.sum())


@cache
def answers_of_two(sampling: Sampling, draws: int = 5000) -> tuple[PreTrainedModel, Tensor, Tensor]:
    """A model, and answers `[draws 2]` to one prompt of the engine and of `generate`."""
    model, prompt = tiny_model(seed=3, initializer_range=0.4), PROMPTS[1]
    requests = [Request(ids=prompt, seed=seed) for seed in range(draws)]
    ours = write(engine_of(model), requests, sampling, new=2, ends=frozenset())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        theirs = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=True,
            temperature=sampling.temperature, top_p=sampling.top_p, top_k=0, num_return_sequences=draws,
            max_new_tokens=2, eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
    return model, torch.tensor(ids_of(ours)), theirs[:, len(prompt) :]


def drawn(sampling: Sampling, place: int) -> Drawn:
    """The first token of an answer comes from the prefill, the second one (behind the likeliest first) does not."""
    model, ours, theirs = answers_of_two(sampling)
    with torch.no_grad():
        exact = nucleus(model(torch.tensor([PROMPTS[1]])).logits[0, -1], sampling)
        if place:
            first = int(exact.argmax())
            ours, theirs = ours[ours[:, 0] == first], theirs[theirs[:, 0] == first]
            exact = nucleus(model(torch.tensor([[*PROMPTS[1], first]])).logits[0, -1], sampling)
    counts = [torch.bincount(tokens[:, place], minlength=len(exact)).double() for tokens in (ours, theirs)]
    return Drawn(ours=counts[0], theirs=counts[1], exact=exact)


def agrees(observed: Tensor, expected: Tensor, noise: float = 1.0) -> bool:
    """Chi-square of counts, tokens that are expected less than five times taken together; one in a million is off.

    Args:
        observed: Counts.
        expected: Counts.
        noise: 2 where the expected ones are drawn as well.
    """
    rare = expected < 5
    pairs = [(observed[~rare], expected[~rare]), (observed[rare].sum()[None], expected[rare].sum()[None])]
    counted, awaited = (torch.cat(column) for column in zip(*pairs, strict=True))
    awaited = awaited.clamp(min=1e-9)
    assert len(awaited) > 5
    chi_square = float(((counted - awaited) ** 2 / (noise * awaited)).sum())
    return chi_square < len(awaited) + 5 * (2 * len(awaited)) ** 0.5


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("sampling", [NUCLEUS, Sampling(temperature=0.7, top_p=1.0)], ids=["nucleus", "all"])
def test_next_tokens_are_distributed_as_those_of_generate(sampling, place):
    found = drawn(sampling, place)
    assert agrees(found.ours, found.exact * found.ours.sum())
    assert agrees(found.ours, found.theirs * found.ours.sum() / found.theirs.sum(), noise=2)


def test_the_check_of_distributions_can_fail():
    found, other = drawn(NUCLEUS, 0), drawn(Sampling(temperature=0.7, top_p=1.0), 0)
    assert not agrees(found.ours, other.exact * found.ours.sum())
    assert not agrees(found.ours, other.theirs * found.ours.sum() / other.theirs.sum(), noise=2)


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


def forwards(engine: LocalEngine) -> list[tuple[int, int]]:
    """Rows and columns of the ids that the model is given from now on."""
    shapes: list[tuple[int, int]] = []
    assert engine._replica is not None
    engine._replica.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    return shapes


@pytest.mark.parametrize("batch_size", [3, 256], ids="batch_size={}".format)
def test_equal_prompts_share_one_prefill_and_differ_by_seed(model, batch_size):
    """Also where rows are too few for the whole group at once."""
    engine = engine_of(model, batch_size=batch_size)
    shapes = forwards(engine)
    answers = write(engine, [Request(ids=PROMPTS[2], seed=seed) for seed in range(8)])
    assert [shape for shape in shapes if shape[1] > 1] == [(1, len(PROMPTS[2]))]
    assert len({tuple(answer.ids) for answer in answers}) == 8


@pytest.mark.parametrize("batch_size", [8, 256], ids="batch_size={}".format)
def test_no_row_is_computed_for_an_answer_that_is_done_and_few_stay_free(model, batch_size):
    engine = engine_of(model, batch_size=batch_size)
    requests = [request for request in requests_of(samples=8) if len(request.ids) > 1]
    shapes = forwards(engine)
    answers = write(engine, requests)
    decoded = [rows for rows, width in shapes if width == 1]
    # The first token of an answer comes from the prefill of its prompt.
    assert sum(decoded) == sum(len(answer.ids) - 1 for answer in answers)
    full = min(batch_size, len(requests))
    assert max(decoded) <= full
    last_prefill = max(place for place, (_, width) in enumerate(shapes) if width > 1)
    used = [rows for rows, width in shapes[:last_prefill] if width == 1]  # while others wait
    assert sum(used) > 0.75 * full * len(used) or not used


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


def test_an_answer_may_have_a_limit_of_its_own(model):
    requests = requests_of()
    limits = [1 + number % 7 for number in range(len(requests))]
    engine = engine_of(model, batch_size=5)
    free = write(engine, requests)
    limited = write(engine, [replace(request, limit=limit) for request, limit in zip(requests, limits, strict=True)])
    for whole, answer, limit in zip(free, limited, limits, strict=True):
        assert answer.ids == whole.ids[:limit]
        assert answer.truncated == (len(whole.ids) > limit or whole.truncated)
    (longer,) = write(engine, [replace(requests[0], limit=100)], new=4, ends=NEVER)
    assert len(longer.ids) == 4


def test_room_is_what_may_be_written(model):
    engine = engine_of(model)
    prompt = random_ids(0, 250)
    assert engine.room(250) == 6
    (answer,) = write(engine, [Request(ids=prompt, seed=0, limit=engine.room(250))], new=24, ends=NEVER)
    assert len(answer.ids) == 6
    assert engine.room(300) == -44


def test_a_limit_of_nothing_is_an_empty_answer(model):
    empty, other = write(engine_of(model), [Request(ids=PROMPTS[0], seed=0, limit=0), Request(ids=PROMPTS[0], seed=0)])
    assert empty == Completion(ids=[], log_probs=[], truncated=True)
    assert other.ids


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
