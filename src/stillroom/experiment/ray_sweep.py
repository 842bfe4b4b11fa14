"""Groups × seeds on Ray Tune, and capture shared among Ray's workers. `ray_processes` watches over Ray itself.

Ray finds a place for each job and starts it again elsewhere; what a job has done is on disk, in folders that every
node sees, so `jobs.run_trial` and `jobs.run_capture` run as well without Ray.
"""

from __future__ import annotations

import itertools
import logging
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stillroom.config import Sweep
from stillroom.errors import UserError
from stillroom.experiment.jobs import CapturePlan, TrialPlan, run_capture, run_trial
from stillroom.experiment.launching import (
    ORPHAN_SECONDS,
    Watch,
    errors_of,
    forget_errors,
    may_be_tried,
    unfinished,
)
from stillroom.experiment.ray_processes import end_with_parent, guarded
from stillroom.experiment.ray_sharded import numbers_of, train_on_workers
from stillroom.experiment.resources import process_resources, trial_resources, worker_resources
from stillroom.files import exclusive, write_text
from stillroom.folders import EXPERIMENT
from stillroom.offline_teacher_data.shards import Slice
from stillroom.offline_teacher_data.store import MANIFEST, SHARDS
from stillroom.progress import Progress, silent
from stillroom.provenance import package_digest

_PROBE_SECONDS = 300.0
"""How long a node may take to start a worker and import this package."""

_WORKER_ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}


def sweep(plans: Sequence[TrialPlan], settings: Sweep, storage: str, watch: Watch) -> dict[str, str]:
    """Run the trials that are not finished; return the error of each one that failed on every try, by name.

    `storage` is where Ray keeps its own files: a folder or a URI. `watch` is called with an event (started, epoch,
    finished, failed, lost) and its facts. The other trials continue when one fails. A trial lost with its node
    resumes from its checkpoint on another node, and that does not count as a try. Raises `UserError` if another
    sweep is writing here, or if a node does not see what a trial needs.
    """
    missing = unfinished(plans)
    if not missing:
        return {}
    with exclusive(plans[0].experiment, "sweep"), _ray(settings.address):
        forget_errors(missing)
        pending = missing
        while pending:
            gone = {node["NodeID"] for node in _nodes(alive=False)}
            _tune(pending, settings, storage, watch)
            lost = {node["NodeID"] for node in _nodes(alive=False)} - gone
            again = {name: plan for name, plan in pending.items() if may_be_tried(plan, settings.retries)}
            pending = again if lost else {}
            for name in pending:
                watch("lost", {"trial": name})
    return errors_of(missing)


def describe_cluster(settings: Sweep) -> dict[str, float]:
    """Start or join Ray as a sweep does: `nodes`, `CPU`, `GPU`, and `trials at once`. `UserError` if it cannot."""
    with _ray(settings.address):
        cluster = _nodes()
        nodes = [node["Resources"] for node in cluster]
        totals = {name: sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}
        return {"nodes": len(nodes), **totals, "trials at once": _room(settings, cluster)[1]}


