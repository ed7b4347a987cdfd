"""The runs of a study: the process of train.py that each is, and the line of runs.jsonl that it ends as."""

import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from model import GPTConfig
from prepare_data import Dataset, prepare_if_small
from study.ngrams import ngram_losses
from study.plan import Run, Study
from study.queries import register
from train import Settings, fit_to_data
from utils.checkpoint import RunFolder, check_resume
from utils.device import StopSignal, resolve
from utils.files import locked, new_file
from utils.settings import UserError, read_command

MAY_DIFFER = {"device", "compile", "peak_tflops", "log_interval", "watch", "wandb_log", "wandb_project"}  # between runs
PLAN = ("config", "arms", "learning_rates", "tuning_seeds", "seeds", "comparisons", "margin", "half_width", "spread")


def load(folder):
    """A study from what it left in its folder."""
    register()
    if not RunFolder(folder).holds("study.json"):
        raise UserError(f"{folder} is no study: it holds no study.json")
    told = RunFolder(folder).read_json("study.json", *PLAN, "planned")
    study = Study(**{key: told[key] for key in PLAN}, planned=told["planned"], folder=folder, devices=[None])
    read(study)
    return study


def settings_of(study, run, device):
    """What train.py makes of a run's flags -> settings, model configuration, data set."""
    settings, config = read_command([study.config, *flags(study, run)], Settings, GPTConfig)
    if study.tuning_seeds and settings.min_lr is not None:
        raise UserError(f"--tune changes the rate, so min_lr={settings.min_lr:g} must not be fixed: --min_lr=auto")
    settings = resolve(replace(settings, device=device))
    prepare_if_small(settings.dataset)
    data = Dataset(settings.dataset, config.block_size)
    fit_to_data(config, settings, data)
    return settings, config, data


def flags(study, run):
    """What a run sets, as flags of train.py."""
    values = {**study.arms[run.arm], "learning_rate": run.learning_rate, "seed": run.seed}
    return [f"--{key}={'auto' if value is None else value}" for key, value in values.items()]


def check(study):
    """Tell a mistake before any work is done; refuse to go on with runs of other settings or other data."""
    seeds = study.tuning_seeds + study.seeds
    runs = [Run(*run) for run in itertools.product(study.arms, study.learning_rates, seeds)]
    names = {str(run) for run in runs}
    if len(names) < len(runs) or any(Path(name).name != name for name in names):
        raise UserError("two runs would have one name, or a name would be a path; choose other values", status=2)
    for run, device in itertools.product(dict.fromkeys([*runs, *study.runs()]), study.devices):
        folder, (settings, config, data) = RunFolder(study.folder / str(run)), settings_of(study, run, device)
        if run not in study.records and not folder.holds("config.json"):
            continue
        record = study.records.get(run) or {"config": folder.read_json("config.json")}  # the latter is under way
        now = {"settings": asdict(settings), "model": asdict(config), "data": {"sha256": data.sha256}}
        try:
            check_resume(record["config"], now, MAY_DIFFER)
        except UserError as e:
            raise UserError(f"{folder}: {e}; choose another --out") from None


def check_plan(study):
    """Once a run that measures is known, what is compared and how stands: arms and comparisons can be added at the end,
    and `planned` tells how many comparisons came before."""
    plan = {key: getattr(study, key) for key in PLAN}
    study.planned = len(study.comparisons)
    before = load(study.folder) if RunFolder(study.folder).holds("study.json") else None
    if before and any(run.seed in before.seeds for run in before.records):
        study.planned = before.planned
        kept = {"arms": {arm: plan["arms"].get(arm) for arm in before.arms}}
        kept["comparisons"] = plan["comparisons"][: len(before.comparisons)]
        for key in PLAN:
            if (was := getattr(before, key)) != kept.get(key, plan[key]):
                raise UserError(
                    f"{study.folder}: {key} was {was}, now is {plan[key]}; a plan stands once runs that measure "
                    "are known (arms and comparisons can be added at the end); choose another --out"
                )


