"""Adapters, frozen parts and checkpointed activations: what they train, and what they must not change."""

import dataclasses

import pytest
import torch
import yaml
from peft import LoraConfig
from slow import even_weights, random_support
from test_training import assert_identical
from tiny import FAMILIES, tiny_model
from torch import Tensor
from transformers import BitsAndBytesConfig, PreTrainedModel

from lsm_lightning.batching import check_packing
from lsm_lightning.errors import ConfigurationError
from lsm_lightning.objectives import LocalSupportMatching
from lsm_lightning.objectives.head import check_head
from lsm_lightning.pretrained import load_model, load_tokenizer
from lsm_lightning.rollout.local import LocalEngine
from lsm_lightning.student import (
    PLAIN_LORA,
    adapt,
    check_lora,
    checkpoint_activations,
    compile_layers,
    freeze,
    is_adapters,
    merged_parameters,
    plain_state_dict,
)
from lsm_lightning.types import Turn
from lsm_lightning.update import accumulate_gradients

UNTIED = "qwen2-untied"


def lora(*targets: str, **settings: object) -> LoraConfig:
    return LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": list(targets), **settings})


def adapted(family: str = UNTIED, *targets: str) -> PreTrainedModel:
    """In float64, with adapters that add something."""
    return filled(tiny_model(family).double(), lora(*(targets or ("q_proj", "down_proj"))))


def filled(model: PreTrainedModel, config: LoraConfig) -> PreTrainedModel:
    """With adapters that add something; most fresh ones do not."""
    adapt(model, config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) / 3)
    return model


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([[7, 8, 9, 10]])).logits


def gradients(student: PreTrainedModel, turns: list[Turn]) -> dict[str, Tensor]:
    """Of one step towards a random teacher."""
    student.zero_grad()
    support = random_support(turns, 8, seed=4)
    weights = even_weights(torch.ones(len(support.sampled), dtype=torch.bool))
    accumulate_gradients(
        student, LocalSupportMatching(k=8), turns, support, weights, groups=[list(range(len(turns)))],
        backward=lambda loss: loss.backward(),
    )  # fmt: skip
    return {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}


# ---- adapters -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("targets", [("q_proj",), ("q_proj", "down_proj", "lm_head"), ("embed_tokens",)], ids=str)
def test_a_merged_student_is_the_adapted_one(targets):
    model = adapted(UNTIED, *targets)
    plain = tiny_model(UNTIED).double()
    before = logits(plain)
    plain.load_state_dict(dict(merged_parameters(model)), strict=False)
    torch.testing.assert_close(logits(plain), logits(model))
    assert (logits(plain) - before).abs().max() > 1e-3  # they do add something


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_without_adapters_comes_as_it_is(family):
    model = tiny_model(family)
    merged = dict(merged_parameters(model))
    assert merged.keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(merged[name], parameter) for name, parameter in model.named_parameters())


def test_rollouts_are_those_of_the_adapted_student():
    model = adapted()
    engine = LocalEngine()
    engine.sync(model)
    torch.testing.assert_close(logits(engine._replica), logits(model))
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.add_(0.1)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(logits(engine._replica), logits(model))
    engine.sync(model)
    torch.testing.assert_close(logits(engine._replica), logits(model))


@pytest.mark.parametrize("targets", [("q_proj",), ("q_proj", "lm_head")], ids=str)
def test_only_adapters_are_trained(turns, targets):
    assert {name.split(".")[-3] for name in gradients(adapted(UNTIED, *targets), turns)} == {"lora_A", "lora_B"}


def test_the_gradient_of_adapters_is_that_of_the_weight_they_change(turns):
    """Of `weight + scale * B @ A`: by the chain rule, from a student whose weight is the sum itself."""
    model = adapted(UNTIED, "q_proj", "lm_head")
    plain = tiny_model(UNTIED).double()
    plain.load_state_dict(dict(merged_parameters(model)), strict=False)
    ours, theirs = gradients(model, turns), gradients(plain, turns)
    for name in ("model.layers.1.self_attn.q_proj", "lm_head"):
        layer = model.get_submodule(name)
        of_weight = layer.scaling["default"] * theirs[f"{name}.weight"]
        down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        torch.testing.assert_close(ours[f"{name}.lora_B.default.weight"], of_weight @ down.T)
        torch.testing.assert_close(ours[f"{name}.lora_A.default.weight"], up.T @ of_weight)


@pytest.mark.parametrize(
    ("family", "config", "told"),
    [
        (UNTIED, lora("no_such_layer"), "model.lora"),
        (UNTIED, LoraConfig(target_modules="["), "model.lora: unterminated"),
        (UNTIED, lora("lm_head", lora_dropout=0.1), "set lora_dropout to 0"),
        ("llama-tied", lora("q_proj", "lm_head"), "share their weights"),
        ("llama-tied", lora("embed_tokens"), "share their weights"),
    ],
    ids=["nothing", "no-pattern", "dropout", "tied-head", "tied-embedding"],
)
def test_adapters_that_cannot_be_merged_are_refused(family, config, told):
    with pytest.raises(ConfigurationError, match=told):
        adapt(tiny_model(family), config)


