"""Promises about a run in wall time: what its timeline holds, and its picture."""

import json
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from tests.logs import Run, hung, killed, killed_once
from trainer.errors import RunDirectoryError
from trainer.log.events import Warned
from trainer.log.timeline import read_timeline
from trainer.show import figure, timeline
from trainer.show.timeline import FLAG_ROWS


def test_a_timeline_holds_attempts_faults_saves_and_incidents_in_seconds_since_the_start(tmp_path: Path):
    run_timeline = read_timeline(killed_once(tmp_path / "run").path)
    assert run_timeline["origin"] == 1_000_000.0
    assert run_timeline["steps_budget"] == 60
    first, second = run_timeline["attempts"]
    assert first == {
        "attempt": 0, "process_started": 0.0, "ready": 2.0, "ended": 11.0, "from_step": 0, "to_step": 17,
        "world_size": 2, "ended_as": "died",
    }  # fmt: skip
    assert second == {
        "attempt": 1, "process_started": 12.0, "ready": 14.0, "ended": 39.5, "from_step": 10, "to_step": 60,
        "world_size": 2, "ended_as": "finished",
    }  # fmt: skip
    assert (len(run_timeline["steps"]), run_timeline["steps"][0], run_timeline["steps"][-1]) == (
        67,
        [2.5, 1, 0],
        [39.0, 60, 1],
    )
    assert (run_timeline["saves"], run_timeline["evals"]) == ([[8.25, 10]], [[7.25, 10]])
    (fault,) = run_timeline["faults"]
    assert fault == {
        "t": 11.0, "kind": "sigkill", "victim": 1, "step": 18, "phase": "before_reduce", "index": 0, "attempt": 0,
    }  # fmt: skip
    (incident,) = run_timeline["incidents"]
    assert {key: incident[key] for key in ("t", "kind", "lost_steps", "seconds", "rank")} == {
        "t": 10.75, "kind": "worker_lost", "lost_steps": 7, "seconds": 3.25, "rank": 1,
    }  # fmt: skip
    assert incident["text"].startswith("rank 1 was killed (SIGKILL) after step 17")
    assert json.loads(json.dumps(run_timeline)) == run_timeline


def test_a_directory_without_a_log_gives_a_timeline_that_claims_nothing(tmp_path: Path):
    run_timeline = read_timeline(tmp_path / "nothing")
    assert (run_timeline["origin"], run_timeline["steps_budget"]) == (None, None)
    assert not any(run_timeline[name] for name in ("attempts", "steps", "saves", "evals", "faults", "incidents"))
    for nothing in (run_timeline, {}):
        assert any("no timeline" in text for text in texts(timeline.svg(nothing)))


def test_a_fault_before_the_first_word_of_a_run_is_the_beginning_of_its_timeline(tmp_path: Path):
    run = Run(tmp_path / "run")  # died before it wrote down what it is
    run.fault("sigkill", victim=0)
    assert read_timeline(run.path)["faults"][0]["t"] == 0.0
    assert read_timeline(run.path)["attempts"] == []
    parsed(timeline.svg(read_timeline(run.path)))
    run.start(after=3.0)
    run.finish(1, 60)
    (attempt,) = read_timeline(run.path)["attempts"]
    assert (attempt["process_started"], attempt["ready"], attempt["ended_as"]) == (3.0, 5.0, None)


def test_values_that_an_attempt_died_before_it_logged_are_none(run: Run):
    run.attempt = 0
    run.write(Warned(message="starting"), rank=1)
    run.fault("exit", after=0.5, victim=1)
    run.start(after=1.0)
    run.write(killed(pid=999))
    run.finish(1, 60)
    run_timeline = read_timeline(run.path)
    first = {key: value for key, value in run_timeline["attempts"][0].items() if value is not None}
    assert first == {"attempt": 0, "ended": 0.5, "ended_as": "died"}
    parsed(timeline.svg(run_timeline))


def test_a_run_without_rank_0s_log_has_attempts_but_claims_no_steps(run: Run):
    run.train(5)
    run.write(hung(4.0, {"rank": 0, "point": "in_forward"}), after=4.0, rank=1)
    next(run.path.glob("events/*-rank-00000.jsonl")).unlink()
    run_timeline = read_timeline(run.path)
    (attempt,) = run_timeline["attempts"]
    assert (attempt["ready"], attempt["ended"], attempt["world_size"]) == (2.0, 11.0, 2)
    assert run_timeline["steps"] == []
    parsed(timeline.svg(run_timeline))


