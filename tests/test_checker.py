"""The checker on made-up logs: each invariant holds for the run that kept it, and fails for the one that broke it."""

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests import logs
from trainer import config as configs
from trainer.checkpoint import files
from trainer.faults import checker, plan
from trainer.faults.checker import Answer, Evidence, Reference
from trainer.log import events, goodput
from trainer.log.events import (
    AttemptEnded,
    CheckpointFailed,
    CheckpointRejected,
    Event,
    Hung,
    MembersChanged,
    NotFinite,
)

STEPS, EVERY = 12, 6
BASE = {"budget": {"steps": STEPS}, "checkpoint": {"every_steps": EVERY}, "optim": {"warmup_steps": 0}}
REFERENCE = Reference("w" * 64, "s" * 64, {step: f"samples {step}" for step in range(1, STEPS + 1)}, STEPS, 5.0, True)
KILL = {"kind": "sigkill", "rank": 1, "at_step": 10, "phase": "before_forward"}


class Log(logs.Run):
    """A run's log, written event by event on a clock of its own."""

    def __init__(self, run: Path) -> None:
        super().__init__(run, now=1000.0)
        self.run, self.pid, self.started = run, 100, self.now

    def write(self, event: Event, rank: int = 0, after: float = 0.1) -> None:
        super().write(event, after, rank)

    def start(self, from_step: int, ranks: int = 2, seconds: float = 2.0, after: float = 0.5) -> None:
        """The next attempt: its processes start `after` seconds from now and are ready after `seconds`."""
        self.attempt += 1
        self.now += after + seconds
        for rank in range(ranks):
            self.pid += 1
            known = {"world_size": ranks, "pid": self.pid, "startup_seconds": {"imports": seconds}}
            self.write(logs.started(from_step, **known), rank, after=0.0)

    def steps(self, first: int, last: int, **changes: Any) -> None:
        for step in range(first, last + 1):
            self.write(logs.step(step, **{"loss": 1 / step, "samples": f"samples {step}"} | changes))
            if step % EVERY == 0:
                self.save(step)

    def save(self, step: int) -> None:
        self.write(logs.saved(step), after=0.0)
        write_checkpoint(self.run, step)

    def fire(self, index: int = 0, kind: str = "sigkill", victim: int | None = 1, step: int | None = 9) -> None:
        self.fault(kind, 0.05, victim, step, index)

    def strike(self, *fault: Any, last: int = 9, **more: Any) -> None:
        """The first attempt takes steps up to `last`, then a fault fires."""
        self.start(0)
        self.steps(1, last)
        self.fire(*fault, **more)

    def start_over(self, event: Event) -> None:
        """The next attempt meets `event` before it is ready, and begins with the first step."""
        self.attempt += 1
        self.write(event)
        self.attempt -= 1
        self.start(0)

    def complete(self, first: int, *ending: Any) -> None:
        """The steps from `first` to the last, and the end."""
        self.steps(first, STEPS)
        self.finish(*ending)

    def lose(self, rank: int = 1, pid: int | None = None) -> None:
        """The end of the attempt before, as the launcher reports it to rank 0 of this one."""
        failure = {"rank": rank, "pid": pid, "exitcode": -9, "signal": "SIGKILL"}
        self.write(logs.lost(failure, reason=f"rank {rank} was ended by SIGKILL"), after=0.0)

    def finish(self, weights: str = "w" * 64, state: str = "s" * 64, ranks: int = 2) -> None:
        for rank in range(ranks):
            self.write(logs.ended("finished", STEPS, weights, state, reason=""), rank, after=0.0)
        self.now += 0.3


def write_checkpoint(run: Path, step: int) -> Path:
    final = files.final_path(run, step)
    if final.exists():
        return final
    files.directory(run).mkdir(parents=True, exist_ok=True)
    staging = files.stage(run, step)
    content = f"shard {step}".encode()
    (staging / "shard").write_bytes(content)
    described = {"shard": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
    files.write_manifest(staging, {"step": step, "files": described})
    files.commit(staging, final)
    return final


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path / "run")


