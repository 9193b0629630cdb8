"""Equality over drawn configs: each is trained at 1 to 4 ranks under every sharding it allows, with one result.

Config number n of seed s is drawn from a generator seeded with "s-n". Settings that may change no bit (sharding,
recomputing, resharding) are drawn anew for every world size. A difference is printed with the command that repeats it.
"""

import argparse
import itertools
import json
import random
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tests.support import SMOKE, torchrun

WORLDS = (1, 2, 3, 4)
BATCH = 8  # configs that share one start of the ranks
ONE_IN = 6  # one config in so many compiles: compiling is slow

Case = dict[str, Any]
"""A config of the equality worker: a file and what is set."""


def draw(seed: str) -> dict[str, Any]:
    """Settings that decide the weights of a small run."""
    rng = random.Random(seed)
    heads, compiled = rng.choice((1, 2, 4, 6)), rng.randrange(ONE_IN) == 0
    drawn = {
        "seed": rng.randrange(2**32),
        "budget.steps": rng.choice((2, 3)),
        "eval.max_tokens": rng.choice((100, 700)),
        "eval.every_steps": rng.choice((0, 1)),
        "data.micro_batches": rng.randint(2, 7),
        "data.micro_batch_sequences": rng.choice((1, 2, 3)),
        "model.n_layers": 2 if compiled else rng.choice((1, 2, 3)),
        "model.n_heads": heads,
        "model.n_kv_heads": rng.choice([0, *(n for n in range(1, heads) if heads % n == 0)]),
        "model.width": heads * rng.choice((2, 4, 6, 16)),
        "model.context": rng.choice((8, 17, 32)),
        "model.norm": rng.choice(("layernorm", "rmsnorm")),
        "model.positions": rng.choice(("learned", "rope")),
        "model.mlp": rng.choice(("gelu", "swiglu", "relu2")),
        "model.qk_norm": rng.random() < 0.5,
        "model.tied_embeddings": rng.random() < 0.5,
        "model.biases": rng.random() < 0.5,
        "model.logit_softcap": rng.choice((0.0, 15.0)),
        "model.z_loss": rng.choice((0.0, 1e-3)),
        "model.dropout": rng.choice((0.0, 0.1, 0.5)),
        "model.value_embeddings": rng.random() < 0.5,
        "model.bigram_buckets": rng.choice((0, 101)),
        "model.init": rng.choice(("gpt2", "zero_proj")),
        "optim.optimizer": rng.choice(("adamw", "adamw", "muon")),
        "optim.learning_rate": rng.choice((1e-3, 0.03)),
        "optim.clip_norm": rng.choice((0.0, 1.0)),
        "optim.warmup_steps": rng.choice((0, 1)),
        "optim.schedule": rng.choice(("constant", "cosine", "wsd")),
        "optim.mup_base_width": rng.choice((0, 8)),
        "numerics.precision": rng.choice(("fp32", "bf16")),
        "numerics.headroom_bits": rng.choice((1, 5, 10)),
        "numerics.compile": compiled,
    }
    may_have_gains = drawn["model.norm"] == "rmsnorm" or drawn["model.qk_norm"]
    return drawn | {
        "model.norm_gain": may_have_gains and rng.random() < 0.5,
        "model.head_width": rng.choice((0, 0, 6)),
    }


def layouts(settings: dict[str, Any], world_size: int, seed: str) -> dict[str, dict[str, Any]]:
    """Ways to spread a config over ranks, by strategy; none where some of them would have no micro-batch."""
    rng = random.Random(f"{seed}-{world_size}")
    strategies = [] if world_size > settings["data.micro_batches"] else ["replicate"]
    if strategies and settings["optim.optimizer"] != "muon":
        strategies += ["fsdp"] if world_size % 2 else ["fsdp", "hybrid"]
    return {
        strategy: {"parallel.strategy": strategy, "parallel.activation_checkpointing": rng.random() < 0.5}
        | ({} if strategy == "replicate" else {"parallel.reshard_after_forward": rng.random() < 0.5})
        for strategy in strategies
    }


def cases(seeds: Iterable[str], world_size: int) -> dict[str, Case]:
    """The equality worker's cases at one world size, named "SEED STRATEGY"."""
    found = {}
    for seed in seeds:
        drawn = draw(seed)
        for strategy, layout in layouts(drawn, world_size, seed).items():
            overrides = [f"{key}={json.dumps(value)}" for key, value in (drawn | layout).items()]
            found[f"{seed} {strategy}"] = {"config": str(SMOKE), "set": overrides}
    return found


def train(seeds: Iterable[str], directory: Path) -> dict[str, dict[str, Any]]:
    """Train every config of `seeds` in every layout: {seed: {"2 ranks, fsdp": what must be equal}}."""
    seeds = list(seeds)
    results: dict[str, dict[str, Any]] = {seed: {} for seed in seeds}
    for world_size in WORLDS:
        wanted, written = directory / f"cases-{world_size}.json", directory / f"results-{world_size}.json"
        wanted.write_text(json.dumps(cases(seeds, world_size)))
        torchrun(world_size, wanted, written, module="tests.equality_worker", timeout=900)
        for name, result in json.loads(written.read_text()).items():
            seed, strategy = name.split()
            results[seed][f"{world_size} ranks, {strategy}"] = result
    return results


def different(results: dict[str, Any]) -> list[str]:
    """Return a line for each layout whose result is not that of one unsharded process."""
    reference = results["1 ranks, replicate"]
    return [
        f"{layout}: {', '.join(key for key in reference if result[key] != reference[key])}"
        for layout, result in results.items()
        if result != reference
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=10.0, help="begin no batch of configs after this time")
    parser.add_argument("--only", type=int, help="number of the one config to train")
    options = parser.parse_args()
    began, done, failed = time.monotonic(), 0, 0
    for first in itertools.count(step=BATCH):
        numbers = range(first, first + BATCH) if options.only is None else [options.only]
        with tempfile.TemporaryDirectory() as directory:
            results = train([f"{options.seed}-{number}" for number in numbers], Path(directory))
        for number, (seed, by_layout) in zip(numbers, results.items(), strict=True):
            lines = different(by_layout)
            done, failed = done + len(by_layout), failed + bool(lines)
            if lines:
                print(f"config {seed} {json.dumps(draw(seed))}")
                print("".join(f"  {line}\n" for line in lines), end="")
                print(f"  again: scripts/fuzz_equality --seed {options.seed} --only {number}", flush=True)
        minutes = (time.monotonic() - began) / 60
        print(f"configs up to {numbers[-1]}: {done} layouts, {failed} unequal, {minutes:.1f} minutes", flush=True)
        if options.only is not None or minutes > options.minutes:
            sys.exit(bool(failed))


if __name__ == "__main__":
    main()
