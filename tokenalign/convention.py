"""Conventions of a chat format: what stands around a text without being part of it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from tokenalign.source import Source, load
from tokenalign.template import render
from tokenalign.vocabulary import Vocabulary, vocabulary_of

# Texts that no template contains, so that a rendering shows what surrounds them.
_SYSTEM, _USER, _USER_2, _ASSISTANT, _REASONING = (f"sentinel{letter}0text" for letter in "SUVAR")


@dataclass(frozen=True, kw_only=True, slots=True)
class Convention:
    """How one side opens and ends turns. Ids are the side's own."""

    bos: int | None = None
    """The token that opens every text, whether the tokenizer or the template adds it."""
    turn_end: frozenset[int] = frozenset()
    """Every id that ends an assistant's turn."""
    pad: int | None = None
    roles: Mapping[str, str] = field(default_factory=dict)
    """The text before the content of each role that the template accepts."""
    generation_prefix: str = ""
    """The text that asks the assistant to speak, an opening reasoning tag included."""
    default_system: str | None = None
    """The system prompt that the template adds where the conversation has none."""
    reasoning_tags: tuple[str, ...] = ()
    """Opening and closing tag of the reasoning, where the template shows them."""
    own_turn_end: int | None = None
    """The id by which the template itself ends an assistant's turn; else the declared end of text."""
    problem: str | None = None
    """Why the template could not be rendered, if so."""

    @classmethod
    def detect(cls, tokenizer: Any, chat_template: str | None = None) -> "Convention":
        """Find the conventions by rendering the chat template with sentinel texts, not by the model's name.

        Args:
            tokenizer: Whatever `Pair` accepts.
            chat_template: A template to use in place of the tokenizer's own.

        Raises:
            FileNotFoundError, ValueError: As `Pair`. A template that cannot be rendered is no error: see `problem`.
        """
        source = load(tokenizer)
        return detect(source, vocabulary_of(source), chat_template or source.chat_template)


def detect(source: Source, vocabulary: Vocabulary, template: str | None) -> Convention:
    """`Convention.detect` for a tokenizer that is read already."""
    declared = {key: vocabulary.id_of(content) for key, content in source.special.items()}
    eos, pad = declared.get("eos_token"), declared.get("pad_token")
    named = source.end_ids | ({eos} if eos is not None else set())
    ends = frozenset(id for id in named if id < vocabulary.size)
    plain = Convention(
        bos=_added_bos(source, vocabulary),
        turn_end=ends,
        pad=_pad_of(source, vocabulary) if pad is None else pad,
        own_turn_end=min(ends, default=None) if eos is None else eos,
    )
    return plain if template is None else _rendered(plain, _Renderer(template, source, vocabulary))


def _added_bos(source: Source, vocabulary: Vocabulary) -> int | None:
    """The control token that the tokenizer itself puts before a text."""
    encoding = source.tokenizer.encode("a")
    first = next((id for id, live in zip(encoding.ids, encoding.attention_mask, strict=True) if live), None)
    return first if first is not None and vocabulary.special[first] else None


def _pad_of(source: Source, vocabulary: Vocabulary) -> int | None:
    """Of a bare tokenizer: its padding settings, or a control token whose name says so."""
    if source.tokenizer.padding:
        return int(source.tokenizer.padding["pad_id"])
    special = {id: entry["content"] for id, entry in vocabulary.added.items() if entry["special"]}
    return next((id for id, content in special.items() if content.strip("<|>[]").lower() == "pad"), None)


