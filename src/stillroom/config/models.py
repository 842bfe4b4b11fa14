"""The teacher, the student, and how their weights are trained."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from stillroom.config.section import PossiblePath, Section, later

Precision = Literal["float32", "bfloat16", "float16", "auto"]
"""`auto` stands for bfloat16 where the device multiplies it natively, else for float32: `models.resolve_precision`."""
Quantization = Literal["8bit", "4bit"]
"""Of a teacher's weights, by bitsandbytes: LLM.int8 without outliers, or NF4."""


class ModelRef(Section):
    """A causal language model: a hub id at a revision, a local directory, or a built-in one."""

    model: Annotated[str, PossiblePath] = Field(
        min_length=1, description="hub id, local directory, `builtin:teacher` or `builtin:student`"
    )
    revision: str | None = Field(None, description="commit of the hub id; ignored for a local directory")
    trust_remote_code: bool = Field(False, description="run code that comes with the model; recorded if on")
    chat_template: Annotated[Path, PossiblePath] | None = later(
        None, description="file with a Jinja chat template, where the tokenizer has none or is to use another"
    )


class Training(Section):
    """How weights are updated; the same for every trial."""

    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = later(
        "adamw",
        description="AdamW; `adamw_8bit`: its moments in 8 bits, by bitsandbytes; `paged_adamw_8bit`: they can also "
        "move to the machine's memory while a GPU's is full",
    )
    learning_rate: float = Field(1e-4, gt=0, description="AdamW's highest learning rate, reached after the warm-up")
    schedule: Literal["constant", "linear", "cosine"] = later(
        "constant", description="how the learning rate falls between the warm-up and the last step"
    )
    schedule_floor: float = later(
        0.0, ge=0, le=1, description="share of learning_rate that a linear or cosine schedule falls to"
    )
    weight_decay: float = Field(0.01, ge=0, description="AdamW's decoupled weight decay, on every weight")
    batch_size: int = Field(8, ge=1, description="examples per optimizer step")
    micro_batch_size: int | None = Field(None, ge=1, description="examples per forward pass; default: the whole batch")
    epochs: int = Field(3, ge=1, description="passes over the training split")
    max_gradient_norm: float = Field(1.0, gt=0, description="L2 norm at which the gradient is clipped")
    warmup_steps: int = Field(0, ge=0, description="steps of linear warm-up, before the schedule begins")
    precision: Precision = Field(
        "auto",
        description="autocast dtype; weights and losses stay float32. `auto`: bfloat16 where the device multiplies it "
        "natively, else float32",
    )
    compile: bool = later(
        False,
        description="compile the student's layers by torch.compile, but for those whose maps, value vectors or hidden "
        "states are compared, and pad batches to multiples of 64 tokens: time to compile at the start of a "
        "trial, faster steps, other rounding",
    )
    gradient_checkpointing: bool = later(
        False,
        description="keep each layer's input alone and compute the layer again in the backward pass: less memory, "
        "about a third more time, the same gradients",
    )
    gradient_interval: int = Field(50, ge=0, description="steps between measurements of each term's gradient; 0: never")
    share_steps: int = later(
        20,
        ge=1,
        description="first steps that a term's weight is found in, where a group gives its share of the gradient",
    )
    bucket_batches: int = Field(64, ge=1, description="batches that are grouped by length at a time")
    max_skipped_steps: int = Field(10, ge=0, description="consecutive non-finite steps before a trial stops")
    deterministic: bool = Field(False, description="on a GPU, use deterministic kernels only (slower)")

    @model_validator(mode="after")
    def _consistent(self) -> Training:
        if self.compile and self.gradient_checkpointing:
            raise ValueError("torch.compile cannot compute a layer again: leave out compile or gradient_checkpointing")
        if self.schedule == "constant" and self.schedule_floor:
            raise ValueError(
                "schedule_floor is where a schedule ends; set schedule to linear or cosine, or leave it out"
            )
        return self


class FineTuning(Section):
    """Fine-tuning of the teacher on the training split, with the task loss alone, before capture."""

    method: Literal["none", "full", "lora"] = Field("none", description="all weights, or LoRA layers merged afterwards")
    lora_rank: int = Field(16, ge=1, description="rank of LoRA's matrices, on every linear layer")
    lora_alpha: int = Field(32, ge=1, description="LoRA's updates are multiplied by alpha / rank")
    training: Training = Training()
    seed: int = Field(0, ge=0, description="order of batches, dropout and LoRA's first weights")


class Teacher(ModelRef):
    """The model that teaches."""

    dtype: Precision = Field("auto", description="dtype of the weights in the forward pass; `auto` as in training")
    quantization: Quantization | None = later(
        None, description="load its weights in 8 or 4 bits, by bitsandbytes, once it is fine-tuned; default: in dtype"
    )
    fine_tune: FineTuning = FineTuning()


class Lora(Section):
    """LoRA layers: two thin matrices beside a linear layer are trained, the layer itself is not."""

    rank: int = Field(16, ge=1, description="rank of the two matrices")
    alpha: int = Field(32, ge=1, description="updates are multiplied by alpha / rank")
    targets: Literal["all-linear"] | Annotated[tuple[str, ...], Field(min_length=1)] = Field(
        "all-linear",
        description="names of the layers that get them, such as [q_proj, v_proj]; `all-linear`: every linear layer but "
        "the output head",
    )


class Student(ModelRef):
    """The model that learns."""

    lora: Lora | None = later(None, description="train LoRA layers instead of all weights; default: all weights")
