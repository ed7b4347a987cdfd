"""tools/bench.py runs to its end and measures every model; no number that depends on the machine is tested. What a plan
counts is compared with formulas, and with real steps of small models."""

import argparse
import importlib.util
import itertools
import json
import math
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

import train
from conftest import ROOT
from model import GPT, QUERIES, GPTConfig
from tools import bench, plan, runbook
from utils.device import autocast, resolve
from utils.settings import UserError

HAS_PEER = importlib.util.find_spec("transformers") is not None
PEER = ["--peer"] if HAS_PEER else []
MODELS = {*QUERIES, bench.PEER} if HAS_PEER else {*QUERIES}


def lines_of(output):
    """{first word: line}"""
    return {line.split()[0]: line for line in output.splitlines() if line.strip()}


def test_train_measures_every_model(capsys):
    arguments = ["--device=cpu", "--batch_size=2", "--gradient_accumulation_steps=2", "--seconds=0.01", "--repeats=1"]
    bench.main(["train", "--shape=tiny", *arguments, *PEER])
    output = capsys.readouterr().out
    lines = lines_of(output)
    assert lines.keys() >= MODELS and "1.000x" in lines["linear"] and "4 sequences a step" in output
    assert "the data take" in output


def test_sample_measures_every_model(capsys):
    bench.main(["sample", "--shape=tiny", "--device=cpu", "--batch_size=2", "--new_tokens=5", "--repeats=2", *PEER])
    lines = lines_of(capsys.readouterr().out)
    assert lines.keys() >= MODELS and "1.00 of linear" in lines["linear"]


def test_data_prepares_an_archive(gpt2_vocabulary, capsys):
    bench.main(["data", "--megabytes=0.3", "--repeats=1"])
    output = capsys.readouterr().out
    assert "0.3 MB" in output and "prepare_data.py openwebtext" in output and "16 cores" in output


REHEARSAL = ["gpu", "--shape=tiny", "--device=cpu", "--dtype=bfloat16", "--repeats=1", "--out=r"]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs a C++ compiler")
def test_the_runbook_is_rehearsed():
    assert bench.main(REHEARSAL) == 0
    book, text = json.loads(Path("r/gpu.json").read_text()), Path("r/gpu.md").read_text()
    assert list(book) == ["about", *runbook.STEPS] and "failed" not in text
    assert all(f"## {step}\n" in text and book[step]["rows"] for step in runbook.STEPS)
    first, *others = (row["last"] for row in book["resume"]["rows"])
    assert others == pytest.approx([first] * 2, rel=1e-6)
    assert "passed" in book["model_tests"]["rows"][0]["result"] and len(book["gradients"]["rows"]) == 6
    first, timed = book["speed, batch 60"]["rows"][:3], book["speed, batch 60"]["rows"][3:]
    assert [row["query"] for row in first] == [row["query"] for row in timed] and all(row["tokens/s"] for row in timed)
    for row in first:
        assert row["loss"] == pytest.approx(math.log(65), rel=0.01)  # of weights that have learned nothing


def test_the_runbook_sees_a_wrong_gradient_of_the_query_alone(monkeypatch):
    def compile_wrongly(objective, **_):
        for name, parameter in objective.named_parameters():
            if "query.w_q" in name:
                parameter.register_hook(torch.zeros_like)

    monkeypatch.setattr(train.Objective, "compile", compile_wrongly)
    settings = resolve(train.Settings(device="cpu", dtype="bfloat16"))
    rows = runbook.gradients(argparse.Namespace(shape="tiny"), settings)
    assert [(row["query"], row["compiled"]) for row in rows if not row["right"]] == [("linear", True)]


# Steps for the next tests: each is taken in another process, which has to find it in this file.


def a_check(options, settings, right):
    """Gradients."""
    yield {"query": "linear", "right": right}


def what_is_compiled(options, settings):
    """Settings."""
    yield {"compile": settings.compile}


def no_memory(options, settings):
    """Half a table."""
    yield {"batch": 60}
    raise RuntimeError("no memory")


def killed(options, settings):
    """Half a table."""
    yield {"batch": 60}
    os.kill(os.getpid(), signal.SIGSEGV)


def hung(options, settings, pipe):
    """A step whose own process never ends."""
    with open(pipe, "w") as f:
        yield {"child": "sleeps"}
        subprocess.run([sys.executable, "-c", "import time; time.sleep(1000)"], stdout=f)


def test_the_runbook_goes_on_after_a_failure_and_keeps_what_there_is(monkeypatch, capsys):
    for right in (True, False):
        steps = {"gradients": (a_check, right), "1": (no_memory,), "2": (what_is_compiled,)}
        monkeypatch.setattr(runbook, "STEPS", steps)
        assert bench.main([*REHEARSAL, "--compile=true"]) == int(not right)
        book = json.loads(Path("r/gpu.json").read_text())
        assert book["1"]["rows"] == [{"batch": 60}, {"failed": "RuntimeError: no memory"}]
        assert book["2"]["rows"] == [{"compile": right}]
    assert "what follows is not compiled" in capsys.readouterr().out


