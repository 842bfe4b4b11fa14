"""The teacher, fine-tuned on the training split with the task loss alone, before its signals are captured."""

from __future__ import annotations

from pathlib import Path

from stillroom.config import GROUPS, Evaluation, FineTuning, Lora, ModelRef, Objective
from stillroom.data.corpus import Examples
from stillroom.files import read_json, write_json
from stillroom.folders import TrialFolder
from stillroom.models.adapters import lora_adapter
from stillroom.progress import Progress, silent
from stillroom.training.checkpoints import checkpoints, require_whole
from stillroom.training.train_student import Trial, train

FINE_TUNED = "adapted.json"
"""Which model in a results folder is the fine-tuned teacher; the name is that of finished studies' files."""


def fine_tune_teacher(
    teacher: ModelRef,
    settings: FineTuning,
    evaluation: Evaluation,
    examples: Examples,
    folder: Path,
    origin: str,
    progress: Progress = silent,
) -> ModelRef:
    """Train the teacher by the project's own trainer and return it as a local model under `folder`."""
    lora = Lora(rank=settings.lora_rank, alpha=settings.lora_alpha)
    trial = Trial(origin, GROUPS["task_only"], settings.seed)
    kept = checkpoints(folder / trial.name)
    finished = TrialFolder(folder / trial.name).result.is_file() and bool(kept)
    result = (
        read_json(TrialFolder(folder / trial.name).result, "epochs")
        if finished
        else train(
            trial,
            teacher,
            settings.training,
            Objective(),
            evaluation,
            examples,
            None,
            folder / trial.name,
            adapter=lora_adapter(lora) if settings.method == "lora" else None,
            progress=progress,
        )
    )
    final = checkpoints(folder / trial.name)[-1].relative_to(folder)  # a results folder may be moved
    write_json(folder / FINE_TUNED, {"origin": origin, "model": str(final), "epochs": result["epochs"]})
    return ModelRef(model=str(folder / final), trust_remote_code=teacher.trust_remote_code)


def fine_tuned_teacher(folder: Path, origin: str) -> Path | None:
    """The teacher that was made from `origin`, if it is there; `UserError` if its files are damaged."""
    if not (folder / FINE_TUNED).is_file():
        return None
    found = read_json(folder / FINE_TUNED, "origin", "model")
    model = folder / str(found["model"])
    if found["origin"] != origin or not model.is_dir():
        return None
    require_whole(model)
    return model
