"""Train a GPT: python train.py [config/FILE.py] [--key=value ...]

Without a file it trains config/quickstart.py. Keys are the settings below and the model's own; flags
override the file, and a bare --key sets a switch to true. vocab_size is the data set's unless given.
The run is left in out/<name of the config file>, and --resume goes on with it.
On several GPUs: torchrun --standalone --nproc_per_node=8 train.py config/FILE.py
"""

import contextlib
import dataclasses
import json
import math
import os
import shlex
import signal
import sys
import time
import typing
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import machine
import prepare_data
from command import UserError, clock, list_settings, out_of_memory, read_settings, run_program, short
from machine import StopSignal, autocast, barrier, rank, say, sum_over_ranks, world_size
from model import GPT, GPTConfig, stream_seed
from run_folder import RunFolder, check_resume, describe, fitting

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
        ranges = [
            ("at least 1", lambda v: v >= 1, "batch_size gradient_accumulation_steps max_iters lr_decay_iters"),
            ("at least 1", lambda v: v >= 1, "eval_interval eval_tokens log_interval"),
            ("above 0", lambda v: 0 < v < math.inf, "learning_rate peak_tflops"),
            ("0 or above", lambda v: 0 <= v < math.inf, "seed min_lr warmup_iters weight_decay grad_clip"),
            ("in [0, 1)", lambda v: 0 <= v < 1, "beta1 beta2"),
            ("cosine or linear", lambda v: v in ("cosine", "linear"), "lr_schedule"),
            ("float32, bfloat16 or float16", lambda v: v in ("float32", "bfloat16", "float16"), "dtype"),
        ]
        for meaning, holds, names in ranges:
            for name in names.split():
                value = getattr(self, name)
                if value is not None and not holds(value):
                    raise ValueError(f"{name}={value} must be {meaning}")


# What may differ when a run is resumed: nothing here changes what a step computes, but for rounding.
# The two factors of a step's size may change where their product does not.
MAY_CHANGE = {
    *("max_iters", "batch_size", "gradient_accumulation_steps", "eval_interval", "log_interval"),
    *("wandb_log", "wandb_project", "device", "dtype", "compile", "peak_tflops"),
}

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


def resolve(s, local_rank=0):
    """Fill in what is auto, now that every override is known."""
    device = machine.pick_device(s.device, local_rank)
    if s.dtype == "float16" and not device.startswith("cuda"):
        raise UserError(f"dtype=float16 needs a CUDA device, not {device}; use bfloat16 or float32", status=2)
    dtype = s.dtype or machine.best_dtype(device)
    min_lr = s.min_lr
    if min_lr is None:
        min_lr = s.learning_rate / 10 if s.lr_schedule == "cosine" else 0.0
    if min_lr > s.learning_rate:
        raise UserError(f"min_lr={min_lr:g} is above learning_rate={s.learning_rate:g}; lower it too", status=2)
    return dataclasses.replace(
        s,
        device=device,
        dtype=dtype,
        compile=device.startswith("cuda") if s.compile is None else s.compile,
        peak_tflops=s.peak_tflops or (machine.peak_tflops(device) if dtype != "float32" else None),
        lr_decay_iters=s.lr_decay_iters or s.max_iters,
        min_lr=min_lr,
    )


# ---------------------------------------------------------------------------------------------------
# Data.


