"""Documents of one file, whatever its format: plain text, JSON Lines, JSON, CSV (each also as .gz and .zst), Parquet.

A reader holds one line, one block or one Parquet batch at a time, and the whole of a .json file that is an array.
Nothing longer than LONGEST is held. zstandard and pyarrow come with the extra `data`.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import importlib
import json
import os
import re
import unicodedata
import zlib
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from daybreak.data.kinds import HEAD, identify
from daybreak.errors import ConfigError, DataError

Item = TypeVar("Item")


def _packed(*suffixes: str) -> tuple[str, ...]:
    return tuple(suffix + packing for suffix in suffixes for packing in ("", ".gz", ".zst"))


TEXT_SUFFIXES = _packed(".txt", ".md")  # each file one document; of the others, a list of them
JSON_SUFFIXES, CSV_SUFFIXES = _packed(".json"), _packed(".csv", ".tsv")
TABLES = (*JSON_SUFFIXES, *CSV_SUFFIXES)
KINDS = ((".parquet",), _packed(".jsonl", ".ndjson"), JSON_SUFFIXES, CSV_SUFFIXES, TEXT_SUFFIXES)
SUFFIXES = tuple(chain(*KINDS))
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
# Nothing here reads these.
OTHER_PICTURES = (".gif", ".bmp", ".tif", ".tiff", ".heic", ".heif", ".avif", ".jfif", ".svg")
BLOCK = 1 << 20  # bytes or characters
LONGEST = 1 << 28  # bytes
BOMB, BOMB_RATIO = 1 << 30, 500  # a packed file that holds more bytes than either allows is no text
PAIRS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"))  # keys of chats
_ROWS = 16  # of a Parquet file at a time: one value of a dictionary may stand in all of them
_ZSTD_READ, _ZSTD_WINDOW = 1024, 1 << 31  # bytes: these unpack to 32 MiB at most; the window of `zstd --long=31`
_SHARD = re.compile(r"_train_\d+\.bin$")
_GZIP, _ZSTD_FRAME = re.compile(rb"\x1f\x8b"), re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18")


class Faults:
    """The treatment of a bad file, line or row: a DataError, or with `skip` a count by reason.

    `harmless`: reasons that are only counted, `skip` or not.
    """

    def __init__(self, skip: bool = False, harmless: tuple[str, ...] = ()) -> None:
        self.skip, self.harmless, self.first = skip, harmless, dict[str, str]()
        self.counts: Counter[str] = Counter()

    def __call__(self, reason: str, message: str) -> None:
        """Raise DataError with the message, or count it."""
        if not self.skip and reason not in self.harmless:
            raise DataError(message) from None
        self.counts[reason] += 1
        self.first.setdefault(reason, message)

    def __str__(self) -> str:
        """The counts, with the first message of each reason."""
        return " ".join(f"{n:,} {reason} (first: {self.first[reason]})" for reason, n in self.counts.items())


def extra(module: str, name: str, what: str) -> Any:
    """An optional module. ConfigError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        missing = module.partition(".")[0].replace("PIL", "Pillow")
        raise ConfigError(f"{what} needs {missing}: pip install -e '.[{name}]' in daybreak's folder.") from None


def is_text(name: str) -> bool:
    """Whether a file of this name is one document: .txt, .md, or without a suffix."""
    return name.lower().endswith(TEXT_SUFFIXES) or "." not in name.rpartition("/")[2]


def dataset_stem(text: str) -> str:
    """The text as a dataset's name: its letters and digits of any script, '.', '_' and '-'; '' if it has none."""
    kept = (c if fits_name(c) else " " for c in unicodedata.normalize("NFC", text))
    return re.sub(" +", "-", "".join(kept)).lstrip("-._").rstrip("-.")


def fits_name(c: str) -> bool:
    """Whether a dataset's name may hold this character. Many scripts write vowels as marks."""
    return c.isalnum() or c in "._-" or unicodedata.category(c)[0] == "M"


