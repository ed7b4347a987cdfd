"""A GPT whose queries may be linear, the identity, or nonlinear.

The model of "Beyond Linearity in Attention Projections: The Case for Nonlinear Queries" (Karbevski,
arXiv:2603.13381), written to be read from top to bottom: configuration, the three queries, attention,
MLP, block, GPT and generation, the loss, sampling, random streams.

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
    """The architecture. The defaults are GPT-3 small with a nonlinear query.

    A setting that is None is filled in as its comment says; ValueError names a setting that makes no sense.
    """

    block_size: int = 1024  # longest sequence the model can see, in tokens
    vocab_size: int = 50304  # number of token ids (GPT-2's 50257, padded to a multiple of 64)
    n_layer: int = 12  # transformer blocks
    n_head: int = 12  # attention heads in each block
    n_embd: int = 768  # width d of the residual stream
    mlp_hidden: int | None = None  # hidden width of the MLP; None: 4 * n_embd
    dropout: float = 0.0  # on the embedding, the attention weights and both writes to the residual stream
    bias: bool = False  # biases in linear layers and LayerNorms
    tie_weights: bool = True  # the output head reuses the token embedding
    query_mode: str = "nonlinear"  # linear | identity | nonlinear
    query_rank: int | None = None  # bottleneck r of the nonlinear query; None: n_embd // 2
    query_activation: str | None = None  # gelu | none (the control with the same parameters); None: gelu
    qk_norm: bool = False  # parameter-free RMSNorm of q and k, per head
    causal: bool = True  # False: every token sees every other one, as in an encoder

    def __post_init__(self):
        def require(holds, message):
            if not holds:
                raise ValueError(message)

        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "mlp_hidden", "query_rank"):
            value = getattr(self, name)
            require(value is None or value >= 1, f"{name}={value} must be at least 1")
        require(self.n_embd % self.n_head == 0, f"n_embd={self.n_embd} is not divisible by n_head={self.n_head}")
        require(0 <= self.dropout < 1, f"dropout={self.dropout} is not in [0, 1)")
        mode = self.query_mode
        require(mode in QUERIES, f"query_mode={mode!r} is not one of {', '.join(QUERIES)}")
        for name in ("query_rank", "query_activation"):
            value = getattr(self, name)
            require(mode == "nonlinear" or value is None, f"{name}={value!r} has no meaning with query_mode={mode!r}")
        if mode == "nonlinear":
            self.query_rank = self.query_rank or max(1, self.n_embd // 2)
            self.query_activation = activation = self.query_activation or "gelu"
            known = ", ".join(ACTIVATIONS)
            require(activation in ACTIVATIONS, f"query_activation={activation!r} is not one of {known}")
        self.mlp_hidden = self.mlp_hidden or 4 * self.n_embd


# ---------------------------------------------------------------------------------------------------
# The three queries. x (B, T, d) is the block's input after ln_1; all return q (B, T, d). Nothing else
# in the model depends on the query mode, and the softmax scale is 1/sqrt(head size) in every mode.
# Without LayerNorms and skips a linear W_Q can be absorbed exactly by its neighbours (see the README), which
# leaves the identity; with them that is the paper's motivation: parameters of the query should make it
# nonlinear. The nonlinear query is the mean of x and f(x), which start about equally large since each is
# the output of a LayerNorm; the identity query is that mean with f = 0.


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

    With r = d/2 that is d² + 2d, the budget of W_Q (arXiv:2603.13381).
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
        return self.layer_norm(self.w_2(self.activation(self.w_1(self.rms_norm(x)))))

    def forward(self, x):
        return 0.5 * (x + self.f(x))


QUERIES = {"linear": LinearQuery, "identity": IdentityQuery, "nonlinear": NonlinearQuery}
ACTIVATIONS = {"gelu": nn.GELU, "none": nn.Identity}

# ---------------------------------------------------------------------------------------------------
# The transformer.


class KVCache:
    """Keys and values of the tokens that one attention layer has seen, so that they are computed once.

    The caller makes one for each layer and passes the list to every call of the model. Room for block_size
    tokens is taken at the first call, and keys never move.
    """

    def __init__(self, block_size):
        self.block_size, self.length, self.k, self.v = block_size, 0, None, None

    def append(self, k, v):
        """k, v (B, n_head, T, head size) of T new tokens -> those of all tokens so far."""
        B, n_head, T, head_size = k.shape
        if self.length == 0:
            self.k = k.new_empty(B, n_head, self.block_size, head_size)
            self.v = torch.empty_like(self.k)
        old, self.length = self.length, self.length + T
        self.k[:, :, old : self.length] = k
        self.v[:, :, old : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


class Attention(nn.Module):
    """softmax(q kᵀ / sqrt(head size)) v in each head, then the output projection."""

    def __init__(self, config):
        super().__init__()
        d = config.n_embd
        self.query = QUERIES[config.query_mode](config)
        self.key_value = nn.Linear(d, 2 * d, bias=config.bias)  # W_K and W_V, one product
        self.c_proj = nn.Linear(d, d, bias=config.bias)
        self.n_head, self.head_size = config.n_head, d // config.n_head
        self.qk_norm, self.causal, self.dropout = config.qk_norm, config.causal, config.dropout

    def forward(self, x, cache=None):
        B, T, d = x.shape
        q = self.query(x)  # (B, T, d)
        q = q.view(B, T, self.n_head, self.head_size).transpose(1, 2)  # (B, n_head, T, head_size)
        k, v = self.key_value(x).view(B, T, 2, self.n_head, self.head_size).permute(2, 0, 3, 1, 4)  # each like q
        if self.qk_norm:
            q, k = (F.rms_norm(t, (self.head_size,), eps=1e-5) for t in (q, k))
        if cache is not None:
            k, v = cache.append(k, v)  # (B, n_head, length, head_size)
        is_causal = self.causal and T > 1  # one new token may see all cached ones, which is_causal would forbid
        dropout = self.dropout if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=is_causal)  # scale 1/sqrt(head size)
        y = y.transpose(1, 2).reshape(B, T, d)  # heads side by side again
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    """d -> mlp_hidden -> d, with a GELU between, at each position alone."""

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
        self.attn = Attention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None):
        x = x + self.attn(self.ln_1(x), cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class GPT(nn.Module):
    """The language model. Equal (config, seed) give bit-identical weights on every device.

    Weights that two query modes share are bit-identical in both, since each parameter has a random
    stream of its own.
    """

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
        """GPT-2's initialisation; a parameter that no rule covers raises NotImplementedError."""
        module_name, _, kind = name.rpartition(".")
        module = self.get_submodule(module_name)
        if isinstance(module, (nn.LayerNorm, nn.RMSNorm)):
            parameter.fill_(1.0 if kind == "weight" else 0.0)
        elif isinstance(module, (nn.Linear, nn.Embedding)) and kind == "bias":
            parameter.zero_()
        elif isinstance(module, (nn.Linear, nn.Embedding)):
            # 2 n_layer writes to the residual stream add up; so scaled, their sum does not grow with the depth.
            writes_residual = module_name.endswith("c_proj")
            std = 0.02 / math.sqrt(2 * self.config.n_layer) if writes_residual else 0.02
            if not parameter.is_meta:  # a meta tensor has no values: the model is only built to count parameters
                generator = torch.Generator().manual_seed(stream_seed(seed, name))
                values = torch.empty(parameter.shape, dtype=torch.float32, device="cpu")
                parameter.copy_(values.normal_(0.0, std, generator=generator))
        else:
            raise NotImplementedError(f"no rule initialises {name} (of {type(module).__name__}); add one to GPT._init")

    def forward(self, idx, targets=None, cache=None):
        """idx (B, T) token ids -> (logits (B, T, V), None), or (None, loss) with targets.

        targets (B, T) are the tokens that follow; loss is the mean cross-entropy in nats over those that
        are not -1. With a cache (a list of one KVCache per layer) idx continues the tokens seen so far, and
        only the last position's logits (B, 1, V) are computed; only an empty cache takes more than one token.
        Raises ValueError past block_size tokens.
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
        x = self.ln_f(x)
        if targets is None:
            return self.lm_head(x), None  # (B, T, V)
        return None, linear_cross_entropy(x.flatten(0, 1), self.lm_head.weight, targets.flatten())

    def for_generation(self):
        """Eval mode, and on a CPU tall weights stored by columns, which multiply one vector faster -> self."""
        for module in self.modules():
            tall = isinstance(module, nn.Linear) and module.out_features > module.in_features
            if tall and module.weight.device.type == "cpu":
                module.weight.data = module.weight.data.t().contiguous().t()
        return self.eval()

    def generate(self, idx, max_new_tokens, **sampling):
        """idx (B, T) -> (B, T + max_new_tokens); see `stream`, which it collects."""
        return torch.cat([idx, *self.stream(idx, max_new_tokens, **sampling)], dim=1)

    @torch.inference_mode()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None):
        """Continue idx (B, T), 1 <= T <= block_size, and yield each new token (B, 1) as it is drawn.

        temperature 0 takes the likeliest token; top_k keeps the k likeliest; top_p keeps the fewest
        whose probabilities reach p. Call for_generation() first. Cached keys and values give what a full
        forward pass would, up to block_size tokens. Past it every position would shift, which invalidates
        every cached key: the context is then cut to its last half and read afresh, so from then on between
        block_size/2 and block_size tokens are seen.
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
        return {
            "total": total,
            "non_embedding": total - sum(p.numel() for p in embedding),
            "query_path": sum(p.numel() for block in self.blocks for p in block.attn.query.parameters()),
        }

    def flops_per_token(self):
        """Floating-point operations of one training step per token, forward and backward (PaLM, appendix B).

        Six for each weight of a matrix product, the query's and the output head's included, and
        12 n_layer d T for the two products inside attention, counted as if it were not causal.
        """
        weights = sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))
        return 6 * weights + 12 * self.config.n_layer * self.config.n_embd * self.config.block_size