def evidence(log: Log, *faults: dict[str, Any], statuses: tuple[int | None, ...] = (0,), **more: Any) -> Evidence:
    config = configs.parse(BASE | {"faults": list(faults or [KILL])} | more.pop("config", {}))
    launches = [{"started": log.started - 0.5, "ended": log.now, "status": status} for status in statuses]
    reference, ranks = more.pop("reference", REFERENCE), more.pop("ranks", 2)
    planned = plan.make(config, ranks, transport=more.pop("transport", "tcp"))
    return Evidence(log.run, config, planned, reference, more.pop("launches", launches), **more)


def answers(found: Evidence) -> dict[str, Answer]:
    checked = checker.check(found)
    assert tuple(answer.invariant for answer in checked) == checker.INVARIANTS
    assert all("\n" not in answer.why for answer in checked)
    return {answer.invariant: answer for answer in checked}


def not_passed(found: Evidence) -> dict[str, str]:
    return {name: answer.answer for name, answer in answers(found).items() if answer.answer != "pass"}


def survive_a_kill(log: Log, **changes: Any) -> None:
    """Killed in step 10, resumed from 6, finished."""
    log.strike()
    log.start(changes.pop("resumed", 6), **changes.pop("start", {}))
    log.lose(changes.pop("named", 1))
    log.steps(changes.pop("again", 7), STEPS, **changes.pop("steps", {}))
    log.finish(**changes)


def test_a_run_that_survived_a_kill_passes_every_invariant(log):
    survive_a_kill(log)
    found = evidence(log)
    assert not_passed(found) == {}
    (measured,) = checker.measure(found)
    assert (measured["index"], measured["kind"], measured["victim"], measured["step"]) == (0, "sigkill", 1, 9)
    assert measured["detected_as"] == "worker_lost" and measured["attributed_correctly"] is True
    assert measured["detect_seconds"] == pytest.approx(0.5), "to the start of the next process"
    # 0.5 s to the start, 2 s to be ready, and steps 7 to 10 of 0.1 s: 10 is the first that is new
    assert measured["recover_seconds"] == pytest.approx(0.5 + 2 + 0.4)
    json.dumps(measured)


@pytest.mark.parametrize(
    ("changes", "invariant"),
    [
        ({"weights": "x" * 64}, checker.EQUAL),
        ({"state": "x" * 64}, checker.EQUAL),
        ({"steps": {"loss": 2.0}}, checker.EQUAL),
        ({"steps": {"samples": "others"}}, checker.SAMPLES),
        ({"named": 0}, checker.ATTRIBUTED),
        ({"start": {"after": 11.0}}, checker.DETECTED),
        ({"start": {"seconds": 31.0}}, checker.RECOVERED),
        ({"resumed": 0, "again": 1}, checker.KEPT),
    ],
    ids=str,
)
def test_a_deviation_of_a_run_is_found(log, changes, invariant):
    survive_a_kill(log, **changes)
    found = answers(evidence(log))
    assert found[invariant].answer == "fail" and found[invariant].why, {n: a for n, a in found.items() if a.why}
    others = {name for name, answer in found.items() if answer.answer != "pass"} - {invariant}
    assert others <= {checker.EQUAL}, "another result of a replayed step is also an unequal one"


def test_with_islands_the_log_may_be_behind_by_the_steps_since_they_met(log):
    """Killed in step 10, when the log had six steps."""
    log.strike(last=6)
    log.start(6)
    log.lose()
    log.complete(7)
    assert answers(evidence(log))[checker.ATTRIBUTED].answer == "fail"
    islands = {"islands": {"count": 2, "inner_steps": 4}}
    assert answers(evidence(log, config=islands))[checker.ATTRIBUTED].answer == "pass"
    assert (
        answers(evidence(log, config={"islands": {"count": 2, "inner_steps": 1}}))[checker.ATTRIBUTED].answer == "fail"
    )


