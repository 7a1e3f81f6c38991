"""Surgery: cut a Llama down to a plan, by exact slices. No data, no randomness."""

import copy
from collections.abc import Sequence

import accelerate
import torch
from torch import nn
from transformers import PretrainedConfig

from .configuration_transact import TransActConfig
from .entry import (
    check_model,
    check_same_function,
    check_unquantised,
    has_own_head,
    is_finite,
    model_type_of,
    odd_weight,
    shapes_of,
)
from .modeling_transact import TransActForCausalLM
from .plan import KEPT_LAYERS, LayerPlan, Plan
from .widths import Widths, dense_widths, has_query_key_norm, head_dim_of, widths_of

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")  # dense model types that can be narrowed
# what a narrowed model's configuration takes over, beside its widths and `features_of`
CONFIGURATION_FIELDS = (
    "attention_dropout", "bos_token_id", "dtype", "eos_token_id", "head_dim", "hidden_act", "hidden_size",
    "initializer_range", "intermediate_size", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "pad_token_id", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "use_cache",
    "vocab_size", KEPT_LAYERS,
)  # fmt: skip


def check_prunable(model: nn.Module) -> None:
    """Raise ValueError unless `model` is of a family that can be narrowed, at hand, and its weights are all finite."""
    kind = model_type_of(model)
    if kind == TransActConfig.model_type:
        raise ValueError("the model is pruned already: prune its dense model, in several shots if need be")
    if kind not in FAMILIES:
        raise ValueError(f"a {kind!r} model cannot be pruned, allowed: {', '.join(FAMILIES)}")
    check_model(model)
    if head_dim_of(model.config) % 2:
        raise ValueError(f"heads of {head_dim_of(model.config)} dimensions cannot be pruned: RoPE rotates pairs")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{name} is offloaded: load the model into host memory and prune it layer by layer")
    check_unquantised(model)
    _check_weights(model)
    for name, parameter in model.named_parameters():
        if not is_finite(parameter):
            raise ValueError(f"the model's weights are not finite: {name} holds NaN or infinity")


def _whole(model: nn.Module) -> TransActForCausalLM:
    """The narrowed model that keeps everything of `model`, without weights."""
    with torch.device("meta"):
        return TransActForCausalLM(narrowed_config(model.config, dense_widths(model.config)))


@torch.inference_mode(False)
@torch.no_grad()
def whole_model(model: nn.Module) -> TransActForCausalLM:
    """The narrowed model that keeps everything of `model`, whose weights it shares."""
    whole = _whole(model)
    _take_weights(whole, model)
    whole.config.tie_word_embeddings = not has_own_head(model)
    whole.tie_weights()
    whole.generation_config = model.generation_config
    return whole


def check_computed(model: nn.Module) -> None:
    """Raise ValueError unless a model that can be pruned computes what its weights and configuration say.

    Hooks, edited modules and classes of the user's own are no part of these: what they do would be lost.
    """
    whole = _whole(model)
    _check_rope(model.model.rotary_emb, whole.config)
    with torch.inference_mode(False), torch.no_grad():
        _take_weights(whole, model)
    check_same_function(
        model, whole,
        "the model computes something else than its weights and configuration say (hooks, edited modules and classes "
        "of its own are not pruned)",
    )  # fmt: skip


def _take_weights(whole: TransActForCausalLM, model: nn.Module) -> None:
    """Give the model's weights, which are not copied, to one that has none and keeps everything."""
    whole.config._attn_implementation = model.config._attn_implementation
    whole.requires_grad_(False).load_state_dict(model.state_dict(), strict=False, assign=True)
    for mine, its in zip(whole.model.layers, model.model.layers, strict=True):
        device = its.self_attn.k_proj.weight.device
        mine.self_attn.rope_pairs = torch.arange(mine.self_attn.qk_head_dim // 2, device=device).repeat(
            mine.self_attn.kv_heads, 1
        )
    whole.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)
    _place_as(whole, model)


def _check_rope(rotary: nn.Module, config: TransActConfig) -> None:
    """Raise ValueError unless the tables are those of the configuration, but for rounding to 16 bits."""
    with torch.device("cpu"):
        own = type(rotary)(config)
    tables, wanted = rotary.original_inv_freq.float().cpu(), own.original_inv_freq
    if rotary.attention_scaling != own.attention_scaling or not torch.allclose(tables, wanted, rtol=1e-2, atol=1e-6):
        raise ValueError("the model's RoPE tables are not those of its rope_parameters: which of them is meant?")


def _check_weights(model: nn.Module) -> None:
    """Raise ValueError, naming one, unless the weights are those of the family at the configuration's sizes."""
    wanted = {name: shape for name, shape in shapes_of(_whole(model)).items() if "rope_pairs" not in name}
    found = shapes_of(model)
    if (name := odd_weight(found, wanted)) is not None:
        raise ValueError(
            f"{type(model).__name__} cannot be pruned: {name} is {found.get(name, 'missing')}, the configuration "
            f"of a {model.config.model_type!r} model has it {wanted.get(name, 'not at all')}"
        )


