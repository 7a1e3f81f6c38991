"""Allocation: which layer and module gives up how much, under a parameter budget and a KV-cache budget at once."""

import bisect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig

from .engines import Engine, check_drops, engine_by_name
from .scores import LayerScores, accumulate, scaled, standardised
from .widths import (
    MODULES,
    Widths,
    alignment,
    check_modules,
    check_ratio,
    dense_widths,
    fraction_removed,
    kv_elements_per_token,
    kv_fraction_removed,
    linear_parameters,
    prunable_modules,
    whole_modules,
    widths_of,
)

TOLERANCE = 0.005  # of the fraction removed
ATTENTION = 4.0  # see `weighed`
SPREAD = 0.5  # see `spread`


def removal_losses(scores: torch.Tensor) -> torch.Tensor:
    """Loss at each kept width, (n + 1,): entry w is what dropping all but the w best costs, summed over heads.

    `scores` (n,) or (heads, n) are cumulative: each says what removing its dimension and all below it costs.
    """
    ordered = torch.atleast_2d(scores).double().sort(dim=-1).values.sum(dim=0)
    return torch.cat((ordered.new_zeros(1), ordered)).flip(0).cpu()


def dropping_losses(scores: LayerScores) -> tuple[float, float]:
    """What dropping attention, and what dropping the MLP of a layer costs: without values no pair matters."""
    attention = removal_losses(scores.value_dims)[0] if scores.attention is None else scores.attention
    return attention.item(), removal_losses(scores.mlp_dims)[0].item()


def weighed(config: PretrainedConfig, scores: Sequence[LayerScores], tokens: int) -> list[LayerScores]:
    """Cumulative scores by which a search takes the less from attention the fewer calibration tokens they are of.

    Attention's losses count 1 + 4 M / tokens times, M being the MLP's width: of few tokens predictions and measurements
    say too little of what heads are for in other text. SmolLM2, 6,144 tokens of the default mixture, 10 and 30 %
    removed, nats on WikiText-2's validation text and on TinyStories' training text: weighed by 1 .261 and .865, .373
    and 1.068; by 2 .231 and .723, .289 and .946; by 4 .220 and .738, .271 and .945. Where tokens are plenty
    (stories260K, text of its own kind) 2 gains nothing, and loses at 50 %.
    """
    weight = 1 + ATTENTION * config.intermediate_size / tokens
    return [scaled(layer, weight, weight, 1.0) for layer in scores]


Prices = Callable[[Widths], tuple[float, float]]  # of a layer's attention and of its MLP at these widths


def parameter_prices(config: PretrainedConfig) -> Prices:
    """A layer's linear parameters, of which `ratio` is a fraction, as the price of its widths."""

    def prices(widths: Widths) -> tuple[float, float]:
        attention = linear_parameters(config, [replace(widths, mlp=0)])
        return attention, linear_parameters(config, [widths]) - attention

    return prices


def total_price(prices: Prices, widths: Sequence[Widths]) -> float:
    """The price of all layers at these widths."""
    return sum(sum(prices(layer)) for layer in widths)


@dataclass(frozen=True)
class _Group:
    """Parts of a layer (fields of `Widths`) whose widths are chosen together, and the same in all of `layers`.

    `options`: for the widths that the parts may have, narrower ones first, what they cost: loss, price, KV elements.
    """

    layers: tuple[int, ...]
    parts: tuple[str, ...]
    options: dict[tuple[int, ...], tuple[float, float, float]]


@dataclass(frozen=True)
class _Choices:
    """The options of groups, a row each: their losses, prices and KV elements."""

    losses: torch.Tensor  # infinite where a row has fewer choices than others
    prices: torch.Tensor
    kv_elements: torch.Tensor

    def pick(self, price: float, kv_price: float) -> torch.Tensor:
        """Of each row the choice that costs least at these weights of the price and of a KV element."""
        return (self.losses + price * self.prices + kv_price * self.kv_elements).argmin(dim=1, keepdim=True)

    def spent(self, picked: torch.Tensor) -> tuple[float, float]:
        """Price and KV elements of one choice for each row."""
        return self.prices.gather(1, picked).sum().item(), self.kv_elements.gather(1, picked).sum().item()


@dataclass(frozen=True)
class _Solution:
    """The widths found for groups, their loss and what they cost of the price that is searched by."""

    groups: list[_Group]
    widths: tuple[Widths, ...]
    loss: float
    spent: float


