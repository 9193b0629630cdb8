"""Reading a checkpoint back: at any world size and sharding, bitwise, and without trusting a byte of it.

Checksums find accidents, not malice: an attacker who can write a file can write its checksum. So only plain records of
DCP are unpickled, only files that the manifest lists are opened, and only tensors are read from them, with torch's
weights-only reader.
"""

import math
import pickle
from collections.abc import Callable, Collection
from enum import Enum
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from trainer.checkpoint.files import (
    Saved,
    committed,
    directory,
    newest_first,
    one_line,
    read_manifest,
    refuse_newer,
    verify,
)
from trainer.errors import CheckpointError
from trainer.log import events
from trainer.log.events import CheckpointRejected, CheckpointSaved, Event
from trainer.parallel.world import World
from trainer.phases import Hook, Phase, no_hook


def restore(
    run: Path,
    tensors: dict[str, Tensor],
    world: World,
    fingerprint: str,
    report: Callable[[Event], None],
    hook: Hook = no_hook,
    run_id: str | None = None,
    memory: Path | None = None,
) -> Saved | None:
    """Load the newest intact checkpoint in place and return it; None if there has never been one. Collective.

    Also from place `memory` (memory.py), which all ranks must see. A checkpoint that is damaged, belongs to another
    run, or fails to load on any rank is skipped by all ranks; rank 0 reports it. Raises CheckpointError on all ranks
    if the run has saved before and no checkpoint is intact; NewerFormatError instead of skipping one that a newer
    toprope saved.
    """
    # Rank 0 lists for all: on a network file system each rank might see another list.
    for saved in world.from_main(lambda: newest_first(run, *([] if memory is None else [memory]))):
        world.from_main(lambda saved=saved: refuse_newer(saved))
        reason = _agreed(world, _refusal(saved, world, fingerprint, run_id))
        if reason is None:
            hook(Phase.IN_LOAD, saved.step)
            reason = _agreed(world, _failure(saved, tensors))
        if reason is None:
            return saved
        if world.is_main:
            where = "" if saved.path.is_relative_to(directory(run)) else "in memory: "
            report(CheckpointRejected(step=saved.step, reason=where + reason))
    world.from_main(lambda: _refuse_to_forget(run))
    return None


def load(saved: Saved, tensors: dict[str, Tensor]) -> None:
    """Copy a checkpoint into `tensors`, in place; the two shardings may differ. Not collective: each rank for itself.

    Raises CheckpointError if it does not hold all of `tensors`, which are then partly overwritten.
    """
    reason = _failure(saved, tensors)
    if reason is not None:
        raise _unreadable(saved, reason)


def _unreadable(saved: Saved, reason: str) -> CheckpointError:
    return CheckpointError(
        f"{saved.path} cannot be loaded: {reason}.\n"
        f"  It is damaged, or not of this model. `python -m trainer verify {saved.path}` says which."
    )


def shapes(saved: Saved) -> dict[str, tuple[torch.Size, torch.dtype]]:
    """Return shape and type of each tensor in a checkpoint, by name. Raises CheckpointError if it cannot be read."""
    try:
        metadata = _Reader(saved.path, read_manifest(saved)["files"]).read_metadata()
    except Exception as error:  # as in `_failure`
        raise _unreadable(saved, one_line(error)) from None
    stored = metadata.state_dict_metadata.items()
    return {name: (s.size, s.properties.dtype) for name, s in stored if isinstance(s, TensorStorageMetadata)}


def read(saved: Saved) -> dict[str, Tensor]:
    """Return all tensors of a checkpoint, whole and on the CPU. Raises CheckpointError."""
    tensors = {name: torch.empty(size, dtype=dtype) for name, (size, dtype) in shapes(saved).items()}
    load(saved, tensors)
    return tensors


def _agreed(world: World, problem: str | None) -> str | None:
    """Return all ranks' problems in one line, equal on all ranks; None if no rank has one. Collective."""
    return "; ".join(dict.fromkeys(reason for reason in world.agree(lambda: problem) if reason)) or None


def _refusal(saved: Saved, world: World, fingerprint: str, run_id: str | None) -> str | None:
    """The reason not to load a checkpoint, or None. Ranks share the reading: each checks the contents of some files."""
    try:
        manifest = read_manifest(saved)
        # Checksums are the slow part, so each rank takes every world-size-th file.
        problems = verify(saved, names=sorted(manifest["files"])[world.rank :: world.size])
    except CheckpointError as error:
        return one_line(error)
    if manifest.get("fingerprint") != fingerprint:
        problems.append(f"it is of a run with other settings (fingerprint {str(manifest.get('fingerprint'))[:16]}…)")
    elif run_id is not None and manifest.get("run_id") != run_id:
        problems.append(f"it is of another run ({manifest.get('run_id')} instead of {run_id})")
    return "; ".join(problems) or None


