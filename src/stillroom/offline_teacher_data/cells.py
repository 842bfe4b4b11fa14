"""An array as a flat binary Parquet cell, and back."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy import ndarray


def _flat(value: torch.Tensor | ndarray, dtype: str) -> ndarray:
    """Values in C order, little-endian, in the given numpy dtype; copied only if they are not so already."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        value = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return np.ascontiguousarray(value, dtype=np.dtype(dtype).newbyteorder("<"))


def _to_py(value: torch.Tensor | ndarray, dtype: str) -> bytes:
    """A tensor as a Parquet cell: little-endian bytes in C order, in the given numpy dtype.

    The name is the study's own, and its regression test asks for it.
    """
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
