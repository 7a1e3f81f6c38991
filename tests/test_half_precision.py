"""Models of 16 bits on processors that are slow in these: computed in float32, kept as they are."""

import copy
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import transact.pipeline
import transact.walk
from tests.tiny import tiny_llama
from transact import PRESETS, Recipe, Training, calibrate, prune, recover

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_math")
HALVES = {torch.bfloat16, torch.float16}


class ProductsOf16Bits(TorchDispatchMode):
    """Counts the products of matrices of 16 bits, and all products."""

    def __init__(self):
        super().__init__()
        self.found, self.all = 0, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.overloadpacket.__name__ in PRODUCTS:
            self.all += 1
            self.found += any(isinstance(one, torch.Tensor) and one.dtype in HALVES for one in args)
        return operator(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def slow_processor(monkeypatch):
    monkeypatch.setattr(transact.walk, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(transact.pipeline, "check_computed", lambda model: None)  # computes a few tokens as they are


@pytest.fixture
def windows() -> torch.Tensor:
    return torch.randint(0, 64, (8, 16), generator=torch.Generator().manual_seed(0))


RECIPES = {name: recipe for name, recipe in PRESETS.items() if name != "crash"} | {
    "obs": Recipe(criterion="obs", compensation="dense", output_bias=True),
    "2:4": replace(PRESETS["best"], sparsity="wanda-2:4"),
    "drops": replace(PRESETS["best"], drop_modules=True),
}


@pytest.mark.filterwarnings("ignore:.* calibration tokens are few")
@pytest.mark.parametrize(
    ("name", "dtype"), [*((name, torch.bfloat16) for name in RECIPES), ("best", torch.float16)], ids=str
)
def test_nothing_multiplies_matrices_of_16_bits(name, dtype, windows):
    model = tiny_llama(layers=4).to(dtype)
    before = copy.deepcopy(model.state_dict())
    with ProductsOf16Bits() as products:
        pruned = prune(model, windows, recipe=RECIPES[name], ratio=0.0 if name == "2:4" else 0.25).model
    assert products.all > 20
    assert products.found == 0
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert {parameter.dtype for parameter in [*model.parameters(), *pruned.parameters()]} == {dtype}


def test_a_fast_processor_multiplies_what_there_is(windows, monkeypatch):
    monkeypatch.setattr(transact.walk, "multiplies_bfloat16", lambda: True)
    with ProductsOf16Bits() as products:
        prune(tiny_llama().to(torch.bfloat16), windows, recipe=PRESETS["transact"], ratio=0.25)
    assert products.found > 0


def test_widths_and_weights_are_those_of_float32(windows):
    """But for the rounding of hidden states and of what comes of it."""
    recipe = Recipe(criterion="activation", compensation="pruned", ridge=0.1)
    half = tiny_llama().to(torch.bfloat16)
    whole = copy.deepcopy(half).float()
    ours, wanted = [prune(model, windows, recipe=recipe, ratio=0.25) for model in (half, whole)]
    for mine, theirs in zip(ours.plan.layers, wanted.plan.layers, strict=True):
        assert torch.equal(mine.rope_pairs, theirs.rope_pairs)
        assert torch.equal(mine.mlp_dims, theirs.mlp_dims)
    for mine, theirs in zip(ours.model.parameters(), wanted.model.parameters(), strict=True):
        torch.testing.assert_close(mine.float(), theirs, rtol=0.05, atol=0.02)


def test_gradients_left_by_training_stay(windows):
    model = tiny_llama().to(torch.bfloat16)
    model(input_ids=windows, labels=windows).loss.backward()
    before = [parameter.grad.clone() for parameter in model.parameters()]
    calibrate(model, windows, second_moments=True, gradients="weights")
    assert all(torch.equal(one.grad, kept) for one, kept in zip(model.parameters(), before, strict=True))


def test_adapters_are_trained_over_float32(windows):
    pruned = prune(tiny_llama().to(torch.bfloat16), windows, recipe=PRESETS["transact"], ratio=0.25).model
    with ProductsOf16Bits() as products:
        recovered = recover(pruned, windows, Training(way="lora", tokens=64)).model
    assert products.found == 0 < products.all
    assert recovered.dtype == torch.bfloat16
