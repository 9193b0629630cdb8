"""One optimizer step: gradients of all micro-batches, summed exactly, then one update or none.

Nothing here knows how many ranks there are or how the model is sharded. `hook(phase, step)` is called at named points,
on every rank, as a sign of progress: before_forward and before_backward (of each micro-batch), before_reduce,
after_reduce, before_update, after_update.
"""

import functools
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from trainer.config import Config
from trainer.data import Batches, MicroBatch, digest
from trainer.errors import NumericsError
from trainer.exact import Grids
from trainer.parallel.world import Rounder, Sharding, World, whole
from trainer.phases import Hook, Phase, no_hook

COUNT_FLUSHED_EVERY = 32  # steps; counting zeros costs more than the rounding itself


@dataclass
class TrainState:
    """All that a run must remember: everything else is a function of the step."""

    step: int
    model: nn.Module
    sharding: Sharding
    optimizers: list[torch.optim.Optimizer]
    grids: Grids | None

    def tensors(self) -> dict[str, Tensor]:
        """By name: weights, optimizer moments, grids. The optimizers' own step counts are the run's, so left out."""
        tensors: dict[str, Tensor] = {f"model.{name}": p.data for name, p in self.sharding.parameters.items()}
        names: dict[Tensor, str] = {parameter: name for name, parameter in self.sharding.parameters.items()}
        for optimizer in self.optimizers:
            for parameter, moments in optimizer.state.items():
                tensors |= {f"optim.{names[parameter]}.{key}": t for key, t in moments.items() if key != "step"}
        if self.grids is not None:
            tensors["grids.magnitude"] = self.grids.magnitude
        return tensors

    def restored(self, step: int) -> None:
        """Follow up on tensors that were overwritten in place by the checkpoint of `step`."""
        self.step = step
        for optimizer in self.optimizers:
            for moments in optimizer.state.values():
                if "step" in moments:
                    moments["step"].fill_(step)
        if self.grids is not None:
            self.grids.derive()

    def weights_sha256(self) -> str:
        """SHA-256 over name, shape and raw little-endian float32 bytes of every full parameter. A collective."""
        return _sha256({name: p.data for name, p in self.sharding.parameters.items()})

    def state_sha256(self) -> str:
        """The same over weights, moments and grids. A collective."""
        return _sha256(self.tensors())


@dataclass(frozen=True)
class StepContext:
    """What a step is computed from, and by whom."""

    config: Config
    world: World
    batches: Batches
    hook: Hook = no_hook
    stop_requested: Callable[[], bool] = lambda: False
    """Whether this rank was asked to save and leave."""

    def any_stop_requested(self) -> bool:
        """Whether any rank was. A collective; within a step, `StepResult.stop` tells without one of its own."""
        asked = torch.tensor(float(self.stop_requested()), device=self.world.device)
        self.world.max(asked)
        return bool(asked)


@dataclass(frozen=True)
class StepResult:
    """What a step's micro-batches add up to, alike on all ranks. The gradients are in `sharding`."""

    loss: float
    samples: str
    redone: int
    flushed: float | None
    stop: bool
    """Whether any rank was asked to stop: all learn it in the same step."""


def compute_gradients(state: TrainState, context: StepContext) -> StepResult:
    """Gradient of the mean loss over the step's micro-batches, exact; computed again if it overflows its grid.

    A widened grid is kept only if the second computation sees what the first saw, to the bit. If not, one of them was
    wrong, and a grid made from it would leave a trace: both are thrown away. A pass that is not finite ends this at
    once, on the grid of before: the gradient norm will tell.
    """
    grids = state.grids
    if grids is None:
        return _one_pass(state, context)
    counting = state.step % COUNT_FLUSHED_EVERY == 0
    for redone in (0, 2):
        grids.begin(counting)
        result = _one_pass(state, context)
        if not grids.overflowed(context.world.max):
            return replace(result, redone=redone)
        seen, before = grids.widen()
        grids.begin(counting)
        result = _one_pass(state, context)
        if not grids.overflowed(context.world.max) and grids.seen.equal(seen):
            return replace(result, redone=redone + 1)
        grids.restore(before)
        if not grids.finite:
            return replace(result, redone=redone + 1)
    raise NumericsError(
        f"step {state.step + 1}: a gradient is beyond the coarsest grid, or computing it twice gives two results. "
        "The step was not applied.\n  Lower optim.learning_rate, or suspect the machine."
    )


def _one_pass(state: TrainState, context: StepContext) -> StepResult:
    """Forward and backward over this rank's micro-batches, then the reduction over ranks."""
    world, sharding, count = context.world, state.sharding, context.config.data.micro_batches
    losses = torch.zeros(count, dtype=torch.float64, device=world.device)
    digests = torch.zeros(count, dtype=torch.float64)
    sharding.zero_gradients()
    for index, batch in _own_micro_batches(state, context):
        loss = backward(state, context, index, batch)
        if index is not None:
            losses[index] = loss
            digests[index] = float(digest(batch.sample_ids))
    context.hook(Phase.BEFORE_REDUCE, state.step)
    sharding.reduce_gradients()
    nonzero = torch.zeros(2, dtype=torch.float64, device=world.device) if state.grids is None else state.grids.nonzero
    stops = torch.tensor([context.stop_requested()], dtype=torch.float64, device=world.device)
    slots = torch.cat([losses, digests.to(world.device), nonzero, stops])
    world.sum(slots)  # exact: losses and digests have one owner each, the rest are counts
    context.hook(Phase.AFTER_REDUCE, state.step)
    values = slots.tolist()
    before, after, stops_asked = values[2 * count :]
    samples = hashlib.sha256(repr([int(value) for value in values[count : 2 * count]]).encode()).hexdigest()[:16]
    loss = math.fsum(values[:count]) / count
    return StepResult(loss, samples, 0, 1 - after / before if before else None, bool(stops_asked))


