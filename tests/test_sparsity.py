"""2:4 zeros: the groups that are saved, whose scores decide, what stays as it was, and what is refused before work."""

import copy
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

import transact
from bench.efficiency.semi_structured import semi_structured
from bench.suite.workbench import Workbench
from tests.tiny import VARIANTS, tiny_llama
from transact import Recipe, Widths
from transact.__main__ import main
from transact.recovery.held_out import held_out_loss, hold_out
from transact.sparsity import check_sparse_widths, is_sparse, linears_of, make_sparse, zero_fraction
from transact.texts import text_source

WINDOWS = torch.randint(1, 97, (8, 16), generator=torch.Generator().manual_seed(0))
KINDS = ("wanda-2:4", "magnitude-2:4")
NARROW = (Widths(2, 12, 8, 20), Widths(2, 8, 10, 28))


def preset(name: str) -> dict:
    """The fields of a preset but for its sparsity."""
    return {field: value for field, value in vars(transact.PRESETS[name]).items() if field != "sparsity"}


def by_hand(weight: torch.Tensor, norms: torch.Tensor) -> torch.Tensor:
    """The weight with two of every four inputs of each row zeroed, written with loops."""
    result = weight.detach().clone()
    for row in range(len(weight)):
        for start in range(0, weight.shape[1], 4):
            places = range(start, start + 4)
            ranked = sorted(places, key=lambda place, row=row: (weight[row, place].abs() * norms[place]).item())
            result[row, ranked[:2]] = 0
    return result


def groups_of(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """How many of every four consecutive inputs are zero, in all linear modules of the decoder."""
    linear = [tensor for name, tensor in weights.items() if "_proj.weight" in name]
    return torch.cat([(one == 0).view(-1, 4).sum(dim=1) for one in linear])


def inputs_of(model, linear) -> torch.Tensor:
    seen = []
    handle = linear.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with torch.no_grad():
        model(input_ids=WINDOWS)
    handle.remove()
    return seen[0].flatten(0, 1)


@pytest.mark.parametrize("sparsity", KINDS)
@pytest.mark.parametrize("layerwise", [False, True])
def test_every_four_of_a_saved_model_hold_two_zeros(sparsity, layerwise, tiny_directory, tiny_text, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["prune", str(tiny_directory), str(out), "--ratio", "0", "--sparsity", sparsity, "--samples", "8",
                 "--seq-len", "32", "--calibration", str(tiny_text), "--device", "cpu",
                 *["--layerwise"] * layerwise]) == 0  # fmt: skip
    weights, dense = load_file(out / "model.safetensors"), load_file(tiny_directory / "model.safetensors")
    assert (groups_of(weights) == 2).all()
    for name, tensor in dense.items():
        kept = (weights[name] != 0) if "_proj.weight" in name else torch.ones_like(tensor, dtype=torch.bool)
        assert torch.equal(weights[name][kept], tensor[kept])
    pruning = json.loads((out / "pruning.json").read_text())
    assert (pruning["zeros"], pruning["fraction_removed"], pruning["recipe"]["sparsity"]) == (0.5, 0.0, sparsity)
    assert pruning["parameters_before"] == pruning["parameters_after"]
    said = capsys.readouterr().out
    assert f"50.0% of the linear weights that are left are zero, {sparsity}" in said
    assert "0.0% of the decoder layers' linear parameters" in said


def test_what_is_told_of_training_is_told_again_of_the_zeros_made_after_it(tiny_directory, tiny_text, tmp_path, capsys):
    out = tmp_path / "out"
    assert main(["prune", str(tiny_directory), str(out), "--ratio", "0", "--preset", "transact", "--samples", "8",
                 "--seq-len", "32", "--calibration", str(tiny_text), "--text", str(tiny_text), "--train-seq-len", "32",
                 "--tokens", "1k", "--way", "full", "--sparsity", "magnitude-2:4", "--device", "cpu"]) == 0  # fmt: skip
    model, tokenizer = transact.load_model(str(out), device="cpu")
    _, held_out = hold_out(text_source(str(tiny_text), tokenizer, length=32).windows)
    measured = held_out_loss(model, held_out)["held_out_perplexity"]
    pruning = json.loads((out / "pruning.json").read_text())
    assert pruning["held_out_perplexity_with_zeros"] == pytest.approx(measured, rel=1e-6)
    assert f", and {measured:,.2f} with the zeros made after it" in capsys.readouterr().out
    *_, last = (row for row in pruning["recovery"][0]["history"] if "held_out_perplexity" in row)
    assert measured != pytest.approx(last["held_out_perplexity"], rel=1e-3)


def test_an_export_whose_padding_breaks_the_pattern_says_so(tmp_path, tiny_directory, capsys):
    dense = transact.load_model(str(tiny_directory), device="cpu")
    widths = (Widths(2, 8, 6, 20), Widths(2, 8, 8, 28))
    pruned = transact.prune(dense[0], recipe=Recipe(criterion="magnitude", sparsity="magnitude-2:4"), widths=widths)
    transact.save_checkpoint(tmp_path / "out", pruned.model, pruned.plan, {}, tokenizer=dense[1])
    assert main(["export", str(tmp_path / "out"), str(tmp_path / "padded"), "--pad"]) == 0
    assert "the export is no longer 2:4" in capsys.readouterr().err
    assert not is_sparse(transact.load_model(str(tmp_path / "padded"), device="cpu")[0])


@pytest.mark.gpu
@pytest.mark.parametrize("sparsity", KINDS)
def test_zeros_that_a_gpu_makes_block_by_block_stay(sparsity):
    model, expected = (tiny_llama("gqa") for _ in range(2))
    make_sparse(expected, sparsity, WINDOWS)
    make_sparse(model, sparsity, WINDOWS, device=torch.device("cuda"))
    assert zero_fraction(model) == 0.5
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor)


