"""Damage done to stores on purpose."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

from stillroom.files import read_json


def damaged(path, change):
    """Rewrite one shard with some cells changed, and make manifest and checksums agree with it."""
    import pyarrow.parquet as pq

    from stillroom.offline_teacher_data.store import shard_entry, write_manifest

    shard = path / "part-00000.parquet"
    table = pq.read_table(shard)
    metadata = pq.read_metadata(shard).metadata
    columns = {name: table[name].to_pylist() for name in table.schema.names}
    change(columns)
    new = pa.table({n: pa.array(columns[n], table.schema.field(n).type) for n in columns}, schema=table.schema)
    with pq.ParquetWriter(shard, new.schema, compression="none") as writer:
        for row in range(new.num_rows):
            writer.write_table(new.slice(row, 1))
        writer.add_key_value_metadata({k.decode(): v.decode() for k, v in metadata.items() if k.startswith(b"hidden_")})
    manifest = read_json(path / "manifest.json")
    manifest["shards"][0] = shard_entry(shard)
    manifest.pop("digest")
    write_manifest(path, manifest)


def set_values(column, dtype, change):
    """A change to the first row's cell of a column, as an array."""

    def apply(columns):
        for row in range(len(columns[column])):
            array = np.frombuffer(columns[column][row], dtype).copy()
            change(array)
            columns[column][row] = array.tobytes()

    return apply


def flip_byte(path):
    """Change one byte in the middle of a file."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
