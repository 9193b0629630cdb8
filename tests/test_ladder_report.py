"""Promises about a ladder's report: the tree, the page, the terminal, the pictures, W&B."""

import io
import json
import math
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from rich.console import Console

from tests import ladder_reports as made
from tests import ladders
from tests.ladders import LONG, SHORT
from tests.pages import Page
from trainer.config import parse
from trainer.ladder import report
from trainer.ladder.plan.ladder import AA, TARGET, PlannedRun
from trainer.ladder.report import build, summary_run
from trainer.ladder.report import page as pages
from trainer.ladder.report.build import CollectedLadder
from trainer.ladder.report.drawing import final
from trainer.ladder.stats.records import BASELINE

PNG = b"\x89PNG\r\n\x1a\n"
EVIL = '</title><script>alert("1")</script>&\'$x_$[red]'
CLEAR = replace(LONG, sd=0.003)
FAST = ("rope", "fading")


@pytest.fixture(scope="module")
def full() -> dict[str, Any]:
    """Five rungs, four arms, and some runs at the target."""
    return made.tree(CLEAR, target=(BASELINE, *FAST))


@pytest.fixture(scope="module")
def gaps() -> dict[str, Any]:
    """One arm without a rung, one that diverged once, one whose smallest rung is still to be run."""
    found = made.runs_of(SHORT, made.ARMS)
    found = made.missing(found, lambda run: (run.rung, run.arm) == ("r2", "qk-norm"))
    diverged = {"loss": math.nan, "status": "missing", "reason": "NumericsError: loss is nan at step 40."}
    found = made.change(found, lambda run: (run.rung, run.arm, run.seed) == ("r3", "fading", 0), **diverged)
    found = made.change(found, lambda run: (run.rung, run.arm) == ("r0", "rope"), status="waiting", loss=None)
    return made.report_of(found)


@pytest.fixture(scope="module")
def full_page(full, tmp_path_factory) -> Path:
    """The directory of its report."""
    out = tmp_path_factory.mktemp("full")
    report.write(full, out)
    return out


@pytest.fixture(scope="module")
def single() -> dict[str, Any]:
    return made.tree(replace(SHORT, flops=SHORT.flops[:1]))


def page(tree: dict[str, Any], drawn: Sequence[pages.Picture] = ()) -> str:
    return report.html(tree, drawn)


def screen(tree: dict[str, Any], width: int = 100) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(report.terminal(tree))
    return console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


# The tree


def test_the_tree_is_plain_json_without_numbers_that_are_none(full, gaps):
    for tree in (full, gaps):
        assert json.loads(json.dumps(tree, allow_nan=False)) == tree


def test_every_arm_is_decided_as_its_losses_and_times_say(full):
    found = {arm: final(full, arm) for arm in made.ARMS}
    decided = {arm: (row["decision"], row["trend"]) for arm, row in found.items() if row}
    assert decided["rope"] == ("promote", "persists")
    assert decided["fading"][0] == "reject"
    assert decided["fading"][1] in ("shrinks", "reverses")
    assert decided[AA][0] == "noise floor"
    assert decided["qk-norm"][0] == "reject"  # it is worth it in compute, and takes 1.3 times as long
    by_losses = {row["arm"]: row["decision"] for row in full["verdicts"]}
    assert (by_losses["qk-norm"], by_losses[AA]) == ("promote", "inconclusive")
    assert "By its losses alone: promote." in Page(page(full)).text


