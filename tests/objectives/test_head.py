import inspect

import pytest
import torch
from slow import tensor_sizes
from tiny import FAMILIES, tiny_model
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    FalconH1Config,
    FalconH1ForCausalLM,
    PreTrainedModel,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    xLSTMConfig,
    xLSTMForCausalLM,
)

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.objectives import head as head_module
from lsm_lightning.objectives.head import Adapter, OutputHead, check_head, gather_logits


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(n: int = 9, d: int = 6, v: int = 20, k: int = 4) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, bias and ids; a position may ask for one id twice."""
    ids = torch.randint(v, (n, k), generator=torch.Generator().manual_seed(4))
    return drawn(n, d, seed=1).requires_grad_(), drawn(v, d, seed=2).requires_grad_(), drawn(v).requires_grad_(), ids


def gradients(value: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((value * drawn(*value.shape, seed=9).to(value.dtype)).sum(), leaves)


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


@pytest.mark.parametrize("n", [0, 1, 9])
@pytest.mark.parametrize("k", [0, 1, 40])
def test_no_position_and_no_token_have_no_gradient(n, k):
    hidden, weight, bias, ids = inputs(n=n, k=k)
    logits = gather_logits(hidden, weight, ids, bias)
    assert logits.shape == (n, k)
    ours = gradients(logits, hidden, weight)
    for mine, true in zip(ours, gradients((hidden @ weight.T + bias).gather(1, ids), hidden, weight), strict=True):
        assert_close(mine, true)
    assert (ours[1].abs().sum() > 0) == (n * k > 0)


def test_a_token_of_every_support_collects_the_gradients_of_all_positions():
    hidden, weight, _, ids = inputs()
    logits = gather_logits(hidden, weight, torch.full_like(ids, 7))
    (of_weight,) = torch.autograd.grad(logits.sum(), weight)
    assert_close(of_weight[7], ids.shape[1] * hidden.detach().sum(0))
    assert of_weight.count_nonzero() == weight.shape[1]


def heads() -> list[OutputHead]:
    _, weight, bias, _ = inputs()
    return [
        OutputHead(weight=weight),
        OutputHead(weight=weight, bias=bias),
        OutputHead(weight=weight, scale=0.25),
        OutputHead(weight=weight, bias=bias, adapters=(lora(),), scale=3.0, soft_cap=2.0),
    ]


def lora() -> Adapter:
    return Adapter(down=drawn(2, 6, seed=5).requires_grad_(), up=drawn(20, 2, seed=6).requires_grad_(), scale=0.5)


def leaves_of(head: OutputHead) -> list[Tensor]:
    adapted = [matrix for adapter in head.adapters for matrix in (adapter.down, adapter.up)]
    return [head.weight, *adapted] if head.bias is None else [head.weight, head.bias, *adapted]


@pytest.mark.parametrize("head", heads(), ids=["plain", "bias", "scale", "everything"])
@pytest.mark.parametrize(("elements", "positions"), [(1, 4), (45, 100), (45, 4), (64, 1), (10**6, 4)])
def test_log_normaliser_and_its_gradient_are_those_of_logsumexp(monkeypatch, head, elements, positions):
    monkeypatch.setattr(head_module, "NORMALISER_ELEMENTS", elements)
    monkeypatch.setattr(head_module, "NORMALISER_POSITIONS", positions)
    hidden = inputs()[0]
    leaves = (hidden, *leaves_of(head))
    full = head.all_logits(hidden).exp().sum(-1).log()
    tiled = head.log_normaliser(hidden)
    assert_close(tiled, full)
    for ours, theirs in zip(gradients(tiled, *leaves), gradients(full, *leaves), strict=True):
        assert_close(ours, theirs)
    with torch.no_grad():
        assert_close(head.log_normaliser(hidden), full.detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("head", heads(), ids=["plain", "bias", "scale", "everything"])
@pytest.mark.parametrize(("elements", "positions"), [(1, 4), (45, 100), (45, 4), (64, 1), (10**6, 4)])
def test_the_entropy_is_that_of_the_whole_distribution(monkeypatch, head, elements, positions):
    monkeypatch.setattr(head_module, "NORMALISER_ELEMENTS", elements)
    monkeypatch.setattr(head_module, "NORMALISER_POSITIONS", positions)
    assert head.entropy_and_normaliser(inputs(n=0)[0])[0].shape == (0,)
    for n in (1, 9):
        hidden = inputs(n=n)[0]
        entropy, normaliser = head.entropy_and_normaliser(hidden)
        assert not entropy.requires_grad
        assert_close(normaliser, head.all_logits(hidden).logsumexp(-1).detach())
        assert_close(entropy, torch.distributions.Categorical(logits=head.all_logits(hidden)).entropy().detach())


@pytest.mark.parametrize("elements", [1, 10**6])
def test_the_entropy_of_a_choice_and_of_none(monkeypatch, elements):
    monkeypatch.setattr(head_module, "NORMALISER_ELEMENTS", elements)  # 1: most tiles can write nothing at all
    weight, bias = torch.zeros(20, 6, dtype=torch.float64), torch.full((20,), -torch.inf, dtype=torch.float64)
    bias[[3, 7]] = 5.0  # and nothing but these two can be written
    hidden = drawn(2, 6)
    assert_close(
        OutputHead(weight=weight, bias=bias).entropy_and_normaliser(hidden)[0].exp(), torch.full((2,), 2.0).double()
    )
    bias[3] = -torch.inf
    assert_close(OutputHead(weight=weight, bias=bias).entropy_and_normaliser(hidden)[0], torch.zeros(2).double())


def test_no_position_has_no_normaliser():
    hidden, weight, _, _ = inputs(n=0)
    normaliser = OutputHead(weight=weight).log_normaliser(hidden)
    assert normaliser.shape == (0,)
    assert_close(torch.autograd.grad(normaliser.sum(), weight)[0], torch.zeros_like(weight))


@pytest.mark.parametrize("head", heads(), ids=["plain", "bias", "scale", "everything"])
def test_few_logits_are_some_of_all_logits(head):
    hidden, _, _, ids = inputs()
    assert_close(head.logits(hidden, ids), head.all_logits(hidden).gather(1, ids))


def test_a_soft_cap_keeps_logits_within_it():
    hidden, weight, _, ids = inputs()
    capped = OutputHead(weight=weight, soft_cap=2.0).logits(hidden, ids)
    assert capped.abs().max() < 2
    assert gather_logits(hidden, weight, ids).abs().max() > 2


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_known_family_passes_the_check_at_load(family, dtype):
    check_head(tiny_model(family).to(dtype), family)


RECURRENT = {
    "logits_soft_cap": (
        RecurrentGemmaForCausalLM, RecurrentGemmaConfig,
        {"num_hidden_layers": 1, "lru_width": 32, "attention_window_size": 16, "logits_soft_cap": 0.5},
    ),
    "output_logit_soft_cap": (
        xLSTMForCausalLM, xLSTMConfig, {"num_hidden_layers": 1, "num_heads": 2, "output_logit_soft_cap": 0.5}
    ),
    "lm_head_multiplier": (
        FalconH1ForCausalLM, FalconH1Config,
        {"num_hidden_layers": 1, "num_key_value_heads": 1, "mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8,
         "mamba_d_state": 8, "mamba_chunk_size": 8, "lm_head_multiplier": 0.3},
    ),
}  # fmt: skip
"""Families that name what they do to their logits otherwise than those of `FAMILIES`."""


def recurrent(setting: str) -> PreTrainedModel:
    kind, config, more = RECURRENT[setting]
    common = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ends = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
        return kind(config(**common, **ends, **more)).eval()


@pytest.mark.parametrize("setting", RECURRENT)
def test_other_names_for_a_scale_or_a_cap_are_known(setting):
    model = recurrent(setting)
    check_head(model, setting)
    head = OutputHead.of(model)
    assert (head.scale, head.soft_cap) == ((0.3, None) if setting == "lm_head_multiplier" else (1.0, 0.5))


@pytest.mark.parametrize("setting", RECURRENT)
def test_a_head_without_them_would_be_refused(monkeypatch, setting):
    model = recurrent(setting)
    for names in ("SCALES", "SOFT_CAPS"):
        monkeypatch.setattr(head_module, names, ())
    with pytest.raises(ConfigurationError, match="changes its logits"):
        check_head(model, setting)


def test_a_scale_that_is_no_number_is_refused_by_name_and_value():
    model = tiny_model("llama-tied")
    model.config.logit_scale = "inv_sqrt_d_model"
    with pytest.raises(ConfigurationError, match="LlamaForCausalLM has logit_scale='inv_sqrt_d_model'"):
        OutputHead.of(model)


@pytest.mark.parametrize(
    ("dtype", "scale"), [(torch.float32, 2.0), (torch.float32, 1.001), (torch.bfloat16, 2.0)], ids=str
)
def test_a_model_that_does_more_to_its_logits_is_refused(dtype, scale):
    model = tiny_model("llama-tied").to(dtype)
    model.config.logit_scale = scale  # which this family does not apply
    with pytest.raises(ConfigurationError, match=r"LlamaForCausalLM \('mine'\) changes its logits"):
        check_head(model, "mine")


def test_a_model_that_changes_few_tokens_logits_is_refused():
    """Which one position alone would not show."""
    model = tiny_model("llama-tied")
    right = model.forward

    def bent(**inputs: Tensor) -> object:
        output = right(**inputs)
        output.logits[:, 1:] += 1.0
        return output

    model.forward = bent
    with pytest.raises(ConfigurationError, match="changes its logits"):
        check_head(model, "mine")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_model_whose_logits_are_not_finite_is_refused(value):
    model = tiny_model("qwen2-untied")
    with torch.no_grad():
        model.lm_head.weight[100, 3] = value
    with pytest.raises(ConfigurationError, match=r"'mine' gives logits that are not finite.*dtype"):
        check_head(model, "mine")


# ---- what does not fit together -------------------------------------------------------------------------------------


def test_hidden_states_of_another_model_are_refused_with_both_widths():
    hidden, weight, _, ids = inputs()
    unchecked = inspect.unwrap(gather_logits)  # as it runs where shapes are not checked
    with pytest.raises(ValueError, match="5 wide and the output matrix 6"):
        unchecked(hidden[:, :5], weight, ids)


def test_ids_of_other_positions_and_a_bias_of_another_vocabulary_are_refused_with_both_numbers():
    hidden, weight, bias, ids = inputs()
    unchecked = inspect.unwrap(gather_logits)
    for rows in (ids[:5], ids[:1]):  # a single row would be broadcast
        with pytest.raises(ValueError, match=rf"{len(rows)} positions and hidden states of 9"):
            unchecked(hidden, weight, rows)
    for wrong in (bias[:19], torch.cat((bias, bias))):
        with pytest.raises(ValueError, match=rf"{len(wrong)} numbers and the output matrix 20 rows"):
            unchecked(hidden, weight, ids, wrong)


@pytest.mark.parametrize("wrong", [-1, 20])
def test_ids_without_a_row_are_refused_by_number(wrong):
    hidden, weight, _, ids = inputs()
    ids[3, 2] = wrong
    with pytest.raises(ValueError, match=rf"{wrong}.* rows 0 to 19"):
        gather_logits(hidden, weight, ids)


# ---- memory ---------------------------------------------------------------------------------------------------------


def largest(head: OutputHead, hidden: Tensor, ids: Tensor, *, normalised: bool) -> int:
    """Elements of the largest tensor of a forward and backward pass."""
    with tensor_sizes() as sizes:
        logits = head.logits(hidden, ids)
        if normalised:
            logits = logits - head.log_normaliser(hidden).unsqueeze(-1)
        logits.sum().backward()
    return sizes.largest


@pytest.mark.parametrize("normalised", [False, True], ids=["gathered", "with the normaliser"])
def test_no_more_than_a_chunk_exists_at_once(monkeypatch, normalised):
    n, d, v, k = 400, 8, 500, 4
    for name in ("GATHER_ELEMENTS", "NORMALISER_ELEMENTS"):
        monkeypatch.setattr(head_module, name, 2 * v)
    monkeypatch.setattr(head_module, "NORMALISER_POSITIONS", 40)
    hidden, weight = drawn(n, d, seed=1).requires_grad_(), drawn(v, d, seed=2).requires_grad_()
    ids = torch.randint(v, (n, k), generator=torch.Generator().manual_seed(4))
    head = OutputHead(weight=weight, bias=drawn(v).requires_grad_(), soft_cap=30.0)
    assert largest(head, hidden, ids, normalised=normalised) <= v * d  # the weight and its gradient
    monkeypatch.setattr(head_module, "NORMALISER_ELEMENTS", n * v)
    if normalised:
        assert largest(head, hidden, ids, normalised=True) == 40 * v  # the watch can see it


def test_the_entropy_makes_no_more_logits_at_once_than_the_normaliser(monkeypatch):
    n, d, v = 400, 4, 500
    hidden, head = drawn(n, d, seed=1), OutputHead(weight=drawn(v, d, seed=2))

    def largest_with(positions: int, elements: int) -> int:
        monkeypatch.setattr(head_module, "NORMALISER_POSITIONS", positions)
        monkeypatch.setattr(head_module, "NORMALISER_ELEMENTS", elements)
        with tensor_sizes() as sizes:
            head.entropy_and_normaliser(hidden)
        return sizes.largest

    assert largest_with(40, 2 * v) <= v * d  # the weight
    assert largest_with(40, n * v) == 40 * v  # the watch can see it


# ---- half precision -------------------------------------------------------------------------------------------------


def relative(ours: Tensor, exact: Tensor) -> float:
    return ((ours.double() - exact).norm() / exact.norm()).item()


def in_precision(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits, normaliser, and gradients of hidden states and weight, from one set of numbers that bf16 can hold."""
    d, v = 512, 300
    hidden, weight = (drawn(*shape, seed=shape[0]).bfloat16().to(dtype).requires_grad_() for shape in ((60, d), (v, d)))
    ids = torch.randint(v, (60, 32), generator=torch.Generator().manual_seed(4))
    head = OutputHead(weight=weight, scale=d**-0.5)
    logits = head.logits(hidden, ids)
    factor = drawn(60, 32, seed=9).to(logits.dtype)
    return logits, head.log_normaliser(hidden), *torch.autograd.grad((logits * factor).sum(), (hidden, weight))


