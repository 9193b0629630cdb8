"""Copies of the state in the machine's memory: what a restart may load, and what it must not."""

import datetime
import errno
import hashlib
import os
import re
import shutil
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.checkpoint_worker import IDENTITY, flip, holds, small_state
from tests.support import (
    SMOKE,
    settings,
    summarise_run,
    torchrun,
    trainer,
    with_faults,
    worker_environment,
)  # fmt: skip
from trainer import checkpoint, config
from trainer.checkpoint import files, memory, neighbours, streams
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.checkpoint.neighbours import Machines
from trainer.launch import torchrun as launcher
from trainer.launch.agent import Agent
from trainer.launch.cluster import Cluster
from trainer.launch.processes import wait_until
from trainer.log import events, rundir
from trainer.parallel import elastic
from trainer.parallel.world import World
from trainer.phases import no_hook

ALONE = World(0, 1, torch.device("cpu"))


class State:
    """The part of a train state that is saved."""

    def __init__(self, step: int | None = None) -> None:
        self.step = step or 0
        self._tensors = small_state(step)

    def tensors(self) -> dict[str, torch.Tensor]:
        return self._tensors

    def restored(self, step: int) -> None:
        self.step = step


class Start:
    """A start of a job on a run: what it restores, and what it logs."""

    def __init__(
        self, run: Path, world: World = ALONE, run_id: str = IDENTITY["run_id"], is_checked: bool = False
    ) -> None:  # fmt: skip
        run.mkdir(exist_ok=True)
        self.log: list[events.Event] = []
        self.place = memory.place(run, run_id)
        chosen = config.Checkpoint(memory_every_steps=1)
        log: Any = self.log
        facts = IDENTITY | {"run_id": run_id}
        self.checkpointer = Checkpointer(run, world, facts, chosen, log, no_hook, no_hook, is_checked)
        self.state: Any = State()
        self.source = self.checkpointer.restore(self.state)

    def keep(self, *steps: int) -> None:
        """Copy the states of these steps into memory, then die."""
        for step in steps:
            self.checkpointer.keep(self.at(step))
        self.checkpointer.close()

    def save(self, step: int) -> None:
        """Save the state of a step on disk."""
        self.checkpointer.save(self.at(step))
        self.checkpointer.close()

    def at(self, step: int) -> Any:
        return State(step)

    def began(self) -> tuple[int, str]:
        assert self.state.step == 0 or holds(self.state.tensors(), self.state.step)
        return self.state.step, self.source

    def warnings(self) -> list[str]:
        return [event.message for event in self.log if isinstance(event, events.Warned)]

    def rejected(self) -> list[tuple[int, str]]:
        return [(e.step, e.reason) for e in self.log if isinstance(e, events.CheckpointRejected)]


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory in the place of /dev/shm."""
    path = tmp_path / "memory"
    path.mkdir()
    monkeypatch.setattr(memory, "ROOT", path)
    return path


def copies(start: Start) -> list[Path]:
    return [saved.path for saved in checkpoint.committed(start.place)]


@pytest.mark.parametrize(
    ("kept", "saved", "found"),
    [
        ([7], None, (7, "memory")), ([5, 6, 7], 4, (7, "memory")), ([3], 4, (4, "disk")), ([4], 4, (4, "disk")),
        ([], 4, (4, "disk")), ([], None, (0, "")),
    ],
)  # fmt: skip
def test_a_start_takes_the_newest_state_from_memory_or_disk_and_says_which(
    tmp_path: Path, kept: list[int], saved: int | None, found: tuple[int, str]
):
    Start(tmp_path / "run").keep(*kept)
    if saved is not None:
        Start(tmp_path / "run").save(saved)
    again = Start(tmp_path / "run")
    assert (again.began(), again.log) == (found, [])


def test_one_copy_lies_in_memory_and_none_is_logged_as_a_checkpoint(tmp_path: Path):
    start = Start(tmp_path / "run")
    start.keep(1, 2, 3)
    assert [path.name for path in copies(start)] == ["step-00000003"]
    assert start.log == []
    assert list((tmp_path / "run").iterdir()) == []


def cut_short(path: Path) -> None:
    """Turn a copy into what a process leaves that is killed while it copies."""
    staging = path.with_name(f".{path.name}.0a1b2c3d.partial")
    path.rename(staging)
    for file in staging.glob("*.distcp"):
        os.truncate(file, file.stat().st_size // 2)
    (staging / checkpoint.MANIFEST).unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (cut_short, ""),
        (lambda path: flip(next(path.glob("*.distcp"))), "in memory: .* does not match its checksum"),
        (lambda path: os.truncate(next(path.glob("*.distcp")), 10), "in memory: .* has 10 bytes instead of"),
        (lambda path: next(path.glob("*.distcp")).unlink(), "in memory: .* is missing"),
    ],
)  # fmt: skip
def test_a_damaged_copy_is_passed_over_and_the_disk_is_taken(
    tmp_path: Path, damage: Callable[[Path], None], reason: str
):
    Start(tmp_path / "run").save(4)
    start = Start(tmp_path / "run")
    start.keep(7)
    damage(*copies(start))
    again = Start(tmp_path / "run")
    assert again.began() == (4, "disk")
    assert [step for step, why in again.rejected() if re.match(reason, why)] == ([7] if reason else [])
    again.keep(8)  # and what lies there is in nobody's way
    assert Start(tmp_path / "run").began() == (8, "memory")


def test_the_copy_of_another_run_or_of_a_copied_directory_is_not_taken(tmp_path: Path):
    Start(tmp_path / "run").keep(7)
    shutil.copytree(tmp_path / "run", tmp_path / "copied")
    assert Start(tmp_path / "copied").began() == (0, "")
    shutil.rmtree(tmp_path / "run")
    assert Start(tmp_path / "run", run_id="another").began() == (0, "")


def test_a_copy_with_the_name_of_this_run_but_of_another_is_rejected(tmp_path: Path):
    other = Start(tmp_path / "run", run_id="another")
    other.keep(7)
    own = memory.place(tmp_path / "run", IDENTITY["run_id"])
    other.place.rename(own)
    again = Start(tmp_path / "run")
    assert again.began() == (0, "")
    assert again.rejected() == [(7, f"in memory: it is of another run (another instead of {IDENTITY['run_id']})")]


def test_without_shared_memory_training_goes_on_with_the_disk_and_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Start(tmp_path / "run").save(4)
    monkeypatch.setattr(memory, "ROOT", tmp_path / "not there")
    start = Start(tmp_path / "run")
    start.keep(5, 6)
    assert start.began() == (4, "disk")
    (warning,) = start.warnings()
    assert f"this machine has no {tmp_path / 'not there'}. A restart begins from the disk" in warning


def test_copies_that_would_fill_the_memory_of_others_are_not_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    size = sum(tensor.numel() * 4 for tensor in small_state(None).values())
    usage = shutil.disk_usage(tmp_path)._replace(free=4 * size - 1)
    monkeypatch.setattr(memory.shutil, "disk_usage", lambda path: usage)
    (warning,) = Start(tmp_path / "run").warnings()
    assert "2 copies take 0.0 MB, more than half of the 0.0 MB that are free" in warning
    usage = usage._replace(free=4 * size)
    assert Start(tmp_path / "run").warnings() == []


def test_a_memory_that_is_full_later_keeps_the_last_copy_and_is_reported_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    Start(tmp_path / "run").keep(5, 6, 7)
    start = Start(tmp_path / "run")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(streams._HashingStream, "_put", full)
        start.keep(8, 9, 10)
    (warning,) = start.warnings()
    assert warning.startswith("the state of step 8 could not be copied into memory: No space left on device")
    assert [path.name for path in start.place.glob("checkpoints/*")] == ["step-00000007"]
    assert Start(tmp_path / "run").began() == (7, "memory")


@pytest.mark.parametrize(
    ("second", "reason"), [("other", "the sentinel may find a copy wrong"), ("", "a rank does not see the memory")]
)
def test_where_copies_on_several_machines_would_not_be_safe_the_disk_is_used_and_the_reason_told(
    tmp_path: Path, second: str, reason: str
):
    Start(tmp_path / "run").keep(7)

    class Two(World):
        """A second rank that reads another token."""

        def agree(self, compute: Callable[[], Any], waiting: Callable[[], None] = lambda: None) -> list[Any]:
            own = compute()
            return [own, second] if isinstance(own, str) and re.fullmatch("[0-9a-f]{16}", own) else [own]

    start = Start(tmp_path / "run", Two(0, 1, torch.device("cpu")), is_checked=True)
    assert start.began() == (0, "")
    assert [reason in warning for warning in start.warnings()] == [True]


# Several machines


def test_each_shard_lies_on_two_machines_and_each_machine_keeps_those_of_the_one_before_it():
    machines = Machines.told_by(["a", "a", "b", "c", "c", "c"])
    keepers = [machines.keeper(rank) for rank in range(6)]
    assert keepers == [2, 2, 3, 0, 1, 0]
    assert [machines.of_rank[keeper] for keeper in keepers] == [1, 1, 2, 0, 0, 0]
    assert [machines.leader(rank) for rank in range(6)] == [0, 0, 2, 3, 3, 3]


@dataclass(frozen=True)
class Thread(World):
    """A rank in a thread of this process."""

    values: list[Any] = field(default_factory=list)
    barrier: Any = None

    def agree(self, compute: Callable[[], Any], waiting: Callable[[], None] = lambda: None) -> list[Any]:
        self.values[self.rank] = compute()
        self.barrier.wait(20)
        found = list(self.values)
        self.barrier.wait(20)
        return found


def on_threads(size: int, work: Callable[[World], Any]) -> list[Any]:
    """Return what `work` returns on each of some ranks, which are connected by gloo."""
    store, values, barrier = dist.HashStore(), [None] * size, threading.Barrier(size)

    def run(rank: int) -> Any:
        group: Any = dist.ProcessGroupGloo(store, rank, size, datetime.timedelta(seconds=20))
        return work(Thread(rank, size, torch.device("cpu"), group, values=values, barrier=barrier))

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def put(place: Path, step: int, names: Iterable[str], missing: str = "", attempt: int = 0) -> None:
    """A machine's copy of a step: all of `names` are in its manifest, and all but those in `missing` are there."""
    final = files.final_path(place, step)
    final.mkdir(parents=True)
    contents = {name: f"{name} of {step} in {attempt} ".encode() * 9 for name in names}
    listed = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in contents.items()}
    for name in set(contents) - set(missing):
        (final / name).write_bytes(contents[name])
    files.write_manifest(final, IDENTITY | {"step": step, "world_size": 3, "files": listed})


