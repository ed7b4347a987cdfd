"""study/redundancy.py: a linear query is absorbed by its neighbours exactly where theory says so."""

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
        (True, False, False, False),  # through all layers runs one basis, and the first layer's is not the others'
        (True, True, True, False),  # no change of basis passes through a LayerNorm
    ],
)
@torch.no_grad()
def test_a_linear_query_can_be_absorbed_exactly(skips, norms, shared, exact, causal):
    """Without skips always, with skips where the layers share one W_Q, with LayerNorms not."""
    config = dict(block_size=12, vocab_size=20, n_layer=3, n_head=2, n_embd=16, tie_weights=False, causal=causal)
    linear, identity = (GPT(GPTConfig(query_mode=mode, **config)).double() for mode in ("linear", "identity"))
    generator = torch.Generator().manual_seed(3)
    for p in linear.parameters():
        torch.nn.init.normal_(p, std=1.5 * p.size(-1) ** -0.5, generator=generator)
    for block in linear.blocks:
        block.attn.query = linear.blocks[0].attn.query if shared else block.attn.query
    idx = torch.randint(20, (4, 12), generator=generator)
    logits = lambda model: redundancy.logits(model, idx, skips, norms)  # noqa: E731
    off = lambda: ((logits(linear) - logits(identity)).abs().max() / logits(linear).abs().max()).item()  # noqa: E731
    assert not norms or torch.equal(logits(linear), linear(idx)[0])
    left_over = identity.load_state_dict(linear.state_dict(), strict=False).unexpected_keys
    assert left_over == [f"blocks.{n}.attn.query.w_q.weight" for n in range(3)]
    assert off() > 1e-2  # W_Q does something
    redundancy.absorb(linear, identity)
    assert off() < 1e-10 if exact else off() > 1e-2


def test_the_redundancy_in_numbers(capsys):
    redundancy.main()
    assert [": exact, " in line for line in capsys.readouterr().out.splitlines()] == [True, True, False]
