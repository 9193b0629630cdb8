"""Promises about checkpoints. Real files throughout, and real ranks and kills where more than one process matters."""

import contextlib
import errno
import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.checkpoint_worker import IDENTITY, LAYOUTS, flip, holds, names, small_state
from tests.support import ROOT, mounted, start
from trainer import checkpoint, config
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.errors import EXIT_USAGE, CheckpointError, NewerFormatError, UsageError
from trainer.launch.forkserver import Child
from trainer.log import events
from trainer.log.events import CheckpointFailed, CheckpointRejected, CheckpointSaved, EventLog
from trainer.parallel.world import World
from trainer.phases import no_hook

ALONE = World(0, 1, torch.device("cpu"))
FINGERPRINT = IDENTITY["fingerprint"]
HOOKS = no_hook, no_hook


def saver(run: Path, **options: Any) -> checkpoint.Saver:
    settings = config.Checkpoint(**{key: options.pop(key) for key in list(options) if key.startswith("keep")})
    return checkpoint.Saver(run, ALONE, options.pop("identity", IDENTITY), settings, **options)


def save(run: Path, *steps: int, **options: Any) -> list[events.Event]:
    run.mkdir(exist_ok=True)
    writer, ended = saver(run, **options), []
    for step in steps:
        writer.begin(step, small_state(step))
        ended += writer.finish()
    writer.close()
    return ended


def restore(run: Path, **options: Any) -> tuple[int | None, list[CheckpointRejected], dict[str, torch.Tensor]]:
    tensors, reports = small_state(None), []
    saved = checkpoint.restore(run, tensors, ALONE, FINGERPRINT, reports.append, **options)
    return saved and saved.step, reports, tensors


def steps_of(run: Path) -> list[int]:
    return [saved.step for saved in checkpoint.committed(run)]


def path_of(run: Path, step: int) -> Path:
    return checkpoint.directory(run) / f"step-{step:08d}"


def shard_of(run: Path, step: int) -> Path:
    return next(path_of(run, step).glob("*.distcp"))


def ranks(command: str, count: int, directory: Path, *, timeout: float = 90) -> list[Any]:
    """The results of `count` processes of checkpoint_worker; None for one that wrote none."""
    with processes(command, count, directory) as running:
        for process in running:
            process.wait(timeout)
    results = [directory / f"result-{rank}.json" for rank in range(count)]
    return [json.loads(path.read_text()) if path.exists() else None for path in results]


@contextlib.contextmanager
def processes(command: str, count: int, directory: Path) -> Iterator[list[subprocess.Popen[bytes] | Child]]:
    (directory / "run").mkdir()
    arguments = [sys.executable, "-m", "tests.checkpoint_worker", command]
    running = [start([*arguments, str(rank), str(count), str(directory)]) for rank in range(count)]
    try:
        yield running
    finally:
        for process in running:
            process.kill()
            process.wait()


# Saving and loading


def test_a_save_in_any_sharding_on_any_number_of_ranks_loads_in_any_other_bitwise(tmp_path: Path):
    results = ranks("reshard", 4, tmp_path)
    for rank, result in enumerate(results):
        sizes = [size for _, size in LAYOUTS if size > rank]
        assert len(result) == len(sizes) * (1 + len(LAYOUTS)), "cases are missing"
        wrong = [case for case, right in result.items() if right not in (True, ["CheckpointSaved"])]
        assert not wrong
    manifest = checkpoint.read_manifest(checkpoint.committed(tmp_path / "replicate-3")[0])
    shards = [file["bytes"] for name, file in manifest["files"].items() if name.endswith(".distcp")]
    assert len(shards) == 3 and max(shards) < 0.5 * sum(shards), "replicas share the writing"


