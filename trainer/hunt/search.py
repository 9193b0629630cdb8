"""From symptoms to a wrong operator: replay, check every call, rank, confirm, make it small.

A run is a pure function of its config, so the step that a symptom shows in can be computed again, each of its calls
held against a reference. Suspects are ranked by evidence: the share of the symptoms that they explain, then how far
beyond its tolerance the worst call is. The first is confirmed by computing again with that operator alone replaced by
its reference: the symptom must go.
"""

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainer.errors import UsageError
from trainer.hunt import reproduction
from trainer.hunt.replay import Replay, StepNotReachedError, Taken
from trainer.hunt.symptoms import Symptom, samples, symptoms_of
from trainer.log import events, rundir
from trainer.log.history import History
from trainer.sentinel.operator_check import Failure, OperatorCheck

STEPS = 10  # replayed under the check, at most
WITHOUT_SYMPTOMS = 3
CONFIRMED = 4  # symptoms by which the first suspect is confirmed
REPORT, PAGE, PICTURE = "hunt.json", "hunt.html", "hunt.svg"


@dataclass
class Checked:
    """A step that was computed again, each of its calls held against its reference."""

    step: int
    taken: Taken
    as_logged: bool | None
    """True if loss and gradient norm have the bits of the log; None if the log has no such step."""
    calls: int
    failed: dict[str, int]
    """Number of wrong calls by operator."""


@dataclass
class Suspect:
    """An operator with wrong calls."""

    operator: str
    calls: int = 0
    failed: int = 0
    excess: float = 0.0
    """Largest error divided by its tolerance."""
    explains: list[int] = field(default_factory=list)
    """Numbers of the symptoms in whose steps it was wrong."""
    steps: list[int] = field(default_factory=list)
    shapes: Counter[str] = field(default_factory=Counter)
    failed_shapes: Counter[str] = field(default_factory=Counter)
    places: Counter[str] = field(default_factory=Counter)
    """Wrong calls by rank."""
    failures: list[Failure] = field(default_factory=list)


def hunt(run: Path, steps: Sequence[int], out: Path, log: Callable[[str], None], auto: bool = True) -> dict[str, Any]:
    """Hunt in a run for a wrong operator; return the report as a tree. Files of the reproduction go to `out`.

    `steps` are looked at whatever the log shows; without `auto`, they alone. Raises an error that says why, where
    the run cannot be computed again.
    """
    last = rundir.config_of(run).budget.steps
    if beyond := [step for step in steps if step > last]:
        raise UsageError(f"--step {beyond[0]} is beyond the run's {last} steps.\n  Give a step from 1 to {last}.")
    symptoms = [s for s in symptoms_of(run, steps) if auto or s.kind == "asked"]
    nothing_unusual = not symptoms
    symptoms = symptoms or samples(run, WITHOUT_SYMPTOMS)
    replay = Replay(run, log)
    planned, left_out = plan(symptoms, run)
    checked: list[Checked] = []
    suspects: dict[str, Suspect] = {}
    unchecked: Counter[tuple[str, str]] = Counter()
    unreached: list[str] = []
    refused: StepNotReachedError | None = None
    for step in planned:
        log(f"checking every call of step {step}")
        try:
            found, check = _checked(replay, step, run)
        except StepNotReachedError as error:
            unreached.append(str(error).splitlines()[0])
            refused = error
            continue
        checked.append(found)
        unchecked += check.unchecked
        _add(suspects, check, step, symptoms)
    _evaluations(replay, symptoms, suspects, unchecked, unreached, log)
    if refused is not None and not checked and not suspects:
        raise refused
    ranked = sorted((s for s in suspects.values() if s.failed), key=lambda s: (-len(s.explains), -s.excess, s.operator))
    confirmations: list[dict[str, Any]] = []
    script = None
    if ranked:
        first = ranked[0]
        log(f"confirming {first.operator}")
        for number in first.explains[:CONFIRMED]:
            try:
                confirmations.append(confirm(replay, symptoms[number], first.operator))
            except StepNotReachedError as error:
                unreached.append(f"{symptoms[number].text}: {str(error).splitlines()[0]}")
        log("making the call small")
        number = first.steps[0] if first.steps else symptoms[first.explains[0]].step
        machine = replay.machine_at(number, first.places.most_common(1)[0][0])
        script = reproduction.write(first.failures, str(run), machine, out / "reproduction")
    return {
        "run": str(run), "ranks": replay.ranks,
        "nothing_unusual": nothing_unusual, "symptoms": [_plain(asdict(symptom)) for symptom in symptoms],
        "checked": [_plain(asdict(one)) for one in checked],
        "suspects": [_suspect(s, len(symptoms), replay.ranks) for s in ranked],
        "runners_up": [
            {"operator": s.operator, "worst": s.excess}
            for s in sorted(suspects.values(), key=lambda s: -s.excess) if not s.failed and s.excess > 0
        ][:4],
        "confirmations": confirmations, "reproduction": script, "planted": replay.planted,
        "not_checked": unreached + _not_checked(unchecked, left_out, checked, symptoms, ranked),
        "series": _series(run),
        "summary": _summary(symptoms, nothing_unusual, checked, ranked, confirmations),
    }  # fmt: skip


