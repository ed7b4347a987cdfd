"""Compare arms fairly: python ablate.py CONFIG [--arm=A,B,...] [--key=v1,v2,... ...] [options]

Each cell of the grid is a run of train.py of its own, in RESULTS/CELL. An arm is a row of the table below or,
without --arm, each combination of the other keys; the first one is the baseline. learning_rate and seed belong
to the cells of an arm. The same command continues where it was stopped, and at the end writes the report.

With --tune=SEEDS each arm is measured at its own best rate. The first of these seeds tries the given rates, then
halves and doubles them until the best one lies between two others; from then on the rate with the lowest mean so
far gets the next of these seeds, until it has them all. The seeds of --seed, which must be others, measure there.
"""

import argparse
import dataclasses
import itertools
import math
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import torch

import machine
import report
import train
from command import Parser, UserError, clock, convert, run_program, split_command
from files import locked
from model import GPT, GPTConfig
from run_folder import RunFolder, check_resume

TRAIN = Path(__file__).parent / "train.py"
MOST_RATES = 12  # of an arm: --tune gives up after so many
NOT_FOR_A_GRID = {"out_dir", "resume", "eval_only", "device"}
MAY_DIFFER = {"device", "compile", "peak_tflops", "log_interval", "wandb_log", "wandb_project"}  # between cells


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


class Cell(NamedTuple):
    arm: str
    learning_rate: float
    seed: int

    def __str__(self):
        return f"{self.arm}-lr{self.learning_rate:g}-seed{self.seed}"


# ---------------------------------------------------------------------------------------------------
# The study: which cells there are.


@dataclasses.dataclass
class Study:
    """What is compared. Its folder holds study.json, a run's folder for each cell, and the report."""

    config: str  # the config file that every cell starts from
    arms: dict  # name -> the settings that the arm changes; the first is the baseline
    learning_rates: list
    tuning_seeds: list  # those that find the rates; empty: every rate is run with every seed
    seeds: list  # those that measure
    folder: Path

    def flags(self, cell):
        """What the cell sets, as flags of train.py."""
        values = {**self.arms[cell.arm], "learning_rate": cell.learning_rate, "seed": cell.seed}
        return [f"--{key}={'auto' if value is None else value}" for key, value in values.items()]

    def read(self, cell):
        """(Settings, dict of the model's settings) of a cell, as train.py will see them."""
        return train.read_command([self.config, *self.flags(cell)])

    def run_folder(self, cell):
        return RunFolder(self.folder / str(cell))

    def outcomes(self):
        """{cell: its final validation loss, inf where it diverged} of the cells that are done."""
        known, outcomes = -1, {}
        while known < len(outcomes):  # under --tune, what is done decides what else there is
            known = len(outcomes)
            for cell in self.cells(outcomes):
                loss = outcome(self.run_folder(cell))
                if loss is not None:
                    outcomes[cell] = loss
        return outcomes

    def cells(self, outcomes):
        """The cells there are, as far as the outcomes of those that are done can tell."""
        if not self.tuning_seeds:
            return [Cell(*cell) for cell in itertools.product(self.arms, self.learning_rates, self.seeds)]
        cells, order = [], [*self.tuning_seeds, *self.seeds]
        for arm in self.arms:
            tuning, best = self.search(arm, outcomes)
            cells += tuning + [Cell(arm, best, seed) for seed in self.seeds if best]
        return sorted(cells, key=lambda cell: order.index(cell.seed))  # so that the arms stay level

    def search(self, arm, outcomes):
        """The cells of an arm that look for its best rate, and that rate once it is known, else None."""
        first = self.tuning_seeds[0]
        rates = sorted({*self.learning_rates, *(cell.learning_rate for cell in outcomes if cell.arm == arm)})
        cells = [Cell(arm, rate, seed) for rate in rates for seed in self.tuning_seeds]
        cells = [cell for cell in cells if cell in outcomes or cell.seed == first]
        if any(cell not in outcomes for cell in cells):
            return cells, None
        means = {rate: statistics.fmean(outcomes[c] for c in cells if c.learning_rate == rate) for rate in rates}
        best = min(rates, key=means.get)
        if best in (rates[0], rates[-1]) and len(rates) < MOST_RATES:
            return [*cells, Cell(arm, best / 2 if best == rates[0] else best * 2, first)], None
        left = [Cell(arm, best, seed) for seed in self.tuning_seeds if Cell(arm, best, seed) not in outcomes]
        return cells + left[:1], None if left else best

    def to_go(self, outcomes):
        """How many cells are left; under --tune at least so many."""
        left = sum(cell not in outcomes for cell in self.cells(outcomes))
        if self.tuning_seeds:
            left += len(self.seeds) * sum(self.search(arm, outcomes)[1] is None for arm in self.arms)
        return left

    def expected(self, cell):
        """What the cell's config.json must say of its settings, model and data."""
        settings, model_args = self.read(cell)
        meta = train.open_data(settings.dataset, model_args.get("block_size", GPTConfig.block_size)).meta
        return {
            "settings": dataclasses.asdict(train.resolve(settings)),
            "model": dataclasses.asdict(GPTConfig(**{"vocab_size": meta["vocab_size"], **model_args})),
            "data": {"sha256": {split: meta[split]["sha256"] for split in ("train", "val")}},
        }

    def check(self, outcomes):
        """Refuse a folder that has cells of other settings or of other data."""
        for cell in self.cells(outcomes):
            expected, folder = self.expected(cell), self.run_folder(cell)
            if folder.holds("config.json"):
                begun = folder.read_json("config.json")
                try:
                    check_resume(begun, expected, MAY_DIFFER)
                except UserError as e:
                    raise UserError(f"{folder}: {e}; choose another --out") from None


