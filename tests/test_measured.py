"""What the pruned model says of each module: slopes against finite differences, and widths that follow them."""

from dataclasses import replace

import pytest
import torch

import transact
from tests.tiny import random_plan, tiny_llama, tiny_relative
from transact.measured import _next_factors, _scaled, _with_values_of, error_slopes
from transact.recipe import PRESETS
from transact.widths import linear_parameters


def divergence(model, dense, windows):
    with torch.no_grad():
        given, wanted = (one(input_ids=windows, use_cache=False).logits.log_softmax(dim=-1) for one in (model, dense))
    return torch.nn.functional.kl_div(given, wanted, reduction="sum", log_target=True).item() / windows.numel()


def difference_quotient(narrowed, dense, windows, module, error, step=1e-2):
    """The same slope by pruning a little more and a little less of one module's own error."""
    found = []
    for sign in (1, -1):

        def moved(one, inputs, keywords, output, sign=sign):
            hidden = output[0] if isinstance(output, tuple) else output
            hidden = hidden + sign * step * error(inputs, keywords, hidden)
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        handle = module.register_forward_hook(moved, with_kwargs=True)
        found.append(divergence(narrowed, dense, windows))
        handle.remove()
    return (found[0] - found[1]) / (2 * step)


@pytest.mark.parametrize("make", [lambda: tiny_llama("biases"), lambda: tiny_relative("mistral")])
def test_slopes_are_those_of_finite_differences(make, device):
    dense = make().double().to(device)
    narrowed = transact.apply_plan(dense, random_plan(dense.config)).requires_grad_(False)
    windows = torch.randint(1, 97, (6, 12), generator=torch.Generator().manual_seed(0)).to(device)
    slopes = error_slopes(narrowed, dense, windows)
    for index, (layer, before) in enumerate(zip(narrowed.model.layers, dense.model.layers, strict=True)):
        pairs_alone = _with_values_of(layer.self_attn, before.self_attn)
        pairs_alone._forward_hooks = {}  # a copy shares them, and the hook below runs it
        errors = (
            (layer.self_attn, lambda i, k, out, a=pairs_alone, b=before: a(*i, **k)[0] - b.self_attn(*i, **k)[0]),
            (layer.self_attn, lambda i, k, out, a=pairs_alone: out - a(*i, **k)[0]),
            (layer.mlp, lambda i, k, out, b=before: out - b.mlp(*i)),
        )
        for column, (module, error) in enumerate(errors):
            expected = difference_quotient(narrowed, dense, windows, module, error)
            assert slopes[index, column].item() == pytest.approx(expected, rel=1e-2, abs=1e-5)
    assert (slopes != 0).sum() >= 5  # one module of the plan keeps all its values


def test_factors_go_part_of_the_way_and_keep_what_loses_nothing():
    predicted = torch.tensor([[1.0, 1.0, 0.0]], dtype=torch.float64)
    measured = torch.tensor([[4.0, 0.0, 9.0]], dtype=torch.float64)
    factors = _next_factors(torch.ones(1, 3, dtype=torch.float64), measured, predicted)
    floor = 0.02 * 2 / 3
    assert factors[0, 0].item() == pytest.approx(((4 + floor) / (1 + floor)) ** 0.7)
    assert factors[0, 1].item() == pytest.approx(0.1**0.7)  # never less than a tenth in one round
    assert factors[0, 2].item() == 1


def test_a_module_that_is_dearer_than_predicted_keeps_more():
    dense = tiny_llama("gqa", layers=3)
    windows = torch.randint(1, 97, (16, 24), generator=torch.Generator().manual_seed(0))
    statistics = transact.calibrate(dense, windows, second_moments=True, gradients="outputs")
    criterion = transact.criterion_by_name("predicted-loss")
    scores = [criterion.score(*one) for one in zip(dense.model.layers, range(3), statistics.layers, strict=True)]
    before = transact.searched_widths(dense.config, scores, 0.3)
    factors = torch.ones(3, 3, dtype=torch.float64)
    factors[1, 2] = 100
    after = transact.searched_widths(dense.config, _scaled(scores, factors), 0.3)
    assert after[1].mlp > before[1].mlp
    assert linear_parameters(dense.config, after) == pytest.approx(linear_parameters(dense.config, before), rel=0.02)


def test_measuring_changes_widths_and_leaves_the_model_as_it_was():
    dense = tiny_llama("gqa", layers=3)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    windows = torch.randint(1, 97, (16, 24), generator=torch.Generator().manual_seed(0))
    measured = transact.prune(dense, windows, ratio=0.3)
    predicted = transact.prune(dense, windows, ratio=0.3, recipe=replace(PRESETS["best"], measurements=0))
    assert measured.plan.widths != predicted.plan.widths
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    assert all(parameter.requires_grad for parameter in (*dense.parameters(), *measured.model.parameters()))
    assert not any(module._forward_hooks for module in dense.modules())


@pytest.mark.parametrize("variant", ["gqa", "tied"])
def test_models_that_are_measured_hold_no_embeddings_of_their_own(variant, monkeypatch):
    dense, shared = tiny_llama(variant), []
    windows = torch.randint(1, 97, (16, 24), generator=torch.Generator().manual_seed(0))

    def watched(narrowed, *arguments, **options):
        names = ("model.embed_tokens.weight", "lm_head.weight")
        shared.extend(narrowed.get_parameter(name).data_ptr() == dense.get_parameter(name).data_ptr() for name in names)
        assert not any(parameter.requires_grad for parameter in narrowed.parameters())
        return error_slopes(narrowed, *arguments, **options)

    monkeypatch.setattr("transact.measured.error_slopes", watched)
    pruned = transact.prune(dense, windows, ratio=0.3).model
    assert shared == [True] * 6
    assert pruned.lm_head.weight.data_ptr() != dense.lm_head.weight.data_ptr()
    assert all(parameter.grad is None for parameter in dense.parameters())


def test_rounds_below_none_are_refused():
    with pytest.raises(ValueError, match="measurements must be at least 0, got -1"):
        replace(PRESETS["best"], measurements=-1).check()
