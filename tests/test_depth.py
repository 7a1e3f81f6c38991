"""Whole layers dropped: stock models of fewer layers, what makes up for them, and what is refused."""

import copy
import json
import math
import re
import shutil
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cosine_similarity
from transformers import AutoModelForCausalLM, LlamaForCausalLM

import transact
from bench.suite.cases import method_of, recipe_of
from bench.suite.grid import estimate
from bench.suite.workbench import Workbench
from tests.test_commands import assert_refused, quiet_transformers  # noqa: F401 (a fixture)
from tests.tiny import FAMILIES, tiny_llama, tiny_relative
from transact import PRESETS, Recipe, without_layers
from transact.__main__ import main
from transact.calibration import held_out_split
from transact.depth import (
    DEPTHS,
    block_influences,
    clustered_layers,
    layers_to_drop,
    least_influential,
    linear_cka,
    linear_map,
    nearest_run,
)
from transact.export import llama_by_layer, plain_llama
from transact.recovery import check_recoverable
from transact.walk import LayerWalk

WINDOWS = torch.randint(1, 97, (12, 24), generator=torch.Generator().manual_seed(1))
DEPTH = [name for name, recipe in PRESETS.items() if recipe.depth != "none"]
PLAIN = Recipe(depth="influence")  # ShortGPT without the repair


def tiny(variant: str = "gqa", layers: int = 5) -> torch.nn.Module:
    return tiny_llama(variant, layers=layers)


def family(name: str) -> torch.nn.Module:
    return tiny("gqa") if name == "llama" else tiny_relative(name, layers=5)


@torch.no_grad()
def logits(model, ids=WINDOWS) -> torch.Tensor:
    return model(input_ids=ids, use_cache=False).logits


@contextmanager
def replaced(model, maps: dict):
    """The dense model in which layers are no longer: each gives what its map makes of its input."""
    handles = [
        model.model.layers[layer].register_forward_hook(lambda module, inputs, output, own=own: own(inputs[0]))
        for layer, own in maps.items()
    ]
    yield model
    for handle in handles:
        handle.remove()


def streams_of(model) -> list[torch.Tensor]:
    """What enters the first layer, and what leaves each, by the model's own forward pass."""
    streams = []
    layers = model.model.layers
    with ExitStack() as stack:
        for layer in layers:
            handle = layer.register_forward_hook(lambda module, inputs, output: streams.append((inputs[0], output)))
            stack.callback(handle.remove)
        logits(model)
    return [streams[0][0], *(output for _, output in streams)]


def assert_close(found, wanted, tolerance=1e-4):
    scale = wanted.abs().max()
    torch.testing.assert_close(found / scale, wanted / scale, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["llama", *FAMILIES])
def test_fewer_layers_compute_what_the_dense_model_does_without_the_others(name):
    dense = family(name)
    fewer = without_layers(dense, [0, 2, 4])
    assert type(fewer) is type(dense)
    with replaced(dense, dict.fromkeys((1, 3), lambda hidden: hidden)):
        assert torch.equal(logits(fewer), logits(dense))
    assert dense.config.num_hidden_layers == 5
    options = {"do_sample": False, "max_new_tokens": 8, "eos_token_id": None}
    cached = fewer.generate(WINDOWS[:2], **options)
    assert torch.equal(cached, fewer.generate(WINDOWS[:2], **options, use_cache=False))
    own = {parameter.data_ptr() for parameter in fewer.parameters()}
    assert not own & {parameter.data_ptr() for parameter in dense.parameters()}


@pytest.mark.parametrize("kept", [[], [1, 1], [2, 1], [0, 5], [-1]])
def test_layers_that_cannot_be_kept_are_refused(kept):
    with pytest.raises(ValueError, match=r"kept must name some of layers 0 to 4, ascending, got \["):
        without_layers(tiny(), kept)


