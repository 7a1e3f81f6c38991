"""What pruning need not compute or keep: counted in floating-point operations, tokens and calls, never in seconds."""

import math
from collections import Counter
from contextlib import contextmanager

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import transact
from tests.tiny import random_plan, tiny_llama
from transact import Recipe, obs
from transact.calibration import Moments, held_out_split, iterate_statistics
from transact.compensate import _every, compensate_on_pruned_inputs
from transact.least_squares import RIDGES, NormalEquations, fit_projection
from transact.measured import measured_scores
from transact.obs import greedy_losses

WINDOWS = torch.randint(1, 97, (16, 24), generator=torch.Generator().manual_seed(0))
MANY = torch.randint(1, 97, (32, 24), generator=torch.Generator().manual_seed(1))


@contextmanager
def tokens_through(modules: dict):
    """How many tokens enter each of the named modules meanwhile."""
    seen = Counter()

    def count(name):
        return lambda module, inputs: seen.update({name: inputs[0].shape[:-1].numel()})

    handles = [module.register_forward_pre_hook(count(name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def operations(work) -> int:
    def added_in_place(total, left, right, *, out_shape, **scales):  # which the counter does not know
        return 2 * left[0] * left[1] * right[1]

    with FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added_in_place}) as counter:
        work()
    return counter.get_total_flops()


def rows(tokens: int, width: int) -> torch.Tensor:
    return torch.randn(tokens, width, generator=torch.Generator().manual_seed(width))


def test_symmetric_sums_of_least_squares_are_computed_once():
    inputs, targets, scale = rows(8, 1024), rows(8, 3), rows(8, 1).abs() + 1
    equations = NormalEquations.empty(1024, 3, inputs.device)
    assert operations(lambda: equations.add(inputs, targets, scale)) < 0.65 * 2 * inputs.numel() * 1024
    products, cross, x, y = equations.means(centred=False)
    weighted, weight = inputs.double() * scale.square(), scale.double().square().sum()
    torch.testing.assert_close(products.double(), weighted.T @ inputs.double() / weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cross.double(), weighted.T @ targets.double() / weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.double(), weighted.sum(dim=0) / weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        y.double(), (targets * scale.square()).double().sum(dim=0) / weight, rtol=1e-4, atol=1e-5
    )


def test_tokens_that_are_not_scaled_count_one_each():
    ones, plain = (NormalEquations.empty(6, 3, torch.device("cpu")) for _ in range(2))
    ones.add(rows(20, 6), rows(20, 3), torch.ones(20, 1))
    plain.add(rows(20, 6), rows(20, 3))
    for found, wanted in zip(plain.means(centred=True), ones.means(centred=True), strict=True):
        torch.testing.assert_close(found, wanted)
    assert plain.weight == 20


def test_fits_in_the_precision_of_their_sums_are_those_in_float64():
    """Inputs that are almost sums of a few others, at the least ridge that is tried."""
    inputs = rows(4000, 5) @ rows(5, 300) + 1e-3 * rows(4000, 300)
    prior, targets = 0.1 * rows(300, 20).T, inputs @ rows(300, 20) + rows(4000, 20)
    equations = NormalEquations.empty(300, 20, inputs.device)
    equations.add(inputs, targets)
    weight = fit_projection(prior, equations, ridge=min(RIDGES)).weight
    products, cross = (inputs.double().T @ other.double() / 4000 for other in (inputs, targets))
    system = products + min(RIDGES) * torch.diag(products.diagonal())
    wanted = prior.double() + torch.linalg.solve(system, cross - products @ prior.double().T).T
    given, right = (inputs.double() @ one.T for one in (weight, wanted))
    assert (given - right).norm() < 1e-4 * right.norm()


def moments_of(inputs: torch.Tensor) -> Moments:
    moments = Moments.empty(inputs.shape[1], inputs.device)
    moments.add(inputs, inputs.sum(dim=0))
    return moments.mirrored()


@pytest.mark.parametrize("way", ["indices", "map"])
def test_equations_by_moments_are_those_of_what_the_prior_misses(way):
    inputs, weight = rows(50, 12), rows(7, 12)
    kept = torch.tensor([1, 4, 5, 9]) if way == "indices" else rows(12, 4)
    x = inputs[:, kept] if way == "indices" else inputs @ kept
    prior = weight[:, kept] if way == "indices" else rows(7, 4)
    wanted = NormalEquations.empty(4, 7, inputs.device)
    wanted.add(x, inputs @ weight.T - x @ prior.T)
    found = NormalEquations.of_lost(moments_of(inputs), kept, weight, prior)
    for mine, its in zip(found.means(centred=True), wanted.means(centred=True), strict=True):
        torch.testing.assert_close(mine, its, rtol=1e-4, atol=1e-4)


def test_refits_by_moments_do_not_multiply_what_stays():
    moments, weight, kept = moments_of(rows(8, 512)), rows(256, 512), torch.arange(512 - 32)
    prior = weight[:, kept]
    fitted = NormalEquations.of_lost(moments, kept, weight, prior)
    solving = operations(lambda: fit_projection(torch.zeros_like(prior), fitted, ridge=0.01))
    finding = operations(lambda: NormalEquations.of_lost(moments, kept, weight, prior))
    assert finding <= 2 * len(kept) * 33 * 256
    assert solving < 2 * len(kept) ** 2 * 256, "the prior is nothing: it is multiplied by nothing"


def test_what_is_removed_takes_no_more_part_in_the_greedy_search():
    activation = rows(400, 192).double()
    moments, readers = activation.T @ activation / 400, rows(64, 192).double()
    found = operations(lambda: greedy_losses(readers, moments, tokens=400))
    assert found < 0.65 * 2 * 192 * 192 * (192 + 64)


class Calls(TorchDispatchMode):
    """Counts operations."""

    count = 0

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        self.count += 1
        return function(*arguments, **options or {})


def heads(count: int, width: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Readers and second moments of several heads, of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    activation = torch.randn(count, 300, width, generator=generator, dtype=torch.float64)
    activation = activation * 10.0 ** torch.arange(count).view(-1, 1, 1)
    readers = torch.randn(count, 40, width, generator=generator, dtype=torch.float64)
    return readers, activation.mT @ activation


@pytest.mark.parametrize("tokens", [300, 10**6], ids=["float32", "float64"])
def test_heads_are_searched_together_as_each_alone(tokens):
    readers, moments = heads(5)
    found = greedy_losses(readers, moments, tokens)
    wanted = torch.stack([greedy_losses(*pair, tokens) for pair in zip(readers, moments, strict=True)])
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=0.0)
    assert torch.equal(found.argsort(), wanted.argsort())


def test_a_head_that_float32_does_not_factor_is_searched_again(monkeypatch):
    readers, moments = heads(3)
    wanted, plain, marked = greedy_losses(readers, moments, 300), obs._removed_greedily, readers[1, 0, 0].clone()

    def unsound(readers, inverse, dtype, **options):
        losses, is_sound = plain(readers, inverse, dtype, **options)
        fails = (readers[0, 0] == marked) & (dtype == torch.float32)
        return torch.where(fails, torch.nan, losses), is_sound & ~fails

    monkeypatch.setattr(obs, "_removed_greedily", unsound)
    found = greedy_losses(readers, moments, 300)
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=0.0)
    assert torch.equal(found[::2], wanted[::2])


