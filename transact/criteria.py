"""Criteria: how much each RoPE pair, value dimension and MLP dimension matters; higher is kept.

A criterion is a frozen dataclass whose fields are its settings and whose one method scores one layer. `CRITERIA` is
the one table of them: it feeds the command line, the ablation grid, the tests and the documentation.

Legend: D hidden size, H query heads, K key-value heads, G = H / K, P RoPE pairs of a head, V value dimensions, M MLP
dimensions.
"""

import difflib
from dataclasses import dataclass, replace

import torch
from torch import nn

from .calibration import LayerStatistics, Moments
from .walk import kv_heads_of

# what a criterion may need to be told, beside the weights
STATISTICS, MOMENTS, OUTPUT_GRADIENTS, WEIGHT_GRADIENTS = "statistics", "moments", "outputs", "weights"


@dataclass(frozen=True)
class ValueBasis:
    """Another basis of the values of each key-value head, float64: `into` and `back`, (K, V, V).

    Values are mapped by v -> into^T v and read back by `o_proj`'s columns times `back`; into back^T = 1, so nothing
    changes while all V dimensions are kept. Dimensions are in falling order of what dropping them costs.
    """

    into: torch.Tensor
    back: torch.Tensor


@dataclass(frozen=True)
class LayerScores:
    """Scores of one layer: `rope_pairs` (K, P), `value_dims` (K, V), `mlp_dims` (M,), and of whole heads, (K,).

    Left out, the head score is the paper's: mean over the head's value dimensions + (10 / V) x their maximum.
    `value_dims` are those of `value_basis` where there is one.
    """

    rope_pairs: torch.Tensor
    value_dims: torch.Tensor
    mlp_dims: torch.Tensor
    kv_heads: torch.Tensor | None = None
    value_basis: ValueBasis | None = None

    def __post_init__(self):
        if self.kv_heads is None:
            object.__setattr__(self, "kv_heads", head_scores(self.value_dims))


def head_scores(value_dims: torch.Tensor) -> torch.Tensor:
    """Scores of whole heads from those of their dimensions, (heads, V) -> (heads,) (the paper, "Importance")."""
    return value_dims.mean(dim=1) + 10 / value_dims.shape[1] * value_dims.max(dim=1).values


def pair_energy(statistics: LayerStatistics) -> torch.Tensor:
    """sqrt(sum over a group's queries of |q_pair|^2 |k_pair|^2), (K, P).

    By Cauchy-Schwarz it bounds what the pair adds to the attention logits; the attention output says nothing of it.
    """
    query = statistics.query_pairs.unflatten(0, (len(statistics.key), -1)).sum(dim=1)
    return (query * statistics.key_pairs).sqrt()


def _output_columns(layer: nn.Module, statistics: LayerStatistics, order: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Norms of the columns of `o_proj`, (H, V), and of `down_proj`, (M,), float64."""
    norms = [
        torch.linalg.vector_norm(linear.weight.detach().float(), ord=order, dim=0).double()
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


def standardised(scores: torch.Tensor) -> torch.Tensor:
    """Scores less their mean over the layer, over their standard deviation; float64."""
    scores = scores.double()
    return (scores - scores.mean()) / scores.std(correction=0).clamp(min=1e-30)


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
class ObsPruning:
    """the loss that greedy removal in rising order costs once the kept dimensions make up for it (structured OBS)

    A score is the predicted loss of removing this dimension and all that go before it. With `weighted`, errors of a
    module's output count as the language-model loss minds them (nats a token, by gradients; pairs by the gradient of a
    gate), so scores of all layers and modules compare; else as squared errors, pairs by `pair_energy`. With
    `value_basis` values are dropped along the axes that cost least, not along the dense model's.
    Each dimension's second moment is raised by the fraction dimensions / tokens: on other text the kept dimensions make
    up for less than they seem to on the calibration tokens, the more so the fewer tokens there were.
    """

    weighted: bool = False
    value_basis: bool = False

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({STATISTICS, MOMENTS} | ({OUTPUT_GRADIENTS} if self.weighted else set()))

    def score(self, layer: nn.Module, index: int, statistics: LayerStatistics) -> LayerScores:
        attention, gradients = layer.self_attn, statistics.gradients if self.weighted else None
        tokens = statistics.tokens
        output = self._in_metric(attention.o_proj, gradients and gradients.attention_output)
        down = self._in_metric(layer.mlp.down_proj, gradients and gradients.mlp_output)
        kv_heads, value_width = statistics.values.shape
        # (D, H V) -> (K, G D, V): all that reads the values of one key-value head
        readers = output.view(len(output), kv_heads, -1, value_width).permute(1, 2, 0, 3)
        readers = readers.flatten(1, 2) / readers.shape[1] ** 0.5
        pairs = gradients.rope_pairs if self.weighted else pair_energy(statistics)
        basis = None
        if self.value_basis:
            basis, losses = cheapest_basis(readers, value_moments(statistics))
        else:
            moments = value_moments(statistics)
            losses = torch.stack([greedy_losses(*pair, tokens) for pair in zip(readers, moments, strict=True)])
        return LayerScores(
            rope_pairs=accumulate(pairs) if self.weighted else pairs,
            value_dims=losses,
            mlp_dims=greedy_losses(down, mean_moments(statistics.mlp_moments), tokens),
            value_basis=basis,
        )

    @staticmethod
    def _in_metric(linear: nn.Linear, gradient_moments: torch.Tensor | None) -> torch.Tensor:
        """F W, float64, with F^T F half the gradients' second moments (or one): squared norms become losses."""
        weight = linear.weight.detach().double()
        if gradient_moments is None:
            return weight
        floor = 1e-5 * gradient_moments.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
        identity = torch.eye(len(gradient_moments), dtype=torch.float64, device=gradient_moments.device)
        return torch.linalg.cholesky(gradient_moments / 2 + floor * identity).T @ weight


