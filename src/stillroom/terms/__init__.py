"""What the student is asked for: a file a loss term, one line each in the registry."""

from __future__ import annotations

from typing import Any

from stillroom.config import Objective
from stillroom.offline_teacher_data.store import SignalStore
from stillroom.terms.attention_maps import AttentionTerm
from stillroom.terms.hidden_states import HiddenTerm
from stillroom.terms.next_token import NextTokenTerms, next_token_of, teacher_to_student_ids
from stillroom.terms.term import Part, Term
from stillroom.terms.value_relations import ValueRelations

TERMS: tuple[Any, ...] = (HiddenTerm, AttentionTerm, ValueRelations)
"""The white-box terms, in the order they are added up; `task` and `kd` are `NextTokenTerms`'s."""


def terms_of(objective: Objective, store: SignalStore | None, student: Any) -> tuple[Term, ...]:
    """The white-box terms that are on; `student` is its model's configuration."""
    on = [term for term in TERMS if objective.weights[term.name] > 0]
    if on and store is None:
        raise ValueError(f"the term {on[0].name} needs the teacher's data")
    return tuple(term(getattr(objective, term.name), store, student) for term in on)


__all__ = ["TERMS", "NextTokenTerms", "Part", "Term", "next_token_of", "teacher_to_student_ids", "terms_of"]
