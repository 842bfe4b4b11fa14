"""The teacher's whole distribution, remade of its stored hidden states and output head: equal to the dense one."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from setups import EVALUATION, TRAINING, Setup, changed, dense, reference_means
from small_things import make_store
from stillroom.afterwards.inspection import describe_example
from stillroom.config import Group, Objective
from stillroom.errors import UserError
from stillroom.models.hub import load_model
from stillroom.models.output_head import OutputHead
from stillroom.offline_teacher_data import archive, verify_saved_data
from stillroom.offline_teacher_data.recomputation import check_with_head, full_support_error, recompute
from stillroom.offline_teacher_data.store import HEAD, SignalStore
from stillroom.studies import load_study
from stillroom.terms import output_head
from stillroom.terms.divergences import DIVERGENCES
from stillroom.terms.full_support import FullSupport, HiddenOutcomes
from stillroom.terms.output_head import HeadTargets, head_losses
from stillroom.training.train_student import Trial, train

FULL = {"support": "full"}


@pytest.fixture(scope="module")
def headed(tmp_path_factory, teacher_ref, examples):
    """A store of the teacher's head, without one log-probability."""
    return make_store(tmp_path_factory.mktemp("headed") / "data", teacher_ref, examples, top_k=0, teacher_head=True)


@pytest.mark.parametrize("pair", ["different", "same"])
@pytest.mark.parametrize(
    ("name", "temperature"), [("forward_kl", 1.0), ("forward_kl", 2.0), ("reverse_kl", 1.0), ("total_variation", 1.0)]
)
def test_full_support_equals_the_reference_over_the_whole_vocabulary(
    pair, name, temperature, student_ref, same_tokenizer, teacher_ref, headed, some
):
    """The teacher's own logits, by loops in float64: every mapped student id, and all others as one outcome."""
    ref = student_ref if pair == "different" else same_tokenizer
    setup = Setup(ref, headed, changed(kd={**FULL, "divergence": name, "temperature": temperature}))
    assert setup.head.columns == ("hidden",)
    expected = reference_means(ref, teacher_ref, setup, some, top_k=400, name=name, temperature=temperature)
    assert setup.step(some)[0]["kd_loss"] == pytest.approx(expected["kd_loss"], rel=5e-5)


def test_one_tokenizer_gives_torchs_own_kl_of_the_teachers_logits(same_tokenizer, teacher_ref, headed, some):
    """The dense textbook loss, with no top-k bias; of a teacher with itself, 0."""
    values = []
    for example in some:
        t, s = dense(teacher_ref, example.text), dense(same_tokenizer, example.text, add_eos=True)
        at = [n - 1 for n in range(1, len(s["ids"])) if s["ends"][n] > len(example.prompt)][:-1]
        student, teacher = (torch.from_numpy(m["logits"][at]).double().log_softmax(-1) for m in (s, t))
        values += torch.nn.functional.kl_div(student, teacher, log_target=True, reduction="none").sum(-1).tolist()
    found = Setup(same_tokenizer, headed, changed(kd=FULL)).step(some)[0]
    assert found["kd_loss"] == pytest.approx(np.mean(values), rel=1e-5)
    alone = Setup(teacher_ref, headed, changed(kd=FULL)).step(some)[0]
    assert alone["kd_loss"] == pytest.approx(0.0, abs=1e-6)


def test_sixteen_bits_of_storage_differ_as_the_gate_says(tmp_path, same_tokenizer, teacher_ref, headed, examples, some):
    """What rounding hidden states costs is measured against the teacher's own logits, and the loss is within it."""
    half = make_store(tmp_path / "half", teacher_ref, examples, top_k=32, dtype="float16", teacher_head=True)
    model, ids = load_model(teacher_ref), list(half.index)[:6]
    rounded, exact = (full_support_error(store, model, ids) for store in (half, headed))
    assert 0 <= exact["mean"] < 1e-9 < rounded["mean"] < 1e-5
    assert rounded["mean"] <= rounded["largest"]
    assert check_with_head(half, half.teacher_head, ids, torch.float32)["topk"] < 1e-3
    assert recompute(headed, model, ids)["topk"] < 1e-5
    losses = [Setup(same_tokenizer, store, changed(kd=FULL)).step(some)[0]["kd_loss"] for store in (half, headed)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1.5)
    with pytest.raises(UserError, match=r"stored full support differs from the teacher's"):
        full_support_error(half, model, ids)


