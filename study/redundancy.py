"""Why a linear query is redundant, in float64: python -m study.redundancy

Attention sees x only in products with weights. Nothing changes when x becomes x theta and each weight that reads x
takes up the inverse of theta. With theta = W_Q the query's own weight becomes the identity, and is not needed.
"""

import torch

from model import GPT, GPTConfig


def absorb(linear, identity):
    """Give x of each layer the basis theta = W_Q of that layer, which the weights before and after it take up."""
    identity.load_state_dict(linear.state_dict(), strict=False)
    thetas = [2 * block.attn.query.w_q.weight.T for block in linear.blocks]  # 2, because the identity query is x / 2
    for written in (identity.wte.weight, identity.wpe.weight):
        written.copy_(written @ thetas[0])
    for block, theta, next_theta in zip(identity.blocks, thetas, [*thetas[1:], thetas[-1]]):
        for read in (block.attn.key_value.weight, block.mlp.c_fc.weight):
            read.copy_(read @ theta.inverse().T)
        block.attn.c_proj.weight.copy_(theta.T @ block.attn.c_proj.weight)
        block.mlp.c_proj.weight.copy_(next_theta.T @ block.mlp.c_proj.weight)
    identity.lm_head.weight.copy_(identity.lm_head.weight @ thetas[-1].inverse().T)


def logits(model, idx, skips, norms):
    x = model.wte(idx) + model.wpe.weight[: idx.size(1)]
    for block in model.blocks:
        for layer, norm in ((block.attn, block.ln_1), (block.mlp, block.ln_2)):
            y = layer(norm(x) if norms else x)
            x = x + y if skips else y
    return model.lm_head(model.ln_f(x) if norms else x)


@torch.no_grad()
def main():
    torch.manual_seed(1)
    idx, shape = torch.randint(50, (2, 32)), {"n_layer": 3, "n_head": 4, "n_embd": 64, "tie_weights": False}
    linear, identity = (GPT(GPTConfig(32, 50, query_mode=mode, **shape)).double() for mode in ("linear", "identity"))
    for parameter in linear.parameters():  # large, so that the queries matter
        torch.nn.init.normal_(parameter, std=1.5 * parameter.size(-1) ** -0.5)
    cases = {"without norms, skips and a tied head": (False, False)}
    cases |= {"with skips, one W_Q for all layers": (True, False), "the same with LayerNorms": (True, True)}
    for what, (skips, norms) in cases.items():
        absorb(linear, identity)
        a, b = logits(linear, idx, skips, norms), logits(identity, idx, skips, norms)
        off = (a - b).abs().max() / a.abs().max()
        print(f"{what}: {'exact' if off < 1e-10 else 'not exact'}, off by {off:.1g} times the largest logit")
        for block in linear.blocks:  # from the second case on
            block.attn.query = linear.blocks[0].attn.query


if __name__ == "__main__":
    main()
