"""Promises about the account of a run's wall time, from its event log."""

import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.logs import STARTUP, Run, evaluated, hung, members_changed, not_finite, saved, step
from trainer.log.events import CheckpointFailed, StopRequested, Warned
from trainer.log.goodput import PARTS, account
from trainer.log.incidents import incidents_of


def parts(run: Run, now: float | None = None) -> dict[str, float]:
    """The parts that took any time, rounded to the microsecond that Unix times can hold."""
    return {name: round(seconds, 5) for name, seconds in account(run.history, now)["parts"].items() if seconds > 1e-6}


def test_the_time_of_a_run_without_faults_is_shared_out_by_what_it_was_spent_on(run: Run):
    run.train(10, idle=0.1)
    run.write(evaluated(10, seconds=3.0), after=3.0)
    run.now += 0.5  # the copy of the save
    run.steps(11, 20, idle=0.1)
    run.write(saved(10, 0.5))
    run.end("finished", 20, after=0.75)
    assert parts(run) == {
        "productive": 20.0, "evaluation": 3.0, "save_stall": 0.5, "startup": 2.0, "shutdown": 0.75, "other": 2.0,
    }  # fmt: skip
    goodput = account(run.history)
    assert goodput["startup"] == pytest.approx(STARTUP)
    assert goodput["wall_seconds"] == pytest.approx(28.25, abs=1e-6)
    assert goodput["ratio"] == pytest.approx(20 / 28.25)
    assert list(goodput["parts"]) == list(PARTS)


def test_a_kill_costs_the_steps_that_are_computed_again_the_gap_and_a_second_start_up(run: Run):
    run.train(47)
    run.start(from_step=40, after=5.0)
    run.finish(41, 60)
    assert parts(run) == {"productive": 60.0, "lost_steps": 7.0, "startup": 4.0, "down": 5.0}


def test_events_of_a_failing_rank_0_are_no_progress(run: Run):
    run.train(40)
    run.end("failed", 40, after=2.0, reason="RuntimeError: Connection closed by peer")
    run.start(from_step=40, after=3.0)
    run.finish(41, 60)
    assert parts(run) == {"productive": 60.0, "startup": 4.0, "down": 5.0}


def test_steps_lost_but_not_yet_computed_again_are_lost_all_the_same(run: Run):
    run.train(47)
    run.start(from_step=40)
    run.steps(41, 43)
    assert parts(run)["lost_steps"] == 7.0
    assert parts(run)["productive"] == 43.0
    assert max(run.history.committed) == 43


def test_a_rejected_checkpoint_makes_work_of_two_attempts_lost(run: Run):
    run.train(47)
    run.write(evaluated(47, seconds=0.5), after=0.5)
    run.start(from_step=40)
    run.steps(41, 43)
    run.start(from_step=20)
    run.finish(21, 60)
    assert parts(run) == {"productive": 60.0, "lost_steps": 47 + 3 - 20 + 0.5, "startup": 6.0}
    assert sum(incident.lost_steps or 0 for incident in incidents_of(run.history)) == 47 + 3 - 20


def test_time_in_the_queue_after_a_preemption_is_not_down(run: Run):
    run.train(10)
    run.write(StopRequested(signal="SIGTERM", step=10))
    run.end("preempted", 10, after=1.0)
    run.start(from_step=10, after=3_600.0)
    run.finish(11, 20)
    assert parts(run) == {"productive": 20.0, "startup": 4.0, "preempted": 3_600.0, "shutdown": 1.0}


@pytest.mark.parametrize("noticed_by", [0, 1])
def test_time_without_progress_before_a_watchdog_noticed_is_hung(run: Run, noticed_by: int):
    run.train(10)
    run.write(hung(8.0), after=9.0, rank=noticed_by)
    run.start(from_step=10, after=2.0)
    run.finish(11, 20)
    assert parts(run) == {"productive": 20.0, "startup": 4.0, "hung": 8.0, "down": 3.0}


