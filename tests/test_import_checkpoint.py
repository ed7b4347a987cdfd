"""import_checkpoint.py: foreign checkpoints against a forward pass of a few lines, and what is refused."""

import math
from pathlib import Path

import pytest
import torch

import sample
import train
from conftest import files
from test_model import gelu_ref, norm_ref
from tools import import_checkpoint
from utils.checkpoint import RunFolder
from utils.settings import UserError

D, HEADS, LAYERS, BLOCK, HIDDEN, RANK = 24, 3, 2, 16, 96, 7
MODES = ["nanogpt", "original", "identity", "residual", "residual_gelu"]


def foreign(mode, bias, vocab_size, **changes):
    """A checkpoint as nanoGPT or the paper's code saves it, with weights that leave no part unnoticed."""
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=generator) * 0.4

    shapes = {"wte": (vocab_size, D), "wpe": (BLOCK, D), "ln_f": (D,)}
    for n in range(LAYERS):
        stacked = 2 if mode in ("identity", "residual_gelu") else 3
        shapes |= {f"h.{n}.ln_1": (D,), f"h.{n}.ln_2": (D,), f"h.{n}.attn.c_attn": (stacked * D, D)}
        shapes |= {f"h.{n}.attn.c_proj": (D, D), f"h.{n}.mlp.c_fc": (HIDDEN, D), f"h.{n}.mlp.c_proj": (D, HIDDEN)}
        if mode == "residual_gelu":
            shapes |= {f"h.{n}.attn.residual_rmsnorm_input": (D,), f"h.{n}.attn.residual_in": (RANK, D)}
            shapes |= {f"h.{n}.attn.residual_out": (D, RANK), f"h.{n}.attn.residual_layernorm_output": (D,)}
    model = {}
    for name, shape in shapes.items():
        model[f"transformer.{name}.weight"] = random(*shape) + (len(shape) == 1)
        if bias and name not in ("wte", "wpe") and "rmsnorm" not in name:
            model[f"transformer.{name}.bias"] = random(shape[0])
    model["lm_head.weight"] = model["transformer.wte.weight"]
    if mode == "nanogpt":
        args = {"n_head": HEADS, "dropout": 0.0}
        model = {f"_orig_mod.{name}": tensor for name, tensor in model.items()}
    else:
        args = {"num_heads": HEADS, "query_mode": mode, "mlp_hidden_size": HIDDEN, "tie_weights": True}
        if mode == "residual":
            args["scale"] = 0.5 / math.sqrt(D // HEADS)
    args |= {"n_layer": LAYERS, "n_embd": D, "block_size": BLOCK, "bias": bias, "vocab_size": vocab_size}
    rest = {"iter_num": 7, "best_val_loss": torch.tensor(1.5), "config": {}}
    return {"model": model, "model_args": args | changes, **rest}


def forward(checkpoint, idx):
    """Logits in float64, from the foreign weights."""
    args = checkpoint["model_args"]
    w = {name.removeprefix("_orig_mod."): tensor.double() for name, tensor in checkpoint["model"].items()}
    mode, d, head = args.get("query_mode", "original"), D, D // HEADS

    def linear(x, name):
        return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0.0)

    def norm(x, name):
        return norm_ref(x, w[f"{name}.weight"], w.get(f"{name}.bias", 0.0))

    x = w["transformer.wte.weight"][idx] + w["transformer.wpe.weight"][: idx.size(1)]
    for n in range(LAYERS):
        h, a = norm(x, f"transformer.h.{n}.ln_1"), f"transformer.h.{n}.attn"
        stacked = linear(h, f"{a}.c_attn").split(d, dim=-1)
        k, v = stacked[-2:]
        scale = args.get("scale") or (1 if mode == "original" else 0.5) / math.sqrt(head)
        if mode == "original":
            q = stacked[0]
        elif mode == "identity":
            q = h
        elif mode == "residual":
            q = h + stacked[0]
        else:
            rms = norm_ref(h, w[f"{a}.residual_rmsnorm_input.weight"], centre=False)
            inner = linear(gelu_ref(linear(rms, f"{a}.residual_in")), f"{a}.residual_out")
            q = h + norm(inner, f"{a}.residual_layernorm_output")
        q, k, v = (t.unflatten(-1, (HEADS, head)).transpose(1, 2) for t in (q, k, v))
        scores = (q @ k.mT * scale).masked_fill(torch.ones(idx.size(1), idx.size(1)).triu(1).bool(), -math.inf)
        x = x + linear((scores.softmax(-1) @ v).transpose(1, 2).flatten(2), f"{a}.c_proj")
        h = norm(x, f"transformer.h.{n}.ln_2")
        x = x + linear(gelu_ref(linear(h, f"transformer.h.{n}.mlp.c_fc")), f"transformer.h.{n}.mlp.c_proj")
    return norm(x, "transformer.ln_f") @ w["lm_head.weight"].T


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_the_imported_model_has_the_foreign_logits(mode, bias, tiny_data):
    checkpoint = foreign(mode, bias, vocab_size=20)
    torch.save(checkpoint, "foreign.pt")
    assert import_checkpoint.main(["foreign.pt", "out/x", "--dataset=tiny", "--device=cpu"]) == 0
    model, _ = sample.load_model("out/x", "cpu")
    idx = torch.randint(20, (2, BLOCK), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(model.double()(idx)[0], forward(checkpoint, idx), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("objective", ["next", "masked"])
def test_an_imported_run_samples_evaluates_and_trains(objective, tiny_data, capsys):
    torch.save(foreign("residual_gelu", False, vocab_size=20), "foreign.pt")
    settings = ["--max_iters=3", "--batch_size=2", "--gradient_accumulation_steps=1", "--eval_tokens=200"]
    settings += ["--learning_rate=1e-2", "--warmup_iters=0", "--device=cpu", "--log_interval=1"]
    assert import_checkpoint.main(["foreign.pt", "out/x", "--dataset=tiny", f"--objective={objective}", *settings]) == 0
    decodes, told = ["--num_samples=1", "--max_new_tokens=5"], {"next": "val", "masked": "masked-token"}
    assert sample.main(["out/x", "--device=cpu", *(decodes if objective == "next" else ["--prompt=1_"])]) == 0
    assert train.main(["out/x/config.py", "--resume", "--eval_only"]) == 0
    assert f"step 0/3 {told[objective]} loss" in capsys.readouterr().out
    before = RunFolder("out/x").load("ckpt.pt")["model"]
    assert train.main(["out/x/config.py", "--resume"]) == 0
    after = RunFolder("out/x").load("ckpt.pt")
    assert after["state"]["step"] == 3
    assert not torch.equal(before["blocks.0.attn.query.w_1.weight"], after["model"]["blocks.0.attn.query.w_1.weight"])


def test_a_run_is_not_overwritten(tiny_data, whole_run):
    torch.save(foreign("original", False, vocab_size=20), "foreign.pt")
    before = files(whole_run)
    with pytest.raises(UserError, match="out/tiny holds a run"):
        import_checkpoint.main(["foreign.pt", whole_run, "--dataset=tiny", "--device=cpu"])
    assert files(whole_run) == before


def test_a_checkpoint_is_not_overwritten_by_its_import(tiny_data):
    Path("theirs").mkdir()
    torch.save(foreign("original", False, vocab_size=20), "theirs/ckpt.pt")
    before = files("theirs")
    with pytest.raises(UserError, match="theirs holds a run or a checkpoint"):
        import_checkpoint.main(["theirs/ckpt.pt", "theirs", "--dataset=tiny", "--device=cpu"])
    assert files("theirs") == before


@pytest.mark.parametrize("vocab_size", [17, 18 + 128])  # the data need 18; so much is no padding
def test_a_vocabulary_of_other_data_is_refused(vocab_size, tiny_data):
    torch.save(foreign("original", False, vocab_size=vocab_size), "foreign.pt")
    with pytest.raises(UserError, match=f"vocab_size={vocab_size} is not that of tiny, 18"):
        import_checkpoint.main(["foreign.pt", "out/x", "--dataset=tiny", "--device=cpu"])
    assert not Path("out").exists()


def test_an_untied_head_and_old_masks_are_understood(tiny_data):
    checkpoint = foreign("identity", False, vocab_size=20, tie_weights=False)
    checkpoint["model"]["lm_head.weight"] = torch.randn(20, D)
    checkpoint["model"]["transformer.h.0.attn.bias"] = torch.ones(1, 1, BLOCK, BLOCK)
    model = import_checkpoint.translate(checkpoint)
    assert torch.equal(model.lm_head.weight, checkpoint["model"]["lm_head.weight"])


@pytest.mark.parametrize(
    "mode, change, words",
    [
        ("original", lambda c: c.pop("model_args"), "lacks model or model_args"),
        ("original", lambda c: c["model_args"].update(query_mode="swish"), "query_mode='swish'"),
        ("original", lambda c: c["model_args"].update(rope=True), "rope"),
        ("original", lambda c: c["model_args"].pop("n_layer"), "n_layer"),
        ("original", lambda c: c["model_args"].update(n_layer=3), "transformer.h.2.ln_1.weight is missing"),
        ("original", lambda c: c["model_args"].update(n_layer=1), "transformer.h.1"),
        ("original", lambda c: c["model_args"].update(n_embd=25), "n_embd=25"),
        ("original", lambda c: c["model_args"].update(scale=0.1), "scale=0.1"),
        ("residual", lambda c: c["model_args"].pop("scale"), "scale=None"),
        ("residual_gelu", lambda c: c["model_args"].update(scale=1.0), "scale=1.0"),
        ("identity", lambda c: c["model"].update(extra=torch.ones(2)), "the tensor extra is not understood"),
        ("identity", lambda c: c["model"].update({"transformer.wpe.weight": "text"}), "wpe.weight is missing"),
        ("identity", lambda c: c["model"].pop("transformer.ln_f.weight"), "transformer.ln_f.weight is missing"),
        ("identity", lambda c: c["model"].update({"transformer.ln_f.weight": torch.ones(3)}), "(3,), not (24,)"),
        ("identity", lambda c: c["model"].update({"lm_head.weight": torch.ones(20, D)}), "lm_head.weight differs"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(mode, change, words, tiny_data):
    checkpoint = foreign(mode, False, vocab_size=20)
    change(checkpoint)
    torch.save(checkpoint, "foreign.pt")
    with pytest.raises(UserError) as e:
        import_checkpoint.main(["foreign.pt", "out/x", "--dataset=tiny", "--device=cpu"])
    assert words in str(e.value) and str(e.value).startswith("foreign.pt: ") and "\n" not in str(e.value)
    assert not Path("out").exists()
