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
"""The least probability in a denominator or logarithm: an outcome that is ruled out costs 23 nats."""

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


def skewed_forward_kl(p: Tensor, log_q: Tensor, mixing: float) -> Tensor:
    """KL(p ‖ λp + (1 − λ)q): Ko et al. 2024 (DistiLLM), λ the mixing weight."""
    log_m = (mixing * p + (1 - mixing) * log_q.exp()).clamp(min=_TINY).log()
    return torch.xlogy(p, p) - p * log_m


def skewed_reverse_kl(p: Tensor, log_q: Tensor, mixing: float) -> Tensor:
    """KL(q ‖ λq + (1 − λ)p): Ko et al. 2024 (DistiLLM), λ the mixing weight."""
    q = log_q.exp()
    return q * (log_q - (mixing * q + (1 - mixing) * p).clamp(min=_TINY).log())


def total_variation(p: Tensor, log_q: Tensor, mixing: float) -> Tensor:
    """½ |p − q|: Wen et al. 2023 (f-DISTILL)."""
    return (p - log_q.exp()).abs() / 2


DIVERGENCES: dict[str, Callable[[Tensor, Tensor, float], Tensor]] = {
    divergence.__name__: divergence
    for divergence in (
        forward_kl,
        reverse_kl,
        jensen_shannon,
        skewed_forward_kl,
        skewed_reverse_kl,
        total_variation,
    )
}

MIXING = {"jensen_shannon": 0.5, "skewed_forward_kl": 0.1, "skewed_reverse_kl": 0.1}
"""The mixing weight of those that have one, by default."""


def steepest(name: str, mixing: float) -> float:
    """Upper bound of |∂D/∂log q| of one outcome: what float16 must be able to hold."""
    return {"reverse_kl": 1 - math.log(FLOOR), "skewed_reverse_kl": 1 - math.log(mixing)}.get(name, 1.0)
