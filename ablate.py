"""Compare arms fairly: python ablate.py CONFIG [--arm=A,B,...] [--key=v1,v2,... ...] [options]

Each cell of the grid is a run of train.py of its own, in RESULTS/CELL. An arm is a row of the table below or,
without --arm, each combination of the other keys; the first one is the baseline. learning_rate and seed belong
to the cells of an arm. The same command goes on where it was stopped, and at the end writes the report.

With --tune each arm is compared at its own best rate: the first seed tries the given rates, then halves and
doubles them until the best one lies between two others; the other seeds run at that rate alone, and measure.
"""

import argparse
import dataclasses
import itertools
import math
import os
import shlex
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple


import machine
import train
from command import Parser, UserError, clock, convert, run_program, split_command
from files import locked
from model import GPTConfig
from run_folder import RunFolder

TRAIN = Path(__file__).parent / "train.py"
MOST_RATES = 12  # of an arm: --tune gives up after so many


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
    seeds: list
    tune: bool
    folder: Path

    def flags(self, cell):
        """What the cell sets, as flags of train.py."""
        values = {**self.arms[cell.arm], "learning_rate": cell.learning_rate, "seed": cell.seed}
        return [f"--{key}={'auto' if value is None else value}" for key, value in values.items()]

    def run(self, cell):
        return RunFolder(self.folder / str(cell))

    def outcomes(self):
        """{cell: its final validation loss, inf where it diverged} of the cells that are done."""
        known, outcomes = -1, {}
        while known < len(outcomes):  # under --tune, what is done decides what else there is
            known = len(outcomes)
            for cell in self.cells(outcomes):
                loss = outcome(self.run(cell))
                if loss is not None:
                    outcomes[cell] = loss
        return outcomes

    def cells(self, outcomes):
        """The cells there are, as far as the outcomes of those that are done can tell."""
        if not self.tune:
            return [Cell(*c) for c in itertools.product(self.arms, self.learning_rates, self.seeds)]
        tried, best = {}, {}
        for arm in self.arms:
            tried[arm], best[arm] = self.search(arm, outcomes)
        cells = [Cell(arm, rate, self.seeds[0]) for arm in self.arms for rate in tried[arm]]
        return cells + [Cell(arm, best[arm], seed) for seed in self.seeds[1:] for arm in self.arms if best[arm]]

    def search(self, arm, outcomes):
        """The rates of an arm to try with the first seed, and the best of them once it is known, else None."""
        rates = sorted(self.learning_rates)
        while all(Cell(arm, rate, self.seeds[0]) in outcomes for rate in rates):
            best = min(rates, key=lambda rate: outcomes[Cell(arm, rate, self.seeds[0])])
            if best not in (rates[0], rates[-1]) or len(rates) >= MOST_RATES:
                return rates, best
            rates = [best / 2, *rates] if best == rates[0] else [*rates, 2 * best]
        return rates, None


def outcome(run):
    """A finished run's final validation loss, inf where it diverged; None where it is not finished."""
    if run.holds("summary.json"):
        return run.read_json("summary.json")["final_val_loss"]
    metrics = run.metrics()
    return math.inf if metrics and metrics[-1].get("diverged") else None


# ---------------------------------------------------------------------------------------------------
# The command line.


def read_command(argv):
    """Command line -> (Study, its devices, whether to list it only)."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("config", help="config file of train.py that all cells start from")
    parser.add_argument("--arm", help=f"arms by name: {', '.join(named_arms(0))}")
    parser.add_argument("--tune", action="store_true", help="find each arm's best rate, then measure there")
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
    if options.tune and len(seeds) < 2:
        parser.error("--tune needs at least two seeds: one to find the rates, the others to measure")
    arms = make_arms(options.arm, axes, model_args.get("n_embd", GPTConfig.n_embd))
    folder = options.out or Path("results") / Path(options.config).stem
    study = Study(options.config, arms, rates, seeds, options.tune, folder)
    for arm in arms:
        for rate in rates:
            train.resolve(train.read_command([study.config, *study.flags(Cell(arm, rate, seeds[0]))])[0])
    devices = options.devices.split(",") if options.devices else [None]
    for device in devices:
        machine.pick_device(device)
    return study, devices, options.dry_run


def read_values(key, text):
    """The values v1,v2,... of a flag."""
    if key in ("out_dir", "resume", "eval_only", "device"):
        raise UserError(f"--{key} is not for a grid; see --out and --devices", status=2)
    values = [convert(key, value, train.KINDS, "command line") for value in str(text).split(",")]
    if len(set(values)) < len(values):
        raise UserError(f"--{key}={text} names a value twice", status=2)
    return values


def make_arms(names, axes, d):
    """The arms that are named, times every combination of the axes' values."""
    table = named_arms(d)
    names = names.split(",") if names else [None]
    for name in names:
        if name and name not in table:
            raise UserError(f"--arm={name} is not one of {', '.join(table)}", status=2)
    arms = {}
    for name in names:
        for values in itertools.product(*axes.values()):
            chosen = dict(zip(axes, values))
            label = [name] * bool(name) + [f"{key}={value}" for key, value in chosen.items() if len(axes[key]) > 1]
            arms[",".join(label) or "baseline"] = {**table.get(name, {}), **chosen}
    return arms


