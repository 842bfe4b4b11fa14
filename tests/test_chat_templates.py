"""Chats under the templates of real models: aligned on the contents alone, or refused by name."""

from __future__ import annotations

import copy
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from chats import CHATS, DROPPING, GEMMA, LLAMA3, LONG, MISTRAL, MISTRAL_SPACED, THINKING, ZEPHYR
from setups import ALL, Setup, changed
from small_things import make_store, real_tokenizer
from stillroom.config import Corpus, Objective, TaskColumns, TaskData
from stillroom.data.alignment import KINDS, align_encodings, coverage, kinds_of
from stillroom.data.chat_templates import encode_examples, encode_prompts, render, settled
from stillroom.data.corpus import Examples, build_corpus, load_corpus, save_corpus
from stillroom.data.encoding import supervised_predictions
from stillroom.data.prepared import Prepared
from stillroom.data.tasks import get_task
from stillroom.data.tasks.chats import chat
from stillroom.errors import UserError
from stillroom.evaluation.baselines import Baseline
from stillroom.experiment.sources import Sources
from stillroom.models.hub import load_tokenizer
from stillroom.studies import load_study
from stillroom.terms import NextTokenTerms
from stillroom.training.by_kind import count_kinds, only

MODELS = {
    "tinyllama": ("tinyllama-1.1b", ZEPHYR, ()),
    "mistral": ("mistral-7b-v0.1", MISTRAL, ()),
    "mistral, spaced": ("mistral-7b-v0.1", MISTRAL_SPACED, ()),
    "gemma": ("mistral-7b-v0.1", GEMMA, ("<start_of_turn>", "<end_of_turn>")),
    "llama 3": ("smollm2-135m", LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")),
    "qwen": ("qwen2.5-coder-0.5b", None, ()),
    "smollm": ("smollm2-135m", None, ()),
}
NO_SYSTEM = {"mistral", "mistral, spaced", "gemma"}
SHORT = [name for name in CHATS if name not in ("long", "unicode", "white space")]


@pytest.fixture(scope="module")
def models():
    """Tokenizers by name, each with its template: its own file's, or written down from public knowledge."""
    found = {}
    for name, (folder, template, added) in MODELS.items():
        tokenizer = copy.deepcopy(real_tokenizer(folder))
        if template:
            tokenizer.chat_template = template
        if added:
            tokenizer.add_special_tokens({"additional_special_tokens": list(added)})
        found[name] = tokenizer
    return found


THOUGHT = [("user", "a"), ("assistant", "<think>no</think>b"), ("user", "c"), ("assistant", "d")]
SPELT = [("user", "what is </s>?"), ("assistant", "EOS")]


def example(name, learn="assistant"):
    """One of the chats, with the assistant's turns learnt, or the last alone."""
    messages = CHATS[name]
    learnt = [
        role == "assistant" and (learn == "assistant" or n == len(messages) - 1) for n, (role, _) in enumerate(messages)
    ]
    return chat("chats", messages, learnt)


def takes(model, name):
    """Whether a model's template takes the system turns of a chat."""
    return model not in NO_SYSTEM or CHATS[name][0][0] != "system"


def theirs(tokenizer, turns, contents, **options):
    """Ids as Transformers makes them, on the day that the date is fixed to."""
    template = re.sub(r"strftime_now\('[^']*'\)", "'26 Jul 2024'", tokenizer.get_chat_template())
    messages = [{"role": turn.role, "content": content} for turn, content in zip(turns, contents, strict=True)]
    return tokenizer.apply_chat_template(messages, chat_template=template, tokenize=True, return_dict=False, **options)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("name", CHATS)
def test_a_model_reads_what_its_template_writes_and_learns_what_it_would_write(models, model, name):
    """Ids are those of Transformers; learnt is what stands between what asks for a turn and the turn's end."""
    tokenizer, conversation = models[model], example(name)
    if not takes(model, name):
        with pytest.raises(ValueError, match=r"refuses the turns system, .*chat.system: first_user"):
            settled(conversation, [tokenizer])
        return
    conversation = settled(conversation, [tokenizer])
    (encoding,) = encode_examples(tokenizer, [conversation], add_eos=True)
    whole = theirs(tokenizer, conversation.turns, conversation.contents)
    assert encoding.ids.tolist() == whole[: len(encoding)]
    assert tokenizer.decode(whole[len(encoding) :]).strip() == ""
    expected = set()
    for number, turn in enumerate(conversation.turns):
        if turn.learnt:
            asked = theirs(
                tokenizer, conversation.turns[:number], conversation.contents[:number], add_generation_prompt=True
            )
            until = theirs(tokenizer, conversation.turns[: number + 1], conversation.contents[: number + 1])
            last = max(t for t, i in enumerate(until) if i in tokenizer.all_special_ids)
            expected |= set(range(len(asked), last + 1)) if until[: len(asked)] == asked else set()
    positions, targets = supervised_predictions(encoding, len(conversation.prompt))
    if expected and name != "white space":  # there, a token of two newlines stands for one of the template's
        assert set((positions + 1).tolist()) == expected
    assert targets.tolist() == encoding.ids[positions + 1].tolist()
    (prompt,) = encode_prompts(tokenizer, [conversation])
    assert prompt.ids.tolist() == theirs(
        tokenizer, conversation.turns[:-1], conversation.contents[:-1], add_generation_prompt=True
    )


@pytest.mark.parametrize(("teacher", "student"), itertools.combinations(MODELS, 2))
def test_both_have_read_the_same_contents_at_every_pair(models, teacher, student):
    """Decoded up to a pair, both end with the turn's content up to there; no template token is in a pair."""
    for name in SHORT:
        if not (takes(teacher, name) and takes(student, name)):
            continue
        pair = models[teacher], models[student]
        conversation = settled(example(name), pair)
        encodings = [encode_examples(tokenizer, [conversation])[0] for tokenizer in pair]
        alignment = align_encodings(*encodings)
        assert len(alignment.pairs) > 3, name
        for tokens in alignment.pairs:
            ends = {int(encoding.ends[t]) for encoding, t in zip(encodings, tokens, strict=True)}
            (end,) = ends
            turn = next(turn for turn in conversation.turns if turn.start < end <= turn.stop)
            for tokenizer, encoding, t in zip(pair, encodings, tokens, strict=True):
                assert not encoding.special[t]
                assert tokenizer.decode(encoding.ids[: t + 1]).endswith(conversation.text[turn.start : end]), (name, t)
        ending = {int(encodings[0].ends[j]) for j, _ in alignment.pairs}
        assert {turn.stop for turn in conversation.turns if turn.stop > turn.start} <= ending, name


def test_the_first_token_of_a_reply_is_compared_where_both_have_the_same_to_write(models):
    """After [/INST] one template leaves a space to be written: ` Hello` there is not `Hello` elsewhere."""
    conversation = example("several")

    def replies(teacher, student):
        pair = models[teacher], models[student]
        encodings = [encode_examples(tokenizer, [conversation])[0] for tokenizer in pair]
        alignment = align_encodings(*encodings)
        for j, i in alignment.replies:
            following = [
                tokenizer.decode(e.ids[[t + 1]]) for tokenizer, e, t in zip(pair, encodings, (j, i), strict=True)
            ]
            assert following[0].strip()[0] == following[1].strip()[0]
            assert encodings[0].special[j], j
            assert encodings[1].special[i], i
        assert (np.diff(alignment.predictors, axis=0) > 0).all()
        return len(alignment.replies)

    assert replies("qwen", "smollm") == replies("mistral", "tinyllama") == replies("gemma", "llama 3") == 2
    assert replies("mistral, spaced", "smollm") == 1  # `▁` stands before the digits: the next token is `1` for both


def test_only_declared_turns_are_learnt(models):
    """`last`: the earlier reply is context, and neither it nor its end is a target."""
    tokenizer = models["smollm"]
    encodings = encode_examples(tokenizer, [example("several"), example("several", "last")])
    texts = [tokenizer.decode(e.ids[e.learnt | e.written]) for e in encodings]
    assert texts == ["Hello! How can I help?<|im_end|>1\n2\n3<|im_end|>", "1\n2\n3<|im_end|>"]


def test_what_one_template_trims_is_trimmed_for_both(models):
    """Else one model would have read white space that the other has not, and ends would differ."""
    pair = [models["qwen"], models["gemma"]]
    conversation = settled(example("white space"), pair)
    assert conversation.contents == ("two before", "blank lines before, and one after")
    teacher, student = (encode_examples(tokenizer, [conversation])[0] for tokenizer in pair)
    assert teacher.ends[-2] == student.ends[-2] == conversation.turns[-1].stop
    assert settled(example("white space"), pair[:1]) == example("white space")
    with pytest.raises(ValueError, match="make the corpus again"):
        encode_examples(models["gemma"], [example("white space")])


def test_a_template_that_writes_the_date_writes_the_same_one_tomorrow(models):
    """A store and its students would be made from other texts every day."""
    assert "Today: 26 Jul 2024" in render(models["llama 3"], example("one turn")).text


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (DROPPING, "system", r"turn 1 \(system\): the chat template leaves its content out"),
        (
            "{% for m in messages %}{{ m['content'] + m['content'] }}{% endfor %}",
            "one turn",
            r"turn 1 \(user\): the chat template writes its content twice",
        ),
        (
            "{% for m in messages %}{{ m['content'] | upper }}\n{% endfor %}",
            "one turn",
            r"turn 1 \(user\): the chat template leaves its content out",
        ),
        (
            "{{ 'A' if '2' in messages[0]['content'] else 'B' }}"
            "{% for m in messages %}{{ m['content'] + '\n' }}{% endfor %}",
            "one turn",
            r"turn 1 \(user\): the chat template writes something else before this content",
        ),
        (
            "{% for m in messages %}{{ m['content'].replace('2', 'two') }}\n{% endfor %}",
            "one turn",
            r"turn 1 \(user\): the chat template rewrites its content",
        ),
        (THINKING, THOUGHT, "turn 2 .*rewrites"),
        (
            "{% for m in messages %}{{ m['role'] + m['content'] }}{% endfor %}"
            "{% if add_generation_prompt %}{{ 'model' }}{% endif %}",
            "one turn",
            r"turn 2 \(assistant\): what the chat template writes before it is not what it writes to ask for it",
        ),
        (ZEPHYR, SPELT, r"turn 1 \(user\): it contains '</s>', which .* control token"),
        ("{{ nothing.at.all }}", "one turn", "refuses the turns user, assistant: 'nothing' is undefined"),
    ],
)  # fmt: skip
def test_what_cannot_be_aligned_is_refused_and_says_which_turn(models, template, messages, message):
    """Never by a guess where a content might stand."""
    tokenizer = copy.deepcopy(models["tinyllama"])
    tokenizer.chat_template = template
    turns = CHATS.get(messages, messages) if isinstance(messages, str) else messages
    conversation = chat("chats", turns, [role == "assistant" for role, _ in turns])
    with pytest.raises(ValueError, match=message):
        encode_examples(tokenizer, [settled(conversation, [tokenizer])])


