"""Distances of hidden states at aligned tokens: one function each, of both models' states of one example.

Each takes the student's (n, d) and the teacher's (n, D) states in float32, projected to D first where the distance
compares them dimension by dimension, and gives a sum. What it is divided by is told beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor


def mse(student: Float[Tensor, "n D"], teacher: Float[Tensor, "n D"]) -> Float[Tensor, ""]:
    """Squared differences."""
    return (student - teacher).square().sum()


def cosine(student: Float[Tensor, "n D"], teacher: Float[Tensor, "n D"]) -> Float[Tensor, ""]:
    """1 − cosine of the two states of each token."""
    return (1 - F.cosine_similarity(student, teacher, dim=-1)).sum()


def gram(student: Float[Tensor, "n d"], teacher: Float[Tensor, "n D"]) -> Float[Tensor, ""]:
    """Mean squared difference of the two matrices of cosines between the example's tokens."""
    ours, theirs = (F.normalize(states, dim=-1) for states in (student, teacher))
    return (ours @ ours.T - theirs @ theirs.T).square().mean()


def cka(student: Float[Tensor, "n d"], teacher: Float[Tensor, "n D"]) -> Float[Tensor, ""]:
    """1 − linear centred kernel alignment (Kornblith et al., ICML 2019, eq. 3 and 5); 0 for a single token.

    Of the n × n kernels, which are smaller than the d × D products wherever a text is shorter than the states are wide.
    """
    kernels = []
    for states in (student, teacher):
        centred = states - states.mean(0)
        kernels.append(F.normalize((centred @ centred.T).flatten(), dim=0))
    if len(student) < 2:
        return (student * 0).sum()
    return 1 - kernels[0] @ kernels[1]


@dataclass(frozen=True)
class Distance:
    """How two states are compared, whether the student's is projected first, and what the sum is divided by."""

    of: Callable[[Tensor, Tensor], Tensor]
    projected: bool
    counts: Literal["values", "tokens", "examples"]


DISTANCES = {
    "mse": Distance(mse, True, "values"),
    "cosine": Distance(cosine, True, "tokens"),
    "gram": Distance(gram, False, "examples"),
    "cka": Distance(cka, False, "examples"),
}
