"""The process of one run of a fleet: `python -m trainer.fleet.worker DIRECTORY NAME RANKS SCHEDULER`.

It does what the plain `train` command does with DIRECTORY/config.toml (for several ranks: what torchrun does), prints
to DIRECTORY/log.txt, leaves with the run's exit status, and ends when the process SCHEDULER does; 0 is none.
"""

import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from trainer import config
from trainer.errors import EXIT_FAILED, TopropeError
from trainer.fleet import run_store, supervision
from trainer.fleet.run_store import StoredRun
from trainer.parallel import elastic
from trainer.show import terminal

LOCK_SECONDS = 10.0
WATCH_SECONDS = 0.1
TORCHRUN_RESTARTS = 20  # for faults in a row; the scheduler itself counts starts without progress


def main(directory: str, name: str, ranks: str, scheduler: str) -> int:
    """Train the run in `directory` and return its exit status."""
    stored, endings = StoredRun(Path(directory)), list[Callable[[], None]]()
    log = os.open(stored.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    for stream in (1, 2):
        os.dup2(log, stream)
    os.close(log)
    terminal.take(unbuffered=True)  # a log that cannot grow must not end the run
    if scheduler != "0":
        _end_with_scheduler(int(scheduler), endings)
    began = time.strftime("%Y-%m-%d %H:%M:%S")
    print(f"{run_store.START_MARK}{began}  {name}  process {os.getpid()}", flush=True)
    os.environ["WANDB_NAME"] = name
    # After a scheduler was killed, its process for this run may need a moment to end and to release the directory.
    deadline = time.monotonic() + LOCK_SECONDS
    while run_store.is_held(stored.run / "lock") and time.monotonic() < deadline:
        time.sleep(0.05)
    if ranks != "1":
        return _launch(stored, int(ranks), endings)
    started = time.time()
    os.environ[elastic.FAILURES_FILE] = str(stored.failures)
    from trainer import job

    try:
        return job.train(config.load(stored.config), stored.run, started)
    except TopropeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        return error.exit_status


def _end_with_scheduler(scheduler: int, endings: list[Callable[[], None]]) -> None:
    """End this process when its scheduler dies; first call the `endings`.

    A run that continued without supervision would keep its directory locked for the next scheduler.
    """

    def watch() -> None:
        while os.getppid() == scheduler:
            time.sleep(WATCH_SECONDS)
        for ending in endings:
            ending()
        os._exit(EXIT_FAILED)

    threading.Thread(target=watch, name="toprope-scheduler", daemon=True).start()


def _launch(stored: StoredRun, ranks: int, endings: list[Callable[[], None]]) -> int:
    """Run a torchrun agent with its workers, and the planned faults that strike from outside."""
    from trainer.faults import plan
    from trainer.launch.cluster import Cluster
    from trainer.log import events

    planned = plan.make(config.load(stored.config), ranks)
    cluster = Cluster(
        stored.config, stored.run, (), ranks=ranks, restarts=TORCHRUN_RESTARTS,
        directory=supervision.new_start_directory(stored.directory),
    )  # fmt: skip
    endings.append(cluster.kill)  # the agent has a session of its own, so it would outlive this process
    # The at_seconds of faults count from the run's first start, which may be several starts ago.
    first_log = events.events_directory(stored.run) / "attempt-0000-rank-00000.jsonl"
    first_start = next((entry.time for entry in events.read_file(first_log)), time.time())
    with (
        supervision.running(cluster, planned, stored.run, first_start),
        # A request to stop is passed on to the agent, which passes it on to all ranks.
        supervision.handle_signals(lambda number, _frame: cluster.nodes[0].signal(number)),
    ):
        while (status := cluster.wait(3600)) is None:
            pass
    print(cluster.output, flush=True)
    return status


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
