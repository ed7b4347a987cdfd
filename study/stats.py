"""What the measuring runs can say: differences between arms with their intervals, verdicts, and how many runs that takes.

losses is {arm: validation losses of its measuring runs}. The seeds of two arms are not paired: runs that share a seed
share their batches and many starting weights, and yet end no more alike than others (study/README.md).
"""

import math
from typing import NamedTuple

import numpy as np
from scipy.stats import f, t

LEVEL = 0.05  # of the intervals, of Holm's procedure, and of the test for an arm with a spread of its own
POWER = 0.8


class Comparison(NamedTuple):
    """arm - other, in percent of the other's mean loss, with the ends of the 95 % interval; nats is the same in nats."""

    arm: str
    other: str
    mean: float
    low: float
    high: float
    p: float  # of no difference; Holm's for all but the first comparison of a study
    verdict: str
    nats: tuple  # mean, low, high


def compare(losses, pairs, margin, failed=None):
    """A Comparison for each pair (arm, other), None where there are not yet runs enough; margin in percent.

    The first pair is the primary comparison, at the level 0.05. The others are secondary: they share it, by Holm's
    procedure. failed is {arm: number of measuring runs that failed}.
    """
    odd = own_spread(losses)
    common = pooled([x for arm, x in losses.items() if arm not in odd])
    found = [difference(losses[a], losses[b], None if odd & {a, b} else common) for a, b in pairs]
    adjusted = holm([p for *_, p in filter(None, found[1:])])
    rows = []
    for number, ((arm, other), entry) in enumerate(zip(pairs, found)):
        if not entry:
            rows.append(None)
            continue
        *nats, p = entry
        p = adjusted.pop(0) if number else p
        percent = [100 * x / np.mean(losses[other]) for x in nats]
        words = verdict(*percent, p, margin)
        if words == UNDECIDED:
            width = (percent[2] - percent[1]) / 2
            words += f" (about {math.ceil(len(losses[arm]) * (width / margin) ** 2)} seeds for ± {margin:g} %)"
        if failures := {name: failed[name] for name in (arm, other) if failed and failed[name]}:
            words = "not judged: " + ", ".join(f"{n} runs of {name} failed" for name, n in failures.items())
        rows.append(Comparison(arm, other, *percent, p, words, tuple(nats)))
    return rows


UNDECIDED = "not distinguishable"


def verdict(mean, low, high, p, margin):
    """The difference and its interval, in percent, the p value, and the margin of equivalence -> words."""
    inside = -margin < low and high < margin
    if p < LEVEL:
        return ("better" if mean < 0 else "worse") + (", by less than the margin" if inside else "")
    return "equivalent within the margin" if inside else UNDECIDED


def difference(a, b, common):
    """Losses of two arms -> mean, low, high and p of a - b in nats; None with fewer than two runs of either.

    common is the variance, with its degrees of freedom, that all arms share: the noise of a run is much the same in each, so
    few seeds give many degrees of freedom. Without it, for an arm with a spread of its own, it is Welch's t test.
    """
    if min(len(a), len(b)) < 2:
        return None
    mean, (variance, df) = np.mean(a) - np.mean(b), common or (0, 0)
    error = math.sqrt(variance * (1 / len(a) + 1 / len(b)))
    if not common:
        parts = [(np.var(x, ddof=1) / len(x), len(x) - 1) for x in (a, b)]
        error = math.sqrt(sum(part for part, _ in parts))
        df = error**4 / sum(part**2 / n for part, n in parts)
    half = t.ppf(1 - LEVEL / 2, df) * error
    return mean, mean - half, mean + half, 2 * t.sf(abs(mean) / error, df) if error else math.nan


def pooled(groups):
    """Losses of some arms -> their common variance, and its degrees of freedom."""
    squares, df = sum(np.var(x) * len(x) for x in groups if x), sum(len(x) - 1 for x in groups if x)
    return squares / df if df else math.nan, df


def own_spread(losses):
    """The arms whose variance differs from that of the others together, the most different one first: F tests, two-sided,
    at the level 0.05 / arms."""
    odd, p = set(), {}
    while True:
        rest = {arm: x for arm, x in losses.items() if arm not in odd}
        for arm in rest:
            own, df = pooled([rest[arm]])
            others, df_others = pooled([x for name, x in rest.items() if name != arm])
            above = f.sf(own / others, df, df_others) if df and df_others and others else 0.5
            p[arm] = 2 * min(above, 1 - above)
        arm = min(rest, key=p.get, default=None)
        if arm is None or p[arm] >= LEVEL / len(losses):
            return odd
        odd.add(arm)


def holm(p_values):
    """Holm's adjusted p values, in the order given: to call those below a level true makes any mistake at most so likely."""
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = largest
    return adjusted


def half_width(sd, n, arms):
    """Half the width of the interval of a difference, in the unit of sd, with n seeds for each of so many arms."""
    return t.ppf(1 - LEVEL / 2, arms * (n - 1)) * sd * math.sqrt(2 / n)


def detectable(sd, n, arms):
    """The true difference that four of five studies call better or worse, as their primary comparison."""
    df = arms * (n - 1)
    return (t.ppf(1 - LEVEL / 2, df) + t.ppf(POWER, df)) * sd * math.sqrt(2 / n)


def seeds_for(sd, width, arms):
    """The seeds an arm that make half_width at most so wide."""
    n = 2
    while half_width(sd, n, arms) > width:
        n += 1
    return n
