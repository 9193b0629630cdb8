"""The environment between a worker and its launcher: ranks, and why workers were started again. No torch here."""

import contextlib
import ctypes
import dataclasses
import ipaddress
import json
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import EXIT_FAILED, WorldError

FAILURES_FILE = "TOPROPE_FAILURES"
"""Environment variable: the file in which our launcher notes why it starts the workers again."""
FAILURES_PREFIX = "toprope-failures-"
JOB_MARK = "TOPROPE_JOB"
"""Environment variable: the job on this machine that a process belongs to, as MARK_LENGTH letters."""
MARK_LENGTH = 32
LAUNCHERS = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
"""Variables in which torchrun and others (mpirun, srun) give the number of processes that they have started."""
QUORUM = "TOPROPE_QUORUM"
"""Environment variable: `Quorum` as JSON."""
APART = "TOPROPE_APART"
"""Environment variable: `Apart` as JSON."""
PR_SET_PDEATHSIG = 1  # linux/prctl.h: the kernel sends this signal when the parent ends
NODE_NAMES = ("TOPROPE_NODE", "SLURMD_NODENAME")
"""Environment variables that name this node, where that is not the host's name: in a pod, and on Slurm."""
NAME_PREFIX = "rank "
"""Start of a worker's name in the list of processes."""
SHARED_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"
SHARED_STORE_WARNING = (
    f"torchrun was started without {SHARED_STORE}=1. With torch 2.13 a node that joins then hangs the job, and "
    "restarts are unreliable. Export it before torchrun, or use the torchrun that toprope installs."
)


@dataclass(frozen=True)
class Quorum:
    """Facts that our launcher tells a worker of a job in which a death ends nobody else (launch/quorum.py)."""

    host: str
    """Host where the arbiter listens."""
    port: int
    token: str
    node: str
    """Name of this launcher among those of the job."""
    slot: int
    """Place of this worker among the launcher's; its successor has the same one."""
    size: int
    """Workers that the launcher keeps; in the slots beyond are spares. With groups: groups."""
    group_size: int = 1
    """Processes that are one worker together: a replica group, which shares one copy of the model (groups.py)."""
    place: int = 0
    """Place of this process in its group."""
    meeting: str = ""
    """Directory where the processes of the group meet."""

    @property
    def rank(self) -> int:
        return self.slot * self.group_size + self.place

    def environment(self) -> dict[str, str]:
        """Variables that `quorum` reads in the worker."""
        return {QUORUM: json.dumps(dataclasses.asdict(self))} | {n: str(self.rank) for n in ("RANK", "LOCAL_RANK")}


def quorum() -> Quorum | None:
    """Return what the launcher of `python -m trainer launch` has told this worker; None under any other launcher."""
    return Quorum(**json.loads(os.environ[QUORUM])) if QUORUM in os.environ else None


def in_quorum() -> bool:
    return QUORUM in os.environ


@dataclass(frozen=True)
class Apart:
    """Facts that our launcher tells one of several clusters of islands that live and die apart (launch/islands.py)."""

    run: str
    """Run directory of the whole."""
    post: str
    """Directory of the messages of this job."""
    cluster: int
    clusters: int
    place: int
    """Place of this cluster among those of its launcher."""
    neighbours: int
    """Clusters of its launcher, this one among them."""
    ranks: int = 1
    """Ranks of each cluster."""
    rank: int = 0
    """This process's number among those of its cluster."""
    meeting: str = ""
    """Directory where the ranks of the cluster meet."""

    @property
    def rank_of_all(self) -> int:
        """Number of this process among the ranks of all clusters."""
        return self.cluster * self.ranks + self.rank

    def environment(self) -> dict[str, str]:
        """Variables that `apart` reads in each rank of the cluster."""
        return {
            APART: json.dumps(dataclasses.asdict(self)), "RANK": str(self.rank_of_all), "LOCAL_RANK": str(self.rank),
        }  # fmt: skip


def apart() -> Apart | None:
    """Return what the launcher has told this cluster of islands; None if this is none that lives apart."""
    return Apart(**json.loads(os.environ[APART])) if APART in os.environ else None


