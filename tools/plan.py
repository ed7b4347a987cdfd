"""What a recipe takes, to know before a GPU is rented: python -m tools.bench plan config/FILE.py [--key=value ...]

Keys are the settings of train.py. Nothing is run: what is printed was counted on tensors without values.
"""

import math
from dataclasses import replace

import torch
from torch._subclasses import FakeTensorMode

import train
from model import GPT, GPTConfig
from utils.device import autocast, flops_per_token
from utils.settings import Parser, UserError, checked, read_command


def count_kept(settings, config):
    """Bytes that a micro-batch keeps from its forward for its backward pass, cut in two as torch.compile cuts it."""
    from functorch.compile import aot_function, min_cut_rematerialization_partition, nop  # seconds to import
    from torch._inductor.decomposition import select_decomp_table

    kept = {}  # storages by their address, since several tensors may share one

    def note(tensor):
        kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with FakeTensorMode(), autocast(settings), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        objective = train.Objective(GPT(config))
        weights, idx = dict(objective.named_parameters()), torch.zeros(settings.batch_size, config.block_size).long()
        how = {"partition_fn": min_cut_rematerialization_partition, "decompositions": select_decomp_table()}
        aot_function(lambda w, x: torch.func.functional_call(objective, w, (x, x)), nop, **how)(weights, idx)
    for weight in weights.values():
        kept.pop(weight.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in kept.values())


def count_memory(settings, config, gpus, parameters):
    """{part: bytes} on each GPU early in the backward pass, when it is fullest: logits have become their gradient."""
    # On the CPU, where flash attention is taken, too, so that every machine counts the same.
    settings = replace(settings, device="cpu", dtype=settings.dtype or "bfloat16")
    one, two = (count_kept(settings, replace(config, n_layer=n)) for n in (1, 2))  # blocks are alike
    tokens, width = settings.batch_size * config.block_size, getattr(torch, settings.dtype).itemsize
    return {
        "weights": 4 * parameters,
        "gradients": 4 * parameters * min(gpus, 2),  # several GPUs have a copy to exchange, too
        "AdamW's moments": 8 * parameters,
        "activations": one + (config.n_layer - 1) * (two - one) - tokens * config.vocab_size * width,
        "logits and the head's gradient": (tokens + config.n_embd) * config.vocab_size * width,
    }


def read_options(argv):
    parser = Parser(prog="python -m tools.bench plan", description=__doc__)
    count = checked(int, lambda n: n >= 1, "must be at least 1")
    positive = checked(float, lambda x: 0 < x < math.inf, "must be above 0")
    share = checked(float, lambda s: 0 < s <= 1, "is not above 0 and at most 1")
    parser.add_argument("--gpus", type=count, default=1)
    parser.add_argument("--tflops", type=positive, default=989, help="peak of one, dense bf16; default 989, an H100's")
    parser.add_argument("--share", type=share, default=0.4, help="of the peak that is reached; default 0.4")
    options, rest = parser.parse_known_args(argv)
    options.what, (options.settings, options.config) = "plan", read_command(rest, train.Settings, GPTConfig)
    return options


def print_plan(options):
    settings, config, gpus = options.settings, options.config, options.gpus
    problems = {"vocab_size is that of the data set: give a --vocab_size": config.vocab_size is None}
    problems |= {f"dropout={config.dropout} is not counted: give --dropout=0": config.dropout}
    shared = f"gradient_accumulation_steps={settings.gradient_accumulation_steps} cannot be shared by {gpus} GPUs"
    for problem, found in (problems | {shared: settings.gradient_accumulation_steps % gpus}).items():
        if found:
            raise UserError(problem, status=2)
    with torch.device("meta"):
        model = GPT(config)
    parameters, flops = sum(p.numel() for p in model.parameters()), flops_per_token(model)
    sequences = settings.batch_size * settings.gradient_accumulation_steps
    tokens = settings.max_iters * sequences * config.block_size
    hours = tokens * flops / (gpus * options.tflops * 1e12 * options.share) / 3600
    parts = count_memory(settings, config, gpus, parameters)
    print(f"parameters  {parameters:,}")
    print(f"tokens      {tokens:.3g}: {settings.max_iters:,} steps of {sequences} sequences of {config.block_size:,}")
    print(f"FLOPs       {tokens * flops:.3g}: {flops:.3g} a token, forward and backward")
    print(f"time        {hours:.1f} hours at {options.share:.0%} of {gpus} x {options.tflops:g} TFLOP/s")
    print(f"memory      {sum(parts.values()) / 1e9:.1f} GB a GPU, compiled, {settings.batch_size} sequences at a time:")
    print("\n".join(f"{size / 1e9:15.2f} GB {part}" for part, size in parts.items()))
    print("counted, not measured; what CUDA and NCCL take, and fragmentation, come on top")
