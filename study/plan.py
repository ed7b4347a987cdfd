"""A study: what it compares, which runs it asks for, and what they say. No files and no processes are in here."""

import math
import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from study import stats

MOST_RATES = 16  # of an arm: the search gives up after so many
FIRST_SEEDS = 6  # that measure each arm before the width of the intervals asks for more


class Run(NamedTuple):
    arm: str
    learning_rate: float
    seed: int

    def __str__(self):
        return f"{self.arm}-lr{self.learning_rate:g}-seed{self.seed}"


def final_loss(record):
    """The validation loss at the end of a run; infinite where it diverged."""
    return record["summary"]["final_val_loss"] if record["summary"] else math.inf


@dataclass
class Study:
    """What is compared, and what is known so far."""

    config: str  # the config file that every run starts from
    arms: dict  # name -> the settings that the arm changes; the first is the baseline
    learning_rates: list  # where the search begins; without tuning seeds, the one rate of all arms
    tuning_seeds: list  # those that find the rates
    seeds: list  # those that measure, in the order in which they are used
    comparisons: list  # [arm, other]; the first is the primary one
    margin: float  # of equivalence, in percent of the loss
    half_width: float | None  # of the intervals, in percent: more seeds until they are so narrow; None: all seeds
    spread: float  # expected standard deviation of a run's loss, without what its seed does to all arms, in percent
    folder: Path  # holds study.json, runs.jsonl, the report, and a folder for each run under way
    devices: list  # one run at a time on each; None: what train.py picks
    records: dict = field(default_factory=dict)  # Run -> its config.json, training curve and summary.json
    ngrams: dict = field(default_factory=dict)  # n -> loss of n-gram counts; empty where they were not counted
    planned: int | None = None  # how many comparisons were stated before runs that measure were known; None: all

    @property
    def baseline(self):
        return next(iter(self.arms))

    def failure(self, run):
        """Why a run must not be averaged with others, or "". It never learned where its validation loss ends above what
        counting trigrams reaches, or where its training loss, smoothed over a tenth of the run, is above the bigrams' in
        most of it."""
        record = self.records[run]
        loss = final_loss(record)
        if math.isinf(loss):
            return "diverged"
        if not self.ngrams:
            return ""
        losses = [training_loss for _, training_loss, _ in record["curve"]]
        width = max(1, len(losses) // 10)
        smooth = np.convolve(losses, np.full(width, 1 / width), mode="valid")
        return "never learned" if loss > self.ngrams[3] or (smooth > self.ngrams[2]).mean() > 0.5 else ""

    # Which runs.

    def runs(self):
        """The runs of the study, as far as the records can tell."""
        runs, order, seeds = [], [*self.tuning_seeds, *self.seeds], self.measuring_seeds()
        for arm in self.arms:
            tuning, best = self.search(arm)
            runs += tuning + [Run(arm, best, seed) for seed in seeds if best]
        return sorted(runs, key=lambda run: order.index(run.seed))  # so that the arms stay level

    def search(self, arm):
        """The runs of an arm that look for its best rate, and that rate once it is known, else None."""
        if not self.tuning_seeds:
            return [], self.learning_rates[0]
        by_rate = self.tuning_runs(arm)
        done = [run for runs in by_rate.values() for run in runs.values()]
        first, rates = self.tuning_seeds[0], sorted({*self.learning_rates, *by_rate})
        if new := [Run(arm, rate, first) for rate in rates if rate not in by_rate]:
            return done + new, None
        # The first seed compares all rates, and all seeds the best of them with the second where noise cannot tell these
        # two: never two means over different seeds.
        failed = {rate: any(map(self.failure, runs.values())) for rate, runs in by_rate.items()}
        losses = {rate: self.mean_loss(runs, [first]) for rate, runs in by_rate.items()}
        best, *others = sorted(by_rate, key=lambda rate: (failed[rate], losses[rate], rate))
        noise = self.spread / 100 * losses[best] * math.sqrt(2)
        contenders = [best, *(rate for rate in others[:1] if not failed[rate] and losses[rate] - losses[best] < noise)]
        more = [Run(arm, rate, first) for rate in self.around(best, rates)]
        more = more or [Run(arm, r, seed) for r in contenders for seed in self.tuning_seeds if seed not in by_rate[r]]
        if not more:
            complete = [rate for rate in by_rate if len(by_rate[rate]) == len(self.tuning_seeds)]
            best = min(complete, key=lambda rate: (failed[rate], self.mean_loss(by_rate[rate]), rate))
            more = [Run(arm, rate, first) for rate in self.around(best, rates)]
        return done + more, None if more else best

    def around(self, best, rates):
        """The rates on both sides of the best one, as far as they were not tried."""
        near = [float(f"{best * factor:.3g}") for factor in (1 / math.sqrt(2), math.sqrt(2))]
        new = [rate for rate in near if not any(0.9 < rate / tried < 1.1 for tried in rates)]
        return new if len(rates) < MOST_RATES else []

    def tuning_runs(self, arm):
        """{rate: {seed: run} of the runs with tuning seeds that are done}"""
        by_rate = {}
        for run in self.records:
            if run.arm == arm and run.seed in self.tuning_seeds:
                by_rate.setdefault(run.learning_rate, {})[run.seed] = run
        return by_rate

    def mean_loss(self, runs, seeds=None):
        """Of runs {seed: run}, or of those with these seeds."""
        return statistics.fmean(final_loss(self.records[runs[seed]]) for seed in seeds or runs)

    def usable_rates(self, arm):
        """The rates within 1 % of the best one's loss over the tuning seeds that both have, without a run that failed."""
        by_rate, best = self.tuning_runs(arm), self.search(arm)[1]

        def usable(rate):
            shared = by_rate[rate].keys() & by_rate[best].keys()
            limit = 1.01 * self.mean_loss(by_rate[best], shared)
            return not any(map(self.failure, by_rate[rate].values())) and self.mean_loss(by_rate[rate], shared) <= limit

        return sorted(filter(usable, by_rate)) if best in by_rate else []

    def measuring_seeds(self):
        """The seeds that measure, as far as the records can tell: two more for all arms while an interval is too wide.
        The rule sees widths alone, never which arm is ahead."""
        n = min(FIRST_SEEDS, len(self.seeds)) if self.half_width else len(self.seeds)
        while n < len(self.seeds) and self.width(n) > self.half_width:
            n = min(n + 2, len(self.seeds))
        return self.seeds[:n]

    def width(self, n):
        """Half the widest interval of the planned comparisons with the first n seeds, in percent; 0 while a run is missing."""
        measured, pairs = self.measured(self.seeds[:n]), self.comparisons[: self.planned]
        if any(len(measured[arm]) < n for pair in pairs for arm in pair):
            return 0.0
        rows = stats.compare(self.losses(measured), pairs, self.margin)
        return max(((row.high - row.low) / 2 for row in rows if row.high > row.low), default=0.0)

    def to_go(self):
        """How many runs are left; at least so many while a rate is still looked for."""
        left = sum(run not in self.records for run in self.runs())
        return left + len(self.measuring_seeds()) * sum(self.search(arm)[1] is None for arm in self.arms)

    # What they say.

    def measured(self, seeds=None):
        """{arm: the runs with measuring seeds at its best rate, as far as they are done}"""
        seeds = self.measuring_seeds() if seeds is None else seeds
        best = {arm: self.search(arm)[1] for arm in self.arms}
        return {arm: [run for s in seeds if (run := Run(arm, best[arm], s)) in self.records] for arm in self.arms}

    def losses(self, measured):
        """{arm: runs} -> {arm: {seed: loss} of those that learned}"""
        good = {arm: [run for run in runs if not self.failure(run)] for arm, runs in measured.items()}
        return {arm: {run.seed: final_loss(self.records[run]) for run in runs} for arm, runs in good.items()}

    def compare(self):
        """A row of stats.compare for each comparison; one that was added later follows when its own runs are done. None before
        all runs of the planned ones are: who stops at a difference that he likes finds one."""
        under_way = {run.arm for run in self.runs() if run not in self.records}
        pairs = [pair for pair in self.comparisons if under_way.isdisjoint(pair)]
        if pairs[: self.planned] != self.comparisons[: self.planned]:
            return []
        measured = self.measured()
        failed = {arm: sum(bool(self.failure(run)) for run in runs) for arm, runs in measured.items()}
        return stats.compare(self.losses(measured), pairs, self.margin, failed, self.planned)
