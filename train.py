"""Train a GPT: python train.py [config/FILE.py] [--key=value ...]

Without a file it trains config/quickstart.py. Keys are the settings below and the model's own; flags
override the file, and a bare --key sets a switch to true. vocab_size, unless given, is what the data need.
--objective=masked trains an encoder.
The run is left in out/<name of the config file>, and --resume goes on with it.
On several GPUs: torchrun --standalone --nproc_per_node=8 train.py config/FILE.py
"""

import math
import sys
import time
from dataclasses import asdict, dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from model import GPT, GPTConfig, derive_seed
from prepare_data import Dataset, prepare_if_small
from utils.checkpoint import RunFolder, describe, new_state
from utils.device import StopSignal, autocast, barrier, launch_command, measure_speed, print0, processes
from utils.device import rank, resolve, sum_over_ranks, world_size
from utils.settings import UserError, list_settings, read_command, run_program
from utils.watch import check_finite, check_gradient, check_loss_scale, largest_attention_logit

# ---------------------------------------------------------------------------------------------------
# Settings. The comment behind a setting is what --help prints; None is written "auto".


@dataclass(frozen=True)
class Settings:
    # the run
    out_dir: str | None = None  # the run's folder; auto: out/<name of the config file>
    resume: bool = False  # go on with the run in out_dir
    eval_only: bool = False  # evaluate the weights (with resume: the checkpoint's) and stop; writes nothing
    seed: int = 1337  # of weights, batches, masks and dropout, each with random numbers of its own
    # the objective
    objective: str = "next"  # next | masked: predict the next token, or, as an encoder, tokens that are masked
    mask_share: float = 0.15  # masked: the share of each sequence that is masked
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
    watch: bool = False  # log the largest attention logit, too: it grows before a loss blows up
    wandb_log: bool = False  # log to Weights & Biases too (pip install wandb)
    wandb_project: str = "nlqgpt"  # its project there
    # device
    device: str | None = None  # cpu | cuda | cuda:N | mps; auto: the first there is of cuda, mps, cpu
    dtype: str | None = None  # float32 | bfloat16 | float16; auto: the fastest that trains well there
    compile: bool | None = None  # torch.compile the model; auto: on CUDA
    peak_tflops: float | None = None  # of one device, for the MFU; auto: known for many NVIDIA GPUs


# ---------------------------------------------------------------------------------------------------
# The batch of a step, and the objective.


def get_offsets(data, seed, step, n):
    """Where the n sequences of a step begin in train.bin: a pure function of (seed, step), so resuming is exact."""
    raw = np.random.Philox(key=derive_seed(seed, "batch", step)).random_raw(n)
    return (raw % (data.n_tokens("train") - data.block_size)).astype(np.int64)


def get_holes(data, settings, offsets, seed, *key):
    """The masked positions of the windows at offsets (n,) -> True there, (n, block_size), for each window a pure function
    of (seed, key, offset); None where the objective is the next token."""
    if settings.objective == "next":
        return None
    # The same number in each window, so that micro-batches weigh the same.
    count = max(1, round(settings.mask_share * data.block_size))
    raw = [np.random.Philox(key=derive_seed(seed, *key, o)).random_raw(data.block_size) for o in offsets.tolist()]
    return raw <= np.sort(raw)[:, count - 1 : count]  # where the smallest random numbers are


def get_batch(data, split, offsets, end, device, holes=None):
    """Windows at offsets (n,) -> inputs and targets, (n, block_size) each; a target at or past end is -1.

    With holes (n, block_size) the targets are the tokens there, in whose place the inputs have the mask token, the first
    id beyond the data's. Unlike BERT's, none is kept or changed at random: that is not needed (arXiv:2202.08005).
    """
    tokens = data.tokens(split)
    windows = np.full((len(offsets), data.block_size + 1), -1, np.int64)
    for window, offset in zip(windows, offsets):
        part = tokens[offset : min(offset + data.block_size + 1, end)]
        window[: len(part)] = part
    if (largest := windows.max()) >= data.vocab_size:
        found = f"{data.folder / split}.bin holds the token id {largest}, but its vocabulary has {data.vocab_size:,}"
        raise UserError(f"{found}; prepare it anew")
    x, y = windows[:, :-1], windows[:, 1:]
    if holes is not None:
        x, y = np.where(holes, data.vocab_size, x), np.where(holes, x, -1)
    batch = torch.from_numpy(np.stack([x.clip(min=0), y]))  # past the end the model needs some token, too
    if device.startswith("cuda"):  # from pinned memory the copy overlaps with computation
        batch = batch.pin_memory().to(device, non_blocking=True)
    return batch.to(device).unbind()


def get_micro_batches(data, settings, step):
    """This process's part of the batch of a step, one micro-batch (inputs, targets) at a time."""
    # The whole step's batch is drawn first and cut afterwards: neither the size of a micro-batch nor
    # the number of processes can change the data.
    offsets = get_offsets(data, settings.seed, step, settings.gradient_accumulation_steps * settings.batch_size)
    for micro_batch in offsets.reshape(-1, settings.batch_size)[rank() :: world_size()]:
        holes = get_holes(data, settings, micro_batch, settings.seed, "holes", step)
        yield get_batch(data, "train", micro_batch, data.n_tokens("train"), settings.device, holes)


