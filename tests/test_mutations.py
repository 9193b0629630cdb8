"""The net is tried itself: bugs that other trainers had are put back, and a campaign of faults must catch each."""

import dataclasses
from pathlib import Path

import pytest

from tests.mutants import MUTANTS, Mutant
from tests.support import ROOT, SMOKE
from trainer.chaos import campaign, runner
from trainer.chaos.results import Result

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

CAMPAIGN = f"""
config = "{SMOKE}"
ranks = 2
restarts = 2
set = {{ budget.steps = 40, checkpoint.every_steps = 6, eval.every_steps = 0, elastic.startup_timeout_seconds = 60.0 }}
"""


def run_mutants(mutants: dict[str, Mutant], directory: Path) -> dict[str, Result]:
    """One campaign, one run for each mutant, with the faults that should bring it to light."""
    runs = "".join(
        f'[[runs]]\nname = "{name}"\nnodes = {mutant.nodes}\nset = {mutant.set}\nfaults = {mutant.faults}\n'
        for name, mutant in mutants.items()
    )
    file = directory / "mutants.toml"
    file.write_text(CAMPAIGN + runs)
    planned = campaign.load(file)
    cells = [dataclasses.replace(cell, worker=("tests.mutants", cell.name)) for cell in planned.cells]
    report = runner.run(dataclasses.replace(planned, cells=cells), directory / "out")
    return {result.name: result for result in report.results}


def caught_by(result: Result) -> list[str]:
    return [answer.invariant for answer in result.answers if answer.answer == "fail"]


def test_every_bug_of_the_past_is_caught(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    seen = run_mutants(MUTANTS, tmp_path)
    assert seen.keys() == MUTANTS.keys()
    escaped = {name: (result.outcome, result.why) for name, result in seen.items() if not caught_by(result)}
    assert not escaped
    for result in seen.values():
        print(f"{result.name}: {', '.join(caught_by(result))}")
