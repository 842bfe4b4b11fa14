"""The teacher's data: captured once, verified before anything trains on it, archived under a date.

capture → store/part-*.parquet, manifest.json → verify_saved_data → verified.json → archive → store_<UTC date>/
"""

from __future__ import annotations

import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from queue import Empty, Full, Queue
from typing import Any

import torch
import transformers

from stillroom.config import Precision, Signals, fingerprint
from stillroom.data.chat_templates import chat_template_hash, encode_examples
from stillroom.data.corpus import examples_digest
from stillroom.data.encoding import Encoding
from stillroom.data.tasks import Example
from stillroom.errors import UserError
from stillroom.files import atomic_path, exclusive, file_sha256, read_json, shown_size, write_json
from stillroom.models.architecture import check_capture
from stillroom.models.hub import tokenizer_hash
from stillroom.models.output_head import head_of, save_output_head
from stillroom.models.sizes import heads, value_width, vocabulary_size, width
from stillroom.offline_teacher_data.shards import Slice, hold, plan_shards, token_batches
from stillroom.offline_teacher_data.store import (
    HEAD,
    MANIFEST,
    SCHEMA_VERSION,
    SignalStore,
    payload_bytes,
    shard_entry,
    shard_is_whole,
    shard_name,
    write_manifest,
    write_shard,
)
from stillroom.offline_teacher_data.verification import (
    refuse_difference,
)
from stillroom.progress import Progress, silent
from stillroom.provenance import package_versions, utc_now
from stillroom.signals import begin_signals
from stillroom.signals.signal import Layout, id_dtype

_Row = tuple[str, str, Encoding, dict[str, torch.Tensor]]
"""An example's id, task and encoding, and its signals by column."""


def made_from(
    teacher_identity: str,
    teacher_dtype: Precision,
    tokenizer: Any,
    signals: Signals,
    examples: Sequence[Example],
    max_new_tokens: int = 0,
) -> dict[str, Any]:
    """Everything that decides a store's values; its fingerprint is the store's. `max_new_tokens`: of an answer."""
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
        **{
            name: list(getattr(signals, name))
            for name in ("hidden_layers", "attention_layers", "value_layers")
            if getattr(signals, name) != Signals.model_fields[name].default
        },
        **({"imported": True} if signals.imported else {}),
        **({"teacher_head": True} if signals.teacher_head else {}),
        **({"teacher_answers": max_new_tokens} if signals.teacher_answers else {}),
        **({"chat_template": chat_template_hash(tokenizer)} if any(e.turns for e in examples) else {}),
    }


Answer = Callable[[Sequence[Example]], Sequence[str | None]]
"""The teacher's answers to prompts; None for one that did not end."""


def capture(
    model: transformers.PreTrainedModel,
    tokenizer: Any,
    examples: Sequence[Example],
    signals: Signals,
    store: Path,
    origin: dict[str, Any],
    progress: Progress = silent,
    answer: Answer | None = None,
) -> SignalStore:
    """Run the teacher over every example and write the store: `capture_slice` of all of it."""
    capture_slice(model, tokenizer, examples, signals, store, origin, Slice(), progress, answer)
    return SignalStore.open(store)


