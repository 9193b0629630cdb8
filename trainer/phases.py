"""The named moments of a run, in the order in which a rank passes them.

At each of them a rank reports progress (the watchdog's heartbeat) and may be broken on purpose (`faults`).
"""

from collections.abc import Callable
from enum import StrEnum


class Phase(StrEnum):
    STARTUP = "startup"
    IN_LOAD = "in_load"
    BEFORE_FORWARD = "before_forward"
    """This phase and the three that follow come once per micro-batch."""
    IN_FORWARD = "in_forward"
    BEFORE_BACKWARD = "before_backward"
    IN_BACKWARD = "in_backward"
    BEFORE_REDUCE = "before_reduce"
    IN_REDUCE = "in_reduce"
    AFTER_REDUCE = "after_reduce"
    BEFORE_UPDATE = "before_update"
    IN_UPDATE = "in_update"
    AFTER_UPDATE = "after_update"
    IN_EVAL = "in_eval"
    WAITING_FOR_SAVE = "waiting_for_save"
    AFTER_SAVE = "after_save"
    """The loop goes on; the save is written beside the next steps."""
    IN_SAVE_SHARD = "in_save_shard"
    BEFORE_COMMIT = "before_commit"
    AFTER_COMMIT = "after_commit"
    BEFORE_END = "before_end"
    AFTER_END = "after_end"
    """The log says that the run has finished; the process still has to leave."""


Hook = Callable[[str, int], None]
"""Called with (phase, completed steps) when a rank passes a phase."""


def no_hook(phase: str, step: int) -> None:
    """A hook that does nothing."""
