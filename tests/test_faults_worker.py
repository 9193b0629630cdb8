"""Faults inside a rank: every kind is made where the plan says, once, in real jobs.

Faults share a torchrun job where each starts an attempt of its own, or ends none.
"""

import dataclasses
import io
import os
import random
import re
import shutil
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist

from tests.faulty_runs import NO_FAULTS, FaultyRun, fault
from tests.logs import Run, started
from tests.support import SMOKE, many_runs, settings, summarise_run, torchrun, trainer, with_faults, write_corpus
from trainer import checkpoint, config
from trainer.checkpoint import files
from trainer.errors import EXIT_FAILED, EXIT_PREEMPTED, EXIT_USAGE, ConfigError
from trainer.faults import injector, plan, storage, tensors, wrong_operators
from trainer.faults.disk import Disk, DiskFault
from trainer.faults.fault import KINDS
from trainer.faults.rank import RankContext
from trainer.faults.storage import CheckpointDamage
from trainer.log import events
from trainer.log.events import CheckpointFailed, CheckpointRejected, CheckpointSaved, Hung, NotFinite
from trainer.parallel.world import World

LIMITS = settings(elastic__step_timeout_seconds=3.0, elastic__startup_timeout_seconds=60.0)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_hangs_of_every_kind_are_made_and_survived(trial: FaultyRun):
    faults = [
        fault("stopped", 8, 0, phase="in_update"),
        fault("lock_held", 11, 1, phase="in_reduce"),
        fault("stalled_data", 14, 0),
        fault("skipped_collective", 15, 1),
    ]
    trial.survive(2, faults, *LIMITS)
    run_summary = trial.ends_as_reference()
    assert trial.detected_as(0, 1, 2) == ["hung"] * 3, run_summary["incidents"]
    assert trial.detected_as(3) in (["hung"], ["worker_lost"]), run_summary["incidents"]
    stopped, locked, *_ = trial.events(Hung)
    assert [c["rank"] for c in stopped.culprits] == [0] and [c["rank"] for c in locked.culprits] == [1]
    assert 3 <= stopped.seconds < 8 and stopped.collective
    assert (trial.run / stopped.stacks).read_text().count("Thread") >= 2
    (banner,) = [w["message"] for w in run_summary["warnings"] if "on purpose" in w["message"]]  # one for all attempts
    assert banner.startswith("4 faults on purpose are armed: stopped on rank 0 at step 8, in_update; lock_held on rank")


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_disk_that_fails_fails_one_save_and_not_the_run(trial: FaultyRun):
    refused = dict.fromkeys((4, 6, 8), "Input/output") | {2: "No space", 10: "cannot be read", 12: "bytes"}
    faults = [
        fault("no_space", 2, 1),
        fault("eio_write", 4, 0),
        fault("eio_fsync", 6, 1),
        fault("eio_rename", 8),
        fault("eio_read", 10, 1),
        fault("short_write", 12, 0),
        fault("slow_write", 14, 1),
        fault("stalled_disk", 16, 1, seconds=0.5),
        fault("torn_save", 18, 1),
        fault("vanished_checkpoints", 17, 1, attempt=1, seconds=0.3),  # from step 16: nothing is being saved
        fault("no_space", 24, phase="before_commit"),
    ]
    trial.survive(
        2, faults, *settings(parallel__strategy="fsdp", checkpoint__every_steps=2, checkpoint__max_failures=20)
    )
    trial.ends_as_reference()
    failed = {event.step: event.reason for event in trial.events(CheckpointFailed)}
    assert [step for step, words in refused.items() if words not in failed.get(step, "")] == [], failed
    assert "No space" in failed[24]  # and was tried again
    assert not {14, 16} & set(failed)
    assert trial.detected_as(*range(6), 8) == ["save_failed"] * 6 + ["worker_lost"]


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_damage_to_the_newest_checkpoint_is_met_by_the_next_start(trial: FaultyRun):
    faults = [
        fault("truncated_shard", 13, 0),
        fault("flipped_shard", 14, 1, phase="after_reduce"),
        fault("missing_shard", 15, 0),
        fault("swapped_shard", 16, 1),
        fault("damaged_manifest", 19, 0),
        fault("flipped_shard", 3, 1),
    ]
    trial.survive(2, faults)
    run_summary = trial.ends_as_reference(unfired=1)
    assert trial.detected_as(*range(5)) == ["checkpoint_rejected"] * 5
    texts = [incident["text"] for incident in run_summary["incidents"] if incident["kind"] == "checkpoint_rejected"]
    reasons = ("bytes instead", "its checksum)", "missing", "file of step", "manifest")
    assert all(words in text for words, text in zip(reasons, texts, strict=True)), texts
    unfired = run_summary["faults"][-1]
    assert (unfired["kind"], unfired["fired"], unfired["time"]) == (faults[-1]["kind"], False, None)
    assert any("did not fire: there is no checkpoint" in w["message"] for w in run_summary["warnings"])


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/dev/shm is Linux's")
def test_a_start_that_meets_a_damaged_copy_in_memory_or_none_goes_on_from_the_disk(trial: FaultyRun):
    trial.survive(
        2, [fault("flipped_copy", 14, 1), fault("vanished_copies", 20, 0)], *settings(checkpoint__memory_every_steps=1)
    )
    run_summary = trial.ends_as_reference(attempts=3)
    assert [attempt["state_from"] for attempt in run_summary["attempts"]] == [None, "disk", "disk"]
    assert trial.detected_as(0, 1) == ["checkpoint_rejected", "worker_lost"]
    (rejected,) = trial.events(CheckpointRejected)
    assert rejected.step == 13 and re.match("in memory: .*does not match its checksum", rejected.reason)


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_wrong_numbers_that_show_are_computed_away_and_a_wrong_clock_or_a_slow_rank_is_none(trial: FaultyRun):
    faults = [
        fault("nan_loss", 3, 1),
        fault("nan_gradient", 5, 0, value="inf"),
        fault("spike", 7, 1),
        fault("slow_rank", 8, 0, steps=3, seconds=0.1),
        fault("nan_loss", 10, 0, value="inf"),
        fault("sigterm", 14, "all", phase="after_reduce"),
        fault("nan_weights", 20, 1),
        fault("clock_jump", 22, 0),
        fault("spike", 5, 1),  # an overflow in the same pass does not hide what is not finite
        fault("spike", 10, 1),
    ]
    trial.survive(2, faults, status=EXIT_PREEMPTED)
    trial.survive(2, NO_FAULTS, status=EXIT_FAILED)
    trial.survive(2, NO_FAULTS)
    fired = trial.fired()
    victims = [(0, 1), (1, 0), (2, 1), (3, 0), (4, 0), (5, 0), (5, 1), (6, 1), (7, 0), (8, 1), (9, 1)]
    assert fired == Counter(victims)
    run_summary = trial.ends_as_reference()
    assert trial.detected_as(0, 1, 4, 6) == ["not_finite"] * 4 and trial.detected_as(5) == ["preempted"] * 2
    assert trial.detected_as(2, 3, 7) == [None] * 3
    not_finite = trial.events(NotFinite)
    trials = {step: sorted({event.trial for event in not_finite if event.step == step}) for step in (3, 5, 10, 20)}
    assert trials == {3: [0], 5: [0], 10: [0], 20: [0, 1]}
    slow = {event.step: event.seconds for event in trial.events(events.StepDone)}
    assert min(slow[step] for step in (8, 9, 10)) >= 0.1
    entries = [e for e in events.read(trial.run) if e.attempt == run_summary["attempts"][-1]["attempt"] and e.rank == 0]
    times = {e.event.step: e.time for e in entries if isinstance(e.event, events.StepDone)}
    assert times[22] - times[21] > 3600


