"""Exported checkpoints compute what the pruned model does; what cannot be exported says why."""

import json
from dataclasses import replace

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import transact
from tests.test_recipes import WINDOWS, logits
from tests.tiny import random_plan, tiny_llama
from transact import PRESETS, Recipe, Widths, fraction_removed, kv_fraction_removed
from transact.__main__ import main
from transact.allocate import plain_widths, removal_losses, shared_pairs
from transact.criteria import LayerScores
from transact.export import plain_llama, write_gguf

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are few:UserWarning")
PLAIN = replace(PRESETS["best"], allocation="plain")


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
    with pytest.raises(ValueError, match=r"of the 39\.\d% of the linear parameters .* prune with --plain"):
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

    (widths, other) = plain_widths(config, scores, 0.3)
    assert widths == other
    assert fraction_removed(config, [widths] * 2) == pytest.approx(0.3, abs=0.0065)
    for head in range(2, 17, 2):  # the cheapest of all head widths, each with the MLP nearest to the budget
        off = {mlp: abs(fraction_removed(config, [Widths(2, head, head, mlp)] * 2) - 0.3) for mlp in range(1, 41)}
        mlp = min(off, key=off.__getitem__)
        assert off[mlp] > 0.0065 or loss(widths.v_head_dim, widths.mlp) <= loss(head, mlp) + 1e-9
    half = plain_widths(config, scores, 0.4, kv_ratio=0.5)
    assert kv_fraction_removed(config, half) >= 0.5
    with pytest.raises(ValueError, match=r"out of reach together with kv-ratio 0\.9"):
        plain_widths(config, scores, 0.1, kv_ratio=0.9)


def test_shared_pairs_are_those_that_cost_least_together():
    rows = torch.tensor([[1.0, 4.0, 9.0], [2.0, 3.0, 7.0]])  # cumulative: own costs 1, 3, 5 and 2, 1, 4
    layer = LayerScores(rope_pairs=rows, value_dims=torch.ones(2, 6), mlp_dims=torch.ones(4))
    shared = shared_pairs([layer])[0].rope_pairs
    torch.testing.assert_close(shared, torch.tensor([[1.5, 3.5, 8.0]] * 2))


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
    assert main(["prune", str(tiny_directory), source, "--plain", "--ratio", "0.3", *options]) == 0
    assert main(["export", source, out]) == 0
    assert "zeros added" not in capsys.readouterr().out
    assert json.loads((tmp_path / "plain" / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    assert main(["export", source, out]) == 2
    assert "exists; name another or pass --overwrite" in capsys.readouterr().err
    assert main(["export", source, out, "--overwrite"]) == 0
    assert main(["export", source, source, "--overwrite"]) == 2
    assert "nothing that was exported: it is not replaced" in capsys.readouterr().err
    assert (tmp_path / "pruned" / "plan.safetensors").exists()
    assert main(["export", source, str(tmp_path / "m.gguf"), "--format", "gguf"]) == 2
    assert "byte-level BPE" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plain", "pruned"]
    assert main(["export", str(tiny_directory), str(tmp_path / "new")]) == 2
    assert "type 'llama'" in capsys.readouterr().err
    assert main(["prune", str(tiny_directory), out + "2", "--plain", "--allocation", "searched", *options]) == 2
    assert "give one of them" in capsys.readouterr().err
    assert main(["prune", str(tiny_directory), out + "2", "--plain", "--preset", "transact", *options]) == 2
    assert "needs a criterion that predicts losses" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"modules": ("mlp",)}, "all modules, in one shot"),
        ({"shots": 2}, "in one shot"),
        ({"rope": "released"}, "rope"),
    ],
)
def test_plain_excludes(changes, named):
    with pytest.raises(ValueError, match=named):
        replace(PLAIN, **changes).check()
    assert Recipe().check() is None
