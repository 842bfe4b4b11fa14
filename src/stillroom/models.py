"""A model and its tokenizer at a pinned revision: loaded, identified, checked."""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import platform
import socket
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub import errors as hub_errors
from jaxtyping import Float
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from stillroom.config import ModelRef, Precision, Study, Training, UserError
from stillroom.provenance import file_sha256, read_json

DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def native_bfloat16(device: torch.device | None = None) -> bool:
    """Whether a device has instructions that multiply bfloat16; without, a CPU is many times slower in it."""
    device = device or default_device()
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    try:
        described = Path("/proc/cpuinfo").read_text("utf-8", "replace")
    except OSError:
        return device.type != "cpu" or platform.machine() == "arm64"  # Apple's processors have them
    flags = {word for line in described.splitlines() if line.startswith(("flags", "Features")) for word in line.split()}
    return bool(flags & {"avx512_bf16", "amx_bf16", "bf16", "svebf16"})


def resolve_precision(study: Study) -> Study:
    """The study with a dtype for each `auto`: bfloat16 where this machine multiplies it natively, else float32."""
    chosen: Precision = "bfloat16" if native_bfloat16() else "float32"

    def training(given: Training) -> Training:
        return given.model_copy(update={"precision": chosen}) if given.precision == "auto" else given

    teacher, evaluation = study.teacher, study.evaluation
    adapt = teacher.adapt.model_copy(update={"training": training(teacher.adapt.training)})
    dtype = chosen if teacher.dtype == "auto" else teacher.dtype
    scored = chosen if evaluation.dtype == "auto" else evaluation.dtype
    return study.model_copy(
        update={
            "teacher": teacher.model_copy(update={"dtype": dtype, "adapt": adapt}),
            "training": training(study.training),
            "evaluation": evaluation.model_copy(update={"dtype": scored}),
        }
    )


transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()


def absolute(ref: ModelRef) -> ModelRef:
    """A local directory by its whole path, for processes that start elsewhere."""
    return ref.model_copy(update={"model": str(Path(ref.model).resolve())}) if is_local(ref) else ref


def is_local(ref: ModelRef) -> bool:
    """Whether the reference is a directory on this machine."""
    return Path(ref.model).is_dir()


def default_device() -> torch.device:
    """The first GPU, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_tokenizer(ref: ModelRef) -> Any:
    """The model's own fast tokenizer. `UserError` if it has no character offsets or no EOS."""
    tokenizer = _from_hub(AutoTokenizer, ref)
    if not tokenizer.is_fast:
        raise UserError(f"{ref.model}: its tokenizer gives no character offsets; a fast tokenizer is needed")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{ref.model}: its tokenizer has no EOS token, which ends every student sequence")
    return tokenizer


def require_embedded(ref: ModelRef, tokenizer: Any, ids: Iterable[int]) -> None:
    """Raise `UserError` unless the model has an embedding for each of the ids that its tokenizer gives."""
    size = getattr(load_config(ref).get_text_config(), "vocab_size", None)
    beyond = [i for i in ids if isinstance(size, int) and i >= size]
    if beyond:
        token = tokenizer.convert_ids_to_tokens(beyond[0])
        raise UserError(
            f"{ref.model}: its tokenizer gives the id {beyond[0]} ({token!r}), but the model has {size} embeddings; "
            "use the tokenizer that belongs to the weights, or resize the model's embeddings and save it again"
        )


def load_model(ref: ModelRef, dtype: Precision = "float32", device: Any = None) -> PreTrainedModel:
    """The model in evaluation mode, as Transformers loads it.

    `device`: one device, or "auto" to spread the layers over the GPUs found.
    """
    if device == "auto" and torch.cuda.device_count() < 2:
        device = default_device()
    placement = {"device_map": "auto"} if device == "auto" else {}
    _require_safetensors(ref)
    model, loaded = _from_hub(
        AutoModelForCausalLM,
        ref,
        dtype=DTYPES[dtype],
        use_safetensors=True,
        output_loading_info=True,
        **placement,
    )
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(f"{ref.model}: its files lack {len(missing)} of its weights, {missing[0]} among them")
    model.eval()
    return model if placement or device is None else model.to(device)


def _require_safetensors(ref: ModelRef) -> None:
    """Raise `UserError` for a local directory without safetensors weights: unpickling others can run any code."""
    folder = Path(ref.model)
    if folder.is_dir() and not any(folder.glob("*.safetensors")):
        others = sorted(p.name for p in folder.iterdir() if p.suffix in {".bin", ".pt", ".pth", ".ckpt", ".msgpack"})
        found = f"it has {', '.join(others)}, which can run code when loaded" if others else "it has no weights"
        raise UserError(
            f"{ref.model}: only safetensors weights are loaded, and {found}; where you trust it, load it once and "
            "save_pretrained it again"
        )


def load_config(ref: ModelRef) -> Any:
    """The model's architecture, without its weights."""
    return _from_hub(AutoConfig, ref)


def _from_hub(kind: Any, ref: ModelRef, **options: Any) -> Any:
    if not is_local(ref) and ref.model.startswith(("/", ".", "~")):
        raise UserError(f"{ref.model}: no such directory")
    try:
        return kind.from_pretrained(
            ref.model,
            revision=None if is_local(ref) else ref.revision,
            trust_remote_code=ref.trust_remote_code,
            local_files_only=not is_local(ref) and _without_network(),
            **options,
        )
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a plain Exception of a Rust library, a missing package, a config's own checks: all
        raise UserError(_explain(ref, error)) from error


@cache
def _without_network() -> bool:
    """Whether the hub's name is not even known here: its client would go on trying for half a minute, file by file."""
    if constants.HF_HUB_OFFLINE or getproxies().keys() & {"http", "https", "all"}:
        return False
    try:
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
    except OSError:
        return True
    return False