SILENT = [name for name, kind in KINDS.items() if kind.silent and not kind.needs_peers]


@pytest.mark.slow
def test_silent_corruption_is_made_and_this_version_does_not_notice(tmp_path: Path):
    """Several runs of one rank in one process."""
    plans = [[fault(kind, 5)] for kind in SILENT] + [[fault("flip_weights", 5, bits=40)], []]
    few = settings(
        data__source=write_corpus(tmp_path / "corpus"), data__heldout_fraction=0.2, budget__steps=8,
        checkpoint__every_steps=0, eval__every_steps=0, eval__max_tokens=320,
    )  # fmt: skip
    many_runs([[*few[1::2], with_faults(faults)[1]] for faults in plans], tmp_path)
    summaries = [summarise_run(tmp_path / str(number)) for number in range(len(plans))]
    assert [run["status"] for run in summaries] == ["finished"] * len(plans)
    assert [[row["fired"] for row in run["faults"]] for run in summaries[:-1]] == [[True]] * (len(plans) - 1)
    assert all(run["weights_sha256"] != summaries[-1]["weights_sha256"] for run in summaries[:-1])
    assert all(run["incidents"] == [] for run in summaries), "it was detected: the kind is not silent any more"


@pytest.fixture
def own_cache(trial: FaultyRun, tmp_path: Path) -> FaultyRun:
    return dataclasses.replace(trial, settings=[*trial.settings, *settings(data__cache_dir=str(tmp_path / "cache"))])


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_corrupt_token_store_is_built_again(own_cache: FaultyRun, tmp_path: Path):
    faults = [fault("corrupt_tokens", 9)]
    trainer("train", SMOKE, "--run", tmp_path / "first", *own_cache.settings, *settings(budget__steps=1))
    (store,) = (tmp_path / "cache").glob("store-*/train.bin")
    before, made = store.read_bytes(), store.stat()
    own_cache.survive(1, faults)
    assert store.read_bytes() == before and store.stat().st_mtime_ns > made.st_mtime_ns
    own_cache.ends_as_reference()
    assert own_cache.detected_as(0) == ["worker_lost"]


