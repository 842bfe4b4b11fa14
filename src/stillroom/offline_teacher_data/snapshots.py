"""Dated, read-only snapshots of a verified store, which trials read."""

from __future__ import annotations

import os
import shutil
from datetime import UTC, datetime
from pathlib import Path

from stillroom.files import atomic_path, file_sha256
from stillroom.folders import snapshots_of
from stillroom.offline_teacher_data.store import (
    HEAD,
    MANIFEST,
    SignalStore,
)
from stillroom.offline_teacher_data.verification import (
    VERIFIED,
    require_record,
    require_verified,
    seal,
)


def archive(path: Path | str) -> Path:
    """An immutable copy beside the store, `<store>_<UTC date>`; the one there is, if this store is archived already.

    Hard links where the file system has them. Raises `UserError` unless the store is verified.
    """
    path = Path(path).resolve()
    store = SignalStore.open(path)
    require_verified(store)
    digest = file_sha256(path / MANIFEST)
    for known in snapshots_of(path):
        if (known / MANIFEST).is_file() and file_sha256(known / MANIFEST) == digest:
            require_record(known)
            return seal(known)
    target = path.with_name(f"{path.name}_{datetime.now(UTC):%Y-%m-%dT%H%M%SZ}")
    with atomic_path(target) as building:
        building.mkdir()
        beside = [HEAD] if "teacher_head" in store.manifest else []
        for name in [*(shard["name"] for shard in store.manifest["shards"]), *beside, MANIFEST, VERIFIED]:
            _link_or_copy(path / name, building / name)
        shutil.copytree(path / "tokenizer", building / "tokenizer")
    return seal(target)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        if source.suffix not in (".parquet", ".safetensors"):
            raise OSError("small files are copied, so that the store's own stay writable")
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
