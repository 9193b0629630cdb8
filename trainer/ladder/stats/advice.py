"""The next runs: which of them would settle an open verdict, with what probability and for how much compute.

From what the results leave open, possible truths are drawn: a form with its coefficients, the noise of seeds, effects
of rungs. For each truth the further runs are drawn too, added to the runs that there are, and judged by the same rule.
The share of truths in which that decides is the probability that these runs settle the question (Raiffa & Schlaifer's
preposterior analysis). scripts/bench_ladder.py follows such advice on synthetic ladders and counts.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from trainer.ladder.stats import fit as fits
from trainer.ladder.stats import significance
from trainer.ladder.stats.worth import FADING, POOLED, PREFERENCE, Baselines, Worths, decisions

Array = np.ndarray
EVERYWHERE = (1, 2, 4, 8, 16)  # numbers of further seeds at every rung that are tried
AT_ONE = (1, 3, 9)  # at a single rung, or at a new one
FEW_DRAWS, DRAWS = 30, 200  # of truths: to choose, and to state the probability of what was chosen
LEAST_FREEDOM = 0.5  # degrees of freedom below which nothing is known of the noise, and so of further runs
LEAST_SLOPE = 0.01  # of the curve's, below which one that is fitted to drawn runs counts as flat
PRIOR_NOISE = (0.005, 2.0)
"""Belief about the noise of seeds before the results: a run's sd in nats, and the degrees of freedom it counts for."""
MOST_WORTH = 20.0  # ln m beyond which a drawn truth means nothing
SOME_FADING = FADING[::4]  # enough to choose; bounds over fewer forms are a little narrower, and settle more
PRIOR_SDS = (0.15, 0.02)
"""Belief before the results: sd of ln m at the largest rung, and of its slope there per e-fold of compute."""
WORTHWHILE = 0.5  # of the largest probability: runs that settle less often are not advised, however cheap they are


@dataclass(frozen=True)
class Purchase:
    """Further runs of an arm, and as many of the baseline."""

    rungs: tuple[int, ...]  # numbers of the rungs that are there and get more seeds
    pairs: int  # further seeds at each of them, or seeds of the new rung
    new: float | None  # FLOPs of the baseline's run at a new rung
    flops: float  # compute of all these runs


@dataclass(frozen=True)
class Situation:
    """One arm's results, with what is needed to judge them again when more are there."""

    worths: Worths  # of all arms of the ladder
    number: int  # of this arm
    base: Array  # losses of the baseline, (rungs, seeds); NaN where a rung has fewer
    pairs: Array  # (3, rungs, pairs): losses of baseline and arm, ln of their costs' ratio; NaN where there is no pair
    flops: Array  # of the baseline's run at each rung
    scale: float  # FLOPs at x = 0
    target: float  # FLOPs
    level: Callable[[float], float]  # of a bound, by the number of pairs
    least: float  # ln of the least useful gain

    @property
    def evidence(self) -> tuple[Array, Array]:
        """Evidence of the noise of the arm and of the baseline, as significance.share_posterior takes it."""
        return significance.pooled(self.worths.evidence, POOLED)[:, self.number], self.worths.baseline_evidence

    @property
    def believed(self) -> tuple[Array, ...]:
        """The same with the prior's; two runs differ by twice the variance of one."""
        sd, freedom = PRIOR_NOISE
        return tuple(
            each + np.array([runs * freedom * sd**2, freedom, 0.0, 0.0])
            for runs, each in zip((2, 1), self.evidence, strict=True)
        )

    @property
    def has_noise(self) -> bool:
        return all(
            pure + lack > 0 and freedom + degrees >= LEAST_FREEDOM for pure, freedom, lack, degrees in self.evidence
        )

    @property
    def log_cost(self) -> Array:
        """ln of the arm's compute over the baseline's, at each rung; the mean of the others where there is no pair."""
        counts = np.isfinite(self.pairs[2]).sum(-1)
        costs = np.where(np.isfinite(self.pairs[2]), self.pairs[2], 0.0).sum(-1)
        return np.where(counts > 0, costs / np.maximum(counts, 1), costs.sum() / max(int(counts.sum()), 1))

    def purchases(self, further: Sequence[float]) -> Iterator[Purchase]:
        """Yield what may be bought; `further` has the FLOPs of possible new rungs."""
        prices = self.flops * (1 + np.exp(self.log_cost))
        known = tuple(np.flatnonzero(self.worths.counts[self.number] > 0).tolist())
        for pairs in EVERYWHERE:
            yield Purchase(known, pairs, None, pairs * float(prices[list(known)].sum()))
        for pairs in AT_ONE:
            for rung in known:
                yield Purchase((rung,), pairs, None, pairs * float(prices[rung]))
            for flops in further:
                yield Purchase((), pairs, flops, pairs * flops * (1 + math.exp(float(self.log_cost[-1]))))


