"""The ranks of a job: rank, device, process group, the one primitive by which ranks agree (`World.agree`), and those
that take part in a step (`AllRanks`).

Ranks are interchangeable. Nothing here may change what is computed, only where.
"""

import datetime
import os
import socket
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.config import Parallel
from trainer.errors import EXIT_FAILED, TopropeError, WorldError
from trainer.parallel import elastic
from trainer.parallel.partial import PartialSums

T = TypeVar("T")
IN_PROGRESS = ...
"""Sent by a rank that is still computing what the others wait for. Ellipsis stays one object when it is pickled."""


@dataclass(frozen=True)
class World:
    """A group of ranks, as one of them sees it."""

    rank: int
    size: int
    device: torch.device
    group: dist.ProcessGroup | None = None
    """None: torch's default group, all ranks of the job."""

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def assign_micro_batches(self, count: int) -> Iterator[int | None]:
        """Yield this rank's share of `count` items, dealt out in turn; None in a round with nothing left for it.

        All ranks get the same number of rounds: collectives inside the model (FSDP's all-gathers) need every rank.
        """
        for start in range(0, count, self.size):
            yield start + self.rank if start + self.rank < count else None

    def max(self, tensor: Tensor) -> None:
        """Elementwise maximum over ranks, in place. Must hold no NaN: the maximum with one is undefined."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)

    def sum(self, tensor: Tensor) -> None:
        """Elementwise sum over ranks, in place. The caller makes it exact."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.SUM, group=self.group)

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """Overwrite a tensor, in place, with that of rank `source`."""
        if self.size > 1:
            dist.broadcast(tensor, group=self.group, group_src=source)

    def agree(self, compute: Callable[[], T], waiting: Callable[[], None] = lambda: None) -> list[T]:
        """Every rank computes; return every rank's value, by rank, or raise the first rank's TopropeError on all.

        No rank is left waiting for one that has failed. A rank that takes long calls `report_progress` in its
        `compute`; the ranks that wait for it then call `waiting`.
        """
        try:
            own: Any = compute()
        except TopropeError as error:
            own = error
        values = self._exchange(own)
        while any(value is IN_PROGRESS for value in values):
            waiting()
            values = self._exchange(own)
        for value in values:
            if isinstance(value, TopropeError):
                raise value
        return values

    def from_main(self, compute: Callable[[], T], waiting: Callable[[], None] = lambda: None) -> T:
        """Only rank 0 computes; return its value on all ranks, or raise its TopropeError on all. See `agree`."""
        return self.agree(compute if self.is_main else lambda: None, waiting)[0]  # pyright: ignore[reportReturnType]

    def report_progress(self) -> None:
        """Inside the `compute` of `agree`: show the ranks that wait that this one makes progress."""
        self._exchange(IN_PROGRESS)

    def _exchange(self, mine: Any) -> list[Any]:
        values = [mine] * self.size
        if self.size > 1:
            dist.all_gather_object(values, mine, group=self.group)
        return values


@dataclass(frozen=True)
class StepMembers:
    """The ranks that compute a step together, and what they compute."""

    world: World
    """The members, as this rank sees them; reductions go over its group."""
    micro_batches: Sequence[int]
    own: Sequence[int] | None = None
    """This rank's share of a step that was interrupted, beside what is in `partial`. None: dealt out in turn."""
    partial: PartialSums | None = None
    """Sums of this rank that outlive a reduction that fails; None where a lost rank ends the attempt."""

    def own_micro_batches(self) -> list[int | None]:
        """This rank's share, one entry a round; None where it has nothing to compute in that round."""
        if self.own is not None:
            return list(self.own)
        rounds = self.world.assign_micro_batches(len(self.micro_batches))
        return [None if position is None else self.micro_batches[position] for position in rounds]

    def anew(self) -> "StepMembers":
        """The same for another pass over the step: from nothing, and every micro-batch is computed."""
        if self.partial is not None:
            self.partial.forget()
        return replace(self, own=None, partial=None)


class Members(Protocol):
    """Ranks that take part in a step: a value of the step and not of the job."""

    @property
    def world(self) -> World:
        """The ranks between two steps: for decisions, evaluation and checkpoints."""
        ...

    def meet(self, state: Any) -> bool:
        """Bring the members together, with the newest state on all of them. Collective; first at the start.

        Returns True if `state` is a step's whose evaluation and save may not be done.
        """
        ...

    def commit(self, step: int, compute: Callable[[StepMembers], T]) -> T:
        """Have a step computed by its members. Return the result, the same on all of them. Collective."""
        ...

    def applied(self, step: int, change: bool) -> None:
        """The members have applied a step; `change`: they have agreed to let another one join now."""
        ...

    def once(self, name: str, act: Callable[[], None]) -> None:
        """Do what follows a step, unless it was done before the members changed. Collective."""
        ...

    def outlive(self, error: BaseException) -> bool:
        """True if this error means that the members have changed: after `meet`, they go on."""
        ...


@dataclass(frozen=True)
class AllRanks:
    """All ranks of the job take part in every step; a rank that is lost ends the attempt.

    The members are a value of the step and not of the job, because any set of ranks may compute it, with the same bits.
    """

    world: World
    micro_batches: int
    """Number of micro-batches in a step."""

    def meet(self, state: Any) -> bool:
        return False

    def commit(self, step: int, compute: Callable[[StepMembers], T]) -> T:
        # A lost rank makes the reductions inside `compute` raise on the others, so what returns is complete.
        return compute(StepMembers(self.world, range(self.micro_batches)))

    def applied(self, step: int, change: bool) -> None:
        pass

    def once(self, name: str, act: Callable[[], None]) -> None:
        act()

    def outlive(self, error: BaseException) -> bool:
        return False


