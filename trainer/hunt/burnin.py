"""This machine's operators, held against references before a run starts: the config's own calls, and hard cases.

Three parts on every device: steps of the config's model on made-up tokens, in its shapes, each call checked; a set of
known-hard cases, each call checked; then both again and again until the time is over: equal calls must give equal bits.
"""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from trainer import config as configs
from trainer import costs, job, optim, provenance, step
from trainer.config import Config
from trainer.data import Batches
from trainer.hunt.hard_cases import hard_cases
from trainer.parallel.world import AllRanks, StepMembers, World, pick_device
from trainer.phases import Hook, no_hook
from trainer.sentinel.operator_check import OperatorCheck, Tally, digest
from trainer.step import StepContext, TrainState

if TYPE_CHECKING:
    from rich.console import Group

MICRO_BATCHES = 2  # enough for every shape of a step, and for sums over micro-batches
CHECKED_LOGITS = 2**26
"""Largest number of logits in a micro-batch that are checked: a call takes several times 8 bytes for each."""


def burn_in(config: Config, minutes: float, log: Callable[[str], None]) -> dict[str, Any]:
    """Check every device of this machine that the config may use; return the report as a tree.

    Raises WorldError if the config asks for a device that is not there.
    """
    began = time.time()
    devices = devices_of(config)
    config, notes = swept(config)
    found = [_check(config, device, 60 * minutes / len(devices), log) for device in devices]
    return {
        "time": began,
        "seconds": time.time() - began,
        "passed": all(device["passed"] for device in found),
        "model": configs.flatten(config.model.model_dump(mode="json", by_alias=True)),
        "precision": config.numerics.precision,
        "notes": notes,
        "devices": found,
    }


def devices_of(config: Config) -> list[torch.device]:
    device = pick_device(config.parallel)
    if device.type == "cpu":
        return [device]
    return [torch.device("cuda", number) for number in range(torch.cuda.device_count())]


