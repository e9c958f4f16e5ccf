"""Real processes that train together: start them, wait for them, read what they say."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def environment(rank: int, world: int, port: int, **more: str) -> dict[str, str]:
    own = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    quiet = {"OMP_NUM_THREADS": "1", "TORCH_CPP_LOG_LEVEL": "FATAL", "PYTHONWARNINGS": "ignore"}
    return os.environ | quiet | {k: str(v) for k, v in own.items()} | more


STARTED: list[Any] = []


def end_all() -> None:
    """End what a failed test left running."""
    for p in STARTED:
        if p.poll() is None:
            p.kill()
            p.wait()
    STARTED.clear()


def start(world: int, command: list[Any], cwd: Path, ranks: range | None = None, **more: str) -> list[Any]:
    """Start ranks of one launch of `python COMMAND`; each one's output is in CWD/rank-N.txt."""
    port, made = int(more.pop("port", 0)) or free_port(), []
    for rank in ranks if ranks is not None else range(world):
        with open(cwd / f"rank-{rank}.txt", "w") as out:
            line = [sys.executable, *map(str, command)]
            env = environment(rank, world, port, **more)
            made.append(subprocess.Popen(line, cwd=cwd, env=env, stdout=out, stderr=subprocess.STDOUT))
    STARTED.extend(made)
    return made


def finish(processes: list[Any], seconds: float = 120) -> list[int]:
    """Their exit codes; whatever still runs after `seconds` is killed."""
    deadline = time.monotonic() + seconds
    try:
        return [p.wait(max(deadline - time.monotonic(), 0.1)) for p in processes]
    finally:
        for p in processes:
            if p.poll() is None:
                p.kill()
                p.wait()


def said(cwd: Path, rank: int) -> str:
    return (cwd / f"rank-{rank}.txt").read_text()
