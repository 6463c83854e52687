"""Students on disk: the one way a model folder is written, and the command that writes one from a checkpoint."""

import copy
from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, TaskType
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from lsm_lightning import checkpoints
from lsm_lightning.checkpoints import Checkpoint
from lsm_lightning.errors import ConfigurationError
from lsm_lightning.model_card import model_card, versions
from lsm_lightning.pretrained import DType, load_model, load_skeleton, load_tokenizer, locate, turn_end_ids
from lsm_lightning.rollout.base import Sampling
from lsm_lightning.run_folder import find_run, read_config, read_summary
from lsm_lightning.student import adapt, adapter_state_dict, is_adapters, plain_state_dict


def export(
    run: Path,
    output: Path,
    *,
    dtype: DType = "auto",
    overwrite: bool = False,
    adapter: bool = False,
    config: Path | None = None,
) -> str:
    """Write the student of a run as a folder that `from_pretrained` and vLLM load.

    No teacher is loaded, and of the base student its configuration and tokenizer only, unless adapters were trained:
    they are merged into the base's weights.

    Args:
        run: The run's folder, of which the newest version is taken; one version's folder; or a checkpoint, of any
            strategy and number of processes.
        output: Where to.
        dtype: Of the exported weights; `auto` is the checkpoint's, bit for bit.
        overwrite: Whether a model that lies in `output` is replaced.
        adapter: Write the adapters alone, as peft reads them.
        config: The run's settings, where they do not lie beside the checkpoint.

    Returns:
        What was written, in one line.

    Raises:
        ConfigurationError: Something is missing or damaged, does not belong together, or cannot be written.
    """
    found = find_run(run, config)
    settings = read_config(found.config)
    name = settings["model"]["student"]
    _check_output(output, overwrite, base=Path(locate(name)))
    model = load_skeleton(name)
    tokenizer = load_tokenizer(name, settings["model"].get("chat_template"))
    checkpoint = checkpoints.read(found.checkpoint)
    if checkpoint.state.get("student", name) != name:
        raise ConfigurationError(
            f"The checkpoint '{found.checkpoint}' is of the student '{checkpoint.state['student']}', the settings in "
            f"'{found.config}' are of '{name}': name the right ones with --config."
        )
    lora = settings["model"].get("lora")
    if adapter and not lora:
        raise ConfigurationError(f"No adapters were trained in the run of '{found.checkpoint}': leave --adapter out.")
    weights = checkpoint.weights
    if lora:
        adapted = _adapted(settings["model"], weights)
        weights = adapter_state_dict(adapted) if adapter else plain_state_dict(adapted)
    if dtype != "auto":
        weights = {n: w.to(getattr(torch, dtype)) if w.is_floating_point() else w for n, w in weights.items()}
    summary = _summary(checkpoint, read_summary(found.summary), settings)
    if adapter:
        write_adapter(output, _lora(lora), weights, base=name, card=model_card(settings, summary))
        return f"Wrote the adapters after step {summary['steps']} ({found.checkpoint}) to {output}."
    try:
        write_student(
            output,
            model,
            weights,
            tokenizer,
            turn_end=turn_end_ids(model, tokenizer),
            sampling=Sampling(**(settings["model"].get("sampling") or {})),
            card=model_card(settings, summary),
        )
    except ConfigurationError as error:
        raise ConfigurationError(f"'{found.checkpoint}' cannot be exported: {error}") from error
    return f"Wrote the student after step {summary['steps']} ({found.checkpoint}) to {output}."


def write_student(
    folder: Path,
    student: PreTrainedModel,
    weights: Mapping[str, Tensor],
    tokenizer: PreTrainedTokenizerBase,
    *,
    turn_end: AbstractSet[int],
    sampling: Sampling,
    card: str,
) -> None:
    """Write a model folder: weights, configuration, tokenizer with its chat template, generation settings, model card.

    The folder appears whole or not at all; one that is there is replaced.

    Args:
        folder: Where to.
        student: The model, for its configuration; its own weights may be sharded or on the meta device.
        weights: What is written, whole and on the CPU; both names of a tied weight, or one.
        tokenizer: The student's.
        turn_end: Every token that ends a turn.
        sampling: How the student is meant to be sampled.
        card: The text of README.md.

    Raises:
        ConfigurationError: The weights are not the model's, or the folder cannot be written.
    """
    model = _filled(student, weights)
    model.generation_config = _generation_config(tokenizer, turn_end, sampling)
    try:
        with _replaced(folder) as fresh:
            model.save_pretrained(fresh)
            tokenizer.save_pretrained(fresh)
            (fresh / "README.md").write_text(card)
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(f"The folder '{folder}' cannot be written: {error}") from error


def write_adapter(folder: Path, lora: LoraConfig, weights: Mapping[str, Tensor], *, base: str, card: str) -> None:
    """Write adapters as peft reads them (`PeftModel.from_pretrained`); the folder appears whole or not at all.

    Args:
        folder: Where to.
        lora: What kind of adapters they are.
        weights: By peft's names.
        base: The model they belong to.
        card: The text of README.md.

    Raises:
        ConfigurationError: The folder cannot be written.
    """
    lora.base_model_name_or_path, lora.task_type, lora.inference_mode = base, TaskType.CAUSAL_LM, True
    try:
        with _replaced(folder) as fresh:
            lora.save_pretrained(str(fresh))
            save_file(dict(weights), fresh / "adapter_model.safetensors", metadata={"format": "pt"})
            (fresh / "README.md").write_text(card)
    except (OSError, SafetensorError) as error:
        raise ConfigurationError(f"The folder '{folder}' cannot be written: {error}") from error


