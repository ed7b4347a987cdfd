"""study/redundancy.py: neighbours absorb a linear query exactly where theory says so."""

import pytest
import torch

from model import GPT, GPTConfig
from study import redundancy


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "skips, norms, shared, exact",
    [
        (False, False, False, True),
        (True, False, True, True),
        (True, False, False, False),  # one basis for all layers, but each layer has its own W_Q
        (True, True, True, False),  # no change of basis passes through a LayerNorm
    ],
)
@torch.no_grad()
def test_a_linear_query_can_be_absorbed_exactly(skips, norms, shared, exact, causal):
    shape = {"block_size": 12, "vocab_size": 20, "n_layer": 3, "n_head": 2, "n_embd": 16}
    shape |= {"tie_weights": False, "causal": causal}
    linear = GPT(GPTConfig(query_mode="linear", **shape)).double()
    identity = GPT(GPTConfig(query_mode="identity", **shape)).double()
    generator = torch.Generator().manual_seed(3)
    for p in linear.parameters():
        torch.nn.init.normal_(p, std=1.5 * p.size(-1) ** -0.5, generator=generator)
    for block in linear.blocks:
        block.attn.query = linear.blocks[0].attn.query if shared else block.attn.query
    idx = torch.randint(20, (4, 12), generator=generator)

    def logits(model):
        return model(idx) if norms else redundancy.logits(model, idx, skips)

    expected = logits(linear)

    def off():
        return ((expected - logits(identity)).abs().max() / expected.abs().max()).item()

    left_over = identity.load_state_dict(linear.state_dict(), strict=False).unexpected_keys
    assert left_over == [f"blocks.{n}.attn.query.w_q.weight" for n in range(3)]
    assert off() > 1e-2  # W_Q does something
    redundancy.absorb(linear, identity)
    assert off() < 1e-10 if exact else off() > 1e-2


def test_the_redundancy_in_numbers(capsys):
    redundancy.main()
    lines = capsys.readouterr().out.splitlines()
    off = [float(line.split("off by ")[1].split()[0]) for line in lines]
    assert max(off[:2]) < 1e-10 and off[2] > 1e-2
