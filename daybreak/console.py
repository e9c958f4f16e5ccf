"""The standard streams of a process may break while it works: a closed pipe, a full disk, a terminal that is gone."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, TextIO


class Console:
    """A text stream for people. After its first failed write it is silent, and the program continues.

    result: the stream carries the result of a verb. A reader that leaves then ends the verb quietly with exit code 0,
    and a full disk raises OSError. A character that the stream cannot encode shows its number.
    """

    def __init__(self, stream: TextIO, result: bool = False) -> None:
        self._stream, self._result = stream, result

    def write(self, text: str) -> None:
        """Write `text`, if the stream still takes it."""
        encoding = self._stream.encoding or "utf-8"
        if text != "":  # click tries the stream with an empty text, and hides what comes of it
            self._attempt(self._stream.write, text.encode(encoding, "backslashreplace").decode(encoding))

    def flush(self) -> None:
        """Hand on what is buffered, if the stream still takes it."""
        self._attempt(self._stream.flush)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _attempt(self, call: Callable[..., Any], *args: str) -> None:
        try:
            call(*args)
        except (OSError, ValueError) as error:
            broken, self._stream = self._stream, open(os.devnull, "w")  # noqa: SIM115
            with suppress(OSError, ValueError):  # for what is buffered, and for code that knows only the number
                os.dup2(self._stream.fileno(), broken.fileno())
            if not self._result:
                return
            if getattr(error, "errno", 0) == errno.EPIPE:
                raise SystemExit(0) from None
            if isinstance(error, OSError):
                error.filename = "standard output"
            raise


def guard_streams(result: bool) -> None:
    """Make stdout and stderr of this process a Console. `result`: stdout carries the result of a verb.

    Streams that were closed before the start lead nowhere, so that no file of ours gets their numbers.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    sys.stdin = getattr(sys, "stdin", None) or open(os.devnull)  # noqa: SIM115
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115
        if getattr(sys, name) is getattr(sys, f"__{name}__"):  # not redirected, as a test or a notebook does
            setattr(sys, name, Console(stream, result and name == "stdout"))
