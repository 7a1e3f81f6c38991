"""Where a figure was measured: versions, processor and device; no host or person is named."""

import hashlib
import platform
from functools import cache
from importlib import metadata
from pathlib import Path

import torch

import transact
from transact.devices import device_name, has_bfloat16, multiplies_bfloat16, resolve_device

PACKAGES = ("transact", "torch", "transformers", "numpy")


@cache
def code_hash() -> str:
    """Short hash of the pruning core's sources: results of different code are told apart."""
    digest = hashlib.sha256()
    package = Path(transact.__file__).parent
    for path in sorted(package.rglob("*.py")):
        digest.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def environment(device: torch.device) -> dict[str, str | int]:
    """Versions of what computes, the operating system, and the device by its product name."""
    versions = {package: metadata.version(package) for package in PACKAGES if package != "transact"}
    return {
        "device": device_name(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": platform.system(),
        "transact": transact.__version__,
        **versions,
    }


def fast_dtype(device: str) -> str:
    """bfloat16 on CUDA devices that have it and on processors with matrix units for it, else float32."""
    where = resolve_device(device)
    is_fast = multiplies_bfloat16() if where.type == "cpu" else has_bfloat16(where)
    return "bfloat16" if is_fast else "float32"
