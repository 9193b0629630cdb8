"""Student's t, the F test for lack of fit, Bartlett's test, and the noise of rungs, by scipy.special.

scipy.stats has the tests; its import takes seconds and each call 0.1 ms, too slow for simulating thousands of ladders.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy import special

Array = np.ndarray
LACK_OF_FIT = 0.05
"""If the F test gives a smaller p, the form does not fit: its lack of fit alone then says how far to trust it."""
SHARES = special.betaincinv(0.3, 0.3, (np.arange(64) + 0.5) / 64)
"""Quantiles of the prior of a rung's variance that is due to seeds: mostly all of it, or little."""
GROWTH_SD = 0.1
"""Prior sd of the exponent of noise against compute: a factor of 2 over three decades is one sd."""

MANY = 5000
"""Quantiles of so many at once are interpolated: each would take 1 µs."""
ANYTIME_PAIRS = 2.0
"""Pairs at which the mixture of `anytime_level` is centred."""


def student_quantile(level: float, freedom: Any) -> Any:
    """Value that Student's t exceeds with probability `level`; of many at once it is interpolated, to 1e-6 of it."""
    if np.size(freedom) < MANY:
        return -special.stdtrit(freedom, level)
    logs, quantiles = _quantiles(level)
    # Almost equal and opposite parts of a variance may leave no degree of freedom.
    return np.exp(np.interp(np.log(np.maximum(freedom, 1e-300)), logs, quantiles))


@functools.lru_cache(maxsize=64)
def _quantiles(level: float) -> tuple[Array, Array]:
    """log of the quantile at some log of the degrees of freedom."""
    logs = np.linspace(math.log(0.05), math.log(1e9), 3000)
    with np.errstate(over="ignore"):
        return logs, np.log(np.minimum(-special.stdtrit(np.exp(logs), level), 1e300))


def student_tail(value: Any, freedom: Any) -> Any:
    """Probability that Student's t exceeds this value."""
    return special.stdtr(freedom, -value)


def lack_of_fit_p(lack: float, lack_freedom: int, pure: float, pure_freedom: int) -> float | None:
    """Probability that an F variable exceeds the ratio of lack of fit to pure error; None if either is unknown.

    `lack` is the weighted sum of squares of rung means about the fit, `pure` that of runs about their rung mean.
    """
    if lack_freedom < 1 or pure_freedom < 1 or pure <= 0:
        return None
    return float(special.fdtrc(lack_freedom, pure_freedom, lack / lack_freedom / (pure / pure_freedom)))


def unequal_variances_p(variances: Sequence[float | None], counts: Sequence[float]) -> float | None:
    """p of Bartlett's test that variances of samples of these sizes are equal; None if fewer than two are known."""
    known = [(v, n - 1) for v, n in zip(variances, counts, strict=True) if v]
    if len(known) < 2:
        return None
    variance, freedom = np.array(known).T
    pooled = float(variance @ freedom) / freedom.sum()
    statistic = freedom.sum() * math.log(pooled) - float(freedom @ np.log(variance))
    correction = 1 + (float((1 / freedom).sum()) - 1 / freedom.sum()) / (3 * (len(known) - 1))
    return float(special.chdtrc(len(known) - 1, statistic / correction))


def noise_growth(x: Array, squares: Array, freedom: Array) -> Array:
    """Exponent e of sd ∝ exp(e·x), from sums of squares per rung, shape (..., rungs); drawn to 0 by its prior."""
    known = (freedom > 0) & (squares > 0)
    degrees = np.where(known, freedom, 1.0)
    # ln χ² has the mean digamma(f/2) + ln 2 and the variance trigamma(f/2).
    logs = np.log(np.where(known, squares, 1.0) / 2) - special.digamma(degrees / 2)
    weights = np.where(known, 1 / special.polygamma(1, degrees / 2), 0.0)
    away = x - (weights * x).sum(-1, keepdims=True) / np.maximum(weights.sum(-1, keepdims=True), 1e-12)
    return (weights * away * logs).sum(-1) / ((weights * away**2).sum(-1) + (2 * GROWTH_SD) ** -2) / 2