def test_a_save_returns_before_it_is_written_and_holds_the_state_of_its_own_step(tmp_path: Path):
    go_on: list[bool] = []

    def slow(point: str, step: int) -> None:
        while not go_on:
            time.sleep(0.001)

    writer, state = saver(tmp_path, hook=slow), small_state(1)
    writer.begin(1, state)
    for tensor in state.values():
        tensor.zero_()  # training continues
    assert writer.poll() == [] and steps_of(tmp_path) == []
    go_on.append(True)
    assert names(writer.finish()) == ["CheckpointSaved"]
    step, _, tensors = restore(tmp_path)
    assert step == 1 and holds(tensors, 1)


def test_the_next_save_waits_for_the_one_under_way_and_none_is_lost(tmp_path: Path):
    writer = saver(tmp_path, keep_last=5, hook=lambda point, step: time.sleep(0.02))
    for step in range(1, 5):
        writer.begin(step, small_state(step))
    ended = [event for event in writer.finish() if isinstance(event, CheckpointSaved)]
    assert [event.step for event in ended] == [1, 2, 3, 4]
    assert all(event.stall_seconds > 0.02 for event in ended[1:]), "the waiting is reported"
    assert steps_of(tmp_path) == [4, 3, 2, 1]
    assert ended[0].bytes == checkpoint.committed(tmp_path)[-1].bytes


def test_saving_again_copies_into_the_same_buffers(tmp_path: Path):
    writer = saver(tmp_path)
    writer.begin(1, small_state(1))
    writer.finish()
    assert writer._plan is not None
    before = [buffer.data_ptr() for buffer in writer._plan._buffers.values()]
    writer.begin(2, small_state(2))
    writer.finish()
    assert [buffer.data_ptr() for buffer in writer._plan._buffers.values()] == before


def test_room_that_was_made_at_the_start_is_what_the_first_save_copies_into(tmp_path: Path, monkeypatch):
    (run := tmp_path / "run").mkdir()
    writer, made = saver(run), list[torch.Tensor]()
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **more: made.append(tensor := empty(*a, **more)) or tensor)
    writer.reserve(small_state(3))
    at_start = len(made)
    writer.begin(3, small_state(3))
    assert at_start == len(made) > 0
    assert [type(event) for event in writer.finish()] == [CheckpointSaved]
    writer.close()
    assert restore(run)[0] == 3


def test_room_that_cannot_be_made_at_the_start_fails_nothing_but_the_save_that_lacks_it(tmp_path: Path, monkeypatch):
    (run := tmp_path / "run").mkdir()
    writer, full = saver(run), [True]
    empty = torch.empty

    def limited(*arguments: Any, **more: Any) -> torch.Tensor:
        if full:
            raise RuntimeError("CUDA error: out of memory")
        return empty(*arguments, **more)

    monkeypatch.setattr(torch, "empty", limited)
    writer.reserve(small_state(3))
    writer.begin(3, small_state(3))
    (failed,) = writer.finish()
    assert isinstance(failed, CheckpointFailed) and "out of memory" in failed.reason
    full.clear()
    writer.begin(4, small_state(4))
    assert [type(event) for event in writer.finish()] == [CheckpointSaved]
    writer.close()


@pytest.mark.parametrize(("device", "calls"), [("cuda", 1), ("cpu", 0)])
def test_a_run_on_a_gpu_makes_room_for_its_saves_before_it_trains(tmp_path: Path, monkeypatch, device, calls):
    reserved = []
    monkeypatch.setattr(checkpoint.Saver, "reserve", lambda saver, tensors: reserved.append(tensors))
    world, facts = World(0, 1, torch.device(device)), {**IDENTITY, "run_id": "r"}
    checkpointer = Checkpointer(tmp_path, world, facts, config.Checkpoint(), EventLog(tmp_path / "log", 0, 0), *HOOKS)
    state: Any = SimpleNamespace(tensors=lambda: small_state(0))
    checkpointer.reserve(state)
    checkpointer.close()
    assert len(reserved) == calls