def test_a_bit_is_flipped_where_it_was_asked_for(tmp_path: Path):
    tokens = np.arange(100, dtype="<u2")
    (tmp_path / "train.bin").write_bytes(tokens.tobytes())
    storage.flip_bit(tmp_path / "train.bin", 7 * 2, bit=0)
    changed = np.fromfile(tmp_path / "train.bin", dtype="<u2")
    assert (changed != tokens).nonzero()[0].tolist() == [7] and changed[7] == 6


def test_the_users_own_cache_is_not_corrupted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Without data.cache_dir and TOPROPE_CACHE; HOME is the test's."""
    own = settings(data__source=write_corpus(tmp_path / "corpus"), data__heldout_fraction=0.2, budget__steps=3)
    monkeypatch.delenv("TOPROPE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    trainer("train", SMOKE, "--run", tmp_path / "run", *own, *with_faults([fault("corrupt_tokens", 2)]))
    run_summary = summarise_run(tmp_path / "run")
    assert run_summary["status"] == "finished" and [row["fired"] for row in run_summary["faults"]] == [False]
    assert any(
        "did not fire: the token store is in the user's own cache" in w["message"] for w in run_summary["warnings"]
    )


def test_a_bad_plan_is_refused_before_anything_starts_with_all_its_problems(tmp_path: Path):
    bad = [
        fault("sigkil", 3),
        fault("sigkill", 99),
        fault("sigkill", 3, 7),
        fault("eio_rename", 20, 1),
        fault("stopped", 4, "all"),
        fault("wrong_operator", 5, steps="x"),
    ]
    done = torchrun(2, "train", SMOKE, "--run", tmp_path / "run", *with_faults(bad), check=False)
    assert done.returncode == EXIT_USAGE
    for message in (
        "Did you mean 'sigkill'?", "beyond the run's 60 steps", "the job has ranks 0 to 1", "only rank 0 commits",
        "stop all 2 ranks", "steps = 'x' is no number",
    ):  # fmt: skip
        assert message in done.stderr, done.stderr
    assert not (tmp_path / "run").exists()


def test_a_wrong_operator_is_refused_where_operators_are_fused():
    with pytest.raises(ConfigError, match=r"numerics\.compile"):
        plan.make(configured(fault("wrong_operator", 5), numerics={"compile": True}), 1)


# In one process.


def configured(*faults: dict[str, Any], **sections: Any) -> config.Config:
    return config.parse({"faults": faults, "budget": {"steps": 30}, "checkpoint": {"every_steps": 2}, **sections})


def armed(run: Path, *faults: dict[str, Any], rank: int = 0, size: int = 1) -> injector.FaultInjector:
    run.mkdir(exist_ok=True)
    return injector.arm(configured(*faults), run, rank, size)


def test_without_faults_nothing_is_touched(tmp_path: Path):
    def hook(phase: str, step: int) -> None: ...

    touchable = (io.open, os.fsync, os.rename, time.time, dist.all_reduce)
    batches: Any = SimpleNamespace()
    unused: Any = None
    of_another_rank = armed(
        tmp_path, fault("no_space", 4, 1), fault("nan_loss", 3, 1), fault("stalled_data", 4, 1), size=2
    )
    for faults in (armed(tmp_path), of_another_rank):
        if faults is not of_another_rank:
            assert faults.notice == ""
            faults.attach(0, unused, unused, unused)
        assert faults.wrap_hook(hook) is hook
        assert faults.wrap_batches(batches) is batches and vars(batches) == {}
        assert (io.open, os.fsync, os.rename, time.time, dist.all_reduce) == touchable
        faults.close()
    assert not torch.nn.modules.module._global_forward_hooks
    assert not (tmp_path / "events").exists()


def test_faults_are_announced_until_all_have_fired(tmp_path: Path):
    run, plan = Run(tmp_path), (fault("exit", 4), fault("nan_loss", 5))
    run.start(world_size=1)
    for kind in ("exit", "nan_loss"):
        assert armed(tmp_path, *plan).notice.startswith("2 faults on purpose are armed: exit on rank 0 at step 4")
        run.fault(kind, victim=0)
    assert armed(tmp_path, *plan).notice == ""
    assert "1 of them from outside" in armed(tmp_path, *plan, fault("store_killed", 9)).notice


def pointed(run: Path, *faults: dict[str, Any], rank: int = 0, size: int = 1) -> Callable[[str, int], None]:
    return armed(run, *faults, rank=rank, size=size).wrap_hook(lambda phase, step: None)


def passing(hook: Callable[[str, int], None], step: int) -> float:
    """Seconds that the points of a micro-batch take."""
    started = time.perf_counter()
    for name in ("before_forward", "before_backward", "before_reduce", "after_reduce", "before_update", "after_update"):
        hook(name, step)
    return time.perf_counter() - started


def test_a_fault_fires_once_on_a_rank_whatever_starts_again_and_in_the_attempt_that_is_named(tmp_path: Path):
    pause = fault("slow_rank", 3, 1, seconds=0.2, steps=1)
    later = fault("slow_rank", 4, "all", seconds=0.2, steps=1, attempt=1)
    before = pointed(tmp_path, pause, later, rank=1, size=2)
    assert passing(before, 1) < 0.15 and passing(before, 2) >= 0.2 and passing(before, 3) < 0.15
    log = events.EventLog.open(tmp_path, 0, 0)
    log.append(started())
    log.close()
    again = pointed(tmp_path, pause, later, rank=1, size=2)
    assert passing(again, 2) < 0.15 and passing(again, 3) >= 0.2
    other = pointed(tmp_path, pause, later, rank=0, size=2)
    assert passing(other, 2) < 0.15 and passing(other, 3) >= 0.2
    smaller = pointed(tmp_path, pause, later, rank=0, size=1)  # where rank 1 is rank 0 now
    assert passing(smaller, 2) < 0.15 and passing(smaller, 3) < 0.15
    fired = [(event.index, entry.rank, entry.attempt) for entry, event in plan.fired(tmp_path)]
    assert fired == [(0, 1, 0), (1, 1, 1), (1, 0, 1)]


def test_a_slow_rank_is_slow_for_its_steps_and_no_longer(tmp_path: Path):
    hook = pointed(tmp_path, fault("slow_rank", 3, seconds=0.1, steps=2))
    assert [passing(hook, step) >= 0.1 for step in range(6)] == [False, False, True, True, False, False]


def test_a_fault_hits_the_same_place_when_others_are_left_out(tmp_path: Path):
    faults = [fault("exit", 3), fault("flip_weights", 5), fault("flip_weights", 7)]
    together = plan.make(configured(*faults), 1)
    (alone,) = plan.make(configured(plan.tree(together[1])), 1)
    rank = RankContext(configured(*faults), tmp_path, 0, 1, 0)
    places = [rank.chance(planned).random() for planned in (*together, alone)]
    assert places[1] == places[3] and len(set(places)) == 3


def save(run: Path, disk: Disk | None, step: int = 4) -> Any:
    """One save of one rank; the event that says how it ended."""
    run.mkdir(exist_ok=True)
    alone = World(0, 1, torch.device("cpu"))
    saver = checkpoint.Saver(run, alone, {"fingerprint": "f", "run_id": "r"}, config.Checkpoint())
    if disk is not None:
        disk.install()
    try:
        saver.begin(step, {"model.weight": torch.arange(1000.0)})
        (event,) = saver.finish()
    finally:
        if disk is not None:
            disk.remove()
        saver.close()
    return event


def failing(run: Path, kind: str, **more: Any) -> Disk:
    """A disk that takes this fault once, at step 4."""
    (planned,) = plan.make(configured(fault(kind, 4, **more)), 1)
    left = [planned]

    def take(operation: str, phase: str, step: int) -> Any:
        assert isinstance(planned.kind, DiskFault)
        due = operation == planned.kind.operation and (phase, step) == (planned.phase, planned.at_step)
        return left.pop() if left and due else None

    return Disk(run, take)


@pytest.mark.parametrize(
    ("kind", "more", "reason"),
    [
        ("no_space", {}, "No space left on device"),
        ("no_space", {"phase": "before_commit"}, "No space left on device"),
        ("eio_write", {}, "Input/output error"),
        ("eio_fsync", {}, "Input/output error"),
        ("eio_rename", {}, "Input/output error (.step-00000004"),
        ("eio_read", {}, "cannot be read (Input/output error)"),
        ("short_write", {}, "bytes instead of"),
    ],
)
def test_a_failing_disk_fails_one_try_of_one_save(tmp_path: Path, kind: str, more: dict[str, Any], reason: str):
    disk = failing(tmp_path, kind, **more)
    assert isinstance(save(tmp_path, disk, step=2), CheckpointSaved)
    failed = save(tmp_path, disk)
    assert isinstance(failed, CheckpointFailed) and reason in failed.reason
    assert [saved.step for saved in checkpoint.committed(tmp_path)] == [2]
    assert isinstance(save(tmp_path, disk), CheckpointSaved)
    assert all(not checkpoint.verify(saved) for saved in checkpoint.committed(tmp_path))
    (tmp_path / "elsewhere").write_text("other files are as they were")


@pytest.mark.parametrize("kind", ["slow_write", "stalled_disk"])
def test_a_slow_disk_only_takes_longer(tmp_path: Path, kind: str):
    saved = save(tmp_path, failing(tmp_path, kind, seconds=0.3))
    assert isinstance(saved, CheckpointSaved) and saved.seconds >= 0.3
    assert saved.seconds < save(tmp_path / "other", None).seconds + (0.6 if kind == "stalled_disk" else 2.0)


DAMAGE = [kind for kind in KINDS.values() if isinstance(kind, CheckpointDamage)]


@pytest.mark.parametrize("kind", DAMAGE, ids=lambda kind: kind.name)
def test_damage_is_done_to_the_newest_checkpoint_and_found(tmp_path: Path, kind: CheckpointDamage):
    chance = random.Random(0)
    assert kind.damage(tmp_path, chance) is None
    save(tmp_path, None, step=2)
    if kind.name == "swapped_shard":
        assert kind.damage(tmp_path, chance) is None
    shutil.copytree(files.final_path(tmp_path, 2), tmp_path / "checkpoints" / "step-00000001")
    shard = tmp_path / "checkpoints" / "step-00000001" / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[::-1])
    act = kind.damage(tmp_path, chance)
    assert act is not None and not checkpoint.verify(checkpoint.committed(tmp_path)[0])
    act()
    assert checkpoint.verify(checkpoint.committed(tmp_path)[0])


