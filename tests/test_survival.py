"""Whatever kills, stops or cheats a run, it ends with the bits of the reference: real processes, real signals.

Several faults share one torchrun job where that keeps its meaning: each starts an attempt of its own. A start costs
about 4 s, a restart about 3 s.
"""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scripts import soak
from tests.faulty_runs import EVERY, NO_FAULTS, STEPS, FaultyRun, fault
from tests.support import (
    ROOT,
    SMOKE,
    committed_samples,
    mounted,
    outcome,
    settings,
    summarise_run,
    trainer,
    wait_until,
)
from trainer import checkpoint
from trainer import config as configs
from trainer.data import Batches, digest, prepare
from trainer.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_PREEMPTED, EXIT_USAGE
from trainer.job import batches_of
from trainer.log import events

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]  # the machine may be shared: six attempts take long then

STEP_SECONDS = 1.5
LIMITS = settings(elastic__step_timeout_seconds=STEP_SECONDS, elastic__startup_timeout_seconds=30.0)


def dies(kind: str, phase: str, at_step: int | None = None, rank: int = 1, **more: Any) -> dict[str, Any]:
    """A fault that ends its attempt."""
    return fault(kind, at_step, rank, phase=phase, **more)


# One list is one job: each fault ends an attempt, in this order. Every way to die, every phase, either rank.
DEATHS = {
    "before and in the gradient": [
        dies("sigkill", "startup"),
        dies("sigkill", "before_forward", 1),
        dies("sigsegv", "in_forward", 4, rank=0),
        dies("sigabrt", "before_backward", 9),
        dies("exception", "in_backward", 10, rank=0),
        dies("sigkill", "before_reduce", 14),
        dies("exit", "in_reduce", 15, rank=0),
    ],
    "from the reduction to the next step": [
        dies("exit", "after_reduce", 7, rank=0),
        dies("memory_limit", "before_update", 8),
        dies("sigsegv", "in_update", 9, rank=0),
        dies("memory_kill", "after_update", 10, megabytes=8),
        dies("sigkill", "in_eval", 12),
    ],
    "in each part of a save": [
        dies("sigkill", "in_save_shard", 6),
        dies("sigabrt", "in_save_shard", 6, rank=0, attempt=1),
        dies("sigkill", "before_commit", 6, rank=0),
        dies("exit", "after_commit", 12, rank=0),
        dies("sigkill", "in_save_shard", 18, rank=0),
    ],
    "at the end": [
        dies("sigkill", "before_update", STEPS, rank=0),
        dies("sigkill", "before_commit", STEPS, rank=0),
        dies("sigsegv", "after_commit", STEPS, rank=0),
        dies("sigkill", "before_end", rank=0),
        dies("sigkill", "after_end", rank=0),  # it has said that it is finished
    ],
    "during recovery, and again at once": [
        dies("sigkill", "before_forward", 14),  # the save of step 6 is over by then: that of step 12 waited for it
        dies("sigkill", "startup", attempt=1),
        dies("sigsegv", "in_load", rank=0, attempt=1),
        dies("repeated_kill", "before_forward", 15, times=2),  # the second time rank 1 dies while it loads
    ],
}


@pytest.mark.parametrize("when", DEATHS)
def test_killed_at_every_phase_boundary_a_run_ends_as_the_reference(trial: FaultyRun, when: str):
    sharding = "fsdp" if when in ("in each part of a save", "from the reduction to the next step") else "replicate"
    deaths = DEATHS[when]
    trial.survive(2, deaths, *settings(parallel__strategy=sharding))
    run_summary = summarise_run(trial.run)
    assert all(row["fired"] for row in run_summary["faults"]), run_summary["faults"]
    # A worker that dies before it trains has made no attempt.
    before_training = sum(death["phase"] in ("startup", "in_load") for death in deaths)
    trial.ends_as_reference(attempts=1 + len(deaths) - before_training)
    causes = trial.events(events.WorkersLost)
    assert len(causes) == sum(death.get("times", 1) for death in deaths)
    assert all(len(cause.failures) >= 1 and cause.reason for cause in causes)
    by_signal = [row for row in run_summary["faults"] if row["kind"] not in ("exception", "exit", "memory_limit")]
    assert [row["detected_as"] for row in by_signal] == ["worker_lost"] * len(by_signal), run_summary["incidents"]


