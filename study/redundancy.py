"""Why a linear query is redundant, in float64: python -m study.redundancy

Attention sees x only in products with weights. Nothing changes when x becomes x theta and each weight that reads x
takes up the inverse of theta. With theta = W_Q the query's own weight becomes the identity, and is not needed.
"""

import torch

from model import GPT, GPTConfig


def two_models(shared):
    """A model with large random weights, so that its queries matter, and one that has all of them but W_Q."""
    shape = {"n_layer": 3, "n_head": 4, "n_embd": 64, "block_size": 32, "vocab_size": 50, "tie_weights": False}
    linear, identity = (GPT(GPTConfig(query_mode=mode, **shape)).double() for mode in ("linear", "identity"))
    for parameter in linear.parameters():
        torch.nn.init.normal_(parameter, std=1.5 * parameter.size(-1) ** -0.5)
    if shared:  # one W_Q for all layers
        for block in linear.blocks:
            block.attn.query.load_state_dict(linear.blocks[0].attn.query.state_dict())
    identity.load_state_dict(linear.state_dict(), strict=False)
    return linear, identity


def absorb(linear, identity):
    """Give x of each layer the basis theta = W_Q of that layer; what writes x, and what reads it, takes it up."""
    thetas = [2 * block.attn.query.w_q.weight.T for block in linear.blocks]  # 2, because the identity query is x / 2
    written = [(weight, thetas[0]) for weight in (identity.wte.weight, identity.wpe.weight)]
    read = [(identity.lm_head.weight.T, thetas[-1])]
    for block, theta, next_theta in zip(identity.blocks, thetas, [*thetas[1:], thetas[-1]]):
        read += [(block.attn.key_value.weight.T, theta), (block.mlp.c_fc.weight.T, theta)]
        written += [(block.attn.c_proj.weight.T, theta), (block.mlp.c_proj.weight.T, next_theta)]
    for weight, theta in written:
        weight.copy_(weight @ theta)
    for weight, theta in read:
        weight.copy_(theta.inverse() @ weight)


def logits(model, idx, skips):
    """The model's own attention and MLP, without LayerNorms."""
    x = model.wte(idx) + model.wpe.weight[: idx.size(1)]
    for block in model.blocks:
        for layer in (block.attn, block.mlp):
            x = x + layer(x) if skips else layer(x)
    return model.lm_head(x)


def tell(what, a, b):
    difference = (a - b).abs().max() / a.abs().max()
    print(f"{what}: {'exact' if difference < 1e-10 else 'not exact'}, off by {difference:.1g} times the largest logit")


@torch.no_grad()
def main():
    torch.manual_seed(0)
    idx = torch.randint(50, (2, 32))
    linear, identity = two_models(shared=False)
    absorb(linear, identity)
    tell("without norms, skips and a tied head", logits(linear, idx, skips=False), logits(identity, idx, skips=False))
    linear, identity = two_models(shared=True)
    absorb(linear, identity)
    tell("with skips, one W_Q for all layers", logits(linear, idx, skips=True), logits(identity, idx, skips=True))
    tell("the same with LayerNorms", linear(idx)[0], identity(idx)[0])


if __name__ == "__main__":
    main()
