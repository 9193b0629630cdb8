"""Wrong numbers in tensors: flipped bits, values that are not finite."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor, to be changed in place."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def contiguous_copy(tensor: Tensor) -> Tensor:
    return tensor.clone(memory_format=torch.contiguous_format)


def flip(tensors: Sequence[Tensor], bits: int, chance: random.Random, among: Sequence[int] | None = None) -> None:
    """Flip `bits` bits, in place, of one number drawn from all numbers of `tensors` that are not zero.

    The bits are drawn from `among` (0 is the lowest), by default from the upper half of the number without the
    exponent's highest bit. Lower bits mostly drown in rounding, and the highest one would make the number infinite or
    NaN, which is noticed. If `bits` is more than that, the rest goes into further numbers.
    """
    while bits > 0:
        number, position = _draw(tensors, chance)
        word = number.element_size() * 8
        worthwhile = [bit for bit in range(word // 2, word) if bit != word - 2] if among is None else among
        chosen = chance.sample(worthwhile, min(bits, len(worthwhile)))
        mask = sum(1 << bit for bit in chosen)
        mask -= (mask >> word - 1) << word  # as the signed integer of these bits
        number.view(_INTEGERS[number.element_size()])[position : position + 1].bitwise_xor_(mask)
        bits -= len(chosen)


def spoil(tensors: Sequence[Tensor], value: str, chance: random.Random) -> None:
    """Make one number, drawn as in `flip`, NaN or infinite, in place."""
    number, position = _draw(tensors, chance)
    number[position] = float(value)


def _draw(tensors: Sequence[Tensor], chance: random.Random) -> tuple[Tensor, int]:
    """(flat view, position in it) of a number that is not zero, since a device rarely errs where it has no work."""
    flat = [tensor.detach().view(-1) for tensor in tensors if tensor.numel()]
    counts = [int(tensor.count_nonzero()) for tensor in flat]
    if not any(counts):
        return (tensor := chance.choice(flat)), chance.randrange(tensor.numel())
    number = chance.randrange(sum(counts))
    for tensor, count in zip(flat, counts, strict=True):
        if number < count:
            return tensor, int(tensor.nonzero()[number])
        number -= count
    raise AssertionError


def after_forward(module: nn.Module, change: Callable[[Any], Any]) -> None:
    """Pass the output of `module` through `change`, outside of what is compiled of it."""
    compiled = getattr(module, "_compiled_call_impl", None)
    if compiled is None:
        module.register_forward_hook(lambda _module, _arguments, output: change(output))
    else:
        setattr(module, "_compiled_call_impl", lambda *a, **k: change(compiled(*a, **k)))  # noqa: B010


def scale_next_output(model: nn.Module, factor: float) -> None:
    """Multiply every part of the next output for training (a tuple of tensors) with `factor`."""

    def scale(_model: nn.Module, _arguments: Any, output: Any) -> Any:
        if not torch.is_grad_enabled():
            return None
        handle.remove()
        return tuple(part * factor for part in output)

    handle = model.register_forward_hook(scale)


PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)


class WrongProducts(TorchDispatchMode):
    """While entered, a bit of one number is flipped in each result of a matrix product of which the number, counted
    from 1, is a multiple of `every`: always the same bit if that is 1, else any.
    """

    def __init__(self, chance: random.Random, every: int) -> None:
        super().__init__()
        self._chance, self._every = chance, every
        self._first = chance.getstate()
        self.calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in PRODUCTS and not isinstance(out, DTensor) and out.numel():
            self.calls += 1
            if self.calls % self._every == 0:
                if self._every == 1:
                    self._chance.setstate(self._first)
                flip([out], 1, self._chance)
        return out
