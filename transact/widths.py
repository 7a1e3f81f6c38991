"""How wide each layer stays: budgets, uniform widths, and the paper's schedule of shots."""

import copy
import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from transformers import PretrainedConfig

MODULES = ("qk", "vo", "mlp")
GRANULARITIES = ("dims", "heads", "both")


@dataclass(frozen=True)
class Widths:
    """Widths of one layer: key-value heads, dimensions of a query or key head, of a value head, and of the MLP.

    A layer whose attention is dropped has heads of 0 dimensions, one whose MLP is an MLP of 0.
    """

    kv_heads: int
    qk_head_dim: int
    v_head_dim: int
    mlp: int

    @property
    def has_attention(self) -> bool:
        return self.v_head_dim > 0

    @property
    def has_mlp(self) -> bool:
        return self.mlp > 0

    @property
    def missing(self) -> str:
        """What the layer does without, in words; empty where it has both modules."""
        return " and ".join(
            name for name, is_there in (("attention", self.has_attention), ("MLP", self.has_mlp)) if not is_there
        )


def head_dim_of(config: PretrainedConfig) -> int:
    """Dimensions of a head of the dense model: a configuration may leave it out."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def dense_widths(config: PretrainedConfig) -> tuple[Widths, ...]:
    """The widths of the unpruned model, layer by layer."""
    head_dim = head_dim_of(config)
    widths = Widths(config.num_key_value_heads, head_dim, head_dim, config.intermediate_size)
    return (widths,) * config.num_hidden_layers


def widths_of(config: PretrainedConfig) -> tuple[Widths, ...]:
    """The widths of a model by its configuration, narrowed or dense."""
    if config.model_type != "transact_llama":
        return dense_widths(config)
    lists = (config.kv_head_counts, config.qk_head_dims, config.v_head_dims, config.intermediate_sizes)
    return tuple(Widths(*widths) for widths in zip(*lists, strict=True))


def linear_parameters(config: PretrainedConfig, widths: Sequence[Widths]) -> int:
    """Weights of the decoder layers' linear modules at these widths: what `ratio` is a fraction of."""
    group = config.num_attention_heads // config.num_key_value_heads
    return sum(
        config.hidden_size * (w.kv_heads * (group + 1) * (w.qk_head_dim + w.v_head_dim) + 3 * w.mlp) for w in widths
    )


def fraction_removed(config: PretrainedConfig, widths: Sequence[Widths]) -> float:
    """Fraction of the decoder layers' linear parameters that these widths remove."""
    return 1 - linear_parameters(config, widths) / linear_parameters(config, dense_widths(config))


def kv_elements_per_token(widths: Sequence[Widths]) -> int:
    """Elements that one token adds to the KV cache, over all layers."""
    return sum(w.kv_heads * (w.qk_head_dim + w.v_head_dim) for w in widths)


def kv_fraction_removed(config: PretrainedConfig, widths: Sequence[Widths]) -> float:
    """Fraction of the dense model's KV-cache bytes per token that these widths remove."""
    return 1 - kv_elements_per_token(widths) / kv_elements_per_token(dense_widths(config))


def check_ratio(name: str, ratio: float | None) -> None:
    """Raise ValueError unless the ratio is a fraction that a model can lose (or None)."""
    if ratio is not None and (isinstance(ratio, str) or not 0 <= ratio < 1):
        raise ValueError(f"{name} is the fraction removed and must lie in [0, 1), got {ratio!r}")


def check_widths(config: PretrainedConfig, widths: Sequence[Widths], *, drop_modules: bool = False) -> None:
    """Raise ValueError unless there is one for each layer and none is wider than the model's, or half a RoPE pair.

    With `drop_modules` both widths of heads, or that of the MLP, may be 0, but attention not in all layers.
    """
    if len(widths) != config.num_hidden_layers or not all(isinstance(one, Widths) for one in widths):
        raise ValueError(f"widths must be one Widths a layer, {config.num_hidden_layers} of them, got {widths!r}")
    for layer, (one, dense) in enumerate(zip(widths, dense_widths(config), strict=True)):
        for name, most in vars(dense).items():
            width, least = getattr(one, name), 0 if drop_modules and name != "kv_heads" else 1
            if not isinstance(width, int) or not least <= width <= most:
                raise ValueError(f"widths of layer {layer}: {name} must lie between {least} and {most}, got {width}")
        if one.qk_head_dim % 2:
            raise ValueError(f"widths of layer {layer}: qk_head_dim must be even, got {one.qk_head_dim}")
        if (one.qk_head_dim == 0) != (one.v_head_dim == 0):
            raise ValueError(
                f"widths of layer {layer}: without attention qk_head_dim and v_head_dim are both 0, got "
                f"{one.qk_head_dim} and {one.v_head_dim}"
            )
    check_some_attention(widths)


