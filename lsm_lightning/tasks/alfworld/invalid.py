"""Why an answer could not be used: kinds that tell what to change."""

import re
from collections.abc import Collection
from typing import Literal, get_args

InvalidKind = Literal["untagged", "empty", "spelling", "repeated", "inadmissible", "unknown"]

INVALID_KINDS: tuple[InvalidKind, ...] = get_args(InvalidKind)

_THING = "[a-z]+ [0-9]+"
_COMMAND = re.compile(
    rf"go to {_THING}|(open|close|examine|use) {_THING}|take {_THING} from {_THING}|move {_THING} to {_THING}"
    rf"|(clean|heat|cool|slice) {_THING} with {_THING}|inventory|look|help"
)


def invalid_kind(command: str, *, tagged: bool, admissible: Collection[str], refused: str | None) -> InvalidKind:
    """What is wrong with a command that is not admissible; the first of these that holds.

    - `untagged`: the answer has no complete `<action>` where the projection looks for it. Cut off, or another format.
    - `empty`: there is nothing in it.
    - `spelling`: but for capitals, spaces, quotes or a full stop it would be admissible.
    - `repeated`: the same command was refused in the turn before.
    - `inadmissible`: a command of ALFWorld, for which this is not the place, or which names what is not there.
    - `unknown`: no command of ALFWorld.

    Args:
        command: What the answer stands for.
        tagged: Whether it stood between tags.
        admissible: Commands that the game takes.
        refused: The command of the turn before, if that one was refused.

    >>> invalid_kind("Look.", tagged=True, admissible=["look"], refused=None)
    'spelling'
    """
    if not tagged:
        return "untagged"
    if not command:
        return "empty"
    if _plain(command) in map(_plain, admissible):
        return "spelling"
    if command == refused:
        return "repeated"
    return "inadmissible" if _COMMAND.fullmatch(command) else "unknown"


def _plain(command: str) -> str:
    return " ".join(command.lower().split()).strip(" .!\"'`[]")
