"""Compare arms, each at its own best learning rate.

    python -m study.ablate CONFIG [--arm=A,B,...] [--key=v1,v2,...] [options]
    python -m study.ablate @PLAN     PLAN is a file that holds such arguments

Without --arm, each combination of the keys is an arm; the first arm is the baseline. The tuning
seeds try the given rates and more in steps of sqrt(2), until an arm's best rate lies between two
others. Then the seeds of --seed measure it there. After an interruption the same command continues.
"""

import itertools
import shlex
import sys
from pathlib import Path

from model import QUERIES, GPTConfig
from study import report, runs
from study.plan import PLAN, Study
from study.queries import CANDIDATES, register
from train import Settings
from utils.checkpoint import RunFolder
from utils.files import locked
from utils.settings import Parser, UserError, read_command, run_program


def named_arms(d):
    """What each named arm sets, for a model of width d. Add your own in one line."""
    return {mode: {"query_mode": mode} for mode in QUERIES | CANDIDATES} | {
        # The d² parameters of W_Q are in the MLP, so this arm is as large as linear.
        "identity_mlp": {"query_mode": "identity", "mlp_hidden": 9 * d // 2},
        "nonlinear_no_gelu": {"query_mode": "nonlinear", "query_activation": "none"},
        # This arm has 12.5 % more non-embedding parameters than linear.
        "linear_wide": {"query_mode": "linear", "mlp_hidden": 19 * d // 4},
    }


def list_of(kind):
    """A type for argparse: "v1,v2,..." -> the different values in a list."""

    def values(text):
        return list(dict.fromkeys(kind(value) for value in text.split(",") if value))

    return values


def read_options(argv):
    """Command line -> Study, other options."""
    parser = Parser(description=__doc__, fromfile_prefix_chars="@")
    # A plan file has the quotes and comments of a shell script.
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)
    add = parser.add_argument
    add("config", help="config file of train.py that all runs start from")
    add("--arm", type=list_of(str), help=f"arms by name: {', '.join(named_arms(0))}")
    add("--compare", help="A:B,C:D,... compares A with B, C with D; default: all with the first")
    add("--learning_rate", type=list_of(float), help="default: that of the config file")
    add("--tune", type=list_of(int), default="1,2", help="seeds; default: 1,2; empty: no search")
    add("--seed", type=list_of(int), default="3,4,5,6,7,8", help="default: 3,4,5,6,7,8")
    add("--devices", help="one run at a time on each: cuda:0,cuda:1 or cpu,cpu; default: one")
    add("--out", type=Path, help="the study's folder; default: study/results/NAME_OF_CONFIG")
    add("--dry-run", action="store_true", help="list the runs, and start none")
    options, rest = parser.parse_known_args(argv)
    settings, model = read_command([options.config], Settings, GPTConfig)
    arms = make_arms(options.arm or [""], rest, model.n_embd)
    study = Study(
        config=options.config,
        arms=arms,
        learning_rates=sorted(options.learning_rate or [settings.learning_rate]),
        tuning_seeds=options.tune,
        seeds=options.seed,
        comparisons=read_pairs(options.compare, list(arms)),
        folder=options.out or Path("study/results") / Path(options.config).stem,
        devices=options.devices.split(",") if options.devices else [settings.device],
    )
    if set(study.seeds) & set(study.tuning_seeds):
        parser.error("--tune and --seed share a seed; the runs that measure must be other ones")
    if not study.tuning_seeds and len(study.learning_rates) > 1:
        parser.error("several rates need --tune=SEEDS to choose one for each arm")
    return study, options


def make_arms(names, words, d):
    """{title: settings} of the named arms at each combination of the words --key=v1,v2,..."""
    pairs = [word.removeprefix("--").partition("=")[::2] for word in words]
    axes = {key: text.split(",") for key, text in pairs}
    for key in axes.keys() & {"out_dir", "resume", "eval_only", "device"}:
        raise UserError(f"--{key} is not for a grid; see --out and --devices", status=2)
    arms = {}
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values))
        table = named_arms(int(chosen.get("n_embd", d)))
        varied = [f"{key}={chosen[key]}" for key in axes if len(axes[key]) > 1]
        for name in names:
            if name and name not in table:
                raise UserError(f"--arm={name} is not one of {', '.join(table)}", status=2)
            own = table.get(name, {})
            for key in own.keys() & chosen.keys():
                raise UserError(f"--{key} is what the arm {name} sets; leave one out", status=2)
            title = "+".join(filter(None, [name, *varied])) or "baseline"
            arms[title] = {**own, **chosen}
    return arms


def read_pairs(text, arms):
    """A:B,C:D -> [[A, B], [C, D]]; without a text, each arm with the first."""
    if not text:
        return [[arm, arms[0]] for arm in arms[1:]]
    pairs = [pair.split(":") for pair in text.split(",")]
    for pair in pairs:
        if tuple(pair) not in itertools.permutations(arms, 2):
            known = ", ".join(arms)
            raise UserError(f"--compare={':'.join(pair)} is not two of the arms {known}", status=2)
    return pairs


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    register()
    study, options = read_options(argv)
    runs.read(study)
    runs.check(study, dict.fromkeys([*study.runs(), *study.records]))
    if options.dry_run:
        for run in study.runs():
            print(run, study.result(run) if run in study.records else "to run")
        print(f"at least {study.to_go()} to go")
        return 0
    with locked(study.folder):
        command = shlex.join(["python", "-m", "study.ablate", *argv])
        plan = {key: getattr(study, key) for key in PLAN}
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