def searched_widths(
    config: PretrainedConfig,
    scores: Sequence[LayerScores],
    ratio: float,
    *,
    kv_ratio: float | None = None,
    modules: Sequence[str] = MODULES,
    engine: str = "transformers",
    drop_modules: bool = False,
) -> tuple[Widths, ...]:
    """Widths of each layer's QK, VO and MLP that lose least, by cumulative scores that all layers and modules share.

    `ratio` of the dense decoder layers' linear parameters is removed, and at least `kv_ratio` of the KV bytes per
    token. Lagrangian relaxation: at a price for a parameter and one for a KV element every module chooses by itself;
    bisection finds the prices that meet the budgets, and MLP widths use up what is left over. Widths are aligned.

    The `engine` holds them: what has to be alike is chosen together, and of one head width for all layers each is
    tried. Where it has one set of RoPE pairs, scores must say the same of all heads (`shared_pairs`).

    With `drop_modules` attention or MLP of a layer may go altogether, where that loses less; at least one attention
    stays. The engine must hold that (`Engine.drops`).

    Raises ValueError where the budgets cannot be met, saying which one gives and what is reachable.
    """
    check_ratio("ratio", ratio)
    check_ratio("kv-ratio", kv_ratio)
    check_modules(config, modules, "dims")
    if drop_modules:
        check_drops(engine)
    held, current = engine_by_name(engine), widths_of(config)
    total, kv_total = linear_parameters(config, dense_widths(config)), kv_elements_per_token(dense_widths(config))
    step = _mlp_multiple(config, held) * 3 * config.hidden_size * config.num_hidden_layers
    slack = 0 if held.mlp_by_layer else step / 2  # of large steps the nearest to the budget, not the nearest below it
    budget, kv_budget = (1 - ratio) * total + slack, (1 - (kv_ratio or 0.0)) * kv_total
    alternatives = _alternatives(config, scores, modules, engine, parameter_prices(config), drop_modules)
    found = [_solved(groups, current, budget, kv_budget) for groups in alternatives]
    tolerance = max(TOLERANCE, slack / total) + 1e-9

    def is_enough(widths: tuple[Widths, ...]) -> bool:
        kv_removed = kv_fraction_removed(config, held.cached(widths))
        return fraction_removed(config, widths) >= ratio - tolerance and kv_removed >= (kv_ratio or 0.0) - 1e-9

    def too_much(widths: tuple[Widths, ...]) -> float:
        removed, most = fraction_removed(config, widths), ratio + tolerance
        return max(0.0, removed - most) if drop_modules else removed > most  # a whole module may go far beyond it

    best = min(
        (one for one in found if is_enough(one.widths)),
        key=lambda one: (too_much(one.widths), one.loss),
        default=found[0],  # the narrowest heads
    )
    widths, widest_groups = best.widths, found[-1].groups
    narrowest = _as_widths(best.groups, [0] * len(best.groups), current)
    widest = _as_widths(widest_groups, [len(group.options) - 1 for group in widest_groups], current)
    _check_budgets(config, widths, ratio, kv_ratio or 0.0, narrowest, widest, modules, engine, tolerance)
    return widths


