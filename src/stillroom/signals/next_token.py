"""The teacher's next-token distribution: its k most probable tokens, and what they leave."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar

import numpy as np
import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor

from stillroom.models.forward import Forward, Taps
from stillroom.models.output_head import output_logits
from stillroom.signals.signal import Arrays, Column, Layout, without_padding

_HEAD_ROWS = 512
"""Positions the output head sees at a time: a 150 k vocabulary makes 0.3 GB of float32 logits of them."""


@dataclass(frozen=True)
class NextToken:
    """`topk_ids`, `topk_logprobs` (T, K) at temperature 1, highest first; `tail_logprobs` (T,), of all others."""

    name: ClassVar[str] = "topk"
    layout: Layout

    @property
    def taps(self) -> Taps:
        """The last hidden state is enough."""
        return Taps()

    @cached_property
    def columns(self) -> tuple[Column, ...]:
        """Ids, their log-probabilities, and that of everything else."""
        k = self.layout.top_k
        if not k:  # the store keeps the output head, which makes everything of the last hidden state
            return ()
        return (
            Column("topk_ids", self.layout.id_dtype, lambda tokens: (tokens, k)),
            Column("topk_logprobs", self.layout.dtype, lambda tokens: (tokens, k)),
            Column("tail_logprobs", "float32", lambda tokens: (tokens,), finite=False),
        )

    def extract(
        self, model: transformers.PreTrainedModel, forward: Forward, lengths: Sequence[int], dtype: torch.dtype
    ) -> list[dict[str, Tensor]]:
        """Of the output head's logits, which never exist whole."""
        if not self.columns:
            return [{} for _ in lengths]
        rows = without_padding(forward.last_hidden, lengths)
        found = [top_k(output_logits(model, part).float(), self.layout.top_k) for part in rows.split(_HEAD_ROWS)]
        ids, logprobs, tails = (torch.cat(column) for column in zip(*found, strict=True))
        columns = (column.split(list(lengths)) for column in (ids.to(torch.int32), logprobs.to(dtype), tails))
        names = [column.name for column in self.columns]
        return [dict(zip(names, example, strict=True)) for example in zip(*columns, strict=True)]

    def faults(self, arrays: Arrays, tolerance: float) -> Iterator[str]:
        """Sorted, each id once, and with the tail a distribution."""
        if not self.columns:
            return
        logprobs = arrays["topk_logprobs"].astype(np.float64)
        if not (np.diff(logprobs, axis=1) <= 0).all():
            yield "top-k log-probabilities are not sorted"
        sums = np.exp(logprobs).sum(1) + np.exp(arrays["tail_logprobs"].astype(np.float64))
        if not (np.abs(sums - 1) <= tolerance).all():
            yield f"top-k and tail sum to {sums.min():.4f}…{sums.max():.4f}, not 1"
        ids = np.sort(arrays["topk_ids"].astype(np.int64), axis=1)
        if not ((np.diff(ids, axis=1) > 0).all() and (ids >= 0).all()):
            yield "top-k ids repeat or are negative"

    def error(self, model: transformers.PreTrainedModel, arrays: Arrays, forward: Forward) -> float:
        """See `distribution_error`; without a top k, half the L1 distance of what the stored hidden states give."""
        if not self.columns:
            kept = torch.from_numpy(arrays["hidden"].astype(np.float32)).to(model.device, model.dtype)
            again, exact = (output_logits(model, h).double().softmax(-1) for h in (kept, forward.last_hidden[0]))
            return float((again - exact).abs().sum(-1).max() / 2)
        return distribution_error(arrays, output_logits(model, forward.last_hidden[0]).float().cpu())

    def totals(self, arrays: Mapping[str, Tensor], is_text: Tensor) -> dict[str, float]:
        """None."""
        return {}


def top_k(logits: Float[Tensor, "N V"], k: int) -> tuple[Int[Tensor, "N K"], Float[Tensor, "N K"], Float[Tensor, "N"]]:
    """The k most probable ids, their log-probabilities, and the logarithm of the probability of all others."""
    values, ids = logits.topk(k, dim=-1)
    whole = logits.logsumexp(-1, keepdim=True)
    # of the logits outside, never 1 − Σ: a difference of nearly equal numbers, which a temperature magnifies
    tail = logits.scatter(-1, ids, -torch.inf).logsumexp(-1) - whole[:, 0]
    return ids, values - whole, tail


def distribution_error(arrays: Arrays, logits: Float[Tensor, "T V"]) -> float:
    """How far a stored next-token distribution is from that of `logits`, at the worst token.

    Half the L1 distance over the stored ids and the tail; or by how much an id left out is more probable than one
    that was kept. So two ids of nearly equal probability, either of which may be the k-th, are no difference.
    """
    logprobs = logits.double().log_softmax(-1)
    ids = torch.from_numpy(arrays["topk_ids"].astype(np.int64))
    again = logprobs.gather(1, ids).exp()
    outside = logprobs.scatter(1, ids, -torch.inf)
    kept, tail = (torch.from_numpy(arrays[f"{n}_logprobs"].astype(np.float64)).exp() for n in ("topk", "tail"))
    distance = ((kept - again).abs().sum(1) + (tail - outside.exp().sum(1)).abs()) / 2
    missed = outside.max(1).values.exp() - again.min(1).values
    return float(torch.maximum(distance, missed).max())
