"""The teacher's signals on disk: Parquet shards that describe themselves, and a manifest written last.

One example is one row and one row group. Arrays are flat little-endian binary cells in C order, uncompressed,
so that a memory-mapped read is a copy-free view; their shapes follow from the row's `tokens` and the manifest.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Integer
from numpy import ndarray

from stillroom.config import fingerprint
from stillroom.data.encoding import Encoding
from stillroom.errors import UserError
from stillroom.files import atomic_path, file_sha256, read_json, remove_leftovers, write_json
from stillroom.offline_teacher_data.cells import COLUMNS, Layout, _to_numpy_array, cell_bytes, parquet_cell
from stillroom.signals.teacher_signals import TeacherSignals

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
SHARDS = "part-*.parquet"
Signal = Literal["topk", "hidden", "attention"]

SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("task", pa.string()),
        ("tokens", pa.int32()),
        ("ids", pa.large_binary()),
        ("ends", pa.large_binary()),
        ("special", pa.large_binary()),
        ("topk_ids", pa.large_binary()),
        ("topk_logprobs", pa.large_binary()),
        ("tail_logprobs", pa.large_binary()),
        ("hidden", pa.large_binary()),
        ("attention", pa.large_binary()),
    ]
)

_COLUMNS: dict[Signal, tuple[str, ...]] = {
    "topk": ("topk_ids", "topk_logprobs", "tail_logprobs"),
    "hidden": ("hidden",),
    "attention": ("attention",),
}


@dataclass(frozen=True)
class StoredExample:
    """One row: the teacher's encoding of the text and the signals that were asked for (None otherwise)."""

    example_id: str
    task: str
    encoding: Encoding
    topk_ids: Integer[ndarray, "T K"] | None = None
    topk_logprobs: Float[ndarray, "T K"] | None = None
    tail_logprobs: Float[ndarray, "T"] | None = None
    """Logarithm of the probability outside the top k; −inf where there is none."""
    hidden: Float[ndarray, "T D"] | None = None
    attention: Float[ndarray, "H N"] | None = None
    """Row after row of the causal triangle, N = T(T+1)/2."""


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"part-{number:05d}.parquet"


def write_shard(
    path: Path,
    own: str,
    layout: Layout,
    rows: Iterable[tuple[str, str, Encoding, TeacherSignals]],
) -> None:
    """Write one shard of the capture with fingerprint `own`, row by row, whole or not at all."""
    remove_leftovers(path.parent)
    metadata = {
        "stillroom_schema": str(SCHEMA_VERSION),
        "stillroom_fingerprint": own,
        "stillroom_shard": path.name,
    }
    with atomic_path(path) as temporary:
        options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        options["write_page_checksum"] = True  # until the manifest has its SHA-256, a shard must vouch for itself
        with pq.ParquetWriter(temporary, SCHEMA.with_metadata(metadata), **options) as writer:
            squares, values = 0.0, 0
            for example_id, task, encoding, signals in rows:
                writer.write_batch(_row(example_id, task, encoding, signals, layout))
                hidden = signals.hidden[torch.from_numpy(~encoding.special)].float()
                squares += float(torch.linalg.vecdot(hidden, hidden).double().sum())
                values += hidden.numel()
            writer.add_key_value_metadata({"hidden_square_sum": repr(squares), "hidden_values": str(values)})


def _row(example_id: str, task: str, encoding: Encoding, signals: TeacherSignals, layout: Layout) -> pa.RecordBatch:
    values: dict[str, Any] = {"ids": encoding.ids, "ends": encoding.ends, "special": encoding.special}
    values |= {name: getattr(signals, name) for name in COLUMNS[3:]}
    cells = [pa.array([example_id]), pa.array([task]), pa.array([len(encoding)], pa.int32())]
    for name, value in values.items():
        dtype, shape = layout.cell(name, len(encoding))
        if tuple(value.shape) != shape:
            raise ValueError(f"{example_id}: {name} has shape {tuple(value.shape)}, the store expects {shape}")
        cells.append(parquet_cell(layout.stored(name, value), dtype))
    return pa.RecordBatch.from_arrays(cells, schema=SCHEMA)


def shard_entry(path: Path) -> dict[str, Any]:
    """What the manifest says of a shard: name, rows, bytes, SHA-256, examples in order.

    `UserError` if its bytes are not those that were written.
    """
    try:
        with pq.ParquetFile(path, memory_map=True, page_checksum_verification=True) as file:
            for row in range(file.num_row_groups):
                file.read_row_group(row, use_threads=False)
    except OSError as error:
        raise UserError(f"{path} is damaged: {error}; delete it and run the same command again") from None
    table = pq.read_table(path, columns=["example_id", "tokens"])
    metadata = pq.read_metadata(path).metadata
    return {
        "name": path.name,
        "rows": table.num_rows,
        "tokens": sum(table["tokens"].to_pylist()),
        "bytes": path.stat().st_size,
        "sha256": file_sha256(path),
        "hidden_square_sum": float(metadata[b"hidden_square_sum"]),
        "hidden_values": int(metadata[b"hidden_values"]),
        "examples": table["example_id"].to_pylist(),
    }


