"""Train a GPT: python train.py [config/FILE.py] [--key=value ...]

Without a file it trains config/quickstart.py. Keys are the settings below and the model's own (GPTConfig
in model.py); flags override the file. A bare --key sets a switch to true. A run is left in
out/<name of the config file>; --resume goes on with it. On several GPUs:
torchrun --standalone --nproc_per_node=8 train.py config/FILE.py
"""

import contextlib
import dataclasses
import json
import math
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
import typing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import prepare_data
from command import UserError, list_settings, read_settings, run_program
from model import GPT, GPTConfig, stream_seed
from run_folder import RunFolder, pick_device

# ---------------------------------------------------------------------------------------------------
# Settings. The comment behind a setting is what --help prints; None is written "auto".


@dataclass(frozen=True)
class Settings:
    # the run
    out_dir: str | None = None  # the run's folder; auto: out/<name of the config file>
    resume: bool = False  # go on with the run in out_dir
    eval_only: bool = False  # evaluate once and stop; writes nothing
    seed: int = 1337  # of weights, batches and dropout, each a random stream of its own
    # data
    dataset: str = "openwebtext"  # a folder in data/; see prepare_data.py
    batch_size: int = 12  # sequences in one micro-batch
    gradient_accumulation_steps: int = 40  # micro-batches in a step, of all processes together
    # optimisation: AdamW
    learning_rate: float = 6e-4  # highest rate, reached after the warm-up
    min_lr: float | None = None  # rate at lr_decay_iters; auto: learning_rate / 10 (cosine), 0 (linear)
    lr_schedule: str = "cosine"  # cosine | linear: the way from learning_rate to min_lr
    warmup_iters: int = 2000  # steps of linear warm-up
    lr_decay_iters: int | None = None  # step at which min_lr is reached; auto: max_iters
    max_iters: int = 60002  # steps
    weight_decay: float = 0.1  # on every tensor of two or more dimensions
    beta1: float = 0.9  # AdamW's decay of the mean gradient
    beta2: float = 0.95  # AdamW's decay of the mean squared gradient
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping
    # evaluation and logging
    eval_interval: int = 1000  # steps between evaluations, each of which saves a checkpoint
    eval_tokens: int | None = None  # evaluate on the first so many tokens of val.bin; auto: all
    log_interval: int = 10  # steps between log lines
    wandb_log: bool = False  # log to Weights & Biases too (pip install wandb)
    wandb_project: str = "nlqgpt"  # its project there
    # machine
    device: str | None = None  # cpu | cuda | cuda:N | mps; auto: the first there is of cuda, mps, cpu
    dtype: str | None = None  # float32 | bfloat16 | float16; auto: the fastest that trains well there
    compile: bool | None = None  # torch.compile the model; auto: on CUDA
    peak_tflops: float | None = None  # of one device, for the MFU; auto: known for A100, H100, H200, 4090, 5090

    def __post_init__(self):
        ranges = {
            "at least 1": (lambda v: v >= 1, "batch_size gradient_accumulation_steps max_iters lr_decay_iters eval_interval eval_tokens log_interval"),
            "above 0": (lambda v: 0 < v < math.inf, "learning_rate peak_tflops"),
            "0 or above": (lambda v: 0 <= v < math.inf, "seed min_lr warmup_iters weight_decay grad_clip"),
            "in [0, 1)": (lambda v: 0 <= v < 1, "beta1 beta2"),
            "cosine or linear": (lambda v: v in ("cosine", "linear"), "lr_schedule"),
            "float32, bfloat16 or float16": (lambda v: v in ("float32", "bfloat16", "float16"), "dtype"),
        }
        for meaning, (holds, names) in ranges.items():
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not holds(value):
                    raise ValueError(f"{name}={value} must be {meaning}")


# What may differ when a run is resumed: none of these changes what a step computes but for rounding.
MAY_CHANGE = {"out_dir", "resume", "eval_only", "max_iters", "lr_decay_iters", "eval_interval", "eval_tokens", "log_interval"}
MAY_CHANGE |= {"wandb_log", "wandb_project", "device", "dtype", "compile", "peak_tflops", "batch_size", "gradient_accumulation_steps"}

KINDS = {**typing.get_type_hints(Settings), **typing.get_type_hints(GPTConfig)}
del KINDS["causal"]  # training predicts the next token


