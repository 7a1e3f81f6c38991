"""Recipes end to end: budgets, compensation, shots, granularity, the released RoPE; and what excludes each other."""

import json
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import transact
from tests.tiny import NARROWING, random_plan, scores_of, tiny_llama, zeroed
from transact import PRESETS, Recipe, fraction_removed, kv_fraction_removed
from transact.allocate import removal_losses, searched_widths, spread, weighed
from transact.compensate import compensate_by_bias, compensate_on_dense_inputs
from transact.least_squares import NormalEquations, _cholesky, fit_projection
from transact.scores import LayerScores
from transact.widths import Widths, alignment, uniform_widths, widths_after_shot, widths_by_name

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are few:UserWarning")
WINDOWS = torch.randint(1, 97, (16, 32), generator=torch.Generator().manual_seed(0))
SMOLLM2 = LlamaConfig(
    hidden_size=576, num_attention_heads=9, num_key_value_heads=3, intermediate_size=1536, num_hidden_layers=30
)


def logits(model, ids=WINDOWS) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits


@pytest.mark.parametrize("variant", ["mha", "gqa", "mqa", "tied", "biases"])
@pytest.mark.parametrize("preset", NARROWING)
def test_presets_meet_the_ratio_and_survive_a_round_trip(preset, variant, tmp_path):
    dense = tiny_llama(variant)
    ratio = 0.3 if variant != "mqa" else 0.15  # one key-value head cannot be dropped
    pruned = transact.prune(dense, WINDOWS, recipe=preset, ratio=ratio)
    assert fraction_removed(dense.config, pruned.plan.widths) == pytest.approx(ratio, abs=0.0055)
    transact.save_checkpoint(tmp_path / "out", pruned.model, pruned.plan, {})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    state = pruned.model.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[name]) for name, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("granularity", ["heads", "both", "dims"])
def test_shots_compose_into_one_plan_of_the_dense_model(granularity):
    dense = tiny_llama("mha")
    recipe = Recipe(granularity=granularity, shots=3)
    pruned = transact.prune(dense, WINDOWS, recipe=recipe, ratio=0.5)
    oracle = zeroed(dense, pruned.plan)
    expected, scale = logits(oracle), logits(oracle).abs().max()
    torch.testing.assert_close(logits(pruned.model) / scale, expected / scale, rtol=1e-5, atol=1e-5)
    assert fraction_removed(dense.config, pruned.plan.widths) == pytest.approx(0.5, abs=0.0055)


def test_shots_of_a_changed_basis_compose_too():
    dense = tiny_llama("gqa")
    recipe = replace(PRESETS["best"], compensation="none", shots=2)
    pruned = transact.prune(dense, WINDOWS, recipe=recipe, ratio=0.4)
    again = transact.apply_plan(dense, pruned.plan)
    scale = logits(again).abs().max()
    torch.testing.assert_close(logits(again) / scale, logits(pruned.model) / scale, rtol=1e-3, atol=1e-3)


def test_heads_of_layers_may_differ_and_generate():
    dense = tiny_llama("mha")
    plan = random_plan(dense.config, seed=5, drop_heads=True)
    assert len({widths.kv_heads for widths in plan.widths}) == 2
    narrowed, oracle = transact.apply_plan(dense, plan), zeroed(dense, plan)
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    assert torch.equal(narrowed.generate(WINDOWS, **options), oracle.generate(WINDOWS, **options))


@pytest.mark.parametrize("module", ["qk", "vo", "mlp"])
def test_each_module_alone(module):
    dense = tiny_llama("gqa")
    whole = transact.dense_widths(dense.config)[0]
    pruned = transact.prune(dense, WINDOWS, recipe=Recipe(modules=(module,)), ratio=0.15)
    changed = {"qk": "qk_head_dim", "vo": "v_head_dim", "mlp": "mlp"}[module]
    for widths in pruned.plan.widths:
        assert replace(widths, **{changed: getattr(whole, changed)}) == whole
    assert fraction_removed(dense.config, pruned.plan.widths) == pytest.approx(0.15, abs=0.0055)


