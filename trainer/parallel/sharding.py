"""Sharding: how a model is spread over ranks. Replicated, fully sharded (FSDP2), or sharded in replica groups (hybrid).

Nothing here may change what is computed, only where.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from trainer.config import Parallel
from trainer.parallel.world import World

Rounder = Callable[[Tensor], Tensor]
RounderOf = Callable[[str], Rounder]


class Sharding:
    """The layout of parameters and gradients on the ranks: here every rank holds all of them.

    Gradients live in one flat buffer, so that a step needs one all-reduce.
    """

    needs_lockstep = False
    """True if a forward pass is collective, so that ranks without a micro-batch must compute one too."""
    parameters: dict[str, nn.Parameter]
    """By full name: plain tensors, or DTensors that hold this rank's rows. The optimizer updates them."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self.parameters = dict(model.named_parameters())
        self._bind(torch.zeros(sum(parameter.numel() for parameter in self.parameters.values()), device=world.device))

    def _bind(self, flat: Tensor) -> None:
        self._flat = flat
        sizes = [parameter.numel() for parameter in self.parameters.values()]
        for parameter, part in zip(self.parameters.values(), flat.split(sizes), strict=True):
            parameter.grad = part.view_as(parameter)  # autograd then accumulates in place

    def round_with(self, rounder_of: RounderOf) -> None:
        """Pass each parameter's gradient of each micro-batch (full shape) through its rounder before it is added."""
        for name, parameter in self.parameters.items():
            parameter.register_hook(rounder_of(name))

    def zero_gradients(self) -> None:
        self._flat.zero_()

    def reduced_in_place(self) -> list[Tensor]:
        """The tensors that `reduce_gradients` overwrites."""
        return [self._flat]

    def renew_buffers(self) -> None:
        """Go on with copies of the buffers: a reduction was left behind that may still write to these."""
        self._bind(self._flat.clone())

    def last_micro_batch(self, is_last: bool) -> None:
        """Called before each backward pass; lets gradients be reduced once a step where the strategy can."""

    def reduce_gradients(self, world: World) -> None:
        """After all micro-batches: make `gradients()` the sums over the ranks of `world`."""
        world.sum(self._flat)

    def gradients(self) -> Iterator[tuple[str, Tensor, slice]]:
        """Yield (name, this rank's part of the gradient, the rows of the full parameter that it covers)."""
        for name, parameter in self.parameters.items():
            assert parameter.grad is not None
            yield name, parameter.grad, slice(0, parameter.shape[0])

    def sum_over_shards(self, tensor: Tensor) -> None:
        """Sum in place over the ranks that together hold one copy of the gradients."""


class FullySharded(Sharding):
    """FSDP2: rows of every parameter are spread over ranks (or, hybrid, over `shard_ranks` of them, replicated).

    Gradients are rounded when they are still whole, before they are scattered after each micro-batch or once a step, so
    that what FSDP2 adds, in whatever order, is on the grid. A world of one scatters nothing; the rounding is the same.
    """

    needs_lockstep = True

    def __init__(self, model: nn.Module, units: Sequence[nn.Module], parallel: Parallel, world: World) -> None:
        if parallel.strategy == "hybrid":
            shape = (world.size // parallel.shard_ranks, parallel.shard_ranks)
            mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=("replica", "shard"))
            self._shard_mesh = mesh["shard"]
        else:
            mesh = init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
            self._shard_mesh = mesh
        for module in (*units, model):
            fully_shard(module, mesh=mesh, reshard_after_forward=parallel.reshard_after_forward and module is not model)
        self._scatters_once = parallel.scatter_gradients == "step"
        self._model = model
        self._units = [module for module in model.modules() if isinstance(module, FSDPModule)]
        for unit in self._units:
            unit.set_gradient_divide_factor(1.0)  # a mean over ranks would depend on how many there are
            unit.set_force_sum_reduction_for_comms(True)
        self.parameters = dict(model.named_parameters())
        self._rows = {name: self._own_rows(parameter.shape[0]) for name, parameter in self.parameters.items()}

    def round_with(self, rounder_of: RounderOf) -> None:
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

    def reduced_in_place(self) -> list[Tensor]:
        return []

    def last_micro_batch(self, is_last: bool) -> None:
        for unit in self._units:
            if self._scatters_once:  # until then FSDP2 adds up whole gradients on this rank
                unit.set_requires_gradient_sync(is_last, recurse=False)
            else:
                unit.set_requires_all_reduce(is_last, recurse=False)

    def reduce_gradients(self, world: World) -> None:
        pass  # every backward pass has reduced them, over the mesh

    def gradients(self) -> Iterator[tuple[str, Tensor, slice]]:
        for name, parameter in self.parameters.items():
            assert isinstance(parameter.grad, DTensor)
            yield name, parameter.grad.to_local(), self._rows[name]

    def sum_over_shards(self, tensor: Tensor) -> None:
        if self._shard_mesh.size() > 1:
            dist.all_reduce(tensor, group=self._shard_mesh.get_group())

    def _own_rows(self, rows: int) -> slice:
        """FSDP2 cuts dim 0 as torch.chunk does: the last chunks are smaller or empty."""
        chunk = -(-rows // self._shard_mesh.size())
        start = min(rows, chunk * self._shard_mesh.get_local_rank())
        return slice(start, min(rows, start + chunk))


def shard(model: nn.Module, units: Sequence[nn.Module], parallel: Parallel, world: World) -> Sharding:
    """Distribute a model as the strategy says. It is on its device already, with the same values on all ranks.

    `units` are gathered and freed one by one under FSDP.
    """
    if parallel.strategy == "replicate":
        return Sharding(model, world)
    return FullySharded(model, units, parallel, world)


def whole(tensor: Tensor) -> Tensor:
    """Return the full tensor of a parameter or moment. Collective for sharded ones, which are gathered."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