def read_command(argv):
    """Command line -> (Settings, dict of the model's settings that were given)."""
    path, given = read_settings(argv, KINDS, Path(__file__).parent / "config" / "quickstart.py")
    model_args = {f.name: given.pop(f.name) for f in dataclasses.fields(GPTConfig) if f.name in given}
    given["out_dir"] = given.get("out_dir") or str(Path("out") / path.stem)
    try:
        GPTConfig(**model_args)  # tells a mistake before any work is done
        return Settings(**given), model_args
    except ValueError as e:
        raise UserError(str(e), status=2) from None


def help_text():
    return f"{__doc__}\nsettings:\n{list_settings(Settings, KINDS)}\n\nsettings of the model:\n{list_settings(GPTConfig, KINDS)}"


# ---------------------------------------------------------------------------------------------------
# The machine.


def resolve(s, local_rank):
    """Fill in what is auto, now that every override is known."""
    device = pick_device(s.device, local_rank)
    kind = device.split(":")[0]
    if s.dtype == "float16" and kind != "cuda":
        raise UserError(f"dtype=float16 needs a CUDA device, not {kind}; use bfloat16 or float32", status=2)
    return dataclasses.replace(
        s,
        device=device,
        dtype=s.dtype or best_dtype(kind),
        compile=kind == "cuda" if s.compile is None else s.compile,
        peak_tflops=s.peak_tflops or (known_peak(torch.cuda.get_device_name(device)) if kind == "cuda" else None),
        lr_decay_iters=s.lr_decay_iters or s.max_iters,
        min_lr={"cosine": s.learning_rate / 10, "linear": 0.0}[s.lr_schedule] if s.min_lr is None else s.min_lr,
    )


def best_dtype(kind):
    if kind == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    # A CPU without instructions for bf16 matrices emulates them, many times slower than float32.
    amx = kind == "cpu" and hasattr(torch.cpu, "get_capabilities") and torch.cpu.get_capabilities().get("amx_bf16")
    return "bfloat16" if amx else "float32"


