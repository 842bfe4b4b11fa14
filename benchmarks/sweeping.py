"""Ray's cost: a sweep against the same trials in plain processes, as many at once, each a loop over its share.

    python benchmarks/sweeping.py small --groups black_box --seeds 4 --set teacher.model=DIR ...

Ray comes first, with nothing in the page cache; in a second round, last. Both start from an archived store and end
with every trial's result; Ray's own start and a new process for each trial are part of the sweep.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from inputs import open_study, study_arguments
from ratios import finish, ratio
from stillroom.config import UserError
from stillroom.jobs import TrialPlan, run_trial
from stillroom.stages import Workspace


def run_share(plans: Sequence[TrialPlan], threads: int) -> None:
    """Trials one after the other, with so many threads, as a worker of the sweep has them."""
    import torch

    torch.set_num_threads(threads)
    for plan in plans:
        run_trial(plan)


def bare(workspace: Workspace, at_once: int, threads: int) -> float:
    """Seconds of all trials in so many plain processes."""
    plans = workspace.plans()
    started = time.perf_counter()
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=run_share, args=(plans[n::at_once], threads)) for n in range(at_once)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError("a trial failed")
    return time.perf_counter() - started


def swept(workspace: Workspace) -> float:
    """Seconds of all trials on Ray."""
    started = time.perf_counter()
    if errors := workspace.sweep():
        raise UserError(f"trials failed: {errors}")
    return time.perf_counter() - started


def forget(workspace: Workspace) -> None:
    """Remove every trial, and end Ray."""
    import ray

    ray.shutdown()
    for plan in workspace.plans():
        shutil.rmtree(plan.folder, ignore_errors=True)
    shutil.rmtree(workspace.results / "ray", ignore_errors=True)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = study_arguments(__doc__, examples=None, rounds=1)
    parser.set_defaults(threads=1)
    parser.add_argument("--groups", nargs="+", default=["black_box"])
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--at-once", type=int, default=len(os.sched_getaffinity(0)))
    options = parser.parse_args(arguments)
    options.set = [
        *options.set,
        f"groups=[{','.join(options.groups)}]",
        f"sweep.seeds={list(range(options.seeds))}",
        f"sweep.max_concurrent={options.at_once}",
        f"sweep.cpus_per_trial={options.threads}",
        "teacher.adapt.method=none",
        *(f"analysis.{kind}=[]" for kind in ("primary", "secondary")),
    ]
    seconds: dict[str, list[float]] = {"bare": [], "ray": []}
    with tempfile.TemporaryDirectory() as folder:
        workspace = open_study(options, Path(folder))
        workspace.capture()
        workspace.verify()
        workspace.archive()
        ways = {"ray": lambda: swept(workspace), "bare": lambda: bare(workspace, options.at_once, options.threads)}
        for number in range(options.rounds):
            for name in sorted(ways, reverse=number % 2 == 0):
                seconds[name].append(ways[name]())
                forget(workspace)
        for path in Path(folder).rglob("*"):
            path.chmod(0o700)  # the archive is read-only
    rows = [ratio("time of a sweep / the same trials bare", seconds["ray"], seconds["bare"], "≤ 1.15")]
    finish("Ray", rows, options, seconds=seconds, trials=len(options.groups) * options.seeds)


if __name__ == "__main__":
    main()
