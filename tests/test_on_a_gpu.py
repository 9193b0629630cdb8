"""Tests that need a GPU: kernels in Triton and CUDA graphs give the bits of torch's operators, one by one."""

import pytest
import torch

from tests.support import ROOT
from trainer import config as configs
from trainer import job
from trainer.exact import Grids
from trainer.parallel.world import World

pytestmark = pytest.mark.gpu
SHAPES = {"wide": torch.Size((300, 768)), "odd": torch.Size((7, 33)), "vector": torch.Size((40_001,))}


def test_the_kernels_give_the_bits_of_torchs_operators():
    with_kernels, without = (Grids(SHAPES, 32, 5, torch.device("cuda")) for _ in range(2))
    assert with_kernels._kernels is not None
    without._kernels = None
    generator = torch.Generator().manual_seed(0)
    magnitude = torch.exp2(torch.rand(without.magnitude.shape, generator=generator) * 3 - 20)
    totals = [torch.zeros(sum(shape.numel() for shape in SHAPES.values()), device="cuda") for _ in range(2)]
    for grids in (with_kernels, without):
        grids.restore(magnitude.cuda())
    for _ in range(4):
        gradients = [torch.randn(shape, generator=generator).cuda() * 1e-7 for shape in SHAPES.values()]
        for grids, total in zip((with_kernels, without), totals, strict=True):
            grids.add(gradients, total)
    assert totals[0].equal(totals[1]) and with_kernels.seen.equal(without.seen)
    cut = totals[0].split([shape.numel() for shape in SHAPES.values()])
    parts = [
        (name, part.view(shape), slice(0, shape[0])) for (name, shape), part in zip(SHAPES.items(), cut, strict=True)
    ]
    assert with_kernels.squares(parts).equal(without.squares(parts))


def test_a_cuda_graph_computes_the_gradient_that_its_kernels_compute_one_by_one():
    config = configs.load(ROOT / "configs" / "smoke.toml", ['parallel.device="cuda"', "parallel.cuda_graphs=true"])
    device = torch.device("cuda", 0)
    job.set_numerics(config, device)
    state = job.build(config, 320, World(0, 1, device))
    tokens = torch.randint(0, 257, (2, config.model.context), device=device)

    def gradient() -> torch.Tensor:
        state.sharding.zero_gradients()
        if state.graph is None:
            state.model(tokens, tokens)[0].mul(1.0 / config.data.micro_batches).backward()
        else:
            state.graph(tokens, tokens)
        state.sharding.micro_batch_done()
        return torch.cat([part.reshape(-1) for _, part, _ in state.sharding.gradients()]).clone()

    one_by_one = gradient()
    job.capture(state, config, device)
    assert state.graph is not None
    assert gradient().equal(one_by_one) and gradient().equal(one_by_one)
