"""Accuracy against brute force; batch size and padding change no prediction."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from itertools import islice

import pytest
import torch
import transformers
from tokenizers import processors
from transformers import AutoModelForCausalLM

from pretend_gpu import pretend_gpu
from setups import EVALUATION
from small_things import SHARED, STUDENT_SHAPE, real_tokenizer, write_model
from stillroom.analysis.frame import worse_or_equal
from stillroom.config import Evaluation, ModelRef, TaskColumns, TaskData, fingerprint
from stillroom.data.chat_templates import encode_prompts
from stillroom.data.encoding import encode
from stillroom.data.rows import load_rows
from stillroom.data.tasks import TASKS, Example, get_task
from stillroom.errors import UserError
from stillroom.evaluation.baselines import Baseline
from stillroom.evaluation.generation import continuations, generate, prompts_at_once
from stillroom.evaluation.scoring import _prediction, answer_scores, evaluate
from stillroom.models.architecture import PROBE, miniature
from stillroom.models.forward import padded
from stillroom.models.hub import load_model
from stillroom.models.precision import DTYPES, scored_by_parts
from stillroom.models.split_products import SplitLinear, can_be_split, scoring_copy, split_products


def log_likelihood(ref, tokenizer, prompt, answer):
    """Sum of the answer's token log-probabilities, one sequence alone, eager."""
    model = AutoModelForCausalLM.from_pretrained(ref.model, attn_implementation="eager").eval()
    encoding = encode(tokenizer, prompt + answer)
    with torch.no_grad():
        logprobs = model(torch.from_numpy(encoding.ids.astype("int64"))[None]).logits[0].log_softmax(-1)
    places = [t for t in range(1, len(encoding)) if encoding.ends[t] > len(prompt)]
    return sum(float(logprobs[t - 1, encoding.ids[t]]) for t in places)


def test_choices_are_scored_by_the_likelihood_of_their_text(student_ref, model, tokenizer, examples):
    """Shared prefixes and batching are only faster; scores are those of each choice on its own."""
    some = [e for e in examples.all if e.choices][::6]
    scores, _ = answer_scores(model, tokenizer, some, 400)
    for example, found in zip(some, scores, strict=True):
        expected = [log_likelihood(student_ref, tokenizer, example.prompt, choice) for choice in example.choices]
        assert found == pytest.approx(expected, abs=2e-4)


@pytest.mark.parametrize(("batch_tokens", "batch_size"), [(1, 1), (150, 3), (100_000, 64)])
def test_batch_size_and_padding_change_no_prediction(model, tokenizer, examples, batch_tokens, batch_size):
    """Scores, generated text and verdicts are the same one by one and all at once."""
    reference = evaluate(model, tokenizer, examples.validation, Evaluation(max_new_tokens=16))
    settings = Evaluation(max_new_tokens=16, batch_tokens=batch_tokens, generation_batch_size=batch_size)
    found = evaluate(model, tokenizer, examples.validation, settings)
    for column in ("example_id", "prediction", "correct", "generated"):
        assert found[column].equals(reference[column])


def real_examples(count):
    """The first rows of the real tasks where they lie beside the checkout, else rows of the built-in ones."""
    splits = {"sst2": "validation", "mmlu": "validation", "gsm8k": "test"}
    if not all((SHARED / "data" / name / f"{split}.parquet").is_file() for name, split in splits.items()):
        return [
            TASKS[n].build(row) for n in ("sentiment", "quiz", "arithmetic") for row in TASKS[n].generate_rows(3, count)
        ]
    found = []
    for name, split in splits.items():
        data = TaskData(dataset=str(SHARED / "data" / name), split=split, examples=count)
        found += [TASKS[name].build(row) for row in islice(load_rows(TASKS[name], data, 0, name), count)]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mistral-7b-v0.1", "tinyllama-1.1b", "smollm2-135m", "qwen2.5-coder-0.5b"])
