"""Models and tokenizers by name: the embedded ones, a folder, or a hub id."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lsm_lightning.errors import ConfigurationError
from tokenalign import Convention

EMBEDDED = "embedded:"
"""Prefix of the models inside this package, as in `embedded:student`."""
EMBEDDED_FOLDER = Path(__file__).parent / "embedded"

DType = Literal["auto", "float32", "bfloat16", "float16"]


def locate(name: str) -> str:
    """The folder of an embedded model; a path or a hub id as it is.

    Raises:
        ConfigurationError: No such embedded model; or `name` looks like a path, and there is no such folder.
    """
    if name.startswith(EMBEDDED):
        folder = EMBEDDED_FOLDER / name.removeprefix(EMBEDDED)
        if not (folder / "config.json").is_file():
            known = ", ".join(sorted(f"{EMBEDDED}{path.parent.name}" for path in EMBEDDED_FOLDER.glob("*/config.json")))
            raise ConfigurationError(f"There is no embedded model '{name}'. There are: {known or 'none'}.")
        return str(folder)
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigurationError(f"The folder '{name}' holds no model: config.json is missing.")
        return str(path)
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") != 1:
        raise ConfigurationError(
            f"There is no model folder '{name}'. Give a folder in transformers format, a hub id (owner/name) "
            f"or an embedded model ({EMBEDDED}student)."
        )
    return name


def load_tokenizer(name: str, chat_template: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model, with a chat template and a pad token.

    Args:
        name: An embedded model, a folder or a hub id.
        chat_template: A jinja2 template, or a file with one, in place of the tokenizer's own.

    Raises:
        ConfigurationError: The tokenizer cannot be loaded, is not a fast one, or has no chat template.
    """
    with _loading("tokenizer", name):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(locate(name))
    if not tokenizer.is_fast:
        raise ConfigurationError(f"The tokenizer of '{name}' is not a fast one (no tokenizer.json): convert it first.")
    if chat_template is not None:
        tokenizer.chat_template = _template(chat_template)
    if not tokenizer.chat_template:
        raise ConfigurationError(
            f"The tokenizer of '{name}' has no chat template, so prompts cannot be built. Put a chat_template.jinja "
            "into its folder, or set `chat_template` in the configuration."
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _template(value: str) -> str:
    """A chat template given as text or as a file."""
    if "{{" in value or "{%" in value:
        return value
    if not Path(value).expanduser().is_file():
        raise ConfigurationError(f"chat_template={value!r} is neither a jinja template nor a file that is there.")
    return Path(value).expanduser().read_text()


def load_model(name: str, dtype: DType, quantization: BitsAndBytesConfig | None = None) -> PreTrainedModel:
    """The model in eval mode on the CPU, from safetensors only.

    Raises:
        ConfigurationError: The model cannot be loaded, or a weight is not finite.
    """
    options: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype), "use_safetensors": True}
    if quantization is not None:
        options |= {"quantization_config": quantization}
    # Weights of other shapes are let through for a moment, since the error about them does not say which.
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}
    model: PreTrainedModel
    load: Any = AutoModelForCausalLM.from_pretrained
    with _loading("model", name):
        model, report = load(locate(name), **options)
        for weight, found, expected in sorted(report["mismatched_keys"]):
            raise ValueError(f"{weight} is {list(found)} in its weights and {list(expected)} by its config.json.")
        for weight in sorted(report["missing_keys"]):
            raise ValueError(f"{weight} is not among its weights.")
    # Told here, since a row that is seldom used would look as if training had diverged.
    for weight, value in model.named_parameters():
        if not _finite(value):
            raise ConfigurationError(
                f"The model '{name}' has numbers in {weight} that are not finite, in {value.dtype}: set its dtype to "
                "float32 if that is too narrow for them, or get its weights anew."
            )
    _keep_layout(model)
    return model.eval()


def _keep_layout(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from packing 4-bit weights otherwise, in place.

    On some CPUs it would do so once they run in eval mode, round their scales, and give other weights back in the end.
    """
    layer: Any
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False


def _finite(weight: torch.nn.Parameter) -> bool:
    """Whether a weight holds numbers only; of quantised weights, whose bits mean something else, nobody knows."""
    quantised = type(weight) is not torch.nn.Parameter or weight.element_size() < 2
    if quantised or not weight.is_floating_point() or not weight.numel():
        return True
    # Much faster than a look at each number, and without a copy; a NaN is its own extreme.
    return bool(torch.stack(weight.detach().aminmax()).isfinite().all())


def load_skeleton(name: str) -> PreTrainedModel:
    """The model without its weights, on the meta device; its configuration and its generation settings are there.

    Raises:
        ConfigurationError: The configuration cannot be loaded.
    """
    with _loading("model", name):
        config = AutoConfig.from_pretrained(locate(name))
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    with suppress(OSError):  # where there is none, the one derived from the configuration stays
        model.generation_config = GenerationConfig.from_pretrained(locate(name))
    return model.eval()


def check_vocabulary(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Make sure that the model knows what its tokenizer writes.

    Tokens that were added to the tokenizer may lie beyond the model: some models come with one for images, say, that
    no text makes.

    Raises:
        ConfigurationError: An ordinary token has no row in the model's embedding.
    """
    embedding: Any = model.get_input_embeddings()
    rows = len(embedding.weight)
    if tokenizer.vocab_size > rows:
        raise ConfigurationError(
            f"The tokenizer of '{name}' has {tokenizer.vocab_size} tokens, and its model {rows} rows for them: they do "
            "not belong together. Put the tokenizer that the model was trained with into its folder."
        )


def check_model(name: str) -> None:
    """Fail early, and without reading weights, where `load_model` could not work.

    Raises:
        ConfigurationError: The name leads to no readable model configuration.
    """
    with _loading("model", name):
        AutoConfig.from_pretrained(locate(name))


def context_of(config: PretrainedConfig) -> int | None:
    """Tokens that a model takes at once, as far as its configuration tells."""
    return getattr(config.get_text_config(), "max_position_embeddings", None)


def turn_end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Every token at which the model ends its turn: of its generation config, its tokenizer and its chat template."""
    config = model.generation_config.eos_token_id if model.generation_config is not None else None
    ids = config if isinstance(config, list) else [config]
    return frozenset(i for i in (*ids, tokenizer.eos_token_id) if i is not None) | Convention.detect(tokenizer).turn_end


def render(tokenizer: PreTrainedTokenizerBase, conversations: list[list[dict[str, str]]]) -> list[list[int]]:
    """Token ids of conversations under the tokenizer's chat template, generation prefix included."""
    keys = [tuple(tuple(message.items()) for message in messages) for messages in conversations]
    distinct = dict(zip(keys, conversations, strict=True))  # the answers of a group share their prompt
    if not distinct:  # no texts at all are more than a tokenizer can encode
        return []
    texts = tokenizer.apply_chat_template([*distinct.values()], add_generation_prompt=True, tokenize=False)
    of_key = dict(zip(distinct, tokenizer(texts, add_special_tokens=False)["input_ids"], strict=True))
    return [list(of_key[key]) for key in keys]


@contextmanager
def _loading(what: str, name: str) -> Iterator[None]:
    """Tell in one line what could not be loaded, and why."""
    try:
        yield
    except ConfigurationError:
        raise
    except (ImportError, OSError, ValueError, SafetensorError) as error:
        here = Path(locate(name)).is_dir()
        place = "" if here else f" There is no folder '{name}' here, so it was taken for a hub id."
        raise ConfigurationError(f"The {what} of '{name}' cannot be loaded: {_first_line(error)}{place}") from error


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
