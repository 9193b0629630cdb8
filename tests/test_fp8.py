"""Products in 8-bit floats, against float64 products of the same rounded values."""

from typing import Any

import pytest
import torch
from torch import Tensor

from trainer import config, costs, fp8, model
from trainer.errors import ConfigError
from trainer.model import GPT

SMALL: dict[str, Any] = {"n_layers": 2, "n_heads": 4, "width": 32, "context": 16}


def random(*shape: int, seed: int) -> Tensor:
    # Rows of very different sizes, so that a scale that was left out or applied twice shows.
    return (
        torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        * 2.0 ** torch.arange(-4, 4).repeat(-(-shape[0] // 8))[: shape[0], None]
    )


def rounded(x: Tensor, kind: torch.dtype) -> Tensor:
    scale = x.abs().max() / torch.finfo(kind).max
    return (x / scale).to(kind).double() * scale.double()


@pytest.mark.parametrize(("n", "d", "v"), [(32, 48, 64), (5, 20, 33), (1, 16, 7)])
def test_products_and_gradients_are_those_of_the_rounded_values(n: int, d: int, v: int) -> None:
    x, weight, grad = random(n, d, seed=0).bfloat16(), random(v, d, seed=1), random(n, v, seed=2).bfloat16()
    x.requires_grad_()
    weight.requires_grad_()
    y = fp8.linear(x, weight)
    y.backward(grad)
    x8, weight8 = (rounded(t.detach().float(), torch.float8_e4m3fn) for t in (x, weight))
    grad8 = rounded(grad.float(), torch.float8_e5m2)
    assert (y.dtype, y.shape) == (torch.bfloat16, (n, v))
    for found, wanted, step in (
        (y, x8 @ weight8.T, 2**-8), (x.grad, grad8 @ weight8, 2**-8), (weight.grad, grad8.T @ x8, 2**-20),
    ):  # fmt: skip
        assert found is not None
        size = wanted.abs().max()
        torch.testing.assert_close(found.double(), wanted, rtol=step, atol=float(size) * 1e-6)


def test_zeros_have_a_product() -> None:
    assert not fp8.linear(torch.zeros(2, 3, 16).bfloat16(), torch.zeros(32, 16)).any()


def test_a_device_without_such_products_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(*_: Any, **__: Any) -> Tensor:
        raise RuntimeError("no kernel")

    monkeypatch.setattr(torch, "_scaled_mm", product)
    with pytest.raises(ConfigError, match=r"this CPU with torch .* multiplies no 8-bit floats(.|\n)*Leave it out"):
        fp8.require(torch.device("cpu"))


def losses_of(**switches: Any) -> tuple[GPT, dict[str, Tensor], float]:
    gpt = model.construct(config.Model(**(SMALL | switches)), 64)
    assert isinstance(gpt, GPT)
    model.initialise(gpt, config.Model(**SMALL, init="gpt2"), 0)
    inputs, targets = torch.randint(64, (2, 2, 16), generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        found = gpt(inputs, targets)
    found.objective.backward()
    return gpt, {n: p.grad for n, p in gpt.named_parameters() if p.grad is not None}, found.cross_entropy.item()


@pytest.mark.parametrize(
    "switches",
    [
        {"fp8_head": True},
        {"fp8_head": True, "loss_chunk_tokens": 9},
        {"fp8_head": True, "tied_embeddings": True, "z_loss": 1e-3, "logit_softcap": 5.0},
        {"bf16_residual": True},
        {"bf16_residual": True, "norm": "layernorm", "positions": "learned", "biases": True, "mlp": "gelu"},
        {"bf16_residual": True, "fp8_head": True, "value_embeddings": True, "bigram_buckets": 37},
    ],
)
def test_coarser_numbers_change_loss_and_gradient_by_their_rounding(switches: dict[str, Any]) -> None:
    plain = {name: value for name, value in switches.items() if name not in ("bf16_residual", "fp8_head")}
    (_, exact, loss), (_, coarse, coarse_loss) = losses_of(**plain), losses_of(**switches)
    assert coarse_loss == pytest.approx(loss, rel=2e-3)
    assert coarse_loss != loss
    for name, gradient in exact.items():
        assert coarse[name].dtype is torch.float32
        assert float((coarse[name] - gradient).norm() / gradient.norm()) < 0.15, name


def test_without_autocast_as_in_sampling_the_residual_stream_is_float32() -> None:
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    made = [model.construct(config.Model(**SMALL, bf16_residual=switch), 64) for switch in (False, True)]
    for gpt in made:
        model.initialise(gpt, config.Model(**SMALL, init="gpt2"), 0)
    assert torch.equal(made[0](tokens), made[1](tokens))


def test_a_residual_stream_of_16_bits_halves_what_is_kept_between_blocks() -> None:
    kinds = []
    gpt = model.construct(config.Model(**SMALL, bf16_residual=True), 64)
    for block in model.blocks_of(gpt):
        block.register_forward_hook(lambda _block, _arguments, output: kinds.append(output.dtype))
    model.initialise(gpt, config.Model(**SMALL), 0)
    with torch.autocast("cpu", torch.bfloat16):
        gpt(*torch.zeros(2, 1, 16, dtype=torch.int64))
    assert kinds == [torch.bfloat16] * 2

    def kept(bf16_residual: bool) -> int:
        tree = {"numerics": {"precision": "bf16"}, "model": SMALL | {"bf16_residual": bf16_residual}}
        return costs.memory_per_rank(config.parse(tree), 64, 1)["activations"]

    values = config.parse({}).data.micro_batch_sequences * SMALL["context"] * SMALL["width"]
    assert kept(False) - kept(True) >= 2 * 2 * values  # of each norm's input, in each block
