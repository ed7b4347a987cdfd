"""What train.py looks at where training may be unstable."""

import math

import torch

from utils.device import autocast, print0, sum_over_ranks
from utils.settings import UserError


@torch.no_grad()
def largest_attention_logit(model, idx, settings):
    """The largest q k / sqrt(head_size) over layers, heads and pairs of tokens that attention sees; idx (B, T). Prints it.

    In bf16 with flash attention it is large logits whose rounding errors add up until the loss blows up
    (arXiv:2510.04212).
    """
    T, largest = idx.size(1), torch.full((), -torch.inf, device=idx.device)
    unseen = torch.ones(T, T, dtype=torch.bool, device=idx.device).triu(1) & model.config.causal
    with autocast(settings):
        x = model.wte(idx) + model.wpe.weight[:T]  # (B, T, d)
        for block in model.blocks:
            q, k, _ = block.attn.heads(block.ln_1(x))
            logits = q @ k.mT / q.size(-1) ** 0.5  # (B, n_head, T, T)
            largest = torch.maximum(largest, logits.masked_fill(unseen, -torch.inf).max().float())
            x = block(x)
    print0(f"    largest attention logit {largest.item():.1f}")
    return largest.item()


def check_loss_scale(scaler):
    """float16 alone: a scale that halves and halves means that every step overflows, and is skipped."""
    if scaler.is_enabled() and scaler.get_scale() < 1:
        reason = f"float16: the loss scale fell to {scaler.get_scale():g}, since the gradients of all steps overflow"
        raise UserError(f"{reason}; use --dtype=bfloat16 or float32, or a lower learning_rate")


def check_finite(value, run, step, settings):
    """Stop the run where the value, a number or tensor, is not finite in some process; nothing is saved then."""
    if not math.isfinite(sum_over_ranks(value, settings.device)):
        run.log({"step": step, "diverged": True})
        kept = "the last checkpoint is kept" if run.holds("ckpt.pt") else "there is no checkpoint yet"
        raise UserError(
            f"the loss is not finite at step {step}; {kept}. A lower learning_rate "
            f"(now {settings.learning_rate:g}), a longer warm-up (now {settings.warmup_iters}) or --qk_norm may help"
        )


def check_gradient(norm, step):
    """A first gradient of exactly 0 is a compiler's mistake that no later step would tell of."""
    if step == 1 and norm == 0:
        raise UserError("the first gradient is exactly 0, so nothing is learned; try --compile=false")
