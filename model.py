"""A GPT whose queries may be linear, the identity, or nonlinear: the model of "Beyond Linearity in Attention
Projections: The Case for Nonlinear Queries" (Karbevski, arXiv:2603.13381), to be read from top to bottom.

Shapes: B sequences of T tokens each, d = n_embd, V = vocab_size.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    """The architecture; the defaults are GPT-3 small with a nonlinear query. ValueError names an invalid setting."""

    block_size: int = 1024  # longest sequence the model can see, in tokens
    vocab_size: int | None = 50304  # number of token ids; in train.py None: as many as the data need
    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # attention heads in each block
    n_embd: int = 768  # width d of the residual stream
    mlp_hidden: int | None = None  # hidden width of the MLP; None: 4 * n_embd
    dropout: float = 0.0  # on the embedding, the attention weights and both writes to the residual stream
    bias: bool = False  # biases in linear layers and LayerNorms
    tie_weights: bool = True  # the output head reuses the token embedding
    query_mode: str = "nonlinear"  # linear | identity | nonlinear
    query_rank: int | None = None  # bottleneck r of the nonlinear query; None: n_embd // 2
    query_activation: str | None = None  # gelu | none (equal parameters, to tell what GELU does); None: gelu
    qk_norm: bool = False  # parameter-free RMSNorm of q and k, per head
    causal: bool = True  # False: every token sees every other one, as in an encoder; train.py sets it by the objective

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "mlp_hidden", "query_rank"):
            self._require(getattr(self, name) is None or getattr(self, name) >= 1, name, "must be at least 1")
        self._require(self.n_embd % self.n_head == 0, "n_embd", f"is not divisible by n_head={self.n_head}")
        self._require(0 <= self.dropout < 1, "dropout", "is not in [0, 1)")
        self._require(self.query_mode in QUERIES, "query_mode", f"is not one of {', '.join(QUERIES)}")
        if self.query_mode == "nonlinear":
            self.query_rank = self.query_rank or max(1, self.n_embd // 2)
            self.query_activation = self.query_activation or "gelu"
            known = ", ".join(ACTIVATIONS)
            self._require(self.query_activation in ACTIVATIONS, "query_activation", f"is not one of {known}")
        else:
            useless = f"has no meaning with query_mode={self.query_mode!r}"
            self._require(self.query_rank is None, "query_rank", useless)
            self._require(self.query_activation is None, "query_activation", useless)
        self.mlp_hidden = self.mlp_hidden or 4 * self.n_embd

    def _require(self, condition, name, problem):
        if not condition:
            raise ValueError(f"{name}={getattr(self, name)!r} {problem}")


# The three queries. x (B, T, d) is the block's input after ln_1; all return q (B, T, d). With these three, nothing else in
# the model depends on the query mode, and the softmax scale is 1/sqrt(head_size) in every mode.
# Without LayerNorms, skips and a tied head a linear W_Q can be absorbed exactly by its neighbours: the identity is left. With
# them the identity is reported to train about as well. So the paper spends the parameters of W_Q on a query that is not
# linear: the mean of x and f(x), which start equally large, since each leaves a LayerNorm. The identity query has f = 0.


class LinearQuery(nn.Module):
    """q = x W_Q                                                    parameters: d² (+ d biases)"""

    def __init__(self, config):
        super().__init__()
        self.w_q = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.w_q(x)


class IdentityQuery(nn.Module):
    """q = x / 2                                                    parameters: none"""

    def __init__(self, config):
        super().__init__()

    def forward(self, x):
        return 0.5 * x


class NonlinearQuery(nn.Module):
    """q = (x + f(x)) / 2,  f(x) = LayerNorm(GELU(RMSNorm(x) W_1) W_2)    parameters: 2dr + 2d (+ r + 2d biases)
    With r = d/2 that is d² + 2d, the budget of W_Q."""

    def __init__(self, config):
        super().__init__()
        d, r = config.n_embd, config.query_rank
        self.rms_norm = nn.RMSNorm(d, eps=1e-5)
        self.w_1 = nn.Linear(d, r, bias=config.bias)
        self.activation = ACTIVATIONS[config.query_activation]()
        self.w_2 = nn.Linear(r, d, bias=config.bias)
        self.layer_norm = nn.LayerNorm(d, bias=config.bias)

    def f(self, x):
        return self.layer_norm(self.w_2(self.activation(self.w_1(self.rms_norm(x)))))

    def forward(self, x):
        return 0.5 * (x + self.f(x))


QUERIES = {"linear": LinearQuery, "identity": IdentityQuery, "nonlinear": NonlinearQuery}
ACTIVATIONS = {"gelu": nn.GELU, "none": nn.Identity}


class KVCache:
    """Keys and values of the tokens that one attention layer has seen; generation gives the model one for each layer."""

    def __init__(self, block_size):
        self.block_size, self.length, self.k, self.v = block_size, 0, None, None

    def append(self, k, v):
        """k, v (B, n_head, T, head_size) of T new tokens -> those of all tokens so far."""
        B, n_head, T, head_size = k.shape
        if self.length == 0:
            self.k = k.new_empty(B, n_head, self.block_size, head_size)
            self.v = torch.empty_like(self.k)
        old, self.length = self.length, self.length + T
        self.k[:, :, old : self.length] = k
        self.v[:, :, old : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


class Attention(nn.Module):
    """softmax(q kᵀ / sqrt(head_size)) v in each head, then the output projection."""

    def __init__(self, config):
        super().__init__()
        d = config.n_embd
        self.query = QUERIES[config.query_mode](config)
        self.key_value = nn.Linear(d, 2 * d, bias=config.bias)  # W_K and W_V, one product
        self.c_proj = nn.Linear(d, d, bias=config.bias)
        self.n_head, self.head_size = config.n_head, d // config.n_head
        self.qk_norm, self.causal, self.dropout = config.qk_norm, config.causal, config.dropout

    def heads(self, x):
        """x (B, T, d) -> q, k, v, each (B, n_head, T, head_size)"""
        B, T, _ = x.shape
        q = self.query(x).view(B, T, self.n_head, self.head_size).transpose(1, 2)
        k, v = self.key_value(x).view(B, T, 2, self.n_head, self.head_size).permute(2, 0, 3, 1, 4)
        if self.qk_norm:
            q, k = (F.rms_norm(t, (self.head_size,), eps=1e-5) for t in (q, k))
        return q, k, v

    def forward(self, x, cache=None):
        q, k, v = self.heads(x)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, n_head, length, head_size)
        is_causal = self.causal and q.size(2) > 1  # one new token may see all cached ones, which is_causal would forbid
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=is_causal)  # scale 1/sqrt(head_size)
        y = y.transpose(1, 2).flatten(2)  # (B, T, d): heads side by side again
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """GELU(x W_fc) W_proj at each position alone; d -> mlp_hidden -> d."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.mlp_hidden, bias=config.bias)
        self.c_proj = nn.Linear(config.mlp_hidden, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x):
        x = F.gelu(self.c_fc(x))  # (B, T, mlp_hidden)
        return F.dropout(self.c_proj(x), self.dropout, self.training)  # (B, T, d)


