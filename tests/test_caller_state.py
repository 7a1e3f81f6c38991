"""What the caller has set or hands over changes no result: modes, defaults, kinds of windows, adapters."""

import shutil
from contextlib import contextmanager, nullcontext

import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

import transact
from tests.tiny import tiny_llama
from transact.__main__ import main
from transact.entry import undisturbed

pytestmark = pytest.mark.filterwarnings("ignore:.*calibration tokens are few:UserWarning")
WINDOWS = torch.randint(1, 97, (16, 24), generator=torch.Generator().manual_seed(3))
TRAINING = transact.Training(tokens=96, batch=2, learning_rate=1e-3, bf16=False)


def with_dropout() -> LlamaForCausalLM:
    model = tiny_llama()
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    return model


def weights(model) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]):
    assert one.keys() == other.keys()
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


@contextmanager
def default_dtype(dtype: torch.dtype):
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def tensor_cores():
    """TF32 on CUDA by the newer of torch's two settings, after which the older one cannot be read."""
    matmul = torch.backends.cuda.matmul
    before, matmul.fp32_precision = matmul.fp32_precision, "tf32"
    try:
        yield
    finally:
        matmul.fp32_precision = before


STATES = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "bfloat16": lambda: default_dtype(torch.bfloat16),
    "float64": lambda: default_dtype(torch.float64),
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "device": lambda: torch.device("meta"),
}


@pytest.mark.parametrize("preset", ["best", "llm-pruner", "flap"])
def test_dropout_of_a_model_in_training_changes_nothing(preset):
    dense = with_dropout()
    expected = transact.prune(dense, WINDOWS, recipe=preset, ratio=0.3)
    assert not expected.model.training
    dense.train().model.layers[0].eval()  # a part that the user has frozen stays so
    modes = [module.training for module in dense.modules()]
    pruned = transact.prune(dense, WINDOWS, recipe=preset, ratio=0.3)
    assert_equal(weights(pruned.model), weights(expected.model))
    assert [module.training for module in dense.modules()] == modes
    assert pruned.model.training


def test_dropout_changes_no_statistics_and_no_gradients():
    dense = with_dropout()
    expected = transact.calibrate(dense, WINDOWS, gradients="outputs").layers
    gradients = transact.loss_gradients(dense, WINDOWS, of="weights")
    dense.train()
    for layer, other in zip(transact.calibrate(dense, WINDOWS, gradients="outputs").layers, expected, strict=True):
        assert torch.equal(layer.mlp, other.mlp)
        assert torch.equal(layer.gradients.mlp_output, other.gradients.mlp_output)
    for layer, other in zip(transact.loss_gradients(dense, WINDOWS, of="weights"), gradients, strict=True):
        assert_equal(layer.weights, other.weights)
    assert dense.training


def test_a_failure_gives_the_mode_back():
    dense = with_dropout().train()
    with pytest.raises(ValueError, match="vocabulary has 97"):
        transact.prune(dense, WINDOWS + 97)
    with torch.no_grad(), default_dtype(torch.float64):
        with undisturbed(dense):
            assert torch.is_grad_enabled()
            assert torch.get_default_dtype() == torch.float32
            assert not dense.training
        assert not torch.is_grad_enabled()
        assert torch.get_default_dtype() == torch.float64
    assert dense.training


@pytest.mark.parametrize("outside", [nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)])
def test_autocast_meanwhile_sees_weights_that_have_changed(outside):
    dense, row = tiny_llama(), torch.ones(1, tiny_llama().config.hidden_size)
    with outside, undisturbed(dense):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            before = dense.lm_head(row)
        dense.lm_head.weight.data *= 2
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert torch.equal(dense.lm_head(row), 2 * before)
    assert torch.is_autocast_cache_enabled()


def test_autocast_of_the_caller_sees_weights_that_have_changed():
    dense, row = tiny_llama(), torch.ones(1, tiny_llama().config.hidden_size)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = dense.lm_head(row)
        with undisturbed(dense):
            dense.lm_head.weight.data *= 2
        assert torch.equal(dense.lm_head(row), 2 * before)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("preset", ["best", "transact", "transact-released", "llm-pruner"])
def test_what_is_set_around_prune_changes_nothing(preset, state):
    dense = tiny_llama()
    expected = transact.prune(dense, WINDOWS, recipe=preset, ratio=0.3)
    with STATES[state]():
        pruned = transact.prune(dense, WINDOWS, recipe=preset, ratio=0.3)
    assert_equal(weights(pruned.model), weights(expected.model))
    assert not any(parameter.is_inference() for parameter in pruned.model.parameters())
    assert all(parameter.requires_grad for parameter in pruned.model.parameters())


