"""Scores and widths: what the criteria say, and that budgets are met."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

import transact
from tests.tiny import scores_of, tiny_llama
from transact import CRITERIA, Widths, criterion_by_name, fraction_removed, linear_parameters
from transact.plan import _best

SMOLLM2 = LlamaConfig(
    hidden_size=576, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536, num_hidden_layers=30
)
LLAMA2_7B = LlamaConfig(hidden_size=4096, num_attention_heads=32, intermediate_size=11008, num_hidden_layers=32)
STORIES = LlamaConfig(
    hidden_size=64, num_attention_heads=8, num_key_value_heads=4, intermediate_size=172, num_hidden_layers=5
)


@pytest.mark.parametrize("config", [SMOLLM2, LLAMA2_7B, STORIES], ids=["smollm2", "llama2-7b", "stories"])
@settings(max_examples=60, deadline=None)
@given(ratio=st.floats(0, 0.75))
def test_fraction_removed_is_within_half_a_per_cent(config, ratio):
    widths = transact.uniform_widths(config, ratio)
    assert abs(fraction_removed(config, widths) - ratio) <= 0.005
    transact.TransActConfig(**config.to_dict() | {
        "model_type": "transact_llama", "qk_head_dims": [w.qk_head_dim for w in widths],
        "v_head_dims": [w.v_head_dim for w in widths], "intermediate_sizes": [w.mlp for w in widths]})  # fmt: skip


@pytest.mark.parametrize("config", [SMOLLM2, LLAMA2_7B], ids=["smollm2", "llama2-7b"])
@pytest.mark.parametrize("ratio", [0.1, 0.2, 0.3, 0.5])
def test_widths_are_aligned(config, ratio):
    for layer in transact.uniform_widths(config, ratio):
        assert layer.qk_head_dim % 8 == layer.v_head_dim % 8 == layer.mlp % 64 == 0


def test_linear_parameters_are_the_models():
    model = tiny_llama("gqa")
    counted = sum(p.numel() for name, p in model.named_parameters() if "_proj.weight" in name)
    assert linear_parameters(model.config, transact.dense_widths(model.config)) == counted


def test_paper_table():
    """Parameters and KV elements of TransAct-1.3B and of the released default (the paper's figures)."""
    for mha_dim, mlp_dim, total, kv_elements in ((768, 1536, 1.27e9, 49_152), (2048, 3072, 2.54e9, 131_072)):
        widths = transact.widths_by_name(LLAMA2_7B, mha_dim=mha_dim, mlp_dim=mlp_dim)
        parameters = linear_parameters(LLAMA2_7B, widths) + 32 * 2 * 4096 + 4096 + 2 * 32_000 * 4096
        assert parameters == pytest.approx(total, rel=0.005)
        assert transact.kv_elements_per_token(widths) == kv_elements


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 1.5, float("nan")])
def test_ratio_outside_is_refused(ratio):
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\)"):
        transact.uniform_widths(SMOLLM2, ratio)


def test_ratio_beyond_reach_names_what_is_reachable():
    with pytest.raises(ValueError, match=r"0\.999 is out of reach: .* remove 0\.9"):
        transact.uniform_widths(SMOLLM2, 0.999)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"mha_dim": 577}, "multiple of 18"),
        ({"mha_dim": 9}, "multiple of 18"),
        ({"mha_dim": 594}, "up to the model's 576"),
        ({"mlp_dim": 1537}, "between 1 and the model's 1536"),
        ({"mlp_dim": 0}, "between 1 and the model's 1536"),
    ],
)
def test_widths_that_are_none_are_refused(names, message):
    with pytest.raises(ValueError, match=message):
        transact.widths_by_name(SMOLLM2, **names)


def test_best_is_ascending_and_ties_go_to_the_lower_index():
    assert _best(torch.tensor([1.0, 3.0, 2.0, 3.0]), 2).tolist() == [1, 3]
    assert _best(torch.zeros(5), 3).tolist() == [0, 1, 2]


def test_activation_follows_the_definition():
    model = tiny_llama("gqa")
    statistics = transact.calibrate(model, torch.arange(1, 61).view(3, 20))
    layer = statistics.layers[0]
    scores = criterion_by_name("activation").score(model.model.layers[0], 0, layer)
    group = range(3, 6)  # the query heads of key-value head 1
    pair = (sum(layer.query_pairs[head, 5] for head in group) * layer.key_pairs[1, 5]) ** 0.5
    value = sum(layer.attention_output[head, 7] for head in group) ** 0.5
    torch.testing.assert_close(scores.rope_pairs[1, 5], pair)
    torch.testing.assert_close(scores.value_dims[1, 7], value)
    torch.testing.assert_close(scores.mlp_dims[11], layer.mlp[11] ** 0.5)


def test_magnitude_follows_the_definition():
    model = tiny_llama("gqa")
    scores = criterion_by_name("magnitude").score(model.model.layers[1], 1)
    layer = model.model.layers[1]
    q, k = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
    rows = [q[head * 16 + dim] for head in (3, 4, 5) for dim in (5, 13)] + [k[16 + dim] for dim in (5, 13)]
    torch.testing.assert_close(scores.rope_pairs[1, 5], torch.cat(rows).norm())
    mlp = layer.mlp
    own = torch.cat((mlp.gate_proj.weight[4], mlp.up_proj.weight[4], mlp.down_proj.weight[:, 4]))
    torch.testing.assert_close(scores.mlp_dims[4], own.norm())


def test_random_depends_on_its_seed_only():
    model = tiny_llama("gqa")
    first, again, other = (
        criterion_by_name("random", seed=s).score(model.model.layers[1], 1).mlp_dims for s in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize("criterion", CRITERIA)
@pytest.mark.parametrize("variant", ["mha", "gqa", "mqa", "biases"])
def test_prune_keeps_what_scores_highest(criterion, variant):
    model = tiny_llama(variant)
    windows = torch.arange(1, 61).view(3, 20)
    pruned = transact.prune(model, windows, ratio=0.6, recipe=transact.Recipe(criterion=criterion))
    plan = pruned.plan
    assert fraction_removed(pruned.model.config, plan.widths) == pytest.approx(0.6, abs=0.005)
    for scores, kept in zip(scores_of(model, criterion, windows), plan.layers, strict=True):
        for part in ("rope_pairs", "value_dims", "mlp_dims"):
            scored = getattr(scores, part)
            is_kept = torch.zeros_like(scored, dtype=torch.bool).scatter(-1, getattr(kept, part), True)
            least_kept = scored.masked_fill(~is_kept, torch.inf).amin(-1)
            best_dropped = scored.masked_fill(is_kept, -torch.inf).amax(-1)
            assert best_dropped.isfinite().all()
            assert (least_kept >= best_dropped).all()


def test_criterion_names():
    with pytest.raises(
        ValueError, match=r"unknown criterion 'activations', allowed: activation, .*did you mean 'activ"
    ):
        criterion_by_name("activations")
    with pytest.raises(ValueError, match="need windows of text"):
        transact.prune(tiny_llama(), ratio=0.2)


def test_plan_round_trip_and_what_is_missing():
    plan = transact.select(scores_of(tiny_llama(), "random"), [Widths(2, 4, 6, 8)] * 2)
    tensors = plan.tensors()
    assert transact.Plan.from_tensors(tensors).widths == (Widths(2, 4, 6, 8),) * 2
    del tensors["layers.0.mlp_dims"], tensors["layers.1.mlp_dims"]
    with pytest.raises(ValueError, match=r"layers\.0\.mlp_dims is missing"):
        transact.Plan.from_tensors(tensors)
