"""Promises about how a campaign is told: the timeline of a run, the matrix, the page, the terminal, the picture."""

import html.parser
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from tests.logs import Run, evaluated, hung, killed, saved
from trainer.chaos import drawing, report, results, timeline
from trainer.chaos.drawing import Label, lay
from trainer.chaos.results import Report, Result
from trainer.errors import RunDirectoryError
from trainer.faults.checker import INVARIANTS, Answer
from trainer.faults.kinds import KINDS
from trainer.log.events import CheckpointFailed, CheckpointRejected, Warned

PNG = b"\x89PNG\r\n\x1a\n"
FIRST = INVARIANTS[0]
EVIL = '</title><script>alert("1")</script>&\''


# --- timelines of made-up runs ----------------------------------------------------------------------------------------


@pytest.fixture
def run(tmp_path: Path) -> Run:
    made = Run(tmp_path / "run")
    made.record()
    return made


def killed_once(run: Run) -> dict[str, Any]:
    """Two seconds of start, 17 steps, a kill, a second to notice, two of start, steps 11 to 60."""
    run.start()
    run.steps(1, 10, seconds=0.5)
    run.write(evaluated(10), after=0.25)
    run.steps(11, 12, seconds=0.5)
    run.write(saved(10))
    run.steps(13, 17, seconds=0.5)
    run.fault("sigkill", after=0.25, victim=1, at=18)
    run.start(from_step=10, after=1.0)
    run.write(killed())
    run.steps(11, 60, seconds=0.5)
    run.end("finished", 60, after=0.5)
    return timeline.of(run.path)


def test_a_timeline_holds_attempts_faults_saves_and_incidents_in_seconds_since_the_start(run: Run):
    seen = killed_once(run)
    assert seen["origin"] == 1_000_000.0
    assert seen["steps_budget"] == 60
    first, second = seen["attempts"]
    assert first == {
        "attempt": 0, "process_started": 0.0, "ready": 2.0, "ended": 11.0, "from_step": 0, "to_step": 17,
        "world_size": 2, "ended_as": "died",
    }  # fmt: skip
    assert second == {
        "attempt": 1, "process_started": 12.0, "ready": 14.0, "ended": 39.5, "from_step": 10, "to_step": 60,
        "world_size": 2, "ended_as": "finished",
    }  # fmt: skip
    assert (len(seen["steps"]), seen["steps"][0], seen["steps"][-1]) == (67, [2.5, 1, 0], [39.0, 60, 1])
    assert (seen["saves"], seen["evals"]) == ([[8.25, 10]], [[7.25, 10]])
    (fault,) = seen["faults"]
    assert fault == {
        "t": 11.0, "kind": "sigkill", "victim": 1, "step": 18, "phase": "before_reduce", "index": 0, "attempt": 0,
    }  # fmt: skip
    (incident,) = seen["incidents"]
    assert {key: incident[key] for key in ("t", "kind", "lost_steps", "seconds", "rank")} == {
        "t": 10.75, "kind": "worker_lost", "lost_steps": 7, "seconds": 3.25, "rank": 1,
    }  # fmt: skip
    assert incident["text"].startswith("rank 1 was killed (SIGKILL) after step 17")
    assert json.loads(json.dumps(seen)) == seen


def test_a_directory_without_a_log_gives_a_timeline_that_claims_nothing(tmp_path: Path):
    seen = timeline.of(tmp_path / "nothing")
    assert (seen["origin"], seen["steps_budget"]) == (None, None)
    assert not any(seen[name] for name in ("attempts", "steps", "saves", "evals", "faults", "incidents"))
    for nothing in (seen, {}):
        assert "no timeline" in parsed(timeline.svg(nothing)).findtext(".//{*}text", "")


