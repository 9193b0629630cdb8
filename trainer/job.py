"""One worker's attempt at a run: claim the run directory, prepare the data, build the state, restore it, train.

The only place where objects are wired together. Each stage returns a value that the next one takes.
"""

import contextlib
import functools
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import nn

from trainer import (
    architectures,
    branch,
    compile_check,
    costs,
    distil,
    errors,
    evaluate,
    loop,
    optim,
    out_of_memory,
    own_check,
    own_code,
    provenance,
    signals,
    torch_versions,
)
from trainer import model as models
from trainer import step as steps
from trainer.checkpoint.checkpointer import Checkpointer
from trainer.config import Config, check_world
from trainer.data import Batches, EvalWindows, Prepared, first_epoch, prepare, shares
from trainer.exact import Grids
from trainer.faults import injector as faults
from trainer.faults.wrong_operators import Machine
from trainer.islands import apart
from trainer.islands import members as islands
from trainer.islands.post import Post
from trainer.islands.state import IslandsState
from trainer.islands.state import build as build_islands
from trainer.log import events, nodes, rundir
from trainer.parallel import elastic, peers, world
from trainer.parallel.sharding import Rounder, RounderOf, shard
from trainer.parallel.world import AllRanks, World
from trainer.phases import Hook, Phase, no_hook
from trainer.sentinel.corruption import Sentinel
from trainer.sentinel.hang import Watchdog
from trainer.sentinel.pace import with_pace
from trainer.show import console, tensorboard
from trainer.show.wandb import WandbHelper, wandb_mode
from trainer.step import StepContext, TrainState

PROGRESS_SECONDS = 0.5  # how often rank 0 reports progress to the ranks that wait for the data


class Stopwatch:
    """Seconds before the first step, by cause."""

    def __init__(self, started: float) -> None:
        self._last = started
        self.seconds: dict[str, float] = {}

    def lap(self, cause: str) -> None:
        now = time.time()
        self.seconds[cause] = round(now - self._last, 4)
        self._last = now


@dataclass(frozen=True)
class Claim:
    """A run directory that this job holds, and the attempt that it makes there."""

    run: Path
    attempt: int
    """Number of the attempt, from 0."""
    ranks: World
    log: events.EventLog
    watchdog: Watchdog
    earlier: Sequence[events.Entry]
    """Events of the attempts before, on rank 0."""
    computes_with: dict[str, str]
    """Code, device and the like that this rank computes with (provenance.py)."""
    other_bits: Sequence[str]
    """Differences between this and what the run was computed with before; accepted on purpose."""
    accepts: bool
    """True if other bits than before are accepted on purpose."""
    parent: branch.Record | None
    """The run whose state this run began from."""

    def end(self, status: str, step: int, reason: str, weights: str | None = None, state: str | None = None) -> None:
        """Log the end of the attempt; `weights` and `state` are SHA-256 digests of a finished run."""
        self.log.append(
            events.AttemptEnded(status=status, step=step, reason=reason, weights_sha256=weights, state_sha256=state)
        )


