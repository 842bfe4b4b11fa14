"""Whether a store is whole, sound, verified, and the one a study asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from stillroom.config import UserError
from stillroom.provenance import file_sha256, read_json
from stillroom.signal_store import MANIFEST, SignalStore, StoredExample, shard_fingerprint

VERIFIED = "verified.json"

# what a row's sum may be off by in 8 bits: its rounding has a standard deviation of 2/(255·√12), 0.0023; nine of them
_COMPANDED = 0.02


def check_shard(path: Path, entry: dict[str, Any], own: str) -> None:
    """Raise `UserError` unless the shard is there with the size and SHA-256 of its manifest entry.

    `own` is the store's fingerprint: a shard that another capture wrote is called that.
    """
    if not path.is_file():
        raise UserError(f"{path} is missing")
    if (found := shard_fingerprint(path)) not in (None, own):
        raise UserError(f"{path} belongs to another capture: its fingerprint is {found}, the store's {own}")
    if path.stat().st_size != entry["bytes"]:
        raise UserError(f"{path} has {path.stat().st_size} bytes, the manifest says {entry['bytes']}: truncated?")
    if file_sha256(path) != entry["sha256"]:
        raise UserError(f"{path}: its bytes are not those that were written (SHA-256 differs)")


def check_example(store: SignalStore, example: StoredExample) -> None:
    """Raise `UserError`, naming file and example, unless every signal is what a forward pass can have given."""

    def require(holds: bool, message: str) -> None:
        if not holds:
            name = store.index[example.example_id][0]
            raise UserError(f"{store.path / name}: example {example.example_id}: {message}")

    assert example.topk_ids is not None
    assert example.topk_logprobs is not None
    assert example.tail_logprobs is not None
    assert example.hidden is not None
    assert example.attention is not None
    tokens, layout = len(example.encoding), store.layout
    logprobs = example.topk_logprobs.astype(np.float64)
    tolerance = 1e-5 if layout.dtype == "float32" else 5e-3
    for name in ("topk_logprobs", "hidden", "attention"):
        require(bool(np.isfinite(getattr(example, name)).all()), f"{name} has NaN or infinite values")
    require(bool((np.diff(logprobs, axis=1) <= 0).all()), "top-k log-probabilities are not sorted")
    sums = np.exp(logprobs).sum(1) + np.exp(example.tail_logprobs.astype(np.float64))
    require(
        bool((np.abs(sums - 1) <= tolerance).all()), f"top-k and tail sum to {sums.min():.4f}…{sums.max():.4f}, not 1"
    )
    ids = np.sort(example.topk_ids.astype(np.int64), axis=1)
    require(bool((np.diff(ids, axis=1) > 0).all()) and bool((ids >= 0).all()), "top-k ids repeat or are negative")
    require(bool((np.diff(example.encoding.ends) >= 0).all()), "token ends decrease")
    row_starts = np.arange(tokens) * (np.arange(tokens) + 1) // 2
    sums = np.add.reduceat(example.attention.astype(np.float64), row_starts, axis=1)
    rounding = _COMPANDED if layout.attention_dtype else tolerance
    require(
        bool((np.abs(sums - 1) <= rounding).all()),
        f"attention rows sum to {sums.min():.4f}…{sums.max():.4f}, not 1",
    )
    require(bool((example.attention >= 0).all()), "attention has negative values")


def require_verified(store: SignalStore) -> None:
    """Raise `UserError` unless this very store has passed `verify_saved_data` and its shards have kept their sizes."""
    if not (store.path / VERIFIED).is_file():
        raise UserError(f"{store.path} has not been verified: run `stillroom verify` first")
    if read_json(store.path / VERIFIED, "manifest_sha256")["manifest_sha256"] != file_sha256(store.path / MANIFEST):
        raise UserError(f"{store.path / MANIFEST} was changed after verification: run `stillroom verify` again")
    for shard in store.manifest["shards"]:
        path = store.path / shard["name"]
        if not path.is_file() or path.stat().st_size != shard["bytes"]:
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