class _Renderer:
    """One template, and the control tokens in what it renders."""

    def __init__(self, template: str, source: Source, vocabulary: Vocabulary) -> None:
        self.template, self.special = template, source.special
        self.ids = {entry["content"]: id for id, entry in vocabulary.added.items() if entry["special"]}
        longest_first = sorted(self.ids, key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def __call__(self, *messages: tuple[str, str], reasoning: str | None = None, prompt: bool = False) -> str:
        conversation = [{"role": role, "content": content} for role, content in messages]
        if reasoning is not None:
            conversation[-1]["reasoning_content"] = reasoning
        return render(self.template, conversation, add_generation_prompt=prompt, **self.special)

    def attempt(self, *messages: tuple[str, str], **options: Any) -> str:
        """The text, empty where the template refuses such a conversation."""
        try:
            return self(*messages, **options)
        except ValueError:
            return ""


def _rendered(plain: Convention, renderer: _Renderer) -> Convention:
    """Complete what is declared by what the template shows."""
    question, answer = ("user", _USER), ("assistant", _ASSISTANT)
    try:
        asked, answered = renderer(question), renderer(question, answer)
        asking = renderer(question, prompt=True)
    except ValueError as error:
        return replace(plain, problem=str(error))
    roles = _roles(renderer, asked, answered)
    bos = _opening(renderer, asked)
    generation = asking.removeprefix(asked) if asking.startswith(asked) else asking.partition(_USER)[2]
    end = renderer.control.search(answered.partition(_ASSISTANT)[2])
    own_end = renderer.ids[end[0]] if end else plain.own_turn_end
    return replace(
        plain,
        bos=plain.bos if bos is None else renderer.ids[bos],
        turn_end=plain.turn_end | ({own_end} if own_end is not None else set()),
        own_turn_end=own_end,
        roles={role: header.removeprefix(bos or "") for role, header in roles.items()},
        generation_prefix=generation,
        default_system=_default_system(renderer, asked.removeprefix(bos or ""), roles),
        reasoning_tags=_reasoning_tags(renderer, generation.removeprefix(roles["assistant"])),
    )


def _opening(renderer: _Renderer, asked: str) -> str | None:
    """A control token that opens the conversation but no turn: the next turn does not begin with it."""
    first = renderer.control.match(asked)
    turns = renderer.attempt(("user", _USER), ("assistant", _ASSISTANT), ("user", _USER_2))
    if first is None or turns.count(first[0]) != 1:
        return None
    # The header of a default system prompt, such as <|system|>, occurs once too; alone, it also opens an explicit one.
    explicit = renderer.attempt(("system", _SYSTEM), ("user", _USER)).partition(_SYSTEM)[0]
    declared = renderer.special.get("bos_token") == first[0]
    return first[0] if declared or explicit.strip() != first[0] else None


def _roles(renderer: _Renderer, asked: str, answered: str) -> dict[str, str]:
    """The header of each role that the template accepts, where one turn follows another if possible."""
    end = answered.partition(_ASSISTANT)[2]
    turns = renderer.attempt(("user", _USER), ("assistant", _ASSISTANT), ("user", _USER_2))
    user = turns.partition(_ASSISTANT)[2].partition(_USER_2)[0] or asked.partition(_USER)[0]
    roles = {
        "user": user.removeprefix(end),
        "assistant": answered.partition(_USER)[2].partition(_ASSISTANT)[0].removeprefix(asked.partition(_USER)[2]),
    }
    system = renderer.attempt(("system", _SYSTEM), ("user", _USER))
    return roles | ({"system": system.partition(_SYSTEM)[0]} if _SYSTEM in system else {})


def _default_system(renderer: _Renderer, asked: str, roles: Mapping[str, str]) -> str | None:
    """What precedes the first user turn, without the headers and ends of turns."""
    added = asked.partition(_USER)[0].removesuffix(roles["user"])
    explicit = renderer.attempt(("system", _SYSTEM), ("user", _USER))
    before, _, after = explicit.partition(_SYSTEM)
    bare = added.removeprefix(before).removesuffix(after.partition(_USER)[0].removesuffix(roles["user"]))
    return bare.strip() or None


def _reasoning_tags(renderer: _Renderer, opening: str) -> tuple[str, ...]:
    """The tags around a message's reasoning, or the one that the generation prefix opens."""
    shown = renderer.attempt(("user", _USER), ("assistant", _ASSISTANT), reasoning=_REASONING)
    around = re.search(rf"(<[^<>\s]+>)\s*{_REASONING}\s*(<[^<>\s]+>)", shown)
    if around:
        return around[1], around[2]
    opened = re.search(r"<(\w+)>", opening)
    return (f"<{opened[1]}>", f"</{opened[1]}>") if opened else ()
