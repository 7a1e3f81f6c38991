"""What pruning holds at the least beside the model: memory that will not do is known before the work begins."""

from collections import Counter

import torch
from torch import nn

from .gradients import free_memory
from .recipe import Recipe
from .walk import HOST, hidden_bytes, resting_place
from .widths import dense_widths, linear_parameters


def check_room_to_prune(
    model: nn.Module, recipe: Recipe, tokens: int, kept: float, device: torch.device | None = None
) -> None:
    """Raise ValueError, naming the bytes, where a device or the host has less free than pruning holds at the least.

    `tokens` it is calibrated on, `kept` of the linear parameters stays. See `prune` for `device`.
    """
    for place, needed in least_needed(model, recipe, tokens, kept, device).items():
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
    model: nn.Module, recipe: Recipe, tokens: int, kept: float, device: torch.device | None = None
) -> Counter[torch.device]:
    """Bytes by place: the narrowed model, hidden states, a layer's second moments, and half of those of all layers.

    Of a model that is spread over several devices nothing is said.
    """
    if len({parameter.device for parameter in model.parameters()}) > 1:
        return Counter()
    config, layers, computing = model.config, dense_widths(model.config), device or model.device
    needed = Counter({model.device: kept * linear_parameters(config, layers) * next(model.parameters()).element_size()})
    if recipe.needs_moments() or recipe.compensation == "pruned":
        hidden = hidden_bytes(model, tokens)
        where = HOST if device is not None else resting_place(hidden, computing)
        needed[where] += hidden * (2 if recipe.compensation == "pruned" else 1)
    if recipe.needs_moments():
        squares = (config.num_attention_heads * layers[0].v_head_dim) ** 2 + layers[0].mlp ** 2
        needed[computing] += 2 * 4 * squares  # of tokens that are fitted on and of those held out
        needed[HOST] += len(layers) * 2 * squares * (recipe.parts_kept(device) or 0)
    return needed
