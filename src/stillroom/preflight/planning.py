"""What a study will cost, before any weight is loaded: examples, tokens, bytes, steps, and hours by assumption.

Where tokenizers and data sets are available, everything is counted; what replaces one is listed as an assumption.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stillroom.config import BenchmarkSplit, Lora, ModelRef, Precision, Quantization, Signals, Study, TaskData, Training
from stillroom.data.chat_templates import encode_examples
from stillroom.data.corpus import Examples, build_corpus
from stillroom.data.encoding import encode
from stillroom.data.tasks import get_task
from stillroom.errors import UserError
from stillroom.evaluation.generation import prompts_at_once
from stillroom.evaluation.harness_tasks import require_harness
from stillroom.models.precision import DTYPES, products, resolve_precision, scored_by_parts
from stillroom.models.sizes import Shape, shape_of
from stillroom.models.split_products import PARTS
from stillroom.preflight.design import examine_design, sized
from stillroom.signals import signals_of
from stillroom.signals.signal import Layout, id_dtype
from stillroom.terms import compared

_TOKENS: dict[str, tuple[float, float, float]] = {
    "sst2": (28.3, 28.9, 465.0),
    "mmlu": (134.7, 139.0, 13074.0),
    "gsm8k": (199.1, 203.6, 22384.0),
}
"""Mean teacher tokens, student tokens and T(T+1)/2 of an example, under the tokenizers of Mistral and TinyLlama."""

_UNKNOWN = 1000
"""Examples of a task where all are asked for and its rows are out of reach."""
_BYTES_FROM_DISK = 1e9
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


@dataclass(frozen=True)
class _Lengths:
    """Tokens of a task's examples under both tokenizers, counted or assumed."""

    teacher: np.ndarray
    student: np.ndarray
    triangle: float
    """Mean of T(T+1)/2 under the teacher's tokenizer."""


@dataclass(frozen=True)
class Drawn:
    """A study's corpus, as both tokenizers read it."""

    examples: Examples
    tokenizers: Sequence[Any]
    """The teacher's and the student's."""
    lengths: Mapping[str, tuple[int, ...]]
    """An example's tokens under each of them, EOS among them, by its id."""


def draw(study: Study, tokenizers: Sequence[Any]) -> Drawn:
    """The corpus drawn with the real tokenizers from the real data; `UserError` where it cannot be."""
    lengths: dict[str, tuple[int, ...]] = {}
    examples = build_corpus(study.corpus, tokenizers, lengths)
    for example in examples.all:  # a wrong answer is put in after the draw
        if example.example_id not in lengths:
            lengths[example.example_id] = tuple(len(encode_examples(t, [example], add_eos=True)[0]) for t in tokenizers)
    return Drawn(examples, tokenizers, lengths)


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
        lengths = _count(study, drawn)
        study = counted(
            study, rows | {f"corpus.tasks.{name}": len(task_lengths.teacher) for name, task_lengths in lengths.items()}
        )
    else:
        lengths = _assume(study, rows, assumptions)
        study = counted(study, rows)
    examples = sum(len(task_lengths.teacher) for task_lengths in lengths.values())
    tokens = {name: int(task_lengths.teacher.sum()) for name, task_lengths in lengths.items()}
    student_tokens = {name: int(task_lengths.student.sum()) for name, task_lengths in lengths.items()}
    layout, groups = _layout(study, teacher), compared(study)
    store = {**_store_bytes(lengths, layout), **_head_bytes(study, teacher)}
    training = _training(study, lengths)
    machines = [GPU] if torch.cuda.is_available() or not guess_this_cpu else [GPU, this_cpu()]
    hours = [_hours(study, (teacher, student), training, lengths, machine) for machine in machines]
    design = examine_design(study)
    assumptions += [_how_differences_are_made(design), *_how_hours_are_made(study, machines)]
    disk = _disk(study, student, training["trials"])
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
                study.sweep.processes,
                max(group["projectors"] for group in groups.values()),
            )
            + _head_memory(study, teacher),
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


def counted(study: Study, rows: Mapping[str, int]) -> Study:
    """The study with numbers in place of `examples: all`: `rows` of each data set, by field."""

    def number(place: str, data: TaskData | BenchmarkSplit) -> dict[str, int]:
        return {"examples": rows.get(place, _UNKNOWN)} if data.examples == "all" else {}

    test_splits = study.test_splits  # how many the harness's have it alone knows

    tasks = {n: d.model_copy(update=number(f"corpus.tasks.{n}", d)) for n, d in study.corpus.tasks.items()}
    splits = {
        n: s.model_copy(update=number(f"evaluation.test_splits.{n}", s)) if n in test_splits else s
        for n, s in study.evaluation.test_splits.items()
    }
    corpus = study.corpus.model_copy(update={"tasks": tasks})
    evaluation = study.evaluation.model_copy(update={"test_splits": splits})
    return study.model_copy(update={"corpus": corpus, "evaluation": evaluation})


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


