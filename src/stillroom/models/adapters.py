"""LoRA layers: put beside a model's own, taken out of it as a file, or merged into its weights."""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from safetensors import safe_open
from safetensors.torch import save_file

from stillroom.config import Lora
from stillroom.errors import UserError

ADAPTER = "adapter.safetensors"
"""The LoRA layers alone, float32, under peft's names; what made them is in the file's metadata."""
_NAME = "default"


def lora_adapter(lora: Lora) -> Callable[[Any], Any]:
    """Puts LoRA layers beside a model's own, which are trained no more. `UserError` names targets that it cannot."""

    def add_adapters(model: Any) -> Any:
        from peft import LoraConfig, get_peft_model
        from peft.tuners.tuners_utils import BaseTunerLayer

        targets = lora.targets if isinstance(lora.targets, str) else list(lora.targets)
        settings = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=targets)
        try:
            adapted = get_peft_model(model, settings).get_base_model()
        except ValueError as error:
            linear = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if _linear(module)})
            raise UserError(
                f"student.lora.targets: {targets}: {str(error).splitlines()[0]}; linear layers of "
                f"{type(model).__name__}: {', '.join(linear)}"
            ) from None
        if any(
            isinstance(m, BaseTunerLayer) for m in (adapted.get_output_embeddings(), adapted.get_input_embeddings())
        ):
            raise UserError(
                f"student.lora.targets: {targets}: the embeddings and the output head cannot have LoRA layers; "
                "leave them out"
            )
        return adapted

    return add_adapters


def _linear(module: Any) -> bool:
    from torch import nn

    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def has_adapters(model: transformers.PreTrainedModel) -> bool:
    """Whether a model carries LoRA layers; without them, peft need not be imported, which takes seconds."""
    layers = sys.modules.get("peft.tuners.tuners_utils")
    return layers is not None and any(isinstance(module, layers.BaseTunerLayer) for module in model.modules())


def without_adapters(model: transformers.PreTrainedModel) -> transformers.PreTrainedModel:
    """The model itself, or, if it carries LoRA layers, a copy with them merged into its weights."""
    if not has_adapters(model):
        return model
    from peft.tuners.tuners_utils import BaseTunerLayer

    merged = copy.deepcopy(model)
    for name, module in list(merged.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, leaf = name.rpartition(".")
            setattr(merged.get_submodule(parent), leaf, module.get_base_layer())
    return merged


def save_adapter(model: transformers.PreTrainedModel, folder: Path) -> None:
    """Write `adapter.safetensors` if the model carries LoRA layers."""
    if not has_adapters(model):
        return
    tensors = {
        f"base_model.model.{name.replace(f'.{_NAME}.', '.')}": tensor.detach().cpu().contiguous()
        for name, tensor in model.state_dict().items()
        if f".lora_A.{_NAME}." in name or f".lora_B.{_NAME}." in name
    }
    settings = model.peft_config[_NAME].to_dict()
    said = {name: sorted(value) if isinstance(value, set) else value for name, value in settings.items()}
    save_file(tensors, folder / ADAPTER, {"peft": json.dumps(said, default=str)})


def write_peft_folder(adapter: Path, folder: Path, base: str, revision: str | None) -> None:
    """`adapter_model.safetensors` and `adapter_config.json`, as peft reads them with the `base` model."""
    from peft import LoraConfig

    with safe_open(adapter, "pt") as file:
        settings = json.loads(file.metadata()["peft"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    config = LoraConfig(
        r=settings["r"],
        lora_alpha=settings["lora_alpha"],
        target_modules=settings["target_modules"],
        base_model_name_or_path=base,
        revision=revision,
        task_type="CAUSAL_LM",
        inference_mode=True,
    )
    config.save_pretrained(folder)
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
