"""The training loop: the whole story of a run, from its state to its last step.

A step is: every micro-batch forward and backward, one reduction, one decision whether the sums hold, one update.
Nothing here knows how many ranks there are, how the model is sharded, or who asked to stop.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Protocol

from torch import nn

from trainer import optim
from trainer.errors import NumericsError
from trainer.evaluate import Score
from trainer.log.events import EvalDone, Event, EventLog, NotFinite, StepDone
from trainer.phases import Phase
from trainer.step import Sums, TrainState, Work, apply, clip_gradients, compute_gradients, find_not_finite


class Checkpoints(Protocol):
    """Where states are saved; each method is a collective."""

    def save(self, state: TrainState) -> None:
        """Begin to save, beside the next steps. Raises CheckpointError after too many failures in a row."""
        ...

    def look(self) -> None:
        """Log saves that have ended since."""
        ...

    def finish(self, state: TrainState) -> None:
        """Wait until the newest state is durable. Raises CheckpointError if it cannot be made so."""
        ...


@dataclass(frozen=True)
class Parts:
    """What the loop works with; wired in `job`."""

    work: Work
    log: EventLog
    evaluate: Callable[[nn.Module, int], Iterable[tuple[str, str, Score, float]]]
    """Scores a step's model on every held-out set: (name, digest of its tokens, score, seconds)."""
    checkpoints: Checkpoints

    def record(self, event: Event) -> None:
        """All ranks know what a step came to; rank 0 writes it down."""
        if self.work.world.is_main:
            self.log.append(event)


def train(state: TrainState, parts: Parts) -> bool:
    """Train from `state.step` to the end of the budget. Returns False if it was asked to stop before, state saved.

    Raises NumericsError if a step's loss or gradient is not finite twice, CheckpointError if saving keeps failing.
    """
    config = parts.work.config
    steps = config.budget.steps
    stop = parts.work.any_stop_requested()  # while data were prepared, say
    while state.step < steps and not stop:
        stop = take_step(state, parts)
        if due(state.step, config.eval.every_steps, steps):
            score(state, parts)
        if stop or due(state.step, config.checkpoint.every_steps, steps):
            parts.checkpoints.save(state)
        parts.checkpoints.look()
    parts.checkpoints.finish(state)
    return state.step == steps


def due(step: int, every: int, last: int) -> bool:
    return step == last or (every > 0 and step % every == 0)


def take_step(state: TrainState, parts: Parts) -> bool:
    """One step, applied on every rank or on none. Returns whether any rank was asked to stop."""
    work, started = parts.work, time.perf_counter()
    config = work.config
    sums, norm = finite_gradients(state, parts)
    rate = optim.set_learning_rates(state.optimizers, state.step, config.optim, config.budget.steps)
    work.at(Phase.BEFORE_UPDATE, state.step)
    apply(state)
    work.at(Phase.AFTER_UPDATE, state.step)
    parts.record(
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
    return sums.stop


def finite_gradients(state: TrainState, parts: Parts) -> tuple[Sums, float]:
    """The step's sums and gradient norm, both finite. A passing fault is computed away; one that stays is named."""
    for trial in range(2):
        sums = compute_gradients(state, parts.work)
        norm = clip_gradients(state, parts.work.config.optim.clip_norm)
        if math.isfinite(sums.loss) and math.isfinite(norm):
            return sums, norm
        parts.record(NotFinite(step=state.step + 1, loss=sums.loss, grad_norm=norm, trial=trial))
    raise NumericsError(
        f"step {state.step + 1}: loss or gradient is not finite, also when computed again. It was not applied.\n"
        f"  First not finite: {find_not_finite(state, parts.work)}.\n"
        "  Look at these samples, or lower optim.learning_rate in a new run."
    )


def score(state: TrainState, parts: Parts) -> None:
    for name, tokens_digest, result, seconds in parts.evaluate(state.model, state.step):
        parts.record(
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
