"""Where text comes from: files and folders of the formats in `data.formats`, Python's standard library, and the
names that `data.catalogue` knows.

A `TextSource` yields `Piece`s: consecutive parts of documents, each marked with its split. Memory stays bounded
whatever the size of a file, because a long document comes in pieces of about a million characters:

    _parts        which files are read, and the split that their names tell
    _documents    a text file is one document; in a file of another format, every record is one
    cut           a document in pieces, cut only where the tokens stay the same
    _divided      a document whose end is for validation

`split_parts` decides which split a document belongs to. The first of these rules that applies counts; the percentages
are those without `val_fraction`:

    1. names of files and folders tell it, by the Hub's rules; then files for tests are left out
    2. there are few documents, under 500: the last 5 % of the whole text are for validation
    3. one document is longer than all validation text should be: its own last 1 % are for validation
    4. else a hash of the document's name decides, for 1 % of them; so a document keeps its split when others are added

In rule 4 the second document is always for validation, so that this split is never empty.
"""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
import shlex
import shutil
import sysconfig
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from daybreak.data.formats import (
    OTHER_PICTURES,
    PICTURES,
    SUFFIXES,
    TABLES,
    Faults,
    dataset_stem,
    first_bytes,
    format_of,
    is_packed,
    is_text,
    read_documents,
    read_records,
    read_text,
    walk,
)
from daybreak.data.kinds import identify
from daybreak.errors import DataError

log = logging.getLogger("daybreak")

SPLITS = ("train", "val")
STDIN = "standard input"  # origin of a source that can be read once
PIECE = 1 << 20  # characters
VAL_BY_DOCUMENT, VAL_BY_POSITION = 0.01, 0.05
LEAST_SLACK, LEAST_CUT = 16, 4096  # characters that a cut may move back; bytes of a document that is cut among many
FEW = 5  # of this many validation documents or fewer, chance would decide how much text they are

# From the right: whitespace after a non-space. Every branch of GPT-2's pattern ends before it and none looks behind it,
# so cutting there leaves the tokens as they are. Python's \S excludes \x1c-\x1f too, symbols to the pattern.
_SAFE_CUT = re.compile(r"(?s:.*)\S(?=[ \n\t\r])")
# The Hub's words for splits, as whole words of file and folder names. Of several, the first of these counts.
_SPLIT_WORDS = {"test": "test|testing|eval|evaluation", "val": "validation|valid|dev|val", "train": "train|training"}
_SPLIT_NAMES = {s: re.compile(rf"(?:^|[/._ 0-9-])(?:{w})(?=[/._ 0-9-]|$)") for s, w in _SPLIT_WORDS.items()}


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
class TextSource:
    """Documents to prepare. `size` estimates their UTF-8 bytes; an empty `revision` makes prepare hash the text.

    `state` (JSON) changes when the text does: an unfinished preparation continues only if it is the same.
    """

    name: str
    origin: str
    revision: str
    licence: str
    size: int
    pieces: Pieces
    state: Any = None
    faults: Faults = field(default_factory=Faults)


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


def split_of(name: str) -> str:
    """The split ("test", "val", "train") that the Hub's rules read from a file's path: its folders count first."""
    folders, _, file = name.lower().rpartition("/")
    return next((s for place in (folders, file) for s, words in _SPLIT_NAMES.items() if words.search(place)), "")


def is_val(key: str, fraction: float) -> bool:
    """Whether the document called `key` belongs to validation: a hash of the name, so other documents don't matter."""
    digest = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=8).digest()
    return int.from_bytes(digest, "big") < fraction * 2**64


# ---- the files of paths


def _left_out(name: str, path: Path, column: str) -> str:
    """Why a file of a folder is not read; '' if it is."""
    lower, record = path.name.lower(), {column: "", "messages": []}
    if any(part.startswith(".") for part in name.split("/")):
        return "hidden"
    if path.is_dir():
        return "runs and data sets of daybreak"
    if not path.is_file():
        return "no file, but a broken link, pipe or device"
    if not lower.endswith(SUFFIXES):
        return f"{path.suffix} files" if path.suffix else "without a suffix, read as text where named"
    if lower.endswith(TABLES):  # settings are written so too
        _, record = next(read_records(path, Faults(skip=True)), (0, record))
    if not column:
        return "" if format_of(record) and not is_text(path.name) else "without chats"
    return "" if isinstance(record, dict) and column in record else f"without a field {column!r}"


