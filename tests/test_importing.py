"""Log-probabilities captured elsewhere: the same store as if the teacher had run here, or refused by example."""

from __future__ import annotations

import json
import tracemalloc

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from stillroom.config import Signals
from stillroom.data.encoding import encode_many
from stillroom.errors import UserError
from stillroom.models.hub import load_model, load_tokenizer
from stillroom.offline_teacher_data import (
    import_signals,
    made_from,
    require_matching,
    verify_saved_data,
    write_requests,
)
from stillroom.preflight.measuring import measure_study
from stillroom.studies import load_study

TOP = 32


@pytest.fixture(scope="module")
def teacher(teacher_ref):
    """The teacher's tokenizer and its log-probabilities of a text, as a server gives them."""
    model = load_model(teacher_ref)

    @torch.no_grad()
    def read(ids):
        return model(torch.tensor([ids])).logits[0].log_softmax(-1).double()

    return load_tokenizer(teacher_ref), read


@pytest.fixture(scope="module")
def answers(teacher, examples, tmp_path_factory):
    """What vLLM answers to the requests: the top k and the prompt's own token, which may not be among them."""
    folder = tmp_path_factory.mktemp("served")
    tokenizer, read = teacher
    write_requests(tokenizer, examples.all, folder / "requests.jsonl")
    rows = []
    for request in map(json.loads, (folder / "requests.jsonl").read_text().splitlines()):
        ids = request["prompt_token_ids"]
        logprobs = read(ids)
        entries = [None]
        for t, token in enumerate(ids[1:]):
            best = logprobs[t].topk(TOP).indices.tolist()
            entries.append({str(i): {"logprob": float(logprobs[t, i]), "rank": 1} for i in {*best, token}})
        rows.append({**request, "prompt_logprobs": entries})
    return rows


@pytest.fixture
def importing(tmp_path, teacher, examples, teacher_ref):
    """Imports rows that are written as lines of JSON."""

    def run(rows, name="answers.jsonl", **settings):
        file = tmp_path / name
        if rows is not None:
            file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        signals = Signals(imported=True, top_k=TOP, dtype="float32", shard_examples=16, **settings)
        origin = made_from(teacher_ref.model, "float32", teacher[0], signals, examples.all)
        return import_signals([file], teacher[0], examples.all, signals, 400, tmp_path / "store", origin), origin

    return run


def test_an_imported_store_is_what_a_capture_gives(importing, answers, store):
    """Rows in another order, those of no example among them: every position but the last has the captured values."""
    imported, origin = importing([*reversed(answers), {**answers[0], "example_id": "nobody"}])
    assert verify_saved_data(imported.path, num_samples=1000)["sampled"] == len(store)
    require_matching(imported, origin)
    written = (imported.path / "manifest.json").read_bytes()
    importing(None)
    assert (imported.path / "manifest.json").read_bytes() == written, "the same files again are no other store"
    assert set(imported.columns) == {"ids", "ends", "special", "topk_ids", "topk_logprobs", "tail_logprobs"}
    for example_id in store.index:
        served, other = (
            imported.read(example_id),
            store.read(example_id, ["topk_ids", "topk_logprobs", "tail_logprobs"]),
        )
        assert served.encoding.ids.tolist() == other.encoding.ids.tolist()
        for column in ("topk_logprobs", "tail_logprobs"):
            np.testing.assert_allclose(served[column][:-1], other[column][:-1], atol=2e-4)
        probs = [np.zeros((len(served.encoding), 400)) for _ in range(2)]
        for dense, one in zip(probs, (served, other), strict=True):
            np.put_along_axis(dense, one["topk_ids"].astype(np.int64), np.exp(one["topk_logprobs"]), 1)
        np.testing.assert_allclose(probs[0][:-1], probs[1][:-1], atol=1e-5)


