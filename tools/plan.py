"""Count what a recipe takes: python -m tools.bench plan config/FILE.py [--key=value ...].

The keys are the settings of train.py. Nothing is trained: tensors without values are counted.
"""

import math
from dataclasses import replace

import torch
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

import train
from model import GPT, GPTConfig
from utils.device import autocast
from utils.flops import flops_per_token
from utils.options import checked
from utils.settings import Parser, UserError, read_command


def count_saved(settings, config):
    """Bytes that a micro-batch saves for its backward pass, cut in two as torch.compile does."""
    # These imports take seconds.
    from functorch.compile import aot_function, min_cut_rematerialization_partition, nop
    from torch._inductor.decomposition import select_decomp_table

    storages = {}  # by address, because several tensors may share one

    def record(tensor):
        storage = tensor.untyped_storage()
        storages[storage._cdata] = storage
        return tensor

    with FakeTensorMode(), autocast(settings), saved_tensors_hooks(record, lambda tensor: tensor):
        model = GPT(config)
        forward = aot_function(
            lambda weights, idx: torch.func.functional_call(model, weights, (idx, idx)),
            fw_compiler=nop,
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )
        weights = dict(model.named_parameters())
        idx = torch.zeros(settings.batch_size, config.block_size, dtype=torch.long)
        forward(weights, idx)
    for weight in weights.values():  # they are counted elsewhere
        storages.pop(weight.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in storages.values())


def count_memory(settings, config, gpus, parameters):
    """{part: bytes} on each GPU when it is fullest: the logits have just become their gradient."""
    # A CPU takes flash attention, too. Counting for it gives the same numbers on every machine.
    settings = replace(settings, device="cpu", dtype=settings.dtype or "bfloat16")
    one_block = count_saved(settings, replace(config, n_layer=1))
    two_blocks = count_saved(settings, replace(config, n_layer=2))
    saved = one_block + (config.n_layer - 1) * (two_blocks - one_block)
    tokens = settings.batch_size * config.block_size
    logit_size = config.vocab_size * getattr(torch, settings.dtype).itemsize
    return {
        "weights": 4 * parameters,
        # Several GPUs exchange copies of the gradients.
        "gradients": 4 * parameters * min(gpus, 2),
        "AdamW's moments": 8 * parameters,
        "activations": saved - tokens * logit_size,
        "logits and the head's gradient": (tokens + config.n_embd) * logit_size,
    }


def read_options(argv):
    """Command line -> options, among them settings and config of the recipe."""
    parser = Parser(prog="python -m tools.bench plan", description=__doc__)
    count = checked(int, lambda n: n >= 1, "must be at least 1")
    positive = checked(float, lambda x: 0 < x < math.inf, "must be above 0")
    share = checked(float, lambda x: 0 < x <= 1, "is not above 0 and at most 1")
    parser.add_argument("--gpus", type=count, default=1, help="default 1")
    parser.add_argument("--tflops", type=positive, default=989, help="peak; default 989, an H100's")
    parser.add_argument("--share", type=share, default=0.4, help="of the peak reached; default 0.4")
    options, recipe = parser.parse_known_args(argv)
    options.command = "plan"
    options.settings, options.config = read_command(recipe, train.Settings, GPTConfig)
    return options


def print_plan(options):
    settings, config, gpus = options.settings, options.config, options.gpus
    if config.vocab_size is None:
        raise UserError("vocab_size would be that of the data: give a --vocab_size", status=2)
    if config.dropout:
        raise UserError(f"dropout={config.dropout} is not counted: give --dropout=0", status=2)
    steps = settings.gradient_accumulation_steps
    if steps % gpus:
        problem = f"gradient_accumulation_steps={steps} cannot be shared by {gpus} GPUs"
        raise UserError(f"{problem}: take a multiple of {gpus}", status=2)
    with torch.device("meta"):
        model = GPT(config)
    parameters = model.parameter_report()["total"]
    flops = flops_per_token(model)
    sequences = settings.batch_size * steps
    tokens = settings.max_iters * sequences * config.block_size
    hours = tokens * flops / (gpus * options.tflops * 1e12 * options.share) / 3600
    memory = count_memory(settings, config, gpus, parameters)
    total = sum(memory.values()) / 1e9
    length = f"{settings.max_iters:,} steps of {sequences} sequences of {config.block_size:,}"
    speed = f"{options.share:.0%} of {gpus} x {options.tflops:g} TFLOP/s"
    print(f"parameters  {parameters:,}")
    print(f"tokens      {tokens:.3g}: {length}")
    print(f"FLOPs       {tokens * flops:.3g}: {flops:.3g} a token, forward and backward")
    print(f"time        {hours:.1f} hours at {speed}")
    print(f"memory      {total:.1f} GB a GPU, compiled, {settings.batch_size} sequences at a time:")
    for part, size in memory.items():
        print(f"{size / 1e9:15.2f} GB {part}")
    print("All is counted, not measured. CUDA, NCCL and fragmentation take more memory.")
