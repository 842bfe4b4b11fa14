"""What a study will cost, before any weight is loaded: examples, tokens, bytes, steps, and hours by assumption.

Where tokenizers and data sets are at hand everything is counted; what stands in for one is listed as an assumption.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from stillroom.config import Precision, Signals, Study, Training
from stillroom.data.encoding import encode_many
from stillroom.data.tasks import get_task
from stillroom.errors import UserError
from stillroom.models.precision import DTYPES
from stillroom.models.sizes import Shape, shape_of
from stillroom.signals.signal import Layout, id_dtype

_TOKENS: dict[str, tuple[float, float, float]] = {
    "sst2": (28.3, 28.9, 465.0),
    "mmlu": (134.7, 139.0, 13074.0),
    "gsm8k": (199.1, 203.6, 22384.0),
}
"""Mean teacher tokens, student tokens and T(T+1)/2 of an example, under the tokenizers of Mistral and TinyLlama."""

_FLOPS = 0.4 * 312e12
"""Floating-point operations a second: 40 % of an A100's bfloat16 peak."""
_FLOPS_FLOAT32 = 0.4 * 19.5e12
"""The same in float32, which that card multiplies without its matrix units."""
_BYTES_FROM_MEMORY = 0.6 * 2.0e12
"""Bytes a second that a decoding step reads weights at: 60 % of the same card's."""
_DECODING_STEP = 0.025
"""Seconds that a decoding step takes to be launched, however small the model."""
_BYTES_FROM_DISK = 1e9


@dataclass(frozen=True)
class _Lengths:
    """Tokens of a task's examples under both tokenizers, counted or assumed."""

    teacher: np.ndarray
    student: np.ndarray
    triangle: float
    """Mean of T(T+1)/2 under the teacher's tokenizer."""


def plan_study(study: Study) -> dict[str, Any]:
    """The plan as nested figures.

    `models`, `corpus`, `store_bytes`, `training`, `disk_bytes`, `memory_bytes`, `hours`, `assumptions`.
    """
    assumptions: list[str] = []
    teacher, student = (shape_of(ref, assumptions) for ref in (study.teacher, study.student))
    lengths = _count(study, assumptions) or _assume(study, assumptions)
    examples = sum(data.examples for data in study.corpus.tasks.values())
    tokens = {name: int(own.teacher.sum()) for name, own in lengths.items()}
    student_tokens = {name: int(own.student.sum()) for name, own in lengths.items()}
    layout = Layout(
        study.signals.top_k,
        teacher.width,
        teacher.heads,
        study.signals.dtype,
        id_dtype(teacher.vocabulary),
        study.signals.attention_dtype,
    )
    store = _store_bytes(lengths, layout)
    training = _training(study, lengths)
    disk = _disk(study, student, training["trials"])
    return {
        "study": study.name,
        "models": {
            role: {"model": ref.model, **shape.__dict__}
            for role, ref, shape in (("teacher", study.teacher, teacher), ("student", study.student, student))
        },
        "corpus": {
            "examples": examples,
            "by_task": {
                name: {
                    "examples": study.corpus.tasks[name].examples,
                    "teacher_tokens": tokens[name],
                    "student_tokens": student_tokens[name],
                }
                for name in lengths
            },
            "teacher_tokens": sum(tokens.values()),
            "student_tokens": sum(student_tokens.values()),
        },
        "store_bytes": {**store, "total": sum(store.values())},
        "training": training,
        "disk_bytes": disk,
        "memory_bytes": {
            "capture": capture_memory(teacher, study.teacher.dtype, study.signals, study.corpus.max_length),
            "trial": trial_memory(
                student, teacher.width, study.training, study.evaluation.dtype, study.corpus.max_length
            ),
        },
        "hours": _hours(study, teacher, student, sum(store.values()), training, lengths, assumptions),
        "assumptions": assumptions,
    }


def _count(study: Study, assumptions: list[str]) -> dict[str, _Lengths] | None:
    """Tokens counted with the real tokenizers on the real data; None if either is not at hand."""
    from stillroom.data.corpus import build_corpus
    from stillroom.models.hub import load_tokenizer

    if study.teacher.model.startswith("builtin:") or study.student.model.startswith("builtin:"):
        return None
    try:
        tokenizers = [load_tokenizer(ref) for ref in (study.teacher, study.student)]
        examples = build_corpus(study.corpus, tokenizers)
    except UserError as error:
        assumptions.append(f"tokens per example: assumed, since they could not be counted ({error})")
        return None
    result = {}
    for name in study.corpus.tasks:
        texts = [example.text for example in examples.all if example.task == name]
        teacher = np.array([len(e) for e in encode_many(tokenizers[0], texts)])
        student = np.array([len(e) for e in encode_many(tokenizers[1], texts, add_eos=True)])
        result[name] = _Lengths(teacher, student, float((teacher * (teacher + 1) / 2).mean()))
    return result


