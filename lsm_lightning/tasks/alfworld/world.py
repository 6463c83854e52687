"""What the rooms of generated games are made of: kinds of receptacles, objects and rooms, and how many of each."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

WorldName = Literal["mini", "full"]

LAMP = "desklamp"


@dataclass(frozen=True, kw_only=True, slots=True)
class ReceptacleKind:
    """A sort of place that things stand on or lie in."""

    holds: frozenset[str]
    """Tags: an object fits if one of its own is among them."""
    openable: bool
    count: tuple[int, int]
    """Fewest and most of them in a room that has any."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ObjectKind:
    """A sort of thing."""

    tags: frozenset[str]
    can: frozenset[str]
    """Which of `clean`, `heat` and `cool` may be done to it."""


def _receptacle(holds: str, fewest: int = 1, most: int = 1, *, openable: bool = False) -> ReceptacleKind:
    return ReceptacleKind(holds=frozenset(holds.split()), openable=openable, count=(fewest, most))


def _object(tags: str, can: str = "") -> ObjectKind:
    return ObjectKind(tags=frozenset(tags.split()), can=frozenset(can.split()))


RECEPTACLES: Mapping[str, ReceptacleKind] = {
    "armchair": _receptacle("soft small", 1, 2),
    "basket": _receptacle("soft towel bath"),
    "bathtubbasin": _receptacle("bath"),
    "bed": _receptacle("soft office"),
    "bookcase": _receptacle("office decor", 1, 2),
    "cabinet": _receptacle("dish kit bath", 2, 5, openable=True),
    "coffeemachine": _receptacle("cup"),
    "coffeetable": _receptacle("small decor office lamp"),
    "countertop": _receptacle("food dish kit misc", 1, 3),
    "crate": _receptacle("tool soft misc", 1, 2, openable=True),
    "desk": _receptacle("office small decor lamp", 1, 2),
    "diningtable": _receptacle("food dish small decor"),
    "drawer": _receptacle("small kit office", 2, 4, openable=True),
    "dresser": _receptacle("soft decor small lamp"),
    "fridge": _receptacle("food dish", openable=True),
    "garbagecan": _receptacle("food trash small"),
    "microwave": _receptacle("food dish", openable=True),
    "nightstand": _receptacle("small office decor lamp", 1, 2),
    "pantry": _receptacle("food dish", openable=True),
    "shelf": _receptacle("decor dish office bath", 1, 3),
    "sidetable": _receptacle("small decor lamp", 1, 2),
    "sinkbasin": _receptacle("food dish kit bath"),
    "sofa": _receptacle("soft office small"),
    "stoveburner": _receptacle("pan", 1, 2),
    "toilet": _receptacle("bath"),
    "toolchest": _receptacle("tool small", openable=True),
    "towelrack": _receptacle("towel"),
    "wardrobe": _receptacle("soft", openable=True),
    "workbench": _receptacle("tool misc lamp"),
}

OBJECTS: Mapping[str, ObjectKind] = {
    "apple": _object("food", "clean heat cool"),
    "blanket": _object("soft"),
    "book": _object("office"),
    "bowl": _object("dish", "clean heat cool"),
    "bread": _object("food", "heat cool"),
    "can": _object("trash food"),
    "candle": _object("decor bath"),
    "carrot": _object("food", "clean heat cool"),
    "cheese": _object("food", "heat cool"),
    "cloth": _object("bath kit", "clean"),
    "egg": _object("food", "clean heat cool"),
    "fork": _object("kit", "clean"),
    "glass": _object("dish", "clean cool"),
    "hammer": _object("tool"),
    "keychain": _object("small"),
    "ladle": _object("kit", "clean"),
    "laptop": _object("office"),
    "lettuce": _object("food", "clean cool"),
    "muffin": _object("food", "heat cool"),
    "mug": _object("cup dish", "clean heat cool"),
    "newspaper": _object("trash office"),
    "notebook": _object("office"),
    "pan": _object("pan kit", "clean cool"),
    "pear": _object("food", "clean heat cool"),
    "pen": _object("office small"),
    "pencil": _object("office small"),
    "peppermill": _object("kit small"),
    "phone": _object("small"),
    "pillow": _object("soft"),
    "plate": _object("dish", "clean heat cool"),
    "pot": _object("pan kit", "clean cool"),
    "potato": _object("food", "clean heat cool"),
    "remote": _object("small"),
    "saltshaker": _object("kit small"),
    "screwdriver": _object("tool small"),
    "shampoo": _object("bath"),
    "soap": _object("bath", "clean"),
    "sponge": _object("bath kit", "clean"),
    "spoon": _object("kit", "clean"),
    "stapler": _object("office"),
    "statue": _object("decor"),
    "sweater": _object("soft"),
    "tape": _object("tool office"),
    "teacup": _object("cup dish", "clean heat cool"),
    "tissues": _object("bath decor"),
    "towel": _object("towel"),
    "vase": _object("decor"),
    "wallet": _object("small"),
    "watch": _object("small"),
    "whisk": _object("kit", "clean"),
    "wrench": _object("tool"),
    LAMP: _object("lamp"),
}


