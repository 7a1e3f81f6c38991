"""Structured optimal brain surgeon: what removing dimensions costs once those that are kept make up for it.

Legend: D hidden size, G query heads a key-value head, K key-value heads, V value dimensions.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import nn

from .calibration import LayerStatistics
from .scores import (
    MOMENTS,
    OUTPUT_GRADIENTS,
    STATISTICS,
    LayerScores,
    ValueBasis,
    accumulate,
    inverse_with_ridge,
    mean_moments,
    pair_energy,
    value_moments,
)

LEAST_RIDGE = 1e-3  # from this fraction of each second moment on, float32 inverts them
COMPACTED_EVERY = 8  # rounds of greedy removal, after which what is gone leaves the matrices


@dataclass(frozen=True)
class ObsPruning:
    """the loss that greedy removal in rising order costs once the kept dimensions make up for it (structured OBS)

    A score is the predicted loss of removing this dimension and all that go before it. With `weighted`, errors of a
    module's output count as the language-model loss minds them (nats a token, by gradients; pairs by the gradient of a
    gate), so scores of all layers and modules compare; else as squared errors, pairs by `pair_energy`. With
    `value_basis` values are dropped along the axes that cost least, not along the dense model's. Weighted scores say
    what dropping all attention costs as well, for which nothing can make up, unless no modules are to go (`drops`).
    Each dimension's second moment is raised by the fraction dimensions / tokens: on other text the kept dimensions make
    up for less than they seem to on the calibration tokens, the more so the fewer tokens there were.
    """

    weighted: bool = False
    value_basis: bool = False
    drops: bool = True

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({STATISTICS, MOMENTS} | ({OUTPUT_GRADIENTS} if self.weighted else set()))

    def score(self, layer: nn.Module, index: int, statistics: LayerStatistics) -> LayerScores:
        attention, gradients = layer.self_attn, statistics.gradients if self.weighted else None
        tokens = statistics.tokens
        where = statistics.mlp.device  # the model may lie elsewhere
        output = self._in_metric(attention.o_proj, gradients and gradients.attention_output, where)
        down = self._in_metric(layer.mlp.down_proj, gradients and gradients.mlp_output, where)
        kv_heads, value_width = statistics.values.shape
        # (D, H V) -> (K, G D, V): all that reads the values of one key-value head
        readers = output.view(len(output), kv_heads, -1, value_width).permute(1, 2, 0, 3)
        readers = readers.flatten(1, 2) / readers.shape[1] ** 0.5
        pairs = gradients.rope_pairs.to(where) if self.weighted else pair_energy(statistics)
        basis = dropped = None
        if self.weighted and self.drops:
            dropped = ((output @ mean_moments(statistics.attention_moments)) * output).sum()
        if self.value_basis:
            basis, losses = cheapest_basis(readers, value_moments(statistics))
        else:
            losses = greedy_losses(readers, value_moments(statistics), tokens)
        return LayerScores(
            rope_pairs=accumulate(pairs) if self.weighted else pairs,
            value_dims=losses,
            mlp_dims=greedy_losses(down, mean_moments(statistics.mlp_moments), tokens),
            value_basis=basis,
            attention=dropped,
        )

    @staticmethod
    def _in_metric(linear: nn.Linear, gradient_moments: torch.Tensor | None, device: torch.device) -> torch.Tensor:
        """F W, float64, with F^T F half the gradients' second moments (or one): squared norms become losses."""
        weight = linear.weight.detach().to(device).double()
        if gradient_moments is None:
            return weight
        gradient_moments = gradient_moments.to(device)
        floor = 1e-5 * gradient_moments.diagonal().mean().clamp(min=torch.finfo(torch.float64).tiny)
        identity = torch.eye(len(gradient_moments), dtype=torch.float64, device=gradient_moments.device)
        return torch.linalg.cholesky(gradient_moments / 2 + floor * identity).T @ weight


