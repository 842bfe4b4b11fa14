"""The teacher, fine-tuned on the training split with the task loss alone, before its signals are captured."""

from __future__ import annotations

from pathlib import Path

from stillroom.config import GROUPS, RESULT, Adaptation, Evaluation, Lora, ModelRef, Objective
from stillroom.data.corpus import Examples
from stillroom.files import read_json, write_json
from stillroom.models.adapters import lora_adapter
from stillroom.progress import Progress, silent
from stillroom.training.checkpoints import checkpoints, require_whole
from stillroom.training.train_student import Trial, train

ADAPTED = "adapted.json"


def adapt_teacher(
    teacher: ModelRef,
    adaptation: Adaptation,
    evaluation: Evaluation,
    examples: Examples,
    folder: Path,
    origin: str,
    progress: Progress = silent,
) -> ModelRef:
    """Train the teacher by the project's own trainer and return it as a local model under `folder`."""
    lora = Lora(rank=adaptation.lora_rank, alpha=adaptation.lora_alpha)
    trial = Trial(origin, GROUPS["task_only"], adaptation.seed)
    kept = checkpoints(folder / trial.name)
    finished = (folder / trial.name / RESULT).is_file() and bool(kept)
    result = (
        read_json(folder / trial.name / RESULT, "epochs")
        if finished
        else train(
            trial,
            teacher,
            adaptation.training,
            Objective(),
            evaluation,
            examples,
            None,
            folder / trial.name,
            adapter=lora_adapter(lora) if adaptation.method == "lora" else None,
            progress=progress,
        )
    )
    final = checkpoints(folder / trial.name)[-1].relative_to(folder)  # a results folder may be moved
    write_json(folder / ADAPTED, {"origin": origin, "model": str(final), "epochs": result["epochs"]})
    return ModelRef(model=str(folder / final), trust_remote_code=teacher.trust_remote_code)


def adapted_teacher(folder: Path, origin: str) -> Path | None:
    """The teacher that was made from `origin`, if it is there; `UserError` if its files are damaged."""
    if not (folder / ADAPTED).is_file():
        return None
    adapted = read_json(folder / ADAPTED, "origin", "model")
    model = folder / str(adapted["model"])
    if adapted["origin"] != origin or not model.is_dir():
        return None
    require_whole(model)
    return model
