"""Processes where nothing has run but `import peft`: forked from one that has imported it.

A new interpreter takes seconds to import torch, transformers and PEFT, which most tests of processes are not about.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path


#: Reads requests, one JSON object a line, and answers each with a line: `start` forks, `wait` tells how one ended. A
#: child leaves the loop and does what an interpreter does that was given a script or code. It ends as such a one does
#: except that it does not free everything, which takes more than a second of copying memory that it shares.
PARENT = """
import atexit, gc, json, os, runpy, sys, threading, traceback, types
import peft

gc.freeze()


def next_child():
    for line in sys.stdin:
        request = json.loads(line)
        if "wait" in request:
            pid, status = os.waitpid(request["wait"], os.WNOHANG)
            print(json.dumps(os.waitstatus_to_exitcode(status) if pid else None), flush=True)
        elif (pid := os.fork()) == 0:
            return request
        else:
            print(pid, flush=True)
    sys.exit()


def run(code):
    if sys.argv[0] == "-c":
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), vars(main))
    else:
        sys.path[0] = os.path.dirname(sys.argv[0])
        runpy.run_path(sys.argv[0], run_name="__main__")


request = next_child()
for number, path in ((1, request["out"]), (2, request["err"])):
    os.dup2(os.open(path, os.O_WRONLY), number)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
os.environ.update(request["environment"])
os.chdir(request["folder"])
sys.argv, status = request["argv"], 0
try:
    run(request["code"])
except SystemExit as end:
    status = 0 if end.code is None else end.code
    if not isinstance(status, int):
        print(status, file=sys.stderr)
        status = 1
except BaseException:
    traceback.print_exc()
    status = 1
for thread in threading.enumerate():
    if thread is not threading.main_thread() and not thread.daemon:
        thread.join()
atexit._run_exitfuncs()
sys.stdout.flush()
sys.stderr.flush()
os._exit(status)
"""


class Child:
    """A process that was forked; `out` and `err` are files of what it has printed."""

    def __init__(self, parent: Parent, pid: int, out: Path, err: Path):
        self.pid, self.out, self.err = pid, out, err
        self._parent, self._code = parent, None

    def poll(self) -> int | None:
        """Exit code, the negative of a signal that ended it; None while it runs."""
        if self._code is None:
            self._code = self._parent.ask({"wait": self.pid})
        return self._code

    def wait(self, timeout: float = 300) -> int:
        """Exit code, when it has ended; after `timeout` seconds it is killed."""
        end = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > end:
                self.kill()
                raise TimeoutError(f"{timeout} s have passed.\n{self.err.read_text()}")
            time.sleep(0.02)
        return code

    def kill(self) -> None:
        """Kill it, wait for its end, and check that it had not ended before."""
        os.kill(self.pid, signal.SIGKILL)
        assert self.wait() == -signal.SIGKILL, self.err.read_text()

    def result(self) -> subprocess.CompletedProcess:
        """How it ended and what it printed, as `subprocess.run` tells it."""
        return subprocess.CompletedProcess("", self.wait(), self.out.read_text(), self.err.read_text())


class Parent:
    """The process that has imported PEFT, in the environment of this one with changes; it ends with this one."""

    def __init__(self, **environment: str):
        self._folder = tempfile.TemporaryDirectory()
        self._count = 0
        own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
        self._process = subprocess.Popen(
            [sys.executable, "-c", PARENT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=os.environ | own | environment,
        )
        atexit.register(self.close)

    def close(self) -> None:
        """End it; its children go on."""
        self._process.communicate()

    def ask(self, request: dict) -> int | None:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def start(self, what: str | Path, *arguments: str, folder: Path | None = None, **environment: str) -> Child:
        """Run a script, or code as `python -c` does, with arguments, in a folder, with changes of the environment.

        What libraries read of the environment when they are imported must be given to `Parent`.
        """
        script = isinstance(what, Path)
        self._count += 1
        out, err = (Path(self._folder.name, f"{self._count}.{name}") for name in ("out", "err"))
        out.touch()
        err.touch()
        request = {
            "code": "" if script else what,
            "argv": [str(what) if script else "-c", *map(str, arguments)],
            "folder": str(folder or os.getcwd()),
            "environment": environment,
            "out": str(out),
            "err": str(err),
        }
        return Child(self, self.ask(request), out, err)

    def start_group(self, count: int, script: Path, *arguments: str) -> list[Child]:
        """Several processes of one script, told of each other as `torchrun` does it."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        group = {"WORLD_SIZE": f"{count}", "LOCAL_WORLD_SIZE": f"{count}", "MASTER_ADDR": "127.0.0.1"}
        return [
            self.start(script, *arguments, **group, MASTER_PORT=port, RANK=f"{rank}", LOCAL_RANK=f"{rank}")
            for rank in range(count)
        ]

    def run(self, *arguments, **options) -> subprocess.CompletedProcess:
        """`start`, and wait for its end."""
        return self.start(*arguments, **options).result()

    def output(self, code: str) -> str:
        """What code prints, errors included; raises them where it fails."""
        result = self.run(code)
        assert result.returncode == 0, result.stderr
        return result.stdout + result.stderr


@functools.cache
def usual() -> Parent:
    """The one for all tests of this process, which asks nobody on the net."""
    return Parent(HF_HUB_OFFLINE="1")