@pytest.mark.parametrize("clock_restarts", [False, True])
def test_a_step_computed_again_because_it_was_not_finite_counts_once(run: Run, clock_restarts: bool):
    run.train(4)
    run.write(not_finite(5), after=1.5)
    run.write(step(5, seconds=1.0 if clock_restarts else 2.5), after=1.0)
    assert parts(run) == {"productive": 5.0, "redone": 1.5, "startup": 2.0}


def test_computations_on_a_grid_that_was_too_fine_are_redone_not_productive(run: Run):
    run.train(2, seconds=2.0, redone=1)
    run.steps(3, 3, seconds=3.0, redone=2)
    assert parts(run) == {"productive": 3.0, "redone": 4.0, "startup": 2.0}


def test_a_stall_is_found_where_the_loop_waited_though_it_is_reported_later(run: Run):
    run.train(10)
    run.now += 0.4
    run.steps(11, 12)
    run.write(saved(10, 0.4), after=0.1)
    run.write(CheckpointFailed(step=12, reason="No space left on device", in_a_row=1, stall_seconds=0.3), after=0.3)
    run.end("finished", 12)
    assert parts(run) == {"productive": 12.0, "save_stall": 0.7, "startup": 2.0, "shutdown": 0.1}


def test_starting_a_finished_run_again_costs_no_goodput(run: Run):
    run.train(10)
    run.end("finished", 10)
    before = account(run.history)
    run.start(from_step=10, after=86_400.0)
    run.end("finished", 10)
    assert account(run.history) == before
    assert incidents_of(run.history) == []


def test_a_run_that_still_runs_is_accounted_for_until_now(run: Run):
    run.train(10)
    assert parts(run) == {"productive": 10.0, "startup": 2.0}
    assert parts(run, now=run.now + 0.5) == {"productive": 10.0, "startup": 2.0, "other": 0.5}


def test_before_the_first_start_nothing_is_known(run: Run):
    run.start(record=False)
    run.write(Warned(message="the disk is slow"))
    unknown = dict.fromkeys(("wall_seconds", "productive_seconds", "ratio"))
    assert account(run.history) == {**unknown, "parts": {}, "startup": {}}
    run.start(after=3.0)
    run.steps(1, 1)
    assert parts(run) == {"productive": 1.0, "startup": 2.0, "down": 3.0}


def test_a_clock_that_is_set_back_makes_no_part_negative(run: Run):
    run.train(5)
    run.now -= 3.0
    run.steps(6, 10)
    run.start(from_step=10, after=-60.0)
    run.finish(11, 12)
    goodput = account(run.history)
    assert min(goodput["parts"].values()) >= 0
    assert sum(goodput["parts"].values()) == pytest.approx(goodput["wall_seconds"], abs=1e-6)


SECONDS = st.floats(0.0, 50.0)
HAPPENING = st.tuples(
    st.sampled_from(["steps", "steps", "eval", "save", "save_failed", "not_finite", "idle", "elsewhere"]),
    st.integers(1, 5), SECONDS, SECONDS,
)  # fmt: skip
ATTEMPT = st.tuples(
    st.sampled_from(["killed", "killed", "hung", "failed", "preempted", "never_started"]),
    st.lists(HAPPENING, max_size=6),
    st.floats(-5.0, 100.0),
    st.integers(0, 9),
)


def live(run: Run, reached: int, happenings: list[Any]) -> int:
    for what, count, seconds, idle in happenings:
        match what:
            case "steps":
                for _ in range(count):
                    reached += 1
                    run.write(step(reached, seconds=seconds, redone=count % 3), after=seconds + idle)
            case "eval":
                run.write(evaluated(reached, seconds=seconds), after=seconds)
            case "save":
                run.write(saved(max(0, reached - count % 2), seconds), after=idle)
            case "save_failed":
                run.write(CheckpointFailed(step=reached, reason="EIO", in_a_row=1), after=idle)
            case "not_finite":
                run.write(not_finite(reached + 1), after=seconds)
            case "idle":
                run.write(Warned(message="slow"), after=idle)
            case "elsewhere":
                run.write(Warned(message="slow"), after=idle, rank=1)
    return reached