def _assume(study: Study, assumptions: list[str]) -> dict[str, _Lengths]:
    result = {}
    for name, data in study.corpus.tasks.items():
        half = study.corpus.max_length / 2
        teacher, student, triangle = _TOKENS.get(name, (half, half, half * (half + 1) / 2))
        source = "measured with Mistral's and TinyLlama's tokenizers" if name in _TOKENS else "half of max_length"
        assumptions.append(f"{name}: {teacher:g} tokens an example ({source})")
        result[name] = _Lengths(np.full(data.examples, teacher), np.full(data.examples, student), triangle)
    return result


def _store_bytes(lengths: dict[str, _Lengths], layout: Layout) -> dict[str, int]:
    value, index = np.dtype(layout.dtype).itemsize, np.dtype(layout.id_dtype).itemsize
    tokens = sum(own.teacher.sum() for own in lengths.values())
    triangle = sum(own.triangle * len(own.teacher) for own in lengths.values())
    return {
        "topk": int(tokens * (layout.top_k * (value + index) + 4)),
        "hidden": int(tokens * layout.width * value),
        "attention": int(triangle * layout.heads * (1 if layout.attention_dtype else value)),
        "encoding": int(tokens * 9),
    }


def _training(study: Study, lengths: dict[str, _Lengths]) -> dict[str, int]:
    share = study.corpus.validation_share
    train = sum(len(own.student) - max(1, round(share * len(own.student))) for own in lengths.values())
    trials = len(study.groups) * len(study.sweep.seeds)
    steps = -(-train // study.training.batch_size) * study.training.epochs
    tokens = sum(float(own.student.mean()) * (len(own.student) * (1 - share)) for own in lengths.values())
    return {
        "groups": len(study.groups),
        "seeds": len(study.sweep.seeds),
        "trials": trials,
        "train_examples": train,
        "steps_per_trial": steps,
        "steps": steps * trials,
        "tokens_per_trial": int(tokens * study.training.epochs),
    }


def _disk(study: Study, student: Shape, trials: int) -> dict[str, int]:
    saved = student.parameters * (4 if study.training.precision == "float32" else 2)
    keep, earlier = study.sweep.keep_checkpoints, study.training.epochs - 1
    kept = study.training.epochs if keep == "all" else 1
    passing = min({"last": 1, "best": 2, "all": 0}[keep], earlier)  # until the next checkpoint is whole
    states = min(2, earlier)  # float32 weights and two moments; none with the last epoch's
    return {
        "checkpoint": saved,
        "checkpoints": saved * kept * trials,
        "more_while_a_trial_runs": saved * passing + 12 * student.parameters * states,
    }


def _hours(
    study: Study,
    teacher: Shape,
    student: Shape,
    store_bytes: int,
    training: dict[str, int],
    lengths: dict[str, _Lengths],
    assumptions: list[str],
) -> dict[str, float]:
    """Hours of one GPU for the whole study: operations or bytes, whichever takes longer."""
    scoring = _FLOPS_FLOAT32 if study.evaluation.dtype == "float32" else _FLOPS
    batch, step = (
        study.evaluation.generation_batch_size,
        max(DTYPES[study.evaluation.dtype].itemsize * student.parameters / _BYTES_FROM_MEMORY, _DECODING_STEP),
    )
    assumptions += [
        f"hours: of one GPU, all trials together, not measured; 2 FLOPs a weight and token forward, 6 in training, at "
        f"{_FLOPS / 1e12:.0f} TFLOP/s",
        f"evaluation: in {study.evaluation.dtype}, at {scoring / 1e12:.0f} TFLOP/s",
        f"generation: {batch} answers at once, each to its limit; a step takes {1000 * step:.0f} ms: weights "
        f"read at {_BYTES_FROM_MEMORY / 1e12:.1f} TB/s, {1000 * _DECODING_STEP:.0f} ms at least",
        "left out: adapting the teacher, evaluating both models untrained, the validation loss, gradient measurements",
        f"the store is written once, and read beside the training of each epoch, at {_BYTES_FROM_DISK / 1e9:.0f} GB/s",
    ]

    kinds = {name: get_task(name, data).kind for name, data in study.corpus.tasks.items()}

    def evaluation(examples: dict[str, float]) -> float:
        read = sum(count * float(lengths[name].student.mean()) for name, count in examples.items())
        written = sum(count for name, count in examples.items() if kinds[name] == "generation")
        return 2 * student.parameters * read / scoring + written / batch * study.evaluation.max_new_tokens * step

    held_out = {name: max(1.0, study.corpus.validation_share * len(own.student)) for name, own in lengths.items()}
    official = {name: float(split.examples) for name, split in study.official.items()}
    computed = 6 * student.parameters * training["tokens_per_trial"] / _FLOPS
    tokens = sum(float(own.teacher.sum()) for own in lengths.values())
    seconds = {
        "teacher": 2 * teacher.parameters * tokens / _FLOPS + store_bytes / _BYTES_FROM_DISK,
        "training": training["trials"] * max(computed, study.training.epochs * store_bytes / _BYTES_FROM_DISK),
        "evaluation": training["trials"] * study.training.epochs * evaluation(held_out),
        "official_evaluation": training["trials"] * evaluation(official),
    }
    return {name: value / 3600 for name, value in seconds.items()}


def print_plan(plan: dict[str, Any], as_json: bool = False) -> None:
    """The plan as a table, or as JSON."""
    if as_json:
        print(json.dumps(plan, indent=2))
        return
    from rich.console import Console

    console = Console()
    sizes = ("width", "heads", "layers", "vocabulary", "parameters")
    models = [(f"{role} {own['model']}", *(f"{own[k]:,}" for k in sizes)) for role, own in plan["models"].items()]
    console.print(_table("Models", ("model", *sizes), models))
    console.print(_table("Corpus", ("task", "examples", "teacher tokens", "student tokens"), _corpus_rows(plan)))
    console.print(_table("Teacher data", ("signal", "size"), _rows(plan["store_bytes"], _bytes)))
    console.print(_table("Training", ("what", "count"), _rows(plan["training"], "{:,}".format)))
    console.print(_table("Disk for students", ("what", "size"), _rows(plan["disk_bytes"], _bytes)))
    console.print(_table("Memory at the peak, estimated", ("stage", "size"), _rows(plan["memory_bytes"], _bytes)))
    console.print(_table("GPU hours, estimated", ("stage", "hours"), _rows(plan["hours"], "{:.2f}".format)))
    console.print("Assumptions")
    for assumption in plan["assumptions"]:
        console.print(f"  - {assumption}", markup=False, highlight=False)


def _corpus_rows(plan: dict[str, Any]) -> list[tuple[str, ...]]:
    corpus = plan["corpus"]
    rows = {**corpus["by_task"], "total": corpus}
    return [(n, *(f"{own[k]:,}" for k in ("examples", "teacher_tokens", "student_tokens"))) for n, own in rows.items()]


def _rows(values: dict[str, Any], show: Callable[[Any], str]) -> list[tuple[str, ...]]:
    return [(name.replace("_", " "), show(value)) for name, value in values.items()]


def _table(title: str, headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> Any:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, heading in enumerate(headings):
        table.add_column(heading, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _bytes(value: int) -> str:
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{value / size:.2f} {unit}"
    return f"{value} B"


def capture_memory(teacher: Shape, dtype: Precision, signals: Signals, longest: int) -> int:
    """Bytes that capturing takes at its peak, by estimate: the weights, and three maps of the last layer's attention.

    The maps are float32 and padded to the `longest` example, in tokens.
    """
    weights = teacher.parameters * DTYPES[dtype].itemsize
    return weights + 3 * 4 * signals.batch_tokens * longest * teacher.heads


def trial_memory(student: Shape, teacher_width: int, training: Training, scored: Precision, longest: int) -> int:
    """Bytes that training a student takes at its peak, by estimate.

    Weights, gradients and AdamW's two moments in float32, the copy that is `scored` in its dtype, and the activations
    of one forward pass: 34 bytes a token, layer and dimension in 16 bits (Korthikanti et al., MLSys 2023, without the
    attention maps that sdpa does not keep), and three float32 maps of the last layer.
    """
    trained = student.parameters + student.width * teacher_width
    size = DTYPES[training.precision].itemsize
    examples = training.micro_batch_size or training.batch_size
    activations = examples * longest * (17 * size * student.layers * student.width + 3 * 4 * longest * student.heads)
    copied = 0 if training.precision == scored == "float32" else DTYPES[scored].itemsize * student.parameters
    return 16 * trained + copied + activations
