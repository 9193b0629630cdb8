"""Promises about hangs: which rank is named, what is written down, and that every process ends in time."""

import json
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest

from tests import hang_worker
from tests.hang_worker import FAULTY_RANK, FAULTY_STEP
from trainer.log import events
from trainer.sentinel import hang
from trainer.sentinel.hang import Watchdog
from trainer.sentinel.hang_diagnosis import (
    Collective,
    RankStatus,
    diagnose,
    is_recorded,
    patience,
    pending_collective,
)

TIMEOUT = 1.0
PROMISED_SECONDS = 2.5  # after the timeout, until the process has ended


def status(rank: int, phase: str = "before_reduce", step: int = 5, idle: float = 10.0, **rest: Any) -> RankStatus:
    defaults = {"answers": 2, "recorded": True}
    return RankStatus(rank=rank, phase=phase, step=step, idle_seconds=idle, **(defaults | rest))


def collective(
    sequence: int = 9, name: str = "gloo:all_reduce", group: str = "0", sizes: str = "[[7, 3]]"
) -> Collective:
    return Collective(name, sequence, group, sizes)


def named(statuses: list[RankStatus], limit: float = 10.0) -> list[int]:
    return [culprit["rank"] for culprit in diagnose(statuses, limit)]


WAITING = [status(0, pending=collective()), status(2, pending=collective())]


@pytest.mark.parametrize(
    ("culprit", "point", "step", "why"),
    [
        (status(1, "before_update", 4, alive=False), "before_update", 4, "stopped"),
        (status(1, "in_eval", 3, alive=False), "unknown", 5, "last seen at in_eval of step 3"),
        (
            status(1, "before_forward"),
            "before_forward",
            5,
            "in no collective, while rank 0 waits in gloo:all_",
        ),
    ],
    ids=["does not answer", "does not answer since long", "in no collective"],
)
def test_the_rank_that_others_wait_for_is_named_with_where_it_is(
    culprit: RankStatus, point: str, step: int, why: str
) -> None:
    (found,) = diagnose([*WAITING, culprit], 10.0)
    assert (found["rank"], found["point"], found["step"]) == (1, point, step)
    assert why in found["why"]


def test_a_slow_rank_is_named_only_if_no_rank_is_stuck() -> None:
    slow, stuck = status(1, "in_eval", idle=0.1), status(3, "before_forward")
    assert named([*WAITING, slow]) == [1]
    assert named([*WAITING, slow, stuck]) == [3]
    assert named([*WAITING, slow, status(3, alive=False)]) == [3]
    assert named([*WAITING, stuck, status(4, alive=False)]) == [4, 3]


def test_among_waiting_ranks_the_minority_is_named_and_among_equals_none() -> None:
    ahead = status(1, step=6, pending=collective())
    assert named([*WAITING, ahead]) == [1]
    assert named([*WAITING, status(1, pending=collective(name="gloo:barrier"))]) == [1]
    assert named([*WAITING, status(1, pending=collective(sizes="[[1]]"))]) == [1]
    assert named([WAITING[0], ahead]) == []
    assert named([*WAITING, ahead, status(3, step=6, pending=collective())]) == []
    assert named(WAITING) == []  # a cut network: the cause is unknown
    assert named([status(0)]) == [0], "a rank alone can only blame itself"


def test_where_ranks_meet_rarely_one_waits_while_all_answer_and_another_makes_progress() -> None:
    works = status(1, "before_forward", idle=0.4, left_seconds=0.6)
    assert patience(WAITING[0], [*WAITING, works]) == 0.6
    assert patience(WAITING[0], [*WAITING, replace(works, left_seconds=0.0)]) == 0, "nobody makes progress"
    assert patience(WAITING[0], [*WAITING, works, status(3, alive=False)]) == 0
    assert patience(works, [*WAITING, works]) == 0, "it is stuck itself, in no collective"
    assert patience(WAITING[0], WAITING[:1]) == 0


def test_healthy_ranks_of_a_hybrid_mesh_wait_in_different_groups() -> None:
    statuses = [status(0, pending=collective(group="3")), status(1, pending=collective(group="4"))]
    assert named(statuses) == []
    assert named([*statuses, status(2, pending=collective(group="3")), status(3, "before_forward")]) == [3]


