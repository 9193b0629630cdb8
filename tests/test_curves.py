"""Promises about the picture of a run's losses."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from trainer.show.curves import draw, draw_curves, incident_labels, smooth


def summary(steps: int = 40, sets: tuple[str, ...] = ("val", "repo"), restarts: tuple[int, ...] = ()) -> dict[str, Any]:
    losses = [[n, 5.0 / math.sqrt(n)] for n in range(1, steps + 1)]
    return {
        "train": losses,
        "eval": {name: [[n, loss + 0.1, loss / 2] for n, loss in losses[9::10]] for name in sets},
        "attempts": [{"from_step": step} for step in (0, *restarts)],
    }


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
NOT_FINITE = {"train": [[1, 5.0], [2, math.nan], [3, math.inf]], "attempts": [{"from_step": None}] * 2}


@pytest.mark.parametrize(
    "runs",
    [
        {"smoke": summary(restarts=(20, 30)) | {"incidents": MANY_INCIDENTS}},
        {"reference": summary(), "with faults": summary(restarts=(20,))},
        {"nothing yet": {"train": [], "eval": {}, "attempts": []}},
        {"bits unknown": summary() | {"eval": {"val": [[10, 2.0, None], [20, 1.9, None]], "repo": [[10, 2.0, 1.0]]}}},
        {"never evaluated": summary(sets=())},
        {"code": summary(sets=()) | {"code_length": {"so_far": [[1, None], [2, 7.5], [3, 7.0]]}}},
        {"evaluations alone": summary() | {"train": []}},
        {"not finite": summary() | NOT_FINITE},
    ],
    ids=" and ".join,
)
def test_runs_become_one_png_also_without_some_of_their_curves_and_nothing_else_is_left(tmp_path: Path, runs: Any):
    draw_curves(runs, tmp_path / "plots" / "curves.png")
    (picture,) = (tmp_path / "plots").iterdir()
    assert picture.name == "curves.png" and picture.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


PLOT = """
import sys
from pathlib import Path
from trainer.show import figure
with figure.style():
    drawn = figure.new_figure(1, 1)
    drawn.subplots().plot([1, 2])
Path(sys.argv[1]).write_bytes(figure.png(drawn))
"""


def test_neither_the_environment_nor_a_matplotlibrc_changes_a_picture_or_stops_it(tmp_path: Path):
    (tmp_path / "matplotlibrc").write_text("lines.linewidth: 9\nfont.size: 30\nbackend: TkAgg\n")
    (tmp_path / "elsewhere").mkdir()
    for name, backend, folder in (
        ("plain.png", "", tmp_path / "elsewhere"),
        ("notebook.png", "module://matplotlib_inline.backend_inline", tmp_path / "elsewhere"),
        ("odd.png", "no-such-backend", tmp_path),
    ):
        environment = {**os.environ, "MPLBACKEND": backend}
        subprocess.run([sys.executable, "-c", PLOT, tmp_path / name], env=environment, cwd=folder, check=True)
    plain = (tmp_path / "plain.png").read_bytes()
    assert (tmp_path / "notebook.png").read_bytes() == plain
    assert (tmp_path / "odd.png").read_bytes() == plain


def test_incidents_are_labelled_in_words_while_labels_can_be_read():
    texts = [text for _, _, text in incident_labels(MANY_INCIDENTS[:-1])]
    assert texts == [
        "rank 1 lost", "rank 0 hung", "not finite", "save failed, damaged checkpoint", "preempted", "workers lost",
    ]  # fmt: skip
    assert incident_labels([incident("hung", step, rank=0) for step in range(100)]) == []


@pytest.mark.parametrize("sets", [("val", "repo"), ()], ids=["evaluated", "never evaluated"])
@pytest.mark.parametrize("steps", [range(30, 40), range(1, 24), [40] * 3], ids=["close together", "many", "at the end"])
def test_labels_cover_neither_curves_nor_one_another(sets: tuple[str, ...], steps: list[int]):
    incidents = [incident("worker_lost", step, 1, rank=1) for step in steps]
    drawn = draw({"smoke": summary(sets=sets) | {"incidents": incidents}})
    drawn.draw_without_rendering()
    *panels, band = drawn.axes
    labels = [label.get_window_extent() for label in band.texts]
    assert len(labels) == len(set(steps))
    for label in labels:
        assert not any(label.overlaps(panel.get_window_extent()) for panel in panels)
        assert band.get_window_extent().padded(1).contains(label.x0, label.y0), "the band is too low for it"
    assert not any(one.overlaps(next_one) for one, next_one in itertools.pairwise(labels))


def test_the_legend_has_the_losses_that_inspect_has_and_says_that_the_line_is_smoothed():
    _, (text,) = draw({"smoke": summary(400, sets=())}).axes[0].get_legend_handles_labels()
    assert text == "train  0.250  (line: mean of 9 steps)"


def test_smoothing_neither_lags_nor_spreads_what_is_not_finite():
    assert smooth([3.0] * 500) == pytest.approx([3.0] * 500, rel=1e-12)
    falling = [float(-n) for n in range(1000)]
    assert smooth(falling)[:980] == pytest.approx(falling[:980], abs=1e-9)
    means = smooth([1.0] * 50 + [math.nan] + [1.0] * 50)
    assert [n for n, mean in enumerate(means) if mean != 1.0] == [50]
    assert smooth([]) == []
