"""Triton kernels for CUDA devices: one pass over a gradient for what `exact.Grids` does with torch's operators.

With torch's operators rounding, largest magnitude and sum take five passes over memory, and a launch for each of them
and each parameter. The bits are equal: rounding is two float32 additions, which Triton neither reorders nor contracts;
magnitudes are compared as the integers that their bits are, so that a NaN is larger than every number, as in torch's
maximum; sums of squares are exact, so their order does not matter.
"""

# pyright: reportMissingImports=false, reportIndexIssue=false
# Triton comes with builds of torch for GPUs only.

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = 1024
"""Elements that a program has in flight at a time."""


class Layout(NamedTuple):
    """The rows of many parameters, a program of a kernel for each; long vectors are cut into several.

    All int64, on the device, one element a program, but for `starts`.
    """

    parameter: Tensor
    offset: Tensor
    """Index of the program's first element in the parameter."""
    length: Tensor
    segment: Tensor
    starts: Tensor
    """By parameter: where it begins in a flat buffer of all."""

    @classmethod
    def of(cls, shapes: Sequence[torch.Size], first_segments: Sequence[int], device: torch.device) -> "Layout":
        """Lay out parameters with one segment a row of a matrix, or one for all, numbered from `first_segments`."""
        rows = []
        for number, (shape, first) in enumerate(zip(shapes, first_segments, strict=True)):
            count, matrix = shape.numel(), len(shape) == 2
            length = shape[1] if matrix else 16 * ELEMENTS
            offset = torch.arange(0, count, max(1, length))
            segment = first + torch.arange(len(offset)) * int(matrix)
            rows.append(
                torch.stack([torch.full_like(offset, number), offset, (count - offset).clamp(max=length), segment])
            )
        starts = torch.tensor([0, *(shape.numel() for shape in shapes)]).cumsum(0)[:-1]
        parameter, offset, length, segment = torch.cat(rows, 1).to(device)
        return cls(parameter, offset, length, segment, starts.to(device))


@triton.jit
def _round_and_add(
    gradients, parameters, offsets, lengths, segments, starts, shifts, seen, total, ELEMENTS: tl.constexpr
):  # fmt: skip
    program = tl.program_id(0)
    parameter, offset = tl.load(parameters + program), tl.load(offsets + program)
    length, segment = tl.load(lengths + program), tl.load(segments + program)
    gradient = tl.load(gradients + parameter).to(tl.pointer_type(tl.float32)) + offset
    into = total + tl.load(starts + parameter) + offset
    c = tl.load(shifts + segment)
    largest = tl.zeros([ELEMENTS], tl.int32)
    for start in range(0, length, ELEMENTS):
        at = start + tl.arange(0, ELEMENTS)
        inside = at < length
        g = tl.load(gradient + at, mask=inside, other=0.0)
        largest = tl.maximum(largest, g.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        tl.store(into + at, tl.load(into + at, mask=inside, other=0.0) + ((g + c) - c), mask=inside)
    tl.atomic_max(seen + segment, tl.max(largest, axis=0))


@triton.jit
def _round(gradient, shifts, seen, rounded, length, BY_ROWS: tl.constexpr, ELEMENTS: tl.constexpr):
    """A program a row of `length` elements, or a program for `ELEMENTS` of `length`."""
    program = tl.program_id(0).to(tl.int64)
    segment = program if BY_ROWS else 0
    begin = program * length if BY_ROWS else program * ELEMENTS
    left = length if BY_ROWS else length - begin
    c = tl.load(shifts + segment)
    largest = tl.zeros([ELEMENTS], tl.int32)
    for start in range(0, length if BY_ROWS else ELEMENTS, ELEMENTS):
        at = start + tl.arange(0, ELEMENTS)
        inside = at < left
        g = tl.load(gradient + begin + at, mask=inside, other=0.0)
        largest = tl.maximum(largest, g.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
        tl.store(rounded + begin + at, (g + c) - c, mask=inside)
    tl.atomic_max(seen + segment, tl.max(largest, axis=0))


@triton.jit
def _square(gradients, parameters, offsets, lengths, segments, coarser, shifts, sums, ELEMENTS: tl.constexpr):
    program = tl.program_id(0)
    parameter, length, segment = tl.load(parameters + program), tl.load(lengths + program), tl.load(segments + program)
    gradient = tl.load(gradients + parameter).to(tl.pointer_type(tl.float32)) + tl.load(offsets + program)
    c = tl.load(shifts + segment) * tl.load(coarser + parameter)
    added = tl.zeros([ELEMENTS], tl.float64)
    for start in range(0, length, ELEMENTS):
        at = start + tl.arange(0, ELEMENTS)
        inside = at < length
        g = tl.load(gradient + at, mask=inside, other=0.0)
        wide = tl.where(inside, (g + c) - c, 0.0).to(tl.float64)
        added += wide * wide
    tl.atomic_add(sums + segment, tl.sum(added, axis=0))


def round_(gradient: Tensor, shift: Tensor, seen: Tensor, *, by_rows: bool) -> Tensor:
    """Return a gradient rounded onto its grid, and raise `seen` to its magnitudes.

    `shift` and `seen` have an element for each row of a matrix (`by_rows`), or one for all.
    """
    gradient = gradient.contiguous()
    rounded = torch.empty_like(gradient)
    length = gradient.shape[1] if by_rows else gradient.numel()
    programs = gradient.shape[0] if by_rows else triton.cdiv(length, ELEMENTS)
    _round[(programs,)](gradient, shift, seen.view(torch.int32), rounded, length, BY_ROWS=by_rows, ELEMENTS=ELEMENTS)
    return rounded


def round_and_add(gradients: Sequence[Tensor], layout: Layout, shifts: Tensor, seen: Tensor, total: Tensor) -> None:
    """Add gradients, rounded onto their grids, to the flat buffer `total`, and raise `seen` to their magnitudes.

    `shifts` and `seen` have an element a segment. All are float32.
    """
    gradients = [gradient.contiguous() for gradient in gradients]
    _round_and_add[(len(layout.parameter),)](
        _addresses(gradients, total.device), *layout, shifts, seen.view(torch.int32), total, ELEMENTS=ELEMENTS
    )


def square_sums(gradients: Sequence[Tensor], layout: Layout, coarser: Tensor, shifts: Tensor, segments: int) -> Tensor:
    """Return the sum of squares of each segment in float64, of values rounded onto a grid `coarser` by parameter."""
    sums = torch.zeros(segments, dtype=torch.float64, device=shifts.device)
    if not len(layout.parameter):  # a rank without a row
        return sums
    gradients = [gradient.contiguous() for gradient in gradients]
    _square[(len(layout.parameter),)](
        _addresses(gradients, shifts.device), *layout[:4], coarser, shifts, sums, ELEMENTS=ELEMENTS
    )
    return sums


def _addresses(tensors: Sequence[Tensor], device: torch.device) -> Tensor:
    """Addresses of tensors, copied to the device beside its kernels."""
    addresses = torch.tensor([tensor.data_ptr() for tensor in tensors], dtype=torch.int64)
    return (addresses.pin_memory() if device.type == "cuda" else addresses).to(device, non_blocking=True)
