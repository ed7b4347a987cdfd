"""The runs of a study: each is a process of train.py, and ends as a line of runs.jsonl."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace

from model import GPTConfig
from study.ngrams import ngram_losses
from study.plan import PLAN, Run, Study
from study.queries import register
from train import Settings, fit_to_data
from utils.checkpoint import MAY_CHANGE, RunFolder, check_resume
from utils.data import Dataset, prepare_if_small
from utils.device import resolve, stop_signals
from utils.files import locked, new_file
from utils.settings import UserError, read_command

# The settings in which an earlier run of a study may differ.
MAY_DIFFER = MAY_CHANGE - {"max_iters", "eval_interval", "dtype"}
# The settings that decide which tokens a run is trained on, and what it predicts.
TOKENS = ("dataset", "objective", "mask_share", "max_iters", "block_size", "batch_size")
TOKENS += ("gradient_accumulation_steps",)


def load(folder):
    """The study in a folder, from its study.json, ngrams.json and runs.jsonl."""
    register()
    saved = RunFolder(folder).read_json("study.json", *PLAN)
    study = Study(**{key: saved[key] for key in PLAN}, folder=folder, devices=[None])
    read(study)
    return study


def read(study):
    """Read the n-grams and the study's own records in its folder.

    UserError if a measuring run is known and the plan has changed; arms and comparisons may be
    added at the end.
    """
    folder = RunFolder(study.folder)
    if folder.holds("ngrams.json"):
        study.ngrams = {int(n): loss for n, loss in folder.read_json("ngrams.json").items()}
    if not folder.holds("runs.jsonl"):
        return
    now = {key: getattr(study, key) for key in PLAN}
    before = folder.read_json("study.json", *PLAN) if folder.holds("study.json") else dict(now)
    is_measured = False
    for line in (study.folder / "runs.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        run = Run(record.pop("arm"), record.pop("learning_rate"), record.pop("seed"))
        is_measured |= run.arm in before["arms"] and run.seed in before["seeds"]
        if run.arm in study.arms and run.seed in study.tuning_seeds + study.seeds:
            study.records[run] = record
    now["arms"] = dict(list(study.arms.items())[: len(before["arms"])])
    now["comparisons"] = study.comparisons[: len(before["comparisons"])]
    for key in PLAN:
        if is_measured and now[key] != before[key]:
            change = f"{study.folder}: {key} was {before[key]}, now is {now[key]}"
            rule = "a plan stands once measuring runs are known, only arms and comparisons can be"
            raise UserError(f"{change}; {rule} added at the end; choose another --out")


def flags(study, run):
    """The settings of a run as flags of train.py."""
    values = {**study.arms[run.arm], "learning_rate": run.learning_rate, "seed": run.seed}
    return [f"--{key}={'auto' if value is None else value}" for key, value in values.items()]


def settings_of(study, run, device):
    """What train.py makes of a run's flags -> settings, model configuration, data set."""
    settings, config = read_command([study.config, *flags(study, run)], Settings, GPTConfig)
    if study.tuning_seeds and settings.min_lr is not None:
        problem = f"--tune changes the rate, so min_lr={settings.min_lr:g} must not be fixed"
        raise UserError(f"{problem}: --min_lr=auto")
    settings = resolve(replace(settings, device=device))
    prepare_if_small(settings.dataset)
    data = Dataset(settings.dataset, config.block_size)
    fit_to_data(config, settings, data)
    return settings, config, data


def check(study, runs):
    """Refuse settings that cannot run, and earlier runs that have other settings or other data."""
    for run, device in itertools.product(runs, study.devices):
        settings, config, data = settings_of(study, run, device)
        now = {"settings": asdict(settings), "model": asdict(config)}
        now["data"] = {"sha256": data.sha256}
        folder = RunFolder(study.folder / str(run))
        if run in study.records:
            check_resume(study.records[run]["config"], now, MAY_DIFFER)
        elif folder.holds("config.json"):
            check_resume(folder.read_json("config.json"), now, MAY_DIFFER)


