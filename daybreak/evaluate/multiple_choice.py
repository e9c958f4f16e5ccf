"""Multiple choice by likelihood: llm.c's in-loop HellaSwag, its eval `.bin`, and the scorer that lm-eval's tasks share.

Rules (docs/evaluation.md): the context and " " + ending are tokenized apart; a row longer than T + 1 tokens loses the
beginning of its context; the lowest loss wins, the first of equals. `acc_norm` is llm.c's: mean loss per token; `acc`:
their sum.
"""

from __future__ import annotations

import logging
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from daybreak.data.formats import read_records
from daybreak.data.kinds import guess
from daybreak.data.tokenizer import Tokenizer
from daybreak.engine import Engine
from daybreak.errors import ConfigError, DataError, explained
from daybreak.parallel import ALONE, Check, Group

log = logging.getLogger("daybreak")

MAGIC, VERSION, START = 20240522, 1, 65535
_ALIGN = 8  # rows are padded to a multiple of this, so that there are few shapes
Row = tuple[Sequence[int], Sequence[int]]  # context (at least one token), continuation


@dataclass(frozen=True)
class Example:
    """A context, its possible endings, and which of them is right; token ids."""

    context: list[int]
    endings: list[list[int]]
    label: int


@dataclass(frozen=True)
class Accuracy:
    """Fractions of examples that were answered rightly by the sum (acc) and by the mean (acc_norm) of the losses."""

    acc: float
    acc_norm: float
    examples: int


def read_eval_bin(path: Path) -> list[Example]:
    """The examples of an llm.c eval `.bin`. DataError names what is wrong with it."""
    data = path.read_bytes()
    it_is = guess(data, MAGIC)
    if len(data) < 1024 or len(data) % 2:
        raise DataError(f"{path} is not an eval file: {len(data)} bytes{it_is}.")
    magic, version, count, longest = struct.unpack_from("<4i", data)
    if (magic, version) != (MAGIC, VERSION):
        raise DataError(f"{path} is not an eval file: magic {magic}, version {version} instead of {MAGIC}, {VERSION}"
                        f"{it_is}.")  # fmt: skip
    stream, at, examples = np.frombuffer(data, "<u2", offset=1024).tolist(), 0, list[Example]()
    for i in range(count):
        start, size, index, label, choices = (*stream[at : at + 5], *[-1] * 5)[:5]
        end = at + size // 2
        texts, place = list[list[int]](), at + 5
        while place < min(end, len(stream)) and len(texts) <= choices:
            texts.append(stream[place + 1 : place + 1 + stream[place]])
            place += 1 + stream[place]
        whole = (start, index, place, len(texts)) == (START, i, end, choices + 1) and end <= len(stream)
        if not whole or size > longest or label >= choices or not all(texts):
            raise DataError(f"{path}: example {i} is damaged; make the file again.")
        examples.append(Example(texts[0], texts[1:], label))
        at = end
    if at != len(stream) or not examples:
        raise DataError(f"{path} has {len(stream) - at} values after its {count} examples; make the file again.")
    return examples


def write_eval_bin(path: Path, examples: Sequence[Example]) -> None:
    """Write llm.c's eval `.bin`. ConfigError where ids, sizes or counts do not fit its uint16 fields."""
    parts = []
    for i, e in enumerate(examples):
        body = [i, e.label, len(e.endings), len(e.context), *e.context]
        for ending in e.endings:
            body += [len(ending), *ending]
        parts.append([START, 2 * len(body) + 4, *body])
    if not parts or len(parts) >= START or max(max(p[1:]) for p in parts) >= START:
        raise ConfigError(f"{path}: an eval .bin holds 1 to 65534 examples, sizes and token ids below 65535.")
    header = struct.pack("<4i", MAGIC, VERSION, len(parts), max(p[1] for p in parts)).ljust(1024, b"\0")
    path.write_bytes(header + b"".join(np.array(p, "<u2").tobytes() for p in parts))


