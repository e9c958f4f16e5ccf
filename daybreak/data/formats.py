"""Documents of one file, whatever its format: plain text, JSON Lines (also .gz, .zst) and Parquet.

A reader never holds more than a line, a block or a Parquet batch. zstandard and pyarrow come with the extra `data`.
"""

from __future__ import annotations

import codecs
import gzip
import importlib
import io
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from daybreak.errors import ConfigError, DataError

TEXT_SUFFIXES = (".txt", ".md")  # each file one document; of the others, a list of them
JSONL_SUFFIXES = (".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz")
SUFFIXES = (*TEXT_SUFFIXES, *JSONL_SUFFIXES, ".parquet")
BLOCK = 1 << 20  # bytes or characters
_ROWS = 256  # of a Parquet file at a time


def extra(module: str, name: str, what: str) -> Any:
    """An optional module. ConfigError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ConfigError(f"{what} needs {module.partition('.')[0]}: pip install 'daybreak[{name}]'.") from None


def read_text(path: Path) -> Iterator[str]:
    """The text of a UTF-8 file in blocks, newlines as they are, without a byte order mark.

    DataError names the line that is not UTF-8, or says that the file is empty.
    """
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    newline, lines, empty = b"\n", 1, True
    with path.open("rb") as file:
        while data := file.read(BLOCK):
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


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".gz":
        return io.BufferedReader(gzip.GzipFile(path, "rb"))
    if path.suffix == ".zst":
        opened: IO[bytes] = extra("zstandard", "data", str(path)).open(path, "rb")
        return io.BufferedReader(opened)  # type: ignore[type-var]  # a raw stream without readline
    return path.open("rb")


def read_records(path: Path) -> Iterator[tuple[int, Any]]:
    """(line number, value) of each line that is not blank. DataError names the one that is not UTF-8 or not JSON."""
    with _open(path) as file:
        for line, data in enumerate(file, 1):
            if not data.strip():
                continue
            raw = _decode(lambda b: b.decode("utf-8-sig"), data, path, line)
            try:
                yield line, json.loads(raw)
            except (ValueError, RecursionError) as error:
                raise DataError(f"{path} line {line} is not valid JSON ({error}); fix or delete the line.") from None


def read_jsonl(path: Path, field: str = "text") -> Iterator[tuple[int, str]]:
    """(line number, text) of each document of a JSON Lines file; blank lines and empty texts are passed over.

    DataError names file and line where a line is not UTF-8, not a JSON object, or has no string called `field`.
    """
    empty = True
    for line, record in read_records(path):
        if not isinstance(record, dict) or not isinstance(record.get(field), str):
            keys = ", ".join(repr(key) for key in record) if isinstance(record, dict) else type(record).__name__
            raise DataError(
                f"{path} line {line} has no text in field {field!r} (it has: {keys}); name the right one with "
                "--text-field."
            )
        if text := record[field]:
            empty = False
            yield line, without_surrogates(text)
    if empty:
        raise DataError(f"{path} holds no documents.")


def without_surrogates(text: str) -> str:
    """The text with each half of a surrogate pair, which JSON may escape and UTF-8 does not have, as U+FFFD."""
    try:
        text.encode()
        return text
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def read_parquet(path: Path, field: str = "text") -> Iterator[tuple[int, str]]:
    """(row number from 1, text) of column `field`; empty and missing texts are passed over. DataError as above."""
    arrow = extra("pyarrow", "data", str(path))
    with extra("pyarrow.parquet", "data", str(path)).ParquetFile(path) as table:
        column = next((c for c in table.schema_arrow if c.name == field), None)
        if column is None or not (arrow.types.is_string(column.type) or arrow.types.is_large_string(column.type)):
            names = ", ".join(repr(c.name) for c in table.schema_arrow)
            raise DataError(f"{path} has no text column {field!r} (it has: {names}); name it with --text-field.")
        row = 0
        for batch in table.iter_batches(_ROWS, columns=[field], use_threads=False):
            for text in batch.column(0).to_pylist():
                row += 1
                if text:
                    yield row, text
    if not row:
        raise DataError(f"{path} holds no documents.")


def read_documents(path: Path, field: str) -> Iterator[tuple[int, str]]:
    """(place in the file, text) of each document of a JSON Lines or Parquet file. DataError for a damaged file."""
    try:
        yield from (read_parquet if path.suffix == ".parquet" else read_jsonl)(path, field)
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path} is damaged ({error}); copy it again.") from None
    except Exception as error:
        foreign = type(error).__module__.startswith(("pyarrow", "zstandard"))
        if foreign or (isinstance(error, OSError) and error.errno is None):  # pyarrow's, of what it read
            raise DataError(f"{path} is damaged ({str(error).splitlines()[0]}); copy it again.") from None
        raise
