"""A study: which runs it asks for, the process of train.py that each is, and the line of runs.jsonl it ends as."""

import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from model import GPTConfig
from prepare_data import Dataset, prepare_if_small
from train import Settings
from utils.checkpoint import RunFolder, check_resume
from utils.device import StopSignal, resolve
from utils.files import locked, new_file
from utils.settings import UserError, read_command

TRAIN = Path(__file__).parent.parent / "train.py"
MOST_RATES = 12  # of an arm: --tune gives up after so many
MAY_DIFFER = {"device", "compile", "peak_tflops", "log_interval", "watch", "wandb_log", "wandb_project"}  # between runs


class Run(NamedTuple):
    arm: str
    learning_rate: float
    seed: int

    def __str__(self):
        return f"{self.arm}-lr{self.learning_rate:g}-seed{self.seed}"


def final_loss(record):
    """The validation loss at the end of a run; infinite where it diverged."""
    return record["summary"]["final_val_loss"] if record["summary"] else math.inf


@dataclass
class Study:
    """What is compared, and what is known so far."""

    config: str  # the config file that every run starts from
    arms: dict  # name -> the settings that the arm changes; the first is the baseline
    learning_rates: list
    tuning_seeds: list  # those that find the rates; empty: every rate is run with every seed
    seeds: list  # those that measure
    folder: Path  # holds study.json, runs.jsonl, the report, and a folder for each run under way
    devices: list  # one run at a time on each; None: what train.py picks
    records: dict = field(default_factory=dict)  # Run -> its config.json, training curve and summary.json

    def runs(self):
        """The runs of the study, as far as the records can tell."""
        if not self.tuning_seeds:
            return [Run(*run) for run in itertools.product(self.arms, self.learning_rates, self.seeds)]
        runs, order = [], [*self.tuning_seeds, *self.seeds]
        for arm in self.arms:
            tuning, best = self.search(arm)
            runs += tuning + [Run(arm, best, seed) for seed in self.seeds if best]
        return sorted(runs, key=lambda run: order.index(run.seed))  # so that the arms stay level

    def search(self, arm):
        """The runs of an arm that look for its best rate, and that rate once it is known, else None."""
        first, by_rate = self.tuning_seeds[0], self.losses_by_rate(arm)
        rates = sorted({*self.learning_rates, *by_rate})
        done = [run for run in self.records if run.arm == arm and run.seed in self.tuning_seeds]
        new = [Run(arm, rate, first) for rate in rates if rate not in by_rate]
        if new:
            return done + new, None
        best = min(rates, key=lambda rate: statistics.fmean(by_rate[rate]))
        if best in (rates[0], rates[-1]) and len(rates) < MOST_RATES:  # not yet between two others
            return [*done, Run(arm, best / 2 if best == rates[0] else best * 2, first)], None
        # The best so far gets the next seed, and then another rate may have the lowest mean.
        new = [Run(arm, best, seed) for seed in self.tuning_seeds if Run(arm, best, seed) not in self.records]
        return done + new[:1], None if new else best

    def to_go(self):
        """How many runs are left; under --tune at least so many."""
        left = sum(run not in self.records for run in self.runs())
        if self.tuning_seeds:
            left += len(self.seeds) * sum(self.search(arm)[1] is None for arm in self.arms)
        return left

    def losses_by_rate(self, arm):
        """{rate: losses with the seeds that choose the arm's rate}; without --tune, where all of them are known."""
        seeds, by_rate = self.tuning_seeds or self.seeds, {}
        for run, record in self.records.items():
            if run.arm == arm and run.seed in seeds:
                by_rate.setdefault(run.learning_rate, []).append(final_loss(record))
        return {rate: found for rate, found in by_rate.items() if self.tuning_seeds or len(found) == len(seeds)}

    def best_rate(self, arm):
        """The rate with the lowest mean loss so far; None where each one diverged with some seed."""
        means = {rate: statistics.fmean(losses) for rate, losses in self.losses_by_rate(arm).items()}
        return min((rate for rate in means if math.isfinite(means[rate])), key=means.get, default=None)

    def final_losses(self, arm):
        """{seed: validation loss} of the runs that measure at the best rate and did not diverge."""
        runs = {seed: Run(arm, self.best_rate(arm), seed) for seed in self.seeds}
        losses = {seed: final_loss(self.records[run]) for seed, run in runs.items() if run in self.records}
        return {seed: loss for seed, loss in losses.items() if math.isfinite(loss)}

    def flags(self, run):
        """What the run sets, as flags of train.py."""
        values = {**self.arms[run.arm], "learning_rate": run.learning_rate, "seed": run.seed}
        return [f"--{key}={'auto' if value is None else value}" for key, value in values.items()]

    def expected(self, run, device):
        """What the run's config.json must say of its settings, model and data."""
        settings, config = read_command([self.config, *self.flags(run)], Settings, GPTConfig)
        if self.tuning_seeds and settings.min_lr is not None:
            raise UserError(f"--tune changes the rate, so min_lr={settings.min_lr:g} must not be fixed: --min_lr=auto")
        settings = resolve(replace(settings, device=device))
        prepare_if_small(settings.dataset)
        data = Dataset(settings.dataset, config.block_size)
        config.vocab_size = config.vocab_size or data.vocab_size
        return {"settings": asdict(settings), "model": asdict(config), "data": {"sha256": data.sha256}}

    def check(self):
        """Tell a mistake before any work is done; refuse to go on with runs of other settings or other data."""
        seeds = self.tuning_seeds + self.seeds
        runs = [Run(*run) for run in itertools.product(self.arms, self.learning_rates, seeds)]
        names = {str(run) for run in runs}
        if len(names) < len(runs) or any(Path(name).name != name for name in names):
            raise UserError("two runs would have one name, or a name would be a path; choose other values", status=2)
        for run, device in itertools.product([*runs, *self.runs()], self.devices):
            folder, now = RunFolder(self.folder / str(run)), self.expected(run, device)
            if run not in self.records and not folder.holds("config.json"):
                continue
            record = self.records.get(run) or {"config": folder.read_json("config.json")}  # the latter is under way
            try:
                check_resume(record["config"], now, MAY_DIFFER)
            except UserError as e:
                raise UserError(f"{folder}: {e}; choose another --out") from None

    def read(self):
        """Read the records of the study's own runs; another command may have left others in runs.jsonl."""
        path, found = self.folder / "runs.jsonl", {}
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        for number, line in enumerate(lines, 1):
            try:
                told = json.loads(line)
                run = Run(told["arm"], told["learning_rate"], told["seed"])
                found[run] = {key: told[key] for key in ("config", "curve", "summary")}
            except (ValueError, KeyError, TypeError) as e:
                raise UserError(f"line {number} of {path} is damaged ({e!r}); repair or delete it") from None
        # Under --tune, a run that is done tells which ones come next: so look again as long as there are more.
        while new := [run for run in self.runs() if run in found and run not in self.records]:
            self.records.update({run: found[run] for run in new})

    def add(self, run, record):
        """Write a record down; where that is cut short, even by a power cut, runs.jsonl stays as it was."""
        path, line = self.folder / "runs.jsonl", json.dumps({**run._asdict(), **record}) + "\n"
        before = path.read_bytes() if path.exists() else b""
        with new_file(path) as f:
            f.write(before + line.encode())
        self.records[run] = record


