"""Turn a checkpoint of nanoGPT, or of the paper's code, into a run of this project:

    python import_checkpoint.py CKPT.pt out/NAME --dataset=NAME [--key=value ...]

The dataset is one in data/, in the tokens that the model was trained on. Keys are those of train.py: what is
given here holds when the run is trained further. The run begins at step 0, with a fresh optimizer:

    python sample.py out/NAME
    python train.py out/NAME/config.py --resume --eval_only
    python train.py out/NAME/config.py --resume

Nothing in the checkpoint is executed, and what is not understood in it is refused by its name.
"""

import dataclasses
import math
import shlex
import sys
from pathlib import Path

import torch

import train
from command import UserError, convert, run_program, split_command
from model import GPTConfig
from run_folder import describe, load_checkpoint

QUERY_MODES = {"original": "linear", "residual": "linear", "identity": "identity", "residual_gelu": "nonlinear"}
SAME = {"n_layer", "n_head", "n_embd", "block_size", "vocab_size", "dropout", "bias", "tie_weights"}
RENAMED = {"num_heads": "n_head", "mlp_hidden_size": "mlp_hidden"}


def translate(checkpoint):
    """A foreign checkpoint -> (settings of GPTConfig, state dict of GPT). UserError names what is not understood."""
    try:
        weights = {name.removeprefix("_orig_mod."): tensor for name, tensor in checkpoint["model"].items()}
        args = dict(checkpoint["model_args"])
    except (KeyError, TypeError, AttributeError, IndexError):
        raise UserError("it is no checkpoint of nanoGPT or of the paper's code: it lacks model or model_args") from None
    mode, scale = args.pop("query_mode", "original"), args.pop("scale", None)
    if mode not in QUERY_MODES:
        raise UserError(f"query_mode={mode!r} is not known here, only {', '.join(QUERY_MODES)}")
    args = {RENAMED.get(name, name): value for name, value in args.items()}
    unknown = sorted(args.keys() - SAME - set(RENAMED.values()))
    missing = sorted({"n_layer", "n_head", "n_embd", "block_size", "vocab_size"} - args.keys())
    if unknown or missing:
        raise UserError(
            f"model_args has no {', '.join(missing)}" if missing else f"model_args: {unknown[0]} is not known"
        )
    args |= {"query_mode": QUERY_MODES[mode], "bias": args.get("bias", True)}
    if "transformer.h.0.attn.residual_in.weight" in weights:
        args["query_rank"] = len(weights["transformer.h.0.attn.residual_in.weight"])
    try:
        config = GPTConfig(**args)
    except (ValueError, TypeError) as e:
        raise UserError(f"model_args: {e}") from None
    return args, Translation(weights, config).state_dict(mode, query_factor(mode, scale, config))


