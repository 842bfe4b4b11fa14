"""The built-in teacher and student: two small Llamas with two tokenizers trained on the built-in tasks' text.

They differ in width, depth, heads and tokenizer family (byte-level BPE with no BOS against SentencePiece-style
BPE with byte fallback and BOS), so that the quickstart has everything that makes the real study hard. The student's
tokenizer was not trained on the quiz, so it splits each answer into pieces. For the teacher an answer is one token,
which has no counterpart to compare its logit with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from stillroom.config import ModelRef
from stillroom.data.tasks import TASKS
from stillroom.errors import UserError
from stillroom.files import atomic_path, exclusive

PREFIX = "builtin:"
_SHAPES: dict[str, dict[str, int]] = {
    "teacher": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
    },
    "student": {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    },
}
_VOCABULARIES = {"teacher": 640, "student": 480}


def materialise(ref: ModelRef, folder: Path) -> ModelRef:
    """The reference alone; a built-in one as a local directory under `folder`, written once."""
    ref = ModelRef(**ref.model_dump(include={*ModelRef.model_fields}))
    if not ref.model.startswith(PREFIX):
        return ref
    name = ref.model.removeprefix(PREFIX)
    if name not in _SHAPES:
        raise UserError(f"model {ref.model!r}: built in are {', '.join(PREFIX + n for n in _SHAPES)}")
    target = folder / name
    if not target.is_dir():
        with exclusive(folder, "process", f".{name}.lock", wait=60):
            if not target.is_dir():
                with atomic_path(target) as building:
                    write_builtin(name, building)
    return ref.model_copy(update={"model": str(target)})


def builtin_config(model: str) -> dict[str, Any] | None:
    """The shape of a built-in model by its reference; None for any other reference."""
    name = model.removeprefix(PREFIX)
    if not model.startswith(PREFIX) or name not in _SHAPES:
        return None
    return {**_SHAPES[name], "vocab_size": _VOCABULARIES[name], "tie_word_embeddings": True}


def write_builtin(name: str, target: Path) -> None:
    """Write one of the pair as a Hugging Face directory with random, seeded weights."""
    known = [task for task in TASKS.values() if name == "teacher" or task.name != "quiz"]
    texts = [task.build(row).text for task in known if task.generate_rows for row in task.generate_rows(9, 600)]
    train = byte_level_tokenizer if name == "teacher" else sentencepiece_tokenizer
    tokenizer = train(texts, _VOCABULARIES[name])
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        initializer_range=_SHAPES[name]["hidden_size"] ** -0.5,  # the usual 0.02 is too small to start at such widths
        tie_word_embeddings=True,
        **_SHAPES[name],
    )
    transformers.LlamaForCausalLM(config).save_pretrained(target)
    tokenizer.save_pretrained(target)


def byte_level_tokenizer(texts: list[str], vocabulary: int) -> Any:
    """GPT-2's family: byte-level BPE, digits one by one, no BOS."""
    tokenizer = Tokenizer(models.BPE())
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>")


def sentencepiece_tokenizer(texts: list[str], vocabulary: int) -> Any:
    """Llama's family: `▁` for a space and one put in front, byte fallback, BOS."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("▁", "merged_with_next"),
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Punctuation("isolated"),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    specials = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[*specials, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer = _without_added_bytes(tokenizer)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _without_added_bytes(trained: Tokenizer) -> Tokenizer:
    """The trainer takes the byte tokens for specials; rebuild with them as ordinary vocabulary."""
    import json

    described = json.loads(trained.to_str())
    described["added_tokens"] = [t for t in described["added_tokens"] if not t["content"].startswith("<0x")]
    rebuilt = Tokenizer.from_str(json.dumps(described))
    rebuilt.add_special_tokens([AddedToken(t["content"], special=True) for t in described["added_tokens"]])
    return rebuilt