def go(study):
    """Run what is left, one run at a time on each device -> exit status."""
    running, idle = {}, list(study.devices)
    with StopSignal() as stop:
        try:
            while not stop.number:
                for run, (device, process) in list(running.items()):
                    if process.poll() is not None:
                        del running[run]
                        idle.append(device)
                        end(study, run, process.returncode)
                left = [run for run in study.runs() if run not in study.records and run not in running]
                for run in left[: len(idle)]:  # under --tune the end of one run may tell which comes next
                    device = idle.pop(0)
                    running[run] = device, start(study, run, device, study.folder / str(run))
                if not running:
                    break
                time.sleep(0.1)
        finally:  # a signal, or a run that failed: the others stop, too
            for run, (_, process) in running.items():
                print(f"stopping {run}: it is saved, and the same command continues", flush=True)
                process.terminate()
            for _, process in running.values():
                process.wait()
    return 128 + stop.number if stop.number else 0


def start(study, run, device, folder, flags=()):
    """Begin or resume a run in a folder, where log.txt gets all that it prints -> its process."""
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8"}
    own = [f"--out_dir={folder}", f"--device={device or 'auto'}", f"--resume={(folder / 'config.json').exists()}"]
    command = [sys.executable, TRAIN, study.config, *study.flags(run), *own, *flags]
    if device == "cpu" and len(study.devices) > 1:  # runs side by side share the processors
        environment.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // study.devices.count("cpu"))))
    folder.mkdir(parents=True, exist_ok=True)
    # In a session of its own it does not get the Ctrl-C that is meant for this program.
    with open(folder / "log.txt", "wb") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)


def end(study, run, status):
    """Write down what a run that has ended found, and delete its folder; UserError where it failed."""
    folder = RunFolder(study.folder / str(run))
    metrics, summary = folder.metrics(), None
    if folder.holds("summary.json"):
        summary = folder.read_json("summary.json", "final_val_loss", "seconds", "tokens_per_second")
    elif not (metrics and metrics[-1].get("diverged")):
        log = folder.path / "log.txt"
        raise UserError(f"{run}: exit status {status}; {last_line(log)} ({log} tells more)")
    curve = [[line["step"], line["train_loss"], line["grad_norm"]] for line in metrics if "train_loss" in line]
    study.add(run, {"config": folder.read_json("config.json"), "curve": curve, "summary": summary})
    shutil.rmtree(folder.path)
    found = f"val loss {summary['final_val_loss']:.4f}" if summary else "diverged"
    print(f"{run}: {found}; {study.to_go()} to go", flush=True)


def last_line(log):
    return log.read_text(encoding="utf-8", errors="replace").strip().split("\n")[-1]


def tidy(study):
    """After a kill: wait for runs that are still at work, and delete the folders of those that are recorded."""
    for run in study.runs():
        folder = study.folder / str(run)
        while folder.exists():
            try:
                with locked(folder):
                    break
            except UserError:
                print(f"waiting for a run that is still at work in {folder}", flush=True)
                time.sleep(5)
        if run in study.records:
            shutil.rmtree(folder, ignore_errors=True)
