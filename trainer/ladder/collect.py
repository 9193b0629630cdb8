"""Results of a ladder's runs, read from their event logs: what the statistics take and what a report shows."""

import dataclasses
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from trainer.config import Data, Eval
from trainer.data import sha256_of_text
from trainer.errors import NumericsError, TopropeError
from trainer.fleet.run_store import RunState, RunStatus
from trainer.ladder import ensembles
from trainer.ladder.plan.ladder import Ladder, PlannedRun
from trainer.ladder.plan.schema import CODE_LENGTH
from trainer.ladder.stats.records import Axis, JsonRecord, RunResult
from trainer.ladder.stored import stored
from trainer.log import events, goodput, rundir
from trainer.log.code_length import CodeLength
from trainer.log.events import EvalDone, FaultFired, NotFinite
from trainer.log.history import History

FASTEST_SHARE = 200
"""The fastest 1 in 200 steps (at least one) give the undisturbed duration of a step."""
SPIKE_WINDOW, SPIKE_DEVIATIONS = 32, 6.0
"""A spike is a loss 6 robust standard deviations above the median of the 32 losses before it."""


@dataclass(frozen=True)
class CollectedRun(JsonRecord):
    """One planned run in its present state."""

    arm: str
    rung: str
    seed: int
    rate: float | None
    """Multiplier of the learning rate in a sweep; None outside of sweeps."""
    key: str
    status: RunStatus
    reason: str
    """Reason, if the run is missing."""
    flops: float
    parameters: int
    tokens: int
    steps: int
    step: int
    unique_tokens: int = 0
    """U; 0: all of the text."""
    members: int = 0
    """Number of the runs that this is made of; 0: it is one run. Their averaged probabilities were scored, or the
    others taught the last."""
    loss: float | None = None
    """The ladder's metric at the last step; None while there is none, not finite if the run diverged."""
    downstream: float | None = None
    """The score of the ladder's `downstream` set at the last step, in the metric's unit; None where there is none."""
    downstream_digest: str | None = None
    digest: str | None = None
    """Digest of the held-out tokens that the run was scored on; of the training data for "code_length"."""
    seconds: float | None = None
    """Duration of the committed steps."""
    undisturbed_seconds: float | None = None
    """Duration of the committed steps if each took as long as the fastest few: the cost of the computation itself.
    Other users of the machine only make steps slower. With a load of 8 on 2 cores, the ratio of two equal runs had a
    standard deviation of 42 % by sums or medians, and of 9 % by the fastest step."""
    wall_seconds: float | None = None
    """Time from the first start to the end, with start-up, evaluation, saves and faults."""
    spent: dict[str, float] = field(default_factory=dict)
    """Seconds by part of the wall time, as in trainer/log/goodput.py."""
    attempts: int = 0
    faults: list[dict[str, Any]] = field(default_factory=list)
    """Injected faults that fired: {kind, step, attempt}."""
    replayed: int = 0
    """Number of steps computed again because a death had lost them."""
    redone: int = 0
    """Number of steps computed again on a coarser grid."""
    not_finite: int = 0
    """Number of computations of a step that were not finite."""
    spikes: list[int] = field(default_factory=list)
    """Steps whose loss stood out above the losses before it."""
    weights_sha256: str | None = None
    data_sha256: str | None = None
    """Digest of the text that the run was trained on."""
    git_commit: str | None = None
    machine: tuple[str, str, int] | None = None
    """(host, device, ranks); None if the run used more than one machine."""

    @classmethod
    def of(cls, run: PlannedRun, state: RunState) -> "CollectedRun":
        """Return what is known of a run without its event log."""
        return cls(
            run.arm, run.rung, run.seed, run.rate, run.key, state.status, state.reason, run.flops, run.parameters,
            run.tokens, run.config.budget.steps, state.step, run.unique_tokens, len(run.members),
        )  # fmt: skip