class PeerLostError(RuntimeError):
    """Another rank is lost. Raised if this was detected outside a collective of training."""


CONNECT_SECONDS = 60.0
"""Time for all started ranks to connect: a node may die while the others wait for it."""


def connect(device: torch.device, timeout_seconds: float, share_gpus: bool = False) -> World:
    """Join the process group that torchrun describes in the environment; without torchrun, a group of one.

    `timeout_seconds` is that of collectives. With `share_gpus` they go over gloo, since NCCL wants a GPU for each rank.
    If some ranks have not come after CONNECT_SECONDS, the process exits with status 1, so that torchrun starts all
    ranks again.
    """
    # The Flight Recorder names a hung collective; the last few entries are enough and quick to dump.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "256")
    timeout = datetime.timedelta(seconds=timeout_seconds)
    store: dist.Store = dist.HashStore()
    if (apart := elastic.apart()) is not None:  # a cluster of islands that lives apart has a group of its own
        rank, size = apart.rank, apart.ranks
        if size > 1:
            store = dist.FileStore(str(Path(apart.meeting) / "store"), size)
    else:
        rank, size = elastic.expected_rank(), elastic.expected_size()
    if elastic.started_by_torchrun():
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            # torch's own set-up would wait for missing ranks for as long as a collective may take.
            seconds = datetime.timedelta(seconds=CONNECT_SECONDS)
            store = open_store(host, port, size, rank == 0 and not of_agent, seconds)
        except (dist.DistStoreError, dist.DistNetworkError) as error:
            what = str(error).splitlines()[0]
            print(f"rank {rank} could not meet the others at {host}:{port}: {what}", file=sys.stderr, flush=True)
            raise SystemExit(EXIT_FAILED) from None
        store.set_timeout(timeout)
        if of_agent:  # it still holds what the ranks of earlier attempts told each other
            store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    dist.init_process_group(backend(device, share_gpus), store=store, rank=rank, world_size=size, timeout=timeout)
    return World(dist.get_rank(), dist.get_world_size(), device)


def backend(device: torch.device, share_gpus: bool) -> str:
    """Name of torch's back ends for a group. NCCL wants a GPU for each rank."""
    if device.type != "cuda":
        return "gloo"
    return f"cpu:gloo,cuda:{'gloo' if share_gpus else 'nccl'}"


hosted_stores: list[dist.TCPStore] = []
"""Stores that this process serves to others."""


def open_store(
    host: str, port: int, world_size: int | None = None, is_master: bool = False,
    timeout: datetime.timedelta = datetime.timedelta(seconds=CONNECT_SECONDS), *, wait_for_workers: bool = True,
    multi_tenant: bool = False, alone: bool = False,
) -> dist.TCPStore:  # fmt: skip
    """torch's TCPStore, but a server at a loopback address, or with `alone`, listens at that address and no other."""
    descriptor = None
    if is_master and (alone or elastic.is_loopback(host)):
        try:
            with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET) as own:
                port, descriptor = own.getsockname()[1], os.dup(own.fileno())  # the store closes what it is given
        except OSError as error:
            raise dist.DistNetworkError(f"{host}:{port} cannot be listened at: {error.strerror}") from None
    shared = multi_tenant and descriptor is None
    store = dist.TCPStore(host, port, world_size, is_master, timeout, wait_for_workers, shared, descriptor)
    if is_master:
        hosted_stores.append(store)
    return store


def lost_peer(error: BaseException) -> bool:
    """True if a collective failed because another rank is gone, so that this rank is not to blame."""
    if isinstance(error, PeerLostError | dist.DistNetworkError | dist.DistBackendError):
        return True
    # gloo and NCCL raise plain RuntimeErrors; only the text says that they come from a collective.
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in ("gloo", "Connection closed", "NCCL"))


def disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def pick_device(parallel: Parallel) -> torch.device:
    """Return the device this process trains on; all ranks of a machine choose alike. Spares need GPUs too.

    Raises WorldError if CUDA is asked for and there is none, or not for every rank.
    """
    gpus = _gpus(parallel)
    if parallel.device == "cuda" and not gpus:
        build = "" if torch.backends.cuda.is_built() else f" ({torch.__version__} is a build without CUDA)"
        raise WorldError(
            f'parallel.device = "cuda", but torch sees no CUDA device on this machine{build}.\n'
            '  Set parallel.device = "cpu" (or "auto", which takes what is there), or install a CUDA build of torch.'
        )
    rank, size = elastic.local_rank(), elastic.local_size()
    if not gpus or (parallel.device == "auto" and not parallel.share_gpus and size > gpus):
        return torch.device("cpu")
    if parallel.share_gpus:
        return torch.device("cuda", rank % gpus)
    if max(rank + 1, size) > gpus:
        raise WorldError(
            f"local rank {rank if rank >= gpus else size - 1} has no GPU of its own: this machine has {gpus}.\n"
            f"  Every rank takes one. Start at most {gpus} processes on this node, spares included, or set "
            "parallel.share_gpus = true."
        )
    return torch.device("cuda", rank)


def unused_gpus(parallel: Parallel) -> str:
    """Return a notice if this machine has GPUs, but too few for `parallel.device = "auto"` to use them."""
    gpus, size = _gpus(parallel), elastic.local_size()
    if not gpus or pick_device(parallel).type == "cuda":
        return ""
    return (
        f'parallel.device = "auto": {size} ranks on a machine with {gpus} GPU{"s" * (gpus > 1)} train on the CPU. For '
        f"the GPU{'s' * (gpus > 1)} start {gpus} here, or set parallel.share_gpus = true."
    )


def _gpus(parallel: Parallel) -> int:
    """Number of GPUs that this process may use."""
    return torch.cuda.device_count() if parallel.device != "cpu" and torch.cuda.is_available() else 0
