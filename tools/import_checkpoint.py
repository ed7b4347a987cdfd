"""Turn a checkpoint of nanoGPT, or of the paper's code, into a run of this project.

The flags are settings of train.py for further training. --dataset names the data of the model.
"""

from dataclasses import asdict

import torch

from model import GPT, GPTConfig
from train import Settings, fit_to_data
from utils.checkpoint import RUN_FILES, RunFolder, describe, load_checkpoint
from utils.data import Dataset, prepare_if_small
from utils.device import resolve
from utils.files import locked
from utils.settings import Parser, UserError, add_settings, build, check_ranges, run_program

# Their query mode -> ours, and the softmax scales that we can express, as multiples of
# 1 / sqrt(head size). None is their default. Their code halves the scale where we halve the query.
MODES = {
    "original": ("linear", (None, 1.0)),
    "residual": ("linear", (1.0, 0.5)),
    "identity": ("identity", (None, 0.5)),
    "residual_gelu": ("nonlinear", (None, 0.5)),
}
RENAMED = {"num_heads": "n_head", "mlp_hidden_size": "mlp_hidden"}  # their settings -> ours
REQUIRED = {"n_layer", "n_head", "n_embd", "block_size", "vocab_size"}
OPTIONAL = {"query_mode", "scale", "mlp_hidden", "dropout", "bias", "tie_weights"}
MODULES = {"_orig_mod.": "", "transformer.h": "blocks", "transformer.": ""}  # in weights' names
MODULES |= {"residual_rmsnorm_input": "query.rms_norm", "residual_in": "query.w_1"}
MODULES |= {"residual_out": "query.w_2", "residual_layernorm_output": "query.layer_norm"}


@torch.no_grad()
def translate(checkpoint):
    """A foreign checkpoint -> its model as a GPT. The errors name what is not understood."""
    if not (isinstance(checkpoint, dict) and {"model", "model_args"} <= checkpoint.keys()):
        raise UserError("it lacks model or model_args, which nanoGPT and the paper's code save")
    args = {RENAMED.get(name, name): value for name, value in checkpoint["model_args"].items()}
    for name in sorted((args.keys() - OPTIONAL) ^ REQUIRED):
        raise UserError(f"model_args: {name} is {'missing' if name in REQUIRED else 'not known'}")
    mode, scale = args.pop("query_mode", "original"), args.pop("scale", None)
    multiple = scale and round(scale * (args["n_embd"] / args["n_head"]) ** 0.5, 6)
    query_mode, multiples = MODES.get(mode, (None, ()))
    if multiple not in multiples:
        raise UserError(f"query_mode={mode!r} with scale={scale} is not understood")
    weights = rename(checkpoint["model"], args["n_embd"])
    if (name := "blocks.0.attn.query.w_1.weight") in weights:
        args["query_rank"] = len(weights[name])
    model = GPT(GPTConfig(**{"bias": True, **args, "query_mode": query_mode}))
    model.load_state_dict(weights)
    if model.config.tie_weights and not weights["lm_head.weight"].equal(weights["wte.weight"]):
        raise UserError("lm_head.weight differs from wte.weight, but tie_weights is true")
    if mode == "residual":  # there q = x + x W_Q with a scale of its own, here q = x W_Q
        for block in model.blocks:
            block.attn.query.w_q.weight += torch.eye(model.config.n_embd)
            for parameter in block.attn.query.parameters():
                parameter *= multiple
    return model


def rename(foreign, d):
    """Foreign tensors by our names. c_attn stacks W_Q (where there is one), W_K and W_V."""
    weights = {}
    for name, tensor in foreign.items():
        for theirs, ours in MODULES.items():
            name = name.replace(theirs, ours)
        if ".c_attn." in name:
            query, tensor = tensor.tensor_split([-2 * d])
            if len(query):
                weights[name.replace("c_attn", "query.w_q")] = query
            name = name.replace("c_attn", "key_value")
        if not name.endswith(".attn.bias"):  # a causal mask, which old versions saved
            weights[name] = tensor
    return weights


def read_options(argv):
    """Command line -> (path of the foreign checkpoint, settings of the new run)."""
    parser = Parser(description=__doc__)
    parser.add_argument("checkpoint", help="the foreign file, CKPT.pt")
    parser.add_argument("out_dir", metavar="run", help="the folder of the new run, out/NAME")
    add_settings(parser, Settings)
    options = parser.parse_args(argv)
    check_ranges(options)
    return options.checkpoint, build(Settings, options)


def main(argv=None):
    path, settings = read_options(argv)
    foreign = load_checkpoint(path)
    try:
        model = translate(foreign)
    except (UserError, ValueError, RuntimeError) as e:  # from GPTConfig, from load_state_dict
        raise UserError(f"{path}: {' '.join(str(e).split()):.300}") from None
    config = model.config
    prepare_if_small(settings.dataset)
    data = Dataset(settings.dataset, config.block_size)
    if not 0 <= config.vocab_size - data.vocab_size < 128:  # so much may be padding
        raise UserError(f"{path}: vocab_size={config.vocab_size}; the data: {data.vocab_size}")
    fit_to_data(config, settings, data)
    checkpoint = {"model": model.state_dict(), "config": asdict(config)}
    checkpoint |= {"tokenizer": data.tokenizer, "state": {"step": 0}}
    record = describe(resolve(settings), model, data)
    recipe = asdict(settings) | asdict(config)
    del recipe["causal"]  # it follows from the objective
    run = RunFolder(settings.out_dir)
    if any(map(run.holds, RUN_FILES)):  # perhaps the foreign file
        raise UserError(f"{run.path} holds a run or a checkpoint; choose another folder")
    with locked(run.path):
        run.write_text("config.py", "".join(f"{k} = {v!r}\n" for k, v in recipe.items()))
        run.save("ckpt.pt", checkpoint)
        run.write_json("config.json", record)
    print(f"{run.path}: {config.query_mode} query; sample from it: python sample.py {run.path}")


if __name__ == "__main__":
    run_program(main)
