"""Generation: drawing tokens one by one, and a model made as fast for it as the machine allows.

A CPU produces a token as fast as it can read the weights, so smaller weights are faster: bfloat16
takes half of float32's bytes, int8 a quarter. A GPU waits for the launches of its kernels
instead: on an H100 bfloat16 was no faster than float32.
"""

import math

import torch
import torch.nn as nn

from utils.settings import UserError

FORMATS = ("float32", "bfloat16", "int8")
INT8_FROM = 1_000_000  # parameters; a smaller model fits into the processor's cache


class KVCache:
    """The keys and values of all tokens that one attention layer has seen so far."""

    def __init__(self, block_size):
        self.block_size = block_size
        self.length = 0
        self.k = None
        self.v = None

    def append(self, k, v):
        """Add k, v (B, n_head, T, head_size) of T new tokens -> those of all tokens so far."""
        if self.length == 0:
            B, n_head, _, head_size = k.shape
            self.k = k.new_empty(B, n_head, self.block_size, head_size)
            self.v = torch.empty_like(self.k)
        start = self.length
        self.length += k.size(2)
        self.k[:, :, start : self.length] = k
        self.v[:, :, start : self.length] = v
        return self.k[:, :, : self.length], self.v[:, :, : self.length]


def new_cache(model):
    """An empty cache for GPT.forward."""
    return [KVCache(model.config.block_size) for _ in model.blocks]


def generate(model, idx, max_new_tokens, **sampling):
    """Continue idx (B, T) -> (B, T + max_new_tokens). sampling: see generate_tokens."""
    return torch.cat([idx, *generate_tokens(model, idx, max_new_tokens, **sampling)], dim=1)


@torch.inference_mode()
def generate_tokens(
    model, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, generator=None
):
    """Continue idx (B, T), 1 <= T <= block_size, and yield each new token (B, 1).

    temperature: 0 takes the most likely token; larger values draw more freely.
    top_k: draw from the k most likely tokens only.
    top_p: draw from the fewest tokens whose probabilities sum to p.
    generator: the torch.Generator to draw with.
    ValueError for a model with bidirectional attention.
    """
    if not model.config.causal:
        raise ValueError("causal=False: a model with bidirectional attention cannot generate")
    block_size = model.config.block_size
    new = idx
    cache = new_cache(model)
    for _ in range(max_new_tokens):
        if cache[0].length == block_size:
            # Positions are absolute, so the cached keys cannot shift. Keep the last half of the
            # context and compute it again.
            new = idx[:, -max(1, block_size // 2) :]
            cache = new_cache(model)
        logits = model(new, cache=cache)  # (B, 1, V)
        new = sample_token(logits[:, -1], temperature, top_k, top_p, generator)
        idx = torch.cat([idx, new], dim=1)
        yield new


def sample_token(logits, temperature, top_k, top_p, generator):
    """Draw one token from each row: logits (B, V) -> (B, 1)."""
    if temperature == 0:
        return logits.argmax(dim=-1, keepdim=True)
    logits = logits.float()
    # Subtract the largest logit first, so that a tiny temperature gives -inf and never inf - inf.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / max(temperature, 1e-30)
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.size(-1))).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -math.inf)
    if top_p is not None:
        probs, order = logits.softmax(dim=-1).sort(descending=True)
        # Drop a token once the more likely ones already sum to p.
        drop = probs.cumsum(dim=-1) - probs >= max(top_p, 1e-30)
        logits = logits.masked_fill(drop.scatter(1, order, drop), -math.inf)
    return torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)


class Int8Linear(nn.Module):
    """A linear layer with weights of 8 bits and a scale for each row; x and y are bfloat16."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.float().contiguous()  # (out, in)
        self.scale = (weight.abs().amax(dim=1).clamp(min=1e-12) / 127).bfloat16()
        rounded = (weight / self.scale.float()[:, None]).round()
        self.weight = rounded.clamp(-127, 127).to(torch.int8)
        self.bias = None if linear.bias is None else linear.bias.bfloat16()

    def forward(self, x):
        y = torch.ops.aten._weight_int8pack_mm(x.flatten(0, -2), self.weight, self.scale)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def formats(device):
    """The FORMATS that a device has: on CUDA, torch's int8 product returns another type."""
    return FORMATS if device == "cpu" else FORMATS[:2]


def best_format(device, model):
    """The fastest number format that changes the validation loss by less than 0.1 %."""
    n_parameters = sum(p.numel() for p in model.parameters())
    return "int8" if device == "cpu" and n_parameters >= INT8_FROM else "float32"


@torch.no_grad()
def for_generation(model, dtype=None):
    """Eval mode, and weights in one of FORMATS (None: the best) -> the model, changed in place."""
    device = next(model.parameters()).device.type
    dtype = dtype or best_format(device, model)
    if dtype not in formats(device):
        known = ", ".join(formats(device))
        raise UserError(f"dtype={dtype} is not among the formats on {device}: {known}", status=2)
    # cuDNN's attention makes a plan for each length of the keys, and each token makes them longer.
    torch.backends.cuda.enable_cudnn_sdp(False)
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        # For a width that is no multiple of 32, torch's int8 kernel reads past the end.
        if dtype == "int8" and module.in_features % 32 == 0:
            model.set_submodule(name, Int8Linear(module))
        # A product with a single row is faster when a tall matrix is stored by columns.
        is_tall = module.out_features > module.in_features
        if dtype == "float32" and device == "cpu" and is_tall:
            module.weight.data = module.weight.data.t().contiguous().t()
    if dtype != "float32":
        model.to(torch.bfloat16)
    return model.eval()
