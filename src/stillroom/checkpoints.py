"""What a trial has done so far, on disk after each epoch, so that it goes on from there."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from stillroom.collation import Batch
from stillroom.config import Retention, Training, UserError
from stillroom.distillation_student import DistillationStudent, load_projector, save_student
from stillroom.models import DTYPES
from stillroom.provenance import atomic_path, remove_tree

STATE = "trainer_state.pt"


@dataclass
class TrainingState:
    """What a trial has done so far."""

    epoch: int = 0
    skipped: int = 0
    consecutive: int = 0
    epochs: list[dict[str, Any]] = field(default_factory=list)
    gradients: list[dict[str, Any]] = field(default_factory=list)

    def count_step(self, finite: bool, micro: Sequence[Batch], limit: int) -> None:
        """Count skipped steps; stop the trial, naming the examples, when too many follow each other."""
        self.consecutive = 0 if finite else self.consecutive + 1
        self.skipped += not finite
        if self.consecutive > limit:
            ids = [example for batch in micro for example in batch.examples]
            raise UserError(f"{self.consecutive} steps in a row had non-finite gradients; the last on examples {ids}")


def checkpoints(folder: Path) -> list[Path]:
    """Whole checkpoints of a trial, oldest first."""
    found = [p for p in folder.glob("checkpoint_*") if p.is_dir() and p.name.split("_")[1].isdigit()]
    return sorted(found, key=lambda p: int(p.name.split("_")[1]))


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint that a trial can go on from."""
    whole = [p for p in checkpoints(folder) if (p / STATE).is_file()]
    return whole[-1] if whole else None


def save_checkpoint(
    student: DistillationStudent,
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    state: TrainingState,
    folder: Path,
    training: Training,
    final: bool,
) -> None:
    """Write `checkpoint_<epoch>`, in one step.

    The weights lie there in the training precision; `trainer_state.pt` holds them in float32 until the trial is
    finished, with the optimizer while there is an epoch to come.
    """
    target = folder / f"checkpoint_{state.epoch}"
    with atomic_path(target) as building:
        building.mkdir()
        save_student(student, tokenizer, building, DTYPES[training.precision])
        whole = {"student": student.state_dict(), "state": {**vars(state)}}
        if not final:
            whole |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
        with (building / STATE).open("wb") as handle:  # a full disk is an OSError only through a handle of ours
            torch.save(whole, handle)


def drop_superseded(folder: Path, keep: Retention, epochs: Sequence[dict[str, Any]], finished: bool) -> None:
    """Drop the checkpoints that `keep` does not ask for, and every `trainer_state.pt` that nothing goes on from.

    A trial goes on from its newest checkpoint until it is finished: until its result is on disk.
    """
    *older, newest = checkpoints(folder)
    best = folder / f"checkpoint_{best_epoch(epochs)}"
    for old in older:
        if keep == "all" or (keep == "best" and old == best):
            (old / STATE).unlink(missing_ok=True)
        else:
            remove_tree(old)
    if finished:
        (newest / STATE).unlink(missing_ok=True)
        if keep == "best" and newest != best:
            remove_tree(newest)


def best_epoch(epochs: Sequence[dict[str, Any]]) -> int:
    """The epoch of highest `validation_accuracy`; the earliest of several."""
    return int(max(epochs, key=lambda metrics: (metrics["validation_accuracy"], -metrics["epoch"]))["epoch"])


def restore_checkpoint(
    checkpoint: Path,
    student: DistillationStudent,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> TrainingState:
    """Load weights, optimizer and scaler in place; returns what the trial had done."""
    load_projector(checkpoint)
    try:
        saved = torch.load(checkpoint / STATE, map_location=student.model.device, weights_only=True)
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{checkpoint / STATE} is damaged: {str(error).splitlines()[0]}; delete {checkpoint} to train from the "
            "checkpoint before it, or from the start"
        ) from error
    student.load_state_dict(saved["student"])
    if "optimizer" in saved:
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
    return TrainingState(**saved["state"])
