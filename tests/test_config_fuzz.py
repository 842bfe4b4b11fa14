"""Whatever is written in a study file, or given by `--set`: a study or one message, within a second."""

from __future__ import annotations

import json
import os
import random
import time
import tracemalloc
from importlib import resources

import pytest
import yaml

from stillroom.config import fingerprint
from stillroom.errors import UserError
from stillroom.studies import load_study, shipped_studies

DOCUMENTS = int(os.environ.get("STILLROOM_FUZZ_DOCUMENTS", "3000"))
SHIPPED = [resources.files("stillroom.studies").joinpath(f"{n}.yaml").read_text("utf-8") for n in shipped_studies()]

SCALARS = [
    *("", "~", "null", "yes", "on", ".inf", "-.inf", ".nan", "-0", "0b_", "0x_", "0_", "-0x", "1_000", "_", "1._"),
    *("1:30", "1:30.5", "1" + ":59" * 2000, "190:20:30.15", "9" * 400, "9" * 5000, "-" + "9" * 5000, "9" * 60_000),
    *("1_" * 3000, "0x" + "f" * 9000, "0b" + "1" * 90_000, "0" + "7" * 9000, "1.0e+999", "-1.5e-999", "1e999"),
    *("9223372036854775807", "9223372036854775808", "-9223372036854775809", "18446744073709551616", "1" * 39 + ".5"),
    *("2024-01-01", "2024-13-45", "0000-00-00", "2024-02-30T25:61:61Z", "2001-12-14 21:59:43.10 -99:99", "=", "<<"),
    *("!!int x", "!!float x", "!!bool x", "!!null x", "!!timestamp x", "!!binary '*'", "!!set [a]", "!!omap {a: 1}"),
    *("!!pairs [a]", "!!python/object/apply:os.system ['true']", "!!str 5", "! 5", "!own {a: 1}", "!<tag:x,2000:y> z"),
    *('"\\ud800"', '"\\udfff x"', '"\\0"', '"\\UFFFFFFFF"', '"\\U00110000"', '"\\xff\\u2028\\e[31m"', '"\\q"'),
    *("é" * 300, "x" * 300, "x" * 90_000, "/x" * 3000, "../..", "C:\\x", "a\tb", "\u202e", "\U0001f600" * 100, "{a}{b"),
    *("(" * 3000, "(" * 400 + ")" * 400, "(a{1,99999999999})", "(?P<n>x)", "(a|b", "[", "]", "{", "}", "&a", "*a"),
    *("[" * 30, "[" * 20_000, "{a: " * 50, "{a: " * 5000, "- " * 2000, "? " * 300, "[" + "a," * 40_000 + "]"),
    *("&a [*a]", "&a {b: *a}", "&a {<<: *a}", "{<<: 5}", "{<<: [1]}", "{<<: {a: 1}}", "{<<: [{a: 1}, {a: 2}], a: 3}"),
    *("{a: 1, a: 2}", "{[a]: 1}", "{{a: 1}: 2}", "{1: 2}", "{null: 1}", "{1.5: 2}", "{'': 1}", "{true: 1}", "{? a}"),
    *("|", ">", "|\n  x", ">9", "|+\n", "%", "@", "`", "# x", "--- x", "...", "%YAML 9.9", "%TAG ! x", "\ufeff", "?"),
    *("hf_" + "A1b2" * 8, "https://me:pw@host/x", "builtin", "builtin:teacher", "[hidden]", "[1, 2]", "9" * 39),
]  # fmt: skip
"""What a value can be that is none, or is one in an odd way."""

SNIPPETS = [
    "b0: &b0 [x]\n" + "".join(f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 9)}]\n" for n in range(1, 14)),
    "b0: &b0 {x: 1}\n" + "".join(f"b{n}: &b{n} {{<<: [*b{n - 1}, *b{n - 1}]}}\n" for n in range(1, 40)),
    "b0: &b0 [x]\n" + "".join(f"b{n}: &b{n} [*b{n - 1}]\n" for n in range(1, 500)),
    "".join(f"k{n}: {{a: 1}}\n" for n in range(2000)),
    "\n".join(" " * n + "a:" for n in range(200)) + "\n",
    "".join(f"? k{n}\n" for n in range(500)),
    "\x00", "\t", "\r", "\x85", "\u2028", "---\n", "...\n", "%YAML 99999999999999999999.1\n---\n",
    "'", '"', ": ", "- ", "}", "*x ", "&x ",
]  # fmt: skip