def test_a_run_that_did_not_finish_is_not_equal(log):
    log.strike()
    found = not_passed(evidence(log, statuses=(1,)))
    assert found[checker.EQUAL] == found[checker.STATUS] == found[checker.RECOVERED] == "fail"


def test_a_fault_that_never_fired_is_unknown_and_never_passed(log):
    log.start(0)
    log.complete(1)
    found = not_passed(evidence(log))
    assert found == dict.fromkeys((checker.FIRED, checker.DETECTED, checker.RECOVERED, checker.ATTRIBUTED), "unknown")


@pytest.mark.parametrize(
    ("kinds", "fired", "unasked"),
    [
        ([], 0, {checker.FIRED, checker.DETECTED, checker.RECOVERED, checker.ATTRIBUTED}),
        (["slow_rank"], 1, {checker.DETECTED, checker.ATTRIBUTED}),
        (["clock_jump"], 1, {checker.DETECTED, checker.RECOVERED, checker.ATTRIBUTED}),
        (["slow_rank", "sigkill"], 1, set()),
    ],
    ids=["none", "slow_rank", "clock_jump", "slow_rank and sigkill"],
)
def test_what_is_asked_of_no_fault_is_not_applicable_and_never_passed(log, kinds, fired, unasked):
    log.start(0)
    log.steps(1, 9)
    for number, kind in enumerate(kinds[:fired]):
        log.fire(number, kind)
    log.complete(10)
    found = answers(evidence(log, config={"faults": [{"kind": kind, "rank": 1, "at_step": 10} for kind in kinds]}))
    assert {name for name, answer in found.items() if answer.answer == checker.NOT_ASKED} == unasked
    if "sigkill" in kinds:  # asked of a fault that did not fire
        assert {found[name].answer for name in (checker.DETECTED, checker.ATTRIBUTED)} == {"unknown"}


@pytest.mark.parametrize(
    ("transport", "restarts", "answer"),
    [("tcp", True, "pass"), ("tcp", False, "fail"), ("mptcp", True, "fail"), ("mptcp", False, "pass")],
)
def test_a_link_of_two_that_dies_must_be_noticed_over_tcp_and_must_not_over_mptcp(log, transport, restarts, answer):
    log.strike(kind="link_dies_of_two", victim=None)
    if restarts:
        log.start(6)
        log.lose()
    log.complete(7 if restarts else 10)
    found = answers(evidence(log, {"kind": "link_dies_of_two", "at_step": 10}, transport=transport))
    assert found[checker.ATTRIBUTED].answer == answer
    if transport == "mptcp" and restarts:
        assert "false alarm: " in found[checker.ATTRIBUTED].why


def test_a_run_that_ended_before_its_first_save_has_kept_no_checkpoint(log):
    log.strike(last=3)
    assert answers(evidence(log, statuses=(1,)))[checker.KEPT].answer == checker.NOT_ASKED


def test_a_fault_that_never_fired_is_reported_once_with_its_reason(log):
    faults = [KILL, KILL | {"at_step": 11}, {"kind": "node_killed", "at_step": 10}]
    log.start(0)
    log.write(events.Warned(message="the fault sigkill on rank 1 at step 11, before_forward did not fire: no rank 1"))
    log.complete(1)
    notes = ["node_killed on the last node at step 10 cannot be made: no node", "a job did not end within 9 s"]
    assert answers(evidence(log, *faults, notes=notes))[checker.FIRED].why == (
        "sigkill on rank 1 at step 10, before_forward never fired; "
        "the fault sigkill on rank 1 at step 11, before_forward did not fire: no rank 1; "
        "node_killed on the last node at step 10 cannot be made: no node; and 1 more"
    )


