"""Checkpoints that stock tools load: a plain Llama, and a GGUF file for llama.cpp. The same function, exactly.

A plain Llama has one number of heads, one head width and one MLP width for all layers and one set of RoPE frequencies
for all heads. What is narrower than the widest is padded with zeros, which changes nothing but the size; RoPE pairs
are kept by a frequency factor each ("longrope"); the softmax scale of the dense head is folded into the queries.
"""

import json
from pathlib import Path

import gguf
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from .widths import Widths, fraction_removed, widths_of

MOST_PADDING = 0.01  # of the dense linear parameters that padding may bring back without being asked for
Q8_BLOCK = 32
GGUF_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}  # by llama.cpp's numbers of file types
PRE_TOKENIZERS = {  # llama.cpp's names for how text is split, by what only that tokeniser's JSON holds
    "llama-bpe": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|",
    "qwen2": r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|",
    "smollm": '"individual_digits": true',
    "gpt-2": '"use_regex": true',  # byte-level with its own pattern and nothing before it
}


def padded_widths(model: nn.Module) -> tuple[Widths, list[int]]:
    """The widths that every layer gets in a plain Llama, and the dense RoPE pairs that it rotates."""
    widths = widths_of(model.config)
    pairs = sorted({pair for layer in model.model.layers for pair in layer.self_attn.rope_pairs.flatten().tolist()})
    head_dim = max(2 * len(pairs), *(w.v_head_dim for w in widths))
    head_dim += head_dim % 2
    config, kv_heads = model.config, max(w.kv_heads for w in widths)
    group = config.num_attention_heads // config.num_key_value_heads
    while config.hidden_size % (kv_heads * group):  # LlamaConfig insists on it, needlessly
        kv_heads += 1
    return Widths(kv_heads, head_dim, head_dim, max(w.mlp for w in widths)), pairs


def check_exportable(model: nn.Module, *, pad: bool = False) -> None:
    """Raise ValueError where no plain Llama computes what `model` does, or only one that is much larger.

    With `pad` it may be as large as the dense model.
    """
    config = model.config
    if config.model_type != "transact_llama":
        raise ValueError(f"a pruned checkpoint is exported, this one is of type {config.model_type!r}")
    if config.query_key_norm or config.sliding_window:
        feature = "query-key norms" if config.query_key_norm else "a sliding window"
        raise ValueError(f"the model has {feature}, a plain Llama has none: it cannot be exported")
    padded, _ = padded_widths(model)
    narrow = fraction_removed(config, widths_of(config))
    plain = fraction_removed(config, [padded] * config.num_hidden_layers)
    if narrow - plain > MOST_PADDING and not pad:
        raise ValueError(
            f"a plain Llama has the same widths and RoPE pairs in all layers and heads: of the {narrow:.1%} of the "
            f"linear parameters that were removed only {plain:.1%} would stay removed; prune with --plain "
            "or pass --pad"
        )


@torch.no_grad()
def plain_llama(model: nn.Module, *, pad: bool = False) -> LlamaForCausalLM:
    """A stock LlamaForCausalLM that computes what the narrowed `model` does; weights are copies.

    Raises ValueError as `check_exportable` does, or where RoPE scaling depends on the length of the text.
    """
    check_exportable(model, pad=pad)
    config, (padded, pairs) = model.config, padded_widths(model)
    group = config.num_attention_heads // config.num_key_value_heads
    names = ("bos_token_id", "eos_token_id", "pad_token_id", "hidden_act", "hidden_size", "initializer_range",
             "max_position_embeddings", "num_hidden_layers", "rms_norm_eps", "tie_word_embeddings", "vocab_size",
             "attention_dropout", "use_cache", "dtype")  # fmt: skip
    plain_config = LlamaConfig(
        **{name: getattr(config, name) for name in names},
        head_dim=padded.qk_head_dim,
        num_attention_heads=padded.kv_heads * group,
        num_key_value_heads=padded.kv_heads,
        intermediate_size=padded.mlp,
        attention_bias=config.attention_bias or config.attention_output_bias,
        mlp_bias=config.mlp_bias or config.mlp_output_bias,
        rope_parameters=_rope_parameters(model, padded, pairs),
    )
    plain_config._attn_implementation = config._attn_implementation
    with torch.device("meta"):
        plain = LlamaForCausalLM(plain_config)
    plain.to_empty(device=model.device).to(model.dtype)
    for parameter in plain.parameters():
        parameter.zero_()
    modules = [(plain.model.embed_tokens, model.model.embed_tokens), (plain.model.norm, model.model.norm)]
    modules += [] if config.tie_word_embeddings else [(plain.lm_head, model.lm_head)]
    for layer, narrow in zip(plain.model.layers, model.model.layers, strict=True):
        for name in ("input_layernorm", "post_attention_layernorm"):
            modules.append((getattr(layer, name), getattr(narrow, name)))
    for module, source in modules:
        module.weight.copy_(source.weight)
    scale = (padded.qk_head_dim / config.head_dim) ** 0.5  # the plain model divides by the root of its own head width
    for layer, narrow in zip(plain.model.layers, model.model.layers, strict=True):
        _fill_attention(layer.self_attn, narrow.self_attn, padded, pairs, group, scale)
        for name in ("gate_proj", "up_proj", "down_proj"):
            _fill(getattr(layer.mlp, name), getattr(narrow.mlp, name))
    plain.tie_weights()
    plain.model.rotary_emb = type(plain.model.rotary_emb)(plain_config).to(model.device)
    plain.generation_config = model.generation_config
    return plain.eval()


