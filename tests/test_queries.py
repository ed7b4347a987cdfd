"""study/queries.py: each candidate's formula in float64, causal attention included, its parameters and its start."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import sample
from conftest import run
from model import GPT, GPTConfig
from study.queries import CANDIDATES, register
from utils.tokenizers import load_tokenizer

D, H = 24, 3
CONFIG = GPTConfig(block_size=8, vocab_size=11, n_layer=1, n_head=H, n_embd=D, query_mode="identity")
MODES = list(CANDIDATES)


@pytest.fixture(autouse=True)
def registered():
    register()


def attention(mode, random=True, **settings):
    """The attention layer of a candidate in float64, as it starts or with all parameters random."""
    layer = GPT(replace(CONFIG, query_mode=mode, **settings)).double().blocks[0].attn
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters() if random else ():
        parameter.data.normal_(0.3, 0.5, generator=generator)
    return layer


@pytest.fixture
def x():
    return torch.randn(2, 8, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# The formulas, with numpy. w is {name of the query's parameter: its values}; a linear layer's weight is transposed.


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def gelu(z):
    return z * 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))


def rms(z):
    return z / np.sqrt((z**2).mean(-1, keepdims=True) + 1e-5)


def per_head(z):
    return np.concatenate([rms(part) for part in np.split(z, H, -1)], -1)


def gained(z, gains):
    return np.concatenate([g * part for g, part in zip(gains, np.split(z, H, -1))], -1)


def f(x, w, of=""):
    z = gelu(rms(x) * w[f"{of}rms_norm.weight"] @ w[f"{of}w_1.weight"].T) @ w[f"{of}w_2.weight"].T
    z = z - z.mean(-1, keepdims=True)
    return z / np.sqrt((z**2).mean(-1, keepdims=True) + 1e-5) * w[f"{of}layer_norm.weight"]


FORMULAS = {
    "linear_matched": lambda x, w: x @ w["w_q.weight"].T,
    "linear_anchored": lambda x, w: x / 2 + x @ w["w.weight"].T,
    "nonlinear_zero": lambda x, w: (x + f(x, w)) / 2,
    "gated": lambda x, w: x * sigmoid(x @ w["w.weight"].T),
    "temperature": lambda x, w: gained_by_token(x, x @ w["w.weight"].T + w["w.bias"]),
    "swiglu": lambda x, w: x / 2 + swiglu(x, w) @ w["c.weight"].T,
    "nonlinear_per_head": lambda x, w: per_head(x) + gained(per_head(f(x, w, "nonlinear.")), w["gains.weight"]),
    "linear_per_head": lambda x, w: per_head(x) + gained(per_head(x @ w["w.weight"].T), w["gains.weight"]),
    "linear_qk_gain": lambda x, w: gained(per_head(x @ w["inner.w_q.weight"].T), w["gains.weight"]),
    "identity_qk_gain": lambda x, w: gained(per_head(x / 2), w["gains.weight"]),
    "nonlinear_qk_gain": lambda x, w: gained(per_head((x + f(x, w, "inner.")) / 2), w["gains.weight"]),
    "identity_gated": lambda x, w: x / 2,
    "nonlinear_key": lambda x, w: x @ w["w_q.weight"].T,
    "nonlinear_value": lambda x, w: x @ w["w_q.weight"].T,
    "linear_matched_value": lambda x, w: x @ w["w_q.weight"].T,
}


def gained_by_token(x, z):
    temperature = np.log1p(np.exp(z + math.log(math.expm1(0.5))))  # softplus, 1/2 at z = 0
    return np.concatenate([temperature[..., h, None] * part for h, part in enumerate(np.split(x, H, -1))], -1)


def swiglu(x, w):
    gate = x @ w["b.weight"].T
    return x @ w["a.weight"].T * gate * sigmoid(gate)


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_each_candidate_computes_its_formula(mode, x):
    """The query; then what attention makes of it: keys, values and a gate by the formulas, and the softmax by hand."""
    layer, z = attention(mode), x.numpy()
    w, q = {name: parameter.numpy() for name, parameter in layer.named_parameters()}, layer.query(x).numpy()
    of_query = {name.removeprefix("query."): value for name, value in w.items()}
    np.testing.assert_allclose(q, FORMULAS[mode](z, of_query), rtol=0, atol=1e-12)
    if mode in ("nonlinear_key", "nonlinear_value"):
        linear, residual = z @ w["key_value.linear.weight"].T, (z + f(z, w, "key_value.nonlinear.")) / 2
        k, v = (residual, linear) if mode == "nonlinear_key" else (linear, residual)
    elif mode == "linear_matched_value":
        k, v = z @ w["key_value.key.weight"].T, z @ w["key_value.value.weight"].T
    else:
        k, v = np.split(z @ w["key_value.weight"].T, 2, -1)
    if mode.endswith(("per_head", "qk_gain")):
        k = per_head(k)
    y = []
    for q_h, k_h, v_h in zip(*(np.split(t, H, -1) for t in (q, k, v))):
        scores = q_h @ k_h.swapaxes(-1, -2) / math.sqrt(D // H)
        scores[:, np.triu(np.ones((8, 8), bool), 1)] = -np.inf
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        y.append(weights / weights.sum(-1, keepdims=True) @ v_h)
    y = np.concatenate(y, -1)
    if mode == "identity_gated":
        y = y * sigmoid(z @ w["gate.weight"].T)
    # As a Block calls it, with a cache or None.
    np.testing.assert_allclose(layer(x, None).numpy(), y @ w["c_proj.weight"].T, rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_no_candidate_ignores_dropout_and_qk_norm(mode, x):
    layer = attention(mode, dropout=0.5)
    assert not torch.equal(layer(x), layer(x))
    _, k, _ = attention(mode, qk_norm=True).heads(x)
    torch.testing.assert_close(k.square().mean(-1), torch.ones_like(k[..., 0]), rtol=0, atol=1e-2)


IDENTITY_AT_FIRST = {"linear_anchored", "nonlinear_zero", "gated", "temperature", "swiglu", "identity_gated"}


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_which_start_as_the_identity_query(mode, x):
    same = torch.allclose(attention(mode, random=False).query(x), x / 2, rtol=0, atol=1e-14)
    assert same == (mode in IDENTITY_AT_FIRST)


# More than linear: d² of W_Q + ...
MORE_THAN_LINEAR = {"linear_matched": 0, "linear_anchored": 0, "nonlinear_zero": 2 * D, "gated": 0, "swiglu": 0}
MORE_THAN_LINEAR |= {"temperature": (D + 1) * H - D**2, "nonlinear_per_head": 2 * D + H, "linear_qk_gain": H}
MORE_THAN_LINEAR |= {"identity_qk_gain": H - D**2, "nonlinear_qk_gain": 2 * D + H, "identity_gated": 0}
MORE_THAN_LINEAR |= {"nonlinear_key": 2 * D, "nonlinear_value": 2 * D, "linear_per_head": H, "linear_matched_value": 0}


@pytest.mark.parametrize("mode", MODES)
def test_parameters_beyond_those_of_linear(mode):
    count = lambda mode: sum(p.numel() for p in attention(mode).parameters())  # noqa: E731
    assert count(mode) - count("linear") == MORE_THAN_LINEAR[mode]


def test_which_start_as_large_as_the_nonlinear_one():
    x = torch.nn.functional.layer_norm(torch.randn(32, 256, generator=torch.Generator().manual_seed(0)), (256,))
    usual, large = 0.02 * 16, 0.5**0.5
    for mode, sizes in {  # of query, key and value
        "linear": (usual, usual, usual),
        "linear_matched": (large, usual, usual),
        "nonlinear": (large, usual, usual),
        "nonlinear_key": (usual, large, usual),
        "nonlinear_value": (large, usual, large),
        "linear_matched_value": (large, usual, large),
    }.items():
        layer = GPT(replace(CONFIG, n_embd=256, n_head=2, query_mode=mode)).blocks[0].attn
        found = [part.std().item() for part in (layer.query(x), *layer.key_value(x).chunk(2, -1))]
        assert found == pytest.approx(sizes, rel=0.03)


def test_a_run_of_a_candidate_is_sampled_by_its_own_program(tiny_config):
    """sample.py alone lacks them, and says what to type."""
    assert run("study/queries.py", tiny_config, "--query_mode=nonlinear_per_head").returncode == 0
    greedy = ("--num_samples=1", "--temperature=0", "--max_new_tokens=20", "--device=cpu", "--dtype=float32")
    printed = run("study/queries.py", "sample", "out/tiny", "--prompt=7 plus ", *greedy).stdout
    model, spec = sample.load_model("out/tiny", "cpu")
    tokenizer = load_tokenizer(spec)
    idx = model.generate(torch.tensor([tokenizer.encode(b"7 plus ").tolist()]), 20, temperature=0)
    assert printed == tokenizer.decode(idx[0].tolist()).decode() + "\n"
    alone = run("sample.py", "out/tiny")
    assert alone.returncode == 1 and "type: python -m study.queries sample out/tiny\n" in alone.stderr
