"""Reading a checkpoint back: at any world size and sharding, bitwise, and without trusting a byte of it.

Checksums find accidents. They do not find malice: who can write a file can write its checksum. So nothing is
unpickled that is not a plain record of DCP, only files that the manifest lists are opened, and only tensors are read
from them, with torch's weights-only reader.
"""

import functools
import math
import pickle
from collections.abc import Callable, Collection
from enum import Enum
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata
from torch.distributed.tensor import DTensor

from trainer.checkpoint.files import Saved, committed, directory, one_line, read_manifest, refuse_newer, verify
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
) -> int | None:
    """Load the newest intact checkpoint in place; its step, or None if there has never been one. A collective.

    A checkpoint that is damaged, belongs to another run, or fails while loading on any rank is passed over by all;
    rank 0 reports it. Raises CheckpointError, on all ranks, if there was progress and none of it is intact, and
    NewerFormatError rather than pass over what a newer toprope saved.
    """
    for saved in world.from_main(lambda: committed(run)):
        world.from_main(functools.partial(refuse_newer, saved))
        reason = _agreed(world, functools.partial(_refusal, saved, world, fingerprint, run_id))
        if reason is None:
            hook(Phase.IN_LOAD, saved.step)
            reason = _agreed(world, functools.partial(_failure, saved, tensors))
        if reason is None:
            return saved.step
        if world.is_main:
            report(CheckpointRejected(step=saved.step, reason=reason))
    world.from_main(functools.partial(_refuse_to_forget, run))
    return None


def load(saved: Saved, tensors: dict[str, Tensor]) -> None:
    """Copy a checkpoint into `tensors`, in place, whatever its sharding was and theirs is. Every rank for itself.

    Raises CheckpointError if it does not hold what is asked for; `tensors` are then partly overwritten.
    """
    reason = _failure(saved, tensors)
    if reason is not None:
        raise CheckpointError(
            f"{saved.path} cannot be loaded: {reason}.\n"
            f"  It is damaged, or not of this model. `python -m trainer verify {saved.path}` says which."
        )


def _agreed(world: World, problem: Callable[[], str | None]) -> str | None:
    """All that any rank has to object to, in one line, alike on all ranks; None if none has."""
    found: list[str | None] = [None] * world.size
    if world.size > 1:
        dist.all_gather_object(found, problem())
    else:
        found = [problem()]
    return "; ".join(dict.fromkeys(reason for reason in found if reason)) or None


def _refusal(saved: Saved, world: World, fingerprint: str, run_id: str | None) -> str | None:
    """Why a checkpoint must not be loaded. Ranks share the reading: each checks the contents of some files."""
    try:
        manifest = read_manifest(saved)
        problems = verify(saved, names=sorted(manifest["files"])[world.rank :: world.size])
    except CheckpointError as error:
        return one_line(error)
    if manifest.get("fingerprint") != fingerprint:
        problems.append(f"it is of a run with other settings (fingerprint {str(manifest.get('fingerprint'))[:16]}…)")
    elif run_id is not None and manifest.get("run_id") != run_id:
        problems.append(f"it is of another run ({manifest.get('run_id')} instead of {run_id})")
    return "; ".join(problems) or None


def _failure(saved: Saved, tensors: dict[str, Tensor]) -> str | None:
    """Load; why it failed, in one line."""
    try:
        reader = _Reader(saved.path, read_manifest(saved)["files"])
        planner = dcp.DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
        metadata = reader.read_metadata()
        _check_fits(metadata, tensors)
        planner.set_up_planner(tensors, metadata, is_coordinator=False)
        reader.set_up_storage_reader(metadata, is_coordinator=False)
        plan = planner.create_local_plan()  # a rank reads what it needs: nothing to agree on, no collective to hang in
        _check_complete(plan, tensors)
        reader.read_data(plan, planner).wait()
    except Exception as error:  # damage of any kind, found by torch in any way
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
    """DCP leaves as it was what no stored piece covers; here that is an error."""
    planned = dict.fromkeys(tensors, 0)
    for item in plan.items:
        planned[item.dest_index.fqn] += math.prod(item.lengths)
    for name, tensor in tensors.items():
        needed = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).numel()
        if planned[name] != needed:
            raise CheckpointError(f"it holds {planned[name]} of the {needed} numbers of {name} that this rank needs")


def _refuse_to_forget(run: Path) -> None:
    """Raise if something was saved once. A run that never came to its first save simply starts again.

    To remove the directory, or to give another, is to tell us so. There is no switch for it: in a command that is typed
    again at every restart it would stay, and then throw away progress that nobody meant.
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
    """DCP's reader, for the files of the manifest and for tensors only."""

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
    """Unpickles DCP's `.metadata` and nothing that could run code: only these names may be looked up."""

    ALLOWED = frozenset(
        {
            ("torch", "Size"),
            ("torch", "float32"),
            ("torch", "float64"),
            ("torch", "float16"),
            ("torch", "bfloat16"),
            ("torch", "int64"),
            ("torch.serialization", "_get_layout"),
            ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
            ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"),
            ("torch.distributed.checkpoint.metadata", "Metadata"),
            ("torch.distributed.checkpoint.metadata", "MetadataIndex"),
            ("torch.distributed.checkpoint.metadata", "StorageMeta"),
            ("torch.distributed.checkpoint.metadata", "TensorProperties"),
            ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"),
            ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"),
        }
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("builtins", "getattr"):  # as Python 3.11.0 to 3.11.3 write a member of an enumeration
            return _member
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f".metadata asks for {module}.{name}, which no checkpoint of ours contains")
        return super().find_class(module, name)


def _member(of: Any, name: str) -> Enum:
    """Of an enumeration, and nothing else of anything."""
    if not (isinstance(of, type) and issubclass(of, Enum) and name in of.__members__):
        raise pickle.UnpicklingError(f".metadata asks for {name!r} of {of!r}, which no checkpoint of ours contains")
    return of[name]
