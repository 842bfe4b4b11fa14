"""A chat under a model's own template: what the model reads, and which of its tokens are the turns' own text.

The template is rendered twice: with the contents, and with a mark in the place of each. Around the marks stands what
the template writes; the first rendering must be just that around the contents, to the last character. A template that
trims, drops or rewrites a content is noticed so, and never aligned by a guess.

A token belongs to a turn if it ends inside the turn's content. All others are the template's: they stand for no text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from typing import Any

import numpy as np
from numpy import ndarray

from stillroom.data.encoding import Ask, Encoding, encode_many, is_invented, read_whole, without_trailing_specials
from stillroom.data.tasks.chats import with_contents
from stillroom.data.tasks.example import Example, Turn
from stillroom.errors import UserError

_TODAY = datetime(2024, 7, 26)
"""What a template writes for the date: else the same chat would be another text tomorrow."""
_DATE = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")


@dataclass(frozen=True)
class Rendered:
    """A chat as a template writes it."""

    text: str
    contents: tuple[str, ...]
    """Each turn's content as it stands there: as given, or without white space at its ends."""
    places: tuple[int, ...]
    """Where each content begins; of an empty one, −1."""
    replies: tuple[int, ...]
    """Of each learnt turn: where the model begins to write it, when asked for it; of others, 0."""


def encode_examples(tokenizer: Any, examples: Sequence[Example], *, add_eos: bool = False) -> list[Encoding]:
    """Each example as a model reads it: `encode_many` of its text, or, of a chat, of what its template makes of it.

    Ends count in `example.text` either way. Raises ValueError, saying what is wrong, for a chat that the template
    cannot take as it is.
    """
    plain = iter(encode_many(tokenizer, [e.text for e in examples if not e.turns], add_eos=add_eos))
    return [_encode_chat(tokenizer, e, add_eos) if e.turns else next(plain) for e in examples]


def encode_prompts(tokenizer: Any, examples: Sequence[Example]) -> list[Encoding]:
    """What a model continues with its answer: the prompt, without what a tokenizer puts after a text, such as EOS.

    Of a chat: what the template writes to ask for the last turn.
    """
    plain = iter(encode_many(tokenizer, [e.prompt for e in examples if not e.turns]))
    return [
        _encode_rendered(tokenizer, _ask(tokenizer, e)) if e.turns else without_trailing_specials(next(plain))
        for e in examples
    ]


def turn_ends(tokenizer: Any, examples: Sequence[Example]) -> list[int]:
    """Ids that end the answer to a chat among these: what its template writes after the last turn."""
    for example in examples:
        if example.turns:
            encoding = _encode_chat(tokenizer, example, add_eos=True)
            return [int(encoding.ids[-1])] if encoding.special[-1] else []
    return []


def chat_template_hash(tokenizer: Any) -> str:
    """Digest of the template, 16 hex digits: with the tokenizer, it decides how a chat becomes ids."""
    return hashlib.sha256(tokenizer.get_chat_template().encode()).hexdigest()[:16]


def require_chat_template(tokenizer: Any) -> None:
    """`UserError` where a model has no template of its own."""
    if tokenizer.chat_template is None:
        raise UserError(
            f"{tokenizer.name_or_path}: its tokenizer has no chat template, and the study has chats; choose a model "
            "that was trained on chats, or name a file with a Jinja template in its chat_template field"
        )


def settled(example: Example, tokenizers: Sequence[Any]) -> Example:
    """The chat without the white space that any of the templates trims from its contents, so that all read the same.

    Raises ValueError, saying what is wrong, for a chat that a template cannot take.
    """
    while True:
        for tokenizer in tokenizers:
            rendered = render(tokenizer, example)
            if rendered.contents != example.contents:
                example = with_contents(example, rendered.contents)
                break
        else:
            return example


