"""The figures that this project claims, each a ratio measured in one run; see scripts/bench.

Two things to compare alternate in the same process, so that a drifting machine hurts both alike; medians are quoted
with the quartiles of the round-by-round ratios.
"""

import argparse
import functools
import json
import math
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from scripts import bench_advise, bench_islands, bench_meeting, bench_quorum, bench_sentinel
from scripts import bench_chaos as chaos
from scripts import bench_forecast as forecast
from scripts import bench_ladder as ladder
from scripts import bench_survival as survival
from scripts.bench_tables import Ratio, record, recorded
from trainer import config as configs
from trainer import costs, job, loop
from trainer import model as models
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.config import Config
from trainer.data import Prepared, prepare
from trainer.log import events
from trainer.parallel import world
from trainer.parallel.world import AllRanks
from trainer.phases import no_hook
from trainer.sentinel.corruption import Sentinel
from trainer.show import console
from trainer.step import StepContext, TrainState

ROOT = Path(__file__).resolve().parent.parent

BIG = ("configs/modern.toml", ["data.micro_batches=2", "checkpoint.every_steps=0"])
SMALL = (
    "configs/shakespeare_char.toml",
    ["data.source=\"python-stdlib\"", "data.tokenizer=\"bytes\"", "data.max_megabytes=1.0", "data.heldout=\"hash\"",
     "data.micro_batches=2", "data.micro_batch_sequences=6",  # with one there would be no sum
     "numerics.compile=false", "numerics.threads=1"],
)  # fmt: skip
LIGHT = ["numerics.threads=1", "data.micro_batch_sequences=8"]
QUIET = ['wandb.mode="disabled"', 'eval.sets=["val"]']


def load(base: tuple[str, list[str]], *more: str) -> Config:
    return configs.load(ROOT / base[0], [*base[1], *QUIET, *more])


class Ours:
    """toprope's own loop in this process: events, console and all, without evaluation and checkpoints."""

    def __init__(self, config: Config, ranks: world.World, directory: Path) -> None:
        job.set_numerics(config, ranks.device)
        self.prepared = prepare(config.data, config.eval, config.model.context)
        log = events.EventLog.open(directory, events.next_attempt(directory), ranks.rank)
        if ranks.is_main:
            nowhere = Path(os.devnull).open("w")  # noqa: SIM115
            log.subscribe(console.Console(config, directory, is_terminal=False, file=nowhere))
        self.config = config
        batches, sentinel = job.batches_of(config, self.prepared), Sentinel(config)
        sentinel.check_tokens(batches, self.prepared.train.tokens, ranks)
        self.state = job.build(config, vocabulary(config, self.prepared), ranks, sentinel.watch)
        members = sentinel.wrap_members(AllRanks(ranks, config.data.micro_batches), self.state, batches, log)
        self.context = StepContext(config, members, batches, sentinel.wrap_hook(no_hook))
        self.collaborators = loop.Collaborators(
            self.context, loop.by_main(ranks, log), lambda model, step: (), NoCheckpointer()
        )

    def __call__(self, steps: int) -> None:
        budget = self.config.budget.model_copy(update={"steps": self.state.step + steps})
        context = replace(self.context, config=self.config.model_copy(update={"budget": budget}))
        loop.train(self.state, replace(self.collaborators, context=context))


class NoCheckpointer(Checkpointer):
    """Saving has figures of its own."""

    def __init__(self) -> None: ...
    def save(self, state: TrainState) -> None: ...
    def poll(self) -> None: ...
    def finish(self, state: TrainState) -> None: ...


class Plain:
    """The loop a PyTorch user would write: same model, same micro-batches, fused AdamW, nothing else."""

    def __init__(self, config: Config) -> None:
        torch.set_num_threads(config.numerics.threads)
        prepared = prepare(config.data, config.eval, config.model.context)
        self.model = models.construct(config.model, vocabulary(config, prepared))
        models.initialise(self.model, config.model, config.seed)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=config.optim.learning_rate, fused=True)
        self.batches = job.batches_of(config, prepared)
        self.micro_batches = config.data.micro_batches
        self.step = 0

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            total = 0.0
            for index in range(self.micro_batches):
                batch = self.batches.micro_batch(self.step, index)
                result = self.model(torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets))
                (result.objective / self.micro_batches).backward()
                total += result.cross_entropy.item()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.step += 1


