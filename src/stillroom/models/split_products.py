"""Products of float32 activations with 16-bit weights, as exact as float32's own, by a GPU's 16-bit matrix units."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from jaxtyping import Float
from torch import Tensor, nn

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
        shaped: Tensor = result.view(*x.shape[:-1], -1)
        return shaped


def _product(left: Float[Tensor, "n d"], weight: Float[Tensor, "D d"]) -> Float[Tensor, "n D"]:
    """left · weightᵀ added up in float32."""
    if left.is_cuda:
        added: Tensor = torch.mm(left, weight.T, out_dtype=torch.float32)
        return added
    return left.float() @ weight.float().T


def split_products(model: transformers.PreTrainedModel, dtype: torch.dtype) -> transformers.PreTrainedModel:
    """The float32 model with every linear layer a `SplitLinear`, in place; its weights are numbers of `dtype`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear):
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, SplitLinear(module, dtype))
    head: Any = model.get_output_embeddings()
    if isinstance(head, nn.Linear):
        raise TypeError(f"{type(model).__name__} keeps its output head elsewhere")
    return model
