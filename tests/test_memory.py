"""Memory: it grows with one layer, and with no more of the others than weights and what the planner needs."""

import itertools

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

import transact
from transact import pipeline
from transact.calibration import Moments, iterate_statistics
from transact.products import SQUARE, Half, add_products, mirror
from transact.walk import LayerWalk, on_device

HIDDEN, MLP = 32, 320
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
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    events = [event for event in profiled.profiler.kineto_results.events() if event.name() == "[memory]"]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(changes, initial=0))


def bytes_of_a_layer(model: torch.nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.model.layers[0].parameters())


def growth(work) -> float:
    """Bytes by which the peak of work(model) grows with each layer."""
    few, many = (peak_bytes(lambda model=model_of(layers): work(model)) for layers in (2, 6))
    return (many - few) / 4


def planned(model) -> int:
    """Bytes a layer that a pruned model and what the planner needs of it take."""
    halves = (MATRIX + 4 * HIDDEN**2) * (0.5 + SQUARE / 2 / MLP)  # moments, by squares
    gradients, inputs = 2 * 4 * HIDDEN**2, 4 * HIDDEN * WINDOWS.numel() / 8
    return bytes_of_a_layer(model) + halves + gradients + 2 * inputs + 20_000


@few_tokens
def test_what_best_holds_of_every_layer_is_weights_and_half_of_the_moments():
    assert growth(lambda model: transact.prune(model, WINDOWS, ratio=0.3)) < planned(model_of(2))
