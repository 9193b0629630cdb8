"""One rank of tests/test_hang.py: takes steps under a watchdog and, on one rank at one step, gets stuck."""

import contextlib
import ctypes
import datetime
import os
import signal
import sys
import threading
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from trainer.log.events import EventLog
from trainer.sentinel.hang import Watchdog

FAULTY_RANK, FAULTY_STEP, STEPS = 1, 5, 8
PUBLISHED_SECONDS = 0.3  # after which a rank's position is known to others, should it stop
FAILED = 3  # exit status of a rank whose collective raised


def stops_itself() -> None:
    time.sleep(PUBLISHED_SECONDS)
    os.kill(os.getpid(), signal.SIGSTOP)


def waits_for_a_lock() -> None:
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()


def reads_data_for_ever() -> None:
    time.sleep(1000)


def keeps_the_gil() -> None:
    time.sleep(PUBLISHED_SECONDS)
    ctypes.PyDLL(None).sleep(1000)


def works_without_a_sign() -> None:
    """0.6 s of work: less than the timeout, but more than what is left if time spent stopped were counted."""
    for _ in range(12):
        time.sleep(0.05)


def works_apart(dog: Watchdog, step: int) -> None:
    """Makes progress for longer than the timeout while the others wait, as where ranks are many steps apart."""
    for _ in range(12):
        time.sleep(0.2)
        dog.heartbeat("before_update", step)


# fault → (the point at which it strikes, what happens); "skip" leaves a collective out.
FAULTS = {
    "stop": ("before_reduce", stops_itself),
    "lock": ("before_backward", waits_for_a_lock),
    "data": ("before_forward", reads_data_for_ever),
    "gil": ("before_update", keeps_the_gil),
    "fsdp": ("before_forward", waits_for_a_lock),
    "skip": ("before_reduce", lambda: None),
    "slow": ("before_forward", works_without_a_sign),
    "apart": ("before_reduce", lambda: None),
    "apart, stop": ("before_reduce", stops_itself),
}


def main(run: Path, rank: int, ranks: int, timeout: float, fault: str) -> None:
    output = os.open(run / f"output-{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    store = dist.FileStore(str(run / "store"), ranks)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=datetime.timedelta(seconds=60))
    log = EventLog.open(run, 0, rank)
    dog = Watchdog(run, rank, ranks, 0, timeout, 20.0, report=log.append, meet_rarely=fault.startswith("apart"))
    dog.start()
    try:
        _steps(dog, run, rank, fault)
    except RuntimeError as error:
        print(error)
        sys.stdout.flush()
        os._exit(FAILED)
    dog.stop()
    dist.destroy_process_group()


def _steps(dog: Watchdog, run: Path, rank: int, fault: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    if fault == "fsdp":
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for module in (*model, model):
            fully_shard(module, mesh=mesh)
    where, strike = FAULTS[fault]
    for step in range(STEPS):
        is_struck = rank == FAULTY_RANK and step == FAULTY_STEP

        def hook(phase: str, step: int = step, is_struck: bool = is_struck) -> None:
            dog.heartbeat(phase, step)
            if is_struck and phase == where:
                (run / "struck").write_text(repr(time.monotonic()))
                strike()

        if is_struck and fault.startswith("apart"):
            works_apart(dog, step)
        hook("before_forward")
        output = model(torch.ones(1, 8))
        hook("before_backward")
        output.sum().backward()
        hook("before_reduce")
        if not (is_struck and fault == "skip"):
            dist.all_reduce(torch.zeros(7, 3))
        hook("before_update")
        hook("after_update")
    dog.heartbeat("after_end", STEPS)
    with contextlib.suppress(RuntimeError):
        dist.barrier()
