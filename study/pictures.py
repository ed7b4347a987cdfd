"""The pictures of a study: rates.svg and curves.svg, where matplotlib is installed."""

import statistics
from itertools import cycle

import numpy as np

from utils.files import new_file

COLOURS = ("#000000", "#56B4E9", "#D55E00", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#999999")  # Okabe and Ito's
SMOOTH = 9  # logged steps in the running mean of a training curve


def draw(study):
    """Draw both into the study's folder -> their names; none without matplotlib."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        print("no pictures: they need matplotlib (pip install matplotlib)")
        return []
    matplotlib.rcParams["svg.hashsalt"] = "nlqgpt"  # the same records give the same file, byte for byte
    figures = {"rates": Figure(figsize=(7, 4.5), layout="constrained")}
    figures["curves"] = Figure(figsize=(7, 7), layout="constrained")
    draw_rates(study, figures["rates"].subplots())
    draw_curves(study, *figures["curves"].subplots(2, 1, sharex=True))
    for name, figure in figures.items():
        for axes in figure.axes:
            axes.grid(alpha=0.3)
        if figure.axes[0].get_legend_handles_labels()[0]:
            figure.axes[0].legend(frameon=False, fontsize="small")
        with new_file(study.folder / f"{name}.svg") as f:
            figure.savefig(f, format="svg", metadata={"Date": None})
    return list(figures)


def draw_rates(study, axes):
    """Validation loss against the learning rate, a line an arm."""
    rates, best_losses = set(), []
    for arm, colour in zip(study.arms, cycle(COLOURS)):
        by_rate, best = study.losses_by_rate(arm), study.best_rate(arm)
        means = {rate: statistics.fmean(by_rate[rate]) for rate in sorted(by_rate) if np.isfinite(by_rate[rate]).all()}
        if means:
            axes.plot(list(means), list(means.values()), "o-", color=colour, label=arm)
            axes.plot(best, means[best], "o", color=colour, markersize=12, fillstyle="none")
            best_losses.append(means[best])
            rates |= means.keys()
    axes.set(xscale="log", xlabel="learning rate (ring: the arm's best)", ylabel="validation loss (nats a token)")
    axes.set_xticks(sorted(rates), [f"{rate:g}" for rate in sorted(rates)])
    axes.minorticks_off()
    if best_losses:  # what is far above them leaves the picture
        axes.set_ylim(0.99 * min(best_losses), 1.1 * max(best_losses))


def draw_curves(study, top, bottom):
    """Training loss at each arm's best rate, and below it the difference from the baseline over the same seeds."""
    baseline, late = next(iter(study.arms)), []
    base_curves = study.training_curves(baseline)
    for arm, colour in zip(study.arms, cycle(COLOURS)):
        curves = study.training_curves(arm)
        seeds = [seed for seed in curves if seed in base_curves]
        both = [curves[seed] for seed in seeds] + [base_curves[seed] for seed in seeds]
        steps = [step for step in both[0] if all(step in curve for curve in both)] if both else []
        if steps:
            losses = mean_curve(steps, [curves[seed] for seed in seeds])
            difference = losses - mean_curve(steps, [base_curves[seed] for seed in seeds])
            top.plot(smooth(steps), smooth(losses), color=colour, label=f"{arm}, {study.best_rate(arm):g}")
            bottom.plot(smooth(steps), smooth(difference), color=colour)
            late += list(smooth(difference)[len(steps) // 4 :])
    top.set(ylabel="training loss (nats a token)")
    bottom.set(xlabel=f"step (running mean of {SMOOTH} logged steps, mean over seeds)", ylabel=f"minus {baseline}")
    if late:  # the first steps differ by far more, and leave the picture
        margin = 0.2 * (max(late) - min(late)) or 0.01
        bottom.set_ylim(min(late) - margin, max(late) + margin)


def mean_curve(steps, curves):
    return np.mean([[curve[step] for step in steps] for curve in curves], axis=0)


def smooth(values):
    width = min(SMOOTH, len(values))
    return np.convolve(values, np.ones(width) / width, "valid")
