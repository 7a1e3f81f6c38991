"""Families in unusual configurations: keeping everything is the dense model bit for bit, or it is refused by name."""

import copy
import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    LlamaModel,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import bench.__main__
import transact
from bench.efficiency.costs import memory_needed, weight_elements
from tests.tiny import NARROWING, random_plan, tiny_llama, zeroed
from transact.__main__ import main
from transact.export import plain_llama

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are few:UserWarning")
IDS = torch.randint(1, 97, (2, 40), generator=torch.Generator().manual_seed(1))
WINDOWS = torch.randint(1, 97, (16, 24), generator=torch.Generator().manual_seed(3))
KINDS = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
SIZES = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": False, "pad_token_id": 0,
}  # fmt: skip
LONGROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
    "short_factor": [1.0 + 0.1 * i for i in range(8)], "long_factor": [1.0 + i for i in range(8)],
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}
WINDOW = {"use_sliding_window": True, "sliding_window": 8}
ODD = {
    "usual": (tuple(KINDS), {}),
    "a window for layers that are not there": (("qwen2", "qwen3"), WINDOW),
    "a window in every layer": (("qwen2", "qwen3"), WINDOW | {"max_window_layers": 0}),
    "a window that is not used": (("qwen2", "qwen3"), {"use_sliding_window": False, "sliding_window": 8}),
    "layer types without a window": (("qwen2", "qwen3"), WINDOW | {"layer_types": ["full_attention"] * 2}),
    "window": (("mistral",), {"sliding_window": 8}),
    "no window": (("mistral",), {"sliding_window": None}),
    "layer types that Mistral ignores": (("mistral",), {"sliding_window": 8, "layer_types": ["full_attention"] * 2}),
    "a window that Llama ignores": (("llama",), {"sliding_window": 8, "layer_types": ["sliding_attention"] * 2}),
    "fields of a pruned model": (("llama", "mistral"), {"query_key_norm": True, "kv_head_counts": [1, 1]}),
    "biases": (("llama", "qwen3"), {"attention_bias": True}),
    "biases of MLPs": (("llama",), {"mlp_bias": True}),
    "biases that are not there": (("mistral", "qwen2", "qwen3"), {"mlp_bias": True, "mlp_output_bias": True}),
    "biases that Mistral ignores": (("mistral",), {"attention_bias": True, "attention_output_bias": True}),
    "biases that Qwen2 does not ask about": (("qwen2",), {"attention_bias": False, "attention_output_bias": True}),
    "heads that do not divide": (("mistral", "qwen2", "qwen3"), {"num_attention_heads": 6, "head_dim": 16}),
    "heads whose width is not said": (("mistral",), {"num_attention_heads": 6}),
    "wide heads": (tuple(KINDS), {"head_dim": 32}),
    "narrow heads": (tuple(KINDS), {"head_dim": 6}),
    "one head": (tuple(KINDS), {"num_attention_heads": 1, "num_key_value_heads": 1}),
    "key-value heads that are not said": (("llama",), {"num_key_value_heads": None}),
    "one layer": (tuple(KINDS), {"num_hidden_layers": 1}),
    "tied": (tuple(KINDS), {"tie_word_embeddings": True}),
    "yarn": (tuple(KINDS), {"rope_parameters": YARN}),
    "longrope": (("llama", "qwen2"), {"rope_parameters": LONGROPE}),
    "dynamic": (("llama", "mistral"), {"rope_parameters": {
        "rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}),
    "linear": (("llama", "qwen3"), {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}}),
    "another base": (tuple(KINDS), {"rope_parameters": {"rope_type": "default", "rope_theta": 77.0}}),
    "another activation": (tuple(KINDS), {"hidden_act": "gelu"}),
    "a large epsilon": (tuple(KINDS), {"rms_norm_eps": 0.1}),
    "eager": (("mistral", "qwen2"), WINDOW | {"attn_implementation": "eager", "max_window_layers": 0}),
    "bfloat16": (tuple(KINDS), {"dtype": torch.bfloat16}),
    "float16": (("llama", "qwen3"), {"dtype": torch.float16}),
}  # fmt: skip
CASES = [(family, odd) for odd, (families, _) in ODD.items() for family in families]


@torch.no_grad()
def odd_model(family: str, **settings) -> torch.nn.Module:
    torch.manual_seed(0)
    config_class, model_class = KINDS[family]
    dtype = settings.pop("dtype", torch.float32)
    if family == "qwen3":
        settings = {"head_dim": 16} | settings
    model = model_class(config_class(**SIZES | settings)).eval()
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.add_(torch.randn_like(parameter) * 0.2)
        else:
            parameter.mul_(8)
    return model.to(dtype)


def logits(model, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **inputs).logits


def assert_whole(model, dense):
    assert torch.equal(logits(model), logits(dense))
    mask = torch.ones_like(IDS)
    mask[1, :9] = 0
    assert torch.equal(logits(model, attention_mask=mask), logits(dense, attention_mask=mask))
    # stock Llama's caches go by layer types that its layers ignore
    cached = dense.config.model_type != "llama" or getattr(dense.config, "layer_types", None) is None
    options = {"do_sample": False, "max_new_tokens": 4, "eos_token_id": None, "use_cache": cached}
    assert torch.equal(model.generate(IDS, **options), dense.generate(IDS, **options))


@pytest.mark.parametrize(("family", "odd"), CASES)
def test_keeping_everything_is_the_dense_model_bit_for_bit(family, odd, tmp_path):
    dense = odd_model(family, **copy.deepcopy(ODD[odd][1]))
    before = dense.config.to_dict()
    pruned = transact.prune(dense, WINDOWS, ratio=0.0)
    assert_whole(pruned.model, dense)
    assert dense.config.to_dict() == before
    transact.save_checkpoint(tmp_path / "out", pruned.model, pruned.plan, {})
    dense.save_pretrained(tmp_path / "dense")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    again = type(dense).from_pretrained(tmp_path / "dense")
    # copies, since weights mapped from files lie unaligned and kernels then round otherwise
    assert_whole(copy.deepcopy(loaded), copy.deepcopy(again))


@pytest.mark.parametrize(("family", "odd"), CASES)
def test_what_is_cut_away_is_zeroed(family, odd):
    dense = odd_model(family, **copy.deepcopy(ODD[odd][1]))
    if dense.dtype != torch.float32:
        pytest.skip("sums of other lengths round otherwise")
    transact.check_prunable(dense)
    plan = random_plan(dense.config, drop_heads=True)
    actual, expected = logits(transact.apply_plan(dense, plan)), logits(zeroed(dense, plan))
    scale = expected.abs().max()
    torch.testing.assert_close(actual / scale, expected / scale, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("family", "odd"), CASES)
def test_memory_is_what_the_parameters_need(family, odd):
    model = odd_model(family, **copy.deepcopy(ODD[odd][1]))
    assert memory_needed(model.config, context=0, batch=1, element_size=2) == 2 * model.num_parameters()
    embeddings = 0 if model.config.tie_word_embeddings else model.model.embed_tokens.weight.numel()
    assert weight_elements(model.config, transact.widths_of(model.config)) == model.num_parameters() - embeddings
    narrowed = transact.apply_plan(model, random_plan(model.config, drop_heads=True))
    assert memory_needed(narrowed.config, context=0, batch=1, element_size=2) == 2 * narrowed.num_parameters()


def test_memory_counts_biases_of_compensation():
    pruned = transact.prune(tiny_llama(), WINDOWS, recipe="flap", ratio=0.3).model
    assert memory_needed(pruned.config, context=0, batch=1, element_size=4) == 4 * pruned.num_parameters()


@pytest.mark.parametrize("preset", NARROWING)
def test_every_preset_keeps_everything_at_ratio_0(preset):
    dense = tiny_llama()
    for wanted in ({"ratio": 0.0}, {"widths": list(transact.dense_widths(dense.config))}):
        pruned = transact.prune(dense, WINDOWS, recipe=preset, **wanted)
        assert torch.equal(logits(pruned.model), logits(dense))
        assert transact.fraction_removed(dense.config, pruned.plan.widths) == 0


@pytest.mark.parametrize("family", KINDS)
def test_layers_that_see_different_windows_are_refused_before_work(family):
    refused = {
        "qwen2": [{"max_window_layers": 1}, {"layer_types": ["sliding_attention", "full_attention"]}],
        "qwen3": [{"max_window_layers": 1}],
    }
    for settings in refused.get(family, []):
        with pytest.raises(ValueError, match="layers of full_attention and sliding_attention is not supported"):
            transact.prune(odd_model(family, **WINDOW | settings), WINDOWS)


def test_what_is_of_other_weights_than_its_family_is_refused_by_name():
    config = tiny_llama().config
    for model, named in (
        (LlamaForSequenceClassification(config), r"lm_head\.weight is missing"),
        (LlamaModel(config), r"embed_tokens\.weight is \(97, 48\), .* has it not at all"),
        (torch.compile(tiny_llama(), backend="eager"), r"_orig_mod\.lm_head\.weight"),
        (torch.nn.DataParallel(tiny_llama()), "DataParallel"),
    ):
        with pytest.raises(ValueError, match=named):
            transact.prune(model, WINDOWS)
    edited = tiny_llama()
    edited.model.layers[1].self_attn.q_proj.bias = torch.nn.Parameter(torch.ones(96))
    with pytest.raises(ValueError, match=r"layers\.1\.self_attn\.q_proj\.bias is \(96,\), .* has it not at all"):
        transact.prune(edited, WINDOWS)
    edited = tiny_llama()
    edited.model.layers[0].mlp.up_proj = torch.nn.Linear(48, 39, bias=False)
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.up_proj\.weight is \(39, 48\), .* has it \(40, 48\)"):
        transact.prune(edited, WINDOWS)


# Checkpoints on disk


@pytest.fixture
def checkpoint(tiny_directory, tmp_path) -> Path:
    shutil.copytree(tiny_directory, tmp_path / "model")
    return tmp_path / "model"


def edit_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(directory: Path, **changes: torch.Tensor | None) -> None:
    path = directory / "model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(path).items()} | changes
    save_file({name: tensor for name, tensor in weights.items() if tensor is not None}, path, {"format": "pt"})


def prune_command(directory: Path, out: Path, text: Path, *options: str) -> int:
    shared = ("--calibration", str(text), "--samples", "16", "--seq-len", "32", "--device", "cpu")
    return main(["prune", str(directory), str(out), *shared, *options])


def test_a_head_of_its_own_stays_whatever_the_configuration_says(checkpoint, tiny_text, tmp_path):
    edit_config(checkpoint, tie_word_embeddings=True)
    dense = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert dense.lm_head.weight is not dense.model.embed_tokens.weight
    assert_whole(transact.prune(dense, ratio=0.0, recipe="wanda-sp", windows=WINDOWS).model, dense)
    assert dense.config.tie_word_embeddings  # the user's own stays as it was
    assert transact.load_model(checkpoint, device="cpu")[0].config.tie_word_embeddings is False
    assert prune_command(checkpoint, tmp_path / "out", tiny_text, "--ratio", "0") == 0
    loaded = copy.deepcopy(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert_whole(loaded, copy.deepcopy(dense))
    edit_config(tmp_path / "out", tie_word_embeddings=True)  # as earlier versions wrote it
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "plain")]) == 0
    plain = copy.deepcopy(AutoModelForCausalLM.from_pretrained(tmp_path / "plain"))
    assert torch.equal(plain.lm_head.weight, dense.lm_head.weight)
    torch.testing.assert_close(logits(plain), logits(dense))
    narrowed = AutoModelForCausalLM.from_pretrained(tmp_path / "out")  # not by load_model: the flag is still wrong
    assert torch.equal(plain_llama(narrowed).lm_head.weight, dense.lm_head.weight)
    training = transact.Training(tokens=96, way="full", batch=2, learning_rate=1e-9)
    recovered = transact.recover(narrowed, WINDOWS, training, checkpoints=tmp_path / "checkpoints").model
    torch.testing.assert_close(recovered.lm_head.weight, dense.lm_head.weight)


