"""Exported checkpoints compute what the pruned model does; what cannot be exported says why."""

import copy
import json
from dataclasses import fields, replace

import gguf
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, LlamaForCausalLM, MistralConfig

import transact
from tests.test_recipes import WINDOWS, logits
from tests.tiny import ROPES, llama_with, plain_plan, random_plan, tiny_llama, tiny_relative
from transact import PRESETS, Recipe, Widths, fraction_removed, kv_fraction_removed
from transact.__main__ import main
from transact.allocate import removal_losses, searched_widths, shared_pairs
from transact.export import check_exportable, plain_llama, write_gguf
from transact.scores import LayerScores
from transact.whitelist import EXPRESSED, LACKING

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are few:UserWarning")
PLAIN = replace(PRESETS["best"], engine="plain")


def assert_the_same(plain, narrowed):
    expected = logits(narrowed)
    scale = expected.abs().max()
    torch.testing.assert_close(logits(plain) / scale, expected / scale, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", ["mha", "gqa", "mqa", "tied", "biases", "llama3-rope"])
def test_plain_plans_export_without_padding(variant, tmp_path):
    dense = tiny_llama(variant)
    pruned = transact.prune(dense, WINDOWS, recipe=PLAIN, ratio=0.3)
    plain = plain_llama(pruned.model)
    assert type(plain) is LlamaForCausalLM
    assert plain.num_parameters() == pruned.model.num_parameters()
    assert_the_same(plain, pruned.model)
    plain.save_pretrained(tmp_path / "plain")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert type(loaded) is LlamaForCausalLM
    assert_the_same(loaded, pruned.model)
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    assert torch.equal(loaded.generate(WINDOWS, **options), pruned.model.generate(WINDOWS, **options))


@pytest.mark.parametrize("preset", ["flap", "wanda-sp", "transact-released"])
def test_rivals_export(preset):
    dense = tiny_llama("mha")
    pruned = transact.prune(dense, WINDOWS, recipe=preset, ratio=0.3)
    assert_the_same(plain_llama(pruned.model, pad=True), pruned.model)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("variant", ["mha", "gqa", "biases", "llama3-rope"])
def test_any_plan_exports_with_padding(variant, seed):
    dense = tiny_llama(variant)
    narrowed = transact.apply_plan(dense, random_plan(dense.config, seed=seed, drop_heads=True))
    assert_the_same(plain_llama(narrowed, pad=True), narrowed)


def test_heads_are_padded_to_a_number_that_llama_takes():
    sizes = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 40, "num_hidden_layers": 2}
    dense = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=8, max_position_embeddings=128)).eval()
    whole = transact.dense_widths(dense.config)[0]
    recipe = Recipe(criterion="magnitude", granularity="heads")
    pruned = transact.prune(dense, recipe=recipe, widths=[replace(whole, kv_heads=3)] * 2)
    plain = plain_llama(pruned.model, pad=True)
    assert plain.config.num_attention_heads == 4  # three do not divide 64
    assert_the_same(plain, pruned.model)


def test_what_padding_would_undo_is_refused():
    dense = tiny_llama("gqa")
    pruned = transact.prune(dense, WINDOWS, recipe="transact", ratio=0.4)
    with pytest.raises(ValueError, match=r"of the 39\.\d% of the linear parameters .* prune with --for plain"):
        plain_llama(pruned.model)
    with pytest.raises(ValueError, match="a pruned checkpoint is exported, this one is of type 'llama'"):
        plain_llama(dense)


