"""One optimizer step: the losses of its micro-batches, their gradient, and each term's share of it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from stillroom.config import Objective, TermName, Training
from stillroom.models.forward import Taps, forward
from stillroom.models.precision import DTYPES
from stillroom.terms import NextTokenTerms, Term
from stillroom.training.collation import Batch
from stillroom.training.distillation_student import DistillationStudent
from stillroom.training.sharding import ALONE, Ranks, whole_norm


class Finite:
    """Whether a step's gradient was finite, on its way from a GPU: to ask waits for that step, not for later ones."""

    def __init__(self, finite: Tensor) -> None:
        self._here = finite.to("cpu", non_blocking=True)  # page-locked, where it comes from a GPU
        self._arrived = torch.cuda.Event() if finite.is_cuda else None
        if self._arrived is not None:
            self._arrived.record()

    def __bool__(self) -> bool:
        if self._arrived is not None:
            self._arrived.synchronize()
        return bool(self._here)


class StepRunner:
    """Losses of micro-batches, the gradient of a whole step, and each term's share of it."""

    def __init__(
        self,
        student: DistillationStudent,
        head: NextTokenTerms,
        terms: Sequence[Term],
        objective: Objective,
        training: Training,
        scaler: torch.amp.GradScaler,
        ranks: Ranks = ALONE,
    ) -> None:
        """`head` and `terms` are the objective's."""
        self.ranks = ranks
        self.student, self.head, self.terms = student, head, terms
        self.objective, self.training, self.scaler = objective, training, scaler
        self.device = student.model.device

    def autocast(self) -> Any:
        """The study's precision for the forward pass; float32 needs none."""
        if self.training.precision == "float32":
            return nullcontext()
        kept = self.ranks.size == 1  # else every layer's weights, cast, until the pass is over
        return torch.autocast(self.device.type, DTYPES[self.training.precision], cache_enabled=kept)

    def losses(
        self, batch: Batch, weights: Mapping[TermName, float], counts: Mapping[str, int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss of one micro-batch, each term divided by the whole step's count, and the terms' sums."""
        found: tuple[Tensor, dict[str, Tensor]] = self.student(self._losses, batch, weights, counts)
        return found

    def _losses(
        self, batch: Batch, weights: Mapping[TermName, float], counts: Mapping[str, int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        terms = [term for term in self.terms if weights[term.name] > 0]  # type: ignore[index]
        taps = Taps()
        for term in terms:
            taps |= term.taps
        with self.autocast():
            passed = forward(self.student.model, batch.ids, taps)
            shares = {name: weights[name] / max(counts.get(name, 0), 1) for name in ("task", "kd")}
            total, task, kd = self.head.losses(self.student.model, passed, batch.head, shares)
        sums: dict[str, Tensor] = {"task": task, "kd": kd}
        for term in terms:
            trained = self.student.trained
            beside = trained[term.name] if term.name in trained else None  # noqa: SIM401 - a ModuleDict has no get
            value = term.loss(passed, batch.parts[term.name], beside)
            sums[term.name] = value.detach()
            total = total + weights[term.name] / max(counts[term.name], 1) * value  # type: ignore[index]
        if batch.idle:
            return 0 * total, {name: 0 * value for name, value in sums.items()}
        return total, sums

    def update(
        self, micro: Sequence[Batch], optimizer: torch.optim.Optimizer
    ) -> tuple[dict[str, Tensor], dict[str, int], Finite]:
        """One optimizer step, skipped if a gradient is not finite: the terms' sums, counts, and whether it stepped.

        Sums and counts are of this process's part of the step.
        """
        optimizer.zero_grad(set_to_none=True)
        sums, counts = self._backward(micro, self.objective.weights, self.scaler.scale)
        fused = self.device.type == "cuda" and self.ranks.size == 1 and optimizer.defaults.get("fused")
        take = step_in_one_pass if fused else step_pass_by_pass
        finite = take(optimizer, self.scaler, list(self.student.parameters()), self.training.max_gradient_norm)
        self.scaler.update()
        return sums, counts, finite

    def measure(self, micro: Sequence[Batch], objective: Objective | None = None) -> dict[str, Any]:
        """Norm over the student's weights of each active term's gradient, weight included, and its share.

        Norms are of the step's gradient before clipping; shares divide by the sum of the norms. `objective`: weights
        other than the step's own.
        """
        norms, weights = {}, (objective or self.objective).weights
        for term, weight in weights.items():
            if weight > 0:
                alone = {**dict.fromkeys(weights, 0.0), term: weight}
                scale = self.scaler.get_scale()  # 1 unless in float16, where unscaled gradients vanish
                while not math.isfinite(norm := self._norm(micro, alone, scale)) and scale > 1:
                    scale /= 16
                norms[term] = norm
        self.student.zero_grad(set_to_none=True)
        whole = sum(norms.values())
        return {
            "norms": norms,
            "shares": {term: norm / whole if whole else 0.0 for term, norm in norms.items()},
        }

    def _norm(self, micro: Sequence[Batch], weights: Mapping[TermName, float], scale: float) -> float:
        """Norm of the gradient, taken of `scale` times the loss."""
        self.student.zero_grad(set_to_none=True)
        self._backward(micro, weights, lambda loss: scale * loss)
        gradients = [p.grad for p in self.student.model.parameters() if p.grad is not None]
        return float(whole_norm(gradients)) / scale if gradients else 0.0

    def _backward(
        self, micro: Sequence[Batch], weights: Mapping[TermName, float], scale: Callable[[Tensor], Tensor]
    ) -> tuple[dict[str, Tensor], dict[str, int]]:
        counts: dict[str, int] = defaultdict(int)
        for batch in micro:
            for name, count in batch.counts.items():
                counts[name] += count
        sums: dict[str, Tensor] = {}
        whole = self.ranks.summed(counts)
        for batch in micro:
            total, added = self.losses(batch.to(self.device), weights, whole)
            scale(total).backward()
            for name, value in added.items():
                sums[name] = sums[name] + value if name in sums else value
        return sums, counts


def step_pass_by_pass(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, parameters: Sequence[Tensor], limit: float
) -> Finite:
    """Unscale the gradient, clip it to a norm, and step if it is finite."""
    scaler.unscale_(optimizer)
    norm = whole_norm([p.grad for p in parameters if p.grad is not None])
    torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    finite = torch.isfinite(norm)
    if finite or scaler.is_enabled():
        scaler.step(optimizer)
    return Finite(finite)


def step_in_one_pass(
    optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, parameters: Sequence[Tensor], limit: float
) -> Finite:
    """The same by a fused optimizer, which divides each gradient by one number as it reads it, or changes nothing.

    The host asks nothing, so it does not wait for a GPU. Where a gradient is clipped, its division rounds otherwise
    than a multiplication does.
    """
    gradients = [p.grad for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm(gradients)
    finite = torch.isfinite(norm)
    scale = scaler.scale(torch.ones((), device=norm.device))
    clipped = ((norm / scale + 1e-6) / limit).clamp(min=1.0)  # 1e-6: as clip_grad_norm_ has it
    fused: Any = optimizer
    fused.grad_scale = clipped
    if scaler.is_enabled():  # it looks for what is not finite itself, multiplies its scale in, and takes both away
        scaler.step(optimizer)
        return Finite(finite)
    fused.found_inf = (~finite).float()
    optimizer.step()
    del fused.grad_scale, fused.found_inf
    return Finite(finite)


def accumulate(totals: dict[str, Any], sums: Mapping[str, Tensor], counts: Mapping[str, int]) -> None:
    """Add one step's sums and counts to `totals`, a `defaultdict(float)` of `<term>_sum` and `<term>_count`."""
    for name, value in sums.items():
        if name in counts:
            totals[f"{name}_sum"] = totals[f"{name}_sum"] + value
            totals[f"{name}_count"] += counts[name]


def losses_of(totals: Mapping[str, Any], objective: Objective) -> dict[str, float]:
    """Means of the active terms and their weighted total, from sums and counts over many batches."""
    means = {
        f"{name}_loss": float(totals[f"{name}_sum"]) / totals[f"{name}_count"]
        for name, weight in objective.weights.items()
        if weight > 0 and totals.get(f"{name}_count")
    }
    total = sum(objective.weights[name.removesuffix("_loss")] * value for name, value in means.items())  # type: ignore[index]
    return {"loss": total, **means}


def mean_shares(gradients: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Each term's share of the gradient, averaged over the measurements."""
    shares: dict[str, list[float]] = defaultdict(list)
    for row in gradients:
        for term, share in row["shares"].items():
            shares[term].append(share)
    return {term: sum(values) / len(values) for term, values in shares.items()}
