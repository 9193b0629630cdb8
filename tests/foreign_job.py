"""A job that is no toprope run, without torch: a launcher that restarts its workers, which count steps.

Worker 0 keeps the count in FOLDER/count, prints "step N", and at the end "weights DIGEST" and "loss X".
"""

import argparse
import hashlib
import os
import subprocess
import sys
import time
from pathlib import Path


def launch(ranks: int, restarts: int) -> int:
    """Start workers, and all of them again when one dies; the exit status of the job."""
    for start in range(restarts + 1):
        variables = {"WORLD_SIZE": str(ranks), "START": str(start)}
        command = [sys.executable, *sys.argv]
        workers = [subprocess.Popen(command, env=os.environ | variables | {"RANK": str(rank)}) for rank in range(ranks)]
        statuses: list[int | None] = [None]
        while None in statuses and not any(statuses):
            time.sleep(0.01)
            statuses = [worker.poll() for worker in workers]
        for worker in workers:
            worker.kill()
            worker.wait()
        if not any(statuses):
            return 0
    return 1


def work(folder: Path, steps: int, seconds: float, loses: bool, leaves: bool) -> None:
    """Count to `steps`. With `loses` a restart changes the result, with `leaves` one leaves a process behind."""
    count, start = folder / "count", int(os.environ["START"])
    if leaves and start:
        subprocess.Popen(["sleep", "20"], start_new_session=True)
    done = int(count.read_text()) if count.exists() else 0
    while done < steps:
        time.sleep(seconds)
        done += 1
        if os.environ["RANK"] == "0":
            (folder / "part").write_text(str(done))
            (folder / "part").rename(count)
            with (folder / "log").open("a") as log:
                log.write(f"{done} steps\n")
            print(f"step {done}", flush=True)
    if os.environ["RANK"] == "0":
        weights = f"{done} steps" + (f", restarted {start}" if loses else "")
        (folder / "weights").write_text(weights)
        print(f"weights {hashlib.sha256(weights.encode()).hexdigest()}\nloss {1.5 + (start and loses) / 100}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--restarts", type=int, default=2)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=0.03)
    parser.add_argument("--loses", action="store_true")
    parser.add_argument("--leaves", action="store_true")
    given = parser.parse_args()
    if "RANK" not in os.environ:
        sys.exit(launch(given.ranks, given.restarts))
    work(given.folder, given.steps, given.seconds, given.loses, given.leaves)
