"""Compensation: `o_proj` and `down_proj` are fitted anew, so that what was kept makes up for what was dropped.

Legend: T tokens, D hidden size, N inputs of a projection before pruning, n those that are kept.
"""

import warnings
from collections.abc import Sequence

import torch
from torch import nn

from .calibration import LayerStatistics, held_out_split
from .least_squares import Fit, NormalEquations, fit_projection
from .plan import LayerPlan, Plan
from .walk import LayerWalk, on_device


def token_scale(residual: torch.Tensor) -> torch.Tensor:
    """How much an error in each token of the residual stream counts: one over its root mean square, (T, 1) float32.

    The next normalisation divides by it, so the same error matters less in a large token. Some models have tokens
    (the first, most often) whose activations are hundreds of times those of others: unscaled they drown all others.
    """
    rows = residual.reshape(-1, residual.shape[-1]).float()
    return rows.square().mean(dim=1, keepdim=True).clamp(min=1e-12).rsqrt()


def _warn_if_few(tokens: int, narrowed: nn.Module) -> None:
    inputs = max(layer.mlp.down_proj.in_features for layer in narrowed.model.layers)
    if tokens < 4 * inputs:
        warnings.warn(
            f"{tokens} calibration tokens are few for least squares over {inputs} inputs: {4 * inputs} would do "
            "(more samples, or longer ones)",
            stacklevel=3,
        )


def _install(linear: nn.Linear, fit: Fit) -> None:
    linear.weight.copy_(fit.weight)
    if fit.bias is not None:
        linear.bias += fit.bias.to(linear.bias)


def _ensure_bias(narrowed: nn.Module) -> None:
    """Give every `o_proj` and `down_proj` a bias (zeros where there was none)."""
    narrowed.config.attention_output_bias = narrowed.config.mlp_output_bias = True
    for layer in narrowed.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            if linear.bias is None:
                linear.bias = nn.Parameter(torch.zeros_like(linear.weight[:, 0]))


def _kept_attention_inputs(plan: LayerPlan, group: int, value_width: int, kv_heads: int) -> torch.Tensor:
    """The map (N, n) from the attention output before to the one after pruning: it selects, or changes the basis."""
    into = plan.value_into
    if into is None:
        into = nn.functional.one_hot(plan.value_dims, value_width).mT
    kept = torch.zeros(kv_heads, group, value_width, len(into), group, into.shape[2], dtype=torch.float64)
    for position, head in enumerate(plan.kv_heads.tolist()):
        for member in range(group):
            kept[head, member, :, position, member] = into[position]
    return kept.flatten(3).flatten(0, 2)