def render(tokenizer: Any, example: Example) -> Rendered:
    """The chat as the tokenizer's template writes it. Raises ValueError if a content is not there as it is."""
    turns, contents = example.turns, example.contents
    written = _apply(tokenizer, turns, contents)
    digest = hashlib.sha256("".join(contents).encode("utf-8", "surrogatepass")).hexdigest()[:12]
    marks = [f"Turn{digest}x{number}x" if content else "" for number, content in enumerate(contents)]
    rest, around = _apply(tokenizer, turns, marks), []
    for number, mark in enumerate(marks):
        if not mark:
            continue
        if rest.count(mark) != 1:
            raise ValueError(f"{_turn(turns, number)}: the chat template {_how_often(rest.count(mark))}")
        before, _, rest = rest.partition(mark)
        around.append(before)
    found, places = _walk(written, [*around, rest], turns, contents)
    replies = [
        _reply(tokenizer, turns, found, number, written, places[number]) if turn.learnt and contents[number] else 0
        for number, turn in enumerate(turns)
    ]
    return Rendered(written, tuple(found), tuple(places), tuple(replies))


def _how_often(count: int) -> str:
    return "leaves its content out, or changes the order of the turns" if count == 0 else "writes its content twice"


def _walk(
    written: str, around: list[str], turns: Sequence[Turn], contents: Sequence[str]
) -> tuple[list[str], list[int]]:
    """Each content as it is `written` between what the template puts `around` them, and where it begins."""
    pieces, found, places = iter(around), list(contents), [-1] * len(contents)
    before, position = next(pieces), 0
    for number, content in enumerate(contents):
        if not content:
            continue
        if not written.startswith(before, position):
            raise ValueError(f"{_turn(turns, number)}: the chat template writes something else before this content")
        position += len(before)
        after = next(pieces)
        for candidate in dict.fromkeys([content, content.strip(), content.rstrip(), content.lstrip()]):
            if written.startswith(candidate + after, position):
                break
        else:
            raise ValueError(f"{_turn(turns, number)}: the chat template rewrites its content, so it cannot be aligned")
        found[number], places[number] = candidate, position
        position, before = position + len(candidate), after
    if position + len(before) != len(written):
        raise ValueError("the chat template writes something else after the last turn, depending on its content")
    return found, places


def _reply(
    tokenizer: Any, turns: Sequence[Turn], contents: Sequence[str], number: int, written: str, place: int
) -> int:
    """Where the model begins to write a turn, when the turns before are all it has."""
    asked = _apply(tokenizer, turns[:number], contents[:number], reply=True)
    if len(asked) > place or not written.startswith(asked):
        raise ValueError(
            f"{_turn(turns, number)}: what the chat template writes before it is not what it writes to ask for it; "
            "it cannot be learnt"
        )
    return len(asked)


def _ask(tokenizer: Any, example: Example) -> str:
    return _apply(tokenizer, example.turns[:-1], example.contents[:-1], reply=True)


def _turn(turns: Sequence[Turn], number: int) -> str:
    return f"turn {number + 1} ({turns[number].role})"


def _apply(tokenizer: Any, turns: Sequence[Turn], contents: Sequence[str], reply: bool = False) -> str:
    messages = [{"role": turn.role, "content": content} for turn, content in zip(turns, contents, strict=True)]
    try:
        text: str = tokenizer.apply_chat_template(
            messages,
            chat_template=_undated(tokenizer.get_chat_template()),
            add_generation_prompt=reply,
            tokenize=False,
        )
    except Exception as error:  # a template raises what it likes, and Jinja whatever its expressions do
        roles = ", ".join(turn.role for turn in turns)
        raise ValueError(
            f"the chat template of {tokenizer.name_or_path} refuses the turns {roles}: {error}"
            + ("; chat.system: first_user puts a system turn's text before the first user's" if _system(turns) else "")
        ) from None
    return text


@cache
def _undated(template: str) -> str:
    """The template, to which it is always the same day."""
    return _DATE.sub(lambda call: json.dumps(_TODAY.strftime(call[2])), template)