def test_a_precision_set_in_the_newer_of_torchs_ways_is_no_hindrance():
    dense = tiny_llama()
    expected = transact.prune(dense, WINDOWS, ratio=0.3)
    with tensor_cores():
        pruned = transact.prune(dense, WINDOWS, ratio=0.3)
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
    assert_equal(weights(pruned.model), weights(expected.model))


@pytest.mark.parametrize("state", STATES)
def test_what_is_set_around_calibration_changes_nothing(state):
    dense = tiny_llama()
    expected = transact.calibrate(dense, WINDOWS, second_moments=True, gradients="outputs").layers[1]
    with STATES[state]():
        layer = transact.calibrate(dense, WINDOWS, second_moments=True, gradients="outputs").layers[1]
    assert torch.equal(layer.attention_moments[0].products, expected.attention_moments[0].products)
    assert torch.equal(layer.gradients.rope_pairs, expected.gradients.rope_pairs)
    assert layer.mlp.dtype == torch.float64


def narrowed_llama():
    return transact.prune(tiny_llama(), recipe=transact.Recipe(criterion="magnitude"), ratio=0.3).model


def recovered_weights(narrowed, teacher: LlamaForCausalLM) -> dict[str, torch.Tensor]:
    recovered = transact.recover(narrowed, WINDOWS, TRAINING, teacher=teacher)
    assert not recovered.model.training
    return weights(recovered.model)


@pytest.fixture(scope="module")
def usual_recovery() -> dict[str, torch.Tensor]:
    return recovered_weights(narrowed_llama(), tiny_llama())


@pytest.mark.parametrize("state", STATES)
def test_what_is_set_around_recovery_changes_nothing(state, usual_recovery):
    narrowed, teacher = narrowed_llama(), tiny_llama().train()
    with STATES[state]():
        recovered = recovered_weights(narrowed, teacher)
    assert_equal(recovered, usual_recovery)
    assert teacher.training


@pytest.mark.parametrize("state", ["no_grad", "inference_mode", "bfloat16"])
def test_from_loading_to_loading_again(state, tiny_directory, tmp_path):
    with STATES[state]():
        dense, tokenizer = transact.load_model(tiny_directory, device="cpu")
        pruned = transact.prune(dense, WINDOWS, ratio=0.3)
        transact.save_checkpoint(tmp_path / "out", pruned.model, pruned.plan, {}, tokenizer=tokenizer)
        loaded, _ = transact.load_model(tmp_path / "out", device="cpu")
    expected = transact.prune(transact.load_model(tiny_directory, device="cpu")[0], WINDOWS, ratio=0.3)
    assert_equal(weights(pruned.model), weights(expected.model))
    assert_equal(weights(loaded), weights(expected.model))
    assert not any(tensor.is_inference() for tensor in (*dense.parameters(), *loaded.parameters()))


def test_weights_made_in_inference_mode_are_refused_where_gradients_are_needed():
    with torch.inference_mode():
        dense = tiny_llama()
    for work in (
        lambda: transact.prune(dense, WINDOWS),
        lambda: transact.calibrate(dense, WINDOWS, gradients="outputs"),
        lambda: transact.loss_gradients(dense, WINDOWS),
    ):
        with pytest.raises(ValueError, match=r"inside torch\.inference_mode\(\) and takes no gradients"):
            work()
    pruned = transact.prune(dense, WINDOWS, recipe="transact", ratio=0.3)
    pruned.model(WINDOWS, labels=WINDOWS).loss.backward()  # what comes out of it is of the usual kind
    with torch.inference_mode():
        narrowed = transact.apply_plan(dense, pruned.plan)
    assert not any(parameter.is_inference() for parameter in narrowed.parameters())
    narrowed = transact.apply_plan(dense, pruned.plan)
    with torch.inference_mode():
        narrowed.lm_head.weight = torch.nn.Parameter(narrowed.lm_head.weight.clone())
    with pytest.raises(ValueError, match=r"lm_head\.weight was made inside"):
        transact.recover(narrowed, WINDOWS, TRAINING, teacher=tiny_llama())


KINDS = {
    "int32": WINDOWS.int,
    "int16": WINDOWS.short,
    "uint8": lambda: WINDOWS.to(torch.uint8),
    "lists": WINDOWS.tolist,
    "tuples": lambda: tuple(map(tuple, WINDOWS.tolist())),
    "rows": lambda: list(WINDOWS.unbind()),
    "array": lambda: WINDOWS.numpy().astype(np.int32),
    "rows of arrays": lambda: list(WINDOWS.numpy()),
    "not contiguous": lambda: WINDOWS.T.contiguous().T,
}


