"""SIGKILL one worker of a run when half its steps are done: a plain process death, seen from outside."""

import argparse
import os
import signal
import time
from pathlib import Path

from trainer import events


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--patience", type=float, default=300.0, help="seconds after which to give up")
    arguments = parser.parse_args()
    give_up = time.monotonic() + arguments.patience
    while time.monotonic() < give_up:
        log = events.read(arguments.run)
        started = {entry.rank: entry.event for entry in log if isinstance(entry.event, events.AttemptStarted)}
        done = max((entry.event.step for entry in log if isinstance(entry.event, events.StepDone)), default=0)
        if 1 in started and done >= started[1].steps // 2:
            print(f"kill -9 {started[1].pid}: rank 1, at step {done}", flush=True)
            os.kill(started[1].pid, signal.SIGKILL)
            return
        if any(isinstance(entry.event, events.AttemptEnded) for entry in log):
            raise SystemExit("the run ended before anybody could be killed")
        time.sleep(0.2)
    raise SystemExit(f"the run did not get halfway within {arguments.patience:.0f} s")


if __name__ == "__main__":
    main()
