"""Promises about a campaign's report: the matrix, the page, the terminal, the picture."""

import dataclasses
import functools
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from tests.logs import killed_once
from tests.pages import Page
from trainer.chaos import report, results
from trainer.chaos.report import page
from trainer.chaos.results import Report, Result
from trainer.faults.checker import ATTRIBUTED, DETECTED, INVARIANTS, MEASURED_AS, NOT_ASKED, Answer
from trainer.faults.fault import KINDS
from trainer.log.timeline import read_timeline
from trainer.show import timeline

PNG = b"\x89PNG\r\n\x1a\n"
FIRST = INVARIANTS[0]
EVIL = '</title><script>alert("1")</script>&\''


# --- reports ----------------------------------------------------------------------------------------------------------


def result(name: str, outcome: str = "pass", why: str = "", **changes: Any) -> Result:
    """A result in which the first invariant has that outcome and all others hold."""
    unmeasured = MEASURED_AS if changes.get("measured") == [] else ()
    others = [Answer(name, "unknown" if name in unmeasured else "pass") for name in INVARIANTS[1:]]
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


@pytest.fixture
def full(tmp_path: Path) -> Report:
    """A report in which every outcome occurs."""
    run_timeline = read_timeline(killed_once(tmp_path / "run").path)
    found = [
        result("sigkill", timeline=run_timeline),
        result("stopped", "fail", "named as something else", timeline=run_timeline),
        result("flip_weights", "undetected", "weights differ", timeline=run_timeline),
        result("straggler", "unknown", "it never fired", timeline=run_timeline, measured=[]),
        result("slow_link", "skipped", "slow_link: this kernel has no netem"),
        result("pair: sigkill + no_space", timeline=run_timeline, ranks=4, nodes=2, strategy="fsdp"),
        result("storm llama3 seed 3", seed=3, timeline=run_timeline, repeat=1),
    ]
    reference = {"weights_sha256": "ab" * 32, "state_sha256": "cd" * 32, "steps": 60, "seconds": 12.0, "exact": True}
    return Report("catalogue", "Does it hold?", "a.toml", "Linux, 2 cores", 1.7e9, 754.0, reference, found, False)


def empty(**changes: Any) -> Report:
    values = {"campaign": "smoke", "question": "", "config": "c.toml", "machine": "m", "started": 0.0, "seconds": 1.0}
    return Report(**(values | {"reference": {}, "results": [], "interrupted": True} | changes))


def shown(reported: Report, width: int = 100) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(report.terminal(reported))
    return out.getvalue().splitlines()


def test_a_report_survives_json_with_its_timelines(full: Report):
    again = results.from_json(json.loads(json.dumps(results.to_json(full))))
    assert again == full
    assert report.html(again) == report.html(full)


def test_a_report_of_an_older_version_passes_only_what_it_measured(tmp_path: Path):
    quiet = {"index": 0, "kind": "spike", "recover_seconds": 0.1} | dict.fromkeys(("detect_seconds", "named_rightly"))
    tree = results.to_json(empty(results=[result("spike", measured=[quiet]), result("sigkill")]))
    for stored in tree["results"]:
        for answer in stored["answers"]:
            answer["invariant"] = answer["invariant"].replace("attributed correctly", "named rightly")
    (tmp_path / "report.json").write_text(json.dumps(tree))
    again = results.read(tmp_path / "report.json")
    assert again is not None
    unasked = [{a.invariant for a in found.answers if a.answer == NOT_ASKED} for found in again.results]
    assert unasked == [{DETECTED, ATTRIBUTED}, set()]
    assert [found.outcome for found in again.results] == ["pass", "pass"]
    row = next(line for line in shown(again) if line.startswith("  spike"))
    assert row.split()[-1] == "✓✓✓✓✓–✓–✓✓"
    assert f"{DETECTED}: not applicable" in Page(report.html(again)).titles


def test_the_terminal_shows_the_matrix_without_colours(full: Report):
    lines = shown(full)
    rows = {line.split()[0]: line.split() for line in lines if line.startswith("  ")}
    held = "✓" * (len(INVARIANTS) - 1)
    assert rows["sigkill"] == ["sigkill", "2", "replicate", "pass", "0.02", "3.4", "✓" + held]
    assert rows["stopped"] == ["stopped", "2", "replicate", "FAIL", "0.02", "3.4", "✗" + held]
    assert rows["flip_weights"] == ["flip_weights", "2", "replicate", "undetected", "0.02", "3.4", "!" + held]
    assert rows["straggler"] == ["straggler", "2", "replicate", "unknown", "–", "–", "?✓✓✓✓???✓✓"]
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


