"""Measure this machine: python -m tools.bench train | sample | data | gpu | plan

    train    training in the three query modes: tokens/s, share of what matrix products alone reach, first step, memory
    sample   greedy generation in the three query modes
    data     from an archive of OpenWebText to tokens, against tiktoken alone (in bench_data.py)
    gpu      all that is to be known of this project on a GPU, in ten minutes (in runbook.py)
    plan     measures nothing: what a recipe takes on other machines (in plan.py; plan --help tells its own options)

--peer adds Hugging Face's GPT2LMHeadModel of the same shape (pip install transformers). What is compared runs in
turns, after a warm-up; printed are medians, with the extremes in brackets.
"""

import argparse
import importlib.util
import multiprocessing
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from statistics import median

import numpy as np
import torch
from torch.utils.benchmark import Timer

import train
from model import GPT, QUERIES, GPTConfig
from prepare_data import Dataset
from sample import load_model
from tools import plan
from tools.bench_data import bench_data, random_tokens, spread, timed
from utils.checkpoint import RunFolder
from utils.device import allow_tf32, device_name, flops_per_token, peak_memory, resolve
from utils.generation import FORMATS, best_format, for_generation, formats
from utils.settings import Parser, UserError, checked, run_program, short

SHAPES = {
    "tiny": {"n_layer": 1, "n_head": 2, "n_embd": 16, "block_size": 32, "vocab_size": 65},  # to try this program
    "small": {"n_layer": 6, "n_head": 6, "n_embd": 384, "block_size": 256, "vocab_size": 65},
    "gpt3_small": {"n_layer": 12, "n_head": 12, "n_embd": 768, "block_size": 1024, "vocab_size": 50304},
}
PEER = "GPT2LMHeadModel"


