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
from trainer.parallel.world import StepMembers, World
from trainer.phases import Phase
from trainer.step import StepContext, StepResult, TrainState


@dataclass(frozen=True)
class Collaborators:
    """The objects that the loop works with; `job` makes them."""

    context: StepContext
    record: Callable[[Event], None]
    """Takes an event that all ranks know alike. It is written once for all, by rank 0."""
    evaluate: Callable[[nn.Module, int], Iterable[EvalDone]]
    """Scores the model of a step on every held-out set. Collective."""
    checkpointer: Checkpointer


def by_main(world: World, log: EventLog) -> Callable[[Event], None]:
    """`Collaborators.record` for ranks that stay the same."""
    return log.append if world.is_main else lambda event: None


def train(state: TrainState, collaborators: Collaborators) -> bool:
    """Train from `state.step` to the end of the budget.

    Returns False if a stop was requested before the end; the state is then saved. Raises NumericsError if the loss or
    gradient of a step is not finite twice, CheckpointError if saving keeps failing.
    """
    members = collaborators.context.members
    while True:
        interrupted = members.meet(state)
        try:
            return train_together(state, collaborators, interrupted)
        except Exception as error:
            # Where the members of a step may change, those that are left meet again and go on from where they are.
            if not members.outlive(error):
                raise


def train_together(state: TrainState, collaborators: Collaborators, interrupted: bool) -> bool:
    """Train with the members that have met. `interrupted`: what follows the step of `state` may not all be done."""
    context, checkpointer = collaborators.context, collaborators.checkpointer
    steps = context.config.budget.steps
    # A stop signal may have come while the data were prepared: then no step is begun.
    stop = context.any_stop_requested()
    if interrupted:
        follow_up(state, collaborators, stop)
    while state.step < steps and not stop:
        stop = take_step(state, collaborators)
        follow_up(state, collaborators, stop)
    # The newest state must be durable before the run may call itself finished or preempted.
    checkpointer.finish(state)
    return state.step == steps


def follow_up(state: TrainState, collaborators: Collaborators, stop: bool) -> None:
    """After a step: evaluate and begin a save, if they are due. `stop`: training ends here."""
    config, members = collaborators.context.config, collaborators.context.members
    steps = config.budget.steps
    if due(state.step, config.eval.every_steps, steps):
        members.once("evaluation", lambda: evaluate(state, collaborators))
    every = config.checkpoint.memory_every_steps
    if every and state.step % every == 0 and state.step < steps and not stop:  # at the end, the disk gets the state
        collaborators.checkpointer.keep(state)
    if stop or due(state.step, config.checkpoint.every_steps, steps):
        # Copies the state and returns; a thread writes it beside the next steps.
        members.once("save", lambda: collaborators.checkpointer.save(state))
    collaborators.checkpointer.poll()


def evaluate(state: TrainState, collaborators: Collaborators) -> None:
    for scored in collaborators.evaluate(state.model, state.step):
        collaborators.record(scored)


def due(step: int, every: int, last: int) -> bool:
    """True after the last step, and after each step that `every` divides; `every` = 0 means only the last."""
    return step == last or (every > 0 and step % every == 0)


def take_step(state: TrainState, collaborators: Collaborators) -> bool:
    """Take one step: it is applied on every rank or on none. Returns True if any rank received a stop signal."""
    context, started = collaborators.context, time.perf_counter()
    config = context.config
    # Only what the step's members commit is applied.
    result = context.members.commit(state.step, lambda members: finite_gradients(state, collaborators, members))
    rate = optim.set_learning_rates(state.optimizers, state.step, config.optim, config.budget.steps)
    # Between these two phases the ranks do not communicate. A rank that dies here leaves no half-applied step behind:
    # each of the others has the sums of all, and all start again from a checkpoint, or all apply the step and go on.
    context.hook(Phase.BEFORE_UPDATE, state.step)
    step.apply(state)
    context.hook(Phase.AFTER_UPDATE, state.step)
    collaborators.record(
        StepDone(
            step=state.step,
            loss=result.loss,
            grad_norm=result.norm,
            learning_rate=rate,
            tokens=config.data.micro_batches * config.data.micro_batch_sequences * config.model.context,
            seconds=time.perf_counter() - started,
            samples=result.samples,
            redone=result.redone,
            flushed=result.flushed,
        )
    )
    context.members.applied(state.step, result.change)
    return result.stop


def finite_gradients(state: TrainState, collaborators: Collaborators, members: StepMembers) -> StepResult:
    """Return the step's result; its loss and gradient norm are finite.

    A step is a function of the config, so a value that is finite when computed again was a fault of the machine, and
    training continues. Raises NumericsError with the place of the first non-finite value if it is not.
    """
    for trial in range(2):
        result = step.compute_gradients(state, collaborators.context, members)
        step.clip_gradients(state, result.norm, collaborators.context.config.optim.clip_norm)
        # Loss and norm are the same bits on all ranks, so all ranks decide alike.
        if math.isfinite(result.loss) and math.isfinite(result.norm):
            return result
        collaborators.record(NotFinite(step=state.step + 1, loss=result.loss, grad_norm=result.norm, trial=trial))
        members = members.anew()
    raise NumericsError(
        f"step {state.step + 1}: loss or gradient is not finite, also when computed again. It was not applied.\n"
        f"  First not finite: {step.find_not_finite(state, collaborators.context, members)}.\n"
        "  Inspect these samples, or lower optim.learning_rate in a new run."
    )