@pytest.mark.parametrize("variant", ["mha", "gqa", "tied", "biases", "llama3-rope"])
@pytest.mark.parametrize("preset", [*DEPTH, PLAIN], ids=str)
def test_presets_save_stock_checkpoints(preset, variant, tmp_path):
    dense = tiny(variant)
    before = copy.deepcopy(dense.state_dict())
    pruned = transact.prune(dense, WINDOWS, recipe=preset, ratio=0.4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    assert type(pruned.model) is type(dense)
    assert len(pruned.model.model.layers) == len(pruned.plan.kept_layers) == 3
    assert transact.fraction_removed(dense.config, pruned.plan.widths) == pytest.approx(0.4)
    assert transact.kv_fraction_removed(dense.config, pruned.plan.widths) == pytest.approx(0.4)
    transact.save_checkpoint(tmp_path / "out", pruned.model, pruned.plan, {})
    assert "auto_map" not in json.loads((tmp_path / "out" / "config.json").read_text())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=False)
    assert torch.equal(logits(loaded), logits(pruned.model))
    assert transact.load_plan(tmp_path / "out").kept_layers == pruned.plan.kept_layers


@pytest.mark.parametrize("preset", DEPTH)
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_loses_layers(name, preset, tmp_path):
    dense = family(name)
    pruned = transact.prune(dense, WINDOWS, recipe=preset, ratio=0.2)
    pruned.model.save_pretrained(tmp_path)
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path)), logits(pruned.model))
    assert len(pruned.plan.kept_layers) == 4


@pytest.mark.parametrize("preset", DEPTH)
def test_ratio_0_keeps_everything(preset):
    dense = tiny("tied")
    pruned = transact.prune(dense, WINDOWS, recipe=preset, ratio=0.0)
    assert torch.equal(logits(pruned.model), logits(dense))
    assert pruned.plan.kept_layers == (0, 1, 2, 3, 4)
    assert type(pruned.model) is type(dense)


# What is measured


@torch.no_grad()
def test_influences_and_growths_are_those_of_the_streams():
    dense, streams = tiny(), streams_of(tiny())
    found = list(block_influences(LayerWalk(dense, WINDOWS.split(5)), range(5), {}))
    assert [layer for layer, *_ in found] == [0, 1, 2, 3, 4]
    for (_, influence, growth, entered), (before, after) in zip(found, pairwise(streams), strict=True):
        assert_close(torch.cat(entered), before)
        assert influence == pytest.approx(1 - cosine_similarity(before, after, dim=-1).mean().item(), abs=1e-6)
        channels = after.abs().mean(dim=(0, 1)) / before.abs().mean(dim=(0, 1))
        assert growth == pytest.approx(channels.mean().item(), rel=1e-5)


def least_by_hand(dense, factors: dict[int, float]) -> tuple[int, float]:
    """The layer of least influence, and how much it makes the stream grow, in a model without those in `factors`."""
    with replaced(dense, {layer: lambda hidden, by=by: hidden * by for layer, by in factors.items()}):
        streams = streams_of(dense)
    influences = {
        layer: 1 - cosine_similarity(before, after, dim=-1).mean().item()
        for layer, (before, after) in enumerate(pairwise(streams))
        if layer not in factors
    }
    least = min(influences, key=influences.get)
    before, after = streams[least], streams[least + 1]
    return least, (after.abs().mean(dim=(0, 1)) / before.abs().mean(dim=(0, 1))).mean().item()


@pytest.mark.parametrize("repair", [False, True])
@pytest.mark.parametrize("variant", ["gqa", "tied", "biases"])
def test_influences_are_measured_again_without_what_went(variant, repair):
    dense, factors = tiny(variant, layers=7), {}
    for _ in range(6):
        layer, growth = least_by_hand(dense, factors)
        factors[layer] = growth if repair else 1.0
    found = least_influential(dense, WINDOWS, 6, repair=repair)
    assert list(found) == list(factors)
    assert list(found.values()) == pytest.approx(list(factors.values()), rel=1e-5)


