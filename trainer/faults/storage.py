"""Disks that fail: of this process alone, below RUN/checkpoints alone, in the save that the plan names. And damage to
checkpoints that are there.

While a `Disk` is installed, what the checkpoint code calls to write, sync, rename and read files goes through it. A
step's save is known by the names of its directories (checkpoint/files.py), so neither another save nor another try at
the same one is touched.
"""

import contextlib
import errno
import functools
import io
import os
import random
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.checkpoint import files
from trainer.faults.plan import PlannedFault
from trainer.phases import Phase

WRITING = frozenset({"no_space", "eio_write", "short_write", "slow_write", "stalled_disk", "torn_save"})
KINDS = WRITING | {"eio_fsync", "eio_rename", "eio_read"}
LASTING = frozenset({"no_space", "slow_write"})
"""They meet every write of the rank in that save; the others one."""
DAMAGE = frozenset({"truncated_shard", "flipped_shard", "missing_shard", "swapped_shard", "damaged_manifest"})
SHARD = ".distcp"
_OF_A_STEP = re.compile(r"\.?step-([0-9]+)(\.[0-9a-f]+\.partial)?")

Take = Callable[[frozenset[str], str, int], PlannedFault | None]
"""(kinds, phase, step) → the fault of one of these kinds that is due there, now recorded as fired; None if none is."""


@dataclass(frozen=True)
class _Place:
    """A file of a checkpoint, or of what is to become one."""

    directory: str
    step: int
    staged: bool
    name: str
    """Empty for the directory itself."""

    @property
    def phase(self) -> str:
        return Phase.IN_SAVE_SHARD if self.name.endswith(SHARD) else Phase.BEFORE_COMMIT


