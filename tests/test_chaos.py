"""Campaigns: planning, running, and that no result is lost and nothing is left behind."""

import itertools
import json
import os
import signal
import subprocess
import sys
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from tests.support import ROOT, SMOKE, start, trainer, wait_until
from trainer import cli, tomlfile
from trainer import config as configs
from trainer.chaos import plan as campaigns
from trainer.chaos import results, run, schedule
from trainer.chaos.plan import Campaign, Case
from trainer.chaos.results import Answer, Report, Result
from trainer.config import Config
from trainer.errors import ConfigError, RunDirectoryError, TopropeError
from trainer.faults import checker, plan
from trainer.faults.checker import Reference
from trainer.faults.fault import KINDS, NODES
from trainer.launch import namespaces
from trainer.launch import transport as transports

SETTINGS = """
[set]
budget.steps = 24
checkpoint.every_steps = 6
eval.every_steps = 12
eval.max_tokens = 1024
elastic.startup_timeout_seconds = 60.0
"""
KILL = """
[[runs]]
name = "kill"

[[runs.faults]]
kind = "sigkill"
rank = 1
at_step = 9
"""


def write(directory: Path, text: str, config: Path = SMOKE) -> Path:
    path = directory / "campaign.toml"
    path.write_text(f"config = {json.dumps(str(config))}\n{text}", encoding="utf-8")
    return path