def test_a_damaged_log_is_an_error(run: Run):
    run.start()
    path = next(run.path.glob("events/*.jsonl"))
    path.write_text("{nonsense}\n" + path.read_text())
    with pytest.raises(RunDirectoryError):
        read_timeline(run.path)


@pytest.mark.parametrize("jump", [3600.0, -3600.0, -2.5])
def test_a_clock_that_was_set_leaves_the_timeline_as_it_was(tmp_path: Path, jump: float):
    seen: list[dict[str, Any]] = []
    for by in (0.0, jump):
        run = Run(tmp_path / f"jump {by}")
        run.record()
        run.train(20, seconds=0.5)
        run.fault("clock_jump", victim=0, at=21)
        run.now += by
        run.steps(21, 40, seconds=0.5)
        run.end("finished", 40, after=0.25)
        seen.append(read_timeline(run.path))
    reference, jumped = seen
    for name in ("steps", "attempts"):
        for ours, theirs in zip(jumped[name], reference[name], strict=True):
            values = zip(*(list(x.values()) if isinstance(x, dict) else x for x in (ours, theirs)), strict=True)
            assert all(a == b if isinstance(b, str | None) else a == pytest.approx(b, abs=0.6) for a, b in values)
    assert jumped["origin"] == reference["origin"]


def test_a_clock_set_back_without_a_plan_never_makes_time_run_backwards(run: Run):
    run.train(20, seconds=0.5)
    run.now -= 500
    run.finish(21, 60, seconds=0.5)
    run_timeline = read_timeline(run.path)
    times = [t for t, _, _ in run_timeline["steps"]]
    assert times == sorted(times)
    assert times[-1] == pytest.approx(31.5)
    assert run_timeline["incidents"] == []


def test_a_fault_on_a_rank_whose_clock_was_set_lies_where_the_unset_clock_says(run: Run):
    run.train(20, seconds=0.5)
    run.fault("clock_jump", victim=0, at=21)
    run.now += 3600
    run.steps(21, 30, seconds=0.5)
    run.now -= 3600
    run.fault("sigkill", after=0.25, victim=0, at=31)
    run.start(from_step=20, after=1.0)
    run_timeline = read_timeline(run.path)
    assert [(fault["kind"], fault["t"]) for fault in run_timeline["faults"]] == [
        ("clock_jump", 12.0),
        ("sigkill", 17.25),
    ]
    assert run_timeline["attempts"][0]["ended"] == 17.25
    assert run_timeline["incidents"][0]["t"] == pytest.approx(17.0)


# --- pictures of them -------------------------------------------------------------------------------------------------


def parsed(svg: str) -> ElementTree.Element:
    """Fails on what is no well-formed picture, or one that needs anything from elsewhere."""
    assert not re.search(r"<script|href=\"(?!#)|url\((?!#)|@import|<image", svg)
    return ElementTree.fromstring(svg)


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in parsed(svg).iter("{http://www.w3.org/2000/svg}text")]


def test_a_picture_shows_faults_attempts_and_incidents_in_the_colours_of_its_page(tmp_path: Path):
    picture = timeline.svg(read_timeline(killed_once(tmp_path / "run").path), "run-0")
    assert {"sigkill r1", "0, 2 ranks, died", "1, 2 ranks, finished", "rank 1 lost, 3.2 s"} <= set(texts(picture))
    assert 'aria-label="step over 39.5 s: 2 attempts, 1 restarts, 1 faults, 1 incidents"' in picture
    assert all(name.startswith("run-0-") for name in re.findall(r' id="([^"]*)"', picture))
    # Each colour is a variable that a page defines, and a file of its own brings with it.
    alone = figure.standalone(picture)
    assert {f"--{name}:" for name in re.findall(r"var\(--([\w-]+)\)", picture)} <= set(re.findall(r"--[\w-]+:", alone))
    assert not re.findall(r"#[0-9a-f]{6}\b", picture)
    parsed(alone)


def test_faults_beyond_what_can_be_labelled_are_counted(run: Run):
    run.train(20)
    for _ in range(40):
        run.fault("straggler", victim=None)
    run.finish(21, 60)
    picture = timeline.svg(read_timeline(run.path))
    assert sum(text == "straggler" for text in texts(picture)) == FLAG_ROWS
    assert f"{40 - FLAG_ROWS} more faults without a label" in texts(picture)


