"""Writing checkpoints beside training: the loop waits for a copy in memory, and a thread does the rest.

A save has four rounds: make the directory, write the shards, commit, read back. In each, every rank does its part, and
then all ranks exchange the results (`_together`), on a process group of their own. So an error on any rank fails the
save on all, with one reason, and no rank waits for one that has given up. At the end rank 0 removes old checkpoints.

A slow disk is no hang, a dead one is. While a rank makes progress it informs the others. A loop that waits for a save
passes that on as heartbeats: its watchdog reports a hang only if some rank really makes no progress.

DCP plans which rank writes what, and the layout of bytes. Its `save` is not used: it plans again each time, and its own
collectives do not follow these rounds.
"""

import contextlib
import datetime
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.tensor import DTensor

from trainer import config
from trainer.checkpoint import files
from trainer.checkpoint.neighbours import Machines, Move, move
from trainer.checkpoint.streams import Writer
from trainer.errors import CheckpointError
from trainer.log.events import CheckpointFailed, CheckpointSaved, Event, Warned
from trainer.parallel.world import World
from trainer.phases import Hook, Phase, no_hook

T = TypeVar("T")
CLOSED = "the saver is closed"

PEER_TIMEOUT_SECONDS = 1800.0  # without a message from a peer, when no watchdog is waiting for it
PROGRESS_SECONDS = 0.5  # how often a rank at work reports its progress to the others
POLL_SECONDS = 0.1  # how often a waiting loop checks for that
# Niceness of the writing thread. With two ranks on two full cores, steps took 1.02 times as long beside a save of 74 MB
# a rank, and 1.17 times at niceness 10. The price: the save took 1.3 s instead of 0.6 s.
NICENESS = 19