def test_a_server_and_distillkit_are_read_as_they_write(importing, answers, examples, teacher, tmp_path, store):
    """Responses of several choices without example ids, and DistillKit's columns with its token after the text."""
    plain = [
        {"choices": [dict(row, text="not the text") for row in answers[n : n + 7]]} for n in range(0, len(answers), 7)
    ]
    for choice in (choice for response in plain for choice in response["choices"]):
        del choice["example_id"]
    first, _ = importing(plain)
    rows = []
    for encoding in encode_many(teacher[0], [example.text for example in examples.all]):
        ids = encoding.ids.tolist()
        values, tokens = teacher[1]([*ids, 3])[:-1].topk(TOP + 3)
        rows.append({"input_ids": [*ids, 3], "token_ids": tokens.tolist(), "top_values": values.tolist()})
    (tmp_path / "store").rename(tmp_path / "first")
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data_0.parquet")
    second, _ = importing(None, "data_0.parquet")
    assert first.manifest["fingerprint"] != second.manifest["fingerprint"], "two captures are two stores"
    for example_id in list(store.index)[:8]:
        columns = ("topk_logprobs", "tail_logprobs")
        one, other = (
            type(s)(s.path, s.manifest).read(example_id) for s in (type(first).open(tmp_path / "first"), second)
        )
        for column in columns:
            np.testing.assert_allclose(one[column][:-1], other[column][:-1], atol=2e-4)
        captured = store.read(example_id, columns)
        np.testing.assert_allclose(other["topk_logprobs"], captured["topk_logprobs"], atol=2e-4)


def test_a_parquet_file_is_never_held_whole(importing, examples, teacher, tmp_path):
    """Its rows come in another order than the store's, and less is held at any time than all of them take."""
    encodings = encode_many(teacher[0], [example.text for example in examples.all])
    many = {"token_ids": list(range(400)), "top_values": np.full(400, -np.log(400)).tolist()}
    schema = pa.schema([("input_ids", pa.list_(pa.int64()))] + [(name, pa.list_(pa.list_(kind))) for name, kind in (
        ("token_ids", pa.int64()), ("top_values", pa.float32())
    )])  # fmt: skip
    with pq.ParquetWriter(tmp_path / "wide.parquet", schema, use_dictionary=False, compression=None) as file:
        for encoding in reversed(encodings):
            row = {"input_ids": encoding.ids.tolist()} | {k: [v] * (len(encoding) - 1) for k, v in many.items()}
            file.write_batch(pa.RecordBatch.from_pylist([row], schema))
    before, pool = pa.default_memory_pool(), pa.proxy_memory_pool(pa.default_memory_pool())
    pa.set_memory_pool(pool)
    tracemalloc.start()
    try:
        importing(None, "wide.parquet")
        held = tracemalloc.get_traced_memory()[1] + pool.max_memory()
    finally:
        tracemalloc.stop()
        pa.set_memory_pool(before)
    assert held < 5e6, "as arrays, all rows take 6 MB; as Python objects, 40"


def _shifted(row):
    entries = row["prompt_logprobs"]
    return {**row, "prompt_logprobs": [None, *entries[2:], entries[1]]}


def _hot(row):
    entries = [e and {i: {"logprob": v["logprob"] / 9} for i, v in e.items()} for e in row["prompt_logprobs"]]
    return {**row, "prompt_logprobs": entries}


def _with(change):
    """A change of every token's entries."""
    return lambda r: {**r, "prompt_logprobs": [e and change(e) for e in r["prompt_logprobs"]]}