def test_checkpoints_that_vanish_come_back_with_what_was_saved_meanwhile(tmp_path: Path):
    save(tmp_path, None, step=2)
    thread = storage.vanish(tmp_path, 0.4)
    assert checkpoint.committed(tmp_path) == [] and not storage.can_vanish(tmp_path)
    save(tmp_path, None, step=4)
    thread.join()
    assert [saved.step for saved in checkpoint.committed(tmp_path)] == [4, 2]
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]
    storage.bring_back(tmp_path)
    assert [saved.step for saved in checkpoint.committed(tmp_path)] == [4, 2]


@pytest.mark.parametrize("bits", [1, 3, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_flip_flips_so_many_bits_and_the_same_ones_again(dtype: torch.dtype, bits: int):
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]

    def flipped() -> torch.Tensor:
        numbers_of = [torch.zeros(5, dtype=dtype), torch.linspace(-1, 1, 64, dtype=dtype).reshape(8, 8), torch.ones(0)]
        tensors.flip(numbers_of, bits, random.Random("place"))
        assert not numbers_of[0].any(), "a number that was zero"
        return numbers_of[1].view(integers)

    before = torch.linspace(-1, 1, 64, dtype=dtype).reshape(8, 8).view(integers)
    changed = [int(x) & (1 << dtype.itemsize * 8) - 1 for x in (flipped() ^ before).flatten()]
    assert sum(x.bit_count() for x in changed) == bits
    assert flipped().equal(flipped())


def test_one_number_is_spoiled():
    weights = torch.ones(4, 4)
    tensors.spoil([weights], "nan", random.Random(1))
    assert int(weights.isnan().sum()) == 1
    tensors.spoil([weights], "inf", random.Random(2))
    assert int(weights.isinf().sum()) == 1


def test_a_wrong_operator_leaves_out_the_last_addend_rarely_and_only_while_it_is_in_place():
    x = torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0))
    right, mean = x.sum(1), x.mean(1, keepdim=True)
    with wrong_operators.RareSum() as mode:
        wrong, wrong_mean = x.sum(1), x.mean(1, keepdim=True)
    rows = (wrong != right).nonzero().flatten()
    assert 50 < len(rows) < 500, "about one in 1024"
    assert mode.wrong >= 2 * len(rows)
    torch.testing.assert_close(wrong[rows], x[rows, :2].sum(1))
    assert wrong_mean.shape == mean.shape and (wrong_mean != mean).nonzero()[:, 0].equal(rows)
    assert x.sum(1).equal(right)


def test_a_held_lock_lets_go_after_its_time(tmp_path: Path):
    hook = pointed(tmp_path, fault("lock_held", 1, seconds=0.2))
    assert passing(hook, 0) >= 0.2
    assert not [thread for thread in threading.enumerate() if thread.name == "toprope-lock" and thread.is_alive()]
