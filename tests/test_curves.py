"""Promises about the picture of a run's losses."""

import math
from pathlib import Path
from typing import Any

import pytest

from trainer.show.curves import draw_curves, incident_labels, smooth

PNG = b"\x89PNG\r\n\x1a\n"


def summary(steps: int = 40, sets: tuple[str, ...] = ("val", "repo"), restarts: tuple[int, ...] = ()) -> dict[str, Any]:
    losses = [[n, 5.0 / math.sqrt(n)] for n in range(1, steps + 1)]
    return {
        "train": losses,
        "eval": {name: [[n, loss + 0.1, loss / 2] for n, loss in losses[9::10]] for name in sets},
        "attempts": [{"from_step": step} for step in (0, *restarts)],
    }


def test_a_run_with_restarts_becomes_a_png_and_nothing_else_is_left(tmp_path: Path):
    draw_curves({"smoke": summary(restarts=(20, 30))}, tmp_path / "plots" / "curves.png")
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["curves.png"]
    assert (tmp_path / "plots" / "curves.png").read_bytes().startswith(PNG)


def incident(kind: str, step: int | None, lost_steps: int | None = 0, rank: int | None = None) -> dict[str, Any]:
    return {"kind": kind, "step": step, "lost_steps": lost_steps, "rank": rank}


MANY_INCIDENTS = [
    incident("worker_lost", 27, 7, rank=1),
    incident("hung", 33, 3, rank=0),
    incident("not_finite", 35),
    incident("save_failed", 36),
    incident("checkpoint_rejected", 36),
    incident("preempted", 38),
    incident("worker_lost", 39, None),
    incident("worker_lost", None),
]


def test_incidents_are_marked_where_they_happened_and_labelled_while_labels_can_be_read(tmp_path: Path):
    run = summary(restarts=(20, 30)) | {"incidents": MANY_INCIDENTS}
    draw_curves({"smoke": run}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)
    texts = [text for _, _, text in incident_labels(MANY_INCIDENTS[:-1])]
    assert texts == [
        "rank 1 lost", "rank 0 hung", "not finite", "save failed, damaged checkpoint", "preempted", "workers lost",
    ]  # fmt: skip
    assert incident_labels([incident("hung", step, rank=0) for step in range(100)]) == []


def test_several_runs_share_one_picture(tmp_path: Path):
    path = tmp_path / "curves.png"
    draw_curves({"reference": summary(), "with faults": summary(restarts=(20,))}, path)
    assert path.read_bytes().startswith(PNG)


@pytest.mark.parametrize(
    "poor",
    [
        {"train": [], "eval": {}, "attempts": []},
        summary(sets=()),
        summary() | {"train": []},
        summary() | {"train": [[1, 5.0], [2, math.nan], [3, math.inf]], "attempts": [{"from_step": None}] * 2},
    ],
)
def test_a_run_without_some_of_its_curves_is_drawn_too(tmp_path: Path, poor: dict[str, Any]):
    draw_curves({"poor": poor}, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes().startswith(PNG)


def test_smoothing_neither_lags_nor_spreads_what_is_not_finite():
    assert smooth([3.0] * 500) == pytest.approx([3.0] * 500, rel=1e-12)
    falling = [float(-n) for n in range(1000)]
    assert smooth(falling)[:980] == pytest.approx(falling[:980], abs=1e-9)
    means = smooth([1.0] * 50 + [math.nan] + [1.0] * 50)
    assert [n for n, mean in enumerate(means) if mean != 1.0] == [50]
    assert smooth([]) == []
