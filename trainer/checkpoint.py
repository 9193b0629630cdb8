"""Sharded checkpoints: write, commit, verify, find the newest, load, prune.

    RUN/checkpoints/step-00000040/    manifest.json, .metadata and __0_0.distcp, __1_0.distcp, … of torch DCP

A checkpoint is written into a hidden directory, made durable, described by a manifest with size and SHA-256 of every
file, and committed by one rename. A directory without that rename does not exist for anyone. Nothing is trusted on the
way back: every file is held against the manifest, and nothing that unpickles is allowed more than DCP's own records.
"""

import hashlib
import json
import os
import pickle
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.errors import CheckpointError

if TYPE_CHECKING:  # listing and verifying, as `inspect` does, must not wait for torch
    from torch import Tensor

    from trainer.world import World

FORMAT = 1
MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Saved:
    """A committed checkpoint, by its name and manifest; not necessarily intact."""

    path: Path
    step: int

    @property
    def bytes(self) -> int:
        return sum(file.stat().st_size for file in self.path.iterdir() if file.is_file())


def directory(run: Path) -> Path:
    return run / "checkpoints"


def committed(run: Path) -> list[Saved]:
    """All committed checkpoints of a run, newest first."""
    found = [
        Saved(path, int(path.name.removeprefix("step-")))
        for path in directory(run).glob("step-*")
        if path.is_dir() and path.name.removeprefix("step-").isdigit()
    ]
    return sorted(found, key=lambda saved: saved.step, reverse=True)


def at(path: Path) -> Saved:
    """The checkpoint in this directory. Raises CheckpointError if its name is none."""
    step = path.name.removeprefix("step-")
    if not (path.is_dir() and step.isdigit()):
        raise CheckpointError(f"{path} is no checkpoint.\n  They are directories: RUN/checkpoints/step-00000040.")
    return Saved(path, int(step))


def save(run: Path, step: int, tensors: Mapping[str, "Tensor"], identity: Mapping[str, Any], world: "World") -> Saved:
    """Write `tensors` (plain ones alike on all ranks, or DTensors) as the checkpoint of `step`. A collective.

    `identity` goes into the manifest: what a loader must agree with. Raises CheckpointError if the disk refuses.
    """
    import torch.distributed.checkpoint as dcp

    final = directory(run) / f"step-{step:08d}"
    staging = directory(run) / f".step-{step:08d}.partial"
    world.from_main(lambda: _fresh(staging))
    writer = dcp.FileSystemWriter(staging, single_file_per_rank=True, sync_files=True, thread_count=1)
    planner = dcp.DefaultSavePlanner(dedup_save_to_lowest_rank=False)  # replicas share the writing
    try:
        dcp.save(dict(tensors), storage_writer=writer, planner=planner)
    except (OSError, dcp.CheckpointException) as error:
        raise CheckpointError(f"checkpoint of step {step} could not be written: {error}") from error
    world.from_main(lambda: _commit(staging, final, {"step": step, **identity}))
    return Saved(final, step)


