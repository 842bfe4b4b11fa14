"""What a round of faults made on purpose asked for: most had passed their module's own tests."""

from __future__ import annotations

import math
import os
import shutil
from collections import defaultdict
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import stats

import reference
from conftest import STUDENT_SHAPE, make_store, texts, write_model
from setups import ALL, EVALUATION, Setup, changed, dense, reference_means, run
from stillroom.analysis.frame import SUMMARY, write_summary
from stillroom.analysis.results import StudyResults
from stillroom.analysis.statistics import Comparison, bootstrap_interval, sign_flip_p
from stillroom.analysis.verdicts import _verdict
from stillroom.config import EXPERIMENT, GROUPS, ModelRef, Training
from stillroom.credentials import redact
from stillroom.data.corpus import build_corpus, load_corpus, save_corpus
from stillroom.data.encoding import encode
from stillroom.data.tasks import Example
from stillroom.data.vocabulary import map_vocabulary
from stillroom.errors import UserError
from stillroom.evaluation.baselines import Baseline
from stillroom.evaluation.generation import generate
from stillroom.evaluation.scoring import _prediction, evaluate
from stillroom.files import read_json, write_json
from stillroom.models.builtin_pair import sentencepiece_tokenizer
from stillroom.models.hub import load_model, load_tokenizer
from stillroom.models.sizes import shape_of
from stillroom.offline_teacher_data import require_matching, require_verified
from stillroom.offline_teacher_data.recomputation import recompute
from stillroom.offline_teacher_data.shards import token_batches
from stillroom.offline_teacher_data.store import SignalStore
from stillroom.preflight.planning import plan_study
from stillroom.studies import load_study
from stillroom.terms.next_token import map_outcomes, teacher_to_student_ids
from stillroom.training.batches import epoch_order
from stillroom.training.checkpoints import TrainingState, best_epoch
from stillroom.training.step import accumulate, losses_of
from synthetic import write_results
from test_corpus import ROWS, local
from test_offline_teacher_data import damaged, set_values
from test_verdicts import ANALYSIS, NOTHING, SEEDS, answer_questions, frame, verdicts


@pytest.fixture
def tokenizers(teacher_ref, student_ref):
    """The test pair's."""
    return [load_tokenizer(teacher_ref), load_tokenizer(student_ref)]


@pytest.fixture(scope="module")
def some(examples):
    """Two of each built-in task."""
    return [examples.train[n] for n in (0, 1, 20, 21, 40, 41)]


def test_a_byte_maps_to_the_byte_and_a_letter_to_the_letter(sentencepiece):
    """Where the student has two ids for the same bytes, the one spelt as the teacher's is taken."""
    other, own = sentencepiece_tokenizer(texts(), 410), sentencepiece.get_vocab()
    assert other.get_vocab() != own
    mapped = map_vocabulary(other, sentencepiece)
    for token in ("<0x61>", "a"):
        assert mapped[other.get_vocab()[token]] == own[token]


def test_entries_of_a_head_beyond_its_tokenizer_map_only_where_both_have_them(byte_level, sentencepiece):
    """Heads are padded to round sizes, each to its own: with one tokenizer entries mean the same, else nothing."""
    size = len(byte_level)
    found = teacher_to_student_ids(byte_level, byte_level, size + 10, size + 4)
    assert found.tolist() == [*range(size + 4), *[-1] * 6]
    assert (teacher_to_student_ids(byte_level, sentencepiece, size + 10, 1000)[size:] == -1).all()
    assert teacher_to_student_ids(byte_level, sentencepiece, size, 300).max() < 300


def test_rounded_probabilities_over_one_are_divided_by_their_sum():
    """A float16 store's top-k can sum to a little more than 1: the rounding is nobody's probability."""
    logprobs = np.log([[0.7, 0.3005]]).astype(np.float16)
    assert np.exp(logprobs.astype(np.float64)).sum() > 1
    _, _, probs, ghost = map_outcomes(np.array([[0, 1]]), logprobs, np.array([-np.inf]), np.arange(2))
    assert ghost.tolist() == [0.0]
    assert probs.sum() == pytest.approx(1)


