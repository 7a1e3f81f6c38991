"""A Llama whose heads are alike that computes what a narrowed model does, exactly: what other tools load or hold.

A plain Llama has one number of heads, one head width and one MLP width for all layers and one set of RoPE frequencies
for all heads; llama.cpp holds heads and an MLP of each layer's own number and width. What is narrower than the widest
is padded with zeros, which changes nothing but the size; RoPE pairs are kept by a frequency factor each ("longrope").
The softmax scale of the dense head goes into RoPE's attention factor: folded into bfloat16 weights it would be rounded.
"""

import copy
import functools
from collections.abc import Sequence
from dataclasses import fields

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from ..configuration_transact import TransActConfig
from ..entry import check_model, check_same_function, has_own_head
from ..modeling_transact import TransActForCausalLM
from ..plan import kept_layers_of
from ..prune import whole_model
from ..whitelist import ROPE_TYPES, check_exportable, check_rope, check_weights
from ..widths import Widths, fraction_removed, widths_of

MOST_PADDING = 0.01  # of the dense linear parameters that padding may bring back without being asked for


def padded_widths(model: nn.Module, *, by_layer: bool = False) -> tuple[tuple[Widths, ...], list[int]]:
    """The widths of layers whose heads are alike, and the dense RoPE pairs that all heads rotate.

    All layers get the same ones, unless each keeps `by_layer` its own key-value heads and MLP.
    """
    config, widths = model.config, widths_of(model.config)
    pairs = sorted({pair for layer in model.model.layers for pair in layer.self_attn.rope_pairs.flatten().tolist()})
    head_dim = max(2 * len(pairs), *(w.v_head_dim for w in widths))
    head_dim += head_dim % 2
    if by_layer:
        return tuple(Widths(w.kv_heads, head_dim, head_dim, w.mlp) for w in widths), pairs
    kv_heads = max(w.kv_heads for w in widths)
    group = config.num_attention_heads // config.num_key_value_heads
    while config.hidden_size % (kv_heads * group):  # LlamaConfig insists on it, needlessly
        kv_heads += 1
    return (Widths(kv_heads, head_dim, head_dim, max(w.mlp for w in widths)),) * len(widths), pairs


def _narrowed(model: nn.Module, pad: bool, format: str) -> TransActForCausalLM:
    """The model as a narrowed one, which a model that only lost whole layers is not yet.

    Raises ValueError where this format cannot hold what it computes, or only in a much larger one. With `pad` it may
    be as large as the dense model.
    """
    by_layer = format == "gguf"
    if not isinstance(model, TransActForCausalLM) and kept_layers_of(model.config) is not None:
        check_model(model)
        check_weights(model)
        model = whole_model(model)
    config = model.config
    if not isinstance(model, TransActForCausalLM):
        raise ValueError(
            f"a pruned checkpoint is exported, this one is of type {config.model_type!r} ({type(model).__name__})"
        )
    check_exportable(config, format)
    check_weights(model)
    padded, pairs = padded_widths(model, by_layer=by_layer)
    if not _keeps_rope(config, padded[0].qk_head_dim, pairs):
        check_rope(config, ROPE_TYPES)
    narrow, wide = fraction_removed(config, widths_of(config)), fraction_removed(config, padded)
    if narrow - wide > MOST_PADDING and not pad:
        holds = (
            "a GGUF file has one head width and one set of RoPE pairs for all layers and heads" if by_layer else
            "a plain Llama has the same widths and RoPE pairs in all layers and heads"
        )  # fmt: skip
        raise ValueError(
            f"{holds}: of the {narrow:.1%} of the linear parameters that were removed only {wide:.1%} would stay "
            f"removed; prune with --for {'llama.cpp' if by_layer else 'plain'} or pass --pad"
        )
    return model


