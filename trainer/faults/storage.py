"""Faults of storage: saves that fail, and damage to checkpoints and tokens that are there."""

import contextlib
import copy
import errno
import functools
import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from trainer.checkpoint import files
from trainer.faults.disk import SHARD, DiskFault, PausedWrite
from trainer.faults.fault import STEP, Fault, Harmless, Setting
from trainer.faults.nemesis import Outside
from trainer.faults.plan import PlannedFault
from trainer.faults.process import RESTART, kill_self
from trainer.faults.rank import RankContext
from trainer.phases import Phase

if TYPE_CHECKING:
    from trainer.launch.cluster import Agents


class NoSpace(DiskFault):
    imitates = "a full disk"
    made = "writing fails with ENOSPC"
    phases = (Phase.IN_SAVE_SHARD, Phase.BEFORE_COMMIT)
    error = errno.ENOSPC
    every_write = True


class EioWrite(DiskFault):
    imitates = "a dying disk"
    made = "writing fails with EIO"


class EioFsync(DiskFault):
    imitates = "a dying disk behind a cache"
    made = "fsync fails with EIO"
    operation = "fsync"


class EioRename(DiskFault):
    imitates = "a metadata server that fails"
    made = "the commit's rename fails with EIO"
    phases = (Phase.BEFORE_COMMIT,)
    operation = "rename"


class EioRead(DiskFault):
    imitates = "a disk that cannot read what it wrote"
    made = "reading back fails with EIO"
    phases = (Phase.AFTER_COMMIT,)
    operation = "read"