def test_a_head_that_is_the_embedding_stays_so(tmp_path):
    dense = tiny_llama()
    dense.lm_head.weight = dense.model.embed_tokens.weight
    pruned = transact.prune(dense, WINDOWS, ratio=0.0)
    assert_whole(pruned.model, dense)
    assert pruned.model.num_parameters() == dense.num_parameters()
    transact.save_checkpoint(tmp_path / "out", pruned.model, pruned.plan, {})
    assert_whole(copy.deepcopy(AutoModelForCausalLM.from_pretrained(tmp_path / "out")), dense)


@pytest.mark.parametrize(
    ("weights", "named"),
    [
        ({"model.layers.0.self_attn.q_proj.bias": torch.ones(96)}, r"q_proj\.bias is unexpected"),
        ({"model.layers.1.mlp.down_proj.bias": torch.ones(48)}, r"down_proj\.bias is unexpected"),
        ({"model.layers.2.mlp.up_proj.weight": torch.ones(40, 48)}, r"layers\.2\.mlp\.up_proj\.weight is unexpected"),
        ({"model.layers.1.self_attn.q_norm.weight": torch.ones(16)}, r"q_norm\.weight is unexpected"),
        ({"v_head.weight": torch.ones(1, 48)}, r"v_head\.weight is unexpected.* \(1 such weight\)"),
        ({"model.layers.1.mlp.up_proj.weight": None}, r"layers\.1\.mlp\.up_proj\.weight is missing"),
        ({"lm_head.weight": None}, r"lm_head\.weight is missing"),
        ({"model.norm.weight": torch.ones(47)}, r"model\.norm\.weight is of the wrong shape"),
    ],
)
def test_weights_that_the_configuration_does_not_speak_of_are_refused(weights, named, checkpoint, tmp_path, capsys):
    edit_weights(checkpoint, **weights)
    with pytest.raises(ValueError, match=named):
        transact.load_model(checkpoint)
    capsys.readouterr()
    assert main(["prune", str(checkpoint), str(tmp_path / "out")]) == 2
    assert capsys.readouterr().err.startswith("transact: error: model ")


