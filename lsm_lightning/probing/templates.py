"""Whether a chat template keeps a task's text and asks for an answer, and whether the context holds both."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from lsm_lightning.pretrained import render
from lsm_lightning.probing.finding import Finding, ok, refused, unknown, warning
from lsm_lightning.types import Message
from tokenalign.visible import visible

SHOWN = 40
"""Characters of a text in a message."""
ANSWER = "Understood."
"""Stands for an answer where one is looked for."""


def check_template(side: str, tokenizer: PreTrainedTokenizerBase, conversations: Sequence[list[Message]]) -> Finding:
    """Render real prompts and look for the task's text and for what makes the assistant speak.

    Args:
        side: `student` or `teacher`.
        tokenizer: With the chat template.
        conversations: What the task asks, at least one; a template is a program, and may refuse one of them.
    """
    check, remedy = f"{side}'s template", f"Set chat_template of the {side} to one that fits the model"
    for messages in conversations:
        try:
            found = _look(tokenizer, messages)
        except Exception as error:  # whatever a template can do wrong
            return refused(check, f"It cannot be rendered: {_first_line(error)}", f"{remedy}.")
        if found is not None:
            return refused(check, found, f"{remedy}.")
    if changed := _changed(tokenizer, conversations):
        return warning(
            check,
            f"The tokenizer changes the question near {_excerpt(changed)}",
            f"See `python -m tokenalign selfcheck` on the {side}, and take another tokenizer or other problems.",
        )
    prefix = _prefix(_render(tokenizer, conversations[0]), conversations[0])
    return ok(check, f"It holds the question whole and ends in {_excerpt(prefix)}")


def check_room(side: str, longest: Sequence[int], new: int, limit: int | None) -> Finding:
    """Whether a side's context holds a prompt and the longest answer.

    A later turn without room for the longest answer gets shorter ones, or its teacher leaves it out where they are too
    long; without room for any, episodes end there, or are not taught from there on.

    Args:
        side: `student` or `teacher`.
        longest: Tokens of the longest prompt at hand, turn by turn; at least of the first.
        new: The task's max_new_tokens.
        limit: Tokens of the context; None if it has no limit, or none that is known.
    """
    too_long = limit is not None and longest[0] + new > limit
    turn = 0 if too_long else max(range(len(longest)), key=longest.__getitem__)
    prompt, where = longest[turn], f" in turn {turn + 1}" if len(longest) > 1 else ""
    after = ", after answers of one word," if turn else ""
    check, size = f"{side}'s context", f"A prompt of {prompt} tokens{where}{after} and max_new_tokens={new}"
    if limit is None:
        return unknown(check, f"{size} are to fit; no limit is known")
    if prompt + new > limit:
        return (refused if too_long or prompt >= limit else warning)(
            check,
            f"{size} exceed the {side}'s context of {limit} tokens",
            "Lower the task's max_new_tokens, shorten its prompt, or take a model with a longer context.",
        )
    return ok(check, f"{size} fit into {limit}")


def longest_prompt(tokenizer: PreTrainedTokenizerBase, conversations: list[list[Message]]) -> int:
    """Tokens of the longest of some prompts."""
    return max(map(len, render(tokenizer, conversations)))


def _render(tokenizer: PreTrainedTokenizerBase, messages: list[Message], prompt: bool = True) -> str:
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False))


def _asked(messages: list[Message]) -> list[str]:
    """What no template may leave out; earlier answers may lose their reasoning."""
    return [message["content"].strip() for message in messages if message["role"] != "assistant"]


def _prefix(rendered: str, messages: list[Message]) -> str:
    """What stands behind the last text of a prompt."""
    last = messages[-1]["content"].strip()
    return rendered[rendered.rfind(last) + len(last) :]


def _look(tokenizer: PreTrainedTokenizerBase, messages: list[Message]) -> str | None:
    """What is wrong with a rendered prompt."""
    rendered = _render(tokenizer, messages)
    if missing := [text for text in _asked(messages) if text not in rendered]:
        return f"It leaves out what the task says: {_excerpt(missing[0])}"
    without = _render(tokenizer, messages, prompt=False)
    if rendered.rstrip() != without.rstrip():
        return None
    # Some templates need no prefix: the mark behind a question stands before an answer, and nothing else does.
    answered = _render(tokenizer, [*messages, {"role": "assistant", "content": ANSWER}], prompt=False)
    before = answered[: answered.rfind(ANSWER)]
    if before.rstrip() == rendered.rstrip() and _prefix(rendered, messages).strip():
        return None
    return f"It does not ask the assistant to speak: a prompt ends in {_excerpt(rendered[-SHOWN:])}"


def _changed(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[list[Message]]) -> str | None:
    """A text that does not come back from its tokens, runs of blanks aside."""
    for messages, ids in zip(conversations, render(tokenizer, list(conversations)), strict=True):
        back = " ".join(str(tokenizer.decode(ids, clean_up_tokenization_spaces=False)).split())
        for text in _asked(messages):
            words = text.split()
            if " ".join(words) not in back:
                held = next((n for n in range(len(words), 0, -1) if " ".join(words[:n]) in back), 0)
                return " ".join(words[held:])
    return None


def _excerpt(text: str) -> str:
    shown = visible(text, blanks=False)
    return f"'{shown}'" if len(shown) <= SHOWN else f"'{shown[:SHOWN]}…'"


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