def test_bf16_is_summed_in_float32_and_only_its_gradients_are_rounded():
    ours, exact = in_precision(torch.bfloat16), in_precision(torch.float64)
    assert [tensor.dtype for tensor in ours] == [torch.float32] * 2 + [torch.bfloat16] * 2
    for name, mine, true, bound in zip(
        ("logits", "normaliser", "hidden", "weight"), ours, exact, (1e-6, 1e-6, 2**-8, 2**-8), strict=True
    ):
        assert relative(mine, true) < bound, name


def bias_gradient(dtype: torch.dtype) -> Tensor:
    """Of 4096 positions that ask for 20 ids again and again, from numbers that bf16 can hold."""
    bias = torch.zeros(20, dtype=dtype, requires_grad=True)
    ids = torch.randint(20, (4096, 4), generator=torch.Generator().manual_seed(4))
    logits = gather_logits(torch.zeros(4096, 2, dtype=dtype), torch.zeros(20, 2, dtype=dtype), ids, bias)
    factor = drawn(*ids.shape, seed=9).mul(0.1).add(1e-3).bfloat16()
    return torch.autograd.grad((logits * factor.to(logits.dtype)).sum(), bias)[0]


def test_the_gradient_of_a_bf16_bias_is_summed_in_float32():
    assert relative(bias_gradient(torch.bfloat16), bias_gradient(torch.float64)) < 2**-8