@torch.no_grad()
def test_layers_before_the_one_that_went_are_not_computed_again():
    dense, computed = tiny(layers=7), []
    for layer, of in enumerate((2.0, 2.0, 2.0, 2.0, 0.2, 0.1, 2.0)):  # how much each writes
        for module in (dense.model.layers[layer].self_attn.o_proj, dense.model.layers[layer].mlp.down_proj):
            module.weight.mul_(of)
        dense.model.layers[layer].register_forward_hook(lambda *_, layer=layer: computed.append(layer))
    assert list(least_influential(dense, WINDOWS, 2, repair=False)) == [5, 4]
    assert computed.count(3) == computed.count(0) == computed.count(4) == 1
    assert computed.count(6) == 2


@pytest.mark.parametrize("variant", ["gqa", "tied", "biases"])
def test_the_repair_folded_is_the_repair_applied(variant):
    dense = tiny(variant)
    factors = least_influential(dense, WINDOWS, 2, repair=True)
    assert all(abs(math.log(factor)) > 1e-3 for factor in factors.values())
    pruned = transact.prune(dense, WINDOWS, recipe="shortgpt", ratio=0.4)
    assert set(pruned.plan.kept_layers) == set(range(5)) - set(factors)
    with replaced(dense, {layer: lambda hidden, by=by: hidden * by for layer, by in factors.items()}):
        assert_close(logits(pruned.model), logits(dense))
    plain = transact.prune(dense, WINDOWS, recipe=PLAIN, ratio=0.2)
    [gone] = set(range(5)) - set(plain.plan.kept_layers)
    with replaced(dense, {gone: lambda hidden: hidden}):
        assert torch.equal(logits(plain.model), logits(dense))


def test_channels_that_are_nothing_do_not_count():
    dense = tiny()
    with torch.no_grad():
        dense.model.embed_tokens.weight[:, 3] = 0
    factors = least_influential(dense, WINDOWS, 5, repair=True)
    assert all(map(math.isfinite, factors.values()))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_the_run_is_that_whose_ends_are_nearest(count):
    dense = tiny(layers=6)
    some = [stream[:, (WINDOWS.shape[1] - 1) % (count + 1) :: count + 1] for stream in streams_of(dense)]
    distances = {
        start: 1 - cosine_similarity(some[start], some[start + count], dim=-1).mean().item()
        for start in range(1, 7 - count)
    }
    start = min(distances, key=distances.get)
    assert nearest_run(dense, WINDOWS, count) == range(start, start + count)


