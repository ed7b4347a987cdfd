"""model.py against formulas, properties and an independent forward pass in float64."""

import math
import os
import shutil
from dataclasses import asdict

import pytest
import torch

from model import GPT, QUERIES, GPTConfig
from utils.generation import generate, new_cache, sample_token

DEVICE = os.environ.get("TEST_DEVICE", "cpu")  # TEST_DEVICE=cuda tests the models on a GPU
MODES = ["linear", "identity", "nonlinear"]
SMALL = {"block_size": 16, "vocab_size": 50, "n_layer": 3, "n_head": 4, "n_embd": 32}


def small(seed=1, scale=5.0, **overrides):
    """A float64 model whose weights are so large that no part of it can be missing unnoticed."""
    model = GPT(GPTConfig(**{**SMALL, **overrides}), seed=seed).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 2:
                p.mul_(scale)
            else:  # gains away from 1, biases away from 0
                p.add_(0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
    return model.to(DEVICE)


def tokens(*shape, seed=0, vocab_size=50):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, shape, generator=generator).to(DEVICE)


# An independent forward pass: nothing but matrix products, means, exponentials and erf.


def norm_ref(x, gain, bias=0.0, centre=True):
    if centre:
        x = x - x.mean(-1, keepdim=True)
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt() * gain + bias


def gelu_ref(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def query_ref(x, w, at, mode, activation="gelu"):
    bias = lambda name: w.get(f"{at}{name}.bias", 0.0)  # noqa: E731
    if mode == "linear":
        return x @ w[f"{at}w_q.weight"].T + bias("w_q")
    if mode == "identity":
        return x / 2
    h = norm_ref(x, w[f"{at}rms_norm.weight"], centre=False)
    h = h @ w[f"{at}w_1.weight"].T + bias("w_1")
    h = gelu_ref(h) if activation == "gelu" else h
    h = h @ w[f"{at}w_2.weight"].T + bias("w_2")
    return (x + norm_ref(h, w[f"{at}layer_norm.weight"], bias("layer_norm"))) / 2


def forward_ref(w, idx, c):
    bias = lambda name: w.get(name, 0.0)  # noqa: E731
    T, hs = idx.shape[1], c.n_embd // c.n_head
    x = w["wte.weight"][idx] + w["wpe.weight"][:T]
    for i in range(c.n_layer):
        at = f"blocks.{i}."
        h = norm_ref(x, w[at + "ln_1.weight"], bias(at + "ln_1.bias"))
        q = query_ref(h, w, at + "attn.query.", c.query_mode, c.query_activation)
        w_k, w_v = w[at + "attn.key_value.weight"].chunk(2)
        b_k, b_v = w[at + "attn.key_value.bias"].chunk(2) if c.bias else (0.0, 0.0)
        k, v = h @ w_k.T + b_k, h @ w_v.T + b_v
        heads = []
        for n in range(c.n_head):
            qn, kn, vn = (t[..., n * hs : (n + 1) * hs] for t in (q, k, v))
            if c.qk_norm:
                qn, kn = (norm_ref(t, 1.0, centre=False) for t in (qn, kn))
            weights = (qn @ kn.transpose(1, 2) / math.sqrt(hs)).exp()
            if c.causal:
                weights = weights * torch.ones(T, T, dtype=x.dtype, device=x.device).tril()
            heads.append(weights / weights.sum(-1, keepdim=True) @ vn)
        y = torch.cat(heads, -1) @ w[at + "attn.c_proj.weight"].T
        x = x + y + bias(at + "attn.c_proj.bias")
        h = norm_ref(x, w[at + "ln_2.weight"], bias(at + "ln_2.bias"))
        h = gelu_ref(h @ w[at + "mlp.c_fc.weight"].T + bias(at + "mlp.c_fc.bias"))
        x = x + h @ w[at + "mlp.c_proj.weight"].T + bias(at + "mlp.c_proj.bias")
    x = norm_ref(x, w["ln_f.weight"], bias("ln_f.bias"))
    return x @ w["lm_head.weight"].T


VARIANTS = [
    *({"query_mode": mode} for mode in MODES),
    *({"query_mode": mode, "bias": True, "qk_norm": True, "tie_weights": False} for mode in MODES),
    *({"query_mode": mode, "causal": False} for mode in MODES),
    *({"query_activation": "none", "bias": bias} for bias in (False, True)),
    {"query_rank": 5, "mlp_hidden": 40},
]


@pytest.mark.parametrize("overrides", VARIANTS, ids=str)
def test_logits_loss_and_gradients_equal_an_independent_forward_pass(overrides):
    model = small(**overrides)
    idx, targets = tokens(2, 16), tokens(2, 16, seed=1)
    targets[0, :5] = -1  # left out of the loss
    assert GPTConfig(**asdict(model.config)) == model.config  # it survives being stored
    logits, loss = model(idx), model(idx, targets)
    loss.backward()

    w = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    w.setdefault("lm_head.weight", w["wte.weight"])
    expected = forward_ref(w, idx, model.config)
    nats = expected.logsumexp(-1) - expected.gather(2, targets.clamp(min=0)[..., None])[..., 0]
    expected_loss = nats[targets >= 0].mean()
    expected_loss.backward()

    torch.testing.assert_close(logits, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-10, atol=1e-10)
    for name, p in model.named_parameters():
        message = lambda m, n=name: f"{n}: {m}"  # noqa: E731
        torch.testing.assert_close(p.grad, w[name].grad, rtol=1e-8, atol=1e-10, msg=message)


NEEDS_GXX = pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler")
MACHINE_CODE = [pytest.mark.slow, NEEDS_GXX]


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=MACHINE_CODE)])
@pytest.mark.parametrize("mode", MODES)
def test_a_compiled_step_has_the_gradients_of_an_eager_one(mode, backend):
    """By default without inductor's machine code, which needs a C++ compiler and time."""
    idx, targets, gradients = tokens(2, 16), tokens(2, 16, seed=1), []
    torch._dynamo.reset()
    for compiled in (False, True):
        model = small(query_mode=mode, n_layer=2).train()
        if compiled:
            model.compile(fullgraph=True, backend=backend)
        model(idx, targets).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    for name, eager in gradients[0].items():
        assert eager.abs().max() > 0, name
        torch.testing.assert_close(gradients[1][name], eager, rtol=1e-9, atol=1e-12)


