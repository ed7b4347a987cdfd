"""Measure this machine: python -m tools.bench train | sample

    train   training speed of the three query modes
    sample  speed of greedy generation in the three query modes

After a warm-up the models take turns. The tables show medians and extremes.
"""

import time
from functools import partial
from statistics import median
from types import SimpleNamespace

import numpy as np
import torch

import train
from model import GPT, QUERIES, GPTConfig
from utils.device import device_name, processes, resolve
from utils.generation import for_generation, generate
from utils.options import count
from utils.settings import Parser, check_ranges, run_program

SHAPES = {
    "tiny": dict(n_layer=1, n_head=2, n_embd=16, block_size=32, vocab_size=65),
    "small": dict(n_layer=6, n_head=6, n_embd=384, block_size=256, vocab_size=65),
    "gpt3_small": dict(n_layer=12, n_head=12, n_embd=768, block_size=1024, vocab_size=50304),
}


def make_model(query, shape):
    return GPT(GPTConfig(query_mode=query, **shape))


def make_training(query, shape, settings):
    """A function that trains a new model for n steps -> the last loss and gradient norm."""
    # Random tokens take the place of a Dataset, with the attributes that train_step uses.
    tokens = np.random.default_rng(0).integers(0, shape["vocab_size"], 2**20, np.uint16)
    data = SimpleNamespace(**shape, tokens=lambda split: tokens, n_tokens=lambda split: len(tokens))
    model = make_model(query, shape).to(settings.device)
    optimizer = train.make_optimizer(model, settings)
    scaler = torch.amp.GradScaler("cuda", enabled=settings.dtype == "float16")
    if settings.compile:
        model.compile()

    def take_steps(n):
        for step in range(n):
            loss, norm = train.train_step(model, optimizer, scaler, data, settings, step)
        return loss.item(), norm.item()

    return take_steps


def timed(function, *arguments):
    """Call a function that waits for the device -> (seconds, what it returned)."""
    started = time.perf_counter()
    result = function(*arguments)
    return time.perf_counter() - started, result


def print_speeds(functions, tokens, repeats):
    """Call {name: function}, each for so many tokens, in turns -> {name: median of tokens/s}."""
    speeds = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            seconds, _ = timed(function)
            if turn > 0:  # the first turn is the warm-up
                speeds[name].append(tokens / seconds)
    first = next(iter(speeds))
    for name, values in speeds.items():
        spread = f"{median(values):,.0f} ({min(values):,.0f} to {max(values):,.0f})"
        ratio = median(mine / others for mine, others in zip(values, speeds[first]))
        print(f"{name:15} {spread:26} tokens/s, {ratio:.3f} of {first}")
    return {name: median(values) for name, values in speeds.items()}


def bench_train(shape, settings, options):
    tokens = settings.batch_size * shape["block_size"]
    print(f"steps of {tokens:,} tokens, {settings.dtype}, compile={settings.compile}", flush=True)
    trainings = {query: make_training(query, shape, settings) for query in QUERIES}
    trainings["linear"](1)
    seconds, _ = timed(trainings["linear"], 1)
    steps = max(1, round(1 / seconds))  # a turn takes about a second
    functions = {query: partial(take, steps) for query, take in trainings.items()}
    print_speeds(functions, steps * tokens, options.repeats)


def bench_sample(shape, settings, options):
    n = min(options.new_tokens, shape["block_size"] - 1)
    print(f"{n} new tokens a text", flush=True)
    prompt = torch.zeros(settings.batch_size, 1, dtype=torch.long, device=settings.device)
    functions = {}
    for query in QUERIES:
        model = for_generation(make_model(query, shape).to(settings.device), options.dtype)
        functions[query] = lambda model=model: generate(model, prompt, n, temperature=0).cpu()
    print_speeds(functions, settings.batch_size * n, options.repeats)


def read_options(argv):
    parser = Parser(description=__doc__)
    parser.add_argument("command", choices=["train", "sample"])
    parser.add_argument("--shape", choices=SHAPES, default="small", help="default small")
    parser.add_argument("--device", help="cpu, cuda, cuda:N or mps; default the first there is")
    parser.add_argument("--dtype", help="default as in train.py and sample.py")
    parser.add_argument("--compile", choices=["true", "false"], help="train: default on CUDA")
    parser.add_argument("--batch_size", type=count, help="sequences; default 8 (sample: 1)")
    parser.add_argument("--repeats", type=count, default=9, help="turns; default 9")
    parser.add_argument("--new_tokens", type=count, default=200, help="sample: default 200")
    return parser.parse_args(argv)


def main(argv=None):
    options = read_options(argv)
    training = options.command == "train"
    settings = train.Settings(
        device=options.device,
        dtype=options.dtype if training else None,
        compile={"true": True, "false": False}.get(options.compile),
        batch_size=options.batch_size or (8 if training else 1),
        gradient_accumulation_steps=1,
    )
    check_ranges(settings)
    settings = resolve(settings)
    print(f"{device_name(settings.device)}, torch {torch.__version__}", flush=True)
    bench = bench_train if training else bench_sample
    with processes(settings):
        bench(SHAPES[options.shape], settings, options)


if __name__ == "__main__":
    run_program(main)