class Peer(torch.nn.Module):
    """Hugging Face's GPT-2 behind the interface of GPT."""

    def __init__(self, block_size, **shape):
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        settings = dict.fromkeys(["resid_pdrop", "embd_pdrop", "attn_pdrop"], 0.0)  # no dropout
        settings |= {"bos_token_id": None, "eos_token_id": None, "n_positions": block_size, **shape}
        self.gpt2 = GPT2LMHeadModel(GPT2Config(**settings))

    def forward(self, idx, targets):
        return None, self.gpt2(input_ids=idx, labels=idx, use_cache=False).loss  # it shifts the labels itself

    def generate(self, idx, max_new_tokens, temperature):
        greedy = {"do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(idx)}
        return self.gpt2.generate(idx, max_new_tokens=max_new_tokens, **greedy)


def make_model(name, shape):
    return Peer(**shape) if name == PEER else GPT(GPTConfig(query_mode=name, **shape))


def make_training(name, shape, settings):
    """A function that takes n steps of train.py with a new model, and waits for the device -> the last one's loss and norm."""
    data, model = random_tokens(shape), make_model(name, shape).to(settings.device)
    optimizer = train.make_optimizer(model, settings)
    scaler = torch.amp.GradScaler(settings.device.split(":")[0], enabled=settings.dtype == "float16")
    allow_tf32(settings)
    objective = train.Objective(model)
    if settings.compile:
        objective.compile()

    def take_steps(n):
        for step in range(n):
            loss, norm = train.train_step(objective, optimizer, scaler, data, settings, step)
        return loss.item(), norm.item()

    return take_steps


def first_step(name, shape, settings):
    """In a fresh process: seconds of the first step, compilation included, and peak memory in bytes."""
    torch.compiler.config.force_disable_caches = True  # else it may find what was compiled before
    take_steps = make_training(name, shape, settings)
    seconds, _ = timed(take_steps, 1)
    take_steps(2)
    return seconds, peak_memory(settings.device)


def matmul_flops(device, dtype):
    """Operations a second of large matrix products alone, over a second or more: a GPU slows down when it is warm."""
    n = 16384 if device.startswith("cuda") else 2048
    a = torch.randn(n, n, device=device, dtype=getattr(torch, dtype))
    timer = Timer("a @ a", globals={"a": a}, num_threads=torch.get_num_threads())  # its own default is one thread
    return 2 * n**3 / timer.blocked_autorange(min_run_time=1).median


def bench_train(names, shape, settings, options):
    first, seconds, peaks = {}, {name: [] for name in names}, []
    for name in names:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as executor:
            first[name] = executor.submit(first_step, name, shape, settings).result()
    trainings = {name: make_training(name, shape, settings) for name in names}
    for take_steps in trainings.values():
        take_steps(3)  # warm-up
    steps = max(1, round(options.seconds / timed(trainings["linear"], 1)[0]))
    for _ in range(options.repeats):
        peaks.append(matmul_flops(settings.device, settings.dtype))
        for name, take_steps in trainings.items():
            seconds[name].append(timed(take_steps, steps)[0] / steps)
    print_training(shape, settings, first, seconds, peaks)


def print_training(shape, settings, first, seconds, peaks):
    """Print a line for each name in first: {name: (seconds, bytes)}, and seconds: {name: those of a step, each turn}."""
    sequences = settings.batch_size * settings.gradient_accumulation_steps
    print(f"{sequences} sequences a step, {settings.dtype}, {'compiled' if settings.compile else 'not compiled'}")
    print(f"{'':15} {'tokens/s':26} {'step':>10} {'of matmul':>9} {'first step':>10} {'memory':>7}")
    for name in first:
        with torch.device("meta"):  # only counted; the peer has the products of linear
            flops = flops_per_token(make_model("linear" if name == PEER else name, shape))
        rates = [sequences * shape["block_size"] / of_a_step for of_a_step in seconds[name]]
        share = median(rate * flops / peak for rate, peak in zip(rates, peaks))
        ratio = median(mine / linear for mine, linear in zip(seconds[name], seconds["linear"]))
        tail = f"{ratio:9.3f}x {share:9.0%} {first[name][0]:9.1f}s {short(first[name][1]):>6}B"
        print(f"{name:15} {spread(rates):26} {tail}")
    arguments = (random_tokens(shape), "train", np.arange(sequences), 2**20, settings.device)
    waiting = median(timed(train.get_batch, *arguments)[0] for _ in range(50)) / median(seconds["linear"])
    print(f"matrix products alone: {spread(peaks)}FLOP/s; the data take {waiting:.2%} of a linear step")


def bench_sample(names, shape, settings, options):
    dtype = options.dtype or best_format(settings.device)
    models = {name: make_model(name, shape).to(settings.device) for name in names}
    for name, model in models.items():
        for_generation(model, "float32" if name == PEER else dtype)  # the peer as its users have it
    prompt = torch.zeros(settings.batch_size, 1, dtype=torch.long, device=settings.device)
    rates = {name: [] for name in names}
    for turn in range(options.repeats + 1):
        for name, model in models.items():
            seconds, idx = timed(lambda model=model: model.generate(prompt, options.new_tokens, temperature=0).cpu())
            if turn > 0:  # the first is the warm-up
                rates[name].append(idx[:, 1:].numel() / seconds)
    print(f"{options.new_tokens} new tokens a sequence, greedily, in {dtype}; the peer in float32")
    for name in names:
        ratio = median(mine / linear for mine, linear in zip(rates[name], rates["linear"]))
        print(f"{name:15} {spread(rates[name]):26} tokens/s {ratio:6.2f} of linear")


def print_format_losses(run, settings):
    """How much the number formats of generation change a run's loss on the first 100,000 validation tokens."""
    told, exact = RunFolder(run).read_json("config.json", "settings")["settings"], None
    settings = replace(settings, eval_tokens=100_000, **{k: told[k] for k in ("objective", "mask_share") if k in told})
    for dtype in formats(settings.device):
        model, _ = load_model(run, settings.device, dtype)
        autocast = "float32" if dtype == "float32" else "bfloat16"  # or the loss itself would be rounded
        data = Dataset(told["dataset"], model.config.block_size)
        loss = train.evaluate(train.Objective(model), data, replace(settings, dtype=autocast))["val_loss"]
        exact = exact or loss
        print(f"{dtype:9} validation loss {loss:.5f} ({100 * (loss / exact - 1):+.3f} %)")


def read_options(argv):
    if argv[:1] == ["plan"]:
        return plan.read_options(argv[1:])
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    count = checked(int, lambda n: n >= 1, "is not 1 or above")
    positive = checked(float, lambda x: x > 0, "is not above 0")
    parser.add_argument("what", choices=["train", "sample", "data", "gpu", "plan"])
    parser.add_argument("--shape", choices=SHAPES, help="of the model; default small, on a GPU gpt3_small")
    parser.add_argument("--peer", action="store_true", help="train, sample: compare with transformers' GPT-2")
    parser.add_argument("--batch_size", type=count, help="train, sample: sequences at a time; default 8, 1")
    parser.add_argument("--gradient_accumulation_steps", type=count, help="train: batches in a step; default 1, gpu 8")
    parser.add_argument("--device", help="train, sample: cpu, cuda, cuda:N or mps; default the first there is")
    kinds = sorted({"float16", *FORMATS})
    parser.add_argument("--dtype", choices=kinds, help="train, sample: default as train.py and sample.py")
    parser.add_argument("--run", help="sample: only tell how much its formats change the validation loss of this run")
    parser.add_argument("--compile", choices=["true", "false"], help="train: default as train.py")
    parser.add_argument("--new_tokens", type=count, default=240, help="sample: length")
    parser.add_argument("--seconds", type=positive, default=1.0, help="train: about the length of a turn")
    parser.add_argument("--megabytes", type=positive, default=400, help="data: of text")
    parser.add_argument("--repeats", type=count, help="turns; default 9, gpu 3")
    parser.add_argument("--out", type=Path, default=Path("out/gpu"), help="gpu: folder of gpu.json and gpu.md")
    options = parser.parse_args(argv)
    gpu = options.what == "gpu"
    options.shape = options.shape or ("gpt3_small" if gpu else "small")
    options.repeats = options.repeats or (3 if gpu else 9)
    options.batch_size = options.batch_size or (8 if options.what == "train" else 1)
    options.gradient_accumulation_steps = options.gradient_accumulation_steps or (8 if gpu else 1)
    if options.what == "sample" and options.new_tokens >= SHAPES[options.shape]["block_size"]:
        parser.error(f"--new_tokens={options.new_tokens} is not below the shape's block_size")
    if options.what != "sample" and options.dtype == "int8":
        parser.error("--dtype=int8 is for sample")
    options.compile = options.compile and options.compile == "true"
    return options


def main(argv=None):
    options = read_options(sys.argv[1:] if argv is None else argv)
    if options.what == "plan":
        return plan.print_plan(options)
    if options.what == "data":
        return bench_data(options.megabytes, options.repeats)
    if options.peer and not importlib.util.find_spec("transformers"):
        raise UserError("--peer needs the package transformers: pip install transformers")
    names = ("device", "dtype", "compile", "batch_size", "gradient_accumulation_steps")
    settings = resolve(train.Settings(**{name: getattr(options, name) for name in names}))
    print(f"{options.what}: {options.shape} {SHAPES[options.shape]}, batch {settings.batch_size}")
    print(f"{device_name(settings.device)}, torch {torch.__version__}", flush=True)
    if options.what == "gpu":
        from tools import runbook  # it imports this file

        return runbook.run(options, settings)
    if options.run:
        return print_format_losses(options.run, settings)
    bench = bench_train if options.what == "train" else bench_sample
    bench([*QUERIES, PEER] if options.peer else [*QUERIES], SHAPES[options.shape], settings, options)


if __name__ == "__main__":
    run_program(main)