def test_runs_that_failed_alike_share_a_line_and_repeats_are_numbered():
    found = [result("sigkill", "fail", "weights differ", repeat=n) for n in (1, 2)]
    page = "\n".join(shown(empty(results=[*found, result("exit", "fail", "weights differ")], interrupted=False)))
    assert "FAIL  sigkill #1, sigkill #2, exit: weights differ" in page


def test_markup_in_what_a_run_says_is_not_obeyed():
    page = "\n".join(shown(empty(results=[result("sigkill", "fail", "[red]no[/red] [bold")], campaign="[red]x")))
    assert "[red]no[/red] [bold" in page
    assert "campaign [red]x" in page


@pytest.mark.parametrize("interrupted", [False, True])
def test_a_campaign_without_a_single_result_has_a_report(tmp_path: Path, interrupted: bool):
    nothing = empty(interrupted=interrupted)
    page = "\n".join(shown(nothing))
    assert "0 runs: none in 0:01" in page
    assert "no reference run: equality is unknown" in page
    document = Page(report.html(nothing))
    assert "no run has ended" in document.text
    for text in (page, document.text):
        assert ("nterrupted" in text) == interrupted
    report.matrix_png(nothing, tmp_path / "matrix.png")
    assert (tmp_path / "matrix.png").read_bytes().startswith(PNG)


def test_the_page_stands_alone_and_every_link_in_it_leads_somewhere(full: Report):
    page = Page(report.html(full))
    assert len(page.ids) == len(set(page.ids))
    assert page.links
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids)
    sections = [link for link in page.links if re.fullmatch(r"#run-\d+", link)]
    assert len(sections) == 6, "each run that was made has its section"


def test_a_page_that_is_written_again_with_one_run_more_draws_the_timeline_of_that_run_alone(
    full: Report, monkeypatch: pytest.MonkeyPatch
):
    drawn: list[str] = []
    monkeypatch.setattr(timeline, "svg", lambda _, name: drawn.append(name) or f"<svg id='{name}'/>")
    monkeypatch.setattr(page, "_drawn", functools.lru_cache(page._drawn.__wrapped__))
    runs = [run for run in full.results if run.timeline]
    for count in (1, 2, 3):
        written = report.html(dataclasses.replace(full, results=runs[:count]))
    assert drawn == ["run-0", "run-1", "run-2"]
    assert all(f"<svg id='{name}'/>" in written for name in drawn)


def test_the_page_shows_what_was_asked_made_detected_and_answered(full: Report):
    page = Page(report.html(full))
    for part in (
        "Does it hold?", "Linux, 2 cores", "ab" * 32, "3 pass", "1 fail", "1 undetected", "1 unknown", "1 skipped",
        "this kernel has no netem", "rank 1, step 18, before_reduce", "11.0 s", "worker lost, correctly",
        "rank 1 was killed (SIGKILL) after step 17", "exit status 75 after 12.5 s; exit status 0 after 7.0 s",
        "The command was started 2 times", KINDS["flip_weights"].imitates, "4 fsdp on 2 nodes", "several at once",
        "no incident reports it: flip_weights",
    ):  # fmt: skip
        assert part in page.text, part
    assert f"{FIRST}: fail. named as something else" in page.titles
    assert {"detect s", "recover s", "ranks", "planned", "reported as"} <= set(page.names)
    assert set(INVARIANTS) <= {title.split(":")[0] for title in page.titles}


def test_a_fault_that_never_fired_is_shown_as_never_and_unmeasured_seconds_as_a_dash():
    unmeasured = {"index": 1, "kind": "no_space", "victim": None, "step": None, "fired": None, "detected_as": None}
    faults = [{"kind": "sigkill", "rank": 1, "at_step": 18}, {"kind": "no_space", "rank": "all", "at_step": 20}]
    page = Page(report.html(empty(results=[result("sigkill", faults=faults, measured=[unmeasured])])))
    rows = page.text[page.text.index("reported as") :]
    assert "sigkill rank 1, step 18 never" in rows
    assert "no_space rank all, step 20 ? – – – –" in rows


