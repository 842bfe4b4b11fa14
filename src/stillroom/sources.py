"""What a study is made from: its models, tokenizers and examples, and what pins each of them."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from stillroom.builtin_pair import materialise
from stillroom.config import ModelRef, Study, UserError, fingerprint
from stillroom.corpus import (
    Examples,
    build_corpus,
    examples_digest,
    load_corpus,
    save_corpus,
    source_digest,
    with_official,
)
from stillroom.models import context_length, load_config, load_tokenizer, model_identity, tokenizer_hash
from stillroom.provenance import Meter, exclusive


class Progress(Protocol):
    """Called with what is going on, how much of it is done, and a note that changes with it."""

    def __call__(self, what: str, done: int, total: int, note: str = "") -> None:
        """Show it."""


def _silent(what: str, done: int, total: int, note: str = "") -> None:
    return None


@dataclass
class Sources:
    """A study with its models, tokenizers and examples, each made or read on first use."""

    study: Study
    progress: Progress = _silent
    meter: Meter = field(default_factory=Meter)

    @property
    def results(self) -> Path:
        """The results folder."""
        return self.study.paths.results

    @property
    def store_path(self) -> Path:
        """The folder of the teacher's data."""
        return self.study.paths.store_path

    @cached_property
    def teacher_ref(self) -> ModelRef:
        """The teacher before adaptation, built-in ones written to disk."""
        return materialise(self.study.teacher, self.results / "models")

    @cached_property
    def student_ref(self) -> ModelRef:
        """The untouched student."""
        return materialise(self.study.student, self.results / "models")

    @cached_property
    def student_identity(self) -> str:
        """What pins the student."""
        return model_identity(self.student_ref)

    @cached_property
    def tokenizers(self) -> tuple[Any, Any]:
        """The teacher's and the student's."""
        return load_tokenizer(self.teacher_ref), load_tokenizer(self.student_ref)

    @cached_property
    def examples(self) -> Examples:
        """The corpus, built on first use and then read."""
        folder = self.results / "corpus"
        official, longest = self.study.official, self._context - self.study.evaluation.max_new_tokens
        if self.study.corpus.max_length > self._context:
            raise UserError(
                f"corpus.max_length={self.study.corpus.max_length}: a model reads {self._context} tokens at most"
            )
        own = fingerprint(
            self.study.corpus,
            {name: data.model_dump() for name, data in official.items()},
            longest,
            [tokenizer_hash(t) for t in self.tokenizers],
            [source_digest(data) for data in (*self.study.corpus.tasks.values(), *official.values())],
        )
        if (known := _known_corpus(folder, own)) is not None:
            return known
        with exclusive(folder, "process", wait=-1):  # the processes of a divided capture start together
            if (known := _known_corpus(folder, own)) is not None:
                return known
            examples = build_corpus(self.study.corpus, self.tokenizers)
            examples = with_official(examples, official, self.study.corpus, self.tokenizers, longest)
            save_corpus(examples, folder, own)
        return examples

    @cached_property
    def _context(self) -> int:
        """Tokens that both models can read."""
        return min(context_length(load_config(ref)) for ref in (self.teacher_ref, self.student_ref))

    @cached_property
    def teacher_identity(self) -> str:
        """What pins the teacher: its weights and, if it is adapted, how and on what."""
        base = model_identity(self.teacher_ref)
        if self.study.teacher.adapt.method == "none":
            return base
        return f"{base} adapted {self.adaptation_fingerprint(base)}"

    def adaptation_fingerprint(self, base: str) -> str:
        """What an adapted teacher was made from; `base` pins the teacher before it."""
        return fingerprint(base, self.study.teacher.adapt, examples_digest(self.examples.train))


def _known_corpus(folder: Path, own: str) -> Examples | None:
    if not (folder / "corpus.json").is_file():
        return None
    examples, found = load_corpus(folder)
    return examples if found == own else None
