"""Alignment on real tokenizers and on small ones of both families, over text that breaks naive code."""

from __future__ import annotations

import copy
import itertools
import json
import unicodedata
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from small_things import real_data, real_tokenizer, texts
from stillroom.data import vocabulary
from stillroom.data.alignment import Segments, align, align_encodings, coverage, coverage_by_kind, kinds_of
from stillroom.data.encoding import encode, ending_tokens, supervised_predictions
from stillroom.data.vocabulary import compare_vocabularies, map_vocabulary, token_bytes
from stillroom.models.builtin_pair import sentencepiece_tokenizer
from stillroom.terms.attention_maps import aligned_attention, packed_maps, square_maps

PIECES = [
    "the", " cat", "Question: ", " 12,345.67", "<<3+4=7>>", "\n", "\n\n", "\t", "   ", " ", "  \n \n", "Answer:",
    "don't", "漢字", "かな", "한국어", "한", "👩‍👩‍👧", "🇨🇭", "🙂🙃", "é", "e\u0301", "a\u0327\u0301", "n\u0303o", "Å",
    "ﬁ", "½", "שלום", "مرحبا", "हिन्दी", "ß", "Ω", "–", "“x”", "\u200b", "\u00a0", "𝔘", "1", "99", "</s", "<0x41>", "▁",
    "Ġ", "\r\n",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PIECES) | st.text(max_size=4), min_size=1, max_size=14).map("".join).filter(len)
NAMES = (
    "byte_level",
    "sentencepiece",
    "no_bos",
    "mistral-7b-v0.1",
    "tinyllama-1.1b",
    "smollm2-135m",
    "qwen2.5-coder-0.5b",
)
PAIRS = [
    *itertools.combinations(NAMES, 2),
    ("byte_level", "byte_level"),
    ("tinyllama-1.1b", "tinyllama-1.1b"),
]

ORDERED = [*itertools.permutations(NAMES, 2)]


@pytest.fixture(scope="module")
def tokenizer(byte_level, sentencepiece):
    """Tokenizer by name: small ones made here, real ones where they are."""
    no_bos = PreTrainedTokenizerFast(
        tokenizer_object=_without_template(sentencepiece.backend_tokenizer),
        eos_token="</s>",
        unk_token="<unk>",
    )
    small = {"byte_level": byte_level, "sentencepiece": sentencepiece, "no_bos": no_bos}
    cache = {}

    def get(name):
        if name not in cache:
            cache[name] = small[name] if name in small else real_tokenizer(name)
        return cache[name]

    return get


def _without_template(backend):
    import json

    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps({**json.loads(backend.to_str()), "post_processor": None}))


def normalised(tokenizer, text):
    """What the tokenizer reads: its own Unicode normal form, nothing else."""
    return unicodedata.normalize("NFC", text) if "NFC" in str(tokenizer.backend_tokenizer.normalizer) else text


BYTES = {chr(n): n for n in [*range(33, 127), *range(161, 173), *range(174, 256)]}
BYTES |= {chr(256 + n): b for n, b in enumerate(b for b in range(256) if b not in BYTES.values())}


@cache
def spelling(tokenizer):
    """Whether it is byte-level, and its added tokens."""
    byte_level = "ByteLevel" in str(tokenizer.backend_tokenizer.pre_tokenizer)
    return byte_level, {a.content for a in tokenizer.added_tokens_decoder.values()}


def consumed(tokenizer, ids, text):
    """Bytes of text that a run of tokens stands for, by an independent route: each token spelt out."""
    byte_level, added = spelling(tokenizer)
    out = b""
    for token in tokenizer.convert_ids_to_tokens(ids):
        if token in added:
            out += token.encode()
        elif byte_level:
            out += bytes(BYTES[c] for c in token)
        elif token.startswith("<0x") and token.endswith(">") and len(token) == 6:
            out += bytes([int(token[3:5], 16)])
        else:
            out += token.replace("▁", " ").encode()
    if not byte_level and out.startswith(b" ") and not text.startswith(" "):
        out = out[1:]
    return out


