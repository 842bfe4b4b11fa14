"""A store of log-probabilities that another program captured, such as a vLLM server: aligned, or refused by example.

`write_requests` writes what the teacher has to read; `import_signals` reads what came back, in lines of JSON.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from stillroom.config import Signals, fingerprint
from stillroom.data.chat_templates import encode_examples
from stillroom.data.encoding import Encoding
from stillroom.data.tasks import Example
from stillroom.data.tasks.example import shown
from stillroom.errors import UserError
from stillroom.files import atomic_path, exclusive, file_sha256
from stillroom.offline_teacher_data.capturing import finish_store
from stillroom.offline_teacher_data.shards import plan_shards
from stillroom.offline_teacher_data.store import MANIFEST, SignalStore, shard_name, write_shard
from stillroom.progress import Progress, silent
from stillroom.signals.signal import Layout, id_dtype

_ABOVE_ONE = 1e-3
"""By how much a token's probabilities may sum to more than 1: float32 rounds that far."""

_TAIL_ROUNDING = 1.05
"""By what factor the probabilities outside may exceed the most that they can be: log-probabilities in 16 bits."""

_DISTILLKIT = ("input_ids", "token_ids", "top_values")
"""Columns of a Parquet file."""


class _Line(NamedTuple):
    """Where an example's row is: in its file of lines or, from a Parquet file, among the rows that are set aside."""

    file: Path
    number: int
    offset: int = 0
    choice: int = 0

    @property
    def of_columns(self) -> bool:
        """Whether the file is Parquet."""
        return self.file.suffix == ".parquet"

    def __str__(self) -> str:
        """For a message."""
        return f"{self.file}, {'row' if self.of_columns else 'line'} {self.number}"


