"""Docs that can fail: commands exist, files named are there, examples in help parse."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

import pages
from stillroom.cli import app
from stillroom.errors import UserError
from stillroom.studies import load_study, shipped_studies

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
COMMANDS = [command.name or command.callback.__name__ for command in app.registered_commands]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_in_the_docs_exist(page):
    """Every `stillroom X` names a command; every override in it is a field."""
    text = page.read_text("utf-8").replace("\\\n", " ")
    for command, rest in re.findall(r"(?:^|\$ |`)stillroom ([a-z][a-z-]*)((?: [^`\n|]*)?)", text, re.M):
        assert command in COMMANDS, command
        study = rest.split()[0] if rest.split() else "quickstart"
        overrides = re.findall(r"--set (\S+)", rest)
        if study in shipped_studies():
            load_study(study, overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_modules_in_the_docs_exist(page):
    """Relative links point at files."""
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text("utf-8")):
        assert (page.parent / target).exists(), target


def test_the_study_beside_a_result_is_one():
    """Whoever wants the same figures can run it."""
    paths = list((ROOT / "docs" / "results").glob("*.yaml"))
    assert [load_study(str(path)).name for path in paths] == [path.stem for path in paths]
    assert paths


def test_tests_named_in_the_study_page_exist():
    """A `pytest FILE -k WORD` selects something."""
    text = (ROOT / "docs" / "study.md").read_text("utf-8")
    for file, word in re.findall(r"`pytest (\S+\.py)(?: -k (\w+))?`", text):
        source = (ROOT / file).read_text("utf-8")
        names = re.findall(r"^def (test_\w+)", source, re.M)
        assert names
        if word:
            assert any(word in name for name in names), (file, word)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_every_command_has_an_example(command):
    """`--help` helps."""
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"Example: stillroom {command}" in result.output


@pytest.mark.parametrize(
    ("words", "offered"),
    [
        ("stillroom sw", ["sweep"]),
        ("stillroom run --j", ["--json"]),
        ("stillroom run s", ["signals", "small", "study.yaml", "sub/"]),
        ("stillroom plan sub/", ["sub/other.yaml"]),
        ("stillroom report q", ["quickstart"]),
    ],
)
def test_a_shell_completes_commands_options_and_studies(tmp_path, monkeypatch, words, offered):
    """Asked as bash asks: shipped studies, and YAML files, but no other files."""
    (tmp_path / "sub").mkdir()
    for name in ("study.yaml", "sub/other.yaml", "sub/rows.jsonl"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    asked = {"_STILLROOM_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
    answer = CliRunner().invoke(app, [], prog_name="stillroom", env=asked)
    assert answer.output.split() == offered


def test_a_users_mistake_is_one_message_and_exit_code_two(capsys, monkeypatch):
    """No traceback for a misspelt field."""
    from stillroom.cli import main

    monkeypatch.setattr("sys.argv", ["stillroom", "plan", "quickstart", "--set", "training.epoch=3"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert "training.epoch: unknown key" in error
    assert "Traceback" not in error


def test_plan_of_the_embedded_study_needs_nothing():
    """No network, weights or data."""
    planned = CliRunner().invoke(app, ["plan", "quickstart", "--json"])
    assert planned.exit_code == 0
    assert '"trials": 35' in planned.output


def test_plan_of_the_paper_works_without_network_and_says_what_it_assumes():
    """The two models, 28 trials, 7,000 examples, under 7 GB of store; every assumed figure is listed."""
    from stillroom.preflight.planning import plan_study

    plan = plan_study(load_study("paper"))
    assert [(m["width"], m["heads"], m["layers"]) for m in plan["models"].values()] == [(4096, 32, 32), (2048, 32, 22)]
    assert plan["training"]["trials"] == 28
    assert plan["corpus"]["examples"] == 7000
    assert plan["store_bytes"]["total"] < 7e9
    assert plan["assumptions"]


def test_hours_of_the_paper_follow_from_operations_and_bytes():
    """By hand, from the assumptions as they are printed: 125 TFLOP/s, 25 ms a decoding step or more, 1 GB/s."""
    from stillroom.preflight.planning import plan_study

    plan = plan_study(load_study("paper"))
    hours, corpus, training = plan["hours"], plan["corpus"], plan["training"]
    teacher = 2 * 7.24e9 * corpus["teacher_tokens"] / 125e12 + plan["store_bytes"]["total"] / 1e9
    assert hours["teacher"] == pytest.approx(teacher / 3600, rel=0.02)
    computed = 28 * 6 * 1.1e9 * training["tokens_per_trial"] / 125e12
    assert hours["training"] == pytest.approx(computed / 3600, rel=0.02)
    # GSM8K's answers, 256 at once, to the limit of 256 tokens; every split is read by two products of float16 parts
    rate = 125e12 / 2
    seconds_a_trial = 1319 / 256 * 256 * 0.025 + 2 * 1.1e9 * (872 * 28.9 + 14042 * 139.0 + 1319 * 203.6) / rate
    assert hours["test_evaluation"] == pytest.approx(28 * seconds_a_trial / 3600, rel=0.02)
    held_out = 100 / 256 * 256 * 0.025 + 2 * 1.1e9 * (500 * 28.9 + 100 * 139.0 + 100 * 203.6) / rate  # a tenth each
    assert hours["evaluation"] == pytest.approx(28 * 3 * held_out / 3600, rel=0.02)
    without_parts = plan_study(load_study("paper", ["training.precision=float32"]))["hours"]["test_evaluation"]
    read_slowly = 2 * 1.1e9 * (872 * 28.9 + 14042 * 139.0 + 1319 * 203.6) / 7.8e12
    assert without_parts == pytest.approx(28 * (read_slowly + 1319 * 2 * 1.1e9 * 256 / 7.8e12) / 3600, rel=0.02)
    assert any("1 GB/s" in line for line in plan["assumptions"])


def test_a_gated_model_without_a_login_is_one_line_that_says_what_to_do():
    """Whatever the hub answers, the message names the remedy."""
    from huggingface_hub.errors import GatedRepoError

    from stillroom.config import ModelRef
    from stillroom.models.hub import _explain, load_tokenizer

    response = type("R", (), {"headers": {}, "status_code": 401, "request": None, "text": ""})()
    try:
        raise GatedRepoError("gated", response=response)
    except GatedRepoError as cause:
        message = _explain(ModelRef(model="mistralai/Mistral-7B-v0.1"), cause)
    assert "HF_TOKEN" in message
    assert "\n" not in message
    with pytest.raises(UserError, match="no such directory"):
        load_tokenizer(ModelRef(model="./nowhere"))


def test_the_reference_pages_have_every_command_and_describe_every_field():
    """They are made from the program; a field without a meaning, or a command without an example, would show."""
    sys.path.insert(0, str(ROOT / "tools"))
    import reference_pages

    cli, configuration = reference_pages.cli_page(), reference_pages.configuration_page()
    for command in COMMANDS:
        assert f"\n## {command}\n" in cli
        assert f"```text\nstillroom {command}" in cli
    rows = re.findall(r"^\| `(\w+)` \| (.+) \| (.+) \| (.*) \|$", configuration, re.M)
    assert len(rows) > 70
    assert [name for name, kind, default, meaning in rows if not (kind and default and meaning)] == []
    assert "| `max_length` | integer, ≥ 8 | `512` |" in configuration
    for section in ("corpus.tasks.<name>.choice", "teacher.fine_tune.training", "sweep"):
        assert f"## `{section}`" in configuration


@pytest.mark.parametrize(
    ("proxies", "known", "local"),
    [({}, True, False), ({}, False, True), ({"no": "localhost"}, False, True), ({"https": "p"}, False, False)],
)
def test_without_a_network_the_hub_is_not_asked_again_and_again(monkeypatch, proxies, known, local):
    """Where its name is not known only the cache is looked at; behind a proxy the name need not be known here."""
    from stillroom.config import ModelRef
    from stillroom.models import hub as models

    class Kind:
        @staticmethod
        def from_pretrained(name, **options):
            return options["local_files_only"]

    def resolve(*_):
        if not known:
            raise OSError("Name or service not known")

    monkeypatch.setattr(models.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(models, "getproxies", lambda: proxies)
    monkeypatch.setattr(models.socket, "getaddrinfo", resolve)
    models._without_network.cache_clear()
    try:
        assert models.from_hub(Kind, ModelRef(model="someone/model")) is local
    finally:
        models._without_network.cache_clear()


FOLLOWED = {"tutorial.md", "api.md", "store.md", "students.md", "chats.md", "data.md", "trackers.md", "imported.md"}
"""Pages that a test does as they say, block by block."""


def test_every_shell_block_is_run_or_says_why_not():
    """`<!-- not run: reason -->` stands before each block that no test runs; nothing is quietly stale."""
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for block in pages.blocks(page):
            followed = page.name in FOLLOWED | {"study.md"} and block.commands
            if block.language in ("console", "bash", "sh") and not followed:
                assert block.reason, f"{page.name}: {block.text.splitlines()[0]}"


@pytest.mark.slow
def test_the_outlines_own_commands_work_as_written(store, tmp_path):
    """study.md's block: the store is checked by the one-liner, from the folder the study ran in."""
    (block,) = [b for b in pages.blocks(ROOT / "docs" / "study.md") if b.language == "console"]
    verify, tests = block.commands
    shutil.copytree(store.path, tmp_path / "offline_teacher_data")
    environment = pages.shell(tmp_path, ROOT / "src")
    pages.run(["bash", "-euc", verify], tmp_path, environment)
    assert (ROOT / tests.split()[-1]).is_file()