def test_f_is_as_large_as_its_input_at_initialisation():
    """x leaves a LayerNorm, and f ends in one, so both have mean square 1."""
    query = GPT(GPTConfig(**{**SMALL, "n_embd": 256})).blocks[0].attn.query
    x = torch.nn.functional.layer_norm(torch.randn(1000, 256), (256,))
    assert abs(query.f(x).pow(2).mean().item() - 1) < 0.05


# Sizes, initialisation, configuration.


@pytest.mark.parametrize(
    "overrides, total, non_embedding, query_path",
    [
        ({"query_mode": "linear"}, 124_373_760, 84_953_856, 12 * 768**2),
        ({"query_mode": "identity"}, 117_295_872, 77_875_968, 0),
        ({"query_mode": "nonlinear"}, 124_392_192, 84_972_288, 12 * (768**2 + 2 * 768)),
        ({"query_mode": "linear", "mlp_hidden": 3648}, 134_990_592, 95_570_688, 12 * 768**2),
        ({"query_mode": "identity", "mlp_hidden": 3456}, 124_373_760, 84_953_856, 0),
        ({"query_activation": "none"}, 124_392_192, 84_972_288, 12 * (768**2 + 2 * 768)),
        ({"tie_weights": False}, 163_025_664, 84_972_288, 12 * (768**2 + 2 * 768)),
    ],
)
def test_parameter_counts_of_the_papers_arms(overrides, total, non_embedding, query_path):
    with torch.device("meta"):
        model = GPT(GPTConfig(**overrides))
    expected = {"total": total, "non_embedding": non_embedding, "query_path": query_path}
    assert model.parameter_report() == expected


def test_weights_that_arms_share_are_bit_identical():
    arms = [{"query_mode": mode} for mode in MODES]
    arms += [{"tie_weights": False}, {"query_activation": "none"}]
    states = []
    for overrides in arms:
        torch.manual_seed(len(states))  # the global random numbers must not matter
        states.append(GPT(GPTConfig(**SMALL, **overrides), seed=7).state_dict())
    for state in states[1:]:
        shared = {name for name in states[0].keys() & state.keys() if name != "lm_head.weight"}
        assert len(shared) >= 3 + 6 * SMALL["n_layer"]
        assert all(torch.equal(states[0][name], state[name]) for name in shared)


