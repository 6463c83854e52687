import pytest
import torch
from tiny import FAMILIES, tiny_model
from torch import Tensor
from torch.testing import assert_close

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.objectives import head as head_module
from lsm_lightning.objectives.head import OutputHead, check_head, gather_logits


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(n: int = 9, d: int = 6, v: int = 20, k: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias and ids; a position may ask for one id twice."""
    ids = torch.randint(v, (n, k), generator=torch.Generator().manual_seed(4))
    return drawn(n, d, seed=1).requires_grad_(), drawn(v, d, seed=2).requires_grad_(), drawn(v).requires_grad_(), ids


def gradients(value: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((value * drawn(*value.shape, seed=9)).sum(), leaves)


def test_gathered_logits_and_gradients_are_those_of_the_full_ones():
    hidden, weight, bias, ids = inputs()
    gathered = gather_logits(hidden, weight, ids, bias)
    full = (hidden @ weight.T + bias).gather(1, ids)
    assert_close(gathered, full)
    for ours, theirs in zip(
        gradients(gathered, hidden, weight, bias), gradients(full, hidden, weight, bias), strict=True
    ):
        assert_close(ours, theirs)


@pytest.mark.parametrize("elements", [1, 7, 50, 10**6], ids="elements={}".format)
def test_chunking_changes_neither_logits_nor_gradients(monkeypatch, elements):
    hidden, weight, bias, ids = inputs()
    whole = gather_logits(hidden, weight, ids, bias)
    monkeypatch.setattr(head_module, "GATHER_ELEMENTS", elements)
    chunked = gather_logits(hidden, weight, ids, bias)
    assert_close(chunked, whole, rtol=0, atol=1e-13)
    for ours, theirs in zip(
        gradients(chunked, hidden, weight, bias), gradients(whole, hidden, weight, bias), strict=True
    ):
        assert_close(ours, theirs, rtol=0, atol=1e-12)


def test_no_position_has_no_logits():
    _, weight, bias, _ = inputs()
    assert gather_logits(drawn(0, 6), weight, torch.zeros(0, 4, dtype=torch.long), bias).shape == (0, 4)


def heads() -> list[OutputHead]:
    _, weight, bias, _ = inputs()
    return [
        OutputHead(weight=weight),
        OutputHead(weight=weight, bias=bias),
        OutputHead(weight=weight, scale=0.25),
        OutputHead(weight=weight, bias=bias, scale=3.0, soft_cap=2.0),
    ]


@pytest.mark.parametrize("head", heads(), ids=["plain", "bias", "scale", "everything"])
@pytest.mark.parametrize("elements", [1, 45, 10**6], ids="elements={}".format)
def test_log_normaliser_and_its_gradient_are_those_of_logsumexp(monkeypatch, head, elements):
    monkeypatch.setattr(head_module, "NORMALISER_ELEMENTS", elements)
    hidden = inputs()[0]
    full = head.all_logits(hidden)
    leaves = (hidden, head.weight)
    assert_close(head.log_normaliser(hidden), full.exp().sum(-1).log())
    for ours, theirs in zip(
        gradients(head.log_normaliser(hidden), *leaves), gradients(full.exp().sum(-1).log(), *leaves), strict=True
    ):
        assert_close(ours, theirs)


@pytest.mark.parametrize("head", heads(), ids=["plain", "bias", "scale", "everything"])
def test_few_logits_are_some_of_all_logits(head):
    hidden, _, _, ids = inputs()
    assert_close(head.logits(hidden, ids), head.all_logits(hidden).gather(1, ids))


def test_a_soft_cap_keeps_logits_within_it():
    hidden, weight, _, ids = inputs()
    capped = OutputHead(weight=weight, soft_cap=2.0).logits(hidden, ids)
    assert capped.abs().max() < 2
    assert gather_logits(hidden, weight, ids).abs().max() > 2


def test_half_precision_weights_give_float32_logits():
    hidden, weight, _, ids = inputs()
    head = OutputHead(weight=weight.bfloat16())
    assert head.logits(hidden.bfloat16(), ids).dtype == torch.float32
    assert head.log_normaliser(hidden.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_of_a_family_gives_the_models_own_logits(family):
    model = tiny_model(family).double()
    ids = torch.randint(340, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state.flatten(0, 1)
        assert_close(OutputHead.of(model).all_logits(hidden), model(input_ids=ids).logits.flatten(0, 1))


@pytest.mark.parametrize("family", ["gemma2-soft-cap", "granite-scaled", "cohere-scaled", "phi-bias"])
def test_the_head_check_can_fail(family):
    """A head that is only a matrix is wrong for these families."""
    model = tiny_model(family).double()
    ids = torch.randint(340, (2, 7), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        hidden = model.base_model(input_ids=ids).last_hidden_state.flatten(0, 1)
        bare = OutputHead(weight=OutputHead.of(model).weight).all_logits(hidden)
        assert (bare - model(input_ids=ids).logits.flatten(0, 1)).abs().max() > 0.1


def test_tied_weights_get_the_gradient_of_both_their_uses():
    model = tiny_model("llama-tied").double()
    ids = torch.randint(340, (1, 7), generator=torch.Generator().manual_seed(0))
    support = torch.randint(340, (7, 3), generator=torch.Generator().manual_seed(1))
    hidden = model.base_model(input_ids=ids).last_hidden_state[0]
    ours = gradients(OutputHead.of(model).logits(hidden, support), model.base_model.embed_tokens.weight)
    full = model(input_ids=ids).logits[0].gather(1, support)
    assert_close(ours, gradients(full, model.base_model.embed_tokens.weight))


def test_a_head_that_is_no_matrix_is_refused():
    model = tiny_model()
    model.set_output_embeddings(torch.nn.Sequential(torch.nn.Linear(32, 340), torch.nn.ReLU()))
    with pytest.raises(ConfigurationError, match="LlamaForCausalLM is Sequential, not a linear layer"):
        OutputHead.of(model)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_known_family_passes_the_check_at_load(family):
    check_head(tiny_model(family))


def test_a_model_that_does_more_to_its_logits_is_refused(monkeypatch):
    model = tiny_model("llama-tied")
    model.config.logit_scale = 2.0  # which this family does not apply
    with pytest.raises(ConfigurationError, match="LlamaForCausalLM changes its logits"):
        check_head(model)