def die(run: Run, how: str, reached: int) -> None:
    if how == "hung":
        run.write(hung(10.0), after=10.0, rank=1)
    elif how in ("failed", "preempted"):
        run.end(how, reached, after=1.0)


@given(st.lists(ATTEMPT, max_size=5), st.lists(HAPPENING, max_size=4), st.booleans())
def test_the_parts_of_any_history_are_never_negative_and_sum_to_its_wall_time(
    histories: list[Any], last: list[Any], finishes: bool
):
    with tempfile.TemporaryDirectory() as path:
        run = Run(Path(path))
        begun = run.now
        run.start()
        reached = live(run, 0, [("steps", 1, 1.0, 0.0)])
        computed = 1
        for how, happenings, gap, back in histories:
            resumed = max(0, reached - back)
            run.start(resumed, after=gap, record=how != "never_started")
            if how != "never_started":
                reached = live(run, resumed, happenings)
                computed += reached - resumed
                die(run, how, reached)
        run.start(reached)
        reached, before = live(run, reached, last), reached
        computed += reached - before
        if finishes:
            run.end("finished", reached, after=0.5)
        goodput, happened = account(run.history), incidents_of(run.history, running=not finishes)
        assert min(goodput["parts"].values()) >= 0
        assert abs(math.fsum(goodput["parts"].values()) - goodput["wall_seconds"]) < 1e-6
        if all(gap >= 0 for _, _, gap, _ in histories):  # else the clock went back at times
            newest = max(entry.time for entry in run.entries if entry.rank == 0)
            assert goodput["wall_seconds"] == pytest.approx(newest - begun, abs=1e-5)
        assert sorted(run.history.committed) == list(range(1, reached + 1))
        assert sum(incident.lost_steps or 0 for incident in happened) == computed - reached
        assert sum(incident.ends_attempt for incident in happened) == len({entry.attempt for entry in run.entries}) - 1


def test_incidents_and_accounting_agree_on_the_time_without_training(run: Run):
    run.train(10)
    run.write(hung(8.0), after=9.0, rank=1)
    run.start(from_step=5, after=2.5)
    run.steps(6, 12)
    run.end("preempted", 12, after=1.0)
    run.start(from_step=12, after=40.0)
    run.finish(13, 20)
    of = account(run.history)["parts"]
    without = sum(incident.seconds or 0 for incident in incidents_of(run.history))
    assert without == pytest.approx(of["hung"] + of["down"] + of["preempted"] + of["startup"] * 2 / 3, abs=1e-5)


def test_the_committed_samples_are_those_that_the_last_computation_of_each_step_read(run: Run):
    run.train(47)
    run.start(from_step=40)
    run.write(step(41, samples="other"))
    run.steps(42, 60)
    assert run.history.committed_samples == {n: f"digest-{n}" for n in range(1, 61)} | {41: "other"}


def test_a_death_that_ends_nobody_else_costs_the_time_until_the_others_go_on(run: Run):
    run.train(47)
    run.write(members_changed(47, {"0": "its connection closed"}, members=[0], joined=[], seconds=0.25), after=0.25)
    run.finish(48, 60)
    assert parts(run) == {"productive": 60.0, "startup": 2.0, "down": 0.25}
    (incident,) = incidents_of(run.history)
    assert incident.lost_steps == 0 and "the other went on with it" in incident.text


def test_if_all_workers_die_the_steps_since_the_checkpoint_are_lost_in_the_same_attempt(run: Run):
    run.train(47)
    for lost, joined, epoch in (((0, 1), [2, 3], 2), ((2, 3), [4, 5], 3)):
        why = {str(member): "its connection closed" for member in lost}
        changed = members_changed(40, why, members=joined, joined=joined, seconds=3.0, epoch=epoch)
        run.write(changed, after=3.0)
    run.finish(41, 60)
    assert parts(run) == {"productive": 60.0, "lost_steps": 7.0, "startup": 2.0, "down": 6.0}
    incident, again = incidents_of(run.history)
    assert again.lost_steps == 0
    assert (
        incident.lost_steps == 7
        and "nobody left had the state, so the job went on from step 40 on disk" in incident.text
    )