def test_the_manifest_lists_every_file_with_step_run_size_and_checksum(tmp_path: Path):
    save(tmp_path, 3)
    manifest = checkpoint.read_manifest(checkpoint.open_saved(path_of(tmp_path, 3)))
    assert (manifest["step"], manifest["fingerprint"], manifest["run_id"]) == (3, FINGERPRINT, IDENTITY["run_id"])
    on_disk = {path.name: path.read_bytes() for path in path_of(tmp_path, 3).iterdir() if path.name != "manifest.json"}
    assert manifest["files"] == {
        name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in on_disk.items()
    }


def test_content_is_durable_before_its_name_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Files before the manifest, the manifest before the rename, the rename before the save is reported."""
    done: list[tuple[str, int]] = []
    sync, rename = os.fsync, os.rename

    def noted_sync(file: int) -> None:
        sync(file)
        done.append(("sync", os.fstat(file).st_ino))

    def noted_rename(old: Path, new: Path) -> None:
        done.append(("rename", Path(old).stat().st_ino))
        rename(old, new)

    monkeypatch.setattr(os, "fsync", noted_sync)
    monkeypatch.setattr(os, "rename", noted_rename)
    save(tmp_path, 1)
    final = path_of(tmp_path, 1)
    inodes = {path: path.stat().st_ino for path in (*final.iterdir(), final, final.parent, tmp_path)}
    contents = {("sync", inodes[path]) for path in final.iterdir() if path.name != "manifest.json"}
    manifest, directory = ("sync", inodes[final / "manifest.json"]), ("sync", inodes[final])
    named, name = ("rename", inodes[final]), ("sync", inodes[final.parent])
    assert ("sync", inodes[tmp_path]) in done, "the directory of checkpoints itself"
    assert contents <= set(done[: done.index(manifest)])
    assert directory in done[done.index(manifest) : done.index(named)]
    assert name in done[done.index(named) :]


def test_a_run_that_never_saved_starts_from_zero(tmp_path: Path):
    assert restore(tmp_path)[0] is None


def test_inspecting_checkpoints_does_not_load_torch():
    code = "import sys; from trainer import checkpoint; checkpoint.verify; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# Dying


def test_killed_anywhere_in_a_save_only_that_save_is_lost_and_the_next_cleans_up(tmp_path: Path):
    ranks("killed", 1, tmp_path)
    for point in ("in_save_shard", "before_commit", "after_commit"):
        run = tmp_path / f"{point}-2"
        survivor = 2 if point == "after_commit" else 1
        step, reports, tensors = restore(run)
        assert (step, reports) == (survivor, []) and holds(tensors, survivor), point
        again = tmp_path / f"{point}-1"  # died while it replaced the only checkpoint by another of the same step
        step, reports, tensors = restore(again)
        assert (step, reports) == (1, []) and holds(tensors, 1), point
        for directory in (run, again):
            save(directory, 5, keep_last=1)
            assert [path.name for path in checkpoint.directory(directory).iterdir()] == ["step-00000005"], point


def test_killed_between_the_two_renames_of_a_replacement_the_old_checkpoint_still_counts(tmp_path: Path):
    save(tmp_path, 1)
    path_of(tmp_path, 1).rename(checkpoint.directory(tmp_path) / ".step-00000001.replaced")
    step, _, tensors = restore(tmp_path)
    assert step == 1 and holds(tensors, 1)
    flip(next(checkpoint.directory(tmp_path).glob(".step-00000001.replaced/*.distcp")))
    save(tmp_path, 1)
    assert [path.name for path in checkpoint.directory(tmp_path).iterdir()] == ["step-00000001"]


def test_a_peer_that_dies_in_a_save_fails_it_for_the_others_at_once(tmp_path: Path):
    survivor, dead = ranks("dying_peer", 2, tmp_path)
    assert dead is None
    assert survivor["ended"] == ["CheckpointSaved", "CheckpointFailed", "CheckpointFailed"]
    assert "another rank was lost" in survivor["reason"] and "\n" not in survivor["reason"]
    assert max(survivor["took"].values()) < 5
    assert steps_of(tmp_path / "run") == [1]


def test_a_peer_that_stopped_in_a_save_does_not_keep_the_others_from_leaving(tmp_path: Path):
    with processes("stopped_peer", 2, tmp_path) as (survivor, stopped):
        assert survivor.wait(60) == 0
        assert stopped.poll() is None
    took = json.loads((tmp_path / "result-0.json").read_text())["took"]
    assert took["close"] < 5 and steps_of(tmp_path / "run") == [1]


# Saving may fail


def test_a_rank_that_cannot_write_fails_the_save_on_all_ranks_and_the_next_save_works(tmp_path: Path):
    results = ranks("failing_rank", 2, tmp_path)
    for result in results:
        assert result["ended"] == ["CheckpointFailed", "CheckpointSaved", "CheckpointSaved"]
        assert result["reason"] == "rank 1: No space left on device. The disk is full"
        assert result["counts"] == [0, 1, 1, 0, 0, 0]
        assert (result["found"], result["intact"]) == (2, True), "all ranks pass over what one of them finds damaged"
    assert [len(result["reports"]) for result in results] == [1, 0], "reported once"
    assert results[0]["reports"][0] == {"step": 3, "reason": "__1_0.distcp does not match its checksum"}


@contextlib.contextmanager
def small_files(run: Path) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextlib.contextmanager
def vanished(run: Path) -> Iterator[None]:
    run.rename(run.with_name("elsewhere"))
    yield
    assert not run.exists(), "nothing is made up in place of a disk that went away"
    run.with_name("elsewhere").rename(run)


@contextlib.contextmanager
def a_file_in_the_way(run: Path) -> Iterator[None]:
    checkpoint.directory(run).rename(run / "aside")
    checkpoint.directory(run).write_text("")
    yield
    checkpoint.directory(run).unlink()
    (run / "aside").rename(checkpoint.directory(run))


@contextlib.contextmanager
def full_disk(run: Path) -> Iterator[None]:
    with mounted(checkpoint.directory(run), "size=256k"):
        (checkpoint.directory(run) / "ballast").write_bytes(bytes(200 * 1024))
        yield


@contextlib.contextmanager
def read_only(run: Path) -> Iterator[None]:
    with mounted(checkpoint.directory(run), "size=1m,ro"):
        yield


TROUBLE = {
    small_files: "File too large",
    vanished: "No such file or directory",
    a_file_in_the_way: "Not a directory",
    full_disk: "No space left on device",
    read_only: "Read-only file system",
}


@pytest.mark.parametrize(("trouble", "reason"), TROUBLE.items(), ids=[trouble.__name__ for trouble in TROUBLE])
def test_a_save_that_the_disk_refuses_is_reported_and_the_next_one_works(
    tmp_path: Path, trouble: Callable[[Path], contextlib.AbstractContextManager[None]], reason: str
):
    run = tmp_path / "run"
    save(run, 1)
    writer = saver(run)
    with trouble(run):
        for count in (1, 2):
            writer.begin(2, small_state(2, tensors=100))
            (failed,) = writer.finish()
            assert isinstance(failed, CheckpointFailed)
            assert reason in failed.reason and "\n" not in failed.reason
            assert failed.in_a_row == writer.failures_in_a_row == count
    assert steps_of(run) == [1] and restore(run)[0] == 1
    writer.begin(3, small_state(3, tensors=100))
    assert names(writer.finish()) == ["CheckpointSaved"] and writer.failures_in_a_row == 0
    assert sorted(path.name for path in checkpoint.directory(run).iterdir()) == ["step-00000001", "step-00000003"]


@pytest.mark.parametrize("point", ["in_save_shard", "before_commit"])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.EIO, "EIO"), "EIO. The disk or its connection fails"),
        (OSError(errno.EINVAL, "EINVAL"), "EINVAL. Its file system may lack what toprope needs: locks, or making the "
         "names in a folder durable"),
        (SystemExit(3), "SystemExit: 3"),
    ],
    ids=["EIO", "no fsync of folders", "exit"],
)  # fmt: skip
def test_no_error_ends_the_writing_thread_without_a_word(tmp_path: Path, point: str, error: BaseException, reason: str):
    def hook(here: str, step: int) -> None:
        if (here, step) == (point, 2):
            raise error

    ended = save(tmp_path, 1, 2, 3, hook=hook)
    assert names(ended) == ["CheckpointSaved", "CheckpointFailed", "CheckpointSaved"]
    assert isinstance(ended[1], CheckpointFailed) and ended[1].reason == reason
    assert steps_of(tmp_path) == [3, 1]


def test_a_write_that_silently_went_wrong_is_noticed_before_anything_older_is_removed(tmp_path: Path):
    def hook(point: str, step: int) -> None:
        if (point, step) == ("after_commit", 2):
            flip(shard_of(tmp_path, 2))

    ended = save(tmp_path, 1, 2, keep_last=1, hook=hook)
    assert isinstance(ended[1], CheckpointFailed)
    assert ended[1].reason == "it was written, but reads back differently: __0_0.distcp does not match its checksum"
    assert steps_of(tmp_path) == [1] and restore(tmp_path)[0] == 1


# Retention


def test_the_newest_and_every_nth_are_kept(tmp_path: Path):
    save(tmp_path, 1, 2, 3, 4, 5, 6, 7, 8, keep_last=2, keep_every_steps=3)
    assert steps_of(tmp_path) == [8, 7, 6, 3]


def test_the_last_intact_checkpoint_is_never_removed(tmp_path: Path):
    save(tmp_path, 1, 2, 3, 4, keep_last=4)
    for step in (2, 3, 4):
        flip(shard_of(tmp_path, step))
    checkpoint.prune(tmp_path, keep_last=1)
    assert 1 in steps_of(tmp_path)
    flip(shard_of(tmp_path, 1))
    before = steps_of(tmp_path)
    checkpoint.prune(tmp_path, keep_last=1)
    assert steps_of(tmp_path) == before, "with none intact, nothing is thrown away"


def test_a_damaged_newer_checkpoint_does_not_push_out_the_one_just_written_and_is_replaced_in_time(tmp_path: Path):
    save(tmp_path, 2, 4, keep_last=2)
    flip(shard_of(tmp_path, 4))
    assert restore(tmp_path)[0] == 2
    save(tmp_path, 3, keep_last=1)
    assert steps_of(tmp_path) == [4, 3] and restore(tmp_path)[0] == 3
    save(tmp_path, 4, keep_last=1)
    assert steps_of(tmp_path) == [4] and restore(tmp_path)[0] == 4


# Damage


def rewrite_manifest(path: Path, **changes: Any) -> None:
    """Rewrite it with a checksum that fits, as an attacker would."""
    body = json.loads((path / "manifest.json").read_text())["body"] | changes
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps({"sha256": digest, "body": body}))


def list_anew(path: Path) -> None:
    present = {file.name: file.read_bytes() for file in path.iterdir() if file.name != "manifest.json"}
    files = {n: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for n, data in present.items()}
    rewrite_manifest(path, files=files)


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def other_run(run: Path) -> Path:
    save(run.with_name("other"), 4, identity=IDENTITY | {"fingerprint": "e" * 64})
    return path_of(run.with_name("other"), 4)


DAMAGE: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "truncated": (lambda run, p: os.truncate(shard_of(run, 4), 100), "__0_0.distcp has 100 bytes instead of"),
    "flipped": (lambda run, p: flip(shard_of(run, 4)), "__0_0.distcp does not match its checksum"),
    "missing": (lambda run, p: shard_of(run, 4).unlink(), "__0_0.distcp is missing"),
    "zero length": (lambda run, p: os.truncate(shard_of(run, 4), 0), "__0_0.distcp is empty"),
    "shard of another step": (
        lambda run, p: shutil.copy(shard_of(run, 2), p),
        "__0_0.distcp does not match its checksum: it is a file of step 2",
    ),
    "shard of another run": (
        lambda run, p: shutil.copy(shutil.copy(other_run(run) / "__0_0.distcp", run), p / "__0_0.distcp")
        and flip(p / "__0_0.distcp"),
        "__0_0.distcp does not match its checksum",
    ),
    "whole checkpoint of another run": (
        lambda run, p: (shutil.rmtree(p), shutil.copytree(other_run(run), p)),
        "it is of a run with other settings (fingerprint eeeeeeeeeeeeeeee…)",
    ),
    "whole checkpoint of another step": (
        lambda run, p: (shutil.rmtree(p), shutil.copytree(path_of(run, 2), p)),
        "manifest.json is that of step 2",
    ),
    "stale metadata": (
        lambda run, p: (p / ".metadata").write_bytes((p / ".metadata").read_bytes()[:-50] + bytes(50)),
        ".metadata does not match its checksum",
    ),
    "missing metadata": (lambda run, p: (p / ".metadata").unlink(), ".metadata is missing"),
    "directory for a file": (lambda run, p: replace_by_directory(shard_of(run, 4)), "is no regular file"),
    "pipe for a file": (lambda run, p: replace_by_fifo(shard_of(run, 4)), "is no regular file"),
    "missing manifest": (lambda run, p: (p / "manifest.json").unlink(), "manifest.json is missing"),
    "empty manifest": (lambda run, p: (p / "manifest.json").write_text(""), "manifest.json is damaged"),
    "flipped manifest": (
        lambda run, p: (p / "manifest.json").write_text(
            (p / "manifest.json").read_text().replace('"step": 4', '"step": 5')
        ),
        "manifest.json does not match its own checksum",
    ),
    "deep manifest": (lambda run, p: (p / "manifest.json").write_text("[" * 100_000), "manifest.json is damaged"),
    "manifest of numbers": (lambda run, p: rewrite_manifest(p, files=[1]), "manifest.json is damaged"),
    "damage that fits its manifest": (
        lambda run, p: ((p / ".metadata").write_bytes(b"no pickle"), list_anew(p)),
        "",
    ),
    "a shard of other shapes that fits its manifest": (
        lambda run, p: (shard_of(run, 4).write_bytes(b"no zip" * 1000), list_anew(p)),
        "",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_in_one_line_and_the_newest_intact_checkpoint_is_used(tmp_path: Path, kind: str):
    run = tmp_path / "run"
    save(run, 2, 4)
    damage, expected = DAMAGE[kind]
    damage(run, path_of(run, 4))
    step, reports, tensors = restore(run)
    assert step == 2 and holds(tensors, 2)
    assert [report.step for report in reports] == [4]
    assert expected in reports[0].reason and "\n" not in reports[0].reason and len(reports[0].reason) < 400
    problems = checkpoint.verify(checkpoint.open_saved(path_of(run, 4)))
    if expected.partition(" ")[0] not in ("", "it"):  # those are found by loading, or by a caller that knows the run
        assert len(problems) == 1 and expected in problems[0]


@pytest.mark.parametrize("name", [".DS_Store", "._manifest.json", "__9_0.distcp", "notes"])
def test_a_file_that_no_manifest_lists_is_told_and_no_damage(tmp_path: Path, name: str):
    run = tmp_path / "run"
    save(run, 2, 4)
    (path_of(run, 4) / name).write_bytes(b"x")
    step, reports, tensors = restore(run)
    assert (step, reports) == (4, []) and holds(tensors, 4)
    saved = checkpoint.open_saved(path_of(run, 4))
    assert checkpoint.verify(saved) == [] and checkpoint.unlisted(saved) == [name]


def test_a_newer_topropes_checkpoint_is_neither_damaged_nor_passed_over(tmp_path: Path):
    """Resuming from the older one would overwrite it in the end."""
    save(tmp_path, 2, 4)
    rewrite_manifest(path_of(tmp_path, 4), format=checkpoint.FORMAT + 1)
    with pytest.raises(NewerFormatError, match=r"written by a newer toprope \(format 2, this one reads 1\)") as refused:
        restore(tmp_path)
    assert isinstance(refused.value, UsageError) and refused.value.exit_status == EXIT_USAGE
    assert "Use that version, or a new --run" in str(refused.value)
    with pytest.raises(NewerFormatError):
        checkpoint.newest_intact(tmp_path)
    assert "newer toprope" in checkpoint.verify(checkpoint.open_saved(path_of(tmp_path, 4)))[0]
    save(tmp_path, 6)
    assert restore(tmp_path)[0] == 6, "later progress of this version counts"


def test_a_checkpoint_of_another_run_of_the_same_settings_is_recognised_by_its_run_id(tmp_path: Path):
    save(tmp_path, 2)
    with pytest.raises(CheckpointError, match="none of its checkpoints is intact"):
        restore(tmp_path, run_id="another")
    assert restore(tmp_path, run_id=IDENTITY["run_id"])[0] == 2


def test_a_run_refuses_to_start_from_zero_over_lost_progress(tmp_path: Path):
    save(tmp_path, 2)
    flip(shard_of(tmp_path, 2))
    with pytest.raises(CheckpointError, match=r"none of its checkpoints is intact\.\n.*give a new --run"):
        restore(tmp_path)
    shutil.rmtree(checkpoint.directory(tmp_path))
    assert restore(tmp_path)[0] is None, "it cannot know of any save"
    log = events.EventLog.open(tmp_path, 0, 0)
    log.append(CheckpointSaved(step=2, bytes=1, seconds=1.0, stall_seconds=1.0))
    log.close()
    with pytest.raises(CheckpointError, match="holds no checkpoint any more"):
        restore(tmp_path)


def test_a_checkpoint_of_another_model_is_not_loaded(tmp_path: Path):
    save(tmp_path, 2)
    saved = checkpoint.committed(tmp_path)[0]
    for wrong, why in [
        ({"w0": torch.zeros(3, 8)}, r"\(40, 8\) in it, but torch.float32 \(3, 8\)"),
        ({"w0": torch.zeros(40, 8, dtype=torch.bfloat16)}, "torch.bfloat16"),
        ({"unheard of": torch.zeros(1)}, "it holds no tensor unheard of"),
    ]:
        with pytest.raises(CheckpointError, match=why):
            checkpoint.load(saved, wrong)


def test_verify_reports_its_progress(tmp_path: Path):
    save(tmp_path, 2)
    saved, reports = checkpoint.committed(tmp_path)[0], []
    assert checkpoint.verify(saved, progress=lambda done, total: reports.append((done, total))) == []
    contents = saved.bytes - (saved.path / "manifest.json").stat().st_size
    assert reports == sorted(reports) and reports[-1] == (contents, contents)


# Hostility


class Bomb:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return (Path.touch, (self._path,))


def hostile_metadata(run: Path, bomb: Bomb) -> None:
    (path_of(run, 4) / ".metadata").write_bytes(pickle.dumps(bomb))


@contextlib.contextmanager
def changed_metadata(run: Path) -> Iterator[Any]:
    """The metadata of step 4, unpickled; written back with the changes made to it."""
    path = path_of(run, 4) / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    yield metadata
    path.write_bytes(pickle.dumps(metadata))


def hostile_metadata_field(run: Path, bomb: Bomb) -> None:
    with changed_metadata(run) as metadata:
        metadata.planner_data = bomb


def hostile_shard(run: Path, bomb: Bomb) -> None:
    shard_of(run, 4).write_bytes(pickle.dumps(bomb) + bytes(100_000))


def hostile_torch_shard(run: Path, bomb: Bomb) -> None:
    """Puts a torch.save of the bomb in every place where the metadata expects a tensor."""
    torch.save(bomb, shard_of(run, 4))
    with changed_metadata(run) as metadata:
        for info in metadata.storage_data.values():
            info.offset, info.length = 0, shard_of(run, 4).stat().st_size


def hostile_bytes_item(run: Path, bomb: Bomb) -> None:
    """DCP unpickles what its metadata calls bytes without any restriction."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    hostile_torch_shard(run, bomb)
    with changed_metadata(run) as metadata:
        for name in metadata.state_dict_metadata:
            metadata.state_dict_metadata[name] = BytesStorageMetadata()


