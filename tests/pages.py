"""The documentation's blocks of code, and how a test runs a page as a reader would."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import warm_start

ROOT = Path(__file__).resolve().parents[1]
_FENCE = re.compile(r"(?:<!-- not run: (?P<reason>[^>]+) -->\n+)?```(?P<info>[^\n]*)\n(?P<text>.*?)^```", re.S | re.M)


@dataclass(frozen=True)
class Block:
    """One fenced block: its language, its title (a file's name), and why it is not run, if it says so."""

    language: str
    title: str | None
    text: str
    reason: str | None

    @property
    def commands(self) -> list[str]:
        """The lines that a reader types."""
        joined = self.text.replace("\\\n", " ")
        return [line[2:] for line in joined.splitlines() if line.startswith("$ ")]


def blocks(page: Path) -> list[Block]:
    """Every fenced block of a page, in order."""
    found = []
    for match in _FENCE.finditer(page.read_text("utf-8")):
        title = re.search(r'title="([^"]+)"', match["info"])
        language = match["info"].split()[0] if match["info"].split() else ""
        found.append(Block(language, title.group(1) if title else None, match["text"], match["reason"]))
    return found


def follow(page: Path, folder: Path, environment: dict[str, str]) -> None:
    """Do what a page says in `folder`: write its titled files, apply its diffs, run its Python and its commands."""
    for block in blocks(page):
        if block.reason:
            continue
        if block.language == "diff":
            _apply(block, folder)
        elif block.title:
            (folder / block.title).parent.mkdir(parents=True, exist_ok=True)
            (folder / block.title).write_text(block.text, "utf-8")
        elif block.language == "python":
            run([sys.executable, "-c", block.text], folder, environment)
        for command in block.commands if block.language == "console" else ():
            run(["bash", "-euc", command], folder, environment)


def _apply(block: Block, folder: Path) -> None:
    path = folder / block.title
    text = path.read_text("utf-8")
    lines = block.text.splitlines()
    for old, new in zip(lines[::2], lines[1::2], strict=True):
        assert (old[0], new[0]) == ("-", "+")
        assert text.count(old[1:]) == 1, old
        text = text.replace(old[1:], new[1:])
    path.write_text(text, "utf-8")


def run(command: list[str], folder: Path, environment: dict[str, str]) -> None:
    """Run a command in a folder; it must succeed."""
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{command[-1]}\n{done.stdout}\n{done.stderr}"


def shell(folder: Path, source: Path) -> dict[str, str]:
    """An environment whose `stillroom` and `python` are those under test, with the package at `source`."""
    programs = folder / ".bin"
    programs.mkdir()
    starters = {"python": f'#!/bin/sh\nexec {sys.executable} "$@"\n', "stillroom": warm_start.client()}
    for name, text in starters.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name != "OFFLINE_DATA_PATH"}
    return {**kept, "PYTHONPATH": str(source), "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}"}
