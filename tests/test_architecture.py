"""An architecture is computed correctly or refused by name: never wrong, whatever Transformers can build."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from architectures import verdicts
from stillroom.config import GROUPS, Evaluation, ModelRef, Objective, Training
from stillroom.errors import UserError
from stillroom.evaluation.metrics import by_column
from stillroom.experiment.workspace import Workspace
from stillroom.models.architecture import PROBE, check_capture, check_model, miniature
from stillroom.models.forward import last_hidden_state
from stillroom.models.hub import load_model, load_tokenizer
from stillroom.models.output_head import load_output_head, output_logits
from stillroom.models.sizes import width
from stillroom.studies import load_study
from stillroom.training.train_student import Trial, train
from studies import study_file

SMALL = {
    "bloom": transformers.BloomConfig(vocab_size=96, hidden_size=32, n_layer=2, n_head=4),
    "xglm": transformers.XGLMConfig(vocab_size=96, d_model=32, num_layers=2, attention_heads=4, ffn_dim=64),
    "gpt_neox_japanese": transformers.GPTNeoXJapaneseConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4
    ),
    "trocr": transformers.TrOCRConfig(
        vocab_size=96, d_model=32, decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=64
    ),
    "falcon": transformers.FalconConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2, num_attention_heads=4),
    "gpt_neo": transformers.GPTNeoConfig(
        vocab_size=96, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]]
    ),
    "mpt": transformers.MptConfig(vocab_size=96, d_model=32, n_layers=2, n_heads=4),
}


def built(config):
    """A small random model as Transformers loads it."""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32).eval()


@torch.no_grad()
def future_leaks(model):
    """By how much another last token moves our logits of the tokens before it."""
    changed = PROBE.clone()
    changed[0, -1] = 1
    ours = [output_logits(model, last_hidden_state(model, ids)) for ids in (PROBE, changed)]
    return float((ours[0] - ours[1])[0, :-1].abs().max())


@pytest.mark.parametrize("name", SMALL)
def test_architectures_with_masks_of_their_own_stay_causal(name):
    """They add a mask themselves and turned non-causal, without a word, when an attention function of ours stood in."""
    model = built(SMALL[name])
    check_model(model, PROBE)
    assert future_leaks(model) < 1e-4
    with torch.no_grad():
        ours = output_logits(model, last_hidden_state(model, PROBE))
        assert torch.allclose(ours, model(input_ids=PROBE).logits, atol=1e-4)
    with pytest.raises(UserError, match=rf"{type(model).__name__}.*cannot be captured"):
        check_capture(model, PROBE)


def test_attention_sinks_are_never_dropped():
    """GPT-OSS' softmax has a column of its own: left out, its logits were wrong by 62 % without a word."""
    model = miniature(transformers.GptOssConfig())
    with torch.no_grad():
        for layer in model.model.layers:
            layer.self_attn.sinks.fill_(2.0)
        ours = output_logits(model, last_hidden_state(model, PROBE))
        assert torch.allclose(ours, model(input_ids=PROBE).logits, atol=1e-5)
    check_model(model, PROBE)
    with pytest.raises(UserError, match=r"GptOssForCausalLM: capturing its attention changes its hidden state"):
        check_capture(model, PROBE)


def test_a_model_that_is_not_causal_is_refused():
    """Its losses would be taken on tokens that it has already read."""
    model = built(transformers.BertGenerationConfig(vocab_size=96, hidden_size=32, num_hidden_layers=2,
                                                    num_attention_heads=4, intermediate_size=64))  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    with pytest.raises(UserError, match=r"BertGenerationDecoder: .*not causal"):
        check_model(model, PROBE)


def test_a_student_that_cannot_be_tried_small_is_refused_before_the_capture(
    tmp_path, teacher_ref, student_ref, monkeypatch
):
    """With its own weights, before any baseline is measured; without a group that captures its attention it is not."""
    tokenizer = load_tokenizer(student_ref)
    config = transformers.BloomConfig(vocab_size=len(tokenizer), hidden_size=32, n_layer=2, n_head=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "bloom")
    tokenizer.save_pretrained(tmp_path / "bloom")
    for module in ("sources", "workspace"):
        monkeypatch.setattr(f"stillroom.experiment.{module}.try_miniature", lambda config: None)
    for groups, refused in ((["combined"], True), (["black_box"], False)):
        path = study_file(tmp_path, teacher_ref.model, str(tmp_path / "bloom"), groups=groups)
        workspace = Workspace(load_study(path))
        due = [baseline for baseline in workspace.measured_baselines if baseline.role == "student"]
        if refused:
            with pytest.raises(UserError, match="BloomForCausalLM"):
                workspace._measure("student", due)
        else:
            workspace._measure("student", due)
        assert all((baseline.read() is None) == refused for baseline in due)


