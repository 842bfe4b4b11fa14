"""What the student is asked for: a file a loss term, one line each in the registry."""

from __future__ import annotations

from typing import Any

from stillroom.config import Objective, Study
from stillroom.offline_teacher_data.store import SignalStore
from stillroom.terms.attention_maps import AttentionTerm
from stillroom.terms.hidden_states import HiddenTerm, projectors_of
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


def compared(study: Study) -> dict[str, dict[str, Any]]:
    """What each group compares with the teacher, by the group's name.

    `terms`; `layers`: pairs [teacher's, student's] of each term that compares layers; `projectors`: their number.
    """
    found: dict[str, dict[str, Any]] = {}
    for group in study.groups:
        objective = group.objective(study.objective)
        found[group.name] = {
            "terms": group.terms,
            "layers": {term: objective.layers(term) for term in group.layer_terms},
            "projectors": projectors_of(objective.hidden) if "hidden" in group.terms else 0,
        }
    return found


__all__ = [
    "TERMS",
    "NextTokenTerms",
    "Part",
    "Term",
    "compared",
    "next_token_of",
    "teacher_to_student_ids",
    "terms_of",
]
