"""A rank dies and the step goes on: partial sums outlive a failed reduction, and only what is missing is computed."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from torch import Tensor

from tests.support import SMOKE
from trainer import config as configs
from trainer import job, step
from trainer.config import Config
from trainer.data import Batches, Prepared, prepare
from trainer.parallel.partial import PartialSums
from trainer.parallel.world import AllRanks, StepMembers, World
from trainer.phases import Phase
from trainer.step import StepContext, StepResult, TrainState

CPU = torch.device("cpu")
SETTINGS = ["budget.steps=6", "eval.every_steps=3", "eval.max_tokens=512"]


@pytest.fixture(scope="module")
def config() -> Config:
    return configs.load(SMOKE, SETTINGS)


@pytest.fixture(scope="module")
def prepared(config: Config) -> Prepared:
    return prepare(config.data, config.eval, config.model.context)


def build(config: Config, prepared: Prepared) -> TrainState:
    return job.build(config, prepared.tokenizer.vocab_size, World(0, 1, CPU))


@dataclass(frozen=True)
class DyingWorld(World):
    """Two ranks, of which the other dies in reduction number `dies_in`; what was to be reduced is lost."""

    dies_in: int = 0
    reductions: Iterator[int] = field(default_factory=lambda: iter(range(10)))

    def sum(self, tensor: Tensor) -> None:
        if next(self.reductions) == self.dies_in:
            tensor.fill_(torch.nan)
            raise RuntimeError("Connection closed by peer")

    max = sum


def compute(
    state: TrainState, config: Config, prepared: Prepared, members: StepMembers
) -> tuple[StepResult, list[Tensor], list[int]]:
    """(result, gradients and magnitudes, micro-batches that were computed) of a step."""
    batches, computed = job.batches_of(config, prepared), []

    def note(phase: str, _step: int) -> None:
        if phase == Phase.BEFORE_BACKWARD:
            computed.append(current[-1])

    real, current = batches.micro_batch, []
    noting = SimpleNamespace(micro_batch=lambda step, index: current.append(index) or real(step, index))
    context = StepContext(config, AllRanks(members.world, 8), cast(Batches, noting), note)
    result = step.compute_gradients(state, context, members)
    assert state.grids is not None
    return result, [*(grad.clone() for _, grad, _ in state.sharding.gradients()), state.grids.seen.clone()], computed


def alone(partial: PartialSums | None = None, own: tuple[int, ...] | None = None) -> StepMembers:
    return StepMembers(World(0, 1, CPU), range(8), own, partial)


@pytest.mark.parametrize("dies_in", [0, 1, 2], ids=["gradients", "losses", "magnitudes"])
def test_after_a_failed_reduction_only_what_is_missing_is_computed(config: Config, prepared: Prepared, dies_in: int):
    state, partial = build(config, prepared), PartialSums()
    compute(state, config, prepared, alone())  # the first computation widens its grid
    calm, calm_sums, _ = compute(state, config, prepared, alone())
    dying = StepMembers(DyingWorld(0, 2, CPU, dies_in=dies_in), range(8), (0, 2, 5), partial)
    with pytest.raises(RuntimeError, match="closed by peer"):
        compute(state, config, prepared, dying)
    assert partial.done(state.step) == (0, 2, 5)
    partial.put_back()
    result, sums, computed = compute(state, config, prepared, alone(partial, (7, 1, 3, 4, 6)))
    assert (result, computed) == (calm, [7, 1, 3, 4, 6])
    assert all(torch.equal(left, right) for left, right in zip(calm_sums, sums, strict=True))


def test_a_second_pass_over_a_step_computes_every_micro_batch(config: Config, prepared: Prepared):
    """The first step finds the finest grid too fine: what is kept of it is of no use on the grid that fits."""
    calm, calm_sums, _ = compute(build(config, prepared), config, prepared, alone())
    state, partial = build(config, prepared), PartialSums()
    result, sums, computed = compute(state, config, prepared, alone(partial, (3, 0, 1, 2, 4, 5, 6, 7)))
    assert (result, calm.redone) == (calm, 1)
    assert computed == [3, 0, 1, 2, 4, 5, 6, 7, *range(8)]
    assert all(torch.equal(left, right) for left, right in zip(calm_sums, sums, strict=True))
    assert partial.done(state.step) == ()
