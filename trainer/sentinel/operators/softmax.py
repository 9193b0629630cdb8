"""Softmax, its losses, and normalisation."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special

from trainer.sentinel.operators.expected import Expected, reference, sum_of


@reference("_softmax", "_safe_softmax", "softmax")
def _softmax(x: Any, dim: int, *_: Any, **__: Any) -> Expected:
    top = np.max(x, dim, keepdims=True)
    value = np.exp(x - np.where(np.isfinite(top), top, 0))
    total = np.sum(value, dim, keepdims=True)
    value = value / np.where(total == 0, 1, total)  # a row that is masked as a whole gives zeros
    # x - max is rounded before it is exponentiated; what is masked away, by -inf, is exactly 0.
    away = np.where(value > 0, np.abs(np.where(np.isfinite(x), x, 0)) + np.abs(np.where(np.isfinite(top), top, 0)), 0)
    return Expected(value, value * (1 + away), sum_of(x.shape[dim]))


@reference("_softmax_backward_data")
def _softmax_backward_data(grad: Any, y: Any, dim: int, *_: Any) -> Expected:
    along = np.sum(grad * y, dim, keepdims=True)
    magnitude = np.sum(np.abs(grad * y), dim, keepdims=True)
    return Expected(y * (grad - along), np.abs(y) * (np.abs(grad) + magnitude), sum_of(y.shape[dim]))


@reference("_log_softmax")
def _log_softmax(x: Any, dim: int, *_: Any) -> Expected:
    value = x - special.logsumexp(x, dim, keepdims=True)
    return Expected(value, np.abs(x) + np.max(np.abs(x), dim, keepdims=True) + 1, sum_of(x.shape[dim]))


@reference("_log_softmax_backward_data")
def _log_softmax_backward_data(grad: Any, y: Any, dim: int, *_: Any) -> Expected:
    share, total = np.exp(y), np.sum(grad, dim, keepdims=True)
    magnitude = np.sum(np.abs(grad), dim, keepdims=True)
    return Expected(grad - share * total, np.abs(grad) + share * (1 + np.abs(y)) * magnitude, sum_of(y.shape[dim]))


def _picked(targets: Any, classes: int, weights: Any, ignored: int) -> tuple[Any, Any]:
    """(the targets, each a class; the weight of each)."""
    kept = targets != ignored
    safe = np.where(kept, targets, 0)
    return safe, (np.ones(classes) if weights is None else weights)[safe] * kept


@reference("nll_loss_forward")
def _nll_loss_forward(x: Any, targets: Any, weights: Any, reduction: int, ignored: int) -> list[Expected]:
    rows, flat = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    safe, weight = _picked(flat, x.shape[-1], weights, ignored)
    losses = -rows[np.arange(len(flat)), safe] * weight
    if reduction == 0:
        return [Expected(losses.reshape(targets.shape))]
    divisor = weight.sum() if reduction == 1 else 1.0
    value, scale = losses.sum() / divisor, np.abs(losses).sum() / divisor
    return [Expected(value, scale, sum_of(len(flat))), Expected(weight.sum(), weight.sum(), sum_of(len(flat)))]


@reference("nll_loss_backward")
def _nll_loss_backward(
    grad: Any, x: Any, targets: Any, weights: Any, reduction: int, ignored: int, total: Any
) -> Expected:
    rows, flat = x.reshape(-1, x.shape[-1]), targets.reshape(-1)
    safe, weight = _picked(flat, x.shape[-1], weights, ignored)
    value = np.zeros(rows.shape)
    value[np.arange(len(flat)), safe] = -np.reshape(grad, -1) * weight / (total if reduction == 1 else 1.0)
    return Expected(value.reshape(x.shape), np.abs(value).reshape(x.shape), 2)


def _normalised(x: Any, shape: Sequence[int], mean: Any, deviation: Any) -> tuple[Any, Any, tuple[int, ...]]:
    """(x̂, what rounding errors of it are relative to, the axes of the normalisation)."""
    axes = tuple(range(x.ndim - len(shape), x.ndim))
    size = np.abs(x) + np.mean(np.abs(x), axes, keepdims=True)
    # The variance loses digits where the mean is large beside it.
    lost = np.mean(x * x, axes, keepdims=True) * deviation**2
    return (x - mean) * deviation, size * deviation * (1 + lost), axes


@reference("native_layer_norm")
def _native_layer_norm(x: Any, shape: Sequence[int], weight: Any, bias: Any, epsilon: float) -> list[Expected]:
    axes = tuple(range(x.ndim - len(shape), x.ndim))
    mean, variance = np.mean(x, axes, keepdims=True), np.var(x, axes, keepdims=True)
    deviation = 1 / np.sqrt(variance + epsilon)
    y, scale, _ = _normalised(x, shape, mean, deviation)
    gain, offset = (1.0 if weight is None else weight), (0.0 if bias is None else bias)
    roundings = sum_of(math.prod(shape))
    lost = 1 + np.mean(x * x, axes, keepdims=True) * deviation**2
    return [
        Expected(y * gain + offset, scale * np.abs(gain) + np.abs(offset), roundings),
        Expected(mean, np.mean(np.abs(x), axes, keepdims=True), roundings),
        Expected(deviation, deviation * lost, roundings),
    ]


@reference("native_layer_norm_backward")
def _native_layer_norm_backward(
    grad: Any, x: Any, shape: Sequence[int], mean: Any, deviation: Any, weight: Any, bias: Any, wanted: Sequence[bool]
) -> list[Expected | None]:
    y, size, axes = _normalised(x, shape, mean, deviation)
    inner = grad * (1.0 if weight is None else weight)
    first, second = np.mean(inner, axes, keepdims=True), np.mean(inner * y, axes, keepdims=True)
    magnitudes = [np.mean(np.abs(inner) * part, axes, keepdims=True) for part in (1.0, size)]
    outer = tuple(range(x.ndim - len(shape)))
    across, rows = sum_of(math.prod(shape)), sum_of(math.prod(x.shape[: x.ndim - len(shape)]))
    found: list[Expected | None] = [
        Expected(
            deviation * (inner - first - y * second),
            deviation * (np.abs(inner) + magnitudes[0] + size * magnitudes[1]),
            across,
        ),
        Expected(np.sum(grad * y, outer), np.sum(np.abs(grad) * size, outer), rows),
        Expected(np.sum(grad, outer), np.sum(np.abs(grad), outer), rows),
    ]
    return [part if asked else None for part, asked in zip(found, wanted, strict=True)]
