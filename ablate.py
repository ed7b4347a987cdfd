"""Compare arms fairly: python ablate.py CONFIG [--arm=A,B,...] [--key=v1,v2,... ...] [options]

Each cell of the grid is a run of train.py of its own, in RESULTS/CELL. An arm is a row of the table below or,
without --arm, each combination of the other keys; the first one is the baseline. learning_rate and seed belong
to the cells of an arm. The same command goes on where it was stopped, and at the end writes the report.

With --tune not every rate is run with every seed. The first seed tries the given rates, then halves and doubles
them until the best one lies between two others; from then on the rate with the lowest mean so far gets the next
seed, until it has them all: a rate that was lucky, or that fails with some seeds, is overtaken.
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

    def read(self, cell):
        """(Settings, dict of the model's settings) of a cell, as train.py will see them."""
        return train.read_command([self.config, *self.flags(cell)])

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
        """The cells there are, as far as the outcomes of those that are done can tell; all arms' first seeds first."""
        if not self.tune:
            return [Cell(*cell) for cell in itertools.product(self.arms, self.learning_rates, self.seeds)]
        cells = [cell for arm in self.arms for cell in self.search(arm, outcomes)]
        return sorted(cells, key=lambda cell: self.seeds.index(cell.seed))

    def search(self, arm, outcomes):
        """The cells of an arm under --tune: those that are done, and what is to be run next."""
        rates = sorted(self.learning_rates)
        while True:
            cells = [Cell(arm, rate, seed) for rate in rates for seed in self.seeds]
            cells = [cell for cell in cells if cell in outcomes or cell.seed == self.seeds[0]]
            if any(cell not in outcomes for cell in cells):
                return cells
            means = {rate: statistics.fmean(outcomes[c] for c in cells if c.learning_rate == rate) for rate in rates}
            best = min(rates, key=means.get)
            if best in (rates[0], rates[-1]) and len(rates) < MOST_RATES:
                rates = [best / 2, *rates] if best == rates[0] else [*rates, 2 * best]
            else:
                left = [Cell(arm, best, seed) for seed in self.seeds if Cell(arm, best, seed) not in outcomes]
                return cells + left[:1]

    def to_go(self, outcomes):
        """How many cells are left; under --tune at least so many."""
        left = 0
        for arm in self.arms:
            cells = [cell for cell in self.cells(outcomes) if cell.arm == arm]
            most = max(sum(cell.learning_rate == rate for cell in cells) for rate in {c.learning_rate for c in cells})
            left += sum(cell not in outcomes for cell in cells) + (len(self.seeds) - most) * self.tune
        return left

    def seconds(self, outcomes):
        """What a cell took, on average over those that are finished; None before the first."""
        took = [self.run(cell).read_json("summary.json")["seconds"] for cell in outcomes if outcomes[cell] < math.inf]
        return sum(took) / len(took) if took else None


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
    parser.add_argument("--tune", action="store_true", help="find each arm's best rate, and spend the seeds there")
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
    arms = make_arms(options.arm, axes, model_args.get("n_embd", GPTConfig.n_embd))
    folder = options.out or Path("results") / Path(options.config).stem
    study = Study(options.config, arms, rates, seeds, options.tune, folder)
    for cell in itertools.product(arms, rates, seeds):
        train.resolve(study.read(Cell(*cell))[0])  # tells a mistake before any work is done
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
    arms = {}
    for values in itertools.product(*axes.values()):
        chosen = dict(zip(axes, values))
        table = named_arms(chosen.get("n_embd", d))
        varied = [f"{key}={value}" for key, value in chosen.items() if len(axes[key]) > 1]
        for name in names.split(",") if names else []:
            if name not in table:
                raise UserError(f"--arm={name} is not one of {', '.join(table)}", status=2)
            arms[",".join([name, *varied])] = {**table[name], **chosen}
        if not names:
            arms[",".join(varied) or "baseline"] = chosen
    return arms


# ---------------------------------------------------------------------------------------------------
# Running the cells.


def begin(study, command):
    """Write study.json; refuse a folder whose cells were run under other settings or on other data."""
    settings, model_args = train.read_command([study.config])
    data = {}
    for arm in study.arms:
        s, args = study.read(Cell(arm, study.learning_rates[0], study.seeds[0]))
        meta = train.open_data(s.dataset, args.get("block_size", GPTConfig.block_size)).meta
        data[s.dataset] = {"source": meta["source"], **{split: meta[split]["sha256"] for split in ("train", "val")}}
    record = {
        "command": command,
        "config": study.config,
        "settings": {**dataclasses.asdict(settings), **model_args},
        "data": data,
        "arms": study.arms,
        "learning_rates": study.learning_rates,
        "seeds": study.seeds,
        "tune": study.tune,
    }
    folder = RunFolder(study.folder)
    if folder.holds("study.json"):
        before = folder.read_json("study.json")
        for name, now in record["data"].items():
            was = before["data"].get(name, now)
            if was != now:
                raise UserError(
                    f"{study.folder} was begun with another text in {name}: {was['source']}; choose another --out"
                )
        for part in ("settings", "arms"):
            for key, now in record[part].items():
                was = before[part].get(key, now)
                if was != now:
                    raise UserError(f"{study.folder} was begun with {key}={was}, now {now}; choose another --out")
    folder.write_json("study.json", record)


class Grid:
    """Runs the cells of a study, one at a time on each device."""

    def __init__(self, study, devices):
        self.study, self.devices = study, devices
        self.outcomes, self.running = study.outcomes(), {}  # running: cell -> its process
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
                    print("stopping: what runs is saved, and the same command goes on", flush=True)
                    self.stop()
        if self.failure:
            raise UserError(self.failure)
        return not self.stopping

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
                self.run(cell, device)
            except (UserError, OSError) as e:
                if not self.stopping:
                    self.failure = f"{cell}: {e}"
                self.stop()
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

    def run(self, cell, device):
        """Train a cell to its end; UserError with the last words of a run that failed."""
        run = self.study.run(cell)
        wait_until_free(run.path)
        flags = [f"--out_dir={run}", *["--resume"] * run.holds("config.json")]
        run.path.mkdir(parents=True, exist_ok=True)
        log = run.path / "log.txt"
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
        loss = outcome(run)
        if loss is None:
            raise UserError(f"{last_line(log.read_bytes())} ({log} tells more)")
        for left in (*run.path.glob("*.pt"), log):
            left.unlink()
        with self.changed:
            self.outcomes[cell] = loss
            self.tell(cell)

    def program(self, cell, device, flags):
        """What starts train.py for a cell: args and env of a process."""
        flags = [*self.study.flags(cell), *[f"--device={device}"] * bool(device), *flags]
        environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
        if device == "cpu":
            environment.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // self.devices.count("cpu"))))
        return {"args": [sys.executable, TRAIN, self.study.config, *flags], "env": environment}

    def tell(self, cell):
        to_go, seconds = self.study.to_go(self.outcomes), self.study.seconds(self.outcomes)
        left = f", {clock(to_go * seconds / len(self.devices))} left" if seconds else ""
        print(f"{cell}: {loss_words(self.outcomes[cell])}; {to_go} to go{left}", flush=True)


def loss_words(loss):
    return f"val loss {loss:.4f}" if math.isfinite(loss) else "diverged"


def last_line(output):
    lines = output.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "it ended without a word"


def wait_until_free(folder):
    """A run whose ablate.py was killed ends with the next line it prints; until then it holds its folder."""
    while True:
        try:
            with locked(folder):
                return
        except UserError:
            time.sleep(1)


# ---------------------------------------------------------------------------------------------------
# The dry run.


def list_cells(grid):
    """Print every cell that is known so far, its parameters, and how long the rest will take."""
    study, outcomes, at_a_time = grid.study, grid.outcomes, len(grid.devices)
    cells = study.cells(outcomes)
    width = max(len(str(cell)) for cell in cells)
    print(f"{'cell':{width}} {'parameters':>13} {'non-embedding':>13} {'query path':>11}")
    for cell in cells:
        state = "to run" if cell not in outcomes else loss_words(outcomes[cell])
        total, non_embedding, query_path = parameters(study, cell).values()
        print(f"{str(cell):{width}} {total:13,} {non_embedding:13,} {query_path:11,}  {state}")
    if study.tune:
        print("and what it takes for each arm's best rate to lie between two others and have all seeds")
    seconds, to_go = study.seconds(outcomes) or trial(grid, cells[0]), study.to_go(outcomes)
    left = clock(to_go * seconds / at_a_time)
    print(f"at least {to_go} runs to go, of about {clock(seconds)} each: {left} with {at_a_time} at a time")


def parameters(study, cell):
    """{total, non_embedding, query_path}"""
    settings, model_args = study.read(cell)
    vocab_size = train.open_data(settings.dataset, block_size=1).meta["vocab_size"]
    with torch.device("meta"):
        return GPT(GPTConfig(**{"vocab_size": vocab_size, **model_args})).parameter_report()


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
        program = grid.program(cell, grid.devices[0], [*flags, "--eval_interval=6", "--log_interval=1"])
        done = subprocess.run(**program, capture_output=True)
        if done.returncode:
            raise UserError(f"{cell}: {last_line(done.stderr)}")
        return tokens / RunFolder(f"{folder}/run").read_json("summary.json")["tokens_per_second"]


# ---------------------------------------------------------------------------------------------------


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    study, devices, dry_run = read_command(argv)
    if dry_run:
        list_cells(Grid(study, devices))
        return 0
    with locked(study.folder):
        begin(study, shlex.join(["python", "ablate.py", *argv]))
        grid = Grid(study, devices)
        try:
            done = grid.go()
        finally:
            if grid.outcomes:
                report.write(study, grid.outcomes)
    return 0 if done else 143


if __name__ == "__main__":
    run_program(main)