def _parts(paths: Sequence[Path], column: str) -> list[Part]:
    """The files to read, their splits told by their names, and a line about what is read and what is left out."""
    found, left = list[tuple[str, Path]](), defaultdict[str, list[str]](list)
    for path in paths:
        if not path.is_dir():
            if not path.is_file():
                raise DataError(f"{path} is a pipe or device, not a file; give a file, or - for standard input.")
            if not path.name.lower().endswith(SUFFIXES) and not is_text(path.name):
                said = identify(first_bytes(path), text=True)
                convert = "convert to .txt, .md or .jsonl, or pipe text into daybreak prepare - --name NAME"
                if path.suffix.lower() in (*PICTURES, *OTHER_PICTURES):
                    convert = "for a model that draws, give a folder of pictures with --as images (docs/images.md)"
                way = f"this is {said}" if said else convert
                raise DataError(f"{path}: cannot read {path.suffix or 'such'} files; {way}.")
            found.append((path.name, path))
            continue
        inside = [(name, file, _left_out(name, file, column)) for name, file in walk(path)]
        if any(not why and not name.lower().endswith(".md") for name, _, why in inside):  # a README is about them
            inside = [(n, f, "a data card" if f.name.lower() == "readme.md" else why) for n, f, why in inside]
        for name, _, why in inside:
            left[why].append(name)
        if not left.pop("", None):
            kinds = "no .txt, .md or .jsonl file (or .json, .csv, .parquet, .gz, .zst)"
            raise DataError(f"the folder {path} holds {kinds}{_listed(left)}; {_way_out(path, inside)}.")
        found += [(name, file) for name, file, why in inside if not why]
    base = os.path.commonpath([path.absolute() if path.is_dir() else path.absolute().parent for path in paths])
    parts = [Part(name, file, split_of(os.path.relpath(file.absolute(), base))) for name, file in found]
    tests = [part.name for part in parts if part.split == "test"]
    if 0 < len(tests) < len(parts):
        parts, left["of a test split, as their names say"] = [part for part in parts if part.split != "test"], tests
    named = len({part.split == "val" for part in parts}) > 1
    parts = [part._replace(split=(part.split or "train") if named else "") for part in parts]
    if len(parts) > 1 or left:
        split = f" ({sum(part.split == 'val' for part in parts)} for validation, as their names say)" if named else ""
        log.info("files to read: %d%s%s", len(parts), split, _listed(left))
    return parts


def _listed(left: dict[str, list[str]]) -> str:
    each = (f"{len(names)}, {why} ({', '.join(names[:3])}{', ...' * (len(names) > 3)})" for why, names in left.items())
    return f"; left out: {'; '.join(each)}" if left else ""


def _way_out(folder: Path, inside: list[tuple[str, Path, str]]) -> str:
    """The fix for a folder of which nothing is read, by the commonest reason that has one. Files that cannot be text by
    the first bytes of one of them, such as compiled programs, have none."""
    example = {why: file for _, file, why in inside}
    for why, _ in Counter(why for *_, why in inside).most_common():
        if why.startswith("without a field"):
            return "name the field that holds the text with --text-field KEY"
        if (suffix := why.removesuffix(" files")).lower() in (*PICTURES, *OTHER_PICTURES):
            first = "convert them to PNG and " * (suffix.lower() in OTHER_PICTURES)
            return f"to train a model that draws, {first}add --as images (docs/images.md)"
        if why[0] == "." and b"\0" not in (head := first_bytes(example[why])) and not identify(head, text=True):
            join = f"find -L {shlex.quote(str(folder))} -name {shlex.quote('*' + suffix)} -exec cat {{}} + > my.txt"
            return f"if these are plain text, join them with `{join}` and prepare my.txt"
    return "put such a file there, or give another folder"


# ---- documents and splits


def _documents(part: Part, path: Path, column: str, faults: Faults) -> Iterator[tuple[str, Iterator[str], int]]:
    """(key, pieces, UTF-8 bytes) of each document. A text file is one document, a record of another format one each."""
    if not is_text(part.name):
        for place, text in read_documents(path, column, faults):
            yield f"{part.name}:{place}", cut([text]) if column else iter([text]), len(text.encode())
        return
    if not column:
        raise DataError(f"{path} is text and lists no chats; prepare it with --as text, or leave it out.")
    size, before = path.stat().st_size, faults.counts.total()
    if faults.skip or is_packed(path):
        size = sum(len(block.encode()) for block in read_text(path, faults))
    if faults.counts.total() == before:
        yield part.name, cut(read_text(path, faults)), size


def _divided(pieces: Iterable[str], size: float, slack: float) -> Iterator[tuple[str, bool, str]]:
    """(split, starts, text) of a document whose first `size` UTF-8 bytes, about, are for training, the rest for
    validation. The cut is after a line end at most `slack` characters before that, else after a space, else there."""
    split, starts = ("train" if size > 0 else "val"), True
    for text in pieces:
        data = text.encode() if split == "train" else b""
        if len(data) > size:
            place = len(data[: int(size)].decode(errors="ignore"))
            low = max(int(place - slack), 0)
            place = text.rfind("\n", low, place) + 1 or text.rfind(" ", low, place) + 1 or place
            if place:
                yield "train", starts, text[:place]
            split, starts, text, size = "val", True, text[place:], float("inf")
        size -= len(data)
        yield split, starts, text
        starts = False


