"""The values of a finished store against the teacher itself, or against its output head alone."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import transformers

from stillroom.errors import UserError
from stillroom.models.output_head import OutputHead, output_logits
from stillroom.offline_teacher_data.store import SignalStore
from stillroom.signals import run_teacher, signals_of
from stillroom.signals.next_token import distribution_error

# the rounding of one forward pass, batched and not, in the dtype the teacher ran in: relative error of a whole array
TOLERANCE = {torch.float32: 0.01, torch.float16: 0.03, torch.bfloat16: 0.1}


def sample_ids(store: SignalStore, samples: int, seed: int = 0) -> list[str]:
    """A seeded draw of example ids."""
    ids = sorted(store.index)
    return random.Random(seed).sample(ids, min(samples, len(ids)))


def recompute(store: SignalStore, model: transformers.PreTrainedModel, ids: Sequence[str]) -> dict[str, float]:
    """Run the teacher again on some examples, alone and unpadded; the largest relative error of each signal.

    Raises `UserError` at the first example whose values are not those of this teacher.
    """
    signals = signals_of(store.layout)
    worst = {signal.name: 0.0 for signal in signals}
    for example_id in ids:
        stored = store.read(example_id)
        with torch.no_grad():
            again = run_teacher(model, [stored.encoding], signals)
            errors = {signal.name: signal.error(model, stored.arrays, again) for signal in signals}
        _require(store, example_id, errors, TOLERANCE[model.dtype])
        worst = {name: max(value, errors[name]) for name, value in worst.items()}
    return worst


@torch.no_grad()
def full_support_error(store: SignalStore, model: transformers.PreTrainedModel, ids: Sequence[str]) -> dict[str, float]:
    """How far distributions remade of stored hidden states and the stored head are from the teacher's own logits.

    KL(teacher ‖ remade) in nats: the `mean` over the tokens of some examples, and the `largest`. Raises `UserError` at
    an example whose total variation is beyond the tolerance.
    """
    found: list[torch.Tensor] = []
    for example_id in ids:
        stored = store.read(example_id, ["hidden"])
        again = run_teacher(model, [stored.encoding], signals_of(store.layout))
        teacher = output_logits(model, again.last_hidden[0]).double().log_softmax(-1).cpu()
        remade = (
            store.teacher_head.logits(torch.from_numpy(stored["hidden"].astype(np.float32))).double().log_softmax(-1)
        )
        variation = float((teacher.exp() - remade.exp()).abs().sum(-1).max() / 2)
        _require(store, example_id, {"full support": variation}, TOLERANCE[model.dtype])
        found.append((teacher.exp() * (teacher - remade)).sum(-1))
    divergences = torch.cat(found)
    return {"mean": float(divergences.mean()), "largest": float(divergences.max())}


@torch.no_grad()
def check_with_head(store: SignalStore, head: OutputHead, ids: Sequence[str], dtype: torch.dtype) -> dict[str, float]:
    """Without the teacher: stored hidden states × its output head must give the stored top-k and tail back."""
    worst = 0.0
    for example_id in ids:
        stored = store.read(example_id)
        logits = head.logits(torch.from_numpy(stored["hidden"].astype(np.float32)))
        error = distribution_error(stored.arrays, logits)
        _require(store, example_id, {"topk": error}, TOLERANCE[dtype])
        worst = max(worst, error)
    return {"topk": worst}


def _require(store: SignalStore, example_id: str, errors: dict[str, float], tolerance: float) -> None:
    for name, error in errors.items():
        if not error <= tolerance:
            shard: Any = store.index[example_id][0]
            raise UserError(
                f"{store.path / shard}: example {example_id}: stored {name} differs from the teacher's by {error:.3g} "
                f"(tolerance {tolerance:g}): the store is not this teacher's"
            )
