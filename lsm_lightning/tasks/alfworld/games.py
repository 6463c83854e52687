"""Generated games: a room and a task as a `Layout`, written out as a genuine ALFWorld game with a plan that wins it.

Domain, grammar, goals and task sentences come from the installed alfworld package when a game is made; nothing of it is
copied here. What the engine asks of a problem text is gathered in `_Problem`.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from functools import cached_property
from random import Random

from lsm_lightning.tasks.alfworld import extra
from lsm_lightning.tasks.alfworld.game import Game
from lsm_lightning.tasks.alfworld.layout import APPLIANCES, KINDS, TASK_TYPES, Layout, Thing, draw, openable
from lsm_lightning.tasks.alfworld.world import LAMP, OBJECTS, WORLDS, WorldName, fits
from lsm_lightning.tasks.base import Split

HELD_OUT = 4
"""Of all layouts, those whose fingerprint is a multiple of this are test games, the others train games."""

_UNDECLARED = {"rtype": ("SinkBasin", "Microwave", "Fridge"), "otype": ("Knife", "ButterKnife")}
"""Constants that ALFWorld's domain uses without declaring them; each problem has to."""


def generate(seed: int, index: int, world: WorldName = "mini", split: Split = "train") -> Game:
    """Game `index` of a seed: a pure function of its arguments. The six task types take turns.

    Train and test games are disjoint whatever the seeds: `Layout.fingerprint` says to which split a room with its
    things and its task belongs, and layouts of the other split are drawn again.

    Args:
        seed: Any number; games of different seeds have nothing in common but the world.
        index: From 0; `index % 6` is the task type, in the order of `TASK_TYPES`.
        world: Which kinds of rooms and things there are, see `world.py`.
        split: Which of the two halves of all layouts to draw from.

    Raises:
        ConfigurationError: The `alfworld` extra is missing.
    """
    random = Random(f"{world}/{split}/{seed}/{index}")
    kind = KINDS[index % len(KINDS)]
    while True:
        layout = draw(random, kind, WORLDS[world])
        if (layout.fingerprint() % HELD_OUT == 0) == (split == "test"):
            return _written(layout, random, f"{world}_{split}_{seed}_{index}")


def _written(layout: Layout, random: Random, trial: str) -> Game:
    goal = extra.goals()[TASK_TYPES[layout.kind]]
    sentence = random.choice(goal["templates"]).format(obj=layout.wanted, recep=layout.target, toggle=LAMP)
    return Game(
        name=_folder(layout, trial),
        kind=layout.kind,
        domain=extra.domain(),
        grammar=extra.grammar().replace("UNKNOWN GOAL", sentence),
        problem=_Problem(layout).text(trial, goal["pddl"]),
        plan=tuple(_plan(layout)),
    )


def _folder(layout: Layout, trial: str) -> str:
    """As ALFWorld names it: type, object, movable receptacle, target or lamp, scene (here the game's number)."""
    target = "DeskLamp" if layout.kind == "look" else _pddl_name(layout.target)
    scene = trial.rpartition("_")[2]
    return f"{TASK_TYPES[layout.kind]}-{_pddl_name(layout.wanted)}-None-{target}-{scene}/trial_{trial}"


def _pddl_name(kind: str) -> str:
    return {"sinkbasin": "SinkBasin", "bathtubbasin": "BathtubBasin"}.get(kind, kind.capitalize())