def fields(node, above=()):
    """Every field of a study as `--set` names it."""
    for key, value in node.items():
        yield ".".join((*above, str(key)))
        if isinstance(value, dict):
            yield from fields(value, (*above, str(key)))


MORE = "paths.store paths.results sweep.storage sweep.address corpus.tasks.own.choice.choices training.precision "
MORE += (
    "corpus.tasks.own.generation.pattern corpus.tasks.own.choice.prompt evaluation.test_splits.quiz.split groups.0.name"
)
FIELDS = sorted({field for text in SHIPPED for field in fields(yaml.safe_load(text))} | set(MORE.split()))


def mutated(rng, text):
    """A shipped study with a few of its lines, values or characters replaced, moved, repeated or taken out."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        lines = text.split("\n")
        at = rng.randrange(len(lines))
        kind = rng.randrange(9)
        if kind <= 3 and ":" in lines[at]:
            lines[at] = f"{lines[at].partition(':')[0]}: {rng.choice(SCALARS)}"
        elif kind == 4:
            lines.insert(
                at, rng.choice(SNIPPETS).rstrip("\n") if rng.random() < 0.5 else lines[rng.randrange(len(lines))]
            )
        elif kind == 5:
            del lines[at]
        elif kind == 6:
            lines[at] = " " * rng.randrange(6) + lines[at].strip()
        elif kind == 7:
            lines[at] = lines[at].replace(
                rng.choice(("a", "e", ":", "-", "[", "]", "{", "}")), rng.choice(SNIPPETS[6:]), 1
            )
        else:
            cut = rng.randrange(len(text) + 1)
            junk = "".join(chr(rng.choice((rng.randrange(128), rng.randrange(0xD800), 0x10FFFF))) for _ in range(4))
            lines = (text[:cut] + rng.choice((junk, rng.choice(SCALARS), "")) + text[cut + rng.randrange(3) :]).split(
                "\n"
            )
        text = "\n".join(lines)
    return text


def nonsense(rng):
    """A document of nasty values alone."""
    return "\n".join(f"{rng.choice(FIELDS).split('.')[0]}: {rng.choice(SCALARS)}" for _ in range(rng.randrange(1, 5)))


def document(rng):
    """One document and its overrides; a third of them have some."""
    text = nonsense(rng) if rng.random() < 0.15 else rng.choice(SHIPPED)
    given = []
    if rng.random() < 0.35:
        given = [f"{rng.choice(FIELDS)}={rng.choice(SCALARS)}" for _ in range(rng.choice((1, 1, 2)))]
        if rng.random() < 0.2:
            odd = (".", "", "=", "a" * 5000, ".".join("abc" * 500), "training..epochs", "\udc80", "training.\ud800=1")
            given.append(rng.choice(odd) + rng.choice(("", "=1", "=" + rng.choice(SCALARS))))
    if not given or rng.random() < 0.3:
        text = mutated(rng, text)
    return text, given


def outcome(path, given):
    """`study`, or the message; whatever else is raised is a fault. A study can be named, recorded and written."""
    try:
        study = load_study(path, given)
    except UserError as error:
        return str(error)
    fingerprint(study)
    json.dumps(study.model_dump(mode="json"), ensure_ascii=False).encode()
    return "study"


@pytest.mark.slow
def test_every_document_is_a_study_or_one_message(tmp_path):
    """No traceback, no hang, no message that cannot be written. The longest takes 0.3 s on a quiet machine."""
    studies = 0
    path = tmp_path / "mine.yaml"
    for number in range(DOCUMENTS):
        text, given = document(random.Random(number))
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
        began = time.process_time()
        try:
            found = outcome(str(path), given)
        except BaseException as error:
            raise AssertionError(f"document {number}, {given}: {type(error).__name__}") from error
        spent = time.process_time() - began
        assert spent < 4, f"document {number}, {given}: {spent:.1f} s"
        assert found.encode(), f"document {number}"
        assert len(found) < 20_000, f"document {number}"
        studies += found == "study"
    assert 0.05 < studies / DOCUMENTS < 0.5  # both are tried


@pytest.mark.parametrize("text", [s for s in SCALARS if len(s) < 100] + SNIPPETS[:3])
def test_nothing_nasty_takes_much_memory(tmp_path, text):
    """Alone in a file, as a value and as an override: a bound on time alone would let memory fill."""
    (tmp_path / "mine.yaml").write_text(text, "utf-8", "surrogatepass")
    tracemalloc.start()
    for name, given in ((str(tmp_path / "mine.yaml"), []), ("quickstart", [f"training.epochs={text}"])):
        outcome(name, given)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 30e6
