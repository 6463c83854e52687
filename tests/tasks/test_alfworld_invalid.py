"""Why an answer could not be used. Needs no engine."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lsm_lightning.tasks.alfworld.invalid import INVALID_KINDS, invalid_kind

ADMISSIBLE = ["go to bed 1", "help", "inventory", "look", "open drawer 2"]


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("", "empty"),
        ("Go to bed 1", "spelling"),
        ("open  drawer 2.", "spelling"),
        ("'look'", "spelling"),
        ("go to bed 2", "inadmissible"),
        ("open bed 1", "inadmissible"),
        ("take pen 1 from desk 1", "inadmissible"),
        ("move pen 1 to desk 1", "inadmissible"),
        ("heat egg 1 with microwave 1", "inadmissible"),
        ("put pen 1 in/on desk 1", "unknown"),
        ("go to bed", "unknown"),
        ("take pen 1", "unknown"),
        ("I think I should look around", "unknown"),
    ],
)
def test_kinds_of_commands(command, kind):
    assert invalid_kind(command, tagged=True, admissible=ADMISSIBLE, refused=None) == kind


def test_a_command_refused_before_is_a_repetition():
    told = {
        command: invalid_kind(command, tagged=True, admissible=ADMISSIBLE, refused="fly") for command in ("fly", "run")
    }
    assert told == {"fly": "repeated", "run": "unknown"}


@given(command=st.text(max_size=20), tagged=st.booleans(), refused=st.none() | st.text(max_size=20))
def test_every_command_has_one_of_the_kinds(command, tagged, refused):
    kind = invalid_kind(command, tagged=tagged, admissible=ADMISSIBLE, refused=refused)
    assert kind in INVALID_KINDS
    assert (kind == "untagged") is (not tagged)