def capture_on_workers(plan: CapturePlan, workers: int, address: str | None, examples: int, progress: Progress) -> None:
    """Capture a store of so many examples with so many Ray workers, one slice each.

    `progress` counts the examples of whole shards. Raises a worker's `UserError`, or one that names a node which
    does not see what the work needs.
    """
    workers = min(workers, -(-examples // plan.signals.shard_examples))
    with _ray(address):
        import ray

        cluster = _nodes()
        resources = worker_resources(workers, [node["Resources"] for node in cluster])
        models = [Path(ref.model) for ref in (plan.teacher, plan.tokenizer) if Path(ref.model).is_dir()]
        _require_sight(cluster, resources, [plan.corpus, *models], [plan.store])
        work = ray.remote(num_cpus=resources["CPU"], num_gpus=resources.get("GPU", 0))(_capture_slice)
        pending = [work.remote(plan, Slice(n + 1, workers), resources["CPU"]) for n in range(workers)]
        try:
            while pending:
                done, pending = ray.wait(pending, timeout=2)
                for reference in done:
                    _await(reference)
                whole = len(list(plan.store.glob(SHARDS)))
                progress(min(examples, whole * plan.signals.shard_examples), examples)
        finally:
            for reference in pending:
                ray.cancel(reference, force=True)


def _capture_slice(plan: CapturePlan, slice_: Slice, threads: float) -> None:
    end_with_parent()
    torch.set_num_threads(max(1, int(threads)))
    run_capture(plan, slice_)


def _await(reference: Any) -> None:
    import ray

    try:
        ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise UserError(f"a worker was lost: {error}; run the same command to resume") from error


@contextmanager
def _ray(address: str | None) -> Iterator[None]:
    """Ray, for the length of a sweep or capture: the cluster at `address` or RAY_ADDRESS, else one of our own.

    Our own is kept for the next sweep of this process.
    """
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C leaves at once; finished epochs are on disk
    os.environ.setdefault("RAY_prestart_worker_first_driver", "0")  # an idle process a core, which no trial can use
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # our own progress replaces Ray's tables
    for name, value in _WORKER_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    address = address or os.environ.get("RAY_ADDRESS") or "local"
    os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = str(int(address != "local"))  # 0: listen on 127.0.0.1 alone
    import ray
    from ray._private import ray_constants, worker

    if address == "local" and ray.is_initialized():
        with guarded():
            yield
        return
    _require_listener(address)
    ray.shutdown()
    options: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    ray_constants.ENABLE_RAY_CLUSTER = address != "local"  # where Ray was imported before
    worker.listen_error_messages = silent  # would print its servers' errors amid our output; ours come as exceptions
    environment = {"env_vars": _WORKER_ENVIRONMENT}
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, runtime_env=environment, **options)
    except Exception as error:  # Ray raises a plain one when its processes do not start in time
        raise UserError(_unreachable(address, error)) from error
    if address == "local":
        with guarded():
            yield
        return
    try:
        yield
    finally:
        ray.shutdown()


def _require_listener(address: str) -> None:
    """Raise `UserError` unless something listens at the address: Ray itself would wait for a quarter of an hour."""
    if address.startswith("ray://"):
        raise UserError(
            f"sweep.address: {address} is a Ray client's address; run stillroom on a node of the cluster instead, "
            "as a Ray job for instance, with address=auto"
        )
    if address not in ("local", "auto"):
        host, _, port = address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=30).close()
        except (OSError, ValueError) as error:
            raise UserError(_unreachable(address, error)) from None


def _unreachable(address: str, error: Exception) -> str:
    if address == "local":
        return f"Ray does not start on this machine: {error}; finished work is on disk, so run the command again"
    return (
        f"sweep.address: no Ray cluster can be joined at {address} (sweep.address or RAY_ADDRESS): {error}; "
        "start one with `ray start`, or leave both out to use this machine alone"
    )


def _nodes(alive: bool = True) -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"] == alive]


