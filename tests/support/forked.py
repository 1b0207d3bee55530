"""``gemma-tune`` in processes of its own that need not import the libraries: one process has, and forks what is asked for.

A fork is what a shell starts but for that import of five seconds: it has its own process id, gets signals, may be killed, and
what it starts as its training's other processes are its own children, forks again. The process they come from computes nothing
and has no thread, which would not come along. That a fresh interpreter finds all by itself is for other tests to show.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

from support.command import ROOT, Result

try:
    from pexpect import fdpexpect
except ImportError:  # pseudo-terminals are not for Windows
    fdpexpect = None


class Forked:
    """Of ``subprocess.Popen`` what is used here and by the launcher of several processes; by its parent."""

    def __init__(self, command: list[str], env: dict[str, str], stdin: int | None = None, process_group: int | None = None):
        self.returncode: int | None = None
        self.pid = os.fork()
        if not self.pid:
            if process_group is not None:
                os.setpgid(0, process_group)
            if stdin == subprocess.DEVNULL:
                os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            _become(command[command.index("gemma_tune") + 1:], env)

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


class Terminal(fdpexpect.fdspawn if fdpexpect else object):
    """Of ``pexpect.spawn`` what is used here, of a command that :meth:`Forks.terminal` started."""

    delaybeforesend = 0.05

    def __init__(self, forks: Forks, fd: int, timeout: float):
        super().__init__(fd, encoding="utf-8", codec_errors="replace", timeout=timeout)
        self._forks, self._process = forks, forks._pid
        self.exitstatus: int | None = None
        self.signalstatus: int | None = None

    def send(self, text: str) -> int:
        time.sleep(self.delaybeforesend)
        return super().send(text)

    def sendintr(self) -> None:
        """Ctrl-C."""
        self.send("\x03")

    def sendeof(self) -> None:
        """Ctrl-D."""
        self.send("\x04")

    def kill(self, number: int) -> None:
        os.kill(self._process, number)

    def wait(self) -> None:
        code = self._forks.result().code
        self.exitstatus, self.signalstatus = (code, None) if code >= 0 else (None, -code)

    def close(self, force: bool = True) -> None:
        """Close the terminal, and end what still runs there."""
        if self.exitstatus is self.signalstatus is None:
            with contextlib.suppress(ProcessLookupError):  # it has ended by itself
                self.kill(signal.SIGKILL)
            self.wait()
        super().close()


def _become(arguments: list[str], environment: dict[str, str]) -> None:
    """Be ``python -m gemma_tune``, up to the end of this process."""
    code = 1
    try:
        os.environ.clear()
        os.environ.update(environment)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_DFL)
        exec(environment.get("AT_THE_START", ""), {})
        from gemma_tune.__main__ import main

        sys.argv = ["gemma_tune", *arguments]
        main()
        code = 0
    except SystemExit as end:
        code = 0 if end.code is None else end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # as at the end of an interpreter
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Forks:
    """A process with the libraries in it, one command at a time."""

    def __init__(self) -> None:
        self._connection, theirs = socket.socketpair()
        paths = [str(ROOT / "tests"), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        with theirs:
            self._process = subprocess.Popen([sys.executable, "-m", "support.forked", str(theirs.fileno())],
                                             pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                                             env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)})
        self._answers, self._alive, self._pid = self._connection.makefile(), 0, 0
        self._temporary = TemporaryDirectory()
        self._folder = Path(self._temporary.name)

    def start(self, *arguments: object, **environment: object) -> int:
        """Start ``gemma-tune`` here, with this environment and what is given of it: its process id, and see :meth:`result`.
        Variables that are None are left out. ``AT_THE_START`` is Python that each of its processes runs before anything else."""
        with open(self._folder / "out", "wb") as out, open(self._folder / "err", "wb") as err:
            return self._start(arguments, environment, out.fileno(), err.fileno())

    def terminal(self, *arguments: object, dimensions: tuple[int, int], timeout: float, echo: bool = True,
                 **environment: object) -> Terminal:
        """Start it in a pseudo-terminal of so many rows and columns, as its controlling one: what ``pexpect.spawn`` does."""
        import termios

        ours, theirs = os.openpty()
        termios.tcsetwinsize(theirs, dimensions)
        if not echo:
            modes = termios.tcgetattr(theirs)
            modes[3] &= ~termios.ECHO
            termios.tcsetattr(theirs, termios.TCSANOW, modes)
        self._start(arguments, environment, theirs, theirs)
        os.close(theirs)
        return Terminal(self, ours, timeout)

    def _start(self, arguments: tuple[object, ...], environment: dict[str, object], out: int, err: int) -> int:
        if self._pid:  # of a test that failed before it asked
            os.kill(self._pid, signal.SIGKILL)
            self.result()
        changed = dict(os.environ) | {name: value if value is None else str(value) for name, value in environment.items()}
        (self._folder / "request").write_text(json.dumps({
            "arguments": [*map(str, arguments)], "folder": os.getcwd(),
            "environment": {name: value for name, value in changed.items() if value is not None}}))
        self._alive, held = os.pipe()
        socket.send_fds(self._connection, [bytes(self._folder / "request")], [out, err, held])
        os.close(held)
        self._pid = int(self._answers.readline())
        return self._pid

    def result(self) -> Result:
        """What it did, once it has ended, and all that it started; of one that was killed the code is negative."""
        code, self._pid = int(self._answers.readline()), 0
        with open(self._alive, "rb") as until_all_have_ended:
            until_all_have_ended.read()
        files = (self._folder / name for name in ("out", "err"))
        return Result(code, *(file.read_text() if file.exists() else "" for file in files))

    def run(self, *arguments: object, **environment: object) -> Result:
        """Start it, and wait for its end."""
        self.start(*arguments, **environment)
        return self.result()

    def close(self) -> None:
        self._answers.close()
        self._connection.close()
        self._process.wait(60)
        self._temporary.cleanup()


def _sit_at(terminal: int) -> None:
    """Have it as the controlling terminal, and the streams that an interpreter opens on one."""
    os.login_tty(terminal)
    for number, (name, mode) in enumerate((("stdin", "r"), ("stdout", "w"), ("stderr", "w"))):
        stream = os.fdopen(number, mode, buffering=1, closefd=False)
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)


def _serve(connection: socket.socket) -> None:
    from gemma_tune.train import launch
    from gemma_tune.train.job import load_libraries

    load_libraries()
    launch.subprocess = SimpleNamespace(Popen=Forked, DEVNULL=subprocess.DEVNULL)
    while (received := socket.recv_fds(connection, 4096, 3))[0]:
        request, descriptors = json.loads(Path(os.fsdecode(received[0])).read_text()), received[1]
        pid = os.fork()
        if not pid:
            connection.close()
            for to, descriptor in enumerate(descriptors[:2], 1):  # the third one stays open, with whoever is forked
                os.dup2(descriptor, to)
            if os.isatty(1):
                _sit_at(descriptors[0])
            os.chdir(request["folder"])
            _become(request["arguments"], request["environment"])
        for descriptor in descriptors:
            os.close(descriptor)
        connection.sendall(b"%d\n" % pid)
        connection.sendall(b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