def test_without_flight_recorder_the_rank_that_is_behind_is_named() -> None:
    off: dict[str, Any] = {"recorded": False}
    assert named([status(0, **off), status(1, "before_forward", **off), status(2, **off)]) == [1]
    assert named([status(0, **off), status(1, "before_update", 4, **off)]) == [1]
    # An evaluation and a save of a step come before the next step's forward, which counts the same completed steps.
    for phase in ("after_update", "in_eval", "waiting_for_save", "after_save"):
        assert named([status(0, "before_forward", **off), status(1, phase, **off)]) == [1]
    assert named([status(0, **off), status(1, **off)]) == []
    assert named([status(0, **off)]) == []
    assert named([status(0, **off), status(1, "a phase of tomorrow", **off)]) == []


def test_the_oldest_unfinished_collective_is_the_pending_one() -> None:
    def entry(number: int, retired: bool, state: str = "scheduled") -> dict[str, Any]:
        return {
            "record_id": number, "collective_seq_id": number + 1, "retired": retired, "state": state,
            "profiling_name": "gloo:all_reduce", "process_group": ["0", "default_pg"],
            "input_dtypes": ["Float"], "input_sizes": [[7, 3]],
        }  # fmt: skip

    found = pending_collective(
        {"entries": [entry(0, True), entry(3, False), entry(2, False), entry(1, False, "completed")]}
    )
    assert str(found) == 'gloo:all_reduce #3 of group "0 default_pg", Float [[7, 3]]'
    assert pending_collective({"entries": [entry(0, True)]}) is None
    assert pending_collective({}) is None


# NCCL's record, in the shape that torch writes: `state` is "scheduled" until NCCL's own thread has seen more.

NCCL = {
    "version": "2.10",
    "pg_config": {"0": {"name": "0", "desc": "default_pg", "ranks": "[0, 1, 2]"}},
    "pg_status": {"0": {"last_enqueued_collective": 8, "last_started_collective": -1, "last_completed_collective": 6}},
}


def nccl(number: int, state: str, name: str = "nccl:all_reduce", at: int = 0) -> dict[str, Any]:
    return {
        "record_id": number, "pg_id": 0, "process_group": ["0", "default_pg"], "collective_seq_id": number,
        "p2p_seq_id": 0, "op_id": number, "profiling_name": name, "time_created_ns": at or 10**18 + number,
        "input_sizes": [[124475904]], "input_dtypes": ["Float"], "output_sizes": [[124475904]],
        "output_dtypes": ["Float"], "state": state, "time_discovered_started_ns": None,
        "time_discovered_completed_ns": None, "retired": state == "completed", "timeout_ms": 660000, "is_p2p": False,
    }  # fmt: skip


def answers(rank: int, gloo: dict[str, Any], nccl_trace: dict[str, Any], phase: str = "before_reduce") -> RankStatus:
    """The status that a rank publishes with these two records."""
    recorded = is_recorded(gloo) and is_recorded(nccl_trace)
    return status(rank, phase, recorded=recorded, pending=pending_collective(gloo, nccl_trace))


def gloo(*states: str, at: int = 1) -> dict[str, Any]:
    entries = [nccl(n, state, "gloo:all_gather", at=at + n) for n, state in enumerate(states)]
    return {"entries": entries}


def test_ranks_that_wait_in_nccl_are_not_blamed_and_the_rank_that_is_in_no_collective_is():
    met = gloo("completed")
    waits = NCCL | {"entries": [nccl(6, "completed"), nccl(7, "started"), nccl(8, "scheduled")]}
    absent = NCCL | {"entries": [nccl(5, "completed"), nccl(6, "completed")]}
    found = diagnose([answers(0, met, waits), answers(1, met, absent, "before_backward"), answers(2, met, waits)], 10.0)
    assert [culprit["rank"] for culprit in found] == [1]
    assert 'waits in nccl:all_reduce #7 of group "0 default_pg", Float [[124475904]]' in found[0]["why"]


@pytest.mark.parametrize("off", [{}, NCCL, NCCL | {"entries": []}], ids=["no record", "no entries", "none yet"])
def test_where_nccl_records_nothing_nobody_is_blamed_for_being_in_no_collective(off: dict[str, Any]):
    """gloo's record, without a pending collective, then said of every rank that the others wait for it."""
    met = gloo("completed")
    assert named([answers(rank, met, off) for rank in range(3)]) == []
    behind = answers(1, met, off, "before_forward")
    assert named([answers(0, met, off), behind, answers(2, met, off)]) == [1], "positions are still compared"
    dead = replace(behind, alive=False)
    assert named([answers(0, met, off), dead, answers(2, met, off)]) == [1]


def test_a_dead_peer_is_named_while_its_survivors_wait_in_nccl_which_only_times_out():
    waits = answers(0, gloo("completed"), NCCL | {"entries": [nccl(7, "scheduled")]})
    (found,) = diagnose([waits, status(1, "before_forward", 5, alive=False), replace(waits, rank=2)], 10.0)
    assert found["rank"] == 1 and "while rank 0 waits in nccl:all_reduce #7" in found["why"]


