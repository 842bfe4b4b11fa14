"""The doctor's lines: each cause of a wasted night is seen beforehand, and its line says what to do."""

from __future__ import annotations

import json
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import transformers
from huggingface_hub.errors import GatedRepoError, OfflineModeIsEnabled
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    Gemma2Config,
    GPTNeoConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
    T5Config,
)
from typer.testing import CliRunner

from pretend_gpu import pretend_gpu
from small_things import STUDENT_SHAPE
from stillroom.cli import app
from stillroom.cli.printing import print_findings
from stillroom.config import ModelRef, fingerprint
from stillroom.errors import UserError
from stillroom.experiment.workspace import Workspace
from stillroom.models import architecture
from stillroom.models.architecture import miniature
from stillroom.models.precision import native_bfloat16, resolve_precision
from stillroom.preflight import accelerator, doctor
from stillroom.preflight.planning import plan_study
from stillroom.studies import load_study

FEW = [f"corpus.tasks.{task}.examples=60" for task in ("sentiment", "quiz", "arithmetic")]
FEW += [f"evaluation.test_splits.{task}.examples=20" for task in ("sentiment", "quiz", "arithmetic")]
ABLE = ["sweep.seeds=[0, 1, 2, 3, 4, 5, 6]", "analysis.equivalence_margin=0.2"]


@pytest.fixture
def study(teacher_ref, student_ref):
    """The quickstart's tasks, a few examples each, with the test pair and seeds enough for its contrasts."""
    pair = [f"teacher.model={teacher_ref.model}", f"student.model={student_ref.model}"]
    return load_study("quickstart", [*pair, *FEW, *ABLE])


@pytest.fixture
def no_services(monkeypatch):
    """The tracker is not started."""
    monkeypatch.setattr("stillroom.experiment.mlflow_runs.MLflowRuns.check_beforehand", lambda self: None)


def line(findings, subject):
    """The finding of that subject."""
    return next(finding for finding in findings if finding.subject == subject)


def test_a_sound_study_has_no_line_to_do(study, no_services):
    """Every subject of the issue is there."""
    findings = doctor.examine(study)
    assert [finding for finding in findings if not finding.fine or finding.warning] == []
    assert {finding.subject for finding in findings} == {
        "packages",
        "precision",
        "teacher",
        "teacher's weights",
        "teacher's architecture",
        "student",
        "student's weights",
        "student's architecture",
        "tokenizers",
        "coverage",
        "data",
        "design",
        "disk for teacher data",
        "disk for students",
        "accelerator",
        "memory for a capture",
        "memory for a trial",
        "tracker",
        "local sweep",
    }


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**STUDENT_SHAPE),
        MistralConfig(num_attention_heads=32, num_key_value_heads=8, sliding_window=4),
        Qwen2Config(num_attention_heads=14, num_key_value_heads=2, tie_word_embeddings=True),
        Qwen3Config(num_attention_heads=16, num_key_value_heads=8),
        Gemma2Config(num_attention_heads=8, num_key_value_heads=4),
        Phi3Config(num_attention_heads=8, num_key_value_heads=8),
    ],
    ids=lambda config: config.model_type,
)
def test_an_architecture_is_tried_in_little(config):
    """Really run and compared with its own attention, not looked up in a list."""
    found = doctor._architecture("student", config, captured=True)
    assert (found.fine, "as its own code computes it" in found.says) == (True, True), found.says


def test_an_architecture_captured_wrongly_is_refused(monkeypatch):
    """Where the check before a capture would refuse, the doctor does."""
    monkeypatch.setitem(architecture._TOLERANCE, torch.float32, 0.0)
    found = doctor._architecture("student", LlamaConfig(**STUDENT_SHAPE), captured=True)
    assert not found.fine
    assert "choose another model" in found.says
    assert not doctor._architecture("student", T5Config(), captured=False).fine
    assert not doctor._architecture("student", BertConfig(is_decoder=False), captured=False).fine


