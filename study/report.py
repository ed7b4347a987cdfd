"""What a study found, as report.md and rates.svg; every number in them is computed from the study's runs.jsonl."""

import itertools
import math
import re
import statistics

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from scipy.stats import sem
from scipy.stats import t as students_t

from utils.checkpoint import RunFolder
from utils.files import new_file

COLOURS = ("#000000", "#56B4E9", "#D55E00", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#999999")  # Okabe and Ito's
TUNED = "The best rate has the lowest mean with the seeds {seeds}, and other seeds measure it."
NOT_TUNED = "The best rate has the lowest mean over the seeds, and the same seeds measure it, which flatters each arm."
NOTE = """Validation loss in nats a token after the last step: mean ± standard deviation over n seeds. \
Differences from {baseline} are paired by seed, since runs of one seed see the same batches (unless the study varies \
the data or the batch); in brackets the 95 % interval of Student's t, not adjusted for the number of arms. Not \
bracketed: no lower or no higher rate was tried. tokens/s: median over the arm's runs, relative to the baseline."""
RATES = "Means, and in brackets the number of seeds; --tune gives more of them to the rates that look best."
ABOUT = """Each: {max_iters} steps, {tokens} tokens of {source}; {n_layer} layers, d {n_embd}, {n_head} heads; {dtype}. \
{device}; torch {torch}; commit {commit}."""


def write(study, command):
    """Write report.md, and rates.svg into the study's folder."""
    left = f", {study.to_go()} or more to go" if study.to_go() else ""
    chosen = TUNED.format(seeds=listed(study.tuning_seeds)) if study.tuning_seeds else NOT_TUNED
    parts = [f"# {study.folder.name}", f"```sh\n{command}\n```"]
    parts.append(f"{len(study.records)} runs{left}. {about([record['config'] for record in study.records.values()])}")
    parts += ["## Each arm at its best rate", main_table(study)]
    parts += [f"{chosen} {NOTE.format(baseline=next(iter(study.arms)))}", seed_table(study)]
    parts += ["## Validation loss at each rate", rate_table(study), RATES, "![rates](rates.svg)"]
    draw(study)
    RunFolder(study.folder).write_text("report.md", "\n\n".join(parts) + "\n")
    print(f"report: {study.folder / 'report.md'}")


def about(configs):
    """What the runs were, from their config.json; where they differ, all values."""
    flat = [{**c["settings"], **c["model"], **c["data"], **c["versions"], **c} for c in configs]
    for c in flat:
        c["tokens"] = c["max_iters"] * c["batch_size"] * c["gradient_accumulation_steps"] * c["block_size"]
        c["commit"] = str(c["commit"])[:9]
    return ABOUT.format(**{key: listed(sorted({c[key] for c in flat})) for key in re.findall(r"{(\w+)}", ABOUT)})


def listed(values):
    return ", ".join(f"{value:,}" if isinstance(value, int) else str(value) for value in values)


def table(header, rows):
    lines = [f"| {' | '.join(cells)} |" for cells in (["arm", *header], *rows)]
    return "\n".join([lines[0], "|---" * (1 + len(header)) + "|", *lines[1:]])


def main_table(study):
    """One row an arm, at its best rate."""
    base, rows, speeds = next(iter(study.arms)), [], {}
    header = ["parameters", "non-embedding", "query path", "best rate", "validation loss"]
    header += [f"log-loss against {base}", f"perplexity against {base}", "tokens/s", "diverged runs"]
    for arm in study.arms:
        records = [record for run, record in study.records.items() if run.arm == arm]
        summaries = [record["summary"] for record in records if record["summary"]]
        counts = records[0]["config"]["parameters"] if records else {}
        row = [arm, *(f"{counts[key]:,}" if counts else "" for key in ("total", "non_embedding", "query_path"))]
        best, rates, losses = study.best_rate(arm), study.losses_by_rate(arm), study.final_losses(arm)
        bracketed = best and min(rates) < best < max(rates)
        row.append(f"{best:g}{'' if bracketed else ', not bracketed'}" if best else "")
        spread = f" ± {statistics.stdev(losses.values()):.4f}" if len(losses) > 1 else ""
        row.append(f"{statistics.fmean(losses.values()):.4f}{spread} (n = {len(losses)})" if losses else "")
        row += differences(losses, study.final_losses(base)) if arm != base else ["", ""]
        speeds[arm] = [s["tokens_per_second"] for s in summaries if s["tokens_per_second"]]  # none in two steps
        row.append(f"{np.median(speeds[arm]) / np.median(speeds[base]):.2f}" if speeds[arm] and speeds[base] else "")
        rows.append([*row, f"{len(records) - len(summaries)} of {len(records)}"])
    return table(header, rows)


def differences(arm, baseline):
    """{seed: loss} of an arm and the baseline -> their mean difference in percent of log-loss and of perplexity."""
    pairs = np.array([(arm[seed], baseline[seed]) for seed in arm if seed in baseline])
    if not len(pairs):
        return ["", ""]
    found, words = pairs[:, 0] - pairs[:, 1], "{:+.2f} %"
    three = np.full(3, found.mean())  # the mean and, from two pairs on, the ends of its interval
    if len(found) > 1:
        words += " [{:+.2f}, {:+.2f}]"
        three[1:] += students_t.interval(0.95, len(found) - 1, scale=sem(found))
    return [words.format(*percent) for percent in (100 * three / pairs[:, 1].mean(), 100 * np.expm1(three))]


def seed_table(study):
    """The validation loss of each measuring seed at the arm's best rate."""
    losses = {arm: study.final_losses(arm) for arm in study.arms}
    rows = [[arm, *(f"{found[s]:.4f}" if s in found else "" for s in study.seeds)] for arm, found in losses.items()]
    return table([f"seed {seed}" for seed in study.seeds], rows)


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
    return table([f"{rate:g}" for rate in rates], rows)


def draw(study):
    """rates.svg: validation loss against the learning rate, a line an arm -> its figure."""
    figure, rates, best_losses = Figure(figsize=(7, 4.5), layout="constrained"), set(), []
    axes = figure.subplots()
    for arm, colour in zip(study.arms, itertools.cycle(COLOURS)):
        by_rate, best = sorted(study.losses_by_rate(arm).items()), study.best_rate(arm)
        means = {rate: statistics.fmean(losses) for rate, losses in by_rate if math.inf not in losses}
        if means:
            axes.plot(list(means), list(means.values()), "o-", color=colour, label=arm)
            axes.plot(best, means[best], "o", color=colour, markersize=12, fillstyle="none")
            best_losses.append(means[best])
            rates |= means.keys()
    axes.set(xscale="log", xlabel="learning rate (ring: the arm's best)", ylabel="validation loss (nats a token)")
    axes.set_xticks(sorted(rates), [f"{rate:g}" for rate in sorted(rates)])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    if best_losses:  # what is far above them leaves the picture
        axes.set_ylim(0.99 * min(best_losses), 1.1 * max(best_losses))
        axes.legend(frameon=False, fontsize="small")
    matplotlib.rcParams["svg.hashsalt"] = "nlqgpt"  # the same records give the same file, byte for byte
    with new_file(study.folder / "rates.svg") as f:
        figure.savefig(f, format="svg", metadata={"Date": None})
    return figure