def hostile_path(run: Path, bomb: Bomb) -> None:
    with changed_metadata(run) as metadata:
        for info in metadata.storage_data.values():
            info.relative_path = "../step-00000002/__0_0.distcp"


def hostile_manifest(run: Path, bomb: Bomb) -> None:
    (path_of(run, 4) / "manifest.json").write_bytes(pickle.dumps(bomb))


HOSTILE = (
    hostile_metadata, hostile_metadata_field, hostile_shard, hostile_torch_shard, hostile_bytes_item, hostile_path,
    hostile_manifest,
)  # fmt: skip


@pytest.mark.parametrize("attack", HOSTILE, ids=lambda attack: attack.__name__)
@pytest.mark.parametrize("manifest_fits", [False, True])
def test_a_hostile_pickle_in_any_file_runs_nothing(
    tmp_path: Path, attack: Callable[[Path, Bomb], None], manifest_fits: bool
):
    run, crater = tmp_path / "run", tmp_path / "crater"
    pickle.loads(pickle.dumps(Bomb(crater)))
    assert crater.exists(), "the bomb works"
    crater.unlink()
    save(run, 2, 4)
    attack(run, Bomb(crater))
    if manifest_fits and attack is not hostile_manifest:
        list_anew(path_of(run, 4))
    step, reports, tensors = restore(run)
    assert not crater.exists()
    assert step == 2 and holds(tensors, 2) and [report.step for report in reports] == [4]
    assert "\n" not in reports[0].reason and len(reports[0].reason) < 400
    with pytest.raises(CheckpointError):
        checkpoint.load(checkpoint.open_saved(path_of(run, 4)), small_state(None))
    assert not crater.exists()


