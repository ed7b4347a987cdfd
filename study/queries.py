"""Queries that the studies compare beside model.py's three: python -m study.queries CONFIG ... is train.py with them, and
python -m study.queries sample RUN ... is sample.py.

Each comes through the door that model.py offers: a class in QUERIES. x (B, T, d) is the attention layer's input after ln_1,
q (B, T, d); N is an RMSNorm of each head without gains. A gain per channel on q, or per head without a norm, could be
absorbed by W_K; only a factor that depends on the token adds something.
"""

import sys
from dataclasses import replace

import torch
import torch.nn as nn
import torch.nn.functional as F

import sample
import train
from model import QUERIES, Attention, IdentityQuery, LinearQuery, NonlinearQuery
from utils.settings import run_program


def linear(d_in, d_out, std, bias=False):
    """A linear layer whose weights start normally distributed with this standard deviation."""
    layer = nn.Linear(d_in, d_out, bias=bias)
    layer.init_std = std
    return layer


def nonlinear(config):
    """The paper's query, with r = d/2, for a config of any query mode."""
    return NonlinearQuery(replace(config, query_mode="nonlinear"))


def per_head(x, n_head):
    """N(x): x (..., d) with each head's part normalised to a mean square of 1."""
    heads = x.unflatten(-1, (n_head, -1))
    return F.rms_norm(heads, heads.shape[-1:], eps=1e-5).flatten(-2)


class HeadGains(nn.Module):
    """x (..., d) -> x with each head's part times a learned number, 1 at the start."""

    init_gain = 1.0

    def __init__(self, n_head):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n_head))

    def forward(self, x):
        return (x.unflatten(-1, (len(self.weight), -1)) * self.weight[:, None]).flatten(-2)


# Other starts of the paper's three.


class MatchedLinearQuery(LinearQuery):
    """q = x W_Q, but as large at the start as the nonlinear one: x and f(x) have variance 1, so their mean has 1/2."""

    def __init__(self, config):
        super().__init__(config)
        self.w_q.init_std = (2 * config.n_embd) ** -0.5


class AnchoredLinearQuery(nn.Module):
    """q = x/2 + x W, W = 0 at the start: linear, so what it gains over linear is not the nonlinearity's."""

    def __init__(self, config):
        super().__init__()
        self.w = linear(config.n_embd, config.n_embd, 0.0)

    def forward(self, x):
        return 0.5 * x + self.w(x)


class ZeroNonlinearQuery(NonlinearQuery):
    """The paper's query with the gain of its last LayerNorm 0 at the start, where q = x/2."""

    def __init__(self, config):
        super().__init__(replace(config, query_mode="nonlinear"))
        self.layer_norm.init_gain = 0.0


# Other functions of x.


class GatedQuery(nn.Module):
    """q = x sigmoid(x W), W = 0 at the start, where q = x/2; d² parameters."""

    def __init__(self, config):
        super().__init__()
        self.w = linear(config.n_embd, config.n_embd, 0.0)

    def forward(self, x):
        return x * self.w(x).sigmoid()


class TemperatureQuery(nn.Module):
    """q = x softplus(x w + b) in each head: an inverse temperature that depends on the token; (d + 1) n_head parameters. At the
    start q = x/2. Selective self-attention (arXiv:2411.12892) scales queries so too, but keeps W_Q, and has more terms."""

    def __init__(self, config):
        super().__init__()
        self.n_head, self.w = config.n_head, linear(config.n_embd, config.n_head, 0.0, bias=True)

    def forward(self, x):
        temperature = F.softplus(self.w(x) - 0.43275212956718856)  # softplus of this number is 1/2
        return (x.unflatten(-1, (self.n_head, -1)) * temperature.unsqueeze(-1)).flatten(-2)


class SwiGLUQuery(nn.Module):
    """q = x/2 + (x A * SiLU(x B)) C with r = d // 3, C = 0 at the start, where q = x/2; 3dr parameters, d² up to rounding."""

    def __init__(self, config):
        super().__init__()
        d, r = config.n_embd, config.n_embd // 3
        self.a, self.b, self.c = linear(d, r, 0.02), linear(d, r, 0.02), linear(r, d, 0.0)

    def forward(self, x):
        return 0.5 * x + self.c(self.a(x) * F.silu(self.b(x)))


# Normalised per head: the keys, and the query too.


class KeyNormAttention(Attention):
    """Attention with k normalised per head."""

    def heads(self, x):
        q, k, v = super().heads(x)
        return q, F.rms_norm(k, (self.head_size,), eps=1e-5), v


class PerHeadNonlinearQuery(nn.Module):
    """q = N(x) + g N(f(x)), with a gain g for each head, and k normalised per head."""

    attention = KeyNormAttention

    def __init__(self, config):
        super().__init__()
        self.n_head, self.nonlinear, self.gains = config.n_head, nonlinear(config), HeadGains(config.n_head)

    def forward(self, x):
        return per_head(x, self.n_head) + self.gains(per_head(self.nonlinear.f(x), self.n_head))