def test_positions_without_a_mapped_entry_count_with_a_kl_of_nought(student_ref, teacher_ref, store, some):
    """All of the teacher's probability is the ghost there: nothing to learn, but a position like any other."""
    setup = Setup(student_ref, store)
    setup.map[np.arange(len(setup.map)) % 50 != 1] = -1
    batch = setup.collate(setup.items(some))
    assert 0 < len(batch.head.outcomes.rows) < batch.counts["kd"]
    found = setup.step(some)[0]["kd_loss"]
    assert found == pytest.approx(reference_means(student_ref, teacher_ref, setup, some)["kd_loss"], rel=2e-5)


def test_kd_over_the_whole_text_equals_the_reference(student_ref, teacher_ref, store, some):
    """`kd.positions: all` takes the prompt's aligned tokens too."""
    setup = Setup(student_ref, store, changed(kd={"positions": "all"}))
    terms = []
    for example in some:
        teacher, student = dense(teacher_ref, example.text), dense(student_ref, example.text, add_eos=True)
        terms += reference.kd_terms(teacher, student, 0, setup.map, 32)
    assert setup.step(some)[0]["kd_loss"] == pytest.approx(np.mean(terms), rel=2e-5)


def test_batches_of_an_epoch_do_not_come_by_length():
    """Sorting by length saves padding within a batch; between batches it would be a curriculum."""
    lengths = [(n * 37) % 200 for n in range(1003)]
    longest = [max(lengths[i] for i in batch) for batch in epoch_order(lengths, 8, 1000, seed=3, epoch=1)]
    assert longest != sorted(longest)


def test_a_teachers_batch_stays_within_its_budget(byte_level):
    """Padding included; a single example that exceeds it runs alone."""
    encodings = sorted((encode(byte_level, text) for text in texts(20)), key=len, reverse=True)
    rows, budget = range(len(encodings)), 3 * len(encodings[len(encodings) // 2])
    batches = list(token_batches(rows, encodings, budget))
    assert [i for batch in batches for i in batch] == list(rows)
    assert all(len(batch) * len(encodings[batch[0]]) <= budget for batch in batches if len(batch) > 1)
    assert max(map(len, batches)) > 1


@pytest.mark.parametrize("scaled", [False, True])
def test_the_gradient_is_clipped_at_its_own_norm(student_ref, store, some, scaled):
    """With the loss scaled for float16 too: what moves the weights has the norm that was asked for."""
    setup = Setup(student_ref, store)
    setup.runner.scaler = torch.amp.GradScaler("cpu", enabled=scaled)
    setup.runner.training = Training(precision="float32", max_gradient_norm=0.25)
    before = [p.detach().clone() for p in setup.student.parameters()]
    batch = setup.collate(setup.items(some))
    _, _, finite = setup.runner.update([batch], torch.optim.SGD(setup.student.parameters(), lr=1.0))
    moved = [a - b for a, b in zip(setup.student.parameters(), before, strict=True)]
    assert finite
    assert float(torch.nn.utils.get_total_norm(moved)) == pytest.approx(0.25, rel=1e-4)


def test_a_measured_gradient_is_that_of_the_model_alone(student_ref, store, some):
    """The projector is thrown away after training: its own gradient is no part of the hidden term's share."""
    setup = Setup(student_ref, store)
    measured = setup.runner.measure([setup.collate(setup.items(some))])
    alone = changed(task={"weight": 0.0}, kd={"weight": 0.0}, attention={"weight": 0.0})
    gradient = Setup(student_ref, store, alone).step(some)[1]
    own = [g for name, g in gradient.items() if not name.startswith("trained")]
    assert measured["norms"]["hidden"] == pytest.approx(float(torch.nn.utils.get_total_norm(own)), rel=1e-4)


def test_the_rate_warms_up_linearly_and_stays():
    """The first step moves, the last step of the warm-up has the whole rate."""
    from stillroom.training.train_student import _set_rate

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=9.0)

    def rates(warmup):
        for step in range(6):
            _set_rate(optimizer, Training(learning_rate=0.5, warmup_steps=warmup), step)
            yield optimizer.param_groups[0]["lr"]

    assert list(rates(4)) == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5, 0.5])
    assert list(rates(0)) == [0.5] * 6


