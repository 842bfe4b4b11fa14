"""L_task and L_KD: where the student's next token is supervised, and where its distribution is compared.

Both read the output head's logits, so they share one pass over them (`output_head`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import transformers
from jaxtyping import Int, Int32
from numpy import ndarray
from torch import Tensor
from torch.utils.dlpack import from_dlpack

from stillroom.config import Objective
from stillroom.data.encoding import in_answer, in_text
from stillroom.data.prepared import Prepared
from stillroom.data.vocabulary import map_vocabulary, same_vocabulary
from stillroom.models.forward import Forward
from stillroom.models.output_head import logit_softcap, scaled_for_head
from stillroom.models.sizes import vocabulary_size
from stillroom.offline_teacher_data.store import SignalStore, StoredExample
from stillroom.terms.divergences import MIXING
from stillroom.terms.full_support import FullSupport, HiddenOutcomes
from stillroom.terms.output_head import HeadTargets, Outcomes, head_losses
from stillroom.terms.placebo import Placebo
from stillroom.terms.term import rows_taken


@dataclass(frozen=True)
class HeadPart:
    """The output head's part of a batch."""

    rows: Int[Tensor, "N"]
    """Where it runs, in (B, T) flattened: supervised rows, and others that are distilled; increasing."""
    targets: Int[Tensor, "N"]
    """Next student token at each of them; −1 where it is not supervised."""
    outcomes: Outcomes | HiddenOutcomes | None
    """What is distilled there; None where L_KD is off."""
    counts: Mapping[str, int]
    """Of `task` and `kd`: positions."""


