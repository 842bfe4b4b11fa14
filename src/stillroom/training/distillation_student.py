"""The student: a causal language model, and a linear projector from its width to the teacher's.

Saved as a plain Hugging Face directory that knows nothing of the projector, which lies beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from stillroom.errors import UserError
from stillroom.models.attention_capture import capture_attention
from stillroom.models.forward import last_hidden_state
from stillroom.models.precision import without_adapters
from stillroom.models.sizes import width

PROJECTOR = "projector.safetensors"


@dataclass(frozen=True)
class StudentOutputs:
    """One forward pass; attention only where it was asked for."""

    hidden: Float[Tensor, "B T d"]
    attention: Float[Tensor, "B H T T"] | None


class DistillationStudent(nn.Module):
    """A language model and its projector; the projector is there whichever terms are on, also for equal widths."""

    def __init__(self, model: PreTrainedModel, teacher_width: int, seed: int = 0) -> None:
        """`seed` decides the projector's initial weights: equal for all groups of a seed."""
        super().__init__()
        self.model = model
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.projector = nn.Linear(width(model.config), teacher_width)
        self.projector.to(model.device)

    def forward(self, ids: Int[Tensor, "B T"], mask: Int[Tensor, "B T"], want_attention: bool) -> StudentOutputs:
        """Hidden state after the final norm, and the last layer's attention; no logits (see `losses`)."""
        if not want_attention:
            return StudentOutputs(last_hidden_state(self.model, ids, mask), None)
        with capture_attention(self.model) as capture:
            hidden = last_hidden_state(self.model, ids, mask)
            return StudentOutputs(hidden, capture.map)

    def project(self, hidden: Float[Tensor, "P d"]) -> Float[Tensor, "P D"]:
        """Student hidden states in the teacher's space, float32 whatever autocast says."""
        with torch.autocast(hidden.device.type, enabled=False):
            projected: Tensor = self.projector(hidden.float())
        return projected


def save_student(student: DistillationStudent, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write model, tokenizer and, beside them, the projector into an existing folder; weights in `dtype`."""
    save_model(student.model, tokenizer, folder, dtype)
    save_file(
        {k: v.detach().cpu().contiguous() for k, v in student.projector.state_dict().items()},
        folder / PROJECTOR,
    )


def save_model(model: PreTrainedModel, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write a model and its tokenizer as a plain Hugging Face directory, weights in `dtype`."""
    model = without_adapters(model)
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    before = model.config.dtype
    model.config.dtype = dtype
    try:
        model.save_pretrained(folder, state_dict=state)
    finally:
        model.config.dtype = before
    tokenizer.save_pretrained(folder)


def load_projector(folder: Path) -> dict[str, Tensor]:
    """The projector that lies beside a saved student: `weight` (D, d) and `bias` (D,)."""
    path = folder / PROJECTOR
    if not path.is_file():
        raise UserError(f"{path} is missing: {folder} is not a checkpoint of a distilled student")
    tensors: dict[str, Tensor] = load_file(path)
    return tensors
