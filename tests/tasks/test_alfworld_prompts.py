"""What a turn looks like, and which command an answer stands for. Needs no engine."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsm_lightning.errors import ConfigurationError
from lsm_lightning.tasks.alfworld import PromptTemplate
from lsm_lightning.tasks.alfworld.prompts import PROMPTS, paper_projection, render, strict_projection

START = (
    "-= Welcome to TextWorld, ALFRED! =-\n\nYou are in the middle of a room. Looking quickly around you, "
    "you see a bed 1, and a desk 1.\n\nYour task is to: put a pen in desk."
)
HISTORY = [(START, "go to bed 1"), ("You arrive at bed 1. On the bed 1, you see a pen 1.", "go to desk 1")]
ADMISSIBLE = ["go to bed 1", "help", "inventory", "look"]


def test_compact_prompt_is_task_history_observation_commands():
    text = render(PROMPTS["compact"], "put a pen in desk.", 2, HISTORY, "You arrive at desk 1.", ADMISSIBLE)
    assert text == (
        "put a pen in desk.\n"
        "You are in the middle of a room. > go to bed 1\n"
        "You arrive at bed 1. On the bed 1, you see a pen 1. > go to desk 1\n"
        "You arrive at desk 1.\n"
        "go to bed 1"
    )


def test_paper_prompt_has_its_parts_in_order():
    text = render(PROMPTS["paper"], "put a pen in desk.", 5, HISTORY, "You arrive at desk 1.", ADMISSIBLE)
    parts = [
        "put a pen in desk.",
        "5 command",
        f"[Observation 4: '{START}', Action 4: 'go to bed 1']\n[Observation 5: 'You arrive at bed 1.",
        "step 6",
        "You arrive at desk 1.",
        "['go to bed 1'\n 'inventory'\n 'look']",
        "<think>",
        "</think>",
        "<action>",
        "</action>",
    ]
    positions = [text.index(part) for part in parts]
    assert positions == sorted(positions)
    assert "help" not in text


def test_paper_prompt_of_the_first_turn_has_neither_task_line_nor_history():
    text = render(PROMPTS["paper"], "put a pen in desk.", 0, [], START, ADMISSIBLE)
    assert START in text
    assert text.count("put a pen in desk.") == 1
    assert "step" not in text.partition(START)[0]


def test_own_template_is_filled_and_braces_can_be_meant():
    template = PromptTemplate(text='{{"goal": "{task}", "turn": {step}}} {actions}', hide=())
    template.check()
    assert render(template, "win.", 0, [], START, ["look"]) == '{"goal": "win.", "turn": 1} look'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (PromptTemplate(text="{goal}"), r"prompt text: unknown field \{goal\}; known are task, step"),
        (PromptTemplate(first="{task.upper}"), r"prompt first: unknown field \{task.upper\}"),
        (PromptTemplate(pair="{task}"), r"prompt pair: unknown field \{task\}; known are step, observation, action"),
        (PromptTemplate(action="{}"), r"prompt action: unknown field \{\}"),
        (PromptTemplate(text="{task"), r"prompt text: .*a brace that is meant is doubled"),
    ],
)
def test_template_that_cannot_be_filled_is_refused(template, message):
    with pytest.raises(ConfigurationError, match=message):
        template.check()


@given(text=st.text())
def test_observations_are_not_read_as_templates(text):
    assert render(PROMPTS["compact"], "{task}", 0, [], f"{{x}}{text}", []).startswith("{task}\n")


@pytest.mark.parametrize(
    ("answer", "action"),
    [
        ("<think>a</think><action>look</action>", "look"),
        ("<action> go to bed 1\n</action>", "go to bed 1"),
        ("<think><action>look</action></think><action>open it</action>", "open it"),
        ("<think><action>look</action></think>", ""),
        ("<action>a</action><action>b</action>", "b"),
        ("<action>a</action><action>b", "a"),
        ("<action>a<action>b</action>", "b"),
        ("<action>a</action>b</action>", "a"),
        ("<action>Look</action>", "Look"),
        ("</action>look<action>", ""),
        ("look", ""),
        ("", ""),
    ],
)
def test_strict_projection(answer, action):
    assert strict_projection(answer).command == action


@pytest.mark.parametrize(
    ("answer", "action"),
    [
        ("<think>a</think><action> LOOK </action>", "look"),
        ("<think>or <action>a</action></think><action>b</action>", "a"),
        ("</action> then <action>", ""),
        ("I will " + "now " * 10 + "Go to bed 1", ("i will " + "now " * 10 + "go to bed 1")[-30:]),
        ("<action>look", "<action>look"),
    ],
)
def test_paper_projection(answer, action):
    assert paper_projection(answer).command == action


@given(st.text())
def test_projections_take_any_text(answer):
    assert strict_projection(f"{answer}</think><action>look</action>") == ("look", True)
    assert isinstance(paper_projection(answer).command, str)