def test_magnitude_keeps_the_largest_weights_and_needs_no_text():
    dense = tiny_llama("gqa")
    recipe = Recipe(criterion="magnitude", sparsity="magnitude-2:4")
    model = transact.prune(dense, recipe=recipe, ratio=0.0).model
    for layer, before in zip(model.model.layers, dense.model.layers, strict=True):
        for linear, whole in zip(linears_of(layer), linears_of(before), strict=True):
            assert torch.equal(linear.weight, by_hand(whole.weight, torch.ones(whole.in_features)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_wanda_weighs_by_the_norms_of_inputs_behind_sparse_layers(variant):
    dense = tiny_llama(variant)
    model = transact.prune(dense, WINDOWS, recipe=Recipe(criterion="magnitude", sparsity="wanda-2:4"), ratio=0.0).model
    reference = copy.deepcopy(dense)
    for index, layer in enumerate(reference.model.layers):
        norms = [inputs_of(reference, linear).norm(dim=0) for linear in linears_of(layer)]
        for linear, one, mine in zip(linears_of(layer), norms, linears_of(model.model.layers[index]), strict=True):
            linear.weight.data = by_hand(linear.weight, one)
            assert torch.equal(mine.weight, linear.weight)
            assert linear.bias is None or torch.equal(mine.bias, linear.bias)


@pytest.mark.parametrize("sparsity", KINDS)
def test_a_narrowed_model_becomes_sparse_after_all_else(sparsity):
    dense = tiny_llama("gqa")
    recipe = Recipe(criterion="activation", compensation="bias")
    narrow = transact.prune(dense, WINDOWS, recipe=recipe, widths=NARROW).model
    trained = []
    pruned = transact.prune(dense, WINDOWS, recipe=replace(recipe, sparsity=sparsity), widths=NARROW,
                            train=lambda model, shot: trained.append(zero_fraction(model)) or model)  # fmt: skip
    assert trained == [0.0]
    assert transact.widths_of(pruned.model.config) == NARROW
    assert "sparsify" in pruned.seconds
    for name, tensor in pruned.model.state_dict().items():
        kept = tensor != 0
        assert torch.equal(tensor[kept], narrow.state_dict()[name][kept])
    assert (groups_of(pruned.model.state_dict()) == 2).all()
    assert is_sparse(pruned.model)
    assert not is_sparse(narrow)


def test_ties_and_zeros_leave_two_of_four():
    model = tiny_llama("gqa")
    for layer in model.model.layers:
        for linear in linears_of(layer):
            linear.weight.data.fill_(1.0)
    make_sparse(model, "magnitude-2:4")
    assert zero_fraction(model) == 0.5
    assert is_sparse(model)


def test_inputs_that_are_not_finite_are_named():
    model = tiny_llama("gqa")
    model.model.layers[1].input_layernorm.weight.data.fill_(torch.inf)
    with pytest.raises(ValueError, match="layer 1: the activations are not finite"):
        make_sparse(model, "wanda-2:4", WINDOWS)


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"sparsity": "4:8"}, {}, "unknown sparsity '4:8', allowed: none, wanda-2:4, magnitude-2:4"),
        ({"sparsity": None}, {}, "unknown sparsity None"),
        ({}, {"widths": [Widths(2, 12, 8, 21)] * 2}, "which 21 of down_proj do not divide into: name --mlp-dim"),
        ({}, {"widths": [Widths(2, 12, 9, 20)] * 2}, "which 54 of o_proj do not divide into: name --mha-dim"),
        (preset("best"), {"ratio": 0.3}, "of down_proj do not divide into: name --mlp-dim"),
        (preset("flap"), {"ratio": 0.3}, "which allocation 'global' does not give"),
        ({}, {"windows": None, "ratio": 0.0}, "need windows of text"),
    ],
)
def test_refused_before_anything_is_calibrated(changes, options, message, monkeypatch):
    monkeypatch.setattr("transact.pipeline.iterate_statistics", None)
    recipe = replace(Recipe(criterion="magnitude", sparsity="wanda-2:4"), **changes)
    with pytest.raises(ValueError, match=message) as error:
        transact.prune(tiny_llama("gqa"), recipe=recipe, **{"windows": WINDOWS} | options)
    assert "\n" not in str(error.value)


