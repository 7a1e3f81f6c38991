"""A Llama whose heads are alike as a GGUF file, which llama.cpp runs."""

import warnings
from pathlib import Path

import gguf
import torch
from transformers import LlamaForCausalLM, PretrainedConfig, PreTrainedTokenizerBase

from ..configuration_transact import TransActConfig
from ..entry import has_own_head
from ..modeling_transact import TransActForCausalLM
from ..whitelist import check_exportable, check_gguf, check_weights
from ..widths import head_dim_of, widths_of
from .gguf_tokenizer import add_tokenizer, check_tokenizer
from .llama import rope_frequencies

GGUF_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}  # by llama.cpp's numbers of file types
Q8_BLOCK = 32
LARGEST = {"F16": 65504.0, "Q8_0": 127 * 65504.0}  # weights that these types can hold
Model = LlamaForCausalLM | TransActForCausalLM


def architecture_of(config: PretrainedConfig) -> str:
    """llama.cpp's name for it: its "deci" is its "llama" with key-value heads and an MLP of each layer's own width."""
    return "llama" if len(set(widths_of(config))) == 1 else "deci"


def write_gguf(path: Path, model: Model, tokenizer: PreTrainedTokenizerBase, *, kind: str = "f16") -> list[str]:
    """Write a stock Llama, or what `llama_by_layer` makes of a narrowed one, as a GGUF file that llama.cpp runs.

    Matrices are written in `kind`, norms in float32; those whose rows "q8_0" cannot cut into blocks of 32 stay "f16",
    and their names are returned. Raises ValueError, before anything is written, for an unknown kind, for weights that
    it cannot hold, and where llama.cpp would compute or tokenise otherwise; warns where it does so for some texts only.
    """
    if kind not in GGUF_TYPES:
        raise ValueError(f"unknown GGUF type {kind!r}, allowed: {', '.join(GGUF_TYPES)}")
    config = model.config
    _check_config(config)
    check_tokenizer(tokenizer, model)
    check_weights(model)
    writer = gguf.GGUFWriter(path, architecture_of(config))
    writer.add_name(config.name_or_path or "pruned")
    writer.add_file_type(GGUF_TYPES[kind])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    _add_widths(writer, config)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_rope(writer, model)
    add_tokenizer(writer, tokenizer, model)
    uncut = []
    for name, tensor in _gguf_tensors(model):
        array = tensor.detach().float().cpu().numpy()
        if tensor.ndim == 1 or kind == "f32":
            writer.add_tensor(name, array)
            continue
        if kind == "q8_0" and array.shape[1] % Q8_BLOCK:
            uncut.append(name)
        as_type = gguf.GGMLQuantizationType["F16" if name in uncut else kind.upper()]
        largest = abs(array).max()
        if largest > LARGEST.get(as_type.name, largest):
            raise ValueError(f"{name} holds {largest:.3g}, which {as_type.name.lower()} cannot: write bf16 or f32")
        writer.add_tensor(name, gguf.quants.quantize(array, as_type), raw_dtype=as_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return uncut


def _check_config(config: PretrainedConfig) -> None:
    """Raise ValueError where llama.cpp has no such model, or a narrowed one's heads are not alike yet."""
    if config.model_type == "llama":
        check_gguf(config)
        return
    if config.model_type != TransActConfig.model_type:
        raise ValueError(f"Llamas, plain or narrowed, are written as GGUF files, this is a {config.model_type!r} model")
    check_exportable(config, "gguf")
    for layer, of in enumerate(widths_of(config)):
        if not of.qk_head_dim == of.v_head_dim == config.head_dim:
            raise ValueError(
                f"the model has heads of {of.qk_head_dim} and {of.v_head_dim} dimensions in layer {layer}, a GGUF file "
                f"those of the configuration, {config.head_dim}, in all: write what llama_by_layer makes of it"
            )


def _add_widths(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    """Numbers of heads and MLP widths, lists of them where they go by layer, and the one head width."""
    group, widths = config.num_attention_heads // config.num_key_value_heads, widths_of(config)

    def by_layer(values: list[int]) -> list[int] | int:
        return values if writer.arch == "deci" else values[0]

    writer.add_feed_forward_length(by_layer([of.mlp for of in widths]))
    writer.add_head_count(by_layer([of.kv_heads * group for of in widths]))
    writer.add_head_count_kv(by_layer([of.kv_heads for of in widths]))
    writer.add_key_length(head_dim_of(config))
    writer.add_value_length(head_dim_of(config))


def _add_rope(writer: gguf.GGUFWriter, model: Model) -> None:
    """RoPE as llama.cpp has it: a base, a factor that each pair's frequency is divided by, one factor of the tables."""
    width, base = model.config.head_dim, model.config.rope_parameters["rope_theta"]
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(base)
    short, long, attention_factor = rope_frequencies(model)
    own = base ** (-torch.arange(width // 2).double() * 2 / width)
    if attention_factor != 1:
        writer.add_rope_scaling_attn_factors(attention_factor)
    if not torch.equal(short, long):
        length = model.config.rope_parameters["original_max_position_embeddings"]
        writer.add_rope_scaling_type(gguf.RopeScalingType.LONGROPE)
        writer.add_rope_scaling_orig_ctx_len(length)
        writer.add_tensor("rope_factors_short.weight", (own / short).float().numpy())
        writer.add_tensor("rope_factors_long.weight", (own / long).float().numpy())
        warnings.warn(
            f"llama.cpp takes RoPE's long factors where its context is longer than {length} tokens, transformers where "
            "the text is",
            stacklevel=3,
        )
    elif not torch.allclose(short, own, rtol=1e-6):  # without factors there is nothing to say
        writer.add_tensor("rope_freqs.weight", (own / short).float().numpy())


def _gguf_tensors(model: Model):
    """Names and tensors in llama.cpp's layout: rows of q and k are interleaved, (first, second) of each pair."""
    group = model.config.num_attention_heads // model.config.num_key_value_heads
    yield "token_embd.weight", model.model.embed_tokens.weight
    yield "output_norm.weight", model.model.norm.weight
    if has_own_head(model):
        yield "output.weight", model.lm_head.weight
    for index, (layer, of) in enumerate(zip(model.model.layers, widths_of(model.config), strict=True)):
        prefix = f"blk.{index}"
        yield f"{prefix}.attn_norm.weight", layer.input_layernorm.weight
        yield f"{prefix}.ffn_norm.weight", layer.post_attention_layernorm.weight
        attention, mlp = layer.self_attn, layer.mlp
        for name, linear, heads in (
            ("attn_q", attention.q_proj, of.kv_heads * group),
            ("attn_k", attention.k_proj, of.kv_heads),
            ("attn_v", attention.v_proj, 0), ("attn_output", attention.o_proj, 0), ("ffn_gate", mlp.gate_proj, 0),
            ("ffn_up", mlp.up_proj, 0), ("ffn_down", mlp.down_proj, 0),
        ):  # fmt: skip
            for part in ("weight", "bias"):
                tensor = getattr(linear, part)
                if tensor is not None:
                    if heads:
                        shape = (heads, 2, of.qk_head_dim // 2, *tensor.shape[1:])
                        tensor = tensor.view(shape).transpose(1, 2).reshape(tensor.shape)
                    yield f"{prefix}.{name}.{part}", tensor