def spread(
    config: PretrainedConfig, widths: Sequence[Widths], scores: Sequence[LayerScores], *, engine: str = "transformers"
) -> tuple[Widths, ...]:
    """Searched widths whose MLPs, as wide together, go part of the way to those of standardised losses.

    A search takes most where losses are predicted low, and errors of neighbouring layers add up to more than was
    predicted. Where dimensions of all layers compete by what each loses, standardised in its layer (as by FLAP's
    scores: An et al., AAAI 2024), no such valley comes of it; but of few dimensions such widths take the wrong ones.
    The way is 1/2 less the fraction that is removed, and nothing from there on. Refitted in closed form, by 16,384
    tokens of the default mixture, SmolLM2 rises in nats on WikiText-2's validation text, TinyStories' training text and
    documentation, on average: at 10 % .194 as searched, .179 and .177 a quarter and half of the way; at 20 % .457, .443
    and .431; at 30 % .695, .680 and .706; at 50 % 1.253 and 1.288. Of five layers (stories260K) it is worth nothing.

    Widths are aligned, dropped MLPs stay so, and an engine that wants MLPs alike gets them as they were.
    """
    held, current = engine_by_name(engine), widths_of(config)
    rows = [row for row, one in enumerate(widths) if one.has_mlp]
    share = SPREAD - fraction_removed(config, widths)
    if share <= 0 or not held.mlp_by_layer or not rows:
        return tuple(widths)
    total = sum(widths[row].mlp for row in rows)
    standard = _standard_widths([scores[row].mlp_dims for row in rows], total)
    wanted = {row: (1 - share) * widths[row].mlp + share * one for row, one in zip(rows, standard, strict=True)}
    options = {row: allowed_widths(config, current[row], MODULES, held)[2] for row in rows}
    places = {row: max(0, bisect.bisect_right(options[row], wanted[row]) - 1) for row in rows}
    left = total - sum(options[row][place] for row, place in places.items())
    if left < 0:  # of the least widths
        return tuple(widths)
    for row in sorted(rows, key=lambda row: options[row][places[row]] - wanted[row]):  # what alignment took most from
        narrower, *wider = options[row][places[row] :]
        if wider and wider[0] - narrower <= left:
            places[row] += 1
            left -= wider[0] - narrower
    found = {row: options[row][place] for row, place in places.items()}
    return tuple(replace(one, mlp=found.get(row, 0)) for row, one in enumerate(widths))


def _standard_widths(mlp_dims: Sequence[torch.Tensor], total: int) -> list[int]:
    """Widths of MLPs, `total` together, whose dimensions compete by what each loses, standardised in its layer."""
    standard = [standardised(-removal_losses(scores).diff()) for scores in mlp_dims]
    kept = torch.cat(standard).topk(total).indices
    layers = torch.arange(len(standard)).repeat_interleave(torch.tensor([len(one) for one in standard]))
    return layers[kept].bincount(minlength=len(standard)).tolist()


def widths_within(
    config: PretrainedConfig,
    scores: Sequence[LayerScores],
    prices: Prices,
    budget: float,
    *,
    kv_ratio: float | None = None,
    modules: Sequence[str] = MODULES,
    drop_modules: bool = False,
) -> tuple[Widths, ...]:
    """As `searched_widths` in transformers, by any price: all layers together cost at most `budget`.

    Raises ValueError where the narrowest cost more, or keep too much of the KV cache.
    """
    check_ratio("kv-ratio", kv_ratio)
    check_modules(config, modules, "dims")
    kv_budget, current = (1 - (kv_ratio or 0.0)) * kv_elements_per_token(dense_widths(config)), widths_of(config)
    alternatives = _alternatives(config, scores, modules, "transformers", prices, drop_modules)
    found = [_solved(groups, current, budget, kv_budget) for groups in alternatives]

    def is_cheap(one: _Solution) -> bool:
        return one.spent <= budget * (1 + 1e-9)

    def is_small(one: _Solution) -> bool:
        return kv_fraction_removed(config, one.widths) >= (kv_ratio or 0.0) - 1e-9

    best = min((one for one in found if is_cheap(one) and is_small(one)), key=lambda one: one.loss, default=found[0])
    if not is_cheap(best):
        raise ValueError(
            f"budget {budget:.4g} is out of reach: the narrowest {'+'.join(modules)} cost {best.spent:.4g}"
        )
    if not is_small(best):
        narrowest = _as_widths(best.groups, [0] * len(best.groups), current)
        _refuse_kv_ratio(config, kv_ratio, narrowest, "+".join(modules))
    return best.widths


def _mlp_multiple(config: PretrainedConfig, held: Engine) -> int:
    """What MLP widths are multiples of: as the engine wants it, or part of that where steps are too large to budget."""
    multiple = held.mlp_multiple or alignment(config)[1]
    if held.mlp_by_layer and held.mlp_multiple is None:
        return multiple
    each = 3 * config.hidden_size * (1 if held.mlp_by_layer else config.num_hidden_layers)
    total = linear_parameters(config, dense_widths(config))
    while multiple > 1 and multiple * each > 2 * TOLERANCE * total:
        multiple //= 2
    return multiple