def problems(path: Path, **more: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        campaigns.load(path, **more)
    return str(caught.value)


def check_refused(path: Path, *hints: str) -> None:
    message = problems(path)
    for hint in hints:
        assert hint in message, (hint, message)


def faulty(faults: str) -> str:
    """A campaign with one case, whose job has two nodes."""
    return "nodes = 2\n" + SETTINGS + f'[[runs]]\nname = "one"\nfaults = [{faults}]\n'


def small(**changes: Any) -> Config:
    tree = {"budget": {"steps": 200}, "checkpoint": {"every_steps": 10}, "eval": {"every_steps": 20}}
    return configs.parse(tree | changes)


def drawn(seed: int, mix: str | dict[str, float] = "process", **more: Any) -> list[dict[str, Any]]:
    chosen = {"faults": 1000, "mean_steps": 7.0, "config": small(), "world_size": 3} | more
    return schedule.draw(schedule.weights(mix, 1), seed, **chosen)


# Storms


def test_the_same_seed_draws_the_same_schedule_and_another_seed_another():
    assert drawn(3, "llama3") == drawn(3, "llama3") != drawn(4, "llama3")
    assert len(drawn(0, faults=5)) == 5, "no more faults than asked for"


def test_faults_come_as_often_as_asked_and_with_exponential_gaps():
    config = small(budget={"steps": 30_000})
    schedule = drawn(0, {"slow_rank": 1.0}, faults=3_000, config=config)
    steps = [fault["at_step"] for fault in schedule]
    gaps = [later - earlier for earlier, later in itertools.pairwise(steps)]
    assert steps == sorted(steps) and len(steps) > 2_700
    assert sum(gaps) / len(gaps) == pytest.approx(7.0, rel=0.05)
    longer = sum(gap > 14 for gap in gaps) / len(gaps)
    assert longer == pytest.approx(2.718281828**-2, rel=0.1), "as many gaps beyond two means as an exponential has"


@pytest.mark.parametrize("mix", schedule.MIXES)
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_schedule_is_one_that_a_plan_accepts(mix, ranks):
    for seed in range(40):
        schedule = drawn(seed, mix, world_size=ranks)
        config = small(faults=schedule)
        assert [fault.kind.name for fault in plan.make(config, ranks)] == [fault["kind"] for fault in schedule]
        assert schedule, "a storm without faults tests nothing"


def test_the_causes_of_llama3_are_those_published_and_all_are_kinds_of_the_catalogue():
    counts = {cause.name: cause.count for cause in schedule.LLAMA3}
    assert sum(counts.values()) + 6 == 419, "all unexpected interruptions but silent data corruption"
    assert (counts["faulty GPU"], counts["GPU HBM3 memory"], counts["software bug"]) == (148, 72, 54)
    used = {kind for cause in schedule.LLAMA3 for kind in cause.kinds}
    assert used <= KINDS.keys() and not any(KINDS[kind].silent for kind in used)
    alone, together = schedule.weights("llama3", 1), schedule.weights("llama3", 2)
    assert sum(alone.values()) == pytest.approx(413) == pytest.approx(sum(together.values()))
    assert not any(NODES in KINDS[kind].needs for kind in alone) and "partition" in together


MODES = ("restart", "quorum")


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_has_a_moment_at_which_it_is_sure_to_come_by(kind):
    for mode in [mode for mode in MODES if mode not in KINDS[kind].not_in]:
        saves = {"every_steps": 6, **KINDS[kind].sets.get("checkpoint", {})}
        config = small(budget={"steps": 30}, checkpoint=saves, eval={"every_steps": 12}, elastic={"mode": mode})
        for number in range(3):
            fault = schedule.usual(KINDS[kind], config, 3, number)
            (planned,) = plan.make(configs.parse(config.model_dump() | {"faults": [fault]}), 3)
            assert planned.kind.name == kind


def test_a_sample_of_pairs_is_drawn_by_its_seed_and_each_pair_can_be_planned():
    kinds = [kind for kind in KINDS.values() if NODES not in kind.needs and "restart" not in kind.not_in]
    pairs = schedule.sample_pairs(kinds, 60, seed=1)
    assert pairs == schedule.sample_pairs(kinds, 60, seed=1) != schedule.sample_pairs(kinds, 60, seed=2)
    assert len({frozenset((first.name, second.name)) for first, second in pairs}) == 60
    config = small(budget={"steps": 30}, checkpoint={"every_steps": 6, "memory_every_steps": 1})
    for first, second in pairs:
        for ranks in (1, 2):
            if ranks > 1 or not (first.needs_peers or second.needs_peers):
                faults = schedule.pair(first, second, config, ranks)
                assert len(plan.make(configs.parse(config.model_dump() | {"faults": faults}), ranks)) == 2


# Shrinking


def table(number: int) -> dict[str, Any]:
    return {"kind": "sigkill", "at_step": number}


@pytest.mark.parametrize("culprits", [{3}, {0, 9}, {2, 3, 7}, set(range(10))], ids=str)
def test_a_failing_schedule_is_shrunk_to_the_faults_that_make_it_fail(culprits):
    tried: list[list[int]] = []

    def fails(faults: list[dict[str, Any]]) -> bool:
        tried.append([fault["at_step"] for fault in faults])
        return culprits <= set(tried[-1])

    found = schedule.shrink(fails, [table(number) for number in range(10)], most_trials=200)
    assert [fault["at_step"] for fault in found.faults] == sorted(culprits)
    assert found.smallest and found.trials == len(tried)
    assert [] not in tried


def test_shrinking_ends_after_so_many_trials_and_says_that_it_did():
    found = schedule.shrink(lambda faults: len(faults) >= 5, [table(number) for number in range(10)], most_trials=4)
    assert (found.trials, found.smallest) == (4, False) and len(found.faults) >= 5


# Campaign files


MISTAKEN_PLANS = """
    [[runs]]
    name = "one"
    faults = [{kind = "sigkil", at_step = 3}, {kind = "exit", at_step = 99}]
    [[runs]]
    name = "two"
    set.optim.learning_rate = 0.1
    faults = [{kind = "partition", at_step = 3}]
    [catalogue]
    kinds = ["no_spce"]
    [storm]
    mix = "llama4"
"""
MISTAKES_OF_ALL_SORTS = """
    [[runs]]
    name = "one"
    ranks = 9
    nodes = 2
    set.optim.learning_rate = 0.1
    faults = [{at_step = 3}, {kind = "exit", at_step = 0}, {kind = "exit", rank = 1.5, at_step = 3}, {kind = "exid"}]
    [[runs]]
    name = "two"
    rank = 3
    faults = [{kind = "exit", at_step = 3}]
    [[runs]]
    name = "three"
    set.optim.learning_rates = 0.1
    faults = [{kind = "exit", at_step = 0}]
    [catalogue]
    kinds = ["exit", "sigkil"]
    [storm]
    seeds = []
"""
MISTAKEN_FAULTS = """
    [[runs]]
    name = "alone"
    ranks = 1
    faults = [{kind = "stopped", at_step = 3}]
    [[runs]]
    name = "two"
    faults = [{kind = "node_leaves"}, {kind = "exit"}, {kind = "nan_loss", at_step = 3, value = "zero"}]
"""


@pytest.mark.parametrize(
    ("text", "hints"),
    [
        (SETTINGS + MISTAKEN_PLANS, [
            "one: faults[0].kind = 'sigkil'", "at_step = 99 is beyond", "two: faults[0] (partition) needs two nodes",
            "two: it has other weights than the reference run (optim.learning_rate", "Did you mean 'no_space'?",
            "storm.mix = 'llama4'",
        ]),
        ("repeat = 0\nrepeats = 2\n" + SETTINGS + MISTAKES_OF_ALL_SORTS, [
            "one: faults[0] has no kind", "one: faults[1].at_step", "one: faults[2].rank",
            "one: faults[3].kind = 'exid'", "one: data.micro_batches = 8 leaves 1 of 9 ranks",
            "one: 9 ranks cannot be spread", "one: it has other weights", "runs[1].rank is no setting",
            "three: optim.learning_rates", "three: faults[0].at_step", "Did you mean 'sigkill'?", "storm.seeds = []",
            "repeat = 0", "Did you mean repeat?",
        ]),
        (SETTINGS + MISTAKEN_FAULTS, [
            "faults stop the only rank", "faults[0] (node_leaves) does not say when",
            "faults[1] (exit) does not say when", "value = 'zero' is none of its values.\n  Give nan or inf.",
        ]),
    ],
    ids=["plans", "all sorts", "faults"],
)  # fmt: skip
def test_all_mistakes_of_a_campaign_are_reported_with_their_rules_before_anything_starts(tmp_path, text, hints):
    check_refused(write(tmp_path, text), *hints)


@pytest.mark.parametrize(
    ("faults", "hint"),
    [
        ('{kind = "node_killed", at_step = 3, node = 2}', "node = 2, but the job has nodes 0 to 1"),
        ('{kind = "node_killed", at_step = 3, rank = 1}', "rank = 1, but it does not hit a rank"),
        ('{kind = "partition", at_step = 3, rank = "all"}', "rank = 'all', but it does not hit a rank"),
        ('{kind = "skipped_collective", at_step = 3, rank = "all"}', "some rank must be left"),
        (", ".join('{kind = "node_leaves", at_step = 3}' for _ in range(2)), "take 2 nodes out for good"),
        ('{kind = "straggler", at_step = 3, duty = 4.0}', "duty = 4.0 is above 1"),
        ('{kind = "straggler", at_step = 3, duty = 0}', "duty = 0 makes no fault"),
        ('{kind = "clock_jump", at_step = 3, seconds = 0}', "seconds = 0 makes no fault"),
        ('{kind = "slow_rank", at_step = 20, steps = 6}', "steps = 6 from step 20 on is beyond the run's 24 steps"),
        ('{kind = "repeated_kill", at_step = 3, times = 23}', "a job may start again 22 times"),
    ],
)  # fmt: skip
def test_a_plan_that_cannot_be_carried_out_is_refused_and_not_bent(tmp_path, faults, hint):
    check_refused(write(tmp_path, faulty(faults)), hint)


@pytest.mark.parametrize(
    "faults",
    [
        '{kind = "node_killed", at_step = 3, node = 1}, {kind = "node_killed", at_step = 9, node = 0}',
        '{kind = "node_joins", at_step = 3}, {kind = "node_leaves", at_step = 9}, {kind = "node_leaves", at_step = 9}',
        '{kind = "clock_jump", at_step = 3, seconds = -60}, {kind = "slow_rank", at_step = 24, steps = 5}',
        '{kind = "slow_rank", at_step = 20, steps = 4}, {kind = "repeated_kill", at_step = 3, times = 24}',
    ],
)
def test_a_plan_at_the_edge_of_what_can_be_is_taken(tmp_path, faults):
    assert campaigns.load(write(tmp_path, faulty(faults))).cases


@pytest.mark.parametrize(
    ("mix", "hint"),
    [("{}", "has nothing to draw"), ("{exit = 0.0}", "has nothing to draw"),
     ("{exit = 1, sigkill = -1.5}", "storm.mix.sigkill = -1.5 is no weight"),
     ("{exit = inf}", "finite number")],
)  # fmt: skip
def test_a_mix_of_ones_own_must_have_weights(tmp_path, mix, hint):
    assert hint in problems(write(tmp_path, SETTINGS + f"[storm]\nmix = {mix}\n"))


def test_a_storm_takes_no_more_nodes_out_than_there_are():
    schedule = drawn(0, {"node_leaves": 1.0, "exit": 1.0})
    assert sum(fault["kind"] == "node_leaves" for fault in schedule) == 1
    assert plan.make(small(faults=schedule), 3, nodes=2)


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_a_number_that_is_not_finite_is_refused_where_it_stands(tmp_path, value):
    faults = f'{{kind = "slow_rank", at_step = 3, seconds = {value}}}, {{kind = "sigkill", at_seconds = {value}}}'
    message = problems(write(tmp_path, faulty(faults)))
    assert f"one: faults[0] (slow_rank): seconds = {value} is not finite" in message
    assert "one: faults[1].at_seconds" in message and "finite number" in message
    assert "--set" not in message


@pytest.mark.parametrize("value", [0.1, 1e22, float("inf"), 'ä "😀"', [1, {"a.b": True}]], ids=str)
def test_a_value_written_as_toml_is_the_same_when_it_is_read(value):
    assert tomllib.loads(f"value = {tomlfile.text(value)}")["value"] == value


def test_one_mistake_is_one_line_however_many_readings_of_it_fail(tmp_path):
    text = """
    [[runs]]
    name = "one"
    faults = [{kind = "exit", rank = 1.5, at_step = 3}]
    [catalogue]
    kinds = ["exit", 3]
    [storm]
    mix = 7
    """
    path = write(tmp_path, SETTINGS + text)
    with pytest.raises(ConfigError) as caught:
        campaigns.load(path)
    assert list(caught.value.problems) == [
        f"{path}: catalogue.kinds[1] = 3 does not fit.\n  Input should be a valid string.",
        f"{path}: storm.mix = 7 does not fit.\n  Input should be a valid string or a valid dictionary.",
        "one: faults[0].rank = 1.5 does not fit.\n  Input should be a valid integer or a valid string.",
    ]


def test_a_fault_of_a_node_names_the_node():
    faults = [{"kind": "node_killed", "at_step": 3, "node": node} for node in (0, -1)]
    assert [str(fault) for fault in plan.make(small(faults=[*faults, {"kind": "partition", "at_step": 4}]), 2)] == [
        "node_killed on node 0 at step 3", "node_killed on the last node at step 3", "partition at step 4",
    ]  # fmt: skip


def test_a_runs_config_is_not_taken_for_a_campaign():
    for path in (SMOKE, ROOT / "configs" / "gpt_tiny_storm.toml"):
        assert problems(path).startswith(f"{path} is a run's config, not a campaign.")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("", "has no runs"),
        (KILL + KILL, "2 runs are called 'kill'"),
        ("[catalogue]\n[set]\nbudgets.steps = 3", "budgets"),
        ("[[runs]\n", "not valid TOML"),
    ],
)
def test_a_campaign_that_makes_no_sense_is_refused(tmp_path, text, hint):
    assert hint in problems(write(tmp_path, text))


