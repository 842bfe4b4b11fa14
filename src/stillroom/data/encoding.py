"""Text to tokens, and which character each token ends at. The only next-token shift is here.

A token's start is unreliable across tokenizer families (some leave the leading space out); its end is reliable.
Where a tokenizer normalises, the offsets it gives inside a rewritten cluster are not: `e` + combining acute
becomes one character with end 1, although two were read. There, every end inside moves to the cluster's end.
Nor are they where a byte-level tokenizer trims white space from them: it is asked not to. A token for a space that
the tokenizer itself put before the text has read nothing: its end is 0.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import regex
from jaxtyping import Bool, Int, Int32
from numpy import ndarray
from tokenizers import Tokenizer

_CLUSTER = regex.compile(r"\X")

_TEXTS = 512
"""Texts the tokenizer is given at a time: what it returns is ten times an `Encoding`."""


class Ask(NamedTuple):
    """The template's last token before a learnt turn: it predicts the turn's first."""

    turn: int
    position: int
    before: str
    """What the first token has to write before the content: white space, or nothing."""


@dataclass(frozen=True)
class Encoding:
    """One text under one tokenizer; position t of every array is token t of the sequence."""

    ids: Int32[ndarray, "T"]
    ends: Int32[ndarray, "T"]
    """Character of the original text at which the token ends (exclusive); for a special token, the previous one's."""
    special: Bool[ndarray, "T"]
    """Tokens the tokenizer (or `add_eos`, or a chat's template) put there: they stand for no text."""
    learnt: Bool[ndarray, "T"] | None = None
    """Of a chat: tokens of the turns that are learnt. None: those that end inside the answer."""
    written: Bool[ndarray, "T"] | None = None
    """Of a chat: the template's tokens that the model has to write, as the turn's end. None: a final EOS."""
    asks: tuple[Ask, ...] = ()
    """Of a chat: where each learnt turn is asked for."""

    def __len__(self) -> int:
        return len(self.ids)


def encode(tokenizer: Any, text: str, *, add_eos: bool = False) -> Encoding:
    """Tokenise one text once, with the model's own special tokens; `add_eos` ends it with EOS."""
    return encode_many(tokenizer, [text], add_eos=add_eos)[0]


def encode_many(tokenizer: Any, texts: Sequence[str], *, add_eos: bool = False) -> list[Encoding]:
    """As `encode`, for many texts at once."""
    encodings = []
    reader = _untrimmed(tokenizer)
    for first in range(0, len(texts), _TEXTS):
        part = list(texts[first : first + _TEXTS])
        batch = reader(part, return_offsets_mapping=True, return_special_tokens_mask=True)
        rows = zip(part, batch["input_ids"], batch["offset_mapping"], batch["special_tokens_mask"], strict=True)
        encodings += [_encoding(tokenizer, *row, add_eos) for row in rows]
    return encodings


def read_whole(tokenizer: Any, text: str) -> Encoding:
    """A text that has its special tokens in it: none is added, and none is taken for one."""
    read = _untrimmed(tokenizer)(text, add_special_tokens=False, return_offsets_mapping=True)
    return _encoding(tokenizer, text, read["input_ids"], read["offset_mapping"], [0] * len(read["input_ids"]), False)


def without_trailing_specials(encoding: Encoding) -> Encoding:
    """The encoding of a prompt, to be continued: without what a tokenizer puts after a text, such as EOS."""
    text = np.flatnonzero(~encoding.special)
    length = int(text[-1]) + 1 if len(text) else len(encoding)
    return Encoding(encoding.ids[:length], encoding.ends[:length], encoding.special[:length])


_UNTRIMMED: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()


def _untrimmed(tokenizer: Any) -> Any:
    """The tokenizer, or a copy of the same ids whose offsets leave no white space out."""
    if tokenizer not in _UNTRIMMED:
        described = json.loads(tokenizer.backend_tokenizer.to_str())
        if _trim_no_offsets(described):
            twin = copy.deepcopy(tokenizer)
            twin._tokenizer = Tokenizer.from_str(json.dumps(described))
            _UNTRIMMED[tokenizer] = twin
        else:
            _UNTRIMMED[tokenizer] = None
    return _UNTRIMMED[tokenizer] or tokenizer


def _trim_no_offsets(part: Any) -> bool:
    """Switch the trimming of offsets off in a description's post-processors; whether any had it on."""
    parts, found = [part], False
    while parts:
        inner = parts.pop() or {}
        if inner.get("trim_offsets"):
            inner["trim_offsets"], found = False, True
        parts += [inner.get("post_processor"), *inner.get("processors", [])]
        parts = [p for p in parts if p]
    return found


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
    if len(first := np.flatnonzero(~is_special)) and is_invented(tokenizer, ids, first, text):
        ends[first[0]] = 0
    ends = _ends_in_original(tokenizer, text, ends)
    # a token with bytes of two characters: the token before it ends inside the first of them, not after it
    for token in range(len(ends) - 1, 0, -1):
        if not is_special[token] and offsets[token][0] < ends[token - 1] < ends[token]:
            ends[token - 1] = ends[token]
    return Encoding(np.array(ids, dtype=np.int32), np.maximum.accumulate(ends), is_special)


def is_invented(tokenizer: Any, ids: list[int], positions: Int[ndarray, "N"], text: str) -> bool:
    """Whether the first token of text is a space alone that the tokenizer put before it: `▁` of `▁中文`.

    It is where the tokens begin with more spaces than the text does.
    """
    if tokenizer.convert_ids_to_tokens(ids[positions[0]]) not in _SPACE:
        return False
    spaces = 0
    for position in positions:
        token = tokenizer.convert_ids_to_tokens(ids[position])
        bare = token.lstrip("▁Ġ ")
        spaces += len(token) - len(bare)
        if bare:
            break
    return spaces > len(text) - len(text.lstrip(" "))


_SPACE = {"▁", "Ġ", " "}


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
    """Tokens that end inside the answer, or a chat's learnt turns; `prompt_length` in characters. Specials are not."""
    return in_text(encoding) & (encoding.ends > prompt_length) if encoding.learnt is None else encoding.learnt


def in_text(encoding: Encoding) -> Bool[ndarray, "T"]:
    """Tokens that have read some of the text. Specials are not."""
    return ~encoding.special & (encoding.ends > 0)


def supervised_predictions(encoding: Encoding, prompt_length: int) -> tuple[Int32[ndarray, "N"], Int32[ndarray, "N"]]:
    """The shift: positions whose next token is supervised, and the ids of those next tokens.

    Supervised are the tokens that end inside the answer, and a final EOS; of a chat, those of its learnt turns, and
    what the model writes around each itself. logits[position] predicts target.
    """
    supervised = in_answer(encoding, prompt_length).copy()
    if encoding.written is None:
        supervised[-1] |= encoding.special[-1] and len(encoding) > 1
    else:
        supervised |= encoding.written
    targets = np.flatnonzero(supervised)
    targets = targets[targets > 0]
    return (targets - 1).astype(np.int32), encoding.ids[targets]


def fits(encoding: Encoding, max_length: int) -> bool:
    """Whether the encoding has at most `max_length` tokens."""
    return len(encoding) <= max_length
