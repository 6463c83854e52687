from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import FAMILIES, random_ids, tiny_model
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, BloomConfig, MambaConfig, OPTConfig, PreTrainedModel

from lsm_lightning.batching import TokenBatch, check_packing, group_by_length, hidden_states, spans
from lsm_lightning.errors import ConfigurationError

CPU = torch.device("cpu")
token_lists = st.lists(st.integers(1, 99), max_size=6)
rows_of_tokens = st.lists(st.tuples(token_lists.filter(len), token_lists), min_size=1, max_size=6)


LAYOUTS = {"padded": TokenBatch.pad, "packed": TokenBatch.pack}


@pytest.mark.parametrize("lay", LAYOUTS.values(), ids=LAYOUTS)
@given(rows=rows_of_tokens)
def test_every_response_token_is_predicted_from_the_place_before_it(lay, rows):
    prompts, responses = zip(*rows, strict=True)
    batch = lay(prompts, responses, CPU)
    assert batch.targets.tolist() == [token for response in responses for token in response]
    assert batch.sequence.tolist() == [number for number, response in enumerate(responses) for _ in response]
    at = 0
    for prompt, response in rows:
        for place in range(len(response)):
            row, column = batch.row[at].item(), batch.column[at].item()
            seen = batch.ids[row, column + 1 - len(prompt) - place : column + 1].tolist()
            assert seen == [*prompt, *response[:place]]
            if batch.position_ids is not None:
                assert batch.position_ids[row, column] == len(prompt) + place - 1
            at += 1


@given(rows_of_tokens)
def test_padding_stands_on_the_right_and_packing_needs_none(rows):
    prompts, responses = zip(*rows, strict=True)
    flat = [token for row in rows for part in row for token in part]
    padded, packed = (lay(prompts, responses, CPU) for lay in LAYOUTS.values())
    for row, ids in zip(rows, padded.ids, strict=True):
        length = sum(map(len, row))
        assert ids[:length].tolist() == [*row[0], *row[1]]
        assert (ids[length:] == 0).all()
    assert packed.ids.tolist() == [flat]
    assert packed.position_ids.tolist() == [[place for row in rows for place in range(sum(map(len, row)))]]


PROMPTS, RESPONSES = [random_ids(1, 3), random_ids(2, 20), random_ids(5, 1)], [random_ids(3, 4), random_ids(4, 9), []]


def apart(model):
    """Hidden states of one sequence at a time."""
    return torch.cat(
        [hidden_states(model, TokenBatch.pad([p], [r], CPU)) for p, r in zip(PROMPTS, RESPONSES, strict=True)]
    )


@pytest.mark.parametrize("lay", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_do_not_depend_on_the_neighbours(family, lay):
    model = tiny_model(family).double()
    with torch.no_grad():
        # Some families normalise in float32 whatever they are cast to.
        assert_close(hidden_states(model, lay(PROMPTS, RESPONSES, CPU)), apart(model), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_without_positions_packed_sequences_would_read_each_other(family):
    model = tiny_model(family).double()
    packed = replace(TokenBatch.pack(PROMPTS, RESPONSES, CPU), position_ids=None)
    with torch.no_grad():
        assert (hidden_states(model, packed) - apart(model)).abs().max() > 0.01


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_read_positions_may_be_packed(family, dtype):
    check_packing(tiny_model(family).to(dtype), "mine")


MIXING = {
    "learned positions": OPTConfig(hidden_size=32, word_embed_proj_dim=32, ffn_dim=48, init_std=0.2),
    "ALiBi": BloomConfig(hidden_size=32, n_head=2, initializer_range=0.2),
    "recurrent": MambaConfig(hidden_size=32, state_size=4, initializer_range=0.2),
}


def mixing_model(kind: str) -> PreTrainedModel:
    """Of a family that packed sequences read each other in."""
    config = MIXING[kind]
    config.update({"vocab_size": 340, "num_hidden_layers": 2, "num_attention_heads": 2, "eos_token_id": None})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(config).eval()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", MIXING)
def test_families_that_do_not_are_refused(kind, dtype):
    model = mixing_model(kind).to(dtype)
    told = rf"model\.packing: {type(model).__name__} \('mine'\).*model\.packing to false"
    with pytest.raises(ConfigurationError, match=told) as caught:
        check_packing(model, "mine")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
@given(lengths=st.lists(st.integers(1, 50), max_size=20), max_tokens=st.integers(1, 120))
def test_groups_hold_everything_once_and_stay_small(packed, lengths, max_tokens):
    groups = group_by_length(lengths, max_tokens, packed=packed)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        sizes = [lengths[i] for i in group]
        assert len(group) == 1 or (sum(sizes) if packed else len(sizes) * max(sizes)) <= max_tokens
    flat = [lengths[i] for group in groups for i in group]
    assert flat == sorted(flat)


@given(st.lists(st.integers(0, 9), max_size=9))
def test_spans_lie_end_to_end(lengths):
    laid = [place for span in spans(lengths) for place in span]
    assert laid == list(range(sum(lengths)))
    assert [len(span) for span in spans(lengths)] == lengths
