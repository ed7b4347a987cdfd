"""study/: the statistics, the n-gram counts and the search for rates, against scipy, definitions and known truth."""

import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

stats = pytest.importorskip("study.stats", reason="needs scipy")
scipy_stats = pytest.importorskip("scipy.stats")

import train  # noqa: E402
from prepare_data import Dataset  # noqa: E402
from study import plan  # noqa: E402
from study.ngrams import ngram_losses  # noqa: E402
from study.plan import Run, Study  # noqa: E402


def record(loss, curve=((1, 1.0, 1.0),)):
    return {"config": {}, "curve": list(curve), "summary": {"final_val_loss": loss} if math.isfinite(loss) else None}


def empty_study(arms, rates=(1.0,), tuning=(), seeds=(3, 4), **more):
    """A study of arms by name, each compared with the first."""
    arms = list(arms)
    rest = dict(comparisons=[[arm, arms[0]] for arm in arms[1:]], margin=0.5, half_width=None, spread=0.5)
    rest |= dict(folder=Path("r"), devices=["cpu"], ngrams={2: 2.3, 3: 1.7, 5: 1.4}) | more
    return Study("c.py", {arm: {} for arm in arms}, list(rates), list(tuning), list(seeds), **rest)


def test_comparisons_added_later_ask_for_no_more_seeds():
    study, rng = empty_study("abc", seeds=range(12), half_width=1.0, planned=1, ngrams={}), np.random.default_rng(0)
    for arm, sd in zip("abc", (0.001, 0.001, 1.0)):
        study.records.update({Run(arm, 1.0, seed): record(2 + rng.normal(0, sd)) for seed in range(12)})
    assert len(study.measuring_seeds()) == 6
    study.planned = None
    assert len(study.measuring_seeds()) == 12


# Differences and verdicts.


def draws(seeds, spreads, seed_spread=0.0):
    """{arm: {seed: loss}}, each with a mean near 2; a seed moves all arms alike."""
    rng = np.random.default_rng(0)
    shared = rng.normal(0, seed_spread, len(seeds))
    own = {f"arm{i}": rng.normal(2 + i / 100, sd, len(seeds)) for i, sd in enumerate(spreads)}
    return {arm: dict(zip(seeds, losses + shared)) for arm, losses in own.items()}


@pytest.mark.parametrize("spreads", [[0.01, 0.01], [0.001, 0.1]])
def test_arms_are_compared_by_a_regression_on_arm_and_seed(spreads):
    """The least-squares fit of loss = arm + seed, for the runs of the two arms."""
    losses = draws(range(3, 9), spreads, seed_spread=0.05)
    (row,) = stats.compare(losses, [("arm1", "arm0")], margin=0.5)
    y = np.array([*losses["arm0"].values(), *losses["arm1"].values()])
    design = np.hstack([np.repeat([[0.0], [1.0]], 6, axis=0), np.tile(np.eye(6), (2, 1))])
    effects, (squares,), *_ = np.linalg.lstsq(design, y, rcond=None)
    error = math.sqrt(squares / (12 - 7) * np.linalg.inv(design.T @ design)[0, 0])
    expected = [effects[0], *scipy_stats.t.interval(0.95, 5, effects[0], error)]
    assert row.nats == pytest.approx(expected, rel=1e-9)
    assert row.p == pytest.approx(2 * scipy_stats.t.sf(abs(effects[0]) / error, 5), rel=1e-9)
    assert row[2:5] == pytest.approx(100 * np.array(expected) / y[:6].mean(), rel=1e-9)


def test_holm_by_a_published_example():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([]) == [] and stats.holm([0.7, math.nan, 0.9]) == pytest.approx([1, math.nan, 1], nan_ok=True)