def test_a_fault_before_the_first_word_of_a_run_is_the_beginning_of_its_timeline(tmp_path: Path):
    run = Run(tmp_path / "run")  # died before it wrote down what it is
    run.fault("sigkill", victim=0)
    assert timeline.of(run.path)["faults"][0]["t"] == 0.0
    assert timeline.of(run.path)["attempts"] == []
    parsed(timeline.svg(timeline.of(run.path)))
    run.start(after=3.0)
    run.steps(1, 60)
    run.end("finished", 60)
    (attempt,) = timeline.of(run.path)["attempts"]
    assert (attempt["process_started"], attempt["ready"], attempt["ended_as"]) == (3.0, 5.0, None)


def test_what_an_attempt_did_not_live_to_say_is_none(run: Run):
    run.attempt = 0
    run.write(Warned(message="starting"), rank=1)
    run.fault("exit", after=0.5, victim=1)
    run.start(after=1.0)
    run.write(killed(pid=999))
    run.steps(1, 60)
    run.end("finished", 60)
    seen = timeline.of(run.path)
    first = {key: value for key, value in seen["attempts"][0].items() if value is not None}
    assert first == {"attempt": 0, "ended": 0.5, "ended_as": "died"}
    parsed(timeline.svg(seen))


def test_a_run_without_rank_0s_log_has_attempts_but_claims_no_steps(run: Run):
    run.start()
    run.steps(1, 5)
    run.write(hung(4.0, {"rank": 0, "point": "in_forward"}), after=4.0, rank=1)
    next(run.path.glob("events/*-rank-00000.jsonl")).unlink()
    seen = timeline.of(run.path)
    (attempt,) = seen["attempts"]
    assert (attempt["ready"], attempt["ended"], attempt["world_size"]) == (2.0, 11.0, 2)
    assert seen["steps"] == []
    parsed(timeline.svg(seen))


def test_a_damaged_log_is_an_error(run: Run):
    run.start()
    path = next(run.path.glob("events/*.jsonl"))
    path.write_text("{nonsense}\n" + path.read_text())
    with pytest.raises(RunDirectoryError):
        timeline.of(run.path)


@pytest.mark.parametrize("jump", [3600.0, -3600.0, -2.5])
def test_a_clock_that_was_set_leaves_the_timeline_as_it_was(tmp_path: Path, jump: float):
    seen: list[dict[str, Any]] = []
    for by in (0.0, jump):
        run = Run(tmp_path / f"jump {by}")
        run.record()
        run.start()
        run.steps(1, 20, seconds=0.5)
        run.fault("clock_jump", victim=0, at=21)
        run.now += by
        run.steps(21, 40, seconds=0.5)
        run.end("finished", 40, after=0.25)
        seen.append(timeline.of(run.path))
    reference, jumped = seen
    for name in ("steps", "attempts"):
        for ours, theirs in zip(jumped[name], reference[name], strict=True):
            values = zip(*(list(x.values()) if isinstance(x, dict) else x for x in (ours, theirs)), strict=True)
            assert all(a == b if isinstance(b, str | None) else a == pytest.approx(b, abs=0.6) for a, b in values)
    assert jumped["origin"] == reference["origin"]


def test_a_clock_set_back_without_a_plan_never_makes_time_run_backwards(run: Run):
    run.start()
    run.steps(1, 20, seconds=0.5)
    run.now -= 500
    run.steps(21, 60, seconds=0.5)
    run.end("finished", 60)
    seen = timeline.of(run.path)
    times = [t for t, _, _ in seen["steps"]]
    assert times == sorted(times)
    assert times[-1] == pytest.approx(31.5)
    assert seen["incidents"] == []


def test_a_fault_on_a_rank_whose_clock_was_set_lies_where_the_unset_clock_says(run: Run):
    run.start()
    run.steps(1, 20, seconds=0.5)
    run.fault("clock_jump", victim=0, at=21)
    run.now += 3600
    run.steps(21, 30, seconds=0.5)
    run.now -= 3600
    run.fault("sigkill", after=0.25, victim=0, at=31)
    run.start(from_step=20, after=1.0)
    seen = timeline.of(run.path)
    assert [(fault["kind"], fault["t"]) for fault in seen["faults"]] == [("clock_jump", 12.0), ("sigkill", 17.25)]
    assert seen["attempts"][0]["ended"] == 17.25
    assert seen["incidents"][0]["t"] == pytest.approx(17.0)


