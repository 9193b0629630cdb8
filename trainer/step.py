"""One optimizer step: gradients of all micro-batches, summed exactly, then one update or none.

Nothing here knows how many ranks there are or how the model is sharded. Every rank calls `StepContext.hook` at each
phase of the step: before_forward and before_backward (of each micro-batch), before_reduce, after_reduce; the loop calls
it at before_update and after_update.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from trainer.config import Config
from trainer.data import Batches, MicroBatch, digest
from trainer.errors import NumericsError
from trainer.exact import Grids
from trainer.micro_batch_graph import MicroBatchGraph
from trainer.model import Lesson
from trainer.own_optimizer import OwnOptimizer
from trainer.parallel.partial import LocalSums
from trainer.parallel.sharding import Sharding, whole
from trainer.parallel.world import Members, StepMembers, World
from trainer.phases import Hook, Phase, no_hook

COUNT_FLUSHED_EVERY = 32  # steps; counting zeros costs more than the rounding itself


@dataclass
class TrainState:
    """Everything that a run must remember; all else is a function of the config and the step."""

    step: int
    """Completed steps."""
    model: nn.Module
    sharding: Sharding
    optimizers: list[torch.optim.Optimizer]
    grids: Grids | None
    graph: MicroBatchGraph | None = field(default=None, kw_only=True)
    """Computes each micro-batch, where `parallel.cuda_graphs` asks for it."""
    moments_from: Mapping[str, int] = field(default_factory=dict, kw_only=True)
    """{parameter: step after which its moments began at zero}, where the run took over a state without them."""
    teachers: Callable[[Tensor], Lesson] | None = field(default=None, kw_only=True)
    """Input tokens to what teachers say of them, where [distil] names some."""

    def tensors(self) -> dict[str, Tensor]:
        """Weights, optimizer moments and grids, by name. The optimizers' counts follow from the step: left out."""
        tensors: dict[str, Tensor] = {f"model.{name}": p.data for name, p in self.sharding.parameters.items()}
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.sharding.parameters.items()}
        for optimizer in self.optimizers:
            for parameter, moments in optimizer.state.items():
                tensors |= {f"optim.{names[parameter]}.{key}": t for key, t in moments.items() if key != "step"}
        if self.grids is not None:
            tensors["grids.magnitude"] = self.grids.magnitude
        return tensors

    def restored(self, step: int, missing: Collection[str] = ()) -> None:
        """Set what is derived from `tensors()`, after a checkpoint of `step` was loaded into them in place.

        `missing` are names of tensors that it did not hold.
        """
        self.step = step
        for optimizer in self.optimizers:
            if isinstance(optimizer, OwnOptimizer):
                named = self.sharding.parameters.items()
                optimizer.loaded([p for name, p in named if any(m.startswith(f"optim.{name}.own") for m in missing)])
        self.count_steps(step)
        if self.grids is not None:
            self.grids.derive()

    def count_steps(self, step: int) -> None:
        """Set AdamW's counts, by which it corrects moments that began at zero, to what they are after `step`."""
        names: dict[Tensor, str] = {}
        if self.moments_from:
            names |= {parameter: name for name, parameter in self.sharding.parameters.items()}
        for optimizer in self.optimizers:
            for parameter, moments in optimizer.state.items():
                if "step" in moments:
                    moments["step"].fill_(step - self.moments_from.get(names.get(parameter, ""), 0))

    def weights_sha256(self) -> str:
        """SHA-256 over name, shape and raw little-endian float32 bytes of every full parameter. Collective."""
        return sha256_of({name: p.data for name, p in self.sharding.parameters.items()})

    def state_sha256(self) -> str:
        """SHA-256 like `weights_sha256`, over weights, moments and grids. Collective."""
        return sha256_of(self.tensors())


class Placed(NamedTuple):
    """A micro-batch on the device, or on its way there."""

    sample_ids: np.ndarray
    inputs: Tensor
    """int64[B, T]"""
    targets: Tensor
    """int64[B, T]"""