def window_of(config: PretrainedConfig) -> int | None:
    """How many tokens every layer of a model sees, None for all; a number in a configuration may go unused.

    Raises ValueError where layers differ in it or attend in yet another way.
    """
    if not getattr(config, "is_causal", True):
        raise ValueError("the configuration says is_causal false: models that see later tokens are not supported")
    if config.model_type in ("mistral", TransActConfig.model_type):
        return config.sliding_window
    if config.model_type == "llama":
        return None
    kinds = set(config.layer_types[: config.num_hidden_layers])
    if kinds <= {"full_attention"}:
        return None
    if kinds == {"sliding_attention"}:
        return config.sliding_window
    raise ValueError(
        f"{config.model_type!r} with layers of {' and '.join(sorted(kinds))} is not supported: all must see the same"
    )


def features_of(config: PretrainedConfig) -> dict:
    """What the code of a family does beyond Llama's, and which biases it has, whatever else its configuration says."""
    family = config.model_type
    if family == TransActConfig.model_type:
        names = ("attention_bias", "attention_output_bias", "mlp_bias", "mlp_output_bias")
        biases = {name: getattr(config, name) for name in names}
    else:
        stated, mlp = family in ("llama", "qwen3") and config.attention_bias, family == "llama" and config.mlp_bias
        biases = {
            "attention_bias": stated or family == "qwen2", "attention_output_bias": stated, "mlp_bias": mlp,
            "mlp_output_bias": mlp,
        }  # fmt: skip
    return biases | {"query_key_norm": has_query_key_norm(config), "sliding_window": window_of(config)}


def narrowed_config(config: PretrainedConfig, widths: Sequence[Widths], *, rope: str = "pairs") -> TransActConfig:
    """The configuration with the widths of every layer added, for any family that can be narrowed.

    `rope` "released" makes the narrowed head the one that sets frequencies and softmax scale. Raises ValueError where
    its width differs from layer to layer, where query-key norms forbid the widths, or as `window_of` does.
    """
    settings = {name: value for name, value in config.to_dict().items() if name in CONFIGURATION_FIELDS}
    settings |= features_of(config)
    if settings["query_key_norm"] and any(w.qk_head_dim not in (0, head_dim_of(config)) for w in widths):
        raise ValueError("queries and keys are normalised head by head: their dimensions must be kept whole")
    if rope == "released":
        if len({w.v_head_dim for w in widths}) > 1:
            raise ValueError("rope 'released' needs the same head width in every layer")
        settings["head_dim"] = widths[0].v_head_dim
    return TransActConfig(
        **{"head_dim": head_dim_of(config), **settings},
        kv_head_counts=[w.kv_heads for w in widths],
        qk_head_dims=[w.qk_head_dim for w in widths],
        v_head_dims=[w.v_head_dim for w in widths],
        intermediate_sizes=[w.mlp for w in widths],
    )


