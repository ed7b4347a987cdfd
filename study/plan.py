"""A study: the runs that it asks for, and the records of those that are done, a line each in its runs.jsonl."""

import itertools
import json
import math
import os
import statistics
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from model import GPTConfig
from prepare_data import Dataset, prepare_if_small
from train import Settings
from utils.checkpoint import RunFolder, check_resume
from utils.device import resolve
from utils.files import new_file
from utils.settings import UserError, read_command

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
    return math.inf if record["summary"] is None else record["summary"]["final_val_loss"]


def read_run(folder):
    """The record of a run from its folder; None where it is not done."""
    metrics, summary = folder.metrics(), None
    if folder.holds("summary.json"):
        summary = folder.read_json("summary.json", "final_val_loss", "seconds", "tokens_per_second")
    elif not (metrics and metrics[-1].get("diverged")):
        return None
    curve = [[line["step"], line["train_loss"], line["grad_norm"]] for line in metrics if "train_loss" in line]
    return {"config": folder.read_json("config.json"), "curve": curve, "summary": summary}


@dataclass
class Study:
    """What is compared, and what is known so far."""

    config: str  # the config file that every run starts from
    arms: dict  # name -> the settings that the arm changes; the first is the baseline
    learning_rates: list
    tuning_seeds: list  # those that find the rates; empty: every rate is run with every seed
    seeds: list  # those that measure
    folder: Path  # holds study.json, runs.jsonl, the report, and a folder for each run under way
    records: dict = field(default_factory=dict)  # Run -> its config.json, training curve and summary.json

    # What there is to run.

    def runs(self):
        """The runs of the study, as far as the records can tell."""
        if not self.tuning_seeds:
            return self.at_given_rates(self.seeds)
        runs, order = [], [*self.tuning_seeds, *self.seeds]
        for arm in self.arms:
            tuning, best = self.search(arm)
            runs += tuning + [Run(arm, best, seed) for seed in self.seeds if best]
        return sorted(runs, key=lambda run: order.index(run.seed))  # so that the arms stay level

    def at_given_rates(self, seeds):
        return [Run(*run) for run in itertools.product(self.arms, self.learning_rates, seeds)]

    def search(self, arm):
        """The runs of an arm that look for its best rate, and that rate once it is known, else None."""
        first, by_rate = self.tuning_seeds[0], self.losses_by_rate(arm)
        rates = sorted(set(self.learning_rates) | set(by_rate))
        runs = [Run(arm, rate, seed) for rate in rates for seed in self.tuning_seeds]
        runs = [run for run in runs if run in self.records or run.seed == first]
        if any(run not in self.records for run in runs):
            return runs, None
        best = min(rates, key=lambda rate: statistics.fmean(by_rate[rate]))
        if best in (rates[0], rates[-1]) and len(rates) < MOST_RATES:  # not yet between two others
            return [*runs, Run(arm, best / 2 if best == rates[0] else best * 2, first)], None
        # The best so far gets the next seed, and then another rate may have the lowest mean.
        left = [Run(arm, best, seed) for seed in self.tuning_seeds if Run(arm, best, seed) not in self.records]
        return runs + left[:1], None if left else best

    def to_go(self):
        """How many runs are left; under --tune at least so many."""
        left = sum(run not in self.records for run in self.runs())
        if self.tuning_seeds:
            left += len(self.seeds) * sum(self.search(arm)[1] is None for arm in self.arms)
        return left

    # What was found.

    def losses_by_rate(self, arm):
        """{rate: losses with the seeds that choose the arm's rate}; without --tune, where all of them are known."""
        by_rate = {}
        for run, record in self.records.items():
            if run.arm == arm and run.seed in (self.tuning_seeds or self.seeds):
                by_rate.setdefault(run.learning_rate, []).append(final_loss(record))
        if not self.tuning_seeds:
            by_rate = {rate: losses for rate, losses in by_rate.items() if len(losses) == len(self.seeds)}
        return by_rate

    def best_rate(self, arm):
        """The rate with the lowest mean loss so far; None where each one diverged with some seed."""
        means = {rate: statistics.fmean(losses) for rate, losses in self.losses_by_rate(arm).items()}
        finite = [rate for rate in means if math.isfinite(means[rate])]
        return min(finite, key=means.get, default=None)

    def measured(self, arm):
        """{seed: record} of the runs that measure at the best rate and did not diverge."""
        runs = [Run(arm, self.best_rate(arm), seed) for seed in self.seeds]
        return {run.seed: self.records[run] for run in runs if run in self.records and self.records[run]["summary"]}

    def final_losses(self, arm):
        """{seed: validation loss} of the same runs."""
        return {seed: final_loss(record) for seed, record in self.measured(arm).items()}

    def training_curves(self, arm):
        """{seed: {step: training loss}} of the same runs."""
        runs = self.measured(arm).items()
        return {seed: {step: loss for step, loss, _ in record["curve"]} for seed, record in runs}

    # The runs on the disk.

    def run_folder(self, run):
        return RunFolder(self.folder / str(run))

    def flags(self, run):
        """What the run sets, as flags of train.py."""
        values = {**self.arms[run.arm], "learning_rate": run.learning_rate, "seed": run.seed}
        return [f"--{key}={'auto' if value is None else value}" for key, value in values.items()]

    def expected(self, run, device):
        """What the run's config.json must say of its settings, model and data. device: None where it is left open."""
        settings, config = read_command([self.config, *self.flags(run)], Settings, GPTConfig)
        if self.tuning_seeds and settings.min_lr is not None:
            raise UserError(f"--tune changes the rate, so min_lr={settings.min_lr:g} must not be fixed: --min_lr=auto")
        settings = resolve(replace(settings, device=device or settings.device))
        prepare_if_small(settings.dataset)
        data = Dataset(settings.dataset, config.block_size)
        config.vocab_size = config.vocab_size or data.vocab_size
        return {"settings": asdict(settings), "model": asdict(config), "data": {"sha256": data.sha256}}

    def check(self, devices):
        """Tell a mistake before any work is done; refuse to go on with runs of other settings or other data."""
        planned = self.at_given_rates(self.tuning_seeds + self.seeds)
        names = {Path(str(run)).name for run in planned}
        if len(names) < len(planned) or any(str(run) not in names for run in planned):
            raise UserError("two runs would have one name, or a name would be a path; choose other values", status=2)
        for run, device in itertools.product([*planned, *self.runs()], devices):
            folder, now = self.run_folder(run), self.expected(run, device)
            before = now
            if run in self.records:
                before = self.records[run]["config"]
            elif folder.holds("config.json"):  # it is under way
                before = folder.read_json("config.json")
            try:
                check_resume(before, now, MAY_DIFFER)
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
            f.flush()
            os.fsync(f.fileno())  # the run's own folder is deleted next
        self.records[run] = record
