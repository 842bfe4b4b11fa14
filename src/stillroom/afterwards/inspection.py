"""A look inside a store: what it holds, and one example's tokens, alignment, predictions, norms and attention."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy import ndarray

from stillroom.afterwards.fonts import escaped, fonts_for
from stillroom.analysis.escaping import control_free
from stillroom.config import ModelRef, Study
from stillroom.config.section import Layer
from stillroom.data.alignment import Alignment, align_encodings, coverage
from stillroom.data.chat_templates import encode_examples
from stillroom.data.corpus import load_corpus
from stillroom.data.encoding import Encoding, encode
from stillroom.data.tasks import Example
from stillroom.data.vocabulary import token_bytes
from stillroom.errors import UserError
from stillroom.models.hub import load_tokenizer
from stillroom.offline_teacher_data.store import SignalStore, StoredExample
from stillroom.offline_teacher_data.verification import VERIFIED
from stillroom.signals.next_token import top_k
from stillroom.signals.signal import column_of
from stillroom.terms import compared
from stillroom.terms.attention_maps import packed_maps, square_maps
from stillroom.terms.next_token import map_outcomes, teacher_to_student_ids


def describe_store(path: Path, study: Study | None = None) -> dict[str, Any]:
    """What a store holds and was made from: `examples`, `tokens`, `bytes`, `tasks`, `layout`, `made_from`, `ids`, …

    `tasks` gives each task's examples and teacher tokens; `bytes` are those of the shards; `layers` the teacher's
    layers by signal. With a study `groups`: see `terms.compared`; `UserError` names a layer that the store lacks.
    """
    store = SignalStore.open(path)
    kept, groups = store.layout.layers, compared(study) if study else {}
    for name, term, pairs in ((n, t, pairs) for n, g in groups.items() for t, pairs in g["layers"].items()):
        if missing := [teacher for teacher, _ in pairs if teacher not in kept.get(term, ())]:
            raise UserError(
                f"{path}: group {name!r} compares the teacher's {term} layer {missing[0]}, which is not in this store "
                f"(it has {', '.join(map(str, kept.get(term, ()))) or 'none'}); capture again"
            )
    shards = store.manifest["shards"]
    examples: Counter[str] = Counter()
    tokens: Counter[str] = Counter()
    for example_id in store.index:
        stored = store.read(example_id, ())
        examples[stored.task] += 1
        tokens[stored.task] += len(stored.encoding)
    return {
        "store": str(path),
        "created": store.manifest["created"],
        "verified": (path / VERIFIED).is_file(),
        "fingerprint": store.manifest["fingerprint"],
        "made_from": store.manifest["made_from"],
        "examples": len(store),
        "tokens": sum(tokens.values()),
        "bytes": sum(shard["bytes"] for shard in shards),
        "shards": len(shards),
        "tasks": {task: {"examples": count, "tokens": tokens[task]} for task, count in sorted(examples.items())},
        "layout": store.manifest["layout"],
        "layers": kept,
        **({"groups": groups} if groups else {}),
        **({"hidden_mean_square": store.hidden_mean_square} if "hidden" in store.columns else {}),
        **({"teacher_answers": _answer_counts(store)} if "teacher_answers" in store.manifest["made_from"] else {}),
        "ids": list(store.index),
    }


def _answer_counts(store: SignalStore) -> dict[str, int]:
    """How many of the teacher's answers there are, how many of them are empty, and how many did not end."""
    answers = list(store.answers.values())
    return {
        "answers": len(answers),
        "empty": sum(answer is not None and not answer.strip() for answer in answers),
        "unended": sum(answer is None for answer in answers),
    }


def find_layer(store: SignalStore, given: str) -> Layer:
    """The layer that `given` names; `UserError` if the store keeps nothing of it."""
    kept = store.layout.layers
    layers = {str(layer): layer for of_signal in kept.values() for layer in of_signal}
    if given not in layers and given != "last":
        listed = "; ".join(f"{signal} {', '.join(map(str, of_signal))}" for signal, of_signal in kept.items())
        raise UserError(f"{store.path}: nothing of layer {given} is in this store (it has {listed or 'no layers'})")
    return layers.get(given, "last")


def find_example(store: SignalStore, given: str) -> str:
    """The id that `given` is, or begins; `UserError` if there is none, or more than one."""
    found = [example_id for example_id in store.index if example_id.startswith(given)]
    if given in store.index or len(found) == 1:
        return given if given in store.index else found[0]
    some = ", ".join(list(store.index)[:3])
    raise UserError(f"{store.path}: {len(found)} examples begin with {given!r}; ids are like {some}")


