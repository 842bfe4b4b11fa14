"""What a GPU is tried with before a study: its memory, the kernels that the study needs, a tiny capture and step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import transformers

from stillroom.config import Precision
from stillroom.errors import UserError
from stillroom.models.architecture import PROBE, check_capture, check_model
from stillroom.models.precision import DTYPES, release_memory


def driver(device: torch.device) -> str:
    """What PyTorch was built for, and the card. `UserError` if that build has no kernels for it."""
    properties = torch.cuda.get_device_properties(device)
    built, card = torch.cuda.get_arch_list(), f"sm_{properties.major}{properties.minor}"
    says = f"PyTorch {torch.__version__} for CUDA {torch.version.cuda}, {properties.name} ({card})"
    # a build runs on later cards of the same generation
    if not any(name.startswith(f"sm_{properties.major}") for name in built):
        raise UserError(f"{says}: this build has kernels for {', '.join(built)} only; install one for this card")
    return says


def allocate(device: torch.device, needed: int) -> None:
    """Take so many bytes and give them back. `UserError` with what is free if they cannot be had."""
    try:
        torch.empty(needed, dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError as error:
        free, total = torch.cuda.mem_get_info(device)
        raise UserError(
            f"{needed / 1e9:.1f} GB cannot be allocated: {free / 1e9:.1f} of {total / 1e9:.1f} GB are free; stop what "
            "else runs there"
        ) from error
    finally:
        release_memory()


def run_kernels(device: torch.device, dtypes: Sequence[Precision]) -> None:
    """A matrix product and an attention pass, forward and backward, in each dtype. `UserError` names one that fails."""
    for name in dtypes:
        try:
            query, key = (
                torch.randn(1, 4, 64, 64, dtype=DTYPES[name], device=device, requires_grad=True) for _ in range(2)
            )
            passed = torch.nn.functional.scaled_dot_product_attention(query, key, key, is_causal=True)
            total = (passed @ key.transpose(-1, -2)).float().sum()
            total.backward()
            finite = bool(torch.isfinite(total))
        except RuntimeError as error:
            raise UserError(f"{name}: {str(error).splitlines()[0]}; set another dtype") from error
        if not finite:
            raise UserError(f"{name}: products and attention are not finite; set another dtype")


def rehearse(model: transformers.PreTrainedModel, device: torch.device, dtype: Precision, captured: bool) -> None:
    """Take one training step with a miniature, in the dtype; then read a text, and capture it if it is to be captured.

    `UserError` if a weight does not move, or what is computed or captured is not what the model's own code gives there.
    """
    model, ids = model.to(device), PROBE.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0, fused=True)  # else weights would decay
    with torch.autocast(device.type, DTYPES[dtype], enabled=dtype != "float32"):
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    before = next(model.parameters()).detach().clone()
    optimizer.step()
    if torch.equal(before, next(model.parameters())):
        raise UserError(f"a training step in {dtype} changes no weight; set another training.precision")
    (check_capture if captured else check_model)(model.to(DTYPES[dtype]), ids)
