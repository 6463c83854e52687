"""What the model reads in one turn of a game, and which command its answer stands for."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Literal, NamedTuple, TypeAlias

from lsm_lightning.errors import ConfigurationError

Pair: TypeAlias = tuple[str, str]
"""An observation, and the command given at it."""

PromptName = Literal["compact", "paper"]
ProjectionName = Literal["strict", "paper"]

_FIELDS = {
    "text": ("task", "step", "taken", "history", "shown", "observation", "actions"),
    "pair": ("step", "observation", "action"),
    "action": ("action",),
}

_START = "You are in the middle of a room."


@dataclass(frozen=True, kw_only=True)
class PromptTemplate:
    """How a turn is written down. Fields stand in braces; a brace that is meant is doubled.

    Args:
        text: The prompt. Fields: `{task}` (the task sentence), `{step}` (number of this turn, from 1), `{taken}`
            (commands given so far), `{history}` (the last pairs), `{shown}` (how many pairs that is), `{observation}`
            and `{actions}` (the admissible commands; a template without it does not show them).
        first: The prompt of the first turn, with the same fields; null is `text`.
        pair: One pair of the history. Fields: `{step}` (the turn it was), `{observation}`, `{action}`.
        pair_separator: What stands between two pairs.
        action: One admissible command. Field: `{action}`.
        action_separator: What stands between two commands.
        hide: Commands not shown; they are played all the same.
        short_start: Show the observation of the first turn without the list of receptacles and the task sentence: what
            it lists stands in the admissible commands too. Use false if those are not shown.
    """

    text: str = "{task}\n{history}{observation}\n{actions}"
    first: str | None = None
    pair: str = "{observation} > {action}\n"
    pair_separator: str = ""
    action: str = "{action}"
    action_separator: str = "|"
    hide: tuple[str, ...] = ("help", "inventory", "look")
    short_start: bool = True

    def check(self) -> None:
        """Refuse templates that cannot be filled.

        Raises:
            ConfigurationError: A field is unknown or a brace stands alone; with the known fields.
        """
        _check("text", self.text, _FIELDS["text"])
        _check("first", self.text if self.first is None else self.first, _FIELDS["text"])
        _check("pair", self.pair, _FIELDS["pair"])
        _check("action", self.action, _FIELDS["action"])


def _check(name: str, template: str, known: Sequence[str]) -> None:
    """Refuse a template that `str.format` could not fill."""
    try:
        used = [field for _, field, _, _ in Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise ConfigurationError(f"prompt {name}: {error} in {template!r}; a brace that is meant is doubled") from error
    for field in used:
        if field not in known:
            raise ConfigurationError(f"prompt {name}: unknown field {{{field}}}; known are {', '.join(known)}")


_RULES = """
It is your turn to choose a command.
First think about where you are and what is still missing; write this reasoning between <think> and </think>.
Then choose one of the admissible commands for this step and write it between <action> and </action>.
"""

PROMPTS: Mapping[PromptName, PromptTemplate] = {
    "compact": PromptTemplate(),
    "paper": PromptTemplate(
        text="""
You are a skilled agent in a simulated household (ALFRED). Your task: {task}
So far you have given {taken} command(s). The last {shown} observation(s), each with the command you gave: {history}
This is step {step}, and what you observe now is: {observation}
The commands admissible in this situation are: [{actions}].
"""
        + _RULES,
        first="""
You are a skilled agent in a simulated household (ALFRED).
What you observe now is: {observation}
The commands admissible in this situation are: [{actions}].
"""
        + _RULES,
        pair="[Observation {step}: '{observation}', Action {step}: '{action}']",
        pair_separator="\n",
        action="'{action}'",
        action_separator="\n ",
        hide=("help",),
        short_start=False,
    ),
}


def render(
    template: PromptTemplate,
    task: str,
    taken: int,
    history: Sequence[Pair],
    observation: str,
    admissible: Sequence[str],
) -> str:
    """The prompt of one turn.

    Args:
        template: How to write it.
        task: The task sentence.
        taken: Commands given so far; 0 is the first turn.
        history: The last of them with their observations, oldest first.
        observation: What the game said last.
        admissible: Commands it takes now.
    """
    text = template.first if taken == 0 and template.first is not None else template.text
    first_shown = taken - len(history) + 1
    pairs = [
        template.pair.format(step=step, observation=_shown(template, seen), action=action)
        for step, (seen, action) in enumerate(history, start=first_shown)
    ]
    actions = [template.action.format(action=action) for action in admissible if action not in template.hide]
    return text.format(
        task=task,
        step=taken + 1,
        taken=taken,
        history=template.pair_separator.join(pairs),
        shown=len(pairs),
        observation=_shown(template, observation),
        actions=template.action_separator.join(actions),
    )


def _shown(template: PromptTemplate, observation: str) -> str:
    return _START if template.short_start and _START in observation else observation.strip()


class Projected(NamedTuple):
    """What an answer comes down to."""

    command: str
    tagged: bool
    """Whether it stood between `<action>` and `</action>`."""


def strict_projection(answer: str) -> Projected:
    """The text of the last complete `<action>...</action>` after the last `</think>`; empty if there is none.

    >>> strict_projection("<think>or <action>look</action>?</think><action> open fridge 1 </action>").command
    'open fridge 1'
    """
    found = re.findall(r"<action>((?:(?!<action>).)*?)</action>", answer.rpartition("</think>")[2], re.DOTALL)
    return Projected(found[-1].strip() if found else "", tagged=bool(found))


def paper_projection(answer: str) -> Projected:
    """As the paper's code does: in lower case, first `<action>` to first `</action>`, else the last 30 characters.

    Whether there was any thinking (the paper's code notes that, and plays the command all the same) is not told.

    >>> paper_projection("<think>no</think><action>Open fridge 1</action>").command
    'open fridge 1'
    >>> paper_projection("Open it!")
    Projected(command='open it!', tagged=False)
    """
    text = answer.lower()
    start, end = text.find("<action>"), text.find("</action>")
    if start < 0 or end < 0:
        return Projected(text[-30:], tagged=False)
    return Projected(text[start + len("<action>") : end].strip(), tagged=True)


Projection: TypeAlias = Callable[[str], Projected]

PROJECTIONS: Mapping[ProjectionName, Projection] = {"strict": strict_projection, "paper": paper_projection}
