"""The teacher's data: captured once, verified before anything trains on it, archived under a date.

    capture → store/part-*.parquet, manifest.json → verify_saved_data → verified.json → archive → store_<UTC date>/
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from stillroom.attention_capture import check_capture
from stillroom.config import Signals, UserError, fingerprint
from stillroom.corpus import examples_digest
from stillroom.encoding import Encoding, encode_many
from stillroom.models import heads, output_logits, tokenizer_hash, vocabulary_size, width
from stillroom.provenance import exclusive, file_sha256, package_versions, read_json, utc_now, write_json
from stillroom.signal_store import (
    MANIFEST,
    SCHEMA_VERSION,
    Layout,
    SignalStore,
    StoredExample,
    _to_numpy_array,
    _to_py,
    id_dtype,
    shard_entry,
    shard_is_whole,
    shard_name,
    write_shard,
)
from stillroom.tasks import Example
from stillroom.teacher_signals import TeacherSignals, compute_signals

VERIFIED = "verified.json"
Progress = Callable[[int, int], None]
"""Called with (examples done, examples in all)."""

__all__ = [
    "_to_numpy_array",
    "_to_py",
    "archive",
    "capture",
    "made_from",
    "require_matching",
    "require_verified",
    "verify_saved_data",
]


def made_from(teacher_identity: str, tokenizer: Any, signals: Signals, examples: Sequence[Example]) -> dict[str, Any]:
    """Everything that decides a store's values; its fingerprint is the store's."""
    return {
        "teacher": teacher_identity,
        "tokenizer": tokenizer_hash(tokenizer),
        "corpus": examples_digest(examples),
        "examples": len(examples),
        "top_k": signals.top_k,
        "dtype": signals.dtype,
        "shard_examples": signals.shard_examples,
        "batch_tokens": signals.batch_tokens,
    }


def capture(
    model: PreTrainedModel,
    tokenizer: Any,
    examples: Sequence[Example],
    signals: Signals,
    store: Path,
    origin: dict[str, Any],
    progress: Progress = lambda done, total: None,
) -> SignalStore:
    """Run the teacher over every example and write the store; shards that are whole already are kept.

    `origin` comes from `made_from`. Raises `UserError` if the folder holds another capture, if k exceeds the
    vocabulary, if the disk is too small, or if the architecture's attention cannot be captured.
    """
    layout = _layout(model, signals)
    encodings = encode_many(tokenizer, [example.text for example in examples])
    own = fingerprint(origin)
    shards = _plan_shards(encodings, signals.shard_examples)
    with exclusive(store, "capture"):
        _claim(store, origin)
        missing = [n for n, rows in enumerate(shards) if not _done(store, n, rows, examples, own)]
        _require_space(store, sum(len(encodings[i]) for n in missing for i in shards[n]), encodings, layout)
        longest = max(range(len(encodings)), key=lambda i: len(encodings[i]))
        if missing:
            probe = torch.from_numpy(encodings[longest].ids.astype("int64"))[None].to(model.device)
            check_capture(model, probe, lambda hidden: output_logits(model, hidden))
        done = sum(len(rows) for n, rows in enumerate(shards) if n not in missing)
        progress(done, len(examples))
        for number in missing:
            rows = _signals_of(model, examples, encodings, shards[number], signals)
            counted = _counted(rows, lambda n, base=done: progress(base + n, len(examples)))  # type: ignore[misc]
            write_shard(store / shard_name(number), own, layout, counted)
            done += len(shards[number])
        tokenizer.save_pretrained(store / "tokenizer")
        _finish(store, layout, origin, len(shards), examples, vocabulary_size(model))
    return SignalStore.open(store)


def _layout(model: PreTrainedModel, signals: Signals) -> Layout:
    vocabulary = vocabulary_size(model)
    if signals.top_k > vocabulary:
        raise UserError(f"signals.top_k: {signals.top_k} exceeds the teacher's vocabulary of {vocabulary}")
    return Layout(signals.top_k, width(model.config), heads(model.config), signals.dtype, id_dtype(vocabulary))


def _plan_shards(encodings: Sequence[Encoding], size: int) -> list[list[int]]:
    """Which examples go into which shard: sorted by length, so that a batch needs little padding."""
    ordered = sorted(range(len(encodings)), key=lambda i: (-len(encodings[i]), i))
    return [ordered[first : first + size] for first in range(0, len(ordered), size)]


def _claim(store: Path, origin: dict[str, Any]) -> None:
    """Mark an empty folder as this capture's, or check that it is; a finished store counts as marked."""
    marker = store / "capture.json"
    if marker.exists():
        _refuse_difference(store, read_json(marker), origin)
    elif any(store.glob("*.parquet")) or (store / MANIFEST).exists():
        raise UserError(f"{store} holds files of another capture; choose another folder with paths.store")
    else:
        write_json(marker, origin)


