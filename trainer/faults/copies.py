"""Faults of the copies that lie in the machine's memory (checkpoint/memory.py)."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from trainer.checkpoint import files, memory
from trainer.config import Config, FaultEntry
from trainer.faults.fault import LINUX, STEP, Fault
from trainer.faults.plan import PlannedFault
from trainer.faults.process import kill_self
from trainer.faults.rank import SAVE_SECONDS, RankContext
from trainer.faults.storage import CheckpointDamage, FlippedShard
from trainer.log import rundir

COPIES: Mapping[str, Any] = {"checkpoint": {"memory_every_steps": 1}}
NO_COPIES = "there are no copies beside the state that every worker holds in memory"


class FlippedCopy(CheckpointDamage):
    imitates = "a bit that rots in memory which nobody reads until it is needed"
    made = "one bit of the newest copy in the machine's memory is flipped; then the rank kills itself"
    recovered = "passed over by all ranks; the newest intact checkpoint on disk is loaded"
    needs = (LINUX,)
    sets = COPIES
    not_in: ClassVar = {"quorum": NO_COPIES}

    def usual_step(self, every: int, steps: int) -> int:
        return min(3 * every + 2, steps)  # of a copy and a checkpoint of one step, the checkpoint is loaded

    def refuses(self, entry: FaultEntry, phase: str, config: Config, world_size: int) -> str:
        return _makes_no_copies(config)

    def place(self, rank: RankContext) -> Path:
        return _place_of_copies(rank)

    def obstacle(self, planned: PlannedFault, rank: RankContext) -> str:
        return _await_copy(rank)

    damage_shards = FlippedShard.damage_shards


class VanishedCopies(Fault):
    group = "storage"
    imitates = "a machine that has started again: its memory is empty"
    made = "the copies in the machine's memory are removed; then the rank kills itself"
    detected = "the launcher sees the process end; the next start finds no copy"
    recovered = "the newest checkpoint on disk is loaded"
    phases = STEP
    expected_incidents = ("worker_lost",)
    needs = (LINUX,)
    sets = COPIES
    not_in: ClassVar = {"quorum": NO_COPIES}

    def usual_step(self, every: int, steps: int) -> int:
        return min(2 * every + 2, steps)

    def refuses(self, entry: FaultEntry, phase: str, config: Config, world_size: int) -> str:
        return _makes_no_copies(config)

    def obstacle(self, planned: PlannedFault, rank: RankContext) -> str:
        return _await_copy(rank)

    def fire(self, planned: PlannedFault, rank: RankContext) -> None:
        memory.discard(_place_of_copies(rank))
        kill_self()


def _makes_no_copies(config: Config) -> str:
    if config.checkpoint.memory_every_steps:
        return ""
    return "checkpoint.memory_every_steps = 0, so there are no copies in memory.\n  Set it to 1."


def _place_of_copies(rank: RankContext) -> Path:
    return memory.place(rank.run, rundir.read(rank.run)["run_id"])


def _await_copy(rank: RankContext) -> str:
    """Wait until the newest state that is copied lies in memory, alone: a copy that is committed later would be intact.

    Returns why there is none. Bounded in time.
    """
    newest = rank.step - rank.step % rank.config.checkpoint.memory_every_steps
    deadline = time.monotonic() + SAVE_SECONDS
    while newest > 0 and time.monotonic() < deadline:
        # The copy before it is removed beside training: it would be loaded in place of the newest one.
        if [saved.step for saved in files.committed(_place_of_copies(rank))] == [newest]:
            return ""
        time.sleep(0.02)
    return "there is no copy in memory to damage"
