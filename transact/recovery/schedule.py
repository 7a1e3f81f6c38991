"""How a narrowed model is trained: settings, the budget of each shot, the rate of each step, the order of windows."""

import math
from dataclasses import dataclass, replace

import torch

from ..entry import check_seed

WAYS = ("distillation", "full", "lora", "lora-distillation", "lozo", "lozo-distillation")
HIGHEST_LOZO_RANK = 4


@dataclass(frozen=True)
class Training:
    """Everything that decides how a model is trained, but for text and teacher.

    `way`: "distillation" moves all weights towards the dense model's predictions, "full" towards the text, "lora" and
    "lora-distillation" do so in low-rank adapters of `rank` (16), merged at the end. "lozo" and "lozo-distillation" do
    it by forward passes alone, in the memory of these: along directions of `rank` 1 to 4 (2), of which one half is
    drawn anew every `refresh` steps (50), each tried `perturbation` far (1e-3). `tokens` is the budget, in tokens of
    text seen, repetitions included. `learning_rate` None is `default_learning_rate`. A step takes `batch` windows,
    `device_batch` of them at once on each device. `layer_weight` adds to a distillation the relative squared error of
    every layer's output, which pruning inside modules leaves as wide as the dense model's. `bf16` None: on a CUDA
    device that computes in it, but for "lozo", which computes in the weights' own dtype.
    """

    tokens: int
    way: str = "distillation"
    learning_rate: float | None = None
    batch: int = 8
    device_batch: int = 8
    layer_weight: float = 0.0
    rank: int | None = None
    refresh: int | None = None
    perturbation: float | None = None
    bf16: bool | None = None
    gradient_checkpointing: bool = False
    seed: int = 0

    def check(self) -> None:
        """Raise ValueError for a value that is not allowed."""
        if self.way not in WAYS:
            raise ValueError(f"unknown way {self.way!r}, allowed: {', '.join(WAYS)}")
        for name in ("tokens", "batch", "device_batch", "rank", "refresh"):
            value, least = getattr(self, name), 1
            if value is None and name in ("rank", "refresh"):
                continue
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name.replace('_', '-')} must be a whole number of at least {least}, got {value!r}")
        check_seed(self.seed)
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning-rate must be positive and finite, got {self.learning_rate}")
        if not 0 <= self.layer_weight < math.inf:
            raise ValueError(f"layer-weight must be at least 0, got {self.layer_weight}")
        if self.layer_weight and not self.needs_teacher():
            raise ValueError(f"layer-weight compares layers with the dense model's: way {self.way!r} has no teacher")
        for name in ("rank", "refresh", "perturbation"):
            if (value := getattr(self, name)) is not None and name not in self._own_defaults():
                ways = "ways 'lora' and 'lozo'" if name == "rank" else "way 'lozo'"
                raise ValueError(f"{name} is of {ways}, got {value!r} with way {self.way!r}")
        if self.is_zeroth_order():
            self._check_lozo()

    def _check_lozo(self) -> None:
        """Raise ValueError for what does not go with training without back-propagation."""
        if self.rank is not None and self.rank > HIGHEST_LOZO_RANK:
            raise ValueError(f"rank of way {self.way!r} must be between 1 and {HIGHEST_LOZO_RANK}, got {self.rank}")
        if self.perturbation is not None and not 0 < self.perturbation <= 1:  # far beyond weights no slope is left
            raise ValueError(f"perturbation must be positive and at most 1, got {self.perturbation}")
        if self.gradient_checkpointing:
            raise ValueError(f"gradient-checkpointing recomputes activations, of which way {self.way!r} keeps none")

    def is_zeroth_order(self) -> bool:
        return self.way.startswith("lozo")

    def needs_teacher(self) -> bool:
        return "distillation" in self.way

    def steps(self, length: int) -> int:
        """How many steps the budget makes of windows of `length` tokens."""
        return math.ceil(self.tokens // length / self.batch)

    def with_rate(self, hidden_size: int, length: int) -> "Training":
        """The same, with defaults where it names none: those of its way, for a model of this size and such windows."""
        defaults = {"learning_rate": default_learning_rate(hidden_size, self.way, self.steps(length))}
        defaults |= self._own_defaults()
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})

    def _own_defaults(self) -> dict:
        """Defaults of the settings that only some ways have, the one named among them."""
        if self.is_zeroth_order():
            return {"rank": 2, "refresh": 50, "perturbation": 1e-3}
        return {"rank": 16} if "lora" in self.way else {}