def test_a_comparison_that_is_added_later_leaves_the_others_as_they_are():
    losses, pairs = draws(range(6), [0.01] * 5), [(f"arm{i}", "arm0") for i in range(1, 5)]
    before, after = stats.compare(losses, pairs[:3], 0.5), stats.compare(losses, pairs, 0.5, planned=3)
    p = [stats.difference(losses[arm], losses["arm0"])[3] for arm, _ in pairs]
    assert before == after[:3] and before[1].p == min(1, max(2 * min(p[1:3]), p[1]))
    assert after[3].p == stats.holm(p[1:])[2] >= p[3]


@pytest.mark.parametrize(
    "low, high, p, words",
    [
        (-0.9, -0.1, 0.01, "better"),
        (-0.4, -0.1, 0.01, "better, by less than the margin"),
        (0.1, 0.9, 0.01, "worse"),
        (0.1, 0.9, 0.06, "not distinguishable after Holm's correction"),
        (-0.4, 0.3, 0.6, "equivalent within the margin"),
        # differences deviate by 0.6 √6 / 2.5706 = 0.5717: t's quantile of 16 seeds is 2.1314, ± 0.3047;
        # of 17 seeds 2.1199, ± 0.2940, which is below 0.6 * 0.5
        (-0.6, 0.6, 0.6, "not distinguishable (if they are equal, about 17 seeds show it within ± 0.5 %)"),
        (math.nan, math.nan, math.nan, "too few runs"),
    ],
)
def test_the_verdict_in_words(low, high, p, words):
    assert stats.verdict((low + high) / 2, low, high, p, 0.5, 6) == words


def test_no_verdict_rests_on_a_run_that_failed():
    losses = {"a": {3: 2.0, 4: 2.01, 5: 2.03}, "b": {3: 1.0, 4: 1.02, 5: 1.01}, "c": {3: 2.0, 5: 2.01}}
    rows = stats.compare(losses, [("b", "a"), ("c", "a"), ("b", "c")], 0.5, {"a": 0, "b": 0, "c": 1})
    assert [row.verdict for row in rows] == ["better", *["not judged: 1 runs of c failed"] * 2]
    assert not np.isfinite([rows[1][2:6], rows[2][2:6]]).any()


def test_how_many_seeds_a_width_takes():
    for width in (0.4, 1e-3):  # the latter takes two million, and no patience
        n = stats.seeds_for(0.5, width)
        assert stats.half_width(0.5, n) <= width < stats.half_width(0.5, n - 1)


# Known truth: 7 arms, 6 seeds that may become 12.

ARMS, PAIRS = [f"arm{i}" for i in range(7)], [["arm1", "arm0"], ["arm2", "arm0"], ["arm3", "arm1"], ["arm4", "arm2"]]


def simulate(truth, half_width, studies=1000, spreads=0.01, seed_spread=0.0):
    """Studies of normally distributed losses around the truth -> rows of all studies, (studies, pairs), and the seeds used."""
    rng, rows, used, seeds = np.random.default_rng(1), [], [], list(range(12))
    for _ in range(studies):
        study = empty_study(ARMS, seeds=seeds, half_width=half_width, comparisons=PAIRS, ngrams={})
        losses = rng.normal(np.reshape(truth, (7, 1)), np.reshape(spreads, (-1, 1)), (7, 12))
        losses += rng.normal(0, seed_spread, 12) if seed_spread else 0.0
        for arm, of_arm in zip(ARMS, losses):
            study.records.update({Run(arm, 1.0, seed): record(of_arm[seed]) for seed in seeds})
        study.seeds, study.half_width = study.measuring_seeds(), None  # decided once, which is faster
        rows.append(study.compare())
        used.append(len(study.seeds))
    return rows, used