@torch.no_grad()
def compensate_on_dense_inputs(
    narrowed: nn.Module,
    model: nn.Module,
    plan: Plan,
    statistics: Sequence[LayerStatistics],
    *,
    bias: bool = False,
    ridge: float | None = None,
) -> list[dict[str, float | None]]:
    """Refit `narrowed` in closed form by statistics of the `model` it was cut from with `plan`; the ridges chosen.

    Every projection is to give what it gave, from what was kept of the same inputs: x x^T is C[S, S] and x y^T is
    C[S, :] W^T, with second moments C of all inputs. Raises ValueError where there are none.
    """
    if any(layer.mlp_moments is None for layer in statistics):
        raise ValueError("least squares need second moments: calibrate(..., second_moments=True)")
    if bias:
        _ensure_bias(narrowed)
    _warn_if_few(statistics[0].tokens, narrowed)
    ridges = []
    for layer, before, kept, stats in zip(
        narrowed.model.layers, model.model.layers, plan.layers, statistics, strict=True
    ):
        device = before.mlp.down_proj.weight.device
        heads, value_width = stats.values.shape
        attention = _kept_attention_inputs(kept, len(stats.query) // heads, value_width, heads)
        outcome = {}
        for name, linear, old, moments, into in (
            ("o_proj", layer.self_attn.o_proj, before.self_attn.o_proj, stats.attention_moments, attention),
            ("down_proj", layer.mlp.down_proj, before.mlp.down_proj, stats.mlp_moments, kept.mlp_dims),
        ):
            parts = (NormalEquations.of_kept(part, into.to(device), old.weight) for part in moments if part.tokens)
            fit = fit_projection(linear.weight, *parts, bias=bias, ridge=ridge)
            _install(linear, fit)
            outcome[name] = fit.ridge
        ridges.append(outcome)
    return ridges


@torch.no_grad()
def compensate_by_bias(
    narrowed: nn.Module, model: nn.Module, plan: Plan, statistics: Sequence[LayerStatistics]
) -> None:
    """Add to the biases of `o_proj` and `down_proj` what the dropped inputs gave on average (FLAP)."""
    _ensure_bias(narrowed)
    for layer, before, kept, stats in zip(
        narrowed.model.layers, model.model.layers, plan.layers, statistics, strict=True
    ):
        heads, value_width = stats.values.shape
        attention = _kept_attention_inputs(kept, len(stats.query) // heads, value_width, heads)
        for linear, old, total, into in (
            (layer.self_attn.o_proj, before.self_attn.o_proj, stats.attention_output_sum.flatten(), attention),
            (layer.mlp.down_proj, before.mlp.down_proj, stats.mlp_sum, kept.mlp_dims),
        ):
            mean = (total / stats.tokens).to(old.weight.device)
            kept_mean = mean[into.to(mean.device)] if into.ndim == 1 else into.to(mean).T @ mean
            lost = old.weight.double() @ mean - linear.weight.double() @ kept_mean
            linear.bias += lost.to(linear.bias)


@torch.no_grad()
def compensate_on_pruned_inputs(
    narrowed: nn.Module,
    model: nn.Module,
    windows: torch.Tensor,
    *,
    bias: bool = False,
    ridge: float | None = None,
    device: torch.device | None = None,
    tokens_per_batch: int = 2048,
    progress: bool = False,
) -> list[dict[str, float | None]]:
    """Refit `narrowed` layer by layer on what its own earlier layers now give; the ridges chosen, by layer.

    The target of `o_proj` and `down_proj` is the residual stream of the `model` it was cut from, less that of the
    narrowed one before the projection, so every layer also makes up for the errors of those before it; the other
    projections read a linear guess of what the dense model's would read. Both models advance block by block
    (`LayerWalk`); see there for `device`. Both are in evaluation mode.
    """
    if bias:
        _ensure_bias(narrowed)
    _warn_if_few(windows.numel(), narrowed)
    per_batch = max(1, tokens_per_batch // windows.shape[1])
    parts = [part.split(per_batch) if len(part) else () for part in held_out_split(windows)]
    batches = [*parts[0], *parts[1]]
    held_out = [0] * len(parts[0]) + [1] * len(parts[1])
    target_walk, walk = LayerWalk(model, batches, device=device), LayerWalk(narrowed, batches, device=device)
    ridges = []
    for index, before in target_walk.blocks(desc="compensate", disable=None if progress else True):
        layer = narrowed.model.layers[index]
        attention, mlp = layer.self_attn, layer.mlp
        entering, middles = list(target_walk.hidden), []
        handle = before.post_attention_layernorm.register_forward_pre_hook(
            lambda module, inputs, into=middles: into.append(inputs[0])
        )
        for batch in range(len(batches)):
            target_walk.advance(index, before, batch)
        handle.remove()
        chosen = {}
        with on_device(layer, device):
            readers = (attention.q_proj, attention.k_proj, attention.v_proj)
            norms = layer.input_layernorm, before.input_layernorm
            chosen["qkv_proj"] = _restore_inputs(readers, norms, walk.hidden, entering, held_out, ridge)
            inputs = _attention_inputs(walk, index, layer)
            chosen["o_proj"] = _refit(attention.o_proj, inputs, walk, middles, held_out, bias, ridge)
            norms = layer.post_attention_layernorm, before.post_attention_layernorm
            chosen["gate_up_proj"] = _restore_inputs(
                (mlp.gate_proj, mlp.up_proj), norms, walk.hidden, middles, held_out, ridge
            )
            chosen["down_proj"] = _refit(
                mlp.down_proj, _mlp_inputs(walk, layer), walk, target_walk.hidden, held_out, bias, ridge
            )
        ridges.append(chosen)
    return ridges


def _restore_inputs(
    readers: Sequence[nn.Linear],
    norms: tuple[nn.Module, nn.Module],
    hidden: Sequence[torch.Tensor],
    targets: Sequence[torch.Tensor],
    held_out: Sequence[int],
    ridge: float | None,
) -> float | None:
    """Let projections read the best linear guess of the dense model's normalised residual stream; the ridge chosen.

    The map (D, D) that takes the narrowed model's normalised stream nearest to the dense model's is multiplied into
    the weights of all `readers` (their biases stay).
    """
    weight = readers[0].weight
    identity = torch.eye(weight.shape[1], device=weight.device)
    equations = [NormalEquations.empty(*identity.shape, weight.device) for _ in range(2)]
    for batch, (mine, dense) in enumerate(zip(hidden, targets, strict=True)):
        rows, wanted = norms[0](mine.to(weight.device)), norms[1](dense.to(weight.device))
        equations[held_out[batch]].add(rows.flatten(0, 1), wanted.flatten(0, 1))
    fit = fit_projection(identity, *equations, ridge=ridge)
    if fit.ridge is not None:
        for reader in readers:
            reader.weight.copy_(reader.weight.float() @ fit.weight.float())
    return fit.ridge


def _attention_inputs(walk: LayerWalk, index: int, layer: nn.Module):
    """For each batch, what enters `o_proj`, whose own product is left out."""
    attention = layer.self_attn
    projection, attention.o_proj = attention.o_proj, nn.Identity()
    device = projection.weight.device
    try:
        for batch, hidden in enumerate(walk.hidden):
            normalised = layer.input_layernorm(hidden.to(device))
            yield attention(hidden_states=normalised, **walk.arguments(index, batch, device))[0]
    finally:
        attention.o_proj = projection


def _mlp_inputs(walk: LayerWalk, layer: nn.Module):
    """For each batch, what enters `down_proj`."""
    mlp = layer.mlp
    for hidden in walk.hidden:
        normalised = layer.post_attention_layernorm(hidden.to(mlp.down_proj.weight.device))
        yield mlp.act_fn(mlp.gate_proj(normalised)) * mlp.up_proj(normalised)


def _refit(
    linear: nn.Linear,
    inputs,
    walk: LayerWalk,
    targets: Sequence[torch.Tensor],
    held_out: Sequence[int],
    bias: bool,
    ridge: float | None,
) -> float | None:
    """Refit one projection and add its new output to the narrowed model's residual stream; the ridge chosen."""
    device, size = linear.weight.device, (linear.in_features, linear.out_features)
    equations = [NormalEquations.empty(*size, device) for _ in range(2)]
    kept = []
    for batch, entering in enumerate(inputs):
        target = targets[batch].to(device).float()
        missing = target - walk.hidden[batch].to(device).float()
        if linear.bias is not None:
            missing = missing - linear.bias.float()
        equations[held_out[batch]].add(entering.flatten(0, 1), missing.flatten(0, 1), token_scale(target))
        kept.append(entering.to(walk.hidden[batch].device))
    fit = fit_projection(linear.weight, *equations, bias=bias, ridge=ridge)
    _install(linear, fit)
    for batch, entering in enumerate(kept):
        walk.hidden[batch] += linear(entering.to(device)).to(walk.hidden[batch].device)
    return fit.ridge