def shard_is_whole(path: Path, own: str, example_ids: Sequence[str]) -> bool:
    """Whether a shard on disk is the one the capture with fingerprint `own` would write."""
    if not path.is_file() or shard_fingerprint(path) != own:
        return False
    try:
        ids = pq.read_table(path, columns=["example_id"])["example_id"].to_pylist()
    except (pa.ArrowInvalid, OSError):
        return False
    return bool(ids == list(example_ids))


def shard_fingerprint(path: Path) -> str | None:
    """Fingerprint of the capture that wrote a shard; None where it cannot be read."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowInvalid, OSError):
        return None
    found = metadata.get(b"stillroom_fingerprint")
    return None if found is None else found.decode(errors="replace")


def write_manifest(store: Path, manifest: dict[str, Any]) -> None:
    """Write a store's manifest, with the digest by which an edited one is known."""
    write_json(store / MANIFEST, {"digest": fingerprint(manifest), **manifest})


@dataclass
class SignalStore:
    """A finished store, opened for reading. Open one in each process: it maps the shards, it does not load them.

    Threads may read at once: each has its own handles, since PyArrow's are for one; what the files say of themselves,
    9 kB an example in memory, they share.
    """

    path: Path
    manifest: dict[str, Any]
    _handles: threading.local = field(default_factory=threading.local, repr=False)
    _footers: dict[str, pq.FileMetaData] = field(default_factory=dict, repr=False)

    @classmethod
    def open(cls, path: Path | str) -> SignalStore:
        """Open the store at `path`; `UserError` if it is not there, not finished or of another schema."""
        path = Path(path)
        if not (path / MANIFEST).is_file():
            state = "is not a finished store" if path.is_dir() else "does not exist"
            raise UserError(f"{path} {state}: {MANIFEST} is missing; run `stillroom capture`")
        manifest = read_json(path / MANIFEST)
        if not isinstance(manifest, dict) or manifest.get("schema_version") != SCHEMA_VERSION:
            raise UserError(f"{path}: its schema version is not {SCHEMA_VERSION}; capture it again with this version")
        if manifest.pop("digest", None) != fingerprint(manifest):
            raise UserError(
                f"{path / MANIFEST} is not as it was written (its digest differs); delete the store, capture again"
            )
        if any(shard["name"] != shard_name(number) for number, shard in enumerate(manifest["shards"])):
            raise UserError(f"{path / MANIFEST} names files that no capture writes; do not trust this store")
        return cls(path, manifest)

    @cached_property
    def layout(self) -> Layout:
        """Shapes and dtypes of the cells."""
        return Layout(**self.manifest["layout"])

    @cached_property
    def index(self) -> dict[str, tuple[str, int]]:
        """Example id to shard name and row group."""
        return {
            example_id: (shard["name"], row)
            for shard in self.manifest["shards"]
            for row, example_id in enumerate(shard["examples"])
        }

    @property
    def hidden_mean_square(self) -> float:
        """Mean square of the teacher's hidden states over every token of text in the store."""
        shards = self.manifest["shards"]
        values = sum(shard["hidden_values"] for shard in shards)
        return float(sum(shard["hidden_square_sum"] for shard in shards) / values)

    def __len__(self) -> int:
        return len(self.index)

    def __iter__(self) -> Iterator[StoredExample]:
        return (self.read(example_id) for example_id in self.index)

    def read(self, example_id: str, signals: Iterable[Signal] = ("topk", "hidden", "attention")) -> StoredExample:
        """One example; arrays are read-only views of the mapped file. `UserError` names a missing or broken one."""
        if example_id not in self.index:
            raise UserError(f"{self.path}: example {example_id} is not in this store")
        name, row = self.index[example_id]
        wanted = [column for signal in signals for column in _COLUMNS[signal]]
        columns = ["example_id", "task", "tokens", "ids", "ends", "special", *wanted]
        try:
            table = self._file(name).read_row_group(row, columns=columns, use_threads=False)
            return self._example(table.to_batches()[0], wanted)
        except (ValueError, OSError, pa.ArrowException) as error:
            raise UserError(f"{self.path / name}: example {example_id}: {error}") from error

    def _example(self, row: pa.RecordBatch, wanted: Sequence[str]) -> StoredExample:
        own, task, tokens = (row[column][0].as_py() for column in ("example_id", "task", "tokens"))

        def array(column: str) -> ndarray:
            try:
                values = _to_numpy_array(cell_bytes(row[column]), *self.layout.cell(column, tokens))
                return self.layout.restored(column, values)
            except ValueError as error:
                raise ValueError(f"{column}: {error}") from None

        encoding = Encoding(array("ids"), array("ends"), array("special"))
        arrays = {column: array(column) for column in wanted}
        return StoredExample(own, task, encoding, **arrays)

    def _file(self, name: str) -> pq.ParquetFile:
        files: dict[str, pq.ParquetFile] = self._handles.__dict__
        if name not in files:
            if not (self.path / name).is_file():
                raise UserError(f"{self.path / name} is missing")
            files[name] = pq.ParquetFile(
                self.path / name, metadata=self._footers.get(name), memory_map=True, page_checksum_verification=True
            )
            self._footers[name] = files[name].metadata
        return files[name]