class Saver:
    """Saves a run's state beside its training, one save at a time. Constructed and called on all ranks alike.

    A failed save raises nothing: it becomes a CheckpointFailed event, and earlier checkpoints stay as they are.
    """

    failures_in_a_row: int
    """Number of the last saves that failed, as of `begin` or `finish`; equal on all ranks unless one has died."""
    lost_peer: str | None
    """Message about the loss of another rank; None while all are there. No save can succeed after that."""

    def __init__(
        self,
        run: Path,
        world: World,
        identity: Mapping[str, Any],
        settings: config.Checkpoint,
        hook: Hook = no_hook,
        heartbeat: Hook = no_hook,
        peer_timeout_seconds: float = PEER_TIMEOUT_SECONDS,
        read_back: bool = True,
        machines: Machines | None = None,
    ) -> None:
        """`identity` goes into the manifest: a loader compares it. `read_back`: a save counts when it has been read.
        `machines`: those whose memories `run` stands for; None where all ranks see the same files.

        `hook` is called from the writing thread. `begin` and `finish` call `heartbeat` with "waiting_for_save" whenever
        the save that they wait for has made progress.
        """
        self._run, self._world, self._identity, self._settings, self._hook = run, world, dict(identity), settings, hook
        self._heartbeat, self._reads_back = heartbeat, read_back
        self._machines = machines or Machines((0,) * world.size)
        self._leader = self._machines.leader(world.rank)
        self._leads = self._leader == world.rank  # it makes, commits and removes what lies where it writes
        self._ranks = world
        if world.size > 1:  # never training's group: there, collectives of the two threads would mix
            timeout = datetime.timedelta(seconds=peer_timeout_seconds)
            group = dist.new_group(backend="gloo", timeout=timeout, group_desc="checkpoint")
            self._ranks = replace(world, group=cast(dist.ProcessGroup, group))
        self._lost: str | None = None
        """Reason for which the ranks can no longer agree on anything."""
        self._plan: _RankPlan | None = None
        self._save: _Save | None = None
        self._ended: list[Event] = []
        self._failures = 0
        self.failures_in_a_row = 0
        self.lost_peer = None
        # Monotonic times: when any rank last made progress in this save, and when the ranks last exchanged a message.
        self._last_progress = self._last_exchange = time.monotonic()

    def reserve(self, tensors: Mapping[str, Tensor]) -> None:
        """Decide who writes what, and make room for the copies, so that the first save waits for neither. Collective.

        Where this fails, the first save tries again and reports why.
        """
        with contextlib.suppress(Exception):
            self._plan = self._make_plan(tensors)
            self._plan.reserve(tensors)

    def begin(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Save `tensors` (plain ones equal on all ranks, or DTensors) as the checkpoint of `step`.

        Waits for an earlier save still under way, copies what this rank will write, and returns.
        """
        started = time.perf_counter()
        self._end_save(step)
        error = None
        try:
            if self._plan is None:
                self._plan = self._make_plan(tensors)
            self._plan.copy(tensors)
        except Exception as caught:  # out of memory, a dead peer: the first round fails the save on all ranks
            error = caught
        self._save = save = _Save(step, started, error)
        save.thread = threading.Thread(target=self._write, args=(save,), name="checkpoint", daemon=True)
        save.thread.start()
        save.stall = time.perf_counter() - started

    def poll(self) -> list[Event]:
        """Return events of the saves that ended since the last call. Cheap. Ranks get them at different steps."""
        if self._save is not None and self._save.outcome is not None:
            self._collect()
        ended, self._ended = self._ended, []
        return ended

    def finish(self) -> list[Event]:
        """Wait for the save under way; then as `poll`."""
        self._end_save()
        return self.poll()

    def close(self, grace_seconds: float = 5.0) -> None:
        """Wait a little for the save under way, then abandon it. Never raises."""
        if self._save is not None:
            self._save.thread.join(grace_seconds)
            if self._save.thread.is_alive():
                return  # it may be inside a collective, so its group is left to the end of the process
        if self._ranks.group is not None and self._lost != CLOSED:
            with contextlib.suppress(Exception):
                dist.destroy_process_group(self._ranks.group)
            self._lost = CLOSED

    def _end_save(self, next_step: int | None = None) -> None:
        """Wait for the save under way. The wait counts as its own, or as that of the save of `next_step`."""
        if (save := self._save) is not None:
            started, last_progress = time.perf_counter(), self._last_progress
            while save.thread.is_alive():
                save.thread.join(POLL_SECONDS)
                if self._last_progress != last_progress:  # of any rank: the main thread's watchdog sees it as its own
                    last_progress = self._last_progress
                    self._heartbeat(Phase.WAITING_FOR_SAVE, save.step if next_step is None else next_step)
            save.stall += time.perf_counter() - started if next_step is None else 0.0
            self._collect()
        self.failures_in_a_row = self._failures

    def _collect(self) -> None:
        """Turn the save that has ended into events."""
        save, self._save = self._save, None
        assert save is not None and save.outcome is not None
        outcome, stall = save.outcome, save.stall
        if isinstance(outcome, _SaveError):
            self._failures += 1
            facts = {"reason": str(outcome), "in_a_row": self._failures, "on_rank": outcome.rank}
            event = CheckpointFailed(step=save.step, stall_seconds=stall, **facts)
        else:
            self._failures = 0
            event = CheckpointSaved(step=save.step, bytes=outcome, seconds=save.seconds, stall_seconds=stall)
        self._ended += [event, *(Warned(message=message) for message in save.warnings)]

    def _make_plan(self, tensors: Mapping[str, Tensor]) -> "_RankPlan":
        """Decide which rank writes what. Done once: the state keeps its shapes. Replicas share the writing."""
        make_local = dcp.default_planner.create_default_local_save_plan
        plans = self._together(lambda: make_local(dict(tensors), is_coordinator=True))
        # All ranks have the same input here, so all compute the same global plan.
        planner = dcp.DefaultSavePlanner(flatten_state_dict=False, dedup_save_to_lowest_rank=False)
        plans, metadata = planner.create_global_plan(plans)
        plans = Writer(self._run, lambda: None).prepare_global_plan(plans)  # gives each rank the names of its files
        return _RankPlan(plans[self._world.rank], metadata)

    def _write(self, save: "_Save") -> None:
        """The writing thread. Training runs first."""
        if sys.platform == "linux":  # only there do single threads have a niceness
            own = threading.get_native_id()
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, own, min(19, os.getpriority(os.PRIO_PROCESS, own) + NICENESS))
        try:
            save.outcome = self._write_and_commit(save)
        except _SaveError as error:
            save.outcome = error
        except BaseException as error:  # without an outcome, the main thread would wait for this thread forever
            self._lost = self._lost or f"the writing thread failed: {files.one_line(error)}"
            save.outcome = _SaveError(self._lost)

    def _write_and_commit(self, save: "_Save") -> int:
        """Do the four rounds, then prune. Returns the checkpoint's bytes. Raises _SaveError, equal on all ranks."""
        staging = self._together(lambda: self._prepare(save))[self._leader]
        assert staging is not None
        try:
            shards = self._together(lambda: self._write_shard(save, staging))
            if self._machines.count > 1:
                self._give_to_neighbours(save, staging, shards)
            final, size = self._together(lambda: self._commit(save, staging, shards))[self._leader]
        except BaseException:
            if self._leads:
                files.discard(staging)
            raise
        save.seconds = time.perf_counter() - save.started
        own_digests = shards[self._world.rank].digests
        damaged = self._together(lambda: self._read_back(save, final, own_digests)) if self._reads_back else []
        if any(damaged):
            if self._leads:
                files.discard(final)
            lines = "; ".join(dict.fromkeys(line for lines in damaged for line in lines))
            rank = next(rank for rank, lines in enumerate(damaged) if lines)
            raise _SaveError(f"it was written, but reads back differently: {lines}", rank)
        if self._leads:  # only now is there something newer that is known to be intact
            self._prune(save, final)
        return size

    def _prepare(self, save: "_Save") -> Path | None:
        """Round 1: rank 0 makes the hidden directory that all ranks write into."""
        if save.error is not None:
            raise save.error
        if not self._leads:
            return None
        files.clean(self._run, self._progress(save))
        return files.stage(self._run, save.step)

    def _write_shard(self, save: "_Save", staging: Path) -> "_Shard":
        """Round 2: each rank writes its part and makes it durable."""
        plan = self._plan
        assert plan is not None
        writer = Writer(staging, self._progress(save, Phase.IN_SAVE_SHARD))
        results: list[Any] = []
        if plan.dcp_plan.items:
            results = writer.write_data(plan.dcp_plan, plan).value()  # pyright: ignore[reportArgumentType]
            files.sync(staging)
        else:  # nothing left for this rank: there are more ranks than tensors
            self._hook(Phase.IN_SAVE_SHARD, save.step)
        if not self._world.is_main:  # rank 0 passes this phase in the next round, where it commits
            self._hook(Phase.BEFORE_COMMIT, save.step)
        return _Shard(writer.files.digests, results)

    def _give_to_neighbours(self, save: "_Save", staging: Path, shards: "list[_Shard]") -> None:
        """With several machines: each rank's shard is also written on the next machine."""
        keeper = self._machines.keeper
        moves = [
            Move(name, file["bytes"], rank, keeper(rank))
            for rank, shard in enumerate(shards) for name, file in sorted(shard.digests.items())
        ]  # fmt: skip
        problem = self._communicate(lambda: move(moves, staging, self._ranks, self._note_own_progress))

        def raise_it() -> None:
            if problem:
                raise CheckpointError(problem)

        self._together(raise_it)

    def _commit(self, save: "_Save", staging: Path, shards: "list[_Shard]") -> tuple[Path, int]:
        """Round 3: rank 0 writes metadata and manifest, then renames. Returns the final path and the bytes."""
        final = files.final_path(self._run, save.step)
        if not self._leads:
            return final, 0
        assert self._plan is not None
        writer = Writer(staging, lambda: None)
        writer.finish(self._plan.metadata, [shard.results for shard in shards])
        for shard in shards:
            writer.files.digests.update(shard.digests)
        described = dict(sorted(writer.files.digests.items()))
        body = {**self._identity, "step": save.step, "world_size": self._world.size, "files": described}
        size = files.write_manifest(staging, body) + sum(file["bytes"] for file in described.values())
        self._hook(Phase.BEFORE_COMMIT, save.step)
        files.commit(staging, final)
        return final, size

    def _read_back(self, save: "_Save", final: Path, own: Mapping[str, Any]) -> list[str]:
        """Round 4: return the problems of what this rank wrote, read from the disk and not from the page cache."""
        self._hook(Phase.AFTER_COMMIT, save.step)
        names = {*own, ".metadata"} if self._world.is_main else {*own}
        for name in names:
            with contextlib.suppress(OSError):
                files.forget_cached(final / name)
        return files.verify(files.open_saved(final), self._progress(save), names)

    def _prune(self, save: "_Save", final: Path) -> None:
        keep = self._settings
        try:
            files.forget_replaced(final)
            verified = files.open_saved(final)
            save.warnings += files.prune(self._run, keep.keep_last, keep.keep_every_steps, verified)
        except (OSError, CheckpointError) as error:  # the checkpoint itself is there: no reason to fail the save
            save.warnings.append(f"old checkpoints could not be removed: {files.one_line(error)}")

    def _progress(self, save: "_Save", first_phase: str | None = None) -> Callable[..., None]:
        """Return a progress callback. It passes `first_phase` on its first call, and informs the peers at intervals."""
        phases = [first_phase] if first_phase else []

        def progress(*amount: int) -> None:
            self._last_progress = time.monotonic()
            if phases:
                self._hook(phases.pop(), save.step)
            if time.monotonic() - self._last_exchange > PROGRESS_SECONDS:
                self._communicate(self._ranks.report_progress)

        return progress

    def _together(self, work: Callable[[], T]) -> list[T]:
        """Do `work` on every rank; return all results, by rank. Raises _SaveError on all ranks if it failed on any."""

        def attempt() -> tuple[T | None, str | None]:
            try:
                return work(), None
            except BaseException as error:  # of any type: the others must learn of it
                if self._lost is not None:  # there is no peer left to agree with
                    raise RuntimeError(self._lost) from None
                return None, files.one_line(error)

        outcomes = self._communicate(lambda: self._ranks.agree(attempt, waiting=self._note_progress))
        failed = [(rank, reason) for rank, (_, reason) in enumerate(outcomes) if reason is not None]
        if failed:
            by_rank = [f"rank {rank}: {why}" if self._ranks.size > 1 else why for rank, why in failed]
            all_alike = len({why for _, why in failed}) == 1 < len(failed)
            raise _SaveError(failed[0][1] if all_alike else "; ".join(by_rank), failed[0][0])
        return [result for result, _ in outcomes]  # pyright: ignore[reportReturnType]

    def _communicate(self, collective: Callable[[], T]) -> T:
        """Call a collective of this saver's group. Raises _SaveError if another rank is lost, now or before."""
        if self._lost is not None:
            raise _SaveError(self._lost)
        try:
            result = collective()
        except Exception as error:  # gloo raises RuntimeError, pickle anything
            if self._lost is None:
                detail = files.one_line(error).partition(". This is typically")[0]  # gloo's advice for programmers
                self._lost = self.lost_peer = f"another rank was lost while saving ({detail})"
            raise _SaveError(self._lost) from None
        self._note_progress()
        return result

    def _note_own_progress(self) -> None:
        self._last_progress = time.monotonic()

    def _note_progress(self) -> None:
        """Note that all ranks have just exchanged a message."""
        self._last_progress = self._last_exchange = time.monotonic()


class _SaveError(CheckpointError):
    """A save failed; the same on all ranks. `rank` is the first that it failed on, None if one was lost."""

    def __init__(self, reason: str, rank: int | None = None) -> None:
        super().__init__(reason)
        self.rank = rank


@dataclass
class _Save:
    """A save under way."""

    step: int
    started: float
    error: Exception | None
    """Raised while the state was copied; fails the save in its first round."""
    stall: float = 0.0
    """Seconds for which training waited."""
    seconds: float = 0.0
    warnings: list[str] = field(default_factory=list)
    outcome: int | _SaveError | None = None
    """The checkpoint's bytes, or the error; set last, by the writing thread."""
    thread: threading.Thread = field(init=False)


@dataclass(frozen=True)
class _Shard:
    """A rank's part: {bytes, sha256} by file name, and DCP's record of the position of each tensor."""

    digests: dict[str, dict[str, Any]]
    results: list[Any]


class _RankPlan:
    """This rank's part of every save, and the buffers that hold a copy of it; each save uses them again."""

    def __init__(self, plan: SavePlan, metadata: Metadata) -> None:
        items = [item for item in plan.items if item.tensor_storage_size()]
        self.dcp_plan = SavePlan(items, storage_data=plan.storage_data)
        self.metadata = metadata
        self._buffers: dict[str, Tensor] = {}

    def reserve(self, tensors: Mapping[str, Tensor]) -> None:
        """Make the buffers. Those for a GPU are pinned, which takes the longer the larger they are."""
        owned = {item.index.fqn: _local(tensors[item.index.fqn]) for item in self.dcp_plan.items}
        # Pinned memory: a copy from a GPU then needs no stop of its stream.
        self._buffers = {n: torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda) for n, t in owned.items()}

    def copy(self, tensors: Mapping[str, Tensor]) -> None:
        if not self.dcp_plan.items:
            return
        if not self._buffers:
            self.reserve(tensors)
        with torch.no_grad():
            sources = [_local(tensors[name]) for name in self._buffers]
            torch._foreach_copy_(list(self._buffers.values()), sources, non_blocking=True)
            if sources[0].is_cuda:  # the next step may overwrite the sources as soon as this returns
                torch.cuda.current_stream(sources[0].device).synchronize()

    def resolve_data(self, item: WriteItem) -> Tensor:
        """Called by DCP's writer for the data of an item of the plan."""
        return self._buffers[item.index.fqn]


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
