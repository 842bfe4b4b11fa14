"""The KL term from the teacher's top k, chunk by chunk, against one that holds every logit.

    python benchmarks/sparse_kl.py

Beside it the same with every token as an outcome, the teacher's distribution remade of its hidden states (`kd.support:
full`). Same definition in the first two: K entries and the ghost. The dense one is what automatic differentiation makes
of it when the logits of all positions and their log-softmax are whole tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ratios import PeakMemory, arguments, begin, finish, in_turn, memory_ratio, ratio, value
from stillroom.models.output_head import OutputHead
from stillroom.models.precision import default_device
from stillroom.terms.full_support import FullSupport, HiddenOutcomes
from stillroom.terms.output_head import HEAD_CHUNK, HeadTargets, Outcomes, head_losses


def dense_kl(hidden: Tensor, weight: Tensor, outcomes: Outcomes) -> Tensor:
    """Sum over positions of KL(teacher ‖ student) over the K entries and everything else, every tensor whole."""
    logprobs = torch.log_softmax(torch.nn.functional.linear(hidden, weight).float(), -1)
    entries = (torch.xlogy(outcomes.probs, outcomes.probs) - outcomes.probs * logprobs.gather(1, outcomes.ids)).sum()
    others = logprobs.scatter(1, outcomes.ids, -torch.inf).logsumexp(-1)
    rest = torch.xlogy(outcomes.other, outcomes.other) - outcomes.other * others
    return entries + rest.sum()


def sparse_kl(hidden: Tensor, weight: Tensor, outcomes: Outcomes) -> Tensor:
    """Ours."""
    nothing = torch.full((len(hidden),), -1, device=hidden.device)
    return head_losses(hidden, weight, None, HeadTargets(nothing, outcomes, 0.0, 1.0))[0]


def full_kl(teacher: HiddenOutcomes, support: FullSupport) -> Callable[[Tensor, Tensor, Outcomes], Tensor]:
    """Ours over every token."""

    def kl(hidden: Tensor, weight: Tensor, _: Outcomes) -> Tensor:
        nothing = torch.full((len(hidden),), -1, device=hidden.device)
        return head_losses(hidden, weight, None, HeadTargets(nothing, teacher, 0.0, 1.0, support=support))[0]

    return kl


def products_alone(hidden: Tensor, weight: Tensor, dtype: torch.dtype) -> None:
    """The three products that any way must compute: logits and the two gradients, with no loss between."""
    cast = weight.detach().to(dtype)
    for rows in hidden.detach().to(dtype).split(HEAD_CHUNK):
        logits = rows @ cast.T
        logits @ cast  # the shape of the hidden states' gradient
        logits.T @ rows  # and of the output head's


def random_outcomes(rows: int, vocabulary: int, top_k: int) -> Outcomes:
    """A teacher's top k and what they leave."""
    device = default_device()
    top = torch.softmax(3 * torch.randn(rows, vocabulary, device=device), -1).topk(top_k, dim=-1)
    valid = torch.ones(rows, top_k, dtype=torch.bool, device=device)
    return Outcomes(torch.arange(rows), top.indices, valid, top.values, 1 - top.values.sum(1))


def main(given: list[str] | None = None) -> None:
    """The command."""
    parser = arguments(__doc__)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--teacher-width", type=int, default=4096)
    parser.add_argument("--top-k", type=int, default=256)
    parser.add_argument("--precision", default="bfloat16", choices=["float32", "bfloat16"], help="of the products")
    options = parser.parse_args(given)
    begin(options)
    outcomes = random_outcomes(options.tokens, options.vocabulary, options.top_k)
    device = default_device()
    hidden = torch.randn(options.tokens, options.width, device=device, requires_grad=True)
    weight = (torch.randn(options.vocabulary, options.width, device=device) / options.width**0.5).requires_grad_()

    def step(kl: Callable[[Tensor, Tensor, Outcomes], Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        hidden.grad = weight.grad = None
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bfloat16"):
            loss = kl(hidden, weight, outcomes)
        loss.backward()
        assert hidden.grad is not None
        assert weight.grad is not None
        return loss.detach(), hidden.grad, weight.grad

    head = torch.randn(options.vocabulary, options.teacher_width) / options.teacher_width**0.5
    states = 3 * torch.randn(options.tokens, options.teacher_width, device=device).half()
    teacher = HiddenOutcomes(torch.arange(options.tokens), states)
    support = FullSupport(OutputHead(head, None, 1.0, None), np.arange(options.vocabulary), options.vocabulary)
    full = full_kl(teacher, support.to(device))
    dtype = torch.bfloat16 if options.precision == "bfloat16" else torch.float32
    ways: dict[str, Callable[[], Any]] = {"sparse": lambda: step(sparse_kl), "dense": lambda: step(dense_kl)}
    ways["full"] = lambda: step(full)
    seconds = in_turn(ways | {"products": lambda: products_alone(hidden, weight, dtype)}, options.rounds)
    peaks, results = {}, {}
    for name, run in ways.items():
        hidden.grad = weight.grad = None
        with PeakMemory() as peaks[name]:
            run()
        results[name] = [tensor.clone() for tensor in run()]
    differences = [
        float((ours - theirs).norm() / theirs.norm())
        for ours, theirs in zip(results["sparse"], results["dense"], strict=True)
    ]
    rows = [
        ratio("speed of sparse KL / dense", seconds["dense"], seconds["sparse"], "≥ 1.7"),
        ratio("speed of its three products with no loss at all / dense", seconds["dense"], seconds["products"]),
        memory_ratio("peak memory, dense / sparse", peaks["dense"], peaks["sparse"], "≥ 4"),
        ratio("time of the KL over every token / over the top k", seconds["full"], seconds["sparse"]),
        memory_ratio("peak memory, over every token / over the top k", peaks["full"], peaks["sparse"]),
        value("relative difference of the loss", differences[0], "same"),
        value("relative difference of the hidden states' gradient", differences[1], "same"),
        value("relative difference of the output head's gradient", differences[2], "same"),
    ]
    finish("sparse KL", rows, options, seconds=seconds, peak_bytes={n: p.bytes for n, p in peaks.items()})


if __name__ == "__main__":
    main()