def test_whatever_a_report_holds_is_escaped_in_the_page(full: Report):
    about = dict.fromkeys(("campaign", "question", "config", "machine"), EVIL)
    spoilt = empty(**about, reference={"weights_sha256": EVIL, "steps": EVIL})
    measured = [{"index": 0, "victim": EVIL, "step": EVIL, "detected_as": EVIL}]
    launches = [{"started": None, "ended": None, "status": EVIL}]
    spoilt.results = [
        result(EVIL, "fail", EVIL, kinds=[EVIL], strategy=EVIL, faults=[{"kind": EVIL, "rank": EVIL, EVIL: EVIL}]),
        result(EVIL, "skipped", EVIL, seed=1),
        result(EVIL, measured=measured, answers=[Answer(EVIL, "pass")]),
        result("sigkill", launches=launches, timeline=full.results[0].timeline),
    ]
    incident = dict.fromkeys(("t", "lost_steps", "seconds", "attempt", "rank", "step")) | {"kind": EVIL, "text": EVIL}
    spoilt.results[-1].timeline = full.results[0].timeline | {"incidents": [incident]}
    source = report.html(spoilt)
    assert "<script" not in source
    assert Page(source).text.count(EVIL) > 10


def test_a_report_says_which_code_its_runs_were_made_with_for_one_that_was_resumed_may_have_several(full: Report):
    assert " code commit" not in Page(report.html(full)).text, "as reports of older versions, that do not know it"
    for number, one in enumerate(full.results[:3]):
        one.run, one.commit = f"cases/{number}/run", "0123456789abcdef+"
    assert "code commit 0123456789 with changes reference run" in Page(report.html(full)).text
    full.results[1].commit, full.results[2].commit = "fedcba9876543210", ""
    expected = "commits 0123456789 with changes (1 of 3), fedcba9876 (1 of 3), unknown (1 of 3)"
    assert expected in Page(report.html(full)).text


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


def follow(live: report.CampaignProgress, found: list[Result]) -> None:
    with live:
        live.update([], "reference")
        for number, result in enumerate(found):
            live.update(found[:number], result.name)
        live.update(found, "")


def test_off_a_terminal_each_run_is_a_line_when_it_has_ended_and_says_why_it_did_not_pass(full: Report):
    out = io.StringIO()
    follow(report.CampaignProgress(7, out), full.results)
    assert out.getvalue().splitlines()[:5] == [
        "1/7  pass       sigkill  2 replicate  detect 0.02 s  recover 3.4 s  0:20",
        "2/7  FAIL       stopped  2 replicate  detect 0.02 s  recover 3.4 s  0:20",
        "     named as something else",
        "3/7  undetected flip_weights  2 replicate  detect 0.02 s  recover 3.4 s  0:20",
        "     weights differ",
    ]


def test_cases_of_an_earlier_start_are_one_line(full: Report):
    out = io.StringIO()
    with report.CampaignProgress(7, out) as live:
        live.update(full.results[:5], "reference")
        live.update(full.results[:6], "")
    assert [line.split("  ")[0] for line in out.getvalue().splitlines()] == ["5 of 7 runs had been done before", "6/7"]


def test_on_a_terminal_what_runs_now_is_shown_with_the_time_left_and_the_cursor_comes_back(full: Report):
    out = io.StringIO()
    times = iter(float(n) for n in range(0, 10_000, 10))

    def interrupted() -> None:
        with report.CampaignProgress(7, out, is_terminal=True, monotonic=lambda: next(times)) as live:
            live.update([], "reference")
            live.update(full.results[:1], "stopped")
            live._live.refresh()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    shown_there = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue())
    assert re.search(r"▸ stopped \(0:\d0\)  1/7   1 pass   \d:\d0   left 2:00", shown_there)
    assert "1/7  pass       sigkill" in shown_there
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l"), "the cursor stays hidden"


def test_an_output_whose_reader_has_left_does_not_stop_the_campaign(full: Report):
    out = io.StringIO()
    out.close()
    follow(report.CampaignProgress(7, out, is_terminal=False), full.results)
