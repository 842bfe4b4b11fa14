"""The teacher's forward pass: top-k log-probabilities, last hidden state and last layer's attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from stillroom.data.encoding import Encoding
from stillroom.errors import UserError
from stillroom.models.attention_capture import capture_attention
from stillroom.models.forward import last_hidden_state, padded
from stillroom.models.output_head import output_logits

_HEAD_ROWS = 512
"""Positions the output head sees at a time: a 150 k vocabulary makes 0.3 GB of float32 logits of them."""


@dataclass(frozen=True)
class TeacherSignals:
    """One example's signals; T is its true length, without padding."""

    topk_ids: Int[Tensor, "T K"]
    topk_logprobs: Float[Tensor, "T K"]
    """Next-token log-probabilities at temperature 1, highest first."""
    tail_logprobs: Float[Tensor, "T"]
    """Logarithm of the probability outside the top k, float32; −inf where k is the whole vocabulary."""
    hidden: Float[Tensor, "T D"]
    attention: Float[Tensor, "H N"]
    """Post-softmax attention: row after row of the causal triangle, N = T(T+1)/2."""


@torch.no_grad()
def compute_signals(
    model: PreTrainedModel,
    encodings: Sequence[Encoding],
    top_k: int,
    dtype: torch.dtype,
    padding_side: str = "right",
) -> list[TeacherSignals]:
    """Run one batch; results are on the CPU in `dtype`.

    Raises `UserError` on a non-finite value, with its place in the batch.
    """
    ids, mask = padded(encodings, padding_side, model.device)
    with capture_attention(model) as capture:
        hidden = last_hidden_state(model, ids, mask)
        attention = capture.map
    assert attention is not None
    rows = hidden[mask.bool().to(hidden.device)]
    topk = [_top_k(model, part, top_k) for part in rows.split(_HEAD_ROWS)]
    logprobs = torch.cat([values for values, _, _ in topk]).to(dtype).cpu()
    tails = torch.cat([tail for _, tail, _ in topk]).cpu()
    topk_ids = torch.cat([indices for _, _, indices in topk]).to(torch.int32).cpu()
    rows = rows.to(dtype).cpu()
    attention = attention.to(dtype)
    result, first = [], 0
    for row, encoding in enumerate(encodings):
        length = len(encoding)
        start = 0 if padding_side == "right" else ids.shape[1] - length
        square = attention[row, :, start : start + length, start : start + length]
        lower, left = torch.tril_indices(length, length, device=square.device)
        place = slice(first, first + length)
        triangle = square[:, lower, left].cpu()
        signals = TeacherSignals(topk_ids[place], logprobs[place], tails[place], rows[place], triangle)
        _check_finite(signals, row)
        result.append(signals)
        first += length
    return result


def _top_k(model: PreTrainedModel, hidden: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    logits = output_logits(model, hidden).float()
    values, indices = logits.topk(top_k, dim=-1)
    whole = logits.logsumexp(-1, keepdim=True)
    # of the logits outside, never 1 − Σ: a difference of nearly equal numbers, which a temperature magnifies
    tail = logits.scatter(-1, indices, -torch.inf).logsumexp(-1) - whole[:, 0]
    return values - whole, tail, indices


def _check_finite(signals: TeacherSignals, row: int) -> None:
    for name in ("topk_logprobs", "hidden", "attention"):
        if not torch.isfinite(getattr(signals, name)).all():
            raise UserError(
                f"the teacher's {name} has NaN or infinite values (row {row} of the batch); "
                "try teacher.dtype=bfloat16 or float32, or signals.dtype=float32"
            )