@pytest.mark.parametrize("decision", ["inconclusive", "reject", "promote"])
def test_the_arm_without_a_change_is_shown_last_as_the_noise_floor_and_never_counted(full, decision):
    by_losses, by_time = (
        [row | {"decision": decision} if row["arm"] == AA else row for row in found]
        for found in (full["verdicts"], full["course"]["verdicts"])
    )
    tree = full | {"verdicts": by_losses, "course": full["course"] | {"verdicts": by_time}}
    assert next(iter(made.ARMS)) == AA, "the ladder runs it first"
    text = Page(page(tree)).text
    head, verdicts = text[: text.index("Verdicts")], text[text.index("Verdicts") : text.index("The criterion")]
    assert "✓ 1 promote" in head and "✗ 2 reject" in head and "inconclusive" not in head
    assert verdicts.index("is fading worth it?") < verdicts.index("is A/A worth it?")
    for shown in (verdicts[verdicts.index(f"{AA} · noise floor") :], screen(tree)[screen(tree).index(f"{AA}: ") :]):
        assert "multipliers show what noise looks like" in " ".join(shown.split())
        assert "settle" not in shown and "It would take" not in shown
        assert ("noise passes for a gain" in " ".join(shown.split())) == (decision == "promote")
    assert summary_run.summary(tree)[f"{AA}/decision"] == "noise floor"
    no_fit = Page(page(made.tree(replace(SHORT, flops=SHORT.flops[:1])))).text
    assert f"{AA} · noise floor" in no_fit


def test_apart_from_the_execution_the_report_is_a_function_of_results_alone(full):
    """Killed and resumed, on another machine, slower: other times, attempts, faults; the same losses."""
    found = made.runs_of(CLEAR, made.ARMS, target=(BASELINE, *FAST))
    killed = [
        replace(run, seconds=7.0, undisturbed_seconds=(run.seconds or 0) * (1 + number % 7), wall_seconds=1e6,
                spent={"productive": 3.0},
                attempts=1 + number % 3, faults=[{"kind": "sigkill", "step": 4, "attempt": 0}], replayed=number,
                redone=1, not_finite=2, git_commit="e" * 40, machine=("other", "cuda", 2))
        for number, run in enumerate(found)
    ]  # fmt: skip
    ladder = made.ladder_of(CLEAR, list(made.ARMS))
    record = {"first_planned": 5.0, "criterion_history": [], "edits": []}
    again = build.build_report(CollectedLadder(ladder, killed, record=record))
    assert again["course"] != full["course"]
    plain, other = report.without_execution(full), report.without_execution(again)
    assert json.dumps(plain, indent=1) == json.dumps(other, indent=1)
    assert page(plain) == page(other)


def test_predictions_use_only_smaller_rungs(full):
    """The largest rung's come of the rungs below it, the target's of the rungs."""
    design = CLEAR
    found = made.runs_of(design, made.ARMS, target=(BASELINE, *FAST))
    moved = made.change(found, lambda run: run.rung in ("r4", TARGET), loss=3.5)
    changed = build.build_report(CollectedLadder(made.ladder_of(design, list(made.ARMS)), moved, record=made.HISTORY))
    for row, other in zip(full["predictions"], changed["predictions"], strict=True):
        assert (row["rung"], row["arm"]) == (other["rung"], other["arm"])
        if row["rung"] == "r4":
            assert row["predicted"] == other["predicted"]
            assert row["by"] == ["r0", "r1", "r2", "r3"]
            assert (other["observed"], other["inside"]) == (pytest.approx(3.5), False)
    assert {(row["rung"], row["arm"]) for row in full["predictions"]} == {
        *(("r4", arm) for arm in (BASELINE, *made.ARMS)), *((TARGET, arm) for arm in (BASELINE, *FAST)),
    }  # fmt: skip
    by_rungs = {row["arm"]: row["multiplier"] for row in full["verdicts"]}
    for row in full["multiplier_predictions"]:
        if row["rung"] == TARGET:
            assert row["predicted"] == by_rungs[row["arm"]]
            assert row["measured"]["value"] == pytest.approx(row["predicted"]["value"], rel=0.15)


