"""A run's folder, out/NAME: what training leaves there and what every other program reads.

    config.json    settings as resolved, command, versions, device, commit, data hashes, parameter counts
    metrics.jsonl  one JSON object a line: training steps and evaluations
    ckpt.pt        all that resuming needs: model, optimizer, scaler, state, tokenizer
    best.pt        the model with the lowest validation loss, and its tokenizer
    summary.json   how the run ended

Every file but metrics.jsonl, which grows by lines, appears whole. Nothing that is read is executed.
"""

import contextlib
import json
import math
import platform
import re
import signal
import subprocess
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch

from utils.device import barrier, device_name, peak_memory, print0, world_size
from utils.files import locked, new_file
from utils.settings import UserError, clock, out_of_memory

# What may differ when a run is resumed: nothing here changes what a step computes, but for rounding.
# The two factors of a step's size may change where their product does not.
MAY_CHANGE = {"max_iters", "batch_size", "gradient_accumulation_steps", "eval_interval", "log_interval", "watch"}
MAY_CHANGE |= {"wandb_log", "wandb_project", "device", "dtype", "compile", "peak_tflops"}
# Settings that the config.json of older runs lacks, with the values that those runs had.
BEFORE_THERE_WAS_A_CHOICE = {"objective": "next", "mask_share": 0.15}
# What the loss on val.bin and its exponential are called; in JSON they are val_loss and perplexity for both objectives.
NAMES = {"next": ("val loss", "perplexity"), "masked": ("masked-token loss", "masked-token perplexity")}


