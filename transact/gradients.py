"""One backward pass, block by block: how much does the language-model loss mind a change of each module?

Legend: T tokens, D hidden size, K key-value heads, G query heads a group, Q dimensions of a query or key head.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import psutil
import torch
from torch import nn
from tqdm.auto import tqdm

from .entry import (
    check_in_one_place,
    check_model,
    check_nothing_dropped,
    check_trainable,
    checked_windows,
    is_finite,
    undisturbed,
)
from .products import add_products, mirror
from .walk import HOST, LayerWalk, hidden_bytes, in_pieces, kv_heads_of, on_device, resting_place, sent

OUTPUTS_EVERY = 8  # every eighth window is enough for second moments of D-vectors
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class LayerGradients:
    """Gradients of the summed next-token loss (nats) in one layer, per token; float64, but for the two matrices.

    `attention_output` and `mlp_output` (D, D), float32 and in host memory, for there are those of every layer: second
    moments G of the gradient at the module's output; half of tr(G E[d d^T]) predicts the loss per token that a small
    error d of the output costs (empirical Fisher, its two factors taken as independent: K-FAC, Martens and Grosse 2015;
    for pruning LLMs van der Ouderaa et al., 2024).
    `rope_pairs` (K, Q / 2): half the second moment of the gradient of a gate on each query-key pair, the same for a
    pair that is removed.
    `weights`: by projection, |gradient| summed over batches, times |weight|, summed over the inputs of each output
    dimension (rows), or for `o_proj` and `down_proj` over the outputs of each input dimension (columns).
    """

    attention_output: torch.Tensor | None = None
    mlp_output: torch.Tensor | None = None
    rope_pairs: torch.Tensor | None = None
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def are_finite(self) -> bool:
        """Whether all values are."""
        found = self.attention_output, self.mlp_output, self.rope_pairs, *self.weights.values()
        return all(is_finite(one) for one in found if one is not None)


def loss_gradients(
    model: nn.Module,
    windows: torch.Tensor,
    *,
    of: str = "outputs",
    device: torch.device | None = None,
    tokens_per_batch: int = 2048,
    progress: bool = False,
) -> list[LayerGradients]:
    """Gradients of the next-token loss over `windows` (samples, length): one LayerGradients a layer.

    Each block is run again for its backward pass, so no more than one block's graph exists, and the inputs of all
    blocks are kept. `of` is "outputs" (every eighth window) or "weights" (all windows: Taylor importance, the
    paper's rival and LLM-Pruner's).

    Raises ValueError as `calibrate` does, and where memory does not hold the inputs of all blocks, naming what is
    needed.
    """
    if of not in ("outputs", "weights"):
        raise ValueError(f"gradients of {of!r} are not known, allowed: outputs, weights")
    check_model(model)
    check_nothing_dropped(model)
    check_in_one_place(model, device)
    check_trainable(model)
    with undisturbed(model):
        windows = checked_windows(model, windows)
        if windows.shape[1] < 2:
            raise ValueError("windows of one token have no next token, of whose loss there are gradients")
        if of == "outputs":
            windows = windows[::OUTPUTS_EVERY]
        check_room(model, windows, device, of)
        wanted_gradient = [parameter.requires_grad for parameter in model.parameters()]
        model.requires_grad_(False)
        try:
            return _by_layer(model, windows, of, device, tokens_per_batch, progress)
        finally:
            for parameter, wanted in zip(model.parameters(), wanted_gradient, strict=True):
                parameter.requires_grad_(wanted)


def _by_layer(
    model: nn.Module,
    windows: torch.Tensor,
    of: str,
    device: torch.device | None,
    tokens_per_batch: int,
    progress: bool,
) -> list[LayerGradients]:
    """All blocks forwards, keeping their inputs, then backwards, one after the other."""
    batches = windows.split(max(1, tokens_per_batch // windows.shape[1]))
    walk = LayerWalk(model, batches, device=device)
    bar = {"disable": None if progress else True}
    inputs = walk.inputs(desc="forward", **bar)
    with on_device(model.lm_head, device) as where, on_device(model.model.norm, device):
        above = _gradients_of_the_head(model, walk, batches, where)
    layers = model.model.layers
    result = []
    for index in tqdm(reversed(range(len(layers))), total=len(layers), desc="backward", unit="layer", **bar):
        with on_device(layers[index], device):
            walk.hidden = inputs.pop()
            backward = _of_outputs if of == "outputs" else _of_weights
            result.append(backward(walk, index, layers[index], above))
    return result[::-1]


def check_room(model: nn.Module, windows: torch.Tensor, device: torch.device | None, of: str = "outputs") -> None:
    """Raise ValueError, naming the bytes, where the inputs of all blocks do not fit into free memory."""
    layers, hidden = len(model.model.layers), hidden_bytes(model, windows.numel())
    where = HOST if device is not None else resting_place(layers * hidden, model.device)
    needed = (layers + 2) * hidden
    if of == "outputs" and where.type == "cpu":
        needed += layers * 2 * 4 * model.config.hidden_size**2  # what comes of all blocks
    weights = sum(p.numel() for p in model.model.layers[0].parameters())
    needed += weights * (next(model.parameters()).element_size() + 8)  # one block's gradients, and their sums
    free = free_memory(where)
    if needed > free:
        raise ValueError(
            f"gradients over {windows.numel():,} tokens need {needed / 2**30:.1f} GiB of memory beside the model, "
            f"{free / 2**30:.1f} GiB are free: take fewer or shorter samples, or a criterion without gradients"
        )


def free_memory(device: torch.device) -> int:
    """Bytes free on a device, those included that torch holds and no tensor uses."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available


