"""Two encodings of one text, aligned by what each has read; two vocabularies, by the bytes their ids stand for."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32
from numpy import ndarray

from stillroom.encoding import Encoding, encode, ending_tokens, in_answer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


class Segments(NamedTuple):
    """How shared ends cut one model's sequence: segment g is tokens starts[g] … rows[g], inclusive."""

    starts: Int32[ndarray, "G"]
    rows: Int32[ndarray, "G"]


@dataclass(frozen=True)
class Alignment:
    """Where two models have read exactly the same text."""

    pairs: Int32[ndarray, "N 2"]
    """(teacher token, student token) that end at the same character, specials left out; increasing in both."""
    teacher: Segments
    student: Segments
    """The segments; a first one of its own for BOS when both models have one."""


def align(text: str, teacher_tokenizer: Any, student_tokenizer: Any) -> Alignment:
    """Align two tokenizers on one text. Indices count from the sequence's start, special tokens included."""
    return align_encodings(encode(teacher_tokenizer, text), encode(student_tokenizer, text))


def align_encodings(teacher: Encoding, student: Encoding) -> Alignment:
    """Align two encodings of the same text; every shared end gives one pair."""
    teacher_ends, student_ends = ending_tokens(teacher), ending_tokens(student)
    _, t, s = np.intersect1d(
        teacher.ends[teacher_ends], student.ends[student_ends], assume_unique=True, return_indices=True
    )
    pairs = np.stack([teacher_ends[t], student_ends[s]], axis=1).astype(np.int32)
    teacher_bos, student_bos = _leading_specials(teacher), _leading_specials(student)
    own_bos = bool(teacher_bos and student_bos)
    return Alignment(
        pairs,
        _segments(pairs[:, 0], teacher_bos if own_bos else 0),
        _segments(pairs[:, 1], student_bos if own_bos else 0),
    )


def _leading_specials(encoding: Encoding) -> int:
    """How many special tokens stand before the first token of text (BOS: one)."""
    return int(np.argmin(encoding.special)) if not encoding.special.all() else 0


def _segments(rows: Int32[ndarray, "N"], bos: int) -> Segments:
    if bos:
        rows = np.concatenate([np.array([bos - 1], dtype=np.int32), rows])
    starts = np.concatenate([np.zeros(1, dtype=np.int32), rows[:-1] + 1]) if len(rows) else rows
    return Segments(starts.astype(np.int32), rows)


def coverage(teacher: Encoding, student: Encoding, alignment: Alignment, prompt_length: int) -> dict[str, int]:
    """Counts behind the coverage figures of one example; `student` may end with EOS.

    tokens/aligned: student tokens of text, and those with an aligned teacher token. predictions/aligned_predictions:
    student tokens inside the answer, and those whose predecessor is aligned. same_position: aligned pairs j == i.
    """
    answer = np.flatnonzero(in_answer(student, prompt_length))
    predecessors = np.isin(answer - 1, alignment.pairs[:, 1])
    return {
        "tokens": int((~student.special).sum()),
        "aligned": len(alignment.pairs),
        "predictions": len(answer),
        "aligned_predictions": int(predecessors.sum()),
        "same_position": int((alignment.pairs[:, 0] == alignment.pairs[:, 1]).sum()),
    }


def same_vocabulary(teacher_tokenizer: Any, student_tokenizer: Any) -> bool:
    """Whether every id means the same in both: equal vocabularies, not equal sizes."""
    equal: bool = teacher_tokenizer.get_vocab() == student_tokenizer.get_vocab()
    return equal


