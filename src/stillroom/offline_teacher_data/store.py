"""The teacher's signals on disk: Parquet shards that describe themselves, and a manifest written last.

One example is one row and one row group. Arrays are flat little-endian binary cells in C order, uncompressed,
so that a memory-mapped read is a copy-free view; their shapes follow from the row's `tokens` and the manifest.
"""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from numpy import ndarray

from stillroom.config import ModelRef, fingerprint
from stillroom.data.encoding import Encoding
from stillroom.errors import UserError
from stillroom.files import atomic_path, file_sha256, read_json, remove_leftovers, write_json
from stillroom.models.hub import load_tokenizer, tokenizer_hash
from stillroom.models.output_head import OutputHead, read_output_head
from stillroom.offline_teacher_data.cells import _to_numpy_array, cell_bytes, parquet_cell
from stillroom.signals import signals_of
from stillroom.signals.signal import Column, Layout

SCHEMA_VERSION = 2
MANIFEST = "manifest.json"
SHARDS = "part-*.parquet"
HEAD = "teacher_head.safetensors"
"""The teacher's output head, where a store keeps it; the manifest has its digest."""

_TEXT = (pa.field("example_id", pa.string()), pa.field("task", pa.string()), pa.field("tokens", pa.int32()))
_ANSWER = pa.field("teacher_answer", pa.string())
_ENCODING = (
    Column("ids", "int32", lambda tokens: (tokens,)),
    Column("ends", "int32", lambda tokens: (tokens,)),
    Column("special", "bool", lambda tokens: (tokens,)),
)


def columns_of(layout: Layout) -> dict[str, Column]:
    """Every array column of a store by name, in the order of its file: the encoding's, then each signal's."""
    kept = (column for signal in signals_of(layout) for column in signal.columns)
    return {column.name: column for column in (*_ENCODING, *kept)}


def payload_bytes(layout: Layout, tokens: int) -> int:
    """Bytes of the cells of a row of so many tokens."""
    return sum(column.bytes(tokens) for column in columns_of(layout).values())


@dataclass(frozen=True)
class StoredExample:
    """One row: the teacher's encoding of the text, and the arrays that were asked for, by column."""

    example_id: str
    task: str
    encoding: Encoding
    arrays: Mapping[str, ndarray]

    def __getitem__(self, column: str) -> ndarray:
        """A column's array; a KeyError names one that was not asked for."""
        return self.arrays[column]


def shard_name(number: int) -> str:
    """File name of a shard."""
    return f"part-{number:05d}.parquet"


def write_shard(
    path: Path,
    fingerprint: str,
    layout: Layout,
    rows: Iterable[tuple[str, str, Encoding, Mapping[str, torch.Tensor]]],
    answers: Sequence[str | None] | None = None,
) -> None:
    """Write one shard of the capture with this fingerprint, row by row, whole or not at all.

    `answers`: the teacher's, of each row, where they are kept.
    """
    remove_leftovers(path.parent)
    metadata = {
        "stillroom_schema": str(SCHEMA_VERSION),
        "stillroom_fingerprint": fingerprint,
        "stillroom_shard": path.name,
    }
    with atomic_path(path) as temporary:
        options: dict[str, Any] = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        options["write_page_checksum"] = True  # until the manifest has its SHA-256, a shard must vouch for itself
        columns, signals = columns_of(layout), signals_of(layout)
        kept = [] if answers is None else [_ANSWER]
        schema = pa.schema([*_TEXT, *kept, *(pa.field(name, pa.large_binary()) for name in columns)], metadata)
        with pq.ParquetWriter(temporary, schema, **options) as writer:
            totals: Counter[str] = Counter()
            for number, (example_id, task, encoding, arrays) in enumerate(rows):
                text = [pa.array([example_id]), pa.array([task]), pa.array([len(encoding)], pa.int32())]
                text += [] if answers is None else [pa.array([answers[number]], pa.string())]
                writer.write_batch(_row(text, encoding, arrays, columns, schema))
                is_text = torch.from_numpy(~encoding.special)
                for signal in signals:
                    totals.update(signal.totals(arrays, is_text))
            writer.add_key_value_metadata({name: repr(total) for name, total in totals.items()})


def _row(
    text: Sequence[pa.Array],
    encoding: Encoding,
    arrays: Mapping[str, torch.Tensor],
    columns: Mapping[str, Column],
    schema: pa.Schema,
) -> pa.RecordBatch:
    values: dict[str, Any] = {"ids": encoding.ids, "ends": encoding.ends, "special": encoding.special, **arrays}
    cells = [*text]
    for name, column in columns.items():
        value, shape = values[name], column.shape(len(encoding))
        if tuple(value.shape) != shape:
            raise ValueError(f"{text[0][0]}: {name} has shape {tuple(value.shape)}, the store expects {shape}")
        cells.append(parquet_cell(column.pack(value), column.dtype))
    return pa.RecordBatch.from_arrays(cells, schema=schema.remove_metadata())


