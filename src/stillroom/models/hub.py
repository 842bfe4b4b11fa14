"""A model and its tokenizer at a pinned revision: loaded, identified, checked."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import logging
import re
import socket
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
import transformers
from huggingface_hub import constants
from huggingface_hub import errors as hub_errors
from transformers.utils import logging as transformers_logging

from stillroom.config import ModelRef, Precision, Quantization
from stillroom.errors import UserError
from stillroom.files import file_sha256, read_text
from stillroom.models.precision import DTYPES, default_device

transformers_logging.set_verbosity_error()
transformers_logging.disable_progress_bar()
# peft imports it wherever it is installed; it warns of kernels that it looked for, and on every call that it casts
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def absolute(ref: ModelRef) -> ModelRef:
    """A local directory by its whole path, for processes that start elsewhere."""
    paths = {"model": str(Path(ref.model).resolve())} if is_local(ref) else {}
    template = {"chat_template": ref.chat_template.resolve()} if ref.chat_template else {}
    return ref.model_copy(update={**paths, **template})


def is_local(ref: ModelRef) -> bool:
    """Whether the reference is a directory on this machine."""
    return Path(ref.model).is_dir()


def load_tokenizer(ref: ModelRef) -> Any:
    """The model's own fast tokenizer. `UserError` if it has no character offsets or no EOS."""
    tokenizer = from_hub(transformers.AutoTokenizer, ref)
    if not tokenizer.is_fast:
        raise UserError(f"{ref.model}: its tokenizer gives no character offsets; a fast tokenizer is needed")
    if tokenizer.eos_token_id is None:
        raise UserError(f"{ref.model}: its tokenizer has no EOS token, which ends every student sequence")
    if ref.chat_template is not None:
        tokenizer.chat_template = read_text(ref.chat_template)
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


def load_model(
    ref: ModelRef, dtype: Precision = "float32", device: Any = None, quantization: Quantization | None = None
) -> transformers.PreTrainedModel:
    """The model in evaluation mode, as Transformers loads it.

    `device`: one device, or "auto" to spread the layers over the GPUs found. `quantization`: of the linear layers
    but the output head.
    """
    if device == "auto" and torch.cuda.device_count() < 2:
        device = default_device()
    placement: dict[str, Any] = {"device_map": "auto"} if device == "auto" else {}
    if quantization:
        placement = {"device_map": "auto" if device == "auto" else {"": device or default_device()}}
        placement["quantization_config"] = _quantization(quantization, dtype)
    _require_safetensors(ref)
    model, loaded = from_hub(
        transformers.AutoModelForCausalLM,
        ref,
        dtype=DTYPES[dtype],
        use_safetensors=True,
        output_loading_info=True,
        **placement,
    )
    if missing := sorted(loaded["missing_keys"]):
        raise UserError(f"{ref.model}: its files lack {len(missing)} of its weights, {missing[0]} among them")
    if unknown := _unread(model, loaded["unexpected_keys"]):
        raise UserError(
            f"{ref.model}: its files have {len(unknown)} weights that its config.json does not know, {unknown[0]} "
            "among them: it describes another model"
        )
    model.eval()
    return model if placement or device is None else model.to(device)


def _unread(model: transformers.PreTrainedModel, keys: Iterable[str]) -> list[str]:
    """Those of the weights in the files that belong to the model, and that it has no place for.

    Of one more layer, or a bias of a product without one; what old versions saved beside the weights does not belong
    to it, nor do parts that a causal language model leaves out.
    """
    kinds = {re.sub(r"\d+", "#", name) for name, _ in model.named_parameters()}
    products = {f"{name}.bias" for name, module in model.named_modules() if getattr(module, "weight", None) is not None}
    return sorted(key for key in keys if key in products or re.sub(r"\d+", "#", key) in kinds)


def require_quantization(wanted: Quantization | None) -> None:
    """Raise `UserError` where a quantised model is wanted, and the library for it is not installed."""
    if wanted and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError(
            "teacher.quantization: bitsandbytes is not installed: pip install bitsandbytes, or leave the field out"
        )


def _quantization(wanted: Quantization, dtype: Precision) -> Any:
    require_quantization(wanted)
    if wanted == "4bit":
        return transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=DTYPES[dtype]
        )
    # by default a column stays whole where any token of the batch is large: later text would change earlier signals
    return transformers.BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)


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
    return from_hub(transformers.AutoConfig, ref)


def from_hub(kind: Any, ref: ModelRef, **options: Any) -> Any:
    """What a class of Transformers loads of a reference; `UserError` says why it cannot."""
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


_KNOWN_TOKENIZERS: dict[bytes, str] = {}
"""By the digest of what a tokenizer writes of itself: putting that in order takes a second for a large vocabulary."""


def tokenizer_hash(tokenizer: Any) -> str:
    """Digest of everything that decides how text becomes ids, 16 hex digits."""
    written = tokenizer.backend_tokenizer.to_str()
    key = hashlib.sha256(written.encode()).digest()
    if key not in _KNOWN_TOKENIZERS:
        backend = json.loads(written)
        backend.pop("padding", None)
        backend.pop("truncation", None)
        ordered = json.dumps(backend, sort_keys=True)
        _KNOWN_TOKENIZERS[key] = hashlib.sha256(ordered.encode()).hexdigest()[:16]
    return _KNOWN_TOKENIZERS[key]