class Block(nn.Module):
    """x + Attention(LayerNorm(x)), then x + MLP(LayerNorm(x)); x (B, T, d) is the residual stream."""

    def __init__(self, config):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = getattr(QUERIES[config.query_mode], "attention", Attention)(config)  # a query may bring its own
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The language model. Its weights are drawn on the CPU, each with a seed of its own, so equal (config, seed) give equal
    weights on every device, and what two query modes share is equal in both."""

    def __init__(self, config, seed=0):
        super().__init__()
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)
        self.wpe = nn.Embedding(config.block_size, config.n_embd)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.n_layer))
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tie_weights:
            self.lm_head.weight = self.wte.weight
        for name, parameter in self.named_parameters():  # a tied weight comes once, as wte
            self._init(name, parameter, seed)

    @torch.no_grad()
    def _init(self, name, parameter, seed):
        """GPT-2's initialisation, unless the parameter's module sets init_std or init_gain. Without a rule, an error."""
        module = self.get_submodule(name.rpartition(".")[0])
        is_gain = isinstance(module, (nn.LayerNorm, nn.RMSNorm)) or hasattr(module, "init_gain")
        if not is_gain and not isinstance(module, (nn.Linear, nn.Embedding)):
            raise NotImplementedError(f"no rule initialises {name} (of {type(module).__name__}); add one to GPT._init")
        if name.endswith("bias"):
            parameter.zero_()
        elif is_gain:
            parameter.fill_(getattr(module, "init_gain", 1.0))
        elif not parameter.is_meta:  # a meta tensor has no values: the model is only built to count parameters
            # 2 n_layer writes to the residual stream add up; scaled by 1/sqrt(2 n_layer), their sum does not grow.
            writes = 2 * self.config.n_layer if name.endswith("c_proj.weight") else 1
            std = getattr(module, "init_std", 0.02) / math.sqrt(writes)
            generator = torch.Generator().manual_seed(derive_seed(seed, name))
            values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            parameter.copy_(values.normal_(0.0, std, generator=generator))

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) token ids -> (logits (B, T, V), loss), where loss is None without targets.

        targets (B, T) are the tokens to predict; the loss is the mean cross-entropy in nats over those that are not
        -1. With a cache (a list of one KVCache per layer) idx continues the tokens seen so far, one at a time once the
        cache holds any, and the logits are those of the last position (B, 1, V). ValueError past block_size tokens.
        """
        T = idx.size(1)
        start = cache[0].length if cache else 0
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens do not fit in block_size={self.config.block_size}")
        if start and T > 1:
            raise ValueError(f"a cache that holds {start} tokens goes on by one token at a time, not by {T}")
        x = self.wte(idx) + self.wpe.weight[start : start + T]  # (B, T, d)
        x = F.dropout(x, self.config.dropout, self.training)
        for layer, block in enumerate(self.blocks):
            x = block(x, cache[layer] if cache else None)
        if cache:
            x = x[:, -1:]  # (B, 1, d): sampling needs no other position
        logits = self.lm_head(self.ln_f(x))  # (B, T, V)
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def generate(self, idx, max_new_tokens, **sampling):
        """idx (B, T) -> (B, T + max_new_tokens): idx and all that `generate_tokens` yields."""
        return torch.cat([idx, *self.generate_tokens(idx, max_new_tokens, **sampling)], dim=1)

    @torch.inference_mode()
    def generate_tokens(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None):
        """Continue idx (B, T), 1 <= T <= block_size, and yield each new token (B, 1) as it is drawn.

        temperature 0 takes the likeliest token; top_k keeps the k likeliest; top_p keeps the fewest whose
        probabilities reach p. Past block_size tokens every position would shift, which invalidates every cached key:
        the context is then cut to its last half and read afresh.
        """
        if not self.config.causal:
            raise ValueError("a model with causal=False cannot generate: it was built to see the tokens to come")
        block_size, cache = self.config.block_size, None
        for _ in range(max_new_tokens):
            if cache is None or cache[0].length == block_size:
                new = idx if cache is None else idx[:, -max(1, block_size // 2) :]
                cache = [KVCache(block_size) for _ in self.blocks]
            logits, _ = self(new, cache=cache)
            new = sample(logits[:, -1], temperature, top_k, top_p, generator)
            idx = torch.cat([idx, new], dim=1)
            yield new

    def parameter_report(self):
        """Exact counts: total, non_embedding (without token and position embeddings and an untied head), query_path."""
        total = sum(p.numel() for p in self.parameters())
        embedding = {self.wte.weight, self.wpe.weight, self.lm_head.weight}  # a set: a tied head counts once
        query_path = sum(p.numel() for block in self.blocks for p in block.attn.query.parameters())
        return {"total": total, "non_embedding": total - sum(p.numel() for p in embedding), "query_path": query_path}


def sample(logits, temperature, top_k, top_p, generator):
    """Draw one token from each row: logits (B, V) -> (B, 1)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, 1e-30)  # at most 0, and never 0 / 0
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None:
        probs, order = logits.softmax(dim=-1).sort(descending=True)
        outside = probs.cumsum(dim=-1) - probs >= max(top_p, 1e-30)  # the likelier ones reach p > 0 without this one
        logits = logits.masked_fill(outside.scatter(1, order, outside), -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)


def derive_seed(seed, *key):
    """The seed for one use of randomness (a parameter, a step's batch, a window's holes, a step's dropout in each process):
    a fixed function of the run's seed and of that use's name. So no use can disturb another."""
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1  # below 2**63, which every generator takes