def write_requests(tokenizer: Any, examples: Sequence[Example], path: Path) -> None:
    """Write one line per example: `example_id`, `prompt_token_ids` as the teacher has to read them, and `text`."""
    encodings = encode_examples(tokenizer, examples)
    with atomic_path(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for example, encoding in zip(examples, encodings, strict=True):
            ids = encoding.ids.tolist()
            row = {"example_id": example.example_id, "prompt_token_ids": ids, "text": example.text}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def import_signals(
    files: Sequence[Path],
    tokenizer: Any,
    examples: Sequence[Example],
    signals: Signals,
    vocabulary: int,
    store: Path,
    origin: dict[str, Any],
    progress: Progress = silent,
) -> SignalStore:
    """Write the store from lines of JSON, one per example; other rows are left out.

    `vocabulary`: entries of the teacher's output head. The files' digests are part of the store's fingerprint. Raises
    `UserError` naming the first example whose token ids or text are not the corpus's, or whose values cannot be
    log-probabilities at temperature 1.
    """
    layout = Layout(signals.top_k, 0, 0, signals.dtype, id_dtype(vocabulary), hidden_layers=(), attention_layers=())
    encodings = encode_examples(tokenizer, examples)
    with exclusive(store.parent, "import", f".{store.name}.lock"), ExitStack() as held:
        imported = [{"name": file.name, "sha256": _sha256(file)} for file in files]
        made = fingerprint(origin, imported)
        if (store / MANIFEST).exists() and (known := SignalStore.open(store)).manifest["fingerprint"] == made:
            return known
        if (store / MANIFEST).exists() or any(store.glob("*.parquet")):
            raise UserError(f"{store} holds files of another capture; delete it, or choose another with paths.store")
        aside = held.enter_context(tempfile.TemporaryFile(dir=store.parent))
        lines = _find(files, examples, encodings, aside)
        shards = plan_shards(encodings, signals.shard_examples)
        done = 0

        def rows(chosen: list[int]) -> Iterator[tuple[str, str, Encoding, Mapping[str, torch.Tensor]]]:
            nonlocal done
            for i in chosen:
                columns = _columns(_read(lines[i], aside), lines[i], examples[i], encodings[i], layout, vocabulary)
                yield examples[i].example_id, examples[i].task, encodings[i], columns
                done += 1
                progress(done, len(examples))

        with atomic_path(store) as whole:
            for number, chosen in enumerate(shards):
                write_shard(whole / shard_name(number), made, layout, rows(chosen))
            kept = {"fingerprint": made, "vocabulary": vocabulary, "imported": imported}
            finish_store(whole, layout, origin, len(shards), examples, tokenizer, kept, {})
    return SignalStore.open(store)


def _sha256(file: Path) -> str:
    try:
        return file_sha256(file)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None


def _find(
    files: Sequence[Path], examples: Sequence[Example], encodings: Sequence[Encoding], aside: IO[bytes]
) -> list[_Line]:
    """Where each example's row is; `UserError` names one that has none, two, or one of other tokens.

    What an example needs of a Parquet file is written `aside`: its rows are not in the order of the store's.
    """
    by_id = {example.example_id: i for i, example in enumerate(examples)}
    by_tokens = {encoding.ids.tobytes(): i for i, encoding in enumerate(encodings)}
    found: dict[int, _Line] = {}
    for file in files:
        for line, row in _rows(file):
            tokens = row.get("prompt_token_ids")
            if "example_id" not in row and not tokens:
                raise UserError(
                    f"{line}: neither example_id nor prompt_token_ids says which example it is; ask the server "
                    "for token ids (vLLM: return_token_ids), or add the example_id of `stillroom import --requests`"
                )
            if "example_id" in row:
                i = by_id.get(str(row["example_id"]))
            else:
                read = np.array(_integers(tokens, line), np.int32)
                i = by_tokens.get(read.tobytes())
                if i is None and "top" in row:  # DistillKit adds a token, so that what follows the text is known
                    i = by_tokens.get(read[:-1].tobytes())
            if i is None:
                continue
            if i in found:
                raise UserError(f"{line}: example {examples[i].example_id} is in {found[i]} as well")
            _require_same(row, line, examples[i], encodings[i])
            found[i] = _set_aside(row, line, aside) if line.of_columns else line
    if absent := [i for i in range(len(examples)) if i not in found]:
        first = examples[absent[0]]
        raise UserError(
            f"{len(absent)} of {len(examples)} examples have no row; the first is {first.example_id} ({first.task}), "
            f"{first.text[:60]!r}, which the teacher has to read as {_few(encodings[absent[0]].ids.tolist())}: "
            "`stillroom import STUDY --requests FILE` writes what to send"
        )
    return [found[i] for i in range(len(examples))]


def _rows(file: Path) -> Iterator[tuple[_Line, dict[str, Any]]]:
    """Every row of a file; each choice of a completion server's response is one."""
    if file.suffix == ".parquet":
        yield from _distillkit_rows(file)
        return
    try:
        with file.open("rb") as raw:
            offset = 0
            for number, text in enumerate(raw, 1):
                if text.strip():
                    for choice, row in enumerate(_parsed(text, file, number)):
                        yield _Line(file, number, offset, choice), row
                offset += len(text)
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror}") from None


def _distillkit_rows(file: Path) -> Iterator[tuple[_Line, dict[str, Any]]]:
    """Rows of `input_ids`, `token_ids` and `top_values`, DistillKit's uncompressed form; entry t is of token t + 1."""
    try:
        # as it is read by default, a whole row group is held, which may be the whole file
        with pq.ParquetFile(file, pre_buffer=False, buffer_size=2**20) as table:
            if missing := [name for name in _DISTILLKIT if name not in table.schema_arrow.names]:
                raise UserError(
                    f"{file} lacks the columns {missing}; it has {table.schema_arrow.names}. DistillKit's compressed "
                    "rows are read by its own code first: docs/how-to/imported.md"
                )
            number = 0
            for batch in table.iter_batches(1, columns=list(_DISTILLKIT)):
                for row in batch.to_pylist():
                    number += 1
                    try:
                        top = np.array(row["token_ids"], np.int64), np.array(row["top_values"], np.float64)
                    except (TypeError, ValueError, OverflowError):
                        top = np.empty(0, np.int64), np.empty(0)
                    if not (top[0].ndim == 2 and top[0].shape == top[1].shape):
                        raise UserError(f"{file}, row {number}: token_ids and top_values must be lists of equal lists")
                    found = {"prompt_token_ids": row["input_ids"], "top": (top[0], top[1].astype(np.float32))}
                    yield _Line(file, number), found
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file} cannot be read: {error}") from None


def _set_aside(row: Mapping[str, Any], line: _Line, aside: IO[bytes]) -> _Line:
    offset = aside.seek(0, os.SEEK_END)
    for array in (np.array(row["prompt_token_ids"], np.int64), *row["top"]):
        np.save(aside, array, allow_pickle=False)
    return line._replace(offset=offset)


