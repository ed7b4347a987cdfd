"""Candidate queries, which the studies compare with the three of model.py.

    python -m study.queries CONFIG ...       train.py with these queries
    python -m study.queries sample RUN ...   sample.py with these queries

x (B, T, d) is the attention layer's input after ln_1, q (B, T, d) the query, f the paper's f, and
N an RMSNorm of each head without gains. A fixed gain on a channel of q adds nothing, because W_K
can absorb it; a factor that depends on the token does.
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
    """A linear layer whose weights start with this standard deviation."""
    layer = nn.Linear(d_in, d_out, bias=bias)
    layer.init_std = std
    return layer


def nonlinear(config):
    """The paper's query with r = d/2, for a config of any query mode."""
    return NonlinearQuery(replace(config, query_mode="nonlinear"))


def per_head(x, n_head):
    """N(x): x (..., d) with each head's part scaled to a mean square of 1."""
    heads = x.unflatten(-1, (n_head, -1))
    return F.rms_norm(heads, heads.shape[-1:], eps=1e-5).flatten(-2)


class HeadGains(nn.Module):
    """x (..., d) -> x with each head's part times a learned gain, which starts at 1."""

    def __init__(self, n_head):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_head))

    def forward(self, x):
        heads = x.unflatten(-1, (len(self.weight), -1))
        return (heads * self.weight[:, None]).flatten(-2)


class MatchedLinearQuery(LinearQuery):
    """q = x W_Q, which starts with the variance of the nonlinear query, 1/2."""

    def __init__(self, config):
        super().__init__(config)
        self.w_q.init_std = (2 * config.n_embd) ** -0.5


class AnchoredLinearQuery(nn.Module):
    """q = x/2 + x W with W = 0 at the start: linear, but it starts where the identity query is."""

    def __init__(self, config):
        super().__init__()
        self.w = linear(config.n_embd, config.n_embd, 0.0)

    def forward(self, x):
        return 0.5 * x + self.w(x)


class ZeroNonlinearQuery(NonlinearQuery):
    """The paper's query with the gain of its LayerNorm 0 at the start, so that q starts at x/2."""

    def __init__(self, config):
        super().__init__(replace(config, query_mode="nonlinear"))
        nn.init.zeros_(self.layer_norm.weight)


class GatedQuery(nn.Module):
    """q = x sigmoid(x W) with W = 0 at the start, where q = x/2; d² parameters."""

    def __init__(self, config):
        super().__init__()
        self.w = linear(config.n_embd, config.n_embd, 0.0)

    def forward(self, x):
        return x * self.w(x).sigmoid()


class TemperatureQuery(nn.Module):
    """q = x softplus(x w + b) in each head: an inverse temperature that depends on the token.

    Selective self-attention (arXiv:2411.12892) does the same to x W_Q; here W_Q is gone.
    """

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.w = linear(config.n_embd, config.n_head, 0.0, bias=True)

    def forward(self, x):
        temperature = F.softplus(self.w(x) - 0.43275212956718856)  # 1/2 at the start
        heads = x.unflatten(-1, (self.n_head, -1))
        return (heads * temperature.unsqueeze(-1)).flatten(-2)


class SwiGLUQuery(nn.Module):
    """q = x/2 + (x A * SiLU(x B)) C with r = d // 3 and C = 0 at the start; 3dr parameters."""

    def __init__(self, config):
        super().__init__()
        d, r = config.n_embd, config.n_embd // 3
        self.a = linear(d, r, 0.02)
        self.b = linear(d, r, 0.02)
        self.c = linear(r, d, 0.0)

    def forward(self, x):
        return 0.5 * x + self.c(self.a(x) * F.silu(self.b(x)))


class KeyNormAttention(Attention):
    """Attention with keys N(k)."""

    def heads(self, x):
        q, k, v = super().heads(x)
        return q, F.rms_norm(k, (self.head_size,), eps=1e-5), v


class PerHeadNonlinearQuery(nn.Module):
    """q = N(x) + g N(f(x)) with a gain g for each head, and keys N(k)."""

    attention = KeyNormAttention

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.nonlinear = nonlinear(config)
        self.gains = HeadGains(config.n_head)

    def forward(self, x):
        f = self.nonlinear.f(x)
        return per_head(x, self.n_head) + self.gains(per_head(f, self.n_head))


