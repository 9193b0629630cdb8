"""Hashes of a tensor's bits, and weights for sums that are exact."""

import functools
import hashlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_SPARE_BITS = 53 - 24  # of a float64 beside the 24 of a gradient on its grid: for the factors, and the number of terms


def differ(expected: Tensor, found: Tensor) -> bool:
    """True if sums differ where the expected one is finite: what is not is noticed by the step itself."""
    return bool(((expected != found) & expected.isfinite()).any())


def combined(hashes: Iterable[int]) -> int:
    """One signed 64-bit hash of several."""
    return int.from_bytes(hashlib.blake2b(repr(list(hashes)).encode(), digest_size=8).digest(), "little", signed=True)


def bits_hash(tensor: Tensor) -> Tensor:
    """Hash of a tensor's bits and their places, as an integer tensor (scalar). A single flip always changes it."""
    tensor = tensor.detach()
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).contiguous().view(-1)
    bits = local.view(_INTEGERS[local.element_size()])
    # A flip changes the product by an odd multiple of a power of two, so by something else than a multiple of 2^32.
    return (bits * _odd(1 << max(0, bits.numel() - 1).bit_length(), local.device)[: bits.numel()]).sum()


@functools.cache
def _odd(count: int, device: torch.device) -> Tensor:
    """Odd factors, one for each place."""
    return (torch.arange(count, device=device) * 2_654_435_761 & 0x7FFFFFFF | 1).int()


@functools.cache
def factors(count: int, device: torch.device) -> Tensor:
    """Integers from 1 on, as float64: so small that a sum of `count` products with a gradient on its grid is exact."""
    bits = max(1, min(16, _SPARE_BITS - math.ceil(math.log2(max(2, count)))))
    return (torch.arange(count, device=device) * 40_503 % ((1 << bits) - 1) + 1).double()
