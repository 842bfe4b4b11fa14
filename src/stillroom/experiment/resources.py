"""What a job gets of a machine's GPUs and cores, and how many run at once."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from stillroom.config import (
    Sweep,
)
from stillroom.errors import UserError


def trial_resources(settings: Sweep, nodes: Sequence[dict[str, float]]) -> tuple[dict[str, float], int]:
    """Resources of a trial, and how many run at once: as many as the GPUs found allow, else the cores.

    `nodes` are the resources of each node; a trial runs within one.
    """
    cpus = max(settings.cpus_per_trial, settings.processes)
    resources, fit = _fitting(settings.gpus_per_trial, cpus, nodes, "sweep.gpus_per_trial")
    return resources, min(fit, settings.max_concurrent or fit)


def process_resources(settings: Sweep, nodes: Sequence[dict[str, float]]) -> tuple[dict[str, float], int]:
    """Resources of each process of a trial that several train, on any nodes, and how many trials run at once."""
    count = settings.processes
    cores = sum(int(node.get("CPU", 0)) for node in nodes)
    cpus = max(1, min(settings.cpus_per_trial, cores) // count)
    resources, fit = _fitting(1.0, cpus, nodes, "sweep.gpus_per_trial")
    if fit < count:
        raise UserError(f"sweep.gpus_per_trial: {count} asked for; the cluster has room for {fit} processes")
    return resources, min(fit // count, settings.max_concurrent or fit)


def worker_resources(workers: int, nodes: Sequence[dict[str, float]]) -> dict[str, float]:
    """Resources of one of so many capturing workers: its part of the GPUs, one at least, and of the cores."""
    gpus, cores = (sum(node.get(name, 0.0) for node in nodes) / workers for name in ("GPU", "CPU"))
    within = max(node.get("GPU", 0.0) for node in nodes)
    return _fitting(min(max(1, int(gpus)), within), max(1, int(cores)), nodes, "--workers")[0]


def cores(system: Path = Path("/sys/fs/cgroup")) -> int:
    """Cores that this process may use: those it is bound to, and no more than its container's share of time."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for quota in ("cpu.max", "cpu/cpu.cfs_quota_us"):  # of cgroups' second version, and of their first
        with suppress(OSError, ValueError):
            text = (system / quota).read_text("ascii").split()
            period = text[1] if len(text) > 1 else (system / "cpu/cpu.cfs_period_us").read_text("ascii")
            if int(text[0]) > 0:  # else, or where it says "max", there is no limit
                return max(1, min(bound, int(text[0]) // int(period)))
    return bound


def slots(devices: Sequence[str], gpus: float) -> list[list[str]]:
    """The devices of each trial that runs at a time, `gpus` each; trials that share a device are last in the list."""
    if gpus < 1:
        return [[device] for _ in range(int(1 / gpus + 1e-9)) for device in devices]
    size = int(gpus)
    return [list(devices[first : first + size]) for first in range(0, len(devices) - size + 1, size)]


def _fitting(
    gpus: float, cpus: float, nodes: Sequence[dict[str, float]], asked_by: str
) -> tuple[dict[str, float], int]:
    """What a job gets where there are GPUs, or else cores, and how many such jobs fit; fewer cores stop none."""
    with_gpus = [node for node in nodes if node.get("GPU", 0) > 0 and node.get("CPU", 0) >= 1] if gpus else []
    usable = [node for node in with_gpus or nodes if node.get("GPU", 0) >= gpus or not with_gpus]
    if not usable:
        found = max(node["GPU"] for node in with_gpus)
        raise UserError(f"{asked_by}: {gpus:g} asked for, {found:g} found on a node")
    if with_gpus:
        part = min(node.get("CPU", 1.0) * gpus / node["GPU"] for node in usable)
        fit = sum(len(slots([""] * int(node["GPU"]), gpus)) for node in usable)
        return {"CPU": max(1.0, float(int(min(cpus, part)))), "GPU": gpus}, fit
    cores = max((node.get("CPU", 0.0) for node in usable), default=0.0)
    if not cores:
        raise UserError("no node of the Ray cluster has a CPU to give")
    cpus = min(float(cpus), cores)
    return {"CPU": cpus}, sum(int(node.get("CPU", 0.0) / cpus) for node in usable)
