"""One pass of either model, leaving behind the inner values that were asked for."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import transformers
from jaxtyping import Float, Int
from torch import Tensor, nn

from stillroom.data.encoding import Encoding
from stillroom.errors import UserError

Tap = int | Literal["last"]
"""A layer by its number, from 1, or the last one: whose hidden state is the one after the final norm."""


@dataclass(frozen=True)
class Taps:
    """Which inner values a forward pass leaves behind, by layer."""

    hidden: frozenset[Tap] = frozenset({"last"})
    attention: frozenset[Tap] = frozenset()
    values: frozenset[Tap] = frozenset()

    def __or__(self, other: Taps) -> Taps:
        """What either asks for."""
        return Taps(self.hidden | other.hidden, self.attention | other.attention, self.values | other.values)


@dataclass(frozen=True)
class Forward:
    """What one forward pass has left."""

    last_hidden: Float[Tensor, "B T D"]
    """After the final norm: what the output head reads."""
    hidden: Mapping[Tap, Float[Tensor, "B T D"]] = field(default_factory=dict)
    """By the layers that were asked for: the residual stream after that block, or the last hidden state."""
    attention: Mapping[Tap, Float[Tensor, "B H T T"]] = field(default_factory=dict)
    """Post-softmax maps, float32, by the layers that were asked for."""
    values: Mapping[Tap, Float[Tensor, "B T W"]] = field(default_factory=dict)
    """Value vectors of the key-value heads, one after the other, by the layers that were asked for."""


def forward(model: transformers.PreTrainedModel, ids: Int[Tensor, "B T"], taps: Taps = Taps()) -> Forward:
    """Run the model without its output head, on sequences padded on the right.

    Attention is causal, so no token sees what stands to its right, and no padding mask is needed: without one, fast
    kernels run, and nothing waits for a GPU to say whether there is padding. What it gives for padding means nothing.
    Raises `UserError` where a layer's attention passes the attention function by.
    """
    # not at the top: it needs Transformers' modelling code, seconds of import for a command that loads no model
    from stillroom.models.attention_capture import CANNOT, Recorder, attention_recorder

    maps, values = ({tap: layer_number(model, tap) - 1 for tap in kind} for kind in (taps.attention, taps.values))
    blocks = {tap: layer_number(model, tap) - 1 for tap in taps.hidden if tap != "last"}
    with _block_outputs(model, frozenset(blocks.values())) as states:
        if not maps and not values:
            last, recorder = last_hidden_state(model, ids), Recorder(frozenset())
        else:
            with attention_recorder(model, frozenset(maps.values()), frozenset(values.values())) as recorder:
                last = last_hidden_state(model, ids)
    for asked, found in ((maps, recorder.maps), (values, recorder.values)):
        if missing := sorted(set(asked.values()) - set(found)):
            raise UserError(f"{CANNOT.format(type(model).__name__)} in layer {missing[0] + 1}; not supported")
    hidden: dict[Tap, Tensor] = {tap: states[block] for tap, block in blocks.items()}
    if "last" in taps.hidden:
        hidden["last"] = last
    return Forward(
        last,
        hidden,
        {tap: recorder.maps[block] for tap, block in maps.items()},
        {tap: recorder.values[block] for tap, block in values.items()},
    )


def layer_number(model: transformers.PreTrainedModel, tap: Tap) -> int:
    """A layer's number, from 1; `UserError` if the model has no such layer."""
    layers = int(model.config.get_text_config().num_hidden_layers)
    if tap != "last" and tap > layers:
        raise UserError(f"{type(model).__name__} has {layers} layers, so no layer {tap}")
    return layers if tap == "last" else tap


@contextmanager
def _block_outputs(model: transformers.PreTrainedModel, wanted: frozenset[int]) -> Iterator[dict[int, Tensor]]:
    """Keep what chosen blocks, from 0, give to the next one: only those, not every layer of a pass."""
    found: dict[int, Tensor] = {}
    if not wanted:
        yield found
        return
    blocks = blocks_of(model)

    def keep(number: int) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            found[number] = output[0] if isinstance(output, tuple) else output

        return hook

    hooks = [blocks[number].register_forward_hook(keep(number)) for number in wanted]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def blocks_of(model: transformers.PreTrainedModel) -> nn.ModuleList:
    """The list of a model's blocks: the first as long as the model has layers."""
    layers = int(model.config.get_text_config().num_hidden_layers)
    for module in _base(model).modules():
        if isinstance(module, nn.ModuleList) and len(module) == layers:
            return module
    raise UserError(f"{type(model).__name__}: its layers cannot be told apart; only the last can be compared")


def _base(model: transformers.PreTrainedModel) -> Any:
    return model.base_model if model.base_model is not model else getattr(model, "model", model)


def last_hidden_state(model: transformers.PreTrainedModel, ids: Int[Tensor, "B T"]) -> Tensor:
    """The final layer's hidden state after the final norm, (B, T, D), of sequences padded on the right."""
    with _one_text_per_row():
        hidden: Tensor = _base(model)(input_ids=ids, use_cache=False).last_hidden_state
    return hidden


_OURS = ContextVar("stillroom_pass", default=False)
"""Whether a forward pass of this thread is ours."""


@contextmanager
def _one_text_per_row() -> Iterator[None]:
    """Tell Transformers that no row holds several texts, which it would ask a GPU in every pass, and wait.

    Passes that are not ours find it as it was.
    """
    masks: Any = sys.modules.get("transformers.masking_utils")
    search = getattr(masks, "find_packed_sequence_indices", None)
    if search is not None and not hasattr(search, "stillroom"):

        def found(position_ids: Tensor) -> Any:
            if torch.compiler.is_compiling():  # which can ask no context variable; and compiled code does not wait
                return search(position_ids)
            return None if _OURS.get() else search(position_ids)

        found.stillroom = True  # type: ignore[attr-defined]
        masks.find_packed_sequence_indices = found
    ours = _OURS.set(True)
    try:
        yield
    finally:
        _OURS.reset(ours)


def padded(
    encodings: Sequence[Encoding], side: str = "right", device: torch.device | None = None
) -> tuple[Int[Tensor, "B T"], Int[Tensor, "B T"]]:
    """Ids and mask, padded with id 0 on one side; the mask alone says what is padding."""
    longest = max(len(e) for e in encodings)
    ids = torch.zeros(len(encodings), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, encoding in enumerate(encodings):
        place = slice(0, len(encoding)) if side == "right" else slice(longest - len(encoding), longest)
        ids[row, place] = torch.from_numpy(encoding.ids.astype("int64"))
        mask[row, place] = 1
    return ids.to(device), mask.to(device)