def greedy_losses(readers: torch.Tensor, moments: torch.Tensor, tokens: int, *, steps: int = 48) -> torch.Tensor:
    """Cumulative loss of each dimension in the order of greedy removal, (n,) float64.

    `readers` (m, n) map the activation, of second moments `moments` (n, n) over `tokens`, to outputs whose squared norm
    is the loss. Of several activations, (K, m, n) and (K, n, n), the losses are (K, n).
    In each of about `steps` rounds the dimensions with the smallest saliency |readers_i|^2 / [C^-1]_ii go, and
    readers and C^-1 are down-dated by that block: structured OBS (Hassibi and Stork 1993; SlimGPT, 2024).
    """
    fraction = moments.shape[-1] / tokens
    unit = moments.diagonal(dim1=-2, dim2=-1).mean(dim=-1).clamp(min=torch.finfo(moments.dtype).tiny)
    moments = moments / unit[..., None, None]
    # float32: the ridge keeps the inverse well conditioned, and the down-dates are bound by memory
    dtype = torch.float32 if fraction > LEAST_RIDGE else moments.dtype
    ridge, moments = (fraction * moments.diagonal(dim1=-2, dim2=-1)).to(dtype), moments.to(dtype)
    inverse = inverse_with_ridge(moments, ridge)
    del moments  # the widest matrices of all: none is held for longer than it is read
    if inverse.ndim == 2:
        removed = partial(_removed_greedily, steps=steps, add_product=torch.Tensor.addmm_)
    else:  # of products in place torch has none for several at once; these matrices are small
        removed = torch.vmap(partial(_removed_greedily, steps=steps, add_product=torch.addmm), in_dims=(0, 0, None))
    losses, is_sound = removed(readers, inverse, torch.float32)
    if not is_sound.all():
        exact, _ = removed(readers, inverse, torch.float64)
        losses = torch.where(is_sound[..., None], losses, exact)
    return losses * unit[..., None]


def _removed_greedily(
    readers: torch.Tensor, inverse: torch.Tensor, dtype: torch.dtype, *, steps: int, add_product: Callable
) -> tuple[torch.Tensor, torch.Tensor]:
    """The losses of `greedy_losses`, and whether every block could be factored; a device is never waited for."""
    size, readers, inverse = len(inverse), readers.to(dtype), inverse.to(dtype)
    losses = torch.zeros_like(inverse[0], dtype=torch.float64)
    is_gone, places = torch.zeros_like(losses, dtype=torch.bool), torch.arange(size, device=inverse.device)
    is_sound = torch.ones((), dtype=torch.bool, device=inverse.device)
    block, spent, tiny = max(1, size // steps), 0.0, torch.finfo(inverse.dtype).tiny
    for start in range(0, size, block):
        if start % (COMPACTED_EVERY * block) == 0:  # what is gone takes no more part; at first this makes the copies
            left = is_gone.sort(stable=True).indices[: size - start]
            places, is_gone = places[left], is_gone[left]
            readers, inverse = readers[:, left], inverse[left][:, left]
        saliency = (readers.square().sum(dim=0) / inverse.diagonal().clamp(min=tiny)).masked_fill_(is_gone, torch.inf)
        ordered, order = saliency.sort(stable=True)
        gone = order[: min(block, size - start)]
        rows, theirs = inverse[gone], readers[:, gone]
        root, failed = torch.linalg.cholesky_ex(rows[:, gone])
        is_sound = is_sound & (failed == 0)
        # with [C^-1]_gone = L L^T: what goes is (L^-1 readers)^T (L^-1 rows), of C^-1 (L^-1 rows)^T (L^-1 rows)
        half = torch.linalg.solve_triangular(root, torch.cat((theirs.T, rows), dim=1), upper=False)
        their_half, half = half[:, : len(readers)], half[:, len(readers) :]
        loss = their_half.square().sum(dtype=torch.float64)
        shares = ordered[: len(gone)].double().cumsum(dim=0)
        losses[places[gone]] = spent + loss * shares / shares[-1].clamp(min=tiny)
        spent = spent + loss
        readers = add_product(readers, their_half.T, half, alpha=-1)
        inverse = add_product(inverse, half.T, half, alpha=-1)
        is_gone = is_gone.scatter(0, gone, True)
    return losses, is_sound & losses.isfinite().all()


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
