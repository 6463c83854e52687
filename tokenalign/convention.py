"""Conventions of a chat format: what stands around a text without being part of it."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from tokenalign.conversation import (
    ANSWER,
    ASSISTANT,
    INSTRUCTED,
    NEXT,
    QUESTION,
    REASONING,
    RESULT,
    SYSTEM,
    TOOL,
    USER,
    USER_2,
    VALUE,
    Renderer,
)
from tokenalign.source import Source, load
from tokenalign.speller import Speller
from tokenalign.tags import TAGS, Held, checked_tags, holding
from tokenalign.vocabulary import Vocabulary, vocabulary_of


@dataclass(frozen=True, kw_only=True, slots=True)
class Convention:
    """How one side opens and ends turns. Ids are the side's own."""

    bos: int | None = None
    """The token that opens every text, whether the tokenizer or the template adds it."""
    turn_end: frozenset[int] = frozenset()
    """Every id that ends an assistant's turn: declared, named by the generation settings, or shown by the template."""
    own_turn_end: int | None = None
    """The id by which the template itself ends an answer; else the declared end of text."""
    pad: int | None = None
    roles: Mapping[str, str] = field(default_factory=dict)
    """The text before the content of each role that the template accepts: user, assistant, system, tool (there
    `{name}` stands for the tool's name)."""
    generation_prefix: str = ""
    """The text that asks the assistant to speak, an opening reasoning tag included."""
    default_system: str | None = None
    """The system prompt that the template adds where the conversation has none."""
    reasoning_tags: tuple[str, ...] = ()
    """What opens and closes the reasoning, where the template shows it."""
    no_reasoning: str = ""
    """What the template writes before an answer without reasoning, such as an empty pair of tags."""
    tool_tags: tuple[str, ...] = ()
    """What opens and closes a tool call, where the template shows it; one text where nothing closes it."""
    tags: Mapping[str, Held] = field(default_factory=dict)
    """How the tokenizer holds each tag: the usual ones, those that the template shows, and those that a caller names.
    A convention of a `Pair` has the tags of both sides."""
    problem: str | None = None
    """Why the template could not be rendered, if so."""

    @classmethod
    def detect(cls, tokenizer: Any, chat_template: str | None = None, *, tags: Iterable[str] = ()) -> "Convention":
        """Find the conventions by rendering the chat template with sentinel texts, not by the model's name.

        Args:
            tokenizer: Whatever `Pair` accepts.
            chat_template: A template to use in place of the tokenizer's own.
            tags: Further tags, see `Convention.tags`.

        Raises:
            FileNotFoundError, ValueError: As `Pair`. A template that cannot be rendered is no error: see `problem`.
        """
        source, named = load(tokenizer), checked_tags(tags)
        vocabulary = vocabulary_of(source)
        found = detect(source, vocabulary, chat_template or source.chat_template)
        every = all_tags(found, named=named)
        return replace(found, tags=holding(Speller(vocabulary, every), every))


def all_tags(*conventions: Convention, named: Iterable[str] = ()) -> tuple[str, ...]:
    """The usual tags, those of the conventions that a response's text can hold, and those that a caller names."""
    shown = (tag for c in conventions for pair in (c.reasoning_tags, c.tool_tags) if _plain(pair) for tag in pair)
    return tuple(dict.fromkeys([*TAGS, *shown, *named]))


def _plain(pair: tuple[str, ...]) -> bool:
    """True for two tags that a response can hold as text; a header of several words and tokens is none."""
    return len(pair) == 2 and all(map(_TAG.fullmatch, pair))


_TAG = re.compile(r"<\|?/?[^\s<>|]+\|?>|\[/?[^\s\[\]]+\]")
"""One bracketed word."""


def detect(source: Source, vocabulary: Vocabulary, template: str | None) -> Convention:
    """`Convention.detect` for a tokenizer that is read already."""
    declared = {key: vocabulary.id_of(content) for key, content in source.special.items()}
    eos, pad = declared.get("eos_token"), declared.get("pad_token")
    named = source.end_ids | ({eos} if eos is not None else set())
    ends = frozenset(id for id in named if id < vocabulary.size)
    plain = Convention(
        bos=source.bos,
        turn_end=ends,
        pad=_pad_of(vocabulary) if pad is None else pad,
        own_turn_end=min(ends, default=None) if eos is None else eos,
    )
    return plain if template is None else _rendered(plain, template, source, vocabulary)


