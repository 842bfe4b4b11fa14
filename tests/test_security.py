"""What must not get out, must not get in, and must stay in its folder."""

from __future__ import annotations

import ast
import json
import re
import shutil
import socket
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from processes import command_with_its_tracker_elsewhere, start, stillroom
from small_things import STUDENT_SHAPE, write_model
from stillroom.config import ModelRef
from stillroom.credentials import redact
from stillroom.errors import UserError
from stillroom.files import read_json
from stillroom.models.hub import load_config, load_model, model_identity
from stillroom.offline_teacher_data.store import SignalStore, write_manifest
from stillroom.studies import load_study
from studies import study_file

SOURCES = sorted((Path(__file__).resolve().parents[1] / "src" / "stillroom").rglob("*.py"))
CANARY = "canary-9f8e7d6c5b4a"
SECRETS = {
    "HF_TOKEN": CANARY,
    "MLFLOW_TRACKING_PASSWORD": CANARY + "-password",
    "AWS_SECRET_ACCESS_KEY": CANARY + "-key",
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the helper's processes are Linux's")
def test_no_secret_of_the_environment_reaches_a_file_or_the_screen(tmp_path, teacher_ref, student_ref):
    """A study from capture to report, a failing trial and a failing tracker among it; every byte is searched."""
    sweep = {"seeds": [0], "cpus_per_trial": 1, "retries": 0}
    path = study_file(tmp_path, teacher_ref.model, student_ref.model, groups=["task_only", "combined"], sweep=sweep)
    log = tmp_path / "log"
    for stage in ("capture", "verify", "archive"):
        assert stillroom(log, stage, path, environ=SECRETS).end() == 0, log.read_text()
    train = ("train", path, "--seed", "0", "--group")
    assert stillroom(log, *train, "task_only", environ=SECRETS).end() == 0, log.read_text()
    full = start(log, command_with_its_tracker_elsewhere, *train, "combined", environ=SECRETS, limit=30_000)
    assert full.end() == 2, log.read_text()
    with socket.socket() as closed:  # bound, not listening: a server that refuses
        closed.bind(("127.0.0.1", 0))
        server = f"http://someone:{CANARY}-uri@127.0.0.1:{closed.getsockname()[1]}"
        failing = {**SECRETS, "MLFLOW_TRACKING_URI": server, "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
        assert stillroom(log, "sweep", path, environ=failing).end() == 2, log.read_text()
    assert "http://***@127.0.0.1" in log.read_text()
    assert stillroom(log, "report", path, environ=SECRETS).end() == 0, log.read_text()
    written = [p for p in tmp_path.rglob("*") if p.is_file()]
    assert {"run.json", "error.json", "mlflow.db", "report.html", "manifest.json", "log"} <= {p.name for p in written}
    assert [p for p in written if CANARY.encode() in p.read_bytes()] == []


def test_a_credential_in_a_study_is_refused_unseen(monkeypatch):
    """A study is recorded in full, so none may be in it; the message does not repeat it."""
    monkeypatch.setenv("HF_TOKEN", CANARY)
    token = "hf_" + "A1b2C3d4" * 4
    for override in (f"teacher.revision={CANARY}", f"teacher.model={token}", f"sweep.storage=s3://me:{CANARY}@bucket"):
        with pytest.raises(UserError, match="there is a credential in it") as error:
            load_study("quickstart", [override])
        assert CANARY not in str(error.value)
        assert token not in str(error.value)


def test_redaction_hides_credentials_and_nothing_else():
    """Values of variables with telling names, known forms, passwords in addresses; settings and prose stay."""
    environ = {"X_API_KEY": "abcdefgh12", "TOKENIZERS_PARALLELISM": "false-false", "MY_TOKEN": "true"}
    text = "abcdefgh12 false-false true hf_abcdefghijklmnop1 https://me:pw@host/a https://host/a@b me@host"
    assert redact(text, environ) == "*** false-false true *** https://***@host/a https://host/a@b me@host"


@pytest.mark.parametrize(
    "name",
    [
        *("GITHUB_PAT", "PGPASSWORD", "DB_PASS", "MYSQL_PWD", "DATABASE_URL", "SENTRY_DSN", "API_KEYS", "GH_TOKENS"),
        *("OPENAI_APIKEY", "OPENAI_API_KEY", "wandb_api_key", "AWS_SESSION_TOKEN", "CLIENT_SECRETS", "SSH_PASSPHRASE"),
        *(
            "AZURE_STORAGE_CONNECTION_STRING",
            "GITHUBTOKEN",
            "PROXY_AUTH",
            "DB_CREDENTIALS",
            "SECRET",
            "AWS_ACCESS_KEY_ID",
        ),
    ],
)
def test_a_secret_is_known_by_its_variables_name(name):
    """Whatever a service calls it; as it is, and as it appears in an address."""
    assert redact("a canary+9f8e, canary%2B9f8e.", {name: "canary+9f8e"}) == "a ***, ***."


@pytest.mark.parametrize(
    "name",
    [
        *("TOKENIZERS_PARALLELISM", "PWD", "OLDPWD", "PATH", "PYTHONPATH", "HF_TOKEN_PATH", "SSH_AUTH_SOCK", "COMPASS"),
        *(
            "KEYBOARD",
            "MONKEY",
            "DESKTOP_SESSION",
            "SECRET_FILE",
            "GOOGLE_CREDENTIALS_FILE",
            "HF_HOME",
            "AUTHOR",
            "BYPASS",
        ),
    ],
)
def test_a_setting_stays_readable(name):
    """A name that has a secret's letters in it, or says where one lies."""
    assert redact("a canary-9f8e.", {name: "canary-9f8e"}) == "a canary-9f8e."


FORMS = [
    "hf_" + "A1b2C3d4" * 4,
    "ghp_" + "A1b2C3d4" * 4,
    "github_pat_11ABCDEFG0" + "a1B2_" * 8,
    "glpat-" + "A1b2C3d4-_" * 2,
    "npm_" + "A1b2C3d4" * 4,
    "pypi-AgEIcHlwaS5vcmc" + "A1b2" * 8,
    "xoxb-123456789012-abcdefghijkl",
    "xapp-1-A0123-" + "a1b2" * 8,
    "sk-" + "A1b2C3d4" * 4,
    "AKIA" + "A1B2C3D4" * 2,
    "AIza" + "A1b2C3d4-" * 4,
    "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl",
    "-----BEGIN RSA PRIVATE KEY-----\nabc\ndef\n-----END RSA PRIVATE KEY-----",
]


@pytest.mark.parametrize("secret", FORMS, ids=lambda secret: secret[:10])
def test_a_secret_is_known_by_its_form(secret):
    """In prose, in quotes and in an address."""
    assert redact(f"it is '{secret}', and so", {}) == "it is '***', and so"
    assert secret not in redact(f"https://host/path?x=1&access_token={secret}&y=2", {})


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://host/a?token=abcdef12&page=2", "https://host/a?token=***&page=2"),
        ("https://host/a?page=2&api_key=abcdef12", "https://host/a?page=2&api_key=***"),
        ("https://host/a?X-Amz-Signature=abcdef12#x", "https://host/a?X-Amz-Signature=***#x"),
        ("AccountName=x;AccountKey=abcdef12;z=1", "AccountName=x;AccountKey=***;z=1"),
        ("host=db password=abcdef12 port=1", "host=db password=*** port=1"),
        ("Authorization: Bearer abcdef12", "Authorization: Bearer ***"),
        ("{'Authorization': 'Bearer abcdef12'}", "{'Authorization': 'Bearer ***'}"),
        ("the standard bearer carried it", "the standard bearer carried it"),
        ("connect postgres://me:secret-99@db/x failed for secret-99", "connect postgres://***@db/x failed for ***"),
        ("of jonathan-b in /mnt/jonathan-b", "of jonathan-b in /mnt/jonathan-b"),
        ("pad_token=</s> eos_token_id=12345678 key=length", "pad_token=</s> eos_token_id=12345678 key=length"),
        ("builtin:teacher a/b@main sqlite:///x.db s3://b/c", "builtin:teacher a/b@main sqlite:///x.db s3://b/c"),
        ("https://host/a?token=***", "https://host/a?token=***"),
    ],
)
def test_a_secret_is_known_by_where_it_stands(text, shown):
    """In an address, a header or a connection; a database's password also alone, a user's name not."""
    environ = {"DATABASE_URL": "postgres://me:secret-99@db/x", "SSH_HOST": "ssh://jonathan-b@host/"}
    assert redact(text, environ) == shown
    assert redact(shown, environ) == shown


