"""Train a GPT: python train.py [config/FILE.py] [--key=value ...]

Without a file it trains config/quickstart.py. Flags override the file, and a
bare --key means true. The run is written to out/NAME for config/NAME.py, and
--resume continues it. --objective=masked trains an encoder. On several GPUs:
torchrun --standalone --nproc_per_node=8 train.py config/FILE.py
"""

import math
import signal
import sys
import time
from dataclasses import asdict, dataclass
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from model import GPT, GPTConfig
from utils.checkpoint import RunFolder, describe
from utils.data import Dataset, prepare_if_small
from utils.device import autocast, barrier, print0, processes, rank, resolve
from utils.device import stop_signals, sum_over_ranks, world_size
from utils.seeds import derive_seed
from utils.settings import UserError, read_command, run_program

# ---- Settings. --help prints the comment behind each ---------------------------------------------


@dataclass(frozen=True)
class Settings:
    # the run
    out_dir: str | None = None  # the run's folder; auto: out/<name of the config file>
    resume: bool = False  # continue the run in out_dir
    eval_only: bool = False  # evaluate and stop; with resume the checkpoint, else initial weights
    seed: int = 1337  # of weights, batches, masks and dropout, each with its own random stream
    # the objective
    objective: str = "next"  # next | masked: predict the next token, or masked tokens (an encoder)
    mask_share: float = 0.15  # masked: the share of each sequence that is masked
    # data
    dataset: str = "openwebtext"  # a folder in data/; see prepare_data.py
    batch_size: int = 12  # sequences in one micro-batch
    gradient_accumulation_steps: int = 40  # micro-batches in a step, of all processes together
    # optimisation: AdamW
    learning_rate: float = 6e-4  # highest rate, reached after the warm-up
    min_lr: float | None = None  # at lr_decay_iters; auto: learning_rate / 10 (cosine), 0 (linear)
    lr_schedule: str = "cosine"  # cosine | linear: shape of the decay
    warmup_iters: int = 2000  # steps of linear warm-up
    lr_decay_iters: int | None = None  # step at which min_lr is reached; auto: max_iters
    max_iters: int = 60002  # steps
    weight_decay: float = 0.1  # on every tensor of two or more dimensions
    beta1: float = 0.9  # AdamW's decay of the mean gradient
    beta2: float = 0.95  # AdamW's decay of the mean squared gradient
    grad_clip: float = 1.0  # largest gradient norm; 0: no clipping
    # evaluation and logging
    eval_interval: int = 1000  # steps between evaluations; each after step 0 saves a checkpoint
    eval_tokens: int | None = None  # evaluate on the first eval_tokens of val.bin; auto: all
    log_interval: int = 10  # steps between log lines
    wandb_log: bool = False  # log to Weights & Biases, too (needs the package wandb)
    wandb_project: str = "nlqgpt"  # its project there
    # device
    device: str | None = None  # cpu | cuda | cuda:N | mps; auto: the first of cuda, mps, cpu
    dtype: str | None = None  # float32 | bfloat16 | float16; auto: the fastest that trains well
    compile: bool | None = None  # torch.compile the model; auto: on CUDA


# ---- The batch of a step -------------------------------------------------------------------------


def get_offsets(data, seed, step, n):
    """Where the n sequences of a step begin in train.bin: a pure function of (seed, step)."""
    raw = np.random.Philox(key=derive_seed(seed, "batch", step)).random_raw(n)
    return (raw % (data.n_tokens("train") - data.block_size)).astype(np.int64)


def get_windows(data, split, offsets, end):
    """The tokens at offsets (n,) -> (n, block_size + 1) int64, with -1 from position `end` on."""
    tokens = data.tokens(split)[:end]
    windows = np.full((len(offsets), data.block_size + 1), -1, np.int64)
    for window, offset in zip(windows, offsets):
        part = tokens[offset : offset + data.block_size + 1]
        window[: len(part)] = part
    if windows.max() >= data.vocab_size:
        problem = f"{split}.bin holds the token id {windows.max()}"
        raise UserError(f"{problem}, but {data.folder} has a vocabulary of {data.vocab_size:,}")
    return windows