def test_the_gradient_of_a_bf16_normaliser_is_summed_over_tiles_in_float32(monkeypatch):
    """Of 250 tiles it is as exact as of one."""
    hidden, weight = (drawn(*shape, seed=shape[0]).bfloat16().requires_grad_() for shape in ((8, 64), (2000, 64)))

    def error(head: OutputHead, tile: int) -> float:
        monkeypatch.setattr(head_module, "NORMALISER_ELEMENTS", len(hidden) * tile)
        return relative(gradients(head.log_normaliser(hidden), hidden)[0], exact)

    wide = hidden.detach().double().requires_grad_()
    exact = gradients(OutputHead(weight=weight.detach().double(), scale=0.05).log_normaliser(wide), wide)[0]
    head = OutputHead(weight=weight, scale=0.05)
    assert error(head, 2000) < 2**-8
    assert error(head, 8) < 2**-8


def test_wide_products_of_half_precision_have_the_gradients_of_wide_factors():
    hidden, weight, bias, _ = inputs()
    half = [tensor.detach().bfloat16().requires_grad_() for tensor in (hidden, weight)]
    head = OutputHead(weight=half[1], bias=bias.detach().bfloat16(), soft_cap=5.0)
    logits = head.all_logits(half[0], exact=True)
    assert logits.dtype == torch.float32
    wide = [tensor.detach().double().requires_grad_() for tensor in half]
    exact = OutputHead(weight=wide[1], bias=bias.detach().bfloat16().double(), soft_cap=5.0).all_logits(wide[0])
    assert relative(logits, exact.detach()) < 1e-6
    for ours, theirs in zip(gradients(logits, *half), gradients(exact, *wide), strict=True):
        assert relative(ours, theirs) < 2**-7