def accumulate(scores: torch.Tensor) -> torch.Tensor:
    """Each score plus all that are smaller in its row: the cost of removing everything up to it."""
    ordered, order = scores.sort(dim=-1, stable=True)
    return torch.empty_like(scores).scatter_(-1, order, ordered.cumsum(dim=-1))


def value_moments(statistics: LayerStatistics) -> torch.Tensor:
    """Second moments of the values of each key-value head, summed over its query heads: (K, V, V) float64."""
    heads, width = statistics.attention_output.shape
    blocks = mean_moments(statistics.attention_moments).view(heads, width, heads, width)
    own = blocks.diagonal(dim1=0, dim2=2).movedim(-1, 0)  # (H, V, V)
    return own.unflatten(0, (len(statistics.key), -1)).sum(dim=1)


def mean_moments(moments: tuple[Moments, Moments]) -> torch.Tensor:
    """Second moments a token, of fitted and held-out tokens: (n, n) float64."""
    fitted, held_out = moments
    return (fitted.products + held_out.products).double().div_(fitted.tokens + held_out.tokens)


def inverse_with_ridge(moments: torch.Tensor, ridge: torch.Tensor) -> torch.Tensor:
    """(C + diag(ridge))^-1 for a positive semi-definite (n, n) C and a (n,) ridge, in their dtype."""
    floor = 1e-9 * moments.diagonal().mean() + torch.finfo(moments.dtype).tiny
    return torch.cholesky_inverse(torch.linalg.cholesky(moments + torch.diag(ridge.clamp(min=floor))))


def greedy_losses(readers: torch.Tensor, moments: torch.Tensor, tokens: int, *, steps: int = 48) -> torch.Tensor:
    """Cumulative loss of each dimension in the order of greedy removal, (n,) float64.

    `readers` (m, n) map the activation, of second moments `moments` (n, n) over `tokens`, to outputs whose squared norm
    is the loss.
    In each of about `steps` rounds the dimensions with the smallest saliency |readers_i|^2 / [C^-1]_ii go, and
    readers and C^-1 are down-dated by that block: structured OBS (Hassibi and Stork 1993; SlimGPT, 2024).
    """
    ridge = len(moments) / tokens * moments.diagonal()
    # float32 from here on: the ridge keeps the inverse well conditioned, and the down-dates are bound by memory
    inverse, readers = inverse_with_ridge(moments, ridge).float(), readers.float()
    losses = torch.zeros_like(moments[0])
    is_gone = torch.zeros_like(losses, dtype=torch.bool)
    block, spent, tiny = max(1, len(moments) // steps), 0.0, torch.finfo(inverse.dtype).tiny
    for start in range(0, len(moments), block):
        saliency = (readers.square().sum(dim=0) / inverse.diagonal().clamp(min=tiny)).masked_fill_(is_gone, torch.inf)
        ordered, order = saliency.sort(stable=True)
        gone = order[: min(block, len(moments) - start)]
        own, rows = inverse[gone[:, None], gone], inverse[gone]
        theirs = readers[:, gone]
        loss = (theirs.T * torch.linalg.solve(own, theirs.T)).sum(dtype=torch.float64)
        shares = ordered[: len(gone)].double().cumsum(dim=0)
        losses[gone] = spent + loss * shares / shares[-1].clamp(min=tiny)
        spent = spent + loss
        update = torch.linalg.solve(own, rows)  # (block, n)
        readers.addmm_(theirs, update, alpha=-1)
        inverse.addmm_(rows.T, update, alpha=-1)
        is_gone[gone] = True
    return losses


def cheapest_basis(readers: torch.Tensor, moments: torch.Tensor) -> tuple[ValueBasis, torch.Tensor]:
    """The value basis whose last axes cost least to drop, and the cumulative losses of dropping them, (K, V).

    `readers` (K, m, V), `moments` (K, V, V). With C = L L^T and the eigenvectors U of L^T readers^T readers L, dropping
    the axis u costs its eigenvalue: the optimal oblique projection is L U_r U_r^T L^-1 (Eckart and Young, in the
    metric of C).
    """
    identity = torch.eye(moments.shape[-1], dtype=moments.dtype, device=moments.device)
    # only against singularity: the projection is exact whatever the floor
    floor = 1e-6 * moments.diagonal(dim1=1, dim2=2).mean(dim=1).clamp(min=torch.finfo(moments.dtype).tiny)
    root = torch.linalg.cholesky(moments + floor[:, None, None] * identity)
    costs, vectors = torch.linalg.eigh(root.mT @ readers.mT @ readers @ root)
    costs, vectors = costs.flip(-1).clamp(min=0), vectors.flip(-1)
    into = torch.linalg.solve_triangular(root.mT, vectors, upper=True)
    scale = into.norm(dim=1, keepdim=True)
    losses = costs.flip(-1).cumsum(dim=-1).flip(-1)
    return ValueBasis(into=into / scale, back=root @ vectors * scale), losses


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


def criterion_by_name(name: str, *, seed: int = 0) -> object:
    """The criterion of the table by its name; `seed` goes to the one that draws numbers. Raises as `lookup` does."""
    criterion = lookup(CRITERIA, name, "criterion")
    return replace(criterion, seed=seed) if isinstance(criterion, Random) else criterion