class Data:
    """The token files of data/NAME, checked against its meta.json."""

    def __init__(self, name, block_size):
        self.folder, self.block_size = prepare_data.DATA_DIR / name, block_size
        try:
            self.meta = json.loads((self.folder / "meta.json").read_text(encoding="utf-8"))
            sizes = {split: (len(self.tokens(split)), self.meta[split]["tokens"]) for split in ("train", "val")}
            for part in (self.meta["train"], self.meta["val"]):  # what is needed later must be there now
                part["sha256"], int(part["text_bytes"])
            self.meta["source"], self.meta["tokenizer"]["kind"], int(self.meta["vocab_size"])
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise UserError(f"{self.folder} is damaged ({type(e).__name__}: {e}); delete and prepare it anew") from None
        for split, (found, tokens) in sizes.items():
            path = self.folder / f"{split}.bin"
            if found != tokens:
                raise UserError(f"{path} holds {found} tokens, but meta.json says {tokens}; prepare it anew")
            if tokens <= block_size:
                raise UserError(
                    f"{path} has {tokens} tokens, too few for block_size={block_size}; lower it or add text"
                )

    def tokens(self, split):
        # Opened afresh each time: the pages that a long-lived memmap has touched count as resident memory.
        return np.memmap(self.folder / f"{split}.bin", dtype=self.meta["dtype"], mode="r")

    def step_offsets(self, seed, step, n):
        """Where the n sequences of a whole step begin in train.bin: a pure function of (seed, step)."""
        raw = np.random.Philox(key=stream_seed(seed, "batch", step)).random_raw(n)
        return (raw % (self.meta["train"]["tokens"] - self.block_size)).astype(np.int64)

    def batch(self, split, offsets, stop, device):
        """Windows at offsets (n,) -> inputs and targets, (n, block_size) each; a target at or past stop is -1."""
        tokens = self.tokens(split)
        windows = np.full((len(offsets), self.block_size + 1), -1, np.int64)
        for window, offset in zip(windows, offsets):
            part = tokens[offset : min(offset + self.block_size + 1, stop)]
            window[: len(part)] = part
        largest, vocab_size = int(windows.max()), self.meta["vocab_size"]
        if largest >= vocab_size:
            raise UserError(
                f"{self.folder / f'{split}.bin'} holds the token id {largest}, but its vocabulary has {vocab_size:,}; "
                "prepare it anew"
            )
        windows = torch.from_numpy(windows)
        if device.startswith("cuda"):  # from pinned memory the copy overlaps with computation
            windows = windows.pin_memory().to(device, non_blocking=True)
        windows = windows.to(device)
        return windows[:, :-1].clamp(min=0), windows[:, 1:].contiguous()


def open_data(name, block_size):
    """Prepare a small data set on first use; refuse a large or unknown one with the command that prepares it."""
    folder = prepare_data.DATA_DIR / name
    if rank() == 0 and not folder.exists():
        if name not in prepare_data.SMALL:
            raise UserError(f"there is no data set {folder}; prepare it: {prepare_data.command(name)}")
        say(f"preparing {folder}")
        prepare_data.SMALL[name]()
    barrier()
    return Data(name, block_size)


# ---------------------------------------------------------------------------------------------------
# The schedule.


def learning_rate(s, step):
    """The rate of a step (0 is the first): linear warm-up, then cosine or linear decay, then min_lr."""
    if step < s.warmup_iters:
        return s.learning_rate * (step + 1) / (s.warmup_iters + 1)
    if step >= s.lr_decay_iters:
        return s.min_lr
    done = (step - s.warmup_iters) / (s.lr_decay_iters - s.warmup_iters)  # 0 to 1
    share = 1 - done if s.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return s.min_lr + share * (s.learning_rate - s.min_lr)


# ---------------------------------------------------------------------------------------------------
# Evaluation.


@torch.no_grad()
def evaluate(model, data, s):
    """Mean loss in nats over the tokens of val.bin (the first eval_tokens), perplexity, and bits per byte of text.

    The windows tile the file, so that every token but the first is predicted once, whatever the
    batch size and the number of processes.
    """
    val = data.meta["val"]
    n = min(val["tokens"] - 1, s.eval_tokens or math.inf)  # tokens to predict
    starts = np.arange(0, n, data.block_size)
    starts = np.pad(starts, (0, -len(starts) % s.batch_size), constant_values=n + 1)  # fill up with empty windows
    total = 0.0
    model.eval()
    for offsets in starts.reshape(-1, s.batch_size)[rank() :: world_size()]:
        x, y = data.batch("val", offsets, n + 1, s.device)
        with autocast(s.device, s.dtype):
            _, loss = model(x, y)
        total += loss.item() * (y >= 0).sum().item()
    model.train()
    loss = sum_over_ranks(total, s.device) / n
    bits_per_token = loss / math.log(2)  # tokens per byte are the whole split's
    return {
        "val_loss": loss,
        "perplexity": math.exp(min(loss, 700)),
        "bits_per_byte": bits_per_token * val["tokens"] / val["text_bytes"],
    }