def test_heads_cost_no_more_operations_than_one():
    few, many = heads(2), heads(6)
    with Calls() as of_few:
        greedy_losses(*few, tokens=300)
    with Calls() as of_many:
        greedy_losses(*many, tokens=300)
    assert of_few.count == of_many.count


def test_greedy_losses_by_a_float32_inverse_are_those_by_float64(monkeypatch):
    activation = rows(600, 8) @ rows(8, 96) + 0.1 * rows(600, 96)
    moments, readers = (activation.T @ activation / 600).double(), rows(64, 96).double()
    losses = greedy_losses(readers, moments, tokens=600)
    monkeypatch.setattr("transact.obs.LEAST_RIDGE", 1e9)
    torch.testing.assert_close(losses, greedy_losses(readers, moments, tokens=600), rtol=1e-3, atol=0.0)


@pytest.mark.filterwarnings("ignore:.*calibration tokens are few:UserWarning")
@pytest.mark.parametrize("variant", ["gqa", "biases"])
def test_refitting_runs_each_projection_once_on_each_token(variant):
    dense = tiny_llama(variant)
    narrowed = transact.apply_plan(dense, random_plan(dense.config))
    modules = {
        f"{whose} {name}": getattr(getattr(model.model.layers[1], part), name)
        for whose, model in {"dense": dense, "narrowed": narrowed}.items()
        for part, name in (("self_attn", "q_proj"), ("self_attn", "o_proj"), ("mlp", "up_proj"), ("mlp", "down_proj"))
    }
    with tokens_through(modules) as seen:
        compensate_on_pruned_inputs(narrowed, dense, WINDOWS)
    assert seen == dict.fromkeys(modules, WINDOWS.numel())
    assert isinstance(narrowed.model.layers[1].self_attn.o_proj, torch.nn.Linear)


def test_second_moments_of_a_layer_are_there_before_the_next_is_run():
    dense = tiny_llama("gqa")
    first, second = (layer.mlp.down_proj for layer in dense.model.layers)
    with tokens_through({"first": first, "second": second}) as seen:
        streamed = iterate_statistics(dense, WINDOWS, second_moments=True)
        next(streamed)
        assert seen == {"first": WINDOWS.numel()}
        next(streamed)
    assert seen == {"first": WINDOWS.numel(), "second": WINDOWS.numel()}


