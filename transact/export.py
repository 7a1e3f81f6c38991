"""Checkpoints that stock tools load: a plain Llama, and a GGUF file for llama.cpp. The same function, exactly.

A plain Llama has one number of heads, one head width and one MLP width for all layers and one set of RoPE frequencies
for all heads. What is narrower than the widest is padded with zeros, which changes nothing but the size; RoPE pairs
are kept by a frequency factor each ("longrope"). The softmax scale of the dense head goes into RoPE's attention factor:
folded into bfloat16 weights it would be rounded. What a format cannot state is refused before anything is done.
"""

import copy
import functools
import json
import warnings
from dataclasses import fields
from pathlib import Path

import gguf
import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PretrainedConfig, PreTrainedTokenizerBase
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from .configuration_transact import TransActConfig
from .entry import has_own_head, odd_weight, shapes_of
from .modeling_transact import TransActForCausalLM
from .prune import FAMILIES, narrowed_config
from .widths import Widths, dense_widths, fraction_removed, widths_of

FORMATS = ("llama", "gguf")
MOST_PADDING = 0.01  # of the dense linear parameters that padding may bring back without being asked for

# What a configuration may say, beside LlamaConfig's own fields, which are copied: all of it can be stated by weights.
EXPRESSED = ("kv_head_counts", "qk_head_dims", "v_head_dims", "intermediate_sizes", "attention_output_bias",
             "mlp_output_bias")  # fmt: skip
LACKING = {"query_key_norm": "query-key norms", "sliding_window": "a sliding window"}  # a Llama has none of these
# RoPE whose frequencies depend on the pair alone, or on which side of one length the text is: factors can state it
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "longrope")
ROPE_KEYS = ("rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor",
             "low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
             "short_factor", "long_factor", "short_mscale", "long_mscale")  # fmt: skip

GGUF_TYPES = {"f32": 0, "f16": 1, "bf16": 32, "q8_0": 7}  # by llama.cpp's numbers of file types
GGUF_ACTIVATIONS = ("silu", "swish")  # llama.cpp's Llama computes this one, whatever a file says
Q8_BLOCK = 32
LARGEST = {"F16": 65504.0, "Q8_0": 127 * 65504.0}  # weights that these types can hold
END_KEYS = ("eos", "eot", "eom")  # where a GGUF file can name tokens that end a generation


def check_exportable(config: PretrainedConfig, format: str = "llama") -> None:
    """Raise ValueError, in one line, where the configuration says what an export in this format cannot state.

    It may be a pruned model's, or a dense one's, which is judged by what `--plain` pruning makes of it. `format` is
    "llama" or "gguf".
    """
    if format not in FORMATS:
        raise ValueError(f"unknown export format {format!r}, allowed: {', '.join(FORMATS)}")
    if getattr(config, "quantization_config", None):
        raise ValueError("the model is quantised: prune and export it as it was before, and quantise what was exported")
    is_pruned = config.model_type == TransActConfig.model_type
    if not is_pruned and config.model_type not in FAMILIES:
        raise ValueError(f"a {config.model_type!r} model cannot be exported, allowed: {', '.join(FAMILIES)}")
    _check_heads(config, is_pruned)
    if not is_pruned:
        config = narrowed_config(config, dense_widths(config))
    for name, feature in LACKING.items():
        if getattr(config, name):
            raise ValueError(f"the model has {feature}, a plain Llama has none: it cannot be exported")
    known = {*vars(LlamaConfig()), *EXPRESSED, *LACKING, "auto_map", "model_type"}
    unknown = {name for name, value in vars(config).items() if not name.startswith("_") and value is not None} - known
    if unknown:
        raise ValueError(f"the configuration says {', '.join(sorted(unknown))}, which no export states: remove it")
    if format == "gguf":
        _check_gguf(config)
    else:  # with all its pairs, what a stock Llama makes of the length is the same
        _check_rope(config, (*ROPE_TYPES, "dynamic") if is_pruned else ROPE_TYPES)


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
            f"a plain Llama's heads divide its hidden size, and {heads} do not divide {hidden}: prune without --plain "
            "and pass --pad to the export"
        )


