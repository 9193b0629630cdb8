"""Who computes: rank, device, mesh, sharding of a model over ranks, and agreement between ranks.

Ranks are interchangeable hands. Nothing here may change what is computed, only where.
"""

import datetime
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from trainer.config import Parallel
from trainer.errors import EXIT_FAILED, TopropeError, WorldError
from trainer.parallel import elastic

T = TypeVar("T")
Rounder = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class World:
    """One rank's view of all ranks."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def assign_micro_batches(self, count: int) -> Iterator[int | None]:
        """This rank's share of `count` items, dealt out in turn, one a round; None in a round with nothing left.

        All ranks get the same number of rounds: collectives inside the model (FSDP's all-gathers) need every rank.
        """
        for start in range(0, count, self.size):
            yield start + self.rank if start + self.rank < count else None

    def max(self, tensor: Tensor) -> None:
        """In-place elementwise maximum over ranks. No NaN, please: what a maximum does with one is undefined."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MAX)

    def sum(self, tensor: Tensor) -> None:
        """In-place elementwise sum over ranks. It is the caller who makes it exact."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.SUM)

    def barrier(self) -> None:
        if self.size > 1:
            dist.barrier()

    def gather(self, value: T) -> list[T]:
        """Every rank's value, by rank, on every rank."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def from_main(self, compute: Callable[[], T], waiting: Callable[[], None] = lambda: None) -> T:
        """Rank 0 computes, all ranks return its value, or raise its error: no rank is left waiting for a dead one.

        The others call `waiting` whenever `compute` calls `report_progress`.
        """
        outcome: Any = None
        if self.is_main:
            try:
                outcome = compute()
            except TopropeError as error:
                outcome = error
        while (outcome := self._tell(outcome)) is Ellipsis:
            waiting()
        if isinstance(outcome, TopropeError):
            raise outcome
        return outcome

    def report_progress(self) -> None:
        """Rank 0, inside `from_main`: tell the others, who wait for its result."""
        self._tell(Ellipsis)

    def _tell(self, value: Any) -> Any:
        """Rank 0's value, on all ranks."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0)
        return values[0]


class PeerLostError(RuntimeError):
    """Another rank is gone, noticed elsewhere than in a collective of training."""


CONNECT_SECONDS = 60.0
"""For all ranks to be there, once each has been started: a node may die while the others wait for it."""


def connect(device: torch.device, timeout_seconds: float) -> World:
    """Join the process group that torchrun describes in the environment; without torchrun, a group of one.

    `timeout_seconds` is that of collectives. Leaves with status 1, so that torchrun starts all ranks again, if some
    have not come after CONNECT_SECONDS.
    """
    # The Flight Recorder names a hung collective; the last few are enough and quick to dump.
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE", "256")
    timeout = datetime.timedelta(seconds=timeout_seconds)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if elastic.started_by_torchrun():
        try:
            store, rank, size = next(dist.rendezvous("env://", timeout=datetime.timedelta(seconds=CONNECT_SECONDS)))
        except (dist.DistStoreError, dist.DistNetworkError) as error:
            print(f"rank {elastic.expected_rank()} could not meet the others: {error}", file=sys.stderr, flush=True)
            raise SystemExit(EXIT_FAILED) from None
        store.set_timeout(timeout)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return World(dist.get_rank(), dist.get_world_size(), device)


def lost_peer(error: BaseException) -> bool:
    """Whether a collective failed because another rank is gone, which is that rank's fault and not this one's."""
    if isinstance(error, PeerLostError | dist.DistNetworkError | dist.DistBackendError):
        return True
    text = str(error)
    return isinstance(error, RuntimeError) and any(sign in text for sign in ("gloo", "Connection closed", "NCCL"))


def disconnect() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def pick_device(parallel: Parallel) -> torch.device:
    """The device this process trains on. Raises WorldError where CUDA is asked for and there is none."""
    available = torch.cuda.is_available()
    if parallel.device == "cuda" and not available:
        raise WorldError(
            'parallel.device = "cuda", but torch sees no CUDA device on this machine.\n'
            '  Set parallel.device = "cpu" (or "auto", which takes what is there), or install a CUDA build of torch.'
        )
    if parallel.device == "cpu" or not available:
        return torch.device("cpu")
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if local_rank >= torch.cuda.device_count():
        raise WorldError(
            f"local rank {local_rank} has no GPU of its own: this machine has {torch.cuda.device_count()}.\n"
            "  Every rank takes one. Start fewer processes on this node."
        )
    return torch.device("cuda", local_rank)


class Sharding(Protocol):
    """How a model's parameters and gradients lie on the ranks."""

    parameters: dict[str, nn.Parameter]
    """By full name, what the optimizer sees: plain tensors, or DTensors that hold this rank's rows."""
    needs_lockstep: bool
    """Whether a forward pass is a collective, so that ranks without work must run along."""

    def round_with(self, rounder_of: Callable[[str], Rounder]) -> None:
        """Pass each parameter's gradient of each micro-batch (full shape) through its rounder before it is added."""
        ...

    def zero_gradients(self) -> None: ...

    def last_micro_batch(self, is_last: bool) -> None:
        """Told before each backward pass; lets gradients be reduced once a step where the strategy can."""
        ...

    def reduce_gradients(self) -> None:
        """After all micro-batches: make `gradients()` the sums over all ranks."""
        ...

    def gradients(self) -> Iterator[tuple[str, Tensor, slice]]:
        """(name, this rank's part of the gradient, which rows of the full parameter that is)."""
        ...

    def sum_over_shards(self, tensor: Tensor) -> None:
        """In-place sum over the ranks that together hold one copy of the gradients."""
        ...


def shard(model: nn.Module, blocks: Sequence[nn.Module], parallel: Parallel, world: World) -> Sharding:
    """Distribute a model, already on its device and alike on all ranks, as the strategy says."""
    if parallel.strategy == "replicate":
        return Replicated(model, world)
    return Sharded(model, blocks, parallel, world)


class Replicated:
    """Every rank holds everything; gradients live in one flat buffer, so that a step needs one all-reduce."""

    needs_lockstep = False

    def __init__(self, model: nn.Module, world: World) -> None:
        self.parameters = dict(model.named_parameters())
        self._world = world
        sizes = [parameter.numel() for parameter in self.parameters.values()]
        self._flat = torch.zeros(sum(sizes), device=world.device)
        for parameter, part in zip(self.parameters.values(), self._flat.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)  # autograd then accumulates in place

    def round_with(self, rounder_of: Callable[[str], Rounder]) -> None:
        for name, parameter in self.parameters.items():
            parameter.register_hook(rounder_of(name))

    def zero_gradients(self) -> None:
        self._flat.zero_()

    def last_micro_batch(self, is_last: bool) -> None:
        pass

    def reduce_gradients(self) -> None:
        self._world.sum(self._flat)

    def gradients(self) -> Iterator[tuple[str, Tensor, slice]]:
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None
            yield name, parameter.grad, slice(0, parameter.shape[0])

    def sum_over_shards(self, tensor: Tensor) -> None:
        pass


class Sharded:
    """FSDP2: rows of every parameter are spread over ranks (or, hybrid, over `shard_ranks` of them, replicated).

    Gradients are rounded when they are still whole, before the reduce-scatter of each micro-batch, so that what FSDP2
    adds, in whatever order, is on the grid. A world of one skips the reduce-scatter; the rounding is the same.
    """

    needs_lockstep = True

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module], parallel: Parallel, world: World) -> None:
        if parallel.strategy == "hybrid":
            shape = (world.size // parallel.shard_ranks, parallel.shard_ranks)
            mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=("replica", "shard"))
            self._shard_mesh = mesh["shard"]
        else:
            mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
            self._shard_mesh = mesh
        for module in (*blocks, model):
            fully_shard(module, mesh=mesh, reshard_after_forward=parallel.reshard_after_forward and module is not model)
        self._model = model
        self._units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for unit in self._units:
            unit.set_gradient_divide_factor(1.0)  # a mean over ranks would depend on how many there are
            unit.set_force_sum_reduction_for_comms(True)
        self.parameters = dict(model.named_parameters())
        self._rows = {name: self._own_rows(parameter.shape[0]) for name, parameter in self.parameters.items()}

    def round_with(self, rounder_of: Callable[[str], Rounder]) -> None:
        # FSDP2 makes each whole parameter once and only frees and refills its storage, so a hook on it stays.
        for unit in self._units:
            unit.unshard()
        for name, whole in self._model.named_parameters():
            whole.register_hook(rounder_of(name))
        for unit in self._units:
            unit.reshard()

    def zero_gradients(self) -> None:
        for parameter in self.parameters.values():
            parameter.grad = None

    def last_micro_batch(self, is_last: bool) -> None:
        for unit in self._units:
            unit.set_requires_all_reduce(is_last, recurse=False)

    def reduce_gradients(self) -> None:
        pass  # every backward pass has done it

    def gradients(self) -> Iterator[tuple[str, Tensor, slice]]:
        for name, parameter in self.parameters.items():
            assert isinstance(parameter.grad, DTensor)
            yield name, parameter.grad.to_local(), self._rows[name]

    def sum_over_shards(self, tensor: Tensor) -> None:
        if self._shard_mesh.size() > 1:
            dist.all_reduce(tensor, group=self._shard_mesh.get_group())

    def _own_rows(self, rows: int) -> slice:
        """FSDP2 cuts dim 0 as torch.chunk does: equal chunks, the last ones smaller or empty."""
        chunk = -(-rows // self._shard_mesh.size())
        start = min(rows, chunk * self._shard_mesh.get_local_rank())
        return slice(start, min(rows, start + chunk))


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of a parameter or moment, gathered from its shards: a collective for sharded ones."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
