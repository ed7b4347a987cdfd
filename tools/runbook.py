"""What `python -m tools.bench gpu` does: all that is to be known of this project on a GPU, in under nine minutes.

It begins with what makes the rest worthless if it is wrong, and writes gpu.json and gpu.md anew after each step, so that
a run that is cut off keeps what it has. On a CPU, with --shape tiny, it is a rehearsal.
"""

import gc
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch

from model import GPT, QUERIES, GPTConfig
from tools.bench import PEER, SHAPES, make_model, make_training
from tools.bench_data import timed
from train import Objective
from utils.device import autocast, device_name, flops_per_token, peak_memory, peak_tflops
from utils.files import new_file
from utils.generation import for_generation, formats

ROOT = Path(__file__).parent.parent
# Parts of kernels' names, and what these kernels do; the first that fits counts.
KERNELS = {"attention": "flash|fmha|sdpa|attention", "products": "gemm|cutlass|nvjet|mm_|cublas", "optimizer": "adam"}
KERNELS |= {"loss": "softmax|nll|cross_entropy", "norms and other pointwise": "triton"}


def run(options, settings):
    """Take all steps -> exit status; 1 where the gradients are wrong."""
    about = {"device": device_name(settings.device), "torch": torch.__version__, "dtype": settings.dtype}
    book, started = {"about": about | {"shape": options.shape, "compile": settings.compile}}, time.perf_counter()
    for step in STEPS:
        began = time.perf_counter()
        try:
            rows = step(options, settings)
        except Exception as e:  # the steps after it are worth having all the same
            rows = [{"failed": f"{type(e).__name__}: {str(e)[:300]}"}]
        found = {"what": step.__doc__.splitlines()[0], "rows": rows, "seconds": time.perf_counter() - began}
        book[step.__name__] = found
        free_memory()
        write(book, options.out)
        print(to_markdown(step.__name__, found), flush=True)
        if step.__name__ == "gradients" and any(not row.get("right") for row in rows):
            print("the gradients are wrong: nothing else is measured")
            return 1
    print(f"written to {options.out}/gpu.json and gpu.md in {time.perf_counter() - started:.0f} s")
    return 0


def write(book, folder):
    folder.mkdir(parents=True, exist_ok=True)
    about = ", ".join(f"{key} {value}" for key, value in book["about"].items())
    steps = [to_markdown(name, step) for name, step in book.items() if name != "about"]
    for name, text in (("gpu.json", json.dumps(book, indent=1)), ("gpu.md", "\n\n".join([about, *steps]))):
        with new_file(folder / name) as f:
            f.write(f"{text}\n".encode())


def free_memory():
    """Give the GPU's memory back, which the next step, or a process that it starts, may need."""
    gc.collect()
    torch.cuda.empty_cache()


def to_markdown(name, step):
    """A heading, a sentence and a table; rows are dicts with the same keys."""
    lines, header = [f"## {name}", f"{step['what']} ({step['seconds']:.0f} s)"], list(step["rows"][0])
    table = [header, ["---"] * len(header), *([words(row.get(key)) for key in header] for row in step["rows"])]
    return "\n\n".join([*lines, "\n".join(f"| {' | '.join(cells)} |" for cells in table)])


def words(value):
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.4g}"
    return str(value)


# ---------------------------------------------------------------------------------------------------
# The steps. Each returns the rows of its table.


def gradients(options, settings):
    """A compiled step in the number format of training against an eager one in float32: loss and gradients."""
    shape, rows = {**SHAPES[options.shape], "n_layer": 2}, []
    idx = torch.randint(shape["vocab_size"], (4, shape["block_size"] + 1), device=settings.device)
    for mode in QUERIES:
        found = []
        for dtype, compiled in (("float32", False), (settings.dtype, True)):
            objective = Objective(GPT(GPTConfig(query_mode=mode, **shape)).to(settings.device))
            if compiled:
                objective.compile(fullgraph=True)
            with autocast(replace(settings, dtype=dtype)):
                loss = objective(idx[:, :-1], idx[:, 1:].contiguous())
            loss.backward()
            found.append((loss.item(), torch.cat([p.grad.flatten() for p in objective.parameters()])))
        (exact, gradient), (loss, other) = found
        cosine = torch.nn.functional.cosine_similarity(gradient, other, dim=0).item()
        right = cosine > 0.99 and abs(loss / exact - 1) < 0.01 and 0.9 < (other.norm() / gradient.norm()).item() < 1.1
        row = {"query": mode, "loss": loss, "eager float32": exact, "cosine of gradients": cosine, "right": right}
        rows.append(row)
    return rows


def model_tests(options, settings):
    """test_model.py with the model on this device."""
    environment = {**os.environ, "TEST_DEVICE": settings.device}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "test_model.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    return [{"result": (done.stdout.strip() or done.stderr.strip()).splitlines()[-1]}]


def speed(options, settings):
    """Training, in turns; MFU as PaLM's appendix B counts operations. The profile is of the last query of a batch."""
    rows = []
    batches = {60: [*QUERIES], 12: ["linear", "nonlinear"], 120: ["nonlinear"]}
    if options.shape == "tiny":
        batches = {2: [*QUERIES]}
    if options.peer:
        next(iter(batches.values())).insert(0, PEER)
    for batch, names in batches.items():
        torch.compiler.reset()  # else what was compiled for another batch size would make this one general
        try:
            rows += speed_of_batch(names, SHAPES[options.shape], replace(settings, batch_size=batch), options.repeats)
        except torch.OutOfMemoryError:
            rows.append({"batch": batch, "query": "out of memory"})
        free_memory()
    return rows


