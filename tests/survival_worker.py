"""One rank of a run with faults on purpose: -m tests.survival_worker PLAN.json CONFIG --run RUN [--set KEY=VALUE …]

The plan is a list of faults, each {point, action} and, as wanted: rank (any), step (any), nth (which time this rank
passes there in its process, from 0), pause (seconds before the action), turn (so many faults must have fired before
this process began), seconds, bytes, where, lasting. Points are those of the run itself (trainer/step.py, checkpoint)
and, seen from outside, START, in_data, in_forward, in_backward, in_update, before_end and leaving. A fault that is not
lasting fires once in the life of its plan, so a rank that is started again passes it by; `fired` tells which did.
"""

import functools
import json
import os
import resource
import signal
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch.nn.modules.module import register_module_forward_hook
from torch.optim.optimizer import register_optimizer_step_post_hook

from trainer import cli, job
from trainer.checkpoint import streams
from trainer.parallel import elastic
from trainer.step import TrainState

SIGNALS = {
    "kill": signal.SIGKILL, "segv": signal.SIGSEGV, "abort": signal.SIGABRT, "stop": signal.SIGSTOP,
    "term": signal.SIGTERM, "usr1": signal.SIGUSR1,
}  # fmt: skip
FSYNC = os.fsync


def marks(plan: Path) -> Path:
    return plan.with_suffix(".fired")


class Faults:
    """Does what the plan says when this rank passes its points."""

    def __init__(self, plan: Path, rank: int) -> None:
        self._marks, self._rank = marks(plan), rank
        self._faults: list[dict[str, Any]] = json.loads(plan.read_text(encoding="utf-8"))
        self._passed: Counter[int] = Counter()
        self._step = 0
        self._poison: str | None = None
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # nobody wants 200 core dumps
        self._marks.mkdir(exist_ok=True)
        self._turn = len(list(self._marks.iterdir()))
        self._wrap()

    def __call__(self, point: str, step: int) -> None:
        if point == "before_forward":
            self._step = step
        for index, fault in enumerate(self._faults):
            if fault["point"] != point or fault.get("rank") not in (None, self._rank):
                continue
            if fault.get("step") not in (None, step) or fault.get("turn", 0) > self._turn:
                continue
            self._passed[index] += 1
            if fault.get("lasting"):
                if self._passed[index] % fault.get("every", 1) == fault.get("nth", 0) % fault.get("every", 1):
                    self._act(fault)
            elif self._passed[index] == fault.get("nth", 0) + 1 and self._first(index, point, step):
                self._act(fault)

    def _first(self, index: int, point: str, step: int) -> bool:
        """Whether nobody fired this fault before, in whatever attempt; says so for all to come."""
        try:
            with (self._marks / str(index)).open("x") as mark:
                mark.write(json.dumps({"rank": self._rank, "point": point, "step": step, "time": time.time()}))
        except FileExistsError:
            return False
        return True

    def _act(self, fault: dict[str, Any]) -> None:
        action = fault["action"]
        time.sleep(fault.get("pause", 0))
        if action in SIGNALS:
            os.kill(os.getpid(), SIGNALS[action])
        elif action == "exit":
            os._exit(3)
        elif action == "exception":
            raise RuntimeError("a fault on purpose")
        elif action == "sleep":
            time.sleep(fault["seconds"])
        elif action == "limit_files":  # a disk that is full for large files: the log still fits
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], resource.RLIM_INFINITY))
        elif action == "unlimit_files":
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        elif action == "slow_disk":  # it takes so long for every 16 kB, and the system keeps none of them for later
            streams._HashingStream._CHUNK = streams._HashingStream._SYNCED = 2**14
            os.fsync = lambda file: (time.sleep(fault["seconds"]), FSYNC(file))[1]
        elif action == "fast_disk":
            os.fsync = FSYNC
        elif action == "nan":
            self._poison = fault.get("where", "output")
        else:
            raise ValueError(action)

    def _wrap(self) -> None:
        """Make the places that have no named point of their own known, where the plan asks for them."""
        points = {fault["point"] for fault in self._faults}
        if points & {"in_forward", "in_backward"} or any(fault["action"] == "nan" for fault in self._faults):
            register_module_forward_hook(self._after_module)
        if "in_update" in points:
            register_optimizer_step_post_hook(lambda *_: self("in_update", self._step))
        if "before_end" in points:
            hashed = TrainState.weights_sha256
            # pyright knows that methods are not for assigning to
            setattr(TrainState, "weights_sha256", lambda state: (self("before_end", state.step), hashed(state))[1])  # noqa: B010
        if "in_data" in points:
            prepare = job.prepare
            job.prepare = lambda *arguments, **more: (self._in_data(**more), prepare(*arguments, **more))[1]
        if "leaving" in points:
            leave = job.world.disconnect
            job.world.disconnect = lambda: (self("leaving", 0), leave())[1]

    def _in_data(self, progress: Any, verify: bool = False) -> None:
        """A long preparation by rank 0, which gets on."""
        for _ in range(30 if verify else 0):
            progress("pretending to prepare", 0, None)
            self("in_data", 0)

    def _after_module(self, module: torch.nn.Module, _arguments: Any, output: Any) -> Any:
        if type(module).__name__ != "MLP":
            return None
        self("in_forward", self._step)
        poison, self._poison = self._poison, None
        if poison == "output":
            return output * float("nan")
        if output.requires_grad:
            output.register_hook(functools.partial(self._in_backward, poison))
        return None

    def _in_backward(self, poison: str | None, gradient: torch.Tensor) -> torch.Tensor | None:
        self("in_backward", self._step)
        return {None: None, "gradient": gradient * float("nan"), "spike": gradient * 2.0**40}[poison]


def main() -> None:
    faults = Faults(Path(sys.argv.pop(1)), elastic.expected_rank())
    faults("START", 0)
    job.train = functools.partial(job.train, inject=faults)
    sys.argv[1:1] = ["train"]
    cli.main()


if __name__ == "__main__":
    main()