class Objective(torch.nn.Module):
    """What is minimised: the mean cross-entropy of the targets that `get_batch` gives. It returns the loss alone: with
    logits as a second output, the compiled step would write and read a gradient of zeros for them."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x, y):
        return self.model(x, y)[1]


# ---------------------------------------------------------------------------------------------------
# Evaluation.


@torch.no_grad()
def evaluate(objective, data, settings):
    """Mean loss in nats per token over the tokens of val.bin (the first eval_tokens), perplexity, and bits per byte of text.

    The windows tile the file, so that every token but the first is predicted once, whatever the batch size and the
    number of processes. For an encoder: the loss at masked positions, the same in every run, without bits per byte.
    """
    batch_size, val = settings.batch_size, data.meta["val"]
    n = min(val["tokens"] - 1, settings.eval_tokens or math.inf)  # tokens to predict
    if settings.objective == "masked":  # only whole windows, since an encoder would see what fills up the last one
        n = max(data.block_size, n - n % data.block_size)
    offsets = np.arange(0, n, data.block_size)
    offsets = np.pad(offsets, (0, -len(offsets) % batch_size), constant_values=n + 1)  # fill up with empty windows
    total, targets = 0.0, 0
    objective.eval()
    for batch in offsets.reshape(-1, batch_size)[rank() :: world_size()]:
        holes = get_holes(data, settings, batch, seed="validation")  # whatever the run's seed is
        x, y = get_batch(data, "val", batch, n + 1, settings.device, holes)
        count = (y >= 0).sum().item()
        with autocast(settings):
            total += objective(x, y).item() * count
        targets += count
    objective.train()
    loss = sum_over_ranks(total, settings.device) / sum_over_ranks(targets, settings.device)
    found = {"val_loss": loss, "perplexity": math.exp(min(loss, 700))}
    if settings.objective == "next":  # masked tokens alone do not add up to a text
        found["bits_per_byte"] = loss / math.log(2) * val["tokens"] / val["text_bytes"]
    return found


# ---------------------------------------------------------------------------------------------------
# One step.


def get_lr(settings, step):
    """The rate of a step (0 is the first): linear warm-up, then cosine or linear decay, then min_lr."""
    if step < settings.warmup_iters:
        return settings.learning_rate * (step + 1) / (settings.warmup_iters + 1)
    if step >= settings.lr_decay_iters:
        return settings.min_lr
    done = (step - settings.warmup_iters) / (settings.lr_decay_iters - settings.warmup_iters)  # 0 to 1
    coeff = 1 - done if settings.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return settings.min_lr + coeff * (settings.learning_rate - settings.min_lr)


def make_optimizer(model, settings):
    """AdamW; weight decay on matrices and embeddings, none on gains and biases."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    betas = (settings.beta1, settings.beta2)
    return torch.optim.AdamW(groups, lr=settings.learning_rate, betas=betas, fused=True)