def train(
    config: Config,
    run: Path,
    process_started: float,
    stop: signals.StopSignals | None = None,
    accept_other_bits: bool = False,
    parent: str = "",
) -> int:
    """Train or resume the run in directory `run`; return the exit status. `process_started` is a Unix time.

    `stop` has listened for signals since before this module was imported, which takes seconds. `accept_other_bits`
    goes on with what the run was not computed with before. `parent` is RUN or RUN@STEP, whose state a new run begins
    from. Faults of the config come in through `faults.arm`, which changes nothing without them. Raises a TopropeError
    for every error that a user can repair: on all ranks alike, and before any work where possible.
    """
    stopwatch = Stopwatch(process_started)
    elastic.belong_to_agent()
    check_world(config, elastic.expected_size())
    injector = faults.arm(config, run, elastic.expected_rank(), elastic.expected_size())
    hook = injector.wrap_hook(no_hook)
    hook(Phase.STARTUP, 0)
    device = world.pick_device(config.parallel)
    with out_of_memory.explained(device):
        set_numerics(config, device)
    stop = stop or signals.StopSignals()
    stopwatch.lap("imports")
    # Collectives may take longer than the watchdog's limits: it acts first and reports more.
    limits = config.elastic.step_timeout_seconds, config.elastic.startup_timeout_seconds
    # With islands a rank may wait for one that has many steps to do before they meet, and the watchdog lets it.
    between_meetings = config.islands.inner_steps if config.islands.count else 1
    ranks = world.connect(device, between_meetings * (2 * max(limits) + 60), config.parallel.share_gpus)
    with contextlib.ExitStack() as stack:  # closes in reverse order what is entered below
        stack.callback(world.disconnect)
        stack.callback(injector.close)
        ranks.from_main(lambda: check_compiler(config, device))
        claim = claim_run(config, run, ranks, accept_other_bits, stack, parent)
        hook = with_pace(config, ranks, claim.log, with_heartbeat(claim.watchdog, hook))
        stopwatch.lap("connect")
        prepared, facts = prepare_data(config, claim)
        # From here on the directory is a run's, so a rank that dies now leaves a run that can be resumed.
        hook(Phase.STARTUP, 0)
        stopwatch.lap("data")
        sentinel = Sentinel(config)
        with out_of_memory.explained(device):
            post = apart.post_of(config, claim.watchdog.heartbeat, claim.log.append)
            if post is not None:
                apart.check_machines(post, ranks, claim.computes_with, claim.accepts)
            state = build_any(config, facts["vocab_size"], ranks, sentinel.watch, post)
        state.moments_from = branch.moments_from(claim.parent)
        stopwatch.lap("model")
        claim.log.create()  # the file of its log makes an attempt count
        injector.attach(claim.attempt, claim.log, islands.trained_here(state), prepared)
        batches = injector.wrap_batches(batches_of(config, prepared))
        sentinel.check_tokens(batches, prepared.train.tokens, ranks)
        hook = sentinel.wrap_hook(hook)
        everyone = AllRanks(ranks, config.data.micro_batches)
        members = sentinel.wrap_members(everyone, state, batches, claim.log)
        context = StepContext(config, members, batches, hook, stop.requested)
        screen = show(config, claim, stack)
        try:
            heartbeat = claim.watchdog.heartbeat
            of_all = run, ranks, facts, config.checkpoint, claim.log, hook, heartbeat
            if post is None:
                saving = Checkpointer(*of_all, is_checked=config.sentinel.on)
            else:
                saving = apart.ApartCheckpointer(post, *of_all)
            with contextlib.closing(saving) as checkpointer:
                state_from = checkpointer.restore(state)
                if ranks.is_main:
                    claim.log.subscribe(checkpointer.heed)
                branched = begin_from_parent(claim, state)
                begin_from_weights(config, claim, facts["vocab_size"], prepared, state)
                checkpointer.reserve(state)
                stopwatch.lap("restore")
                names = ranks.agree(elastic.node_name)
                # Of its own: faults and checks are for what is computed with.
                unfaulted = batches_of(config, prepared)
                fresh = first_reads(config, unfaulted)
                announce(
                    config, claim, facts, names, state.step, stopwatch, injector.notice, branched, fresh, state_from
                )
                warn_of_overlap(claim, prepared, config)
                # From here on a branch does not need its parent, and a save that was due is made up for.
                missed = loop.due(state.step, config.checkpoint.every_steps, config.budget.steps)
                if branched or (state_from == "memory" and missed):
                    checkpointer.save(state)
                score = scorer(config, prepared, lambda: members.world, hook)
                record = with_memory(loop.by_main(ranks, claim.log), ranks.device)
                if ranks.is_main and fresh is not None:
                    record = with_text_bytes(record, unfaulted, prepared.tokenizer.token_bytes)
                collaborators = loop.Collaborators(context, record, score, checkpointer)
                if isinstance(state, IslandsState):
                    collaborators = islands.with_islands(state, collaborators, claim.log.append)
                begun_at = state.step
                with (
                    out_of_memory.explained(device, lambda: state.step > begun_at),
                    watched_peers(config, claim, state),
                ):
                    finished = loop.train(state, collaborators)
            if finished:
                hook(Phase.BEFORE_END, state.step)
                claim.end("finished", state.step, "", state.weights_sha256(), state.state_sha256())
                return errors.EXIT_FINISHED
            if stop.received:
                claim.log.append(events.StopRequested(signal=stop.received, step=state.step))
            claim.end("preempted", state.step, stop.received or "another rank was asked to stop")
            return errors.EXIT_PREEMPTED
        except BaseException as error:
            fail(claim, state.step, error, screen)
            raise
        finally:
            claim.watchdog.stop()  # what is closed after this has time limits of its own


