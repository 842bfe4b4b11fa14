"""Hours that a study takes, by assumption."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from stillroom.config import Precision, Study
from stillroom.data.tasks import get_task
from stillroom.evaluation.generation import prompts_at_once
from stillroom.models.precision import DTYPES, products, scored_by_parts
from stillroom.models.sizes import Shape
from stillroom.models.split_products import PARTS
from stillroom.preflight.costs import layout_of, store_bytes
from stillroom.preflight.design import sized
from stillroom.preflight.lengths import Lengths

BYTES_FROM_DISK = 1e9


_LINE = 16
"""Tokens of a line, which is the teacher's answer to a choice task."""


@dataclass(frozen=True)
class Machine:
    """What hours are worked out for."""

    name: str
    device: str
    """Its kind, as PyTorch calls it."""
    flops: Mapping[Precision, float]
    """Floating-point operations a second by dtype, as models reach them."""
    bytes_from_memory: float
    """Bytes a second that a decoding step reads weights at."""
    launch: float
    """Seconds that a decoding step takes at least, however small the model."""


GPU = Machine(
    "one A100, at 40 % of its matrix units' peak, and of what it does without them where weights are float32",
    "cuda",
    {"float32": 0.4 * 19.5e12, "bfloat16": 0.4 * 312e12, "float16": 0.4 * 312e12},
    0.6 * 2.0e12,
    0.025,
)


def this_cpu() -> Machine:
    """This machine's processor: matrix products as timed now; models reach half of that."""
    rates = {dtype: 0.5e9 * products(DTYPES[dtype], torch.device("cpu")) for dtype in GPU.flops}
    measured = ", ".join(f"{name} {rate / 1e9:,.0f}" for name, rate in rates.items())
    name = f"this CPU, at half of the matrix products it is timed at now (GFLOP/s: {measured})"
    return Machine(name, "cpu", rates, 8e9, 0.01)


def hours_of(
    study: Study, shapes: tuple[Shape, Shape], training: dict[str, int], lengths: dict[str, Lengths], machine: Machine
) -> dict[str, float]:
    """Hours of a machine for the whole study: operations or bytes, whichever takes longer."""
    teacher, student = shapes
    batch = prompts_at_once(study.evaluation, machine.device)
    rate, size = _scoring(study, machine)
    read_weights = size * student.parameters / machine.bytes_from_memory
    step = max(read_weights, 2 * student.parameters * batch / rate, machine.launch)
    store = sum(store_bytes(lengths, layout_of(study, teacher)).values()) / BYTES_FROM_DISK
    kinds = {name: get_task(name, data).kind for name, data in study.corpus.tasks.items()}

    def evaluation(examples: dict[str, float]) -> float:
        read = sum(count * float(lengths[name].student.mean()) for name, count in examples.items())
        written = sum(count for name, count in examples.items() if kinds[name] == "generation")
        batches = written / batch * study.evaluation.max_new_tokens * step
        return 2 * student.parameters * read / rate + batches

    share, scored = study.corpus.validation_share, study.scored_tasks
    held_out = {
        name: max(1.0, share * len(task_lengths.student)) for name, task_lengths in lengths.items() if name in scored
    }
    test = {name: float(sized(split)) for name, split in study.test_splits.items()}
    operations = 8 if study.training.gradient_checkpointing else 6
    computed = operations * student.parameters * training["tokens_per_trial"] / machine.flops[study.training.precision]
    tokens = sum(float(task_lengths.teacher.sum()) for task_lengths in lengths.values())
    read_by_teacher = 2 * teacher.parameters * tokens / machine.flops[study.teacher.dtype]
    if study.signals.imported:
        read_by_teacher = 0.0
    answers = 0.0
    if study.signals.teacher_answers:
        reading = DTYPES[study.teacher.dtype].itemsize * teacher.parameters / machine.bytes_from_memory
        computing = 2 * teacher.parameters * batch / machine.flops[study.teacher.dtype]
        made = {"generation": study.evaluation.max_new_tokens, "choice": _LINE}
        written = sum(len(task_lengths.teacher) * made[kinds[name]] for name, task_lengths in lengths.items())
        answers = written / batch * max(reading, computing, machine.launch)
    seconds = {
        "teacher": read_by_teacher + store,
        **({"teacher_answers": answers} if answers else {}),
        "training": training["trials"] * max(computed, study.training.epochs * store),
        "evaluation": training["trials"] * study.training.epochs * evaluation(held_out),
        "test_evaluation": training["trials"] * evaluation(test),
    }
    return {name: value / 3600 for name, value in seconds.items()}


def _scoring(study: Study, machine: Machine) -> tuple[float, int]:
    """Operations a second in which a machine scores students, and bytes of a weight that it reads."""
    saved, dtype = study.training.precision, study.evaluation.dtype
    if scored_by_parts(saved, dtype, machine.device):
        return machine.flops[saved] / PARTS[DTYPES[saved]], DTYPES[saved].itemsize
    return machine.flops[dtype], DTYPES[dtype].itemsize


def how_hours_are_made(study: Study, machines: Sequence[Machine]) -> list[str]:
    """What the figures of hours, memory and disk rest on."""
    return [
        "hours: all trials together, one after the other, not measured; 2 FLOPs per weight and token forward, "
        f"{8 if study.training.gradient_checkpointing else 6} in training",
        *(f"hours of {machine.name}" for machine in machines),
        f"evaluation: in {study.evaluation.dtype}; generation: "
        f"{' or '.join(str(prompts_at_once(study.evaluation, m.device)) for m in machines)} answers at once, each to "
        "its limit",
        *([f"the teacher's answers: {_LINE} tokens for a choice task"] if study.signals.teacher_answers else []),
        "left out: fine-tuning the teacher, evaluating both models before training, the validation loss, gradient "
        "measurements" + (", what lm-evaluation-harness evaluates" if study.evaluation.harness_splits else ""),
        "memory: tensors of one process at its peak, without Python and its libraries; on a CPU `stillroom doctor` "
        "asks for twice a trial's, since the allocator keeps part of what is given back",
        "disk: bytes of the files as they are written; `stillroom doctor` adds what trials need more while they run",
        f"the store is written once, and read beside the training of each epoch, at {BYTES_FROM_DISK / 1e9:.0f} GB/s",
    ]
