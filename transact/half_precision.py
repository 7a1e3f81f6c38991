"""Stock models in 16 bits on processors that torch has no kernels for: computed as narrowed models are there."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from . import modeling_transact
from .configuration_transact import TransActConfig
from .modeling_transact import attend_in_groups, in_float32, is_linear_alone, leaves_16_bits, quick_product

ATTENTION = "transact_in_groups"


@contextmanager
def leaving_16_bits(model: nn.Module) -> Iterator[None]:
    """Products of many rows and attention are made in float32 or in groups meanwhile; weights and cache stay.

    Nothing changes where torch has kernels for products of 16 bits, nor for a narrowed model, which does so itself.
    Of SmolLM2 in bfloat16 a step of 64 sequences takes .32 s for .64 after 8 tokens, .47 for 1.56 after 500 (two cores
    with AVX2; float32 .20 and .41). Rounding falls otherwise than in the model's own products.
    """
    config = model.config
    is_slow = model.device.type == "cpu" and model.dtype.itemsize == 2
    is_slow = is_slow and not modeling_transact.has_products_of_16_bits()
    if not is_slow or (isinstance(config, TransActConfig) and leaves_16_bits(config)):
        yield
        return
    linears = [module for module in model.modules() if is_linear_alone(module) and module.weight.dtype == model.dtype]
    attention = config._attn_implementation
    try:
        for linear in linears:
            linear.forward = partial(_product, linear)
        if attention == "sdpa":
            config._attn_implementation = ATTENTION
        yield
    finally:
        config._attn_implementation = attention
        for linear in linears:
            vars(linear).pop("forward", None)


def _product(linear: nn.Linear, inputs: torch.Tensor) -> torch.Tensor:
    quick = quick_product(linear, inputs, may_leave_16_bits=True)
    return nn.Linear.forward(linear, inputs) if quick is None else quick


def _attend(module: nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask, **options):
    """As transformers' sdpa, of 16 bits."""
    if query.shape[2] == 1 and attention_mask is None and query.shape[1] > key.shape[1]:
        return attend_in_groups(module, query, key, value, attention_mask, **options)
    output, weights = sdpa_attention_forward(module, *in_float32(query, key, value, attention_mask), **options)
    return output.to(query.dtype), weights


AttentionInterface.register(ATTENTION, _attend)
AttentionMaskInterface.register(ATTENTION, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
