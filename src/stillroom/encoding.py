"""Text to tokens, and which character each token ends at. The only next-token shift is here.

A token's start is unreliable across tokenizer families (some leave the leading space out); its end is reliable.
Where a tokenizer normalises, the offsets it gives inside a rewritten cluster are not: `e` + combining acute
becomes one character with end 1, although two were read. There, every end inside moves to the cluster's end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import regex
from jaxtyping import Bool, Int32
from numpy import ndarray

_CLUSTER = regex.compile(r"\X")

_TEXTS = 512
"""Texts the tokenizer is given at a time: what it returns is ten times an `Encoding`."""


@dataclass(frozen=True)
class Encoding:
    """One text under one tokenizer; position t of every array is token t of the sequence."""

    ids: Int32[ndarray, "T"]
    ends: Int32[ndarray, "T"]
    """Character of the original text at which the token ends (exclusive); for a special token, the previous one's."""
    special: Bool[ndarray, "T"]
    """Tokens the tokenizer (or `add_eos`) put there: they stand for no text."""

    def __len__(self) -> int:
        return len(self.ids)


def encode(tokenizer: Any, text: str, *, add_eos: bool = False) -> Encoding:
    """Tokenise one text once, with the model's own special tokens; `add_eos` ends it with EOS."""
    return encode_many(tokenizer, [text], add_eos=add_eos)[0]


def encode_many(tokenizer: Any, texts: Sequence[str], *, add_eos: bool = False) -> list[Encoding]:
    """As `encode`, for many texts at once."""
    encodings = []
    for first in range(0, len(texts), _TEXTS):
        part = list(texts[first : first + _TEXTS])
        batch = tokenizer(part, return_offsets_mapping=True, return_special_tokens_mask=True)
        rows = zip(part, batch["input_ids"], batch["offset_mapping"], batch["special_tokens_mask"], strict=True)
        encodings += [_encoding(tokenizer, *row, add_eos) for row in rows]
    return encodings


def _encoding(
    tokenizer: Any,
    text: str,
    ids: list[int],
    offsets: list[tuple[int, int]],
    special: list[int],
    add_eos: bool,
) -> Encoding:
    if add_eos and not (ids and special[-1] and ids[-1] == tokenizer.eos_token_id):
        ids, special, offsets = [*ids, tokenizer.eos_token_id], [*special, 1], [*offsets, (0, 0)]
    is_special = np.array(special, dtype=bool)
    ends = np.array([end for _, end in offsets], dtype=np.int32)
    ends[is_special] = 0
    ends = _ends_in_original(tokenizer, text, ends)
    return Encoding(np.array(ids, dtype=np.int32), np.maximum.accumulate(ends), is_special)


def _ends_in_original(tokenizer: Any, text: str, ends: Int32[ndarray, "T"]) -> Int32[ndarray, "T"]:
    """Move ends that lie inside a cluster the tokenizer's normaliser rewrites to the end of that cluster."""
    normaliser = tokenizer.backend_tokenizer.normalizer
    if normaliser is None or text.isascii() or not _rewrites(normaliser, text):
        return ends
    ends = ends.copy()
    for found in _CLUSTER.finditer(text):
        start, stop = found.span()
        if stop - start > 1 and _rewrites(normaliser, found.group()):
            ends[(ends > start) & (ends < stop)] = stop
    return ends


def _rewrites(normaliser: Any, text: str) -> bool:
    """Whether normalising changes more than SentencePiece's `▁` for a space, and one put in front."""
    return normaliser.normalize_str(text).replace("▁", " ") not in (text, " " + text)


def ending_tokens(encoding: Encoding) -> Int32[ndarray, "N"]:
    """Positions of the tokens that end a stretch of text: of several with one end, the last; no specials."""
    positions = np.flatnonzero(~encoding.special & (encoding.ends > 0)).astype(np.int32)
    ends = encoding.ends[positions]
    return positions[np.append(ends[1:] != ends[:-1], True)] if len(ends) else positions


def in_answer(encoding: Encoding, prompt_length: int) -> Bool[ndarray, "T"]:
    """Tokens that end inside the answer; `prompt_length` in characters. Specials, EOS among them, are not."""
    return ~encoding.special & (encoding.ends > prompt_length)


def supervised_predictions(encoding: Encoding, prompt_length: int) -> tuple[Int32[ndarray, "N"], Int32[ndarray, "N"]]:
    """The shift: positions whose next token is supervised, and the ids of those next tokens.

    Supervised are the tokens that end inside the answer, and a final EOS. logits[position] predicts target.
    """
    supervised = in_answer(encoding, prompt_length)
    supervised[-1] |= encoding.special[-1] and len(encoding) > 1
    targets = np.flatnonzero(supervised)
    targets = targets[targets > 0]
    return (targets - 1).astype(np.int32), encoding.ids[targets]


def fits(encoding: Encoding, max_length: int) -> bool:
    """Whether the encoding has at most `max_length` tokens."""
    return len(encoding) <= max_length