def projection_indices(plan: LayerPlan, current: Widths, group: int) -> dict[str, tuple[int, torch.Tensor]]:
    """For each linear module of a layer, the dimension to slice (0 rows, 1 columns) and the indices to keep.

    Rows of q and k stay in Hugging Face's order: first halves of all kept RoPE pairs, then second halves.
    """
    kv_heads = plan.kv_heads[:, None]
    query_heads = (kv_heads * group + torch.arange(group)).reshape(-1, 1)  # (kept heads * group, 1)
    pair_dims = plan.value_dims
    if plan.rope_pairs is not None:
        pair_dims = torch.cat((plan.rope_pairs, plan.rope_pairs + current.qk_head_dim // 2), dim=1)

    def per_query_head(dims: torch.Tensor, width: int) -> torch.Tensor:
        return (query_heads * width + dims.repeat_interleave(group, dim=0)).flatten()

    return {
        "self_attn.q_proj": (0, per_query_head(pair_dims, current.qk_head_dim)),
        "self_attn.k_proj": (0, (kv_heads * current.qk_head_dim + pair_dims).flatten()),
        "self_attn.v_proj": (0, (kv_heads * current.v_head_dim + plan.value_dims).flatten()),
        "self_attn.o_proj": (1, per_query_head(plan.value_dims, current.v_head_dim)),
        "mlp.gate_proj": (0, plan.mlp_dims),
        "mlp.up_proj": (0, plan.mlp_dims),
        "mlp.down_proj": (1, plan.mlp_dims),
    }


@torch.inference_mode(False)
@torch.no_grad()
def apply_plan(
    model: nn.Module, plan: Plan, *, rope: str = "pairs", home: torch.device | None = None
) -> TransActForCausalLM:
    """The narrowed model: a new one whose weights are bit-identical slices of the model's, same devices and dtype.

    Only values kept along other axes are products, computed in float64. The model is left as it was and shares no
    memory with the result. `rope` "released" takes frequencies and softmax scale of the narrowed head. With a `home`
    the result lies there, and no more than a layer of it beside the model meanwhile. Raises ValueError where the plan
    does not fit the model.
    """
    plan.check(model.config)
    config = narrowed_config(model.config, plan.widths, rope=rope)
    config._attn_implementation = model.config._attn_implementation
    config.tie_word_embeddings = not has_own_head(model)
    with torch.device("meta"):  # no memory and no random initialisation for weights that are replaced at once
        narrowed = TransActForCausalLM(config)

    before, weights = model.state_dict(), {}
    group = config.num_attention_heads // config.num_key_value_heads
    for index, (layer, current) in enumerate(zip(plan.layers, widths_of(model.config), strict=True)):
        prefix = f"model.layers.{index}"
        cut = {f"{prefix}.self_attn.rope_pairs": _kept_rope_pairs(before, prefix, layer)}
        for module, (dim, kept) in projection_indices(layer, current, group).items():
            name = f"{prefix}.{module}"
            kept = kept.to(before[f"{name}.weight"].device)
            cut[f"{name}.weight"] = before[f"{name}.weight"].index_select(dim, kept)
            if dim == 0 and f"{name}.bias" in before:  # o's and down's belong to the residual stream: whole
                cut[f"{name}.bias"] = before[f"{name}.bias"][kept]
        if layer.value_into is not None:
            _change_value_basis(before, cut, f"{prefix}.self_attn", layer, current, group)
        weights |= {name: tensor.to(home or tensor.device) for name, tensor in cut.items()}
    for name in before.keys() - weights.keys():
        weights[name] = before[name].to(home or before[name].device, copy=True)
    if config.tie_word_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    dropped = _dropped_parts(plan.widths)
    weights = {name: weight for name, weight in weights.items() if not name.startswith(dropped)}
    narrowed.load_state_dict(weights, strict=True, assign=True)
    rotary = model.model.rotary_emb  # its tables are not in the state dict
    mine = copy.deepcopy(rotary) if rope == "pairs" else type(narrowed.model.rotary_emb)(config)
    narrowed.model.rotary_emb = mine.to(home or rotary.inv_freq.device)
    narrowed.tie_weights()
    narrowed.generation_config = copy.deepcopy(model.generation_config)
    narrowed.requires_grad_(True)
    if home is None:
        _place_as(narrowed, model)
    return narrowed.train(model.training)


def _dropped_parts(widths: Sequence[Widths]) -> tuple[str, ...]:
    """What the names of the weights that go with dropped modules begin with."""
    parts = []
    for index, one in enumerate(widths):
        names = () if one.has_attention else ("self_attn.", "input_layernorm.")
        names += () if one.has_mlp else ("mlp.", "post_attention_layernorm.")
        parts += [f"model.layers.{index}.{name}" for name in names]
    return tuple(parts)


def _place_as(narrowed: nn.Module, model: nn.Module) -> None:
    """Over several devices hidden states are handed on as in the model."""
    device_map = getattr(model, "hf_device_map", None) or {}
    if len(set(device_map.values())) > 1:
        accelerate.dispatch_model(narrowed, device_map)


def _kept_rope_pairs(before: dict[str, torch.Tensor], prefix: str, layer: LayerPlan) -> torch.Tensor:
    """The dense RoPE pair behind each kept one, (kept heads, pairs)."""
    device = before[f"{prefix}.self_attn.k_proj.weight"].device
    if layer.rope_pairs is None:  # pairs of the narrowed head, at its own frequencies
        return torch.arange(layer.value_dims.shape[1] // 2, device=device).repeat(len(layer.kv_heads), 1)
    own = before.get(f"{prefix}.self_attn.rope_pairs")
    if own is None:
        return layer.rope_pairs.to(device)
    return own[layer.kv_heads.to(device)].gather(1, layer.rope_pairs.to(device))


def _change_value_basis(
    before: dict[str, torch.Tensor],
    weights: dict[str, torch.Tensor],
    attention: str,
    layer: LayerPlan,
    current: Widths,
    group: int,
) -> None:
    """Rows of v_proj become value_into^T rows, columns of o_proj columns value_back, head by head."""
    rows, columns = before[f"{attention}.v_proj.weight"], before[f"{attention}.o_proj.weight"]
    heads = layer.kv_heads.to(rows.device)
    into, back = layer.value_into.to(rows.device).double(), layer.value_back.to(rows.device).double()
    shape = (current.kv_heads, current.v_head_dim)
    values = into.mT @ rows.double().view(*shape, -1)[heads]
    weights[f"{attention}.v_proj.weight"] = values.flatten(0, 1).to(rows.dtype)
    if (bias := before.get(f"{attention}.v_proj.bias")) is not None:
        mapped = into.mT @ bias.double().view(*shape, 1)[heads]
        weights[f"{attention}.v_proj.bias"] = mapped.flatten().to(bias.dtype)
    readers = columns.double().view(-1, current.kv_heads, group, current.v_head_dim)[:, heads]
    output = torch.einsum("dkgv,kvr->dkgr", readers, back)
    weights[f"{attention}.o_proj.weight"] = output.flatten(1).to(columns.dtype)
