"""A model card says what is true of its group, and nothing that a stranger wrote leaves its place on it."""

from __future__ import annotations

import shutil

import pytest
import yaml
from markdown_it import MarkdownIt

from stillroom.afterwards.export import _card
from stillroom.analysis.escaping import control_free, fence, markdown_plain
from stillroom.errors import UserError
from stillroom.files import read_json, write_json
from stillroom.folders import EXPERIMENT
from synthetic import write_results

HOSTILE = (
    "\n```\n````` five\n~~~\n---\n# Owned\n<script>alert(1)</script> ![x](javascript:alert(1))\n"
    "<img src=x onerror=alert(1)>\x1b[31m\x9b2J\r\x07\u202e | cell |\n\tend"
)


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """A study whose prompts try to leave their block."""
    folder = tmp_path_factory.mktemp("cards") / "results"
    write_results(folder, seeds=(0,), rename=lambda text: text + HOSTILE)
    return folder


def card_of(folder, group):
    """The card of a group's first trial after its last epoch, and what Markdown makes of it without its head."""
    (trial,) = (folder / EXPERIMENT).glob(f"trial_*_{group}_seed_0")
    card = _card(trial, trial / "checkpoint_4")
    return card, MarkdownIt("commonmark").enable("table").parse(card.split("---\n", 2)[2])


def inline(tokens):
    """Every piece of the running text."""
    return [piece for token in tokens if token.type == "inline" for piece in token.children]


def test_a_prompt_stays_in_its_block(study):
    """Fences, rules, headings, tags, an image and control characters of a prompt are text of one block of code."""
    card, tokens = card_of(study, "combined")
    blocks = [token.content for token in tokens if token.type == "fence"]
    assert len(blocks) == 2
    assert blocks[1].endswith(
        HOSTILE.translate({27: "\\x1b", 0x9B: "\\x9b", 13: "\\r", 7: "\\x07", 0x202E: "\\u202e"}) + "\n"
    )
    assert [t for t in tokens if t.type in ("html_block", "hr")] == []
    assert [t for t in inline(tokens) if t.type in ("html_inline", "image", "link_open")] == []
    assert [tokens[n + 1].content for n, t in enumerate(tokens) if t.tag == "h2" and t.nesting == 1] == [
        "Data",
        "Method",
        "Metrics",
        "Limits",
    ]
    assert card == control_free(card, keep="\n\t")


def test_a_name_is_no_markup(study, tmp_path):
    """Models, data sets, revisions and splits may be called anything: in the head, in a sentence and in a cell."""
    folder = shutil.copytree(study, tmp_path / "results")
    name = "own|er/`na*me*` <b>x</b> ![i](j) [l](m) \x1b[1m_#"
    planned = read_json(folder / "planned.json")
    planned["study"]["student"] |= {"model": name, "revision": name}
    planned["study"]["teacher"] |= {"model": name, "revision": name}
    planned["study"]["corpus"]["tasks"]["quiz"] |= {"dataset": f"{name}: - x", "revision": name}
    write_json(folder / "planned.json", planned)
    card, tokens = card_of(folder, "combined")
    head = yaml.safe_load(card.split("---\n")[1])
    assert head["base_model"] == control_free(name)
    assert f"{control_free(name)}: - x" in head["datasets"]
    kinds = {piece.type for piece in inline(tokens)}
    assert kinds.isdisjoint({"html_inline", "image", "link_open", "em_open", "strong_open"})
    shown = ["".join(p.content for p in t.children) for t in tokens if t.type == "inline"]
    assert sum(control_free(name) in text for text in shown) >= 3
    rows = [n for n, t in enumerate(tokens) if t.type == "tr_open"]
    cells = [
        sum(t.type in ("td_open", "th_open") for t in tokens[a:b]) for a, b in zip(rows, [*rows[1:], None], strict=True)
    ]
    assert set(cells[:4]) == {5}  # the head and three tasks
    assert "\x1b" not in card


def test_a_card_says_of_projector_and_teacher_what_is_true(study, tmp_path):
    """A projector is trained where hidden states are compared; nothing is compared without the teacher; how it was."""
    said = {group: card_of(study, group)[0] for group in ("task_only", "black_box", "hidden", "attention", "combined")}
    assert {group for group, card in said.items() if "projector" in card} == {"hidden", "combined"}
    assert {group for group, card in said.items() if "No signal of the teacher was used." in card} == {"task_only"}
    assert {group for group, card in said.items() if "are compared where both have read" in card} == set(said) - {
        "task_only"
    }
    for card in said.values():
        assert "itself first fine-tuned on the same training examples (all weights)" in card
        assert "| Student before training | This model | Teacher (fine-tuned) |" in card
    folder = shutil.copytree(study, tmp_path / "results")
    planned = read_json(folder / "planned.json")
    planned["study"]["teacher"]["fine_tune"]["method"] = "none"
    write_json(folder / "planned.json", planned)
    assert "fine-tuned" not in card_of(folder, "hidden")[0]


def test_a_card_says_which_tasks_had_wrong_answers_put_in(study, tmp_path):
    """Label noise is in the student's weights: how much of it, and that the teacher did not learn it; else no word."""
    folder = shutil.copytree(study, tmp_path / "results")
    planned, corpus = read_json(folder / "planned.json"), read_json(folder / "corpus" / "corpus.json")
    tasks = planned["study"]["corpus"]["tasks"]
    for data in tasks.values():
        data.pop("label_noise", None)
    write_json(folder / "planned.json", planned)
    assert "Label noise" not in card_of(folder, "task_only")[0]
    tasks["sentiment"]["label_noise"] = 0.3
    corpus["counts"]["sentiment"]["mislabelled"] = 1
    write_json(folder / "planned.json", planned)
    write_json(folder / "corpus" / "corpus.json", corpus)
    said = " ".join(card_of(folder, "task_only")[0].split())
    assert "Label noise: 1 of the 2 training examples of sentiment (asked for: 30%) were given a wrong answer" in said
    assert "its teacher was fine-tuned on the right answers" in said
    assert said.count("Label noise") == 1


def test_a_checkpoint_that_the_result_does_not_know_has_no_card(study):
    """Another epoch's numbers are not taken for it."""
    (trial,) = (study / EXPERIMENT).glob("trial_*_hidden_seed_0")
    with pytest.raises(UserError, match="has no epoch 9"):
        _card(trial, trial / "checkpoint_9")


def test_text_of_others_is_made_plain():
    """Each character by itself: what steers a terminal, what Markdown reads, a fence that no text closes."""
    assert control_free("a\x1b[0m\x9b\x7f\u2028\u202e\n") == "a\\x1b[0m\\x9b\\x7f\\u2028\\u202e\\n"
    assert control_free("a\nb\t", keep="\n") == "a\nb\\t"
    assert control_free("naïve 漢字 👩‍👩‍👧") == "naïve 漢字 👩‍👩‍👧"
    assert [fence(text) for text in ("", "```", "a ```` b `", "~~~~")] == ["```", "````", "`````", "```"]
    for text in ("*a* _b_ `c` [d](e) <f> ![g](h) | i & # ~j~ \\", "1 < 2 && 3 > 2", "&lt;"):
        (_, paragraph, _) = MarkdownIt("commonmark").parse(markdown_plain(text))
        assert "".join(piece.content for piece in paragraph.children) == text
