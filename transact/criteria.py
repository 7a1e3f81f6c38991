"""Criteria: how much each RoPE pair, value dimension and MLP dimension matters; higher is kept.

A criterion is a frozen dataclass whose fields are its settings and whose one method scores one layer. `CRITERIA` is
the one table of them: it feeds the command line, the ablation grid, the tests and the documentation.

Legend: H query heads, K key-value heads, V value dimensions, M MLP dimensions.
"""

import difflib
from dataclasses import dataclass, replace

import torch
from torch import nn

from .calibration import LayerStatistics
from .obs import ObsPruning
from .scores import (
    MOMENTS,
    STATISTICS,
    WEIGHT_GRADIENTS,
    LayerScores,
    inverse_with_ridge,
    mean_moments,
    pair_energy,
    standardised,
    value_moments,
)
from .walk import kv_heads_of


def _output_columns(layer: nn.Module, statistics: LayerStatistics, order: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms of the columns of `o_proj`, (H, V), and of `down_proj`, (M,), float64, where the statistics lie."""
    norms = [
        torch.linalg.vector_norm(linear.weight.detach().float(), ord=order, dim=0).to(statistics.mlp)
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj)
    ]
    return norms[0].view_as(statistics.attention_output), norms[1]


def _by_kv_head(per_query_head: torch.Tensor, statistics: LayerStatistics) -> torch.Tensor:
    """Sum over the query heads of each group: (H, V) -> (K, V)."""
    return per_query_head.unflatten(0, (len(statistics.key), -1)).sum(dim=1)


@dataclass(frozen=True)
class Activation:
    """the largest L2 norm over the calibration tokens (the paper's "acts"); pairs by norm of query times norm of key

    Shen et al., ACL Findings 2024. Under grouped-query attention the squares of a value dimension are summed over the
    query heads that read it.
    """

    needs = frozenset({STATISTICS})

    def score(self, layer: nn.Module, index: int, statistics: LayerStatistics) -> LayerScores:
        return LayerScores(
            rope_pairs=pair_energy(statistics), value_dims=statistics.values.sqrt(), mlp_dims=statistics.mlp.sqrt()
        )


@dataclass(frozen=True)
class Taylor:
    """the largest sum of |gradient x weight| over its rows and columns (the paper's rival; LLM-Pruner)

    The gradients' absolute values are summed over calibration batches. A key-value head's score sums everything
    that goes with it.
    """

    needs = frozenset({STATISTICS, WEIGHT_GRADIENTS})

    def score(self, layer: nn.Module, index: int, statistics: LayerStatistics) -> LayerScores:
        weights = statistics.gradients.weights
        kv_heads = len(statistics.key)

        def by_kv_head(scores: torch.Tensor) -> torch.Tensor:
            return scores.view(kv_heads, -1, scores.numel() // len(statistics.query)).sum(dim=1)

        query = by_kv_head(weights["q_proj"])
        pairs = (query + weights["k_proj"].view_as(query)).unflatten(1, (2, -1)).sum(dim=1)
        values = by_kv_head(weights["o_proj"])
        values = values + weights["v_proj"].view_as(values)
        return LayerScores(
            rope_pairs=pairs,
            value_dims=values,
            mlp_dims=weights["gate_proj"] + weights["up_proj"] + weights["down_proj"],
            kv_heads=pairs.sum(dim=1) + values.sum(dim=1),
        )


@dataclass(frozen=True)
class Magnitude:
    """the largest weights: L2 norm of its rows in q, k, v, gate, up and its columns in o, down

    The classical data-free score; it does not see what text does to the activations.
    """

    needs = frozenset()

    def score(self, layer: nn.Module, index: int, statistics: LayerStatistics | None = None) -> LayerScores:
        attention, mlp = layer.self_attn, layer.mlp
        kv_heads = kv_heads_of(layer)

        def squares(projection: nn.Linear, dim: int) -> torch.Tensor:
            return projection.weight.detach().float().square().sum(dim=dim)

        def by_kv_head(sums: torch.Tensor, width: int) -> torch.Tensor:
            return sums.view(kv_heads, -1, width).sum(dim=1)

        query_width = attention.k_proj.out_features // kv_heads
        value_width = attention.v_proj.out_features // kv_heads
        pairs = by_kv_head(squares(attention.q_proj, 1), query_width)
        pairs = pairs + by_kv_head(squares(attention.k_proj, 1), query_width)
        values = by_kv_head(squares(attention.v_proj, 1), value_width)
        values = values + by_kv_head(squares(attention.o_proj, 0), value_width)
        return LayerScores(
            rope_pairs=pairs.unflatten(1, (2, -1)).sum(dim=1).sqrt(),
            value_dims=values.sqrt(),
            mlp_dims=(squares(mlp.gate_proj, 1) + squares(mlp.up_proj, 1) + squares(mlp.down_proj, 0)).sqrt(),
        )


@dataclass(frozen=True)
class Wanda:
    """the largest activation norm x mean |weight| of the column that reads it (Wanda's, structured)

    Sun et al., ICLR 2024, as FLAP's authors make it structured. A head's score is the mean over its dimensions.
    """

    needs = frozenset({STATISTICS})

    def score(self, layer: nn.Module, index: int, statistics: LayerStatistics) -> LayerScores:
        output_norms, down_norms = _output_columns(layer, statistics, order=1)
        values = _by_kv_head(statistics.attention_output.sqrt() * output_norms, statistics)
        mlp = statistics.mlp.sqrt() * down_norms
        return LayerScores(pair_energy(statistics), values, mlp, kv_heads=values.mean(dim=1))


@dataclass(frozen=True)
class Fluctuation:
    """the largest variance of the activation x squared norm of the column that reads it (FLAP's)

    An et al., AAAI 2024: what is constant can be replaced by a bias. A head's score is the mean z-score of the
    dimensions of its query heads among those of the layer.
    """

    needs = frozenset({STATISTICS})

    def score(self, layer: nn.Module, index: int, statistics: LayerStatistics) -> LayerScores:
        output_norms, down_norms = _output_columns(layer, statistics, order=2)
        tokens = statistics.tokens
        variance = statistics.attention_output / tokens - (statistics.attention_output_sum / tokens).square()
        mlp_variance = statistics.mlp / tokens - (statistics.mlp_sum / tokens).square()
        values = variance * output_norms.square()
        heads = _by_kv_head(standardised(values), statistics).mean(dim=1) / (len(values) // len(statistics.key))
        return LayerScores(
            pair_energy(statistics), _by_kv_head(values, statistics), mlp_variance * down_norms.square(), kv_heads=heads
        )


@dataclass(frozen=True)
class Leverage:
    """the largest ridge leverage 1 - r [(C + r)^-1]_ii of the second moments C: what the others cannot replace

    MoDeGPT (Lin et al., ICLR 2025), type I, for MLP and values. `ridge` is relative to the mean of C's diagonal.
    """

    ridge: float = 1e-2
    needs = frozenset({STATISTICS, MOMENTS})

    def score(self, layer: nn.Module, index: int, statistics: LayerStatistics) -> LayerScores:
        return LayerScores(
            rope_pairs=pair_energy(statistics),
            value_dims=torch.stack([self._leverage(moments) for moments in value_moments(statistics)]),
            mlp_dims=self._leverage(mean_moments(statistics.mlp_moments)),
        )

    def _leverage(self, moments: torch.Tensor) -> torch.Tensor:
        ridge = self.ridge * moments.diagonal().mean()
        return 1 - ridge * inverse_with_ridge(moments, ridge.expand(len(moments))).diagonal()


@dataclass(frozen=True)
class PairEnergy:
    """the largest energy E[q_i^2] E[k_i^2] summed over a pair's dimensions (MoDeGPT's); others: E[x^2] |column|^2

    Lin et al., ICLR 2025, type II: the norms of columns of the square roots of query and key moments.
    """

    needs = frozenset({STATISTICS})

    def score(self, layer: nn.Module, index: int, statistics: LayerStatistics) -> LayerScores:
        output_norms, down_norms = _output_columns(layer, statistics, order=2)
        query = statistics.query.unflatten(0, (len(statistics.key), -1)).sum(dim=1)
        return LayerScores(
            rope_pairs=(query * statistics.key).unflatten(1, (2, -1)).sum(dim=1).sqrt(),
            value_dims=_by_kv_head(statistics.attention_output * output_norms.square(), statistics),
            mlp_dims=statistics.mlp * down_norms.square(),
        )


@dataclass(frozen=True)
class Random:
    """luck, by `seed`: the floor that a criterion must beat"""

    seed: int = 0
    needs = frozenset()

    def score(self, layer: nn.Module, index: int, statistics: LayerStatistics | None = None) -> LayerScores:
        attention, kv_heads = layer.self_attn, kv_heads_of(layer)
        # one generator a layer: the scores of a layer do not depend on which others are scored
        generator = torch.Generator().manual_seed(self.seed * 100_003 + index)
        return LayerScores(
            rope_pairs=torch.rand(kv_heads, attention.k_proj.out_features // kv_heads // 2, generator=generator),
            value_dims=torch.rand(kv_heads, attention.v_proj.out_features // kv_heads, generator=generator),
            mlp_dims=torch.rand(layer.mlp.down_proj.in_features, generator=generator),
        )


CRITERIA = {
    "activation": Activation(),
    "taylor": Taylor(),
    "magnitude": Magnitude(),
    "wanda": Wanda(),
    "fluctuation": Fluctuation(),
    "leverage": Leverage(),
    "obs": ObsPruning(),
    "predicted-loss": ObsPruning(weighted=True, value_basis=True),
    "pair-energy": PairEnergy(),
    "random": Random(),
}


def lookup(table: dict, name: str, what: str):
    """The table's entry. Raises ValueError with the allowed names, and the nearest of them, for any other name."""
    if name not in table:
        near = difflib.get_close_matches(name, table, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"unknown {what} {name!r}, allowed: {', '.join(table)}{hint}")
    return table[name]


def criterion_by_name(name: str, *, seed: int = 0, drops: bool = True) -> object:
    """The criterion of the table by its name. Raises as `lookup` does.

    `seed` goes to the one that draws numbers, `drops` to those that predict losses: whether whole modules may go.
    """
    criterion = lookup(CRITERIA, name, "criterion")
    if isinstance(criterion, ObsPruning):
        return replace(criterion, drops=drops)
    return replace(criterion, seed=seed) if isinstance(criterion, Random) else criterion
