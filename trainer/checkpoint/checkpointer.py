"""The training loop's view of checkpoints: restore at start, save beside training, log how each save ended.

With `checkpoint.memory_every_steps` the state is also copied into the machine's memory (memory.py), by the same means:
a restart after the death of processes then repeats fewer steps. What must last is on disk.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import checkpoint, config
from trainer.checkpoint import files, memory
from trainer.checkpoint.neighbours import Machines, gather
from trainer.errors import CheckpointError
from trainer.log.events import CheckpointFailed, CheckpointSaved, Corrupted, Entry, Event, Warned, Writer
from trainer.parallel import elastic
from trainer.parallel.world import PeerLostError, World
from trainer.phases import Hook, Phase

if TYPE_CHECKING:
    from trainer.parallel.quorum import EpochWorld
    from trainer.step import TrainState


class Checkpointer:
    """Saves and restores the state of one attempt. Every method is collective."""

    def __init__(
        self,
        run: Path,
        world: World,
        facts: dict[str, Any],
        settings: config.Checkpoint,
        log: Writer,
        hook: Hook,
        heartbeat: Hook,
        is_checked: bool = False,
    ) -> None:
        """`facts` are the contents of config.json. `hook` is called at the phases of loading and saving, `heartbeat`
        whenever a save that the loop waits for makes progress. `is_checked`: the sentinel may find a copy wrong.
        """
        self._run, self._world, self._settings, self._log, self._hook = run, world, settings, log, hook
        self._identity = {"fingerprint": facts["fingerprint"], "run_id": facts["run_id"]}
        self._durable_step = -1
        self._saver = checkpoint.Saver(run, world, self._identity, settings, hook, heartbeat)
        self._heartbeat = heartbeat
        self._memory_place, self._is_checked = memory.place(run, facts["run_id"]), is_checked
        self._is_leader = world.is_main
        """True for the first rank of each machine: it makes and removes the place for copies."""
        self._copier: checkpoint.Saver | None = None
        """Writes the copies in memory; None without them."""
        self._has_warned = False

    def restore(self, state: "TrainState") -> str:
        """Load the newest intact checkpoint into `state`; return "memory" or "disk", where it was.

        Without one, `state` stays at step 0, and this returns "".
        """
        if self._settings.memory_every_steps:
            self._open_memory(state)
        saved = checkpoint.restore(
            self._run,
            state.tensors(),
            self._readers,
            self._identity["fingerprint"],
            self._log.append,
            self._hook,
            self._identity["run_id"],
            None if self._copier is None else self._memory_place,
        )
        if saved is None:
            return ""
        state.restored(saved.step)
        if saved.path.is_relative_to(checkpoint.directory(self._run)):
            self._durable_step = saved.step
            return "disk"
        return "memory"

    def reserve(self, state: "TrainState") -> None:
        """Before the first step: make what the first save needs. Collective.

        Only for GPUs: pinning gigabytes takes a second, in which the first save would stall training.
        """
        if self._world.device.type == "cuda":
            for saver in (self._saver, self._copier):
                if saver is not None:
                    saver.reserve(state.tensors())

    def _open_memory(self, state: "TrainState") -> None:
        """Make the place for copies in memory. Collective. Without one, rank 0 says why, and the disk alone is used."""
        world, path = self._world, self._memory_place
        needed = sum(tensor.numel() * tensor.element_size() for tensor in state.tensors().values())
        is_first = world.is_main or elastic.local_rank() == 0
        reasons = world.agree(lambda: memory.prepare(path, self._run, needed) if is_first else None)
        tokens = world.agree(lambda: memory.token(path) or "")
        machines = Machines.told_by(tokens)
        elastic.note_memory(path)
        reason = next((reason for reason in reasons if reason), None)
        if reason is None and "" in tokens:
            reason = "a rank does not see the memory of its machine"
        if reason is None and machines.count > 1 and self._is_checked:
            reason = "the sentinel may find a copy wrong, and could not remove those on other machines"
        if reason is not None:
            self._warn(f"there are no copies of the state in memory: {reason}. A restart begins from the disk.")
            return
        self._is_leader = machines.leader(world.rank) == world.rank
        if machines.count > 1:
            saved = world.from_main(lambda: files.committed(self._run))
            gather(path, machines, world, max((s.step for s in saved), default=-1))
        settings = self._settings.model_copy(update={"keep_last": 1, "keep_every_steps": 0})
        # No hook: faults of the phases of a save are for what is written to disk.
        self._copier = checkpoint.Saver(
            path, world, self._identity, settings, heartbeat=self._heartbeat, read_back=False, machines=machines
        )

    @property
    def _readers(self) -> World:
        """The ranks that load a checkpoint together."""
        return self._world

    def save(self, state: "TrainState") -> None:
        """Begin to save `state`; the writing continues beside the next steps. Waits for an earlier save first.

        Raises CheckpointError after `checkpoint.max_failures` failed saves in a row.
        """
        self._hook(Phase.WAITING_FOR_SAVE, state.step)
        self._saver.begin(state.step, state.tensors())
        self._hook(Phase.AFTER_SAVE, state.step)
        self.poll()
        self._raise_if_hopeless()

    def keep(self, state: "TrainState") -> None:
        """Begin to copy `state` into the machine's memory, beside the next steps. Waits for an earlier copy first."""
        if self._copier is not None:
            self._heartbeat(Phase.WAITING_FOR_SAVE, state.step)
            self._note(self._copier, self._copier.finish())
            if self._is_leader and not self._memory_place.exists():  # `heed` has removed it
                memory.prepare(self._memory_place, self._run, 0)
            self._copier.begin(state.step, state.tensors())
            self._heartbeat(Phase.AFTER_SAVE, state.step)

    def poll(self) -> None:
        """Log the saves that have ended since the last call. Does not wait."""
        self._record(self._saver.poll())
        if self._copier is not None:
            self._note(self._copier, self._copier.poll())

    def finish(self, state: "TrainState") -> None:
        """Wait until `state` is durable. Raises CheckpointError if it cannot be made so."""
        self._hook(Phase.WAITING_FOR_SAVE, state.step)
        self._record(self._saver.finish())
        # After a failed save in the middle of a run, the next one takes its place. The last save has no next, and it is
        # the result, so it is tried again here.
        while self._durable_step != state.step:
            self._raise_if_hopeless()
            self._saver.begin(state.step, state.tensors())
            self._record(self._saver.finish())
        if self._copier is not None:  # the disk has the newest state now
            self._copier.finish()
        if self._is_leader:
            memory.discard(self._memory_place)

    def heed(self, entry: Entry) -> None:
        """Subscribed to the log of rank 0: remove the copies in memory that may have what is found wrong only now."""
        if isinstance(entry.event, Corrupted) and self._copier is not None:
            memory.discard(self._memory_place)

    def close(self) -> None:
        """Give a save under way a few seconds to end, then abandon it."""
        self._saver.close()
        if self._copier is not None:
            self._copier.close()

    def _note(self, copier: checkpoint.Saver, ended: list[Event]) -> None:
        """Copies that succeed are not logged: there may be one a step."""
        if copier.lost_peer is not None:
            raise PeerLostError(copier.lost_peer)
        for event in ended:
            # Where `heed` has removed the place, the copy under way had to fail.
            if isinstance(event, CheckpointFailed) and not self._has_warned and self._memory_place.exists():
                self._has_warned = True
                self._warn(
                    f"the state of step {event.step} could not be copied into memory: {event.reason}. A restart begins "
                    "from the newest copy that could, or from the disk. Further failures are not reported."
                )

    def _warn(self, message: str) -> None:
        if self._world.is_main:
            self._log.append(Warned(message=message))

    def _record(self, ended: list[Event]) -> None:
        if self._saver.lost_peer is not None:  # not the disk's fault; the next attempt saves again
            raise PeerLostError(self._saver.lost_peer)
        for event in ended:
            if isinstance(event, CheckpointSaved):
                self._durable_step = event.step
            if self._world.is_main:
                self._log.append(event)

    def _raise_if_hopeless(self) -> None:
        limit = self._settings.max_failures
        if self._saver.failures_in_a_row >= limit:
            raise CheckpointError(
                f"saving failed {limit} times in a row; the log has the reasons.\n"
                "  More work would only be lost. Make room or repair the disk; the same command then resumes from the "
                "newest checkpoint."
            )


