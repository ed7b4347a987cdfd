"""What a study found, as report.md and its pictures; every number in them is computed from the study's records."""

import itertools
import math
import re
import sys

import numpy as np
import torch

from model import GPT, GPTConfig

try:
    import matplotlib
    from matplotlib.figure import Figure

    from study import stats
except ImportError as e:
    if e.name.partition(".")[0] not in ("scipy", "matplotlib"):
        raise
    sys.exit("a study needs scipy and matplotlib: pip install scipy matplotlib")

from study.plan import final_loss
from utils.checkpoint import RunFolder
from utils.device import flops_per_token
from utils.files import new_file

COLOURS = ("#000000", "#56B4E9", "#D55E00", "#E69F00", "#0072B2", "#009E73", "#CC79A7", "#999999")  # Okabe and Ito's
ABOUT = """Each: {max_iters} steps, {tokens} tokens of {source}; {n_layer} layers, d {n_embd}, {n_head} heads; {dtype}. \
{device}; torch {torch}; commit {commit}."""
PLAN = """Primary comparison: {primary}. Secondary: {secondary}.{later} Margin of equivalence: ± {margin:g} %. {tuning}; \
{measuring}. Expected standard deviation of a run, without \
what its seed does to all arms: {spread:g} %, so that {n} seeds find a primary difference of {found:.2f} % in four of five studies.{measured}"""
NOTE = """{loss} in nats a token after the last step: mean ± standard deviation over the measuring seeds, without runs that \
failed: that diverged{failed}. Differences are in percent of the other arm's loss, lower is better. Usable rates: \
within 1 % of the best one's loss over the tuning seeds that both have. MFLOP: of a training step, per token. tokens/s: \
measured apart, in turns, relative to {baseline}. Clipped: the share of the logged steps whose gradient \
was larger than grad_clip, the mean over the measuring seeds and the largest. In the picture of the arms a dot is a seed, the \
bar the mean, the line the interval."""
RATES = "With the first tuning seed, and further ones where it could not decide; the best rate is bold."
VERDICTS = """In brackets is the 95 % interval, by the paired t test over the seeds: for each arm at the best rate that was \
tried, and for this data; it does not contain the error of choosing a rate. p is of no difference, for the secondary \
comparisons Holm's; better or worse: p < 0.05. Equivalent: the interval lies within the margin. Intervals and equivalence \
are not corrected for the number of comparisons. No verdict rests on a run that failed."""


def write(study, command):
    """Write report.md and its pictures, rates.svg and arms.svg, into the study's folder."""
    left = f", {study.to_go()} or more to go" if study.to_go() else ""
    parts = [f"# {study.folder.name}", f"```sh\n{command}\n```"]
    parts.append(f"{len(study.records)} runs{left}. {about([record['config'] for record in study.records.values()])}")
    parts += ["## The plan", plan(study), "## The verdicts", verdict_table(study), lines(study), VERDICTS]
    parts += ["## Each arm at its best rate", arm_table(study), note(study)]
    if len(study.arms) > 1:
        parts.append(f"![Each arm's difference from {study.baseline}, every seed a dot](arms.svg)")
        draw_arms(study)
    parts += [f"![{loss_name(study)} against the learning rate, every run a dot](rates.svg)", rate_table(study)]
    parts += [RATES if study.tuning_seeds else "", seed_table(study)]
    draw_rates(study)
    RunFolder(study.folder).write_text("report.md", "\n\n".join(filter(None, parts)) + "\n")
    print(f"report: {study.folder / 'report.md'}")


def about(configs):
    """What the runs were, from their config.json; where they differ, all values."""
    flat = [{**c["settings"], **c["model"], **c["data"], **c["versions"], **c} for c in configs]
    for c in flat:
        c["tokens"] = c["max_iters"] * c["batch_size"] * c["gradient_accumulation_steps"] * c["block_size"]
        commit, dirty, _ = str(c["commit"]).partition("-dirty")
        c["commit"] = commit[:9] + dirty
    return ABOUT.format(**{key: listed(sorted({c[key] for c in flat})) for key in re.findall(r"{(\w+)}", ABOUT)})


