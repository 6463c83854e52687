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
    return plain if template is None else _rendered(plain, template, source, vocabulary)


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
    """One template, and the control tokens in what it renders.

    Args:
        in_parts: Give each content as a list of typed parts, as templates of multi-modal models ask.
    """

    def __init__(self, template: str, source: Source, vocabulary: Vocabulary, *, in_parts: bool = False) -> None:
        self.template, self.special, self.in_parts = template, source.special, in_parts
        self.ids = {entry["content"]: id for id, entry in vocabulary.added.items() if entry["special"]}
        longest_first = sorted(self.ids, key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def __call__(self, *messages: tuple[str, str], reasoning: str | None = None, prompt: bool = False) -> str:
        conversation: list[dict[str, Any]] = [
            {"role": role, "content": [{"type": "text", "text": text}] if self.in_parts else text}
            for role, text in messages
        ]
        if reasoning is not None:
            conversation[-1]["reasoning_content"] = reasoning
        rendered = render(self.template, conversation, add_generation_prompt=prompt, **self.special)
        for _, text in messages:
            if text not in rendered:
                raise ValueError("the chat template leaves out what a message says")
        return rendered

    def attempt(self, *messages: tuple[str, str], **options: Any) -> str:
        """The text, empty where the template refuses such a conversation."""
        try:
            return self(*messages, **options)
        except ValueError:
            return ""

    def tail(self, text: str) -> str:
        """What ends a turn at the start of a text: one control token and what follows it up to the next."""
        controls = [match.start() for match in self.control.finditer(text)]
        return text[: controls[1]] if len(controls) > 1 else text


_QUESTION, _ANSWER = ("user", _USER), ("assistant", _ASSISTANT)


def _rendered(plain: Convention, template: str, source: Source, vocabulary: Vocabulary) -> Convention:
    """Complete what is declared by what the template shows."""
    problem = ""
    for in_parts in (False, True):
        renderer = _Renderer(template, source, vocabulary, in_parts=in_parts)
        try:
            return _shown(plain, renderer, renderer(_QUESTION), renderer(_QUESTION, _ANSWER))
        except ValueError as error:
            problem = problem or str(error)
    return replace(plain, problem=problem)


def _shown(plain: Convention, renderer: _Renderer, asked: str, answered: str) -> Convention:
    """Read the renderings of a question, and of a question and its answer."""
    question_tail = renderer.tail(asked.partition(_USER)[2])
    user, assistant = _user_header(renderer, asked, answered), _between(answered, question_tail)
    opening = _opening(renderer, asked, user)
    system, default = _system(renderer, opening, asked, user)
    generation = renderer(_QUESTION, prompt=True).partition(_USER)[2].removeprefix(question_tail)
    end = renderer.control.search(answered.partition(_ASSISTANT)[2])
    own_end = renderer.ids[end[0]] if end else plain.own_turn_end
    first = renderer.control.match(opening)
    return replace(
        plain,
        bos=renderer.ids[first[0]] if first else plain.bos,
        turn_end=plain.turn_end | ({own_end} if own_end is not None else set()),
        own_turn_end=own_end,
        roles={"user": user, "assistant": assistant} | ({} if system is None else {"system": system}),
        generation_prefix=generation,
        default_system=default,
        reasoning_tags=_reasoning_tags(renderer, generation.removeprefix(assistant)),
    )


def _between(answered: str, question_tail: str) -> str:
    """The header of the assistant's turn."""
    return answered.partition(_USER)[2].partition(_ASSISTANT)[0].removeprefix(question_tail)


def _user_header(renderer: _Renderer, asked: str, answered: str) -> str:
    """Read where a second question follows an answer, so that nothing which opens the conversation is in it."""
    turns = renderer.attempt(_QUESTION, _ANSWER, ("user", _USER_2))
    answer_tail = renderer.tail(answered.partition(_ASSISTANT)[2])
    return turns.partition(_ASSISTANT)[2].partition(_USER_2)[0].removeprefix(answer_tail) or asked.partition(_USER)[0]


def _opening(renderer: _Renderer, asked: str, user: str) -> str:
    """The control tokens that open a conversation but no turn: the next turn does not begin with them."""
    turns = renderer.attempt(_QUESTION, _ANSWER, ("user", _USER_2))
    explicit = renderer.attempt(("system", _SYSTEM), _QUESTION).partition(_SYSTEM)[0]
    opening = ""
    while (token := renderer.control.match(asked, len(opening))) and turns.count(token[0]) == 1:
        longer = opening + token[0]
        # The header of a default system prompt, such as <|system|>, occurs once too; it alone opens an explicit one.
        header = explicit.strip() == longer and not asked.startswith(longer + user)
        if header and renderer.special.get("bos_token") != token[0]:
            break
        opening = longer
    return opening


def _system(renderer: _Renderer, opening: str, asked: str, user: str) -> tuple[str | None, str | None]:
    """The header of a system turn, None where the template refuses one, and the prompt that stands there by default."""
    explicit = renderer.attempt(("system", _SYSTEM), _QUESTION)
    before, _, after = explicit.removeprefix(opening).partition(_SYSTEM)
    # By the pattern of the user's header, since the template may put words of its own before the system prompt.
    patterns = (user.replace("user", "system"), user.replace("USER", "SYSTEM"))
    header = next((pattern for pattern in patterns if pattern != user and before.startswith(pattern)), before)
    tail = after.partition(_USER)[0].removesuffix(user)
    default = asked.removeprefix(opening).partition(_USER)[0].removesuffix(user)
    return header if explicit else None, default.removeprefix(header).removesuffix(tail).strip() or None


def _reasoning_tags(renderer: _Renderer, opening: str) -> tuple[str, ...]:
    """The tags around a message's reasoning, or the one that the generation prefix opens."""
    shown = renderer.attempt(_QUESTION, _ANSWER, reasoning=_REASONING)
    around = re.search(rf"([<\[]\w+[>\]])\s*{_REASONING}\s*([<\[]/\w+[>\]])", shown)
    if around:
        return around[1], around[2]
    opened = re.search(r"<(\w+)>", opening)
    return (f"<{opened[1]}>", f"</{opened[1]}>") if opened else ()