def many_incidents(number: int, sorts: int) -> dict[str, Any]:
    """A timeline of so many incidents, a minute apart and of half a minute each, evenly of so many sorts."""
    attempts = [
        {"attempt": n, "process_started": 60.0 * n, "ready": 60.0 * n + 20, "ended": 60.0 * n + 50, "from_step": n,
         "to_step": n + 2, "world_size": 2, "ended_as": "died"}
        for n in range(number)
    ]  # fmt: skip
    incidents = [{"t": 60.0 * n + 50, "kind": "worker_lost", "lost_steps": 1, "seconds": 30.0, "attempt": n,
                  "rank": n % sorts, "step": n + 2} for n in range(number)]  # fmt: skip
    steps = [[60.0 * n + 20 + 15 * done, n + done, n] for n in range(number) for done in (1, 2)]
    return {"origin": 0.0, "steps_budget": number + 2, "saves": [], "evals": [], "faults": [], "steps": steps,
            "attempts": attempts, "incidents": incidents}  # fmt: skip


def test_incidents_that_need_more_rows_than_there_are_share_a_row_by_sort():
    few = [text for text in texts(timeline.svg(many_incidents(40, 2))) if text.startswith("rank")]
    assert sorted(few) == ["rank 0 lost, 30.0 s"] * 20 + ["rank 1 lost, 30.0 s"] * 20
    many = [text for text in texts(timeline.svg(many_incidents(400, 2))) if text.startswith("rank")]
    assert many == ["rank 0 lost: 200, 1.7 h", "rank 1 lost: 200, 1.7 h"]


def test_the_rarest_sorts_of_incidents_share_the_last_row():
    shown = texts(timeline.svg(many_incidents(400, 40)))
    assert sum(text.endswith(" lost: 10, 300.0 s") for text in shown) == timeline.SORT_ROWS - 1
    rest = 40 - (timeline.SORT_ROWS - 1)
    assert f"{rest} other sorts: {10 * rest}, {30 * 10 * rest / 3600:.1f} h" in shown


def test_causes_have_a_row_each_whatever_they_are_called():
    tree = many_incidents(400, 2)
    for number, incident in enumerate(tree["incidents"]):
        incident["cause"] = "others" if number % 4 == 0 else "gpu"
    shown = [text for text in texts(timeline.svg(tree)) if text.startswith(("gpu", "others", "0 other"))]
    assert shown == ["gpu: 300, 2.5 h", "others: 100, 50.0 min"]


def test_a_frequent_cause_named_others_does_not_join_the_rarest():
    tree, rest = many_incidents(400, 1), 20 - (timeline.SORT_ROWS - 1)
    for number, incident in enumerate(tree["incidents"]):
        incident["cause"] = "others" if number < 210 else f"cause {number % 19}"
    shown = texts(timeline.svg(tree))
    assert "others: 210, 1.8 h" in shown
    [bundle] = [text for text in shown if text.startswith(f"{rest} other sorts: ")]
    told = [text for text in shown if text.startswith("cause ")]
    counts = [int(text.split(": ")[1].split(",")[0]) for text in [*told, bundle]]
    assert len(told) == timeline.SORT_ROWS - 2 and sum(counts) == 190


def test_one_fault_that_hits_several_ranks_is_one_flag(run: Run):
    run.train(5)
    for victim in (2, 0, 1):
        run.fault("sigterm", after=0.01, victim=victim, index=0)
    run.fault("sigterm", after=0.01, victim=0, index=1)
    run.end("preempted", 6, after=1.0)
    labels = [text for text in texts(timeline.svg(read_timeline(run.path))) if text.startswith("sigterm")]
    assert sorted(labels) == ["sigterm r0", "sigterm r0,1,2"]


def test_text_from_a_log_is_escaped_in_the_picture_and_is_no_formula(run: Run):
    evil = "</title><script>alert('1')</script>& $x_1"
    run.train(5)
    run.fault(evil)
    run.end("finished", 5)
    assert f"{evil} r1" in texts(timeline.svg(read_timeline(run.path)))


def test_a_run_of_many_steps_makes_no_larger_picture():
    long = {"origin": 0.0, "steps_budget": 100_000, "saves": [], "evals": [], "faults": [], "incidents": []}
    attempt = {"attempt": 0, "process_started": 0.0, "ready": 1.0, "ended": 100_001.0, "from_step": 0,
               "to_step": 100_000, "world_size": 1, "ended_as": "finished"}  # fmt: skip
    steps = [[1.0 + n, n, 0] for n in range(1, 100_001)]
    assert len(timeline.svg(long | {"attempts": [attempt], "steps": steps})) < 100_000