def _pad_of(vocabulary: Vocabulary) -> int | None:
    """Of a bare tokenizer: its padding settings, or a control token whose name says so."""
    if vocabulary.kind.pad is not None:
        return vocabulary.kind.pad
    special = {id: entry.content for id, entry in vocabulary.added.items() if entry.special}
    return next((id for id, content in special.items() if content.strip("<|>[]").lower() == "pad"), None)


def _rendered(plain: Convention, template: str, source: Source, vocabulary: Vocabulary) -> Convention:
    """Complete what is declared by what the template shows."""
    try:
        renderer = Renderer(template, source, vocabulary)
        return _shown(plain, renderer)
    except ValueError as error:
        return replace(plain, problem=str(error))


def _shown(plain: Convention, renderer: Renderer) -> Convention:
    """Read the renderings of a question, an answer, a second question, and what else the template accepts."""
    question, answered = renderer.render(QUESTION), renderer.render(QUESTION, ANSWER)
    turns = renderer.attempt(QUESTION, ANSWER, NEXT)
    question_tail = _question_tail(renderer, question, answered)
    opening = _opening(renderer, question, turns)
    user = _user_header(renderer, question, answered, turns, opening)
    generation = renderer.asked().partition(USER)[2].removeprefix(question_tail)
    header = answered.partition(USER)[2].partition(ASSISTANT)[0].removeprefix(question_tail)
    reasoning = _reasoning_tags(renderer, question_tail, header, generation)
    assistant, empty = _without_reasoning(header, reasoning)
    system, default = _system(renderer, opening, question, user)
    tools, tool, call_ends = _tools(renderer, question_tail, answered)
    end = _turn_end(renderer, plain, answered, turns)
    roles = {"user": user, "assistant": assistant, "system": system, "tool": tool}
    return replace(
        plain,
        bos=next((renderer.ids[token] for token in renderer.controls(opening)), plain.bos),
        turn_end=plain.turn_end | {renderer.ids[token] for token in (end, call_ends) if token},
        own_turn_end=renderer.ids[end] if end else plain.own_turn_end,
        roles={role: text for role, text in roles.items() if text is not None},
        generation_prefix=generation,
        default_system=default,
        reasoning_tags=reasoning,
        no_reasoning=empty,
        tool_tags=tools,
    )


def _question_tail(renderer: Renderer, question: str, answered: str) -> str:
    """What ends a question; after the last message of all a template may write more."""
    last, between = question.partition(USER)[2], answered.partition(USER)[2].partition(ASSISTANT)[0]
    return last if between.startswith(last) else renderer.tail(last)


def _opening(renderer: Renderer, question: str, turns: str) -> str:
    """The control tokens that open a conversation but no turn: the next turn does not begin with them."""
    explicit = renderer.attempt(INSTRUCTED, QUESTION).partition(SYSTEM)[0]
    user = question.partition(USER)[0]
    opening = ""
    while (token := renderer.control.match(question, len(opening))) and turns.count(token[0]) == 1:
        longer = opening + token[0]
        # The header of a default system prompt, such as <|system|>, occurs once too; it alone opens an explicit one.
        header = explicit.strip() == longer and user.strip() != longer
        if header and renderer.special.get("bos_token") != token[0]:
            break
        opening = longer
    return opening


def _user_header(renderer: Renderer, question: str, answered: str, turns: str, opening: str) -> str:
    """Read where a second question follows an answer, so that nothing which opens the conversation is in it."""
    between = turns.partition(ASSISTANT)[2].partition(USER_2)[0]
    first = question.partition(USER)[0].removeprefix(opening)
    if not between:
        return first
    # What ends the answer goes first: up to what opens the first turn, or else as it ends the last one.
    opens = next(iter(renderer.controls(first)), "")
    if opens and opens in between:
        return between[between.index(opens) :]
    end = answered.partition(ASSISTANT)[2]
    if end and between.startswith(end) and between != end:
        return between.removeprefix(end)
    return between.removeprefix(renderer.tail(between))


