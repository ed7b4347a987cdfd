"""Check and measure this project on a GPU in under ten minutes: python -m tools.runbook.

Each step is a command in a process of its own, because an error on CUDA spoils what follows it in
the same process. out/gpu/gpu.json and gpu.md are written after each step, so that a run that is cut
off keeps its results. On a CPU, --shape tiny is a rehearsal.
"""

import functools
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch

from model import QUERIES
from tools.bench import SHAPES, make_model, make_training, print_speeds, timed
from train import Settings
from utils.device import autocast, device_name, processes, resolve
from utils.files import new_file
from utils.flops import flops_per_token, peak_tflops
from utils.settings import Parser, run_program

TIME_LIMIT = 540  # seconds, of all steps together
STEP_LIMIT = 200  # seconds, so that a step that hangs leaves time for the others


def list_steps(shape, device, runs):
    """The commands, without "python", the most important first. runs is a folder to train in."""
    model = f"--shape={shape} --device={device}"
    n = 20 if shape == "tiny" else 300
    flags = f"--max_iters={n} --lr_decay_iters={n} --eval_tokens=100000 --device={device}"
    quickstart = f"train.py config/quickstart.py {flags} --out_dir={shlex.quote(runs)}"
    return [
        f"-m tools.runbook gradients {model}",
        "-m pytest -q --tb=line test_model.py",
        f"{quickstart}/cpu --device=cpu",
        f"{quickstart}/here",
        f"{quickstart}/fast --dtype=auto --compile=auto",
        f"-m tools.runbook speed {model} --batch_size=60",
        f"-m tools.runbook speed {model} --batch_size=12 --queries nonlinear",
        # The next three end with the loss of the run "here" where runs repeat exactly.
        f"{quickstart}/resumed --max_iters={n // 2}",
        f"{quickstart}/resumed --resume",
        f"-m torch.distributed.run --standalone --nproc_per_node=1 {quickstart}/torchrun",
        f"-m tools.bench sample {model} --repeats=3",
        f"-m tools.runbook speed {model} --batch_size=120 --queries nonlinear",
    ]


def run_all(shape, device, out=Path("out/gpu")):
    """Run all steps -> exit status, which is 1 if the first one, of the gradients, fails."""
    out.mkdir(parents=True, exist_ok=True)
    os.environ |= {"TEST_DEVICE": device, "PYTHONUNBUFFERED": "1"}  # test_model.py reads the first
    deadline = time.perf_counter() + TIME_LIMIT
    report = []
    markdown = ""
    with tempfile.TemporaryDirectory() as runs:
        for command in list_steps(shape, device, runs):
            limit = min(STEP_LIMIT, deadline - time.perf_counter())
            ended, output = run_step([sys.executable, *shlex.split(command)], limit)
            report.append({"command": f"python {command}", "ended": ended, "output": output})
            text = f"`python {command}`\n\n```\n{output}```\n{ended}\n\n"
            markdown += text
            print(text, flush=True)
            for name, content in (("gpu.json", json.dumps(report, indent=1)), ("gpu.md", markdown)):
                with new_file(out / name) as f:
                    f.write(content.encode())
    right = report[0]["ended"].startswith("exit status 0")
    print(f"Gradients: {'right' if right else 'FAILED'}. See {out}/gpu.json and {out}/gpu.md.")
    return int(not right)


def run_step(command, limit):
    """Run a command for limit seconds at most -> (how it ended, what it printed)."""
    began = time.perf_counter()
    # A file, because a pipe would wait for every process that the step has started.
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        try:
            done = subprocess.run(command, stdout=output, stderr=output, timeout=limit)
            ended = f"exit status {done.returncode}"
        except subprocess.TimeoutExpired:
            ended = "killed"
        output.seek(0)
        return f"{ended} after {time.perf_counter() - began:.0f} s", output.read()


def gradients(shape, settings, queries):
    """Compare the gradients of two layers with float32's -> exit status, 1 where they are wrong."""
    shape = {**shape, "n_layer": 2}
    idx = torch.randint(shape["vocab_size"], (4, shape["block_size"] + 1), device=settings.device)

    def backward(query, dtype, compiled):
        model = make_model(query, shape).to(settings.device)
        model.compile(fullgraph=True, disable=not compiled)
        with autocast(replace(settings, dtype=dtype)):
            loss = model(idx[:, :-1], idx[:, 1:].contiguous())
        loss.backward()
        return {"loss": loss.detach(), **{name: p.grad for name, p in model.named_parameters()}}

    wrong = False
    for query in queries:
        exact = backward(query, "float32", compiled=False)
        for kind in ("eager", "compiled"):
            found = backward(query, settings.dtype, compiled=kind == "compiled")
            # One by one, because the query's gradients are a small part of all.
            errors = {n: ((found[n] - exact[n]).norm() / exact[n].norm()).item() for n in exact}
            right = errors["loss"] < 0.01 and all(error < 0.1 for error in errors.values())
            wrong = wrong or not right
            name = max(errors, key=errors.get)
            verdict = "right" if right else "WRONG"
            print(f"{query} {kind}: {verdict}, largest error {errors[name]:.2%} in {name}")
    return int(wrong)


def speed(shape, settings, queries):
    """Train in turns. Print each query's loss, first step, memory, tokens/s and MFU (PaLM's)."""
    functions = {}
    for query in queries:
        others = torch.accelerator.memory_allocated()
        take_steps = make_training(query, shape, settings)
        seconds, (loss, _) = timed(take_steps, 1)
        torch.accelerator.reset_peak_memory_stats()
        take_steps(1)
        memory = (torch.accelerator.max_memory_allocated() - others) / 1e9
        print(f"{query:15} loss {loss:.3f}, first step {seconds:.1f} s, memory {memory:.1f} GB")
        functions[query] = functools.partial(take_steps, 2)
    tokens = 2 * settings.batch_size * settings.gradient_accumulation_steps * shape["block_size"]
    for query, rate in print_speeds(functions, tokens, repeats=3).items():
        with torch.device("meta"):
            flops = flops_per_token(make_model(query, shape))
        if peak := peak_tflops(device_name(settings.device)):
            print(f"{query:15} MFU {rate * flops / (peak * 1e12):.1%}")


def main(argv=None):
    parser = Parser(description=__doc__)
    steps = {"gradients": gradients, "speed": speed}
    parser.add_argument("step", nargs="?", choices=steps, help="one step, by itself")
    parser.add_argument("--shape", choices=SHAPES, default="gpt3_small", help="default gpt3_small")
    parser.add_argument("--device", help="cpu or cuda; default the first there is")
    parser.add_argument("--batch_size", type=int, default=60, help="of a micro-batch; default 60")
    parser.add_argument("--queries", nargs="+", choices=QUERIES, default=[*QUERIES])
    options = parser.parse_args(argv)
    settings = resolve(Settings(device=options.device, batch_size=options.batch_size))
    settings = replace(settings, gradient_accumulation_steps=8)
    if not options.step:
        return run_all(options.shape, settings.device)
    print(f"{device_name(settings.device)}, torch {torch.__version__}, {settings.dtype}")
    with processes(settings):
        return steps[options.step](SHAPES[options.shape], settings, options.queries)


if __name__ == "__main__":
    run_program(main)