def test_rungs_that_were_not_run_are_predicted_from_those_that_were(full):
    found = made.runs_of(CLEAR, made.ARMS, target=(BASELINE, *FAST))
    part = made.change(found, lambda run: run.rung in ("r3", "r4", TARGET), status="waiting", loss=None)
    tree = build.build_report(CollectedLadder(made.ladder_of(CLEAR, list(made.ARMS)), part, record=made.HISTORY))
    baseline_rows = {row["rung"]: row for row in tree["predictions"] if row["arm"] == BASELINE}
    came = {row["rung"]: row for row in full["predictions"] if row["arm"] == BASELINE}
    assert list(baseline_rows) == ["r3", "r4", TARGET]
    for row in baseline_rows.values():
        assert row["by"] == ["r0", "r1", "r2"]
        assert row["observed"] is None
    for rung in ("r4", TARGET):
        assert (
            baseline_rows[rung]["predicted"]["low"] < came[rung]["observed"] < baseline_rows[rung]["predicted"]["high"]
        )


def test_runs_at_the_target_move_no_verdict(full):
    without = made.tree(CLEAR)
    assert [row["multiplier"] for row in without["verdicts"]] == [row["multiplier"] for row in full["verdicts"]]
    assert without["fit"] == full["fit"]


def test_a_missing_rung_is_a_gap_everywhere_and_no_number(gaps):
    qk = next(row for row in gaps["verdicts"] if row["arm"] == "qk-norm")
    rung = next(rung for rung in qk["rungs"] if rung["rung"] == "r2")
    assert (rung["pairs"], rung["multiplier"]["value"], rung["gap"]) == (0, None, "no finished pair")
    assert not [row for row in gaps["noise"] if (row["rung"], row["arm"]) == ("r2", "qk-norm")]
    missing = [row for row in gaps["predictions"] if (row["rung"], row["arm"]) == ("r3", "qk-norm")]
    assert missing[0]["predicted"] is None
    assert "three" in missing[0]["refused"]
    text = Page(page(gaps)).text
    assert "r2 qk-norm seed 1 : it ran out of disk" in text
    assert "3 runs of 60 still to be made" in text
    diverged = [run for run in gaps["runs"] if run["diverged"]]
    assert [(run["rung"], run["arm"], run["loss"]) for run in diverged] == [("r3", "fading", None)]
    assert "r3 fading seed 0" in text


@pytest.mark.parametrize("rungs", [1, 2])
def test_too_few_rungs_give_no_fit_and_their_losses_are_shown(rungs):
    tree = made.tree(replace(SHORT, flops=SHORT.flops[:rungs]))
    assert tree["fit"] is None
    assert (tree["verdicts"], tree["lines"], tree["multiplier_predictions"]) == ([], {}, [])
    assert f"the ladder has {rungs} rung" in tree["no_fit"]
    assert len(tree["differences"]) == rungs * len(made.ARMS)
    for text in (Page(page(tree)).text, screen(tree)):
        assert tree["no_fit"].split(",")[0] in text
        assert f"{tree['noise'][0]['mean']:.4f}" in text


def test_pictures_are_the_same_bytes_every_time(single):
    drawn = pages.draw(single)
    assert [picture.name for picture in drawn] == ["loss"]
    assert pages.draw(single) == drawn


def test_a_second_held_out_set_is_predicted_through_the_metric_and_decides_nothing(full):
    score = [
        replace(run, downstream=0.4 + 0.5 * run.loss + 1e-4 * (number % 3))
        for number, run in enumerate(made.runs_of(CLEAR, made.ARMS))
        if run.loss
    ]
    ladder = made.ladder_of(CLEAR, list(made.ARMS))
    asked = replace(ladder, file=ladder.file.model_copy(update={"downstream": "task"}))
    tree = build.build_report(CollectedLadder(asked, score, record=made.HISTORY))
    found = {row["arm"]: row for row in tree["downstream"]["predictions"]}
    assert found.keys() == {BASELINE, *made.ARMS} and tree["downstream"]["link"]["form"] == "line"
    truth = 0.4 + 0.5 * made.ARMS["rope"].law(ladders.power_law())(CLEAR.target)
    assert found["rope"]["metric"]["low"] <= truth <= found["rope"]["metric"]["high"]
    assert found["rope"]["difference"]["high"] < 0 and tree["runs"][0]["downstream"] == score[0].downstream
    assert [one["decision"] for one in tree["verdicts"]] == [one["decision"] for one in full["verdicts"]]
    assert "task at the target" in page(tree) and "task of rope at the target" in screen(tree, 200)