def _without_reasoning(header: str, reasoning: tuple[str, ...]) -> tuple[str, str]:
    """An answer's header, and what stands there in place of reasoning."""
    start = header.find(reasoning[0]) if reasoning else -1
    return (header, "") if start < 0 else (header[:start], header[start:])


def _turn_end(renderer: Renderer, plain: Convention, answered: str, turns: str) -> str | None:
    """The control token after an answer; where the template writes none, the one that opens the next turn."""
    row = renderer.first_run(answered.partition(ASSISTANT)[2])
    if not row:
        row = renderer.first_run(turns.partition(ASSISTANT)[2].partition(USER_2)[0])[:1]
    # Of several in a row, such as the end of an answer's text and that of the turn, the declared one.
    return next((token for token in row if renderer.ids[token] == plain.own_turn_end), next(iter(row), None))


def _system(renderer: Renderer, opening: str, question: str, user: str) -> tuple[str | None, str | None]:
    """The header of a system turn, None where the template refuses one, and the prompt that stands there by default."""
    explicit = renderer.attempt(INSTRUCTED, QUESTION)
    before, _, after = explicit.removeprefix(opening).partition(SYSTEM)
    default = question.removeprefix(opening).partition(USER)[0].removesuffix(user)
    # By the pattern of the user's header, since the template may put words of its own before the system prompt.
    patterns = [user.replace(*words) for words in (("user", "system"), ("USER", "SYSTEM"), ("User", "System"))]
    header = next((text for text in patterns if text != user and (default or before).startswith(text)), before)
    tail = after.partition(USER)[0].removesuffix(user)
    if default and before.startswith(default):  # a prompt of its own that stays, before what the conversation says
        own = before.removeprefix(default)
    else:
        own = header if before.startswith(header) else before
    text = default.removeprefix(header).removesuffix(tail)
    return own if explicit else None, renderer.control.sub("", text).strip() or None


def _reasoning_tags(renderer: Renderer, question_tail: str, header: str, generation: str) -> tuple[str, ...]:
    """What stands around a message's reasoning, or the tag that the generation prefix opens."""
    reasoned = renderer.reasoned()
    around = re.search(rf"({_TAG.pattern})\s*{REASONING}\s*({_TAG.pattern})", reasoned)
    if around and around[2] == around[1][0] + "/" + around[1][1:]:
        return around[1], around[2]
    if reasoned:
        before, _, rest = reasoned.partition(USER)[2].removeprefix(question_tail).partition(REASONING)
        after = rest.partition(ASSISTANT)[0]
        opening = before[_common_start(before, generation or header) :].strip()
        closing = after.removesuffix(header).strip()
        if opening and closing:
            return opening, closing
    opened = re.search(r"<(\w+)>", generation.removeprefix(header))
    if opened:
        return f"<{opened[1]}>", f"</{opened[1]}>"
    return TAGS[:2] if renderer.removes(*TAGS[:2]) else ()


def _common_start(a: str, b: str) -> int:
    """Characters that two texts begin with alike."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _tools(renderer: Renderer, question_tail: str, answered: str) -> tuple[tuple[str, ...], str | None, str | None]:
    """What stands around a tool call, the header of a tool's result, and the control token that ends such a turn."""
    called, returned = renderer.called()
    if not called:
        return (), None, None
    before = called.partition(USER)[2].removeprefix(question_tail).partition(TOOL)[0]
    after = called.rpartition(VALUE)[2]
    result = returned.rpartition(RESULT)[0].rpartition(VALUE)[2]
    names = [name for name in re.findall(r"<(\w+)>", before) if f"</{name}>" in after]
    opens = [token for token in renderer.controls(before) if token not in answered]
    closes = [token for token in renderer.controls(after) if token not in answered]
    # The one that closes is spelled most like the one that opens.
    tags = (*opens[:1], *get_close_matches(opens[0], closes, 1, cutoff=0)) if opens else ()
    if names:
        tags = f"<{names[0]}>", f"</{names[0]}>"
    ends = [token for token in renderer.controls(after) if token not in tags]
    ends = ends[-1:] or [token for token in renderer.controls(result) if token not in tags][:1]
    header = result.removeprefix(after).replace(TOOL, "{name}") if returned else None
    return tags, header, next(iter(ends), None)
