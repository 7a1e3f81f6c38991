"""Statistics against a few-line computation of the same, and what calibration refuses."""

import pytest
import torch

import transact
from tests.tiny import tiny_llama
from transact.calibration import sum_of_squares

WINDOWS = torch.randint(1, 97, (6, 20), generator=torch.Generator().manual_seed(0))


def recorded_activations(model, windows):
    """Every input of o_proj and down_proj and output of q_proj and k_proj, all tokens at once."""
    seen = {}
    handles = []
    for index, layer in enumerate(model.model.layers):
        attention = layer.self_attn
        for name, linear in (*attention.named_children(), ("down_proj", layer.mlp.down_proj)):

            def keep(module, inputs, output, key=(index, name)):
                seen[key] = (inputs[0], output)

            handles.append(linear.register_forward_hook(keep))
    with torch.no_grad():
        model(windows)
    for handle in handles:
        handle.remove()
    return seen


@pytest.mark.parametrize("variant", ["mha", "gqa", "mqa", "biases"])
def test_statistics_are_sums_of_squares(variant):
    model = tiny_llama(variant)
    statistics = transact.calibrate(model, WINDOWS)
    seen = recorded_activations(model, WINDOWS)
    assert statistics.tokens == WINDOWS.numel()
    for index, layer in enumerate(statistics.layers):
        heads, kv_heads = model.config.num_attention_heads, model.config.num_key_value_heads
        for name, count, measured in (("q_proj", heads, layer.query_pairs), ("k_proj", kv_heads, layer.key_pairs)):
            rows = seen[index, name][1].double().reshape(-1, count, 16)
            expected = torch.stack([(rows[..., i] ** 2 + rows[..., i + 8] ** 2).sum(0) for i in range(8)], dim=-1)
            torch.testing.assert_close(measured, expected, rtol=1e-5, atol=1e-8)
        output = seen[index, "o_proj"][0].double().reshape(-1, heads, 16).square().sum(0)
        torch.testing.assert_close(layer.attention_output, output, rtol=1e-5, atol=1e-8)
        gated = seen[index, "down_proj"][0].double().flatten(0, 1).square().sum(0)
        torch.testing.assert_close(layer.mlp, gated, rtol=1e-5, atol=1e-8)


def test_batches_do_not_matter():
    model = tiny_llama()
    whole = transact.calibrate(model, WINDOWS, tokens_per_batch=10_000)
    single = transact.calibrate(model, WINDOWS, tokens_per_batch=1)
    for one, other in zip(whole.layers, single.layers, strict=True):
        for name, tensor in vars(one).items():
            if isinstance(tensor, torch.Tensor):
                torch.testing.assert_close(tensor, getattr(other, name), rtol=1e-5, atol=1e-6)


def test_hooks_are_gone_and_the_mode_is_kept():
    model = tiny_llama().train()
    transact.calibrate(model, WINDOWS)
    assert model.training
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_bfloat16_is_summed_in_float32():
    activation = torch.full((1, 4096, 3), 1.0, dtype=torch.bfloat16)  # in bfloat16 a sum of ones stops at 256
    assert torch.equal(sum_of_squares(activation), torch.full((3,), 4096.0, dtype=torch.float64))


def test_refuses_what_is_no_text_for_the_model():
    model = tiny_llama()
    with pytest.raises(ValueError, match="non-empty"):
        transact.calibrate(model, WINDOWS[:0])
    with pytest.raises(ValueError, match="vocabulary has 97"):
        transact.calibrate(model, WINDOWS + 97)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = torch.inf
    with pytest.raises(ValueError, match=r"layer 1: the mlp activations are not finite"):
        transact.calibrate(model, WINDOWS)
    with pytest.raises(ValueError, match=r"not finite: model\.layers\.1\.mlp\.up_proj\.weight"):
        transact.check_prunable(model)


@pytest.mark.filterwarnings("ignore:.*calibration tokens are few:UserWarning")
def test_gradients_that_16_bits_do_not_hold_are_refused(monkeypatch):
    """Activations may be finite in float16, and what is summed over tokens on the way back not."""
    monkeypatch.setattr("transact.walk.is_slow", lambda dtype, device: False)  # as a GPU computes
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight *= 3000
    windows = torch.randint(1, 97, (16, 64), generator=torch.Generator().manual_seed(3))
    with pytest.raises(ValueError, match=r"layer \d: the gradients are not finite; .* bfloat16 or float32"):
        transact.calibrate(model.half(), windows, gradients="weights")
    assert transact.calibrate(model.float(), windows, gradients="weights").tokens == windows.numel()


@pytest.mark.filterwarnings("ignore:.*calibration tokens are few:UserWarning")
def test_slopes_that_are_no_numbers_decide_no_widths(monkeypatch):
    monkeypatch.setattr("transact.measured.error_slopes", lambda *_, **__: torch.full((2, 3), torch.nan))
    with pytest.raises(ValueError, match=r"gradients of the pruned model are not finite; .* bfloat16 or float32"):
        transact.prune(tiny_llama(), WINDOWS, ratio=0.3)
