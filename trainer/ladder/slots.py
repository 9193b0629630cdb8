"""Slots for runs side by side, and their devices.

On CPUs there is a slot for each core. On GPUs the runs' memory decides: as many share a GPU as fit, so small rungs fill
one together, and a large rung may have it alone. Runs of several ranks take a group of GPUs.
"""

import os
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from trainer import costs
from trainer.config import Config
from trainer.errors import TopropeError
from trainer.fleet import gpus
from trainer.fleet.gpus import Gpu
from trainer.ladder.plan import sizes
from trainer.ladder.plan.ladder import Ladder, PlannedRun

# Temporaries and the allocator's gaps, on top of what `costs` counts. Untested on GPUs.
TEMPORARIES = 1.5
# CUDA's context and the libraries' workspaces, on top of what torch allocates. Untested on GPUs.
CONTEXT_BYTES = 2**30


@dataclass(frozen=True)
class Slots:
    """Places for runs. Slot k belongs to GPU group k modulo their number, so the first slots are on different GPUs."""

    count: int
    groups: tuple[tuple[Gpu, ...], ...] = ()
    """One GPU for each rank of a run; empty without GPUs."""
    by_memory: bool = False
    """True if a run is started only beside runs that leave it enough memory."""
    _needed: dict[str, int | None] = field(default_factory=dict, repr=False, compare=False)
    """Bytes by key of a run, and by what is traced."""

    def devices(self, slot: int) -> dict[str, str]:
        """Environment that gives a slot its GPUs; {} without GPUs."""
        if not self.groups:
            return {}
        return {"CUDA_VISIBLE_DEVICES": ",".join(gpu.name for gpu in self.groups[self._group(slot)])}

    def free_for(self, run: PlannedRun, busy: Mapping[int, PlannedRun]) -> int | None:
        """Return a free slot with enough memory for a run; None if it must wait. `busy` are the runs in other slots."""
        free = sorted(set(range(self.count)) - busy.keys())
        if not self.groups:
            return next(iter(free), None)
        firsts = {self._group(slot): slot for slot in reversed(free)}  # the first free slot of each group
        loads = Counter(map(self._group, busy))
        emptiest = sorted(firsts.values(), key=lambda slot: (loads[self._group(slot)], slot))
        return next((slot for slot in emptiest if self._fits(run, slot, busy)), None)

    def all_for(self, run: PlannedRun) -> list[int]:
        """Return the slots in which copies of a run have room at the same time: one at least."""
        if not self.by_memory:
            return list(range(self.count))
        found, needed = [], self.needed(run)
        for number, group in enumerate(self.groups):
            free = [gpu.free for gpu in group if gpu.free is not None]
            room = min(free) // needed if needed and len(free) == len(group) else 1
            found += range(number, self.count, len(self.groups))[: max(1, room)]
        return sorted(found)

    def needed(self, run: PlannedRun) -> int | None:
        """Bytes that a run takes on each of its GPUs, an estimate; None if its model cannot be traced."""
        if run.key not in self._needed:
            config, ranks = run.config, len(self.groups[0])
            # Seeds and rates change no memory; to trace a model takes a moment.
            left_out = {"seed": True, "faults": True, "wandb": True, "budget": True, "optim": {"learning_rate"}}
            traced = config.model_dump_json(exclude={**left_out, "model": {"init_draw"}})
            if traced not in self._needed:
                self._needed[traced] = _needed(config, ranks)
            needed = self._needed[traced]
            # The config names its teachers only when they have finished.
            taught = int(TEMPORARIES * sum(costs.FLOAT32_BYTES * teacher.parameters for teacher in run.teachers))
            self._needed[run.key] = None if needed is None else needed + taught
        return self._needed[run.key]

    def _group(self, slot: int) -> int:
        return slot % len(self.groups)

    def _fits(self, run: PlannedRun, slot: int, busy: Mapping[int, PlannedRun]) -> bool:
        beside = [other for taken, other in busy.items() if self._group(taken) == self._group(slot)]
        if not self.by_memory or not beside:  # alone it is tried in any case, and says what it lacks
            return True
        free = [gpu.free for gpu in self.groups[self._group(slot)]]
        needed = [self.needed(other) for other in (run, *beside)]
        known = [bytes_ for bytes_ in needed if bytes_ is not None]
        return len(known) == len(needed) and all(bytes_ is not None and sum(known) <= bytes_ for bytes_ in free)


def of(ladder: Ladder, count: int | None = None) -> Slots:
    """Return the slots of a ladder: `count` or the file's number, else as many as this machine has room for."""
    first, ranks = ladder.runs[0], ladder.file.ranks
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    by_cores = max(1, cores // (first.config.numerics.threads * ranks))
    groups = _groups(first.config, ranks)
    if given := count or ladder.file.slots:
        return Slots(given, groups)
    if not groups:
        return Slots(by_cores)
    if len(groups[0]) < ranks:  # the ranks share them, or train on the CPU
        return Slots(1, groups) if first.config.parallel.share_gpus else Slots(by_cores)  # these train on the CPU
    # Each run keeps a core busy that feeds its GPU. The smallest run says how many may ever be side by side.
    most = Slots(max(by_cores, len(groups)), groups, by_memory=True)
    return replace(most, count=1 + max(most.all_for(first)))


def _groups(config: Config, ranks: int) -> tuple[tuple[Gpu, ...], ...]:
    """The GPUs of this machine in groups of one for each rank; what is left over is not used."""
    found = gpus.visible(_gpus(config))
    if len(found) < ranks:
        return (tuple(found),) if found else ()
    return tuple(tuple(found[start : start + ranks]) for start in range(0, len(found) // ranks * ranks, ranks))


def _gpus(config: Config) -> int:
    """Number of GPUs available to runs of this config."""
    if config.parallel.device == "cpu":
        return 0
    import torch

    return torch.cuda.device_count()


def _needed(config: Config, ranks: int) -> int | None:
    try:
        vocabulary = sizes.vocab_of(config.data, config.eval, config.model.vocab_size)
        return CONTEXT_BYTES + int(TEMPORARIES * costs.memory_per_rank(config, vocabulary, ranks)["total"])
    except TopropeError:
        return None