def test_a_fault_that_nothing_in_the_log_reports_was_not_named(log):
    log.strike(kind="nan_loss")
    log.complete(10)
    found = not_passed(evidence(log, {"kind": "nan_loss", "rank": 1, "at_step": 10}))
    assert found == {checker.ATTRIBUTED: "fail", checker.DETECTED: "fail"}


def test_a_value_that_is_not_finite_is_reported_with_its_step(log):
    log.strike(kind="nan_loss")
    log.write(NotFinite(step=10, loss=float("nan"), grad_norm=1.0, trial=0))
    log.complete(10)
    right = evidence(log, {"kind": "nan_loss", "rank": 1, "at_step": 10})
    assert not_passed(right) == {}
    assert checker.measure(right)[0]["detect_seconds"] == pytest.approx(0.1)
    wrong = answers(evidence(log, {"kind": "nan_loss", "rank": 1, "at_step": 7}))[checker.ATTRIBUTED]
    assert wrong.answer == "fail" and "step 10" in wrong.why


def hang(step: int, culprit: int) -> Hung:
    culprits = [{"rank": culprit, "point": "before_forward", "step": step, "why": "it is stopped"}]
    return Hung(step=step, point="before_reduce", seconds=3.0, culprits=culprits, collective=None, stacks="")


@pytest.mark.parametrize(("culprit", "answer"), [(1, "pass"), (0, "fail")])
def test_a_hang_must_name_the_rank_that_hung(log, culprit, answer):
    log.strike(kind="stopped")
    log.write(hang(9, culprit), after=3.0)
    log.start(6)
    log.lose(0)
    log.complete(7)
    stop = {"kind": "stopped", "rank": 1, "at_step": 10, "phase": "before_forward"}
    found = evidence(log, stop)
    assert answers(found)[checker.ATTRIBUTED].answer == answer
    assert checker.measure(found)[0]["detect_seconds"] == pytest.approx(3.0)


def test_an_alarm_that_nothing_caused_is_false(log):
    log.strike(kind="slow_rank")
    log.write(hang(9, 1), after=3.0)
    log.start(6)
    log.complete(7)
    found = answers(evidence(log, {"kind": "slow_rank", "rank": 1, "at_step": 10}))[checker.ATTRIBUTED]
    assert found.answer == "fail" and "false alarm" in found.why


def test_a_crash_that_no_fault_made_is_a_false_alarm_though_a_fault_fired_just_before(log):
    log.strike()
    log.start(6)
    log.lose()
    log.steps(7, 8)
    log.start(6)
    log.lose(0)
    log.complete(7)
    found = answers(evidence(log))[checker.ATTRIBUTED]
    assert found.answer == "fail" and "false alarm" in found.why


def test_a_peer_that_reports_the_loss_of_a_rank_has_detected_it(log):
    log.strike()
    lost = AttemptEnded(status="failed", step=9, reason="lost a peer", weights_sha256=None, state_sha256=None)
    log.write(lost, after=0.2)
    log.start(6, after=11.0)
    log.lose(1)
    log.complete(7)
    found = evidence(log)
    assert not_passed(found) == {}
    assert checker.measure(found)[0]["detect_seconds"] == pytest.approx(0.2)


@pytest.mark.parametrize("named", [0, 1])
def test_the_unreported_one_of_two_faults_in_an_attempt_counts_neither_way(log, named):
    log.strike(0)
    log.fire(1, victim=0)
    log.start(6)
    log.lose(named)
    log.complete(7)
    found = evidence(log, KILL, KILL | {"rank": 0})
    assert not_passed(found) == {}
    assert sorted(str(fault["attributed_correctly"]) for fault in checker.measure(found)) == ["None", "True"]


def test_a_death_that_came_with_damage_to_a_checkpoint_is_not_held_against_another_fault(log):
    log.strike(0, kind="flipped_shard")
    log.fire(1, victim=0)
    log.start_over(CheckpointRejected(step=6, reason="does not match its checksum"))
    log.lose(1)
    log.complete(1)
    found = evidence(log, {"kind": "flipped_shard", "rank": 1, "at_step": 9}, KILL | {"rank": 0})
    assert not_passed(found) == {}
    assert [fault["attributed_correctly"] for fault in checker.measure(found)] == [True, None]