def test_kernel_alignment_is_that_of_centred_kernels():
    generator = torch.Generator().manual_seed(0)
    one, other = torch.randn(2, 30, 8, generator=generator).double() + 2
    centring = torch.eye(30).double() - 1 / 30

    def shared(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return torch.trace(centring @ left @ left.T @ centring @ right @ right.T)

    rotated = one @ torch.linalg.qr(torch.randn(8, 8, generator=generator).double()).Q * 3
    found = linear_cka([one, other, rotated, torch.ones(30, 8).double()])
    wanted = shared(one, other) / (shared(one, one) * shared(other, other)).sqrt()
    assert found[0, 1].item() == pytest.approx(wanted.item(), rel=1e-5)
    assert found[0, 2].item() == pytest.approx(1, rel=1e-5)
    assert found[0, 3] == 0  # the same for all tokens: like nothing


def test_of_each_cluster_of_neighbours_the_middle_stays():
    dense = tiny(layers=7)
    some = [stream[:, (WINDOWS.shape[1] - 1) % 7 :: 7].flatten(0, 1) for stream in streams_of(dense)[1:]]
    alike = linear_cka(some)
    clusters = [[layer] for layer in range(7)]
    for count in range(1, 7):
        joint = [alike[one][:, other].mean() for one, other in pairwise(clusters)]
        place = joint.index(max(joint))
        clusters[place : place + 2] = [clusters[place] + clusters[place + 1]]
        middles = [cluster[(len(cluster) - 1) // 2] for cluster in clusters]
        assert clustered_layers(dense, WINDOWS, count) == middles


@pytest.mark.parametrize("ridge", [0.01, None])
def test_the_map_is_optimal(ridge):
    dense, run = tiny(), range(2, 4)
    windows = WINDOWS.repeat(2, 1)[:16] if ridge is None else WINDOWS
    fit = linear_map(dense, windows, run, ridge=ridge)
    parts = {}
    handles = [
        dense.model.layers[1].mlp.register_forward_hook(lambda m, i, output: parts.update(mlp=output)),
        dense.model.layers[1].register_forward_hook(lambda m, i, output: parts.update(before=output)),
        dense.model.layers[3].register_forward_hook(lambda m, i, output: parts.update(after=output)),
    ]
    logits(dense, torch.cat(held_out_split(windows)))
    for handle in handles:
        handle.remove()
    inputs, targets = parts["mlp"].double(), (parts["after"] - parts["before"] + parts["mlp"]).double()
    size = inputs.shape[-1]
    strength = inputs.square().mean(dim=(0, 1))

    def gradient(weight: torch.Tensor) -> torch.Tensor:
        weight = weight.detach().clone().requires_grad_(True)
        error = (targets - inputs @ weight.T).square().sum(dim=-1).mean()
        error = error + fit.ridge * (strength * (weight - torch.eye(size)).square()).sum()
        return torch.autograd.grad(error, weight)[0].abs().max()

    assert fit.ridge == ridge or fit.ridge in (10.0, 1.0, 1e-1, 1e-2, 1e-3)
    assert gradient(fit.weight) < 1e-4 * gradient(torch.eye(size, dtype=torch.float64))


@pytest.mark.parametrize("variant", ["gqa", "tied", "biases"])
def test_the_map_folded_is_the_map_applied(variant):
    dense = tiny(variant)
    pruned = transact.prune(dense, WINDOWS, recipe=replace(PRESETS["replaceme"], ridge=0.01), ratio=0.4)
    run = nearest_run(dense, WINDOWS, 2)
    assert pruned.plan.kept_layers == tuple(index for index in range(5) if index not in run)
    weight = linear_map(dense, WINDOWS, run, ridge=0.01).weight.float()
    assert pruned.ridges[run.start - 1] == {"down_proj": 0.01}
    handle = dense.model.layers[run.start - 1].mlp.register_forward_hook(lambda m, i, output: output @ weight.T)
    with replaced(dense, dict.fromkeys(run, lambda hidden: hidden)):
        assert_close(logits(pruned.model), logits(dense))
    handle.remove()
    assert not torch.allclose(weight, torch.eye(len(weight)), atol=1e-3)


@pytest.mark.parametrize("preset", DEPTH)
def test_block_by_block_is_the_same(preset):
    dense = tiny()
    pruned = transact.prune(dense, WINDOWS, recipe=preset, ratio=0.4)
    layerwise = transact.prune(dense, WINDOWS, recipe=preset, ratio=0.4, device=torch.device("cpu"))
    assert torch.equal(logits(layerwise.model), logits(pruned.model))


@pytest.mark.parametrize("preset", DEPTH)
def test_bfloat16_stays_bfloat16(preset):
    pruned = transact.prune(tiny().bfloat16(), WINDOWS, recipe=preset, ratio=0.4)
    assert {parameter.dtype for parameter in pruned.model.parameters()} == {torch.bfloat16}
    assert logits(pruned.model).isfinite().all()


def test_activations_that_are_not_finite_are_named():
    dense = tiny()
    with torch.no_grad():
        dense.model.layers[2].mlp.down_proj.weight.mul_(1e38)
    for preset in DEPTH:
        with pytest.raises(ValueError, match=r"layer 2: .* not finite"):
            transact.prune(dense, WINDOWS, recipe=preset, ratio=0.4)


# How many go


def test_the_nearest_number_of_layers_goes():
    config = tiny(layers=5).config
    for ratio, count in ((0.2, 1), (0.4, 2), (0.6, 3), (0.8, 4), (0.0, 0), (0.3, 1), (0.5, 2), (0.45, 2), (0.55, 3)):
        assert layers_to_drop(config, ratio) == count
    config.num_hidden_layers = 30
    assert [layers_to_drop(config, ratio) for ratio in (0.1, 0.2, 0.3, 0.5)] == [3, 6, 9, 15]


@pytest.mark.parametrize(
    ("ratio", "kept", "said"),
    [
        (0.3, 4, "ratio 0.3 is 1.5 of 5 layers: 1 of them removed, 0.200 of the linear parameters; 0.400 can be had"),
        (0.45, 3, "ratio 0.45 is 2.25 of 5 layers: 2 of them removed, 0.400 of the linear parameters; 0.600 can be"),
        (0.35, 3, "ratio 0.35 is 1.75 of 5 layers: 2 of them removed, 0.400 of the linear parameters; 0.200 can be"),
        (0.15, 4, "ratio 0.15 is 0.75 of 5 layers: 1 of them removed, 0.200 of the linear parameters$"),
        (0.85, 1, "ratio 0.85 is 4.25 of 5 layers: 4 of them removed, 0.800 of the linear parameters$"),
    ],
)
def test_a_ratio_between_layers_is_met_by_the_nearest_and_said(ratio, kept, said):
    with pytest.warns(UserWarning, match=said):
        pruned = transact.prune(tiny(), WINDOWS, recipe="shortgpt", ratio=ratio)
    assert len(pruned.plan.kept_layers) == kept


@pytest.mark.parametrize("preset", DEPTH)
def test_a_ratio_of_no_layer_or_of_all_is_refused_before_work(preset):
    dense = tiny()
    dense.model.forward = lambda *_, **__: pytest.fail("the model was run")
    with pytest.raises(ValueError, match=r"ratio 0\.05 is less than half a layer of 5: the least is 0\.2"):
        transact.prune(dense, WINDOWS, recipe=preset, ratio=0.05)
    with pytest.raises(ValueError, match=r"ratio 0\.95 leaves no layer of 5: the most is 0\.8"):
        transact.prune(dense, WINDOWS, recipe=preset, ratio=0.95)
    with pytest.raises(ValueError, match=r"ratio 0\.2 asks for layers to go, and the model has one"):
        transact.prune(tiny(layers=1), WINDOWS, recipe=preset, ratio=0.2)


# What does not go together


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"depth": "most"}, "unknown depth 'most', allowed: none, influence, run, clusters"),
        ({"depth": None}, "unknown depth None, allowed: none, influence, run, clusters"),
        ({"depth": []}, r"unknown depth \[\], allowed: none, influence, run, clusters"),
        ({"compensation": "linear"}, "depth 'influence' is made up for by none or magnitude, not by 'linear'"),
        ({"compensation": "pruned"}, "depth 'influence' is made up for by none or magnitude, not by 'pruned'"),
        ({"depth": "run", "compensation": "magnitude"}, "depth 'run' is made up for by none or linear, not by"),
        ({"depth": "none"}, "compensation 'magnitude' makes up for dropped layers, and none are: depth is 'none'"),
        ({"criterion": "wanda"}, "depth 'influence' drops whole layers: criterion is for narrowing, got 'wanda'"),
        ({"modules": ("mlp",)}, r"modules is for narrowing, got \('mlp',\)"),
        ({"engine": "plain"}, "engine is for narrowing, got 'plain'"),
        ({"shots": 2}, "shots is for narrowing, got 2"),
        ({"measurements": 1}, "measurements is for narrowing, got 1"),
        ({"output_bias": True}, "output_bias is for narrowing, got True"),
        ({"allocation": "searched"}, "allocation is for narrowing, got 'searched'"),
        ({"ridge": 0.1}, "a ridge is for compensation by least squares: dense, pruned or linear, not magnitude"),
    ],
)  # fmt: skip
def test_recipes_that_exclude_each_other(changes, complaint):
    with pytest.raises(ValueError, match=complaint):
        transact.prune(tiny(), WINDOWS, recipe=replace(PRESETS["shortgpt"], **changes), ratio=0.2)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"kv_ratio": 0.3}, "kv-ratio is for narrowing, depth 'influence' drops whole layers: leave it out"),
        ({"speedup": 1.2, "ratio": None}, "reached by widths that are searched, not by depth 'influence'"),
        ({"widths": transact.dense_widths(tiny_llama().config), "ratio": None}, "widths are for narrowing, depth 'in"),
    ],
)
def test_budgets_that_layers_do_not_have_are_refused_before_work(options, complaint):
    dense = tiny()
    dense.model.forward = lambda *_, **__: pytest.fail("the model was run")
    with pytest.raises(ValueError, match=complaint):
        transact.prune(dense, **{"windows": WINDOWS, "ratio": 0.2, **options}, recipe="shortgpt")