def corpus_of(path, rows, **columns):
    """Settings for a file of chats."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = TaskData(dataset=str(path), examples=len(rows), chat=columns)
    return Corpus(tasks={"talk": task}, max_length=400)


def test_a_corpus_of_chats_counts_what_it_left_out_and_keeps_the_turns(models, tmp_path):
    """Trimmed, unusable and too long ones are counted, the first fault is told; what was saved is read back."""
    pair = [models["gemma"], models["qwen"]]
    good = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"It is {n}."}]}
        for n in range(5)
    ]
    other = [
        {"messages": [{"from": "human", "value": " spaces "}, {"from": "gpt", "value": "trimmed\n"}]},
        {"messages": json.dumps([{"role": "user", "content": "json?"}, {"role": "assistant", "content": "in a text"}])},
        {"messages": [{"role": "user", "content": LONG}, {"role": "assistant", "content": "Too long."}]},
        {"messages": [{"role": "system", "content": "Be kind."}, *good[0]["messages"]]},
        {"messages": [{"role": "user", "content": "and?"}]},
        {"messages": [{"role": "tool", "content": "3"}, *good[0]["messages"]]},
    ]
    corpus = corpus_of(tmp_path / "talk.jsonl", [*good, *other])
    with pytest.raises(UserError, match=r"only 7 can be used .*'unusable': 3.*the last turn is the user's"):
        build_corpus(corpus, pair)
    seven = corpus.model_copy(update={"tasks": {"talk": corpus.tasks["talk"].model_copy(update={"examples": 7})}})
    examples = build_corpus(seven, pair)
    counts = examples.counts["talk"]
    assert (counts["unusable"], counts["too_long"], counts["trimmed"]) == (3, 1, 2)
    assert all(
        conversation.turns and conversation.contents == tuple(c.strip() for c in conversation.contents)
        for conversation in examples.all
    )
    save_corpus(examples, tmp_path / "corpus", "f")
    assert load_corpus(tmp_path / "corpus")[0] == examples
    folded = corpus_of(tmp_path / "talk.jsonl", [*good, other[3]], system="first_user")
    assert "user: Be kind.\n\n0?\nassistant: " in [
        conversation.prompt for conversation in build_corpus(folded, pair).all
    ]


def test_a_model_without_a_template_is_named(models, tmp_path):
    """And where to give it one."""
    bare = copy.deepcopy(models["mistral"])
    bare.chat_template = None
    rows = [
        {"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": "!"}]} for n in range(4)
    ]
    with pytest.raises(UserError, match=r"mistral-7b-v0.1: its tokenizer has no chat template.*chat_template field"):
        build_corpus(corpus_of(tmp_path / "talk.jsonl", rows), [models["qwen"], bare])


def said(*contents):
    """Turns by the user and the assistant, in turn."""
    return [
        {"role": role, "content": content} for role, content in zip(itertools.cycle(["user", "assistant"]), contents)
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ([], "must list turns"),
        ("[{", "is text, but not JSON"),
        (said(None, "x"), r"turn 1 \(user\): its content is not text"),
        ([{"role": "narrator", "content": "x"}], "turn 1: the role 'narrator' is none of system, user, assistant"),
        (said("x", "  "), r"turn 2 \(assistant\), the last, is empty"),
        (said("\ud800", "x"), "turn 1 holds half of a surrogate"),
        ([*said("x"), {"role": "assistant", "content": "", "tool_calls": [1]}], "tool calls are not read"),
    ],
)
def test_a_row_that_is_no_chat_says_why(row, message):
    """A fault names the turn."""
    task = get_task("talk", TaskColumns(chat={}))
    with pytest.raises(ValueError, match=message):
        task.build({"messages": row})


def test_a_student_that_is_its_teacher_has_nothing_to_learn_of_its_chats(tmp_path, teacher_ref):
    """KL, hidden states and maps are 0 at every compared position, the first token of each reply among them."""
    (tmp_path / "chatml.jinja").write_text(THINKING)
    ref = teacher_ref.model_copy(update={"chat_template": tmp_path / "chatml.jinja"})
    examples = [settled(example(name), [load_tokenizer(ref)]) for name in ("one turn", "system", "several")]
    store = make_store(tmp_path / "store", ref, Examples(examples[:2], examples[2:], {}))
    setup = Setup(ref, store, changed(ALL, hidden={"weight": 0.0}))
    losses, _ = setup.step(examples)
    assert losses["kd_loss"] == pytest.approx(0, abs=1e-5)
    assert losses["attention_loss"] == pytest.approx(0, abs=1e-9)
    assert losses["task_loss"] > 1
    (item,) = setup.items(examples[2:])
    compared = setup.head.compared(item)
    assert set(compared[:, 1] + 1) == set(np.flatnonzero(item.encoding.learnt))
    assert {int(t) for t in item.positions + 1} - set(compared[:, 1] + 1) == set(np.flatnonzero(item.encoding.written))


PLAIN = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
BARE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"


@pytest.fixture
def small_pair(byte_level, sentencepiece):
    """The embedded tokenizers, of a teacher with ChatML and a student with a plain template."""
    teacher, student = copy.deepcopy(byte_level), copy.deepcopy(sentencepiece)
    teacher.chat_template, student.chat_template = THINKING, PLAIN
    return teacher, student


def aligned_chat(teacher, student, *contents):
    """A chat of these contents as both read it: the example, the student's encoding, the alignment, an item."""
    roles = itertools.cycle(("user", "assistant"))
    made = chat("c", [(role, text) for role, text in zip(roles, contents, strict=False)], [0, 1] * (len(contents) // 2))
    (theirs_,), (ours,) = encode_examples(teacher, [made]), encode_examples(student, [made], add_eos=True)
    alignment = align_encodings(theirs_, ours)
    return Prepared(made, ours, *supervised_predictions(ours, len(made.prompt)), alignment)


def test_a_chats_kinds_are_of_its_replies_and_add_up(small_pair):
    """A reply's first token is of the kind of its own text, in every learnt turn; each prediction is of one kind."""
    teacher, student = small_pair
    item = aligned_chat(teacher, student, "Add 2 and 3", "5, I think.", "12 is?", "12! Yes")
    head = NextTokenTerms(Objective(), np.arange(len(student)))
    whole = head.compared(item)
    kinds = kinds_of(item.example.text, item.encoding, item.example.turns)
    parts = {kind: part for kind in KINDS if (part := only(item, kind)) is not None}
    assert sum(len(head.compared(part)) for part in parts.values()) == len(whole)
    for kind, part in parts.items():
        assert {kinds[i + 1] for i in head.compared(part)[:, 1].tolist()} == {kind}
    assert len(head.compared(parts["digits"])) >= 3
    counted, covered = count_kinds([item]), coverage(item.encoding, item.alignment, len(item.example.prompt))
    for name in ("tokens", "aligned", "predictions", "aligned_predictions"):
        assert sum(counts[name] for counts in counted.values()) == covered[name], name


def test_a_reply_right_after_its_question_is_compared_once(small_pair):
    """With a template that writes nothing before a turn, the question's last token predicts the reply."""
    teacher, student = small_pair
    student.chat_template = BARE
    for template in (BARE, THINKING):
        teacher.chat_template = template
        item = aligned_chat(teacher, student, "Hello.", " Good day")
        (read,) = encode_examples(teacher, [item.example])
        found = NextTokenTerms(Objective(), np.arange(len(student))).compared(item).tolist()
        asked = [pair for pair in found if pair[1] == item.encoding.asks[0].position]
        assert asked == [[read.asks[0].position, item.encoding.asks[0].position]], "not where the template is predicted"


def test_another_template_is_another_teacher(small_pair):
    """What was fine-tuned or measured under the old template of the teacher is not taken for the new one's."""

    class Chats(Sources):
        tokenizers = small_pair
        fine_tuning_examples = Examples([], [], {})

    study = load_study("quickstart")
    with_chats = object.__new__(Chats)
    vars(with_chats)["study"] = SimpleNamespace(has_chats=True, teacher=study.teacher)
    before = with_chats.fine_tuning_fingerprint("base")
    measured = [Baseline(Path(), "teacher", "test", "x", "float32", [], study.evaluation, {}, t) for t in ([], ["a"])]
    assert measured[0].fingerprint != measured[1].fingerprint
    small_pair[1].chat_template = BARE
    assert with_chats.fine_tuning_fingerprint("base") == before, "the student's is not its"
    small_pair[0].chat_template = BARE
    assert with_chats.fine_tuning_fingerprint("base") != before
