"""Where text comes from: files and folders of the formats in `data.formats`, Python's standard library, and the
names that `data.catalogue` knows.

A `Source` yields `Piece`s: consecutive parts of documents, each marked with its split. Memory stays bounded whatever
the size of a file, because a long document comes in pieces of about a million characters.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from daybreak.data.formats import SUFFIXES, TEXT_SUFFIXES, read_documents, read_text
from daybreak.errors import DataError

log = logging.getLogger("daybreak")

SPLITS = ("train", "val")
PIECE = 1 << 20  # characters
VAL_BY_DOCUMENT, VAL_BY_POSITION = 0.01, 0.05

# From the right: whitespace after a non-space. Every branch of GPT-2's pattern ends before it and none looks behind it,
# so cutting there leaves the tokens as they are. Python's \S excludes \x1c-\x1f too, symbols to the pattern.
_SAFE_CUT = re.compile(r"(?s:.*)\S(?=[ \n\t\r])")
_VAL_NAME = re.compile(r"(?:^|[/._-])(?:val|valid|validation)(?=[/._-]|$)")


class Piece(NamedTuple):
    """A part of a document; `starts` marks a document's first; `file` is the place of its file in the source."""

    split: str
    starts: bool
    text: str
    file: int = 0


class Part(NamedTuple):
    """A file of a source: its name there, where it is (or will be) here, and its split where that is known."""

    name: str
    path: Path
    split: str = ""


class Pieces(Protocol):
    """Yields a source's pieces from file `first` on, before which lie `before` documents; `work` takes downloads."""

    def __call__(self, first: int = 0, before: int = 0, work: Path | None = None) -> Iterator[Piece]: ...


@dataclass(frozen=True)
class Source:
    """Documents to prepare. `size` estimates their UTF-8 bytes; an empty `revision` makes prepare hash the text.

    `state` (JSON) changes when the text does: an unfinished preparation goes on only if it is the same.
    """

    name: str
    origin: str
    revision: str
    licence: str
    size: int
    pieces: Pieces
    state: Any = None


def cut(blocks: Iterable[str], size: int = PIECE) -> Iterator[str]:
    """Re-cut a text into pieces of about `size` characters whose tokens, concatenated, are the whole text's.

    A stretch of 4 * size characters without whitespace is cut where it stands; there the tokens may differ.
    """
    pending = ""
    for block in blocks:
        for start in range(0, len(block), size):
            pending += block[start : start + size]
            if len(pending) < size:
                continue
            match = _SAFE_CUT.match(pending)
            end = match.end() if match else len(pending) if len(pending) >= 4 * size else 0
            if end:
                yield pending[:end]
                pending = pending[end:]
    if pending:
        yield pending


