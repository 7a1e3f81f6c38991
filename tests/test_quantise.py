"""Quantised models: near the float ones by their bits, as large as a formula says, and never confused with them."""

import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch

import transact
from bench.__main__ import main
from bench.efficiency.memory import weight_bytes
from bench.efficiency.quantise import FORMATS, check_format, group_of, packed_weight_bytes
from bench.suite.cases import pruning_of, weights_of
from bench.suite.grid import in_order
from bench.suite.workbench import Workbench
from tests.tiny import random_plan, tiny_llama, tiny_relative

IDS = torch.arange(1, 90)[None]


def quantised(model, name):
    pytest.importorskip("torchao")
    from bench.efficiency.quantise import quantised

    return quantised(model, name)


def narrowed(variant: str) -> torch.nn.Module:
    """A tiny model with other, odd widths in every layer."""
    dense = tiny_llama(variant)
    return transact.apply_plan(dense, random_plan(dense.config, seed=3))


MODELS = {
    "dense": lambda: tiny_llama("gqa"), "gqa, odd widths": lambda: narrowed("gqa"),
    "mha, odd widths": lambda: narrowed("mha"), "biases, odd widths": lambda: narrowed("biases"),
    "tied": lambda: tiny_llama("tied"), "qwen3": lambda: tiny_relative("qwen3"),
}  # fmt: skip


@pytest.fixture(params=MODELS, ids=str)
def model(request) -> torch.nn.Module:
    return MODELS[request.param]()


def linears_of(model) -> dict[str, torch.nn.Linear]:
    found = {name: part for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)}
    return {name: part for name, part in found.items() if name != "lm_head"}


@torch.no_grad()
def test_every_weight_is_within_a_step_of_its_own(model):
    for name, levels in (("int8", 255), ("int4", 15)):
        copied = quantised(model, name)
        for path, linear in linears_of(model).items():
            weight, after = linear.weight, copied.get_submodule(path).weight.dequantize()
            inputs = weight.shape[1]
            group = inputs if name == "int8" else group_of(inputs) or inputs
            rows = weight.reshape(weight.shape[0], -1, group)
            low, high = rows.amin(-1, keepdim=True).clamp(max=0), rows.amax(-1, keepdim=True).clamp(min=0)
            span = 2 * rows.abs().amax(-1, keepdim=True) if name == "int8" else high - low
            error = (after.reshape(rows.shape) - rows).abs()
            assert (error <= 1.05 * span / levels + 1e-6).all(), path


@torch.no_grad()
def test_outputs_are_near_and_fewer_bits_are_worse(model):
    def outputs(one, linear):
        inputs = torch.randn(64, linear.in_features, generator=torch.Generator().manual_seed(0))
        return one(inputs)

    for path, linear in linears_of(model).items():
        if linear.in_features < 4:
            continue  # few weights may happen to lie on the grid
        exact = outputs(linear, linear)
        errors = [
            ((outputs(quantised_linear, linear) - exact).norm() / exact.norm()).item()
            for quantised_linear in (quantised(model, name).get_submodule(path) for name in FORMATS)
        ]
        assert errors[0] < 0.02
        assert errors[0] < errors[1] < 0.2


@torch.no_grad()
def test_embeddings_and_the_original_stay_as_they_are(model):
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    untouched = [name for name, part in before.items() if part.ndim == 1 or "layers" not in name]
    for name in FORMATS:
        copied = dict(quantised(model, name).named_parameters())
        assert all(torch.equal(copied[part], before[part]) for part in untouched)
        assert all(type(copied[f"{path}.weight"]) is not torch.nn.Parameter for path in linears_of(model))
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