# ---------------------------------------------------------------------------------------------------
# Running the cells.


def begin(study, command):
    """Write study.json; refuse a folder whose cells were run under other settings or on other data."""
    settings, model_args = train.read_command([study.config])
    data = train.open_data(settings.dataset, model_args.get("block_size", GPTConfig.block_size))
    fixed = {key: value for key, value in dataclasses.asdict(settings).items() if key != "out_dir"} | model_args
    record = {
        "command": command,
        "config": study.config,
        "settings": fixed,
        "data": {"source": data.meta["source"], **{split: data.meta[split]["sha256"] for split in ("train", "val")}},
        "arms": study.arms,
        "learning_rates": study.learning_rates,
        "seeds": study.seeds,
        "tune": study.tune,
    }
    folder = RunFolder(study.folder)
    if folder.holds("study.json"):
        before = folder.read_json("study.json")
        for part in ("settings", "data", "arms"):
            for key, value in record[part].items():
                if before[part].get(key, value) != value:
                    raise UserError(
                        f"{study.folder} was begun with {key}={before[part][key]}, now {value}; choose another --out"
                    )
    folder.write_json("study.json", record)


class Grid:
    """Runs the cells of a study, one at a time on each device."""

    def __init__(self, study, devices):
        self.study, self.devices = study, devices
        self.outcomes = study.outcomes()
        self.running, self.seconds = {}, []  # cell: its process; of the cells that were run in this sitting
        self.failure, self.stopping = None, False
        self.changed = threading.Condition()

    def go(self):
        """Run what is left -> whether all of it was run; False after a signal."""
        workers = [threading.Thread(target=self.work, args=(device,), daemon=True) for device in self.devices]
        with machine.StopSignal() as stop:
            for worker in workers:
                worker.start()
            while any(worker.is_alive() for worker in workers):
                time.sleep(0.1)
                if stop.number and not self.stopping:
                    print("stopping; what runs is saved", flush=True)
                    self.stop()
        if self.failure:
            raise UserError(self.failure)
        return not self.stopping

    def stop(self):
        with self.changed:
            self.stopping = True
            for process in self.running.values():
                process.terminate()  # train.py saves and ends
            self.changed.notify_all()

    def work(self, device):
        """Take one cell after another, until there is none."""
        while cell := self.take():
            try:
                failure = self.run(cell, device)
            except (UserError, OSError) as e:
                failure = str(e)
            with self.changed:
                del self.running[cell]
                if failure and not self.stopping:
                    self.failure = f"{cell}: {failure}"
                self.changed.notify_all()
            if self.failure:
                self.stop()

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

    def run(self, cell, device):
        """Train a cell to its end -> None, or the last words of a run that failed."""
        run, began = self.study.run(cell), time.monotonic()
        wait_until_free(run.path)
        command = [sys.executable, TRAIN, self.study.config, *self.study.flags(cell), f"--out_dir={run}"]
        command += [f"--device={device}"] * bool(device) + ["--resume"] * run.holds("config.json")
        log = run.path / "log.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
        if device == "cpu":
            environment.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // self.devices.count("cpu"))))
        # A pipe, so that the run ends with this process, however that ends; a session of its own, so that
        # Ctrl-C reaches it once, through stop().
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "start_new_session": True}
        with open(log, "wb") as f, subprocess.Popen(command, env=environment, **pipes) as process:
            with self.changed:
                self.running[cell] = process
                if self.stopping:
                    process.terminate()
            for line in process.stdout:
                f.write(line)
                f.flush()
        loss = outcome(run)
        if loss is None:
            words = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
            return f"{words[-1] if words else f'status {process.returncode}'} ({log} tells more)"
        for left in (*run.path.glob("*.pt"), log):
            left.unlink()
        with self.changed:
            self.outcomes[cell] = loss
            self.seconds.append(time.monotonic() - began)
            self.tell(cell, loss)

    def tell(self, cell, loss):
        cells = self.study.cells(self.outcomes)
        left = sum(cell not in self.outcomes for cell in cells)
        if self.study.tune:  # and those whose rate is not known yet
            left += sum(not self.study.search(arm, self.outcomes)[1] for arm in self.study.arms) * (
                len(self.study.seeds) - 1
            )
        seconds = left * sum(self.seconds) / len(self.seconds) / len(self.devices)
        what = f"val loss {loss:.4f}" if math.isfinite(loss) else "diverged"
        print(f"{cell}: {what} in {clock(self.seconds[-1])}; {left} to go, {clock(seconds)} left", flush=True)


def wait_until_free(folder):
    """A run whose ablate.py was killed ends with the next line it prints; until then it holds its folder."""
    while True:
        try:
            with locked(folder):
                return
        except UserError:
            time.sleep(1)


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    study, devices, dry_run = read_command(argv)
    with locked(study.folder):
        begin(study, shlex.join(["python", "ablate.py", *argv]))
        done = Grid(study, devices).go()
    return 0 if done else 143


if __name__ == "__main__":
    run_program(main)
