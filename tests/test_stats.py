"""study/plan.py and ngrams.py: intervals, counts and the search, against scipy and known truth."""

import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

scipy_stats = pytest.importorskip("scipy.stats")

import train  # noqa: E402
from utils.data import Dataset  # noqa: E402
from study.ngrams import ngram_losses  # noqa: E402
from study.plan import Run, Study, compare  # noqa: E402


def record(loss, curve=((1, 1.0, 1.0),)):
    summary = {"final_val_loss": loss} if math.isfinite(loss) else None
    return {"config": {}, "curve": list(curve), "summary": summary}


def empty_study(arms, rates=(1.0,), tuning=()):
    """A study of arms by name, each compared with the first."""
    pairs = [[arm, arms[0]] for arm in arms[1:]]
    rest = {"comparisons": pairs, "folder": Path("r"), "devices": ["cpu"]}
    rest["ngrams"] = {2: 2.3, 3: 1.7, 5: 1.4}
    return Study("c.py", {arm: {} for arm in arms}, list(rates), list(tuning), [3, 4], **rest)


# Differences and their intervals.


@pytest.mark.parametrize(
    "a, verdict",
    [
        ([1.90, 1.91, 1.93], "lower"),
        ([2.09, 2.10, 2.12], "higher"),
        ([1.95, 2.05, 2.02], "not distinguishable"),
        ([1.90, math.nan, 1.93], "no verdict: a failed run or a single seed"),
        ([1.90], "no verdict: a failed run or a single seed"),
    ],
)
def test_the_verdict_is_the_sign_of_the_interval(a, verdict):
    """Without a verdict there are no numbers, either: a failed run must not be left out."""
    a = np.array(a)
    b = np.array([2.0, 2.01, 2.02])[: len(a)]
    row = compare("a", "b", a, b)
    assert row.verdict == verdict
    if verdict.startswith("no verdict"):
        assert np.isnan(row[2:5]).all()
    else:
        interval = scipy_stats.ttest_rel(a, b).confidence_interval()
        assert row[3:5] == pytest.approx(100 * np.array(interval) / b.mean())


def test_a_comparison_follows_when_all_its_runs_are_done():
    study = empty_study("abc")
    for arm, seed in (("a", 3), ("a", 4), ("b", 3), ("c", 3), ("c", 4)):
        study.records[Run(arm, 1.0, seed)] = record(1 + seed / 10)
    assert [row[:2] for row in study.compare(study.comparisons)] == [("c", "a")]
    study.records[Run("b", 1.0, 4)] = record(math.inf)
    verdicts = [row.verdict.split(":")[0] for row in study.compare(study.comparisons)]
    assert verdicts == ["no verdict", "not distinguishable"]


# What counting reaches.


def slow_ngrams(counted, val, vocab_size):
    """Witten and Bell's rule as it is written down, recursively.

    counted and val: pairs of a token and those near it, nearest first.
    """
    count, followers = Counter(), defaultdict(set)
    for token, near in counted:
        for n in range(len(near) + 1):
            count[(*near[:n], token)] += 1
            followers[near[:n]].add(token)
    total = Counter()
    for gram, c in count.items():
        total[gram[:-1]] += c

    def p(token, h):
        shorter = p(token, h[:-1]) if h else 1 / vocab_size
        t = len(followers[h])
        return (count[(*h, token)] + t * shorter) / (total[h] + t) if total[h] else shorter

    return -np.mean([math.log(p(token, near)) for token, near in val])


AROUND = [("next", (-1, -2, -3, -4)), ("masked", (-1, 1, -2, 2))]


@pytest.mark.parametrize("objective, around", AROUND)
def test_ngram_losses_are_those_of_the_rule(objective, around, tiny_data):
    """On the tokens of the run's windows and of an evaluation, gathered one by one."""
    data = Dataset("tiny", 16)
    recipe = {"batch_size": 2, "gradient_accumulation_steps": 2, "max_iters": 30, "seed": 3}
    recipe |= {"objective": objective, "eval_tokens": 170, "mask_share": 0.2}
    settings = train.Settings("tiny", device="cpu", **recipe)

    def examples(split, offsets, length, *key):
        """For each token in each window: the token, those near it, whether it is masked."""
        _, targets = train.get_batch(data, split, offsets, settings, key)
        for number, offset in enumerate(offsets.tolist()):
            window = dict(enumerate(data.tokens(split)[offset : offset + length].tolist()))
            is_masked = objective == "masked" and targets[number] >= 0
            masked = {i: "mask" for i in window if objective == "masked" and is_masked[i]}
            seen = {**window, **masked}
            for i, token in window.items():
                yield token, tuple(seen.get(i + o, "edge") for o in around), i in masked

    counted, length = [], 17 if objective == "next" else 16
    for step in range(30):
        offsets = train.get_offsets(data, 3, step, 4)
        counted += examples("train", offsets, length, 3, "holes", step)
    if objective == "next":
        val = list(examples("val", np.array([0]), 171, "validation"))[1:]
    else:
        val = examples("val", np.arange(0, 160, 16), 16, "validation")
        counted, val = ([example for example in part if example[2]] for part in (counted, val))
    assert len(val) == (170 if objective == "next" else 10 * 3)
    losses, expected = ngram_losses(data, settings), {}
    for n in range(1, 6):
        parts = ([(token, h[: n - 1]) for token, h, _ in part] for part in (counted, val))
        expected[n] = slow_ngrams(*parts, 18)
    assert losses == pytest.approx(expected, rel=1e-12)
    assert losses[3] < losses[1] - 0.5  # two tokens say much about the third


