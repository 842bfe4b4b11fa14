"""Products of float32 activations with 16-bit weights, as exact as float32's own, by a GPU's 16-bit matrix units."""

from __future__ import annotations

import copy
from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn

from stillroom.config import Precision
from stillroom.models.adapters import without_adapters
from stillroom.models.architecture import PROBE, relative_error, try_miniature
from stillroom.models.precision import DTYPES, scored_by_parts

PARTS = {torch.float16: 2, torch.bfloat16: 3}
"""Into how many numbers of the weights' dtype a float32 is cut: 22 bits of it are kept, or all 24."""


class SplitLinear(nn.Module):
    """A linear layer whose weights are 16-bit numbers: x is cut into parts of their dtype, and the products are added.

    A product of two 16-bit numbers is exact in float32, in which the matrix units add. So the result is off by what a
    float32 product would be off by, at a half or a third of the 16-bit rate: many times a GPU's rate in float32.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype) -> None:
        """`linear`: its weights must be representable in `dtype`."""
        super().__init__()
        self.weight = nn.Parameter(linear.weight.detach().to(dtype), requires_grad=False)
        self.bias = linear.bias

    def forward(self, x: Float[Tensor, "... d"]) -> Float[Tensor, "... D"]:
        """In float32, whatever precision x has."""
        rows = x.reshape(-1, x.shape[-1]).float()
        scale = None
        if self.weight.dtype == torch.float16:  # of little range: each row is brought to 1 by a power of two
            scale = torch.exp2(rows.abs().amax(-1, keepdim=True).clamp(min=1e-30).log2().floor())
            rows = rows / scale
        pieces = []
        for _ in range(PARTS[self.weight.dtype]):
            pieces.append(rows.to(self.weight.dtype))
            rows = rows - pieces[-1].float()
        result: Tensor = _product(torch.cat(pieces), self.weight).unflatten(0, (len(pieces), -1)).sum(0)
        result = result if scale is None else result * scale
        result = result if self.bias is None else result + self.bias
        shaped: Tensor = result.view(*x.shape[:-1], len(self.weight))
        return shaped


def _product(left: Float[Tensor, "n d"], weight: Float[Tensor, "D d"]) -> Float[Tensor, "n D"]:
    """left · weightᵀ added up in float32."""
    if left.is_cuda:
        added: Tensor = torch.mm(left, weight.T, out_dtype=torch.float32)
        return added
    return left.float() @ weight.float().T


def split_products(model: transformers.PreTrainedModel, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The float32 model with every linear layer a `SplitLinear`, in place; its weights are numbers of `dtype`.

    A layer with a forward pass of its own, such as a router, stays as it is.
    """
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, SplitLinear(module, dtype))
    return model


def can_be_split(config: Any, dtype: torch.dtype) -> bool:
    """Whether an architecture computes with `split_products` what it computes in float32: tried on a miniature.

    Some look at their layers' weights themselves, and break off or round what they read to the weights' dtype.
    """
    sparse = copy.deepcopy(config)
    if getattr(sparse.get_text_config(), "index_topk", None):
        sparse.get_text_config().index_topk = 8  # what chooses the tokens to look at then chooses in a short text too
    model = try_miniature(sparse)
    if model is None:
        return False
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    try:
        with torch.no_grad():
            expected = model(input_ids=_PROBE, use_cache=False).logits
            found = split_products(model, dtype)(input_ids=_PROBE, use_cache=False).logits
    except Exception:  # whatever an architecture's own code raises
        return False
    return relative_error(found, expected) <= _ROUNDING


_PROBE = PROBE.repeat(1, 8)
"""Long enough that an architecture that looks at few tokens leaves most out."""

_ROUNDING = 1e-4
"""What float32 products of another order may differ by after two layers; one rounded to 16 bits is far beyond it."""


def scoring_copy(
    model: transformers.PreTrainedModel, saved: Precision, dtype: Precision
) -> transformers.PreTrainedModel:
    """The model as its checkpoint, `saved` in one dtype, is loaded in another; without rounding, the model itself.

    In float32 on a GPU, products of weights saved in 16 bits are `split_products`, where the architecture allows.
    Parameters alone are cast, on the way: buffers such as rotary frequencies lose their meaning in 16 bits.
    """
    model = without_adapters(model)
    if saved == dtype == "float32":
        return model.eval()
    cast = {
        id(p): torch.nn.Parameter(p.detach().to(DTYPES[saved]).to(DTYPES[dtype]), False) for p in model.parameters()
    }
    copied = copy.deepcopy(model, cast).eval()  # deepcopy takes what is copied already from the dictionary
    by_parts = scored_by_parts(saved, dtype, model.device.type) and can_be_split(model.config, DTYPES[saved])
    return split_products(copied, DTYPES[saved]) if by_parts else copied
