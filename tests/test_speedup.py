"""A speed-up as the budget: planned by made-up tables, reached on made-up devices. No test depends on a clock."""

import copy
import itertools
import json
import math
import random
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

import transact
from tests.tiny import random_plan, searched_loss, tiny_llama, tiny_relative
from transact import latency, speedup
from transact.__main__ import main
from transact.allocate import parameter_prices, total_price, widths_within
from transact.cache import cache_directory
from transact.latency import (
    LatencyTable,
    Workload,
    barely_narrowed,
    compared,
    fitted_table,
    latency_table,
    measured_table,
    model_of_widths,
    table_plans,
)
from transact.scores import LayerScores
from transact.speedup import budget_at, narrowest_widths, speed_goal, widths_at_speed
from transact.timing import Ratio
from transact.widths import MODULES, dense_widths, fraction_removed, kv_fraction_removed, linear_parameters, widths_of

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are few:UserWarning")
WINDOWS = torch.randint(1, 97, (16, 24), generator=torch.Generator().manual_seed(3))
TABLE = LatencyTable(attention=1.0, query_key_dim=0.25, value_dim=0.3, mlp=0.6, mlp_dim=0.4)


def test_a_module_takes_what_it_and_its_dimensions_take_and_nothing_where_it_is_dropped():
    whole = transact.Widths(2, 16, 8, 40)
    assert TABLE.prices(whole) == (pytest.approx(1 + 4 + 2.4), pytest.approx(0.6 + 16))
    assert TABLE.prices(replace(whole, mlp=0)) == (TABLE.prices(whole)[0], 0)
    assert TABLE.prices(replace(whole, qk_head_dim=0, v_head_dim=0)) == (0, TABLE.prices(whole)[1])


def seconds_by(table: LatencyTable, widths) -> float:
    return 3.0 + total_price(table.prices, widths)


@pytest.mark.parametrize("table", [TABLE, replace(TABLE, attention=0.0, value_dim=0.0), replace(TABLE, mlp_dim=0.0)])
@pytest.mark.parametrize("layers", [2, 3, 6])
def test_the_table_that_models_follow_is_found(table, layers):
    plans = table_plans(tiny_llama(layers=layers))
    found = fitted_table(plans, [seconds_by(table, widths) for widths in plans])
    assert asdict(found) == pytest.approx(asdict(table), abs=1e-9)


def test_no_part_takes_less_than_nothing_whatever_the_noise():
    plans = table_plans(tiny_llama())
    seconds = torch.rand(len(plans), generator=torch.Generator().manual_seed(0)).tolist()
    assert min(asdict(fitted_table(plans, seconds)).values()) >= 0


def test_a_table_is_read_off_few_layers_of_a_large_model(monkeypatch):
    dense = tiny_llama(layers=6)
    one = linear_parameters(dense.config, dense_widths(dense.config)[:1]) * 4
    for least, layers in ((0, 2), (one, 2), (3 * one, 3), (2.5 * one, 3), (99 * one, 6)):
        monkeypatch.setattr(latency, "LEAST_BYTES", least)
        plans = table_plans(dense)
        assert {len(widths) for widths in plans} == {layers}
        first, *others = plans[0]
        assert others == [*dense_widths(dense.config)[1:layers]]
        assert first == replace(others[0], mlp=39)


