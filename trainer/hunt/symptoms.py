"""The symptoms of a run: what its log shows that a healthy run does not show often. A symptom accuses nobody.

Needs the event log alone, and no torch.
"""

import itertools
import math
import statistics
from collections.abc import Iterator, Sequence
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
    """What the value would be without the symptom, as far as the log tells."""
    set: str = ""
    micro_batch: int | None = None


def symptoms_of(run: Path, asked: Sequence[int] = ()) -> list[Symptom]:
    """Return the run's symptoms, the most telling first; then the steps that a person asked for."""
    history = History.read(run)
    done: dict[int, events.StepDone] = {}
    for _, event in history.steps:
        done.setdefault(event.step, event)  # as it was computed first
    steps = [done[step] for step in sorted(done)]
    found = [
        *_not_finite(history), *_disagreements(history), *_other_results(history),
        *_spikes("norm_spike", "the gradient norm", [(e.step, e.grad_norm) for e in steps], 0),
        *_spikes("loss_spike", "the loss", [(e.step, e.loss) for e in steps], 1),
        *_redone(steps), *_jumps(history),
    ]  # fmt: skip
    first = sorted(found, key=lambda symptom: (KINDS.index(symptom.kind), symptom.step))
    return [Symptom("asked", step, f"step {step}, as asked", step) for step in asked] + first


def samples(run: Path, count: int) -> list[Symptom]:
    """Steps to look at where nothing is unusual: the last one, and some spread over the run."""
    last = max((event.step for _, event in History.read(run).steps), default=0)
    chosen = sorted({max(1, round(last * (number + 1) / count)) for number in range(count)} if last else ())
    return [Symptom("sample", step, f"step {step}, for want of a symptom", step) for step in chosen]


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
    finite = [(step, math.log(value)) for step, value in series if math.isfinite(value) and value > 0]
    last = -WINDOW
    for number in range(LEAST, len(finite)):
        step, value = finite[number]
        before = [v for _, v in finite[max(0, number - WINDOW) : number]]
        usual = statistics.median(before[-5:])
        # Of differences, so that a loss that falls counts as quiet.
        changes = [abs(b - a) for a, b in itertools.pairwise(before)]
        noise = 1.4826 * statistics.median(changes) / math.sqrt(2)
        away = (value - usual) / max(noise, 1e-3)
        if abs(away) > SIGMAS and step - last > LEAST // 2:
            last = step
            text = f"{what} of step {step} is {math.exp(value):.4g}, {away:+.0f} σ from {math.exp(usual):.4g}"
            yield Symptom(kind, step, text, max(1, step - earlier), math.exp(value), math.exp(usual))


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