class _Problem:
    """A layout as PDDL, under the rules the engine imposes.

    An id reads `kind_bar_07`. The engine shows it as the kind and a number of its own: the last id of a kind in sorted
    order is number 1, so ids count down. It adds "basin" to the kind of an id that has "basin" in it.
    """

    def __init__(self, layout: Layout) -> None:
        self.layout = layout
        self._counts = Counter(thing.kind for thing in (*layout.receptacles, *layout.places))

    def text(self, name: str, goal: str) -> str:
        """The whole problem; `goal` is one of ALFWorld's templates, which close the outermost bracket themselves."""
        target = "" if self.layout.kind == "look" else _pddl_name(self.layout.target)
        filled = goal.format(obj=_pddl_name(self.layout.wanted), recep=target, toggle=_pddl_name(LAMP), mrecep="")
        return "\n  ".join(
            (
                *(f"(define (problem {name})", "(:domain alfred)"),
                *("(:objects", *self._declarations(), ")"),
                *("(:init", *self._facts(), ")", filled.replace("#", "-")),
            )
        )

    def _id(self, thing: Thing) -> str:
        number = self._counts[thing.kind] - thing.number + 1
        if thing.kind.endswith("basin"):
            return f"{thing.kind.removesuffix('basin')}_bar_{number:02d}_bar_basin"
        return f"{thing.kind}_bar_{number:02d}"

    @cached_property
    def _locations(self) -> dict[Thing, str]:
        return {receptacle: f"loc_bar_{n:02d}" for n, receptacle in enumerate(self.layout.receptacles, start=1)}

    @cached_property
    def _receptacle_kinds(self) -> list[str]:
        return sorted({receptacle.kind for receptacle in self.layout.receptacles})

    @cached_property
    def _object_kinds(self) -> list[str]:
        return sorted({thing.kind for thing in self.layout.places})

    def _declarations(self) -> Iterator[str]:
        yield "agent1 - agent"
        yield from (f"{self._id(thing)} - object" for thing in self.layout.places)
        yield from (f"{self._id(receptacle)} - receptacle" for receptacle in self.layout.receptacles)
        yield from (f"{location} - location" for location in ("loc_bar_00", *self._locations.values()))
        for sort, kinds in (("otype", self._object_kinds), ("rtype", self._receptacle_kinds)):
            names = {*map(_pddl_name, kinds), *_UNDECLARED[sort]}
            yield from (f"{name}Type - {sort}" for name in sorted(names))

    def _facts(self) -> Iterator[str]:
        yield "(atLocation agent1 loc_bar_00)"
        for receptacle in self.layout.receptacles:
            yield from self._receptacle_facts(receptacle)
        for kind in self._receptacle_kinds:
            for content in self._object_kinds:
                if content != LAMP and fits(kind, content):
                    yield f"(canContain {_pddl_name(kind)}Type {_pddl_name(content)}Type)"
        for thing, receptacle in self.layout.places.items():
            yield from self._object_facts(thing, receptacle)

    def _receptacle_facts(self, receptacle: Thing) -> Iterator[str]:
        name = self._id(receptacle)
        yield f"(receptacleType {name} {_pddl_name(receptacle.kind)}Type)"
        yield f"(receptacleAtLocation {name} {self._locations[receptacle]})"
        if openable(receptacle):
            yield f"(openable {name})"

    def _object_facts(self, thing: Thing, receptacle: Thing) -> Iterator[str]:
        name = self._id(thing)
        yield f"(objectType {name} {_pddl_name(thing.kind)}Type)"
        yield f"(inReceptacle {name} {self._id(receptacle)})"
        yield f"(objectAtLocation {name} {self._locations[receptacle]})"
        yield f"(toggleable {name})" if thing.kind == LAMP else f"(pickupable {name})"
        yield from (f"({verb}able {name})" for verb in sorted(OBJECTS[thing.kind].can))


def _plan(layout: Layout) -> list[str]:
    """Commands that win: fetch each wanted object, do to it what the task asks, bring it to the first target."""
    walk = _Walk()
    for thing in layout.things(layout.wanted)[: 2 if layout.kind == "two" else 1]:
        source = layout.places[thing]
        walk.reach(source)
        walk.commands.append(f"take {thing} from {source}")
        if layout.kind == "look":
            _use_lamp(layout.places, walk)
            continue
        if layout.kind in APPLIANCES:
            appliance = Thing(APPLIANCES[layout.kind], 1)
            walk.go(appliance)
            walk.commands.append(f"{layout.kind} {thing} with {appliance}")
        target = Thing(layout.target, 1)
        walk.reach(target)
        walk.commands.append(f"move {thing} to {target}")
    return walk.commands


def _use_lamp(places: Mapping[Thing, Thing], walk: "_Walk") -> None:
    lamp = Thing(LAMP, 1)
    walk.go(places[lamp])
    walk.commands.append(f"use {lamp}")


class _Walk:
    """Commands so far, with where they lead to."""

    def __init__(self) -> None:
        self.commands: list[str] = []
        self._here: Thing | None = None
        self._opened: set[Thing] = set()

    def go(self, receptacle: Thing) -> None:
        """Stand at a receptacle."""
        if receptacle != self._here:
            self.commands.append(f"go to {receptacle}")
            self._here = receptacle

    def reach(self, receptacle: Thing) -> None:
        """Stand at a receptacle that is open."""
        self.go(receptacle)
        if openable(receptacle) and receptacle not in self._opened:
            self.commands.append(f"open {receptacle}")
            self._opened.add(receptacle)