@pytest.mark.parametrize(
    ("held", "above", "found"),
    [
        ({0: [(7, "b")], 1: [(7, "c")]}, -1, 7),  # machine 2 is new: that of before held a copy of b
        ({0: [(7, "ab")], 1: [(7, "")], 2: [(7, "bc")]}, -1, 7),
        ({0: [(7, "b"), (6, "")], 1: [(7, "b"), (6, "a")], 2: []}, -1, 6),  # nobody has b of step 7
        ({0: [(7, "b")], 1: [(7, "b")]}, -1, None),
        ({0: [(7, "b")], 1: [(7, "c")]}, 7, None),  # the disk has it
        ({0: [(7, "b")], 1: [(7, "c")], 2: [(9, "a")]}, -1, 7),
    ],
)
def test_every_machine_gets_the_newest_copy_that_they_have_together_and_keeps_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, held: dict[int, list[tuple[int, str]]], above: int,
    found: int | None,
):  # fmt: skip
    monkeypatch.setattr(neighbours, "PIECE_BYTES", 50)  # each file goes in three pieces
    places = [tmp_path / str(machine) for machine in range(3)]
    for machine, copies_there in held.items():
        for step, missing in copies_there:
            put(places[machine], step, "abc", missing)

    def start(rank: World) -> list[tuple[int, list[str]]]:
        neighbours.gather(places[rank.rank], Machines((0, 1, 2)), rank, above)
        return [(saved.step, checkpoint.verify(saved)) for saved in checkpoint.committed(places[rank.rank])]

    assert on_threads(3, start) == [[] if found is None else [(found, [])]] * 3


