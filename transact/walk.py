"""A decoder computed block by block: one block on the device at a time, hidden states kept in host memory."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import psutil
import torch
from torch import nn
from tqdm.auto import tqdm

from .devices import multiplies_bfloat16

SHARE = 0.05  # of a device's memory, what may wait there
LOGITS = 2**25  # numbers that a language-model head gives at a time; of each some copies in float32 are made
HOST = torch.device("cpu")


class _Recorder(nn.Module):
    """Stands in for a decoder layer: keeps what the model calls it with and hands the hidden states on."""

    def forward(self, hidden_states: torch.Tensor, **arguments):
        self.hidden_states, self.arguments = hidden_states, arguments
        return hidden_states


def kv_heads_of(layer: nn.Module) -> int:
    """Key-value heads of a decoder layer, dense or narrowed."""
    attention = layer.self_attn
    return getattr(attention, "kv_heads", None) or attention.config.num_key_value_heads


def is_small(size: int, device: torch.device) -> bool:
    """Whether so many bytes are a small part of a device's memory, and may stay there for the whole of a walk."""
    if device.type == "cuda":
        return size <= SHARE * torch.cuda.mem_get_info(device)[1]
    return size <= SHARE * psutil.virtual_memory().total


def hidden_bytes(model: nn.Module, tokens: int) -> int:
    """Bytes of one hidden state for each of so many tokens."""
    return tokens * model.config.hidden_size * next(model.parameters()).element_size()


def resting_place(size: int, device: torch.device) -> torch.device:
    """Where so many bytes of hidden states wait: with what computes them, or in host memory where they are many."""
    return device if is_small(size, device) else HOST


