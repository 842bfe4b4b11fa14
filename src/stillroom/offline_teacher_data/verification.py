"""Whether a store is whole, sound, verified, and the one a study asks for."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from stillroom.errors import UserError
from stillroom.files import file_sha256, read_json, write_json
from stillroom.offline_teacher_data.recomputation import sample_ids
from stillroom.offline_teacher_data.store import (
    HEAD,
    MANIFEST,
    SignalStore,
    StoredExample,
    shard_fingerprint,
)
from stillroom.provenance import utc_now
from stillroom.signals import signals_of

VERIFIED = "verified.json"


def check_shard(path: Path, entry: dict[str, Any], fingerprint: str) -> None:
    """Raise `UserError` unless the shard is there with the size and SHA-256 of its manifest entry.

    `fingerprint` is the store's: a shard that another capture wrote is called that.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing")
    if (found := shard_fingerprint(path)) not in (None, fingerprint):
        raise UserError(f"{path} belongs to another capture: its fingerprint is {found}, the store's {fingerprint}")
    if path.stat().st_size != entry["bytes"]:
        raise UserError(f"{path} has {path.stat().st_size} bytes, the manifest says {entry['bytes']}: truncated?")
    if file_sha256(path) != entry["sha256"]:
        raise UserError(f"{path}: its bytes are not those that were written (SHA-256 differs)")


def check_head(store: SignalStore) -> None:
    """Raise `UserError` unless the teacher's output head, where it is kept, has the bytes that were written."""
    entry, path = store.manifest.get("teacher_head"), store.path / HEAD
    if entry is None:
        return
    if not path.is_file() or path.stat().st_size != entry["bytes"]:
        raise UserError(f"{path} is missing or truncated")
    if file_sha256(path) != entry["sha256"]:
        raise UserError(f"{path}: its bytes are not those that were written (SHA-256 differs)")


def check_example(store: SignalStore, example: StoredExample) -> None:
    """Raise `UserError`, naming file and example, unless every signal is what a forward pass can have given."""
    for fault in _faults(store, example):
        name = store.index[example.example_id][0]
        raise UserError(f"{store.path / name}: example {example.example_id}: {fault}")


def _faults(store: SignalStore, example: StoredExample) -> Iterator[str]:
    for column in store.columns.values():
        if column.finite and column.name in example.arrays and not np.isfinite(example[column.name]).all():
            yield f"{column.name} has NaN or infinite values"
    if not (np.diff(example.encoding.ends) >= 0).all():
        yield "token ends decrease"
    for signal in signals_of(store.layout):
        yield from signal.faults(example.arrays, 1e-5 if store.layout.dtype == "float32" else 5e-3)


def require_verified(store: SignalStore) -> None:
    """Raise `UserError` unless this very store has passed `verify_saved_data` and its shards have kept their sizes."""
    if not (store.path / VERIFIED).is_file():
        raise UserError(f"{store.path} has not been verified: run `stillroom verify` first")
    if read_json(store.path / VERIFIED, "manifest_sha256")["manifest_sha256"] != file_sha256(store.path / MANIFEST):
        raise UserError(f"{store.path / MANIFEST} was changed after verification: run `stillroom verify` again")
    sizes = {shard["name"]: shard["bytes"] for shard in store.manifest["shards"]}
    if (head := store.manifest.get("teacher_head")) is not None:
        sizes[HEAD] = head["bytes"]
    for name, size in sizes.items():
        path = store.path / name
        if not path.is_file() or path.stat().st_size != size:
            raise UserError(f"{path} is missing or truncated")


def require_matching(store: SignalStore, origin: dict[str, Any]) -> None:
    """Raise `UserError` with the differing fields side by side unless the store was made from `origin`."""
    refuse_difference(store.path, store.manifest["made_from"], origin)


def refuse_difference(store: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise `UserError` with the differing fields side by side, if any."""
    keys = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    if keys:
        lines = [f"  {key}: store has {found.get(key)!r}, study asks for {wanted.get(key)!r}" for key in keys]
        remedy = "delete it, or choose another folder with --set paths.store=DIR"
        raise UserError("\n".join([f"{store} was made from something else; {remedy}:", *lines]))


def verify_saved_data(path: Path | str, num_samples: int = 20, seed: int = 0) -> dict[str, Any]:
    """The gate before training: every shard's checksum, and `num_samples` rows rebuilt and checked.

    Writes `verified.json`, which training asks for, and returns it. Raises `UserError` at the first fault,
    naming the file and the example.
    """
    path = Path(path)
    store = SignalStore.open(path)
    # an archived store keeps the record it was archived with, also where this user could write
    sealed = not path.stat().st_mode & 0o222
    writable = not sealed and os.access(path, os.W_OK)
    sampled = sample_ids(store, num_samples, seed)
    try:
        for shard in store.manifest["shards"]:
            check_shard(path / shard["name"], shard, store.manifest["fingerprint"])
        check_head(store)
        _ = store.tokenizer  # raises where it is not there, or another
        for example_id in sampled:
            check_example(store, store.read(example_id))
    except UserError:
        if writable:
            (path / VERIFIED).unlink(missing_ok=True)
        raise
    record = {
        "manifest_sha256": file_sha256(path / MANIFEST),
        "sampled": len(sampled),
        "examples": len(store),
        "verified": utc_now(),
    }
    if writable:
        write_json(path / VERIFIED, record)
        return record
    try:
        require_verified(store)
    except UserError:  # a snapshot that has lost its record gets this one
        _unseal(path)
        try:
            write_json(path / VERIFIED, record)
        finally:
            seal(path)
    return record


def require_record(snapshot: Path) -> None:
    """Verify a snapshot that has lost its record of having been verified, and give it one."""
    try:
        require_verified(SignalStore.open(snapshot))
    except UserError:
        verify_saved_data(snapshot)


def _unseal(snapshot: Path) -> None:
    try:
        snapshot.chmod(0o755)
    except OSError as error:
        raise UserError(
            f"{snapshot} has no {VERIFIED}, and this user cannot write one there ({error.strerror}): let its owner run "
            "`stillroom verify`, or remove it and archive again"
        ) from None


def seal(snapshot: Path) -> Path:
    """Make a snapshot read-only, unless it is another user's, and return it. `UserError` unless it is verified."""
    require_verified(SignalStore.open(snapshot))
    for found in [*snapshot.rglob("*"), snapshot]:
        with suppress(PermissionError):  # another user's: what it holds is checked before it is read, all the same
            found.chmod(0o555 if found.is_dir() else 0o444)
    return snapshot