def _lora(settings: Mapping[str, Any]) -> LoraConfig:
    """As the command line wrote it down, without what says how it was set up and run."""
    values = settings["init_args"]
    return LoraConfig(**{name: values[name] for name in values.keys() - {"runtime_config", "loftq_config"}})


def _adapted(settings: Mapping[str, Any], trained: Mapping[str, Tensor]) -> PreTrainedModel:
    """The base student with the run's adapters."""
    quantization = settings.get("quantization")
    quantised = BitsAndBytesConfig(**quantization) if quantization else None
    model = load_model(settings["student"], settings.get("dtype", "float32"), quantised)
    adapt(model, _lora(settings["lora"]))
    adapters = {name: weight for name, weight in trained.items() if is_adapters(name)}
    expected = {name for name in model.state_dict() if is_adapters(name)}
    if wrong := sorted(expected ^ adapters.keys()):
        raise ConfigurationError(
            f"The checkpoint has other adapters than model.lora of its settings says, the first being {wrong[0]}: name "
            "the right settings with --config."
        )
    model.load_state_dict(adapters, strict=False)
    return model


def _filled(student: PreTrainedModel, weights: Mapping[str, Tensor]) -> PreTrainedModel:
    """A model of the same configuration that holds these very tensors.

    This is where names are checked: adapters are to be merged before.
    """
    config = copy.deepcopy(student.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # the weights come at full size
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    expected, tied = model.state_dict(), model.all_tied_weights_keys
    for name in sorted(expected.keys() - weights.keys() - tied.keys()):
        raise ConfigurationError(f"the weight {name} of the student is missing.")
    for name in sorted(weights.keys() - expected.keys()):
        raise ConfigurationError(f"the student knows no weight {name}.")
    for name, weight in weights.items():
        if weight.shape != expected[name].shape:
            raise ConfigurationError(
                f"{name} is {list(weight.shape)}, and {list(expected[name].shape)} in the student."
            )
        if name in tied and not torch.equal(weight, weights[tied[name]]):
            raise ConfigurationError(
                f"{name} and {tied[name]} are one weight by the student's config.json, and differ."
            )
    model.load_state_dict({n: w for n, w in weights.items() if n not in tied}, assign=True, strict=False)
    model.tie_weights()
    return model


def _generation_config(
    tokenizer: PreTrainedTokenizerBase, turn_end: AbstractSet[int], sampling: Sampling
) -> GenerationConfig:
    """What the run did and nothing else: penalties and the like that the base came with were not in force."""
    greedy = sampling.temperature == 0
    drawn: dict[str, Any] = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    return GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=sorted(turn_end),
        pad_token_id=tokenizer.pad_token_id,
        do_sample=not greedy,
        **({} if greedy else drawn),
    )


@contextmanager
def _replaced(folder: Path) -> Iterator[Path]:
    """A fresh folder to write into, which takes the place of `folder` once all is written."""
    folder = folder.expanduser().resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Beside it, since a rename works within one file system only.
    with TemporaryDirectory(prefix=f".{folder.name}.", dir=folder.parent) as scratch:
        fresh, former = Path(scratch, "fresh"), Path(scratch, "former")
        fresh.mkdir()
        yield fresh
        for path in fresh.iterdir():  # weights are written for their owner's eyes only; whoever serves them may read
            path.chmod((fresh / "README.md").stat().st_mode)
        try:
            if folder.exists():
                folder.rename(former)
            fresh.rename(folder)
        except BaseException:  # Ctrl-C too must not take the former one away
            if former.exists() and not folder.exists():
                former.rename(folder)
            raise


def _check_output(output: Path, overwrite: bool, base: Path) -> None:
    """Refuse what would take away something other than a model."""
    folder = output.expanduser().resolve()
    if folder.exists() and not folder.is_dir():
        raise ConfigurationError(f"'{output}' is a file: give a folder.")
    if not folder.exists() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise ConfigurationError(f"'{output}' is there and not empty: give another folder, or --overwrite.")
    kept = any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))
    if not kept or folder == base.resolve():
        what = "holds the base student" if folder == base.resolve() else "holds no model"
        raise ConfigurationError(f"'{output}' {what}, so --overwrite does not replace it: give another folder.")


def _summary(checkpoint: Checkpoint, written: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The run's summary if it was written at this very step; else what the checkpoint knows."""
    steps = int(checkpoint.state["global_step"])
    if written.get("steps") == steps:
        return dict(written)
    callbacks = checkpoint.state.get("callbacks", {})
    measured: dict[str, Any] = next((state for key, state in callbacks.items() if key.startswith("RunSummary")), {})
    return {
        "before": measured.get("before", {}),
        "after": {},
        "teacher": measured.get("teacher", {}),
        "steps": steps,
        "seed": settings.get("seed_everything", 0),
        "student": settings["model"]["student"],
        "versions": versions(),
    }
