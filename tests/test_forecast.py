"""Promises about forecasts: closed forms where there are any, accounts that sum, and honest answers to bad input."""

import json
import math
import time
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.logs import Run, members_changed, saved
from tests.support import trainer as cli
from trainer.errors import ConfigError
from trainer.forecast import calibrate, scale
from trainer.forecast import run as runs
from trainer.forecast.failures import Strikes
from trainer.forecast.scenario import DAY, Scenario, daly_goodput, daly_interval, load, parse, write_seconds
from trainer.forecast.simulator import PARTS, replay, simulate

CONFIGS = Path("configs/forecast")
QUORUM = {
    "kind": "quorum",
    "regroup_seconds": 4.0,
    "join_seconds": 0.0,
    "save_stall_seconds": 2.0,
    "restart_seconds": 60.0,
}
ISLANDS = {"kind": "islands", "clusters": 8, "inner_steps": 60, "exchange_seconds": 5.0, "late": "drop",
           "save_stall_seconds": 2.0, "restart_seconds": 120.0}  # fmt: skip
PEERS = {
    "kind": "peer_memory",
    "copy_every_steps": 1,
    "copy_cost": 0.02,
    "save_stall_seconds": 2.0,
    "restart_seconds": 60.0,
}


def tree(**changes: Any) -> dict[str, Any]:
    """A scenario with one cause that strikes the job 10 times a day."""
    return {
        "days": 30.0, "step_seconds": 5.0, "cluster": {"devices": 4096},
        "failure": [{"name": "node", "per_day": 10.0, "detect_seconds": 20.0}],
        "policy": {"kind": "restart", "save_stall_seconds": 10.0, "restart_seconds": 200.0},
        **changes,
    }  # fmt: skip


def scenario(**changes: Any) -> Scenario:
    return parse(tree(**changes), Path("scenario.toml"))


@pytest.mark.parametrize("per_day", [2.0, 8.0, 24.0, 96.0, 288.0])
@pytest.mark.parametrize("stall", [1.0, 20.0, 60.0])
@pytest.mark.parametrize("recovery", [60.0, 600.0])
def test_goodput_with_one_exponential_cause_is_dalys_within_a_point(per_day: float, stall: float, recovery: float):
    policy = {"kind": "restart", "save_stall_seconds": stall, "restart_seconds": recovery - 20}
    days = 2000 / per_day
    made = scenario(days=days, step_seconds=0.1, policy=policy,
                    failure=[{"name": "node", "per_day": per_day, "detect_seconds": 20.0}])  # fmt: skip
    found = np.mean([simulate(made, seed).goodput for seed in range(2)])
    mttf = DAY / per_day
    assert found == pytest.approx(daly_goodput(daly_interval(stall, mttf), stall, recovery, mttf), abs=0.01)


def test_a_schedule_of_strikes_costs_what_lies_between_the_saves_and_them():
    made = scenario(days=1000 / DAY, failure=[{"name": "kill", "per_day": 1.0, "detect_seconds": 10.0}],
                    policy={"kind": "restart", "checkpoint_every_seconds": 100.0, "save_stall_seconds": 0.0,
                            "restart_seconds": 50.0})  # fmt: skip
    found = replay(made, [(600.0, "kill"), (270.0, "kill"), (610.0, "kill")])
    # The first start takes 50 s. The second strike finds 270 s of work since the restart at 330, so 70 beyond the save
    # at 200 + 200; the third finds the job down, and its restart begins anew.
    assert found.failures == {"kill": 3}
    assert found.parts["lost_steps"] == pytest.approx(20 + 70)
    assert found.parts["down"] == pytest.approx(10 + 10 + 10)
    assert found.parts["startup"] == pytest.approx(50 + 50 + 50)
    assert math.fsum(found.parts.values()) == pytest.approx(1000)