def test_released_is_a_plain_llama_of_the_smaller_head():
    dense = tiny_llama("gqa")
    pruned = transact.prune(dense, WINDOWS, recipe="transact-released", ratio=0.4)
    widths, plan = pruned.plan.widths[0], pruned.plan.layers[0]
    assert plan.rope_pairs is None
    assert torch.equal(
        pruned.model.model.layers[0].self_attn.k_proj.weight,
        dense.model.layers[0].self_attn.k_proj.weight[(torch.arange(2)[:, None] * 16 + plan.value_dims).flatten()],
    )
    plain = LlamaForCausalLM(
        LlamaConfig(**dense.config.to_dict() | {"head_dim": widths.v_head_dim, "intermediate_size": 40})
    ).eval()
    state = {name: value for name, value in pruned.model.state_dict().items() if "rope_pairs" not in name}
    for index, layer in enumerate(plain.model.layers):  # the MLPs of layers differ: give each its own
        layer.mlp = pruned.model.model.layers[index].mlp
    plain.load_state_dict(state)
    torch.testing.assert_close(logits(pruned.model), logits(plain))


def test_released_loads_again_with_its_own_frequencies(tmp_path):
    dense = tiny_llama("gqa")
    pruned = transact.prune(dense, WINDOWS, recipe="transact-released", ratio=0.4)
    transact.save_checkpoint(tmp_path / "out", pruned.model, pruned.plan, {})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    torch.testing.assert_close(logits(loaded), logits(pruned.model))
    assert transact.load_plan(tmp_path / "out").layers[0].rope_pairs is None


def test_searched_widths_meet_both_budgets_and_are_aligned():
    generator = torch.Generator().manual_seed(0)
    scores = [
        LayerScores(
            rope_pairs=torch.rand(3, 32, generator=generator).cumsum(1) * (1 + layer),
            value_dims=torch.rand(3, 64, generator=generator).cumsum(1),
            mlp_dims=torch.rand(1536, generator=generator).cumsum(0) / (1 + layer),
        )
        for layer in range(30)
    ]
    for ratio, kv_ratio in ((0.1, None), (0.3, 0.5), (0.5, 0.2), (0.5, None)):
        widths = searched_widths(SMOLLM2, scores, ratio, kv_ratio=kv_ratio)
        assert fraction_removed(SMOLLM2, widths) == pytest.approx(ratio, abs=0.005)
        assert kv_fraction_removed(SMOLLM2, widths) >= (kv_ratio or 0) - 1e-9
        assert all(w.qk_head_dim % 8 == w.v_head_dim % 8 == w.mlp % 64 == 0 for w in widths)
    only = searched_widths(SMOLLM2, scores, 0.2, modules=("vo", "mlp"))
    assert {w.qk_head_dim for w in only} == {64}


def mlp_scores(*own: list[float]) -> list[LayerScores]:
    """Of layers whose MLP dimensions lose so much each, cheapest first."""
    return [LayerScores(torch.ones(1, 2), torch.ones(1, 4), torch.as_tensor(one).cumsum(0)) for one in own]


def test_mlps_are_spread_as_dimensions_compete_by_standardised_losses(monkeypatch):
    config = LlamaConfig(hidden_size=8, num_attention_heads=2, intermediate_size=4, num_hidden_layers=3)
    even, steep, dear = [1.0, 2.0, 3.0, 4.0], [1.0, 1.0, 1.0, 9.0], [10.0, 20.0, 30.0, 40.0]
    scores = mlp_scores(even, steep, dear)
    # z-scores: -1.34, -0.45, 0.45, 1.34 (even and dear), -0.58, -0.58, -0.58, 1.73
    found = [Widths(2, 4, 2, 2), Widths(2, 4, 4, 2), Widths(2, 4, 4, 4)]
    for share, wanted in ((0.0, [2, 2, 4]), (1.0, [3, 2, 3]), (0.5, [3, 2, 3])):
        monkeypatch.setattr("transact.allocate.SPREAD", share + fraction_removed(config, found))
        widths = spread(config, found, scores)
        assert [one.mlp for one in widths] == wanted
        assert [replace(one, mlp=0) for one in widths] == [replace(one, mlp=0) for one in found]
    fewer = [replace(found[0], mlp=0), *found[1:]]
    monkeypatch.setattr("transact.allocate.SPREAD", 1.0 + fraction_removed(config, fewer))
    assert [one.mlp for one in spread(config, fewer, scores)] == [0, 3, 3]
    assert spread(config, found, scores, engine="plain") == tuple(found)
    assert spread(config, transact.dense_widths(config), scores) == transact.dense_widths(config)


@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.6])
def test_spread_widths_are_aligned_and_as_wide_together(ratio):
    generator = torch.Generator().manual_seed(0)
    scores = mlp_scores(*(torch.rand(1536, generator=generator).sort().values.pow(1 + layer) for layer in range(30)))
    scores = [replace(one, rope_pairs=torch.ones(3, 32), value_dims=torch.ones(3, 64), kv_heads=None) for one in scores]
    found = searched_widths(SMOLLM2, scores, ratio)
    widths = spread(SMOLLM2, found, scores)
    assert sum(one.mlp for one in widths) == sum(one.mlp for one in found)
    assert all(one.mlp % 64 == 0 and one.mlp for one in widths)
    assert (widths == found) == (ratio > 0.5)
    assert fraction_removed(SMOLLM2, widths) == pytest.approx(fraction_removed(SMOLLM2, found))