def test_a_kernel_that_never_ends_leaves_all_ranks_waiting_and_no_survivor_blamed():
    waits = answers(0, gloo("completed"), NCCL | {"entries": [nccl(7, "scheduled")]})
    assert named([replace(waits, rank=rank) for rank in range(3)]) == []


def test_a_rank_that_waits_for_the_others_over_gloo_between_steps_waits_too():
    done = NCCL | {"entries": [nccl(6, "completed")]}
    waits = answers(0, gloo("completed", "scheduled"), done, "waiting_for_save")
    assert waits.pending is not None and waits.pending.name == "gloo:all_gather"
    assert named([waits, answers(1, gloo("completed"), done, "waiting_for_save"), replace(waits, rank=2)]) == [1]


def test_of_two_records_the_older_pending_collective_counts():
    both = gloo("scheduled", at=50), NCCL | {"entries": [nccl(3, "scheduled", at=40)]}
    assert getattr(pending_collective(*both), "name", None) == "nccl:all_reduce"
    assert getattr(pending_collective(gloo("scheduled", at=30), both[1]), "name", None) == "gloo:all_gather"


@pytest.mark.parametrize("config", ["cpu:gloo,cuda:nccl", "cpu:gloo,cuda:gloo", "gloo"])
def test_the_record_of_nccl_is_read_where_ranks_train_over_it(monkeypatch, config: str):
    import torch.distributed as dist

    c10d = sys.modules["torch._C._distributed_c10d"]
    monkeypatch.setattr(c10d, "_dump_nccl_trace_json", lambda: b'{"entries": ["nccl"]}', raising=False)
    monkeypatch.setattr(c10d, "_dump_fr_trace_json", lambda: b'{"entries": ["gloo"]}')
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend_config", lambda: config)
    read = [json.loads(text)["entries"] for text in hang.flight_recorder_traces()]
    assert read == [["gloo"], ["nccl"]][: 1 + ("nccl" in config)]
    monkeypatch.delattr(c10d, "_dump_nccl_trace_json")
    read = [json.loads(text).get("entries") for text in hang.flight_recorder_traces()]
    assert read == [["gloo"], None][: 1 + ("nccl" in config)], "a torch without that record: nothing is known"


class Kennel:
    """A watchdog of this process whose reports and exits are only noted."""

    def __init__(self, run: Path, step_timeout: float = 0.4, startup_timeout: float = 0.4, attempt: int = 3) -> None:
        self.reports: list[events.Hung] = []
        self.exits: list[int] = []
        self.left = threading.Event()
        self.dog = Watchdog(run, 0, 1, attempt, step_timeout, startup_timeout, self.reports.append, self.leave)

    def leave(self, status: int) -> None:
        self.exits.append(status)
        self.left.set()

    def __enter__(self) -> "Kennel":
        self.dog.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.dog.stop()


def files(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.rglob("*") if path.is_file())


def test_no_progress_is_reported_with_stacks_and_ends_the_process(tmp_path: Path) -> None:
    with Kennel(tmp_path) as kennel:
        kennel.dog.heartbeat("before_forward", 7)
        assert kennel.left.wait(5)
    (event,) = kennel.reports
    assert (event.step, event.point, event.stacks) == (7, "before_forward", "stacks/attempt-0003-rank-00000.txt")
    assert 0.4 <= event.seconds < 0.4 + PROMISED_SECONDS
    assert ([culprit["rank"] for culprit in event.culprits], event.collective, kennel.exits) == ([0], None, [1])
    stacks = (tmp_path / event.stacks).read_text()
    assert "is MainThread" in stacks and "test_no_progress_is_reported_with_stacks" in stacks


def test_slow_is_not_hung(tmp_path: Path) -> None:
    with Kennel(tmp_path, startup_timeout=30.0) as kennel:
        kennel.dog.heartbeat("startup", 0)
        time.sleep(0.8)  # kernels are compiled, say
        kennel.dog.heartbeat("after_update", 1)
        for _ in range(8):
            kennel.dog.heartbeat("in_eval", 1)
            time.sleep(0.15)
        assert not kennel.exits
        assert not (tmp_path / "stacks").exists()


def test_the_step_timeout_begins_after_the_first_step(tmp_path: Path) -> None:
    with Kennel(tmp_path, startup_timeout=30.0) as kennel:
        kennel.dog.heartbeat("after_update", 1)
        assert kennel.left.wait(5)


