"""The loss terms, their weights and scales, and the groups that switch them on."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from stillroom.config.section import Name, Section

Term = Literal["task", "kd", "hidden", "attention"]
TERMS: tuple[Term, ...] = ("task", "kd", "hidden", "attention")
WEAK_SIGNAL = 0.01
"""A term under this share of the gradient is flagged: the group may be its baseline in all but name."""


class Objective(Section):
    """Weights and scales of the loss terms, shared by the groups unless a group says otherwise."""

    weights: dict[Term, Annotated[float, Field(ge=0)]] = Field(
        {"task": 1.0, "kd": 0.5, "hidden": 0.1, "attention": 0.1}, description="what each term is multiplied by"
    )
    temperature: float = Field(1.0, gt=0, description="τ of the KL term, which is multiplied by τ²")
    hidden_scale: Literal["none", "teacher_rms"] = Field(
        "none", description="plain mean square, or divided by that of the teacher's hidden states"
    )
    attention_scale: Literal["none", "row_sum"] = Field(
        "none", description="mean over columns, which shrinks with length, or sum over columns and mean over rows"
    )
    kd_positions: Literal["answer", "all"] = Field(
        "answer", description="where the KL is taken: the answer, or the whole text"
    )

    @model_validator(mode="after")
    def _all_weights(self) -> Objective:
        missing = [t for t in TERMS if t not in self.weights]
        if missing:
            raise ValueError(f"weights must name every term; missing: {', '.join(missing)}")
        return self


class Group(Section):
    """One experimental group: the terms that are on, and its own settings where they differ."""

    name: Name = Field(description="names the group in every table; `config/distill_type` in the summary")
    terms: tuple[Term, ...] = Field(min_length=1, description="the loss terms that are on")
    weights: dict[Term, Annotated[float, Field(ge=0)]] = Field({}, description="those that differ from the objective's")
    temperature: float | None = Field(None, gt=0, description="default: the objective's")
    hidden_scale: Literal["none", "teacher_rms"] | None = Field(None, description="default: the objective's")
    attention_scale: Literal["none", "row_sum"] | None = Field(None, description="default: the objective's")
    kd_positions: Literal["answer", "all"] | None = Field(None, description="default: the objective's")

    def objective(self, shared: Objective) -> Objective:
        """The objective of this group: `shared` with this group's settings, weight 0 for a term that is off."""
        own = self.model_dump(exclude={"name", "terms", "weights"}, exclude_none=True)
        weights = {t: (self.weights.get(t, shared.weights[t]) if t in self.terms else 0.0) for t in TERMS}
        return Objective(**{**shared.model_dump(), **own, "weights": weights})


GROUPS: dict[str, Group] = {
    group.name: group
    for group in (
        Group(name="task_only", terms=("task",)),
        Group(name="black_box", terms=("task", "kd")),
        Group(name="hidden", terms=("task", "kd", "hidden")),
        Group(name="attention", terms=("task", "kd", "attention")),
        Group(name="combined", terms=("task", "kd", "hidden", "attention")),
    )
}


def _shipped_group(value: Any) -> Any:
    """Let a study name a shipped group by its name alone."""
    if not isinstance(value, str):
        return value
    if value not in GROUPS:
        raise ValueError(f"unknown group {value!r}; shipped: {', '.join(GROUPS)}; or declare it with name and terms")
    return GROUPS[value]


StudyGroup = Annotated[Group, BeforeValidator(_shipped_group)]
"""A group as a study lists it: declared, or a shipped one's name."""
