"""Statements that must run where nothing else has run: in processes forked from one that has only imported the heavy.

A new interpreter takes seconds to import torch, transformers and PEFT, which these statements are not about.
"""

from __future__ import annotations

import json
import subprocess
import sys


#: Reads {"setup": ..., "statements": {name: ...}} and prints {name: [exit code, output]}.
PARENT = """
import json, os, sys, tempfile, traceback
asked = json.load(sys.stdin)
exec(asked["setup"], {})
found = {}
for name, code in asked["statements"].items():
    with tempfile.TemporaryFile() as file:
        child = os.fork()
        if child == 0:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            status = 1
            try:
                exec(code, {"__name__": "__main__"})
                status = 0
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        file.seek(0)
        found[name] = [status, file.read().decode()]
print(json.dumps(found))
"""


class Outcomes:
    """What statements printed, by name; `of` raises the traceback of those that failed."""

    def __init__(self, setup: str, statements: dict[str, str]):
        asked = json.dumps({"setup": setup, "statements": statements})
        command = [sys.executable, "-c", PARENT]
        result = subprocess.run(command, input=asked, capture_output=True, text=True, timeout=300)
        assert result.returncode == 0, result.stderr
        self._found: dict[str, tuple[int, str]] = json.loads(result.stdout.splitlines()[-1])

    def of(self, name: str) -> str:
        status, output = self._found[name]
        assert status == 0, output
        return output