def _gradients_of_the_head(
    model: nn.Module, walk: LayerWalk, batches: Sequence[torch.Tensor], where: torch.device
) -> list[torch.Tensor]:
    """Gradient of the summed loss at the last block's output, for each batch."""
    gradients, head = [], model.lm_head
    for hidden, batch in zip(walk.hidden, batches, strict=True):
        hidden = sent(hidden.detach(), where).requires_grad_()
        pieces = in_pieces(hidden[:, :-1], head), in_pieces(batch[:, 1:].to(where), head)
        for rows, ids in zip(*pieces, strict=True):  # one by one: logits are the largest
            logits = head(model.model.norm(rows)).float()
            nn.functional.cross_entropy(logits, ids, reduction="sum").backward()
        gradients.append(hidden.grad.to(walk.hidden[0]))
    return gradients


def _of_outputs(walk: LayerWalk, index: int, layer: nn.Module, above: list[torch.Tensor]) -> LayerGradients:
    attention, seen = layer.self_attn, {}

    def keep(module: nn.Module, inputs, output: torch.Tensor):
        output.retain_grad()
        seen[module] = output

    handles = [module.register_forward_hook(keep) for module in (attention.o_proj, attention.q_proj)]
    handles.append(layer.mlp.down_proj.register_forward_hook(keep))
    config = walk.model.config
    size, where = (config.hidden_size, config.hidden_size), attention.o_proj.weight.device
    moments = {module: torch.zeros(size, device=where) for module in (attention.o_proj, layer.mlp.down_proj)}
    pairs, tokens = 0, 0
    group = config.num_attention_heads // config.num_key_value_heads
    width = attention.q_proj.out_features // (group * kv_heads_of(layer))
    try:
        for batch in range(len(above)):
            walk.back(index, layer, above, batch)
            for module, sums in moments.items():
                add_products(sums, seen[module].grad.flatten(0, 1))
            query = seen[attention.q_proj]
            gates = (query.grad * query.detach()).float().flatten(0, 1).unflatten(1, (-1, group, 2, width // 2))
            pairs = pairs + gates.sum(dim=(2, 3)).square().sum(dim=0).double()
            tokens += len(gates)
            seen.clear()
    finally:
        for handle in handles:
            handle.remove()
    for sums in moments.values():
        mirror(sums)
    return LayerGradients(
        attention_output=moments[attention.o_proj].div_(tokens).to(HOST),
        mlp_output=moments[layer.mlp.down_proj].div_(tokens).to(HOST),
        rope_pairs=pairs / tokens / 2,
    )


def _of_weights(walk: LayerWalk, index: int, layer: nn.Module, above: list[torch.Tensor]) -> LayerGradients:
    linears = {name: getattr(layer.mlp if name in PROJECTIONS[4:] else layer.self_attn, name) for name in PROJECTIONS}
    sums = {name: torch.zeros_like(linear.weight, dtype=torch.float32) for name, linear in linears.items()}
    left_over = {linear: linear.weight.grad for linear in linears.values()}  # the user's, from training
    for linear in linears.values():
        linear.weight.requires_grad_(True)
        linear.weight.grad = None
    for batch in range(len(above)):
        walk.back(index, layer, above, batch)
        for name, linear in linears.items():
            sums[name] += linear.weight.grad.abs()
            linear.weight.grad = None
    weights = {}
    for name, linear in linears.items():
        linear.weight.requires_grad_(False)
        linear.weight.grad = left_over[linear]
        importance = sums[name] * linear.weight.abs()
        weights[name] = importance.sum(dim=0 if name in ("o_proj", "down_proj") else 1).double()
    return LayerGradients(weights=weights)