def test_messages_on_the_troubleshooting_page_are_the_programs():
    """Each is a piece of a message in the source."""
    source = "\n".join(path.read_text("utf-8") for path in (ROOT / "src").rglob("*.py"))
    joined = re.sub(r'"\s*\n\s*f?"', "", source)
    page = (ROOT / "docs" / "how-to" / "troubleshooting.md").read_text("utf-8")
    messages = re.findall(r"^\| `([^`]+)` \|", page, re.M)
    assert len(messages) > 15
    assert [message for message in messages if message not in joined] == []


def test_files_for_clusters_are_well_formed(tmp_path):
    """Slurm's script is Bash, and Kubernetes' file mounts one volume in every pod and starts a study that exists."""
    found = {block.title: block for block in pages.blocks(ROOT / "docs" / "how-to" / "clusters.md") if block.title}
    subprocess.run(["bash", "-n"], input=found["stillroom.sbatch"].text, text=True, check=True)
    job = yaml.safe_load(found["stillroom.yaml"].text)["spec"]
    groups = [job["rayClusterSpec"]["headGroupSpec"], *job["rayClusterSpec"]["workerGroupSpecs"]]
    mounts = [c["volumeMounts"] for g in groups for c in g["template"]["spec"]["containers"]]
    assert mounts == [[{"name": "study", "mountPath": "/study"}]] * len(groups)
    assert "stillroom run paper --set sweep.address=auto" in job["entrypoint"]
