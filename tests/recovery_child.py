"""The command `daybreak` in a process that something happens to at a named place. Used by tests/test_recovery_*.py.

    python recovery_child.py '{"do": "kill", "at": "audit:os.rename:/step-", "n": 2}' train runs/a

at: "audit:EVENT:REGEX", a Python audit event (a file operation) whose arguments match; "call:MODULE:NAME" before, and
"after:MODULE:NAME" after a call. n: which time (from the first). do: kill; term, int, usr1 (a signal to itself); twice
(two SIGTERMs); hang; slow (for `seconds`, and until a file has a text: [FILE, TEXT]) and errno:NAME (OSError), both
each time from the n-th to the m-th.
"""

from __future__ import annotations

import errno
import importlib
import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

from patience import until

SIGNALS = {"kill": ["SIGKILL"], "term": ["SIGTERM"], "int": ["SIGINT"], "usr1": ["SIGUSR1"],
           "twice": ["SIGTERM", "SIGTERM"]}  # fmt: skip


class Accident:
    def __init__(
        self, do: str, at: str, n: int = 1, m: int = 10**9, seconds: float = 1.0, until: tuple[str, str] | None = None
    ) -> None:
        self.do, self.n, self.m, self.seconds, self.until, self.count = do, n, m, seconds, until, 0
        kind, where, what = at.split(":", 2)
        if kind == "audit":
            pattern = re.compile(what)
            sys.addaudithook(
                lambda event, args: self.happen() if event == where and pattern.search(str(args)) else None
            )
        else:
            self.wrap(where, what, after=kind == "after")

    def wrap(self, module: str, name: str, after: bool) -> None:
        owner: Any = importlib.import_module(module)
        *path, last = name.split(".")
        for part in path:
            owner = getattr(owner, part)
        original = getattr(owner, last)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if not after:
                self.happen()
            result = original(*args, **kwargs)
            if after:
                self.happen()
            return result

        setattr(owner, last, wrapped)

    def happen(self) -> None:
        self.count += 1
        if self.count < self.n or self.count > self.m:
            return
        if self.do == "slow":
            time.sleep(self.seconds)
            if self.until:
                path, text = self.until
                until(lambda: text in Path(path).read_text())
        elif self.do.startswith("errno:"):
            code = getattr(errno, self.do[6:])
            raise OSError(code, os.strerror(code))
        elif self.count == self.n:
            while self.do == "hang":
                time.sleep(1.0)
            for name in SIGNALS[self.do]:
                os.kill(os.getpid(), getattr(signal, name))
                time.sleep(0.01)  # a handler runs in the main thread, between two of its instructions


if __name__ == "__main__":
    Accident(**json.loads(sys.argv[1]))
    from daybreak.cli.main import main

    sys.exit(main(sys.argv[2:]))
