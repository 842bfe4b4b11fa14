"""Reading a shuffled epoch, one process: stored signals, aligned batches, nested lists; and four readers' memory.

    python benchmarks/reading.py paper --set teacher.model=DIR --set student.model=DIR ...

Signals are random, of the study's widths and its texts' real lengths. `cold`: the page cache holds nothing of the
store when an epoch begins, as with data larger than memory. Every page read is checked against its checksum, so every
byte is touched.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import resource
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

import outline_way
from inputs import mixed, study_arguments
from ratios import Seconds, begin, finish, in_turn, ratio, value
from stillroom.config import GROUPS, Objective, fingerprint
from stillroom.data.encoding import encode_many
from stillroom.data.tasks import Example
from stillroom.models.hub import load_config, tokenizer_hash
from stillroom.offline_teacher_data.store import (
    SCHEMA_VERSION,
    SHARDS,
    SignalStore,
    payload_bytes,
    shard_entry,
    shard_name,
    write_manifest,
    write_shard,
)
from stillroom.terms import NextTokenTerms, teacher_to_student_ids, terms_of
from stillroom.training.batches import Prefetched, epoch_order, prepare
from stillroom.training.collation import Collator
from writing import layout_of, random_signals


def write_store(folder: Path, options: argparse.Namespace) -> tuple[SignalStore, list[Example], Any]:
    """A store of random signals for the study's examples."""
    layout, encodings, workspace = layout_of(options, folder)
    examples = mixed(workspace.examples.all, options.examples)
    vocabulary = load_config(workspace.teacher_ref).get_text_config().vocab_size
    rows = list(zip(examples, encodings, strict=True))
    store, size = folder / "data", workspace.study.signals.shard_examples
    store.mkdir()
    for number, first in enumerate(range(0, len(rows), size)):
        part = rows[first : first + size]
        signals = ((e.example_id, e.task, c, random_signals(layout, len(c), vocabulary)) for e, c in part)
        write_shard(store / shard_name(number), "benchmark", layout, signals)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "fingerprint": fingerprint("benchmark"),
        "made_from": {"tokenizer": tokenizer_hash(workspace.tokenizers[0])},
        "layout": layout.__dict__,
        "vocabulary": vocabulary,
        "shards": [shard_entry(path) for path in sorted(store.glob("part-*.parquet"))],
    }
    write_manifest(store, manifest)
    return SignalStore.open(store), examples, workspace


def forget(folder: Path) -> bool:
    """Drop the store's pages from the system's cache; whether they are gone, which a file system may not allow."""
    for path in folder.glob("*.parquet"):
        with path.open("rb") as handle:
            os.fsync(handle.fileno())
            os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            with suppress(BlockingIOError):  # raised where nothing can be had without the disk
                os.preadv(handle.fileno(), [bytearray(4096)], 0, os.RWF_NOWAIT)
                return False
    return True


def read_epoch(folder: Path, order: Sequence[str], checked: bool = True) -> None:
    """Every signal of every example; not `checked`: no page is compared with its checksum."""
    store = SignalStore.open(folder)
    if not checked:
        files = {path.name: pq.ParquetFile(path, memory_map=True) for path in folder.glob(SHARDS)}
        store._handles.__dict__.update(files)
    for example_id in order:
        store.read(example_id)


def shared_pages(folder: Path, order: Sequence[str], readers: int) -> int:
    """Proportional memory (PSS) of the store's pages, summed over processes that have all read the epoch, bytes."""
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(readers), context.Queue()

    def reader() -> None:
        store = SignalStore.open(folder)
        for example_id in order:
            store.read(example_id)
        barrier.wait()
        results.put(_mapped(folder))
        barrier.wait()

    processes = [context.Process(target=reader) for _ in range(readers)]
    for process in processes:
        process.start()
    found = sum(results.get() for _ in processes)
    for process in processes:
        process.join()
    return found


def _mapped(folder: Path) -> int:
    """PSS of this process's mappings of files in a folder, bytes."""
    inside, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if not line.split()[0].endswith(":"):
            inside = str(folder) in line
        elif inside and line.startswith("Pss:"):
            total += 1024 * int(line.split()[1])
    return total


def useful_tokens(workspace: Any) -> float:
    """Share of an epoch's tokens that are no padding, as the student reads the study's whole training part."""
    texts = [example.text for example in workspace.examples.train]
    lengths = [len(encoding) for encoding in encode_many(workspace.tokenizers[1], texts, add_eos=True)]
    training = workspace.study.training
    batches = epoch_order(lengths, training.batch_size, training.bucket_batches, 0, 0)
    return sum(lengths) / sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)


