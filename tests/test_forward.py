"""One forward pass: what it leaves behind does not depend on padding, or on a mask that says where that is."""

from __future__ import annotations

import pytest
import torch

from stillroom.data.encoding import encode_many
from stillroom.models.attention_capture import attention_recorder
from stillroom.models.forward import Taps, forward, padded
from stillroom.models.hub import load_model, load_tokenizer


def run(model, encodings, masked):
    """Hidden states and maps of the tokens, example after example, and every gradient of the sum of their squares."""
    ids, mask = padded(encodings)
    model.zero_grad()
    if masked:
        with attention_recorder(model, frozenset({model.config.num_hidden_layers - 1})) as recorder:
            positions = (mask.cumsum(-1) - 1).clamp(min=0)
            hidden = model.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False)
        hidden, (maps,) = hidden.last_hidden_state, recorder.maps.values()
    else:
        passed = forward(model, ids, Taps(attention=frozenset({"last"})))
        hidden, maps = passed.last_hidden, passed.attention["last"]
    found = []
    for row, encoding in enumerate(encodings):
        length = len(encoding)
        found += [hidden[row, :length], maps[row, :, :length, :length]]
    sum(part.float().square().sum() for part in found).backward()
    return [part.detach() for part in found], [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 2e-6), (torch.bfloat16, 0.03)])
def test_without_a_mask_every_value_is_the_same_to_the_bit(teacher_ref, examples, dtype, rounding):
    """No token sees the padding to its right. Gradients of shared key heads are added in another order, no more."""
    texts = [example.text[: 1 + 7 * n] for n, example in enumerate(examples.train[:6])]
    encodings = encode_many(load_tokenizer(teacher_ref), texts)
    assert len({len(encoding) for encoding in encodings}) > 3
    model = load_model(teacher_ref).to(dtype)
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    (with_mask, expected), (without, gradients) = (run(model, encodings, masked) for masked in (True, False))
    assert all(torch.equal(a, b) for a, b in zip(with_mask, without, strict=True))
    for gradient, reference in zip(gradients, expected, strict=True):
        assert float((gradient - reference).norm()) <= rounding * float(reference.norm())
