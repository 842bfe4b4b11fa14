"""One trial by several of Ray's workers, on one node or many, each with a part of the student, by Ray Train."""

from __future__ import annotations

import os
from typing import Any

import torch

from stillroom.errors import UserError
from stillroom.experiment.jobs import TrialPlan, train_plan
from stillroom.experiment.ray_processes import end_with_parent
from stillroom.experiment.sharded_trial import BACKEND, PATIENCE
from stillroom.files import read_json
from stillroom.progress import Progress, silent
from stillroom.training.sharding import Ranks
from stillroom.training.train_student import Report


def train_on_workers(
    plan: TrialPlan,
    report: Report,
    progress: Progress = silent,
    *,
    count: int,
    each: dict[str, float],
    storage: str,
) -> dict[str, Any]:
    """Train a trial with `count` workers, from inside a trial of Ray Tune; returns its result.

    `each`: a worker's resources. Ray passes each epoch's metrics on to Ray Tune; `report` is not called. Raises a
    worker's `UserError` as one.
    """
    from ray.train import RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer
    from ray.tune.integration.ray_train import TuneReportCallback

    trainer = TorchTrainer(
        _train,
        train_loop_config={"plan": plan, "threads": each["CPU"], "gpu": "GPU" in each},
        scaling_config=ScalingConfig(num_workers=count, use_gpu="GPU" in each, resources_per_worker=each),
        torch_config=TorchConfig(backend=BACKEND if "GPU" in each else "gloo", timeout_s=int(PATIENCE.total_seconds())),
        run_config=RunConfig(name=plan.trial.name, storage_path=storage, callbacks=[TuneReportCallback()]),
    )
    try:
        trainer.fit()
    except TrainingFailedError as error:
        for failure in getattr(error, "worker_failures", {}).values():
            cause = getattr(failure, "_base_exc", failure)
            if isinstance(cause, UserError):
                raise cause from None
        raise
    result: dict[str, Any] = read_json(plan.files.result)
    return result


def _train(config: dict[str, Any]) -> None:
    from ray import train

    end_with_parent()
    context = train.get_context()
    if config["gpu"]:
        torch.cuda.set_device(train.torch.get_device())
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    torch.set_num_threads(max(1, int(config["threads"])))
    ranks = Ranks(context.get_world_rank(), context.get_world_size())
    train_plan(config["plan"], lambda metrics: train.report(numbers_of(metrics)), ranks=ranks)


def numbers_of(metrics: dict[str, Any]) -> dict[str, Any]:
    """The metrics of an epoch that Ray can show."""
    return {key: value for key, value in metrics.items() if isinstance(value, int | float)}