def in_pieces(windows: torch.Tensor, head: nn.Linear) -> list[torch.Tensor]:
    """The tokens of windows (N, T, ...), window after window, as many at a time as a language-model head is given."""
    tokens = max(1, LOGITS // len(head.weight))
    return [piece for window in windows for piece in window.split(tokens)]


def is_slow(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device multiplies matrices in a dtype of 16 bits more slowly than in float32."""
    if device.type != "cpu":
        return False
    return dtype == torch.float16 or (dtype == torch.bfloat16 and not multiplies_bfloat16())


def sent(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on a device, itself where it lies there; in float32 where the device `is_slow` in its dtype.

    From the host to CUDA by way of pinned memory, which torch keeps and uses again: a block's worth, so that a model
    need not be pinned as a whole. Copies from there are several times as fast, and nothing waits for them.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device, torch.float32 if is_slow(tensor.dtype, device) else None)


def place_of(layer: nn.Module, otherwise: torch.device | None) -> torch.device | None:
    """Where a layer lies; a layer that keeps nothing lies anywhere."""
    return next((parameter.device for parameter in layer.parameters()), otherwise)


@contextmanager
def on_device(layer: nn.Module, device: torch.device | None, *, changes: bool = False) -> Iterator[torch.device]:
    """The layer on `device` for a while (None: where it lies), in float32 where that `is_slow`; yields the device.

    What the layer was before comes back afterwards; where the weights are changed meanwhile (`changes`), what they
    became is copied into it.
    """
    home = place_of(layer, device)
    device = home if device is None else device
    tensors = [*layer.parameters(), *layer.buffers()]
    if device == home and not any(is_slow(tensor.dtype, device) for tensor in tensors):
        yield home
        return
    before = [(tensor, tensor.data, tensor.grad) for tensor in tensors]
    for tensor, data, _ in before:
        tensor.grad = None  # of a user's training: no use here
        tensor.data = sent(data, device)
    try:
        yield device
    finally:
        for tensor, data, gradient in before:
            tensor.grad = None
            there, tensor.data = tensor.data, data
            tensor.grad = gradient
            if changes:
                data.copy_(there)


class LayerWalk:
    """Hidden states of batches of token ids, taken through a decoder one block after the other.

    What the model gives its blocks (masks, rotary tables) is recorded from its own forward pass, so every family's
    peculiarities are kept. `hidden[batch]` (samples, length, D) is what enters the next block; all of them lie with the
    model, or, where they are a large part of its device or a `device` is named to compute on, in host memory.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, batches: Sequence[torch.Tensor], *, device: torch.device | None = None):
        self.model, self.device = model, device
        self.hidden: list[torch.Tensor] = []
        self._arguments: dict[torch.Size, list[dict]] = {}  # by batch shape: masks depend on nothing else
        self._shapes = [batch.shape for batch in batches]
        computing = device or model.device
        size = hidden_bytes(model, sum(batch.numel() for batch in batches))
        home = HOST if device is not None else resting_place(size, computing)
        is_pinned = home.type == "cpu" and computing.type == "cuda"  # or copies take several times as long
        layers = model.model.layers
        recorders = nn.ModuleList(_Recorder() for _ in layers)
        model.model.layers = recorders
        try:
            for batch in batches:
                model.model(input_ids=batch.to(model.device), use_cache=False)
                hidden = recorders[0].hidden_states.to(home)
                self.hidden.append(hidden.pin_memory() if is_pinned else hidden)
                if batch.shape not in self._arguments:
                    self._arguments[batch.shape] = [recorder.arguments for recorder in recorders]
        finally:
            model.model.layers = layers

    def blocks(
        self, indices: Iterable[int] | None = None, *, changes: bool = False, **bar
    ) -> Iterator[tuple[int, nn.Module]]:
        """Index and block, in order, each on the device while it is the turn; `bar` are options of the progress bar.

        Of all blocks, or of those that `indices` name. See `on_device` for `changes`.
        """
        layers = self.model.model.layers
        for index in tqdm(range(len(layers)) if indices is None else indices, unit="layer", **bar):
            with on_device(layers[index], self.device, changes=changes):
                yield index, layers[index]

    def arguments(self, index: int, batch: int, device: torch.device) -> dict:
        """What the model passes to block `index` beside the hidden states of a batch, on `device`."""
        return _to(self._arguments[self._shapes[batch]][index], device)

    def run(self, index: int, layer: nn.Module, batch: int) -> torch.Tensor:
        """The output of block `index` for a batch, where the block lies."""
        hidden = self.hidden[batch]
        device = place_of(layer, hidden.device)
        return layer(sent(hidden, device), **self.arguments(index, batch, device))

    def advance(self, index: int, layer: nn.Module, batch: int) -> None:
        """Replace the hidden states of a batch, in place, by the block's output."""
        self.hidden[batch].copy_(self.run(index, layer, batch))

    @torch.no_grad()
    def inputs(self, **bar) -> list[list[torch.Tensor]]:
        """What enters each block, by batch, once all blocks have been run; `hidden` is then what enters the head.

        They lie with the hidden states, or in host memory where they are many.
        """
        size = sum(hidden.nbytes for hidden in self.hidden) * len(self.model.model.layers)
        home = resting_place(size, self.hidden[0].device)
        found = []
        for index, layer in self.blocks(**bar):
            found.append([hidden.to(home, copy=True) for hidden in self.hidden])
            for batch in range(len(self.hidden)):
                self.advance(index, layer, batch)
        return found

    def back(self, index: int, layer: nn.Module, above: list[torch.Tensor], batch: int) -> None:
        """One batch back through one block; `above[batch]` becomes the gradient at the block's input.

        That input, `hidden[batch]`, is dropped.
        """
        hidden = self.hidden[batch].detach()
        entering = sent(hidden, place_of(layer, hidden.device)).requires_grad_()
        self.hidden[batch] = entering
        with torch.enable_grad():
            output = self.run(index, layer, batch)
        output.backward(sent(above[batch], output.device))
        above[batch] = entering.grad.to(above[batch])
        self.hidden[batch] = None


def _to(value, device: torch.device):
    if isinstance(value, torch.Tensor):
        return sent(value, device)
    if isinstance(value, tuple):
        return tuple(_to(item, device) for item in value)
    if isinstance(value, dict):
        return {name: _to(item, device) for name, item in value.items()}
    return value
