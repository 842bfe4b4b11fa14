"""Greedy decoding of one batch of prompts, step by step, with a cache that grows or one of a fixed size."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from types import SimpleNamespace
from typing import Any, Protocol, runtime_checkable

import torch
import transformers
from jaxtyping import Bool, Int
from torch import Tensor

from stillroom.errors import UserError, first_line
from stillroom.models.precision import is_sharded


@runtime_checkable
class Decoder(Protocol):
    """Prompts of a batch and what has been made after each of them."""

    @property
    def resumes(self) -> bool:
        """Whether `more` may be called more than once."""

    def more(self, count: int) -> Int[Tensor, "B N"]:
        """Make so many tokens more for each; returns all that were made."""

    def keep(self, wanted: Bool[Tensor, "B"]) -> bool:
        """Leave the other rows out from now on, if that pays; returns whether they are."""


class Growing:
    """Transformers' own `generate`, a piece at a time, with a cache that grows and rows that leave it."""

    def __init__(
        self,
        model: transformers.PreTrainedModel,
        tokenizer: Any,
        ids: Int[Tensor, "B T"],
        mask: Int[Tensor, "B T"],
        stops: Sequence[int],
    ) -> None:
        """Prompts padded on the left. A row ends at one of `stops`; the model's generation config is replaced."""
        self._model, self._ids, self._mask, self._start = model, ids, mask, ids.shape[1]
        self._cache = transformers.DynamicCache(config=model.config)
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        self._greedy = {"do_sample": False, "eos_token_id": list(stops), "pad_token_id": pad}

    @property
    def resumes(self) -> bool:
        """Not without one layer of attention: no other knows how much of the text it has read."""
        return _attends(self._cache)

    def more(self, count: int) -> Int[Tensor, "B N"]:
        """Make so many tokens more for each, or until all rows have ended; returns all that were made."""
        greedy = transformers.GenerationConfig(**self._greedy, max_new_tokens=count)
        self._model.generation_config = greedy  # a model's own penalties must not count
        self._ids = self._model.generate(
            self._ids, attention_mask=self._mask, generation_config=greedy, cache=self._cache
        )
        self._mask = torch.nn.functional.pad(self._mask, (0, self._ids.shape[1] - self._mask.shape[1]), value=1)
        return self._ids[:, self._start :]

    def keep(self, wanted: Bool[Tensor, "B"]) -> bool:
        """The other rows leave the batch and its cache, whose layers may be on several GPUs: indices are the CPU's."""
        kept = wanted.nonzero()[:, 0].cpu()
        self._ids, self._mask = self._ids[kept], self._mask[kept]
        self._cache.reorder_cache(kept)  # unlike `batch_select_indices`, every kind of layer has it
        return True


def _attends(cache: transformers.Cache) -> bool:
    return any(isinstance(layer, transformers.cache_utils.CacheLayerMixin) for layer in cache.layers)


@torch.no_grad()
def require_generation(model: transformers.PreTrainedModel, config: Any) -> None:
    """`UserError` if texts made in a batch, in pieces, are not what plain forward passes of each would give.

    `model`: a miniature, whose weights are changed, so that what it writes depends on what it has read. `config`: of
    the model itself; a miniature without the attention layers that it has cannot be tried.
    """
    name, rounding = type(model).__name__, 1e-2
    if _attends(transformers.DynamicCache(config=config)) and not _attends(
        transformers.DynamicCache(config=model.config)
    ):
        return
    for weights in model.parameters():
        if weights.dim() > 1 and float(weights.std()) < 0.05:
            weights.mul_(5)
    prompts = [list(range(3, 3 + length)) for length in (14, 9, 4)]
    before, width = model.generation_config, max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    ends = SimpleNamespace(pad_token_id=0, eos_token_id=0)
    try:
        decoder = Growing(model, ends, ids, (ids > 0).long(), [_NO_TOKEN])
        made = decoder.more(3).tolist()
        if decoder.resumes:
            decoder.keep(torch.tensor([False, True, True]))
            made[1:] = decoder.more(3).tolist()
        for prompt, answer in zip(prompts, made, strict=True):
            text = torch.tensor([prompt + answer], device=model.device)
            logits = model(input_ids=text, use_cache=False).logits[0, len(prompt) - 1 : -1]
            lacking = logits.amax(1) - logits.gather(1, text[0, len(prompt) :, None])[:, 0]
            if not bool((lacking <= rounding * logits.std()).all()):
                raise UserError(
                    f"{name}: texts that it writes in a batch are not those it writes alone; no task of this study may "
                    "be answered by generated text"
                )
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # any architecture's own code
        raise UserError(
            f"{name}: it cannot write texts in a batch ({type(error).__name__}: {first_line(error)[:200]}); no task of "
            "this study may be answered by generated text"
        ) from error
    finally:
        model.generation_config = before


_NO_TOKEN = 2**31 - 1
"""An id that ends no text."""


def fixed_cache(config: Any, room: int) -> transformers.Cache:
    """A cache with room for so many tokens in every layer. `UserError` names a layer that has no such cache.

    A sliding window as wide as the room hides nothing, and its layer is as any other. Transformers' own cache of a
    narrower one counts on the host, which the replay of a recorded step does not.
    """
    kinds = transformers.cache_utils
    layers = transformers.StaticCache(config=config, max_cache_len=room).layers
    for number, layer in enumerate(layers, start=1):
        whole = type(layer) in (kinds.StaticLayer, kinds.StaticSlidingWindowLayer) and layer.max_cache_len == room
        if not whole:
            raise UserError(
                f"evaluation.static_cache: layer {number} of {config.model_type} does not attend to all of {room} "
                "tokens; leave it out"
            )
    return transformers.Cache(layers=[kinds.StaticLayer(max_cache_len=room) for _ in layers])