def test_what_it_is_measured_on_is_text():
    with pytest.raises(ValueError, match="depth 'influence' needs windows of text"):
        transact.prune(tiny(), recipe="shortgpt", ratio=0.2)
    dense = tiny()
    statistics = transact.calibrate(dense, WINDOWS)
    with pytest.raises(ValueError, match="statistics are for narrowing, depth 'influence' drops whole layers: leave"):
        transact.prune(dense, WINDOWS, recipe="shortgpt", ratio=0.2, statistics=statistics)


def test_every_way_of_dropping_has_a_preset_or_is_plain():
    made = {(recipe.depth, recipe.compensation) for recipe in (*PRESETS.values(), PLAIN)}
    assert {depth for depth, _ in made} == {"none", *DEPTHS}


# What comes after


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("preset", DEPTH)
def test_exports_hold_them(preset, name):
    dense = family(name)
    pruned = transact.prune(dense, WINDOWS, recipe=preset, ratio=0.4).model
    for export in (plain_llama, llama_by_layer):
        exported = export(pruned)
        assert exported.config.num_hidden_layers == 3
        assert_close(logits(exported), logits(pruned))
    assert type(plain_llama(pruned)) is LlamaForCausalLM
    with pytest.raises(ValueError, match="a pruned checkpoint is exported, this one is of type"):
        plain_llama(dense)