def test_plain_widths_are_the_cheapest_pair():
    config = tiny_llama("gqa").config
    generator = torch.Generator().manual_seed(0)
    scores = shared_pairs([
        LayerScores(
            rope_pairs=torch.rand(2, 8, generator=generator).cumsum(1),
            value_dims=torch.rand(2, 16, generator=generator).cumsum(1),
            mlp_dims=torch.rand(40, generator=generator).cumsum(0),
        )
        for _ in range(2)
    ])  # fmt: skip

    def loss(head: int, mlp: int) -> float:
        return sum(
            (removal_losses(layer.rope_pairs)[head // 2] + removal_losses(layer.value_dims)[head]
             + removal_losses(layer.mlp_dims)[mlp]).item()
            for layer in scores
        )  # fmt: skip

    (widths, other) = searched_widths(config, scores, 0.3, engine="plain")
    assert widths == other
    assert fraction_removed(config, [widths] * 2) == pytest.approx(0.3, abs=0.0065)
    for head in range(2, 17, 2):  # the cheapest of all head widths, each with the MLP nearest to the budget
        off = {mlp: abs(fraction_removed(config, [Widths(2, head, head, mlp)] * 2) - 0.3) for mlp in range(1, 41)}
        mlp = min(off, key=off.__getitem__)
        assert off[mlp] > 0.0065 or loss(widths.v_head_dim, widths.mlp) <= loss(head, mlp) + 1e-9
    half = searched_widths(config, scores, 0.4, kv_ratio=0.5, engine="plain")
    assert kv_fraction_removed(config, half) >= 0.5
    with pytest.raises(ValueError, match=r"kv-ratio 0\.9 is out of reach: .* that plain holds remove 0\.875"):
        searched_widths(config, scores, 0.1, kv_ratio=0.9, engine="plain")


def test_shared_pairs_are_those_that_cost_least_together():
    rows = torch.tensor([[1.0, 4.0, 9.0], [2.0, 3.0, 7.0]])  # cumulative: own costs 1, 3, 5 and 2, 1, 4
    layer = LayerScores(rope_pairs=rows, value_dims=torch.ones(2, 6), mlp_dims=torch.ones(4))
    shared = shared_pairs([layer])[0].rope_pairs
    torch.testing.assert_close(shared, torch.tensor([[1.5, 3.5, 8.0]] * 2))


def difference(model, other, ids=WINDOWS) -> float:
    """Of the logits, relative, computed in float64: nothing but weights and tables is rounded."""
    expected = logits(copy.deepcopy(model).double(), ids)
    return ((logits(copy.deepcopy(other).double(), ids) - expected).norm() / expected.norm()).item()


def narrowed_plainly(dense, head_dim=10):
    return transact.apply_plan(dense, plain_plan(dense.config, head_dim=head_dim))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_weight_is_rounded(dtype, tmp_path):
    tiny_llama("gqa").to(dtype).save_pretrained(tmp_path / "dense")
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    pruned = narrowed_plainly(dense)
    plain_llama(pruned).save_pretrained(tmp_path / "plain")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert loaded.dtype == loaded.config.dtype == dtype
    assert difference(pruned, loaded) < 1e-6


@pytest.mark.parametrize("head_dim", [10, 16])
@pytest.mark.parametrize("rope", ROPES)
def test_every_rope_stays_what_it_is(rope, head_dim, tmp_path):
    narrowed = narrowed_plainly(llama_with(rope_parameters=copy.deepcopy(ROPES[rope])), head_dim)
    plain_llama(narrowed).save_pretrained(tmp_path / "plain")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert loaded.config.head_dim == head_dim
    long = torch.randint(1, 97, (1, 200), generator=torch.Generator().manual_seed(1))
    for ids in (WINDOWS[:, :12], long, WINDOWS[:, :12]):  # on either side of what longrope was trained on, and back
        assert difference(narrowed, loaded, ids) < 1e-5


def test_what_is_exported_can_be_pruned_and_exported_again():
    once = plain_llama(narrowed_plainly(tiny_llama("gqa"), 12))
    again = narrowed_plainly(once, 8)
    assert difference(again, plain_llama(again)) < 1e-6


def test_rope_that_depends_on_the_length_needs_all_its_pairs():
    dense = llama_with(rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0})
    whole = narrowed_plainly(dense, 16)
    long = torch.randint(1, 97, (1, 200), generator=torch.Generator().manual_seed(1))
    for ids in (WINDOWS, long, WINDOWS):
        assert difference(whole, plain_llama(whole), ids) < 1e-6
    for _ in range(2):  # whatever text came before
        with pytest.raises(ValueError, match="RoPE type 'dynamic' cannot be stated"):
            plain_llama(narrowed_plainly(dense, 10))
        logits(dense, long)