EVIL = """
from pathlib import Path
from transformers import LlamaConfig
Path({path!r}).write_text("it ran")
class OwnConfig(LlamaConfig):
    model_type = "own_llama"
"""


def test_code_of_a_model_runs_only_if_the_study_says_so_and_is_then_recorded(tmp_path, byte_level, monkeypatch):
    """Off by default, refused by name; on, it is part of what the store and every trial were made from."""
    ref = write_model(tmp_path / "own", byte_level, STUDENT_SHAPE, 1)
    config = json.loads((tmp_path / "own" / "config.json").read_text())
    config |= {"model_type": "own_llama", "auto_map": {"AutoConfig": "configuration_own.OwnConfig"}}
    (tmp_path / "own" / "config.json").write_text(json.dumps(config))
    (tmp_path / "own" / "configuration_own.py").write_text(EVIL.format(path=str(tmp_path / "ran")))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    for load in (load_config, load_model):
        with pytest.raises(UserError, match="comes with code of its own: set trust_remote_code=true"):
            load(ref)
    assert not (tmp_path / "ran").exists()
    trusted = ref.model_copy(update={"trust_remote_code": True})
    assert type(load_config(trusted)).__name__ == "OwnConfig"
    assert (tmp_path / "ran").read_text() == "it ran"
    before = model_identity(trusted)
    assert before.endswith(" with its own code")
    assert before != model_identity(ref)
    (tmp_path / "own" / "configuration_own.py").write_text("changed = True")
    assert model_identity(trusted) != before
    hub = ModelRef(model="a/b", revision="0" * 40, trust_remote_code=True)
    assert model_identity(hub).endswith(" with its own code")


