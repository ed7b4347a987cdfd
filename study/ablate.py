"""Compare arms fairly: python -m study.ablate CONFIG [--arm=A,B,...] [--key=v1,v2,... ...] [options]

An arm is a row of the table below or, without --arm, each combination of the other keys; the first is the baseline.
Each is run at each learning_rate with each seed. The same command continues where it was stopped.

With --tune=SEEDS the seeds of --seed measure each arm at its own best rate: the first of SEEDS halves and doubles the
given rates until the best lies between two others; then the rate with the lowest mean so far gets the next of them.
"""

import argparse
import contextlib
import itertools
import shlex
import sys
import tempfile
from pathlib import Path

import torch

from model import GPT, QUERIES, GPTConfig
from study.plan import Study, final_loss, go, last_line, start, tidy
from train import Settings
from utils.checkpoint import RunFolder
from utils.files import locked
from utils.settings import Parser, UserError, clock, convert, read_command, run_program, setting_types, split_command

KINDS = setting_types(Settings, GPTConfig)
NOT_FOR_A_GRID = {"out_dir", "resume", "eval_only", "device"}
SIX_STEPS = ["--max_iters=6", "--eval_interval=6", "--eval_tokens=1", "--log_interval=6", "--wandb_log=false"]


def named_arms(d):
    """The arms by name, for a model of width d: what each sets. A fork adds its own in one line."""
    return {mode: {"query_mode": mode} for mode in QUERIES} | {
        "nonlinear_no_gelu": {"query_mode": "nonlinear", "query_activation": "none"},
        "linear_wide": {"query_mode": "linear", "mlp_hidden": 19 * d // 4},  # 12.5 % more non-embedding parameters
        "linear_qk_norm": {"query_mode": "linear", "qk_norm": True},
    }


def read_options(argv):
    """Command line -> (Study, whether to list its runs only)."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("config", help="config file of train.py that all runs start from")
    parser.add_argument("--arm", help=f"arms by name: {', '.join(named_arms(0))}")
    parser.add_argument("--tune", metavar="SEEDS", help="find each arm's best rate with these seeds")
    parser.add_argument("--devices", help="one run at a time on each: cuda:0,cuda:1 or cpu,cpu; default: one")
    parser.add_argument("--out", type=Path, help="the study's folder; default: study/results/NAME_OF_CONFIG")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and what they cost; run nothing")
    options, rest = parser.parse_known_args(argv)
    words, flags = split_command(rest, KINDS)
    if words:
        parser.error(f"{words[0]!r} is not understood; a setting is written --key=v1,v2")
    axes = {key: read_values(key, values) for key, values in flags.items()}
    settings, config = read_command([options.config], Settings, GPTConfig)
    rates, seeds = axes.pop("learning_rate", [settings.learning_rate]), axes.pop("seed", [settings.seed])
    tuning_seeds = read_values("seed", options.tune) if options.tune else []
    if set(seeds) & set(tuning_seeds):
        parser.error(f"--tune={options.tune} and --seed share a seed; what finds a rate must not measure it")
    devices = options.devices.split(",") if options.devices else [settings.device]
    if "" in devices:
        parser.error(f"--devices={options.devices} names an empty device")
    arms = make_arms(options.arm.split(",") if options.arm else [], axes, config.n_embd)
    folder = options.out or Path("study/results") / Path(options.config).stem
    return Study(options.config, arms, rates, tuning_seeds, seeds, folder, devices), options.dry_run


def read_values(key, text):
    """The values v1,v2,... of a flag."""
    if key in NOT_FOR_A_GRID:
        raise UserError(f"--{key} is not for a grid; see --out and --devices", status=2)
    values = [convert(key, value, KINDS, "command line") for value in str(text).split(",")]
    if len(set(values)) < len(values):
        raise UserError(f"--{key}={text} names a value twice", status=2)
    return values


def make_arms(names, axes, d):
    """The arms that are named, times every combination of the axes' values."""
    arms = {}
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values))
        varied = [f"{key}={value}" for key, value in chosen.items() if len(axes[key]) > 1]
        table = named_arms(chosen.get("n_embd", d)) if names else {"baseline": {}}
        for name in names or table:
            if name not in table:
                raise UserError(f"--arm={name} is not one of {', '.join(table)}", status=2)
            for key in table[name].keys() & chosen.keys():
                raise UserError(f"--{key} is what the arm {name} sets; leave one of them out", status=2)
            title = [name, *varied] if names else varied or [name]
            arms[",".join(title)] = {**table[name], **chosen}
    return arms


def print_runs(study):
    """Print every run that is known so far, its parameters, and how long the rest will take."""
    runs = study.runs()
    width = max(len(str(run)) for run in runs)
    print(f"{'run':{width}} {'parameters':>13} {'non-embedding':>13} {'query path':>11}")
    for arm in study.arms:
        of_arm = [run for run in runs if run.arm == arm]
        with torch.device("meta"):
            model = GPT(GPTConfig(**study.expected(of_arm[0], study.devices[0])["model"]))
        counts = "{total:13,} {non_embedding:13,} {query_path:11,}".format(**model.parameter_report())
        for run in of_arm:
            loss = f"{final_loss(study.records[run]):.4f}" if run in study.records else "to run"
            print(f"{run!s:{width}} {counts}  {loss.replace('inf', 'diverged')}")
    if study.to_go():
        seconds, at_a_time = trial(study, runs[0]), len(study.devices)
        whole = clock(study.to_go() * seconds / at_a_time)
        print(f"{study.to_go()} to go, {whole}, {clock(seconds)} each, {at_a_time} at a time")


def trial(study, run):
    """The seconds that a run trains, judged by six steps of it; evaluations come on top."""
    with tempfile.TemporaryDirectory() as name:
        folder = RunFolder(name)
        if start(study, run, study.devices[0], folder.path, SIX_STEPS).wait():
            raise UserError(f"{run}: {last_line(folder.path / 'log.txt')}")
        six = folder.read_json("summary.json")
    steps = study.expected(run, study.devices[0])["settings"]["max_iters"]
    return steps * six["tokens"] / 6 / six["tokens_per_second"]


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    study, dry_run = read_options(argv)
    with contextlib.nullcontext() if dry_run else locked(study.folder):
        study.read()
        study.check()
        if dry_run:
            print_runs(study)
            return 0
        try:
            from study import report
        except ImportError:  # told before the first run
            raise UserError("the report needs scipy and matplotlib: pip install scipy matplotlib") from None
        tidy(study)
        about = {key: getattr(study, key) for key in ("config", "arms", "learning_rates", "tuning_seeds", "seeds")}
        command = shlex.join(["python", "-m", "study.ablate", *argv])
        RunFolder(study.folder).write_json("study.json", {"command": command, **about})
        print(f"{study.to_go()} to go", flush=True)
        try:
            return go(study)
        finally:
            if study.records:
                report.write(study, command)


if __name__ == "__main__":
    run_program(main)
