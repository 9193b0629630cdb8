"""Ranks and processes for tests/test_checkpoint.py; importing torch is the slow part, so one start runs many cases.

Usage: python -m tests.checkpoint_worker COMMAND RANK RANKS DIRECTORY. Rank r writes DIRECTORY/result-r.json.
"""

import contextlib
import datetime
import errno
import hashlib
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from tests.support import SMOKE
from trainer import checkpoint
from trainer import config as configs
from trainer.log.events import Event
from trainer.parallel.world import World

IDENTITY = {"fingerprint": "f" * 64, "run_id": "r"}
LAYOUTS = [("replicate", 1), ("fsdp", 1), ("replicate", 2), ("fsdp", 2), ("replicate", 3), ("fsdp", 3),
           ("hybrid", 4), ("fsdp", 4)]  # fmt: skip


def content(name: str, shape: torch.Size, step: int) -> Tensor:
    """The content of a tensor by its name and step, so that no test has to store it."""
    seed = int.from_bytes(hashlib.sha256(f"{name} {step}".encode()).digest()[:4], "little")
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_state(step: int | None, tensors: int = 6) -> dict[str, Tensor]:
    """Plain tensors of a step; all zero without a step."""
    shapes = {f"w{i}": torch.Size([40 + i, 8]) for i in range(tensors)} | {"scalar": torch.Size([])}
    return {n: torch.zeros(s) if step is None else content(n, s, step) for n, s in shapes.items()}


def holds(tensors: dict[str, Tensor], step: int) -> bool:
    return all(torch.equal(tensor, content(name, tensor.shape, step)) for name, tensor in tensors.items())


def reshard(rank: int, ranks: int, directory: Path) -> dict[str, Any]:
    """Save in every layout, then load each of those in every layout."""
    outcome: dict[str, Any] = {}
    phases = itertools.product(("save", "load"), LAYOUTS)
    for number, (what, (strategy, size)) in enumerate(phases):
        if rank >= size:
            continue
        with connected(rank, size, directory / f"store-{number}") as world:
            tensors = sharded_state(strategy, world)
            if what == "save":
                fill(tensors, step=7)
                outcome[f"saved {strategy} {size}"] = names(save(directory / f"{strategy}-{size}", world, 7, tensors))
            else:
                for before in LAYOUTS:
                    fill(tensors, step=0)
                    run = directory / "{}-{}".format(*before)
                    found = checkpoint.restore(run, tensors, world, IDENTITY["fingerprint"], lambda event: None)
                    right = found is not None and found.step == 7 and is_filled(tensors, 7)
                    outcome[f"{before} as {(strategy, size)}"] = right
    return outcome


def sharded_state(strategy: str, world: World) -> dict[str, Tensor]:
    from trainer import job  # imports much that the other commands do not need

    # Width 6: some tensors have fewer rows than there are ranks can share evenly, or fewer than ranks.
    small = ["model.width=6", "model.n_heads=1", "model.n_layers=1", "model.context=8"]
    settings = [f'parallel.strategy="{strategy}"', *small]
    return job.build(configs.load(SMOKE, settings), 97, world).tensors()


def fill(tensors: dict[str, Tensor], step: int) -> None:
    for name, tensor in tensors.items():
        full = content(name, tensor.shape, step)
        if isinstance(tensor, DTensor):
            full = distribute_tensor(full, tensor.device_mesh, tensor.placements, src_data_rank=None).to_local()
            tensor = tensor.to_local()
        tensor.copy_(full)


def is_filled(tensors: dict[str, Tensor], step: int) -> bool:
    before = {name: (t.to_local() if isinstance(t, DTensor) else t).clone() for name, t in tensors.items()}
    fill(tensors, step)
    return all(torch.equal(before[name], t.to_local() if isinstance(t, DTensor) else t) for name, t in tensors.items())


