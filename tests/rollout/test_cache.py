"""Layers of every kind, kept while rows come and go, against a cache of transformers that knows one row only."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import FAMILIES, SIZES, random_ids, tiny_model
from torch import Tensor
from transformers import (
    DynamicCache,
    FalconH1Config,
    Gemma3TextConfig,
    Lfm2Config,
    MambaConfig,
    MistralConfig,
    PreTrainedModel,
    Qwen3NextConfig,
    cache_utils,
)
from transformers.cache_utils import DynamicIndexedLayer
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from writing import ENDS, GREEDY, engine_of, ids_of, write

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.rollout.base import Request
from lsm_lightning.rollout.cache import RowCache, RowLayer, RowStates, RowStatesAndLayer

WINDOW = 8
SPECIAL = {
    "sliding": (MistralConfig, {"sliding_window": WINDOW}),
    "gemma3-every-other-sliding": (
        Gemma3TextConfig,
        {"sliding_window": WINDOW, "head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "mamba-without-attention": (MambaConfig, {"state_size": 8}),
    "lfm2-convolutions": (Lfm2Config, {"layer_types": ["conv", "full_attention"], "conv_L_cache": 3}),
    "falcon-h1-mamba-beside-attention": (
        FalconH1Config,
        {
            "mamba_d_ssm": 32, "mamba_n_heads": 2, "mamba_d_head": 16, "mamba_n_groups": 1, "mamba_d_state": 8,
            "head_dim": 16,
        },
    ),
    "qwen3-next-gated-delta": (
        Qwen3NextConfig,
        {
            "layer_types": ["linear_attention", "full_attention"], "linear_num_value_heads": 2,
            "linear_num_key_heads": 1, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "head_dim": 16,
            "num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16,
            "shared_expert_intermediate_size": 16,
        },
    ),
}  # fmt: skip
PROMPTS = [random_ids(seed, length) for seed, length in enumerate([3, 17, 9, 1, 9, 30, 12, 2])]


def special_model(name: str) -> PreTrainedModel:
    kind, extra = SPECIAL[name]
    config = kind(vocab_size=340, **{**SIZES, **extra})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        return MODEL_FOR_CAUSAL_LM_MAPPING[kind](config).eval()


def generated(model: PreTrainedModel, prompt: list[int], new: int) -> list[int]:
    output = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
        max_new_tokens=new, eos_token_id=sorted(ENDS), pad_token_id=0,
    )  # fmt: skip
    return output[0, len(prompt) :].tolist()


@pytest.fixture(scope="module", params=[*FAMILIES, *SPECIAL])
def any_model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return tiny_model(request.param, seed=1) if request.param in FAMILIES else special_model(request.param)


@pytest.mark.parametrize("batch_size", [3, 256], ids="batch_size={}".format)
def test_greedy_answers_are_those_of_transformers_whatever_was_in_a_row_before(any_model, batch_size):
    answers = write(
        engine_of(any_model, batch_size=batch_size), [Request(ids=prompt, seed=0) for prompt in PROMPTS], GREEDY
    )
    assert ids_of(answers) == [generated(any_model, prompt, 24) for prompt in PROMPTS]


# ---- the cache alone ------------------------------------------------------------------------------------------------


class Histories:
    """Plays rows against lists of numbers: token j of row r is a key of all the same number."""

    def __init__(self, model: PreTrainedModel, rows: int, columns: int, longest: int) -> None:
        self.model, self.next = model, 1.0
        self.cache = RowCache(model, longest, rows, columns)
        self.rows: list[list[float]] = []

    def numbers(self, count: int) -> list[float]:
        self.next += count
        return [self.next - count + j for j in range(count)]

    def append(self, lengths: list[int]) -> None:
        if self.rows and max(lengths) > self.cache.length:
            self.cache.lengthen(max(lengths), 6, 2)
        added = [self.numbers(length) for length in lengths]
        width = max(lengths)
        padded = torch.tensor([[-1.0] * (width - len(row)) + row for row in added])
        prefilled = DynamicCache(config=self.model.config)
        for layer in range(len(prefilled.layers)):
            prefilled.update(*two(padded), layer)
        backwards = torch.arange(len(lengths) - 1, -1, -1)
        self.cache.append(prefilled, backwards)
        self.rows += added[::-1]

    def keep(self, order: list[int]) -> None:
        moved = [row for row, former in enumerate(order) if row != former]
        self.cache.keep(torch.tensor(order), torch.tensor(moved, dtype=torch.long))
        self.rows = [self.rows[row] for row in order]
        self.cache.shorten(max(map(len, self.rows)))

    def write(self) -> None:
        """A token for every row; what attention is shown must end with the row's own history."""
        if not self.cache.room:
            self.cache.reserve(6, 2)
        new = self.numbers(len(self.rows))
        seen = [self.cache.update(*two(torch.tensor([new]).T), layer) for layer in range(len(self.cache.layers))]
        self.cache.advance()
        self.rows = [[*row, token] for row, token in zip(self.rows, new, strict=True)]
        for layer, (keys, values) in zip(self.cache.layers, seen, strict=True):
            assert keys.shape[2] == values.shape[2] <= layer.get_mask_sizes(0)[0] + 1
            visible = layer.sliding_window or 10**9
            for row, key, value in zip(self.rows, keys, values, strict=True):
                expected = torch.tensor(row[-visible:])
                assert torch.equal(key[0, -len(expected) :, 0], expected)
                assert torch.equal(value[0, -len(expected) :, 0], -expected)


