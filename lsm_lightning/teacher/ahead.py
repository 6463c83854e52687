"""A teacher on other machines scores what is written while the student writes on."""

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType

import torch

from lsm_lightning.batching import spans
from lsm_lightning.teacher.scoring import joined
from lsm_lightning.types import Support, Turn


class ScoringAhead:
    """Scores turns in a thread of its own, in the order in which they are handed in; a context manager.

    What is handed in while it is at work is scored in one go afterwards.

    Args:
        score: Gives the support of some turns, at their response positions laid end to end.
        cancel: Makes a `score` under way end, where an error ends the block.
    """

    def __init__(self, score: Callable[[Sequence[Turn]], Support], cancel: Callable[[], None]) -> None:
        self._score, self._cancel = score, cancel
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="scoring")
        self._turns: list[Turn] = []
        self._begun = 0
        """How many of them are scored, or are being."""
        self._parts: list[Future[Support | None]] = []

    def __enter__(self) -> "ScoringAhead":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:  # Python would wait for the thread at its end, and that may be for minutes
            self._cancel()
        self._thread.shutdown(cancel_futures=True)

    def submit(self, turns: Sequence[Turn]) -> None:
        """Score these; returns at once."""
        self._turns += turns
        self._parts.append(self._thread.submit(self._score_rest))

    def _score_rest(self) -> Support | None:
        rest = self._turns[self._begun :]
        self._begun += len(rest)
        return self._score(rest) if rest else None

    def result(self, turns: Sequence[Turn]) -> Support:
        """The support of all turns handed in, in another order of the same; waits for it.

        Raises:
            Exception: What `score` raised.
        """
        parts = [support for part in self._parts if (support := part.result()) is not None]
        support = joined(parts or [self._score([])])
        places = spans([len(turn.completion.ids) for turn in self._turns])
        place_of = {id(turn): place for turn, place in zip(self._turns, places, strict=True)}
        rows = [row for turn in turns for row in place_of[id(turn)]]
        return support.rows(torch.tensor(rows, dtype=torch.long, device=support.ids.device))
