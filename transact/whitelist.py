"""What an export can state: what it cannot is refused by name, before anything is done."""

import torch
from torch import nn
from transformers import LlamaConfig, PretrainedConfig

from .configuration_transact import TransActConfig
from .entry import odd_weight, shapes_of
from .plan import KEPT_LAYERS
from .prune import FAMILIES, narrowed_config
from .widths import dense_widths, widths_of

FORMATS = ("llama", "gguf", "executorch")

# What a configuration may say, beside LlamaConfig's own fields, which are copied: all of it can be stated by weights.
EXPRESSED = ("kv_head_counts", "qk_head_dims", "v_head_dims", "intermediate_sizes", "attention_output_bias",
             "mlp_output_bias")  # fmt: skip
LACKING = {"query_key_norm": "query-key norms", "sliding_window": "a sliding window"}  # a Llama has none of these
# RoPE whose frequencies depend on the pair alone, or on which side of one length the text is: factors can state it
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
ROPE_KEYS = ("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor",
             "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
             "short_factor", "long_factor", "short_mscale", "long_mscale")  # fmt: skip
BY_LENGTH = ("dynamic", "longrope")  # RoPE that looks at how long the text is, which a traced program cannot
GGUF_ACTIVATIONS = ("silu", "swish")  # llama.cpp's Llama computes this one, whatever a file says


def check_exportable(config: PretrainedConfig, format: str = "llama") -> None:
    """Raise ValueError, in one line, where the configuration says what an export in this format cannot state.

    It may be a pruned model's, or a dense one's, which is judged by what pruning `--for` it makes of it. `format` is
    "llama", "gguf" or "executorch", which states whatever a model computes.
    """
    if format not in FORMATS:
        raise ValueError(f"unknown export format {format!r}, allowed: {', '.join(FORMATS)}")
    if getattr(config, "quantization_config", None):
        raise ValueError("the model is quantised: prune and export it as it was before, and quantise what was exported")
    is_pruned = config.model_type == TransActConfig.model_type
    if not is_pruned and config.model_type not in FAMILIES:
        raise ValueError(f"a {config.model_type!r} model cannot be exported, allowed: {', '.join(FAMILIES)}")
    if format == "executorch":
        check_length_free(config)
        return
    for layer, one in enumerate(widths_of(config)):
        if one.missing:
            raise ValueError(
                f"layer {layer} has no {one.missing}, which a plain Llama and a GGUF file have in every layer: the "
                "model cannot be exported"
            )
    if format == "llama":
        _check_heads(config, is_pruned)
    if not is_pruned:
        config = narrowed_config(config, dense_widths(config))
    for name, feature in LACKING.items():
        if getattr(config, name):
            raise ValueError(f"the model has {feature}, a plain Llama has none: it cannot be exported")
    known = {*vars(LlamaConfig()), *EXPRESSED, *LACKING, KEPT_LAYERS, "auto_map", "model_type"}
    unknown = {name for name, value in vars(config).items() if not name.startswith("_") and value is not None} - known
    if unknown:
        raise ValueError(f"the configuration says {', '.join(sorted(unknown))}, which no export states: remove it")
    if format == "gguf":
        check_gguf(config)
    else:  # with all its pairs, what a stock Llama makes of the length is the same
        check_rope(config, (*ROPE_TYPES, "dynamic") if is_pruned else ROPE_TYPES)


def _check_heads(config: PretrainedConfig, is_pruned: bool) -> None:
    """Raise ValueError where LlamaConfig would not take the heads, which have to divide the hidden size."""
    hidden, heads, kv_heads = config.hidden_size, config.num_attention_heads, config.num_key_value_heads
    if hidden % (heads // kv_heads):
        raise ValueError(
            f"a plain Llama's heads divide its hidden size, and none in groups of {heads // kv_heads} divide {hidden}: "
            "the model cannot be exported"
        )
    if not is_pruned and hidden % heads:
        raise ValueError(
            f"a plain Llama's heads divide its hidden size, and {heads} do not divide {hidden}: prune without --for "
            "and pass --pad to the export"
        )


def check_rope(config: PretrainedConfig, allowed: tuple[str, ...]) -> None:
    rope = config.rope_parameters
    if rope["rope_type"] not in allowed:
        raise ValueError(
            f"RoPE type {rope['rope_type']!r} cannot be stated in an export, allowed: {', '.join(allowed)}"
        )
    whole_heads = rope.get("partial_rotary_factor") in (None, 1)
    unknown = rope.keys() - set(ROPE_KEYS) - ({"partial_rotary_factor"} if whole_heads else set())
    if unknown:
        raise ValueError(f"rope_parameters say {', '.join(sorted(unknown))}, which no export states")


def check_length_free(config: PretrainedConfig) -> None:
    """Raise ValueError where RoPE's frequencies depend on the length of the text."""
    if (kind := config.rope_parameters["rope_type"]) in BY_LENGTH:
        raise ValueError(f"RoPE type {kind!r} depends on the length of the text: no program that is traced once has it")


def check_gguf(config: PretrainedConfig) -> None:
    """Raise ValueError where llama.cpp's Llama computes something else."""
    if config.hidden_act not in GGUF_ACTIVATIONS:
        raise ValueError(
            f"hidden_act {config.hidden_act!r} cannot be stated in a GGUF file: llama.cpp computes silu in every Llama"
        )
    check_rope(config, ROPE_TYPES)


def check_weights(model: nn.Module) -> None:
    """Raise ValueError unless the model has exactly the weights of its configuration, at hand and in floats."""
    with torch.device("meta"):
        wanted = shapes_of(type(model)(model.config))
    found = shapes_of(model)
    if (name := odd_weight(found, wanted)) is not None:
        raise ValueError(f"{name} is {_size(found.get(name))}, by the configuration it is {_size(wanted.get(name))}")
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            raise ValueError(f"{name} is offloaded: load the model into host memory to export it")
        if type(parameter) is not nn.Parameter or not parameter.is_floating_point():  # torchao's pass for floats
            raise ValueError(f"{name} is quantised: export the model as it was before, and quantise what was exported")


def _size(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape))
