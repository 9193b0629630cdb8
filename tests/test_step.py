"""A step's reaction to non-finite or too large values. Exact sums are tested in test_exact and test_equality."""

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from tests.support import SMOKE, settings, torchrun, with_faults
from trainer import step
from trainer.errors import EXIT_FAILED
from trainer.exact import Grids
from trainer.parallel.world import StepMembers, World


@pytest.mark.parametrize(
    ("ranks", "overrides", "micro_batch"),
    [
        (1, {"data__micro_batches": 1}, 0),
        (2, {"numerics__exact": False}, 5),
        (2, {"numerics__exact": False, "parallel__strategy": "fsdp"}, 5),
    ],
    ids=["one micro-batch", "replicate", "fsdp"],
)
def test_a_gradient_that_stays_not_finite_is_named_where_nothing_is_rounded_too(
    tmp_path: Path, ranks: int, overrides: dict[str, Any], micro_batch: int
):
    """The value is named behind finite outputs, and in no other micro-batch of the same round."""
    nth = micro_batch // ranks + 1  # of the rank's own
    fault = {"kind": "nan_sample", "rank": ranks - 1, "at_step": 2, "nth": nth, "where": "gradient"}
    command = ["train", SMOKE, "--run", tmp_path / "run", *settings(**overrides), *with_faults([fault])]
    ended = torchrun(ranks, *command, module="tests.worker", check=False)
    assert ended.returncode == EXIT_FAILED
    for named in ("step 2:", f"micro-batch {micro_batch} (samples ", "gradient of blocks.0.mlp."):
        assert named in ended.stderr, ended.stderr


@pytest.mark.parametrize("passes", [[math.nan], [1e6, math.nan], [1e6, 1e5, math.inf]])
def test_a_pass_that_is_not_finite_ends_the_step_and_leaves_the_grid_as_it_was(monkeypatch, passes: list[float]):
    """First or after an overflow, in which a wider grid was tried; also after two passes that disagree."""
    grids = Grids({"matrix": torch.Size((3, 4))}, 4, 5, torch.device("cpu"))
    round_gradient = grids.rounder("matrix")
    grids.begin(counting=False)
    round_gradient(torch.ones(3, 4))
    grids.commit()
    before, remaining = grids.magnitude.clone(), iter(passes)

    def one_pass(state: Any, context: Any, members: Any) -> step.StepResult:
        value = next(remaining)
        grids.begin(counting=False)
        round_gradient(torch.full((3, 4), value))
        return step.StepResult(value, "", 0, None, False)

    monkeypatch.setattr(step, "_one_pass", one_pass)
    state = cast(step.TrainState, SimpleNamespace(step=1, grids=grids))
    members = StepMembers(World(0, 1, torch.device("cpu")), range(4))
    result = step.compute_gradients(state, cast(step.StepContext, None), members)
    assert not math.isfinite(result.loss)
    assert result.redone == len(passes) - 1
    assert torch.equal(grids.magnitude, before)