def listed(values):
    return ", ".join(f"{value:,}" if isinstance(value, int) else str(value) for value in values)


def table(header, rows):
    rows = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows).replace("| --- ", "|---").replace("--- |", "---|")


def plan(study):
    """What was to be compared, and how, in words."""
    n, planned = len(study.measuring_seeds()), len(study.comparisons) if study.planned is None else study.planned
    pairs = [f"{arm} against {other}" for arm, other in study.comparisons]
    later = listed(pairs[planned:])
    rates = ", ".join(f"{rate:g}" for rate in study.learning_rates)
    tuning = f"All arms have the rate {rates}"
    if study.tuning_seeds:
        tuning = f"The seeds {listed(study.tuning_seeds)} look for each arm's rate, from {rates} on in steps of √2"
    measuring = f"{listed(study.measuring_seeds())} measure there"
    if study.half_width:
        measuring += f", at most {len(study.seeds)} until each interval is at most ± {study.half_width:g} %"
    return PLAN.format(
        primary=pairs[0] if planned else "none",
        secondary=listed(pairs[1:planned]) or "none",
        later=f" Added when runs that measure were known, and so exploratory: {later}." if later else "",
        margin=study.margin,
        tuning=tuning,
        measuring=measuring,
        spread=study.spread,
        n=n,
        found=stats.detectable(study.spread, n) if n > 1 else math.inf,
        measured=measured_spread(study.compare(), n),
    )


def measured_spread(comparisons, n):
    """The standard deviation of a run that the paired differences of n seeds show, in words."""
    found = [stats.noise(row.low, row.high, n) for row in comparisons if math.isfinite(row.low)]
    return f" The paired differences show {min(found):.1f} to {max(found):.1f} %." if found else ""


def interval(mean, low, high):
    return f"{mean:+.2f} % [{low:+.2f}, {high:+.2f}]" if math.isfinite(low) else ""


def verdict_table(study):
    """A row for each comparison."""
    rows = []
    for row in study.compare():
        perplexity = interval(*(100 * math.expm1(x) for x in row.nats))
        p = "< 0.001" if row.p < 0.001 else f"{row.p:.3f}"
        rows.append([f"{row.arm} against {row.other}", interval(*row[2:5]), perplexity, p, row.verdict])
    if not rows:
        return "None before all planned runs are done."
    return table(["comparison", "log-loss", "perplexity", "p", "verdict"], rows)


def arm_table(study):
    """A row for each arm, at its best rate."""
    base, rows = study.baseline, []
    folder = RunFolder(study.folder)
    speeds = folder.read_json("speed.json") if folder.holds("speed.json") else {}
    measured = study.measured()
    losses = study.losses(measured)
    compared = {(row.arm, row.other): interval(*row[2:5]) for row in study.compare()}
    for arm in study.arms:
        of_arm = [run for run in study.records if run.arm == arm]
        if not of_arm:
            continue
        found, usable, best = [*losses[arm].values()], study.usable_rates(arm), study.search(arm)[1]
        row = [arm, f"{best:g}" if best else "?", ", ".join(f"{rate:g}" for rate in usable) or "none"]
        spread = f" ± {np.std(found, ddof=1):.4f}" if len(found) > 1 else ""
        row.append(f"{np.mean(found):.4f}{spread} ({len(found)})" if found else "")
        row.append(compared.get((arm, base), ""))
        others = [f"{words} against {b}" for (a, b), words in compared.items() if words and a == arm and b != base]
        row.append(", ".join(others))
        row.append(f"{sum(bool(study.failure(run)) for run in of_arm)} of {len(of_arm)}")
        shares = [100 * clipped(study.records[run]) for run in measured[arm]]
        row.append(f"{np.mean(shares):.0f} %, {max(shares):.0f} %" if shares else "")
        config = study.records[of_arm[0]]["config"]
        with torch.device("meta"):
            flops = flops_per_token(GPT(GPTConfig(**config["model"])))
        row += [f"{config['parameters'][key]:,}" for key in ("non_embedding", "query_path")] + [f"{flops / 1e6:.2f}"]
        rows.append([*row, f"{speeds[arm] / speeds[base]:.2f}" if {arm, base} <= speeds.keys() else ""])
    header = ["arm", "best rate", "usable rates", f"{loss_name(study).lower()} (n)", f"against {base}"]
    header += ["against others", "failed", "clipped", "non-embedding parameters", "query path", "MFLOP", "tokens/s"]
    return table(header, rows)


