"""The figure of scripts/bench about advice: steps predicted and measured, and the best proposal beside its config."""

import statistics
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from trainer import advise
from trainer import config as configs
from trainer.advise import steps
from trainer.show import units

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ("gpt_tiny", "gpt2_baseline", "modern")
OVERRIDES = ["numerics.threads=2"]
ROUNDS = 2


def figure(kept: Mapping[str, Any], keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Advice on each config, and its best proposal, measured in turn with the config itself.

    `keep` gets the rows after each config; an interrupted figure goes on from those that were `kept`. The machine is
    measured anew: what an earlier command kept may come from a busy hour.
    """
    rows = {name: kept[name] for name in CONFIGS if name in kept}
    if len(rows) == len(CONFIGS):
        rows = {}  # a whole figure is measured again
    with tempfile.TemporaryDirectory() as cache:
        for name in CONFIGS:
            if name not in rows:
                rows[name] = _one(name, cache)
                keep(rows)
                print(f"{name}: {rows[name]['seconds']:.0f} s of advice", flush=True)
    return rows


def _one(name: str, cache: str) -> dict[str, Any]:
    path = ROOT / "configs" / f"{name}.toml"
    tree = advise.advise(path, [*OVERRIDES, f'data.cache_dir="{cache}"'], print)
    found = {key: tree[key] for key in ("step", "mfu", "share_of_best", "seconds")}
    found["operators"] = tree["operators"][:8]
    if not tree["proposals"]:
        return found | {"proposal": None}
    best = tree["proposals"][0]
    ours, other = configs.load(path, OVERRIDES), configs.load(path, [*OVERRIDES, *best["set"]])
    ratios = _gains(ours, other)
    return found | {"proposal": best, "measured_tokens_gain": statistics.median(ratios), "ratios": ratios}


def _gains(ours: configs.Config, other: configs.Config) -> list[float]:
    """Return the speed-up per token of `other`, by round, in steps that are taken in turn."""
    numbers = [ours.data.micro_batches, other.data.micro_batches]
    if all(number >= 4 and number % 2 == 0 for number in numbers):
        numbers = [number // 2 for number in numbers]  # the same share of what a step does once, in half the time
    tokens = [
        number * config.data.micro_batch_sequences * config.model.context
        for number, config in zip(numbers, (ours, other), strict=True)
    ]
    taken = steps.in_turn([ours, other], numbers, torch.device("cpu"), ROUNDS)
    return [(mine / tokens[0]) / (theirs / tokens[1]) for mine, theirs in taken]


def table(found: dict[str, Any]) -> list[str]:
    columns = ("config", "predicted ms", "measured ms", "ratio", "most off", "MFU", "products, share of best",
               "best proposal", "tokens/s predicted", "measured")  # fmt: skip
    lines = [
        "",
        "Advice on shapes (`scripts/bench advise`), 2 threads: a step of 2 micro-batches as predicted from operators "
        "timed alone and as measured, and the best proposal at equal parameters or FLOPs, run in turn with its config, "
        "each with half of its step's micro-batches where both have an even number of at least four, else with all.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for name in [name for name in CONFIGS if name in found]:
        row, step, best = found[name], found[name]["step"], found[name]["proposal"]
        proposed = ["none", "–", "–"]
        if best is not None:
            proposed = [best["what"], f"{best['tokens_gain']:.2f}×", f"{row['measured_tokens_gain']:.2f}×"]
        times = [f"{1e3 * step[side]:,.1f}" for side in ("predicted", "measured")]
        off = ", ".join(step["off"]) or "none: within 15 %"
        shares = [f"{row['mfu']['value']:.2f}", units.known(row["share_of_best"], ".2f")]
        cells = [f"`{name}`", *times, f"{step['ratio']:.2f}", off, *shares, *proposed]
        lines.append(f"| {' | '.join(cells)} |")
    return lines
