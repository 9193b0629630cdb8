"""One worker: from a config to objects to the loop. The only place where things are wired together."""

import contextlib
import functools
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from trainer import costs, evaluate, loop, optim, signals
from trainer import model as models
from trainer import step as steps
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.config import Config, check_world
from trainer.data import Batches, EvalWindows, Prepared, prepare
from trainer.errors import EXIT_FAILED, EXIT_FINISHED, EXIT_PREEMPTED, RunDirectoryError, TopropeError
from trainer.exact import Grids
from trainer.faults import injector as faults
from trainer.log import events, rundir
from trainer.parallel import elastic, world
from trainer.parallel.members import AllRanks
from trainer.parallel.sharding import shard
from trainer.parallel.world import World
from trainer.phases import Hook, Phase, no_hook
from trainer.sentinel.hang import Watchdog
from trainer.show import console
from trainer.show.wandb import WandbHelper, wandb_mode
from trainer.step import StepContext, TrainState

PROGRESS_SECONDS = 0.5  # how often the ranks that wait for the data hear that rank 0 makes progress


class Stopwatch:
    """Where the time before the first step went, in seconds by cause."""

    def __init__(self, started: float) -> None:
        self._last = started
        self.seconds: dict[str, float] = {}

    def lap(self, cause: str) -> None:
        now = time.time()
        self.seconds[cause] = round(now - self._last, 4)
        self._last = now


def train(
    config: Config,
    run: Path,
    process_started: float,
    stop: signals.StopSignals | None = None,
    inject: Hook = no_hook,
) -> int:
    """Train or resume the run in directory `run`; returns the exit status. `process_started` is a Unix time.

    `stop` is given by who listened for signals before this module was imported, which takes seconds.
    `inject` is called at every named point of the run, on every rank: a door for tests. Faults of the config come in by
    `faults.arm`, which wraps what it must of what is made here; without any, it touches nothing.
    Raises a TopropeError for everything a user can mend: on all ranks alike, and before any work where possible.
    """
    stopwatch = Stopwatch(process_started)
    elastic.belong_to_agent()
    check_world(config, elastic.expected_size())
    hand = faults.arm(config, run, elastic.expected_rank(), elastic.expected_size())
    hand.startup()
    device = world.pick_device(config.parallel)
    set_numerics(config, device)
    stop = stop or signals.StopSignals()
    stopwatch.lap("imports")
    ranks = world.connect(device, _collective_timeout(config))
    with contextlib.ExitStack() as stack:
        stack.callback(world.disconnect)
        stack.callback(hand.close)
        ranks.from_main(lambda: wandb_mode(config) and None)  # rank 0 logs; a wrong mode is to be said before any work
        ranks.from_main(lambda: stack.enter_context(rundir.claim(run, config)) and None)
        number = ranks.from_main(lambda: events.next_attempt(run))
        watchdog = _watch(config, run, ranks, number)
        stack.callback(watchdog.stop)
        stopwatch.lap("connect")
        prepared = _prepare(config, ranks, watchdog)
        vocab_size = costs.padded_vocab(prepared.tokenizer.vocab_size, config.model.vocab_size)
        about = ranks.from_main(lambda: _record(run, config, prepared, vocab_size))
        hand.startup()
        stopwatch.lap("data")
        state = build(config, vocab_size, ranks)
        stopwatch.lap("model")
        earlier: list[events.Entry] = []
        ranks.from_main(lambda: earlier.extend(_told_before(run, number)))
        log = stack.enter_context(contextlib.closing(events.EventLog.open(run, number, ranks.rank)))
        watchdog.report = log.append
        hand.attach(number, log, state, prepared)
        attempt = Attempt(config, run, prepared, about, ranks, log, stop, hand, hand.wrap_hook(inject), watchdog)
        screen = None
        if ranks.is_main:
            screen = stack.enter_context(console.Console(config, earlier=earlier))
            log.subscribe(screen)
            stack.enter_context(_in_wandb(attempt, number))
        try:
            return attempt.train(state, stopwatch)
        except Exception as error:
            if not world.lost_peer(error):
                raise
            # Taking leave of dead peers can take minutes; torchrun is waiting to start us again.
            if screen is not None:
                screen.close()
            os._exit(EXIT_FAILED)


def _told_before(run: Path, number: int) -> list[events.Entry]:
    """The log of the attempts before. What a fault on purpose says of itself must not show through in it."""
    told = (entry for entry in events.read(run) if not isinstance(entry.event, events.FaultFired))
    return [entry for entry in told if entry.attempt < number]


