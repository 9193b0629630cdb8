"""A rank for tests/test_peers.py, which waits for nothing but its peer.

Usage: python -m tests.peers_worker WHAT RANK RANKS DIR.
Rank r writes DIR/rank-r.txt: "ready", then "lost" or "left".
"""

import datetime
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.support import wait_until
from trainer.parallel import peers
from trainer.parallel.world import World
from trainer.sentinel import hang, hang_diagnosis


def main(what: str, rank: int, ranks: int, directory: Path) -> None:
    store = dist.FileStore(str(directory / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=datetime.timedelta(seconds=60))
    told, note = threading.Event(), directory / f"rank-{rank}.txt"

    def lost() -> None:
        note.write_text("lost")
        told.set()
        os._exit(1)

    with peers.watched(World(rank, ranks, torch.device("cpu")), lost):
        dist.barrier()
        wait_until(lambda: pending() is None, 20)  # the barrier's record ends a moment after it
        note.write_text("ready" if pending() is None else f"waits in {pending()}")
        if what == "fail" and rank == 1:
            raise SystemExit("an error of this rank alone")
        if what == "stop" and rank == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        if what == "stop":
            dist.barrier()
        else:  # as in a kernel of NCCL
            told.wait(0.3 * rank if what == "leave" else 60)
    note.write_text("left")
    time.sleep(0.1 * rank)
    dist.destroy_process_group()


def pending() -> Any:
    """The collective in which the watchdog would say that this rank waits."""
    return hang_diagnosis.pending_collective(*map(json.loads, hang.flight_recorder_traces()))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
