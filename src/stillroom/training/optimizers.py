"""What updates a student's weights: AdamW, with moments in 32 bits or, by bitsandbytes, in 8."""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from stillroom.config import Study, Training
from stillroom.errors import UserError
from stillroom.models.precision import default_device


def optimizer_of(parameters: Iterable[Tensor], training: Training) -> torch.optim.Optimizer:
    """The study's optimizer over those of the parameters that are trained.

    `UserError` where its library is not installed, or cannot run on the device that they are on.
    """
    trained = [p for p in parameters if p.requires_grad]
    options: dict[str, Any] = {"lr": training.learning_rate, "weight_decay": training.weight_decay}
    if training.optimizer == "adamw":
        return torch.optim.AdamW(trained, fused=True, **options)
    require_optimizer(training, trained[0].device)
    optimizer: torch.optim.Optimizer = _kind(training)(trained, **options)
    return optimizer


def require_optimizers(study: Study) -> None:
    """`UserError` naming the field where this machine cannot use an optimizer that it is to use."""
    sweep = study.sweep
    here = default_device() if sweep.gpus_per_trial else torch.device("cpu")
    require_optimizer(study.training, here if sweep.launched_by() == "local" else None)
    if study.teacher.fine_tune.method != "none":
        field = "teacher.fine_tune.training.optimizer"
        require_optimizer(study.teacher.fine_tune.training, default_device(), field)


def require_optimizer(training: Training, device: torch.device | None, field: str = "training.optimizer") -> None:
    """`UserError` naming `field` where the optimizer cannot be used: one step of it is tried on the device.

    Without a device, such as that of another machine, it is enough that the library is installed.
    """
    chosen = training.optimizer
    if chosen == "adamw":
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(f"{field}={chosen}: bitsandbytes is not installed: pip install bitsandbytes, or choose adamw")
    if device is None:
        return
    if chosen == "paged_adamw_8bit" and device.type != "cuda":
        raise UserError(f"{field}={chosen}: there is no GPU whose memory could be paged; choose adamw_8bit or adamw")
    weight = torch.nn.Parameter(torch.ones(_SMALLEST, device=device))
    weight.grad = torch.ones_like(weight)
    try:
        _kind(training)([weight]).step()
    except Exception as error:  # of the library, which knows its kernels only when it calls them
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(f"{field}={chosen}: bitsandbytes cannot run it on {device.type}: {reason}") from error


_SMALLEST = 4096
"""Numbers in the smallest tensor whose moments are in 8 bits: the library's own threshold."""


def _kind(training: Training) -> Any:
    with warnings.catch_warnings(action="ignore"):
        import bitsandbytes.optim
    return {
        "adamw_8bit": bitsandbytes.optim.AdamW8bit,
        "paged_adamw_8bit": bitsandbytes.optim.PagedAdamW8bit,
    }[training.optimizer]
