"""Count what a recipe takes, without training: python -m tools.plan config/FILE.py [--key=value].

The keys are the settings of train.py. CUDA, NCCL and fragmentation take memory beside the count.
"""

from dataclasses import replace

import torch
from functorch.compile import aot_function, min_cut_rematerialization_partition, nop
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

import train
from model import GPT, GPTConfig
from utils.device import autocast
from utils.flops import flops_per_token
from utils.options import count
from utils.settings import Parser, UserError, read_command, run_program


def count_saved(settings, config):
    """Bytes that a micro-batch saves for its backward pass, cut in two as torch.compile does."""
    saved = []
    with FakeTensorMode(), autocast(settings), saved_tensors_hooks(saved.append, lambda _: None):
        model = GPT(config)
        forward = aot_function(
            lambda weights, idx: torch.func.functional_call(model, weights, (idx, idx)),
            fw_compiler=nop,
            partition_fn=min_cut_rematerialization_partition,
            decompositions=select_decomp_table(),
        )
        weights = dict(model.named_parameters())
        forward(weights, torch.zeros(settings.batch_size, config.block_size, dtype=torch.long))
    # Several tensors may share a storage. The weights are counted elsewhere.
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage() for tensor in saved}
    for weight in weights.values():
        storages.pop(weight.untyped_storage()._cdata, None)
    return sum(storage.nbytes() for storage in storages.values())


def count_memory(settings, config, gpus, parameters):
    """{part: bytes} on each GPU when it is fullest: the logits have just become their gradient."""
    # A CPU takes flash attention, too. Counting for it gives the same numbers on every machine.
    settings = replace(settings, device="cpu", dtype=settings.dtype or "bfloat16")
    tokens = settings.batch_size * config.block_size
    logit_size = config.vocab_size * getattr(torch, settings.dtype).itemsize
    return {
        "weights": 4 * parameters,
        # Several GPUs exchange copies of the gradients.
        "gradients": 4 * parameters * min(gpus, 2),
        "AdamW's moments": 8 * parameters,
        "activations": count_saved(settings, config) - tokens * logit_size,
        "logits and the head's gradient": (tokens + config.n_embd) * logit_size,
    }


def read_options(argv):
    """Command line -> (options, settings, model configuration)."""
    parser = Parser(description=__doc__)
    parser.add_argument("--gpus", type=count, default=1, help="default 1")
    parser.add_argument("--tflops", type=count, default=400, help="that a GPU reaches; default 400")
    options, recipe = parser.parse_known_args(argv)
    return options, *read_command(recipe, train.Settings, GPTConfig)


def main(argv=None):
    options, settings, config = read_options(argv)
    if config.vocab_size is None or config.dropout:
        raise UserError("a plan needs a --vocab_size, and --dropout=0", status=2)
    with torch.device("meta"):
        model = GPT(config)
    parameters = model.parameter_report()["total"]
    flops = flops_per_token(model)
    sequences = settings.batch_size * settings.gradient_accumulation_steps
    tokens = settings.max_iters * sequences * config.block_size
    hours = tokens * flops / (options.gpus * options.tflops * 1e12) / 3600
    memory = count_memory(settings, config, options.gpus, parameters)
    print(f"parameters  {parameters:,}")
    print(f"tokens      {tokens:.3g}: {settings.max_iters:,} steps of {sequences} sequences")
    print(f"FLOPs       {tokens * flops:.3g}: {flops:.3g} a token, forward and backward")
    print(f"time        {hours:.1f} hours at {options.gpus} x {options.tflops:g} TFLOP/s")
    print(f"memory      at least, of a GPU, compiled, {settings.batch_size} sequences at a time:")
    for part, size in (memory | {"together": sum(memory.values())}).items():
        print(f"{size / 1e9:15.2f} GB {part}")


if __name__ == "__main__":
    run_program(main)