@torch.no_grad()
def test_a_head_of_its_own_is_exported_whatever_the_flag_says(tmp_path):
    narrowed = narrowed_plainly(tiny_llama("tied"))
    tied = plain_llama(narrowed)
    assert tied.config.tie_word_embeddings
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    narrowed.lm_head.weight = torch.nn.Parameter(torch.randn(97, 48))
    narrowed.config.tie_word_embeddings = True
    plain_llama(narrowed).save_pretrained(tmp_path / "plain")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert not loaded.config.tie_word_embeddings
    assert torch.equal(loaded.lm_head.weight, narrowed.lm_head.weight)
    assert difference(narrowed, loaded) < 1e-6


def test_several_dtypes_become_the_widest():
    narrowed = narrowed_plainly(tiny_llama("gqa")).to(torch.bfloat16)
    narrowed.model.layers[0].self_attn.q_proj.float()
    narrowed.model.norm.float()
    plain = plain_llama(narrowed)
    assert {parameter.dtype for parameter in plain.parameters()} == {plain.config.dtype} == {torch.float32}
    assert torch.equal(plain.model.norm.weight, narrowed.model.norm.weight)


def test_settings_of_generation_are_copies():
    narrowed = narrowed_plainly(tiny_llama("gqa"))
    narrowed.generation_config.eos_token_id = [3, 5]
    plain = plain_llama(narrowed)
    narrowed.generation_config.eos_token_id.append(7)
    assert plain.generation_config.eos_token_id == [3, 5]


def test_every_field_of_a_pruned_configuration_is_accounted_for():
    own = {field.name for field in fields(transact.TransActConfig)} - {field.name for field in fields(LlamaConfig)}
    assert own == {*EXPRESSED, *LACKING}


REFUSED = {
    "final_logit_softcapping": (30.0, "says final_logit_softcapping, which no export states"),
    "logit_scale": (0.5, "says logit_scale"),
    "layer_types": (["sliding_attention"] * 2, "says layer_types"),
    "query_key_norm": (True, "has query-key norms"),
    "sliding_window": (8, "has a sliding window"),
    "quantization_config": ({"quant_method": "torchao"}, "the model is quantised"),
    "rope_parameters": (
        {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}, "say partial_rotary_factor"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("format", ["llama", "gguf"])
def test_what_no_export_states_is_refused(format, name):
    narrowed = narrowed_plainly(tiny_llama("gqa"))
    check_exportable(narrowed.config, format)
    narrowed.config.unset = None
    check_exportable(narrowed.config, format)
    value, named = REFUSED[name]
    setattr(narrowed.config, name, value)
    with pytest.raises(ValueError, match=named) as caught:
        check_exportable(narrowed.config, format)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match=named):
        plain_llama(narrowed)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (tiny_relative("qwen3").config, "has query-key norms"),
        (tiny_relative("mistral").config, "has a sliding window"),
        (llama_with(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}).config, "'dynamic'"),
        (GPT2Config(), "a 'gpt2' model cannot be exported, allowed: llama, mistral, qwen2, qwen3"),
        (MistralConfig(hidden_size=64, num_attention_heads=6, num_key_value_heads=2, head_dim=16), "in groups of 3"),
        (MistralConfig(hidden_size=64, num_attention_heads=6, num_key_value_heads=3, head_dim=16), "without --for "),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_plain_pruning_would_be_in_vain_for_is_known_before_it(config, named):
    with pytest.raises(ValueError, match=named) as caught:
        check_exportable(config)
    assert "\n" not in str(caught.value)


