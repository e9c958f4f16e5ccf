"""Where text comes from: plain text, JSON Lines, folders of them, and the catalogue (Python's standard library).

A `Source` yields `Piece`s: consecutive parts of documents, each marked with its split. Memory stays bounded whatever
the size of a file, because a long document comes in pieces of about a million characters.
"""

from __future__ import annotations

import codecs
import difflib
import hashlib
import json
import logging
import os
import platform
import re
import sysconfig
import tokenize
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from daybreak.errors import ConfigError, DataError

log = logging.getLogger("daybreak")

SPLITS = ("train", "val")
TEXT_SUFFIXES, JSONL_SUFFIX = (".txt", ".md"), ".jsonl"
PIECE = 1 << 20  # characters
VAL_BY_DOCUMENT, VAL_BY_POSITION = 0.01, 0.05

# From the right: whitespace after a non-space. Every branch of GPT-2's pattern ends before it and none looks behind it,
# so cutting there leaves the tokens as they are. Python's \S excludes \x1c-\x1f too, symbols to the pattern.
_SAFE_CUT = re.compile(r"(?s:.*)\S(?=[ \n\t\r])")
_VAL_NAME = re.compile(r"(?:^|[/._-])(?:val|valid|validation)(?=[/._-]|$)")


class Piece(NamedTuple):
    """A part of a document; `starts` marks a document's first."""

    split: str
    starts: bool
    text: str


@dataclass(frozen=True)
class Source:
    """Documents to prepare. `size` estimates their UTF-8 bytes; an empty `revision` makes prepare hash the text."""

    name: str
    origin: str
    revision: str
    licence: str
    size: int
    pieces: Callable[[], Iterator[Piece]]


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


def read_text(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file in blocks, newlines as they are, without a byte order mark.

    DataError names the line that is not UTF-8, or says that the file is empty.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    newline, lines, empty = b"\n", 1, True
    with path.open("rb") as file:
        while data := file.read(PIECE):
            yield (text := _decode(decoder.decode, data, path, lines))
            empty = empty and not text
            lines += data.count(newline)
        _decode(lambda rest: decoder.decode(rest, True), b"", path, lines)
    if empty:
        raise DataError(f"{path} is empty.")


def _decode(decode: Callable[[bytes], str], data: bytes, path: Path, line: int) -> str:
    try:
        return decode(data)
    except UnicodeDecodeError as error:
        line += error.object.count(b"\n", 0, error.start)
        value = error.object[error.start]
        raise DataError(f"{path} line {line}: byte 0x{value:02x} is not UTF-8; convert the file to UTF-8.") from None


def read_jsonl(path: Path, field: str = "text") -> Iterator[tuple[int, str]]:
    """(line number, text) of each document of a JSON Lines file; blank lines and empty texts are passed over.

    DataError names file and line where a line is not UTF-8, not a JSON object, or has no string called `field`.
    """
    empty = True
    with path.open("rb") as file:
        for line, data in enumerate(file, 1):
            if not data.strip():
                continue
            raw = _decode(lambda b: b.decode("utf-8-sig"), data, path, line)
            try:
                record = json.loads(raw)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path} line {line} is not valid JSON ({error}); fix or delete the line.") from None
            if not isinstance(record, dict) or not isinstance(record.get(field), str):
                keys = ", ".join(repr(key) for key in record) if isinstance(record, dict) else type(record).__name__
                raise DataError(
                    f"{path} line {line} has no text in field {field!r} (it has: {keys}); name the right one with "
                    "--text-field."
                )
            if text := record[field]:
                empty = False
                yield line, _without_surrogates(text)
    if empty:
        raise DataError(f"{path} holds no documents.")


def _without_surrogates(text: str) -> str:
    """JSON may escape half a surrogate pair, which has no UTF-8; it becomes U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def is_val(key: str, fraction: float) -> bool:
    """Whether the document called `key` belongs to validation: a hash of the name, so other documents don't matter."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


def _files(paths: Sequence[Path]) -> list[tuple[str, Path]]:
    """(name within its folder, path) of every text file, folders searched in sorted order, hidden entries left out."""
    files = []
    for path in paths:
        if not path.is_dir():
            if path.suffix not in (*TEXT_SUFFIXES, JSONL_SUFFIX):
                raise DataError(f"{path}: cannot read {path.suffix or 'this'} files; convert to .txt, .md or .jsonl.")
            files.append((path.name, path))
            continue
        inside = [(file.relative_to(path), file) for file in path.rglob("*") if file.is_file()]
        found = [
            (name.as_posix(), file)
            for name, file in sorted(inside)
            if file.suffix in (*TEXT_SUFFIXES, JSONL_SUFFIX) and not any(part.startswith(".") for part in name.parts)
        ]
        if not found:
            raise DataError(f"the folder {path} holds no .txt, .md or .jsonl file.")
        files += found
    return files


