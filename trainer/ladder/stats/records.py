"""What goes into a ladder's statistics and what comes out: plain records, in JSON and back.

A value that nobody measured, or that the data do not determine, is None, never 0 and never NaN.
"""

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal, Self

BASELINE = "baseline"

Decision = Literal["promote", "reject", "inconclusive"]
Trend = Literal["none", "persists", "shrinks", "reverses", "grows", "unknown"]
"""Of ln m over ln C. none: no gain that could have a trend. persists: a gain (or loss) whose slope is not told from 0.
shrinks, grows: the slope is below, above 0. reverses: it shrinks, from surely a gain to surely a loss."""


class JsonRecord:
    """to_json of the dataclasses below."""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; a number that is not finite becomes None."""
        assert dataclasses.is_dataclass(self) and not isinstance(self, type)
        return _plain(dataclasses.asdict(self))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):  # numpy's too: float() makes it Python's
        return float(value) if math.isfinite(value) else None
    return value


@dataclass(frozen=True)
class RunResult(JsonRecord):
    """One finished run."""

    arm: str
    """BASELINE for the baseline."""
    rung: str
    seed: int
    flops: float
    """Training FLOPs of the run: forward and backward, head counted, embedding lookups not."""
    parameters: int
    """The ladder's N of this run."""
    tokens: int
    loss: float
    """The ladder's metric on the held-out set at the last step: nats per token, or bits per byte. Not finite where
    the run diverged."""
    seconds: float | None
    """Of training, without start-up, faults and evaluation; None where not comparable."""

    @classmethod
    def from_json(cls, tree: dict[str, Any]) -> Self:
        """The inverse of `to_json`: a loss of None was not finite."""
        known = dict(tree)
        if known["loss"] is None:
            known["loss"] = math.nan
        return cls(**known)


@dataclass(frozen=True)
class Criterion(JsonRecord):
    """What decides, written down before the runs."""

    level: float = 0.05
    """Chance of promoting an arm that is worth less than min_gain, over the whole ladder."""
    min_gain: float = 1.02
    """Least useful compute multiplier at the target."""
    max_slowdown: float = 1.25
    """Most a step may take relative to the baseline's, at equal tokens."""
    looks: int = 1
    """How often the report may be looked at with the intent to stop."""


@dataclass(frozen=True)
class Interval(JsonRecord):
    """A value with the two-sided interval that covers the truth with probability 1 − level; None: unknown."""

    value: float | None
    low: float | None
    high: float | None
    level: float = 0.05


@dataclass(frozen=True)
class Curve(JsonRecord):
    """Loss against compute: E + A·(C / scale)^−alpha, in nats (or whatever the losses are in); C and scale in FLOPs."""

    E: float
    A: float
    alpha: float
    scale: float

    def loss_at(self, flops: float) -> float:
        """Predicted loss."""
        return self.E + self.above(flops)

    def above(self, flops: float) -> float:
        """Predicted loss minus E: what compute can still win."""
        return self.A * (flops / self.scale) ** -self.alpha

    def slope(self, flops: float) -> float:
        """−dL / d ln C: nats won by e-fold compute."""
        return self.alpha * self.above(flops)


@dataclass(frozen=True)
class RungFit(JsonRecord):
    """One rung of the baseline as the fit sees it."""

    rung: str
    flops: float
    seeds: int
    loss: float
    """Mean over seeds."""
    seed_sd: float | None
    """None with one seed."""
    residual: float
    """Mean minus curve."""
    leverage: float
    """Share of the fitted value that is this rung's own mean, 0 to 1: near 1, the curve goes through it whatever it
    is."""


@dataclass(frozen=True)
class CurveFit(JsonRecord):
    """The baseline's curve with its uncertainty and how well it fits."""

    curve: Curve
    E: Interval
    alpha: Interval
    huber: Curve | None
    """The same form by the sum of Huber losses on log L: a second opinion, without intervals."""
    rungs: list[RungFit]
    sd: float | None
    """Of a run about the curve: seeds and lack of fit pooled; None without a degree of freedom."""
    degrees_of_freedom: int
    seed_sd: float | None
    """Pooled within rungs; None where no rung has two seeds."""
    lack_of_fit_p: float | None
    """Chance of rung means as far from the curve as these, if the form is right; None with three rungs or one seed."""
    unequal_noise_p: float | None
    """Chance of seed noise differing so much between rungs, if it is the same at all (Bartlett)."""
    E_determined: bool
    """Whether the interval of E excludes 0 and ends below the lowest fitted loss."""