def test_a_ladder_without_a_single_run_has_a_report(tmp_path):
    found = made.change(made.runs_of(SHORT, made.ARMS), lambda run: True, status="waiting", loss=None, attempts=0,
                        seconds=None, wall_seconds=None, spent={}, git_commit=None, machine=None)  # fmt: skip
    tree = made.report_of(found)
    assert report.write(tree, tmp_path) == []
    assert "60 waiting" in Page((tmp_path / "report.html").read_text()).text
    assert "0 rungs" in tree["no_fit"]
    assert "60 waiting" in screen(tree)


def test_losses_that_do_not_fall_give_no_fit_and_the_page_says_so():
    found = [replace(run, loss=3.0 + 0.001 * run.seed) for run in made.runs_of(SHORT, made.ARMS)]
    tree = made.report_of(found)
    for text in (tree["no_fit"], Page(page(tree)).text):
        assert "does not fall with compute" in text


def test_a_run_that_serves_two_arms_counts_once():
    found = made.runs_of(SHORT, {"rope": ladders.UNCHANGED})
    twin = {run.seed: run for run in found if (run.arm, run.rung) == (BASELINE, "r0")}
    shared = [
        replace(twin[run.seed], arm="rope") if (run.arm, run.rung) == ("rope", "r0") else run for run in found
    ]  # fmt: skip
    tree, plain = made.report_of(shared, arms=["rope"]), made.report_of(found, arms=["rope"])
    assert tree["counts"] == {"finished": 21}
    assert plain["flops"] - tree["flops"] == pytest.approx(3 * SHORT.flops[0])


def test_a_changed_criterion_is_shown_with_the_number_of_runs_by_then():
    first = made.HISTORY["criterion_history"][0]
    later = {"time": 1.76e9, "criterion": first["criterion"] | {"min_gain": 1.01}, "finished_runs": 12}
    edits = [{"time": 1.76e9, "lines": ["criterion.min_gain: 1.02 → 1.01"], "finished_runs": 12}]
    record = {"first_planned": 1.75e9, "criterion_history": [first, later], "edits": edits}
    ladder = made.ladder_of(SHORT, ["rope"])
    found = made.runs_of(SHORT, {"rope": ladders.UNCHANGED})
    text = Page(page(build.build_report(CollectedLadder(ladder, found, record=record)))).text
    assert "Written before any of its runs had finished: 2025-06-15" in text
    assert "Changed after 12 runs had finished" in text
    assert "min_gain 1.02 → 1.01" in text
    unknown = Page(page(build.build_report(CollectedLadder(ladder, found)))).text
    assert "When it was written is not known" in unknown


def test_faults_and_instabilities_are_counted_by_kind_and_by_arm():
    found = made.change(
        made.runs_of(SHORT, made.ARMS), lambda run: (run.rung, run.arm, run.seed) == ("r1", "rope", 0),
        faults=[{"kind": kind, "step": 9, "attempt": 0} for kind in ("sigkill", "nan_loss", "sigkill")], attempts=3,
        replayed=20, not_finite=1, redone=2, spikes=[7, 9],
        spent={"productive": 100.0, "lost_steps": 12.0, "down": 40.0},
    )  # fmt: skip
    course = made.report_of(found)["course"]
    assert course["survived"]["faults"] == {
        "nan_loss": {"made": 1, "survived": 1}, "sigkill": {"made": 2, "survived": 2},
    }  # fmt: skip
    assert (course["survived"]["restarts"], course["survived"]["replayed_steps"]) == (2, 20)
    assert (course["time"]["lost_seconds"], course["time"]["away_seconds"]) == (12.0, 40.0)
    rope = next(arm for arm in course["arms"] if arm["arm"] == "rope")
    assert [rope[key] for key in ("spikes", "not_finite", "redone", "faults")] == [2, 1, 2, 3]
    text = Page(page(made.report_of(found))).text
    assert "2 restarts in 1 run; 20 steps replayed; 12 s of computing lost" in text


