"""A KV cache whose rows come and go while the others write on.

All rows write in the same column, so that a row that has seen n tokens holds the n columns before it. That is what
transformers calls left padding: its masks, sliding windows and position ids hold as they are. The last row takes the
place of one that is done, so that those that write are always the first ones; the oldest columns are forgotten once
the rows that needed them are done.
"""

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    Cache,
    DummyLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from lsm_lightning.errors import ConfigurationError


class RowLayer(DynamicLayer):
    """Keys and values of attention, in memory with room for more.

    Args:
        rows: That there is room for.
        columns: That can be written before `reserve` has to make room.
        sliding_window: Tokens that a position looks back on, itself included; None: all.
    """

    def __init__(self, rows: int, columns: int, sliding_window: int | None = None) -> None:
        super().__init__()
        self.is_sliding = sliding_window is not None
        self.sliding_window = sliding_window
        self.room = (rows, columns)
        self.rows = 0
        self.length = 0
        """Tokens that the longest row has seen."""
        self.end = 0
        """The column that is written next."""

    @property
    def held(self) -> int:
        """Columns before `end` that the next token may look at."""
        return self.length if self.sliding_window is None else min(self.length, self.sliding_window - 1)

    def append(self, source: Any, index: Int[Tensor, " m"]) -> None:
        """More rows, taken from the layer of a prefill; of the first ones `length` has been told."""
        if not self.is_initialized:
            self.is_initialized, self.device, self.end = True, source.keys.device, self.held
            rows, columns = self.room
            self.keys, self.values = (_with_room(old[:0, :, :0], rows, self.end + columns) for old in _both(source))
        width, after = min(self.held, source.keys.shape[2]), self.rows + len(index)
        for mine, theirs in zip(_both(self), _both(source), strict=True):
            mine[self.rows : after, :, self.end - width : self.end] = theirs[index, :, theirs.shape[2] - width :]
        self.rows = after

    def keep(self, order: Int[Tensor, " n"], moved: Int[Tensor, " m"]) -> None:
        """The first rows only, of which some are taken from further behind."""
        held = slice(self.end - self.held, self.end)
        for memory in _both(self):
            memory[moved, :, held] = memory[order[moved], :, held]
        self.rows = len(order)

    def reserve(self, rows: int, columns: int) -> None:
        """Move to memory for so many rows and new columns; where a longer row is to come, also before those held."""
        first = max(0, self.end - self.held)
        before = self.held - (self.end - first)
        old = [memory[: self.rows, :, first : self.end] for memory in _both(self)]
        self.end = self.held
        self.keys, self.values = (_with_room(memory, rows, columns, before) for memory in old)

    def update(
        self, key_states: Float[Tensor, "n h t d"], value_states: Float[Tensor, "n h t e"], *args: Any, **kwargs: Any
    ) -> tuple[Float[Tensor, "n h l d"], Float[Tensor, "n h l e"]]:
        """Write the next columns of every row; gives what these may look at."""
        first, self.end = self.end - self.held, self.end + key_states.shape[2]
        for memory, states in zip(_both(self), (key_states, value_states), strict=True):
            memory[: self.rows, :, self.end - states.shape[2] : self.end] = states
        self.length += key_states.shape[2]
        keys, values = (memory[: self.rows, :, first : self.end] for memory in _both(self))
        return keys, values

    def get_seq_length(self) -> int:
        """Tokens that the longest row has seen."""
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many columns a query may look at, and how many are forgotten."""
        return self.held + query_length, self.length - self.held


class RowStates(LinearAttentionLayer):
    """The states of a recurrent layer (Mamba, short convolutions): of a row's length they do not depend."""

    def append(self, source: Any, index: Int[Tensor, " m"]) -> None:
        """More rows, taken from the layer of a prefill."""
        for name in ("device", "dtype", "conv_kernel_size", "has_previous_state"):
            setattr(self, name, getattr(source, name))
        for kind in ("conv_states", "recurrent_states"):
            mine, theirs = getattr(self, kind), getattr(source, kind)
            for key, state in theirs.items():
                if state is not None:
                    parts = [] if mine[key] is None else [mine[key]]
                    mine[key] = torch.cat((*parts, state[index]))
                    getattr(self, f"is_{kind}_initialized")[key] = True

    def keep(self, order: Int[Tensor, " n"], moved: Int[Tensor, " m"]) -> None:
        """These rows only, in this order."""
        self.reorder_cache(order)  # type: ignore[arg-type]

    def reserve(self, rows: int, columns: int) -> None:
        """States do not grow."""


class RowStatesAndLayer(RowStates, RowLayer):  # type: ignore[misc, override]
    """A layer that has both: attention beside recurrence (Falcon-H1)."""

    def __init__(self, rows: int, columns: int, sliding_window: int | None, number_of_states: int) -> None:
        RowLayer.__init__(self, rows, columns, sliding_window)
        RowStates.__init__(self, number_of_states)

    def append(self, source: Any, index: Int[Tensor, " m"]) -> None:
        """Both, see there."""
        RowLayer.append(self, source, index)
        RowStates.append(self, source, index)

    def keep(self, order: Int[Tensor, " n"], moved: Int[Tensor, " m"]) -> None:
        """Both, see there."""
        RowLayer.keep(self, order, moved)
        RowStates.keep(self, order, moved)

    def reserve(self, rows: int, columns: int) -> None:
        """Of the attention."""
        RowLayer.reserve(self, rows, columns)


