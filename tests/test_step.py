"""A step: the gradient of the reported loss, whatever the cut, the order, the padding and the precision."""

from __future__ import annotations

import copy
import itertools
from collections import defaultdict
from dataclasses import replace

import pytest
import torch

from setups import ALL, Setup, changed
from stillroom.config import GROUPS, Group, Training
from stillroom.models.hub import load_model
from stillroom.terms.output_head import head_losses
from stillroom.training.step import accumulate, losses_of, step_in_one_pass, step_pass_by_pass


def same(first, second, tolerance=2e-5):
    """Losses and gradients equal up to float32 rounding."""
    losses, gradients = zip(first, second, strict=True)
    for name in losses[0]:
        assert losses[1][name] == pytest.approx(losses[0][name], rel=tolerance), name
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(
            gradient, gradients[1][name], rtol=1e-3, atol=1e-5 * float(gradient.abs().max()) + 1e-9
        ), name


@pytest.mark.parametrize("split", [[0, 1, 6], [0, 3, 6], [0, 1, 2, 3, 4, 5, 6], [0, 5, 6]])
def test_micro_batches_change_nothing(student_ref, store, some, split):
    """A step cut into micro-batches, which also changes every padding, is the same step."""
    setup = Setup(student_ref, store)
    same(setup.step(some), setup.step(some, split))


def test_order_changes_nothing(student_ref, store, some):
    """The order of examples in a step does not matter."""
    setup = Setup(student_ref, store)
    same(setup.step(some), setup.step(some[::-1]))


def test_chunks_change_nothing(student_ref, store, some, monkeypatch):
    """The number of rows whose logits exist at a time does not matter."""
    setup = Setup(student_ref, store)
    whole = setup.step(some)
    for chunk in (1, 7, 10_000):
        monkeypatch.setattr("stillroom.terms.next_token.head_losses", lambda *a, c=chunk: head_losses(*a, chunk=c))
        same(whole, setup.step(some))


@pytest.mark.parametrize("amount", [1, 13])
def test_padding_changes_nothing(student_ref, store, some, amount):
    """Padding of any amount moves neither a loss nor a gradient."""
    setup = Setup(student_ref, store)
    plain = setup.step(some)
    collate = setup.collate

    def padded_collate(items):
        batch = collate(items)
        length, pad = batch.ids.shape[1], (0, amount)

        def move(rows):
            return rows // length * (length + amount) + rows % length

        new = {f: getattr(batch, f) for f in batch.__dataclass_fields__}
        new |= {
            "ids": torch.nn.functional.pad(batch.ids, pad, value=7),
            "mask": torch.nn.functional.pad(batch.mask, pad),
            "head": replace(batch.head, rows=move(batch.head.rows)),
            "parts": {
                "hidden": replace(batch.parts["hidden"], rows=move(batch.parts["hidden"].rows)),
                "attention": replace(
                    batch.parts["attention"],
                    segment_of=torch.nn.functional.pad(batch.parts["attention"].segment_of, pad, value=-1),
                ),
            },
        }
        return type(batch)(**new)

    setup.collate = padded_collate
    same(plain, setup.step(some))


def test_a_measured_gradient_has_its_weight_in_it(student_ref, store, some):
    """The share of a term is that of what is added to the update: doubling a weight doubles its norm, no other."""
    norms = []
    for weight in (0.5, 1.0):
        setup = Setup(student_ref, store, changed(kd={"weight": weight}))
        items = setup.items(some)
        measured = setup.runner.measure([setup.collate(items[:2]), setup.collate(items[2:])])
        assert sum(measured["shares"].values()) == pytest.approx(1)
        norms.append(measured["norms"])
    assert norms[1]["kd"] == pytest.approx(2 * norms[0]["kd"], rel=1e-4)
    for term in ("task", "hidden", "attention"):
        assert norms[1][term] == pytest.approx(norms[0][term], rel=1e-5)


@pytest.mark.parametrize("group", ["black_box", "combined"])
def test_the_gradient_is_that_of_the_reported_loss(student_ref, store, some, group):
    """What is differentiated is what is reported, and moving along the gradient changes it by what that says."""
    setup = Setup(student_ref, store, GROUPS[group].objective(ALL))
    reported, gradient = setup.step(some, [0, 2, 6])
    assert sum(setup.differentiated) == pytest.approx(reported["loss"], rel=1e-5)
    norm = float(sum(g.double().square().sum() for g in gradient.values())) ** 0.5
    named, values = dict(setup.student.named_parameters()), []
    for sign in (1, -1):
        with torch.no_grad():
            for name, g in gradient.items():
                named[name].add_(g, alpha=sign * 2e-3 / norm)
        values.append(setup.step(some)[0]["loss"])
        with torch.no_grad():
            for name, g in gradient.items():
                named[name].add_(g, alpha=-sign * 2e-3 / norm)
    assert (values[0] - values[1]) / 4e-3 == pytest.approx(norm, rel=0.02)