class AttributeLookup:
    """Pickled as a call of getattr."""

    def __init__(self, owner: Any, name: str) -> None:
        self._reduced = getattr, (owner, name)

    def __reduce__(self) -> Any:
        return self._reduced


def test_saves_of_early_pythons_3_11_are_read_and_no_attribute_but_of_an_enumeration(tmp_path, monkeypatch):
    from torch.distributed.checkpoint import metadata

    with monkeypatch.context() as patched:
        kind = metadata._MEM_FORMAT_ENCODING
        patched.setattr(kind, "__reduce_ex__", lambda member, _: (getattr, (kind, member._name_)))
        save(tmp_path, 2, 4)
    assert b"getattr" in (path_of(tmp_path, 4) / ".metadata").read_bytes()
    step, reports, tensors = restore(tmp_path)
    assert step == 4 and holds(tensors, 4) and not reports
    for owner, name in ((metadata.TensorProperties, "create_from_tensor"), (kind, "__init__"), (torch.Size, "count")):
        with changed_metadata(tmp_path) as written:
            written.planner_data = AttributeLookup(owner, name)
        list_anew(path_of(tmp_path, 4))
        step, reports, _ = restore(tmp_path)
        assert step == 2 and f".metadata asks for {name!r}" in reports[0].reason


def test_no_process_thread_or_temporary_file_is_left(tmp_path: Path):
    import threading

    writer = saver(tmp_path)
    writer.begin(1, small_state(1))
    writer.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "checkpoint"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(
        ["checkpoints", "step-00000001", "manifest.json", ".metadata", "__0_0.distcp"]
    )
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