def test_what_is_damaged_in_one_memory_comes_from_the_other_and_copies_of_two_attempts_are_not_mixed(tmp_path: Path):
    places = [tmp_path / "0", tmp_path / "1"]
    for attempt, place in enumerate(places):
        put(place, 7, "abc")
        put(place, 8, "abc", missing="ab"[attempt], attempt=attempt)
    (files.final_path(places[0], 7) / "b").write_bytes(b"another")

    def start(rank: World) -> list[tuple[int, list[str]]]:
        neighbours.gather(places[rank.rank], Machines((0, 1)), rank)
        return [(saved.step, checkpoint.verify(saved)) for saved in checkpoint.committed(places[rank.rank])]

    assert on_threads(2, start) == [[(7, [])]] * 2


@pytest.mark.parametrize("foreign", ["a link", "another user's"])
def test_a_place_that_others_can_write_is_neither_read_nor_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, foreign: str
):
    start = Start(tmp_path / "run")
    start.keep(7)
    if foreign == "a link":
        start.place.rename(tmp_path / "elsewhere")
        start.place.symlink_to(tmp_path / "elsewhere")
    else:
        monkeypatch.setattr(memory.os, "getuid", lambda: 12345678)
    again = Start(tmp_path / "run")
    assert again.began() == (0, "")
    assert "is no directory of this user" in again.warnings()[0]
    memory.discard(start.place)
    assert len(copies(start)) == 1