# --- pictures of them -------------------------------------------------------------------------------------------------


def parsed(svg: str) -> ElementTree.Element:
    """Fails on what is no well-formed picture, or one that needs anything from elsewhere."""
    assert not re.search(r"<script|href|url\(|@import|<image", svg)
    return ElementTree.fromstring(svg)


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in parsed(svg).iter("{http://www.w3.org/2000/svg}text")]


def titles(svg: str) -> list[str]:
    return [element.text or "" for element in parsed(svg).iter("{http://www.w3.org/2000/svg}title")]


def test_a_picture_tells_what_hit_a_run_what_was_lost_and_how_it_was_told(run: Run):
    picture = timeline.svg(killed_once(run))
    assert {"sigkill r1", "0, 2 ranks, died", "1, 2 ranks, finished", "worker lost r1, 3.2 s"} <= set(texts(picture))
    told = "\n".join(titles(picture))
    for part in (
        "sigkill on rank 1 at step 18, before_reduce, after 11.0 s",
        "attempt 0: 7 steps lost, 11 to 17",
        "attempt 1: 2 ranks, steps 10 to 60, finished, ready after 2.0 s",
        "worker_lost: rank 1 was killed (SIGKILL) after step 17; resumed from step 10",
        "checkpoint of step 10",
    ):
        assert part in told
    assert 'aria-label="step over 39.5 s: 2 attempts, 1 restarts, 1 faults, 1 incidents"' in picture


