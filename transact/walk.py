"""A decoder computed block by block: one block on the device at a time, hidden states kept in host memory."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn
from tqdm.auto import tqdm


class _Recorder(nn.Module):
    """Stands in for a decoder layer: keeps what the model calls it with and hands the hidden states on."""

    def forward(self, hidden_states: torch.Tensor, **arguments):
        self.hidden_states, self.arguments = hidden_states, arguments
        return hidden_states


def kv_heads_of(layer: nn.Module) -> int:
    """Key-value heads of a decoder layer, dense or narrowed."""
    attention = layer.self_attn
    return getattr(attention, "kv_heads", None) or attention.config.num_key_value_heads


@contextmanager
def on_device(layer: nn.Module, device: torch.device | None) -> Iterator[torch.device]:
    """The layer on `device` for a while (None: where it lies); yields the device."""
    home = next(layer.parameters()).device
    if device is None or device == home:
        yield home
        return
    layer.to(device)
    try:
        yield device
    finally:
        layer.to(home)


class LayerWalk:
    """Hidden states of batches of token ids, taken through a decoder one block after the other.

    What the model gives its blocks (masks, rotary tables) is recorded from its own forward pass, so every family's
    peculiarities are kept. `hidden[batch]` (samples, length, D) is what enters the next block; it lies with the model,
    or, where a `device` is named to compute on, in host memory.
    """

    @torch.no_grad()
    def __init__(self, model: nn.Module, batches: Sequence[torch.Tensor], *, device: torch.device | None = None):
        self.model, self.device = model, device
        self.hidden: list[torch.Tensor] = []
        self._arguments: dict[torch.Size, list[dict]] = {}  # by batch shape: masks depend on nothing else
        self._shapes = [batch.shape for batch in batches]
        layers = model.model.layers
        recorders = nn.ModuleList(_Recorder() for _ in layers)
        model.model.layers = recorders
        try:
            for batch in batches:
                model.model(input_ids=batch.to(model.device), use_cache=False)
                self.hidden.append(recorders[0].hidden_states)
                if batch.shape not in self._arguments:
                    self._arguments[batch.shape] = [recorder.arguments for recorder in recorders]
        finally:
            model.model.layers = layers

    def blocks(self, indices: Iterable[int] | None = None, **bar) -> Iterator[tuple[int, nn.Module]]:
        """Index and block, in order, each on the device while it is the turn; `bar` are options of the progress bar.

        Of all blocks, or of those that `indices` name.
        """
        layers = self.model.model.layers
        for index in tqdm(range(len(layers)) if indices is None else indices, unit="layer", **bar):
            with on_device(layers[index], self.device):
                yield index, layers[index]

    def arguments(self, index: int, batch: int, device: torch.device) -> dict:
        """What the model passes to block `index` beside the hidden states of a batch, on `device`."""
        return _to(self._arguments[self._shapes[batch]][index], device)

    def run(self, index: int, layer: nn.Module, batch: int) -> torch.Tensor:
        """The output of block `index` for a batch, where the block lies."""
        device = next(layer.parameters()).device
        return layer(self.hidden[batch].to(device), **self.arguments(index, batch, device))

    def advance(self, index: int, layer: nn.Module, batch: int) -> None:
        """Replace the hidden states of a batch by the block's output."""
        self.hidden[batch] = self.run(index, layer, batch).to(self.hidden[batch].device)


def _to(value, device: torch.device):
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, tuple):
        return tuple(_to(item, device) for item in value)
    if isinstance(value, dict):
        return {name: _to(item, device) for name, item in value.items()}
    return value
