"""GGUF files: read as llama.cpp reads them, they give the model's logits; what llama.cpp would do otherwise is refused.

The reader below is llama.cpp's graph of a "llama" and of a "deci" (src/models/llama.cpp, src/models/deci.cpp,
src/llama-model.cpp of version 0.3.36 of llama-cpp-python) in float64: it knows what the file says and nothing else.
"""

from dataclasses import replace

import gguf
import pytest
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from torch.nn.functional import rms_norm, silu
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import transact
from tests.tiny import LONGROPE, ROPES, llama_with, plain_plan, random_plan, tiny_llama, tiny_relative
from transact.__main__ import main
from transact.export import check_exportable, check_tokenizer, llama_by_layer, plain_llama, write_gguf
from transact.export.gguf_tokenizer import pre_tokenizer_of

LETTERS = sorted(pre_tokenizers.ByteLevel.alphabet())


class AsLlamaCppReadsIt:
    def __init__(self, path, *, context: int):
        reader = gguf.GGUFReader(path)
        self.values = {name: field.contents() for name, field in reader.fields.items()}
        self.tensors = {
            tensor.name: torch.from_numpy(gguf.quants.dequantize(tensor.data, tensor.tensor_type).copy()).double()
            for tensor in reader.tensors
        }
        self.architecture = self.values["general.architecture"]
        self.context = context

    def get(self, name: str, default=None):
        return self.values.get(f"{self.architecture}.{name}", default)

    def of_layer(self, name: str, layer: int) -> int:
        """Only a "deci" has widths by layer: a "llama" takes the shapes of all its tensors from one."""
        value = self.get(name)
        return value[layer] if self.architecture == "deci" else value

    def linear(self, name: str, inputs: torch.Tensor) -> torch.Tensor:
        outputs = inputs @ self.tensors[f"{name}.weight"].mT
        return outputs + self.tensors[f"{name}.bias"] if f"{name}.bias" in self.tensors else outputs

    def norm(self, name: str, inputs: torch.Tensor) -> torch.Tensor:
        epsilon = self.get("attention.layer_norm_rms_epsilon")
        return rms_norm(inputs, inputs.shape[-1:], self.tensors[f"{name}.weight"], epsilon)

    def rope(self, heads: torch.Tensor) -> torch.Tensor:
        """(length, heads, width), neighbours are pairs."""
        scaling = self.get("rope.scaling.type", "linear")
        assert scaling in ("linear", "longrope")
        width = self.get("rope.dimension_count")
        name = "rope_freqs.weight"
        if scaling == "longrope":
            is_long = self.context > self.get("rope.scaling.original_context_length")
            name = f"rope_factors_{'long' if is_long else 'short'}.weight"
        factors = self.tensors.get(name, torch.ones(width // 2).double())
        frequencies = self.get("rope.freq_base") ** (-torch.arange(width // 2).double() * 2 / width) / factors
        angles = torch.arange(len(heads)).double()[:, None] * frequencies / self.get("rope.scaling.factor", 1.0)
        cos, sin = (
            table(angles)[:, None] * self.get("rope.scaling.attn_factor", 1.0) for table in (torch.cos, torch.sin)
        )
        first, second = heads.unflatten(-1, (-1, 2)).unbind(-1)
        return torch.stack((first * cos - second * sin, second * cos + first * sin), -1).flatten(-2)

    def logits(self, ids: torch.Tensor) -> torch.Tensor:
        assert self.architecture in ("llama", "deci")
        hidden, length = self.tensors["token_embd.weight"][ids], len(ids)
        width = self.get("attention.key_length")
        assert width == self.get("attention.value_length") == self.get("rope.dimension_count")
        mask = torch.full((length, length), -torch.inf).triu(1)
        for layer in range(self.get("block_count")):
            heads, kv_heads, mlp = (
                self.of_layer(name, layer)
                for name in ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
            )
            inputs = self.norm(f"blk.{layer}.attn_norm", hidden)
            query, key, value = (
                self.linear(f"blk.{layer}.attn_{name}", inputs).view(length, count, width)
                for name, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
            )
            query, key = self.rope(query), self.rope(key)
            key, value = (of.repeat_interleave(heads // kv_heads, 1) for of in (key, value))
            scores = torch.einsum("qhw,khw->hqk", query, key) / width**0.5 + mask
            mixed = torch.einsum("hqk,khw->qhw", scores.softmax(-1), value).flatten(1)
            hidden = hidden + self.linear(f"blk.{layer}.attn_output", mixed)
            inputs = self.norm(f"blk.{layer}.ffn_norm", hidden)
            gate, up = (self.linear(f"blk.{layer}.ffn_{name}", inputs).view(length, mlp) for name in ("gate", "up"))
            hidden = hidden + self.linear(f"blk.{layer}.ffn_down", silu(gate) * up)
        head = self.tensors.get("output.weight", self.tensors["token_embd.weight"])
        return self.norm("output_norm", hidden) @ head.mT


def assert_file_is_the_model(path, model, *, length: int = 48, tolerance: float = 2e-6):
    ids = torch.randint(1, 97, (length,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.double()(input_ids=ids[None]).logits[0]
    actual = AsLlamaCppReadsIt(path, context=length).logits(ids)
    assert (actual - expected).norm() / expected.norm() < tolerance


def tokenizer_of(steps, *, normalizer=None, ignore_merges=False, tokens=97, template=None, **settings):
    """A byte-level BPE of `tokens` tokens that cuts text by `steps`."""
    vocabulary = {token: index for index, token in enumerate(["<s>", "ab", "abc", *LETTERS[:94]][:tokens])}
    vocabulary |= {f"more{index}": index for index in range(97, tokens)}
    merges = [("a", "b"), ("ab", "c")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=ignore_merges, **settings))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps) if isinstance(steps, list) else steps
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    if template is not None:
        tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")


def split(pattern: str, behavior: str = "isolated"):
    return pre_tokenizers.Split(Regex(pattern), behavior)


def byte_level(**settings):
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **settings})


END = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + END
QWEN2 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + END
WORDS = [split(LLAMA3), byte_level(use_regex=False)]
GPT2 = byte_level()


def written(tmp_path, model, tokenizer=None, kind="f32"):
    path = tmp_path / "model.gguf"
    write_gguf(path, model, tokenizer or tokenizer_of(GPT2), kind=kind)
    return path


@pytest.mark.parametrize("cut", [False, True])
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.filterwarnings("ignore:llama.cpp takes RoPE's long factors:UserWarning")
def test_every_rope_is_stated(rope, cut, tmp_path):
    dense = llama_with(rope_parameters=ROPES[rope])
    plain = plain_llama(transact.apply_plan(dense, plain_plan(dense.config, head_dim=10 if cut else 16)))
    assert plain.config.head_dim == (10 if cut else 16)
    path = written(tmp_path, plain)
    assert_file_is_the_model(path, plain, length=12)
    assert_file_is_the_model(path, plain, length=48)  # beyond the length that longrope was trained on


def test_what_depends_on_the_context_is_said(tmp_path):
    with pytest.warns(UserWarning, match="long factors where its context is longer than 16 tokens"):
        written(tmp_path, llama_with(rope_parameters=LONGROPE))


@pytest.mark.parametrize("variant", ["mha", "gqa", "mqa", "tied", "biases", "llama3-rope"])
def test_padded_models_and_their_biases_are_stated(variant, tmp_path):
    dense = tiny_llama(variant)
    narrowed = transact.apply_plan(dense, random_plan(dense.config, seed=4, drop_heads=True))
    path = written(tmp_path, plain_llama(narrowed, pad=True))
    assert_file_is_the_model(path, narrowed, length=24)


def plan_by_layer(config, *, head_dim=10, mlps=(24, 40, 9), lost_heads=(1, 0, 1)):
    """One head width and one set of RoPE pairs; every layer has its own MLP and loses its own key-value heads."""
    layers = plain_plan(config, head_dim=head_dim).layers
    return transact.Plan(
        tuple(
            replace(
                layer, mlp_dims=torch.arange(config.intermediate_size)[-mlp:], kv_heads=layer.kv_heads[lost:],
                rope_pairs=layer.rope_pairs[lost:], value_dims=layer.value_dims[lost:],
            )
            for layer, mlp, lost in zip(layers, mlps, lost_heads, strict=True)
        )
    )  # fmt: skip


def three_layers(**settings):
    """A Llama of three layers; weights as large as `tiny_llama` has them."""
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**{**tiny_llama("gqa", layers=3).config.to_dict(), **settings})).eval()
    with torch.no_grad():
        for parameter in dense.parameters():
            parameter.mul_(8 if parameter.ndim > 1 else 1)
    return dense


def narrowed_by_layer(dense=None, **widths):
    dense = dense or tiny_llama("gqa", layers=3)
    return transact.apply_plan(dense, plan_by_layer(dense.config, **widths))


@pytest.mark.parametrize("head_dim", [10, 16])
@pytest.mark.parametrize("variant", ["mha", "gqa", "tied", "biases", "llama3-rope"])
def test_every_layer_keeps_its_own_mlp_and_heads(variant, head_dim, tmp_path):
    narrowed = narrowed_by_layer(tiny_llama(variant, layers=3), head_dim=head_dim)
    path = written(tmp_path, llama_by_layer(narrowed))
    file = AsLlamaCppReadsIt(path, context=8)
    group, kv_heads = narrowed.model.layers[0].self_attn.num_key_value_groups, narrowed.config.kv_head_counts
    assert file.architecture == "deci"
    assert kv_heads[0] + 1 == kv_heads[1] == kv_heads[2] + 1
    assert file.get("feed_forward_length") == narrowed.config.intermediate_sizes == [24, 40, 9]
    assert file.get("attention.head_count_kv") == kv_heads
    assert file.get("attention.head_count") == [group * count for count in kv_heads]
    assert file.get("attention.key_length") == head_dim
    own = {name: tensor for name, tensor in file.tensors.items() if not name.startswith("rope_")}
    assert sum(tensor.numel() for tensor in own.values()) == narrowed.num_parameters()  # no zeros were added
    assert torch.equal(own["blk.2.ffn_down.weight"].float(), narrowed.model.layers[2].mlp.down_proj.weight)
    assert_file_is_the_model(path, narrowed)


@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.filterwarnings("ignore:llama.cpp takes RoPE's long factors:UserWarning")
def test_every_rope_is_stated_by_layer(rope, tmp_path):
    narrowed = narrowed_by_layer(three_layers(rope_parameters=ROPES[rope]))
    path = written(tmp_path, llama_by_layer(narrowed))
    assert_file_is_the_model(path, narrowed, length=12)
    assert_file_is_the_model(path, narrowed, length=48)


@pytest.mark.parametrize(("widths", "architecture"), [
    ({"mlps": (24,) * 3, "lost_heads": (0,) * 3}, "llama"),
    ({"mlps": (24,) * 3, "lost_heads": (1,) * 3}, "llama"),
    ({"mlps": (24, 24, 23), "lost_heads": (0,) * 3}, "deci"),
    ({"mlps": (24,) * 3, "lost_heads": (0, 0, 1)}, "deci"),
])  # fmt: skip
def test_the_architecture_is_llama_where_one_width_fits_all(widths, architecture, tmp_path):
    narrowed = narrowed_by_layer(**widths)
    path = written(tmp_path, llama_by_layer(narrowed))
    assert AsLlamaCppReadsIt(path, context=8).architecture == architecture
    assert_file_is_the_model(path, narrowed)


@pytest.mark.parametrize("mlps", [(24, 40, 9), (24, 24, 24)])
def test_output_biases_alone_are_stated(mlps, tmp_path):
    dense = tiny_llama("gqa", layers=3)
    plan = plan_by_layer(dense.config, mlps=mlps)
    narrowed = transact.apply_plan(dense, plan)
    for layer in narrowed.model.layers:
        for linear in (layer.self_attn.o_proj, layer.mlp.down_proj):
            linear.bias = torch.nn.Parameter(torch.randn(48))
    narrowed.config.attention_output_bias = narrowed.config.mlp_output_bias = True
    path = written(tmp_path, llama_by_layer(narrowed))
    names = {name.split(".", 2)[2] for name in AsLlamaCppReadsIt(path, context=8).tensors if name.endswith(".bias")}
    assert names == {"attn_output.bias", "ffn_down.bias"}
    assert_file_is_the_model(path, narrowed)


def test_biases_of_queries_keys_and_values_alone_are_stated(tmp_path):
    narrowed = narrowed_by_layer(tiny_relative("qwen2"), mlps=(24, 40), lost_heads=(1, 0))
    path = written(tmp_path, llama_by_layer(narrowed))
    names = {name.split(".", 2)[2] for name in AsLlamaCppReadsIt(path, context=8).tensors if name.endswith(".bias")}
    assert names == {"attn_q.bias", "attn_k.bias", "attn_v.bias"}
    assert_file_is_the_model(path, narrowed)


def test_head_widths_by_layer_and_pairs_by_head_are_padded_or_refused(tmp_path):
    dense = tiny_llama("gqa", layers=3)
    narrowed = transact.apply_plan(dense, random_plan(dense.config, seed=4, drop_heads=True))
    with pytest.raises(ValueError, match=r"a GGUF file has one head width and one set of RoPE pairs .* pass --pad"):
        llama_by_layer(narrowed)
    padded = llama_by_layer(narrowed, pad=True)
    assert padded.config.intermediate_sizes == narrowed.config.intermediate_sizes
    assert padded.config.kv_head_counts == narrowed.config.kv_head_counts
    assert_file_is_the_model(written(tmp_path, padded), narrowed)


def test_heads_need_not_divide_the_hidden_size(tmp_path):
    dense = three_layers(num_attention_heads=6, num_key_value_heads=6)
    narrowed = narrowed_by_layer(dense, lost_heads=(1, 1, 1))
    path = written(tmp_path, llama_by_layer(narrowed))
    assert AsLlamaCppReadsIt(path, context=8).get("attention.head_count") == [5, 5, 5]  # five do not divide 48
    assert_file_is_the_model(path, narrowed)


def test_a_narrowed_model_is_written_only_when_its_heads_are_alike(tmp_path):
    narrowed = narrowed_by_layer()
    with pytest.raises(ValueError, match=r"heads of 10 and 10 dimensions in layer 0, .* llama_by_layer"):
        written(tmp_path, narrowed)
    assert not list(tmp_path.iterdir())


def test_rows_without_whole_blocks_stay_f16_by_layer(tmp_path):
    dense = three_layers(hidden_size=96, intermediate_size=64)
    narrowed = narrowed_by_layer(dense, head_dim=16, mlps=(64, 32, 33))
    path = written(tmp_path, llama_by_layer(narrowed), kind="q8_0")
    types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert [types[f"blk.{layer}.ffn_down.weight"] for layer in range(3)] == ["Q8_0", "Q8_0", "F16"]
    assert [types[f"blk.{layer}.ffn_up.weight"] for layer in range(3)] == ["Q8_0"] * 3
    assert_file_is_the_model(path, narrowed, tolerance=0.1)  # 8-bit weights
    (tmp_path / "again").mkdir()
    uncut = write_gguf(tmp_path / "again" / "model.gguf", llama_by_layer(narrowed), tokenizer_of(GPT2), kind="q8_0")
    assert set(uncut) == {name for name, kind in types.items() if kind == "F16"}
    assert uncut[-1] == "blk.2.ffn_down.weight"


@pytest.mark.parametrize("kind", ["bf16", "f16"])
def test_bfloat16_weights_stay_as_they_are(kind, tmp_path):
    dense = tiny_llama("gqa").to(torch.bfloat16)
    narrowed = transact.apply_plan(dense, plain_plan(dense.config, head_dim=10))
    assert_file_is_the_model(written(tmp_path, plain_llama(narrowed), kind=kind), narrowed)


@torch.no_grad()
def test_a_head_of_its_own_is_written_whatever_the_flag_says(tmp_path):
    dense = tiny_llama("tied")
    dense.lm_head.weight = torch.nn.Parameter(torch.randn(97, 48))
    assert dense.config.tie_word_embeddings
    assert_file_is_the_model(written(tmp_path, dense), dense)
    tied = tiny_llama("tied")
    assert "output.weight" not in AsLlamaCppReadsIt(written(tmp_path, tied), context=8).tensors


@pytest.mark.parametrize("activation", ["relu", "gelu", "gelu_pytorch_tanh", "relu2"])
def test_another_activation_than_silu_is_refused(activation, tmp_path):
    dense = llama_with(hidden_act=activation)
    with pytest.raises(ValueError, match=rf"hidden_act '{activation}' cannot be stated in a GGUF file"):
        written(tmp_path, dense)
    with pytest.raises(ValueError, match=r"llama\.cpp computes silu"):
        check_exportable(dense.config, "gguf")
    check_exportable(dense.config, "llama")
    check_exportable(llama_with(hidden_act="swish").config, "gguf")
    assert not list(tmp_path.iterdir())


def test_what_else_llama_cpp_lacks_is_refused(tmp_path):
    dynamic = llama_with(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    with pytest.raises(ValueError, match="RoPE type 'dynamic' cannot be stated"):
        written(tmp_path, dynamic)
    with pytest.raises(ValueError, match="this is a 'qwen3' model"):
        written(tmp_path, tiny_relative("qwen3"))
    biased = tiny_llama("gqa")
    biased.lm_head = torch.nn.Linear(48, 97)
    with pytest.raises(ValueError, match=r"lm_head\.bias is 97, by the configuration it is absent"):
        written(tmp_path, biased)
    assert not list(tmp_path.iterdir())


@torch.no_grad()
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_weights_beyond_a_types_range_are_refused(kind, tmp_path):
    dense = tiny_llama("gqa")
    dense.model.layers[1].mlp.up_proj.weight[3, 5] = 1e7
    dense.model.layers[0].mlp.up_proj.weight[3, 5] = 65504
    with pytest.raises(ValueError, match=r"blk\.1\.ffn_up\.weight holds 1e\+07, which .* cannot: write bf16 or f32"):
        written(tmp_path, dense, kind=kind)
    assert not list(tmp_path.iterdir())
    assert_file_is_the_model(written(tmp_path, dense), dense)


KNOWN = {
    "gpt-2": tokenizer_of(GPT2),
    "gpt-2 without offsets": tokenizer_of([byte_level(trim_offsets=False)], normalizer=normalizers.Sequence([])),
    "llama-bpe": tokenizer_of(WORDS, ignore_merges=True),
    "smaug-bpe": tokenizer_of(WORDS),
    "qwen2": tokenizer_of([split(QWEN2), byte_level(use_regex=False)]),
    "qwen2, composed": tokenizer_of([split(QWEN2), byte_level(use_regex=False)], normalizer=normalizers.NFC()),
    "smollm": tokenizer_of([pre_tokenizers.Digits(individual_digits=True), GPT2]),
}
DEEPSEEK_CODER = [
    split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split("[一-龥ࠀ-一가-퟿]+"),
    pre_tokenizers.Digits(individual_digits=True), byte_level(use_regex=False),
]  # fmt: skip
FALCON = [
    pre_tokenizers.Punctuation("contiguous"), GPT2, pre_tokenizers.Digits(individual_digits=False),
    split("[0-9][0-9][0-9]"),
]  # fmt: skip
UNKNOWN = {
    "deepseek-coder": tokenizer_of(DEEPSEEK_CODER),
    "falcon": tokenizer_of(FALCON),
    "smollm, and a step more": tokenizer_of([pre_tokenizers.Digits(individual_digits=True), split("x"), GPT2]),
    "smollm, in another order": tokenizer_of([GPT2, pre_tokenizers.Digits(individual_digits=True)]),
    "smollm, digits together": tokenizer_of([pre_tokenizers.Digits(individual_digits=False), GPT2]),
    "gpt-2, with a space before": tokenizer_of(byte_level(add_prefix_space=True)),
    "gpt-2, lower case": tokenizer_of(GPT2, normalizer=normalizers.Lowercase()),
    "gpt-2, composed otherwise": tokenizer_of(GPT2, normalizer=normalizers.NFKC()),
    "gpt-2, words taken whole": tokenizer_of(GPT2, ignore_merges=True),
    "gpt-2, no words": tokenizer_of(byte_level(use_regex=False)),
    "llama-bpe, parts removed": tokenizer_of(
        [split(LLAMA3, "removed"), byte_level(use_regex=False)], ignore_merges=True
    ),
    "llama-bpe, and more": tokenizer_of([split(LLAMA3 + "|x"), byte_level(use_regex=False)], ignore_merges=True),
    "llama-bpe, and a second step": tokenizer_of([split(LLAMA3), GPT2], ignore_merges=True),
    "one digit to four": tokenizer_of([split(LLAMA3.replace("1,3", "1,4")), byte_level(use_regex=False)]),
    "qwen2, decomposed": tokenizer_of([split(QWEN2), byte_level(use_regex=False)], normalizer=normalizers.NFD()),
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_pre_tokenizers_go_by_the_whole(name):
    assert pre_tokenizer_of(KNOWN[name], 97) == name.split(",")[0].split(" ")[0]


@pytest.mark.parametrize("name", UNKNOWN)
def test_other_pre_tokenizers_are_refused(name, tmp_path):
    with pytest.raises(ValueError, match=r"splits text in none of the ways known here .* would tokenise otherwise"):
        written(tmp_path, tiny_llama("gqa"), UNKNOWN[name])
    assert not list(tmp_path.iterdir())


def with_token(token: AddedToken, tokens: int = 97):
    tokenizer = tokenizer_of(GPT2, tokens=tokens)
    tokenizer.add_tokens([token])
    return tokenizer


def undecoded():
    tokenizer = tokenizer_of(GPT2)
    tokenizer.backend_tokenizer.decoder = decoders.WordPiece()
    return tokenizer


def sentencepiece_like():
    tokenizer = Tokenizer(models.BPE({"a": 0, "b": 1}, [], byte_fallback=True))
    tokenizer.pre_tokenizer, tokenizer.decoder = GPT2, decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="a", eos_token="b")


@pytest.mark.parametrize(
    ("tokenizer", "named"),
    [
        (with_token(AddedToken("<mask>", lstrip=True), 90), "'<mask>' is matched with lstrip"),
        (with_token(AddedToken("<mask>", rstrip=True), 90), "'<mask>' is matched with rstrip"),
        (with_token(AddedToken("word", single_word=True), 90), "'word' is matched with single_word"),
        (with_token(AddedToken("<more>")), "has a token 97, the model's vocabulary ends at 96"),
        (tokenizer_of(GPT2, tokens=120), "has a token 119"),
        (tokenizer_of(GPT2, dropout=0.1), "dropout is 0.1"),
        (tokenizer_of(GPT2, unk_token="<s>"), "unk_token is '<s>'"),
        (tokenizer_of(GPT2, end_of_word_suffix="</w>"), "end_of_word_suffix is '</w>'"),
        (tokenizer_of(GPT2, template="$A <s> <s>"), "adds nothing but BOS before and EOS behind"),
        (undecoded(), "byte-level BPE"),
        (sentencepiece_like(), "byte-level BPE"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_else_a_tokenizer_does_otherwise_is_refused(tokenizer, named, tmp_path):
    with pytest.raises(ValueError, match=named) as caught:
        written(tmp_path, tiny_llama("gqa"), tokenizer)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_a_normaliser_that_llama_cpp_leaves_out_is_said(tmp_path):
    with pytest.warns(UserWarning, match="does not compose characters"):
        written(tmp_path, tiny_llama("gqa"), KNOWN["qwen2, composed"])


@pytest.mark.parametrize(
    ("template", "bos", "eos"),
    [("$A", False, False), ("<s> $A", True, False), ("$A <s>", False, True), ("<s> $A <s>", True, True)],
)
def test_what_is_added_to_a_text_is_stated(template, bos, eos, tmp_path):
    values = AsLlamaCppReadsIt(written(tmp_path, tiny_llama(), tokenizer_of(GPT2, template=template)), context=8).values
    assert (values["tokenizer.ggml.add_bos_token"], values["tokenizer.ggml.add_eos_token"]) == (bos, eos)


@pytest.mark.parametrize(
    ("ends", "stated"), [(None, [0]), (5, [0, 5]), ([5, 7], [0, 5, 7]), ([7, 0], [0, 7]), ([0, 0], [0])]
)
def test_all_tokens_that_end_a_generation_are_stated(ends, stated, tmp_path):
    model = tiny_llama("gqa")
    model.generation_config.eos_token_id = ends
    values = AsLlamaCppReadsIt(written(tmp_path, model), context=8).values
    keys = [f"tokenizer.ggml.{name}_token_id" for name in ("eos", "eot", "eom")]
    assert [values[key] for key in keys if key in values] == stated


@pytest.mark.parametrize("ends", [[3, 4, 5], 97, -1])
def test_tokens_that_a_file_cannot_name_are_refused(ends, tmp_path):
    model = tiny_llama("gqa")
    model.generation_config.eos_token_id = ends
    with pytest.raises(ValueError, match="names 1 to 3 of the vocabulary's 97"):
        written(tmp_path, model)
    endless = tokenizer_of(GPT2)
    endless.eos_token = None
    model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match=r"ends at tokens \[\]"):
        check_tokenizer(endless, model)


def test_several_chat_templates_go_by_name(tmp_path):
    tokenizer = tokenizer_of(GPT2)
    tokenizer.chat_template = {"default": "{{ messages }}", "tool_use": "{{ tools }}"}
    values = AsLlamaCppReadsIt(written(tmp_path, tiny_llama("gqa"), tokenizer), context=8).values
    assert values["tokenizer.chat_template"] == "{{ messages }}"
    assert values["tokenizer.chat_template.tool_use"] == "{{ tools }}"
    tokenizer.chat_template = "one"
    values = AsLlamaCppReadsIt(written(tmp_path, tiny_llama("gqa"), tokenizer), context=8).values
    assert values["tokenizer.chat_template"] == "one"


def test_rows_without_a_token_have_texts_of_their_own(tmp_path):
    tokenizer = tokenizer_of(GPT2, tokens=90)
    tokenizer.add_tokens(["[unused95]"])
    values = AsLlamaCppReadsIt(written(tmp_path, tiny_llama("gqa"), tokenizer), context=8).values
    tokens = values["tokenizer.ggml.tokens"]
    assert len(set(tokens)) == len(tokens) == 97
    assert tokens.index("[unused95]") == tokenizer.convert_tokens_to_ids("[unused95]")


@pytest.mark.filterwarnings("default:llama.cpp does not compose:UserWarning")
def test_the_command_refuses_before_it_writes(tmp_path, capsys):
    source, out = tmp_path / "pruned", tmp_path / "model.gguf"
    dense = tiny_llama("gqa")
    plan = plain_plan(dense.config, head_dim=10)
    transact.save_checkpoint(source, transact.apply_plan(dense, plan), plan, {})
    tokenizer_of(DEEPSEEK_CODER).save_pretrained(source)
    assert main(["export", str(source), str(out), "--format", "gguf"]) == 2
    assert "splits text in none of the ways known here" in capsys.readouterr().err
    tokenizer_of([split(QWEN2), byte_level(use_regex=False)], normalizer=normalizers.NFC()).save_pretrained(source)
    assert main(["export", str(source), str(out), "--format", "gguf"]) == 0
    assert capsys.readouterr().err.count("does not compose characters") == 1
    out.unlink()
    config = source / "config.json"
    config.write_text(config.read_text().replace('"silu"', '"relu"'))
    assert main(["export", str(source), str(out), "--format", "gguf"]) == 2
    captured = capsys.readouterr().err
    assert "hidden_act 'relu' cannot be stated" in captured
    assert captured.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruned"]


@pytest.mark.parametrize(("widths", "said"), [
    ({}, "3 to 6 heads of 10, MLP 9 to 40, architecture 'deci'"),
    ({"mlps": (24,) * 3, "lost_heads": (0,) * 3}, "6 heads of 10, MLP 24, architecture 'llama'"),
])  # fmt: skip
def test_the_command_says_the_architecture(widths, said, tmp_path, capsys):
    dense = tiny_llama("gqa", layers=3)
    plan = plan_by_layer(dense.config, **widths)
    narrowed = transact.apply_plan(dense, plan)
    transact.save_checkpoint(tmp_path / "pruned", narrowed, plan, {})
    tokenizer_of(GPT2).save_pretrained(tmp_path / "pruned")
    out = tmp_path / "model.gguf"
    assert main(["export", str(tmp_path / "pruned"), str(out), "--format", "gguf", "--type", "f32"]) == 0
    printed = capsys.readouterr().out
    assert printed.endswith(f" removed), {said}\n")
    assert "zeros added" not in printed
    assert_file_is_the_model(out, narrowed)
    assert main(["export", str(tmp_path / "pruned"), str(tmp_path / "q8"), "--format", "gguf", "--type", "q8_0"]) == 0
    assert capsys.readouterr().out.endswith(f" removed), {said}, f16 where rows are no multiple of 32\n")


def test_the_command_pads_heads_only_where_it_is_asked_to(tmp_path, capsys):
    dense = tiny_llama("gqa", layers=3)
    plan = random_plan(dense.config, seed=4, drop_heads=True)
    narrowed = transact.apply_plan(dense, plan)
    transact.save_checkpoint(tmp_path / "pruned", narrowed, plan, {})
    tokenizer_of(GPT2).save_pretrained(tmp_path / "pruned")
    command = ["export", str(tmp_path / "pruned"), str(tmp_path / "model.gguf"), "--format", "gguf", "--type", "f32"]
    assert main(command) == 2
    error = capsys.readouterr().err
    assert "one head width and one set of RoPE pairs for all layers" in error
    assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pruned"]
    assert main([*command, "--pad"]) == 0
    assert "zeros added), " in capsys.readouterr().out
    assert_file_is_the_model(tmp_path / "model.gguf", narrowed)


@pytest.mark.parametrize("mlps", [(24, 40, 9), (24,) * 3])
@pytest.mark.parametrize("variant", ["mha", "gqa", "tied", "biases", "llama3-rope"])
def test_llama_cpp_itself_computes_the_same(variant, mlps, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    narrowed = narrowed_by_layer(tiny_llama(variant, layers=3), mlps=mlps)
    path = written(tmp_path, llama_by_layer(narrowed))
    engine = llama_cpp.Llama(
        str(path), n_ctx=64, n_gpu_layers=0, n_threads=1, logits_all=True, verbose=False, type_k=0, type_v=0
    )
    ids = torch.randint(1, 97, (48,), generator=torch.Generator().manual_seed(1))
    engine.eval(ids.tolist())
    with torch.no_grad():
        expected = narrowed(input_ids=ids[None]).logits[0]
    actual = torch.from_numpy(engine.scores[: len(ids)])
    assert (actual - expected).norm() / expected.norm() < 1e-4
