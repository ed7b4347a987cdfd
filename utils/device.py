"""Devices, number formats, the processes of a run, signals; and errors of all of these in one line."""

import contextlib
import dataclasses
import os
import platform
import re
import shlex
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from utils.settings import UserError, clock, out_of_memory, short

# ---------------------------------------------------------------------------------------------------
# Devices.


def resolve(settings):
    """Fill in the settings that are auto, for the device of this process."""
    device = pick_device(settings.device, int(os.environ.get("LOCAL_RANK", "0")))
    if settings.dtype == "float16" and not device.startswith("cuda"):
        raise UserError(f"dtype=float16 needs a CUDA device, not {device}; use bfloat16 or float32", status=2)
    dtype = settings.dtype or best_dtype(device)
    default_min_lr = settings.learning_rate / 10 if settings.lr_schedule == "cosine" else 0.0
    return dataclasses.replace(
        settings,
        device=device,
        dtype=dtype,
        compile=device.startswith("cuda") if settings.compile is None else settings.compile,
        peak_tflops=settings.peak_tflops or (peak_tflops(device) if dtype != "float32" else None),
        lr_decay_iters=settings.lr_decay_iters or settings.max_iters,
        min_lr=default_min_lr if settings.min_lr is None else settings.min_lr,
    )


def pick_device(device=None, local_rank=0):
    """A device that is there: the one asked for, else the first of cuda, mps and cpu."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there, gpus = [kind for kind in available if available[kind]], torch.cuda.device_count()
    kind, _, number = (device or there[0]).partition(":")
    number = number or str(0 if gpus == 1 else local_rank)  # a launcher may show each process its own GPU alone
    if kind not in there or not number.isdigit() or (kind == "cuda" and int(number) >= gpus):
        asked = device or f"cuda:{number}, of this process"
        raise UserError(f"device={asked} is not there; torch {torch.__version__} has {', '.join(there)} ({gpus} GPUs)")
    return f"cuda:{number}" if kind == "cuda" else kind


def best_dtype(device):
    """The number format that is fastest there and trains well."""
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    # torch 2.10 and newer can tell; a processor without these instructions emulates them, slower than float32.
    told = getattr(torch.cpu, "get_capabilities", dict)() if device == "cpu" else {}
    return "bfloat16" if told.get("amx_bf16") or told.get("avx512_bf16") else "float32"


def autocast(settings):
    """Matrix products in settings.dtype; float32 means everything in float32."""
    dtype = getattr(torch, settings.dtype)
    return torch.autocast(settings.device.split(":")[0], dtype, enabled=dtype != torch.float32)


def allow_tf32(settings):
    """TF32 where float32 is not asked for, as it would be less exact; for other formats torch warns if it is off."""
    if settings.device.startswith("cuda") and settings.dtype != "float32":
        torch.set_float32_matmul_precision("high")


def peak_tflops(device):
    """Dense bf16 TFLOP/s with fp32 accumulation, as the maker states them; None where unknown."""
    peaks = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200 NVL": 836, "H200": 989, "A100": 312, "L40S": 362}
    peaks |= {"B200": 2250, "RTX 4090 D": 147, "RTX 4090": 165, "RTX 5090": 209}
    name = device_name(device) if device.startswith("cuda") else ""
    if "Laptop" in name or "MIG" in name:  # slower ones, and parts, of the same name
        return None
    return next((float(peak) for part, peak in peaks.items() if re.search(rf"{part}\b", name)), None)


def flops_per_token(model):
    """Floating-point operations of one training step per token, forward and backward (PaLM, appendix B).

    Six for each weight of a matrix product, the query's and the output head's included, and 12 n_layer d T for the
    two products inside attention, counted as if it were not causal.
    """
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    config = model.config
    return 6 * weights + 12 * config.n_layer * config.n_embd * config.block_size


def measure_speed(model, settings, seconds_per_step, tokens_per_step, step):
    """What a step's time means -> {tokens_per_second, mfu (None where the peak is unknown)}, and words for a log line."""
    speed, mfu = tokens_per_step / seconds_per_step, None
    words = f"{short(speed)} tok/s"
    if settings.peak_tflops:
        mfu = speed * flops_per_token(model) / (settings.peak_tflops * 1e12 * world_size())
        words += f" mfu {mfu:.0%}"
    words += f" eta {clock((settings.max_iters - step) * seconds_per_step)}"
    return {"tokens_per_second": speed, "mfu": mfu}, words


