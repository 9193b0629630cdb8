"""One worker of a job in quorum mode: its death ends nobody else, and it may join while the others train.

`job.train` is the worker that torchrun starts: all ranks claim, prepare and train together. Here each worker prepares
alone, and then trains with whoever is there (parallel/quorum.py). What is written once for all (the log of the steps,
checkpoints, console, W&B) is written by the main member, and by the next one when it dies (`Records`).
"""

import contextlib
import dataclasses
import functools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from trainer import branch, errors, job, loop, out_of_memory, provenance, signals
from trainer.checkpoint.checkpointer import MainCheckpointer
from trainer.config import Config, check_world
from trainer.faults import injector as faults
from trainer.log import events, rundir
from trainer.log.events import AttemptEnded, AttemptStarted, EvalDone, Event, EventLog, MembersChanged, StepDone
from trainer.log.incidents import first_line
from trainer.parallel import elastic, groups, protocol, world
from trainer.parallel.groups import GroupMembership
from trainer.parallel.membership import ArbiterLostError, JobOver, Membership, RefusedError, own_host
from trainer.parallel.quorum import Change, QuorumMembers, TransferError
from trainer.parallel.sharding import FullySharded
from trainer.parallel.world import World
from trainer.phases import Phase, no_hook
from trainer.sentinel.corruption import Sentinel
from trainer.sentinel.hang import Watchdog
from trainer.show import console, tensorboard
from trainer.show.wandb import WandbHelper, wandb_mode
from trainer.step import StepContext, TrainState

TAIL_BYTES = 2**18
"""End of a log in which the records of the last step are looked for."""
EXIT_STATUS = {
    protocol.FINISHED: errors.EXIT_FINISHED, protocol.PREEMPTED: errors.EXIT_PREEMPTED,
    protocol.FAILED: errors.EXIT_FAILED,
}  # fmt: skip


class Records:
    """Events that all members know alike, and the main one writes: steps, evaluations, changes of the members.

    The main member may die between a step and its record. So every member keeps the events of the last step; the next
    main member looks what the log has, and writes the rest. The file is that of rank 0, whoever writes it: readers of
    the log need not know who was the main member when. It has one writer at a time.

    What one member alone knows goes to a file of its own, by its number; what the main one knows, to the log of all.
    Member 0 begins as the main one, and its file is that of all. So while another one is, member 0 has none: the main
    member records how it leaves, as the arbiter tells all.
    """

    def __init__(
        self, run: Path, attempt: int, member: int, own: EventLog,
        announce: Callable[[EventLog, Change], None], show: Callable[[EventLog, float, contextlib.ExitStack], None],
        writes: bool = True,
    ) -> None:  # fmt: skip
        """`own` is this member's log. `announce` writes that it starts, `show` opens console and W&B.

        `writes` is false in the processes of a group that are not its first: they know the same, and write nothing.
        """
        self._writes = writes
        self._attempt, self._member, self._own = attempt, member, own
        self._announce, self._show = announce, show
        self._path = events.path_of(run, attempt, 0)
        self._recent: list[Event] = []
        """The records of the last step."""
        self._main: EventLog | None = None
        """Open while this member is the main one."""
        self._shown = contextlib.ExitStack()
        self._has_started = False
        self._told = set[str]()
        """Losses that the log of all has."""

    def append(self, event: Event) -> None:
        """Write an event that this member alone knows: into the log of all if it is the main one, else into its own."""
        if self._main is not None:
            self._main.append(event)
        elif self._member != 0 or not self._path.stat().st_size:  # it is nobody's yet
            self._own.append(event)

    def record(self, event: Event) -> None:
        """Take an event that all members know alike."""
        if isinstance(event, StepDone):
            self._recent = []
        if isinstance(event, StepDone | EvalDone):
            if _key(event) in map(_key, self._recent):
                return  # an evaluation that was interrupted is made again
            self._recent.append(event)
        if self._main is not None:
            self._main.append(event)

    def note(self) -> dict[str, Any]:
        """Return what the next main member may need to know."""
        return {"host": elastic.node_name(), "events": [events.to_record(event) for event in self._recent]}

    def changed(self, change: Change) -> None:
        """Take over from a main member that is gone, or hand over to another one; record the change."""
        epoch = change.epoch
        known = [
            r.note.get("events", []) for r in epoch.reports.values() if r.step is not None and r.step == epoch.step
        ]
        self._recent = [events.from_record(record) for record in max(known, key=len, default=[])]
        if not self._has_started:
            self._has_started = True
            if self._member != 0:
                self._announce(self._own, change)
        if epoch.members[0] != self._member or not self._writes:
            self.close()
            return
        if self._main is None:
            self._take_over(change)
        assert self._main is not None
        written = _tail(self._path)
        for event in self._recent:
            if _key(event) not in written:
                self._main.append(event)
        if epoch.number > 1:
            event = _members_changed(change)
            # The arbiter tells a loss until a step is committed: whoever was to record it may have died first.
            event = dataclasses.replace(event, lost={m: why for m, why in event.lost.items() if m not in self._told})
            self._told |= event.lost.keys()
            self._main.append(event)

    def _take_over(self, change: Change) -> None:
        since = time.time()
        is_new = not self._path.exists() or not any(kind == AttemptStarted.kind for kind, *_ in _tail(self._path, None))
        events.mend(self._path)
        changes = [e.event for e in events.read_file(self._path) if isinstance(e.event, MembersChanged)]
        self._told = {member for change_ in changes for member in change_.lost}
        self._main = EventLog(self._path, self._attempt, 0)
        self._show(self._main, 0.0 if is_new else since, self._shown)
        if is_new:
            self._announce(self._main, change)

    def close(self) -> None:
        """Stop writing for all."""
        self._shown.close()
        if self._main is not None:
            self._main.close()
        self._main = None