def quorum(**policy: Any) -> Scenario:
    policy = {"kind": "quorum", "checkpoint_every_seconds": 100.0, "save_stall_seconds": 0.0, "restart_seconds": 50.0,
              "regroup_seconds": 2.0, "join_seconds": 3.0, **policy}  # fmt: skip
    return scenario(days=1000 / DAY, cluster={"devices": 4, "devices_per_node": 1}, policy=policy,
                    failure=[{"name": "kill", "per_day": 1.0, "detect_seconds": 1.0}])  # fmt: skip


def test_a_quorum_is_slower_until_the_worker_that_takes_the_place_has_started():
    found = replay(quorum(start_seconds=40.0), [(400.0, "kill")])
    assert found.parts["down"] == pytest.approx(1)
    assert found.parts["startup"] == pytest.approx(50 + 2 + 3)
    assert found.parts["lost_steps"] == 0
    # It is ready 41 s after the death, of which the others have waited 1 + 2; they compute with three of four.
    assert found.parts["reduced"] == pytest.approx((41 - 3) * 0.25)
    assert math.fsum(found.parts.values()) == pytest.approx(1000)


def test_two_deaths_make_a_quorum_as_slow_as_its_measured_speed_says():
    found = replay(quorum(start_seconds=40.0, speed_without_one=0.9), [(400.0, "kill"), (410.0, "kill")])
    one, two = (410 - 403) + (451 - 444), 441 - 413
    assert found.parts["reduced"] == pytest.approx(one * (1 - 0.9) + two * (1 - 0.9**2))


def test_a_quorum_whose_last_member_dies_restarts_from_storage():
    found = replay(quorum(start_seconds=40.0), [(seconds, "kill") for seconds in (370.0, 375.0, 380.0, 385.0)])
    assert found.parts["startup"] == pytest.approx(50 + 3 * 2 + 50)  # nobody is waited for any more
    assert found.parts["lost_steps"] == pytest.approx(20 + (375 - 373) * 0.75 + (380 - 378) * 0.5 + (385 - 383) * 0.25)


def test_a_job_on_one_node_without_spares_is_struck_by_every_failure():
    # Neither repair nor spares: what fails serves again at once, and nothing idle can be hit in its place.
    made = scenario(
        days=300.0, cluster={"devices": 8}, failure=[{"name": "node", "per_day": 24.0, "detect_seconds": 0.0}]
    )
    expected = daly_goodput(daly_interval(10.0, 3600.0), 10.0, 200.0, 3600.0)
    assert np.mean([simulate(made, seed).goodput for seed in range(3)]) == pytest.approx(expected, abs=0.01)


def test_failures_do_not_shorten_maintenance():
    made = scenario(maintenance={"every_days": 1.0, "hours": 6.0},
                    failure=[{"name": "node", "per_day": 100.0, "detect_seconds": 5.0}])  # fmt: skip
    found = simulate(made, 0)
    assert found.parts["preempted"] / found.wall_seconds == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("policy", [ISLANDS, None])
def test_work_lost_to_silent_corruption_is_charged_to_it(policy: dict[str, Any] | None):
    cause = [{"name": "flip", "per_day": 1.0, "detect_seconds": 0.0, "silent_hours": 1.0}]
    found = simulate(scenario(failure=cause, **({"policy": policy} if policy else {})), 0)
    assert found.parts["lost_steps"] > 0
    # Of islands the round that the end of the simulation cuts off is lost too, to no cause.
    assert found.lost_by_cause["flip"] >= 0.99 * found.parts["lost_steps"]


@pytest.mark.parametrize("per_day", [2.0, 8.0, 24.0])
def test_the_best_interval_that_is_found_is_dalys(per_day: float):
    made = scenario(days=1500 / per_day, failure=[{"name": "node", "per_day": per_day, "detect_seconds": 0.0}])
    found = runs.checkpoint_intervals(made)
    assert found["best_seconds"] == found["seconds"] == pytest.approx(daly_interval(10.0, DAY / per_day))


