"""Compare arms fairly: python -m study.ablate CONFIG [--arm=A,B,...] [--key=v1,v2,... ...] [options], or @PLAN, a file of these

An arm is a row of the table below or, without --arm, each combination of the other keys; the first is the baseline.
Each is compared at its own best learning rate: the first tuning seed (--tune) tries the given rates and more in steps of
sqrt(2), until the best lies between two others; the best, and one as good up to noise, get the other tuning seeds. Then
the seeds of --seed measure the arm there. The same command continues where it was stopped.
"""

import argparse
import contextlib
import itertools
import shlex
import statistics
import sys
import tempfile
from pathlib import Path

import torch

from model import GPT, QUERIES, GPTConfig
from study import report, runs, stats
from study.plan import Run, Study
from study.queries import CANDIDATES, register
from train import Settings
from utils.checkpoint import RunFolder
from utils.files import locked
from utils.settings import Parser, UserError, checked, clock, convert, read_command, run_program, setting_types
from utils.settings import split_command

KINDS = setting_types(Settings, GPTConfig)
NOT_FOR_A_GRID = {"out_dir", "resume", "eval_only", "device"}


def named_arms(d):
    """The arms by name, for a model of width d: what each sets. A fork adds its own in one line."""
    return {mode: {"query_mode": mode} for mode in QUERIES | CANDIDATES} | {
        "identity_mlp": {"query_mode": "identity", "mlp_hidden": 9 * d // 2},  # the d² of W_Q in the MLP: of equal size
        "nonlinear_no_gelu": {"query_mode": "nonlinear", "query_activation": "none"},
        "linear_wide": {"query_mode": "linear", "mlp_hidden": 19 * d // 4},  # 12.5 % more non-embedding parameters
    }


def read_options(argv):
    """Command line -> (Study, other options)."""
    form = argparse.RawDescriptionHelpFormatter
    parser = Parser(description=__doc__, formatter_class=form, allow_abbrev=False, fromfile_prefix_chars="@")
    parser.convert_arg_line_to_args = lambda line: shlex.split(line, comments=True)  # of @PLAN, as in a shell
    positive = checked(float, lambda x: 0 < x < 100, "is not between 0 and 100")
    parser.add_argument("config", help="config file of train.py that all runs start from")
    parser.add_argument("--arm", help=f"arms by name: {', '.join(named_arms(0))}")
    parser.add_argument("--compare", help="A:B,C:D,...: the first is the primary one; default: all with the first")
    parser.add_argument("--tune", metavar="SEEDS", default="1,2", help="default: 1,2; empty: all arms at one rate")
    parser.add_argument("--margin", type=positive, default=0.5, help="of equivalence, in percent; default: 0.5")
    parser.add_argument("--half-width", type=positive, help="of all intervals, in percent: six seeds measure, then two more "
                        "at a time until it is reached; default: all seeds of --seed measure")  # fmt: skip
    parser.add_argument("--spread", type=positive, default=0.5, help="expected standard deviation of a run's loss, "
                        "without what its seed does to all arms, in percent; default: 0.5")  # fmt: skip
    parser.add_argument("--devices", help="one run at a time on each: cuda:0,cuda:1 or cpu,cpu; default: one")
    parser.add_argument("--out", type=Path, help="the study's folder; default: study/results/NAME_OF_CONFIG")
    parser.add_argument("--dry-run", action="store_true", help="list the runs, what they cost and can find")
    parser.add_argument("--speed", action="store_true", help="measure the arms' tokens/s in turns, for the report")
    try:
        options, rest = parser.parse_known_args(argv)
    except ValueError as e:  # of a plan: a quote that is left open, or bytes that are no text
        parser.error(f"{' '.join(word for word in argv if word[:1] == '@')}: {e}")
    words, flags = split_command(rest, KINDS)
    if words:
        parser.error(f"{words[0]!r} is not understood; a setting is written --key=v1,v2")
    axes = {key: read_values(key, values) for key, values in flags.items()}
    settings, config = read_command([options.config], Settings, GPTConfig)
    rates, seeds = axes.pop("learning_rate", [settings.learning_rate]), axes.pop("seed", [3, 4, 5, 6, 7, 8])
    tuning_seeds = read_values("seed", options.tune, flag="tune") if options.tune else []
    if set(seeds) & set(tuning_seeds):
        parser.error(f"--tune={options.tune} and --seed share a seed; what finds a rate must not measure it")
    if not tuning_seeds and len(rates) > 1:
        parser.error("several rates need --tune=SEEDS to choose one for each arm")
    devices = options.devices.split(",") if options.devices else [settings.device]
    if "" in devices:
        parser.error(f"--devices={options.devices} names an empty device")
    names = options.arm.split(",") if options.arm else []
    arms = make_arms(distinct(names, f"--arm={options.arm} names an arm twice"), axes, config.n_embd)
    study = Study(
        config=options.config,
        arms=arms,
        learning_rates=sorted(rates),
        tuning_seeds=tuning_seeds,
        seeds=seeds,
        comparisons=read_pairs(options.compare, list(arms)),
        margin=options.margin,
        half_width=options.half_width,
        spread=options.spread,
        folder=options.out or Path("study/results") / Path(options.config).stem,
        devices=devices,
    )
    return study, options


def read_values(key, text, flag=None):
    """The values v1,v2,... of the setting key, which a flag of that name, unless another is given, asks for."""
    given = f"--{flag or key}={text}"
    if key in NOT_FOR_A_GRID:
        raise UserError(f"--{key} is not for a grid; see --out and --devices", status=2)
    values = [convert(key, value, KINDS, given) for value in str(text).split(",")]
    return distinct(values, f"{given} names a value twice")


def distinct(values, words):
    """The values; a UserError in these words where one is there twice."""
    if len(set(values)) < len(values):
        raise UserError(words, status=2)
    return values


def read_pairs(text, arms):
    """A:B,C:D -> [[A, B], [C, D]]; without a text, each arm with the first."""
    pairs = [pair.split(":") for pair in text.split(",")] if text else [[arm, arms[0]] for arm in arms[1:]]
    for pair in pairs:
        if len(pair) != 2 or pair[0] == pair[1] or not set(pair) <= set(arms):
            raise UserError(f"--compare={':'.join(pair)} is not two of the arms {', '.join(arms)}", status=2)
    distinct([frozenset(pair) for pair in pairs], f"--compare={text} compares two arms twice")
    return pairs


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
            arms["+".join(title)] = {**table[name], **chosen}
    return arms


def print_runs(study):
    """Print every run that is known so far, its parameters, how long the rest will take, and what it can tell."""
    known = study.runs()
    width = max(len(str(run)) for run in known)
    print(f"{'run':{width}} {'parameters':>13} {'non-embedding':>13} {'query path':>11}")
    for arm in study.arms:
        of_arm = [run for run in known if run.arm == arm]
        with torch.device("meta"):
            model = GPT(runs.settings_of(study, of_arm[0], study.devices[0])[1])
        counts = "{total:13,} {non_embedding:13,} {query_path:11,}".format(**model.parameter_report())
        for run in of_arm:
            done = run in study.records
            words = study.failure(run) or f"{study.records[run]['summary']['final_val_loss']:.4f}" if done else "to run"
            print(f"{run!s:{width}} {counts}  {words}")
    if study.to_go():
        settings, config, _ = runs.settings_of(study, known[0], study.devices[0])
        tokens = settings.max_iters * settings.batch_size * settings.gradient_accumulation_steps * config.block_size
        seconds, at_a_time = tokens / speed_of(study, known[0], 6), len(study.devices)
        whole = clock(study.to_go() * seconds / at_a_time)
        print(f"at least {study.to_go()} to go, {whole}, {clock(seconds)} each, {at_a_time} at a time")
    print(f"if a run's loss has a standard deviation of {study.spread:g} % (--spread):")
    for n in sorted({n for n in (len(study.measuring_seeds()), len(study.seeds)) if n > 1}):
        wide, found = stats.half_width(study.spread, n), stats.detectable(study.spread, n)
        print(f"{n} seeds give intervals of ± {wide:.2f} %, and find a difference of {found:.2f} % in 4 of 5 studies")
    takes = stats.seeds_for(study.spread, stats.TIGHT * study.margin)
    print(f"equal arms are called equivalent (--margin={study.margin:g}) in 4 of 5 studies with {takes} seeds")


def speed_of(study, run, steps):
    """Tokens per second of a run, by some steps of it on the first device."""
    short = [f"--max_iters={steps}", f"--eval_interval={steps}", "--eval_tokens=1", f"--log_interval={steps}"]
    with tempfile.TemporaryDirectory() as name:
        folder = RunFolder(name)
        process = runs.start(study, run, study.devices[0], folder.path, [*short, "--wandb_log=false"])
        try:
            status = process.wait()
        finally:  # Ctrl-C does not reach it
            process.terminate()
            process.wait()
        if status:
            raise UserError(f"{run}: {runs.last_line(folder.path / 'log.txt')}")
        return folder.read_json("summary.json")["tokens_per_second"]


def measure_speeds(study):
    """Write speed.json: each arm's tokens/s, the median of three rounds in which they take turns."""
    rounds = {arm: [] for arm in study.arms}
    for arm in [*study.arms] * 3:
        rounds[arm].append(speed_of(study, Run(arm, study.learning_rates[0], study.seeds[0]), 30))
        print(f"{arm}: {rounds[arm][-1]:,.0f} tokens/s", flush=True)
    RunFolder(study.folder).write_json("speed.json", {arm: statistics.median(rounds[arm]) for arm in rounds})


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    register()
    study, options = read_options(argv)
    with contextlib.nullcontext() if options.dry_run else locked(study.folder):
        runs.check_plan(study)
        runs.read(study)
        runs.check(study)
        if options.dry_run:
            print_runs(study)
            return 0
        command = shlex.join(["python", "-m", "study.ablate", *argv])
        runs.write_plan(study, command)
        runs.tidy(study)
        runs.count_ngrams(study)
        if options.speed:
            measure_speeds(study)
        print(f"{study.to_go()} to go", flush=True)
        try:
            return runs.go(study)
        finally:
            if study.records:
                report.write(study, command)


if __name__ == "__main__":
    run_program(main)
