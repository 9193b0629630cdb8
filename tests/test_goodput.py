"""Promises about where a run's time went and what went wrong, told from its event log."""

import contextlib
import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.events import (
    AttemptEnded,
    AttemptStarted,
    CheckpointFailed,
    CheckpointRejected,
    CheckpointSaved,
    Entry,
    EvalDone,
    Event,
    EventLog,
    Hung,
    NotFinite,
    StepDone,
    StopRequested,
    Warned,
    WorkersLost,
    read,
)
from trainer.goodput import PARTS, Story, account, committed, committed_samples, incidents

STARTUP = {"imports": 1.5, "connect": 0.25, "restore": 0.25}
KILLED = [{"rank": 1, "pid": 101, "exitcode": -9, "signal": "SIGKILL"}]
SURVIVOR = {"rank": 0, "pid": 100, "exitcode": 1, "signal": None}


class Run:
    """A pretended run: a clock that is moved by hand, and a log per attempt and rank."""

    def __init__(self, path: Path, now: float = 1_000_000.0) -> None:
        self.path, self.now, self.attempt, self.world_size = path, now, -1, 2

    def start(self, from_step: int = 0, after: float = 0.0, world_size: int = 2, record: bool = True) -> None:
        """A process starts `after` seconds from now and is ready when its start-up is over."""
        self.now += after + sum(STARTUP.values())
        self.attempt, self.world_size = self.attempt + 1, world_size
        for rank in range(world_size if record else 0):
            self.write(started(from_step, world_size, pid=100 + 10 * self.attempt + rank), rank=rank)

    def write(self, event: Event, after: float = 0.0, rank: int = 0) -> None:
        self.now += after
        path = self.path / "events" / f"attempt-{self.attempt:04d}-rank-{rank:05d}.jsonl"
        with contextlib.closing(EventLog(path, self.attempt, rank, lambda: self.now)) as log:
            log.append(event)

    def steps(self, first: int, last: int, seconds: float = 1.0, idle: float = 0.0, **changes: Any) -> None:
        for number in range(first, last + 1):
            self.write(step(number, seconds=seconds, **changes), after=idle + seconds)

    def end(self, status: str, at: int, after: float = 0.0, reason: str = "", rank: int = 0) -> None:
        ended = AttemptEnded(status=status, step=at, reason=reason, weights_sha256=None, state_sha256=None)
        self.write(ended, after, rank)

    @property
    def entries(self) -> list[Entry]:
        return read(self.path)


def started(from_step: int, world_size: int, pid: int) -> AttemptStarted:
    return AttemptStarted(
        world_size=world_size,
        from_step=from_step,
        steps=60,
        fingerprint="f" * 64,
        host="host",
        pid=pid,
        device="cpu",
        strategy="fsdp",
        parameters=1_234_567,
        tokens_per_step=2_048,
        startup_seconds=STARTUP,
    )


def step(number: int, **changes: Any) -> StepDone:
    values: dict[str, Any] = {
        "step": number,
        "loss": 5.0 - number / 100,
        "grad_norm": 1.0,
        "learning_rate": 1e-3,
        "tokens": 2_048,
        "seconds": 1.0,
        "samples": f"digest-{number}",
        "redone": 0,
        "flushed": None,
    }
    return StepDone(**(values | changes))


def evaluated(number: int, seconds: float) -> EvalDone:
    return EvalDone(step=number, set="val", loss=2.0, bits_per_byte=1.0, tokens=9, seconds=seconds, digest="d")


def saved(number: int, stall: float) -> CheckpointSaved:
    return CheckpointSaved(step=number, bytes=1, seconds=stall, stall_seconds=stall)


def not_finite(number: int, trial: int = 0) -> NotFinite:
    return NotFinite(step=number, loss=math.nan, grad_norm=math.inf, trial=trial)


def lost(*failures: dict[str, Any], reason: str = "") -> WorkersLost:
    return WorkersLost(failures=list(failures), reason=reason)


def hung(seconds: float, *culprits: dict[str, Any]) -> Hung:
    return Hung(
        step=47, point="before_reduce", seconds=seconds, culprits=list(culprits), collective=None, stacks="stacks/x"
    )


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


