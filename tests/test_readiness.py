"""Promises about `ready`: evidence is found or said to be missing, and what is open stops the launch."""

import importlib.metadata
import json
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from tests import support
from tests.support import write_corpus
from trainer import cli, readiness
from trainer.errors import ConfigError
from trainer.log import rundir

SMOKE = Path("configs/smoke.toml").resolve()
ACCEPTED = [{"line": topic, "title": topic, "decision": "accept", "why": "a test"}
            for topic in ("loss", "chaos", "drill", "goodput", "data", "operators", "shapes", "time")]  # fmt: skip


def ladder(directory: Path, decision: str, changes: dict[str, Any] | None = None, **more: Any) -> str:
    """A ladder's report with one arm."""
    directory.mkdir(parents=True)
    tree = {
        "name": "tested",
        "arms": [{"name": "gelu", "changes": changes or {"model.mlp": "gelu"}, "combines": []}],
        "verdicts": [{"arm": "gelu", "decision": decision, "why": "Measured."}],
        "course": None,
        **more,
    }
    (directory / "report.json").write_text(json.dumps(tree))
    return str(directory)


def campaign(directory: Path, *outcomes: str, commit: str | None) -> str:
    (directory / "reference" / "run").mkdir(parents=True)
    results = [{"outcome": outcome} for outcome in outcomes]
    (directory / "report.json").write_text(json.dumps({"campaign": "tested", "results": results}))
    from trainer.config import parse

    rundir.record(directory / "reference" / "run", parse({"budget": {"steps": 60}}), {"data_sha256": "d" * 64})
    path = directory / "reference" / "run" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"git_commit": commit}))
    return str(directory)


def check(tmp_path: Path, config: str = "", issues: list[dict[str, Any]] = ACCEPTED, **plan: Any) -> dict[str, Any]:
    from trainer import tomlfile

    config_path, plan_path = tmp_path / "config.toml", tmp_path / "plan.toml"
    config_path.write_text(f'extends = "{SMOKE}"\n{config}')
    lines = [f'baseline = "{SMOKE}"', *tomlfile.lines({**plan, "issue": issues})]
    plan_path.write_text("\n".join(lines))
    return readiness.check(config_path, plan_path, tmp_path / "out", lambda text: None)


def line(tree: dict[str, Any], topic: str) -> dict[str, Any]:
    (found,) = [line for line in tree["lines"] if line["topic"] == topic]
    return found


def test_a_config_like_the_baseline_with_every_open_line_decided_may_start(tmp_path: Path):
    tree = check(tmp_path)
    assert tree["go"]
    assert line(tree, "changes")["answer"] == "pass"
    assert "go." in tree["summary"]


@pytest.mark.parametrize(
    ("decision", "answer", "go"),
    [("promote", "pass", True), ("reject", "fail", False), ("inconclusive", "unknown", False)],
)  # fmt: skip
def test_a_changed_setting_has_the_answer_of_the_ladder_arm_that_is_this_change(
    tmp_path: Path, decision: str, answer: str, go: bool
):
    tree = check(tmp_path, '[model]\nmlp = "gelu"\n', ladders=[ladder(tmp_path / "ladder", decision)])
    found = line(tree, "changes")
    assert (found["answer"], tree["go"]) == (answer, go)
    assert decision in found["evidence"] and found["link"].endswith("report.json")


def test_a_ladder_of_another_commit_is_shown_as_stale(tmp_path: Path):
    own = rundir.git_commit(Path(readiness.__file__).parents[1])
    for commit, stale in (("a" * 40, True), (own, False)):
        report = ladder(tmp_path / str(stale), "promote", course={"verdicts": [], "commits": [commit]})
        found = line(check(tmp_path, '[model]\nmlp = "gelu"\n', ladders=[report]), "changes")
        assert found["answer"] == "pass"
        assert ("Stale: its runs are of commit aaaaaaaaaa" in found["evidence"]) == stale


