"""Groups × seeds on this machine alone: as many trials at once as its GPUs, or else its cores, allow."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from multiprocessing.connection import wait
from typing import Any

import torch

from stillroom.config import Sweep
from stillroom.errors import UserError
from stillroom.experiment.jobs import TrialPlan, failures, finished
from stillroom.experiment.launching import Watch, errors_of, forget_errors, may_be_tried, unfinished
from stillroom.experiment.local_worker import OUTPUT, Forks, Job, Spawned, TrialProcess, TrialProcesses
from stillroom.experiment.resources import cores, slots, trial_resources
from stillroom.files import exclusive, write_json


@dataclass(frozen=True)
class _Running:
    name: str
    process: TrialProcess
    slot: int
    failed_before: int
    said: list[str]


def sweep(plans: Sequence[TrialPlan], settings: Sweep, watch: Watch) -> dict[str, str]:
    """Run the trials that are not finished; return the error of each one that failed on every try, by name.

    The other trials go on when one fails, and it is tried again after them. Raises `UserError` if another sweep is
    writing here, or if the trials cannot be started.
    """
    missing = unfinished(plans)
    if not missing:
        return {}
    with exclusive(plans[0].experiment, "sweep"):
        forget_errors(missing)
        environments, threads = _places(settings)
        with closing(_processes(environments, len(missing))) as processes:
            _run_all(missing, processes, list(range(len(environments))), threads, settings, watch)
    return errors_of(missing)


def describe_machine(settings: Sweep) -> dict[str, float]:
    """What a sweep here finds: `CPU`, `GPU` and `trials at once`. `UserError` if no trial fits."""
    machine = _machine()
    return {**machine, "trials at once": trial_resources(settings, [machine])[1]}


def _machine() -> dict[str, float]:
    if os.name == "nt":
        raise UserError("sweep.launcher: local needs Linux or macOS; set ray")
    return {"CPU": float(cores()), "GPU": float(torch.cuda.device_count())}


def _places(settings: Sweep) -> tuple[list[dict[str, str]], int]:
    """The environment of each trial that runs at a time, and the threads it has."""
    machine = _machine()
    resources, at_once = trial_resources(settings, [machine])
    threads = max(1, int(resources["CPU"]) // settings.processes)
    shared = {"TOKENIZERS_PARALLELISM": "false"}
    shared |= {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(threads)}
    if not resources.get("GPU"):
        return [{**shared, "CUDA_VISIBLE_DEVICES": ""}] * at_once, threads
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = given.split(",") if given else [str(number) for number in range(int(machine["GPU"]))]
    shares = slots(names[: int(machine["GPU"])], resources["GPU"])[:at_once]
    return [{**shared, "CUDA_VISIBLE_DEVICES": ",".join(share)} for share in shares], threads


def _processes(environments: list[dict[str, str]], trials: int) -> TrialProcesses:
    environments = environments[:trials]
    if _can_fork() and not any(environment["CUDA_VISIBLE_DEVICES"] for environment in environments):
        return Forks(environments)
    return Spawned(environments, trials)


def _can_fork() -> bool:
    """Whether a process may go on in a fork: macOS's own libraries do not allow it."""
    return sys.platform == "linux"


def _run_all(
    plans: dict[str, TrialPlan],
    processes: TrialProcesses,
    free: list[int],
    threads: int,
    settings: Sweep,
    watch: Watch,
) -> None:
    waiting, running, at_once = deque(plans), dict[Any, _Running](), len(free)
    while waiting or running:
        while waiting and len(running) < at_once:
            name, slot = waiting.popleft(), free.pop(0)
            process = processes.start(Job(plans[name], threads, settings.processes), slot)
            running[process.connection] = _Running(name, process, slot, failures(plans[name]), [])
            watch("started", {"trial": name})
        for connection in wait(list(running)):
            trial = running[connection]
            said = _heard(trial)
            if isinstance(said, dict):
                watch("epoch", {"trial": trial.name, **said})
            elif isinstance(said, str):
                trial.said.append(said)
            else:
                del running[trial.process.connection]
                free.insert(0, trial.slot)
                killed = _settle(trial, plans[trial.name], watch)
                if killed and running:
                    at_once = len(running)
                if may_be_tried(plans[trial.name], settings.retries):
                    waiting.append(trial.name)


def _heard(trial: _Running) -> Any:
    """The next thing a trial's process says; None where it has ended."""
    try:
        return trial.process.connection.recv()
    except (EOFError, OSError):
        trial.process.connection.close()
        return None


def _settle(trial: _Running, plan: TrialPlan, watch: Watch) -> bool:
    """Tell that a trial's process has ended, and keep why if it failed; returns whether it was killed from outside."""
    code = trial.process.exit_code()
    if finished(plan):
        (plan.folder / OUTPUT).unlink(missing_ok=True)
        watch("finished", {"trial": trial.name})
        return False
    if failures(plan) == trial.failed_before:  # it could not say itself what stopped it
        why = trial.said[-1] if trial.said else _ended(code, plan)
        write_json(plan.files.error, {"error": why, "failures": trial.failed_before + 1, "traceback": ""})
    killed = code == -signal.SIGKILL
    if killed:
        logging.getLogger("stillroom").warning("warning: %s was killed, perhaps because memory ran out", trial.name)
    watch("failed", {"trial": trial.name})
    return killed


def _ended(code: int | None, plan: TrialPlan) -> str:
    if code == -signal.SIGKILL:
        return (
            "its process was killed by signal 9 (SIGKILL): out of memory? Set sweep.max_concurrent lower, and the "
            "command resumes each trial from its last epoch; or training.micro_batch_size, and all trials start again"
        )
    if code is not None and code < 0:
        name = signal.Signals(-code).name
        return f"its process was killed by signal {-code} ({name}); {plan.folder / OUTPUT} has what it printed"
    return f"its process was stopped, exit code {code}; {plan.folder / OUTPUT} has what it printed"