def test_other_threads_do_not_hide_that_the_main_thread_is_stuck(tmp_path: Path) -> None:
    with Kennel(tmp_path) as kennel:

        def save() -> None:
            while not kennel.left.wait(0.05):
                kennel.dog.heartbeat("in_save_shard", 1)

        thread = threading.Thread(target=save)
        thread.start()
        assert kennel.left.wait(5)
        thread.join()
    assert kennel.reports[0].point == "startup"


def test_progress_during_the_diagnosis_calls_it_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Kennel(tmp_path) as kennel:
        asked = threading.Event()

        def slow_request() -> int:
            asked.set()
            time.sleep(0.2)
            return 0

        monkeypatch.setattr(kennel.dog._files, "request", slow_request)
        assert asked.wait(5)
        kennel.dog.heartbeat("before_forward", 1)
        time.sleep(0.3)
        assert not kennel.exits
        assert kennel.left.wait(5), "it watches on"


def test_a_report_that_fails_or_blocks_does_not_keep_the_process(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def fail(event: events.Hung) -> None:
        raise OSError("no space left")

    kennel = Kennel(tmp_path)
    kennel.dog.report = fail
    with kennel:
        assert kennel.left.wait(5)
    never = threading.Event()
    kennel = Kennel(tmp_path)
    kennel.dog.report = lambda event: print(event, never.wait(10))
    started = time.monotonic()
    with kennel:
        assert kennel.left.wait(5)
        assert time.monotonic() - started < 0.4 + PROMISED_SECONDS
        never.set()
    assert "no space left" in capsys.readouterr().err


def test_a_vanished_run_directory_harms_nothing(tmp_path: Path, capfd: pytest.CaptureFixture) -> None:
    run = tmp_path / "run"
    run.mkdir()
    with Kennel(run, step_timeout=0.8, startup_timeout=0.8) as kennel:
        kennel.dog.heartbeat("before_forward", 1)
        time.sleep(0.15)
        shutil.rmtree(run)
        for step in range(6):
            kennel.dog.heartbeat("before_forward", step)
            time.sleep(0.15)
        assert not kennel.exits
        assert not run.exists(), "nothing brings it back"
        assert kennel.left.wait(5)
    assert kennel.reports[0].stacks == ""
    assert "test_a_vanished_run_directory" in capfd.readouterr().err, "stacks go to stderr instead"


def test_it_leaves_no_files_and_removes_those_of_dead_attempts(tmp_path: Path) -> None:
    live = tmp_path / "live"
    live.mkdir()
    (live / "attempt-0002-rank-00001.json").write_text("{}")
    (live / "attempt-0002-requests").write_text("1\n")
    with Kennel(tmp_path, step_timeout=30.0, startup_timeout=1.0) as kennel:
        time.sleep(0.3)
        assert files(tmp_path) == [
            "live/attempt-0003-rank-00000.forced", "live/attempt-0003-rank-00000.json", "live/attempt-0003-requests"
        ]  # fmt: skip
        assert not kennel.exits
    assert not live.exists()


def test_a_sign_of_progress_costs_less_than_two_microseconds(tmp_path: Path) -> None:
    with Kennel(tmp_path, 60.0, 60.0) as kennel:
        fastest = float("inf")
        for _ in range(20):
            started = time.perf_counter()
            for step in range(1000):
                kennel.dog.heartbeat("before_forward", step)
            fastest = min(fastest, (time.perf_counter() - started) / 1000)
    assert fastest < 2e-6


# Real ranks. A fork server has imported torch, so a rank starts in milliseconds.


@pytest.fixture(scope="module")
def context() -> Any:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "torch.distributed.fsdp", "tests.hang_worker"])
    return context


