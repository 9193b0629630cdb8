"""The symptoms of a run: what its log shows that a healthy run does not show often. A symptom accuses nobody.

Needs the event log alone, and no torch.
"""

import itertools
import math
import statistics
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.log import events
from trainer.log.history import History

WINDOW = 128  # steps that a value is compared with
LEAST = 8  # steps without which nothing is known to be unusual
SIGMAS = 6.0
EVAL_RISE = 0.01  # a held-out loss that rises by this share has jumped, where too few were scored to know their noise
KINDS = (
    "not_finite", "disagreement", "replay", "norm_spike", "loss_spike", "evaluation", "redone", "asked", "sample"
)  # fmt: skip
"""From what a fault of the machine explains best to what has many causes; last, steps that nobody finds unusual."""


@dataclass(frozen=True)
class Symptom:
    kind: str
    step: int
    """The step that it shows in."""
    text: str
    since: int
    """The first step whose computation may be the cause."""
    value: float | None = None
    usual: float | None = None
    """Expected value without the symptom, as far as the log tells."""
    set: str = ""
    micro_batch: int | None = None


def symptoms_of(run: Path, asked: Sequence[int] = ()) -> list[Symptom]:
    """Return the run's symptoms, the most telling first; then the steps that a person asked for."""
    history = History.read(run)
    steps = _first_results(history)
    found = [
        *_not_finite(history), *_disagreements(history), *_other_results(history),
        *_spikes("norm_spike", "the gradient norm", [(e.step, e.grad_norm) for e in steps], 0),
        *_spikes("loss_spike", "the loss", [(e.step, e.loss) for e in steps], 1),
        *_redone(steps), *_jumps(history),
    ]  # fmt: skip
    first = sorted(found, key=lambda symptom: (KINDS.index(symptom.kind), symptom.step))
    return [Symptom("asked", step, f"step {step}, as asked", step) for step in asked] + first


def samples(run: Path, states: Collection[int], within: int, seen: Collection[int] = ()) -> Iterator[Symptom]:
    """Yield steps to look at where no symptom leads to a cause, in the order of looking.

    First the last step. Then in turn the step whose numbers are least usual, though no symptom, and the step that is
    farthest from all that were looked at. Only `near` steps are taken, and none of `seen`.
    """
    steps = _first_results(History.read(run))
    left = set(near([event.step for event in steps], states, within)) - set(seen)
    losses, norms = [(e.step, e.loss) for e in steps], [(e.step, e.grad_norm) for e in steps]
    unusual = sorted(
        (-abs(away), step, f"its {what} is {away:+.1f} σ from those before")
        for what, series in (("loss", losses), ("gradient norm", norms))
        for step, _, _, away in _distances(series)
    )
    looked, why = {*seen}, "the last one"
    step = max(left, default=0)
    while left:
        yield Symptom("sample", step, f"step {step}, without a symptom ({why})", step)
        left.discard(step)
        looked.add(step)
        unusual = [entry for entry in unusual if entry[1] in left]
        if unusual and not why.startswith("its"):
            _, step, why = unusual[0]
        elif left:
            step = max(left, key=lambda one: (min(abs(one - other) for other in looked), one))
            why = "far from those that were looked at"


def sampled_evaluation(run: Path, states: Collection[int], within: int) -> Symptom | None:
    """Return the last evaluation that is near: its calls have shapes that training's have not. None without one."""
    scored = [event for _, event in events.select(History.read(run).entries, events.EvalDone)]
    # A state itself can be scored, too.
    at_hand = {*states, *near([event.step for event in scored], states, within)}
    last = max((event for event in scored if event.step in at_hand), key=lambda event: event.step, default=None)
    if last is None:
        return None
    text = f"the evaluation of step {last.step}, without a symptom"
    return Symptom("sample", last.step, text, last.step + 1, last.loss, set=last.set)


def near(steps: Sequence[int], states: Collection[int], within: int) -> list[int]:
    """The steps that are computed again at little cost: at most `within` after one of `states`."""
    return [step for step in steps if any(0 < step - state <= within for state in states)]


def _first_results(history: History) -> list[events.StepDone]:
    """The steps in their order, each as it was computed first."""
    done: dict[int, events.StepDone] = {}
    for _, event in history.steps:
        done.setdefault(event.step, event)
    return [done[step] for step in sorted(done)]


