"""A speed-up as the budget: widths whose end-to-end time, dense and narrowed in turn, is what was asked for."""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from torch import nn

from .allocate import Prices, allowed_widths, parameter_prices, total_price
from .engines import engine_by_name
from .latency import Workload, barely_narrowed, compared, conditions, latency_table, longest_context, model_of_widths
from .prune import check_prunable
from .timing import Ratio
from .widths import MODULES, Widths, check_modules, dense_widths, whole_modules

BUDGETS = ("latency", "parameters")
DEFAULT_CONTEXT = 512
CORRECTIONS = 3  # of the budget at most, each followed by a comparison; by latency one is mostly enough
NEAR = 0.01  # a speed-up as near as this to the one asked for is it, however narrow its interval


@dataclass(frozen=True)
class SpeedGoal:
    """How many times as fast as the dense model the narrowed one is to be, and what was measured to get there.

    `prices` are those of a layer's modules, in seconds or, to compare, in parameters. `ends` are the price of widths
    that are hardly narrowed and of the narrowest with `modules` (with `drop_modules` of one attention alone), each with
    its whole model's time over the dense model's: what lies between them follows the prices, so that all that no width
    changes (embedding, norms, head) is in both. `whole` is the same of a model that keeps everything, which may be
    computed in another way than narrowed ones.
    """

    speedup: float
    workload: Workload
    modules: tuple[str, ...]
    prices: Prices = field(repr=False)
    whole: tuple[float, float]
    ends: tuple[tuple[float, float], ...]
    conditions: dict = field(repr=False)
    drop_modules: bool = False

    @property
    def budget(self) -> float:
        """The price of the layers at which the line between the ends has the speed-up; of all, or of those that are
        hardly narrowed, where no more need go."""
        if self.needs_nothing:
            return self.whole[0]
        return self.ends[0][0] if self.needs_little else budget_at(self.ends, self.speedup)

    @property
    def needs_nothing(self) -> bool:
        """Whether a model that keeps everything is so fast already, since its steps are computed otherwise."""
        return self.whole[1] <= 1 / self.speedup

    @property
    def needs_little(self) -> bool:
        """Whether a model that is hardly narrowed is so fast already, or one that is not narrowed at all."""
        return self.needs_nothing or self.ends[0][1] <= 1 / self.speedup

    def is_met(self, measured: Ratio) -> bool:
        """Whether a measured speed-up is the one asked for, but for its own noise; or more, where little need go."""
        if self.needs_little and measured.median >= self.speedup:
            return True
        return measured.low <= self.speedup <= measured.high or abs(measured.median / self.speedup - 1) <= NEAR

    def check(self, dense: nn.Module, modules: Sequence[str], drop_modules: bool = False) -> None:
        """Raise ValueError unless it was measured of this model, here and now, and with these modules."""
        if self.drop_modules != drop_modules:
            raise ValueError(f"the speed-up was measured with drop_modules {self.drop_modules}, the recipe says "
                             f"{drop_modules}: measure it anew")  # fmt: skip
        if set(self.modules) != set(modules):
            raise ValueError(f"the speed-up was measured with {'+'.join(self.modules)}, the recipe narrows "
                             f"{'+'.join(modules)}: measure it anew")  # fmt: skip
        for name, now in conditions(dense, self.workload).items():
            if self.conditions[name] != now:
                raise ValueError(
                    f"the speed-up was measured with {name} {self.conditions[name]}, now it is {now}: measure it anew"
                )


def check_speedup(speedup: float) -> None:
    """Raise ValueError unless a model can be asked to be so many times as fast."""
    if isinstance(speedup, bool) or not isinstance(speedup, int | float) or not 1 < speedup < math.inf:
        raise ValueError(f"speedup is how many times as fast and must be above 1, got {speedup!r}")


def check_in_reach_of_a_clock(dense: nn.Module) -> None:
    """Raise ValueError where the model does not run as a whole on one device."""
    devices = {str(parameter.device) for parameter in dense.parameters()}
    if len(devices) > 1:
        raise ValueError(f"a speed-up is measured on one device, the model is spread over {', '.join(sorted(devices))}")