class PerHeadLinearQuery(nn.Module):
    """q = N(x) + g N(x W): the query above with a linear map in the place of f."""

    attention = KeyNormAttention

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.gains = HeadGains(config.n_head)
        self.w = linear(config.n_embd, config.n_embd, 0.02)

    def forward(self, x):
        return per_head(x, self.n_head) + self.gains(per_head(self.w(x), self.n_head))


def qk_normed(make):
    """The class of q = g N(q') for another query q', with a gain g for each head and keys N(k)."""

    class QKNormQuery(nn.Module):
        attention = KeyNormAttention

        def __init__(self, config):
            super().__init__()
            self.n_head = config.n_head
            self.inner = make(config)
            self.gains = HeadGains(config.n_head)

        def forward(self, x):
            return self.gains(per_head(self.inner(x), self.n_head))

    return QKNormQuery


class GatedAttention(Attention):
    """Attention with a gate, y sigmoid(x W), before the output projection (arXiv:2505.06708)."""

    def __init__(self, config):
        super().__init__(config)
        self.gate = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x, cache=None):
        q, k, v = self.heads(x)
        if cache is not None:
            k, v = cache.append(k, v)
        causal = self.causal and q.size(2) > 1
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=causal)
        y = y.transpose(1, 2).flatten(2) * self.gate(x).sigmoid()  # (B, T, d)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class IdentityGatedQuery(IdentityQuery):
    """q = x/2, and a gate after attention with as many parameters as W_Q."""

    attention = GatedAttention


class NonlinearKey(nn.Module):
    """x (B, T, d) -> key (x + f(x)) / 2 and linear value, side by side (B, T, 2d)."""

    def __init__(self, config):
        super().__init__()
        self.linear = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.nonlinear = nonlinear(config)

    def forward(self, x):
        return torch.cat((self.nonlinear(x), self.linear(x)), dim=-1)


class NonlinearValue(NonlinearKey):
    """x -> linear key and value (x + f(x)) / 2."""

    def forward(self, x):
        return torch.cat((self.linear(x), self.nonlinear(x)), dim=-1)


class MatchedValue(nn.Module):
    """x -> linear key and linear value, which starts with the variance of the nonlinear one."""

    def __init__(self, config):
        super().__init__()
        d = config.n_embd
        self.key = linear(d, d, 0.02)
        self.value = linear(d, d, (2 * d) ** -0.5)

    def forward(self, x):
        return torch.cat((self.key(x), self.value(x)), dim=-1)


def with_key_value(query, make):
    """The class of a query whose attention takes keys and values from another module."""

    class KeyValueAttention(Attention):
        def __init__(self, config):
            super().__init__(config)
            self.key_value = make(config)

    class QueryWithKeyValue(query):
        attention = KeyValueAttention

    return QueryWithKeyValue


CANDIDATES = {
    # The paper's queries with another start.
    "linear_matched": MatchedLinearQuery,
    "linear_anchored": AnchoredLinearQuery,
    "nonlinear_zero": ZeroNonlinearQuery,
    # Other functions of x.
    "gated": GatedQuery,
    "temperature": TemperatureQuery,
    "swiglu": SwiGLUQuery,
    # Queries and keys that are normalised in each head.
    "nonlinear_per_head": PerHeadNonlinearQuery,
    "linear_per_head": PerHeadLinearQuery,
    "linear_qk_gain": qk_normed(LinearQuery),
    "identity_qk_gain": qk_normed(IdentityQuery),
    "nonlinear_qk_gain": qk_normed(nonlinear),
    # The d² parameters, or the nonlinearity, in another place than the query.
    "identity_gated": IdentityGatedQuery,
    "nonlinear_key": with_key_value(LinearQuery, NonlinearKey),
    # The matched query makes the logits start as large as those of a nonlinear key.
    "nonlinear_value": with_key_value(MatchedLinearQuery, NonlinearValue),
    "linear_matched_value": with_key_value(MatchedLinearQuery, MatchedValue),
}


def register():
    """Add the candidates to model.py's QUERIES, where a fork's own query of that name wins."""
    for name, query in CANDIDATES.items():
        QUERIES.setdefault(name, query)


def main():
    register()
    if sys.argv[1:2] == ["sample"]:
        return sample.main(sys.argv[2:])
    return train.main()


if __name__ == "__main__":
    run_program(main)
