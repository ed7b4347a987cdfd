"""What `python -m tools.bench gpu` does: all that is to be known of this project on a GPU, in under ten minutes.

Each step runs in a process of its own, since an error on CUDA, a profiler or a setting of torch's spoils what comes after
it. The first steps tell whether the rest is worth anything. gpu.json and gpu.md are written anew after each step, so that a
run that is cut off keeps what it has. On a CPU, with --shape tiny, it is a rehearsal.
"""

import json
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from statistics import median

import torch
from torch.nn.functional import cosine_similarity

from model import GPT, QUERIES, GPTConfig
from tools.bench import PEER, SHAPES, make_model, make_training
from tools.bench_data import timed
from train import Objective
from utils.device import autocast, device_name, flops_per_token, peak_memory, peak_tflops
from utils.files import new_file
from utils.generation import for_generation, formats
from utils.settings import UserError

ROOT = Path(__file__).parent.parent
SECONDS = 540  # no step goes on after so many
SECONDS_OF_A_STEP = 200  # so that one that hangs leaves time for the others
# Parts of kernels' names, and what these kernels do; the first that fits counts.
KERNELS = {"attention": "flash|fmha|sdpa|attention", "products": "gemm|cutlass|nvjet|mm_|cublas", "optimizer": "adam"}
KERNELS |= {"loss": "softmax|nll|cross_entropy", "norms and other pointwise": "triton"}


def run(options, settings):
    """Take all steps -> exit status; 1 where the gradients are wrong, and then nothing after them is compiled."""
    if not hasattr(os, "setsid"):
        raise UserError("the GPU runbook ends processes that hang by their session: that needs Linux, WSL or macOS")
    about = {"device": device_name(settings.device), "torch": torch.__version__, "dtype": settings.dtype}
    book, started = {"about": about | {"shape": options.shape, "compile": settings.compile}}, time.perf_counter()
    for name, (step, *arguments) in STEPS.items():
        began = time.perf_counter()
        left = min(SECONDS_OF_A_STEP, started + SECONDS - began)
        rows = [*in_a_process(left, step, options, settings, *arguments)] if left > 0 else [{"failed": "no time left"}]
        book[name] = {"what": step.__doc__.splitlines()[0], "rows": rows, "seconds": time.perf_counter() - began}
        write(book, options.out)
        print(to_markdown(name, book[name]), flush=True)
        if name == "gradients" and (wrong := not all(row.get("right") for row in rows)):
            print("the gradients are not right: what follows is not compiled, and says little", flush=True)
            settings = replace(settings, compile=False)
    print(f"written to {options.out}/gpu.json and gpu.md in {time.perf_counter() - started:.0f} s")
    return int(wrong)


def in_a_process(seconds, step, *arguments):
    """Take a step in a process of its own, and yield its rows, one by one; the last one tells why it failed, if it did."""
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    process = spawn.Process(target=send, args=(sender, step, *arguments))
    process.start()
    sender.close()  # so that the end of the process is the end of the pipe
    deadline = time.perf_counter() + seconds
    try:
        while receiver.poll(max(0, deadline - time.perf_counter())):
            yield receiver.recv()
        yield {"failed": f"cut off after {seconds:.0f} s"}
    except EOFError:
        process.join()
        if process.exitcode:
            yield {"failed": f"exit status {process.exitcode}"}
    finally:
        with suppress(OSError):
            os.killpg(process.pid, signal.SIGKILL)  # and the processes that it started
        process.kill()
        process.join()


def send(sender, step, *arguments):
    os.setsid()
    try:
        for row in step(*arguments):
            sender.send(row)
    except Exception as e:
        sender.send({"failed": f"{type(e).__name__}: {str(e)[:300]}"})


def write(book, folder):
    folder.mkdir(parents=True, exist_ok=True)
    about = ", ".join(f"{key} {value}" for key, value in book["about"].items())
    steps = [to_markdown(name, step) for name, step in book.items() if name != "about"]
    for name, text in (("gpu.json", json.dumps(book, indent=1)), ("gpu.md", "\n\n".join([about, *steps]))):
        with new_file(folder / name) as f:
            f.write(f"{text}\n".encode())


