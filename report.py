"""What ablate.py found, from the records of the runs: report.md, and two pictures where matplotlib is installed.

Every number is computed from the runs' summary.json, config.json and metrics.jsonl.
"""

import math
import statistics
from dataclasses import dataclass

import numpy as np

from files import new_file
from run_folder import RunFolder

COLOURS = ("#000000", "#56B4E9", "#D55E00", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#999999")  # Okabe and Ito's
NEEDED = ("settings", "model", "data", "device", "versions", "commit")  # of config.json
SMOOTH = 9  # points in the running mean of a training curve


@dataclass
class Arm:
    """What is known of an arm so far."""

    name: str
    parameters: dict  # total, non_embedding, query_path; empty before the first run
    by_rate: dict  # learning rate -> validation losses with the seeds that choose; inf: diverged
    losses: dict  # seed that measures -> validation loss at the best rate, where it did not diverge
    folders: dict  # the same seeds -> RunFolder
    speeds: list  # training tokens/s of each run
    runs: int
    diverged: int

    @property
    def best_rate(self):
        """The one with the lowest mean loss; None where there is none that never diverged."""
        means = {rate: statistics.fmean(losses) for rate, losses in self.by_rate.items()}
        best = min(means, key=means.get, default=None)
        return best if means and math.isfinite(means[best]) else None

    @property
    def bracketed(self):
        """Whether a lower and a higher rate were tried and found worse."""
        return self.best_rate is not None and min(self.by_rate) < self.best_rate < max(self.by_rate)


def summarise(study, outcomes):
    """The arms of a study, the baseline first. outcomes: {cell: loss, inf where it diverged}."""
    arms = []
    for name in study.arms:
        cells = [cell for cell in study.cells(outcomes) if cell.arm == name and cell in outcomes]
        arm = Arm(name, {}, {}, {}, {}, [], len(cells), sum(math.isinf(outcomes[cell]) for cell in cells))
        for cell in cells:
            if cell.seed in (study.tuning_seeds or study.seeds):
                arm.by_rate.setdefault(cell.learning_rate, []).append(outcomes[cell])
            arm.parameters = study.run_folder(cell).read_json("config.json", "parameters")["parameters"]
        if not study.tuning_seeds:  # a rate that some seeds have not reached yet cannot be compared
            arm.by_rate = {rate: ls for rate, ls in arm.by_rate.items() if len(ls) == len(study.seeds)}
        for cell in cells:
            if math.isfinite(outcomes[cell]):
                folder = study.run_folder(cell)
                speed = folder.read_json("summary.json", "tokens_per_second")["tokens_per_second"]
                arm.speeds += [speed] * bool(speed)  # a run of two steps has none
                if cell.learning_rate == arm.best_rate and cell.seed in study.seeds:
                    arm.losses[cell.seed], arm.folders[cell.seed] = outcomes[cell], folder
        arms.append(arm)
    return arms


@dataclass
class Difference:
    """Loss of an arm minus that of the baseline, over the n seeds that both have."""

    mean: float
    half: float  # of the 95 % interval: mean - half to mean + half; nan with one seed
    baseline: float  # mean loss of the baseline over the same seeds
    n: int

    def log_loss_percent(self):
        return [100 * value / self.baseline for value in (self.mean, self.mean - self.half, self.mean + self.half)]

    def perplexity_percent(self):
        return [100 * math.expm1(value) for value in (self.mean, self.mean - self.half, self.mean + self.half)]


def paired_difference(losses, baseline):
    """{seed: loss} of an arm and of the baseline -> Difference, by Student's t over the seeds; None without pairs."""
    seeds = [seed for seed in losses if seed in baseline]
    if not seeds:
        return None
    differences, n = [losses[seed] - baseline[seed] for seed in seeds], len(seeds)
    half = t_quantile(n - 1) * statistics.stdev(differences) / math.sqrt(n) if n > 1 else math.nan
    return Difference(statistics.fmean(differences), half, statistics.fmean(baseline[seed] for seed in seeds), n)


def t_quantile(freedom):
    """97.5 % quantile of Student's t: for t = sqrt(freedom) tan(a) the density of a is that of cos(a)^(freedom - 1)."""
    a = np.linspace(0, math.pi / 2, 20_001)
    density = np.cos(a) ** (freedom - 1)
    area = np.cumsum((density[1:] + density[:-1]) / 2)  # trapezoids, up to a factor
    return math.sqrt(freedom) * math.tan(np.interp(0.95 * area[-1], area, a[1:]))


# ---------------------------------------------------------------------------------------------------
# The tables.


def main_table(arms):
    """One row an arm."""
    base = arms[0]
    rows = [
        f"| arm | parameters | non-embedding | query path | best rate | validation loss | log-loss against {base.name} "
        f"| perplexity against {base.name} | tokens/s | diverged runs |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for arm in arms:
        counts = [
            f"{arm.parameters[key]:,}" if arm.parameters else "" for key in ("total", "non_embedding", "query_path")
        ]
        speed = statistics.median(arm.speeds) / statistics.median(base.speeds) if arm.speeds and base.speeds else None
        difference = paired_difference(arm.losses, base.losses) if arm is not base else None
        row = [arm.name, *counts, rate_words(arm), mean_and_spread(arm.losses.values())]
        row += (
            [interval(difference.log_loss_percent()), interval(difference.perplexity_percent())]
            if difference
            else ["", ""]
        )
        row += [f"{speed:.2f}" if speed else "", f"{arm.diverged} of {arm.runs}"]
        rows.append(f"| {' | '.join(row)} |")
    return "\n".join(rows)


def rate_words(arm):
    if arm.best_rate is None:
        return ""
    return f"{arm.best_rate:g}" + ("" if arm.bracketed else ", not bracketed")


def mean_and_spread(losses):
    losses = list(losses)
    if not losses:
        return ""
    spread = f" ± {statistics.stdev(losses):.4f}" if len(losses) > 1 else ""
    return f"{statistics.fmean(losses):.4f}{spread} (n = {len(losses)})"


def interval(values):
    """mean, low, high in percent -> text"""
    mean, low, high = values
    return f"{mean:+.2f} %" + ("" if math.isnan(low) else f" [{low:+.2f}, {high:+.2f}]")


def rate_table(arms):
    """The mean validation loss of each arm at each rate, and over how many seeds."""
    rates = sorted({rate for arm in arms for rate in arm.by_rate})
    rows = [f"| arm | {' | '.join(f'{rate:g}' for rate in rates)} |", "|---" * (len(rates) + 1) + "|"]
    for arm in arms:
        cells = []
        for rate in rates:
            losses = arm.by_rate.get(rate, [])
            text = f"{mean_words(losses)} ({len(losses)})" if losses else ""
            cells.append(f"**{text}**" if rate == arm.best_rate else text)
        rows.append(f"| {arm.name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def mean_words(losses):
    mean = statistics.fmean(losses)
    return f"{mean:.4f}" if math.isfinite(mean) else f"{sum(map(math.isinf, losses))} diverged"


def seed_table(arms):
    """The validation loss of each measuring seed at the arm's best rate."""
    seeds = sorted({seed for arm in arms for seed in arm.losses})
    rows = [f"| arm | {' | '.join(f'seed {seed}' for seed in seeds)} |", "|---" * (len(seeds) + 1) + "|"]
    for arm in arms:
        losses = [f"{arm.losses[seed]:.4f}" if seed in arm.losses else "" for seed in seeds]
        rows.append(f"| {arm.name} | {' | '.join(losses)} |")
    return "\n".join(rows)


# ---------------------------------------------------------------------------------------------------
# The pictures.


def draw_rates(plt, arms, path):
    """Validation loss against the learning rate, a line an arm."""
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    shown = []
    for number, arm in enumerate(arms):
        means = {rate: statistics.fmean(losses) for rate, losses in sorted(arm.by_rate.items())}
        points = [(rate, mean) for rate, mean in means.items() if math.isfinite(mean)]
        if points:
            axes.plot(*zip(*points), "o-", color=f"C{number}", label=arm.name, markersize=4)
            axes.plot(arm.best_rate, means[arm.best_rate], "o", color=f"C{number}", markersize=10, fillstyle="none")
            shown += [mean for _, mean in points]
    rates = sorted({rate for arm in arms for rate in arm.by_rate})
    axes.set(xscale="log", xlabel="learning rate (ring: the arm's best)", ylabel="validation loss (nats a token)")
    axes.set_xticks(rates, [f"{rate:g}" for rate in rates])
    axes.minorticks_off()
    if shown:  # what is far above the best leaves the picture
        low, high = min(shown), min(max(shown), 1.1 * min(shown))
        axes.set_ylim(low - 0.05 * (high - low) - 1e-3, high + 0.05 * (high - low) + 1e-3)
    finish(plt, figure, axes, path)


def draw_curves(plt, arms, path):
    """Training loss at each arm's best rate, and below it the difference from the baseline, seed by seed."""
    figure, (top, bottom) = plt.subplots(2, 1, figsize=(7, 7), sharex=True, layout="constrained")
    curves = [{seed: train_curve(folder) for seed, folder in arm.folders.items()} for arm in arms]
    late = []
    for number, (arm, curve) in enumerate(zip(arms, curves)):
        shared = [seed for seed in curve if seed in curves[0]]
        differences = [subtract(curve[seed], curves[0][seed]) for seed in shared]
        if not differences or not all(differences):
            continue
        top.plot(*mean_curve([curve[s] for s in shared]), color=f"C{number}", label=f"{arm.name}, {arm.best_rate:g}")
        steps, values = mean_curve(differences)
        bottom.plot(steps, values, color=f"C{number}")
        late += list(values[len(values) // 4 :])  # the first steps differ by far more than the last
    top.set(ylabel="training loss (nats a token)")
    bottom.set(xlabel=f"step (running mean of {SMOOTH} logged steps, mean over seeds)", ylabel=f"minus {arms[0].name}")
    if late:
        margin = 0.2 * (max(late) - min(late)) or 0.01
        bottom.set_ylim(min(late) - margin, max(late) + margin)
    finish(plt, figure, top, path)


def train_curve(run):
    """{step: training loss} as it was logged."""
    return {values["step"]: values["train_loss"] for values in run.metrics() if "train_loss" in values}


def subtract(curve, other):
    return {step: loss - other[step] for step, loss in curve.items() if step in other}


def mean_curve(curves):
    """Several {step: value} -> steps and running means of the mean over those that all have."""
    steps = [step for step in curves[0] if all(step in curve for curve in curves)]
    values = np.array([statistics.fmean(curve[step] for curve in curves) for step in steps])
    width = min(SMOOTH, len(values))
    smooth = np.convolve(values, np.ones(width) / width, "valid")
    return np.convolve(steps, np.ones(width) / width, "valid"), smooth


def finish(plt, figure, axes, path):
    for each in figure.axes:
        each.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False, fontsize="small")
    with new_file(path) as f:
        figure.savefig(f, format="svg", metadata={"Date": None})  # the same records give the same file
    plt.close(figure)


# ---------------------------------------------------------------------------------------------------
# The report.


def write(study, outcomes):
    """Write report.md and, where matplotlib is installed, rates.svg and curves.svg into the study's folder."""
    arms, folder = summarise(study, outcomes), RunFolder(study.folder)
    pictures = draw(arms, study.folder)
    folder.write_text("report.md", report(study, outcomes, arms, pictures))
    print(f"report: {study.folder / 'report.md'}")


def draw(arms, folder):
    """Draw what there is to draw -> names of the files."""
    try:
        import matplotlib
    except ImportError:
        print("no pictures: they need matplotlib (pip install matplotlib)")
        return []
    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "nlqgpt"  # ids in the files, the same each time
    import matplotlib.pyplot as plt

    matplotlib.rcParams["axes.prop_cycle"] = plt.cycler(color=COLOURS)
    draw_rates(plt, arms, folder / "rates.svg")
    draw_curves(plt, arms, folder / "curves.svg")
    return ["rates.svg", "curves.svg"]


def report(study, outcomes, arms, pictures):
    """The text of report.md."""
    records = [study.run_folder(cell).read_json("config.json", *NEEDED) for cell in outcomes]
    to_go, tuned = study.to_go(outcomes), bool(study.tuning_seeds)
    chosen = (
        f"The best rate has the lowest mean with the seeds {listed(study.tuning_seeds)}, and other seeds measure it."
        if tuned
        else "The best rate has the lowest mean over the seeds, and the same seeds measure it, which flatters each arm."
    )
    parts = [
        f"# {study.folder.name}",
        f"```sh\n{RunFolder(study.folder).read_json('study.json', 'command')['command']}\n```",
        f"{len(outcomes)} runs{f', {to_go} or more to go' * bool(to_go)}. {about(records)}",
        "## Each arm at its best rate",
        main_table(arms),
        f"{chosen} Validation loss in nats a token after the last step: mean ± standard deviation over n seeds. "
        f"Differences from {arms[0].name} are paired by seed, since runs of one seed see the same batches (unless the "
        "study varies the data or the batch); in brackets the 95 % interval of Student's t, not adjusted for the "
        "number of arms. A best rate is not bracketed where no lower or no higher one was tried. tokens/s: median "
        "over the arm's runs, relative to the baseline.",
        seed_table(arms),
        "## Validation loss at each rate",
        rate_table(arms),
        "Means, and in brackets the number of seeds." + " More of them went to the rates that looked best." * tuned,
        *(f"![{name.removesuffix('.svg')}]({name})" for name in pictures),
    ]
    return "\n\n".join(parts) + "\n"


def about(records):
    """What the runs were, where they differ all of it."""

    def each(value):
        return listed(sorted({value(record) for record in records}))

    def tokens(record):
        s = record["settings"]
        return s["max_iters"] * s["batch_size"] * s["gradient_accumulation_steps"] * record["model"]["block_size"]

    shape = "{} layers, d {}, {} heads".format(
        *(each(lambda record: record["model"][key]) for key in ("n_layer", "n_embd", "n_head"))
    )
    return (
        f"Each: {each(lambda r: r['settings']['max_iters'])} steps, {each(tokens)} tokens of "
        f"{each(lambda r: r['data']['source'])}; {shape}; {each(lambda r: r['settings']['dtype'])}. "
        f"{each(lambda r: r['device'])}; torch {each(lambda r: r['versions']['torch'])}; "
        f"commit {each(lambda r: str(r['commit'])[:9])}."
    )


def listed(values):
    return ", ".join(f"{value:,}" if isinstance(value, int) else str(value) for value in values)
