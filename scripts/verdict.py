"""Decides whether a run is to be started again: python3 scripts/verdict.py RUN prints a word and an exit code.

The word is again, stopped (by a signal, saved), failed or done; the code is that of the last attempt, 137 where it was
killed. Starts without progress are counted in RUN/.restarts, so that the count survives the machine. A start that left
no folder RUN is failed: there is nothing to continue. The folder's files are read as data, because a folder may
come from somebody else. Needs nothing but Python, 3.6 or newer: beside a container, that is the host's own one.
"""

import json
import os
import re
import sys
from contextlib import suppress
from pathlib import Path

STOPPED, KILLED, MOST_STARTS = 75, 137, 3
MOST_BYTES = 1 << 16


def read(path: Path) -> str:
    """A small file's text; "" where there is none, or no regular file."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK)) as file:
            return file.read(MOST_BYTES).decode(errors="replace")
    except OSError:
        return ""


def said_by(run: Path) -> "dict[str, object]":
    """exit.json; {} where there is none that can be read."""
    try:
        said = json.loads(read(run / "exit.json"))
    except (ValueError, RecursionError):
        return {}
    return said if isinstance(said, dict) else {}


def code_of(run: Path) -> int:
    """The end of the last attempt."""
    code = said_by(run).get("code")
    return code if type(code) is int and 0 <= code <= 255 else KILLED


def newest_step(run: Path) -> int:
    """Of the complete checkpoint that was written last; -1 for none. A damaged one may have a higher step."""
    found = [path for path in run.glob("checkpoints/step-*/manifest.json") if path.is_file()]
    named = [path for path in found if re.fullmatch(r"step-[0-9]{8,12}", path.parent.name)]
    return max(((path.stat().st_mtime_ns, int(path.parent.name[5:])) for path in named), default=(0, -1))[1]


def count_start(run: Path) -> int:
    """How many starts in a row, with the last one, brought no new checkpoint."""
    said = re.fullmatch(r"(-?[0-9]{1,12}) ([0-9]{1,3})\n?", read(run / ".restarts"))
    step = newest_step(run)
    count = int(said[2]) + 1 if said and int(said[1]) == step else 1
    temporary = run / f".restarts-{os.getpid()}"
    with suppress(FileNotFoundError):
        temporary.unlink()
    with open(temporary, "x") as file:
        file.write(f"{step} {count}\n")
    os.replace(temporary, run / ".restarts")
    return count


def verdict(run: Path) -> "tuple[str, int]":
    """(word, code)"""
    if not run.is_dir():
        print(f"restart.sh: there is no folder {run}: the command did not start, or its run has another name. Read its "
              "messages; it is not started again.", file=sys.stderr)  # fmt: skip
        return "failed", 1
    code = code_of(run)
    if code not in (1, 7, STOPPED, KILLED) or said_by(run).get("final"):
        return "done" if code == 0 else "failed", code
    if count_start(run) < MOST_STARTS:
        return "stopped" if code == STOPPED else "again", code
    with suppress(FileNotFoundError):
        (run / ".restarts").unlink()
    said = "left no exit.json, as after a kill" if code == KILLED else f"ended with {code}"
    print(f"restart.sh: {MOST_STARTS} starts of {run} in a row brought no new checkpoint, and the last one {said}: "
          f"it is not started again. Look for the cause in the messages above and in {run}, mend it, and give "
          "the same command.", file=sys.stderr)  # fmt: skip
    return "failed", code


if __name__ == "__main__":
    print(*verdict(Path(sys.argv[1])))