def collect_runs(ladder: Ladder, pool: Path, runs: Sequence[PlannedRun]) -> list[CollectedRun]:
    """Collect each of `runs`, in their order.

    A run that was trained on other text than its config's source holds now counts as missing, and so does one that was
    scored on other tokens than most: the held-out set changed ("repo" does so).
    """
    file = ladder.file
    collected = [collect_run(run, pool, file.metric, file.unit, file.downstream) for run in runs]
    texts: dict[Data, str | None] = {}
    for number, (run, result) in enumerate(zip(runs, collected, strict=True)):
        settings = run.config.data.model_copy(update={"unique_tokens": 0})  # of the same text
        if result.data_sha256 is not None and settings not in texts:
            texts[settings] = _text_now(settings, run.config.eval)  # held-out sets are those of the ladder
        if texts.get(settings) and result.data_sha256 not in (None, texts[settings]):
            reason = (
                f"It was trained on another text than {settings.source!r} holds now.\n"
                f"  Runs are compared on one text. Restore it, or remove {result.key} from the pool to run it again."
            )
            collected[number] = dataclasses.replace(
                result, status="missing", reason=reason, loss=None, digest=None, downstream=None, downstream_digest=None
            )
    odd, odd_downstream = (
        _odd(runs, [getattr(it, name) for it in collected]) for name in ("digest", "downstream_digest")
    )
    for number, result in enumerate(collected):
        if result.downstream_digest in odd_downstream:
            collected[number] = result = dataclasses.replace(result, downstream=None)
        if result.digest in odd:
            reason = (
                "It was scored on another text than most runs: the held-out set has changed since.\n"
                f"  Losses on two texts cannot be compared. Remove {result.key} from the pool, and it is run again."
            )
            collected[number] = dataclasses.replace(result, status="missing", reason=reason, loss=None, downstream=None)
    return collected


def _odd(runs: Sequence[PlannedRun], digests: Sequence[str | None]) -> set[str]:
    """Digests of another text than most runs were scored on."""
    # An arm's tokenizer or context turns the same text into other tokens, so digests are compared within groups.
    groups: dict[tuple[str, int, int], Counter[str]] = {}
    for run, digest in zip(runs, digests, strict=True):
        data = run.config.data
        found = groups.setdefault((data.tokenizer, data.vocab_size, run.config.model.context), Counter())
        found.update([digest] if digest is not None else [])
    return {digest for found in groups.values() for digest, _ in found.most_common()[1:]}


def _text_now(settings: Data, held_out: Eval) -> str | None:
    """Digest of the text that these settings name; None where it cannot be read now."""
    try:
        return sha256_of_text(settings, held_out)
    except TopropeError:
        return None


def run_results(collected: Sequence[CollectedRun], axis: Axis = "compute") -> list[RunResult]:
    """Return the runs that finished or diverged, for fit and verdict; the target's too, with rung TARGET.

    `axis` says what the rungs are amounts of. Seconds are those of an undisturbed run. They are None for a run on
    another machine than most: comparing them would compare machines.
    """
    machines = Counter(run.machine for run in collected if run.status == "finished" and run.machine is not None)
    usual_machines = [machine for machine, _ in machines.most_common(1)]
    return [
        RunResult(
            run.arm, run.rung, run.seed, run.flops if axis == "compute" else float(run.unique_tokens),
            run.parameters, run.tokens, run.loss,
            run.undisturbed_seconds if run.machine in usual_machines and math.isfinite(run.loss) else None,
        )
        for run in collected
        if run.loss is not None
    ]  # fmt: skip