def test_a_config_that_has_faults_of_its_own_leaves_no_reference_run_to_compare_with(tmp_path):
    own = tmp_path / "faulty.toml"
    own.write_text(f'extends = {json.dumps(str(SMOKE))}\n[[faults]]\nkind = "exit"\nat_step = 3\n')
    assert "no reference run" in problems(write(tmp_path, KILL, own))


def test_a_missing_campaign_and_an_unknown_run_are_answered_with_the_nearest(tmp_path):
    path = write(tmp_path, SETTINGS + KILL)
    assert "Did you mean" in problems(tmp_path / "campain.toml")
    assert "Did you mean 'kill'?" in problems(path, only=["kil"])


def test_runs_are_repeated_and_chosen_by_name_and_planned_for_each_strategy(tmp_path):
    path = write(tmp_path, 'strategies = ["replicate", "fsdp"]\n' + SETTINGS + KILL + '[catalogue]\nkinds = ["exit"]')
    whole = campaigns.load(path, repeat=2)
    assert sorted({(case.name, case.strategy, case.repeat) for case in whole.cases}) == sorted(
        (name, strategy, number) for name in ("kill", "exit") for strategy in ("replicate", "fsdp") for number in (0, 1)
    )
    assert {case.name for case in campaigns.load(path, only=["exit"]).cases} == {"exit"}
    assert len({case.slug for case in whole.cases}) == 8
    assert all(case.config.parallel.strategy == case.strategy for case in whole.cases)