@pytest.mark.parametrize("changes", [{"model.mlp": "swiglu"}, {"model.mlp": "gelu", "model.norm": "layernorm"}])
def test_an_arm_with_another_change_or_more_changes_covers_nothing(tmp_path: Path, changes: dict[str, Any]):
    tree = check(tmp_path, '[model]\nmlp = "gelu"\n', ladders=[ladder(tmp_path / "ladder", "promote", changes)])
    assert "never derisked" in line(tree, "changes")["evidence"] and not tree["go"]


def test_a_decision_about_one_setting_lets_that_setting_pass_and_no_other(tmp_path: Path):
    decided = {"line": "model.mlp", "title": "gelu", "decision": "mitigate", "why": "watched by hand"}
    changed = '[model]\nmlp = "gelu"\nnorm = "layernorm"\n'
    tree = check(tmp_path, changed, [*ACCEPTED, decided])
    answers = {found["what"].split(":")[0]: found["decision"] for found in tree["lines"] if found["topic"] == "changes"}
    assert answers == {"model.mlp": "mitigate: watched by hand", "model.norm": ""} and not tree["go"]


@pytest.mark.parametrize(
    ("share", "model", "answer"), [(0.9, {}, "pass"), (0.4, {}, "fail"), (0.9, {"model.width": 48}, "unknown")]
)
def test_the_line_about_shapes_has_what_advise_found_for_this_config(
    tmp_path: Path, share: float, model: dict[str, Any], answer: str
):
    from trainer import config as configs

    ours = configs.load(SMOKE).model.model_dump(mode="json", by_alias=True)
    torch = importlib.metadata.version("torch")
    tree = {"model": configs.flatten(ours) | model, "precision": "fp32", "share_of_best": share,
            "mfu": {"value": 0.3}, "computes_with": {"torch": f"{torch} of commit 1", "device model": "a CPU"},
            "proposals": [{"what": "2 heads of 16 channels", "gain": 1.2}]}  # fmt: skip
    (tmp_path / "report.json").write_text(json.dumps(tree))
    found = line(check(tmp_path, advice=str(tmp_path)), "shapes")
    assert found["answer"] == answer
    assert f"{share:.0%}" in found["evidence"] and "2 heads of 16 channels" in found["evidence"]


def test_shapes_without_a_matrix_product_whose_best_is_known_are_unknown(tmp_path: Path):
    (tmp_path / "report.json").write_text(json.dumps({"share_of_best": None, "proposals": []}))
    found = line(check(tmp_path, advice=str(tmp_path)), "shapes")
    assert found["answer"] == "unknown" and "no matrix product with a known best" in found["evidence"]


@pytest.mark.parametrize("decision", ["", "wait"])
def test_an_issue_without_a_decision_or_that_waits_stops_the_launch(tmp_path: Path, decision: str):
    tree = check(tmp_path, issues=[*ACCEPTED, {"title": "a flaky switch", "decision": decision}])
    assert not tree["go"] and "a flaky switch" in tree["summary"]
    assert check(tmp_path, issues=[*ACCEPTED, {"title": "a flaky switch", "decision": "accept"}])["go"]


@pytest.mark.parametrize(
    ("outcomes", "own", "answer"),
    [
        (["pass", "skipped", "not applicable"], True, "pass"),
        (["pass", "fail"], True, "fail"),
        (["pass", "undetected"], True, "unknown"),
        (["pass", "unknown"], True, "unknown"),
        (["skipped"], True, "unknown"),
        (["pass"], False, "unknown"),
    ],
)
def test_a_campaign_counts_only_if_this_commit_ran_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, outcomes: list[str], own: bool, answer: str
):
    monkeypatch.setattr(rundir, "git_commit", lambda root: "a" * 40)
    folder = campaign(tmp_path / "chaos", *outcomes, commit=("a" if own else "0") * 40)
    assert line(check(tmp_path, campaigns=[folder]), "chaos")["answer"] == answer


def test_a_campaign_of_changed_files_is_no_evidence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(rundir, "git_commit", lambda root: "a" * 40 + "+")
    folder = campaign(tmp_path / "chaos", "pass", commit="a" * 40 + "+")
    assert line(check(tmp_path, campaigns=[folder]), "chaos")["answer"] == "unknown"