def claim_run(
    config: Config, run: Path, ranks: World, accept_other_bits: bool, stack: contextlib.ExitStack, parent: str = ""
) -> Claim:
    """Hold the run directory until `stack` is closed, and start the watchdog. Raises RunDirectoryError on all ranks."""
    earlier: list[events.Entry] = []
    own = provenance.computes_with(config, ranks.device)
    of_ranks = ranks.agree(lambda: own)

    def claim_on_main() -> tuple[int, list[str], branch.Record | None, str]:
        wandb_mode(config)  # only rank 0 shows the run, but a wrong mode is an error before any work
        tensorboard.check(config)
        # Before the claim, which leaves a lock: a parent that is not there leaves nothing.
        origin = None if rundir.is_run(run) else branch.origin(run, config, parent)
        stack.enter_context(rundir.claim(run, config))
        before = rundir.read(run) if rundir.is_run(run) else {}
        other_bits = provenance.compare(run, before, of_ranks, accept_other_bits)
        # The console shows how the last attempt ended. It must not learn from the log that a fault was made on purpose.
        earlier.extend(entry for entry in events.read(run) if not isinstance(entry.event, events.FaultFired))
        begun_from = branch.origin(run, config, parent) if before else origin
        return events.next_attempt(run), other_bits, begun_from, rundir.owner_of(run)

    attempt, other_bits, begun_from, owner = ranks.from_main(claim_on_main)
    ranks.agree(lambda: rundir.check_shared(run, owner))
    log = stack.enter_context(contextlib.closing(events.EventLog.open(run, attempt, ranks.rank)))
    limits = config.elastic.step_timeout_seconds, config.elastic.startup_timeout_seconds
    watchdog = Watchdog(
        run, ranks.rank, ranks.size, attempt, *limits, report=log.append, meet_rarely=config.islands.count > 0
    )  # fmt: skip
    watchdog.start()
    stack.callback(watchdog.stop)
    return Claim(run, attempt, ranks, log, watchdog, earlier, own, other_bits, accept_other_bits, begun_from)


def prepare_data(config: Config, claim: Claim) -> tuple[Prepared, dict[str, Any]]:
    """Make tokens and tokenizer where the cache has none, and write config.json, which makes the directory a run's.

    Returns the data and the contents of config.json. Rank 0 builds and checks the data, because it can show progress;
    then the other ranks open them.
    """
    ranks = claim.ranks
    prepared_data = functools.partial(prepare, config.data, config.eval, config.model.context)
    heartbeat = functools.partial(claim.watchdog.heartbeat, Phase.STARTUP, 0)

    opened: list[Prepared] = []

    def build_on_main() -> None:
        reported = time.monotonic()

        def progress(*amount: Any) -> None:
            nonlocal reported
            show_progress(*amount)
            heartbeat()
            # The other ranks have watchdogs too: while this rank makes progress, their waiting is no hang.
            if time.monotonic() - reported > PROGRESS_SECONDS:
                ranks.report_progress()
                reported = time.monotonic()

        opened.append(prepared_data(progress=progress, verify=True))

    with console.preparation(enabled=ranks.is_main and elastic.expected_rank() == 0) as show_progress:
        ranks.from_main(build_on_main, waiting=heartbeat)
        prepared = opened[0] if opened else prepared_data(progress=lambda *amount: heartbeat())
    read = ranks.agree(lambda: prepared.sha256)
    if other := [rank for rank, sha256 in enumerate(read) if sha256 != read[0]]:
        raise errors.CorpusError(
            f"{config.data.source!r} holds another text on rank {other[0]} than on rank 0.\n"
            "  Any rank may compute any micro-batch, so all must read the same. If a function yields it, look for "
            "random numbers, the order of sets, the clock and files that differ."
        )
    vocab_size = costs.padded_vocab(prepared.tokenizer.vocab_size, config.model.vocab_size)
    trial = check_own_code(config, vocab_size, claim)
    if config.numerics.compile:
        batch = batches_of(config, prepared).micro_batch(0, 0)

        def compare() -> None:
            with out_of_memory.explained(ranks.device):
                compile_check.check(config, vocab_size, ranks.device, batch)

        ranks.agree(compare)
    return prepared, ranks.from_main(lambda: _record(claim, config, prepared, vocab_size, trial))