def count_ngrams(study):
    """Write ngrams.json: what n-gram counts of the first measuring seed's tokens reach.

    It is empty if the arms see different tokens, and stands once a measuring run is known.
    """
    first, *others = ([arm.get(key) for key in TOKENS] for arm in study.arms.values())
    if any(other != first for other in others):
        study.ngrams = {}
    elif not (study.ngrams and any(run.seed in study.seeds for run in study.records)):
        run = Run(next(iter(study.arms)), study.learning_rates[0], study.seeds[0])
        settings, _, data = settings_of(study, run, study.devices[0])
        study.ngrams = ngram_losses(data, settings)
    RunFolder(study.folder).write_json("ngrams.json", study.ngrams)


def tidy(study):
    """After a kill: wait for runs that are still at work; delete the folders of recorded ones."""
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


def go(study):
    """Run what is left, one run at a time on each device -> exit status."""
    running = {}  # run -> its device and its process
    idle = list(study.devices)
    with stop_signals() as stop:
        try:
            while not stop:
                known = study.records.keys() | running.keys()
                left = [run for run in study.runs() if run not in known] if idle else []
                for run in left[: len(idle)]:
                    device = idle.pop(0)
                    running[run] = device, start(study, run, device)
                if not running:
                    break
                for run, (device, process) in list(running.items()):
                    if process.poll() is not None:
                        del running[run]
                        idle.append(device)
                        end(study, run, process.returncode)
                time.sleep(0.1)
        finally:  # after a signal, or if a run failed
            for run, (_, process) in running.items():
                print(f"stopping {run}: it is saved, and the same command continues", flush=True)
                process.terminate()
            for _, process in running.values():
                process.wait()
    return 128 + stop[0] if stop else 0


def start(study, run, device):
    """Begin or resume a run in its folder, where log.txt gets its output -> its process."""
    folder = study.folder / str(run)
    resume = (folder / "config.json").exists()
    own = [f"--out_dir={folder}", f"--device={device or 'auto'}", f"--resume={resume}"]
    command = [sys.executable, "-m", "study.queries", study.config, *flags(study, run), *own]
    env = dict(os.environ)
    if study.devices.count("cpu") > 1:  # runs side by side share the processors
        threads = max(1, os.cpu_count() // study.devices.count("cpu"))
        env.setdefault("OMP_NUM_THREADS", str(threads))
    folder.mkdir(parents=True, exist_ok=True)
    # A session of its own keeps Ctrl-C, which is meant for this program, from the run.
    with open(folder / "log.txt", "wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=log, env=env, start_new_session=True)


def end(study, run, status):
    """Record a run that has ended, and delete its folder; UserError if it failed."""
    folder = RunFolder(study.folder / str(run))
    metrics = folder.metrics()
    summary = None
    if status == 0:
        last = [line for line in metrics if "val_loss" in line][-1]
        summary = {"final_val_loss": last["val_loss"], "steps": last["step"]}
        summary["seconds"] = last["seconds"]
    elif not (metrics and metrics[-1].get("diverged")):
        raise UserError(f"{run}: exit status {status}; its output is in {folder.path / 'log.txt'}")
    check(study, [run])  # its config file may have changed meanwhile
    steps = [line for line in metrics if "train_loss" in line]
    curve = [[line["step"], line["train_loss"], line["grad_norm"]] for line in steps]
    record = {"config": folder.read_json("config.json"), "curve": curve, "summary": summary}
    path = study.folder / "runs.jsonl"
    before = path.read_bytes() if path.exists() else b""
    line = json.dumps({**run._asdict(), **record}) + "\n"
    with new_file(path) as f:  # even a power cut leaves the old records whole
        f.write(before + line.encode())
    study.records[run] = record
    shutil.rmtree(folder.path)
    print(f"{run}: val loss {study.result(run)}; {study.to_go()} to go", flush=True)
