"""What is kept: the best heads, RoPE pairs, value and MLP dimensions at given widths.

Indices are ascending. Query rows and `o_proj` columns follow from the key-value head and its group, so they are never
stored. Kept heads come first: rows of `rope_pairs` and `value_dims` belong to `kv_heads`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from transformers import PretrainedConfig

from .entry import counted
from .scores import LayerScores
from .widths import Widths, check_some_attention, widths_of


@dataclass(frozen=True)
class LayerPlan:
    """Kept indices of one layer, int64, ascending along the last dimension.

    `kv_heads` (kept heads,), `rope_pairs` (kept heads, pairs), `value_dims` (kept heads, dims), `mlp_dims` (dims,).
    Without `rope_pairs` queries and keys keep the dimensions of `value_dims`, as the paper's authors do ("released").
    Nothing is kept of a dropped module: heads have no dimensions, and no pairs, or there are no `mlp_dims`.
    Where values are kept along other axes than the model's, `value_into` and `value_back` (kept heads, V, dims) hold
    them: v_proj's rows become value_into^T rows, o_proj's columns columns value_back, and `value_dims` count axes.
    """

    kv_heads: torch.Tensor
    rope_pairs: torch.Tensor | None
    value_dims: torch.Tensor
    mlp_dims: torch.Tensor
    value_into: torch.Tensor | None = None
    value_back: torch.Tensor | None = None

    @property
    def widths(self) -> Widths:
        value_width = self.value_dims.shape[1]
        return Widths(
            kv_heads=len(self.kv_heads),
            qk_head_dim=value_width if self.rope_pairs is None else 2 * self.rope_pairs.shape[1],
            v_head_dim=value_width,
            mlp=len(self.mlp_dims),
        )

    def after(self, earlier: "LayerPlan", dense_value_width: int) -> "LayerPlan":
        """This plan, made for a model that `earlier` had narrowed, in terms of that model's dense one."""
        heads, value_dims = self.kv_heads, self.value_dims
        kept_before = earlier.value_dims[heads]
        bases = {}
        if self.value_into is not None or earlier.value_into is not None:
            for name in ("value_into", "value_back"):
                before = getattr(earlier, name)
                if before is None:
                    before = torch.nn.functional.one_hot(earlier.value_dims, dense_value_width).mT
                own = getattr(self, name)
                if own is None:
                    own = torch.nn.functional.one_hot(value_dims, kept_before.shape[1]).mT
                bases[name] = before[heads].float() @ own.float()
        pairs = None
        if self.rope_pairs is not None:
            pairs = earlier.rope_pairs[heads].gather(1, self.rope_pairs)
        return LayerPlan(
            kv_heads=earlier.kv_heads[heads],
            rope_pairs=pairs,
            value_dims=kept_before.gather(1, value_dims),
            mlp_dims=earlier.mlp_dims[self.mlp_dims],
            **bases,
        )


OPTIONAL = {"rope_pairs", "value_into", "value_back"}
KEPT_LAYERS = "kept_layers"


