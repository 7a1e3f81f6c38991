"""Bytes: weights, the KV cache as it really is, and the most that a process has held."""

import gc
import sys
from contextlib import suppress
from pathlib import Path

import psutil
import torch
from torch import nn

from transact import kv_elements_per_token, widths_of
from transact.modeling_transact import CACHE

STATUS, CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def weight_bytes(model: nn.Module) -> int:
    """Bytes that all parameters hold in memory, tied ones once; of quantised ones values, scales and zero points."""
    tensors = [tensor for parameter in model.parameters() for tensor in _stored(parameter)]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _stored(parameter: torch.Tensor) -> list[torch.Tensor]:
    """The tensors that a parameter is made of: itself, or what a tensor subclass wraps."""
    if not hasattr(parameter, "__tensor_flatten__"):
        return [parameter]
    return [getattr(parameter, name) for name in parameter.__tensor_flatten__()[0]]


@torch.no_grad()
def kv_bytes_per_token(model: nn.Module, tokens: int = 8) -> int:
    """Bytes that one token adds to the KV cache: read off the cache's tensors after a forward pass of `tokens`.

    Raises RuntimeError where that is not what the widths say: a model that caches more than it should.
    """
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=model.device)
    cache = getattr(model(input_ids=ids, use_cache=True, logits_to_keep=1), CACHE)
    tensors = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values) if tensor is not None]
    measured = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    formula = tokens * kv_elements_per_token(widths_of(model.config)) * tensors[0].element_size()
    if measured != formula:
        raise RuntimeError(f"the KV cache holds {measured} bytes for {tokens} tokens, the model's widths say {formula}")
    return measured // tokens


def release(device: torch.device) -> None:
    """Give memory that nothing refers to back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak_memory(device: torch.device) -> None:
    """Start `peak_memory_mib` afresh, where the system can (CUDA, Linux)."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR_REFS.exists():
        with suppress(OSError):  # a sandbox may have the file and not the reset
            CLEAR_REFS.write_text("5")  # resets the high-water mark of the resident set


def peak_memory_mib(device: torch.device) -> float:
    """The most memory held since `reset_peak_memory`, in MiB: by tensors on a CUDA device, else by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    if STATUS.exists():
        high_water = next(line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(high_water.split()[1]) / 2**10
    held = psutil.Process().memory_info()
    if hasattr(held, "peak_wset"):  # Windows
        return held.peak_wset / 2**20
    import resource  # of POSIX only; psutil has no peak there

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