# ---------------------------------------------------------------------------------------------------
# One step.


def make_optimizer(model, s):
    """AdamW; weight decay on matrices and embeddings, none on gains and biases."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": s.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=s.learning_rate, betas=(s.beta1, s.beta2), fused=True)


def train_step(model, optimizer, scaler, data, s, step):
    """One update -> this rank's mean loss and the gradient norm before clipping, both left on the device."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(s, step)
    torch.manual_seed(stream_seed(s.seed, "dropout", step, rank()))
    # The whole step's batch is drawn first and cut afterwards: neither the size of a micro-batch nor
    # the number of processes can change the data.
    offsets = data.step_offsets(s.seed, step, s.gradient_accumulation_steps * s.batch_size)
    micro_batches = offsets.reshape(-1, s.batch_size)[rank() :: world_size()]
    mean_loss = torch.zeros((), device=s.device)
    for number, micro_batch in enumerate(micro_batches, 1):
        if world_size() > 1:  # processes exchange gradients once a step, after the last micro-batch
            model.require_backward_grad_sync = number == len(micro_batches)
        x, y = data.batch("train", micro_batch, data.meta["train"]["tokens"], s.device)
        with autocast(s.device, s.dtype):
            loss = model(x, y)[1] / len(micro_batches)
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


class Run:
    """What one process does in a run. All do the same on their share of each batch; rank 0 writes and talks.

    state is the part of a checkpoint that is neither model nor optimizer. Its timed_steps and
    timed_seconds leave out what says nothing about speed: the first step of a sitting (compilation),
    evaluations and saving.
    """

    def __init__(self, s, model_args, command):
        processes = world_size()
        if s.gradient_accumulation_steps % processes:
            steps = s.gradient_accumulation_steps
            raise UserError(f"gradient_accumulation_steps={steps} cannot be shared by {processes} processes", status=2)
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
        self.state = {"step": 0, "val": None, "best_val_loss": math.inf}
        self.state |= {"seconds": 0.0, "timed_steps": 0, "timed_seconds": 0.0}
        self.health = torch.zeros((), device=s.device)  # the sum of all losses and norms: finite as long as each was
        self.writes = rank() == 0 and not s.eval_only
        self.wandb = None
        self.started = time.perf_counter()

    def go(self):
        """Open the folder, then train, or evaluate once -> exit status."""
        self.open()
        if self.s.eval_only:
            self.evaluate()
            return 0
        with StopSignal() as stop:
            return self.loop(stop)

    def open(self):
        """Begin the run's folder, or go on from the checkpoint in it."""
        s, record = self.s, describe(self.s, self.model, self.data, self.command)
        exists = any(self.folder.holds(name) for name in ("config.json", "ckpt.pt", "best.pt"))
        if exists and not s.resume:
            raise UserError(f"{self.folder} holds a run: --resume it, choose another --out_dir, or delete it")
        if s.resume and not exists:
            raise UserError(f"{self.folder} holds no run to resume")
        if exists:
            first = self.folder.read_json("config.json")
            changed = check_resume(first, record, MAY_CHANGE)
            if self.folder.holds("ckpt.pt"):  # else it was stopped before the first one, and begins again
                self.restore(self.folder.load("ckpt.pt"))
            sitting = {key: record[key] for key in ("command", "device", "processes", "versions", "commit")}
            sitting |= {"at_step": self.state["step"], "changed": changed}
            record = {**first, "resumed": [*first.get("resumed", []), sitting]}
        self.introduce(record["parameters"])
        if s.wandb_log and self.writes:
            self.wandb = start_wandb(s, record)
        barrier()  # every rank has seen the folder as it was
        if self.writes:
            self.folder.begin(record, self.state["step"] if self.state["val"] else -1)

    def restore(self, checkpoint):
        with fitting(f"{self.folder}/ckpt.pt"):
            self.model.load_state_dict(checkpoint["model"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
            if self.scaler.is_enabled() and checkpoint["scaler"]:  # both sittings in float16
                self.scaler.load_state_dict(checkpoint["scaler"])
            self.state = {key: checkpoint["state"][key] for key in self.state}

    def introduce(self, parameters):
        s, meta = self.s, self.data.meta
        kind, tokens = meta["tokenizer"]["kind"], {split: meta[split]["tokens"] for split in ("train", "val")}
        say(f"data    {s.dataset}: {tokens['train']:,} train, {tokens['val']:,} val tokens, {kind}")
        say(f"model   {self.model.config.query_mode} query, {parameters['total']:,} parameters")
        say(f"        ({parameters['non_embedding']:,} non-embedding, {parameters['query_path']:,} in the query path)")
        say(f"run     {self.folder}: {s.max_iters:,} steps of {self.tokens_per_step:,} tokens")
        say(f"device  {s.device}, {s.dtype}, compile {'on' if s.compile else 'off'}, processes: {world_size()}")
        if s.resume:
            say(f"resumed at step {self.state['step']}")

    def evaluate(self):
        began, s, state = time.perf_counter(), self.s, self.state
        val = evaluate(self.model, self.data, s)
        self.check_finite(self.health + val["val_loss"])  # so that no bad weights are saved
        best = val["val_loss"] < state["best_val_loss"]
        state["val"] = {"step": state["step"], **val}
        state["best_val_loss"] = min(val["val_loss"], state["best_val_loss"])
        self.log(**val)
        say(
            f"step {state['step']}/{s.max_iters} val loss {val['val_loss']:.4f} perplexity {val['perplexity']:.2f} "
            f"bits/byte {val['bits_per_byte']:.3f} in {time.perf_counter() - began:.1f} s"
        )
        if state["step"] > 0:
            if best:
                self.save("best.pt")
            self.save("ckpt.pt")  # last: what a resumed run finds beside it is never older

    def check_finite(self, value):
        """Stop the run where the value, a number or tensor, is not finite on some rank; nothing is saved then."""
        if not math.isfinite(sum_over_ranks(value, self.s.device)):
            self.log(diverged=True)
            kept = "the last checkpoint is kept" if self.folder.holds("ckpt.pt") else "there is no checkpoint yet"
            raise UserError(
                f"the loss is not finite at step {self.state['step']}; {kept}. A lower learning_rate "
                f"(now {self.s.learning_rate:g}) or a longer warm-up (now {self.s.warmup_iters}) may help"
            )

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

    def log(self, **values):
        values = {"step": self.state["step"], **values, "seconds": round(self.seconds(), 3)}
        if self.writes:
            self.folder.log(values)
        if self.wandb:
            self.wandb.log(values, step=self.state["step"])

    def seconds(self):
        """Since the run began, earlier sittings included."""
        return self.state["seconds"] + time.perf_counter() - self.started

    def loop(self, stop):
        """Evaluate, train, log and save until max_iters or a signal -> exit status."""
        s, state, model = self.s, self.state, self.model
        if s.compile:
            model.compile()  # in place, so that the names of the weights stay as they are
        if world_size() > 1:
            model = DistributedDataParallel(model, device_ids=None if s.device == "cpu" else [s.device])
        self.first = state["step"]  # of this sitting
        while True:
            due = state["step"] % s.eval_interval == 0 or state["step"] >= s.max_iters
            if due and (state["val"] is None or state["val"]["step"] != state["step"]):
                self.evaluate()
            if state["step"] >= s.max_iters:
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
            if sum_over_ranks(stop.number, "cpu"):  # a signal to one stops all; the GPU is not waited for
                self.check_finite(self.health)
                self.save("ckpt.pt")
                barrier()  # no process ends, and takes the others along, before the checkpoint is in place
                resume = self.command if s.resume else f"{self.command} --resume"
                say(f"stopped after step {state['step']} and saved; go on with: {resume}")
                return 128 + (stop.number or signal.SIGTERM)  # a rank that was not told stops like one that was

    def start_lap(self):
        self.lap_steps, self.lap_start = 0, time.perf_counter()

    def log_step(self, loss, norm):
        s, state, step = self.s, self.state, self.state["step"]
        self.check_finite(self.health)
        loss, norm = sum_over_ranks(loss, s.device) / world_size(), norm.item()
        seconds, rate = time.perf_counter() - self.lap_start, learning_rate(s, step - 1)
        speed, mfu, tail = None, None, f"first step {seconds:.1f} s"
        if step > self.first + 1:
            state["timed_steps"] += self.lap_steps
            state["timed_seconds"] += seconds
            speed = self.lap_steps * self.tokens_per_step / seconds
            if s.peak_tflops:
                mfu = speed * self.model.flops_per_token() / (s.peak_tflops * 1e12 * world_size())
            left = clock((s.max_iters - step) * seconds / self.lap_steps)
            tail = f"{short(speed)} tok/s {f'mfu {mfu:.0%} ' if mfu else ''}{left} left"
        self.log(train_loss=loss, learning_rate=rate, grad_norm=norm, tokens_per_second=speed, mfu=mfu)
        say(f"step {step}/{s.max_iters} loss {loss:.4f} lr {rate:.1e} norm {norm:.2f} {tail}")

    def finish(self):
        """Write summary.json and say how it ended -> exit status 0."""
        state, val = self.state, self.state["val"]
        steps, seconds = state["timed_steps"], state["timed_seconds"]
        summary = {
            "final_val_loss": val["val_loss"],
            "best_val_loss": state["best_val_loss"],
            "perplexity": val["perplexity"],
            "bits_per_byte": val["bits_per_byte"],
            "steps": state["step"],
            "tokens": state["step"] * self.tokens_per_step,
            "tokens_per_second": steps * self.tokens_per_step / seconds if steps else None,
            "seconds": self.seconds(),
            "peak_memory_bytes": machine.peak_memory(self.s.device),
        }
        if self.writes:
            self.folder.write_json("summary.json", summary)
        say(f"done in {clock(summary['seconds'])}: val loss {val['val_loss']:.4f}, perplexity {val['perplexity']:.2f}")
        say(f"sample from it: python sample.py {self.folder}")
        return 0


def start_wandb(s, record):
    try:
        import wandb
    except ImportError:
        raise UserError("wandb_log needs the package wandb: pip install wandb") from None
    try:
        return wandb.init(project=s.wandb_project, name=Path(s.out_dir).name, config=record)
    except Exception as e:  # not logged in, no network
        raise UserError(f"wandb: {' '.join(str(e).split()):.200}") from None


@contextlib.contextmanager
def advice(s):
    """Say what to change when the device is out of memory or the compiler fails."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        if out_of_memory(e):
            raise UserError(
                f"out of memory on {s.device}: halve batch_size (now {s.batch_size}) and double "
                f"gradient_accumulation_steps (now {s.gradient_accumulation_steps}): the steps stay the same"
            ) from None
        if s.compile and type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
            reason = f"{type(e).__name__}: {str(e).splitlines()[0]:.200}"
            raise UserError(f"torch.compile failed ({reason}); --compile=false does without it") from e
        if isinstance(e, ValueError) and "environment variable" in str(e):  # RANK, MASTER_ADDR, ...
            raise UserError(f"{str(e).splitlines()[0]}; start several processes with torchrun") from None
        if isinstance(e, dist.DistError) or "gloo" in str(e):
            reason = f"{str(e).splitlines()[0]:.150}" if str(e) else type(e).__name__
            raise UserError(f"another process of this run has ended, or cannot be reached ({reason})") from e
        raise


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(__doc__, "settings:", list_settings(Settings, KINDS), sep="\n")
        print("\nsettings of the model:", list_settings(GPTConfig, KINDS), sep="\n")
        return 0
    settings, model_args = read_command(argv)
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    s = resolve(settings, local_rank=int(os.environ.get("LOCAL_RANK", "0")))
    on_cuda = s.device.startswith("cuda")
    launcher = ["torchrun", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else ["python"]
    with advice(s):
        if on_cuda:
            torch.cuda.set_device(s.device)
            torch.set_float32_matmul_precision("high")  # TF32 for what stays float32
        if processes > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
        run = Run(s, model_args, shlex.join([*launcher, "train.py", *argv]))
        with run.folder.lock() if run.writes else contextlib.nullcontext():
            status = run.go()
    if dist.is_initialized():  # not after an error, which the other processes may not have had: it waits for them
        dist.destroy_process_group()
    return status


if __name__ == "__main__":
    run_program(main)