def test_bytes_are_what_the_formats_hold(model):
    linears = linears_of(model).values()
    shapes = [linear.weight.shape for linear in linears]
    others = weight_bytes(model) - sum(4 * rows * columns for rows, columns in shapes)
    int8, int4 = (quantised(model, name) for name in FORMATS)
    symmetric = sum(rows * columns + rows * (4 + 1) for rows, columns in shapes)  # scale, and a zero point of zero
    assert weight_bytes(int8) == packed_weight_bytes(int8) == others + symmetric
    groups = [rows * columns // (group_of(columns) or columns) for rows, columns in shapes]
    unpacked = sum(rows * columns + count * (2 + 1) for (rows, columns), count in zip(shapes, groups, strict=True))
    assert weight_bytes(int4) == others + unpacked
    assert packed_weight_bytes(int4) == weight_bytes(int4) - sum(rows * columns // 2 for rows, columns in shapes)
    assert packed_weight_bytes(model) == weight_bytes(model)


def test_groups_are_the_largest_that_divide():
    assert [group_of(inputs) for inputs in (576, 48, 72, 9 * 40, 36, 7)] == [32, 16, 8, 8, None, None]


def test_unknown_formats_and_a_missing_library_are_one_line(monkeypatch):
    with pytest.raises(ValueError, match="unknown quantisation 'int2', allowed: int8, int4"):
        check_format("int2")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"'int8' needs torchao: python -m pip install 'torchao>=0\.18'"):
        check_format("int8")


@pytest.mark.filterwarnings("ignore:.* calibration tokens are few")
def test_a_model_is_pruned_once_and_its_formats_share_no_figures(tiny_directory, tiny_text, monkeypatch):
    pytest.importorskip("torchao")
    bench = Workbench(
        str(tiny_directory), calibration=str(tiny_text), samples=8, calibration_seq_len=32, evaluation=str(tiny_text),
        windows=4, evaluation_seq_len=32, dtype="float32", device="cpu",
    )  # fmt: skip
    prunings, prune = Counter(), transact.prune

    def counting(*arguments, **options):
        prunings["all"] += 1
        return prune(*arguments, **options)

    monkeypatch.setattr(transact, "prune", counting)
    formats = ("", *FORMATS)
    cases = [bench.with_quantisation(bench.dense_case, name) for name in formats]
    cases += [bench.case("wanda-sp", 0.3)]  # between the others: the order puts it elsewhere
    cases += [bench.case("transact", 0.3, quantisation=name, decode_tokens=2) for name in formats]
    cases += [bench.case("transact", 0.3)]
    records = {one: bench.measure(one) for one in in_order(cases)}
    assert prunings["all"] == 2
    for group in (cases[:3], cases[4:7]):
        assert len({records[one].losses for one in group}) == 3
        assert len({records[one].metrics["weight_bytes"] for one in group}) == 3
    assert records[cases[4]].losses == records[cases[7]].losses
    assert all(records[one].metrics["decode_tokens_per_s"] > 0 for one in cases[4:7])
    assert records[cases[5]].environment["torchao"]
    assert "torchao" not in records[cases[4]].environment
    assert len({pruning_of(one) for one in cases}) == 3
    assert len({weights_of(one) for one in cases}) == 7
    assert replace(cases[5], quantisation="", decode_tokens=0) == cases[7]
    assert "torchao.quantization" in sys.modules
    with pytest.raises(ValueError, match="unknown quantisation 'int2'"):
        bench.case("transact", 0.3, quantisation="int2")


def test_the_command_prints_one_row_a_format(tiny_directory, tiny_text, capsys):
    settings = ["--text", str(tiny_text), "--windows", "2", "--seq-len", "32", "--decode", "2", "--device", "cpu"]
    assert main(["quantise", str(tiny_directory), "--formats", "int3", *settings]) == 2
    assert capsys.readouterr().err.splitlines() == ["bench: error: unknown quantisation 'int3', allowed: int8, int4"]
    pytest.importorskip("torchao")
    assert main(["quantise", str(tiny_directory), "--dense", str(tiny_directory), *settings, "--dtype", "float32"]) == 0
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert [row[1] for row in rows[2:]] == ["float32", *FORMATS] * 2


@pytest.mark.parametrize("option", [("--decode", "65"), ("--seq-len", "130")])
def test_what_is_longer_than_the_context_is_refused_before_work(option, tiny_directory, tiny_text, capsys):
    options = ["--formats", "int8", "--text", str(tiny_text), "--seq-len", "32", "--device", "cpu", *option]
    assert main(["quantise", str(tiny_directory), *options]) == 2
    printed = capsys.readouterr()
    assert "longer than the model's context of 128" in printed.err
    assert printed.out == ""
