"""How a program of ours ends: the one place where errors become sentences and exit codes."""

from __future__ import annotations

import io
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress

from daybreak.errors import Error, os_error
from daybreak.parallel import exit_code

INTERRUPTED = 130  # 128 + SIGINT, the shells' convention; training itself saves and exits 75


def _torch_is_broken(error: Exception) -> bool:
    """Whether torch, or a part of it, failed while it was imported: a file is missing, or a library of the system."""
    if isinstance(error, ModuleNotFoundError) and error.name == "torch":
        return True
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__) if frame.f_code.co_name == "<module>"]
    inside = any(frame.f_globals.get("__name__", "").partition(".")[0] == "torch" for frame in frames)
    return inside and isinstance(error, ImportError | OSError)


def ending(program: str, body: Callable[[], int | None]) -> int:
    """Run `body` and return its exit code, or that of what it raised, which is said in one sentence on stderr."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # no Console, which does so too
            stream.reconfigure(errors="backslashreplace")  # a console that lacks a character shows its number
    try:
        code, said = body() or 0, ""
        sys.stdout.flush()
    except Error as error:
        code, said = exit_code(error, os.environ), str(error)
        said = "" if error.elsewhere and os.environ.get("RANK") != "0" else said
    except KeyboardInterrupt:
        code, said = INTERRUPTED, "interrupted."
    except Exception as error:
        code, reason = 1, " ".join(str(error).split())
        if _torch_is_broken(error):
            said = f"torch's installation is incomplete ({reason}); install it again with pip install -e ."
        elif isinstance(error, OSError):
            code, said = (explained := os_error(error)).exit_code, str(explained)
        else:
            said = f"unexpected {type(error).__name__}: {error}; a bug in daybreak, please report the lines above."
            traceback.print_exc()
    with suppress(OSError, ValueError):  # nobody may be left to read it
        sys.stderr.write(f"{program}: {said}\n" if said else "")
        sys.stderr.flush()
    return code
