"""Bytes that a study takes: of the teacher's data, of students on disk, and of memory."""

from __future__ import annotations

from stillroom.config import Lora, Precision, Quantization, Signals, Study, Training
from stillroom.models.precision import DTYPES
from stillroom.models.sizes import Shape
from stillroom.preflight.lengths import Lengths
from stillroom.signals import signals_of
from stillroom.signals.signal import Layout, id_dtype


def layout_of(study: Study, teacher: Shape) -> Layout:
    """What the study's store keeps of such a teacher."""
    return Layout(
        study.signals.top_k,
        teacher.width,
        teacher.heads,
        study.signals.dtype,
        id_dtype(teacher.vocabulary),
        study.signals.attention_dtype,
        study.signals.hidden_layers,
        study.signals.attention_layers,
        study.signals.value_layers,
        teacher.value_width,
    )


def store_bytes(lengths: dict[str, Lengths], layout: Layout) -> dict[str, int]:
    """By signal: what a token takes, and, of attention, what a cell of the causal triangle does."""
    tokens = sum(task_lengths.teacher.sum() for task_lengths in lengths.values())
    triangle = sum(task_lengths.triangle * len(task_lengths.teacher) for task_lengths in lengths.values())
    found = {}
    for signal in signals_of(layout):
        found[signal.name] = 0
        for column in signal.columns:
            of_one, of_two = column.bytes(1), column.bytes(2)
            cells = triangle if of_two == 3 * of_one else tokens
            found[signal.name] += int(cells * of_one)
    return {**{name: size for name, size in found.items() if size}, "encoding": int(tokens * 9)}


def head_bytes(study: Study, teacher: Shape) -> dict[str, int]:
    """Of the teacher's output head, where the store keeps it."""
    size = DTYPES[study.teacher.dtype].itemsize * teacher.vocabulary * teacher.width
    return {"teacher_head": size} if study.signals.teacher_head else {}


def disk_bytes(study: Study, student: Shape, trials: int) -> dict[str, int]:
    """Of a `checkpoint`, of the `checkpoints` that stay, and what one trial takes `more_while_a_trial_runs`."""
    saved = student.parameters * (4 if study.training.precision == "float32" else 2)
    keep, earlier = study.sweep.keep_checkpoints, study.training.epochs - 1
    kept = study.training.epochs if keep == "all" else 1
    passing = min({"last": 1, "best": 2, "all": 0}[keep], earlier)  # until the next checkpoint is whole
    states = min(2, earlier)  # float32 weights and two moments; none with the last epoch's
    trained = _lora_parameters(student, study.student.lora) if study.student.lora else student.parameters
    moments = 8 if study.training.optimizer == "adamw" else 2
    return {
        "checkpoint": saved,
        "checkpoints": saved * kept * trials,
        "more_while_a_trial_runs": saved * passing + (4 * student.parameters + moments * trained) * states,
    }


def capture_memory(
    teacher: Shape, dtype: Precision, signals: Signals, longest: int, quantization: Quantization | None = None
) -> int:
    """Bytes that capturing takes at its peak, by estimate: the weights, and three maps of the last layer's attention.

    The maps are float32 and padded to the `longest` example, in tokens.
    """
    weights = teacher.parameters * DTYPES[dtype].itemsize
    if quantization:  # the head and the embeddings stay as they are
        kept = min(2 * teacher.vocabulary * teacher.width, teacher.parameters)
        bits = {"8bit": 8, "4bit": 4.5}[quantization]  # NF4 has a scale for every 64 weights
        weights = kept * DTYPES[dtype].itemsize + int((teacher.parameters - kept) * bits / 8)
    return weights + 3 * 4 * signals.batch_tokens * longest * teacher.heads


def trial_memory(
    student: Shape,
    teacher_width: int,
    training: Training,
    scored: Precision,
    longest: int,
    lora: Lora | None = None,
    processes: int = 1,
    projectors: int = 1,
) -> int:
    """Bytes that training a student takes at its peak, on each GPU of a trial, by estimate.

    Weights, gradients and AdamW's two moments in float32, the copy that is `scored` in its dtype, and the activations
    of one forward pass: 34 bytes per token, layer and dimension in 16 bits (Korthikanti et al., MLSys 2023, without the
    attention maps that sdpa does not keep), and three float32 maps of the last layer. With gradient checkpointing, each
    layer's input and one whole layer. With LoRA, gradients and moments of its layers, and a copy with them merged.
    Moments in 8 bits take a byte. Each of several processes has its part of all but a whole layer and the embeddings.
    """
    trained = projectors * student.width * teacher_width + (
        _lora_parameters(student, lora) if lora else student.parameters
    )
    size = DTYPES[training.precision].itemsize
    examples = min(training.micro_batch_size or training.batch_size, -(-training.batch_size // processes))
    kept = 17 + student.layers if training.gradient_checkpointing else 17 * student.layers
    activations = examples * longest * (kept * size * student.width + 3 * 4 * longest * student.heads)
    copied = 0 if training.precision == scored == "float32" else DTYPES[scored].itemsize * student.parameters
    bytes_trained = 16 if training.optimizer == "adamw" else 10
    weights = bytes_trained * trained + (8 * student.parameters if lora else 0) + copied
    embeddings = min(2 * student.vocabulary * student.width, student.parameters)
    gathered = embeddings + (student.parameters - embeddings) // student.layers if processes > 1 else 0
    # a gathered weight has a gathered gradient; each layer's weights stay, cast for autocast, until the backward pass
    cast = size * student.parameters if processes > 1 and size < 4 and not training.gradient_checkpointing else 0
    return weights // processes + 2 * 4 * gathered + cast + activations


def host_memory(student: Shape, processes: int) -> int:
    """Bytes of the CPU's memory that the processes of a sharded trial hold at their peak, which is as it resumes.

    Each has the whole student in float32, which is saved and scored, and a checkpoint's weights and moments.
    """
    return processes * 16 * student.parameters


def head_memory(study: Study, teacher: Shape) -> int:
    """Bytes of the teacher's output head in float32, which a trial holds where a group compares every token."""
    kinds = [group.objective(study.objective).kd for group in study.groups if "kd" in group.terms]
    return 4 * teacher.vocabulary * teacher.width if any(kd.support == "full" for kd in kinds) else 0


def _lora_parameters(student: Shape, lora: Lora) -> int:
    """Weights of LoRA layers, by estimate: a block's seven linear layers have about 20 widths of inputs and outputs."""
    return lora.rank * student.layers * 20 * student.width