@pytest.mark.parametrize("half_width", [None, 0.7])
@pytest.mark.parametrize("spreads, seed_spread", [(0.01, 0.0), ([0.01, 0.02] + [0.01] * 5, 0.02)])
def test_intervals_cover_the_truth_in_95_of_100_studies(half_width, spreads, seed_spread):
    """With all seeds, and where the width decides how many; also where an arm is twice as noisy and seeds differ."""
    truth = np.array([2, 2.02, 2, 1.95, 2.01, 2, 2.3])
    rows, used = simulate(truth, half_width, spreads=spreads, seed_spread=seed_spread)
    covered = []
    for of_study in rows:
        for row in of_study:
            difference = truth[ARMS.index(row.arm)] - truth[ARMS.index(row.other)]
            covered.append(row.nats[1] < difference < row.nats[2])
    assert 0.94 <= np.mean(covered) <= 0.96
    assert set(used) == {12} if half_width is None else len(set(used)) > 2


def test_a_difference_that_is_not_there_is_found_in_5_of_100_studies():
    rows, _ = simulate(np.full(7, 2.0), None)
    found = np.array([[row.p < stats.LEVEL for row in of_study] for of_study in rows])
    assert 0.03 <= found[:, 0].mean() <= 0.07 and found[:, 1:].any(axis=1).mean() <= 0.07


def test_a_difference_of_the_planned_size_is_found_in_4_of_5_studies():
    truth = np.full(7, 2.0)
    truth[1] += stats.detectable(0.01, 12)
    rows, _ = simulate(truth, None)
    assert 0.76 <= np.mean([row[0].verdict.startswith("worse") for row in rows]) <= 0.84


def test_equal_arms_are_called_equivalent_in_4_of_5_studies_of_the_planned_size():
    margin = 2 * empty_study("ab").margin / 100  # in nats
    sd = next(sd for sd in np.arange(0.02, 0, -1e-4) if stats.half_width(sd, 12) <= stats.TIGHT * margin)
    rows, _ = simulate(np.full(7, 2.0), None, spreads=sd)
    words = [row.verdict for of_study in rows for row in of_study]
    assert 0.76 <= words.count("equivalent within the margin") / len(words) <= 0.84


# The width decides how many seeds measure, and nothing else does.


@pytest.mark.parametrize("half_width, seeds", [(None, 12), (10, 6), (0.01, 12)])
@pytest.mark.parametrize("shift", [0, 0.3])
def test_seeds_come_in_pairs_to_all_arms_until_the_intervals_are_narrow(half_width, seeds, shift):
    study = empty_study("ab", seeds=range(12), half_width=half_width, ngrams={})
    rng, asked = np.random.default_rng(0), []
    while todo := [run for run in study.runs() if run not in study.records]:
        study.records[todo[0]] = record(rng.normal(2 + shift * (todo[0].arm == "b"), 0.01))
        asked.append(len(study.measuring_seeds()))
    assert len(study.records) == 2 * seeds and study.to_go() == 0
    assert sorted(set(asked)) == ([12] if half_width is None else list(range(6, seeds + 1, 2)))


# What counting reaches.


def slow_ngrams(counted, val, vocab_size):
    """Witten and Bell's rule, recursively, as it is written down; counted and val: (token, those near it, nearest first)."""
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


@pytest.mark.parametrize("objective, around", [("next", (-1, -2, -3, -4)), ("masked", (-1, 1, -2, 2))])
def test_ngram_losses_are_those_of_the_rule(objective, around, tiny_data):
    """Over the tokens of the run's windows and over what an evaluation predicts, gathered one by one."""
    data, recipe = Dataset("tiny", 16), {"batch_size": 2, "gradient_accumulation_steps": 2, "max_iters": 30, "seed": 3}
    settings = train.Settings("tiny", objective=objective, eval_tokens=170, mask_share=0.2, **recipe)

    def examples(split, offsets, length, *key):
        """Of each token in each window: the token, what is seen near it, whether it is hidden."""
        holes = train.get_holes(data, settings, offsets, *key)
        for number, offset in enumerate(offsets.tolist()):
            window = dict(enumerate(data.tokens(split)[offset : offset + length].tolist()))
            hidden = {i: "mask" for i in window if holes is not None and holes[number, i]}
            seen = {**window, **hidden}
            for i, token in window.items():
                yield token, tuple(seen.get(i + o, "edge") for o in around), i in hidden

    counted, length = [], 17 if objective == "next" else 16
    for step in range(30):
        counted += examples("train", train.get_offsets(data, 3, step, 4), length, 3, "holes", step)
    if objective == "next":
        val = list(examples("val", np.array([0]), 171, "validation"))[1:]
    else:
        val = examples("val", np.arange(0, 160, 16), 16, "validation")
        counted, val = ([example for example in part if example[2]] for part in (counted, val))
    assert len(val) == (170 if objective == "next" else 10 * 3)
    found, expected = ngram_losses(data, settings), {}
    for n in range(1, 6):
        expected[n] = slow_ngrams(*([(t, h[: n - 1]) for t, h, _ in part] for part in (counted, val)), 18)
    assert found == pytest.approx(expected, rel=1e-12)
    assert found[3] < found[1] - 0.5  # two tokens tell the third


