"""The values of a finished store against the teacher itself, or against its output head alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from stillroom.attention_capture import relative_error
from stillroom.config import UserError
from stillroom.signal_store import SignalStore, StoredExample
from stillroom.teacher_signals import compute_signals

# the rounding of one forward pass, batched and not, in the dtype the teacher ran in: relative error of a whole array
TOLERANCE = {torch.float32: 0.01, torch.float16: 0.03, torch.bfloat16: 0.1}


def sample_ids(store: SignalStore, samples: int, seed: int = 0) -> list[str]:
    """A seeded draw of example ids."""
    ids = sorted(store.index)
    return random.Random(seed).sample(ids, min(samples, len(ids)))


def recompute(store: SignalStore, model: PreTrainedModel, ids: Sequence[str]) -> dict[str, float]:
    """Run the teacher again on some examples, alone and unpadded; the largest relative error of each signal.

    Raises `UserError` at the first example whose values are not those of this teacher.
    """
    worst = dict.fromkeys(("topk", "hidden", "attention"), 0.0)
    for example_id in ids:
        stored = store.read(example_id)
        own = compute_signals(model, [stored.encoding], store.layout.top_k, torch.float32)[0]
        errors = {
            "hidden": relative_error(torch.tensor(stored.hidden), own.hidden),
            "attention": relative_error(torch.tensor(stored.attention), own.attention),
            "topk": _topk_error(stored, own.topk_ids, own.topk_logprobs),
        }
        _require(store, example_id, errors, TOLERANCE[model.dtype])
        worst = {name: max(value, errors[name]) for name, value in worst.items()}
    return worst


@torch.no_grad()
def check_with_head(
    store: SignalStore, head: Tensor, softcap: float | None, ids: Sequence[str], dtype: torch.dtype
) -> dict[str, float]:
    """Without the teacher: stored hidden states × its output head (V, D) must give the stored top-k back."""
    worst = 0.0
    for example_id in ids:
        stored = store.read(example_id, ("topk", "hidden"))
        assert stored.hidden is not None
        logits = torch.from_numpy(stored.hidden.astype(np.float32)) @ head.float().T
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        logprobs, top = logits.log_softmax(-1).topk(store.layout.top_k)
        error = _topk_error(stored, top, logprobs)
        _require(store, example_id, {"topk": error}, TOLERANCE[dtype])
        worst = max(worst, error)
    return {"topk": worst}


def _topk_error(stored: StoredExample, ids: Tensor, logprobs: Tensor) -> float:
    """Half the L1 distance of the two next-token distributions over the union of their top-k, at the worst token."""
    assert stored.topk_ids is not None
    assert stored.topk_logprobs is not None
    size = int(max(stored.topk_ids.max(), ids.max())) + 1
    dense = np.zeros((2, len(ids), size))
    np.put_along_axis(dense[0], stored.topk_ids.astype(np.int64), np.exp(stored.topk_logprobs.astype(np.float64)), 1)
    np.put_along_axis(dense[1], ids.long().numpy(), logprobs.double().exp().numpy(), 1)
    return float(np.abs(dense[0] - dense[1]).sum(1).max() / 2)


def _require(store: SignalStore, example_id: str, errors: dict[str, float], tolerance: float) -> None:
    for name, error in errors.items():
        if not error <= tolerance:
            shard: Any = store.index[example_id][0]
            raise UserError(
                f"{store.path / shard}: example {example_id}: stored {name} differs from the teacher's by {error:.3g} "
                f"(tolerance {tolerance:g}): the store is not this teacher's"
            )
