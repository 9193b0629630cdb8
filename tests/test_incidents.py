"""Promises about the incidents of a run, from its event log."""

from typing import Any

import pytest

from tests.logs import Run, hung, lost, members_changed, not_finite, started, step
from trainer.log.events import LOST_A_PEER, CheckpointFailed, CheckpointRejected, Event, StopRequested
from trainer.log.incidents import Incident, IncidentBuilder, incidents_of

KILLED = [{"rank": 1, "pid": 101, "exitcode": -9, "signal": "SIGKILL"}]
SURVIVOR = {"rank": 0, "pid": 100, "exitcode": 1, "signal": None}


def killed_and_resumed(run: Run, *then: Event, **changes: Any) -> None:
    run.train(47)
    run.start(**({"from_step": 40, "after": 0.9} | changes))
    for event in then:
        run.write(event)


@pytest.mark.parametrize("order", ["before", "after"])
def test_a_killed_worker_is_one_line_with_what_where_lost_steps_and_seconds(run: Run, order: str):
    if order == "after":
        killed_and_resumed(run, lost(SURVIVOR, *KILLED))
    else:
        killed_and_resumed(run, record=False)
        run.write(lost(SURVIVOR, *KILLED))
        run.write(started(40, pid=1))
    (incident,) = incidents_of(run.history, running=True)
    text = "rank 1 was killed (SIGKILL) after step 47; resumed from step 40, 7 steps to replay; 2.9 s without training"
    seconds: Any = pytest.approx(2.9, abs=1e-5)
    assert incident == Incident(0, "worker_lost", True, 1, None, 47, 7, seconds, "workers_lost", text, time=1_000_049.0)


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
    killed_and_resumed(run, lost(*failures, reason="a node is joining"))
    (incident,) = incidents_of(run.history, running=True)
    assert incident.text.startswith(said)


def test_a_rank_that_lost_a_peer_is_no_cause_though_it_left_first(run: Run):
    run.train(47)
    run.end("failed", 47, reason=LOST_A_PEER, rank=1)
    run.end("failed", 47, reason="RuntimeError: a bug", after=0.1)
    run.start(from_step=40)
    run.write(lost({"rank": 1, "pid": 101, "exitcode": 1, "signal": None}))
    (incident,) = incidents_of(run.history, running=True)
    assert incident.rank == 0 and incident.text.startswith("rank 0 failed (RuntimeError: a bug) after step 47")


def test_a_change_of_world_size_and_a_start_from_zero_are_said(run: Run):
    killed_and_resumed(run, from_step=0, world_size=1)
    (incident,) = incidents_of(run.history, running=True)
    assert incident.text == (
        "ended without a message after step 47; started again from step 0 on 1 rank instead of 2, 47 steps to replay; "
        "2.9 s without training"
    )
    assert incident.detected_as == "silence"


def test_an_exception_is_named_by_the_rank_that_raised_it_first(run: Run):
    run.train(3)
    run.end("failed", 3, after=0.1, reason="CheckpointError: saving failed 3 times.\n  Make room.", rank=1)
    run.end("failed", 3, after=0.1, reason="RuntimeError: Connection closed by peer")
    (incident,) = incidents_of(run.history)
    assert (incident.rank, incident.detected_as, incident.lost_steps) == (1, "attempt_ended", None)
    assert (
        incident.text == "rank 1 failed (CheckpointError: saving failed 3 times.) after step 3; nothing has resumed it"
    )


def test_a_rank_that_lost_a_peer_is_not_reported_as_lost(run: Run):
    run.train(3)
    run.end("failed", 3, after=0.1, reason=LOST_A_PEER)
    (incident,) = incidents_of(run.history)
    assert (incident.rank, incident.text) == (None, "a peer was lost after step 3; nothing has resumed it")


def test_the_rank_that_lost_a_peer_is_not_the_cause_where_two_left_with_a_status(run: Run):
    run.train(3)
    run.end("failed", 3, after=0.1, reason=LOST_A_PEER)
    run.start(from_step=2)
    run.write(lost(SURVIVOR, {"rank": 1, "pid": 101, "exitcode": 9, "signal": None}))
    (incident,) = incidents_of(run.history, running=True)
    assert incident.rank == 1 and incident.text.startswith("rank 1 left with exit status 9 after step 3; resumed")


def test_workers_killed_on_the_way_to_the_next_attempt_are_not_taken_for_those_of_the_last(run: Run):
    run.train(47)
    run.start(from_step=40)
    run.write(lost({"rank": 0, "pid": 999, "exitcode": -9, "signal": "SIGKILL"}))
    first, second = incidents_of(run.history, running=True)
    assert (first.text.split(";")[0], first.lost_steps) == ("ended without a message after step 47", 7)
    assert (second.text, second.lost_steps) == ("rank 0 was killed (SIGKILL) before attempt 1 started", 0)
    assert second.seconds is None


