"""A worker without torch for tests of the launcher, and the launcher that starts such workers.

python -m tests.quorum_worker launch|serve|join DIRECTORY BEHAVIOUR WORKERS [SPARES]

`join` and `serve` are told by the environment: JOIN and LISTEN are addresses, RUN the run directory.
"""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

from trainer import config as configs
from trainer import signals
from trainer.errors import EXIT_FINISHED, EXIT_PREEMPTED, EXIT_QUARANTINED, EXIT_USAGE, TopropeError
from trainer.launch import forkserver, quorum
from trainer.log import rundir
from trainer.parallel import elastic
from trainer.parallel.membership import JobOver, Membership
from trainer.parallel.protocol import FAILED, FINISHED, HOPELESS, MICRO_BATCHES, PREEMPTED, Holding

STEPS = 5
STEP_SECONDS = 0.02


class Worker:
    """Takes steps alone: nothing is computed, and no other member is waited for."""

    def __init__(self, directory: Path, behaviour: str) -> None:
        given = elastic.quorum()
        assert given is not None
        self.directory, self.behaviour, self.slot = directory, behaviour, given.slot
        self.lives = directory / f"lives of {self.slot}"
        with self.lives.open("a") as file:
            file.write(f"{os.getpid()}\n")
        self.life = len(self.lives.read_text().split())
        self.stopped: list[int] = []
        for asking in signals.ASKING:
            signal.signal(asking, lambda number, _: self.stopped.append(number))
        if (behaviour == "wrong usage") or (behaviour == "dies at every start" and self.slot == 1 and self.life > 1):
            sys.exit(EXIT_USAGE if behaviour == "wrong usage" else 1)
        if behaviour == "never starts":
            sys.exit(1)
        if behaviour == "a spare" and self.life > 1:  # a successor that starts more slowly than a spare, as with torch
            while not (directory / "told").exists():
                time.sleep(STEP_SECONDS)
        self.holding = Holding()
        identity = {MICRO_BATCHES: "8", "torch": "of tomorrow" if behaviour == "another torch" else "of today"}
        self.membership = Membership.connect(given, identity, "127.0.0.1:1", limits=(0.5, 60.0))
        self.write(f"pid of {self.membership.member}", str(os.getpid()))
        self.meet()

    def meet(self) -> None:
        epoch = self.membership.meet(self.holding.report())
        self.write(f"epoch {epoch.number}", " ".join(map(str, epoch.members)))
        if max(epoch.members) == 3 and not (self.directory / "successor").exists():
            self.write("successor", str(epoch.number))
        self.holding.enter(epoch, self.membership.member)
        if self.holding.step is None:
            self.holding.received(epoch.step or 0)

    def write(self, name: str, text: str) -> None:
        own = self.directory / f"{os.getpid()}"
        own.write_text(text)
        own.replace(self.directory / name)  # whole, whoever reads it

    def run(self) -> int:
        while not self.may_finish():
            time.sleep(STEP_SECONDS)
            if self.stopped:
                self.membership.leave(PREEMPTED)
                return EXIT_PREEMPTED
            if self.membership.ended or self.membership.change_wanted:
                self.meet()
            self.holding.committed()
            self.membership.committed(self.holding.step or 0)
            self.misbehave()
        self.membership.leave(FINISHED)
        return EXIT_FINISHED

    def may_finish(self) -> bool:
        lives = {
            "dies once": (self.directory / "successor").exists,
            "dies at every start": (self.directory / "told").exists,
            "a spare": (self.directory / "told").exists,
            "stops": (self.directory / "successor").exists,
            "waits": lambda: False,
            "until told": (self.directory / "told").exists,
        }
        return (self.holding.step or 0) >= STEPS and lives.get(self.behaviour, lambda: True)()

    def misbehave(self) -> None:
        if self.behaviour == "stops" and self.holding.step == 2:
            if self.slot == 1 and self.life == 1:
                os.kill(os.getpid(), signal.SIGSTOP)
            self.membership.at("reduce", 2)
            while not self.membership.ended:  # the others never come
                time.sleep(STEP_SECONDS)
        wrong = self.behaviour == "all quarantined" or (self.behaviour == "quarantined" and self.slot == 1)
        if wrong and self.holding.step == 2:
            self.membership.leave(FAILED, "wrong twice")
            sys.exit(EXIT_QUARANTINED)
        dies = self.slot == 1 and self.life == 1 and self.holding.step == 2
        if (self.behaviour in ("dies once", "dies at every start") and dies) or (
            self.behaviour == "dies again and again" and self.slot == 1
        ):
            os.kill(os.getpid(), signal.SIGKILL)
        if self.behaviour == "hopeless" and dies:
            self.membership.leave(HOPELESS, "a number is not finite")
            sys.exit(1)


def main() -> int:
    what, directory, behaviour, *counts = sys.argv[1:]
    if what != "work":
        forkserver.PRELOADED = ()  # no torch: it starts at once
        rundir.DYING_SECONDS = 0.2
        command = ["work", directory, behaviour]
        workers, spares = int(counts[0]), int(counts[1]) if counts[1:] else 0
        config = configs.parse({"elastic": {"step_timeout_seconds": 0.5}})
        run = Path(os.environ.get("RUN") or Path(directory) / "run")
        listen = os.environ.get("LISTEN", "127.0.0.1:0")
        plan = quorum.Plan(
            config, command, run, workers, spares, listen, os.environ.get("JOIN", ""), module=__spec__.name
        )
        return quorum.serve(plan) if what == "serve" else quorum.launch(plan)
    elastic.belong_to_agent()
    try:
        return Worker(Path(directory), behaviour).run()
    except JobOver as over:
        return quorum.EXIT_STATUS[over.status]


def told(work: Callable[[], int]) -> int:
    """Return the exit status of `work`; its errors are shown as the command line shows them."""
    try:
        return work()
    except TopropeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return error.exit_status


if __name__ == "__main__":
    sys.exit(told(main))