class Feed:
    """The micro-batches of the steps on the device. A GPU's first one is there before its step begins.

    Within a step the host is ahead of a GPU anyway: it cuts a micro-batch while the one before is computed. It waits at
    the end of the step, so the next step's first micro-batch is cut before that. A micro-batch is found by its step and
    index: where ranks compute other ones than was expected, what was cut ahead is not used.
    """

    def __init__(self, batches: Batches, device: torch.device) -> None:
        self._batches, self._device = batches, device
        self._ahead: dict[tuple[int, int], Placed] = {}
        """At most one, by (step, index)."""

    def take(self, step: int, index: int) -> Placed:
        ahead = self._ahead.pop((step, index), None)
        return place(self._batches.micro_batch(step, index), self._device) if ahead is None else ahead

    def prefetch(self, step: int, index: int) -> None:
        """Cut a micro-batch and begin to copy it. Does nothing on a CPU, which would compute no sooner."""
        if self._device.type == "cuda" and (step, index) not in self._ahead:
            self._ahead = {(step, index): place(self._batches.micro_batch(step, index), self._device)}


@dataclass(frozen=True)
class StepContext:
    """The inputs of every step, and the ranks that may compute it."""

    config: Config
    members: Members
    batches: Batches
    hook: Hook = no_hook
    stop_requested: Callable[[], bool] = lambda: False
    """True if this rank received a stop signal."""
    change_wanted: Callable[[], bool] = lambda: False
    """True if this rank knows of a worker that waits to join."""

    @property
    def world(self) -> World:
        return self.members.world

    @functools.cached_property
    def feed(self) -> Feed:
        return Feed(self.batches, self.world.device)

    def any_stop_requested(self) -> bool:
        """True if any rank received a stop signal. Collective; inside a step use `StepResult.stop`."""
        requested = torch.tensor(float(self.stop_requested()), device=self.world.device)
        self.world.max(requested)
        return bool(requested)


@dataclass(frozen=True)
class StepResult:
    """Sums over a step's micro-batches, the same on all ranks. The gradients are in `TrainState.sharding`."""

    loss: float
    """Mean cross-entropy in nats per token."""
    norm: float
    """Global L2 norm of the reduced gradients, before they are clipped."""
    samples: str
    """Digest of the ids of the samples that were read."""
    redone: int
    """Number of passes over the micro-batches that were thrown away."""
    flushed: float | None
    """Share of the non-zero gradient entries that rounding set to zero; None in steps that do not count them."""
    stop: bool
    """True if any rank received a stop signal: all ranks learn it in the same step."""
    change: bool = False
    """True if any rank knows of a worker that waits to join: as above."""


def compute_gradients(state: TrainState, context: StepContext, members: StepMembers) -> StepResult:
    """Gradient of the mean loss over the step's micro-batches, exact; computed again if it overflows its grid.

    A widened grid is kept only if the second pass sees the same magnitudes as the first, to the bit. If not, one of the
    two was wrong, and a grid made from it would leave a trace: both are thrown away. A pass with a non-finite value
    ends this at once, on the old grid: the gradient norm will show it. Raises NumericsError if no pass fits.
    """
    grids, largest = state.grids, members.world.max
    if grids is None:
        return _one_pass(state, context, members)()
    for redone in (0, 2):
        result = _one_pass(state, context, members)
        if not grids.overflowed(largest):
            return replace(result(), redone=redone)
        # Some entry exceeded its bound, so these sums are not exact. Make a grid that fits it, and compute again.
        members = members.anew()
        seen, before = grids.widen()
        result = _one_pass(state, context, members)
        if not grids.overflowed(largest) and grids.seen.equal(seen):
            return replace(result(), redone=redone + 1)
        grids.restore(before)
        if not grids.finite:
            return replace(result(), redone=redone + 1)
    raise NumericsError(
        f"step {state.step + 1}: a gradient is beyond the coarsest grid, or computing it twice gives two results. "
        "The step was not applied.\n  Lower optim.learning_rate, or suspect the machine."
    )


