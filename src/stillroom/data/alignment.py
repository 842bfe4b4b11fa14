"""Two encodings of one text, aligned by what each has read; two vocabularies, by the bytes their ids stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int32
from numpy import ndarray

from stillroom.data.encoding import Encoding, encode, ending_tokens, in_answer
from stillroom.data.tasks.example import Turn


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
    asks: Int32[ndarray, "A"]
    """Of a chat: the student tokens that predict the first token of a learnt turn; only `replies` compares them."""
    replies: Int32[ndarray, "K 2"]
    """Of a chat: (teacher token, student token) that predict the first token of the same learnt turn.

    Both have read the same turns, and have the same to write: a turn before which one template leaves a space to be
    written, and the other does not, is left out.
    """

    @property
    def predictors(self) -> Int32[ndarray, "M 2"]:
        """(teacher token, student token) whose next tokens are comparable; increasing in both."""
        if not len(self.asks):
            return self.pairs
        both = np.concatenate([self.pairs[~np.isin(self.pairs[:, 1], self.asks)], self.replies])
        return both[np.argsort(both[:, 1])]


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
        np.array([ask.position for ask in student.asks], dtype=np.int32),
        _replies(teacher, student),
    )


def _replies(teacher: Encoding, student: Encoding) -> Int32[ndarray, "K 2"]:
    asked = {(ask.turn, ask.before): ask.position for ask in teacher.asks}
    found = [(asked[a.turn, a.before], a.position) for a in student.asks if (a.turn, a.before) in asked]
    return np.array(found, dtype=np.int32).reshape(-1, 2)


def _leading_specials(encoding: Encoding) -> int:
    """How many special tokens stand before the first token of text (BOS: one)."""
    return int(np.argmin(encoding.special)) if not encoding.special.all() else 0


def _segments(rows: Int32[ndarray, "N"], bos: int) -> Segments:
    if bos:
        rows = np.concatenate([np.array([bos - 1], dtype=np.int32), rows])
    starts = np.concatenate([np.zeros(1, dtype=np.int32), rows[:-1] + 1]) if len(rows) else rows
    return Segments(starts.astype(np.int32), rows)


def coverage(student: Encoding, alignment: Alignment, prompt_length: int) -> dict[str, int]:
    """Counts behind the coverage figures of one example; `student` may end with EOS.

    tokens/aligned: student tokens of text, and those with an aligned teacher token. predictions/aligned_predictions:
    student tokens inside the answer, and those whose predecessor is aligned. same_position: aligned pairs j == i.
    """
    answer = np.flatnonzero(in_answer(student, prompt_length))
    answer = answer[answer > 0]  # nothing predicts the first token
    predecessors = np.isin(answer - 1, alignment.predictors[:, 1])
    return {
        "tokens": int((~student.special).sum()),
        "aligned": len(alignment.pairs),
        "predictions": len(answer),
        "aligned_predictions": int(predecessors.sum()),
        "same_position": int((alignment.pairs[:, 0] == alignment.pairs[:, 1]).sum()),
    }


KINDS = ("words", "digits", "punctuation", "white space")
"""What a token's text is: by its first letter or digit; without either, punctuation; without anything to see, space."""


def kinds_of(text: str, encoding: Encoding, turns: Sequence[Turn] = ()) -> list[str | None]:
    """The kind of each token's text; None of a special token.

    A token's text is what it adds to what was read before; of several that end at one character, that character.
    """
    kinds, before = list[str | None](), 0
    for end, special in zip(encoding.ends.tolist(), encoding.special.tolist(), strict=True):
        before = max([before, *(turn.start for turn in turns if turn.start < end)])
        kinds.append(None if special else _kind(text[before:end] or text[end - 1 : end]))
        before = max(before, end)
    return kinds


def _kind(piece: str) -> str:
    for letter in piece:
        if letter.isalpha():
            return "words"
        if letter.isnumeric():
            return "digits"
    return "punctuation" if piece.strip() else "white space"


def coverage_by_kind(
    student: Encoding, alignment: Alignment, kinds: list[str | None], prompt_length: int
) -> dict[str, dict[str, int]]:
    """The counts of `coverage` by the kind of the student's token; a prediction's is that of the token predicted."""
    aligned, predicting = set(alignment.pairs[:, 1].tolist()), set(alignment.predictors[:, 1].tolist())
    answer = in_answer(student, prompt_length).tolist()
    counts = {kind: dict.fromkeys(("tokens", "aligned", "predictions", "aligned_predictions"), 0) for kind in KINDS}
    for place, kind in enumerate(kinds):
        if kind is not None:
            kind_counts = counts[kind]
            kind_counts["tokens"] += 1
            kind_counts["aligned"] += place in aligned
            kind_counts["predictions"] += place > 0 and answer[place]
            kind_counts["aligned_predictions"] += place > 0 and answer[place] and place - 1 in predicting
    return counts