def plain_llama(model: nn.Module, *, pad: bool = False) -> LlamaForCausalLM:
    """A stock LlamaForCausalLM that computes what the narrowed `model` does; weights are copies.

    Raises ValueError where `check_exportable` does, where weights or logits are not those of the configuration, or
    where padding would make it much larger, unless `pad` allows that.
    """
    model = _narrowed(model, pad, "llama")
    config, (widths, pairs) = model.config, padded_widths(model)
    group = config.num_attention_heads // config.num_key_value_heads
    settings = _settings(model, LlamaConfig, widths[0].qk_head_dim, pairs) | {
        "num_attention_heads": widths[0].kv_heads * group, "num_key_value_heads": widths[0].kv_heads,
        "intermediate_size": widths[0].mlp, "attention_bias": config.attention_bias or config.attention_output_bias,
        "mlp_bias": config.mlp_bias or config.mlp_output_bias,
    }  # fmt: skip
    return _filled(LlamaForCausalLM, LlamaConfig(**settings), model, widths, pairs)


def llama_by_layer(model: nn.Module, *, pad: bool = False) -> TransActForCausalLM:
    """What `write_gguf` writes of the narrowed `model`: heads alike, key-value heads and MLPs by layer; copied weights.

    It computes the same. Raises ValueError as `plain_llama` does.
    """
    model = _narrowed(model, pad, "gguf")
    widths, pairs = padded_widths(model, by_layer=True)
    head_dims = [w.qk_head_dim for w in widths]
    settings = _settings(model, TransActConfig, head_dims[0], pairs)
    settings |= {"qk_head_dims": head_dims, "v_head_dims": head_dims}
    alike = _filled(TransActForCausalLM, TransActConfig(**settings), model, widths, pairs)
    for layer in alike.model.layers:
        layer.self_attn.rope_pairs.copy_(layer.self_attn.first_rope_pairs())
    return alike


def _settings(model: nn.Module, config_class: type, head_dim: int, pairs: list[int]) -> dict:
    """What the configuration of a model with these heads says; whatever it has in common with `model` is copied."""
    return copy.deepcopy({field.name: getattr(model.config, field.name) for field in fields(config_class)}) | {
        "architectures": None,
        # the widest of all dtypes: a stock checkpoint is loaded in one
        "dtype": functools.reduce(torch.promote_types, {parameter.dtype for parameter in model.parameters()}),
        "head_dim": head_dim, "tie_word_embeddings": not has_own_head(model),
        "rope_parameters": _rope_parameters(model, head_dim, pairs),
    }  # fmt: skip


@torch.no_grad()
def _filled(
    model_class: type, config: PretrainedConfig, model: nn.Module, widths: Sequence[Widths], pairs: list[int]
) -> nn.Module:
    """A model of this class and configuration that computes what `model` does; ValueError where it does not."""
    config._attn_implementation = model.config._attn_implementation
    with torch.device("meta"):
        alike = model_class(config)
    alike.to_empty(device=model.device).to(config.dtype)
    for parameter in alike.parameters():
        parameter.zero_()
    modules = [(alike.model.embed_tokens, model.model.embed_tokens), (alike.model.norm, model.model.norm)]
    modules += [] if config.tie_word_embeddings else [(alike.lm_head, model.lm_head)]
    for layer, narrow in zip(alike.model.layers, model.model.layers, strict=True):
        for name in ("input_layernorm", "post_attention_layernorm"):
            modules.append((getattr(layer, name), getattr(narrow, name)))
    for module, source in modules:
        module.weight.copy_(source.weight)
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    for layer, narrow, padded in zip(alike.model.layers, model.model.layers, widths, strict=True):
        _fill_attention(layer.self_attn, narrow.self_attn, padded, pairs, group)
        for name in ("gate_proj", "up_proj", "down_proj"):
            _fill(getattr(layer.mlp, name), getattr(narrow.mlp, name))
    alike.tie_weights()
    if _keeps_rope(model.config, config.head_dim, pairs):
        alike.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)
    else:
        alike.model.rotary_emb = LlamaRotaryEmbedding(config).to(model.device)
    alike.generation_config = copy.deepcopy(model.generation_config)
    if len({parameter.dtype for parameter in model.parameters()}) == 1:  # of several they may run only made alike
        complaint = "the model computes something else than a plain Llama of its weights and configuration"
        check_same_function(model, alike, complaint)
    return alike.eval()


