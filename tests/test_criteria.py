"""What the criteria say, against definitions written with loops and whole-model gradients."""

import pytest
import torch
from torch import nn

import transact
from tests.tiny import scores_of, tiny_llama
from transact.calibration import held_out_split
from transact.gradients import OUTPUTS_EVERY, loss_gradients
from transact.obs import cheapest_basis, greedy_losses
from transact.plan import select
from transact.scores import head_scores, mean_moments, value_moments
from transact.widths import dense_widths

WINDOWS = torch.randint(1, 97, (8, 20), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def model():
    return tiny_llama("gqa")


@pytest.fixture(scope="module")
def statistics(model):
    return transact.calibrate(model, WINDOWS, second_moments=True, gradients="outputs")


def summed_loss(model, windows) -> torch.Tensor:
    logits = model(input_ids=windows).logits[:, :-1].float()
    return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="sum")


def test_output_gradients_are_those_of_the_whole_model(model):
    seen, handles = {}, []
    for index, layer in enumerate(model.model.layers):
        for name, module in (("q", layer.self_attn.q_proj), ("o", layer.self_attn.o_proj), ("d", layer.mlp.down_proj)):

            def keep(module, inputs, output, key=(index, name)):
                output.retain_grad()
                seen[key] = output

            handles.append(module.register_forward_hook(keep))
    windows = WINDOWS[::OUTPUTS_EVERY]
    summed_loss(model, windows).backward()
    for handle in handles:
        handle.remove()
    measured = loss_gradients(model, WINDOWS)
    for index, layer in enumerate(measured):
        for name, moments in (("o", layer.attention_output), ("d", layer.mlp_output)):
            rows = seen[index, name].grad.flatten(0, 1).double()
            expected = (rows.T @ rows / windows.numel()).float()
            torch.testing.assert_close(moments, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())
        query = seen[index, "q"]
        gates = (query.grad * query).detach().double().view(-1, 6, 16)
        pair = sum(gates[:, head, dim] for head in (3, 4, 5) for dim in (5, 13))
        expected = pair.square().mean() / 2
        torch.testing.assert_close(layer.rope_pairs[1, 5], expected, rtol=1e-3, atol=1e-9)
    assert not any(module._forward_hooks for module in model.modules())


def test_taylor_is_gradient_times_weight_of_the_whole_model(model):
    scores = scores_of(model, "taylor", WINDOWS)[1]
    expected = {}
    for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
        expected[name] = getattr(model.model.layers[1].self_attn, name)
    for name in ("gate_proj", "up_proj", "down_proj"):
        expected[name] = getattr(model.model.layers[1].mlp, name)
    model.zero_grad()
    summed_loss(model, WINDOWS).backward()
    importance = {name: (linear.weight.grad.abs() * linear.weight.abs()) for name, linear in expected.items()}
    mlp = importance["gate_proj"][7].sum() + importance["up_proj"][7].sum() + importance["down_proj"][:, 7].sum()
    torch.testing.assert_close(scores.mlp_dims[7].float(), mlp, rtol=1e-3, atol=0)
    value = importance["v_proj"][16 + 3].sum()
    value = value + sum(importance["o_proj"][:, head * 16 + 3].sum() for head in (3, 4, 5))
    torch.testing.assert_close(scores.value_dims[1, 3].float(), value, rtol=1e-3, atol=0)
    model.zero_grad()


def test_block_by_block_gives_what_the_whole_model_gives(model):
    whole = transact.calibrate(model, WINDOWS, second_moments=True, gradients="outputs")
    blocks = transact.calibrate(
        model, WINDOWS, second_moments=True, gradients="outputs", device=torch.device("cpu"), tokens_per_batch=40
    )
    for one, other in zip(whole.layers, blocks.layers, strict=True):
        for name in ("query", "key", "attention_output", "mlp", "mlp_sum"):
            torch.testing.assert_close(getattr(one, name), getattr(other, name), rtol=1e-4, atol=1e-4)
        for mine, theirs in zip(one.mlp_moments, other.mlp_moments, strict=True):
            torch.testing.assert_close(mine.products, theirs.products, rtol=1e-4, atol=1e-4)
            assert mine.tokens == theirs.tokens


def test_gradients_that_do_not_fit_name_the_memory(model, monkeypatch):
    monkeypatch.setattr("transact.gradients.free_memory", lambda device: 1000)
    with pytest.raises(ValueError, match=r"gradients over 160 tokens need \d+\.\d GiB .* 0\.0 GiB are free"):
        transact.prune(model, WINDOWS, recipe="llm-pruner")


def test_wanda_and_fluctuation_follow_their_definitions(model, statistics):
    layer, stats = model.model.layers[0], statistics.layers[0]
    down, output = layer.mlp.down_proj.weight, layer.self_attn.o_proj.weight
    wanda, flap = scores_of(model, "wanda", WINDOWS)[0], scores_of(model, "fluctuation", WINDOWS)[0]
    torch.testing.assert_close(
        wanda.mlp_dims[4], stats.mlp[4].sqrt() * down[:, 4].abs().sum().double(), rtol=1e-5, atol=0
    )
    variance = stats.mlp[4] / 160 - (stats.mlp_sum[4] / 160) ** 2
    torch.testing.assert_close(flap.mlp_dims[4], variance * down[:, 4].square().sum().double(), rtol=1e-4, atol=0)
    heads = [stats.attention_output[head, 9].sqrt() * output[:, head * 16 + 9].abs().sum() for head in (3, 4, 5)]
    torch.testing.assert_close(wanda.value_dims[1, 9], sum(heads).double(), rtol=1e-5, atol=0)
    torch.testing.assert_close(wanda.kv_heads, wanda.value_dims.mean(dim=1))


