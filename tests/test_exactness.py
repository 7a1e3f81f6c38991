"""The narrowed model equals the dense model with the dropped dimensions zeroed."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import transact
from tests.tiny import VARIANTS, random_plan, scores_of, tiny_llama, zeroed
from transact import dense_widths, select

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def tokens(batch: int = 2, length: int = 24, seed: int = 1, device: torch.device | None = None) -> torch.Tensor:
    return torch.randint(1, 97, (batch, length), generator=torch.Generator().manual_seed(seed)).to(device)


def logits(model, **inputs):
    with torch.no_grad():
        return model(**inputs).logits


def scaled(reference: torch.Tensor) -> float:
    """Logits of these models are tens: the tolerance is relative to the largest."""
    return max(1.0, reference.abs().max().item())


def assert_same(actual: torch.Tensor, expected: torch.Tensor):
    torch.testing.assert_close(actual / scaled(expected), expected / scaled(expected), **TOLERANCE)


@pytest.mark.parametrize("variant", VARIANTS)
def test_plan_that_keeps_everything_is_bit_equal(variant, device):
    dense = tiny_llama(variant).to(device)
    everything = select(scores_of(dense, "random"), dense_widths(dense.config))
    narrowed = transact.apply_plan(dense, everything)
    ids = tokens(device=device)
    assert torch.equal(logits(narrowed, input_ids=ids), logits(dense, input_ids=ids))


@pytest.mark.parametrize("drop_heads", [False, True], ids=["all-heads", "fewer-heads"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_equals_the_zeroed_dense_model(variant, attention, drop_heads, device):
    dense = tiny_llama(variant).to(device)
    dense.set_attn_implementation(attention)
    plan = random_plan(dense.config, drop_heads=drop_heads)
    narrowed, oracle = transact.apply_plan(dense, plan), zeroed(dense, plan)
    if variant != "tied" or drop_heads:
        assert narrowed.num_parameters() < dense.num_parameters()
    ids = tokens(device=device)
    assert_same(logits(narrowed, input_ids=ids), logits(oracle, input_ids=ids))


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), variant=st.sampled_from(sorted(VARIANTS)), head_dim=st.sampled_from([2, 4, 8, 16]))
def test_equals_the_zeroed_dense_model_for_any_plan(seed, variant, head_dim):
    dense = tiny_llama(variant, seed=seed, head_dim=head_dim)
    plan = random_plan(dense.config, seed=seed, drop_heads=seed % 2 == 0)
    narrowed, oracle = transact.apply_plan(dense, plan), zeroed(dense, plan)
    assert_same(logits(narrowed, input_ids=tokens()), logits(oracle, input_ids=tokens()))


def test_a_shifted_rope_pair_is_noticed():
    dense = tiny_llama("gqa")
    plan = random_plan(dense.config, seed=3)
    narrowed, oracle = transact.apply_plan(dense, plan), zeroed(dense, plan)
    pairs = narrowed.model.layers[0].self_attn.rope_pairs
    pairs[0] = (pairs[0] + 1) % (dense.config.head_dim // 2)
    with pytest.raises(AssertionError):
        assert_same(logits(narrowed, input_ids=tokens()), logits(oracle, input_ids=tokens()))


def test_the_narrow_softmax_scale_is_noticed():
    dense = tiny_llama("gqa")
    plan = random_plan(dense.config, seed=3)
    narrowed, oracle = transact.apply_plan(dense, plan), zeroed(dense, plan)
    attention = narrowed.model.layers[0].self_attn
    attention.scaling = attention.qk_head_dim**-0.5
    with pytest.raises(AssertionError):
        assert_same(logits(narrowed, input_ids=tokens()), logits(oracle, input_ids=tokens()))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_batch(side):
    dense = tiny_llama("gqa")
    plan = random_plan(dense.config)
    narrowed, oracle = transact.apply_plan(dense, plan), zeroed(dense, plan)
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[1, :9] = 0
    if side == "right":
        mask = mask.flip(1)
    inputs = {"input_ids": tokens(), "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    seen = mask.bool()
    assert_same(logits(narrowed, **inputs)[seen], logits(oracle, **inputs)[seen])


@pytest.mark.parametrize("cache", ["dynamic", "static", None])
@pytest.mark.parametrize("variant", ["mha", "gqa", "mqa"])
def test_generation(variant, cache):
    dense = tiny_llama(variant)
    plan = random_plan(dense.config, drop_heads=True)
    narrowed, oracle = transact.apply_plan(dense, plan), zeroed(dense, plan)
    options = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": None, "use_cache": cache is not None}
    if cache:
        options["cache_implementation"] = cache
    options["disable_compile"] = True
    expected = oracle.generate(tokens(), do_sample=False, max_new_tokens=12, eos_token_id=None)
    assert torch.equal(narrowed.generate(tokens(), **options), expected)


def test_compiles_as_one_graph():
    dense = tiny_llama("gqa")
    narrowed = transact.apply_plan(dense, random_plan(dense.config))
    compiled = torch.compile(narrowed, backend="aot_eager", fullgraph=True)
    assert_same(logits(compiled, input_ids=tokens()), logits(narrowed, input_ids=tokens()))


def test_every_weight_is_a_bit_identical_slice_in_memory_of_its_own():
    dense = tiny_llama("biases")
    plan = random_plan(dense.config)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    narrowed = transact.apply_plan(dense, plan)
    kept = plan.layers[1].mlp_dims
    assert torch.equal(narrowed.model.layers[1].mlp.gate_proj.weight, dense.model.layers[1].mlp.gate_proj.weight[kept])
    assert torch.equal(narrowed.model.layers[1].mlp.down_proj.bias, dense.model.layers[1].mlp.down_proj.bias)
    with torch.no_grad():
        for parameter in narrowed.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())


def test_trains():
    dense = tiny_llama("gqa")
    narrowed = transact.apply_plan(dense, random_plan(dense.config)).train()
    # renamed among the versions of transformers that are supported
    enable = getattr(narrowed, "activation_checkpointing_enable", None) or narrowed.gradient_checkpointing_enable
    enable()
    narrowed(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(parameter.grad is not None for parameter in narrowed.parameters())


@pytest.mark.parametrize(
    ("part", "value", "named"),
    [
        ("rope_pairs", torch.tensor([[0, 8], [0, 1]]), r"layers\.0\.rope_pairs must lie in \[0, 8\)"),
        ("value_dims", torch.tensor([[1, 0], [0, 1]]), r"layers\.0\.value_dims must be strictly ascending"),
        ("value_dims", torch.tensor([[0, 1]]), r"layers\.0\.value_dims must have one row for each of 2"),
        ("kv_heads", torch.tensor([], dtype=torch.int64), r"layers\.0\.kv_heads must hold at least one int64"),
        ("mlp_dims", torch.tensor([0.5]), r"layers\.0\.mlp_dims must hold int64 indices in 1 dimension"),
        ("mlp_dims", torch.tensor([]), r"layers\.0\.mlp_dims must hold int64 indices .* got torch\.float32"),
        ("value_dims", torch.zeros(2, 0, dtype=torch.int64), r"layers\.0: of dropped attention neither rope_pairs nor"),
        ("kv_heads", torch.tensor([0, 2]), r"layers\.0\.kv_heads must lie in \[0, 2\)"),
    ],
)
def test_plan_that_does_not_fit_is_refused(part, value, named):
    dense = tiny_llama("gqa")
    first, *rest = random_plan(dense.config).layers
    with pytest.raises(ValueError, match=named):
        transact.apply_plan(dense, transact.Plan((replace(first, **{part: value}), *rest)))
