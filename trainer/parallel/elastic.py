"""What worker and launcher tell each other through the environment. No torch: the command line asks first."""

import contextlib
import json
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from trainer.errors import EXIT_FAILED

FAILURES_FILE = "TOPROPE_FAILURES"
"""Environment: the file in which our launcher notes why it starts the workers again."""
FAILURES_PREFIX = "toprope-failures-"
JOB_MARK = "TOPROPE_JOB"
"""Environment: which job on this machine a process belongs to, as MARK_LENGTH letters."""
MARK_LENGTH = 32
NAME_PREFIX = "rank "
"""Of a worker's name among the processes."""
SHARED_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
SHARED_STORE_WARNING = (
    f"torchrun was started without {SHARED_STORE}=1. With torch 2.13 a node that joins then hangs the job, and "
    "restarts are unreliable. Export it before torchrun, or use the torchrun that toprope installs."
)


def started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def expected_size() -> int:
    """The number of ranks that torchrun says it started; 1 without it. Known before anything connects."""
    return int(os.environ["WORLD_SIZE"]) if started_by_torchrun() else 1


def expected_rank() -> int:
    return int(os.environ["RANK"]) if started_by_torchrun() else 0


def shares_rendezvous_store() -> bool:
    """Whether torchrun started us in the mode in which joining nodes hang."""
    return started_by_torchrun() and os.environ.get(SHARED_STORE) != "1"


def belong_to_agent() -> None:
    """Worker: bear its rank's name, and end when the agent that started it is gone.

    It would train on unsupervised, and keep the run directory from whoever starts the job again.
    """
    if not started_by_torchrun():
        return
    name_process()
    agent = os.getppid()

    def watch() -> None:
        while os.getppid() == agent:
            time.sleep(0.2)
        os._exit(EXIT_FAILED)

    threading.Thread(target=watch, name="toprope-agent", daemon=True).start()


def name_process() -> None:
    """Worker: call this process "rank N", for `ps` and `top`, and for whoever looks for it. Linux only."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(f"{NAME_PREFIX}{os.environ['RANK']}", encoding="utf-8")


def make_failures_file() -> Path:
    """Launcher: make the file that `note_failures` fills; workers find it through the environment."""
    descriptor, name = tempfile.mkstemp(prefix=FAILURES_PREFIX, suffix=".json")
    os.close(descriptor)
    os.environ[FAILURES_FILE] = name
    return Path(name)


def note_failures(failures: list[dict[str, Any]], reason: str, path: Path | None = None) -> None:
    """Launcher: say why workers are about to be started again; each failure is {rank, pid, exitcode, signal}.

    `path` is the failures file, if not that of the environment.
    """
    with (path or Path(os.environ[FAILURES_FILE])).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"failures": failures, "reason": reason}) + "\n")


def give_up() -> None:
    """Worker: tell our launcher that starting again would end in the same error."""
    path = os.environ.get(FAILURES_FILE)
    if path is not None:
        Path(path).with_suffix(".final").touch()


def gave_up(path: Path | None = None) -> bool:
    """Launcher: whether a worker of this node said so. `path` as above."""
    return (path or Path(os.environ[FAILURES_FILE])).with_suffix(".final").exists()


def take_losses() -> list[dict[str, Any]]:
    """Worker: why its node's were started again, {failures, reason} each, since one of them last asked.

    More than one where some died before they could ask. For the node's first worker; empty for the others, for a first
    start and under another launcher.
    """
    path = os.environ.get(FAILURES_FILE)
    if path is None or os.environ.get("LOCAL_RANK", "0") != "0":
        return []
    try:
        told = Path(path).read_text(encoding="utf-8").splitlines()
        Path(path).write_text("", encoding="utf-8")
        return [json.loads(line) for line in told]
    except (OSError, ValueError):
        return []