@pytest.mark.parametrize("kind", KINDS)
def test_any_integers_are_windows(kind):
    dense = tiny_llama()
    narrowed = transact.prune(dense, KINDS[kind](), ratio=0.3).model
    assert_equal(weights(narrowed), weights(transact.prune(dense, WINDOWS, ratio=0.3).model))
    measured, wanted = (transact.calibrate(narrowed, windows) for windows in (KINDS[kind](), WINDOWS))
    assert torch.equal(measured.layers[0].mlp, wanted.layers[0].mlp)
    assert measured.tokens == wanted.tokens
    gradients, wanted = (transact.loss_gradients(dense, windows) for windows in (KINDS[kind](), WINDOWS))
    assert torch.equal(gradients[0].mlp_output, wanted[0].mlp_output)
    assert transact.recover(narrowed, KINDS[kind](), TRAINING, teacher=dense).tokens == TRAINING.tokens


NO_WINDOWS = {
    "floats": (WINDOWS.float(), r"must be token ids \(integers\), got torch\.float32"),
    "truths": (WINDOWS > 5, "got torch.bool"),
    "a row": (WINDOWS[0], r"non-empty \(samples, length\) matrix of token ids, got \(24,\)"),
    "a flat list": (WINDOWS[0].tolist(), r"got \(24,\)"),
    "nothing": ([], "must be a"),
    "rows of two lengths": ([[1, 2], [3]], "must be a"),
    "text": ("some text", "must be a"),
    "texts": (["some", "text"], "must be a"),
    "a number": (7, "must be a"),
    "negative ids": (-WINDOWS, "vocabulary has 97"),
    "ids of another tokeniser": (WINDOWS + 60, "vocabulary has 97"),
    "too long": (torch.ones(1, 129, dtype=torch.int64), "context of 128"),
    "a batch of a tokeniser": ({"input_ids": WINDOWS}, "must be a"),
}


@pytest.mark.parametrize("kind", NO_WINDOWS)
def test_what_is_no_windows_is_refused_everywhere_alike(kind):
    windows, named = NO_WINDOWS[kind]
    dense = tiny_llama()
    narrowed = narrowed_llama()
    for work in (
        lambda: transact.prune(dense, windows),
        lambda: transact.prune(dense, windows, recipe="transact"),
        lambda: transact.calibrate(dense, windows),
        lambda: transact.loss_gradients(dense, windows),
        lambda: transact.recover(narrowed, windows, TRAINING, teacher=dense),
    ):
        with pytest.raises(ValueError, match=named):
            work()


@pytest.mark.parametrize("preset", ["best", "llm-pruner"])
def test_gradients_of_windows_of_one_token_are_refused(preset):
    with pytest.raises(ValueError, match="windows of one token have no next token"):
        transact.prune(tiny_llama(), WINDOWS[:, :1], recipe=preset, ratio=0.3)


def lora():
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["q_proj", "down_proj"])


def wrapped(model):
    from peft import get_peft_model

    return get_peft_model(model, lora())


def injected(model):
    from peft import inject_adapter_in_model

    return inject_adapter_in_model(lora(), model)


def unwrapped(model):
    return wrapped(model).get_base_model()


def prompted(model):
    from peft import PromptTuningConfig, get_peft_model

    return get_peft_model(model, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


@pytest.mark.parametrize("adapted", [wrapped, injected, unwrapped, prompted])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapters_are_refused_at_once_and_merged_ones_are_weights(adapted):
    dense = adapted(tiny_llama())
    narrowed = adapted(narrowed_llama())
    for work in (
        lambda: transact.prune(dense, WINDOWS),
        lambda: transact.prune(dense, recipe=transact.Recipe(criterion="magnitude")),
        lambda: transact.check_prunable(dense),
        lambda: transact.calibrate(dense, WINDOWS),
        lambda: transact.loss_gradients(dense, WINDOWS),
        lambda: transact.recover(narrowed, WINDOWS, TRAINING, teacher=tiny_llama()),
    ):
        with pytest.raises(ValueError, match=r"carries adapters of peft .*: merge them into its weights first"):
            work()
    if adapted is wrapped:
        merged = dense.merge_and_unload()
        assert transact.prune(merged, WINDOWS, ratio=0.3).model.num_parameters() < merged.num_parameters()


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_adapter_files_beside_the_weights_are_refused_by_name(tiny_directory, tiny_text, tmp_path, capsys):
    both = tmp_path / "both"
    shutil.copytree(tiny_directory, both)
    wrapped(tiny_llama()).save_pretrained(tmp_path / "adapter")
    for path in (tmp_path / "adapter").iterdir():
        shutil.copy(path, both)
    for directory in (both, tmp_path / "adapter"):
        with pytest.raises(ValueError, match=r"adapter_config\.json.*merge them into the model's weights first"):
            transact.load_model(directory)
    assert main(["prune", str(both), str(tmp_path / "out"), "--calibration", str(tiny_text)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("transact: error: model ")
    assert not (tmp_path / "out").exists()