def test_stopped_by_signals_and_resumed_at_other_world_sizes_and_shardings(trial: FaultyRun):
    """2 ranks replicated → 3 FSDP2 → 4 hybrid → 1 → 2 FSDP2, each but the last left with status 75.

    The first is asked to stop before its first step: it takes one step and saves it with the optimizer's moments.
    """

    def go(ranks: int, strategy: str, *faults: dict[str, Any], status: int = EXIT_PREEMPTED) -> dict[str, Any]:
        trial.survive(ranks, list(faults), *settings(parallel__strategy=strategy), status=status)
        return summarise_run(trial.run)

    first = go(2, "replicate", fault("sigterm", 1, rank=1))
    assert first["status"] == "preempted" and first["step"] == 1
    assert [saved["step"] for saved in first["checkpoints"]] == [1]
    asked = trial.events(events.StopRequested)
    assert [(stop.signal, stop.step) for stop in asked] == [("SIGTERM", 1)]
    go(3, "fsdp", dies("sigterm", "before_backward", 10), dies("sigkill", "after_update", 7))
    go(4, "hybrid", dies("sigterm", "before_update", 14))
    go(1, "replicate", fault("sigterm", 18, rank=0))
    finished = go(2, "fsdp", status=EXIT_FINISHED)
    sizes = [(attempt["world_size"], attempt["from_step"]) for attempt in finished["attempts"]]
    assert [size for size, _ in sizes] == [2, 3, 3, 4, 1, 2]
    trial.ends_as_reference(attempts=6)


def test_a_peer_that_dies_in_the_last_save_is_no_failing_disk(trial: FaultyRun):
    """The launcher checks only every 3 s, so the survivor has time to notice, and to try again in vain."""
    with trial.start(2, [dies("sigkill", "in_save_shard", STEPS)], monitor=3.0) as job:
        assert job.wait() == EXIT_FINISHED, job.output[-8000:]
    trial.ends_as_reference(attempts=2)
    assert trial.events(events.CheckpointFailed) == []


def test_asked_to_stop_before_it_trains_a_run_saves_its_first_step_and_resumes_from_it(trial: FaultyRun):
    """One process while it is about to import torch, which is held back until then; then two ranks in their data."""
    gate = trial.run.parent / "gate"
    gate.mkdir()
    (gate / "sitecustomize.py").write_text(HOLD_TORCH_BACK)
    arguments = [sys.executable, "-m", "trainer", "train", str(SMOKE), "--run", str(trial.run), *trial.settings]
    paths = {"PYTHONPATH": f"{gate}{os.pathsep}{ROOT}"}
    with subprocess.Popen(arguments, cwd=ROOT, env=os.environ | paths) as alone:
        assert wait_until((gate / "reached").exists, seconds=30)
        alone.send_signal(signal.SIGTERM)
        (gate / "open").touch()
        assert alone.wait(60) == EXIT_PREEMPTED
    trial.survive(2, [fault("sigterm", rank=0, phase="startup")], status=EXIT_PREEMPTED)
    stopped = summarise_run(trial.run)
    assert stopped["step"] == 0 and stopped["status"] == "preempted"
    assert [(saved["step"], saved["intact"]) for saved in stopped["checkpoints"]] == [(0, True)]
    asked = trial.events(events.StopRequested)
    assert [(stop.signal, stop.step) for stop in asked] == [("SIGTERM", 0), ("SIGTERM", 0)]
    trial.survive(2, NO_FAULTS, *settings(parallel__strategy="fsdp"))
    trial.ends_as_reference(attempts=3)


HOLD_TORCH_BACK = """
import sys, time
from pathlib import Path

gate = Path(__file__).parent

class Gate:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name == "torch":
            (gate / "reached").touch()
            while not (gate / "open").exists():
                time.sleep(0.01)

sys.meta_path.insert(0, Gate)
"""


def test_a_signal_to_the_agent_is_answered_in_time_and_the_same_command_resumes(trial: FaultyRun):
    """By at most one more step. Meanwhile a second job on the directory is refused, and the first is not harmed."""
    with trial.start(2, NO_FAULTS, slow={"before_update": 0.6}) as job:
        assert wait_until(lambda: begun(trial.run, step=2), seconds=40), job.output
        second = trainer("train", SMOKE, "--run", trial.run, *trial.settings, check=False)
        assert second.returncode == 2 and "is in use by process" in second.stderr
        asked, done = time.monotonic(), last_step(trial.run)
        job.process.send_signal(signal.SIGTERM)
        assert job.wait(20) == EXIT_PREEMPTED, job.output
        assert time.monotonic() - asked < 10
        assert job.leftovers() == []
    stopped = summarise_run(trial.run)
    assert stopped["status"] == "preempted" and done < stopped["step"] <= done + 2 < STEPS
    assert stopped["checkpoints"][-1]["step"] == stopped["step"]
    assert trainer("inspect", trial.run).stdout.count("preempted") >= 1
    trial.survive(2, NO_FAULTS)
    trial.ends_as_reference(attempts=2)


