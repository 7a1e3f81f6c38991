"""Devices by name, and what they can do."""

import functools
import os
import platform
import warnings
from pathlib import Path

import torch

from .entry import in_one_line


def resolve_device(device: str) -> torch.device:
    """The device named, "auto" being CUDA where there is one. Raises ValueError for a device that is not there.

    Under a launcher (`accelerate launch`, torchrun) "auto" and "cuda" are the device of this process.
    """
    if device in ("auto", "cuda") and torch.cuda.is_available():
        rank = os.environ.get("LOCAL_RANK")
        return torch.device("cuda") if rank is None else torch.device("cuda", int(rank) % torch.cuda.device_count())
    if device == "auto":
        return torch.device("cpu")
    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("it holds no numbers")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(
            f"device {device!r} cannot be used ({in_one_line(error)}); allowed: auto, cpu, cuda"
        ) from error
    return torch.device(device)


def has_bfloat16(device: torch.device) -> bool:
    """Whether it is a CUDA device that computes in bfloat16; of one that only emulates it, slowly, it warns."""
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        is_native = torch.cuda.is_bf16_supported(including_emulation=False)
    if not is_native:
        name = torch.cuda.get_device_name(device)
        warnings.warn(f"{name} is too old for bfloat16: float32 is used instead", stacklevel=2)
    return is_native


@functools.cache
def multiplies_bfloat16() -> bool:
    """Whether this processor has matrix units for bfloat16 (AMX); without them float32 takes less time.

    With AVX-512 two cores took SmolLM2's decoder stack through 2,048 tokens in 3.1 to 3.2 s, in float32 in 2.1 to 2.3.
    With AVX2 alone 512 tokens times 2,048 x 8,192 weights took .84 s (float32 .17), and back 61 s (float32 .13).
    """
    return "amx_bf16" in _cpuinfo()


def _cpuinfo() -> str:
    """What Linux says of the processor."""
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8") if path.exists() else ""


def device_name(device: torch.device) -> str:
    """The product name of a CUDA device, or else of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = [line.split(":", 1)[1].strip() for line in _cpuinfo().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
