"""Figures that scripts/bench_quorum.py makes of what its jobs have recorded."""

from pathlib import Path
from typing import Any

import pytest

from scripts import bench_quorum as bench
from scripts.bench_quorum import Commit


class Recorded:
    """A job whose records are given."""

    def __init__(self, commits: list[Commit], resumed: float | None = None) -> None:
        self._commits, self._resumed = commits, resumed

    def read(self) -> list[Commit]:
        return self._commits

    def resumed(self, since: float) -> float | None:
        return self._resumed


def commits(*steps: tuple[int, float], group: int = 0, micro_batches: float = 8) -> list[Commit]:
    return [Commit(step, time, group, micro_batches) for step, time in steps]


def test_a_step_that_was_under_way_at_the_kill_and_steps_done_again_are_not_the_next_commit():
    before = commits((9, 9.0), (10, 10.0))
    under_way = commits((11, 10.3))
    again = commits((10, 12.0), (11, 12.5), (12, 13.0), group=1)
    found = bench._recovery(Recorded([*before, *under_way, *again]), before[-1], at=10.2)  # pyright: ignore
    assert found == {"all": pytest.approx(2.8), "lost": 2, "computing": None}


def test_what_is_computed_again_begins_when_the_members_have_met():
    job = Recorded([*commits((10, 10.0)), *commits((11, 11.5), group=1)], resumed=10.7)
    assert bench._recovery(job, commits((10, 10.0))[-1], at=10.2) == {  # pyright: ignore
        "all": pytest.approx(1.3), "lost": 0, "computing": pytest.approx(0.8),
    }  # fmt: skip


def test_useful_work_counts_a_step_once_and_a_smaller_batch_as_less():
    log = [*commits((1, 1.0), (2, 2.0), (3, 3.0)), *commits((2, 4.0), (3, 5.0), (4, 6.0), group=1, micro_batches=4)]
    assert bench._useful(log, 1.5, 10.0) == 4 + 4 + 4, "as each was computed last"
    assert bench._useful(log, 3.5, 10.0) == 4, "steps that are done again bring nothing new"


def row(stall: float | None = 1.0, **values: Any) -> dict[str, Any]:
    one = {"all": 0.5, "beyond": 0.3, "rejoined": 2.0, "stall": stall, "missing": 4, "kept": 4, "share": 3} | values
    return {"workers": 3, "step_seconds": 0.1, "rows": [one, one | {"all": 0.9}]}


def test_the_tables_have_median_and_worst_and_say_what_could_not_be_measured():
    found: dict[str, Any] = {
        "quorum-3": row(), "torchft-3": {"missing": "torchft==0.2.0 cannot be installed: no such package"},
        "goodput-quorum-10": {"goodput": 0.93, "rate": 40.0, "calm": 43.0, "kills": 17, "seconds": 180.0},
    }  # fmt: skip
    text = "\n".join(bench.table({"rows": found}))
    assert "| 3 | next commit | 0.70 (0.90) |  |  | not measured |" in text
    assert "cannot be installed: no such package" in text
    assert "| 10 s, for 180 s | 0.93 (40 of 43 micro-batches/s, 17 kills) |  |  |" in text


def test_a_join_that_holds_up_the_others_too_long_breaks_a_promise():
    assert bench.broken_promises({"quorum-3": row(), "spare-3": row(None)}) == []
    (broken,) = bench.broken_promises({"quorum-3": row(2.4)})
    assert broken == "quorum-3: a join holds up the others for 2.4 steps' time, more than 2"


def test_rows_that_are_measured_are_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    measured: list[str] = []

    def made(name: str) -> bench.Row:
        return bench.Row(name, lambda: measured.append(name) or row())

    monkeypatch.setattr(bench, "rows", lambda repeats, seconds: [made("a"), made("b")])
    bench.measure(["a"], 1.0, 1, 1.0, tmp_path)
    assert list(bench.measure([], 1.0, 1, 1.0, tmp_path)) == ["a", "b"]
    assert measured == ["a", "b"]