def map_vocabulary(teacher_tokenizer: Any, student_tokenizer: Any) -> Int32[ndarray, "V"]:
    """For every teacher id the student id that stands for the same bytes, or −1.

    Equal vocabularies map by the identity. Otherwise specials map from EOS to EOS only; where the student has
    several ids for the same bytes (`A` and `<0x41>`), the one spelt as the teacher's is preferred.
    """
    size = largest_id(teacher_tokenizer) + 1
    if same_vocabulary(teacher_tokenizer, student_tokenizer):
        return np.arange(size, dtype=np.int32)
    plain: dict[bytes, int] = {}
    byte: dict[bytes, int] = {}
    for token_id, (content, is_byte) in token_bytes(student_tokenizer).items():
        (byte if is_byte else plain).setdefault(content, token_id)
    mapped = np.full(size, -1, dtype=np.int32)
    for token_id, (content, is_byte) in token_bytes(teacher_tokenizer).items():
        first, second = (byte, plain) if is_byte else (plain, byte)
        mapped[token_id] = first.get(content, second.get(content, -1))
    mapped[teacher_tokenizer.eos_token_id] = student_tokenizer.eos_token_id
    return mapped


def largest_id(tokenizer: Any) -> int:
    """The largest id of a vocabulary, which may have gaps."""
    return int(max(tokenizer.get_vocab().values()))


def token_bytes(tokenizer: Any) -> dict[int, tuple[bytes, bool]]:
    """Bytes of text each id stands for, in id order, and whether it is a byte-fallback token; no specials.

    A WordPiece token is a word after a space, unless it begins with the prefix of those that continue one.
    """
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    added = {token["id"]: token for token in backend.get("added_tokens") or []}
    special = set(tokenizer.all_special_ids) | {i for i, token in added.items() if token["special"]}
    byte_level = _mentions(backend.get("decoder"), "ByteLevel") or _mentions(backend.get("pre_tokenizer"), "ByteLevel")
    model = backend["model"]
    wordpiece = model["continuing_subword_prefix"] if model.get("type") == "WordPiece" else None
    result = {}
    for token, token_id in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if token_id in special:
            continue
        if token_id in added:
            result[token_id] = (token.encode(), False)
        elif byte_level:
            content = _byte_level_bytes(token)
            if content is not None:
                result[token_id] = (content, False)
        elif wordpiece is not None:
            continued = token.startswith(wordpiece)
            result[token_id] = ((token.removeprefix(wordpiece) if continued else f" {token}").encode(), False)
        elif found := _BYTE_TOKEN.match(token):
            result[token_id] = (bytes([int(found.group(1), 16)]), True)
        else:
            result[token_id] = (token.replace("▁", " ").encode(), False)
    return result


def _mentions(part: Any, kind: str) -> bool:
    """Whether a component of a tokenizer's description is, or holds, one of the given type."""
    if isinstance(part, dict):
        return part.get("type") == kind or any(_mentions(value, kind) for value in part.values())
    return isinstance(part, list) and any(_mentions(value, kind) for value in part)


def _byte_alphabet() -> dict[str, int]:
    """Byte-level BPE's alphabet: printable Latin-1 stands for itself, the other bytes for U+0100 and up."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    alphabet = {chr(byte): byte for byte in printable}
    others = (byte for byte in range(256) if byte not in printable)
    return alphabet | {chr(0x100 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()


def _byte_level_bytes(token: str) -> bytes | None:
    """Bytes of a byte-level token, or None if it is not spelt in that alphabet."""
    try:
        return bytes(_BYTE_OF[character] for character in token)
    except KeyError:
        return None


def compare_vocabularies(teacher_tokenizer: Any, student_tokenizer: Any) -> dict[str, Any]:
    """Figures of a pair: sizes, strings in both, ids that mean the same, ids mapped by bytes."""
    teacher, student = teacher_tokenizer.get_vocab(), student_tokenizer.get_vocab()
    mapped = map_vocabulary(teacher_tokenizer, student_tokenizer)
    return {
        "same": teacher == student,
        "teacher_size": len(teacher),
        "student_size": len(student),
        "shared_strings": len(teacher.keys() & student.keys()),
        "same_ids": sum(student.get(token) == token_id for token, token_id in teacher.items()),
        "mapped_ids": int((mapped >= 0).sum()),
    }
