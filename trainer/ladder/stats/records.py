"""Input and output of the ladder's statistics: plain records, to JSON and back.

A value that was not measured, or that the data do not determine, is None, never 0 and never NaN.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self

BASELINE = "baseline"

Axis = Literal["compute", "data"]
"""Kind of amount that a ladder's rungs are, and that multipliers multiply: compute, or unique text."""
SCARCE: Mapping[Axis, str] = {"compute": "compute", "data": "unique text"}
"""Name of the amount that is short, in words."""
UNITS: Mapping[Axis, str] = {"compute": "FLOPs", "data": "tokens of unique text"}

Decision = Literal["promote", "reject", "inconclusive"]
Trend = Literal["none", "persists", "shrinks", "reverses", "grows", "unknown"]
"""Change of ln m with ln C, where m is the compute multiplier and C the compute.

none: neither a gain nor a loss is visible. persists: a gain or loss whose slope may be 0. shrinks, grows: the slope is
below, above 0. reverses: it shrinks from a certain gain to a certain loss. unknown: no line or no noise is known. The
false discovery rate of trends over the ladder's arms is held at the criterion's level.
"""


class JsonRecord:
    """Base of the dataclasses below."""

    def to_json(self) -> dict[str, Any]:
        """Return plain JSON; a number that is not finite becomes None."""
        return plain(self)


def plain(value: Any) -> Any:
    """Return a value as plain JSON; dataclasses.asdict copies every text and number and takes three times as long."""
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):  # numpy's too: float() makes it Python's
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if dataclasses.is_dataclass(value):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value


@dataclass(frozen=True)
class RunResult(JsonRecord):
    """One run that finished or diverged."""

    arm: str  # BASELINE for the baseline
    rung: str
    seed: int
    flops: float
    """Amount of what the ladder's rungs are amounts of, here and in all records below. Usually compute: training FLOPs,
    forward and backward, with the head, without embedding lookups. On the axis "data": tokens of unique text."""
    parameters: int  # N of this run, counted as the ladder counts (trainer/ladder/plan/sizes.py)
    tokens: int
    loss: float
    """The ladder's metric on the held-out set at the last step, in nats per token or bits per byte. Not finite if the
    run diverged."""
    seconds: float | None
    """Training time without start-up, faults and evaluation; None if not comparable with other runs."""

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Self:
        """Invert `to_json`. A loss of None was not finite and becomes NaN."""
        known: dict[str, Any] = tree | {"loss": math.nan} if tree["loss"] is None else tree
        return cls(**known)


@dataclass(frozen=True)
class Criterion(JsonRecord):
    """The rule of decision, written down before the runs."""

    level: float = 0.05  # Probability of promoting an arm that is worth less than min_gain, over the whole ladder
    min_gain: float = 1.02  # Smallest useful compute multiplier at the target
    max_slowdown: float = 1.25  # Largest acceptable seconds per token, relative to the baseline's
    looks: int | Literal["any"] = 1  # Number of times that the report may be read with the intent to stop


@dataclass(frozen=True)
class Interval(JsonRecord):
    """A value with the two-sided interval that covers the truth with probability 1 − level; None: unknown."""

    value: float | None
    low: float | None
    high: float | None
    level: float = 0.05


@dataclass(frozen=True)
class Curve(JsonRecord):
    """Loss against compute: E + A·(C / scale)^−alpha. C and scale in FLOPs; E, A and the loss in nats (or bits)."""

    E: float
    A: float
    alpha: float
    scale: float

    def loss_at(self, flops: float) -> float:
        """Predicted loss."""
        return self.E + self.above(flops)

    def above(self, flops: float) -> float:
        """Predicted loss minus E: the part that more compute can still remove."""
        return self.A * (flops / self.scale) ** -self.alpha

    def slope(self, flops: float) -> float:
        """−dL / d ln C: nats gained by e times the compute."""
        return self.alpha * self.above(flops)


@dataclass(frozen=True)
class RungFit(JsonRecord):
    """One rung of the baseline beside the fitted curve."""

    rung: str
    flops: float
    seeds: int
    loss: float  # Mean over seeds
    seed_sd: float | None  # Standard deviation over seeds; None with one seed
    residual: float  # Mean loss minus curve
    leverage: float
    """Derivative of the fitted value by this rung's own mean, 0 to 1. Near 1 the curve passes through the rung whatever
    its loss is."""


@dataclass(frozen=True)
class CurveFit(JsonRecord):
    """The baseline's curve, its uncertainty, and how well it fits."""

    curve: Curve
    E: Interval
    alpha: Interval
    huber: Curve | None  # The same form fitted by the sum of Huber losses on log L: a second opinion, without intervals
    rungs: list[RungFit]
    sd: float | None
    """Standard deviation of a run about the curve, from seeds and lack of fit; None without a degree of freedom."""
    degrees_of_freedom: int
    seed_sd: float | None  # Standard deviation over seeds, pooled over rungs; None if no rung has two seeds
    lack_of_fit_p: float | None
    """Probability of rung means as far from the curve as these if the form is right (F test); None with three rungs or
    with one seed each."""
    unequal_noise_p: float | None
    """Probability of seed variances as different between rungs as these if all are equal (Bartlett's test)."""
    E_determined: bool  # True if the interval of E excludes 0 and ends below the lowest fitted loss