UNSUPPORTED = {
    "mpt": lambda size: transformers.MptConfig(d_model=32, n_layers=2, n_heads=4, **size),
    "mamba": lambda size: transformers.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=4, **size),
    "falcon": lambda size: transformers.FalconConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, **size
    ),
    "gpt_neo": lambda size: transformers.GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], **size
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", UNSUPPORTED)
@pytest.mark.parametrize("role", ["teacher", "student"])
def test_what_is_refused_is_refused_by_the_doctor_and_before_the_teacher_runs(
    name, role, tmp_path, study, no_services, byte_level
):
    """Each ended in a traceback, or loaded nowhere after the doctor had said that all was well."""
    config = UNSUPPORTED[name]({"vocab_size": len(byte_level), "bos_token_id": 0, "eos_token_id": 0})
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path / name)
    byte_level.save_pretrained(tmp_path / name)
    refused = load_study(
        "quickstart",
        [
            f"teacher.model={tmp_path / name if role == 'teacher' else study.teacher.model}",
            f"student.model={tmp_path / name if role == 'student' else study.student.model}",
            f"paths.results={tmp_path / 'results'}",
            f"paths.store={tmp_path / 'store'}",
            *FEW,
        ],
    )
    found = [finding for finding in doctor.examine(refused) if not finding.fine]
    assert any(type(model).__name__ in finding.says for finding in found), found
    with pytest.raises(UserError, match=type(model).__name__):
        Workspace(refused).fine_tune()
    assert not (tmp_path / "results" / "teacher").exists()