def test_runs_that_are_met_from_outside_last_longer_and_have_the_same_weights(tmp_path):
    text = SETTINGS + '[set_outside]\neval.every_steps = 1\n[catalogue]\nkinds = ["agent_killed", "exit", "partition"]'
    killed, left, parted = campaigns.load(write(tmp_path, text)).cases
    assert (killed.config.eval.every_steps, left.config.eval.every_steps) == (1, 12)
    assert configs.fingerprint(killed.config) == configs.fingerprint(left.config)
    assert (left.nodes, parted.nodes, parted.ranks) == (1, 2, 2)


def test_without_exact_sums_a_notice_says_that_equality_cannot_be_expected(tmp_path):
    inexact = campaigns.load(write(tmp_path, SETTINGS + "numerics.exact = false\n" + KILL))
    assert "numerics.exact = false" in (campaigns.check_exact(inexact) or "")
    assert campaigns.check_exact(campaigns.load(write(tmp_path, SETTINGS + KILL))) is None


@pytest.mark.parametrize("path", sorted((ROOT / "configs" / "chaos").glob("*.toml")), ids=lambda path: path.stem)
def test_the_campaigns_that_come_with_it_can_be_planned(path):
    planned = campaigns.load(path)
    assert planned.file.question and planned.cases
    kinds = {kind for case in planned.cases for kind in case.kinds}
    faults = sum(len(case.planned) for case in planned.cases)
    kills = sum(
        fault.times * (1 if fault.on_main else len(fault.victims(case.ranks)))
        for case in planned.cases
        for fault in case.planned
        if fault.kind.on_rank
    )
    assert {
        "smoke": 8 <= len(kinds) <= 12, "catalogue": kinds == KINDS.keys(), "storm-llama3": faults >= 100,
        "quorum": kinds == KINDS.keys(), "quorum_storm": kills >= 200,
        "links": {(*case.kinds, case.transport) for case in planned.cases} == LINKS_AND_TRANSPORTS,
    }.get(path.stem, True)  # fmt: skip


LINKS_AND_TRANSPORTS = set(itertools.product(("link_dies_of_two", "link_slow_of_two"), ("tcp", "mptcp")))


def test_a_case_has_the_campaigns_transport_or_its_own_and_what_it_must_notice_depends_on_it(tmp_path):
    text = 'nodes = 2\ntransport = "mptcp"\n' + SETTINGS
    for name, own in (("usual", ""), ("own", 'transport = "tcp"\n')):
        text += f'[[runs]]\nname = "{name}"\n{own}faults = [{{kind = "link_dies_of_two", at_step = 3}}]\n'
    usual, own = campaigns.load(write(tmp_path, text)).cases
    assert (usual.transport, own.transport) == ("mptcp", "tcp") and usual.slug != own.slug
    assert (usual.planned[0].kind.expected_incidents, own.planned[0].kind.expected_incidents) == (
        (),
        ("hung", "worker_lost"),
    )
    check_refused(write(tmp_path, 'transport = "mptcp"\n' + SETTINGS + KILL), "kill: transport", "Set nodes = 2")


@pytest.mark.parametrize("transport", ["tcp", "mptcp"])
def test_a_case_runs_over_its_transport_on_hosts_with_the_links_that_its_faults_need(monkeypatch, tmp_path, transport):
    asked: list[Any] = []

    class Hosts:
        def __init__(self, count: int, links: int) -> None:
            asked.append((count, links))

        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None: ...
        def allow_multipath(self) -> None:
            asked.append("multipath")

    class StartedError(Exception):
        pass

    def start(*_: Any, environment: dict[str, str], **more: Any) -> None:
        asked.append(environment[transports.TRANSPORT])
        raise StartedError

    monkeypatch.setattr(namespaces, "Hosts", Hosts)
    monkeypatch.setattr(run, "Cluster", start)
    planned = campaigns.load(ROOT / "configs" / "chaos" / "links.toml")
    case = next(case for case in planned.cases if case.transport == transport)
    with pytest.raises(StartedError):
        run.launch_until_done(planned, case, tmp_path, 0.0)
    assert asked == [(2, 2), *(["multipath"] if transport == "mptcp" else []), transport]


def test_a_failed_case_over_mptcp_is_replayed_over_mptcp(tmp_path):
    planned = campaigns.load(ROOT / "configs" / "chaos" / "links.toml")
    failed = [case.make_result("fail", "late") for case in planned.cases]
    (tmp_path / "replay.toml").write_text(run._replay(planned, failed))
    replayed = campaigns.load(tmp_path / "replay.toml").cases
    assert [case.transport for case in replayed] == [case.transport for case in planned.cases]


APART = """
ranks = 4
apart = true
[set]
islands.count = 4
islands.inner_steps = 4
parallel.island_ranks = 2
checkpoint.every_steps = 6
"""


