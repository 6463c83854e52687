"""A player that sees no more than a prompt shows and wins nearly always in generated rooms.

It walks through the receptacles in the order in which the admissible commands list them, so that where it is tells it
where to go next: no list of places searched is needed.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lsm_lightning.tasks.alfworld.layout import APPLIANCES
from lsm_lightning.tasks.alfworld.prompts import Pair
from lsm_lightning.tasks.alfworld.world import LAMP, OBJECTS, RECEPTACLES

_LISTED = re.compile(r"\ban? (\w+ \d+)")

_CHANGED = {"clean": "clean", "heat": "hot", "cool": "(?:cold|cool)"}
"""How the game describes an object to which it was done."""


class Decision(NamedTuple):
    """What the expert thinks, in a line, and does."""

    thought: str
    action: str


@dataclass(frozen=True, slots=True)
class _Goal:
    wanted: str
    target: str | None
    verb: str | None
    lamp: bool


@dataclass(frozen=True, slots=True)
class _View:
    """What the prompt tells, read."""

    goal: _Goal
    admissible: Sequence[str]
    texts: Sequence[str]
    """Observations shown, newest first."""
    actions: Sequence[str]
    """Commands shown, newest first."""
    here: str | None
    """The receptacle one stands at."""
    held: str | None

    def of(self, verb: str) -> list[str]:
        """Admissible commands that begin with a verb."""
        return [action for action in self.admissible if action.startswith(f"{verb} ")]

    @property
    def places(self) -> list[str]:
        """Receptacles one may go to."""
        return [action.removeprefix("go to ") for action in self.of("go to")]

    @property
    def next_place(self) -> str:
        """The one after `here` in the list, the first one after the last."""
        places = self.places
        return next((place for place in places if self.here and place > self.here), places[0])

    def nearest(self, kind: str | None) -> str:
        """The first other receptacle of a kind, or simply the next one if there is none."""
        return next((place for place in self.places if _kind(place) == kind), self.next_place)

    @property
    def at_target(self) -> bool:
        return self.here is not None and _kind(self.here) == self.goal.target

    @property
    def closed(self) -> bool:
        return f"open {self.here}" in self.admissible


def decide(task: str, history: Sequence[Pair], observation: str, admissible: Sequence[str]) -> Decision:
    """The expert's next thought and command: a pure function of what a prompt shows.

    Args:
        task: The task sentence of a generated game.
        history: The last two pairs of observation and command, oldest first.
        observation: What the game said last.
        admissible: Commands it takes now, sorted.
    """
    view = _view(task, history, observation, admissible)
    if view.held is None:
        return _search(view)
    if _kind(view.held) != view.goal.wanted:
        return _put_away(view, view.held)
    if view.goal.lamp:
        return _to_lamp(view, view.held)
    if view.goal.verb and not _is_done(view, view.held, view.goal.verb):
        return _do(view, view.held, view.goal.verb)
    return _deliver(view, view.held)


def _search(view: _View) -> Decision:
    need = f"need {view.goal.wanted}."
    if view.here and not view.at_target:
        take = next((action for action in view.of("take") if action.split()[1] == view.goal.wanted), None)
        if take:
            return Decision(f"{need} it is here.", take)
        if view.closed:
            return Decision(f"{need} {view.here} is closed.", f"open {view.here}")
    return Decision(f"{need} not here. next {view.next_place}.", f"go to {view.next_place}")


def _put_away(view: _View, held: str) -> Decision:
    moves = view.of("move")
    if moves:
        return Decision(f"{held} is not needed. put it here.", moves[0])
    return Decision(f"{held} is not needed. put it down at {view.next_place}.", f"go to {view.next_place}")


def _to_lamp(view: _View, held: str) -> Decision:
    use = next(iter(view.of("use")), None)
    if use:
        return Decision(f"have {held}. {use.removeprefix('use ')} is here.", use)
    if view.closed:
        return Decision(f"have {held}. no {LAMP}. {view.here} is closed.", f"open {view.here}")
    return Decision(f"have {held}. no {LAMP}. next {view.next_place}.", f"go to {view.next_place}")


def _do(view: _View, held: str, verb: str) -> Decision:
    ready = next((action for action in view.of(verb) if action.startswith(f"{verb} {held} ")), None)
    if ready:
        return Decision(f"have {held}. {verb} it here.", ready)
    look = f"examine {held}"
    just_taken = any(action.startswith("take ") for action in view.actions)
    if view.at_target and view.actions[:1] not in ([], [look]) and not just_taken and look in view.admissible:
        return Decision(f"have {held}. is it done.", look)
    appliance = view.nearest(APPLIANCES[verb])
    return Decision(f"have {held}. {verb} it at {appliance}.", f"go to {appliance}")


def _deliver(view: _View, held: str) -> Decision:
    if view.at_target:
        if view.closed:
            return Decision(f"have {held}. {view.here} is closed.", f"open {view.here}")
        move = f"move {held} to {view.here}"
        if move in view.admissible:
            return Decision(f"have {held}. put it here.", move)
    target = view.nearest(view.goal.target)
    return Decision(f"have {held}. put it in {target}.", f"go to {target}")


def _is_done(view: _View, held: str, verb: str) -> bool:
    """Whether a text shown says so."""
    done = re.compile(rf"You {verb} the {held} |This is a [a-z ]*\b{_CHANGED[verb]}\b[a-z ]* {held}\b")
    return any(done.search(text) for text in view.texts)


def _view(task: str, history: Sequence[Pair], observation: str, admissible: Sequence[str]) -> _View:
    texts = [observation, *(seen for seen, _ in reversed(history))]
    examined = [action.removeprefix("examine ") for action in admissible if action.startswith("examine ")]
    return _View(
        goal=_goal(task),
        admissible=admissible,
        texts=texts,
        actions=[action for _, action in reversed(history)],
        here=next((name for name in examined if _kind(name) in RECEPTACLES), None),
        held=_held(admissible, examined, texts),
    )


def _goal(task: str) -> _Goal:
    words = set(re.findall("[a-z]+", task))
    verbs = {"clean": "clean", "hot": "heat", "heat": "heat", "cool": "cool"}
    return _Goal(
        wanted=next(kind for kind in OBJECTS if kind in words and kind != LAMP),
        target=next((kind for kind in RECEPTACLES if kind in words), None),
        verb=next((verb for word, verb in verbs.items() if word in words), None),
        lamp=LAMP in words,
    )


def _held(admissible: Sequence[str], examined: Sequence[str], texts: Sequence[str]) -> str | None:
    """What is in one's hand: what can be put down, or can be examined and was not seen lying here."""
    move = next((action for action in admissible if action.startswith("move ")), None)
    if move:
        return move.removeprefix("move ").partition(" to ")[0]
    if any(action.startswith("take ") for action in admissible):
        return None
    things = [name for name in examined if _kind(name) in OBJECTS and _kind(name) != LAMP]
    return next((thing for thing in things if _was_picked_up(thing, texts)), None)


def _was_picked_up(thing: str, texts: Sequence[str]) -> bool:
    for text in texts:
        if f"You pick up the {thing} " in text:
            return True
        if thing in _LISTED.findall(text.partition("you see")[2]):
            return False
    return True


def _kind(name: str) -> str:
    return name.split()[0]