def test_the_report_names_no_directory_of_the_user(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    text = f"{tmp_path}/runs/x is gone, so is /home/someone/data"
    assert build.without_home(text) == "runs/x is gone, so is ~/data"
    assert build.short_path(tmp_path / "configs" / "a.toml") == "configs/a.toml"
    assert build.short_path(Path("/far/away/ladders/a.toml")) == "ladders/a.toml"


# Page, terminal, pictures


def test_the_page_stands_alone_and_escapes_every_name():
    arms = {EVIL: ladders.line(1.2, 1.2)}
    found = made.runs_of(SHORT, arms)
    found = [replace(run, rung=EVIL if run.rung == "r1" else run.rung) for run in found]
    found = made.missing(found, lambda run: (run.rung, run.seed) == ("r2", 0), EVIL)
    ladder = made.ladder_of(SHORT, [EVIL], name=EVIL, question=EVIL, notices=[EVIL])
    ladder = replace(ladder, rungs=[replace(r, name=EVIL) if r.name == "r1" else r for r in ladder.rungs])
    tree = build.build_report(CollectedLadder(ladder, found, record=made.HISTORY))
    shown = page(tree, pages.draw(tree))
    assert "<script" not in shown
    assert EVIL in Page(shown).text
    assert all(link.startswith("#") for link in Page(shown).links)
    assert EVIL in screen(tree, width=300)


def test_the_page_has_every_section(full, full_page):
    shown = Page((full_page / "report.html").read_text(encoding="utf-8"))
    text = shown.text
    # Where a page is narrow, each number stands beside the name of its column.
    assert {"at the target", "in time there", "trend", "observed", "leverage", "rope", "weights"} <= set(shown.names)
    assert len(list(full_page.glob("*.png"))) == 4
    for words in (
        "Does it hold at scale?", "An arm is promoted if", "Written before any of its runs had finished", "lack of fit",
        "leverage", "bootstrap", "seed noise", "Pairing", "Predictions", "Instabilities and faults", "climber, cpu",
        "4c1d6a0b4c1d", "python -m trainer ladder run", "78 finished", "crosses 1×", "observed",
    ):  # fmt: skip
        assert words in text, words
    for arm in made.ARMS:
        verdict = final(full, arm)
        assert verdict is not None
        assert verdict["why"] in text


def test_pictures_are_png_and_svg_of_the_page_s_colours(gaps, tmp_path):
    tree, drawn = gaps, report.write(gaps, tmp_path)
    assert [picture.name for picture in drawn] == ["multiplier", "loss", "prediction", "cost"]
    ids: list[str] = []
    for picture in drawn:
        assert (tmp_path / f"{picture.name}.png").read_bytes().startswith(PNG)
        root = ElementTree.fromstring(picture.svg.replace("xlink:href", "href"))
        ids += [element.attrib["id"] for element in root.iter() if "id" in element.attrib]
        assert "var(--ink)" in picture.svg
        assert not re.search(r"(?i)(fill|stroke): #(?!0{6}|f{6})[0-9a-f]{6}", picture.svg), "a colour of no name"
    assert len(ids) == len(set(ids))
    shown = (tmp_path / "report.html").read_text(encoding="utf-8")
    used = set(re.findall(r"var\((--\w+)\)", shown))
    assert used <= set(re.findall(r"(--\w[\w-]*):", shown))
    assert json.loads((tmp_path / "report.json").read_text()) == tree


def test_of_very_many_arms_pictures_show_those_that_promise_most_and_say_so(single, full, monkeypatch):
    monkeypatch.setattr(pages, "MOST_DRAWN", 2)
    shown = pages._of_some_arms(full)
    worth = {one["arm"]: one["multiplier"]["value"] for one in full["verdicts"]}
    best = sorted(worth, key=worth.__getitem__)[-2:]
    assert {arm["name"] for arm in shown["arms"]} == set(best) == shown["lines"].keys()
    assert {run["arm"] for run in shown["runs"]} == {BASELINE, *best} and len(full["arms"]) == 4
    assert all("Of 4 arms, the 2 that promise most" in picture.caption for picture in pages.draw(single))


def test_a_picture_without_data_is_removed(tmp_path, single):
    (tmp_path / "cost.png").write_bytes(PNG)
    report.write(single, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "report.html", "report.json"]


def test_the_terminal_shows_verdicts_reasons_and_missing_runs(gaps, full):
    text = " ".join(screen(full).split())
    assert "✓ promote" in text
    assert "By" not in text
    assert "rope: promote. At the target it is worth at least" in text
    assert "predicted for target" in text
    assert "missing: r2 qk-norm seed 0: it ran out of disk" in screen(gaps)


def test_what_is_not_known_of_the_fit_is_left_out_of_sentences(full):
    unknown = dict.fromkeys(("lack_of_fit_p", "unequal_noise_p", "seed_sd"))
    tree = full | {"fit": full["fit"] | unknown}
    line = next(line for line in screen(tree).splitlines() if line.startswith("baseline: E "))
    assert line.split("), ")[-1].startswith("α ") and "?" not in line
    assert "p = ?" not in Page(page(tree)).text
    assert "lack of fit p = " in screen(full) and "p = ?" not in Page(page(full)).text


# W&B


def send(mode: str, tree: dict[str, Any], written: Path, out: Path) -> list[str]:
    """Show this report, with one picture, and return the problems."""
    config = parse({"budget": {"steps": 60}, "wandb": {"mode": mode, "group": "a group"}})
    ladder = made.ladder_of(CLEAR, list(made.ARMS), runs=[PlannedRun(BASELINE, "r0", 0, config, 1000, 6000)])
    shutil.copy(written / "loss.png", out)
    problems: list[str] = []
    summary_run.send(ladder, tree, [pages.Picture("loss", "Loss", "", PNG, "<svg/>")], out, problems.append)
    return problems


def test_offline_the_ladder_has_a_run_of_its_own_in_the_group_of_its_runs(full, full_page, tmp_path):
    assert send("offline", full, full_page, tmp_path) == []
    (folder,) = (tmp_path / "wandb").glob("offline-run-*")
    (log,) = folder.glob("run-*.wandb")
    content = log.read_bytes()
    for words in (b"ladder made-up", b"a group", b"rope/decision", b"verdicts", b"predictions"):
        assert words in content, words
    media = [
        path.relative_to(folder / "files" / "media").parts[0] for path in folder.rglob("media/*/*") if path.is_file()
    ]
    assert sorted(media) == ["images", *["table"] * 4]


def test_where_the_runs_are_not_in_wandb_neither_is_the_summary(full, full_page, tmp_path):
    assert send("disabled", full, full_page, tmp_path) == []
    assert not (tmp_path / "wandb").exists()


def test_when_wandb_fails_the_report_stands_and_says_so(full, full_page, tmp_path, monkeypatch):
    monkeypatch.setattr(summary_run, "TIMEOUT_SECONDS", 0.01)
    (problem,) = send("offline", full, full_page, tmp_path)
    assert "was not done after 0.01 s" in problem
