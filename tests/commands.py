"""`daybreak` and `python` in the shell of an example, without the seconds that each takes to import everything.

A small client sends its arguments, folder, environment and streams to the tests' process, which forks (see ranks).
"""

from __future__ import annotations

import json
import os
import shlex
import socket
import socketserver
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import reduction
from pathlib import Path
from typing import Any

import ranks

CLIENT = """
import json, os, socket, sys

with socket.socket(socket.AF_UNIX) as server:
    server.connect(sys.argv[1])
    socket.send_fds(server, [b"."], [0, 1, 2])
    server.sendall(json.dumps([sys.argv[2], sys.argv[3:], os.getcwd(), dict(os.environ)]).encode())
    server.shutdown(socket.SHUT_WR)
    sys.exit(int(server.recv(9)))
"""


def python(args: list[str]) -> int:
    """The result of `python ARGS` with the program `-c TEXT`."""
    option, text = args
    assert option == "-c"
    exec(compile(text, "<example>", "exec"), {"__name__": "__main__"})
    return 0


class Answer(socketserver.BaseRequestHandler):
    """One command, from its request to its exit code."""

    def handle(self) -> None:
        _, streams, *_ = socket.recv_fds(self.request, 1, 3)
        name, args, cwd, env = json.loads(b"".join(iter(lambda: self.request.recv(1 << 16), b"")))
        run = {"daybreak": ranks.daybreak, "python": python}[name]
        process = ranks.FORK.Process(target=_begin, args=(run, args, cwd, env, *map(reduction.DupFd, streams)))
        process.start()
        for stream in streams:
            os.close(stream)
        process.join()
        self.request.sendall(b"%d" % (process.exitcode or 0))


def _begin(run: ranks.Run, args: list[str], cwd: str, env: dict[str, str], *streams: Any) -> None:
    for number, stream in enumerate(streams):
        os.dup2(stream.detach(), number)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115  (a fork's is empty)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.exit(run(args))


@contextmanager
def commands(folder: Path) -> Iterator[str]:
    """Functions for bash, of the names `daybreak` and `python`, whose processes are forked."""
    path, client = folder / "socket", folder / "client.py"
    client.write_text(CLIENT)
    with socketserver.ThreadingUnixStreamServer(str(path), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        start = shlex.join([sys.executable, "-S", "-E", str(client), str(path)])
        yield "".join(f'{name}() {{ {start} {name} "$@"; }}\n' for name in ("daybreak", "python"))
        server.shutdown()
