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
from trainer.hunt.symptoms import Symptom, near, sampled_evaluation, samples, symptoms_of
from trainer.log import events, rundir
from trainer.log.history import History
from trainer.sentinel.operator_check import Failure, OperatorCheck

STEPS = 10  # replayed under the check, at most
NEAR = 50  # steps without a symptom are looked at where so few lie between them and a state before
CONFIRMED = 4  # symptoms by which the first suspect is confirmed
CHANGED = " (no symptom, so any change counts)"
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
    looked = _Look(run, Replay(run, log), symptoms, log)
    planned, left_out = plan(symptoms, run)
    for step in planned:
        looked.at_step(step)
    for number, symptom in enumerate(symptoms):
        if symptom.kind == "evaluation" and symptom.set:
            looked.at_evaluation(number)  # the first alone: it costs several evaluations
            break
    if auto and not looked.accused:
        _sample(looked)
    looked.refuse_if_nothing_was_reached()
    replay, suspects = looked.replay, looked.suspects
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
                looked.unreached.append(f"{symptoms[number].text}: {str(error).splitlines()[0]}")
        log("making the call small")
        number = first.steps[0] if first.steps else symptoms[first.explains[0]].step
        machine = replay.machine_at(number, first.places.most_common(1)[0][0])
        script = reproduction.write(first.failures, str(run), machine, out / "reproduction")
    return {
        "run": str(run), "ranks": replay.ranks,
        "symptoms": [_plain(asdict(symptom)) for symptom in symptoms],
        "checked": [_plain(asdict(one)) for one in looked.checked],
        "suspects": [_suspect(s, replay.ranks) for s in ranked],
        "runners_up": [
            {"operator": s.operator, "worst": s.excess}
            for s in sorted(suspects.values(), key=lambda s: -s.excess) if not s.failed and s.excess > 0
        ][:4],
        "confirmations": confirmations, "reproduction": script, "planted": replay.planted,
        "not_checked": looked.unreached + _not_checked(looked, left_out, ranked),
        "series": _series(run),
        "summary": _summary(looked, ranked, confirmations),
    }  # fmt: skip


@dataclass
class _Look:
    """Checks made so far, and what they have shown."""

    run: Path
    replay: Replay
    symptoms: list[Symptom]
    log: Callable[[str], None]
    checked: list[Checked] = field(default_factory=list)
    suspects: dict[str, Suspect] = field(default_factory=dict)
    unchecked: Counter[tuple[str, str]] = field(default_factory=Counter)
    calls: int = 0
    evaluations: int = 0
    unreached: list[str] = field(default_factory=list)
    refused: StepNotReachedError | None = None

    @property
    def accused(self) -> bool:
        return any(suspect.failed for suspect in self.suspects.values())

    def at_step(self, step: int) -> None:
        """Compute a step again under the check."""
        self.log(f"checking every call of step {step}")
        try:
            found, check = _checked(self.replay, step, self.run)
        except StepNotReachedError as error:
            self.unreached.append(str(error).splitlines()[0])
            self.refused = error
            return
        self.checked.append(found)
        self._add(check, step)

    def at_evaluation(self, number: int) -> None:
        """Check the evaluation of a symptom: its forward pass may be wrong where training is right."""
        symptom = self.symptoms[number]
        self.log(f"checking every call of the evaluation of step {symptom.step}")
        try:
            self.replay.before(symptom.step + 1)
        except StepNotReachedError as error:
            self.unreached.append(f"{symptom.text}: {str(error).splitlines()[0]}")
            return
        check = OperatorCheck()
        self.replay.score(symptom.set, check)
        self.evaluations += 1
        self._add(check, None)
        for name, tally in check.tallies.items():
            if tally.failed:
                self.suspects[name].explains = sorted({*self.suspects[name].explains, number})

    def refuse_if_nothing_was_reached(self) -> None:
        if self.refused is not None and not self.checked and not self.suspects:
            raise self.refused

    def _add(self, check: OperatorCheck, step: int | None) -> None:
        self.unchecked += check.unchecked
        self.calls += sum(tally.calls for tally in check.tallies.values())
        for name, tally in check.tallies.items():
            suspect = self.suspects.setdefault(name, Suspect(name))
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
                here = [n for n, symptom in enumerate(self.symptoms) if symptom.since <= step <= symptom.step]
                suspect.explains = sorted({*suspect.explains, *here})


