"""Divergences of the teacher's next-token distribution p from the student's q: one elementwise function each.

Each takes p and log q over the K + 1 outcomes and its mixing weight, and gives what is summed over the outcomes, in
nats. The sums are non-negative, and 0 just where p = q. Gradients are autograd's.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

FLOOR = 1e-10
"""What p is at least where it stands in a denominator: a token that the teacher rules out costs 23 nats."""

_TINY = torch.finfo(torch.float32).tiny


def forward_kl(p: Tensor, log_q: Tensor, mixing: float) -> Tensor:
    """KL(p ‖ q): Hinton et al. 2015."""
    return torch.xlogy(p, p) - p * log_q


def reverse_kl(p: Tensor, log_q: Tensor, mixing: float) -> Tensor:
    """KL(q ‖ p): Gu et al. 2024 (MiniLLM)."""
    return log_q.exp() * (log_q - p.clamp(min=FLOOR).log())


def jensen_shannon(p: Tensor, log_q: Tensor, mixing: float) -> Tensor:
    """β KL(p ‖ m) + (1 − β) KL(q ‖ m) with m = βp + (1 − β)q: Agarwal et al. 2024 (GKD), β the mixing weight."""
    q = log_q.exp()
    log_m = (mixing * p + (1 - mixing) * q).clamp(min=_TINY).log()
    return mixing * (torch.xlogy(p, p) - p * log_m) + (1 - mixing) * q * (log_q - log_m)


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    divergence.__name__: divergence for divergence in (forward_kl, reverse_kl, jensen_shannon)
}

MIXING = {"jensen_shannon": 0.5}
"""The mixing weight of those that have one, by default."""

STEEPEST = {"reverse_kl": 1 - math.log(FLOOR)}
"""Upper bound of |∂D/∂log q| of one outcome, where it is not 1: what float16 must be able to hold."""