def test_pair_energy_and_leverage_follow_their_definitions(model, statistics):
    stats = statistics.layers[1]
    energy = sum(stats.query[head, dim] * stats.key[1, dim] for head in (3, 4, 5) for dim in (2, 10)).sqrt()
    torch.testing.assert_close(scores_of(model, "pair-energy", WINDOWS)[1].rope_pairs[1, 2], energy)
    moments = mean_moments(stats.mlp_moments)
    ridge = 1e-2 * moments.diagonal().mean()
    inverse = torch.linalg.inv(moments + ridge * torch.eye(40, dtype=torch.float64))
    leverage = scores_of(model, "leverage", WINDOWS)[1].mlp_dims
    torch.testing.assert_close(leverage, 1 - ridge * inverse.diagonal(), rtol=1e-4, atol=1e-6)


def test_head_score_is_the_papers():
    dims = torch.tensor([[1.0, 2, 3, 6], [0, 0, 0, 0]])
    torch.testing.assert_close(head_scores(dims), torch.tensor([3 + 10 / 4 * 6, 0]))


def activation(width: int, tokens: int = 500) -> torch.Tensor:
    generator = torch.Generator().manual_seed(width)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    return torch.randn(tokens, width, generator=generator, dtype=torch.float64) @ mixing


def refit_loss(readers, moments, kept) -> float:
    """What dropping all but `kept` costs after the best refit, by the formula."""
    inside = moments[:, kept] @ torch.linalg.solve(moments[kept][:, kept], moments[kept])
    return (readers @ (moments - inside) @ readers.T).trace().item()


def test_greedy_losses_are_those_of_the_refit():
    rows = activation(12)
    moments = rows.T @ rows / len(rows)
    readers = torch.randn(5, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    losses = greedy_losses(readers, moments, tokens=10**12)
    order = losses.argsort()
    for dropped in (1, 4, 9):
        kept = order[dropped:]
        assert losses[order[dropped - 1]].item() == pytest.approx(refit_loss(readers, moments, kept), rel=1e-5)
    # greedy: the first to go is the one that costs least of all
    singles = [refit_loss(readers, moments, [i for i in range(12) if i != gone]) for gone in range(12)]
    assert order[0].item() == min(range(12), key=singles.__getitem__)


@pytest.mark.parametrize("scale", [1e-45, 1.0, 1e30])
def test_greedy_losses_of_other_units_are_the_same_in_these(scale, device):
    rows = activation(12).to(device)
    moments, readers = rows.T @ rows / len(rows), torch.randn(5, 12, dtype=torch.float64).to(device)
    before = moments.clone(), readers.clone()
    losses, wanted = greedy_losses(readers, moments * scale, tokens=100), greedy_losses(readers, moments, tokens=100)
    torch.testing.assert_close(losses / scale, wanted, rtol=1e-4, atol=0.0)
    assert torch.equal(moments, before[0])
    assert torch.equal(readers, before[1])


def test_the_cheapest_basis_costs_what_it_says_and_less_than_axes():
    rows = activation(8)
    moments = (rows.T @ rows / len(rows))[None]
    readers = torch.randn(1, 30, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    basis, losses = cheapest_basis(readers, moments)
    identity = torch.eye(8, dtype=torch.float64)
    torch.testing.assert_close(basis.into[0] @ basis.back[0].T, identity)
    for rank in (7, 5, 2):
        rest = identity - basis.back[0][:, :rank] @ basis.into[0][:, :rank].T
        loss = (readers[0] @ rest @ moments[0] @ rest.T @ readers[0].T).trace().item()
        assert loss == pytest.approx(losses[0, rank].item(), rel=1e-4, abs=1e-5 * losses[0, 0].item())
        axes = greedy_losses(readers[0], moments[0], tokens=10**12).sort().values
        assert loss <= axes[8 - rank - 1].item() * (1 + 1e-6)


@pytest.mark.parametrize("variant", ["mha", "gqa", "biases"])
def test_a_change_of_value_basis_changes_nothing_while_all_is_kept(variant):
    model = tiny_llama(variant)
    plan = select(scores_of(model, "predicted-loss", WINDOWS), dense_widths(model.config))
    assert plan.layers[0].value_into is not None
    with torch.no_grad():
        expected = model(input_ids=WINDOWS).logits
        actual = transact.apply_plan(model, plan)(input_ids=WINDOWS).logits
    scale = expected.abs().max()
    torch.testing.assert_close(actual / scale, expected / scale, rtol=1e-4, atol=1e-4)


def test_value_moments_are_those_of_each_head(model, statistics):
    moments = statistics.layers[0].attention_moments
    whole = (moments[0].products + moments[1].products).double() / WINDOWS.numel()
    expected = sum(whole[head * 16 : head * 16 + 16, head * 16 : head * 16 + 16] for head in (3, 4, 5))
    torch.testing.assert_close(value_moments(statistics.layers[0])[1], expected)


def test_held_out_windows_are_every_eighth():
    fitted, held_out = held_out_split(torch.arange(20)[:, None])
    assert held_out.flatten().tolist() == [7, 15]
    assert len(fitted) == 18
    assert held_out_split(torch.arange(3)[:, None])[1].flatten().tolist() == [2]
    assert len(held_out_split(torch.arange(1)[:, None])[1]) == 0
