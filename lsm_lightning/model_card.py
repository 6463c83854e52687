"""The README.md of a trained student: where it comes from, what it can do, how to load it."""

import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from lsm_lightning.pretrained import EMBEDDED

USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("path/of/this/folder")
model = AutoModelForCausalLM.from_pretrained("path/of/this/folder")
messages = [{"role": "user", "content": "..."}]
prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**prompt, max_new_tokens=256)
print(tokenizer.decode(answer[0, prompt["input_ids"].shape[1] :]))
```

or `vllm serve path/of/this/folder`. `generation_config.json` holds the sampling of the training's rollouts and every
token that ends a turn."""


def model_card(config: Mapping[str, Any], summary: Mapping[str, Any]) -> str:
    """A model card in Markdown, with the metadata that model hubs read.

    Args:
        config: The run's settings, as in its `config.yaml`; empty where a run had no such file.
        summary: What was measured, as in `summary.json`: `student`, `steps`, `seed`, `versions`, and `before`, `after`
            and `teacher`, each task → `{"value", "n", "low", "high"}` or empty where nothing was measured.
    """
    student = str(summary["student"])
    parts = [
        _metadata(student),
        f"# {_short(student)}, distilled on-policy",
        f"Trained from `{student}` in {summary['steps']} steps with lsm_lightning: the student wrote answers, the "
        "task's teacher scored every token of them, and the student learned from the comparison.",
        _markdown_table(("", ""), _provenance(config, summary)),
        "## Success on held-out problems",
        _scores(summary),
        "## How to load it",
        USE,
        "## Versions",
        ", ".join(f"{name} {version}" for name, version in summary["versions"].items()),
    ]
    if config:
        settings = yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=120)
        # Four backticks, since a chat template among the settings may hold three.
        parts += ["## Settings", f"````yaml\n{settings}````"]
    return "\n\n".join(parts) + "\n"


def percent(score: Mapping[str, float]) -> str:
    """A success rate with its 95 % interval.

    >>> percent({"value": 0.985, "n": 400, "low": 0.9676, "high": 0.9931})
    '98.5 (97–99)'
    """
    return f"{100 * score['value']:.1f} ({100 * score['low']:.0f}–{100 * score['high']:.0f})"


def versions() -> dict[str, str]:
    """Of Python and of the packages that a result depends on."""
    names = ("lsm-lightning", "lightning", "torch", "transformers", "tokenizers")
    return {"python": platform.python_version(), **{name: _version(name) for name in names}}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _metadata(student: str) -> str:
    metadata: dict[str, Any] = {"library_name": "transformers", "pipeline_tag": "text-generation"}
    if not student.startswith(EMBEDDED) and student.count("/") == 1 and not Path(student).exists():
        metadata["base_model"] = student  # hubs refuse anything but a hub id
    metadata["tags"] = ["on-policy-distillation", "lsm-lightning"]
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---"


def _provenance(config: Mapping[str, Any], summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What a reader asks first; all the rest stands under the settings."""
    model, data = config.get("model") or {}, config.get("data") or {}
    rows = [("base student", f"`{summary['student']}`")]
    rows += [(f"teacher of {task}", _component(teacher)) for task, teacher in (model.get("teachers") or {}).items()]
    rows += [(f"data of {task}", _component(played)) for task, played in (data.get("tasks") or {}).items()]
    rows += [
        (label, _component(settings[name]))
        for label, settings, name in (
            ("objective", model, "objective"),
            ("mask", model, "mask"),
            ("reduction", model, "reduction"),
            ("sampling of rollouts", model, "sampling"),
            ("sampling of evaluations", model, "eval_sampling"),
            ("optimiser", model, "optimizer"),
            ("schedule of the learning rate", model, "lr_scheduler"),
            ("prompts a step", data, "prompts_per_step"),
            ("answers a prompt", data, "samples_per_prompt"),
        )
        if settings.get(name) is not None
    ]
    return [*rows, ("steps", str(summary["steps"])), ("seed", str(summary["seed"]))]


def _component(value: Any) -> str:
    """A class of the configuration with its settings, settings alone, or a plain value."""
    if not isinstance(value, Mapping):
        return f"`{value}`"
    name = value.get("class_path")
    settings = (value.get("init_args") or {}) if name else value
    told = ", ".join(f"{key} `{setting}`" for key, setting in settings.items() if setting not in (None, ""))
    return " · ".join(part for part in (f"`{name}`" if name else "", told) if part)


def _scores(summary: Mapping[str, Any]) -> str:
    columns = ("before", "after", "teacher")
    tasks = dict.fromkeys(task for column in columns for task in summary[column])
    if not tasks:
        return "Not measured."
    rows = []
    for task in tasks:
        of_task = [summary[column].get(task) for column in columns]
        problems = next(int(score["n"]) for score in of_task if score)
        rows.append((task, str(problems), *(percent(score) if score else "not measured" for score in of_task)))
    table = _markdown_table(("task", "problems", "base student", "this model", "teacher"), rows)
    return f"In %, with 95 % intervals, on the test split of each task.\n\n{table}"


def _markdown_table(header: tuple[str, ...], rows: list[Any]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join(f"| {' | '.join(' '.join(cell.replace('|', '∣').split()) for cell in line)} |" for line in lines)


def _short(student: str) -> str:
    return Path(student.removeprefix(EMBEDDED)).name
