"""Promises about the summary of a run, from its event log."""

import contextlib
import itertools
import json
import math
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.logs import NOBODY, ended, evaluated, started, step
from trainer.config import Config, parse
from trainer.errors import RunDirectoryError
from trainer.log import rundir
from trainer.log.events import AttemptStarted, CheckpointSaved, Event, EventLog, Warned, events_directory
from trainer.log.summary import summarise

CONFIG: Config = parse({"budget": {"steps": 60}, "elastic": {"step_timeout_seconds": 10.0}})


def new_run(path: Path) -> Path:
    path.mkdir(exist_ok=True)
    rundir.record(path, CONFIG, {"data_sha256": "d" * 64})
    return path


def write(run: Path, attempt: int, *events: Event, rank: int = 0, clock: Any = None) -> None:
    path = events_directory(run) / f"attempt-{attempt:04d}-rank-{rank:05d}.jsonl"
    clock = clock or itertools.count(1_000.0 * (attempt + 1)).__next__
    with contextlib.closing(EventLog(path, attempt, rank, clock)) as log:
        for event in events:
            log.append(event)


def started_here(pid: int, from_step: int = 0, **changes: Any) -> AttemptStarted:
    return started(from_step, host=socket.gethostname(), pid=pid, **changes)


@pytest.fixture(scope="module")
def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return new_run(tmp_path / "run")


def test_a_finished_run_says_all_that_inspect_promises(run: Path):
    write(
        run,
        0,
        started(),
        *[step(n, redone=int(n == 3), flushed=2e-5) for n in range(1, 61)],
        evaluated(30, 3.0, bits_per_byte=1.5),
        evaluated(60, 2.0, bits_per_byte=1.0),
        CheckpointSaved(step=60, bytes=10, seconds=0.1, stall_seconds=0.1),
        ended("finished", 60, "w" * 64, "s" * 64),
    )
    saved = [{"step": 60, "intact": True, "bytes": 10}]
    summary = summarise(run, saved)
    expected = {
        "status": "finished", "step": 60, "steps": 60, "tokens": 60 * 2_048, "weights_sha256": "w" * 64,
        "state_sha256": "s" * 64, "train": [[n, 5.0 - n / 100] for n in range(1, 61)],
        "eval": {"val": [[30, 3.0, 1.5], [60, 2.0, 1.0]]}, "checkpoints": saved, "faults": [], "incidents": [],
        "tokens_per_second": 2_048 / 0.5, "redone": 1, "flushed": pytest.approx(2e-5, rel=1e-12),
    }  # fmt: skip
    assert {key: summary[key] for key in expected} == expected
    assert summary["goodput"]["productive_seconds"] == pytest.approx(59.5 * 0.5)
    (attempt,) = summary["attempts"]
    expected = {"attempt": 0, "world_size": 2, "from_step": 0, "to_step": 60, "ended": "finished", "seconds": 64.0}
    assert {key: attempt[key] for key in expected} == expected
    assert json.loads(json.dumps(summary)) == summary


def test_a_replayed_step_counts_once_and_shows_the_last_attempts_value(run: Path, dead_pid: int):
    write(run, 0, started_here(dead_pid), *[step(n, flushed=0.5) for n in range(1, 48)])
    replay = [step(n, loss=1.0, redone=1, flushed=0.25) for n in range(41, 44)]
    write(run, 1, started_here(dead_pid, from_step=40, world_size=1), *replay)
    summary = summarise(run)
    train = dict(summary["train"])
    assert sorted(train) == list(range(1, 48))
    assert [train[n] for n in (40, 41, 43, 44)] == [4.6, 1.0, 1.0, 4.56]
    assert (summary["step"], summary["tokens"], summary["redone"]) == (43, 43 * 2_048, 3)
    assert summary["flushed"] == pytest.approx((44 * 0.5 + 3 * 0.25) / 47, rel=1e-12)
    assert (summary["replayed"], summary["replayed_differently"]) == (3, [41, 42, 43])
    assert [(a["from_step"], a["to_step"], a["world_size"]) for a in summary["attempts"]] == [(0, 47, 2), (40, 43, 1)]


def test_a_step_that_every_rank_writes_down_is_no_replay(run: Path):
    for rank in (0, 1):
        write(run, 0, started(), step(1), step(2), rank=rank)
    summary = summarise(run)
    assert (summary["replayed"], summary["train"]) == (0, [[1, 4.99], [2, 4.98]])
    assert (summary["tokens_per_second"], summary["incidents"][0]["lost_steps"]) == (2_048 / 0.5, None)


def test_replays_that_agree_to_the_bit_are_not_called_different_even_where_they_are_nan(run: Path):
    write(run, 0, started(), step(1, loss=math.nan), step(2))
    write(run, 1, started(), step(1, loss=math.nan), step(2))
    summary = summarise(run)
    assert (summary["replayed"], summary["replayed_differently"]) == (2, [])