def _fill(linear: nn.Linear, narrow: nn.Linear) -> None:
    """The narrow projection in the first rows and columns."""
    rows, columns = narrow.weight.shape
    linear.weight[:rows, :columns] = narrow.weight
    if narrow.bias is not None:
        linear.bias[:rows] = narrow.bias


def _fill_attention(attention, narrow, padded: Widths, pairs: list[int], group: int) -> None:
    """Each kept RoPE pair at the place of its frequency; heads and values in the first places."""
    half, own_half = padded.qk_head_dim // 2, narrow.qk_head_dim // 2
    for kv_head, kept in enumerate(narrow.rope_pairs.tolist()):
        places = torch.tensor([pairs.index(pair) for pair in kept], device=narrow.rope_pairs.device)
        rows = torch.cat((places, places + half))  # first halves, then second halves: rotate_half's layout
        for name, heads in (("q_proj", range(kv_head * group, (kv_head + 1) * group)), ("k_proj", [kv_head])):
            linear, source = getattr(attention, name), getattr(narrow, name)
            for head in heads:
                own = slice(head * 2 * own_half, (head + 1) * 2 * own_half)
                linear.weight[head * 2 * half + rows] = source.weight[own].to(linear.weight.dtype)
                if source.bias is not None:
                    linear.bias[head * 2 * half + rows] = source.bias[own].to(linear.bias.dtype)
    kv_heads, width, padded_width = narrow.kv_heads, narrow.v_head_dim, padded.v_head_dim
    for part in ("weight", "bias"):
        values, own = getattr(attention.v_proj, part), getattr(narrow.v_proj, part)
        if own is not None:
            places = values.unflatten(0, (padded.kv_heads, padded_width))[:kv_heads, :width]
            places.copy_(own.unflatten(0, (kv_heads, width)))
    readers = attention.o_proj.weight.unflatten(1, (padded.kv_heads * group, padded_width))
    readers[:, : kv_heads * group, :width] = narrow.o_proj.weight.unflatten(1, (kv_heads * group, width))
    if narrow.o_proj.bias is not None:
        attention.o_proj.bias.copy_(narrow.o_proj.bias)


def _keeps_rope(config: PretrainedConfig, head_dim: int, pairs: list[int]) -> bool:
    """Whether heads of this width are the dense model's, all pairs in their places."""
    return head_dim == config.head_dim and len(pairs) == config.head_dim // 2


def _rope_parameters(model: nn.Module, width: int, pairs: list[int]) -> dict:
    """The dense model's own where all pairs are there, else "longrope" with one factor for each kept frequency."""
    config, own = model.config, model.config.rope_parameters
    if _keeps_rope(config, width, pairs):
        return dict(own)
    short, long, attention_factor = rope_frequencies(model)

    def factors(frequencies: torch.Tensor) -> list[float]:
        kept = frequencies[pairs].tolist()
        kept += [1.0] * (width // 2 - len(kept))  # pairs of zeros turn at any frequency
        return [own["rope_theta"] ** (-2 * i / width) / frequency for i, frequency in enumerate(kept)]

    # queries and keys are both multiplied by it; stock code divides their product by the root of its own head width
    attention_factor *= (width / config.head_dim) ** 0.25
    switch = own["original_max_position_embeddings"] if own["rope_type"] == "longrope" else None
    return {
        "rope_type": "longrope", "rope_theta": own["rope_theta"], "factor": 1.0, "attention_factor": attention_factor,
        "short_factor": factors(short), "long_factor": factors(long),
        "original_max_position_embeddings": switch or config.max_position_embeddings,
        "short_mscale": attention_factor, "long_mscale": attention_factor,  # vLLM's and SGLang's names for it
    }  # fmt: skip


def rope_frequencies(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Frequencies by pair, those of longer texts, both float64 on the CPU, and the factor of both tables."""
    rotary = model.model.rotary_emb
    short = long = rotary.original_inv_freq.cpu()  # the other buffer may be that of the last text
    if rotary.rope_type == "longrope":
        longer = model.config.rope_parameters["original_max_position_embeddings"] + 1
        long = ROPE_INIT_FUNCTIONS["longrope"](model.config, seq_len=longer)[0].to(short.dtype)
    return short.double(), long.double(), float(rotary.attention_scaling)
