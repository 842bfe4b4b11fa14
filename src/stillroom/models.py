"""A model and its tokenizer at a pinned revision: loaded, identified, checked."""

from __future__ import annotations

import copy
import gc
import hashlib
import json
import socket
import sys
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import constants, snapshot_download
from huggingface_hub import errors as hub_errors
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import logging as transformers_logging

from stillroom.attention_capture import ATTENTION
from stillroom.config import ModelRef, Precision, UserError
from stillroom.provenance import file_sha256, read_json

DTYPES: dict[Precision, torch.dtype] = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}

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


def load_model(ref: ModelRef, dtype: Precision = "float32", device: Any = None) -> PreTrainedModel:
    """The model in evaluation mode, its last layer's attention ready for capture.

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
        attn_implementation=ATTENTION,
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
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
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
        return f"{ref.model}: cannot be loaded: {str(error).splitlines()[0]}"
    return (
        f"{ref.model} at {ref.revision or 'its newest revision'} cannot be loaded from the hub or its cache: "
        f"{str(error).splitlines()[0]} Use a local directory where there is no network"
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


def load_output_head(ref: ModelRef) -> torch.Tensor | None:
    """The output head (V, D) of a checkpoint on this disk, read alone; None where it is not found by its usual names.

    A hub model is looked for in the hub's cache.
    """
    try:
        found = (
            ref.model if is_local(ref) else snapshot_download(ref.model, revision=ref.revision, local_files_only=True)
        )
    except (OSError, ValueError):
        return None
    folder = Path(found)
    index = folder / "model.safetensors.index.json"
    files = read_json(index, "weight_map")["weight_map"] if index.is_file() else {}
    for name in ("lm_head.weight", "model.embed_tokens.weight", "transformer.wte.weight"):
        path = folder / files.get(name, "model.safetensors")
        if path.is_file():
            with safe_open(path, "pt") as tensors:
                if name in tensors.keys():  # noqa: SIM118 - not a mapping
                    head: torch.Tensor = tensors.get_tensor(name)
                    return head
    return None


def output_logits(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    """Next-token logits (..., V) from the last hidden state (..., D), soft-capped where the model does so."""
    logits: torch.Tensor = model.get_output_embeddings()(hidden)
    cap = logit_softcap(model)
    return logits if cap is None else cap * torch.tanh(logits / cap)


def logit_softcap(model: PreTrainedModel) -> float | None:
    """The cap c of `c·tanh(logits / c)`, or None (Gemma 2 is the known case)."""
    return softcap_of(model.config)


def softcap_of(config: Any) -> float | None:
    """As `logit_softcap`, from the architecture alone."""
    return getattr(config.get_text_config(), "final_logit_softcapping", None)


def vocabulary_size(model: PreTrainedModel) -> int:
    """Entries of the output head, which may exceed the tokenizer's."""
    return int(model.get_output_embeddings().weight.shape[0])


def release_memory() -> None:
    """Give a GPU's memory back that nothing uses any more: other processes may need it."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def width(config: Any) -> int:
    """Dimensions of the hidden state."""
    return int(config.get_text_config().hidden_size)


def heads(config: Any) -> int:
    """Attention heads of a layer."""
    return int(config.get_text_config().num_attention_heads)


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