def _watch(config: Config, run: Path, ranks: World, attempt: int) -> Watchdog:
    """A watchdog on duty. Until the attempt has a log, which makes it one, it reports to one that it opens itself."""

    def report(event: events.Event) -> None:
        with contextlib.closing(events.EventLog.open(run, attempt, ranks.rank)) as log:
            log.append(event)

    limits = config.elastic.step_timeout_seconds, config.elastic.startup_timeout_seconds
    watchdog = Watchdog(run, ranks.rank, ranks.size, attempt, *limits, report=report)
    watchdog.start()
    return watchdog


def _prepare(config: Config, ranks: World, watchdog: Watchdog) -> Prepared:
    """Tokens and tokenizer. Rank 0 builds what is missing and checks what is there, because it can show progress."""
    prepared_data = functools.partial(prepare, config.data, config.eval, config.model.context)
    alive = functools.partial(watchdog.heartbeat, Phase.STARTUP, 0)
    with console.preparation(enabled=ranks.is_main) as show:
        told = time.monotonic()

        def progress(*amount: Any) -> None:
            nonlocal told
            show(*amount)
            alive()
            if time.monotonic() - told > PROGRESS_SECONDS:
                ranks.report_progress()
                told = time.monotonic()

        ranks.from_main(lambda: prepared_data(progress=progress, verify=True) and None, waiting=alive)
        return prepared_data(progress=lambda *amount: alive())


def _collective_timeout(config: Config) -> float:
    """From the first connection on the watchdog is there first, and knows more than a timeout can say."""
    return 2 * max(config.elastic.step_timeout_seconds, config.elastic.startup_timeout_seconds) + 60


@dataclass(frozen=True)
class Attempt:
    """One attempt at a run, in one worker: everything but the state."""

    config: Config
    run: Path
    prepared: Prepared
    about: Mapping[str, Any]
    ranks: World
    log: events.EventLog
    stop: signals.StopSignals
    hand: faults.FaultInjector
    inject: Hook
    watchdog: Watchdog

    def train(self, state: TrainState, stopwatch: Stopwatch) -> int:
        """Restore, train, and record how it ended. Returns the exit status."""

        def hook(phase: str, step: int) -> None:
            self.watchdog.heartbeat(phase, step)
            self.inject(phase, step)

        try:
            with contextlib.closing(self._checkpointer(hook)) as checkpointer:
                checkpointer.restore(state)
                stopwatch.lap("restore")
                self._announce(state, stopwatch)
                finished = loop.train(state, self._collaborators(checkpointer, hook))
            return self._finished(state) if finished else self._preempted(state)
        except BaseException as error:
            # A peer's death is told by the next attempt, which knows more than the broken connection does.
            reason = events.LOST_A_PEER if world.lost_peer(error) else f"{type(error).__name__}: {error}"
            self._end("failed", state.step, reason)
            if isinstance(error, TopropeError):
                elastic.give_up()
            raise
        finally:
            self.watchdog.stop()  # what is still to be closed has time limits of its own

    def _checkpointer(self, hook: Hook) -> Checkpointer:
        settings, heartbeat = self.config.checkpoint, self.watchdog.heartbeat
        return Checkpointer(self.run, self.ranks, dict(self.about), settings, self.log, hook, heartbeat)

    def _collaborators(self, checkpointer: Checkpointer, hook: Hook) -> loop.Collaborators:
        batches = self.hand.wrap_batches(batches_of(self.config, self.prepared))
        context = StepContext(
            self.config, AllRanks(self.ranks, self.config.data.micro_batches), batches, hook, self.stop.requested
        )
        return loop.Collaborators(context, self.log, scorer(self.config, self.prepared, self.ranks, hook), checkpointer)

    def _announce(self, state: TrainState, stopwatch: Stopwatch) -> None:
        self.log.append(
            events.AttemptStarted(
                world_size=self.ranks.size,
                from_step=state.step,
                steps=self.config.budget.steps,
                fingerprint=self.about["fingerprint"],
                host=socket.gethostname(),
                pid=os.getpid(),
                device=str(self.ranks.device),
                strategy=self.config.parallel.strategy,
                parameters=self.about["parameters"],
                tokens_per_step=self.about["tokens_per_step"],
                startup_seconds=stopwatch.seconds,
            )
        )
        for lost in elastic.take_losses():  # other nodes' are of the same events
            if self.ranks.is_main:
                self.log.append(events.WorkersLost(failures=lost["failures"], reason=lost["reason"]))
        shared_store = elastic.SHARED_STORE_WARNING if elastic.shares_rendezvous_store() else ""
        for message in (shared_store, self.hand.notice):
            if message and self.ranks.is_main:
                self.log.append(events.Warned(message=message))

    def _finished(self, state: TrainState) -> int:
        self.inject(Phase.BEFORE_END, state.step)
        self._end("finished", state.step, "", state.weights_sha256(), state.state_sha256())
        return EXIT_FINISHED

    def _preempted(self, state: TrainState) -> int:
        if self.stop.received:
            self.log.append(events.StopRequested(signal=self.stop.received, step=state.step))
        self._end("preempted", state.step, self.stop.received or "another rank was asked to stop")
        return EXIT_PREEMPTED

    def _end(self, status: str, step: int, reason: str, weights: str | None = None, state: str | None = None) -> None:
        self.log.append(
            events.AttemptEnded(status=status, step=step, reason=reason, weights_sha256=weights, state_sha256=state)
        )


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
    model = models.build(config, vocab_size, ranks.device)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    sharding = shard(model, models.blocks_of(model), config.parallel, ranks)
    optimizers = optim.build(model, config.optim, config.model.width)
    optim.materialise_state(optimizers)
    grids = None
    if config.numerics.exact and config.data.micro_batches > 1:  # one micro-batch, one rank: no sum, no order
        grids = Grids(shapes, config.data.micro_batches, config.numerics.headroom_bits, ranks.device)
        sharding.round_with(grids.rounder)
    return TrainState(0, model, sharding, optimizers, grids)


