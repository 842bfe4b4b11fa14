"""Each term against the float64 reference, and everything it must not depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import reference
from setups import ALL, Setup, changed, dense, reference_means
from small_things import STUDENT_SHAPE, make_store, write_model
from stillroom.signals.next_token import top_k
from stillroom.terms.divergences import DIVERGENCES, steepest
from stillroom.terms.next_token import map_outcomes, teacher_to_student_ids
from stillroom.terms.output_head import HeadTargets, Outcomes, head_losses


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_every_term_equals_the_reference(student_ref, teacher_ref, store, some, temperature):
    """Each number is what SPEC says, for two tokenizers, widths and head counts."""
    setup = Setup(student_ref, store, changed(kd={"temperature": temperature}))
    found, _ = setup.step(some)
    expected = reference_means(student_ref, teacher_ref, setup, some, temperature=temperature)
    for name in ("task_loss", "kd_loss", "hidden_loss", "attention_loss"):
        assert found[name] == pytest.approx(expected[name], rel=2e-5), name
    total = sum(weight * expected[f"{n}_loss"] for n, weight in ALL.weights.items() if weight)
    assert found["loss"] == pytest.approx(total, rel=2e-5)


def test_scales_are_what_they_say(student_ref, teacher_ref, store, some):
    """`teacher_rms` divides by the teacher's mean square, `row_sum` leaves the mean over columns out."""
    setup = Setup(
        student_ref,
        store,
        changed(hidden={"scale": "teacher_rms"}, attention={"scale": "row_sum"}),
    )
    found, _ = setup.step(some)
    expected = reference_means(student_ref, teacher_ref, setup, some)
    stored = np.concatenate([e["hidden"][~e.encoding.special].ravel() for e in store]).astype(np.float64)
    assert store.hidden_mean_square == pytest.approx(np.mean(stored**2), rel=1e-6)
    assert found["hidden_loss"] == pytest.approx(expected["hidden_loss"] / np.mean(stored**2), rel=2e-5)
    assert found["attention_loss"] == pytest.approx(expected["attention_by_row"], rel=2e-5)


