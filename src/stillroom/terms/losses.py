"""The loss terms: pure functions that return sums; the caller divides once, by the whole step's counts.

α·L_task + β·L_KD + γ₁·L_align_hidden + γ₂·L_align_attn; definitions in docs/science.md.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

HEAD_CHUNK = 512
"""Rows whose logits exist at a time."""

HEAD_SLICE = 4096
"""Rows of the output head whose gradient is added at a time: it is added to its sum while it is still in a cache."""

_BLOCK_BYTES = 8 * 2**20
"""Of a block of logits in float32, on a CPU: what goes over them again and again finds them in a cache."""

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class Outcomes:
    """The teacher's next-token distribution in student ids, at M positions: K entries and the ghost."""

    rows: Int[Tensor, "M"]
    """Which of the head's rows each position is; increasing. On the CPU: they are cut while the GPU computes."""
    ids: Int[Tensor, "M K"]
    """Student ids, distinct where valid; elsewhere any valid id of the row."""
    valid: Bool[Tensor, "M K"]
    probs: Float[Tensor, "M K"]
    """0 where not valid."""
    ghost: Float[Tensor, "M"]
    """What the entries leave out of 1."""


@dataclass(frozen=True)
class HeadTargets:
    """What the output head is compared with, row by row, and how much each sum weighs."""

    targets: Int[Tensor, "N"]
    """Next student token; −1 where the row is not supervised."""
    outcomes: Outcomes | None
    task_weight: float
    kd_weight: float
    temperature: float = 1.0
    softcap: float | None = None


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
    for own, part in zip(total.split(HEAD_SLICE), grad.split(HEAD_SLICE, 1), strict=True):
        own.add_(part.T @ hidden)


def _narrowing_scale(targets: HeadTargets, dtype: torch.dtype) -> float:
    """Power of two by which a row's gradient is multiplied before it is cast: float16 alone would lose its tail.

    Entries are at most the row's weights; so they become 1/16 at most, and a probability of 1e-6 is still a number.
    A loss scale would come too late: it reaches the gradient after the cast. Sums over a chunk stay far from overflow.
    """
    if dtype != torch.float16:
        return 1.0
    largest = targets.task_weight + targets.kd_weight * max(1.0, targets.temperature)
    return 2.0 ** math.floor(math.log2(1 / (16 * largest))) if largest > 0 else 1.0


def _rows_of(targets: HeadTargets, rows: slice) -> HeadTargets:
    """The same targets, for a slice of the head's rows."""
    outcomes = targets.outcomes
    if outcomes is not None:
        first, last = torch.searchsorted(outcomes.rows, torch.tensor([rows.start, rows.stop])).tolist()
        own = slice(first, last)
        outcomes = Outcomes(
            outcomes.rows[own].to(outcomes.ids.device, non_blocking=True) - rows.start,
            outcomes.ids[own],
            outcomes.valid[own],
            outcomes.probs[own],
            outcomes.ghost[own],
        )
    return HeadTargets(
        targets.targets[rows],
        outcomes,
        targets.task_weight,
        targets.kd_weight,
        targets.temperature,
        targets.softcap,
    )


