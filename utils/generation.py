"""A trained model made ready to generate, as fast as the machine allows.

On a CPU one token at a time is as fast as the weights can be read, so that smaller ones are faster: bfloat16 takes half of
float32's bytes, int8 a quarter. A GPU waits for the launches of kernels instead: on an H100 bfloat16 was no faster.
"""

import torch
import torch.nn as nn

from utils.settings import UserError

FORMATS = ("float32", "bfloat16", "int8")


class Int8Linear(nn.Module):
    """A linear layer whose weights are rounded to 8 bits, each row with a scale of its own; x and y are bfloat16."""

    def __init__(self, linear):
        super().__init__()
        weight = linear.weight.float().contiguous()  # (out, in)
        self.scale = (weight.abs().amax(dim=1).clamp(min=1e-12) / 127).bfloat16()
        self.weight = (weight / self.scale.float()[:, None]).round().clamp(-127, 127).to(torch.int8)
        self.bias = None if linear.bias is None else linear.bias.bfloat16()

    def forward(self, x):
        y = torch.ops.aten._weight_int8pack_mm(x.flatten(0, -2), self.weight, self.scale)
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


def formats(device):
    """Those of FORMATS that there are on a device: torch's product for int8 gives another type on CUDA."""
    return FORMATS if device == "cpu" else FORMATS[:2]


def best_format(device):
    """The fastest number format that changes the validation loss by less than 0.1 %: `tools.bench sample --run` tells."""
    return "int8" if device == "cpu" else "float32"


@torch.no_grad()
def for_generation(model, dtype="float32"):
    """Eval mode, and weights in one of FORMATS -> the model, which is changed in place."""
    device = next(model.parameters()).device.type
    if dtype not in formats(device):
        known = ", ".join(formats(device))
        raise UserError(f"dtype={dtype} is not among the weights' formats on {device}: {known}", status=2)
    # cuDNN's attention makes a plan for each length of the keys, and every token makes them longer.
    torch.backends.cuda.enable_cudnn_sdp(False)
    for name, module in list(model.named_modules()):
        # Of a width that is no multiple of its vectors' length torch's kernel for int8 reads past the end.
        if isinstance(module, nn.Linear) and dtype == "int8" and module.in_features % 32 == 0:
            model.set_submodule(name, Int8Linear(module))
        elif isinstance(module, nn.Linear) and dtype == "float32" and module.weight.device.type == "cpu":
            if module.out_features > module.in_features:  # tall: a product with one row is faster by columns
                module.weight.data = module.weight.data.t().contiguous().t()
    if dtype != "float32":
        model.to(torch.bfloat16)
    return model.eval()
