"""Student's t, the F test for lack of fit, and Bartlett's test, by scipy.special.

scipy.stats has all three; each call of it takes about 0.1 ms, which is too slow for simulating thousands of ladders.
"""

import math
from collections.abc import Sequence

import numpy as np
from scipy import special

LACK_OF_FIT = 0.05
"""If the F test gives a smaller p, the form does not fit: its lack of fit alone then says how far to trust it."""


def student_quantile(level: float, freedom: int) -> float:
    """Value that Student's t exceeds with probability `level`."""
    return -float(special.stdtrit(freedom, level))


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