def test_every_weight_depends_on_the_seed_and_on_its_name():
    a, b = (dict(GPT(GPTConfig(**SMALL), seed=seed).named_parameters()) for seed in (1, 2))
    matrices = [name for name in a if a[name].dim() == 2]
    assert not any(torch.equal(a[name], b[name]) for name in matrices)
    same_shape = [name for name in matrices if name.endswith("c_fc.weight")]
    assert len({a[name].sum().item() for name in same_shape}) == len(same_shape) == 3


def test_initialisation_has_gpt2s_sizes():
    shape = {"block_size": 256, "vocab_size": 500, "n_layer": 8, "n_head": 4, "n_embd": 128}
    model = GPT(GPTConfig(**shape, bias=True))
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            assert not p.any(), name
        elif p.dim() == 1:
            assert (p == 1).all(), name
        else:
            std = 0.02 / math.sqrt(2 * 8) if "c_proj" in name else 0.02
            assert abs(p.std().item() / std - 1) < 0.05 and abs(p.mean().item()) < std / 20, name


def test_other_parameters_stay_as_their_module_made_them(monkeypatch):
    class WithTemperature(QUERIES["linear"]):
        def __init__(self, config):
            super().__init__(config)
            self.temperature = torch.nn.Parameter(torch.full((2, 2), 7.0))

    plain = GPT(GPTConfig(**SMALL, query_mode="linear")).state_dict()
    monkeypatch.setitem(QUERIES, "linear", WithTemperature)
    model = GPT(GPTConfig(**SMALL, query_mode="linear"))
    assert (model.blocks[2].attn.query.temperature == 7).all()
    assert all(torch.equal(model.state_dict()[name], weight) for name, weight in plain.items())


@pytest.mark.parametrize(
    "overrides, words",
    [
        ({"n_embd": 30}, "n_embd=30 .*n_head=4"),
        ({"query_mode": "quadratic"}, "quadratic.* linear, identity, nonlinear"),
        ({"query_mode": "linear", "query_rank": 8}, "query_rank .*linear"),
        ({"query_mode": "identity", "query_activation": "none"}, "query_activation .*identity"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(overrides, words):
    with pytest.raises(ValueError, match=words):
        GPTConfig(**{**SMALL, **overrides})


# Causality and the cache.


@pytest.mark.parametrize("mode", QUERIES)  # those of a fork, too
@pytest.mark.parametrize("causal", [True, False])
def test_a_changed_token_changes_no_earlier_output_unless_bidirectional(mode, causal):
    model = small(query_mode=mode, causal=causal)
    idx = tokens(1, 16)
    before = model(idx)
    for t in range(1, 16):
        changed = idx.clone()
        changed[0, t] = (idx[0, t] + 1) % 50
        differs = (model(changed) != before).any(-1)[0]
        assert differs[t:].all()
        assert differs[:t].any() == (not causal)


@pytest.mark.parametrize("mode", QUERIES)  # those of a fork, too
@pytest.mark.parametrize("qk_norm", [False, True])
def test_cached_equals_uncached(mode, qk_norm):
    model = small(query_mode=mode, qk_norm=qk_norm)
    idx = tokens(2, 16)
    full = model(idx)
    for primed in (1, 5, 15):
        cache = new_cache(model)
        steps = [model(idx[:, :primed], cache=cache)]
        steps += [model(idx[:, t : t + 1], cache=cache) for t in range(primed, 16)]
        steps = torch.cat(steps, 1)
        torch.testing.assert_close(steps, full[:, primed - 1 :], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_greedy_generation_equals_the_uncached_loop_past_block_size(mode):
    model = small(query_mode=mode, tie_weights=False)
    idx = prompt = tokens(2, 3)
    window = idx  # what the model sees; cut to its last half whenever it is full
    for _ in range(40):
        if window.size(1) > 16:
            window = window[:, -8:]
        new = model(window)[:, -1].argmax(-1, keepdim=True)
        idx, window = torch.cat([idx, new], 1), torch.cat([window, new], 1)
    assert torch.equal(generate(model, prompt, 40, temperature=0), idx)
    assert len(set(idx[0].tolist())) > 3  # not one token over and over


def test_what_does_not_fit_is_refused():
    model = small()
    with pytest.raises(ValueError, match="17 tokens .* block_size=16"):
        model(tokens(1, 17))
    with pytest.raises(ValueError, match="block_size=16"):
        generate(model, tokens(1, 17), 1)
    cache = new_cache(model)
    model(tokens(1, 4), cache=cache)
    with pytest.raises(ValueError, match="takes one new token, not 2"):
        model(tokens(1, 2), cache=cache)
    with pytest.raises(ValueError, match="causal=False"):
        generate(small(causal=False), tokens(1, 4), 1)


# Sampling and learning.


@pytest.mark.parametrize(
    "options, expected",
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"temperature": 0.5}, [0.01 / 0.3, 0.16 / 0.3, 0.04 / 0.3, 0.09 / 0.3]),
        ({"temperature": 0}, [0, 1, 0, 0]),
        ({"temperature": 1e-42}, [0, 1, 0, 0]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.5}, [0, 4 / 7, 0, 3 / 7]),  # 0.4 does not reach 0.5, 0.4 + 0.3 does
        ({"top_p": 0.39}, [0, 1, 0, 0]),
        ({"top_p": 1.0}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 3, "top_p": 0.75}, [0, 4 / 7, 0, 3 / 7]),  # of 4/9, 3/9, 2/9 the first two
    ],
)
def test_tokens_are_drawn_with_the_probabilities_asked_for(options, expected):
    options = {"temperature": 1.0, "top_k": None, "top_p": None, **options}
    logits, generator = torch.tensor([[0.1, 0.4, 0.2, 0.3]]).log(), torch.Generator().manual_seed(0)
    drawn = sample_token(logits.expand(20_000, -1), generator=generator, **options)
    found = torch.bincount(drawn[:, 0], minlength=4) / 20_000
    expected_tensor = torch.tensor(expected, dtype=torch.float32)
    torch.testing.assert_close(found, expected_tensor, rtol=0, atol=0.015)
    assert all((f > 0) == (e > 0) for f, e in zip(found, expected))


