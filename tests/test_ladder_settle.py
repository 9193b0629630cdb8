"""Promises about runs that are added to a ladder until its verdicts are settled."""

import dataclasses
import json
import math
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from tests import ladders
from tests.test_ladder_file import ARM, HEAD, RUNGS, SIZES, TARGET_TABLE, load
from trainer import cli
from trainer.errors import EXIT_FINISHED, UsageError
from trainer.ladder import preregistration, run, settle
from trainer.ladder.plan.ladder import Ladder, PlannedRun
from trainer.ladder.plan.schema import AddedRuns
from trainer.ladder.run import LadderStatus
from trainer.ladder.slots import Slots
from trainer.ladder.speed import UNKNOWN
from trainer.ladder.stats.records import BASELINE, RunResult

FOURTH = '[[rungs]]\nname = "xl"\nwidth = 40\nn_layers = 1\n'
LOOKS = '[criterion]\nlooks = "any"\n'
PARTS = (HEAD, SIZES, RUNGS, FOURTH, TARGET_TABLE, ARM)
GAINS = {"no qk-norm": math.log(1.3)}


def results(ladder: Ladder, sd: float = 0.004) -> list[RunResult]:
    """Made-up results of a ladder's runs: the arm is worth 1.3× at every size."""
    law = ladders.power_law(at=ladder.rungs[0].flops)
    return [
        RunResult(
            it.arm, it.rung, it.seed, it.flops, it.parameters, it.tokens,
            law(it.flops * math.exp(GAINS.get(it.arm, 0.0))) + sd * _noise(it), float(it.tokens),
        )
        for it in ladder.runs
    ]  # fmt: skip


def _noise(planned: PlannedRun) -> float:
    return float(np.random.Generator(np.random.Philox(zlib.crc32(planned.name.encode()))).standard_normal())


def seconds(runs: Sequence[PlannedRun]) -> float:
    return 3600 * sum(planned.flops for planned in runs) / 1e9


@pytest.fixture
def made_up(monkeypatch) -> Callable[[Ladder, Path], LadderStatus]:
    """In place of processes: runs finish at once, with made-up results."""

    def finish(ladder: Ladder, out: Path, **_: object) -> LadderStatus:
        preregistration.write(ladder, out)
        return LadderStatus([], {}, Slots(1), UNKNOWN)

    monkeypatch.setattr(run, "run", finish)
    monkeypatch.setattr(settle, "read_results", lambda ladder, out: results(ladder))
    monkeypatch.setattr(settle, "_seconds", lambda runs, status: seconds(runs))
    return finish


def keys(ladder: Ladder) -> set[str]:
    return {planned.key for planned in ladder.runs}


def test_added_runs_are_pairs_and_change_no_other_run(home: Path):
    ladder = load(home, *PARTS, LOOKS)
    choice = settle.choose(ladder, results(ladder), math.inf, seconds)
    assert isinstance(choice, settle.Choice) and 0.1 <= choice.probability <= 1
    assert choice.added.arms == ["no qk-norm"]
    before, after = keys(ladder), keys(choice.ladder)
    assert before < after
    new = [planned for planned in choice.ladder.runs if planned.key not in before]
    places = [{(it.rung, it.seed) for it in new if it.arm == arm} for arm in (BASELINE, "no qk-norm")]
    assert places[0] == places[1] and len(new) == 2 * len(places[0])
    assert choice.hours == pytest.approx(seconds(new) / 3600)
    assert choice.ladder.settings == ladder.settings, "the file was not edited"


def test_a_rung_that_is_added_is_larger_than_the_ladders_and_no_larger_than_the_target(home: Path):
    ladder = load(home, *PARTS, LOOKS)
    wider, added = settle._widened(
        ladder, "no qk-norm", settle.Remedy("rung", 3, ladder.target_flops, None, 0.5, 1.0)
    )  # fmt: skip
    assert list(added.seeds) == ["added 1"] and added.seeds["added 1"] == [0, 1, 2]
    rung = wider.rungs[-1]
    assert rung.name == "added 1" and ladder.rungs[-1].flops < rung.flops <= ladder.target_flops
    assert {planned.arm for planned in wider.runs if planned.rung == "added 1"} == {BASELINE, "no qk-norm"}


def test_a_second_arm_uses_the_seeds_that_the_baseline_has_by_then(home: Path):
    other = '[[arms]]\nname = "other"\nset = { model.init_draw = 7 }\n'
    ladder = load(home, *PARTS, other, LOOKS)
    one = settle.load.extended(ladder, [AddedRuns(arms=["no qk-norm"], seeds={"s": [2, 3]})])
    assert settle._further_seeds(one, "other", "s", 3) == [2, 3, 4]
    assert settle._further_seeds(one, "no qk-norm", "s", 1) == [4]


def test_runs_are_added_openly_until_all_is_settled_or_the_hours_are_used(home: Path, made_up):
    ladder, out, told = load(home, *PARTS, LOOKS), home / "ladders" / "settled", []
    made_up(ladder, out)
    assert "additions" in json.loads((out / "ladder.json").read_text())
    assert settle.settle(ladder, out, 50.0, tell=told.append).exit_status == EXIT_FINISHED
    record = preregistration.read(out)
    assert record is not None and record.additions
    assert [one.look for one in record.additions] == list(range(1, len(record.additions) + 1))
    assert sum(one.hours for one in record.additions) <= 50.0
    assert len(told) == len(record.additions) + 1 and ("settled" in told[-1] or "Open: no qk-norm" in told[-1])
    again = preregistration.with_additions(ladder, out)
    assert keys(again) == set(record.runs) > keys(ladder)
    assert preregistration.compare(again, out).lines == []
    # The same command continues with the hours that are left.
    settle.settle(again, out, 50.0, tell=told.append)
    then = preregistration.read(out)
    assert then is not None and then.additions == record.additions


def test_no_more_looks_are_taken_than_the_criterion_was_written_for(home: Path, made_up, monkeypatch):
    monkeypatch.setattr(settle, "read_results", lambda ladder, out: results(ladder, sd=0.006))
    ladder, out, told = load(home, *PARTS, "[criterion]\nlooks = 2\n"), home / "ladders" / "two", []
    settle.settle(ladder, out, 1e6, tell=told.append)
    record = preregistration.read(out)
    assert record is not None and len(record.additions) == 1
    assert "look 2 of 2" in told[-1]


def test_a_criterion_for_one_look_is_refused_before_any_work(home: Path):
    ladder = load(home, *PARTS)
    with pytest.raises(UsageError, match="looks = 1"):
        settle.check(ladder, 1.0)
    with pytest.raises(UsageError, match="no number of hours"):
        settle.check(dataclasses.replace(ladder), math.nan)
    done = CliRunner().invoke(cli.app, ["ladder", "run", str(ladder.path), "--settle", "1", "--out", str(home / "no")])
    assert isinstance(done.exception, UsageError) and not (home / "no").exists()