class PerHeadLinearQuery(nn.Module):
    """q = N(x) + g N(x W), and k normalised per head: the one above with x W in place of f."""

    attention = KeyNormAttention

    def __init__(self, config):
        super().__init__()
        self.n_head, self.gains = config.n_head, HeadGains(config.n_head)
        self.w = linear(config.n_embd, config.n_embd, 0.02)

    def forward(self, x):
        return per_head(x, self.n_head) + self.gains(per_head(self.w(x), self.n_head))


def qk_normed(make):
    """The class of q = g N(q') of another query q', with a gain g for each head, and k normalised per head: QK-norm with
    gains."""

    class QKNormQuery(nn.Module):
        attention = KeyNormAttention

        def __init__(self, config):
            super().__init__()
            self.n_head, self.inner, self.gains = config.n_head, make(config), HeadGains(config.n_head)

        def forward(self, x):
            return self.gains(per_head(self.inner(x), self.n_head))

    return QKNormQuery


# The d² parameters elsewhere: are they better spent on something else than the query?


class GatedAttention(Attention):
    """Attention whose output is gated before the output projection: y sigmoid(x W); d² parameters. Gated attention
    (arXiv:2505.06708) is this beside W_Q."""

    def __init__(self, config):
        super().__init__(config)
        self.gate = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cache=None):
        q, k, v = self.heads(x)
        if cache is not None:
            k, v = cache.append(k, v)
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=self.causal and q.size(2) > 1)
        y = y.transpose(1, 2).flatten(2) * self.gate(x).sigmoid()  # (B, T, d)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class IdentityGatedQuery(IdentityQuery):
    """The identity query, and the d² of W_Q in a gate after attention."""

    attention = GatedAttention


class NonlinearKey(nn.Module):
    """x (B, T, d) -> key and value side by side (B, T, 2d): the key (x + f(x)) / 2, the value linear."""

    def __init__(self, config):
        super().__init__()
        self.linear, self.nonlinear = nn.Linear(config.n_embd, config.n_embd, bias=config.bias), nonlinear(config)

    def forward(self, x):
        return torch.cat((self.nonlinear(x), self.linear(x)), dim=-1)


class NonlinearValue(NonlinearKey):
    """The same with a linear key and the value (x + f(x)) / 2."""

    def forward(self, x):
        return torch.cat((self.linear(x), self.nonlinear(x)), dim=-1)


class MatchedValue(nn.Module):
    """The same with both linear, and the value as large at the start as the nonlinear one."""

    def __init__(self, config):
        super().__init__()
        d = config.n_embd
        self.key, self.value = linear(d, d, 0.02), linear(d, d, (2 * d) ** -0.5)

    def forward(self, x):
        return torch.cat((self.key(x), self.value(x)), dim=-1)


def attention_with(make):
    """The class of attention whose key and value come from another module."""

    class KeyValueAttention(Attention):
        def __init__(self, config):
            super().__init__(config)
            self.key_value = make(config)

    return KeyValueAttention


class LinearNonlinearKeyQuery(LinearQuery):
    attention = attention_with(NonlinearKey)


class LinearNonlinearValueQuery(MatchedLinearQuery):  # so that its logits start as large as with a nonlinear key
    attention = attention_with(NonlinearValue)


class MatchedQueryAndValue(MatchedLinearQuery):
    attention = attention_with(MatchedValue)


CANDIDATES = {
    "linear_matched": MatchedLinearQuery,
    "linear_anchored": AnchoredLinearQuery,
    "nonlinear_zero": ZeroNonlinearQuery,
    "gated": GatedQuery,
    "temperature": TemperatureQuery,
    "swiglu": SwiGLUQuery,
    "nonlinear_per_head": PerHeadNonlinearQuery,
    "linear_per_head": PerHeadLinearQuery,
    "linear_qk_gain": qk_normed(LinearQuery),
    "identity_qk_gain": qk_normed(IdentityQuery),
    "nonlinear_qk_gain": qk_normed(nonlinear),
    "identity_gated": IdentityGatedQuery,
    "nonlinear_key": LinearNonlinearKeyQuery,
    "nonlinear_value": LinearNonlinearValueQuery,
    "linear_matched_value": MatchedQueryAndValue,
}


def register():
    """Add them to model.py's; a query of that name there is a fork's own, and wins."""
    for name, query in CANDIDATES.items():
        QUERIES.setdefault(name, query)


def main():
    register()
    if sys.argv[1:2] == ["sample"]:
        return sample.main(sys.argv[2:])
    return train.main(program=("-m", "study.queries"))


if __name__ == "__main__":
    run_program(main)
