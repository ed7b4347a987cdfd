"""Why a linear query is redundant, in float64: python -m study.redundancy

Attention sees x only in products with weights. They stay the same if x becomes x theta and each
weight that reads x is multiplied by the inverse of theta. With theta = W_Q the query's own weight
becomes the identity, so it is not needed.
"""

import torch

from model import GPT, GPTConfig


def absorb(linear, identity):
    """Give identity the weights of linear in the basis theta = W_Q of each layer."""
    identity.load_state_dict(linear.state_dict(), strict=False)
    # The identity query is x / 2, so theta is 2 W_Q.
    thetas = [2 * block.attn.query.w_q.weight.T for block in linear.blocks]
    for written in (identity.wte.weight, identity.wpe.weight):
        written.copy_(written @ thetas[0])
    for block, theta, next_theta in zip(identity.blocks, thetas, [*thetas[1:], thetas[-1]]):
        for read in (block.attn.key_value.weight, block.mlp.c_fc.weight):
            read.copy_(read @ theta.inverse().T)
        block.attn.c_proj.weight.copy_(theta.T @ block.attn.c_proj.weight)
        block.mlp.c_proj.weight.copy_(next_theta.T @ block.mlp.c_proj.weight)
    identity.lm_head.weight.copy_(identity.lm_head.weight @ thetas[-1].inverse().T)


def logits(model, idx, skips, norms):
    """idx (B, T) -> logits (B, T, V) of the model with or without skip connections and norms."""
    x = model.wte(idx) + model.wpe.weight[: idx.size(1)]
    for block in model.blocks:
        for layer, norm in ((block.attn, block.ln_1), (block.mlp, block.ln_2)):
            y = layer(norm(x) if norms else x)
            x = x + y if skips else y
    return model.lm_head(model.ln_f(x) if norms else x)


@torch.no_grad()
def main():
    torch.manual_seed(1)
    idx = torch.randint(50, (2, 32))
    shape = {"n_layer": 3, "n_head": 4, "n_embd": 64, "tie_weights": False}
    linear = GPT(GPTConfig(32, 50, query_mode="linear", **shape)).double()
    identity = GPT(GPTConfig(32, 50, query_mode="identity", **shape)).double()
    for parameter in linear.parameters():  # large weights, so that the queries matter
        torch.nn.init.normal_(parameter, std=1.5 * parameter.size(-1) ** -0.5)
    for name, skips, norms in (
        ("without norms, skips and a tied head", False, False),
        ("with skips, one W_Q for all layers", True, False),
        ("the same with LayerNorms", True, True),
    ):
        absorb(linear, identity)
        a = logits(linear, idx, skips, norms)
        b = logits(identity, idx, skips, norms)
        off = (a - b).abs().max() / a.abs().max()
        exact = "exact" if off < 1e-10 else "not exact"
        print(f"{name}: {exact}, off by {off:.1g} times the largest logit")
        for block in linear.blocks:  # the layers share one W_Q from the second case on
            block.attn.query = linear.blocks[0].attn.query


if __name__ == "__main__":
    main()