def read_hellaswag(path: Path, tokenizer: Tokenizer) -> list[Example]:
    """The examples of HellaSwag's original JSON Lines (`ctx`, `endings`, `label`). DataError names file and line."""
    examples = []
    for line, record in read_records(path):
        keys = ("ctx", "endings", "label") if isinstance(record, dict) else ()
        ctx, endings, label = [record.get(key) for key in keys] or [None] * 3
        texts = isinstance(endings, list) and all(isinstance(e, str) and e for e in endings)
        label = int(label) if str(label).isdecimal() else -1  # the Hub's copy has it as text
        if not (isinstance(ctx, str) and texts and 0 <= label < len(endings or [])):
            raise DataError(f"{path} line {line} needs ctx (text), endings (list of text), label (place in that list).")
        ids = [tokenizer.encode(text).tolist() for text in (ctx, *(f" {ending}" for ending in endings or []))]
        examples.append(Example(ids[0] or [tokenizer.eot], ids[1:], label))
    return examples


def load_examples(path: Path, tokenizer: Tokenizer, T: int, limit: int = 0) -> list[Example]:
    """The examples of either file, `limit` of them evenly spaced (0: all). Those with an ending of more than T tokens
    are left out, with a warning that counts them. ConfigError, DataError."""
    with explained(DataError, f"cannot read {path}"):
        examples = read_eval_bin(path) if path.suffix == ".bin" else read_hellaswag(path, tokenizer)
    if path.suffix == ".bin" and tokenizer.name != "gpt2":
        raise ConfigError(f"{path} holds GPT-2 tokens, this data {tokenizer.name!r}'s; give the original .jsonl.")
    if not examples:
        raise DataError(f"{path} has no examples; copy it again.")
    n = min(limit or len(examples), len(examples))
    chosen = [examples[i * len(examples) // n] for i in range(n)]
    kept = [e for e in chosen if max(map(len, e.endings)) <= T]
    if len(kept) < n:
        said = f"{path}: {n - len(kept)} of {n} examples have an ending of more than T = {T} tokens and are left out"
        if not kept:
            raise DataError(f"{said}; use a larger T.")
        log.warning("%s", said)
    return kept


def losses_of(engine: Engine, rows: Sequence[Row], check: Check = lambda: None) -> list[NDArray[np.floating]]:
    """Loss of each token of each row's continuation. Rows of like length share a batch, so little of it is padding."""
    if (longest := max((len(ending) for _, ending in rows), default=0)) > engine.T:
        raise DataError(f"a continuation has {longest} tokens, and the model computes T = {engine.T}; it has no score.")
    cut = [([*context, *ending][-engine.T - 1 :], len(ending)) for context, ending in rows]
    order = sorted(range(len(rows)), key=lambda i: -len(cut[i][0]))
    found: list[NDArray[np.floating]] = [np.empty(0)] * len(rows)
    for first in range(0, len(order), engine.B):
        check()
        these = order[first : first + engine.B]
        t = min(-(-(len(cut[these[0]][0]) - 1) // _ALIGN) * _ALIGN, engine.T)
        tokens, targets = np.zeros((len(these), t), np.int64), np.full((len(these), t), -1, np.int64)
        for row, i in enumerate(these):
            ids, n = cut[i]
            tokens[row, : len(ids) - 1] = ids[:-1]
            targets[row, len(ids) - 1 - n : len(ids) - 1] = ids[len(ids) - n :]
        losses = engine.eval_losses(torch.from_numpy(tokens), torch.from_numpy(targets)).float().cpu().numpy()
        for row, i in enumerate(these):
            found[i] = losses[row][targets[row] >= 0]
    return found


def accuracy(
    engine: Engine, examples: Sequence[Example], check: Check = lambda: None, group: Group = ALONE
) -> Accuracy:
    """Score examples by the rules above. `check` runs before each batch, equally often on every rank. Collective: ranks
    share the examples out."""
    shares = [examples[rank :: group.world] for rank in range(group.world)]
    batches = [-(-sum(len(e.endings) for e in share) // engine.B) for share in shares]
    mine = shares[group.rank]
    each = iter(losses_of(engine, [(e.context, ending) for e in mine for ending in e.endings], check))
    for _ in range(max(batches) - batches[group.rank]):
        check()
    right = np.zeros(2, np.int64)
    for e in mine:
        losses = [next(each).astype(np.float64) for _ in e.endings]
        for k, values in enumerate(([x.sum() for x in losses], [x.mean() for x in losses])):
            right[k] += int(np.argmin(values)) == e.label
    acc, acc_norm = (count / len(examples) for count in group.numbers(right.tolist()))
    return Accuracy(acc, acc_norm, len(examples))
