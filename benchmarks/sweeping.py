"""A launcher's cost: a sweep, on Ray and without, against the same trials in plain processes, a loop in each of them.

    python benchmarks/sweeping.py small --groups black_box --seeds 4 --set teacher.model=DIR ...

Ray comes first, with nothing in the page cache; in a second round, last. All start from an archived store, plan, and
end with every trial's result; a launcher's own start and a new process for each trial are part of the sweep. What each
part takes follows from the sweep's own events, and from each trial's time in a plain process that has imported all.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

from inputs import open_study, study_arguments
from ratios import finish, ratio, value
from stillroom.errors import UserError
from stillroom.experiment import workspace as stages
from stillroom.experiment.jobs import TrialPlan, run_trial
from stillroom.experiment.workspace import Workspace


def run_share(plans: Sequence[TrialPlan], threads: int, took: Any) -> None:
    """Trials one after the other, with so many threads, as a worker of the sweep has; `took` gets their seconds."""
    import torch

    torch.set_num_threads(threads)
    for plan in plans:
        started = time.perf_counter()
        run_trial(plan)
        took.put(time.perf_counter() - started)


def bare(workspace: Workspace, at_once: int, threads: int) -> dict[str, float]:
    """Seconds of all trials in so many plain processes, and of a trial (mean)."""
    started = time.perf_counter()
    plans = workspace.plans()
    context = multiprocessing.get_context("spawn")
    took: Any = context.SimpleQueue()
    processes = [context.Process(target=run_share, args=(plans[n::at_once], threads, took)) for n in range(at_once)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise RuntimeError("a trial failed")
    return {"whole": time.perf_counter() - started, "trial": statistics.mean(took.get() for _ in plans)}


class PeakBelow(threading.Thread):
    """The most memory that all processes below this one held together inside a `with`; what they share counts once."""

    def __enter__(self) -> PeakBelow:
        self.bytes = 0
        self._ended = threading.Event()
        self.start()
        return self

    def run(self) -> None:
        """Sample until told to end."""
        while not self._ended.wait(0.2):
            self.bytes = max(self.bytes, sum(map(_share_of, _below(os.getpid()))))

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()


def _below(pid: int) -> list[int]:
    found: list[int] = []
    for children in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):
            for child in map(int, children.read_text().split()):
                found += [child, *_below(child)]
    return found


def _share_of(pid: int) -> int:
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return 1024 * int(line.split()[1])
    return 0


def swept(workspace: Workspace, at_once: int, launcher: str) -> dict[str, float]:
    """Seconds: whole, before the first trial, of a trial, from its end to the next one's start, after the last.

    The third and the fourth are means. `peak`: bytes of all processes that it started, at their most.
    """
    events: list[tuple[str, str, float]] = []
    settings = workspace.study.sweep.model_copy(update={"launcher": launcher})
    workspace.study = workspace.study.model_copy(update={"sweep": settings})

    class Timed(stages.SweepWatch):
        """Notes when it was told what."""

        def tell(self, event: str, facts: dict[str, Any]) -> None:
            events.append((event, facts["trial"], time.perf_counter()))
            super().tell(event, facts)

    started = time.perf_counter()
    with mock.patch.object(stages, "SweepWatch", Timed), PeakBelow() as memory:
        errors = workspace.sweep()
    if errors:
        raise UserError(f"trials failed: {errors}")
    ended = time.perf_counter()
    begun, done = ({trial: at for kind, trial, at in events if kind == name} for name in ("started", "finished"))
    waits = [b - a for a, b in zip(sorted(done.values()), sorted(begun.values())[at_once:], strict=False)]
    return {
        "whole": ended - started,
        "before": min(begun.values()) - started,
        "trial": statistics.mean(done[trial] - begun[trial] for trial in begun),
        "between": statistics.mean(waits or [0.0]),
        "after": ended - max(done.values()),
        "peak": memory.bytes,
    }


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
        "teacher.fine_tune.method=none",
        *(f"analysis.{kind}=[]" for kind in ("primary", "secondary")),
    ]
    if options.at_once * options.threads > len(os.sched_getaffinity(0)):
        raise UserError("--at-once trials of --threads each need more cores than there are")
    seconds: dict[str, list[dict[str, float]]] = {"bare": [], "local": [], "ray": []}
    with tempfile.TemporaryDirectory() as folder:
        workspace = open_study(options, Path(folder))
        workspace.capture()
        workspace.verify()
        workspace.archive()
        ways = {
            "ray": lambda: swept(workspace, options.at_once, "ray"),
            "local": lambda: swept(workspace, options.at_once, "local"),
            "bare": lambda: bare(workspace, options.at_once, options.threads),
        }
        for number in range(options.rounds):
            for name in sorted(ways, reverse=number % 2 == 0):
                seconds[name].append(ways[name]())
                forget(workspace)
        for path in Path(folder).rglob("*"):
            path.chmod(0o700)  # the archive is read-only
    rows = [value("seconds of a trial bare", statistics.median(r["trial"] for r in seconds["bare"]))]
    for way, named in (("ray", "on Ray"), ("local", "without Ray")):
        rounds, wholes = seconds[way], ([round_["whole"] for round_ in seconds[name]] for name in (way, "bare"))
        more = [a["trial"] - b["trial"] for a, b in zip(rounds, seconds["bare"], strict=True)]
        rows += [
            ratio(f"time of a sweep {named} / the same trials bare", *wholes, "≤ 1.15"),
            value(f"… {named}, seconds before the first trial", statistics.median(r["before"] for r in rounds)),
            value("… from a trial's end to the next one's start", statistics.median(r["between"] for r in rounds)),
            value("… of a trial beyond its time bare", statistics.median(more)),
            value("… after the last trial", statistics.median(r["after"] for r in rounds)),
            value("… memory of all its processes, GB", statistics.median(r["peak"] for r in rounds) / 1e9),
        ]
    finish("launchers", rows, options, seconds=seconds, trials=len(options.groups) * options.seeds)


if __name__ == "__main__":
    main()
