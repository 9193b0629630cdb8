"""Attention: its errors are followed through its products. Axes: B batch, H heads, T queries, S keys, C channels."""

from typing import Any

import numpy as np

from trainer.sentinel.operators.expected import REFERENCES, Expected, sum_of

FLASH_EXP = 40.0  # torch's CPU attention calls an exponential that is exact to 20 ulp


def _scores(q: Any, k: Any, is_causal: bool, mask: Any, scale: float | None) -> tuple[Any, Any]:
    """(scores, sums of the magnitudes that made them) of queries and keys with equally many heads."""
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = q @ k.swapaxes(-1, -2) * factor
    magnitudes = np.abs(q) @ np.abs(k).swapaxes(-1, -2) * abs(factor)
    if is_causal:
        scores = np.where(np.tri(*scores.shape[-2:], dtype=bool), scores, -np.inf)
    if mask is not None:
        scores = scores + np.where(mask, 0.0, -np.inf) if mask.dtype == bool else scores + mask
    return scores, magnitudes


def _per_head(q: Any, *others: Any) -> list[Any]:
    """Repeat key and value heads for the query heads that share them."""
    return [np.repeat(x, q.shape[1] // x.shape[1], 1) if x.shape[1] < q.shape[1] else x for x in others]


def attention(
    q: Any, k: Any, v: Any, dropout: float = 0.0, is_causal: bool = False, *_: Any, attn_mask: Any = None,
    scale: float | None = None, **__: Any,
) -> list[Expected]:  # fmt: skip
    if dropout:
        raise NotImplementedError("attention with dropout")
    k, v = _per_head(q, k, v)
    scores, magnitudes = _scores(q, k, is_causal, attn_mask, scale)
    top = np.max(scores, -1, keepdims=True)
    weights = np.exp(scores - top)
    total = np.sum(weights, -1, keepdims=True)
    weights = weights / total
    off = _off_by(q, magnitudes)
    sums = weights @ np.abs(v)
    of_output = (sums * np.max(np.where(weights > 0, off, 0), -1, keepdims=True), sums * q.shape[-2])
    logs = (top + np.log(total))[..., 0]
    return [
        Expected(weights @ v, of_output[0] + sums * sum_of(k.shape[-2]), 2, stored=4),
        # For bfloat16 the kernel sums coarser exponentials: measured 5e-5 on a CPU with avx512_bf16.
        Expected(logs, np.max(off, -1) + np.abs(logs), 4, stored=0.05),
    ]


def _off_by(q: Any, magnitudes: Any) -> Any:
    """Roundings that a weight of attention may be off by, relative to itself: those of its score and exponential."""
    return FLASH_EXP + sum_of(q.shape[-1]) * magnitudes


def attention_backward(
    grad: Any, q: Any, k: Any, v: Any, output: Any, logs: Any, dropout: float, is_causal: bool, *_: Any,
    attn_mask: Any = None, scale: float | None = None, **__: Any,
) -> list[Expected]:  # fmt: skip
    """Gradients of queries, keys and values, with a tolerance that follows each error through the products."""
    if dropout:
        raise NotImplementedError("attention with dropout")
    groups, (keys, values) = k.shape[1], _per_head(q, k, v)
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores, magnitudes = _scores(q, keys, is_causal, attn_mask, scale)
    weights = np.exp(scores - logs.reshape(*scores.shape[:-1], 1))
    off = _off_by(q, magnitudes) + np.abs(logs.reshape(*scores.shape[:-1], 1))
    along = np.sum(grad * output, -1, keepdims=True)
    of_weights = grad @ values.swapaxes(-1, -2)
    size = np.abs(grad) @ np.abs(values).swapaxes(-1, -2) + np.sum(np.abs(grad * output), -1, keepdims=True)
    slopes = weights * (of_weights - along)
    wrong = weights * size * (off + sum_of(q.shape[-1]))  # in roundings
    t, s = scores.shape[-2:]

    def product(left: Any, right: Any, left_off: Any, length: int, times: float = 1.0) -> list[Any]:
        """(left @ right, roundings that it may be off by)."""
        size = np.abs(left) @ np.abs(right)
        return [left @ right * times, (left_off @ np.abs(right) + size * sum_of(length)) * abs(times)]

    def shared(parts: list[Any]) -> list[Any]:
        """Sum over the query heads that share a key head."""
        return [part.reshape(part.shape[0], groups, -1, *part.shape[2:]).sum(2) for part in parts]

    turned, turned_wrong = slopes.swapaxes(-1, -2), wrong.swapaxes(-1, -2)
    found = [
        product(slopes, keys, wrong, s, factor),
        shared(product(turned, q, turned_wrong, t, factor)),
        shared(product(weights.swapaxes(-1, -2), grad, (weights * off).swapaxes(-1, -2), t)),
    ]
    return [Expected(value, scale, 2, stored=4) for value, scale in found]


REFERENCES["_scaled_dot_product_flash_attention_for_cpu"] = attention
REFERENCES["_scaled_dot_product_flash_attention_for_cpu_backward"] = attention_backward
