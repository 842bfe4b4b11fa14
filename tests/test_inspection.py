"""A look inside a store shows what a fresh forward pass and an alignment by hand give."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from functools import partial

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import pages
from small_things import STUDENT_SHAPE, make_store, real_tokenizer, write_model
from stillroom.afterwards.fonts import escaped, fonts_for
from stillroom.afterwards.inspection import (
    attention_figure,
    describe_example,
    describe_store,
    example_of,
    find_example,
    find_layer,
)
from stillroom.cli import app
from stillroom.config import ModelRef
from stillroom.data.corpus import Examples, save_corpus
from stillroom.data.tasks import Example
from stillroom.errors import UserError
from stillroom.studies import load_study


@pytest.fixture
def example(examples):
    """One with a worked answer."""
    return next(e for e in examples.all if e.task == "arithmetic")


def test_a_stores_summary_is_what_was_put_in(store, examples):
    """Examples and tokens by task, and their sums."""
    facts = describe_store(store.path)
    assert {task: counts["examples"] for task, counts in facts["tasks"].items()} == {
        "arithmetic": 20,
        "quiz": 20,
        "sentiment": 20,
    }
    assert set(facts["ids"]) == {e.example_id for e in examples.all}
    assert facts["tokens"] == sum(len(store.read(i, ()).encoding) for i in facts["ids"])
    assert facts["verified"]


def test_predictions_and_norms_are_those_of_a_fresh_forward_pass(store, example, teacher_ref):
    """Each token's best next tokens, their probabilities, what is left over, and the length of its state."""
    facts = describe_example(store, example.example_id, example, top=5)
    ids = torch.tensor([[token["id"] for token in facts["teacher"]]])
    teacher = AutoModelForCausalLM.from_pretrained(teacher_ref.model)
    with torch.no_grad():
        outputs = teacher(ids, output_hidden_states=True)
    probabilities = outputs.logits[0].double().softmax(-1)
    norms = outputs.hidden_states[-1][0].double().norm(dim=-1)
    for row, token in enumerate(facts["teacher"]):
        best = probabilities[row].topk(32).values
        assert [p["probability"] for p in token["predictions"]] == pytest.approx(best[:5].tolist(), rel=1e-3)
        assert token["tail"] == pytest.approx(1 - float(best.sum()), abs=1e-4)
        assert token["hidden_norm"] == pytest.approx(float(norms[row]), rel=1e-4)


def test_marked_ends_are_the_ends_that_both_tokenizers_have(store, example, student_ref, byte_level, sentencepiece):
    """Stretches of text put together give the text; a mark stands where both stop, by offsets alone."""
    facts = describe_example(store, example.example_id, example, student_ref)
    for side in ("teacher", "student"):
        assert "".join(t["token"] for t in facts[side] if not t["special"]) == example.text
    ends = [
        {end for _, end in tokenizer(example.text, return_offsets_mapping=True)["offset_mapping"] if end}
        for tokenizer in (byte_level, sentencepiece)
    ]
    shared = ends[0] & ends[1]
    assert 0 < len(shared) < len(ends[1])
    for side in ("teacher", "student"):
        assert {t["end"] for t in facts[side] if t["shared"]} == shared
        assert not any(t["shared"] for t in facts[side] if t["special"])
    assert facts["covered"] == pytest.approx(len(shared) / sum(not t["special"] for t in facts["student"]))
    for token in facts["teacher"]:
        assert token["tail"] - 1e-6 <= token["other"] <= 1


def test_the_picture_is_the_models_own_attention(tmp_path, teacher_ref, student_ref):
    """Left, an eager pass' last layer, mean over heads; right, its columns added up between the shared ends."""
    teacher = AutoModelForCausalLM.from_pretrained(teacher_ref.model, attn_implementation="eager")
    texts = Examples([Example("quiz", "naïve café – 漢字:", " A")], [Example("quiz", "Which is a tool?", " B")], {})
    store = make_store(tmp_path / "store", teacher_ref, texts)
    shorter = 0
    for example in texts.all:
        axes = attention_figure(store, example.example_id, example, student_ref).axes
        left, right = (np.asarray(axis.images[0].get_array()) for axis in axes)
        tokens = describe_example(store, example.example_id, example, student_ref)["teacher"]
        with torch.no_grad():
            ids = torch.tensor([[token["id"] for token in tokens]])
            attention = teacher(ids, output_attentions=True).attentions[-1][0].mean(0)
        assert left == pytest.approx(attention.numpy(), abs=1e-5)
        rows = [n for n, token in enumerate(tokens) if token["shared"]]
        cuts = list(zip([0, *(n + 1 for n in rows)], [n + 1 for n in rows], strict=False))
        expected = [[float(attention[row, a:b].sum()) for a, b in cuts] for row in rows]
        assert right == pytest.approx(np.array(expected), abs=1e-5)
        shorter += len(right) < len(left)
    assert shorter