def _require_sight(
    cluster: Sequence[dict[str, Any]], resources: dict[str, float], paths: list[Path], folders: list[Path]
) -> None:
    """Raise `UserError` naming the node unless each that has the resources sees package, paths and folders as here."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    def look(digest: str, paths: list[Path], probes: list[Path]) -> list[str]:  # within: sent whole, not by its name
        try:
            from stillroom.experiment.jobs import unseen
        except Exception as error:
            return [f"it cannot import stillroom ({type(error).__name__}: {error}); install the version used here"]
        return unseen(digest, paths, probes)

    able = [node for node in cluster if all(node["Resources"].get(n, 0) >= some for n, some in resources.items())]
    probes = [[folder / f".{node['NodeID']}.probe" for folder in folders] for node in able]
    faults = []
    try:
        asked = []
        for node, node_probes in zip(able, probes, strict=True):
            for probe in node_probes:
                write_text(probe, "")
            where = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            task = ray.remote(num_cpus=0, max_retries=0, scheduling_strategy=where)(look)
            asked.append(task.remote(package_digest(), paths, node_probes))
        for node, reference in zip(able, asked, strict=True):
            try:
                found = ray.get(reference, timeout=_PROBE_SECONDS)
            except ray.exceptions.RayError as error:
                found = [f"it does not answer: {error}"]
            if found:
                faults.append(
                    f"  node {node['NodeManagerHostname']} ({node['NodeManagerAddress']}): {'; '.join(found)}"
                )
    finally:
        for probe in itertools.chain(*probes):
            probe.unlink(missing_ok=True)
    if faults:
        raise UserError("\n".join(["every node must see the same package and files as this one:", *faults]))


def _tune(missing: dict[str, TrialPlan], settings: Sweep, storage: str, watch: Watch) -> None:
    from ray import tune

    cluster = _nodes()
    each, concurrent = _room(settings, cluster)
    plan = next(iter(missing.values()))
    student = [Path(plan.student.model)] if Path(plan.student.model).is_dir() else []
    folders = [plan.experiment, *([] if "://" in storage else [Path(storage)])]
    _require_sight(cluster, each, [plan.corpus, plan.store / MANIFEST, *student], folders)
    several = {"count": settings.processes, "each": each, "storage": storage} if settings.processes > 1 else None
    with_plans = tune.with_parameters(_trainable, plans=missing, threads=each["CPU"], several=several)
    logging.getLogger("ray.tune").setLevel(logging.CRITICAL)  # a trial's error is in its folder, and told at the end
    tuner = tune.Tuner(
        tune.with_resources(with_plans, {"memory": 2**20} if several else each),  # this one waits: it takes no core
        param_space={"trial": tune.grid_search(list(missing))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=concurrent,
            reuse_actors=False,  # a process that trained keeps much of its memory: 5 GB became 8 in its second trial
            trial_dirname_creator=lambda trial: trial.config["trial"],
            trial_name_creator=lambda trial: trial.config["trial"],
        ),
        run_config=tune.RunConfig(
            name=EXPERIMENT,
            storage_path=storage,
            failure_config=tune.FailureConfig(max_failures=settings.retries),
            callbacks=[_watcher(watch)],
            verbose=0,
        ),
    )
    with told_of_memory(concurrent):
        tuner.fit()


def _room(settings: Sweep, nodes: Sequence[dict[str, Any]]) -> tuple[dict[str, float], int]:
    """Resources of a trial, or of each process of one that several train, and how many trials run at once."""
    count = process_resources if settings.processes > 1 else trial_resources
    return count(settings, [node["Resources"] for node in nodes])


def _trainable(
    config: dict[str, Any], plans: dict[str, TrialPlan], threads: float, several: dict[str, Any] | None
) -> None:
    """What Ray calls in a worker: one trial, each epoch's metrics reported; `several`: how others train it."""
    from ray import get_gpu_ids, tune

    end_with_parent()
    os.environ.update({} if get_gpu_ids() else {"CUDA_VISIBLE_DEVICES": ""})  # with none assigned Ray hides none
    torch.set_num_threads(max(1, int(threads)))
    plan, by = plans[config["trial"]], partial(train_on_workers, **several) if several else None
    run_trial(plan, lambda metrics: tune.report(numbers_of(metrics)), wait=ORPHAN_SECONDS, by=by)


def _watcher(watch: Watch) -> Any:
    from ray import tune

    class Watcher(tune.Callback):  # type: ignore[misc]
        """Passes Ray's events on."""

        def __reduce__(self) -> tuple[type, tuple[()]]:
            """Ray saves a sweep's callbacks, but what is watched with is a terminal's: a copy watches nothing."""
            return tune.Callback, ()

        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            watch("started", {"trial": trial.config["trial"]})

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any) -> None:
            watch("epoch", {"trial": trial.config["trial"], **result})

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            watch("finished", {"trial": trial.config["trial"]})

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            watch("failed", {"trial": trial.config["trial"]})

    return Watcher()


@contextmanager
def told_of_memory(concurrent: int) -> Iterator[None]:
    """Turn Tune's giving up, when a worker is killed for memory as it starts, into a `UserError` with the remedy."""
    try:
        yield
    except RuntimeError as error:
        if "low on memory" not in str(error):
            raise
        raise UserError(
            f"this machine ran out of memory with {concurrent} trials at once: set sweep.max_concurrent lower, and the "
            "command resumes each trial from its last epoch; or training.micro_batch_size, and all trials start again"
        ) from None
