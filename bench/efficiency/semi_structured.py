"""2:4 zeros where they save time: in kernels of NVIDIA's tensor cores, which multiply what is left alone."""

import copy
import warnings

import torch
from torch import nn

from .quantise import is_decoder_linear

MULTIPLE = 64  # of inputs and outputs that all of these kernels take
DTYPES = (torch.float16, torch.bfloat16)


def semi_structured(model: nn.Module) -> nn.Module:
    """A copy whose decoder layers' linear weights, which are 2:4 sparse, are compressed to half for such kernels.

    Raises ValueError, in one line, where there are none for this device and dtype, or for any of its widths.
    """
    if model.device.type != "cuda" or torch.cuda.get_device_capability(model.device) < (8, 0):
        raise ValueError(
            "2:4 zeros save no time here: kernels that skip them need a CUDA device of capability 8.0 or more"
        )
    if model.dtype not in DTYPES:
        raise ValueError(f"2:4 zeros save no time in {model.dtype}: kernels that skip them take 16 bits")
    model = copy.deepcopy(model)
    linears = [module for path, module in model.named_modules() if is_decoder_linear(module, path)]
    fitting = [one for one in linears if one.in_features % MULTIPLE == one.out_features % MULTIPLE == 0]
    if not fitting:
        raise ValueError(
            f"2:4 zeros save no time here: no width is a multiple of {MULTIPLE}, which kernels for them take"
        )
    with warnings.catch_warnings(action="ignore", category=UserWarning):  # torch calls its interface a prototype
        for linear in fitting:
            compressed = torch.sparse.to_sparse_semi_structured(linear.weight.detach().contiguous())
            linear.weight = nn.Parameter(compressed, requires_grad=False)
    return model