@pytest.mark.parametrize("lives", [True, False])
def test_a_run_is_running_while_its_process_lives_and_has_died_when_that_is_gone(run: Path, dead_pid: int, lives: bool):
    write(run, 0, started_here(os.getpid() if lives else dead_pid), step(1), clock=time.time)
    summary = summarise(run)
    assert (summary["status"], summary["attempts"][0]["ended"]) == (("running", None) if lives else ("failed", "died"))
    assert summary["weights_sha256"] is summary["state_sha256"] is None
    assert (summary["ended"] is None) == lives


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc to see zombies and start times")
def test_a_zombie_and_a_reused_process_id_are_not_taken_for_the_run(run: Path):
    child = subprocess.Popen([sys.executable, "-c", ""], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.read()
    while "Z" not in Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2]:
        time.sleep(0.01)
    try:
        write(run, 0, started_here(child.pid), clock=time.time)
        assert summarise(run)["status"] == "failed"
    finally:
        child.stdout.close()
        child.wait()
    write(run, 1, started_here(os.getpid()))  # at the clock's 2,000 s: this process began long after that
    assert summarise(run)["status"] == "failed"


def test_one_living_rank_keeps_the_attempt_alive(run: Path, dead_pid: int):
    write(run, 0, started_here(dead_pid), rank=0, clock=time.time)
    write(run, 0, started_here(os.getpid()), rank=1, clock=time.time)
    assert summarise(run)["status"] == "running"


@pytest.mark.parametrize(("age", "status"), [(1.0, "running"), (60.0, "failed")])
def test_on_another_host_silence_longer_than_any_step_may_take_is_failure(run: Path, age: float, status: str):
    write(run, 0, started(host=NOBODY), clock=lambda: time.time() - age)
    summary = summarise(run)
    assert (summary["status"], summary["attempts"][0]["ended"]) == (status, "unknown")


def test_a_preempted_run_is_preempted_until_it_is_started_again(run: Path):
    write(run, 0, started(), step(1), ended("preempted", 1, None, "s" * 64))
    summary = summarise(run)
    assert (summary["status"], summary["state_sha256"]) == ("preempted", "s" * 64)
    write(run, 1, started_here(os.getpid(), from_step=1), clock=time.time)
    summary = summarise(run)
    assert (summary["status"], summary["state_sha256"], summary["step"]) == ("running", None, 1)


def test_an_attempt_that_any_rank_calls_failed_has_failed(run: Path):
    write(run, 0, started(), step(1), ended("preempted", 1), rank=0)
    write(run, 0, started(), ended("failed", 1, reason="because"), rank=1)
    summary = summarise(run)
    assert (summary["status"], summary["attempts"][0]["reason"]) == ("failed", "because")


def test_a_finished_run_stays_finished_when_it_is_started_again(run: Path, dead_pid: int):
    write(run, 0, started(), step(60), ended("finished", 60, "w" * 64, "s" * 64))
    write(run, 1, started_here(dead_pid, from_step=60))
    summary = summarise(run)
    assert (summary["status"], summary["weights_sha256"], summary["step"]) == ("finished", "w" * 64, 60)
    assert [a["ended"] for a in summary["attempts"]] == ["finished", "died"]


def test_a_value_that_was_not_measured_is_none_and_never_zero(run: Path):
    write(run, 0, Warned(message="the disk is slow"))
    summary = summarise(run)
    unknown = ("step", "steps", "tokens", "weights_sha256", "state_sha256", "tokens_per_second", "redone", "flushed")
    assert {name: summary[name] for name in unknown} == dict.fromkeys(unknown)
    assert summary["attempts"][0]["world_size"] is None
    write(run, 1, started(), step(1))
    assert summarise(run)["flushed"] is None


def test_a_torn_last_line_is_read_past_but_damage_before_it_is_refused(run: Path):
    write(run, 0, started(), step(1), step(2))
    path = next(events_directory(run).iterdir())
    whole = path.read_text()
    path.write_text(whole[:-20])
    assert summarise(run)["step"] == 1
    path.write_text(whole.replace('"loss": 4.99', '"loss": 4.'))
    with pytest.raises(RunDirectoryError, match=r"rank-00000.jsonl:2 is no event"):
        summarise(run)


def test_a_directory_that_is_no_run_or_has_no_events_is_refused_with_a_remedy(tmp_path: Path):
    for path in (tmp_path / "missing", tmp_path):
        with pytest.raises(RunDirectoryError, match=r"config\.json"):
            summarise(path)
    with pytest.raises(RunDirectoryError, match=r"no events[\s\S]*trainer train"):
        summarise(new_run(tmp_path / "fresh"))


def test_ranks_that_disagree_about_the_weights_are_warned_of(run: Path):
    write(run, 0, started(), step(1), ended("finished", 1, "a" * 64, "s" * 64), rank=0)
    write(run, 0, started(), ended("finished", 1, "b" * 64, "s" * 64), rank=1)
    (warning,) = summarise(run)["warnings"]
    assert "weights_sha256 at step 1 has 2 values" in warning["message"]


def test_a_warning_names_steps_that_no_rank_computed(run: Path):
    write(run, 0, started(from_step=40), step(41))
    (warning,) = summarise(run)["warnings"]
    assert "40 steps are missing in the log, the first is 1" in warning["message"]


def test_a_running_runs_time_is_accounted_for_until_now(run: Path):
    start, noted = started_here(os.getpid()), time.time() - 1.0
    write(run, 0, start, clock=lambda: noted)
    summary = summarise(run)
    assert (summary["status"], summary["incidents"]) == ("running", [])
    assert summary["goodput"]["wall_seconds"] >= sum(start.startup_seconds.values()) + 1.0
    assert summary["goodput"]["ratio"] == 0.0