def test_active_terms_move_the_gradient_and_inactive_ones_leave_it_bit_identical(student_ref, store, some):
    """A group trains on what its name says and on nothing else; the projector moves only with the hidden term."""
    gradients = {name: Setup(student_ref, store, group.objective(ALL)).step(some)[1] for name, group in GROUPS.items()}

    def differs(a, b):
        return any(not torch.equal(gradients[a][n], gradients[b][n]) for n in gradients["task_only"])

    for a, b in itertools.combinations(GROUPS, 2):
        assert differs(a, b), (a, b)
    for name in GROUPS:
        moved = {n for n, g in gradients[name].items() if n.startswith("trained") and g.abs().max() > 0}
        assert moved == ({"trained.hidden.weight", "trained.hidden.bias"} if name in ("hidden", "combined") else set())
    # a term whose weight is 0 and a term that is not in the group are the same thing, to the bit
    off = Group(name="x", terms=("task", "kd", "hidden"), hidden={"weight": 0.0}).objective(ALL)
    again = Setup(student_ref, store, off).step(some)[1]
    assert all(torch.equal(again[n], gradients["black_box"][n]) for n in again)


def test_the_step_in_bfloat16_is_the_float32_step_up_to_rounding(student_ref, store, some):
    """Autocast changes digits, not meaning; losses are float32 either way."""
    full, _ = Setup(student_ref, store).step(some)
    half, gradient = Setup(student_ref, store, precision="bfloat16").step(some)
    for name, value in full.items():
        assert half[name] == pytest.approx(value, rel=0.03), name
    assert all(g.dtype == torch.float32 for g in gradient.values())


def test_shares_in_float16_are_those_in_float32(student_ref, store, some):
    """A small gradient is measured under the loss scale, not lost to float16's range; too large a scale is lowered."""
    tiny = changed(hidden={"weight": 1e-6}, attention={"weight": 1e-4})
    norms = {}
    for precision in ("float32", "float16"):
        setup = Setup(student_ref, store, tiny, precision=precision)
        batch = setup.collate(setup.items(some))
        norms[precision] = setup.runner.measure([batch])["norms"]
        setup.runner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40, enabled=precision == "float16")
        norms[f"{precision}, overflowing"] = setup.runner.measure([batch])["norms"]
    for name, term_norms in norms.items():
        for term, norm in term_norms.items():
            assert norm == pytest.approx(norms["float32"][term], rel=0.1), (name, term)


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


@pytest.mark.parametrize(("precision", "rounding"), [("float32", 1e-4), ("float16", 1e-4)])
def test_a_step_in_one_pass_is_the_step_pass_by_pass(student_ref, store, some, precision, rounding):
    """As a GPU takes it, where nothing may wait: clipped, unscaled and stepped alike, three times over."""
    ended = []
    for take in (step_pass_by_pass, step_in_one_pass):
        setup = Setup(student_ref, store, precision=precision)
        parameters = list(setup.student.parameters())
        before = torch.cat([p.detach().flatten() for p in parameters])
        optimizer = torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1, fused=True)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, enabled=precision == "float16")
        items = setup.items(some)
        for first in (0, 2, 4):
            optimizer.zero_grad()
            batch = setup.collate(items[first : first + 2])
            total, _ = setup.runner.losses(batch, setup.objective.weights, batch.counts)
            scaler.scale(total).backward()
            assert take(optimizer, scaler, parameters, limit=0.05)
            scaler.update()
        ended.append(torch.cat([p.detach().flatten() for p in parameters]))
        assert not hasattr(optimizer, "grad_scale")
    moved = float((ended[0] - before).norm())
    assert moved > 0
    assert float((ended[1] - ended[0]).norm()) < rounding * moved


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_in_one_pass_that_is_not_finite_changes_nothing(student_ref, scaled):
    """Neither weights nor moments nor their count; the loss scale falls, and the next step is taken."""
    model = load_model(student_ref)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    scaler = torch.amp.GradScaler("cpu", enabled=scaled)

    def gradients(value):
        scaler.scale(torch.ones(()))  # which it starts with
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, value)

    gradients(1.0)
    assert step_in_one_pass(optimizer, scaler, parameters, 1.0)
    scaler.update()
    before = [p.detach().clone() for p in parameters]
    moments = copy.deepcopy(optimizer.state_dict()["state"])
    scale = scaler.get_scale()
    gradients(1.0)
    parameters[0].grad[0] = torch.inf
    assert not step_in_one_pass(optimizer, scaler, parameters, 1.0)
    scaler.update()
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))
    after = optimizer.state_dict()["state"]
    assert all(torch.equal(after[n][key], state[key]) for n, state in moments.items() for key in state)
    assert scaler.get_scale() == (scale / 2 if scaled else scale)


def test_a_measured_gradient_is_that_of_the_model_alone(student_ref, store, some):
    """The projector is thrown away after training: its own gradient is no part of the hidden term's share."""
    setup = Setup(student_ref, store)
    measured = setup.runner.measure([setup.collate(setup.items(some))])
    alone = changed(task={"weight": 0.0}, kd={"weight": 0.0}, attention={"weight": 0.0})
    gradient = Setup(student_ref, store, alone).step(some)[1]
    of_student = [g for name, g in gradient.items() if not name.startswith("trained")]
    assert measured["norms"]["hidden"] == pytest.approx(float(torch.nn.utils.get_total_norm(of_student)), rel=1e-4)


def test_losses_of_an_epoch_are_means_over_its_positions_not_its_batches():
    """A short batch weighs by what is in it."""
    totals = defaultdict(float)
    accumulate(totals, {"task": torch.tensor(6.0), "kd": torch.tensor(4.0)}, {"task": 3, "kd": 2})
    accumulate(totals, {"task": torch.tensor(4.0), "kd": torch.tensor(0.0)}, {"task": 1})
    found = losses_of(totals, GROUPS["black_box"].objective(ALL))
    assert found == {"task_loss": 2.5, "kd_loss": 2.0, "loss": 2.5 + 0.5 * 2.0}
