"""The keys of matmuls, and the measured tables that hold the fastest algorithm of each key for one GPU.

A `Key` holds all that a library's choice of algorithm may depend on, in the library's letters (see cublaslt.py). Tables
are JSON files in kernels/cuda/tables, one for a GPU and a version of the library. tune.py writes them. An entry holds
the library's best algorithm. If quack was installed, it also holds under "quack" the tile with which quack is faster,
or "" if it is not.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from functools import cache
from math import log
from pathlib import Path
from typing import Any, NamedTuple

from daybreak.checked import FLAG, TEXT, WHOLE, matching, read_json
from daybreak.errors import ConfigError

FAR = log(4)  # batches that differ by a larger factor in rows need other tiles
TABLES = Path(__file__).parent / "tables"
HEX = matching("an algorithm in hexadecimal digits", "[0-9a-f]{128}")
TILE = matching("a tile, or nothing", r"(\d{1,4}x\d{1,4} (pair|shared) \dx\d)?")
TABLE = {"card": TEXT, "cublaslt": WHOLE, "plans": {str: {"algo?": HEX, "quack?": TILE, "separate?": FLAG}}}
DTYPES = ("bf16", "fp32", "tf32", "e4m3slow", "e4m3", "e5m2slow", "e5m2")
EPILOGUES = ("plain", "bias", "gelu", "dgelu")
_N = "[1-9][0-9]{0,9}"
KEY = re.compile(rf"({'|'.join(DTYPES)}) ([nt][nt]) m({_N}) n({_N}) k({_N}) ({'|'.join(EPILOGUES)}) (beta0|beta1|add)"
                 rf"((?: (?:ld(?:[abcd]|aux)|align){_N})*)")  # fmt: skip


class Key(NamedTuple):
    """One kind of matmul. `trans`: n or t for A and for B. `mode`: D is overwritten (beta0), added to (beta1), or gets
    another matrix C added (add). lda to ldaux are row strides of A, B, C, D and GELU's input. `align`: bytes, at most
    16."""

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
        """Readable and complete: row strides and alignment are included if they are not the usual ones."""
        usual = dense(*self[:7])
        odd = "".join(f" {name}{value}" for name, value in self._asdict().items() if value != getattr(usual, name))
        return f"{self.dtype} {self.trans} m{self.m} n{self.n} k{self.k} {self.epilogue} {self.mode}{odd}"


def dense(dtype: str, trans: str, m: int, n: int, k: int, epilogue: str = "plain", mode: str = "beta0") -> Key:
    """The key of a matmul of whole, aligned tensors."""
    aux = m if "gelu" in epilogue else 0
    return Key(
        dtype, trans, m, n, k, epilogue, mode, k if trans[0] == "t" else m, k if trans[1] == "n" else n, m, m, aux, 16
    )


@cache
def parse(text: str) -> Key:
    """The key that `str` wrote."""
    if not (match := KEY.fullmatch(text)):
        raise ValueError(f"not a matmul: {text!r}")
    dtype, trans, m, n, k, epilogue, mode, odd = match.groups()
    key = dense(dtype, trans, int(m), int(n), int(k), epilogue, mode)
    return key._replace(**{name: int(value) for name, value in re.findall(r"([a-z]+)(\d+)", odd)})


def table_path(gpu: str, version: int) -> Path:
    """The table's path for a GPU (torch's name of it) and a version of the library (from cublasLtGetVersion)."""
    return TABLES / f"{re.sub(r'[^a-z0-9]+', '-', gpu.lower())}-cublaslt-{version}.json"


def read_table(path: Path, gpu: str, version: int) -> dict[str, dict[str, Any]]:
    """The plans of a table file: key -> entry. Empty if there is no file, or if it is for another GPU or version.
    Raises ConfigError for a damaged one."""
    if not path.exists():
        return {}
    table = read_json(path, TABLE, ConfigError, "remove it, and write it again with daybreak bench --tune")
    plans: dict[str, dict[str, Any]] = table["plans"]
    if bad := [text for text in plans if not KEY.fullmatch(text)]:
        raise ConfigError(f"{path}: plans has the key {bad[0][:100]!r}, which names no matmul; remove it.")
    return plans if (table["card"], table["cublaslt"]) == (gpu, version) else {}


def untuned(gpu: str, version: int) -> str:
    """A warning if no table is for this GPU and exactly this version of the library, else an empty string."""
    if read_table(table_path(gpu, version), gpu, version):
        return ""
    return (
        f"no table of measured matmuls is for {gpu} and cuBLASLt {version}: the library's first heuristics are used, "
        f"slower, and with other bits than measured ones; daybreak bench TARGET --tune {TABLES} makes a table"
    )


def tables_digest() -> str:
    """Fingerprint of the shipped tables: installations with equal fingerprints make equal choices."""
    digest = hashlib.sha256()
    for path in sorted(TABLES.glob("*.json")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def nearest(table: Mapping[str, dict[str, Any]], key: Key) -> tuple[str, dict[str, Any]]:
    """The source and entry of a key, or of the same key with the nearest number of rows in the batch; else empty.

    The rows of a batch are n, or k in a weight's gradient, where they are summed. In fp8 such gradients are those with
    slow sums. The weight's shape must be equal.
    """
    if entry := table.get(str(key)):
        return "table", entry
    slow = key.dtype.endswith("slow")
    rows = "k" if key.trans == "nt" or slow else "n"
    own = {name: getattr(key, name) for name in ((rows, "lda", "ldb") if slow else (rows,))}  # rows of such are k long
    others = [
        (apart, text)
        for text in table
        if (other := parse(text))._replace(**own) == key
        and (apart := abs(log(getattr(other, rows) / getattr(key, rows)))) <= FAR
    ]
    return (f"table ({min(others)[1]})", table[min(others)[1]]) if others else ("", {})
