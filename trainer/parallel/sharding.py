"""Sharding: how a model is spread over ranks. Replicated, fully sharded (FSDP2), or sharded in replica groups (hybrid).

Nothing here may change what is computed, only where.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

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
Add = Callable[[Sequence[Tensor], Tensor], None]


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
        self._add: Add | None = None
        self._bind(torch.zeros(sum(parameter.numel() for parameter in self.parameters.values()), device=world.device))

    def _bind(self, flat: Tensor) -> None:
        self._flat = flat
        parts = flat.split([parameter.numel() for parameter in self.parameters.values()])
        named = zip(self.parameters.items(), parts, strict=True)
        self._sums = {name: part.view_as(parameter) for (name, parameter), part in named}
        self._show_sums()

    def _show_sums(self) -> None:
        for name, parameter in self.parameters.items():
            parameter.grad = self._sums[name]  # autograd accumulates in place there, and the optimizer reads it

    def _hide_sums(self) -> None:
        if self._add:  # without a sum in its place, autograd leaves a micro-batch's gradient there, uncopied
            for parameter in self.parameters.values():
                parameter.grad = None

    def round_with(self, rounder_of: RounderOf) -> None:
        """Pass each parameter's gradient of each micro-batch (full shape) through its rounder before it is added."""
        for name, parameter in self.parameters.items():
            parameter.register_hook(rounder_of(name))

    def add_with(self, add: Add | None) -> None:
        """Have all gradients of a micro-batch added at once, by a function of (gradients, flat sum): `Grids.add`.

        None adds them as they are. They are kept until the backward pass has ended.
        """
        self._add = add or (lambda gradients, _: torch._foreach_add_(list(self._sums.values()), list(gradients)))

    def zero_gradients(self) -> None:
        self._flat.zero_()
        self._hide_sums()

    def reduced_in_place(self) -> list[Tensor]:
        """The tensors that `reduce_gradients` overwrites."""
        return [self._flat]

    def renew_buffers(self) -> None:
        """Go on with copies of the buffers: a reduction was left behind that may still write to these."""
        self._bind(self._flat.clone())

    def last_micro_batch(self, is_last: bool) -> None:
        """Called before each backward pass; lets gradients be reduced once a step where the strategy can."""
        self._hide_sums()

    def micro_batch_done(self) -> None:
        """Called after each backward pass: add what it has left to be added."""
        if self._add:
            named = self.parameters.items()
            gradients = [torch.zeros_like(self._sums[n]) if p.grad is None else p.grad for n, p in named]
            self._add(gradients, self._flat)
            self._hide_sums()

    def reduce_gradients(self, world: World) -> None:
        """After all micro-batches: make `gradients()` the sums over the ranks of `world`."""
        world.sum(self._flat)
        self._show_sums()

    def scale_gradients(self, factor: float) -> None:
        """Multiply the reduced gradients, in place."""
        self._flat.mul_(factor)

    def gradients(self) -> Iterator[tuple[str, Tensor, slice]]:
        """Yield (name, this rank's part of the gradient, the rows of the full parameter that it covers)."""
        for name, total in self._sums.items():
            yield name, total, slice(0, total.shape[0])

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
            if through_host(world.device, self._shard_mesh.get_group()):
                unit.set_custom_all_gather(GatherThroughHost())  # pyright: ignore[reportArgumentType]
                unit.set_custom_reduce_scatter(ScatterThroughHost())  # pyright: ignore[reportArgumentType]
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

    def micro_batch_done(self) -> None:
        pass

    def scale_gradients(self, factor: float) -> None:
        torch._foreach_mul_([gradient for _, gradient, _ in self.gradients()], factor)

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
    if not isinstance(tensor, DTensor):
        return tensor
    mesh = tensor.device_mesh
    group = mesh.get_group(mesh.ndim - 1)  # the ranks that together hold one copy
    if not through_host(tensor.device, group):
        return tensor.full_tensor()
    size, rows = group.size(), tensor.shape[0]
    local = tensor.to_local()
    padded = local.new_zeros(-(-rows // size), *local.shape[1:])  # FSDP2's last shards are smaller or empty
    padded[: local.shape[0]] = local
    found = local.new_empty(size * padded.shape[0], *local.shape[1:])
    GatherThroughHost()(found, padded, group)
    return found[:rows]


def through_host(device: torch.device, group: dist.ProcessGroup) -> bool:
    """True if shards of this device must be exchanged by way of the host.

    gloo adds up and broadcasts a GPU's tensors, but its all-gather and reduce-scatter take them for the host's memory
    and crash (pytorch#132471).
    """
    return device.type == "cuda" and "gloo" in str(dist.get_backend_config(group)).partition("cuda:")[2]


class ThroughHost:
    """A collective of FSDP2 for GPUs that ranks share over gloo: see `fsdp.FSDPModule.set_custom_all_gather`."""

    def allocate(self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class GatherThroughHost(ThroughHost):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> None:
        found = torch.empty_like(output_tensor, device="cpu")
        dist.all_gather_into_tensor(found, input_tensor.cpu(), group=group)
        output_tensor.copy_(found)


class ScatterThroughHost(ThroughHost):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, op: Any, async_op: bool = False
    ) -> None:
        found = torch.empty_like(output_tensor, device="cpu")
        dist.reduce_scatter_tensor(found, input_tensor.cpu(), op=op, group=group)
        output_tensor.copy_(found)