class RunFolder:
    """out/NAME. Where writes is false (every process but one, and evaluation alone), nothing in it is changed."""

    def __init__(self, path, writes=True):
        self.path, self.writes, self.wandb, self.names = Path(path), writes, None, NAMES["next"]
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{path} is a file; a run is a folder")

    def __str__(self):
        return str(self.path)

    def holds(self, name):
        return (self.path / name).exists()

    def holds_a_run(self):
        """Whether a run was begun here, or a checkpoint was put here."""
        return any(map(self.holds, ("config.json", "ckpt.pt", "best.pt")))

    @contextlib.contextmanager
    def lock(self):  # held by the one process that writes here; at its end wandb has all that was logged
        with locked(self.path) if self.writes else contextlib.nullcontext():
            yield
        if self.wandb:
            self.wandb.finish()

    def write_json(self, name, content):
        self.write_text(name, json.dumps(content, indent=1) + "\n")

    def write_text(self, name, text):
        if self.writes:
            with new_file(self.path / name) as f:
                f.write(text.encode())

    def read_json(self, name, *keys):
        """The dict in a file, which must have the keys."""
        with reading(self.path / name, "JSON"):
            content = json.loads((self.path / name).read_text(encoding="utf-8"))
            return content | {key: content[key] for key in keys}

    def begin(self, record, settings):
        """Begin the run that record, from `describe`, tells of, or go on with it -> its checkpoint or None."""
        exists = self.holds_a_run()
        if exists != settings.resume:
            what = "a run: --resume it, choose another --out_dir, or delete it" if exists else "no run to resume"
            raise UserError(f"{self} holds {what}")
        checkpoint, step, self.names = None, -1, NAMES[settings.objective]
        if exists:
            first = self.read_json("config.json")
            changed = check_resume(first, record)
            if self.holds("ckpt.pt"):  # else it was stopped before the first one, and begins again
                checkpoint = self.load("ckpt.pt")
                with reading(self.path / "ckpt.pt"):
                    step = checkpoint["state"]["step"] if checkpoint["state"]["val"] else -1
            resumed = {key: record[key] for key in ("command", "device", "processes", "versions", "commit")}
            record = {**first, "resumed": [*first.get("resumed", []), {**resumed, "at_step": step, "changed": changed}]}
        if settings.wandb_log and self.writes:
            self.wandb = start_wandb(settings, record)
        barrier()  # every process has seen the folder as it was
        if self.writes:
            self.write_json("config.json", record)
            for left in (*self.path.glob(".*.tmp"), self.path / "summary.json"):  # by a killed or finished run
                left.unlink(missing_ok=True)
            kept = [json.dumps(values) + "\n" for values in self.metrics(until=step)]
            self.write_text("metrics.jsonl", "".join(kept))
        return checkpoint

    def log(self, values):
        """Append a line to metrics.jsonl; what JSON cannot hold (an infinite gradient norm) becomes null."""
        values = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        if self.writes:
            try:
                with open(self.path / "metrics.jsonl", "a", encoding="utf-8") as f:
                    f.write(json.dumps(values) + "\n")
            except OSError as e:
                problem = f"{self.path / 'metrics.jsonl'} could not be written ({e.strerror})"
                raise UserError(f"{problem}; mend that, and --resume goes on from the last checkpoint") from None
        if self.wandb:
            names = dict(zip(("val_loss", "perplexity"), (re.sub("[ -]", "_", name) for name in self.names)))
            self.wandb.log({names.get(key, key): value for key, value in values.items()}, step=values["step"])

    def metrics(self, until=math.inf):
        """What was logged until a step, a dict a line; a last line that is not whole is left out."""
        path = self.path / "metrics.jsonl"
        with reading(path, "JSON lines"):
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.exists() else []
            logged = [json.loads(line) for line in lines if line.endswith("\n")]
            return [values for values in logged if values["step"] <= until]

    def save(self, name, checkpoint):
        """Write a checkpoint; where that fails, the one that was there stays."""
        path = self.path / name
        torch.serialization.set_crc32_options(False)  # the sum that nothing reads takes most of the time
        try:
            if self.writes:
                with new_file(path) as f:
                    torch.save(checkpoint, f)
        except (OSError, RuntimeError) as e:  # torch's own for a file that it could not finish
            reason = " ".join(str(e.__cause__ or e.__context__ or e).split())
            kept = "the one before it is kept" if path.exists() else "there is none yet"
            raise UserError(f"{path} could not be written ({reason:.150}); {kept}") from None

    def load(self, name):
        """A checkpoint that this class saved, on the CPU."""
        return load_checkpoint(self.path / name, "model", "config", "tokenizer", "state")

    def restore(self, checkpoint, model, optimizer, scaler, state):
        """Put a checkpoint, where there is one, into what is being trained; without an optimizer in it (imported) that stays
        fresh."""
        if not checkpoint:
            return
        with reading(self.path / "ckpt.pt"):
            model.load_state_dict(checkpoint["model"])
            if "optimizer" in checkpoint:
                optimizer.load_state_dict(checkpoint["optimizer"])
            if scaler.is_enabled() and checkpoint.get("scaler"):  # float16 before, and now
                scaler.load_state_dict(checkpoint["scaler"])
            state.update({key: checkpoint["state"][key] for key in state})

    def introduce(self, settings, model, data, tokens_per_step, step):
        """Say what is about to be trained."""
        counts, train, val = model.parameter_report(), data.n_tokens("train"), data.n_tokens("val")
        print0(f"data    {settings.dataset}: {train:,} train, {val:,} val tokens, {data.tokenizer['kind']}")
        kind = f"{model.config.query_mode} query" + ("" if model.config.causal else ", encoder")
        print0(f"model   {kind}, {counts['total']:,} parameters")
        print0(f"        ({counts['non_embedding']:,} non-embedding, {counts['query_path']:,} in the query path)")
        print0(f"run     {self}: {settings.max_iters:,} steps of {tokens_per_step:,} tokens")
        compiled = f"compile {'on' if settings.compile else 'off'}"
        print0(f"device  {settings.device}, {settings.dtype}, {compiled}, processes: {world_size()}")
        if settings.resume:
            print0(f"resumed at step {step}")

    def words(self, val):
        """What was found on val.bin, for a log line."""
        words = f"{self.names[0]} {val['val_loss']:.4f}"
        if "bits_per_byte" in val:
            words += f" perplexity {val['perplexity']:.2f} bits/byte {val['bits_per_byte']:.3f}"
        return words

    def stop(self, settings, command, step, number):
        """Say how to go on with a run that the signal of this number has stopped -> exit status."""
        resume = command if settings.resume else f"{command} --resume"
        print0(f"stopped after step {step} and saved; go on with: {resume}")
        return 128 + (number or signal.SIGTERM)  # a process that was not told stops like one that was

    def finish(self, settings, state, tokens_per_step, seconds):
        """Write summary.json and say how the run ended."""
        val, steps = state["val"], state["timed_steps"]
        summary = {"objective": settings.objective}
        summary |= {"final_val_loss": val["val_loss"], "best_val_loss": state["best_val_loss"]}
        summary |= {key: val[key] for key in ("perplexity", "bits_per_byte") if key in val}
        summary |= {"steps": state["step"], "tokens": state["step"] * tokens_per_step, "seconds": seconds}
        summary["tokens_per_second"] = steps * tokens_per_step / state["timed_seconds"] if steps else None
        self.write_json("summary.json", summary | {"peak_memory_bytes": peak_memory(settings.device)})
        loss, perplexity = self.names
        print0(f"done in {clock(seconds)}: {loss} {val['val_loss']:.4f}, {perplexity} {val['perplexity']:.2f}")
        if settings.objective == "next":
            print0(f"sample from it: python sample.py {self}")
        else:
            print0(f"fill holes with it: python sample.py {self} --prompt='TEXT with <mask>'")