def test_a_small_loss_is_the_published_ratio_of_effective_time():
    # Kokolis et al. 2024: (1 - N r (u0 + dt/2)) / (1 + w/dt), for few failures.
    made = scenario(days=2000.0, failure=[{"name": "node", "per_day": 2.0, "detect_seconds": 0.0}],
                    policy={"kind": "restart", "checkpoint_every_seconds": 1200.0, "save_stall_seconds": 10.0,
                            "restart_seconds": 200.0})  # fmt: skip
    expected = (1 - 2 / DAY * (200 + 600)) / (1 + 10 / 1200)
    assert simulate(made, 0).goodput == pytest.approx(expected, abs=0.002)


@pytest.mark.parametrize("spares", [0, 2, 5])
def test_the_time_without_enough_nodes_is_that_of_a_queue_with_unlimited_repair(spares: int):
    # Nodes under repair are Poisson (M/G/infinity): their mean is the failure rate times the repair time.
    made = scenario(days=6000.0, cluster={"devices": 8000, "spare_nodes": spares},
                    failure=[{"name": "node", "per_day": 4.0, "detect_seconds": 0.0, "repair_hours": 12.0}],
                    policy={"kind": "restart", "save_stall_seconds": 0.0, "restart_seconds": 0.0})  # fmt: skip
    from scipy import stats  # not above: every worker of pytest imports this file, and that takes seconds

    found = simulate(made, 1)
    assert found.parts["waiting"] / found.wall_seconds == pytest.approx(stats.poisson.sf(spares, 2.0), abs=0.02)


@pytest.mark.parametrize(
    "policy", [QUORUM, ISLANDS, PEERS, {**ISLANDS, "late": "wait"}, {**ISLANDS, "quorum": True}, None]
)
@pytest.mark.parametrize("hard", [False, True])
def test_parts_are_never_negative_and_sum_to_the_wall_time(policy: dict[str, Any] | None, hard: bool):
    causes = [
        {
            "name": "node",
            "per_day": 40.0,
            "detect_seconds": 20.0,
            "repair_hours": 6.0,
            "shape": 0.7,
            "lemon_variance": 2.0,
        },
        {"name": "rack", "per_day": 1.0, "takes": "rack", "detect_seconds": 20.0, "repair_hours": 3.0},
        {"name": "job", "per_day": 1.0, "takes": "job", "detect_seconds": 60.0},
        {"name": "silent", "per_day": 0.2, "detect_seconds": 1.0, "silent_hours": 1.0},
    ]
    made = scenario(failure=causes, cluster={"devices": 2048, "spare_nodes": 4, "min_share": 0.9},
                    maintenance={"every_days": 3.0, "hours": 2.0}, days=20.0 if not hard else 2.0,
                    **({"policy": policy} if policy else {}))  # fmt: skip
    if hard:  # failures every few seconds
        made = made.model_copy(update={"failure": [made.failure[0].model_copy(update={"per_day": 20_000.0})]})
    found = simulate(made, 3)
    assert set(found.parts) == set(PARTS)
    assert min(found.parts.values()) >= -1e-6
    assert math.fsum(found.parts.values()) == pytest.approx(found.wall_seconds, rel=1e-9)
    assert 0 <= found.goodput <= 1


@pytest.mark.parametrize("policy", [QUORUM, ISLANDS, PEERS])
def test_the_same_seed_gives_the_same_run_and_another_seed_another(policy: dict[str, Any]):
    made = scenario(policy=policy)
    assert simulate(made, 0) == simulate(made, 0)
    assert simulate(made, 0) != simulate(made, 1)


@pytest.mark.parametrize(("shape", "variance"), [(1.0, 0.0), (0.6, 0.0), (1.0, 3.0), (1.5, 1.0)])
def test_first_failures_come_as_often_as_drawing_every_unit_would_give(shape: float, variance: float):
    cause = {"name": "node", "per_node_day": 0.02, "detect_seconds": 0.0, "shape": shape, "lemon_variance": variance,
             "repair_hours": 1e9}  # fmt: skip
    made = scenario(days=30.0, cluster={"devices": 160_000}, failure=[cause])
    strikes, times = Strikes(made, np.random.default_rng(0)), []
    while strikes:
        times.append(strikes.pop()[0].time)
    # Unit by unit: a gamma rate, then a Weibull time.
    random = np.random.default_rng(1)
    rates = random.gamma(1 / variance, variance, 20_000) if variance else np.ones(20_000)
    scale = DAY / 0.02 / math.gamma(1 + 1 / shape)
    direct = scale * (random.exponential(size=20_000) / rates) ** (1 / shape)
    direct = direct[direct < 30 * DAY]
    assert len(times) == pytest.approx(len(direct), rel=0.05)
    from scipy import stats

    same: Any = stats.ks_2samp(times, direct)
    assert same.pvalue > 0.001