def failing_rank(rank: int, ranks: int, directory: Path) -> dict[str, Any]:
    """Rank 1 cannot write, then can; then a checkpoint is damaged where rank 1 reads it."""

    def hook(point: str, step: int) -> None:
        if (rank, point, step) == (1, "in_save_shard", 1):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    run = directory / "run"
    with connected(rank, ranks, directory / "store") as world:
        saver = checkpoint.Saver(run, world, IDENTITY, configs.Checkpoint(), hook)
        counts, ended = [], []
        for step in (1, 2, 3):
            saver.begin(step, small_state(step))
            counts.append(saver.failures_in_a_row)
            ended += saver.finish()
            counts.append(saver.failures_in_a_row)
        saver.close()
        if rank == 0:
            shards = sorted((run / "checkpoints" / "step-00000003").glob("*.distcp"))
            flip(shards[1])
        world.agree(lambda: None)
        reports: list[Event] = []
        tensors = small_state(None)
        found = checkpoint.restore(run, tensors, world, IDENTITY["fingerprint"], reports.append)
    return {
        "counts": counts,
        "ended": names(ended),
        "reason": getattr(ended[0], "reason", None),
        "found": found and found.step,
        "intact": holds(tensors, 2),
        "reports": [vars(report) for report in reports],
    }


def dying_peer(rank: int, ranks: int, directory: Path) -> dict[str, Any]:
    return lost_peer(rank, ranks, directory, signal.SIGKILL)


def stopped_peer(rank: int, ranks: int, directory: Path) -> dict[str, Any]:
    return lost_peer(rank, ranks, directory, signal.SIGSTOP)


def lost_peer(rank: int, ranks: int, directory: Path, how: signal.Signals) -> dict[str, Any]:
    def hook(point: str, step: int) -> None:
        if (rank, point, step) == (1, "in_save_shard", 2):
            os.kill(os.getpid(), how)

    took: dict[str, float] = {}
    with connected(rank, ranks, directory / "store") as world:
        saver = checkpoint.Saver(directory / "run", world, IDENTITY, configs.Checkpoint(), hook)
        ended = []
        for step in (1, 2) if how == signal.SIGSTOP else (1, 2, 3):
            with timed(took, f"begin {step}"):
                saver.begin(step, small_state(step))
            if how == signal.SIGKILL:
                ended += saver.finish()
        with timed(took, "close"):
            saver.close(grace_seconds=0.5)
        ended += saver.poll()
    return {"took": took, "ended": names(ended), "reason": getattr(ended[-1], "reason", None)}


def killed(rank: int, ranks: int, directory: Path) -> dict[str, Any]:
    """One forked process per point of a save, which dies there in its second save, and one that replaces a step."""
    for point, second in itertools.product(("in_save_shard", "before_commit", "after_commit"), (2, 1)):
        child = os.fork()
        if child == 0:
            die_at(directory / f"{point}-{second}", point, second)
        os.waitpid(child, 0)
    return {}


def die_at(run: Path, point: str, second: int) -> None:
    saves = itertools.count()

    def hook(here: str, step: int) -> None:
        if here == point and next(saves) == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    run.mkdir()
    saver = checkpoint.Saver(run, World(0, 1, torch.device("cpu")), IDENTITY, configs.Checkpoint(keep_last=1), hook)
    for step in (1, second):
        saver.begin(step, small_state(step))
        saver.finish()
    os._exit(1)


def save(run: Path, world: World, step: int, tensors: dict[str, Tensor]) -> list[Event]:
    if world.is_main:
        run.mkdir(exist_ok=True)
    saver = checkpoint.Saver(run, world, IDENTITY, configs.Checkpoint())
    saver.begin(step, tensors)
    ended = saver.finish()
    saver.close()
    return ended


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def names(ended: list[Event]) -> list[str]:
    return [type(event).__name__ for event in ended]


@contextlib.contextmanager
def timed(into: dict[str, float], what: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    into[what] = time.monotonic() - started


@contextlib.contextmanager
def connected(rank: int, ranks: int, store: Path) -> Iterator[World]:
    timeout = datetime.timedelta(seconds=60)
    dist.init_process_group(
        "gloo", store=dist.FileStore(str(store), ranks), rank=rank, world_size=ranks, timeout=timeout
    )
    try:
        yield World(rank, ranks, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


COMMANDS: dict[str, Callable[[int, int, Path], dict[str, Any]]] = {
    command.__name__: command for command in (reshard, failing_rank, dying_peer, stopped_peer, killed)
}


def main() -> None:
    command, rank, ranks, directory = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    outcome = COMMANDS[command](rank, ranks, directory)
    (directory / f"result-{rank}.json").write_text(json.dumps(outcome))


if __name__ == "__main__":
    main()