# Runs that fail.


@pytest.mark.parametrize(
    "levels, final, words",
    [
        ([2.5] * 4 + [2.0, 1.8, 1.6, 1.5, 1.5, 1.5], 1.5, ""),
        ([2.5] * 6 + [2.2, 1.8, 1.5, 1.5], 1.5, "never learned"),  # as bigrams for most of the run
        ([2.5] * 4 + [1.5] * 6, 1.8, "never learned"),  # worse than trigrams on val.bin
        ([2.5] * 4 + [1.8] * 6, 1.5, ""),
        ([2.5] * 4 + [1.5] * 6, math.inf, "diverged"),
    ],
)
def test_a_run_that_never_learns_is_recognised(levels, final, words):
    noise = np.random.default_rng(0).normal(0, 0.2, 100)  # of single batches
    curve = [[step, loss, 1.0] for step, loss in enumerate(np.repeat(levels, 10) + noise)]
    study, run = empty_study("ab"), Run("a", 1.0, 3)
    study.records[run] = record(final, curve)
    assert study.failure(run) == words


# The search, on a loss that is known.


def searched(loss, first=(4e-3, 8e-3), arms="ab"):
    """A study that is complete; loss: run -> its loss or its record."""
    study = empty_study(arms, first, (1, 2))
    while todo := [run for run in study.runs() if run not in study.records]:
        assert study.to_go() >= len(todo)
        end = loss(todo[0])
        study.records[todo[0]] = end if isinstance(end, dict) else record(end)
    assert study.to_go() == 0 and set(study.runs()) == set(study.records)
    return study


def seeds_by_rate(study, arm="a"):
    by_rate = {}
    for run in sorted(study.records):
        if run.arm == arm:
            by_rate.setdefault(run.learning_rate, []).append(run.seed)
    return by_rate


@pytest.mark.parametrize("best", [1e-4, 1e-3, 5.1e-3, 3e-2])
def test_the_best_rate_is_bracketed_in_steps_of_the_root_of_2(best):
    def loss(run):  # a bowl, and divergence far above the best; a seed moves all its runs alike
        off = math.log2(run.learning_rate / best)
        return 1 + 0.1 * off**2 + 0.3 * run.seed if off < 2.5 else math.inf

    by_rate = seeds_by_rate(searched(loss))
    rates = sorted(by_rate)
    (chosen,) = [rate for rate, seeds in by_rate.items() if seeds == [1, 2, 3, 4]]
    assert abs(math.log2(chosen / best)) <= 0.26 and rates[0] < chosen < rates[-1]
    for side in (-1, 1):
        step = rates[rates.index(chosen) + side] / chosen
        assert step == pytest.approx(2 ** (side / 2), rel=0.01)
    assert all(by_rate[rate] == [1, 2] for rate in rates if rate != chosen)


def test_a_rate_at_which_a_run_failed_comes_after_all_others():
    means = {2.83e-3: 1.3, 4e-3: 1.2, 5.66e-3: 1.1, 8e-3: 1.0}
    fails = {(8e-3, 2): record(1.0, [[1, 2.5, 1.0]])}  # as bigrams, 2.3
    study = searched(lambda run: fails.get(run[1:], means[run.learning_rate]), arms="a")
    assert study.search("a")[1] == 5.66e-3
    assert study.failure(Run("a", 8e-3, 2)) == "never learned"


def test_a_rate_stands_once_the_arm_is_measured_and_an_added_arm_changes_no_other_run():
    def loss(run):
        return 1 + 0.1 * math.log2(run.learning_rate / 6e-3) ** 2 + 0.01 * run.seed

    alone, more = searched(loss), empty_study("abc", (4e-3, 8e-3), (1, 2))
    more.records = dict(alone.records)
    assert {run.arm for run in more.runs() if run not in more.records} == {"c"}
    rate = alone.search("a")[1]
    alone.records[Run("a", 8e-3, 1)] = record(0.1)  # as if it had always been the best
    assert alone.search("a")[1] == rate and alone.to_go() == 0
