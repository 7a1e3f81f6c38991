"""A plain Llama as a GGUF file, which llama.cpp runs."""

import warnings
from pathlib import Path

import gguf
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerBase

from ..entry import has_own_head
from ..whitelist import check_gguf, check_weights
from .gguf_tokenizer import add_tokenizer, check_tokenizer
from .llama import rope_frequencies

GGUF_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}  # by llama.cpp's numbers of file types
Q8_BLOCK = 32
LARGEST = {"F16": 65504.0, "Q8_0": 127 * 65504.0}  # weights that these types can hold


def write_gguf(path: Path, plain: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, *, kind: str = "f16") -> None:
    """Write a plain Llama as a GGUF file that llama.cpp runs; matrices in `kind`, norms in float32.

    Rows that "q8_0" cannot cut into blocks of 32 stay "f16". Raises ValueError, before anything is written, for an
    unknown kind, for weights that it cannot hold, and where llama.cpp would compute or tokenise otherwise; warns where
    it does so for some texts only.
    """
    if kind not in GGUF_TYPES:
        raise ValueError(f"unknown GGUF type {kind!r}, allowed: {', '.join(GGUF_TYPES)}")
    config = plain.config
    if config.model_type != "llama":
        raise ValueError(f"a plain Llama is written as a GGUF file, this is a {config.model_type!r} model")
    check_gguf(config)
    check_tokenizer(tokenizer, plain)
    check_weights(plain)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(config.name_or_path or "pruned")
    writer.add_file_type(GGUF_TYPES[kind])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_rope(writer, plain)
    add_tokenizer(writer, tokenizer, plain)
    for name, tensor in _gguf_tensors(plain):
        array = tensor.detach().float().cpu().numpy()
        if tensor.ndim == 1 or kind == "f32":
            writer.add_tensor(name, array)
            continue
        fits = kind != "q8_0" or array.shape[1] % Q8_BLOCK == 0
        as_type = gguf.GGMLQuantizationType[kind.upper() if fits else "F16"]
        largest = abs(array).max()
        if largest > LARGEST.get(as_type.name, largest):
            raise ValueError(f"{name} holds {largest:.3g}, which {as_type.name.lower()} cannot: write bf16 or f32")
        writer.add_tensor(name, gguf.quants.quantize(array, as_type), raw_dtype=as_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_rope(writer: gguf.GGUFWriter, plain: LlamaForCausalLM) -> None:
    """RoPE as llama.cpp has it: a base, a factor that each pair's frequency is divided by, one factor of the tables."""
    width, base = plain.config.head_dim, plain.config.rope_parameters["rope_theta"]
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(base)
    short, long, attention_factor = rope_frequencies(plain)
    own = base ** (-torch.arange(width // 2).double() * 2 / width)
    if attention_factor != 1:
        writer.add_rope_scaling_attn_factors(attention_factor)
    if not torch.equal(short, long):
        length = plain.config.rope_parameters["original_max_position_embeddings"]
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


def _gguf_tensors(plain: LlamaForCausalLM):
    """Names and tensors in llama.cpp's layout: rows of q and k are interleaved, (first, second) of each pair."""
    config = plain.config
    yield "token_embd.weight", plain.model.embed_tokens.weight
    yield "output_norm.weight", plain.model.norm.weight
    if has_own_head(plain):
        yield "output.weight", plain.lm_head.weight
    for index, layer in enumerate(plain.model.layers):
        prefix = f"blk.{index}"
        yield f"{prefix}.attn_norm.weight", layer.input_layernorm.weight
        yield f"{prefix}.ffn_norm.weight", layer.post_attention_layernorm.weight
        attention, mlp = layer.self_attn, layer.mlp
        for name, linear, heads in (
            ("attn_q", attention.q_proj, config.num_attention_heads),
            ("attn_k", attention.k_proj, config.num_key_value_heads),
            ("attn_v", attention.v_proj, 0), ("attn_output", attention.o_proj, 0), ("ffn_gate", mlp.gate_proj, 0),
            ("ffn_up", mlp.up_proj, 0), ("ffn_down", mlp.down_proj, 0),
        ):  # fmt: skip
            for part in ("weight", "bias"):
                tensor = getattr(linear, part)
                if tensor is not None:
                    if heads:
                        shape = (heads, 2, config.head_dim // 2, *tensor.shape[1:])
                        tensor = tensor.view(shape).transpose(1, 2).reshape(tensor.shape)
                    yield f"{prefix}.{name}.{part}", tensor