def _check_rope(config: PretrainedConfig, allowed: tuple[str, ...]) -> None:
    rope = config.rope_parameters
    if rope["rope_type"] not in allowed:
        raise ValueError(
            f"RoPE type {rope['rope_type']!r} cannot be stated in an export, allowed: {', '.join(allowed)}"
        )
    whole_heads = rope.get("partial_rotary_factor") in (None, 1)
    unknown = rope.keys() - set(ROPE_KEYS) - ({"partial_rotary_factor"} if whole_heads else set())
    if unknown:
        raise ValueError(f"rope_parameters say {', '.join(sorted(unknown))}, which no export states")


def _check_gguf(config: PretrainedConfig) -> None:
    """Raise ValueError where llama.cpp's Llama computes something else."""
    if config.hidden_act not in GGUF_ACTIVATIONS:
        raise ValueError(
            f"hidden_act {config.hidden_act!r} cannot be stated in a GGUF file: llama.cpp computes silu in every Llama"
        )
    _check_rope(config, ROPE_TYPES)


def _check_weights(model: nn.Module) -> None:
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


def _check_model(model: nn.Module, pad: bool) -> None:
    """Raise ValueError where no plain Llama computes what `model` does, or only one that is much larger.

    With `pad` it may be as large as the dense model.
    """
    config = model.config
    if not isinstance(model, TransActForCausalLM):
        raise ValueError(
            f"a pruned checkpoint is exported, this one is of type {config.model_type!r} ({type(model).__name__})"
        )
    check_exportable(config)
    _check_weights(model)
    padded, pairs = padded_widths(model)
    if not _keeps_rope(config, padded, pairs):
        _check_rope(config, ROPE_TYPES)
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

    Raises ValueError where `check_exportable` does, where the weights are not those of the configuration, or where
    padding would make it much larger, unless `pad` allows that.
    """
    _check_model(model, pad)
    config, (padded, pairs) = model.config, padded_widths(model)
    group = config.num_attention_heads // config.num_key_value_heads
    # the widest of all dtypes: a stock checkpoint is loaded in one
    dtype = functools.reduce(torch.promote_types, {parameter.dtype for parameter in model.parameters()})
    settings = copy.deepcopy({field.name: getattr(config, field.name) for field in fields(LlamaConfig)})
    settings |= {
        "architectures": None, "dtype": dtype, "head_dim": padded.qk_head_dim,
        "num_attention_heads": padded.kv_heads * group, "num_key_value_heads": padded.kv_heads,
        "intermediate_size": padded.mlp, "attention_bias": config.attention_bias or config.attention_output_bias,
        "mlp_bias": config.mlp_bias or config.mlp_output_bias, "tie_word_embeddings": not has_own_head(model),
        "rope_parameters": _rope_parameters(model, padded, pairs),
    }  # fmt: skip
    plain_config = LlamaConfig(**settings)
    plain_config._attn_implementation = config._attn_implementation
    with torch.device("meta"):
        plain = LlamaForCausalLM(plain_config)
    plain.to_empty(device=model.device).to(dtype)
    for parameter in plain.parameters():
        parameter.zero_()
    modules = [(plain.model.embed_tokens, model.model.embed_tokens), (plain.model.norm, model.model.norm)]
    modules += [] if plain_config.tie_word_embeddings else [(plain.lm_head, model.lm_head)]
    for layer, narrow in zip(plain.model.layers, model.model.layers, strict=True):
        for name in ("input_layernorm", "post_attention_layernorm"):
            modules.append((getattr(layer, name), getattr(narrow, name)))
    for module, source in modules:
        module.weight.copy_(source.weight)
    for layer, narrow in zip(plain.model.layers, model.model.layers, strict=True):
        _fill_attention(layer.self_attn, narrow.self_attn, padded, pairs, group)
        for name in ("gate_proj", "up_proj", "down_proj"):
            _fill(getattr(layer.mlp, name), getattr(narrow.mlp, name))
    plain.tie_weights()
    if _keeps_rope(config, padded, pairs):
        plain.model.rotary_emb = copy.deepcopy(model.model.rotary_emb)
    else:
        plain.model.rotary_emb = LlamaRotaryEmbedding(plain_config).to(model.device)
    plain.generation_config = copy.deepcopy(model.generation_config)
    return plain.eval()


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


def _keeps_rope(config: PretrainedConfig, padded: Widths, pairs: list[int]) -> bool:
    """Whether the padded heads are the dense model's, all pairs in their places."""
    return padded.qk_head_dim == config.head_dim and len(pairs) == config.head_dim // 2


