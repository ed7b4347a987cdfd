"""report.md and its pictures arms.svg and rates.svg, computed from the records of a study."""

import math
import sys

import numpy as np

try:
    import matplotlib
    from matplotlib.figure import Figure
    from scipy.stats import t  # noqa: F401, study/stats.py needs it
except ImportError as e:
    sys.exit(f"{e}; a study needs scipy and matplotlib: pip install scipy matplotlib")

from utils.checkpoint import RunFolder
from utils.files import new_file

COLOURS = ("#000000", "#56B4E9", "#D55E00", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#999999")
NOTE = """\
A difference is in percent of the second arm's loss, and negative if the first arm's is lower. In
brackets is its 95 % interval, by the paired t test over the measuring seeds. The interval does not
contain the error of choosing the rates, and is not corrected for the number of comparisons.

Losses are in nats a token after the last step: mean ± standard deviation over the measuring seeds,
without failed runs. A run failed if it diverged or never learned: it ended above the trigram
counts, or was above the bigram counts for most of its steps."""


def write(study, command):
    """Write report.md, arms.svg and rates.svg into the study's folder."""
    draw_arms(study)
    draw_rates(study)
    parts = [
        f"# {study.folder.name}",
        f"```sh\n{command}\n```",
        about(study),
        comparison_table(study),
        ngram_lines(study),
        arm_table(study),
        NOTE,
        "![The difference of each arm from the first one, with a mark for each seed](arms.svg)",
        "![The loss of each run against its learning rate](rates.svg)",
    ]
    RunFolder(study.folder).write_text("report.md", "\n\n".join(parts) + "\n")
    print(f"report: {study.folder / 'report.md'}")


def about(study):
    """How many runs there are, on which data, and where they ran."""
    configs = [record["config"] for record in study.records.values()]
    data = {config["data"]["source"] for config in configs}
    machines = {f"{config['device']}, torch {config['versions']['torch']}" for config in configs}
    lines = f"{len(configs)} runs of {study.config}, {study.to_go()} to go. "
    lines += f"Tuning seeds: {study.tuning_seeds}; measuring seeds: {study.seeds}. "
    return f"{lines}{'; '.join(sorted(data) + sorted(machines))}."


def table(header, rows):
    rows = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def comparison_table(study):
    rows = []
    for row in study.compare(study.comparisons):
        difference = f"{row.mean:+.2f} % [{row.low:+.2f}, {row.high:+.2f}]"
        known = difference if math.isfinite(row.mean) else ""
        rows.append([f"{row.arm} against {row.other}", known, row.verdict])
    if not rows:
        return "A comparison follows when all its runs are done."
    return table(["comparison", "difference of the loss", "verdict"], rows)


def learned(study, arm):
    """The losses of the measuring runs of an arm that did not fail."""
    losses = study.losses(arm)
    return losses[np.isfinite(losses)]


def arm_table(study):
    header = ["arm", "rate", "validation loss (n)", "failed"]
    header += ["non-embedding parameters", "in queries"]
    rows = []
    for arm in study.arms:
        measured = study.measured(arm)
        if not measured:
            continue
        losses = learned(study, arm)
        spread = f" ± {losses.std(ddof=1):.4f}" if len(losses) > 1 else ""
        loss = f"{losses.mean():.4f}{spread} ({len(losses)})" if len(losses) else ""
        failed = [bool(study.failure(run)) for run in study.records if run.arm == arm]
        sizes = study.records[measured[0]]["config"]["parameters"]
        row = [arm, f"{measured[0].learning_rate:g}", loss, f"{sum(failed)} of {len(failed)}"]
        rows.append([*row, f"{sizes['non_embedding']:,}", f"{sizes['query_path']:,}"])
    return table(header, rows)


def ngram_lines(study):
    """What n-gram counts reach, and which arms are not better than the best of them."""
    if not study.ngrams:
        return "No n-grams were counted, so runs that never learned were not looked for."
    counts = ", ".join(f"{n}-grams {loss:.4f}" for n, loss in study.ngrams.items() if n > 1)
    lines = f"Counting the same tokens reaches: {counts} (interpolated after Witten and Bell)."
    best = min(study.ngrams.values())
    losses = {arm: learned(study, arm) for arm in study.arms}
    above = [arm for arm in losses if len(losses[arm]) and losses[arm].mean() > best]
    if above:
        lines += f" **Too short to conclude:** {', '.join(above)} ended above the best counts."
    return lines


def draw_arms(study):
    """arms.svg: the differences from the first arm, the lowest on top -> its figure."""
    base, *others = study.arms
    rows = study.compare([(arm, base) for arm in others])
    rows = sorted((row for row in rows if math.isfinite(row.mean)), key=lambda row: -row.mean)
    figure = Figure(figsize=(7.5, 1 + 0.3 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for y, row in enumerate(rows):
        losses = study.losses(row.arm), study.losses(base)
        percent = 100 * (losses[0] - losses[1]) / losses[1].mean()
        axes.plot(percent, [y] * len(percent), "|", color=COLOURS[4])
        axes.errorbar(row.mean, y, xerr=row.high - row.mean, fmt="s", ms=4, color=COLOURS[0])
    axes.axvline(0, color="#555555", lw=0.8)
    axes.set_yticks(range(len(rows)), [row.arm for row in rows])
    axes.set_xlabel(f"validation loss, difference from {base} (%)")
    save(figure, study.folder / "arms.svg")
    return figure


def draw_rates(study):
    """rates.svg: the loss of each run against its rate, crossed out if it failed -> its figure."""
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes = figure.subplots()
    lowest = []  # of each arm
    for number, arm in enumerate(study.arms):
        runs = [run for run in study.records if run.arm == arm and math.isfinite(study.loss(run))]
        shift = 1.25 ** (number / len(study.arms) - 0.5)  # so that the arms stand side by side
        rates = [run.learning_rate * shift for run in runs]
        losses = [study.loss(run) for run in runs]
        marker = "sD^v"[number // len(COLOURS) % 4]
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(rates, losses, marker, color=colour, ms=4, alpha=0.7, label=arm)
        crossed = [bool(study.failure(run)) for run in runs]
        axes.plot(np.compress(crossed, rates), np.compress(crossed, losses), "kx", ms=8)
        lowest += [min(losses)] if losses else []
    if lowest:  # runs far above them leave the picture
        axes.set_ylim(0.99 * min(lowest), 1.12 * max(lowest))
    low, high = axes.get_ylim()
    for n in [n for n, loss in study.ngrams.items() if low < loss < high]:
        axes.axhline(study.ngrams[n], color="#555555", ls="--", lw=0.8)
        at = {"xy": (0.01, study.ngrams[n]), "xycoords": ("axes fraction", "data")}
        axes.annotate(f"{n}-gram counts", va="bottom", **at)
    rates = sorted({run.learning_rate for run in study.records})
    axes.set(xscale="log", xlabel="learning rate", ylabel="validation loss (nats a token)")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    axes.legend(fontsize="small", ncols=2)
    save(figure, study.folder / "rates.svg")
    return figure


def save(figure, path):
    """Write an SVG file with plain text; the same figure gives the same bytes."""
    matplotlib.rcParams["svg.hashsalt"] = "nlqgpt"
    matplotlib.rcParams["svg.fonttype"] = "none"
    with new_file(path) as f:
        figure.savefig(f, format="svg", metadata={"Date": None})
