"""The loss terms, each with its settings, and the groups that switch them on."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    SerializerFunctionWrapHandler,
    field_serializer,
    model_validator,
)

from stillroom.config.section import Layer, Name, Section, later

TermName = Literal["task", "kd", "hidden", "attention", "values"]
TERMS: tuple[TermName, ...] = ("task", "kd", "hidden", "attention", "values")
Divergence = Literal[
    "forward_kl", "reverse_kl", "jensen_shannon", "skewed_forward_kl", "skewed_reverse_kl", "total_variation"
]
LayerTerm = Literal["hidden", "attention", "values"]
LAYER_TERMS: tuple[LayerTerm, ...] = ("hidden", "attention", "values")
"""Those that compare the teacher's layers with the student's."""
_MIXED = ("jensen_shannon", "skewed_forward_kl", "skewed_reverse_kl")
WEAK_SIGNAL = 0.01
"""A term under this share of the gradient is flagged: the group may be its baseline in all but name."""

Weight = Annotated[float, Field(ge=0, description="what the term is multiplied by")]


class TaskLoss(Section):
    """L_task: cross-entropy on the answer."""

    weight: Weight = 1.0
    targets: Literal["gold", "teacher"] = later(
        "gold",
        description="answer that is learnt: the example's, or the teacher's own greedy one (task term alone; needs "
        "signals.teacher_answers)",
    )


class OfTeacher(Section):
    """What every term that compares with the teacher's values has."""

    placebo: bool = later(False, description="set by a group's `placebo`")
    share: float | None = later(None, gt=0, lt=1, description="set by a group's `share`")


class Distillation(OfTeacher):
    """L_KD: a divergence of the teacher's next-token distribution from the student's."""

    weight: Weight = 0.5
    divergence: Divergence = Field(
        "forward_kl", description="taken over the mapped top k plus one outcome for all other tokens"
    )
    mixing: float | None = Field(
        None, gt=0, lt=1, description="β of jensen_shannon, by default 0.5; λ of the skewed ones, by default 0.1"
    )
    support: Literal["top_k", "full"] = later(
        "top_k",
        description="outcomes that are compared: the teacher's top k, or every token, its distribution remade of its "
        "last hidden state (needs signals.teacher_head)",
    )
    temperature: float = Field(1.0, gt=0, description="τ of both distributions; the term is multiplied by τ²")
    positions: Literal["answer", "all"] = Field(
        "answer", description="positions it is averaged over: the answer, or the whole text"
    )


class Hidden(OfTeacher):
    """L_align_hidden: a distance of hidden states at aligned tokens."""

    weight: Weight = 0.1
    distance: Literal["mse", "cosine", "gram", "cka"] = Field(
        "mse", description="of projected states (mse, cosine), or of how an example's tokens relate (gram, cka)"
    )
    scale: Literal["none", "teacher_rms"] = Field(
        "none", description="of mse: the plain mean square, or divided by that of the teacher's hidden states"
    )
    layers: tuple[tuple[Layer, Layer], ...] = Field(
        (("last", "last"),), min_length=1, description="pairs [teacher's, student's], each with a projector; their mean"
    )


class Attention(OfTeacher):
    """L_align_attn: a distance of attention maps over the segments that both models have read."""

    weight: Weight = 0.1
    distance: Literal["mse", "kl"] = Field(
        "mse", description="squared difference, or KL(teacher's row ‖ student's row)"
    )
    scale: Literal["none", "row_sum"] = Field(
        "none", description="of mse: mean over columns, which shrinks with length, or sum over them and mean over rows"
    )
    layers: tuple[tuple[Layer, Layer], ...] = Field(
        (("last", "last"),), min_length=1, description="pairs [teacher's, student's]; their mean"
    )


class Values(OfTeacher):
    """L_align_values: KL of value relations, rows of softmax(V Vᵀ/√d) at aligned tokens (MiniLMv2)."""

    weight: Weight = 0.1
    relation_heads: int = Field(8, ge=1, description="heads that the value vectors of both models are split into")
    layers: tuple[tuple[Layer, Layer], ...] = Field(
        (("last", "last"),), min_length=1, description="pairs [teacher's, student's]; their mean"
    )


def _mixing_where_there_is_one(section: Distillation) -> Any:
    if section.mixing is not None and section.divergence not in _MIXED:
        raise ValueError(f"divergence {section.divergence} has no mixing ({', '.join(_MIXED)} have): leave it out")
    return section