def _fill(linear: nn.Linear, narrow: nn.Linear) -> None:
    """The narrow projection in the first rows and columns."""
    rows, columns = narrow.weight.shape
    linear.weight[:rows, :columns] = narrow.weight
    if narrow.bias is not None:
        linear.bias[:rows] = narrow.bias


def _fill_attention(attention, narrow, padded: Widths, pairs: list[int], group: int, scale: float) -> None:
    """Each kept RoPE pair at the place of its frequency; heads and values in the first places."""
    half, own_half = padded.qk_head_dim // 2, narrow.qk_head_dim // 2
    for kv_head, kept in enumerate(narrow.rope_pairs.tolist()):
        places = torch.tensor([pairs.index(pair) for pair in kept], device=narrow.rope_pairs.device)
        rows = torch.cat((places, places + half))  # first halves, then second halves: rotate_half's layout
        for name, heads, factor in (
            ("q_proj", range(kv_head * group, (kv_head + 1) * group), scale), ("k_proj", [kv_head], 1.0),
        ):  # fmt: skip
            linear, source = getattr(attention, name), getattr(narrow, name)
            for head in heads:
                own = slice(head * 2 * own_half, (head + 1) * 2 * own_half)
                linear.weight[head * 2 * half + rows] = source.weight[own] * factor
                if source.bias is not None:
                    linear.bias[head * 2 * half + rows] = source.bias[own] * factor
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


def _rope_parameters(model: nn.Module, padded: Widths, pairs: list[int]) -> dict:
    """The dense model's own where all pairs are there, else "longrope" with one factor for each kept frequency."""
    config, rotary = model.config, model.model.rotary_emb
    own = dict(config.rope_parameters)
    if padded.qk_head_dim == config.head_dim and len(pairs) == config.head_dim // 2:
        return own
    if own.get("rope_type", "default") not in ("default", "linear", "llama3") or rotary.attention_scaling != 1:
        raise ValueError(
            f"RoPE type {own['rope_type']!r} cannot be expressed for some of its pairs: prune with --modules vo,mlp"
        )
    base, width = own["rope_theta"], padded.qk_head_dim
    kept = rotary.inv_freq.double().cpu()[pairs].tolist()
    kept += [1.0] * (width // 2 - len(kept))  # pairs of zeros turn at any frequency
    factors = [base ** (-2 * i / width) / frequency for i, frequency in enumerate(kept)]
    context = config.max_position_embeddings
    return {
        "rope_type": "longrope", "rope_theta": base, "factor": 1.0, "attention_factor": 1.0, "short_factor": factors,
        "long_factor": factors, "original_max_position_embeddings": context,
    }  # fmt: skip


def write_gguf(path: Path, plain: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, *, kind: str = "f16") -> None:
    """Write a plain Llama as a GGUF file that llama.cpp runs; matrices in `kind`, norms in float32.

    Rows that "q8_0" cannot cut into blocks of 32 stay "f16". Raises ValueError for an unknown kind or a tokeniser of
    another make than byte-level BPE.
    """
    if kind not in GGUF_TYPES:
        raise ValueError(f"unknown GGUF type {kind!r}, allowed: {', '.join(GGUF_TYPES)}")
    config = plain.config
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
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer, tokenizer, config.vocab_size)
    # llama.cpp divides each frequency by its factor; without factors there is nothing to say
    frequencies = plain.model.rotary_emb.inv_freq.double().cpu()
    own = config.rope_parameters["rope_theta"] ** (-torch.arange(len(frequencies)).double() * 2 / config.head_dim)
    if not torch.allclose(frequencies, own, rtol=1e-6):
        writer.add_tensor("rope_freqs.weight", (own / frequencies).float().numpy())
    for name, tensor in _gguf_tensors(plain):
        array = tensor.detach().float().cpu().numpy()
        if tensor.ndim == 1 or kind == "f32":
            writer.add_tensor(name, array)
            continue
        fits = kind != "q8_0" or array.shape[1] % Q8_BLOCK == 0
        as_type = gguf.GGMLQuantizationType[kind.upper() if fits else "F16"]
        writer.add_tensor(name, gguf.quants.quantize(array, as_type), raw_dtype=as_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _gguf_tensors(plain: LlamaForCausalLM):
    """Names and tensors in llama.cpp's layout: rows of q and k are interleaved, (first, second) of each pair."""
    config = plain.config
    yield "token_embd.weight", plain.model.embed_tokens.weight
    yield "output_norm.weight", plain.model.norm.weight
    if not config.tie_word_embeddings:
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


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> None:
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    content, model = json.dumps(description, ensure_ascii=False), description["model"]
    if model["type"] != "BPE" or "ByteLevel" not in content or model.get("byte_fallback"):
        raise ValueError("GGUF files are written for byte-level BPE tokenisers (Llama 3, SmolLM, Qwen), not for others")
    unescaped = content.replace("\\\\", "\\")
    pre = next((name for name, mark in PRE_TOKENIZERS.items() if mark in unescaped), None)
    if pre is None:
        raise ValueError(
            f"this tokeniser splits text in none of the ways known here ({', '.join(PRE_TOKENIZERS)}): llama.cpp would "
            "tokenise otherwise"
        )
    special = {token["id"] for token in description["added_tokens"] if token["special"]}
    added = {token["id"] for token in description["added_tokens"]}
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    kinds = gguf.TokenType
    tokens = [by_id.get(index, f"[unused{index}]") for index in range(vocabulary)]
    types = [
        kinds.UNUSED if index not in by_id else kinds.CONTROL if index in special
        else kinds.USER_DEFINED if index in added else kinds.NORMAL
        for index in range(vocabulary)
    ]  # fmt: skip
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_add_bos_token(tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)
    for name in ("bos", "eos", "pad", "unk"):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)