def walk(folder: Path) -> list[tuple[str, Path]]:
    """(relative name, path) of the files in a folder and in linked ones, each real folder once, in sorted order. A
    hidden folder, a run and a data set are named and not entered: a run's samples are no text to learn."""

    def refuse(error: OSError) -> None:
        raise error

    seen, found = set[str](), list[Path]()
    for root, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        run = {"config.toml", "metrics.jsonl"} <= {*files}
        if Path(root) != folder and (run or ("manifest.json" in files and any(map(_SHARD.search, files)))):
            found.append(Path(root))
            folders.clear()
            continue
        hidden = [name for name in folders if name.startswith(".")]
        folders[:] = sorted(set(folders) - set(hidden)) if (real := os.path.realpath(root)) not in seen else []
        found += [Path(root, name) for name in files + hidden if real not in seen]
        seen.add(real)
    return [(name.as_posix(), path) for name, path in sorted((path.relative_to(folder), path) for path in found)]


def first_bytes(path: Path) -> bytes:
    """The first HEAD bytes of a file, or all of a shorter one. Raises OSError if it cannot be read."""
    with path.open("rb") as file:
        return file.read(HEAD)


def is_packed(path: Path) -> bool:
    """Whether a file is gzip or zstd, by its first bytes."""
    return bool(_GZIP.match(head := first_bytes(path)) or _ZSTD_FRAME.match(head))


def _zstd(path: Path) -> Iterator[bytes]:
    """Of all frames one after the other, as parallel compressors write them."""
    reader = extra("zstandard", "data", str(path)).ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
    frame = None
    with path.open("rb") as file:
        while data := file.read(_ZSTD_READ):
            while data := data if frame and not frame.eof else data.lstrip(b"\0"):  # zeros may follow a frame
                frame = frame if frame and not frame.eof else reader.decompressobj()
                yield frame.decompress(data)
                data = frame.unused_data
    if frame and not frame.eof:
        raise EOFError("it ends within a frame")


def _blocks(path: Path) -> Iterator[bytes]:
    """The unpacked bytes. The first bytes tell how a file is packed: many downloads are unpacked on their way."""
    with path.open("rb") as file:
        head = file.read(HEAD)
        packed = _GZIP.match(head)
        if said := identify(head, text=True):
            raise DataError(f"{path} is {said}.")
        if not packed and path.suffix in (".gz", ".zst") and b"\0" in head and not _ZSTD_FRAME.match(head):
            raise DataError(f"{path} is damaged (it does not begin as {path.suffix} files do); copy it again.")
        file.seek(0)
        opened: Any = gzip.GzipFile(fileobj=file) if packed else file
        yield from _bounded(path, _zstd(path) if _ZSTD_FRAME.match(head) else iter(lambda: opened.read(BLOCK), b""))


def _bounded(path: Path, blocks: Iterable[bytes]) -> Iterator[bytes]:
    size, most = 0, max(BOMB, BOMB_RATIO * path.stat().st_size)
    for block in blocks:
        yield block
        if (size := size + len(block)) > most:
            raise DataError(f"{path} unpacks to more than {most:,} bytes, {BOMB_RATIO} times its size, as no text "
                            "does; unpack it yourself if you trust it.")  # fmt: skip


def _guarded(path: Path, items: Iterator[Item], faults: Faults) -> Iterator[Item]:
    """The items, up to what makes the rest of the file unreadable, which is a fault."""
    try:
        yield from items
    except Exception as error:
        foreign = type(error).__module__.startswith(("pyarrow", "zstandard", "_csv"))
        if foreign or isinstance(error, EOFError | zlib.error) or (isinstance(error, OSError) and not error.errno):
            faults("damaged", f"{path} is damaged ({str(error).partition(chr(10))[0]}); copy it again.")
        elif faults.skip and isinstance(error, DataError | OSError):
            faults("unreadable", str(error))
        else:
            raise


def _not_utf8(path: Path, line: int, error: UnicodeDecodeError) -> str:
    line += error.object.count(b"\n", 0, error.start)
    said = f"{path} line {line}: byte 0x{error.object[error.start]:02x} is not UTF-8"
    return f"{said}; convert the file, for instance with `iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW`."