OTHERS = sorted({field.name for field in dataclasses.fields(LoraConfig)} - PLAIN_LORA)


@pytest.mark.parametrize("name", OTHERS)
def test_every_setting_beyond_plain_adapters_is_refused(name):
    """Those of a later peft too: what it is set to does not matter."""
    config = lora("q_proj")
    check_lora(config)
    setattr(config, name, "all")
    with pytest.raises(ConfigurationError, match=rf"model\.lora\.{name}='all': "):
        adapt(tiny_model(UNTIED), config)


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": False},
        {"init_lora_weights": "orthogonal", "r": 4},
        {"use_rslora": True, "lora_dropout": 0.1},
        {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 9}, "exclude_modules": ["v_proj"]},
        {"layers_to_transform": [1], "layers_pattern": "layers", "task_type": "CAUSAL_LM"},
    ],
    ids=lambda settings: "-".join(settings),
)
def test_every_setting_of_plain_adapters_is_merged_and_leaves_the_weights_under_them(settings):
    before = dict(tiny_model(UNTIED).double().named_parameters())
    model = filled(tiny_model(UNTIED).double(), lora("q_proj", "v_proj", "down_proj", **settings))
    under = {name.replace(".base_layer.", "."): p for name, p in model.named_parameters() if not is_adapters(name)}
    assert_identical(under, before)
    plain = tiny_model(UNTIED).double()
    plain.load_state_dict(dict(merged_parameters(model)), strict=False)
    torch.testing.assert_close(logits(plain), logits(model.eval()))
    assert (logits(plain) - logits(tiny_model(UNTIED).double())).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_4", "olora", "mica", "lora_ga", "eva", "corda"])
@pytest.mark.filterwarnings("ignore:.*is not specified. Using default")
def test_adapters_that_begin_with_other_weights_under_them_are_refused(name):
    with pytest.raises(ConfigurationError, match=f"init_lora_weights='{name}'"):
        adapt(tiny_model(UNTIED), lora("q_proj", init_lora_weights=name))


# ---- quantised weights ----------------------------------------------------------------------------------------------


PRECISIONS = {
    "fp4": {"load_in_4bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "nf4-double": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "int8": {"load_in_8bit": True},
}


def quantised(precision: str, **settings: object) -> PreTrainedModel:
    """Of the embedded student: the library's blocks of 64 weights are wider than the tiny one's layers."""
    pytest.importorskip("bitsandbytes", reason="quantised weights need the package bitsandbytes")
    return load_model("embedded:student", "float32", BitsAndBytesConfig(**PRECISIONS[precision], **settings))


def as_loaded(precision: str) -> dict[str, Tensor]:
    """The weights that the library itself gives back, of a model that has not run yet."""
    model, values = quantised(precision), {}
    import bitsandbytes

    for name, weight in model.named_parameters():
        if isinstance(weight, bitsandbytes.nn.Params4bit):
            values[name] = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state)
        elif isinstance(weight, bitsandbytes.nn.Int8Params):
            values[name] = bitsandbytes.functional.int8_vectorwise_dequant(weight.data, weight.SCB)
        else:
            values[name] = weight.detach()
    return values


@pytest.mark.parametrize("precision", PRECISIONS)
def test_quantised_weights_stay_as_they_were_loaded(precision, turns):
    """Whatever has run in between, in whatever mode."""
    model, loaded = quantised(precision), as_loaded(precision)
    whole = dict(load_model("embedded:student", "float32").named_parameters())
    name = "model.layers.0.self_attn.q_proj.weight"
    assert 0.001 < (loaded[name] - whole[name]).norm() / whole[name].norm() < 0.15
    check_head(model, "embedded:student")
    check_packing(model, "embedded:student")
    adapt(model, lora("q_proj"))  # whose fresh adapters add nothing
    for mode in (False, True, False):
        assert_identical(plain_state_dict(model), loaded)
        logits(model.train(mode))
    gradients(model.train(), turns)
    assert_identical(plain_state_dict(model), loaded)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rollouts_of_a_quantised_student_are_its_own(precision, turns):
    model = quantised(precision)
    check_head(model, "embedded:student")
    adapt(model, lora("q_proj"))
    model.train()
    assert {name.split(".")[-3] for name in gradients(model, turns)} == {"lora_A", "lora_B"}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(1))
    engine = LocalEngine()
    engine.sync(model)
    torch.testing.assert_close(logits(engine._replica), logits(model), rtol=1e-4, atol=1e-4)
    whole = load_model("embedded:student", "float32")
    assert (logits(engine._replica) - logits(whole)).abs().max() > 0.01


