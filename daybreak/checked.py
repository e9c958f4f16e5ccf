"""JSON that is checked before it is used: every key's type, numbers that fit 64 bits, a bounded size.

A folder may come from somebody else, a file may be damaged or edited. `read_json` compares a file with a specification,
and names the file, the key, the value and the rule. A specification looks like the values that it describes:

    WHOLE, NUMBER, TEXT, FLAG     a single value, of which a Rule says whether it is right; ANY: anything
    [WHOLE]                       a list of them
    (TEXT, WHOLE)                 a list of just these
    {"a": WHOLE, "b?": TEXT}      an object with these keys, and any others; the second may be missing
    {str: WHOLE}                  an object with any keys
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import repeat
from pathlib import Path
from reprlib import repr as shortened
from typing import Any

from daybreak.errors import Error, explained

MOST_BYTES = 16 << 20  # of a file: Python's objects take up to 30 times as much
LIMIT = 1 << 63


@dataclass(frozen=True)
class Rule:
    """A condition for a value, and the words for it ('must be at least 1')."""

    text: str
    holds: Callable[[Any], bool]


WHOLE = Rule("must be a whole number from 0 to 2^63 - 1", lambda x: type(x) is int and 0 <= x < LIMIT)
NUMBER = Rule("must be a number from -2^63 to 2^63", lambda x: type(x) in (int, float) and -LIMIT <= x <= LIMIT)
TEXT = Rule("must be text in UTF-8", lambda x: type(x) is str and not re.search("[\ud800-\udfff]", x))
FLAG = Rule("must be true or false", lambda x: type(x) is bool)
ANY = Rule("may be anything", lambda _: True)


def matching(words: str, form: str) -> Rule:
    """Text that a regular expression matches as a whole."""
    return Rule(f"must be {words}", lambda x: TEXT.holds(x) and re.fullmatch(form, x) is not None)


def or_null(rule: Rule) -> Rule:
    """The same, or null."""
    return Rule(f"{rule.text} or null", lambda x: x is None or rule.holds(x))


FILE_NAME = matching("the name of a file in the same folder", r"(?!\.\.?$)[^/\0]{1,255}")
_CODEC = r"(\+img-[0-9a-f]{12})?"  # of pictures, behind the name of the text's tokenizer
TOKENIZER = matching(  # never a path
    "gpt2, bytes, gpt2-N or hf-...", rf"(gpt2(-[0-9]{{1,6}})?|bytes|hf-[0-9a-f]{{12}}){_CODEC}"
)


def read_bytes(path: Path, most: int = MOST_BYTES) -> bytes:
    """A file's bytes; none of a pipe, for which nobody waits. Raises OSError, and ValueError for more than `most`."""
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise ValueError(f"it has {size} bytes, and at most {most} are read")
        return file.read(size)


def read_json(path: Path, spec: Any, kind: type[Error], fix: str) -> Any:
    """The value in a JSON file, which is as `spec` says. Raises `kind` in one sentence, which ends with `fix`."""
    try:
        with explained(kind, f"{path} cannot be read", fix):
            value = json.loads(read_bytes(path), object_pairs_hook=_once)
    except (ValueError, RecursionError) as error:
        raise kind(f"{path} is not JSON ({error}); {fix}.") from None
    if said := misfit(value, spec):
        raise kind(f"{path}: {said}; {fix}.")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError(f"it has the key {_name(Counter(key for key, _ in pairs).most_common(1)[0][0])} twice")
    return found


def _name(key: str) -> str:
    return key if re.fullmatch(r"[\w. -]{1,80}", key) else shortened(key)


def misfit(value: Any, spec: Any, at: str = "") -> str:
    """The first part of `value` that is not as `spec` says, with the rule; "" if all is. at: the name of `value`."""
    if isinstance(spec, Rule):
        return "" if spec.holds(value) else f"{at or 'all of it'} = {shortened(value)} {spec.text}"
    if isinstance(spec, dict) and type(value) is dict:
        before = f"{at}." if at else ""
        rules = dict.fromkeys(value, spec[str]) if str in spec else _rules(spec, value)
        if missing := [key for key in rules if key not in value]:
            return f"{before}{missing[0]} is missing"
        parts = [(value[key], rule, before + _name(key)) for key, rule in rules.items()]
    elif type(value) is list and (isinstance(spec, list) or (isinstance(spec, tuple) and len(spec) == len(value))):
        each = zip(value, repeat(spec[0]) if isinstance(spec, list) else spec, strict=False)
        parts = [(x, rule, f"{at}[{i}]") for i, (x, rule) in enumerate(each)]
    else:
        words = "an object" if isinstance(spec, dict) else "a list" if isinstance(spec, list) else f"{len(spec)} values"
        return misfit(value, Rule(f"must be {words}", lambda _: False), at)
    return next(filter(None, (misfit(*part) for part in parts)), "")


def _rules(spec: dict[str, Any], value: dict[str, Any]) -> dict[str, Any]:
    return {key.rstrip("?"): rule for key, rule in spec.items() if key[-1] != "?" or key[:-1] in value}