def write_plan(study, command):
    plan = {key: getattr(study, key) for key in (*PLAN, "planned")}
    RunFolder(study.folder).write_json("study.json", {"command": command, **plan})


def read(study):
    """Read the records of the study's own runs (another command may have left others), and ngrams.json where it exists."""
    path, found = study.folder / "runs.jsonl", {}
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            told = json.loads(line)
            run = Run(told["arm"], told["learning_rate"], told["seed"])
            found[run] = {key: told[key] for key in ("config", "curve", "summary")}
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"line {number} of {path} is damaged ({e!r}); repair or delete it") from None
    folder = RunFolder(study.folder)
    if folder.holds("ngrams.json"):
        study.ngrams = {int(n): loss for n, loss in folder.read_json("ngrams.json").items()}
    # A run that is done tells which ones come next: so look again as long as there are more. Always from the beginning: what
    # other runs ask for must not depend on which of them were known when.
    study.records.clear()
    while new := [run for run in study.runs() if run in found and run not in study.records]:
        study.records.update({run: found[run] for run in new})


def count_ngrams(study):
    """Write ngrams.json: the loss on val.bin of n-grams, counted in the tokens that the first measuring seed's runs see, before
    one of them is known; empty where the arms see different tokens."""
    seen, run = set(), Run(study.baseline, study.learning_rates[0], study.seeds[0])
    for arm in study.arms:
        settings, config, data = settings_of(study, run._replace(arm=arm), study.devices[0])
        tokens = settings.max_iters, settings.batch_size * settings.gradient_accumulation_steps, config.block_size
        seen.add((settings.dataset, settings.objective, settings.mask_share, *tokens))
    if len(seen) > 1:
        study.ngrams = {}
    elif not (study.ngrams and any(run.seed in study.seeds for run in study.records)):
        study.ngrams = ngram_losses(data, settings)
    RunFolder(study.folder).write_json("ngrams.json", study.ngrams)


def add(study, run, record):
    """Write a record down; where that is cut short, even by a power cut, runs.jsonl stays as it was."""
    path, line = study.folder / "runs.jsonl", json.dumps({**run._asdict(), **record}) + "\n"
    before = path.read_bytes() if path.exists() else b""
    with new_file(path) as f:
        f.write(before + line.encode())


def go(study):
    """Run what is left, one run at a time on each device -> exit status."""
    running, idle = {}, list(study.devices)
    with StopSignal() as stop:
        try:
            while not stop.number:
                left = [run for run in study.runs() if run not in study.records and run not in running]
                for run in left[: len(idle)]:  # the end of one run may tell which comes next
                    device = idle.pop(0)
                    running[run] = device, start(study, run, device, study.folder / str(run))
                if not running:
                    break
                while not stop.number and all(process.poll() is None for _, process in running.values()):
                    time.sleep(0.1)
                for run, (device, process) in list(running.items()):
                    if process.poll() is not None:
                        del running[run]
                        idle.append(device)
                        end(study, run, process.returncode)
        finally:  # a signal, or a run that failed: the others stop, too
            for run, (_, process) in running.items():
                print(f"stopping {run}: it is saved, and the same command continues", flush=True)
                process.terminate()
            for _, process in running.values():
                process.wait()
    return 128 + stop.number if stop.number else 0


def start(study, run, device, folder, more=()):
    """Begin or resume a run in a folder, where log.txt gets all that it prints -> its process."""
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONIOENCODING": "utf-8", "PYTHONPATH": path}
    own = [f"--out_dir={folder}", f"--device={device or 'auto'}", f"--resume={(folder / 'config.json').exists()}"]
    command = [sys.executable, "-m", "study.queries", study.config, *flags(study, run), *own, *more]
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
    add(study, run, {"config": folder.read_json("config.json"), "curve": curve, "summary": summary})
    read(study)  # it may ask for runs that were recorded before
    check(study)
    shutil.rmtree(folder.path)
    found = f"val loss {summary['final_val_loss']:.4f}" if summary else ""
    failure = study.failure(run) if run in study.records else "not needed after all"
    print(f"{run}: {' '.join(filter(None, (found, failure)))}; {study.to_go()} to go", flush=True)


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
