"""Calls of operators without their numbers: what was called, on tensors of which shapes, how often.

They are seen in a dispatch mode, and each can be made again alone, to be timed.
"""

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.benchmark import Timer
from torch.utils.flop_counter import flop_registry

from trainer.sentinel.operator_check import only_views

MIN_SECONDS = 0.005
"""A call is repeated for so long, once at least."""
DRAWN = 2**16
"""Normal numbers that are drawn for a tensor, and repeated: drawing all takes longer than most calls."""


@dataclass(frozen=True)
class Shape:
    """A tensor without its numbers."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.size)}/{list(self.stride)}"

    @property
    def bytes(self) -> int:
        """Bytes of memory that it takes: an axis that is expanded has one entry."""
        number = 1
        for size, stride in zip(self.size, self.stride, strict=True):
            number *= size if stride else min(1, size)
        return number * self.dtype.itemsize

    def make(self, device: torch.device) -> Tensor:
        """Make a tensor: normal numbers, or zeros, which are valid as indices."""
        stored = [size if stride else min(1, size) for size, stride in zip(self.size, self.stride, strict=True)]
        if not (self.dtype.is_floating_point or self.dtype.is_complex):
            return torch.empty_strided(stored, self.stride, dtype=self.dtype, device=device).zero_().expand(self.size)
        reach = 1 + sum((size - 1) * stride for size, stride in zip(stored, self.stride, strict=True))
        numbers = torch.randn(min(DRAWN, max(reach, 1)), dtype=self.dtype, device=device)
        repeated = numbers.repeat(-(-reach // len(numbers))) if reach > len(numbers) else numbers
        return repeated.as_strided(stored, self.stride).expand(self.size)


@dataclass(frozen=True)
class Call:
    """One call of an operator."""

    operator: str
    """As torch names it, e.g. aten.mm.default."""
    function: Any
    arguments: Any
    """Positional and named ones; tensors as shapes."""
    flops: int
    """Operations of matrix products, convolutions and attention, as torch counts them; 0 for others."""
    bytes: int
    """Bytes of everything read and written."""
    product: tuple[int, int, int, int] | None
    """(batch, m, n, k) of a matrix product."""

    def seconds(self, device: torch.device) -> float | None:
        """Make the call again, alone, and time it; None if it cannot be made."""
        args, keywords = pytree.tree_map_only(Shape, lambda shape: shape.make(device), self.arguments)
        timer = Timer(
            "call(*args, **keywords)",
            globals={"call": self.function, "args": args, "keywords": keywords},
            num_threads=torch.get_num_threads(),
        )
        try:
            with torch.no_grad():
                return timer.blocked_autorange(min_run_time=MIN_SECONDS).median
        except Exception:  # an operator may want more of its arguments than their shapes
            return None


@dataclass
class Seen:
    """Number of times that a call was made, and seconds that it took where it was made."""

    call: Call
    counts: dict[str, int] = field(default_factory=dict)
    """By phase: "micro_batch" or "step"."""
    seconds: dict[str, float] = field(default_factory=dict)


class Recorder(TorchDispatchMode):
    """While entered, sees all calls. `phase` is set by who computes.

    `wait` returns when the device has done what was asked of it: a GPU's operators return before they are done.
    """

    def __init__(self, wait: Callable[[], None] = lambda: None) -> None:
        super().__init__()
        self.wait = wait
        self.phase = "step"
        self.seen: dict[str, Seen] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        # Shapes are read before the call, since it may change its arguments.
        arguments = pytree.tree_map_only(Tensor, _shape, (tuple(args), keywords))
        self.wait()
        began = time.perf_counter()
        result = func(*args, **keywords)
        self.wait()
        took = time.perf_counter() - began
        key = key_of(str(func), arguments)
        seen = self.seen.get(key)
        if seen is None:
            seen = self.seen[key] = Seen(_call(func, args, keywords, arguments, result))
        seen.counts[self.phase] = seen.counts.get(self.phase, 0) + 1
        seen.seconds[self.phase] = seen.seconds.get(self.phase, 0.0) + took
        return result


def key_of(operator: str, arguments: Any) -> str:
    """Return a name of the call that is the same in every process."""
    text = f"{operator} {pytree.tree_map_only(Shape, str, arguments)}"
    return f"{operator} {hashlib.sha256(text.encode()).hexdigest()[:20]}"


def _shape(tensor: Tensor) -> Shape:
    return Shape(tuple(tensor.shape), tuple(tensor.stride()), tensor.dtype)


def _call(func: Any, args: Any, keywords: Any, arguments: Any, result: Any) -> Call:
    shapes = list(_shapes_in(arguments))
    outputs = list(_shapes_in(pytree.tree_map_only(Tensor, _shape, result)))
    count = flop_registry.get(func._overloadpacket)
    flops = int(count(*args, **keywords, out_val=result)) if count is not None else 0
    bytes_moved = 0 if only_views(func) else sum(shape.bytes for shape in (*shapes, *outputs))
    name = str(func)
    product = None
    if name in PRODUCTS:
        left, right = [shape.size for shape in shapes][-2:]
        product = (left[0] if len(left) == 3 else 1, left[-2], right[-1], left[-1])
    return Call(name, func, arguments, flops, bytes_moved, product)


PRODUCTS = ("aten.mm.default", "aten.addmm.default", "aten.bmm.default", "aten.baddbmm.default")


def _shapes_in(tree: Any) -> Iterator[Shape]:
    return (leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Shape))


def product(m: int, n: int, k: int, dtype: torch.dtype) -> Call:
    """Return the call of a plain matrix product."""
    arguments = (Shape((m, k), (k, 1), dtype), Shape((k, n), (n, 1), dtype))
    moved = sum(shape.bytes for shape in arguments) + m * n * dtype.itemsize
    return Call("aten.mm.default", torch.ops.aten.mm.default, (arguments, {}), 2 * m * n * k, moved, (1, m, n, k))


def copy(number: int) -> Call:
    """Return the call that copies so many float32 numbers."""
    shape = Shape((number,), (1,), torch.float32)
    return Call("aten.copy_.default", torch.ops.aten.copy_.default, ((shape, shape), {}), 0, 2 * shape.bytes, None)
