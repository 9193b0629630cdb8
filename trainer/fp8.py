"""A matrix product in 8-bit floats (Micikevicius et al. 2022, FP8 Formats for Deep Learning).

Values and weights are e4m3, gradients e5m2. Each tensor is divided by one scale, which takes its largest magnitude to
the format's largest. The scale is found from the tensor itself, not from earlier steps: a micro-batch's gradient must
be a function of weights and tokens alone. Sums are float32.

Axes: N rows, D width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from trainer.errors import ConfigError

MULTIPLE = 16
"""The products need sizes that this divides; `linear` fills up with zeros what is not."""


def require(device: torch.device) -> None:
    """Raise ConfigError if `device` cannot multiply 8-bit floats."""
    try:
        linear(torch.zeros(1, MULTIPLE, device=device), torch.zeros(MULTIPLE, MULTIPLE, device=device))
    except RuntimeError as error:
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"
        raise ConfigError(
            [
                f"model.fp8_head = true, and {name} with torch {torch.__version__} multiplies no 8-bit floats.\n"
                f"  GPUs do from Ada and Hopper on (compute capability 8.9). Leave it out. torch said: {error}"
            ]
        ) from None


def linear(x: Tensor, weight_VD: Tensor) -> Tensor:
    """x @ weight.T of x[…, D] in 8-bit floats: bfloat16[…, V]. The weight's gradient has the weight's dtype."""
    rows, vocabulary = x.numel() // x.shape[-1], len(weight_VD)
    y_NV: Any = _Linear.apply(_filled(x.flatten(0, -2)), _filled(weight_VD))
    return y_NV[:rows, :vocabulary].unflatten(0, x.shape[:-1])


def _filled(matrix: Tensor) -> Tensor:
    rows, columns = (-size % MULTIPLE for size in matrix.shape)
    return F.pad(matrix, (0, columns, 0, rows)) if rows or columns else matrix


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_VD: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        x, weight = _scaled(x_ND, torch.float8_e4m3fn), _scaled(weight_VD, torch.float8_e4m3fn)
        ctx.save_for_backward(*x, *weight)
        ctx.kinds = x_ND.dtype, weight_VD.dtype
        return _product(x, _transposed(weight), torch.bfloat16)

    @staticmethod
    def backward(ctx: Any, grad_NV: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        x8, x_scale, weight8, weight_scale = ctx.saved_tensors
        grad = _scaled(grad_NV, torch.float8_e5m2)
        of_x = _product(grad, (weight8, weight_scale), ctx.kinds[0])
        of_weight = _product(_transposed(grad), (x8, x_scale), ctx.kinds[1])
        return of_x, of_weight


def _scaled(x: Tensor, kind: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return x in 8 bits and the float32 scale[] by which it is to be multiplied."""
    scale = (x.abs().amax().float() / torch.finfo(kind).max).clamp(min=torch.finfo(torch.float32).tiny)
    return (x.float() / scale).to(kind), scale


def _transposed(matrix: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return matrix[0].t(), matrix[1]


def _product(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor], kind: torch.dtype) -> Tensor:
    """a @ b. The kernels read a by rows and b by columns, so that a copy is made of what lies otherwise."""
    (a8, a_scale), (b8, b_scale) = a, b
    by_columns = b8.t().contiguous().t()
    return torch._scaled_mm(a8.contiguous(), by_columns, scale_a=a_scale, scale_b=b_scale, out_dtype=kind)
