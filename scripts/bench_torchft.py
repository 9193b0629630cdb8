"""The job of scripts/bench_quorum.py under torchft: a lighthouse, and replicas of one process that are started again.

Runs in an environment of its own, which has torchft; toprope does not depend on it. `supervise` is the parent:

    python scripts/bench_torchft.py supervise N DIRECTORY
"""

import argparse
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from scripts.bench_survival import ENDLESS, TINY
from trainer import config as configs
from trainer import costs, job, optim
from trainer import model as models
from trainer.data import prepare
from trainer.parallel import elastic

HEARTBEAT_TIMEOUT_MS = 1000
"""torchft's default is 5000. A replica that was killed is noticed by its silence: a shorter one helps torchft."""
JOIN_TIMEOUT_MS, QUORUM_TICK_MS = 100, 20
"""Its defaults are 100 and 100."""
TIMEOUT = timedelta(seconds=10)


def supervise(replicas: int, directory: Path) -> None:
    """Start the lighthouse and the replicas; start a replica again at once when it dies. Ends by a signal."""
    elastic.end_with_parent()
    coordination = importlib.import_module("torchft.coordination")
    lighthouse = coordination.LighthouseServer(
        bind="[::]:0", min_replicas=1, join_timeout_ms=JOIN_TIMEOUT_MS, quorum_tick_ms=QUORUM_TICK_MS,
        heartbeat_timeout_ms=HEARTBEAT_TIMEOUT_MS,
    )  # fmt: skip
    environment = os.environ | {"TORCHFT_LIGHTHOUSE": lighthouse.address()}

    def start(number: int) -> "subprocess.Popen[bytes]":
        command = [sys.executable, __file__, "replica", str(replicas), str(directory), str(number)]
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)

    running = [start(number) for number in range(replicas)]
    while True:
        time.sleep(0.02)
        for number, process in enumerate(running):
            if process.poll() is not None:
                running[number] = start(number)


def replica(replicas: int, directory: Path, number: int) -> None:
    """Train as torchft's README says: each replica has its share of the micro-batches, and a failed step is lost."""
    torchft = importlib.import_module("torchft")
    elastic.end_with_parent()
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    config = configs.load(TINY, ENDLESS)
    torch.set_num_threads(1)
    prepared = prepare(config.data, config.eval, config.model.context)
    batches = job.batches_of(config, prepared)
    gpt = models.construct(config.model, costs.padded_vocab(prepared.tokenizer.vocab_size, config.model.vocab_size))
    models.initialise(gpt, config.model, config.seed)
    adamw = torch.optim.AdamW(gpt.parameters(), lr=config.optim.learning_rate, fused=True)

    def load(state: dict[str, Any]) -> None:
        gpt.load_state_dict(state["model"])
        adamw.load_state_dict(state["optimizer"])

    store = torch.distributed.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    manager = torchft.Manager(
        pg=torchft.ProcessGroupGloo(timeout=TIMEOUT), min_replica_size=1, load_state_dict=load,
        state_dict=lambda: {"model": gpt.state_dict(), "optimizer": adamw.state_dict()},
        replica_id=f"replica_{number}", store_addr="localhost", store_port=store.port, rank=0, world_size=1,
        timeout=TIMEOUT, quorum_timeout=timedelta(seconds=60), init_sync=False,
    )  # fmt: skip
    optimizer = torchft.Optimizer(manager, adamw)
    own = range(number, config.data.micro_batches, replicas)
    with (directory / "steps.jsonl").open("a", buffering=1) as log:
        while True:
            step = manager.current_step()
            for group in adamw.param_groups:
                factor = optim.learning_rate_factor(step, config.optim, config.budget.steps)
                group["lr"] = config.optim.learning_rate * factor
            optimizer.zero_grad()  # begins the quorum
            for index in own:
                batch = batches.micro_batch(step, index)
                result = gpt(torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets))
                (result.objective / len(own)).backward()
            # Not torchft's DistributedDataParallel: in 0.2.0 its hook fails an assertion after a peer's death.
            gradients = [parameter.grad for parameter in gpt.parameters() if parameter.grad is not None]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            manager.allreduce(flat).wait()
            for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
                gradient.copy_(part.view_as(gradient))
            torch.nn.utils.clip_grad_norm_(gpt.parameters(), config.optim.clip_norm)
            before = manager.current_step()
            optimizer.step()
            if manager.current_step() > before:
                quorum = manager._quorum_id
                line = [manager.current_step(), time.time(), quorum, number, os.getpid(), manager.num_participants()]
                log.write(json.dumps(line) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["supervise", "replica"])
    parser.add_argument("replicas", type=int)
    parser.add_argument("directory", type=Path)
    parser.add_argument("number", type=int, nargs="?", default=0)
    given = parser.parse_args()
    if given.part == "supervise":
        supervise(given.replicas, given.directory)
    else:
        replica(given.replicas, given.directory, given.number)


if __name__ == "__main__":
    main()