def batches_of(config: Config, prepared: Prepared) -> Batches:
    return Batches(
        prepared.train.tokens,
        seed=config.seed,
        context=config.model.context,
        micro_batches=config.data.micro_batches,
        sequences=config.data.micro_batch_sequences,
    )


def scorer(
    config: Config, prepared: Prepared, ranks: World, heartbeat: Hook = no_hook
) -> Callable[[nn.Module, int], Iterator[tuple[str, str, evaluate.Score, float]]]:
    """What scores a step's model on every held-out set in turn: (name, digest of its tokens, score, seconds)."""
    windows = {
        name: EvalWindows(
            held_out.tokens,
            context=config.model.context,
            sequences=config.data.micro_batch_sequences,
            max_tokens=config.eval.max_tokens,
        )
        for name, held_out in prepared.eval_sets.items()
    }
    with_precision = functools.partial(steps.autocast, config, ranks.device)

    def score(model: nn.Module, step: int) -> Iterator[tuple[str, str, evaluate.Score, float]]:
        progress = functools.partial(heartbeat, Phase.IN_EVAL, step)
        for name, of_set in windows.items():
            started = time.perf_counter()
            result = evaluate.evaluate(model, of_set, prepared.tokenizer.token_bytes, ranks, with_precision, progress)
            yield name, of_set.digest, result, time.perf_counter() - started

    return score


@contextlib.contextmanager
def _in_wandb(attempt: Attempt, number: int) -> Iterator[None]:
    """Show the attempt in W&B while the context lasts. What goes wrong with it becomes a warning in the log."""

    def warn(message: str) -> None:
        attempt.log.append(events.Warned(message=message))

    with WandbHelper(attempt.run, attempt.config, number, on_problem=warn) as helper:
        attempt.log.subscribe(helper)
        yield
    if helper.url is not None:
        print(f"W&B: {helper.url}", flush=True)


def _record(run: Path, config: Config, prepared: Prepared, vocab_size: int) -> dict[str, Any]:
    """What config.json now says. Raises RunDirectoryError if it cannot be written or is of a run on other data."""
    data = config.data
    facts = {
        "data_sha256": prepared.sha256,
        "vocab_size": vocab_size,
        "parameters": costs.parameter_count(models.construct(config.model, vocab_size, "meta")).total,
        "tokens_per_step": data.micro_batches * data.micro_batch_sequences * config.model.context,
        "flops_per_token": costs.flops_per_token(config.model, vocab_size),
    }
    try:
        contents = rundir.record(run, config, facts)  # first: what makes the directory a run, and refuses other data
        prepared.tokenizer.save(rundir.tokenizer_path(run))
        return contents
    except OSError as error:
        raise RunDirectoryError(
            f"{run} cannot be written: {error.strerror}.\n"
            "  Checkpoints and events go there. Make room or mend the disk; the same command then goes on."
        ) from None
