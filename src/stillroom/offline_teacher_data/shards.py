"""What a capturing process does: the shards of a store, its slice of them, and the lock it holds meanwhile.

Which examples are in which shard, and in which batch, is the same however many processes share the work; so the
files are the same too.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from stillroom.data.encoding import Encoding
from stillroom.errors import UserError
from stillroom.files import exclusive


@dataclass(frozen=True)
class Slice:
    """Slice `number` of `of`: every `of`-th shard, from shard `number` on. The default is the whole store."""

    number: int = 1
    of: int = 1

    @classmethod
    def parse(cls, text: str) -> Slice:
        """Read `i/n`; `UserError` unless 1 ≤ i ≤ n."""
        match = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
        if match is None or not 1 <= int(match[1]) <= int(match[2]):
            raise UserError(f"--slice {text}: expected i/n with i from 1 to n, such as 2/4")
        return cls(int(match[1]), int(match[2]))

    def shards(self, count: int) -> range:
        """Numbers of this slice's shards, in a store of `count`."""
        return range(self.number - 1, count, self.of)

    @property
    def lock(self) -> str:
        """Name of the lock file; the processes of one division have different ones."""
        return ".lock" if self.of == 1 else f".lock-{self.number}-of-{self.of}"


@contextmanager
def hold(store: Path, slice_: Slice) -> Iterator[None]:
    """Hold a slice of a store; refused if it is held, or if the work is being divided in another way."""
    with exclusive(store, "capture", slice_.lock):
        for other in store.glob(".lock*"):
            if not other.name.endswith(f"-of-{slice_.of}") and other.name != slice_.lock:
                with exclusive(store, "capture", other.name):
                    pass
        yield


def plan_shards(encodings: Sequence[Encoding], size: int) -> list[list[int]]:
    """Which examples go into which shard: sorted by length, so that a batch needs little padding."""
    ordered = sorted(range(len(encodings)), key=lambda i: (-len(encodings[i]), i))
    return [ordered[first : first + size] for first in range(0, len(ordered), size)]


def token_batches(rows: Sequence[int], encodings: Sequence[Encoding], budget: int) -> Iterator[list[int]]:
    """The forward passes of one shard: examples whose padded size stays within `budget` tokens, one at least."""
    batch: list[int] = []
    for i in rows:
        if batch and len(encodings[batch[0]]) * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch
