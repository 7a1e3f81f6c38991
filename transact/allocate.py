"""Allocation: which layer and module gives up how much, under a parameter budget and a KV-cache budget at once."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PretrainedConfig

from .scores import LayerScores, accumulate, standardised
from .widths import (
    MODULES,
    Widths,
    alignment,
    check_modules,
    check_ratio,
    dense_widths,
    fraction_removed,
    has_query_key_norm,
    kv_elements_per_token,
    kv_fraction_removed,
    linear_parameters,
    prunable_modules,
    widths_of,
)

TOLERANCE = 0.005  # of the fraction removed


def removal_losses(scores: torch.Tensor) -> torch.Tensor:
    """Loss at each kept width, (n + 1,): entry w is what dropping all but the w best costs, summed over heads.

    `scores` (n,) or (heads, n) are cumulative: each says what removing its dimension and all below it costs.
    """
    ordered = torch.atleast_2d(scores).double().sort(dim=-1).values.sum(dim=0)
    return torch.cat((ordered.new_zeros(1), ordered)).flip(0).cpu()


@dataclass(frozen=True)
class _Choices:
    """Every module of every layer as a row: the widths to choose from, their losses, parameters and KV elements."""

    widths: torch.Tensor
    losses: torch.Tensor  # infinite where a row has fewer choices than others
    parameters: torch.Tensor
    kv_elements: torch.Tensor

    def pick(self, price: float, kv_price: float) -> torch.Tensor:
        """Of each row the choice that costs least at these prices of a parameter and of a KV element."""
        return (self.losses + price * self.parameters + kv_price * self.kv_elements).argmin(dim=1, keepdim=True)


def searched_widths(
    config: PretrainedConfig,
    scores: Sequence[LayerScores],
    ratio: float,
    *,
    kv_ratio: float | None = None,
    modules: Sequence[str] = MODULES,
) -> tuple[Widths, ...]:
    """Widths of each layer's QK, VO and MLP that lose least, by cumulative scores that all layers and modules share.

    `ratio` of the dense decoder layers' linear parameters is removed, and at least `kv_ratio` of the KV bytes per
    token. Lagrangian relaxation: at a price for a parameter and one for a KV element every module chooses by itself;
    bisection finds the prices that meet the budgets, and MLP widths use up what is left over. Widths are aligned.

    Raises ValueError where the budgets cannot be met, saying which one gives and what is reachable.
    """
    check_ratio("ratio", ratio)
    check_ratio("kv-ratio", kv_ratio)
    check_modules(config, modules, "dims")
    choices = _choices(config, scores, prunable_modules(config, modules))
    total, kv_total = linear_parameters(config, dense_widths(config)), kv_elements_per_token(dense_widths(config))
    budget, kv_budget = (1 - ratio) * total, (1 - (kv_ratio or 0.0)) * kv_total

    def spent(picked: torch.Tensor) -> tuple[float, float]:
        return choices.parameters.gather(1, picked).sum().item(), choices.kv_elements.gather(1, picked).sum().item()

    def cheapest(kv_price: float) -> torch.Tensor:
        """The choice within the parameter budget at this price of a KV element, or the narrowest."""
        return _bisect(lambda price: choices.pick(price, kv_price), lambda picked: spent(picked)[0] <= budget)

    picked = cheapest(0.0)
    if spent(picked)[1] > kv_budget:
        picked = _bisect(cheapest, lambda picked: spent(picked)[1] <= kv_budget)
    widths = _as_widths(config, choices.widths.gather(1, picked).flatten().tolist(), widths_of(config))
    _check_budgets(config, widths, ratio, kv_ratio or 0.0, choices, modules)
    return _use_up(config, choices, picked, budget)


def _choices(config: PretrainedConfig, scores: Sequence[LayerScores], modules: Sequence[str]) -> _Choices:
    head_multiple, mlp_multiple = alignment(config)
    group = config.num_attention_heads // config.num_key_value_heads
    rows = []
    for layer, current in zip(scores, widths_of(config), strict=True):
        per_head = config.hidden_size * current.kv_heads * (group + 1)
        pairs = removal_losses(layer.rope_pairs).repeat_interleave(2)  # at width w and w + 1: a pair is two wide
        for module, losses, most, multiple, parameters, kv in (
            ("qk", pairs, current.qk_head_dim, max(2, head_multiple), per_head, current.kv_heads),
            ("vo", removal_losses(layer.value_dims), current.v_head_dim, head_multiple, per_head, current.kv_heads),
            ("mlp", removal_losses(layer.mlp_dims), current.mlp, mlp_multiple, 3 * config.hidden_size, 0),
        ):
            allowed = [*range(multiple, most, multiple), most] if module in modules else [most]
            rows.append((torch.tensor(allowed), losses[allowed], parameters, kv))
    longest = max(len(allowed) for allowed, *_ in rows)

    def padded(values: list[torch.Tensor], with_value: float) -> torch.Tensor:
        return torch.stack(
            [torch.nn.functional.pad(v.double(), (0, longest - len(v)), value=with_value) for v in values]
        )

    widths = padded([allowed for allowed, *_ in rows], 0)
    return _Choices(
        widths=widths.long(),
        losses=padded([losses for _, losses, *_ in rows], torch.inf),
        parameters=widths * torch.tensor([[row[2]] for row in rows]),
        kv_elements=widths * torch.tensor([[row[3]] for row in rows]),
    )


def _bisect(pick, is_met, steps: int = 60) -> torch.Tensor:
    """What `pick` gives at the lowest price (of 40 decades) that meets the budget; at the highest if none does."""
    low, high = -30.0, 10.0
    if is_met(free := pick(0.0)):
        return free
    for _ in range(steps):
        middle = (low + high) / 2
        low, high = (low, middle) if is_met(pick(10.0**middle)) else (middle, high)
    return pick(10.0**high)


def _as_widths(config: PretrainedConfig, flat: list[int], current: Sequence[Widths]) -> tuple[Widths, ...]:
    parts = zip(flat[0::3], flat[1::3], flat[2::3], current, strict=True)
    return tuple(Widths(layer.kv_heads, qk, v, mlp) for qk, v, mlp, layer in parts)


def _check_budgets(
    config: PretrainedConfig,
    widths: tuple[Widths, ...],
    ratio: float,
    kv_ratio: float,
    choices: _Choices,
    modules: Sequence[str],
) -> None:
    removed, kv_removed = fraction_removed(config, widths), kv_fraction_removed(config, widths)
    narrowest = _as_widths(config, choices.widths.masked_fill(choices.losses.isinf(), 2**40).amin(1).tolist(),
                           widths_of(config))  # fmt: skip
    if kv_removed < kv_ratio - 1e-9:
        raise ValueError(
            f"kv-ratio {kv_ratio} is out of reach: the narrowest {'+'.join(modules)} remove "
            f"{kv_fraction_removed(config, narrowest):.3f} of the KV bytes"
        )
    if removed < ratio - TOLERANCE:
        raise ValueError(
            f"ratio {ratio} is out of reach: the narrowest {'+'.join(modules)} remove "
            f"{fraction_removed(config, narrowest):.3f} of the linear parameters"
        )
    if removed > ratio + TOLERANCE and kv_ratio and "mlp" in modules:
        full = tuple(Widths(w.kv_heads, w.qk_head_dim, w.v_head_dim, layer.mlp)
                     for w, layer in zip(widths, widths_of(config), strict=True))  # fmt: skip
        least = fraction_removed(config, full)
        if least > ratio + TOLERANCE:
            raise ValueError(
                f"kv-ratio {kv_ratio} and ratio {ratio} cannot be met together: that much KV cache takes at least "
                f"{least:.3f} of the linear parameters with it; raise ratio to {least:.2f} or lower kv-ratio"
            )


def _use_up(config: PretrainedConfig, choices: _Choices, picked: torch.Tensor, budget: float) -> tuple[Widths, ...]:
    """Widen modules, the best gain for a parameter first, while the budget allows; KV-free ones only (MLPs)."""
    picked = picked.flatten().tolist()
    spent = sum(choices.parameters[row, choice].item() for row, choice in enumerate(picked))
    while True:
        best = None
        for row in range(2, len(picked), 3):
            wider = picked[row] + 1
            if wider == choices.losses.shape[1] or choices.losses[row, wider].isinf():
                continue
            extra = (choices.parameters[row, wider] - choices.parameters[row, picked[row]]).item()
            gain = (choices.losses[row, picked[row]] - choices.losses[row, wider]).item() / extra
            if spent + extra <= budget and (best is None or gain > best[0]):
                best = gain, row, extra
        if best is None:
            break
        picked[best[1]] += 1
        spent += best[2]
    flat = [int(choices.widths[row, choice]) for row, choice in enumerate(picked)]
    return _as_widths(config, flat, widths_of(config))


def shared_pairs(scores: Sequence[LayerScores]) -> list[LayerScores]:
    """Cumulative scores with the same RoPE pairs for all layers and heads: those that all of them together mind least.

    Every head gets the mean over all heads of what removing a pair by itself costs, made cumulative again.
    """
    rows = torch.cat([layer.rope_pairs.cpu() for layer in scores])  # layers may lie on different devices
    ordered, order = rows.sort(dim=-1, stable=True)
    own = torch.empty_like(rows).scatter_(-1, order, ordered.diff(dim=-1, prepend=torch.zeros_like(ordered[:, :1])))
    shared = accumulate(own.mean(dim=0, keepdim=True))
    return [replace(layer, rope_pairs=shared.expand(len(layer.rope_pairs), -1)) for layer in scores]


def plain_widths(
    config: PretrainedConfig, scores: Sequence[LayerScores], ratio: float, *, kv_ratio: float | None = None
) -> tuple[Widths, ...]:
    """One head width and one MLP width for all layers, so that a plain Llama can hold them; the cheapest such two.

    Scores are cumulative, as for `searched_widths`, with pairs that are shared (`shared_pairs`). Head widths are
    aligned; the MLP width is the nearest to the budget, a multiple that is fine enough for it.

    Raises ValueError where no two widths meet the budgets.
    """
    check_ratio("ratio", ratio)
    check_ratio("kv-ratio", kv_ratio)
    check_modules(config, MODULES, "dims")
    dense, (head_multiple, mlp_multiple) = dense_widths(config)[0], alignment(config)
    total = linear_parameters(config, dense_widths(config))
    per_mlp_dim = 3 * config.hidden_size * config.num_hidden_layers
    while mlp_multiple > 1 and mlp_multiple * per_mlp_dim > 2 * TOLERANCE * total:
        mlp_multiple //= 2
    tolerance = max(TOLERANCE, mlp_multiple * per_mlp_dim / total / 2)  # the most that rounding moves it by
    head_losses = sum(removal_losses(layer.value_dims) for layer in scores)
    head_losses = head_losses + sum(removal_losses(layer.rope_pairs).repeat_interleave(2)[:-1] for layer in scores)
    mlp_losses = sum(removal_losses(layer.mlp_dims) for layer in scores)
    best, reached = None, []
    step = max(2, head_multiple)
    narrower_heads = [] if has_query_key_norm(config) else range(step, dense.v_head_dim, step)
    for head in [*narrower_heads, dense.v_head_dim]:
        attention = linear_parameters(config, [Widths(dense.kv_heads, head, head, 0)] * config.num_hidden_layers)
        mlp = round(((1 - ratio) * total - attention) / per_mlp_dim / mlp_multiple) * mlp_multiple
        widths = Widths(dense.kv_heads, head, head, min(dense.mlp, max(mlp, mlp_multiple)))
        every = (widths,) * config.num_hidden_layers
        removed, kv_removed = fraction_removed(config, every), kv_fraction_removed(config, every)
        reached.append((removed, kv_removed))
        if abs(removed - ratio) > tolerance + 1e-9 or kv_removed < (kv_ratio or 0) - 1e-9:
            continue
        loss = (head_losses[head] + mlp_losses[widths.mlp]).item()
        if best is None or loss < best[0]:
            best = loss, every
    if best is None:
        also = f" together with kv-ratio {kv_ratio}" if kv_ratio else ""
        enough = [pair for pair in reached if pair[1] >= (kv_ratio or 0) - 1e-9]
        nearest = (
            min(enough, key=lambda pair: abs(pair[0] - ratio)) if enough else max(reached, key=lambda pair: pair[1])
        )
        raise ValueError(
            f"ratio {ratio} is out of reach{also} with one head width and one MLP width for all layers: the nearest "
            f"remove {nearest[0]:.3f} (KV {nearest[1]:.3f})"
        )
    return best[1]


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