def node_name() -> str:
    """Name of the node that this process runs on, as its scheduler knows it; without one, the host's."""
    return next(filter(None, map(os.environ.get, NODE_NAMES)), "") or socket.gethostname()


def started_by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def expected_size() -> int:
    """Number of ranks that the launcher says it started; 1 without one. Known before anything connects."""
    if (given := quorum()) is not None:
        return given.size * given.group_size
    if (cluster := apart()) is not None:
        return cluster.clusters * cluster.ranks
    return int(os.environ["WORLD_SIZE"]) if started_by_torchrun() else 1


def expected_rank() -> int:
    if (given := quorum()) is not None:
        return given.rank
    if (cluster := apart()) is not None:
        return cluster.rank_of_all
    return int(os.environ["RANK"]) if started_by_torchrun() else 0


def local_rank() -> int:
    """Number of this process among those of its launcher on this machine; 0 without one."""
    if (given := quorum()) is not None:
        return given.rank
    if (cluster := apart()) is not None:
        return cluster.place * cluster.ranks + cluster.rank
    return int(os.environ.get("LOCAL_RANK", "0")) if started_by_torchrun() else 0


def local_size() -> int:
    """Number of processes that this one's launcher keeps on this machine, without spares; 1 without one."""
    if (given := quorum()) is not None:
        return given.size * given.group_size
    if (cluster := apart()) is not None:
        return cluster.neighbours * cluster.ranks
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if started_by_torchrun() else 1


def will_restart() -> bool:
    """True if our launcher starts this process again when it fails, or torchrun has restarts left for it."""
    if apart() is not None:
        return True
    made, most = (os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return started_by_torchrun() and int(made) < int(most)


def shares_rendezvous_store() -> bool:
    """True if torchrun started this process in the mode in which joining nodes hang."""
    return started_by_torchrun() and os.environ.get(SHARED_STORE) != "1"


def belong_to_agent() -> None:
    """Worker: name this process after its rank, and end it when the agent that started it is gone.

    Otherwise it would train on unsupervised, and keep the run directory locked when the job is started again. Raises
    WorldError if another launcher has started this process as one of several ranks.
    """
    launched = started_by_torchrun() or in_quorum() or apart() is not None
    for name in () if launched else LAUNCHERS:
        size = os.environ.get(name, "")
        if size.isdecimal() and int(size) > 1:
            raise WorldError(
                f"{name}={size}, but torchrun has not started this process: it would train alone, beside "
                f"{int(size) - 1} others.\n  On one machine: torchrun --standalone --nproc-per-node={size} -m trainer "
                f"train …\n  On each of {size} nodes: torchrun --nnodes={size} --node-rank=NODE --nproc-per-node=1 "
                "--master-addr=ADDRESS --master-port=29500 -m trainer train …"
            )
    if not launched:
        return
    if started_by_torchrun():
        _check_environment()
    name_process()
    end_with_parent()


def end_with_parent() -> None:
    """End this process, with status 1, when the one that started it is gone."""
    agent = os.getppid()
    if sys.platform == "linux":  # the kernel does it, even while this process is stopped
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    def watch() -> None:
        while os.getppid() == agent:  # an orphan gets another parent
            time.sleep(0.2)
        os._exit(EXIT_FAILED)

    threading.Thread(target=watch, name="toprope-agent", daemon=True).start()


def _check_environment() -> None:
    """Raise WorldError if a variable that torchrun sets is missing or no number."""
    numbers = {name: os.environ.get(name, "") for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")}
    wrong = [f"{name} is {value!r}" if value else f"{name} is not set" for name, value in numbers.items()
             if not value.isdecimal()]  # fmt: skip
    if not os.environ.get("MASTER_ADDR"):
        wrong.append("MASTER_ADDR is not set")
    if not wrong and int(numbers["RANK"]) >= int(numbers["WORLD_SIZE"]):
        wrong.append(f"RANK={numbers['RANK']} is not below WORLD_SIZE={numbers['WORLD_SIZE']}")
    if wrong:
        raise WorldError(
            f"TORCHELASTIC_RUN_ID says that torchrun has started this process, but {', '.join(wrong)}.\n"
            "  Start it by torchrun, or unset TORCHELASTIC_RUN_ID to train in one process."
        )


def check_mode(mode: str) -> None:
    """Raise WorldError if torchrun has started ranks that shall go on when one dies: torchrun ends them all."""
    if mode == "quorum" and started_by_torchrun():
        size = os.environ.get("WORLD_SIZE", "N")
        raise WorldError(
            'elastic.mode = "quorum" under torchrun: it ends all ranks when one dies, so none could go on.\n'
            f'  Start python -m trainer launch CONFIG --workers {size}, or set elastic.mode = "restart".'
        )


def is_loopback(host: str) -> bool:
    """True for an address that only this machine reaches. Other names may mean another address elsewhere."""
    try:
        return host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def name_process() -> None:
    """Worker: call this process "rank N", for `ps`, `top` and `launch.cluster`. Linux only."""
    with contextlib.suppress(OSError):
        Path("/proc/self/comm").write_text(f"{NAME_PREFIX}{os.environ['RANK']}", encoding="utf-8")


def make_failures_file() -> Path:
    """Launcher: make the file for `note_failures`; workers find it through the environment."""
    descriptor, name = tempfile.mkstemp(prefix=FAILURES_PREFIX, suffix=".json")
    os.close(descriptor)
    os.environ[FAILURES_FILE] = name
    return Path(name)


def failure(rank: int, pid: int, exitcode: int) -> dict[str, Any]:
    """Describe how a worker ended, with an exit code as subprocess gives it."""
    name = signal.Signals(-exitcode).name if exitcode < 0 else None
    return {"rank": rank, "pid": pid, "exitcode": exitcode, "signal": name}


def how(end: dict[str, Any]) -> str:
    return f"was ended by {end['signal']}" if end["signal"] else f"left with exit status {end['exitcode']}"


def note_failures(failures: list[dict[str, Any]], path: Path | None = None) -> None:
    """Launcher: note why workers are about to be started again; without failures it is because a node is joining.

    `path` is the failures file; default: that of the environment.
    """
    reason = ", ".join(f"rank {end['rank']} {how(end)}" for end in failures) or "a node is joining"
    with (path or Path(os.environ[FAILURES_FILE])).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"failures": failures, "reason": reason}) + "\n")