def device_name(device):
    """The GPU's name, or the processor's with the number of threads, on which rounding depends."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, TypeError):  # Linux on x86 tells more
        name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())[1]
    return f"{name}, {torch.get_num_threads()} threads"


def peak_memory(device):
    """Bytes: of the GPU on CUDA, else of this process; None where the system does not tell."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# ---------------------------------------------------------------------------------------------------
# Processes: one, or as many as torchrun started.


@contextlib.contextmanager
def processes(settings):
    """Join the other processes of the run, where there are any; what goes wrong within is told in one line."""
    on_cuda, n = settings.device.startswith("cuda"), world_size()
    if settings.gradient_accumulation_steps % n:
        steps = settings.gradient_accumulation_steps
        raise UserError(
            f"gradient_accumulation_steps={steps} cannot be shared by {n} processes: take a multiple of {n}, and a "
            f"batch_size (now {settings.batch_size}) so that their product stays the same",
            status=2,
        )
    with explained_errors(settings):
        # Gradients of tokens that never come fall below 1e-38; on an Intel Xeon such numbers made a step 5 times as long.
        torch.set_flush_denormal(True)
        if on_cuda:
            torch.cuda.set_device(settings.device)
            allow_tf32(settings)
        if n > 1 or "RANK" in os.environ:  # torchrun sets it
            dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo")
        yield
    if dist.is_initialized():
        dist.destroy_process_group()


def launch_command(*words):
    """What to type to start python's words with as many processes as there are now; on each node, where there are several."""
    n = world_size()
    here = int(os.environ.get("LOCAL_WORLD_SIZE", n))
    nodes = "--standalone" if here == n else f"--nnodes={n // here}"
    return shlex.join([*(["torchrun", nodes, f"--nproc_per_node={here}"] if n > 1 else ["python"]), *words])


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))


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
    """Print once, not once a process."""
    if rank() == 0:
        print(text, flush=True)


class StopSignal:
    """Remembers SIGINT or SIGTERM, so that the step under way can finish; a second Ctrl-C acts at once."""

    def __enter__(self):
        self.number = 0
        self.previous = {n: signal.signal(n, self.receive) for n in (signal.SIGINT, signal.SIGTERM)}
        return self

    def receive(self, number, frame):
        self.number = number
        if number == signal.SIGINT:  # torchrun follows it with a SIGTERM, which must not cut the saving short
            signal.signal(number, self.previous[number])

    def __exit__(self, *exception):
        for number, handler in self.previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def explained_errors(settings):
    """Say what to change when the device is out of memory, the compiler fails, or another process is gone."""
    try:
        yield
    except UserError:
        raise
    except Exception as e:
        reason = f"{type(e).__name__}: {(str(e).splitlines() or [''])[0]:.200}"
        if out_of_memory(e):
            raise UserError(
                f"out of memory on {settings.device}: halve batch_size (now {settings.batch_size}) and double "
                f"gradient_accumulation_steps (now {settings.gradient_accumulation_steps}): the steps stay the "
                "same; or take a smaller model"
            ) from None
        if settings.compile and type(e).__module__.startswith(("torch._dynamo", "torch._inductor")):
            raise UserError(f"torch.compile failed ({reason}); --compile=false does without it") from e
        if isinstance(e, ValueError) and "environment variable" in str(e):  # RANK, MASTER_ADDR, ...
            raise UserError(f"{str(e).splitlines()[0]}; start several processes with torchrun") from None
        if "Duplicate GPU" in str(e):  # NCCL's words
            count = torch.cuda.device_count()
            raise UserError(f"two processes share a GPU: start at most {count}, with --device=cuda or auto") from None
        if isinstance(e, dist.DistError) or "gloo" in str(e):
            raise UserError(f"another process of this run has ended, or cannot be reached ({reason})") from e
        raise