def test_weights_that_transformers_knows_to_leave_out_are_no_matter(checkpoint):
    expected = logits(transact.load_model(checkpoint, device="cpu")[0])
    edit_weights(checkpoint, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)})
    assert torch.equal(logits(transact.load_model(checkpoint, device="cpu")[0]), expected)
    weights = load_file(checkpoint / "model.safetensors")
    edit_config(checkpoint, tie_word_embeddings=True)  # both are there, the same
    edit_weights(checkpoint, **{"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    both = transact.load_model(checkpoint, device="cpu")[0]
    assert both.config.tie_word_embeddings
    for left_out in ("lm_head.weight", "model.embed_tokens.weight"):  # transformers ties either to the other
        edit_weights(checkpoint, **weights | {"lm_head.weight": weights["model.embed_tokens.weight"], left_out: None})
        assert torch.equal(logits(transact.load_model(checkpoint, device="cpu")[0]), logits(both))


def saved_with_tokenizer(model, directory: Path, tiny_directory: Path) -> Path:
    model.save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_directory / name, directory)
    return directory


@pytest.mark.parametrize(
    ("family", "settings", "named"),
    [
        ("llama", ODD["dynamic"][1], "RoPE type 'dynamic' cannot be stated"),
        ("mistral", {"sliding_window": 8}, "has a sliding window"),
        ("qwen2", WINDOW | {"max_window_layers": 0}, "has a sliding window"),
        ("qwen2", WINDOW | {"max_window_layers": 1}, "layers of full_attention and sliding_attention"),
        ("qwen3", {}, "has query-key norms"),
        ("mistral", {"num_attention_heads": 6, "head_dim": 16}, "a plain Llama's heads divide its hidden size"),
    ],
)
def test_plain_pruning_is_refused_before_work_where_no_export_follows(
    family, settings, named, tiny_directory, tiny_text, tmp_path, capsys, monkeypatch
):
    model = odd_model(family, **copy.deepcopy(settings))
    directory = saved_with_tokenizer(model, tmp_path / "model", tiny_directory)
    monkeypatch.setattr("transact.commands.prune.load_model", None)  # nothing is loaded yet
    capsys.readouterr()
    assert prune_command(directory, tmp_path / "out", tiny_text, "--for", "plain") == 2
    assert re.match(f"transact: error: .*({named})", capsys.readouterr().err)
    assert not (tmp_path / "out").exists()


def test_what_plain_pruning_accepts_is_exported(tiny_directory, tiny_text, tmp_path):
    assert prune_command(tiny_directory, tmp_path / "out", tiny_text, "--for", "plain", "--ratio", "0.4") == 0
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "plain")]) == 0
    # an export of ours has RoPE of type longrope
    assert prune_command(tmp_path / "plain", tmp_path / "again", tiny_text, "--for", "plain") == 0
    assert main(["export", str(tmp_path / "again"), str(tmp_path / "twice")]) == 0
    plain = transact.Recipe(criterion="predicted-loss", allocation="searched", engine="plain", compensation="pruned")
    for family, settings in (
        ("qwen2", WINDOW), ("llama", WINDOW), ("llama", {"rope_parameters": YARN}),
        ("qwen2", {"rope_parameters": LONGROPE}),
    ):  # fmt: skip
        pruned = transact.prune(odd_model(family, **copy.deepcopy(settings)), WINDOWS, recipe=plain, ratio=0.4).model
        scale = logits(pruned).abs().max()
        torch.testing.assert_close(logits(plain_llama(pruned)) / scale, logits(pruned) / scale, rtol=1e-5, atol=1e-5)


