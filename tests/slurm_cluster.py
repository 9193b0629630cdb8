"""A real Slurm of three nodes on this machine: munged, slurmctld and three slurmd, in a temporary folder.

Nothing of it outlives the cluster, and no Slurm of this machine is touched: SLURM_CONF names this one.
"""

import contextlib
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import pytest

from tests.support import wait_until
from trainer.launch import processes

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "squeue", "scontrol", "srun")
NODES = ("n1", "n2", "n3")
CONFIG = """
ClusterName=toprope
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
CredType=cred/munge
SlurmUser=root
StateSaveLocation={directory}/state
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd-%n.pid
SlurmdSpoolDir={directory}/spool-%n
SlurmctldLogFile={directory}/slurmctld.log
SlurmdLogFile={directory}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0,sched_min_interval=100000,bf_continue
JobRequeue=1
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldTimeout=10
SlurmdTimeout=6
MessageTimeout=5
KillWait=5
InactiveLimit=0
CompleteWait=0
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
{nodes}
PartitionName=usual Nodes=n[1-3] Default=YES State=UP PriorityTier=1 PreemptMode=REQUEUE GraceTime=30 MaxTime=60
PartitionName=urgent Nodes=n[1-3] State=UP PriorityTier=9 PreemptMode=OFF
"""


def missing() -> str:
    """Reason why no Slurm can be started here; "" if one can."""
    if sys.platform != "linux" or os.geteuid():
        return "only root starts a Slurm of its own, on Linux"
    absent = [name for name in PROGRAMS if shutil.which(name, path=os.environ["PATH"] + ":/usr/sbin:/sbin") is None]
    return f"{', '.join(absent)} not found: apt-get install slurm-wlm munge" if absent else ""


class SlurmCluster:
    """The cluster. Its commands find it by SLURM_CONF in the environment."""

    def __init__(self, directory: Path) -> None:
        self.directory, self.config = directory, directory / "slurm.conf"
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        for name in ("state", *(f"spool-{node}" for node in NODES)):
            (directory / name).mkdir()
        host, ports = socket.gethostname(), _free_ports(1 + len(NODES))
        lines = [
            f"NodeName={node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 State=UNKNOWN"
            for node, port in zip(NODES, ports[1:], strict=True)
        ]
        self.config.write_text(CONFIG.format(host=host, port=ports[0], directory=directory, nodes="\n".join(lines)))

    def start(self) -> None:
        directory = self.directory
        key = directory / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        self._start(
            "munged", "--foreground", "--force", f"--key-file={key}", f"--socket={directory}/munge.socket",
            f"--pid-file={directory}/munge.pid", f"--log-file={directory}/munge.log",
            f"--seed-file={directory}/munge.seed",
        )  # fmt: skip
        self.wait_for((directory / "munge.socket").exists, 10, "munged")
        self.start_controller()
        for node in NODES:
            self.start_node(node)
        self.wait_for(lambda: set(self.nodes().values()) == {"idle"}, 30, "idle nodes")

    def start_controller(self) -> None:
        self._start("slurmctld", "-D", "-i")

    def start_node(self, node: str) -> None:
        self._start("slurmd", "-D", "-N", node, name=node)

    def stop_controller(self) -> None:
        self._running["slurmctld"].terminate()
        self._running.pop("slurmctld").wait(20)

    def kill_node(self, node: str) -> None:
        """End a node as a power cut does: its daemon, what supervises its tasks, and the tasks."""
        daemon = self._running.pop(node)
        daemon.send_signal(signal.SIGSTOP)  # it must not report what dies before it
        tasks = processes.with_environment(f"SLURMD_NODENAME={node}")
        supervisors = {int(stat[1]) for pid in tasks if (stat := processes.stat(pid))}
        supervisors = {pid for pid in supervisors if processes.name(pid) == "slurmstepd"}
        for pid in [*supervisors, *tasks]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        daemon.kill()
        daemon.wait(10)

    def stop(self) -> None:
        for node in NODES:
            if node in self._running:
                self.kill_node(node)
        for process in self._running.values():
            process.kill()
            process.wait(10)
        self._running.clear()

    def call(self, *command: str) -> str:
        """Output of one of Slurm's commands; empty while the controller does not answer."""
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=self.environment, timeout=30)
        return done.stdout.strip()

    def nodes(self) -> dict[str, str]:
        """{node: state}"""
        listed = self.call("sinfo", "--noheader", "--Node", "--partition=usual", "--format=%N %T").splitlines()
        return dict(line.split() for line in listed)

    @property
    def environment(self) -> Mapping[str, str]:
        return os.environ | {"SLURM_CONF": str(self.config), "PATH": os.environ["PATH"] + ":/usr/sbin:/sbin"}

    def state(self, job: str) -> str:
        """State of a job, also of one that has ended."""
        found = self.call("scontrol", "show", "job", "--oneliner", job)
        return found.partition("JobState=")[2].partition(" ")[0]

    def wait_for(self, condition: Callable[[], object], seconds: float, what: str) -> None:
        """Wait for a condition. Raises AssertionError, with the ends of all logs, if it does not come true."""
        if not wait_until(condition, seconds):
            logs = [f"--- {log.name}\n{log.read_text()[-1500:]}" for log in sorted(self.directory.glob("*.log"))]
            queue = self.call("squeue", "--long")
            raise AssertionError("\n".join([f"no {what} after {seconds} s", str(self.nodes()), queue, *logs]))

    def _start(self, *command: str, name: str = "") -> None:
        program = shutil.which(command[0], path=self.environment["PATH"])
        assert program is not None
        # The kernel ends it with this process, also where no `finally` is reached.
        tied = ["setpriv", "--pdeathsig", "KILL"] if shutil.which("setpriv") else []
        with (self.directory / f"{name or command[0]}.out").open("ab") as output:
            self._running[name or command[0]] = subprocess.Popen(
                [*tied, program, *command[1:]], stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                env=self.environment, start_new_session=True,
            )  # fmt: skip


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [probe.getsockname()[1] for probe in probes]


@contextlib.contextmanager
def cluster(directory: Path) -> Iterator[SlurmCluster]:
    """A running cluster whose commands this process and its children use. Skips the test where there can be none."""
    if reason := missing():
        pytest.skip(reason)
    made = SlurmCluster(directory)
    with pytest.MonkeyPatch.context() as patch:
        try:
            made.start()
            for name in ("SLURM_CONF", "PATH"):
                patch.setenv(name, made.environment[name])
            yield made
        finally:
            made.stop()
