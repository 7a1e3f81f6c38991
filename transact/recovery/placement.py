"""On which device Trainer trains, and how it leaves device and model behind."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from accelerate.utils import DistributedType
from torch import nn
from transformers import TrainingArguments


class Arguments(TrainingArguments):
    """Trainer's settings, with a device of the caller's choice: Trainer's own in a single process is always cuda:0."""

    home: torch.device | None = None

    def stay_at(self, device: torch.device) -> None:
        """Train on `device`, unless a launcher gives every process its own."""
        if self.distributed_state.distributed_type == DistributedType.NO:
            self.home = self.distributed_state.device = device
            if device.type == "cuda":
                torch.cuda.set_device(device)

    @property
    def device(self) -> torch.device:
        return super().device if self.home is None else self.home


def current(device: torch.device):
    """CUDA's current device is this one meanwhile, and afterwards what it was: Trainer sets it."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def own_forward(model: nn.Module) -> Iterator[None]:
    """Afterwards the model has the forward pass that it had; accelerate wraps it in autocast, and leaves it so."""
    before = vars(model).get("forward")
    try:
        yield
    finally:
        for name in ("forward", "_original_forward", "_is_accelerate_prepared"):
            vars(model).pop(name, None)
        if before is not None:  # that of a model spread over devices
            model.forward = before