def test_a_rank_that_died_while_starting_is_reported_by_the_next_attempt(log):
    log.strike(0)
    log.attempt += 1
    log.fire(1, victim=0, step=6)  # in_load of attempt 1, which leaves no other event
    log.start(6)
    log.lose(0, pid=4711)  # belongs to no attempt that wrote anything
    log.complete(7)
    measured = checker.measure(evidence(log, KILL, {"kind": "sigkill", "rank": 0, "phase": "in_load"}))
    assert measured[1]["attributed_correctly"] is True and measured[1]["detected_as"] == "worker_lost"


@pytest.mark.parametrize("told", [(0, 1), (0,), (1,)])
def test_of_two_ranks_that_died_while_starting_the_launcher_may_have_seen_only_one(log, told):
    """It ended the other one, which was dead already."""
    log.strike(0)
    log.attempt += 1
    for index in (1, 2):
        log.fire(index, victim=index - 1, step=6)
    log.start(6)
    log.lose(1, pid=102)
    died = [{"rank": rank, "pid": 4711 + rank, "exitcode": -9, "signal": "SIGKILL"} for rank in told]
    log.write(logs.lost(*died, reason="ended by SIGKILL"))
    log.complete(7)
    found = evidence(log, KILL, *({"kind": "sigkill", "rank": rank, "phase": "in_load"} for rank in (0, 1)))
    assert not_passed(found) == {}
    reported = [fault["attributed_correctly"] for fault in checker.measure(found)]
    assert reported == [True, *(True if rank == told[0] else None for rank in (0, 1))]


def test_a_damaged_checkpoint_is_reported_by_the_attempt_that_met_it_and_may_then_be_older(log):
    log.strike(kind="flipped_shard", last=7)
    log.start_over(CheckpointRejected(step=6, reason="does not match its checksum"))
    log.lose()
    log.complete(1)
    damage = {"kind": "flipped_shard", "rank": 1, "at_step": 8}
    found = evidence(log, damage)
    assert not_passed(found) == {}
    assert checker.measure(found)[0]["detected_as"] == "checkpoint_rejected"


BREAKS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "a shard that does not match": (lambda run: (files.final_path(run, 12) / "shard").write_text("x"), checker.KEPT),
    "the last checkpoint gone": (lambda run: files.discard(files.final_path(run, 12)), checker.KEPT),
    "a kept checkpoint gone": (lambda run: files.discard(files.final_path(run, 6)), checker.KEPT),
    "an unfinished save": (lambda run: files.stage(run, 12), checker.CLEAN),
    "a stray file": (lambda run: (run / "core.123").write_text(""), checker.CLEAN),
}


@pytest.mark.parametrize("what", BREAKS)
def test_damage_on_disk_is_found(log, what):
    survive_a_kill(log)
    assert not_passed(evidence(log)) == {}
    act, invariant = BREAKS[what]
    act(log.run)
    assert not_passed(evidence(log)) == {invariant: "fail"}


def test_an_older_checkpoint_that_retention_removed_is_not_lost(log):
    survive_a_kill(log)
    files.discard(files.final_path(log.run, 6))
    found = evidence(log, config={"checkpoint": {"every_steps": EVERY, "keep_last": 1}})
    assert not_passed(found) == {}
    kept = evidence(log, config={"checkpoint": {"every_steps": EVERY, "keep_last": 1, "keep_every_steps": 6}})
    assert not_passed(kept) == {checker.KEPT: "fail"}


def test_a_process_that_outlives_its_job_is_a_leftover(log):
    survive_a_kill(log)
    assert not_passed(evidence(log, leftovers=["process 7"])) == {checker.CLEAN: "fail"}