def vocabulary(config: Config, prepared: Prepared) -> int:
    return costs.padded_vocab(prepared.tokenizer.vocab_size, config.model.vocab_size)


def alternate(
    a: Callable[[int], None], b: Callable[[int], None], steps: int, rounds: int
) -> tuple[Ratio, float, float]:
    """Speed of A over speed of B round by round, and both median seconds per step."""
    for warm in (a, b):
        warm(max(2, steps))
    seconds: list[tuple[float, float]] = []
    for number in range(rounds):
        pair = {}
        for name in "ab" if number % 2 else "ba":
            started = time.perf_counter()
            (a if name == "a" else b)(steps)
            pair[name] = (time.perf_counter() - started) / steps
        seconds.append((pair["a"], pair["b"]))
    ratio = Ratio.of([second / first for first, second in seconds])
    return ratio, statistics.median(s[0] for s in seconds), statistics.median(s[1] for s in seconds)


def throughput(
    base: tuple[str, list[str]], ours: list[str], plain: list[str], steps: int, rounds: int
) -> dict[str, Any]:
    """Throughput of our loop over the plain loop's, in one process."""
    ranks = world.connect(torch.device("cpu"), 60)
    with tempfile.TemporaryDirectory() as directory:
        ours_config = load(base, *ours)
        our_loop = Ours(ours_config, ranks, Path(directory))
        plain_loop = Plain(load(base, *plain))
        ratio, a, b = alternate(our_loop, plain_loop, steps, rounds)
    world.disconnect()
    tokens = ours_config.data.micro_batches * ours_config.data.micro_batch_sequences * ours_config.model.context
    count = costs.parameter_count(our_loop.state.model)
    return {
        "ratio": vars(ratio),
        "parameters": count.total,
        "ours_tokens_per_second": tokens / a,
        "plain_tokens_per_second": tokens / b,
        "threads": ours_config.numerics.threads,
    }


def exact_against_plain_worker() -> None:
    """One of two ranks: exact and plain sums alternate in the same processes."""
    ranks = world.connect(torch.device("cpu"), 120)
    with tempfile.TemporaryDirectory() as directory:
        exact = Ours(load(BIG, "numerics.threads=1"), ranks, Path(directory))
        plain = Ours(load(BIG, "numerics.threads=1", "numerics.exact=false"), ranks, Path(directory))
        ratio, a, b = alternate(exact, plain, steps=1, rounds=15)
    if ranks.is_main:
        print("RESULT " + json.dumps({"ratio": vars(ratio), "exact_seconds": a, "plain_seconds": b}))
    world.disconnect()


def sentinel_worker(size: str) -> None:
    """One of two ranks: seconds that the checks of every step take, and that an audit of every micro-batch takes.

    Each alternates in the same processes with the same loop without it. The checks go over weights, moments and
    gradients: they take as long with short micro-batches, where they stand out of the machine's noise, as with the
    config's own, to whose step both are related. Audits are measured where every micro-batch has one: a share of them
    costs that share of it.
    """
    ranks = world.connect(torch.device("cpu"), 120)
    base = (BIG[0], ["checkpoint.every_steps=0"]) if size == "big" else SMALL
    short = ["data.micro_batch_sequences=1"] if size == "big" else []
    settings = {
        "plain": [], "audit": ['sentinel.audit="1"'], "short": short,
        "checks": [*short, "sentinel.state_hash_every_steps=1"],
    }  # fmt: skip
    steps = 1 if size == "big" else 16
    with tempfile.TemporaryDirectory() as directory:
        loops = {
            name: Ours(load(base, "numerics.threads=1", *more), ranks, Path(directory))
            for name, more in settings.items()
        }
        parameters = costs.parameter_count(loops["plain"].state.model).total
        seconds: dict[str, list[float]] = {name: [] for name in loops}

        def alternate(names: list[str], rounds: int) -> None:
            for number in range(-1, rounds):  # the first warms up
                for name in names[:: 1 if number % 2 else -1]:
                    started = time.perf_counter()
                    loops[name](steps)
                    seconds[name] += [(time.perf_counter() - started) / steps] if number >= 0 else []

        alternate(["short", "checks"], 25)
        alternate(["plain", "audit"], 5 if size == "big" else 25)
    step = statistics.median(seconds["plain"])
    checks = [(with_ - without) / step for with_, without in zip(seconds["checks"], seconds["short"], strict=True)]
    audit = [audited / plain - 1 for audited, plain in zip(seconds["audit"], seconds["plain"], strict=True)]
    if ranks.is_main:
        found = {"checks": vars(Ratio.of(checks)), "audit": vars(Ratio.of(audit))}
        print("RESULT " + json.dumps({"parameters": parameters, "step_seconds": step, **found}))
    world.disconnect()


