"""study/queries.py: each candidate against its formula in float64, and how it starts."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import printed, run
from model import GPT, GPTConfig
from study.queries import CANDIDATES, register

D, H = 24, 3
SHAPE = {"block_size": 8, "vocab_size": 11, "n_layer": 1, "n_head": H, "n_embd": D}
CONFIG = GPTConfig(query_mode="identity", **SHAPE)
MODES = list(CANDIDATES)


@pytest.fixture(autouse=True)
def registered():
    register()


def attention(mode, random=True, **settings):
    """The attention layer of a candidate in float64, as it starts or with random parameters."""
    layer = GPT(replace(CONFIG, query_mode=mode, **settings)).double().blocks[0].attn
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters() if random else ():
        parameter.data.normal_(0.3, 0.5, generator=generator)
    return layer


@pytest.fixture
def x():
    return torch.randn(2, 8, D, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


# The formulas, with numpy. w holds the query's parameters by name; weights are transposed.


def sigmoid(z):
    return 1 / (1 + np.exp(-z))


def rms(z):
    return z / np.sqrt((z**2).mean(-1, keepdims=True) + 1e-5)


def per_head(z):
    return np.concatenate([rms(part) for part in np.split(z, H, -1)], -1)


def gained(z, gains):
    return np.concatenate([g * part for g, part in zip(gains, np.split(z, H, -1))], -1)


def f(x, w, of=""):
    z = rms(x) * w[f"{of}rms_norm.weight"] @ w[f"{of}w_1.weight"].T
    z = z * 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))  # GELU
    z = z @ w[f"{of}w_2.weight"].T
    return rms(z - z.mean(-1, keepdims=True)) * w[f"{of}layer_norm.weight"]


def linear(x, w, of="w_q"):
    return x @ w[f"{of}.weight"].T


def temperature(x, w):
    z = linear(x, w, "w") + w["w.bias"]
    gains = np.log1p(np.exp(z + math.log(math.expm1(0.5))))  # softplus, 1/2 at z = 0
    return gained(x, gains.transpose(2, 0, 1)[..., None])


def swiglu(x, w):
    gate = linear(x, w, "b")
    return x / 2 + linear(linear(x, w, "a") * gate * sigmoid(gate), w, "c")


FORMULAS = {
    "linear_matched": linear,
    "linear_anchored": lambda x, w: x / 2 + linear(x, w, "w"),
    "nonlinear_zero": lambda x, w: (x + f(x, w)) / 2,
    "gated": lambda x, w: x * sigmoid(linear(x, w, "w")),
    "temperature": temperature,
    "swiglu": swiglu,
    "nonlinear_per_head": lambda x, w: per_head(x) + normed(f(x, w, "nonlinear."), w),
    "linear_per_head": lambda x, w: per_head(x) + normed(linear(x, w, "w"), w),
    "linear_qk_gain": lambda x, w: normed(linear(x, w, "inner.w_q"), w),
    "identity_qk_gain": lambda x, w: normed(x / 2, w),
    "nonlinear_qk_gain": lambda x, w: normed((x + f(x, w, "inner.")) / 2, w),
    "identity_gated": lambda x, w: x / 2,
    "nonlinear_key": linear,
    "nonlinear_value": linear,
    "linear_matched_value": linear,
}


def normed(z, w):
    return gained(per_head(z), w["gains.weight"])


@pytest.mark.parametrize("mode", MODES)
@torch.no_grad()
def test_each_candidate_computes_its_formula(mode, x):
    """The query, then the whole attention: keys, values and a gate by the formulas."""
    layer, z = attention(mode), x.numpy()
    w = {name: parameter.numpy() for name, parameter in layer.named_parameters()}
    q = layer.query(x).numpy()
    of_query = {name.removeprefix("query."): value for name, value in w.items()}
    np.testing.assert_allclose(q, FORMULAS[mode](z, of_query), rtol=0, atol=1e-12)
    if mode in ("nonlinear_key", "nonlinear_value"):
        straight = linear(z, w, "key_value.linear")
        residual = (z + f(z, w, "key_value.nonlinear.")) / 2
        k, v = (residual, straight) if mode == "nonlinear_key" else (straight, residual)
    elif mode == "linear_matched_value":
        k, v = linear(z, w, "key_value.key"), linear(z, w, "key_value.value")
    else:
        k, v = np.split(linear(z, w, "key_value"), 2, -1)
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
        y = y * sigmoid(linear(z, w, "gate"))
    # A Block calls it with a cache or None.
    np.testing.assert_allclose(layer(x, None).numpy(), linear(y, w, "c_proj"), rtol=0, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_no_candidate_ignores_dropout_and_qk_norm(mode, x):
    layer = attention(mode, dropout=0.5)
    assert not torch.equal(layer(x), layer(x))
    _, k, _ = attention(mode, qk_norm=True).heads(x)
    torch.testing.assert_close(k.square().mean(-1), torch.ones_like(k[..., 0]), rtol=0, atol=1e-2)


IDENTITY_AT_FIRST = {"linear_anchored", "nonlinear_zero", "gated", "temperature", "swiglu"}
IDENTITY_AT_FIRST |= {"identity_gated"}


@torch.no_grad()
def test_which_start_as_the_identity_query(x):
    for mode in MODES:
        same = torch.allclose(attention(mode, random=False).query(x), x / 2, rtol=0, atol=1e-14)
        assert same == (mode in IDENTITY_AT_FIRST), mode


def test_which_start_as_large_as_the_nonlinear_one():
    random = torch.randn(32, 256, generator=torch.Generator().manual_seed(0))
    x = torch.nn.functional.layer_norm(random, (256,))
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
        parts = (layer.query(x), *layer.key_value(x).chunk(2, -1))
        assert [part.std().item() for part in parts] == pytest.approx(sizes, rel=0.03)


def test_a_run_of_a_candidate_is_sampled_by_its_own_program(tiny_config, capsys):
    """sample.py does the same where the candidates are registered, as they are in these tests."""
    assert run("study/queries.py", tiny_config, "--query_mode=nonlinear_per_head").returncode == 0
    greedy = "out/tiny --num_samples=1 --temperature=0 --max_new_tokens=20 --device=cpu".split()
    text = run("study/queries.py", "sample", *greedy, "--prompt=7 plus ").stdout
    assert text == printed(capsys, *greedy, "--prompt=7 plus ") and len(text) > 20