class NextTokenTerms:
    """Both terms of one objective."""

    def __init__(
        self, objective: Objective, vocabulary_map: ndarray | None, support: FullSupport | None = None
    ) -> None:
        """`vocabulary_map`: from `teacher_to_student_ids`; None where L_KD is off. `support`: if it is full."""
        self._support = support
        self.settings, self._map = objective.kd, vocabulary_map
        self._distils = objective.weights["kd"] > 0
        self.placebo = self._distils and objective.kd.placebo

    @property
    def columns(self) -> tuple[str, ...]:
        """What it reads of the store."""
        if self._distils and self._support is not None:
            return ("hidden",)
        return ("topk_ids", "topk_logprobs", "tail_logprobs") if self._distils else ()

    def collate(self, items: Sequence[Prepared], stored: Sequence[StoredExample], longest: int) -> HeadPart:
        """Its part of a batch whose sequences are padded to `longest` tokens."""
        rows = np.concatenate([n * longest + item.positions.astype(np.int64) for n, item in enumerate(items)])
        targets = np.concatenate([item.targets.astype(np.int64) for item in items])
        if not self._distils:
            return HeadPart(torch.from_numpy(rows), torch.from_numpy(targets), None, {"task": len(targets)})
        pairs = [self.compared(item) for item in items]
        distilled = np.concatenate([n * longest + pair[:, 1].astype(np.int64) for n, pair in enumerate(pairs)])
        union = np.union1d(rows, distilled)
        whole = np.full(len(union), -1, dtype=np.int64)
        whole[np.searchsorted(union, rows)] = targets
        counts = {"task": len(targets), "kd": len(distilled)}
        outcomes = self._outcomes(stored, pairs, np.searchsorted(union, distilled))
        return HeadPart(torch.from_numpy(union), torch.from_numpy(whole), outcomes, counts)

    def misplaced(self, items: Sequence[Prepared], placebo: Placebo, longest: int) -> HeadPart:
        """The teacher's distributions permuted among the compared positions of a step's examples of one task."""
        stored = placebo.rows(items, self.columns, self.compared_by_teacher)
        return self.collate(items, stored, longest)

    def compared(self, item: Prepared) -> Int32[ndarray, "M 2"]:
        """(teacher, student) positions whose next-token distributions are compared."""
        assert item.alignment is not None
        everywhere = self.settings.positions != "answer"
        answer = in_text(item.encoding) if everywhere else in_answer(item.encoding, len(item.example.prompt))
        predictors = item.alignment.predictors
        following = predictors[:, 1] + 1
        inside = following < len(item.encoding)
        inside[inside] = answer[following[inside]]
        pairs: Int32[ndarray, "M 2"] = predictors[inside]
        return pairs

    def compared_by_teacher(self, item: Prepared) -> Int32[ndarray, "M"]:
        """The teacher's positions of them."""
        return self.compared(item)[:, 0]

    def _outcomes(
        self, stored: Sequence[StoredExample], pairs: Sequence[ndarray], rows: ndarray
    ) -> Outcomes | HiddenOutcomes:
        assert self._map is not None
        places = [pair[:, 0] for pair in pairs]
        if self._support is not None:
            return HiddenOutcomes(torch.from_numpy(rows), rows_taken(stored, "hidden", places))
        ids, logprobs, tails = (rows_taken(stored, column, places).numpy() for column in self.columns)
        mapped, valid, probs, other = map_outcomes(ids, logprobs, tails, self._map)
        some = valid.any(1)  # with no entry at all the other is the only outcome: the divergence is 0, exactly
        return Outcomes(*(torch.from_numpy(a[some]) for a in (rows, mapped, valid, probs, other)))

    def losses(
        self, model: transformers.PreTrainedModel, forward: Forward, part: HeadPart, weights: Mapping[str, float]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(weighted total, task sum, kd sum); `weights` of `task` and `kd`, each over the step's count."""
        head: Any = model.get_output_embeddings()
        targets = HeadTargets(
            part.targets,
            part.outcomes if weights["kd"] > 0 else None,
            weights["task"],
            weights["kd"],
            self.settings.temperature,
            logit_softcap(model.config),
            self.settings.divergence,
            MIXING.get(self.settings.divergence, 0.5) if self.settings.mixing is None else self.settings.mixing,
            None if self._support is None else self._support.to(part.rows.device),
        )
        rows = scaled_for_head(model, forward.last_hidden.flatten(0, 1)[part.rows])
        return head_losses(rows, head.weight, getattr(head, "bias", None), targets)


def next_token_of(
    objective: Objective, store: SignalStore | None, tokenizer: Any, model: transformers.PreTrainedModel
) -> NextTokenTerms:
    """Both terms of an objective for a student, its tokenizer and the teacher's data."""
    if objective.weights["kd"] <= 0:
        return NextTokenTerms(objective, None)
    if store is None:
        raise ValueError("the term kd needs the teacher's data")
    size = vocabulary_size(model)
    mapped = teacher_to_student_ids(store.tokenizer, tokenizer, store.manifest["vocabulary"], size)
    full = objective.kd.support == "full"
    return NextTokenTerms(objective, mapped, FullSupport(store.teacher_head, mapped, size) if full else None)


def teacher_to_student_ids(
    teacher_tokenizer: Any, student_tokenizer: Any, teacher_size: int, student_size: int
) -> ndarray:
    """`map_vocabulary` for the output head's sizes: entries beyond the tokenizer map only where all is equal."""
    mapped = map_vocabulary(teacher_tokenizer, student_tokenizer)
    whole = np.full(max(teacher_size, len(mapped)), -1, dtype=np.int64)
    whole[: len(mapped)] = mapped
    if same_vocabulary(teacher_tokenizer, student_tokenizer):
        whole[len(mapped) :] = np.arange(len(mapped), len(whole))
    whole[whole >= student_size] = -1
    return whole


def map_outcomes(
    teacher_ids: ndarray, logprobs: ndarray, tail_logprobs: ndarray, vocabulary_map: ndarray
) -> tuple[ndarray, ndarray, ndarray, ndarray]:
    """Teacher top-k (M, K) and tail (M) in student ids: (ids, valid, probs, other), which sum to 1.

    Teacher ids that share a student id add up in one entry; unmapped ones and the tail go to the other. What storing
    has rounded is divided by its sum, so that a student that equals its teacher has a KL of 0.
    """
    ids = vocabulary_map[teacher_ids.astype(np.int64)]
    probs = np.exp(from_dlpack(logprobs).float().numpy())  # of read-only memory too; casts float16 ten times as fast
    valid = ids >= 0
    other = np.exp(tail_logprobs.astype(np.float64)) + np.where(valid, 0.0, probs).sum(1, dtype=np.float64)
    shared = np.bincount(vocabulary_map[vocabulary_map >= 0], minlength=1) > 1
    some = (shared[ids] & valid).sum(1) > 1  # the other rows need no sorting
    ids[some], valid[some], probs[some] = _merge_repeated(ids[some], valid[some], probs[some])
    probs = np.where(valid, probs, 0.0)
    whole = probs.sum(1, dtype=np.float64) + other
    probs, other = (probs / whole[:, None]).astype(np.float32), (other / whole).astype(np.float32)
    first = np.take_along_axis(ids, valid.argmax(1)[:, None], 1)
    return np.where(valid, ids, first), valid, probs, other


def _merge_repeated(ids: ndarray, valid: ndarray, probs: ndarray) -> tuple[ndarray, ndarray, ndarray]:
    order = np.argsort(ids, axis=1, kind="stable")
    ids, valid, probs = (np.take_along_axis(a, order, 1) for a in (ids, valid, probs))
    repeated = np.zeros_like(valid)
    repeated[:, 1:] = (ids[:, 1:] == ids[:, :-1]) & valid[:, 1:]
    if repeated.any():
        starts = np.flatnonzero(~repeated.ravel())
        sums = np.zeros(probs.size, dtype=probs.dtype)
        sums[starts] = np.add.reduceat(probs.ravel(), starts)
        probs, valid = sums.reshape(probs.shape), valid & ~repeated
    return ids, valid, probs