def _documents(files: Sequence[tuple[str, Path]], field: str) -> Iterator[tuple[str, Iterator[str]]]:
    """(key, pieces) of each document. A text file is one document, a line of JSON Lines another."""
    for name, path in files:
        if path.suffix == JSONL_SUFFIX:
            for line, text in read_jsonl(path, field):
                yield f"{name}:{line}", cut([text])
        else:
            yield name, cut(read_text(path))


def _by_document(documents: Iterable[tuple[str, Iterator[str]]], fraction: float) -> Iterator[Piece]:
    # The first document is always validation and the second training, so that neither split is ever empty.
    for i, (key, pieces) in enumerate(documents):
        split = "val" if i == 0 or (i > 1 and is_val(key, fraction)) else "train"
        yield from (Piece(split, j == 0, text) for j, text in enumerate(pieces))


def _by_name(files: Sequence[tuple[str, Path]], field: str) -> Iterator[Piece]:
    for file in files:
        split = "val" if _VAL_NAME.search(file[0].lower()) else "train"
        for _, pieces in _documents([file], field):
            yield from (Piece(split, j == 0, text) for j, text in enumerate(pieces))


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


def _split_files(files: Sequence[tuple[str, Path]], field: str, fraction: float | None) -> Iterator[Piece]:
    named = [bool(_VAL_NAME.search(name.lower())) for name, _ in files]
    if any(named) and not all(named):
        return _by_name(files, field)
    if len(files) == 1 and len(documents := list(islice(_documents(files, field), 2))) == 1:
        pieces: Iterable[str] = documents[0][1]
        size = files[0][1].stat().st_size
        if files[0][1].suffix == JSONL_SUFFIX:  # in memory already; the file's size counts the JSON around the text
            pieces = list(pieces)
            size = sum(len(piece.encode()) for piece in pieces)
        return _by_position(pieces, size, fraction or VAL_BY_POSITION)
    return _by_document(_documents(files, field), fraction or VAL_BY_DOCUMENT)


def file_source(paths: Sequence[Path], field: str = "text", val_fraction: float | None = None) -> Source:
    """Text files, JSON Lines files and folders of them as one source.

    Validation is, in this order: the files whose name or folder says val, valid or validation, where others don't; the
    last `val_fraction` (5 %) of a single document, cut at a line end; else the first document and those whose hashed
    name falls under `val_fraction` (1 %).
    """
    files = _files(paths)
    stem = paths[0].resolve().name if paths[0].is_dir() else paths[0].stem
    return Source(
        name=re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-.") or "text",
        origin=" ".join(str(path) for path in paths),
        revision="",
        licence="unknown",
        size=sum(path.stat().st_size for _, path in files),
        pieces=lambda: _split_files(files, field, val_fraction),
    )


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

    def pieces() -> Iterator[Piece]:
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


CATALOGUE: dict[str, Callable[[float | None], Source]] = {"stdlib": stdlib_source}


def resolve_source(names: Sequence[str | Path], field: str = "text", val_fraction: float | None = None) -> Source:
    """The source that `names` stand for: one catalogue name, or paths. An existing path wins over a name and says so.

    Raises DataError, with the nearest match, for what is neither; ConfigError for a val_fraction outside (0, 1).
    """
    if val_fraction is not None and not 0 < val_fraction < 1:
        raise ConfigError(f"val-fraction = {val_fraction} must be above 0 and below 1.")
    if not names:
        raise ConfigError(f"nothing to prepare; give files, folders or a catalogue name ({', '.join(CATALOGUE)}).")
    paths = [Path(name) for name in names]
    if len(names) == 1 and str(names[0]) in CATALOGUE:
        if not paths[0].exists():
            return CATALOGUE[str(names[0])](val_fraction)
        log.warning("%r is a file or folder here and a catalogue name; using the one here (%s).", names[0], paths[0])
    for path in paths:
        if not path.exists():
            near_by = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
            near = difflib.get_close_matches(str(path), [*CATALOGUE, *near_by], 1)
            hint = f" did you mean {near[0]!r}?" if near else ""
            known = ", ".join(CATALOGUE)
            raise DataError(f"{str(path)!r} is neither a file nor a folder;{hint} Catalogue names: {known}.")
    return file_source(paths, field, val_fraction)