def _one_pass(state: TrainState, context: StepContext, members: StepMembers) -> Callable[[], StepResult]:
    """Forward and backward over this rank's micro-batches, then the reduction over the members.

    Returns the function that reads the result. Nothing before it waits for a GPU, so all work is under way by then.
    """
    world, sharding, count = members.world, state.sharding, context.config.data.micro_batches
    local = _local_sums(state, members, count)
    for index, batch in _own_micro_batches(state, context, members):
        loss = backward(state, context, index, batch)
        if index is not None:
            local.losses[index] = loss
            local.digests[index] = float(digest(batch.sample_ids))
            local.done.append(index)
    context.hook(Phase.BEFORE_REDUCE, state.step)
    if members.partial is not None and world.size > 1:
        members.partial.copy(*sharding.reduced_in_place(), *([] if state.grids is None else [state.grids.seen]))
    sharding.reduce_gradients(world)
    # Everything else that ranks must know of one another travels in one small all-reduce. Its sums are exact: losses
    # and digests have one owner each, the rest are counts.
    nonzero = torch.zeros(2, dtype=torch.float64, device=world.device) if state.grids is None else state.grids.nonzero
    wishes = torch.tensor([context.stop_requested(), context.change_wanted()], dtype=torch.float64)
    of_host = sent(torch.cat([local.digests, wishes]), world.device)
    slots = torch.cat([local.losses, of_host[:count], nonzero, of_host[count:]])
    world.sum(slots)
    context.hook(Phase.AFTER_REDUCE, state.step)
    read = _read_later(torch.cat([slots, gradient_square(state).reshape(1)]))

    def result() -> StepResult:
        *values, square = read()
        nonzero_before, nonzero_after, stops, changes = values[2 * count :]
        samples = hashlib.sha256(repr([int(value) for value in values[count : 2 * count]]).encode()).hexdigest()[:16]
        flushed = 1 - nonzero_after / nonzero_before if nonzero_before else None
        loss, norm = math.fsum(values[:count]) / count, math.sqrt(square)
        return StepResult(loss, norm, samples, 0, flushed, bool(stops), bool(changes))

    return result


def _read_later(tensor: Tensor) -> Callable[[], list[float]]:
    """Begin to copy a vector to the host; the function that is returned waits for it."""
    if not tensor.is_cuda:
        return tensor.tolist
    copied, done = tensor.to("cpu", non_blocking=True), torch.cuda.Event()  # into pinned memory
    done.record(torch.cuda.current_stream(tensor.device))

    def read() -> list[float]:
        done.synchronize()
        return copied.tolist()

    return read


def _local_sums(state: TrainState, members: StepMembers, count: int) -> LocalSums:
    """Return what this rank has of an interrupted pass, which goes on; else zeros, for a pass from nothing."""
    local = None if members.partial is None else members.partial.of(state.step)
    if local is None:
        losses = torch.zeros(count, dtype=torch.float64, device=members.world.device)
        local = LocalSums(losses, torch.zeros(count, dtype=torch.float64))
        state.sharding.zero_gradients()
        if state.grids is not None:
            state.grids.begin(counting=state.step % COUNT_FLUSHED_EVERY == 0)
        if members.partial is not None:
            members.partial.begin(state.step, local)
    return local


def _own_micro_batches(
    state: TrainState, context: StepContext, members: StepMembers
) -> Iterator[tuple[int | None, Placed]]:
    """Yield (index, batch) of this rank's share.

    The index is None where the rank has no micro-batch of its own, but must compute one for a sharded model's sake.
    """
    own_micro_batches = members.own_micro_batches()
    for number, index in enumerate(own_micro_batches, start=1):
        if index is not None or state.sharding.needs_lockstep:
            state.sharding.last_micro_batch(number == len(own_micro_batches))
            context.hook(Phase.BEFORE_FORWARD, state.step)
            yield index, context.feed.take(state.step, index or 0)
    # Faults in what is read, and checks of it, belong to the step under way.
    watched = context.config.faults or context.config.sentinel.on
    if state.step + 1 < context.config.budget.steps and not watched:
        # As it is dealt out if the members stay the same.
        first = next(members.world.assign_micro_batches(context.config.data.micro_batches))
        if first is not None or state.sharding.needs_lockstep:
            context.feed.prefetch(state.step + 1, first or 0)


def place(batch: MicroBatch, device: torch.device) -> Placed:
    inputs, targets = (sent(torch.from_numpy(ids), device) for ids in (batch.inputs, batch.targets))
    return Placed(batch.sample_ids, inputs, targets)


def backward(state: TrainState, context: StepContext, index: int | None, batch: Placed) -> Tensor:
    """Add a micro-batch's share of the gradient; return its cross-entropy in nats per token (scalar).

    The objective is divided by the number of micro-batches; without an index its weight, and so the gradient, is 0.
    """
    config, device = context.config, context.world.device
    if config.model.dropout:
        # Random numbers depend on the micro-batch alone, so any rank may compute it.
        key = repr((config.seed, state.step, index or 0))
        torch.manual_seed(int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1)
    if state.graph is not None:
        context.hook(Phase.BEFORE_BACKWARD, state.step)
        cross_entropy = state.graph(batch.inputs, batch.targets)
    else:
        with autocast(config, device):
            lesson = () if state.teachers is None else (state.teachers(batch.inputs),)
            objective, cross_entropy = state.model(batch.inputs, batch.targets, *lesson)
        context.hook(Phase.BEFORE_BACKWARD, state.step)
        (objective * (0.0 if index is None else 1.0 / config.data.micro_batches)).backward()
    state.sharding.micro_batch_done()
    return cross_entropy.detach()