@dataclass(frozen=True)
class Bootstrap(JsonRecord):
    """Percentiles of (E, alpha) over resampled ladders."""

    E: Interval
    alpha: Interval
    draws: int
    refused: int
    """Draws that no curve could be fitted to."""


@dataclass(frozen=True)
class PredictionCheck(JsonRecord):
    """A prediction of the target's loss, and what came out."""

    flops: float
    predicted: Interval
    """For the mean of `seeds` new runs."""
    seeds: int
    observed: float | None = None
    error: float | None = None
    """Observed minus predicted."""
    relative_error: float | None = None
    inside: bool | None = None


@dataclass(frozen=True)
class SurfaceND(JsonRecord):
    """L(N, D) = E + A / N^alpha + B / D^beta; Hoffmann et al. 2022 (arXiv:2203.15556)."""

    E: float
    A: float
    alpha: float
    B: float
    beta: float

    def loss_at(self, parameters: float, tokens: float) -> float:
        return self.E + self.A * parameters**-self.alpha + self.B * tokens**-self.beta


@dataclass(frozen=True)
class OverTrained(JsonRecord):
    """E + a·N^eta + b·6^(eta/2)·(M·N)^eta, eta < 0, M tokens per parameter; Gadre et al. 2024 (arXiv:2403.08540)."""

    E: float
    a: float
    b: float
    eta: float

    def loss_at(self, parameters: float, tokens_per_parameter: float) -> float:
        data = 6 ** (self.eta / 2) * (tokens_per_parameter * parameters) ** self.eta
        return self.E + self.a * parameters**self.eta + self.b * data


@dataclass(frozen=True)
class RungMultiplier(JsonRecord):
    """What an arm is worth at one rung."""

    rung: str
    flops: float
    """Of the baseline."""
    pairs: int
    multiplier: Interval
    wall_clock: float | None
    """Multiplier in seconds: how many times longer the baseline would have to train."""
    slowdown: float | None
    """Seconds per token relative to the baseline's."""
    loss_difference: float | None
    """Mean of arm minus baseline."""
    pairing: float | None
    """Var(unpaired) / Var(paired) of the difference; over 1: pairing helped."""
    without: float | None = None
    """Multiplier at the target if this rung is left out: what rests on it."""
    gap: str = ""
    """Why a number is missing."""


@dataclass(frozen=True)
class Pairing(JsonRecord):
    """What it was worth to give both runs of a pair the same seed and data order."""

    ratio: float | None
    """Var(unpaired) / Var(paired), pooled over rungs: how many times more seeds would be needed without."""
    correlation: float | None


@dataclass(frozen=True)
class Remedy(JsonRecord):
    """Runs that would settle an inconclusive verdict if the estimates stayed as they are."""

    what: Literal["seeds", "rung"]
    seeds: int
    """ExtraRuns at every rung, or of the new rung."""
    flops: float | None
    """Compute of the new rung's runs."""


@dataclass(frozen=True)
class Verdict(JsonRecord):
    """What became of one arm."""

    arm: str
    decision: Decision
    why: str
    """One plain sentence."""
    trend: Trend
    target_flops: float
    multiplier: Interval
    """At the target, two-sided, if ln m is a line in ln C."""
    other_floor: Interval
    """The same if the arm's floor E differs from the baseline's, so that gains fade or rise ever faster."""
    lower: float | None
    """One-sided bounds of the multiplier at the target that decide, corrected for arms and looks: the lower and the
    higher one of both forms."""
    upper: float | None
    bound_level: float
    """Level of each of those two bounds."""
    slope: Interval
    """d ln m / d ln C."""
    crossing: Interval | None
    """FLOPs where the arm stops (or starts) being worth anything, where that is in reach; an end that the data do not
    bound is None."""
    rungs: list[RungMultiplier]
    slowdown: Interval
    wall_clock: Interval
    """Multiplier in seconds at the target."""
    faster_per_flop_slower_per_second: bool
    lack_of_fit_p: float | None
    """Chance of multipliers as far from a line in ln C as these."""
    pairing: Pairing
    remedies: list[Remedy] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """What a reader should know: gaps, runs that diverged, intervals widened."""
