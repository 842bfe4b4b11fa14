"""What a study will cost, before any weight is loaded: examples, tokens, bytes, steps, and hours by assumption.

Where tokenizers and data sets are available, everything is counted; what replaces one is listed as an assumption.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from stillroom.config import ModelRef, Study
from stillroom.data.tasks import get_task
from stillroom.errors import UserError
from stillroom.evaluation.harness_tasks import require_harness
from stillroom.models.precision import resolve_precision
from stillroom.models.sizes import Shape, shape_of
from stillroom.preflight.costs import (
    capture_memory,
    disk_bytes,
    head_bytes,
    head_memory,
    host_memory,
    layout_of,
    store_bytes,
    trial_memory,
)
from stillroom.preflight.design import examine_design
from stillroom.preflight.hours import GPU, hours_of, how_hours_are_made, this_cpu
from stillroom.preflight.lengths import Drawn, Lengths, assume, count, counted, draw
from stillroom.terms import compared


def plan_study(study: Study, guess_this_cpu: bool = True, drawn: Drawn | None = None) -> dict[str, Any]:
    """The plan as nested figures.

    `models`, `corpus`, `design` (see `examine_design`), `groups` (see `terms.compared`), `store_bytes`, `store_layers`
    (the teacher's, by signal), `training`, `disk_bytes`, `memory_bytes`, `hours` of a GPU, `cpu_hours` where there is
    none here, `measured` (None: see `measuring.measure_study`), `assumptions`, and in `warnings` those assumptions that
    stand for what cannot be reached from here. `UserError` names a field whose model or data set is not there or cannot
    be read. Not `guess_this_cpu`: no `cpu_hours`. Its corpus is drawn if it is not `drawn` already.
    """
    study = resolve_precision(study)
    unreached: list[str] = []
    teacher, student = (_shape(role, ref, unreached) for role, ref in _models(study).items())
    tokenizers = _tokenizers(study, unreached) if drawn is None else drawn.tokenizers
    rows = _require_data(study, unreached)
    require_harness(study.evaluation.harness_splits)
    assumptions = list(unreached)
    if tokenizers and not unreached and drawn is None:
        drawn = draw(study, tokenizers)
    if drawn:
        lengths = count(study, drawn)
        study = counted(
            study, rows | {f"corpus.tasks.{name}": len(task_lengths.teacher) for name, task_lengths in lengths.items()}
        )
    else:
        lengths = assume(study, rows, assumptions)
        study = counted(study, rows)
    examples = sum(len(task_lengths.teacher) for task_lengths in lengths.values())
    tokens = {name: int(task_lengths.teacher.sum()) for name, task_lengths in lengths.items()}
    student_tokens = {name: int(task_lengths.student.sum()) for name, task_lengths in lengths.items()}
    layout, groups, processes = layout_of(study, teacher), compared(study), study.sweep.processes
    store = {**store_bytes(lengths, layout), **head_bytes(study, teacher)}
    training = _training(study, lengths)
    machines = [GPU] if torch.cuda.is_available() or not guess_this_cpu else [GPU, this_cpu()]
    hours = [hours_of(study, (teacher, student), training, lengths, machine) for machine in machines]
    design = examine_design(study)
    assumptions += [_how_differences_are_made(design), *how_hours_are_made(study, machines)]
    disk = disk_bytes(study, student, training["trials"])
    return {
        "study": study.name,
        "models": {
            role: {"model": ref.model, **shape.__dict__}
            for (role, ref), shape in zip(_models(study).items(), (teacher, student), strict=True)
        },
        "corpus": {
            "examples": examples,
            "by_task": {
                name: {
                    "examples": len(lengths[name].teacher),
                    "teacher_tokens": tokens[name],
                    "student_tokens": student_tokens[name],
                }
                for name in lengths
            },
            "teacher_tokens": sum(tokens.values()),
            "student_tokens": sum(student_tokens.values()),
        },
        "design": design,
        "groups": groups,
        "store_layers": layout.layers,
        "store_bytes": {**store, "total": sum(store.values())},
        "training": training,
        "disk_bytes": disk,
        "memory_bytes": {
            "capture": 0
            if study.signals.imported
            else capture_memory(
                teacher, study.teacher.dtype, study.signals, study.corpus.max_length, study.teacher.quantization
            ),
            "trial": trial_memory(
                student,
                teacher.width,
                study.training,
                study.evaluation.dtype,
                study.corpus.max_length,
                study.student.lora,
                processes,
                max(group["projectors"] for group in groups.values()),
            )
            + head_memory(study, teacher),
            **({"trial_in_cpu_memory": host_memory(student, processes)} if processes > 1 else {}),
        },
        "hours": hours[0],
        "cpu_hours": hours[1] if len(hours) > 1 else None,
        "measured": None,
        "assumptions": assumptions,
        "warnings": unreached,
    }


def _models(study: Study) -> dict[str, ModelRef]:
    return {"teacher": study.teacher, "student": study.student}


def _shape(role: str, ref: ModelRef, unreached: list[str]) -> Shape:
    try:
        return shape_of(ref, unreached)
    except UserError as error:
        raise _of_field(f"{role}.model", error) from error


def _require_data(study: Study, unreached: list[str]) -> dict[str, int]:
    """The rows of each data set by its field; those out of reach are added to `unreached`.

    Raises `UserError` for one that is not there or cannot be read. The hub is asked no more once it did not answer:
    its client tries for half a minute each time.
    """
    from stillroom.data.rows import load_rows

    places = {f"corpus.tasks.{name}": (name, data) for name, data in study.corpus.tasks.items()}
    places |= {f"evaluation.test_splits.{name}": (name, data) for name, data in study.test_splits.items()}
    found: dict[str, int] = {}
    for place, (name, data) in places.items():
        path = Path(data.dataset)
        here = data.dataset.startswith(("/", ".", "~")) or path.exists() or bool(path.suffix)
        if unreached and not here and data.dataset != "builtin":
            continue
        try:
            found[place] = len(load_rows(get_task(name, data), data, study.corpus.sample_seed, place))
        except UserError as error:
            if not _out_of_reach(error):
                raise _of_field(f"{place}.dataset", error) from error
            unreached.append(_uncounted(error))
    return found


def _of_field(field: str, error: UserError) -> UserError:
    """The error, with the field of the study that it is about."""
    known = str(error).startswith(field.rpartition(".")[0])
    return error if known else UserError(f"{field}: {error}")


def _uncounted(error: UserError) -> str:
    return f"tokens per example: assumed, since they could not be counted ({error})"


def _out_of_reach(error: BaseException) -> bool:
    """Whether the hub did not answer, or not to this login: nothing is known then of what was asked for."""
    from datasets.exceptions import DatasetNotFoundError
    from huggingface_hub.errors import (
        GatedRepoError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    chain = _causes(error)
    if any(isinstance(cause, GatedRepoError) for cause in chain):
        return True
    if any(isinstance(cause, DatasetNotFoundError | RepositoryNotFoundError) for cause in chain):
        return False
    kinds = (ConnectionError, TimeoutError, OfflineModeIsEnabled, LocalEntryNotFoundError)
    return any(isinstance(cause, kinds) for cause in chain)


def _causes(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and len(chain) < 12:
        chain.append(cause)
    return chain


def _tokenizers(study: Study, unreached: list[str]) -> list[Any]:
    """Both tokenizers; none if either is built in, and made on first use, or out of reach."""
    from stillroom.models.hub import load_tokenizer

    if any(ref.model.startswith("builtin:") for ref in _models(study).values()):
        return []
    tokenizers = []
    for role, ref in _models(study).items():
        try:
            tokenizers.append(load_tokenizer(ref))
        except UserError as error:
            if not _out_of_reach(error):
                raise _of_field(f"{role}.model", error) from error
            unreached.append(_uncounted(error))
            return []
    return tokenizers


def _training(study: Study, lengths: dict[str, Lengths]) -> dict[str, int]:
    share = study.corpus.validation_share
    train = sum(
        len(task_lengths.student) - max(1, round(share * len(task_lengths.student)))
        for task_lengths in lengths.values()
    )
    trials = len(study.groups) * len(study.sweep.seeds)
    steps = -(-train // study.training.batch_size) * study.training.epochs
    tokens = sum(
        float(task_lengths.student.mean()) * (len(task_lengths.student) * (1 - share))
        for task_lengths in lengths.values()
    )
    return {
        "groups": len(study.groups),
        "seeds": len(study.sweep.seeds),
        "trials": trials,
        "train_examples": train,
        "steps_per_trial": steps,
        "steps": steps * trials,
        "tokens_per_trial": int(tokens * study.training.epochs),
    }


def _how_differences_are_made(design: dict[str, Any]) -> str:
    return (
        f"differences: found with {design['power']:.0%} power at {design['alpha']:g}, Holm's first step, between "
        "students that answer half of the examples right and err independently; seeds that vary more need more"
    )
