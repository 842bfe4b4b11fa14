"""Two vocabularies, by the bytes that their ids stand for."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
from jaxtyping import Int32
from numpy import ndarray

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")


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
            spelt = token if byte_level or wordpiece is not None else token.replace("▁", " ")
            result[token_id] = (spelt.encode(), False)
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