def parts(run: Run, now: float | None = None) -> dict[str, float]:
    """The parts that took any time, rounded to the microsecond that Unix times can hold."""
    return {name: round(seconds, 5) for name, seconds in account(run.entries, now)["parts"].items() if seconds > 1e-6}


# --- where the time went ----------------------------------------------------------------------------------------------


def test_a_calm_runs_time_is_told_apart_by_what_it_was_spent_on(run: Run):
    run.start()
    run.steps(1, 10, idle=0.1)
    run.write(evaluated(10, 3.0), after=3.0)
    run.now += 0.5  # the copy of the save
    run.steps(11, 20, idle=0.1)
    run.write(saved(10, 0.5))
    run.end("finished", 20, after=0.75)
    assert parts(run) == {
        "productive": 20.0,
        "evaluation": 3.0,
        "save_stall": 0.5,
        "startup": 2.0,
        "shutdown": 0.75,
        "other": 2.0,
    }
    goodput = account(run.entries)
    assert goodput["startup"] == pytest.approx(STARTUP)
    assert goodput["wall_seconds"] == pytest.approx(28.25, abs=1e-6)
    assert goodput["ratio"] == pytest.approx(20 / 28.25)
    assert list(goodput["parts"]) == list(PARTS)


def test_a_kill_costs_the_steps_that_are_computed_again_the_gap_and_a_second_start_up(run: Run):
    run.start()
    run.steps(1, 47)
    run.start(from_step=40, after=5.0)
    run.steps(41, 60)
    run.end("finished", 60)
    assert parts(run) == {"productive": 60.0, "lost_steps": 7.0, "startup": 4.0, "down": 5.0}


def test_what_a_failing_rank_0_still_writes_is_no_progress(run: Run):
    run.start()
    run.steps(1, 40)
    run.end("failed", 40, after=2.0, reason="RuntimeError: Connection closed by peer")
    run.start(from_step=40, after=3.0)
    run.steps(41, 60)
    run.end("finished", 60)
    assert parts(run) == {"productive": 60.0, "startup": 4.0, "down": 5.0}


def test_steps_lost_but_not_yet_computed_again_are_lost_all_the_same(run: Run):
    run.start()
    run.steps(1, 47)
    run.start(from_step=40)
    run.steps(41, 43)
    assert parts(run)["lost_steps"] == 7.0
    assert parts(run)["productive"] == 43.0
    assert max(committed(run.entries)) == 43


def test_a_rejected_checkpoint_makes_work_of_two_attempts_lost(run: Run):
    run.start()
    run.steps(1, 47)
    run.write(evaluated(47, 0.5), after=0.5)
    run.start(from_step=40)
    run.steps(41, 43)
    run.start(from_step=20)
    run.steps(21, 60)
    run.end("finished", 60)
    assert parts(run) == {"productive": 60.0, "lost_steps": 47 + 3 - 20 + 0.5, "startup": 6.0}
    assert sum(incident.lost_steps or 0 for incident in incidents(run.entries)) == 47 + 3 - 20


def test_time_in_the_queue_after_a_preemption_is_not_down(run: Run):
    run.start()
    run.steps(1, 10)
    run.write(StopRequested(signal="SIGTERM", step=10))
    run.end("preempted", 10, after=1.0)
    run.start(from_step=10, after=3_600.0)
    run.steps(11, 20)
    run.end("finished", 20)
    assert parts(run) == {"productive": 20.0, "startup": 4.0, "preempted": 3_600.0, "shutdown": 1.0}


@pytest.mark.parametrize("noticed_by", [0, 1])
def test_time_without_progress_before_a_watchdog_noticed_is_hung(run: Run, noticed_by: int):
    run.start()
    run.steps(1, 10)
    run.write(hung(8.0), after=9.0, rank=noticed_by)
    run.start(from_step=10, after=2.0)
    run.steps(11, 20)
    run.end("finished", 20)
    assert parts(run) == {"productive": 20.0, "startup": 4.0, "hung": 8.0, "down": 3.0}


@pytest.mark.parametrize("clock_restarts", [False, True])
def test_a_step_computed_again_because_it_was_not_finite_counts_once(run: Run, clock_restarts: bool):
    run.start()
    run.steps(1, 4)
    run.write(not_finite(5), after=1.5)
    run.write(step(5, seconds=1.0 if clock_restarts else 2.5), after=1.0)
    assert parts(run) == {"productive": 5.0, "redone": 1.5, "startup": 2.0}