@pytest.mark.parametrize(
    ("statuses", "problem"), [((0,), False), ((75, 0), True), ((1,), True), ((0, None), True), ((), True)], ids=str
)
def test_a_status_that_no_fault_explains_is_wrong(log, statuses, problem):
    survive_a_kill(log)
    assert not_passed(evidence(log, statuses=statuses)) == ({checker.STATUS: "fail"} if problem else {})


def test_notice_to_leave_explains_a_status_of_75_but_not_before_it_was_given(log):
    log.strike(kind="sigterm")
    log.write(events.StopRequested(signal="SIGTERM", step=10), after=0.0)
    log.steps(10, 10)
    log.save(10)
    log.write(AttemptEnded(status="preempted", step=10, reason="SIGTERM", weights_sha256=None, state_sha256=None))
    left = log.now
    log.start(10)
    log.complete(11)
    notice = {"kind": "sigterm", "rank": 1, "at_step": 10}
    last = {"started": left + 0.2, "ended": log.now, "status": 0}
    found = evidence(log, notice, launches=[{"started": 999.5, "ended": left + 0.1, "status": 75}, last])
    assert not_passed(found) == {}
    assert checker.measure(found)[0]["recover_seconds"] == pytest.approx(2.8, abs=0.1)
    early = [{"started": 999.0, "ended": 1000.0, "status": 75}, last | {"started": 1000.0}]
    assert not_passed(evidence(log, notice, launches=early)) == {checker.STATUS: "fail"}


@pytest.mark.parametrize("seconds", [-3, 70])
def test_a_log_of_more_time_than_the_job_had_or_of_much_less_does_not_add_up(log, seconds):
    survive_a_kill(log)
    launch = {"started": log.started - 0.5 * (seconds > 0), "ended": log.now + seconds, "status": 0}
    assert not_passed(evidence(log, launches=[launch])) == {checker.TIME: "fail"}


def test_an_account_of_time_that_does_not_add_up_fails_its_run_and_ends_nothing_else(log, monkeypatch):
    survive_a_kill(log)
    advance = goodput._Ledger.advance

    def twice(ledger: Any, to: float, rest: str, **claims: float) -> dict[str, float]:
        ledger._parts["other"].append(1.0)
        return advance(ledger, to, rest, **claims)

    monkeypatch.setattr(goodput._Ledger, "advance", twice)
    found = answers(evidence(log))[checker.TIME]
    assert found.answer == "fail" and "the parts sum to" in found.why


FLIP = {"kind": "flip_weights", "rank": 1, "at_step": 10}


@pytest.mark.parametrize(
    ("weights", "answer"), [("x" * 64, "undetected"), ("w" * 64, "pass")], ids=["unequal", "equal"]
)
def test_silent_corruption_is_undetected_where_it_shows_and_said_to_leave_no_trace_where_not(log, weights, answer):
    log.strike(kind="flip_weights")
    log.complete(10, weights)
    found = answers(evidence(log, FLIP))
    assert found[checker.EQUAL].answer == answer and found[checker.EQUAL].why
    unasked = {name for name, given in found.items() if given.answer == checker.NOT_ASKED}
    assert unasked == {checker.DETECTED, checker.ATTRIBUTED}
    assert {name for name, given in found.items() if given.answer != "pass"} <= {checker.EQUAL, *unasked}


def test_without_exact_sums_equality_is_unknown(log):
    survive_a_kill(log, weights="x" * 64)
    inexact = dataclasses.replace(REFERENCE, exact=False)
    assert not_passed(evidence(log, reference=inexact)) == {checker.EQUAL: "unknown"}


def test_a_damaged_log_fails_everything_in_one_line(log):
    survive_a_kill(log)
    path = next(events.events_directory(log.run).glob("attempt-*"))
    path.write_text("no event\n" + path.read_text())
    assert set(not_passed(evidence(log)).values()) == {"fail"}