def test_search_removes_what_costs_least():
    """Two layers, one of them free of charge: it goes first, and the other stays whole."""
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, intermediate_size=192, num_hidden_layers=2)
    cheap, dear = (
        LayerScores(torch.ones(4, 8) * price, torch.ones(4, 16) * price, torch.arange(1.0, 193) * price)
        for price in (1e-9, 1.0)
    )
    widths = searched_widths(config, [cheap, dear], 0.2)
    assert widths[1] == transact.dense_widths(config)[1]
    assert fraction_removed(config, widths) == pytest.approx(0.2, abs=0.015)  # an MLP step is that large


@pytest.mark.parametrize("preset", ["best", "flap", "transact"])
def test_budgets_out_of_reach_are_refused_before_any_forward_pass(preset):
    dense = tiny_llama("gqa")
    dense.model.forward = lambda *_, **__: pytest.fail("the model was run")
    with pytest.raises(ValueError, match=r"ratio 0\.99 is out of reach"):
        transact.prune(dense, WINDOWS, recipe=preset, ratio=0.99)


def test_budgets_that_cannot_be_met_say_what_can():
    dense = tiny_llama("gqa")
    scores = scores_of(dense, "predicted-loss", WINDOWS)
    with pytest.raises(ValueError, match=r"ratio 0\.98 is out of reach: .* remove 0\.\d+ of the linear parameters"):
        searched_widths(dense.config, scores, 0.98)
    with pytest.raises(ValueError, match=r"kv-ratio 0\.95 is out of reach: .* remove 0\.\d+ of the KV bytes"):
        searched_widths(dense.config, scores, 0.5, kv_ratio=0.95)
    with pytest.raises(ValueError, match=r"cannot be met together: .* raise ratio to 0\.\d+ or lower kv-ratio"):
        searched_widths(dense.config, scores, 0.05, kv_ratio=0.8)
    with pytest.raises(ValueError, match=r"out of reach together with kv-ratio 0\.8"):
        uniform_widths(dense.config, 0.05, kv_ratio=0.8)
    with pytest.raises(ValueError, match="out of reach: with heads"):
        uniform_widths(dense.config, 0.95, granularity="heads")
    with pytest.raises(ValueError, match=r"mha-dim must be a multiple of 48 .* up to the model's 96, got 144"):
        widths_by_name(dense.config, mha_dim=144, granularity="heads")


def test_alignment_of_large_and_small_models():
    assert alignment(SMOLLM2) == (8, 64)
    small = LlamaConfig(hidden_size=64, num_attention_heads=8, num_key_value_heads=4, intermediate_size=172)
    assert alignment(small) == (1, 4)


def test_removal_losses_add_over_heads():
    scores = torch.tensor([[1.0, 3, 2], [10, 30, 20]])
    assert removal_losses(scores).tolist() == [33, 22, 11, 0]


def test_widths_of_shots_reach_their_target():
    current, target = Widths(4, 16, 16, 40), Widths(4, 6, 5, 7)
    for shots_left in (3, 2, 1):
        current = widths_after_shot(current, target, shots_left)
        assert current.qk_head_dim % 2 == 0
    assert current == target


def normal(rows: torch.Tensor, targets: torch.Tensor) -> NormalEquations:
    equations = NormalEquations.empty(rows.shape[1], targets.shape[1], rows.device)
    equations.add(rows, targets, torch.ones(len(rows), 1))
    return equations