def _system(turns: Sequence[Turn]) -> bool:
    return any(turn.role == "system" for turn in turns)


def _encode_rendered(tokenizer: Any, text: str) -> Encoding:
    """What a template has written: it has put the special tokens there itself. Ends count in that text."""
    encoding = read_whole(tokenizer, text)
    control = np.isin(encoding.ids, list(_control_ids(tokenizer)))
    ends = encoding.ends.copy()
    for token in np.flatnonzero(control[:-1]) + 1:  # the tokenizer starts again there, and may put a space in front
        following = np.arange(token, len(ends))
        if is_invented(tokenizer, encoding.ids.tolist(), following, text[ends[token - 1] :]):
            ends[token] = ends[token - 1]
    return Encoding(encoding.ids, ends, control)


def _control_ids(tokenizer: Any) -> set[int]:
    added = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _encode_chat(tokenizer: Any, example: Example, add_eos: bool) -> Encoding:
    rendered = render(tokenizer, example)
    if rendered.contents != example.contents:
        raise ValueError("the chat template trims a content that the corpus has untrimmed; make the corpus again")
    read = _encode_rendered(tokenizer, rendered.text)
    starts = np.append(0, read.ends[:-1])
    ends = np.zeros_like(read.ends)
    in_turn, learnt, written = (np.zeros(len(read), dtype=bool) for _ in range(3))
    asks: list[Ask] = []
    for number, (turn, place, reply) in enumerate(zip(example.turns, rendered.places, rendered.replies, strict=True)):
        if place < 0:
            continue
        stop = place + turn.stop - turn.start
        inside = (read.ends > place) & (read.ends <= stop)
        _require_no_control(tokenizer, example, number, read.ids[inside & read.special])
        inside &= ~read.special
        in_turn |= inside
        ends[inside] = read.ends[inside] - place + turn.start
        if turn.learnt:
            learnt |= inside & (starts >= reply)
            written |= (starts >= reply) & (read.ends > reply) & (read.ends <= place)
            first = int(np.argmax(inside))
            if learnt[first] and first:
                asks.append(Ask(number, first - 1, rendered.text[starts[first] : place]))
            if (end := _closing(read, starts, rendered.text, stop)) is not None:
                written[end] = True
    if not in_turn.any():
        raise ValueError("no token of the chat ends inside a turn")
    last = int(np.flatnonzero(in_turn | written)[-1]) + 1
    chat = Encoding(
        read.ids[:last], np.maximum.accumulate(ends[:last]), ~in_turn[:last], learnt[:last], written[:last], tuple(asks)
    )
    return _with_eos(chat, tokenizer.eos_token_id) if add_eos and not written[last - 1] else chat


def _closing(read: Encoding, starts: ndarray, text: str, stop: int) -> int | None:
    """The control token that ends a turn: the first token that follows its content, white space left out."""
    after = np.flatnonzero(read.ends > stop)
    for token in after:
        if read.special[token]:
            return int(token) if not text[stop : starts[token]].strip() else None
        if text[stop : read.ends[token]].strip():
            return None
    return None


def _with_eos(encoding: Encoding, eos: int) -> Encoding:
    assert encoding.learnt is not None
    assert encoding.written is not None
    return Encoding(
        np.append(encoding.ids, np.int32(eos)),
        np.append(encoding.ends, encoding.ends[-1]),
        np.append(encoding.special, True),
        np.append(encoding.learnt, False),
        np.append(encoding.written, True),
        encoding.asks,
    )


def _require_no_control(tokenizer: Any, example: Example, number: int, ids: ndarray) -> None:
    """Raise ValueError where a content spells a control token: the model would read it as one, not as text."""
    for token in tokenizer.convert_ids_to_tokens(ids.tolist()):
        if token in example.contents[number]:
            raise ValueError(
                f"{_turn(example.turns, number)}: it contains {token!r}, which {tokenizer.name_or_path} reads as a "
                "control token; reword it or leave the row out"
            )