def test_hidden_sizes_that_do_not_come_in_fours_are_refused():
    config = tiny_llama("gqa").config
    config.hidden_size = 50
    with pytest.raises(ValueError, match="which 50 of hidden states do not divide into"):
        check_sparse_widths("wanda-2:4", config, NARROW)


def test_training_would_fill_the_zeros():
    model = transact.prune(tiny_llama("gqa"), recipe=Recipe(criterion="magnitude", sparsity="magnitude-2:4"), ratio=0.0)
    for way in ("full", "lora", "lozo"):
        with pytest.raises(ValueError, match="training would fill the zeros"):
            transact.recover(model.model, WINDOWS, transact.Training(tokens=128, way=way))


def test_commands_refuse_in_one_line(tiny_directory, tiny_text, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("transact.commands.prune.calibration_sources", None)
    for more, message in [
        (["--sparsity", "2:4"], "unknown sparsity '2:4'"),
        (["--sparsity", "wanda-2:4", "--mlp-dim", "30"], "a multiple of 4"),
        (["--sparsity", "wanda-2:4", "--preset", "flap"], "which allocation 'global' does not give"),
    ]:
        assert main(["prune", str(tiny_directory), str(tmp_path / "out"), "--device", "cpu", *more]) == 2
        assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_records_count_zeros_apart_from_what_is_removed(tiny_directory, tiny_text, capsys):
    bench = Workbench(str(tiny_directory), calibration=str(tiny_text), samples=8, calibration_seq_len=32,
                      evaluation=str(tiny_text), windows=4, evaluation_seq_len=32, dtype="float32",
                      device="cpu")  # fmt: skip
    masked = bench.measure(bench.case(Recipe(sparsity="wanda-2:4"), 0.0, decode_tokens=2))
    assert (masked.method, masked.metrics["zeros"], masked.metrics["fraction_removed"]) == ("wanda-2:4", 0.5, 0.0)
    assert masked.metrics["parameters"] == bench.dense.num_parameters()
    assert masked.metrics["kl_nats"] > 0
    assert "2:4 zeros save no time here" in capsys.readouterr().err
    both = bench.case(Recipe(sparsity="magnitude-2:4"), mlp_dim=20)
    both = bench.measure(both)
    assert both.method == "transact, magnitude-2:4"
    assert both.metrics["fraction_removed"] > 0
    with pytest.raises(ValueError, match="a multiple of 4"):
        bench.case(Recipe(sparsity="wanda-2:4"), mlp_dim=22)


def test_that_zeros_save_no_time_is_said_where_no_kernel_skips_them():
    with pytest.raises(ValueError, match="save no time here: kernels that skip them need a CUDA device"):
        semi_structured(tiny_llama("gqa"))


@pytest.mark.gpu
def test_kernels_that_skip_zeros_compute_the_same():
    dense = tiny_llama("gqa")
    config = dense.config
    config.hidden_size, config.intermediate_size, config.num_attention_heads, config.num_key_value_heads = 64, 128, 8, 4
    model = type(dense)(config).to("cuda", torch.float16).eval()
    make_sparse(model, "magnitude-2:4")
    compressed = semi_structured(model)
    ids = WINDOWS.to("cuda")
    with torch.no_grad():
        expected, given = model(input_ids=ids).logits, compressed(input_ids=ids).logits
    torch.testing.assert_close(given, expected, rtol=1e-2, atol=1e-2)