def test_clusters_of_islands_that_live_apart_are_started_by_their_launcher_and_so_are_failed_cases_again(
    monkeypatch, tmp_path
):
    path = write(
        tmp_path,
        APART + KILL + '[[runs]]\nname = "one job"\napart = false\nfaults = [{kind = "sigterm", at_step = 9}]\n',
    )
    planned = campaigns.load(path)
    apart, one_job = planned.cases
    assert (apart.apart, one_job.apart) == (True, False)

    class StartedError(Exception):
        pass

    def start(*_: Any, ranks: int, of_cluster: int, **more: Any) -> None:
        raise StartedError(ranks, of_cluster)

    monkeypatch.setattr(run, "ApartCluster", start)
    with pytest.raises(StartedError, match=r"4, 2"):
        run.launch_until_done(planned, apart, tmp_path, 0.0)
    (tmp_path / "replay.toml").write_text(run._replay(planned, [apart.make_result("fail", "late")]))
    assert [(case.name, case.apart) for case in campaigns.load(tmp_path / "replay.toml").cases] == [("kill", True)]


def test_of_clusters_that_live_apart_each_is_judged_by_its_own_log_and_the_faults_that_hit_it(monkeypatch, tmp_path):
    faults = '[{kind = "sigkill", rank = 3, at_step = 2}, {kind = "sigkill", rank = "all", at_step = 5}]'
    (case,) = campaigns.load(write(tmp_path, APART + f'[[runs]]\nname = "two"\nfaults = {faults}\n')).cases
    found = run._evidences(case, tmp_path / "run", Reference("w", "s", {}, 24, 1.0, True), ([], [], []))
    assert [(one.run, [fault.index for fault in one.planned]) for one in found] == [
        (tmp_path / "run", [1]),
        (tmp_path / "run" / "islands" / "cluster-1", [0, 1]),
    ]
    usual: tuple[checker.Answers, checker.Answers] = ("pass", checker.NOT_ASKED)
    given: dict[str, tuple[checker.Answers, checker.Answers]] = {
        checker.FIRED: ("pass", "unknown"), checker.KEPT: ("pass", "fail"), checker.TIME: ("unknown", "pass"),
    }  # fmt: skip
    answers = [[Answer(name, given.get(name, usual)[place]) for name in checker.INVARIANTS] for place in (0, 1)]
    monkeypatch.setattr(checker, "check", lambda evidence: answers[found.index(evidence)])
    worst = {answer.invariant: answer.answer for answer in checker.check_clusters(found)}
    assert worst == dict.fromkeys(checker.INVARIANTS, "pass") | {checker.FIRED: "unknown", checker.TIME: "unknown"}


def test_clusters_live_apart_on_one_node_with_faults_that_their_ranks_pass(tmp_path):
    check_refused(write(tmp_path, "apart = true\n" + SETTINGS + KILL), "kill: apart = true, and islands.count = 0")
    check_refused(write(tmp_path, "nodes = 2\n" + APART + KILL), "starts clusters that live apart on one")
    late = '[[runs]]\nfaults = [{kind = "sigkill", rank = 2, phase = "in_eval", at_step = 12}]\n'
    check_refused(write(tmp_path, APART + late), "rank = 2, but in_eval is passed by the first cluster alone")
    outside = '[[runs]]\nfaults = [{kind = "sigkill", rank = 2, at_seconds = 3}]\n'
    (case, *_) = campaigns.load(write(tmp_path, APART + outside + KILL)).cases
    assert case.not_applicable.startswith("sigkill comes from outside")


def test_where_clusters_live_apart_a_rank_that_stays_stopped_is_lost_and_each_phase_is_one_that_its_victims_pass(
    tmp_path,
):
    text = APART + '[phases]\n[[runs]]\nname = "stop"\nfaults = [{kind = "stopped", rank = 1, at_step = 9}]\n'
    stop, *phases = campaigns.load(write(tmp_path, text)).cases
    assert stop.planned[0].kind.expected_incidents == ("worker_lost",)
    victims = {
        fault.phase: {rank for other in case.planned if other.phase == fault.phase for rank in other.victims(4)}
        for case in phases
        for fault in case.planned
    }
    assert victims["in_send"] == {0, 1, 2, 3}
    assert victims["in_eval"] == {0, 1}, "the first cluster alone evaluates"


# Results


def result(outcome: results.Outcome = "pass", **changes: Any) -> Result:
    made = Result("kill", ["sigkill"], [{"kind": "sigkill"}], 2, 1, "replicate", None, 0, outcome=outcome, why="")
    return replace(made, **changes)


def report(*found: Result, interrupted: bool = False) -> Report:
    reference = {"weights_sha256": "w", "state_sha256": "s", "steps": 24, "seconds": 4.0, "exact": True}
    return Report("c", "q", "smoke.toml", "m", 1.0, 2.0, reference, list(found), interrupted)


def test_a_report_is_the_same_after_a_trip_through_its_file(tmp_path):
    written = report(result(answers=[Answer("exit status", "fail", "left with 3")], seconds=1.5), interrupted=True)
    results.write(tmp_path / "report.json", written)
    assert results.read(tmp_path / "report.json") == written
    assert results.read(tmp_path / "none.json") is None
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(RunDirectoryError):
        results.read(tmp_path / "report.json")