def graph_of(state: TrainState, config: Config, device: torch.device) -> MicroBatchGraph:
    """Return what computes a micro-batch as `backward` does, as one CUDA graph."""

    def passes(inputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        with autocast(config, device):
            objective, cross_entropy = state.model(inputs, targets)
        return objective * (1.0 / config.data.micro_batches), cross_entropy

    return MicroBatchGraph(passes, state.sharding.parameters)


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor from the host to `device`. No one waits for a GPU's copy, since it is from pinned memory."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def clip_gradients(state: TrainState, norm: float, limit: float) -> None:
    """Scale the reduced gradients, whose global norm is `norm`, to one of at most `limit` (0: leave them)."""
    if limit and norm > limit:
        state.sharding.scale_gradients(limit / norm)


def gradient_square(state: TrainState) -> Tensor:
    """Square of the global L2 norm of the reduced gradients (float64 scalar). Collective for sharded models.

    It comes from exact sums, added up in the order of the parameters, so it is the same bits on every rank.
    """
    grids, gradients = state.grids, state.sharding.gradients()
    if grids is None:
        squares = torch.stack([torch.linalg.vector_norm(grad).double().square() for _, grad, _ in gradients])
    else:
        squares = grids.squares(gradients)
    state.sharding.sum_over_shards(squares)
    return squares.sum()


def apply(state: TrainState) -> None:
    """Update the weights with the gradients at hand, and count the step."""
    for optimizer in state.optimizers:
        optimizer.step()
    if state.grids is not None:
        state.grids.commit()
    state.step += 1


def find_not_finite(state: TrainState, context: StepContext, members: StepMembers) -> str:
    """Compute the step once more and name the first non-finite value: micro-batch, samples, module. Collective.

    The state cannot train on afterwards.
    """
    found: list[tuple[int, str]] = []
    gradients: list[str] = []

    def note_not_finite(name: str, gradient: Tensor) -> Tensor:
        if not bool(gradient.isfinite().all()):
            gradients.append(name)
        return gradient

    members = members.anew()
    state.graph = None  # no hook would be called
    # The hooks stay: the run ends here.
    state.sharding.round_with(lambda name: functools.partial(note_not_finite, name))
    state.sharding.zero_gradients()
    for index, batch in _own_micro_batches(state, context, members):
        gradients.clear()  # only those of this micro-batch count
        with _first_output_not_finite(state.model) as modules:
            loss = backward(state, context, index, batch)
        where = f"output of module {modules[0]}" if modules else "the loss" if not loss.isfinite() else ""
        if not where and gradients:
            where = f"gradient of {gradients[0]}"
        if where and index is not None:
            found.append((index, f"micro-batch {index} (samples {', '.join(map(str, batch.sample_ids))}), {where}"))
    everywhere = sorted(finding for findings in members.world.agree(lambda: found) for finding in findings)
    return everywhere[0][1] if everywhere else "nowhere when computed again: a passing fault"


@contextmanager
def _first_output_not_finite(model: nn.Module) -> Iterator[list[str]]:
    """Collect the names of modules whose output is not finite, in the order of computing."""
    names: list[str] = []

    def check(name: str, _module: nn.Module, _arguments: Any, output: Any) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        if not all(bool(t.isfinite().all()) for t in tensors if isinstance(t, Tensor)):
            names.append(name or "the model")

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.callback(module.register_forward_hook(functools.partial(check, name)).remove)
        yield names


def autocast(config: Config, device: torch.device) -> AbstractContextManager:
    if config.numerics.precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def sha256_of(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over name, shape and raw little-endian float32 bytes of tensors, in name order. Collective for shards."""
    sha = hashlib.sha256()
    for name in sorted(tensors):
        full = whole(tensors[name]).detach().cpu().contiguous()
        sha.update(f"{name}{tuple(full.shape)}".encode())
        sha.update(full.numpy().astype("<f4", copy=False).tobytes())
    return sha.hexdigest()