def _read(line: _Line, aside: IO[bytes]) -> dict[str, Any]:
    if line.of_columns:
        aside.seek(line.offset)
        tokens, *top = (np.load(aside, allow_pickle=False) for _ in range(3))
        return {"prompt_token_ids": tokens.tolist(), "top": tuple(top)}
    with line.file.open("rb") as raw:
        raw.seek(line.offset)
        return _parsed(raw.readline(), line.file, line.number)[line.choice]


def _parsed(text: bytes, file: Path, number: int) -> list[dict[str, Any]]:
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}, line {number}: not valid JSON: {error}; give one object per line") from None
    if not isinstance(row, dict):
        raise UserError(f"{file}, line {number}: expected an object per line, with prompt_logprobs")
    choices = row.get("choices")
    if not isinstance(choices, list):
        return [row]
    if not all(isinstance(choice, dict) for choice in choices):
        raise UserError(f"{file}, line {number}: choices must be objects, as a completion server answers")
    outer = {key: value for key, value in row.items() if key in ("example_id", "prompt_token_ids")}
    return [{**outer, **{k: v for k, v in choice.items() if k != "text"}} for choice in choices]


def _require_same(row: Mapping[str, Any], line: _Line, example: Example, encoding: Encoding) -> None:
    """The text, where the row has one, and the token ids are the corpus's."""
    where = f"{line}: example {example.example_id} ({example.task})"
    if "text" in row and row["text"] != example.text:
        raise UserError(
            f"{where}: its text is {shown(row['text'])}, the corpus has {example.text[:60]!r}: it was captured "
            "for other data or another prompt; write the requests again and capture it"
        )
    if (given := row.get("prompt_token_ids")) is None:
        return
    tokens, expected = _integers(given, line), encoding.ids.tolist()
    if tokens != expected and not ("top" in row and tokens[:-1] == expected):
        t = next(
            (t for t, pair in enumerate(zip(tokens, expected, strict=False)) if pair[0] != pair[1]),
            min(map(len, (tokens, expected))),
        )
        raise UserError(
            f"{where}: the server read other tokens than teacher.model's tokenizer gives: from token {t} on "
            f"{_few(tokens[t:])}, not {_few(expected[t:])}; send prompt_token_ids as `stillroom import --requests` "
            "writes them (they have the special tokens), or name the server's own tokenizer in teacher.model"
        )


def _columns(
    row: Mapping[str, Any], line: _Line, example: Example, encoding: Encoding, layout: Layout, vocabulary: int
) -> dict[str, torch.Tensor]:
    """The row as a store's columns: position t has the distribution of token t + 1.

    What follows the last token may not be captured. No term compares it; it is then stored as uniform.
    """
    where = f"{line}: example {example.example_id} ({example.task})"
    ids, logprobs = (_listed if "top" in row else _given)(row, where, encoding, layout.top_k)
    if ((ids < 0) | (ids >= vocabulary)).any():
        raise UserError(
            f"{where}: token id {int(ids[(ids < 0) | (ids >= vocabulary)][0])} is not in the teacher's vocabulary"
        )
    if len(again := np.flatnonzero((np.diff(np.sort(ids, axis=1), axis=1) == 0).any(1))):
        raise UserError(f"{where}: a token id stands twice among the log-probabilities of token {int(again[0]) + 1}")
    sums = np.exp(logprobs).sum(1)
    if not (np.isfinite(logprobs).all() and (sums <= 1 + _ABOVE_ONE).all()):
        t = int((~(np.isfinite(logprobs).all(1) & (sums <= 1 + _ABOVE_ONE))).argmax())
        raise UserError(
            f"{where}: the probabilities of token {t + 1} sum to {sums[t]:.4g}: they are of no whole distribution; "
            "capture log-probabilities at temperature 1, without penalties, top_p or a bias"
        )
    # no token outside is likelier than the last one inside
    most = (vocabulary - layout.top_k) * np.exp(logprobs.min(axis=1, initial=0.0))
    if len(lacking := np.flatnonzero(1 - sums > _TAIL_ROUNDING * most + _ABOVE_ONE)):
        t = int(lacking[0])
        raise UserError(
            f"{where}: the log-probabilities of token {t + 1} leave {1 - sums[t]:.4g} to the tokens outside, which can "
            f"have {most[t]:.4g} at most: they are of no whole distribution; capture natural logarithms of "
            "probabilities, not logits or parts of them"
        )
    with np.errstate(divide="ignore"):  # nothing is left outside: −∞
        tail = np.log(np.maximum(1 - sums, 0))
    if len(ids) < len(encoding):
        k = layout.top_k
        ids = np.concatenate([ids, np.arange(k)[None]])
        logprobs = np.concatenate([logprobs, np.full((1, k), -np.log(vocabulary))])
        tail = np.append(tail, np.log((vocabulary - k) / vocabulary) if vocabulary > k else -np.inf)
    dtype = {"float16": torch.float16, "float32": torch.float32}[layout.dtype]
    return {
        "topk_ids": torch.from_numpy(ids.astype(np.int32)),
        "topk_logprobs": torch.from_numpy(logprobs).to(dtype),
        "tail_logprobs": torch.from_numpy(tail).float(),
    }