class Futures:
    """Possible truths behind an arm's results, and the runs that they would give."""

    def __init__(
        self, situation: Situation, draws: int, random: np.random.Generator, fading: Array = FADING
    ) -> None:  # fmt: skip
        self._now, self._random, self._draws, self._fading = situation, random, draws, fading
        worths, arm = situation.worths, situation.number
        self._spread = np.exp(worths.growth * worths.x)
        # Noise of pairs and of the baseline's runs, each with the share that seeds have in it.
        (self._noise, self._share), (self._base_noise, self._base_share) = map(self._draw_noise, situation.believed)
        # The baseline's curve moves with its noise: (E, A, alpha) of each truth, minus the fitted ones.
        curve = worths.baselines
        influence = fits.sensitivity(curve.x, curve.seeds, curve.E, curve.A, curve.alpha)
        self._base_effect, self._base_kept = self._effects(curve.seeds, self._base_share)
        seeds = significance.effective_counts(curve.seeds, self._base_share)
        noise = np.sqrt(self._base_noise[:, None] / seeds) * np.exp(worths.growth * curve.x)
        self._moved = (noise * self._normal(influence.shape[-1])) @ influence.T
        # A form, and a line in its z: z is 0 at the largest rung, and its slope is 1 there.
        self._form, self._level, self._slope, z = self._draw_line()
        counts, means = worths.counts[arm], worths.means[arm]
        self._effect, kept = self._effects(counts, self._share)
        fitted = self._level[:, None] + self._slope[:, None] * z
        # A rung's own worth lies between its mean and the form, as far as its own effect explains the distance.
        own = np.sqrt(self._noise[:, None] * kept * self._share[:, None] / np.maximum(counts, 1)) * worths.unit[0]
        self._worth = fitted + np.where(counts > 0, kept * (means - fitted), 0.0) + own * self._normal(len(counts))

    @staticmethod
    def _effects(counts: Array, share: Array) -> tuple[Array, Array]:
        """(Share of a rung's own effect in the variance of a run, its share in that of each rung's mean)."""
        effect = (1 - share) * np.mean(1 / counts[counts > 0])
        return effect, effect[:, None] * significance.effective_counts(counts, share)

    def _normal(self, *shape: int) -> Array:
        return self._random.standard_normal((self._draws, *shape))

    def _draw_noise(self, evidence: Array) -> tuple[Array, Array]:
        """(variance of a rung's noise in units of a run's, share of seeds in it) of each truth."""
        chances, precision = significance.share_posterior(evidence)
        chosen = self._random.choice(len(chances), self._draws, p=chances)
        freedom = float(evidence[1] + evidence[3])
        chi = np.maximum(self._random.chisquare(freedom, self._draws), 1e-3)
        return freedom / (precision[chosen] * chi), significance.SHARES[chosen]

    def _draw_line(self) -> tuple[Array, Array, Array, Array]:
        """(form, ln m at the largest rung, its slope there, z at each rung) of each truth, by Bayes' rule."""
        worths, arm = self._now.worths, self._now.number
        counts = significance.effective_counts(worths.counts[arm], self._share)
        weights = (counts / worths.unit[0] ** 2 / self._noise[:, None])[:, None]
        z = worths.z(worths.x)[0]
        means, prior = worths.means[arm], np.array(PRIOR_SDS) ** -2
        # Normal equations of (level, slope) for each truth's noise and each form.
        a = weights.sum(-1) + prior[0]
        b, c = (weights * z).sum(-1), (weights * z**2).sum(-1) + prior[1]
        u, v = (weights * means).sum(-1), (weights * z * means).sum(-1)
        determinant = a * c - b**2
        level, slope = (c * u - b * v) / determinant, (a * v - b * u) / determinant
        explained = level * u + slope * v
        chances = np.exp((explained - explained.max(-1, keepdims=True)) / 2) / np.sqrt(determinant)
        chances = chances * np.exp(-np.abs(worths.gammas) / PREFERENCE) * np.gradient(worths.gammas)
        total = chances.cumsum(-1)
        form = (total < total[:, -1:] * self._random.random((self._draws, 1))).sum(-1)
        own = np.arange(self._draws), form
        a, b, determinant = np.broadcast_to(a, determinant.shape)[own], b[own], determinant[own]
        # The covariance is the inverse of [[a, b], [b, c]].
        moved = self._normal() * np.sqrt(a / determinant)
        slopes = slope[own] + moved
        return form, level[own] - b / a * moved + self._normal() / np.sqrt(a), slopes, z[form]

    def settled(self, purchases: Sequence[Purchase]) -> list[float]:
        """Share of the truths in which these runs would lead to a decision, for each purchase."""
        found: dict[int, float] = {}
        for new in dict.fromkeys(one.new for one in purchases):
            places = [place for place, one in enumerate(purchases) if one.new == new]
            found |= zip(places, self._settled([purchases[place] for place in places], new), strict=True)
        return [found[place] for place in range(len(purchases))]

    def _settled(self, purchases: Sequence[Purchase], new: float | None) -> list[float]:
        """The same for purchases with the same new rung, or with none; the first axes are purchases and draws."""
        now, worths = self._now, self._now.worths
        x, base, pairs = worths.x, self._widened(now.base, purchases), self._widened(now.pairs, purchases)
        for place, one in enumerate(purchases):
            for rung in one.rungs:
                self._run(base[place], pairs[:, place], one.pairs, rung, float(x[rung]), self._worth[:, rung])
        if new is not None:
            x = np.append(x, at := math.log(new / now.scale))
            slope = float(worths.baselines.slope(np.array([at]))[0])
            unit = math.exp(float(worths.growth) * at) / slope
            effect = np.sqrt(self._noise * self._effect) * unit
            z = worths.z(np.array([at]))[0, self._form, 0]
            for place, one in enumerate(purchases):
                worth = self._level + self._slope * z + effect * self._normal()
                self._run(base[place], pairs[:, place], one.pairs, len(x) - 1, at, worth)
        return self._decided(x, base, pairs).mean(-1).tolist()

    def _decided(self, x: Array, base: Array, pairs: Array) -> Array:
        """True where the bounds decide, shape (purchases, draws).

        The verdict also asks that (E, alpha) do not matter; in 112 ladders with advice that withheld no decision.
        """
        now, worths = self._now, self._now.worths
        curve = Baselines.fit(x, base, coarse=True)
        # Without a slope there is no multiplier, and no decision.
        flat = (curve.A <= 0) | (curve.slope(x)[..., -1] < LEAST_SLOPE * float(worths.baselines.slope(x)[-1]))
        curve = replace(curve, **{
            name: np.where(flat, getattr(worths.baselines, name), getattr(curve, name)) for name in ("E", "A", "alpha")
        })  # fmt: skip
        # Noise is estimated anew from all runs, its growth with scale too, and all forms count: as a verdict does it.
        then = Worths.from_pairs(curve, *pairs[..., None, :, :], absent=worths.others(now.number), fading=self._fading)
        target = math.log(now.target / now.scale)
        levels = [now.level(float(number)) for number in np.isfinite(pairs[0, :, 0]).sum((-1, -2))]
        decided = np.zeros(flat.shape, dtype=int)
        for level in dict.fromkeys(levels):
            same = np.array(levels) == level
            decided[same] = decisions(then, target, level, now.least)[same, :, 0]
        return (decided != 0) & ~flat

    def _widened(self, losses: Array, purchases: Sequence[Purchase]) -> Array:
        """Losses for each purchase and truth, shape (..., purchases, draws, rungs, seeds), with room for new runs."""
        *more, rungs, seeds = losses.shape
        new, most = purchases[0].new is not None, max(one.pairs for one in purchases)
        wide = np.full((*more, len(purchases), self._draws, rungs + new, seeds + most), np.nan)
        wide[..., :rungs, :seeds] = losses[..., None, None, :, :]
        return wide

    def _run(self, base: Array, pairs: Array, number: int, rung: int, x: float, worth: Array) -> None:
        """Draw runs of the baseline and the arm, and write their losses beside those of the rung."""
        now, worths = self._now, self._now.worths
        curve = worths.baselines
        E, A, alpha = float(curve.E), float(curve.A), float(curve.alpha)
        z = math.exp(-alpha * x)
        fitted = E + A * z
        true = fitted + self._moved @ np.array([1.0, z, -A * x * z])
        spread, slope = math.exp(float(worths.growth) * x), alpha * (fitted - E)
        noise, share = np.sqrt(self._base_noise), self._base_share
        if rung < len(now.base):
            kept = self._base_kept[:, rung]
            mean = true + kept * (np.nanmean(now.base[rung]) - true)
            mean = mean + noise * np.sqrt(kept * share / curve.seeds[rung]) * spread * self._normal()
        else:
            mean = true + noise * np.sqrt(self._base_effect) * spread * self._normal()
        own, paired = self._normal(number), self._normal(number)
        base_loss = mean[:, None] + (noise * np.sqrt(share))[:, None] * spread * own
        base_loss = np.maximum(base_loss, E + 0.01 * (fitted - E))
        correlation = float(worths.correlation[now.number])
        apart = correlation * own + math.sqrt(max(1 - correlation**2, 0.0)) * paired
        apart = apart * np.sqrt(self._noise * self._share)[:, None] * spread
        cost = float(now.log_cost[min(rung, len(now.base) - 1)])
        worth = np.clip(worth[:, None] + apart / slope, -MOST_WORTH, MOST_WORTH)
        arm_loss = E + (base_loss - E) * np.exp(-alpha * (worth + cost))
        first = now.base.shape[-1]
        base[:, rung, first : first + number] = base_loss
        first = now.pairs.shape[-1]
        for losses, new in zip(pairs, (base_loss, arm_loss, cost), strict=True):
            losses[:, rung, first : first + number] = new


