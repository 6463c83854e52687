"""The texts of a game, derived from its grammar as textworld derives them, in a fraction of the time.

Same grammar, same rules, same order of matches (a test compares every text with textworld's own). Differences:

1. Templates and conditions are parsed once per process, not at every step.
2. A symbol and the scope it is read in are two objects, so no symbol is ever copied.
3. Expressions such as `o.indefinite + ' ' + o.name` are interpreted, not passed to `eval`: a game file runs no code.
"""

import ast
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, TypeAlias

from lsm_lightning.tasks.alfworld import extra
from lsm_lightning.tasks.alfworld.facts import Facts

Item: TypeAlias = "tuple[Any, Scope]"
"""A symbol of textworld's grammar, still to be derived, and where its names are looked up."""

_TASK_RULE = re.compile(r'"rhs": ("Your task is to: (?:[^"\\]|\\.)*")')


@dataclass(frozen=True, slots=True)
class Scope:
    """What the names in a text stand for."""

    facts: Facts
    """What holds now."""
    entities: Mapping[str, Any]
    """textworld's entity infos by id: how each thing is called."""
    variables: Mapping[str, Any]
    """Entity infos by placeholder name."""
    mapping: Mapping[Any, Any]
    """State variables by placeholder."""

    def matches(self, condition: str) -> list["Scope"]:
        """One scope for each way in which the condition holds, in textworld's order."""
        return [self._extended(mapping) for mapping in self.facts.assignments(_query(condition), self.mapping)]

    def holds(self, condition: str | None) -> bool:
        """Whether there is any such way; no condition holds always."""
        return not condition or any(True for _ in self.facts.assignments(_query(condition), self.mapping))

    def _extended(self, mapping: Mapping[Any, Any]) -> "Scope":
        named = {placeholder.name: self.entities[variable.name] for placeholder, variable in mapping.items()}
        return Scope(self.facts, self.entities, {**self.variables, **named}, mapping)


class TextGrammar:
    """The production rules of one game.

    Args:
        rules: textworld's production rules by left-hand side.
    """

    def __init__(self, rules: Mapping[str, Sequence[Any]]) -> None:
        self._rules = rules
        self._textgen = extra.load("textworld.envs.pddl.textgen")

    def derive(self, template: str, scope: Scope) -> str:
        """The text a template such as `#intro#` or `take {o} from {r}` stands for."""
        pending = [(symbol, scope) for symbol in reversed(_symbols(template))]
        text = []
        while pending:
            symbol, scope = pending.pop()
            if isinstance(symbol, self._textgen.TerminalSymbol):
                text.append(str(symbol))
            else:
                pending.extend(reversed(self._expand(symbol, scope)))
        return "".join(text)

    def _expand(self, symbol: Any, scope: Scope) -> list[Item]:
        textgen = self._textgen
        if isinstance(symbol, textgen.NonterminalSymbol):
            rule = next(rule for rule in self._rules[str(symbol)] if scope.holds(rule.condition))
            return [(part, scope) for part in rule.rhs]
        if isinstance(symbol, textgen.ConditionalSymbol):
            scopes = scope.matches(symbol.given) if symbol.given else [scope]
            return [(symbol.expression, inner) for inner in scopes]
        if isinstance(symbol, textgen.ListSymbol):
            return self._listed(self._expand(symbol.symbol, scope), scope)
        return [(textgen.TerminalSymbol(_evaluate(_expression(symbol.expression), scope.variables)), scope)]

    def _listed(self, items: list[Item], scope: Scope) -> list[Item]:
        """`a, b, and c`, with the grammar's own separators."""
        if not items:
            return [self._nonterminal("list_empty", scope)]
        listed = items[:1]
        for item in items[1:-1]:
            listed += [self._nonterminal("list_separator", scope), item]
        if len(items) > 1:
            listed += [self._nonterminal("list_last_separator", scope), items[-1]]
        return listed

    def _nonterminal(self, name: str, scope: Scope) -> Item:
        return self._textgen.NonterminalSymbol(name), scope


def parse_logic(grammar: str) -> tuple[Mapping[str, Any], TextGrammar]:
    """The actions and the texts a game file's `grammar` defines.

    Games differ in nothing but the task sentence. It is taken out before the parser runs (50 ms) and put back after it,
    so that all games share one parse.
    """
    sentences = _TASK_RULE.findall(grammar)
    if len(sentences) != 1:
        logic = _parse(grammar)
        return logic.actions, TextGrammar(logic.grammar._rules)
    logic = _parse(_TASK_RULE.sub('"rhs": "Your task is to: "', grammar))
    task = extra.load("textworld.envs.pddl.textgen").ProductionRule("task", _symbols(json.loads(sentences[0])))
    return logic.actions, TextGrammar({**logic.grammar._rules, "task": [task]})


@lru_cache(maxsize=8)
def _parse(grammar: str) -> Any:
    with _forgetting("textworld.envs.pddl.logic") as logic, _forgetting("textworld.envs.pddl.textgen"):
        return logic.GameLogic(domain="", grammar=grammar)


@lru_cache(maxsize=1024)
def _symbols(template: str) -> Sequence[Any]:
    with _forgetting("textworld.envs.pddl.textgen") as textgen:
        return tuple(textgen._parse_and_convert(template, rule_name="symbols"))


@cache
def _query(condition: str) -> Any:
    with _forgetting("textworld.logic") as logic:
        return logic.Rule.parse_conjunctive_query(condition)


@contextmanager
def _forgetting(module: str) -> Iterator[Any]:
    """A module of textworld whose parser, afterwards, no longer keeps its last exception.

    Through the frames of its traceback that would keep alive whoever asked for the parse: an episode and its engine.
    """
    loaded = extra.load(module)
    try:
        yield loaded
    finally:
        loaded._PARSER._furthest_exception = None


@cache
def _expression(text: str) -> ast.expr:
    return ast.parse(text.strip(), mode="eval").body


def _evaluate(node: ast.expr, variables: Mapping[str, Any]) -> Any:
    """The value of an expression of names, public attributes, text, `+` and `or`."""
    match node:
        case ast.Name(id=name):
            return variables[name]
        case ast.Attribute(value=owner, attr=attribute) if not attribute.startswith("_"):
            return getattr(_evaluate(owner, variables), attribute)
        case ast.Constant(value=str(text)):
            return text
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _evaluate(left, variables) + _evaluate(right, variables)
        case ast.BoolOp(op=ast.Or(), values=values):
            first = [value for value in (_evaluate(part, variables) for part in values) if value]
            return first[0] if first else None
    raise ValueError(f"the game's grammar has the expression {ast.unparse(node)!r}, which is none of ALFWorld's")