def new_state():
    """A run's progress, which every checkpoint holds. The timed steps leave out what says nothing about speed: the first
    step of a session (compilation), evaluations and saving."""
    return {"step": 0, "val": None, "best_val_loss": math.inf, "seconds": 0.0, "timed_steps": 0, "timed_seconds": 0.0}


def load_checkpoint(path, *keys):
    """The dict that torch.save wrote to a file, on the CPU, which must have the keys; nothing is executed."""
    with reading(path):
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        return checkpoint | {key: checkpoint[key] for key in keys}


@contextlib.contextmanager
def reading(path, kind="a checkpoint"):
    """What a file holds is put to use within; where that fails, the file is named."""
    try:
        yield
    except Exception as e:  # torch raises many kinds for a file that is not one of its own
        if out_of_memory(e) or isinstance(e, (UserError, FileNotFoundError)):  # no content to blame, or it was told why
            raise
        reason = " ".join(f"{type(e).__name__}: {e}".split())
        hint = "it is damaged or another program's: put a good copy in its place"
        raise UserError(f"{path} cannot be read as {kind} ({reason:.200}); {hint}") from None


def describe(settings, model, data, command):
    """What config.json holds: all that is needed to repeat the run."""
    versions = {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__}
    record = {"command": command, "settings": asdict(settings), "model": asdict(model.config)}
    record |= {"parameters": model.parameter_report(), "data": {"source": data.source, "sha256": data.sha256}}
    record |= {"device": device_name(settings.device), "processes": world_size(), "versions": versions}
    return record | {"commit": git_commit()}


def start_wandb(settings, record):
    try:
        import wandb

        return wandb.init(project=settings.wandb_project, name=Path(settings.out_dir).name, config=record)
    except Exception as e:  # not installed, not logged in, no network
        raise UserError(f"wandb_log: {' '.join(str(e).split()):.200}; pip install wandb, and wandb login") from None


def git_commit():
    """The commit of this code, with -dirty where it was changed since; None where git cannot tell."""

    def git(*words):
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent.parent, capture_output=True, text=True)
        return done.stdout.strip()

    with contextlib.suppress(OSError):
        commit = git("rev-parse", "--verify", "--quiet", "HEAD")
        results = ":(exclude)study/results"  # which grow while a study runs
        changed = commit and git("status", "--porcelain", "--untracked-files=no", "--", ".", results)
        return commit + "-dirty" * bool(changed) or None


def check_resume(before, now, may_change=MAY_CHANGE):
    """From what `describe` told before and tells now: what changed; refused where that makes another run."""

    def flat(record):
        # Where the run lies and what this command does with it are not properties of the run.
        s = {key: value for key, value in record["settings"].items() if key not in ("out_dir", "resume", "eval_only")}
        sequences = s["batch_size"] * s["gradient_accumulation_steps"]
        return {**s, **record["model"], "sequences in a step": sequences, "data set": record["data"]["sha256"]}

    with reading("config.json", "one of a run"):
        before, now = BEFORE_THERE_WAS_A_CHOICE | flat(before), flat(now)
    changed = {key: value for key, value in now.items() if before.get(key) != value}
    refused = [f"{key} was {before.get(key)}, now is {changed[key]}" for key in changed if key not in may_change]
    if refused:
        words = f"a run is resumed with the settings it began with: {'; '.join(refused)}"
        if "max_iters" in may_change and {"max_iters", "lr_decay_iters"} <= changed.keys():
            end, rate = before["lr_decay_iters"], now["min_lr"]
            words += f" (--lr_decay_iters={end} keeps it, and from that step on the rate is min_lr={rate:g})"
        raise UserError(words)
    return changed
