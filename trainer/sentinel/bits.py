"""Hashes of a tensor's bits, and weights for sums that are exact."""

import functools
import hashlib
import math
from collections.abc import Iterable

import torch
import xxhash
from torch import Tensor
from torch.distributed.tensor import DTensor

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 1 << 22
_BLOCK = 1 << 16  # float64: 512 KiB
_BASE = 6_364_136_223_846_793_005  # odd, so that a flip in an early chunk stays one
_SPARE_BITS = 53 - 24  # of a float64 beside the 24 of a gradient on its grid: for the factors, and the number of terms


def differ(expected: Tensor, found: Tensor) -> bool:
    """True if sums differ where the expected one is finite: what is not is noticed by the step itself."""
    return bool(((expected != found) & expected.isfinite()).any())


def combined(hashes: Iterable[int]) -> int:
    """One signed 64-bit hash of several."""
    return int.from_bytes(hashlib.blake2b(repr(list(hashes)).encode(), digest_size=8).digest(), "little", signed=True)


def bits_hash(tensor: Tensor) -> Tensor:
    """Hash of a tensor's bits and their places, as an int64 tensor (scalar). Ranks on one kind of device agree."""
    tensor = tensor.detach()
    local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).contiguous().view(-1)
    bits = local.view(_INTEGERS[local.element_size()])
    if bits.device.type != "cpu":  # it would have to be copied to the host
        return multiplied(bits)
    value = xxhash.xxh3_64_intdigest(bits.numpy().data)
    return torch.tensor(value - (value >> 63 << 64))  # as a signed number


def multiplied(bits: Tensor) -> Tensor:
    """Hash of integers (flat) as a sum of products with odd factors, one for each place. A single flip changes it."""
    total = torch.zeros((), dtype=torch.int64, device=bits.device)
    for chunk in bits.split(_CHUNK):
        # As 64 bits: in 32, any two flips of the highest bit would cancel.
        total = total * _BASE + (chunk.long() * _odd(bits.device)[: chunk.numel()]).sum()
    return total


@functools.cache
def _odd(device: torch.device) -> Tensor:
    """Odd factors, one for each place in a chunk."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(-(2**63), 2**63 - 1, (_CHUNK,), generator=generator) | 1).to(device)


@functools.cache
def factors(count: int, device: torch.device) -> Tensor:
    """Integers from 1 on, as float64: so small that a sum of `count` products with a gradient on its grid is exact."""
    bits = max(1, min(16, _SPARE_BITS - math.ceil(math.log2(max(2, count)))))
    return (torch.arange(count, device=device) * 40_503 % ((1 << bits) - 1) + 1).double()


def row_sums(matrix: Tensor) -> Tensor:
    """Weighted sum of each row, float64: exact where the entries are on their grid."""
    weights = factors(matrix.shape[1], matrix.device)
    if matrix.device.type != "cpu":
        return matrix.double() @ weights
    # In blocks that stay in the processor's cache: a double of the whole matrix would go through memory twice.
    sums = torch.empty(matrix.shape[0], dtype=torch.float64)
    block = torch.empty(max(1, _BLOCK // max(1, matrix.shape[1])), matrix.shape[1], dtype=torch.float64)
    for start in range(0, matrix.shape[0], block.shape[0]):
        rows = matrix[start : start + block.shape[0]]
        torch.mv(block[: rows.shape[0]].copy_(rows), weights, out=sums[start : start + rows.shape[0]])
    return sums
