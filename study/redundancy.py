"""Why a linear query is redundant, in float64: python -m study.redundancy

Attention sees x only in products with weights. They stay the same if x becomes x theta and each
weight that reads x absorbs the inverse of theta. With theta = W_Q the query needs no weight.
"""

import torch

from model import GPT, GPTConfig


def absorb(linear, identity):
    """Give identity the weights of linear in the basis theta = 2 W_Q of each layer; q is x/2."""
    identity.load_state_dict(linear.state_dict(), strict=False)
    thetas = [2 * block.attn.query.w_q.weight.T for block in linear.blocks]
    for written in (identity.wte.weight, identity.wpe.weight):
        written.copy_(written @ thetas[0])
    for block, theta, next_theta in zip(identity.blocks, thetas, [*thetas[1:], thetas[-1]]):
        for read in (block.attn.key_value.weight, block.mlp.c_fc.weight):
            read.copy_(read @ theta.inverse().T)
        block.attn.c_proj.weight.copy_(theta.T @ block.attn.c_proj.weight)
        block.mlp.c_proj.weight.copy_(next_theta.T @ block.mlp.c_proj.weight)
    identity.lm_head.weight.copy_(identity.lm_head.weight @ thetas[-1].inverse().T)


def logits(model, idx, skips):
    """idx (B, T) -> logits (B, T, V) of the model without norms, with or without skips."""
    x = model.wte(idx) + model.wpe.weight[: idx.size(1)]
    for block in model.blocks:
        for layer in (block.attn, block.mlp):
            x = x + layer(x) if skips else layer(x)
    return model.lm_head(x)


@torch.no_grad()
def main():
    idx = torch.arange(64).view(2, 32) % 50
    shape = {"n_layer": 3, "n_head": 4, "n_embd": 64, "tie_weights": False}
    linear = GPT(GPTConfig(32, 50, query_mode="linear", **shape)).double()
    identity = GPT(GPTConfig(32, 50, query_mode="identity", **shape)).double()
    for name, forward in {
        "without norms, skips and a tied head": lambda model: logits(model, idx, skips=False),
        "with skips, one W_Q for all layers": lambda model: logits(model, idx, skips=True),
        "the same with LayerNorms": lambda model: model(idx),
    }.items():
        absorb(linear, identity)
        expected = forward(linear)
        off = (forward(identity) - expected).abs().max() / expected.abs().max()
        print(f"{name}: off by {off:.1g} times the largest logit")
        for block in linear.blocks:  # the layers share one W_Q from the second case on
            block.attn.query = linear.blocks[0].attn.query


if __name__ == "__main__":
    main()
