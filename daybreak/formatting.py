"""Words and numbers for people: the name that was probably meant, durations, counts, sizes."""

from __future__ import annotations

import difflib
import re
import shlex
from collections.abc import Iterable

NEAR = 0.6  # of 1: how alike two last words must be, as in difflib's own search


def nearest(name: str, known: Iterable[str]) -> str:
    """The name most likely meant: one of the same last word (optim.warmup -> schedule.warmup), longer, or similar; ""
    if none is near in spelling."""
    names, name = list(known), name[:100]  # the comparison's time grows with the square of its length
    leaf = _leaf(name)
    likely = [n for n in names if _leaf(n) == leaf] or [n for n in names if n.startswith(name)]
    found = max(likely or names, key=lambda n: difflib.SequenceMatcher(None, name, n).ratio())  # the first of equals
    return found if likely or difflib.SequenceMatcher(None, leaf, _leaf(found)).ratio() >= NEAR else ""


def _leaf(name: str) -> str:
    return name.rpartition(".")[2].lower()


def meant(name: str, known: Iterable[str], otherwise: str, form: str = "{!r}") -> str:
    """'did you mean NAME?' about the nearest name, in this form; `otherwise` if none is near."""
    found = nearest(name, known)
    return f"did you mean {form.format(found)}?" if found else otherwise


def quoted(word: object) -> str:
    """A word as a shell takes it, for a command that a message names. shlex alone would quote other scripts too."""
    return str(word) if re.fullmatch(r"[\w@%+=:,./-]+", str(word)) else shlex.quote(str(word))


def format_duration(seconds: float | None) -> str:
    """Seconds for people, rounded to the two largest units: 42s, 3m05s, 2h07m, 1d03h; n/a for None."""
    if seconds is None:
        return "n/a"
    s = round(seconds)
    text = f"{s}s"
    for unit, size, below, part in (("m", 60, "s", 1), ("h", 3600, "m", 60), ("d", 86400, "h", 3600)):
        if s >= size:
            s = round(seconds / part) * part  # the nearest, which may fill the next larger unit
            text = f"{s // size}{unit}{s % size // part:02d}{below}"
    return text


def counted(x: float, unit: str) -> str:
    """A large number for people: three digits and a word."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if x >= 0.9995 * size:  # which rounds to 1, and not to 1000 of the next smaller unit
            return f"{x / size:.3g} {word} {unit}"
    return f"{x:,.0f} {unit}"


def several(n: int, unit: str) -> str:
    """A number and its unit, which takes an s unless there is one: 1 micro-step, 8 micro-steps."""
    return f"{n:,} {unit}" if n == 1 else f"{n:,} {unit}s"


def disk(x: float) -> str:
    """Bytes for people, in powers of ten as disks have them."""
    for size, unit in ((1e12, "TB"), (1e9, "GB")):
        if x >= 0.9995 * size:
            return f"{x / size:.3g} {unit}"
    return f"{x / 1e6:.3g} MB"