def test_sums_in_bf16_would_be_seen():
    hidden, weight = drawn(60, 512, seed=60).bfloat16(), drawn(300, 512, seed=300).bfloat16()
    assert relative(hidden @ weight.T, hidden.double() @ weight.double().T) > 1e-4


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_log_probs_of_a_bf16_head_are_those_of_a_distribution(scale):
    """A confident model must not come out with a probability of 1.04."""
    hidden, weight = drawn(50, 64, seed=1).mul(scale).bfloat16(), drawn(100, 64, seed=2).bfloat16()
    head = OutputHead(weight=weight)
    log_probs = head.logits(hidden, torch.arange(100).repeat(50, 1)) - head.log_normaliser(hidden)[:, None]
    assert_close(log_probs.exp().sum(-1), torch.ones(50), rtol=0, atol=1e-4)


# ---- LoRA -----------------------------------------------------------------------------------------------------------


class LoraLinear(torch.nn.Module):
    """A linear layer with adapters, by the names that peft gives its parts."""

    def __init__(self, base_layer: torch.nn.Linear, names: tuple[str, ...] = ("default",), rank: int = 3) -> None:
        super().__init__()
        self.base_layer = base_layer
        new = {"bias": False, "dtype": base_layer.weight.dtype}
        width, rows = base_layer.in_features, base_layer.out_features
        self.lora_A = torch.nn.ModuleDict({name: torch.nn.Linear(width, rank, **new) for name in names})
        self.lora_B = torch.nn.ModuleDict({name: torch.nn.Linear(rank, rows, **new) for name in names})
        self.lora_dropout = torch.nn.ModuleDict({name: torch.nn.Identity() for name in names})
        self.scaling = {name: 0.5 + number for number, name in enumerate(names)}
        self.active_adapters = list(names)
        self.merged = self.disable_adapters = False

    def forward(self, hidden: Tensor) -> Tensor:
        logits = self.base_layer(hidden)
        for name in self.active_adapters:
            logits = logits + self.lora_B[name](self.lora_A[name](hidden)) * self.scaling[name]
        return logits


