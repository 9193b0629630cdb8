"""Faults of the wall clock."""

import time
from typing import ClassVar

from trainer.faults.fault import STEP, Harmless, Setting
from trainer.faults.plan import PlannedFault
from trainer.faults.rank import RankContext


class ClockJump(Harmless):
    group = "clock"
    imitates = "a time server's correction"
    made = "the rank's wall clock jumps"
    detected = "no fault: durations come from clocks that do not jump"
    phases = STEP
    settings: ClassVar = {"seconds": Setting(3600.0, "how far; may be negative", -1e6)}
    moves_clock = True

    def fire(self, planned: PlannedFault, rank: RankContext) -> None:
        seconds, real = planned.settings["seconds"], time.time
        setattr(time, "time", lambda: real() + seconds)  # noqa: B010
        rank.undo.callback(setattr, time, "time", real)
        setattr(rank.log, "_clock", time.time)  # noqa: B010  # the log took hold of the real clock when it was opened
