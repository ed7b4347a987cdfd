"""What the measuring runs can say: differences between arms with their intervals, verdicts, and how many runs that takes.

losses is {arm: {seed: validation loss}} of the measuring runs. Runs of one seed share their batches and many initial weights,
so arms are compared seed by seed, with the paired t test: what a seed does to all arms drops out, and no arm need be as noisy
as another.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np
from scipy.stats import norm, t

LEVEL = 0.05  # of the intervals, of the primary comparison, and of all secondary ones together
POWER = 0.8
TIGHT = 0.6  # of the margin: the half-width with which equal arms are called equivalent in four of five studies


class Comparison(NamedTuple):
    """arm - other, in percent of the other's mean loss, with the ends of the 95 % interval; nats is the same in nats. The
    numbers are nan where nothing can be said, and verdict tells why."""

    arm: str
    other: str
    mean: float
    low: float
    high: float
    p: float  # of no difference; Holm's for all but the first comparison of a study
    verdict: str
    nats: tuple  # mean, low, high


def compare(losses, pairs, margin, failed=None, planned=None):
    """A Comparison for each pair (arm, other); margin in percent.

    The first pair is the primary comparison. The others are secondary and share their level by Holm's procedure; those after
    the first `planned` pairs were added when results were known, and leave the p values of the others as they are. failed is
    {arm: number of measuring runs that failed}.
    """
    planned = len(pairs) if planned is None else planned
    failures = [{arm: failed[arm] for arm in pair if failed and failed[arm]} for pair in pairs]
    found = [difference(losses[a], losses[b], bool(fails)) for (a, b), fails in zip(pairs, failures)]
    p = [p for *_, p in found]
    p = p[:1] + holm(p[1:planned]) + holm(p[1:])[max(planned - 1, 0) :]
    rows = []
    for number, ((arm, other), (*nats, _), adjusted, fails) in enumerate(zip(pairs, found, p, failures)):
        percent = [100 * x / np.mean([*losses[other].values()] or [1.0]) for x in nats]
        words = verdict(*percent, adjusted, margin, len(losses[arm]))
        if fails:
            words = "not judged: " + ", ".join(f"{n} runs of {name} failed" for name, n in fails.items())
        words += ", exploratory" if number >= planned else ""
        rows.append(Comparison(arm, other, *percent, adjusted, words, tuple(nats)))
    return rows


def verdict(mean, low, high, p, margin, n):
    """The difference and its interval in percent, the p value, the margin of equivalence, and the number of seeds -> words."""
    if math.isnan(low):
        return "too few runs"
    inside = -margin < low and high < margin
    if p < LEVEL:
        return ("better" if mean < 0 else "worse") + (", by less than the margin" if inside else "")
    if inside:
        return "equivalent within the margin"
    if low > 0 or high < 0:
        return "not distinguishable after Holm's correction"
    seeds = seeds_for(noise(low, high, n), TIGHT * margin)
    return f"not distinguishable (if they are equal, about {seeds} seeds show it within ± {margin:g} %)"


def difference(a, b, failed=False):
    """Losses {seed: loss} of two arms -> mean, low, high and p of a - b in nats, by the seeds that both have; nan with fewer
    than two, or where one failed."""
    seeds = sorted(a.keys() & b.keys())
    if len(seeds) < 2 or failed:
        return [math.nan] * 4
    differences, df = np.array([a[seed] - b[seed] for seed in seeds]), len(seeds) - 1
    mean, error = differences.mean(), differences.std(ddof=1) / math.sqrt(len(seeds))
    half = t.ppf(1 - LEVEL / 2, df) * error
    return mean, mean - half, mean + half, 2 * t.sf(abs(mean) / error, df) if error else math.nan


def holm(p_values):
    """Holm's adjusted p values, in the order given: to call those below a level true makes any mistake at most so likely."""
    places = [place for place, p in enumerate(p_values) if not math.isnan(p)]
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, place in enumerate(sorted(places, key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(places) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def half_width(sd, n):
    """Half the width of the interval of a difference, in the unit of sd, the noise of each of the two runs of a seed, with n
    seeds."""
    return t.ppf(1 - LEVEL / 2, n - 1) * sd * math.sqrt(2 / n)


def noise(low, high, n):
    """The noise of each of the two runs of a seed, in the unit of the interval (low, high) of n seeds that shows it."""
    return (high - low) / 2 / half_width(1, n)


def detectable(sd, n):
    """The true difference that four of five studies call better or worse, as their primary comparison."""
    return (t.ppf(1 - LEVEL / 2, n - 1) + t.ppf(POWER, n - 1)) * sd * math.sqrt(2 / n)


def seeds_for(sd, width):
    """The seeds that make half_width at most so wide."""
    fewest = math.floor(2 * (norm.ppf(1 - LEVEL / 2) * sd / width) ** 2)  # t's quantile is larger than the normal one
    return next(n for n in itertools.count(max(2, fewest)) if half_width(sd, n) <= width)
