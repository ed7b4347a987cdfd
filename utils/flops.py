"""The floating-point operations of training, and how many a GPU can do."""

import re

import torch


def flops_per_token(model):
    """Floating-point operations of a training step per token (PaLM, appendix B).

    Six for each weight of a matrix product, the query's and the output head's included, and
    12 n_layer d T for the two products inside attention, counted as if it were not causal.
    """
    weights = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    config = model.config
    return 6 * weights + 12 * config.n_layer * config.n_embd * config.block_size


def peak_tflops(name):
    """The maker's dense bf16 TFLOP/s with fp32 accumulation of a GPU, or None if not known."""
    peaks = {"H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200 NVL": 836, "H200": 989}
    peaks |= {"B200": 2250, "A100": 312, "L40S": 362}
    peaks |= {"RTX 4090 D": 147, "RTX 4090": 165, "RTX 5090": 209}
    if "Laptop" in name or "MIG" in name:  # slower cards, and parts of cards, of the same name
        return None
    return next((float(tf) for part, tf in peaks.items() if re.search(rf"{part}\b", name)), None)
