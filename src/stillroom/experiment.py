"""Groups × seeds on Ray Tune. The only module that imports ray; `train_student.train` runs as well without it."""

from __future__ import annotations

import gc
import json
import logging
import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from stillroom.config import EXPERIMENT, Evaluation, ModelRef, Objective, Sweep, Training, UserError
from stillroom.corpus import load_corpus
from stillroom.provenance import exclusive, read_json, write_json
from stillroom.train_student import RESULT, Trial, train

ERROR = "error.json"


@dataclass(frozen=True)
class TrialPlan:
    """All that one trial needs, by path, so that it can run in any process that sees the same files."""

    trial: Trial
    student: ModelRef
    training: Training
    objective: Objective
    evaluation: Evaluation
    corpus: Path
    store: Path
    experiment: Path
    minimum_coverage: float
    keep_checkpoints: str

    @property
    def folder(self) -> Path:
        """Where the trial writes."""
        return self.experiment / self.trial.name


def run_trial(
    plan: TrialPlan,
    report: Callable[[dict[str, Any]], None] = lambda metrics: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, Any]:
    """Train one trial to its end; on failure leave `error.json` in its folder and raise."""
    examples, _ = load_corpus(plan.corpus)
    try:
        result = train(
            plan.trial,
            plan.student,
            plan.training,
            plan.objective,
            plan.evaluation,
            examples,
            plan.store,
            plan.folder,
            minimum_coverage=plan.minimum_coverage,
            keep_checkpoints=plan.keep_checkpoints,
            report=report,
            progress=progress,
        )
    except Exception as error:
        write_json(
            plan.folder / ERROR,
            {"error": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()},
        )
        raise
    (plan.folder / ERROR).unlink(missing_ok=True)
    return result


def finished(plan: TrialPlan) -> bool:
    """Whether the trial has its result. Its folder's name holds a fingerprint of all it was made from."""
    return (plan.folder / RESULT).is_file()


def sweep(
    plans: Sequence[TrialPlan], settings: Sweep, storage: Path, watch: Callable[[str, dict[str, Any]], None]
) -> dict[str, str]:
    """Run the trials that are not finished; return the error of each one that failed on every try, by name.

    `watch` is called with an event (started, epoch, finished, failed) and its facts. The other trials go on when
    one fails. Raises `UserError` if another sweep is writing here.
    """
    missing = {plan.trial.name: plan for plan in plans if not finished(plan)}
    if not missing:
        return {}
    with exclusive(plans[0].experiment, "sweep"):
        _start_ray()
        _tune(missing, settings, storage, watch)
    return {name: _error_of(plan) for name, plan in missing.items() if not finished(plan)}


def _start_ray() -> None:
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("TUNE_DISABLE_STRICT_METRIC_CHECKING", "1")
    os.environ.setdefault("TUNE_DISABLE_SIGINT_HANDLER", "1")  # Ctrl-C leaves at once; finished epochs are on disk
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # our own progress stands in for Ray's tables
    import ray

    if not ray.is_initialized():
        ray.init(
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {"TOKENIZERS_PARALLELISM": "false"}},
        )


def _tune(
    missing: dict[str, TrialPlan],
    settings: Sweep,
    storage: Path,
    watch: Callable[[str, dict[str, Any]], None],
) -> None:
    import ray
    from ray import tune

    resources, concurrent = trial_resources(settings, ray.cluster_resources())
    trainable = tune.with_resources(
        tune.with_parameters(_trainable, plans=missing, threads=resources["CPU"]), resources
    )
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    tuner = tune.Tuner(
        trainable,
        param_space={"trial": tune.grid_search(list(missing))},
        tune_config=tune.TuneConfig(
            max_concurrent_trials=concurrent,
            reuse_actors=True,
            trial_dirname_creator=lambda trial: trial.config["trial"],
            trial_name_creator=lambda trial: trial.config["trial"],
        ),
        run_config=tune.RunConfig(
            name=EXPERIMENT,
            storage_path=str(storage.resolve()),
            failure_config=tune.FailureConfig(max_failures=settings.retries),
            callbacks=[_watcher(watch)],
            verbose=0,
        ),
    )
    tuner.fit()


def _trainable(config: dict[str, Any], plans: dict[str, TrialPlan], threads: int) -> None:
    """What Ray calls in a worker: one trial, each epoch's metrics reported."""
    from ray import tune

    gc.collect()  # the worker is used again: the last trial's models must not wait for a full collection
    torch.set_num_threads(max(1, int(threads)))
    run_trial(plans[config["trial"]], lambda metrics: tune.report(_numbers(metrics)))


def _numbers(metrics: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in metrics.items() if isinstance(value, int | float)}


def trial_resources(settings: Sweep, cluster: dict[str, float]) -> tuple[dict[str, float], int]:
    """Resources of a trial, and how many run at once: as many as the GPUs found allow, else the cores."""
    cores, gpus = cluster.get("CPU", 1.0), cluster.get("GPU", 0.0)
    cpus = min(float(settings.cpus_per_trial), cores)
    if gpus and settings.gpus_per_trial:
        if settings.gpus_per_trial > gpus:
            raise UserError(f"sweep.gpus_per_trial: {settings.gpus_per_trial} asked for, {gpus:g} found")
        cpus = min(cpus, cores * settings.gpus_per_trial / gpus) if cores >= 1 else 1.0
        resources = {"CPU": max(1.0, float(int(cpus))), "GPU": settings.gpus_per_trial}
        fit = int(gpus / settings.gpus_per_trial)
    else:
        resources, fit = {"CPU": cpus}, max(1, int(cores / cpus))
    return resources, min(fit, settings.max_concurrent or fit)


def _watcher(watch: Callable[[str, dict[str, Any]], None]) -> Any:
    from ray import tune

    class Watcher(tune.Callback):  # type: ignore[misc]
        """Passes Ray's events on."""

        def on_trial_start(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            watch("started", {"trial": trial.config["trial"]})

        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any) -> None:
            watch("epoch", {"trial": trial.config["trial"], **result})

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            watch("finished", {"trial": trial.config["trial"]})

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            watch("failed", {"trial": trial.config["trial"]})

    return Watcher()


def _error_of(plan: TrialPlan) -> str:
    try:
        return str(read_json(plan.folder / ERROR)["error"])
    except (UserError, KeyError, json.JSONDecodeError):
        return "no result and no error message: the process was stopped"
