"""Cross-entropy and the divergence from the teacher's distribution, fused with the output head.

A pure function that returns sums; the caller divides once, by the whole step's counts. The logits never exist whole.
Definitions are in docs/science.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from stillroom.terms.divergences import DIVERGENCES, steepest
from stillroom.terms.full_support import FullSupport, HiddenOutcomes

HEAD_CHUNK = 512
"""Rows whose logits exist at a time."""

HEAD_SLICE = 4096
"""Rows of the output head whose gradient is added at a time: it is added to its sum while it is still in a cache."""

_BLOCK_BYTES = 8 * 2**20
"""Of a block of logits in float32, on a CPU: what goes over them again and again finds them in a cache."""

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Outcomes:
    """The teacher's next-token distribution in student ids, at M positions: K entries and the outcome of all others."""

    rows: Int[Tensor, "M"]
    """Which of the head's rows each position is; increasing. On the CPU: they are cut while the GPU computes."""
    ids: Int[Tensor, "M K"]
    """Student ids, distinct where valid; elsewhere any valid id of the row."""
    valid: Bool[Tensor, "M K"]
    probs: Float[Tensor, "M K"]
    """0 where not valid."""
    other: Float[Tensor, "M"]
    """What the entries leave out of 1."""


@dataclass(frozen=True)
class HeadTargets:
    """What the output head is compared with, row by row, and how much each sum weighs."""

    targets: Int[Tensor, "N"]
    """Next student token; −1 where the row is not supervised."""
    outcomes: Outcomes | HiddenOutcomes | None
    task_weight: float
    kd_weight: float
    temperature: float = 1.0
    softcap: float | None = None
    divergence: str = "forward_kl"
    mixing: float = 0.5
    support: FullSupport | None = None
    """What the distributions of `HiddenOutcomes` are remade by."""


