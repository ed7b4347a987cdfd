"""Turn a checkpoint of nanoGPT, or of the paper's code, into a run of this project:

    python -m tools.import_checkpoint CKPT.pt out/NAME --dataset=NAME [--key=value ...]

The data set holds the tokens that the model was trained on; keys are the settings of train.py for training it further,
`python train.py out/NAME/config.py --resume`. What is not understood in the checkpoint is refused by its name.
"""

import sys

import torch

from model import GPT, GPTConfig
from prepare_data import Dataset, prepare_if_small
from train import Settings, fit_to_data
from utils.checkpoint import RunFolder, describe, load_checkpoint, new_state
from utils.device import launch_command, resolve
from utils.settings import UserError, check_ranges, convert, run_program, setting_types, split_command

QUERY_MODES = {"original": "linear", "residual": "linear", "identity": "identity", "residual_gelu": "nonlinear"}
# Softmax scales, as multiples of 1/sqrt(head size). The paper's code halves the scale where here the query is halved.
SCALES = {"original": (None, 1.0), "residual": (1.0, 0.5), "identity": (None, 0.5), "residual_gelu": (None, 0.5)}
RENAMED = {"num_heads": "n_head", "mlp_hidden_size": "mlp_hidden"}  # their settings -> ours
REQUIRED = {"n_layer", "n_head", "n_embd", "block_size", "vocab_size"}
OPTIONAL = {"query_mode", "scale", "mlp_hidden", "dropout", "bias", "tie_weights"}
# Our modules -> theirs. Their c_attn stacks W_Q (where there is one), W_K and W_V.
MODULES = {"wte": "transformer.wte", "wpe": "transformer.wpe", "blocks": "transformer.h", "ln_f": "transformer.ln_f"}
MODULES |= {"query.w_q": "c_attn", "key_value": "c_attn", "query.rms_norm": "residual_rmsnorm_input"}
MODULES |= {"query.w_1": "residual_in", "query.w_2": "residual_out", "query.layer_norm": "residual_layernorm_output"}


@torch.no_grad()
def translate(checkpoint):
    """A foreign checkpoint -> its model as a GPT. UserError names what is not understood."""
    if not (isinstance(checkpoint, dict) and {"model", "model_args"} <= checkpoint.keys()):
        raise UserError("it is no checkpoint of nanoGPT or of the paper's code: it lacks model or model_args")
    weights = {name.removeprefix("_orig_mod."): tensor for name, tensor in checkpoint["model"].items()}
    args = {RENAMED.get(name, name): value for name, value in checkpoint["model_args"].items()}
    if wrong := (args.keys() - OPTIONAL) ^ REQUIRED:
        raise UserError(f"model_args: {min(wrong)} is {'missing' if min(wrong) in REQUIRED else 'not known'}")
    mode, scale = args.pop("query_mode", "original"), args.pop("scale", None)
    multiple = None if scale is None else round(scale * (args["n_embd"] // args["n_head"]) ** 0.5, 6)
    if multiple not in SCALES.get(mode, ()):
        raise UserError(f"query_mode={mode!r} with scale={scale} is not understood")
    if "transformer.h.0.attn.residual_in.weight" in weights:
        args["query_rank"] = len(weights["transformer.h.0.attn.residual_in.weight"])
    model = GPT(GPTConfig(**{"bias": True, **args, "query_mode": QUERY_MODES[mode]}))
    copy_weights(weights, model)
    if mode == "residual":  # q = x + x W_Q there; and here the scale is always 1/sqrt(head size)
        for block in model.blocks:
            block.attn.query.w_q.weight += torch.eye(model.config.n_embd)
            for parameter in block.attn.query.parameters():
                parameter *= multiple
    return model


def copy_weights(weights, model):
    """Copy foreign tensors into a model; none may be missing, of another shape, or left over."""
    for name, parameter in model.named_parameters():  # a tied head comes once, as wte
        theirs = name
        for our_module, their_module in MODULES.items():
            theirs = theirs.replace(our_module, their_module)
        if not isinstance(weights.get(theirs), torch.Tensor):
            raise UserError(f"the tensor {theirs} is missing")
        rows, weights[theirs] = weights[theirs].tensor_split([len(parameter)])  # of c_attn some are left for the next
        if rows.shape != parameter.shape:
            raise UserError(f"the tensor {theirs} has {tuple(rows.shape)}, not {tuple(parameter.shape)}, for {name}")
        parameter.copy_(rows)
    head = weights.pop("lm_head.weight", model.wte.weight)  # still here where it is tied
    if model.config.tie_weights and not torch.equal(head.float(), model.wte.weight):
        raise UserError("lm_head.weight differs from transformer.wte.weight, but tie_weights is not false")
    if left := [name for name, tensor in weights.items() if tensor.numel() and not name.endswith(".attn.bias")]:
        raise UserError(f"the tensor {min(left)} is not understood")  # .attn.bias is a mask, which old versions saved


def read_command(argv):
    """Command line -> (path of the checkpoint, the settings that were given)."""
    types = setting_types(Settings)
    places, flags = split_command(argv, types)
    if len(places) != 2 or "dataset" not in flags:
        raise UserError("two places are needed, CKPT.pt and out/NAME, and --dataset=NAME is needed", status=2)
    if wrong := flags.keys() & {*setting_types(GPTConfig), "out_dir", "resume", "eval_only"}:
        raise UserError(f"--{min(wrong)} is not for here: the model is the checkpoint's, the run is new", status=2)
    given = {key: convert(key, value, types, "command line") for key, value in flags.items()}
    check_ranges(Settings(**given))
    return places[0], {"out_dir": places[1], **given}


def write_run(given, model, command):
    """Write the run's folder. config.json comes last: it makes the folder a run."""
    settings, config, run = resolve(Settings(**given)), model.config, RunFolder(given["out_dir"])
    prepare_if_small(settings.dataset)
    data = Dataset(settings.dataset, config.block_size)
    if not 0 <= config.vocab_size - data.vocab_size < 128:  # so many may be padding
        raise UserError(f"vocab_size={config.vocab_size} is not that of {settings.dataset}, {data.vocab_size}")
    fit_to_data(config, settings, data)
    checkpoint = {"model": model.state_dict(), "config": vars(config), "tokenizer": data.tokenizer}
    checkpoint["state"] = new_state()
    lines = given | {key: getattr(config, key) for key in setting_types(GPTConfig)}
    with run.lock():
        if run.holds_a_run():  # perhaps the file that is imported
            raise UserError(f"{run} holds a run or a checkpoint; choose another folder")
        run.write_text("config.py", "".join(f"{key} = {value!r}\n" for key, value in lines.items()))
        run.save("best.pt", checkpoint)  # until training finds a better one
        run.save("ckpt.pt", checkpoint)
        run.write_json("config.json", describe(settings, model, data, command))
    print(f"{run}: {config.query_mode} query; sample from it: python sample.py {run}")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if "-h" in argv or "--help" in argv:
        print(__doc__)
        return 0
    path, given = read_command(argv)
    checkpoint = load_checkpoint(path)
    try:
        model = translate(checkpoint)
    except (UserError, ValueError, TypeError, AttributeError, RuntimeError, ArithmeticError) as e:
        raise UserError(f"{path}: {e}") from None
    write_run(given, model, launch_command("-m", "tools.import_checkpoint", *argv))
    return 0


if __name__ == "__main__":
    run_program(main)
