"""Devices and dtypes: which a machine multiplies natively, and a model cast to one."""

from __future__ import annotations

import gc
import os
import platform
import time
from functools import cache
from pathlib import Path
from typing import Any

import torch

from stillroom.config import Precision, Study

DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def native_bfloat16(device: torch.device | None = None) -> bool:
    """Whether a device has instructions that multiply bfloat16; without, a CPU is many times slower in it."""
    device = device or default_device()
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        described = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        return device.type != "cpu" or platform.machine() == "arm64"  # Apple's processors have them
    flags = {word for line in described.splitlines() if line.startswith(("flags", "Features")) for word in line.split()}
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16", "svebf16"})


def is_sharded(value: Any) -> bool:
    """Whether a tensor is a DTensor, by what that alone has: its module takes a second to import."""
    return isinstance(value, torch.Tensor) and hasattr(value, "full_tensor")


def resolve_precision(study: Study) -> Study:
    """The study with a dtype for each `auto`: bfloat16 where the device multiplies it natively, else float32.

    The teacher's device is this machine's first GPU. So is the students', unless a sweep trains them on CPUs
    (`sweep.gpus_per_trial` 0).
    """
    here = default_device()
    there = here if study.sweep.gpus_per_trial else torch.device("cpu")
    return study.with_dtypes(_native(here), _native(there))


def _native(device: torch.device) -> Precision:
    return "bfloat16" if native_bfloat16(device) else "float32"


def allow_determinism() -> None:
    """Give cuBLAS the workspace of fixed size that deterministic products need; it looks when it is first used."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def default_device() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def release_memory() -> None:
    """Give a GPU's memory back that nothing uses any more: other processes may need it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def scored_by_parts(saved: Precision, dtype: Precision, device: str) -> bool:
    """Whether a device multiplies float32 activations by 16-bit weights as `split_products` does."""
    return device == "cuda" and dtype == "float32" and saved != "float32"


@cache
def products(dtype: torch.dtype, device: torch.device) -> float:
    """Billions of floating-point operations a second in a matrix product: the best of a few short tries, made once."""
    size, best = 4096 if device.type == "cuda" else 384, 0.0  # large enough that launch time does not dominate
    left, right = (torch.ones(size, size, dtype=dtype, device=device) for _ in range(2))
    for _ in range(4):
        started = time.perf_counter()
        product = left @ right
        float(product[0, 0])  # waits for a GPU
        best = max(best, 2e-9 * size**3 / (time.perf_counter() - started))
    return best