def two(numbers: Tensor) -> tuple[Tensor, Tensor]:
    """Keys `[n 1 t 2]`, and values that differ from them."""
    keys = numbers[:, None, :, None].expand(-1, 1, -1, 2).contiguous()
    return keys, -keys


def test_the_check_of_histories_can_fail():
    played = Histories(special_model("sliding"), rows=2, columns=3, longest=3)
    played.append([3, 2])
    played.rows.reverse()
    with pytest.raises(AssertionError):
        played.write()


@given(st.data())
@settings(max_examples=40)
def test_rows_see_their_own_past_and_nothing_else(data):
    played = Histories(special_model("gemma3-every-other-sliding"), rows=6, columns=3, longest=12)
    played.append([12, *data.draw(st.lists(st.integers(1, 12), max_size=4))])
    for _ in range(data.draw(st.integers(1, 12))):
        deed = data.draw(st.sampled_from(["write", "write", "keep", "append"]))
        rows = len(played.rows)
        if deed == "write":
            played.write()
        elif deed == "keep" and rows > 1:
            order = data.draw(st.permutations(range(rows)))[: data.draw(st.integers(1, rows))]
            played.keep(order)
        elif deed == "append" and rows < 6:
            longest = max(map(len, played.rows)) + 5
            played.append(data.draw(st.lists(st.integers(1, longest), min_size=1, max_size=6 - rows)))
    played.write()


def test_a_longer_row_moves_the_others_only_where_it_does_not_fit():
    model = special_model("gemma3-every-other-sliding")
    played = Histories(model, rows=3, columns=6, longest=12)
    played.append([12, 3])
    for _ in range(4):
        played.write()
    played.keep([1])
    memory = [layer.keys.data_ptr() for layer in played.cache.layers]
    played.append([16])  # as many columns as the first row had
    assert [layer.keys.data_ptr() for layer in played.cache.layers] == memory
    played.write()
    played.append([18])
    assert played.cache.layers[1].keys.data_ptr() != memory[1]
    assert played.cache.layers[1].keys.shape[2] == 18 + 2
    played.write()


def test_memory_is_that_of_the_rows_and_columns_asked_for():
    model = special_model("gemma3-every-other-sliding")
    cache = RowCache(model, 100, rows=5, columns=7)
    prefilled = DynamicCache(config=model.config)
    for layer in range(2):
        prefilled.update(*two(torch.zeros(1, 100)), layer)
    cache.append(prefilled, torch.zeros(2, dtype=torch.long))
    sliding, full = (layer.keys.shape[::2] for layer in cache.layers)
    assert (sliding, full) == ((5, WINDOW - 1 + 7), (5, 107))
    cache.reserve(3, 20)
    sliding, full = (layer.keys.shape[::2] for layer in cache.layers)
    assert (sliding, full) == ((3, WINDOW - 1 + 20), (3, 120))
    assert cache.room == 20


@pytest.mark.parametrize(
    ("name", "kinds"),
    [
        ("sliding", {RowLayer}),
        ("mamba-without-attention", {RowStates}),
        ("lfm2-convolutions", {RowStates, RowLayer}),
        ("falcon-h1-mamba-beside-attention", {RowStatesAndLayer}),
        ("qwen3-next-gated-delta", {RowStates, RowLayer}),
    ],
)
def test_every_layer_has_its_counterpart(name, kinds):
    assert {type(layer) for layer in RowCache(special_model(name), 1, 1, 1).layers} == kinds


def test_a_layer_of_another_kind_is_refused_by_name(monkeypatch):
    model = tiny_model()
    monkeypatch.setitem(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, "full_attention", DynamicIndexedLayer)
    with pytest.raises(ConfigurationError, match=r"LlamaForCausalLM: .* DynamicIndexedLayer"):
        write(engine_of(model), [Request(ids=PROMPTS[0], seed=0)])