def _sample(looked: _Look) -> None:
    """No symptom has led to a wrong operator: look at steps without one while there is room, until one is found."""
    states = [saved.step for saved in looked.replay.saved]
    if looked.replay.can_begin:
        states.append(0)
    seen = {one.step for one in looked.checked}
    for symptom in samples(looked.run, states, NEAR, seen):
        if len(looked.checked) + len(looked.unreached) >= STEPS:
            break
        looked.symptoms.append(symptom)
        looked.at_step(symptom.step)
        if looked.accused:
            return
    evaluation = None if looked.evaluations else sampled_evaluation(looked.run, states, NEAR)
    if evaluation is not None:
        looked.symptoms.append(evaluation)
        looked.at_evaluation(len(looked.symptoms) - 1)
    steps = {event.step for _, event in History.read(looked.run).steps}
    if far := len(steps) - len(near(sorted(steps), states, NEAR)):
        looked.unreached.append(
            f"{far} of {len(steps)} steps have no checkpoint within the {NEAR} steps before them, so none of these was "
            "chosen (--step asks for one)"
        )


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
    """Read the loss and gradient norm of a step from the log, in any attempt."""
    history = History.read(run)
    done = {repr((e.loss, e.grad_norm)) for _, e in history.steps if e.step == step}
    not_finite = events.select(history.entries, events.NotFinite)
    return done | {repr((e.loss, e.grad_norm)) for _, e in not_finite if e.step == step}


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
    elif symptom.set:
        scores = []
        for replace in ((), (operator,)):
            replay.before(symptom.since, again=True)
            for _ in range(symptom.since, symptom.step + 1):
                replay.take(_only(replace))
            scores.append(replay.score(symptom.set, _only(replace)))
        what, (before, after) = f"loss on {symptom.set}", (f"{score:.9g}" for score in scores)
        if symptom.usual is not None:
            gone = scores[1] - symptom.usual < 0.5 * (scores[0] - symptom.usual)
        else:
            gone, shown = scores[0] != scores[1], CHANGED
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
            shown = CHANGED
        before, after = (
            f"{getattr(t, name):.5g}" if name else f"{t.loss:.9g}, {t.grad_norm:.9g}" for t in (first, second)
        )
    return {
        "symptom": symptom.text, "kind": symptom.kind, "what": what + shown, "before": before, "after": after,
        "gone": bool(gone),
    }  # fmt: skip


def _only(replace: Sequence[str]) -> OperatorCheck | None:
    return OperatorCheck(replace=replace, only=replace) if replace else None


def _suspect(suspect: Suspect, ranks: int) -> dict[str, Any]:
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
        "explains": suspect.explains, "steps": suspect.steps,
        "conditions": conditions, "places": dict(suspect.places),
        "shapes": [shape for shape, _ in suspect.failed_shapes.most_common(3)],
        "worst": {
            "shape": worst.shape, "place": list(worst.place), "found": f"{worst.found:.9g}",
            "expected": f"{worst.expected:.9g}", "wrong": worst.wrong, "entries": worst.entries, "where": worst.where,
        },
    }  # fmt: skip


def _not_checked(looked: _Look, left_out: Sequence[int], ranked: Sequence[Suspect]) -> list[str]:
    symptoms = looked.symptoms
    lines = [f"{name}, {calls} calls: {why}" for (name, why), calls in sorted(looked.unchecked.items())]
    lines += [f"no room among {STEPS} steps for: {symptoms[number].text}" for number in left_out]
    for one in looked.checked:
        if one.as_logged is False:
            lines.append(
                f"step {one.step} has other bits here than in the log: what happened there then was no function of the "
                "config, so a replay does not show it (a passing fault, or a state that was damaged before)"
            )
    explained = {number for suspect in ranked for number in suspect.explains}
    if ranked:
        shown = [s for n, s in enumerate(symptoms) if n not in explained and s.kind != "sample"]
        lines += [f"not explained by any suspect: {s.text}" for s in shown]
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


def _summary(looked: _Look, ranked: Sequence[Suspect], confirmations: Sequence[dict[str, Any]]) -> str:
    steps = len(looked.checked)
    shown = [number for number, symptom in enumerate(looked.symptoms) if symptom.kind != "sample"]
    begun = f"{len(shown)} symptom{'s' * (len(shown) != 1)}. " if shown else "The log shows nothing unusual. "
    if not ranked:
        more = f" and {looked.evaluations} evaluation{'s' * (looked.evaluations != 1)}" if looked.evaluations else ""
        every = f"{looked.calls} operator calls of {steps} step{'s' * (steps != 1)}{more}"
        return f"{begun}Of {every} each agrees with its reference: no operator is accused."
    first = ranked[0]
    factor = (
        f"by up to {first.excess:.3g} times its tolerance" if math.isfinite(first.excess) else "by an infinite error"
    )
    # Where no symptom is explained, a step without one has led to the operator.
    here = len({*first.explains} & {*shown})
    if here:
        where = f", and explains {here} of {len(shown)}"
    else:
        where = f", in {len(first.steps)} of {steps} steps" if first.steps else ", in an evaluation"
    gone = sum(found["gone"] for found in confirmations)
    tried = f"{gone} of {len(confirmations)} that were tried {'go' if here else 'change'}"
    confirmed = (
        f"With {first.operator} alone replaced by its reference, {tried}."
        if confirmations else "No symptom could be computed again."
    )  # fmt: skip
    return (
        f"{begun}{first.operator} is wrong in {first.failed} of its {first.calls} calls, {factor}{where}. {confirmed}"
    )
