"""Atomic writes, and locks."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from uuid import uuid4

from filelock import FileLock, Timeout

from stillroom.errors import UserError


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
        full = reason in map(os.strerror, _FULL)
        remedy = "free space or choose another folder" if full else "choose another folder or name"
        raise UserError(f"cannot write {path}: {reason}; {remedy}") from error
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


def shown_size(size: float) -> str:
    """Bytes for people: `2.5 GB`, `0.3 MB`."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


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
    """Write a text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, "utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically; keys keep their order."""
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