def test_the_end_of_a_run_leaves_nothing_in_memory(tmp_path: Path, root: Path):
    start = Start(tmp_path / "run")
    start.checkpointer.keep(start.at(7))
    start.checkpointer.save(start.at(8))
    start.checkpointer.finish(start.at(8))
    start.checkpointer.close()
    assert list(root.iterdir()) == []
    assert Start(tmp_path / "run").began() == (8, "disk")


def test_a_copy_of_what_the_sentinel_finds_wrong_a_step_later_is_gone(tmp_path: Path):
    start = Start(tmp_path / "run")
    start.checkpointer.keep(start.at(7))
    facts: dict[str, Any] = {"step": 8, "what": "state", "culprit": 0, "micro_batch": None, "parameter": None}
    found = events.Corrupted(**facts, action="repaired", found="")
    start.checkpointer.heed(events.Entry(0, 0, 0.0, found))
    assert not start.place.exists()
    start.keep(8)  # repaired: from here on copies are right again
    assert start.warnings() == []
    assert Start(tmp_path / "run").began() == (8, "memory")


def test_memory_of_runs_that_are_gone_is_freed_by_the_next_start_and_no_other(tmp_path: Path):
    places = {}
    for name in ("lives", "gone", "gone but written to now"):
        start = Start(tmp_path / name)
        start.keep(7)
        places[name] = start.place
    for name in ("gone", "gone but written to now"):
        shutil.rmtree(tmp_path / name)
    for name in ("lives", "gone"):
        for path in (places[name] / "token", places[name] / "checkpoints"):
            os.utime(path, (0, 0))
    Start(tmp_path / "run")
    assert {name for name, place in places.items() if place.exists()} == {"lives", "gone but written to now"}


def test_a_launcher_removes_what_its_workers_have_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    failures_file = tmp_path / "failures.json"
    monkeypatch.setenv(elastic.FAILURES_FILE, str(failures_file))
    start = Start(tmp_path / "run")
    start.keep(7)
    assert elastic.noted_memory(failures_file) == start.place
    launcher.remove_notes(failures_file)
    assert [path for path in (start.place, failures_file.with_suffix(".memory")) if path.exists()] == []


def test_nothing_but_a_place_is_ever_removed(tmp_path: Path):
    (tmp_path / "precious").mkdir()
    memory.discard(tmp_path / "precious")
    assert (tmp_path / "precious").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/shm is Linux's")
def test_a_job_has_not_left_what_another_run_keeps_in_memory(tmp_path: Path):
    with Agent(["-c", "", "--run", "mine"], tmp_path / "log.txt", launch=[sys.executable], directory=tmp_path) as job:
        job.process.wait(20)
        places = {name: memory.place(tmp_path / name, "1234") for name in ("mine", "other")}
        try:
            assert [memory.prepare(place, tmp_path / name, 1) for name, place in places.items()] == [None, None]
            assert [job._may_have_made(str(place)) for place in places.values()] == [True, False]
            memory.discard(places["mine"])
            assert job.leftovers() == []
        finally:
            for place in places.values():
                memory.discard(place)


# Real processes

SMALL = settings(model__n_layers=1, data__micro_batches=2, eval__max_tokens=128)
KILLS = with_faults({"kind": "sigkill", "rank": rank, "at_step": step} for rank, step in ((1, 33), (0, 52)))