def test_lemons_fail_again_more_often_than_nodes_that_are_all_alike():
    def repeats(variance: float) -> int:
        cause = {"name": "node", "per_node_day": 0.005, "detect_seconds": 0.0, "lemon_variance": variance}
        strikes = Strikes(scenario(days=60.0, failure=[cause]), np.random.default_rng(0))
        units = []
        while strikes:
            units.append(strikes.pop()[0].unit)
        return len(units) - len(set(units))

    assert repeats(4.0) > 2 * repeats(0.0)


def test_policies_rank_as_their_recovery_does():
    causes = [{"name": "node", "per_day": 100.0, "detect_seconds": 10.0}]
    found = {
        name: simulate(scenario(failure=causes, policy=policy), 0).goodput
        for name, policy in {"restart": tree()["policy"], "peers": PEERS, "quorum": QUORUM}.items()
    }
    assert found["restart"] < found["peers"] < found["quorum"]


def test_islands_that_may_miss_a_round_lose_less_than_those_that_all_wait():
    causes = [{"name": "node", "per_day": 60.0, "detect_seconds": 10.0}]
    wait, drop = (
        simulate(scenario(failure=causes, policy={**ISLANDS, "late": late}), 0).goodput for late in ("wait", "drop")
    )
    assert wait < drop


def test_silent_corruption_costs_the_work_since_before_it():
    quick = scenario(failure=[{"name": "flip", "per_day": 1.0, "detect_seconds": 0.0, "silent_hours": 0.1}], days=300.0)
    slow = scenario(failure=[{"name": "flip", "per_day": 1.0, "detect_seconds": 0.0, "silent_hours": 4.0}], days=300.0)
    assert simulate(quick, 0).parts["lost_steps"] < simulate(slow, 0).parts["lost_steps"] / 3


def test_a_restart_makes_no_progress_where_failures_come_faster_than_it_restarts():
    made = scenario(failure=[{"name": "node", "per_day": 20_000.0, "detect_seconds": 1.0}], days=0.1, replicates=2)
    assert simulate(made, 0).goodput == 0
    assert any("struck before they are done" in finding for finding in runs.forecast(made)["findings"])


@pytest.mark.parametrize(("devices", "days", "limit"), [(16_384, 54.0, 1.0), (10_000_000, 9.0, 6.0)])
def test_a_replicate_takes_seconds_at_any_number_of_devices(devices: int, days: float, limit: float):
    cause = {"name": "node", "per_node_day": 3.79e-3, "detect_seconds": 5.0, "repair_hours": 12.0}
    made = scenario(days=days, cluster={"devices": devices, "min_share": 0.9}, failure=[cause], policy=QUORUM)
    began = time.process_time()
    assert sum(simulate(made, 0).failures.values()) > 100
    assert time.process_time() - began < limit


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.toml")), ids=lambda path: path.stem)
def test_each_scenario_gives_a_page_and_holds_against_its_source_as_it_says(path: Path, tmp_path: Path):
    if "published" not in tomllib.loads(path.read_text()):
        file = scale.load(path)
        found = scale.scale(file.model_copy(update={"replicates": 2, "failures": 100, "devices": file.devices[::4]}))
    else:
        found = runs.forecast(load(path))
        assert found["published"]["source"]
        for check in found["published"]["checks"]:
            assert check["agrees"] or found["published"]["why"]
    from trainer.forecast import report

    report.write(found, tmp_path)
    assert "<svg" in (tmp_path / report.PAGE).read_text()
    assert json.loads((tmp_path / report.TREE).read_text())["question"] == found["question"]