def made_up_scores(config: LlamaConfig, seed: int = 0) -> list[LayerScores]:
    generator = torch.Generator().manual_seed(seed)

    def rising(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator).cumsum(-1) * torch.rand((), generator=generator)

    one = dense_widths(config)[0]
    return [
        LayerScores(
            rising(one.kv_heads, one.qk_head_dim // 2), rising(one.kv_heads, one.v_head_dim), rising(one.mlp)
        )
        for _ in range(config.num_hidden_layers)
    ]  # fmt: skip


@pytest.mark.parametrize("share", [0.15, 0.3, 0.5, 0.8, 1.0])
def test_a_budget_of_the_table_s_seconds_is_met_and_used_up(share):
    config = tiny_llama(layers=4).config
    scores, whole = made_up_scores(config), total_price(TABLE.prices, dense_widths(config))
    widths = widths_within(config, scores, TABLE.prices, share * whole)
    spent = total_price(TABLE.prices, widths)
    assert spent <= share * whole * (1 + 1e-9)
    widest_step = max(
        TABLE.prices(replace(one, mlp=one.mlp + 1))[1] - TABLE.prices(one)[1] for one in widths if one.mlp < 40
    ) if any(one.mlp < 40 for one in widths) else 0  # fmt: skip
    assert spent + widest_step > share * whole * (1 - 1e-9) or widths == dense_widths(config)
    with_cache = widths_within(config, scores, TABLE.prices, share * whole, kv_ratio=0.5)
    assert kv_fraction_removed(config, with_cache) >= 0.5
    assert total_price(TABLE.prices, with_cache) <= share * whole * (1 + 1e-9)


def test_planning_equals_trying_everything():
    config = LlamaConfig(hidden_size=8, num_attention_heads=2, intermediate_size=4, num_hidden_layers=2)
    table = LatencyTable(attention=0.4, query_key_dim=0.3, value_dim=0.2, mlp=0.3, mlp_dim=0.7)
    layers = [transact.Widths(2, *one) for one in itertools.product((2, 4), (1, 2, 3, 4), (1, 2, 3, 4))]
    for seed in range(5):
        scores = made_up_scores(config, seed)
        alone = [[(searched_loss([layer], [one]), sum(table.prices(one))) for one in layers] for layer in scores]
        tried = [(a[0] + b[0], a[1] + b[1]) for a, b in itertools.product(*alone)]
        # budgets at which a price of a second splits the choice: between them only the last MLPs are filled up greedily
        budgets = {min(tried, key=lambda one, price=price: one[0] + price * one[1])[1] for price in
                   (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)}  # fmt: skip
        assert len(budgets) > 2
        for budget in budgets:
            widths = widths_within(config, scores, table.prices, budget)
            best = min(loss for loss, price in tried if price <= budget * (1 + 1e-9))
            assert searched_loss(scores, widths) == pytest.approx(best)


def test_what_takes_no_time_is_not_narrowed():
    """Queries and keys that lose nothing would go by parameters; by a table where they are for nothing they stay."""
    config = tiny_llama(layers=2).config
    scores = [replace(one, rope_pairs=one.rope_pairs * 1e-6) for one in made_up_scores(config)]
    table = replace(TABLE, query_key_dim=0.0)
    widths = widths_within(config, scores, table.prices, 0.9 * total_price(table.prices, dense_widths(config)))
    assert all(one.qk_head_dim == 16 for one in widths)
    by_parameters = parameter_prices(config)
    widths = widths_within(config, scores, by_parameters, 0.9 * total_price(by_parameters, dense_widths(config)))
    assert any(one.qk_head_dim < 16 for one in widths)


def test_a_budget_out_of_reach_is_refused():
    config = tiny_llama().config
    with pytest.raises(ValueError, match=r"budget 1 is out of reach: the narrowest qk\+vo\+mlp cost 6\.2"):
        widths_within(config, made_up_scores(config), TABLE.prices, 1.0)
    with pytest.raises(ValueError, match=r"kv-ratio 0\.95 is out of reach: the narrowest qk\+vo\+mlp remove 0\.875"):
        widths_within(config, made_up_scores(config), TABLE.prices, 40.0, kv_ratio=0.95)


@pytest.fixture
def measured(monkeypatch) -> list[Workload]:
    """Tables are made up instead of measured; the list tells how often."""
    calls = []

    def made_up(dense, workload, *, progress=False):
        calls.append(workload)
        return TABLE

    monkeypatch.setattr(latency, "measured_table", made_up)
    return calls


def test_tables_are_kept_and_told_apart(measured, tmp_path, monkeypatch):
    dense, workload = tiny_llama(), Workload(context=64)
    assert latency_table(dense, workload) == latency_table(dense, workload) == TABLE
    assert len(measured) == 1
    others = [Workload("prefill", context=64), Workload(context=32), Workload(batch=2, context=64)]
    for other in (*others, *others):
        latency_table(dense, other)
    assert len(measured) == 4
    latency_table(tiny_llama().to(torch.bfloat16), workload)
    latency_table(tiny_llama("mha"), workload)
    assert len(measured) == 6
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    latency_table(dense, workload)
    monkeypatch.setattr(latency, "device_name", lambda device: "another processor")
    latency_table(dense, workload)
    assert len(measured) == 8
    assert latency_table(dense, workload) == TABLE
    latency_table(dense, workload)
    assert len(measured) == 8
    assert len(list((tmp_path / "cache" / "latency").iterdir())) == 8


def test_a_table_of_other_conditions_or_torn_is_measured_anew(measured, tmp_path):
    dense, workload = tiny_llama(), Workload(context=64)
    latency_table(dense, workload)
    [file] = (tmp_path / "cache" / "latency").iterdir()
    whole = file.read_text()
    no_times = [whole.replace('"mlp_dim": 0.4', f'"mlp_dim": {value}') for value in (
        "NaN", "Infinity", "-0.4", "null", "true", '"0.4"', "[0.4]", "1e300"
    )]  # fmt: skip
    nothing = whole[: whole.index('"table"')] + f'"table": {json.dumps(dict.fromkeys(asdict(TABLE), 0.0))}}}'
    deep = "[" * 200_000
    others = [whole.replace('"threads": ', '"threads": 9'), whole[:40], "[]", '{"conditions": {}}', ""]
    for text in (*others, *no_times, nothing, deep):
        assert text != whole
        file.write_text(text)
        assert latency_table(dense, workload) == TABLE
        assert file.read_text() == whole
    assert len(measured) == 16


def test_a_table_of_another_precision_is_another(measured):
    dense, workload, matmul = tiny_llama(), Workload(context=64), torch.backends.mkldnn.matmul
    latency_table(dense, workload)
    before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
    try:
        latency_table(dense, workload)
    finally:
        matmul.fp32_precision = before
    assert len(measured) == 2


def test_without_a_home_the_cache_asks_for_a_place(monkeypatch, tmp_path):
    monkeypatch.setattr(
        Path, "home", lambda: (_ for _ in ()).throw(RuntimeError("Could not determine home directory."))
    )
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("TRANSACT_CACHE", "")
    with pytest.raises(ValueError, match="there is no home directory to keep a cache in: set TRANSACT_CACHE"):
        cache_directory()
    monkeypatch.setenv("TRANSACT_CACHE", str(tmp_path))
    assert cache_directory() == tmp_path
    monkeypatch.setenv("TRANSACT_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory() == tmp_path / "transact"


@pytest.fixture
def imaginary(monkeypatch, measured):
    """A device on which models take what `cost` says of their widths; its own ratio is off by `noise` at either end."""
    device = {"cost": lambda widths: 10 + total_price(TABLE.prices, widths), "noise": 0.002, "comparisons": 0}

    def compared(dense, narrowed, workload, *, progress=False):
        device["comparisons"] += 1
        ratio = device["cost"](widths_of(dense.config)) / device["cost"](widths_of(narrowed.config))
        return Ratio(ratio, ratio * (1 - device["noise"]), ratio * (1 + device["noise"]))

    monkeypatch.setattr(speedup, "compared", compared)
    monkeypatch.setattr("transact.pipeline.compared", compared)
    return device


def off_by_a_fifth(widths) -> float:
    """Neither what the table says of attention nor of MLPs is so, nor is either the same everywhere."""
    seconds = 10.0
    for one in widths:
        attention, mlp = TABLE.prices(one)
        seconds += 0.8 * attention + 1.2 * mlp * (0.8 + 0.2 * one.mlp / 40)
    return seconds


@pytest.mark.parametrize("asked", [1.1, 1.3, 1.6, 2.0])
@pytest.mark.parametrize("budget", ["latency", "parameters"])
@pytest.mark.parametrize("is_off", [False, True])
def test_the_speed_asked_for_is_reached(imaginary, asked, budget, is_off):
    dense = tiny_llama(layers=6)
    if is_off:
        imaginary["cost"] = off_by_a_fifth
    goal = speed_goal(dense, asked, budget=budget)
    scores = made_up_scores(dense.config)
    widths = widths_at_speed(dense, goal, lambda price: widths_within(dense.config, scores, goal.prices, price))
    reached = imaginary["cost"](dense_widths(dense.config)) / imaginary["cost"](widths)
    assert reached == pytest.approx(asked, rel=0.02 if budget == "latency" else 0.05)
    exact = budget == "latency" and not is_off
    assert imaginary["comparisons"] <= (4 if exact else 6 if budget == "latency" else 7)  # three of them are the ends


def test_a_point_that_misses_bends_the_line():
    ends = ((40.0, 1.0), (10.0, 0.4))
    assert budget_at(ends, 2.0) == pytest.approx(15)
    assert budget_at([*ends, (15.0, 0.6)], 2.0) == pytest.approx(12.5)
    assert budget_at([*ends, (15.0, 0.6)], 1 / 0.8) == pytest.approx(27.5)
    assert budget_at([*ends, (15.0, 1.2)], 1 / 0.9) < 15  # noise: narrower and yet slower than the dense model
    assert budget_at(ends, 1.0) == 40


@pytest.mark.parametrize("asked", [1, 1.0, 0.5, 0, -2, math.nan, math.inf, "1.3", True])
def test_what_is_no_speed_up_is_refused(asked):
    with pytest.raises(ValueError, match="speedup is how many times as fast and must be above 1, got"):
        speed_goal(tiny_llama(), asked)
    with pytest.raises(ValueError, match="speedup is how many times as fast and must be above 1, got"):
        transact.prune(tiny_llama(), WINDOWS, speedup=asked)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"tokens": "sing"}, "tokens to be timed must be one of decode, prefill, got 'sing'"),
        ({"batch": 0}, "batch to be timed must be at least 1, got 0"),
        ({"batch": 1.5}, r"batch to be timed must be at least 1, got 1\.5"),
        ({"batch": True}, "batch to be timed must be at least 1, got True"),
        ({"context": -1}, "context to be timed must be at least 1, got -1"),
        ({"context": 121}, "context to be timed must be at most 120 tokens with this model, got 121"),
        ({"budget": "watts"}, "unknown budget 'watts', allowed: latency, parameters"),
        ({"modules": ("head",)}, "modules must name some of"),
        ({"drop_modules": "no"}, "drop_modules must be True or False, got 'no'"),
    ],
)
def test_what_cannot_be_timed_is_refused(options, named, measured):
    with pytest.raises(ValueError, match=named):
        speed_goal(tiny_llama(), 1.3, **options)
    assert not measured