def test_a_failed_save_is_reported_with_its_step(log):
    log.start(0)
    log.fire(kind="no_space")
    log.steps(1, 5)
    log.write(CheckpointFailed(step=6, reason="No space left", in_a_row=1, on_rank=1, stall_seconds=0.0))
    log.complete(6)
    assert not_passed(evidence(log, {"kind": "no_space", "rank": 1, "at_step": 6})) == {}
    found = answers(evidence(log, {"kind": "no_space", "rank": 1, "at_step": 12}))[checker.ATTRIBUTED]
    assert found.answer == "fail" and "step 6" in found.why


def test_a_rank_that_dies_of_a_save_that_only_failed_is_a_false_alarm(log):
    log.strike(kind="no_space", step=6, last=5)
    log.write(CheckpointFailed(step=6, reason="No space left on device", in_a_row=1, stall_seconds=0.0))
    log.start(0)
    log.lose(1)
    log.complete(1)
    found = answers(evidence(log, {"kind": "no_space", "rank": 1, "at_step": 6}))[checker.ATTRIBUTED]
    assert found.answer == "fail" and "false alarm" in found.why


@pytest.mark.parametrize(("kind", "answer"), [("vanished_checkpoints", checker.NOT_ASKED), ("slow_rank", "fail")])
def test_a_save_may_fail_where_its_directory_had_vanished_and_not_beside_a_slow_rank(log, kind, answer):
    log.strike(kind=kind)
    log.write(CheckpointFailed(step=6, reason="No such file or directory", in_a_row=1, stall_seconds=0.0))
    log.complete(10)
    found = evidence(log, {"kind": kind, "rank": 1, "at_step": 10})
    assert answers(found)[checker.ATTRIBUTED].answer == answer


# Quorum mode: the others go on

QUORUM = {"elastic": {"mode": "quorum"}}
SHARES: dict[str, Any] = {"kept": {"0": [0, 3], "2": [2, 5]}, "given": {"0": [1, 6], "2": [4, 7]}}


def go_on(log: Log, *lost: int, step: int = 9, joined: tuple[int, ...] = (), **changes: Any) -> None:
    """The members that are left have met."""
    values: dict[str, Any] = {"epoch": 2, "members": [0, 2], "seconds": 0.1} | SHARES | changes
    why = {str(member): "its connection closed" for member in lost}
    log.write(MembersChanged(lost=why, joined=list(joined), step=step, **values))


def strike_member(log: Log, member: int = 1, victim: int = 1, step: int = 10, last: int = 9) -> None:
    if log.attempt < 0:
        log.start(0, ranks=3)
        log.steps(1, last)
    log.fault("sigkill", 0.05, victim, step, 0, member=member)


def test_a_death_that_the_others_outlive_passes_every_invariant(log):
    strike_member(log)
    go_on(log, 1)
    log.complete(10)
    found = evidence(log, KILL, config=QUORUM, ranks=3)
    assert not_passed(found) == {}
    (measured,) = checker.measure(found)
    assert (measured["detected_as"], measured["attributed_correctly"]) == ("worker_lost", True)
    assert measured["detect_seconds"] == pytest.approx(0.1) and measured["recover_seconds"] == pytest.approx(0.2)


def test_a_successor_is_reported_by_its_own_number(log):
    """The worker in place 1 is the fifth of the job; a report of member 1, who is long dead, is of somebody else."""
    for named, right in ((4, True), (1, False)):
        made = Log(log.run.with_name(f"named {named}"))
        strike_member(made, member=4)
        go_on(made, named)
        made.complete(10)
        (measured,) = checker.measure(evidence(made, KILL, config=QUORUM, ranks=3))
        assert measured["attributed_correctly"] is right


def test_the_loss_of_two_workers_in_one_epoch_reports_both_faults(log):
    strike_member(log)
    log.fault("sigkill", 0.01, 2, 10, 1, member=2)
    go_on(log, 2, 1, members=[0], kept={"0": [0, 3, 6]}, given={"0": [1, 2, 4, 5, 7]})
    log.complete(10)
    faults = KILL, KILL | {"rank": 2}
    assert not_passed(evidence(log, *faults, config=QUORUM, ranks=3)) == {}