def _few(parts: Iterable[Part], column: str, fraction: float | None, skip: bool) -> tuple[float, float]:
    """(UTF-8 bytes for training, for validation) of a source of few documents; (0, 0) for one of many."""
    total, most, faults = 0, FEW / (fraction or VAL_BY_DOCUMENT), Faults(skip, ("empty",))
    sizes = (size for part in parts for _, _, size in _documents(part, part.path, column, faults))
    for number, size in enumerate(sizes, 1):
        total += size
        if number >= most:
            return 0, 0
    val = total * (fraction or VAL_BY_POSITION)
    return total - val, val


def split_parts(
    parts: Sequence[Part], column: str, fraction: float | None, opened: Iterator[tuple[int, Path]], before: int,
    size: int, faults: Faults,
) -> Iterator[Piece]:  # fmt: skip
    """The pieces of the files that `opened` yields as (index in parts, local path), split as `file_source` says.

    before: documents in the files that are left out at the beginning. size: about the UTF-8 bytes of all text, 0 for
    unknown.
    """
    named, rate = len({part.split == "val" for part in parts}) > 1, fraction or VAL_BY_DOCUMENT
    share, train, val = rate * size or float("inf"), 0.0, 0.0
    for index, path in opened:
        if index == 0 and not named and (len(parts) == 1 or parts[0].path.name):  # the files are here
            here = parts if len(parts) > 1 else [parts[0]._replace(path=path)]
            train, val = _few(here, column, fraction, faults.skip)
        for key, pieces, nbytes in _documents(parts[index], path, column, faults):
            before += 1
            keep, rest = float("inf"), 0.0
            if named:
                keep = 0 if parts[index].split == "val" else keep
            elif val:
                keep, rest, train = train, val, train - nbytes
                if before > 1 and train < 0 and nbytes <= max(rest / 2, LEAST_SLACK):  # not worth a cut
                    keep = 0
            elif column and nbytes > max(share, LEAST_CUT):  # by itself more than all validation should be
                keep, rest = nbytes * (1 - rate), nbytes * rate
            elif is_val(key, rate) or before == 2:  # so that validation is never empty
                keep = 0
            if not column:  # a record is never cut
                keep = 0 if keep < nbytes else keep
            for split, starts, text in _divided(pieces, keep, max(rest / 2, LEAST_SLACK)):
                yield Piece(split, starts, text, index)


def file_source(paths: Sequence[Path], column: str, val_fraction: float | None, faults: Faults) -> TextSource:
    """Files of the formats in `data.formats` and folders of them as one source.

    Splits are, in this order: those that file and folder names tell by the Hub's rules, test files being left out; of
    few documents the last `val_fraction` (5 %) of the whole text, cut at a line end; else the documents whose hashed
    name falls under `val_fraction` (1 %), and as much of the end of each document that is larger than all of that.
    """
    parts = _parts(paths, column)
    stem = paths[0].resolve().name if paths[0].is_dir() else paths[0].name.partition(".")[0]
    faults.harmless = ("empty",) if len(parts) > 1 else ()
    size = sum(text_size(part.name, part.path.stat().st_size) for part in parts)

    def pieces(first: int = 0, before: int = 0, work: Path | None = None) -> Iterator[Piece]:
        opened = ((i, parts[i].path) for i in range(first, len(parts)))
        return split_parts(parts, column, val_fraction, opened, before, size, faults)

    name = dataset_stem(stem) or "text"
    return TextSource(name, " ".join(str(path) for path in paths), "", "unknown", size, pieces, faults=faults)


def stdin_source(column: str, val_fraction: float | None, faults: Faults) -> TextSource:
    """Standard input, kept in the workspace: JSON Lines if it begins with a brace, else one text."""
    kept: list[Path] = []

    def pieces(first: int = 0, before: int = 0, work: Path | None = None) -> Iterator[Piece]:
        if not kept and work is not None:
            (folder := work / "download").mkdir(exist_ok=True)
            with open(0, "rb", closefd=False) as stdin:
                kept.append(folder / ("stdin.jsonl" if stdin.peek(1).startswith(b"{") else "stdin.txt"))
                with kept[0].open("wb") as file:
                    shutil.copyfileobj(stdin, file)
        return file_source(kept, column, val_fraction, faults).pieces()

    return TextSource("stdin", STDIN, "", "unknown", 0, pieces, faults=faults)


def text_size(name: str, size: int) -> int:
    """An estimate of the UTF-8 bytes of text in a file of `size` bytes: web text is compressed about 2.5 times."""
    return size * 5 // 2 if name.lower().endswith((".gz", ".zst", ".parquet")) else size


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


def stdlib_source(val_fraction: float | None = None) -> TextSource:
    """The standard library, 5 % of its files (by hashed name) being validation."""
    fraction = val_fraction or 0.05

    def pieces(first: int = 0, before: int = 0, work: Path | None = None) -> Iterator[Piece]:
        for name, text in stdlib_documents():
            split = "val" if is_val(name, fraction) else "train"
            yield from (Piece(split, j == 0, part) for j, part in enumerate(cut([text])))

    size, version = sum(path.stat().st_size for _, path in stdlib_files()), platform.python_version()
    origin = "the Python standard library and language reference, as installed"
    return TextSource("stdlib", origin, f"Python {version}", "PSF-2.0", size, pieces)
