"""What a study is made from: its models, tokenizers and examples, and what pins each of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from stillroom.config import BASELINE_LABELS, ModelRef, Study, fingerprint
from stillroom.data.chat_templates import chat_template_hash, encode_examples, encode_prompts
from stillroom.data.corpus import (
    Examples,
    build_corpus,
    examples_digest,
    load_corpus,
    save_corpus,
    with_test_splits,
)
from stillroom.data.encoding import encode
from stillroom.data.label_noise import without_label_noise
from stillroom.data.rows import require_unchanged, source_digest
from stillroom.data.tasks import Example, task_of
from stillroom.data.vocabulary import largest_id
from stillroom.errors import UserError
from stillroom.evaluation.baselines import Baseline
from stillroom.evaluation.decoding import fixed_cache, require_generation, require_static_cache
from stillroom.evaluation.harness_tasks import Harness, harness_files
from stillroom.files import exclusive, remove_leftovers
from stillroom.folders import ResultsFolder
from stillroom.models.architecture import PROBE, check_capture, check_model, try_miniature
from stillroom.models.builtin_pair import materialise
from stillroom.models.hub import (
    load_config,
    load_tokenizer,
    model_identity,
    require_embedded,
    require_quantization,
    tokenizer_hash,
)
from stillroom.models.precision import allow_determinism, resolve_precision
from stillroom.models.sizes import context_length
from stillroom.progress import NamedProgress, silent
from stillroom.provenance import Meter
from stillroom.training.batches import coverage_between, require_coverage
from stillroom.training.optimizers import require_optimizers


@dataclass
class Sources:
    """A study with its models, tokenizers and examples, each made or read on first use."""

    study: Study
    progress: NamedProgress = silent
    meter: Meter = field(default_factory=Meter)
    _supported: bool = field(default=False, init=False)
    _aligned: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        """What `auto` stands for on this machine is part of the study's identity."""
        self.study = resolve_precision(self.study)
        if self.study.training.deterministic or self.study.teacher.fine_tune.training.deterministic:
            allow_determinism()  # before anything is computed

    def require_supported(self) -> None:
        """Try both architectures once, small and at random: to be called before anything is trained or captured.

        Raises `UserError` naming one that cannot do what the study asks. Where no small model can be built, the
        model is checked when it is loaded.
        """
        if self._supported:
            return
        require_quantization(self.study.teacher.quantization)
        require_optimizers(self.study)
        models = [(self.student_ref, self.study.captures_student)]
        if not self.study.signals.imported:
            models.insert(0, (self.teacher_ref, True))
        for ref, captured in models:
            if (model := try_miniature(load_config(ref))) is not None:
                (check_capture if captured else check_model)(model, PROBE)
                if self.study.evaluation.static_cache:
                    require_static_cache(model)
        self._supported = True

    def require_aligned(self) -> None:
        """Raise `UserError` where less of the corpus is aligned than the study allows, as each of its trials would."""
        if self._aligned:
            return
        if (floor := self.study.signals.minimum_coverage) > 0:
            examples = [*self.examples.train, *self.examples.validation]
            require_coverage(coverage_between(examples, *self.tokenizers), floor)
        self._aligned = True

    @property
    def results(self) -> Path:
        """The results folder."""
        return self.study.paths.results

    @property
    def folder(self) -> ResultsFolder:
        """What lies in it, by name."""
        return ResultsFolder(self.results)

    @property
    def store_path(self) -> Path:
        """The folder of the teacher's data."""
        return self.study.paths.store_path

    @cached_property
    def teacher_ref(self) -> ModelRef:
        """The teacher before fine-tuning, built-in ones written to disk."""
        return materialise(self.study.teacher, self.folder.models)

    @cached_property
    def student_ref(self) -> ModelRef:
        """The student before training, a built-in one written to disk."""
        return materialise(self.study.student, self.folder.models)

    @cached_property
    def student_identity(self) -> str:
        """What pins the student."""
        return model_identity(self.student_ref)

    @cached_property
    def tokenizers(self) -> tuple[Any, Any]:
        """The teacher's and the student's."""
        return self._tokenizer(self.teacher_ref), self._tokenizer(self.student_ref)

    def _tokenizer(self, ref: ModelRef) -> Any:
        """A model's tokenizer, whose EOS and other added tokens the model knows."""
        tokenizer = load_tokenizer(ref)
        require_embedded(ref, tokenizer, [*encode(tokenizer, "a").ids.tolist(), tokenizer.eos_token_id])
        return tokenizer

    @cached_property
    def examples(self) -> Examples:
        """The corpus, built on first use and then read."""
        folder = self.folder.corpus
        remove_leftovers(self.results, within=True)
        for place in (self.store_path, self.store_path.parent):
            remove_leftovers(place)
        harness = self.study.evaluation.harness_splits
        test, longest = self.study.test_splits, self._context - self.study.evaluation.max_new_tokens
        if self.study.corpus.max_length > self._context:
            raise UserError(
                f"corpus.max_length={self.study.corpus.max_length}: a model reads {self._context} tokens at most"
            )
        sources = [*self.study.corpus.tasks.values(), *test.values()]
        digests = [source_digest(data) for data in sources]
        digest = fingerprint(
            self.study.corpus,
            {name: data.model_dump() for name, data in test.items()},
            longest,
            [tokenizer_hash(t) for t in self.tokenizers],
            digests,
            *(template for templates in self._templates for template in templates),
            *harness_files(harness),
        )
        if (examples := _known_corpus(folder, digest)) is None:
            self.require_supported()
            # the processes of a divided capture start together
            with exclusive(folder, "build of the corpus", wait=600):
                if (examples := _known_corpus(folder, digest)) is None:
                    described = Harness.load(harness).described if harness else {}
                    examples = replace(build_corpus(self.study.corpus, self.tokenizers), harness=dict(described))
                    examples = with_test_splits(examples, test, self.study.corpus, self.tokenizers, longest)
                    require_unchanged(sources, digests)
                    self._require_embedded([*examples.all, *examples.test])
                    save_corpus(examples, folder, digest)
        generated = [example for example in examples.validation if task_of(example).kind == "generation"]
        answered = examples.all if self.study.signals.teacher_answers else generated
        self._require_room(answered, longest)
        tested = [example for example in examples.test if task_of(example).kind == "generation"]
        self._require_writers([] if self.study.signals.imported else [*answered, *tested], [*generated, *tested])
        return examples

    def _require_embedded(self, examples: Sequence[Example]) -> None:
        """`UserError` where a text has a token that its model has no embedding for."""
        for ref, tokenizer in zip((self.teacher_ref, self.student_ref), self.tokenizers, strict=True):
            if largest_id(tokenizer) >= (getattr(load_config(ref).get_text_config(), "vocab_size", None) or 0):
                for encoding in encode_examples(tokenizer, examples):
                    require_embedded(ref, tokenizer, encoding.ids.tolist())

    def _require_room(self, examples: Sequence[Example], room: int) -> None:
        """`UserError` unless after every prompt both models can still read what they generate."""
        found = max(_longest_prompt(tokenizer, examples) for tokenizer in self.tokenizers)
        if found > room:
            raise UserError(
                f"evaluation.max_new_tokens={self.study.evaluation.max_new_tokens}: with a prompt of {found} tokens "
                f"that is more than the {self._context} a model reads; lower it or corpus.max_length"
            )

    def _require_writers(self, teachers: Sequence[Example], students: Sequence[Example]) -> None:
        """`UserError` naming a model that cannot write texts in a batch, or not in a cache of fixed size."""
        asked = ((self.teacher_ref, teachers), (self.student_ref, students))
        for (ref, examples), tokenizer in zip(asked, self.tokenizers, strict=True):
            if not examples:
                continue
            if self.study.evaluation.static_cache:
                room = _longest_prompt(tokenizer, examples) + self.study.evaluation.max_new_tokens
                fixed_cache(load_config(ref), room)
            elif (model := try_miniature(config := load_config(ref))) is not None:
                require_generation(model, config)

    @cached_property
    def _context(self) -> int:
        """Tokens that both models can read."""
        return min(context_length(load_config(ref)) for ref in (self.teacher_ref, self.student_ref))

    @cached_property
    def teacher_identity(self) -> str:
        """What pins the teacher: its weights and, if it is fine-tuned, how and on what."""
        base = model_identity(self.teacher_ref)
        quantised = f" in {self.study.teacher.quantization}" if self.study.teacher.quantization else ""
        if self.study.teacher.fine_tune.method == "none":
            return base + quantised
        return f"{base} adapted {self.fine_tuning_fingerprint(base)}{quantised}"

    @cached_property
    def measured_baselines(self) -> list[Baseline]:
        """The baselines that are measured: teacher and student before training, on validation and on test splits."""
        settings, folder = self.study.evaluation, self.folder.baselines
        teacher, student = (self.teacher_identity, self.study.teacher.dtype), (self.student_identity, settings.dtype)
        test = (self.examples.test, self.examples.harness)
        splits = {"validation": (self.examples.validation, {}), "test": test}
        return [
            Baseline(folder, role, split, *model, examples, settings, harness, self._templates[number])
            for number, (role, model) in enumerate(zip(BASELINE_LABELS, (teacher, student), strict=True))
            for split, (examples, harness) in splits.items()
            if (examples or harness)
            and not (role == "teacher" and self.study.signals.imported)  # whose weights are elsewhere
        ]

    def fine_tuning_fingerprint(self, base: str) -> str:
        """What a fine-tuned teacher was made from; `base` pins the teacher before it."""
        digest = examples_digest(self.fine_tuning_examples.train)
        return fingerprint(base, self.study.teacher.fine_tune, digest, *self._templates[0])

    @property
    def _templates(self) -> list[list[str]]:
        """What pins the teacher's chat template, and the student's; nothing where there are no chats."""
        return [[chat_template_hash(t)] if self.study.has_chats else [] for t in self.tokenizers]

    @cached_property
    def fine_tuning_examples(self) -> Examples:
        """The corpus as the teacher is fine-tuned on it: without label noise."""
        return replace(self.examples, train=without_label_noise(self.examples.train))


def _longest_prompt(tokenizer: Any, examples: Sequence[Example]) -> int:
    """The most tokens that a prompt has."""
    return max(map(len, encode_prompts(tokenizer, examples)), default=0)


def _known_corpus(folder: Path, digest: str) -> Examples | None:
    if not (folder / "corpus.json").is_file():
        return None
    examples, found = load_corpus(folder)
    return examples if found == digest else None
