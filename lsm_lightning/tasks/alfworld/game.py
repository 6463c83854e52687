"""One game as data, wherever it comes from."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lsm_lightning.tasks.alfworld.layout import Kind


@dataclass(frozen=True, kw_only=True, slots=True)
class Game:
    """One game, as a `game.tw-pddl` file holds it."""

    name: str
    """Where it is from, for messages: its path, or the folder a generated game would have."""
    kind: Kind
    domain: str
    grammar: str
    problem: str
    plan: Sequence[str]
    """Commands that win it from the start."""

    def to_dict(self) -> dict[str, Any]:
        """The five keys of a `game.tw-pddl` file."""
        return {
            "pddl_domain": self.domain,
            "grammar": self.grammar,
            "pddl_problem": self.problem,
            "walkthrough": list(self.plan),
            "solvable": True,
        }