def read_text(path: Path, faults: Faults) -> Iterator[str]:
    """The text of a UTF-8 file in blocks, newlines as they are, without a byte order mark.

    A line that is not UTF-8, and an empty file, are faults.
    """

    def texts() -> Iterator[str]:
        decoder, newline, lines, empty = codecs.getincrementaldecoder("utf-8-sig")(), b"\n", 1, True
        for data in chain(_blocks(path), (b"",)):
            try:
                yield (text := decoder.decode(data, not data))
            except UnicodeDecodeError as error:
                faults("not UTF-8", _not_utf8(path, lines, error))
                return
            empty, lines = empty and not text, lines + data.count(newline)
        if empty:
            faults("empty", f"{path} is empty.")

    return _guarded(path, texts(), faults)


def _lines(path: Path, faults: Faults) -> Iterator[tuple[int, str]]:
    """(number, text) of each line that is UTF-8 and not too long."""
    line, rest, long = 0, bytearray(), False
    for block in chain(_blocks(path), (b"",)):
        rest += block
        *whole, rest = rest.split(b"\n") if b"\n" in block else (rest,)
        if len(rest) > LONGEST:
            if not long:
                faults("too long", f"{path} line {line + 1} has over {LONGEST:,} bytes; make several documents of it.")
            rest, long = bytearray(), True
        for data in whole if block else (rest,):
            line += 1
            try:
                if not long:
                    yield line, data.decode("utf-8-sig") + "\n"
            except UnicodeDecodeError as error:
                faults("not UTF-8", _not_utf8(path, line, error))
            long = False


def read_records(path: Path, faults: Faults | None = None) -> Iterator[tuple[int, Any]]:
    """(place, value) of each line of JSON Lines that is not blank, value of a .json array, or row of a .csv or .tsv.

    What is not UTF-8 or not JSON is a fault that names its place.
    """
    return _guarded(path, _records(path, path.name.lower(), faults := faults or Faults()), faults)


def _records(path: Path, name: str, faults: Faults) -> Iterator[tuple[int, Any]]:
    lines = _lines(path, faults)
    if name.endswith(CSV_SUFFIXES):
        csv.field_size_limit(LONGEST)
        head = next(lines, (0, ""))[1]
        other = ";" if ";" in head and "," not in head else ","  # spreadsheets of many countries write a semicolon
        rows = csv.DictReader(chain([head], (text for _, text in lines)), delimiter="\t" if ".tsv" in name else other)
        yield from ((rows.line_num, row) for row in rows)
    elif name.endswith(JSON_SUFFIXES):
        data = bytearray()
        for block in _blocks(path):
            data += block
            if len(data) > LONGEST:
                break  # it is cut, and so not valid
        try:
            value = json.loads(data)
            yield from enumerate(value if isinstance(value, list) else [value], 1)
            return
        except (ValueError, RecursionError) as error:
            if data[:BLOCK].removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
                faults("not JSON", f"{path} is no valid JSON array of at most {LONGEST:,} bytes ({error}); mend it, or "
                                   "write a line for each value.")  # fmt: skip
                return
    for line, text in lines:
        if text.strip().strip("\0"):
            try:
                yield line, json.loads(text)
            except (ValueError, RecursionError) as error:
                faults("not JSON", f"{path} line {line} is not valid JSON ({error}); fix or delete the line.")