# Runs that fail.


@pytest.mark.parametrize(
    "levels, final, words",
    [
        ([2.5] * 4 + [2.0, 1.8, 1.6, 1.5, 1.5, 1.5], 1.5, ""),
        ([2.5] * 6 + [2.2, 1.8, 1.5, 1.5], 1.5, "never learned"),  # as bigrams for most of the run
        ([2.5] * 4 + [1.5] * 6, 1.8, "never learned"),  # never as good as trigrams, which are counted in val.bin, too
        ([2.5] * 4 + [1.8] * 6, 1.5, ""),
        ([2.5] * 4 + [1.5] * 6, math.inf, "diverged"),
    ],
)
def test_a_run_that_never_learns_is_told(levels, final, words):
    noise = np.random.default_rng(0).normal(0, 0.2, 100)  # of single batches: only the smoothed loss counts
    curve = [[step, loss, 1.0] for step, loss in enumerate(np.repeat(levels, 10) + noise)]
    study, run = empty_study("ab"), Run("a", 1.0, 3)
    study.records[run] = record(final, curve)
    assert study.failure(run) == words


@pytest.mark.parametrize(
    "counts, words",
    [
        ({4: 1.6, 5: 1.4}, "above the 5-grams ended b by 0.1000."),
        ({4: 1.25, 5: 1.4}, "above the 4-grams ended a by 0.0500, b by 0.2500."),
        ({4: 1.6, 5: 1.55}, "Every arm ended below the 5-grams."),
    ],
)
def test_arms_that_are_no_better_than_the_best_counts_are_told(counts, words):
    report = pytest.importorskip("study.report", reason="needs matplotlib")
    study = empty_study("ab", ngrams={1: 3.0, 2: 2.3, 3: 1.7} | counts)
    for arm, seed, loss in (("a", 3, 1.2), ("a", 4, 1.4), ("b", 3, 1.5), ("b", 4, 1.5)):
        study.records[Run(arm, 1.0, seed)] = record(loss)
    lines = report.lines(study)
    assert lines.endswith(words) and ("too short to conclude" in lines) == words.startswith("above")
    study.planned = 0  # what is added later cannot undo a verdict
    assert "too short to conclude" not in report.lines(study)


# The search, on a loss that is known.


def searched(loss, first=(4e-3, 8e-3), arms="ab", **more):
    """Run the search where the record of a run is known -> Study."""
    study = empty_study(arms, first, (1, 2), **more)
    while todo := [run for run in study.runs() if run not in study.records]:
        assert study.to_go() >= len(todo)
        found = loss(todo[0])
        study.records[todo[0]] = found if isinstance(found, dict) else record(found)
    assert study.to_go() == 0 and set(study.runs()) == set(study.records)
    return study


def seeds_by_rate(study, arm="a"):
    found = {}
    for run in sorted(study.records):
        if run.arm == arm:
            found.setdefault(run.learning_rate, []).append(run.seed)
    return found