def _block_losses(raw: Tensor, targets: HeadTargets, needs_grad: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Sums of one block and the gradient of their weighted sum by the raw logits (float32).

    The logits are gone over as seldom as can be: log-softmax, exp in place, a sum, and one product in place.
    """
    cap = targets.softcap
    logits = raw if cap is None else cap * torch.tanh(raw.float() / cap)
    logprobs = torch.log_softmax(logits, -1, dtype=torch.float32)
    supervised = targets.targets >= 0
    safe = targets.targets.clamp(min=0)[:, None]
    task = torch.where(supervised, -logprobs.gather(1, safe)[:, 0], 0.0).sum()
    kd = logprobs.new_zeros(())
    outcomes = targets.outcomes if targets.outcomes is not None and len(targets.outcomes.rows) else None
    if outcomes is None and not needs_grad:
        return task, kd, None
    own = scale = targets.task_weight * supervised.float()
    if outcomes is None:
        probs = logprobs.exp_()
    else:
        at = (outcomes.rows * raw.shape[1])[:, None] + outcomes.ids  # in the flattened logits
        entries = logprobs.take(at)
        probs = logprobs.exp_()
        probs.view(-1).index_fill_(0, at.flatten(), 0.0)
        rest = probs.sum(1)[outcomes.rows]
        kd, by_entry, by_ghost = _kl(entries, rest, outcomes, targets.temperature, raw.shape[1])
        total = targets.kd_weight * (by_entry.sum(1) + by_ghost)
        own = scale.index_add(0, outcomes.rows, total, alpha=-1)
        scale = own.index_add(0, outcomes.rows, targets.kd_weight * by_ghost / rest.clamp(min=_TINY))
    if not needs_grad:
        return task, kd, None
    grad = probs.mul_(scale[:, None])
    if outcomes is not None:
        at_entries = entries.exp() * own[outcomes.rows][:, None] + targets.kd_weight * by_entry
        grad.view(-1).index_add_(0, at.flatten(), torch.where(outcomes.valid, at_entries, 0.0).flatten())
    grad.scatter_add_(1, safe, -targets.task_weight * supervised.float()[:, None])
    return task, kd, grad if cap is None else grad.mul_(1 - (logits / cap) ** 2)


def _kl(
    entries: Tensor, rest: Tensor, outcomes: Outcomes, temperature: float, vocabulary: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over positions of KL(teacher ‖ student) over K + 1 outcomes, times τ², and what its gradient is made of.

    `entries` (M, K) are the student's log-probabilities of the entries, `rest` (M) its probability of all others:
    a sum, never 1 − sum, so it cannot be negative. At τ ≠ 1 both sides' probabilities are raised to 1/τ and
    renormalised over the K + 1 outcomes (Hinton et al. 2015, sec. 2, for τ²).

    With u the student's log-probabilities of the K + 1 outcomes: (KL, ∂KL/∂u of the entries, of the ghost).
    u_k = z_k − lse(z) and u_ghost = lse(others) − lse(z), so ∂KL/∂z = ∂u_k at the entries
    + ∂u_ghost · softmax(z) / rest at the others − (Σ ∂u) · softmax(z).
    """
    entries = torch.where(outcomes.valid, entries, 0.0)
    no_ghost = rest == 0 if outcomes.ids.shape[1] >= vocabulary else torch.zeros_like(rest, dtype=torch.bool)
    student = torch.cat([entries, rest.clamp(min=_TINY).log()[:, None]], 1)
    teacher = torch.cat([outcomes.probs, outcomes.ghost.masked_fill(no_ghost, 0.0)[:, None]], 1)
    if temperature == 1.0:
        by = -teacher
    else:
        absent = torch.cat([~outcomes.valid, no_ghost[:, None]], 1)
        teacher = teacher ** (1 / temperature)
        teacher = teacher.masked_fill(absent, 0.0)
        teacher = teacher / teacher.sum(1, keepdim=True)
        student = F.log_softmax((student / temperature).masked_fill(absent, -torch.inf), 1)
        by = temperature * (student.exp() - teacher)
        student = student.masked_fill(absent, 0.0)
    kd = temperature**2 * (torch.xlogy(teacher, teacher) - teacher * student).sum()
    return kd, by[:, :-1], by[:, -1]


def hidden_loss(projected: Float[Tensor, "P D"], teacher: Float[Tensor, "P D"]) -> Float[Tensor, ""]:
    """Sum over aligned tokens and dimensions of the squared difference, float32."""
    return (projected.float() - teacher.float()).square().sum()


def aligned_attention(
    attention: Float[Tensor, "B H T T"], rows: Int[Tensor, "B G"], segment_of: Int[Tensor, "B T"]
) -> Float[Tensor, "B H G G"]:
    """A model's map over segments: queries at each segment's last token, keys summed over each segment.

    `segment_of` is −1 for tokens of no segment. Padded segments give rows that the caller's mask leaves out.
    """
    heads, tokens, segments = attention.shape[1], attention.shape[-1], rows.shape[1]
    index = rows[:, None, :, None].expand(-1, heads, -1, tokens)
    queries = attention.gather(2, index)
    member = F.one_hot(segment_of + 1, segments + 1)[..., 1:].to(queries.dtype)
    return torch.matmul(queries, member[:, None])


def attention_loss(
    student: Float[Tensor, "B H G G"], teacher: Float[Tensor, "B H G G"], segments: Int[Tensor, "B"]
) -> Float[Tensor, ""]:
    """Sum over heads, rows and causal columns of the squared difference; `segments` is each example's G.

    Above the diagonal both maps are 0, so the sum over all columns is the sum over the causal ones.
    """
    real = torch.arange(student.shape[-1], device=student.device) < segments[:, None]
    difference = (student.float() - teacher.float()).masked_fill(~real[:, None, :, None], 0.0)
    return difference.square().sum()
