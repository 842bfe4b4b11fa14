"""Decoding with a cache of fixed size makes the tokens that Transformers' own `generate` makes, recorded or not."""

from __future__ import annotations

import copy
import gc
import weakref
from contextlib import contextmanager, nullcontext

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

from architectures import SMALLER
from pretend_gpu import pretend_gpu
from setups import EVALUATION
from stillroom.config import Evaluation, fingerprint
from stillroom.errors import UserError
from stillroom.evaluation import decoding
from stillroom.evaluation.decoding import Fixed, Growing, fixed_cache, require_generation
from stillroom.evaluation.generation import continuations, generate
from stillroom.experiment.sources import Sources
from stillroom.models.architecture import miniature
from stillroom.studies import load_study
from studies import study_file

SIZES = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
CONFIGS = {
    "llama": transformers.LlamaConfig(num_key_value_heads=2, initializer_range=0.3, **SIZES),
    "mistral": transformers.MistralConfig(num_key_value_heads=2, initializer_range=0.3, sliding_window=21, **SIZES),
    "gemma2": transformers.Gemma2Config(
        num_key_value_heads=2, head_dim=8, initializer_range=0.3, sliding_window=30, **SIZES
    ),
    "qwen3": transformers.Qwen3Config(num_key_value_heads=2, head_dim=8, initializer_range=0.3, **SIZES),
    "gpt2": transformers.GPT2Config(vocab_size=96, n_embd=32, n_layer=3, n_head=4, initializer_range=0.3),
    "gpt_neox": transformers.GPTNeoXConfig(initializer_range=0.3, **SIZES),
    "opt": transformers.OPTConfig(ffn_dim=64, init_std=0.3, **{k: v for k, v in SIZES.items() if k[0] != "i"}),
}


@pytest.fixture
def gpu():
    """On which steps are recorded."""
    with pretend_gpu() as gpu:
        yield gpu
    decoding._recording_stream.cache_clear()


@torch.no_grad()
def both(name, limit, count, device="cpu"):
    """The tokens that either decoder makes after three prompts of different lengths."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval().to(device)
    ids, mask = torch.randint(3, 90, (3, 9)).to(device), torch.ones(3, 9, dtype=torch.int64)
    mask[0, :6], mask[2, :1] = 0, 0
    mask = mask.to(device)
    tokenizer = type("Tokenizer", (), {"pad_token_id": 0, "eos_token_id": 1})
    growing, fixed = Growing(model, tokenizer, ids, mask, [1000]), Fixed(model, ids, mask, limit)
    for made in range(0, limit, count):
        expected, found = (decoder.more(min(count, limit - made)) for decoder in (growing, fixed))
    assert expected.shape == found.shape == (3, limit)
    return expected, found


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("count", [5, 1])
def test_a_fixed_cache_makes_the_same_tokens(name, count):
    """Prompts of different lengths, several architectures, looked at often or seldom."""
    expected, found = both(name, 12, count)
    assert torch.equal(found, expected)
    assert len(expected.unique()) > 4


@pytest.mark.parametrize("name", CONFIGS)
def test_a_step_can_be_recorded_and_replayed(name, gpu):
    """As a CUDA graph: no number comes to the host, nothing but fixed memory changes from step to step."""
    expected, found = both(name, 12, 4, "cuda")
    assert torch.equal(found, expected)
    assert gpu.recordings == 1


def test_texts_are_the_same_while_rows_end_and_leave(model, tokenizer, examples, gpu, monkeypatch):
    """Rows that have ended stay until half of them can go; then the step is recorded again."""
    monkeypatch.setattr("stillroom.evaluation.generation._STRETCH", 2)
    model = copy.deepcopy(model).to("cuda")
    prompts = [e for e in examples.train if not e.choices][:9]
    free = generate(model, tokenizer, prompts, Evaluation(max_new_tokens=40))
    stops = tuple(text[place : place + 2] for place, text in enumerate(free[:7]))
    expected = continuations(model, tokenizer, prompts, Evaluation(max_new_tokens=40), stops)
    settings = Evaluation(max_new_tokens=40, static_cache=True)
    assert continuations(model, tokenizer, prompts, settings, stops) == expected
    assert len({len(text) for text, _ in expected}) > 2
    assert gpu.recordings > 1


def test_layers_that_see_a_window_are_refused_by_name():
    """Their cache counts tokens on the host: a recorded step would go on writing to one place."""
    config = transformers.Gemma2Config(num_key_value_heads=2, head_dim=8, sliding_window=20, **SIZES)
    with pytest.raises(UserError, match=r"evaluation\.static_cache: layer 1 of gemma2 does not attend to all of 21"):
        fixed_cache(config, 21)


def test_a_model_whose_windows_its_configuration_hides_is_refused():
    """GPT-Neo's local layers are in no field that the cache asks, and its texts were wrong."""
    config = transformers.GPTNeoConfig(
        vocab_size=96,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=6,
    )
    model = AutoModelForCausalLM.from_config(config)
    ids = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(UserError, match=r"evaluation\.static_cache: GPTNeoForCausalLM does not support it"):
        Fixed(model, ids, ids, 4)


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_dynamic_rope_is_refused_before_it_is_recorded(name):
    """It measures the text on the host at every step, of all layers or of one kind."""
    dynamic = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
    config = (
        transformers.LlamaConfig(rope_parameters=dynamic, **SIZES)
        if name == "llama"
        else transformers.Gemma3TextConfig(
            rope_parameters={"full_attention": dynamic, "sliding_attention": {**dynamic, "rope_type": "default"}},
            layer_types=["full_attention"] * 3,
            head_dim=8,
            num_key_value_heads=2,
            **SIZES,
        )
    )
    ids = torch.ones(1, 3, dtype=torch.int64)
    with pytest.raises(UserError, match="static_cache: dynamic RoPE scaling measures the text at every step"):
        Fixed(AutoModelForCausalLM.from_config(config).eval(), ids, ids, 4)


