"""Which runs a study asks for, which rate is an arm's best, and how two arms differ."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import t

# The fields of a study that study.json holds.
PLAN = ("config", "arms", "learning_rates", "tuning_seeds", "seeds", "comparisons")
MOST_RATES = 16  # the search for an arm's rate gives up after so many


class Run(NamedTuple):
    arm: str
    learning_rate: float
    seed: int

    def __str__(self):  # the name of its folder
        return f"{self.arm}-lr{self.learning_rate}-seed{self.seed}".replace("/", "_")


class Comparison(NamedTuple):
    """arm - other in percent of the other's mean loss; nan without a verdict."""

    arm: str
    other: str
    mean: float
    low: float  # the ends of the 95 % interval
    high: float
    verdict: str  # lower, higher, not distinguishable, or why there is none


def compare(arm, other, a, b):
    """Compare two arms by their losses a and b (n,) in nats, nan where a run failed.

    The interval is that of the paired t test. Without the seed of a failed run the rest would be
    a selection, so then there is no verdict.
    """
    n = len(a)
    percent = 100 * (a - b) / b.mean()
    if np.isnan(percent).any() or n < 2:
        return Comparison(arm, other, *[math.nan] * 3, "no verdict: a failed run or a single seed")
    mean = percent.mean()
    half = t.ppf(0.975, n - 1) * percent.std(ddof=1) / math.sqrt(n)
    verdict = "not distinguishable"
    if mean + half < 0:
        verdict = "lower"
    elif mean - half > 0:
        verdict = "higher"
    return Comparison(arm, other, mean, mean - half, mean + half, verdict)


@dataclass
class Study:
    """The plan of a study and the records of its runs."""

    config: str  # the config file that every run starts from
    arms: dict  # name -> the settings that this arm changes; the first arm is the baseline
    learning_rates: list  # where the search begins; without tuning seeds, the rate of all arms
    tuning_seeds: list  # seeds of the runs that choose the rates
    seeds: list  # seeds of the runs that measure the arms
    comparisons: list  # [arm, other]
    folder: Path  # holds study.json, runs.jsonl, the report, and a folder for each unfinished run
    devices: list  # each trains one run at a time; None: train.py picks the device
    records: dict = field(default_factory=dict)  # Run -> its config.json, curve and summary.json
    ngrams: dict = field(default_factory=dict)  # n -> loss of n-gram counts; empty: not counted

    def loss(self, run):
        """The validation loss at the end of a run, in nats; infinite if the run diverged."""
        summary = self.records[run]["summary"]
        return summary["final_val_loss"] if summary else math.inf

    def failure(self, run):
        """Why a run does not count: "diverged", "never learned", or "" if it does.

        A run never learned if it ends above the loss of trigram counts, or if its training loss is
        above the loss of bigram counts for most of the run.
        """
        if math.isinf(self.loss(run)):
            return "diverged"
        if not self.ngrams:
            return ""
        middle = np.median([training_loss for _, training_loss, _ in self.records[run]["curve"]])
        slow = middle > self.ngrams[2]
        return "never learned" if slow or self.loss(run) > self.ngrams[3] else ""

    def result(self, run):
        """The final loss of a run, and why it does not count, for a reader."""
        return f"{self.loss(run):.4f} {self.failure(run)}".strip()

    def runs(self):
        """The runs of the study, as far as its records determine them."""
        runs = []
        for arm in self.arms:
            tuning, rate = self.search(arm)
            runs += tuning
            runs += [Run(arm, rate, seed) for seed in self.seeds if rate]
        order = [*self.tuning_seeds, *self.seeds]
        return sorted(runs, key=lambda run: order.index(run.seed))  # so that the arms stay level

    def search(self, arm):
        """The tuning runs of an arm, and its best rate, which is None until they are done.

        Every tuning seed tries every rate. The rates beside the best one follow in steps of
        sqrt(2), until the best one lies between two others. Once the arm was measured at a rate,
        this rate stands.
        """
        if not self.tuning_seeds:
            return [], self.learning_rates[0]
        of_arm = [run for run in self.records if run.arm == arm]
        for run in of_arm:
            if run.seed in self.seeds:
                return [r for r in of_arm if r.seed in self.tuning_seeds], run.learning_rate
        rates = list(self.learning_rates)
        while True:
            runs = [Run(arm, rate, seed) for rate in rates for seed in self.tuning_seeds]
            if any(run not in self.records for run in runs):
                return runs, None
            best = min(rates, key=lambda rate: self.rank(arm, rate))
            near = [float(f"{best * factor:.3g}") for factor in (math.sqrt(0.5), math.sqrt(2))]
            new = [rate for rate in near if not any(0.9 < rate / r < 1.1 for r in rates)]
            if not new or len(rates) >= MOST_RATES:
                return runs, best
            rates += new

    def rank(self, arm, rate):
        """The lower the better: a rate at which a tuning run failed comes after all others."""
        runs = [Run(arm, rate, seed) for seed in self.tuning_seeds]
        failed = any(self.failure(run) for run in runs)
        return failed, sum(self.loss(run) for run in runs), rate

    def measured(self, arm):
        """The measuring runs of an arm that are done."""
        rate = self.search(arm)[1]
        runs = [Run(arm, rate, seed) for seed in self.seeds]
        return [run for run in runs if run in self.records]

    def losses(self, arm):
        """The losses (n,) of the measuring runs of an arm that are done; nan where one failed."""
        runs = self.measured(arm)
        return np.array([math.nan if self.failure(run) else self.loss(run) for run in runs])

    def compare(self, pairs):
        """A Comparison for each pair of arms [arm, other] whose runs are all done.

        The others have none, so that nobody can stop at a result they like.
        """
        whole = {arm for arm in self.arms if len(self.measured(arm)) == len(self.seeds)}
        done = [pair for pair in pairs if whole.issuperset(pair)]
        return [compare(a, b, self.losses(a), self.losses(b)) for a, b in done]

    def to_go(self):
        """How many runs are left; at least so many while a rate is not known."""
        unknown = sum(self.search(arm)[1] is None for arm in self.arms)
        left = sum(run not in self.records for run in self.runs())
        return left + len(self.seeds) * unknown