def check(text, teacher, student):
    """Everything that must hold of an alignment."""
    found = align(text, teacher, student)
    pairs, encodings = found.pairs, (encode(teacher, text), encode(student, text))
    assert pairs.shape == (len(pairs), 2)
    assert np.issubdtype(pairs.dtype, np.integer)
    assert (np.diff(pairs, axis=0) > 0).all()
    for (j, i), (t, s) in itertools.product(pairs, [encodings]):
        end = t.ends[j]
        assert end == s.ends[i]
        prefix = text[:end]
        for tokenizer, encoding, last in ((teacher, t, j), (student, s, i)):
            odd = ["▁", *tokenizer.all_special_tokens]
            everything = consumed(tokenizer, [int(x) for x in encoding.ids[~encoding.special]], text)
            if any(o in text for o in odd) or normalised(tokenizer, text).encode() not in (
                everything,
                everything[1:],
            ):
                continue  # a literal ▁ or special reads as something else, and a vocabulary may lack bytes altogether
            ids = [
                int(x) for x, special in zip(encoding.ids[: last + 1], encoding.special, strict=False) if not special
            ]
            got = consumed(tokenizer, ids, text)
            wanted = normalised(tokenizer, prefix).encode()
            assert got in (wanted, b" " + wanted), (tokenizer.name_or_path, prefix)
    shared = set(encodings[0].ends[ending_tokens(encodings[0])]) & set(encodings[1].ends[ending_tokens(encodings[1])])
    assert {int(encodings[0].ends[j]) for j, _ in pairs} == {int(e) for e in shared}
    for segments, column, encoding in ((found.teacher, 0, encodings[0]), (found.student, 1, encodings[1])):
        check_segments(segments, pairs[:, column], encoding)
    return found


def check_segments(segments, ends, encoding):
    """Segments partition the tokens up to the last shared end and stop at the pairs."""
    if not len(ends):
        return
    covered = np.concatenate([np.arange(a, b + 1) for a, b in zip(segments.starts, segments.rows, strict=True)])
    assert (covered == np.arange(ends[-1] + 1)).all()
    assert list(segments.rows[-len(ends) :]) == list(ends)
    assert len(segments.rows) - len(ends) in (0, 1)


@pytest.mark.slow
@pytest.mark.parametrize(("teacher", "student"), PAIRS, ids=["-to-".join(p) for p in PAIRS])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
def test_both_have_read_the_same_text_at_every_pair(tokenizer, teacher, student, text):
    """The property everything rests on, in both directions, for every pair of tokenizers."""
    first, second = tokenizer(teacher), tokenizer(student)
    found = check(text, first, second)
    back = align(text, second, first)
    assert (found.pairs == back.pairs[:, ::-1]).all()


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS)
def test_equal_tokenizers_give_the_identity(tokenizer, text):
    """One tokenizer on both sides pairs every ending token with itself."""
    for name in ("byte_level", "sentencepiece"):
        pairs = align(text, tokenizer(name), tokenizer(name)).pairs
        assert (pairs[:, 0] == pairs[:, 1]).all()


def test_plain_text_under_one_tokenizer_pairs_every_token(tokenizer):
    """The identity leaves no token of text out; BOS is not text."""
    text = "Question: Eve has 4 coins.\nAnswer: 4+2 = 6"
    student_tokenizer = tokenizer("sentencepiece")
    ids = encode(student_tokenizer, text)
    assert align(text, student_tokenizer, student_tokenizer).pairs.tolist() == [[t, t] for t in range(1, len(ids))]


def test_a_composed_character_is_not_its_first_half(tokenizer):
    """NFC reads e + combining acute as one: its end is after the accent, where the other has read the accent too."""
    qwen, mistral = tokenizer("qwen2.5-coder-0.5b"), tokenizer("mistral-7b-v0.1")
    text = "e\u0301x"
    ends = {int(e) for e in encode(qwen, text).ends}
    assert 1 not in ends
    assert {int(encode(qwen, text).ends[j]) for j, _ in align(text, qwen, mistral).pairs} == {2, 3}


def test_bos_on_one_side_belongs_to_the_first_segment(tokenizer):
    """BOS is a segment of its own only when both models have one."""
    text = "the cat"
    both = align(text, tokenizer("sentencepiece"), tokenizer("sentencepiece"))
    assert both.teacher.starts[1] == 1
    assert both.teacher.rows[0] == 0
    one = align(text, tokenizer("no_bos"), tokenizer("sentencepiece"))
    assert one.student.starts[0] == 0
    assert one.student.rows[0] >= 1
    assert len(one.student.rows) == len(one.pairs)


def test_added_tokens_align_and_map_by_their_text(tokenizer, byte_level):
    """An added token that is no special stands for its literal text, in the map as in the alignment."""
    from tokenizers import AddedToken, Tokenizer

    backend = Tokenizer.from_str(byte_level.backend_tokenizer.to_str())
    backend.add_tokens([AddedToken("####", normalized=False)])
    extended = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")
    check("x = 3\n#### 3", extended, tokenizer("sentencepiece"))
    mapped = map_vocabulary(extended, byte_level)
    token_id = extended.convert_tokens_to_ids("####")
    assert mapped[token_id] == byte_level.get_vocab().get("####", -1)


