"""Promises about what users build on: exact sums in a loop of one's own, and the example that shows them."""

import hashlib
import re
import subprocess

import pytest
import torch
from torch import nn

from tests import support
from tests.support import ROOT, torchrun
from trainer.exact import ExactGradients, Grids
from trainer.launch.agent import LAUNCH

MICRO_BATCHES = 5


def train(steps: int, order: list[int], resume_at: int | None = None, scale: float = 1.0) -> str:
    """Train a small model with its micro-batches in this order; returns the digest of its weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 3))
    gradients, optimizer = ExactGradients(model, MICRO_BATCHES), torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        if step == resume_at:
            kept = gradients.state_dict()
            for parameter in model.parameters():
                parameter._backward_hooks = None  # a new process has none
            gradients = ExactGradients(model, MICRO_BATCHES)
            gradients.load_state_dict(kept)
        for _ in gradients.passes():
            for index in order:
                random = torch.Generator().manual_seed(100 * step + index)
                inputs = torch.randn(4, 8, generator=random) * (scale if step == 3 else 1.0)
                (model(inputs).square().mean() / MICRO_BATCHES).backward()
        gradients.clip_(0.5)
        optimizer.step()
    return hashlib.sha256(b"".join(p.detach().numpy().tobytes() for p in model.parameters())).hexdigest()


@pytest.mark.parametrize("order", [[4, 3, 2, 1, 0], [2, 0, 4, 1, 3]])
@pytest.mark.parametrize("scale", [1.0, 1e4])  # the second exceeds its grid in step 3, and is computed again
def test_the_order_of_micro_batches_changes_no_bit(order: list[int], scale: float):
    assert train(8, order, scale=scale) == train(8, [0, 1, 2, 3, 4], scale=scale)


def test_grids_from_a_checkpoint_continue_to_the_same_bits():
    assert train(8, [0, 1, 2, 3, 4], resume_at=4) == train(8, [0, 1, 2, 3, 4])


def test_a_gradient_beyond_its_grid_takes_another_pass_and_then_the_next_step_one():
    model = nn.Linear(4, 2)
    gradients = ExactGradients(model, 1)
    counts = []
    for size in (1.0, 1.0, 1e6, 1e6):
        counts.append(0)
        for _ in gradients.passes():
            counts[-1] += 1
            (model(torch.full((1, 4), size)).sum()).backward()
    assert counts == [2, 1, 2, 1]  # the first gradient of all is measured


def test_a_gradient_that_is_not_finite_ends_the_pass_and_leaves_the_grids():
    model = nn.Linear(4, 2)
    gradients = ExactGradients(model, 1)
    before = gradients.grids.magnitude
    for value in (1.0, float("nan")):
        for _ in gradients.passes():
            before = gradients.grids.magnitude.clone()
            (model(torch.full((1, 4), value)).sum()).backward()
    assert not all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    gradients.state_dict()
    assert torch.equal(gradients.grids.magnitude, before)


def test_zero_grad_between_steps_takes_nothing_away():
    def last_gradient(zero: bool) -> torch.Tensor:
        torch.manual_seed(0)
        model = nn.Linear(4, 2)
        gradients, optimizer = ExactGradients(model, 1), torch.optim.SGD(model.parameters(), lr=0.01)
        for _ in range(3):
            if zero:
                optimizer.zero_grad()
            for _ in gradients.passes():
                model(torch.ones(1, 4)).square().sum().backward()
            assert gradients._flat.count_nonzero() > 0  # what is summed over ranks
            optimizer.step()
        return gradients._flat.clone()

    assert torch.equal(last_gradient(True), last_gradient(False))


def test_the_norm_of_a_convolution_is_the_same_bits_however_it_is_sharded():
    generator = torch.Generator().manual_seed(0)
    shape = torch.Size((64, 64, 3, 3))
    grids = Grids({"w": shape}, 1, 5, torch.device("cpu"))
    gradient = torch.randn(shape, generator=generator)
    grids.magnitude.fill_(8.0)
    grids.derive()
    rounded = grids.rounder("w")(gradient)
    sums = set()
    for parts in (1, 2, 3, 4, 7):
        slices = [slice(int(part[0]), int(part[-1]) + 1) for part in torch.arange(64).chunk(parts)]
        sums.add(sum(float(grids.square_sums("w", rounded[rows], rows)[1]) for rows in slices))
    assert len(sums) == 1


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.tensor(1.0))


@pytest.mark.parametrize("model", [nn.Linear(2, 2).half(), nn.Identity(), Scalar()])
def test_a_model_that_cannot_be_summed_exactly_is_refused(model: nn.Module):
    with pytest.raises(ValueError, match=r"float32|scalar"):
        ExactGradients(model, 2)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_plain_loop_prints_one_hash_for_every_world_and_sharding():
    as_a_script = [*LAUNCH, "--standalone", "--nproc-per-node=1", str(ROOT / "examples/plain_loop.py"), "--steps", "10"]
    one = weights_of(support.run(as_a_script, check=True, timeout=100))

    def run(ranks: int, *options: str) -> str:
        return weights_of(torchrun(ranks, "--steps", "10", *options, module="examples.plain_loop"))

    assert {run(3), run(2, "--fsdp")} == {one}
    assert run(3, "--plain") != one


def weights_of(done: subprocess.CompletedProcess[str]) -> str:
    (found,) = re.findall(r"weights_sha256 (\w{64})", done.stdout)
    return found


def test_the_plain_loop_is_at_most_a_hundred_lines_and_uses_only_exact_sums():
    text = (ROOT / "examples/plain_loop.py").read_text()
    assert len(text.splitlines()) <= 100
    assert re.findall(r"^from (trainer\S*) import", text, flags=re.MULTILINE) == ["trainer.exact"]