def example_of(store: SignalStore, stored: StoredExample, corpus: Path | None = None) -> Example:
    """A stored example: from the study's corpus folder, else decoded and proven by reading it again.

    `UserError` where decoding does not give the text back, as under a tokenizer that normalises.
    """
    if corpus is not None:
        examples, _ = load_corpus(corpus)
        for example in examples.all:
            if example.example_id == stored.example_id:
                return example
        raise UserError(f"{corpus}: example {stored.example_id} is not in this corpus")
    tokenizer = store.tokenizer
    text: str = tokenizer.decode(stored.encoding.ids[~stored.encoding.special], clean_up_tokenization_spaces=False)
    again = encode(tokenizer, text)
    if not (np.array_equal(again.ids, stored.encoding.ids) and np.array_equal(again.ends, stored.encoding.ends)):
        raise UserError(
            f"example {stored.example_id}: its text cannot be recovered from its tokens; give the study's "
            "corpus folder, as in --corpus results/corpus"
        )
    return Example(stored.task, text, "")


def describe_example(
    store: SignalStore,
    example_id: str,
    example: Example,
    student: ModelRef | None = None,
    top: int = 3,
    layer: Layer = "last",
) -> dict[str, Any]:
    """One example as a reader can check it: `text`, `teacher`, and with a student `student`, `pairs` and `covered`.

    `teacher` and `student` list tokens: `position`, `id`, `token` (the stretch of text it stands for), `end`
    (characters), `special`, `shared` (the other model has a token that ends there). The teacher's have also
    `predictions` (its `top` next tokens with their probabilities), `tail` (probability outside the stored top-k),
    `other` (with a student: probability that no student id stands for) and `hidden_norm` (L2, of the state of `layer`,
    where that is kept). `teacher_answer` is the teacher's own answer, where the store keeps them; None if it did not
    end.
    """
    stored = store.read(example_id)
    tokenizer = store.tokenizer
    words = _words(tokenizer)
    arrays = stored.arrays if store.layout.top_k else _remade(store, stored)
    probabilities = np.exp(arrays["topk_logprobs"].astype(np.float64))
    teacher = _tokens(stored.encoding, example, words)
    for row, token in enumerate(teacher):
        best = zip(arrays["topk_ids"][row, :top].tolist(), probabilities[row, :top].tolist(), strict=True)
        token["predictions"] = [{"token": words.get(i, f"<{i}>"), "probability": p} for i, p in best]
        token["tail"] = float(np.exp(arrays["tail_logprobs"][row]))
        if (column := column_of("hidden", layer)) in store.columns:
            token["hidden_norm"] = float(np.linalg.norm(stored[column][row].astype(np.float64)))
    facts: dict[str, Any] = {"example_id": example_id, "task": stored.task, "text": example.text, "teacher": teacher}
    if "teacher_answers" in store.manifest["made_from"]:
        facts["teacher_answer"] = store.answers[example_id]
    if student is not None:
        facts |= _beside_student(store, stored, arrays, example, tokenizer, load_tokenizer(student), teacher)
    return facts


def _remade(store: SignalStore, stored: StoredExample) -> dict[str, ndarray]:
    """The most probable next tokens of a store that keeps the output head in place of them."""
    logits = store.teacher_head.logits(torch.from_numpy(stored["hidden"].astype(np.float32)))
    found = top_k(logits, min(256, logits.shape[-1]))
    return {name: a.numpy() for name, a in zip(("topk_ids", "topk_logprobs", "tail_logprobs"), found, strict=True)}


def _beside_student(
    store: SignalStore,
    stored: StoredExample,
    arrays: Mapping[str, ndarray],
    example: Example,
    tokenizer: Any,
    student_tokenizer: Any,
    teacher: list[dict[str, Any]],
) -> dict[str, Any]:
    (encoding,) = encode_examples(student_tokenizer, [example], add_eos=True)
    alignment = align_encodings(stored.encoding, encoding)
    pairs, counts = alignment.pairs, coverage(encoding, alignment, 0)
    student = _tokens(encoding, example, _words(student_tokenizer))
    for side, column in ((teacher, 0), (student, 1)):
        for position in pairs[:, column]:
            side[position]["shared"] = True
    size = max(student_tokenizer.get_vocab().values()) + 1  # its ids may have gaps
    mapped = teacher_to_student_ids(tokenizer, student_tokenizer, store.manifest["vocabulary"], size)
    *_, other = map_outcomes(arrays["topk_ids"], arrays["topk_logprobs"], arrays["tail_logprobs"], mapped)
    for token, value in zip(teacher, other.tolist(), strict=True):
        token["other"] = value
    covered = counts["aligned"] / counts["tokens"]
    return {"student": student, "pairs": pairs.tolist(), "covered": covered}