def test_the_optimizer_is_the_studys(tmp_path, student_ref, store, examples, monkeypatch):
    """AdamW at the study's rate and decay, over every weight of the student and its projector."""
    import stillroom.training.train_student as ts

    class Stop(Exception):
        pass

    def look(self, micro, optimizer):
        (group,) = optimizer.param_groups
        assert type(optimizer) is torch.optim.AdamW
        assert (group["lr"], group["weight_decay"]) == (3e-3, 0.25)
        assert {id(p) for p in group["params"]} == {id(p) for p in self.student.parameters()}
        raise Stop

    monkeypatch.setattr(ts.StepRunner, "update", look)
    with pytest.raises(Stop):
        run(tmp_path, student_ref, store, examples, weight_decay=0.25, gradient_interval=0)


def test_dropout_is_new_at_each_step_and_measuring_does_not_move_it(
    tmp_path, sentencepiece, store, examples, monkeypatch
):
    """A function of seed and step: however often the gradient is measured, the weights end the same."""
    import stillroom.training.train_student as ts

    ref = write_model(tmp_path / "student", sentencepiece, {**STUDENT_SHAPE, "attention_dropout": 0.3}, 3)
    states, real = [], ts.StepRunner.update

    def look(self, micro, optimizer):
        states.append(bytes(torch.random.get_rng_state().tolist()))
        return real(self, micro, optimizer)

    monkeypatch.setattr(ts.StepRunner, "update", look)
    few = replace(examples, train=examples.train[::3], validation=examples.validation[:1])
    found = [run(tmp_path / str(n), ref, store, few, gradient_interval=n)["train_task_loss"] for n in (0, 1)]
    half = len(states) // 2
    assert states[:half] == states[half:]
    assert len(set(states)) == half
    assert found[0] == found[1]


def test_a_half_precision_trial_scores_what_it_saves(tmp_path, student_ref, store, examples):
    """Weights rounded as the checkpoint's, in the evaluation's dtype: its predictions are those of the saved model."""
    few = replace(examples, train=examples.train[::3], validation=examples.validation[:3])
    official = [example for example in examples.train if example.choices][:6]
    run(tmp_path, student_ref, store, few, "task_only", precision="bfloat16", official=official)
    saved = load_model(ModelRef(model=str(tmp_path / "checkpoint_2")), EVALUATION.dtype)
    for name, own in (("predictions", few.validation), ("predictions_official", official)):
        kept = pd.read_parquet(tmp_path / f"{name}.parquet")
        pd.testing.assert_frame_equal(evaluate(saved, load_tokenizer(student_ref), own, EVALUATION), kept)


def test_the_best_epoch_is_the_earliest_of_the_highest():
    """As the study's documentation says."""
    rows = [{"epoch": n, "validation_accuracy": value} for n, value in enumerate((0.4, 0.5, 0.5, 0.3), 1)]
    assert best_epoch(rows) == 2


def test_skipped_steps_stop_a_trial_only_in_a_row():
    """A float16 trial skips one now and then; that is no divergence."""
    state = TrainingState()
    for finite in (False, True) * 5:
        state.count_step(finite, [], limit=1)
    assert (state.skipped, state.consecutive) == (5, 0)
    state.count_step(False, [], limit=1)
    with pytest.raises(UserError, match="2 steps in a row"):
        state.count_step(False, [], limit=1)


def test_a_stores_tokenizer_that_is_not_its_own_is_refused(tmp_path, student_ref, store, examples):
    """The map of vocabularies is made from it: another one would give each id another meaning."""
    copy = shutil.copytree(store.path, tmp_path / "data")
    shutil.rmtree(copy / "tokenizer")
    load_tokenizer(student_ref).save_pretrained(copy / "tokenizer")
    from stillroom.offline_teacher_data.store import SignalStore

    with pytest.raises(UserError, match="is not the tokenizer the store was made with"):
        run(tmp_path / "trial", student_ref, SignalStore.open(copy), examples)


def test_a_student_whose_attention_is_captured_wrongly_is_not_trained(
    tmp_path, student_ref, store, examples, monkeypatch
):
    """Checked on a real text before the first step."""

    def refuse(*arguments):
        raise UserError("captured wrongly")

    monkeypatch.setattr("stillroom.training.train_student.check_capture", refuse)
    with pytest.raises(UserError, match="captured wrongly"):
        run(tmp_path, student_ref, store, examples, "attention")


def test_ties_are_counted_whatever_the_rounding():
    """Tenths are no binary fractions: sums that are equal on paper must not fall on either side of the observed one."""
    rng = np.random.default_rng(5)
    for _ in range(200):
        points = rng.integers(-9, 10, 7)
        assert sign_flip_p(points / 30) == sign_flip_p(points.astype(float))