def with_lora(names: tuple[str, ...] = ("default",)) -> PreTrainedModel:
    model = tiny_model("qwen2-untied").double()
    model.set_output_embeddings(LoraLinear(model.lm_head, names))
    return model


def assert_head_is_the_models_own(model: PreTrainedModel, parameters: dict[str, Tensor]) -> None:
    """Logits, log-probs and gradients equal those of the model's own forward pass."""
    ids = torch.randint(340, (1, 7), generator=torch.Generator().manual_seed(0))
    support = torch.randint(340, (7, 3), generator=torch.Generator().manual_seed(1))
    hidden = model.base_model(input_ids=ids).last_hidden_state[0]
    head = OutputHead.of(model)
    ours = head.logits(hidden, support) - head.log_normaliser(hidden).unsqueeze(-1)
    full = model(input_ids=ids).logits[0].log_softmax(-1).gather(1, support)
    assert_close(ours, full)
    trained = [parameter for parameter in parameters.values() if parameter.requires_grad]
    for mine, other, name in zip(gradients(ours, *trained), gradients(full, *trained), parameters, strict=False):
        assert_close(mine, other, msg=lambda text, name=name: f"{name}: {text}")
        assert mine.abs().max() > 0


@pytest.mark.parametrize("names", [("default",), ("one", "two")], ids=str)
def test_lora_on_the_head_is_seen_through(names):
    model = with_lora(names)
    assert_head_is_the_models_own(model, dict(model.lm_head.named_parameters()))
    check_head(model, "adapted")
    assert len(OutputHead.of(model).adapters) == len(names)