def outcome(folder):
    """A finished run's final validation loss, inf where it diverged; None where it is not finished."""
    if folder.holds("summary.json"):
        return folder.read_json("summary.json", "final_val_loss", "seconds", "tokens_per_second")["final_val_loss"]
    metrics = folder.metrics()
    return math.inf if metrics and metrics[-1].get("diverged") else None


# ---------------------------------------------------------------------------------------------------
# The command line.


def read_command(argv):
    """Command line -> (Study, its devices, whether to list it only)."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("config", help="config file of train.py that all cells start from")
    parser.add_argument("--arm", help=f"arms by name: {', '.join(named_arms(0))}")
    parser.add_argument("--tune", metavar="SEEDS", help="find each arm's best rate with these seeds")
    parser.add_argument("--devices", help="one run at a time on each: cuda:0,cuda:1 or cpu,cpu; default: one")
    parser.add_argument("--out", type=Path, help="the study's folder; default: results/NAME_OF_CONFIG")
    parser.add_argument("--dry-run", action="store_true", help="list the cells and what they cost; run nothing")
    options, rest = parser.parse_known_args(argv)
    words, flags = split_command(rest, {})
    if words:
        parser.error(f"{words[0]!r} is not understood; a setting is written --key=v1,v2")
    axes = {key: read_values(key, values) for key, values in flags.items()}
    settings, model_args = train.read_command([options.config])
    rates, seeds = axes.pop("learning_rate", [settings.learning_rate]), axes.pop("seed", [settings.seed])
    tuning_seeds = read_values("seed", options.tune) if options.tune else []
    if set(seeds) & set(tuning_seeds):
        parser.error(f"--tune={options.tune} and --seed share a seed; what finds a rate must not measure it")
    arms = make_arms(options.arm, axes, model_args.get("n_embd", GPTConfig.n_embd))
    folder = options.out or Path("results") / Path(options.config).stem
    study = Study(options.config, arms, rates, tuning_seeds, seeds, folder)
    devices = options.devices.split(",") if options.devices else [None]
    if "" in devices:
        parser.error(f"--devices={options.devices} names an empty device")
    check_cells(study, devices)
    return study, [device and machine.pick_device(device) for device in devices], options.dry_run


def read_values(key, text):
    """The values v1,v2,... of a flag."""
    if key in NOT_FOR_A_GRID:
        raise UserError(f"--{key} is not for a grid; see --out and --devices", status=2)
    values = [convert(key, value, train.KINDS, "command line") for value in str(text).split(",")]
    if len(set(values)) < len(values):
        raise UserError(f"--{key}={text} names a value twice", status=2)
    return values


def make_arms(names, axes, d):
    """The arms that are named, times every combination of the axes' values."""
    arms = {}
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values))
        table = named_arms(chosen.get("n_embd", d))
        varied = [f"{key}={value}" for key, value in chosen.items() if len(axes[key]) > 1]
        for name in names.split(",") if names else []:
            if name not in table:
                raise UserError(f"--arm={name} is not one of {', '.join(table)}", status=2)
            for key in table[name].keys() & chosen.keys():
                raise UserError(f"--{key} is what the arm {name} sets; leave one of them out", status=2)
            arms[",".join([name, *varied])] = {**table[name], **chosen}
        if not names:
            arms[",".join(varied) or "baseline"] = chosen
    return arms


