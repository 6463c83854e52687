"""Answers written side by side: where one ends, the next begins, of the same conversation or of another."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from lsm_lightning.batching import padded
from lsm_lightning.rollout.base import Request, Sampling, check_finite
from lsm_lightning.rollout.cache import RowCache, recurrent
from lsm_lightning.rollout.sampling import sample
from lsm_lightning.rollout.stops import StopStrings
from lsm_lightning.types import Completion

PATIENCE = 1.0
"""Answers that wait are let in when the rows that stay free meanwhile have lost so many tokens for each row that could
be written: in company prefills cost less."""
COMPANY = 4.0
"""The same where all that wait have found a row. Then conversations that write alike stay together, and lose little."""
PADDING = 1 / 4
"""Share of a prefill's longest prompt by which another one may fall short of it."""
COLUMNS = 64
"""Fewest columns by which the cache grows, where so many may be needed."""


@dataclass(frozen=True, kw_only=True)
class Ends:
    """What ends an answer besides its limit."""

    turn: AbstractSet[int]
    stops: StopStrings | None


@dataclass(kw_only=True)
class Answer:
    """One request, and what has been written."""

    number: int
    """Of its conversation."""
    prompt: tuple[int, ...]
    limit: int
    """Most tokens."""
    numbers: Iterator[float]
    """From 0 to 1, one for each token."""
    ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    ended: bool = False
    stopped: bool = False

    @classmethod
    def of(cls, number: int, request: Request, max_new_tokens: int) -> "Answer":
        """Nothing is written yet."""
        limit = request.longest(max_new_tokens)
        return cls(number=number, prompt=tuple(request.ids), limit=limit, numbers=_numbers(request.seed))

    def add(self, token: int, log_prob: float, ends: Ends) -> bool:
        """One more token, with its log-prob; tells whether the answer goes on."""
        self.ids.append(token)
        self.log_probs.append(log_prob)
        self.ended = token in ends.turn
        self.stopped = not self.ended and ends.stops is not None and ends.stops.completed_by(self.ids)
        return not (self.ended or self.stopped) and len(self.ids) < self.limit

    def completion(self) -> Completion:
        """What has been written."""
        truncated = not (self.ended or self.stopped)
        return Completion(ids=self.ids, log_probs=self.log_probs, truncated=truncated, stopped=self.stopped)


@dataclass(kw_only=True)
class Prefill:
    """Distinct prompts that the model has read."""

    row_of: dict[tuple[int, ...], int]
    cache: DynamicCache
    logits: Float[Tensor, "p v"]
    """Of the first token behind each."""

    @classmethod
    def read(cls, model: PreTrainedModel, prompts: Sequence[tuple[int, ...]]) -> "Prefill":
        """Let the model read prompts side by side."""
        ids, mask = left_pad(prompts, model.device)
        cache = DynamicCache(config=model.config)
        output = model(
            input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), cache=cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        rows = {prompt: row for row, prompt in enumerate(prompts)}
        return cls(row_of=rows, cache=cache, logits=output.logits[:, -1].float())

    def index(self, answers: Sequence[Answer]) -> Int[Tensor, " a"]:
        """The prompts of some answers."""
        return torch.tensor([self.row_of[answer.prompt] for answer in answers], device=self.logits.device)

    def only(self, prompt: tuple[int, ...]) -> "Prefill":
        """One prompt, without the memory of the others."""
        row: Any = torch.tensor([self.row_of[prompt]], device=self.logits.device)
        self.cache.reorder_cache(row)
        return Prefill(row_of={prompt: 0}, cache=self.cache, logits=self.logits[row])