def _alternatives(
    config: PretrainedConfig,
    scores: Sequence[LayerScores],
    modules: Sequence[str],
    engine: str,
    prices: Prices,
    drop_modules: bool,
) -> Iterator[list[_Group]]:
    """What is to be chosen by group; again for each head width, from the narrowest, where all layers have the same.

    With `drop_modules` at first with dropping as a further choice, and then without, as if nothing was said.

    Raises ValueError where the engine runs no heads that the modules could have.
    """
    held, current = engine_by_name(engine), widths_of(config)
    heads, mlps = [], []
    for index, layer in enumerate(scores):
        allowed = allowed_widths(config, current[index], modules, held)
        heads.append(_heads_of(index, layer, current[index], allowed, held, prices))
        mlps.append(_mlp_of(index, layer, current[index], allowed, prices))
    mlps = mlps if held.mlp_by_layer else [_alike(mlps)]
    if not held.heads_by_layer:
        heads = [_alike(heads)]
    if not all(group.options for group in heads):
        raise ValueError(
            f"engine {engine!r} {held.heads_in_words()}: {'+'.join(modules)} of a model with heads of "
            f"{current[0].qk_head_dim} can be narrowed to none of these"
        )
    if held.heads_by_layer:
        if drop_modules:
            yield _with_drops(heads, mlps, scores, modules)
        yield [*heads, *mlps]
    else:
        for option, costs in heads[0].options.items():
            yield [replace(heads[0], options={option: costs}), *mlps]


def allowed_widths(
    config: PretrainedConfig, current: Widths, modules: Sequence[str], held: Engine
) -> tuple[list[int], list[int], list[int]]:
    """The aligned widths up to a layer's own, of query-key heads, value heads and MLP; of other modules its own."""
    head_multiple, mlp_multiple = alignment(config)[0], _mlp_multiple(config, held)
    pairs_multiple = math.lcm(2, head_multiple)
    modules = prunable_modules(config, modules)
    return tuple(
        sorted({*(width for width in narrower if width < most), most}) if module in modules else [most]
        for module, most, narrower in (
            ("qk", current.qk_head_dim, held.head_widths or range(pairs_multiple, current.qk_head_dim, pairs_multiple)),
            ("vo", current.v_head_dim, range(head_multiple, current.v_head_dim, head_multiple)),
            ("mlp", current.mlp, range(mlp_multiple, current.mlp, mlp_multiple)),
        )
    )


def _heads_of(
    index: int,
    scores: LayerScores,
    current: Widths,
    allowed: tuple[list[int], list[int], list[int]],
    held: Engine,
    prices: Prices,
) -> _Group:
    """Widths of a layer's query-key and value heads, all that the engine takes."""
    pairs = removal_losses(scores.rope_pairs).repeat_interleave(2).tolist()  # at w and w + 1: a pair is two wide
    values = removal_losses(scores.value_dims).tolist()
    options = {}
    for qk, v in itertools.product(allowed[0], allowed[1]):
        if held.takes_head(qk, v):
            widths = replace(current, qk_head_dim=qk, v_head_dim=v)
            options[qk, v] = pairs[qk] + values[v], prices(widths)[0], kv_elements_per_token(held.cached([widths]))
    return _Group((index,), ("qk_head_dim", "v_head_dim"), options)


def _mlp_of(
    index: int,
    scores: LayerScores,
    current: Widths,
    allowed: tuple[list[int], list[int], list[int]],
    prices: Prices,
) -> _Group:
    """Widths of a layer's MLP."""
    losses = removal_losses(scores.mlp_dims).tolist()
    options = {(width,): (losses[width], prices(replace(current, mlp=width))[1], 0) for width in allowed[2]}
    return _Group((index,), ("mlp",), options)


def _with_drops(
    heads: Sequence[_Group], mlps: Sequence[_Group], scores: Sequence[LayerScores], modules: Sequence[str]
) -> list[_Group]:
    """The groups of each layer, whose narrowest option is now to drop the module: it loses all that it gives.

    Attention stays where dropping it would lose most: one layer must have it.
    """
    drops_attention, drops_mlp = whole_modules(modules)
    lost = [dropping_losses(layer) for layer in scores]
    stays = max(range(len(lost)), key=lambda index: lost[index][0])
    if drops_attention:
        heads = [
            group if index == stays else replace(group, options={(0, 0): (attention, 0.0, 0)} | group.options)
            for index, (group, (attention, _)) in enumerate(zip(heads, lost, strict=True))
        ]
    if drops_mlp:
        mlps = [
            replace(group, options={(0,): (mlp, 0.0, 0)} | group.options)
            for group, (_, mlp) in zip(mlps, lost, strict=True)
        ]
    return [*heads, *mlps]


