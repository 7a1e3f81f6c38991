"""Statistics of calibration windows, made once for all cases that are calibrated on them."""

import time
from dataclasses import replace

import torch
from torch import nn

import transact


class Calibrations:
    """Statistics of a model on calibration windows. One pass serves all recipes; those of the newest windows are kept.

    Second moments are large: statistics of earlier windows are dropped before new ones are made. Statistics that have
    second moments serve recipes without, and gradients are taken apart from them.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self._forget(None)

    def _forget(self, windows: torch.Tensor | None) -> None:
        self.windows = windows
        self.sums: transact.Statistics | None = None
        self.gradients: dict[str, list[transact.LayerGradients]] = {}
        self.seconds: dict[str, float] = {}

    def statistics(self, windows: torch.Tensor, recipe: transact.Recipe) -> tuple[transact.Statistics, float]:
        """Statistics with all that the recipe needs, and the seconds that making them took."""
        if self.windows is None or not torch.equal(self.windows, windows):
            self._forget(windows)
        start, moments = time.perf_counter(), recipe.needs_moments()
        if self.sums is None or (moments and self.sums.layers[0].mlp_moments is None):
            self.sums = None
            self.sums = transact.calibrate(self.model, windows, second_moments=moments, progress=True)
            self.seconds["sums"] = time.perf_counter() - start
        of = recipe.gradients()
        if of is None:
            return self.sums, self.seconds["sums"]
        start = time.perf_counter()
        if of not in self.gradients:
            self.gradients[of] = transact.loss_gradients(self.model, windows, of=of, progress=True)
            self.seconds[of] = time.perf_counter() - start
        pairs = zip(self.sums.layers, self.gradients[of], strict=True)
        layers = tuple(replace(layer, gradients=gradients) for layer, gradients in pairs)
        return replace(self.sums, layers=layers), self.seconds["sums"] + self.seconds[of]
