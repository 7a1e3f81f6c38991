"""Llama's relatives: each narrowed model equals its dense one with the dropped dimensions zeroed."""

import pytest
import torch
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM

import transact
from tests.tiny import FAMILIES, NARROWING, random_plan, scores_of, tiny_relative, zeroed
from transact.widths import dense_widths

IDS = torch.randint(1, 97, (2, 24), generator=torch.Generator().manual_seed(1))


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def assert_same(actual: torch.Tensor, expected: torch.Tensor):
    scale = expected.abs().max()
    torch.testing.assert_close(actual / scale, expected / scale, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_equals_the_zeroed_dense_model(family, attention):
    dense = tiny_relative(family)
    dense.set_attn_implementation(attention)
    transact.check_prunable(dense)
    plan = random_plan(dense.config, drop_heads=True)
    narrowed, oracle = transact.apply_plan(dense, plan), zeroed(dense, plan)
    assert narrowed.num_parameters() < dense.num_parameters()
    assert_same(logits(narrowed), logits(oracle))


@pytest.mark.parametrize("family", FAMILIES)
def test_generates_and_survives_a_round_trip(family, tmp_path):
    dense = tiny_relative(family)
    plan = random_plan(dense.config)
    narrowed, oracle = transact.apply_plan(dense, plan), zeroed(dense, plan)
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None}
    expected = oracle.generate(IDS, **options)
    assert torch.equal(narrowed.generate(IDS, **options), expected)
    assert torch.equal(narrowed.generate(IDS, **options, use_cache=False), expected)
    transact.save_checkpoint(tmp_path / "out", narrowed, plan, {})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    state = narrowed.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())
    assert torch.equal(loaded.generate(IDS, **options), expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_everything_changes_nothing(family):
    dense = tiny_relative(family)
    everything = transact.select(scores_of(dense, "random"), dense_widths(dense.config))
    assert_same(logits(transact.apply_plan(dense, everything)), logits(dense))


@pytest.mark.parametrize("preset", NARROWING)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.filterwarnings("ignore:.*calibration tokens are few:UserWarning")
def test_every_preset_prunes_every_family(family, preset):
    dense = tiny_relative(family)
    windows = torch.randint(1, 97, (8, 20), generator=torch.Generator().manual_seed(2))
    if family == "qwen3" and preset == "transact-released":
        with pytest.raises(ValueError, match="normalised head by head"):
            transact.prune(dense, windows, recipe=preset, ratio=0.3)
        return
    pruned = transact.prune(dense, windows, recipe=preset, ratio=0.3)
    assert transact.fraction_removed(dense.config, pruned.plan.widths) == pytest.approx(0.3, abs=0.006)
    assert logits(pruned.model).isfinite().all()


def test_query_key_norms_keep_their_pairs():
    dense = tiny_relative("qwen3")
    plan = transact.select(scores_of(dense, "random"), [transact.Widths(2, 8, 8, 20)] * 2)
    with pytest.raises(ValueError, match="must be kept whole"):
        transact.apply_plan(dense, plan)


def test_what_is_not_supported_says_so():
    with pytest.raises(ValueError, match=r"'gpt2' model cannot be pruned, allowed: llama, mistral, qwen2, qwen3"):
        transact.check_prunable(GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9)))
    sliding = Qwen2Config(
        vocab_size=97, hidden_size=64, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, use_sliding_window=True, sliding_window=8, max_window_layers=1,
    )  # fmt: skip
    with pytest.raises(ValueError, match="'qwen2' with layers of full_attention and sliding_attention is not"):
        transact.check_prunable(Qwen2ForCausalLM(sliding))
    quantised = tiny_relative("mistral")
    weight = quantised.model.layers[1].mlp.up_proj.weight
    quantised.model.layers[1].mlp.up_proj.weight = torch.nn.Parameter(weight.to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"up_proj\.weight is quantised"):
        transact.check_prunable(quantised)