def test_generation_depends_on_its_own_generator_alone():
    model = small(scale=1.0)
    texts = []
    for seed, noise in ((1, 1), (1, 2), (2, 1)):
        torch.manual_seed(noise)
        generator = torch.Generator(DEVICE).manual_seed(seed)
        texts.append(generate(model, tokens(1, 4), 30, generator=generator))
    assert torch.equal(texts[0], texts[1]) and not torch.equal(texts[0], texts[2])


def test_dropout_acts_at_each_of_its_places_and_in_training_only():
    model, zeros = small(dropout=0.5), {}

    def share_of_zeros(name):
        def hook(module, inputs, *output):
            zeros[name] = (*inputs, *output)[-1].eq(0).double().mean().item()

        return hook

    block = model.blocks[0]
    block.ln_1.register_forward_pre_hook(share_of_zeros("embedding"))
    # A single token has a single attention weight, so dropout removes all of the output or nothing.
    block.attn.c_proj.register_forward_pre_hook(share_of_zeros("attention weights"))
    block.attn.register_forward_hook(lambda module, inputs, y: share_of_zeros("attention")(0, [y]))
    block.mlp.register_forward_hook(share_of_zeros("MLP"))
    for training, share in ((False, 0.0), (True, 0.5)):
        model.train(training)(tokens(500, 1))
        places = ("embedding", "attention weights", "attention", "MLP")
        assert zeros == dict.fromkeys(places, pytest.approx(share, abs=0.07))


@pytest.mark.parametrize("activation", ["gelu", "none"])
def test_the_nonlinear_query_cannot_be_absorbed(activation):
    """Only a linear map can be: f does not see how long x is; and with GELU q(-x) is not -q(x)."""
    torch.manual_seed(0)
    config = GPTConfig(n_embd=16, n_head=1, query_mode="nonlinear", query_activation=activation)
    distance = lambda a, b: (a - b).abs().max() / a.abs().max()  # noqa: E731
    query, x = QUERIES["nonlinear"](config).double(), torch.randn(5, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(query(2 * x), x + query.f(x) / 2, rtol=1e-3, atol=1e-3)
        assert distance(2 * query(x), query(2 * x)) > 0.1
        odd = distance(-query(x), query(-x))
    assert odd > 0.1 if activation == "gelu" else odd < 1e-12
