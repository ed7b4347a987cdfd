"""Differences against size: python -m study.ladder STUDY STUDY ... --out FOLDER

Each STUDY is the folder of a study of one size, in which every arm has its own best rate. Writes ladder.md and ladder.svg.
"""

import itertools
import math
import sys
from collections import Counter
from pathlib import Path

from study import report, runs
from utils.checkpoint import RunFolder
from utils.settings import Parser, UserError, run_program


def read_options(argv):
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("studies", nargs="+", type=Path, help="folders of studies, one a size")
    parser.add_argument("--out", type=Path, required=True, help="folder for ladder.md and ladder.svg")
    options = parser.parse_args(argv)
    if len({folder.resolve() for folder in options.studies}) < max(2, len(options.studies)):
        parser.error(f"{' '.join(map(str, options.studies))}: a ladder has two studies or more, each named once")
    return options


def sizes(studies):
    """Studies -> (non-embedding parameters of the baseline, tokens a run, its comparisons) of each, smallest first; the
    comparisons are those that more than one study has."""
    found = []
    for study in studies:
        if left := study.to_go():  # before that there are no verdicts
            raise UserError(f"{study.folder} has {left} or more runs to go; finish it first, or leave it out")
        record = next((r for run, r in study.records.items() if run.arm == study.baseline and r["summary"]), None)
        if not record:
            raise UserError(f"{study.folder}: every run of {study.baseline} diverged; leave this study out")
        found.append((record["config"]["parameters"]["non_embedding"], record["summary"]["tokens"], study.compare()))
    pairs = Counter((row.arm, row.other) for _, _, rows in found for row in rows)
    found = [(*size, [row for row in rows if pairs[row.arm, row.other] > 1]) for *size, rows in found]
    return sorted(found, key=lambda size: size[0])


def size_table(found):
    """Without verdicts: they hang on the margin of each study and on what else it compares."""
    rows = [
        [f"{parameters:,}", f"{tokens:,}", f"{row.arm} against {row.other}", report.interval(*row[2:5])]
        for parameters, tokens, comparisons in found
        for row in comparisons
    ]
    return report.table(["non-embedding parameters", "tokens", "comparison", "log-loss"], rows)


def draw(found, folder):
    """ladder.svg: each comparison's difference and its 95 % interval against the size -> its figure."""
    figure = report.Figure(figsize=(7, 4.2), layout="constrained")
    judged = [(n, row) for n, _, rows in found for row in rows if math.isfinite(row.low)]
    axes, pairs = figure.subplots(), dict.fromkeys((row.arm, row.other) for _, row in judged)
    for number, ((arm, other), colour) in enumerate(zip(pairs, itertools.cycle(report.COLOURS))):
        points = [(n, row) for n, row in judged if (row.arm, row.other) == (arm, other)]
        x = [n * 1.04 ** (number - len(pairs) / 2) for n, _ in points]  # side by side
        y, half = [row.mean for _, row in points], [row.high - row.mean for _, row in points]
        axes.errorbar(x, y, half, fmt="o-", color=colour, capsize=3, lw=0.9, label=f"{arm} against {other}")
    axes.axhline(0, color="#555555", lw=0.8)
    axes.set(xscale="log", xlabel="non-embedding parameters", ylabel="difference of loss (%), lower is better")
    axes.legend(frameon=False, fontsize="small")
    axes.grid(alpha=0.2)
    report.save(figure, folder / "ladder.svg")
    return figure


def main(argv=None):
    options = read_options(sys.argv[1:] if argv is None else argv)
    found = sizes([runs.load(folder) for folder in options.studies])
    options.out.mkdir(parents=True, exist_ok=True)
    draw(found, options.out)
    RunFolder(options.out).write_text("ladder.md", f"{size_table(found)}\n\n![Difference against size](ladder.svg)\n")
    print(f"ladder: {options.out / 'ladder.md'}")


if __name__ == "__main__":
    run_program(main)