def check_cells(study, devices):
    """Tell a mistake before any work is done."""
    cells = [
        Cell(*cell) for cell in itertools.product(study.arms, study.learning_rates, study.tuning_seeds + study.seeds)
    ]
    names = {Path(str(cell)).name for cell in cells}
    if len(names) < len(cells) or any(str(cell) not in names for cell in cells):
        raise UserError("two cells would have one name, or a name would be a path; choose other values", status=2)
    for cell in cells:
        settings, _ = study.read(cell)
        for device in devices:
            train.resolve(dataclasses.replace(settings, device=device or settings.device))
        if study.tuning_seeds and settings.min_lr is not None:
            raise UserError(f"--tune changes the rate, so min_lr={settings.min_lr:g} must not be fixed: --min_lr=auto")


# ---------------------------------------------------------------------------------------------------
# Running the cells.


class Grid:
    """Runs the cells of a study, one at a time on each device."""

    def __init__(self, study, devices):
        self.study, self.devices = study, devices
        self.outcomes, self.running = study.outcomes(), {}  # running: cell -> its process
        self.failure, self.stopping = None, False
        self.changed = threading.Condition()

    def go(self):
        """Run what is left -> the number of the signal that stopped it, or 0; self.failure says what failed."""
        for cell in self.outcomes:
            clean(self.study.run_folder(cell))  # a kill may have come between the end of a run and this
        workers = [threading.Thread(target=self.work, args=(device,), daemon=True) for device in self.devices]
        with machine.StopSignal() as stop:
            for worker in workers:
                worker.start()
            while any(worker.is_alive() for worker in workers):
                time.sleep(0.1)
                if stop.number and not self.stopping:
                    print("stopping: what runs is saved, and the same command continues", flush=True)
                    self.stop()
        return stop.number

    def stop(self):
        with self.changed:
            self.stopping = True
            for process in self.running.values():
                if process:
                    process.terminate()  # train.py saves and ends
            self.changed.notify_all()

    def work(self, device):
        """Take one cell after another, until there is none."""
        while cell := self.take():
            try:
                self.train(cell, device)
            except Exception as e:
                if not self.stopping:
                    known = isinstance(e, (UserError, OSError))
                    self.failure = UserError(f"{cell}: {e}") if known else e
                self.stop()
            finally:
                with self.changed:
                    del self.running[cell]
                    self.changed.notify_all()

    def take(self):
        """The next cell; waits where only the outcome of one under way can tell. None: there is nothing left."""
        with self.changed:
            while not self.stopping:
                cells = self.study.cells(self.outcomes)
                free = [cell for cell in cells if cell not in self.outcomes and cell not in self.running]
                if free:
                    self.running[free[0]] = None
                    return free[0]
                if not self.running:
                    return None
                self.changed.wait()

    def train(self, cell, device):
        """Train a cell to its end; UserError with the last words of a run that failed."""
        folder = self.study.run_folder(cell)
        self.wait_until_free(folder.path)
        flags = [f"--out_dir={folder}", *["--resume"] * folder.holds("config.json")]
        folder.path.mkdir(parents=True, exist_ok=True)
        log = folder.path / "log.txt"
        # The output goes through a pipe, so that a run ends with this process, however that ends; a session
        # of its own, so that Ctrl-C reaches it only through stop().
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
        with open(log, "wb") as f, subprocess.Popen(**self.program(cell, device, flags), **pipes) as process:
            with self.changed:
                self.running[cell] = process
                if self.stopping:
                    process.terminate()
            for line in process.stdout:
                f.write(line)
                f.flush()
        loss = outcome(folder)
        if loss is None:
            raise UserError(f"{last_words(process, log.read_bytes())} ({log} tells more)")
        clean(folder)
        with self.changed:
            self.outcomes[cell] = loss
            self.tell(cell)

    def wait_until_free(self, folder):
        """A run whose ablate.py was killed ends with the next line it prints; until then it holds its folder."""
        while not self.stopping:
            try:
                with locked(folder):
                    return
            except UserError:
                print(f"waiting for a run that is still at work in {folder}", flush=True)
                time.sleep(2)

    def program(self, cell, device, flags):
        """What starts train.py for a cell: args and env of a process."""
        flags = [*self.study.flags(cell), *[f"--device={device}"] * bool(device), *flags]
        environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
        if device == "cpu":
            environment.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // self.devices.count("cpu"))))
        return {"args": [sys.executable, TRAIN, self.study.config, *flags], "env": environment}

    def tell(self, cell):
        words = f"val loss {self.outcomes[cell]:.4f}" if math.isfinite(self.outcomes[cell]) else "diverged"
        print(f"{cell}: {words}; {self.left(self.seconds())}", flush=True)

    def left(self, seconds):
        """How many cells are to go, and for how long if each takes so many seconds."""
        to_go, at_a_time = self.study.to_go(self.outcomes), len(self.devices)
        words = f"{'at least ' * bool(self.study.tuning_seeds and to_go)}{to_go} to go"
        return words + (f", {clock(to_go * seconds / at_a_time)}" if seconds else "")

    def seconds(self):
        """What a cell took, on average over those that are finished; None before the first."""
        done = [self.study.run_folder(cell) for cell, loss in self.outcomes.items() if math.isfinite(loss)]
        took = [folder.read_json("summary.json", "seconds")["seconds"] for folder in done]
        return statistics.fmean(took) if took else None


