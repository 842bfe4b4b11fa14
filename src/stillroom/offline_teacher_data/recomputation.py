"""The values of a finished store against the teacher itself, or against its output head alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from stillroom.errors import UserError
from stillroom.models.architecture import relative_error
from stillroom.models.output_head import OutputHead, output_logits
from stillroom.offline_teacher_data.store import SignalStore, StoredExample
from stillroom.signals.teacher_signals import compute_signals

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
        again = compute_signals(model, [stored.encoding], store.layout.top_k, torch.float32)[0]
        with torch.no_grad():
            logits = output_logits(model, again.hidden.to(model.device, model.dtype)).float().cpu()
        errors = {
            "hidden": relative_error(torch.tensor(stored.hidden), again.hidden),
            "attention": relative_error(torch.tensor(stored.attention), again.attention),
            "topk": _topk_error(stored, logits),
        }
        _require(store, example_id, errors, TOLERANCE[model.dtype])
        worst = {name: max(value, errors[name]) for name, value in worst.items()}
    return worst


@torch.no_grad()
def check_with_head(store: SignalStore, head: OutputHead, ids: Sequence[str], dtype: torch.dtype) -> dict[str, float]:
    """Without the teacher: stored hidden states × its output head must give the stored top-k and tail back."""
    worst = 0.0
    for example_id in ids:
        stored = store.read(example_id, ("topk", "hidden"))
        assert stored.hidden is not None
        error = _topk_error(stored, head.logits(torch.from_numpy(stored.hidden.astype(np.float32))))
        _require(store, example_id, {"topk": error}, TOLERANCE[dtype])
        worst = max(worst, error)
    return {"topk": worst}


def _topk_error(stored: StoredExample, logits: Float[Tensor, "T V"]) -> float:
    """How far the stored next-token distribution is from that of `logits`, at the worst token.

    Half the L1 distance over the stored ids and the tail; or by how much an id left out is more probable than one
    that was kept. So two ids of nearly one probability, of which either may be the k-th, are no difference.
    """
    assert stored.topk_ids is not None
    assert stored.topk_logprobs is not None
    assert stored.tail_logprobs is not None
    logprobs = logits.double().log_softmax(-1)
    ids = torch.from_numpy(stored.topk_ids.astype(np.int64))
    again = logprobs.gather(1, ids).exp()
    outside = logprobs.scatter(1, ids, -torch.inf)
    kept, tail = (torch.from_numpy(a.astype(np.float64)).exp() for a in (stored.topk_logprobs, stored.tail_logprobs))
    distance = ((kept - again).abs().sum(1) + (tail - outside.exp().sum(1)).abs()) / 2
    missed = outside.max(1).values.exp() - again.min(1).values
    return float(torch.maximum(distance, missed).max())


def _require(store: SignalStore, example_id: str, errors: dict[str, float], tolerance: float) -> None:
    for name, error in errors.items():
        if not error <= tolerance:
            shard: Any = store.index[example_id][0]
            raise UserError(
                f"{store.path / shard}: example {example_id}: stored {name} differs from the teacher's by {error:.3g} "
                f"(tolerance {tolerance:g}): the store is not this teacher's"
            )