@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_the_bootstrap_draws_seeds_and_examples(alpha):
    """Where one alone varies, the interval is the normal one over it."""
    seeds, examples = 150, 400
    right = np.arange(examples) % 2 == 0
    z = stats.norm.ppf(1 - alpha / 2)
    for first, count in (
        (np.tile(right[:examples], (seeds, 1)), examples),
        (np.tile(right[:seeds, None], (1, examples)), seeds),
    ):
        low, high = bootstrap_interval(first, np.zeros_like(first), np.random.default_rng(0), alpha=alpha)
        half = z * math.sqrt(0.25 / count)
        assert (low + high) / 2 == pytest.approx(0.5, abs=0.2 * half)
        assert (high - low) / 2 == pytest.approx(half, rel=0.1)


@pytest.mark.parametrize(
    ("adjusted", "equivalence", "expected"),
    [
        (0.04, 0.9, "improves"),
        (0.04, 0.001, "improves"),  # small but shown: it comes before equivalence
        (0.06, 0.04, "equivalent"),
        (0.06, 0.06, "no evidence of a difference"),
        (0.06, float("nan"), "no evidence of a difference"),
        (float("nan"), 0.001, "undecided"),
    ],
)
def test_verdicts_turn_at_alpha(adjusted, equivalence, expected):
    """On the adjusted p first, whatever the raw one; then on that of TOST, at the same level."""
    row = Comparison("a", "b", "all", 7, 0.01, 0.0, 0.02, 0.02, adjusted, 1.0, 1.27, 2 / 2**7)
    assert _verdict(row, 3, equivalence, ANALYSIS) == expected
    if expected == "improves":
        assert _verdict(replace(row, difference=-0.01), 3, equivalence, ANALYSIS) == "worse"


def test_a_hypothesis_is_supported_by_all_its_contrasts_or_not_at_all():
    """One hard contrast without a verdict leaves it undecided, however the others are."""
    analysis = ANALYSIS.model_copy(update={"equivalence_margin": 0.0025})
    answers = answer_questions(frame({**NOTHING, "hidden": (0, 0.1), "combined": (0, 0.1)}), analysis, SEEDS)
    found = verdicts(answers, 4)
    assert {found[group, "easy"] for group in ("hidden", "attention", "combined")} == {"equivalent"}
    assert {found[group, "hard"] for group in ("hidden", "combined")} == {"improves"}
    assert found["attention", "hard"] == "no evidence of a difference"
    assert answers[4].answer.startswith("Undecided")


def test_a_failed_trial_is_told_from_one_that_never_ran(tmp_path):
    """`status` in the summary: a trial with an error message failed, one without any file is missing."""
    write_results(tmp_path, seeds=(0, 1), drop=[("hidden", 1), ("combined", 0)])
    shutil.rmtree(next((tmp_path / EXPERIMENT).glob("*_combined_seed_0")))
    write_summary(tmp_path)
    table = pd.read_csv(tmp_path / SUMMARY).set_index(["config/distill_type", "config/seed"])["status"]
    assert (table["hidden", 1], table["combined", 0]) == ("failed", "missing")
    assert (table == "finished").sum() == 8


def test_a_choice_is_the_likelier_text_whatever_its_length():
    """The harness's `acc`, not its `acc_norm`; kept beside it: the gold answer's own likelihood, right or wrong."""
    example = Example("sst2", "A film.\nAnswer:", " rather a long one", (" bad", " rather a long one"), 1)
    found = _prediction(example, [-5.0, -9.0], 4, None)
    assert (found["prediction"], found["gold"], found["correct"]) == ("bad", "rather a long one", False)
    assert (found["scores"], found["answer_nll"], found["answer_tokens"]) == ([-5.0, -9.0], 9.0, 4)
    assert _prediction(example, [-9.0, -8.0], 4, None)["correct"]


def test_a_baseline_is_kept_only_for_the_very_same_measurement(tmp_path, model, tokenizer, examples):
    """Model, dtype, settings, examples: with one of them changed, it is not known."""
    own = [e for e in examples.validation if e.choices]
    first = Baseline(tmp_path, "student", "validation", "m", "float32", own[:2], EVALUATION)
    assert first.read() is None
    assert first.measure(model, tokenizer) == first.read()
    other = EVALUATION.model_copy(update={"max_new_tokens": 13})
    for other_way in ({"identity": "n"}, {"settings": other}, {"precision": "bfloat16"}, {"examples": own[:3]}):
        assert replace(first, **other_way).read() is None, other_way
    shutil.copy(first.path, tmp_path / "student_official.json")
    assert replace(first, part="official").read() is None