def require_static_cache(model: transformers.PreTrainedModel) -> None:
    """`UserError` if the architecture cannot use a cache of fixed size, or its steps cannot be recorded."""
    if not getattr(model, "_can_compile_fullgraph", False):  # its windows or states are not in its configuration
        raise UserError(f"evaluation.static_cache: {type(model).__name__} does not support it; leave it out")
    if any("dynamic" in kind for kind in _rope_types(model.config)):
        raise UserError(
            "evaluation.static_cache: dynamic RoPE scaling measures the text at every step; leave static_cache out"
        )


def _rope_types(config: Any) -> set[str]:
    """Names of the rotary embeddings' scaling: one for all layers, or one for each kind of layer."""
    given = getattr(config.get_text_config(), "rope_parameters", None) or {}
    return {str(kind.get("rope_type")) for kind in (given, *given.values()) if isinstance(kind, dict)}


class Fixed:
    """Steps that all compute the same shapes in the same memory, with a cache that has room for every token.

    On a GPU one step is recorded as a CUDA graph and replayed: to launch its hundreds of kernels one by one takes
    longer than to run them. A row that has ended may stay; its further tokens mean nothing.
    """

    def __init__(
        self, model: transformers.PreTrainedModel, ids: Int[Tensor, "B T"], mask: Int[Tensor, "B T"], limit: int
    ) -> None:
        """Prompts padded on the left; `limit`: the most tokens to make. `UserError` if the model has no such cache."""
        require_static_cache(model)
        self._cache = fixed_cache(model.config, ids.shape[1] + limit)
        self._model, self._count = model, 0
        self._replay: Callable[[], None] | None = None
        self._can_be_recorded = _can_be_recorded(model)
        self._mask = torch.nn.functional.pad(mask, (0, limit), value=1)  # causality hides what is not there yet
        self._token, self._position = ids, (mask.cumsum(1) - 1).clamp(min=0)
        self._made, self._place = ids.new_zeros(len(ids), limit), ids.new_zeros(len(ids), 1)

    @property
    def resumes(self) -> bool:
        """Always."""
        return True

    def more(self, count: int) -> Int[Tensor, "B N"]:
        """Make so many tokens more for each; returns all that were made."""
        for _ in range(count):
            if self._count == 0:
                self._read_prompts()
            elif self._replay is not None:
                self._replay()
            else:
                self._next()  # not recorded: libraries set themselves up in a first run
                self._replay = self._recorded() if self._can_be_recorded else None
            self._count += 1
        return self._made[:, : self._count]

    def keep(self, wanted: Bool[Tensor, "B"]) -> bool:
        """The other rows leave once half of them can: the next step must be recorded again."""
        if 2 * int(wanted.sum()) > len(wanted):
            return False
        kept = wanted.nonzero()[:, 0].to(self._made.device)
        self._cache.reorder_cache(kept)
        for name in ("_mask", "_token", "_position", "_made", "_place"):
            setattr(self, name, getattr(self, name)[kept])
        self._replay = None
        return True

    def _read_prompts(self) -> None:
        token = self._likeliest()
        self._token, self._position = token, self._position[:, -1:] + 1
        self._made[:, :1] = token
        self._place += 1

    def _next(self) -> None:
        """One token for each row; nothing is asked of the device, and no tensor that stays is replaced."""
        self._token.copy_(self._likeliest())
        self._made.scatter_(1, self._place, self._token)
        self._position += 1
        self._place += 1

    def _likeliest(self) -> Int[Tensor, "B 1"]:
        logits = self._model(
            input_ids=self._token,
            attention_mask=self._mask,
            position_ids=self._position,
            cache=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        return torch.as_tensor(logits[:, -1:].argmax(-1))

    def _recorded(self) -> Callable[[], None]:
        """A step as a CUDA graph; other threads may go on using the device. `UserError` if the model forbids it."""
        graph, device, causes = torch.cuda.CUDAGraph(), self._token.device, []
        try:
            with (
                torch.cuda.device(device),
                torch.cuda.stream(torch.cuda.current_stream(device)),  # which a failed recording does not go back to
                torch.cuda.graph(graph, stream=_recording_stream(device), capture_error_mode="thread_local"),
            ):
                try:
                    self._next()
                except RuntimeError as error:  # such as a number that the step asks of the device
                    causes.append(error)
                    raise
        except RuntimeError as error:  # the end of a failed recording raises too
            cause = (causes or [error])[0]
            if isinstance(cause, torch.OutOfMemoryError):
                raise cause from None
            raise UserError(
                f"evaluation.static_cache: no step of {type(self._model).__name__} can be recorded as a CUDA graph "
                f"({first_line(cause)}); leave it out"
            ) from error
        return graph.replay


@cache
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings on a device: libraries keep a workspace for each."""
    return torch.cuda.Stream(device)


def _can_be_recorded(model: transformers.PreTrainedModel) -> bool:
    """Whether all weights are on one GPU, none shared out over processes."""
    weights = list(model.parameters())
    return (
        {w.device.type for w in weights} == {"cuda"}
        and len({w.device for w in weights}) == 1
        and not any(map(is_sharded, weights))
    )
