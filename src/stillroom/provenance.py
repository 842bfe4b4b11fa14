"""What ran, on what, from what; and files written atomically."""

from __future__ import annotations

import hashlib
import os
import platform
import shlex
import subprocess
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from stillroom.credentials import redact
from stillroom.errors import UserError
from stillroom.files import exclusive, file_sha256, read_json, write_json

_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "pyarrow",
    "ray",
    "numpy",
    "scipy",
    "peft",
    "pandas",
)


def utc_now() -> str:
    """The time now, UTC, to the second, ISO 8601."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def package_versions() -> dict[str, str]:
    """Versions of Python, stillroom and the packages whose numbers it relies on."""
    versions = {"python": platform.python_version()}
    for name in ("stillroom", *_PACKAGES):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return versions


def package_digest() -> str:
    """Digest of this package's own files, by which two machines can tell that they run the same one."""
    here = Path(__file__).resolve().parent
    files = sorted(p for p in here.rglob("*") if p.suffix in {".py", ".yaml", ".j2", ".css", ".js"})
    return hashlib.sha256("".join(f"{p.relative_to(here)} {file_sha256(p)}" for p in files).encode()).hexdigest()[:16]


def git_commit() -> str | None:
    """Commit of the source tree this runs from, `+dirty` if changed; None outside a checkout."""
    here = Path(__file__).resolve().parent
    try:
        commit = _git(here, "rev-parse", "HEAD")
        return commit + ("+dirty" if _git(here, "status", "--porcelain") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def hardware() -> dict[str, Any]:
    """Processor, memory and accelerators of this machine."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else None
    return {"platform": platform.platform(), "cores": os.cpu_count(), "memory_bytes": memory, "gpus": gpus}


def gpu_joules() -> float | None:
    """Energy that this machine's NVIDIA GPUs have used since their driver was loaded, joules; None if unreadable.

    Needs the `nvidia-ml-py` package. Processors are left out: their counters wrap within minutes.
    """
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        used = [pynvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1000 for handle in handles]
    except Exception:  # no package, no driver, or a GPU without the counter: all mean that it cannot be read
        return None
    return float(sum(used)) if used else None


class Meter:
    """Wall clock and GPU energy from one reading to the next."""

    def __init__(self) -> None:
        """The first reading counts from here."""
        self._since = time.perf_counter(), gpu_joules()

    def read(self) -> dict[str, float | None]:
        """`seconds` and `gpu_joules` (None where it cannot be read) since the last reading."""
        (then, before), self._since = self._since, (time.perf_counter(), gpu_joules())
        now, after = self._since
        return {"seconds": now - then, "gpu_joules": None if before is None or after is None else after - before}


def record_run(path: Path, stage: str, facts: dict[str, Any], study: dict[str, Any]) -> None:
    """Add one stage's facts to `run.json`, the log of what made this folder, with the study as it is now."""
    record = {
        "finished": utc_now(),
        "command": redact(shlex.join(["stillroom", *sys.argv[1:]])),
        "commit": git_commit(),
        "versions": package_versions(),
        "hardware": hardware(),
        **facts,
    }
    with exclusive(path.parent, "stage", f".{path.name}.lock", wait=60):
        log = read_json(path, "stages") if path.exists() else {"stages": {}}
        if not isinstance(log["stages"], dict):
            raise UserError(f"{path} is damaged: its stages are no object; delete it")
        write_json(path, {**log, "stages": {**log["stages"], stage: record}, "study": study, "updated": utc_now()})
