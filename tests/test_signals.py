"""What is captured equals an independent eager, unbatched, unpadded float32 forward pass, by architecture."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Qwen2Config,
)

from stillroom.config import GROUPS, Evaluation, ModelRef, Objective, Training
from stillroom.data.encoding import Encoding
from stillroom.errors import UserError
from stillroom.evaluation.baselines import Baseline
from stillroom.models.architecture import check_capture
from stillroom.models.hub import load_model, load_tokenizer
from stillroom.models.sizes import heads, width
from stillroom.signals import Layout, compute_signals
from stillroom.training.train_student import Trial, train

COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
CONFIGS = {
    "llama": LlamaConfig(**COMMON),
    "mistral with a window shorter than the text": MistralConfig(sliding_window=5, **COMMON),
    "qwen2": Qwen2Config(**COMMON),
    "gemma2": Gemma2Config(
        head_dim=16,
        query_pre_attn_scalar=16,
        sliding_window=5,
        attn_logit_softcapping=3.0,
        final_logit_softcapping=2.0,
        **COMMON,
    ),
    "gpt2": GPT2Config(
        vocab_size=96,
        n_embd=32,
        n_layer=3,
        n_head=4,
        n_positions=64,
        initializer_range=0.3,
        bos_token_id=1,
        eos_token_id=2,
    ),
}
LENGTHS = (23, 9, 16, 1)


def encodings():
    """Token ids of several lengths; id 0, the padding id, among them."""
    rng = np.random.default_rng(0)
    return [
        Encoding(rng.integers(0, 96, n).astype("int32"), np.arange(1, n + 1, dtype="int32"), np.zeros(n, dtype=bool))
        for n in LENGTHS
    ]


def build(config):
    """The same weights twice: captured by us, and plain eager."""
    torch.manual_seed(0)
    ours = AutoModelForCausalLM.from_config(copy.deepcopy(config)).eval()
    eager = AutoModelForCausalLM.from_config(copy.deepcopy(config), attn_implementation="eager").eval()
    eager.load_state_dict(ours.state_dict())
    return ours, eager


def layout_of(model, top_k):
    """What a store of this model would keep."""
    return Layout(top_k, width(model.config), heads(model.config), "float32", "int32")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-5), (torch.float16, 2e-3)])
def test_captured_signals_are_those_of_an_eager_unpadded_pass(name, dtype, tolerance):
    """Batching, padding, sdpa and the storage dtype change nothing that matters."""
    ours, eager = build(CONFIGS[name])
    signals = compute_signals(ours, encodings(), layout_of(ours, 20), dtype)
    for encoding, found in zip(encodings(), signals, strict=True):
        ids = torch.from_numpy(encoding.ids.astype("int64"))[None]
        with torch.no_grad():
            output = eager(ids, output_attentions=True, output_hidden_states=True)
        assert found["hidden"].dtype == found["attention"].dtype == found["topk_logprobs"].dtype == dtype
        assert torch.allclose(found["hidden"].float(), output.hidden_states[-1][0], atol=tolerance, rtol=tolerance)
        lower = torch.tril_indices(len(encoding), len(encoding))
        expected = output.attentions[-1][0][:, lower[0], lower[1]]
        assert torch.allclose(found["attention"].float(), expected, atol=tolerance)
        logprobs = output.logits[0].log_softmax(-1)
        top = logprobs.topk(20).values
        assert torch.allclose(found["topk_logprobs"].float(), top, atol=5 * tolerance, rtol=tolerance)
        picked = logprobs.gather(1, found["topk_ids"].long())
        assert torch.allclose(found["topk_logprobs"].float(), picked, atol=5 * tolerance, rtol=tolerance)


def test_a_window_shorter_than_the_text_hides_what_is_behind_it():
    """The captured map shows the sliding window: nothing further back than it is attended."""
    ours, _ = build(CONFIGS["mistral with a window shorter than the text"])
    found = compute_signals(ours, encodings()[:1], layout_of(ours, 5), torch.float32)[0]
    square = torch.zeros(4, 23, 23)
    lower = torch.tril_indices(23, 23)
    square[:, lower[0], lower[1]] = found["attention"]
    assert (square.tril(-5) == 0).all()
    assert (square.tril(-4) != 0).any()


@pytest.mark.parametrize("name", CONFIGS)
def test_supported_architectures_pass_the_check(name):
    """The check before work starts accepts what is captured correctly."""
    ours, _ = build(CONFIGS[name])
    check_capture(ours, torch.randint(3, 90, (1, 20)))


def test_an_architecture_that_cannot_be_captured_is_refused_by_name():
    """Bloom computes attention by itself (ALiBi): its map never passes our function."""
    config = BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4)
    model = AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(UserError, match="BloomForCausalLM"):
        check_capture(model, torch.randint(3, 90, (1, 20)))


def test_a_head_that_misses_the_models_logits_is_refused_by_name(monkeypatch):
    """A model that does something to its logits that we do not know of is not distilled wrongly in silence."""
    ours, _ = build(CONFIGS["gemma2"])
    monkeypatch.setattr("stillroom.models.output_head.logit_softcap", lambda config: None)
    with pytest.raises(UserError, match=r"Gemma2ForCausalLM.*logits"):
        check_capture(ours, torch.randint(3, 90, (1, 20)))


def test_an_unknown_scale_of_the_logits_is_refused_before_a_model_is_scored_or_trained(
    tmp_path, student_ref, examples, monkeypatch
):
    """Granite divides them: were that not known, its losses and its choices would be wrong in silence."""
    monkeypatch.setattr("stillroom.models.output_head.logit_scale", lambda config: 1.0)
    tokenizer = load_tokenizer(student_ref)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = GraniteConfig(vocab_size=len(tokenizer), num_key_value_heads=2, logits_scaling=4.0, **shape)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "granite")
    tokenizer.save_pretrained(tmp_path / "granite")
    ref = ModelRef(model=str(tmp_path / "granite"))
    trial = Trial("x", GROUPS["task_only"], 0)
    with pytest.raises(UserError, match=r"GraniteForCausalLM.*logits"):
        train(trial, ref, Training(), Objective(), Evaluation(), examples, None, tmp_path / "trial")
    baseline = Baseline(tmp_path, "student", "validation", "x", "float32", examples.validation, Evaluation())
    with pytest.raises(UserError, match=r"GraniteForCausalLM.*logits"):
        baseline.measure(load_model(ref), tokenizer)
    assert not baseline.path.exists()


def test_non_finite_teacher_output_is_refused_with_its_signal_named():
    """A float16 teacher that overflows must not fill a store with NaN."""
    ours, _ = build(CONFIGS["llama"])
    with torch.no_grad():
        ours.model.norm.weight.mul_(1e6)
    with pytest.raises(UserError, match=r"topk_logprobs has NaN or infinite values .*bfloat16"):
        compute_signals(ours, encodings(), layout_of(ours, 5), torch.float16)
