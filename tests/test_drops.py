"""Dropped modules: the model equals the dense one without what they give, keeps nothing of them and runs so."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, StaticCache

import transact
from bench.efficiency.costs import weight_elements
from bench.efficiency.memory import kv_bytes_per_token
from tests.test_decoding import assert_same, decoded, read_at_once
from tests.test_speedup import TABLE, made_up_scores
from tests.tiny import FAMILIES, VARIANTS, random_plan, searched_loss, tiny_llama, tiny_relative, zeroed
from transact import PRESETS, Plan, Recipe, Widths, fraction_removed, searched_widths
from transact.__main__ import main
from transact.allocate import dropping_losses, parameter_prices, removal_losses, total_price, widths_within
from transact.engines import ENGINES, check_held
from transact.export import check_exportable
from transact.export.executorch import traced
from transact.latency import Workload, compared, model_of_widths
from transact.measured import error_slopes
from transact.modeling_transact import CACHE
from transact.obs import ObsPruning
from transact.speedup import SpeedGoal, narrowest_widths
from transact.widths import dense_widths, kv_fraction_removed, widths_of

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are few:UserWarning")
IDS = torch.randint(1, 97, (2, 12), generator=torch.Generator().manual_seed(1))
WINDOWS = torch.randint(1, 97, (16, 24), generator=torch.Generator().manual_seed(3))
NO_ATTENTION, NO_MLP = (0, 2), (0, 3)  # of four layers: the first keeps nothing at all
DROPS = replace(PRESETS["best"], drop_modules=True)
CLOSED = replace(DROPS, compensation="dense", measurements=0)


def with_drops(plan: Plan, no_attention=NO_ATTENTION, no_mlp=NO_MLP) -> Plan:
    layers = list(plan.layers)
    for index in no_attention:
        layer = layers[index]
        layers[index] = replace(layer, rope_pairs=layer.rope_pairs[:, :0], value_dims=layer.value_dims[:, :0])
    for index in no_mlp:
        layers[index] = replace(layers[index], mlp_dims=layers[index].mlp_dims[:0])
    return Plan(tuple(layers))


@torch.no_grad()
def silenced(dense, plan: Plan):
    """The dense model with what is dropped set to zero, and with all that dropped modules give, biases too."""
    model = zeroed(dense, plan)
    for layer, widths in zip(model.model.layers, plan.widths, strict=True):
        for linear, is_there in ((layer.self_attn.o_proj, widths.v_head_dim), (layer.mlp.down_proj, widths.mlp)):
            if not is_there:
                for parameter in linear.parameters():
                    parameter.zero_()
    return model


def dense_model(variant: str = "gqa"):
    return tiny_relative(variant, layers=4) if variant in FAMILIES else tiny_llama(variant, layers=4)


def narrowed_and_oracle(variant: str = "gqa", attention: str = "sdpa"):
    dense = dense_model(variant)
    dense.set_attn_implementation(attention)
    plan = with_drops(random_plan(dense.config, seed=2, drop_heads=True))
    return transact.apply_plan(dense, plan), silenced(dense, plan)


def one_that_hardly_needs(no_attention=(1,), no_mlp=(2,)):
    """A dense model some of whose modules give next to nothing."""
    dense = tiny_llama("gqa", layers=4)
    with torch.no_grad():
        for index in no_attention:
            dense.model.layers[index].self_attn.o_proj.weight.mul_(1e-3)
        for index in no_mlp:
            dense.model.layers[index].mlp.down_proj.weight.mul_(1e-3)
    return dense


def dropped_of(widths) -> tuple[list[int], list[int]]:
    return (
        [index for index, one in enumerate(widths) if one.v_head_dim == 0],
        [index for index, one in enumerate(widths) if one.mlp == 0],
    )


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", [*VARIANTS, *FAMILIES])
def test_equals_the_dense_model_without_what_dropped_modules_give(variant, attention):
    narrowed, oracle = narrowed_and_oracle(variant, attention)
    assert_same(read_at_once(narrowed, after=0), read_at_once(oracle, after=0))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["dynamic", "static"])
@pytest.mark.parametrize("variant", ["gqa", "biases", *FAMILIES])
def test_steps_equal_those_of_the_silenced_dense_model(variant, kind, attention):
    narrowed, oracle = narrowed_and_oracle(variant, attention)
    assert_same(decoded(narrowed, kind), decoded(oracle, kind))


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_padded_prompts(kind):
    narrowed, oracle = narrowed_and_oracle()
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    assert_same(decoded(narrowed, kind, attention_mask=mask), decoded(oracle, kind, attention_mask=mask))


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}, {"num_beams": 2},
                                     {"prompt_lookup_num_tokens": 2}], ids=str)  # fmt: skip
def test_generation_of_padded_batches(options):
    narrowed, oracle = narrowed_and_oracle()
    mask = torch.ones_like(IDS)
    mask[1, :5] = 0
    rows = slice(0, 1) if "prompt_lookup_num_tokens" in options else slice(None)
    plain = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None, "attention_mask": mask[rows],
             "disable_compile": True}  # fmt: skip
    expected = oracle.generate(IDS[rows], **plain, **options)
    assert torch.equal(narrowed.generate(IDS[rows], **plain, **options), expected)


def test_compiles_as_one_graph():
    narrowed, _ = narrowed_and_oracle()
    compiled = torch.compile(narrowed, backend="aot_eager", fullgraph=True)
    assert_same(read_at_once(compiled), read_at_once(narrowed))


@pytest.mark.parametrize("family", ["gqa", "mistral"])  # a sliding window has other caches
def test_nothing_of_dropped_modules_is_kept(family):
    narrowed, _ = narrowed_and_oracle(family)
    names = [name for name, _ in (*narrowed.named_parameters(), *narrowed.named_buffers())]
    assert not any(name.startswith("model.layers.0.") for name in names)
    assert [name for name in names if name.startswith("model.layers.2.") and "norm" in name] == [
        "model.layers.2.post_attention_layernorm.weight"
    ]
    embedding = narrowed.model.embed_tokens.weight.numel()
    assert weight_elements(narrowed.config, widths_of(narrowed.config)) == narrowed.num_parameters() - embedding
    caches = [DynamicCache(config=narrowed.config), StaticCache(narrowed.config, max_cache_len=20)]
    if family == "gqa":
        caches.append(DynamicCache())  # which learns of layers as they come
        assert kv_bytes_per_token(narrowed) == 4 * transact.kv_elements_per_token(widths_of(narrowed.config))
    for cache in caches:
        with torch.no_grad():
            narrowed(input_ids=IDS, **{CACHE: cache})
        assert len(cache.layers) == 2
        assert cache.get_seq_length() == IDS.shape[1]
        assert all(layer.keys.numel() for layer in cache.layers)


def test_trains():
    narrowed, _ = narrowed_and_oracle()
    narrowed.train()
    enable = getattr(narrowed, "activation_checkpointing_enable", None) or narrowed.gradient_checkpointing_enable
    enable()
    narrowed(input_ids=IDS, labels=IDS).loss.backward()
    assert all(parameter.grad is not None for parameter in narrowed.parameters())


def test_saved_and_loaded_bit_by_bit(tmp_path):
    dense = dense_model()
    plan = with_drops(random_plan(dense.config, seed=2))
    narrowed = transact.apply_plan(dense, plan)
    out = transact.save_checkpoint(tmp_path / "out", narrowed, plan, {})
    loaded = transact.TransActForCausalLM.from_pretrained(out)
    assert {*loaded.state_dict()} == {*narrowed.state_dict()}
    assert torch.equal(read_at_once(loaded), read_at_once(narrowed))
    again = transact.load_plan(out)
    assert again.widths == plan.widths == widths_of(loaded.config)
    assert torch.equal(read_at_once(transact.apply_plan(dense, again)), read_at_once(narrowed))


def test_slopes_of_dropped_modules_are_those_of_finite_differences():
    dense = tiny_llama("biases", layers=4).double()
    narrowed = transact.apply_plan(dense, with_drops(random_plan(dense.config, seed=2))).requires_grad_(False)
    slopes, step = error_slopes(narrowed, dense, IDS), 1e-3

    class Share(torch.nn.Module):
        def __init__(self, whole, share):
            super().__init__()
            self.whole, self.share = whole, share

        def forward(self, *inputs, **keywords):
            output = self.whole(*inputs, **keywords)
            return (self.share * output[0], None) if isinstance(output, tuple) else self.share * output

    def divergence_with(index, name, norm, share):
        layer, before = narrowed.model.layers[index], dense.model.layers[index]
        setattr(layer, name, Share(getattr(before, name), share))
        setattr(layer, norm, getattr(before, norm))
        with torch.no_grad():
            given, wanted = (one(input_ids=IDS, use_cache=False).logits.log_softmax(-1) for one in (narrowed, dense))
        setattr(layer, name, None)
        setattr(layer, norm, None)
        return torch.nn.functional.kl_div(given, wanted, reduction="sum", log_target=True).item() / IDS.numel()

    for layers, name, norm, column in (
        (NO_ATTENTION, "self_attn", "input_layernorm", 1),
        (NO_MLP, "mlp", "post_attention_layernorm", 2),
    ):
        for index in layers:
            less, more = (divergence_with(index, name, norm, sign * step) for sign in (1, -1))
            assert slopes[index, column].item() == pytest.approx((more - less) / (2 * step), rel=1e-2, abs=1e-5)
    assert slopes[list(NO_ATTENTION), 0].tolist() == [0, 0]
    assert all(layer.mlp is None for layer in (narrowed.model.layers[index] for index in NO_MLP))


def test_the_loss_of_dropping_attention_is_that_of_all_that_it_gives():
    dense, given = tiny_llama("gqa"), {}
    statistics = transact.calibrate(dense, WINDOWS, second_moments=True, gradients="outputs")
    for layer in dense.model.layers:
        layer.self_attn.o_proj.register_forward_hook(
            lambda module, inputs, output: given.update({module: output.flatten(0, 1)})
        )
    with torch.no_grad():
        dense(input_ids=WINDOWS)
    criterion = transact.criterion_by_name("predicted-loss")
    for index, (layer, of) in enumerate(zip(dense.model.layers, statistics.layers, strict=True)):
        outputs, moments = given[layer.self_attn.o_proj].double(), of.gradients.attention_output.double()
        expected = torch.einsum("td,de,te->", outputs, moments, outputs).item() / 2 / of.tokens
        scores = criterion.score(layer, index, of)
        assert dropping_losses(scores) == pytest.approx((expected, scores.mlp_dims.max().item()), rel=1e-3)


def test_what_all_attention_gives_is_computed_only_where_it_may_go(monkeypatch):
    made, score = [], ObsPruning.score

    def noted(*arguments):
        made.append(score(*arguments))
        return made[-1]

    monkeypatch.setattr(ObsPruning, "score", noted)
    for drops in (False, True):
        transact.prune(tiny_llama("gqa"), WINDOWS, recipe=replace(CLOSED, drop_modules=drops), ratio=0.3)
    without, drops = made[:2], made[2:]
    assert [one.attention for one in without] == [None, None]
    assert all(one.attention > 0 for one in drops)
    for name in ("rope_pairs", "value_dims", "mlp_dims", "kv_heads"):
        assert all(torch.equal(getattr(a, name), getattr(b, name)) for a, b in zip(without, drops, strict=True))


@pytest.mark.parametrize(
    ("ratio", "kv_ratio"), [(0.1, None), (0.3, None), (0.5, None), (0.7, None), (0.85, None), (0.5, 0.3), (0.7, 0.5)]
)
def test_a_search_with_drops_never_predicts_a_worse_loss(ratio, kv_ratio):
    config = tiny_llama(layers=4).config
    for seed in range(4):
        scores = made_up_scores(config, seed)
        without = searched_widths(config, scores, ratio, kv_ratio=kv_ratio)
        widths = searched_widths(config, scores, ratio, kv_ratio=kv_ratio, drop_modules=True)
        assert searched_loss(scores, widths) <= searched_loss(scores, without) + 1e-9
        assert ratio - 0.005 <= fraction_removed(config, widths)
        assert fraction_removed(config, widths) <= max(ratio + 0.005, fraction_removed(config, without)) + 1e-9
        assert kv_fraction_removed(config, widths) >= (kv_ratio or 0) - 1e-9
        assert any(one.v_head_dim for one in widths)


@pytest.mark.parametrize("share", [0.15, 0.3, 0.5, 0.8])
def test_a_search_by_seconds_with_drops_never_predicts_a_worse_loss(share):
    config = tiny_llama(layers=4).config
    for seed in range(4):
        scores, budget = made_up_scores(config, seed), share * total_price(TABLE.prices, dense_widths(config))
        without = widths_within(config, scores, TABLE.prices, budget)
        widths = widths_within(config, scores, TABLE.prices, budget, drop_modules=True)
        assert total_price(TABLE.prices, widths) <= budget * (1 + 1e-9)
        assert searched_loss(scores, widths) <= searched_loss(scores, without) + 1e-9


def test_planning_with_drops_equals_trying_everything():
    config = LlamaConfig(hidden_size=8, num_attention_heads=2, intermediate_size=4, num_hidden_layers=2)
    prices = parameter_prices(config)
    heads = [(0, 0), *itertools.product((2, 4), (1, 2, 3, 4))]
    layers = [Widths(2, qk, v, mlp) for (qk, v), mlp in itertools.product(heads, range(5))]
    for seed in range(5):
        scores = made_up_scores(config, seed)
        stays = max((0, 1), key=lambda index: removal_losses(scores[index].value_dims)[0])
        tried = [
            (searched_loss(scores, pair), total_price(prices, pair)) for pair in itertools.product(layers, repeat=2)
            if pair[stays].v_head_dim
        ]  # fmt: skip
        budgets = {min(tried, key=lambda one, price=price: one[0] + price * one[1])[1] for price in
                   (1e-4, 1e-3, 3e-3, 0.01, 0.03)}  # fmt: skip
        for budget in budgets - {0.0}:
            widths = widths_within(config, scores, prices, budget, drop_modules=True)
            best = min(loss for loss, price in tried if price <= budget * (1 + 1e-9))
            assert searched_loss(scores, widths) == pytest.approx(best)


def test_only_modules_that_are_named_as_a_whole_are_dropped():
    config = tiny_llama(layers=4).config
    for modules, most in ((("qk", "mlp"), 0.5), (("qk", "vo"), 0.34), (("mlp",), 0.25)):
        widths = searched_widths(config, made_up_scores(config), most, modules=modules, drop_modules=True)
        no_attention, no_mlp = dropped_of(widths)
        assert not no_attention or modules == ("qk", "vo")
        assert not no_mlp or "mlp" in modules
    assert dropped_of(searched_widths(config, made_up_scores(config), 0.3, drop_modules=False)) == ([], [])


@pytest.mark.parametrize(
    "recipe",
    [DROPS, CLOSED, replace(CLOSED, compensation="pruned", output_bias=True), replace(CLOSED, compensation="bias"),
     replace(CLOSED, measurements=1), replace(CLOSED, compensation="none", shots=2),
     replace(CLOSED, compensation="none", sparsity="magnitude-2:4", modules=("qk", "vo"))],
    ids=lambda recipe: f"{recipe.compensation}-{recipe.measurements}-{recipe.shots}-{recipe.sparsity}",
)  # fmt: skip
def test_modules_that_give_next_to_nothing_are_dropped(recipe):
    dense = one_that_hardly_needs()
    ratio = 0.25 if "mlp" in recipe.modules else 0.17  # of attention and an MLP, of attention
    pruned = transact.prune(dense, WINDOWS, recipe=recipe, ratio=ratio)
    no_attention, no_mlp = dropped_of(pruned.plan.widths)
    assert 1 in no_attention or 2 in no_mlp
    assert pruned.plan.widths == widths_of(pruned.model.config)
    assert abs(fraction_removed(dense.config, pruned.plan.widths) - ratio) < 0.02
    with torch.no_grad():
        assert pruned.model(input_ids=IDS, labels=IDS).loss.isfinite()
        again = transact.apply_plan(dense, pruned.plan)
    assert {*again.state_dict()} - {*pruned.model.state_dict()} == set()


def test_block_by_block_gives_the_same_model():
    dense = one_that_hardly_needs()
    recipe = replace(DROPS, measurements=0)
    whole = transact.prune(dense, WINDOWS, recipe=recipe, ratio=0.3)
    by_block = transact.prune(dense, WINDOWS, recipe=recipe, ratio=0.3, device=torch.device("cpu"))
    assert any(dropped_of(whole.plan.widths))
    assert whole.plan.widths == by_block.plan.widths
    assert_same(read_at_once(by_block.model), read_at_once(whole.model))


def test_a_ratio_of_none_keeps_the_dense_model_bit_by_bit():
    dense = tiny_llama("gqa", layers=4)
    kept = transact.prune(dense, WINDOWS, recipe=DROPS, ratio=0.0)
    assert torch.equal(read_at_once(kept.model), read_at_once(dense))


def test_the_cache_budget_counts_dropped_attention():
    config = tiny_llama(layers=4).config
    scores = made_up_scores(config)
    for index in (1, 2):
        scores[index] = replace(scores[index], attention=torch.tensor(0.0))
    widths = searched_widths(config, scores, 0.6, kv_ratio=0.5, drop_modules=True)
    assert {1, 2} <= {*dropped_of(widths)[0]}
    assert kv_fraction_removed(config, widths) >= 0.5


def test_widths_by_hand_may_drop_where_that_is_said():
    dense = tiny_llama("gqa", layers=2)
    widths = [Widths(2, 8, 8, 0), Widths(2, 0, 0, 24)]
    assert dropped_of(transact.prune(dense, WINDOWS, recipe=CLOSED, widths=widths).plan.widths) == ([1], [0])
    with pytest.raises(ValueError, match="widths of layer 0: mlp must lie between 1 and 40, got 0"):
        transact.prune(dense, WINDOWS, recipe=replace(CLOSED, drop_modules=False), widths=widths)
    for odd, message in (
        (Widths(2, 0, 4, 8), "layer 1: without attention qk_head_dim and v_head_dim are both 0, got 0 and 4"),
        (Widths(0, 0, 0, 8), "layer 1: kv_heads must lie between 1 and 2, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            transact.prune(dense, WINDOWS, recipe=CLOSED, widths=[widths[0], odd])
    with pytest.raises(ValueError, match="attention is dropped in all layers: at least one must keep it"):
        transact.prune(dense, WINDOWS, recipe=CLOSED, widths=[Widths(2, 0, 0, 8)] * 2)
    with pytest.raises(ValueError, match="attention is dropped in all layers: at least one must keep it"):
        transact.apply_plan(dense, with_drops(random_plan(dense.config), (0, 1), ()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop_modules": "yes"}, "drop_modules must be True or False, got 'yes'"),
        ({"allocation": "uniform"}, r"drop_modules is for an allocation 'searched' \(preset best\), not 'uniform'"),
        ({"engine": "vllm"}, "engine 'vllm' runs attention and an MLP in every layer: drop_modules is for tr"),
        ({"engine": "plain"}, "engine 'plain' runs attention and an MLP in every layer"),
        ({"modules": ("vo",)}, r"drop_modules drops attention \(modules qk and vo\) or MLPs \(mlp\), got vo"),
    ],
)
def test_recipes_that_cannot_drop_are_refused(changes, message):
    with pytest.raises(ValueError, match=message) as caught:
        replace(CLOSED, **changes).check()
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="depth 'influence' drops whole layers: drop_modules is for narrowing"):
        Recipe(depth="influence", drop_modules=True).check()


def test_engines_and_exports_that_cannot_hold_it_say_so():
    narrowed, _ = narrowed_and_oracle()
    widths = widths_of(narrowed.config)
    for name, engine in ENGINES.items():
        if engine.drops:
            check_held(name, widths)
            continue
        with pytest.raises(ValueError, match=f"'{name}' runs .* layer 0 has no attention and MLP"):
            check_held(name, widths)
    for format in ("llama", "gguf"):
        with pytest.raises(ValueError, match="layer 0 has no attention and MLP, which a plain Llama and a GGUF file"):
            check_exportable(narrowed.config, format)
    check_exportable(narrowed.config, "executorch")
    for measure in (transact.calibrate, transact.loss_gradients):
        with pytest.raises(ValueError, match="layer 0 has no attention and MLP, which was dropped: measure the dense"):
            measure(narrowed, WINDOWS)
    with pytest.raises(ValueError, match="engine 'plain' runs attention and an MLP in every layer"):
        searched_widths(
            tiny_llama().config, made_up_scores(tiny_llama().config), 0.3, engine="plain", drop_modules=True
        )


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"qk_head_dims": [0, 8], "v_head_dims": [4, 8]}, "a layer without attention has 0 in qk_head_dims and in"),
        ({"qk_head_dims": [0, 0], "v_head_dims": [0, 0]}, "v_head_dims are 0 in all layers"),
        ({"kv_head_counts": [0, 2]}, "kv_head_counts must lie between 1 and the dense model's 2"),
        ({"intermediate_sizes": [-1, 2]}, "intermediate_sizes must lie between 0 and the dense model's 40"),
    ],
)
def test_configurations_that_are_none_are_refused(lists, message):
    with pytest.raises(Exception, match=message):
        transact.TransActConfig(**tiny_llama("gqa").config.to_dict() | {"model_type": "transact_llama"} | lists)


def test_the_traced_program_has_no_room_for_what_is_dropped():
    narrowed, _ = narrowed_and_oracle()
    program = traced(narrowed, 20)
    with torch.no_grad():
        given = program.module()(IDS[:1], torch.arange(IDS.shape[1]))
    assert_same(given.view(1, 1, -1), read_at_once(narrowed, after=11)[:1])
    assert sum(name.startswith("keys_") for name, _ in program.named_buffers()) == 2


def test_dropped_modules_take_no_time_in_the_plan_and_run_under_the_clock():
    dense = tiny_llama("gqa", layers=3)
    narrowest = narrowest_widths(dense, ("qk", "vo", "mlp"), True)
    assert dropped_of(narrowest) == ([1, 2], [0, 1, 2])
    assert dropped_of(narrowest_widths(dense, ("qk", "mlp"), True)) == ([], [0, 1, 2])
    for tokens in ("decode", "prefill"):
        assert compared(dense, model_of_widths(dense, narrowest[::-1]), Workload(tokens, 2, 9)).median > 0


def test_a_speed_up_measured_without_drops_is_refused():
    goal = SpeedGoal(1.3, Workload(), ("qk", "vo", "mlp"), TABLE.prices, (1.0, 1.0), ((1.0, 1.0),), {})
    with pytest.raises(ValueError, match="measured with drop_modules False, the recipe says True: measure it anew"):
        transact.prune(tiny_llama(), WINDOWS, recipe=CLOSED, speedup=goal)


def test_by_command(tiny_directory, tiny_text, tmp_path, capsys):
    settings = ["--calibration", str(tiny_text), "--samples", "8", "--seq-len", "32", "--device", "cpu"]
    run = ["prune", str(tiny_directory), str(tmp_path / "out"), *settings]
    assert main([*run, "--ratio", "0.93"]) == 2
    assert "ratio 0.93 is out of reach" in capsys.readouterr().err
    assert main([*run, "--drop-modules", "--preset", "transact"]) == 2
    assert "drop_modules is for an allocation 'searched'" in capsys.readouterr().err
    assert main([*run, "--drop-modules", "--ratio", "0.93"]) == 0
    pruning = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert pruning["recipe"]["drop_modules"] is True
    assert math.isclose(pruning["fraction_removed"], 0.93, abs_tol=0.005)
    capsys.readouterr()
    assert main(["inspect", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    assert "which was dropped: layer" in printed
    assert "held by transformers, executorch" in printed
    assert "in every layer" in printed
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "llama")]) == 2
    assert "which a plain Llama and a GGUF file have in every layer" in capsys.readouterr().err
    assert main(["recover", str(tmp_path / "out"), str(tmp_path / "trained"), "--tokens", "512", "--batch", "2",
                 "--text", str(tiny_text), "--train-seq-len", "32", "--device", "cpu"]) == 0  # fmt: skip
    loaded, _ = transact.load_model(tmp_path / "trained", device="cpu")
    assert dropped_of(widths_of(loaded.config)) == dropped_of([Widths(**one) for one in pruning["layers"]])
