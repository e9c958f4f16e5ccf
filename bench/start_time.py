"""Seconds from the start of a process to the start of the first forward: `daybreak train d12` on the embedded data.

    python bench/start_time.py [--batch.B 1 --run.device cuda ...]

Prints the median of three runs, after one that prepares the data and fills caches. The goal is 5 s.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STOP = """
import os, sys
from daybreak.cli.main import main
from daybreak.engine import Engine
Engine.eval_losses = lambda *args: os._exit(0)
sys.exit(main(sys.argv[1:]) or 9)
"""


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        taken = []
        (script := Path(folder, "stop.py")).write_text(STOP)
        for run in range(4):
            began = time.perf_counter()
            line = [sys.executable, str(script), "train", "d12", "--run.name", str(run), "--quiet", *sys.argv[1:]]
            subprocess.run(line, cwd=folder, check=True)
            taken.append(time.perf_counter() - began)
        print(f"median {statistics.median(taken[1:]):.2f} s of {', '.join(f'{t:.2f}' for t in taken[1:])}")


if __name__ == "__main__":
    main()