def test_the_lora_check_can_fail(monkeypatch):
    monkeypatch.setattr(head_module, "_adapters", lambda layer: ())
    model = with_lora()
    with pytest.raises(AssertionError):
        assert_head_is_the_models_own(model, dict(model.lm_head.named_parameters()))
    with pytest.raises(ConfigurationError, match="changes its logits"):
        check_head(model, "adapted")


def test_adapters_that_are_merged_or_switched_off_add_nothing():
    model = with_lora(("one", "two"))
    model.lm_head.active_adapters = ["two"]
    assert [adapter.scale for adapter in OutputHead.of(model).adapters] == [1.5]
    for name in ("merged", "disable_adapters"):
        switched = with_lora()
        setattr(switched.lm_head, name, True)
        assert OutputHead.of(switched).adapters == ()


def dropout(layer: LoraLinear) -> None:
    layer.lora_dropout["default"] = torch.nn.Dropout(0.1)


def bias(layer: LoraLinear) -> None:
    layer.lora_B["default"].bias = torch.nn.Parameter(drawn(340))


def dora(layer: LoraLinear) -> None:
    layer.use_dora = {"default": True}


def variant(layer: LoraLinear) -> None:
    layer.lora_variant = {"default": object()}


@pytest.mark.parametrize("more", [dropout, bias, dora, variant])
def test_adapters_that_are_more_than_a_low_rank_addition_are_refused(more):
    model = with_lora()
    more(model.lm_head)
    with pytest.raises(ConfigurationError, match=r"'default'.*lora_dropout to 0"):
        OutputHead.of(model)


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft calling transformers
def test_lora_of_peft_itself_is_seen_through():
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "lm_head"])
    model = peft.get_peft_model(tiny_model("qwen2-untied"), settings).get_base_model().double()
    for parameter in model.lm_head.lora_B.parameters():  # fresh adapters add nothing
        torch.nn.init.normal_(parameter)
    assert_head_is_the_models_own(model, dict(model.lm_head.named_parameters()))
    check_head(model, "adapted")
    dora = peft.LoraConfig(r=3, target_modules=["lm_head"], use_dora=True)
    with pytest.raises(ConfigurationError, match="DoRA"):
        OutputHead.of(peft.get_peft_model(tiny_model("qwen2-untied"), dora).get_base_model())
