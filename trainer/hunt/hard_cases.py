"""Calls of operators that kernels are known to get wrong: odd lengths, strides, duplicates, cancellation, limits.

Each case is a function without arguments, of numbers drawn from a fixed seed, and returns what it computed.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

Case = Callable[[], Sequence[Tensor]]
AROUND_VECTORS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 63, 65)
"""Lengths around those of vector registers, where a kernel changes from its body to its tail."""


def hard_cases(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
    """Yield each case with its name. `dtype` is the one that a config computes its products in."""
    yield from _sums(device)
    yield from _softmaxes(device)
    yield from _products(device, dtype)
    yield from _duplicates(device)
    yield from _casts(device)
    yield from _functions(device, dtype)
    yield from _attentions(device, dtype)
    yield "adamw", lambda: _adamw(device)


def _normal(device: torch.device, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))
    return drawn.to(device=device, dtype=dtype)


def _with_gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    """Return the function's value and the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    value = function(*leaves)
    gradients = torch.autograd.grad(value, leaves, torch.cos(torch.arange(value.numel()).to(value)).view_as(value))
    return [value.detach(), *gradients]


def _sums(device: torch.device) -> Iterator[tuple[str, Case]]:
    def tails() -> list[Tensor]:
        x = _normal(device, 66, 65)
        return [part for n in AROUND_VECTORS for part in (x[:n].sum(0), x[:, :n].sum(1), x[:n].t().sum(1), x[:n].sum())]

    yield "sums of lengths around a vector's", tails
    many = _normal(device, 96, 2048)
    yield "many strided sums", lambda: [many.sum(0), many.mean(0), many.double().sum(0), many.view(3, 32, 2048).sum(0)]
    for name, x in (
        ("long", _normal(device, 1, 200_003)),
        ("outer", _normal(device, 20_011, 3).t()),
        ("transposed", _normal(device, 4099, 37).t()),
        ("sliced", _normal(device, 3, 30_011)[:, ::3]),
        ("expanded", _normal(device, 5, 1).expand(5, 777)),
        ("cancelling", _normal(device, 3, 8192) * torch.tensor([1.0, -1.0], device=device).repeat(4096)),
        ("dominated", torch.cat([torch.full((3, 1), 1e6, device=device), _normal(device, 3, 4095) * 1e-3], 1)),
        ("denormal", torch.full((3, 1025), 1e-41, device=device)),
    ):
        yield f"{name} sums", lambda x=x: [x.sum(1), x.mean(1), x.sum(), torch.linalg.vector_norm(x, dim=1), x.amax(1)]
        yield f"{name} sums in float64", lambda x=x: [x.double().sum(1), x.double().sum()]
    yield (
        "sums over two axes",
        lambda: [_normal(device, 7, 33, 17).sum((0, 2)), _normal(device, 7, 33, 17).mean((1, 2))],
    )
    yield "running sums", lambda: [_normal(device, 3, 5000).cumsum(1), _normal(device, 517, 3).cumsum(0)]


def _softmaxes(device: torch.device) -> Iterator[tuple[str, Case]]:
    def act(x: Tensor, dim: int) -> list[Tensor]:
        return [
            *_with_gradients(lambda x: torch.softmax(x, dim), x),
            *_with_gradients(lambda x: torch.log_softmax(x, dim), x), torch.logsumexp(x, dim),
        ]  # fmt: skip

    def masked() -> list[Tensor]:
        x = _normal(device, 9, 130).masked_fill(torch.ones(9, 130, device=device).triu(5).bool(), -math.inf)
        return [torch.softmax(x, -1), torch.log_softmax(x[:, :3], -1)]

    yield (
        "softmax of lengths around a vector's",
        lambda: [
            part
            for n in AROUND_VECTORS
            for x in (_normal(device, 5, n), _normal(device, n, 5).t())
            for part in act(x, 1)
        ],
    )
    yield "softmax over the first axis", lambda: act(_normal(device, 515, 6), 0)
    yield "softmax of large numbers", lambda: act(_normal(device, 5, 1000) * 50 + 1e4, 1)
    yield "masked softmax", masked
    for ignored in (-100, 3):
        targets = torch.arange(41, device=device) % 7
        yield (
            f"cross-entropy that ignores class {ignored}",
            lambda ignored=ignored, targets=targets: _with_gradients(
                lambda x: F.cross_entropy(x, targets, ignore_index=ignored).reshape(1), _normal(device, 41, 7)
            ),
        )