def sentinel_flips() -> dict[str, Any]:
    """Count the flipped bits that a sentinel finds, and that other rules find. Goes on where it was interrupted."""
    bench_sentinel.worker()
    return bench_sentinel.figure()


def sentinel_clean(steps: int = 100_000) -> dict[str, Any]:
    """False alarms in a run without faults. Goes on where it was interrupted."""
    run = bench_sentinel.CLEAN
    settings = [part for setting in bench_sentinel.clean_settings(steps) for part in ("--set", setting)]
    torchrun("-m", "trainer", "train", "configs/smoke.toml", "--run", str(run), *settings)
    return bench_sentinel.clean(run)


def memory_worker(strategy: str) -> None:
    """One of two ranks: peak resident memory after three steps, and the memory of the libraries alone."""
    baseline = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    ranks = world.connect(torch.device("cpu"), 120)
    with tempfile.TemporaryDirectory() as directory:
        config = load(BIG, f'parallel.strategy="{strategy}"', "model.width=768", "data.micro_batch_sequences=1")
        our_loop = Ours(config, ranks, Path(directory))
        our_loop(3)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    if ranks.is_main:
        count = costs.parameter_count(our_loop.state.model) if strategy == "replicate" else None
        print(
            "RESULT " + json.dumps({"peak_mib": peak, "libraries_mib": baseline, "parameters": count and count.total})
        )
    world.disconnect()


def saving_worker() -> None:
    """One of two ranks of survival's figures of saving."""
    survival.saving_worker(lambda ranks, directory: Ours(load(BIG, *LIGHT), ranks, directory))


def copies_worker(size: str) -> None:
    """One of two ranks of survival's figures of copies in memory."""
    config, rounds = (load(BIG, *LIGHT), 5) if size == "big" else (load(("configs/gpt_tiny.toml", [])), 11)
    survival.copies_worker(lambda ranks, directory: Ours(config, ranks, directory), steps=10, rounds=rounds)


def torchrun(*arguments: str) -> str:
    command = [sys.executable, "-c", "from trainer.launch.torchrun import torchrun; torchrun()", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stdout}\n{done.stderr}")
    return done.stdout


def worker(*arguments: str) -> dict[str, Any]:
    output = torchrun("scripts/bench.py", "--worker", *arguments)
    return json.loads(output.split("RESULT ", 1)[1].splitlines()[0])


def first_step(repeats: int = 7) -> dict[str, Any]:
    """Seconds from the command to the first step done, 2 ranks, warm caches; and the parts of that time."""
    laps: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as directory:
        for number in range(repeats + 1):
            run = Path(directory) / str(number)
            launched = time.time()
            arguments = [
                "--run",
                str(run),
                "--set",
                "budget.steps=1",
                "--set",
                "optim.warmup_steps=1",
                "--set",
                'eval.sets=["val"]',
            ]
            torchrun("-m", "trainer", "train", "configs/gpt_tiny.toml", *arguments)
            entries = [entry for entry in events.read(run) if entry.rank == 0]
            start = next(entry for entry in entries if isinstance(entry.event, events.AttemptStarted))
            step = next(entry for entry in entries if isinstance(entry.event, events.StepDone))
            assert isinstance(start.event, events.AttemptStarted)
            inside = start.event.startup_seconds
            launcher = start.time - launched - sum(inside.values())
            laps.append(
                {"torchrun": launcher, **inside, "first step": step.time - start.time, "all": step.time - launched}
            )
    laps = laps[1:]  # the first warms caches
    return {
        "breakdown": {name: statistics.median(lap[name] for lap in laps) for name in laps[0]},
        "low": min(lap["all"] for lap in laps),
        "high": max(lap["all"] for lap in laps),
        "repeats": repeats,
    }