def default_learning_rate(hidden_size: int, way: str, steps: float = math.inf) -> float:
    """The paper's 5e-5 at the hidden size of its 7B model, and in inverse proportion to it elsewhere (as muP has it).

    Adapters, whose product starts from zero, take four times as much. Fewer than 30 steps take less, by the square
    root of their share: Adam's first steps move every weight by about the rate, and the few that follow do not mend
    that (found on held-out windows of training text, with 2 to 100 steps, at hidden sizes 64 and 576).

    Forward passes alone go in directions whose noise grows with the number of weights: 1e-4 at hidden size 64 (found
    so), falling with its power 1.5 to the 1e-7 that LOZO's authors take at 5120.
    """
    if way.startswith("lozo"):
        return 0.0512 / hidden_size**1.5
    return 0.2048 / hidden_size * (4 if "lora" in way else 1) * math.sqrt(min(1.0, steps / 30))


def shot_budgets(tokens: int, shots: int, learning_rate: float) -> list[tuple[int, float]]:
    """Tokens and learning rate after each shot (the paper, "Iterative schedule"); they add up to `tokens`.

    With T = tokens / shots, shot k trains T/2 + T (k - 1)/(shots - 1) tokens at learning_rate x 2 k / shots. One shot
    takes the whole budget at the learning rate itself, where the paper trains nothing.
    """
    if shots == 1:
        return [(tokens, learning_rate)]
    share = tokens / shots
    ends = [share * (k / 2 + k * (k - 1) / 2 / (shots - 1)) for k in range(shots + 1)]  # sums of the first k shots
    return [(round(ends[k]) - round(ends[k - 1]), learning_rate * 2 * k / shots) for k in range(1, shots + 1)]


def check_budget(tokens: int, length: int, shots: int = 1) -> None:
    """Raise ValueError where the budget, or the least part of it that a shot gets, is less than one window."""
    least = min(part for part, _ in shot_budgets(tokens, shots, 1.0))
    if least < length:
        share = f"in {shots} shots leave {least} for one of them, which is" if shots > 1 else "are"
        raise ValueError(f"tokens {tokens} {share} less than one window of {length}")


def shot_trainings(training: Training, shots: int) -> list[Training]:
    """The training after each shot: a part of the budget and of the learning rate, which must be named."""
    budgets = shot_budgets(training.tokens, shots, training.learning_rate)
    return [replace(training, tokens=tokens, learning_rate=rate) for tokens, rate in budgets]


def rate_of_step(step: int, steps: int) -> float:
    """Learning rate of a step (counted from 0) as a fraction of the highest: a tenth of the steps up, a cosine down."""
    rising = math.ceil(steps / 10)
    if step < rising:
        return (step + 1) / rising
    return (1 + math.cos(math.pi * (step + 1 - rising) / (steps + 1 - rising))) / 2


def epoch_order(epoch: int, available: int, seed: int) -> torch.Tensor:
    """Indices (available,) of windows: every epoch sees all of them, in an order of its own."""
    return torch.randperm(available, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def parse_tokens(text: str) -> int:
    """A number of tokens such as 500000, 500k, 2M or 1.5B. Raises ValueError for anything else."""
    units = {"k": 10**3, "m": 10**6, "b": 10**9}
    number, unit = (text[:-1], units[text[-1].lower()]) if text[-1:].lower() in units else (text, 1)
    try:
        tokens = float(number) * unit
    except ValueError:
        tokens = math.nan
    if not 1 <= tokens < math.inf:
        raise ValueError(f"tokens must be a number such as 500000, 500k, 2M or 1.5B, at least 1, got {text!r}")
    return round(tokens)