def _count(study: Study, drawn: Drawn) -> dict[str, _Lengths]:
    """Tokens of what was drawn."""
    examples, tokenizers, lengths = drawn.examples, drawn.tokenizers, drawn.lengths
    plain = next((example for example in examples.all if not example.turns), None)
    # the student alone learns EOS; some tokenizers end each text with it of themselves
    added = (
        len(encode(tokenizers[0], plain.text, add_eos=True)) - len(encode(tokenizers[0], plain.text)) if plain else 0
    )
    result = {}
    for name in study.corpus.tasks:
        task_examples = [example for example in examples.all if example.task == name]
        if task_examples[0].turns:
            teacher = np.array([len(e) for e in encode_examples(tokenizers[0], task_examples)])
        else:
            teacher = np.array([lengths[e.example_id][0] - added for e in task_examples])
        student = np.array([lengths[e.example_id][1] for e in task_examples])
        result[name] = _Lengths(teacher, student, float((teacher * (teacher + 1) / 2).mean()))
    return result


def _assume(study: Study, rows: Mapping[str, int], assumptions: list[str]) -> dict[str, _Lengths]:
    result, asked = {}, study.corpus.tasks
    for name, data in counted(study, rows).corpus.tasks.items():
        half = study.corpus.max_length / 2
        teacher, student, triangle = _TOKENS.get(name, (half, half, half * (half + 1) / 2))
        source = "measured with Mistral's and TinyLlama's tokenizers" if name in _TOKENS else "half of max_length"
        assumptions.append(f"{name}: {teacher:g} tokens per example ({source})")
        if asked[name].examples == "all" and f"corpus.tasks.{name}" not in rows:
            assumptions.append(f"{name}: all of its rows, {_UNKNOWN:,} (they cannot be counted)")
        result[name] = _Lengths(np.full(sized(data), teacher), np.full(sized(data), student), triangle)
    return result


def _layout(study: Study, teacher: Shape) -> Layout:
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


def _store_bytes(lengths: dict[str, _Lengths], layout: Layout) -> dict[str, int]:
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


def _head_bytes(study: Study, teacher: Shape) -> dict[str, int]:
    """Of the teacher's output head, where the store keeps it."""
    size = DTYPES[study.teacher.dtype].itemsize * teacher.vocabulary * teacher.width
    return {"teacher_head": size} if study.signals.teacher_head else {}


def _head_memory(study: Study, teacher: Shape) -> int:
    """Bytes of the teacher's output head in float32, which a trial holds where a group compares every token."""
    kinds = [group.objective(study.objective).kd for group in study.groups if "kd" in group.terms]
    return 4 * teacher.vocabulary * teacher.width if any(kd.support == "full" for kd in kinds) else 0


def _training(study: Study, lengths: dict[str, _Lengths]) -> dict[str, int]:
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


def _disk(study: Study, student: Shape, trials: int) -> dict[str, int]:
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


def _hours(
    study: Study, shapes: tuple[Shape, Shape], training: dict[str, int], lengths: dict[str, _Lengths], machine: Machine
) -> dict[str, float]:
    """Hours of a machine for the whole study: operations or bytes, whichever takes longer."""
    teacher, student = shapes
    batch = prompts_at_once(study.evaluation, machine.device)
    rate, size = _scoring(study, machine)
    read_weights = size * student.parameters / machine.bytes_from_memory
    step = max(read_weights, 2 * student.parameters * batch / rate, machine.launch)
    store = sum(_store_bytes(lengths, _layout(study, teacher)).values()) / _BYTES_FROM_DISK
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


def _how_differences_are_made(design: dict[str, Any]) -> str:
    return (
        f"differences: found with {design['power']:.0%} power at {design['alpha']:g}, Holm's first step, between "
        "students that answer half of the examples right and err independently; seeds that vary more need more"
    )


def _how_hours_are_made(study: Study, machines: Sequence[Machine]) -> list[str]:
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
        f"the store is written once, and read beside the training of each epoch, at {_BYTES_FROM_DISK / 1e9:.0f} GB/s",
    ]


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


def _lora_parameters(student: Shape, lora: Lora) -> int:
    """Weights of LoRA layers, by estimate: a block's seven linear layers have about 20 widths of inputs and outputs."""
    return lora.rank * student.layers * 20 * student.width


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