def to_markdown(name, step):
    """A heading, a sentence and a table with a column for each key of the rows."""
    header = [*dict.fromkeys(key for row in step["rows"] for key in row)]
    table = [header, ["---"] * len(header), *([words(row.get(key, "")) for key in header] for row in step["rows"])]
    lines = "\n".join(f"| {' | '.join(cells)} |" for cells in table)
    return f"## {name}\n\n{step['what']} ({step['seconds']:.0f} s)\n\n{lines}"


def words(value):
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1e4 else f"{value:.5g}"
    return str(value)


# ---------------------------------------------------------------------------------------------------
# The steps. Each yields the rows of its table.


def gradients(options, settings):
    """A step in the number format of training, eager and compiled, against one in float32: loss, and each gradient."""
    shape = {**SHAPES[options.shape], "n_layer": 2}
    idx = torch.randint(shape["vocab_size"], (4, shape["block_size"] + 1), device=settings.device)
    for mode in QUERIES:
        found = {}
        for dtype, compiled in (("float32", False), (settings.dtype, False), (settings.dtype, True)):
            objective = Objective(GPT(GPTConfig(query_mode=mode, **shape)).to(settings.device))
            if compiled:
                objective.compile(fullgraph=True)
            with autocast(replace(settings, dtype=dtype)):
                loss = objective(idx[:, :-1], idx[:, 1:].contiguous())
            loss.backward()
            gradients = {name: p.grad.double().flatten() for name, p in objective.named_parameters()}
            exact_loss, exact = found.setdefault("exact", (loss.item(), gradients))
            if gradients is exact:
                continue
            # One by one: all together the query's are too small a part to be seen.
            cosines = {name: cosine_similarity(exact[name], g, dim=0).item() for name, g in gradients.items()}
            ratios = [(g.norm() / exact[name].norm()).item() for name, g in gradients.items()]
            right = all(cosine > 0.99 for cosine in cosines.values()) and all(0.9 < ratio < 1.1 for ratio in ratios)
            right = right and abs(loss.item() / exact_loss - 1) < 0.01
            worst, ratio = min(cosines, key=cosines.get), max(ratios, key=lambda ratio: abs(ratio - 1))
            row = {"query": mode, "compiled": compiled, "loss": loss.item(), "in float32": exact_loss}
            yield row | {"smallest cosine": cosines[worst], "of": worst, "ratio of norms": ratio, "right": right}