@pytest.mark.parametrize("name", ["bloom", "granite"])
def test_a_students_validation_loss_is_that_of_its_checkpoint_in_plain_transformers(
    name, tmp_path, sentencepiece, examples
):
    """What `train` reports is what anybody gets who loads the student: 1.6376 was reported where 1.8783 was right."""
    size = len(sentencepiece)
    config = {
        "bloom": transformers.BloomConfig(vocab_size=size, hidden_size=32, n_layer=2, n_head=4),
        "granite": transformers.GraniteConfig(
            vocab_size=size, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, logits_scaling=4.0, initializer_range=0.2,
        ),
    }[name]  # fmt: skip
    built(config).save_pretrained(tmp_path / "student")
    sentencepiece.save_pretrained(tmp_path / "student")
    training = Training(epochs=1, precision="float32", learning_rate=3e-3, gradient_interval=0)
    trial, ref = Trial("t", GROUPS["task_only"], 0), ModelRef(model=str(tmp_path / "student"))
    few = examples.__class__(examples.train[:16], examples.validation[:4], examples.counts)
    evaluation = Evaluation(max_new_tokens=4)
    result = train(trial, ref, training, Objective(), evaluation, few, None, tmp_path / "trial")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "trial" / "checkpoint_1").eval()
    total, count = 0.0, 0
    for example in few.validation:
        ids = [*sentencepiece(example.text)["input_ids"], sentencepiece.eos_token_id]
        ends = [end for _, end in sentencepiece(example.text, return_offsets_mapping=True)["offset_mapping"]]
        targets = [t for t in range(1, len(ids)) if t == len(ids) - 1 or ends[t] > len(example.prompt)]
        with torch.no_grad():
            logprobs = plain(torch.tensor([ids])).logits[0].log_softmax(-1)
        total -= sum(float(logprobs[t - 1, ids[t]]) for t in targets)
        count += len(targets)
    assert by_column(result["metrics"])["validation_task_loss"] == pytest.approx(total / count, rel=1e-5)


def test_the_width_is_that_of_what_the_output_head_reads(tmp_path, byte_level):
    """OPT may project its last hidden state to another width, as opt-350m does."""
    config = transformers.OPTConfig(
        vocab_size=len(byte_level), hidden_size=32, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4,
        word_embed_proj_dim=16, do_layer_norm_before=False,
    )  # fmt: skip
    model = built(config)
    assert width(model.config) == model.get_output_embeddings().weight.shape[1] == 16
    check_capture(model, PROBE)


@pytest.mark.parametrize("name", ["phi", "gpt_neox", "opt", "gpt2", "gemma2", "granite", "llama untied"])
def test_the_output_head_is_found_with_its_bias_scale_and_cap(name, tmp_path, byte_level):
    """The gate reads it alone of the teacher's files: whatever it leaves out makes a right store look wrong."""
    size = {"vocab_size": len(byte_level), "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = {
        "phi": lambda: transformers.PhiConfig(intermediate_size=64, **size),
        "gpt_neox": lambda: transformers.GPTNeoXConfig(intermediate_size=64, **size),
        "opt": lambda: transformers.OPTConfig(ffn_dim=64, word_embed_proj_dim=16, do_layer_norm_before=False, **size),
        "gpt2": lambda: transformers.GPT2Config(vocab_size=size["vocab_size"], n_embd=32, n_layer=2, n_head=4),
        "gemma2": lambda: transformers.Gemma2Config(
            intermediate_size=64, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0, **size
        ),
        "granite": lambda: transformers.GraniteConfig(
            intermediate_size=64, num_key_value_heads=2, logits_scaling=4.0, **size
        ),
        "llama untied": lambda: transformers.LlamaConfig(
            intermediate_size=64, num_key_value_heads=2, tie_word_embeddings=False, **size
        ),
    }[name]()
    model = built(config)
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias)
    model.save_pretrained(tmp_path)
    byte_level.save_pretrained(tmp_path)
    head = load_output_head(ModelRef(model=str(tmp_path)))
    with torch.no_grad():
        hidden = last_hidden_state(model, PROBE)
        assert torch.allclose(head.logits(hidden[0]), model(input_ids=PROBE).logits[0], atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_size": 33}, "cannot be loaded"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "cannot be loaded"),
    ],
)
def test_a_folder_that_does_not_load_is_one_message(change, message, tmp_path, student_ref):
    """Whatever a library raises for it, the user reads which model, and why."""
    import json
    import shutil

    shutil.copytree(student_ref.model, tmp_path / "model")
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **change}))
    with pytest.raises(UserError, match=message):
        load_model(ModelRef(model=str(tmp_path / "model")))


def test_a_tokenizer_of_a_newer_library_is_one_message(tmp_path, student_ref):
    """The tokenizers library raises a plain Exception."""
    import json
    import shutil

    shutil.copytree(student_ref.model, tmp_path / "model")
    path = tmp_path / "model" / "tokenizer.json"
    described = json.loads(path.read_text())
    described["model"]["type"] = "Future"
    path.write_text(json.dumps(described))
    with pytest.raises(UserError, match="cannot be loaded"):
        load_tokenizer(ModelRef(model=str(tmp_path / "model")))


@pytest.mark.slow
def test_every_architecture_is_right_or_refused_and_the_table_says_which():
    """Over all that Transformers' Auto class knows: what the checks accept is causal, with the model's own logits."""
    found = verdicts()
    assert not {name: verdict for name, verdict in found.items() if verdict.wrong}
    documented = Path(__file__).resolve().parents[1].joinpath("docs", "limits.md").read_text("utf-8")
    listed = dict(re.findall(r"^\| `([^`]+)` \| (.+?) \|", documented, re.M))
    assert listed == {name: verdict.words for name, verdict in found.items() if verdict.words}
