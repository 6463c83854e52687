"""Conversations of texts that no template contains, so that a rendering shows what stands around each."""

import re
from collections.abc import Mapping
from typing import Any

from tokenalign.source import Source
from tokenalign.template import ChatTemplate
from tokenalign.vocabulary import Vocabulary

SYSTEM, USER, USER_2, ASSISTANT, REASONING, TOOL, KEY, VALUE, RESULT = (f"sentinel{c}0text" for c in "SUVARNKWT")
Message = dict[str, Any]
QUESTION: Message = {"role": "user", "content": USER}
ANSWER: Message = {"role": "assistant", "content": ASSISTANT}
NEXT: Message = {"role": "user", "content": USER_2}
INSTRUCTED: Message = {"role": "system", "content": SYSTEM}

_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": TOOL,
            "description": "Does something.",
            "parameters": {
                "type": "object",
                "properties": {KEY: {"type": "string", "description": "Something."}},
                "required": [KEY],
            },
        },
    }
]
_CALL_ID = "call00000"  # nine letters and digits, since some templates insist on that


def calling(arguments: Mapping[str, str] | str) -> Message:
    """An assistant's message that calls the tool."""
    call = {"type": "function", "id": _CALL_ID, "function": {"name": TOOL, "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


RETURNED: Message = {"role": "tool", "name": TOOL, "tool_call_id": _CALL_ID, "content": RESULT}


class Renderer:
    """One template in the way in which it wants to be asked, and the control tokens in what it renders.

    Raises:
        ValueError: The template renders a plain question and its answer in no way.
    """

    def __init__(self, source_text: str, source: Source, vocabulary: Vocabulary) -> None:
        self.special = source.special
        self.ids = {entry.content: id for id, entry in vocabulary.added.items() if entry.special}
        longest_first = sorted(self.ids, key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
        self._template = ChatTemplate(source_text)
        self._in_parts, self._variables = self._way()

    def _way(self) -> tuple[bool, dict[str, Any]]:
        """Contents as texts or as typed parts, as multi-modal templates ask; and what else the template insists on."""
        unknown = dict.fromkeys(self._template.variables - self.special.keys(), "26 Jul 2024")
        ways = [(parts, variables) for variables in ({}, {"tools": _TOOLS}, unknown) for parts in (False, True)]
        problem: ValueError | None = None
        for self._in_parts, self._variables in ways:
            try:
                self.render(QUESTION)
                self.render(QUESTION, ANSWER)
            except ValueError as error:
                problem = problem or error
            else:
                return self._in_parts, self._variables
        raise problem or AssertionError

    def render(self, *messages: Message, **options: Any) -> str:
        """The conversation's text.

        Raises:
            ValueError: The template refuses it or leaves out what a message says.
        """
        variables = {**self.special, **self._variables, **options}
        rendered = self._template.render([self._typed(message) for message in messages], **variables)
        if any(message["content"] not in rendered for message in messages):
            raise ValueError("the chat template leaves out what a message says")
        return rendered

    def _typed(self, message: Message) -> Message:
        content = message["content"]
        return message | {"content": [{"type": "text", "text": content}]} if self._in_parts and content else message

    def attempt(self, *messages: Message, **options: Any) -> str:
        """As `render`, empty where the template refuses such a conversation."""
        try:
            return self.render(*messages, **options)
        except ValueError:
            return ""

    def asked(self) -> str:
        """What asks the assistant to speak, after a question."""
        return self.render(QUESTION, add_generation_prompt=True)

    def reasoned(self) -> str:
        """A question, and an answer with reasoning under whatever name the template knows; empty if none."""
        for name in ("reasoning_content", "reasoning", "thinking"):
            rendered = self.attempt(QUESTION, ANSWER | {name: REASONING})
            if REASONING in rendered:
                return rendered
        parts = [{"type": "thinking", "thinking": [{"type": "text", "text": REASONING}]}]
        parts += [{"type": "text", "text": ASSISTANT}]
        try:
            rendered = self._template.render([self._typed(QUESTION), ANSWER | {"content": parts}], **self.special)
        except ValueError:
            return ""
        # A template that writes the list as it is does not know of reasoning.
        return rendered if REASONING in rendered and not re.search("""['"]thinking['"]""", rendered) else ""

    def removes(self, opening: str, closing: str) -> bool:
        """True if reasoning between these tags does not stay in an answer of an earlier turn."""
        answer = ANSWER | {"content": f"{opening}\n{REASONING}\n{closing}\n\n{ASSISTANT}"}
        variables = {**self.special, **self._variables}
        try:
            rendered = self._template.render([self._typed(m) for m in (QUESTION, answer, NEXT)], **variables)
        except ValueError:
            return False
        return ASSISTANT in rendered and REASONING not in rendered

    def called(self) -> tuple[str, str]:
        """A question and a tool call, and the same with the tool's result; empty where the template refuses it."""
        for arguments in ({KEY: VALUE}, f'{{"{KEY}": "{VALUE}"}}'):
            rendered = self.attempt(QUESTION, calling(arguments), tools=_TOOLS)
            if TOOL in rendered.partition(USER)[2] and VALUE in rendered:
                return rendered, self.attempt(QUESTION, calling(arguments), RETURNED, tools=_TOOLS)
        return "", ""

    def controls(self, text: str) -> list[str]:
        """The control tokens in a text, in order."""
        return self.control.findall(text)

    def first_run(self, text: str) -> list[str]:
        """The first control token of a text and those that follow it directly."""
        run: list[str] = []
        match = self.control.search(text)
        while match:
            run.append(match[0])
            match = self.control.match(text, match.end())
        return run

    def tail(self, text: str) -> str:
        """What ends a turn at the start of a text: one control token and what follows it up to the next."""
        starts = [match.start() for match in self.control.finditer(text)]
        return text[: starts[1]] if len(starts) > 1 else text