def test_a_setting_that_the_source_leaves_open_widens_the_range():
    fixed = runs.forecast(scenario(replicates=8, days=60.0))
    varied = runs.forecast(scenario(replicates=8, days=60.0, vary={"policy.restart_seconds": [20.0, 2000.0]}))
    assert varied["range"]["high"] - varied["range"]["low"] > 3 * (fixed["range"]["high"] - fixed["range"]["low"])


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"failure": [{"name": "a", "per_day": -1.0, "detect_seconds": 0.0}]}, "greater than or equal to 0"),
        ({"failure": [{"name": "a", "per_day": 0.0, "detect_seconds": 0.0}]}, "all failure rates are 0"),
        ({"failure": [{"name": "a", "detect_seconds": 0.0}]}, "needs exactly one rate"),
        ({"policy": {"kind": "quorum", "save_stall_seconds": 1.0, "restart_seconds": 1.0}}, "regroup_seconds is"),
        ({"policy": {"kind": "magic"}}, "magic"),
        ({"cluster": {"devices": 8, "spare_nodes": 2}}, "spare_nodes = 2"),
        ({"cluster": {"devices": 8, "min_share": 0.0}}, "min_share"),
        ({"policy": {**ISLANDS, "clusters": 1000}}, "policy.clusters = 1000"),
        ({"vary": {"policy.restart_second": [1.0, 2.0]}}, "no such setting"),
        ({"vary": {"policy.restart_seconds": [2.0, 1.0]}}, "no range"),
    ],
)  # fmt: skip
def test_a_scenario_that_contradicts_itself_is_refused(changes: dict[str, Any], told: str):
    with pytest.raises(ConfigError, match=told.replace(".", r"\.")):
        scenario(**changes)


def test_all_problems_of_a_scenario_are_reported_at_once():
    with pytest.raises(ConfigError) as refused:
        scenario(cluster={"devices": 0}, failure=[{"name": "a", "per_day": -1.0, "detect_seconds": -1.0}])
    assert len(refused.value.problems) == 3


def test_a_save_that_takes_longer_than_its_interval_is_a_finding_and_runs_back_to_back():
    made = scenario(policy={"kind": "restart", "checkpoint_every_seconds": 10.0, "save_stall_seconds": 1.0,
                            "save_write_seconds": 300.0, "restart_seconds": 10.0})  # fmt: skip
    assert write_seconds(made) == 300
    assert "back to back" in runs.forecast(made)["findings"][0]


def test_storage_that_all_writers_share_makes_saves_and_restarts_slower():
    made = scenario(storage={"checkpoint_bytes": 1e12, "bytes_per_second": 1e9})
    assert write_seconds(made) == 1000
    assert simulate(made, 0).goodput < simulate(scenario(), 0).goodput


def test_calibration_measures_what_the_log_has_and_leaves_the_rest_unknown(run: Run):
    run.record()
    run.train(40)
    run.write(saved(40, 0.25))
    run.steps(41, 47)
    run.start(from_step=40, after=5.0)
    run.finish(41, 60)
    found = calibrate.calibrate([run.path])
    assert found["failures"] == 1
    assert found["step_seconds"] == 1.0
    assert found["save_stall_seconds"] == 0.25
    assert found["restart_seconds"] == pytest.approx(2.0)
    assert found["detect_seconds"] == pytest.approx(5.0, abs=0.01)
    text = calibrate.to_toml(found, [run.path])
    assert parse(tomllib.loads(text), Path("measured.toml")).step_seconds == 1.0


