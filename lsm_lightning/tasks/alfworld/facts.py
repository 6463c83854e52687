"""What holds in a game, looked up by what is known already.

textworld answers a query by sorting all facts of a predicate at each of its steps, which is most of the time a command
takes. `Facts` gives the same answers in the same order, from tables that are sorted once and kept until a fact of
theirs changes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from lsm_lightning.tasks.alfworld import extra


class Facts:
    """The facts of a state.

    Args:
        state: textworld's; tell `changed` what it does.
    """

    def __init__(self, state: Any) -> None:
        self._state = state
        self._signature = extra.load("textworld.logic").Signature
        self._concrete: dict[Any, Sequence[Any]] = {}
        self._tables: dict[Any, _Table] = {}

    def changed(self, facts: Iterable[Any]) -> None:
        """Note facts that hold now, while their opposites do no more."""
        for fact in facts:
            self._tables.pop(fact.signature, None)
            self._tables.pop(fact.negate().signature, None)

    def assignments(self, query: Any, known: Mapping[Any, Any]) -> Iterator[Mapping[Any, Any]]:
        """Ways to fill a query's placeholders so that it holds, in textworld's order; no two stand for the same thing.

        Args:
            query: textworld's rule, of preconditions only.
            known: What some placeholders stand for.
        """
        return self._assignments(query.preconditions, known, frozenset(known.values()))

    def _assignments(
        self, conditions: Sequence[Any], known: Mapping[Any, Any], used: frozenset[Any]
    ) -> Iterator[Mapping[Any, Any]]:
        if not conditions:
            yield known
            return
        for fact in self._candidates(conditions[0], known):
            filled = _fill(conditions[0].parameters, fact.arguments, known, used)
            if filled is not None:
                yield from self._assignments(conditions[1:], {**known, **filled}, used.union(filled.values()))

    def _candidates(self, condition: Any, known: Mapping[Any, Any]) -> Iterator[Any]:
        """Facts of the condition's predicate that agree with the first of its placeholders that is known."""
        place = next((n for n, placeholder in enumerate(condition.parameters) if placeholder in known), None)
        for signature in self._signatures(condition.signature):
            table = self._tables.get(signature)
            if table is None:
                table = self._tables[signature] = _Table(self._state.facts_with_signature(signature))
            yield from table.rows if place is None else table.having(place, known[condition.parameters[place]])

    def _signatures(self, general: Any) -> Sequence[Any]:
        """Those that a condition's signature stands for, each type by its subtypes."""
        found = self._concrete.get(general)
        if found is None:
            types = self._state._logic.types
            found = [
                self._signature(general.name, [kind.name for kind in kinds])
                for kinds in types.multi_subtypes([types.get(kind) for kind in general.types])
            ]
            self._concrete[general] = found
        return found


class _Table:
    """The facts of one signature."""

    def __init__(self, facts: Iterable[Any]) -> None:
        self.rows = sorted(facts, key=lambda fact: fact.names)
        self._indices: dict[int, dict[Any, list[Any]]] = {}

    def having(self, place: int, thing: Any) -> Sequence[Any]:
        """Those with this thing at this place."""
        index = self._indices.get(place)
        if index is None:
            index = self._indices[place] = {}
            for row in self.rows:
                index.setdefault(row.arguments[place], []).append(row)
        return index.get(thing, ())


def _fill(
    placeholders: Sequence[Any], things: Sequence[Any], known: Mapping[Any, Any], used: frozenset[Any]
) -> dict[Any, Any] | None:
    """What the placeholders that are not known come to stand for; None if they cannot."""
    filled: dict[Any, Any] = {}
    for placeholder, thing in zip(placeholders, things, strict=True):
        existing = filled.get(placeholder) or known.get(placeholder)
        if existing is None:
            if thing in used or thing in filled.values():
                return None
            filled[placeholder] = thing
        elif existing != thing:
            return None
    return filled