class MainCheckpointer(Checkpointer):
    """The checkpoints of members that change, each of which holds the whole state: the main one alone writes.

    So a death disturbs no save but the main member's own. The next main member saves again when a save is due.
    """

    def __init__(
        self, present: "Callable[[], EpochWorld]", finished: Callable[["TrainState"], None], run: Path, alone: World,
        facts: dict[str, Any], settings: config.Checkpoint, log: Writer, hook: Hook, heartbeat: Hook,
        check: Callable[[int], None] = lambda step: None, member: int = 0,
    ) -> None:  # fmt: skip
        """`present` tells the members when it is called. `finished` is called by the main one when all is durable.

        `alone` are the processes of one member, `member` is its number. `check` is called by all members before the
        state of a step is saved; `hook` by the main one alone.
        """
        super().__init__(run, alone, facts, settings, log, hook, heartbeat)
        self._present, self._finished, self._check, self._member = present, finished, check, member
        self._begun_step = -1

    @property
    def _readers(self) -> World:
        return self._present()

    def _record(self, ended: list[Event]) -> None:
        # The saver knows the processes of this member alone; the log names members by their numbers.
        super()._record([
            replace(event, on_rank=self._member)
            if isinstance(event, CheckpointFailed) and event.on_rank is not None else event
            for event in ended
        ])  # fmt: skip

    def save(self, state: "TrainState") -> None:
        def save_on_main() -> None:
            if self._begun_step != state.step:  # else the members have changed since
                self._begun_step = state.step
                Checkpointer.save(self, state)

        self._check(state.step)
        self._by_main(save_on_main)

    def finish(self, state: "TrainState") -> None:
        def finish_on_main() -> None:
            Checkpointer.finish(self, state)
            self._finished(state)

        self._check(state.step)
        # The others leave only when it is done: if the main member dies, the next one does it.
        self._by_main(finish_on_main)

    def _by_main(self, act: Callable[[], None]) -> None:
        """All processes of the main member do it; the others wait."""
        world = self._present()
        world.agree(act if world.has_main else lambda: None)
