"""Least squares near a prior weight, the ridge chosen on held-out tokens, from sums of products.

Legend: T tokens, D outputs, N inputs of a projection before pruning, n those that are kept.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .calibration import Moments
from .products import add_products, mirror

RIDGES = (10.0, 1.0, 1e-1, 1e-2, 1e-3)  # of each input's second moment
SKETCH = 64


@dataclass
class NormalEquations:
    """Weighted sums of a least-squares problem y ~ W x + b: x x^T (n, n), x y^T (n, D), x (n,), y (D,), weights.

    float32; of x x^T, which is symmetric, only squares on and above the diagonal are summed (`add_products`).
    """

    inputs: torch.Tensor
    cross: torch.Tensor
    input_sum: torch.Tensor
    target_sum: torch.Tensor
    weight: float = 0.0

    @classmethod
    def empty(cls, inputs: int, outputs: int, device: torch.device) -> "NormalEquations":
        shapes = (inputs, inputs), (inputs, outputs), (inputs,), (outputs,)
        return cls(*(torch.zeros(shape, device=device) for shape in shapes))

    @classmethod
    def of_lost(
        cls, moments: Moments, kept: torch.Tensor, weight: torch.Tensor, prior: torch.Tensor
    ) -> "NormalEquations":
        """The problem of giving, from what is kept of the inputs, what `prior` (D, n) misses of `weight` (D, N).

        By the moments of all inputs. `kept` holds indices (n,) of those whose columns the prior has, or is a map (N, n)
        from all inputs to the kept ones. Of columns that the prior has nothing is missed, nor multiplied.
        """
        weight, prior = weight.float(), prior.float()
        products, total = moments.products.to(weight), moments.sum.to(weight)  # statistics may lie elsewhere
        if kept.ndim == 1:
            is_lost = torch.ones_like(total, dtype=torch.bool)
            is_lost[kept] = False
            rows, lost = products[kept], weight[:, is_lost]
            cross, missed = rows[:, is_lost] @ lost.T, lost @ total[is_lost]
            return cls(rows[:, kept], cross, total[kept], missed, moments.tokens)
        kept = kept.to(weight)
        rows, lost = kept.T @ products, weight - prior @ kept.T
        return cls(rows @ kept, rows @ lost.T, kept.T @ total, lost @ total, moments.tokens)

    def add(self, inputs: torch.Tensor, targets: torch.Tensor, scale: torch.Tensor | None = None) -> None:
        """Add tokens: inputs (T, n), targets (T, D), and by how much (T, 1) each token's error is scaled, if it is."""
        targets = targets.float()
        if scale is None:
            scale = torch.ones_like(targets[:, :1])
        else:
            inputs, targets = inputs.float() * scale, targets * scale
        add_products(self.inputs, inputs)
        inputs = inputs.float()
        self.cross.addmm_(inputs.T, targets)
        self.input_sum.addmv_(inputs.T, scale[:, 0])
        self.target_sum.addmv_(targets.T, scale[:, 0])
        self.weight += scale.double().square().sum().item()

    def __add__(self, other: "NormalEquations") -> "NormalEquations":
        return NormalEquations(*(getattr(self, name) + getattr(other, name) for name in vars(self)))

    def means(self, centred: bool, sketch: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        """Per unit of weight, float32: x x^T, x y^T, x and y; the first two about the means where `centred`.

        With a `sketch` (k, D) y stands for its product with it.
        """
        mirror(self.inputs)
        inputs, cross, x, y = (
            value / self.weight for value in (self.inputs, self.cross, self.input_sum, self.target_sum)
        )
        if sketch is not None:
            cross, y = cross @ sketch.T, sketch @ y
        if centred:
            inputs, cross = inputs - torch.outer(x, x), cross - torch.outer(x, y)
        return inputs, cross, x, y


@dataclass(frozen=True)
class Fit:
    """A refitted projection: weight (D, n), what to add to the bias (D,) or None, the ridge (None: weight kept).

    float64.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    ridge: float | None


def fit_projection(
    prior: torch.Tensor,
    fitted: NormalEquations,
    held_out: NormalEquations | None = None,
    *,
    bias: bool = False,
    ridge: float | None = None,
) -> Fit:
    """The projection, near the `prior` weight (D, n), that gives the targets best on held-out tokens.

    Minimises E|y - W x|^2 + r sum_i E[x_i^2] |W_i - prior_i|^2, so that r does not depend on the scale of an input.
    From the largest r on, smaller ones are tried while the error on `held_out` falls; the prior is kept where none
    improves on it there, and the chosen r is then fitted on all tokens. A `ridge` that is given is taken as it is. With
    `bias` x and y are centred, and the bias meets the means.
    """
    prior = prior.float()
    if ridge is None and held_out is not None and held_out.weight:
        ridge = _best_ridge(prior, fitted, held_out, bias)
    equations = fitted if held_out is None else fitted + held_out
    means = equations.means(bias)
    weight = prior.double()
    if ridge is not None:
        # in float32, as the sums are: beside their rounding, that of the factors is nothing at the least of the ridges
        weight = weight + _correction(prior, means)(ridge)
    return Fit(weight, means[3] - weight @ means[2].double() if bias else None, ridge)


def _best_ridge(prior: torch.Tensor, fitted: NormalEquations, held_out: NormalEquations, bias: bool) -> float | None:
    """The ridge whose fit errs least on held-out tokens; None where none errs less than the prior."""
    sketch = _sketch(len(prior)).to(prior)  # to choose among decades a few random sums of the outputs are enough
    sketched = sketch @ prior
    inputs, cross, *_ = held_out.means(bias, sketch)
    least, ridge = _error(sketched, inputs, cross), None
    correction = _correction(sketched, fitted.means(bias, sketch))
    for candidate in RIDGES:
        error = _error(sketched + correction(candidate), inputs, cross)
        if error < least:
            least, ridge = error, candidate
        elif ridge is not None:
            break
    return ridge


def _sketch(outputs: int) -> torch.Tensor:
    """Random sums (64, D) of the outputs that keep squared norms on average; the outputs where they are fewer."""
    if outputs <= SKETCH:
        return torch.eye(outputs)
    return torch.randn(SKETCH, outputs, generator=torch.Generator().manual_seed(0)) / SKETCH**0.5


def _correction(prior: torch.Tensor, means: tuple[torch.Tensor, ...]) -> Callable[[float], torch.Tensor]:
    """The minimiser less the prior, for each ridge; what does not depend on the ridge is computed once."""
    inputs, cross, *_ = means
    strength = inputs.diagonal()
    strength = strength.clamp(min=1e-9 * strength.mean().item() + torch.finfo(strength.dtype).tiny)
    missing = cross - inputs @ prior.T if prior.any() else cross

    def correction(ridge: float) -> torch.Tensor:
        system = inputs.clone()
        system.diagonal().add_(strength, alpha=ridge)
        return torch.cholesky_solve(missing, _cholesky(system)).T

    return correction


def _cholesky(moments: torch.Tensor) -> torch.Tensor:
    """The factor of a positive matrix whose sums were rounded to float32: as much more diagonal as that may cost it."""
    root, failed = torch.linalg.cholesky_ex(moments)
    largest = moments.diagonal().max().expand(len(moments))
    for lift in (1e-7, 1e-6, 1e-5):
        if not failed:
            return root
        root, failed = torch.linalg.cholesky_ex(moments + torch.diag(lift * largest))
    return torch.linalg.cholesky(moments) if failed else root


def _error(weight: torch.Tensor, inputs: torch.Tensor, cross: torch.Tensor) -> float:
    """E|y - W x|^2 less E|y|^2, which no weight changes."""
    return ((weight @ inputs - 2 * cross.T) * weight).sum().item()