@pytest.mark.parametrize("precision", ["fp4", "int8"])
def test_a_quantised_run_leaves_the_student_that_is_exported_from_it(settings, run, tmp_path, precision):
    """The export has loaded the weights anew."""
    loaded = as_loaded(precision)
    settings["model"] |= {"student": "embedded:student", "quantization": PRECISIONS[precision], "mask": "repair"}
    settings["model"]["lora"] = {"r": 2, "target_modules": ["q_proj"]}
    settings["model"]["teachers"]["sums"]["init_args"]["path"] = "embedded:math-teacher"
    settings["trainer"] |= {"logger": True, "devices": 1, "max_steps": 2}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    assert run("fit", "--config", str(tmp_path / "run.yaml"), "--summary.evaluate", "false") == 0
    assert run("export", str(tmp_path), "-o", str(tmp_path / "student")) == 0
    left, exported = (
        dict(load_model(str(folder), "float32").named_parameters())
        for folder in (tmp_path / "version_0" / "student", tmp_path / "student")
    )
    assert_identical(exported, left)
    changed = {name for name in loaded if not torch.equal(left[name], loaded[name])}
    assert changed == {name for name in loaded if "q_proj" in name}
    assert all(torch.allclose(left[name], loaded[name], rtol=0, atol=1e-4) for name in loaded)


def test_a_student_that_comes_quantised_trains_adapters_only(settings, run, tmp_path, capfd):
    quantised("nf4").save_pretrained(tmp_path / "base")
    load_tokenizer("embedded:student").save_pretrained(tmp_path / "base")
    settings["model"] |= {"student": str(tmp_path / "base"), "mask": "repair"}
    settings["model"]["teachers"]["sums"]["init_args"]["path"] = "embedded:math-teacher"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(settings))
    arguments = ["fit", "--config", str(tmp_path / "run.yaml"), "--summary.evaluate", "false"]
    assert run(*arguments) == 2
    assert "quantised, and those cannot be trained; add adapters" in capfd.readouterr().err
    assert run(*arguments, "--model.lora.target_modules", "[q_proj]") == 0


@pytest.mark.parametrize("precision", ["nf4", "int8"])
def test_a_quantised_head_is_refused(precision):
    with pytest.raises(ConfigurationError, match="add 'lm_head' to model"):
        check_head(quantised(precision, llm_int8_skip_modules=["q_proj"]), "embedded:student")


# ---- frozen parts ---------------------------------------------------------------------------------------------------


def test_frozen_weights_have_no_gradient(turns):
    model = tiny_model(UNTIED).double()
    everything = gradients(model, turns)
    freeze(model, ["*.embed_tokens.*", "model.layers.0.*"])
    rest = gradients(tiny_with_frozen(), turns)
    gone = {name for name in everything if "embed_tokens" in name or ".layers.0." in name}
    assert gone
    assert rest.keys() == everything.keys() - gone
    assert all(torch.equal(rest[name], everything[name]) for name in rest)


def tiny_with_frozen() -> PreTrainedModel:
    model = tiny_model(UNTIED).double()
    freeze(model, ["*.embed_tokens.*", "model.layers.0.*"])
    return model


@pytest.mark.parametrize(("patterns", "told"), [(["*.no_such.*"], "no_such"), (["*"], "nothing of the student")])
def test_patterns_that_freeze_nothing_or_everything_are_refused(patterns, told):
    with pytest.raises(ConfigurationError, match=told):
        freeze(tiny_model(), patterns)


# ---- memory and speed -----------------------------------------------------------------------------------------------


def kept_elements(student: PreTrainedModel, turns: list[Turn]) -> tuple[dict[str, Tensor], int]:
    """Gradients, and how many numbers were kept for the backward pass."""
    kept = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        found = gradients(student, turns)
    return found, kept


def test_checkpointed_activations_change_nothing_but_memory(turns):
    student = tiny_model().double().train()
    whole, kept = kept_elements(student, turns)
    checkpoint_activations(student)
    again, kept_less = kept_elements(student, turns)
    assert again.keys() == whole.keys()
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    assert kept_less < 0.8 * kept


def test_a_model_that_cannot_checkpoint_is_refused(monkeypatch):
    model = tiny_model()
    monkeypatch.setattr(type(model), "supports_gradient_checkpointing", False)
    with pytest.raises(ConfigurationError, match="activation_checkpointing"):
        checkpoint_activations(model)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch warns itself while it compiles
def test_compiled_layers_change_nothing(turns):
    student = tiny_model().double().train()
    whole = gradients(student, turns)
    names = list(student.state_dict())
    compile_layers(student)
    assert list(student.state_dict()) == names
    again = gradients(student, turns)
    for name in whole:  # norms are computed in float32, fused otherwise
        assert (again[name] - whole[name]).norm() < 1e-5 * whole[name].norm(), name