def swept(config: Config) -> tuple[Config, list[str]]:
    """The config of the checked steps, and what about it differs from the given one in what is computed."""
    notes = []
    logits_of_one = config.model.context * costs.padded_vocab(costs.vocabulary(config)[0], config.model.vocab_size)
    sequences = min(config.data.micro_batch_sequences, max(1, CHECKED_LOGITS // logits_of_one))
    if sequences < config.data.micro_batch_sequences:
        notes.append(
            f"checked with {sequences} instead of {config.data.micro_batch_sequences} sequences in a micro-batch: "
            "references need the memory"
        )
    if config.numerics.compile:
        notes.append("checked without numerics.compile: what the compiler makes has no references")
    data = config.data.model_copy(update={"micro_batches": MICRO_BATCHES, "micro_batch_sequences": sequences})
    parts = {
        "data": data,
        "faults": (),
        "numerics": config.numerics.model_copy(update={"compile": False}),
        "parallel": config.parallel.model_copy(update={"strategy": "replicate"}),
        "sentinel": configs.Sentinel(),
    }
    return config.model_copy(update=parts), notes


def _check(config: Config, device: torch.device, seconds: float, log: Callable[[str], None]) -> dict[str, Any]:
    """Check one device for so long."""
    job.set_numerics(config, device)
    deadline = time.monotonic() + seconds
    tallies: dict[str, Tally] = {}
    failures: list[dict[str, Any]] = []
    check = OperatorCheck(keep=1)
    log(f"{device}: the config's own calls")
    sweep = Sweep(config, device)
    sweep.run(check)
    _collect(tallies, failures, check, "the config's own steps")
    unchecked = [{"operator": name, "why": why, "calls": calls} for (name, why), calls in check.unchecked.items()]
    products = torch.bfloat16 if config.numerics.precision == "bf16" else torch.float32
    cases: list[tuple[str, Callable[[], Sequence[Tensor]]]] = list(hard_cases(device, products))
    log(f"{device}: {len(cases)} hard cases")
    for name, case in cases:
        hard = OperatorCheck(keep=1)
        with hard:
            case()
        _collect(tallies, failures, hard, name)
    repeats, differing = _repeat([("the gradients of a step", sweep.gradients), *cases], deadline)
    log(f"{device}: {repeats} repeats")
    return {
        "device": str(device),
        "computes_with": provenance.computes_with(config, device),
        "passed": not failures and not differing,
        "operators": [
            {
                "operator": name,
                "calls": t.calls,
                "failed": t.failed,
                "worst": t.worst if math.isfinite(t.worst) else None,
                "shapes": len(t.shapes),
            }
            for name, t in sorted(tallies.items(), key=lambda item: -item[1].worst)
        ],
        "failures": failures,
        "unchecked": unchecked,
        "cases": len(cases),
        "repeats": repeats,
        "differing": differing,
    }


def _collect(tallies: dict[str, Tally], failures: list[dict[str, Any]], check: OperatorCheck, where: str) -> None:
    for name, seen in check.tallies.items():
        tally = tallies.setdefault(name, Tally())
        tally.calls += seen.calls
        tally.failed += seen.failed
        tally.worst = max(tally.worst, seen.worst)
        tally.shapes += seen.shapes
    failures += [
        {
            "where": where,
            "operator": failure.operator,
            "arguments": failure.shape,
            "place": failure.place,
            "found": f"{failure.found:.9g}",
            "expected": f"{failure.expected:.9g}",
            "excess": failure.excess if math.isfinite(failure.excess) else None,
            "wrong": failure.wrong,
            "entries": failure.entries,
        }
        for failure in check.failures
    ]


class Sweep:
    """Steps of a config's model on made-up tokens."""

    def __init__(self, config: Config, device: torch.device, hook: Hook = no_hook) -> None:
        vocabulary = costs.padded_vocab(costs.vocabulary(config)[0], config.model.vocab_size)
        world, count, context = World(0, 1, device), config.data.micro_batches, config.model.context
        sequences = config.data.micro_batch_sequences
        length = max(2, 4 * count * sequences) * context + 1
        tokens = np.random.default_rng(config.seed).integers(0, vocabulary, length)
        batches = Batches(tokens, seed=config.seed, context=context, micro_batches=count, sequences=sequences)
        self._state: TrainState = job.build(config, vocabulary, world)
        self._context = StepContext(config, AllRanks(world, count), batches, hook)

    def run(self, check: AbstractContextManager[Any]) -> None:
        """Take a step, then another one and a forward pass without gradients inside `check`.

        Projections may start at zero: after two updates no gradient is zero throughout.
        """
        for context in (nullcontext(), nullcontext(), check):
            with context:
                self.take_step()
        batch = self._context.batches.micro_batch(0, 0)
        ids = (torch.from_numpy(part).to(self._context.world.device) for part in (batch.inputs, batch.targets))
        with torch.no_grad(), step.autocast(self._context.config, self._context.world.device), check:
            self._state.model.eval()(*ids)
        self._state.model.train()

    def gradients(self) -> list[Tensor]:
        """Gradients of the next step, which is not taken."""
        self._compute()
        return [gradient for _, gradient, _ in self._state.sharding.gradients()]

    def _compute(self) -> step.StepResult:
        members = StepMembers(self._context.world, range(self._context.config.data.micro_batches))
        return step.compute_gradients(self._state, self._context, members)

    def take_step(self) -> None:
        """Compute the gradients of a step and apply them."""
        config = self._context.config
        step.clip_gradients(self._state, self._compute().norm, config.optim.clip_norm)
        optim.set_learning_rates(self._state.optimizers, 0, config.optim, config.budget.steps)
        step.apply(self._state)


def _repeat(cases: Sequence[tuple[str, Callable[[], Sequence[Tensor]]]], deadline: float) -> tuple[int, list[str]]:
    """Compute all cases again until the deadline, once at least; return (how often, names of those that differ)."""
    first = {name: digest(case()) for name, case in cases}
    differing: dict[str, None] = {}
    repeats = 0
    while not repeats or time.monotonic() < deadline:
        for name, case in cases:
            if digest(case()) != first[name]:
                differing[name] = None
        repeats += 1
    return repeats, list(differing)


def terminal(tree: Mapping[str, Any]) -> "Group":
    """Return the report for a terminal."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    parts: list[Any] = []
    for device in tree["devices"]:
        table = Table(title=f"{device['device']}, {device['computes_with']['device model']}", title_justify="left")
        for name in ("operator", "calls", "wrong", "error / tolerance"):
            table.add_column(name, justify="left" if name == "operator" else "right")
        for row in device["operators"][:12]:
            table.add_row(row["operator"], str(row["calls"]), str(row["failed"]), excess(row["worst"]))
        parts.append(table)
        parts += [Text(line) for line in lines_of(device)]
    return Group(*parts, *map(Text, tree["notes"]), Text("pass" if tree["passed"] else "fail"))


def excess(times: float | None) -> str:
    """An error as a multiple of its tolerance; None is infinite."""
    return "infinite" if times is None else f"{times:.3g}"


def lines_of(device: Mapping[str, Any]) -> list[str]:
    """Describe in sentences what was found on a device."""
    calls = sum(row["calls"] for row in device["operators"])
    lines = [
        f"{len(device['operators'])} operators, {calls} calls and {device['cases']} hard cases checked; "
        f"repeated {device['repeats']} times, {len(device['differing'])} cases with other bits."
    ]
    for name in device["differing"]:
        lines.append(f"other bits when computed again: {name}")
    for failure in device["failures"]:
        lines.append(
            f"wrong: {failure['operator']} of {failure['arguments']} in {failure['where']}: {failure['found']} instead "
            f"of {failure['expected']}, error / tolerance {excess(failure['excess'])}, "
            f"{failure['wrong']} of {failure['entries']} entries"
        )
    if device["unchecked"]:
        named = sorted({entry["operator"] for entry in device["unchecked"]})
        lines.append(f"not checked: {', '.join(named)}")
    return lines