def _rope_parameters(model: nn.Module, padded: Widths, pairs: list[int]) -> dict:
    """The dense model's own where all pairs are there, else "longrope" with one factor for each kept frequency."""
    config, width = model.config, padded.qk_head_dim
    own = config.rope_parameters
    if _keeps_rope(config, padded, pairs):
        return dict(own)
    short, long, attention_factor = _frequencies(model)

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


def _frequencies(model: nn.Module) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Frequencies by pair, those of longer texts, both float64 on the CPU, and the factor of both tables."""
    rotary = model.model.rotary_emb
    short = long = rotary.original_inv_freq.cpu()  # the other buffer may be that of the last text
    if rotary.rope_type == "longrope":
        longer = model.config.rope_parameters["original_max_position_embeddings"] + 1
        long = ROPE_INIT_FUNCTIONS["longrope"](model.config, seq_len=longer)[0].to(short.dtype)
    return short.double(), long.double(), float(rotary.attention_scaling)


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
    _check_gguf(config)
    check_tokenizer(tokenizer, plain)
    _check_weights(plain)
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
    _add_tokenizer(writer, tokenizer, plain)
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
    short, long, attention_factor = _frequencies(plain)
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


def _split(pattern: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _bytes(use_regex: bool) -> dict:
    return {"type": "ByteLevel", "add_prefix_space": False, "use_regex": use_regex}


def _words(digits: str) -> dict:
    """The split of Llama 3 and of those after it, which differ in how many digits stay together."""
    return _split(
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|" + digits + r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
        r"\s+(?!\S)|\s+"
    )


# llama.cpp's names for how text is cut before tokens merge, by all that each does: normalisers, pre-tokenisers, whether
# a word that is a token is taken whole. A part of one would be a part of others too.
PRE_TOKENIZERS = {
    "llama-bpe": ([], [_words(r"\p{N}{1,3}"), _bytes(False)], True),
    "smaug-bpe": ([], [_words(r"\p{N}{1,3}"), _bytes(False)], False),
    "qwen2": ([], [_words(r"\p{N}"), _bytes(False)], False),
    "smollm": ([], [{"type": "Digits", "individual_digits": True}, _bytes(True)], False),
    "gpt-2": ([], [_bytes(True)], False),
}
COMPOSED = {"type": "NFC"}  # llama.cpp leaves it out: that is said where the file is written


def pre_tokenizer_of(tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> str:
    """llama.cpp's name for how this tokeniser cuts text.

    Raises ValueError where it has none, or where it would tokenise otherwise for another reason.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    description = json.loads(backend.to_str()) if backend is not None else {"model": {"type": type(tokenizer).__name__}}
    model = description["model"]
    decoders = _steps(description.get("decoder"), "decoders")
    if model["type"] != "BPE" or model.get("byte_fallback") or [step["type"] for step in decoders] != ["ByteLevel"]:
        raise ValueError("GGUF files are written for byte-level BPE tokenisers (Llama 3, SmolLM, Qwen), not for others")
    normalizers = [step for step in _steps(description["normalizer"], "normalizers") if step != COMPOSED]
    steps = normalizers, _steps(description["pre_tokenizer"], "pretokenizers"), model.get("ignore_merges", False)
    name = next((name for name, known in PRE_TOKENIZERS.items() if known == steps), None)
    if name is None:
        raise ValueError(
            f"this tokeniser splits text in none of the ways known here ({', '.join(PRE_TOKENIZERS)}): llama.cpp would "
            "tokenise otherwise"
        )
    knows_all_bytes = model["vocab"].keys() >= set(ByteLevel.alphabet())  # then nothing is unknown
    for setting in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "unk_token"):
        if model.get(setting) and not (setting == "unk_token" and knows_all_bytes):
            raise ValueError(f"the tokeniser's {setting} is {model[setting]!r}: llama.cpp would tokenise otherwise")
    for token in description["added_tokens"]:
        rule = next((rule for rule in ("lstrip", "rstrip", "single_word") if token[rule]), None)
        if rule:
            raise ValueError(f"the token {token['content']!r} is matched with {rule}: llama.cpp has no such rule")
    if (most := max(tokenizer.get_vocab().values())) >= vocabulary:
        raise ValueError(f"the tokeniser has a token {most}, the model's vocabulary ends at {vocabulary - 1}")
    return name


