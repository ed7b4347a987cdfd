"""Compare arms, each at its own best learning rate.

    python -m study.ablate CONFIG [--arm=A,B,...] [--key=v1,v2,...] [options]
    python -m study.ablate @PLAN     PLAN is a file that holds such arguments

Without --arm, each combination of the keys is an arm; the first arm is the baseline. The tuning
seeds try the given rates and more in steps of sqrt(2), until an arm's best rate lies between two
others. Then the seeds of --seed measure it there. After an interruption the same command continues.
"""

import itertools
import shlex
import statistics
import sys
from datetime import timedelta
from pathlib import Path

from model import QUERIES, GPTConfig
from study import report, runs
from study.plan import Study
from study.queries import CANDIDATES, register
from train import Settings
from utils.checkpoint import RunFolder
from utils.files import locked
from utils.settings import Parser, UserError, read_command, run_program

NOT_FOR_A_GRID = {"out_dir", "resume", "eval_only", "device"}


def named_arms(d):
    """What each named arm sets, for a model of width d. Add your own in one line."""
    return {mode: {"query_mode": mode} for mode in QUERIES | CANDIDATES} | {
        # The d² parameters of W_Q are in the MLP, so this arm is as large as linear.
        "identity_mlp": {"query_mode": "identity", "mlp_hidden": 9 * d // 2},
        "nonlinear_no_gelu": {"query_mode": "nonlinear", "query_activation": "none"},
        # This arm has 12.5 % more non-embedding parameters than linear.
        "linear_wide": {"query_mode": "linear", "mlp_hidden": 19 * d // 4},
    }


def read_options(argv):
    """Command line -> Study, other options."""
    parser = Parser(description=__doc__, fromfile_prefix_chars="@")
    # A plan file has the quotes and comments of a shell script.
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)
    add = parser.add_argument
    add("config", help="config file of train.py that all runs start from")
    add("--arm", help=f"arms by name: {', '.join(named_arms(0))}")
    add("--compare", help="A:B,C:D,... compares A with B, C with D; default: all with the first")
    add("--tune", metavar="SEEDS", default="1,2", help="default: 1,2; empty: all arms at one rate")
    add("--devices", help="one run at a time on each: cuda:0,cuda:1 or cpu,cpu; default: one")
    add("--out", type=Path, help="the study's folder; default: study/results/NAME_OF_CONFIG")
    add("--dry-run", action="store_true", help="list the runs, and start none")
    try:
        options, rest = parser.parse_known_args(argv)
    except ValueError as e:  # a plan file with an open quote, or one that is no text
        parser.error(f"{' '.join(word for word in argv if word.startswith('@'))}: {e}")
    axes = read_axes(rest)
    settings, _ = read_command([options.config], Settings, GPTConfig)
    rates = axes.pop("learning_rate", [settings.learning_rate])
    seeds = axes.pop("seed", [3, 4, 5, 6, 7, 8])
    tuning_seeds = options.tune.split(",") if options.tune else []
    arms = make_arms(options, axes)
    study = Study(
        config=options.config,
        arms=arms,
        learning_rates=sorted(read_values(options.config, "learning_rate", rates)),
        tuning_seeds=read_values(options.config, "seed", tuning_seeds),
        seeds=read_values(options.config, "seed", seeds),
        comparisons=read_pairs(options.compare, list(arms)),
        folder=options.out or Path("study/results") / Path(options.config).stem,
        devices=options.devices.split(",") if options.devices else [settings.device],
    )
    if set(study.seeds) & set(study.tuning_seeds):
        problem = f"--tune={options.tune} and --seed share a seed"
        parser.error(f"{problem}; a run that chooses a rate must not measure it")
    if not study.tuning_seeds and len(rates) > 1:
        parser.error("several rates need --tune=SEEDS to choose one for each arm")
    if "" in study.devices:
        parser.error(f"--devices={options.devices} names an empty device")
    return study, options


def read_axes(words):
    """["--key=v1,v2,...", ...] -> {key: ["v1", "v2", ...]}"""
    axes = {}
    for word in words:
        key, equals, text = word.removeprefix("--").partition("=")
        if not word.startswith("--") or not equals:
            raise UserError(f"{word!r} is not understood; write a setting as --key=v1,v2", status=2)
        if key in NOT_FOR_A_GRID:
            raise UserError(f"--{key} is not for a grid; see --out and --devices", status=2)
        axes[key] = text.split(",")
    return axes


def read_values(config, key, texts):
    """The values of a training setting that some texts stand for."""
    flags = [f"--{key}={text}" for text in texts]
    return [getattr(read_command([config, flag], Settings, GPTConfig)[0], key) for flag in flags]


def make_arms(options, axes):
    """{title: settings} of the arms of --arm, at each combination of the axes."""
    names = options.arm.split(",") if options.arm else [""]
    arms = {}
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values))
        # The arms depend on the width alone, and one head suits every width.
        width = [f"--n_embd={chosen['n_embd']}", "--n_head=1"] if "n_embd" in chosen else []
        _, model = read_command([options.config, *width], Settings, GPTConfig)
        table = named_arms(model.n_embd)
        varied = [f"{key}={chosen[key]}" for key in axes if len(axes[key]) > 1]
        for name in names:
            if name and name not in table:
                raise UserError(f"--arm={name} is not one of {', '.join(table)}", status=2)
            own = table.get(name, {})
            for key in own.keys() & chosen.keys():
                raise UserError(f"--{key} is what the arm {name} sets; leave one out", status=2)
            title = "+".join(filter(None, [name, *varied])) or "baseline"
            if title in arms:
                raise UserError(f"the arm {title} is named twice", status=2)
            arms[title] = {**own, **chosen}
    return arms


def read_pairs(text, arms):
    """A:B,C:D -> [[A, B], [C, D]]; without a text, each arm with the first."""
    if not text:
        return [[arm, arms[0]] for arm in arms[1:]]
    pairs = [pair.split(":") for pair in text.split(",")]
    for pair in pairs:
        if len(pair) != 2 or pair[0] == pair[1] or not set(pair) <= set(arms):
            known = ", ".join(arms)
            raise UserError(f"--compare={':'.join(pair)} is not two of the arms {known}", status=2)
    return pairs


def print_runs(study):
    """Print every run that is known so far, and how long the rest may take."""
    for run in study.runs():
        print(run, study.result(run) if run in study.records else "to run")
    line = f"at least {study.to_go()} to go, {len(study.devices)} at a time"
    summaries = [record["summary"] for record in study.records.values() if record["summary"]]
    if summaries:
        seconds = statistics.median(summary["seconds"] for summary in summaries)
        left = timedelta(seconds=round(study.to_go() * seconds / len(study.devices)))
        line += f", {timedelta(seconds=round(seconds))} each: {left}"
    print(line)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    register()
    study, options = read_options(argv)
    runs.check_plan(study)
    runs.read(study)
    runs.check(study)
    if options.dry_run:
        print_runs(study)
        return 0
    with locked(study.folder):
        command = shlex.join(["python", "-m", "study.ablate", *argv])
        plan = {key: getattr(study, key) for key in runs.PLAN}
        RunFolder(study.folder).write_json("study.json", {"command": command, **plan})
        runs.tidy(study)
        runs.count_ngrams(study)
        print(f"{study.to_go()} to go", flush=True)
        try:
            return runs.go(study)
        finally:
            if study.records:
                report.write(study, command)


if __name__ == "__main__":
    run_program(main)