def head_losses(
    hidden: Float[Tensor, "N d"],
    weight: Float[Tensor, "V d"],
    bias: Float[Tensor, "V"] | None,
    targets: HeadTargets,
    chunk: int = HEAD_CHUNK,
) -> tuple[Float[Tensor, ""], Float[Tensor, ""], Float[Tensor, ""]]:
    """Cross-entropy and KL from hidden states, without ever holding all logits.

    Returns (task_weight·task_sum + kd_weight·kd_sum, task_sum, kd_sum); gradients flow through the first alone.
    Logits are made `chunk` rows at a time and the gradient is taken on the spot (as in Liger's fused linear
    losses), in the autocast dtype for the products and float32 for the rest. The gradient takes the logits' place.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    needs_grad = torch.is_grad_enabled()
    return _HeadLosses.apply(hidden, weight, bias, targets, chunk, dtype, needs_grad)  # type: ignore[no-any-return]


class _HeadLosses(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: HeadTargets,
        chunk: int,
        dtype: torch.dtype,
        needs_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        with torch.autocast(hidden.device.type, enabled=False):
            cast = weight.to(dtype)
            task_sum, kd_sum = hidden.new_zeros(2, dtype=torch.float32)
            hidden_grad = torch.zeros_like(hidden, dtype=torch.float32) if needs_grad else None
            scale = _narrowing_scale(targets, dtype)
            wanted = needs_grad and ctx.needs_input_grad[1]
            weight_grad = torch.zeros_like(weight, dtype=torch.float32) if wanted else None
            bias_grad = torch.zeros_like(bias) if needs_grad and bias is not None else None
            for first in range(0, len(hidden), chunk):
                part = hidden[first : first + chunk].to(dtype)
                raw = F.linear(part, cast, None if bias is None else bias.to(dtype))
                for place in _blocks(raw):
                    rows = slice(first + place.start, first + place.stop)
                    task, kd, grad = _block_losses(raw[place], _rows_of(targets, rows), needs_grad)
                    task_sum, kd_sum = task_sum + task, kd_sum + kd
                    if grad is None:
                        continue
                    if bias_grad is not None:
                        bias_grad += grad.sum(0)
                    raw[place] = grad if scale == 1 else grad.mul_(scale)
                if hidden_grad is None:
                    continue
                hidden_grad[first : first + chunk] = raw @ cast
                if weight_grad is not None:
                    _add_product(weight_grad, raw, part)
        ctx.grads, ctx.scale = (hidden_grad, weight_grad, bias_grad), scale
        total = targets.task_weight * task_sum + targets.kd_weight * kd_sum
        ctx.mark_non_differentiable(task_sum, kd_sum)
        return total, task_sum, kd_sum

    @staticmethod
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        grads, ctx.grads = ctx.grads, None  # scaled in place, so they can be handed over once
        hidden_grad, weight_grad = (None if g is None else g.mul_(upstream / ctx.scale) for g in grads[:2])
        bias_grad = None if grads[2] is None else grads[2].mul_(upstream)
        return hidden_grad, weight_grad, bias_grad, None, None, None, None


def _blocks(logits: Tensor) -> list[slice]:
    """Rows of a chunk to be gone over together: all of them, except on a CPU."""
    rows, vocabulary = logits.shape
    size = max(1, _BLOCK_BYTES // (4 * vocabulary)) if logits.device.type == "cpu" else max(1, rows)
    return [slice(first, min(first + size, rows)) for first in range(0, rows, size)]


def _add_product(total: Float[Tensor, "V d"], grad: Float[Tensor, "N V"], hidden: Float[Tensor, "N d"]) -> None:
    """Add gradᵀ · hidden to `total`; the product, as large as the head, never exists whole."""
    for rows, part in zip(total.split(HEAD_SLICE), grad.split(HEAD_SLICE, 1), strict=True):
        rows.add_(part.T @ hidden)


def _narrowing_scale(targets: HeadTargets, dtype: torch.dtype) -> float:
    """Power of two by which a row's gradient is multiplied before it is cast: float16 alone would lose its tail.

    Entries are at most the row's weights; so they become 1/16 at most, and a probability of 1e-6 is still a number.
    A loss scale would come too late: it reaches the gradient after the cast. Sums over a chunk stay far from overflow.
    """
    if dtype != torch.float16:
        return 1.0
    slope = steepest(targets.divergence, targets.mixing) * max(1.0, targets.temperature)
    largest = targets.task_weight + targets.kd_weight * slope
    return 2.0 ** math.floor(math.log2(1 / (16 * largest))) if largest > 0 else 1.0


def _rows_of(targets: HeadTargets, rows: slice) -> HeadTargets:
    """The same targets, for a slice of the head's rows."""
    outcomes = targets.outcomes
    if outcomes is not None:
        first, last = torch.searchsorted(outcomes.rows, torch.tensor([rows.start, rows.stop])).tolist()
        inside = slice(first, last)
    if isinstance(outcomes, HiddenOutcomes):
        local_rows = outcomes.rows[inside].to(outcomes.hidden.device, non_blocking=True) - rows.start
        outcomes = HiddenOutcomes(local_rows, outcomes.hidden[inside])
    elif outcomes is not None:
        outcomes = Outcomes(
            outcomes.rows[inside].to(outcomes.ids.device, non_blocking=True) - rows.start,
            outcomes.ids[inside],
            outcomes.valid[inside],
            outcomes.probs[inside],
            outcomes.other[inside],
        )
    return replace(targets, targets=targets.targets[rows], outcomes=outcomes)


