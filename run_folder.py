"""A run's folder, out/NAME: what training leaves there and what every other program reads.

    config.json    settings as resolved, command, versions, device, commit, data hashes, parameter counts
    metrics.jsonl  one JSON object a line: training steps and evaluations
    ckpt.pt        all that resuming needs: model, optimizer, scaler, state, tokenizer
    best.pt        the model with the lowest validation loss, and its tokenizer
    summary.json   how the run ended

Every file but metrics.jsonl, which only grows, is written under a temporary name and moved into place.
Nothing that is read from it is executed.
"""

import contextlib
import json
import math
import os
import platform
import re
import subprocess
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from command import UserError
from files import locked, new_file
from machine import device_name, world_size
from model import GPT, GPTConfig


class RunFolder:
    def __init__(self, path):
        self.path = Path(path)
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{path} is a file; a run is a folder")

    def __str__(self):
        return str(self.path)

    def holds(self, name):
        return (self.path / name).exists()

    def lock(self):
        """Held by the one process that writes here."""
        return locked(self.path)

    def write_json(self, name, content):
        self.write_text(name, json.dumps(content, indent=1, ensure_ascii=False) + "\n")

    def write_text(self, name, text):
        with new_file(self.path / name) as f:
            f.write(text.encode())

    def read_json(self, name, *keys):
        """The dict in a file; UserError where it is damaged or lacks one of the keys."""
        try:
            content = json.loads((self.path / name).read_text(encoding="utf-8"))
            missing = [key for key in keys if key not in content]
        except (OSError, ValueError, TypeError) as e:
            raise UserError(f"{self.path / name} cannot be read: {e}") from None
        if missing:
            raise UserError(f"{self.path / name} is damaged: it has no {missing[0]}")
        return content

    def begin(self, record, step):
        """Write config.json and take from metrics.jsonl what an earlier sitting logged after this step."""
        for left in (*self.path.glob(".*.tmp"), self.path / "summary.json"):  # by a kill, by an earlier sitting
            left.unlink(missing_ok=True)
        self.write_json("config.json", record)
        try:
            kept = [values for values in self.metrics() if values["step"] <= step]
        except (KeyError, TypeError) as e:
            raise UserError(f"{self.path}/metrics.jsonl is damaged ({e}); repair or delete it") from None
        self.write_text("metrics.jsonl", "".join(json.dumps(values) + "\n" for values in kept))

    def log(self, values):
        """Append a line to metrics.jsonl; what JSON cannot hold (an infinite gradient norm) becomes null."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(values) + "\n")

    def metrics(self):
        """What was logged, a dict a line; a last line that is not whole is left out."""
        path = self.path / "metrics.jsonl"
        try:
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
            return [dict(json.loads(line)) for line in lines if line.endswith("\n")]
        except (ValueError, TypeError) as e:
            raise UserError(f"{path} is damaged ({e}); repair or delete it") from None

    def save(self, name, checkpoint):
        """Write a checkpoint; where that fails, the one that was there stays."""
        path = self.path / name
        try:
            with new_file(path) as f:
                torch.save(checkpoint, f)
                f.flush()
                os.fsync(f.fileno())  # a power cut must not find the one before it gone and this one not there
        except (OSError, RuntimeError) as e:  # torch's own for a file that it could not finish
            reason = e.strerror if isinstance(e, OSError) else e.__cause__ or e.__context__ or e
            kept = "the one before it is kept" if path.exists() else "there is none yet"
            raise UserError(f"{path} could not be written ({str(reason).splitlines()[0]:.150}); {kept}") from None

    def load(self, name):
        """A checkpoint that this class saved, on the CPU."""
        path, checkpoint = self.path / name, load_checkpoint(self.path / name)
        missing = {"model", "config", "tokenizer", "state"} - (
            checkpoint.keys() if isinstance(checkpoint, dict) else set()
        )
        if missing:
            raise UserError(f"{path} is no checkpoint of this project: it has no {', '.join(sorted(missing))}")
        return checkpoint

    def load_model(self, device):
        """The best model, or the last where none is marked best -> (GPT ready to generate, its tokenizer's spec)."""
        name = next((name for name in ("best.pt", "ckpt.pt") if self.holds(name)), None)
        if name is None:
            raise UserError(f"{self.path} holds no trained model (neither best.pt nor ckpt.pt)")
        checkpoint = self.load(name)
        with fitting(self.path / name):
            model = GPT(GPTConfig(**checkpoint["config"]))
            model.load_state_dict(checkpoint["model"])
        return model.to(device).for_generation(), checkpoint["tokenizer"]


def load_checkpoint(path):
    """What torch.save wrote to a file, on the CPU; tensors and plain values alone, nothing is executed."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises many kinds for a file that is not one of its own
        if isinstance(e, (FileNotFoundError, PermissionError, IsADirectoryError)):
            raise UserError(f"{path} cannot be read as a checkpoint: {e.strerror}") from None
        if refused := re.search(r"(?:GLOBAL|class|function) ([\w.]+)", str(e)):
            reason = f"it holds {refused[1]}, and only tensors and plain values are read from a checkpoint"
            raise UserError(f"{path} cannot be read as a checkpoint: {reason}") from None
        reason = str(e).splitlines()[0] if str(e) else "truncated"
        raise UserError(
            f"{path} cannot be read as a checkpoint ({type(e).__name__}: {reason:.150}); it is damaged or not one: "
            "put a good copy in its place"
        ) from None


@contextlib.contextmanager
def fitting(path):
    """What a checkpoint holds is put to use within; where it does not fit together, the file is named."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as e:
        reason = str(e).replace("\n\t", " ").splitlines()[0]
        raise UserError(f"{path} does not fit its own config ({reason:.200}); put a good copy in its place") from None


# ---------------------------------------------------------------------------------------------------
# What config.json records, and what must not differ from it when the run is resumed.


def describe(s, model, data, command):
    """What config.json holds: all that is needed to repeat the run."""
    return {
        "command": command,
        "settings": asdict(s),
        "model": asdict(model.config),
        "parameters": model.parameter_report(),
        "data": {
            "source": data.meta["source"],
            "sha256": {split: data.meta[split]["sha256"] for split in ("train", "val")},
        },
        "device": device_name(s.device),
        "processes": world_size(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "commit": git_commit(),
    }


def git_commit():
    def git(*arguments):
        command = ["git", "-C", Path(__file__).parent, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def check_resume(before, now, may_change):
    """Refuse to go on with a run under settings that would make it another one -> those that did change.

    before, now: what describe told then and tells now; may_change: names of settings.
    """

    def flat(record):
        # Where the run lies and what this command does with it are not properties of the run.
        s = {key: value for key, value in record["settings"].items() if key not in ("out_dir", "resume", "eval_only")}
        sequences = s["batch_size"] * s["gradient_accumulation_steps"]
        return {**s, **record["model"], "sequences in a step": sequences, "data set": record["data"]["sha256"]}

    try:
        before, now = flat(before), flat(now)
    except (KeyError, TypeError, AttributeError):
        raise UserError("the config.json there is not one of a run") from None
    changed = {key: value for key, value in now.items() if before.get(key) != value}
    refused = [f"{key} was {before.get(key)}, now is {changed[key]}" for key in changed if key not in may_change]
    if refused:
        raise UserError(f"a run is resumed with the settings it began with: {'; '.join(refused)}")
    return changed
