"""A trained model made ready to generate, as fast as this machine allows."""

import torch
import torch.nn as nn


class Int8Linear(nn.Module):
    """A linear layer whose weights are rounded to 8 bits, each row with a scale of its own; its products are in bf16.

    One token at a time is as fast as the weights can be read, and these are a quarter of float32's.
    """

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.float()  # (out, in)
        self.scale = (weight.abs().amax(dim=1).clamp(min=1e-12) / 127).bfloat16()
        self.weight = (weight / self.scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.bias = linear.bias

    def forward(self, x):
        rows = x.flatten(0, -2).bfloat16()
        y = torch.ops.aten._weight_int8pack_mm(rows, self.weight, self.scale)
        y = y.unflatten(0, x.shape[:-1]).to(x.dtype)
        return y if self.bias is None else y + self.bias


@torch.no_grad()
def for_generation(model, dtype="float32"):
    """Eval mode and weights in float32, bfloat16 or int8 -> the model, which is changed in place."""
    if dtype == "bfloat16":
        model.to(torch.bfloat16)
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear):
            continue
        if dtype == "int8":
            model.set_submodule(name, Int8Linear(module))
        elif module.out_features > module.in_features and module.weight.device.type == "cpu":
            module.weight.data = module.weight.data.t().contiguous().t()  # by columns: a product with one row is faster
    return model.eval()