def model_tests(options, settings):
    """test_model.py with the model on this device."""
    environment = {**os.environ, "TEST_DEVICE": settings.device}
    command = [sys.executable, "-m", "pytest", "-q", "--tb=line", "test_model.py"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    lines = (done.stdout.strip() or done.stderr.strip()).splitlines()
    yield from ({"result": line} for line in [lines[-1], *(line for line in lines if line.startswith("FAILED"))])


def with_batch(options, settings, batch_size):
    return replace(settings, batch_size=2 if options.shape == "tiny" else batch_size)


def speed(options, settings, batch_size, names):
    """Training: the first step, compilation included, then all in turns; MFU as PaLM's appendix B counts operations."""
    settings, shape = with_batch(options, settings, batch_size), SHAPES[options.shape]
    names = [PEER, *names] if options.peer else names
    on_cuda, peak = settings.device.startswith("cuda"), peak_tflops(settings.device)
    trainings = {name: make_training(name, shape, settings) for name in names}
    for name, take_steps in trainings.items():  # told at once: compiling may take all the time there is
        elapsed, (loss, norm) = timed(take_steps, 1)
        yield {"batch": settings.batch_size, "query": name, "loss": loss, "norm": norm, "first step, s": elapsed}
    seconds, memory = {name: [] for name in names}, {}
    for _ in range(options.repeats):
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
        mfu = rate * flops_per_token(model) / (peak * 1e12) if peak else ""
        row = {"batch": settings.batch_size, "query": name, "tokens/s": rate, "MFU": mfu}
        yield row | {"memory, GB": (memory[name] + own) / 1e9}


def profile(options, settings, batch_size, name):
    """What the kernels of a training step do: their share of its time, and the share in which the device idles."""
    settings = with_batch(options, settings, batch_size)
    take_steps, on_cuda = make_training(name, SHAPES[options.shape], settings), settings.device.startswith("cuda")
    take_steps(3)
    with torch.profiler.profile() as profiler:
        wall, _ = timed(take_steps, 1)
    shares = dict.fromkeys([*KERNELS, "other"], 0.0)
    for event in profiler.key_averages():
        if on_cuda and (event.device_type == torch.autograd.DeviceType.CPU or event.is_user_annotation):
            continue  # what a kernel takes is told again of the operation that started it
        on_device = event.self_device_time_total if on_cuda else event.self_cpu_time_total
        kind = next((kind for kind, names in KERNELS.items() if re.search(names, event.key, re.I)), "other")
        shares[kind] += on_device / 1e6 / wall
    yield {"query": name, **{kind: round(share, 3) for kind, share in shares.items()}, "idle": 1 - sum(shares.values())}


def train(folder, *flags, stop_after=None, launcher=()):
    """Run train.py with the quickstart -> {key: {step: value}} of metrics.jsonl. stop_after: a line to stop it at."""
    command = [sys.executable, *launcher, ROOT / "train.py", "--eval_tokens=100000", f"--out_dir={folder}", *flags]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        for line in process.stdout:
            last = line
            if stop_after and line.startswith(stop_after):
                process.send_signal(signal.SIGTERM)
    if process.returncode not in (0, 128 + signal.SIGTERM):
        raise RuntimeError(f"train.py failed: {last}")
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return {key: {line["step"]: line[key] for line in lines if key in line} for key in ("train_loss", "val_loss")}


def small_run(options, settings):
    steps = 20 if options.shape == "tiny" else 300
    flags = [f"--max_iters={steps}", f"--lr_decay_iters={steps}", f"--eval_interval={steps}", "--log_interval=10"]
    return [*flags, f"--device={settings.device}", f"--dtype={settings.dtype}", f"--compile={settings.compile}"]


def training(options, settings):
    """The first steps of config/quickstart.py by train.py: with its settings on the CPU and here, then as larger models train."""
    plain = replace(settings, dtype="float32", compile=False)
    for made in (replace(plain, device="cpu"), plain, settings):
        with tempfile.TemporaryDirectory() as folder:
            seconds, losses = timed(train, folder, *small_run(options, made))
        before, *_, after = losses["val_loss"].values()
        row = {"device": made.device, "dtype": made.dtype, "compiled": made.compile, "validation loss before": before}
        yield row | {"after": after, "seconds": seconds}


def resume(options, settings):
    """A run, the same stopped and resumed, and the same as one process of torchrun's, not compiled: training losses."""
    flags = small_run(options, replace(settings, compile=False))  # compiled for CUDA, no two runs are the same
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1")
    kinds = {"undisturbed": {}, "resumed": {"stop_after": "step 10/"}, "torchrun": {"launcher": torchrun}}
    for name, more in kinds.items():
        with tempfile.TemporaryDirectory() as folder:
            losses = train(folder, *flags, **more)
            if name == "resumed":
                losses = train(folder, *flags, "--resume")
        losses = losses["train_loss"]
        yield {"run": name, "loss after 20 steps": losses[20], "last": losses[max(losses)]}


def generation(options, settings):
    """Greedy generation of one text: tokens a second."""
    shape = SHAPES[options.shape]
    prompt, n = torch.zeros(1, 1, dtype=torch.long, device=settings.device), min(200, shape["block_size"] - 1)
    for mode in QUERIES:
        for dtype in formats(settings.device):
            model = for_generation(GPT(GPTConfig(query_mode=mode, **shape)).to(settings.device), dtype)
            best = min(timed(lambda: model.generate(prompt, n, temperature=0).cpu())[0] for _ in range(3))
            yield {"query": mode, "weights": dtype, "tokens/s": n / best}


# What would be missed most comes first.
STEPS = {"gradients": (gradients,), "model_tests": (model_tests,), "training": (training,)}
STEPS |= {"speed, batch 60": (speed, 60, [*QUERIES]), "speed, batch 12": (speed, 12, ["nonlinear"])}
STEPS |= {"resume": (resume,), "generation": (generation,), "profile": (profile, 60, "nonlinear")}
STEPS |= {"speed, batch 120": (speed, 120, ["nonlinear"])}
