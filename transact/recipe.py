"""Recipes: a criterion, what may be cut, how widths are found and what makes up for the loss; presets by name."""

import math
from dataclasses import dataclass, fields

import torch
from transformers import PretrainedConfig

from .calibration import held_out_split
from .criteria import CRITERIA, lookup
from .depth import DEPTHS
from .engines import check_drops, engine_by_name
from .obs import ObsPruning
from .scores import MOMENTS, OUTPUT_GRADIENTS, WEIGHT_GRADIENTS
from .sparsity import SPARSITIES
from .widths import GRANULARITIES, MODULES, whole_modules

ALLOCATIONS = ("uniform", "searched", "global")
COMPENSATIONS = ("none", "bias", "dense", "pruned", "magnitude", "linear")
FOR_LAYERS = ("magnitude", "linear")  # compensations of whole layers that go
LEAST_SQUARES = ("dense", "pruned", "linear")
OF_DEPTH = ("depth", "compensation", "ridge")  # all that a recipe says that drops whole layers
ROPES = ("pairs", "released")
SCORED_SHARE = 1 / 2  # see `Recipe.scored`


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how a model is pruned, but for how much.

    `criterion` is a name of `CRITERIA`. `granularity`: what attention loses, "dims" inside heads, whole key-value
    "heads", or "both". `modules`: what may be narrowed. `allocation`: "uniform" widths, "searched" (each layer's QK,
    VO and MLP lose where it costs least; wants a criterion that predicts losses) or "global" (FLAP's: heads and MLP
    dimensions of all layers compete). `engine`: a name of `ENGINES`, which can hold what is found; another than
    transformers wants an allocation "searched". `compensation`: "none", "bias" (the mean of what was dropped),
    least squares on the "dense" model's inputs, or on the "pruned" ones, layer by layer; `output_bias` adds an
    intercept to these.
    `rope`: whole "pairs" at their own frequencies, or "released", what the paper's authors do. `shots`: prunings,
    with statistics taken afresh at each. `ridge`: the one ridge of all least squares; None: of several the best on
    held-out tokens, for each projection. `measurements`: rounds in which the pruned model's sensitivity corrects the
    losses that an allocation "searched" goes by (`measured_scores`); no other allocation measures, nor does a model
    of which one block at a time is on the device.

    `depth` drops whole layers instead of narrowing any (`transact.depth`): "none", by block "influence" one after the
    other, a "run" of them, or all but one in each of "clusters". What makes up for them is a "magnitude", of layers
    that went by influence, or a "linear" map, of a run, or nothing; all else is for narrowing.

    `drop_modules`: an allocation "searched" may drop attention or MLP of a layer altogether, where that loses less than
    narrowing others; `engine` must hold that (`Engine.drops`).

    `sparsity`: at last two of every four weights become zero, by "wanda-2:4" or "magnitude-2:4" (`make_sparse`).
    """

    criterion: str = "activation"
    granularity: str = "dims"
    modules: tuple[str, ...] = MODULES
    allocation: str = "uniform"
    compensation: str = "none"
    output_bias: bool = False
    rope: str = "pairs"
    shots: int = 1
    ridge: float | None = None
    measurements: int = 0
    engine: str = "transformers"
    depth: str = "none"
    sparsity: str = "none"
    drop_modules: bool = False

    def check(self) -> None:
        """Raise ValueError for a value that is not known or settings that exclude each other."""
        criterion = lookup(CRITERIA, self.criterion, "criterion")
        for name, allowed in (
            ("granularity", GRANULARITIES), ("allocation", ALLOCATIONS), ("compensation", COMPENSATIONS),
            ("rope", ROPES), ("depth", ("none", *DEPTHS)), ("sparsity", SPARSITIES),
        ):  # fmt: skip
            if getattr(self, name) not in allowed:
                raise ValueError(f"unknown {name} {getattr(self, name)!r}, allowed: {', '.join(allowed)}")
        if self.shots < 1:
            raise ValueError(f"shots must be at least 1, got {self.shots}")
        if self.measurements < 0:
            raise ValueError(f"measurements must be at least 0, got {self.measurements}")
        if self.ridge is not None and not 0 < self.ridge < math.inf:
            raise ValueError(f"ridge must be positive, got {self.ridge}")
        if self.ridge is not None and self.compensation not in LEAST_SQUARES:
            raise ValueError(
                f"a ridge is for compensation by least squares: dense, pruned or linear, not {self.compensation}"
            )
        self._check_depth()
        predicts = [name for name, one in CRITERIA.items() if isinstance(one, ObsPruning) and one.weighted]
        by_loss = self.allocation == "searched"
        if by_loss and not (isinstance(criterion, ObsPruning) and criterion.weighted):
            raise ValueError(
                f"allocation {self.allocation!r} needs a criterion that predicts losses: {', '.join(predicts)}"
            )
        if by_loss and self.granularity != "dims":
            raise ValueError(f"allocation {self.allocation!r} narrows heads: granularity must be dims")
        engine_by_name(self.engine)
        if self.engine != "transformers" and not by_loss:
            raise ValueError(
                f"engine {self.engine!r} is planned for by allocation 'searched' (preset best), not {self.allocation!r}"
            )
        self._check_drops()
        if self.allocation == "global" and (self.granularity != "heads" or set(self.modules) != set(MODULES)):
            raise ValueError("allocation 'global' drops whole heads and MLP dimensions: granularity must be heads")
        if self.allocation == "global" and self.criterion != "fluctuation":
            raise ValueError("allocation 'global' compares z-scores across layers: its criterion is fluctuation")
        if self.allocation == "global" and self.sparsity != "none":
            raise ValueError(
                f"sparsity {self.sparsity!r} wants widths in fours, which allocation 'global' does not give"
            )
        if self.rope == "released" and (set(self.modules) != set(MODULES) or by_loss):
            raise ValueError("rope 'released' gives q, k, v and o the same width: all modules, and not searched")
        if self.rope == "released" and getattr(criterion, "value_basis", False):
            raise ValueError(f"rope 'released' keeps dimensions of the model: {self.criterion} changes their basis")

    def _check_drops(self) -> None:
        """Raise ValueError where modules may be dropped and nothing searches, holds or names any that could be."""
        if not isinstance(self.drop_modules, bool):
            raise ValueError(f"drop_modules must be True or False, got {self.drop_modules!r}")
        if not self.drop_modules:
            return
        if self.allocation != "searched":
            raise ValueError(f"drop_modules is for an allocation 'searched' (preset best), not {self.allocation!r}")
        check_drops(self.engine)
        if not any(whole_modules(self.modules)):
            raise ValueError(
                f"drop_modules drops attention (modules qk and vo) or MLPs (mlp), got {', '.join(self.modules)}"
            )

    def _check_depth(self) -> None:
        """Raise ValueError where whole layers go and something is said that only narrowing has, or the other way."""
        if self.depth == "none":
            if self.compensation in FOR_LAYERS:
                raise ValueError(
                    f"compensation {self.compensation!r} makes up for dropped layers, and none are: depth is 'none'"
                )
            return
        for field in fields(self):
            if field.name not in OF_DEPTH and (value := getattr(self, field.name)) != field.default:
                raise ValueError(
                    f"depth {self.depth!r} drops whole layers: {field.name} is for narrowing, got {value!r}"
                )
        if self.compensation not in DEPTHS[self.depth]:
            raise ValueError(
                f"depth {self.depth!r} is made up for by {' or '.join(DEPTHS[self.depth])}, not by "
                f"{self.compensation!r}"
            )

    def needs_text(self) -> bool:
        """Whether calibration windows are needed."""
        needs_inputs = self.compensation != "none" or self.sparsity == "wanda-2:4" or self.depth != "none"
        return bool(CRITERIA[self.criterion].needs) or needs_inputs

    def needs_statistics(self) -> bool:
        """Whether it goes by the statistics of `calibrate`, which serve many recipes: narrowing on text does."""
        return self.needs_text() and self.depth == "none"

    def needs_moments(self) -> bool:
        return MOMENTS in CRITERIA[self.criterion].needs or self.compensation == "dense"

    def measures(self, device: torch.device | None) -> bool:
        """Whether the pruned model's sensitivity is measured: it runs as a whole, not block by block on a `device`."""
        return self.measurements > 0 and self.allocation == "searched" and device is None

    def scored(self, windows: torch.Tensor, config: PretrainedConfig) -> torch.Tensor:
        """The windows that dimensions are scored on: half of them where losses are predicted and half is plenty.

        Plenty are eight tokens for each MLP dimension. Least squares in closed form go by the same statistics and want
        all; those on pruned inputs read all windows anyway. SmolLM2 without 30 %, 16,384 tokens of the default mixture,
        rise in nats on WikiText-2's validation text, TinyStories' training text and documentation, on average: .665
        scored on all; on halves (5.3 tokens a dimension) .682 and .691, .685 and .680 with gradients of all, so these
        are no plenty. Drawn by chance, a half has some of all kinds of text, in whatever turn they come.
        """
        fitted = held_out_split(torch.arange(len(windows)))[0]  # the others are measured on
        order = torch.randperm(len(fitted), generator=torch.Generator().manual_seed(0))  # kinds may come in turn
        half = windows[fitted[order[: math.ceil(SCORED_SHARE * len(windows))]].sort().values]
        is_plenty = half.numel() >= 8 * config.intermediate_size
        return half if self.is_scored_in_part() and is_plenty else windows

    def is_scored_in_part(self) -> bool:
        """Whether dimensions are scored on a part of the windows where there are plenty: see `scored`."""
        return self.gradients() == OUTPUT_GRADIENTS and self.compensation != "dense"

    def parts_kept(self, device: torch.device | None) -> int | None:
        """Parts (fitted, held out) of all layers' moments that stages after scoring read; None: no statistics."""
        if self.compensation == "dense":
            return 2
        if self.measures(device):
            return 1
        return 0 if self.compensation == "bias" else None

    def gradients(self) -> str | None:
        """Which gradients the criterion needs, if any."""
        return next((of for of in (OUTPUT_GRADIENTS, WEIGHT_GRADIENTS) if of in CRITERIA[self.criterion].needs), None)


PRESETS = {
    # the strongest training-free recipe found here
    "best": Recipe(criterion="predicted-loss", allocation="searched", compensation="pruned", measurements=3),
    # the paper's score and widths, one shot, whole RoPE pairs; and with what its authors' code does instead
    "transact": Recipe(),
    "transact-released": Recipe(rope="released"),
    # rivals, as their authors publish them
    "wanda-sp": Recipe(criterion="wanda", granularity="heads"),
    "flap": Recipe(criterion="fluctuation", granularity="heads", allocation="global", compensation="bias"),
    "llm-pruner": Recipe(criterion="taylor", granularity="heads"),
    # rivals that drop whole layers: ShortGPT's influence with the repair of Prune&Comp, ReplaceMe, and CRaSh untrained
    "shortgpt": Recipe(depth="influence", compensation="magnitude"),
    "replaceme": Recipe(depth="run", compensation="linear"),
    "crash": Recipe(depth="clusters"),
}


def recipe_by_name(name: str) -> Recipe:
    """The preset's recipe. Raises ValueError with the allowed names for any other name."""
    return lookup(PRESETS, name, "preset")