def clean(folder):
    """Of a finished cell only the records stay."""
    for left in (*folder.path.glob("*.pt"), folder.path / "log.txt"):
        left.unlink(missing_ok=True)


def last_words(process, output):
    """Why a run failed."""
    lines = output.decode(errors="replace").strip().splitlines()
    killed = f"killed by signal {-process.returncode}" if process.returncode < 0 else None
    return killed or (lines[-1] if lines else f"it ended with status {process.returncode}")


# ---------------------------------------------------------------------------------------------------
# The dry run.


def list_cells(grid):
    """Print every cell that is known so far, its parameters, and how long the rest will take."""
    study, outcomes = grid.study, grid.outcomes
    cells, counts = study.cells(outcomes), {}
    for cell in {cell.arm: cell for cell in cells}.values():  # one of each arm
        with torch.device("meta"):
            counts[cell.arm] = GPT(GPTConfig(**study.expected(cell)["model"])).parameter_report()
    width = max(len(str(cell)) for cell in cells)
    print(f"{'cell':{width}} {'parameters':>13} {'non-embedding':>13} {'query path':>11}")
    for cell in cells:
        state = "to run" if cell not in outcomes else f"{outcomes[cell]:.4f}".replace("inf", "diverged")
        total, non_embedding, query_path = counts[cell.arm].values()
        print(f"{str(cell):{width}} {total:13,} {non_embedding:13,} {query_path:11,}  {state}")
    if study.to_go(outcomes):
        seconds = grid.seconds() or trial(grid, cells[0])
        print(f"{grid.left(seconds)}, {clock(seconds)} each, {len(grid.devices)} at a time")


def trial(grid, cell):
    """The seconds that a cell will take, judged by a few steps of it; an evaluation goes forward only: a third."""
    s, model_args = grid.study.read(cell)
    block_size = model_args.get("block_size", GPTConfig.block_size)
    val_tokens = train.open_data(s.dataset, block_size).meta["val"]["tokens"]
    evaluations = 1 + len(range(0, s.max_iters, s.eval_interval))
    tokens = s.max_iters * s.batch_size * s.gradient_accumulation_steps * block_size
    tokens += evaluations * min(s.eval_tokens or math.inf, val_tokens) / 3
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--out_dir={folder}/run", "--max_iters=6", "--eval_tokens=1", "--gradient_accumulation_steps=1"]
        flags += ["--eval_interval=6", "--log_interval=1", "--learning_rate=1e-9", "--min_lr=auto", "--wandb_log=false"]
        process = subprocess.run(**grid.program(cell, grid.devices[0], flags), capture_output=True)
        if process.returncode:
            raise UserError(f"{cell}: {last_words(process, process.stderr)}")
        return tokens / RunFolder(f"{folder}/run").read_json("summary.json")["tokens_per_second"]


# ---------------------------------------------------------------------------------------------------


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    study, devices, dry_run = read_command(argv)
    grid = Grid(study, devices)
    study.check(grid.outcomes)
    if dry_run:
        list_cells(grid)
        return 0
    with locked(study.folder):
        about = dataclasses.asdict(study) | {"folder": str(study.folder)}
        command = shlex.join(["python", "ablate.py", *argv])
        RunFolder(study.folder).write_json("study.json", {"command": command, **about})
        print(grid.left(grid.seconds()), flush=True)
        number = grid.go()
        if grid.outcomes:
            report.write(study, grid.outcomes)
    if grid.failure:
        raise grid.failure
    return 128 + number if number else 0


if __name__ == "__main__":
    run_program(main)
