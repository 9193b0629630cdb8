"""One worker: from a config to objects to the loop. The only place where things are wired together."""

import contextlib
import functools
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer import checkpoint, console, evaluate, events, loop, optim, rundir, world
from trainer import model as models
from trainer.config import Config, check_world
from trainer.data import Batches, EvalWindows, Prepared, prepare
from trainer.errors import EXIT_FINISHED
from trainer.exact import Grids
from trainer.loop import Parts, TrainState
from trainer.wandb_sink import WandbSink
from trainer.world import World


class Stopwatch:
    """Where the time before the first step went, in seconds by cause."""

    def __init__(self, started: float) -> None:
        self._last = started
        self.seconds: dict[str, float] = {}

    def lap(self, cause: str) -> None:
        now = time.time()
        self.seconds[cause] = round(now - self._last, 4)
        self._last = now


def train(config: Config, run: Path, process_started: float) -> int:
    """Train or resume the run in directory `run`; returns the exit status. `process_started` is a Unix time.

    Raises a TopropeError for everything a user can mend: on all ranks alike, and before any work where possible.
    """
    stopwatch = Stopwatch(process_started)
    check_world(config, world.expected_size())
    device = world.pick_device(config.parallel)
    set_numerics(config, device)
    stopwatch.lap("imports")
    ranks = world.connect(device, config.elastic.step_timeout_seconds)
    with contextlib.ExitStack() as stack:
        stack.callback(world.disconnect)
        ranks.from_main(lambda: stack.enter_context(rundir.claim(run, config)) and None)
        stopwatch.lap("connect")
        with console.preparation(enabled=ranks.is_main) as progress:
            prepared = prepare(config.data, config.eval, config.model.context, progress=progress)
        vocab_size = models.padded_vocab(prepared.tokenizer.vocab_size, config.model.vocab_size)
        about = ranks.from_main(lambda: _record(run, config, prepared, vocab_size))
        stopwatch.lap("data")
        state = build(config, vocab_size, ranks)
        stopwatch.lap("model")
        attempt = ranks.from_main(lambda: events.next_attempt(run))
        log = stack.enter_context(contextlib.closing(events.EventLog.open(run, attempt, ranks.rank)))
        if ranks.is_main:
            stack.enter_context(watching(log, run, config, about))
        _attempt(config, run, prepared, about, state, ranks, log, stopwatch)
    return EXIT_FINISHED


def set_numerics(config: Config, device: torch.device) -> None:
    """Make this process's kernels deterministic."""
    torch.set_num_threads(config.numerics.threads)
    if device.type == "cuda" and config.numerics.exact:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed one
        torch.use_deterministic_algorithms(True)
        # A debugging aid that costs a pass over memory; torch declares it as a property of the module.
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010


def build(config: Config, vocab_size: int, ranks: World) -> TrainState:
    """The state of step 0: a function of the config alone, laid out as the strategy says."""
    gpt = models.GPT(config.model, vocab_size)
    models.initialise(gpt, config.seed)
    gpt.to(ranks.device)
    shapes = {name: parameter.shape for name, parameter in gpt.named_parameters()}
    blocks = [block for block in gpt.blocks if isinstance(block, models.Block)]
    for block in blocks:
        block.recompute = config.parallel.activation_checkpointing
        if config.numerics.compile:
            block.compile()
    sharding = world.shard(gpt, blocks, config.parallel, ranks)
    optimizers = optim.build(gpt, config.optim)
    optim.materialise_state(optimizers)
    grids = None
    if config.numerics.exact:
        grids = Grids(shapes, config.data.micro_batches, config.numerics.headroom_bits, ranks.device)
        sharding.round_with(grids.rounder)
    return TrainState(0, gpt, sharding, optimizers, grids)


@contextlib.contextmanager
def watching(log: events.EventLog, run: Path, config: Config, about: Mapping[str, Any]) -> Iterator[None]:
    """Subscribe the console and W&B to `log` while the context lasts; `about` is what config.json says.

    Leave the context before closing the log: what went wrong with W&B becomes a warning in it.
    """
    with console.Console(config) as screen:
        log.subscribe(screen)
        with WandbSink(run, config, about, on_problem=functools.partial(_warn, log)) as sink:
            log.subscribe(sink)
            yield
        if sink.url is not None:
            print(f"W&B: {sink.url}", flush=True)