def _refuse_difference(store: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    keys = [key for key in {**found, **wanted} if found.get(key) != wanted.get(key)]
    if keys:
        lines = [f"  {key}: store has {found.get(key)!r}, study asks for {wanted.get(key)!r}" for key in keys]
        remedy = "delete it, or choose another folder with --set paths.store=DIR"
        raise UserError("\n".join([f"{store} was made from something else; {remedy}:", *lines]))


def _done(store: Path, number: int, rows: list[int], examples: Sequence[Example], own: str) -> bool:
    return shard_is_whole(store / shard_name(number), own, [examples[i].example_id for i in rows])


def _require_space(store: Path, tokens: int, encodings: Sequence[Encoding], layout: Layout) -> None:
    total = sum(len(e) for e in encodings)
    planned = sum(sum(layout.payload_bytes(len(e)).values()) for e in encodings)
    needed = int(1.05 * planned * tokens / total)
    free = shutil.disk_usage(store).free
    if needed > free:
        raise UserError(
            f"{store}: the teacher's data need {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free; "
            "free some space or choose another disk with OFFLINE_DATA_PATH or --set paths.store=DIR"
        )


def _signals_of(
    model: PreTrainedModel,
    examples: Sequence[Example],
    encodings: Sequence[Encoding],
    rows: Sequence[int],
    signals: Signals,
) -> Iterator[tuple[str, str, Encoding, TeacherSignals]]:
    dtype = {"float16": torch.float16, "float32": torch.float32}[signals.dtype]
    for batch in _token_batches(rows, encodings, signals.batch_tokens):
        try:
            results = compute_signals(model, [encodings[i] for i in batch], signals.top_k, dtype)
        except UserError as error:
            raise UserError(f"examples {[examples[i].example_id for i in batch]}: {error}") from None
        for i, result in zip(batch, results, strict=True):
            yield examples[i].example_id, examples[i].task, encodings[i], result


def _token_batches(rows: Sequence[int], encodings: Sequence[Encoding], budget: int) -> Iterator[list[int]]:
    batch: list[int] = []
    for i in rows:
        if batch and len(encodings[batch[0]]) * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _counted(rows: Iterator[Any], report: Callable[[int], None]) -> Iterator[Any]:
    for number, row in enumerate(rows, 1):
        yield row
        report(number)


def _finish(store: Path, layout: Layout, origin: dict[str, Any], shards: int, examples: Sequence[Example], vocabulary: int) -> None:
    if (store / MANIFEST).exists():
        return
    prompts: dict[str, str] = {}
    for example in examples:
        prompts.setdefault(example.task, example.prompt)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": fingerprint(origin),
        "made_from": origin,
        "created": utc_now(),
        "versions": package_versions(),
        "layout": layout.__dict__,
        "vocabulary": vocabulary,
        "prompts": prompts,
        "shards": [shard_entry(store / shard_name(n)) for n in range(shards)],
    }
    write_json(store / MANIFEST, manifest)


def verify_saved_data(path: Path | str, num_samples: int = 20, seed: int = 0) -> dict[str, Any]:
    """The gate before training: every shard's checksum, and `num_samples` rows rebuilt and checked.

    Writes `verified.json`, which training asks for, and returns it. Raises `UserError` at the first fault,
    naming the file and the example.
    """
    path = Path(path)
    store = SignalStore.open(path)
    (path / VERIFIED).unlink(missing_ok=True) if os.access(path, os.W_OK) else None
    for shard in store.manifest["shards"]:
        _check_shard(path / shard["name"], shard)
    ids = sorted(store.index)
    for example_id in random.Random(seed).sample(ids, min(num_samples, len(ids))):
        _check_example(store, store.read(example_id))
    record = {
        "manifest_sha256": file_sha256(path / MANIFEST),
        "sampled": min(num_samples, len(ids)),
        "examples": len(ids),
        "verified": utc_now(),
    }
    write_json(path / VERIFIED, record)
    return record