def boxes(picture: str, size: float = 11.0) -> list[tuple[float, float, float, float]]:
    """(left, top, right, bottom) of the words on flags and incidents, as wide as a wide sans-serif draws them."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import TextPath

    found = []
    for element in parsed(picture).iter("{http://www.w3.org/2000/svg}text"):
        if "halo" in element.get("class", "") and element.text:
            x, y = float(element.get("x", "")), float(element.get("y", ""))
            font = FontProperties(family="DejaVu Sans", size=size)
            width = TextPath((0, 0), element.text, prop=font).get_extents().width
            left = x - width if element.get("text-anchor") == "end" else x
            found.append((left, y - size * 0.75, left + width, y + size * 0.25))
    return found


@pytest.mark.parametrize("spread_seconds", [0.0, 1.0, 40.0])
def test_no_label_covers_another_however_close_the_faults_are(run: Run, spread_seconds: float):
    kinds = list(KINDS)[:10]
    run.start()
    run.steps(1, 40, seconds=0.1)
    for number, kind in enumerate(kinds):
        run.fault(kind, after=spread_seconds / len(kinds), victim=number % 3)
        run.write(CheckpointFailed(step=number, reason="EIO", in_a_row=1))
        run.write(CheckpointRejected(step=number, reason="checksum"))
    run.steps(41, 60, seconds=0.1)
    run.end("finished", 60)
    picture = timeline.svg(timeline.of(run.path))
    assert all(any(words.startswith(kind) for words in texts(picture)) for kind in kinds)
    found = boxes(picture)
    assert len(found) >= 20
    width, height = 900.0, float(parsed(picture).get("height", ""))
    for number, (left, top, right, bottom) in enumerate(found):
        assert left >= 0 and right <= width and top >= 0 and bottom <= height
        for other_left, other_top, other_right, other_bottom in found[:number]:
            assert right <= other_left or left >= other_right or bottom <= other_top or top >= other_bottom


def test_faults_beyond_what_can_be_labelled_are_counted_and_keep_their_flag_and_tooltip(run: Run):
    run.start()
    run.steps(1, 20)
    for _ in range(40):
        run.fault("straggler", victim=None)
    run.steps(21, 60)
    run.end("finished", 60)
    picture = timeline.svg(timeline.of(run.path))
    assert sum(words == "straggler" for words in texts(picture)) == drawing.ROWS
    assert f"{40 - drawing.ROWS} more faults without a label" in texts(picture)
    assert sum(title.startswith("straggler") for title in titles(picture)) == 40


def test_rows_are_shared_where_there_is_room_and_labels_turn_at_the_right_edge():
    labels = [Label(at, "sigkill r1", "") for at in (60.0, 61.0, 300.0, 880.0)]
    assert lay(labels, 58, 886) == 2
    assert [label.row for label in labels] == [1, 0, 0, 0]
    assert [label.flipped for label in labels] == [False, False, False, True]


def test_one_fault_that_hits_several_ranks_is_one_flag(run: Run):
    run.start()
    run.steps(1, 5)
    for victim in (2, 0, 1):
        run.fault("sigterm", after=0.01, victim=victim, index=0)
    run.fault("sigterm", after=0.01, victim=0, index=1)
    run.end("preempted", 6, after=1.0)
    labels = [words for words in texts(timeline.svg(timeline.of(run.path))) if words.startswith("sigterm")]
    assert sorted(labels) == ["sigterm r0", "sigterm r0,1,2"]


def test_whatever_a_log_says_is_escaped_in_the_picture(run: Run):
    run.start()
    run.steps(1, 5)
    run.fault(EVIL)
    run.write(CheckpointFailed(step=5, reason=EVIL, in_a_row=1))
    run.end("finished", 5)
    picture = timeline.svg(timeline.of(run.path))
    assert any(EVIL in title for title in titles(picture))


def test_a_run_of_many_steps_makes_no_larger_picture():
    long = {"origin": 0.0, "steps_budget": 100_000, "saves": [], "evals": [], "faults": [], "incidents": []}
    attempt = {"attempt": 0, "process_started": 0.0, "ready": 1.0, "ended": 100_001.0, "from_step": 0,
               "to_step": 100_000, "world_size": 1, "ended_as": "finished"}  # fmt: skip
    steps = [[1.0 + n, n, 0] for n in range(1, 100_001)]
    assert len(timeline.svg(long | {"attempts": [attempt], "steps": steps})) < 100_000


# --- reports ----------------------------------------------------------------------------------------------------------


def result(name: str, outcome: str = "pass", why: str = "", **changes: Any) -> Result:
    """A result in which the first invariant has that outcome and all others hold."""
    others = [Answer(invariant, "pass") for invariant in INVARIANTS[1:]]
    answers: list[Any] = [] if outcome == "skipped" else [Answer(FIRST, outcome, why), *others]  # pyright: ignore
    values: dict[str, Any] = {
        "kinds": [name] if name in KINDS else ["sigkill", "no_space"],
        "faults": [{"kind": "sigkill", "rank": 1, "at_step": 18, "phase": "before_reduce"}],
        "ranks": 2, "nodes": 1, "strategy": "replicate", "seed": None, "repeat": 0, "answers": answers,
        "launches": [{"started": 0.0, "ended": 12.5, "status": 75}, {"started": 13.0, "ended": 20.0, "status": 0}],
        "measured": [
            {"index": 0, "kind": "sigkill", "victim": 1, "step": 18, "fired": 1_000_011.0, "detect_seconds": 0.02,
             "recover_seconds": 3.4, "detected_as": "worker_lost", "attributed_correctly": True}
        ],
        "seconds": 20.0,
    }  # fmt: skip
    if outcome == "skipped":
        values |= {"launches": [], "measured": [], "seconds": 0.0}
    return Result(name=name, outcome=outcome, why=why, **(values | changes))  # pyright: ignore


def every_outcome(path: Path) -> Report:
    run = Run(path / "run")
    run.record()
    seen = killed_once(run)
    found = [
        result("sigkill", timeline=seen),
        result("stopped", "fail", "named as something else", timeline=seen),
        result("flip_weights", "undetected", "weights differ", timeline=seen),
        result("straggler", "unknown", "it never fired", timeline=seen, measured=[]),
        result("slow_link", "skipped", "slow_link: this kernel has no netem"),
        result("pair: sigkill + no_space", timeline=seen, ranks=4, nodes=2, strategy="fsdp"),
        result("storm llama3 seed 3", seed=3, timeline=seen, repeat=1),
    ]
    reference = {"weights_sha256": "ab" * 32, "state_sha256": "cd" * 32, "steps": 60, "seconds": 12.0, "exact": True}
    return Report("catalogue", "Does it hold?", "a.toml", "Linux, 2 cores", 1.7e9, 754.0, reference, found, False)


@pytest.fixture
def full(tmp_path: Path) -> Report:
    return every_outcome(tmp_path)


def empty(**changes: Any) -> Report:
    values = {"campaign": "smoke", "question": "", "config": "c.toml", "machine": "m", "started": 0.0, "seconds": 1.0}
    return Report(**(values | {"reference": {}, "results": [], "interrupted": True} | changes))


def shown(of: Report, width: int = 100) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(report.terminal(of))
    return out.getvalue().splitlines()


def test_a_report_survives_json_with_its_timelines(full: Report):
    again = results.from_json(json.loads(json.dumps(results.to_json(full))))
    assert again == full
    assert report.html(again) == report.html(full)


@pytest.mark.parametrize("width", [80, 100])
def test_the_terminal_shows_the_matrix_without_colours(full: Report, width: int):
    lines = shown(full, width)
    assert max(map(len, lines)) <= width
    rows = {line.split()[0]: line.split() for line in lines if line.startswith("  ")}
    held = "✓" * (len(INVARIANTS) - 1)
    assert rows["sigkill"] == ["sigkill", "2", "replicate", "pass", "0.02", "3.4", "✓" + held]
    assert rows["stopped"] == ["stopped", "2", "replicate", "FAIL", "0.02", "3.4", "✗" + held]
    assert rows["flip_weights"] == ["flip_weights", "2", "replicate", "undetected", "0.02", "3.4", "!" + held]
    assert rows["straggler"] == ["straggler", "2", "replicate", "unknown", "–", "–", "?" + held]
    assert rows["slow_link"] == ["slow_link", "2", "replicate", "skipped", "–", "–", "–" * len(INVARIANTS)]
    page = "\n".join(lines)
    head = next(line for line in lines if line.startswith("fault"))
    assert head.split()[-1] == "abcdefghij"
    assert all(f"{letter} {name}" in page for letter, name in zip("abcdefghij", INVARIANTS, strict=True))
    assert any("2×2 fsdp" in line for line in lines)
    for part in (
        "7 runs: 3 pass, 1 FAIL, 1 undetected, 1 unknown, 1 skipped in 12:34",
        "FAIL        stopped: named as something else",
        "undetected  flip_weights: weights differ",
        "unknown     straggler: it never fired",
        "skipped     slow_link: this kernel has no netem",
    ):
        assert part in page
    assert f"weights_sha256{'ab' * 32}" in "".join(page.split())


def test_every_kind_has_its_name_whole_on_80_columns():
    lines = shown(empty(results=[result(kind, "undetected", nodes=2) for kind in KINDS]), width=80)
    assert {line.split()[0] for line in lines if line.startswith("  ")} >= KINDS.keys()
    assert max(map(len, lines)) <= 80


def test_runs_that_failed_alike_share_a_line_and_repeats_are_numbered():
    found = [result("sigkill", "fail", "weights differ", repeat=n) for n in (1, 2)]
    page = "\n".join(shown(empty(results=[*found, result("exit", "fail", "weights differ")], interrupted=False)))
    assert "FAIL  sigkill #1, sigkill #2, exit: weights differ" in page


def test_markup_in_what_a_run_says_is_not_obeyed():
    page = "\n".join(shown(empty(results=[result("sigkill", "fail", "[red]no[/red] [bold")], campaign="[red]x")))
    assert "[red]no[/red] [bold" in page
    assert "campaign [red]x" in page


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_report_without_a_single_result_is_told_all_the_same(tmp_path: Path, interrupted: bool):
    nothing = empty(interrupted=interrupted)
    page = "\n".join(shown(nothing))
    assert "0 runs: none in 0:01" in page
    assert "no reference run: equality is unknown" in page
    document = Page(report.html(nothing))
    assert "no run has ended" in document.text
    for told in (page, document.text):
        assert ("nterrupted" in told) == interrupted
    report.matrix_png(nothing, tmp_path / "matrix.png")
    assert (tmp_path / "matrix.png").read_bytes().startswith(PNG)


class Page(html.parser.HTMLParser):
    """An HTML document taken apart; fails on tags that do not match and on what it would have to fetch or run."""

    OPEN_ENDED = ("meta", "th", "td", "li", "br", "tr", "p", "rect", "line", "path", "circle", "polyline", "polygon")

    def __init__(self, source: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.text, self.titles, self._open = "", list[str](), list[str]()
        self.feed(source)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert tag not in ("script", "link", "img", "iframe", "object", "base", "form")
        if tag not in self.OPEN_ENDED:
            self._open.append(tag)
        for name, value in attrs:
            assert not name.startswith("on")
            assert name != "src"
            if name == "id":
                self.ids.append(value or "")
            if name == "href":
                self.links.append(value or "")
            if name == "title":
                self.titles.append(value or "")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.OPEN_ENDED:
            assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open and self._open[-1] != "style":
            self.text += data
        else:
            assert not re.search(r"url\(|@import", data)


def test_the_page_stands_alone_and_every_link_in_it_leads_somewhere(full: Report):
    page = Page(report.html(full))
    assert len(page.ids) == len(set(page.ids))
    assert page.links
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    assert sum(link.startswith("#run-") for link in page.links) == 6, "each run that was made has its section"


def test_the_page_tells_what_was_asked_made_fired_told_and_answered(full: Report):
    page = Page(report.html(full))
    for part in (
        "Does it hold?", "Linux, 2 cores", "ab" * 32, "3 pass", "1 fail", "1 undetected", "1 unknown", "1 skipped",
        "this kernel has no netem", "rank 1, step 18, before_reduce", "11.0 s", "worker lost, rightly",
        "rank 1 was killed (SIGKILL) after step 17", "exit status 75 after 12.5 s; exit status 0 after 7.0 s",
        "The command was given twice", KINDS["flip_weights"].imitates, "4 fsdp on 2 nodes", "several at once",
        "nothing told of it: flip_weights",
    ):  # fmt: skip
        assert part in page.text, part
    assert f"{FIRST}: fail. named as something else" in page.titles
    assert set(INVARIANTS) <= {title.split(":")[0] for title in page.titles}


def test_a_fault_that_never_fired_is_told_as_never_and_what_nobody_measured_as_a_dash():
    unmeasured = {"index": 1, "kind": "no_space", "victim": None, "step": None, "fired": None, "detected_as": None}
    faults = [{"kind": "sigkill", "rank": 1, "at_step": 18}, {"kind": "no_space", "rank": "all", "at_step": 20}]
    page = Page(report.html(empty(results=[result("sigkill", faults=faults, measured=[unmeasured])])))
    rows = page.text[page.text.index("told as") :]
    assert re.search(r"sigkillrank 1, step 18never", rows)
    assert re.search(r"no_spacerank all, step 20\?–––", rows)


def test_whatever_a_report_holds_is_escaped_in_the_page(full: Report):
    spoilt = empty(
        campaign=EVIL, question=EVIL, config=EVIL, machine=EVIL, reference={"weights_sha256": EVIL, "steps": EVIL}
    )
    spoilt.results = [
        result(EVIL, "fail", EVIL, kinds=[EVIL], strategy=EVIL, faults=[{"kind": EVIL, "rank": EVIL, EVIL: EVIL}]),
        result(EVIL, "skipped", EVIL, seed=1),
        result(
            EVIL,
            measured=[{"index": 0, "victim": EVIL, "step": EVIL, "detected_as": EVIL}],
            answers=[Answer(EVIL, "pass")],
        ),
        result(
            "sigkill", launches=[{"started": None, "ended": None, "status": EVIL}], timeline=full.results[0].timeline
        ),
    ]
    incident = dict.fromkeys(("t", "lost_steps", "seconds", "attempt", "rank", "step")) | {"kind": EVIL, "text": EVIL}
    spoilt.results[-1].timeline = full.results[0].timeline | {"incidents": [incident]}
    source = report.html(spoilt)
    assert "<script" not in source
    assert Page(source).text.count(EVIL) > 10


def test_sums_that_are_not_exact_are_said_to_leave_equality_unknown(full: Report):
    full.reference["exact"] = False
    assert "not exact" in Page(report.html(full)).text
    assert "not exact, so equality is unknown" in " ".join(shown(full, width=200))


def test_the_matrix_becomes_a_png_and_nothing_else_is_left(full: Report, tmp_path: Path):
    full.results += [result(kind) for kind in KINDS] + [result("sigkill", "skipped", "w" * 300)]
    report.matrix_png(full, tmp_path / "plots" / "matrix.png")
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["matrix.png"]
    assert (tmp_path / "plots" / "matrix.png").read_bytes().startswith(PNG)


# --- while it works ---------------------------------------------------------------------------------------------------


def follow(live: report.Live, found: list[Result], wait: Callable[[], None] = lambda: None) -> None:
    with live:
        live.update([], "reference")
        for number, one in enumerate(found):
            live.update(found[:number], one.name)
            wait()
        live.update(found, "")


def test_off_a_terminal_each_run_is_a_line_when_it_has_ended_and_says_why_it_did_not_pass(full: Report):
    out = io.StringIO()
    follow(report.Live(7, out), full.results)
    assert out.getvalue().splitlines()[:5] == [
        "1/7  pass       sigkill  2 replicate  detect 0.02 s  recover 3.4 s  0:20",
        "2/7  FAIL       stopped  2 replicate  detect 0.02 s  recover 3.4 s  0:20",
        "     named as something else",
        "3/7  undetected flip_weights  2 replicate  detect 0.02 s  recover 3.4 s  0:20",
        "     weights differ",
    ]


def test_what_was_done_by_an_earlier_start_is_one_line(full: Report):
    out = io.StringIO()
    with report.Live(7, out) as live:
        live.update(full.results[:5], "reference")
        live.update(full.results[:6], "")
    assert [line.split("  ")[0] for line in out.getvalue().splitlines()] == ["5 of 7 runs had been done before", "6/7"]


def test_on_a_terminal_what_runs_now_is_shown_with_the_time_left_and_the_cursor_comes_back(full: Report):
    out = io.StringIO()
    times = iter(float(n) for n in range(0, 10_000, 10))

    def interrupted() -> None:
        with report.Live(7, out, is_terminal=True, monotonic=lambda: next(times)) as live:
            live.update([], "reference")
            live.update(full.results[:1], "stopped")
            live._screen.refresh()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    shown_there = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert re.search(r"▸ stopped \(0:\d0\)  1/7   1 pass   \d:\d0   left 2:00", shown_there)
    assert "1/7  pass       sigkill" in shown_there
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l"), "the cursor stays hidden"


@pytest.mark.parametrize("is_terminal", [False, True])
def test_told_to_be_quiet_it_says_nothing(full: Report, is_terminal: bool):
    out = io.StringIO()
    follow(report.Live(7, out, enabled=False, is_terminal=is_terminal), full.results)
    assert out.getvalue() == ""


def test_an_output_that_nobody_reads_any_more_does_not_stop_the_campaign(full: Report):
    out = io.StringIO()
    out.close()
    follow(report.Live(7, out, is_terminal=False), full.results)
