"""The context of a fault that fires inside a rank: everything that it can reach and change."""

import contextlib
import functools
import random
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config import Config
from trainer.data import Batches, Prepared
from trainer.faults.plan import PlannedFault
from trainer.log.events import EventLog
from trainer.phases import Hook, Phase

if TYPE_CHECKING:
    from trainer.step import TrainState

ENTERED_SECONDS = 0.15  # a rank that is hit in a collective has waited in it for so long
SAVE_SECONDS = 5.0  # how long damage waits for the save under way,
READ_BACK_SECONDS = 0.5  # and then for its being read back


class RankContext:
    """One rank in one attempt: the objects that `job` has made, and where the rank is in its step."""

    state: "TrainState"
    prepared: Prepared
    batches: Batches

    def __init__(self, config: Config, run: Path, rank: int, world_size: int, attempt: int) -> None:
        self.config, self.run, self.rank, self.world_size, self.attempt = config, run, rank, world_size, attempt
        self.log: EventLog | None = None
        self.step = 0  # completed steps
        self.member: int | None = None  # quorum mode: its number among the job's workers
        self.is_main: Callable[[], bool] = lambda: True  # quorum mode: True if it writes for all
        self.micro_batch = 0  # number of this rank's micro-batches that have begun in the step under way
        self.finished = False  # True once the last step is done and saved
        self.undo = contextlib.ExitStack()  # closed at the end of the attempt
        self.followers: list[Hook] = []
        """Called at every phase that the training thread passes from now on: faults that last for some steps."""
        self._training = threading.get_ident()
        self._saving = -1  # the step that is being saved
        self._committed = (-1, 0.0)  # the last step that was committed, and when by time.monotonic

    @property
    def in_training_thread(self) -> bool:
        return threading.get_ident() == self._training

    def pass_by(self, phase: str, step: int) -> None:
        """Keep track of where the rank is, and let the followers act."""
        if not self.in_training_thread:  # the saver's, which passes the phases of a save only
            if phase == Phase.AFTER_COMMIT:
                self._committed = step, time.monotonic()
            return
        if phase == Phase.BEFORE_FORWARD:
            self.step, self.micro_batch = step, self.micro_batch + 1
        elif phase == Phase.BEFORE_REDUCE:
            self.micro_batch = 0
        elif phase == Phase.WAITING_FOR_SAVE:
            self._saving = step
        elif phase == Phase.BEFORE_END:
            self.finished = True
        for follower in list(self.followers):
            follower(phase, step)

    def in_chosen_micro_batch(self) -> bool:
        """True in the micro-batch that in_forward and in_backward mean: the rank's second, or its only one."""
        own_micro_batches = len(range(self.rank, self.config.data.micro_batches, self.world_size))
        return self.micro_batch == min(2, own_micro_batches)

    def chance(self, planned: PlannedFault) -> random.Random:
        """The generator that draws where a fault hits: the same in every process, whatever other faults there are."""
        what = (planned.kind.name, planned.ranks, planned.at_step, planned.phase, planned.attempt)
        return random.Random(f"{self.config.seed}-{what}-place")

    def await_save(self) -> None:
        """Wait until the save under way, if there is one, is committed and read back. Bounded in time."""
        deadline = time.monotonic() + SAVE_SECONDS
        while self._saving > self._committed[0] and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(max(0.0, self._committed[1] + READ_BACK_SECONDS - time.monotonic()))

    def act_in_all_reduce(self, act: Callable[[], Any]) -> None:
        """Enter the training thread's next all_reduce, act, then wait for its end."""

        def entered(call: Callable[..., Any]) -> None:
            work = call(async_op=True)
            time.sleep(ENTERED_SECONDS)
            act()
            work.wait()

        self.instead_of_all_reduce(entered)

    def instead_of_all_reduce(self, act: Callable[[Callable[..., Any]], None]) -> None:
        """Once, in the training thread: pass the call of all_reduce to `act` instead of making it."""
        import torch.distributed as dist  # planning reads this module too, and does without torch

        real = dist.all_reduce

        def once(*arguments: Any, **more: Any) -> Any:
            call = functools.partial(real, *arguments, **more)
            if not self.in_training_thread:
                return call()
            setattr(dist, "all_reduce", real)  # noqa: B010
            return act(call)

        setattr(dist, "all_reduce", once)  # noqa: B010