def _key(event: Event) -> tuple[Any, ...]:
    return event.kind, getattr(event, "step", None), getattr(event, "set", None)


def _tail(path: Path, size: int | None = TAIL_BYTES) -> set[tuple[Any, ...]]:
    """The keys of the events at the end of a log."""
    found = set()
    with contextlib.suppress(OSError), path.open("rb") as file:
        if size is not None:
            file.seek(max(0, file.seek(0, os.SEEK_END) - size))
        for line in file.read().split(b"\n"):
            with contextlib.suppress(ValueError):
                record = json.loads(line)
                found.add((record.get("event"), record.get("step"), record.get("set")))
    return found


def _members_changed(change: Change) -> MembersChanged:
    epoch = change.epoch
    before = {member for member, report in epoch.reports.items() if report.step is not None}
    return MembersChanged(
        epoch=epoch.number,
        members=list(epoch.members),
        lost={str(member): why for member, why in epoch.left.items()},
        joined=[member for member in epoch.members if member not in before],
        step=change.step,
        kept={str(member): list(kept) for member, kept in epoch.kept.items() if kept},
        given={str(member): list(work) for member, work in epoch.work.items() if work},
        seconds=round(change.seconds, 4),
        world_size=change.ranks,
    )


def train(
    config: Config, run: Path, process_started: float, stop: signals.StopSignals | None = None,
    accept_other_bits: bool = False, parent: str = "",
) -> int:  # fmt: skip
    """Take part in the job that the environment describes, as `job.train` does under torchrun; return the exit status.

    Raises a TopropeError for every error that a user can repair; if it would only be repeated, it ends the job.
    """
    stopwatch = job.Stopwatch(process_started)
    elastic.belong_to_agent()
    given = elastic.quorum()
    assert given is not None
    check_world(config, elastic.expected_size())
    injector = faults.arm(config, run, given.rank, elastic.expected_size())
    hook = injector.wrap_hook(no_hook)
    hook(Phase.STARTUP, 0)
    device = world.pick_device(config.parallel)
    with out_of_memory.explained(device):
        job.set_numerics(config, device)
    stop = stop or signals.StopSignals()
    stopwatch.lap("imports")
    job.check_compiler(config, device)
    limits = config.elastic.step_timeout_seconds, config.elastic.startup_timeout_seconds
    timeout = 2 * max(limits) + 60
    with contextlib.ExitStack() as stack:
        stack.callback(injector.close)
        claim = prepare_claim(config, run, World(0, 1, device), accept_other_bits, parent, given.rank == 0)
        hook = job.with_heartbeat(claim.watchdog, hook)
        prepared, facts = job.prepare_data(config, claim)
        stopwatch.lap("data")
        sentinel = Sentinel(config)
        group = groups.join(given, device, timeout, config.parallel.share_gpus)
        stack.callback(world.disconnect)
        with out_of_memory.explained(device):
            state = build(config, facts["vocab_size"], group, sentinel)
            job.capture(state, config, group.world.device)
        state.moments_from = branch.moments_from(claim.parent)
        stopwatch.lap("model")
        # Members meet at the store of the first of them, so each has one from its start.
        host = own_host(given)
        store = world.open_store(host, 0, is_master=True, wait_for_workers=False, alone=True)
        known = identity(config, claim, facts)
        connect = functools.partial(Membership.connect, given, known, f"{host}:{store.port}", limits=limits)
        membership = connect() if group.size == 1 else GroupMembership(group, Path(given.meeting), connect)
        stack.callback(membership.close)
        attempt = membership.facts["attempt"]
        log = stack.enter_context(contextlib.closing(own_log(run, attempt, membership.member, group)))
        log.create()
        claim = dataclasses.replace(claim, attempt=attempt, log=log)
        injector.attach(
            attempt, log, state, prepared, member=membership.member, is_main=lambda: members.world.is_main
        )  # fmt: skip
        # From here on the directory is a run's, and the number of the attempt is known.
        hook(Phase.STARTUP, 0)
        batches = injector.wrap_batches(job.batches_of(config, prepared))
        sentinel.check_tokens(batches, prepared.train.tokens, claim.ranks)
        stopwatch.lap("connect")

        def announce(to: EventLog, change: Change) -> None:
            stopwatch.lap("restore")
            order = change.epoch.members
            first = order.index(membership.member) * group.size
            ranks = World(first + group.place, len(order) * group.size, device)
            named = dataclasses.replace(claim, ranks=ranks, log=to)
            hosts = [str(report.note.get("host")) for report in change.epoch.reports.values()]
            job.announce(config, named, facts, hosts, change.step, stopwatch, injector.notice, begun_from[-1])

        def show(main_log: EventLog, since: float, shown: contextlib.ExitStack) -> None:
            show_run(config, claim, main_log, since, shown)

        def restore(state: Any, ranks: World) -> None:
            checkpointer.restore(state)
            present = dataclasses.replace(claim, ranks=ranks)
            begun_from.append(job.begin_from_parent(present, state))
            job.begin_from_weights(config, present, facts["vocab_size"], prepared, state)

        def finished(state: Any) -> None:
            if state.step == config.budget.steps:
                hook(Phase.BEFORE_END, state.step)
                records.append(ended("finished", state.step, "", state))

        def waiting() -> None:
            if stop.received and not members.has_met:  # nobody counts on this worker yet
                raise JobOver(protocol.PREEMPTED)

        begun_from = [""]
        records = Records(run, attempt, membership.member, log, announce, show, writes=group.world.is_main)
        stack.callback(records.close)
        members = QuorumMembers(
            membership, device, config.data.micro_batches, timeout, restore, records.changed, records.note, waiting,
            group,
        )  # fmt: skip
        unwatched = members.wrap_hook(hook)
        hook = sentinel.wrap_hook(unwatched)
        watched = sentinel.wrap_members(members, state, batches, records)
        context = StepContext(config, watched, batches, hook, stop.requested, lambda: membership.change_wanted)
        saving = MainCheckpointer(
            lambda: members.world, finished, run, group.world, facts, config.checkpoint, records, unwatched, unwatched,
            sentinel.check_before_save, membership.member,
        )  # fmt: skip
        try:
            with contextlib.closing(saving) as checkpointer:
                score = job.scorer(config, prepared, lambda: members.world, hook)
                with out_of_memory.explained(device):
                    done = loop.train(state, loop.Collaborators(context, records.record, score, checkpointer))
            if done:
                if not members.world.has_main:
                    records.append(ended("finished", state.step, "", state))
                membership.leave(protocol.FINISHED)
                return errors.EXIT_FINISHED
            if stop.received:
                records.append(events.StopRequested(signal=stop.received, step=state.step))
            records.append(ended("preempted", state.step, stop.received or "another worker was asked to stop"))
            membership.leave(protocol.PREEMPTED)
            return errors.EXIT_PREEMPTED
        except (RefusedError, ArbiterLostError) as error:
            # The others may have another main member by now, so nothing is written for all. A successor joins.
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            return errors.EXIT_FAILED
        except JobOver as over:
            records.append(ended(over.status, state.step, "the job is over"))
            return EXIT_STATUS[over.status]
        except Exception as error:
            if group.size > 1 and world.lost_peer(error):
                os._exit(errors.EXIT_FAILED)  # another process of this group has died, and its launcher ends all
            fail(records, membership, state.step, error)
            raise