def mask_tokens(x, mask_id, settings, offsets, mask_key):
    """For an encoder: tokens x (n, block_size) -> inputs and targets of the same shape.

    The targets are the masked tokens, and -1 elsewhere; the inputs have mask_id in their place.
    Which ones are masked is a pure function of (mask_key, offset). All become the mask: the random
    replacements of BERT are not needed (arXiv:2202.08005).
    """
    n, block_size = x.shape
    raw = np.empty((n, block_size), np.uint64)
    for row, offset in zip(raw, offsets.tolist()):
        row[:] = np.random.Philox(key=derive_seed(*mask_key, offset)).random_raw(block_size)
    # Each sequence has the same number of masks, so that all micro-batches weigh the same. They
    # stand where the random numbers are smallest.
    count = max(1, round(settings.mask_share * block_size))
    masked = raw <= np.sort(raw)[:, count - 1 : count]
    return np.where(masked, mask_id, x), np.where(masked, x, -1)


def get_batch(data, split, offsets, settings, mask_key, end=None):
    """The sequences at offsets (n,) -> inputs x and targets y, (n, block_size) each, on the device.

    The loss ignores targets of -1: those from position `end` on, and for an encoder unmasked ones.
    """
    windows = get_windows(data, split, offsets, end)
    x, y = windows[:, :-1], windows[:, 1:]
    if settings.objective == "masked":
        x, y = mask_tokens(x, data.vocab_size, settings, offsets, mask_key)
    x = x.clip(min=0)  # padding needs a valid id; its target is -1
    batch = torch.from_numpy(np.stack([x, y]))
    if settings.device.startswith("cuda"):  # a copy from pinned memory overlaps with computation
        batch = batch.pin_memory()
    return batch.to(settings.device, non_blocking=True).unbind()


def get_micro_batches(data, settings, step):
    """This process's micro-batches (x, y) of a step, which log lines count as step + 1."""
    # Draw the whole step and then divide it, so that neither the size of a micro-batch nor the
    # number of processes changes the data.
    n = settings.gradient_accumulation_steps * settings.batch_size
    micro_batches = get_offsets(data, settings.seed, step, n).reshape(-1, settings.batch_size)
    for offsets in micro_batches[rank() :: world_size()]:
        yield get_batch(data, "train", offsets, settings, (settings.seed, "holes", step))


# ---- Evaluation and one step ---------------------------------------------------------------------


@torch.no_grad()
def evaluate(model, data, settings):
    """{"val_loss", "perplexity", "bits_per_byte"} over val.bin, or its first eval_tokens.

    val_loss is the mean in nats per token. The windows tile the file, so each token but the first
    is predicted once, whatever the batch size and the number of processes. For an encoder, val_loss
    is the mean over masked tokens, the same ones in every run, and bits_per_byte is left out.
    """
    val = data.meta["val"]
    n = min(val["tokens"] - 1, settings.eval_tokens or math.inf)  # tokens to predict
    if settings.objective == "masked":  # whole windows: an encoder would see the padding of others
        n = max(data.block_size, n - n % data.block_size)
    offsets = np.arange(0, n, data.block_size)
    missing = -len(offsets) % settings.batch_size  # windows past the end fill the last batch
    offsets = np.pad(offsets, (0, missing), constant_values=n + 1)
    total = 0.0
    count = 0
    model.eval()
    for part in offsets.reshape(-1, settings.batch_size)[rank() :: world_size()]:
        # The key is fixed, so that every run masks the same tokens.
        x, y = get_batch(data, "val", part, settings, mask_key=("validation",), end=n + 1)
        n_targets = (y >= 0).sum().item()
        with autocast(settings):
            total += model(x, y).item() * n_targets
        count += n_targets
    model.train()
    loss = sum_over_ranks(total, settings.device) / sum_over_ranks(count, settings.device)
    result = {"val_loss": loss, "perplexity": math.exp(min(loss, 700))}
    if settings.objective == "next":
        result["bits_per_byte"] = loss / math.log(2) * val["tokens"] / val["text_bytes"]
    return result