def speed_goal(
    dense: nn.Module,
    speedup: float,
    *,
    tokens: str = "decode",
    batch: int = 1,
    context: int | None = None,
    modules: Sequence[str] = MODULES,
    budget: str = "latency",
    drop_modules: bool = False,
    progress: bool = False,
) -> SpeedGoal:
    """A speed-up of this model that `prune` can be given, once it is measured that it can be had and told from noise.

    `tokens`, `batch` and `context` are what is timed, see `Workload`; the context is 512 or as much as the model has.
    `modules` are those that may be narrowed, with `drop_modules` to nothing. `budget`: what widths are chosen by,
    seconds of the modules ("latency", from a table that is measured once and kept) or, to compare, "parameters". Takes
    seconds to a minute.

    Raises ValueError for what cannot be pruned, a speed-up that the narrowest widths do not reach, and on a device too
    noisy to tell.
    """
    check_speedup(speedup)
    check_prunable(dense)
    check_modules(dense.config, modules, "dims")
    if not isinstance(drop_modules, bool):
        raise ValueError(f"drop_modules must be True or False, got {drop_modules!r}")
    if budget not in BUDGETS:
        raise ValueError(f"unknown budget {budget!r}, allowed: {', '.join(BUDGETS)}")
    check_in_reach_of_a_clock(dense)
    if context is None and tokens in ("decode", "prefill"):
        context = min(DEFAULT_CONTEXT, longest_context(dense.config, tokens))
    workload = Workload(tokens, batch, context)
    workload.check(dense.config)
    if budget == "latency":
        prices = latency_table(dense, workload, progress=progress).prices
    else:
        prices = parameter_prices(dense.config)
    plans = (
        dense_widths(dense.config),
        barely_narrowed(dense, modules),
        narrowest_widths(dense, modules, drop_modules),
    )
    measured = [compared(dense, model_of_widths(dense, widths), workload, progress=progress) for widths in plans]
    spread = max(measured[0].spread, measured[-1].spread)
    if not spread < speedup**2:  # the interval of that very speed-up would hold 1
        raise ValueError(
            f"speedup {speedup} cannot be told from noise on this device (inconclusive): the interval of repeated "
            f"ratios is {spread - 1:.0%} wide; let it do nothing else meanwhile, or ask for more"
        )
    if speedup > max(ratio.median for ratio in measured):
        raise ValueError(
            f"speedup {speedup} is out of reach: with the narrowest {'+'.join(modules)} {workload.tokens} is "
            f"{measured[-1].median:.2f} times as fast ({measured[-1].low:.2f} to {measured[-1].high:.2f})"
        )
    whole, *ends = [
        (total_price(prices, widths), 1 / ratio.median) for widths, ratio in zip(plans, measured, strict=True)
    ]
    goal = SpeedGoal(
        speedup, workload, tuple(modules), prices, whole, tuple(ends), conditions(dense, workload), drop_modules
    )
    if goal.needs_little:
        removed, ratio = ("nothing", measured[0]) if goal.needs_nothing else ("next to nothing", measured[1])
        warnings.warn(
            f"speedup {speedup} is reached with {removed} removed: that model is {ratio.median:.2f} times as fast in "
            "the code of narrowed ones",
            stacklevel=2,
        )
    return goal


def narrowest_widths(dense: nn.Module, modules: Sequence[str], drop_modules: bool = False) -> tuple[Widths, ...]:
    """The least aligned widths of every layer; with `drop_modules` none, but for one attention."""
    whole = dense_widths(dense.config)
    least = allowed_widths(dense.config, whole[0], modules, engine_by_name("transformers"))
    narrow = Widths(whole[0].kv_heads, *(widths[0] for widths in least))
    if not drop_modules:
        return (narrow,) * len(whole)
    drops_attention, drops_mlp = whole_modules(modules)
    first = replace(narrow, mlp=0) if drops_mlp else narrow
    others = replace(first, qk_head_dim=0, v_head_dim=0) if drops_attention else first
    return (first, *(others,) * (len(whole) - 1))


def widths_at_speed(
    dense: nn.Module,
    goal: SpeedGoal,
    widths_within: Callable[[float], tuple[Widths, ...]],
    *,
    progress: bool = False,
) -> tuple[Widths, ...]:
    """The widths, of those that `widths_within` finds for a budget, whose model is as fast as asked for, or nearest.

    The budget lies on the line between the goal's two ends, and holds all widths where nothing need go; where the model
    that comes of it misses the goal by more than its noise, that measurement becomes a point of the line, and the
    budget is read off again.
    """
    points, tried, everything = list(goal.ends), {}, dense_widths(dense.config)
    for correction in range(1 + CORRECTIONS):
        keeps_budget = goal.needs_nothing or not correction
        widths = widths_within(goal.budget if keeps_budget else budget_at(points, goal.speedup))
        if widths == everything and not goal.needs_nothing:  # by prices a step may cost nothing
            widths = barely_narrowed(dense, goal.modules)
        if widths in tried:
            break
        tried[widths] = compared(dense, model_of_widths(dense, widths), goal.workload, progress=progress)
        if goal.is_met(tried[widths]):
            return widths
        points.append((total_price(goal.prices, widths), 1 / tried[widths].median))
    return min(tried, key=lambda widths: abs(math.log(tried[widths].median / goal.speedup)))


def budget_at(points: Sequence[tuple[float, float]], speedup: float) -> float:
    """The price at which a model takes 1 / speedup of the dense one's time: on straight lines between the points.

    Points are (price, time over the dense model's); a dearer one never takes less than a cheaper.
    """
    prices, times = np.array(sorted(points)).T
    return float(np.interp(1 / speedup, np.maximum.accumulate(times), prices))