def test_an_attempt_killed_while_it_was_starting_loses_no_steps_twice(run: Run):
    run.train(47)
    run.start(record=False)
    run.write(CheckpointRejected(step=40, reason="truncated"))
    run.start(from_step=20)
    run.steps(21, 22)
    found = incidents_of(run.history, running=True)
    assert [(i.kind, i.attempt, i.lost_steps) for i in found] == [
        ("checkpoint_rejected", 1, 0),
        ("worker_lost", 0, 27),
        ("worker_lost", 1, 0),
    ]
    assert found[2].text == "ended without a message while it was starting"


def test_a_hang_names_the_rank_that_held_up_the_others(run: Run):
    run.train(47)
    culprit = {"rank": 1, "point": "before_reduce", "step": 47, "why": "does not answer"}
    run.write(hung(10.0, culprit), after=10.0)
    run.start(from_step=40, after=0.5)
    run.write(lost({"rank": 0, "pid": 100, "exitcode": 1, "signal": None}))
    (incident,) = incidents_of(run.history, running=True)
    assert (incident.kind, incident.rank, incident.point) == ("hung", 1, "before_reduce")
    assert incident.text == (
        "rank 1 hung at before_reduce (no progress for 10.0 s; it does not answer) after step 47; "
        "resumed from step 40, 7 steps to replay; 12.5 s without training"
    )


def test_a_preempted_attempt_says_by_which_signal_and_loses_nothing(run: Run):
    run.train(10)
    run.write(StopRequested(signal="SIGUSR1", step=10), rank=1)
    run.end("preempted", 10)
    run.start(from_step=10, after=60.0)
    run.steps(11, 11)
    (incident,) = incidents_of(run.history, running=True)
    assert (incident.kind, incident.lost_steps, incident.detected_as) == ("preempted", 0, "stop_requested")
    assert incident.text == (
        "preempted (SIGUSR1) after step 10; resumed from step 10, no steps to replay; 62.0 s without training"
    )


def test_a_step_that_is_not_finite_is_an_incident_once_and_the_second_time_ends_the_attempt(run: Run):
    run.train(4)
    for rank in (0, 1):
        run.write(not_finite(5), after=1.5 * (rank == 0), rank=rank)
    run.write(step(5), after=1.0)
    (incident,) = incidents_of(run.history, running=True)
    assert (incident.kind, incident.step, incident.seconds) == ("not_finite", 5, pytest.approx(1.5))
    run.write(not_finite(6))
    run.write(not_finite(6, trial=1))
    run.end("failed", 5, reason="NumericsError: step 6")
    found = incidents_of(run.history)
    assert [(i.kind, i.step, i.ends_attempt) for i in found] == [
        ("not_finite", 5, False),
        ("not_finite", 6, False),
        ("not_finite", 5, True),
    ]
    assert found[-1].text.startswith("step 6 was not finite (loss nan, gradient norm inf), and not when computed again")


def test_a_failed_save_and_a_damaged_checkpoint_do_not_end_an_attempt(run: Run):
    run.start()
    run.write(CheckpointRejected(step=40, reason="model.safetensors: checksum differs"))
    run.steps(1, 2)
    run.write(
        CheckpointFailed(step=2, reason="[Errno 28] No space left on device", in_a_row=2, on_rank=1, stall_seconds=0.1)
    )
    found = incidents_of(run.history, running=True)
    assert [(i.kind, i.detected_as, i.rank, i.ends_attempt, i.lost_steps, i.seconds) for i in found] == [
        ("checkpoint_rejected", "checkpoint_rejected", None, False, 0, None),
        ("save_failed", "checkpoint_failed", 1, False, 0, 0.1),
    ]
    assert found[1].text == "the save of step 2 failed ([Errno 28] No space left on device), 2 in a row"


def test_incidents_built_entry_by_entry_are_those_read_from_the_log(run: Run):
    killed_and_resumed(run, lost(*KILLED))
    run.steps(41, 43)
    run.start(from_step=40)
    run.finish(41, 60)
    builder = IncidentBuilder(entry for entry in run.entries if entry.attempt == 0)
    found = [incident for entry in run.entries if entry.attempt for incident in builder.add(entry)]
    assert found == incidents_of(run.history)
    assert [incident.lost_steps for incident in found] == [7, 3]


def test_each_worker_of_a_quorum_is_lost_once_however_often_it_is_told(run: Run):
    run.train(9)
    again = {"1": "its connection closed", "2": "its connection closed"}
    for epoch, told in enumerate(({"1": "its connection closed"}, again, again), start=2):
        run.write(members_changed(9, told, epoch=epoch))
    assert [(incident.rank, incident.others) for incident in incidents_of(run.history, running=True)] == [
        (1, ()),
        (2, ()),
    ]


def test_workers_that_were_lost_together_are_one_incident(run: Run):
    run.train(9)
    run.write(members_changed(9, {"2": "its connection closed", "1": "its connection closed"}))
    (incident,) = incidents_of(run.history, running=True)
    assert (incident.rank, incident.others, incident.lost_steps) == (2, (1,), 0)
