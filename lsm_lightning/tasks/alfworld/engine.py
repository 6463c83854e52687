"""The genuine engine, made fast: Fast Downward moves the world, the game's own grammar words it.

textworld's `PddlEnv` grounds a game four times an episode and parses its grammar again at every step. `Engine` takes
the same state (textworld's `PddlState`), the same names (alfworld's `Demangler`) and the same grammar, and grounds once
per game; groundings are shared by all engines that play it. Texts and admissible commands equal `PddlEnv`'s; nothing of
textworld is patched.
"""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

from lsm_lightning.tasks.alfworld import extra
from lsm_lightning.tasks.alfworld.facts import Facts
from lsm_lightning.tasks.alfworld.game import Game
from lsm_lightning.tasks.alfworld.grammar import Scope, TextGrammar, parse_logic
from lsm_lightning.tasks.alfworld.translation import Translation, TranslationCache, translate

NOTHING_HAPPENS = "Nothing happens."
"""What the engine answers to a command that is not admissible."""


@dataclass(frozen=True, slots=True)
class Grounding:
    """What depends on the game alone, whoever plays it."""

    translation: Translation
    actions: Mapping[str, Any]
    """The commands' templates and feedback rules by lower-case action name."""
    texts: TextGrammar


def ground(game: Game, kept: TranslationCache | None = None) -> Grounding:
    """Prepare a game to be played; nearly all of the time goes into its translation.

    Args:
        game: Which.
        kept: Where to look for its translation, and to keep it.

    Raises:
        Exception, SystemExit: What the translator or the grammar's parser say of a text that is no game.
    """
    translation = translate(game) if kept is None else kept.translation(game)
    return Grounding(translation, *parse_logic(game.grammar))


class Engine:
    """Plays one game at a time; the planner library of an engine is loaded once and never unloaded, so reuse engines.

    Not to be pickled. A forked process may go on with its copy.
    """

    def __init__(self) -> None:
        self._library = extra.load("fast_downward").load_lib()
        self._state: Any = None
        self._valid: dict[str, Any] = {}
        self.admissible: Sequence[str] = ()
        """Commands the game now takes, sorted."""
        self.won = False

    def start(self, grounding: Grounding) -> str:
        """Begin a game, or begin it again; returns the first text, in which alone the task sentence stands."""
        self._texts = grounding.texts
        self._state = _initial_state(self._library, grounding)
        self._facts = Facts(self._state)
        self._entities = _entities(self._state)
        self._look_around()
        return self._texts.derive("#intro#", self._scope({}))

    def act(self, command: str) -> str:
        """Give a command; returns what the game answers."""
        action = self._valid.get(command.strip())
        if action is None:
            return NOTHING_HAPPENS
        self._facts.changed(self._state.apply(action))
        text = self._texts.derive(action.feedback_rule, self._scope(action.mapping))
        self._look_around()
        return text

    def _look_around(self) -> None:
        self.won = self._state.check_goal()
        self._valid = {}
        for action in self._state.all_applicable_actions():
            self._valid.setdefault(self._texts.derive(action.command_template, self._scope(action.mapping)), action)
        self.admissible = sorted(self._valid)

    def _scope(self, mapping: Mapping[Any, Any]) -> Scope:
        named = {placeholder.name: self._entities[variable.name] for placeholder, variable in mapping.items()}
        return Scope(self._facts, self._entities, named, mapping)


def _initial_state(library: Any, grounding: Grounding) -> Any:
    """What `PddlState.__init__` builds, without translating again."""
    logic, textworld = extra.load("textworld.envs.pddl.logic"), extra.load("textworld.logic")
    translation = grounding.translation
    rules = textworld.GameLogic()
    known = set()
    for name, *supertypes in translation.types:
        if name not in known:  # "object" is a type of the domain and of every domain
            rules.types.add(textworld.Type(name, supertypes))
            known.add(name)
    rules.actions = grounding.actions
    state = logic.PddlState.__new__(logic.PddlState)
    textworld.State.__init__(state, rules)
    state.downward_lib = library
    state._actions = _signatures(translation)
    state.name2type = translation.objects
    library.load_sas(translation.sas.encode())
    things = {name: textworld.Variable(name, kind) for name, kind in translation.objects.items()}
    state.add_facts(
        textworld.Proposition(predicate, [things[name] for name in names]) for predicate, *names in translation.facts
    )
    atoms = (logic.Atom * library.get_state_size())()
    library.get_state(atoms)
    facts = (atom.get_fact(state.name2type) for atom in atoms)
    state.add_facts(fact for fact in facts if not fact.is_negation)
    return state


def _signatures(translation: Translation) -> dict[str, Any]:
    """Of each action what `PddlState` reads of Fast Downward's own: its parameters."""
    return {
        action: SimpleNamespace(parameters=[SimpleNamespace(name=name, type_name=kind) for name, kind in parameters])
        for action, parameters in translation.parameters.items()
    }


def _entities(state: Any) -> dict[str, Any]:
    """How each thing is called, by id."""
    info = extra.load("textworld.generator.game").EntityInfo
    entities = {var.name: info(var.name, var.type) for fact in state.facts for var in fact.arguments}
    names = extra.load("alfworld.agents.utils.misc").Demangler(game_infos=entities, shuffle=False)
    for entity in entities.values():
        entity.name = names.demangle_alfred_name(entity.id)
        entity.definite, entity.indefinite = "the", "a"
    return entities


class EnginePool:
    """Idle engines and recent groundings, for all episodes of a process.

    Args:
        groundings: How many games stay grounded (0.5 MB each for a genuine game).
    """

    def __init__(self, groundings: int = 128) -> None:
        self._size = groundings
        self._groundings: OrderedDict[Game, Grounding] = OrderedDict()
        self._idle: list[Engine] = []

    def acquire(self) -> Engine:
        """An engine nobody else holds."""
        return self._idle.pop() if self._idle else Engine()

    def release(self, engine: Engine) -> None:
        """Give an engine back, whatever state its game is in."""
        self._idle.append(engine)

    def grounding(self, game: Game, kept: TranslationCache | None = None) -> Grounding:
        """The game's grounding, from memory if it was played recently; `kept` as for `ground`."""
        found = self._groundings.pop(game, None) or ground(game, kept)
        self._groundings[game] = found
        if len(self._groundings) > self._size:
            self._groundings.popitem(last=False)
        return found


@cache
def engine_pool() -> EnginePool:
    """The pool of this process."""
    return EnginePool()