def query_factor(mode, scale, config):
    """What the queries are to be multiplied with, so that the softmax scale is 1/sqrt(head size), as it is here.

    The paper's code halves that scale where here the query is halved; in the mode "residual", whose query
    becomes a linear one, only the checkpoint can tell.
    """
    full = 1 / math.sqrt(config.n_embd // config.n_head)
    if scale is None and mode != "residual":
        return 1.0
    allowed = {"original": [1.0], "residual": [1.0, 0.5]}.get(mode, [0.5])
    for factor in allowed:
        if isinstance(scale, (int, float)) and math.isclose(scale, factor * full, rel_tol=1e-6):
            return factor if mode == "residual" else 1.0
    raise UserError(f"scale={scale} is not understood with query_mode={mode!r}: {full * allowed[-1]:g} was expected")


class Translation:
    """Takes foreign tensors by name, until none is left."""

    def __init__(self, weights, config):
        self.weights, self.config = weights, config

    def take(self, name, *shape):
        if name not in self.weights:
            raise UserError(f"the tensor {name} is missing")
        tensor = self.weights.pop(name)
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != shape:
            found = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise UserError(f"the tensor {name} is {found}, not {shape}")
        return tensor.detach().to(torch.float32)

    def module(self, ours, theirs, *shape):
        """A linear layer (out, in) or a norm (d): its weight, and its bias where the model has them."""
        taken = {f"{ours}.weight": self.take(f"{theirs}.weight", *shape)}
        if self.config.bias and "rms_norm" not in ours:
            taken[f"{ours}.bias"] = self.take(f"{theirs}.bias", shape[0])
        return taken

    def state_dict(self, mode, factor):
        c, d = self.config, self.config.n_embd
        state = {"wte.weight": self.take("transformer.wte.weight", c.vocab_size, d)}
        state["wpe.weight"] = self.take("transformer.wpe.weight", c.block_size, d)
        for n in range(c.n_layer):
            ours, theirs = f"blocks.{n}", f"transformer.h.{n}"
            for norm in ("ln_1", "ln_2"):
                state |= self.module(f"{ours}.{norm}", f"{theirs}.{norm}", d)
            state |= self.attention(f"{ours}.attn", f"{theirs}.attn", mode, factor)
            state |= self.module(f"{ours}.attn.c_proj", f"{theirs}.attn.c_proj", d, d)
            state |= self.module(f"{ours}.mlp.c_fc", f"{theirs}.mlp.c_fc", c.mlp_hidden, d)
            state |= self.module(f"{ours}.mlp.c_proj", f"{theirs}.mlp.c_proj", d, c.mlp_hidden)
            for mask in ("bias", "masked_bias"):  # buffers of old versions
                self.weights.pop(f"{theirs}.attn.{mask}", None)
        state |= self.module("ln_f", "transformer.ln_f", d)
        head = self.weights.pop("lm_head.weight", None) if c.tie_weights else None
        if head is not None and not torch.equal(head.float(), state["wte.weight"]):
            raise UserError("lm_head.weight differs from transformer.wte.weight, but tie_weights is not false")
        state["lm_head.weight"] = state["wte.weight"] if c.tie_weights else self.take("lm_head.weight", c.vocab_size, d)
        if self.weights:
            raise UserError(f"the tensor {sorted(self.weights)[0]} is not understood")
        return state

    def attention(self, ours, theirs, mode, factor):
        """The query, and c_attn, which stacks W_Q where there is one, W_K and W_V."""
        d, linear = self.config.n_embd, self.config.query_mode == "linear"
        stacked = self.module("c_attn", f"{theirs}.c_attn", (3 if linear else 2) * d, d)
        state = {
            f"{ours}.key_value.{kind}": tensor[-2 * d :]
            for kind, tensor in ((name.rpartition(".")[2], tensor) for name, tensor in stacked.items())
        }
        if linear:
            for name, tensor in stacked.items():
                kind, w_q = name.rpartition(".")[2], tensor[:d]
                if mode == "residual" and kind == "weight":  # q = x + x W_Q
                    w_q = w_q + torch.eye(d)
                state[f"{ours}.query.w_q.{kind}"] = factor * w_q
        if mode == "residual_gelu":
            r = self.config.query_rank
            state |= self.module(f"{ours}.query.rms_norm", f"{theirs}.residual_rmsnorm_input", d)
            state |= self.module(f"{ours}.query.w_1", f"{theirs}.residual_in", r, d)
            state |= self.module(f"{ours}.query.w_2", f"{theirs}.residual_out", d, r)
            state |= self.module(f"{ours}.query.layer_norm", f"{theirs}.residual_layernorm_output", d)
        return state


def read_command(argv):
    """Command line -> (path of the checkpoint, Settings of the run to be)."""
    places, flags = split_command(argv, train.KINDS)
    if len(places) != 2:
        raise UserError("two places are needed: import_checkpoint.py CKPT.pt out/NAME --dataset=NAME", status=2)
    given = {"out_dir": places[1]}
    for key, value in flags.items():
        if key in GPTConfig.__dataclass_fields__ or key in ("out_dir", "resume", "eval_only"):
            raise UserError(f"--{key} is not for here: the model is the checkpoint's, the run is new", status=2)
        given[key] = convert(key, value, train.KINDS, "command line")
    if "dataset" not in given:
        raise UserError("--dataset=NAME is needed: the data whose tokens the model was trained on", status=2)
    try:
        return Path(places[0]), train.Settings(**given)
    except ValueError as e:
        raise UserError(str(e), status=2) from None


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(argv):
        print(__doc__)
        return 0
    path, settings = read_command(argv)
    checkpoint = load_checkpoint(path)
    try:
        model_args, state = translate(checkpoint)
    except UserError as e:
        raise UserError(f"{path}: {e}") from None
    write_run(settings, model_args, state, shlex.join(["python", "import_checkpoint.py", *argv]))
    return 0


def write_run(settings, model_args, state, command):
    run = train.Run(train.resolve(settings), model_args, command)
    run.model.load_state_dict(state)
    known, used = run.data.meta["vocab_size"], run.model.config.vocab_size
    if used - known >= 128:  # less is padding
        raise UserError(f"the model has {used:,} words and {settings.dataset} {known:,}: these are other tokens")
    with run.folder.lock():
        if run.folder.holds("config.json"):
            raise UserError(f"{run.folder} holds a run; choose another folder")
        lines = [f"{key} = {value!r}" for key, value in {**dataclasses.asdict(settings), **model_args}.items()]
        run.folder.write_text("config.py", "\n".join(lines) + "\n")
        run.save("best.pt")  # as long as training on has found no better one
        run.save("ckpt.pt")
        run.folder.begin(describe(run.s, run.model, run.data, command), -1)  # last: it makes the folder a run
    print(f"{run.folder}: {run.model.config.query_mode} query, {run.model.parameter_report()['total']:,} parameters")
    print(f"sample from it: python sample.py {run.folder}")
    print(f"train it further: python train.py {run.folder}/config.py --resume")


if __name__ == "__main__":
    run_program(main)
