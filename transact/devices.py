"""Devices by name, and what they can do."""

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


def device_name(device: torch.device) -> str:
    """The product name of a CUDA device, or else of the processor."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