CHAT = {"temperature": 0.6, "top_p": 0.9, "pad_token_id": 0, "max_length": 99}  # as Llama 2's: no do_sample


def chat_settings(model) -> dict:
    return {name: getattr(model.generation_config, name) for name in CHAT}


def test_generation_settings_are_saved_as_they_were_loaded(checkpoint, tiny_text, tmp_path):
    (checkpoint / "generation_config.json").write_text(json.dumps(CHAT))
    assert prune_command(checkpoint, tmp_path / "out", tiny_text, "--for", "plain", "--ratio", "0.3") == 0
    options = ["--text", str(tiny_text), "--tokens", "512", "--train-seq-len", "32", "--device", "cpu"]
    assert main(["recover", str(tmp_path / "out"), str(tmp_path / "trained"), *options]) == 0
    assert main(["export", str(tmp_path / "trained"), str(tmp_path / "plain")]) == 0
    for name in ("out", "trained", "plain"):
        saved = json.loads((tmp_path / name / "generation_config.json").read_text())
        assert {key: saved.get(key) for key in CHAT} == CHAT


def test_generation_settings_edited_in_memory_are_saved(tmp_path):
    dense = tiny_llama()
    dense.generation_config = GenerationConfig(**CHAT)
    pruned = transact.prune(dense, WINDOWS, recipe="transact", ratio=0.3)
    pruned.model.generation_config.top_k = 7
    training = transact.Training(tokens=96, way="full", batch=2)
    recovered = transact.recover(pruned.model, WINDOWS, training, checkpoints=tmp_path / "checkpoints").model
    assert chat_settings(recovered) == CHAT
    transact.save_checkpoint(tmp_path / "out", recovered, pruned.plan, {})
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert {key: saved.get(key) for key in CHAT} == CHAT
    assert saved["top_k"] == 7
    assert chat_settings(recovered) == CHAT
    recovered.generation_config = None
    transact.save_checkpoint(tmp_path / "without", recovered, pruned.plan, {})
    transact.load_plan(tmp_path / "without")


