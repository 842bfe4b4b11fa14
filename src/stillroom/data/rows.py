"""A task's rows, from wherever they are: a file of any usual kind, a folder, the hub, or a generator."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.parquet as pq

from stillroom.config import TaskData
from stillroom.data.json_lists import PIECE, json_rows
from stillroom.data.tasks import Task
from stillroom.errors import UserError
from stillroom.files import file_sha256

Row = dict[str, Any]


class Rows(Collection[Row]):
    """A source's rows. Each pass over them reads the source again, so none is kept in memory."""

    def __init__(self, read: Callable[[], Iterable[Row]], count: int) -> None:
        """`read` starts from the first row; `count`: how many there are."""
        self._read, self._count = read, count

    def __iter__(self) -> Iterator[Row]:
        return iter(self._read())

    def __len__(self) -> int:
        return self._count

    def __contains__(self, row: object) -> bool:
        return any(known == row for known in self)


_NOT_READ = {
    *(".ndjson", ".pq", ".arrow", ".feather", ".avro", ".orc", ".txt", ".xml", ".zip", ".tar", ".tgz"),
    *(".xls", ".xlsx", ".ods", ".db", ".sqlite", ".npy", ".npz", ".pkl", ".pickle", ".h5", ".yaml", ".yml"),
}
"""Ends of names that are a file's, and of no data set on the hub."""


CHANGED = "changed while it was read; run the command again when it is complete"
_AT_ONCE = 256
"""Rows of a column file that are held at a time."""


def load_rows(task: Task, data: TaskData, seed: int, place: str) -> Collection[Row]:
    """A task's rows, its own columns alone, to be gone through as often as needed; errors name `place`.

    Generated (`builtin`), or from a `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet` file, a folder of `<split>` files
    or of `datasets.save_to_disk`, or the hub.
    """
    if data.dataset == "builtin":
        if task.generate_rows is None:
            raise UserError(f"{place}.dataset: this task has no built-in rows")
        if data.examples == "all":
            raise UserError(f"{place}.examples: built-in rows are made up as they are needed; say how many, not all")
        return task.generate_rows(seed, 2 * data.examples + 200)
    local = Path(data.dataset)
    if local.is_dir():
        return _of_folder(task, data, place)
    if _kind(local) is not None:
        return _of_file(task, data, local, place)
    if local.exists() or data.dataset.startswith(("/", ".", "~")) or local.suffix.lower() in {*_NOT_READ, *_OPENERS}:
        what = "is not a supported file type" if local.exists() else "is not there"
        raise UserError(
            f"{place}.dataset: {data.dataset!r} {what}; give a `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet` file, a "
            "folder of `<split>.parquet`, the id of a data set on the hub, or `builtin`"
        )
    return _of_hub(task, data, place)


def all_rows(file: Path) -> Rows:
    """Every row of a file with all its columns, for who has yet to choose some."""
    kind = _kind(file)
    if kind is None:
        raise UserError(f"{file}: give a `.jsonl`, `.json`, `.csv`, `.tsv` or `.parquet` file")
    if kind != ".parquet":
        return Rows(partial(_READERS[kind], file), _scanned(kind, file)[1])
    _, count = _schema(file, str(file))
    return Rows(partial(_read_parquet, file, None, str(file)), count)


def names_a_file(dataset: str) -> bool:
    """Whether a data set is a file by its name, wherever it is now."""
    return _kind(Path(dataset)) is not None


def _kind(path: Path) -> str | None:
    """How a file is read, by the end of its name; what it is compressed with left out."""
    compressed = path.suffix.lower() in _OPENERS
    kind = Path(path.stem if compressed else path.name).suffix.lower()
    return kind if kind in _READERS or (kind == ".parquet" and not compressed) else None


def _of_file(task: Task, data: TaskData, file: Path, place: str) -> Rows:
    """The task's columns of each row."""
    kind = str(_kind(file))
    where = f"{place}.dataset: {file}"
    present, count = _schema(file, where) if kind == ".parquet" else _scanned(kind, file)
    named = _columns(task, data, present, place)
    columns = list(named.values())
    read = partial(_read_parquet, file, columns, where) if kind == ".parquet" else partial(_READERS[kind], file)
    return Rows(lambda: ({column: row.get(name) for column, name in named.items()} for row in read()), count)


