"""How many bytes and FLOPs a piece of code takes, found by running it on tensors without memory."""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten


@dataclass(frozen=True)
class _Block:
    kind: str
    size: int
    alive: "weakref.ref[Any]"


class Watch(TorchDispatchMode):
    """Counts the bytes of the tensors made inside it and alive, by kind, and the FLOPs of matrix products.

    What runs inside `pretend` sees fake tensors: they have a shape and a type, and no memory. What depends on their
    values gets an answer that makes the most work: every row of a boolean index counts, as many as `counts` says, a
    question is answered with True, and what is looked for is found everywhere.
    """

    def __init__(self) -> None:
        super().__init__()
        self.kind = "other"
        """Of the tensors made from now on; `label` sets it."""
        self.live: Counter[str] = Counter()
        """Bytes by kind."""
        self.peak = 0
        """Most bytes alive at once since `restart`."""
        self.at_peak: Counter[str] = Counter()
        """Where they were."""
        self.flops = 0
        """Of matrix products since `restart`; causal attention computes half of its square."""
        self._blocks: dict[int, _Block] = {}
        self._weights: set[int] = set()
        self._counts: dict[int, int] = {}

    @contextmanager
    def pretend(self) -> Iterator[None]:
        """Run on fake tensors, which this object watches."""
        with FakeTensorMode(allow_non_fake_inputs=True), self:
            yield

    @contextmanager
    def label(self, kind: str) -> Iterator[None]:
        """Tensors made inside are of this kind."""
        before, self.kind = self.kind, kind
        try:
            yield
        finally:
            self.kind = before

    def restart(self) -> None:
        """Forget the former peak and the FLOPs; what is alive stays counted."""
        self.flops = 0
        self.peak = 0
        self._note_peak()

    def relabel(self, tensor: Tensor, kind: str) -> None:
        """Count a tensor's memory under another kind from now on."""
        key = tensor.untyped_storage()._cdata
        block = self._blocks[key]
        self.live[block.kind] -= block.size
        self.live[kind] += block.size
        self._blocks[key] = _Block(kind, block.size, block.alive)

    def weights(self, model: torch.nn.Module) -> None:
        """Note that these are weights, so that copies of them in another type are told apart from activations."""
        self._weights |= {parameter.untyped_storage()._cdata for parameter in model.parameters()}

    def counts(self, mask: Tensor, number: int) -> Tensor:
        """Tell how many entries of a boolean index are True; it is given back."""
        self._counts[id(mask)] = number
        return mask

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default:
            return self._scalar(func, args)
        if func is aten.index.Tensor:
            args = (args[0], [self._places(index) for index in args[1]])
        result = self._found(func, *args) if func is aten.nonzero.default else func(*args, **kwargs)
        kind = self.kind
        if func is aten._to_copy.default and args[0].untyped_storage()._cdata in self._weights:
            kind = "weights in the compute type"
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf, kind)
        self.flops += _flops(func, args, kwargs, result)
        return result

    def _scalar(self, func: Any, args: Any) -> bool | int | float:
        try:
            return func(*args)
        except DataDependentOutputException:
            kind = args[0].dtype
            return True if kind is torch.bool else 1.0 if kind.is_floating_point else 1

    def _found(self, func: Any, condition: Tensor) -> Tensor:
        try:
            found: Tensor = func(condition)
        except DynamicOutputShapeException:
            return condition.new_empty((condition.numel(), condition.dim()), dtype=torch.long)
        return found

    def _places(self, index: Tensor | None) -> Tensor | None:
        if not isinstance(index, FakeTensor) or index.dtype is not torch.bool:
            return index
        # Made below this mode, since it is no memory of the code that is watched.
        return index.new_empty(self._counts.get(id(index), index.numel()), dtype=torch.long)

    def _note(self, tensor: Tensor, kind: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._blocks:
            return
        size = storage.nbytes()
        self._blocks[key] = _Block(kind, size, weakref.ref(storage, lambda _: self._forget(key)))
        self.live[kind] += size
        self._note_peak()

    def _forget(self, key: int) -> None:
        block = self._blocks.pop(key)
        self.live[block.kind] -= block.size
        self._weights.discard(key)

    def _note_peak(self) -> None:
        total = sum(self.live.values())
        if total > self.peak:
            self.peak, self.at_peak = total, Counter(self.live)


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    if func is aten._scaled_dot_product_flash_attention_for_cpu.default:
        return _attention_flops(args[0], args[1], products=2, causal=_argument(args, kwargs, 4, "is_causal"))
    if func is aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        # The scores once more, and the gradients of scores, queries, keys and values.
        return _attention_flops(args[1], args[2], products=5, causal=_argument(args, kwargs, 7, "is_causal"))
    formula = flop_registry.get(func._overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=result))


def _argument(args: Any, kwargs: Any, place: int, name: str) -> bool:
    return bool(args[place] if len(args) > place else kwargs.get(name, False))


def _attention_flops(query: Tensor, key: Tensor, *, products: int, causal: bool) -> int:
    batch, heads, length, width = query.shape
    return products * 2 * batch * heads * length * key.shape[2] * width // (2 if causal else 1)