def train_step(objective, optimizer, scaler, data, settings, step):
    """One update -> this process's mean loss and the gradient norm before clipping, both left on the device."""
    for group in optimizer.param_groups:
        group["lr"] = get_lr(settings, step)
    torch.manual_seed(derive_seed(settings.seed, "dropout", step, rank()))
    n_micro_batches = settings.gradient_accumulation_steps // world_size()  # of this process
    mean_loss = torch.zeros((), device=settings.device)
    for number, (x, y) in enumerate(get_micro_batches(data, settings, step), 1):
        if dist.is_initialized():  # processes exchange gradients once a step, after the last micro-batch
            objective.require_backward_grad_sync = number == n_micro_batches
        with autocast(settings):
            loss = objective(x, y) / n_micro_batches
        scaler.scale(loss).backward()
        mean_loss += loss.detach()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(objective.parameters(), settings.grad_clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return mean_loss, norm


# ---------------------------------------------------------------------------------------------------
# The run. All processes do the same on their share of each batch; the first one writes and prints.


def fit_to_data(config, settings, data):
    """Give the model what the objective and the data ask for; masking takes a token that the data does not have."""
    config.causal = settings.objective == "next"
    needed = data.vocab_size + (not config.causal)
    config.vocab_size = config.vocab_size or needed  # None unless the command or the config file gives it
    if config.vocab_size < needed:
        what = f"the {needed} of {settings.dataset}" + ("" if config.causal else " and the mask token")
        raise UserError(f"vocab_size={config.vocab_size} is smaller than {what}", status=2)


def train(settings, config, command):
    """From data and model to the last checkpoint -> exit status. command: what to type to begin this run."""
    if rank() == 0:
        prepare_if_small(settings.dataset)
    barrier()
    data = Dataset(settings.dataset, config.block_size)
    fit_to_data(config, settings, data)
    model = GPT(config, seed=settings.seed).to(settings.device)
    optimizer = make_optimizer(model, settings)
    scaler = torch.amp.GradScaler(settings.device.split(":")[0], enabled=settings.dtype == "float16")
    tokens_per_step = settings.batch_size * settings.gradient_accumulation_steps * config.block_size

    started = time.perf_counter()
    state = new_state()  # the step, the last and the best validation loss, and what the speed is measured from
    run = RunFolder(settings.out_dir, writes=rank() == 0 and not settings.eval_only)

    def seconds():  # since the run began, earlier sessions included
        return state["seconds"] + time.perf_counter() - started

    def log(**values):
        run.log({"step": state["step"], **values, "seconds": round(seconds(), 3)})

    def save(name):  # ckpt.pt is what --resume reads: no random state, seeds follow from the step; best.pt is smaller
        checkpoint = {"model": model.state_dict(), "config": asdict(config), "tokenizer": data.tokenizer}
        checkpoint["state"] = {**state, "seconds": seconds()}
        if name == "ckpt.pt":
            checkpoint |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        run.save(name, checkpoint)

    with run.lock(), StopSignal() as stop:
        run.restore(run.begin(describe(settings, model, data, command), settings), model, optimizer, scaler, state)
        run.introduce(settings, model, data, tokens_per_step, state["step"])
        objective = Objective(model)
        if settings.compile:
            objective.compile()  # in place, so that the names of the weights stay as they are
        devices = None if settings.device == "cpu" else [settings.device]
        replica = DistributedDataParallel(objective, device_ids=devices) if dist.is_initialized() else objective
        first_step = state["step"]  # of this session
        health = torch.zeros((), device=settings.device)  # the sum of losses and norms: finite as long as each was

        while True:
            # Evaluate, and keep the best model and the last one.
            step = state["step"]
            due = step % settings.eval_interval == 0 or step >= settings.max_iters
            known = state["val"] is not None and state["val"]["step"] == step
            if settings.eval_only or (due and not known):
                began = time.perf_counter()
                val = evaluate(objective, data, settings)
                check_finite(health + val["val_loss"], run, step, settings)  # so that no bad weights are saved
                best = val["val_loss"] < state["best_val_loss"]
                state["best_val_loss"] = min(val["val_loss"], state["best_val_loss"])
                state["val"] = {"step": step, **val}
                log(**val)
                print0(f"step {step}/{settings.max_iters} {run.words(val)} in {time.perf_counter() - began:.1f} s")
                if best and step > 0:
                    save("best.pt")
                if step > 0:
                    save("ckpt.pt")  # after best.pt, so that a kill in between leaves no best.pt that is older
            if settings.eval_only:
                return 0
            if step >= settings.max_iters:
                break
            if due or step <= first_step + 1:
                timer_step, timer = step, time.perf_counter()

            # One step.
            loss, norm = train_step(replica, optimizer, scaler, data, settings, step)
            health += loss if scaler.is_enabled() else loss + norm  # float16 skips steps whose norm overflows
            state["step"] = step = step + 1

            # Log. Between evaluations only this waits for the GPU.
            if step % settings.log_interval == 0 or step == 1:
                check_finite(health, run, step, settings)
                check_loss_scale(scaler)
                loss, norm = sum_over_ranks(loss, settings.device) / world_size(), norm.item()
                check_gradient(norm, step)
                elapsed, steps = time.perf_counter() - timer, step - timer_step
                speed, words = {"tokens_per_second": None, "mfu": None}, f"first step {elapsed:.1f} s"
                if step > first_step + 1:
                    state["timed_steps"] += steps
                    state["timed_seconds"] += elapsed
                    speed, words = measure_speed(model, settings, elapsed / steps, tokens_per_step, step)
                lr = get_lr(settings, step - 1)
                print0(f"step {step}/{settings.max_iters} loss {loss:.4f} lr {lr:.1e} norm {norm:.2f} {words}")
                watched = {}
                if settings.watch:
                    x, _ = next(get_micro_batches(data, settings, step))
                    watched["largest_logit"] = largest_attention_logit(model, x[:1], settings)
                log(train_loss=loss, learning_rate=lr, grad_norm=norm, **speed, **watched)
                timer_step, timer = step, time.perf_counter()

            # A signal to any process stops all of them. Asking for it does not wait for the GPU.
            if sum_over_ranks(stop.number, "cpu"):
                check_finite(health, run, step, settings)
                save("ckpt.pt")
                barrier()  # no process ends, and takes the others along, before the checkpoint is in place
                return run.stop(settings, command, step, stop.number)

        run.finish(settings, state, tokens_per_step, seconds())
    return 0


def main(argv=None, program=("train.py",)):
    argv = sys.argv[1:] if argv is None else argv
    if "-h" in argv or "--help" in argv:
        print(__doc__, "settings, as they are where no file or flag gives them:", list_settings(Settings), sep="\n")
        print("\nsettings of the model:", list_settings(GPTConfig), sep="\n")
        return 0
    settings, config = read_command(argv, Settings, GPTConfig)
    settings = resolve(settings)  # what is still None ("auto") gets its value
    with processes(settings):
        return train(settings, config, launch_command(*program, *argv))


if __name__ == "__main__":
    run_program(main)
