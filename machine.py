"""The machine a program runs on: its devices and number formats, the processes that share a run, signals."""

import contextlib
import platform
import re
import signal
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from command import UserError

# ---------------------------------------------------------------------------------------------------
# Devices.


def pick_device(device=None, local_rank=0):
    """A device that is there: the one asked for, else the first of cuda, mps and cpu."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    there = [kind for kind in available if available[kind]]
    kind, _, number = (device or there[0]).partition(":")
    number = number or str(local_rank)
    if kind not in there or not number.isdigit() or (kind == "cuda" and int(number) >= torch.cuda.device_count()):
        asked, gpus = device or f"cuda:{number}, of this process", f" ({torch.cuda.device_count()} GPUs)"
        raise UserError(f"device={asked} is not there; torch {torch.__version__} finds {', '.join(there)}{gpus}")
    return f"cuda:{number}" if kind == "cuda" else kind


def best_dtype(device):
    """The number format that is fastest there and trains well."""
    if device.startswith("cuda"):
        return "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16"
    # A processor without instructions for bf16 matrices (AMX) emulates them, many times slower than float32.
    capabilities = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.10 and newer can tell
    return "bfloat16" if device == "cpu" and capabilities.get("amx_bf16") else "float32"


def autocast(device, dtype):
    """Matrix products in dtype; float32 means everything in float32."""
    return torch.autocast(device.split(":")[0], getattr(torch, dtype), enabled=dtype != "float32")


def peak_tflops(device):
    """Dense bf16 TFLOP/s with fp32 accumulation, as the maker states them; None where unknown."""
    peaks = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312, "RTX 4090": 165, "RTX 5090": 209}
    name = device_name(device) if device.startswith("cuda") else ""
    return next((float(peak) for part, peak in peaks.items() if part in name and "Laptop" not in name), None)


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


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


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


def say(text):
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
