"""The difference between two arms, with its 95 % interval by the paired t test over the seeds."""

import math
from typing import NamedTuple

import numpy as np
from scipy.stats import t


class Comparison(NamedTuple):
    """arm - other in percent of the other's mean loss; nan without a verdict."""

    arm: str
    other: str
    mean: float
    low: float  # the ends of the interval
    high: float
    verdict: str  # lower, higher, not distinguishable, or why there is none


def compare(arm, other, a, b):
    """The Comparison of two arms by their losses a and b (n,) in nats, nan where a run failed.

    Without the seed of a failed run the rest would be a selection, so then there is no verdict.
    """
    failed = [name for name, losses in ((arm, a), (other, b)) if np.isnan(losses).any()]
    n = len(a)
    if failed or n < 2:
        reason = f"a run of {' and one of '.join(failed)} failed" if failed else "only one seed"
        return Comparison(arm, other, math.nan, math.nan, math.nan, f"no verdict: {reason}")
    percent = 100 * (a - b) / b.mean()
    mean = percent.mean()
    half = t.ppf(0.975, n - 1) * percent.std(ddof=1) / math.sqrt(n)
    verdict = "not distinguishable"
    if mean + half < 0:
        verdict = "lower"
    elif mean - half > 0:
        verdict = "higher"
    return Comparison(arm, other, mean, mean - half, mean + half, verdict)