def test_a_tokenizer_that_knows_more_than_its_model_is_refused_beforehand(tmp_path, study, no_services, student_ref):
    """An EOS beyond the embedding: the teacher ran, was verified and archived, and then training crashed."""
    shutil.copytree(student_ref.model, tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(student_ref.model)
    tokenizer.add_special_tokens({"eos_token": "<|end|>"})
    tokenizer.save_pretrained(tmp_path / "model")
    places = [f"paths.results={tmp_path / 'results'}", f"paths.store={tmp_path / 'store'}", *FEW]
    refused = load_study(
        "quickstart", [f"teacher.model={study.teacher.model}", f"student.model={tmp_path / 'model'}", *places]
    )
    assert "'<|end|>'" in line(doctor.examine(refused), "tokenizers").says
    with pytest.raises(UserError, match=r"gives the id \d+ \('<\|end\|>'\), but the model has \d+ embeddings"):
        Workspace(refused).capture()
    assert not (tmp_path / "store").exists()


def test_auto_is_resolved_once_and_is_part_of_what_a_study_is(study, tmp_path, monkeypatch):
    """bfloat16 where the device multiplies it natively, else float32; never `auto` in what a run is known by."""
    asked = load_study(
        "quickstart",
        [
            *(f"{field}=auto" for field in ("teacher.dtype", "training.precision", "evaluation.dtype")),
            "teacher.fine_tune.training.precision=auto",
            f"paths.results={tmp_path}",
        ],
    )
    found = {}
    for native, chosen in ((True, "bfloat16"), (False, "float32")):
        monkeypatch.setattr("stillroom.models.precision.native_bfloat16", lambda device=None, native=native: native)
        resolved = Workspace(asked).study
        assert {resolved.teacher.dtype, resolved.training.precision, resolved.evaluation.dtype} == {chosen}
        assert resolved.teacher.fine_tune.training.precision == chosen
        assert '"auto"' not in resolved.model_dump_json()
        found[chosen] = fingerprint(resolved.training)
    assert len(set(found.values())) == 2
    explicit = Workspace(load_study("quickstart", [f"paths.results={tmp_path}"])).study
    assert explicit.training.precision == "float32"


@pytest.mark.parametrize(
    ("flags", "native"),
    [("flags : fpu avx2 f16c", False), ("flags : avx512f avx512_bf16", True), ("Features : fp asimd bf16", True)],
)
def test_native_bfloat16_is_told_by_the_processors_instructions(flags, native, monkeypatch):
    """Deterministic, so that a study resumes as what it began: a measurement could fall either way."""
    monkeypatch.setattr("pathlib.Path.read_text", lambda *a, **k: flags)
    assert native_bfloat16(torch.device("cpu")) == native


def test_auto_is_the_dtype_of_the_device_that_trains(monkeypatch):
    """Trials on CPUs beside a GPU: bfloat16 there takes many times as long, where the processor has no units for it."""
    fields = ("teacher.dtype", "training.precision", "evaluation.dtype", "teacher.fine_tune.training.precision")
    study = load_study("small", [f"{field}=auto" for field in fields])
    monkeypatch.setattr("pathlib.Path.read_text", lambda *a, **k: "flags : fpu avx2 f16c")
    for gpus, of_trials in ((1, "bfloat16"), (0, "float32")):
        asked = study.model_copy(update={"sweep": study.sweep.model_copy(update={"gpus_per_trial": gpus})})
        with pretend_gpu():
            found = resolve_precision(asked)
        assert found.teacher.dtype == found.teacher.fine_tune.training.precision == "bfloat16"
        assert found.training.precision == found.evaluation.dtype == of_trials


def test_a_design_that_can_give_no_verdict_is_seen_before_it_is_run(study, no_services, capsys):
    """Six seeds cannot reach 0.05 over three contrasts: every question would end undecided, hours later.

    It is a warning: a pilot may run all the same.
    """
    assert not line(doctor.examine(study), "design").warning
    few = study.model_copy(update={"sweep": study.sweep.model_copy(update={"seeds": (0, 1, 2, 3, 4, 5)})})
    found = line(doctor.examine(few), "design")
    assert (found.fine, found.warning) == (True, True)
    assert "it takes 7 seeds" in found.says
    print_findings([found])
    assert capsys.readouterr().out.startswith("warn design: ")


def test_a_dtype_that_the_device_emulates_is_warned_of(study, monkeypatch):
    """Fifty times slower, with no word said: a trial of 32 examples took over ten minutes."""
    rates = {torch.float32: 60.0, torch.bfloat16: 1.0, torch.float16: 0.5}
    monkeypatch.setattr(doctor, "products", lambda dtype, device: rates[dtype])
    explicit = study.model_copy(update={"training": study.training.model_copy(update={"precision": "bfloat16"})})
    (found,) = doctor._precision(explicit)
    assert not found.fine
    assert "training.precision=bfloat16" in found.says
    auto = study.model_copy(update={"training": study.training.model_copy(update={"precision": "auto"})})
    assert all(finding.fine for finding in doctor._precision(auto))


def test_missing_weights_are_seen(tmp_path, student_ref):
    """A folder with a config and no weights would fail an hour later."""
    AutoConfig.from_pretrained(student_ref.model).save_pretrained(tmp_path)
    assert not doctor._weights("student", ModelRef(model=str(tmp_path))).fine
    assert doctor._weights("student", student_ref).fine


@pytest.mark.parametrize(
    ("error", "fine", "says"),
    [
        (None, True, "may read them"),
        (GatedRepoError, False, "HF_TOKEN"),
        (OfflineModeIsEnabled, False, "use a local directory"),
    ],
)
def test_hub_access_and_gate_are_asked_for(monkeypatch, error, fine, says):
    """Not only whether the small files are cached, but whether the weights can be had."""

    def answer(*_, **__):
        if error is not None:
            response = SimpleNamespace(headers={}, status_code=403, request=None, text="")
            raise error("no", response=response) if error is GatedRepoError else error("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: "/nowhere")
    monkeypatch.setattr("huggingface_hub.auth_check", answer)
    found = doctor._weights("teacher", ModelRef(model="some/model"))
    assert (found.fine, says in found.says) == (fine, True), found.says


def test_low_coverage_is_measured_and_refused(study, no_services):
    """On a sample of the study's own texts, task by task, before a token is trained."""
    strict = study.model_copy(update={"signals": study.signals.model_copy(update={"minimum_coverage": 0.99})})
    found = line(doctor.examine(strict), "coverage")
    assert not found.fine
    assert "sentiment" in found.says
    assert "arithmetic" in found.says


def test_room_is_asked_for_both_folders_where_they_share_a_disk(study, monkeypatch, tmp_path):
    """Each alone would fit; together, with what running trials hold for a while, they do not."""
    paths = study.paths.model_copy(update={"results": tmp_path / "results", "store": tmp_path / "store"})
    study = study.model_copy(update={"paths": paths})
    monkeypatch.setattr(doctor, "_at_once", lambda study: 3)
    plan = plan_study(study)
    disk, store = plan["disk_bytes"], plan["store_bytes"]["total"]
    students = disk["checkpoints"] + 3 * disk["more_while_a_trial_runs"]
    assert disk["more_while_a_trial_runs"] > 0
    for free, fine in ((store + students - 1, False), (store + students + 1, True)):
        monkeypatch.setattr("shutil.disk_usage", lambda path, free=free: SimpleNamespace(free=free))
        assert [finding.fine for finding in doctor._disk(study, plan)] == [fine, fine]


@pytest.mark.parametrize(
    ("gpus", "cores", "sweep", "expected"),
    [
        (0, 8, {"cpus_per_trial": 2}, 4),
        (0, 8, {"cpus_per_trial": 2, "max_concurrent": 3}, 3),
        (0, 64, {"cpus_per_trial": 1, "seeds": (0,)}, 5),
        (1, 8, {"gpus_per_trial": 1, "max_concurrent": 8}, 1),
        (2, 8, {"gpus_per_trial": 0.5, "cpus_per_trial": 1}, 4),
        (1, 8, {"gpus_per_trial": 2}, 1),
    ],
)
def test_trials_at_once_are_those_there_are_and_that_fit(study, monkeypatch, gpus, cores, sweep, expected):
    """Room for more would be asked for in vain."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(doctor, "cores", lambda: cores)
    assert doctor._at_once(study.model_copy(update={"sweep": study.sweep.model_copy(update=sweep)})) == expected


def test_memory_is_held_against_the_plan(study, monkeypatch):
    """GPUs too small for the teacher in all, or for a trial alone, each with its own remedy."""
    plan = plan_study(study)
    capture, trial = plan["memory_bytes"]["capture"], plan["memory_bytes"]["trial"]

    def gpus(*sizes):
        monkeypatch.setattr(torch.cuda, "device_count", lambda: len(sizes))
        monkeypatch.setattr(
            torch.cuda, "get_device_properties", lambda i: SimpleNamespace(name="GPU", total_memory=sizes[i])
        )
        return {f.subject.split()[-1]: f.fine for f in doctor._memory(study, plan) if f.subject.startswith("memory")}

    assert gpus(2 * max(capture, trial)) == {"capture": True, "trial": True}
    assert gpus(0.6 * capture, 0.6 * capture)["capture"]
    assert not gpus(0.6 * capture)["capture"]
    assert not gpus(2 * trial, 0.9 * trial)["trial"]
    half = study.sweep.model_copy(update={"gpus_per_trial": 0.5})
    study = study.model_copy(update={"sweep": half})
    assert not gpus(1.5 * trial)["trial"]


@pytest.mark.parametrize("gpus", [0, 4])
def test_the_cpus_memory_must_hold_what_a_sharded_trials_processes_keep_there(study, monkeypatch, gpus):
    """On a CPU beside the trial itself, on GPUs alone; one finding names it where there is too little."""
    study = study.model_copy(update={"sweep": study.sweep.model_copy(update={"gpus_per_trial": 2.0})})
    plan = plan_study(study)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(doctor, "cores", lambda: 8 if gpus else 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(name="GPU", total_memory=10**12))
    kept, trial = plan["memory_bytes"]["trial_in_cpu_memory"], plan["memory_bytes"]["trial"]
    needed = 2 * kept if gpus else kept + 4 * trial  # two trials on four GPUs
    for memory, fine in ((0.9 * needed, False), (1.1 * needed, True)):
        monkeypatch.setattr(doctor, "hardware", lambda memory=memory: {"memory_bytes": int(memory)})
        found = [f for f in doctor._memory(study, plan) if f.subject.startswith("memory for a trial")]
        assert found[-1].fine == fine, found
        assert ("in cpu memory" in found[-1].subject) == bool(gpus)


def test_a_study_for_gpus_is_not_begun_on_a_cpu():
    """By the plan's hours, whatever its name."""
    study = load_study("paper", ["name=mine"])
    assert not next(doctor._memory(study, plan_study(study))).fine


def test_a_tracker_or_ray_that_does_not_start_is_a_line(study, monkeypatch):
    """Found now, not after the capture."""

    def refuse(*_):
        raise UserError("nobody answers\nat all")

    monkeypatch.setattr("stillroom.experiment.ray_sweep.describe_cluster", refuse)
    monkeypatch.setattr("stillroom.experiment.mlflow_runs.MLflowRuns.check_beforehand", refuse)
    on_ray = study.model_copy(update={"sweep": study.sweep.model_copy(update={"launcher": "ray"})})
    for found in (doctor._launcher(on_ray), *doctor._trackers(study)):
        assert not found.fine
        assert "nobody answers" in found.says
        assert "at all" not in found.says


def test_a_damaged_file_of_the_tracker_is_seen_by_the_doctor(study, tmp_path):
    """It is the study's own that is looked at; a run would meet it after the capture."""
    relocated = study.model_copy(update={"paths": study.paths.model_copy(update={"results": tmp_path})})
    assert next(doctor._trackers(relocated)).fine
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mlflow.db").write_bytes(b"no database at all" * 100)
    assert "not a database" in next(doctor._trackers(relocated)).says


def test_the_command_fails_when_there_is_something_to_do(no_services, tmp_path):
    """Exit code 1 and JSON for a script; the text ends with what to do."""
    study = ["quickstart", "--set", "student.model=./nowhere"]
    told = CliRunner().invoke(app, ["doctor", *study])
    assert told.exit_code == 1
    assert "todo student: ./nowhere: no such directory" in told.output
    assert told.output.splitlines()[-1] == "Next: fix the items marked todo"
    found = json.loads(CliRunner().invoke(app, ["doctor", *study, "--json"]).stdout)
    assert [f["subject"] for f in found if not f["fine"]] == ["student", "data"]


@pytest.mark.slow
def test_the_embedded_study_is_sound_on_this_machine(monkeypatch, tmp_path):
    """Nothing put in its place: Ray and the tracker start and stop; no file is left behind."""
    monkeypatch.chdir(tmp_path)
    told = CliRunner().invoke(app, ["doctor", "quickstart", "--set", "sweep.launcher=ray"])
    assert told.exit_code == 0, told.output
    assert "ok   ray: nodes 1" in told.output
    assert "ok   tracker" in told.output
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_is_tried_and_each_failure_is_a_line(study, monkeypatch):
    """Driver, memory, kernels, a capture and a step, on a pretended GPU."""
    plan = {"memory_bytes": {"trial": 1000}}
    study = study.model_copy(update={"evaluation": study.evaluation.model_copy(update={"dtype": "float32"})})

    def found(**changes):
        with pretend_gpu():
            return {finding.subject: finding for finding in doctor._gpu(study.model_copy(update=changes), plan)}

    lines = found()
    assert list(lines) == ["GPU driver", "GPU memory", "GPU kernels", "teacher on the GPU", "student on the GPU"]
    assert all(finding.fine for finding in lines.values()), lines
    assert "Pretended (sm_90)" in lines["GPU driver"].says
    assert lines["teacher on the GPU"].says == "two layers captured and trained in float32"
    assert lines["student on the GPU"].says == "two layers captured and trained in float32"
    on_cpus = study.sweep.model_copy(update={"gpus_per_trial": 0})
    imported = study.signals.model_copy(update={"imported": "somewhere"})
    assert [name for name in found(sweep=on_cpus, signals=imported) if name.endswith("on the GPU")] == []

    def refused(*_):
        raise UserError("bfloat16: no kernel image is available; set another dtype")

    monkeypatch.setattr(accelerator, "run_kernels", refused)
    told = found()["GPU kernels"]
    assert not told.fine
    assert told.says == "bfloat16: no kernel image is available; set another dtype"


@pytest.mark.parametrize(
    ("kind", "captured", "works"),
    [(GPTNeoConfig, False, True), (GPTNeoConfig, True, False), (MambaConfig, False, True)],
)
def test_a_student_is_tried_on_the_gpu_for_what_the_study_asks_of_it(kind, captured, works):
    """A student whose attention no group reads was refused for it, on GPUs alone."""
    with pretend_gpu():
        model = miniature(kind())
        if works:
            accelerator.rehearse(model, torch.device("cuda"), "float32", captured)
        else:
            with pytest.raises(UserError, match="attention maps cannot be captured"):
                accelerator.rehearse(model, torch.device("cuda"), "float32", captured)


def test_a_step_that_changes_no_weight_is_told(monkeypatch):
    """Weight decay would hide it: it moves weights whose gradient is zero."""
    model = miniature(LlamaConfig())

    def vanish(loss):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(torch.Tensor, "backward", vanish)
    with pytest.raises(UserError, match="a training step in float32 changes no weight"):
        accelerator.rehearse(model, torch.device("cpu"), "float32", True)


def test_memory_that_others_hold_and_a_build_without_the_cards_kernels_are_told(monkeypatch):
    """A real allocation fails where the card's size alone would do; an old build fails at its first kernel."""

    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    card = SimpleNamespace(major=9, minor=0, name="H100")
    monkeypatch.setattr("torch.empty", full)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda _: (3e9, 80e9))
    with pytest.raises(UserError, match=r"29.2 GB cannot be allocated: 3.0 of 80.0 GB are free; stop what else"):
        accelerator.allocate(torch.device("cpu"), int(29.2e9))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: card)
    monkeypatch.setattr("torch.cuda.get_arch_list", lambda: ["sm_70", "sm_80"])
    with pytest.raises(UserError, match=r"H100 \(sm_90\): this build has kernels for sm_70, sm_80 only"):
        accelerator.driver(torch.device("cpu"))
    monkeypatch.setattr("torch.cuda.get_arch_list", lambda: ["sm_80", "sm_90a"])
    assert "H100" in accelerator.driver(torch.device("cpu"))


def test_a_machine_without_a_gpu_has_no_line_about_one(study):
    """Nothing is tried, and nothing is said."""
    if not torch.cuda.is_available():
        assert not list(doctor._gpu(study, {}))


def test_a_service_that_cannot_be_used_is_one_line_with_its_remedy(monkeypatch):
    """However long the path in it is; and where Ray cannot be imported, nothing of it has to be ended."""
    told = f"{'/a/long/folder' * 30} cannot be written; set paths.results"

    def refuse():
        raise UserError(f"{told}\nmore")

    assert doctor._tried(refuse) == (False, told)
    monkeypatch.setitem(sys.modules, "ray", None)
    found = doctor._launcher(load_study("quickstart", ["sweep.launcher=ray"]))
    assert not found.fine
    assert "`stillroom train` runs one trial at a time without Ray" in found.says