def _block_losses(raw: Tensor, targets: HeadTargets, needs_grad: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums of one block and the gradient of their weighted sum by the raw logits (float32).

    Makes as few passes over the logits as possible: log-softmax, exp in place, a sum, and one product in place.
    """
    cap = targets.softcap
    logits = raw if cap is None else cap * torch.tanh(raw.float() / cap)
    logprobs = torch.log_softmax(logits, -1, dtype=torch.float32)
    supervised = targets.targets >= 0
    safe = targets.targets.clamp(min=0)[:, None]
    task = torch.where(supervised, -logprobs.gather(1, safe)[:, 0], 0.0).sum()
    kd = logprobs.new_zeros(())
    outcomes = targets.outcomes if targets.outcomes is not None and len(targets.outcomes.rows) else None
    if isinstance(outcomes, HiddenOutcomes):
        kd, slopes = _full_divergence(logprobs[outcomes.rows], outcomes, targets, needs_grad)
        if slopes is None:
            return task, kd, None
        grad = logprobs.exp_().mul_(targets.task_weight * supervised.float()[:, None])
        grad.scatter_add_(1, safe, -targets.task_weight * supervised.float()[:, None])
        grad.index_add_(0, outcomes.rows, slopes, alpha=targets.kd_weight)
        return task, kd, grad if cap is None else grad.mul_(1 - (logits / cap) ** 2)
    if outcomes is None and not needs_grad:
        return task, kd, None
    # what each row's softmax is multiplied by in the gradient: at the entries, and everywhere else
    at_entry = at_others = targets.task_weight * supervised.float()
    if outcomes is None:
        probs = logprobs.exp_()
    else:
        places = (outcomes.rows * raw.shape[1])[:, None] + outcomes.ids  # in the flattened logits
        entries = logprobs.take(places)
        probs = logprobs.exp_()
        probs.view(-1).index_fill_(0, places.flatten(), 0.0)
        other = probs.sum(1)[outcomes.rows]
        kd, entry_slopes, other_slope = _divergence(entries, other, targets, raw.shape[1], needs_grad)
        slopes = targets.kd_weight * (entry_slopes.sum(1) + other_slope)
        at_entry = at_others.index_add(0, outcomes.rows, slopes, alpha=-1)
        share = targets.kd_weight * other_slope / other.clamp(min=_TINY)
        at_others = at_entry.index_add(0, outcomes.rows, share)
    if not needs_grad:
        return task, kd, None
    grad = probs.mul_(at_others[:, None])
    if outcomes is not None:
        added = entries.exp() * at_entry[outcomes.rows][:, None] + targets.kd_weight * entry_slopes
        grad.view(-1).index_add_(0, places.flatten(), torch.where(outcomes.valid, added, 0.0).flatten())
    grad.scatter_add_(1, safe, -targets.task_weight * supervised.float()[:, None])
    return task, kd, grad if cap is None else grad.mul_(1 - (logits / cap) ** 2)


def _full_divergence(
    student: Float[Tensor, "M V"], outcomes: HiddenOutcomes, targets: HeadTargets, needs_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """`_divergence` over every mapped student id and all others, and its gradient by the student's logits."""
    support = targets.support
    assert support is not None
    probs, rest = support.probs(outcomes.hidden)
    entries = student if support.is_whole else student.index_select(1, support.ids)
    others = student.index_select(1, support.others).exp_()
    other, valid = others.sum(1), torch.ones((), dtype=torch.bool, device=student.device).expand_as(entries)
    whole = Outcomes(outcomes.rows, support.ids.expand_as(entries), valid, probs, rest)
    kd, slopes, other_slope = _divergence(
        entries, other, replace(targets, outcomes=whole), student.shape[1], needs_grad
    )
    if not needs_grad:
        return kd, None
    grad = student.exp().mul_(-(slopes.sum(1) + other_slope)[:, None])
    if support.is_whole:
        return kd, grad.add_(slopes)
    grad.index_add_(1, support.ids, slopes)
    grad.index_add_(1, support.others, others.mul_((other_slope / other.clamp(min=_TINY))[:, None]))
    return kd, grad


def _divergence(
    entries: Float[Tensor, "M K"], other: Float[Tensor, "M"], targets: HeadTargets, vocabulary: int, needs_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over positions of the divergence of the student from the teacher over K + 1 outcomes, times τ².

    `entries` are the student's log-probabilities of the entries, `other` its probability of everything else: a sum,
    never 1 − sum, so it cannot be negative. At τ ≠ 1 both sides' probabilities are raised to 1/τ and renormalised
    over the K + 1 outcomes (Hinton et al. 2015, sec. 2, for τ²).

    With u the student's log-probabilities of the K + 1 outcomes, returns (D, ∂D/∂u of the entries, of the other).
    u_k = z_k − lse(z) and u_other = lse(others) − lse(z), so ∂D/∂z = ∂u_k at the entries
    + ∂u_other · softmax(z) / other at the others − (Σ ∂u) · softmax(z).
    """
    outcomes, temperature = targets.outcomes, targets.temperature
    assert isinstance(outcomes, Outcomes)
    no_other = other == 0 if outcomes.ids.shape[1] >= vocabulary else torch.zeros_like(other, dtype=torch.bool)
    absent = torch.cat([~outcomes.valid, no_other[:, None]], 1)
    teacher = torch.cat([outcomes.probs, outcomes.other[:, None]], 1).masked_fill(absent, 0.0)
    student = torch.cat([entries, other.clamp(min=_TINY).log()[:, None]], 1).masked_fill(absent, 0.0)
    with torch.set_grad_enabled(needs_grad):
        leaf = student.detach().requires_grad_(needs_grad)
        log_q = leaf
        if temperature != 1.0:
            teacher = (teacher ** (1 / temperature)).masked_fill(absent, 0.0)
            teacher = teacher / teacher.sum(1, keepdim=True)
            log_q = F.log_softmax((leaf / temperature).masked_fill(absent, -torch.inf), 1).masked_fill(absent, 0.0)
        values = DIVERGENCES[targets.divergence](teacher, log_q, targets.mixing).masked_fill(absent, 0.0)
        total = temperature**2 * values.sum()
    slopes = torch.autograd.grad(total, leaf)[0] if needs_grad else torch.zeros_like(student)
    return total.detach(), slopes[:, :-1], slopes[:, -1]
