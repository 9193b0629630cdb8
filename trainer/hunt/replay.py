"""A run's steps, computed again in one process: the same function of the config, so the same bits as in the log.

The ranks of the run are played in turn: a micro-batch is computed as its rank computed it. A plan of faults may have
made operators wrong on purpose; then they are wrong here too, as they would be on a machine that computes wrong.
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from trainer import architectures, branch, checkpoint, job, optim, provenance, step
from trainer import config as configs
from trainer.checkpoint.files import Saved
from trainer.data import prepare
from trainer.errors import NoCheckpointError, UsageError
from trainer.job import Machine
from trainer.log import events, rundir
from trainer.parallel.world import AllRanks, StepMembers, World, pick_device
from trainer.phases import Phase
from trainer.sentinel.operator_check import OperatorCheck
from trainer.step import StepContext, TrainState


@dataclass(frozen=True)
class Taken:
    """A step as it came out."""

    step: int
    loss: float
    grad_norm: float
    redone: int

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class StepNotReachedError(UsageError):
    """A step before the one that was asked for cannot be computed."""


class Replay:
    """The steps of a run. Raises an error that says what would differ where they cannot be computed again."""

    def __init__(self, run: Path, log: Callable[[str], None]) -> None:
        contents = rundir.read(run)
        config = rundir.config_of(run)
        _refuse(run, config)
        device = pick_device(config.parallel)
        job.set_numerics(config, device)
        own = provenance.computes_with(config, device)
        if other := provenance.compare(run, contents, [own], accept=True):
            raise UsageError(
                f"{run} was computed with something else than this process uses:\n"
                + "".join(f"    {line}\n" for line in other)
                + "  A replay would have other bits, and show what this machine does. Hunt where it was computed, with "
                "the same code and torch."
            )
        log("opening the data")
        prepared = prepare(config.data, config.eval, config.model.context)
        if prepared.sha256 != contents["data_sha256"]:
            raise UsageError(
                f"{run} was trained on data {contents['data_sha256'][:16]}…, and {config.data.source!r} now holds "
                f"{prepared.sha256[:16]}….\n  Restore the files: a replay needs them."
            )
        parts = {"parallel": config.parallel.model_copy(update={"strategy": "replicate"})}
        self.run, self.config = run, config.model_copy(update=parts)
        self.ranks = _ranks_of(run)
        self.saved = checkpoint.committed(run)
        self._log, self._contents, self._vocabulary = log, contents, rundir.fact(run, "vocab_size")
        self._tokenizer = prepared.tokenizer
        self._world = World(0, 1, device)
        self._machine = job.machine_of(config, run)
        # A mode costs time in every call, also one that changes nothing.
        self._computing = self._machine if self._machine.planned else nullcontext()
        self._batches = job.batches_of(self.config, prepared)
        self._score = job.scorer(self.config, prepared, lambda: self._world)
        self._check: OperatorCheck | None = None
        self._micro_batch = -1
        self.state: TrainState | None = None

    @property
    def planted(self) -> bool:
        """True if operators are wrong on purpose."""
        return bool(self._machine.planned)

    @property
    def can_begin(self) -> bool:
        """True if the state of step 0 can be made anew: the run did not go on from a state of another one."""
        return "parent" not in self._contents

    def before(self, number: int, again: bool = False) -> TrainState:
        """Return the state from which step `number` was computed. With `again`, from its checkpoint on."""
        if again:
            self.state = None
        held = -1 if self.state is None else self.state.step
        start = next((saved for saved in self.saved if saved.step < number and _intact(saved)), None)
        if self.state is None or held >= number or (start is not None and start.step > held):
            self.state = job.build(self.config, self._vocabulary, self._world)
            self.state.moments_from = branch.moments_from(self._contents.get("parent"))
            if start is None and not self.can_begin:
                raise StepNotReachedError(
                    f"{self.run} began from a state of another run, and step {number} comes before its first "
                    "checkpoint.\n  Hunt in a later step, or in the run that it began from."
                )
            if start is None and self.config.init_from:
                architectures.begin(self.config, self._vocabulary, self._tokenizer, self.state.model)
            if start is not None:
                checkpoint.load(start, self.state.tensors())
                self.state.restored(start.step)
        if self.state.step < number - 1:
            self._log(f"computing what lies between step {self.state.step} and step {number} again")
        while self.state.step < number - 1:
            if not self.take().finite:
                raise StepNotReachedError(
                    f"step {self.state.step + 1} of {self.run} is not finite here, so step {number} is not reached.\n"
                    f"  Hunt from that step: --step {self.state.step + 1}."
                )
        return self.state

    def take(self, check: OperatorCheck | None = None) -> Taken:
        """Compute the next step under `check`; apply it if it is finite."""
        state = self.state
        assert state is not None
        everyone = AllRanks(self._world, self.config.data.micro_batches)
        context = StepContext(self.config, everyone, self._batches, self._hook)
        members = StepMembers(self._world, range(self.config.data.micro_batches))
        number, self._check, self._micro_batch = state.step + 1, check, -1
        with self._computing, check or nullcontext():
            result = step.compute_gradients(state, context, members)
            step.clip_gradients(state, result.norm, self.config.optim.clip_norm)
            taken = Taken(number, result.loss, result.norm, result.redone)
            if taken.finite:
                optim.set_learning_rates(state.optimizers, state.step, self.config.optim, self.config.budget.steps)
                step.apply(state)
        return taken

    def gradient(self, index: int, rank: int, check: OperatorCheck | None = None) -> Tensor:
        """Gradient of a micro-batch of the next step, as a rank computes it: flat. The state stays as it is."""
        state = self.state
        assert state is not None
        context = StepContext(self.config, AllRanks(self._world, self.config.data.micro_batches), self._batches)
        state.sharding.zero_gradients()
        self._machine.play(rank, state.step + 1)
        with self._computing, check or nullcontext():
            step.backward(state, context, index, context.feed.take(state.step, index))
        return torch.cat([gradient.reshape(-1) for _, gradient, _ in state.sharding.gradients()])

    def score(self, name: str, check: OperatorCheck | None = None) -> float:
        """Loss of the state on a held-out set."""
        state = self.state
        assert state is not None
        self._machine.play(0, state.step)
        if check is not None:
            check.where = "evaluation"
        with self._computing, check or nullcontext():
            return next(scored.loss for scored in self._score(state.model, state.step) if scored.set == name)

    def machine_at(self, number: int, place: str) -> Machine:
        """The machine as it computed a step at a place: "rank 1", or what all ranks do alike."""
        self._machine.play(int(place.removeprefix("rank ")) if place.startswith("rank ") else 0, number)
        return self._machine

    def _hook(self, phase: str, completed: int) -> None:
        """Play the rank of the micro-batch that begins; of what all ranks do alike, play rank 0."""
        if phase == Phase.BEFORE_FORWARD:
            self._micro_batch += 1
            self._play(self._micro_batch % self.ranks, completed + 1, "rank")
        elif phase == Phase.BEFORE_REDUCE:
            self._micro_batch = -1
            self._play(0, completed + 1, "update")

    def _play(self, rank: int, number: int, where: str) -> None:
        self._machine.play(rank, number)
        if self._check is not None:
            self._check.where = f"rank {rank}" if where == "rank" else where


def _intact(saved: Saved) -> bool:
    return not checkpoint.verify(saved)


def _ranks_of(run: Path) -> int:
    starts = events.select(events.read(run), events.AttemptStarted)
    return starts[0][1].world_size if starts else 1


def _refuse(run: Path, config: configs.Config) -> None:
    """Raise an error for a run whose steps cannot be computed again, or whose operators cannot be seen."""
    if not checkpoint.committed(run):
        raise NoCheckpointError(
            f"{run} has no checkpoint.\n"
            "  A hunt computes steps again from one. Let the run save: checkpoint.every_steps."
        )
    if config.numerics.compile:
        raise UsageError(
            f"{run} was trained with numerics.compile: fused kernels have no references, and without fusing the bits "
            "are others.\n  Hunt in a run of the same config with numerics.compile = false."
        )
    if config.islands.count:
        raise UsageError(
            f"{run} was trained with islands, and a replay computes one set of weights.\n"
            "  Hunt in a run of the same config without [islands]."
        )
    if not config.numerics.exact:
        raise UsageError(
            f"{run} was trained with numerics.exact = false: its sums depend on their order, so its steps cannot be "
            "computed again.\n  Hunt in a run with exact sums."
        )