@pytest.mark.parametrize("best", [1e-4, 1e-3, 5.1e-3, 3e-2])
def test_the_best_rate_is_bracketed_in_steps_of_the_root_of_2(best):
    def loss(run):  # a bowl, and divergence far above the best
        off = math.log2(run.learning_rate / best)
        return 1 + 0.1 * off**2 if off < 2.5 else math.inf

    found = seeds_by_rate(searched(loss))
    rates = sorted(found)
    (chosen,) = [rate for rate, seeds in found.items() if seeds[-2:] == [3, 4]]
    assert abs(math.log2(chosen / best)) <= 0.26 and rates[0] < chosen < rates[-1]
    for side in (-1, 1):
        assert rates[rates.index(chosen) + side] / chosen == pytest.approx(2 ** (side / 2), rel=0.01)
    assert found[chosen] == [1, 2, 3, 4] and all(seeds in ([1], [1, 2]) for r, seeds in found.items() if r != chosen)


def test_two_rates_that_noise_cannot_tell_both_get_all_tuning_seeds():
    means = {2.83e-3: 1.2, 4e-3: 1.1, 5.66e-3: 1.004, 8e-3: 1.0, 1.13e-2: 1.1}
    luck = {(8e-3, 2): 0.03}  # the second seed turns them round
    study = searched(lambda run: means[run.learning_rate] + luck.get(run[1:], 0), arms="a")
    expected = {4e-3: [1], 5.66e-3: [1, 2, 3, 4], 8e-3: [1, 2], 1.13e-2: [1]}
    assert seeds_by_rate(study) == expected and study.usable_rates("a") == [5.66e-3]
    study = searched(lambda run: means[run.learning_rate] + luck.get(run[1:], 0), arms="a", spread=0.1)
    assert study.search("a")[1] == 8e-3 and seeds_by_rate(study)[5.66e-3] == [1]


@pytest.mark.parametrize("shift", [-0.1, 0.1])
def test_what_a_seed_does_to_all_runs_decides_no_rate(shift):
    means = {4e-3: 1.1, 5.66e-3: 1.005, 8e-3: 1.0, 1.13e-2: 1.02}
    study = searched(lambda run: means[run.learning_rate] + shift * (run.seed == 2), arms="a")
    assert seeds_by_rate(study) == {4e-3: [1], 5.66e-3: [1, 2], 8e-3: [1, 2, 3, 4], 1.13e-2: [1]}
    assert study.usable_rates("a") == [5.66e-3, 8e-3]


def test_a_rate_at_which_a_run_failed_comes_after_all_others():
    """The lowest mean does not help it; and its failure is in the table."""
    means = {4e-3: 1.2, 5.66e-3: 1.1, 8e-3: 1.0, 1.13e-2: 1.05, 1.6e-2: 1.3}
    fails = {(8e-3, 2): record(1.0, [[1, 2.5, 1.0]])}  # as bigrams, 2.3
    study = searched(lambda run: fails.get(run[1:], means[run.learning_rate]), arms="a")
    assert study.search("a")[1] == 1.13e-2 and study.usable_rates("a") == [1.13e-2]
    assert study.failure(Run("a", 8e-3, 2)) == "never learned"


def test_the_search_gives_up_and_one_rate_needs_none():
    study = searched(lambda run: -run.learning_rate, first=[1.0], arms="a")  # never turns
    assert len(study.tuning_runs("a")) == plan.MOST_RATES
    study = empty_study("ab", rates=[0.1])
    assert study.runs() == [Run("a", 0.1, 3), Run("b", 0.1, 3), Run("a", 0.1, 4), Run("b", 0.1, 4)]


def test_an_arm_that_is_added_leaves_all_other_runs_as_they_are():
    loss = lambda run: 1 + 0.1 * math.log2(run.learning_rate / 6e-3) ** 2 + 0.01 * run.seed  # noqa: E731
    alone, more = searched(loss, arms="ab"), empty_study("abc", (4e-3, 8e-3), (1, 2))
    more.records = dict(alone.records)
    assert {run.arm for run in more.runs() if run not in more.records} == {"c"}
