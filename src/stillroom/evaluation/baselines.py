"""Baselines: the student before training, which trials start from, and the teacher, measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import transformers

from stillroom.config import Evaluation, Precision, fingerprint
from stillroom.data.chat_templates import encode_examples
from stillroom.data.tasks import Example
from stillroom.evaluation.harness_tasks import Harness
from stillroom.evaluation.metrics import Metric, accuracy_metrics, nll_metrics, save_predictions
from stillroom.evaluation.scoring import evaluate
from stillroom.files import read_json, write_json
from stillroom.models.architecture import check_model
from stillroom.models.forward import padded
from stillroom.progress import Progress, silent


@dataclass(frozen=True)
class Baseline:
    """One baseline on one split, and where its measurement is kept."""

    folder: Path
    role: str
    """`teacher` or `student`."""
    split: str
    """`validation` or `test`."""
    identity: str
    """What pins the model."""
    precision: Precision
    examples: list[Example]
    settings: Evaluation
    harness: Mapping[str, dict[str, Any]] = field(default_factory=dict)
    """What pins the test splits that lm-evaluation-harness evaluates, by name."""
    template: Sequence[str] = ()
    """What pins the chat template, if there are chats."""

    @property
    def name(self) -> str:
        """File name: the role; with `_test` on the test splits."""
        return self.role if self.split == "validation" else f"{self.role}_{self.split}"

    @property
    def path(self) -> Path:
        """The metrics; the predictions are beside them, as Parquet."""
        return self.folder / f"{self.name}.json"

    @cached_property
    def fingerprint(self) -> str:
        """Of all that decides the numbers."""
        how = self.settings.model_dump(exclude={"test_splits"})
        examples = [e.example_id for e in self.examples]
        harness = [self.harness] if self.harness else []
        return fingerprint(self.identity, self.precision, how, self.split, examples, *harness, *self.template)

    def read(self) -> dict[str, Any] | None:
        """The measurement, if it was made; None for one of another model, other examples or other settings."""
        if not self.path.is_file():
            return None
        found: dict[str, Any] = read_json(self.path, "fingerprint", "metrics")
        return found if found["fingerprint"] == self.fingerprint else None

    def measure(
        self, model: transformers.PreTrainedModel, tokenizer: Any, progress: Progress = silent
    ) -> dict[str, Any]:
        """Accuracy and answer likelihood; kept in `path`, predictions beside it."""
        metrics: list[Metric] = []
        likelihoods: dict[str, float] = {}
        if self.examples:
            ids, _ = padded(encode_examples(tokenizer, self.examples[:1]), device=model.device)
            check_model(model, ids)
            predictions = evaluate(model, tokenizer, self.examples, self.settings, progress)
            save_predictions(predictions, self.path.with_suffix(".parquet"))
            metrics, likelihoods = accuracy_metrics(predictions, self.split), nll_metrics(predictions)
        if self.harness:
            harness = Harness.load(self.settings.harness_splits, self.harness)
            metrics += harness.metrics(model, tokenizer, self.settings)
        result = {
            "fingerprint": self.fingerprint,
            "identity": self.identity,
            "metrics": metrics,
            "answer_nll": likelihoods,
        }
        write_json(self.path, result)
        return result
