"""Scores of a layer, and what criteria compute them from: energies, moments, sums over the heads of a group.

Legend: H query heads, K key-value heads, P RoPE pairs of a head, V value dimensions, M MLP dimensions.
"""

from dataclasses import dataclass, replace

import torch

from .calibration import LayerStatistics, Moments

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
    `value_dims` are those of `value_basis` where there is one. `attention` () is the predicted loss
    of dropping all attention, where a criterion has it: errors of heads do not simply add up.
    """

    rope_pairs: torch.Tensor
    value_dims: torch.Tensor
    mlp_dims: torch.Tensor
    kv_heads: torch.Tensor | None = None
    value_basis: ValueBasis | None = None
    attention: torch.Tensor | None = None

    def __post_init__(self):
        if self.kv_heads is None:
            object.__setattr__(self, "kv_heads", head_scores(self.value_dims))


def scaled(layer: LayerScores, pairs: float, values: float, mlp: float) -> LayerScores:
    """The scores times a factor of each kind; whole heads keep theirs. All of dropped attention is values'."""
    return replace(
        layer, rope_pairs=layer.rope_pairs * pairs, value_dims=layer.value_dims * values, mlp_dims=layer.mlp_dims * mlp,
        attention=None if layer.attention is None else layer.attention * values,
    )  # fmt: skip


def head_scores(value_dims: torch.Tensor) -> torch.Tensor:
    """Scores of whole heads from those of their dimensions, (heads, V) -> (heads,) (the paper, "Importance")."""
    return value_dims.mean(dim=1) + 10 / value_dims.shape[1] * value_dims.max(dim=1).values


def pair_energy(statistics: LayerStatistics) -> torch.Tensor:
    """sqrt(sum over a group's queries of |q_pair|^2 |k_pair|^2), (K, P).

    By Cauchy-Schwarz it bounds what the pair adds to the attention logits; the attention output says nothing of it.
    """
    query = statistics.query_pairs.unflatten(0, (len(statistics.key), -1)).sum(dim=1)
    return (query * statistics.key_pairs).sqrt()


def accumulate(scores: torch.Tensor) -> torch.Tensor:
    """Each score plus all that are smaller in its row: the cost of removing everything up to it."""
    ordered, order = scores.sort(dim=-1, stable=True)
    return torch.empty_like(scores).scatter_(-1, order, ordered.cumsum(dim=-1))


def standardised(scores: torch.Tensor) -> torch.Tensor:
    """Scores less their mean over the layer, over their standard deviation; float64."""
    scores = scores.double()
    return (scores - scores.mean()) / scores.std(correction=0).clamp(min=1e-30)


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
    """(C + diag(ridge))^-1 for a positive semi-definite (n, n) C and a (n,) ridge, or several of both; their dtype."""
    system = moments.clone()
    diagonal = system.diagonal(dim1=-2, dim2=-1)
    floor = 1e-9 * diagonal.mean(dim=-1, keepdim=True) + torch.finfo(moments.dtype).tiny
    diagonal.add_(ridge.maximum(floor))
    return torch.cholesky_inverse(torch.linalg.cholesky(system))
