"""Promises about reading a run's event log: whole, or while it grows."""

import pytest

from tests.logs import Run, step
from trainer.errors import RunDirectoryError
from trainer.log.events import Follower, StepDone, select
from trainer.log.history import Attempt, History


def steps_of(follower: Follower) -> list[int]:
    return [event.step for _, event in select(follower.poll(), StepDone)]


def test_an_attempt_followed_entry_by_entry_is_the_one_read_from_the_log_and_keeps_no_entries(run: Run):
    run.start(world_size=3)
    run.steps(1, 4)
    run.write(step(5), rank=1)
    run.end("failed", 4, reason="a bug", rank=1)
    run.end("preempted", 4)
    run.fault("sigkill")
    (whole,) = run.history.attempts
    followed = Attempt(0)
    for entry in whole.entries:
        followed.observe(entry)
    assert followed.entries == []
    assert (whole.from_step, whole.last_step, whole.furthest_step, list(whole.starts)) == (0, 4, 5, [0, 1, 2])
    whole.entries.clear()
    assert followed == whole
    assert (whole.status, whole.main_status, whole.failures) == ("failed", "preempted", {1: "a bug"})


def test_faults_on_purpose_are_kept_apart_from_what_the_run_itself_wrote(run: Run):
    run.start()
    run.fault("sigkill", at=3)
    run.steps(1, 2)
    assert [entry.event.kind for entry in run.history.fired] == ["fault_fired"]
    assert "fault_fired" not in {entry.event.kind for entry in run.history.entries}


def test_a_run_finishes_once_however_often_it_is_started_again(run: Run):
    assert History.from_entries([]).finish is None
    for _ in range(2):
        run.start(from_step=0 if run.attempt < 0 else 5)
        run.steps(1, 5 if run.attempt == 0 else 0)
        run.end("finished", 5)
    assert run.history.finish is not None and run.history.finish[0].attempt == 0
    assert sorted(run.history.committed) == [1, 2, 3, 4, 5]


def test_a_follower_returns_each_line_once_and_waits_for_a_torn_one(run: Run):
    follower = Follower(run.path)
    assert follower.poll() == []
    run.start()
    first = follower.poll()
    assert [entry.rank for entry in first] == [0, 1]
    run.steps(1, 2)
    path = run.path / "events" / "attempt-0000-rank-00000.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole[:-20])
    assert steps_of(follower) == [1]
    path.write_bytes(whole)
    assert steps_of(follower) == [2]
    assert follower.poll() == []
    run.start(from_step=2)
    assert [entry.attempt for entry in follower.poll()] == [1, 1]


def test_a_follower_names_the_damaged_line_and_continues_after_it(run: Run):
    run.start(world_size=1)
    follower = Follower(run.path)
    follower.poll()
    path = run.path / "events" / "attempt-0000-rank-00000.jsonl"
    with path.open("ab") as file:
        file.write(b"{}\n")
    with pytest.raises(RunDirectoryError, match=r"rank-00000.jsonl:2 is no event"):
        follower.poll()
    run.steps(1, 1)
    assert steps_of(follower) == [1]
