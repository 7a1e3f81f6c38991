"""Criteria: how much each RoPE pair, value dimension and MLP dimension matters; higher is kept.

A criterion is a frozen dataclass whose fields are its settings and whose one method scores one layer. `CRITERIA` is
the one table of them: it feeds the command line, the ablation grid, the tests and the documentation.

Legend: H query heads, K key-value heads, G = H / K, P RoPE pairs of a head, V value dimensions, M MLP dimensions.
"""

import difflib
from dataclasses import dataclass

import torch
from torch import nn

from .calibration import LayerStatistics


@dataclass(frozen=True)
class LayerScores:
    """Scores of one layer, float32 or wider: `rope_pairs` (K, P), `value_dims` (K, V), `mlp_dims` (M,)."""

    rope_pairs: torch.Tensor
    value_dims: torch.Tensor
    mlp_dims: torch.Tensor


@dataclass(frozen=True)
class Activation:
    """L2 norm of each transitional activation over the calibration tokens (Shen et al., ACL Findings 2024, "acts").

    Under grouped-query attention the squares of a value dimension are summed over the query heads that read it. The
    attention output says nothing of queries and keys, so a RoPE pair is scored by sqrt(sum_q |q_pair|^2 |k_pair|^2):
    by Cauchy-Schwarz it bounds what the pair adds to the attention logits.
    """

    needs_statistics = True

    def score(self, layer: nn.Module, index: int, statistics: LayerStatistics) -> LayerScores:
        kv_heads = len(statistics.key_pairs)
        query = statistics.query_pairs.unflatten(0, (kv_heads, -1)).sum(dim=1)
        values = statistics.attention_output.unflatten(0, (kv_heads, -1)).sum(dim=1)
        return LayerScores(
            rope_pairs=(query * statistics.key_pairs).sqrt(), value_dims=values.sqrt(), mlp_dims=statistics.mlp.sqrt()
        )


@dataclass(frozen=True)
class Magnitude:
    """L2 norm of the weights that a dimension owns: its rows in q, k, v, gate, up and its columns in o, down.

    The classical data-free score; it does not see what text does to the activations.
    """

    needs_statistics = False

    def score(self, layer: nn.Module, index: int, statistics: LayerStatistics | None = None) -> LayerScores:
        attention, mlp = layer.self_attn, layer.mlp
        kv_heads = attention.config.num_key_value_heads
        head_dim = attention.head_dim

        def rows(projection: nn.Linear) -> torch.Tensor:
            return projection.weight.detach().float().square().sum(dim=1)

        def columns(projection: nn.Linear) -> torch.Tensor:
            return projection.weight.detach().float().square().sum(dim=0)

        def by_kv_head(squares: torch.Tensor) -> torch.Tensor:
            return squares.view(kv_heads, -1, head_dim).sum(dim=1)

        dims = by_kv_head(rows(attention.q_proj)) + by_kv_head(rows(attention.k_proj))
        values = by_kv_head(rows(attention.v_proj)) + by_kv_head(columns(attention.o_proj))
        return LayerScores(
            rope_pairs=dims.unflatten(1, (2, -1)).sum(dim=1).sqrt(),
            value_dims=values.sqrt(),
            mlp_dims=(rows(mlp.gate_proj) + rows(mlp.up_proj) + columns(mlp.down_proj)).sqrt(),
        )


@dataclass(frozen=True)
class Random:
    """Uniform random scores from `seed`: the floor that a criterion must beat."""

    seed: int = 0
    needs_statistics = False

    def score(self, layer: nn.Module, index: int, statistics: LayerStatistics | None = None) -> LayerScores:
        attention = layer.self_attn
        kv_heads, head_dim = attention.config.num_key_value_heads, attention.head_dim
        # one generator a layer: the scores of a layer do not depend on which others are scored
        generator = torch.Generator().manual_seed(self.seed * 100_003 + index)
        return LayerScores(
            rope_pairs=torch.rand(kv_heads, head_dim // 2, generator=generator),
            value_dims=torch.rand(kv_heads, head_dim, generator=generator),
            mlp_dims=torch.rand(layer.mlp.down_proj.in_features, generator=generator),
        )


CRITERIA = {"activation": Activation, "magnitude": Magnitude, "random": Random}


def criterion_by_name(name: str, *, seed: int = 0) -> Activation | Magnitude | Random:
    """The criterion of the table by its name; `seed` goes to the one that draws numbers.

    Raises ValueError with the allowed names, and the nearest of them, for any other name.
    """
    if name not in CRITERIA:
        near = difflib.get_close_matches(name, CRITERIA, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown criterion {name!r}, allowed: {', '.join(CRITERIA)}{hint}")
    return CRITERIA[name](seed=seed) if name == "random" else CRITERIA[name]()