@pytest.mark.parametrize("variant", ["gqa", "tied"])
def test_exports_keep_a_head_that_is_the_embedding(variant):
    pruned = transact.prune(tiny(variant), WINDOWS, recipe="shortgpt", ratio=0.2).model
    plain = plain_llama(pruned)
    assert plain.num_parameters() == pruned.num_parameters()
    assert torch.equal(logits(plain), logits(pruned))


def test_exports_refuse_what_a_llama_has_not():
    pruned = transact.prune(family("qwen3"), WINDOWS, recipe="shortgpt", ratio=0.2).model
    with pytest.raises(ValueError, match="the model has query-key norms, a plain Llama has none"):
        plain_llama(pruned)


def test_they_are_pruned_again_and_trained():
    dense = tiny()
    fewer = transact.prune(dense, WINDOWS, recipe="shortgpt", ratio=0.4).model
    least = transact.prune(fewer, WINDOWS, recipe="shortgpt", ratio=1 / 3)
    assert least.model.config.kept_layers == [fewer.config.kept_layers[layer] for layer in least.plan.kept_layers]
    narrow = transact.prune(fewer, WINDOWS, recipe="transact", ratio=0.3).model
    assert len(narrow.model.layers) == 3
    assert narrow.model.config.kept_layers == fewer.config.kept_layers
    training = transact.Training(tokens=4 * 24, batch=4, way="full", learning_rate=1e-3)
    before = logits(fewer)
    recovered = transact.recover(fewer, WINDOWS, training)
    assert not torch.equal(logits(recovered.model), before)
    with pytest.raises(ValueError, match="the model is not pruned"):
        check_recoverable(dense, training, None)
    by_layer = replace(training, way="distillation", layer_weight=0.1)
    with pytest.raises(ValueError, match="layer-weight needs a teacher with the model's layers"):
        check_recoverable(fewer, by_layer, dense)