def test_what_plain_pruning_is_good_for():
    for config in (
        tiny_relative("qwen2").config,
        *(llama_with(rope_parameters=dict(of)).config for of in ROPES.values()),
    ):
        for format in ("llama", "gguf"):
            check_exportable(config, format)
    with pytest.raises(ValueError, match="unknown export format 'onnx', allowed: llama, gguf, executorch"):
        check_exportable(tiny_llama("gqa").config, "onnx")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_weights_that_are_not_the_configurations_are_refused_by_name():
    narrowed = narrowed_plainly(tiny_llama("gqa"))
    biased, lacking, adapted, quantised = (copy.deepcopy(narrowed) for _ in range(4))
    biased.model.layers[1].self_attn.q_proj.bias = torch.nn.Parameter(torch.ones(60))
    with pytest.raises(
        ValueError, match=r"layers\.1\.self_attn\.q_proj\.bias is 60, by the configuration it is absent"
    ):
        plain_llama(biased)
    del lacking.model.layers[1]
    with pytest.raises(
        ValueError, match=r"layers\.1\.input_layernorm\.weight is absent, by the configuration it is 48"
    ):
        plain_llama(lacking)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), adapted)
    with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj.* by the configuration it is "):
        plain_llama(adapted)
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(quantised, torchao.Int8WeightOnlyConfig(set_inductor_config=False))
    with pytest.raises(ValueError, match=r"self_attn\.q_proj\.weight is quantised"):
        plain_llama(quantised)


def byte_level_tokenizer():
    """97 tokens of a byte-level BPE."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())[:94]
    vocabulary = {token: index for index, token in enumerate(["<s>", *letters, letters[40] + letters[41]])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [(letters[40], letters[41])]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="<s>")


def test_gguf_holds_the_model(tmp_path):
    pruned = transact.prune(tiny_llama("gqa"), WINDOWS, recipe=PLAIN, ratio=0.3)
    plain = plain_llama(pruned.model)
    write_gguf(tmp_path / "model.gguf", plain, byte_level_tokenizer(), kind="f32")
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    values = {name: field.contents() for name, field in reader.fields.items()}
    config = plain.config
    assert values["llama.attention.key_length"] == values["llama.rope.dimension_count"] == config.head_dim
    assert values["llama.feed_forward_length"] == config.intermediate_size
    assert values["tokenizer.ggml.tokens"][0] == "<s>"
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    assert sum(t.numel() for name, t in tensors.items() if name != "rope_freqs.weight") == plain.num_parameters()
    query = plain.model.layers[1].self_attn.q_proj.weight
    half = config.head_dim // 2
    torch.testing.assert_close(tensors["blk.1.attn_q.weight"][2], query[1])
    torch.testing.assert_close(tensors["blk.1.attn_q.weight"][3], query[half + 1])
    own = config.rope_parameters["rope_theta"] ** (-torch.arange(half) * 2 / config.head_dim)
    torch.testing.assert_close(own / tensors["rope_freqs.weight"], plain.model.rotary_emb.inv_freq)


def test_export_command(tiny_directory, tiny_text, tmp_path, capsys):
    options = ["--calibration", str(tiny_text), "--samples", "16", "--seq-len", "32", "--device", "cpu"]
    source, out = str(tmp_path / "pruned"), str(tmp_path / "plain")
    assert main(["prune", str(tiny_directory), source, "--for", "plain", "--ratio", "0.3", *options]) == 0
    assert main(["export", source, out]) == 0
    assert "zeros added" not in capsys.readouterr().out
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert main(["export", source, out]) == 2
    assert "exists; name another or pass --overwrite" in capsys.readouterr().err
    assert main(["export", source, out, "--overwrite"]) == 0
    assert main(["export", source, source, "--overwrite"]) == 2
    assert "nothing that was exported: it is not replaced" in capsys.readouterr().err
    assert (tmp_path / "pruned" / "pruning" / "plan.safetensors").exists()
    assert main(["export", source, str(tmp_path / "m.gguf"), "--format", "gguf"]) == 2
    assert "byte-level BPE" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "pruned"]
    assert main(["export", str(tiny_directory), str(tmp_path / "new")]) == 2
    assert "type 'llama'" in capsys.readouterr().err
    assert main(["prune", str(tiny_directory), out + "2", "--for", "plain", "--allocation", "uniform", *options]) == 2
    assert "engine 'plain' is planned for by allocation 'searched'" in capsys.readouterr().err
    assert main(["prune", str(tiny_directory), out + "2", "--for", "plain", "--preset", "transact", *options]) == 2
    assert "(preset best), not 'uniform'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"allocation": "global"}, "planned for by allocation 'searched'"),
        ({"rope": "released"}, "rope"),
    ],
)
def test_plain_excludes(changes, named):
    with pytest.raises(ValueError, match=named):
        replace(PLAIN, **changes).check()
    assert Recipe().check() is None