def test_eos_is_supervised_and_never_aligned(tokenizer):
    """The student's EOS ends the sequence, is a target, and has no teacher token."""
    student_tokenizer = tokenizer("sentencepiece")
    text = "the cat sat"
    student = encode(student_tokenizer, text, add_eos=True)
    positions, targets = supervised_predictions(student, len("the cat"))
    assert targets[-1] == student_tokenizer.eos_token_id
    assert positions[-1] == len(student) - 2
    assert len(student) - 1 not in align_encodings(encode(student_tokenizer, text), student).pairs[:, 1]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=TEXTS, seed=st.integers(0, 99))
def test_aligned_attention_rows_sum_to_one_on_both_sides(tokenizer, text, seed):
    """Summing keys over segments loses no mass, in the stored triangle and in the student's square alike."""
    alignment = align(text, tokenizer("byte_level"), tokenizer("sentencepiece"))
    if not len(alignment.pairs):
        return
    torch.manual_seed(seed)
    for segments, tokens in (
        (alignment.teacher, encode(tokenizer("byte_level"), text)),
        (alignment.student, encode(tokenizer("sentencepiece"), text)),
    ):
        size = len(tokens)
        scores = torch.randn(2, size, size).masked_fill(torch.ones(size, size).triu(1).bool(), -torch.inf)
        square = scores.softmax(-1)
        lower = torch.tril_indices(size, size)
        triangle = square[:, lower[0], lower[1]].numpy()
        (maps,) = over_segments([triangle], [segments])
        rows = torch.from_numpy(segments.rows.astype("int64"))[None]
        lengths = segments.rows - segments.starts + 1
        member = np.full(size, -1)
        member[: lengths.sum()] = np.repeat(np.arange(len(rows[0])), lengths)
        dense = aligned_attention(square[None], rows, torch.from_numpy(member)[None])[0]
        assert np.allclose(maps, dense, atol=1e-6)
        assert np.allclose(maps.sum(-1), 1, atol=1e-5)
        half = triangle.astype(np.float16)
        half.flags.writeable = False  # as a cell of the store is
        for pair_heads in (True, False):
            whole = over_segments([half.astype(np.float32)], [segments], pair_heads)
            assert torch.equal(over_segments([half], [segments], pair_heads), whole)
        count = len(segments.rows)
        wider = Segments(*2 * [np.arange(count + 2, dtype=np.int32)])  # an example of more tokens, before and after
        more = np.ones((2, (count + 2) * (count + 3) // 2), np.float32)
        _, padded, _ = over_segments([more, triangle, more], [wider, segments, wider])
        assert torch.equal(padded[:, :count, :count], maps)
        assert float(padded.sum()) == pytest.approx(float(maps.sum()), rel=1e-5)  # what lies beyond is 0


def over_segments(triangles, segments, pair_heads=True):
    """Packed maps of several texts as squares over segments."""
    index, cells, sums = packed_maps({"attention": triangles}, segments, pair_heads)
    return square_maps(cells["attention"], sums["attention"], index)


once_per_tokenizer = cache(vocabulary.token_bytes)


@pytest.mark.parametrize(("teacher", "student"), ORDERED, ids=["-to-".join(p) for p in ORDERED])
def test_mapped_ids_stand_for_the_same_bytes(tokenizer, teacher, student, monkeypatch):
    """Checked by spelling both tokens out; specials map from EOS to EOS only."""
    monkeypatch.setattr(vocabulary, "token_bytes", once_per_tokenizer)
    first, second = tokenizer(teacher), tokenizer(student)
    mapped = map_vocabulary(first, second)
    assert mapped.shape == (len(first),)
    assert np.issubdtype(mapped.dtype, np.integer)
    assert mapped[first.eos_token_id] == second.eos_token_id
    specials = set(first.all_special_ids) - {first.eos_token_id}
    if first.get_vocab() != second.get_vocab():
        assert all(mapped[i] == -1 for i in specials)
    ids = np.flatnonzero(mapped >= 0)
    for i in np.random.default_rng(0).choice(ids, min(len(ids), 800), replace=False):
        if i != first.eos_token_id:
            # a leading space is kept: only a whole text may lose it
            pair = [consumed(t, [int(k)], " ") for t, k in ((first, i), (second, mapped[i]))]
            assert pair[0] == pair[1]


def test_the_trap_of_equal_sizes_reproduces_the_published_counts(tokenizer):
    """Mistral and TinyLlama: 32,000 entries each, 24,184 strings in common, 270 ids that mean the same."""
    figures = compare_vocabularies(tokenizer("mistral-7b-v0.1"), tokenizer("tinyllama-1.1b"))
    assert figures["teacher_size"] == figures["student_size"] == 32_000
    assert (figures["shared_strings"], figures["same_ids"], figures["same"]) == (24_184, 270, False)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        (
            "mistral-7b-v0.1",
            "tinyllama-1.1b",
            {"sst2": (96.5, 100), "mmlu": (95.1, 100), "gsm8k": (96.9, 97.9)},
        ),
        (
            "qwen2.5-coder-0.5b",
            "smollm2-135m",
            {"sst2": (92.3, 100), "mmlu": (94.2, 100), "mmlu without its header": (95.3, 100), "gsm8k": (97.0, 97.2)},
        ),
    ],
)
def test_coverage_on_real_text_is_that_of_the_specification(tokenizer, teacher, student, expected):
    """400 examples per task, within half a point.

    The specification's 95.3 % for Qwen and SmolLM2 on MMLU is that of the questions alone. The harness' header line
    ends in `.\n\n`, one token to Qwen and three to SmolLM2, of which two have no partner: 94.2 % with it.
    """
    import pyarrow.parquet as pq

    from stillroom.data.tasks import get_task

    data = real_data()
    first, second = tokenizer(teacher), tokenizer(student)
    for case, (tokens, predictions) in expected.items():
        name, _, without_header = case.partition(" ")
        split = "auxiliary_train" if name == "mmlu" else "train"
        rows = pq.read_table(data / name / f"{split}.parquet").slice(0, 400).to_pylist()
        totals = dict.fromkeys(("tokens", "aligned", "predictions", "aligned_predictions"), 0)
        for example in map(get_task(name).build, rows):
            header = example.prompt.index("\n\n") + 2 if without_header else 0
            text = example.text[header:]
            t, s = encode(first, text), encode(second, text, add_eos=True)
            counts = coverage(s, align_encodings(t, s), len(example.prompt) - header)
            totals = {key: value + counts[key] for key, value in totals.items()}
        assert 100 * totals["aligned"] / totals["tokens"] == pytest.approx(tokens, abs=0.5)
        assert 100 * totals["aligned_predictions"] / totals["predictions"] == pytest.approx(predictions, abs=0.5)


