"""Statistics of calibration windows, made once for all cases that are calibrated on them."""

import time
from dataclasses import dataclass, field, replace

import torch
from torch import nn

import transact


@dataclass
class _Made:
    """Statistics of some windows without gradients, gradients by what they are of, and the seconds that they took."""

    sums: transact.Statistics | None = None
    gradients: dict[str, list[transact.LayerGradients]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    def holds(self, moments: bool) -> bool:
        return self.sums is not None and (not moments or self.sums.layers[0].mlp_moments is not None)


class Calibrations:
    """Statistics of a model on calibration windows. One pass serves all recipes that are scored on as many of them.

    Those of the newest windows are kept. Second moments are large: those of other windows are dropped before new ones
    are made. Statistics that have second moments serve recipes without, and gradients are taken apart from them.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.windows: torch.Tensor | None = None
        self._made: dict[int, _Made] = {}  # by the number of windows that are scored on

    def statistics(self, windows: torch.Tensor, recipe: transact.Recipe) -> tuple[transact.Statistics, float]:
        """Statistics with all that the recipe needs, and the seconds that making them took."""
        if self.windows is None or not torch.equal(self.windows, windows):
            self.windows, self._made = windows, {}
        scored, moments, of = recipe.scored(windows, self.model.config), recipe.needs_moments(), recipe.gradients()
        made = self._made.setdefault(len(scored), _Made())
        if not made.holds(moments):
            made.sums = None
            if moments:
                self._made = {count: one for count, one in self._made.items() if one is made or not one.holds(True)}
            start = time.perf_counter()
            made.sums = transact.calibrate(self.model, scored, second_moments=moments, progress=True)
            made.seconds["sums"] = time.perf_counter() - start
        if of is None:
            return made.sums, made.seconds["sums"]
        if of not in made.gradients:
            start = time.perf_counter()
            made.gradients[of] = transact.loss_gradients(self.model, scored, of=of, progress=True)
            made.seconds[of] = time.perf_counter() - start
        pairs = zip(made.sums.layers, made.gradients[of], strict=True)
        layers = tuple(replace(layer, gradients=gradients) for layer, gradients in pairs)
        return replace(made.sums, layers=layers), made.seconds["sums"] + made.seconds[of]
