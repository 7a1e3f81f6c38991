"""Models of 16 bits on processors that are slow in these: computed in float32, kept as they are."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

import transact.pipeline
import transact.walk
from tests.tiny import random_plan, tiny_llama
from transact import PRESETS, Recipe, Training, apply_plan, calibrate, half_precision, modeling_transact, prune, recover
from transact.half_precision import leaving_16_bits
from transact.modeling_transact import CACHE
from transact.texts import samples

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_math")
HALVES = {torch.bfloat16, torch.float16}


LENGTH = 48  # tokens, of which the products are computed in float32


class ProductsOf16Bits(TorchDispatchMode):
    """Counts the products of matrices of 16 bits, and all products."""

    def __init__(self):
        super().__init__()
        self.found, self.all = 0, 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        if operator.overloadpacket.__name__ in PRODUCTS:
            is_of_16_bits = any(isinstance(one, torch.Tensor) and one.dtype in HALVES for one in args)
            self.found += is_of_16_bits
            self.all += is_of_16_bits or args[0].shape[-1] > 1  # older transformers: RoPE's tables are outer products
        return operator(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def slow_processor(monkeypatch):
    monkeypatch.setattr(transact.walk, "multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(modeling_transact, "has_products_of_16_bits", lambda: False)
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


def narrowed_to_16_bits(dtype: torch.dtype = torch.bfloat16, variant: str = "gqa"):
    dense = tiny_llama(variant)
    return apply_plan(dense, random_plan(dense.config, seed=3)).to(dtype)


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(1, 60, (2, LENGTH), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("dtype", sorted(HALVES, key=str), ids=str)
@pytest.mark.parametrize(("variant", "attentions"), [("gqa", 2), ("mha", 0)])
def test_a_narrowed_model_reads_in_float32(variant, attentions, dtype, ids):
    narrowed = narrowed_to_16_bits(dtype, variant)
    cache = DynamicCache(config=narrowed.config)
    with ProductsOf16Bits() as products:
        logits = narrowed(ids, **{CACHE: cache}).logits
    assert products.all > 2 * 7
    assert products.found == 0
    assert logits.dtype == dtype
    assert {layer.keys.dtype for layer in cache.layers} == {dtype}
    with ProductsOf16Bits() as products:
        narrowed(ids[:1, :1], **{CACHE: DynamicCache(config=narrowed.config)})
    assert products.found == 4 * 2 + 1 + attentions  # quick ones: of one row, and of the heads that share keys


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_one_query_goes_in_groups_of_heads_that_share_keys(attention, ids, monkeypatch):
    narrowed = narrowed_to_16_bits()
    narrowed.set_attn_implementation(attention)
    cache, seen = DynamicCache(config=narrowed.config), []
    narrowed(ids, **{CACHE: cache})
    in_groups = modeling_transact.attend_in_groups
    monkeypatch.setattr(modeling_transact, "attend_in_groups", lambda *inputs, **options: (
        seen.append(inputs[1].shape), in_groups(*inputs, **options))[1])  # fmt: skip
    narrowed(ids[:, :1], **{CACHE: cache})
    assert len(seen) == (2 if attention == "sdpa" else 0)
    assert all(shape[2] == 1 for shape in seen)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 6, LENGTH])
def test_a_model_that_keeps_everything_has_the_bits_of_the_dense_one(tokens, ids):
    dense = tiny_llama("gqa").to(torch.bfloat16)
    whole = prune(dense, ids, recipe=Recipe(), ratio=0.0).model
    assert type(whole) is modeling_transact.TransActForCausalLM
    assert torch.equal(whole(ids[:, :tokens]).logits, dense(ids[:, :tokens]).logits)


@torch.no_grad()
@pytest.mark.parametrize("is_padded", [False, True])
def test_what_is_read_or_decoded_is_as_near_to_float32_as_in_16_bits(is_padded, ids):
    narrowed = narrowed_to_16_bits()
    mask = torch.ones_like(ids)
    mask[1, : 5 * is_padded] = 0

    def logits_of(model) -> torch.Tensor:
        cache = DynamicCache(config=model.config)
        read = model(ids[:, :40], attention_mask=mask[:, :40], **{CACHE: cache}).logits
        steps = [
            model(ids[:, place : place + 1], attention_mask=mask[:, : place + 1], **{CACHE: cache}).logits
            for place in range(40, LENGTH)
        ]
        return torch.cat([read, *steps], dim=1)[mask.bool()]

    exact, found = logits_of(copy.deepcopy(narrowed).float()), logits_of(narrowed)
    for module in narrowed.modules():
        if hasattr(module, "may_leave_16_bits"):
            module.may_leave_16_bits = False
    in_16_bits = logits_of(narrowed)
    assert not torch.equal(found, in_16_bits)  # attention rounds its scores there
    assert (found - exact).norm() < 1.1 * (in_16_bits - exact).norm()


def test_weights_are_made_float32_part_by_part(monkeypatch):
    monkeypatch.setattr(modeling_transact, "PART", 100)
    inputs, weight, bias = (torch.randn(size).bfloat16() for size in ((2, 40, 24), (19, 24), (19,)))
    found = modeling_transact.product_in_float32(inputs, weight, bias)
    expected = nn.functional.linear(inputs.float(), weight.float(), bias.float()).bfloat16()
    torch.testing.assert_close(found, expected, rtol=0.01, atol=0.01)


def test_where_torch_has_products_of_16_bits_nothing_leaves_them(ids, monkeypatch):
    monkeypatch.setattr(modeling_transact, "has_products_of_16_bits", lambda: True)
    narrowed = narrowed_to_16_bits()
    with torch.no_grad(), ProductsOf16Bits() as products:
        narrowed(ids)
    assert products.found == products.all > 2 * 7


@torch.no_grad()
def test_modules_are_linear_ones_as_tools_look_for_them_and_what_they_do_besides_is_done(ids):
    """bitsandbytes' and torch's own quantisation want exactly `nn.Linear`."""
    narrowed = narrowed_to_16_bits()
    linears = {name: module for name, module in narrowed.model.named_modules() if isinstance(module, nn.Linear)}
    assert len(linears) == 7 * 2
    assert {type(module) for module in linears.values()} == {nn.Linear}
    seen = []
    for name, module in linears.items():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    expected = narrowed_to_16_bits()(ids).logits
    for tokens in (1, 6, LENGTH):
        seen.clear()
        logits = narrowed(ids[:, :tokens]).logits
        assert sorted(seen) == sorted(linears)
    torch.testing.assert_close(logits, expected, rtol=0.05, atol=0.05)


@torch.no_grad()
@pytest.mark.parametrize("tokens", [1, 6, LENGTH])
def test_shapes_are_known_without_numbers(tokens, ids):
    config = narrowed_to_16_bits().config
    with torch.device("meta"):
        narrowed = modeling_transact.TransActForCausalLM(config).to(torch.bfloat16)
    assert narrowed(ids[:, :tokens].to("meta")).logits.shape == (2, tokens, 97)


@torch.no_grad()
@pytest.mark.parametrize("rows", [1, LENGTH])
def test_inputs_of_another_width_are_refused_and_no_rows_give_none(rows):
    head = narrowed_to_16_bits().lm_head
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        head(torch.ones(2 * rows, 24, dtype=torch.bfloat16))
    assert head(torch.ones(0, rows, 48, dtype=torch.bfloat16)).shape == (0, rows, 97)


@torch.no_grad()
def test_many_sequences_are_decoded_in_float32():
    """Queries, keys and values were joined into one product, in 16 bits however many there were."""
    narrowed, ids = narrowed_to_16_bits(variant="mha"), torch.ones(40, 1, dtype=torch.int64)
    with ProductsOf16Bits() as products:
        logits = narrowed(ids, **{CACHE: DynamicCache(config=narrowed.config)}).logits
    assert products.found == 0 < products.all
    torch.testing.assert_close(logits[:3], narrowed(ids[:3]).logits, rtol=0.02, atol=0.02)


def decoded(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Logits of the last two of the tokens, decoded one by one after the others."""
    cache = DynamicCache(config=model.config)
    read = model(ids[:, :-2], **{CACHE: cache}).logits
    steps = [model(ids[:, place, None], **{CACHE: cache}).logits for place in (-2, -1)]
    return torch.cat([read, *steps], dim=1)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["gqa", "mha", "biases"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_stock_model_leaves_16_bits_for_a_while_and_is_as_near_to_float32(variant, attention):
    model = tiny_llama(variant).to(torch.bfloat16)
    model.set_attn_implementation(attention)
    ids = torch.randint(1, 60, (40, 12), generator=torch.Generator().manual_seed(2))
    before, exact = decoded(model, ids), decoded(copy.deepcopy(model).float(), ids)
    with leaving_16_bits(model), ProductsOf16Bits() as products:
        found = decoded(model, ids)
    layers, groups = len(model.model.layers), variant != "mha"
    if attention == "sdpa":
        assert products.found == 2 * layers * groups  # of one query in groups
    assert found.dtype == torch.bfloat16
    assert (found - exact).norm() < 1.1 * (before - exact).norm()
    assert torch.equal(decoded(model, ids), before)  # as it was
    assert model.config._attn_implementation == attention


@torch.no_grad()
def test_it_is_as_before_after_an_error_too(ids):
    model = tiny_llama().to(torch.bfloat16)
    before = model(ids).logits
    with pytest.raises(IndexError, match="out of range"), leaving_16_bits(model):
        model(ids + 1000)
    assert torch.equal(model(ids).logits, before)
    assert model.config._attn_implementation == "sdpa"


@torch.no_grad()
@pytest.mark.parametrize("what", ["float32", "narrowed", "kernels", "hooks"])
def test_what_needs_no_leaving_is_left_alone(what, ids, monkeypatch):
    model = narrowed_to_16_bits() if what == "narrowed" else tiny_llama()
    model = model.to(torch.float32 if what == "float32" else torch.bfloat16)
    if what == "kernels":
        monkeypatch.setattr(modeling_transact, "has_products_of_16_bits", lambda: True)
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    for linear in linears if what == "hooks" else ():
        linear.register_forward_hook(lambda *_: None)
    with leaving_16_bits(model):
        assert not any("forward" in linear.__dict__ for linear in linears)
        assert model.config._attn_implementation == (half_precision.ATTENTION if what == "hooks" else "sdpa")


def test_own_samples_are_made_outside_of_16_bits(tiny_directory, monkeypatch):
    model, tokenizer = transact.load_model(tiny_directory, device="cpu", dtype="bfloat16")
    rows, make = [], modeling_transact.product_in_float32
    monkeypatch.setattr(modeling_transact, "product_in_float32", lambda inputs, *others: (
        rows.append(inputs.shape[:-1].numel()), make(inputs, *others))[1])  # fmt: skip
    assert samples.own_samples(model, tokenizer, count=64, length=8).shape == (64, 8)
    assert rows == [64] * 8 * (len(model.model.layers) * 7 + 1)
