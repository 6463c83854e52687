import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import FAMILIES, random_ids, tiny_model
from torch.testing import assert_close

from lsm_lightning.batching import TokenBatch, group_by_length, hidden_states, spans

CPU = torch.device("cpu")
token_lists = st.lists(st.integers(1, 99), max_size=6)
rows_of_tokens = st.lists(st.tuples(token_lists.filter(len), token_lists), min_size=1, max_size=6)


@given(rows_of_tokens)
def test_every_response_token_is_predicted_from_the_place_before_it(rows):
    prompts, responses = zip(*rows, strict=True)
    batch = TokenBatch.pad(prompts, responses, CPU)
    for row, (prompt, response) in enumerate(rows):
        assert batch.ids[row, : len(prompt) + len(response)].tolist() == [*prompt, *response]
        assert (batch.ids[row, len(prompt) + len(response) :] == 0).all()
        assert batch.targets[batch.row == row].tolist() == response
        assert batch.column[batch.row == row].tolist() == list(range(len(prompt) - 1, len(prompt) + len(response) - 1))
    if len(batch.targets):
        assert (batch.row.diff() >= 0).all()
        assert batch.ids[batch.row, batch.column + 1].tolist() == batch.targets.tolist()


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_do_not_depend_on_padding(family):
    model = tiny_model(family).double()
    prompts, responses = [random_ids(1, 3), random_ids(2, 20)], [random_ids(3, 4), random_ids(4, 9)]
    with torch.no_grad():
        together = hidden_states(model, TokenBatch.pad(prompts, responses, CPU))
        alone = [hidden_states(model, TokenBatch.pad([p], [r], CPU)) for p, r in zip(prompts, responses, strict=True)]
    assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-6)


@given(st.lists(st.integers(1, 50), max_size=20), st.integers(1, 120))
def test_groups_hold_everything_once_and_stay_small(lengths, max_tokens):
    groups = group_by_length(lengths, max_tokens)
    assert sorted(i for group in groups for i in group) == list(range(len(lengths)))
    for group in groups:
        assert len(group) * max(lengths[i] for i in group) <= max_tokens or len(group) == 1
    flat = [lengths[i] for group in groups for i in group]
    assert flat == sorted(flat)


@given(st.lists(st.integers(0, 9), max_size=9))
def test_spans_lie_end_to_end(lengths):
    laid = [place for span in spans(lengths) for place in span]
    assert laid == list(range(sum(lengths)))
    assert [len(span) for span in spans(lengths)] == lengths