def test_batch_size_and_padding_change_no_prediction_under_real_tokenizers(tmp_path, name):
    """Left and right padding, shared prefixes, batch mates: with BOS and without, with a pad token and without."""
    real = real_tokenizer(name)
    model = load_model(write_model(tmp_path, real, STUDENT_SHAPE, 6))
    some = real_examples(6)
    alone = evaluate(model, real, some, Evaluation(max_new_tokens=8, batch_tokens=1, generation_batch_size=1))
    assert alone["scores"].dropna().map(lambda scores: scores[1] - scores[0]).std() > 0.05  # the prompt matters
    assert alone["generated"].dropna().nunique() > 1
    for batch_tokens, size in ((400, 2), (100_000, 64)):
        settings = Evaluation(max_new_tokens=8, batch_tokens=batch_tokens, generation_batch_size=size)
        found = evaluate(model, real, some, settings)
        for column in ("example_id", "prediction", "gold", "correct", "correct_flexible", "generated"):
            assert found[column].equals(alone[column]), column
        for together, single in zip(found["scores"].dropna(), alone["scores"].dropna(), strict=True):
            assert together == pytest.approx(single, abs=1e-3)


@pytest.mark.parametrize("stretch", [16, 4, 1])
def test_generation_is_greedy_decoding(student_ref, model, tokenizer, examples, stretch, monkeypatch):
    """Against a loop of argmax over whole forward passes, without a cache, whenever ended texts leave the batch."""
    prompts = [e for e in examples.train if not e.choices][:8]
    plain = AutoModelForCausalLM.from_pretrained(student_ref.model, attn_implementation="eager").eval()
    monkeypatch.setattr("stillroom.evaluation.generation._STRETCH", stretch)
    free = generate(model, tokenizer, prompts, Evaluation(max_new_tokens=10))
    ends_early = copy.deepcopy(tokenizer)
    said = [set(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in free]
    ending = max(set.union(*said), key=lambda token: 2 * sum(token in ids for ids in said) % (2 * len(said) - 1))
    ends_early.eos_token = tokenizer.convert_ids_to_tokens(ending)  # so that some of the texts end early
    texts = generate(model, ends_early, prompts, Evaluation(max_new_tokens=10))
    assert len({len(tokenizer(text)["input_ids"]) for text in texts}) > 1
    for reader, found in ((tokenizer, free), (ends_early, texts)):
        for prompt, text in zip(prompts, found, strict=True):
            ids = reader(prompt.prompt, return_tensors="pt")["input_ids"]
            start = ids.shape[1]
            for _ in range(10):
                with torch.no_grad():
                    ids = torch.cat([ids, plain(ids).logits[:, -1:].argmax(-1)], 1)
                if ids[0, -1] == reader.eos_token_id:
                    break
            expected = reader.decode(ids[0, start:], skip_special_tokens=True)
            assert text == expected.split("Question:")[0]


def test_a_models_own_generation_settings_do_not_count(model, tokenizer, examples):
    """A checkpoint's sampling or repetition penalty must not leak into greedy evaluation."""
    prompts = [e for e in examples.validation if not e.choices]
    plain = generate(model, tokenizer, prompts, Evaluation(max_new_tokens=12))
    model.generation_config.repetition_penalty, model.generation_config.do_sample = 5.0, True
    try:
        assert generate(model, tokenizer, prompts, Evaluation(max_new_tokens=12)) == plain
    finally:
        model.generation_config.repetition_penalty, model.generation_config.do_sample = 1.0, False


@pytest.mark.parametrize("stretch", [16, 5, 1])
def test_a_text_ends_where_another_question_begins_and_not_before(model, tokenizer, examples, stretch, monkeypatch):
    """Whenever texts are looked at, those that go on are the same, and the others are cut at the same place."""
    prompts, settings = [e for e in examples.train if not e.choices][:6], Evaluation(max_new_tokens=14)
    free = generate(model, tokenizer, prompts, settings)
    marker = next(text[n : n + 2] for text in free for n in range(6, len(text) - 2) if text.count(text[n : n + 2]) == 1)
    monkeypatch.setattr("stillroom.evaluation.generation._STRETCH", stretch)
    expected = [text.split(marker)[0] for text in free]
    assert expected != free
    stop = (marker, "a text that is nowhere")
    assert [text for text, _ in continuations(model, tokenizer, prompts, settings, stop)] == expected


def test_a_gpu_continues_hundreds_of_prompts_at_once_unless_the_study_says_otherwise():
    """It takes a GPU no longer; texts do not depend on it, so neither a trial's name nor a CPU's memory may."""
    by_default, chosen = Evaluation(), Evaluation(generation_batch_size=32)
    assert [prompts_at_once(by_default, device) for device in ("cpu", "cuda")] == [32, 256]
    assert [prompts_at_once(chosen, device) for device in ("cpu", "cuda")] == [32, 32]
    assert fingerprint(by_default) == fingerprint(chosen)


def test_a_teacher_with_nothing_to_give_is_called_out():
    """Equal is not better."""
    teacher, student = (
        [
            {"split": "validation", "task": task, "measure": "accuracy", "value": value}
            for task, value in zip((None, "a", "b"), values, strict=True)
        ]
        for values in ((0.9, 0.5, 0.9), (0.5, 0.5, 0.4))
    )
    assert worse_or_equal(teacher, student) == ["a"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_product_of_parts_is_as_near_to_the_truth_as_one_in_float32(dtype, bias):
    """Against float64, for rows of any size and range; a single 16-bit product is a thousand times off."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(512, 64, bias=bias)
    linear.weight.data = linear.weight.data.to(dtype).float()
    x = torch.randn(3, 40, 512) * torch.logspace(-12, 6, 40)[:, None] * torch.rand(3, 40, 512) ** 4
    exact = torch.nn.functional.linear(
        x.double(), linear.weight.double(), linear.bias.double() if bias else None
    ).detach()

    def off(found):
        return float(((found.double() - exact).norm(dim=-1) / exact.norm(dim=-1)).max())

    with torch.no_grad():
        ours, plain = SplitLinear(linear, dtype)(x), linear(x)
        rounded = torch.nn.functional.linear(x.to(dtype).float(), linear.weight, linear.bias)
    assert ours.dtype == torch.float32
    assert SplitLinear(linear, dtype)(x[:, :0]).shape == (3, 0, 64)  # such as an expert that no token chose
    assert off(ours) < 2 * off(plain)
    assert not off(rounded) < 200 * off(ours)  # nor a number, where float16 overflows


@pytest.mark.parametrize("saved", ["float16", "bfloat16"])
def test_students_scored_by_parts_answer_as_in_float32(student_ref, tokenizer, examples, saved):
    """As on a GPU, where alone it is done: log-likelihoods within float32's own rounding, the same texts."""
    trained = load_model(student_ref)
    plain, parts = (scoring_copy(trained, saved, "float32") for _ in range(2))
    parts = split_products(parts, DTYPES[saved])
    assert not any(isinstance(module, torch.nn.Linear) for module in parts.modules())
    reference, found = (
        evaluate(m, tokenizer, examples.validation, Evaluation(max_new_tokens=8)) for m in (plain, parts)
    )
    assert found["generated"].equals(reference["generated"])
    assert found["prediction"].equals(reference["prediction"])
    assert found["answer_nll"].to_numpy() == pytest.approx(reference["answer_nll"].to_numpy(), abs=2e-5)
    assert [scored_by_parts(saved, "float32", device) for device in ("cuda", "cpu")] == [True, False]
    assert not scored_by_parts("float32", "float32", "cuda")


@pytest.mark.parametrize(
    ("kind", "can"),
    [
        (transformers.LlamaConfig, True),
        (transformers.Gemma2Config, True),
        (transformers.GPT2Config, True),  # linear layers of its own kind, which stay as they are
        (transformers.PhimoeConfig, True),  # a router with a forward pass of its own
        (transformers.Llama4TextConfig, True),
        (transformers.MambaConfig, False),  # it multiplies by its layers' weights itself
        (transformers.JambaConfig, False),
        (transformers.Gemma3nTextConfig, False),  # no miniature to try it on
    ],
)
def test_a_student_is_scored_by_parts_only_where_its_architecture_allows(kind, can):
    """Else the first evaluation of a trial on a GPU broke off, with an error of PyTorch's."""
    assert [can_be_split(kind(), dtype) for dtype in (torch.bfloat16, torch.float16)] == [can, can]


def test_rounding_in_what_chooses_tokens_is_seen():
    """DeepSeek-V3.2 casts to its layer's dtype where it chooses the tokens to look at, which a short text hides."""
    assert not can_be_split(transformers.DeepseekV32Config(), torch.bfloat16)


def test_every_student_can_be_scored_on_a_gpu():
    """By parts, or else as it is."""
    for config, by_parts in ((transformers.LlamaConfig(), True), (transformers.MambaConfig(), False)):
        with pretend_gpu(), torch.no_grad():
            scored = scoring_copy(miniature(config).to("cuda"), "bfloat16", "float32")
            assert any(isinstance(module, SplitLinear) for module in scored.modules()) == by_parts
            assert scored(input_ids=PROBE.to("cuda"), use_cache=False).logits.isfinite().all()


def test_a_layer_that_rounds_to_its_weights_is_not_scored_by_parts(monkeypatch):
    """As hy_v4's does: off by more than float32's rounding, and without an error."""

    class Rounding(SplitLinear):
        def forward(self, x):
            return super().forward(x.to(self.weight.dtype))

    monkeypatch.setattr("stillroom.models.split_products.SplitLinear", Rounding)
    assert not can_be_split(transformers.LlamaConfig(), torch.bfloat16)


@pytest.mark.parametrize("saved", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_scored_is_what_is_saved(student_ref, examples, tokenizer, tmp_path, saved, dtype):
    """A trained student scores as its checkpoint does once loaded: weights rounded alike, rotary frequencies not."""
    trained = load_model(student_ref, "float32")
    scored = scoring_copy(trained, saved, dtype)
    trained.to(DTYPES[saved]).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_model(ModelRef(model=str(tmp_path)), dtype)
    ids = torch.tensor([tokenizer(example.text).input_ids[:20] for example in examples.validation[:2]])
    with torch.no_grad():
        assert torch.equal(scored(ids).logits, loaded(ids).logits)
    assert all(p.dtype == DTYPES[dtype] for p in scored.parameters())


def appending(tokenizer, content):
    """The tokenizer with a template that ends every text in EOS."""
    twin = copy.deepcopy(tokenizer)
    twin.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=content, special_tokens=[(t, tokenizer.convert_tokens_to_ids(t)) for t in ("<s>", "</s>")]
    )
    return twin


def test_a_tokenizer_that_appends_eos_is_continued_where_the_prompt_ends(model, tokenizer):
    """Generation began after EOS, and said something else."""
    settings = Evaluation(max_new_tokens=8)
    prompts = [Example("gsm8k", prompt, "") for prompt in ("Review: the film was fresh\nMood:", "Which is a fruit?")]
    appended = appending(tokenizer, "<s> $A </s>")
    assert encode(appended, prompts[0].text).ids[-1] == tokenizer.eos_token_id
    assert generate(model, appended, prompts, settings) == generate(model, tokenizer, prompts, settings)


def test_a_generation_stops_at_every_eos_that_the_model_names(student_ref, tokenizer):
    """` 5` and then `<|eot|>` gave ` 5 7`: only the tokenizer's own EOS ended a text."""
    model, prompts, settings = (
        load_model(student_ref),
        [Example("gsm8k", "Which is a fruit?", "")],
        Evaluation(max_new_tokens=12),
    )
    (plain,) = generate(model, tokenizer, prompts, settings)
    made = tokenizer(plain, add_special_tokens=False)["input_ids"]
    ids, mask = padded(encode_prompts(tokenizer, prompts))
    greedy = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()
    other = next(i for i in greedy[2:] if i not in greedy[:2])
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, other]
    (cut,) = generate(model, tokenizer, prompts, settings)
    assert cut == tokenizer.decode(greedy[: greedy.index(other)], skip_special_tokens=True)
    assert len(cut) < len(plain)
    assert made


@pytest.mark.parametrize("stretch", [16, 1])
def test_a_text_ends_at_a_stop_that_is_a_special_token(model, tokenizer, examples, stretch, monkeypatch):
    """`<|im_end|>` as a stop: an answer's text leaves special tokens out, so what followed it stayed in."""
    prompts, settings = [e for e in examples.train if not e.choices][:6], Evaluation(max_new_tokens=14)
    free = [encode(tokenizer, text).ids.tolist() for text in generate(model, tokenizer, prompts, settings)]
    ending = next(i for i in free[0][3:] if i not in free[0][:3] and tokenizer.convert_ids_to_tokens(i).startswith("▁"))
    marked, stop = copy.deepcopy(tokenizer), tokenizer.convert_ids_to_tokens(ending)
    marked.add_special_tokens({"additional_special_tokens": [stop]})
    monkeypatch.setattr("stillroom.evaluation.generation._STRETCH", stretch)
    cut = continuations(model, marked, prompts, settings, (stop,))
    plain = copy.deepcopy(tokenizer)
    plain.eos_token = stop  # which ends a text in any case
    assert cut == continuations(model, plain, prompts, settings, ())
    assert cut[0][1]


def test_an_answer_without_a_token_of_its_own_is_refused(model, sentencepiece):
    """It scored 0.0, as if certain, and won: a tokenizer that strips leaves nothing of an empty choice."""
    example = Example("animals", "Name one:", " dog", (" dog", "", " fox"), 0)
    with pytest.raises(UserError, match=r"\(animals\): the tokenizer has no token of its own for the answer ''"):
        answer_scores(model, sentencepiece, [example], 1000)


def test_a_choice_is_the_likelier_text_whatever_its_length():
    """The harness's `acc`, not its `acc_norm`; kept beside it: the gold answer's own likelihood, right or wrong."""
    example = Example("sst2", "A film.\nAnswer:", " rather a long one", (" bad", " rather a long one"), 1)
    found = _prediction(example, [-5.0, -9.0], 4, None)
    assert (found["prediction"], found["gold"], found["correct"]) == ("bad", "rather a long one", False)
    assert (found["scores"], found["answer_nll"], found["answer_tokens"]) == ([-5.0, -9.0], 9.0, 4)
    assert _prediction(example, [-9.0, -8.0], 4, None)["correct"]


def test_a_baseline_is_kept_only_for_the_very_same_measurement(tmp_path, model, tokenizer, examples):
    """Model, dtype, settings, examples: with one of them changed, it is not known."""
    choice_examples = [e for e in examples.validation if e.choices]
    first = Baseline(tmp_path, "student", "validation", "m", "float32", choice_examples[:2], EVALUATION)
    assert first.read() is None
    assert first.measure(model, tokenizer) == first.read()
    other = EVALUATION.model_copy(update={"max_new_tokens": 13})
    for other_way in (
        {"identity": "n"},
        {"settings": other},
        {"precision": "bfloat16"},
        {"examples": choice_examples[:3]},
    ):
        assert replace(first, **other_way).read() is None, other_way
    shutil.copy(first.path, tmp_path / "student_test.json")
    assert replace(first, split="test").read() is None


def test_what_a_model_writes_after_the_next_question_does_not_count(model, tokenizer, monkeypatch):
    """Its continuation ends where another question begins, as the harness's does."""

    def write(ids, **_):
        text = tokenizer(" 3+4 = 7\n#### 7\nQuestion: 8", add_special_tokens=False, return_tensors="pt")["input_ids"]
        return torch.cat([ids, text.expand(len(ids), -1)], 1)

    monkeypatch.setattr(model, "generate", write)
    (text,) = generate(model, tokenizer, [Example("gsm8k", "Question: 3+4?\nAnswer:", "")], EVALUATION)
    assert "#### 7" in text
    assert "Question" not in text
    assert "8" not in text


def test_a_score_that_is_no_number_is_no_answer(model, tokenizer, examples):
    """NaN compares as false with everything: the first choice would be taken, and often be right."""
    chosen = [example for example in examples.all if example.choices][:2]
    damaged = copy.deepcopy(model)
    damaged.lm_head.weight.data[:] = float("nan")
    with pytest.raises(UserError, match=rf"{chosen[0].example_id}.*NaN or infinite"):
        evaluate(damaged, tokenizer, chosen, EVALUATION)


def test_a_flexible_reading_is_compared_with_that_of_the_gold():
    """Whoever is right strictly is right flexibly: `Paris` in lower case was another answer than `Paris`."""
    for pattern, gold, right, wrong in (
        (None, "Paris", (" Paris", "paris.", "PARIS!"), ("London",)),
        (None, "U.S.A.", (" U.S.A.",), ("UK",)),
        (r"(\d+)", "2+3=5", ("2+3=5", "so 5"), ("2 and 4",)),
    ):
        columns = TaskColumns(generation={"prompt": "{q}", "answer": "{a}", "pattern": pattern})
        row = get_task("mine", columns).build({"q": "?", "a": gold})
        for text in (*right, *wrong):
            assert _prediction(row, [0.0], 1, text)["correct_flexible"] == (text in right), (gold, text)
