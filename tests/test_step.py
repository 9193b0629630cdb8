"""What a step says of numbers that it cannot use. That its sums are exact is for test_exact and test_equality."""

from pathlib import Path
from typing import Any

import pytest

from tests.support import SMOKE, settings, torchrun, write_plan
from trainer.errors import EXIT_FAILED


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
    """Behind outputs that are finite, and in no other micro-batch of the same round."""
    each = 8 // ranks if ranks > 1 else 1  # micro-batches of a rank
    where = {"rank": ranks - 1, "step": 1, "every": each, "nth": micro_batch // ranks + 1}
    poison = {"point": "before_forward", "action": "nan", "where": "gradient", "lasting": True}
    plan = write_plan(tmp_path, [poison | where])
    ended = torchrun(
        ranks,
        plan,
        SMOKE,
        "--run",
        tmp_path / "run",
        *settings(**overrides),
        module="tests.survival_worker",
        check=False,
    )
    assert ended.returncode == EXIT_FAILED
    for named in ("step 2:", f"micro-batch {micro_batch} (samples ", "gradient of blocks.0.mlp."):
        assert named in ended.stderr, ended.stderr
