"""Operators that compute element by element, and the fused optimizer, which does too."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from scipy import special

from trainer.sentinel.operators.expected import REFERENCES, Expected, Reference, reference


def _stored(*numbers: Any) -> float:
    """Roundings in the precision of the tensors: a kernel may store a plain number in it before it computes."""
    return float(any(isinstance(number, float) for number in numbers))


@reference("add")
def _add(a: Any, b: Any, alpha: float = 1) -> Expected:
    return Expected(a + b * alpha, np.abs(a) + np.abs(b * alpha), 2, stored=_stored(a, b, alpha))


@reference("sub")
def _sub(a: Any, b: Any, alpha: float = 1) -> Expected:
    return _add(a, b, -alpha)


@reference("rsub")
def _rsub(a: Any, b: Any, alpha: float = 1) -> Expected:
    return _sub(b, a, alpha)


@reference("mul")
def _mul(a: Any, b: Any) -> Expected:
    return Expected(a * b, np.abs(a) * np.abs(b), 4 if np.iscomplexobj(a) or np.iscomplexobj(b) else 1)


@reference("div")
def _div(a: Any, b: Any, rounding_mode: str | None = None) -> Expected:
    value = np.true_divide(a, b)
    return Expected({None: value, "floor": np.floor(value), "trunc": np.trunc(value)}[rounding_mode], np.abs(value), 1)


@reference("remainder")
def _remainder(a: Any, b: Any) -> Expected:
    if _stored(a, b):
        raise NotImplementedError("a plain number that is stored first moves where the remainder jumps")
    return Expected(np.mod(a, b), np.abs(a), 1)


@reference("pow")
def _pow(base: Any, exponent: Any) -> Expected:
    if isinstance(exponent, np.ndarray) or isinstance(base, np.ndarray):
        base = np.asarray(base, np.float64) if np.asarray(base).dtype.kind == "i" else base
    value = np.power(base, exponent)
    # A plain number that is stored in the tensors' precision moves the value by so much.
    moved = np.abs(exponent) * (1 if isinstance(base, float) else np.abs(np.log(np.abs(base))))
    stored = _stored(base, exponent)
    return Expected(value, np.abs(value) * (1 + stored * moved), 4, stored)


def _function(function: Callable[[Any], Any], roundings: float = 4, stored: float = 0) -> Reference:
    """Return the reference of a function that is computed to `roundings` roundings of its value."""

    def evaluate(x: Any) -> Expected:
        value = function(x)
        return Expected(value, np.abs(value), roundings, stored)

    return evaluate


REFERENCES |= {
    "exp": _function(np.exp),
    "log": _function(np.log),
    "reciprocal": _function(lambda x: 1 / x, 1),
    "rsqrt": _function(lambda x: 1 / np.sqrt(x), stored=1),
    "sigmoid": _function(special.expit, 8),
    "sqrt": _function(np.sqrt, 2),  # vector libraries promise less than one unit in the last place
    "square": _function(np.square, 1),
    "tanh": _function(np.tanh, 8),
    "erf": _function(special.erf, 8),
    "cos": _function(np.cos, 8),
    "sin": _function(np.sin, 8),
}


@reference("lerp")
def _lerp(a: Any, b: Any, weight: Any) -> Expected:
    return Expected(a + weight * (b - a), np.abs(a) + np.abs(weight) * (np.abs(a) + np.abs(b)), 4)


@reference("addcmul")
def _addcmul(x: Any, a: Any, b: Any, value: float = 1) -> Expected:
    return Expected(x + value * a * b, np.abs(x) + np.abs(value * a * b), 4, stored=2)


@reference("addcdiv")
def _addcdiv(x: Any, a: Any, b: Any, value: float = 1) -> Expected:
    return Expected(x + value * a / b, np.abs(x) + np.abs(value * a / b), 4, stored=2)


def _gelu_parts(x: Any, approximate: str) -> tuple[Any, Any]:
    """(Φ(x), φ(x)·x), or what the tanh approximation takes for them."""
    if approximate == "none":
        return special.ndtr(x), x * np.exp(-x * x / 2) / math.sqrt(2 * math.pi)
    inner = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)
    slope = math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
    return (1 + np.tanh(inner)) / 2, x * (1 - np.tanh(inner) ** 2) * slope / 2


@reference("gelu")
def _gelu(x: Any, approximate: str = "none") -> Expected:
    # 1 + erf(x/√2) loses what is small beside 1.
    return Expected(x * _gelu_parts(x, approximate)[0], np.abs(x), 8)


@reference("gelu_backward")
def _gelu_backward(grad: Any, x: Any, approximate: str = "none") -> Expected:
    share, slope = _gelu_parts(x, approximate)
    return Expected(grad * (share + slope), np.abs(grad) * (1 + x * x * np.abs(slope)), 16)


@reference("silu")
def _silu(x: Any) -> Expected:
    return Expected(x * special.expit(x), np.abs(x * special.expit(x)), 16)


@reference("silu_backward")
def _silu_backward(grad: Any, x: Any) -> Expected:
    s = special.expit(x)
    return Expected(grad * s * (1 + x * (1 - s)), np.abs(grad) * s * (1 + np.abs(x)), 16)


@reference("tanh_backward")
def _tanh_backward(grad: Any, y: Any) -> Expected:
    return Expected(grad * (1 - y * y), np.abs(grad) * (1 + y * y), 4)


@reference("sigmoid_backward")
def _sigmoid_backward(grad: Any, y: Any) -> Expected:
    return Expected(grad * y * (1 - y), np.abs(grad * y) * (1 + np.abs(y)), 4)


@reference("_fused_adamw")
def _fused_adamw(
    weights: Sequence[Any], grads: Sequence[Any], firsts: Sequence[Any], seconds: Sequence[Any], maxima: Sequence[Any],
    steps: Sequence[Any], *, lr: Any, beta1: float, beta2: float, weight_decay: float, eps: float, amsgrad: bool,
    maximize: bool, **_: Any,
) -> list[Expected | None]:  # fmt: skip
    """New weights, (the gradients,) first and second moments: the order in which the operator changes its arguments."""
    if amsgrad:
        raise NotImplementedError("AdamW with amsgrad")
    rows = []
    for weight, grad, first, second, step in zip(weights, grads, firsts, seconds, steps, strict=True):
        g = -grad if maximize else grad
        m, v = beta1 * first + (1 - beta1) * g, beta2 * second + (1 - beta2) * g * g
        m_size = np.abs(beta1 * first) + np.abs((1 - beta1) * g)
        rate, divisor = lr / (1 - beta1**step), np.sqrt(v / (1 - beta2**step)) + eps
        scale = np.abs(weight) + np.abs(rate) * m_size / divisor
        rows.append((
            Expected(weight * (1 - lr * weight_decay) - rate * m / divisor, scale, 12),
            Expected(m, m_size, 4), Expected(v, v, 6),
        ))  # fmt: skip
    w, m, v = zip(*rows, strict=True)
    return [*w, *[None] * len(grads), *m, *v]