def collect_run(planned: PlannedRun, pool: Path, metric: str, unit: str, downstream: str = "") -> CollectedRun:
    """Read one run from its files as they are now."""
    if planned.members:
        return _collect_several(planned, pool, metric, unit, downstream)
    found = stored(pool, planned)
    # Without a readable log a run is shown as its files have it: waiting, running, or missing with a reason.
    unread = CollectedRun.of(planned, found.read_state(planned.config.budget.steps))
    unread = dataclasses.replace(unread, key=found.directory.name)
    try:
        entries = events.read(found.run)
        about = rundir.read(found.run) if entries else {}
    except TopropeError as error:
        return dataclasses.replace(unread, status="missing", reason=str(error))
    if not entries:
        return unread
    history = History.from_entries(entries)
    score = _score(history, unread, metric, unit)
    if metric == CODE_LENGTH and unread.status == "finished":
        score = _code_length(history, unread, unit) | {"digest": about.get("data_sha256")}
    if downstream and unread.status == "finished" and (last := _last_score(history, unread, downstream)):
        score |= {"downstream": _in_unit(last, unit), "downstream_digest": last.digest}
    recorded = {key: about.get(key) for key in ("git_commit", "data_sha256")}
    return dataclasses.replace(unread, **_measure(history) | score, **recorded)


def _collect_several(planned: PlannedRun, pool: Path, metric: str, unit: str, downstream: str) -> CollectedRun:
    """Read an ensemble, or a run with its teachers: its score, and what its members took together."""
    members = [collect_run(member, pool, metric, unit, downstream) for member in planned.members]
    collected = CollectedRun.of(planned, RunState("waiting"))
    missing = next((member for member in members if member.status == "missing"), None)
    if missing is not None:
        diverged = missing.loss is not None  # and so is not finite
        return dataclasses.replace(
            collected, status="missing", reason=f"a member is missing: {missing.reason}",
            loss=math.nan if diverged else None,
        )  # fmt: skip
    if any(member.status != "finished" for member in members):
        return collected
    found: dict[str, Any]
    if planned.distil:
        student = members[-1]
        if ensembles.has_other_teachers(pool, planned.members[-1]):
            return dataclasses.replace(
                collected, status="missing",
                reason="it learnt from other weights than its teachers, made anew, have now: remove its folder",
            )  # fmt: skip
        found = {name: getattr(student, name) for name in ("loss", "digest", "downstream", "downstream_digest")}
    else:
        scores = ensembles.read(pool, planned)
        if scores is None:
            return collected
        first, second = scores.get(metric, {}), scores.get(downstream, {})
        key = "bits_per_byte" if unit == "bits_per_byte" else "loss"
        found = {"loss": first.get(key), "digest": first.get("digest")}
        found |= {"downstream": second.get(key), "downstream_digest": second.get("digest")}
    seconds: dict[str, Any] = {}
    for name in ("seconds", "undisturbed_seconds", "wall_seconds"):
        values = [getattr(member, name) for member in members]
        seconds[name] = None if None in values else math.fsum(values)
    texts, machines = ({getattr(member, key) for member in members} for key in ("data_sha256", "machine"))
    return dataclasses.replace(
        collected, status="finished", step=collected.steps,
        data_sha256=texts.pop() if len(texts) == 1 else None, machine=machines.pop() if len(machines) == 1 else None,
        **seconds, **found,
    )  # fmt: skip