def trained(pre_tokenizer, post_processor=None, decoder=None, texts=("the cat sat on the mat",) * 20, model=None):
    """A small BPE tokenizer of the given parts."""
    backend = Tokenizer(model or models.BPE())
    backend.pre_tokenizer, backend.decoder = pre_tokenizer, decoder or decoders.ByteLevel()
    if post_processor is not None:
        backend.post_processor = post_processor
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>")


def test_trimmed_offsets_do_not_move_an_end():
    """A byte-level tokenizer that trims white space from its offsets had `\\n` and seven spaces end at 3, not at 10."""
    code = ["def f(x):\n    return x\n\nclass A:\n    def g(self):\n        pass\n"] * 20
    trims = trained(
        pre_tokenizers.ByteLevel(add_prefix_space=False), processors.ByteLevel(trim_offsets=True), texts=code
    )
    text = "f:\n        return x"
    encoding = encode(trims, text)
    assert encoding.ids.tolist() == trims(text)["input_ids"]
    tokens = trims.convert_ids_to_tokens(encoding.ids.tolist())
    assert dict(zip(tokens, encoding.ends.tolist(), strict=True))["Ċ" + 7 * "Ġ"] == 10
    assert encoding.ends.tolist() == np.cumsum([len(token) for token in tokens]).tolist()


@pytest.mark.parametrize(
    ("family", "text", "expected"),
    [
        *(
            ("prepend", text, ends)
            for text, ends in (("中文好", [0, 2, 3]), ("x y", [0, 1, 2, 3]), ("  x", [0, 1, 2, 3]))
        ),
        *(("metaspace", text, ends) for text, ends in (("中文好", [0, 2, 3]), ("x y", [0, 1, 2, 3]), (" x", [1, 2]))),
        *(("byte-level", text, ends) for text, ends in (("é", [0, 1, 1]), ("x y", [0, 1, 2, 3]), (" x", [1, 2]))),
    ],
)
def test_a_prefix_that_the_tokenizer_invents_has_read_nothing(family, text, expected):
    """`▁` alone before `中文` ended at 1, as if a character had been read."""
    if family == "byte-level":
        tokenizer = trained(pre_tokenizers.ByteLevel(add_prefix_space=True), texts=["q"])
    else:
        vocabulary = {"<unk>": 0, "</s>": 1, "▁": 2, "中": 3, "文": 4, "中文": 5, "好": 6, "x": 7, "y": 8}
        backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("中", "文")], unk_token="<unk>"))
        if family == "prepend":
            backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        else:
            backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
    encoding = encode(tokenizer, text)
    assert encoding.ends.tolist() == expected
    assert not any(encoding.ends[j] == 0 for j, _ in align_encodings(encoding, encoding).pairs)


