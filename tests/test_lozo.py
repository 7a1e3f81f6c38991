"""Recovery without back-propagation: the estimate, the weights between two tries, memory, 16 bits, downhill."""

import copy
import gc
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.nn import functional

import transact
from tests.tiny import random_plan, tiny_llama
from transact.__main__ import main
from transact.recovery.trainer import _ForwardTrainer
from transact.recovery.zeroth_order import LowRankDescent, rounded_at_random

WINDOWS = torch.randint(1, 97, (16, 16), generator=torch.Generator().manual_seed(0))
TRAINING = transact.Training(tokens=20 * 64, way="lozo", learning_rate=1e-3, batch=4)
SEEDS = 40
VARIANTS = ("gqa", "tied", "biases")


def narrowed(variant: str = "gqa", dtype: torch.dtype = torch.float32) -> transact.TransActForCausalLM:
    dense = tiny_llama(variant)
    model = transact.apply_plan(dense, random_plan(dense.config))
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def descent_of(model, **changes) -> LowRankDescent:
    settings = {"learning_rate": 1.0, "rank": 2, "refresh": 3, "perturbation": 1e-3, "seed": 0}
    return LowRankDescent(model, **settings | changes)


def loss_of(model) -> torch.Tensor:
    logits = model(input_ids=WINDOWS[:4], use_cache=False).logits[:, :-1]
    return functional.cross_entropy(logits.flatten(0, 1).double(), WINDOWS[:4, 1:].flatten())


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def tensors_with_a_graph() -> list[torch.Tensor]:
    return [one for one in gc.get_objects() if issubclass(type(one), torch.Tensor) and one.grad_fn is not None]


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_the_model_computes_as_if_its_weights_were_moved_along_low_rank_directions(variant):
    model = narrowed(variant)
    with descent_of(model).moved(1):
        given = model(input_ids=WINDOWS[:4]).logits
    by_hand = copy.deepcopy(model)
    descent = descent_of(by_hand)
    for parameter in descent.places:
        if parameter.ndim == 2:
            fresh, kept = descent._factors(parameter)
            assert (fresh.shape, kept.shape) == ((len(parameter), 2), (parameter.shape[1], 2))
            parameter += 1e-3 * fresh @ kept.T
        else:
            parameter += 1e-3 * descent._vector_noise(parameter)
    torch.testing.assert_close(given, by_hand(input_ids=WINDOWS[:4]).logits, rtol=1e-3, atol=1e-3)
    assert (given - model(input_ids=WINDOWS[:4]).logits).abs().max() > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_weights_are_bit_for_bit_as_before_after_both_tries_and_after_one_that_fails(variant, dtype):
    model = narrowed(variant, dtype)
    descent, before = descent_of(model), weights(model)
    for sign in (1, -1):
        with descent.moved(sign):
            model(input_ids=WINDOWS[:4])
    with pytest.raises(KeyboardInterrupt), descent.moved(1):
        raise KeyboardInterrupt
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("rank", [1, 4])
def test_the_mean_of_the_estimates_is_the_gradient(rank):
    model = narrowed()
    loss_of(model).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    before, products = weights(model), []
    estimates = {name: torch.zeros_like(gradient) for name, gradient in gradients.items()}
    with torch.no_grad():
        for seed in range(SEEDS):
            descent = descent_of(model, rank=rank, seed=seed)
            for sign in (1, -1):
                with descent.moved(sign):
                    descent.slope += sign * loss_of(model).item() / 2e-3
            descent.step()
            product = 0.0
            for name, parameter in model.named_parameters():
                estimate = before[name] - parameter
                estimates[name] += estimate / SEEDS
                product += (estimate * gradients[name]).sum().item()
                parameter.copy_(before[name])
            products.append(product)
    length = sum(gradient.square().sum().item() for gradient in gradients.values())
    mean, products = sum(products) / SEEDS, torch.tensor(products)
    assert mean == pytest.approx(length, abs=4 * products.std().item() / SEEDS**0.5)
    assert mean > 0.5 * length
    estimate, gradient = (torch.cat([one[name].flatten() for name in gradients]) for one in (estimates, gradients))
    assert torch.corrcoef(torch.stack([estimate, gradient]))[0, 1] > 0.03