def is_val(key: str, fraction: float) -> bool:
    """Whether the document called `key` belongs to validation: a hash of the name, so other documents don't matter."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _parts(paths: Sequence[Path]) -> list[Part]:
    """Every file of these formats, folders searched in sorted order, hidden entries left out."""
    parts = []
    for path in paths:
        if not path.is_dir():
            if not path.name.endswith(SUFFIXES):
                raise DataError(f"{path}: cannot read {path.suffix or 'this'} files; convert to .txt, .md or .jsonl.")
            parts.append(Part(path.name, path))
            continue
        inside = [(file.relative_to(path), file) for file in path.rglob("*") if file.is_file()]
        found = [
            Part(name.as_posix(), file)
            for name, file in sorted(inside)
            if file.name.endswith(SUFFIXES) and not any(part.startswith(".") for part in name.parts)
        ]
        if not found:
            raise DataError(
                f"the folder {path} holds no .txt, .md or .jsonl file (or .jsonl.gz, .jsonl.zst, .parquet)."
            )
        parts += found
    return parts


def _documents(name: str, path: Path, field: str) -> Iterator[tuple[str, Iterator[str]]]:
    """(key, pieces) of each document. A text file is one document, a line or row of another format one each."""
    if name.endswith(TEXT_SUFFIXES):
        yield name, cut(read_text(path))
    else:
        for place, text in read_documents(path, field):
            yield f"{name}:{place}", cut([text])


def _by_position(pieces: Iterable[str], size: int, fraction: float) -> Iterator[Piece]:
    """One document of about `size` UTF-8 bytes: its end is validation, from the last line end before that position."""
    boundary, seen, split, starts = size * (1 - fraction), 0, "train", True
    for text in pieces:
        nbytes = len(text.encode())
        if split == "train" and seen + nbytes > boundary:
            at = int(len(text) * (boundary - seen) / nbytes)
            at = text.rfind("\n", 0, at) + 1 or text.rfind(" ", 0, at) + 1 or at
            if at:
                yield Piece("train", starts, text[:at])
            split, starts, text = "val", True, text[at:]
        yield Piece(split, starts, text)
        seen, starts = seen + nbytes, False


def _lone_document(name: str, path: Path, field: str, fraction: float) -> Iterator[Piece] | None:
    """The pieces of a file that holds one document only; None for any other."""
    documents = list(islice(_documents(name, path, field), 2))
    if len(documents) != 1:
        return None
    pieces: Iterable[str] = documents[0][1]
    size = path.stat().st_size
    if not name.endswith(TEXT_SUFFIXES):  # in memory already; the file's size counts what is around the text
        pieces = list(pieces)
        size = sum(len(piece.encode()) for piece in pieces)
    return _by_position(pieces, size, fraction)


def split_parts(
    parts: Sequence[Part], field: str, fraction: float | None, opened: Iterator[tuple[int, Path]], before: int = 0
) -> Iterator[Piece]:
    """The pieces of the files that `opened` yields as (index in parts, local path), split as `file_source` says.

    before: documents in the files that are left out at the beginning.
    """
    splits = [part.split or ("val" if _VAL_NAME.search(part.name.lower()) else "train") for part in parts]
    named = len(set(splits)) > 1
    for index, path in opened:
        name = parts[index].name
        if len(parts) == 1 and (pieces := _lone_document(name, path, field, fraction or VAL_BY_POSITION)):
            yield from pieces
            return
        for key, texts in _documents(name, path, field):
            # The first document is always validation and the second training, so that neither split is ever empty.
            val = before == 0 or (before > 1 and is_val(key, fraction or VAL_BY_DOCUMENT))
            split = splits[index] if named else "val" if val else "train"
            before += 1
            yield from (Piece(split, j == 0, text, index) for j, text in enumerate(texts))


def file_source(paths: Sequence[Path], field: str = "text", val_fraction: float | None = None) -> Source:
    """Files of the formats in `data.formats` and folders of them as one source.

    Validation is, in this order: the files whose name or folder says val, valid or validation, where others don't; the
    last `val_fraction` (5 %) of a single document, cut at a line end; else the first document and those whose hashed
    name falls under `val_fraction` (1 %).
    """
    parts = _parts(paths)
    stem = paths[0].resolve().name if paths[0].is_dir() else paths[0].name.partition(".")[0]

    def pieces(first: int = 0, before: int = 0, work: Path | None = None) -> Iterator[Piece]:
        opened = ((i, parts[i].path) for i in range(first, len(parts)))
        return split_parts(parts, field, val_fraction, opened, before)

    stats = [part.path.stat() for part in parts]
    return Source(
        name=re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "text",
        origin=" ".join(str(path) for path in paths),
        revision="",
        licence="unknown",
        size=sum(text_size(part.name, stat.st_size) for part, stat in zip(parts, stats, strict=True)),
        pieces=pieces,
        state=[[part.name, stat.st_size, stat.st_mtime_ns] for part, stat in zip(parts, stats, strict=True)],
    )


def text_size(name: str, size: int) -> int:
    """An estimate of the UTF-8 bytes of text in a file of `size` bytes: web text is compressed about 2.5 times."""
    return size if name.endswith((*TEXT_SUFFIXES, ".jsonl")) else size * 5 // 2


def stdlib_files() -> list[tuple[str, Path]]:
    """(relative name, path) of the standard library's Python sources on this machine, sorted by name.

    Left out: tests, bytecode, installed packages, build configuration (it names paths of the machine that built it)
    and pydoc's topics, which `stdlib_documents` yields as text.
    """
    root = Path(sysconfig.get_path("stdlib"))
    left_out = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"}
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in left_out and not name.startswith("config-")]
        for name in names:
            path = Path(folder, name)
            relative = path.relative_to(root).as_posix()
            build = name.startswith("_sysconfigdata") or relative == "pydoc_data/topics.py"
            if path.suffix == ".py" and not build and path.stat().st_size:
                files.append((relative, path))
    if not files:
        raise DataError(f"the standard library at {root} has no Python sources; use another Python or your own text.")
    return sorted(files)


def stdlib_documents() -> Iterator[tuple[str, str]]:
    """(name, text) of the standard library's sources and of the language reference that `help()` shows."""
    for name, path in stdlib_files():
        with tokenize.open(path) as file:  # honours a coding cookie
            yield name, file.read()
    from pydoc_data.topics import topics

    for topic in sorted(topics):
        yield f"pydoc_data/topics/{topic}", topics[topic]


def stdlib_source(val_fraction: float | None = None) -> Source:
    """The standard library, 5 % of its files (by hashed name) being validation."""
    fraction = val_fraction or 0.05

    def pieces(first: int = 0, before: int = 0, work: Path | None = None) -> Iterator[Piece]:
        for name, text in stdlib_documents():
            split = "val" if is_val(name, fraction) else "train"
            yield from (Piece(split, j == 0, part) for j, part in enumerate(cut([text])))

    version = platform.python_version()
    return Source(
        name="stdlib",
        origin="the Python standard library and language reference, as installed",
        revision=f"Python {version}",
        licence="PSF-2.0",
        size=sum(path.stat().st_size for _, path in stdlib_files()),
        pieces=pieces,
    )
