"""Compare arms fairly: python -m study.ablate CONFIG [--arm=A,B,...] [--key=v1,v2,... ...] [options]

An arm is a row of the table below or, without --arm, each combination of the other keys; the first one is the
baseline. Each arm is run at each learning_rate with each seed, and every run is one of train.py. The same command
continues where it was stopped; a finished run is a line of runs.jsonl, and the report is made from these lines.

With --tune=SEEDS each arm is measured at its own best rate. The first of these seeds tries the given rates, then
halves and doubles them until the best one lies between two others; from then on the rate with the lowest mean so
far gets the next of these seeds, until it has them all. The seeds of --seed, which must be others, measure there.
"""

import argparse
import contextlib
import itertools
import math
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from model import GPT, GPTConfig
from prepare_data import Dataset
from study import report
from study.grid import Grid, last_words, tidy
from study.plan import Study, final_loss
from train import Settings
from utils.checkpoint import RunFolder
from utils.files import locked
from utils.settings import Parser, UserError, clock, convert, read_command, run_program, setting_types, split_command

NOT_FOR_A_GRID = {"out_dir", "resume", "eval_only", "device"}


def named_arms(d):
    """The arms by name, for a model of width d: what each sets. A fork adds its own in one line."""
    return {
        "linear": {"query_mode": "linear"},
        "identity": {"query_mode": "identity"},
        "nonlinear": {"query_mode": "nonlinear"},
        "nonlinear_no_gelu": {"query_mode": "nonlinear", "query_activation": "none"},
        "linear_wide": {"query_mode": "linear", "mlp_hidden": 19 * d // 4},  # 12.5 % more non-embedding parameters
        "linear_qk_norm": {"query_mode": "linear", "qk_norm": True},
    }


# ---------------------------------------------------------------------------------------------------
# The command line.


def read_options(argv):
    """Command line -> (Study, its devices, whether to list its runs only)."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("config", help="config file of train.py that all runs start from")
    parser.add_argument("--arm", help=f"arms by name: {', '.join(named_arms(0))}")
    parser.add_argument("--tune", metavar="SEEDS", help="find each arm's best rate with these seeds")
    parser.add_argument("--devices", help="one run at a time on each: cuda:0,cuda:1 or cpu,cpu; default: one")
    parser.add_argument("--out", type=Path, help="the study's folder; default: study/results/NAME_OF_CONFIG")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and what they cost; run nothing")
    options, rest = parser.parse_known_args(argv)
    words, flags = split_command(rest, setting_types(Settings, GPTConfig))
    if words:
        parser.error(f"{words[0]!r} is not understood; a setting is written --key=v1,v2")
    axes = {key: read_values(key, values) for key, values in flags.items()}
    settings, config = read_command([options.config], Settings, GPTConfig)
    rates, seeds = axes.pop("learning_rate", [settings.learning_rate]), axes.pop("seed", [settings.seed])
    tuning_seeds = read_values("seed", options.tune) if options.tune else []
    if set(seeds) & set(tuning_seeds):
        parser.error(f"--tune={options.tune} and --seed share a seed; what finds a rate must not measure it")
    devices = options.devices.split(",") if options.devices else [None]
    if "" in devices:
        parser.error(f"--devices={options.devices} names an empty device")
    arms = make_arms(options.arm, axes, config.n_embd)
    folder = options.out or Path("study/results") / Path(options.config).stem
    return Study(options.config, arms, rates, tuning_seeds, seeds, folder), devices, options.dry_run


def read_values(key, text):
    """The values v1,v2,... of a flag."""
    if key in NOT_FOR_A_GRID:
        raise UserError(f"--{key} is not for a grid; see --out and --devices", status=2)
    kinds = setting_types(Settings, GPTConfig)
    values = [convert(key, value, kinds, "command line") for value in str(text).split(",")]
    if len(set(values)) < len(values):
        raise UserError(f"--{key}={text} names a value twice", status=2)
    return values


def make_arms(names, axes, d):
    """The arms that are named, times every combination of the axes' values."""
    arms = {}
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values))
        varied = [f"{key}={value}" for key, value in chosen.items() if len(axes[key]) > 1]
        if not names:
            arms[",".join(varied) or "baseline"] = chosen
            continue
        table = named_arms(chosen.get("n_embd", d))
        for name in names.split(","):
            if name not in table:
                raise UserError(f"--arm={name} is not one of {', '.join(table)}", status=2)
            for key in table[name].keys() & chosen.keys():
                raise UserError(f"--{key} is what the arm {name} sets; leave one of them out", status=2)
            arms[",".join([name, *varied])] = {**table[name], **chosen}
    return arms


def print_runs(grid):
    """Print every run that is known so far, its parameters, and how long the rest will take."""
    study, runs, counts = grid.study, grid.study.runs(), {}
    for arm, run in {run.arm: run for run in runs}.items():  # one of each arm
        with torch.device("meta"):
            model = GPT(GPTConfig(**study.expected(run, grid.devices[0])["model"]))
        counts[arm] = "{total:13,} {non_embedding:13,} {query_path:11,}".format(**model.parameter_report())
    width = max(len(str(run)) for run in runs)
    print(f"{'run':{width}} {'parameters':>13} {'non-embedding':>13} {'query path':>11}")
    for run in runs:
        loss = final_loss(study.records[run]) if run in study.records else None
        state = "to run" if loss is None else f"{loss:.4f}".replace("inf", "diverged")
        print(f"{run!s:{width}} {counts[run.arm]}  {state}")
    if study.to_go():
        seconds = grid.seconds() or trial(grid, runs[0])
        print(f"{grid.left(seconds)}, {clock(seconds)} each, {len(grid.devices)} at a time")


def trial(grid, run):
    """The seconds that a run will take, judged by six steps; an evaluation goes forward only: a third of a step."""
    expected = grid.study.expected(run, grid.devices[0])
    settings, block_size = Settings(**expected["settings"]), expected["model"]["block_size"]
    val_tokens = min(settings.eval_tokens or math.inf, Dataset(settings.dataset, block_size).n_tokens("val"))
    tokens = settings.max_iters * settings.batch_size * settings.gradient_accumulation_steps * block_size
    tokens += (1 + math.ceil(settings.max_iters / settings.eval_interval)) * val_tokens / 3
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--out_dir={folder}/run", "--max_iters=6", "--eval_tokens=1", "--gradient_accumulation_steps=1"]
        flags += ["--eval_interval=6", "--log_interval=1", "--learning_rate=1e-9", "--min_lr=auto", "--wandb_log=false"]
        process = subprocess.run(**grid.command(run, grid.devices[0], flags), capture_output=True, check=False)
        if process.returncode:
            raise UserError(f"{run}: {last_words(process.returncode, process.stderr)}")
        return tokens / RunFolder(f"{folder}/run").read_json("summary.json")["tokens_per_second"]


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    study, devices, dry_run = read_options(argv)
    grid = Grid(study, devices)
    with contextlib.nullcontext() if dry_run else locked(study.folder):
        study.read()
        study.check(devices)
        if dry_run:
            print_runs(grid)
            return 0
        tidy(study)
        about = {key: getattr(study, key) for key in ("config", "arms", "learning_rates", "tuning_seeds", "seeds")}
        command = shlex.join(["python", "-m", "study.ablate", *argv])
        RunFolder(study.folder).write_json("study.json", {"command": command, **about})
        print(grid.left(), flush=True)
        signal_number = grid.go()
        if study.records:
            report.write(study)
    if grid.failure:
        raise grid.failure
    return 128 + signal_number if signal_number else 0


if __name__ == "__main__":
    run_program(main)