def test_results_of_an_older_version_are_read_under_their_present_names_and_not_run_again(
    planned, fake_cases, tmp_path
):
    fake_cases(lambda case: case.make_result("pass", "", run=str(tmp_path / "cases" / case.slug / "run")))
    out = tmp_path / "out"
    whole = run.run(planned, out)
    for new, old in (("reference", "calm"), ("cases", "cells")):
        (out / old).mkdir()
        text = (out / "report.json").read_text().replace(f'"{new}":', f'"{old}":').replace(f"/{new}/", f"/{old}/")
        (out / "report.json").write_text(text)
    ran = fake_cases(lambda case: case.make_result("fail", ""))
    assert run.run(planned, out).results == whole.results and ran == []
    assert (out / "reference").is_dir() and (out / "cases").is_dir() and not (out / "cells").exists()


def test_only_a_campaign_whose_cases_all_pass_or_are_skipped_passes():
    assert report(result("pass"), result("skipped")).passed
    assert not any(report(result(), result(bad)).passed for bad in ("unknown", "undetected", "fail"))
    assert not report(result(), interrupted=True).passed


def test_a_run_is_worth_its_worst_answer():
    given = [Answer("a", "unknown", "1"), Answer("b", "undetected", "2"), Answer("c", "fail", "3"), Answer("d", "pass")]
    assert results.outcome(given) == ("fail", "c: 3")
    assert results.outcome(given[:2]) == ("undetected", "b: 2")
    assert results.outcome(given[:1]) == ("unknown", "a: 1")
    assert results.outcome(given[3:]) == ("pass", "")


# Running, with jobs that only say how they ended


@pytest.fixture
def planned(tmp_path: Path) -> Campaign:
    text = SETTINGS + KILL + '[catalogue]\nkinds = ["sigterm", "agent_killed", "slow_link"]\n'
    return campaigns.load(write(tmp_path, text))


def case_of(planned: Campaign, name: str) -> Case:
    return next(case for case in planned.cases if case.name == name)


def fake_launches(monkeypatch: pytest.MonkeyPatch, statuses: Sequence[int | None]) -> list[list[str]]:
    left, given = list(statuses), []

    def launch(_campaign: Campaign, overrides: Sequence[str], *_: Any) -> Any:
        given.append(list(overrides))
        return run.Launch(1.0, 2.0, left.pop(0), "", [], [])

    monkeypatch.setattr(run, "_launch", launch)
    return given


@pytest.mark.parametrize(
    ("name", "statuses", "starts"),
    [
        ("sigterm", [75, 0], 2),
        ("sigterm", [75, 75, 75, 75, 75, 75], 4),
        ("sigterm", [1, 0], 1),
        ("kill", [75, 0], 1),
        ("agent_killed", [137, 0], 2),
        ("agent_killed", [None, 0], 1),
    ],
    ids=str,
)
def test_the_same_command_is_given_again_only_where_a_fault_explains_the_status(
    planned, monkeypatch, tmp_path, name, statuses, starts
):
    given = fake_launches(monkeypatch, statuses)
    launches = run.launch_until_done(planned, case_of(planned, name), tmp_path, 0.0)
    assert [launch.status for launch in launches] == statuses[:starts]
    assert len({tuple(overrides) for overrides in given}) == 1, "the identical command"


def test_a_case_that_this_machine_cannot_make_is_skipped_with_the_reason(planned, monkeypatch, tmp_path):
    monkeypatch.setattr(namespaces, "probe", lambda: "network namespaces need root")
    reference = Reference("w", "s", {}, 24, 1.0, True)
    skipped = run.run_case(planned, case_of(planned, "slow_link"), reference, tmp_path)
    assert skipped.outcome == "skipped" and "need" in skipped.why and skipped.run == ""
    monkeypatch.setattr(namespaces, "probe", lambda: None)
    monkeypatch.setattr(namespaces, "shaping", lambda: None)
    monkeypatch.setattr(transports, "missing", lambda: "the kernel has no MPTCP: not supported")
    links = campaigns.load(ROOT / "configs" / "chaos" / "links.toml")
    over_mptcp = next(case for case in links.cases if case.transport == "mptcp")
    skipped = run.run_case(links, over_mptcp, reference, tmp_path)
    assert (skipped.outcome, skipped.why) == ("skipped", "transport: the kernel has no MPTCP: not supported")


Act = Callable[[Case], Result]


@pytest.fixture
def fake_cases(monkeypatch: pytest.MonkeyPatch) -> Callable[[Act], list[str]]:
    """Cases whose results a test makes up; returns the names of those that were run."""

    def use(act: Act) -> list[str]:
        ran: list[str] = []

        def run_case(_campaign: Campaign, case: Case, _reference: Reference, _out: Path) -> Result:
            ran.append(case.name)
            return act(case)

        def reference(_campaign: Campaign, _out: Path, _report: Report) -> Reference:
            return Reference("w", "s", {}, 24, 1.0, True)

        monkeypatch.setattr(run, "run_case", run_case)
        monkeypatch.setattr(run, "reference_of", reference)
        return ran

    return use


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_interrupted_campaign_keeps_what_it_has_and_resumes_with_the_rest(planned, fake_cases, tmp_path, number):
    out, before = tmp_path / "out", signal.signal(signal.SIGHUP, lambda *_: None)

    def interrupted(case: Case) -> Result:
        if case.name == "sigterm":
            os.kill(os.getpid(), number)
        return case.make_result("pass", "")

    fake_cases(interrupted)
    try:
        first = run.run(planned, out)
    finally:
        signal.signal(signal.SIGHUP, before)
    assert first.interrupted and [found.name for found in first.results] == ["kill"]
    stored = results.read(out / "report.json")
    assert stored == first and "<html" in (out / "report.html").read_text()
    ran = fake_cases(lambda case: case.make_result("pass", ""))
    second = run.run(planned, out)
    assert ran == ["sigterm", "agent_killed", "slow_link"]
    assert second.passed and [found.name for found in second.results] == ["kill", *ran]
    assert fake_cases(lambda case: case.make_result("fail", "")) == [] and run.run(planned, out).passed


