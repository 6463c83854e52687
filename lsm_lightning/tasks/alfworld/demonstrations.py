"""Training data for a model that is to imitate the expert: what it would see in a turn, and what it should answer."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from random import Random

from lsm_lightning.tasks.alfworld.engine import NOTHING_HAPPENS, engine_pool, ground
from lsm_lightning.tasks.alfworld.expert import decide
from lsm_lightning.tasks.alfworld.games import generate
from lsm_lightning.tasks.alfworld.layout import Kind
from lsm_lightning.tasks.alfworld.play import Play
from lsm_lightning.tasks.alfworld.prompts import Pair, PromptTemplate, render
from lsm_lightning.tasks.alfworld.running import EngineGame
from lsm_lightning.tasks.alfworld.world import WORLDS, WorldName

MAX_TURNS = 30
"""Longest demonstration."""

_HISTORY = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class Demonstration:
    """One turn, with the expert's answer."""

    kind: Kind
    task: str
    taken: int
    """Commands given before it."""
    history: tuple[Pair, ...]
    """The last two of them with their observations, oldest first."""
    observation: str
    admissible: tuple[str, ...]
    thought: str
    action: str

    def prompt(self, template: PromptTemplate) -> str:
        """What an `AlfworldEpisode` would show in this turn."""
        return render(template, self.task, self.taken, self.history, self.observation, self.admissible)

    def answer(self) -> str:
        """What the model should write."""
        return f"<think>{self.thought}</think><action>{self.action}</action>"


def demonstrations(
    seed: int, first: int, count: int, world: WorldName = "mini", random_share: float = 0.2
) -> Iterator[Demonstration]:
    """The turns of generated train games `first` to `first + count - 1`, at most 30 of each.

    Every answer is the expert's. In three games of four, the command that is played in its stead is a random admissible
    one with probability `random_share`, so that the data also show how to come back from a detour.

    Raises:
        ConfigurationError: The `alfworld` extra is missing.
    """
    engine = engine_pool().acquire()
    try:
        for index in range(first, first + count):
            game = generate(seed, index, world)
            share = 0.0 if index % 4 == 0 else random_share
            random = Random(f"demonstrations/{seed}/{index}")
            yield from _play(Play(EngineGame(engine, ground(game)), _HISTORY), game.kind, share, random)
    finally:
        engine_pool().release(engine)


def _play(play: Play, kind: Kind, random_share: float, random: Random) -> Iterator[Demonstration]:
    while not play.won and play.taken < MAX_TURNS:
        turn = _relabelled(kind, play.task, play.taken, play.history, play.observation, tuple(play.admissible))
        yield turn
        stray = random.random() < random_share
        play.act(random.choice([a for a in play.admissible if a != "help"]) if stray else turn.action)


def _relabelled(
    kind: Kind, task: str, taken: int, history: tuple[Pair, ...], observation: str, admissible: tuple[str, ...]
) -> Demonstration:
    thought, action = decide(task, history, observation, admissible)
    return Demonstration(
        kind=kind,
        task=task,
        taken=taken,
        history=history,
        observation=observation,
        admissible=admissible,
        thought=thought,
        action=action,
    )


def invalid_action_rows(
    rows: Iterable[Demonstration], seed: int, world: WorldName = "mini", share: float = 0.2
) -> Iterator[Demonstration]:
    """Turns right after one to three commands the game does not know, made from a `share` of the rows; needs no engine.

    Only the extra turns are yielded. A model that never saw "Nothing happens." repeats its mistake to the end.
    """
    random = Random(f"invalid/{seed}")
    for row in rows:
        if random.random() < share:
            for _ in range(random.choice((1, 1, 2, 3))):
                row = _after_invalid(row, _invalid(random, row, world))
                yield row


def _after_invalid(row: Demonstration, command: str) -> Demonstration:
    history = (*row.history, (row.observation, command))[-_HISTORY:]
    thought, action = decide(row.task, history, NOTHING_HAPPENS, row.admissible)
    return replace(
        row, taken=row.taken + 1, history=history, observation=NOTHING_HAPPENS, thought=thought, action=action
    )


def _invalid(random: Random, row: Demonstration, world: WorldName) -> str:
    """A command as a weak model writes it: well formed, mostly, but not admissible."""
    makers, weights = zip(*_MISTAKES, strict=True)
    while True:
        (mistake,) = random.choices(makers, weights)
        command = mistake(_Names(random, row, world))
        if command not in row.admissible:
            return command


class _Names:
    """Draws names for a wrong command."""

    def __init__(self, random: Random, row: Demonstration, world: WorldName) -> None:
        self.random, self.row, self.world = random, row, WORLDS[world]

    @property
    def receptacle(self) -> str:
        """One that need not be in the room."""
        return f"{self.random.choice(self.world.receptacles)} {self.random.randint(1, 3)}"

    @property
    def thing(self) -> str:
        """An object that need not be in the room."""
        return f"{self.random.choice(self.world.objects)} {self.random.randint(1, 2)}"

    @property
    def here(self) -> str:
        """The receptacle one stands at, if any."""
        examined = [action.removeprefix("examine ") for action in self.row.admissible if action.startswith("examine ")]
        return next((name for name in examined if name.split()[0] in self.world.receptacles), self.receptacle)

    @property
    def distorted(self) -> str:
        """An admissible command, more often than not the right one, with other numbers or another place."""
        words = self.random.choice([*self.row.admissible, *[self.row.action] * 3]).split()
        end = self.receptacle.split() if self.random.random() < 0.5 else words[-2:]
        return " ".join(self._renumbered([*words[:-2], *end]))

    def _renumbered(self, words: Sequence[str]) -> list[str]:
        return [
            str(self.random.randint(1, 3)) if word.isdigit() and self.random.random() < 0.7 else word for word in words
        ]


_MISTAKES = (
    (lambda names: f"go to {names.here}", 8),
    (lambda names: f"go to {names.receptacle}", 27),
    (lambda names: f"take {names.thing} from {names.here}", 15),
    (lambda names: f"take {names.thing} from {names.receptacle}", 5),
    (lambda names: f"open {names.receptacle}", 10),
    (lambda names: f"open {names.here}", 5),
    (lambda names: f"move {names.thing} to {names.here}", 10),
    (lambda names: f"{names.random.choice(('clean', 'heat', 'cool'))} {names.thing} with {names.receptacle}", 5),
    (lambda names: "", 2),
    (lambda names: names.distorted, 13),
)
"""Kinds of wrong commands with their shares, in percent."""