def test_a_tokeniser_longer_than_the_vocabulary_is_refused_before_work(tiny_directory, tmp_path, capsys):
    dense = str(tiny_directory)
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(120)} | {"[unk]": 120}, unk_token="[unk]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[unk]", eos_token="w1")
    tokenizer.save_pretrained(tmp_path / "model")
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{i % 120}" for i in range(4000)))
    model, options = str(tmp_path / "model"), ["--text", str(text), "--seq-len", "32", "--device", "cpu"]
    for command in (
        lambda: bench.__main__.main(["perplexity", model, *options]),
        lambda: bench.__main__.main(["perplexity", model, *options, "--windowing", "rolling"]),
        *([lambda: bench.__main__.main(["quantise", model, *options, "--formats", "int8"]),
           lambda: bench.__main__.main(["quantise", model, *options, "--formats", "int8", "--dense", dense])]
          if importlib.util.find_spec("torchao") else []),
        lambda: prune_command(Path(model), tmp_path / "out", text),
        lambda: main(["prune", model, str(tmp_path / "out"), "--criterion", "magnitude", "--ratio", "0.3", "--tokens",
                      "2k", "--train-seq-len", "32", "--text", str(text)]),
    ):  # fmt: skip
        assert command() == 2
        printed = capsys.readouterr()
        assert "vocabulary has 97" in printed.err.splitlines()[-1]
        assert printed.out == ""
    assert not (tmp_path / "out").exists()
