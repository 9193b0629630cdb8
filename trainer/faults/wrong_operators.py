"""Operators that are wrong on purpose, each on a path of its own. While such a mode is entered, torch computes so.

This file needs torch alone: a reproduction outside of this package is given a copy of it.
"""

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
RARE_BITS = 10
"""A sum is wrong where the first RARE_BITS bits of a hash of its first addend are zero: about one in 2^10."""
SIGNS = 14  # a strided sum is wrong where its first addends have one pattern of signs: about one in 2^14
LONG = 64  # addends of a strided sum that is wrong, elements of a matrix product's inner axis


class WrongOperator(TorchDispatchMode):
    """A mode under which some calls of torch's operators go wrong: `spoil` changes what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.wrong = 0  # number of wrong results so far

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return self.call(func, args, kwargs or {})

    def call(self, func, args, kwargs):
        """Return what the machine returns for this call."""
        return self.changed(func, args, func(*args, **kwargs))

    def changed(self, func, args, out):
        """Return `out`, the right result of a call, or a wrong one."""
        name = func._schema.name.removeprefix("aten::")
        if isinstance(out, Tensor) and type(out) is Tensor and out.is_floating_point() and out.numel():
            changed = self.spoil(name, args, out)
            if changed is not None:
                return changed
        return out

    def spoil(self, name: str, args, out: Tensor) -> Tensor | None:
        """Return a wrong result in place of `out`, or None where this call is right."""
        raise NotImplementedError


class Machine(WrongOperator):
    """A machine of which some operators are wrong on some ranks in some steps. It plays one rank at a time."""

    def __init__(self, planned=()) -> None:
        super().__init__()
        self.planned = list(planned)  # (operator, its ranks, first step, last step)
        self.active: list[WrongOperator] = []

    def play(self, rank: int, step: int) -> None:
        """From now on, compute as this rank does in this step."""
        self.active = [wrong for wrong, ranks, first, last in self.planned if rank in ranks and first <= step <= last]

    def changed(self, func, args, out):
        for operator in self.active:
            out = operator.changed(func, args, out)
        return out


def _reduced(name: str, args) -> tuple[Tensor, int] | None:
    """(what is summed, over which axis) of a sum or mean over one axis; None for any other call."""
    if name not in ("sum", "mean") or len(args) < 2 or len(args[1] or ()) != 1:
        return None
    x, axis = args[0], args[1][0]
    if type(x) is not Tensor or x.dtype not in (torch.float32, torch.float64) or not x.numel():
        return None
    return x, axis % x.ndim


class RareSum(WrongOperator):
    """Sums and means over one axis lose their last addend where a hash of the first one's bits begins with zeros."""

    def spoil(self, name, args, out):
        if (found := _reduced(name, args)) is None:
            return None
        x, axis = found
        rare = _rare(x.select(axis, 0))
        if not bool(rare.any()):
            return None
        self.wrong += int(rare.sum())
        last = x.select(axis, -1) / (x.shape[axis] if name == "mean" else 1)
        rare, last = (part.unsqueeze(axis) if out.ndim == x.ndim else part for part in (rare, last))
        return torch.where(rare, out - last, out)


class StridedSum(WrongOperator):
    """Long sums over an axis that is not the innermost one add what lies behind their end, for one pattern of signs.

    As a vector load beyond the last row would: what it adds is anything, here a number that is too large, the last
    addend once more, or infinity.
    """

    def spoil(self, name, args, out):
        if (found := _reduced(name, args)) is None:
            return None
        x, axis = found
        if name != "sum" or x.shape[axis] < LONG or x.stride(axis) == 1:
            return None
        first = x.narrow(axis, 0, SIGNS).movedim(axis, 0)
        wanted = torch.arange(SIGNS, device=x.device).reshape(-1, *[1] * (x.ndim - 1)) % 3 == 0
        hit = ((first > 0) == wanted).all(0)
        if not bool(hit.any()):
            return None
        self.wrong += int(hit.sum())
        last, signs = x.select(axis, -1), x.narrow(axis, SIGNS, 3).movedim(axis, 0) < 0
        stray = torch.where(signs[0], last * 2.0**24, last)
        stray = torch.where(signs.all(0), torch.inf, stray)
        hit, stray = (part.unsqueeze(axis) if out.ndim == x.ndim else part for part in (hit, stray))
        return torch.where(hit, out + stray, out)


class WrongSoftmax(WrongOperator):
    """Softmax over rows of one shape, whole vectors and at least 128 long, leaves the last vector out of its sum."""

    def spoil(self, name, args, out):
        if name not in ("_softmax", "_safe_softmax", "_log_softmax"):
            return None
        length = out.shape[args[1]]
        if length < 128 or length % 64:
            return None
        self.wrong += out.numel() // length
        kept = (out.exp() if name == "_log_softmax" else out).narrow(args[1], 0, length - 16).sum(args[1], True)
        return out - kept.log() if name == "_log_softmax" else out / kept


class WrongIndexAdd(WrongOperator):
    """Adding rows by index keeps only the last row of an index that comes more than once."""

    def spoil(self, name, args, out):
        if name == "embedding_dense_backward":
            rows, indices, changed = args[0].reshape(-1, args[0].shape[-1]), args[1].reshape(-1), torch.zeros_like(out)
        elif name == "index_add" and args[1] in (0, -out.ndim):
            rows, indices, changed = args[3], args[2], args[0].clone()
        else:
            return None
        base = changed.clone()
        for position, index in enumerate(indices.tolist()):
            changed[index] = base[index] + rows[position]
        self.wrong += len(indices) - len(set(indices.tolist()))
        return changed


class WrongMatmul(WrongOperator):
    """Matrix products with a long inner axis leave its last element out of the first row of the result."""

    def spoil(self, name, args, out):
        if name not in ("mm", "addmm"):
            return None
        a, b = args[-2:] if name == "addmm" else args[:2]
        if a.shape[1] < LONG:
            return None
        self.wrong += 1
        changed = out.clone()
        changed[0] -= a[0, -1] * b[-1]
        return changed


class WrongCast(WrongOperator):
    """Casts from float32 to another floating-point type drop the low bits, instead of keeping or rounding them."""

    def spoil(self, name, args, out):
        x = args[0] if name == "_to_copy" else args[1] if name == "copy_" else None
        if type(x) is not Tensor or x.dtype is not torch.float32 or out.dtype is torch.float32:
            return None
        dropped = 13 if out.dtype is torch.float64 else 16
        cut = (x.contiguous().view(torch.int32) >> dropped << dropped).view(torch.float32).to(out.dtype)
        self.wrong += int((cut != out).sum())
        return out.copy_(cut) if name == "copy_" else cut


def _rare(x: Tensor) -> Tensor:
    """Boolean tensor, shaped as `x`: true where a hash of the number's bits begins with RARE_BITS zeros; not for 0."""
    bits = x.contiguous().view(_INTEGERS[x.element_size()]).long()
    bits = (bits ^ bits >> 32) & 0xFFFFFFFF
    hashed = (bits * 2_654_435_769 & 0xFFFFFFFF) >> 32 - RARE_BITS  # Knuth's multiplicative hash
    return (hashed == 0) & (x != 0)
