"""The invariants: what must hold after a run with faults, whatever the faults were.

Each invariant answers pass, fail, unknown, undetected, or not applicable where the faults asked nothing of it. Runs are
compared with the reference run, which has the same config and no faults.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from trainer.checkpoint import files as checkpoint
from trainer.errors import EXIT_FINISHED, CheckpointError, TopropeError
from trainer.faults.attribution import Evidence, Firing, Reference, reference_of
from trainer.faults.plan import PlannedFault
from trainer.log import events, goodput
from trainer.log.incidents import Incident
from trainer.phases import Phase

__all__ = [
    "INVARIANTS", "Answer", "Answers", "Evidence", "Reference", "answer_of", "check", "check_clusters",
    "every_fault_fired", "measure",
    "reference_of", "status_problems",
]  # fmt: skip

Answers = Literal["pass", "fail", "unknown", "undetected", "not applicable"]

FIRED, EQUAL, SAMPLES, KEPT, CLEAN, DETECTED, RECOVERED, ATTRIBUTED, TIME, STATUS = INVARIANTS = (
    "every fault fired",
    "weights and state equal",
    "every sample once",
    "no checkpoint lost",
    "nothing left behind",
    "detected in time",
    "recovered in time",
    "attributed correctly",
    "time adds up",
    "exit status",
)
NOT_ASKED: Answers = "not applicable"
_WORST_FIRST: tuple[Answers, ...] = ("fail", "undetected", "unknown", "pass", NOT_ASKED)
MEASURED_AS = {DETECTED: "detect_seconds", RECOVERED: "recover_seconds", ATTRIBUTED: "attributed_correctly"}
"""The value in `measure` that an invariant tests; None for a fault of which it asks nothing."""
KNOWN_FILES = {
    "config.json", "tokenizer.json", "lock", "events", "checkpoints", "quorum", "islands", "stacks", "wandb",
    "tensorboard", "curves.png", "timeline.svg",
}  # fmt: skip
BREAKING = {"worker_lost", "hung", "preempted", "checkpoint_rejected"}
"""Incidents that make all workers start again. Damage to a checkpoint comes with the death of a rank."""
UNLOGGED_SECONDS = 60.0
"""Bound, for each start of a job, of the time that is in no log: torchrun's before the first worker and after the last,
and that of ranks that die before they have written anything. The machine may be shared."""


@dataclass(frozen=True)
class Answer:
    invariant: str
    answer: Answers
    why: str = ""  # one line


def check(evidence: Evidence) -> list[Answer]:
    """An answer to each of INVARIANTS, in their order."""
    try:
        _ = evidence.entries, evidence.firings  # reads the log
    except TopropeError as error:
        return [Answer(name, "fail", f"the log cannot be read: {error}".splitlines()[0]) for name in INVARIANTS]
    return [
        every_fault_fired(evidence),
        _weights_and_state_equal(evidence),
        _every_sample_once(evidence),
        _checkpoints_kept(evidence),
        answer_of(CLEAN, [*evidence.leftovers, *(f"stray file {name}" for name in strays(evidence.run))]),
        _answer_if_asked(evidence, DETECTED, _late_detections(evidence)),
        _answer_if_asked(evidence, RECOVERED, _late_recoveries(evidence)),
        _answer_if_asked(evidence, ATTRIBUTED, _wrong_attributions(evidence)),
        answer_of(TIME, _time_problems(evidence)),
        answer_of(STATUS, status_problems(evidence)),
    ]


def check_clusters(of_clusters: Sequence[Evidence]) -> list[Answer]:
    """An answer to each of INVARIANTS for clusters that live apart, each of which has a run directory of its own: the
    worst of theirs. Checkpoints, time and exit status are those of the run, which is the first one's.
    """
    found = [check(evidence) for evidence in of_clusters]
    asked = [found[:1] if name in (KEPT, TIME, STATUS) else found for name in INVARIANTS]
    return [
        min((answers[place] for answers in some), key=lambda answer: _WORST_FIRST.index(answer.answer))
        for place, some in enumerate(asked)
    ]


def measure(evidence: Evidence) -> list[dict[str, Any]]:
    """For each fault that fired: {index, kind, victim, step, fired, detect_seconds, recover_seconds, detected_as,
    attributed_correctly}. Times in seconds, `fired` in Unix seconds.
    """
    return [
        {
            "index": found.firing.fault.index,
            "kind": found.firing.fault.kind.name,
            "victim": found.firing.first.victim,
            "step": found.firing.first.step,
            "fired": found.firing.time,
            "detect_seconds": found.detect_seconds,
            "recover_seconds": found.recover_seconds,
            "detected_as": found.incident.kind if found.incident else None,
            "attributed_correctly": found.correct,
        }
        for found in evidence.attributions
    ]


def strays(run: Path) -> list[str]:
    """Files that should not be left in a run directory: temporary and unknown ones."""
    if not run.is_dir():
        return []
    odd = [path for path in run.iterdir() if path.name not in KNOWN_FILES]
    saved = checkpoint.directory(run)
    odd += [path for path in saved.iterdir() if not path.name.startswith("step-")] if saved.is_dir() else []
    odd += [path for path in run.rglob("*") if path.name.endswith((".partial", ".tmp"))]
    return sorted({str(path.relative_to(run)) for path in odd})


def answer_of(invariant: str, problems: Iterable[str]) -> Answer:
    """The answer of an invariant that holds unless there are problems."""
    found = list(problems)
    return Answer(invariant, "fail", _joined(found)) if found else Answer(invariant, "pass")


def _joined(problems: Sequence[str]) -> str:
    more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
    return "; ".join(" ".join(problem.split()) for problem in problems[:3]) + more


def every_fault_fired(evidence: Evidence) -> Answer:
    """The answer to the first invariant: only a fault that fired tests anything."""
    if not evidence.planned:
        return Answer(FIRED, NOT_ASKED, "no fault was planned")
    fired = evidence.fired_times
    # In quorum mode nobody waits for a successor, in which a fault fires again.
    least = {
        fault.index: fault.times * (1 + fault.kind.neighbours) if fault.mode == "quorum" else 1
        for fault in evidence.planned
    }
    missing = [fault for fault in evidence.planned if fired[fault.index] < least[fault.index]]
    if not missing:
        return Answer(FIRED, "pass")

    def is_about(reason: str, fault: PlannedFault) -> bool:
        # The description of one fault may be the beginning of another's, so what follows it must match too.
        return any(f"{fault}{then}" in reason for then in (" did not fire", " cannot be made", ":"))

    warned = [event.message for _, event in events.select(evidence.entries, events.Warned)]
    notes = list(dict.fromkeys([*(message for message in warned if "did not fire" in message), *evidence.notes]))

    def how_often(fault: PlannedFault) -> str:
        times = fired[fault.index]
        return f"{fault} fired {times} of {least[fault.index]} times" if times else f"{fault} never fired"

    reasons = [next((text for text in notes if is_about(text, fault)), how_often(fault)) for fault in missing]
    general = [text for text in notes if not any(is_about(text, fault) for fault in evidence.planned)]
    return Answer(FIRED, "unknown", _joined([*reasons, *general]))


def _weights_and_state_equal(evidence: Evidence) -> Answer:
    reference = evidence.reference
    if not reference.exact:
        return Answer(EQUAL, "unknown", "numerics.exact = false: sums depend on their order, so nothing can be equal")
    if reference.weights_sha256 is None:
        return Answer(EQUAL, "unknown", "the reference run did not finish")
    if evidence.history.finish is None:
        return Answer(EQUAL, "fail", "the run did not finish")
    silent = [firing for firing in evidence.firings if firing.fault.kind.silent]
    if difference := _difference(evidence):
        return Answer(EQUAL, "undetected" if silent else "fail", difference)
    harmless = silent and not evidence.incidents
    why = f"{_joined([str(firing) for firing in silent])} alone left no trace" if harmless else ""
    return Answer(EQUAL, "pass", why)


def _difference(evidence: Evidence) -> str:
    """The first difference of the end, or of a step that was computed again; empty if there is none."""
    reference = evidence.reference
    for entry, end in events.select(evidence.entries, events.AttemptEnded):
        if entry.rank != 0 and end.reason:
            continue  # a quorum's spare, which never had a state, saw the others finish
        for name in ("weights_sha256", "state_sha256") if end.status == "finished" else ():
            if getattr(end, name) != getattr(reference, name):
                return f"{name} of rank {entry.rank} differs from the reference run's"
    seen: dict[int, str] = {}
    for _, event in evidence.history.steps:
        result = repr((event.loss, event.grad_norm, event.samples))  # as text, since a NaN must equal itself
        if seen.setdefault(event.step, result) != result:
            return f"step {event.step} gave another result when it was computed again"
    return ""


def _every_sample_once(evidence: Evidence) -> Answer:
    samples, reference = evidence.history.committed_samples, evidence.reference.samples
    if not reference:
        return Answer(SAMPLES, "unknown", "the reference run has no steps to compare with")
    wrong = [f"step {step} was computed from other samples" for step in samples if samples[step] != reference.get(step)]
    missing = [f"step {step} is not in the log" for step in sorted(reference.keys() - samples.keys())]
    return answer_of(SAMPLES, [*wrong, *missing, *_wrong_shares(evidence)])


def _wrong_shares(evidence: Evidence) -> Iterator[str]:
    """Quorum mode: steps that an attempt committed twice, and micro-batches that an interrupted step has not once."""
    every = list(range(evidence.config.data.micro_batches))
    for attempt in evidence.history.attempts:
        last = -1
        for entry in attempt.main_entries:
            event = entry.event
            if isinstance(event, events.StepDone):
                if event.step <= last:
                    yield f"step {event.step} was committed again, though its state was not lost"
                last = event.step
            elif isinstance(event, events.MembersChanged):
                if set(event.members) == set(event.joined):  # nobody left had the state: it is that of a checkpoint
                    last = event.step
                    continue
                shares = [*event.kept.values(), *event.given.values()]
                if sorted(index for share in shares for index in share) != every:
                    yield f"epoch {event.epoch} gave its members not each micro-batch of step {event.step + 1} once"


def _checkpoints_kept(evidence: Evidence) -> Answer:
    problems = list(_lost_checkpoints(evidence))
    if not problems and not checkpoint.committed(evidence.run):
        return Answer(KEPT, NOT_ASKED, "the run ended before it had saved a checkpoint")
    return answer_of(KEPT, problems)


def _lost_checkpoints(evidence: Evidence) -> Iterator[str]:
    """Committed checkpoints that are gone, damaged ones that are still there, and progress that was not used."""
    try:
        visible = checkpoint.committed(evidence.run)
    except CheckpointError as error:
        yield str(error).splitlines()[0]
        return
    for saved in visible:
        if bad := checkpoint.verify(saved):
            yield f"{saved.path.name}: {_joined(bad)}"
    visible_steps = {saved.step for saved in visible}
    logged = {event.step for _, event in events.select(evidence.entries, events.CheckpointSaved)}
    settings, last = evidence.config.checkpoint, evidence.config.budget.steps
    # A checkpoint may have been committed just before its rank died: it counts, though it is in no log.
    newest = sorted(logged | visible_steps, reverse=True)[: settings.keep_last]
    kept = {step for step in logged if settings.keep_every_steps and step % settings.keep_every_steps == 0}
    for step in sorted({*newest, *kept} - visible_steps):
        yield f"the checkpoint of step {step} is gone"
    if evidence.history.finish is not None and last not in visible_steps:
        yield f"the run finished without a checkpoint of step {last}"
    # Attempts must begin at the newest checkpoint that was committed and that no attempt had rejected.
    durable = {0}
    for entry in evidence.entries:
        match entry.event:
            case events.CheckpointSaved(step=step):
                durable.add(step)
            case events.CheckpointRejected(step=step):
                durable.discard(step)
            case events.AttemptStarted(from_step=begun) if entry.rank == 0 and begun < max(durable):
                newest_step = max(durable)
                yield f"attempt {entry.attempt} began at step {begun}, though that of step {newest_step} was committed"
            case events.MembersChanged(step=begun, members=members, joined=joined) if set(members) == set(joined):
                if begun < (newest_step := max(durable)):
                    yield f"epoch {entry.event.epoch} began at step {begun}, though {newest_step} was committed"


def _answer_if_asked(evidence: Evidence, invariant: str, problems: Iterable[str]) -> Answer:
    """The answer of an invariant that asks something of some faults only: it passes if it was tested and held."""
    answer = answer_of(invariant, problems)
    if answer.answer == "fail" or any(fault[MEASURED_AS[invariant]] is not None for fault in measure(evidence)):
        return answer
    if invariant == ATTRIBUTED and any(firing.fault.kind.unnoticed for firing in evidence.firings):
        return answer  # there was no false alarm
    fired = {firing.fault.index for firing in evidence.firings}
    for fault in evidence.planned:
        asked = not fault.kind.moves_clock if invariant == RECOVERED else bool(fault.kind.expected_incidents)
        if asked and fault.index not in fired:
            return Answer(invariant, "unknown", f"{fault} did not fire")
    return Answer(invariant, NOT_ASKED, "no fault of this run asks for it")


def _patience(evidence: Evidence, firing: Firing) -> float:
    """Seconds without progress after which the config takes a rank for hung; 0 for a fault that is no hang."""
    # By the class: in quorum mode the arbiter ends such a rank after that time, and it counts as lost.
    if "hung" not in type(firing.fault.kind).expected_incidents:
        return 0.0
    settings = evidence.config.elastic
    starts = events.select(evidence.entries, events.AttemptStarted)
    begun = [start.from_step for entry, start in starts if entry.attempt == firing.attempt]
    first_step = not begun or firing.fault.point_step is None or firing.fault.point_step <= min(begun)
    return max(settings.startup_timeout_seconds if first_step else 0.0, settings.step_timeout_seconds)


def _late_detections(evidence: Evidence) -> Iterator[str]:
    for found in evidence.attributions:
        firing, seconds, kind = found.firing, found.detect_seconds, found.firing.fault.kind
        bound = kind.detect_seconds + _patience(evidence, firing)
        if seconds is None and kind.expected_incidents:
            yield f"{firing}: not noticed"
        elif seconds is not None and seconds > bound:
            yield f"{firing}: noticed after {seconds:.1f} s, the bound is {bound:g} s"


def _late_recoveries(evidence: Evidence) -> Iterator[str]:
    for found in evidence.attributions:
        firing, seconds = found.firing, found.recover_seconds
        # The log says that the run has finished: in quorum mode nothing has to follow.
        is_over = firing.fault.mode == "quorum" and firing.fault.phase == Phase.AFTER_END
        if firing.fault.kind.moves_clock or is_over:
            continue
        if seconds is None:
            yield f"{firing}: no new step followed"
            continue
        # Faults that hit while this one is being recovered from take their own time.
        meanwhile = [f for f in evidence.firings if firing.time <= f.time <= firing.time + seconds]
        bound = sum(f.fault.kind.recover_seconds + _patience(evidence, f) for f in meanwhile)
        if seconds > bound:
            yield f"{firing}: the next new step came after {seconds:.1f} s, the bound is {bound:g} s"


def _wrong_attributions(evidence: Evidence) -> Iterator[str]:
    yield from (f"{found.firing}: {found.problem}" for found in evidence.attributions if found.correct is False)
    yield from (f"false alarm: {incident.text}" for incident in _false_alarms(evidence))


def _false_alarms(evidence: Evidence) -> list[Incident]:
    """Incidents that none of the faults can have caused."""
    kinds = [firing.fault.kind for firing in evidence.firings]
    # Such a fault may cause any incident in any attempt.
    if any(kind.silent or (kind.from_outside and not kind.unnoticed) or kind.repeats for kind in kinds):
        return []
    expected = {name for kind in kinds for name in kind.expected_incidents}
    broken = {
        firing.attempt
        for firing in evidence.firings
        if firing.fault.kind.exits != (EXIT_FINISHED,) or BREAKING & {*firing.fault.kind.expected_incidents}
    }
    explained = [attribution.incident for attribution in evidence.attributions]
    hit = {name for firing in evidence.firings for name in firing.names}
    caused = {(name, firing.attempt) for firing in evidence.firings for name in firing.fault.kind.may_cause}
    secondary = ("worker_lost", "save_failed")  # the death of one rank breaks the others and the save under way
    return [
        incident
        for incident in evidence.incidents
        if not any(incident is other for other in explained)
        and (incident.kind, incident.attempt) not in caused
        and (incident.kind not in expected or incident.kind in secondary)
        # In quorum mode the death of one worker ends no other.
        and not (incident.kind in secondary and incident.attempt in broken and _may_follow(incident, hit))
    ]


def _may_follow(incident: Incident, hit: set[int | None]) -> bool:
    """True if an incident may be the consequence of another one, where these ranks or workers were hit."""
    return incident.ends_attempt or incident.kind != "worker_lost" or bool(hit & {incident.rank, *incident.others})


def _time_problems(evidence: Evidence) -> Iterator[str]:
    account = goodput.account(evidence.history)
    wall, parts = account["wall_seconds"], account["parts"]
    if wall is None:
        yield "no attempt has started"
        return
    yield from (f"{name} took {seconds:.3f} s" for name, seconds in parts.items() if seconds < 0)
    if abs(math.fsum(parts.values()) - wall) > 1e-3:
        yield f"the parts sum to {math.fsum(parts.values()):.3f} s, the run took {wall:.3f} s"
    ended = [launch["ended"] for launch in evidence.launches if launch["ended"] is not None]
    if not ended or any(firing.fault.kind.moves_clock for firing in evidence.firings):
        return
    job_seconds = max(ended) - evidence.launches[0]["started"]
    if wall > job_seconds + 0.5:
        yield f"the log covers {wall:.1f} s, more than the job lasted"
    if wall < job_seconds - UNLOGGED_SECONDS * len(evidence.launches):
        yield f"the log covers {wall:.1f} s only, and the job lasted {job_seconds:.1f} s"


def status_problems(evidence: Evidence, explained: Sequence[int] = ()) -> Iterator[str]:
    """Exit statuses that no fault explains. Those in `explained` need no fault; the last start must leave with 0."""
    for number, launch in enumerate(evidence.launches, start=1):
        status, ended = launch["status"], launch["ended"]
        before = [firing.fault.kind for firing in evidence.firings if ended is None or firing.time <= ended]
        if status is None:
            yield f"start {number} did not end on its own within {ended - launch['started']:.0f} s"
        elif status not in (EXIT_FINISHED, *explained) and not any(status in kind.exits for kind in before):
            yield f"start {number} left with {status}, which no fault that had fired explains"
    if not evidence.launches or evidence.launches[-1]["status"] != EXIT_FINISHED:
        yield "the last start did not leave with 0"
