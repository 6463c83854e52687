"""Where a tokenizer comes from: a folder, a file, a library's object or a wrapper around one."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenalign.kinds import Added, Kind
from tokenalign.kinds.reading import added_tokens, kind_of_object, read


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """A tokenizer with what its owner says about it."""

    kind: Kind
    name: str
    chat_template: str | None = None
    special: Mapping[str, str] = field(default_factory=dict)
    """Declared roles such as `{"eos_token": "<|im_end|>"}`."""
    end_ids: frozenset[int] = frozenset()
    """End-of-turn ids that the generation settings name."""
    bos: int | None = None
    """The control token that the tokenizer itself puts before a text."""


def load(side: Any) -> Source:
    """Read one side of a pair.

    Args:
        side: A Hugging Face folder; a `tokenizer.json`, a `tekken.json` or a sentencepiece model, or a folder that
            holds one; a `tokenizers.Tokenizer`, a `tiktoken.Encoding`, a `sentencepiece.SentencePieceProcessor`; or
            an object with one of these as its `backend_tokenizer` or `sp_model` (its `chat_template`,
            `special_tokens_map` and `generation_config` are used where present).

    Raises:
        FileNotFoundError: The path does not exist or holds no tokenizer.
        ValueError: The object or file is no tokenizer, damaged, or of a kind that is not supported.
    """
    if isinstance(side, Source):
        return side
    if isinstance(side, str | Path):
        return _from_path(Path(side))
    name = str(getattr(side, "name_or_path", "") or getattr(side, "name", "") or type(side).__name__)
    try:
        kind = kind_of_object(side)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    if kind is None:
        raise ValueError(
            f"{type(side).__name__} is no tokenizer. Give a path, a tokenizers.Tokenizer, a tiktoken.Encoding, a "
            "sentencepiece.SentencePieceProcessor, or an object with a `.backend_tokenizer` (a fast Hugging Face "
            "tokenizer)."
        )
    return Source(
        kind=kind,
        name=name,
        chat_template=_one_template(getattr(side, "chat_template", None)),
        special={**kind.declared, **_contents(getattr(side, "special_tokens_map", None) or {})},
        end_ids=_end_ids(side),
        bos=kind.bos,
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
        kind = _read(path)
        return Source(kind=kind, name=path.name, special=kind.declared, bos=kind.bos)
    config = _read_json(path / "tokenizer_config.json")
    beyond = added_tokens(_mapping(config.get("added_tokens_decoder")), _read_json(path / "added_tokens.json"))
    kind = _read(_tokenizer_in(path), beyond)
    special = {**kind.declared, **_contents(_read_json(path / "special_tokens_map.json")), **_contents(config)}
    added_bos = kind.id_of(special.get("bos_token", "")) if config.get("add_bos_token") else None
    return Source(
        kind=kind,
        name=path.name,
        chat_template=_folder_template(path, config),
        special=special,
        end_ids=_ids(_read_json(path / "generation_config.json").get("eos_token_id")),
        bos=added_bos if kind.bos is None else kind.bos,
    )


def _tokenizer_in(folder: Path) -> Path:
    """The file that holds a folder's tokenizer; the fast form is preferred, as it is elsewhere."""
    named = [folder / name for name in ("tokenizer.json", "tekken.json", "tokenizer.model")]
    others = [file for pattern in ("*.model*", "*.tiktoken") for file in sorted(folder.glob(pattern))]
    found = [file for file in named if file.is_file()] or others
    if not found:
        raise FileNotFoundError(
            f"{folder} holds no tokenizer.json, tekken.json or sentencepiece .model. Save the tokenizer there."
        )
    if found == others and len(others) > 1:
        raise ValueError(f"{folder} holds {', '.join(file.name for file in others)}. Give the path of one of them.")
    return found[0]


def _read(path: Path, beyond: tuple[tuple[int, Added], ...] = ()) -> Kind:
    try:
        return read(path.read_bytes(), beyond)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _read_json(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON: {error}. Repair or remove the file.") from error
    return _mapping(content)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _folder_template(path: Path, config: Mapping[str, Any]) -> str | None:
    """The same order in which Hugging Face looks: a file of its own beats the settings."""
    jinja = path / "chat_template.jinja"
    if jinja.exists():
        try:
            return jinja.read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{jinja} is no text: {error}. Repair or remove the file.") from error
    alone = _read_json(path / "chat_template.json").get("chat_template")
    return _one_template(alone or config.get("chat_template"))


def _one_template(template: Any) -> str | None:
    """Of several named templates the one called `default`, or else the first."""
    if isinstance(template, list):
        entries = [entry for entry in template if isinstance(entry, Mapping)]
        template = {str(entry.get("name", "")): entry.get("template") for entry in entries}
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


def _ids(value: Any) -> frozenset[int]:
    """An id, several or none, as generation settings name the end-of-turn tokens."""
    ids = [] if value is None else value if isinstance(value, list | tuple | set | frozenset) else [value]
    if not all(isinstance(id, int) and not isinstance(id, bool) and id >= 0 for id in ids):
        raise ValueError(f"the generation settings have eos_token_id {value!r}, expected ids. Repair or remove them.")
    return frozenset(ids)