def test_checkpoints_that_are_kept_for_good_need_disk_too(tmp_path: Path):
    every = "[checkpoint]\nkeep_every_steps = 2\n"
    assert "33 checkpoints" in line(check(tmp_path, every), "disk")["evidence"]


def test_a_report_that_is_missing_or_too_old_is_no_evidence(tmp_path: Path):
    changed = '[model]\nmlp = "gelu"\n'
    assert "does not exist" in line(check(tmp_path, changed, ladders=["none"]), "changes")["evidence"]
    folder = ladder(tmp_path / "ladder", "promote")
    os.utime(Path(folder, "report.json"), (0, 0))
    assert "days old" in line(check(tmp_path, changed, ladders=[folder]), "changes")["evidence"]


@pytest.mark.parametrize(("at_most", "answer"), [(4.0, "pass"), (3.05, "fail")])
def test_the_predicted_loss_is_held_against_its_upper_end(tmp_path: Path, at_most: float, answer: str):
    curve = {"flops": [1e6, 1e18], "value": [3.0, 3.0], "low": [2.9, 2.9], "high": [3.1, 3.1]}
    folder = ladder(tmp_path / "ladder", "promote", curve=curve)
    assert line(check(tmp_path, loss={"ladder": folder, "at_most": at_most}), "loss")["answer"] == answer


def test_a_curve_that_does_not_reach_the_run_predicts_nothing(tmp_path: Path):
    curve = {"flops": [1.0, 2.0], "value": [3.0, 3.0], "low": [2.9, 2.9], "high": [3.1, 3.1]}
    folder = ladder(tmp_path / "ladder", "promote", curve=curve)
    assert line(check(tmp_path, loss={"ladder": folder, "at_most": 9.0}), "loss")["answer"] == "unknown"


@pytest.mark.parametrize(("needs", "topic", "answer"), [
    ({"disk_gigabytes": 1e9}, "disk", "fail"), ({"disk_gigabytes": 1e-6}, "disk", "pass"), ({}, "disk", "pass"),
    ({"hours": 1.0, "tokens_per_second": 1e-3}, "time", "fail"),
    ({"hours": 1.0, "tokens_per_second": 1e6}, "time", "pass"),
    ({"hours": 1.0}, "time", "unknown"),
])  # fmt: skip
def test_disk_and_time_are_held_against_what_is_there(tmp_path: Path, needs: dict[str, float], topic: str, answer: str):
    assert line(check(tmp_path, needs=needs), topic)["answer"] == answer


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({}, "pass"),
        ({"passed": False}, "fail"),
        ({"precision": "bf16"}, "unknown"),
        ({"model": {"model.width": 8}}, "unknown"),
    ],
)
def test_a_burn_in_counts_for_the_config_that_it_was_made_with(tmp_path: Path, changes: dict[str, Any], answer: str):
    from trainer import config as configs

    model = configs.flatten(configs.load(SMOKE).model.model_dump(mode="json", by_alias=True))
    device = {
        "device": "cpu", "operators": [{"calls": 3}], "failures": [], "differing": [], "repeats": 2,
        "computes_with": {"device model": "a CPU", "torch": f"{importlib.metadata.version('torch')} of commit 0"},
    }  # fmt: skip
    tree = {"passed": True, "precision": "fp32", "model": model, "devices": [device]} | changes
    (tmp_path / "burnin").mkdir()
    (tmp_path / "burnin" / "report.json").write_text(json.dumps(tree))
    assert line(check(tmp_path, burnin=str(tmp_path / "burnin")), "operators")["answer"] == answer
    assert line(check(tmp_path), "operators")["answer"] == "unknown"