def test_slow_is_not_hung(trial: FaultyRun):
    """A first step, an evaluation and the wait for a save, each longer than the limit of a step in all."""
    faults = [
        fault("slow_rank", 1, rank=1, seconds=3.0, steps=1),
        fault("slow_write", 6, rank=1, seconds=0.6),
        fault("slow_write", 12, rank=1, seconds=0.6),
    ]
    trial.survive(2, faults, *LIMITS, slow={"in_eval": 0.2})
    trial.ends_as_reference(attempts=1)
    assert trial.events(events.Hung) == []
    stalls = {saved.step: saved.stall_seconds for saved in trial.events(events.CheckpointSaved)}
    assert stalls[12] > 2 * STEP_SECONDS, "both ranks waited for the save of rank 1"


def test_a_rank_that_hangs_in_the_preparation_is_named_and_slow_data_are_no_hang(trial: FaultyRun):
    """9 s of data that make progress, with 5 s allowed; in the first attempt the rank that prepares is stopped."""
    limit, asked = settings(elastic__startup_timeout_seconds=5.0), time.monotonic()
    with trial.start(2, NO_FAULTS, *limit, slow={"data": 0.3}) as job:
        assert wait_until((trial.run / "lock").exists, seconds=40), job.output
        time.sleep(1)  # the run is claimed, so the data come next
        assert job.send(job.workers()[0], signal.SIGSTOP)
        assert job.wait() == EXIT_FINISHED, job.output[-8000:]
    assert time.monotonic() - asked < 90
    trial.ends_as_reference(attempts=1)  # the other did not start to train
    (hung,) = trial.events(events.Hung)
    assert hung.point == "startup" and [culprit["rank"] for culprit in hung.culprits] == [0], hung


def test_a_disk_that_answers_no_more_is_a_hang_of_its_rank(trial: FaultyRun):
    trial.survive(2, [fault("stalled_disk", 6, rank=1, seconds=1000.0)], *LIMITS)
    trial.ends_as_reference(attempts=2)
    hung = trial.events(events.Hung)
    assert hung and {event.point for event in hung} == {"waiting_for_save"}
    assert {culprit["rank"] for event in hung for culprit in event.culprits} == {1}, hung


def test_a_disk_that_stays_full_stops_the_run_with_its_reason(trial: FaultyRun):
    full = [fault("no_space", step, rank=1) for step in (6, 12, 18)]
    output = trial.survive(2, full, *settings(checkpoint__max_failures=2), status=EXIT_FAILED)
    assert "saving failed 2 times in a row" in output and "Traceback" not in output
    stopped = summarise_run(trial.run)
    assert stopped["status"] == "failed" and stopped["checkpoints"] == []
    assert [event.in_a_row for event in trial.events(events.CheckpointFailed)] == [1, 2]
    trial.survive(1, NO_FAULTS)
    trial.ends_as_reference(attempts=2)