def fits(receptacle: str, thing: str) -> bool:
    """Whether a thing of one kind may lie in a receptacle of another."""
    return bool(RECEPTACLES[receptacle].holds & OBJECTS[thing].tags)


@dataclass(frozen=True, kw_only=True, slots=True)
class World:
    """A choice of rooms and things, and how full a room is."""

    name: WorldName
    rooms: Mapping[str, Sequence[str]]
    """Kinds of receptacles each room may have."""
    objects: Sequence[str]
    counts: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Fewest and most of a kind of receptacle, where not as in `RECEPTACLES`."""
    kinds_in_room: tuple[int, int] | None = None
    """How many kinds of receptacles a room draws from its list; None is all of them."""
    receptacles_in_room: tuple[int, int]
    objects_in_room: tuple[int, int]

    @property
    def receptacles(self) -> list[str]:
        """All kinds of receptacles of its rooms, sorted."""
        return sorted({kind for kinds in self.rooms.values() for kind in kinds})

    def count(self, receptacle: str) -> tuple[int, int]:
        """Fewest and most of one kind of receptacle in a room that has any."""
        return self.counts.get(receptacle, RECEPTACLES[receptacle].count)


def _rooms(**rooms: str) -> dict[str, list[str]]:
    return {name: kinds.split() for name, kinds in rooms.items()}


MINI = World(
    name="mini",
    rooms=_rooms(
        bathroom="sinkbasin cabinet toilet shelf garbagecan countertop",
        bedroom="bed nightstand dresser drawer desk shelf garbagecan",
        kitchen="countertop cabinet drawer shelf sinkbasin fridge microwave diningtable garbagecan",
    ),
    objects=(
        *("apple", "book", "bowl", "bread", "candle", "cloth", "egg", "fork", "keychain", "lettuce"),
        *("mug", "pen", "phone", "pillow", "plate", "potato", "soap", "spoon", "vase", LAMP),
    ),
    counts={
        **{"cabinet": (1, 3), "drawer": (1, 3), "countertop": (1, 2), "shelf": (1, 2)},
        **{"desk": (1, 1), "nightstand": (1, 1)},
    },
    kinds_in_room=(5, 7),
    receptacles_in_room=(6, 9),
    objects_in_room=(6, 10),
)

FULL = World(
    name="full",
    rooms=_rooms(
        bathroom="sinkbasin cabinet toilet bathtubbasin towelrack basket shelf garbagecan",
        bedroom="bed nightstand dresser drawer desk shelf wardrobe garbagecan",
        garage="workbench toolchest crate shelf cabinet garbagecan",
        kitchen="countertop cabinet drawer shelf sinkbasin fridge microwave stoveburner coffeemachine diningtable "
        "garbagecan",
        livingroom="sofa coffeetable armchair sidetable shelf drawer bookcase",
        pantrykitchen="countertop cabinet pantry sinkbasin fridge microwave diningtable garbagecan drawer",
        studio="countertop cabinet sinkbasin fridge microwave desk bed shelf garbagecan",
        study="desk bookcase drawer shelf armchair sidetable garbagecan",
    ),
    objects=sorted(OBJECTS),
    receptacles_in_room=(1, 99),
    objects_in_room=(12, 22),
)

WORLDS: Mapping[WorldName, World] = {"mini": MINI, "full": FULL}
