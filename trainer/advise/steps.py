"""The calls of a step: of one that is taken and timed, or of a forward and backward pass without data."""

import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from trainer import config as configs
from trainer import costs, model, step
from trainer.advise.calls import Call, Recorder, Seen
from trainer.config import Config
from trainer.errors import NumericsError
from trainer.hunt.burnin import Sweep
from trainer.phases import Phase

if TYPE_CHECKING:
    from trainer.advise.rates import Rates

MICRO_BATCHES = 2  # of the step that is taken, unless told otherwise: with one there would be no sums
SAMPLES = 3
MOST_STEPS = 12
"""A step whose sums do not fit their grid is computed again; such ones are not timed."""


@dataclass
class Step:
    """Calls by key, and once they are timed, what each takes."""

    calls: dict[str, Seen]
    micro_batches: int
    """Number of micro-batches that the calls of phase "micro_batch" are of."""
    overhead: float = 0.0
    alone: dict[str, float] = field(default_factory=dict)
    """Seconds of each call, alone."""

    def timed(self, rates: "Rates") -> "Step":
        """Return the step with its calls timed."""
        alone = {key: rates.seconds(key, seen.call) for key, seen in self.calls.items()}
        return Step(self.calls, self.micro_batches, rates.overhead or 0.0, alone)

    def calls_made(self, micro_batches: int) -> float:
        return sum(self._counts(seen, micro_batches) for seen in self.calls.values())

    def seconds(self, micro_batches: int) -> float:
        """Predicted seconds of a step of so many micro-batches."""
        return self.seconds_per("micro_batch") * micro_batches + self.seconds_per("step")

    def seconds_per(self, phase: str) -> float:
        """Predicted seconds of one micro-batch, or of what a step does once."""
        total = sum(seen.counts.get(phase, 0) * (self.alone[key] + self.overhead) for key, seen in self.calls.items())
        return total / (self.micro_batches if phase == "micro_batch" else 1)

    def by_operator(self, micro_batches: int) -> list[dict[str, Any]]:
        """Predicted and measured seconds of each operator in a step; the longest first."""
        found: dict[str, dict[str, Any]] = {}
        for key, seen in self.calls.items():
            row = found.setdefault(
                seen.call.operator,
                {"operator": seen.call.operator, "calls": 0.0, "predicted": 0.0, "measured": 0.0, "bytes": 0.0},
            )
            count = self._counts(seen, micro_batches)
            row["calls"] += count
            row["bytes"] += count * seen.call.bytes
            row["predicted"] += count * self.alone[key]
            row["measured"] += sum(seen.seconds.values()) * count / sum(seen.counts.values())
        return sorted(found.values(), key=lambda row: -row["predicted"])

    @property
    def timed_calls(self) -> Iterable[tuple[Call, float, float]]:
        """Yield (call, how often in a micro-batch, seconds) of the calls of a micro-batch."""
        for key, seen in self.calls.items():
            if count := seen.counts.get("micro_batch", 0):
                yield seen.call, count / self.micro_batches, self.alone[key]

    def _counts(self, seen: Seen, micro_batches: int) -> float:
        once = seen.counts.get("step", 0)
        return seen.counts.get("micro_batch", 0) * micro_batches / self.micro_batches + once


@dataclass(frozen=True)
class Timed:
    """A step that was taken."""

    step: Step
    micro_batches: int
    seconds: float
    """The median over `samples` steps."""
    samples: list[float]


class _Phases:
    """Tells the recorder in which phase the step is, and counts the micro-batches."""

    def __init__(self) -> None:
        self.recorder: Recorder | None = None
        self.micro_batches = 0

    def __call__(self, phase: str, step: int) -> None:
        starts = phase == Phase.BEFORE_FORWARD
        self.micro_batches += starts
        if self.recorder is not None and (starts or phase == Phase.BEFORE_REDUCE):
            self.recorder.phase = "micro_batch" if starts else "step"


def take(config: Config, device: torch.device, micro_batches: int = MICRO_BATCHES) -> Timed:
    """Take steps of the config's model on made-up tokens: some are timed, one is recorded."""
    config = _alone(config, micro_batches)
    phases = _Phases()
    sweep = Sweep(config, device, phases)
    sweep.take_step()  # the first one computes what is computed once
    for _ in range(MOST_STEPS):
        phases.micro_batches, phases.recorder = 0, Recorder(lambda: _wait_for(device))
        with phases.recorder as recorder:
            sweep.take_step()
        phases.recorder = None
        if phases.micro_batches == micro_batches:
            break
    else:
        raise _always_again()
    samples = [_seconds(sweep, phases, micro_batches, device) for _ in range(SAMPLES)]
    return Timed(Step(recorder.seen, micro_batches), micro_batches, statistics.median(samples), samples)


def in_turn(
    compared: Sequence[Config], micro_batches: Sequence[int], device: torch.device, rounds: int
) -> list[list[float]]:
    """Seconds of steps of several configs, taken in turn: for each round, one of each. First steps are not timed."""
    phases = [_Phases() for _ in compared]
    sweeps = [
        Sweep(_alone(config, number), device, phase)
        for config, number, phase in zip(compared, micro_batches, phases, strict=True)
    ]
    for sweep in sweeps:
        sweep.take_step()
    return [[_seconds(*one, device) for one in zip(sweeps, phases, micro_batches, strict=True)] for _ in range(rounds)]


def _seconds(sweep: Sweep, phases: _Phases, micro_batches: int, device: torch.device) -> float:
    """Seconds of the next step that is computed once."""
    for _ in range(MOST_STEPS):
        phases.micro_batches, began = 0, time.perf_counter()
        sweep.take_step()
        _wait_for(device)
        took = time.perf_counter() - began
        if phases.micro_batches == micro_batches:
            return took
    raise _always_again()


def _always_again() -> NumericsError:
    return NumericsError(
        f"each of {MOST_STEPS} steps was computed again, since its sums did not fit their grid.\n"
        "  A step is timed only if it is computed once. Lower optim.learning_rate."
    )


def _alone(config: Config, micro_batches: int) -> Config:
    """The config of a step on one rank, without what watches it."""
    return config.model_copy(
        update={
            "data": config.data.model_copy(update={"micro_batches": micro_batches}),
            "faults": (),
            "numerics": config.numerics.model_copy(update={"compile": False}),
            "parallel": config.parallel.model_copy(update={"strategy": "replicate"}),
            "sentinel": configs.Sentinel(),
        }
    )


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def trace(config: Config, device: torch.device) -> Step:
    """Return the calls of the forward and backward pass of one micro-batch, which is not computed."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    rows = costs.padded_vocab(costs.vocabulary(config)[0], config.model.vocab_size)
    recorder = Recorder()
    recorder.phase = "micro_batch"
    with FakeTensorMode():
        made = model.construct(config.model, rows, str(device), recompute=config.parallel.activation_checkpointing)
        shape = (config.data.micro_batch_sequences, config.model.context)
        tokens_BT = torch.zeros(shape, dtype=torch.int64, device=device)
        with recorder:
            with step.autocast(config, device):
                objective, _ = made(tokens_BT, tokens_BT)
            objective.backward()
    return Step(recorder.seen, 1)