def test_fit_finds_the_map_and_its_intercept():
    generator = torch.Generator().manual_seed(0)
    rows, true = torch.randn(400, 6, generator=generator) + 2, torch.randn(3, 6, generator=generator)
    targets = rows @ true.T + 5
    fit = fit_projection(torch.zeros(3, 6), normal(rows[:300], targets[:300]), normal(rows[300:], targets[300:]),
                         bias=True, ridge=1e-8)  # fmt: skip
    torch.testing.assert_close(fit.weight.float(), true, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(fit.bias.float(), torch.full((3,), 5.0), rtol=1e-3, atol=1e-3)


def test_fit_falls_back_where_the_held_out_error_rises():
    generator = torch.Generator().manual_seed(0)
    rows, prior = torch.randn(200, 6, generator=generator), torch.randn(3, 6, generator=generator)
    misleading = rows @ torch.randn(6, 3, generator=generator)
    fit = fit_projection(prior, normal(rows, misleading), normal(rows, rows @ prior.T))
    assert fit.ridge is None
    assert torch.equal(fit.weight, prior.double())
    nothing = NormalEquations.empty(6, 3, rows.device)
    assert fit_projection(prior, normal(rows, misleading), nothing).ridge is None
    forced = fit_projection(prior, normal(rows, misleading), normal(rows, rows @ prior.T), ridge=0.5)
    assert forced.ridge == 0.5
    assert not torch.equal(forced.weight, prior.double())


def test_a_fixed_ridge_is_taken_everywhere():
    model = tiny_llama("gqa")
    windows = torch.randint(0, 97, (8, 32), generator=torch.Generator().manual_seed(0))
    for compensation in ("dense", "pruned"):
        pruned = transact.prune(model, windows, recipe=Recipe(compensation=compensation, ridge=0.3), ratio=0.3)
        assert {ridge for layer in pruned.ridges for ridge in layer.values()} == {0.3}
    with pytest.raises(ValueError, match="least squares: dense, pruned or linear, not none"):
        Recipe(ridge=0.3).check()
    with pytest.raises(ValueError, match="must be positive, got 0"):
        Recipe(compensation="dense", ridge=0.0).check()


def test_one_layer_loses_a_ratio_of_its_own_parameters():
    config = tiny_llama("gqa").config
    widths = transact.widths_of_one_layer(config, 1, 0.5)
    dense = transact.dense_widths(config)
    assert [index for index, pair in enumerate(zip(widths, dense, strict=True)) if pair[0] != pair[1]] == [1]
    assert transact.fraction_removed(config, widths) == pytest.approx(0.5 / config.num_hidden_layers, abs=0.01)
    with pytest.raises(ValueError, match="layer must lie between 0 and"):
        transact.widths_of_one_layer(config, config.num_hidden_layers, 0.5)


@pytest.mark.parametrize("compensation", ["dense", "pruned"])
def test_least_squares_make_up_for_what_is_redundant(compensation):
    """Half of an MLP repeats the other half: dropping it costs nothing once down_proj is refitted."""
    dense = tiny_llama("gqa")
    with torch.no_grad():
        for layer in dense.model.layers:
            layer.mlp.gate_proj.weight[20:] = layer.mlp.gate_proj.weight[:20]
            layer.mlp.up_proj.weight[20:] = layer.mlp.up_proj.weight[:20] * 0.5
    recipe = Recipe(criterion="obs", modules=("mlp",), compensation=compensation)
    named = widths_by_name(dense.config, mlp_dim=20)
    expected, scale = logits(dense), logits(dense).abs().max()
    off = {}
    for name, one in (("none", replace(recipe, compensation="none")), (compensation, recipe)):
        model = transact.prune(dense, WINDOWS, recipe=one, widths=named).model
        off[name] = ((logits(model) - expected) / scale).abs().max().item()
    assert off[compensation] < 0.02 < off["none"]


def test_dense_fit_is_the_closed_form():
    dense = tiny_llama("gqa")
    statistics = transact.calibrate(dense, WINDOWS, second_moments=True)
    plan = random_plan(dense.config, seed=1)
    narrowed = transact.apply_plan(dense, plan)
    ridges = compensate_on_dense_inputs(narrowed, dense, plan, statistics.layers)
    index, ridge = next((i, one["down_proj"]) for i, one in enumerate(ridges) if one["down_proj"] is not None)
    kept = plan.layers[index].mlp_dims
    fitted, held_out = statistics.layers[index].mlp_moments
    moments = (fitted.products + held_out.products).double() / (fitted.tokens + held_out.tokens)
    old = dense.model.layers[index].mlp.down_proj.weight.double()
    inside = moments[kept][:, kept]
    system = inside + torch.diag(ridge * inside.diagonal())
    expected = old[:, kept] + torch.linalg.solve(system, moments[kept] @ old.T - inside @ old[:, kept].T).T
    actual = narrowed.model.layers[index].mlp.down_proj.weight.double()
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)


def test_bias_gives_the_mean_of_what_was_dropped():
    dense = tiny_llama("gqa")
    statistics = transact.calibrate(dense, WINDOWS)
    plan = random_plan(dense.config, seed=2)
    narrowed = transact.apply_plan(dense, plan)
    compensate_by_bias(narrowed, dense, plan, statistics.layers)
    stats, kept = statistics.layers[1], plan.layers[1].mlp_dims
    dropped = [dim for dim in range(40) if dim not in kept.tolist()]
    mean = stats.mlp_sum / stats.tokens
    expected = dense.model.layers[1].mlp.down_proj.weight[:, dropped].double() @ mean[dropped]
    torch.testing.assert_close(narrowed.model.layers[1].mlp.down_proj.bias.double(), expected, rtol=1e-4, atol=1e-4)
    assert narrowed.config.mlp_output_bias
    assert narrowed.config.attention_output_bias