def clipped(record):
    """The share of a run's logged steps whose gradient was clipped."""
    limit = record["config"]["settings"]["grad_clip"] or math.inf
    return np.mean([norm is None or norm > limit for *_, norm in record["curve"]])  # None: infinite


def note(study):
    failed = " or never learned" if study.ngrams else " (whether they learned was not checked)"
    return NOTE.format(loss=loss_name(study), failed=failed, baseline=study.baseline)


def loss_name(study):
    objectives = {record["config"]["settings"].get("objective", "next") for record in study.records.values()}
    return "Masked-token loss" if objectives == {"masked"} else "Validation loss"


def lines(study):
    """The losses of n-gram counts, and what they say of the study."""
    if not study.ngrams:
        return ""
    counts = ", ".join(f"{n}-grams {loss:.4f}" for n, loss in study.ngrams.items() if n > 1)
    words = f"Counting the same tokens reaches: {counts} (interpolated after Witten and Bell)."
    losses = study.losses(study.measured())
    best = min(study.ngrams, key=study.ngrams.get)
    off = {arm: np.mean([*found.values()]) - study.ngrams[best] for arm, found in losses.items() if found}
    above = {arm: f"{arm} by {nats:.4f}" for arm, nats in off.items() if nats > 0}
    if above:
        ended = f"above the {best}-grams ended {', '.join(above.values())}."
        planned = {arm for pair in study.comparisons[: study.planned] for arm in pair}
        short = "The study is too short to conclude, whatever its verdicts say"
        return f"{words} **{short}**: {ended}" if planned & above.keys() else f"{words} Of exploratory arms {ended}"
    return f"{words} Every arm ended below the {best}-grams." if off else words


def seed_table(study):
    """The loss of each measuring seed at the arm's best rate."""
    seeds, rows = study.measuring_seeds(), []
    for arm, runs in study.measured().items():
        cells = dict.fromkeys(seeds, "")
        for run in runs:
            cells[run.seed] = told(study, run)
        rows.append([arm, *cells.values()])
    return table(["arm", *(f"seed {seed}" for seed in seeds)], rows)


def told(study, run):
    return f"{final_loss(study.records[run]):.4f} {study.failure(run)}".strip()


def rate_table(study):
    """The losses of each arm at each rate, with its tuning seeds."""
    by_arm = {arm: study.tuning_runs(arm) for arm in study.arms}
    rates, rows = sorted({rate for by_rate in by_arm.values() for rate in by_rate}), []
    for arm, by_rate in by_arm.items():
        cells, best = dict.fromkeys(rates, ""), study.search(arm)[1]
        for rate, runs in by_rate.items():
            words = ", ".join(told(study, runs[seed]) for seed in study.tuning_seeds if seed in runs)
            cells[rate] = f"**{words}**" if rate == best else words
        rows.append([arm, *cells.values()])
    return table(["arm", *(f"{rate:g}" for rate in rates)], rows) if rates else ""