def capture_slice(
    model: transformers.PreTrainedModel,
    tokenizer: Any,
    examples: Sequence[Example],
    signals: Signals,
    store: Path,
    origin: dict[str, Any],
    slice_: Slice,
    progress: Progress = silent,
    answer: Answer | None = None,
) -> bool:
    """Run the teacher over one slice of the examples; finished shards are kept.

    The process that makes the last missing shard also writes the manifest. Returns whether the store is finished.
    `origin` comes from `made_from`; `answer` gives the teacher's answers, where kept. Raises `UserError` if the
    folder holds another capture, if k exceeds the vocabulary, if the disk is too small, or if the architecture's
    attention cannot be captured.
    """
    layout = _layout(model, signals)
    encodings = encode_examples(tokenizer, examples)
    capture_fingerprint = fingerprint(origin)
    shards = plan_shards(encodings, signals.shard_examples)

    def missing() -> list[int]:
        return [n for n, rows in enumerate(shards) if not _done(store, n, rows, examples, capture_fingerprint)]

    with hold(store, slice_):
        _claim(store, origin)
        absent = missing()
        beside = head_of(model).weight.nbytes if signals.teacher_head else 0
        _require_space(store, sum(len(encodings[i]) for n in absent for i in shards[n]), encodings, layout, beside)
        mine = slice_.shards(len(shards))
        total = sum(len(shards[n]) for n in mine)
        done = sum(len(shards[n]) for n in mine if n not in absent)
        if done < total:
            longest = max(encodings, key=len)
            probe = torch.from_numpy(longest.ids.astype("int64"))[None].to(model.device)
            check_capture(model, probe)
        progress(done, total)
        writers = _Writers()
        with writers:
            for number in (n for n in mine if n in absent):
                batches = _signals_of(model, examples, encodings, shards[number], signals, layout)
                counted = _counted(batches, lambda n, base=done: progress(base + n, total))  # type: ignore[misc]
                answers = answer([examples[i] for i in shards[number]]) if answer else None
                writers.write(counted, store / shard_name(number), capture_fingerprint, layout, answers)
                done += len(shards[number])
    with exclusive(store, "capture", ".merging", wait=-1):
        if finished := not missing():
            _finish(store, layout, origin, len(shards), examples, tokenizer, model, writers.entries)
    return finished


def _layout(model: transformers.PreTrainedModel, signals: Signals) -> Layout:
    vocabulary = vocabulary_size(model)
    if signals.top_k > vocabulary:
        raise UserError(f"signals.top_k: {signals.top_k} exceeds the teacher's vocabulary of {vocabulary}")
    return Layout(
        signals.top_k,
        width(model.config),
        heads(model.config),
        signals.dtype,
        id_dtype(vocabulary),
        signals.attention_dtype,
        signals.hidden_layers,
        signals.attention_layers,
        signals.value_layers,
        value_width(model.config) if signals.value_layers else 0,
    )


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


def _done(store: Path, number: int, rows: list[int], examples: Sequence[Example], fingerprint: str) -> bool:
    return shard_is_whole(store / shard_name(number), fingerprint, [examples[i].example_id for i in rows])


def _require_space(store: Path, tokens: int, encodings: Sequence[Encoding], layout: Layout, beside: int) -> None:
    total = sum(len(e) for e in encodings)
    planned = sum(payload_bytes(layout, len(e)) for e in encodings)
    needed = int(1.05 * planned * tokens / total) + beside
    free = shutil.disk_usage(store).free
    if needed > free:
        raise UserError(
            f"{store}: the teacher's data need {shown_size(needed)}, {shown_size(free)} are free; "
            "free some space or choose another disk with OFFLINE_DATA_PATH or --set paths.store=DIR"
        )


def _signals_of(
    model: transformers.PreTrainedModel,
    examples: Sequence[Example],
    encodings: Sequence[Encoding],
    rows: Sequence[int],
    signals: Signals,
    layout: Layout,
) -> Iterator[list[_Row]]:
    """The rows of each batch; on a GPU the next batch is begun before this one is waited for."""
    dtype = {"float16": torch.float16, "float32": torch.float32}[signals.dtype]
    begun: deque[tuple[list[int], Callable[[], list[dict[str, torch.Tensor]]]]] = deque()

    def arrived() -> list[_Row]:
        batch, arrive = begun.popleft()
        try:
            made = zip(batch, arrive(), strict=True)
        except UserError as error:
            raise UserError(f"examples {[examples[i].example_id for i in batch]}: {error}") from None
        return [(examples[i].example_id, examples[i].task, encodings[i], result) for i, result in made]

    for batch in token_batches(rows, encodings, signals.batch_tokens):
        begun.append((batch, begin_signals(model, [encodings[i] for i in batch], layout, dtype)))
        if len(begun) > (model.device.type == "cuda"):
            yield arrived()
    while begun:
        yield arrived()


def _counted(batches: Iterator[list[_Row]], report: Callable[[int], None]) -> Iterator[list[_Row]]:
    done = 0
    for batch in batches:
        yield batch
        done += len(batch)
        report(done)


class _AbandonedError(Exception):
    """The rows of a shard end before it is whole."""