def test_training_follows_in_the_same_call():
    shots = []
    pruned = transact.prune(tiny(), WINDOWS, recipe="shortgpt", ratio=0.2,
                            train=lambda model, shot: shots.append(shot) or model)  # fmt: skip
    assert shots == [1]
    assert "train" in pruned.seconds


@pytest.fixture(scope="module")
def directory(tiny_directory, tmp_path_factory) -> Path:
    """A checkpoint of the tiny Llama with five layers, beside the tokeniser of the other."""
    copy = shutil.copytree(tiny_directory, tmp_path_factory.mktemp("models") / "five")
    tiny().save_pretrained(copy)
    return copy


@pytest.fixture
def prune(directory, tiny_text, tmp_path):
    def run(*arguments: str, model: Path = directory) -> int:
        settings = ["--calibration", str(tiny_text), "--samples", "8", "--seq-len", "32", "--device", "cpu"]
        return main(["prune", str(model), str(tmp_path / "out"), *settings, *arguments])

    return run


@pytest.mark.parametrize("preset", DEPTH)
@pytest.mark.parametrize("where", [[], ["--layerwise"]], ids=str)
def test_presets_by_command(prune, preset, where, tmp_path, capsys):
    assert prune("--preset", preset, "--ratio", "0.4", *where) == 0
    said = capsys.readouterr()
    assert "40.0% of the decoder layers' linear parameters and 40.0% of the KV cache removed" in said.out
    assert "warning" not in said.err
    pruning = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert (pruning["fraction_removed"], pruning["layers_before"]) == (pytest.approx(0.4), 5)
    assert len(pruning["kept_layers"]) == len(pruning["layers"]) == 3
    assert pruning["criterion"] is None
    assert pruning["recipe"]["depth"] == PRESETS[preset].depth
    assert main(["inspect", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    kept = next(line for line in printed.splitlines() if "of the dense model" in line)
    assert [int(number) for number in re.findall(r"\d+", kept)][-1] == pruning["kept_layers"][-1]
    assert f"40.0% of the linear parameters of the decoder layers of {pruning['model']} removed" in printed
    assert "held by transformers, " in printed


def test_a_checkpoint_that_says_nothing_of_its_pruning_is_inspected(prune, tmp_path, capsys):
    assert prune("--preset", "shortgpt", "--ratio", "0.4") == 0
    (tmp_path / "out" / "pruning.json").write_text("{}")  # as callers of `save_checkpoint` may have it
    assert main(["inspect", str(tmp_path / "out")]) == 0
    assert "of the decoder layers of the dense model removed" in capsys.readouterr().out


def test_layers_that_go_in_two_prunings_are_a_part_of_those_that_were_left(prune, tmp_path, capsys):
    assert prune("--preset", "shortgpt", "--ratio", "0.4") == 0
    out, again = tmp_path / "out", tmp_path / "again"
    out.rename(again)
    assert prune("--preset", "shortgpt", "--ratio", "0.333333", model=again) == 0
    capsys.readouterr()
    assert main(["inspect", str(out)]) == 0
    assert f"33.3% of the linear parameters of the decoder layers of {again} removed" in capsys.readouterr().out


@pytest.mark.filterwarnings("always:ratio .* of 5 layers")
def test_a_ratio_between_layers_is_one_line_of_a_command(prune, tmp_path, capsys):
    assert prune("--preset", "shortgpt", "--ratio", "0.3") == 0
    said = capsys.readouterr().err
    assert said.count("warning: ratio 0.3 is 1.5 of 5 layers: 1 of them removed, 0.200 of the linear parameters") == 1
    pruning = json.loads((tmp_path / "out" / "pruning.json").read_text())
    assert (pruning["ratio_asked"], pruning["fraction_removed"]) == (0.3, pytest.approx(0.2))


def test_plain_shortgpt_by_command(prune, tmp_path):
    assert prune("--depth", "influence", "--ratio", "0.2") == 0
    recipe = json.loads((tmp_path / "out" / "pruning.json").read_text())["recipe"]
    assert (recipe["depth"], recipe["compensation"], recipe["criterion"]) == ("influence", "none", "activation")


def test_commands_go_on_from_there(prune, tiny_text, tmp_path, capsys):
    out = str(tmp_path / "out")
    assert prune("--preset", "replaceme", "--ratio", "0.4") == 0
    assert main(["export", out, str(tmp_path / "plain")]) == 0
    assert "(40.0% of the linear ones removed)" in capsys.readouterr().out
    narrow, plain = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("out", "plain"))
    assert torch.equal(logits(narrow), logits(plain))
    text = ["--text", str(tiny_text), "--train-seq-len", "32", "--tokens", "512", "--device", "cpu"]
    assert main(["recover", out, str(tmp_path / "trained"), *text]) == 0
    assert transact.load_plan(tmp_path / "trained").kept_layers == transact.load_plan(out).kept_layers
    assert main(["inspect", str(tmp_path / "trained")]) == 0


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--kv-ratio", "0.3"], "kv-ratio is for narrowing, depth 'influence' drops whole layers"),
        (["--mlp-dim", "24"], "widths are for narrowing, depth 'influence' drops whole layers"),
        (["--speedup", "1.3"], "reached by widths that are searched, not by depth 'influence'"),
        (["--for", "plain"], "engine is for narrowing, got 'plain'"),
        (["--shots", "2"], "shots is for narrowing, got 2"),
        (["--criterion", "wanda"], "criterion is for narrowing, got 'wanda'"),
        (["--depth", "most"], "unknown depth 'most', allowed: none, influence, run, clusters"),
        (["--compensation", "bias"], "depth 'influence' is made up for by none or magnitude, not by 'bias'"),
        (["--tokens", "512", "--way", "distillation", "--layer-weight", "0.1"], "--layer-weight compares layer by"),
    ],
)  # fmt: skip
def test_options_that_do_not_go_with_it_are_refused_before_the_model(options, named, prune, capsys, monkeypatch):
    monkeypatch.setattr("transact.commands.prune.load_model", lambda *_, **__: pytest.fail("the model was loaded"))
    assert_refused(lambda: prune("--preset", "shortgpt", *options), named, capsys)