def build(config: Config, vocab_size: int, group: groups.Group, sentinel: Sentinel) -> TrainState:
    """The state of step 0, laid out over the processes of this member."""
    if group.size == 1:
        return job.build(config, vocab_size, group.world, sentinel.watch)
    within = config.parallel.model_copy(update={"strategy": "fsdp"})
    state = job.build(config.model_copy(update={"parallel": within}), vocab_size, group.world, sentinel.watch)
    assert isinstance(state.sharding, FullySharded)
    state.sharding = groups.Shards(state.sharding)
    return state


def own_log(run: Path, attempt: int, member: int, group: groups.Group) -> EventLog:
    """The log of this member. Of a group, its first process keeps it; what the others write goes nowhere."""
    return EventLog.open(run, attempt, member) if group.world.is_main else EventLog(Path(os.devnull), attempt, member)


def prepare_claim(
    config: Config, run: Path, alone: World, accept_other_bits: bool, parent: str, first: bool
) -> job.Claim:
    """Return what `job.claim_run` does, but for this worker alone: the launcher holds the run directory.

    `first`: this worker may be the first to show the run, so it reads how the attempts before have ended.
    """
    wandb_mode(config)
    tensorboard.check(config)
    # Each worker for itself: the file of the config may have changed since the launcher read it.
    rundir.check(run, config)
    own = provenance.computes_with(config, alone.device)
    before = rundir.read(run) if rundir.is_run(run) else {}
    other_bits = provenance.compare(run, before, [own], accept_other_bits)
    log = EventLog(events.events_directory(run) / "not-numbered-yet.jsonl", -1, -1)  # nothing is written to it
    limits = config.elastic.step_timeout_seconds, config.elastic.startup_timeout_seconds
    # Not started: a hang is found by the arbiter, which knows who has not reached the collective.
    watchdog = Watchdog(run, 0, 1, 0, *limits, report=log.append)
    origin = branch.origin(run, config, parent)
    earlier = [e for e in events.read(run) if not isinstance(e.event, events.FaultFired)] if first else []
    return job.Claim(run, -1, alone, log, watchdog, earlier, own, other_bits, accept_other_bits, origin)