@pytest.mark.parametrize("inner", [RuntimeError("operation not permitted when stream is capturing"), None])
@torch.no_grad()
def test_a_step_that_cannot_be_recorded_says_so(inner, monkeypatch):
    """In words, with the first cause and not the recording's own end; a lack of memory stays one."""
    inner = inner or torch.OutOfMemoryError("CUDA out of memory")

    @contextmanager
    def recording(*args, **settings):
        assert settings["capture_error_mode"] == "thread_local"
        try:
            yield
        finally:
            raise RuntimeError("capture failed due to a previous error")

    def step():
        try:
            raise KeyError("dealt with")
        except KeyError:
            raise inner from None

    monkeypatch.setattr(torch.cuda, "graph", recording)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(decoding, "_recording_stream", lambda device: device)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: device)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"])).eval()
    ids = torch.ones(1, 3, dtype=torch.int64)
    decoder = Fixed(model, ids, ids, 4)
    monkeypatch.setattr(decoder, "_next", step)
    if isinstance(inner, torch.OutOfMemoryError):
        with pytest.raises(torch.OutOfMemoryError):
            decoder._recorded()
    else:
        message = r"LlamaForCausalLM can be recorded as a CUDA graph \(operation not permitted .*\); leave it out"
        with pytest.raises(UserError, match=message):
            decoder._recorded()


def test_a_study_is_refused_by_its_longest_prompt(tmp_path, teacher_ref, tokenizer):
    """A window narrower than a prompt and its answer is named before anything is captured; a wider one is fine."""
    sizes = {**SIZES, "vocab_size": len(tokenizer)}
    student = transformers.MistralConfig(num_key_value_heads=2, sliding_window=90, **sizes)
    AutoModelForCausalLM.from_config(student).save_pretrained(tmp_path / "student")
    tokenizer.save_pretrained(tmp_path / "student")
    study = study_file(tmp_path, teacher_ref.model, str(tmp_path / "student"))

    def examples_of(max_new_tokens):
        given = ["evaluation.static_cache=true", f"evaluation.max_new_tokens={max_new_tokens}"]
        return Sources(load_study(study, given)).examples

    assert any(not e.choices for e in examples_of(8).validation)
    with pytest.raises(UserError, match=r"static_cache: layer 1 of mistral does not attend to all of \d+ tokens"):
        examples_of(88)


def test_studies_without_it_keep_their_fingerprints():
    """A field that came later is not named at its default."""
    assert "static_cache" not in EVALUATION.model_dump()
    assert fingerprint(EVALUATION) != fingerprint(EVALUATION.model_copy(update={"static_cache": True}))


@torch.no_grad()
def test_a_decoder_leaves_with_its_last_reference():
    """A cache of gigabytes must not wait for the garbage collector while the next batch makes its own."""
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"])).eval()
    ids = torch.ones(1, 3, dtype=torch.int64)
    decoder = Fixed(model, ids, ids, 4)
    decoder.more(4)
    gone = weakref.ref(decoder)
    gc.disable()
    try:
        del decoder
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.parametrize("kind", ["qwen3_next", "falcon_h1", "mamba2", "falcon_mamba", "mistral", "gemma3_text"])
def test_texts_made_in_a_batch_and_in_pieces_are_those_of_plain_passes(kind):
    """Of models with states in place of a cache too: rows leave them, and no text is read twice."""
    sizes = {"hidden_size": 32, "num_heads": 8, "head_dim": 8, "n_groups": 1, "state_size": 8, "chunk_size": 8}
    config = AutoConfig.for_model(kind, **(sizes if kind == "mamba2" else {}))
    for name, size in SMALLER.items():
        if hasattr(config, name):
            setattr(config, name, size)
    require_generation(miniature(config), config)


@pytest.mark.parametrize(("kind", "says"), [("openai-gpt", "cannot write texts"), ("trocr", "are not those it writes")])
def test_a_model_that_cannot_write_in_a_batch_is_refused(kind, says):
    """Before an epoch is trained, and by name."""
    config = AutoConfig.for_model(kind)
    with pytest.raises(UserError, match=says):
        require_generation(miniature(config), config)
