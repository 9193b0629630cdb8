"""The kernels in Triton give the bits of torch's operators: here in Triton's interpreter, on the CPU.

Triton is no dependency on CPUs. TOPROPE_TRITON names a folder that it was installed into (pip install --target); the
tests run in a process of their own, so that no other test finds it.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.support import ROOT
from trainer.exact import Grids

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
SHAPES = {
    "wide": torch.Size((30, 768)), "odd": torch.Size((7, 33)), "long rows": torch.Size((3, 5000)),
    "vector": torch.Size((2304,)), "long vector": torch.Size((40_001,)), "one": torch.Size((1,)),
    "cube": torch.Size((3, 4, 5)),
}  # fmt: skip
kernels_only = pytest.mark.skipif(not INTERPRETED, reason="in Triton's interpreter only: see the test above")


@pytest.mark.skipif(INTERPRETED, reason="these are its tests")
@pytest.mark.slow
def test_in_tritons_interpreter_the_kernels_give_the_bits_of_torchs_operators():
    folder = os.environ.get("TOPROPE_TRITON")
    if folder is None and importlib.util.find_spec("triton") is None:
        pytest.skip("Triton is not installed, and TOPROPE_TRITON names no folder that has it")
    paths = os.pathsep.join([str(ROOT), *filter(None, [folder, os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"PYTHONPATH": paths, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", str(Path(__file__))]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout + done.stderr


def grids(with_kernels: bool) -> Grids:
    from trainer import exact_triton

    made = Grids(SHAPES, 32, 5, torch.device("cpu"))
    made._kernels = exact_triton if with_kernels else None
    return made


def hard_gradients(number: int) -> list[Tensor]:
    """Gradients far above and below their bounds, with signed zeros, denormals, an infinity and a NaN."""
    generator, found = torch.Generator().manual_seed(number), []
    for name, shape in SHAPES.items():
        gradient = torch.randn(shape, generator=generator) * 2.0 ** (-15 * number)
        flat = gradient.view(-1)
        flat[:3] = torch.tensor([-0.0, 1e-42, -1e-40])[: flat.numel()]
        if number == 4 and name != "one":
            flat[3] = torch.inf
        if number == 5 and name == "wide":
            flat[-1] = torch.nan
        if number == 6 and gradient.ndim == 2:
            gradient = gradient.t().contiguous().t()
        found.append(gradient)
    return found


def equal_bits(a: Tensor, b: Tensor) -> bool:
    nan = a.isnan()  # whose bits may differ
    return bool(
        a.contiguous().view(torch.int32)[~nan].equal(b.contiguous().view(torch.int32)[~nan]) and nan.equal(b.isnan())
    )


def magnitudes(made: Grids, low: float, high: float) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    drawn = torch.exp2(torch.rand(made.magnitude.shape, generator=generator) * (high - low) + low)
    drawn[3] = 0
    return drawn


@kernels_only
def test_rounding_magnitudes_and_sums_have_the_same_bits():
    reference, rounding, adding = grids(False), grids(True), grids(True)
    for made in (reference, rounding, adding):
        made.restore(magnitudes(made, -90, 50))
    total = torch.zeros(sum(shape.numel() for shape in SHAPES.values()))
    expected = total.clone()
    for number in range(10):
        gradients = hard_gradients(number)
        rounded = [reference.rounder(name)(gradient) for name, gradient in zip(SHAPES, gradients, strict=True)]
        for name, gradient, right in zip(SHAPES, gradients, rounded, strict=True):
            assert equal_bits(right, rounding.rounder(name)(gradient)), (name, number)
        expected += torch.cat([part.reshape(-1) for part in rounded])
        adding.add(gradients, total)
    assert equal_bits(expected, total)
    assert reference.seen.isnan().any() and reference.seen.isinf().any()
    for made in (rounding, adding):
        assert equal_bits(reference.seen, made.seen)


@kernels_only
def test_sums_of_squares_have_the_same_bits_whole_and_in_shards():
    reference, made = grids(False), grids(True)
    drawn = magnitudes(reference, -20, -17)
    reference.restore(drawn)
    made.restore(drawn)
    generator = torch.Generator().manual_seed(2)
    parts = []
    for name, shape in SHAPES.items():
        rounder = reference.rounder(name)
        total = sum(rounder(torch.randn(shape, generator=generator) * 1e-7) for _ in range(4))
        assert isinstance(total, Tensor)
        parts.append((name, total, slice(0, shape[0])))
    whole = reference.squares(parts)
    assert whole.count_nonzero() > 40
    assert whole.equal(made.squares(parts))
    halves = [[], []]
    for name, total, _ in parts:
        cut = total.shape[0] // 2
        halves[0].append((name, total[:cut], slice(0, cut)))
        halves[1].append((name, total[cut:], slice(cut, total.shape[0])))
    assert whole.equal(made.squares(halves[0]) + made.squares(halves[1]))


def test_adding_all_gradients_at_once_has_the_bits_of_rounding_each_and_adding_it():
    grids_ = Grids(SHAPES, 32, 5, torch.device("cpu"))
    grids_.restore(magnitudes(grids_, -20, -10))
    total = torch.zeros(sum(shape.numel() for shape in SHAPES.values()))
    expected = total.clone()
    for number in range(3):
        gradients = hard_gradients(number)
        named = zip(SHAPES, gradients, strict=True)
        expected += torch.cat([grids_.rounder(name)(gradient).reshape(-1) for name, gradient in named])
        grids_.add(gradients, total)
    assert equal_bits(expected, total)
