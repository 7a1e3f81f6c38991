"""Quantisation on top of pruning: weight-only int8 and int4 of the decoder layers' linear weights, by torchao.

Activations, biases, norms, embeddings and the head stay in the model's dtype, and so does arithmetic: weights are made
floats again as they are multiplied. Without compilation this costs time, on CPU and GPU alike.
"""

import copy
import importlib.util
import warnings
from importlib import metadata

import torch
from torch import nn

from transact._transformers import without_logs

from .memory import weight_bytes

FORMATS = ("int8", "int4")
GROUPS = (32, 16, 8)


def check_format(name: str) -> None:
    """Raises ValueError for an unknown format, and where torchao is not installed."""
    if name not in FORMATS:
        raise ValueError(f"unknown quantisation {name!r}, allowed: {', '.join(FORMATS)}")
    if importlib.util.find_spec("torchao") is None:
        raise ValueError(f"quantisation {name!r} needs torchao: python -m pip install 'torchao>=0.18'")


def torchao_version() -> str:
    return metadata.version("torchao")


def group_of(inputs: int) -> int | None:
    """Inputs that share an int4 scale: the largest of GROUPS that divides a row of so many; None, a row, if none does.

    Pruned heads seldom add up to a multiple of 32, so that `o_proj` often has smaller groups than the others.
    """
    return next((group for group in GROUPS if inputs % group == 0), None)


def is_decoder_linear(module: nn.Module, name: str) -> bool:
    """Whether a module of a model is a projection of attention or of an MLP."""
    return isinstance(module, nn.Linear) and ".layers." in name


def quantised(model: nn.Module, name: str) -> nn.Module:
    """A copy whose decoder layers' linear weights are in a format of FORMATS; the model itself stays as it is.

    "int8": symmetric, one float32 scale an output. "int4": asymmetric, a bfloat16 scale and a zero point for each
    `group_of` inputs. Both run on CPU and CUDA for any width; torchao's packed int4 kernels do not, so its int4 values
    lie in memory one to a byte (see `packed_weight_bytes`). Raises ValueError as `check_format` does.
    """
    check_format(name)
    torchao = _torchao()
    model = copy.deepcopy(model)
    if name == "int8":
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig(set_inductor_config=False), filter_fn=is_decoder_linear)
        return model
    linears = [module for path, module in model.named_modules() if is_decoder_linear(module, path)]
    for group in {group_of(linear.in_features) for linear in linears}:
        config = torchao.IntxWeightOnlyConfig(
            weight_dtype=torch.int4,
            granularity=torchao.PerAxis(0) if group is None else torchao.PerGroup(group),
            mapping_type=torchao.MappingType.ASYMMETRIC,
            scale_dtype=torch.bfloat16,
        )

        def of_group(module: nn.Module, path: str, group: int | None = group) -> bool:
            return is_decoder_linear(module, path) and group_of(module.in_features) == group

        torchao.quantize_(model, config, filter_fn=of_group)
    return model


def packed_weight_bytes(model: nn.Module) -> int:
    """Bytes of all parameters with int4 values two to a byte, as a file would hold them: less than `weight_bytes`,
    which is what memory holds. Scales and zero points count as they are stored."""
    int4 = [weight for weight in model.parameters() if getattr(weight, "target_dtype", None) == torch.int4]
    return weight_bytes(model) - sum(weight.qdata.numel() // 2 for weight in int4)


def _torchao():
    """torchao's quantisation module; what it says while it is imported does not concern weight-only formats."""
    with without_logs(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchao.quantization
    return torchao.quantization