def get_lr(settings, step):
    """The learning rate of a step: linear warm-up, cosine or linear decay, then min_lr."""
    if step < settings.warmup_iters:
        return settings.learning_rate * (step + 1) / (settings.warmup_iters + 1)
    if step >= settings.lr_decay_iters:
        return settings.min_lr
    done = (step - settings.warmup_iters) / (settings.lr_decay_iters - settings.warmup_iters)
    share = 1 - done if settings.lr_schedule == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return settings.min_lr + share * (settings.learning_rate - settings.min_lr)


def make_optimizer(model, settings):
    """AdamW, with weight decay on matrices and embeddings, but not on gains and biases."""
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, betas=(settings.beta1, settings.beta2), fused=True)


def train_step(model, optimizer, scaler, data, settings, step):
    """One update -> the mean loss of this process and the gradient norm before clipping.

    Both stay on the device: nothing in this function waits for it.
    """
    for group in optimizer.param_groups:
        group["lr"] = get_lr(settings, step)
    dropout_seed = derive_seed(settings.seed, "dropout", step, rank())
    torch.manual_seed(dropout_seed)
    n_micro_batches = settings.gradient_accumulation_steps // world_size()
    mean_loss = torch.zeros((), device=settings.device)
    for number, (x, y) in enumerate(get_micro_batches(data, settings, step), 1):
        if dist.is_initialized():  # like no_sync(): exchange gradients after the last one only
            model.require_backward_grad_sync = number == n_micro_batches
        with autocast(settings):
            loss = model(x, y) / n_micro_batches
        scaler.scale(loss).backward()
        mean_loss += loss.detach()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), settings.grad_clip or math.inf)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    return mean_loss, norm


# ---- The run. All processes do the same with their share of each batch; rank 0 prints and writes -


def fit_to_data(config, settings, data):
    """Complete the model's configuration by what the objective and the data need."""
    config.causal = settings.objective == "next"
    needed = data.vocab_size if config.causal else data.vocab_size + 1  # with the mask token
    config.vocab_size = config.vocab_size or needed
    if config.vocab_size < needed:
        problem = f"vocab_size={config.vocab_size} is smaller than the {needed}"
        raise UserError(f"{problem} that {settings.dataset} needs", status=2)


