"""Exact sums: gradients whose sum does not depend on order, on who added what, or on how they are sharded.

Float addition rounds, so its result depends on the order of the addends. It does not round, and is associative, when
every addend is a multiple of one spacing δ = 2^e and no partial sum exceeds 2^24·δ (float32 has 24 significant bits).
So each micro-batch's gradient is rounded *once*, on its own, onto a grid of spacing δ; after that ordinary float32
accumulation, all-reduce and reduce-scatter give the same bits in every order.

The bound. With M micro-batches of magnitude at most B each, every partial sum is at most M·B, so

    δ = B · max(M', 4) / 2^24,      M' = M rounded up to a power of two.

Rounding is two float32 additions, (g + C) − C with C = 1.5·2^23·δ: for |g| ≤ 2^22·δ the sum lies in [2^23·δ, 2^24·δ],
where floats are exactly δ apart, so the first addition rounds to nearest-even and the second is exact. That is why M'
counts as at least 4. The error of each entry is at most δ/2. B is a power of two, 2^headroom times the recent largest
magnitude, so relative to that magnitude 24 − log2(M') − headroom bits are kept, give or take one.

The delayed choice. B must be known before the gradient is: it comes from the largest magnitudes of the committed
steps, decaying slowly, one bound per matrix row (a small row next to a large one keeps its digits) and one per vector.
If any entry of any micro-batch exceeds its bound, and all are finite, the step is computed again on a grid made from
what was seen, which then fits. That is a property of the micro-batches alone, so it is the same at every world size.

Sources: pre-rounding is Demmel & Nguyen, Fast Reproducible Floating-Point Summation (2013); the delayed choice of scale
is that of FP8 training (Micikevicius et al. 2022, arXiv:2209.05433).

In a training loop of one's own: `ExactGradients` (docs/exact.md, examples/plain_loop.py).
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from trainer.errors import NumericsError

SIGNIFICAND_BITS = 24  # float32
DOUBLE_BITS = 53  # float64
DECAY = 0.98  # per step; untested beyond a few thousand steps
# Rows of rare tokens grow suddenly: a row below 2^-4 of its tensor's largest value is bounded by that.
# Measured on a hard case, 4 micro-batches of one 128-token sequence, BPE: with 6 bits and 4 of headroom 29 % of steps
# were redone and 0.2 % of the non-zero entries flushed; with 4 and 5, none of 180 steps and 0.4 %.
QUIET_ROW_BITS = 4
# The finest spacing. Far above denormals, so that flush-to-zero modes cannot make two machines disagree.
FINEST_EXPONENT = -100
COARSEST_EXPONENT = 96  # sums stay below 2^120


class Grids:
    """The bounds of every parameter's gradient, one per matrix row or vector ("segment"), all in one flat tensor.

    `magnitude` is the only state; the rest is derived from it. Shapes are those of the full parameters: rounding
    happens before anything is sharded.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], micro_batches: int, headroom_bits: int, device: torch.device):
        self._shapes = dict(shapes)
        self._sum_bits = max(2, math.ceil(math.log2(micro_batches)))
        self._headroom_bits = headroom_bits
        counts = [shape[0] if len(shape) == 2 else 1 for shape in self._shapes.values()]
        self._starts = dict(zip(self._shapes, itertools.accumulate(counts, initial=0), strict=False))
        self.magnitude = torch.zeros(sum(counts), device=device)
        """Decaying largest magnitude of a micro-batch's gradient, per segment."""
        self.seen = torch.zeros_like(self.magnitude)
        """Largest magnitude in the pass under way, per segment."""
        self.nonzero = torch.zeros(2, dtype=torch.float64, device=device)
        """Non-zero gradient entries before and after rounding, in the pass under way, where they are counted."""
        self._counting = False
        self._bound = torch.zeros_like(self.magnitude)
        self._shift = torch.zeros_like(self.magnitude)
        repeats = torch.tensor(counts, device=device)
        self._owner = torch.repeat_interleave(torch.arange(len(counts), device=device), repeats)
        self._loudest = torch.zeros(len(counts), device=device)
        parts = zip(self._shapes.values(), self._shift.split(counts), strict=True)
        views = [part.unsqueeze(1) if len(shape) == 2 else part for shape, part in parts]
        self._shifts = dict(zip(self._shapes, views, strict=True))
        self._seen_parts = dict(zip(self._shapes, self.seen.split(counts), strict=True))
        self._kernels = _kernels(device)
        self._layouts: dict[tuple[tuple[str, int, int], ...], Any] = {}
        self.derive()

    def rounder(self, name: str) -> Callable[[Tensor], Tensor]:
        """Return the function that rounds one parameter's micro-batch gradient (full shape) onto its grid.

        It also notes the largest magnitude, for `overflowed`.
        """
        shift, seen, rows = self._shifts[name], self._seen_parts[name], len(self._shapes[name]) == 2

        def round_gradient(grad: Tensor) -> Tensor:
            if self._kernels and not self._counting:
                return self._kernels.round_(grad, shift, seen, by_rows=rows)
            magnitude = grad.abs()
            torch.maximum(seen, magnitude.amax(1) if rows else magnitude.amax(), out=seen)
            # The buffer of the magnitudes is free now; rounding into it saves an allocation per parameter.
            rounded = torch.add(grad, shift, out=magnitude).sub_(shift)
            if self._counting:
                self.nonzero += torch.stack([grad.count_nonzero(), rounded.count_nonzero()])
            return rounded

        return round_gradient

    def add(self, gradients: Sequence[Tensor], total: Tensor) -> None:
        """Add a micro-batch's gradients of all parameters, in their order and rounded, to the flat buffer `total`.

        The same bits as adding what the rounders return.
        """
        if self._kernels and not self._counting:
            layout, _ = self._layout([(name, 0, shape[0]) for name, shape in self._shapes.items()])
            self._kernels.round_and_add(gradients, layout, self._shift, self.seen, total)
            return
        sizes = [shape.numel() for shape in self._shapes.values()]
        for name, gradient, part in zip(self._shapes, gradients, total.split(sizes), strict=True):
            part.add_(self.rounder(name)(gradient).reshape(-1))

    def begin(self, counting: bool) -> None:
        """Begin a pass over a step's micro-batches: reset what was seen. `counting` turns on `nonzero`."""
        self.seen.zero_()
        self.nonzero.zero_()
        self._counting = counting

    def overflowed(self, maximise: Callable[[Tensor], None]) -> bool:
        """True if any rank saw a finite magnitude above its bound, so that the sums of this pass are not exact.

        `maximise` takes the elementwise maximum over ranks, in place. A pass with a non-finite gradient never counts as
        an overflow: widening the grid cannot help, and the gradient norm shows it. Collective.
        """
        self.seen.nan_to_num_(nan=math.inf, posinf=math.inf)  # a maximum over ranks may drop a NaN
        maximise(self.seen)
        # After the maximum all ranks hold the same values, so all decide alike.
        return bool((self.seen > self._bound).any()) and self.finite

    @property
    def finite(self) -> bool:
        """True if every gradient of this pass is finite, on all ranks. Valid after `overflowed`."""
        return bool(self.seen.isfinite().all())

    def widen(self) -> tuple[Tensor, Tensor]:
        """Make the grid fit the magnitudes seen in this pass, before the step is computed again.

        Returns a copy of those magnitudes, and the old `magnitude`, for `restore`.
        """
        seen, before = self.seen.clone(), self.magnitude.clone()
        torch.maximum(before, seen, out=self.magnitude)
        self.derive()
        return seen, before

    def restore(self, magnitude: Tensor) -> None:
        self.magnitude.copy_(magnitude)
        self.derive()

    def commit(self) -> None:
        """After a step was applied: let the bounds follow the magnitudes seen, which are finite."""
        torch.maximum(self.magnitude * DECAY, self.seen, out=self.magnitude)
        self.derive()

    def derive(self) -> None:
        """Compute bounds and rounding constants from `magnitude`. All are powers of two (times 1.5), hence exact."""
        self._loudest.zero_().scatter_reduce_(0, self._owner, self.magnitude, "amax")
        floor = self._loudest[self._owner].mul_(2.0**-QUIET_ROW_BITS)
        expected = torch.maximum(self.magnitude, floor)
        _, exponent = torch.frexp(expected)  # expected < 2^exponent
        # A tensor without a gradient so far gets the finest grid, so that its first gradient overflows and is measured.
        exponent.masked_fill_(expected == 0, FINEST_EXPONENT)
        spacing = exponent + (self._headroom_bits + self._sum_bits - SIGNIFICAND_BITS)
        spacing.clamp_(FINEST_EXPONENT, COARSEST_EXPONENT)
        ones = torch.ones_like(self.magnitude)
        torch.ldexp(ones, spacing + (SIGNIFICAND_BITS - self._sum_bits), out=self._bound)
        torch.ldexp(ones.mul_(1.5), spacing + (SIGNIFICAND_BITS - 1), out=self._shift)

    def squares(self, parts: Iterable[tuple[str, Tensor, slice]]) -> Tensor:
        """Exact sums of squares of reduced gradients by segment, float64, of (name, part of the gradient, its rows)."""
        if self._kernels:
            parts = list(parts)
            layout, coarser = self._layout([(name, rows.start, rows.stop) for name, _, rows in parts])
            gradients = [grad for _, grad, _ in parts]
            return self._kernels.square_sums(gradients, layout, coarser, self._shift, self.magnitude.numel())
        squares = torch.zeros(self.magnitude.numel(), dtype=torch.float64, device=self.magnitude.device)
        for name, grad, rows in parts:
            segments, sums = self.square_sums(name, grad, rows)
            squares[segments] = sums
        return squares

    def _layout(self, parts: Sequence[tuple[str, int, int]]) -> Any:
        """Return the programs of a kernel over parts of parameters, and how much coarser each one's squares are.

        `parts` are (name, first row, row after the last).
        """
        key = tuple(parts)
        if key not in self._layouts:
            assert self._kernels
            shapes = [torch.Size((stop - start, *self._shapes[name][1:])) for name, start, stop in parts]
            matrix = [len(self._shapes[name]) == 2 for name, _, _ in parts]
            first = [
                self._starts[name] + start * is_matrix
                for (name, start, _), is_matrix in zip(parts, matrix, strict=True)
            ]
            coarser = torch.tensor([2.0 ** self._coarser(name) for name, _, _ in parts], device=self.seen.device)
            self._layouts[key] = self._kernels.Layout.of(shapes, first, self.seen.device), coarser
        return self._layouts[key]

    def _coarser(self, name: str) -> int:
        """Return by how many bits the squares' grid is coarser than the gradient's."""
        shape = self._shapes[name]
        count = shape[-1] if len(shape) == 2 else shape.numel()
        return max(2, math.ceil((2 * SIGNIFICAND_BITS + math.log2(count) - DOUBLE_BITS) / 2))

    def square_sums(self, name: str, grad: Tensor, rows: slice) -> tuple[slice, Tensor]:
        """Return the segments of a shard of a reduced gradient, and its exact sums of squares by segment (float64).

        `grad` holds `rows` of the full parameter (elements, for a vector). A sum of n squares is exact in float64 when
        every value keeps k bits with 2k + log2(n) ≤ 53, so values are first rounded onto a grid 2^(24−k) coarser. Then
        no kernel, shape or sharding can change the sums; a vector's parts on several ranks may simply be added.
        """
        shape, start = self._shapes[name], self._starts[name]
        matrix = len(shape) == 2
        shift = (self._shifts[name][rows] if matrix else self._shifts[name]) * 2.0 ** self._coarser(name)
        squares = torch.add(grad, shift).sub_(shift).double().square_()
        if matrix:
            return slice(start + rows.start, start + rows.stop), squares.sum(1)
        return slice(start, start + 1), squares.sum().reshape(1)


