"""report.md and its pictures arms.svg and rates.svg, computed from the records of a study."""

import math

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from utils.checkpoint import RunFolder
from utils.files import new_file

# An SVG file has plain text, and the same figure gives the same bytes.
matplotlib.rcParams.update({"svg.hashsalt": "nlqgpt", "svg.fonttype": "none"})
NOTE = """\
Differences are in percent of the second arm's loss. In brackets are their 95 % intervals, by the
paired t test over the measuring seeds, without the error of choosing the rates, and not corrected
for the number of comparisons.

Losses are in nats a token after the last step: mean ± standard deviation over the measuring seeds,
without failed runs. A run failed if it diverged or never learned: it ended above the trigram
counts, or was above the bigram counts for most of its steps."""


def write(study, command):
    """Write report.md, arms.svg and rates.svg into the study's folder."""
    for name, figure in (("arms.svg", draw_arms(study)), ("rates.svg", draw_rates(study))):
        with new_file(study.folder / name) as f:
            figure.savefig(f, format="svg", metadata={"Date": None})
    runs = f"{len(study.records)} runs of {study.config}, {study.to_go()} to go."
    parts = [
        f"# {study.folder.name}",
        f"```sh\n{command}\n```",
        f"{runs} Tuning seeds: {study.tuning_seeds}; measuring seeds: {study.seeds}.",
        comparison_table(study),
        ngram_line(study),
        arm_table(study),
        NOTE,
        "![The difference of each arm from the first one, with a mark for each seed](arms.svg)",
        "![The loss of each run against its learning rate](rates.svg)",
    ]
    RunFolder(study.folder).write_text("report.md", "\n\n".join(parts) + "\n")
    print(f"report: {study.folder / 'report.md'}")


def table(header, rows):
    rows = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def comparison_table(study):
    """The comparisons whose runs are all done."""
    rows = []
    for row in study.compare(study.comparisons):
        difference = f"{row.mean:+.2f} % [{row.low:+.2f}, {row.high:+.2f}]"
        known = difference if math.isfinite(row.mean) else ""
        rows.append([f"{row.arm} against {row.other}", known, row.verdict])
    return table(["comparison", "difference of the loss", "verdict"], rows)


def arm_table(study):
    """The losses of the arms that have been measured."""
    rows = []
    for arm in filter(study.measured, study.arms):
        first = study.measured(arm)[0]
        losses = study.losses(arm)
        losses = losses[np.isfinite(losses)]
        spread = f" ± {losses.std(ddof=1):.4f}" if len(losses) > 1 else ""
        loss = f"{losses.mean():.4f}{spread} ({len(losses)})" if len(losses) else ""
        failed = [bool(study.failure(run)) for run in study.records if run.arm == arm]
        sizes = study.records[first]["config"]["parameters"]
        row = [arm, f"{first.learning_rate:g}", loss, f"{sum(failed)} of {len(failed)}"]
        rows.append([*row, f"{sizes['non_embedding']:,}", f"{sizes['query_path']:,}"])
    header = ["arm", "rate", "validation loss (n)", "failed"]
    return table([*header, "non-embedding parameters", "in queries"], rows)


def ngram_line(study):
    """The losses that n-gram counts reach."""
    if not study.ngrams:
        return "No n-grams were counted, so runs that never learned were not looked for."
    counts = ", ".join(f"{n}-grams {loss:.4f}" for n, loss in study.ngrams.items() if n > 1)
    return f"Counting the same tokens reaches: {counts} (interpolated after Witten and Bell)."


def draw_arms(study):
    """arms.svg: the differences from the first arm, the lowest on top -> its figure."""
    base, *others = study.arms
    rows = study.compare([(arm, base) for arm in others])
    rows = sorted((row for row in rows if math.isfinite(row.mean)), key=lambda row: -row.mean)
    figure = Figure(figsize=(7.5, 1 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(rows):
        losses = study.losses(base)
        percent = 100 * (study.losses(row.arm) - losses) / losses.mean()
        axes.plot(percent, [y] * len(percent), "|", color="#0072B2")
        axes.errorbar(row.mean, y, xerr=row.high - row.mean, fmt="s", ms=4, color="black")
    axes.axvline(0, color="#555555", lw=0.8)
    axes.set_yticks(range(len(rows)), [row.arm for row in rows])
    axes.set_xlabel(f"validation loss, difference from {base} (%)")
    return figure


def draw_rates(study):
    """rates.svg: the loss of each run against its rate, crossed out if it failed -> its figure."""
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    for number, arm in enumerate(study.arms):
        runs = [run for run in study.records if run.arm == arm and math.isfinite(study.loss(run))]
        shift = 1.25 ** (number / len(study.arms) - 0.5)  # so that the arms stand side by side
        rates = [run.learning_rate * shift for run in runs]
        losses = [study.loss(run) for run in runs]
        axes.plot(rates, losses, "sD^v"[number % 4], ms=4, alpha=0.7, label=arm)
        crossed = [bool(study.failure(run)) for run in runs]
        axes.plot(np.compress(crossed, rates), np.compress(crossed, losses), "kx", ms=8)
    low, high = axes.get_ylim()
    for n, loss in study.ngrams.items():
        if low < loss < high:
            dashes = (0, (2 * n, 2))
            axes.axhline(loss, color="#555555", ls=dashes, lw=0.8, label=f"{n}-gram counts")
    rates = sorted({run.learning_rate for run in study.records})
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation loss (nats a token)")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.legend(fontsize="small", ncols=2)
    return figure