def test_half_of_a_direction_is_kept_until_it_is_refreshed():
    model = narrowed()
    descent = descent_of(model, refresh=2)
    weight = model.lm_head.weight
    seen = []
    for _ in range(4):
        seen.append(descent._factors(weight))
        descent.step()
    fresh, kept = zip(*seen, strict=True)
    assert torch.equal(kept[0], kept[1])
    assert torch.equal(kept[2], kept[3])
    assert not torch.equal(kept[1], kept[2])
    assert not any(torch.equal(fresh[step], fresh[step + 1]) for step in range(3))
    assert not torch.equal(descent._factors(weight)[0][:16], descent._factors(model.model.embed_tokens.weight)[0][:16])


def test_no_graph_no_gradient_and_no_state_of_an_optimiser(monkeypatch):
    graphs, tried = [], []
    original = _ForwardTrainer.compute_loss

    def watched(self, *arguments, **options):
        loss = original(self, *arguments, **options)
        assert not torch.is_grad_enabled()
        graphs.extend(one for one in tensors_with_a_graph() if id(one) not in left)
        assert not self.descent.state
        tried.append(loss)
        return loss

    monkeypatch.setattr(_ForwardTrainer, "compute_loss", watched)
    gc.collect()
    left = {id(one) for one in tensors_with_a_graph()}
    recovered = transact.recover(narrowed(), WINDOWS, replace(TRAINING, tokens=2 * 64, refresh=1))
    assert len(tried) == 4
    assert not graphs
    assert all(parameter.grad is None and parameter.requires_grad for parameter in recovered.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loss_of_one_batch_falls(dtype):
    model = narrowed(dtype=dtype)
    training = replace(TRAINING, tokens=50 * 64, refresh=10)
    recovered = transact.recover(model, WINDOWS[:4], training)
    losses = [row["loss"] for row in recovered.history if "loss" in row]
    assert sum(losses[-10:]) / 10 < losses[0] - 0.1
    assert {parameter.dtype for parameter in recovered.model.parameters()} == {dtype}


def test_frozen_weights_stay():
    model = narrowed()
    model.model.embed_tokens.weight.requires_grad_(False)
    before = weights(model)
    after = transact.recover(model, WINDOWS, TRAINING).model
    moved = {name for name, parameter in after.named_parameters() if not torch.equal(parameter, before[name])}
    assert moved == before.keys() - {"model.embed_tokens.weight"}
    assert not after.model.embed_tokens.weight.requires_grad


def test_a_step_of_several_batches_is_one_step():
    at_once = transact.recover(narrowed(), WINDOWS, replace(TRAINING, tokens=6 * 64 - 32)).model
    in_parts = transact.recover(narrowed(), WINDOWS, replace(TRAINING, tokens=6 * 64 - 32, device_batch=2)).model
    for (name, one), other in zip(at_once.named_parameters(), in_parts.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=1e-3, msg=name)


def test_rounding_at_random_loses_nothing_on_average():
    values = torch.tensor([1.001, -3.003, 1e-3, 0.0])
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.bfloat16, torch.float16):
        rounded = torch.stack([rounded_at_random(values, dtype, generator) for _ in range(4000)])
        assert rounded.dtype == dtype
        torch.testing.assert_close(rounded.double().mean(dim=0).float(), values, rtol=2e-4, atol=1e-7)
        exact = values.to(dtype).float()
        assert torch.equal(rounded_at_random(exact, dtype, generator).float(), exact)


def test_recover_command_says_how_it_was_trained(tiny_directory, tiny_text, tmp_path: Path, capsys):
    pruned, out = tmp_path / "pruned", tmp_path / "out"
    assert main(["prune", str(tiny_directory), str(pruned), "--preset", "transact", "--calibration", str(tiny_text),
                 "--samples", "4", "--seq-len", "32", "--device", "cpu"]) == 0  # fmt: skip
    assert main(["recover", str(pruned), str(out), "--tokens", "1k", "--text", str(tiny_text), "--train-seq-len", "32",
                 "--device", "cpu", "--way", "lozo", "--refresh", "7"]) == 0  # fmt: skip
    (recovery,) = json.loads((out / "pruning.json").read_text())["recovery"]
    said = {name: recovery[name] for name in ("way", "rank", "refresh", "perturbation", "teacher")}
    assert said == {"way": "lozo", "rank": 2, "refresh": 7, "perturbation": 1e-3, "teacher": None}
    assert "perplexity of held-out windows" in capsys.readouterr().out