def without_surrogates(text: str) -> str:
    """The text with each half of a surrogate pair, which JSON may escape and UTF-8 does not have, as U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _way(record: Any) -> str:
    """The advice about a record without the field that was asked for."""
    named = "name the right one with --text-field (docs/data.md lists the keys of chats)."
    chats = "these are chats: add --as chat to learn from them alone, or --skip-bad to leave them out."
    return chats if format_of(record) else named


def _record_texts(path: Path, field: str, faults: Faults) -> Iterator[tuple[int, str]]:
    unit = "value" if path.name.lower().endswith(JSON_SUFFIXES) else "line"
    for place, record in read_records(path, faults):
        text = record.get(field, 0) if isinstance(record, dict) else 0
        if isinstance(text, str):
            yield place, without_surrogates(text)
        elif text is not None:
            keys = ", ".join(map(repr, record)) if isinstance(record, dict) else type(record).__name__
            said = f"{path} {unit} {place} has no text in field {field!r} (it has: {keys}); {_way(record)}"
            faults("without text", said)


def _parquet(path: Path) -> Any:
    head = first_bytes(path)
    if not head.startswith(b"PAR1") and (said := identify(head)):
        raise DataError(f"{path} is not Parquet but {said}.")
    return extra("pyarrow.parquet", "data", str(path)).ParquetFile(path)


def _parquet_records(path: Path) -> Iterator[tuple[int, Any]]:
    """(number, record) of each row. Fields without a value are left out: every row has all fields of all."""

    def given(x: Any) -> Any:
        if isinstance(x, dict):
            return {key: given(value) for key, value in x.items() if value is not None}
        return [given(value) for value in x] if isinstance(x, list) else x

    with _parquet(path) as table:
        rows = (row for batch in table.iter_batches(_ROWS, use_threads=False) for row in batch.to_pylist())
        yield from enumerate(map(given, rows), 1)


def _parquet_texts(path: Path, field: str, faults: Faults) -> Iterator[tuple[int, str]]:
    arrow = extra("pyarrow", "data", str(path))
    with _parquet(path) as table:
        columns, words = table.schema_arrow, arrow.DictionaryType
        kinds = {c.name: c.type.value_type if isinstance(c.type, words) else c.type for c in columns}
        if str(kinds.get(field)).removeprefix("large_").removesuffix("_view") not in ("string", "binary", "null"):
            names = ", ".join(repr(name) for name in kinds)
            way = _way({name: [] for name in kinds})
            raise DataError(f"{path} has no text column {field!r} (it has: {names}); {way}")
        batches = (batch.column(0) for batch in table.iter_batches(_ROWS, columns=[field], use_threads=False))
        lists = (batch.cast(kinds[field]).cast(arrow.large_binary()).to_pylist() for batch in batches)
        for row, text in enumerate(_bounded(path, (text or b"" for texts in lists for text in texts)), 1):
            try:
                yield row, text.decode()
            except UnicodeDecodeError:
                faults("not UTF-8", f"{path} row {row} is not UTF-8 in column {field!r}; write the table again.")


def _whole(path: Path, field: str, faults: Faults) -> Iterator[tuple[int, str]]:
    """Each record as JSON, in a list behind the words for its place."""
    table, values = path.suffix.lower() == ".parquet", path.name.lower().endswith(JSON_SUFFIXES)
    unit = "row" if table else "value" if values else "line"
    for place, record in _parquet_records(path) if table else _records(path, path.name.lower(), faults):
        yield place, without_surrogates(json.dumps([f"{path} {unit} {place}", record], ensure_ascii=False, default=str))


def first_record(paths: Iterable[Path]) -> Any:
    """The first record of the first file that lists records, in these files and folders; None without one."""
    for path in paths:
        inside = walk(path) if path.is_dir() else []
        files = [path] if path.is_file() else [p for _, p in inside if p.is_file() and p.name[0] != "."]
        for file in (file for file in files if file.name.lower().endswith(SUFFIXES) and not is_text(file.name)):
            records = _parquet_records(file) if file.suffix.lower() == ".parquet" else read_records(file, Faults(True))
            if (found := next(_guarded(file, records, Faults(True)), None)) is not None:
                return found[1]
    return None


def format_of(record: Any) -> str:
    """The format of a chat's record, "" if it is none."""
    keys = set(record) if isinstance(record, dict) else set()
    for key in ("messages", "conversations"):
        if isinstance(record[key] if key in keys else None, list):
            return key
    if {"instruction", "output"} <= keys:
        return "instruction, output"
    if "chosen" in keys and "rejected" in keys:
        return "chosen, rejected"
    return next((", ".join(pair) for pair in PAIRS if keys >= set(pair)), "")


def read_documents(path: Path, field: str, faults: Faults) -> Iterator[tuple[int, str]]:
    """(place in the file, text) of each document of a file that lists them; missing and empty texts are passed over.
    Without a field, the whole record is the text (see `_whole`).

    A place is the number from 1 of a line, value or row. A record without a text called `field` is a fault, and so are
    a damaged file and one without documents.
    """
    of_field = _parquet_texts if path.suffix.lower() == ".parquet" else _record_texts
    read, empty = of_field if field else _whole, True
    before = faults.counts.total()
    for place, text in _guarded(path, read(path, field, faults), faults):
        if text:
            empty = False
            yield place, text
    if empty and faults.counts.total() == before:
        faults("empty", f"{path} holds no documents.")