def test_a_trials_cost_has_its_official_evaluation_in_it(results, tmp_path):
    """Hours that were spent are not left out of the report's table of costs."""
    copy = shutil.copytree(results, tmp_path / "copy")
    path = next((copy / EXPERIMENT).glob("*_hidden_seed_1")) / "result.json"
    write_json(path, {**read_json(path), "official_evaluation_seconds": 1000.0})
    before, after = (
        StudyResults.read(folder).costs.set_index("trial")["evaluation_seconds"] for folder in (results, copy)
    )
    assert (after - before)[lambda difference: difference != 0].to_dict() == {path.parent.name: 1000.0}


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """A made-up study's results."""
    folder = tmp_path_factory.mktemp("whole") / "results"
    write_results(folder, seeds=range(2))
    return folder


def test_the_longest_secret_is_hidden_first():
    """One that begins with another must not leave its end behind."""
    environ = {"A_TOKEN": "abcdefgh", "B_PASSWORD": "abcdefgh-and-more", "lower_secret": "zyxwvuts"}
    assert redact("abcdefgh-and-more abcdefgh zyxwvuts", environ) == "*** *** ***"


def test_the_teachers_mean_square_leaves_its_bos_out(tmp_path, student_ref, examples):
    """BOS has a hidden state of another size, and none is compared there; this teacher has one."""
    store = make_store(tmp_path / "s", student_ref, examples)
    assert all(example.encoding.special.any() for example in store)
    stored = np.concatenate([e["hidden"][~e.encoding.special].ravel() for e in store]).astype(np.float64)
    assert store.hidden_mean_square == pytest.approx(np.mean(stored**2), rel=1e-6)


def test_what_a_model_writes_after_the_next_question_does_not_count(model, tokenizer, monkeypatch):
    """Its continuation ends where another question begins, as the harness's does."""

    def write(ids, **_):
        text = tokenizer(" 3+4 = 7\n#### 7\nQuestion: 8", add_special_tokens=False, return_tensors="pt")["input_ids"]
        return torch.cat([ids, text.expand(len(ids), -1)], 1)

    monkeypatch.setattr(model, "generate", write)
    (text,) = generate(model, tokenizer, ["Question: 3+4?\nAnswer:"], EVALUATION)
    assert "#### 7" in text
    assert "Question" not in text
    assert "8" not in text


def test_a_text_that_fits_only_without_its_eos_is_too_long(tmp_path, tokenizers):
    """What is counted is what is trained on."""
    built = build_corpus(local(tmp_path, ROWS, 40), tokenizers)
    longest = max(len(encode(t, example.text, add_eos=True)) for t in tokenizers for example in built.all)
    assert build_corpus(local(tmp_path, ROWS, 40, max_length=longest), tokenizers).counts["sst2"]["too_long"] == 0
    with pytest.raises(UserError, match="'too_long'"):
        build_corpus(local(tmp_path, ROWS, 40, max_length=longest - 1), tokenizers)


def test_another_sample_seed_draws_other_examples(tmp_path, tokenizers):
    """Which of the rows there are is the seed's choice, and no one else's."""
    ids = [
        {e.example_id for e in build_corpus(local(tmp_path, ROWS, 10, sample_seed=seed), tokenizers).all}
        for seed in (0, 0, 1)
    ]
    assert ids[0] == ids[1] != ids[2]


def test_a_corpus_with_a_leak_is_not_built(tmp_path, tokenizers, monkeypatch):
    """The check is made of what was built, whatever the split did."""
    monkeypatch.setattr("stillroom.data.corpus.split", lambda chosen, share, seed: (chosen, chosen[:1]))
    with pytest.raises(UserError, match="is in training and held-out data"):
        build_corpus(local(tmp_path, ROWS, 10), tokenizers)