def test_wordpiece_tokens_are_words_after_a_space_or_the_rest_of_one():
    """`the` stands for ` the` within a text, and `##ing` for `ing`: read as spelt, neither maps to anything."""
    vocabulary = {"[UNK]": 0, "[SEP]": 1, "the": 2, "sing": 3, "##ing": 4}
    backend = Tokenizer(models.WordPiece(vocab=vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="[SEP]", unk_token="[UNK]")
    assert token_bytes(tokenizer) == {2: (b" the", False), 3: (b" sing", False), 4: (b"ing", False)}


def test_a_vocabulary_with_a_gap_maps_on_either_side(byte_level):
    """Its largest id, not its length, says how long the map is: a teacher's gap ended in an IndexError."""
    described = json.loads(byte_level.backend_tokenizer.to_str())
    vocabulary = described["model"]["vocab"]
    moved = max(vocabulary, key=vocabulary.get)
    vocabulary[moved] += 10
    gapped = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(described)), eos_token="<|endoftext|>"
    )
    there, back = map_vocabulary(gapped, byte_level), map_vocabulary(byte_level, gapped)
    plain = byte_level.get_vocab()
    assert len(there) == vocabulary[moved] + 1
    assert there[vocabulary[moved]] == plain[moved]
    assert back[plain[moved]] == vocabulary[moved]
    assert (there[len(plain) : vocabulary[moved]] == -1).all()


def test_a_byte_maps_to_the_byte_and_a_letter_to_the_letter(sentencepiece):
    """Where the student has two ids for the same bytes, the one spelt as the teacher's is taken."""
    other, vocabulary = sentencepiece_tokenizer(texts(), 410), sentencepiece.get_vocab()
    assert other.get_vocab() != vocabulary
    mapped = map_vocabulary(other, sentencepiece)
    for token in ("<0x61>", "a"):
        assert mapped[other.get_vocab()[token]] == vocabulary[token]


def test_a_token_with_bytes_of_two_characters_leaves_the_first_one_unread(byte_level):
    """Of 你好, e4bd is not 你 before a0e5 is read: there are such tokens in GPT-2's vocabulary."""
    you, good = ("你".encode(), "好".encode())
    letter = {byte: spelling for spelling, byte in vocabulary._BYTE_OF.items()}

    def merging(*merges):
        spelt = [tuple("".join(letter[byte] for byte in part) for part in merge) for merge in merges]
        entries = dict.fromkeys([*sorted(letter.values()), *("".join(merge) for merge in spelt), "<e>"])
        backend = Tokenizer(models.BPE(vocab={token: n for n, token in enumerate(entries)}, merges=spelt))
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<e>")

    crossing = merging((you[:1], you[1:2]), (you[2:], good[:1]), (good[1:2], good[2:]))
    whole = merging((you[:1], you[1:2]), (you[:2], you[2:]), (good[:1], good[1:2]), (good[:2], good[2:]))
    assert [len(encode(t, "你好").ids) for t in (crossing, whole)] == [3, 2]
    assert align("你好", whole, crossing).pairs.tolist() == [[1, 2]]
    assert align("你好", crossing, whole).pairs.tolist() == [[2, 1]]


def test_added_tokens_of_spaces_are_spaces(sentencepiece):
    """Gemma's runs of spaces are added tokens, spelt with ▁."""
    tokenizer = copy.deepcopy(sentencepiece)
    tokenizer.add_tokens([AddedToken("▁▁▁", normalized=False, special=False)])
    assert token_bytes(tokenizer)[tokenizer.convert_tokens_to_ids("▁▁▁")][0] == b"   "


def test_nothing_predicts_the_first_token(byte_level):
    """Coverage counts the predictions that are made: of four tokens without BOS or a prompt, three."""
    text = "the cat sat"
    encoding = encode(byte_level, text)
    if encoding.special[0]:
        encoding = replace(encoding, ids=encoding.ids[1:], ends=encoding.ends[1:], special=encoding.special[1:])
    found = coverage(encoding, align_encodings(encoding, encoding), 0)
    assert found["predictions"] == found["aligned_predictions"] == len(encoding.ids) - 1
    kinds = coverage_by_kind(encoding, align_encodings(encoding, encoding), kinds_of(text, encoding), 0)
    assert sum(counts["predictions"] for counts in kinds.values()) == len(encoding.ids) - 1