def test_no_letter_of_a_picture_is_a_box(monkeypatch):
    """A letter comes from a font that has it, or is escaped; the font that draws boxes for all is not taken."""
    from matplotlib import font_manager
    from matplotlib.figure import Figure

    kept = ("DejaVu Sans", "STIXGeneral", "Last Resort High-Efficiency")
    fonts = [font for font in font_manager.fontManager.ttflist if font.name in kept]
    monkeypatch.setattr(font_manager.fontManager, "ttflist", fonts)
    other = next(c for c in map(chr, range(0x21, 0x2FFF)) if fonts_for(c) == (["STIXGeneral"], set()))
    families, missing = fonts_for(f"a{other}漢")
    assert (families, missing) == (["DejaVu Sans", "STIXGeneral"], {"漢"})
    shown = escaped(f"a{other}漢", missing)
    assert shown == f"a{other}\\u6f22"
    figure = Figure()
    figure.text(0, 0, shown, fontfamily=families, parse_math=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        figure.canvas.draw()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral-7b-v0.1", "tinyllama-1.1b", "qwen2.5-coder-0.5b", "smollm2-135m"])
def test_text_is_told_from_a_real_tokenizers_tokens_or_refused(tmp_path, name):
    """What is shown is the text, character by character; where a tokenizer rewrites it, the corpus is asked for."""
    ref = write_model(tmp_path / "model", real_tokenizer(name), STUDENT_SHAPE, 3)
    plain = Example("quiz", "Two  spaces,\nlines; 1,234 – 漢字 and 👩‍👩‍👧:", " A")
    rewritten = Example("quiz", "a cafe\u0301, decomposed", " B")
    store = make_store(tmp_path / "store", ref, Examples([plain], [rewritten], {}), top_k=8)
    assert example_of(store, store.read(plain.example_id, ())).text == plain.text
    stored = store.read(rewritten.example_id, ())
    if "qwen" in name:
        with pytest.raises(UserError, match="--corpus"):
            example_of(store, stored)
    save_corpus(Examples([plain], [rewritten], {}), tmp_path / "corpus", "x")
    assert example_of(store, stored, tmp_path / "corpus") == rewritten


def test_the_command_prints_a_table_or_json_and_writes_a_picture(store, example, student_ref, tmp_path):
    """Both ways of reading it; an id by its beginning; an unknown one is refused with what ids look like."""
    picture = tmp_path / "map.png"
    arguments = ["inspect", str(store.path), example.example_id[:10], "--student", student_ref.model]
    shown = CliRunner().invoke(app, [*arguments, "--picture", str(picture)])
    assert shown.exit_code == 0, shown.output
    assert "│ aligned token boundary" in shown.output
    assert picture.read_bytes()[:4] == b"\x89PNG"
    printed = CliRunner().invoke(app, [*arguments, "--picture", str(picture), "--json"])
    facts = json.loads(printed.stdout)
    assert facts["text"] == example.text
    assert facts["pairs"]
    summary = CliRunner().invoke(app, ["inspect", str(store.path)])
    assert "60 examples" in summary.output
    assert f"Next: stillroom inspect {store.path}" in summary.output.replace("\n", "")
    with pytest.raises(UserError, match="0 examples begin with 'zz'"):
        find_example(store, "zz")
    with pytest.raises(UserError, match="60 examples begin with ''"):
        find_example(store, "")


def test_control_characters_of_a_text_never_reach_the_terminal(tmp_path, teacher_ref):
    """Escape, CSI, bell, a turned line and a lone carriage return are shown as their escapes, on every line."""
    hostile = "red \x1b[31m, bell \x07, CSI \x9b2J, back\r, turned \u202e, title \x1b]0;owned\x07:"
    example = Example("quiz", hostile, " A")
    store = make_store(tmp_path / "store", teacher_ref, Examples([example], [], {}))
    arguments = ["inspect", str(store.path), example.example_id, "--picture", str(tmp_path / "map.png")]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    assert not {"\x1b", "\x07", "\x9b", "\r", "\u202e"} & set(shown.output)
    assert "\\x1b" in shown.output
    assert "\\u202e" in shown.output


def test_a_student_whose_ids_have_a_gap_loses_no_token(store, example, tmp_path, teacher_ref):
    """The largest id counts, not how many there are: the other is that of the same vocabulary without the gap."""
    gapped = tmp_path / "gapped"
    shutil.copytree(teacher_ref.model, gapped)
    described = json.loads((gapped / "tokenizer.json").read_text("utf-8"))
    vocabulary = described["model"]["vocab"]
    moved = {token: number + 500 if number >= len(vocabulary) - 100 else number for token, number in vocabulary.items()}
    described["model"]["vocab"] = moved
    (gapped / "tokenizer.json").write_text(json.dumps(described), "utf-8")
    others = [
        [token["other"] for token in describe_example(store, example.example_id, example, student)["teacher"]]
        for student in (teacher_ref, ModelRef(model=str(gapped)))
    ]
    assert others[1] == pytest.approx(others[0], abs=1e-6)


def test_a_folder_that_is_no_store_is_refused(tmp_path):
    """By the same message as everywhere."""
    with pytest.raises(UserError, match="not a finished store"):
        describe_store(tmp_path)


def test_a_stranger_reads_a_store_by_the_page_on_its_format(store):
    """The page's own lines, without this package, give what the reader gives."""
    (block,) = [b for b in pages.blocks(pages.ROOT / "docs" / "store.md") if b.language == "python"]
    assert "stillroom" not in block.text
    read = {"store": str(store.path)}
    exec(compile(block.text, "docs/store.md", "exec"), read)
    stored = store.read(read["row"]["example_id"])
    assert np.array_equal(read["hidden"], stored["hidden"])
    assert np.array_equal(read["topk_ids"], stored["topk_ids"])
    assert np.array_equal(read["attention"], stored["attention"])


@pytest.fixture(scope="module")
def layered(tmp_path_factory, teacher_ref, examples):
    """A store of one hidden layer beside the last, and of two layers' attention."""
    kept = {"hidden_layers": (1, "last"), "attention_layers": (1, 2, "last")}
    some = Examples(examples.train[:4], [], {})
    return make_store(tmp_path_factory.mktemp("layered") / "data", teacher_ref, some, **kept)


def test_a_layers_norms_and_picture_are_those_of_a_forward_pass(layered, teacher_ref):
    """Layer 1's state and map, not the last's."""
    example_id = next(iter(layered.index))
    example = example_of(layered, layered.read(example_id, ()))
    facts = describe_example(layered, example_id, example, layer=1)
    teacher = AutoModelForCausalLM.from_pretrained(teacher_ref.model, attn_implementation="eager")
    with torch.no_grad():
        ids = torch.tensor([[token["id"] for token in facts["teacher"]]])
        outputs = teacher(ids, output_hidden_states=True, output_attentions=True)
    norms = outputs.hidden_states[1][0].norm(dim=-1).tolist()
    assert [token["hidden_norm"] for token in facts["teacher"]] == pytest.approx(norms, rel=1e-3)
    image = attention_figure(layered, example_id, example, layer=1).axes[0].images[0].get_array()
    assert np.asarray(image) == pytest.approx(outputs.attentions[0][0].mean(0).numpy(), abs=1e-3)


def test_the_command_shows_a_stores_layers_and_the_pairs_that_a_study_compares(layered, tmp_path, monkeypatch):
    """One that is not kept is named, for an example and for a study."""
    monkeypatch.chdir(tmp_path)
    run = partial(CliRunner().invoke, app)
    assert "layers: hidden 1, last; attention 1, 2, last" in run(["inspect", str(layered.path)]).output
    study = tmp_path / "study.yaml"
    groups = "groups=[{name: deep, terms: [task, hidden, attention], hidden: {layers: [[1, 1], [last, last]]}}]"
    alone = ["analysis.primary=[]", "analysis.secondary=[]", "signals.hidden_layers=[1, 2, last]"]
    loaded = load_study("quickstart", [groups, *alone])
    study.write_text(json.dumps(loaded.model_dump(mode="json")), "utf-8")
    asked = ["inspect", str(layered.path), "--study", str(study)]
    shown = run(asked)
    assert shown.exit_code == 0, shown.output
    assert re.search(r"hidden +│ 1 → 1, last → last +│ +2 │", shown.output)
    assert re.search(r"attention +│ last → last +│ +│", shown.output)
    deep = json.loads(run([*asked, "--json"]).stdout)["groups"]["deep"]
    assert deep["layers"] == {"hidden": [[1, 1], ["last", "last"]], "attention": [["last", "last"]]}
    assert deep["projectors"] == 2
    other = load_study("quickstart", [groups.replace("[1, 1]", "[2, 1]"), *alone])
    with pytest.raises(UserError, match=r"group 'deep' compares the teacher's hidden layer 2, .*\(it has 1, last\)"):
        describe_store(layered.path, other)
    example_id = next(iter(layered.index))
    assert "Attention map" in run(["inspect", str(layered.path), example_id, "--layer", "2"]).output
    assert find_layer(layered, "2") == 2
    with pytest.raises(UserError, match=r"nothing of layer 3 .*hidden 1, last; attention 1, 2, last"):
        find_layer(layered, "3")