def _listed(row: Mapping[str, Any], where: str, encoding: Encoding, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probabilities (T − 1 or T, K), highest first, of a row that lists them."""
    (ids, values), length = row["top"], len(encoding)
    if ids.shape[0] != len(row["prompt_token_ids"]) - 1 or ids.shape[1] < k:
        raise UserError(
            f"{where}: {ids.shape[0]} entries of {ids.shape[1]} log-probabilities, but there must be "
            f"{len(row['prompt_token_ids']) - 1} of signals.top_k={k} or more: what follows each token but the last"
        )
    order = np.argsort(-values, axis=1, kind="stable")[:length, :k]
    return np.take_along_axis(ids[:length], order, 1), np.take_along_axis(values[:length], order, 1).astype(np.float64)


def _given(row: Mapping[str, Any], where: str, encoding: Encoding, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Ids and log-probabilities (T − 1, K) of tokens 1, 2, …, highest first."""
    given, length = row.get("prompt_logprobs"), len(encoding)
    if not isinstance(given, list):
        raise UserError(f"{where}: prompt_logprobs is missing; ask the server for it (vLLM: prompt_logprobs={k})")
    given = given[1:] if given and not given[0] else given
    if len(given) != length - 1:
        raise UserError(
            f"{where}: prompt_logprobs has {len(given)} entries after the first token, which nothing predicts, but the "
            f"text has {length - 1} tokens after it; capture the prompt whole"
        )
    ids, values = np.empty((length - 1, k), np.int64), np.empty((length - 1, k))
    for t, entry in enumerate(given):
        token = int(encoding.ids[t + 1])
        try:
            pairs = [(float(v["logprob"] if isinstance(v, dict) else v), int(key)) for key, v in entry.items()]
        except (AttributeError, KeyError, TypeError, ValueError):
            raise UserError(
                f'{where}: prompt_logprobs of token {t + 1}: expected {{"id": {{"logprob": …}}, …}}, not {shown(entry)}'
            ) from None
        if odd := [key for _, key in pairs if not 0 <= key < 2**31]:
            raise UserError(f"{where}: token id {shown(odd[0])} is not in the teacher's vocabulary")
        if token not in (key for _, key in pairs):
            raise UserError(
                f"{where}: token {t + 1} of prompt_logprobs is not about token {token}, which the teacher reads there: "
                "the rows are shifted, or of another tokenizer; vLLM's own always have the prompt's token among them"
            )
        if len(pairs) < k:
            raise UserError(
                f"{where}: token {t + 1} has {len(pairs)} log-probabilities, signals.top_k is {k}: set it to what was "
                "captured at every token, or capture again"
            )
        best = sorted(pairs, reverse=True)[:k]
        values[t], ids[t] = [v for v, _ in best], [i for _, i in best]
    return ids, values


def _integers(value: Any, line: _Line) -> list[int]:
    if not isinstance(value, list) or not all(type(v) is int and 0 <= v < 2**31 for v in value):
        raise UserError(f"{line}: prompt_token_ids must be a list of token ids, not {shown(value)}")
    return value


def _few(tokens: list[int]) -> str:
    return str(tokens[:6]) if len(tokens) <= 6 else f"[{', '.join(map(str, tokens[:6]))}, …]"
