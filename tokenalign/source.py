"""Where a tokenizer comes from: a folder, a file, a `tokenizers.Tokenizer` or a wrapper around one."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A tokenizer with what its owner says about it."""

    tokenizer: Tokenizer
    name: str
    chat_template: str | None = None
    special: Mapping[str, str] = field(default_factory=dict)
    """Declared roles such as `{"eos_token": "<|im_end|>"}`."""
    end_ids: frozenset[int] = frozenset()
    """End-of-turn ids that the generation settings name."""


def load(side: Any) -> Source:
    """Read one side of a pair.

    Args:
        side: A Hugging Face folder, a `tokenizer.json`, a `tokenizers.Tokenizer`, or an object whose
            `backend_tokenizer` is one (its `chat_template`, `special_tokens_map` and `generation_config` are used where
            present).

    Raises:
        FileNotFoundError: The path does not exist or holds no `tokenizer.json`.
        ValueError: The object or file is of a kind that is not supported.
    """
    if isinstance(side, Source):
        return side
    if isinstance(side, str | Path):
        return _from_path(Path(side))
    if isinstance(side, Tokenizer):
        return Source(tokenizer=side, name="tokenizer")
    backend = getattr(side, "backend_tokenizer", None)
    if not isinstance(backend, Tokenizer):
        raise ValueError(
            f"{type(side).__name__} is no tokenizer. Give a path, a tokenizers.Tokenizer, or an object with a "
            "`.backend_tokenizer` (a fast Hugging Face tokenizer)."
        )
    return Source(
        tokenizer=backend,
        name=str(getattr(side, "name_or_path", "") or type(side).__name__),
        chat_template=_one_template(getattr(side, "chat_template", None)),
        special=_contents(getattr(side, "special_tokens_map", None) or {}),
        end_ids=_end_ids(side),
    )


def _end_ids(side: Any) -> frozenset[int]:
    """End-of-turn ids of an object: from its generation settings, or those of the folder that it was read from."""
    settings = getattr(side, "generation_config", None)
    folder = str(getattr(side, "name_or_path", "") or "")
    if settings is None and folder and Path(folder).is_dir():
        return _ids(_read_json(Path(folder) / "generation_config.json").get("eos_token_id"))
    return _ids(getattr(settings, "eos_token_id", None))


def _from_path(path: Path) -> Source:
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist. Give a folder with a tokenizer.json, or the file itself.")
    if path.is_file():
        return Source(tokenizer=_read_tokenizer(path), name=path.name)
    if not (path / "tokenizer.json").exists():
        _refuse_model_file(path)
        raise FileNotFoundError(f"{path} holds no tokenizer.json. Save the tokenizer there in its fast form.")
    config = _read_json(path / "tokenizer_config.json")
    return Source(
        tokenizer=_read_tokenizer(path / "tokenizer.json"),
        name=path.name,
        chat_template=_folder_template(path, config),
        special=_contents(config),
        end_ids=_ids(_read_json(path / "generation_config.json").get("eos_token_id")),
    )


def _read_tokenizer(path: Path) -> Tokenizer:
    if path.suffix == ".model":
        _refuse_model_file(path)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"{path} is no tokenizer.json: {error}") from error


def _refuse_model_file(path: Path) -> None:
    models = [path] if path.is_file() else sorted(path.glob("*.model"))
    if models:
        raise ValueError(f"{models[0]}: sentencepiece model files are not supported yet. Convert it to tokenizer.json.")


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}. Repair or remove the file.") from error
    return content if isinstance(content, dict) else {}


def _folder_template(path: Path, config: Mapping[str, Any]) -> str | None:
    """The same order in which Hugging Face looks: a file of its own beats the settings."""
    jinja = path / "chat_template.jinja"
    if jinja.exists():
        return jinja.read_text(encoding="utf-8")
    alone = _read_json(path / "chat_template.json").get("chat_template")
    return _one_template(alone or config.get("chat_template"))


def _one_template(template: Any) -> str | None:
    """Of several named templates the one called `default`, or else the first."""
    if isinstance(template, list):
        template = {entry.get("name", ""): entry.get("template") for entry in template}
    if isinstance(template, Mapping):
        template = template.get("default") or next(iter(template.values()), None)
    return template if isinstance(template, str) else None


def _contents(declared: Mapping[str, Any]) -> dict[str, str]:
    """`{"eos_token": content}` from settings in which a token is a string or an object with `content`."""
    contents = {}
    for key, value in declared.items():
        content = value.get("content") if isinstance(value, Mapping) else value
        if key.endswith("_token") and content is not None and not isinstance(content, bool | list):
            contents[key] = str(content)
    return contents


def _ids(value: int | list[int] | None) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset([value] if isinstance(value, int) else value)