@pytest.fixture
def small_disk(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A disk of 4 MB mounted over this directory of the test's."""
    disk = tmp_path / request.param
    disk.mkdir(parents=True)
    with mounted(disk, "size=4m"):
        yield disk


@pytest.mark.parametrize("small_disk", ["run/checkpoints"], indirect=True)
def test_a_disk_without_room_for_one_more_checkpoint_keeps_the_ones_it_has(
    reference_run: FaultyRun, tmp_path: Path, small_disk: Path
):
    """ENOSPC for real. The run begins at an undisturbed run's step 6, on a disk that something else has filled."""
    trial = FaultyRun(tmp_path, reference_run.settings, reference_run.reference)
    trainer("train", SMOKE, "--run", tmp_path / "start", *reference_run.settings, *settings(checkpoint__keep_last=9))
    shutil.copytree(
        tmp_path / "start", trial.run, dirs_exist_ok=True, ignore=shutil.ignore_patterns("step-*[12348]", "events")
    )
    assert [saved.step for saved in checkpoint.committed(trial.run)] == [EVERY]
    filler = fill(small_disk, leaving=30_000)
    with trial.start(2, NO_FAULTS, *settings(checkpoint__max_failures=9), slow={"before_update": 0.2}) as job:
        assert wait_until(lambda: begun(trial.run, step=15), seconds=40), job.output
        assert [saved.step for saved in checkpoint.committed(trial.run)] == [EVERY]
        filler.unlink()
        assert job.wait() == EXIT_FINISHED, job.output
    failed = trial.events(events.CheckpointFailed)
    assert [event.step for event in failed][:1] == [12] and "No space left" in failed[0].reason
    result = outcome(trial.run)
    same = ("status", "step", "weights_sha256", "state_sha256")
    assert {key: result[key] for key in same} == {key: reference_run.reference[key] for key in same}


@pytest.mark.parametrize("small_disk", ["run"], indirect=True)
def test_a_disk_too_full_for_the_log_itself_stops_nothing_and_loses_no_event(trial: FaultyRun, small_disk: Path):
    """ENOSPC for all of the run, from step 3 until a warning is printed."""
    with trial.start(2, NO_FAULTS, *settings(checkpoint__max_failures=9), slow={"before_update": 0.2}) as job:
        assert wait_until(lambda: begun(trial.run, step=3), seconds=40), job.output
        filler = fill(small_disk)
        assert wait_until(lambda: "jsonl cannot be written: No space left on device" in job.output, seconds=30)
        filler.unlink()
        assert job.wait() == EXIT_FINISHED, job.output
    trial.ends_as_reference(attempts=1)
    assert trial.events(events.CheckpointFailed) != []
    assert ["the log" in event.message for event in trial.events(events.Warned)] == [True], "warned once"


@pytest.mark.parametrize("small_disk", ["run"], indirect=True)
def test_a_disk_that_is_full_from_the_start_is_wrong_usage(trial: FaultyRun, small_disk: Path):
    fill(small_disk)
    refused = trainer("train", SMOKE, "--run", small_disk / "run", *trial.settings, check=False)
    assert refused.returncode == EXIT_USAGE and "Traceback" not in refused.stderr, refused.stderr
    assert "cannot be written: No space left on device" in refused.stderr
    assert "\n  The disk is full. Checkpoints and events go there. " in refused.stderr


def fill(disk: Path, leaving: int = 0) -> Path:
    """A file that does not belong to the run takes all room but this."""
    filler = disk / "step-not-ours"
    space = os.statvfs(disk)
    filler.write_bytes(bytes(space.f_bavail * space.f_frsize - leaving))
    return filler


def test_a_nan_that_stays_stops_the_run_and_is_named(trial: FaultyRun):
    """Rank 1's second micro-batch of two is number 3 of four. It would only come again: torchrun does not restart."""
    output = trial.survive(2, [fault("nan_sample", 9, rank=1, nth=2)], status=EXIT_FAILED)
    ids = batches(trial).micro_batch(8, 3).sample_ids
    for named in ("step 9:", "micro-batch 3 (samples " + ", ".join(map(str, ids)), "module blocks.0.mlp"):
        assert named in output, output
    assert {event.trial for event in trial.events(events.NotFinite)} == {0, 1}
    assert max(committed_samples(trial.run)) == 8, "the step was applied"
    trial.survive(1, NO_FAULTS)
    trial.ends_as_reference(attempts=2)


def test_resuming_a_finished_run_changes_nothing(reference_run: FaultyRun, trial: FaultyRun):
    shutil.copytree(reference_run.run, trial.run)
    before = contents(trial.run / "checkpoints")
    trial.survive(1, NO_FAULTS, *settings(parallel__strategy="fsdp"))
    assert contents(trial.run / "checkpoints") == before
    trial.ends_as_reference(attempts=2)
    assert summarise_run(trial.run)["attempts"][-1]["from_step"] == STEPS


def contents(directory: Path) -> dict[str, tuple[int, bytes]]:
    return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in directory.rglob("*") if path.is_file()}


def test_the_committed_history_holds_every_sample_once_per_epoch(reference_run: FaultyRun):
    """Checks the ids themselves: all other runs here have the digests of this one."""
    source = batches(reference_run)
    ids = np.concatenate([batch.sample_ids for step in range(STEPS) for batch in source.for_step(step)])
    assert source.n_windows < len(ids) < 2 * source.n_windows, "more than one epoch, less than two"
    assert sorted(ids[: source.n_windows]) == list(range(source.n_windows))
    assert len(set(ids[source.n_windows :])) == len(ids) - source.n_windows
    for step in range(STEPS):
        of_step = repr([digest(batch.sample_ids) for batch in source.for_step(step)])
        assert reference_run.reference["samples"][step + 1] == hashlib.sha256(of_step.encode()).hexdigest()[:16]


def batches(trial: FaultyRun) -> Batches:
    config = configs.load(SMOKE, trial.settings[1::2])
    return batches_of(config, prepare(config.data, config.eval, config.model.context))


def begun(run: Path, step: int) -> bool:
    """True if the log of a living run has reached this step."""
    return run.is_dir() and last_step(run) >= step


def last_step(run: Path) -> int:
    return max(committed_samples(run), default=0)


def test_random_kills_of_random_worlds_end_as_the_reference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The first few of a campaign; scripts/soak runs hundreds. To repeat one, give it the printed seed."""
    seed = 0 if os.environ.get("CI") else int.from_bytes(os.urandom(3), "big")
    command = ["soak", "--kills", "3", "--seed", str(seed), "--out", str(tmp_path / "soak")]
    print(*command)
    monkeypatch.setattr(sys, "argv", command)
    soak.main()  # it leaves with a status if a run does not end so
    summary = json.loads((tmp_path / "soak" / "summary.json").read_text())
    assert summary["kills"] >= 3 and summary["equal"] == summary["runs"], summary