class Batch:
    """Answers in the making, so many at a time; the longest prompts come first, so that rows move seldom.

    Args:
        model: In eval mode.
        ask: Gives what is to be answered: at first, and then what follows from the answers given.
        give: Takes answers, by the number of their conversation, as soon as they are complete.
        sampling: How tokens are drawn.
        ends: Where an answer ends.
        rows: Answers written side by side.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        ask: Callable[[], Sequence[Answer]],
        give: Callable[[Mapping[int, Completion]], None],
        sampling: Sampling,
        ends: Ends,
        rows: int,
    ) -> None:
        self.model, self.sampling, self.ends, self.rows = model, sampling, ends, rows
        self._ask, self._give = ask, give
        self.waiting: list[Answer] = []
        self.writing: list[Answer] = []
        """One a row of the cache."""
        self.given = 0
        """Answers given since it was last asked what follows from them."""
        self.lost = 0
        """Tokens that could have been written in rows that were free, since answers were last let in."""
        self.cache: RowCache | None = None
        self.tokens = torch.zeros(0, dtype=torch.long, device=model.device)
        """`[rows]` The last token of each, which the model has not seen yet."""
        self.seen = torch.zeros_like(self.tokens)
        """`[rows]` How many it has seen."""
        self._prefill: Prefill | None = None
        self._read: list[Answer] = []
        """Those that wait and whose prompts are in the prefill."""
        self._padding = 0.0 if recurrent(model) else PADDING

    @torch.no_grad()
    def run(self) -> None:
        """Write all of them to their ends."""
        self._hear()
        while self._open:
            patience = PATIENCE if self._asking else COMPANY
            if self.writing and self.lost < patience * self._rows:
                self._write()
                continue
            self.lost = 0
            if self.given:
                self._hear()
            while self._free and self._asking:
                self._let_in()

    @property
    def _open(self) -> int:
        """Conversations that are not over, as far as is known."""
        return len(self.writing) + self._asking + self.given

    @property
    def _asking(self) -> int:
        """Answers that wait."""
        return len(self._read) + len(self.waiting)

    @property
    def _rows(self) -> int:
        """Rows that there is something for, as far as is known."""
        return min(self.rows, self._open)

    @property
    def _free(self) -> int:
        return self.rows - len(self.writing)

    def _hear(self) -> None:
        """What is asked next."""
        self.given = 0
        asked = self._ask()
        self._end([answer for answer in asked if answer.limit < 1])
        self.waiting += [answer for answer in asked if answer.limit > 0]
        self.waiting.sort(key=lambda answer: (-len(answer.prompt), answer.prompt))

    def _end(self, answers: Sequence[Answer]) -> None:
        """These are complete."""
        if answers:
            self.given += len(answers)
            self._give({answer.number: answer.completion() for answer in answers})

    # ---- new rows ---------------------------------------------------------------------------------------------------

    def _let_in(self) -> None:
        """Answers that wait, as many as rows are free and one prefill is for."""
        if self._prefill is None:
            self._prefill = Prefill.read(self.model, self._next_prompts())
            self._read = [answer for answer in self.waiting if answer.prompt in self._prefill.row_of]
            del self.waiting[: len(self._read)]
        prefill, free = self._prefill, self._free
        taken, self._read = self._read[:free], self._read[free:]
        tokens, going = self._draw(taken, prefill.logits[prefill.index(taken)])
        if going:
            self.writing += (taken := [taken[row] for row in going])
            self.tokens = torch.cat((self.tokens, tokens[going]))
            lengths = [len(answer.prompt) for answer in taken]
            self.seen = torch.cat((self.seen, torch.tensor(lengths, device=self.seen.device)))
            if self.cache is None:
                self.cache = RowCache(self.model, max(lengths), *self._room(max(lengths)))
            elif max(lengths) > self.cache.length:
                self.cache.lengthen(max(lengths), *self._room(max(lengths)))
            self.cache.append(prefill.cache, prefill.index(taken))
        # Where rows ran out in the middle of a group, its prompt is kept for the rest.
        self._prefill = prefill.only(self._read[0].prompt) if self._read else None

    def _next_prompts(self) -> list[tuple[int, ...]]:
        """Distinct ones of like length, for as many answers as rows are free."""
        shortest = len(self.waiting[0].prompt) * (1 - self._padding)
        prompts = (answer.prompt for answer in self.waiting[: self._free])
        return list(dict.fromkeys(prompt for prompt in prompts if len(prompt) >= shortest))

    def _room(self, length: int) -> tuple[int, int]:
        """Rows and columns that the cache is to have room for, beyond the tokens that it holds."""
        needed = max(answer.limit - len(answer.ids) for answer in (*self.writing, *self._read, *self.waiting))
        return self._rows, more_columns(length, needed)

    # ---- one more token ---------------------------------------------------------------------------------------------

    def _write(self) -> None:
        """One more token for every row."""
        assert self.cache is not None
        self.lost += self._rows - len(self.writing)
        if not self.cache.room:
            self.cache.reserve(*self._room(self.cache.length))
        output = self.model(
            input_ids=self.tokens[:, None], attention_mask=self.cache.mask(self.seen), position_ids=self.seen[:, None],
            cache=self.cache, use_cache=True,
        )  # fmt: skip
        logits = output.logits[:, -1].float()
        del output
        self.cache.advance()
        self.seen = self.seen + 1
        self.tokens, going = self._draw(self.writing, logits)
        if len(going) < len(self.writing):
            self._keep(going)

    def _draw(self, answers: Sequence[Answer], logits: Float[Tensor, "a v"]) -> tuple[Int[Tensor, " a"], list[int]]:
        """A token for each, and which of them go on."""
        numbers = [next(answer.numbers) for answer in answers]
        tokens, drawn = sample(logits, torch.tensor(numbers, dtype=torch.float32, device=logits.device), self.sampling)
        log_probs = drawn.tolist()
        check_finite(all(map(math.isfinite, log_probs)))
        added = zip(answers, tokens.tolist(), log_probs, strict=True)
        goes_on = [answer.add(token, log_prob, self.ends) for answer, token, log_prob in added]
        self._end([answer for answer, going in zip(answers, goes_on, strict=True) if not going])
        return tokens, [row for row, going in enumerate(goes_on) if going]

    def _keep(self, going: Sequence[int]) -> None:
        """These rows only; the last of them take the places of those that are done."""
        assert self.cache is not None
        free = sorted(set(range(len(going))).difference(going))
        order = list(range(len(going)))
        for row, last in zip(free, going[len(going) - len(free) :], strict=True):
            order[row] = last
        rows, moved = (torch.tensor(places, dtype=torch.long, device=self.seen.device) for places in (order, free))
        self.tokens, self.seen = self.tokens[rows], self.seen[rows]
        self.writing = [self.writing[row] for row in order]
        if going:
            self.cache.keep(rows, moved)
            self.cache.shorten(max(len(answer.prompt) + len(answer.ids) - 1 for answer in self.writing))
        else:
            self.cache = None


def _numbers(seed: int) -> Iterator[float]:
    """Random ones, drawn many at a time: asking numpy takes longer than drawing."""
    random = np.random.default_rng(seed)
    while True:
        yield from random.random(64).tolist()


def more_columns(length: int, needed: int) -> int:
    """By how many columns a cache of `length` tokens grows, where so many may be needed.

    >>> more_columns(100, 1000), more_columns(1000, 1000), more_columns(1000, 5)
    (64, 250, 5)
    """
    return min(needed, max(COLUMNS, length // 4))


def left_pad(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Int[Tensor, "b t"], Int[Tensor, "b t"]]:
    """Token ids and a 0/1 mask, ends flush right; padding holds token 0, which the mask hides."""
    ids, there = padded(rows, left=True)
    return torch.from_numpy(ids).to(device), torch.from_numpy(there.astype(np.int64)).to(device)