def test_ratios_out_of_reach_are_one_line(prune, capsys):
    assert_refused(lambda: prune("--preset", "shortgpt", "--ratio", "0.95"), "leaves no layer of 5", capsys)
    assert_refused(lambda: prune("--preset", "replaceme", "--ratio", "0.05"), "is less than half a layer of 5", capsys)


@pytest.fixture
def bench(directory, tiny_text) -> Workbench:
    return Workbench(
        str(directory), calibration=str(tiny_text), samples=8, calibration_seq_len=32, evaluation=str(tiny_text),
        windows=4, evaluation_seq_len=32, dtype="float32", device="cpu",
    )  # fmt: skip


def test_they_are_measured_beside_the_others(bench):
    cases = [bench.case(preset, 0.4) for preset in DEPTH]
    assert [method_of(case) for case in cases] == DEPTH
    assert [recipe_of(case) for case in cases] == [PRESETS[preset] for preset in DEPTH]
    assert method_of(bench.case(PLAIN, 0.4)) == "influence, none"
    for case in cases:
        record = bench.measure(case)
        assert record.metrics["fraction_removed"] == record.metrics["kv_fraction_removed"] == pytest.approx(0.4)
        assert len(record.widths) == 3
        assert "calibrate_s" not in record.metrics
    assert estimate(cases, [], 10**6).seconds > 0
    for refused in ({"ratio": 0.05}, {"ratio": 0.95}, {"mha_dim": 48}, {"ratio": 0.4, "kv_ratio": 0.5}):
        with pytest.raises(ValueError, match=r"layer"):
            bench.case("shortgpt", **refused)
