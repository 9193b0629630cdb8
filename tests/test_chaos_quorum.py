"""Campaigns in quorum mode: what applies there, how it is planned, and real workers that die while the others go on."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import SMOKE
from trainer.chaos import plan as campaigns
from trainer.chaos import results, run
from trainer.chaos.plan import Campaign
from trainer.errors import ConfigError
from trainer.faults.fault import IN_ISLANDS, KINDS, OF_MAIN_MEMBER
from trainer.phases import Phase

SETTINGS = """
ranks = 3
[set]
elastic.mode = "quorum"
budget.steps = 24
checkpoint.every_steps = 6
eval.every_steps = 1
eval.max_tokens = 16384
elastic.step_timeout_seconds = 20.0
elastic.startup_timeout_seconds = 60.0
"""


ONE = "[[runs]]\nfaults = [{kind"


def load(directory: Path, text: str, settings: str = SETTINGS) -> Campaign:
    path = directory / "campaign.toml"
    path.write_text(f"config = {json.dumps(str(SMOKE))}\n{settings}\n{text}", encoding="utf-8")
    return campaigns.load(path)


def test_what_cannot_be_made_in_a_mode_does_not_apply_and_says_why(tmp_path: Path):
    quorum = {case.name: case.not_applicable for case in load(tmp_path, "[catalogue]").cases}
    assert quorum.keys() == KINDS.keys()
    assert "the others hold the state in memory" in quorum["flipped_shard"]
    assert "needs two nodes" in quorum["partition"]
    assert "the arbiter is in its place" in quorum["store_killed"]
    restart = {case.name: case.not_applicable for case in load(tmp_path, "[catalogue]", "ranks = 2").cases}
    assert {name for name in KINDS if KINDS[name].group == "quorum"} == {name for name in restart if restart[name]}
    assert "only `trainer launch` has spares" in restart["spare_dies"]
    assert not any(quorum[name] and restart[name] for name in KINDS)


def test_a_run_may_be_in_the_other_mode_than_its_campaign(tmp_path: Path):
    text = '[[runs]]\nname = "{}"\nset.elastic.mode = "{}"\nfaults = [{{kind = "sigkill", at_step = 3}}]\n'
    cases = load(tmp_path, text.format("one", "restart") + text.format("other", "quorum"), "ranks = 2").cases
    assert [case.mode for case in cases] == ["restart", "quorum"]
    assert [case.planned[0].mode for case in cases] == ["restart", "quorum"]


@pytest.mark.parametrize(
    ("settings", "text", "reason"),
    [
        ("ranks = 2\nspares = 1", "[catalogue]\nkinds = ['exit']", "spares = 1 without a quorum"),
        (f"nodes = 3\n{SETTINGS}", "[catalogue]\nkinds = ['exit']", "starts the workers of a quorum on one"),
        (SETTINGS, "[storm]\nmix = {sigkill = 1, store_killed = 1}", "storm.mix.store_killed"),
        ("ranks = 3", "[storm]\nmix = {two_deaths = 1}", "storm.mix.two_deaths"),
        (SETTINGS, f"{ONE} = 'exit', rank = 1, phase = 'in_save_shard', at_step = 6}}]", "the main member alone"),
        (SETTINGS, f"{ONE} = 'node_leaves', at_step = 3}}]", "needs two nodes"),
    ],
)  # fmt: skip
def test_a_campaign_that_cannot_be_made_is_refused_with_the_reason(
    tmp_path: Path, settings: str, text: str, reason: str
):
    with pytest.raises(ConfigError, match=reason):
        load(tmp_path, text, settings)


def test_a_kill_is_planned_at_every_phase_on_every_rank(tmp_path: Path):
    cases = {case.name: case.planned for case in load(tmp_path, "[phases]").cases}
    phases = [phase for phase in Phase if phase not in IN_ISLANDS]  # the config has none
    assert cases.keys() == {f"sigkill at {phase}" for phase in phases}
    for phase in phases:
        hit = [fault for fault in cases[f"sigkill at {phase}"] if fault.phase == phase]
        if phase in OF_MAIN_MEMBER:
            assert all(fault.on_main for fault in hit)
        elif phase != Phase.IN_TRANSFER:
            assert [fault.ranks for fault in hit] == [(0,), (1,), (2,)]
    receiver, giver = (fault for fault in cases["sigkill at in_transfer"] if fault.phase == "in_transfer")
    assert (receiver.on_main, giver.on_main) == (False, True)


def test_a_storm_can_be_planned_for_every_seed(tmp_path: Path):
    mix = ", ".join(f"{name} = 1" for name, kind in KINDS.items() if kind.group in ("process", "quorum"))
    cases = load(tmp_path, f"[storm]\nmix = {{{mix}}}\nseeds = {[*range(20)]}\nmean_steps = 1.0").cases
    assert {fault.kind.group for case in cases for fault in case.planned} == {"process", "quorum"}


KILLS = """
[[runs]]
name = "kills"
faults = [
    {kind = "sigkill", rank = 1, at_step = 2, phase = "in_reduce"},
    {kind = "death_in_second_pass", rank = 2, at_step = 1},
    {kind = "sigkill", rank = "writer", at_step = 6, phase = "before_commit"},
    {kind = "sigkill", rank = 1, at_step = 8, phase = "in_eval"},
]
[[runs]]
name = "joins"
spares = 1
faults = [
    {kind = "death_in_hand_over", rank = 1, at_step = 2},
    {kind = "giver_dies", rank = 2, at_step = 7},
    {kind = "arbiter_killed", at_step = 4},
    {kind = "spare_dies", at_step = 1},
]
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds the workers in /proc")
def test_workers_die_at_delicate_moments_and_the_run_ends_as_if_none_had(tmp_path: Path):
    report = run.run(load(tmp_path, KILLS), tmp_path / "out")
    for result in report.results:
        held = ("pass", "not applicable")
        not_passed = {answer.invariant: answer.why for answer in result.answers if answer.answer not in held}
        assert (result.outcome, not_passed) == ("pass", {}), result.name
    stored: Any = results.read(tmp_path / "out" / "report.json")
    assert [launch["status"] for result in stored.results for launch in result.launches] == [0, 0], "started once each"
    lost = [incident for result in stored.results for incident in result.timeline["incidents"]]
    assert {incident["kind"] for incident in lost} == {"worker_lost"}