@pytest.mark.parametrize(
    ("config", "needs", "answer", "said"),
    [
        ('[data]\nsource = "{corpus}"\n', {}, "unknown", "nothing was compared"),
        ('[data]\nsource = "{corpus}"\ndecontaminate = "report"\n', {}, "pass", "0 of"),
        ('[data]\nsource = "{corpus}"\ndecontaminate = "report"\n', {"max_epochs": 0.1}, "fail", "epochs of"),
        (
            '[data]\nsource = "{corpus}"\ndecontaminate = "report"\n'
            '[eval]\nsets = ["like"]\nsources = {{ like = "{like}" }}\n',
            {}, "fail", "1 of 1 documents (100.00%)",
        ),
        (
            '[data]\nsource = "{corpus}"\ndecontaminate = "drop"\n'
            '[eval]\nsets = ["like"]\nsources = {{ like = "{like}" }}\n',
            {}, "pass", "1 of ",
        ),
    ],
)  # fmt: skip
def test_the_text_is_held_against_the_held_out_sets_and_its_epochs_are_counted(
    tmp_path: Path, config: str, needs: dict[str, float], answer: str, said: str
):
    corpus = write_corpus(tmp_path / "corpus")
    trained_on = (tmp_path / "corpus" / "39.txt").read_text()  # held out are those whose digest is small
    (tmp_path / "like.txt").write_text(trained_on.replace("document 39:", "once more, number 39 of them:"))
    text = config.format(corpus=corpus, like=tmp_path / "like.txt") + "[budget]\nsteps = 4\n"
    found = line(check(tmp_path, text, needs={"max_epochs": 4.0} | needs), "data")
    assert (found["answer"], said in found["evidence"]) == (answer, True), found


def test_an_issue_about_no_line_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="is no line"):
        check(tmp_path, issues=[{"line": "model.mlpp", "title": "a typing error", "decision": "accept"}])


@pytest.mark.slow
@pytest.mark.timeout(240)  # a drill is two runs and a kill
def test_the_command_drills_now_and_its_exit_status_is_the_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def start(command: Sequence[str], timeout: float, **_: Any) -> "subprocess.CompletedProcess[str]":
        return support.run([*command], check=False, timeout=timeout)

    # Forked from a process that has torch imported, as nothing here depends on that import.
    forking = SimpleNamespace(run=start, TimeoutExpired=subprocess.TimeoutExpired)
    monkeypatch.setattr(readiness, "subprocess", forking)
    plan, drill = (
        tmp_path / "plan.toml",
        '[drill]\nat_step = 11\nset = { "budget.steps" = 20, "checkpoint.every_steps" = 5 }',
    )
    issues = "".join(f'[[issue]]\nline = "{topic}"\ntitle = "{topic}"\ndecision = "accept"\n'
                     for topic in ("loss", "chaos", "goodput", "data", "operators", "shapes", "time"))  # fmt: skip
    ready = ["ready", str(SMOKE), "--plan", str(plan), "--out", str(tmp_path / "out")]
    plan.write_text(f'baseline = "{SMOKE}"\n{drill}\n{issues}')
    done = CliRunner().invoke(cli.app, [*ready, "--json"])
    tree = json.loads(done.stdout)
    assert "weights_sha256 equal" in line(tree, "drill")["evidence"]
    assert done.exit_code == 0 and tree["go"]
    assert "Go: " in (tmp_path / "out" / readiness.PAGE).read_text()
    undrilled = '[[issue]]\nline = "drill"\ntitle = "made above"\ndecision = "accept"\n'
    for open_issue, status in (("", 0), ('[[issue]]\ntitle = "left open"\n', 1)):
        plan.write_text(f'baseline = "{SMOKE}"\n{issues}{undrilled}{open_issue}')
        assert CliRunner().invoke(cli.app, ready).exit_code == status


@pytest.mark.parametrize(
    ("drill", "told"),
    [
        ('at_step = 10\nset = { "budget.steps" = 20, "checkpoint.every_steps" = 5 }', "from 11 .* to 20"),
        ("at_step = 500", "the run is over"),
        ('at_step = 9\nset = { "budget.steps" = 10, "checkpoint.every_steps" = 5 }', "no two checkpoints"),
        ('at_step = 9\nset = { "checkpoint.every_steps" = 0 }', "no two checkpoints"),
    ],
)
def test_a_drill_that_may_find_no_checkpoint_is_refused_before_any_work(tmp_path: Path, drill: str, told: str):
    plan = tmp_path / "plan.toml"
    plan.write_text(f'baseline = "{SMOKE}"\n[drill]\n{drill}\n')
    with pytest.raises(ConfigError, match=told):
        readiness.check(Path(SMOKE), plan, tmp_path / "out", log=print)
    assert not (tmp_path / "out").exists()
