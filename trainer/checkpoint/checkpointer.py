"""The training loop's view of checkpoints: restore at start, save beside training, log how each save ended."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer import checkpoint, config
from trainer.errors import CheckpointError
from trainer.log.events import CheckpointSaved, Event, Writer
from trainer.parallel.world import PeerLostError, World
from trainer.phases import Hook, Phase

if TYPE_CHECKING:
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
    ) -> None:
        """`facts` are the contents of config.json. `hook` is called at the phases of loading and saving, `heartbeat`
        whenever a save that the loop waits for makes progress.
        """
        self._run, self._world, self._settings, self._log, self._hook = run, world, settings, log, hook
        self._identity = {"fingerprint": facts["fingerprint"], "run_id": facts["run_id"]}
        self._durable_step = -1
        self._saver = checkpoint.Saver(run, world, self._identity, settings, hook, heartbeat)

    def restore(self, state: "TrainState") -> None:
        """Load the newest intact checkpoint into `state`. Without one, `state` stays at step 0."""
        step = checkpoint.restore(
            self._run,
            state.tensors(),
            self._readers,
            self._identity["fingerprint"],
            self._log.append,
            self._hook,
            self._identity["run_id"],
        )
        if step is not None:
            state.restored(step)
            self._durable_step = step

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

    def poll(self) -> None:
        """Log the saves that have ended since the last call. Does not wait."""
        self._record(self._saver.poll())

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

    def close(self) -> None:
        """Give a save under way a few seconds to end, then abandon it."""
        self._saver.close()

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
        self, present: Callable[[], World], finished: Callable[["TrainState"], None], run: Path, alone: World,
        facts: dict[str, Any], settings: config.Checkpoint, log: Writer, hook: Hook, heartbeat: Hook,
        check: Callable[[int], None] = lambda step: None,
    ) -> None:  # fmt: skip
        """`present` tells the members when it is called. `finished` is called by the main one when all is durable.

        `check` is called by all members before the state of a step is saved; `hook` by the main one alone.
        """
        super().__init__(run, alone, facts, settings, log, hook, heartbeat)
        self._present, self._finished, self._check = present, finished, check
        self._begun_step = -1

    @property
    def _readers(self) -> World:
        return self._present()

    def save(self, state: "TrainState") -> None:
        def save_on_main() -> None:
            if self._begun_step != state.step:  # else the members have changed since
                self._begun_step = state.step
                Checkpointer.save(self, state)

        self._check(state.step)
        self._present().from_main(save_on_main)

    def finish(self, state: "TrainState") -> None:
        def finish_on_main() -> None:
            Checkpointer.finish(self, state)
            self._finished(state)

        self._check(state.step)
        # The others leave only when it is done: if the main member dies, the next one does it.
        self._present().from_main(finish_on_main)
