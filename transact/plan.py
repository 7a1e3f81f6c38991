"""What is kept: widths that meet a budget, and the best dimensions at those widths.

Indices are always in terms of the dense model and ascending. Query rows and `o_proj` columns follow from the
key-value head and its group, so they are never stored.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch
from transformers import LlamaConfig

from .criteria import LayerScores


@dataclass(frozen=True)
class Widths:
    """Widths of one layer: key-value heads, dimensions of a query or key head, of a value head, and of the MLP."""

    kv_heads: int
    qk_head_dim: int
    v_head_dim: int
    mlp: int


@dataclass(frozen=True)
class LayerPlan:
    """Kept indices of one layer, int64, ascending along the last dimension.

    `kv_heads` (kept heads,), `rope_pairs` (kept heads, pairs), `value_dims` (kept heads, dims), `mlp_dims` (dims,).
    """

    kv_heads: torch.Tensor
    rope_pairs: torch.Tensor
    value_dims: torch.Tensor
    mlp_dims: torch.Tensor

    @property
    def widths(self) -> Widths:
        return Widths(
            kv_heads=len(self.kv_heads),
            qk_head_dim=2 * self.rope_pairs.shape[1],
            v_head_dim=self.value_dims.shape[1],
            mlp=len(self.mlp_dims),
        )


@dataclass(frozen=True)
class Plan:
    """One LayerPlan per decoder layer."""

    layers: tuple[LayerPlan, ...]

    @property
    def widths(self) -> tuple[Widths, ...]:
        return tuple(layer.widths for layer in self.layers)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The plan as named tensors, `layers.{i}.kv_heads` and so on: what `plan.safetensors` holds."""
        return {
            f"layers.{index}.{field.name}": getattr(layer, field.name).contiguous()
            for index, layer in enumerate(self.layers)
            for field in fields(LayerPlan)
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> "Plan":
        """The inverse of `tensors`. Raises ValueError where a layer or a part of it is missing."""
        names = [field.name for field in fields(LayerPlan)]
        count = len(tensors) // len(names)
        missing = [f"layers.{i}.{name}" for i in range(count) for name in names if f"layers.{i}.{name}" not in tensors]
        if missing or not tensors:
            raise ValueError(f"not a plan: {missing[0] if missing else 'layers.0.kv_heads'} is missing")
        return cls(tuple(LayerPlan(**{name: tensors[f"layers.{i}.{name}"] for name in names}) for i in range(count)))

    def check(self, config: LlamaConfig) -> None:
        """Raise ValueError, naming the layer and the part, unless every index lies in the dense model, ascending."""
        if len(self.layers) != config.num_hidden_layers:
            raise ValueError(f"the plan has {len(self.layers)} layers, the model {config.num_hidden_layers}")
        limits = {
            "kv_heads": config.num_key_value_heads,
            "rope_pairs": config.head_dim // 2,
            "value_dims": config.head_dim,
            "mlp_dims": config.intermediate_size,
        }
        for index, layer in enumerate(self.layers):
            for name, limit in limits.items():
                kept = getattr(layer, name)
                where = f"layers.{index}.{name}"
                if kept.dtype != torch.int64 or kept.numel() == 0:
                    raise ValueError(
                        f"{where} must hold at least one int64 index, got {kept.dtype} {tuple(kept.shape)}"
                    )
                if kept.min() < 0 or kept.max() >= limit:
                    raise ValueError(f"{where} must lie in [0, {limit}), got {kept.min()} to {kept.max()}")
                if (kept.diff(dim=-1) <= 0).any():
                    raise ValueError(f"{where} must be strictly ascending")
                if name in ("rope_pairs", "value_dims") and (kept.ndim != 2 or len(kept) != len(layer.kv_heads)):
                    raise ValueError(
                        f"{where} must have one row for each of {len(layer.kv_heads)} kept key-value heads"
                    )


def dense_widths(config: LlamaConfig) -> tuple[Widths, ...]:
    """The widths of the unpruned model, layer by layer."""
    widths = Widths(config.num_key_value_heads, config.head_dim, config.head_dim, config.intermediate_size)
    return (widths,) * config.num_hidden_layers


def widths_of(config: LlamaConfig) -> tuple[Widths, ...]:
    """The widths of a model by its configuration, narrowed or dense."""
    if not hasattr(config, "kv_head_counts"):
        return dense_widths(config)
    lists = (config.kv_head_counts, config.qk_head_dims, config.v_head_dims, config.intermediate_sizes)
    return tuple(Widths(*widths) for widths in zip(*lists, strict=True))


def linear_parameters(config: LlamaConfig, widths: Sequence[Widths]) -> int:
    """Weights of the decoder layers' linear modules at these widths: what `ratio` is a fraction of."""
    group = config.num_attention_heads // config.num_key_value_heads
    return sum(
        config.hidden_size * (w.kv_heads * (group + 1) * (w.qk_head_dim + w.v_head_dim) + 3 * w.mlp) for w in widths
    )


def fraction_removed(config: LlamaConfig, widths: Sequence[Widths]) -> float:
    """Fraction of the decoder layers' linear parameters that these widths remove."""
    return 1 - linear_parameters(config, widths) / linear_parameters(config, dense_widths(config))


def kv_elements_per_token(widths: Sequence[Widths]) -> int:
    """Elements that one token adds to the KV cache, over all layers."""
    return sum(w.kv_heads * (w.qk_head_dim + w.v_head_dim) for w in widths)


def widths_by_name(
    config: LlamaConfig, *, mha_dim: int | None = None, mlp_dim: int | None = None
) -> tuple[Widths, ...]:
    """The same widths in every layer, named as the paper does: A = heads x head width, and M.

    What is left out stays whole. Raises ValueError where a width is wider than the model's, not positive, or where
    `mha_dim` does not give every head the same even width.
    """
    heads, dense = config.num_attention_heads, dense_widths(config)[0]
    mha_dim = heads * config.head_dim if mha_dim is None else mha_dim
    mlp_dim = config.intermediate_size if mlp_dim is None else mlp_dim
    if not 1 <= mlp_dim <= config.intermediate_size:
        raise ValueError(f"mlp-dim must lie between 1 and the model's {config.intermediate_size}, got {mlp_dim}")
    if not 1 <= mha_dim <= heads * config.head_dim or mha_dim % (2 * heads):
        raise ValueError(
            f"mha-dim must be a multiple of {2 * heads} (an even width for each of {heads} heads) "
            f"up to the model's {heads * config.head_dim}, got {mha_dim}"
        )
    width = mha_dim // heads
    return (replace(dense, qk_head_dim=width, v_head_dim=width, mlp=mlp_dim),) * config.num_hidden_layers


def uniform_widths(
    config: LlamaConfig, ratio: float, *, head_multiple: int = 8, mlp_multiple: int = 64, tolerance: float = 0.005
) -> tuple[Widths, ...]:
    """Widths that remove `ratio` of the decoder layers' linear parameters, the same share of every module.

    Head widths are rounded to `head_multiple`. The MLPs take up what that gives or takes: their widths are multiples
    of `mlp_multiple`, and where the remainder does not divide evenly some layers, spread over the depth, get one
    multiple more. In a model too small to come within `tolerance` of the ratio with these multiples, they are halved
    until it does. Raises ValueError for a ratio outside [0, 1) or beyond reach.
    """
    if not 0 <= ratio < 1:
        raise ValueError(f"ratio is the fraction removed and must lie in [0, 1), got {ratio}")
    for name, multiple in (("head_multiple", head_multiple), ("mlp_multiple", mlp_multiple)):
        if multiple < 1:
            raise ValueError(f"{name} must be at least 1, got {multiple}")
    if ratio == 0:
        return dense_widths(config)
    # head widths give way last: they are what attention kernels want aligned
    for heads, mlp in itertools.product(_halvings(head_multiple, 2), _halvings(mlp_multiple, 1)):
        widths = _rounded_widths(config, ratio, heads, mlp)
        removed = fraction_removed(config, widths)
        if abs(removed - ratio) <= tolerance:
            return widths
    raise ValueError(f"ratio {ratio} is out of reach: the narrowest modules of this model remove {removed:.3f}")


def _halvings(multiple: int, least: int) -> list[int]:
    """The multiple, half of it, and so on down to `least`."""
    return [multiple] if multiple <= least else [multiple, *_halvings(multiple // 2, least)]


def _rounded_widths(config: LlamaConfig, ratio: float, head_multiple: int, mlp_multiple: int) -> tuple[Widths, ...]:
    """The widths nearest to the ratio at these multiples, whatever fraction they remove."""
    layers, dense = config.num_hidden_layers, dense_widths(config)[0]
    step = math.lcm(2, head_multiple)
    head_width = round((1 - ratio) * config.head_dim / step) * step
    head_width = min(config.head_dim, max(step, head_width))
    narrow_heads = replace(dense, qk_head_dim=head_width, v_head_dim=head_width, mlp=0)
    budget = (1 - ratio) * linear_parameters(config, dense_widths(config))
    mlp_total = (budget - linear_parameters(config, [narrow_heads] * layers)) / (3 * config.hidden_size)
    multiples = min(layers * (config.intermediate_size // mlp_multiple), max(layers, round(mlp_total / mlp_multiple)))
    # boundaries of an even split: consecutive differences are the quotient or one more, spread over the depth
    boundaries = [multiples * index // layers for index in range(layers + 1)]
    counts = [after - before for before, after in itertools.pairwise(boundaries)]
    return tuple(replace(narrow_heads, mlp=min(config.intermediate_size, count * mlp_multiple)) for count in counts)


def select(scores: Sequence[LayerScores], widths: Sequence[Widths]) -> Plan:
    """The plan that keeps, at these widths, what scores highest; ties go to the lower index."""
    return Plan(tuple(_select_layer(layer, wanted) for layer, wanted in zip(scores, widths, strict=True)))


def _select_layer(scores: LayerScores, widths: Widths) -> LayerPlan:
    return LayerPlan(
        kv_heads=torch.arange(widths.kv_heads),
        rope_pairs=_best(scores.rope_pairs, widths.qk_head_dim // 2),
        value_dims=_best(scores.value_dims, widths.v_head_dim),
        mlp_dims=_best(scores.mlp_dims, widths.mlp),
    )


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Ascending indices of the `count` highest scores along the last dimension, on the CPU."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[..., :count].sort(dim=-1).values.cpu()