def test_few_tokens_warn_once_with_the_number_that_would_do():
    with pytest.warns(UserWarning, match=r"64 calibration tokens are few .* \d+ would do") as caught:
        transact.prune(tiny_llama(), WINDOWS[:2], recipe="best", ratio=0.3)
    assert len(caught) == 1


def test_block_by_block_prunes_as_the_whole_model_does():
    dense = tiny_llama("gqa")
    recipe = replace(PRESETS["best"], allocation="uniform")
    whole = transact.prune(dense, WINDOWS, recipe=recipe, ratio=0.3)
    blocks = transact.prune(dense, WINDOWS, recipe=recipe, ratio=0.3, device=torch.device("cpu"))
    scale = logits(whole.model).abs().max()
    torch.testing.assert_close(logits(blocks.model) / scale, logits(whole.model) / scale, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"criterion": "activity"}, "did you mean 'activation'"),
        ({"allocation": "searched"}, "needs a criterion that predicts losses: predicted-loss"),
        ({"allocation": "searched", "criterion": "predicted-loss", "granularity": "heads"}, "granularity must be dims"),
        ({"allocation": "global"}, "granularity must be heads"),
        ({"allocation": "global", "granularity": "heads"}, "its criterion is fluctuation"),
        ({"rope": "released", "modules": ("vo", "mlp")}, "the same width"),
        ({"rope": "released", "criterion": "predicted-loss"}, "changes their basis"),
        ({"rope": "rotten"}, "unknown rope 'rotten', allowed: pairs, released"),
        ({"compensation": "money"}, "allowed: none, bias, dense, pruned"),
        ({"shots": 0}, "shots must be at least 1, got 0"),
        ({"modules": ("mlp", "norm")}, "must name some of qk, vo, mlp"),
        ({"modules": ("qk",), "granularity": "heads"}, "qk and vo together"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(changes, named):
    with pytest.raises(ValueError, match=named):
        transact.prune(tiny_llama(), WINDOWS, recipe=Recipe(**changes))


def test_recipes_are_plain_data():
    assert json.loads(json.dumps(vars(PRESETS["best"])))["criterion"] == "predicted-loss"
    with pytest.raises(ValueError, match=r"unknown preset 'bets', allowed: best, .*did you mean 'best'"):
        transact.recipe_by_name("bets")


def test_moments_that_rounding_made_indefinite_are_factored():
    """Sums in float32 of dimensions that go together leave eigenvalues below zero, as large as the rounding."""
    direction = torch.arange(1.0, 9.0, dtype=torch.float64)
    moments = torch.outer(direction, direction)
    moments[0, 0] -= 3e-6 * 64
    with pytest.raises(torch.linalg.LinAlgError):
        torch.linalg.cholesky(moments)
    root = _cholesky(moments)
    torch.testing.assert_close(root @ root.T, moments, rtol=0, atol=1e-5 * 64 * 1.01)


def test_the_fewer_tokens_the_more_attention_counts(monkeypatch):
    dense = tiny_llama(layers=4)
    recipe = Recipe(criterion="predicted-loss", allocation="searched")
    scored = recipe.scored(WINDOWS, dense.config)
    scores = scores_of(dense, "predicted-loss", scored)
    width, seen = dense.config.intermediate_size, []
    for tokens, times in ((width, 5.0), (4 * width, 2.0), (400 * width, 1.01)):
        for layer, before in zip(weighed(dense.config, scores, tokens), scores, strict=True):
            torch.testing.assert_close(layer.rope_pairs, times * before.rope_pairs)
            torch.testing.assert_close(layer.value_dims, times * before.value_dims)
            torch.testing.assert_close(layer.attention, times * before.attention)
            assert layer.mlp_dims is before.mlp_dims or torch.equal(layer.mlp_dims, before.mlp_dims)
    for weight in (40.0, 0.0):
        monkeypatch.setattr("transact.allocate.ATTENTION", weight)
        widths = transact.prune(dense, WINDOWS, recipe=recipe, ratio=0.2).plan.widths
        heavy = weighed(dense.config, scores, scored.numel())
        assert widths == spread(dense.config, searched_widths(dense.config, heavy, 0.2), heavy)
        seen.append(transact.kv_fraction_removed(dense.config, widths))
    assert seen[0] < seen[1]
