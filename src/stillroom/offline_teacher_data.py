"""The teacher's data: captured once, verified before anything trains on it, archived under a date.

capture → store/part-*.parquet, manifest.json → verify_saved_data → verified.json → archive → store_<UTC date>/
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from stillroom.attention_capture import check_capture
from stillroom.cells import Layout, _to_numpy_array, _to_py, id_dtype
from stillroom.config import Precision, Signals, UserError, fingerprint
from stillroom.corpus import examples_digest
from stillroom.encoding import Encoding, encode_many
from stillroom.models import heads, tokenizer_hash, vocabulary_size, width
from stillroom.progress import Progress, silent
from stillroom.provenance import atomic_path, exclusive, file_sha256, package_versions, read_json, utc_now, write_json
from stillroom.recomputation import sample_ids
from stillroom.shares import Share, hold, plan_shards, token_batches
from stillroom.signal_store import (
    MANIFEST,
    SCHEMA_VERSION,
    SignalStore,
    shard_entry,
    shard_is_whole,
    shard_name,
    write_manifest,
    write_shard,
)
from stillroom.store_checks import (
    VERIFIED,
    check_example,
    check_shard,
    refuse_difference,
    require_matching,
    require_verified,
)
from stillroom.tasks import Example
from stillroom.teacher_signals import TeacherSignals, compute_signals

__all__ = [
    "_to_numpy_array",
    "_to_py",
    "archive",
    "capture",
    "capture_share",
    "made_from",
    "require_matching",
    "require_record",
    "require_verified",
    "seal",
    "snapshots",
    "verify_saved_data",
]


def made_from(
    teacher_identity: str, teacher_dtype: Precision, tokenizer: Any, signals: Signals, examples: Sequence[Example]
) -> dict[str, Any]:
    """Everything that decides a store's values; its fingerprint is the store's."""
    return {
        "teacher": teacher_identity,
        "teacher_dtype": teacher_dtype,
        "tokenizer": tokenizer_hash(tokenizer),
        "corpus": examples_digest(examples),
        "examples": len(examples),
        "top_k": signals.top_k,
        "dtype": signals.dtype,
        "attention_dtype": signals.attention_dtype,
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
    progress: Progress = silent,
) -> SignalStore:
    """Run the teacher over every example and write the store: `capture_share` of all of it."""
    capture_share(model, tokenizer, examples, signals, store, origin, Share(), progress)
    return SignalStore.open(store)


def capture_share(
    model: PreTrainedModel,
    tokenizer: Any,
    examples: Sequence[Example],
    signals: Signals,
    store: Path,
    origin: dict[str, Any],
    share: Share,
    progress: Progress = silent,
) -> bool:
    """Run the teacher over a share of the examples; shards that are whole already are kept.

    The process that makes the last missing shard also writes the manifest. Returns whether the store is finished.
    `origin` comes from `made_from`. Raises `UserError` if the folder holds another capture, if k exceeds the
    vocabulary, if the disk is too small, or if the architecture's attention cannot be captured.
    """
    layout = _layout(model, signals)
    encodings = encode_many(tokenizer, [example.text for example in examples])
    own = fingerprint(origin)
    shards = plan_shards(encodings, signals.shard_examples)

    def missing() -> list[int]:
        return [n for n, rows in enumerate(shards) if not _done(store, n, rows, examples, own)]

    with hold(store, share):
        _claim(store, origin)
        absent = missing()
        _require_space(store, sum(len(encodings[i]) for n in absent for i in shards[n]), encodings, layout)
        mine = share.shards(len(shards))
        total = sum(len(shards[n]) for n in mine)
        done = sum(len(shards[n]) for n in mine if n not in absent)
        if done < total:
            longest = max(encodings, key=len)
            probe = torch.from_numpy(longest.ids.astype("int64"))[None].to(model.device)
            check_capture(model, probe)
        progress(done, total)
        for number in (n for n in mine if n in absent):
            rows = _signals_of(model, examples, encodings, shards[number], signals)
            counted = _counted(rows, lambda n, base=done: progress(base + n, total))  # type: ignore[misc]
            write_shard(store / shard_name(number), own, layout, counted)
            done += len(shards[number])
    with exclusive(store, "capture", ".merging", wait=-1):
        if finished := not missing():
            _finish(store, layout, origin, len(shards), examples, tokenizer, vocabulary_size(model))
    return finished


def _layout(model: PreTrainedModel, signals: Signals) -> Layout:
    vocabulary = vocabulary_size(model)
    if signals.top_k > vocabulary:
        raise UserError(f"signals.top_k: {signals.top_k} exceeds the teacher's vocabulary of {vocabulary}")
    shape = (signals.top_k, width(model.config), heads(model.config))
    return Layout(*shape, signals.dtype, id_dtype(vocabulary), signals.attention_dtype)


def _claim(store: Path, origin: dict[str, Any]) -> None:
    """Mark an empty folder as this capture's, or check that it is; a finished store counts as marked."""
    marker = store / "capture.json"
    foreign = any(store.glob("*.parquet")) or (store / MANIFEST).exists()  # looked for first: others may be starting
    if marker.exists():
        refuse_difference(store, read_json(marker), origin)
    elif foreign:
        raise UserError(f"{store} holds files of another capture; choose another folder with paths.store")
    else:
        write_json(marker, origin)


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
    for batch in token_batches(rows, encodings, signals.batch_tokens):
        try:
            results = compute_signals(model, [encodings[i] for i in batch], signals.top_k, dtype)
        except UserError as error:
            raise UserError(f"examples {[examples[i].example_id for i in batch]}: {error}") from None
        for i, result in zip(batch, results, strict=True):
            yield examples[i].example_id, examples[i].task, encodings[i], result


