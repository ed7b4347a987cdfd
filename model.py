"""A GPT whose attention queries are linear, the identity, or nonlinear.

The model of "Beyond Linearity in Attention Projections: The Case for Nonlinear Queries"
(Karbevski, arXiv:2603.13381). Read it from top to bottom.

Shapes: B sequences of T tokens each, d = n_embd, V = vocab_size.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from utils.seeds import derive_seed


@dataclass
class GPTConfig:
    """The architecture; by default GPT-3 small with a nonlinear query. ValueError if invalid."""

    block_size: int = 1024  # longest sequence that the model can see, in tokens
    vocab_size: int | None = 50304  # number of token ids; in train.py auto: that of the data
    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # attention heads in each block
    n_embd: int = 768  # width d of the residual stream
    mlp_hidden: int | None = None  # hidden width of the MLP; auto: 4 * n_embd
    dropout: float = 0.0  # on embedding, attention weights, and both layers of a block
    bias: bool = False  # biases in linear layers and LayerNorms
    tie_weights: bool = True  # the output head shares the weights of the token embedding
    query_mode: str = "nonlinear"  # linear | identity | nonlinear
    query_rank: int | None = None  # bottleneck r of the nonlinear query; auto: n_embd // 2
    query_activation: str | None = None  # of the nonlinear query: gelu | none; auto: gelu
    qk_norm: bool = False  # RMSNorm of q and k in each head, without parameters
    causal: bool = True  # False: each token sees all others, as in an encoder

    def __post_init__(self):
        if self.query_mode not in QUERIES:
            raise ValueError(f"query_mode={self.query_mode!r} is not one of {', '.join(QUERIES)}")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        if self.query_mode == "nonlinear":
            self.query_rank = self.query_rank or max(1, self.n_embd // 2)
            self.query_activation = self.query_activation or "gelu"
        elif self.query_rank or self.query_activation:
            name = "query_rank" if self.query_rank else "query_activation"
            raise ValueError(f"{name} has no meaning with query_mode={self.query_mode!r}")
        self.mlp_hidden = self.mlp_hidden or 4 * self.n_embd


# The three queries. x (B, T, d) is the block's input after ln_1, and each returns q (B, T, d).
# Nothing else differs between models with these three, not even the softmax scale.
#
# Without LayerNorms, skips and weight tying, W_Q can be folded into its neighbours exactly, which
# leaves q = x. With them, q = x still trains about as well (reported). So the paper spends W_Q's
# parameters on a nonlinear query: the mean of x and f(x). Both are outputs of a LayerNorm, so they
# start at equal size. The identity query is that mean with f = 0.


class LinearQuery(nn.Module):
    """q = x W_Q                                                  parameters: d² (+ d biases)"""

    def __init__(self, config):
        super().__init__()
        self.w_q = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.w_q(x)


class IdentityQuery(nn.Module):
    """q = x / 2                                                  parameters: none"""

    def __init__(self, config):
        super().__init__()

    def forward(self, x):
        return 0.5 * x


class NonlinearQuery(nn.Module):
    """q = (x + f(x)) / 2                                  parameters: 2dr + 2d (+ r + 2d biases)

    f(x) = LayerNorm(GELU(RMSNorm(x) W_1) W_2). With r = d/2 it has d² + 2d parameters, the
    budget of W_Q.
    """

    def __init__(self, config):
        super().__init__()
        d, r = config.n_embd, config.query_rank
        self.rms_norm = nn.RMSNorm(d, eps=1e-5)
        self.w_1 = nn.Linear(d, r, bias=config.bias)
        self.activation = ACTIVATIONS[config.query_activation]()
        self.w_2 = nn.Linear(r, d, bias=config.bias)
        self.layer_norm = nn.LayerNorm(d, bias=config.bias)

    def f(self, x):
        x = self.rms_norm(x)
        x = self.activation(self.w_1(x))  # (B, T, r)
        return self.layer_norm(self.w_2(x))  # (B, T, d)

    def forward(self, x):
        return 0.5 * (x + self.f(x))


QUERIES = {"linear": LinearQuery, "identity": IdentityQuery, "nonlinear": NonlinearQuery}
ACTIVATIONS = {"gelu": nn.GELU, "none": nn.Identity}


class Attention(nn.Module):
    """In each head softmax(q kᵀ / sqrt(head_size) + mask) v, then the output projection.

    The mask is -inf where a token must not look: if causal, at later tokens; else nowhere.
    """

    def __init__(self, config):
        super().__init__()
        d = config.n_embd
        self.query = QUERIES[config.query_mode](config)
        self.key_value = nn.Linear(d, 2 * d, bias=config.bias)  # W_K and W_V in one matrix
        self.c_proj = nn.Linear(d, d, bias=config.bias)
        self.n_head = config.n_head
        self.head_size = d // config.n_head
        self.qk_norm = config.qk_norm
        self.causal = config.causal
        self.dropout = config.dropout

    def heads(self, x):
        """x (B, T, d) -> q, k, v, each (B, n_head, T, head_size)"""
        B, T, _ = x.shape
        q = self.query(x).view(B, T, self.n_head, self.head_size).transpose(1, 2)
        k_and_v = self.key_value(x).view(B, T, 2, self.n_head, self.head_size)
        k, v = k_and_v.permute(2, 0, 3, 1, 4)
        if self.qk_norm:
            q = F.rms_norm(q, (self.head_size,), eps=1e-5)
            k = F.rms_norm(k, (self.head_size,), eps=1e-5)
        return q, k, v

    def forward(self, x, cache=None):
        q, k, v = self.heads(x)
        if cache is not None:
            k, v = cache.append(k, v)  # (B, n_head, length, head_size): of all tokens so far
        # A single new token attends to the whole cache; is_causal would mask all but its first key.
        is_causal = self.causal and q.size(2) > 1
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=is_causal)
        y = y.transpose(1, 2).flatten(2)  # (B, T, d): heads side by side again
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """GELU(x W_fc) W_proj at each position: d -> mlp_hidden -> d."""

    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.mlp_hidden, bias=config.bias)
        self.c_proj = nn.Linear(config.mlp_hidden, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x):
        x = F.gelu(self.c_fc(x))  # (B, T, mlp_hidden)
        return F.dropout(self.c_proj(x), self.dropout, self.training)  # (B, T, d)


class Block(nn.Module):
    """x + Attention(LayerNorm(x)), then x + MLP(LayerNorm(x)) on the residual stream x (B, T, d)"""

    def __init__(self, config):
        super().__init__()
        # A query class may name its own attention class; study/queries.py has examples.
        attention = getattr(QUERIES[config.query_mode], "attention", Attention)
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """The language model. Equal (config, seed) give equal initial weights on every device."""

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
        self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed):
        """GPT-2's initialisation of Linear (which may set init_std) and Embedding; others stay."""
        for name, parameter in self.named_parameters():  # a tied weight comes once, as wte.weight
            module = self.get_submodule(name.rpartition(".")[0])
            if parameter.is_meta or not isinstance(module, (nn.Linear, nn.Embedding)):
                continue  # a meta tensor has no values; such a model only counts its parameters
            std = 0.0 if name.endswith("bias") else getattr(module, "init_std", 0.02)
            if name.endswith("c_proj.weight"):
                # 2 n_layer layers add to the residual stream; this keeps its scale (GPT-2).
                std /= math.sqrt(2 * self.config.n_layer)
            # Each weight has its own random stream, derived from the seed and its name, so
            # weights that two query modes share start identical.
            generator = torch.Generator().manual_seed(derive_seed(seed, name))
            values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
            parameter.copy_(values.normal_(0.0, std, generator=generator))

    def forward(self, idx, targets=None, cache=None):
        """Token ids idx (B, T) -> logits (B, T, V), or with targets (B, T) the loss.

        The loss is the mean cross-entropy in nats over the targets that are not -1. Logits are not
        returned with it, because torch.compile would then allocate a gradient (B, T, V) for them.
        cache is a list with a KVCache (utils/generation.py) for each block. With one, idx is the
        prompt on the first call and one new token on each later call, and the logits (B, 1, V) are
        those of the last position. ValueError where the tokens exceed block_size.
        """
        T = idx.size(1)
        start = cache[0].length if cache else 0
        if start + T > self.config.block_size:
            raise ValueError(f"{start + T} tokens exceed block_size={self.config.block_size}")
        if start and T > 1:
            raise ValueError(f"a cache that holds {start} tokens takes one new token, not {T}")
        x = self.wte(idx) + self.wpe.weight[start : start + T]  # (B, T, d)
        x = F.dropout(x, self.config.dropout, self.training)
        for layer, block in enumerate(self.blocks):
            x = block(x, cache[layer] if cache else None)
        if cache:
            x = x[:, -1:]  # (B, 1, d): sampling needs no other position
        logits = self.lm_head(self.ln_f(x))  # (B, T, V), or (B, 1, V) with a cache
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def parameter_report(self):
        """Number of parameters: total, non_embedding and query_path.

        non_embedding leaves out the token and position embeddings and an untied output head.
        """
        total = sum(p.numel() for p in self.parameters())
        # In a set, a head that is tied to wte counts once.
        embedding = {self.wte.weight, self.wpe.weight, self.lm_head.weight}
        non_embedding = total - sum(p.numel() for p in embedding)
        query_path = sum(p.numel() for block in self.blocks for p in block.attn.query.parameters())
        return {"total": total, "non_embedding": non_embedding, "query_path": query_path}