@pytest.mark.parametrize(("sentinel", "answer"), [({"audit": "1"}, "pass"), ({}, "fail")], ids=["watched", "unwatched"])
def test_workers_that_leave_a_damaged_token_store_are_no_false_alarm_where_a_sentinel_reads_it(log, sentinel, answer):
    log.start(0, ranks=3)
    log.steps(1, 9)
    log.fault("corrupt_tokens", 0.05, 1, 10, 0, member=1)
    go_on(log, 1, kept={}, given={"0": [0, 2, 4, 6], "2": [1, 3, 5, 7]})
    go_on(log, 2, epoch=3, members=[0], kept={}, given={"0": list(range(8))})
    log.complete(10)
    fault = {"kind": "corrupt_tokens", "rank": 1, "at_step": 10}
    found = answers(evidence(log, fault, config=QUORUM | {"sentinel": sentinel}, ranks=3))[checker.ATTRIBUTED]
    assert found.answer == answer, found.why


def test_a_late_fault_is_held_against_the_step_in_which_it_struck(log):
    """Its victim was away at step 4, and the fault waited for its successor."""
    strike_member(log, member=3, step=10)
    go_on(log, 3)
    log.complete(10)
    assert not_passed(evidence(log, KILL | {"at_step": 4}, config=QUORUM, ranks=3)) == {}


@pytest.mark.parametrize(
    ("shares", "answer"),
    [
        ({"given": {"0": [1, 6], "2": [4]}}, "fail"),
        ({"given": {"0": [1, 6, 7], "2": [4, 7]}}, "fail"),
        ({"kept": {}, "given": {"0": [0, 2, 4, 6], "2": [1, 3, 5, 7]}}, "pass"),
    ],
    ids=["a micro-batch is lost", "one is computed twice", "nothing was kept"],
)
def test_each_micro_batch_of_an_interrupted_step_is_kept_or_given_once(log, shares, answer):
    strike_member(log)
    go_on(log, 1, **shares)
    log.complete(10)
    assert answers(evidence(log, KILL, config=QUORUM, ranks=3))["every sample once"].answer == answer


def test_a_step_is_committed_once_unless_nobody_is_left_who_has_its_state(log):
    strike_member(log)
    go_on(log, 1)
    log.complete(9)
    found = answers(evidence(log, KILL, config=QUORUM, ranks=3))["every sample once"]
    assert (found.answer, found.why) == ("fail", "step 9 was committed again, though its state was not lost")
    log = Log(log.run.with_name("all died"))
    strike_member(log)
    go_on(log, 0, 1, 2, step=6, members=[3, 4], joined=(3, 4), kept={}, given={})
    log.complete(7)
    assert not_passed(evidence(log, KILL, config=QUORUM, ranks=3)) == {}


def test_where_all_have_died_the_newest_checkpoint_is_used(log):
    strike_member(log)
    go_on(log, 0, 1, 2, step=0, members=[3, 4], joined=(3, 4), kept={}, given={})
    log.complete(1)
    found = answers(evidence(log, KILL, config=QUORUM, ranks=3))["no checkpoint lost"]
    assert (found.answer, found.why) == ("fail", "epoch 2 began at step 0, though 6 was committed")


def test_the_loss_of_a_worker_that_no_fault_hit_is_a_false_alarm(log):
    strike_member(log)
    go_on(log, 1)
    go_on(log, 2, epoch=3, members=[0], kept={}, given={"0": [*range(8)]})
    log.complete(10)
    found = answers(evidence(log, KILL, config=QUORUM, ranks=3))["attributed correctly"]
    assert found.answer == "fail" and "false alarm: in step 10 worker 2 was lost" in found.why
