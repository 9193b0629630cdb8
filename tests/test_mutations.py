"""A test of the checker: bugs that other trainers had are put back, and a campaign of faults must catch each."""

import dataclasses
from pathlib import Path

import pytest

from tests.mutants import CONTROL, MUTANTS, Mutant
from tests.support import ROOT, SMOKE
from trainer.chaos import plan, run
from trainer.chaos.results import Result
from trainer.faults.checker import DETECTED, FIRED, NOT_ASKED, RECOVERED

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CAMPAIGN = f"""
config = "{SMOKE}"
restarts = 0

[set]
budget.steps = 40
data.micro_batches = 4
model.n_layers = 1
checkpoint.every_steps = 6
eval.every_steps = 0
elastic.startup_timeout_seconds = 60.0
"""


def run_mutants(mutants: dict[str, Mutant], directory: Path) -> dict[str, Result]:
    """One campaign, one run for each mutant, with the faults that should bring it to light."""
    file = directory / "mutants.toml"
    runs = [
        f'[[runs]]\nname = "{name}"\nranks = {m.nodes}\nnodes = {m.nodes}\nset = {m.set}\n'
        f"faults = [{', '.join(m.faults)}]\n"
        for name, m in mutants.items()
    ]
    file.write_text(CAMPAIGN + "".join(runs))
    planned = plan.load(file)
    cases = [dataclasses.replace(case, worker=("tests.mutants", case.name)) for case in planned.cases]
    report = run.run(dataclasses.replace(planned, cases=cases), directory / "out")
    return {result.name: result for result in report.results}


def not_held(result: Result) -> set[str]:
    """Invariants that did not pass, without those that a slow machine may break."""
    given = {answer.invariant for answer in result.answers if answer.answer not in ("pass", NOT_ASKED)}
    return given - {DETECTED, RECOVERED}


def failed(result: Result) -> set[str]:
    return {answer.invariant for answer in result.answers if answer.answer == "fail"}


def test_every_bug_of_the_past_is_caught_by_what_it_breaks_and_nothing_else_is_caught(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setattr(run, "MORE_STARTS", 1)  # whoever cannot resume at once is caught
    results = run_mutants({"control": CONTROL} | MUTANTS, tmp_path)
    assert results.keys() == {"control"} | MUTANTS.keys()
    outcomes = {name: (result.outcome, result.why) for name, result in results.items()}
    assert not_held(results["control"]) == set(), outcomes
    assert [name for name in MUTANTS if FIRED in not_held(results[name])] == [], outcomes
    assert [name for name, mutant in MUTANTS.items() if mutant.breaks not in failed(results[name])] == [], outcomes