def check_own_code(config: Config, vocab_size: int, claim: Claim) -> dict[str, str]:
    """Try a model and an optimizer of one's own before training, on all ranks; return digests for config.json.

    Raises ConfigError if not every rank may compute with them, or if another process computes other numbers.
    """
    ranks, found = claim.ranks, dict[str, str]()
    for setting, name in (("model.class", config.model.class_), ("optim.class", config.optim.class_)):
        if name:
            attempt = functools.partial(own_check.attempt, setting, config, vocab_size, ranks.device, ranks.size)
            traces = ranks.agree(attempt)
            if ranks.size == 1 and not rundir.is_run(claim.run):
                traces = [*traces, *own_check.elsewhere(setting, config, vocab_size, traces[0])]
            found |= _compare_tries(claim, own_code.find(name, setting), traces)
    return found


def _compare_tries(claim: Claim, place: own_code.Place, traces: Sequence[own_check.Trace]) -> dict[str, str]:
    def compare_on_main() -> dict[str, str]:
        own_check.compare(place, traces, claim.ranks.size)
        key, digest = f"own_{place.kind}", own_check.digest(traces[0])
        before = rundir.read(claim.run).get(key) if rundir.is_run(claim.run) else None
        if before not in (None, digest) and not claim.accepts:
            own_check.refuse_process(place)
        return {key: digest}

    return claim.ranks.from_main(compare_on_main)


def _record(claim: Claim, config: Config, prepared: Prepared, vocab_size: int, trial: dict[str, str]) -> dict[str, Any]:
    """Write config.json and return its contents.

    Raises RunDirectoryError if it cannot be written or if the run was trained on other data.
    """
    run, data = claim.run, config.data
    distil.check(config, vocab_size, prepared.tokenizer.sha256)
    facts = trial | {
        "code": provenance.code(),
        "computes_with": claim.computes_with,
        "data_sha256": prepared.sha256,
        "tokenizer_sha256": prepared.tokenizer.sha256,
        "vocab_size": vocab_size,
        "parameters": costs.parameter_count(models.construct(config.model, vocab_size, "meta")).total,
        "tokens_per_step": data.micro_batches * data.micro_batch_sequences * config.model.context,
        "flops_per_token": costs.flops_per_token(config.model, vocab_size) + costs.teaching_flops(config, vocab_size),
    }
    if prepared.overlap is not None:
        facts["near_duplicates"] = prepared.overlap.report
    if config.init_from and not rundir.is_run(run):
        # A folder that does not fit must not leave a run that the config, once it is mended, would not belong to.
        architectures.values(config, vocab_size, prepared.tokenizer)
    if claim.parent is not None:
        if not rundir.is_run(run):
            branch.check(claim.parent, config, vocab_size, prepared.tokenizer.sha256)
        facts["parent"] = claim.parent
    try:
        with rundir.recording(run) if elastic.in_quorum() else contextlib.nullcontext():
            # First: it makes the directory a run's, and refuses other data.
            contents = rundir.record(run, config, facts)
            prepared.tokenizer.save(rundir.tokenizer_path(run))
        return contents
    except OSError as error:
        rule, remedy = "Checkpoints and events go there.", "Make room; the same command then resumes."
        raise errors.RunDirectoryError(errors.of_system(error, f"{run} cannot be written", rule, remedy)) from None


def begin_from_weights(config: Config, claim: Claim, rows: int, prepared: Prepared, state: TrainState) -> None:
    """Load the weights that `init_from` names into a state that has not trained yet. Collective."""
    if config.init_from and state.step == 0:
        claim.ranks.agree(lambda: architectures.begin(config, rows, prepared.tokenizer, state.model))


