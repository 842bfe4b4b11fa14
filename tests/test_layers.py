"""Layers beside the last: what a pass leaves behind, what is stored of it, and what pairs of layers give as a loss."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import reference
from setups import EVALUATION, TRAINING, Setup, changed, dense
from small_things import make_store
from stillroom.config import Group, Objective
from stillroom.errors import UserError
from stillroom.models.forward import Taps, forward
from stillroom.models.hub import load_model
from stillroom.offline_teacher_data import verify_saved_data
from stillroom.offline_teacher_data.recomputation import recompute
from stillroom.studies import load_study
from stillroom.training.train_student import Trial, train

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
CONFIGS = {
    "llama": transformers.LlamaConfig(num_key_value_heads=2, initializer_range=0.3, **SIZES),
    "gemma2": transformers.Gemma2Config(num_key_value_heads=2, head_dim=8, initializer_range=0.3, **SIZES),
    "gpt2": transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=4, initializer_range=0.3),
    "opt": transformers.OPTConfig(ffn_dim=64, init_std=0.3, **{k: v for k, v in SIZES.items() if k[0] != "i"}),
    "qwen3": transformers.Qwen3Config(num_key_value_heads=2, head_dim=8, initializer_range=0.3, **SIZES),
}
PAIRS = ((1, 1), (2, "last"), ("last", "last"))


@pytest.fixture(scope="module")
def layered(tmp_path_factory, teacher_ref, examples):
    """A store of two layers beside the last, of either signal."""
    kept = {"hidden_layers": (1, 2, "last"), "attention_layers": (1, 2, "last")}
    return make_store(tmp_path_factory.mktemp("layered") / "data", teacher_ref, examples, **kept)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_pass_leaves_behind_what_the_models_own_has(name):
    """Layer ℓ's hidden state is the residual stream after block ℓ; its map is that block's."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()
    eager = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]), attn_implementation="eager").eval()
    eager.load_state_dict(model.state_dict())
    ids = torch.randint(3, 90, (2, 11))
    with torch.no_grad():
        taps = Taps(frozenset({1, 2, "last"}), frozenset({1, 3, "last"}))
        found = forward(model, ids, taps)
        expected = eager(ids, output_hidden_states=True, output_attentions=True)
        nothing = forward(model, ids)
    for layer in (1, 2):
        assert torch.allclose(found.hidden[layer], expected.hidden_states[layer], atol=2e-5)
    assert torch.allclose(found.hidden["last"], expected.hidden_states[-1], atol=2e-5)
    assert torch.allclose(found.attention[1], expected.attentions[0], atol=2e-5)
    assert torch.equal(found.attention[3], found.attention["last"])
    assert torch.equal(found.last_hidden, nothing.last_hidden) or torch.allclose(found.last_hidden, nothing.last_hidden)
    assert not nothing.attention
    with pytest.raises(UserError, match="has 3 layers, so no layer 4"):
        forward(model, ids, Taps(hidden=frozenset({4})))


def test_a_store_keeps_the_layers_that_were_asked_for(layered, store, teacher_ref, examples):
    """Each is a column; the gate and recomputation know them; the last layer's are those of a store of its own."""
    assert [c for c in layered.columns if c.startswith("hidden")] == ["hidden_1", "hidden_2", "hidden"]
    verify_saved_data(layered.path, 5)
    assert max(recompute(layered, load_model(teacher_ref), list(layered.index)[:3]).values()) < 1e-4
    example = examples.all[0].example_id
    for column in ("hidden", "attention", "topk_logprobs"):
        assert np.allclose(layered.read(example)[column], store.read(example)[column], atol=2e-5)
    assert layered.mean_square("hidden_1") != layered.mean_square("hidden")
    assert layered.manifest["fingerprint"] != store.manifest["fingerprint"]
    assert "hidden_layers" not in store.manifest["made_from"]  # stores of the last layer alone are what they were


@pytest.mark.parametrize("pair", ["different", "same"])
def test_pairs_of_layers_equal_the_reference(pair, layered, teacher_ref, student_ref, same_tokenizer, examples):
    """The mean over pairs, each hidden pair through a projector of its own, by loops in float64."""
    some = [examples.train[n] for n in (0, 20, 40)]
    ref = student_ref if pair == "different" else same_tokenizer
    setup = Setup(ref, layered, changed(hidden={"layers": PAIRS}, attention={"layers": PAIRS}))
    found, _ = setup.step(some, [0, 1, 3])
    projectors = setup.student.trained["hidden"]
    assert len({float(p.weight.detach().sum()) for p in projectors}) == len(PAIRS)
    hidden, attention = [], []
    for (teacher_layer, student_layer), projector in zip(PAIRS, projectors, strict=True):
        weight, bias = projector.weight.detach().numpy(), projector.bias.detach().numpy()
        for example in some:
            teacher = dense(teacher_ref, example.text, layer=teacher_layer)
            student = dense(ref, example.text, add_eos=True, layer=student_layer)
            hidden += reference.hidden_terms(teacher, student, weight, bias)
            attention += reference.attention_terms(teacher, student)[0]
    assert found["hidden_loss"] == pytest.approx(np.mean(hidden), rel=2e-5)
    assert found["attention_loss"] == pytest.approx(np.mean(attention), rel=2e-5)


def test_each_pair_of_layers_moves_the_gradient(layered, student_ref, examples):
    """A pair that changes nothing would be a signal that is off."""
    some = [examples.train[n] for n in (0, 20, 40)]
    gradients = {
        pairs: Setup(student_ref, layered, changed(hidden={"layers": pairs})).step(some)[1]
        for pairs in ((("last", "last"),), ((1, "last"),), ((1, 1),))
    }
    name = "model.model.layers.0.mlp.down_proj.weight"
    assert len({float(gradient[name].double().norm()) for gradient in gradients.values()}) == 3
    beyond = "model.model.layers.1.mlp.down_proj.weight"
    task_kd = Setup(student_ref, layered, changed(hidden={"weight": 0.0})).step(some)[1][beyond]
    assert torch.allclose(gradients[((1, 1),)][beyond], task_kd, atol=1e-7)  # block 2 is behind what is compared


def test_a_trial_of_layer_pairs_trains_and_keeps_its_projectors(tmp_path, layered, student_ref, examples):
    """From the group's settings to the files beside the student."""
    group = Group(name="deep", terms=("task", "kd", "hidden"), hidden={"layers": PAIRS})
    few = examples.__class__(examples.train[:16], examples.validation[:3], examples.counts)
    training = TRAINING.model_copy(update={"epochs": 1})
    trial = Trial("t", group, 0)
    result = train(trial, student_ref, training, Objective(), EVALUATION, few, layered.path, tmp_path)
    saved = load_file(tmp_path / "checkpoint_1" / "projector.safetensors")
    assert sorted(saved) == sorted(f"hidden.{n}.{part}" for n in range(3) for part in ("weight", "bias"))
    assert result["gradient_shares"]["hidden"] > 0


def test_a_pair_whose_layer_is_not_kept_is_refused_by_the_study():
    """Before the teacher runs: its store would not have it."""
    declared = "groups=[{name: deep, terms: [task, kd, hidden], hidden: {layers: [[2, 1]]}}]"
    primary = ["analysis.primary=[]", "analysis.secondary=[]"]
    with pytest.raises(UserError, match=r"group 'deep' compares the teacher's hidden layer 2, which is not among"):
        load_study("quickstart", [declared, *primary])
    load_study("quickstart", [declared, *primary, "signals.hidden_layers=[2, last]"])