def test_calibration_measures_what_a_death_costs_a_quorum(run: Run):
    run.record()
    run.train(20)
    run.write(saved(10, 0.25))
    run.write(members_changed(20, {"0": "its connection closed"}, members=[0], joined=[], seconds=0.5), after=0.5)
    run.steps(21, 21, seconds=1.5)  # the interrupted step says nothing about the speed
    run.steps(22, 25, seconds=2.0)
    run.write(members_changed(25, {}, members=[0, 2], joined=[2], seconds=0.25), after=0.25)
    run.finish(26, 60)
    found = calibrate.calibrate([run.path])
    assert found["failures"] == 1 and found["detect_seconds"] is None
    assert (found["step_seconds"], found["speed_without_one"]) == (1.0, 0.5)
    assert (found["regroup_seconds"], found["join_seconds"]) == (0.5, 0.25)
    assert found["start_seconds"] == pytest.approx(0.5 + 1.5 + 4 * 2.0)
    text = calibrate.to_toml(found, [run.path]).replace("# detect_seconds = ?", "detect_seconds = 0.0")
    text = text.replace("# restart_seconds = ?", "restart_seconds = 5.0")
    assert parse(tomllib.loads(text), Path("measured.toml")).policy.kind == "quorum"


def test_the_death_of_all_members_is_a_failure_whose_wait_is_a_restart(run: Run):
    run.record()
    run.train(20)
    why = {"0": "its connection closed", "1": "its connection closed"}
    run.write(members_changed(20, why, members=[2, 3], joined=[2, 3], seconds=8.0), after=8.0)
    run.finish(21, 60)
    found = calibrate.calibrate([run.path])
    assert (found["failures"], found["restart_seconds"]) == (1, 8.0)
    assert found["detect_seconds"] is None and found["join_seconds"] is None


def test_a_calm_run_calibrates_no_failure_rate(run: Run):
    run.record()
    run.train(60)
    run.end("finished", 60)
    found = calibrate.calibrate([run.path])
    assert found["failures"] == 0 and found["detect_seconds"] is None and found["restart_seconds"] is None
    assert "# per_day = ?" in calibrate.to_toml(found, [run.path])


def test_the_commands_print_tables_or_one_json_object(tmp_path: Path):
    path = tmp_path / "scenario.toml"
    path.write_text(
        'days = 20.0\nstep_seconds = 5.0\nreplicates = 3\n[cluster]\ndevices = 64\n[[failure]]\nname = "node"\n'
        "per_day = 3.0\ndetect_seconds = 5.0\n[policy]\n"
        'kind = "restart"\nsave_stall_seconds = 1.0\nrestart_seconds = 30.0\n'
    )
    shown = cli("forecast", "run", str(path), "--out", str(tmp_path / "out"))
    assert shown.returncode == 0 and "goodput" in shown.stdout and (tmp_path / "out" / "forecast.png").stat().st_size
    assert json.loads(cli("forecast", "run", str(path), "--json").stdout)["goodput"]["value"] > 0.9
    refused = cli("forecast", "run", str(tmp_path / "none.toml"), check=False)
    assert refused.returncode == 2 and "does not exist" in refused.stderr


# --- the course of one simulated run ----------------------------------------------------------------------------------

SPARSE = [{"name": "node", "per_day": 6.0, "detect_seconds": 20.0, "repair_hours": 2.0},
          {"name": "switch", "per_day": 2.0, "detect_seconds": 60.0}]  # fmt: skip


@pytest.mark.parametrize("policy", [None, PEERS, QUORUM, ISLANDS])
def test_the_course_of_a_run_ends_with_the_work_that_survived(policy: dict[str, Any] | None):
    made = scenario(days=10.0, failure=SPARSE, **({"policy": policy} if policy else {}))
    found = simulate(made, 3, keep_course=True)
    assert found.course is not None
    drawn = found.course.timeline(made.step_seconds, found.incidents)
    assert drawn["steps"][-1][1] * made.step_seconds == pytest.approx(found.parts["productive"], abs=0.1)
    assert len(drawn["incidents"]) == len(found.incidents) > 20
    assert json.loads(json.dumps(drawn)) == drawn
    assert simulate(made, 3).parts == found.parts


