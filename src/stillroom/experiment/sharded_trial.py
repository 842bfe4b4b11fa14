"""One trial by several processes of this machine, each with a part of the student, started by `torch.multiprocessing`.

The process that asks for them trains nothing: it passes on what the first one says, and ends all when one fails.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import multiprocessing
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

from stillroom.credentials import redact
from stillroom.errors import UserError
from stillroom.experiment.jobs import TrialPlan, train_plan
from stillroom.experiment.ray_processes import end_with_parent
from stillroom.files import read_json
from stillroom.progress import Progress, silent
from stillroom.training.sharding import Ranks
from stillroom.training.train_student import Report

BACKEND = "cpu:gloo,cuda:nccl"
"""What the processes exchange tensors by: counts and finished sums on the CPU, weights and gradients where they lie."""

PATIENCE = timedelta(days=1)
"""How long a process waits for the others: as long as the leading one may take to write a checkpoint."""

_SECONDS = 0.2
"""Between two looks at what the processes say."""


@dataclass(frozen=True)
class _Failed:
    """What stopped a process, and whether it is the user's to change."""

    why: str
    remedy_known: bool


def train_sharded(
    plan: TrialPlan, report: Report, progress: Progress = silent, *, count: int, threads: int
) -> dict[str, Any]:
    """Train a trial in `count` processes, one per GPU where there are GPUs; returns its result.

    Raises what a process has raised: a `UserError` as one, anything else as `RuntimeError`; and `UserError` where
    there are GPUs, but too few.
    """
    if 0 < (gpus := torch.cuda.device_count()) < count:
        raise UserError(f"sweep.gpus_per_trial: {count} asked for, {gpus} found here")
    with tempfile.TemporaryDirectory(prefix="stillroom") as folder:
        meeting = str(Path(folder) / "rendezvous")
        # a fork has imported everything already; but it cannot use a GPU that this process has looked at
        forks = sys.platform == "linux" and os.environ.get("CUDA_VISIBLE_DEVICES") == ""
        method = "fork" if forks else "spawn"
        said = multiprocessing.get_context(method).SimpleQueue()
        running = start_processes(_train, (plan, count, threads, meeting, said), count, join=False, start_method=method)
        assert running is not None
        killed, failed = None, list[_Failed]()
        try:
            over = False
            while not over:
                try:
                    over = running.join(_SECONDS)
                except ProcessExitedException as error:
                    killed, over = error, True
                for kind, value in _heard(said):
                    if kind == "failed":
                        failed.append(value)
                    elif kind == "epoch":
                        report(value)
                    else:
                        progress(*value)
        finally:
            for process in running.processes:
                process.kill()
    mistakes = [failure.why for failure in failed if failure.remedy_known]
    if mistakes:
        raise UserError(mistakes[0])
    if killed is not None and killed.signal_name:  # what the others say then is that it is gone
        raise UserError(
            f"one of the trial's {count} processes was stopped ({killed}): out of memory? Set "
            "training.micro_batch_size lower or sweep.gpus_per_trial higher"
        )
    if failed or killed is not None:
        raise RuntimeError(failed[0].why if failed else str(killed))
    result: dict[str, Any] = read_json(plan.files.result)
    return result


def _heard(said: Any) -> Iterator[Any]:
    while not said.empty():
        yield said.get()


def _train(rank: int, plan: TrialPlan, count: int, threads: int, meeting: str, said: Any) -> None:
    end_with_parent()
    torch.set_num_threads(threads)
    for library in ("GLOO", "NCCL"):  # all processes are on this machine: nothing listens to others
        os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    code, leads = 1, rank == 0
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(rank)
        backend = BACKEND if torch.cuda.is_available() else "gloo"
        dist.init_process_group(backend, init_method=f"file://{meeting}", rank=rank, world_size=count, timeout=PATIENCE)

        def tell(kind: str, value: Any) -> None:
            if leads:
                said.put((kind, value))

        train_plan(
            plan,
            lambda metrics: tell("epoch", metrics),
            lambda done, of: tell("progress", (done, of)),
            ranks=Ranks(rank, count),
        )
        dist.barrier()
        code = 0
    except Exception as error:
        why = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        said.put(("failed", _Failed(redact(why), isinstance(error, UserError))))
        if not isinstance(error, UserError):
            sys.excepthook(*sys.exc_info())
    finally:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)  # the other processes may still wait for what this one cannot give
