"""How long examples are, counted or assumed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stillroom.config import BenchmarkSplit, Study, TaskData
from stillroom.data.chat_templates import encode_examples
from stillroom.data.corpus import Examples, build_corpus
from stillroom.data.encoding import encode
from stillroom.preflight.design import sized

_TOKENS: dict[str, tuple[float, float, float]] = {
    "sst2": (28.3, 28.9, 465.0),
    "mmlu": (134.7, 139.0, 13074.0),
    "gsm8k": (199.1, 203.6, 22384.0),
}
"""Mean teacher tokens, student tokens and T(T+1)/2 of an example, under the tokenizers of Mistral and TinyLlama."""


_UNKNOWN = 1000
"""Examples of a task where all are asked for and its rows are out of reach."""


@dataclass(frozen=True)
class Lengths:
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


def count(study: Study, drawn: Drawn) -> dict[str, Lengths]:
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
        result[name] = Lengths(teacher, student, float((teacher * (teacher + 1) / 2).mean()))
    return result


def assume(study: Study, rows: Mapping[str, int], assumptions: list[str]) -> dict[str, Lengths]:
    """Mean tokens known of a task, or half of `max_length`, by task; what is assumed is added to `assumptions`."""
    result, asked = {}, study.corpus.tasks
    for name, data in counted(study, rows).corpus.tasks.items():
        half = study.corpus.max_length / 2
        teacher, student, triangle = _TOKENS.get(name, (half, half, half * (half + 1) / 2))
        source = "measured with Mistral's and TinyLlama's tokenizers" if name in _TOKENS else "half of max_length"
        assumptions.append(f"{name}: {teacher:g} tokens per example ({source})")
        if asked[name].examples == "all" and f"corpus.tasks.{name}" not in rows:
            assumptions.append(f"{name}: all of its rows, {_UNKNOWN:,} (they cannot be counted)")
        result[name] = Lengths(np.full(sized(data), teacher), np.full(sized(data), student), triangle)
    return result


def counted(study: Study, rows: Mapping[str, int]) -> Study:
    """The study with numbers in place of `examples: all`: `rows` of each data set, by field."""

    def number(place: str, data: TaskData | BenchmarkSplit) -> dict[str, int]:
        return {"examples": rows.get(place, _UNKNOWN)} if data.examples == "all" else {}

    test_splits = study.test_splits  # only the harness knows how many examples its own tasks have
    tasks = {n: d.model_copy(update=number(f"corpus.tasks.{n}", d)) for n, d in study.corpus.tasks.items()}
    splits = {
        n: s.model_copy(update=number(f"evaluation.test_splits.{n}", s)) if n in test_splits else s
        for n, s in study.evaluation.test_splits.items()
    }
    corpus = study.corpus.model_copy(update={"tasks": tasks})
    evaluation = study.evaluation.model_copy(update={"test_splits": splits})
    return study.model_copy(update={"corpus": corpus, "evaluation": evaluation})