def _alike(groups: Sequence[_Group]) -> _Group:
    """One group of the same parts of several layers: the options that all of them have."""
    common = [widths for widths in groups[0].options if all(widths in group.options for group in groups)]
    options = {
        widths: tuple(map(sum, zip(*(group.options[widths] for group in groups), strict=True))) for widths in common
    }
    return _Group(tuple(layer for group in groups for layer in group.layers), groups[0].parts, options)


def _choices(groups: Sequence[_Group]) -> _Choices:
    longest = max(len(group.options) for group in groups)
    table = [
        [*group.options.values(), *[(torch.inf, 0, 0)] * (longest - len(group.options))] for group in groups
    ]  # fmt: skip
    return _Choices(*torch.tensor(table, dtype=torch.float64).unbind(dim=-1))


def _cheapest(choices: _Choices, budget: float, kv_budget: float) -> torch.Tensor:
    """The choices that lose least within both budgets; narrow ones where these cannot be met."""

    def within_budget(kv_price: float) -> torch.Tensor:
        return _bisect(lambda price: choices.pick(price, kv_price), lambda picked: choices.spent(picked)[0] <= budget)

    picked = within_budget(0.0)
    least = choices.kv_elements[:, 0].sum().item()
    if choices.spent(picked)[1] > kv_budget >= least:
        picked = _bisect(within_budget, lambda picked: choices.spent(picked)[1] <= kv_budget)
    return picked


def _solved(groups: list[_Group], current: Sequence[Widths], budget: float, kv_budget: float) -> _Solution:
    """What loses least of the groups' options within both budgets, what is left over being used up."""
    choices = _choices(groups)
    picked = _use_up(choices, _cheapest(choices, budget, kv_budget), budget)
    widths = _as_widths(groups, picked.flatten().tolist(), current)
    return _Solution(groups, widths, choices.losses.gather(1, picked).sum().item(), choices.spent(picked)[0])


def _bisect(pick, is_met, steps: int = 60) -> torch.Tensor:
    """What `pick` gives at the lowest price (of 40 decades) that meets the budget; at the highest if none does."""
    low, high = -30.0, 10.0
    if is_met(free := pick(0.0)):
        return free
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (low, middle) if is_met(pick(10.0**middle)) else (middle, high)
    return pick(10.0**high)


def _as_widths(groups: Sequence[_Group], picked: Sequence[int], current: Sequence[Widths]) -> tuple[Widths, ...]:
    """The current widths with the picked option of each group."""
    widths = list(current)
    for group, choice in zip(groups, picked, strict=True):
        changes = dict(zip(group.parts, list(group.options)[choice], strict=True))
        for layer in group.layers:
            widths[layer] = replace(widths[layer], **changes)
    return tuple(widths)


def _check_budgets(
    config: PretrainedConfig,
    widths: tuple[Widths, ...],
    ratio: float,
    kv_ratio: float,
    narrowest: tuple[Widths, ...],
    widest: tuple[Widths, ...],
    modules: Sequence[str],
    engine: str,
    tolerance: float,
) -> None:
    cached = engine_by_name(engine).cached
    removed, kv_removed = fraction_removed(config, widths), kv_fraction_removed(config, cached(widths))
    of = "+".join(modules) + ("" if engine == "transformers" else f" that {engine} holds")
    if kv_removed < kv_ratio - 1e-9:
        _refuse_kv_ratio(config, kv_ratio, cached(narrowest), of)
    if removed < ratio - tolerance:
        raise ValueError(
            f"ratio {ratio} is out of reach: the narrowest {of} remove "
            f"{fraction_removed(config, narrowest):.3f} of the linear parameters"
        )
    if (least := fraction_removed(config, widest)) > ratio + tolerance:  # the engine does not run the dense heads
        raise ValueError(
            f"ratio {ratio} is out of reach: the widest {of} remove {least:.3f} of the linear parameters already"
        )
    if removed > ratio + tolerance and kv_ratio and "mlp" in modules:
        full = tuple(Widths(w.kv_heads, w.qk_head_dim, w.v_head_dim, layer.mlp)
                     for w, layer in zip(widths, widths_of(config), strict=True))  # fmt: skip
        least = fraction_removed(config, full)
        if least > ratio + tolerance:
            raise ValueError(
                f"kv-ratio {kv_ratio} and ratio {ratio} cannot be met together: that much KV cache takes at least "
                f"{least:.3f} of the linear parameters with it; raise ratio to {least:.2f} or lower kv-ratio"
            )


