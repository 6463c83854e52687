"""None waits for the answer of another, and what is said is what would be said alone."""

import threading

import pytest
import torch
from fake_vllm import COMPLETIONS, serving
from slow import response_logits
from talks import Talks
from tiny import FAMILIES, random_ids, save_tiny, tiny_model
from torch.testing import assert_close
from transformers import PreTrainedModel
from writing import ENDS, NUCLEUS, engine_of

from lsm_lightning.pretrained import load_model
from lsm_lightning.rollout import VLLMEngine
from lsm_lightning.rollout.base import Engine
from lsm_lightning.serving import Servers
from lsm_lightning.serving import client as client_module

PROMPTS = [random_ids(seed, length) for seed, length in enumerate([4, 30, 4, 9, 17, 4])]
TURNS = [3, 1, 5, 2, 4, 0]
LIMITS = [9, 40, 3, 20, 1, 5]
NEVER: frozenset[int] = frozenset()


def talks() -> Talks:
    return Talks(PROMPTS, TURNS, LIMITS)


def converse(engine: Engine, made: Talks, ends: frozenset[int] = ENDS) -> Talks:
    engine.converse(made, NUCLEUS, max_new_tokens=60, turn_end=ends)
    return made


def one_by_one(engine: Engine) -> Talks:
    """The slow way: one answer after the other."""
    made = talks()
    asked = made.requests()
    while asked:
        number, request = asked.popitem()
        (answer,) = engine.generate([request], NUCLEUS, max_new_tokens=60, turn_end=ENDS)
        made.take({number: answer})
        asked |= made.requests()
    return made


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model(seed=1, initializer_range=0.1)


@pytest.mark.parametrize("batch_size", [1, 2, 4, 256], ids="batch_size={}".format)
def test_every_turn_is_what_it_would_be_alone(model, batch_size):
    alone = one_by_one(engine_of(model))
    together = converse(engine_of(model, batch_size=batch_size), talks())
    assert together.texts == alone.texts
    assert [len(of_one) for of_one in together.texts] == TURNS


@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_hold_when_longer_prompts_follow(family):
    """They are longer than all that the others have seen, and those go on beside them."""
    model = tiny_model(family, seed=1)
    made = converse(engine_of(model, batch_size=3), talks())
    longest = 0
    for of_one in made.said:
        for prompt, answer in of_one:
            with torch.no_grad():
                log_probs = response_logits(model, prompt, answer.ids).log_softmax(-1)
            expected = log_probs.gather(1, torch.tensor([answer.ids]).T)[:, 0]
            assert_close(torch.tensor(answer.log_probs), expected, rtol=1e-4, atol=1e-4)
            longest = max(longest, len(prompt))
    assert longest > max(map(len, PROMPTS))


def test_short_answers_go_on_beside_a_long_one(model):
    engine = engine_of(model)
    steps: list[int] = []

    def count(_module: object, arguments: object, options: dict[str, torch.Tensor]) -> None:
        steps.extend([len(options["input_ids"])] * (options["input_ids"].shape[1] == 1))

    assert engine._replica is not None
    engine._replica.register_forward_pre_hook(count, with_kwargs=True)
    made = converse(engine, Talks([random_ids(seed, 5) for seed in range(3)], [1, 6, 6], [50, 4, 4]), NEVER)
    assert [[len(answer) for answer in of_one] for of_one in made.texts] == [[50], [4] * 6, [4] * 6]
    assert made.order[-1] == 0  # the long answer is the last to end
    assert len(steps) == 49  # in rounds it would be 49 + 5 * 3


def test_a_conversation_without_an_answer_is_over(model):
    made = converse(engine_of(model), Talks(PROMPTS, [0] * 6, LIMITS))
    assert made.texts == [[]] * 6


def test_an_answer_of_no_length_is_given_too(model):
    made = converse(engine_of(model), Talks(PROMPTS[:2], [2, 1], [0, 3]), NEVER)
    assert [[len(answer) for answer in of_one] for of_one in made.texts] == [[0, 0], [3]]


def test_no_answer_of_lost_weights_is_followed_up(student_tokenizer, tmp_path, monkeypatch):
    """A server is started anew between two turns, with its first weights, and answers with them at once."""
    monkeypatch.setattr(client_module, "FIRST_PAUSE", 0.01)
    folder = save_tiny(tmp_path / "student", student_tokenizer, seed=1)
    model = tiny_model(seed=2, initializer_range=0.1)
    with serving(folder) as fake:
        engine = VLLMEngine(Servers(urls=[fake.url]))
        engine.sync(model)
        undisturbed = converse(engine, talks())
        right, asked = fake.answer, {"answers": 0}

        def answer(path: str, body: dict) -> object:
            asked["answers"] += path == COMPLETIONS
            if path == COMPLETIONS and asked["answers"] in (4, 9):
                fake.model, fake.version = load_model(str(folder), "float32"), "default"
                fake.cached.clear()
            return right(path, body)

        fake.answer = answer
        assert converse(engine, talks()).texts == undisturbed.texts
        assert asked["answers"] > 9
        engine.sync(model)
        asked["answers"] = 0
        monkeypatch.setattr(engine.fleet._client, "_proof", None)
        assert converse(engine, talks()).texts != undisturbed.texts  # the control
        engine.close()


def test_served_conversations_go_on_while_another_waits(student_tokenizer, tmp_path):
    folder = save_tiny(tmp_path / "student", student_tokenizer, seed=1)
    released = threading.Event()
    with serving(folder) as fake:
        engine = VLLMEngine(Servers(urls=[fake.url], timeout=60.0, attempts=1))
        model = load_model(str(folder), "float32")
        engine.sync(model)
        right, asked = fake.answer, {"quick": 0}

        def answer(path: str, body: dict) -> object:
            if path == COMPLETIONS and body["prompt"][:30] == list(PROMPTS[1]):
                assert released.wait(50), "the others waited for this answer"
            elif path == COMPLETIONS and body["prompt"][:4] == list(PROMPTS[0]):
                asked["quick"] += 1
                if asked["quick"] == 4:
                    released.set()
            return right(path, body)

        fake.answer = answer
        made = converse(engine, Talks(PROMPTS[:2], [4, 1], [5, 5]))
        assert [len(of_one) for of_one in made.texts] == [4, 1]
        assert made.order.index(1) >= 3
        fake.answer = right
        local = converse(engine_of(model), Talks(PROMPTS[:2], [4, 1], [5, 5]))
        assert made.texts == local.texts
        engine.close()
