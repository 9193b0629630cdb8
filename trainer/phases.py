"""The named moments of a run, in the order in which a rank passes them.

A fault on purpose may strike at each of them (`faults`). At most of them a rank also reports progress to its watchdog:
the exceptions are IN_FORWARD, IN_BACKWARD, IN_REDUCE, WIDENED, IN_UPDATE and AFTER_END, which only an armed injector
sees, and the phases of the thread that writes checkpoints.
"""

from collections.abc import Callable
from enum import StrEnum


class Phase(StrEnum):
    STARTUP = "startup"
    JOINING = "joining"
    """Quorum mode: a newcomer is in its first epoch, and has not met the other members yet."""
    IN_TRANSFER = "in_transfer"
    """Quorum mode: a piece of the state has been handed over. The giver and the receivers pass it."""
    IN_LOAD = "in_load"
    BEFORE_FORWARD = "before_forward"
    """This phase and the three that follow come once per micro-batch."""
    IN_FORWARD = "in_forward"
    BEFORE_BACKWARD = "before_backward"
    IN_BACKWARD = "in_backward"
    BEFORE_REDUCE = "before_reduce"
    IN_REDUCE = "in_reduce"
    AFTER_REDUCE = "after_reduce"
    WIDENED = "widened"
    """The grid was too fine and has been widened; the second pass over the step has not begun."""
    BEFORE_UPDATE = "before_update"
    IN_UPDATE = "in_update"
    IN_SEND = "in_send"
    """Islands: a part of what they have learnt is on its way. In this phase and the next two, which come with the
    update, the step counts as completed."""
    IN_RECEIVE = "in_receive"
    """Islands: what the others have learnt is waited for."""
    IN_OUTER_UPDATE = "in_outer_update"
    """Islands: a part of the outer weights has moved, the rest has not."""
    AFTER_UPDATE = "after_update"
    IN_EVAL = "in_eval"
    WAITING_FOR_SAVE = "waiting_for_save"
    AFTER_SAVE = "after_save"
    """The loop continues; the save is written beside the next steps."""
    IN_SAVE_SHARD = "in_save_shard"
    BEFORE_COMMIT = "before_commit"
    AFTER_COMMIT = "after_commit"
    BEFORE_END = "before_end"
    AFTER_END = "after_end"
    """The log says that the run has finished; the process still has to leave."""


Hook = Callable[[str, int], None]
"""Called with (phase, completed steps) when a rank passes a phase: during step 9 that is 8 until the update, then 9."""


def no_hook(phase: str, step: int) -> None:
    """A hook that does nothing."""