@pytest.mark.parametrize(
    ("old", "new", "again"),
    [
        ("startup_timeout_seconds = 60.0", "startup_timeout_seconds = 50.0", ["kill", "agent_killed"]),
        ("eval.every_steps = 1\n", "eval.every_steps = 2\n", ["agent_killed"]),
        ("timeout_seconds = 200.0", "timeout_seconds = 100.0", ["kill", "agent_killed"]),
        ("at_step = 9", "at_step = 10", ["kill"]),
        ('name = "kill"', 'name = "killed"', ["killed"]),
        ('["agent_killed"]', "[]", []),
        ("", "", []),
    ],
)  # fmt: skip
def test_results_of_a_file_that_was_changed_do_not_stand_beside_new_ones(fake_cases, tmp_path, old, new, again):
    text = "timeout_seconds = 200.0\n" + SETTINGS + "[set_outside]\neval.every_steps = 1\n" + KILL
    text += '[catalogue]\nkinds = ["agent_killed"]\n'
    ran = fake_cases(lambda case: case.make_result("pass", ""))
    run.run(campaigns.load(write(tmp_path, text)), tmp_path / "out")
    ran.clear()
    changed = campaigns.load(write(tmp_path, text.replace(old, new)))
    stored = run.run(changed, tmp_path / "out").results
    assert ran == again
    assert sorted(found.name for found in stored) == sorted(case.name for case in changed.cases)


def test_cases_that_are_not_chosen_now_stay_in_the_report(planned, fake_cases, tmp_path):
    fake_cases(lambda case: case.make_result("pass", ""))
    run.run(planned, tmp_path / "out")
    ran = fake_cases(lambda case: case.make_result("fail", ""))
    chosen = campaigns.load(planned.path, only=["kill"], repeat=2)
    stored = run.run(chosen, tmp_path / "out").results
    assert ran == ["kill"] and len(stored) == 5