def _products(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
    shapes = ((1, 1, 1), (1, 513, 1), (7, 13, 5), (17, 1, 33), (64, 320, 32), (129, 257, 63), (33, 2049, 31))
    for kind in dict.fromkeys((torch.float32, dtype)):
        word = str(kind).removeprefix("torch.")
        for m, k, n in shapes:
            a, b = _normal(device, m, k, dtype=kind), _normal(device, k, n, seed=1, dtype=kind)
            turned_a, turned_b = _normal(device, k, m, dtype=kind).t(), _normal(device, n, k, seed=1, dtype=kind).t()
            bias = _normal(device, n, dtype=kind)
            yield (
                f"{word} products of {m}×{k}×{n}",
                lambda a=a, b=b, c=turned_a, d=turned_b, e=bias: [a @ b, c @ b, a @ d, c @ d, torch.addmm(e, a, d)],
            )
        batch = _normal(device, 3, 9, 34, dtype=kind)
        yield (
            f"{word} batched products",
            lambda batch=batch: [batch @ batch.mT, batch.mT @ batch, batch[:, ::2] @ batch.mT],
        )


def _duplicates(device: torch.device) -> Iterator[tuple[str, Case]]:
    for name, indices in (
        ("all alike", torch.full((1037,), 3)),
        ("few", torch.arange(1037) % 4),
        ("in runs", torch.arange(1037) // 100),
        ("without duplicates", torch.randperm(2000, generator=torch.Generator().manual_seed(0))[:1037]),
    ):

        def add(indices: Tensor = indices) -> list[Tensor]:
            indices = indices.to(device)
            grads = _normal(device, 1037, 19)
            table = torch.zeros(2000, 19, device=device)
            biggest = torch.zeros(2000, device=device).scatter_reduce(0, indices, grads[:, 0].contiguous(), "amax")
            return [
                *_with_gradients(lambda table: F.embedding(indices, table), table),
                table.index_add(0, indices, grads), table.index_put((indices,), grads, accumulate=True), biggest,
                table[indices], table.gather(0, indices[:, None]),
            ]  # fmt: skip

        yield f"rows added by index, {name}", add


def _casts(device: torch.device) -> Iterator[tuple[str, Case]]:
    bits = torch.arange(0x3F80_0000, 0x3F80_0000 + 70_000, 17, dtype=torch.int32, device=device)
    near = bits.view(torch.float32)  # between 1 and 1.01, with bfloat16's ties among them
    odd = torch.tensor([0.0, -0.0, 1e-45, 1e-40, 65504.0, 65520.0, 3.4e38, -3.4e38, math.inf, -math.inf], device=device)
    for name, x in (("ties", near), ("limits", odd), ("usual", _normal(device, 9, 513).t())):
        yield (
            f"casts of {name} numbers",
            lambda x=x: [
                x.to(torch.bfloat16),
                x.to(torch.float16),
                x.double(),
                x.to(torch.bfloat16).float(),
                x.clone(),
            ],
        )
    whole = torch.tensor([2**24 + 1, 2**24 + 3, -(2**31) + 1, 2**31 - 1], device=device)
    yield "casts of integers", lambda: [whole.float(), whole.double(), whole.to(torch.int32), near.to(torch.int64)]


def _functions(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
    for kind in dict.fromkeys((torch.float32, dtype)):
        word = str(kind).removeprefix("torch.")
        wide = torch.linspace(-30, 30, 4097, device=device, dtype=kind)
        for function in (F.gelu, F.silu, torch.tanh, F.relu, torch.sigmoid):
            yield f"{word} {function.__name__}", lambda f=function, x=wide: _with_gradients(f, x)
        positive = torch.logspace(-30, 30, 1001, device=device).to(kind)
        yield f"{word} roots and powers", lambda x=positive: [x.sqrt(), x.rsqrt(), x.reciprocal(), (x * 1e-20).pow(2)]
    yield "exponentials and logarithms", lambda: [
        torch.linspace(-80, 80, 2001, device=device).exp(), torch.logspace(-30, 30, 1001, device=device).log()
    ]  # fmt: skip
    for width in (1, 15, 32, 257):
        for offset in (0.0, 100.0):
            x, gain = _normal(device, 37, width) + offset, _normal(device, width, seed=2)
            yield (
                f"layer norm of width {width} around {offset:g}",
                lambda x=x, gain=gain, width=width: _with_gradients(
                    lambda x, gain, bias: F.layer_norm(x, (width,), gain, bias), x, gain, gain * 0.5
                ),
            )


def _attentions(device: torch.device, dtype: torch.dtype) -> Iterator[tuple[str, Case]]:
    for kind in dict.fromkeys((torch.float32, dtype)):
        word = str(kind).removeprefix("torch.")
        for t in (1, 3, 17, 65, 130):
            q, k, v = (_normal(device, 2, 4, t, 16, seed=n, dtype=kind) for n in range(3))
            yield (
                f"{word} attention over {t} positions",
                lambda q=q, k=k, v=v: _with_gradients(
                    lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), q, k, v
                ),
            )


def _adamw(device: torch.device) -> list[Tensor]:
    """Steps of torch's fused AdamW on tensors of odd sizes."""
    weights = [_normal(device, n).requires_grad_() for n in (*AROUND_VECTORS, 1000)]
    optimizer = torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.1, fused=True)
    for number in range(3):
        for weight in weights:
            weight.grad = _normal(device, weight.numel(), seed=10 + number)
        optimizer.step()
    return [weight.detach() for weight in weights]
