"""The baseline of the capture, writing and reading benchmarks: how the study's outline says to store a teacher.

Eager attention in every layer, every sequence padded to 512, maps whole and in float16, tensors made into nested
Python lists, default Parquet, read back row by row.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stillroom.data.encoding import Encoding

LENGTH = 512
"""Tokens to which everything is padded."""


def forward(
    model: PreTrainedModel, encodings: Sequence[Encoding], top_k: int, batch: int = 8
) -> Iterator[dict[str, Tensor]]:
    """Signals of each example, padded to `LENGTH`; the model's attention must be eager."""
    for first in range(0, len(encodings), batch):
        part = encodings[first : first + batch]
        ids = torch.zeros(len(part), LENGTH, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, encoding in enumerate(part):
            ids[row, : len(encoding)] = torch.from_numpy(encoding.ids.astype("int64"))
            mask[row, : len(encoding)] = 1
        ids, mask = ids.to(model.device), mask.to(model.device)
        output = model(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True, use_cache=False)
        top = torch.log_softmax(output.logits.float(), -1).topk(top_k, dim=-1)
        for row in range(len(part)):
            yield {
                "topk_ids": top.indices[row].int().cpu(),
                "topk_logprobs": top.values[row].half().cpu(),
                "hidden": output.hidden_states[-1][row].half().cpu(),
                "attention": output.attentions[-1][row].half().cpu(),
            }


def whole(signals: Mapping[str, Tensor], length: int) -> dict[str, Tensor]:
    """Our signals of an example of `length` tokens as the outline keeps them: the attention map with its zeros."""
    heads = signals["attention"].shape[0]
    attention = torch.zeros(heads, length, length, dtype=signals["attention"].dtype)
    lower, left = torch.tril_indices(length, length)
    attention[:, lower, left] = signals["attention"]
    return {
        "topk_ids": signals["topk_ids"],
        "topk_logprobs": signals["topk_logprobs"],
        "hidden": signals["hidden"],
        "attention": attention,
    }


def padded(tensors: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    """An example's tensors padded with zeros to `LENGTH`."""
    more = LENGTH - length
    return {
        name: torch.nn.functional.pad(value, (0, more, 0, more) if name == "attention" else (0, 0, 0, more))
        for name, value in tensors.items()
    }


def write(path: Path, rows: Iterator[dict[str, Tensor]]) -> None:
    """Rows as nested lists, one row group each so that no more than one has to fit in memory."""
    writer = None
    for row in rows:
        table = pa.Table.from_pylist([{name: value.tolist() for name, value in row.items()}])
        writer = writer or pq.ParquetWriter(path, table.schema)
        writer.write_table(table)
    assert writer is not None
    writer.close()


def read(path: Path, order: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Rows back as tensors, one at a time."""
    file = pq.ParquetFile(path)
    for number in order:
        row = file.read_row_group(number).to_pylist()[0]
        yield {name: torch.tensor(value) for name, value in row.items()}
