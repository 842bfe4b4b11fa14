"""Commands on a terminal: a pseudo-terminal of a given size, and the screen as a person would see it at the end."""

from __future__ import annotations

import codecs
import fcntl
import os
import pty
import re
import shlex
import struct
import subprocess
import sys
import termios
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import stillroom
from processes import command, start

SOURCES = str(Path(stillroom.__file__).parents[1])
STILLROOM = [sys.executable, "-c", "from stillroom.cli import program; program()"]
ROWS = 40

_TOKEN = re.compile(
    r"\x1b\[(?P<parameters>[\d;?]*)(?P<final>[A-Za-z])"  # a control sequence
    r"|\x1b\].*?(?:\x07|\x1b\\)"  # an operating system command: a title, a link
    r"|(?P<plain>.)",
    re.DOTALL,
)


class Screen:
    """What a terminal shows after some output: enough of a terminal for bars that are drawn over and over."""

    def __init__(self, columns):
        """All that was ever scrolled away is kept."""
        self.columns, self._lines, self._row, self._column = columns, [[]], 0, 0

    def feed(self, text):
        """Print text with its control sequences."""
        for token in _TOKEN.finditer(text):
            if token["final"]:
                self._control(token["final"], token["parameters"])
            elif token["plain"]:
                self._print(token["plain"])
        return self

    @property
    def text(self):
        """The lines, without the blanks at their ends."""
        return "\n".join("".join(line).rstrip() for line in self._lines)

    def _control(self, final, parameters):
        count = int(parameters) if parameters.isdigit() else None
        if final == "A":
            self._row = max(self._row - (count or 1), len(self._lines) - ROWS, 0)
        elif final == "B":
            self._row = min(self._row + (count or 1), len(self._lines) - 1)
        elif final == "G":
            self._column = (count or 1) - 1
        elif final == "K":
            line = self._lines[self._row]
            line[:] = {None: line[: self._column], 0: line[: self._column], 2: []}[count]
        elif final == "J":
            self._lines[self._row][self._column :] = []
            del self._lines[self._row + 1 :]
        else:
            assert final in "mhl", f"the test's terminal does not know {parameters}{final}"

    def _print(self, character):
        if character == "\r":
            self._column = 0
        elif character == "\n":
            self._row += 1
            if self._row == len(self._lines):
                self._lines.append([])
        elif character >= " ":
            if self._column == self.columns:
                self._print("\r"), self._print("\n")
            line = self._lines[self._row]
            line += " " * (self._column + 1 - len(line))
            line[self._column] = character
            self._column += 1


@dataclass
class OnTerminal:
    """A process whose terminal we are."""

    process: object
    columns: int
    master: int
    slave: int
    raw: str = ""
    """All that was printed, with its control sequences."""

    def __post_init__(self):
        """A terminal reads all the time: a process that nobody listens to would stop."""
        self._screen, self._shown = Screen(self.columns), 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        while True:
            try:
                piece = os.read(self.master, 65536)
            except OSError:  # what Linux says once the last process has closed the other end
                return
            if not piece:
                return
            self.raw += decoder.decode(piece)

    @property
    def screen(self):
        """What is seen."""
        whole = re.search(r"(?:\x1b[^A-Za-z]*)?\Z", self.raw).start()  # up to a sequence that has not yet come whole
        self._screen.feed(self.raw[self._shown : whole])
        self._shown = whole
        return self._screen.text

    def press(self, keys):
        """Type."""
        os.write(self.master, keys)

    def end(self, timeout=1500):
        """Wait; returns the exit code, negative for a signal."""
        wait = self.process.join if hasattr(self.process, "join") else self.process.wait
        wait(timeout)
        code = self.process.exitcode if hasattr(self.process, "exitcode") else self.process.returncode
        assert code is not None, f"still running: {self.screen}"
        os.close(self.slave)  # open until now, since a terminal that nobody has open ends
        self._reader.join(2)
        return code

    def until(self, pattern, timeout=600):
        """Wait for what a regular expression matches on the screen, its lines joined."""
        deadline = time.monotonic() + timeout
        while not re.search(pattern, " ".join(self.screen.split())):
            alive = self.process.is_alive() if hasattr(self.process, "is_alive") else self.process.poll() is None
            assert alive, self.screen
            assert time.monotonic() < deadline, f"nothing like {pattern!r} for {timeout} s: {self.screen}"
            time.sleep(0.1)


def _open(columns):
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, columns, 0, 0))
    return master, slave


def _environment(term):
    """Of a person's shell: the test runner's may say that nothing is a terminal, or how wide it is."""
    telling = {"COLUMNS", "LINES", "NO_COLOR", "FORCE_COLOR", "CI", "TTY_COMPATIBLE", "TERMINAL_WIDTH"}
    kept = {name: value for name, value in os.environ.items() if name not in telling}
    return {**kept, "TERM": term, "PYTHONPATH": SOURCES}


def quickly(folder, *arguments, columns=80, term="xterm-256color", call=command):
    """`stillroom` with arguments on a terminal, forked from a process that has imported everything."""
    master, slave = _open(columns)
    environ = _environment(term)
    running = start(folder / "unused.log", _attached, os.ttyname(slave), str(folder), environ, call, arguments)
    return OnTerminal(running.process, columns, master, slave)


def _attached(name, folder, environ, call, arguments):
    os.setsid()
    terminal = os.open(name, os.O_RDWR)  # the first that a session's leader opens is the session's own
    for stream in (0, 1, 2):
        os.dup2(terminal, stream)
    os.environ.clear()
    os.environ.update(environ)
    os.chdir(folder)
    Path("unused.log").unlink()
    call(*arguments)


def really(folder, *arguments, columns=80, term="xterm-256color"):
    """`stillroom` with arguments on a terminal, as a shell starts it."""
    return _spawn(folder, [*STILLROOM, *map(str, arguments)], columns, term)


def shell(folder, line, columns=80, term="xterm-256color"):
    """A line of shell that begins with the arguments of `stillroom`, on a terminal."""
    return _spawn(folder, ["sh", "-c", f"{shlex.join(STILLROOM)} {line}"], columns, term)


def _spawn(folder, arguments, columns, term):
    master, slave = _open(columns)
    process = subprocess.Popen(
        arguments,
        cwd=folder,
        env=_environment(term),
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    return OnTerminal(process, columns, master, slave)
