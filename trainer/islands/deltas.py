"""Changes of weights as small integers: rounded once, summed exactly, packed into bytes for the wire.

All islands round a row's change onto the same multiples of one `scale`, so the sum of the integers does not depend on
the order of the islands, nor on which rank computed which.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

SIGNIFICAND_BITS = 24  # float32
BITS = {"int8": 8, "int4": 4}
"""Bits of one element on the wire, by `islands.quantise`. A kind that is not here travels as float32."""
# Far above denormals, so that flush-to-zero modes cannot make two machines disagree.
FINEST_SCALE = 2.0**-100


def levels(quantise: str, islands: int) -> int:
    """Return the largest integer that an element is rounded to: the sum over `islands` is exact in float32."""
    if quantise in BITS:
        return 2 ** (BITS[quantise] - 1) - 1
    # Three bits less than a significand has: dividing by a scale rounds, and must not exceed the largest integer.
    return 2 ** (SIGNIFICAND_BITS - max(3, (islands - 1).bit_length()))


def largest(change: Tensor) -> Tensor:
    """Return the largest magnitude of each row of a matrix, or of a whole vector; it broadcasts over `change`."""
    return change.abs().amax(1, keepdim=True) if change.ndim == 2 else change.abs().amax().reshape(1)


def scale_of(magnitude: Tensor, quantise: str, islands: int) -> Tensor:
    """Return the distance of two neighbouring values, for rows with these largest magnitudes over all islands."""
    return (magnitude / levels(quantise, islands)).clamp_(min=FINEST_SCALE)


def rounded(change: Tensor, scale: Tensor, quantise: str, islands: int) -> Tensor:
    """Return the nearest integers to change / scale, as float32."""
    most = levels(quantise, islands)
    return change.div(scale).round_().clamp_(-most, most)


def pack(integers: Tensor, bits: int) -> Tensor:
    """Return integers from -(2^(bits-1) - 1) to 2^(bits-1) - 1 as bytes: uint8, flat; two to a byte if bits = 4."""
    flat = integers.reshape(-1).to(torch.int8)
    if bits == 8:
        return flat.view(torch.uint8)
    low, high = F.pad(flat + 8, (0, flat.numel() % 2)).to(torch.uint8).view(-1, 2).unbind(1)
    return low | (high << 4)


def unpack(packed: Tensor, bits: int, count: int) -> Tensor:
    """Return the first `count` integers of what `pack` made, as float32."""
    if bits == 8:
        return packed.view(torch.int8)[:count].float()
    pairs = torch.stack([packed & 15, packed >> 4], dim=1)
    return pairs.reshape(-1)[:count].float().sub_(8)


def packed_bytes(count: int, bits: int) -> int:
    return (count * bits + 7) // 8