def save(run, model, optimizer, scaler, data, state, is_best=False):
    """Write ckpt.pt, from which --resume continues; if is_best also best.pt, for sample.py."""
    checkpoint = {"model": model.state_dict(), "config": asdict(model.config)}
    checkpoint |= {"tokenizer": data.tokenizer, "state": state}
    # best.pt comes first: if we are killed between the two, --resume writes both again.
    if is_best:
        run.save("best.pt", checkpoint)
    training = {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    run.save("ckpt.pt", {**checkpoint, **training})


def restore(checkpoint, model, optimizer, scaler, state):
    """Load what `save` wrote, or an imported model, whose state is the step alone."""
    model.load_state_dict(checkpoint["model"])
    if "optimizer" in checkpoint:  # an imported model has none
        optimizer.load_state_dict(checkpoint["optimizer"])
    if checkpoint.get("scaler"):  # it is empty unless the run was in float16
        scaler.load_state_dict(checkpoint["scaler"])
    state.update({key: value for key, value in checkpoint["state"].items() if key in state})


def check_finite(value, run, step, settings):
    """UserError where a loss, or a sum of weights, is not finite. The last checkpoint stays."""
    if not math.isfinite(value):
        run.log(step, diverged=True)
        hint = f"a lower learning_rate (now {settings.learning_rate:g}) or longer warm-up may help"
        raise UserError(f"the loss or a weight is not finite at step {step}; {hint}")


def train(settings, config):
    """Train until max_iters, from step 0 or with --resume from ckpt.pt. Returns the exit status."""
    if rank() == 0:
        prepare_if_small(settings.dataset)
    barrier()  # wait until rank 0 has prepared the data
    data = Dataset(settings.dataset, config.block_size)
    fit_to_data(config, settings, data)
    model = GPT(config, seed=settings.seed).to(settings.device)
    optimizer = make_optimizer(model, settings)
    scaler = torch.amp.GradScaler("cuda", enabled=settings.dtype == "float16")
    tokens_per_step = settings.batch_size * settings.gradient_accumulation_steps * config.block_size
    # The progress of the run. It holds no random state, since all seeds follow from the step.
    state = {"step": 0, "val": None, "best_val_loss": math.inf, "seconds": 0.0}

    # stop: a list of received signals. checkpoint: the content of ckpt.pt, None for a new run.
    run = RunFolder(settings.out_dir, writes=rank() == 0 and not settings.eval_only)
    with run.open(describe(settings, model, data), settings) as checkpoint, stop_signals() as stop:
        if checkpoint:
            restore(checkpoint, model, optimizer, scaler, state)
        step = state["step"]
        n_parameters = model.parameter_report()["total"]
        print0(f"{run.path}: {config.query_mode} query, {n_parameters:,} parameters, step {step}")
        if settings.compile:
            model.compile()  # in place, so that the weights keep their names
        replica = DistributedDataParallel(model) if dist.is_initialized() else model
        started = time.perf_counter() - state["seconds"]
        lap = None  # the step and the time from which the speed is measured

        while True:
            # A signal to any process stops all of them here; during an evaluation, a step later.
            if sum_over_ranks(len(stop), "cpu"):
                weights = sum(weight.sum() for weight in model.state_dict().values())
                check_finite(weights, run, step, settings)
                state.update(step=step, seconds=time.perf_counter() - started)
                save(run, model, optimizer, scaler, data, state)
                barrier()  # wait until rank 0 has saved: torchrun kills all when one process ends
                print0(f"stopped after step {step} and saved; --resume continues")
                return 128 + (stop[0] if stop else signal.SIGTERM)

            # Evaluate and save, unless the checkpoint that was resumed has this step's result.
            is_last = step >= settings.max_iters
            is_known = state["val"] is not None and state["val"]["step"] == step
            is_due = (is_last or step % settings.eval_interval == 0) and not is_known
            if is_due or settings.eval_only:
                val = evaluate(replica, data, settings)
                check_finite(val["val_loss"], run, step, settings)
                text = " ".join(f"{name} {value:.4f}" for name, value in val.items())
                print0(f"step {step}/{settings.max_iters} {text}")
                seconds = time.perf_counter() - started
                run.log(step, **val, seconds=seconds)
                is_best = val["val_loss"] < state["best_val_loss"]
                state.update(step=step, seconds=seconds, val={"step": step, **val})
                state["best_val_loss"] = min(val["val_loss"], state["best_val_loss"])
                if step > 0:  # the initial weights follow from the seed
                    save(run, model, optimizer, scaler, data, state, is_best)
                if lap:  # leave the evaluation out of the speed
                    lap = (step, time.perf_counter())
            if settings.eval_only:
                return 0
            if is_last:
                break

            # One step.
            loss, norm = train_step(replica, optimizer, scaler, data, settings, step)
            step += 1

            # Log. Only logging, evaluating and saving wait for the GPU.
            if step % settings.log_interval == 0 or step == 1:
                train_loss = sum_over_ranks(loss, settings.device) / world_size()
                check_finite(train_loss, run, step, settings)
                if scaler.is_enabled() and scaler.get_scale() < 1:
                    raise UserError("float16 overflows in all steps; use --dtype=float32")
                norm = norm.item()
                lr = get_lr(settings, step - 1)
                text = f"loss {train_loss:.4f} lr {lr:.1e} norm {norm:.2f}"
                speed = None
                now = time.perf_counter()
                if lap:  # the first log line has no speed: its steps may include compilation
                    speed = (step - lap[0]) * tokens_per_step / (now - lap[1])
                    eta = round((settings.max_iters - step) * tokens_per_step / speed)
                    text += f" {speed / 1000:.1f}k tok/s eta {timedelta(seconds=eta)}"
                lap = (step, now)
                print0(f"step {step}/{settings.max_iters} {text}")
                values = {"train_loss": train_loss, "learning_rate": lr, "grad_norm": norm}
                run.log(step, **values, tokens_per_second=speed, seconds=now - started)

    seconds = round(time.perf_counter() - started)
    print0(f"done in {timedelta(seconds=seconds)}; sample from it: python sample.py {run.path}")
    return 0


def main(argv=None):
    settings, config = read_command(sys.argv[1:] if argv is None else argv, Settings, GPTConfig)
    settings = resolve(settings)  # what is still None ("auto") gets its value
    with processes(settings):
        return train(settings, config)


if __name__ == "__main__":
    run_program(main)