def _steps(description: dict | None, parts: str) -> list[dict]:
    """The steps of a normaliser, pre-tokeniser or decoder, nested ones in a row; offsets do not change tokens."""
    if description is None:
        return []
    if description["type"] == "Sequence":
        return [step for part in description[parts] for step in _steps(part, parts)]
    return [{name: value for name, value in description.items() if name != "trim_offsets"}]


def end_tokens(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids that end a generation: the tokeniser's first, then the model's.

    Raises ValueError where a GGUF file cannot name them: where there is none, llama.cpp would end at token 11.
    """
    own = model.generation_config.eos_token_id
    own = own if isinstance(own, list) else [own]
    ids = list(dict.fromkeys(index for index in (tokenizer.eos_token_id, *own) if index is not None))
    if not 1 <= len(ids) <= len(END_KEYS) or not all(0 <= index < model.config.vocab_size for index in ids):
        raise ValueError(
            f"a generation ends at tokens {ids}: a GGUF file names 1 to {len(END_KEYS)} of the vocabulary's "
            f"{model.config.vocab_size}"
        )
    return ids


def _added_around(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether the tokeniser puts BOS before a text, and EOS behind it; ValueError where it adds anything else."""
    inside = tokenizer("a", add_special_tokens=False)["input_ids"]
    text = tokenizer("a")["input_ids"]
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    for before, after in (([], []), ([bos], []), ([], [eos]), ([bos], [eos])):
        if text == [*before, *inside, *after]:
            return bool(before), bool(after)
    raise ValueError(f"the tokeniser makes {text} of {inside}: llama.cpp adds nothing but BOS before and EOS behind")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, model: nn.Module) -> None:
    """Raise ValueError where llama.cpp, by a GGUF file, would tokenise otherwise, or end at other tokens."""
    pre_tokenizer_of(tokenizer, model.config.vocab_size)
    _added_around(tokenizer)
    end_tokens(model, tokenizer)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, model: LlamaForCausalLM) -> None:
    vocabulary, (add_bos, add_eos) = model.config.vocab_size, _added_around(tokenizer)
    description = json.loads(tokenizer.backend_tokenizer.to_str())
    if _steps(description["normalizer"], "normalizers"):
        warnings.warn("llama.cpp does not compose characters (NFC) before it tokenises, as this tokeniser does",
                      stacklevel=3)  # fmt: skip
    special = {token["id"] for token in description["added_tokens"] if token["special"]}
    added = {token["id"] for token in description["added_tokens"]}
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    kinds, filler = gguf.TokenType, "unused"
    while any(token.startswith(f"[{filler}") for token in by_id.values()):  # llama.cpp wants every text once
        filler += "_"
    tokens = [by_id.get(index, f"[{filler}{index}]") for index in range(vocabulary)]
    types = [
        kinds.UNUSED if index not in by_id else kinds.CONTROL if index in special
        else kinds.USER_DEFINED if index in added else kinds.NORMAL
        for index in range(vocabulary)
    ]  # fmt: skip
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in description["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_of(tokenizer, vocabulary))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_add_bos_token(add_bos)
    writer.add_add_eos_token(add_eos)
    for name in ("bos", "pad", "unk"):
        if (index := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    for name, index in zip(END_KEYS, end_tokens(model, tokenizer), strict=False):
        getattr(writer, f"add_{name}_token_id")(index)
    templates = tokenizer.chat_template
    if isinstance(templates, dict):
        templates = [{"name": name, "template": template} for name, template in templates.items()]
    if templates:
        writer.add_chat_template(templates)