@pytest.mark.parametrize("name", [*DIVERGENCES])
@pytest.mark.parametrize(("softcap", "in_pieces"), [(None, False), (5.0, True)])
def test_the_gradient_of_full_support_is_autograds(name, softcap, in_pieces, monkeypatch):
    """Against dense logits in float64; student ids that two teacher's share, that none maps to, and that are whole."""
    if in_pieces:
        monkeypatch.setattr(output_head, "_BLOCK_BYTES", 3 * 4 * 30)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    for mapped in (np.arange(30), rng.integers(-1, 25, 40)):
        teacher = OutputHead(torch.randn(len(mapped), 5), torch.randn(len(mapped)), 0.5, 8.0)
        support = FullSupport(teacher, mapped, 30)
        assert support.is_whole == (len(mapped) == 30)
        outcomes = HiddenOutcomes(torch.tensor([0, 2, 3, 6]), torch.randn(4, 5))
        targets = torch.tensor([3, -1, 7, 2, -1, -1, 9])
        hidden, weight = torch.randn(7, 6, requires_grad=True), torch.randn(30, 6, requires_grad=True)
        settings = HeadTargets(targets, outcomes, 0.3, 0.7, 2.0, softcap, name, 0.3, support)
        total, task, kd = head_losses(hidden, weight, None, settings, chunk=4)
        total.backward()
        plain = [leaf.detach().double().requires_grad_() for leaf in (hidden, weight)]
        logits = plain[0] @ plain[1].T
        logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
        expected_task = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
        expected_kd = torch.zeros((), dtype=torch.float64)
        raw = outcomes.hidden.double() @ teacher.weight.double().T * 0.5 + teacher.bias.double()
        for row, probabilities in zip(outcomes.rows.tolist(), (8 * torch.tanh(raw / 8)).softmax(-1), strict=True):
            q = logits[row].softmax(-1)
            ids = sorted({i for i in mapped.tolist() if i >= 0})
            p_all = [probabilities[[t for t, m in enumerate(mapped) if m == i]].sum() for i in ids]
            q_all = [q[i] for i in ids]
            if len(ids) < 30:
                p_all.append(probabilities[[t for t, m in enumerate(mapped) if m < 0]].sum())
                q_all.append(q[[i for i in range(30) if i not in ids]].sum())
            p, s = torch.stack(p_all) ** 0.5, torch.stack(q_all) ** 0.5
            expected_kd = expected_kd + 4 * DIVERGENCES[name](p / p.sum(), (s / s.sum()).log(), 0.3).sum()
        (0.3 * expected_task + 0.7 * expected_kd).backward()
        assert float(task) == pytest.approx(float(expected_task), rel=1e-5)
        assert float(kd) == pytest.approx(float(expected_kd), rel=1e-4)
        for found, expected in zip((hidden, weight), plain, strict=True):
            assert torch.allclose(found.grad.double(), expected.grad, rtol=2e-4, atol=5e-6)


def test_no_more_rows_than_a_block_are_ever_remade(student_ref, headed, some, monkeypatch):
    """Never tokens × vocabulary; and neither blocks, micro-batches nor order change a number."""
    setup = Setup(student_ref, headed, changed(kd={**FULL, "positions": "all"}))
    whole, gradient = setup.step(some)
    seen = []
    real = FullSupport.probs
    monkeypatch.setattr(FullSupport, "probs", lambda self, hidden: seen.append(len(hidden)) or real(self, hidden))
    monkeypatch.setattr(output_head, "_BLOCK_BYTES", 4 * 4 * len(setup.tokenizer))
    for way in ((some, None), (some, [0, 1, 4, 6]), (some[::-1], None)):
        losses, moved = setup.step(*way)
        assert losses["kd_loss"] == pytest.approx(whole["kd_loss"], rel=1e-5)
        assert all(torch.allclose(moved[name], g, rtol=1e-3, atol=1e-6) for name, g in gradient.items())
    assert max(seen) <= 4


def test_the_head_is_kept_verified_and_archived(tmp_path, teacher_ref, examples, headed, store):
    """Its digest is in the manifest; a changed byte is refused, and so is a store without it; others are unmoved."""
    made = make_store(tmp_path / "data", teacher_ref, examples, top_k=0, teacher_head=True)
    assert not [column for column in made.columns if "topk" in column or "tail" in column]
    snapshot = SignalStore.open(archive(made.path))
    assert torch.equal(snapshot.teacher_head.weight, load_model(teacher_ref).get_output_embeddings().weight)
    path = made.path / HEAD
    path.chmod(0o644)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"teacher_head.safetensors: its bytes are not those that were written"):
        verify_saved_data(made.path)
    path.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"teacher_head.safetensors is missing or truncated"):
        verify_saved_data(made.path)
    assert "teacher_head" not in store.manifest["made_from"]
    with pytest.raises(UserError, match=r"not in this store; set signals.teacher_head"):
        _ = store.teacher_head


def test_a_trial_and_an_inspection_of_a_store_without_a_top_k(tmp_path, student_ref, teacher_ref, headed, examples):
    """From the group's settings to its losses; an example is shown with what its hidden states predict."""
    few = examples.__class__(examples.train[:16], examples.validation[:3], examples.counts)
    group = Group(name="dense", terms=("task", "kd"), kd={"support": "full"})
    training = TRAINING.model_copy(update={"epochs": 1})
    result = train(Trial("t", group, 0), student_ref, training, Objective(), EVALUATION, few, headed.path, tmp_path)
    assert result["gradient_shares"]["kd"] > 0
    example = examples.all[0]
    facts = describe_example(headed, example.example_id, example, student_ref)
    logits = torch.from_numpy(dense(teacher_ref, example.text)["logits"]).softmax(-1)
    for row, token in zip(logits, facts["teacher"], strict=True):
        assert token["predictions"][0]["probability"] == pytest.approx(float(row.max()), rel=1e-3)
        assert 0 <= token["other"] <= 1


def test_what_has_no_distribution_to_compare_is_refused():
    """By the field, before the teacher runs."""
    none = ["analysis.primary=[]", "analysis.secondary=[]"]
    for given, message in (
        (["signals.top_k=0"], "signals.top_k: .*0 keeps nothing of the next-token distribution"),
        (["objective.kd.support=full"], r"group 'black_box' has kd.support full: set signals.teacher_head: true"),
        (["signals.top_k=0", "signals.teacher_head=true"], r"group 'black_box' compares the top k, but signals.top_k"),
    ):
        with pytest.raises(UserError, match=message):
            load_study("quickstart", [*none, *given])
    everything = ["signals.top_k=0", "signals.teacher_head=true", "objective.kd.support=full"]
    load_study("quickstart", [*none, *everything])
    assert "support" not in Objective().model_dump()["kd"]
