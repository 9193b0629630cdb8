"""Sums, products of matrices, and rows added by index."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special

from trainer.sentinel.operators.expected import Expected, reference, sum_of
from trainer.sentinel.operators.moves import as_axes, as_places


def _length(x: Any, dims: Any) -> int:
    axes = range(x.ndim) if dims is None else [dims] if isinstance(dims, int) else dims
    return math.prod(x.shape[axis] for axis in axes)


@reference("sum")
def _sum(x: Any, dim: Any = None, keepdim: bool = False, **_: Any) -> Expected:
    dims = as_axes(dim)
    if x.dtype.kind in "ib":
        return Expected(np.sum(x, dims, keepdims=keepdim))
    total, magnitude = (np.sum(part, dims, keepdims=keepdim) for part in (x, np.abs(x)))
    return Expected(total, magnitude, sum_of(_length(x, dims)))


@reference("mean")
def _mean(x: Any, dim: Any = None, keepdim: bool = False, **_: Any) -> Expected:
    total, count = _sum(x, dim, keepdim), max(1, _length(x, as_axes(dim)))
    return Expected(total.value / count, total.scale / count, total.roundings)


@reference("cumsum")
def _cumsum(x: Any, dim: int, **_: Any) -> Expected:
    return Expected(np.cumsum(x, dim), np.cumsum(np.abs(x), dim), sum_of(x.shape[dim]))


@reference("linalg_vector_norm")
def _linalg_vector_norm(x: Any, order: float = 2, dim: Any = None, keepdim: bool = False, **_: Any) -> Expected:
    if order != 2:
        raise NotImplementedError(f"vector norm of order {order}")
    value = np.sqrt(np.sum(np.abs(x) ** 2, as_axes(dim), keepdims=keepdim))
    return Expected(value, value, sum_of(_length(x, as_axes(dim))))


@reference("logsumexp")
def _logsumexp(x: Any, dim: Any, keepdim: bool = False) -> Expected:
    value: Any = special.logsumexp(x, as_axes(dim), keepdims=keepdim)
    return Expected(value, np.abs(value) + 1, sum_of(_length(x, as_axes(dim))))


@reference("mm", "bmm", "matmul")
def _mm(a: Any, b: Any) -> Expected:
    return Expected(a @ b, np.abs(a) @ np.abs(b), sum_of(a.shape[-1]))


@reference("addmm", "baddbmm")
def _addmm(x: Any, a: Any, b: Any, beta: float = 1, alpha: float = 1) -> Expected:
    product = _mm(a, b)
    return Expected(
        beta * x + alpha * product.value,
        np.abs(beta * x) + np.abs(alpha) * product.scale,
        product.roundings + 2,
    )


@reference("dot")
def _dot(a: Any, b: Any) -> Expected:
    return _sum(a * b)


@reference("embedding_dense_backward")
def _embedding_dense_backward(grad: Any, indices: Any, rows: int, padding: int, by_frequency: bool) -> Expected:
    flat, places = grad.reshape(-1, grad.shape[-1]), indices.reshape(-1)
    kept = places != padding
    value, scale = (np.zeros((rows, flat.shape[1])) for _ in range(2))
    np.add.at(value, places[kept], flat[kept])
    np.add.at(scale, places[kept], np.abs(flat[kept]))
    return Expected(value, scale, sum_of(int(np.bincount(places).max(initial=1))))


@reference("index_add")
def _index_add(x: Any, dim: int, indices: Any, source: Any, alpha: float = 1) -> Expected:
    place = (slice(None),) * (dim % x.ndim) + (indices,)
    value, scale = np.array(x), np.abs(x)
    np.add.at(value, place, alpha * source)
    np.add.at(scale, place, np.abs(alpha * source))
    return Expected(value, scale, sum_of(int(np.bincount(indices.reshape(-1)).max(initial=1))))


@reference("index_put", "_index_put_impl")
def _index_put(x: Any, indices: Sequence[Any], values: Any, accumulate: bool = False, *_: Any) -> Expected:
    value, scale, place = np.array(x), np.abs(x), as_places(indices)
    if not accumulate:
        value[place] = values
        return Expected(value)
    np.add.at(value, place, values)
    np.add.at(scale, place, np.abs(values))
    return Expected(value, scale, sum_of(np.size(values)))
