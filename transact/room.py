"""What pruning holds at the least beside the model: memory that will not do is known before the work begins."""

import warnings
from collections import Counter

import torch
from torch import nn
from transformers import PretrainedConfig

from .gradients import free_memory
from .recipe import Recipe
from .walk import HOST, hidden_bytes, resting_place
from .widths import dense_widths, linear_parameters

REFITTING, MEASURING = 9, 6  # matrices as large as a layer's second moments, a window's logits, that these hold at once


def pruned_home(model: nn.Module, recipe: Recipe, windows: torch.Tensor, kept: float) -> torch.device | None:
    """The host where a CUDA device does not hold the narrowed model beside the dense one and the work; else None.

    Of a model that is spread over several devices None. It warns where it is the host: the result will lie there.
    """
    device, config = model.device, model.config
    if device.type != "cuda" or len({parameter.device for parameter in model.parameters()}) > 1:
        return None
    needed = least_needed(model, recipe, windows.numel(), kept)[device]
    decoder = linear_parameters(config, dense_widths(config)) * next(model.parameters()).element_size()
    needed += sum(parameter.nbytes for parameter in model.parameters()) - decoder  # embeddings, which nothing narrows
    is_fitted, is_measured = recipe.needs_moments() or recipe.compensation == "pruned", recipe.measures(None)
    window = windows.shape[1] * config.vocab_size
    needed += 4 * max(is_fitted * REFITTING * _squares(config), is_measured * MEASURING * window)
    if needed <= free_memory(device):
        return None
    warnings.warn(
        f"{device} does not hold the dense and the pruned model at once: the pruned one stays in host memory",
        stacklevel=4,
    )
    return HOST


def check_room_to_prune(
    model: nn.Module,
    recipe: Recipe,
    tokens: int,
    kept: float,
    device: torch.device | None = None,
    home: torch.device | None = None,
) -> None:
    """Raise ValueError, naming the bytes, where a device or the host has less free than pruning holds at the least.

    `tokens` it is calibrated on, `kept` of the linear parameters stays. See `prune` for `device`, `pruned_home` for
    `home`.
    """
    for place, needed in least_needed(model, recipe, tokens, kept, device, home).items():
        free = free_memory(place)
        if needed > free:
            hint = "take fewer or shorter samples, or weights of 16 bits"
            if place.type != "cpu" and device is None:
                hint = "block by block (--layerwise, device=) it takes less"
            raise ValueError(
                f"pruning holds at least {needed / 2**30:.1f} GiB on {place} beside the model, "
                f"{free / 2**30:.1f} GiB are free: {hint}"
            )


def least_needed(
    model: nn.Module,
    recipe: Recipe,
    tokens: int,
    kept: float,
    device: torch.device | None = None,
    home: torch.device | None = None,
) -> Counter[torch.device]:
    """Bytes by place: the narrowed model, hidden states, a layer's second moments, and half of those of all layers.

    Of a model that is spread over several devices nothing is said. The narrowed one lies with the model, or at `home`.
    """
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return Counter()
    config, layers, computing = model.config, dense_widths(model.config), device or model.device
    size = next(model.parameters()).element_size()
    needed = Counter({home or model.device: kept * linear_parameters(config, layers) * size})
    if recipe.needs_moments() or recipe.compensation == "pruned":
        hidden = hidden_bytes(model, tokens)
        where = HOST if device is not None else resting_place(hidden, computing)
        needed[where] += hidden * (2 if recipe.compensation == "pruned" else 1)
    if recipe.needs_moments():
        squares = _squares(config)
        needed[computing] += 2 * 4 * squares  # of tokens that are fitted on and of those held out
        needed[HOST] += len(layers) * 2 * squares * (recipe.parts_kept(device) or 0)
    return needed


def _squares(config: PretrainedConfig) -> int:
    """Elements of a dense layer's second moments."""
    width = dense_widths(config)[0]
    return (config.num_attention_heads * width.v_head_dim) ** 2 + width.mlp**2
