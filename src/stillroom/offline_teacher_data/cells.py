"""A signal of one example as a flat binary cell: its shape, its dtype, and the way there and back."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy import ndarray

COLUMNS = ("ids", "ends", "special", "topk_ids", "topk_logprobs", "tail_logprobs", "hidden", "attention")


@dataclass(frozen=True)
class Layout:
    """Shapes and dtypes of a store's cells."""

    top_k: int
    width: int
    heads: int
    dtype: str
    """numpy name of `topk_logprobs`, `hidden` and `attention`."""
    id_dtype: str
    """uint16 where the vocabulary allows, else int32."""
    attention_dtype: Literal["uint8_sqrt"] | None = None
    """`uint8_sqrt`: attention p is stored as round(255·√p); None: in `dtype`."""

    def cell(self, column: str, tokens: int) -> tuple[str, tuple[int, ...]]:
        """dtype and shape of a column's cell in a row of so many tokens."""
        shapes: dict[str, tuple[str, tuple[int, ...]]] = {
            "ids": ("int32", (tokens,)),
            "ends": ("int32", (tokens,)),
            "special": ("bool", (tokens,)),
            "topk_ids": (self.id_dtype, (tokens, self.top_k)),
            "topk_logprobs": (self.dtype, (tokens, self.top_k)),
            "tail_logprobs": ("float32", (tokens,)),
            "hidden": (self.dtype, (tokens, self.width)),
            "attention": ("uint8" if self.attention_dtype else self.dtype, (self.heads, tokens * (tokens + 1) // 2)),
        }
        return shapes[column]

    def payload_bytes(self, tokens: int) -> dict[str, int]:
        """Bytes of each column's cell in a row of so many tokens."""
        cells = {name: self.cell(name, tokens) for name in COLUMNS}
        return {name: np.dtype(dtype).itemsize * math.prod(shape) for name, (dtype, shape) in cells.items()}

    def stored(self, column: str, value: torch.Tensor | ndarray) -> torch.Tensor | ndarray:
        """A column's values as they go into its cell."""
        if column != "attention" or self.attention_dtype is None:
            return value
        return (torch.as_tensor(value).float().sqrt() * 255).round().to(torch.uint8)

    def restored(self, column: str, array: ndarray) -> ndarray:
        """What a cell's array stands for; itself, uncopied, unless it is companded: then float32."""
        return _SQUARES[array] if column == "attention" and self.attention_dtype else array


_SQUARES = ((np.arange(256) / 255) ** 2).astype(np.float32)


def id_dtype(vocabulary: int) -> str:
    """The smallest dtype this store uses that holds every id."""
    return "uint16" if vocabulary <= 2**16 else "int32"


def _flat(value: torch.Tensor | ndarray, dtype: str) -> ndarray:
    """Values in C order, little-endian, in the given numpy dtype; copied only if they are not so already."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return np.ascontiguousarray(value, dtype=np.dtype(dtype).newbyteorder("<"))


def _to_py(value: torch.Tensor | ndarray, dtype: str) -> bytes:
    """A tensor as a Parquet cell: little-endian bytes in C order, in the given numpy dtype."""
    return _flat(value, dtype).tobytes()


def parquet_cell(value: torch.Tensor | ndarray, dtype: str) -> pa.Array:
    """A column of one cell that holds the bytes of `_to_py`, without copying them."""
    data = pa.py_buffer(_flat(value, dtype))
    offsets = pa.py_buffer(np.array([0, data.size], dtype=np.int64))
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, [None, offsets, data])


def cell_bytes(column: Any) -> Any:
    """The bytes of the only cell of a Parquet column, a `pyarrow.LargeBinaryArray` of length 1, not copied.

    Of a null, none. Asking the array for the cell takes five times as long, ten times a row.
    """
    _, offsets, data = column.buffers()
    start, end = np.frombuffer(offsets, np.int64, 2, 8 * column.offset).tolist()
    return b"" if data is None else data.slice(start, end - start)


def _to_numpy_array(cell: Any, dtype: str, shape: Sequence[int]) -> ndarray:
    """A Parquet cell as a read-only array of the given dtype and shape; ValueError if the sizes do not agree."""
    buffer = cell.as_buffer() if isinstance(cell, pa.Scalar) else cell
    array: ndarray = np.frombuffer(buffer, dtype=np.dtype(dtype).newbyteorder("<"))
    expected = math.prod(shape)
    if array.size != expected:
        raise ValueError(f"holds {array.size} values of {dtype}, shape {tuple(shape)} needs {expected}")
    return array.reshape(shape).astype(dtype, copy=False) if sys.byteorder == "big" else array.reshape(shape)