def load(saved: Saved, tensors: dict[str, "Tensor"]) -> None:
    """Copy a checkpoint into `tensors`, in place, whatever its sharding was and theirs is. A collective.

    Raises CheckpointError if it does not hold what is asked for.
    """
    import torch.distributed as dist
    import torch.distributed.checkpoint as dcp

    try:
        dcp.load(tensors, storage_reader=_safe_reader(saved.path), no_dist=not dist.is_initialized())
    except (OSError, dcp.CheckpointException, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{saved.path} cannot be loaded: {error}") from error


def newest_intact(run: Path, report: Callable[[str], None] = lambda message: None) -> Saved | None:
    """The newest checkpoint that passes `verify`; every one that does not is reported and passed over."""
    for saved in committed(run):
        problems = verify(saved)
        if not problems:
            return saved
        report(f"{saved.path.name} is damaged and passed over: {'; '.join(problems)}")
    return None


def verify(saved: Saved) -> list[str]:
    """What is wrong with a checkpoint, a line each; empty if it is intact."""
    try:
        manifest = read_manifest(saved)
    except CheckpointError as error:
        return [str(error)]
    problems = []
    if manifest["step"] != saved.step:
        problems.append(f"{MANIFEST} is of step {manifest['step']}")
    present = {path.name for path in saved.path.iterdir()} - {MANIFEST}
    problems += [f"{name} is not in the manifest" for name in sorted(present - manifest["files"].keys())]
    for name, expected in sorted(manifest["files"].items()):
        problem = _damage(saved.path / name, expected)
        if problem:
            problems.append(problem)
    return problems


def read_manifest(saved: Saved) -> dict[str, Any]:
    """The manifest of a checkpoint. Raises CheckpointError if it is missing, damaged or of a newer format."""
    path = saved.path / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        body = json.dumps(manifest["body"], sort_keys=True).encode()
        if hashlib.sha256(body).hexdigest() != manifest["sha256"]:
            raise CheckpointError(f"{MANIFEST} does not match its own checksum")
        body = manifest["body"]
        if body["format"] > FORMAT:
            raise CheckpointError(
                f"{MANIFEST} has format {body['format']}; this toprope reads up to {FORMAT}. Use a newer toprope"
            )
        return body
    except FileNotFoundError:
        raise CheckpointError(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{MANIFEST} is damaged ({type(error).__name__})") from None


def prune(run: Path, keep_last: int) -> None:
    """Remove all but the newest `keep_last` checkpoints and what unfinished saves left. Called after a commit."""
    for saved in committed(run)[keep_last:]:
        doomed = saved.path.with_name(f".{saved.path.name}.pruned")
        saved.path.rename(doomed)  # first invisible, then gone: a half-removed checkpoint is never seen
        shutil.rmtree(doomed, ignore_errors=True)
    for left in (*directory(run).glob(".step-*.pruned"), *directory(run).glob(".step-*.partial")):
        shutil.rmtree(left, ignore_errors=True)


def _damage(path: Path, expected: Mapping[str, Any]) -> str | None:
    try:
        size = path.stat().st_size
        if size != expected["bytes"]:
            return f"{path.name} has {size} bytes instead of {expected['bytes']}"
        if _sha256(path) != expected["sha256"]:
            return f"{path.name} does not match its checksum"
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        return f"{path.name} cannot be read ({error.strerror})"
    return None


def _fresh(staging: Path) -> None:
    try:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    except OSError as error:
        raise CheckpointError(f"{staging} cannot be made: {error.strerror}.") from None


def _commit(staging: Path, final: Path, identity: Mapping[str, Any]) -> None:
    files = {p.name: {"bytes": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(staging.iterdir())}
    body = {"format": FORMAT, **identity, "written": time.time(), "files": files}
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
    try:
        with (staging / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump({"sha256": digest, "body": body}, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        _sync_directory(staging)
        shutil.rmtree(final, ignore_errors=True)  # a replayed step, or one that was found damaged
        staging.rename(final)
        _sync_directory(final.parent)
    except OSError as error:
        raise CheckpointError(f"{final} could not be committed: {error.strerror}.") from None


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _RecordsOnly(pickle.Unpickler):
    """Unpickles DCP's `.metadata` and nothing that could run code: only these names may be looked up."""

    ALLOWED = frozenset(
        {
            ("torch", "Size"),
            ("torch", "float32"),
            ("torch.serialization", "_get_layout"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"),
            ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
            ("torch.distributed.checkpoint.metadata", "Metadata"),
            ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
            ("torch.distributed.checkpoint.metadata", "StorageMeta"),
            ("torch.distributed.checkpoint.metadata", "TensorProperties"),
            ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
            ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
            ("pathlib", "PosixPath"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f".metadata asks for {module}.{name}, which no checkpoint of ours contains")
        return super().find_class(module, name)


def _safe_reader(path: Path) -> Any:
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

    class Reader(dcp.FileSystemReader):
        def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
            with (path / ".metadata").open("rb") as file:
                metadata = _RecordsOnly(file).load()
            metadata.storage_meta = metadata.storage_meta or StorageMeta()
            metadata.storage_meta.load_id = self.load_id
            return metadata

    return Reader(path)
