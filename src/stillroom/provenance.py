"""What ran, on what, from what; and files that are either whole or absent."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout

from stillroom.config import UserError
from stillroom.credentials import redact

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


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Give a temporary path beside `path`, for a file or a folder; on success it becomes `path` in one step.

    On failure it is removed, and `UserError` says why the system did not write.
    """
    temporary = _temporary(path)
    _WRITING.add(temporary.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _flush(temporary)
        if temporary.is_dir():
            remove_tree(path)
        temporary.replace(path)
    except Exception as error:
        _discard(temporary)
        reason = None if isinstance(error, UserError) else _system_reason(error)
        if reason is None:
            raise
        raise UserError(f"cannot write {path}: {reason}; free space or choose another folder") from error
    except BaseException:
        _discard(temporary)
        raise
    finally:
        _WRITING.discard(temporary.name)


_WRITING: set[str] = set()
"""Names of the temporary files of this process."""
_HOST = re.sub(r"[^A-Za-z0-9]", "-", socket.gethostname())[:40]
_TEMPORARY = re.compile(r"\..+\.(?P<host>[A-Za-z0-9-]+)\.(?P<process>\d+)\.[0-9a-f]{12}\.tmp")
_ABANDONED_SECONDS = 24 * 3600
"""How long the temporary file of a process that cannot be asked is left alone once nothing is written to it."""


def _temporary(path: Path) -> Path:
    """A name beside `path` that says which process writes it."""
    return path.with_name(f".{path.name[:60]}.{_HOST}.{os.getpid()}.{uuid4().hex[:12]}.tmp")


def _abandoned(path: Path) -> bool:
    """Whether a file or folder is what a process that is gone was writing, or removing."""
    found = _TEMPORARY.fullmatch(path.name)
    if found is None or path.name in _WRITING:
        return False
    here, process = found["host"] == _HOST, int(found["process"])
    with suppress(OSError):
        if time.time() - path.lstat().st_mtime > _ABANDONED_SECONDS:
            return True
    return here and (process == os.getpid() or not _alive(process))


def _alive(process: int) -> bool:
    if os.name == "nt":  # there, signal 0 would be Ctrl-C: age alone must tell
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is there, and another user's
        return True
    return True


def _flush(path: Path) -> None:
    """Put a file, or all files of a folder, on the disk itself: a name must not outlive its content in a power cut."""
    for file in [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]:
        with file.open("rb") as handle:
            os.fsync(handle.fileno())


def _discard(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):  # the reason it could not be written is what the user should hear
            path.unlink()


_FULL = {errno.ENOSPC, errno.EFBIG, errno.EDQUOT}


def _system_reason(error: BaseException) -> str | None:
    """What the system said, if it is why this failed; torch hides it in the context, Rust libraries in the text."""
    if isinstance(error, OSError):
        return os.strerror(error.errno) if error.errno else str(error)
    if found := re.search(r"\(os error (\d+)\)", str(error)):
        return os.strerror(int(found[1]))
    cause = error.__cause__ or error.__context__
    return cause.strerror if isinstance(cause, OSError) and cause.errno in _FULL else None


def remove_tree(folder: Path) -> None:
    """Remove a folder so that, stopped half-way, nothing is left under its name; no folder, nothing done."""
    if folder.is_dir():
        leaving = _temporary(folder)
        _WRITING.add(leaving.name)
        try:
            folder.rename(leaving)
            shutil.rmtree(leaving)
        finally:
            _WRITING.discard(leaving.name)


def remove_leftovers(folder: Path, within: bool = False) -> None:
    """Remove what killed processes left of what they were writing in a folder; with `within`, below it too."""
    for path in list(folder.rglob(".*.tmp") if within else folder.glob(".*.tmp")):
        if _abandoned(path):
            _discard(path)


def write_text(path: Path, text: str) -> None:
    """Write a text file that is whole or absent."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, "utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON that is whole or absent; keys keep their order."""
    write_text(path, json.dumps(value, indent=2, default=str, ensure_ascii=False) + "\n")


def read_text(path: Path) -> str:
    """Read a text file; `UserError` names one that is absent or no text."""
    try:
        return path.read_text("utf-8")
    except FileNotFoundError:
        raise UserError(f"{path} is missing: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text in UTF-8: {error}") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from None


def read_json(path: Path, *keys: str) -> Any:
    """Read JSON; `UserError` names a file that is absent or broken, or is no object with these keys."""
    try:
        value = json.loads(read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    lacking = [key for key in keys if not isinstance(value, dict) or key not in value]
    if lacking:
        raise UserError(f"{path} lacks {', '.join(lacking)}: edited, or of another version; delete it and start again")
    return value


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hex."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def utc_now() -> str:
    """The time now, UTC, to the second, ISO 8601."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


@contextmanager
def exclusive(folder: Path, what: str, name: str = ".lock", wait: float = 0) -> Iterator[None]:
    """Hold a lock in `folder`, which dies with its process; refused at once if it is held, or after `wait` seconds.

    A negative `wait` has no end.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / name)
        lock.acquire(timeout=wait)
    except Timeout:
        raise UserError(f"{folder}: another {what} is writing here; wait for it or choose another folder") from None
    except OSError as error:
        raise UserError(f"{folder}: cannot write here: {error.strerror or error}; choose another folder") from None
    try:
        yield
    finally:
        lock.release()


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
    files = sorted(p for p in here.rglob("*") if p.suffix in {".py", ".yaml", ".j2"})
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
        write_json(path, {**log, "stages": {**log["stages"], stage: record}, "study": study, "updated": utc_now()})