def _counted(rows: Iterator[Any], report: Callable[[int], None]) -> Iterator[Any]:
    for number, row in enumerate(rows, 1):
        yield row
        report(number)


def _finish(
    store: Path,
    layout: Layout,
    origin: dict[str, Any],
    shards: int,
    examples: Sequence[Example],
    tokenizer: Any,
    vocabulary: int,
) -> None:
    """Write the manifest, and the tokenizer beside it, unless they are there."""
    if (store / MANIFEST).exists():
        return
    tokenizer.save_pretrained(store / "tokenizer")
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
    write_manifest(store, manifest)


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


def archive(path: Path | str) -> Path:
    """An immutable copy beside the store, `<store>_<UTC date>`; the one there is, if this store is archived already.

    Hard links where the file system has them. Raises `UserError` unless the store is verified.
    """
    path = Path(path).resolve()
    store = SignalStore.open(path)
    require_verified(store)
    digest = file_sha256(path / MANIFEST)
    for known in snapshots(path):
        if (known / MANIFEST).is_file() and file_sha256(known / MANIFEST) == digest:
            require_record(known)
            return seal(known)
    target = path.with_name(f"{path.name}_{datetime.now(UTC):%Y-%m-%dT%H%M%SZ}")
    with atomic_path(target) as building:
        building.mkdir()
        for name in [*(shard["name"] for shard in store.manifest["shards"]), MANIFEST, VERIFIED]:
            _link_or_copy(path / name, building / name)
        shutil.copytree(path / "tokenizer", building / "tokenizer")
    return seal(target)


def snapshots(path: Path) -> list[Path]:
    """What stands beside a store under its name and a date, oldest first."""
    path = path.resolve()  # no pattern: the name is the user's
    found = path.parent.iterdir() if path.parent.is_dir() else ()
    return sorted(p for p in found if p.is_dir() and p.name.startswith(f"{path.name}_"))


def seal(snapshot: Path) -> Path:
    """Make a snapshot read-only, unless it is another user's, and return it. `UserError` unless it is verified."""
    require_verified(SignalStore.open(snapshot))
    for found in [*snapshot.rglob("*"), snapshot]:
        with suppress(PermissionError):  # another user's: what it holds is checked before it is read, all the same
            found.chmod(0o555 if found.is_dir() else 0o444)
    return snapshot


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        if source.suffix != ".parquet":
            raise OSError("small files are copied, so that the store's own stay writable")
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