def _measure(history: History) -> dict[str, Any]:
    """Everything about a run except its score, by the names of CollectedRun's fields."""
    committed = history.committed
    # A step that was computed several times, on coarser grids, has the total of its computations.
    durations = sorted(step.seconds / (1 + step.redone) for step in committed.values())
    # Runs share a machine, so medians would measure the neighbours. The fastest steps were hardly disturbed.
    fastest = durations[: max(1, len(durations) // FASTEST_SHARE)]
    starts = [event for attempt in history.attempts for _, event in attempt.starts.values()]
    machines = {(start.host, start.device, start.world_size) for start in starts}
    ends = [attempt.ends[0][1] for attempt in history.attempts if attempt.main_status == "finished"]
    account = goodput.account(history)
    return {
        "seconds": math.fsum(durations) if durations else None,
        "undisturbed_seconds": len(durations) * statistics.fmean(fastest) if durations else None,
        "wall_seconds": account["wall_seconds"],
        "spent": account["parts"],
        "attempts": sum(bool(attempt.main_entries) for attempt in history.attempts),
        "faults": [
            {"kind": event.fault, "step": event.step, "attempt": entry.attempt}
            for entry, event in events.select(history.fired, FaultFired)
        ],
        "replayed": len(history.steps) - len({step.step for _, step in history.steps}),
        "redone": sum(step.redone > 0 for step in committed.values()),
        "not_finite": len(events.select(history.entries, NotFinite, rank=0)),
        "spikes": find_spikes([committed[step].loss for step in sorted(committed)]),
        "weights_sha256": ends[0].weights_sha256 if ends else None,
        "machine": machines.pop() if len(machines) == 1 else None,
    }


def _score(history: History, run: CollectedRun, metric: str, unit: str) -> dict[str, Any]:
    """Loss and digest of a finished run; the loss of a run that diverged is NaN."""
    if run.status != "finished":
        # A failure of an earlier attempt was repaired by the next one: the last one tells whether the run diverged.
        failures = [attempt.ends[0][1] for attempt in history.attempts if attempt.main_status == "failed"]
        diverged = any(end.reason.startswith(NumericsError.__name__) for end in failures[-1:])
        return {"loss": math.nan if diverged and run.status == "missing" else None}
    last = _last_score(history, run, metric)
    if last is None:
        return {}
    if _in_unit(last, unit) is None:
        reason = (
            f"Its tokens of the held-out set {metric!r} stand for no text, so it has no bits per byte.\n"
            "  A tokenizer that knows none of the set's characters cannot be compared with others on it."
        )
        return {"status": "missing", "reason": reason}
    return {"loss": _in_unit(last, unit), "digest": last.digest}


def _last_score(history: History, run: CollectedRun, name: str) -> EvalDone | None:
    """A held-out set's score after the last step."""
    # A run that resumed after its last step was scored again: the newest score counts.
    scores = [event for _, event in events.select(history.entries, EvalDone) if event.set == name]
    return next((score for score in reversed(scores) if score.step == run.steps), None)


def _in_unit(score: EvalDone, unit: str) -> float | None:
    return score.bits_per_byte if unit == "bits_per_byte" else score.loss


def _code_length(history: History, run: CollectedRun, unit: str) -> dict[str, Any]:
    """Mean loss of a finished run over its training text, each batch scored before it was learnt from."""
    length = CodeLength.of(history)
    why, remedy = length.why_unknown(run.steps), f"Remove {run.key} from the pool, and it is run again."
    if why is None and len(length.sums) < run.steps:
        why = f"it reads text again after step {len(length.sums)}, and what has been learnt from is no code"
        remedy = "Give more text or fewer tokens, or compare by a held-out set."
    last = length.sums[-1] if length.sums else None
    loss = None if last is None else last.bits_per_byte if unit == "bits_per_byte" else last.nats / last.tokens
    if why is None and loss is None:
        why, remedy = "its tokens stand for no text, so it has no bits per byte", "Use another tokenizer."
    if why is not None:
        return {"status": "missing", "reason": f"It has no code length: {why}.\n  {remedy}"}
    return {"loss": loss}


def find_spikes(losses: Sequence[float]) -> list[int]:
    """Return the steps (from 1) whose loss is a spike: see SPIKE_WINDOW and SPIKE_DEVIATIONS."""
    if len(losses) <= SPIKE_WINDOW:
        return []
    before = np.lib.stride_tricks.sliding_window_view(np.array(losses[:-1]), SPIKE_WINDOW)
    # Medians, because an earlier spike in the window must not hide this one. 1.4826 makes the median absolute
    # deviation the standard deviation of normally distributed losses.
    median = np.median(before, axis=1)
    deviation = 1.4826 * np.median(abs(before - median[:, None]), axis=1)
    found = (np.array(losses[SPIKE_WINDOW:]) > median + SPIKE_DEVIATIONS * deviation) & (deviation > 0)
    return (np.flatnonzero(found) + SPIKE_WINDOW + 1).tolist()