def _scanned(kind: str, file: Path) -> tuple[list[str], int]:
    """Every name that a row of a text file has, and how many rows there are; a row that cannot be read is told."""
    names: dict[str, None] = {}
    count = 0
    for row in _READERS[kind](file):
        count += 1
        if not row.keys() <= names.keys():
            names |= dict.fromkeys(row)
    if not count:
        raise UserError(f"{file} has no rows")
    return list(names), count


def _columns(task: Task, data: TaskData, present: Sequence[str], place: str) -> dict[str, str]:
    """What each of the task's columns is called there: itself, or the one name that is it but for its case."""
    found = {}
    for column in task.columns:
        alike = [name for name in present if name.casefold().strip() == column.casefold()]
        if column in present or len(alike) == 1:
            found[column] = column if column in present else alike[0]
    if missing := [column for column in task.columns if column not in found]:
        raise UserError(f"{place}: {data.dataset} lacks the columns {missing}; it has {list(present)}")
    return found


def _zstd(path: Path) -> IO[bytes]:
    return io.BufferedReader(pa.input_stream(str(path), compression="zstd"))


_OPENERS: dict[str, Callable[[Path], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": _zstd,
}


def _lines(path: Path) -> Iterator[str]:
    """A text file's lines, line ends as they stand."""
    return _text(path, iter)


def _text(path: Path, parts: Callable[[IO[str]], Iterator[str]]) -> Iterator[str]:
    """Parts of a text file, whatever it is compressed with, without a byte order mark."""
    opener = _OPENERS.get(path.suffix.lower(), lambda plain: plain.open("rb"))
    try:
        with opener(path) as raw:
            yield from parts(io.TextIOWrapper(raw, "utf-8-sig", newline=""))
    except FileNotFoundError:
        raise UserError(f"{path} is missing: no such file") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not text in UTF-8: {error.reason}; save it in UTF-8") from None
    except (OSError, EOFError, lzma.LZMAError, pa.ArrowException) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def read_lines(path: Path) -> Iterator[Row]:
    """Objects of a JSON Lines file."""
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        row = _json(line, f"{path}, line {number}")
        if not isinstance(row, dict):
            raise UserError(f'{path}, line {number}: expected an object, one per line, as in {{"question": "…"}}')
        yield row


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{where}: not valid JSON: {error}") from None
    except RecursionError:
        raise UserError(f"{where}: nested too deeply to be read; remove the line") from None
    except ValueError:  # Python's limit, which is no fault of the JSON
        raise UserError(f"{where}: a number has too many digits; write it as text") from None


def _read_json(path: Path) -> Iterator[Row]:
    return json_rows(_text(path, lambda text: iter(partial(text.read, PIECE), "")), path)


def _read_csv(path: Path) -> Iterator[Row]:
    """Rows under a header; every cell is a text. Commas, semicolons or tabs, whichever the header has most of."""
    csv.field_size_limit(2**31 - 1)
    lines = _lines(path)
    header = next(lines, "")
    mark = "\t" if _kind(path) == ".tsv" else max(",;\t", key=header.count)
    reader = csv.reader(_again(header, lines), delimiter=mark, strict=True)
    try:
        names = [name.strip() for name in next(reader, [])]
        if len(set(names)) < len(names) or not all(names):
            raise UserError(f"{path}, line 1: columns need different names, none of them empty; the header is {names}")
        for row in reader:
            if len(row) != len(names) and any(row):
                raise UserError(
                    f"{path}, line {reader.line_num}: {len(row)} cells, but the header names {len(names)} columns; "
                    "a cell that holds the separator or a line break needs double quotes around it"
                )
            if any(row):
                yield dict(zip(names, row, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not valid CSV: {error}") from None


def _again(first: str, lines: Iterator[str]) -> Iterator[str]:
    yield first
    yield from lines


_DAMAGED = (OSError, KeyError, pa.ArrowException, ValueError, OverflowError)
"""What a damaged Parquet file shows itself in."""


def _schema(path: Path, place: str) -> tuple[list[str], int]:
    """Names of a Parquet file's columns, and how many rows it has; errors begin with `place`."""
    try:
        with pq.ParquetFile(path) as table:
            present, count = table.schema_arrow.names, table.metadata.num_rows
    except _DAMAGED as error:
        raise UserError(f"{place} cannot be loaded: {_reason(error)}") from error
    if not count:
        raise UserError(f"{place} cannot be loaded: it has no rows")
    return present, count


def _read_parquet(path: Path, columns: list[str] | None, place: str) -> Iterator[Row]:
    """The file itself: the data set library would give older rows from its cache."""
    try:
        # as it is read by default, a whole row group is held, which may be the whole file
        with pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False, buffer_size=2**20) as table:
            for batch in table.iter_batches(_AT_ONCE, columns=columns):
                yield from batch.to_pylist()
    except _DAMAGED as error:
        raise UserError(f"{place} cannot be loaded: {_reason(error)}") from error


_READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".jsonl": read_lines,
    ".json": _read_json,
    ".csv": _read_csv,
    ".tsv": _read_csv,
}
"""How text files are read, by the end of their names; Parquet is read by column."""


def _of_folder(task: Task, data: TaskData, place: str) -> Rows:
    """A split's file, or what `datasets.save_to_disk` wrote."""
    folder = Path(data.dataset)
    if _saved_by_datasets(folder):
        return _saved(task, data, place)
    if (file := _split_file(folder, data.split)) is None:
        raise UserError(f"{place}: {folder / data.split}.parquet is missing; splits there: {_splits(folder)}")
    return _of_file(task, data, file, place)


def _split_file(folder: Path, split: str) -> Path | None:
    """The file of a split; Parquet before others."""
    found = [p for p in folder.iterdir() if p.name.partition(".")[0] == split and _kind(p) and p.is_file()]
    return min(found, key=lambda p: (_kind(p) != ".parquet", p.name), default=None)


def _splits(folder: Path) -> str:
    return ", ".join(sorted({p.name.partition(".")[0] for p in folder.iterdir() if _kind(p)})) or "none"


def _saved_by_datasets(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _saved(task: Task, data: TaskData, place: str) -> Rows:
    from datasets import DatasetDict, load_from_disk

    try:
        rows = load_from_disk(data.dataset)
    except Exception as error:  # of Arrow, of JSON, or of the library's own
        raise UserError(f"{place}.dataset: {data.dataset} cannot be loaded: {_reason(error)}") from error
    if isinstance(rows, DatasetDict):
        if data.split not in rows:
            raise UserError(f"{place}: {data.dataset} has no split {data.split!r}; splits there: {', '.join(rows)}")
        rows = rows[data.split]
    return _of_dataset(task, data, rows, place)


def _of_dataset(task: Task, data: TaskData, rows: Any, place: str) -> Rows:
    named = _columns(task, data, rows.column_names, place)
    arrow = rows.select_columns(list(named.values())).with_format("arrow")

    def read() -> Iterator[Row]:
        for table in arrow.iter(_AT_ONCE):
            yield from ({column: row[name] for column, name in named.items()} for row in table.to_pylist())

    return Rows(read, len(rows))


def _of_hub(task: Task, data: TaskData, place: str) -> Rows:
    from datasets import disable_progress_bars, load_dataset
    from datasets.exceptions import DatasetsError
    from datasets.utils.logging import CRITICAL, set_verbosity

    disable_progress_bars()
    set_verbosity(CRITICAL)  # what goes wrong is in the exception
    try:
        rows = load_dataset(data.dataset, data.subset, revision=data.revision, split=data.split)
    except (DatasetsError, ValueError, OSError) as error:
        raise UserError(f"{place}.dataset: {data.dataset!r} cannot be loaded: {_reason(error)}") from error
    return _of_dataset(task, data, rows, place)


def _reason(error: BaseException) -> str:
    return next(iter(str(error.__cause__ or error).splitlines()), type(error).__name__)


def source_digest(data: TaskData) -> str | None:
    """SHA-256 of a local source, whose rows can change under the same name; None for any other."""
    local = Path(data.dataset)
    if not local.is_dir():
        return file_sha256(local) if local.is_file() else None
    if _saved_by_datasets(local):
        return "+".join(file_sha256(path) for path in sorted(local.rglob("*")) if path.is_file())
    file = _split_file(local, data.split)
    return file_sha256(file) if file else None


def require_unchanged(sources: Sequence[TaskData], digests: Sequence[str | None]) -> None:
    """`UserError` unless every source still has its digest, so that it is of the rows that were read since."""
    for data, digest in zip(sources, digests, strict=True):
        if source_digest(data) != digest:
            raise UserError(f"{data.dataset}: {CHANGED}")