def _scale_of_mse_alone(section: Hidden | Attention) -> Any:
    if section.distance != "mse" and section.scale != "none":
        raise ValueError(f"scale {section.scale} belongs to mse, and distance is {section.distance}: leave it out")
    return section


class Objective(Section):
    """Every term with its settings, shared by the groups unless a group says otherwise."""

    task: TaskLoss = TaskLoss()
    kd: Annotated[Distillation, AfterValidator(_mixing_where_there_is_one)] = Distillation()
    hidden: Annotated[Hidden, AfterValidator(_scale_of_mse_alone)] = Hidden()
    attention: Annotated[Attention, AfterValidator(_scale_of_mse_alone)] = Attention()
    values: Values = Values()

    @property
    def weights(self) -> dict[TermName, float]:
        """What each term is multiplied by; 0: off."""
        return {term: getattr(self, term).weight for term in TERMS}

    def layers(self, term: LayerTerm) -> tuple[tuple[Layer, Layer], ...]:
        """Pairs [teacher's, student's] that a term compares."""
        pairs: tuple[tuple[Layer, Layer], ...] = getattr(self, term).layers
        return pairs


class Group(Section):
    """One experimental group: the terms that are on, and its own settings of them where they differ."""

    name: Name = Field(description="names the group in every table; `config/distill_type` in the summary")
    terms: tuple[TermName, ...] = Field(min_length=1, description="the loss terms that are on")
    task: TaskLoss | None = Field(None, description="settings that differ from the objective's")
    kd: Distillation | None = Field(None, description="settings that differ from the objective's")
    hidden: Hidden | None = Field(None, description="settings that differ from the objective's")
    attention: Attention | None = Field(None, description="settings that differ from the objective's")
    values: Values | None = Field(None, description="settings that differ from the objective's")
    placebo: tuple[Literal["kd", "hidden", "attention", "values"], ...] = later(
        (),
        description="terms that get the teacher's values in the wrong places: what they gain is not the signal's",
    )

    share: dict[Literal["kd", "hidden", "attention", "values"], Annotated[float, Field(gt=0, lt=1)]] = later(
        {},
        description="terms' shares of the gradient, in place of their weights: found in a trial's first "
        "training.share_steps steps, then fixed",
    )

    @model_validator(mode="after")
    def _settings_of_terms_that_are_on(self) -> Group:
        for term in TERMS:
            settings = getattr(self, term)
            if settings is not None and term not in self.terms:
                raise ValueError(f"has settings for {term}, which is not among its terms {list(self.terms)}")
            for name, way in (("placebo", f"placebo: [{term}]"), ("share", f"share: {{{term}: 0.1}}")):
                if settings is not None and name in settings.model_fields_set:
                    raise ValueError(f"has {term}.{name}: write {way} beside terms instead")
            if settings is not None and term in self.share and "weight" in settings.model_fields_set:
                raise ValueError(f"has a share and a weight of {term}: leave one out")
        for name in ("placebo", "share"):
            for term in getattr(self, name):
                if term not in self.terms:
                    raise ValueError(f"has {name} of {term}, which is not among its terms {list(self.terms)}")
        if self.share and (set(self.share) == set(self.terms) or sum(self.share.values()) >= 1):
            raise ValueError("share: at least one term keeps its weight, and the shares of the others are under 1")
        return self

    @field_serializer(*TERMS, mode="wrap")
    def _given_alone(self, value: Section | None, handler: SerializerFunctionWrapHandler) -> Any:
        """What was given, so that a group read back is the same partial objective."""
        return None if value is None else value.model_dump(mode="json", exclude_unset=True)

    @property
    def layer_terms(self) -> tuple[LayerTerm, ...]:
        """Those of its terms that compare layers."""
        return tuple(term for term in LAYER_TERMS if term in self.terms)

    def settings(self, term: TermName) -> dict[str, Any]:
        """This group's own settings of a term."""
        settings = getattr(self, term)
        return {} if settings is None else settings.model_dump(exclude_unset=True)

    def objective(self, shared: Objective) -> Objective:
        """The objective of this group: `shared` with this group's settings, weight 0 for a term that is off.

        A term with a share has weight 1 until its own is found.
        """
        merged = {}
        for term in TERMS:
            off = {} if term in self.terms else {"weight": 0.0}
            placebo = {"placebo": True} if term in self.placebo else {}
            share = {"share": self.share[term], "weight": 1.0} if term in self.share else {}
            merged[term] = {**getattr(shared, term).model_dump(), **self.settings(term), **off, **placebo, **share}
        return Objective.model_validate(merged)


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