def shard_entry(path: Path) -> dict[str, Any]:
    """What the manifest says of a shard: name, rows, bytes, SHA-256, examples in order.

    `UserError` if its bytes are not those that were written.
    """
    try:
        with pq.ParquetFile(path, memory_map=True, page_checksum_verification=True) as file:
            for row in range(file.num_row_groups):
                file.read_row_group(row, use_threads=False)
        table = pq.read_table(path, columns=["example_id", "tokens"])
        metadata = pq.read_metadata(path).metadata
        known = {
            key.decode(): json.loads(value) for key, value in metadata.items() if key.endswith((b"_sum", b"_values"))
        }
    except (OSError, pa.ArrowException, ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged: {error}; delete it and run the same command again") from None
    return {
        "name": path.name,
        "rows": table.num_rows,
        "tokens": sum(table["tokens"].to_pylist()),
        "bytes": path.stat().st_size,
        "sha256": file_sha256(path),
        **known,
        "examples": table["example_id"].to_pylist(),
    }


def shard_is_whole(path: Path, fingerprint: str, example_ids: Sequence[str]) -> bool:
    """Whether a shard on disk is the one the capture with this fingerprint would write."""
    if not path.is_file() or shard_fingerprint(path) != fingerprint:
        return False
    try:
        ids = pq.read_table(path, columns=["example_id"])["example_id"].to_pylist()
    except (pa.ArrowException, OSError, ValueError, KeyError):
        return False
    return bool(ids == list(example_ids))


def shard_fingerprint(path: Path) -> str | None:
    """Fingerprint of the capture that wrote a shard; None where it cannot be read."""
    try:
        metadata = pq.read_schema(path).metadata or {}
    except (pa.ArrowException, OSError, ValueError, KeyError):
        return None
    found = metadata.get(b"stillroom_fingerprint")
    return None if found is None else found.decode(errors="replace")


def write_manifest(store: Path, manifest: dict[str, Any]) -> None:
    """Write a store's manifest, with the digest by which an edited one is known."""
    write_json(store / MANIFEST, {"digest": fingerprint(manifest), **manifest})


@dataclass
class SignalStore:
    """A finished store, opened for reading. Open one in each process: it maps the shards, it does not load them.

    Threads may read at once: each has its own handles, since PyArrow's are for one; they share what
    the files say of themselves, 9 kB per example in memory.
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
        return Layout.read(self.manifest["layout"])

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
        """Mean square of the teacher's last hidden states over every token of text in the store."""
        return self.mean_square("hidden")

    def mean_square(self, column: str) -> float:
        """The same of any column of hidden states."""
        shards = self.manifest["shards"]
        values = sum(shard[f"{column}_values"] for shard in shards)
        return float(sum(shard[f"{column}_square_sum"] for shard in shards) / values)

    @cached_property
    def columns(self) -> dict[str, Column]:
        """The arrays of a row by name."""
        return columns_of(self.layout)

    @cached_property
    def tokenizer(self) -> Any:
        """The teacher's tokenizer, which is in the store; `UserError` if it is not the one it was made with."""
        tokenizer = load_tokenizer(ModelRef(model=str(self.path / "tokenizer")))
        if tokenizer_hash(tokenizer) != self.manifest["made_from"]["tokenizer"]:
            raise UserError(f"{self.path / 'tokenizer'} is not the tokenizer the store was made with")
        return tokenizer

    @cached_property
    def teacher_head(self) -> OutputHead:
        """The teacher's output head; `UserError` if the store does not keep it."""
        if (entry := self.manifest.get("teacher_head")) is None:
            raise UserError(f"{self.path}: the teacher's output head is not in this store; set signals.teacher_head")
        if not (self.path / HEAD).is_file():
            raise UserError(f"{self.path / HEAD} is missing")
        return read_output_head(self.path / HEAD, entry["scale"], entry["softcap"])

    @cached_property
    def answers(self) -> dict[str, str | None]:
        """The teacher's greedy answers by example; None for one that did not end. `UserError` if none are kept."""
        if "teacher_answers" not in self.manifest["made_from"]:
            raise UserError(f"{self.path}: the teacher's answers are not in this store; set signals.teacher_answers")
        found: dict[str, str | None] = {}
        for shard in self.manifest["shards"]:
            try:
                table = pq.read_table(self.path / shard["name"], columns=["example_id", _ANSWER.name])
            except (pa.ArrowException, OSError) as error:
                raise UserError(f"{self.path / shard['name']}: {error}") from error
            found.update(zip(*(column.to_pylist() for column in table.columns), strict=True))
        return found

    def __len__(self) -> int:
        return len(self.index)

    def __iter__(self) -> Iterator[StoredExample]:
        return (self.read(example_id) for example_id in self.index)

    def read(self, example_id: str, columns: Iterable[str] | None = None) -> StoredExample:
        """One example, with all its columns or those named; arrays are read-only views of the mapped file.

        `UserError` names a missing or broken one.
        """
        if example_id not in self.index:
            raise UserError(f"{self.path}: example {example_id} is not in this store")
        name, row = self.index[example_id]
        encoded = [column.name for column in _ENCODING]
        wanted = [c for c in self.columns if c not in encoded] if columns is None else list(columns)
        try:
            table = self._file(name).read_row_group(
                row, columns=[field.name for field in _TEXT] + encoded + wanted, use_threads=False
            )
            return self._example(table.to_batches()[0], wanted)
        except KeyError as error:  # of a column that is not there
            raise UserError(f"{self.path / name}: example {example_id}: {error.args[0]}; capture again") from error
        except (ValueError, OSError, pa.ArrowException) as error:
            raise UserError(f"{self.path / name}: example {example_id}: {error}") from error

    def _example(self, row: pa.RecordBatch, wanted: Sequence[str]) -> StoredExample:
        example_id, task, tokens = (row[field.name][0].as_py() for field in _TEXT)

        def array(name: str) -> ndarray:
            column = self.columns[name]
            try:
                return column.unpack(_to_numpy_array(cell_bytes(row[name]), column.dtype, column.shape(tokens)))
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None

        ids, ends, special = (array(column.name) for column in _ENCODING)
        encoding = Encoding(ids, ends, special)
        return StoredExample(example_id, task, encoding, {name: array(name) for name in wanted})

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
