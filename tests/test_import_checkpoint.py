"""Foreign checkpoints against a forward pass of a few lines, and what is refused."""

import math
from pathlib import Path

import pytest
import torch

import sample
import train
from conftest import checkpoint, files
from test_model import gelu_ref, norm_ref
from tools import import_checkpoint
from utils.settings import UserError

D, HEADS, LAYERS, BLOCK, HIDDEN, RANK = 24, 3, 2, 16, 96, 7
FLAGS = ["--dataset=tiny", "--device=cpu"]


def foreign(mode, bias=False, vocab_size=20):
    """A checkpoint as nanoGPT or the paper's code saves it, with weights that all matter."""
    shapes = {"wte": (vocab_size, D), "wpe": (BLOCK, D), "ln_f": (D,)}
    stacked = 2 if mode in ("identity", "residual_gelu") else 3
    for h in (f"h.{n}" for n in range(LAYERS)):
        shapes |= {f"{h}.ln_1": (D,), f"{h}.ln_2": (D,)}
        shapes |= {f"{h}.attn.c_attn": (stacked * D, D), f"{h}.attn.c_proj": (D, D)}
        shapes |= {f"{h}.mlp.c_fc": (HIDDEN, D), f"{h}.mlp.c_proj": (D, HIDDEN)}
        if mode == "residual_gelu":
            shapes |= {f"{h}.attn.residual_rmsnorm_input": (D,)}
            shapes |= {f"{h}.attn.residual_in": (RANK, D), f"{h}.attn.residual_out": (D, RANK)}
            shapes |= {f"{h}.attn.residual_layernorm_output": (D,)}
    torch.manual_seed(0)
    model = {}
    for name, shape in shapes.items():
        model[f"transformer.{name}.weight"] = 0.4 * torch.randn(shape) + (len(shape) == 1)
        if bias and name not in ("wte", "wpe") and "rmsnorm" not in name:
            model[f"transformer.{name}.bias"] = 0.4 * torch.randn(shape[0])
    model["lm_head.weight"] = model["transformer.wte.weight"]
    args = {"n_layer": LAYERS, "n_embd": D, "block_size": BLOCK, "bias": bias}
    if mode == "nanogpt":
        args |= {"n_head": HEADS, "dropout": 0.0}
        model = {f"_orig_mod.{name}": tensor for name, tensor in model.items()}
    else:
        args |= {"num_heads": HEADS, "query_mode": mode, "mlp_hidden_size": HIDDEN}
        args["tie_weights"] = mode != "identity"
    if mode == "identity":
        model["lm_head.weight"] = 0.4 * torch.randn(vocab_size, D)
    if mode == "residual":
        args["scale"] = 0.5 / math.sqrt(D // HEADS)
    return {"model": model, "model_args": {**args, "vocab_size": vocab_size}, "iter_num": 7}


def forward(theirs, idx):
    """Logits in float64, from the foreign weights."""
    args = theirs["model_args"]
    mode, head = args.get("query_mode", "original"), D // HEADS
    scale = args.get("scale") or (1 if mode == "original" else 0.5) / math.sqrt(head)
    w = {name.removeprefix("_orig_mod."): t.double() for name, t in theirs["model"].items()}

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def norm(x, name):
        return norm_ref(x, w[f"{name}.weight"], w.get(f"{name}.bias", 0.0))

    future = torch.ones(idx.size(1), idx.size(1)).triu(1).bool()
    x = w["transformer.wte.weight"][idx] + w["transformer.wpe.weight"][: idx.size(1)]
    for block in (f"transformer.h.{n}" for n in range(LAYERS)):
        h = norm(x, f"{block}.ln_1")
        *q, k, v = linear(h, f"{block}.attn.c_attn").split(D, dim=-1)
        q = q[0] if q else 0.0
        if mode == "residual_gelu":
            at = f"{block}.attn.residual"
            rms = norm_ref(h, w[f"{at}_rmsnorm_input.weight"], centre=False)
            inner = linear(gelu_ref(linear(rms, f"{at}_in")), f"{at}_out")
            q = norm(inner, f"{at}_layernorm_output")
        if mode != "original":
            q = h + q
        q, k, v = (t.unflatten(-1, (HEADS, head)).transpose(1, 2) for t in (q, k, v))
        attention = (q @ k.mT * scale).masked_fill(future, -math.inf).softmax(-1)
        x = x + linear((attention @ v).transpose(1, 2).flatten(2), f"{block}.attn.c_proj")
        h = gelu_ref(linear(norm(x, f"{block}.ln_2"), f"{block}.mlp.c_fc"))
        x = x + linear(h, f"{block}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["lm_head.weight"].T


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mode", "nanogpt original identity residual residual_gelu".split())
def test_the_imported_model_has_the_foreign_logits(mode, bias, tiny_data):
    theirs = foreign(mode, bias)
    torch.save(theirs, "foreign.pt")
    import_checkpoint.main(["foreign.pt", "out/x", *FLAGS])
    model, _ = sample.load_model("out/x", "cpu")
    idx = torch.randint(20, (2, BLOCK))
    logits = model.double()(idx).detach()
    torch.testing.assert_close(logits, forward(theirs, idx), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", ["next", "masked"])
def test_an_imported_run_samples_evaluates_and_trains(objective, tiny_data, capsys):
    torch.save(foreign("residual_gelu"), "foreign.pt")
    recipe = "--max_iters=3 --batch_size=2 --gradient_accumulation_steps=1 --eval_tokens=200 "
    recipe += f"--learning_rate=1e-2 --warmup_iters=0 --objective={objective}"
    import_checkpoint.main(["foreign.pt", "out/x", *FLAGS, *recipe.split()])
    words = ["--max_new_tokens=5"] if objective == "next" else ["--prompt=1<mask>"]
    assert sample.main(["out/x", "--device=cpu", *words]) == 0
    before = checkpoint("out/x")["model"]
    assert train.main(["out/x/config.py", "--resume"]) == 0
    assert "step 0/3 val_loss" in capsys.readouterr().out
    after = checkpoint("out/x")
    assert after["state"]["step"] == 3
    assert not any(torch.equal(before[name], after["model"][name]) for name in before)


def test_neither_a_run_nor_the_checkpoint_itself_is_overwritten(tiny_data, whole_run):
    Path("theirs").mkdir()
    torch.save(foreign("original"), "theirs/ckpt.pt")
    before = files()
    for folder in (whole_run, "theirs"):
        with pytest.raises(UserError, match=f"{folder} holds a run or a checkpoint"):
            import_checkpoint.main(["theirs/ckpt.pt", folder, *FLAGS])
    assert files() == before


LN_F = "transformer.ln_f.weight"
NOT_UNDERSTOOD = [
    ("original", "model_args", {"query_mode": "swish"}, "query_mode='swish'"),
    ("original", "model_args", {"rope": True}, "model_args: rope is not known"),
    ("original", "model_args", {"n_layer": None}, "model_args: n_layer is missing"),
    # The data need 18. So much more is no padding.
    ("original", "model_args", {"vocab_size": 17}, "vocab_size=17; the data: 18"),
    ("original", "model_args", {"vocab_size": 146}, "vocab_size=146; the data: 18"),
    ("original", "model_args", {"n_embd": 25}, "n_embd=25"),
    ("original", "model_args", {"scale": 0.1}, "scale=0.1"),
    ("residual", "model_args", {"scale": None}, "scale=None"),
    ("residual_gelu", "model_args", {"scale": 1.0}, "scale=1.0"),
    ("identity", "model", {"extra": torch.ones(2)}, 'Unexpected key(s) in state_dict: "extra"'),
    ("identity", "model", {LN_F: "text"}, '"ln_f.weight", expected torch.Tensor'),
    ("identity", "model", {LN_F: None}, 'Missing key(s) in state_dict: "ln_f.weight"'),
    ("identity", "model", {LN_F: torch.ones(3)}, "size mismatch for ln_f.weight"),
    ("original", "model", {"lm_head.weight": torch.ones(20, D)}, "lm_head.weight differs"),
]


@pytest.mark.parametrize("mode, part, changes, words", NOT_UNDERSTOOD)
def test_what_is_not_understood_is_refused_by_name(mode, part, changes, words, tiny_data):
    theirs = foreign(mode, vocab_size=changes.get("vocab_size", 20))
    theirs[part] |= changes
    theirs[part] = {key: value for key, value in theirs[part].items() if value is not None}
    torch.save(theirs, "foreign.pt")
    with pytest.raises(UserError) as e:
        import_checkpoint.main(["foreign.pt", "out/x", *FLAGS])
    assert words in str(e.value)
    assert str(e.value).startswith("foreign.pt: ") and "\n" not in str(e.value)
    assert not Path("out").exists()