def test_paired_heads_equal_the_reference(tmp_path, sentencepiece, teacher_ref, store, some):
    """A student with as many heads as the teacher is compared head by head."""
    ref = write_model(
        tmp_path,
        sentencepiece,
        {**STUDENT_SHAPE, "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3},
        8,
    )
    setup = Setup(ref, store)
    assert setup.terms[1]._pair_heads
    found, _ = setup.step(some)
    assert found["attention_loss"] == pytest.approx(
        reference_means(ref, teacher_ref, setup, some)["attention_loss"], rel=2e-5
    )


def test_teacher_as_its_own_student_gives_the_textbook_losses(tmp_path, teacher_ref, examples, some):
    """Equal tokenizers, k = V, projector the identity: every distillation term is 0."""
    store = make_store(tmp_path / "s", teacher_ref, examples, top_k=400)
    setup = Setup(teacher_ref, store)
    with torch.no_grad():
        setup.student.trained["hidden"].weight.copy_(torch.eye(48))
        setup.student.trained["hidden"].bias.zero_()
    assert (setup.map == np.arange(len(setup.map))).all()
    found, _ = setup.step(some)
    assert found["kd_loss"] == pytest.approx(0.0, abs=1e-6)
    assert found["hidden_loss"] == pytest.approx(0.0, abs=1e-10)
    assert found["attention_loss"] == pytest.approx(0.0, abs=1e-12)


def test_one_tokenizer_and_k_equal_v_is_the_dense_textbook_kl(tmp_path, byte_level, teacher_ref, examples, some):
    """With one tokenizer the general code is torch's own cross_entropy, kl_div and mse_loss."""
    ref = write_model(
        tmp_path / "m",
        byte_level,
        {**STUDENT_SHAPE, "hidden_size": 36, "num_attention_heads": 6, "num_key_value_heads": 3},
        9,
    )
    store = make_store(tmp_path / "s", teacher_ref, examples, top_k=400)
    setup = Setup(ref, store)
    found, _ = setup.step(some)
    task, kd, attention = [], [], []
    for example in some:
        t, s = dense(teacher_ref, example.text), dense(ref, example.text, add_eos=True)
        supervised = [n for n in range(1, len(s["ids"])) if s["ends"][n] > len(example.prompt)]
        logits = torch.from_numpy(s["logits"][[n - 1 for n in supervised]])
        task += torch.nn.functional.cross_entropy(
            logits, torch.from_numpy(s["ids"][supervised]).long(), reduction="none"
        ).tolist()
        student, teacher = (
            logits[:-1].log_softmax(-1),
            torch.from_numpy(t["logits"][[n - 1 for n in supervised[:-1]]]).log_softmax(-1),
        )
        kd += torch.nn.functional.kl_div(student, teacher, log_target=True, reduction="none").sum(-1).tolist()
        size = len(t["ids"])
        lower = np.tril_indices(size)
        difference = t["attention"] - s["attention"][:, :size, :size]
        attention += (difference[:, lower[0], lower[1]] ** 2).ravel().tolist()
    assert found["task_loss"] == pytest.approx(np.mean(task), rel=1e-5)
    assert found["kd_loss"] == pytest.approx(np.mean(kd), rel=1e-5)
    assert found["attention_loss"] == pytest.approx(np.mean(attention), rel=1e-5)


def test_a_wrong_shift_would_show():
    """Labels [-, -, 5, 2]: the head must read positions 1 and 2, whose next tokens are 5 and 2."""
    hidden = torch.eye(4)
    weight = torch.zeros(6, 4)
    weight[5, 1], weight[2, 2] = 30.0, 30.0  # position 1 predicts 5, position 2 predicts 2, exactly
    right = HeadTargets(torch.tensor([-1, 5, 2, -1]), None, 1.0, 0.0)
    unshifted = HeadTargets(torch.tensor([-1, -1, 5, 2]), None, 1.0, 0.0)
    assert head_losses(hidden, weight, None, right)[1] < 1e-6
    assert head_losses(hidden, weight, None, unshifted)[1] > 10


def random_outcomes(rng, positions, vocabulary, k, mapped):
    """Teacher log-probabilities over a map with repeated and absent student ids."""
    vocabulary_map = rng.integers(-1, mapped, 4 * vocabulary)
    teacher_ids = np.stack([rng.permutation(4 * vocabulary)[:k] for _ in range(positions)])
    logprobs = np.log(rng.dirichlet(np.full(k + 1, 0.3), positions)[:, :k] + 1e-12)
    return teacher_ids, logprobs, vocabulary_map


@pytest.mark.parametrize("mapped", [5, 40, 4000])
def test_entries_that_share_a_student_id_add_up(mapped):
    """By a dictionary, in rows where ids repeat and in rows where none do; what maps nowhere is the other's."""
    teacher_ids, logprobs, vocabulary_map = random_outcomes(np.random.default_rng(mapped), 30, 40, 12, mapped)
    tail = np.log1p(-np.exp(logprobs).sum(1))
    ids, valid, probs, other = map_outcomes(teacher_ids, logprobs, tail, vocabulary_map)
    for row in range(30):
        expected: dict[int, float] = {}
        for teacher_id, logprob in zip(teacher_ids[row], logprobs[row], strict=True):
            if (student_id := int(vocabulary_map[teacher_id])) >= 0:
                expected[student_id] = expected.get(student_id, 0.0) + float(np.exp(np.float32(logprob)))
        found = dict(zip(ids[row][valid[row]].tolist(), probs[row][valid[row]].tolist(), strict=True))
        assert valid[row].sum() == len(found)  # none twice
        assert found == pytest.approx(expected, rel=1e-5)
        assert not probs[row][~valid[row]].any()
        assert other[row] == pytest.approx(1 - sum(expected.values()), abs=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("in_pieces", [False, True])
def test_gradient_on_the_spot_is_autograds(temperature, softcap, with_bias, in_pieces, monkeypatch):
    """The fused head's value and gradient are those of the plain twin under autograd, in float64.

    Whole chunks, and in pieces that do not divide them: blocks of 3 rows, slices of 16 of the head's.
    """
    if in_pieces:
        monkeypatch.setattr("stillroom.terms.output_head._BLOCK_BYTES", 3 * 4 * 40)
        monkeypatch.setattr("stillroom.terms.output_head.HEAD_SLICE", 16)
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    positions, width, vocabulary = 11, 6, 40
    teacher_ids, logprobs, vocabulary_map = random_outcomes(rng, 7, vocabulary, 20, vocabulary)
    arrays = map_outcomes(teacher_ids, logprobs, np.log1p(-np.exp(logprobs).sum(1)), vocabulary_map)
    rows = torch.tensor([0, 2, 3, 5, 6, 8, 10])
    ids, valid, probs, other = (torch.from_numpy(a) for a in arrays)
    outcomes = Outcomes(rows, ids, valid, probs, other)
    targets = torch.tensor([3, -1, 0, 39, -1, 2, 1, 5, -1, 7, 7])
    hidden = torch.randn(positions, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    bias = torch.randn(vocabulary, requires_grad=True) if with_bias else None
    leaves = [hidden, weight, *([bias] if with_bias else [])]
    total, task, kd = head_losses(
        hidden, weight, bias, HeadTargets(targets, outcomes, 0.7, 0.3, temperature, softcap), chunk=4
    )
    found = torch.autograd.grad(total * 2, leaves)
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    logits = wide[0] @ wide[1].T + (wide[2] if with_bias else 0)
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    plain_task = torch.nn.functional.cross_entropy(logits, targets, ignore_index=-1, reduction="sum")
    plain_kd = plain_kl(logits[rows], outcomes, temperature)
    assert float(task) == pytest.approx(float(plain_task), rel=1e-5)
    assert float(kd) == pytest.approx(float(plain_kd), rel=1e-5)
    expected = torch.autograd.grad((0.7 * plain_task + 0.3 * plain_kd) * 2, wide)
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a.double(), b, rtol=1e-4, atol=1e-5)


def plain_kl(logits, outcomes, temperature):
    """The plain twin: KL over K + 1 outcomes in float64, written out from the definition."""
    total = logits.new_zeros(())
    for row, ids, valid, probs, other in zip(
        logits, outcomes.ids, outcomes.valid, outcomes.probs.double(), outcomes.other.double(), strict=True
    ):
        q = row.softmax(-1)
        chosen = ids[valid]
        rest = torch.ones(len(q), dtype=torch.bool)
        rest[chosen] = False
        student = torch.cat([q[chosen], q[rest].sum()[None]]) ** (1 / temperature)
        teacher = torch.cat([probs[valid], other[None]]) ** (1 / temperature)
        if temperature != 1.0:
            student, teacher = student / student.sum(), teacher / teacher.sum()
        total = total + temperature**2 * (torch.xlogy(teacher, teacher) - torch.xlogy(teacher, student)).sum()
    return total


def test_teacher_ids_that_share_a_student_id_add_up():
    """Two spellings of the same bytes are one outcome with both probabilities."""
    ids, valid, probs, other = map_outcomes(
        np.array([[0, 1, 2, 3]]), np.log([[0.4, 0.3, 0.2, 0.05]]), np.log([0.05]), np.array([7, -1, 7, 2])
    )
    found = {int(i): float(p) for i, p, v in zip(ids[0], probs[0], valid[0], strict=True) if v}
    assert found == pytest.approx({7: 0.6, 2: 0.05})
    assert other[0] == pytest.approx(0.35)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_other_is_never_negative_nor_nan_in_half_precision(dtype):
    """A student sure of the mapped ids has a tiny other, not a negative one; loss and gradient stay finite."""
    logits = torch.full((2, 50), -30.0, dtype=dtype)
    logits[:, :5] = 30.0
    ids = torch.arange(5).repeat(2, 1)
    valid = torch.ones_like(ids, dtype=torch.bool)
    probs = torch.full((2, 5), 0.2)
    outcomes = Outcomes(torch.arange(2), ids, valid, probs, torch.tensor([0.0, 1e-4]))
    hidden = torch.eye(2, 50, dtype=torch.float32, requires_grad=True)
    weight = logits.float().T.repeat(1, 25).contiguous().requires_grad_()
    total, _, kd = head_losses(hidden, weight, None, HeadTargets(torch.tensor([-1, -1]), outcomes, 0.0, 1.0))
    total.backward()
    assert torch.isfinite(kd)
    assert kd >= 0
    assert torch.isfinite(hidden.grad).all()
    assert torch.isfinite(weight.grad).all()


@pytest.mark.parametrize("positions", [4, 4000])
def test_float16_keeps_the_tail_of_the_heads_gradient(positions):
    """Divided by a step's count, small probabilities are under float16's range; a loss scale comes after the cast."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(64, 16, requires_grad=True), torch.randn(2000, 16, requires_grad=True)
    targets = HeadTargets(torch.randint(0, 8, (64,)), None, 1 / positions, 0.0)
    full = torch.autograd.grad(head_losses(hidden, weight, None, targets)[0] * 2**16, (hidden, weight))
    with torch.autocast("cpu", torch.float16):
        total = head_losses(hidden, weight, None, targets)[0]
    half = torch.autograd.grad(total * 2**16, (hidden, weight))
    for found, expected in zip(half, full, strict=True):
        assert float((found - expected).norm() / expected.norm()) < 0.01
    tail = full[1].norm(dim=1) < full[1].norm(dim=1).median()  # entries of the vocabulary that are seldom likely
    assert float((half[1][tail] - full[1][tail]).norm() / full[1][tail].norm()) < 0.02


@pytest.mark.parametrize("storage", [torch.float16, torch.float32])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])
@pytest.mark.parametrize("tail", [8e-9, 3e-4, 0.2])
def test_a_student_that_equals_a_confident_teacher_has_a_kl_of_nought(storage, temperature, tail):
    """1 − Σ of rounded probabilities, magnified by 1/τ, gave 0.51 where 0 is right (τ = 4, tail 8e-9, float16)."""
    vocabulary, k = 60, 8
    rng = np.random.default_rng(0)
    inside, outside = rng.dirichlet(np.ones(k), 5), rng.dirichlet(np.ones(vocabulary - k), 5)
    probs = np.concatenate([(1 - tail) * inside, tail * outside], 1)
    logits = torch.from_numpy(np.log(probs)).float()
    ids, values, tails = top_k(logits, k)
    stored = (ids.numpy(), values.to(storage).numpy(), tails.numpy())
    arrays = [torch.from_numpy(a) for a in map_outcomes(*stored, np.arange(vocabulary))]
    outcomes = Outcomes(torch.arange(5), *arrays)
    targets = HeadTargets(torch.full((5,), -1), outcomes, 0.0, 1.0, temperature)
    total, _, kd = head_losses(logits, torch.eye(vocabulary), None, targets)
    assert abs(float(kd)) / 5 < (2e-5 if storage == torch.float16 else 2e-6)
    assert float(total) == float(kd)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize(
    ("name", "mixing"),
    [
        ("reverse_kl", None),
        ("jensen_shannon", 0.5),
        ("jensen_shannon", 0.1),
        ("skewed_forward_kl", 0.1),
        ("skewed_reverse_kl", 0.1),
        ("total_variation", None),
    ],
)
def test_every_divergence_equals_the_reference(student_ref, teacher_ref, store, some, name, mixing, temperature):
    """By loops over the outcomes in float64, on a pair with different tokenizers."""
    setup = Setup(student_ref, store, changed(kd={"divergence": name, "mixing": mixing, "temperature": temperature}))
    found, _ = setup.step(some)
    settings = {"temperature": temperature, "name": name, "mixing": mixing}
    assert setup.head.settings.divergence == name
    expected = reference_means(student_ref, teacher_ref, setup, some, **settings)
    assert found["kd_loss"] == pytest.approx(expected["kd_loss"], rel=2e-5)


@pytest.mark.parametrize("name", [name for name in DIVERGENCES if name != "forward_kl"])
def test_every_divergence_of_one_tokenizer_equals_the_reference_and_is_0_of_itself(
    tmp_path, byte_level, teacher_ref, examples, some, name
):
    """Equal tokenizers and k = V: the textbook's over the whole vocabulary; and nothing to learn from oneself."""
    store = make_store(tmp_path / "s", teacher_ref, examples, top_k=400)
    ref = write_model(tmp_path / "m", byte_level, STUDENT_SHAPE, 9)
    setup = Setup(ref, store, changed(kd={"divergence": name, "mixing": 0.3}))
    expected = reference_means(ref, teacher_ref, setup, some, top_k=400, name=name, mixing=0.3)
    assert setup.step(some)[0]["kd_loss"] == pytest.approx(expected["kd_loss"], rel=2e-5)
    alone = Setup(teacher_ref, store, changed(kd={"divergence": name}))
    assert alone.step(some)[0]["kd_loss"] == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("name", [*DIVERGENCES])
def test_a_divergence_is_what_its_definition_says_of_single_distributions(name):
    """Never negative, 0 just where p = q, and finite where the teacher or the student rules an outcome out."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        p, q = rng.dirichlet(np.full(6, 0.3), 2)
        found = float(DIVERGENCES[name](torch.tensor(p), torch.tensor(q).clamp(min=1e-30).log(), 0.3).sum())
        assert found == pytest.approx(reference.divergence(p, np.maximum(q, 1e-30), name, 0.3), abs=1e-9)
        assert found > 0
        itself = DIVERGENCES[name](torch.tensor(p), torch.tensor(p).log(), 0.3).sum()
        assert float(itself) == pytest.approx(0, abs=1e-9)  # of reverse KL's floor
    one, other = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]).clamp(min=1e-38).log()
    assert torch.isfinite(DIVERGENCES[name](one, other, 0.5)).all()


@pytest.mark.parametrize("name", [*DIVERGENCES])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_every_divergences_gradient_is_autograds(name, temperature):
    """Of the fused head, against the divergence written out over dense logits under autograd, in float64."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    width, vocabulary = 6, 40
    teacher_ids, logprobs, vocabulary_map = random_outcomes(rng, 7, vocabulary, 20, vocabulary)
    arrays = map_outcomes(teacher_ids, logprobs, np.log1p(-np.exp(logprobs).sum(1)), vocabulary_map)
    outcomes = Outcomes(torch.arange(7), *(torch.from_numpy(a) for a in arrays))
    hidden, weight = torch.randn(7, width), torch.randn(vocabulary, width)
    leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
    targets = HeadTargets(torch.full((7,), -1), outcomes, 0.0, 0.7, temperature, None, name, 0.3)
    head_losses(*leaves, None, targets)[0].backward()
    plain = [hidden.double().requires_grad_(), weight.double().requires_grad_()]
    total = 0.0
    for row in range(7):
        q = (plain[1] @ plain[0][row]).softmax(-1)
        valid = outcomes.valid[row]
        chosen = outcomes.ids[row][valid]
        others = torch.ones(vocabulary, dtype=torch.bool).index_fill(0, chosen, False)
        student = torch.cat([q[chosen], q[others].sum()[None]]) ** (1 / temperature)
        teacher = torch.cat([outcomes.probs[row][valid], outcomes.other[row][None]]).double() ** (1 / temperature)
        student, teacher = student / student.sum(), teacher / teacher.sum()
        total = total + 0.7 * temperature**2 * DIVERGENCES[name](teacher, student.log(), 0.3).sum()
    total.backward()
    for found, expected in zip(leaves, plain, strict=True):
        assert torch.allclose(found.grad.double(), expected.grad, rtol=2e-4, atol=2e-6)


@pytest.mark.parametrize("name", [*DIVERGENCES])
def test_a_divergences_slope_is_bounded_as_float16_needs(name):
    """Its gradient is scaled by that bound before it is cast: a steeper one would overflow without a word."""
    rng = np.random.default_rng(1)
    for mixing in (0.5, 0.01):
        found = 0.0
        for _ in range(300):
            p, q = (torch.from_numpy(rng.dirichlet(np.full(5, 0.05))).clamp(min=1e-38) for _ in range(2))
            log_q = q.log().requires_grad_()
            DIVERGENCES[name](p, log_q, mixing).sum().backward()
            found = max(found, float(log_q.grad.abs().max()))
        assert found <= steepest(name, mixing) + 1e-9


@pytest.mark.parametrize("name", [*DIVERGENCES])
def test_every_divergences_gradient_in_float16_is_that_in_float32(name):
    """Autocast makes the products in 16 bits; nothing may overflow or fall under float16's range."""
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    teacher_ids, logprobs, vocabulary_map = random_outcomes(rng, 40, 600, 20, 600)
    arrays = map_outcomes(teacher_ids, logprobs, np.log1p(-np.exp(logprobs).sum(1)), vocabulary_map)
    outcomes = Outcomes(torch.arange(40), *(torch.from_numpy(a) for a in arrays))
    leaves = [torch.randn(40, 16, requires_grad=True), torch.randn(600, 16, requires_grad=True)]
    targets = HeadTargets(torch.full((40,), -1), outcomes, 0.0, 1 / 4000, 1.0, None, name, 0.1)
    full = torch.autograd.grad(head_losses(*leaves, None, targets)[0] * 2**12, leaves)
    with torch.autocast("cpu", torch.float16):
        total = head_losses(*leaves, None, targets)[0]
    half = torch.autograd.grad(total * 2**12, leaves)
    for found, expected in zip(half, full, strict=True):
        assert float((found - expected).norm() / expected.norm()) < 0.01


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
