"""Disks that fail: of this process alone, below RUN/checkpoints alone, in the save that the plan names.

While a `Disk` is installed, the calls by which the checkpoint code writes, syncs, renames and reads files go through
it. A step's save is known by the names of its directories (checkpoint/files.py), so neither another save nor another
try at the same one is touched.
"""

import contextlib
import errno
import functools
import io
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn

from trainer.checkpoint import files
from trainer.faults.fault import Fault
from trainer.faults.plan import PlannedFault
from trainer.phases import Phase

SHARD = ".distcp"
_STEP_DIRECTORY = re.compile(r"\.?step-([0-9]+)(\.[0-9a-f]+\.partial)?")

Operation = Literal["write", "fsync", "rename", "read"]
Take = Callable[[Operation, str, int], PlannedFault | None]
"""(operation, phase, step) → a fault of this operation that is due there, now on record as fired; None if none is."""


class DiskFault(Fault):
    """A fault of one save, made where the saving code calls the operating system."""

    group = "storage"
    detected = "the save fails on every rank with one reason"
    recovered = "training continues; the next due save tries again"
    phases = (Phase.IN_SAVE_SHARD,)
    expected_incidents = ("save_failed",)
    operation: ClassVar[Operation] = "write"
    error: ClassVar[int] = errno.EIO
    every_write: ClassVar[bool] = False  # True if it affects every write of the rank in that save, not only the first

    def writer_only(self, phase: str) -> bool:
        return phase == Phase.BEFORE_COMMIT  # by then the other ranks have nothing left to write

    def fail(self, path: str | None = None) -> NoReturn:
        """Raise the operating system's error."""
        raise OSError(self.error, os.strerror(self.error), *([] if path is None else [path]))

    def write(self, planned: PlannedFault, write: Callable[[Any], int], data: memoryview) -> int:
        """Act on a write of `data`; returns the number of bytes to report as written."""
        self.fail()


class PausedWrite(DiskFault):
    """Writing takes `seconds` longer."""

    def write(self, planned: PlannedFault, write: Callable[[Any], int], data: memoryview) -> int:
        time.sleep(planned.settings["seconds"])
        return write(data)


@dataclass(frozen=True)
class SaveFile:
    """A file or directory of a checkpoint, by its path."""

    directory: str
    step: int
    staged: bool  # True while it is not committed
    name: str  # empty for the directory itself

    @property
    def phase(self) -> str:
        return Phase.IN_SAVE_SHARD if self.name.endswith(SHARD) else Phase.BEFORE_COMMIT


class Disk:
    """Stands between this process and its checkpoints from `install` to `remove`."""

    def __init__(self, run: Path, take: Take) -> None:
        self._root, self._take = files.directory(run).absolute(), take
        self._every_write: dict[str, PlannedFault] = {}
        """Faults that affect every write, by the directory of the save."""
        self._written: dict[int, tuple[Any, SaveFile]] = {}
        """Files of saves, by descriptor. One that is closed counts no more: its number may be another file's."""
        self._real: dict[tuple[Any, str], Any] = {}

    def install(self) -> None:
        for module, name, instead in (
            (io, "open", self._open),
            (os, "fsync", self._sync),
            (os, "rename", self._rename),
        ):
            self._real[module, name] = getattr(module, name)
            setattr(module, name, instead)

    def remove(self) -> None:
        for (module, name), real in self._real.items():
            setattr(module, name, real)
        self._real.clear()

    def _open(self, file: Any, mode: str = "r", *rest: Any, **more: Any) -> Any:
        real = self._real.get((io, "open"), io.open)(file, mode, *rest, **more)
        saved = self._save_file(file)
        if saved is None:
            return real
        # Only the saving thread reads back; the training thread loads.
        saving = threading.current_thread() is not threading.main_thread()
        if saved.staged and "r" not in mode:
            self._written[real.fileno()] = real, saved
            real.write = functools.partial(self._write, saved, real.write)
        reads_back = not saved.staged and saved.name.endswith(SHARD) and "r" in mode and saving
        if reads_back and (fault := self._take("read", Phase.AFTER_COMMIT, saved.step)):
            real.read = lambda size=-1: _kind(fault).fail()
        return real

    def _write(self, saved: SaveFile, write: Callable[[Any], int], data: Any) -> int:
        """Write `data`, or let a fault act instead; returns the number of bytes to report as written."""
        # A full or slow disk stays so for the whole save, but not for the next one or another try.
        fault = self._every_write.get(saved.directory) or self._take("write", saved.phase, saved.step)
        if fault is None:
            return write(data)
        if _kind(fault).every_write:
            self._every_write[saved.directory] = fault
        return _kind(fault).write(fault, write, memoryview(data).cast("B"))

    def _sync(self, descriptor: int) -> None:
        if descriptor in self._written:  # other files of the process are synced as ever
            file, saved = self._written[descriptor]
            if not file.closed and (fault := self._take("fsync", saved.phase, saved.step)):
                _kind(fault).fail()
        self._real[os, "fsync"](descriptor)

    def _rename(self, source: Any, target: Any, **more: Any) -> None:
        saved = self._save_file(source)
        # The commit renames a staged directory; pruning renames committed ones.
        commits = saved is not None and saved.staged and not saved.name and not str(target).endswith(".pruned")
        if saved is not None and commits and (fault := self._take("rename", Phase.BEFORE_COMMIT, saved.step)):
            _kind(fault).fail(str(source))
        self._real[os, "rename"](source, target, **more)

    def _save_file(self, file: Any) -> SaveFile | None:
        if not isinstance(file, str | os.PathLike):
            return None
        with contextlib.suppress(ValueError):
            directory, *below = Path(os.fsdecode(file)).absolute().relative_to(self._root).parts or ("",)
            match = _STEP_DIRECTORY.fullmatch(directory)
            if match and len(below) < 2:
                return SaveFile(directory, int(match[1]), match[2] is not None, below[0] if below else "")
        return None


def _kind(fault: PlannedFault) -> DiskFault:
    assert isinstance(fault.kind, DiskFault)
    return fault.kind
