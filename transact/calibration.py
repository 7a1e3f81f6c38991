"""One streaming pass over calibration text: how strong is every transitional activation?

Legend: T tokens, H query heads, K key-value heads, G = H / K query heads a group, P RoPE pairs of a head,
V value dimensions of a head, M MLP dimensions.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm


@dataclass(frozen=True)
class LayerStatistics:
    """Sums over all calibration tokens of squared activations of one layer, float64.

    `query_pairs` (H, P) and `key_pairs` (K, P): squared norms of each RoPE pair of queries and keys (rotation does not
    change them). `attention_output` (H, V): input of `o_proj`. `mlp` (M,): input of `down_proj`.
    """

    query_pairs: torch.Tensor
    key_pairs: torch.Tensor
    attention_output: torch.Tensor
    mlp: torch.Tensor


@dataclass(frozen=True)
class Statistics:
    """Statistics of every layer and the number of tokens that they were summed over."""

    layers: tuple[LayerStatistics, ...]
    tokens: int


def sum_of_squares(activation: torch.Tensor) -> torch.Tensor:
    """Sum over tokens of (batch, length, width) squared: (width,), float64.

    Each batch is squared and summed in float32, as the paper does, and batches add up in float64. (Squaring first is
    several times faster on a CPU than a norm along the token dimension.)
    """
    rows = activation.reshape(-1, activation.shape[-1])
    return rows.float().square().sum(dim=0).double()


@contextmanager
def _summing_squares(model: nn.Module) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Hooks on the four projections of each layer; yields, per layer, the sums so far."""
    sums: list[dict[str, torch.Tensor]] = []
    handles = []

    def watch(into: dict[str, torch.Tensor], name: str, module: nn.Module, of_input: bool):
        def add(activation: torch.Tensor):
            squares = sum_of_squares(activation)
            into[name] = into[name] + squares if name in into else squares

        if of_input:
            handles.append(module.register_forward_pre_hook(lambda module, inputs: add(inputs[0])))
        else:
            handles.append(module.register_forward_hook(lambda module, inputs, output: add(output)))

    for layer in model.model.layers:
        into: dict[str, torch.Tensor] = {}
        sums.append(into)
        watch(into, "query", layer.self_attn.q_proj, of_input=False)
        watch(into, "key", layer.self_attn.k_proj, of_input=False)
        watch(into, "attention_output", layer.self_attn.o_proj, of_input=True)
        watch(into, "mlp", layer.mlp.down_proj, of_input=True)
    try:
        yield sums
    finally:
        for handle in handles:
            handle.remove()


def _pairs(squares: torch.Tensor, heads: int) -> torch.Tensor:
    """Sums per dimension, (heads * 2 P,) in the half-split layout, added up per RoPE pair: (heads, P)."""
    return squares.view(heads, 2, -1).sum(dim=1)


@torch.no_grad()
def calibrate(
    model: nn.Module, windows: torch.Tensor, *, tokens_per_batch: int = 2048, progress: bool = False
) -> Statistics:
    """Statistics of a dense Llama over `windows` (samples, length) of token ids, in one pass.

    The language-model head is not run and nothing but the sums is kept, so memory does not grow with the number of
    samples. The activations are those that the paper scores (Shen et al., ACL Findings 2024, section 3).

    Raises ValueError where `windows` is not a non-empty matrix of ids of the model's vocabulary, is longer than its
    context, or where an
    activation is not finite (the layer is named).
    """
    if windows.ndim != 2 or windows.numel() == 0:
        raise ValueError(
            f"windows must be a non-empty (samples, length) matrix of token ids, got {tuple(windows.shape)}"
        )
    context, vocabulary = model.config.max_position_embeddings, model.config.vocab_size
    if windows.shape[1] > context:
        raise ValueError(f"seq-len {windows.shape[1]} is longer than the model's context of {context}")
    if windows.min() < 0 or windows.max() >= vocabulary:
        raise ValueError(
            f"windows hold token ids from {windows.min()} to {windows.max()}, the model's vocabulary has {vocabulary}"
        )
    was_training = model.training
    model.eval()
    batches = windows.split(max(1, tokens_per_batch // windows.shape[1]))
    try:
        with _summing_squares(model) as sums:
            for batch in tqdm(batches, desc="calibrate", unit="batch", disable=None if progress else True):
                model.model(input_ids=batch.to(model.device), use_cache=False)
    finally:
        model.train(was_training)

    for index, layer in enumerate(sums):
        for name, squares in layer.items():
            if not squares.isfinite().all():
                raise ValueError(f"layer {index}: the {name} activations are not finite; check the model's weights")
    heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
    layers = (
        LayerStatistics(
            query_pairs=_pairs(layer["query"], heads),
            key_pairs=_pairs(layer["key"], kv_heads),
            attention_output=layer["attention_output"].view(heads, -1),
            mlp=layer["mlp"],
        )
        for layer in sums
    )
    return Statistics(layers=tuple(layers), tokens=windows.numel())