# ---------------------------------------------------------------------------------------------------
# The loss. Logits of all positions would be the largest tensor of a step, and their gradient another one.

LOGITS_AT_ONCE = 2**27  # half a gigabyte in float32
ROWS_AT_ONCE = 8192  # a sum of more gradients might overflow float16


class LinearCrossEntropy(torch.autograd.Function):
    """Sum of the cross-entropies of softmax(x weightᵀ), whose logits are computed and discarded part by part.

    So the gradients are computed in forward, where a part's logits still exist; backward only scales them.
    """

    @staticmethod
    def forward(ctx, x, weight, targets, with_gradients):
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        w, rows = weight.to(dtype), min(ROWS_AT_ONCE, max(1, LOGITS_AT_ONCE // len(weight)))
        dx, dw = (torch.zeros_like(t) if with_gradients else None for t in (x, weight))
        precise = torch.promote_types(dtype, torch.float32)
        total = torch.zeros((), device=x.device, dtype=precise)
        for start in range(0, len(x), rows):
            part = slice(start, start + rows)
            x_part, target = x[part].to(dtype), targets[part, None]  # (rows, d), (rows, 1)
            log_p = F.linear(x_part, w).log_softmax(dim=1, dtype=precise)  # (rows, V)
            kept, target = target >= 0, target.clamp(min=0)
            total -= log_p.gather(1, target).masked_fill(~kept, 0.0).sum()
            if with_gradients:
                d_logits = log_p.exp_().scatter_add_(1, target, -torch.ones_like(target, dtype=precise))
                d_logits = (d_logits * kept).to(dtype)  # softmax minus one-hot
                dx[part] = d_logits @ w
                dw += d_logits.T @ x_part
        ctx.save_for_backward(dx, dw)
        return total

    @staticmethod
    def backward(ctx, grad):
        dx, dw = ctx.saved_tensors
        return dx * grad, dw * grad, None, None


def linear_cross_entropy(x, weight, targets):
    """Mean of the cross-entropies, in nats, of logits x weightᵀ; x (N, d), weight (V, d), targets (N), -1: left out."""
    with_gradients = torch.is_grad_enabled()  # asked here, since it is off within forward
    total = LinearCrossEntropy.apply(x, weight, targets, with_gradients)
    return total / (targets >= 0).sum()


# ---------------------------------------------------------------------------------------------------
# Drawing tokens, and the random streams.


def sample(logits, temperature, top_k, top_p, generator):
    """Draw one token from each row: logits (B, V) -> (B, 1)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float()
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature  # at most 0: no temperature overflows
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None:
        probs, order = logits.softmax(dim=-1).sort(descending=True)
        outside = probs.cumsum(dim=-1) - probs >= top_p  # the likelier ones reach p without this one
        logits = logits.masked_fill(outside.scatter(1, order, outside), -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)


def stream_seed(seed, *key):
    """The seed of one random stream: a fixed function of the run's seed and the stream's name.

    Each use of randomness (a parameter, a step's batch, a step's dropout in each process) has a stream of
    its own, so none can disturb another.
    """
    digest = hashlib.sha256(repr((seed, *key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1  # torch takes seeds below 2**63