def test_computations_on_a_grid_that_was_too_fine_are_redone_not_productive(run: Run):
    run.start()
    run.steps(1, 2, seconds=2.0, redone=1)
    run.steps(3, 3, seconds=3.0, redone=2)
    assert parts(run) == {"productive": 3.0, "redone": 4.0, "startup": 2.0}


def test_a_stall_is_found_where_the_loop_waited_though_it_is_reported_later(run: Run):
    run.start()
    run.steps(1, 10)
    run.now += 0.4
    run.steps(11, 12)
    run.write(saved(10, 0.4), after=0.1)
    run.write(CheckpointFailed(step=12, reason="No space left on device", in_a_row=1, stall_seconds=0.3), after=0.3)
    run.end("finished", 12)
    assert parts(run) == {"productive": 12.0, "save_stall": 0.7, "startup": 2.0, "shutdown": 0.1}


def test_starting_a_finished_run_again_costs_no_goodput(run: Run):
    run.start()
    run.steps(1, 10)
    run.end("finished", 10)
    before = account(run.entries)
    run.start(from_step=10, after=86_400.0)
    run.end("finished", 10)
    assert account(run.entries) == before
    assert incidents(run.entries) == []


def test_a_run_that_goes_on_is_accounted_for_until_now(run: Run):
    run.start()
    run.steps(1, 10)
    assert parts(run) == {"productive": 10.0, "startup": 2.0}
    assert parts(run, now=run.now + 0.5) == {"productive": 10.0, "startup": 2.0, "other": 0.5}


def test_before_the_first_start_nothing_is_known(run: Run):
    run.start(record=False)
    run.write(Warned(message="the disk is slow"))
    assert account(run.entries) == {
        "wall_seconds": None,
        "productive_seconds": None,
        "ratio": None,
        "parts": {},
        "startup": {},
    }
    run.start(after=3.0)
    run.steps(1, 1)
    assert parts(run) == {"productive": 1.0, "startup": 2.0, "down": 3.0}


def test_a_clock_that_is_set_back_makes_no_part_negative(run: Run):
    run.start()
    run.steps(1, 5)
    run.now -= 3.0
    run.steps(6, 10)
    run.start(from_step=10, after=-60.0)
    run.steps(11, 12)
    run.end("finished", 12)
    goodput = account(run.entries)
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
                run.write(evaluated(reached, seconds), after=seconds)
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
        goodput, happened = account(run.entries), incidents(run.entries, running=not finishes)
        assert min(goodput["parts"].values()) >= 0
        assert abs(math.fsum(goodput["parts"].values()) - goodput["wall_seconds"]) < 1e-6
        if all(gap >= 0 for _, _, gap, _ in histories):  # else the clock went back at times
            newest = max(entry.time for entry in run.entries if entry.rank == 0)
            assert goodput["wall_seconds"] == pytest.approx(newest - begun, abs=1e-5)
        assert sorted(committed(run.entries)) == list(range(1, reached + 1))
        assert sum(incident.lost_steps or 0 for incident in happened) == computed - reached
        assert sum(incident.ends_attempt for incident in happened) == len({entry.attempt for entry in run.entries}) - 1


def test_incidents_and_accounting_agree_on_the_time_without_training(run: Run):
    run.start()
    run.steps(1, 10)
    run.write(hung(8.0), after=9.0, rank=1)
    run.start(from_step=5, after=2.5)
    run.steps(6, 12)
    run.end("preempted", 12, after=1.0)
    run.start(from_step=12, after=40.0)
    run.steps(13, 20)
    run.end("finished", 20)
    of = account(run.entries)["parts"]
    without = sum(incident.seconds or 0 for incident in incidents(run.entries))
    assert without == pytest.approx(of["hung"] + of["down"] + of["preempted"] + of["startup"] * 2 / 3, abs=1e-5)


# --- the ledger -------------------------------------------------------------------------------------------------------


def test_the_committed_samples_are_those_that_the_last_computation_of_each_step_read(run: Run):
    run.start()
    run.steps(1, 47)
    run.start(from_step=40)
    run.write(step(41, samples="other"))
    run.steps(42, 60)
    assert committed_samples(run.path) == {n: f"digest-{n}" for n in range(1, 61)} | {41: "other"}


