"""Candidate queries, which the studies compare with the three of model.py.

    python -m study.queries CONFIG ...       train.py with these queries
    python -m study.queries sample RUN ...   sample.py with these queries

x (B, T, d) is the attention layer's input after ln_1, q (B, T, d) the query, f the paper's f, and
N an RMSNorm of each head without gains. W_K can absorb a fixed gain on a channel of q.
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


def scale_heads(x, factors):
    """x (..., d) with each head's part times its factor, factors (..., n_head)."""
    heads = x.unflatten(-1, (factors.size(-1), -1))
    return (heads * factors.unsqueeze(-1)).flatten(-2)


class HeadGains(nn.Module):
    """g N(x): each head has a learned gain g, which starts at 1."""

    def __init__(self, n_head):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n_head))

    def forward(self, x):
        return scale_heads(per_head(x, len(self.weight)), self.weight)


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


def zero_nonlinear(config):
    """The paper's query with the gain of its LayerNorm 0 at the start, so that q starts at x/2."""
    query = nonlinear(config)
    nn.init.zeros_(query.layer_norm.weight)
    return query


class GatedQuery(AnchoredLinearQuery):
    """q = x sigmoid(x W) with W = 0 at the start, where q = x/2; d² parameters."""

    def forward(self, x):
        return x * self.w(x).sigmoid()


class TemperatureQuery(nn.Module):
    """q = x softplus(x w + b) in each head. arXiv:2411.12892 does the same to x W_Q."""

    def __init__(self, config):
        super().__init__()
        self.w = linear(config.n_embd, config.n_head, 0.0, bias=True)

    def forward(self, x):
        temperature = F.softplus(self.w(x) - 0.43275212956718856)  # 1/2 at the start
        return scale_heads(x, temperature)


class SwiGLUQuery(nn.Module):
    """q = x/2 + (x A * SiLU(x B)) C with r = d // 3 and C = 0 at the start; 3dr parameters."""

    def __init__(self, config):
        super().__init__()
        d, r = config.n_embd, config.n_embd // 3
        self.a = nn.Linear(d, r, bias=False)
        self.b = nn.Linear(d, r, bias=False)
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

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.nonlinear = nonlinear(config)
        self.gains = HeadGains(config.n_head)

    def forward(self, x):
        return per_head(x, self.n_head) + self.gains(self.nonlinear.f(x))


class PerHeadLinearQuery(nn.Module):
    """q = N(x) + g N(x W): the query above with a linear map in the place of f."""

    def __init__(self, config):
        super().__init__()
        self.n_head = config.n_head
        self.gains = HeadGains(config.n_head)
        self.w = nn.Linear(config.n_embd, config.n_embd, bias=False)

    def forward(self, x):
        return per_head(x, self.n_head) + self.gains(self.w(x))


def qk_normed(make):
    """The class of q = g N(q') for another query q', with a gain g for each head and keys N(k)."""

    class QKNormQuery(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.inner = make(config)
            self.gains = HeadGains(config.n_head)

        def forward(self, x):
            return self.gains(self.inner(x))

    return with_attention(QKNormQuery, KeyNormAttention)


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


class KeyValue(nn.ModuleDict):
    """x (B, T, d) -> the outputs of two modules, key and value, side by side (B, T, 2d)."""

    def forward(self, x):
        return torch.cat([module(x) for module in self.values()], dim=-1)


def nonlinear_key(config):
    """Key (x + f(x)) / 2 and linear value."""
    straight = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
    return KeyValue({"nonlinear": nonlinear(config), "linear": straight})


def nonlinear_value(config):
    """Linear key and value (x + f(x)) / 2."""
    straight = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
    return KeyValue({"linear": straight, "nonlinear": nonlinear(config)})


def matched_value(config):
    """Linear key and linear value, which starts with the variance of the nonlinear one."""
    d = config.n_embd
    return KeyValue({"key": linear(d, d, 0.02), "value": linear(d, d, (2 * d) ** -0.5)})


def with_attention(query, attention_class):
    """The class of a query that comes with its own attention."""
    return type("QueryWithAttention", (query,), {"attention": attention_class})


def with_key_value(query, make):
    """The class of a query whose attention takes keys and values from another module."""

    class KeyValueAttention(Attention):
        def __init__(self, config):
            super().__init__(config)
            self.key_value = make(config)

    return with_attention(query, KeyValueAttention)


CANDIDATES = {
    # The paper's queries with another start.
    "linear_matched": MatchedLinearQuery,
    "linear_anchored": AnchoredLinearQuery,
    "nonlinear_zero": zero_nonlinear,
    # Other functions of x.
    "gated": GatedQuery,
    "temperature": TemperatureQuery,
    "swiglu": SwiGLUQuery,
    # Queries and keys that are normalised in each head.
    "nonlinear_per_head": with_attention(PerHeadNonlinearQuery, KeyNormAttention),
    "linear_per_head": with_attention(PerHeadLinearQuery, KeyNormAttention),
    "linear_qk_gain": qk_normed(LinearQuery),
    "identity_qk_gain": qk_normed(IdentityQuery),
    "nonlinear_qk_gain": qk_normed(nonlinear),
    # The d² parameters, or the nonlinearity, in another place than the query.
    "identity_gated": with_attention(IdentityQuery, GatedAttention),
    "nonlinear_key": with_key_value(LinearQuery, nonlinear_key),
    "nonlinear_value": with_key_value(MatchedLinearQuery, nonlinear_value),
    "linear_matched_value": with_key_value(MatchedLinearQuery, matched_value),
}


def register():
    """Add the candidates to model.py's QUERIES, where a fork's own query of that name wins."""
    QUERIES.update(CANDIDATES | QUERIES)


def main():
    register()
    if sys.argv[1:2] == ["sample"]:
        return sample.main(sys.argv[2:])
    return train.main()


if __name__ == "__main__":
    run_program(main)
