"""Training without back-propagation: every step tries a random low-rank direction forth and back, and goes downhill.

LOZO (Chen et al., "Enhancing Zeroth-order Fine-tuning for Language Models with Low-rank Structures", 2024): a weight
matrix is tried along U V^T, whose U is drawn afresh in each step and whose V is kept for some; vectors are tried along
plain noise, as MeZO does (Malladi et al., 2023). It takes no more memory than two forward passes after each other: no
gradient, no state of an optimiser, and noise is drawn again from its seeds wherever it is needed.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial

import numpy as np
import torch
from torch import nn
from torch.nn import functional

KEPT, FRESH, ROUNDING = range(3)  # what noise is for: V, U and what moves vectors, rounding to 16 bits


class LowRankDescent(torch.optim.Optimizer):
    """Moves a model's weights against the slope of its loss along this step's direction, which `slope` adds up to.

    `perturbation` is how far the direction is tried. A seed, a step and a weight's place give the same noise on every
    device and in every process. Vectors of 16 bits are left as they are: they cannot be moved so little.
    """

    def __init__(
        self, model: nn.Module, *, learning_rate: float, rank: int, refresh: int, perturbation: float, seed: int
    ):
        trained = [one for one in model.parameters() if one.requires_grad and (one.ndim == 2 or one.itemsize > 2)]
        super().__init__(trained, {"lr": learning_rate, "step": 0})
        self.rank, self.refresh, self.perturbation, self.seed = rank, refresh, perturbation, seed
        self.slope = 0.0
        self.places = {parameter: place for place, parameter in enumerate(trained)}
        self.readers = [
            module for module in model.modules()
            if isinstance(module, nn.Linear | nn.Embedding) and module.weight in self.places
        ]  # fmt: skip

    @contextmanager
    def moved(self, sign: int) -> Iterator[None]:
        """Meanwhile the model computes as if all weights lay a perturbation further along the direction, or back.

        Matrices are not touched, what they give is corrected, so they are bit for bit as before whatever happens;
        vectors, which are small, are put back from copies.
        """
        by = sign * self.perturbation
        with ExitStack() as stack:
            for module in self.readers:
                stack.enter_context(module.register_forward_hook(partial(self._correct, by)))
            for vector in (parameter for parameter in self.places if parameter.ndim < 2):
                stack.callback(vector.copy_, vector.clone())
                vector.add_(self._vector_noise(vector), alpha=by)
            yield

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Go against the slope, all weights a rate times the unbiased estimate of their gradient."""
        [group] = self.param_groups
        by = -group["lr"] * self.slope
        for parameter in group["params"]:
            if parameter.ndim < 2:
                parameter.add_(self._vector_noise(parameter), alpha=by)
                continue
            fresh, kept = self._factors(parameter)
            if parameter.itemsize > 2:
                parameter.addmm_(fresh, kept.T, alpha=by / self.rank)
            else:
                value = parameter.float().addmm_(fresh, kept.T, alpha=by / self.rank)
                generator = self._generator(parameter, ROUNDING, parameter.device)
                parameter.copy_(rounded_at_random(value, parameter.dtype, generator))
        group["step"] += 1
        self.slope = 0.0

    def _correct(self, by: float, module: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        """Add to what a module gives what its weight would add to it, moved `by` along U V^T, in place."""
        fresh, kept = (factor.to(output) for factor in self._factors(module.weight))
        given = inputs[0].to(output.device)
        if isinstance(module, nn.Embedding):
            output.view(-1, len(kept)).addmm_(functional.embedding(given.flatten(), fresh), kept.T, alpha=by)
        else:
            output.view(-1, len(fresh)).addmm_(given.flatten(0, -2).to(output) @ kept, fresh.T, alpha=by)

    def _factors(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """U (rows, rank) of this step and V (columns, rank) of its stretch of steps, float32."""
        rows, columns = weight.shape
        return tuple(
            torch.randn(length, self.rank, generator=self._generator(weight, use)).to(weight.device)
            for use, length in ((FRESH, rows), (KEPT, columns))
        )

    def _vector_noise(self, vector: torch.Tensor) -> torch.Tensor:
        return torch.randn(vector.shape, generator=self._generator(vector, FRESH)).to(vector.device)

    def _generator(self, parameter: torch.Tensor, use: int, device: torch.device | str = "cpu") -> torch.Generator:
        step = self.param_groups[0]["step"]
        turn = step // self.refresh if use == KEPT else step
        words = np.random.SeedSequence([self.seed, self.places[parameter], use, turn]).generate_state(1, np.uint64)
        return torch.Generator(device).manual_seed(int(words[0]))


def rounded_at_random(values: torch.Tensor, dtype: torch.dtype, generator: torch.Generator) -> torch.Tensor:
    """Float32 values in a shorter `dtype`, rounded up or down by chance, so that on average none is changed.

    Rounded to the nearest, a step of less than half a place would be lost each time.
    """
    limits = torch.finfo(dtype)
    places = torch.ldexp(torch.full_like(values, limits.eps), torch.frexp(values).exponent - 1)
    places.clamp_(min=limits.smallest_normal * limits.eps)
    noise = torch.rand(values.shape, generator=generator, device=values.device)
    return noise.add_(values / places).floor_().mul_(places).to(dtype)