def begin_from_parent(claim: Claim, state: TrainState) -> str:
    """Load the parent's state if the run has a parent and no state of its own; return RUN@STEP, else "". Collective."""
    parent = claim.parent
    if parent is None or state.step >= parent["step"]:
        return ""
    # A parent that still trains may remove its checkpoint on the way: then all ranks fail, not one.
    fresh = claim.ranks.agree(lambda: branch.begin(parent, state))[0]
    if fresh and claim.ranks.is_main:
        named = ", ".join(fresh[:3]) + (f" and {len(fresh) - 3} more" if len(fresh) > 3 else "")
        message = f"{branch.shown(parent)} does not hold {named}: they begin at zero, and so do AdamW's counts of them."
        claim.log.append(events.Warned(message=message))
    return branch.shown(parent)


def build_any(
    config: Config, vocab_size: int, ranks: World, watch: Callable[[RounderOf], RounderOf], post: Post | None = None
) -> TrainState:
    """Build the state of step 0, with one set of weights or with those of islands; with `post`, of clusters apart."""
    if config.islands.count:
        return build_islands(config, vocab_size, ranks, lambda one, alone: build(one, vocab_size, alone), post)
    state = build(config, vocab_size, ranks, watch)
    capture(state, config, ranks.device)
    return state


def build(
    config: Config, vocab_size: int, ranks: World, watch: Callable[[RounderOf], RounderOf] = lambda rounders: rounders
) -> TrainState:
    """Build the state of step 0: a function of the config alone, laid out as the strategy says.

    `watch` may wrap the rounders: what they return is what is added up.
    """
    model = models.build(config, vocab_size, ranks.device)
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    sharding = shard(model, models.blocks_of(model), config.parallel, ranks)
    optimizers = optim.build(model, config.optim, config.model.width)
    optim.materialise_state(optimizers)
    grids = None
    # A single micro-batch is computed by one rank: there is no sum whose order could matter.
    if config.numerics.exact and config.data.micro_batches > 1:
        grids = Grids(shapes, config.data.micro_batches, config.numerics.headroom_bits, ranks.device)
    rounders = unrounded if grids is None else grids.rounder
    watched = watch(rounders)
    if ranks.device.type == "cuda" and watched is rounders and config.parallel.strategy == "replicate":
        sharding.add_with(grids.add if grids else None)
    elif watched is not unrounded:  # a hook costs time
        sharding.round_with(watched)
    return TrainState(0, model, sharding, optimizers, grids, teachers=distil.load(config, ranks.device))


def capture(state: TrainState, config: Config, device: torch.device) -> None:
    """Have micro-batches computed by a CUDA graph, if that is wanted and there is a GPU; faults need the operators."""
    if config.parallel.cuda_graphs and device.type == "cuda" and not config.faults:
        state.graph = steps.graph_of(state, config, device)


def unrounded(name: str) -> Rounder:
    return lambda gradient: gradient


def batches_of(config: Config, prepared: Prepared) -> Batches:
    """Training batches of a run, by step and micro-batch."""
    m, b = config.data.micro_batches, config.data.micro_batch_sequences
    context = config.model.context
    return Batches(
        prepared.train.tokens, seed=config.seed, context=context, micro_batches=m, sequences=b,
        unique_tokens=config.data.unique_tokens,
        mixture=shares(config.data, prepared.train, context, config.budget.steps * m * b),
    )  # fmt: skip


def first_reads(config: Config, batches: Batches) -> int | None:
    """Number of steps that read text for the first time; None if teachers know it: its losses are then no code."""
    return None if config.distil.runs else first_epoch.steps(batches)


def with_text_bytes(
    record: Callable[[events.Event], None], batches: Batches, token_bytes: np.ndarray
) -> Callable[[events.Event], None]:
    """Return `record` that adds to each step of the first epoch the bytes of its text, for the code length."""
    last = first_epoch.steps(batches)

    def record_with_bytes(event: events.Event) -> None:
        if isinstance(event, events.StepDone) and event.step <= last:
            count = first_epoch.text_bytes(batches, event.step - 1, token_bytes)
            event = replace(event, text_bytes=count)
        record(event)

    return record_with_bytes