@dataclass(frozen=True)
class Plan:
    """One LayerPlan per decoder layer; where whole layers go, one per layer of those that `kept_layers` names."""

    layers: tuple[LayerPlan, ...]
    kept_layers: tuple[int, ...] | None = None

    @property
    def widths(self) -> tuple[Widths, ...]:
        return tuple(layer.widths for layer in self.layers)

    def after(self, earlier: "Plan", dense_value_width: int) -> "Plan":
        """This plan, made for a model that `earlier` had narrowed, in terms of that model's dense one."""
        pairs = zip(self.layers, earlier.layers, strict=True)
        return Plan(tuple(layer.after(before, dense_value_width) for layer, before in pairs))

    def tensors(self) -> dict[str, torch.Tensor]:
        """The plan as named tensors, `layers.{i}.kv_heads` and so on: what `pruning/plan.safetensors` holds."""
        whole = {} if self.kept_layers is None else {KEPT_LAYERS: torch.tensor(self.kept_layers)}
        return whole | {
            f"layers.{index}.{field.name}": getattr(layer, field.name).contiguous()
            for index, layer in enumerate(self.layers)
            for field in fields(LayerPlan)
            if getattr(layer, field.name) is not None
        }

    @classmethod
    def from_tensors(cls, tensors: dict[str, torch.Tensor]) -> "Plan":
        """The inverse of `tensors`. Raises ValueError where a layer or a part of it is missing."""
        names = [field.name for field in fields(LayerPlan)]
        kept_layers = tensors.get(KEPT_LAYERS)
        tensors = {name: tensor for name, tensor in tensors.items() if name != KEPT_LAYERS}
        count = 1 + max((int(name.split(".")[1]) for name in tensors), default=0)
        wanted = [f"layers.{i}.{name}" for i in range(count) for name in names if name not in OPTIONAL]
        missing = [name for name in wanted if name not in tensors]
        if missing:
            raise ValueError(f"not a plan: {missing[0]} is missing")
        return cls(
            tuple(LayerPlan(**{name: tensors.get(f"layers.{i}.{name}") for name in names}) for i in range(count)),
            None if kept_layers is None else tuple(kept_layers.tolist()),
        )

    def check(self, config: PretrainedConfig) -> None:
        """Raise ValueError, naming the layer and the part, unless every index lies in the model, ascending."""
        if len(self.layers) != config.num_hidden_layers:
            raise ValueError(f"the plan has {counted(len(self.layers), 'layer')}, the model {config.num_hidden_layers}")
        for index, (layer, current) in enumerate(zip(self.layers, widths_of(config), strict=True)):
            limits = {
                "kv_heads": current.kv_heads,
                "rope_pairs": current.qk_head_dim // 2,
                "value_dims": current.v_head_dim,
                "mlp_dims": current.mlp,
            }
            for name, limit in limits.items():
                kept = getattr(layer, name)
                if kept is not None:
                    _check_indices(f"layers.{index}.{name}", kept, limit)
                if name in ("rope_pairs", "value_dims") and kept is not None and len(kept) != len(layer.kv_heads):
                    raise ValueError(
                        f"layers.{index}.{name} must have one row for each of {len(layer.kv_heads)} kept "
                        "key-value heads"
                    )
            if layer.rope_pairs is not None and (layer.rope_pairs.numel() == 0) != (layer.value_dims.numel() == 0):
                raise ValueError(f"layers.{index}: of dropped attention neither rope_pairs nor value_dims are kept")
        check_some_attention(self.widths)


def kept_layers_of(config: PretrainedConfig) -> tuple[int, ...] | None:
    """The layers of the dense model that a stock model is made of, by its configuration; None where it says nothing."""
    kept = getattr(config, KEPT_LAYERS, None)
    if not isinstance(kept, list | tuple) or len(kept) != config.num_hidden_layers:
        return None
    return tuple(kept) if all(isinstance(layer, int) for layer in kept) else None


def _check_indices(where: str, kept: torch.Tensor, limit: int) -> None:
    dimensions, least = 2 if where.endswith(("rope_pairs", "value_dims")) else 1, int(where.endswith("kv_heads"))
    if kept.dtype != torch.int64 or kept.numel() < least or kept.ndim != dimensions:
        raise ValueError(
            f"{where} must hold {'at least one int64 index' if least else 'int64 indices'} in {dimensions} "
            f"dimension(s), got {kept.dtype} {tuple(kept.shape)}"
        )
    if not kept.numel():
        return
    if kept.min() < 0 or kept.max() >= limit:
        raise ValueError(f"{where} must lie in [0, {limit}), got {kept.min()} to {kept.max()}")
    if (kept.diff(dim=-1) <= 0).any():
        raise ValueError(f"{where} must be strictly ascending")


def select(scores: Sequence[LayerScores], widths: Sequence[Widths], *, rope: str = "pairs") -> Plan:
    """The plan that keeps, at these widths, what scores highest; ties go to the lower index.

    `rope` "released" lets queries and keys keep the value dimensions, whatever their pairs score.
    """
    return Plan(tuple(_select_layer(layer, wanted, rope) for layer, wanted in zip(scores, widths, strict=True)))


def _select_layer(scores: LayerScores, widths: Widths, rope: str) -> LayerPlan:
    heads = _best(scores.kv_heads, widths.kv_heads)
    values = _best(scores.value_dims[heads.to(scores.value_dims.device)], widths.v_head_dim)
    bases = {}
    if scores.value_basis is not None:
        for name in ("into", "back"):
            axes = getattr(scores.value_basis, name).cpu()[heads]
            kept = values[:, None, :].expand(-1, axes.shape[1], -1)
            bases[f"value_{name}"] = axes.gather(2, kept).float()
    pairs = scores.rope_pairs[heads.to(scores.rope_pairs.device)]
    return LayerPlan(
        kv_heads=heads,
        rope_pairs=None if rope == "released" else _best(pairs, widths.qk_head_dim // 2),
        value_dims=values,
        mlp_dims=_best(scores.mlp_dims, widths.mlp),
        **bases,
    )


def _best(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Ascending indices of the `count` highest scores along the last dimension, on the CPU."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    return order[..., :count].sort(dim=-1).values.cpu()