def test_the_incidents_of_a_course_last_as_long_as_no_rank_trains_and_lose_the_steps_that_are_lost():
    made = scenario(days=20.0, failure=SPARSE)
    found = simulate(made, 1, keep_course=True)
    assert found.course is not None
    drawn = found.course.timeline(made.step_seconds, found.incidents)
    idle = math.fsum(found.parts[name] for name in ("down", "startup", "waiting"))
    assert math.fsum(incident["seconds"] for incident in drawn["incidents"]) == pytest.approx(idle)
    lost = sum(incident["lost_steps"] for incident in drawn["incidents"])
    assert lost == pytest.approx(found.parts["lost_steps"] / made.step_seconds, abs=0.5 * len(drawn["incidents"]))
    trained = math.fsum(a["ended"] - a["ready"] for a in drawn["attempts"] if a["ready"] is not None)
    assert trained + idle == pytest.approx(found.wall_seconds)
    assert drawn["attempts"][-1]["ended_as"] == "finished"


def test_a_course_of_more_incidents_than_a_picture_holds_ends_early_and_says_when():
    made = scenario(days=3.0, failure=[{"name": "node", "per_day": 500.0, "detect_seconds": 5.0}], policy=QUORUM,
                    replicates=2)  # fmt: skip
    drawn = runs.forecast(made)["timeline"]
    assert len(drawn["incidents"]) == 1000
    assert drawn["steps"][-1][0] <= drawn["attempts"][-1]["ended"] < made.days * DAY
    assert "its first" in drawn["title"] and "(seed 0)" in drawn["title"]


@pytest.mark.parametrize(("hours", "number"), [(2.0, 6), (100.0, 5)])
def test_planned_maintenance_of_islands_ends_an_attempt_and_is_an_incident(hours: float, number: int):
    made = scenario(days=20.0, failure=SPARSE, policy=ISLANDS, maintenance={"every_days": 3.0, "hours": hours})
    found = simulate(made, 3, keep_course=True)
    assert found.course is not None
    planned = [incident for incident in found.incidents if incident["kind"] == "preempted"]
    expected = {"kind": "preempted", "ends_attempt": True, "detected_as": "maintenance", "seconds": 3600 * hours,
                "lost_steps": 0}  # fmt: skip
    assert [incident | {"time": 0} for incident in planned] == [expected | {"time": 0}] * number
    times = [incident["time"] for incident in found.incidents]
    assert times == sorted(times) and len(times) > len(planned)
    stopped = math.fsum(min(made.days * DAY - incident["time"], incident["seconds"]) for incident in planned)
    assert found.parts["preempted"] == pytest.approx(stopped)
    drawn = found.course.timeline(made.step_seconds, found.incidents)
    trained = math.fsum(attempt["ended"] - attempt["ready"] for attempt in drawn["attempts"])
    assert trained == pytest.approx(found.wall_seconds - stopped)
    assert [a["ended_as"] for a in drawn["attempts"]].count("preempted") == number


@pytest.mark.parametrize("policy", [QUORUM, ISLANDS])
def test_after_the_end_of_a_course_no_attempt_begins(policy: dict[str, Any]):
    often = [{"name": "node", "per_day": 500.0, "detect_seconds": 5.0}]
    made = scenario(days=6.0, failure=often, policy=policy, maintenance={"every_days": 5.0, "hours": 2.0})
    found = simulate(made, 0, keep_course=True)
    assert found.course is not None and found.course.until < 5 * DAY
    drawn = found.course.timeline(made.step_seconds, found.incidents)
    assert drawn["attempts"][0]["ready"] < 0.1 * DAY
    assert all(attempt["ready"] < attempt["ended"] for attempt in drawn["attempts"])


def test_the_page_of_a_forecast_has_the_timeline_and_every_incident_of_one_run(tmp_path: Path):
    from trainer.forecast import report

    found = runs.forecast(scenario(days=30.0, failure=SPARSE, replicates=2))
    report.write(found, tmp_path)
    page = (tmp_path / report.PAGE).read_text()
    assert found["timeline"]["title"] in page and page.count("<svg") == 2
    assert len(found["timeline"]["incidents"]) > 100
    assert all(incident["text"] in page for incident in found["timeline"]["incidents"])
    assert (tmp_path / report.TIMELINE).read_bytes().startswith(b"\x89PNG")