MISTAKES = {
    "an id twice": (_with(lambda e: {**e, f"0{next(iter(e))}": next(iter(e.values()))}), "a token id stands twice"),
    "far too unlikely": (
        _with(lambda e: {key: {"logprob": -9.0} for key in e}),
        "leave 0.99.* to the tokens outside, which can have 0.0",
    ),
    "no id": (_with(lambda e: {**e, "9" * 30: {"logprob": -1.0}}), r"token id 9{12}.* is not in the teacher's voc"),
    "other text": (lambda r: {**r, "text": "Something else"}, "its text is 'Something else', the corpus has"),
    "other tokens": (
        lambda r: {**r, "prompt_token_ids": [1, *r["prompt_token_ids"]]},
        r"the server read other tokens than teacher.model's tokenizer gives: from token 0 on .* `stillroom import",
    ),
    "shifted": (
        _shifted,
        r"prompt_logprobs is not about token \d+, which the teacher reads there: the rows are shifted",
    ),
    "hot": (_hot, r"sum to [\d.]+: they are of no whole distribution; capture log-probabilities at temperature 1"),
    "cut": (lambda r: {**r, "prompt_logprobs": r["prompt_logprobs"][:-1]}, "capture the prompt whole"),
    "none": (lambda r: {**r, "prompt_logprobs": None}, r"prompt_logprobs is missing; .*prompt_logprobs=32"),
    "no number": (
        lambda r: {**r, "prompt_logprobs": [None, *({"x": 1} for _ in r["prompt_token_ids"][1:])]},
        "prompt_logprobs of token 1: expected",
    ),
    "no name": (lambda r: {"prompt_logprobs": r["prompt_logprobs"]}, "neither example_id nor prompt_token_ids"),
    "a list": (lambda r: [1], "expected an object per line"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_row_that_does_not_fit_is_named_with_the_remedy(importing, answers, mistake, tmp_path):
    """File, line and example; nothing is left behind that passes for a store."""
    change, message = MISTAKES[mistake]
    rows = [*answers[:3], change(answers[3]), *answers[4:]]
    with pytest.raises(UserError, match=message) as caught:
        importing(rows)
    assert "answers.jsonl, line 4" in str(caught.value)
    assert not (tmp_path / "store").exists()
    importing(answers)  # the same folder, once the rows are right


def test_examples_without_a_row_or_with_two_are_named(importing, answers, tmp_path):
    """Neither is filled up or chosen silently; fewer values than top_k are refused by token."""
    with pytest.raises(UserError, match=r"2 of 60 examples have no row; .* `stillroom import STUDY --requests FILE`"):
        importing(answers[2:])
    with pytest.raises(UserError, match=r"line 61: example \w+ is in .*line 1 as well"):
        importing([*answers, answers[0]])
    fewer = json.loads(json.dumps(answers))
    for entry in fewer[5]["prompt_logprobs"][1:]:
        while len(entry) > 20:
            entry.pop(next(key for key in entry if key != str(fewer[5]["prompt_token_ids"][1])))
    with pytest.raises(
        UserError, match=r"token \d+ (has 20 log-probabilities, signals.top_k is 32|of prompt_logprobs is)"
    ):
        importing(fewer)
    with pytest.raises(UserError, match=r"missing.jsonl cannot be read: No such file"):
        importing(None, "missing.jsonl")


IMPORTED = ["signals.imported=true", "teacher.fine_tune.method=none", "groups=[black_box]", "analysis={}"]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("groups=[hidden]", r"hidden layer last, which is not among signals.hidden_layers \[\]"),
        ("signals.hidden_layers=[last]", "must be \\[\\] or left out where imported is true"),
        ("teacher.fine_tune.method=full", "the teacher's weights are elsewhere"),
        ("objective.kd.temperature=2", "kd.temperature must be 1 where signals.imported is true"),
        ("signals.teacher_answers=true", "nothing but log-probabilities is imported"),
    ],
)
def test_what_log_probabilities_cannot_give_is_refused_at_once(override, message):
    """By the study, before anything is sent to a server."""
    with pytest.raises(UserError, match=message):
        load_study("quickstart", [*IMPORTED, override])


def test_a_plan_measures_no_teacher_that_runs_elsewhere():
    """Neither its weights nor its rate are this machine's."""
    with pytest.raises(UserError, match="--measure times the teacher, which runs elsewhere"):
        measure_study(load_study("quickstart", IMPORTED))
