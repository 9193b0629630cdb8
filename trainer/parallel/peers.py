"""The death of a peer, told to ranks that train over NCCL.

gloo raises as soon as the kernel closes the connections of a dead process. A rank that waits in NCCL may hear of it
only at the time limit: on one machine the agent ends it before, but not where a whole node is gone with its agent. So
each rank also keeps a gloo connection to the next one, in a ring, and a thread that waits at it. Whoever ends because
it has lost its peer closes its own connection, so the news goes round in moments.

Silence is no death: a rank that is stopped or slow keeps its connection, and the watchdog (sentinel/hang.py) names it.
Nor is a machine without power told here, whose connections nobody closes: it does not answer the watchdog either.
"""

import contextlib
import datetime
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist

from trainer.parallel.world import World

GROUP = "toprope peers"
"""Name of the group in torch's records of collectives: what waits in it is no part of training."""
HERE_SECONDS = 1.0
"""Time for the main thread to report the loss itself, where its own collective fails too."""
GOODBYE_SECONDS = 5.0
_LIMIT = datetime.timedelta(days=365)  # of one receive, which lasts as long as training


def needed(world: World, backend: str) -> bool:
    """True if ranks of this world wait for one another in NCCL. `backend` is that of `world.backend`."""
    return world.size > 1 and "nccl" in backend


@contextlib.contextmanager
def watched(world: World, lost: Callable[[], None]) -> Iterator[None]:
    """While this lasts, call `lost` from a thread when the next rank is gone; it should end this process. Collective.

    A rank that leaves without an error has nothing to wait for any more: it says goodbye, and nobody misses it.
    """
    group: Any = dist.new_group(backend="gloo", timeout=_LIMIT, group_desc=GROUP)
    before, after = (world.rank - 1) % world.size, (world.rank + 1) % world.size
    leaving = threading.Event()

    def wait() -> None:
        try:
            group.recv([torch.zeros(1)], after, 0).wait()
        except RuntimeError:
            if not leaving.wait(HERE_SECONDS):
                lost()

    thread = threading.Thread(target=wait, name="toprope-peers", daemon=True)
    thread.start()
    try:
        yield
        leaving.set()
        with contextlib.suppress(RuntimeError):  # it has left with an error
            group.send([torch.zeros(1)], before, 0).wait()
        thread.join(GOODBYE_SECONDS)
    finally:
        leaving.set()