def scorer(
    config: Config, prepared: Prepared, present: Callable[[], World], hook: Hook = no_hook
) -> Callable[[nn.Module, int], Iterator[events.EvalDone]]:
    """Return the function that evaluates the model of a step on every held-out set. It is collective.

    `present` tells the ranks that take part when it is called.
    """
    context, b, limit = config.model.context, config.data.micro_batch_sequences, config.eval.max_tokens
    windows = {
        name: EvalWindows(held_out.tokens, context=context, sequences=b, max_tokens=limit)
        for name, held_out in prepared.eval_sets.items()
    }

    def score(model: nn.Module, step: int) -> Iterator[events.EvalDone]:
        before_batch, ranks = functools.partial(hook, Phase.IN_EVAL, step), present()
        autocast = functools.partial(steps.autocast, config, ranks.device)
        for name, held_out in windows.items():
            started = time.perf_counter()
            result = evaluate.evaluate(model, held_out, prepared.tokenizer.token_bytes, ranks, autocast, before_batch)
            seconds = time.perf_counter() - started
            yield events.EvalDone(step=step, set=name, seconds=seconds, digest=held_out.digest, **vars(result))

    return score


def show(config: Config, claim: Claim, stack: contextlib.ExitStack) -> console.Console | None:
    """On rank 0: show the attempt on the console and in W&B until `stack` is closed."""
    if not claim.ranks.is_main:
        return None
    restarts = elastic.will_restart()
    screen = stack.enter_context(console.Console(config, claim.run, earlier=claim.earlier, is_restarted=restarts))
    claim.log.subscribe(screen)
    helper = WandbHelper(
        claim.run, config, claim.attempt, lambda message: claim.log.append(events.Warned(message=message))
    )
    stack.callback(lambda: helper.url and print(f"W&B: {helper.url}", flush=True))
    claim.log.subscribe(stack.enter_context(helper))
    return screen


def with_memory(record: Callable[[events.Event], None], device: torch.device) -> Callable[[events.Event], None]:
    """Note the peak of this rank's memory in the event of each step: of its GPU, or of the process."""
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss

    def note(event: events.Event) -> None:
        if isinstance(event, events.StepDone):
            on_cpu = device.type == "cpu"
            usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit if on_cpu else None
            event = replace(event, memory_bytes=torch.cuda.max_memory_reserved(device) if usage is None else usage)
        record(event)

    return note


def announce(
    config: Config, claim: Claim, facts: dict[str, Any], names: Sequence[str], step: int, stopwatch: Stopwatch,
    armed: str, parent: str = "", first_epoch_steps: int | None = None, state_from: str = "",
) -> None:  # fmt: skip
    """Log that the attempt starts from `step`, why the workers were started again, and what a user should know.

    `names` are those of the ranks' nodes, in the order of ranks unless ranks may change.
    """
    ranks, log, changing = claim.ranks, claim.log, elastic.in_quorum()
    log.append(
        events.AttemptStarted(
            world_size=ranks.size,
            from_step=step,
            steps=config.budget.steps,
            fingerprint=facts["fingerprint"],
            host=socket.gethostname(),
            pid=os.getpid(),
            device=str(ranks.device),
            strategy=config.parallel.strategy,
            parameters=facts["parameters"],
            tokens_per_step=facts["tokens_per_step"],
            startup_seconds=stopwatch.seconds,
            computes_with=claim.computes_with,
            other_bits=claim.other_bits,
            parent=parent,
            state_from=state_from,
            first_epoch_steps=first_epoch_steps,
            nodes=tuple(names) if ranks.is_main and not changing else (),
        )
    )
    losses = elastic.take_losses()  # taken on every node, so that none reports them again later
    if ranks.is_main:
        for lost in losses:
            log.append(events.WorkersLost(failures=lost["failures"], reason=lost["reason"]))
        # Restarts repeat the circumstances of the start; one warning of them is enough for a run.
        said = {event.message for _, event in events.select(claim.earlier, events.Warned)}
        before = events.select(claim.earlier, events.AttemptStarted)
        other_bits = "; ".join(claim.other_bits)
        shard_ranks = config.parallel.shard_ranks if config.parallel.strategy == "hybrid" and not changing else 1
        for message, holds in (
            (elastic.SHARED_STORE_WARNING, elastic.shares_rendezvous_store()),
            (armed, armed),
            *((notice, notice) for notice in (torch_versions.check(), world.unused_gpus(config.parallel))),
            (provenance.NOT_RECORDED, any(event.computes_with is None for _, event in before)),
            (f"the steps from here on may have other bits, which was accepted: {other_bits}.", other_bits),
            *(
                (f"node {event.node} computes again, though it is quarantined: {event.found}.", event.node in names)
                for _, event in events.select(claim.earlier, events.Corrupted)
            ),
            *((message, message) for message in nodes.warnings(claim.earlier, names, shard_ranks)),
        ):
            if holds and message not in said:
                log.append(events.Warned(message=message))


