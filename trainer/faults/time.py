"""Faults of time: ranks that hang, and ranks that are only slow."""

import signal
import threading
import time
from collections.abc import Mapping
from typing import Any, ClassVar

from trainer.config import Config, FaultEntry
from trainer.data import MicroBatch
from trainer.faults.disk import PausedWrite
from trainer.faults.fault import LINUX, STEP, Fault, Harmless, Setting
from trainer.faults.nemesis import Outside
from trainer.faults.plan import PlannedFault
from trainer.faults.process import RESTART, SignalFault
from trainer.faults.rank import RankContext
from trainer.phases import Phase

PERIOD_SECONDS = 0.2  # of a straggler's stops: far below any limit of a step


class Hang(Fault):
    group = "time"
    detected = "the watchdog: no progress within elastic.step_timeout_seconds; stacks and collective are recorded"
    recovered = f"the process ends itself; {RESTART}"
    expected_incidents = ("hung",)
    in_quorum_mode: ClassVar[Mapping[str, Any]] = {"expected_incidents": ("worker_lost",)}  # the arbiter ends it alone
    settings: ClassVar[Mapping[str, Setting]] = {"seconds": Setting(3600.0, "how long it lasts")}


class Stopped(SignalFault, Hang):
    imitates = "a process in uninterruptible sleep"
    made = "kill -STOP"
    phases = (*STEP, Phase.IN_EVAL)
    settings: ClassVar = {}
    signal_number = signal.SIGSTOP
    needs_peers = True
    stops_rank = True


class SkippedCollective(Hang):
    imitates = "ranks that disagree on what to do next"
    made = "the rank leaves out one all-reduce of its step, and waits in the next one"
    phases = (Phase.BEFORE_REDUCE,)
    settings: ClassVar = {}
    # It is unknown which of the ranks that disagree is right, and which of them gloo ends.
    expected_incidents = ("hung", "worker_lost")
    # All of them wait, so the step is tried again with the same members.
    in_quorum_mode: ClassVar[Mapping[str, Any]] = {"expected_incidents": (), "may_cause": ("worker_lost",)}
    names_rank = False
    needs_peers = True

    def refuses(self, entry: FaultEntry, phase: str, config: Config, world_size: int) -> str:
        if world_size > 1 and entry.rank != "all":
            return ""
        return "some rank must be left that waits in it.\n  Start 2 ranks or more, and name one of them."

    def obstacle(self, planned: PlannedFault, rank: RankContext) -> str:
        return "one rank alone has no collectives" if rank.world_size == 1 else ""

    def fire(self, planned: PlannedFault, rank: RankContext) -> None:
        rank.instead_of_all_reduce(lambda call: None)


class LockHeld(Hang):
    imitates = "a deadlock between threads"
    made = "the training thread waits for a lock that a thread keeps"
    phases = (*STEP, Phase.IN_EVAL)

    def fire(self, planned: PlannedFault, rank: RankContext) -> None:
        lock, held = threading.Lock(), threading.Event()

        def keep() -> None:
            with lock:
                held.set()
                time.sleep(planned.settings["seconds"])

        threading.Thread(target=keep, name="toprope-lock", daemon=True).start()
        held.wait()
        with lock:
            pass


class StalledData(Hang):
    imitates = "a file system that does not answer a read"
    made = "reading a micro-batch does not return"
    phases = (Phase.BEFORE_FORWARD,)

    def fire(self, planned: PlannedFault, rank: RankContext) -> None:
        batches = rank.batches

        def stalled(step: int, index: int) -> MicroBatch:
            del batches.__dict__["micro_batch"]  # the next read is the ordinary one again
            time.sleep(planned.settings["seconds"])
            return batches.micro_batch(step, index)

        batches.__dict__["micro_batch"] = stalled


class StalledDisk(Harmless, PausedWrite):
    group = "time"
    imitates = "a slow or overloaded storage server"
    made = "writing a shard pauses"
    detected = "no fault: the next save waits for it"
    settings: ClassVar = {"seconds": Setting(3.0, "how long the pause is")}


class SlowRank(Harmless):
    group = "time"
    imitates = "a hot or throttled device"
    made = "the rank sleeps in each of some steps"
    phases = (Phase.BEFORE_BACKWARD,)
    settings: ClassVar = {
        "seconds": Setting(0.2, "sleep per step"), "steps": Setting(5, "for so many steps", 1),
    }  # fmt: skip

    def fire(self, planned: PlannedFault, rank: RankContext) -> None:
        def sleep(phase: str, step: int) -> None:
            if phase == Phase.BEFORE_BACKWARD and rank.micro_batch == 1 and step < planned.last_step:
                time.sleep(planned.settings["seconds"])

        time.sleep(planned.settings["seconds"])
        rank.followers.append(sleep)


class Straggler(Harmless):
    group = "time"
    imitates = "a noisy neighbour on the machine"
    made = "kill -STOP and -CONT in turn"
    needs = (LINUX,)
    settings: ClassVar = {
        "seconds": Setting(3.0, "how long"), "duty": Setting(0.5, "share of the time it is stopped", most=1),
    }  # fmt: skip

    def fire_from_outside(self, planned: PlannedFault, outside: Outside, victims: Mapping[int, int]) -> None:
        send, stopped = outside.cluster.send, PERIOD_SECONDS * planned.settings["duty"]
        until = time.monotonic() + planned.settings["seconds"]
        try:
            while time.monotonic() < until and not outside.stopping.is_set():
                living = [pid for pid in victims.values() if send(pid, signal.SIGSTOP)]
                outside.wait(stopped)
                for pid in living:
                    send(pid, signal.SIGCONT)
                if not living:
                    return
                outside.wait(PERIOD_SECONDS - stopped)
        finally:
            for pid in victims.values():
                send(pid, signal.SIGCONT)
