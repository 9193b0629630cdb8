"""The figure of scripts/bench about advice: steps predicted and measured, and the best proposal beside its config."""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch

from trainer import advise
from trainer import config as configs
from trainer.advise import steps
from trainer.show import units

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = ("gpt2_baseline", "modern", "gpt_tiny")
OVERRIDES = ["numerics.threads=2"]


def figure() -> dict[str, Any]:
    """Advice on each config, and its best proposal, measured in turn with the config itself.

    The machine is measured anew: what an earlier command kept may come from a busy hour.
    """
    with tempfile.TemporaryDirectory() as cache:
        return {name: _one(name, cache) for name in CONFIGS}


def _one(name: str, cache: str) -> dict[str, Any]:
    path = ROOT / "configs" / f"{name}.toml"
    tree = advise.advise(path, [*OVERRIDES, f'data.cache_dir="{cache}"'], print)
    found = {key: tree[key] for key in ("step", "mfu", "share_of_best", "seconds")}
    found["operators"] = tree["operators"][:8]
    if not tree["proposals"]:
        return found | {"proposal": None}
    best = tree["proposals"][0]
    ours, other = configs.load(path, OVERRIDES), configs.load(path, [*OVERRIDES, *best["set"]])
    device = torch.device("cpu")
    ratios = [_token_seconds(ours, device) / _token_seconds(other, device) for _ in range(2)]
    return found | {"proposal": best, "measured_tokens_gain": statistics.median(ratios), "ratios": ratios}


def _token_seconds(config: configs.Config, device: torch.device) -> float:
    # Micro-batches differ between a config and its proposal, and so does the share of what a step does once.
    taken = steps.take(config, device, config.data.micro_batches)
    return taken.seconds / (taken.micro_batches * config.data.micro_batch_sequences * config.model.context)


def table(found: dict[str, Any]) -> list[str]:
    columns = ("config", "predicted ms", "measured ms", "ratio", "most off", "MFU", "products, share of best",
               "best proposal", "tokens/s predicted", "measured")  # fmt: skip
    lines = [
        "",
        "Advice on shapes (`scripts/bench advise`), 2 threads: a step of 2 micro-batches as predicted from operators "
        "timed alone and as measured, and the best proposal at equal parameters or FLOPs, run in turn with its config, "
        "each with all micro-batches of its step.",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]
    for name in CONFIGS:
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