def check_some_attention(widths: Sequence[Widths]) -> None:
    """Raise ValueError where no layer has attention, by which alone tokens see each other."""
    if not any(one.has_attention for one in widths):
        raise ValueError("attention is dropped in all layers: at least one must keep it")


def whole_modules(modules: Sequence[str]) -> tuple[bool, bool]:
    """Whether these parts are all of attention, and all of the MLP: what can be dropped."""
    return {"qk", "vo"} <= set(modules), "mlp" in modules


def narrower(current: Widths, mha_dim: int, mlp_dim: int, group: int, granularity: str = "dims") -> Widths:
    """The paper's widths of one layer whose attention output is to be `mha_dim` and whose MLP `mlp_dim` wide.

    Whole heads: ceil(mha_dim / head width) of them; dimensions: mha_dim // heads of each, rounded up to even; both:
    heads first (the paper, "Importance"). With grouped queries a whole key-value head goes with its group.
    """
    kv_heads, width = current.kv_heads, current.v_head_dim
    if granularity != "dims":
        kv_heads = min(kv_heads, math.ceil(mha_dim / (width * group)))
    if granularity != "heads":
        width = min(width, _even(mha_dim // (kv_heads * group)))
    qk = min(current.qk_head_dim, width) if granularity != "heads" else current.qk_head_dim
    return Widths(kv_heads, qk, width, min(current.mlp, mlp_dim))


def _even(width: int) -> int:
    """At least 2, rounded up to even: RoPE rotates pairs."""
    return max(2, width + width % 2)


def next_shot(current: int, target: int, shots_left: int) -> int:
    """A width after the next of `shots_left` shots (the paper, "Iterative schedule")."""
    return current - (current - target) // shots_left


def widths_after_shot(current: Widths, target: Widths, shots_left: int) -> Widths:
    """Widths of one layer after the next shot on the way to `target`; every width steps by itself, pairs stay whole."""
    if shots_left == 1:
        return target
    steps = {name: next_shot(width, getattr(target, name), shots_left) for name, width in vars(current).items()}
    return replace(Widths(**steps), qk_head_dim=_even(steps["qk_head_dim"]))


def widths_by_name(
    config: PretrainedConfig, *, mha_dim: int | None = None, mlp_dim: int | None = None, granularity: str = "dims"
) -> tuple[Widths, ...]:
    """The same widths in every layer, named as the paper does: A = heads x head width, and M.

    What is left out stays whole. Raises ValueError where a width is wider than the model's, not positive, or where
    `mha_dim` gives no even width to every head or, with `granularity` "heads", is no multiple of a group's width.
    """
    heads, head_dim, dense = config.num_attention_heads, head_dim_of(config), dense_widths(config)[0]
    group = heads // config.num_key_value_heads
    mha_dim = heads * head_dim if mha_dim is None else mha_dim
    mlp_dim = config.intermediate_size if mlp_dim is None else mlp_dim
    if not 1 <= mlp_dim <= config.intermediate_size:
        raise ValueError(f"mlp-dim must lie between 1 and the model's {config.intermediate_size}, got {mlp_dim}")
    step, means = {
        "dims": (2 * heads, f"{heads} x an even width of a head"),
        "heads": (group * head_dim, f"whole key-value heads, {group} x {head_dim} wide each with their queries"),
        "both": (2 * group, f"{group} x an even width of the heads of a group"),
    }[granularity]
    if not 1 <= mha_dim <= heads * head_dim or mha_dim % step:
        raise ValueError(
            f"mha-dim must be a multiple of {step} ({means}) up to the model's {heads * head_dim}, got {mha_dim}"
        )
    return (narrower(dense, mha_dim, mlp_dim, group, granularity),) * config.num_hidden_layers


def alignment(config: PretrainedConfig) -> tuple[int, int]:
    """Multiples of head and MLP widths: 8 and 64, less where a head has fewer than 64 or an MLP fewer than 1536."""
    head, mlp = dense_widths(config)[0].v_head_dim, config.intermediate_size
    return max(1, min(8, head // 8)), max(1, 2 ** min(6, (mlp // 24).bit_length() - 1))


def uniform_widths(
    config: PretrainedConfig,
    ratio: float,
    *,
    kv_ratio: float | None = None,
    granularity: str = "dims",
    modules: Sequence[str] = MODULES,
    head_multiple: int | None = None,
    mlp_multiple: int | None = None,
    tolerance: float = 0.005,
) -> tuple[Widths, ...]:
    """Widths that remove `ratio` of the decoder layers' linear parameters, the same share of every module.

    `modules` names what may be narrowed (qk, vo, mlp); they lose more for those that may not. `granularity` is what
    attention loses: dimensions inside heads, whole key-value heads, or both. `kv_ratio` is the least fraction of the
    KV bytes to remove as well.

    Head widths are rounded to `head_multiple`. The last of `modules` takes up what that gives or takes: MLP widths are
    multiples of `mlp_multiple`, and where the remainder does not divide evenly some layers, spread over the depth, get
    one multiple more. Left out, both multiples are what `alignment` says; in a model too small to come within
    `tolerance` of the ratio with them, they are halved until it does.

    Raises ValueError for a ratio outside [0, 1) or beyond reach.
    """
    check_ratio("ratio", ratio)
    check_ratio("kv-ratio", kv_ratio)
    check_modules(config, modules, granularity)
    head_multiple = alignment(config)[0] if head_multiple is None else head_multiple
    mlp_multiple = alignment(config)[1] if mlp_multiple is None else mlp_multiple
    for name, multiple in (("head_multiple", head_multiple), ("mlp_multiple", mlp_multiple)):
        if multiple < 1:
            raise ValueError(f"{name} must be at least 1, got {multiple}")
    if ratio == 0 and not kv_ratio:
        return dense_widths(config)
    # head widths give way last: they are what attention kernels want aligned
    nearest = None
    roundings = (
        (math.ceil, round) if granularity == "heads" else (round, math.ceil)
    )  # the paper's: heads are rounded up
    settings = itertools.product(roundings, _halvings(head_multiple, 2), _halvings(mlp_multiple, 1))
    for rounding, heads, mlp in settings:
        rounding = math.floor if kv_ratio else rounding
        widths = _rounded_widths(config, ratio, kv_ratio or 0.0, granularity, modules, heads, mlp, rounding)
        off = abs(fraction_removed(config, widths) - ratio)
        if off <= tolerance and kv_fraction_removed(config, widths) >= (kv_ratio or 0) - 1e-9:
            return widths
        if nearest is None or off < nearest[0]:
            nearest = off, widths
    removed, kv_removed = fraction_removed(config, nearest[1]), kv_fraction_removed(config, nearest[1])
    also = f" together with kv-ratio {kv_ratio}" if kv_ratio else ""
    raise ValueError(
        f"ratio {ratio} is out of reach{also}: with {granularity} of {'+'.join(modules)} the nearest uniform widths "
        f"of this model remove {removed:.3f} (KV {kv_removed:.3f})"
    )


def widths_of_one_layer(
    config: PretrainedConfig,
    layer: int,
    ratio: float,
    *,
    granularity: str = "dims",
    modules: Sequence[str] = MODULES,
) -> tuple[Widths, ...]:
    """The dense widths, but for one layer that loses `ratio` of its own parameters as `uniform_widths` has it.

    Raises ValueError for a layer that the model lacks, and as `uniform_widths`.
    """
    if not 0 <= layer < config.num_hidden_layers:
        raise ValueError(f"layer must lie between 0 and {config.num_hidden_layers - 1}, got {layer}")
    alone = copy.copy(config)
    alone.num_hidden_layers = 1
    widths = list(dense_widths(config))
    [widths[layer]] = uniform_widths(alone, ratio, granularity=granularity, modules=modules)
    return tuple(widths)


def check_modules(config: PretrainedConfig, modules: Sequence[str], granularity: str) -> None:
    """Raise ValueError for unknown modules or granularity, or for query-key pairs that cannot be dropped."""
    if not modules or set(modules) - set(MODULES):
        raise ValueError(f"modules must name some of {', '.join(MODULES)}, got {', '.join(modules) or 'none'}")
    if granularity not in GRANULARITIES:
        raise ValueError(f"unknown granularity {granularity!r}, allowed: {', '.join(GRANULARITIES)}")
    if granularity != "dims" and ("qk" in modules) != ("vo" in modules):
        raise ValueError("whole heads are pruned in qk and vo together: name both modules or neither")


def has_query_key_norm(config: PretrainedConfig) -> bool:
    """Whether queries and keys are normalised head by head (Qwen3): then no pair of them can be dropped exactly."""
    return config.model_type == "qwen3" or (config.model_type == "transact_llama" and config.query_key_norm)


def prunable_modules(config: PretrainedConfig, modules: Sequence[str]) -> tuple[str, ...]:
    """The modules without query-key where its norm forbids dropping pairs."""
    return tuple(m for m in modules if m != "qk" or not has_query_key_norm(config))


def _halvings(multiple: int, least: int) -> list[int]:
    """The multiple, half of it, and so on down to `least`."""
    return [multiple] if multiple <= least else [multiple, *_halvings(multiple // 2, least)]


def _rounded_widths(
    config: PretrainedConfig,
    ratio: float,
    kv_ratio: float,
    granularity: str,
    modules: Sequence[str],
    head_multiple: int,
    mlp_multiple: int,
    rounding: Callable[[float], int],
) -> tuple[Widths, ...]:
    """The widths nearest to the ratio at these multiples, whatever fraction they remove."""
    dense, head_dim = dense_widths(config)[0], head_dim_of(config)
    group = config.num_attention_heads // dense.kv_heads
    if granularity == "dims":
        modules = prunable_modules(config, modules)
    whole = linear_parameters(config, [dense])
    attention = config.hidden_size * dense.kv_heads * (group + 1) * head_dim
    prunable = sum(attention for m in modules if m != "mlp") + (3 * config.hidden_size * dense.mlp) * ("mlp" in modules)
    keep = max(0.0, 1 - ratio * whole / prunable)
    head_share = len([m for m in modules if m != "mlp"]) / 2  # of the KV cache that can be narrowed
    keep_heads = min(keep, max(0.0, 1 - kv_ratio / head_share)) if head_share else 1.0
    step = math.lcm(2, head_multiple)
    kv_heads, qk, v = dense.kv_heads, head_dim, head_dim
    if head_share and granularity != "dims":
        kv_heads = min(kv_heads, max(1, (math.ceil if granularity == "both" else rounding)(keep_heads * kv_heads)))
    if head_share and granularity != "heads":
        wanted = keep_heads * dense.kv_heads * head_dim / kv_heads / step
        width = min(head_dim, max(step, rounding(wanted) * step))
        qk, v = (width if "qk" in modules else qk), (width if "vo" in modules else v)
    narrow = Widths(kv_heads, qk, v, dense.mlp)
    if "mlp" in modules:
        return _spread(config, narrow, "mlp", mlp_multiple, ratio)
    if granularity == "heads":
        return _spread(config, narrow, "kv_heads", 1, ratio)
    return _spread(config, narrow, "v_head_dim" if "vo" in modules else "qk_head_dim", step, ratio)


def _spread(config: PretrainedConfig, narrow: Widths, part: str, multiple: int, ratio: float) -> tuple[Widths, ...]:
    """`narrow` in every layer, but for one part: multiples of it, spread over the depth, use up the budget."""
    layers, most = config.num_hidden_layers, getattr(dense_widths(config)[0], part)
    without = linear_parameters(config, [replace(narrow, **{part: 0})])
    each = linear_parameters(config, [replace(narrow, **{part: 1})]) - without
    budget = (1 - ratio) * linear_parameters(config, dense_widths(config)) - layers * without
    multiples = min(layers * math.ceil(most / multiple), max(layers, round(budget / each / multiple)))
    # boundaries of an even split: consecutive differences are the quotient or one more, spread over the depth
    boundaries = [multiples * index // layers for index in range(layers + 1)]
    counts = [after - before for before, after in itertools.pairwise(boundaries)]
    return tuple(replace(narrow, **{part: min(most, count * multiple)}) for count in counts)
