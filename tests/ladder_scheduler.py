"""The scheduler of a ladder, to be killed by a test: `python -m tests.ladder_scheduler LADDER OUT`."""

import sys
from pathlib import Path

from trainer.fleet.backend import Local
from trainer.ladder import run
from trainer.ladder.plan import load
from trainer.launch import forkserver

if __name__ == "__main__":
    # Forked itself, it has all imports that its own runs need.
    backend = Local(forkserver.fork([*forkserver.PRELOADED, "torch.distributed.run"]))
    run.run(load.load(Path(sys.argv[1])), Path(sys.argv[2]), backend=backend)