@dataclass(frozen=True)
class Bootstrap(JsonRecord):
    """Percentiles of (E, alpha) over resampled ladders."""

    E: Interval
    alpha: Interval
    draws: int
    refused: int  # Number of draws to which no curve could be fitted


@dataclass(frozen=True)
class PredictionCheck(JsonRecord):
    """A prediction of the mean loss of some runs, beside the observed mean."""

    flops: float
    predicted: Interval  # Interval for the mean of `seeds` new runs
    seeds: int
    observed: float | None = None
    error: float | None = None  # Observed minus predicted
    relative_error: float | None = None
    inside: bool | None = None


@dataclass(frozen=True)
class SurfaceND(JsonRecord):
    """L(N, D) = E + A / N^alpha + B / D^beta. Source: Hoffmann et al. 2022 (arXiv:2203.15556)."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss_at(self, parameters: float, tokens: float) -> float:
        return self.E + self.A * parameters**-self.alpha + self.B * tokens**-self.beta


@dataclass(frozen=True)
class OverTrained(JsonRecord):
    """E + a·N^eta + b·6^(eta/2)·(M·N)^eta with eta < 0 and M tokens per parameter.

    Source: Gadre et al. 2024 (arXiv:2403.08540).
    """

    E: float
    a: float
    b: float
    eta: float

    def loss_at(self, parameters: float, tokens_per_parameter: float) -> float:
        data = 6 ** (self.eta / 2) * (tokens_per_parameter * parameters) ** self.eta
        return self.E + self.a * parameters**self.eta + self.b * data


@dataclass(frozen=True)
class RungMultiplier(JsonRecord):
    """An arm's worth at one rung."""

    rung: str
    flops: float  # Compute of the baseline's run
    pairs: int
    multiplier: Interval
    wall_clock: float | None  # Multiplier in seconds: how many times longer the baseline would have to train
    slowdown: float | None  # Seconds per token, relative to the baseline's
    loss_difference: float | None  # Mean of arm minus baseline
    pairing: float | None  # Var(unpaired) / Var(paired) of the loss difference; above 1, pairing reduced noise
    without: float | None = None  # Multiplier at the target without this rung: shows what depends on it
    gap: str = ""  # Reason why a number is missing


@dataclass(frozen=True)
class Pairing(JsonRecord):
    """The benefit of giving both runs of a pair the same seed and data order."""

    ratio: float | None
    """Var(unpaired) / Var(paired), pooled over rungs: how many times more seeds unpaired runs would need."""
    correlation: float | None


@dataclass(frozen=True)
class Remedy(JsonRecord):
    """Further runs of an arm, and as many of the baseline, that may settle an inconclusive verdict."""

    what: Literal["seeds", "rung"]
    seeds: int  # Additional seeds, or seeds of the new rung
    flops: float | None  # Compute of a run of the new rung
    rung: str | None  # The only rung that gets seeds; None: every rung does, or a new one
    probability: float | None  # That these runs settle the question
    total_flops: float | None  # Compute of all these runs


@dataclass(frozen=True)
class Verdict(JsonRecord):
    """The decision about one arm, with the numbers behind it."""

    arm: str
    decision: Decision
    why: str  # Reason, in one sentence
    trend: Trend
    target_flops: float
    multiplier: Interval
    """Multiplier at the target; the interval covers all forms that the data allow."""
    line: Interval  # Multiplier at the target if ln m were known to be a line in ln C
    other_floor: Interval  # If the arm's floor E were known to differ from the baseline's
    fades: Interval  # If the gain were known to fade to a constant, at the pace that fits best
    lower: float | None
    """One-sided bounds of the multiplier at the target over all forms that the data allow, corrected for the number of
    arms and looks; the decision rests on them."""
    upper: float | None
    bound_level: float  # Error probability of each of the two bounds
    degrees_of_freedom: float | None  # Of the arm's noise
    slope: Interval  # d ln m / d ln C of the line
    trend_p: float | None  # Of a slope as large as this one if there is none, adjusted for the number of arms
    crossing: Interval | None
    """FLOPs at which the multiplier crosses 1, if that is in reach; an end is None if the data do not bound it."""
    rungs: list[RungMultiplier]
    slowdown: Interval  # Seconds per token, relative to the baseline's
    wall_clock: Interval  # Multiplier in seconds at the target
    faster_per_flop_slower_per_second: bool
    lack_of_fit_p: float | None
    """Probability of multipliers as far from a line in ln C as these if the line is right (F test)."""
    bend_p: float | None
    """Probability of a bend as large as this one if the line is right (t test); known with one seed per rung too."""
    pairing: Pairing
    remedies: list[Remedy] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Cautions for the reader: gaps, runs that diverged, widened intervals."""
