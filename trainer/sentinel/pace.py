"""Pace: how long this rank computes for a micro-batch. A slow node shows there alone, for in a step all wait for it."""

import statistics
import time
from collections import deque
from collections.abc import Callable

from trainer.config import Config
from trainer.log.events import RankPace, Writer
from trainer.parallel import elastic
from trainer.parallel.world import World
from trainer.phases import Hook, Phase

WINDOW = 20
"""Measured steps of which the median is written."""
REPORT_SECONDS = 10.0
EVERY_ON_GPU = 10
"""On a GPU one of so many steps is measured, because the host waits for the device then."""


class Pace:
    """Measures from a step's first forward pass to its reduction. Wraps the hook, whose delays count."""

    def __init__(
        self, log: Writer, hook: Hook, *, every: int = 1, synchronise: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        self._log, self._hook, self._every = log, hook, every
        self._synchronise, self._clock = synchronise, clock
        self._node = elastic.node_name()
        self._began, self._step, self._micro_batches = 0.0, -1, 0
        self._seconds = deque[float](maxlen=WINDOW)
        self._reported = clock()

    def __call__(self, phase: str, step: int) -> None:
        measured = step % self._every == 0
        if measured and phase == Phase.BEFORE_FORWARD:
            if step != self._step or not self._micro_batches:
                self._begin(step)
            self._micro_batches += 1
        self._hook(phase, step)
        if measured and phase == Phase.BEFORE_REDUCE and step == self._step and self._micro_batches:
            self._synchronise()
            self._seconds.append((self._clock() - self._began) / self._micro_batches)
            self._micro_batches = 0
            self._report(step)

    def _begin(self, step: int) -> None:
        self._synchronise()
        self._began, self._step, self._micro_batches = self._clock(), step, 0

    def _report(self, step: int) -> None:
        if len(self._seconds) == WINDOW and self._clock() - self._reported >= REPORT_SECONDS:
            self._reported = self._clock()
            pace = statistics.median(self._seconds)
            self._log.append(RankPace(step=step + 1, node=self._node, seconds_per_micro_batch=pace))


def with_pace(config: Config, world: World, log: Writer, hook: Hook) -> Hook:
    """Measure this rank's pace around `hook`, where there is one: ranks that share a model wait in every pass."""
    if world.size == 1 or config.parallel.strategy != "replicate":
        return hook
    if world.device.type != "cuda":
        return Pace(log, hook)
    import torch

    return Pace(log, hook, every=EVERY_ON_GPU, synchronise=lambda: torch.cuda.synchronize(world.device))