class Ranks:
    def __init__(self, context: Any, run: Path) -> None:
        self._context, self._run = context, run
        self.processes: list[ForkServerProcess] = []

    def start(self, ranks: int, fault: str) -> None:
        for rank in range(ranks):
            process = self._context.Process(
                target=hang_worker.main, args=(self._run, rank, ranks, TIMEOUT, fault), daemon=True
            )
            process.start()
            self.processes.append(process)

    def wait_until_struck(self) -> float:
        """Monotonic time of the fault."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            if (self._run / "struck").exists() and (text := (self._run / "struck").read_text()):
                return float(text)
            time.sleep(0.01)
        raise AssertionError(self.output())

    def wait_until_one_left(self) -> float:
        """Monotonic time of the first exit."""
        ended = multiprocessing.connection.wait([process.sentinel for process in self.processes], timeout=20)
        assert ended, self.output()
        return time.monotonic()

    def exits(self, *ranks: int) -> list[int | None]:
        for rank in ranks:
            self.processes[rank].join(10)
        return [self.processes[rank].exitcode for rank in ranks]

    def output(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self._run.glob("output-*.txt")))

    def hung(self) -> list[tuple[int, events.Hung]]:
        return [(e.rank, e.event) for e in events.read(self._run) if isinstance(e.event, events.Hung)]

    def stacks(self, rank: int, file: str = "txt") -> str:
        """The stack dump of a rank, or what its flight recorder held ("collectives.json")."""
        return (self._run / f"stacks/attempt-0000-rank-{rank:05d}.{file}").read_text()


@pytest.fixture
def ranks(context: Any, tmp_path: Path) -> Iterator[Ranks]:
    ranks = Ranks(context, tmp_path)
    yield ranks
    for process in ranks.processes:
        process.kill()
        process.join()


def hangs(ranks: Ranks, fault: str, size: int = 3) -> events.Hung:
    """The first report of a hang by a rank that waited for FAULTY_RANK."""
    ranks.start(size, fault)
    struck = ranks.wait_until_struck()
    seconds = ranks.wait_until_one_left() - struck
    print(f"{fault}: first exit after {seconds:.2f} s")
    assert seconds < TIMEOUT + PROMISED_SECONDS
    reports = ranks.hung()
    assert reports, ranks.output()
    for _, report in reports:
        assert TIMEOUT <= report.seconds < TIMEOUT + PROMISED_SECONDS
        assert [(c["rank"], c["step"]) for c in report.culprits] == [(FAULTY_RANK, FAULTY_STEP)], report
    return reports[0][1]


def test_a_stopped_rank_is_named_by_the_ranks_that_wait_for_it(ranks: Ranks) -> None:
    hangs(ranks, "stop")
    assert 1 in ranks.exits(0, 2)
    for _, report in ranks.hung():
        assert (report.point, report.step) == ("before_reduce", FAULTY_STEP)
        assert report.collective is not None
        assert report.collective.startswith("gloo:all_reduce") and "[[7, 3]]" in report.collective
        assert "does not answer" in report.culprits[0]["why"]
    for rank in (0, 2):
        assert "all_reduce" in ranks.stacks(rank)


@pytest.mark.parametrize(
    ("fault", "point", "stack"),
    [
        ("lock", "before_backward", "waits_for_a_lock"),
        ("data", "before_forward", "reads_data_for_ever"),
        ("fsdp", "before_forward", "waits_for_a_lock"),
        ("gil", None, "keeps_the_gil"),  # it cannot say where it is
    ],
)
def test_a_rank_that_is_stuck_is_named_and_its_stack_names_the_function(
    ranks: Ranks, fault: str, point: str | None, stack: str
) -> None:
    (culprit,) = hangs(ranks, fault).culprits
    assert ("does not answer" if point is None else "in no collective") in culprit["why"]
    assert point is None or culprit["point"] == point
    assert stack in ranks.stacks(FAULTY_RANK)
    if fault == "lock":
        for rank in (0, 2):
            assert "all_reduce" in ranks.stacks(rank)
            trace = ranks.stacks(rank, "collectives.json")
            assert json.loads(trace)["entries"][-1]["profiling_name"] == "gloo:all_reduce"


def test_a_rank_that_skipped_a_collective_is_named(ranks: Ranks) -> None:
    ranks.start(3, "skip")
    ranks.wait_until_struck()
    ranks.wait_until_one_left()
    reports = ranks.hung()
    assert reports, ranks.output()
    assert [culprit["rank"] for culprit in reports[0][1].culprits] == [FAULTY_RANK], reports


def test_where_ranks_meet_rarely_those_that_wait_for_one_that_works_train_on(ranks: Ranks) -> None:
    ranks.start(3, "apart")
    assert ranks.exits(0, 1, 2) == [0, 0, 0], ranks.output()
    assert ranks.hung() == []


def test_where_ranks_meet_rarely_one_that_stops_is_named_after_the_timeout(ranks: Ranks) -> None:
    assert "does not answer" in hangs(ranks, "apart, stop").culprits[0]["why"]


def test_ranks_stopped_for_long_train_on_when_they_are_continued(ranks: Ranks, tmp_path: Path) -> None:
    ranks.start(2, "slow")
    ranks.wait_until_struck()
    time.sleep(0.1)
    pids = [process.pid for process in ranks.processes if process.pid is not None]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(2.5 * TIMEOUT)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.1)
    assert ranks.exits(0, 1) == [0, 0], ranks.output()
    assert ranks.hung() == []
    assert not (tmp_path / "live").exists()
    assert not (tmp_path / "stacks").exists()
