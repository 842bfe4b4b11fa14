"""From the last hidden state to next-token logits, with a model or with its head alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import snapshot_download
from jaxtyping import Float
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from stillroom.config import ModelRef
from stillroom.files import read_json
from stillroom.models.hub import from_hub, is_local, load_config


@dataclass(frozen=True)
class OutputHead:
    """What makes next-token logits of the last hidden state, apart from its model."""

    weight: Float[Tensor, "V D"]
    bias: Float[Tensor, "V"] | None
    scale: float
    softcap: float | None

    def logits(self, hidden: Float[Tensor, "T D"]) -> Float[Tensor, "T V"]:
        """Next-token logits in float32."""
        bias = None if self.bias is None else self.bias.float()
        logits = torch.nn.functional.linear(hidden.float() * self.scale, self.weight.float(), bias)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


def head_of(model: transformers.PreTrainedModel) -> OutputHead:
    """A model's output head, apart from it."""
    module: Any = model.get_output_embeddings()
    bias = getattr(module, "bias", None)
    weight = module.weight.detach().cpu()
    scale, softcap = logit_scale(model.config), logit_softcap(model.config)
    return OutputHead(weight, None if bias is None else bias.detach().cpu(), scale, softcap)


def save_output_head(head: OutputHead, path: Path) -> dict[str, float | None]:
    """Write its tensors; returns the numbers that `read_output_head` needs beside them."""
    tensors = {"weight": head.weight, **({} if head.bias is None else {"bias": head.bias})}
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    return {"scale": head.scale, "softcap": head.softcap}


def read_output_head(path: Path, scale: float, softcap: float | None) -> OutputHead:
    """The head that was written there."""
    tensors = load_file(path)
    return OutputHead(tensors["weight"], tensors.get("bias"), scale, softcap)


def load_output_head(ref: ModelRef) -> OutputHead | None:
    """The output head of a checkpoint on this disk, read alone; None where its files do not show which it is.

    A hub model is looked for in the hub's cache.
    """
    try:
        found = (
            ref.model if is_local(ref) else snapshot_download(ref.model, revision=ref.revision, local_files_only=True)
        )
    except (OSError, ValueError):
        return None
    folder, config = Path(found), load_config(ref)
    with torch.device("meta"):  # the architecture's own names, without its weights; GPT-NeoX's files have another
        model = from_hub(_Skeleton, ref, config=config)
    names = {id(module): name for name, module in model.named_modules()}
    head = model.get_output_embeddings()
    inputs = names[id(model.get_input_embeddings())]
    places = [names[id(head)], "embed_out", *([inputs] if config.get_text_config().tie_word_embeddings else [])]
    prefix = f"{model.base_model_prefix}."
    places += [place.removeprefix(prefix) for place in places if place.startswith(prefix)]
    for place in places:
        weight = _read_tensor(folder, f"{place}.weight")
        if weight is not None and weight.shape == head.weight.shape:
            bias = _read_tensor(folder, f"{place}.bias") if getattr(head, "bias", None) is not None else None
            return OutputHead(weight, bias, logit_scale(config), logit_softcap(config))
    return None


class _Skeleton:
    """Builds a model of its configuration alone, by the interface that `_from_hub` calls."""

    @staticmethod
    def from_pretrained(_: str, config: Any, trust_remote_code: bool, **__: Any) -> transformers.PreTrainedModel:
        model: transformers.PreTrainedModel = transformers.AutoModelForCausalLM.from_config(
            config, trust_remote_code=trust_remote_code
        )
        return model


def _read_tensor(folder: Path, name: str) -> Tensor | None:
    """One tensor of a checkpoint's safetensors files, if it is there."""
    index = folder / "model.safetensors.index.json"
    files = read_json(index, "weight_map")["weight_map"] if index.is_file() else {}
    path = folder / files.get(name, "model.safetensors")
    if not path.is_file():
        return None
    with safe_open(path, "pt") as tensors:
        found: Tensor | None = tensors.get_tensor(name) if name in tensors.keys() else None  # noqa: SIM118 - no mapping
        return found


def output_logits(model: transformers.PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Next-token logits (..., V) from the last hidden state (..., D); scaled, soft-capped where the model's are."""
    logits: torch.Tensor = model.get_output_embeddings()(scaled_for_head(model, hidden))
    cap = logit_softcap(model.config)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def logit_softcap(config: Any) -> float | None:
    """The cap c of `c·tanh(logits / c)`, or None (Gemma 2 is the known case)."""
    return getattr(config.get_text_config(), "final_logit_softcapping", None)


def scaled_for_head(model: transformers.PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """What the output head is to read: the hidden state times the factor that the model puts on its logits.

    A head without bias is linear, so the factor may stand before it.
    """
    scale = logit_scale(model.config)
    return hidden if scale == 1 else hidden * scale


def logit_scale(config: Any) -> float:
    """The factor that an architecture multiplies its logits by (Granite and Cohere are the known cases)."""
    text = config.get_text_config()
    factor, divisor = getattr(text, "logit_scale", None), getattr(text, "logits_scaling", None)
    return float(factor if isinstance(factor, int | float) else 1) / float(divisor or 1)