def warn_of_overlap(claim: Claim, prepared: Prepared, config: Config) -> None:
    """Log once a run that training documents are near-duplicates of held-out ones, or were dropped as such."""
    said = {event.message for _, event in events.select(claim.earlier, events.Warned)}
    for message in prepared.overlap.messages(config.data) if prepared.overlap and claim.ranks.is_main else ():
        if message not in said and ": 0 of" not in message:
            claim.log.append(events.Warned(message=message))


def fail(claim: Claim, step: int, error: BaseException, screen: console.Console | None) -> None:
    """Log the reason of a failed attempt. Ends the process at once if another rank was lost."""
    if world.lost_peer(error):
        if isinstance(error, world.PeerLostError) and elastic.apart() is not None:  # else the launcher knows more
            claim.log.append(events.Warned(message=f"{error}."))
        leave_lost(claim, step, screen)
    claim.end("failed", step, f"{type(error).__name__}: {error}")
    if isinstance(error, errors.TopropeError) and not error.restart:
        elastic.give_up()


def leave_lost(claim: Claim, step: int, screen: console.Console | None = None) -> NoReturn:
    """End this process at once, because another rank was lost."""
    # The next attempt reports the peer's death: its launcher knows more than the broken connection does.
    claim.end("failed", step, events.LOST_A_PEER)
    # Closing connections to dead peers takes up to minutes, and torchrun waits for this process before a restart.
    claim.watchdog.stop()
    if screen is not None:
        screen.close()
    os._exit(errors.EXIT_FAILED)


def watched_peers(config: Config, claim: Claim, state: TrainState) -> contextlib.AbstractContextManager[None]:
    """While training: leave when another rank is gone, where the ranks wait in NCCL, which may not tell."""
    ranks = claim.ranks
    if not peers.needed(ranks, world.backend(ranks.device, config.parallel.share_gpus)):
        return contextlib.nullcontext()
    return peers.watched(ranks, lambda: leave_lost(claim, state.step))


def machine_of(config: Config, run: Path) -> Machine:
    """The operators of the machine that a run was computed on, those among them that are wrong on purpose."""
    return faults.machine_of(config, run)


def set_numerics(config: Config, device: torch.device) -> None:
    """Make this process's kernels deterministic, on its own device."""
    torch.set_num_threads(config.numerics.threads)
    if device.type == "cuda":
        torch.cuda.set_device(device.index or 0)
        torch.set_float32_matmul_precision("high" if config.numerics.tf32 else "highest")
        torch.backends.cudnn.allow_tf32 = config.numerics.tf32  # convolutions; torch allows it by itself
    if device.type == "cuda" and config.numerics.exact:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is deterministic only with a fixed one
        torch.use_deterministic_algorithms(True)
        # A debugging aid that costs a pass over memory; torch declares it as a property of the module.
        setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)  # noqa: B010


def check_compiler(config: Config, device: torch.device) -> None:
    """Raise ConfigError if torch.compile would find no C++ compiler: it looks for one only in the first step."""
    if not config.numerics.compile or device.type != "cpu":
        return
    from torch._inductor import config as inductor
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    try:
        get_cpp_compiler()
    except (InvalidCxxCompiler, OSError):
        tried = ", ".join(name for name in (inductor.cpp.cxx or ()) if name)
        fact = f"numerics.compile = true needs a C++ compiler, and this machine has none that runs (tried {tried})."
        remedy = "Install g++, name another one by the environment variable CXX, or set numerics.compile = false."
        raise errors.ConfigError([f"{fact}\n  {remedy}"]) from None


def with_heartbeat(watchdog: Watchdog, hook: Hook) -> Hook:
    def both(phase: str, step: int) -> None:
        watchdog.heartbeat(phase, step)
        hook(phase, step)

    return both