def test_a_damaged_corpus_is_refused(tmp_path, examples):
    """No flipped bit gives other examples: a prompt may not change between two trials."""
    save_corpus(examples, tmp_path, "f")
    path, read = tmp_path / "corpus.parquet", []
    whole = path.read_bytes()
    for place in range(10, len(whole) - 10, len(whole) // 150):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        try:
            read.append(load_corpus(tmp_path)[0])
        except UserError as error:
            assert "cannot be read" in str(error)  # noqa: PT017 - a flipped bit may also change nothing
    assert all(found.all == examples.all for found in read)
    assert len(read) < 75


@pytest.fixture
def copy(tmp_path, store):
    """The store, to be spoilt."""
    return shutil.copytree(store.path, tmp_path / "data")


def test_a_shard_truncated_after_the_gate_is_missed_before_training(copy):
    """Sizes are looked at again where the record of the gate is: that costs nothing."""
    shard = copy / "part-00002.parquet"
    shard.write_bytes(shard.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"part-00002.parquet is missing or truncated"):
        require_verified(SignalStore.open(copy))


def test_a_field_that_one_side_has_not_is_a_difference(store):
    """A store made before a setting existed was not made with it; nor one that has a setting nobody asks for."""
    origin = store.manifest["made_from"]
    with pytest.raises(UserError, match="shift: store has None, study asks for 1"):
        require_matching(store, {**origin, "shift": 1})
    with pytest.raises(UserError, match="top_k: store has 32, study asks for None"):
        require_matching(store, {k: v for k, v in origin.items() if k != "top_k"})


@pytest.mark.parametrize(
    ("column", "signal", "change"),
    [
        ("hidden", "hidden", lambda a: a.__imul__(1.1)),
        ("attention", "attention", lambda a: a.__imul__(0.9)),
        ("topk_logprobs", "topk", lambda a: a[:32].__isub__(2.0)),  # the first token alone
    ],
)
def test_recomputation_looks_at_every_signal_and_every_token(copy, teacher_ref, column, signal, change):
    """One token's wrong distribution is not averaged away, and no signal stands for the others."""
    damaged(copy, set_values(column, "float32", change))
    store = SignalStore.open(copy)
    with pytest.raises(UserError, match=rf"part-00000.parquet: .* stored {signal} differs"):
        recompute(store, load_model(teacher_ref), store.manifest["shards"][0]["examples"][:3])


def test_a_name_comes_after_its_content_is_on_the_disk(tmp_path, monkeypatch):
    """A power cut must not leave a whole-looking file of zeros under the name."""
    path, seen = tmp_path / "result.json", []
    real = os.fsync
    monkeypatch.setattr("os.fsync", lambda handle: (seen.append(path.exists()), real(handle)))
    write_json(path, {"a": 1})
    assert seen == [False]


def test_steps_and_bytes_of_the_paper_follow_from_its_counts():
    """By hand: 8 examples a step, the last step's fewer; 32 heads of the triangle's cells."""
    plan = plan_study(load_study("paper", ["training.batch_size=11", "signals.attention_dtype=null"]))
    train = plan["training"]["train_examples"]
    assert train == 6300
    assert plan["training"]["steps_per_trial"] == 3 * 573
    cells = 5000 * 465.0 + 1000 * 13074.0 + 1000 * 22384.0
    assert plan["store_bytes"]["attention"] == pytest.approx(cells * 32 * 2)


def test_parameters_of_published_models_are_the_published_counts():
    """Tied embeddings count once: 134.5 million of SmolLM2, 494 of Qwen2.5's 0.5 billion; 1.1 and 7.24 billion."""
    counts = {
        "HuggingFaceTB/SmolLM2-135M-Instruct": 134_515_008,
        "Qwen/Qwen2.5-Coder-0.5B-Instruct": 494_032_768,
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0": 1_100_048_384,
        "mistralai/Mistral-7B-v0.1": 7_241_732_096,
    }
    for name, count in counts.items():
        assert shape_of(ModelRef(model=name), []).parameters == pytest.approx(count, rel=1e-3), name


def test_losses_of_an_epoch_are_means_over_its_positions_not_its_batches():
    """A short batch weighs by what is in it."""
    totals = defaultdict(float)
    accumulate(totals, {"task": torch.tensor(6.0), "kd": torch.tensor(4.0)}, {"task": 3, "kd": 2})
    accumulate(totals, {"task": torch.tensor(4.0), "kd": torch.tensor(0.0)}, {"task": 1})
    found = losses_of(totals, GROUPS["black_box"].objective(ALL))
    assert found == {"task_loss": 2.5, "kd_loss": 2.0, "loss": 2.5 + 0.5 * 2.0}
