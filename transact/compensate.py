"""Compensation: `o_proj` and `down_proj` are fitted anew, so that what was kept makes up for what was dropped.

Legend: T tokens, D hidden size, N inputs of a projection before pruning, n those that are kept.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from .calibration import LayerStatistics, held_out_split
from .least_squares import Fit, NormalEquations, fit_projection
from .plan import LayerPlan, Plan
from .walk import LayerWalk, is_small, on_device, sent

READ_EVERY = 4  # of so many tokens one is enough for maps of what is read: SmolLM2 loses .0005 nats, of 16,384 tokens


def token_scale(residual: torch.Tensor) -> torch.Tensor:
    """How much an error in each token of the residual stream counts: one over its root mean square, (T, 1) float32.

    The next normalisation divides by it, so the same error matters less in a large token. Some models have tokens
    (the first, most often) whose activations are hundreds of times those of others: unscaled they drown all others.
    """
    rows = residual.reshape(-1, residual.shape[-1]).float()
    return rows.square().mean(dim=1, keepdim=True).clamp(min=1e-12).rsqrt()


def _warn_if_few(tokens: int, narrowed: nn.Module) -> None:
    inputs = max((layer.mlp.down_proj.in_features for layer in narrowed.model.layers if layer.mlp), default=0)
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


def _outputs(layer: nn.Module) -> dict[str, nn.Linear]:
    """The projections that write into the residual stream: `o_proj` and `down_proj`, of modules that are there."""
    modules = {"o_proj": layer.self_attn, "down_proj": layer.mlp}
    return {name: getattr(module, name) for name, module in modules.items() if module is not None}


def _ensure_bias(narrowed: nn.Module) -> None:
    """Give every `o_proj` and `down_proj` a bias (zeros where there was none)."""
    narrowed.config.attention_output_bias = narrowed.config.mlp_output_bias = True
    for layer in narrowed.model.layers:
        for linear in _outputs(layer).values():
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
        outcome, sources = {}, {
            "o_proj": (before.self_attn.o_proj, stats.attention_moments, attention),
            "down_proj": (before.mlp.down_proj, stats.mlp_moments, kept.mlp_dims),
        }  # fmt: skip
        for name, linear in _outputs(layer).items():
            old, moments, into = sources[name]
            with on_device(linear, device, changes=True):
                prior = linear.weight
                parts = [
                    NormalEquations.of_lost(part, into.to(device), old.weight, prior) for part in moments if part.tokens
                ]
                change = fit_projection(torch.zeros_like(prior), *parts, bias=bias, ridge=ridge)
                fit = replace(change, weight=change.weight + prior)
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
        sources = {
            "o_proj": (before.self_attn.o_proj, stats.attention_output_sum.flatten(), attention),
            "down_proj": (before.mlp.down_proj, stats.mlp_sum, kept.mlp_dims),
        }
        for name, linear in _outputs(layer).items():
            old, total, into = sources[name]
            mean = (total / stats.tokens).to(old.weight.device)
            kept_mean = mean[into.to(mean.device)] if into.ndim == 1 else into.to(mean).T @ mean
            lost = old.weight.double() @ mean - linear.weight.to(mean) @ kept_mean
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
    narrowed one before the projection, so every layer also makes up for the errors of those before it, dropped modules
    among them; the other projections read a linear guess of what the dense model's would read. Both models advance
    block by block (`LayerWalk`); see there for `device`. Both are in evaluation mode.
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
        layer, chosen = narrowed.model.layers[index], {}
        with on_device(layer, device, changes=True):
            for name, half, its in (
                ("qkv", _Attention(walk, index, layer), _Attention(target_walk, index, before)),
                ("gate_up", _Mlp(walk, index, layer), _Mlp(target_walk, index, before)),
            ):
                if half.norm is None:  # dropped: layers after it make up for what it gave
                    its.advance()
                    continue
                chosen[f"{name}_proj"] = _restore_inputs(half, its, held_out, ridge)
                its.advance()
                chosen[half.output] = _refit(half, its, held_out, bias, ridge)
        ridges.append(chosen)
    return ridges


@dataclass(frozen=True)
class _Half:
    """The attention or the MLP of a block, which reads the normalised residual stream and adds its output to it."""

    walk: LayerWalk
    index: int
    layer: nn.Module

    def stream(self, batch: int) -> torch.Tensor:
        """A batch's residual stream, where the block lies."""
        return sent(self.walk.hidden[batch], self.norm.weight.device)

    def normalised(self, batch: int) -> torch.Tensor:
        return self.norm(self.stream(batch))

    def add(self, batch: int, output: torch.Tensor) -> None:
        """Add the output to a batch's residual stream, in place."""
        self.walk.hidden[batch].copy_(self.stream(batch) + output)

    def advance(self) -> None:
        """Add its own output to the residual stream of every batch."""
        for batch in range(len(self.walk.hidden)):
            self.add(batch, self.given(batch))


