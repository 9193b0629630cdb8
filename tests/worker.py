"""The ordinary worker with what only tests need: -m tests.worker train CONFIG --run RUN [--set KEY=VALUE …]

It knows one more kind of fault, `nan_sample`. And it can be slowed down: with TOPROPE_TEST_SLOW={"before_update": 0.1}
in the environment, every rank sleeps 0.1 s at that phase, in every attempt, so that tests can act on a step from
outside; with "from_step" too, from that step on. The phase "data" makes the preparation of the data long; it reports
progress meanwhile. With TOPROPE_TEST_MEMORY, a directory, the workers of each agent have a memory of their own: agents
then stand for machines.
"""

import json
import os
import time
from pathlib import Path
from typing import Any, ClassVar

from trainer import cli, job
from trainer.checkpoint import memory, streams
from trainer.faults.corruption import VisibleFault
from trainer.faults.fault import Setting
from trainer.faults.plan import PlannedFault
from trainer.faults.rank import RankContext
from trainer.log import rundir
from trainer.model import blocks_of
from trainer.sentinel.hang import Watchdog

SLOW, MEMORY = "TOPROPE_TEST_SLOW", "TOPROPE_TEST_MEMORY"
rundir.SHARING_SECONDS = 0.5  # all ranks of a test are on one machine


class NanSample(VisibleFault):
    imitates = "a sample that overflows whenever it is computed"
    made = "an output or a gradient of the first block's MLP is not finite, from now on"
    detected = "the loss or the gradient norm is not finite, also when computed again"
    settings: ClassVar = {
        "nth": Setting(1, "which of the rank's micro-batches of a step", 1),
        "where": Setting("output", "what is not finite", choices=("output", "gradient")),
    }

    def fire(self, planned: PlannedFault, rank: RankContext) -> None:
        def spoil(_module: Any, _arguments: Any, output: Any) -> Any:
            if rank.micro_batch != planned.settings["nth"]:
                return None
            if planned.settings["where"] == "output":
                return output * float("nan")
            if output.requires_grad:
                output.register_hook(lambda gradient: gradient * float("nan"))
            return None

        block: Any = blocks_of(rank.state.model)[0]
        block.mlp.register_forward_hook(spoil)


def slow_down(seconds: dict[str, float]) -> None:
    heartbeat, prepare = Watchdog.heartbeat, job.prepare

    def slow_heartbeat(watchdog: Watchdog, phase: str, step: int) -> None:
        heartbeat(watchdog, phase, step)
        if step >= seconds.get("from_step", 0):
            time.sleep(seconds.get(phase, 0))

    def slow_prepare(*arguments: Any, progress: Any, verify: bool = False, **more: Any) -> Any:
        for _ in range(30 if verify else 0):  # rank 0, which prepares for all
            progress("pretending to prepare", 0, None)
            time.sleep(seconds["data"])
        return prepare(*arguments, progress=progress, verify=verify, **more)

    setattr(Watchdog, "heartbeat", slow_heartbeat)  # noqa: B010
    if "data" in seconds:
        job.prepare = slow_prepare


if __name__ == "__main__":
    streams._HashingStream._CHUNK = 2**14  # many writes in a small file, so that a disk can be slow and not hang
    slow_down(json.loads(os.environ.get(SLOW, "{}")))
    if MEMORY in os.environ:
        memory.ROOT = Path(os.environ[MEMORY], str(os.getppid()))
        memory.ROOT.mkdir(exist_ok=True)
    cli.main()
