"""A run's folder, out/NAME: training writes it, and every other program reads it.

    config.json    resolved settings, command, versions, device, commit, data hashes, parameters
    metrics.jsonl  one JSON object a line: training steps and evaluations
    ckpt.pt        the last checkpoint, from which --resume continues
    best.pt        the model with the lowest validation loss

metrics.jsonl grows by lines; every other file appears whole. Nothing that is read is executed.
"""

import contextlib
import json
import math
import platform
import shlex
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from utils.device import barrier, device_name, world_size
from utils.files import locked, new_file
from utils.settings import UserError

RUN_FILES = ("config.json", "ckpt.pt", "best.pt")  # a folder with one of these holds a run
# What may differ in a run that is resumed: nothing here changes what a step computes, apart from
# rounding. batch_size and gradient_accumulation_steps may change where their product does not.
MAY_CHANGE = {"out_dir", "resume", "eval_only", "max_iters", "eval_interval", "log_interval"}
MAY_CHANGE |= {"batch_size", "gradient_accumulation_steps", "device", "dtype", "compile"}
MAY_CHANGE |= {"wandb_log", "wandb_project"}


class RunFolder:
    """out/NAME. With writes=False (other ranks than 0, or evaluation alone) it is only read."""

    def __init__(self, path, writes=True):
        self.path = Path(path)
        self.writes = writes
        self.wandb = None

    def holds(self, name):
        return (self.path / name).exists()

    def write_json(self, name, content):
        self.write_text(name, json.dumps(content, indent=1) + "\n")

    def write_text(self, name, text):
        if self.writes:
            with new_file(self.path / name) as f:
                f.write(text.encode())

    def read_json(self, name, *keys):
        """The dict in a JSON file, which must have the keys. UserError where it is damaged."""
        path = self.path / name
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            return content | {key: content[key] for key in keys}
        except (ValueError, KeyError, TypeError) as e:
            raise UserError(f"{path} is damaged ({type(e).__name__}: {e})") from None

    @contextlib.contextmanager
    def open(self, record, settings):
        """Begin a run, or continue it with --resume -> what ckpt.pt holds, or None.

        record is what `describe` returned. UserError where the folder holds another run, or where
        another process writes in it.
        """
        is_run = any(map(self.holds, RUN_FILES))
        if is_run and not settings.resume:
            raise UserError(f"{self.path} holds a run: --resume it, or choose another --out_dir")
        if settings.resume and not is_run:
            raise UserError(f"{self.path} holds no run to resume")
        checkpoint = None
        step = -1
        if is_run:
            first = self.read_json("config.json", "settings", "model", "data")
            check_resume(first, record)
            if self.holds("ckpt.pt"):  # a run that was stopped before its first one begins again
                checkpoint = self.load("ckpt.pt")
                step = checkpoint["state"]["step"] or -1  # an imported model starts at step 0
            session = {"at_step": step, **record}
            record = {**first, "resumed": [*first.get("resumed", []), session]}
        barrier()  # every process has seen the folder as it was
        with locked(self.path) if self.writes else contextlib.nullcontext():
            if self.writes and settings.wandb_log:
                import wandb

                names = {"project": settings.wandb_project, "name": self.path.name}
                self.wandb = wandb.init(config=record, **names)
            self.write_json("config.json", record)
            # A run continues after its checkpoint: what was logged later will come again.
            lines = [json.dumps(values) + "\n" for values in self.metrics(until=step)]
            self.write_text("metrics.jsonl", "".join(lines))
            try:
                yield checkpoint
            finally:
                if self.wandb:
                    self.wandb.finish()

    def log(self, step, **values):
        """Append a line to metrics.jsonl; a number that JSON lacks becomes null."""
        if not self.writes:
            return
        for name, value in values.items():
            if isinstance(value, float) and not math.isfinite(value):
                values[name] = None
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps({"step": step, **values}) + "\n")
        if self.wandb:
            self.wandb.log(values, step=step)

    def metrics(self, until=math.inf):
        """The lines of metrics.jsonl up to a step, as dicts, but not a half-written last one."""
        if not self.holds("metrics.jsonl"):
            return []
        lines = (self.path / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        logged = [json.loads(line) for line in lines if line.endswith("\n")]
        return [values for values in logged if values["step"] <= until]

    def save(self, name, checkpoint):
        """Write a checkpoint."""
        if self.writes:
            with new_file(self.path / name) as f:
                torch.save(checkpoint, f)

    def load(self, name):
        """A checkpoint that train.py has saved, on the CPU."""
        return load_checkpoint(self.path / name, "model", "config", "tokenizer", "state")


def load_checkpoint(path, *keys):
    """The dict, with the keys, that torch.save wrote. No code in it is executed."""
    with open(path, "rb") as f:
        try:
            checkpoint = torch.load(f, map_location="cpu", weights_only=True)
            return checkpoint | {key: checkpoint[key] for key in keys}
        except Exception as e:  # torch raises many kinds for a file that is not its own
            reason = " ".join(f"{type(e).__name__}: {e}".split())
            raise UserError(f"{path} is damaged, or no checkpoint ({reason:.200})") from None


def describe(settings, model, data):
    """What config.json holds: all that is needed to repeat the run."""
    versions = {"torch": torch.__version__, "numpy": np.__version__}
    return {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "settings": asdict(settings),
        "model": asdict(model.config),
        "parameters": model.parameter_report(),
        "data": {"source": data.source, "sha256": data.sha256},
        "device": device_name(settings.device),
        "processes": world_size(),
        "versions": {"python": platform.python_version(), **versions},
        "commit": git_commit(),
    }


def git_commit():
    """The commit of this code, with -dirty where a file was changed since; None without git."""
    options = {"cwd": Path(__file__).parent.parent, "capture_output": True, "text": True}
    code = ["--", ".", ":(exclude)study/results"]  # the records grow while a study runs
    with contextlib.suppress(OSError):
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **options).stdout.strip()
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD", *code], **options).returncode
        return f"{commit}{'-dirty' if changed else ''}" if len(commit) == 40 else None


def check_resume(before, now, may_change=MAY_CHANGE):
    """UserError where two records of `describe` differ in more than may change."""
    before, now = (
        {**record["settings"], **record["model"], "data set": record["data"]["sha256"]}
        for record in (before, now)
    )
    for values in (before, now):
        values["sequences in a step"] = values["batch_size"] * values["gradient_accumulation_steps"]
    names = before.keys() & now.keys() - may_change
    changed = [name for name in now if name in names and now[name] != before[name]]
    if changed:
        words = "; ".join(f"{name} was {before[name]}, now is {now[name]}" for name in changed)
        raise UserError(f"a run is resumed with the settings it began with: {words}")