def speed_of_batch(names, shape, settings, repeats):
    """A row for each name."""
    on_cuda, peak, rows = settings.device.startswith("cuda"), peak_tflops(settings.device), []
    trainings = {name: make_training(name, shape, settings) for name in names}
    first = {name: timed(take_steps, 1)[0] for name, take_steps in trainings.items()}
    seconds, memory = {name: [] for name in names}, {}
    for _ in range(repeats):
        for name, take_steps in trainings.items():
            idle = torch.cuda.memory_allocated(settings.device) if on_cuda else 0  # weights and moments of all models
            if on_cuda:
                torch.cuda.reset_peak_memory_stats(settings.device)
            seconds[name].append(timed(take_steps, 2)[0] / 2)
            memory[name] = peak_memory(settings.device) - idle
    for name in names:
        with torch.device("meta"):
            model = make_model("linear" if name == PEER else name, shape)
        sequences = settings.batch_size * settings.gradient_accumulation_steps
        rate = sequences * shape["block_size"] / median(seconds[name])
        own = 12 * sum(p.numel() for p in model.parameters()) if on_cuda else 0
        row = {"batch": settings.batch_size, "query": name, "tokens/s": rate}
        row["MFU"] = rate * flops_per_token(model) / (peak * 1e12) if peak else None
        row |= {"first step, s": first[name], "memory, GB": (memory[name] + own) / 1e9, "profile": ""}
        rows.append(row)
    rows[-1]["profile"] = profile(trainings[names[-1]], settings.device)
    return rows


def profile(take_steps, device):
    """{what kernels do: their share of the time of a step}, and the share in which the device idles."""
    with torch.profiler.profile() as profiler:
        wall, _ = timed(take_steps, 1)
    shares, on_cuda = dict.fromkeys([*KERNELS, "other"], 0.0), device.startswith("cuda")
    for event in profiler.key_averages():
        if on_cuda and (event.device_type == torch.autograd.DeviceType.CPU or event.is_user_annotation):
            continue  # what a kernel takes is told again of the operation that started it
        on_device = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        kind = next((kind for kind, names in KERNELS.items() if re.search(names, event.key, re.I)), "other")
        shares[kind] += on_device / 1e6 / wall
    return {kind: round(share, 3) for kind, share in shares.items()} | {"idle": round(1 - sum(shares.values()), 3)}


def train(folder, *flags, stop_after=None):
    """Run train.py with the quickstart -> {key: {step: value}} of metrics.jsonl. stop_after: a line to stop it at."""
    command = [sys.executable, ROOT / "train.py", "--eval_tokens=100000", f"--out_dir={folder}", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            last = line
            if stop_after and line.startswith(stop_after):
                process.send_signal(signal.SIGTERM)
    if process.returncode not in (0, 128 + signal.SIGTERM):
        raise RuntimeError(f"train.py failed: {last}")
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return {key: {line["step"]: line[key] for line in lines if key in line} for key in ("train_loss", "val_loss")}


def small_run(options):
    steps = 20 if options.shape == "tiny" else 300
    return [f"--max_iters={steps}", f"--lr_decay_iters={steps}", f"--eval_interval={steps}", "--log_interval=10"]


def training(options, settings):
    """The first steps of config/quickstart.py on the CPU in float32, and here as it is trained here."""
    rows = []
    for device, flags in (("cpu", ["--dtype=float32"]), (settings.device, [])):
        with tempfile.TemporaryDirectory() as folder:
            losses = list(train(folder, *small_run(options), f"--device={device}", *flags)["val_loss"].values())
        rows.append({"device": device, "validation loss before": losses[0], "after": losses[-1]})
    return rows


def resume(options, settings):
    """A run that is stopped by a signal and resumed, against one that is not: training loss at the end."""
    flags, rows = [*small_run(options), f"--device={settings.device}"], []
    for stop_after in (None, "step 10/"):
        with tempfile.TemporaryDirectory() as folder:
            losses = train(folder, *flags, stop_after=stop_after)
            if stop_after:
                losses = train(folder, *flags, "--resume")
        rows.append({"stopped": bool(stop_after), "training loss": list(losses["train_loss"].values())[-1]})
    return rows


def generation(options, settings):
    """Greedy generation of one text: tokens a second."""
    rows, shape = [], SHAPES[options.shape]
    prompt, n = torch.zeros(1, 1, dtype=torch.long, device=settings.device), min(200, shape["block_size"] - 1)
    for mode in QUERIES:
        for dtype in formats(settings.device):
            model = for_generation(GPT(GPTConfig(query_mode=mode, **shape)).to(settings.device), dtype)
            best = min(timed(lambda: model.generate(prompt, n, temperature=0).cpu())[0] for _ in range(3))
            rows.append({"query": mode, "weights": dtype, "tokens/s": n / best})
    return rows


STEPS = (gradients, model_tests, speed, training, resume, generation)