class Disk:
    """Stands between this process and its checkpoints from `install` to `remove`."""

    def __init__(self, run: Path, take: Take) -> None:
        self._root, self._take = files.directory(run).absolute(), take
        self._met: dict[str, PlannedFault] = {}
        """Lasting faults, by the directory that they have met."""
        self._open_for_writing: dict[int, _Place] = {}
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
        real = self._real_open(file, mode, *rest, **more)
        place = self._place(file)
        if place is None:
            return real
        if place.staged and "r" not in mode:
            return _File(real, place, self)
        # Only the saving thread reads back; the training thread loads.
        saving = threading.current_thread() is not threading.main_thread()
        if not place.staged and place.name.endswith(SHARD) and "r" in mode and saving:
            fault = self._take(frozenset({"eio_read"}), Phase.AFTER_COMMIT, place.step)
            return real if fault is None else _Unreadable(real)
        return real

    def _sync(self, descriptor: int) -> None:
        place = self._open_for_writing.get(descriptor)
        if place is not None and self._take(frozenset({"eio_fsync"}), place.phase, place.step) is not None:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        self._real[os, "fsync"](descriptor)

    def _rename(self, source: Any, target: Any, **more: Any) -> None:
        place = self._place(source)
        if (
            place is not None
            and (place.staged, place.name) == (True, "")
            and not str(target).endswith(".pruned")
            and self._take(frozenset({"eio_rename"}), Phase.BEFORE_COMMIT, place.step) is not None
        ):
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(source))
        self._real[os, "rename"](source, target, **more)

    def _real_open(self, *arguments: Any, **more: Any) -> Any:
        return self._real.get((io, "open"), io.open)(*arguments, **more)

    def _place(self, file: Any) -> _Place | None:
        if not isinstance(file, str | os.PathLike):
            return None
        with contextlib.suppress(ValueError):
            directory, *below = Path(os.fsdecode(file)).absolute().relative_to(self._root).parts or ("",)
            match = _OF_A_STEP.fullmatch(directory)
            if match and len(below) < 2:
                return _Place(directory, int(match[1]), match[2] is not None, below[0] if below else "")
        return None

    def opened(self, descriptor: int, place: _Place) -> None:
        self._open_for_writing[descriptor] = place

    def closed(self, descriptor: int) -> None:
        self._open_for_writing.pop(descriptor, None)

    def write(self, place: _Place, write: Callable[[Any], int], data: Any) -> int:
        """Write `data` to the file at `place`, or do what a fault makes of it; how much was, or is said to be, done."""
        fault = self._met.get(place.directory) or self._take(WRITING, place.phase, place.step)
        if fault is None:
            return write(data)
        if fault.kind.name in LASTING:
            self._met[place.directory] = fault
        view = memoryview(data).cast("B")
        match fault.kind.name:
            case "no_space":
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            case "eio_write":
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            case "short_write":
                write(view[: len(view) // 2])
                return len(view)
            case "torn_save":
                write(view[: len(view) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            case _:  # slow_write, stalled_disk
                time.sleep(fault.settings["seconds"])
        return write(data)


class _File:
    """A file of a save under way."""

    def __init__(self, real: Any, place: _Place, disk: Disk) -> None:
        self._real, self._place, self._disk = real, place, disk
        self._descriptor = real.fileno()
        disk.opened(self._descriptor, place)

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *error: Any) -> None:
        self._disk.closed(self._descriptor)
        self._real.__exit__(*error)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)

    def write(self, data: Any) -> int:
        return self._disk.write(self._place, self._real.write, data)


class _Unreadable:
    """A file that can be opened and not read."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def __enter__(self) -> "_Unreadable":
        return self

    def __exit__(self, *error: Any) -> None:
        self._real.__exit__(*error)

    def read(self, size: int = -1) -> bytes:
        raise OSError(errno.EIO, os.strerror(errno.EIO))


def damage(run: Path, kind: str, chance: random.Random) -> Callable[[], Any] | None:
    """What damages the newest committed checkpoint in this way; None where there is not enough to damage."""
    saved = [one.path for one in files.committed(run)]
    if not saved:
        return None
    newest, *older = saved
    if kind == "damaged_manifest":
        return lambda: _halve(newest / files.MANIFEST)
    shards = sorted(path for path in newest.glob(f"*{SHARD}") if path.stat().st_size)
    if kind == "swapped_shard":
        pairs = [(other, path) for path in shards for other in _same_of_older(path, older)]
        if not pairs:
            return None
        return functools.partial(shutil.copyfile, *chance.choice(pairs))
    if not shards:
        return None
    shard = chance.choice(shards)
    if kind == "missing_shard":
        return shard.unlink
    if kind == "truncated_shard":
        return lambda: _halve(shard)
    return lambda: flip_bit(shard, chance.randrange(shard.stat().st_size), chance.randrange(8))


def _same_of_older(shard: Path, older: list[Path]) -> list[Path]:
    """The files of that name in older checkpoints, where they hold other bytes."""
    others = [directory / shard.name for directory in older]
    return [other for other in others if other.exists() and other.read_bytes() != shard.read_bytes()]


def _halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_bit(path: Path, offset: int, bit: int) -> None:
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def can_vanish(run: Path) -> bool:
    return files.directory(run).exists() and not _away(run).exists()


def vanish(run: Path, seconds: float) -> threading.Thread:
    """Move RUN/checkpoints away, and back after a while; returns the thread that does."""
    files.directory(run).rename(_away(run))

    def wait() -> None:
        time.sleep(seconds)
        bring_back(run)

    thread = threading.Thread(target=wait, name="toprope-vanished", daemon=True)
    thread.start()
    return thread


def bring_back(run: Path) -> None:
    """Put RUN/checkpoints back where `vanish` left it away. What was saved meanwhile moves in with it."""
    here, away = files.directory(run), _away(run)
    if not away.exists():
        return
    for _ in range(100):  # a save may be making new files while these move
        with contextlib.suppress(OSError):
            for path in here.iterdir() if here.exists() else ():
                if (away / path.name).exists():
                    shutil.rmtree(away / path.name)
                path.rename(away / path.name)
            away.rename(here)  # onto nothing, or an empty directory
            return
        time.sleep(0.01)


def _away(run: Path) -> Path:
    return files.directory(run).with_name("checkpoints.vanished")
