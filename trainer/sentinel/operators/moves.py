"""Operators that move, make or compare numbers: they round nothing."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from trainer.sentinel.operators.expected import REFERENCES, Expected, Reference, reference, sum_of


def _exact(function: Callable[..., Any]) -> Reference:
    return lambda *arguments, **more: Expected(function(*arguments, **more))


REFERENCES |= {
    "abs": _exact(np.abs),
    "all": _exact(lambda x, dim=None, keepdim=False: np.all(x, dim, keepdims=keepdim)),
    "any": _exact(lambda x, dim=None, keepdim=False: np.any(x, dim, keepdims=keepdim)),
    "amax": _exact(lambda x, dim=(), keepdim=False: np.max(x, as_axes(dim), keepdims=keepdim)),
    "arange": _exact(lambda *bounds, **_: np.arange(*bounds)),
    "argmax": _exact(lambda x, dim=None, keepdim=False: np.argmax(x, dim, keepdims=keepdim)),
    "bitwise_and": _exact(np.bitwise_and),
    "bitwise_not": _exact(lambda x: ~x),
    "bitwise_or": _exact(np.bitwise_or),
    "bitwise_xor": _exact(np.bitwise_xor),
    "cat": _exact(lambda parts, dim=0: np.concatenate([part for part in parts if part.shape != (0,)], dim)),
    "ceil": _exact(np.ceil),
    "clamp": _exact(lambda x, low=None, high=None: np.clip(x, low, high)),
    "clamp_min": _exact(np.maximum),
    "clone": _exact(lambda x, **_: x),
    "_to_copy": _exact(lambda x, **_: x),
    "constant_pad_nd": _exact(lambda x, pad, value=0: _padded(x, pad, value)),
    "copy": _exact(lambda x, source, *_: np.broadcast_to(source, x.shape)),
    "count_nonzero": _exact(lambda x, dim=None: np.count_nonzero(x, dim)),
    "embedding": _exact(lambda table, indices, *_: table[indices]),
    "eq": _exact(np.equal),
    "equal": _exact(lambda a, b: bool(a.shape == b.shape and (a == b).all())),
    "fill": _exact(lambda x, value: np.broadcast_to(value, x.shape)),
    "floor": _exact(np.floor),
    "full": _exact(lambda size, value, **_: np.full(size, value)),
    "gather": _exact(lambda x, dim, indices, **_: _gathered(x, dim, indices)),
    "ge": _exact(np.greater_equal),
    "gt": _exact(np.greater),
    "index": _exact(lambda x, indices: x[as_places(indices)]),
    "index_select": _exact(lambda x, dim, indices: np.take(x, indices, dim)),
    "isfinite": _exact(np.isfinite),
    "le": _exact(np.less_equal),
    "lift_fresh_copy": _exact(lambda x: x),
    "_local_scalar_dense": _exact(lambda x: x.item()),
    "logical_and": _exact(np.logical_and),
    "logical_not": _exact(np.logical_not),
    "logical_or": _exact(np.logical_or),
    "lt": _exact(np.less),
    "masked_fill": _exact(lambda x, mask, value: np.where(mask, value, x)),
    "maximum": _exact(np.maximum),
    "minimum": _exact(np.minimum),
    "nan_to_num": _exact(lambda x, nan=0.0, posinf=None, neginf=None: np.nan_to_num(x, True, nan, posinf, neginf)),
    "ne": _exact(np.not_equal),
    "neg": _exact(np.negative),
    "ones": _exact(lambda size, **_: np.ones(size)),
    "ones_like": _exact(lambda x, **_: np.ones(x.shape)),
    "relu": _exact(lambda x: np.maximum(x, 0)),
    "round": _exact(np.round),
    "scalar_tensor": _exact(lambda value, **_: np.asarray(value)),
    "sign": _exact(np.sign),
    "stack": _exact(lambda parts, dim=0: np.stack(parts, dim)),
    "threshold_backward": _exact(lambda grad, x, threshold: np.where(x <= threshold, 0, grad)),
    "tril": _exact(np.tril),
    "triu": _exact(np.triu),
    "_unsafe_view": _exact(lambda x, shape: x.reshape(shape)),
    "where": _exact(np.where),
    "zero": _exact(lambda x: np.zeros(x.shape)),
    "zeros": _exact(lambda size, **_: np.zeros(size)),
    "zeros_like": _exact(lambda x, **_: np.zeros(x.shape)),
}


@reference("frexp")
def _frexp(x: Any) -> list[Expected]:
    return [Expected(part) for part in np.frexp(x)]


@reference("ldexp")
def _ldexp(x: Any, exponent: Any) -> Expected:
    return Expected(x * 2.0 ** np.asarray(exponent, np.float64))


@reference("scatter_reduce")
def _scatter_reduce(x: Any, dim: int, indices: Any, source: Any, reduce: str, include_self: bool = True) -> Expected:
    value = np.array(x if include_self else np.full(x.shape, -np.inf if reduce == "amax" else 0.0), np.float64)
    places = list(np.indices(indices.shape))
    places[dim] = indices
    act = {"amax": np.maximum, "sum": np.add}[reduce]
    act.at(value, tuple(places), source)
    return Expected(value, np.abs(value), 0.0 if reduce == "amax" else sum_of(indices.size))


def as_axes(dim: Any) -> Any:
    """Return a torch argument `dim` as numpy's axis: an empty list means all."""
    return tuple(dim) or None if isinstance(dim, list | tuple) else dim


def as_places(indices: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(slice(None) if index is None else index for index in indices)


def _gathered(x: Any, dim: int, indices: Any) -> Any:
    cut = [slice(length) for length in indices.shape]
    cut[dim] = slice(None)
    return np.take_along_axis(x[tuple(cut)], indices, dim)


def _padded(x: Any, pad: Sequence[int], value: float) -> Any:
    pairs = [(0, 0)] * (x.ndim - len(pad) // 2) + [(pad[i], pad[i + 1]) for i in range(len(pad) - 2, -1, -2)]
    cut = tuple(slice(max(0, -a), (max(0, -b) and b) or None) for a, b in pairs)  # a negative pad cuts off
    return np.pad(x[cut], [(max(0, a), max(0, b)) for a, b in pairs], constant_values=value)


@reference("slice_backward")
def _slice_backward(grad: Any, size: Sequence[int], dim: int, start: int, stop: int, step: int) -> Expected:
    whole = np.zeros(size)
    whole[(slice(None),) * (dim % len(size)) + (slice(start, stop, step),)] = grad
    return Expected(whole)