class ShortWrite(DiskFault):
    imitates = "a file system that lies"
    made = "half of one write is dropped and reported as done"

    def write(self, planned: PlannedFault, write: Callable[[Any], int], data: memoryview) -> int:
        write(data[: len(data) // 2])
        return len(data)


class SlowWrite(Harmless, PausedWrite):
    imitates = "a slow disk"
    made = "every write pauses"
    detected = "no fault: the next save waits for it"
    settings: ClassVar = {"seconds": Setting(0.2, "per write")}
    every_write = True


class TornSave(DiskFault):
    imitates = "power loss while saving"
    made = "kill -KILL while shards are half written"
    detected = "a directory without the rename does not exist"
    recovered = RESTART
    expected_incidents = ("worker_lost",)

    def write(self, planned: PlannedFault, write: Callable[[Any], int], data: memoryview) -> int:
        write(data[: len(data) // 2])
        kill_self()
        return 0


Damage = Callable[[], Any]


class CheckpointDamage(Fault):
    """Damages the newest committed checkpoint and kills the rank, so that the next attempt meets the damage."""

    group = "storage"
    detected = "sizes and checksums of the manifest, before anything is loaded"
    recovered = "passed over by all ranks; the newest intact checkpoint is loaded"
    phases = STEP
    expected_incidents = ("checkpoint_rejected",)
    names_rank = False
    detect_seconds = 20.0  # a restart lies between
    damages_checkpoints = True
    not_in: ClassVar = {"quorum": "a death loads no checkpoint: the others hold the state in memory"}

    def usual_step(self, every: int, steps: int) -> int:
        # Two are committed by then: the save of step 3 × every has waited for that of 2 × every.
        return min(3 * every + 1, steps)

    def obstacle(self, planned: PlannedFault, rank: RankContext) -> str:
        rank.await_save()  # files that are damaged before the commit never were a checkpoint
        if self.damage(rank.run, rank.chance(planned)) is None:
            return "there is no checkpoint to damage, or, for a swap, only one"
        return ""

    def fire(self, planned: PlannedFault, rank: RankContext) -> None:
        damage = self.damage(self.place(rank), rank.chance(planned))
        assert damage is not None
        damage()
        kill_self()

    def place(self, rank: RankContext) -> Path:
        """The directory whose checkpoints are damaged."""
        return rank.run

    def damage(self, place: Path, chance: random.Random) -> Damage | None:
        """A function that damages the newest checkpoint that is committed in a place; None where that is not enough."""
        saved = [saved.path for saved in files.committed(place)]
        shards = sorted(path for path in saved[0].glob(f"*{SHARD}") if path.stat().st_size) if saved else []
        return self.damage_shards(shards, saved[1:], chance) if shards else None

    def damage_shards(self, shards: list[Path], older: list[Path], chance: random.Random) -> Damage | None:
        """`damage` of the newest checkpoint, with these shards; `older` are the directories of the others."""
        raise NotImplementedError


class FileDamage(CheckpointDamage):
    """Damage to one file, whatever is in it: it can be done from outside to the checkpoints of any job."""

    damages_files = True

    def obstacle_outside(self, planned: PlannedFault, cluster: "Agents") -> str:
        return "" if cluster.checkpoints() else "the job has no file yet that the campaign calls a checkpoint"

    def fire_from_outside(self, planned: PlannedFault, outside: Outside, victims: Mapping[int, int]) -> None:
        newest = outside.cluster.checkpoints()[:1]
        damage = self.damage_shards(newest, [], random.Random(planned.index)) if newest else None
        if damage is None:
            raise ValueError("the job's checkpoint has vanished")
        damage()
        for pid in victims.values():
            outside.cluster.send(pid, signal.SIGKILL)


class TruncatedShard(FileDamage):
    imitates = "a lost tail of a file"
    made = "a shard of the newest checkpoint is cut in half; then the rank kills itself"

    def damage_shards(self, shards: list[Path], older: list[Path], chance: random.Random) -> Damage | None:
        return functools.partial(_halve, chance.choice(shards))


class FlippedShard(FileDamage):
    imitates = "a bit that rots"
    made = "one bit of a shard of the newest checkpoint is flipped; then the rank kills itself"

    def damage_shards(self, shards: list[Path], older: list[Path], chance: random.Random) -> Damage | None:
        shard = chance.choice(shards)
        return functools.partial(flip_bit, shard, chance.randrange(shard.stat().st_size), chance.randrange(8))


class MissingShard(FileDamage):
    imitates = "a file that an operator deleted"
    made = "a shard of the newest checkpoint is removed; then the rank kills itself"

    def damage_shards(self, shards: list[Path], older: list[Path], chance: random.Random) -> Damage | None:
        return chance.choice(shards).unlink


class SwappedShard(CheckpointDamage):
    imitates = "files mixed up while copying"
    made = "a shard of the newest checkpoint is replaced by an older one; then the rank kills itself"

    def damage_shards(self, shards: list[Path], older: list[Path], chance: random.Random) -> Damage | None:
        others = [(directory / shard.name, shard) for shard in shards for directory in older]
        pairs = [(a, b) for a, b in others if a.exists() and a.read_bytes() != b.read_bytes()]
        return functools.partial(shutil.copyfile, *chance.choice(pairs)) if pairs else None


class DamagedManifest(CheckpointDamage):
    imitates = "a half-written list of contents"
    made = "the newest checkpoint's manifest loses its second half; then the rank kills itself"

    def damage_shards(self, shards: list[Path], older: list[Path], chance: random.Random) -> Damage | None:
        return functools.partial(_halve, shards[0].with_name(files.MANIFEST))


class CorruptTokens(Fault):
    group = "storage"
    imitates = "a bit that rots in the data"
    made = "one byte of the token store is flipped; then the rank kills itself"
    detected = "the store's checksum, when it is opened"
    recovered = "the store is built again from the documents"
    phases = (Phase.BEFORE_FORWARD,)
    expected_incidents = ("worker_lost",)
    damages_tokens = True

    def watched(self, world_size: int) -> Fault:
        kind = copy.copy(self)
        # Another rank may read what was damaged before it notices the death. In quorum mode it leaves for that alone.
        vars(kind).update(expected_incidents=("worker_lost", "corrupted"), may_cause=("worker_lost",))
        return kind

    def obstacle(self, planned: PlannedFault, rank: RankContext) -> str:
        if rank.config.data.cache_dir or os.environ.get("TOPROPE_CACHE"):
            return ""
        return "the token store is in the user's own cache; name another in data.cache_dir or $TOPROPE_CACHE"

    def fire(self, planned: PlannedFault, rank: RankContext) -> None:
        # A token of the next sample of this rank, replaced by another token that the vocabulary has.
        assert planned.point_step is not None
        store = rank.prepared.train
        window = int(rank.batches.micro_batch(planned.point_step, rank.rank).sample_ids[0])
        token = window * rank.config.model.context + 1
        flip_bit(store.directory / "train.bin", token * store.tokens.dtype.itemsize, bit=0)
        kill_self()


class VanishedCheckpoints(Fault):
    group = "storage"
    imitates = "a file system that is unmounted"
    made = "RUN/checkpoints is moved away, and back after some seconds"
    detected = "a save under way fails on every rank with one reason"
    recovered = "training continues; the next due save tries again"
    phases = (Phase.BEFORE_FORWARD, Phase.IN_SAVE_SHARD)
    settings: ClassVar = {"seconds": Setting(1.0, "how long it is gone")}
    may_cause = ("save_failed",)

    def usual_step(self, every: int, steps: int) -> int:
        return min(2 * every, steps)  # missing when the next save begins

    def obstacle(self, planned: PlannedFault, rank: RankContext) -> str:
        return "" if can_vanish(rank.run) else "there is no directory of checkpoints, or it is away already"

    def fire(self, planned: PlannedFault, rank: RankContext) -> None:
        rank.undo.callback(vanish(rank.run, planned.settings["seconds"]).join)


def _halve(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def flip_bit(path: Path, offset: int, bit: int) -> None:
    """Flip one bit of the byte at `offset`, in place."""
    with path.open("r+b") as file:
        file.seek(offset)
        byte = file.read(1)[0]
        file.seek(offset)
        file.write(bytes([byte ^ 1 << bit]))


def can_vanish(run: Path) -> bool:
    return files.directory(run).exists() and not _away(run).exists()


def vanish(run: Path, seconds: float) -> threading.Thread:
    """Move RUN/checkpoints away, and back after `seconds`; returns the thread that does."""
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