def _explain(ref: ModelRef, error: Exception) -> str:
    """One line for the usual reasons that a model does not load."""
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__ or chain[-1].__context__) and len(chain) < 8:
        chain.append(cause)
    text = " ".join(str(e) for e in chain)
    gated = any(isinstance(e, hub_errors.GatedRepoError) for e in chain)
    if not gated and any(isinstance(e, hub_errors.RepositoryNotFoundError) for e in chain):
        return f"{ref.model}: the hub has no such model, or it is private: check the name, or log in (`hf auth login`)"
    if gated or "gated" in text or "401" in text:
        return (
            f"{ref.model} is gated or needs a login: accept its licence on the hub, then set HF_TOKEN "
            "or run `hf auth login`"
        )
    if "trust_remote_code" in text:
        return f"{ref.model} comes with code of its own: set trust_remote_code=true if you trust it"
    if is_local(ref):
        return f"{ref.model}: cannot be loaded: {' '.join(str(error).split())[:300]}"
    return (
        f"{ref.model} at {ref.revision or 'its newest revision'} cannot be loaded from the hub or its cache: "
        f"{' '.join(str(error).split())[:300]} Use a local directory where there is no network"
    )


def model_identity(ref: ModelRef) -> str:
    """What pins a model: `id@commit` for the hub, a digest of weights, config and tokenizer for a directory.

    A model that may run code of its own is another model than the same one that may not, and its code counts too.
    """
    code = " with its own code" if ref.trust_remote_code else ""
    if is_local(ref):
        return "sha256:" + _directory_digest(Path(ref.model), {".py"} if code else set()) + code
    if ref.revision and len(ref.revision) == 40:
        return f"{ref.model}@{ref.revision}{code}"
    commit = getattr(load_config(ref), "_commit_hash", None)
    if not commit:
        raise UserError(f"{ref.model}: its revision cannot be pinned; set revision to a commit")
    return f"{ref.model}@{commit}{code}"


def _directory_digest(folder: Path, also: set[str]) -> str:
    suffixes = {".json", ".safetensors", ".model", ".txt"} | also
    names = sorted(p.name for p in folder.iterdir() if p.suffix in suffixes)
    if not any(name.endswith(".safetensors") for name in names):
        return hashlib.sha256((folder.name + "|no weights|" + "|".join(names)).encode()).hexdigest()[:32]
    return hashlib.sha256("".join(name + file_sha256(folder / name) for name in names).encode()).hexdigest()[:32]


def tokenizer_hash(tokenizer: Any) -> str:
    """Digest of everything that decides how text becomes ids, 16 hex digits."""
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    backend.pop("padding", None)
    backend.pop("truncation", None)
    return hashlib.sha256(json.dumps(backend, sort_keys=True).encode()).hexdigest()[:16]


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
        model = _from_hub(_Skeleton, ref, config=config)
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
    def from_pretrained(_: str, config: Any, trust_remote_code: bool, **__: Any) -> PreTrainedModel:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
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


def output_logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Next-token logits (..., V) from the last hidden state (..., D); scaled, soft-capped where the model's are."""
    logits: torch.Tensor = model.get_output_embeddings()(scaled_for_head(model, hidden))
    cap = logit_softcap(model.config)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def logit_softcap(config: Any) -> float | None:
    """The cap c of `c·tanh(logits / c)`, or None (Gemma 2 is the known case)."""
    return getattr(config.get_text_config(), "final_logit_softcapping", None)


def scaled_for_head(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
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


def vocabulary_size(model: PreTrainedModel) -> int:
    """Entries of the output head, which may exceed the tokenizer's."""
    return int(model.get_output_embeddings().weight.shape[0])


def release_memory() -> None:
    """Give a GPU's memory back that nothing uses any more: other processes may need it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def width(config: Any) -> int:
    """Dimensions of the last hidden state, which the output head reads; OPT may project it to others."""
    text = config.get_text_config()
    return int(getattr(text, "word_embed_proj_dim", None) or _required(text, "hidden_size"))


def heads(config: Any) -> int:
    """Attention heads of a layer."""
    return int(_required(config.get_text_config(), "num_attention_heads"))


def _required(config: Any, name: str) -> Any:
    value = getattr(config, name, None)
    if not isinstance(value, int):
        raise UserError(f"{config.model_type}: its configuration has no {name}; this architecture is not supported")
    return value


def context_length(config: Any) -> int:
    """Tokens the model was made to read at once; where its configuration does not say, no bound is known."""
    return int(getattr(config.get_text_config(), "max_position_embeddings", None) or sys.maxsize)


def without_adapters(model: PreTrainedModel) -> PreTrainedModel:
    """The model itself, or, if it carries LoRA layers, a copy with them merged into its weights."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        return model
    merged = copy.deepcopy(model)
    for name, module in list(merged.named_modules()):
        if isinstance(module, BaseTunerLayer):
            module.merge()
            parent, _, leaf = name.rpartition(".")
            setattr(merged.get_submodule(parent), leaf, module.get_base_layer())
    return merged


def scoring_copy(model: PreTrainedModel, saved: Precision, dtype: Precision) -> PreTrainedModel:
    """The model as its checkpoint, `saved` in one dtype, is loaded in another; without rounding, the model itself.

    Parameters alone are cast, on the way: buffers such as rotary frequencies lose their meaning in 16 bits.
    """
    model = without_adapters(model)
    if saved == dtype == "float32":
        return model.eval()
    cast = {
        id(p): torch.nn.Parameter(p.detach().to(DTYPES[saved]).to(DTYPES[dtype]), False) for p in model.parameters()
    }
    return copy.deepcopy(model, cast).eval()  # deepcopy takes what is copied already from the dictionary