@pytest.fixture(scope="module")
def calm_sha256(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The weights that a run of one rank without faults ends with."""
    run = tmp_path_factory.mktemp("calm") / "run"
    trainer("train", SMOKE, "--run", run, *SMALL)
    return summarise_run(run)["weights_sha256"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/dev/shm is Linux's")
@pytest.mark.parametrize("strategy", ["replicate", "fsdp"])
def test_after_kills_the_ranks_go_on_from_memory_and_end_with_the_bits_of_a_calm_run(
    tmp_path: Path, strategy: str, calm_sha256: str
):
    run = tmp_path / "run"
    chosen = [*SMALL, *settings(checkpoint__memory_every_steps=1, parallel__strategy=strategy), *KILLS]
    if strategy == "fsdp":  # both shards are there, also the dead rank's
        done = trainer("launch", SMOKE, "--workers", "2", "--run", run, *chosen)
        assert 'parallel.strategy = "fsdp": each worker holds what no other one has' in done.stderr
    else:
        done = torchrun(2, "train", SMOKE, "--run", run, *chosen, restarts=3)
    summary = summarise_run(run)
    assert summary["weights_sha256"] == calm_sha256
    # A copy is whole when the next one is begun; of disk checkpoints there were those of steps 20 and 40.
    begun = [(attempt["from_step"], attempt["state_from"]) for attempt in summary["attempts"]]
    assert begun[0] == (0, None)
    assert [source for _, source in begun[1:]] == ["memory", "memory"]
    assert [step in found for (step, _), found in zip(begun[1:], ((31, 32), (50, 51)), strict=True)] == [True, True]
    assert [incident["lost_steps"] <= 1 for incident in summary["incidents"]] == [True, True]
    assert "(from memory) → 60" in done.stdout
    place = memory.place(run, rundir.read(run)["run_id"])
    assert not (Path("/dev/shm") / place.name).exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="/dev/shm is Linux's")
def test_a_job_that_died_with_its_launcher_goes_on_from_memory_at_another_number_of_ranks(
    tmp_path: Path, calm_sha256: str
):
    run = tmp_path / "run"
    chosen = [*SMALL, *settings(checkpoint__memory_every_steps=1)]
    kill = with_faults([{"kind": "sigkill", "rank": 0, "at_step": 33}])
    trainer("train", SMOKE, "--run", run, *chosen, *kill, check=False)  # one process: it is all there is
    torchrun(2, "train", SMOKE, "--run", run, *chosen, *kill, *settings(parallel__strategy="fsdp"))
    summary = summarise_run(run)
    assert summary["weights_sha256"] == calm_sha256
    assert [(a["world_size"], a["state_from"]) for a in summary["attempts"]] == [(1, None), (2, "memory")]
    assert summary["attempts"][1]["from_step"] in (31, 32)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="it looks for processes in /proc")
def test_a_machine_dies_with_all_that_it_holds_and_the_other_goes_on_from_its_memory_without_the_disk(
    tmp_path: Path, calm_sha256: str
):
    run, memories = tmp_path / "run", tmp_path / "memories"
    memories.mkdir()
    chosen = [*SMALL[1::2], "checkpoint.memory_every_steps=1", "checkpoint.every_steps=0", 'parallel.strategy="fsdp"']
    variables = worker_environment({"before_update": 0.05}) | {"TOPROPE_TEST_MEMORY": str(memories)}
    cluster = Cluster(
        SMOKE, run, chosen, ranks=1, nodes=2, directory=tmp_path / "job", environment=variables, warm=True,
        worker=("tests.worker", "train"),
    )  # fmt: skip

    def steps() -> int:
        return sum(isinstance(e.event, events.StepDone) for e in events.read(run)) if rundir.is_run(run) else 0

    with cluster:
        cluster.start()
        assert wait_until(lambda: steps() >= 20, 60), cluster.output
        cluster.nodes[1].kill()
        left, gone = (memories / str(node.process.pid) for node in cluster.nodes)
        shutil.rmtree(gone)
        assert cluster.wait(60) == 0, cluster.output
    summary = summarise_run(run)
    assert summary["weights_sha256"] == calm_sha256
    assert [(a["world_size"], a["state_from"]) for a in summary["attempts"]] == [(2, None), (1, "memory")]
    assert summary["attempts"][1]["from_step"] >= 18
    assert list(left.iterdir()) == []