class RowCache(Cache):
    """What a model knows of the rows that are being written.

    Args:
        model: Which model.
        length: Tokens of the longest prompt of the first rows; before a longer one follows, `lengthen` is called.
        rows: There is room for so many.
        columns: Tokens that can be written before `reserve` has to make room.

    Raises:
        ConfigurationError: The model has layers of another kind.
    """

    def __init__(self, model: PreTrainedModel, length: int, rows: int, columns: int) -> None:
        super().__init__(
            [_row_layer(layer, rows, columns, model) for layer in DynamicCache(config=model.config).layers]
        )
        self.room = columns
        """Tokens that can be written still."""
        self.length = length
        """Tokens that the longest row has seen."""
        self._mask: Bool[Tensor, "n u"] | None = None
        """Also of columns that are still to be written; none where rows have come, gone or moved since."""
        self.shorten(length)

    def mask(self, seen: Int[Tensor, " n"]) -> Bool[Tensor, "n t"] | None:
        """Which columns belong to each row, the next one included, from how many tokens it has seen.

        None where no layer looks back: such models take a mask for that of the tokens that they are given.
        """
        if not any(isinstance(layer, RowLayer) for layer in self.layers):
            return None
        if self._mask is None:
            self._mask = torch.arange(self.length + self.room, device=seen.device) >= self.length - seen[:, None]
        return self._mask[:, : self.length + 1]

    def append(self, prefilled: DynamicCache, index: Int[Tensor, " m"]) -> None:
        """More rows, taken from those of a prefill that is padded on the left."""
        self._mask = None
        for layer, source in zip(_kept(self), _kept(prefilled), strict=True):
            layer.append(source, index)

    def keep(self, order: Int[Tensor, " n"], moved: Int[Tensor, " m"]) -> None:
        """The first rows only: row i is the former row `order[i]`, another one where i is among `moved`."""
        self._mask = None
        for layer in _kept(self):
            layer.keep(order, moved)

    def advance(self) -> None:
        """Every row has written a token."""
        self.length, self.room = self.length + 1, self.room - 1

    def shorten(self, length: int) -> None:
        """The longest row has seen no more than this, now that longer ones are done."""
        self._mask = None
        self.length = length
        for layer in self.layers:
            if isinstance(layer, RowLayer):
                layer.length = length

    def lengthen(self, length: int, rows: int, columns: int) -> None:
        """A longer row is to come. Where too few columns are behind those that write, all move, as in `reserve`."""
        self.shorten(length)
        if any(isinstance(layer, RowLayer) and layer.end < layer.held for layer in self.layers):
            self.reserve(rows, columns)

    def reserve(self, rows: int, columns: int) -> None:
        """Make room for so many rows and tokens, layer by layer."""
        self._mask = None
        self.room = columns
        for layer in _kept(self):
            layer.reserve(rows, columns)


def recurrent(model: PreTrainedModel) -> bool:
    """Whether a layer keeps a state, which padding in a prompt would change."""
    return any(isinstance(layer, LinearAttentionLayer) for layer in DynamicCache(config=model.config).layers)


def _kept(cache: Cache) -> list[Any]:
    """The layers that keep something."""
    return [layer for layer in cache.layers if not isinstance(layer, DummyLayer)]


def _row_layer(layer: Any, rows: int, columns: int, model: PreTrainedModel) -> Any:
    """The counterpart of a layer of transformers' cache."""
    if type(layer) is DynamicLayer:
        return RowLayer(rows, columns)
    if type(layer) is DynamicSlidingWindowLayer:
        return RowLayer(rows, columns, layer.sliding_window)
    if type(layer) is LinearAttentionLayer:
        return RowStates(layer.number_of_states)
    if type(layer) in (LinearAttentionAndFullAttentionLayer, LinearAttentionAndSlidingWindowAttentionLayer):
        return RowStatesAndLayer(rows, columns, getattr(layer, "sliding_window", None), layer.number_of_states)
    if isinstance(layer, DummyLayer):  # of a layer without attention, or that looks at another layer's keys
        return layer
    raise ConfigurationError(
        f"LocalEngine cannot write with {type(model).__name__}: it does not know how to keep a {type(layer).__name__}. "
        "Take another student, or another model.engine."
    )


def _both(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.keys, layer.values


def _with_room(old: Float[Tensor, "n h l d"], rows: int, columns: int, before: int = 0) -> Float[Tensor, "m h k d"]:
    """The same in memory for so many rows and more columns. Zeros, since what is masked must still be a number."""
    n, heads, length, width = old.shape
    memory = old.new_zeros((rows, heads, before + length + columns, width))
    memory[:n, :, before : before + length] = old
    return memory