def _check_shard(path: Path, entry: dict[str, Any]) -> None:
    if not path.is_file():
        raise UserError(f"{path} is missing")
    if path.stat().st_size != entry["bytes"]:
        raise UserError(f"{path} has {path.stat().st_size} bytes, the manifest says {entry['bytes']}: truncated?")
    if file_sha256(path) != entry["sha256"]:
        raise UserError(f"{path}: its bytes are not those that were written (SHA-256 differs)")


def _check_example(store: SignalStore, example: StoredExample) -> None:
    def require(holds: bool, message: str) -> None:
        if not holds:
            name = store.index[example.example_id][0]
            raise UserError(f"{store.path / name}: example {example.example_id}: {message}")

    assert example.topk_ids is not None
    assert example.topk_logprobs is not None
    assert example.hidden is not None
    assert example.attention is not None
    tokens, layout = len(example.encoding), store.layout
    logprobs = example.topk_logprobs.astype(np.float64)
    tolerance = 1e-5 if layout.dtype == "float32" else 5e-3
    for name in ("topk_logprobs", "hidden", "attention"):
        require(bool(np.isfinite(getattr(example, name)).all()), f"{name} has NaN or infinite values")
    require(bool((np.diff(logprobs, axis=1) <= 0).all()), "top-k log-probabilities are not sorted")
    require(bool((np.exp(logprobs).sum(1) <= 1 + tolerance).all()), "top-k probabilities sum to more than 1")
    ids = np.sort(example.topk_ids.astype(np.int64), axis=1)
    require(bool((np.diff(ids, axis=1) > 0).all()) and bool((ids >= 0).all()), "top-k ids repeat or are negative")
    require(bool((np.diff(example.encoding.ends) >= 0).all()), "token ends decrease")
    row_starts = np.arange(tokens) * (np.arange(tokens) + 1) // 2
    sums = np.add.reduceat(example.attention.astype(np.float64), row_starts, axis=1)
    require(bool((np.abs(sums - 1) <= tolerance).all()), f"attention rows sum to {sums.min():.4f}…{sums.max():.4f}, not 1")
    require(bool((example.attention >= 0).all()), "attention has negative values")


def require_verified(store: SignalStore) -> None:
    """Raise `UserError` unless this very store has passed `verify_saved_data` and its shards have kept their sizes."""
    if not (store.path / VERIFIED).is_file():
        raise UserError(f"{store.path} has not been verified: run `stillroom verify` first")
    if read_json(store.path / VERIFIED)["manifest_sha256"] != file_sha256(store.path / MANIFEST):
        raise UserError(f"{store.path / MANIFEST} was changed after verification: run `stillroom verify` again")
    for shard in store.manifest["shards"]:
        path = store.path / shard["name"]
        if not path.is_file() or path.stat().st_size != shard["bytes"]:
            raise UserError(f"{path} is missing or truncated")


def require_matching(store: SignalStore, origin: dict[str, Any]) -> None:
    """Raise `UserError` with the differing fields side by side unless the store was made from `origin`."""
    _refuse_difference(store.path, store.manifest["made_from"], origin)


def archive(path: Path | str) -> Path:
    """An immutable copy beside the store, `<store>_<UTC date>`; the one there is, if this store is archived already.

    Hard links where the file system has them. Raises `UserError` unless the store is verified.
    """
    path = Path(path).resolve()
    store = SignalStore.open(path)
    require_verified(store)
    digest = file_sha256(path / MANIFEST)
    for known in sorted(path.parent.glob(f"{path.name}_*")):
        if (known / MANIFEST).is_file() and file_sha256(known / MANIFEST) == digest:
            require_verified(SignalStore.open(known))
            return known
    target = path.with_name(f"{path.name}_{datetime.now(UTC):%Y-%m-%dT%H%M%SZ}")
    building = path.with_name(f".{target.name}.tmp")
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir()
    for name in [*(shard["name"] for shard in store.manifest["shards"]), MANIFEST, VERIFIED]:
        _link_or_copy(path / name, building / name)
        (building / name).chmod(0o444)
    shutil.copytree(path / "tokenizer", building / "tokenizer")
    building.rename(target)
    target.chmod(0o555)
    return target


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        if source.suffix != ".parquet":
            raise OSError("small files are copied, so that the store's own stay writable")
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