# --- incidents --------------------------------------------------------------------------------------------------------


def killed_and_resumed(run: Run, tell: Callable[[], None] = lambda: None, **changes: Any) -> None:
    run.start()
    run.steps(1, 47)
    run.start(**({"from_step": 40, "after": 0.9} | changes))
    tell()


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_killed_worker_is_one_line_with_what_where_lost_steps_and_seconds(run: Run, order: str):
    if order == "after":
        killed_and_resumed(run, lambda: run.write(lost(SURVIVOR, *KILLED)))
    else:
        killed_and_resumed(run, record=False)
        run.write(lost(SURVIVOR, *KILLED))
        run.write(started(40, 2, pid=1))
    (incident,) = incidents(run.entries, running=True)
    assert asdict(incident) | {"seconds": None} == {
        "attempt": 0,
        "kind": "worker_lost",
        "ends_attempt": True,
        "rank": 1,
        "point": None,
        "step": 47,
        "lost_steps": 7,
        "seconds": None,
        "detected_as": "workers_lost",
        "text": "rank 1 was killed (SIGKILL) after step 47; resumed from step 40, 7 steps to replay; "
        "2.9 s without training",
        "time": 1_000_049.0,
    }
    assert incident.seconds == pytest.approx(2.9, abs=1e-5)


@pytest.mark.parametrize(
    ("failures", "said"),
    [
        ([{"rank": 1, "pid": 101, "exitcode": -11, "signal": "SIGSEGV"}], "rank 1 died (SIGSEGV) after step 47"),
        ([{"rank": 1, "pid": 101, "exitcode": 9, "signal": None}], "rank 1 left with exit status 9 after step 47"),
        ([], "a node is joining after step 47"),
        (
            [{"rank": r, "pid": 100 + r, "exitcode": -9, "signal": "SIGKILL"} for r in range(5)],
            "rank 0 was killed (SIGKILL), rank 1 was killed (SIGKILL), rank 2 was killed (SIGKILL) and 2 more after",
        ),
    ],
)
def test_the_launchers_word_says_how_workers_were_lost(run: Run, failures: list[dict[str, Any]], said: str):
    killed_and_resumed(run, lambda: run.write(lost(*failures, reason="a node is joining")))
    (incident,) = incidents(run.entries, running=True)
    assert incident.text.startswith(said)


def test_a_change_of_world_size_and_a_start_from_zero_are_said(run: Run):
    killed_and_resumed(run, from_step=0, world_size=1)
    (incident,) = incidents(run.entries, running=True)
    assert incident.text == (
        "ended without a word after step 47; started again from step 0 on 1 rank instead of 2, 47 steps to replay; "
        "2.9 s without training"
    )
    assert incident.detected_as == "silence"


def test_an_exception_is_named_by_the_rank_that_raised_it_first(run: Run):
    run.start()
    run.steps(1, 3)
    run.end("failed", 3, after=0.1, reason="CheckpointError: saving failed 3 times.\n  Make room.", rank=1)
    run.end("failed", 3, after=0.1, reason="RuntimeError: Connection closed by peer")
    (incident,) = incidents(run.entries)
    assert (incident.rank, incident.detected_as, incident.lost_steps) == (1, "attempt_ended", None)
    assert (
        incident.text == "rank 1 failed (CheckpointError: saving failed 3 times.) after step 3; nothing has resumed it"
    )


def test_workers_killed_on_the_way_to_the_next_attempt_are_told_apart_from_those_of_the_last(run: Run):
    run.start()
    run.steps(1, 47)
    run.start(from_step=40)
    run.write(lost({"rank": 0, "pid": 999, "exitcode": -9, "signal": "SIGKILL"}))
    first, second = incidents(run.entries, running=True)
    assert (first.text.split(";")[0], first.lost_steps) == ("ended without a word after step 47", 7)
    assert (second.text, second.lost_steps) == ("rank 0 was killed (SIGKILL) before attempt 1 started", 0)
    assert second.seconds is None