NANOGPT_RECIPE = [
    'model.norm="layernorm"', 'model.positions="learned"', 'model.mlp="gelu"', "model.qk_norm=false",
    "model.n_kv_heads=0", "model.tied_embeddings=true", 'model.init="gpt2"', "data.micro_batches=1",
    "data.micro_batch_sequences=12", "numerics.threads=2", "numerics.compile=false",
]  # fmt: skip


def shakespeare(repeats: int = 3) -> dict[str, Any]:
    """configs/shakespeare_char.toml as a command, against a plain loop of nanoGPT's CPU recipe as a command."""
    path = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
    source = json.dumps(os.environ.get("TINYSHAKESPEARE", str(path)))
    ours, plain, losses, output = [], [], [], ""
    with tempfile.TemporaryDirectory() as directory:
        for number in range(repeats):
            run = Path(directory) / str(number)
            started = time.perf_counter()
            arguments = ["train", "configs/shakespeare_char.toml", "--run", str(run), "--set", f"data.source={source}"]
            subprocess.run(
                [sys.executable, "-m", "trainer", *arguments, "--set", 'wandb.mode="disabled"'],
                cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, check=True,
            )  # fmt: skip
            ours.append(time.perf_counter() - started)
            last = [e.event for e in events.read(run) if isinstance(e.event, events.EvalDone) and e.event.set == "val"][
                -1
            ]
            losses.append(last.loss)
            started = time.perf_counter()
            output = subprocess.run(
                [sys.executable, "scripts/bench.py", "--worker", "nanogpt", source],
                cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, check=True,
            ).stdout  # fmt: skip
            plain.append(time.perf_counter() - started)
    return {
        "ratio": vars(Ratio.of([b / a for a, b in zip(ours, plain, strict=True)])),
        "validation_loss": losses[-1],
        "validation_loss_plain": json.loads(output.split("RESULT ", 1)[1])["loss"],
        "ours_seconds": statistics.median(ours),
        "plain_seconds": statistics.median(plain),
    }


def nanogpt_worker(source: str) -> None:
    """nanoGPT's published CPU recipe, as a plain loop: AdamW 1e-3, β2 0.99, clip 1, cosine to 1e-4, warmup 100."""
    base = ("configs/shakespeare_char.toml", [f"data.source={source}", *NANOGPT_RECIPE])
    config = load(base, 'optim.optimizer="adamw"', 'numerics.precision="fp32"', "optim.learning_rate=1e-3")
    plain = Plain(config)
    decay = [p for p in plain.model.parameters() if p.dim() >= 2]
    rest = [p for p in plain.model.parameters() if p.dim() < 2]
    groups = [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
    plain.optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99), fused=True)
    for step in range(2000):
        share = (step - 100) / 1900
        rate = 1e-3 * (step + 1) / 101 if step < 100 else 1e-4 + 0.5 * (1 + math.cos(math.pi * share)) * 9e-4
        for group in plain.optimizer.param_groups:
            group["lr"] = rate
        batch = plain.batches.micro_batch(step, 0)
        plain.model(torch.from_numpy(batch.inputs), torch.from_numpy(batch.targets)).objective.backward()
        torch.nn.utils.clip_grad_norm_(plain.model.parameters(), 1.0)
        plain.optimizer.step()
        plain.optimizer.zero_grad(set_to_none=True)
    prepared = prepare(config.data, config.eval, config.model.context)
    ranks = world.connect(torch.device("cpu"), 60)
    (score,) = job.scorer(config, prepared, lambda: ranks)(plain.model, 2000)
    print("RESULT " + json.dumps({"loss": score.loss}))
    world.disconnect()


