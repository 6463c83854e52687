import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import PAD

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.pretrained import check_model, load_model, load_tokenizer, locate, render, turn_end_ids

LOADERS = [check_model, load_tokenizer, lambda name: load_model(name, "float32")]


@pytest.fixture
def copied(student_folder: Path, tmp_path: Path) -> Path:
    """A model folder to break."""
    return Path(shutil.copytree(student_folder, tmp_path / "model"))


def assert_clear(error: ConfigurationError, name: str) -> None:
    """One line that names what was asked for."""
    assert name in str(error)
    assert "\n" not in str(error).strip()


@pytest.mark.parametrize("load", LOADERS)
@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "~/no such model", "nowhere", "some/deep/path"])
def test_a_missing_folder_is_named(load, name):
    with pytest.raises(ConfigurationError, match="There is no model folder") as caught:
        load(name)
    assert_clear(caught.value, name)


@pytest.mark.parametrize("load", LOADERS)
def test_a_folder_without_a_model_is_named(load, tmp_path):
    with pytest.raises(ConfigurationError, match=r"config\.json is missing") as caught:
        load(str(tmp_path))
    assert_clear(caught.value, str(tmp_path))


@pytest.mark.parametrize("load", LOADERS)
def test_an_unknown_embedded_model_is_named(load):
    with pytest.raises(ConfigurationError, match="There is no embedded model") as caught:
        load("embedded:professor")
    assert_clear(caught.value, "embedded:professor")


@pytest.mark.parametrize("load", LOADERS)
def test_a_config_that_says_nothing_is_named(load, copied):
    (copied / "config.json").write_text('{"model_type": "no-such-family"}')
    if load is load_tokenizer:
        load(str(copied))  # needs no model configuration
        return
    with pytest.raises(ConfigurationError, match="cannot be loaded") as caught:
        load(str(copied))
    assert_clear(caught.value, str(copied))


def test_a_tokenizer_without_a_template_is_named_with_both_remedies(copied):
    (copied / "chat_template.jinja").unlink()
    with pytest.raises(ConfigurationError, match=r"no chat template.*chat_template\.jinja.*`chat_template`") as caught:
        load_tokenizer(str(copied))
    assert_clear(caught.value, str(copied))
    assert load_tokenizer(str(copied), chat_template="{{ 'hello' }}").chat_template == "{{ 'hello' }}"


def test_a_folder_without_a_tokenizer_is_named(copied):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (copied / file).unlink()
    with pytest.raises(ConfigurationError, match="tokenizer") as caught:
        load_tokenizer(str(copied))
    assert_clear(caught.value, str(copied))


def test_a_folder_without_weights_is_named(copied):
    (copied / "model.safetensors").unlink()
    with pytest.raises(ConfigurationError, match="cannot be loaded") as caught:
        load_model(str(copied), "float32")
    assert_clear(caught.value, str(copied))


def test_pickled_weights_are_not_read(copied):
    weights = copied / "model.safetensors"
    torch.save({"anything": torch.zeros(1)}, copied / "pytorch_model.bin")
    weights.unlink()
    with pytest.raises(ConfigurationError, match="cannot be loaded"):
        load_model(str(copied), "float32")


def test_broken_weights_are_named(copied):
    (copied / "model.safetensors").write_bytes(b"not weights at all, whatever they say")
    with pytest.raises(ConfigurationError, match="cannot be loaded") as caught:
        load_model(str(copied), "float32")
    assert_clear(caught.value, str(copied))


def test_code_that_comes_with_a_model_is_not_run(copied):
    config = json.loads((copied / "config.json").read_text())
    config |= {
        "model_type": "own-family",
        "auto_map": {"AutoConfig": "trap.Config", "AutoModelForCausalLM": "trap.Model"},
    }
    (copied / "config.json").write_text(json.dumps(config))
    (copied / "trap.py").write_text("raise SystemExit('this code must not run')")
    with pytest.raises(ConfigurationError):
        check_model(str(copied))


def test_a_pad_token_is_found_where_there_is_none(copied):
    config = json.loads((copied / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (copied / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(str(copied)).pad_token is not None
    assert PAD in (copied / "tokenizer.json").read_text()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "auto"])
def test_weights_come_in_the_dtype_asked_for(student_folder, dtype):
    model = load_model(str(student_folder), dtype)
    assert model.dtype == (torch.float32 if dtype == "auto" else getattr(torch, dtype))
    assert not model.training


def test_every_end_of_turn_counts(student_folder, student_tokenizer):
    model = load_model(str(student_folder), "float32")
    model.generation_config.eos_token_id = [2, 17]
    assert turn_end_ids(model, student_tokenizer) == {2, 17, student_tokenizer.eos_token_id}
    model.generation_config.eos_token_id = 17
    assert turn_end_ids(model, student_tokenizer) == {17, student_tokenizer.eos_token_id}
    model.generation_config = None
    assert turn_end_ids(model, student_tokenizer) == {student_tokenizer.eos_token_id}


def test_a_conversation_is_rendered_as_its_template_says(student_tokenizer):
    talk = [
        {"role": "user", "content": "Say apple"},
        {"role": "assistant", "content": "apple"},
        {"role": "user", "content": "now"},
    ]
    (ids,) = render(student_tokenizer, [talk])
    assert student_tokenizer.decode(ids) == "<|user|>Say apple<|assistant|>apple<|im_end|><|user|>now<|assistant|>"
    assert render(student_tokenizer, [talk, talk[:1]])[0] == ids


def test_a_hub_id_is_left_to_transformers():
    assert locate("owner/name") == "owner/name"


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("weight", ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.weight"])
def test_a_weight_that_is_not_finite_is_named(copied, weight, value):
    weights = load_file(copied / "model.safetensors")
    weights[weight][-1, -1] = value
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match=rf"{weight} that are not finite.*float32 if") as caught:
        load_model(str(copied), "bfloat16")
    assert_clear(caught.value, str(copied))


def test_a_weight_too_large_for_its_type_is_told_and_its_remedy_helps(copied):
    weights = load_file(copied / "model.safetensors")
    weights["model.norm.weight"][0] = 1e6
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigurationError, match=r"model\.norm\.weight .*torch\.float16: set its dtype to float32"):
        load_model(str(copied), "float16")
    load_model(str(copied), "float32")