def test_an_attempt_killed_while_it_was_starting_loses_no_steps_twice(run: Run):
    run.start()
    run.steps(1, 47)
    run.start(record=False)
    run.write(CheckpointRejected(step=40, reason="truncated"))
    run.start(from_step=20)
    run.steps(21, 22)
    told = incidents(run.entries, running=True)
    assert [(i.kind, i.attempt, i.lost_steps) for i in told] == [
        ("checkpoint_rejected", 1, 0),
        ("worker_lost", 0, 27),
        ("worker_lost", 1, 0),
    ]
    assert told[2].text == "ended without a word while it was starting"


def test_a_hang_names_the_rank_that_held_up_the_others(run: Run):
    run.start()
    run.steps(1, 47)
    culprit = {"rank": 1, "point": "before_reduce", "step": 47, "why": "does not answer"}
    run.write(hung(10.0, culprit), after=10.0)
    run.start(from_step=40, after=0.5)
    run.write(lost({"rank": 0, "pid": 100, "exitcode": 1, "signal": None}))
    (incident,) = incidents(run.entries, running=True)
    assert (incident.kind, incident.rank, incident.point) == ("hung", 1, "before_reduce")
    assert incident.text == (
        "rank 1 hung at before_reduce (no progress for 10.0 s; it does not answer) after step 47; "
        "resumed from step 40, 7 steps to replay; 12.5 s without training"
    )


def test_a_preempted_attempt_says_by_which_signal_and_loses_nothing(run: Run):
    run.start()
    run.steps(1, 10)
    run.write(StopRequested(signal="SIGUSR1", step=10), rank=1)
    run.end("preempted", 10)
    run.start(from_step=10, after=60.0)
    run.steps(11, 11)
    (incident,) = incidents(run.entries, running=True)
    assert (incident.kind, incident.lost_steps, incident.detected_as) == ("preempted", 0, "stop_requested")
    assert incident.text == (
        "preempted (SIGUSR1) after step 10; resumed from step 10, no steps to replay; 62.0 s without training"
    )


def test_a_step_that_is_not_finite_is_an_incident_once_and_the_second_time_ends_the_attempt(run: Run):
    run.start()
    run.steps(1, 4)
    for rank in (0, 1):
        run.write(not_finite(5), after=1.5 * (rank == 0), rank=rank)
    run.write(step(5), after=1.0)
    (incident,) = incidents(run.entries, running=True)
    assert (incident.kind, incident.step, incident.seconds) == ("not_finite", 5, pytest.approx(1.5))
    run.write(not_finite(6))
    run.write(not_finite(6, trial=1))
    run.end("failed", 5, reason="NumericsError: step 6")
    told = incidents(run.entries)
    assert [(i.kind, i.step, i.ends_attempt) for i in told] == [
        ("not_finite", 5, False),
        ("not_finite", 6, False),
        ("not_finite", 5, True),
    ]
    assert told[-1].text.startswith("step 6 was not finite (loss nan, gradient norm inf), and not when computed again")


def test_a_failed_save_and_a_damaged_checkpoint_do_not_end_an_attempt(run: Run):
    run.start()
    run.write(CheckpointRejected(step=40, reason="model.safetensors: checksum differs"))
    run.steps(1, 2)
    run.write(CheckpointFailed(step=2, reason="[Errno 28] No space left on device", in_a_row=2, stall_seconds=0.1))
    told = incidents(run.entries, running=True)
    assert [(i.kind, i.detected_as, i.ends_attempt, i.lost_steps, i.seconds) for i in told] == [
        ("checkpoint_rejected", "checkpoint_rejected", False, 0, None),
        ("save_failed", "checkpoint_failed", False, 0, 0.1),
    ]
    assert told[1].text == "the save of step 2 failed ([Errno 28] No space left on device), 2 in a row"


def test_a_story_told_entry_by_entry_is_the_one_read_from_the_log(run: Run):
    killed_and_resumed(run, lambda: run.write(lost(*KILLED)))
    run.steps(41, 43)
    run.start(from_step=40)
    run.steps(41, 60)
    run.end("finished", 60)
    story = Story(entry for entry in run.entries if entry.attempt == 0)
    told = [incident for entry in run.entries if entry.attempt for incident in story.tell(entry)]
    assert told == incidents(run.entries)
    assert [incident.lost_steps for incident in told] == [7, 3]