def _own_micro_batches(state: TrainState, context: StepContext) -> Iterator[tuple[int | None, MicroBatch]]:
    """(index, batch) of this rank's share; index None where it runs along without work for a sharded model's sake."""
    rounds = list(context.world.assign_micro_batches(context.config.data.micro_batches))
    for number, index in enumerate(rounds, start=1):
        if index is not None or state.sharding.needs_lockstep:
            state.sharding.last_micro_batch(number == len(rounds))
            context.hook(Phase.BEFORE_FORWARD, state.step)
            yield index, context.batches.micro_batch(state.step, index or 0)


def backward(state: TrainState, context: StepContext, index: int | None, batch: MicroBatch) -> Tensor:
    """Add a micro-batch's share of the gradient; returns its cross-entropy in nats per token (scalar).

    The objective is divided by the number of micro-batches; without an index its weight, and so the gradient, is 0.
    """
    config, device = context.config, context.world.device
    if config.model.dropout:
        torch.manual_seed(_key(config.seed, state.step, index or 0))
    with autocast(config, device):
        result = state.model(_to(batch.inputs, device), _to(batch.targets, device))
    context.hook(Phase.BEFORE_BACKWARD, state.step)
    (result.objective * (0.0 if index is None else 1.0 / config.data.micro_batches)).backward()
    return result.cross_entropy.detach()


def clip_gradients(state: TrainState, limit: float) -> float:
    """Scale the reduced gradients to a global norm of at most `limit` (0: leave them); return the norm before.

    The norm comes from exact sums, added up in the order of the parameters, so it is the same bits on every rank.
    """
    norm = gradient_norm(state)
    if limit and norm > limit:
        for _, gradient, _ in state.sharding.gradients():
            gradient.mul_(limit / norm)
    return norm


def gradient_norm(state: TrainState) -> float:
    grids, gradients = state.grids, state.sharding.gradients()
    if grids is None:
        squares = torch.stack([torch.linalg.vector_norm(grad).double().square() for _, grad, _ in gradients])
    else:
        squares = torch.zeros(grids.magnitude.numel(), dtype=torch.float64, device=grids.magnitude.device)
        for name, grad, rows in gradients:
            segments, sums = grids.square_sums(name, grad, rows)
            squares[segments] = sums
    state.sharding.sum_over_shards(squares)
    return math.sqrt(squares.sum().item())


def apply(state: TrainState) -> None:
    """Update the weights with the gradients at hand: the step is done."""
    for optimizer in state.optimizers:
        optimizer.step()
    if state.grids is not None:
        state.grids.commit()
    state.step += 1


def find_not_finite(state: TrainState, context: StepContext) -> str:
    """Compute the step once more and name where it first is not finite: micro-batch, samples, module. A collective."""
    found: list[tuple[int, str]] = []
    gradients: list[str] = []
    state.sharding.round_with(functools.partial(_note_not_finite, gradients))  # for good: the run ends here
    state.sharding.zero_gradients()
    for index, batch in _own_micro_batches(state, context):
        gradients.clear()
        with _first_output_not_finite(state.model) as modules:
            loss = backward(state, context, index, batch)
        where = f"output of module {modules[0]}" if modules else "the loss" if not loss.isfinite() else ""
        if not where and gradients:
            where = f"gradient of {gradients[0]}"
        if where and index is not None:
            found.append((index, f"micro-batch {index} (samples {', '.join(map(str, batch.sample_ids))}), {where}"))
    everywhere = sorted(finding for part in context.world.gather(found) for finding in part)
    return everywhere[0][1] if everywhere else "nowhere when computed again: a passing fault"


def _note_not_finite(names: list[str], name: str) -> Rounder:
    """A rounder that rounds nothing, but notes by name each whole gradient of a micro-batch that is not finite."""

    def note(gradient: Tensor) -> Tensor:
        if not bool(gradient.isfinite().all()):
            names.append(name)
        return gradient

    return note


@contextmanager
def _first_output_not_finite(model: nn.Module) -> Iterator[list[str]]:
    """Collects the names of modules whose output is not finite, in the order of computing."""
    names: list[str] = []

    def watch(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def look(module: nn.Module, arguments: Any, output: Any) -> None:
            tensors = output if isinstance(output, tuple) else (output,)
            if not all(bool(t.isfinite().all()) for t in tensors if isinstance(t, Tensor)):
                names.append(name or "the model")

        return look

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules()]
    try:
        yield names
    finally:
        for handle in handles:
            handle.remove()


def autocast(config: Config, device: torch.device) -> AbstractContextManager:
    if config.numerics.precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def _to(array: np.ndarray, device: torch.device) -> Tensor:
    return torch.from_numpy(array).to(device, non_blocking=True)


def _key(*parts: int) -> int:
    """A 63-bit seed from integers."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little") >> 1


def _sha256(tensors: Mapping[str, Tensor]) -> str:
    sha = hashlib.sha256()
    for name in sorted(tensors):
        full = whole(tensors[name]).detach().cpu().contiguous()
        sha.update(f"{name}{tuple(full.shape)}".encode())
        sha.update(full.numpy().astype("<f4", copy=False).tobytes())
    return sha.hexdigest()