def test_what_cannot_be_pruned_has_no_goal(measured):
    narrow = transact.apply_plan(tiny_llama(), random_plan(tiny_llama().config))
    broken = tiny_llama()
    broken.lm_head.weight.data[0, 0] = torch.nan
    for model, named in (
        (narrow, "the model is pruned already"), (torch.nn.Linear(1, 1), "a 'Linear' model cannot be pruned, allowed:"),
        (tiny_llama().to("meta"), "is offloaded"), (broken, r"lm_head\.weight holds NaN"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=named):
            speed_goal(model, 1.3)
    assert not measured


def test_what_no_width_reaches_is_refused_with_the_most_that_can_be_had(imaginary):
    with pytest.raises(ValueError, match=r"speedup 9 is out of reach: with the narrowest qk\+vo\+mlp decode is 3\.88"):
        speed_goal(tiny_llama(), 9)
    with pytest.raises(ValueError, match=r"speedup 3 is out of reach: with the narrowest mlp prefill is 1\.99 times"):
        speed_goal(tiny_llama(), 3, modules=("mlp",), tokens="prefill")


@pytest.mark.parametrize("noise", [0.2, math.nan])
def test_a_device_too_noisy_to_tell_is_refused(imaginary, noise):
    imaginary["noise"] = noise
    with pytest.raises(ValueError, match=r"speedup 1\.2 cannot be told from noise .*\(inconclusive\): .* wide"):
        speed_goal(tiny_llama(), 1.2)


REFUSED = {
    "a ratio": ({"ratio": 0.3}, "speedup and ratio or widths both say how much goes"),
    "a ratio of nothing": ({"ratio": 0.0}, "speedup and ratio or widths both say how much goes"),
    "widths": ({"widths": dense_widths(tiny_llama().config)}, "speedup and ratio or widths both say how much goes"),
    "uniform": ({"recipe": "transact"}, "widths that are searched, not by allocation 'uniform'"),
    "global": ({"recipe": "flap"}, "widths that are searched, not by allocation 'global'"),
    "plain": (
        {"recipe": replace(transact.PRESETS["best"], engine="plain")}, "not in engine 'plain'",
    ),
    "shots": ({"recipe": replace(transact.PRESETS["best"], shots=2)}, "in one shot, got shots 2"),
    "a device": ({"device": "cpu"}, "runs as a whole, not block by block"),
    "too small a cache": ({"kv_ratio": 0.95}, r"kv-ratio 0\.95 is out of reach"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_excludes_a_speed_up_is_refused_before_anything_is_timed(case, measured):
    arguments, named = REFUSED[case]
    with pytest.raises(ValueError, match=named):
        transact.prune(tiny_llama(), WINDOWS, speedup=1.3, **arguments)
    assert not measured


def test_a_goal_of_other_conditions_is_refused(imaginary, monkeypatch):
    dense = tiny_llama()
    goal = speed_goal(dense, 1.3)
    with pytest.raises(ValueError, match=r"measured with dtype torch\.float32, now it is torch\.bfloat16: measure it"):
        transact.prune(tiny_llama().to(torch.bfloat16), WINDOWS, speedup=goal)
    recipe = replace(transact.PRESETS["best"], modules=("mlp",))
    with pytest.raises(ValueError, match=r"measured with qk\+vo\+mlp, the recipe narrows mlp"):
        transact.prune(dense, WINDOWS, speedup=goal, recipe=recipe)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    with pytest.raises(ValueError, match=r"measured with threads .*, now it is 99"):
        transact.prune(dense, WINDOWS, speedup=goal)


@pytest.mark.parametrize("make", [tiny_llama, lambda: tiny_llama("biases"), lambda: tiny_relative("qwen3")])
@pytest.mark.parametrize("measurements", [0, 1])
def test_pruning_to_a_speed_up(imaginary, make, measurements):
    dense = make()
    recipe = replace(transact.PRESETS["best"], measurements=measurements)
    goal = speed_goal(dense, 1.4)
    pruned = transact.prune(dense, WINDOWS, recipe=recipe, speedup=goal)
    assert pruned.speed.median == pytest.approx(1.4, rel=0.05)  # a tiny model's widths come in large steps
    assert pruned.speed.verdict == "faster"
    assert pruned.plan.widths == widths_of(pruned.model.config)
    assert transact.prune(dense, WINDOWS, recipe=recipe, ratio=0.3).speed is None


def test_a_speed_that_the_whole_model_has_needs_nothing_removed(imaginary, monkeypatch):
    compared = speedup.compared

    def faster(*models, progress=False):
        ratio = compared(*models)
        return Ratio(1.35 * ratio.median, 1.35 * ratio.low, 1.35 * ratio.high)

    monkeypatch.setattr(speedup, "compared", faster)
    monkeypatch.setattr("transact.pipeline.compared", faster)
    dense = tiny_llama()
    with pytest.warns(UserWarning, match=r"^speedup 1\.2 is reached with nothing removed: that model is 1\.35 times"):
        goal = speed_goal(dense, 1.2)
    pruned = transact.prune(dense, WINDOWS, speedup=goal)
    assert pruned.plan.widths == dense_widths(dense.config)
    assert goal.is_met(pruned.speed)
    with torch.no_grad():
        assert torch.equal(*(model(input_ids=WINDOWS, use_cache=False).logits for model in (pruned.model, dense)))


def test_a_speed_that_only_the_whole_model_has_needs_nothing_removed_either(monkeypatch, imaginary):
    """Narrower models may be slower than it on small machines: they are not what is asked for."""
    dense = tiny_llama()

    def compared(before, after, workload, *, progress=False):
        faster = 1.35 if widths_of(after.config) == dense_widths(dense.config) else 1.2
        return Ratio(faster, faster - 0.01, faster + 0.01)

    monkeypatch.setattr(speedup, "compared", compared)
    monkeypatch.setattr("transact.pipeline.compared", compared)
    with pytest.warns(UserWarning, match=r"^speedup 1\.3 is reached with nothing removed"):
        goal = speed_goal(dense, 1.3)
    assert goal.budget == total_price(goal.prices, dense_widths(dense.config))
    assert transact.prune(dense, WINDOWS, speedup=goal).plan.widths == dense_widths(dense.config)
    with pytest.raises(ValueError, match=r"speedup 1\.5 is out of reach"):
        speed_goal(dense, 1.5)


@pytest.fixture
def with_a_step(imaginary):
    """On this device all narrowed models are computed in another way, 3.5 times as fast."""
    dense = dense_widths(tiny_llama().config)
    evenly = imaginary["cost"]
    imaginary["cost"] = lambda widths: evenly(widths) * (3.5 if widths == dense else 1)


def test_a_speed_that_all_narrowed_models_have_costs_next_to_nothing(with_a_step):
    dense = tiny_llama()
    with pytest.warns(UserWarning, match=r"^speedup 2 is reached with next to nothing removed: that model is 3\.5\d t"):
        goal = speed_goal(dense, 2)
    pruned = transact.prune(dense, WINDOWS, speedup=goal)
    widths = pruned.plan.widths
    assert 0 < fraction_removed(dense.config, widths) < 0.04
    assert goal.is_met(pruned.speed)


def test_a_step_that_costs_nothing_by_the_table_is_taken_where_it_is_all_that_is_needed(
    with_a_step, measured, monkeypatch
):
    """Of prices alone the whole model would come, which is not so fast."""
    monkeypatch.setattr(latency, "measured_table", lambda *_, **__: replace(TABLE, value_dim=0.0))
    dense, modules = tiny_llama(), ("qk", "vo")
    with pytest.warns(UserWarning, match="with next to nothing removed"):
        goal = speed_goal(dense, 2, modules=modules)
    scores = made_up_scores(dense.config)
    widths = widths_at_speed(
        dense, goal, lambda price: widths_within(dense.config, scores, goal.prices, price, modules=modules)
    )
    assert widths == barely_narrowed(dense, modules)


def test_where_narrower_is_slower_no_more_goes_than_has_to(imaginary):
    dense, modules = tiny_llama(), ("qk",)
    whole, narrowest = dense_widths(dense.config), narrowest_widths(dense, modules)
    imaginary["cost"] = lambda widths: {whole: 3.5, narrowest: 1.02}.get(tuple(widths), 1.0)
    with pytest.warns(UserWarning, match="with next to nothing removed"):
        goal = speed_goal(dense, 3.47, modules=modules)
    scores = made_up_scores(dense.config)
    widths = widths_at_speed(
        dense, goal, lambda price: widths_within(dense.config, scores, goal.prices, price, modules=modules)
    )
    assert 0 < fraction_removed(dense.config, widths) < 0.05


def test_a_table_of_one_layer_is_read_off_narrowed_models_alone():
    dense = tiny_llama(layers=1)
    assert dense_widths(dense.config) not in table_plans(dense)


@pytest.mark.parametrize("hiccup", [False, True])
def test_noise_of_few_percent_does_not_hide_a_tenth(measured, monkeypatch, hiccup):
    """Of long runs there are fewer pairs; and one that was disturbed while they warmed up does not make them long."""
    noise = random.Random(0)

    def timer(model, workload):
        seconds = (10 + total_price(TABLE.prices, widths_of(model.config))) / 30
        turns = itertools.count()
        return lambda: seconds * math.exp(noise.gauss(0, 0.035)) * (10 if hiccup and next(turns) == 1 else 1)

    monkeypatch.setattr(latency, "_model_timer", timer)
    for _ in range(20):
        speed_goal(tiny_llama(), 1.1)


def test_beyond_the_step_of_all_narrowed_models_the_speed_asked_for_is_reached(with_a_step, imaginary):
    dense = tiny_llama()
    goal = speed_goal(dense, 5)
    scores = made_up_scores(dense.config)
    widths = widths_at_speed(dense, goal, lambda price: widths_within(dense.config, scores, goal.prices, price))
    reached = imaginary["cost"](dense_widths(dense.config)) / imaginary["cost"](widths)
    assert reached == pytest.approx(5, rel=0.02)
    assert imaginary["comparisons"] == 4


@pytest.mark.parametrize(
    ("modules", "changed"), [(MODULES, "mlp"), (("qk", "vo"), "v_head_dim"), (("qk",), "qk_head_dim")]
)
def test_what_is_barely_narrowed_is_so_by_one_step_of_one_layer(modules, changed):
    dense = tiny_llama()
    first, *others = barely_narrowed(dense, modules)
    whole, *rest = dense_widths(dense.config)
    assert others == rest
    assert [name for name in vars(whole) if getattr(first, name) != getattr(whole, name)] == [changed]


@pytest.mark.parametrize(("seconds", "rounds"), [(0.0, 15), (0.001, 15), (1.25, 12), (100.0, 9)])
def test_what_takes_long_is_timed_less_often(monkeypatch, seconds, rounds):
    runs = []

    def timer(model, workload):
        return lambda: runs.append(model) or seconds + 1e-12

    monkeypatch.setattr(latency, "_model_timer", timer)
    dense, narrowed = tiny_llama(), tiny_llama()
    ratio = compared(dense, narrowed, Workload(context=4))
    assert (ratio.low, ratio.high) == (1, 1)
    assert len(runs) == 2 * (latency.WARM_UP + rounds)


def test_the_finished_model_is_timed(imaginary, monkeypatch):
    timed = []

    def compared(dense, narrowed, workload, *, progress=False):
        timed.append((narrowed, (narrowed.lm_head.weight == 7).all().item()))
        return Ratio(1.4, 1.3, 1.5)

    def train(model, shot):
        model = copy.deepcopy(model)
        torch.nn.init.constant_(model.lm_head.weight, 7)
        return model

    monkeypatch.setattr("transact.pipeline.compared", compared)
    recipe = replace(transact.PRESETS["best"], measurements=0)
    goal = speed_goal(tiny_llama(), 1.4)
    pruned = transact.prune(tiny_llama(), WINDOWS, recipe=recipe, speedup=goal, train=train)
    assert timed == [(pruned.model, True)]
    assert pruned.speed.median == 1.4


def test_what_else_the_machine_does_is_not_priced(monkeypatch):
    def disturbed(model, workload, *, with_head):  # in seven runs of ten it takes three times as long
        assert not with_head
        assert sum(parameter.numel() for parameter in model.get_input_embeddings().parameters()) == 48  # one token
        seconds, turns = seconds_by(TABLE, widths_of(model.config)), itertools.count()
        return lambda: seconds * (3 if next(turns) % 10 < 7 else 1)

    monkeypatch.setattr(latency, "_model_timer", disturbed)
    monkeypatch.setattr(latency, "TABLE_REPEATS", 40)
    monkeypatch.setattr(latency, "LONG_ENOUGH", 1e6)
    found = measured_table(tiny_llama(), Workload(context=4))
    assert asdict(found) == pytest.approx(asdict(TABLE))


def test_what_is_timed_runs_on_every_family(monkeypatch):
    """The real models, whatever they take."""
    monkeypatch.setattr(latency, "TABLE_REPEATS", 1)
    monkeypatch.setattr(latency, "MODEL_REPEATS", 1)
    monkeypatch.setattr(latency, "WARM_UP", 1)
    for dense in (tiny_llama("biases").train(), tiny_relative("mistral"), tiny_relative("qwen3").bfloat16()):
        before = torch.get_default_dtype()
        mode = dense.training
        for workload in (Workload(batch=2, context=12), Workload("prefill", context=12)):
            table = measured_table(dense, workload)
            whole, narrow = dense_widths(dense.config), narrowest_widths(dense, MODULES)
            for least, most in zip(table.prices(narrow[0]), table.prices(whole[0]), strict=True):
                assert 0 <= least <= most
            ratio = compared(dense, model_of_widths(dense, narrow), workload)
            assert ratio.median > 0
            assert ratio.verdict == "inconclusive"
        assert torch.get_default_dtype() == before
        assert dense.training == mode
        assert not hasattr(dense, "speed")


def prune_by_command(tiny_directory, tiny_text, out, *options: str) -> int:
    return main([
        "prune", str(tiny_directory), str(out), "--calibration", str(tiny_text), "--samples", "16", "--seq-len", "24",
        "--device", "cpu", *options,
    ])  # fmt: skip


def test_the_command_prints_and_records_the_measured_speed_up(imaginary, tiny_directory, tiny_text, tmp_path, capsys):
    options = ("--speedup", "1.4", "--speed-of", "prefill", "--speed-batch", "2", "--speed-context", "32")
    assert prune_by_command(tiny_directory, tiny_text, tmp_path / "out", *options) == 0
    printed = capsys.readouterr().out.splitlines()[-1]
    pruning = json.loads((tmp_path / "out" / "pruning.json").read_text())
    speed = pruning["speed"]
    assert (speed["tokens"], speed["batch"], speed["context"], speed["speedup_asked"]) == ("prefill", 2, 32, 1.4)
    assert speed["low"] < speed["speedup"] < speed["high"]
    assert speed["verdict"] == "faster"
    assert speed["device"]
    assert speed["threads"] == torch.get_num_threads()
    assert pruning["ratio_asked"] is None
    assert f"prefill of 2 x 32 tokens is {speed['speedup']:.2f} times as fast" in printed
    assert f"({speed['low']:.2f} to {speed['high']:.2f} at 95 %: faster), asked for 1.4" in printed


def test_the_command_says_where_the_speed_up_is_missed(
    imaginary, tiny_directory, tiny_text, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("transact.pipeline.compared", lambda *_, **__: Ratio(1.01, 0.9, 1.1))
    assert prune_by_command(tiny_directory, tiny_text, tmp_path / "out", "--speedup", "1.4") == 0
    captured = capsys.readouterr()
    assert "1.01 times as fast as the dense model's (0.90 to 1.10 at 95 %: inconclusive)" in captured.out
    assert "warning: the speed-up of 1.4 is missed by more than the noise of its measurement" in captured.err
    assert json.loads((tmp_path / "out" / "pruning.json").read_text())["speed"]["met"] is False


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (("--speedup", "0.8"), "speedup is how many times as fast and must be above 1, got 0.8"),
        (("--speedup", "nan"), "must be above 1, got nan"),
        (("--speedup", "1.3", "--ratio", "0.2"), "--speedup and --ratio or --mha-dim/--mlp-dim both say how much goes"),
        (("--speedup", "1.3", "--mlp-dim", "20"), "both say how much goes"),
        (("--speedup", "1.3", "--for", "plain"), "measured in transformers, not in engine 'plain'"),
        (("--speedup", "1.3", "--preset", "flap"), "not by allocation 'global'"),
        (("--speedup", "1.3", "--preset", "transact"), "not by allocation 'uniform'"),
        (("--speedup", "1.3", "--layerwise"), "drop --layerwise"),
        (("--speedup", "1.3", "--speed-of", "both"), "must be one of decode, prefill, got 'both'"),
        (("--speedup", "1.3", "--speed-batch", "0"), "batch to be timed must be at least 1, got 0"),
        (("--speedup", "1.3", "--speed-context", "4096"), "at most 120 tokens with this model, got 4096"),
        (("--speed-of", "decode"), "--speed-of is for a speed-up: give --speedup as well"),
        (("--speedup", "40"), "speedup 40.0 is out of reach: with the narrowest qk+vo+mlp decode is 3.88 times"),
    ],
)
def test_mistakes_are_one_line_before_long_work(
    imaginary, tiny_directory, tiny_text, tmp_path, capsys, monkeypatch, options, named
):
    monkeypatch.setattr("transact.pipeline._in_shots", lambda *_: pytest.fail("the work has begun"))
    if "out of reach" not in named:  # that is measured
        monkeypatch.setattr("transact.commands.prune.load_model", lambda *_, **__: pytest.fail("it was loaded"))
    assert prune_by_command(tiny_directory, tiny_text, tmp_path / "out", *options) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert named in line
    assert not (tmp_path / "out").exists()
