"""Devices and number formats, the processes of a run, and the signals that stop it."""

import contextlib
import dataclasses
import os
import platform
import re
import signal
from pathlib import Path

import torch
import torch.distributed as dist

from utils.settings import UserError


def resolve(settings):
    """The settings with a value, for the device of this process, in place of each auto."""
    device = pick_device(settings.device, int(os.environ.get("LOCAL_RANK", "0")))
    if settings.dtype == "float16" and not device.startswith("cuda"):
        raise UserError("dtype=float16 needs a CUDA device; use bfloat16 or float32", status=2)
    auto = {
        "dtype": best_dtype(device),
        "compile": device.startswith("cuda"),
        "lr_decay_iters": settings.max_iters,
        "min_lr": settings.learning_rate / 10 if settings.lr_schedule == "cosine" else 0.0,
    }
    auto = {name: value for name, value in auto.items() if getattr(settings, name) is None}
    return dataclasses.replace(settings, device=device, **auto)


def pick_device(device=None, local_rank=0):
    """The device that is asked for, or else the first of cuda, mps and cpu."""
    if device is None:
        has_mps = torch.backends.mps.is_available()
        device = "cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu"
    if device == "cuda":  # a launcher may show each process all GPUs, or its own alone
        device = f"cuda:{0 if torch.cuda.device_count() == 1 else local_rank}"
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as e:
        reason = str(e).partition("\n")[0]
        raise UserError(f"device={device} is not there: {reason}") from None
    return device


def best_dtype(device):
    """The number format that is fastest on a device and trains well."""
    if device.startswith("cuda"):
        has_bfloat16 = torch.cuda.is_bf16_supported(including_emulation=False)
        return "bfloat16" if has_bfloat16 else "float16"
    # A processor without instructions for bfloat16 emulates them, slower than float32. Only
    # torch 2.10 and newer know what the processor has.
    can = getattr(torch.cpu, "get_capabilities", dict)() if device == "cpu" else {}
    return "bfloat16" if can.get("amx_bf16") or can.get("avx512_bf16") else "float32"


def autocast(settings):
    """Compute matrix products in settings.dtype; float32 leaves everything in float32."""
    dtype = getattr(torch, settings.dtype)
    kind = settings.device.split(":")[0]
    return torch.autocast(kind, dtype, enabled=dtype != torch.float32)


def device_name(device):
    """The name of the GPU, or of the processor and its threads, on which rounding depends."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, TypeError):  # Linux on x86 knows more
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    return f"{name}, {torch.get_num_threads()} threads"


@contextlib.contextmanager
def processes(settings):
    """Prepare this process for training, and join the others that torchrun started."""
    accumulation = settings.gradient_accumulation_steps
    if accumulation % world_size():
        problem = f"gradient_accumulation_steps={accumulation} is no multiple of the"
        raise UserError(f"{problem} {world_size()} processes", status=2)
    # Some gradients fall below 1e-38. On an Intel Xeon such numbers made a step 5 times as long.
    torch.set_flush_denormal(True)
    on_cuda = settings.device.startswith("cuda")
    if on_cuda:
        torch.cuda.set_device(settings.device)
        # TF32 would be less exact than the float32 that is asked for.
        precision = "highest" if settings.dtype == "float32" else "high"
        torch.set_float32_matmul_precision(precision)
    if world_size() > 1 or "RANK" in os.environ:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """The number of processes, which torchrun puts into the environment."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def barrier():
    """Wait for the other processes."""
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(value, device):
    """The sum of a number (or one-element tensor) over all processes, as a float."""
    if not dist.is_initialized():
        return float(value)
    total = torch.tensor(float(value), dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.item()


def print0(text):
    if rank() == 0:
        print(text, flush=True)


@contextlib.contextmanager
def stop_signals():
    """A list that receives the numbers of SIGINT and SIGTERM; a second Ctrl-C acts at once."""
    received = []

    def receive(number, frame):
        if number == signal.SIGINT and signal.SIGINT in received:
            raise KeyboardInterrupt
        received.append(number)

    signals = (signal.SIGINT, signal.SIGTERM)
    previous = {number: signal.signal(number, receive) for number in signals}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
