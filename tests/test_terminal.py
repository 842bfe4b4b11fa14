"""Every command on a terminal: what a person sees, stops and breaks."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import time

import psutil
import pytest
from typer.testing import CliRunner

from processes import command_without_pictures
from stillroom.cli import app
from stillroom.progress import ProgressBars
from terminal import quickly, really, shell

SMALL = {
    "corpus.tasks": "{sentiment: {dataset: builtin, examples: 30}, arithmetic: {dataset: builtin, examples: 20}}",
    "evaluation": "{max_new_tokens: 4}",
    "groups": "[task_only, black_box]",
    "sweep": "{seeds: [0], cpus_per_trial: 1}",
    "training.epochs": "1",
    "training.warmup_steps": "0",
    "teacher.fine_tune.training.epochs": "1",
    "signals.minimum_coverage": "0",
    "analysis": "{}",
}
"""The embedded study, small."""


def sets(launcher=None, **changes):
    """It as options; `__` for a dot."""
    if launcher:
        changes["sweep"] = f"{SMALL['sweep'][:-1]}, launcher: {launcher}}}"
    settings = {**SMALL, **{name.replace("__", "."): value for name, value in changes.items()}}
    return [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]


def seen(terminal, code=0):
    """The screen of a command that ended with the exit code, whole."""
    assert terminal.end() == code, terminal.screen
    screen = terminal.screen
    assert "Traceback" not in screen
    assert "…" not in screen, f"something is cut: {screen}"
    return screen


@pytest.mark.slow
@pytest.mark.parametrize(
    ("columns", "term", "launcher"),
    [(80, "xterm-256color", "ray"), (120, "dumb", "local")],
)
def test_every_command_on_a_terminal(tmp_path, columns, term, launcher):
    """It ends well, nothing is cut, each says what comes next, and that is a command which can be pasted."""

    def call(*arguments, code=0):
        how = {"call": command_without_pictures} if arguments[0] in ("report", "run") else {}
        return seen(quickly(tmp_path, *arguments, columns=columns, term=term, **how), code)

    help_ = call("--help")
    commands = re.findall(r"^│ ([\w-]+) ", help_.partition("Preparation")[2], re.MULTILINE)
    assert set(commands) == {command.name or command.callback.__name__ for command in app.registered_commands}
    for command in commands:
        assert "Usage: stillroom" in call(command, "--help")

    def stage(name, *more):
        screen = call(name, "quickstart", *settings, *more)
        nonlocal followed
        followed = followed or shlex.join(settings) in screen.replace("\n", "")
        return screen

    settings, followed = sets(launcher), False
    assert "GPU hours" in stage("plan")
    assert "packages:" in call("doctor", "quickstart", *settings)
    for name in ("fine-tune", "evaluate", "capture", "verify", "archive"):
        stage(name)
    assert followed, "no command that came next had the settings of this one"
    stage("train", "--group", "task_only", "--seed", "0")
    assert ("━" in stage("sweep")) == (term != "dumb")
    report = stage("report")
    for group in ("task_only", "black_box"):
        assert group in report
    assert stage("run").endswith("Next: open it in a browser\n")
    found = re.search(r"inspect offline_teacher_data (\S+)", call("inspect", "offline_teacher_data").replace("\n", ""))
    call("inspect", "offline_teacher_data", found[1])
    (trial,) = (tmp_path / "results" / "knowledge_distillation_experiment").glob("trial_*_black_box_seed_0")
    call("export", trial.relative_to(tmp_path), "student")
    said = call("capture", "quickstart", "--set", "training.epoch=1", code=2)
    assert "error:" in said


@pytest.fixture(scope="module")
def archived(tmp_path_factory):
    """The small study up to its trials."""
    folder = tmp_path_factory.mktemp("archived")
    for stage in ("capture", "verify", "archive"):
        seen(quickly(folder, stage, "quickstart", *sets()))
    return folder


@pytest.fixture
def study(archived, tmp_path):
    """A copy of it."""
    return shutil.copytree(archived, tmp_path / "study")


@pytest.mark.slow
def test_a_failed_sweeps_facts_go_where_the_output_goes(study):
    """With bars on the terminal and JSON in a file, none of either gets into the other."""
    diverging = {"training__learning_rate": "1e30", "training__epochs": "4", "training__max_skipped_steps": "1"}
    arguments = ["sweep", "quickstart", *sets(**diverging, sweep="{seeds: [0], retries: 0, cpus_per_trial: 1}")]
    terminal = shell(study, f"{shlex.join(arguments)} --json > facts.json")
    assert terminal.end() == 2, terminal.screen
    assert len(json.loads((study / "facts.json").read_text())["failed"]) == 2
    assert '"failed"' not in terminal.screen
    assert "error: trials failed" in terminal.screen


@pytest.fixture
def training(study, launcher):
    """A sweep in the midst of a long trial, on a terminal; what it has started."""
    terminal = really(study, "sweep", "quickstart", *sets(launcher, training__epochs="3000", groups="[task_only]"))
    terminal.until(r"seed 0, epoch \d+: accuracy")
    family = psutil.Process(terminal.process.pid).children(recursive=True)
    yield terminal, family
    terminal.process.kill()
    terminal.process.wait()


def remaining(family):
    """Those of the processes that run."""
    return [p for p in family if p.is_running() and p.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
@pytest.mark.parametrize(("launcher", "how"), [("local", "keys"), ("local", "signals"), ("ray", "keys")])
def test_ctrl_c_again_and_again_ends_a_sweep_once(training, how):
    """Exit code 130 and how to resume, no traceback, no core, no process left."""
    terminal, family = training
    for _ in range(5):
        if how == "keys":
            terminal.press(b"\x03")
        else:
            terminal.process.send_signal(signal.SIGINT)
        time.sleep(0.1)
    screen = seen(terminal, 130)
    last = screen.replace("^C", "").strip().rpartition("Stopped. ")[2].replace("\n", "")
    assert last.startswith("Finished work is saved. To resume: stillroom sweep quickstart --set 'corpus.tasks=")
    assert last.endswith("--set 'analysis={}'")
    assert not remaining(family)


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["ray"])
@pytest.mark.parametrize("which", ["raylet", "gcs_server"])
def test_ray_that_is_killed_is_one_message(training, which):
    """Not Ray's own text, which ends the process unasked; no agent or worker outlives it."""
    terminal, family = training
    next(process for process in family if process.name() == which).kill()
    screen = seen(terminal, 2)
    assert "error: Ray has stopped: one of its processes was killed" in screen
    assert "run the same command to resume" in screen.replace("\n", " ")
    for of_ray in ("core_worker", "ray-observability", "(raylet)"):
        assert of_ray not in screen
    assert not remaining(family)


