"""What a matrix product is called, and the measured tables that name the fastest algorithm of each for a card.

A `Key` says everything a library's choice of algorithm may rest on, in the library's own letters (see cublaslt.py).
Tables are JSON files in kernels/cuda/tables, one for a card and a version of the library, written by tune.py. An entry
holds the library's best algorithm and, where quack was there, under "quack" the tile with which it is faster, or "".
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from functools import cache
from math import log
from pathlib import Path
from typing import Any, NamedTuple

FAR = log(4)  # a batch of so many times more or fewer rows wants other tiles
TABLES = Path(__file__).parent / "tables"
DTYPES = ("bf16", "fp32", "tf32")
EPILOGUES = ("plain", "bias", "gelu", "dgelu")


class Key(NamedTuple):
    """One kind of product. `trans`: n or t for A and B. `mode`: D alone (beta0), added to D (beta1), C added (add).
    Leading dimensions are row strides; `ldaux` is that of GELU's input. `align`: bytes, at most 16."""

    dtype: str
    trans: str
    m: int
    n: int
    k: int
    epilogue: str
    mode: str
    lda: int
    ldb: int
    ldc: int
    ldd: int
    ldaux: int
    align: int

    def __str__(self) -> str:
        """Readable and complete: leading dimensions and alignment are named where they are not the usual ones."""
        usual = dense(*self[:7])
        odd = "".join(f" {name}{value}" for name, value in self._asdict().items() if value != getattr(usual, name))
        return f"{self.dtype} {self.trans} m{self.m} n{self.n} k{self.k} {self.epilogue} {self.mode}{odd}"


def dense(dtype: str, trans: str, m: int, n: int, k: int, epilogue: str = "plain", mode: str = "beta0") -> Key:
    """The key of a product of whole, aligned tensors."""
    aux = m if "gelu" in epilogue else 0
    return Key(
        dtype, trans, m, n, k, epilogue, mode, k if trans[0] == "t" else m, k if trans[1] == "n" else n, m, m, aux, 16
    )


@cache
def parse(text: str) -> Key:
    """The key that `str` wrote."""
    dtype, trans, *words = text.split()
    sizes = [int(words[i].removeprefix(letter)) for i, letter in enumerate("mnk")]
    key = dense(dtype, trans, sizes[0], sizes[1], sizes[2], words[3], words[4])
    if dtype not in DTYPES or key.epilogue not in EPILOGUES or key.mode not in ("beta0", "beta1", "add"):
        raise ValueError(f"not a product: {text!r}")
    odd = [re.fullmatch(r"(ld(?:[abcd]|aux)|align)(\d+)", word) for word in words[5:]]
    return Key(**{**key._asdict(), **{match[1]: int(match[2]) for match in odd if match}})


def table_path(card: str, version: int) -> Path:
    """The table of a card (torch's name for it) and a version of the library (as cublasLtGetVersion gives it)."""
    return TABLES / f"{re.sub(r'[^a-z0-9]+', '-', card.lower())}-cublaslt-{version}.json"


def read_table(path: Path, card: str, version: int) -> dict[str, dict[str, Any]]:
    """The plans of a table file: key -> entry. Empty if there is none, or if it is for another card or version."""
    if not path.exists():
        return {}
    table = json.loads(path.read_text())
    plans: dict[str, dict[str, Any]] = table["plans"]
    return plans if (table["card"], table["cublaslt"]) == (card, version) else {}


def untuned(card: str, version: int) -> str:
    """What there is to say where no table is for this card and just this version of the library; empty where one is."""
    if read_table(table_path(card, version), card, version):
        return ""
    return (
        f"no table of measured products is for {card} and cuBLASLt {version}: the library's first heuristics are used, "
        f"slower, and with other bits than measured ones; daybreak bench TARGET --tune {TABLES} makes a table"
    )


def tables_digest() -> str:
    """Fingerprint of the shipped tables: two installations with equal ones make equal choices."""
    digest = hashlib.sha256()
    for path in sorted(TABLES.glob("*.json")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def nearest(table: Mapping[str, dict[str, Any]], key: Key) -> tuple[str, dict[str, Any]]:
    """The entry of a product, or that of the same product with the nearest number of rows in the batch; else empty.

    A batch's rows are n, or what is summed over (k) in a weight's gradient; the weight's own sides must be equal.
    """
    if entry := table.get(str(key)):
        return "table", entry
    rows = "k" if key.trans == "nt" else "n"
    others = [
        (apart, text)
        for text in table
        if (other := parse(text))._replace(**{rows: getattr(key, rows)}) == key
        and (apart := abs(log(getattr(other, rows) / getattr(key, rows)))) <= FAR
    ]
    return (f"table ({min(others)[1]})", table[min(others)[1]]) if others else ("", {})