class ExactGradients:
    """Exact gradient sums for a training loop of one's own: the same bits on any number of ranks.

        gradients = ExactGradients(model, micro_batches=8)
        for step in range(steps):
            for _ in gradients.passes():
                for index in range(rank, 8, ranks):          # any assignment to ranks will do
                    (loss_of(model, step, index) / 8).backward()
            optimizer.step()

    The model is a plain module with the same weights on every rank (no DDP), or one that `fully_shard` has spread over
    all ranks; then every rank must call `backward` equally often, with weight 0 where it has no micro-batch. What a
    micro-batch contributes must depend on (step, index) alone: data, random numbers, shapes. Gradients are float32.
    """

    def __init__(self, model: nn.Module, micro_batches: int, headroom_bits: int = 5) -> None:
        """Take over the gradients of `model`, on whose device they stay.

        `micro_batches` is the number of backward passes in a step, on all ranks together; `headroom_bits` how often
        (2^bits) a gradient may exceed its recent largest magnitude before a step is computed again.
        Raises ValueError for a model without parameters, with parameters that are scalars or not float32,
        or partly sharded.
        """
        self._parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        parameters = list(self._parameters.values())
        if not parameters or any(parameter.dtype != torch.float32 for parameter in parameters):
            raise ValueError("The model needs float32 parameters.\n  Keep master weights in it; autocast is fine.")
        if any(not parameter.shape for parameter in parameters):
            raise ValueError("The model has a scalar parameter.\n  Give it the shape (1,).")
        sharded = {isinstance(parameter, DTensor) for parameter in parameters}
        if len(sharded) > 1:
            raise ValueError("Only some parameters are sharded.\n  Call fully_shard on the whole model, or on no part.")
        self._sharded = sharded.pop()
        shapes = {name: parameter.shape for name, parameter in self._parameters.items()}
        self.grids = Grids(shapes, micro_batches, headroom_bits, parameters[0].device)
        self._complete = False
        if self._sharded:
            self._adopt_shards(model)
        else:
            # One flat buffer, so that a step needs one all-reduce; autograd accumulates into it in place.
            sizes = [parameter.numel() for parameter in parameters]
            self._flat = torch.zeros(sum(sizes), device=parameters[0].device)
            parts = zip(self._parameters.items(), self._flat.split(sizes), strict=True)
            self._views = {name: part.view_as(parameter) for (name, parameter), part in parts}
            for name, parameter in self._parameters.items():
                parameter.register_hook(self.grids.rounder(name))

    def passes(self) -> Iterator[int]:
        """Yield once for each pass over the step's micro-batches: mostly once, again where a gradient was too large.

        Afterwards every rank has the exact sums in `parameter.grad`. The step before counts as applied. A gradient that
        is not finite ends the pass as it is. Collective. Raises NumericsError if no grid fits.
        """
        if self._complete:
            self.grids.commit()
        self._complete = False
        for number in range(4):
            if self._sharded:
                for parameter in self._parameters.values():
                    parameter.grad = None
            else:
                for name, parameter in self._parameters.items():
                    parameter.grad = self._views[name]  # zero_grad may have taken it away
                self._flat.zero_()
            self.grids.begin(counting=False)
            yield number
            if not self._sharded and dist.is_initialized():
                dist.all_reduce(self._flat)
            if not self.grids.overflowed(_maximise):
                self._complete = self.grids.finite
                return
            self.grids.widen()
        raise NumericsError("A gradient is beyond the coarsest grid.\n  Lower the learning rate.")

    def clip_(self, limit: float) -> float:
        """Scale the gradients to a global L2 norm of at most `limit`; return the norm before. Exact. Collective."""
        own = self._own_gradients()
        squares = self.grids.squares((name, grad, slice(first, first + grad.shape[0])) for name, grad, first in own)
        if self._sharded:
            dist.all_reduce(squares)
        norm = math.sqrt(squares.sum().item())
        if norm > limit:
            for _, grad, _ in self._own_gradients():
                grad.mul_(limit / norm)
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint must hold beside weights and moments: without it a resumed run has other grids."""
        if self._complete:
            self.grids.commit()
            self._complete = False
        return {"magnitude": self.grids.magnitude.clone()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.grids.restore(state["magnitude"])
        self._complete = False

    def _own_gradients(self) -> Iterator[tuple[str, Tensor, int]]:
        """Yield (name, this rank's part of the gradient, the first row of the full parameter that it holds)."""
        for name, parameter in self._parameters.items():
            grad = parameter.grad
            assert grad is not None
            if isinstance(grad, DTensor):
                chunk = -(-parameter.shape[0] // dist.get_world_size())
                yield name, grad.to_local(), min(parameter.shape[0], chunk * dist.get_rank())
            else:
                yield name, grad, 0

    def _adopt_shards(self, model: nn.Module) -> None:
        units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for unit in units:
            unit.set_gradient_divide_factor(1.0)  # a mean over ranks would depend on how many there are
            unit.set_force_sum_reduction_for_comms(True)
            unit.unshard()
        # FSDP2 makes each whole parameter once and only frees and refills its storage, so a hook on it stays.
        for name, whole in model.named_parameters():
            if whole.requires_grad:
                whole.register_hook(self.grids.rounder(name))
        for unit in units:
            unit.reshard()


def _kernels(device: torch.device) -> ModuleType | None:
    """Return the module of fused kernels for a device; None where torch's operators do."""
    if device.type != "cuda":
        return None
    try:
        from trainer import exact_triton
    except ImportError:  # no Triton
        return None
    return exact_triton


def _maximise(tensor: Tensor) -> None:
    if dist.is_initialized():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
