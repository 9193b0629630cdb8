"""The training loop: the whole story of a run, from its state to its last step.

A step is: every micro-batch forward and backward, one reduction, one decision whether the sums were exact, one update.
Nothing here knows how many ranks there are, how the model is sharded, or that anything can fail.
"""

import hashlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from trainer import optim
from trainer.config import Config
from trainer.data import Batches, digest
from trainer.errors import NumericsError
from trainer.evaluate import Score
from trainer.events import EvalDone, EventLog, StepDone
from trainer.exact import Grids
from trainer.world import Sharding, World, whole

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
class Parts:
    """What the loop works with; wired in `job`."""

    config: Config
    world: World
    batches: Batches
    log: EventLog
    evaluate: Callable[[nn.Module], Iterable[tuple[str, str, Score, float]]]
    """Scores the model on every held-out set: (name, digest of its tokens, score, seconds)."""
    save: Callable[[TrainState], None]


@dataclass(frozen=True)
class Sums:
    """What a step's micro-batches add up to, alike on all ranks. The gradients are in `sharding`."""

    loss: float
    samples: str
    redone: int
    flushed: float | None


def train(state: TrainState, parts: Parts) -> None:
    """Train from `state.step` to the end of the budget. Raises NumericsError if loss or gradient is not finite."""
    config, log = parts.config, parts.log
    while state.step < config.budget.steps:
        started = time.perf_counter()
        sums = compute_gradients(state, parts)
        norm = clip_gradients(state, config.optim.clip_norm)
        if not (math.isfinite(sums.loss) and math.isfinite(norm)):
            raise NumericsError(
                f"step {state.step + 1}: loss {sums.loss}, gradient norm {norm}. The step was not applied."
            )
        rate = optim.set_learning_rates(state.optimizers, state.step, config.optim, config.budget.steps)
        for optimizer in state.optimizers:
            optimizer.step()
        if state.grids is not None:
            state.grids.commit()
        state.step += 1
        log.append(
            StepDone(
                step=state.step,
                loss=sums.loss,
                grad_norm=norm,
                learning_rate=rate,
                tokens=config.data.micro_batches * config.data.micro_batch_sequences * config.model.context,
                seconds=time.perf_counter() - started,
                samples=sums.samples,
                redone=sums.redone,
                flushed=sums.flushed,
            )
        )
        if due(state.step, config.eval.every_steps, config.budget.steps):
            score(state, parts)
        if due(state.step, config.checkpoint.every_steps, config.budget.steps):
            parts.save(state)


def due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def score(state: TrainState, parts: Parts) -> None:
    for name, tokens_digest, result, seconds in parts.evaluate(state.model):
        parts.log.append(
            EvalDone(
                step=state.step,
                set=name,
                loss=result.loss,
                bits_per_byte=result.bits_per_byte,
                tokens=result.tokens,
                seconds=seconds,
                digest=tokens_digest,
            )
        )


def compute_gradients(state: TrainState, parts: Parts) -> Sums:
    """Gradient of the mean loss over the step's micro-batches, exact; computed again while it overflows its grid."""
    grids = state.grids
    if grids is None:
        return _one_pass(state, parts)
    for redone in range(2):
        grids.begin(counting=state.step % COUNT_FLUSHED_EVERY == 0)
        sums = _one_pass(state, parts)
        if not grids.overflowed(parts.world.max):
            return replace(sums, redone=redone)
        grids.widen()
    raise NumericsError(
        f"step {state.step + 1}: a gradient is not finite or beyond 2^96, also when computed again. "
        "The step was not applied."
    )


def _one_pass(state: TrainState, parts: Parts) -> Sums:
    """Forward and backward over this rank's micro-batches, then the reduction over ranks."""
    config, world, sharding, grids = parts.config, parts.world, state.sharding, state.grids
    count = config.data.micro_batches
    sharding.zero_gradients()
    losses = torch.zeros(count, dtype=torch.float64, device=world.device)
    digests = torch.zeros(count, dtype=torch.float64)
    rounds = list(world.rounds(count))
    for number, index in enumerate(rounds, start=1):
        if index is None and not sharding.needs_lockstep:
            continue
        batch = parts.batches.micro_batch(state.step, index or 0)
        sharding.last_micro_batch(number == len(rounds))
        if config.model.dropout:
            torch.manual_seed(_key(config.seed, state.step, index or 0))
        with autocast(config, world.device):
            result = state.model(_to(batch.inputs, world.device), _to(batch.targets, world.device))
        # A rank without work runs along for the collectives inside; a weight of 0 makes its gradient exactly 0.
        (result.objective * (0.0 if index is None else 1.0 / count)).backward()
        if index is not None:
            losses[index] = result.cross_entropy.detach()
            digests[index] = float(digest(batch.sample_ids))
    sharding.reduce_gradients()
    nonzero = grids.nonzero if grids is not None else torch.zeros(2, dtype=torch.float64, device=world.device)
    slots = torch.cat([losses, digests.to(world.device), nonzero])
    world.sum(slots)  # exact: losses and digests have one owner each, counts are integers
    values = slots.tolist()
    before, after = values[2 * count :]
    samples = hashlib.sha256(repr([int(value) for value in values[count : 2 * count]]).encode()).hexdigest()[:16]
    return Sums(math.fsum(values[:count]) / count, samples, 0, 1 - after / before if before else None)


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


def autocast(config: Config, device: torch.device) -> AbstractContextManager:
    if config.numerics.precision == "bf16":
        return torch.autocast(device.type, dtype=torch.bfloat16)
    return nullcontext()


def _to(array, device: torch.device) -> Tensor:
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