def seeds() -> dict[str, Any]:
    """Final validation loss with exact and with plain sums, three seeds each; steps redone and entries flushed."""
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for seed in range(3):
            row: dict[str, Any] = {"seed": seed}
            for exact in (True, False):
                run = Path(directory) / f"{seed}{exact}"
                sets = [*SMALL[1], "data.micro_batches=4", "data.micro_batch_sequences=3", "budget.steps=500"]
                sets += [f"seed={seed}", f"numerics.exact={str(exact).lower()}", 'wandb.mode="disabled"']
                arguments = [part for override in sets for part in ("--set", override)]
                torchrun("-m", "trainer", "train", SMALL[0], "--run", str(run), *arguments)
                log = [entry.event for entry in events.read(run)]
                last = [e for e in log if isinstance(e, events.EvalDone) and e.set == "val"][-1]
                row["exact" if exact else "plain"] = last.loss
                if exact:
                    steps = [e for e in log if isinstance(e, events.StepDone)]
                    counted = [e.flushed for e in steps if e.flushed is not None]
                    row |= {"redone": sum(e.redone for e in steps), "flushed": statistics.mean(counted)}
            rows.append(row)
    return {"rows": rows, "steps": 500}


def measure(name: str) -> dict[str, Any]:
    """One figure by name, measured in this process or in processes that it starts."""
    match name:
        case "throughput_12m":
            return throughput(BIG, ["numerics.threads=2"], ["numerics.threads=2"], steps=1, rounds=15)
        case "throughput_0.8m":
            return throughput(SMALL, [], [], steps=40, rounds=31)
        case "exact_against_plain_sums":
            return worker("exact")
        case "bf16_compile":
            settings = ["numerics.threads=2", 'numerics.precision="bf16"', "numerics.compile=true"]
            return throughput(BIG, settings, ["numerics.threads=2"], steps=1, rounds=15)
        case "first_step":
            return first_step()
        case "memory":
            return {strategy: worker("memory", strategy) for strategy in ("replicate", "fsdp")}
        case "shakespeare":
            return shakespeare()
        case "seeds":
            return seeds()
        case "saving":
            return survival.saving(worker("saving"))
        case "copies":
            return {size: survival.copies(worker("copies", size)) for size in ("small", "big")}
        case "killed":
            return survival.killed()
        case "nodes":
            return survival.nodes()
        case "meeting":
            return bench_meeting.figure()
        case "goodput":
            return survival.goodput()
        case "quorum":
            return bench_quorum.figure()
        case "islands":
            return bench_islands.figure()
        case "sentinel":
            return {size: worker("sentinel", size) for size in ("small", "big")}
        case "sentinel_faults":
            return chaos.sentinel()
        case "sentinel_flips":
            return sentinel_flips()
        case "sentinel_clean":
            return sentinel_clean()
        case "catalogue":
            return chaos.catalogue()
        case "storm":
            return chaos.storm()
        case "mutants":
            return chaos.mutants()
        case "ladder":
            return ladder.statistics()
        case "advise":
            return bench_advise.figure(recorded(name), functools.partial(record, name))
        case "forecast":
            return forecast.forecast()
        case "forecast_storms":
            return forecast.storms()
    raise SystemExit(f"no figure is called {name!r}; there are {', '.join(FIGURES)}")


FIGURES = (
    "throughput_12m", "throughput_0.8m", "exact_against_plain_sums", "bf16_compile", "first_step", "memory",
    "shakespeare", "seeds", "saving", "copies", "killed", "nodes", "meeting", "goodput", "quorum", "islands",
    "sentinel", "sentinel_faults", "sentinel_flips", "sentinel_clean", "catalogue", "storm", "mutants", "ladder",
    "forecast", "forecast_storms", "advise",
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("names", nargs="*", help=f"what to measure; default all of {', '.join(FIGURES)}")
    arguments = parser.parse_args()
    if arguments.worker:
        name, *rest = arguments.names
        {
            "exact": exact_against_plain_worker,
            "memory": memory_worker,
            "sentinel": sentinel_worker,
            "nanogpt": nanogpt_worker,
            "saving": saving_worker,
            "copies": copies_worker,
        }[name](*rest)
        return
    for name in arguments.names or FIGURES:
        print(f"{name} …", flush=True)
        figure = measure(name)
        record(name, figure)
        print(json.dumps(figure), flush=True)


if __name__ == "__main__":
    main()