def test_measuring_keeps_moments_of_fitted_tokens_alone(monkeypatch):
    kept = []

    def watched(model, scores, statistics, *arguments, **options):
        kept.extend(statistics)
        return measured_scores(model, scores, statistics, *arguments, **options)

    monkeypatch.setattr("transact.pipeline.measured_scores", watched)
    transact.prune(tiny_llama("gqa"), WINDOWS, ratio=0.3)
    assert len(kept) == 2
    for layer in kept:
        assert layer.gradients is None
        for fitted, held_out in (layer.attention_moments, layer.mlp_moments):
            assert fitted.tokens == 14 * 24
            assert held_out.products.numel() == 0


@pytest.mark.filterwarnings("ignore:.*calibration tokens are few:UserWarning")
@pytest.mark.parametrize("compensation", ["none", "bias", "pruned", "dense"])
def test_losses_are_predicted_on_half_of_the_windows(compensation):
    dense = tiny_llama("gqa")
    recipe = Recipe(criterion="predicted-loss", allocation="searched", compensation=compensation)
    by_windows = transact.prune(dense, MANY, recipe=recipe, ratio=0.3)
    scored = recipe.scored(MANY, dense.config)
    assert len(scored) == (32 if compensation == "dense" else 16)
    statistics = transact.calibrate(dense, scored, second_moments=True, gradients="outputs")
    by_statistics = transact.prune(dense, MANY, recipe=recipe, ratio=0.3, statistics=statistics)
    assert by_windows.plan.widths == by_statistics.plan.widths
    for name, tensor in by_windows.model.state_dict().items():
        assert torch.equal(tensor, by_statistics.model.state_dict()[name]), name


def test_few_windows_and_what_predicts_no_losses_are_scored_on_all():
    best, config = transact.PRESETS["best"], tiny_llama("gqa").config
    for windows, scored in ((MANY, 16), (MANY[:28], 14), (MANY[:27], 14), (MANY[:26], 26), (MANY[:1], 1)):
        assert len(best.scored(windows, config)) == scored  # half are 8 x 40 tokens at least
    fitted_alone = held_out_split(MANY)[0].tolist()  # what is measured is none of what is scored
    assert all(window in fitted_alone for window in best.scored(MANY, config).tolist())
    for recipe in (*map(transact.PRESETS.get, ("transact", "flap", "llm-pruner")), Recipe(criterion="obs")):
        assert recipe.scored(MANY, config) is MANY


@pytest.mark.parametrize("kinds", [2, 3, 4, 8])
def test_kinds_of_text_in_turn_are_all_scored(kinds):
    windows = torch.arange(64)[:, None].repeat(1, 24)
    scored = transact.PRESETS["best"].scored(windows, tiny_llama("gqa").config)[:, 0]
    assert len(scored) == len(set(scored.tolist())) == 32
    assert torch.equal(scored, scored.sort().values)
    assert (scored % kinds).bincount(minlength=kinds)[: kinds - (kinds == 8)].min() >= 32 / kinds / 2  # 7 are held out


@pytest.mark.parametrize(("windows", "length"), [(8, 256), (3, 24), (1, 12), (9, 5)])
def test_every_fourth_token_begins_at_another_place_of_each_window(windows, length):
    batches = [_every(4, 1, length, window) for window in range(windows)]
    assert torch.equal(_every(4, windows, length, 0) % length, torch.cat(batches))
    read = torch.cat(batches).bincount(minlength=length)
    assert read.max() <= math.ceil(windows / 4)
    assert windows < 4 or read.min() >= windows // 4


@pytest.mark.filterwarnings("ignore:.*calibration tokens are few:UserWarning")
@pytest.mark.parametrize(("windows", "read"), [(48, 288), (36, 288), (16, 384), (1, 24)])
def test_maps_of_inputs_are_fitted_on_as_many_tokens_as_they_need(windows, read, monkeypatch):
    dense, added = tiny_llama("gqa"), Counter()
    narrowed = transact.apply_plan(dense, random_plan(dense.config))
    add = NormalEquations.add

    def counted(equations, inputs, targets, scale=None):
        added[scale is None] += len(inputs)
        add(equations, inputs, targets, scale)

    monkeypatch.setattr(NormalEquations, "add", counted)
    compensate_on_pruned_inputs(narrowed, dense, WINDOWS.repeat(3, 1)[:windows])
    assert added == {True: 2 * 2 * read, False: 2 * 2 * 24 * windows}


def test_rounds_of_measuring_run_the_dense_decoder_once():
    dense = tiny_llama("gqa")
    statistics = transact.calibrate(dense, WINDOWS, second_moments=True, gradients="outputs")
    criterion = transact.criterion_by_name("predicted-loss")
    scores = [criterion.score(*one) for one in zip(dense.model.layers, range(2), statistics.layers, strict=True)]
    runs = []
    dense.model.register_forward_pre_hook(lambda module, inputs: runs.append(1))
    measured_scores(
        dense, scores, statistics.layers, WINDOWS,
        lambda scores: transact.searched_widths(dense.config, scores, 0.3), rounds=3,
    )  # fmt: skip
    assert len(runs) == 1
