"""Draw a room, what lies in it and what to do there: a `Layout`, from which problem text and plan follow."""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal, NamedTuple

from lsm_lightning.tasks.alfworld.world import LAMP, OBJECTS, RECEPTACLES, World, fits

Kind = Literal["place", "look", "clean", "heat", "cool", "two"]

TASK_TYPES: Mapping[Kind, str] = {
    "place": "pick_and_place_simple",
    "look": "look_at_obj_in_light",
    "clean": "pick_clean_then_place_in_recep",
    "heat": "pick_heat_then_place_in_recep",
    "cool": "pick_cool_then_place_in_recep",
    "two": "pick_two_obj_and_place",
}
"""ALFWorld's names of the six task types, by ours, in the order generated games rotate through them."""

KINDS: Sequence[Kind] = tuple(TASK_TYPES)

APPLIANCES: Mapping[str, str] = {"clean": "sinkbasin", "heat": "microwave", "cool": "fridge"}
"""Where each change of state is made."""


class Thing(NamedTuple):
    """A receptacle or an object, by the name the game shows: `Thing("shelf", 2)` is "shelf 2"."""

    kind: str
    number: int

    def __str__(self) -> str:
        return f"{self.kind} {self.number}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """One game before it is written out."""

    kind: Kind
    wanted: str
    """Kind of the object that the task is about."""
    target: str
    """Kind of receptacle it must end in; the lamp's kind for a look task."""
    receptacles: Sequence[Thing]
    places: Mapping[Thing, Thing]
    """In which receptacle each object lies, the wanted ones first."""

    def things(self, kind: str) -> list[Thing]:
        """All objects of a kind."""
        return [thing for thing in self.places if thing.kind == kind]

    def fingerprint(self) -> int:
        """A 64-bit number that is equal for equal games, however their objects of one kind are numbered."""
        lying = sorted((thing.kind, str(receptacle)) for thing, receptacle in self.places.items())
        content = (self.kind, self.wanted, self.target, sorted(map(str, self.receptacles)), lying)
        return int.from_bytes(hashlib.sha256(repr(content).encode()).digest()[:8], "big")


def draw(random: Random, kind: Kind, world: World) -> Layout:
    """A layout in which the task can be done and is not done yet."""
    while True:
        receptacles = _receptacles(random, kind, world)
        choices = _choices(kind, world, receptacles)
        if choices:
            wanted, target = random.choice(choices)
            places = _places(random, kind, world, receptacles, wanted, target)
            return Layout(kind=kind, wanted=wanted, target=target, receptacles=receptacles, places=places)


def _receptacles(random: Random, kind: Kind, world: World) -> list[Thing]:
    fewest, most = world.receptacles_in_room
    rooms = [room for room, kinds in sorted(world.rooms.items()) if _suits(kind, kinds)]
    while True:
        kinds = _kinds(random, kind, world, world.rooms[random.choice(rooms)])
        receptacles = [
            Thing(name, number + 1) for name in kinds for number in range(random.randint(*world.count(name)))
        ]
        if fewest <= len(receptacles) <= most:
            return receptacles


def _suits(kind: Kind, receptacles: Sequence[str]) -> bool:
    if kind == "look":
        return any(fits(receptacle, LAMP) for receptacle in receptacles)
    return kind not in APPLIANCES or APPLIANCES[kind] in receptacles


def _kinds(random: Random, kind: Kind, world: World, room: Sequence[str]) -> list[str]:
    if world.kinds_in_room is None:
        return sorted(room)
    fewest, most = world.kinds_in_room
    drawn = random.sample(sorted(room), min(len(room), random.randint(fewest, most)))
    return sorted({*drawn, APPLIANCES[kind]} if kind in APPLIANCES else drawn)


def _choices(kind: Kind, world: World, receptacles: Sequence[Thing]) -> list[tuple[str, str]]:
    """Pairs of wanted object and target for which a start exists: the object fits somewhere else than in the target."""
    kinds = sorted({receptacle.kind for receptacle in receptacles})
    objects = [thing for thing in world.objects if thing != LAMP]
    if kind == "look":
        lit = any(fits(receptacle, LAMP) for receptacle in kinds)
        return [(thing, LAMP) for thing in objects if lit and any(fits(receptacle, thing) for receptacle in kinds)]
    appliance = APPLIANCES.get(kind)
    targets = [receptacle for receptacle in kinds if receptacle not in ("microwave", appliance)]
    return [
        (thing, target)
        for thing in objects
        if appliance is None or kind in OBJECTS[thing].can
        for target in targets
        if fits(target, thing) and any(fits(other, thing) for other in kinds if other != target)
    ]


def _places(
    random: Random, kind: Kind, world: World, receptacles: Sequence[Thing], wanted: str, target: str
) -> dict[Thing, Thing]:
    def somewhere(thing: str, avoid: str = "") -> Thing:
        return random.choice([place for place in receptacles if fits(place.kind, thing) and place.kind != avoid])

    lying = [(wanted, somewhere(wanted, target)) for _ in range(random.choice((2, 3) if kind == "two" else (1, 1, 2)))]
    if kind == "look":
        lying.append((LAMP, somewhere(LAMP)))
    kinds = {receptacle.kind for receptacle in receptacles}
    others = [
        thing
        for thing in sorted(world.objects)
        if thing not in (wanted, LAMP) and any(fits(receptacle, thing) for receptacle in kinds)
    ]
    for _ in range(random.randint(*world.objects_in_room) - len(lying)):
        other = random.choice(others)
        lying.append((other, somewhere(other)))
    return _numbered(lying)


def _numbered(lying: Sequence[tuple[str, Thing]]) -> dict[Thing, Thing]:
    seen: Counter[str] = Counter()
    places = {}
    for kind, receptacle in lying:
        seen[kind] += 1
        places[Thing(kind, seen[kind])] = receptacle
    return places


def openable(receptacle: Thing) -> bool:
    """Whether it is closed at the start."""
    return RECEPTACLES[receptacle.kind].openable
