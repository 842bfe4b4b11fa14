"""What a study's stages take on this machine: real pieces of each are timed, and hours follow from their rates."""

from __future__ import annotations

import math
import platform
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from scipy.stats import t

from stillroom.config import GROUPS, Evaluation, Group, Study
from stillroom.data.chat_templates import encode_examples
from stillroom.data.corpus import Examples
from stillroom.data.tasks import Example, task_of
from stillroom.errors import UserError
from stillroom.evaluation.generation import prompts_at_once
from stillroom.evaluation.scoring import evaluate
from stillroom.experiment.sources import Sources
from stillroom.models.adapters import lora_adapter
from stillroom.models.hub import load_model
from stillroom.models.precision import default_device, release_memory
from stillroom.models.split_products import scoring_copy
from stillroom.offline_teacher_data import capture, made_from, verify_saved_data
from stillroom.offline_teacher_data.shards import plan_shards, token_batches
from stillroom.progress import NamedProgress, Progress, silent
from stillroom.training.batches import epoch_order
from stillroom.training.train_student import Trial, train

_STEPS = 8
_BATCHES = 5
_CHUNKS = 3
_FEW = 16
"""Examples of a chunk of choices on a CPU, and tokens after which a generation is timed first."""


@dataclass(frozen=True)
class Rate:
    """Seconds per unit, and half of its 95 % interval, by the spread of the pieces that were timed."""

    seconds: float
    error: float
    pieces: int


def rate_of(seconds: Sequence[float], units: Sequence[float]) -> Rate:
    """The ratio of the sums, and its standard error (Cochran, Sampling Techniques, 1977, ch. 6) times Student's t."""
    pieces, whole = len(seconds), sum(units)
    rate = sum(seconds) / whole
    residuals = sum((s - rate * u) ** 2 for s, u in zip(seconds, units, strict=True))
    deviation = math.sqrt(pieces * residuals / (pieces - 1)) / whole
    return Rate(rate, float(t.ppf(0.975, pieces - 1)) * deviation, pieces)


def measure_study(study: Study, progress: NamedProgress = silent) -> dict[str, Any]:
    """Time pieces of a study's stages; needs its models and data, and writes in a temporary folder alone.

    `machine`, `hours` by stage (`hours`, `error`, `pieces`) of all trials one after the other, and in `how` what was
    timed and what is left out. `UserError` for a study whose teacher data are imported.
    """
    if study.signals.imported:
        raise UserError("--measure times the teacher, which runs elsewhere (signals.imported): leave it out")
    with tempfile.TemporaryDirectory(prefix="stillroom-measure-") as temporary:
        folder = Path(temporary)
        paths = study.paths.model_copy(update={"results": folder / "results", "store": folder / "store"})
        sources = Sources(study.model_copy(update={"paths": paths}))
        study, examples = sources.study, sources.examples
        group = _largest(study)
        chosen = _drawn(examples.train, (_STEPS + 1) * study.training.batch_size)
        captured = _captured(sources, chosen, folder / "captured", _named(progress, "measuring the capture, examples"))
        with _threads_of_a_trial(study) as threads:
            stepped = _stepped(sources, group, chosen, folder, _named(progress, "measuring training, steps"))
            parts = [examples.validation, examples.test]
            scored = _scored(sources, parts, _named(progress, "measuring evaluation, chunks"))
    teacher = sum(map(len, encode_examples(sources.tokenizers[0], examples.all)))
    student = sum(map(len, encode_examples(sources.tokenizers[1], examples.train, add_eos=True)))
    trials, epochs = len(study.groups) * len(study.sweep.seeds), study.training.epochs
    evaluation, test = ({task: _count(part, task) for task in scored} for part in parts)
    hours = {
        "teacher": _hours([(captured, teacher)]),
        "training": _hours([(stepped, student * epochs * trials)]),
        "evaluation": _hours([(rate, evaluation[task] * epochs * trials) for task, rate in scored.items()]),
        "test_evaluation": _hours([(rate, test[task] * trials) for task, rate in scored.items()]),
    }
    return {"machine": _machine(), "hours": hours, "how": _how(study, group, hours, threads)}