def advise(
    situation: Situation, further: Sequence[float], most_flops: float = math.inf, seed: int = 0
) -> list[tuple[Purchase, float]]:
    """Return purchases with their probability, the advised one first, at most one of each kind.

    Kinds are seeds at every rung, seeds at one, and a new rung. Among what settles at least half as often as what
    settles most often, the advised one settles most often for its compute.
    """
    if not situation.has_noise:
        return []
    random = np.random.Generator(np.random.Philox(seed))
    futures = Futures(situation, FEW_DRAWS, random, SOME_FADING)
    possible = [one for one in situation.purchases(further) if one.flops <= most_flops]
    found = list(zip(possible, futures.settled(possible), strict=True))
    likely = max((chance for _, chance in found), default=0.0)
    if not likely:
        return []
    found = [(one, chance) for one, chance in found if chance >= WORTHWHILE * likely]
    found.sort(key=lambda it: it[1] / it[0].flops, reverse=True)
    kinds: dict[str, Purchase] = {}
    for one, _ in found:
        kinds.setdefault("rung" if one.new else "everywhere" if len(one.rungs) > 1 else "one", one)
    # What was chosen for its share was also lucky with it: the share that is told comes from other draws.
    chosen = list(kinds.values())
    return list(zip(chosen, Futures(situation, DRAWS, random).settled(chosen), strict=True))