def identity(config: Config, claim: job.Claim, facts: dict[str, Any]) -> dict[str, str]:
    """Return what all members of a job must have alike, by name: who differs in one of these is refused by it."""
    digests = {name: str(facts[name]) for name in ("fingerprint", "data_sha256", "tokenizer_sha256")}
    return claim.computes_with | digests | {protocol.MICRO_BATCHES: str(config.data.micro_batches)}


def show_run(config: Config, claim: job.Claim, log: EventLog, since: float, shown: contextlib.ExitStack) -> None:
    """Open console and W&B. `since`: a Unix time; what happened before was shown by another member."""
    earlier = () if since else claim.earlier
    screen = shown.enter_context(console.Console(config, claim.run, earlier=earlier, is_restarted=True))
    log.subscribe(screen)
    helper = WandbHelper(
        claim.run, config, claim.attempt, lambda message: log.append(events.Warned(message=message)), since=since
    )
    shown.callback(lambda: helper.url and print(f"W&B: {helper.url}", flush=True))
    log.subscribe(shown.enter_context(helper))


def ended(status: str, step: int, reason: str, state: Any = None) -> AttemptEnded:
    weights = None if state is None else state.weights_sha256()
    whole = None if state is None else state.state_sha256()
    return AttemptEnded(status=status, step=step, reason=reason, weights_sha256=weights, state_sha256=whole)


def fail(records: Records, membership: Membership | GroupMembership, step: int, error: Exception) -> None:
    """Log why this worker ends, and tell the arbiter if the others would end in the same error."""
    reason = f"{type(error).__name__}: {error}"
    # What is wrong with this worker or its memory is none of the others' business: they go on.
    alone = isinstance(error, TransferError | errors.QuarantineError | errors.OutOfMemoryError)
    repeated = isinstance(error, errors.TopropeError) and not alone and not error.restart
    with contextlib.suppress(Exception):
        if repeated:
            records.append(ended("failed", step, reason))
            elastic.give_up()
        else:
            records.append(events.Warned(message=f"worker {membership.member} leaves: {reason}"))
    membership.leave(protocol.HOPELESS if repeated else protocol.FAILED, first_line(reason))