@pytest.mark.slow
def test_the_runbook_survives_a_step_that_is_killed_and_ends_one_that_hangs():
    book = [*runbook.in_a_process(60, killed, None, None)]
    assert book == [{"batch": 60}, {"failed": f"exit status {-signal.SIGSEGV}"}]
    os.mkfifo("pipe")
    reader = os.open("pipe", os.O_RDONLY | os.O_NONBLOCK)
    book = [*runbook.in_a_process(20, hung, None, None, Path("pipe").absolute())]
    assert book == [{"child": "sleeps"}, {"failed": "cut off after 20 s"}]
    assert os.read(reader, 1) == b""  # the end: nobody is left who could write
    os.close(reader)


# ---------------------------------------------------------------------------------------------------
# What a plan says of a recipe.


def test_a_plan_says_what_a_recipe_takes(monkeypatch, capsys):
    monkeypatch.setattr(plan, "count_memory", lambda *given: {"weights": 2.5e9, "logits": 0.26e9})
    recipe = ["plan", f"{ROOT}/config/gpt3_small.py", "--batch_size=6"]
    bench.main([*recipe, "--gpus=8", "--tflops", "1000", "--share=0.5"])
    lines = lines_of(capsys.readouterr().out)
    tokens, d, n_layer = 60_002 * 6 * 40 * 1024, 768, 12
    flops = 6 * (50304 * d + n_layer * 12 * d * d) + n_layer * 12 * d * 1024  # six a weight, and attention
    assert "124,373,760" in lines["parameters"] and "60,002 steps of 240 sequences" in lines["tokens"]
    assert float(lines["FLOPs"].split()[1][:-1]) == pytest.approx(tokens * flops, rel=5e-3)
    assert f" {tokens * flops / (8 * 1000e12 * 0.5) / 3600:.1f} hours at 50% of 8 x 1000 " in lines["time"]
    assert "2.8 GB a GPU" in lines["memory"] and lines["2.50"].split() == ["2.50", "GB", "weights"]
    mistakes = {"gpus=7": "shared by 7", "gpus=0": "gpus", "share=40": "share", "share=0": "share", "steps=3": "steps"}
    for wrong, message in (mistakes | {"dropout=0.1": "dropout=0.1", "vocab_size=auto": "vocab_size"}).items():
        with pytest.raises(UserError, match=message):
            bench.main([*recipe, f"--{wrong}"])


SMALL = {"n_layer": 3, "n_head": 2, "n_embd": 64, "block_size": 128}
SHAPES = [("nonlinear", "bfloat16", {**SMALL, "vocab_size": 300}), ("linear", "float32", {**SMALL, "vocab_size": 3000})]


def allocated(work):
    """Bytes allocated while work() runs: (at the peak, when it has returned)."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = work()
    profiler.export_chrome_trace("trace.json")
    del result  # until here it holds what it returned
    events = json.loads(Path("trace.json").read_text())["traceEvents"]
    events = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    totals = [*itertools.accumulate(event["args"]["Bytes"] for event in events)]
    return max(totals), totals[-1]


def test_what_a_plan_counts_as_kept_is_kept():
    """Against what is allocated after a real forward pass, cut by torch.compile but not compiled to C++. Of two GPUs
    each has its gradients twice."""
    mode, dtype, shape = SHAPES[0]
    settings, config = train.Settings(device="cpu", dtype=dtype, batch_size=4), GPTConfig(query_mode=mode, **shape)
    objective = train.Objective(GPT(config))
    objective.compile(backend="aot_eager_decomp_partition")
    idx = torch.zeros(4, shape["block_size"], dtype=torch.long)
    with autocast(settings):
        objective(idx, idx)  # compiles
        _, found = allocated(lambda: objective(idx, idx))
    weights, gradients, _, activations, logits = plan.count_memory(settings, config, 2, 1000).values()
    assert (weights, gradients) == (4000, 8000)
    assert activations + logits - 2 * 300 * 64 == pytest.approx(found, rel=0.01)  # but for the head's gradient


def memory_of_two_steps(mode, settings, shape):
    return allocated(lambda: bench.make_training(mode, shape, resolve(settings))(2))[0]


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("g++"), reason="compiling needs a C++ compiler")
@pytest.mark.parametrize("mode, dtype, shape", SHAPES)
def test_a_plan_tells_the_memory_of_a_real_step(mode, dtype, shape, monkeypatch):
    """From the model's first weight to its second step, compiled: at its peak the plan's memory within 3 %."""
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")  # newer processors' bfloat16 products take memory of their own
    settings = train.Settings(device="cpu", dtype=dtype, batch_size=8, gradient_accumulation_steps=2, compile=True)
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
        found = executor.submit(memory_of_two_steps, mode, settings, shape).result()
    config = GPTConfig(query_mode=mode, **shape)
    parameters = sum(p.numel() for p in GPT(config).parameters())
    assert sum(plan.count_memory(settings, config, 1, parameters).values()) == pytest.approx(found, rel=0.03)