def known_peak(name):
    """Dense bf16 TFLOP/s with fp32 accumulation, as the maker states them; None where unknown."""
    peaks = {"H100 PCIe": 756, "H100": 989, "H200": 989, "A100": 312, "RTX 4090": 165, "RTX 5090": 209}
    return next((float(peak) for part, peak in peaks.items() if part in name), None)


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def sum_over_ranks(*values, device):
    """The sum of each number over all processes."""
    total = torch.tensor(values, dtype=torch.float32 if device == "mps" else torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(total)
    return total.tolist()


def barrier():
    """Wait for the other processes."""
    if dist.is_initialized():
        dist.barrier()


def say(text):
    if rank() == 0:
        print(text, flush=True)


# ---------------------------------------------------------------------------------------------------
# Data.


class Data:
    """The token files of one data set, checked against its meta.json."""

    def __init__(self, name, block_size):
        self.folder, self.block_size = prepare_data.DATA_DIR / name, block_size
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as e:
            raise UserError(f"cannot read {self.folder / 'meta.json'} ({e}); prepare the data set anew") from None
        for split in ("train", "val"):
            size, tokens = len(self.tokens(split)), self.meta[split]["tokens"]
            if size != tokens:
                raise UserError(f"{self.folder}/{split}.bin holds {size} tokens, but meta.json says {tokens}; prepare it anew")
            if tokens < block_size + 1:
                raise UserError(f"{self.folder}/{split}.bin has {tokens} tokens, fewer than block_size + 1 = {block_size + 1}; lower block_size or take more text")

    def tokens(self, split):
        # Opened afresh each time: the pages that a long-lived memmap has touched count as resident memory.
        return np.memmap(self.folder / f"{split}.bin", dtype=self.meta["dtype"], mode="r")

    def step_offsets(self, seed, step, n):
        """Where the n sequences of a whole step begin in train.bin: a pure function of (seed, step)."""
        raw = np.random.Philox(key=stream_seed(seed, "batch", step)).random_raw(n)
        return (raw % (self.meta["train"]["tokens"] - self.block_size)).astype(np.int64)

    def batch(self, split, offsets, stop, device):
        """Windows at offsets (n,) -> inputs and targets (n, block_size); a target at or past stop is -1."""
        tokens = self.tokens(split)
        windows = np.full((len(offsets), self.block_size + 1), -1, np.int64)
        for window, offset in zip(windows, offsets):
            part = tokens[offset : min(offset + self.block_size + 1, stop)]
            window[: len(part)] = part
        windows = torch.from_numpy(windows)
        x, y = windows[:, :-1].clamp(min=0), windows[:, 1:]
        if device.startswith("cuda"):  # pinned memory lets the copy overlap with computation
            return x.pin_memory().to(device, non_blocking=True), y.contiguous().pin_memory().to(device, non_blocking=True)
        return x.to(device), y.to(device)


def open_data(name, block_size):
    """Prepare a small data set on first use; refuse a large or unknown one with the command that prepares it."""
    if rank() == 0 and not (prepare_data.DATA_DIR / name).exists():
        if name in prepare_data.SMALL:
            say(f"preparing {prepare_data.DATA_DIR / name}")
            prepare_data.SMALL[name]()
        else:
            command = name if name == "openwebtext" else f"text --name {name} --input FILE_OR_FOLDER"
            raise UserError(f"there is no data set {prepare_data.DATA_DIR / name}; prepare it: python prepare_data.py {command}")
    barrier()
    return Data(name, block_size)


# ---------------------------------------------------------------------------------------------------
# Schedule, evaluation, one step.


def learning_rate(s, step):
    """The rate of a step (0 is the first): linear warm-up, then cosine or linear decay, then min_lr."""
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / (s.warmup_iters + 1)
    if step >= s.lr_decay_iters:
        return s.min_lr
    done = (step - s.warmup_iters) / (s.lr_decay_iters - s.warmup_iters)  # 0 to 1
    share = 1 - done if s.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return s.min_lr + share * (s.learning_rate - s.min_lr)


@torch.no_grad()
def evaluate(model, data, s):
    """Mean loss over the tokens of val.bin (the first eval_tokens), in nats, with perplexity and bits per byte.

    The windows tile the file, so that every token but the first is predicted once, whatever the
    batch size and the number of processes.
    """
    n = data.meta["val"]["tokens"] - 1
    n = min(n, s.eval_tokens or n)  # predicted tokens
    starts = np.arange(0, n, data.block_size)
    starts = np.pad(starts, (0, -len(starts) % s.batch_size), constant_values=n + 1)  # empty windows fill the last batch
    model.eval()
    total = 0.0
    for offsets in starts.reshape(-1, s.batch_size)[rank() :: world_size()]:
        x, y = data.batch("val", offsets, n + 1, s.device)
        with autocast(s):
            _, loss = model(x, y)
        total += loss.item() * (y >= 0).sum().item()
    model.train()
    (total,) = sum_over_ranks(total, device=s.device)
    loss = total / n
    val = data.meta["val"]
    # Bytes per token are the whole split's, which is exact where all of it is evaluated.
    return {"val_loss": loss, "perplexity": math.exp(min(loss, 700)), "bits_per_byte": loss / math.log(2) * val["tokens"] / val["text_bytes"]}


def autocast(s):
    return torch.autocast(s.device.split(":")[0], getattr(torch, s.dtype), enabled=s.dtype != "float32")


def make_optimizer(model, s):
    """AdamW; weight decay on matrices and embeddings, none on gains and biases."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": s.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=s.learning_rate, betas=(s.beta1, s.beta2), fused=True)


def train_step(model, optimizer, scaler, data, s, step):
    """One update -> this rank's mean loss and the gradient norm before clipping, both still on the device."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(s, step)
    torch.manual_seed(stream_seed(s.seed, "dropout", step, rank()))
    # The whole step's batch is drawn first and cut afterwards: neither the size of a micro-batch nor
    # the number of processes can change the data.
    offsets = data.step_offsets(s.seed, step, s.gradient_accumulation_steps * s.batch_size)
    micro_batches = offsets.reshape(-1, s.batch_size)[rank() :: world_size()]
    mean_loss = torch.zeros((), device=s.device)
    for i, micro_batch in enumerate(micro_batches):
        x, y = data.batch("train", micro_batch, data.meta["train"]["tokens"], s.device)
        last = i == len(micro_batches) - 1
        with contextlib.nullcontext() if last or world_size() == 1 else model.no_sync():  # gradients meet once a step
            with autocast(s):
                _, loss = model(x, y)
                loss = loss / len(micro_batches)
            scaler.scale(loss).backward()
        mean_loss += loss.detach()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), s.grad_clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return mean_loss, norm


# ---------------------------------------------------------------------------------------------------
# The run.