def plan(symptoms: Sequence[Symptom], run: Path) -> tuple[list[int], list[int]]:
    """(steps to check in the order of computing, numbers of symptoms for which there was no room)."""
    norms = {event.step: event.grad_norm for _, event in History.read(run).steps}
    middle = sorted(math.log(n) for n in norms.values() if math.isfinite(n) and n > 0)
    usual = middle[len(middle) // 2] if middle else 0.0

    def odd(step: int) -> float:
        norm = norms.get(step, math.inf)
        return abs(math.log(norm) - usual) if math.isfinite(norm) and norm > 0 else math.inf

    chosen: dict[int, None] = {}
    left_out: list[int] = []
    for number, symptom in enumerate(symptoms):
        possible = range(symptom.since, symptom.step + 1)
        if symptom.kind == "evaluation":
            # Any update since the one before may be the cause: the oddest is looked at, or one that is already.
            wanted = [] if any(step in chosen for step in possible) else sorted(possible, key=odd, reverse=True)[:2]
        else:
            wanted = list(possible)
        new = [step for step in wanted if step not in chosen]
        if len(chosen) + len(new) > STEPS:
            left_out.append(number)
            continue
        chosen |= dict.fromkeys(new)
    return sorted(chosen), left_out


def _checked(replay: Replay, step: int, run: Path) -> tuple[Checked, OperatorCheck]:
    replay.before(step)
    check = OperatorCheck()
    taken = replay.take(check)
    logged = _logged(run, step)
    same = repr((taken.loss, taken.grad_norm)) in logged if logged else None
    calls = sum(tally.calls for tally in check.tallies.values())
    failed = {name: tally.failed for name, tally in check.tallies.items() if tally.failed}
    return Checked(step, taken, same, calls, failed), check


def _logged(run: Path, step: int) -> set[str]:
    """What the log has as loss and gradient norm of a step, in any attempt."""
    history = History.read(run)
    done = {repr((e.loss, e.grad_norm)) for _, e in history.steps if e.step == step}
    not_finite = events.select(history.entries, events.NotFinite)
    return done | {repr((e.loss, e.grad_norm)) for _, e in not_finite if e.step == step}


def _add(suspects: dict[str, Suspect], check: OperatorCheck, step: int | None, symptoms: Sequence[Symptom]) -> None:
    for name, tally in check.tallies.items():
        suspect = suspects.setdefault(name, Suspect(name))
        suspect.calls += tally.calls
        suspect.shapes += tally.shapes
        suspect.excess = max(suspect.excess, tally.worst)
        if not tally.failed:
            continue
        suspect.failed += tally.failed
        suspect.failed_shapes += tally.failed_shapes
        suspect.places += tally.failed_places
        suspect.failures += [failure for failure in check.failures if failure.operator == name]
        if step is not None:
            suspect.steps.append(step)
            here = [n for n, symptom in enumerate(symptoms) if symptom.since <= step <= symptom.step]
            suspect.explains = sorted({*suspect.explains, *here})


def _evaluations(
    replay: Replay, symptoms: Sequence[Symptom], suspects: dict[str, Suspect], unchecked: Counter[Any],
    unreached: list[str], log: Callable[[str], None],
) -> None:  # fmt: skip
    """Check the first evaluation that jumped: its forward pass may be wrong where training is right."""
    for number, symptom in enumerate(symptoms):
        if symptom.kind == "evaluation" and symptom.set:
            log(f"checking every call of the evaluation of step {symptom.step}")
            try:
                replay.before(symptom.step + 1)
            except StepNotReachedError as error:
                unreached.append(f"{symptom.text}: {str(error).splitlines()[0]}")
                return
            check = OperatorCheck()
            replay.score(symptom.set, check)
            unchecked.update(check.unchecked)
            _add(suspects, check, None, symptoms)
            for name, tally in check.tallies.items():
                if tally.failed:
                    suspects[name].explains = sorted({*suspects[name].explains, number})
            return


def confirm(replay: Replay, symptom: Symptom, operator: str) -> dict[str, Any]:
    """Compute the symptom's step again, with and without the operator replaced; say if the symptom went."""

    def taken(replace: Sequence[str]) -> Taken:
        replay.before(symptom.since, again=True)
        for _ in range(symptom.since, symptom.step):
            replay.take(_only(replace))
        return replay.take(_only(replace))

    what, shown = "loss and gradient norm", ""
    if symptom.kind == "disagreement" and symptom.micro_batch is not None:
        index = symptom.micro_batch
        apart: list[float] = []
        for replace in ((), (operator,)):
            replay.before(symptom.step, again=not apart)
            first_rank, *others = (replay.gradient(index, rank, _only(replace)) for rank in range(replay.ranks))
            largest = max((float((other - first_rank).abs().max()) for other in others), default=0.0)
            apart.append(largest / (float(first_rank.abs().max()) or 1.0))
        what = f"largest difference of micro-batch {index}'s gradients among the ranks, over the largest entry"
        # The reference does not promise equal bits: numpy's products depend on where in memory their factors lie, and a
        # gradient that is rounded to its grid may then move by a step of it.
        gone = apart[1] <= 0.01 * apart[0] and apart[0] > 0
        before, after = (f"{value:.2g}" for value in apart)
    elif symptom.kind == "evaluation":
        scores = []
        for replace in ((), (operator,)):
            replay.before(symptom.since, again=True)
            for _ in range(symptom.since, symptom.step + 1):
                replay.take(_only(replace))
            scores.append(replay.score(symptom.set, _only(replace)))
        what, (before, after) = f"loss on {symptom.set}", (f"{score:.5f}" for score in scores)
        assert symptom.usual is not None
        gone = scores[1] - symptom.usual < 0.5 * (scores[0] - symptom.usual)
    else:
        first, second = taken(()), taken((operator,))
        name = {"norm_spike": "grad_norm", "loss_spike": "loss", "redone": "redone"}.get(symptom.kind)
        if symptom.kind == "not_finite":
            what, gone = "loss and gradient norm", second.finite and not first.finite
        elif name is not None:
            what = {"grad_norm": "gradient norm", "redone": "computed again"}.get(name, name)
            assert symptom.usual is not None
            gone = abs(getattr(second, name) - symptom.usual) < 0.5 * abs(getattr(first, name) - symptom.usual)
        else:
            gone = (first.loss, first.grad_norm) != (second.loss, second.grad_norm)
            shown = " (the step's numbers change; the log shows no symptom of it)"
        before, after = (
            f"{getattr(t, name):.5g}" if name else f"{t.loss:.9g}, {t.grad_norm:.9g}" for t in (first, second)
        )
    return {
        "symptom": symptom.text, "kind": symptom.kind, "what": what + shown, "before": before, "after": after,
        "gone": bool(gone),
    }  # fmt: skip


def _only(replace: Sequence[str]) -> OperatorCheck | None:
    return OperatorCheck(replace=replace, only=replace) if replace else None


def _suspect(suspect: Suspect, symptoms: int, ranks: int) -> dict[str, Any]:
    worst = max(suspect.failures, key=lambda failure: failure.excess)
    rare = sum(suspect.shapes[shape] for shape in suspect.failed_shapes)
    conditions = [
        f"{suspect.failed} of its {suspect.calls} calls", f"{suspect.failed} of {rare} calls with such arguments"
    ]  # fmt: skip
    strided = [shape for shape in suspect.failed_shapes if "strides" in shape]
    if len(strided) == len(suspect.failed_shapes):
        conditions.append("only arguments that are not contiguous")
    if ranks > 1 and len(suspect.places) == 1 and (place := next(iter(suspect.places))) != "update":
        conditions.append(f"only on {place}")
    return {
        "operator": suspect.operator, "calls": suspect.calls, "failed": suspect.failed,
        "excess": suspect.excess if math.isfinite(suspect.excess) else None,
        "explains": suspect.explains, "share": len(suspect.explains) / symptoms, "steps": suspect.steps,
        "conditions": conditions, "places": dict(suspect.places),
        "shapes": [shape for shape, _ in suspect.failed_shapes.most_common(3)],
        "worst": {
            "shape": worst.shape, "place": list(worst.place), "found": f"{worst.found:.9g}",
            "expected": f"{worst.expected:.9g}", "wrong": worst.wrong, "entries": worst.entries, "where": worst.where,
        },
    }  # fmt: skip


def _not_checked(
    unchecked: Counter[tuple[str, str]], left_out: Sequence[int], checked: Sequence[Checked],
    symptoms: Sequence[Symptom], ranked: Sequence[Suspect],
) -> list[str]:  # fmt: skip
    lines = [f"{name}, {calls} calls: {why}" for (name, why), calls in sorted(unchecked.items())]
    lines += [f"no room among {STEPS} steps for: {symptoms[number].text}" for number in left_out]
    for one in checked:
        if one.as_logged is False:
            lines.append(
                f"step {one.step} has other bits here than in the log: what happened there then was no function of the "
                "config, so a replay does not show it (a passing fault, or a state that was damaged before)"
            )
    explained = {number for suspect in ranked for number in suspect.explains}
    if ranked:
        lines += [f"not explained by any suspect: {s.text}" for n, s in enumerate(symptoms) if n not in explained]
    lines.append("collectives, and what is wrong in another process or on another machine only")
    return lines


def _series(run: Path) -> dict[str, list[Any]]:
    done = {event.step: event for _, event in reversed(History.read(run).steps)}
    steps = sorted(done)
    return {
        "steps": steps,
        "loss": [_finite(done[step].loss) for step in steps],
        "grad_norm": [_finite(done[step].grad_norm) for step in steps],
    }


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(value: Any) -> Any:
    """The tree without numbers that JSON lacks."""
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    return _finite(value) if isinstance(value, float) else value


def _summary(
    symptoms: Sequence[Symptom], nothing_unusual: bool, checked: Sequence[Checked], ranked: Sequence[Suspect],
    confirmations: Sequence[dict[str, Any]],
) -> str:  # fmt: skip
    calls = sum(one.calls for one in checked)
    looked = f"{calls} operator calls of {len(checked)} steps"
    several = "s" if len(symptoms) != 1 else ""
    begun = "The log shows nothing unusual. " if nothing_unusual else f"{len(symptoms)} symptom{several}. "
    if not ranked:
        return f"{begun}Of {looked} each agrees with its reference: no operator is accused."
    first = ranked[0]
    factor = (
        f"by up to {first.excess:.3g} times its tolerance" if math.isfinite(first.excess) else "by an infinite error"
    )
    gone = sum(found["gone"] for found in confirmations)
    confirmed = (
        f"With {first.operator} alone replaced by its reference, {gone} of {len(confirmations)} that were tried go."
        if confirmations else "No symptom could be computed again."
    )  # fmt: skip
    return (
        f"{begun}{first.operator} is wrong in {first.failed} of its {first.calls} calls, {factor}, and explains "
        f"{len(first.explains)} of {len(symptoms)}. {confirmed}"
    )