def calls():
    """Every call in the package: file, dotted name, keywords."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.Call):
                yield path.name, ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}, node


def test_nothing_is_loaded_that_can_run_code():
    """No unpickling but with weights_only, no YAML but by a safe loader, no eval, no shell."""
    found = 0
    for name, function, keywords, _ in calls():
        if function == "torch.load":
            assert keywords.get("weights_only") == "True", name
            found += 1
        assert not re.search(r"yaml\.(\w+_)?load", function), name  # the study's reader has a safe loader of its own
        assert function not in {"pickle.load", "pickle.loads", "eval", "exec", "os.system"}, name
        assert keywords.get("shell", "False") == "False", name
    assert found  # the search sees calls
    from stillroom.studies.reader import _Loader

    assert issubclass(_Loader, yaml.SafeLoader)


def test_templates_exempt_nothing_from_escaping():
    """Whatever text comes from data is escaped in the report."""
    templates = list(SOURCES[0].parent.rglob("*.html.j2"))
    assert templates
    assert [p for p in templates if re.search(r"\|\s*safe\b|autoescape\s+false", p.read_text("utf-8"))] == []
    environments = [keywords for _, function, keywords, _ in calls() if function == "Environment"]
    assert environments
    assert "True" in [keywords.get("autoescape") for keywords in environments]


@pytest.mark.parametrize(
    "override",
    [
        "name=../../etc",
        "groups=[{name: ../x, terms: [task]}]",
        "groups=[{name: 'a/b', terms: [task]}]",
        "corpus.tasks={../x: {dataset: builtin, examples: 9}}",
        "corpus.tasks.quiz.split=../../secret",
        "evaluation.test_splits={quiz: {split: a/b, examples: 9}}",
    ],
)
def test_a_name_cannot_leave_its_folder(override):
    """Names of studies, groups, tasks and splits become parts of paths."""
    with pytest.raises(UserError, match="should match pattern"):
        load_study("quickstart", [override])


def test_a_manifest_cannot_point_out_of_its_store(tmp_path, store):
    """Even one with a good digest: shards have the names that a capture gives them."""
    copy = shutil.copytree(store.path, tmp_path / "data")
    manifest = read_json(copy / "manifest.json")
    del manifest["digest"]
    manifest["shards"][0]["name"] = "../elsewhere.parquet"
    write_manifest(copy, manifest)
    with pytest.raises(UserError, match="names files that no capture writes"):
        SignalStore.open(copy)


def ray_and_its_listeners():
    """In a process of its own: start Ray as a sweep does, and print each address that it and its children listen on."""
    import psutil
    import ray  # before a sweep does, whose setting must reach it all the same

    from stillroom.config import Sweep
    from stillroom.experiment.ray_sweep import describe_cluster

    describe_cluster(Sweep(seeds=(0,)))
    ray.get(ray.remote(lambda: 1).remote())  # with a worker, all of Ray is there
    me, found = psutil.Process(), []
    assert any("agent" in p.name().lower() for p in me.children(recursive=True))
    for process in (me, *me.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):
            found += [c.laddr.ip for c in process.net_connections("inet") if c.status == psutil.CONN_LISTEN]
    print(json.dumps(found))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other processes' sockets as Linux shows them")
def test_ray_on_one_machine_listens_on_loopback_alone(tmp_path):
    """Nothing of a sweep can be reached from the network: Ray's servers, its dashboard's agent among them."""
    running = start(tmp_path / "log", ray_and_its_listeners, environ={"RAY_ADDRESS": ""})
    assert running.end() == 0, running.output
    found = json.loads(running.output.splitlines()[-1])
    assert len(found) >= 4
    assert {address.removeprefix("::ffff:") for address in found} == {"127.0.0.1"}


def test_the_longest_secret_is_hidden_first():
    """One that begins with another must not leave its end behind."""
    environ = {"A_TOKEN": "abcdefgh", "B_PASSWORD": "abcdefgh-and-more", "lower_secret": "zyxwvuts"}
    assert redact("abcdefgh-and-more abcdefgh zyxwvuts", environ) == "*** *** ***"
