"""What is stored of the teacher."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from stillroom.config.section import Layer, Section, later


class Signals(Section):
    """What is stored of the teacher."""

    imported: bool = later(
        False,
        description="log-probabilities captured elsewhere are all that is kept, by `stillroom import`; the teacher's "
        "weights are not needed",
    )
    teacher_head: bool = later(
        False, description="keep the teacher's output head, for the whole distribution (objective.kd.support: full)"
    )
    top_k: int = Field(
        256,
        ge=0,
        description="number of highest next-token log-probabilities kept per token; 0, with teacher_head: none",
    )
    hidden_layers: tuple[Layer, ...] = Field(("last",), description="layers whose hidden state is kept")
    attention_layers: tuple[Layer, ...] = Field(("last",), description="layers whose attention is kept")
    value_layers: tuple[Layer, ...] = Field((), description="layers whose value vectors are kept, for value relations")
    teacher_answers: bool = later(False, description="generate and keep the teacher's greedy answer to every prompt")

    @model_validator(mode="before")
    @classmethod
    def _imported_alone(cls, given: Any) -> Any:
        """Of what was captured elsewhere no layer is kept."""
        if isinstance(given, dict) and given.get("imported") is True:
            return {"hidden_layers": (), "attention_layers": (), **given}
        return given

    @field_validator("top_k")
    @classmethod
    def _has_a_distribution(cls, top_k: int, info: ValidationInfo) -> int:
        if not top_k and not info.data.get("teacher_head"):
            raise ValueError("0 keeps nothing of the next-token distribution: set signals.teacher_head: true, too")
        return top_k

    @field_validator("hidden_layers", "attention_layers")
    @classmethod
    def _has_the_last(cls, layers: tuple[Layer, ...], info: ValidationInfo) -> tuple[Layer, ...]:
        if info.data.get("imported"):
            if layers:
                raise ValueError("must be [] or left out where imported is true: log-probabilities alone are kept")
        elif "last" not in layers:
            raise ValueError("must include last: the store is checked and shown with it")
        return layers

    dtype: Literal["float16", "float32"] = Field("float16", description="dtype of every stored signal")
    attention_dtype: Literal["uint8_sqrt"] | None = Field(
        None, description="`uint8_sqrt`: attention in 8 bits, as round(255·√p); default as dtype"
    )
    batch_tokens: int = Field(4096, ge=1, description="tokens per forward pass, including padding")
    shard_examples: int = Field(256, ge=1, description="examples per file")
    minimum_coverage: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of student tokens that must have an aligned teacher token, per task",
    )