def _refuse_kv_ratio(config: PretrainedConfig, kv_ratio: float, narrowest: Sequence[Widths], of: str) -> None:
    raise ValueError(
        f"kv-ratio {kv_ratio} is out of reach: the narrowest {of} remove "
        f"{kv_fraction_removed(config, narrowest):.3f} of the KV bytes"
    )


def _use_up(choices: _Choices, picked: torch.Tensor, budget: float) -> torch.Tensor:
    """Widen groups, the best gain for its price first, while the budget allows; KV-free ones only (MLPs)."""
    picked, spent = picked.clone(), choices.spent(picked)[0]
    kv_free = [row for row, elements in enumerate(choices.kv_elements) if not elements.any()]
    while True:
        best = None
        for row in kv_free:
            choice = picked[row].item()
            wider = choice + 1
            if wider == choices.losses.shape[1] or choices.losses[row, wider].isinf():
                continue
            extra = (choices.prices[row, wider] - choices.prices[row, choice]).item()
            gained = (choices.losses[row, choice] - choices.losses[row, wider]).item()
            gain = gained / extra if extra > 0 else math.inf
            if spent + extra <= budget and (best is None or gain > best[0]):
                best = gain, row, extra
        if best is None:
            return picked
        picked[best[1]] += 1
        spent += best[2]


def shared_pairs(scores: Sequence[LayerScores]) -> list[LayerScores]:
    """Cumulative scores with the same RoPE pairs for all layers and heads: those that all of them together mind least.

    Every head gets the mean over all heads of what removing a pair by itself costs, made cumulative again.
    """
    rows = torch.cat([layer.rope_pairs.cpu() for layer in scores])  # layers may lie on different devices
    ordered, order = rows.sort(dim=-1, stable=True)
    own = torch.empty_like(rows).scatter_(-1, order, ordered.diff(dim=-1, prepend=torch.zeros_like(ordered[:, :1])))
    shared = accumulate(own.mean(dim=0, keepdim=True))
    return [replace(layer, rope_pairs=shared.expand(len(layer.rope_pairs), -1)) for layer in scores]


def global_widths(
    config: PretrainedConfig, scores: Sequence[LayerScores], ratio: float, *, kv_ratio: float | None = None
) -> tuple[Widths, ...]:
    """FLAP's allocation: whole heads and MLP dimensions of all layers compete by scores standardised layer by layer.

    Head scores are z-scores already (`Fluctuation`). The lowest go until `ratio` of the dense linear parameters is
    gone; a layer keeps at least one head and one MLP dimension (An et al., AAAI 2024, "adaptive structure search").
    Widths are as they fall, not aligned.

    Raises ValueError where the ratio is out of reach or a KV budget is asked for, which this allocation does not know.
    """
    check_ratio("ratio", ratio)
    if kv_ratio:
        raise ValueError("allocation 'global' knows no KV budget; use 'uniform' or 'searched'")
    current, group = widths_of(config), config.num_attention_heads // config.num_key_value_heads
    units = []  # (z-score, layer, whether a head, parameters)
    for index, (layer, widths) in enumerate(zip(scores, current, strict=True)):
        head_cost = config.hidden_size * (group + 1) * (widths.qk_head_dim + widths.v_head_dim)
        for scores_of_units, is_head, cost in (
            (layer.kv_heads, True, head_cost),
            (standardised(layer.mlp_dims), False, 3 * config.hidden_size),
        ):
            units += [(score, index, is_head, cost) for score in scores_of_units.sort().values[:-1].tolist()]
    excess = linear_parameters(config, current) - (1 - ratio) * linear_parameters(config, dense_widths(config))
    heads, mlp = [w.kv_heads for w in current], [w.mlp for w in current]
    for _, index, is_head, cost in sorted(units):
        if excess <= 0:
            break
        if is_head and cost > excess:  # MLP dimensions come nearer to the budget
            continue
        excess -= cost
        (heads if is_head else mlp)[index] -= 1
    widths = tuple(Widths(h, w.qk_head_dim, w.v_head_dim, m) for h, m, w in zip(heads, mlp, current, strict=True))
    if (removed := fraction_removed(config, widths)) < ratio - TOLERANCE:
        raise ValueError(f"ratio {ratio} is out of reach: one head and one MLP dimension a layer remove {removed:.3f}")
    return widths