class _Writers:
    """Shards are written, and read again for the manifest, by threads while the teacher reads on, `AT_ONCE` at most.

    A context: it is left when every shard is whole, or raises why one is not.
    """

    AT_ONCE = 2
    """While one is flushed to the disk, the next one is filled."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(self.AT_ONCE, "shard")
        self._written: deque[Future[None]] = deque()
        self.entries: dict[str, dict[str, Any]] = {}
        """What the manifest will say of each shard, by its name."""

    def __enter__(self) -> _Writers:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        self._threads.shutdown()  # a shard whose rows are all there is finished all the same
        while self._written and error is None:
            self._written.popleft().result()

    def write(self, batches: Iterable[list[_Row]], path: Path, *shard: Any) -> None:
        """`write_shard` by a thread; back when it has all rows. What either raises ends the other."""
        made: Queue[list[_Row] | None] = Queue(maxsize=1)
        whole = ended = False

        def rows() -> Iterator[_Row]:
            # an interruption can strike anywhere, also between a batch and its notice: so nobody waits without an end
            while not (ended and made.empty()):
                with suppress(Empty):
                    if (batch := made.get(timeout=0.2)) is None:
                        break
                    yield from batch
            if not whole:
                raise _AbandonedError

        def give(batch: list[_Row] | None) -> None:
            while True:
                self._raise_failures()
                with suppress(Full):
                    made.put(batch, timeout=0.2)
                    return

        while len(self._written) >= self.AT_ONCE:
            self._written.popleft().result()
        fingerprint, layout, answers = shard
        try:
            self._written.append(self._threads.submit(self._write, path, fingerprint, layout, rows(), answers))
            for batch in batches:
                give(batch)
            whole = True
            give(None)
        finally:
            ended = True

    def _write(self, path: Path, *shard: Any) -> None:
        write_shard(path, *shard)
        self.entries[path.name] = shard_entry(path)

    def _raise_failures(self) -> None:
        for written in self._written:
            if written.done():
                written.result()


def _finish(
    store: Path,
    layout: Layout,
    origin: dict[str, Any],
    shards: int,
    examples: Sequence[Example],
    tokenizer: Any,
    model: transformers.PreTrainedModel,
    entries: Mapping[str, dict[str, Any]],
) -> None:
    """Write the manifest, and beside it the tokenizer and the output head if it is kept, unless they are there."""
    if (store / MANIFEST).exists():
        if not (store / "tokenizer").is_dir():
            with atomic_path(store / "tokenizer") as temporary:
                tokenizer.save_pretrained(temporary)
        return
    kept: dict[str, Any] = {"fingerprint": fingerprint(origin), "vocabulary": vocabulary_size(model)}
    if "teacher_head" in origin:
        with atomic_path(store / HEAD) as temporary:
            head = save_output_head(head_of(model), temporary)
        file = {"bytes": (store / HEAD).stat().st_size, "sha256": file_sha256(store / HEAD)}
        kept["teacher_head"] = {**head, **file}
    finish_store(store, layout, origin, shards, examples, tokenizer, kept, entries)


def finish_store(
    store: Path,
    layout: Layout,
    origin: dict[str, Any],
    shards: int,
    examples: Sequence[Example],
    tokenizer: Any,
    kept: dict[str, Any],
    entries: Mapping[str, dict[str, Any]],
) -> None:
    """Write the tokenizer and, last, the manifest.

    `kept`: the store's fingerprint, its vocabulary and more. `entries`: what the manifest says of shards, where that is
    known; the others are read for it.
    """
    tokenizer.save_pretrained(store / "tokenizer")
    prompts: dict[str, str] = {}
    for example in examples:
        prompts.setdefault(example.task, example.prompt)
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "made_from": origin,
        "created": utc_now(),
        "versions": package_versions(),
        "layout": layout.__dict__,
        **kept,
        "prompts": prompts,
    }
    names = [shard_name(number) for number in range(shards)]
    with ThreadPoolExecutor(4, "digests") as threads:
        read = threads.map(shard_entry, [store / name for name in names if name not in entries])
        manifest["shards"] = [entries[name] if name in entries else next(read) for name in names]
    write_manifest(store, manifest)
