"""The student: a causal language model, and what its loss terms train beside it.

Saved as a plain Hugging Face directory that knows nothing of a projector, which is saved beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import transformers
from safetensors.torch import save_file
from torch import nn

from stillroom.models.adapters import save_adapter, without_adapters
from stillroom.models.forward import Taps
from stillroom.terms import Term

T = TypeVar("T")

PROJECTOR = "projector.safetensors"
"""Weights trained beside the student: `<term>.weight` and so on."""


class DistillationStudent(nn.Module):
    """A language model, and what its terms train beside it."""

    def __init__(self, model: transformers.PreTrainedModel, terms: Sequence[Term] = (), seed: int = 0) -> None:
        """`seed` decides the initial weights of a projector: equal for all groups of a seed."""
        super().__init__()
        self.model = model
        self.trained = nn.ModuleDict()
        self.taps = Taps()
        for term in terms:
            self.taps |= term.taps
            if (beside := term.trained(seed)) is not None:
                self.trained[term.name] = beside.to(model.device)

    def forward(self, compute: Callable[..., T], *arguments: Any) -> T:
        """What `compute` gives. All that reads weights runs in here: a sharded student has them whole only then."""
        return compute(*arguments)


def save_student(student: DistillationStudent, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write model, tokenizer and, beside them, what was trained with it into an existing folder; weights in `dtype`."""
    save_model(student.model, tokenizer, folder, dtype)
    save_adapter(student.model, folder)
    if beside := {name: tensor.detach().cpu().contiguous() for name, tensor in student.trained.state_dict().items()}:
        save_file(beside, folder / PROJECTOR)


def save_model(model: transformers.PreTrainedModel, tokenizer: Any, folder: Path, dtype: torch.dtype) -> None:
    """Write a model and its tokenizer as a plain Hugging Face directory, weights in `dtype`."""
    model = without_adapters(model)
    cast: dict[int, torch.Tensor] = {}  # tied weights stay one tensor, which is written once
    state = {
        name: cast.setdefault(id(tensor), tensor.detach().to(dtype)) if isinstance(tensor, nn.Parameter) else tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
    }
    before = model.config.dtype
    model.config.dtype = dtype
    try:
        model.save_pretrained(folder, state_dict=state)
    finally:
        model.config.dtype = before
    tokenizer.save_pretrained(folder)