@pytest.mark.slow
def test_a_study_in_a_folder_of_any_name(tmp_path):
    """Whatever a path may hold, from the first stage to the report."""
    folder = tmp_path / "it's [a] 100% #odd? dir é"
    folder.mkdir()
    seen(quickly(folder, "run", "quickstart", *sets()))
    assert {path.name for path in folder.iterdir()} == {
        "results",
        "offline_teacher_data",
        *(path.name for path in folder.glob("offline_teacher_data_2*")),
    }
    assert (folder / "results" / "report.html").is_file()
    assert (folder / "results" / "mlflow.db").is_file()


def _bars():
    bars = ProgressBars()
    for done in range(4):
        bars("capturing the teacher's signals, share 12/16, examples", done * 12345, 37035)
        note = "9 of 28 trials done, 4 running, 1 failed; a_long_name_of_a_group seed 10, epoch 10: accuracy 62.5 %"
        bars("training students, epochs", done, 3, note)
        time.sleep(0.15)


@pytest.mark.parametrize("columns", [60, 80, 120])
def test_bars_are_whole_at_the_width_of_the_terminal(tmp_path, columns):
    """Words are wrapped, not cut; each bar stands once at the end, however often it was drawn."""
    terminal = quickly(tmp_path, columns=columns, call=_bars)
    screen = " ".join(seen(terminal).split())
    assert screen.count("━ 37035/37035") == screen.count("━ 3/3") == 1
    assert "epoch 10: accuracy 62.5 %" in screen


@pytest.mark.parametrize("term", ["dumb", "unknown"])
def test_a_terminal_that_redraws_nothing_gets_no_bars(tmp_path, term):
    """It gets what a file gets."""
    assert seen(quickly(tmp_path, term=term, call=_bars)).strip() == ""


def test_an_internal_error_says_what_it_is(monkeypatch, capsys):
    """It would come again, so nothing says that the same command resumes."""
    from stillroom import cli

    def broken(*_):
        raise ZeroDivisionError

    monkeypatch.setattr("stillroom.studies.load_study", broken)
    monkeypatch.setattr("sys.argv", ["stillroom", "plan", "quickstart"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    said = capsys.readouterr().err
    assert said.endswith("Internal error in stillroom; please report it. Finished work is saved.\n")
    assert "resume" not in said
    assert "ZeroDivisionError" in said


def test_the_next_command_has_the_settings_of_this_one():
    """A study is what it was set to; without that, the next stage would be another study's."""
    override = "corpus.tasks={quiz: {dataset: builtin, examples: 9}}"
    asked = ["plan", "quickstart", "--set", override, "--set", "analysis={}", "--set", "evaluation.test_splits={}"]
    told = CliRunner().invoke(app, asked)
    assert told.exit_code == 0, told.output
    assert f"Next: {shlex.join(['stillroom', 'doctor', *asked[1:]])}\n" in told.output