def _not_finite(history: History) -> Iterator[Symptom]:
    for _, event in events.select(history.entries, events.NotFinite):
        if event.trial == 0:
            text = f"step {event.step} was not finite (loss {event.loss:.4g}, gradient norm {event.grad_norm:.4g})"
            yield Symptom("not_finite", event.step, text, event.step)


def _disagreements(history: History) -> Iterator[Symptom]:
    seen = set[tuple[int, int | None]]()
    for _, event in events.select(history.entries, events.Corrupted):
        if (event.step, event.micro_batch) not in seen:
            seen.add((event.step, event.micro_batch))
            text = f"in step {event.step} {event.found}"
            yield Symptom("disagreement", event.step, text, event.step, micro_batch=event.micro_batch)
    ends = [event for _, event in events.select(history.entries, events.AttemptEnded) if event.status == "finished"]
    if len({event.weights_sha256 for event in ends}) > 1:
        step = ends[-1].step
        yield Symptom("disagreement", step, f"the ranks ended with other weights (step {step})", step)


def _other_results(history: History) -> Iterator[Symptom]:
    """Steps that were computed twice, with two results."""
    seen: dict[int, str] = {}
    for _, event in history.steps:
        result = repr((event.loss, event.grad_norm))
        if seen.setdefault(event.step, result) != result:
            text = f"step {event.step} gave another result when it was computed again"
            yield Symptom("replay", event.step, text, event.step)


def _spikes(kind: str, what: str, series: Sequence[tuple[int, float]], earlier: int) -> Iterator[Symptom]:
    """Values far from those before. The cause may be `earlier` steps before the one that shows it."""
    last = -WINDOW
    for step, value, usual, away in _distances(series):
        if abs(away) > SIGMAS and step - last > LEAST // 2:
            last = step
            text = f"{what} of step {step} is {value:.4g}, {away:+.0f} σ from {usual:.4g}"
            yield Symptom(kind, step, text, max(1, step - earlier), value, usual)


def _distances(series: Sequence[tuple[int, float]]) -> Iterator[tuple[int, float, float, float]]:
    """Yield (step, value, what the values before it lead to expect, how many σ lie between) from the 9th step on."""
    finite = [(step, math.log(value)) for step, value in series if math.isfinite(value) and value > 0]
    for number in range(LEAST, len(finite)):
        step, value = finite[number]
        before = [v for _, v in finite[max(0, number - WINDOW) : number]]
        usual = statistics.median(before[-5:])
        # Of differences, so that a loss that falls counts as quiet.
        changes = [abs(b - a) for a, b in itertools.pairwise(before)]
        noise = 1.4826 * statistics.median(changes) / math.sqrt(2)
        yield step, math.exp(value), math.exp(usual), (value - usual) / max(noise, 1e-3)


def _redone(steps: Sequence[events.StepDone]) -> Iterator[Symptom]:
    """Steps that did not fit their grids after many that did."""
    for number, event in enumerate(steps):
        if event.redone and number >= LEAST and not any(before.redone for before in steps[number - LEAST : number]):
            text = f"step {event.step} was computed again on a coarser grid, the first time in {LEAST} steps"
            yield Symptom("redone", event.step, text, event.step, float(event.redone), 0.0)


def _jumps(history: History) -> Iterator[Symptom]:
    """Evaluations whose loss is above the one before."""
    series: dict[str, list[tuple[int, float]]] = {}
    for _, event in events.select(history.entries, events.EvalDone):
        of_set = series.setdefault(event.set, [])
        if not of_set or event.step > of_set[-1][0]:
            of_set.append((event.step, event.loss))
    for name, scores in series.items():
        for number in range(1, len(scores)):
            (since, before), (step, loss) = scores[number - 1], scores[number]
            changes = [abs(b - a) for (_, a), (_, b) in itertools.pairwise(scores[:number])]
            limit = max(EVAL_RISE * before, 0.5 * statistics.median(changes) if changes else 0.0)
            if loss - before > limit or not math.isfinite(loss):
                text = f"the loss on {name} rose from {before:.4f} to {loss:.4f} by step {step}"
                yield Symptom("evaluation", step, text, since + 1, loss, before, set=name)