def _words(tokenizer: Any) -> dict[int, str]:
    """What each id stands for, as text; a special token by its name."""
    names = {token_id: token for token, token_id in tokenizer.get_vocab().items()}
    spelt = {i: content.decode("utf-8", "backslashreplace") for i, (content, _) in token_bytes(tokenizer).items()}
    return names | spelt


def _tokens(encoding: Encoding, example: Example, words: dict[int, str]) -> list[dict[str, Any]]:
    text, starts = example.text, np.concatenate([[0], encoding.ends[:-1]])
    for turn in example.turns:  # what stands between two contents is no token's
        starts[(encoding.ends > turn.start) & (starts < turn.start)] = turn.start
    rows = zip(encoding.ids.tolist(), starts.tolist(), encoding.ends.tolist(), encoding.special.tolist(), strict=True)
    return [
        {
            "position": position,
            "id": token_id,
            "token": words.get(token_id, f"<{token_id}>") if special or start == end else text[start:end],
            "end": end,
            "special": special,
            "shared": False,
        }
        for position, (token_id, start, end, special) in enumerate(rows)
    ]


def attention_figure(
    store: SignalStore, example_id: str, example: Example, student: ModelRef | None = None, layer: Layer = "last"
) -> Any:
    """A layer's attention map of the teacher, mean over heads; with a student also over the segments both share.

    The second is what the attention loss compares. Colour goes with the square root, so that small weights show.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure

    if "attention" not in store.columns:
        raise UserError(f"{store.path}: this store has no attention maps: its log-probabilities were imported")
    if (column := column_of("attention", layer)) not in store.columns:
        kept = ", ".join(map(str, store.layout.attention_layers))
        raise UserError(f"{store.path}: attention of layer {layer} is not in this store (it has {kept})")
    stored = store.read(example_id, (column,))
    tokenizer = store.tokenizer
    tokens = _tokens(stored.encoding, example, _words(tokenizer))
    maps = [("over the teacher's tokens", *_token_map(stored, column, [t["token"] for t in tokens]))]
    if student is not None:
        (encoding,) = encode_examples(load_tokenizer(student), [example], add_eos=True)
        alignment = align_encodings(stored.encoding, encoding)
        maps.append(("over the segments that both models share", *_segment_map(stored, column, alignment, tokens)))
    fonts, missing = fonts_for("".join(label for _, _, labels in maps for label in labels))
    side = max(4.0, 0.16 * len(tokens) + 1.5)
    figure = Figure(figsize=(side * len(maps), side), dpi=110)
    for axis, (title, values, labels) in zip(figure.subplots(1, len(maps), squeeze=False)[0], maps, strict=True):
        axis.imshow(values, cmap="viridis", norm=mpl.colors.PowerNorm(0.5, 0, 1))
        axis.set_title(f"attention {title}", fontsize=9)
        axis.set_xlabel("attends to")
        axis.set_ylabel("query")
        if len(labels) <= 160:
            style: dict[str, Any] = {"fontsize": 6, "parse_math": False, "fontfamily": fonts}
            shown = [escaped(label, missing) for label in labels]
            axis.set_xticks(range(len(labels)), shown, rotation=90, **style)
            axis.set_yticks(range(len(labels)), shown, **style)
    figure.tight_layout()
    return figure


def _token_map(stored: StoredExample, column: str, labels: Sequence[str]) -> tuple[ndarray, list[str]]:
    tokens = len(stored.encoding)
    square = np.zeros((tokens, tokens), np.float32)
    square[np.tril_indices(tokens)] = stored[column].mean(0, dtype=np.float32)
    return square, [visible(label) for label in labels]


def _segment_map(
    stored: StoredExample, column: str, alignment: Alignment, tokens: Sequence[dict[str, Any]]
) -> tuple[ndarray, list[str]]:
    segments = alignment.teacher
    texts = [
        visible("".join(token["token"] for token in tokens[start : row + 1]))
        for start, row in zip(segments.starts, segments.rows, strict=True)
    ]
    index, cells, sums = packed_maps({"attention": [stored[column]]}, [segments], pair_heads=False)
    return square_maps(cells["attention"], sums["attention"], index)[0, 0].numpy(), texts


def visible(text: str) -> str:
    """Text with its line breaks and tabs shown, every other control character as its escape."""
    return control_free(text.replace("\n", "↵").replace("\t", "⇥"))