def _failure(saved: Saved, tensors: dict[str, Tensor]) -> str | None:
    """Load; return the reason of a failure in one line, or None."""
    try:
        reader = _Reader(saved.path, read_manifest(saved)["files"])
        planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        metadata = reader.read_metadata()
        _check_fits(metadata, tensors)
        planner.set_up_planner(tensors, metadata, is_coordinator=False)
        reader.set_up_storage_reader(metadata, is_coordinator=False)
        plan = planner.create_local_plan()  # each rank reads what it needs: no collective, so nothing to hang in
        _check_complete(plan, tensors)
        reader.read_data(plan, planner).wait()
    except Exception as error:  # torch reports damage by exceptions of any type
        return one_line(error)
    return None


def _check_fits(metadata: Metadata, tensors: dict[str, Tensor]) -> None:
    for name, tensor in tensors.items():
        stored = metadata.state_dict_metadata.get(name)
        if not isinstance(stored, TensorStorageMetadata):
            raise CheckpointError(f"it holds no tensor {name}")
        if stored.size != tensor.shape or stored.properties.dtype != tensor.dtype:
            raise CheckpointError(
                f"{name} is {stored.properties.dtype} {tuple(stored.size)} in it, "
                f"but {tensor.dtype} {tuple(tensor.shape)} in the model"
            )


def _check_complete(plan: Any, tensors: dict[str, Tensor]) -> None:
    """Raise if stored pieces do not cover all that this rank needs: DCP would leave the rest as it was."""
    planned = dict.fromkeys(tensors, 0)
    for item in plan.items:
        planned[item.dest_index.fqn] += math.prod(item.lengths)
    for name, tensor in tensors.items():
        needed = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel()
        if planned[name] != needed:
            raise CheckpointError(f"it holds {planned[name]} of the {needed} numbers of {name} that this rank needs")


def _refuse_to_forget(run: Path) -> None:
    """Raise CheckpointError if the run has saved before. A run that died before its first save simply starts again.

    Starting from zero takes another --run or removing this one. A switch for it would stay in a command that is typed
    again at every restart, and would then throw away progress.
    """
    damaged = bool(committed(run))
    if damaged or any(isinstance(entry.event, CheckpointSaved) for entry in events.read(run)):
        what = "none of its checkpoints is intact" if damaged else f"{directory(run)} holds no checkpoint any more"
        raise CheckpointError(
            f"{run} has saved progress before, but {what}.\n"
            "  Nothing starts from zero over existing progress. Put an intact checkpoint back (`python -m trainer "
            f"verify {run}` checks them), or start from zero on purpose: give a new --run, or remove {run}."
        )


class _Reader(dcp.FileSystemReader):
    """DCP's reader, restricted to files of the manifest and to tensors."""

    def __init__(self, path: Path, names: Collection[str]) -> None:
        super().__init__(path)
        self._directory, self._names = path, frozenset(names)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with (self._directory / ".metadata").open("rb") as file:
            metadata = _RecordsOnly(file).load()
        if not isinstance(metadata, Metadata):
            raise CheckpointError(".metadata holds no metadata")
        for info in metadata.storage_data.values():
            if info.relative_path not in self._names:
                raise CheckpointError(f".metadata points at {info.relative_path!r}, which is not in the manifest")
            if info.transform_descriptors:
                raise CheckpointError(".metadata asks for transformations, which no checkpoint of ours contains")
        metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


class _RecordsOnly(pickle.Unpickler):
    """Unpickles DCP's `.metadata`. Only these names may be looked up, so nothing in the file can run code."""

    ALLOWED: ClassVar[dict[str, set[str]]] = {
        "torch": {"Size", "float32", "float64", "float16", "bfloat16", "int64"},
        "torch.serialization": {"_get_layout"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.distributed.checkpoint.metadata": {
            "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties",
            "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        },
    }  # fmt: skip

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # how Python 3.11.0 to 3.11.3 pickle a member of an enumeration
            return _member
        if name not in self.ALLOWED.get(module, ()):
            raise pickle.UnpicklingError(f".metadata asks for {module}.{name}, which no checkpoint of ours contains")
        return super().find_class(module, name)


def _member(enumeration: Any, name: str) -> Enum:
    """A getattr that returns members of enumerations and nothing else."""
    is_enumeration = isinstance(enumeration, type) and issubclass(enumeration, Enum)
    if not (is_enumeration and name in enumeration.__members__):
        asked = f"{name!r} of {enumeration!r}"
        raise pickle.UnpicklingError(f".metadata asks for {asked}, which no checkpoint of ours contains")
    return enumeration.__members__[name]
