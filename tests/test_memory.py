"""Memory: it grows with one layer, and with no more of the others than weights and what the planner needs."""

import gc
import itertools
import weakref
from dataclasses import replace
from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import transact
from tests.tiny import random_plan
from transact import pipeline, room
from transact.measured import error_slopes, final_states
from transact.products import Half, add_products, mirror
from transact.recovery import trainer
from transact.sparsity import zero_fraction
from transact.walk import LayerWalk, on_device

HIDDEN, MLP, SIDE = 32, 320, 32
WINDOWS = torch.randint(1, 97, (16, 24), generator=torch.Generator().manual_seed(0))
MATRIX = 4 * MLP**2  # bytes of a layer's second moments in float32
few_tokens = pytest.mark.filterwarnings("ignore:.*calibration tokens are few:UserWarning")


def model_of(layers: int) -> LlamaForCausalLM:
    """A Llama whose statistics of a layer are several times its weights."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=HIDDEN, intermediate_size=MLP, num_hidden_layers=layers, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def peak_bytes(work) -> int:
    """The most that tensors made meanwhile hold at once."""
    gc.collect()  # what earlier work left is not freed meanwhile
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes, initial=0))


def bytes_of_a_layer(model: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.model.layers[0].parameters())


def growth(work) -> float:
    """Bytes by which the peak of work(model) grows with each layer."""
    models = [model_of(layers) for layers in (2, 6)]
    few, many = (peak_bytes(partial(work, model)) for model in models)
    return (many - few) / 4


def planned(model) -> float:
    """Bytes a layer of a pruned model and of what the planner needs: half of the moments, gradients, inputs."""
    halves = (MATRIX + 4 * HIDDEN**2) * (0.5 + SIDE / 2 / MLP)
    gradients, inputs = 2 * 4 * HIDDEN**2, 4 * HIDDEN * WINDOWS.numel() / 8
    return bytes_of_a_layer(model) + halves + gradients + 2 * inputs + 20_000


@pytest.fixture(autouse=True)
def small_squares(monkeypatch):
    """Halves of matrices as small as these are halves."""
    monkeypatch.setattr("transact.products.SQUARE", SIDE)


@few_tokens
def test_what_best_holds_of_every_layer_is_weights_and_half_of_the_moments():
    assert growth(lambda model: transact.prune(model, WINDOWS, ratio=0.3)) < planned(model_of(2))


@few_tokens
def test_block_by_block_nothing_but_the_pruned_model_grows_with_the_layers():
    device = torch.device("cpu")
    found = growth(lambda model: transact.prune(model, WINDOWS, ratio=0.3, device=device))
    assert found < 2 * bytes_of_a_layer(model_of(2))


@few_tokens
def test_moments_that_are_not_let_go_of_are_seen(monkeypatch):
    held = []
    plain = pipeline.set_aside
    monkeypatch.setattr(pipeline, "set_aside", lambda layer, parts: held.append(layer) or plain(layer, parts))
    assert growth(lambda model: transact.prune(model, WINDOWS, ratio=0.3)) > planned(model_of(2)) + MATRIX


@few_tokens
@pytest.mark.parametrize("block_by_block", [None, torch.device("cpu")])
def test_moments_of_a_layer_are_gone_before_the_next_layers_are_summed(block_by_block, monkeypatch):
    model, plain, seen, held = model_of(3), transact.CRITERIA["predicted-loss"].score, [], []

    def watched(self, layer, index, statistics):
        seen.append(weakref.ref(statistics.mlp_moments[0].products))
        return plain(layer, index, statistics)

    monkeypatch.setattr(type(transact.CRITERIA["predicted-loss"]), "score", watched)
    for layer in model.model.layers[1:]:
        layer.register_forward_pre_hook(lambda module, inputs: held.extend(one() is not None for one in seen))
    transact.prune(model, WINDOWS, ratio=0.3, device=block_by_block)
    assert len(seen) == 3
    assert held
    assert not any(held)


@few_tokens
def test_refitting_on_dense_inputs_keeps_halves():
    recipe = transact.Recipe("obs", compensation="dense")
    found = growth(lambda model: transact.prune(model, WINDOWS, recipe=recipe, ratio=0.3))
    assert found < planned(model_of(2)) + MATRIX * (0.5 + SIDE / 2 / MLP)  # of tokens held out too


def test_half_of_a_symmetric_matrix_is_all_of_it():
    rows = torch.randn(50, 83, generator=torch.Generator().manual_seed(0))
    sums = torch.zeros(83, 83)
    add_products(sums, rows)
    mirror(sums)
    torch.testing.assert_close(sums, rows.T @ rows)
    half = Half.of(sums)
    assert sum(strip.numel() for strip in half.strips) < 0.72 * sums.numel()
    whole = half.to(torch.zeros(1, dtype=torch.float64))
    assert whole.dtype == torch.float64
    assert torch.equal(whole.float(), sums)


@pytest.mark.gpu
@pytest.mark.parametrize("chosen", ["ieee", "tf32"])
def test_sums_of_16_bits_on_a_gpu_are_exact_and_leave_the_callers_precision(chosen):
    rows = torch.randn(64, 40, generator=torch.Generator().manual_seed(0)).bfloat16()
    sums, matmul = torch.zeros(40, 40, device="cuda"), torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, chosen
    try:
        add_products(sums, rows.cuda())
        assert matmul.fp32_precision == chosen
    finally:
        matmul.fp32_precision = before
    mirror(sums)
    torch.testing.assert_close(sums.cpu(), rows.float().T @ rows.float(), rtol=1e-5, atol=1e-4)


@pytest.mark.gpu
def test_a_block_that_was_elsewhere_is_what_it_was_and_nothing_is_copied_back():
    layer = model_of(1).model.layers[0]
    weight = layer.mlp.up_proj.weight
    before, place = weight.detach().clone(), weight.data_ptr()
    weight.grad = torch.ones_like(weight)
    with on_device(layer, torch.device("cuda")), torch.no_grad():
        assert weight.is_cuda
        assert weight.grad is None
        weight.zero_()
    assert weight.data_ptr() == place
    assert torch.equal(weight, before)
    assert torch.equal(weight.grad, torch.ones_like(weight))


@pytest.mark.gpu
def test_a_block_that_was_changed_elsewhere_stays_changed():
    layer = model_of(1).model.layers[0]
    weight = layer.mlp.up_proj.weight
    place = weight.data_ptr()
    with on_device(layer, torch.device("cuda"), changes=True), torch.no_grad():
        weight.add_(1)
        wanted = weight.cpu()
    assert weight.data_ptr() == place
    assert torch.equal(weight, wanted)


@few_tokens
def test_hidden_states_too_many_for_the_device_change_nothing(monkeypatch):
    expected = transact.prune(model_of(2), WINDOWS, ratio=0.3)
    monkeypatch.setattr("transact.walk.SHARE", 0.0)
    monkeypatch.setattr("transact.compensate.is_small", lambda size, device: False)
    pruned = transact.prune(model_of(2), WINDOWS, ratio=0.3)
    for name, tensor in pruned.model.state_dict().items():
        torch.testing.assert_close(tensor, expected.model.state_dict()[name])


@pytest.mark.gpu
def test_many_hidden_states_wait_in_host_memory(monkeypatch):
    model = model_of(2).to("cuda")
    assert LayerWalk(model, [WINDOWS]).hidden[0].is_cuda
    monkeypatch.setattr("transact.walk.SHARE", 0.0)
    walk = LayerWalk(model, [WINDOWS])
    assert {hidden.device.type for hidden in walk.hidden} == {"cpu"}
    assert {hidden.device.type for block in walk.inputs(disable=True) for hidden in block} == {"cpu"}
    assert all(moments.is_cpu for layer in transact.loss_gradients(model, WINDOWS)
               for moments in (layer.attention_output, layer.mlp_output))  # fmt: skip


def test_memory_that_will_not_do_is_known_before_the_work(monkeypatch):
    model, recipe = model_of(4), transact.PRESETS["best"]
    squares = HIDDEN**2 + MLP**2
    needed = room.least_needed(model, recipe, 384, 0.7)
    weights = 0.7 * 4 * (bytes_of_a_layer(model) - 2 * 4 * HIDDEN)  # but for two norms a layer
    assert needed.total() == pytest.approx(weights + 2 * 4 * 384 * HIDDEN + 8 * squares + 4 * 2 * squares)
    block_by_block = room.least_needed(model, recipe, 384, 0.7, torch.device("meta"))
    assert block_by_block[torch.device("meta")] == 8 * squares
    assert block_by_block[torch.device("cpu")] == pytest.approx(weights + 2 * 4 * 384 * HIDDEN)
    elsewhere = room.least_needed(model, recipe, 384, 0.7, None, torch.device("meta"))
    assert elsewhere[torch.device("meta")] == pytest.approx(weights)
    assert elsewhere.total() == needed.total()
    monkeypatch.setattr(room, "free_memory", lambda device: needed.total() - 1)
    monkeypatch.setattr(pipeline, "loss_gradients", lambda *arguments, **options: pytest.fail("work has begun"))
    with pytest.raises(ValueError, match=r"pruning holds at least 0\.0 GiB on cpu beside the model, 0\.0 GiB are free"):
        transact.prune(model, WINDOWS, ratio=0.3)


def on_the_host(model, monkeypatch, **options):
    """Pruned as where a device does not hold both models."""
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "pruned_home", lambda *arguments: torch.device("cpu"))
        return transact.prune(model, WINDOWS, ratio=0.3, **options)


@few_tokens
@pytest.mark.parametrize(
    "recipe", ["best", "flap", "transact", transact.Recipe("obs", compensation="dense")], ids=str
)  # fmt: skip
def test_a_pruned_model_that_waits_in_host_memory_is_the_same(recipe, device, monkeypatch):
    dense = model_of(2).to(device)
    before = {name: tensor.clone() for name, tensor in dense.state_dict().items()}
    expected = transact.prune(dense, WINDOWS, recipe=recipe, ratio=0.3)
    pruned = on_the_host(dense, monkeypatch, recipe=recipe)
    assert pruned.plan.widths == expected.plan.widths
    assert pruned.ridges == expected.ridges
    tensors = dict(pruned.model.named_parameters()) | dict(pruned.model.named_buffers())
    assert {tensor.device.type for tensor in tensors.values()} == {"cpu"}
    for name, tensor in expected.model.state_dict().items():
        torch.testing.assert_close(pruned.model.state_dict()[name], tensor.cpu(), rtol=1e-3, atol=1e-4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in dense.state_dict().items())
    assert {parameter.device.type for parameter in dense.parameters()} == {device.type}


@few_tokens
def test_two_to_four_zeros_of_a_model_that_waits_in_host_memory(device, monkeypatch):
    recipe = transact.Recipe(criterion="activation", sparsity="wanda-2:4")
    widths = [transact.Widths(2, 16, 8, 64)] * 2
    with monkeypatch.context() as patched:
        patched.setattr(pipeline, "pruned_home", lambda *arguments: torch.device("cpu"))
        pruned = transact.prune(model_of(2).to(device), WINDOWS, recipe=recipe, widths=widths)
    assert zero_fraction(pruned.model) == pytest.approx(0.5, abs=1e-3)


@few_tokens
@pytest.mark.gpu
def test_of_a_model_that_waits_in_host_memory_a_device_holds_one_layer(monkeypatch):
    peaks = []
    for layers in (2, 6):
        model = model_of(layers).to("cuda")
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        on_the_host(model, monkeypatch)
        peaks.append(torch.cuda.max_memory_allocated() - before)
    assert (peaks[1] - peaks[0]) / 4 < 0.25 * bytes_of_a_layer(model)  # scores and bases of values


@pytest.mark.gpu
def test_a_device_that_does_not_hold_both_models_leaves_the_pruned_one_on_the_host(monkeypatch):
    model, recipe = model_of(2).to("cuda"), transact.PRESETS["best"]
    assert room.pruned_home(model, recipe, WINDOWS, 0.7) is None
    assert room.pruned_home(model_of(2), recipe, WINDOWS, 0.7) is None
    weights = sum(parameter.nbytes for parameter in model.parameters())
    monkeypatch.setattr(room, "free_memory", lambda device: weights if device.type == "cuda" else 2**40)
    with pytest.warns(UserWarning, match="cuda:0 does not hold the dense and the pruned model at once"):
        assert room.pruned_home(model, recipe, WINDOWS, 0.7) == torch.device("cpu")


def test_what_must_be_trained_or_timed_stays_with_the_dense_model(monkeypatch):
    monkeypatch.setattr(pipeline, "pruned_home", lambda *arguments: pytest.fail("it would lie elsewhere"))
    recipe = transact.PRESETS["flap"]
    transact.prune(model_of(2), WINDOWS, recipe=recipe, ratio=0.3, train=lambda model, shot: model)
    transact.prune(model_of(2), WINDOWS, recipe=replace(recipe, shots=2), ratio=0.3)
    transact.prune(model_of(2), WINDOWS, recipe=recipe, ratio=0.3, device=torch.device("cpu"))


@pytest.mark.gpu
def test_weights_come_to_a_device_from_pinned_memory(monkeypatch):
    layer, pinned, plain = model_of(1).model.layers[0], [], torch.Tensor.pin_memory
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor.nbytes) or plain(tensor))
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    with on_device(layer, torch.device("cuda")):
        assert sum(pinned) == sum(tensor.nbytes for tensor in before.values())
        assert all(torch.equal(tensor.cpu(), before[name]) for name, tensor in layer.state_dict().items())
    assert not any(tensor.is_pinned() for tensor in layer.parameters())


def test_room_is_asked_for_on_each_device_with_a_way_out(monkeypatch):
    monkeypatch.setattr(room, "least_needed", lambda *arguments: {torch.device("cuda", 0): 3 * 2**30})
    monkeypatch.setattr(room, "free_memory", lambda device: 2 * 2**30)
    with pytest.raises(ValueError, match=r"3\.0 GiB on cuda:0 .* 2\.0 GiB are free: block by block \(--layerwise"):
        room.check_room_to_prune(model_of(1), transact.PRESETS["best"], 384, 0.7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_window_by_window_have_the_gradients_of_the_whole(dtype):
    generator = torch.Generator().manual_seed(0)
    logits, wanted = (torch.randn(3, 5, 11, generator=generator).to(dtype) for _ in range(2))
    ids = torch.randint(0, 11, (3, 5), generator=generator)

    def divergence(given):
        pairs = (one.float().log_softmax(dim=-1).flatten(0, 1) for one in (given, wanted))
        return torch.nn.functional.kl_div(*pairs, log_target=True, reduction="batchmean")

    def surprise(given):
        return torch.nn.functional.cross_entropy(given.flatten(0, 1).float(), ids.flatten())

    for whole, targets, loss_of in (
        (divergence, wanted, trainer._divergence), (surprise, ids, trainer._surprise)
    ):  # fmt: skip
        mine, theirs = (logits.clone().requires_grad_() for _ in range(2))
        loss = trainer._PerWindow.apply(mine, targets, loss_of)
        (2 * loss).backward()
        (2 * whole(theirs)).backward()
        torch.testing.assert_close(loss, whole(theirs), rtol=1e-5, atol=0)
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-6)


VOCABULARY = 50_000  # whose head and logits are more than all layers


def with_vocabulary() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().bfloat16()


def test_measuring_holds_the_head_in_float32_once_and_few_logits(monkeypatch):
    monkeypatch.setattr("transact.walk.multiplies_bfloat16", lambda: False)
    dense = with_vocabulary()
    windows = torch.randint(1, VOCABULARY, (2, 128), generator=torch.Generator().manual_seed(0))
    narrowed = transact.apply_plan(dense, random_plan(dense.config))
    final = final_states(dense, windows)
    whole = error_slopes(narrowed, dense, windows, final)
    rows, head = 8, 4 * dense.lm_head.weight.numel()
    monkeypatch.setattr("transact.walk.LOGITS", rows * VOCABULARY)
    found = []
    held = peak_bytes(lambda: found.append(error_slopes(narrowed, dense, windows, final)))
    assert head < held < head + 6 * rows * VOCABULARY * 4 + 300_000
    torch.testing.assert_close(found[0], whole, rtol=1e-3, atol=1e-9)


def test_gradients_of_the_loss_hold_few_logits(monkeypatch):
    dense = with_vocabulary().float()
    windows = torch.randint(1, VOCABULARY, (1, 128), generator=torch.Generator().manual_seed(0))
    whole = transact.loss_gradients(dense, windows)
    rows = 8
    monkeypatch.setattr("transact.walk.LOGITS", rows * VOCABULARY)
    found = []
    assert peak_bytes(lambda: found.extend(transact.loss_gradients(dense, windows))) < 5 * rows * VOCABULARY * 4
    for mine, theirs in zip(found, whole, strict=True):
        rounding = 1e-6 * theirs.mlp_output.abs().max().item()  # of sums: some entries are next to nothing
        torch.testing.assert_close(mine.mlp_output, theirs.mlp_output, rtol=1e-4, atol=rounding)


def test_a_loss_holds_one_windows_logits_in_float32():
    def peak(samples: int) -> int:
        logits, wanted = (torch.randn(samples, 64, 512, dtype=torch.bfloat16) for _ in range(2))
        logits.requires_grad_()
        return peak_bytes(lambda: trainer._PerWindow.apply(logits, wanted, trainer._divergence))

    each = 64 * 512 * 2  # of a window's gradient
    assert (peak(6) - peak(2)) / 4 < 1.1 * each
