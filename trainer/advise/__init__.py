"""Shapes that this machine likes: where a step's time goes, and which changes at equal size would make it faster."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer import config as configs
from trainer import costs, job, provenance
from trainer.advise import proposals
from trainer.advise.rates import Rates
from trainer.advise.steps import Step, Timed, take
from trainer.config import Config
from trainer.parallel.world import pick_device
from trainer.show import utilisation

NEAR = 0.15
"""A prediction within this share of the measured time holds; beyond it the report says which operators are off."""


def advise(path: Path, overrides: Sequence[str], log: Callable[[str], None]) -> dict[str, Any]:
    """Return the report as a tree. Raises ConfigError, and WorldError if the config's device is not there."""
    began, config = time.time(), configs.load(path, overrides)
    device = pick_device(config.parallel)
    job.set_numerics(config, device)
    rates = Rates.open(config, device)
    log(f"what this machine's operators take: {rates.path}")
    rates.prepare(config.numerics.precision, log)
    log("a step of the config")
    taken = take(config, device)
    log(f"{len(taken.step.calls)} different calls of operators, each alone")
    step = taken.step.timed(rates)
    rows = costs.padded_vocab(costs.vocabulary(config)[0], config.model.vocab_size)
    tree = {
        "time": began,
        "config": str(path),
        "overrides": list(overrides),
        "model": configs.flatten(config.model.model_dump(mode="json", by_alias=True)),
        "precision": config.numerics.precision,
        "computes_with": provenance.computes_with(config, device),
        "machine": {
            "copy_bytes_per_second": rates.copy_bytes_per_second,
            "best_flops_per_second": rates.best(config.numerics.precision),
            "seconds_per_call": rates.overhead,
        },
        **_compared(config, rows, taken, step, rates),
        "matrix_products": matrix_products(step, rates, config.numerics.precision),
    }
    tree["share_of_best"] = share_of_best(tree["matrix_products"])
    log("other shapes of the same size")
    tree["proposals"] = proposals.propose(path, overrides, config, step, rates, log)
    rates.save()
    tree["seconds"] = time.time() - began
    return tree


def _compared(config: Config, rows: int, taken: Timed, step: Step, rates: Rates) -> dict[str, Any]:
    """Predicted time against measured time: of the step that was taken, and of each operator inside it."""
    measured, predicted = taken.seconds, step.seconds(taken.micro_batches)
    operators = step.by_operator(taken.micro_batches)
    off = sorted(operators, key=lambda row: -abs(row["predicted"] - row["measured"]))
    tokens = config.data.micro_batch_sequences * config.model.context
    full = step.seconds(config.data.micro_batches)
    flops = costs.flops_per_token(config.model, rows) + costs.teaching_flops(config, rows)
    best = rates.best(config.numerics.precision)
    about = {"computes_with": provenance.computes_with(config, rates.device), "flops_per_token": flops,
             "config": {"numerics": {"precision": config.numerics.precision}}}  # fmt: skip
    peak = utilisation.known(about)[1]
    rate = flops * tokens * taken.micro_batches / measured
    return {
        "step": {
            "micro_batches": taken.micro_batches, "predicted": predicted, "measured": measured,
            "samples": taken.samples, "ratio": predicted / measured, "near": abs(predicted / measured - 1) <= NEAR,
            "off": [row["operator"] for row in off[:3]] if abs(predicted / measured - 1) > NEAR else [],
        },
        "full_step": {"micro_batches": config.data.micro_batches, "predicted": full,
                      "tokens_per_second": tokens * config.data.micro_batches / full},
        "flops_per_second": rate,
        "mfu": {"value": rate / (peak or best), "peak": peak or best,
                "source": "data sheet" if peak else "the fastest matrix product that was measured here"},
        "operators": operators,
    }  # fmt: skip


def matrix_products(step: Step, rates: Rates, precision: str) -> list[dict[str, Any]]:
    """Each matrix product of a micro-batch: its rate, and the best one at no more than twice its size, if any."""
    found = []
    for call, count, seconds in step.timed_calls:
        if call.product is None or not seconds:
            continue
        batch, m, n, k = call.product
        found.append(
            {"operator": call.operator, "batch": batch, "m": m, "n": n, "k": k, "calls": count, "seconds": seconds,
             "flops_per_second": call.flops / seconds, "best": rates.best(precision, call.flops) or None}
        )  # fmt: skip
    return sorted(found, key=lambda row: -row["calls"] * row["seconds"])


def share_of_best(products: Sequence[Mapping[str, Any]]) -> float | None:
    """Time that the matrix products would take at the best rates of their sizes, divided by the time they take.

    Those without a best are left out: the grid has none so small. None if no other is left.
    """
    rated = [row for row in products if row["best"]]
    taken = sum(row["calls"] * row["seconds"] for row in rated)
    at_best = sum(row["calls"] * row["seconds"] * min(1.0, row["flops_per_second"] / row["best"]) for row in rated)
    return at_best / taken if taken else None
