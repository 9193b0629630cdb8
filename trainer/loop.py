"""The training loop: a run from its state to its last step. Start reading here.

A step is: every micro-batch forward and backward, one reduction over ranks, one check that the sums are exact and
finite, one update. The loop does not know how many ranks there are, how the model is sharded, or what asked it to stop.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from trainer import optim, step
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.errors import NumericsError
from trainer.log.events import EvalDone, Event, EventLog, NotFinite, StepDone
from trainer.parallel.world import StepMembers
from trainer.phases import Phase
from trainer.step import StepContext, StepResult, TrainState


@dataclass(frozen=True)
class Collaborators:
    """The objects that the loop works with; `job` makes them."""

    context: StepContext
    log: EventLog
    evaluate: Callable[[nn.Module, int], Iterable[EvalDone]]
    """Scores the model of a step on every held-out set. Collective."""
    checkpointer: Checkpointer

    def record(self, event: Event) -> None:
        """Append an event that all ranks know alike: rank 0 writes it once for all."""
        if self.context.world.is_main:
            self.log.append(event)


def train(state: TrainState, collaborators: Collaborators) -> bool:
    """Train from `state.step` to the end of the budget.

    Returns False if a stop was requested before the end; the state is then saved. Raises NumericsError if the loss or
    gradient of a step is not finite twice, CheckpointError if saving keeps failing.
    """
    config, checkpointer = collaborators.context.config, collaborators.checkpointer
    steps = config.budget.steps
    # A stop signal may have come while the data were prepared: then no step is begun.
    stop = collaborators.context.any_stop_requested()
    while state.step < steps and not stop:
        stop = take_step(state, collaborators)
        if due(state.step, config.eval.every_steps, steps):
            for scored in collaborators.evaluate(state.model, state.step):
                collaborators.record(scored)
        if stop or due(state.step, config.checkpoint.every_steps, steps):
            # Copies the state and returns; a thread writes it beside the next steps.
            checkpointer.save(state)
        checkpointer.poll()
    # The newest state must be durable before the run may call itself finished or preempted.
    checkpointer.finish(state)
    return state.step == steps


def due(step: int, every: int, last: int) -> bool:
    """True after the last step, and after each step that `every` divides; `every` = 0 means only the last."""
    return step == last or (every > 0 and step % every == 0)


def take_step(state: TrainState, collaborators: Collaborators) -> bool:
    """Take one step: it is applied on every rank or on none. Returns True if any rank received a stop signal."""
    context, started = collaborators.context, time.perf_counter()
    config = context.config
    # Only what the step's members commit is applied.
    result, norm = context.members.commit(state.step, lambda members: finite_gradients(state, collaborators, members))
    rate = optim.set_learning_rates(state.optimizers, state.step, config.optim, config.budget.steps)
    # Between these two phases the ranks do not communicate. A rank that dies here leaves no half-applied step behind:
    # all ranks start again from a checkpoint.
    context.hook(Phase.BEFORE_UPDATE, state.step)
    step.apply(state)
    context.hook(Phase.AFTER_UPDATE, state.step)
    collaborators.record(
        StepDone(
            step=state.step,
            loss=result.loss,
            grad_norm=norm,
            learning_rate=rate,
            tokens=config.data.micro_batches * config.data.micro_batch_sequences * config.model.context,
            seconds=time.perf_counter() - started,
            samples=result.samples,
            redone=result.redone,
            flushed=result.flushed,
        )
    )
    return result.stop


def finite_gradients(state: TrainState, collaborators: Collaborators, members: StepMembers) -> tuple[StepResult, float]:
    """Return the step's result and its gradient norm, both finite.

    A step is a function of the config, so a value that is finite when computed again was a fault of the machine, and
    training continues. Raises NumericsError with the place of the first non-finite value if it is not.
    """
    for trial in range(2):
        result = step.compute_gradients(state, collaborators.context, members)
        norm = step.clip_gradients(state, collaborators.context.config.optim.clip_norm)
        # Loss and norm are the same bits on all ranks, so all ranks decide alike.
        if math.isfinite(result.loss) and math.isfinite(norm):
            return result, norm
        collaborators.record(NotFinite(step=state.step + 1, loss=result.loss, grad_norm=norm, trial=trial))
    raise NumericsError(
        f"step {state.step + 1}: loss or gradient is not finite, also when computed again. It was not applied.\n"
        f"  First not finite: {step.find_not_finite(state, collaborators.context, members)}.\n"
        "  Inspect these samples, or lower optim.learning_rate in a new run."
    )