def _largest(study: Study) -> Group:
    """The group of most terms; one that learns the teacher's answers is not measured: its store would need them."""
    candidates = [group for group in study.groups if group.objective(study.objective).task.targets != "teacher"]
    return max(candidates or [GROUPS["black_box"]], key=lambda group: len(group.terms))


def _drawn(examples: Sequence[Example], count: int) -> list[Example]:
    """So many of the examples at random, but always the same; where there are too few, some more than once."""
    shuffled = random.Random(0).sample(list(examples), len(examples))
    return (shuffled * math.ceil(count / len(shuffled)))[:count]


def _named(progress: NamedProgress, what: str) -> Progress:
    return lambda done, total: progress(what, done, total)


@contextmanager
def _threads_of_a_trial(study: Study) -> Iterator[int]:
    """On a CPU, as many threads as a trial has."""
    before = torch.get_num_threads()
    threads = min(before, study.sweep.cpus_per_trial) if default_device().type == "cpu" else before
    torch.set_num_threads(threads)
    try:
        yield threads
    finally:
        torch.set_num_threads(before)


def _captured(sources: Sources, needed: Sequence[Example], store: Path, progress: Progress) -> Rate:
    """Seconds per token of the teacher's batches, written to a store that has the examples needed."""
    study, tokenizer = sources.study, sources.tokenizers[0]
    wanted = {example.example_id: example for example in needed}
    everything = _drawn(sources.examples.all, len(sources.examples.all))
    lengths = dict(zip(everything, map(len, encode_examples(tokenizer, everything)), strict=True))
    tokens = sum(lengths[example] for example in wanted.values())
    for example, length in lengths.items():
        if tokens < _BATCHES * study.signals.batch_tokens and example.example_id not in wanted:
            wanted[example.example_id] = example
            tokens += length
    sample = list(wanted.values())
    settings = {
        "batch_tokens": min(study.signals.batch_tokens, tokens // _BATCHES),  # of a small corpus, smaller ones
        "shard_examples": len(sample),
        "teacher_answers": False,
    }
    signals = study.signals.model_copy(update=settings)
    encodings = encode_examples(tokenizer, sample)
    (rows,) = plan_shards(encodings, len(sample))
    batches = [sum(len(encodings[i]) for i in b) for b in token_batches(rows, encodings, signals.batch_tokens)]
    ends: list[float] = []

    def reported(done: int, total: int) -> None:
        ends.append(time.perf_counter())
        progress(done, total)

    model = load_model(sources.teacher_ref, study.teacher.dtype, "auto", study.teacher.quantization)
    origin = made_from("measured", study.teacher.dtype, tokenizer, signals, sample)
    capture(model, tokenizer, sample, signals, store, origin, reported)
    verify_saved_data(store)
    del model
    release_memory()
    return rate_of([after - before for before, after in pairwise(ends)], batches)


class _EnoughError(Exception):
    """As many steps as are timed have been taken."""


def _stepped(sources: Sources, group: Group, chosen: Sequence[Example], folder: Path, progress: Progress) -> Rate:
    """Seconds per token of a trial's steps after its first, batches made beside them; nothing is saved."""
    study = sources.study
    plain = {"epochs": 1, "warmup_steps": 0, "schedule": "constant", "gradient_interval": 0, "share_steps": 1}
    training = study.training.model_copy(update=plain)
    ends: list[float] = []

    def reported(done: int, total: int) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the step is only queued
        ends.append(time.perf_counter())
        progress(done, total)
        if done == total:
            raise _EnoughError

    lora = study.student.lora
    with suppress(_EnoughError):
        train(
            Trial("measured", group, 0),
            sources.student_ref,
            training,
            study.objective,
            study.evaluation,
            Examples(list(chosen), [chosen[0]], {}),
            folder / "captured",
            folder / "trial",
            max_length=study.corpus.max_length,
            adapter=lora_adapter(lora) if lora else None,
            progress=reported,
        )
    release_memory()
    lengths = [len(encoding) for encoding in encode_examples(sources.tokenizers[1], chosen, add_eos=True)]
    order = epoch_order(lengths, training.batch_size, training.bucket_batches, 0, 0)
    tokens = [sum(lengths[i] for i in batch) for batch in order]
    return rate_of([after - before for before, after in pairwise(ends)], tokens[1:])


def _scored(sources: Sources, parts: Sequence[Sequence[Example]], progress: Progress) -> dict[str, Rate]:
    """Seconds per example of each task, of the student before training."""
    study, tokenizer, device = sources.study, sources.tokenizers[1], default_device()
    settings = study.evaluation
    whole = load_model(sources.student_ref, "float32", device)
    model = scoring_copy(whole, study.training.precision, settings.dtype)
    held_out = [example for part in parts for example in part if task_of(example).kind != "text"]
    tasks = list(dict.fromkeys(example.task for example in held_out))
    rates = {}
    for number, task in enumerate(tasks):
        task_examples = [example for example in held_out if example.task == task]
        if task_examples[0].choices is None:
            size = min(prompts_at_once(settings, device.type), max(_count(part, task) for part in parts))
        else:
            mean = sum(map(len, encode_examples(tokenizer, task_examples))) / len(task_examples)
            size = math.ceil(settings.batch_tokens / mean) if device.type == "cuda" else _FEW
        drawn = _drawn(task_examples, (_CHUNKS + 1) * size)
        chunks = [drawn[first : first + size] for first in range(0, len(drawn), size)]
        _, *seconds = (_seconds_to_score(model, tokenizer, chunk, settings) for chunk in chunks)  # a warm-up
        rates[task] = rate_of(seconds, [size] * _CHUNKS)
        progress(number + 1, len(tasks))
    return rates


def _seconds_to_score(model: Any, tokenizer: Any, chunk: Sequence[Example], settings: Evaluation) -> float:
    """Of one chunk; a long generation is timed to two limits and extrapolated at the rate between them."""

    def seconds(limit: int) -> float:
        started = time.perf_counter()
        evaluate(model, tokenizer, chunk, settings.model_copy(update={"max_new_tokens": limit}))
        return time.perf_counter() - started

    limit, short, longer = settings.max_new_tokens, _FEW, 3 * _FEW
    if chunk[0].choices is not None or limit <= longer:
        return seconds(limit)
    before, after = seconds(short), seconds(longer)
    return before + (after - before) * (limit - short) / (longer - short)


def _count(examples: Sequence[Example], task: str) -> int:
    return sum(example.task == task for example in examples)


def _hours(parts: Sequence[tuple[Rate, float]]) -> dict[str, float]:
    """Of so many units at each rate; the rates err independently."""
    return {
        "hours": sum(rate.seconds * units for rate, units in parts) / 3600,
        "error": math.hypot(*(rate.error * units for rate, units in parts)) / 3600,
        "pieces": sum(rate.pieces for rate, _ in parts),
    }


def _machine() -> str:
    """The GPU's name, or the processor's."""
    if torch.cuda.is_available():
        return str(torch.cuda.get_device_name())
    try:
        described = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
    except OSError:
        described = []
    names = [line.partition(":")[2].strip() for line in described if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _how(study: Study, group: Group, hours: dict[str, dict[str, float]], threads: int) -> list[str]:
    pieces = {stage: int(measured["pieces"]) for stage, measured in hours.items()}
    return [
        f"on {_machine()}: {pieces['teacher']} batches of the teacher's capture, {pieces['training']} training steps "
        f"of {group.name}, taken for every group, and {_CHUNKS} chunks of each task's held-out examples, scored by the "
        "student before training",
        f"all trials together, one after the other, each with {threads} of the processor's threads; ± is half of a "
        "95 % interval by the spread of those pieces: it does not know how busy this machine will be",
        f"left out: fine-tuning the teacher, {'its answers, ' if study.signals.teacher_answers else ''}evaluating both "
        "models before training, loading and aligning, the validation loss, gradient measurements, checkpoints",
    ]
