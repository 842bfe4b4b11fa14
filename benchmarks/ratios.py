"""What the benchmarks share: alternatives run in turn, ratios within a round, peak memory, a table and JSON.

A machine's speed changes from minute to minute; two things timed right after each other share its mood, so only
ratios of one round are reported, with their median, smallest and largest over the rounds.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import os
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from stillroom.files import write_json
from stillroom.provenance import hardware, package_versions

Seconds = dict[str, list[float]]


def in_turn(alternatives: dict[str, Callable[[], Any]], rounds: int, warm_up: bool = True) -> Seconds:
    """Seconds of each alternative in each round, after one unmeasured; every second round runs them backwards."""
    for run in alternatives.values() if warm_up else ():
        run()
    seconds: Seconds = {name: [] for name in alternatives}
    for number in range(rounds):
        for name in sorted(alternatives, key=list(alternatives).index, reverse=number % 2 == 1):
            gc.collect()
            synchronize()
            started = time.perf_counter()
            alternatives[name]()
            synchronize()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def synchronize() -> None:
    """Wait until a GPU has done what it was given; without one, nothing."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def ratio(what: str, over: Sequence[float], under: Sequence[float], target: str = "") -> dict[str, Any]:
    """A row of a table: `over / under` of each round."""
    found = [a / b for a, b in zip(over, under, strict=True)]
    return {
        "what": what,
        "median": statistics.median(found),
        "min": min(found),
        "max": max(found),
        "target": target,
    }


def value(what: str, number: float, target: str = "") -> dict[str, Any]:
    """A row of a table that was measured once: a size, a share, a rate."""
    return {"what": what, "median": number, "min": number, "max": number, "target": target}


def memory_ratio(what: str, over: PeakMemory, under: PeakMemory, target: str = "") -> dict[str, Any]:
    """A row of a table: one peak over another; not a number where there was nothing to see."""
    return value(what, over.bytes / under.bytes if under.bytes > 0 else float("nan"), target)


class PeakMemory(threading.Thread):
    """The most memory this process held inside a `with`, in bytes above what it held before.

    On a GPU, what PyTorch has allocated there. Else anonymous memory, which is what was allocated; pages of a mapped
    file, which the system drops as it needs room, are not among it. That is sampled every millisecond, so an
    allocation shorter than that can be missed.
    """

    def __enter__(self) -> PeakMemory:
        gc.collect()
        pa.default_memory_pool().release_unused()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back to the system, so that it counts when taken again
        synchronize()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        self.before = self.most = held_memory()
        self.ended = threading.Event()
        self.start()
        return self

    def run(self) -> None:
        """Sample until told to end."""
        while not self.ended.wait(0.001):
            self.most = max(self.most, held_memory())

    def __exit__(self, *_: object) -> None:
        self.most = max(self.most, torch.cuda.max_memory_allocated() if torch.cuda.is_available() else held_memory())
        self.ended.set()
        self.join()

    @property
    def bytes(self) -> int:
        """What the block added at its highest."""
        return self.most - self.before


def held_memory() -> int:
    """Bytes this process holds now: on a GPU, or of anonymous resident memory, by Linux's account."""
    if torch.cuda.is_available():
        return torch.cuda.memory_allocated()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon:"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("no RssAnon in /proc/self/status: this needs Linux")


def arguments(description: str | None, rounds: int = 5) -> argparse.ArgumentParser:
    """The options every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=rounds, help="times each alternative is measured")
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument(
        "--threads", type=int, default=len(os.sched_getaffinity(0)), help="of a forward pass, or of a trial"
    )
    return parser


def finish(subject: str, rows: Sequence[dict[str, Any]], options: argparse.Namespace, **facts: Any) -> None:
    """Print the table; write it, with what it was measured on, where `--output` says."""
    print(f"{subject}, {options.rounds} rounds")
    for row in rows:
        spread = "" if row["min"] == row["max"] else f"  ({row['min']:.3g} to {row['max']:.3g})"
        print(f"  {row['what']:<72} {row['median']:>9.4g}{spread}  {row['target']}")
    if options.output:
        settings = {name: str(setting) for name, setting in vars(options).items() if name != "output"}
        record = {"subject": subject, "rows": list(rows), "settings": settings, **facts}
        write_json(options.output, {**record, "hardware": hardware(), "versions": package_versions()})


def begin(options: argparse.Namespace) -> None:
    """Use as many threads as asked for; the same random numbers every time."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