def share_posterior(evidence: Array) -> tuple[Array, Array]:
    """(weights, precision of a rung's noise) for each share in SHARES that seeds may have in it.

    `evidence` has (pure, its freedom, lack, its freedom) on its first axis; the result has an axis more, for the share.
    """
    pure, pure_freedom, lack, lack_freedom = (value[..., None] for value in evidence)
    freedom = pure_freedom + lack_freedom
    total = np.maximum(pure + SHARES * lack, 1e-100)
    logs = lack_freedom / 2 * np.log(SHARES) - freedom / 2 * np.log(total)
    weights = np.exp(logs - logs.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True), freedom * SHARES / total


def mean_share(evidence: Array) -> Array:
    """Share that seeds have in a rung's noise, by its posterior."""
    return (share_posterior(evidence)[0] * SHARES).sum(-1)


def effective_counts(counts: Array, share: Array) -> Array:
    """Number of runs that each rung's mean is worth where seeds are this share of a usual rung's noise.

    The rest is the rung's own effect, which further seeds there do not average. A usual rung has the harmonic mean of
    `counts` (..., rungs); where all have as many runs, that is the result.
    """
    known = counts > 0
    inverse = np.where(known, 1 / np.maximum(counts, 1), 0.0)
    usual = inverse.sum(-1, keepdims=True) / np.maximum(known.sum(-1, keepdims=True), 1)
    share = np.asarray(share)[..., None]
    return np.where(known, 1 / np.where(known, share * inverse + (1 - share) * usual, 1.0), 0.0)


def rung_variance(evidence: Array) -> tuple[Array, Array]:
    """(variance, freedom) of a rung's noise, in units of a run's, from seeds and from rungs about their curve.

    The share B of seed noise in a rung's variance has a prior (SHARES); given B, both sums of squares tell of one
    variance. The posterior of the precision is matched by a χ² in mean and variance, so that Student's t applies. No
    test decides between the two sources; without seeds the rungs alone count, and without lack of fit the prior does.
    """
    weights, precision = share_posterior(evidence)
    pure, pure_freedom, lack, lack_freedom = evidence
    mean = (weights * precision).sum(-1)
    freedom = np.maximum(pure_freedom + lack_freedom, 1e-9)[..., None]
    spread = (weights * precision**2 * (1 + 2 / freedom)).sum(-1) - mean**2
    known = (mean > 0) & (pure + lack > 0)
    mean = np.where(known, mean, 1.0)
    return np.where(known, 1 / mean, 0.0), np.where(known, 2 * mean**2 / np.where(known, spread, 1.0), 1.0)


def pooled(evidence: Array, weight: float, absent: Array | None = None) -> Array:
    """Evidence of each arm (last axis) with the other arms' sums at `weight`, less where theirs is smaller.

    `absent` has the sums of further arms that are not in `evidence`.
    """
    others = evidence.sum(-1, keepdims=True) - evidence
    if absent is not None:
        others = others + absent.reshape(4, *([1] * (others.ndim - 1)))
    (total, degrees), (theirs, their_degrees) = ((each[0] + each[2], each[1] + each[3]) for each in (evidence, others))
    # An arm that is noisier than the others is not made quieter by them.
    ratio = theirs * np.maximum(degrees, 1e-9) / np.maximum(total * np.maximum(their_degrees, 1e-9), 1e-300)
    return evidence + weight * np.minimum(ratio, 1.0) * others


def false_discovery(p: Sequence[float]) -> list[float]:
    """p values adjusted for their number: calling those below `level` holds the false discovery rate at `level`.

    Source: Benjamini & Hochberg 1995.
    """
    order = np.argsort(p)[::-1]
    adjusted = np.minimum.accumulate(np.array(p)[order] * len(p) / np.arange(len(p), 0, -1))
    return [float(adjusted[np.flatnonzero(order == k)[0]]) for k in range(len(p))]


def anytime_level(level: float, pairs: float) -> float:
    """Level of a one-sided bound by `pairs` pairs that may be read after every run: it fails ever with `level`.

    Robbins' confidence sequence with a normal mixture, narrowest at 8 times ANYTIME_PAIRS pairs. Its price there is an
    interval 1.6 times as wide.
    """
    ratio = pairs / ANYTIME_PAIRS
    squared = (1 + 1 / ratio) * (math.log(1 + ratio) - 2 * math.log(2 * level))
    return float(special.ndtr(-math.sqrt(squared)))