def give_up() -> None:
    """Worker: ask our launcher not to start it again, because it would end in the same error."""
    if FAILURES_FILE in os.environ:
        Path(os.environ[FAILURES_FILE]).with_suffix(".final").touch()


def note_memory(place: Path) -> None:
    """Worker: tell our launcher of a directory in this machine's memory, which it removes when the job is over."""
    if FAILURES_FILE in os.environ and os.environ.get("LOCAL_RANK", "0") == "0":
        with contextlib.suppress(OSError):
            Path(os.environ[FAILURES_FILE]).with_suffix(".memory").write_text(str(place), encoding="utf-8")


def noted_memory(failures_file: Path) -> Path | None:
    """Launcher: the directory that workers of this node have noted last; None if there is none."""
    with contextlib.suppress(OSError, ValueError):
        return Path(failures_file.with_suffix(".memory").read_text(encoding="utf-8"))
    return None


def gave_up(path: Path | None = None) -> bool:
    """Launcher: True if a worker of this node has called `give_up`. `path` as in `note_failures`."""
    return (path or Path(os.environ[FAILURES_FILE])).with_suffix(".final").exists()


def take_losses() -> list[dict[str, Any]]:
    """Worker: take the notes of `note_failures` since the last call, {failures, reason} each.

    There are several if workers died before they could call this. Only the node's first worker gets them.
    """
    if FAILURES_FILE not in os.environ or os.environ.get("LOCAL_RANK", "0") != "0":
        return []
    path = Path(os.environ[FAILURES_FILE])
    with contextlib.suppress(OSError, ValueError):
        losses = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        path.write_text("", encoding="utf-8")
        return losses
    return []
