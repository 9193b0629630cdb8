"""Faults of processes: they crash, are killed, or are asked to leave."""

import os
import resource
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from trainer.faults.fault import ANYWHERE, LINUX, STEP, Fault, Setting
from trainer.faults.nemesis import Outside
from trainer.faults.plan import PlannedFault
from trainer.faults.rank import RankContext
from trainer.phases import Phase

if TYPE_CHECKING:
    from trainer.launch.cluster import Agents

RESTART = "torchrun starts all workers again; they load the newest intact checkpoint"
PREEMPTED = (0, 75)
LOST = (0, 1, 75, 130, 137, 143)
"""Exit statuses of a job that lost a part that it needs; its user or scheduler starts it again."""
EXIT_STATUS = 3


def kill_self() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class ProcessFault(Fault):
    group = "process"
    detected = "the launcher sees the process end; peers' collectives break at once"
    recovered = RESTART
    phases = ANYWHERE
    expected_incidents = ("worker_lost",)


class SignalFault(Fault):
    """A fault made by `signal_number`: the rank sends it to itself, or the nemesis sends it to the rank."""

    def fire(self, planned: PlannedFault, rank: RankContext) -> None:
        os.kill(os.getpid(), self.signal_number)

    def fire_from_outside(self, planned: PlannedFault, outside: Outside, victims: Mapping[int, int]) -> None:
        for pid in victims.values():
            outside.cluster.send(pid, self.signal_number)


class RaisedException(ProcessFault):
    name = "exception"
    imitates = "a software bug"
    made = "an exception is raised in the training thread"
    phases = (*STEP, Phase.IN_LOAD, Phase.IN_EVAL, Phase.BEFORE_END, Phase.STARTUP)

    def in_quorum(self, phase: str) -> Fault:
        kind = super().in_quorum(phase)
        if phase == Phase.IN_REDUCE:
            # It looks like a connection that has failed: the members meet again, and nobody is lost.
            vars(kind).update(expected_incidents=(), may_cause=("worker_lost",))
        return kind

    def fire(self, planned: PlannedFault, rank: RankContext) -> None:
        raise RuntimeError(f"a fault on purpose: {planned}")


class Sigkill(SignalFault, ProcessFault):
    imitates = "the kernel's or the scheduler's kill"
    made = "the rank sends itself SIGKILL"
    signal_number = signal.SIGKILL


class Sigsegv(SignalFault, ProcessFault):
    imitates = "a driver or a library that writes where it should not"
    made = "kill -SEGV"
    signal_number = signal.SIGSEGV


class Sigabrt(SignalFault, ProcessFault):
    imitates = "an assertion of a library, NCCL's watchdog"
    made = "kill -ABRT"
    signal_number = signal.SIGABRT


class Exit(ProcessFault):
    imitates = "a library that ends the process"
    made = "os._exit(3)"

    def fire(self, planned: PlannedFault, rank: RankContext) -> None:
        os._exit(EXIT_STATUS)


class Sigterm(SignalFault, ProcessFault):
    imitates = "a scheduler's notice before it takes the machine"
    made = "kill -TERM"
    detected = "a signal handler notes it; all ranks agree at the end of the step"
    recovered = "all save and leave with 75; the same command resumes"
    phases = (*STEP, Phase.STARTUP)
    signal_number = signal.SIGTERM
    expected_incidents = ("preempted",)
    names_rank = False
    exits = PREEMPTED


class MemoryLimit(ProcessFault):
    imitates = "an allocation that fails"
    made = "RLIMIT_AS at what is in use, then an allocation"
    phases = STEP
    needs = (LINUX,)

    def fire(self, planned: PlannedFault, rank: RankContext) -> None:
        import torch

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize(), hard))
        torch.empty(2**34, dtype=torch.uint8)
        raise MemoryError("a fault on purpose: memory_limit")  # where the limit does not count


class MemoryKill(ProcessFault):
    imitates = "the kernel's out-of-memory killer"
    made = "memory is filled up to `megabytes`, then SIGKILL, as the kernel would"
    phases = STEP
    settings: ClassVar = {"megabytes": Setting(256, "how much is filled", 1)}

    def fire(self, planned: PlannedFault, rank: RankContext) -> None:
        _filled = [os.urandom(2**20) for _ in range(planned.settings["megabytes"])]
        kill_self()


class AgentKilled(ProcessFault):
    imitates = "the launcher dies"
    made = "kill -KILL of torchrun"
    detected = "each worker sees that its parent is gone"
    recovered = "the workers end; the same command resumes"
    phases = ()
    hits_agent = True
    names_rank = False
    exits = LOST

    def fire_from_outside(self, planned: PlannedFault, outside: Outside, victims: Mapping[int, int]) -> None:
        for node in outside.living_nodes():
            if set(victims.values()) & set(node.processes()):
                node.signal(signal.SIGKILL)
                return
        raise ValueError("the agent of the rank is gone already")  # noted as a problem of the nemesis


class NodeKilled(ProcessFault):
    imitates = "a machine loses power"
    made = "kill -KILL of torchrun and all its workers at once"
    phases = ()
    settings: ClassVar = {"node": Setting(-1, "which node; -1 is the last", -1, zero=True)}
    needs = (LINUX,)
    on_rank = False
    names_rank = False
    exits = LOST
    recover_seconds = 60.0

    def obstacle_outside(self, planned: PlannedFault, cluster: "Agents") -> str:
        return f"the job has {len(cluster.nodes)} nodes" if planned.settings["node"] >= len(cluster.nodes) else ""

    def fire_from_outside(self, planned: PlannedFault, outside: Outside, victims: Mapping[int, int]) -> None:
        outside.kill_node(planned.settings["node"])


class RepeatedKill(ProcessFault):
    imitates = "a fault in the middle of recovery"
    made = "kill -KILL, and again in the next starts while the checkpoint is loaded"
    phases = STEP
    settings: ClassVar = {"times": Setting(2, "deaths in a row", 2)}
    again_at = (Phase.IN_LOAD, Phase.BEFORE_FORWARD)  # the second is the first step where there is nothing to load

    def fire(self, planned: PlannedFault, rank: RankContext) -> None:
        kill_self()