def test_a_campaign_that_is_to_outlive_its_terminal_does(planned, fake_cases, tmp_path):
    def hung_up(case: Case) -> Result:
        os.kill(os.getpid(), signal.SIGHUP)
        return case.make_result("pass", "")

    fake_cases(hung_up)
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert run.run(planned, tmp_path / "out").passed
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_report_of_another_config_is_not_resumed(planned, fake_cases, tmp_path):
    out = tmp_path / "out"
    fake_cases(lambda case: case.make_result("pass", ""))
    run.run(planned, out)
    other = campaigns.load(write(tmp_path, SETTINGS.replace("24", "18") + KILL))
    with pytest.raises(RunDirectoryError):
        run.run(other, out)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(RunDirectoryError):
        run.run(planned, tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["notes.txt"]


FOUR = """
[[runs]]
name = 'four "exits"'
strategy = "fsdp"
set.elastic.step_timeout_seconds = 9.0
faults = [
    {kind = "exit", at_step = 3}, {kind = "flip_weights", rank = 1, at_step = 5}, {kind = "exit", at_step = 7},
    {kind = "agent_killed", at_step = 9},
]
"""


def breaks_at_7(case: Case) -> Result:
    """A bug that the fault at step 7 brings to light; without that fault, the case fails in another way."""
    broken = checker.EQUAL if any(fault.at_step == 7 for fault in case.planned) else checker.CLEAN
    return case.make_result("fail", "it broke", answers=[Answer(broken, "fail")])


def test_a_failing_schedule_is_shrunk_to_the_same_failure_and_kept_as_a_campaign_that_runs(fake_cases, tmp_path):
    path = write(tmp_path, SETTINGS + "[set_outside]\neval.every_steps = 1\n" + FOUR)
    (case,) = campaigns.load(path).cases
    fake_cases(breaks_at_7)
    (found,) = run.run(campaigns.load(path), tmp_path / "out", shrink=True).results
    assert "1 of 4 faults are enough" in found.why and len(found.faults) == 4
    (kept,) = (tmp_path / "out" / "shrunk").glob("*.toml")
    (again,) = campaigns.load(kept).cases
    assert [(fault.at_step, fault.ranks) for fault in again.planned] == [(7, case.planned[2].ranks)]
    assert (again.name, again.ranks, again.nodes, again.strategy) == ('four "exits"', 2, 1, "fsdp")
    assert again.config.model_copy(update={"faults": ()}) == case.config.model_copy(update={"faults": ()})


def test_a_failure_that_is_on_record_already_is_shrunk_once(fake_cases, tmp_path):
    path, out = write(tmp_path, SETTINGS + FOUR), tmp_path / "out"
    ran = fake_cases(breaks_at_7)
    run.run(campaigns.load(path), out)
    assert len(ran) == 1
    (found,) = run.run(campaigns.load(path), out, shrink=True).results
    assert "1 of 4 faults are enough" in found.why and len(ran) > 1
    trials = len(ran)
    assert run.run(campaigns.load(path), out, shrink=True).results == [found] and len(ran) == trials


def test_a_failed_case_is_replayed_by_the_same_plan_as_often_as_it_is_written_and_read(fake_cases, tmp_path):
    path = write(tmp_path, SETTINGS + "[set_outside]\neval.every_steps = 1\n" + FOUR + KILL)
    loaded = campaigns.load(path, repeat=2)
    fake_cases(lambda case: case.make_result("fail" if case.name != "kill" else "pass", "two\nlines"))
    report = run.run(loaded, tmp_path / "out")
    for _ in range(2):
        path = run.keep_replay(loaded, report, tmp_path / "out")
        assert path is not None and path == tmp_path / "out" / "replay.toml"
        (case,) = campaigns.load(path).cases
        assert case.planned == loaded.cases[0].planned and case.config.elastic == loaded.cases[0].config.elastic
        loaded, report = campaigns.load(path), replace(report, results=[case.make_result("fail", "")])
    assert run.keep_replay(loaded, replace(report, results=[]), tmp_path / "out") is None
    assert not (tmp_path / "out" / "replay.toml").exists()


def test_the_command_says_how_to_resume_and_how_to_repeat_a_failure(fake_cases, monkeypatch, capsys, tmp_path):
    path, out = write(tmp_path, SETTINGS + KILL + '[catalogue]\nkinds = ["sigterm"]'), tmp_path / "out"

    def interrupted(case: Case) -> Result:
        if case.name == "sigterm":
            os.kill(os.getpid(), signal.SIGINT)
        return case.make_result("fail", "it broke")

    fake_cases(interrupted)
    monkeypatch.setattr(sys, "argv", ["trainer", "chaos", str(path), "--out", str(out)])
    with pytest.raises(SystemExit) as left:
        cli.main()
    printed = capsys.readouterr().out
    assert left.value.code == run.EXIT_INTERRUPTED
    assert f"the same command with --out {out}" in printed
    assert f"trainer chaos {out / 'replay.toml'}" in printed and "[[runs]]" not in printed


@pytest.mark.parametrize(
    ("out", "hint"), [("/proc/x", "cannot be written"), ("file", "is a file"), ("file/x", "Not a directory")]
)
def test_a_place_where_no_results_can_go_is_refused(planned, fake_cases, tmp_path, out, hint):
    fake_cases(lambda case: case.make_result("pass", ""))
    (tmp_path / "file").touch()
    with pytest.raises(RunDirectoryError, match=hint):
        run.run(planned, tmp_path / out)


def test_a_reference_run_that_fails_ends_the_campaign_with_its_last_output(planned, monkeypatch, tmp_path):
    launched = run.Launch(1.0, 2.0, 1, "one\nthe disk is full", [], [])
    monkeypatch.setattr(run, "_launch", lambda *_, **__: launched)
    with pytest.raises(TopropeError, match="the disk is full"):
        run.run(planned, tmp_path / "out")


# The command, with real jobs


def jobs_under(directory: Path) -> list[str]:
    """Command lines of living processes that name a directory."""
    listed = subprocess.run(["ps", "-axo", "args="], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if str(directory) in line]


@pytest.mark.slow
@pytest.mark.timeout(400)  # the machine may be shared
def test_the_smoke_campaign_is_interrupted_and_resumed_and_every_case_passes(tmp_path):
    path, out = ROOT / "configs" / "chaos" / "smoke.toml", tmp_path / "out"
    command = [sys.executable, "-m", "trainer", "chaos", str(path), "--out", str(out)]
    process = start(command, tmp_path / "screen.txt")
    try:
        second = wait_until(lambda: list(out.glob("cases/a-rank-hangs*/run/events/attempt-0000*")), seconds=150)
        assert second, (tmp_path / "screen.txt").read_text()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == run.EXIT_INTERRUPTED, (tmp_path / "screen.txt").read_text()
    finally:
        process.kill()
    assert jobs_under(out) == []
    partial = results.read(out / "report.json")
    assert partial is not None and partial.interrupted
    assert [(found.name, found.outcome, found.why) for found in partial.results] == [("processes die", "pass", "")]
    assert "interrupted" in (tmp_path / "screen.txt").read_text()

    done = CliRunner().invoke(cli.app, ["chaos", str(path), "--out", str(out), "--json"])
    assert done.exit_code == 0, done.output
    whole = results.from_json(json.loads(done.stdout))
    assert whole == results.read(out / "report.json") and whole.passed and not whole.interrupted
    assert whole.results[0] == partial.results[0], "what was done is not done again"
    assert [len(found.launches) for found in whole.results] == [1, 1, 1, 2, 2]
    measured = [fault for found in whole.results for fault in found.measured]
    assert [fault["kind"] for fault in measured if fault["attributed_correctly"] is not True] == ["spike"]
    assert {answer.answer for found in whole.results for answer in found.answers} <= {"pass", checker.NOT_ASKED}
    assert "a rank hangs, a save is torn" in (out / "report.html").read_text()
    assert jobs_under(out) == []


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_a_fault_that_never_fires_is_unknown_and_the_command_leaves_with_1(tmp_path):
    never = '[[runs]]\nname = "never"\n[[runs.faults]]\nkind = "exit"\nphase = "startup"\nattempt = 5\n'
    path = write(tmp_path, SETTINGS + never)
    done = CliRunner().invoke(cli.app, ["chaos", str(path), "--out", str(tmp_path / "out")])
    assert done.exit_code == 1, done.output
    stored = results.read(tmp_path / "out" / "report.json")
    assert stored is not None
    (found,) = stored.results
    assert (found.outcome, found.why.partition(":")[0]) == ("unknown", checker.FIRED)


def test_a_wrong_campaign_leaves_with_2_and_starts_nothing(tmp_path):
    path = write(tmp_path, "rank = 2\n" + KILL)
    done = trainer("chaos", path, "--out", tmp_path / "out", check=False)
    assert done.returncode == 2 and "Did you mean ranks?" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()