def draw_rates(study):
    """rates.svg: validation loss against the learning rate, every run a dot, those of the first tuning seed joined -> its
    figure."""
    figure = Figure(figsize=(7.5, 5), layout="constrained")
    axes, best_losses, rates = figure.subplots(), [], set()
    losses = study.losses(study.measured())
    for number, (arm, colour) in enumerate(zip(study.arms, itertools.cycle(COLOURS))):
        marker = "os^D"[number // len(COLOURS) % 4]
        dodge = 1.035 ** (number - (len(study.arms) - 1) / 2)  # so that the arms' dots stand side by side
        runs = [run for run in study.records if run.arm == arm and math.isfinite(final_loss(study.records[run]))]
        for run in runs:
            style = {"fillstyle": "none"} if study.failure(run) else {"markeredgecolor": "none"}
            style |= {"ms": 5, "alpha": 0.9} if run.seed in study.seeds else {"ms": 3.5, "alpha": 0.6}
            axes.plot(run.learning_rate * dodge, final_loss(study.records[run]), marker, c=colour, **style)
        by_rate = sorted(study.tuning_runs(arm).items())
        first = {rate: study.mean_loss(runs, study.tuning_seeds[:1]) for rate, runs in by_rate}
        first = {rate: loss for rate, loss in first.items() if math.isfinite(loss)}
        if first or runs:
            axes.plot([rate * dodge for rate in first], first.values(), "-", color=colour, lw=0.8, alpha=0.7)
            axes.plot([], [], f"{marker}-", color=colour, label=arm)
            best_losses.append(min(final_loss(study.records[run]) for run in runs))
            rates |= {run.learning_rate for run in runs}
    base = [*losses[study.baseline].values()]
    if len(base) > 1:
        mean, sd = np.mean(base), np.std(base, ddof=1)
        words = f"{study.baseline}: mean ± standard deviation"
        axes.axhspan(mean - sd, mean + sd, color="#000000", alpha=0.08, lw=0, label=words)
    if best_losses:  # what is far above them leaves the picture
        low, high = 0.99 * min(best_losses), 1.12 * max(best_losses)
        axes.set_ylim(low, high)
        for n, loss in study.ngrams.items():
            if low < loss < high:
                axes.axhline(loss, color="#555555", ls="--", lw=0.8)
                at = {"xycoords": ("axes fraction", "data"), "ha": "right", "va": "bottom"}
                axes.annotate(f"{n}-gram counts", (0.995, loss), size=8, **at)
        axes.legend(framealpha=1, edgecolor="none", fontsize="small", ncols=2)
    axes.set(xscale="log", xlabel="learning rate", ylabel=f"{loss_name(study).lower()} (nats a token)")
    axes.set_xticks(sorted(rates), [f"{rate:g}" for rate in sorted(rates)])
    axes.minorticks_off()
    axes.grid(alpha=0.2)
    save(figure, study.folder / "rates.svg")
    return figure


def draw_arms(study):
    """arms.svg: the difference of each arm's measuring runs from the baseline's of the same seeds, every seed a dot, the lowest
    mean on top; and the interval where the two are compared -> its figure."""
    losses, base = study.losses(study.measured()), study.baseline
    mean = np.mean([*losses[base].values()] or [1.0])
    found = {}
    for arm in study.arms:
        shared = losses[arm].keys() & losses[base].keys()
        if shared and arm != base:
            found[arm] = [100 * (losses[arm][seed] - losses[base][seed]) / mean for seed in sorted(shared)]
    arms = sorted(found, key=lambda arm: -np.mean(found[arm]))
    intervals = {row.arm: row for row in study.compare() if row.other == base}
    figure = Figure(figsize=(7.5, 0.9 + 0.3 * len(arms)), layout="constrained")
    axes = figure.subplots()
    for y, arm in enumerate(arms):
        axes.plot(found[arm], [y] * len(found[arm]), "o", c=COLOURS[4], ms=4, alpha=0.6, markeredgecolor="none")
        axes.plot(np.mean(found[arm]), y, "|", c="#000000", ms=11, mew=1.6)
        if arm in intervals:
            axes.hlines(y, intervals[arm].low, intervals[arm].high, color="#000000", lw=0.8)
    axes.axvline(0, color="#555555", lw=0.8)
    axes.set_yticks(range(len(arms)), arms)
    axes.set(ylim=(-0.6, len(arms) - 0.4), xlabel=f"{loss_name(study).lower()}, difference from {base} (%)")
    axes.grid(alpha=0.2)
    save(figure, study.folder / "arms.svg")
    return figure


def save(figure, path):
    """Write an SVG file; the same figure gives the same file, byte for byte."""
    matplotlib.rcParams["svg.hashsalt"] = "nlqgpt"
    with new_file(path) as f:
        figure.savefig(f, format="svg", metadata={"Date": None})