def measure(options: argparse.Namespace, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Rows of the table, and what they were measured on."""
    store, examples, workspace = write_store(folder, options)
    tokens = sum(shard["tokens"] for shard in store.manifest["shards"])
    teacher, student = workspace.tokenizers
    objective = GROUPS["combined"].objective(Objective())
    items = prepare(examples, student, store)
    sizes = [load_config(ref).get_text_config().vocab_size for ref in (workspace.teacher_ref, workspace.student_ref)]
    head = NextTokenTerms(objective, teacher_to_student_ids(teacher, student, *sizes))
    collate = Collator(store, head, terms_of(objective, store, load_config(workspace.student_ref)))
    training = workspace.study.training
    lengths = [len(item.encoding) for item in items]
    batches = epoch_order(lengths, training.batch_size, training.bucket_batches, 0, 0)
    order = [examples[i].example_id for batch in batches for i in batch]

    few = list(range(0, len(examples), max(1, len(examples) // options.list_examples)))
    stored = {example.example_id: example for example in map(store.read, (examples[i].example_id for i in few))}
    payload, few_payload = (
        sum(payload_bytes(store.layout, int(length)) for length in some)
        for some in ((s.encoding.ids.size for s in store), (len(s.encoding) for s in stored.values()))
    )
    lists = folder / "lists.parquet"
    outline_way.write(lists, (_lists(example) for example in stored.values()))

    system: dict[str, list[float]] = {"between others": [], "in a row": []}

    def collated(threads: int, noted: str = "", squared: bool = False) -> None:
        def make(chosen: Sequence[int]) -> None:
            part = collate([items[i] for i in chosen]).parts["attention"]
            if squared:
                part.teacher("attention")

        before = resource.getrusage(resource.RUSAGE_SELF).ru_stime
        for _ in Prefetched(batches, make, threads, 2 * threads):
            pass
        if noted:
            system[noted].append(resource.getrusage(resource.RUSAGE_SELF).ru_stime - before)

    seconds = in_turn(
        {
            "read": lambda: read_epoch(store.path, order),
            "unchecked": lambda: read_epoch(store.path, order, checked=False),
            "collated": lambda: collated(1, "between others"),
            "by threads": lambda: collated(options.threads),
            "squared": lambda: collated(1, squared=True),
            "lists": lambda: list(map(len, outline_way.read(lists, range(len(few))))),
        },
        options.rounds,
    )
    alone = in_turn({"collated": lambda: collated(1, "in a row")}, options.rounds)["collated"]
    stored.clear()
    store._handles.__dict__.clear()
    store._footers.clear()
    gc.collect()
    if _mapped(store.path):  # mapped pages stay in the cache, and would be shared with the readers below
        raise RuntimeError("the store is still mapped")
    cold: Seconds = {"read": []}
    for _ in range(options.rounds):
        gone = forget(store.path)
        started = time.perf_counter()
        read_epoch(store.path, order)
        cold["read"].append(time.perf_counter() - started if gone else float("nan"))
    each = [duration * payload / few_payload for duration in seconds["lists"]]
    one, four = (shared_pages(store.path, order, readers) for readers in (1, 4))
    every = [float(tokens)] * options.rounds
    rows = [
        ratio("tokens/s read, data in the page cache", every, seconds["read"], "≥ 120,000"),
        ratio("… no checksum compared", every, seconds["unchecked"]),
        ratio("tokens/s read, data beyond the page cache", every, cold["read"], "≥ 120,000"),
        ratio("tokens/s read and collated over the alignment, all signals", every, seconds["collated"], "≥ 60,000"),
        ratio("… time after time, nothing else in between", every, alone),
        ratio("… and the maps made float32 squares, which else the step's device does", every, seconds["squared"]),
        *(
            ratio(f"µs the system spends, on memory, a token collated {when}", [1e6 * s for s in per_token[1:]], every)
            for when, per_token in system.items()  # the first of each was the warm-up
        ),
        ratio(
            f"the same by {options.threads} threads / by one, speed",
            seconds["collated"],
            seconds["by threads"],
        ),
        ratio("speed of reading / nested lists at true lengths", each, seconds["read"], "≥ 100"),
        value("memory of the store's pages, four readers / one", four / one, "≤ 1.1"),
        value("useful tokens among those computed, a whole epoch of the study", useful_tokens(workspace), "≥ 0.95"),
    ]
    return rows, {
        "tokens": tokens,
        "seconds": seconds | {"collated in a row": alone},
        "cold_seconds": cold,
        "pages_bytes": [one, four],
    }


def _lists(example: Any) -> dict[str, Any]:
    """A stored example as the outline keeps it."""
    import torch

    signals = {name: torch.from_numpy(array.copy()) for name, array in example.arrays.items()}
    return outline_way.whole(signals, len(example.encoding))


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = study_arguments(__doc__, examples=700)
    parser.add_argument("--list-examples", type=int, default=16, help="examples that are also kept as nested lists")
    options = parser.parse_args(arguments)
    begin(options)
    with tempfile.TemporaryDirectory() as folder:
        rows, facts = measure(options, Path(folder))
    finish("reading", rows, options, **facts)


if __name__ == "__main__":
    main()
