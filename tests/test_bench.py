"""Every model is measured, no step of the runbook stops another, and a plan counts what is true."""

import itertools
import json
import math
import multiprocessing
import re
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from conftest import ROOT

import train
from model import GPT, QUERIES, GPTConfig
from tools import bench, plan, runbook
from utils.device import resolve
from utils.settings import UserError

needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="no C++ compiler")


@pytest.mark.parametrize("command", ["train --batch_size=3", "sample --new_tokens=5"])
def test_every_model_is_measured(command, capsys):
    bench.main([*command.split(), "--shape=tiny", "--device=cpu", "--repeats=2"])
    output = capsys.readouterr().out
    speeds = dict(re.findall(r"^(\w+) +\d.* tokens/s, (.*) of linear$", output, re.M))
    assert speeds.keys() == {*QUERIES}
    assert speeds["linear"] == "1.000" and all(float(ratio) > 0 for ratio in speeds.values())
    assert ("steps of 96 tokens" if "train" in command else "5 new tokens a text") in output


def test_the_runbook_sees_a_wrong_gradient_of_the_query_alone(monkeypatch, capsys):
    def compile_wrongly(model, fullgraph, disable):
        for name, parameter in model.named_parameters():
            if "query.w_q" in name and not disable:
                parameter.register_hook(torch.zeros_like)

    monkeypatch.setattr(GPT, "compile", compile_wrongly)
    settings = resolve(train.Settings(device="cpu", dtype="bfloat16"))
    assert runbook.gradients(bench.SHAPES["tiny"], settings, ["identity", "nonlinear"]) == 0
    assert runbook.gradients(bench.SHAPES["tiny"], settings, ["linear"]) == 1
    verdicts = dict(re.findall("^(.*): (right|WRONG)", capsys.readouterr().out, re.M))
    assert verdicts.pop("linear compiled") == "WRONG" and [*verdicts.values()] == ["right"] * 5


@pytest.mark.parametrize("status", [0, 1])
def test_a_step_that_fails_crashes_or_hangs_does_not_stop_the_others(status, monkeypatch):
    steps = {
        f"raise SystemExit({status})": f"exit status {status}",
        "print('half a table'); raise RuntimeError('no memory')": "exit status 1",
        "import os; print('before', flush=True); os.kill(os.getpid(), 11)": "exit status -11",
        "import time; print('sleeps', flush=True); time.sleep(1000)": "killed",
        "print('the last')": "exit status 0",
    }
    monkeypatch.setattr(runbook, "STEP_LIMIT", 2)
    monkeypatch.setattr(runbook, "list_steps", lambda *given: [f'-c "{code}"' for code in steps])
    assert runbook.run_all("tiny", "cpu") == status
    report = json.loads(Path("out/gpu/gpu.json").read_text())
    assert [step["ended"].partition(" after ")[0] for step in report] == [*steps.values()]
    assert report[1]["output"].startswith("half a table\nTraceback")
    assert report[1]["output"].endswith("RuntimeError: no memory\n")
    assert [step["output"] for step in report[2:]] == ["before\n", "sleeps\n", "the last\n"]
    text = Path("out/gpu/gpu.md").read_text()
    assert all(step[key] in text for step in report for key in ("command", "ended", "output"))


@pytest.mark.slow
@needs_compiler
def test_the_runbook_is_rehearsed():
    away = shutil.ignore_patterns(".git", ".venv", "data", "out", "results", "__pycache__")
    shutil.copytree(ROOT, "copy", ignore=away)
    command = [sys.executable, "-m", "tools.runbook", "--shape=tiny", "--device=cpu"]
    subprocess.run(command, cwd="copy", check=True)
    text = Path("copy/out/gpu/gpu.md").read_text()
    assert text.count("```\nexit status 0 after ") == len(runbook.list_steps("", "", ""))
    assert text.count(": right, ") == 6 and re.search(r"\d passed", text)
    # On the CPU, here, fast, stopped, resumed, by torchrun.
    losses = [float(loss) for loss in re.findall(r"step [12]0/[12]0 val_loss (\d\.\d+)", text)]
    assert losses.pop(3) > losses[0]
    assert losses == pytest.approx([losses[0]] * 5, abs=1.5e-4)
    losses = [float(loss) for loss in re.findall(r"loss (\d\.\d+), first step", text)]
    assert losses == pytest.approx([math.log(65)] * 5, rel=0.01)  # of models that know nothing
    assert text.count(" tokens/s, ") == 8


def test_a_plan_says_what_a_recipe_takes(capsys):
    recipe = [f"{ROOT}/config/gpt3_small.py", "--n_layer=2", "--batch_size=6"]
    plan.main([*recipe, "--gpus=8", "--tflops", "500"])
    output = capsys.readouterr().out
    values = dict(re.findall(r"^(\w+) +([\d.,e+]+)", output, re.M))
    tokens, d = 60_002 * 6 * 40 * 1024, 768
    parameters = (50304 + 1024) * d + 2 * (12 * d * d + 2 * d) + d
    assert values["parameters"] == f"{parameters:,}" and "60,002 steps of 240 seq" in output
    # Six FLOPs for each weight of a matrix product, and the two products of attention.
    flops = 6 * (50304 * d + 2 * 12 * d * d) + 2 * 12 * d * 1024
    assert float(values["FLOPs"]) == pytest.approx(tokens * flops, rel=5e-3)
    assert values["time"] == f"{tokens * flops / (8 * 500e12) / 3600:.1f}"
    *parts, together = [float(size) for size in re.findall(r"([\d.]+) GB ", output)]
    # Several GPUs hold their gradients twice.
    assert parts[:3] == [round(n * parameters / 1e9, 2) for n in (4, 8, 8)]
    assert together == pytest.approx(sum(parts), abs=0.03)
    for wrong in ("gpus=0", "tflops=0", "steps=3", "dropout=0.1", "vocab_size=auto"):
        with pytest.raises(UserError, match=wrong.partition("=")[0]):
            plan.main([*recipe, f"--{wrong}"])


def peak_of_two_steps(mode, settings, shape):
    """The largest number of bytes allocated, from the model's first weight on."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        bench.make_training(mode, shape, resolve(settings))(2)
    profiler.export_chrome_trace("trace.json")
    events = json.loads(Path("trace.json").read_text())["traceEvents"]
    events = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    return max(itertools.accumulate(e["args"]["Bytes"] for e in events))


@pytest.mark.slow
@needs_compiler
@pytest.mark.parametrize(
    "mode, dtype, vocab_size", [("nonlinear", "bfloat16", 300), ("linear", "float32", 3000)]
)
def test_a_plan_has_the_memory_of_a_real_step(mode, dtype, vocab_size, monkeypatch):
    """From the model's first weight to its second step, compiled: within 3 % of the peak."""
    # The bfloat16 products of newer processors take memory of their own.
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    shape = dict(n_layer=3, n_head=2, n_embd=64, block_size=128, vocab_size=vocab_size)
    recipe = {"dtype": dtype, "batch_size": 8, "gradient_accumulation_steps": 2}
    settings = train.Settings(device="cpu", compile=True, **recipe)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        peak = executor.submit(peak_of_two_steps, mode, settings, shape).result()
    config = GPTConfig(query_mode=mode, **shape)
    parameters = sum(p.numel() for p in GPT(config).parameters())
    counted = plan.count_memory(settings, config, 1, parameters)
    assert sum(counted.values()) == pytest.approx(peak, rel=0.03)
