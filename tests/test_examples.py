"""Promises about what users build on: exact sums in a loop of one's own, and the example that shows them."""

import hashlib
import os
import re
import subprocess
import sys

import pytest
import torch
from torch import nn

from tests.support import ENVIRONMENT, ROOT
from trainer.exact import ExactGradients

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
    for value in (1.0, float("nan")):
        before = gradients.grids.magnitude.clone()
        for _ in gradients.passes():
            (model(torch.full((1, 4), value)).sum()).backward()
    assert not all(bool(p.grad.isfinite().all()) for p in model.parameters() if p.grad is not None)
    gradients.state_dict()
    assert gradients.grids.magnitude.isfinite().all() and before.isfinite().all()


@pytest.mark.parametrize("model", [nn.Linear(2, 2).half(), nn.Identity()])
def test_a_model_that_cannot_be_summed_exactly_is_refused(model: nn.Module):
    with pytest.raises(ValueError, match="float32"):
        ExactGradients(model, 2)


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_plain_loop_prints_one_hash_for_every_world_and_sharding():
    def run(ranks: int, *options: str) -> str:
        command = [sys.executable, "-m", "trainer.launch.torchrun", "--standalone", "--nproc-per-node", str(ranks)]
        script = [str(ROOT / "examples/plain_loop.py"), "--steps", "10", *options]
        done = subprocess.run(
            [*command, *script], capture_output=True, text=True, check=False, timeout=100, env=os.environ | ENVIRONMENT
        )
        (found,) = re.findall(r"weights_sha256 (\w{64})", done.stdout) or [done.stderr[-2000:]]
        return found

    one = run(1)
    assert {run(3), run(2, "--fsdp")} == {one}
    assert run(3, "--plain") != one


def test_the_plain_loop_is_at_most_a_hundred_lines_and_uses_only_exact_sums():
    text = (ROOT / "examples/plain_loop.py").read_text()
    assert len(text.splitlines()) <= 100
    assert re.findall(r"^from (trainer\S*) import", text, flags=re.MULTILINE) == ["trainer.exact"]