def describe(s, model, data, command):
    """What config.json holds: all that is needed to repeat the run."""
    return {
        "command": command,
        "settings": asdict(s),
        "model": asdict(model.config),
        "parameters": model.parameter_report(),
        "data": {"source": data.meta["source"], "sha256": {split: data.meta[split]["sha256"] for split in ("train", "val")}},
        "device": device_name(s.device),
        "processes": world_size(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "commit": git_commit(),
    }


def device_name(device):
    """The GPU's or the processor's name, with the number of threads."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, TypeError):  # Linux on x86
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    return f"{name}, {torch.get_num_threads()} threads"


def git_commit():
    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True).stdout.strip()

    try:
        return git("rev-parse", "HEAD") + ("-dirty" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def check_resume(before, now):
    """Refuse to go on with a run under settings that would make it another one -> the settings that changed."""

    def flat(record):
        s = record["settings"]
        sequences = s["batch_size"] * s["gradient_accumulation_steps"]
        return {**s, **record["model"], "sequences in a step": sequences, "data set": record["data"]["sha256"]}

    before, now = flat(before), flat(now)
    changed = {key: value for key, value in now.items() if before.get(key) != value}
    refused = [f"{key} was {before.get(key)}, now is {value}" for key, value in changed.items() if key not in MAY_CHANGE]
    if refused:
        raise UserError(f"a run is resumed as what it is: {'; '.join(refused)}")
    return changed


class Run:
    """What one process does in a run. All do the same, on their share of each batch; rank 0 writes and talks.

    state is the part of a checkpoint that is neither model nor optimizer. Its timed_steps and
    timed_seconds leave out what says nothing about speed: the first step of a sitting (compilation),
    evaluations and saving.
    """

    def __init__(self, s, model_args, command):
        if s.gradient_accumulation_steps % world_size():
            raise UserError(f"gradient_accumulation_steps={s.gradient_accumulation_steps} cannot be shared by {world_size()} processes", status=2)
        block_size = model_args.get("block_size", GPTConfig.block_size)
        self.s, self.command, self.folder = s, command, RunFolder(s.out_dir)
        self.data = open_data(s.dataset, block_size)
        vocab_size = self.data.meta["vocab_size"]
        config = GPTConfig(**{"vocab_size": vocab_size, **model_args})
        if config.vocab_size < vocab_size:
            raise UserError(f"vocab_size={config.vocab_size} is smaller than the {vocab_size} of {s.dataset}", status=2)
        self.model = GPT(config, seed=s.seed).to(s.device)
        self.optimizer = make_optimizer(self.model, s)
        self.scaler = torch.amp.GradScaler(s.device.split(":")[0], enabled=s.dtype == "float16")
        self.tokens_per_step = s.batch_size * s.gradient_accumulation_steps * block_size
        self.state = {"step": 0, "val": None, "best_val_loss": math.inf, "seconds": 0.0, "timed_steps": 0, "timed_seconds": 0.0}
        self.health = torch.zeros((), device=s.device)  # the sum of all losses and norms: finite as long as each was
        self.writes = rank() == 0 and not s.eval_only
        self.wandb = None
        self.started = time.perf_counter()

    def open(self):
        """Begin the run's folder, or go on from the checkpoint in it."""
        s, record = self.s, describe(self.s, self.model, self.data, self.command)
        exists = self.folder.holds("config.json")
        if exists and not s.resume:
            raise UserError(f"{self.folder} holds a run: go on with it (--resume), name another folder (--out_dir=...) or delete it")
        if s.resume and not exists:
            raise UserError(f"{self.folder} holds no run to resume")
        if exists:
            changed = check_resume(self.folder.read_json("config.json"), record)
            if self.folder.holds("ckpt.pt"):  # else it was stopped before the first one, and begins again
                self.restore(self.folder.load("ckpt.pt"))
            record["resumed"] = {"at_step": self.state["step"], "changed": changed}
        self.introduce(record)
        if s.wandb_log and rank() == 0:
            self.wandb = start_wandb(s, record)
        barrier()  # every rank has seen the folder as it was
        if self.writes:
            self.folder.begin(record, self.state["step"] if self.state["val"] else -1)

    def restore(self, checkpoint):
        self.model.load_state_dict(checkpoint["model"])
        self.optimizer.load_state_dict(checkpoint["optimizer"])
        self.scaler.load_state_dict(checkpoint["scaler"])
        self.state = checkpoint["state"]

    def introduce(self, record):
        s, meta, counts = self.s, self.data.meta, record["parameters"]
        say(f"data    {s.dataset}: {meta['train']['tokens']:,} train, {meta['val']['tokens']:,} val tokens, {meta['tokenizer']['kind']}")
        say(f"model   {self.model.config.query_mode} query, {counts['total']:,} parameters")
        say(f"        ({counts['non_embedding']:,} non-embedding, {counts['query_path']:,} in the query path)")
        say(f"run     {self.folder}: {s.max_iters:,} steps of {self.tokens_per_step:,} tokens")
        say(f"device  {s.device}, {s.dtype}, compile {'on' if s.compile else 'off'}, {world_size()} process{'es'[: 2 * (world_size() > 1)]}")
        if s.resume:
            say(f"resume  at step {self.state['step']}")

    def loop(self, stop):
        """Evaluate, train, log and save until max_iters or a signal -> exit status."""
        s, state, model = self.s, self.state, self.model
        if s.compile:
            model.compile()  # in place, so that the names of the weights stay as they are
        if world_size() > 1:
            model = DistributedDataParallel(model, device_ids=None if s.device == "cpu" else [s.device])
        self.first = state["step"]  # of this sitting
        while True:
            due = s.eval_only or state["step"] % s.eval_interval == 0 or state["step"] >= s.max_iters
            if due and (s.eval_only or state["val"] is None or state["val"]["step"] != state["step"]):
                self.evaluate()
            if s.eval_only or state["step"] >= s.max_iters:
                return self.finish()
            if due or state["step"] <= self.first + 1:  # what came before says nothing about speed
                self.start_lap()
            loss, norm = train_step(model, self.optimizer, self.scaler, self.data, s, state["step"])
            self.health += loss if self.scaler.is_enabled() else loss + norm  # fp16 skips steps whose norm overflows
            state["step"] += 1
            self.lap_steps += 1
            if state["step"] % s.log_interval == 0 or state["step"] == 1:
                self.log_step(loss, norm)
                self.start_lap()
            if sum_over_ranks(stop.number, device=s.device)[0]:
                self.check_finite(self.health)
                self.save("ckpt.pt")
                resume = self.command if s.resume else f"{self.command} --resume"
                say(f"stopped after step {state['step']} and saved; go on with: {resume}")
                return 128 + stop.number

    def start_lap(self):
        self.lap_steps, self.lap_start = 0, time.perf_counter()

    def evaluate(self):
        began = time.perf_counter()
        val = evaluate(self.model, self.data, self.s)
        self.check_finite(self.health + val["val_loss"])
        best = val["val_loss"] < self.state["best_val_loss"]
        self.state["val"] = {"step": self.state["step"], **val}
        self.state["best_val_loss"] = min(val["val_loss"], self.state["best_val_loss"])
        self.log(**val)
        say(
            f"step {self.state['step']}/{self.s.max_iters}  val loss {val['val_loss']:.4f}  perplexity {val['perplexity']:.2f}  "
            f"bits/byte {val['bits_per_byte']:.3f}  {time.perf_counter() - began:.1f} s"
        )
        if self.state["step"] > 0:
            self.save("ckpt.pt")
            if best:
                self.save("best.pt")

    def log_step(self, loss, norm):
        s, step = self.s, self.state["step"]
        self.check_finite(self.health)
        seconds = time.perf_counter() - self.lap_start
        if step > self.first + 1:
            self.state["timed_steps"] += self.lap_steps
            self.state["timed_seconds"] += seconds
        (loss,) = sum_over_ranks(loss.item() / world_size(), device=s.device)
        rate = learning_rate(s, step - 1)
        speed = self.lap_steps * self.tokens_per_step / seconds
        mfu = speed * self.model.flops_per_token() / (s.peak_tflops * 1e12 * world_size()) if s.peak_tflops else None
        self.log(train_loss=loss, learning_rate=rate, grad_norm=norm.item(), tokens_per_second=round(speed, 1), mfu=mfu)
        say(
            f"step {step}/{s.max_iters}  loss {loss:.4f}  lr {rate:.1e}  norm {norm.item():.2f}  {speed / 1000:.1f}k tok/s"
            f"{f'  mfu {mfu:.0%}' if mfu else ''}  {clock((s.max_iters - step) * seconds / self.lap_steps)} left"
        )

    def check_finite(self, value):
        """value: a number or a tensor, the same question on every rank."""
        (value,) = sum_over_ranks(float(value), device=self.s.device)
        if not math.isfinite(value):
            kept = "the last checkpoint is kept" if self.folder.holds("ckpt.pt") else "there is no checkpoint yet"
            raise UserError(
                f"the loss stopped being finite before step {self.state['step']}; {kept}. A lower learning_rate "
                f"(now {self.s.learning_rate:g}) or a longer warm-up (now {self.s.warmup_iters}) may help"
            )

    def seconds(self):
        """Since the run began, earlier sittings included."""
        return self.state["seconds"] + time.perf_counter() - self.started

    def log(self, **values):
        """Append a line to metrics.jsonl."""
        values = {"step": self.state["step"], **values, "seconds": round(self.seconds(), 3)}
        if self.writes:
            self.folder.log(values)
        if self.wandb:
            self.wandb.log(values, step=self.state["step"])

    def save(self, name):
        """ckpt.pt is all that resuming needs, best.pt the model alone."""
        if not self.writes:
            return
        checkpoint = {
            "model": self.model.state_dict(),
            "config": asdict(self.model.config),
            "tokenizer": self.data.meta["tokenizer"],
            "state": {**self.state, "seconds": self.seconds()},
        }
        if name == "ckpt.pt":
            checkpoint |= {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        self.folder.save(name, checkpoint)

    def finish(self):
        """Write summary.json and say how it ended -> exit status 0."""
        if self.s.eval_only:
            return 0
        state, val = self.state, self.state["val"]
        speed = state["timed_steps"] * self.tokens_per_step / state["timed_seconds"] if state["timed_steps"] else None
        summary = {
            "final_val_loss": val["val_loss"],
            "best_val_loss": state["best_val_loss"],
            "perplexity": val["perplexity"],
            "bits_per_byte": val["bits_per_byte"],
            "steps": state["step"],
            "tokens": state["step"] * self.tokens_per_step,
            "tokens_per_second": speed,
            "seconds": self.seconds(),
            "peak_memory_bytes": peak_memory(self.s.device),
        }
        if self.writes:
            self.folder.write_json("summary.json", summary)
        say(f"done in {clock(summary['seconds'])}: val loss {val['val_loss']:.4f}, perplexity {val['perplexity']:.2f}; best val loss {state['best_val_loss']:.4f}")
        say(f"sample from it: python sample.py {self.folder}")
        return 0


def start_wandb(s, record):
    try:
        import wandb
    except ImportError:
        raise UserError("wandb_log needs the package wandb: pip install wandb") from None
    return wandb.init(project=s.wandb_project, name=Path(s.out_dir).name, config=record)


def peak_memory(device):
    """Bytes: of the GPU on CUDA, else of this process; None where the system does not tell."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def clock(seconds):
    """3725 -> 1:02:05"""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


class StopSignal:
    """Remembers SIGINT or SIGTERM, so that the step under way can finish; a second one acts at once."""

    def __enter__(self):
        self.number = 0
        self.previous = {n: signal.signal(n, self.receive) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def receive(self, number, frame):
        self.number = number
        signal.signal(number, self.previous[number])

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def advice(s):
    """Say what to change when the device is out of memory or the compiler fails."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise UserError(
            f"out of memory on {s.device}: halve batch_size (now {s.batch_size}) and double gradient_accumulation_steps "
            f"(now {s.gradient_accumulation_steps}): the steps stay the same"
        ) from None
    except Exception as e:
        if s.compile and type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise UserError(f"torch.compile failed ({type(e).__name__}: {str(e).splitlines()[0]:.200}); --compile=false does without it") from e
        raise


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(help_text())
        return 0
    settings, model_args = read_command(argv)
    processes = int(os.environ.get("WORLD_SIZE", 1))
    s = resolve(settings, local_rank=int(os.environ.get("LOCAL_RANK", 0)))
    launcher = f"torchrun --standalone --nproc_per_node={processes}" if processes > 1 else "python"
    if s.device.startswith("cuda"):
        torch.cuda.set_device(s.device)
        torch.set_float32_matmul_precision("high")  # TF32 for what stays float32
    if processes > 1:
        dist.init_process_group("nccl" if s.device.startswith("cuda") else "gloo")
    try:
        run = Run(s, model_args, shlex.join([*launcher.split(), "train.py", *argv]))
        run.open()
        with StopSignal() as stop, advice(s):
            return run.loop(stop)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    run_program(main)
