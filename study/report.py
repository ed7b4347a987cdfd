"""What a study found, as report.md; every number in it is computed from the study's runs.jsonl and study.json."""

import math
import statistics

import numpy as np

from study.pictures import draw
from utils.checkpoint import RunFolder

try:
    from scipy.stats import t as students_t
except ImportError:
    students_t = None  # the report does without intervals

NOTE = """{chosen} Validation loss in nats a token after the last step: mean ± standard deviation over n seeds. \
Differences from {baseline} are paired by seed, since runs of one seed see the same batches (unless the study varies \
the data or the batch); {interval}. A best rate is not bracketed where no lower or no higher one was tried. tokens/s: \
median over the arm's runs, relative to the baseline."""
TUNED = "The best rate has the lowest mean with the seeds {seeds}, and other seeds measure it."
NOT_TUNED = "The best rate has the lowest mean over the seeds, and the same seeds measure it, which flatters each arm."
RACED = " More of them went to the rates that looked best."
INTERVAL = "in brackets the 95 % interval of Student's t, not adjusted for the number of arms"
NO_INTERVAL = "their 95 % intervals are left out, since scipy was not installed"


def write(study):
    """Write report.md, and the pictures that can be drawn, into the study's folder."""
    folder, tuned = RunFolder(study.folder), bool(study.tuning_seeds)
    left = f", {study.to_go()} or more to go" if study.to_go() else ""
    chosen = TUNED.format(seeds=listed(study.tuning_seeds)) if tuned else NOT_TUNED
    if students_t is None:
        print("no 95 % intervals: they need scipy (pip install scipy)")
    parts = [
        f"# {study.folder.name}",
        f"```sh\n{folder.read_json('study.json', 'command')['command']}\n```",
        f"{len(study.records)} runs{left}. {about([record['config'] for record in study.records.values()])}",
        "## Each arm at its best rate",
        main_table(study),
        NOTE.format(chosen=chosen, baseline=next(iter(study.arms)), interval=INTERVAL if students_t else NO_INTERVAL),
        seed_table(study),
        "## Validation loss at each rate",
        rate_table(study),
        "Means, and in brackets the number of seeds." + (RACED if tuned else ""),
        *(f"![{name}]({name}.svg)" for name in draw(study)),
    ]
    folder.write_text("report.md", "\n\n".join(parts) + "\n")
    print(f"report: {study.folder / 'report.md'}")


def about(configs):
    """What the runs were, from their config.json; where they differ, all values."""
    flat = [{**c["settings"], **c["model"], **c["data"], **c["versions"], **c} for c in configs]
    for c in flat:
        c["tokens"] = c["max_iters"] * c["batch_size"] * c["gradient_accumulation_steps"] * c["block_size"]
        c["commit"] = str(c["commit"])[:9]

    def each(key):
        return listed(sorted({c[key] for c in flat}))

    return (
        f"Each: {each('max_iters')} steps, {each('tokens')} tokens of {each('source')}; {each('n_layer')} layers, "
        f"d {each('n_embd')}, {each('n_head')} heads; {each('dtype')}. {each('device')}; torch {each('torch')}; "
        f"commit {each('commit')}."
    )


def listed(values):
    return ", ".join(f"{value:,}" if isinstance(value, int) else str(value) for value in values)


def table(header, rows):
    lines = [f"| {' | '.join(cells)} |" for cells in (header, *rows)]
    return "\n".join([lines[0], "|---" * len(header) + "|", *lines[1:]])


def main_table(study):
    """One row an arm, at its best rate."""
    base, rows, speeds = next(iter(study.arms)), [], {}
    header = ["arm", "parameters", "non-embedding", "query path", "best rate", "validation loss"]
    header += [f"log-loss against {base}", f"perplexity against {base}", "tokens/s", "diverged runs"]
    for arm in study.arms:
        records = [record for run, record in study.records.items() if run.arm == arm]
        summaries = [record["summary"] for record in records if record["summary"]]
        counts = records[0]["config"]["parameters"] if records else {}
        row = [arm, *(f"{counts[key]:,}" if counts else "" for key in ("total", "non_embedding", "query_path"))]
        losses = study.final_losses(arm)
        row += [rate_words(study, arm), loss_words(list(losses.values()))]
        row += difference_words(paired_difference(losses, study.final_losses(base)) if arm != base else None)
        speeds[arm] = [s["tokens_per_second"] for s in summaries if s["tokens_per_second"]]  # none in two steps
        row.append(f"{np.median(speeds[arm]) / np.median(speeds[base]):.2f}" if speeds[arm] and speeds[base] else "")
        rows.append([*row, f"{len(records) - len(summaries)} of {len(records)}"])
    return table(header, rows)


def rate_words(study, arm):
    best, rates = study.best_rate(arm), study.losses_by_rate(arm)
    if best is None:
        return ""
    return f"{best:g}" if min(rates) < best < max(rates) else f"{best:g}, not bracketed"


def loss_words(values):
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.4f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.4f}{spread} (n = {len(values)})"


def paired_difference(arm, baseline):
    """{seed: loss} of an arm and of the baseline -> mean difference over the seeds of both, half the width of its
    95 % interval by Student's t (nan where unknown), and the baseline's mean loss. None without such seeds."""
    pairs = [(arm[seed], baseline[seed]) for seed in arm if seed in baseline]
    if not pairs:
        return None
    own, base = np.transpose(pairs)
    differences, n, half = own - base, len(pairs), math.nan
    if students_t and n > 1:  # one difference alone does not tell how much they vary
        half = students_t.ppf(0.975, n - 1) * differences.std(ddof=1) / math.sqrt(n)
    return differences.mean(), half, base.mean()


def difference_words(difference):
    """What paired_difference found, in percent of the log-loss and of the perplexity, which is exp(log-loss)."""
    if difference is None:
        return ["", ""]
    mean, half, baseline = difference
    three = np.array([mean, mean - half, mean + half])
    words = "{:+.2f} %" if math.isnan(half) else "{:+.2f} % [{:+.2f}, {:+.2f}]"
    return [words.format(*percent) for percent in (100 * three / baseline, 100 * np.expm1(three))]


def rate_table(study):
    """The mean validation loss of each arm at each rate, and over how many of the seeds that choose the rate."""
    rates, rows = sorted({rate for arm in study.arms for rate in study.losses_by_rate(arm)}), []
    for arm in study.arms:
        cells, best = dict.fromkeys(rates, ""), study.best_rate(arm)
        for rate, found in study.losses_by_rate(arm).items():
            diverged = sum(math.isinf(loss) for loss in found)
            words = f"{diverged} diverged" if diverged else f"{statistics.fmean(found):.4f}"
            cells[rate] = f"**{words} ({len(found)})**" if rate == best else f"{words} ({len(found)})"
        rows.append([arm, *cells.values()])
    return table(["arm", *(f"{rate:g}" for rate in rates)], rows)


def seed_table(study):
    """The validation loss of each measuring seed at the arm's best rate."""
    losses = {arm: study.final_losses(arm) for arm in study.arms}
    rows = [[arm, *(f"{found[s]:.4f}" if s in found else "" for s in study.seeds)] for arm, found in losses.items()]
    return table(["arm", *(f"seed {seed}" for seed in study.seeds)], rows)