class _Attention(_Half):
    output = "o_proj"

    @property
    def norm(self) -> nn.Module:
        return self.layer.input_layernorm

    @property
    def readers(self) -> tuple[nn.Linear, ...]:
        attention = self.layer.self_attn
        return attention.q_proj, attention.k_proj, attention.v_proj

    @property
    def projection(self) -> nn.Linear:
        return self.layer.self_attn.o_proj

    def given(self, batch: int) -> torch.Tensor:
        normalised = self.normalised(batch)
        arguments = self.walk.arguments(self.index, batch, normalised.device)
        return self.layer.self_attn(hidden_states=normalised, **arguments)[0]

    def entering(self, batch: int) -> torch.Tensor:
        """What enters the projection, whose own product is left out."""
        attention = self.layer.self_attn
        projection, attention.o_proj = attention.o_proj, nn.Identity()
        try:
            return self.given(batch)
        finally:
            attention.o_proj = projection


class _Mlp(_Half):
    output = "down_proj"

    @property
    def norm(self) -> nn.Module:
        return self.layer.post_attention_layernorm

    @property
    def readers(self) -> tuple[nn.Linear, ...]:
        return self.layer.mlp.gate_proj, self.layer.mlp.up_proj

    @property
    def projection(self) -> nn.Linear:
        return self.layer.mlp.down_proj

    def given(self, batch: int) -> torch.Tensor:
        return self.layer.mlp(self.normalised(batch))

    def entering(self, batch: int) -> torch.Tensor:
        """What enters the projection."""
        mlp, normalised = self.layer.mlp, self.normalised(batch)
        return mlp.act_fn(mlp.gate_proj(normalised)) * mlp.up_proj(normalised)


def _every(step: int, windows: int, length: int, first: int) -> torch.Tensor:
    """Which of the tokens of windows, one after the other, are one of `step`: of every window from another place on.

    The `first` window begins where as many before it left off, so that no place in the window counts more than others.
    """
    turns = first + torch.arange(windows)[:, None] + torch.arange(length)
    return (turns % step == 0).flatten().nonzero().squeeze(1)


def _restore_inputs(half: _Half, its: _Half, held_out: Sequence[int], ridge: float | None) -> float | None:
    """Let projections read the best linear guess of the dense model's normalised residual stream; the ridge chosen.

    The map (D, D) that takes the narrowed model's normalised stream nearest to the dense model's is multiplied into
    the weights of all readers (their biases stay). `its` is the dense model's half.
    """
    weight = half.readers[0].weight
    identity = torch.eye(weight.shape[1], device=weight.device)
    equations = [NormalEquations.empty(*identity.shape, weight.device) for _ in range(2)]
    tokens = sum(hidden.shape[:2].numel() for hidden in half.walk.hidden)
    every = max(1, min(READ_EVERY, tokens // (6 * len(identity))))  # at least six tokens an input, as far as there are
    for batch, part in enumerate(held_out):
        read = _every(every, *half.walk.hidden[batch].shape[:2], batch)
        rows, wanted = (one.norm(one.stream(batch).flatten(0, 1)[read]) for one in (half, its))
        equations[part].add(rows, wanted.to(weight.device))
    fit = fit_projection(identity, *equations, ridge=ridge)
    if fit.ridge is not None:
        for reader in half.readers:
            reader.weight.copy_(reader.weight.float() @ fit.weight.float())
    return fit.ridge


def _refit(half: _Half, its: _Half, held_out: Sequence[int], bias: bool, ridge: float | None) -> float | None:
    """Refit the projection and add its new output to the narrowed model's residual stream; the ridge chosen.

    The target is the residual stream of the dense model, whose half `its` has been added to it.
    """
    linear, kept = half.projection, []
    streams = sum(hidden.numel() for hidden in half.walk.hidden) * linear.weight.element_size()
    size = 2 * streams + streams * linear.in_features // linear.out_features  # of both models, and what would be kept
    is_kept = is_small(size, linear.weight.device) and half.walk.hidden[0].device == linear.weight.device
    equations = [NormalEquations.empty(linear.in_features, linear.out_features, linear.weight.device) for _ in range(2)]
    for batch, part in enumerate(held_out):
        entering, target = half.entering(batch), its.stream(batch).to(linear.weight.device).float()
        missing = target - half.stream(batch).float()
        if linear.bias is not None:
            missing = missing - linear.bias.float()
        equations[part].add(entering.flatten(0, 1), missing.flatten(0, 1), token_scale(target))
        if is_kept:
            kept.append(entering)
    fit = fit_projection(linear.weight, *equations, bias=bias, ridge=ridge)
    del equations
    _install(linear, fit)
    for batch in range(len(held_out)):  # what is not kept is computed once more: that takes less time than to move it
        half.add(batch, linear(kept[batch] if is_kept else half.entering(batch)))
    return fit.ridge