def _attempt(
    config: Config,
    run: Path,
    prepared: Prepared,
    about: dict[str, Any],
    state: TrainState,
    ranks: World,
    log: events.EventLog,
    stopwatch: Stopwatch,
) -> None:
    warn = functools.partial(_warn, log)
    found = ranks.from_main(lambda: checkpoint.newest_intact(run, report=warn))
    if found is not None:
        checkpoint.load(found, state.tensors())
        state.restored(found.step)
    stopwatch.lap("restore")
    log.append(
        events.AttemptStarted(
            world_size=ranks.size,
            from_step=state.step,
            steps=config.budget.steps,
            fingerprint=about["fingerprint"],
            host=socket.gethostname(),
            pid=os.getpid(),
            device=str(ranks.device),
            strategy=config.parallel.strategy,
            parameters=about["parameters"],
            tokens_per_step=about["tokens_per_step"],
            startup_seconds=stopwatch.seconds,
        )
    )
    try:
        save = functools.partial(_save, config, run, {"fingerprint": about["fingerprint"]}, ranks, log)
        loop.train(state, parts(config, prepared, ranks, log, save))
    except BaseException as error:
        log.append(_ended("failed", state.step, f"{type(error).__name__}: {error}"))
        raise
    log.append(_ended("finished", state.step, "", state.weights_sha256(), state.state_sha256()))


def parts(
    config: Config, prepared: Prepared, ranks: World, log: events.EventLog, save: Callable[[TrainState], None]
) -> Parts:
    """What the loop works with, from prepared data."""
    return Parts(config, ranks, batches_of(config, prepared), log, scorer(config, prepared, ranks), save)


def batches_of(config: Config, prepared: Prepared) -> Batches:
    return Batches(
        prepared.train.tokens,
        seed=config.seed,
        context=config.model.context,
        micro_batches=config.data.micro_batches,
        sequences=config.data.micro_batch_sequences,
    )


def scorer(
    config: Config, prepared: Prepared, ranks: World
) -> Callable[[nn.Module], Iterator[tuple[str, str, evaluate.Score, float]]]:
    """What scores a model on every held-out set in turn: (name, digest of its tokens, score, seconds)."""
    windows = {
        name: EvalWindows(
            held_out.tokens,
            context=config.model.context,
            sequences=config.data.micro_batch_sequences,
            max_tokens=config.eval.max_tokens,
        )
        for name, held_out in prepared.eval_sets.items()
    }
    with_precision = functools.partial(loop.autocast, config, ranks.device)

    def score(model: nn.Module) -> Iterator[tuple[str, str, evaluate.Score, float]]:
        for name, of_set in windows.items():
            started = time.perf_counter()
            result = evaluate.evaluate(model, of_set, prepared.tokenizer.token_bytes, ranks, with_precision)
            yield name, of_set.digest, result, time.perf_counter() - started

    return score


def _save(
    config: Config, run: Path, identity: dict[str, Any], ranks: World, log: events.EventLog, state: TrainState
) -> None:
    started = time.perf_counter()
    saved = checkpoint.save(run, state.step, state.tensors(), identity, ranks)
    if ranks.is_main:
        checkpoint.prune(run, config.checkpoint.keep_last)
        seconds = time.perf_counter() - started
        log.append(events.CheckpointSaved(step=state.step, bytes=saved.bytes, seconds=seconds, stall_seconds=seconds))


def _record(run: Path, config: Config, prepared: Prepared, vocab_size: int) -> dict[str, Any]:
    prepared.tokenizer.save(rundir.tokenizer_path(run))
    data = config.data
    with torch.device("meta"):
        gpt = models.GPT(config.model, vocab_size)
    return rundir.record(
        run,
        config,
        {
            "data_sha256": prepared.sha256,
            "vocab_size": vocab_size,
            "parameters": models.parameter_count(gpt).total,
            "tokens_per_step": data.micro_batches * data.micro_batch_sequences * config.model.context,
            "flops_per_token": models.flops_per_token(config.model, vocab_size),
        },
    )


def _ended(
    status: str, step: int, reason: str, weights: str | None = None, state: str | None = None
) -> events.AttemptEnded:
    return events.AttemptEnded(status=status, step=step, reason=reason, weights_sha256=weights, state_sha256=state)


def _warn(log: events.EventLog, message: str) -> None:
    log.append(events.Warned(message=message))
