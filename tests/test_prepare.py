"""prepare and open_dataset: shards are read back with struct, text is compared with what went in."""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import py_compile
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from daybreak.data.catalogue import resolve_source
from daybreak.data.dataset import open_dataset
from daybreak.data.prepare import prepare
from daybreak.data.sources import cut, is_val, stdlib_documents, stdlib_files
from daybreak.data.tokenizer import get_tokenizer
from daybreak.errors import ConfigError, DataError


def read_split(folder: Path, split: str) -> list[int]:
    tokens: list[int] = []
    for path in sorted(folder.glob(f"{folder.name}_{split}_*.bin")):
        data = path.read_bytes()
        magic, version, count = struct.unpack_from("<3i", data)
        assert (magic, version, len(data)) == (20240520, 1, 1024 + 2 * count)
        assert not any(data[12:1024])
        tokens += struct.unpack_from(f"<{count}H", data, 1024)
    return tokens


def read_documents(folder: Path, split: str, tokenizer: str) -> list[str]:
    """The split's texts: every document follows an EOT, the first token is one."""
    tok = get_tokenizer(tokenizer)
    documents: list[list[int]] = []
    for token in read_split(folder, split):
        if token == tok.eot:
            documents.append([])
        else:
            documents[-1].append(token)
    return [tok.decode(ids) for ids in documents]


def prose(lines: int, seed: int = 0) -> str:
    rng = random.Random(seed)
    words = ["the", "Übermut", "don't", "42", "λ-calculus", "naïve", "日本", "x=1;", "--", "🙂"]
    return "".join(" ".join(rng.choices(words, k=rng.randrange(1, 12))) + "\n" for _ in range(lines))


def test_stdlib_is_tokenized_document_by_document(tmp_path: Path) -> None:
    manifest = prepare("stdlib", data_dir=tmp_path, tokenizer="bytes", shard_tokens=4_000_000)
    folder = tmp_path / "stdlib-bytes"
    documents = list(stdlib_documents())
    for split, record in (("train", manifest.train), ("val", manifest.val)):
        expected = [text for name, text in documents if is_val(name, 0.05) == (split == "val")]
        assert read_documents(folder, split, "bytes") == expected
        assert record.documents == len(expected)
        assert record.bytes == sum(len(text.encode()) for text in expected) == record.tokens - record.documents
        assert [shard.tokens for shard in record.shards[:-1]] == [4_000_000] * (len(record.shards) - 1)
        for shard in record.shards:
            data = (folder / shard.file).read_bytes()
            assert (shard.size, shard.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert len(manifest.train.shards) > 1
    assert 0.01 < manifest.val.bytes / manifest.train.bytes < 0.15
    assert manifest.revision == "Python " + ".".join(map(str, sys.version_info[:3]))
    assert json.loads((folder / "manifest.json").read_text())["format"] == 1
    dataset = open_dataset("stdlib", tmp_path, tokenizer="bytes")
    assert dataset.manifest == manifest
    assert dataset.tokenizer_name == "bytes"
    assert [shard.tokens for shard in dataset.train] == [shard.tokens for shard in manifest.train.shards]


def test_stdlib_holds_sources_and_topics_but_no_tests() -> None:
    names = [name for name, _ in stdlib_files()]
    assert names == sorted(names)
    assert {"argparse.py", "json/decoder.py"} <= set(names)
    parts = {part for name in names for part in name.split("/")}
    assert not parts & {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"}
    topics = [text for name, text in stdlib_documents() if name == "pydoc_data/topics/lambda"]
    assert len(topics) == 1
    assert "Lambda expressions" in topics[0]


def test_the_number_of_workers_does_not_change_a_byte(tmp_path: Path) -> None:
    for name, workers in (("one", 1), ("five", 5)):
        prepare(["stdlib"], data_dir=tmp_path / name, tokenizer="gpt2-1024", shard_tokens=1_000_003, workers=workers)
    one, five = (tmp_path / name / "stdlib-gpt2-1024" for name in ("one", "five"))
    names = sorted(path.name for path in one.iterdir())
    assert len(names) > 5
    assert names == sorted(path.name for path in five.iterdir())
    for name in names:
        assert (one / name).read_bytes() == (five / name).read_bytes()


@pytest.mark.parametrize("name", ["gpt2", "gpt2-1024"])
def test_cutting_a_text_does_not_change_its_tokens(name: str) -> None:
    rng = random.Random(3)
    tokenizer = get_tokenizer(name)
    kinds = ["abc", "A's'tll'", "01", " ", "\n", "\r\n", "\t", "!?", "é日🙂", "\x1c\x1f", "\x85\xa0\u2028"]
    cuts = 0
    for _ in range(300):
        text = "".join(rng.choice(rng.choice(kinds)) for _ in range(rng.randrange(1, 120))) + rng.choice(["", " x"])
        size = rng.randrange(8, 40)
        pieces = list(cut([text], size))
        assert "".join(pieces) == text
        if all(len(piece) < 4 * size for piece in pieces[:-1]):  # else it had to be cut inside a word
            tokens = [token for piece in pieces for token in tokenizer.encode(piece).tolist()]
            assert tokens == tokenizer.encode(text).tolist(), (text, pieces)
            cuts += len(pieces) - 1
    assert cuts > 500
    assert [len(piece) for piece in cut(["x" * 100], 8)] == [32, 32, 32, 4]
    assert list(cut(["aa bb", " cc dd", " ee"], 5)) == ["aa", " bb cc", " dd", " ee"]
    joined = "ab!\x1f!cdefg"  # Python calls \x1f whitespace; to the pattern it is a symbol that joins the others
    assert list(cut([joined], 4)) == [joined]


def test_one_text_is_split_at_a_line_end_near_its_end(tmp_path: Path) -> None:
    text = prose(40_000)  # 2 MB: several pieces
    book = tmp_path / "my book.txt"
    book.write_bytes(b"\xef\xbb\xbf" + text.encode())  # with a byte order mark
    manifest = prepare([book], data_dir=tmp_path, workers=2)
    assert manifest.name == "my-book"
    assert manifest.source == str(book)
    assert manifest.licence == "unknown"
    assert manifest.revision == "sha256:" + hashlib.sha256(text.encode()).hexdigest()
    (train,), (val,) = (read_documents(tmp_path / "my-book", split, "gpt2") for split in ("train", "val"))
    assert train + val == text
    assert train.endswith("\n")
    assert 0.049 < len(val.encode()) / len(text.encode()) < 0.051
    assert (manifest.train.bytes, manifest.val.bytes) == (len(train.encode()), len(val.encode()))
    assert read_split(tmp_path / "my-book", "train") == [50256, *get_tokenizer("gpt2").encode(train).tolist()]


@pytest.mark.parametrize(
    ("text", "train"),
    [
        ("one\r\ntwo\r\nthree", "one\r\ntwo\r\n"),
        ("a line\nand another\n", "a line\n"),
        ("no line end at all", "no line end at "),
        ("abcdefghij", "abcde"),
    ],
)
def test_small_texts_are_split_too(tmp_path: Path, text: str, train: str) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(text.encode())
    prepare([path], data_dir=tmp_path, tokenizer="bytes", val_fraction=0.5 if len(text) == 10 else None)
    assert read_documents(tmp_path / "a-bytes", "train", "bytes") == [train]
    assert read_documents(tmp_path / "a-bytes", "val", "bytes") == [text[len(train) :]]


def test_json_lines(tmp_path: Path) -> None:
    path = tmp_path / "pages.jsonl"
    texts = [f"document {i}\n" + prose(i % 7, i) for i in range(1000)]
    lines = [json.dumps({"id": i, "body": text}, ensure_ascii=i % 2 == 0) for i, text in enumerate(texts)]
    lines[2:2] = ["", json.dumps({"body": ""})]  # neither is a document
    path.write_text("\n".join(lines), "utf-8")
    manifest = prepare([path], data_dir=tmp_path, tokenizer="bytes", text_field="body", val_fraction=0.02)
    val = read_documents(tmp_path / "pages-bytes", "val", "bytes")
    train = read_documents(tmp_path / "pages-bytes", "train", "bytes")
    assert sorted(train + val) == sorted(texts)
    assert manifest.val.documents == len(val)
    order = {text: i for i, text in enumerate(texts)}
    assert [order[t] for t in train] == sorted(order[t] for t in train)
    assert train[0] == texts[0]
    assert val[0] == texts[1]  # so that there is one
    assert 8 <= len(val) <= 35

    path.write_text("\n".join(lines[:500]), "utf-8")  # a shorter file: the same documents stay validation
    prepare([path], data_dir=tmp_path, tokenizer="bytes", text_field="body", val_fraction=0.02)
    shorter = read_documents(tmp_path / "pages-bytes", "val", "bytes")
    assert shorter == val[: len(shorter)]
    assert len(shorter) < len(val)


def test_json_lines_of_one_document_and_half_a_surrogate_pair(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "first\nsecond \ud83d half\nthird \U0001f642\n"}) + "\n")
    prepare([path], data_dir=tmp_path)
    assert read_documents(tmp_path / "a", "train", "gpt2") == ["first\nsecond \ufffd half\n"]
    assert read_documents(tmp_path / "a", "val", "gpt2") == ["third \U0001f642\n"]


def test_a_folder_is_read_in_sorted_order(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    (folder / "deep" / ".cache").mkdir(parents=True)
    (folder / "b.txt").write_text("b")
    (folder / "a.md").write_text("a")
    (folder / "deep" / "c.jsonl").write_text('{"text": "c1"}\n{"text": "c2"}\n')
    for unread in ("photo.jpg", ".hidden.txt", "deep/.cache/x.txt"):
        (folder / unread).write_bytes(b"\xff")
    prepare([folder], data_dir=tmp_path, tokenizer="bytes")
    assert read_documents(tmp_path / "corpus-bytes", "train", "bytes") == ["a", "b", "c1"]
    assert read_documents(tmp_path / "corpus-bytes", "val", "bytes") == ["c2"]


@pytest.mark.parametrize("names", [("Tiny-train.txt", "Tiny-valid.txt"), ("train/x.jsonl", "val/x.jsonl")])
def test_a_split_that_the_names_tell_is_kept(tmp_path: Path, names: tuple[str, str]) -> None:
    for name in names:
        path = tmp_path / "corpus" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{name} 1" if name.endswith("txt") else f'{{"text": "{name} 1"}}\n{{"text": "{name} 2"}}\n')
    prepare([tmp_path / "corpus"], data_dir=tmp_path, tokenizer="bytes")
    for split, name in zip(("train", "val"), names, strict=True):
        documents = read_documents(tmp_path / "corpus-bytes", split, "bytes")
        assert documents == [f"{name} 1", f"{name} 2"][: 1 if name.endswith("txt") else 2]


LONG = b"0123456789abcde\n" * 70_000  # more than one block of reading

BAD_FILES = {
    "latin.txt": (b"fine\nstill fine\ncaf\xe9\n", "latin.txt line 3: byte 0xe9 is not UTF-8"),
    "late.txt": (LONG + b"\xff\n", "late.txt line 70001: byte 0xff is not UTF-8"),
    "torn.txt": (b"one\ntwo \xe6\x97", "torn.txt line 2: byte 0xe6 is not UTF-8"),
    "empty.txt": (b"", "empty.txt is empty"),
    "mark.txt": (b"\xef\xbb\xbf", "mark.txt is empty"),
    "short.txt": (b"x", "too little text to split"),
    "bytes.jsonl": (b'{"text": "a"}\n\n{"text": "\xff"}\n', "bytes.jsonl line 3: byte 0xff is not UTF-8"),
    "broken.jsonl": (b'{"text": "a"}\n{"text": "b"\n', "broken.jsonl line 2 is not valid JSON"),
    "field.jsonl": (b'{"id": 1, "content": "a"}\n', "line 1 has no text in field 'text' (it has: 'id', 'content')"),
    "number.jsonl": (b'{"text": "a"}\n{"text": 5}\n', "number.jsonl line 2 has no text in field 'text'"),
    "list.jsonl": (b"[1]\n", "line 1 has no text in field 'text' (it has: list)"),
    "deep.jsonl": (b"[" * 100_000 + b"\n", "deep.jsonl line 1 is not valid JSON"),
    "blank.jsonl": (b"\n\n", "blank.jsonl holds no documents"),
    "table.parquet": (b"PAR1", "table.parquet is damaged"),
    "page.html": (b"<html>", "cannot read .html files; convert to .txt, .md or .jsonl"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_text_is_named_and_nothing_is_left(tmp_path: Path, name: str) -> None:
    data, reason = BAD_FILES[name]
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError) as error:
        prepare([path], data_dir=tmp_path / "data", name="x", workers=1)
    assert reason in str(error.value)
    assert str(path) in str(error.value)
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data").iterdir())


def test_what_cannot_be_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "shakespeare.txt").write_text("To be\nor not\n")
    (tmp_path / "void").mkdir()
    data, text = tmp_path / "data", tmp_path / "shakespeare.txt"
    with pytest.raises(DataError, match=r"did you mean '.*shakespeare\.txt'"):
        prepare(str(tmp_path / "shakespear.txt"), data_dir=data)
    with pytest.raises(DataError, match="'stdlb' is neither a file nor a folder; did you mean 'stdlib'"):
        prepare("stdlb", data_dir=data)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"^'nope\.txt' is neither a file nor a folder; give one that exists\.$"):
        prepare("nope.txt", data_dir=data)  # no data set of the catalogue is called like a file
    with pytest.raises(
        DataError, match=r"void holds no \.txt, \.md or \.jsonl.*; put such a file there, or give another"
    ):
        prepare(tmp_path / "void", data_dir=data)
    (tmp_path / "model").mkdir()
    (tmp_path / "model/tokenizer.json").touch()
    for options, rule in (
        ({"name": "../x"}, "dataset name '../x' must start with a letter or digit"),
        ({"tokenizer": "gpt3"}, "unknown tokenizer 'gpt3'"),
        ({"tokenizer": str(tmp_path / "model")}, "model' is a folder; give its file, .*model/tokenizer.json"),
        (
            {"val_fraction": 1.0},
            "val-fraction = 1.0 must be above 0 and below 1; to train on all of it, prepare a folder",
        ),
        ({"val_fraction": 0.0}, "val-fraction = 0.0 must be above 0 and below 1; .* named train and .* named val"),
        ({"shard_tokens": 0}, "shard-tokens = 0 must be from 1"),
        ({"workers": -1}, "workers = -1 must be 0"),
    ):
        with pytest.raises(ConfigError, match=rule):
            prepare(text, data_dir=data, **options)
    with pytest.raises(ConfigError, match="nothing to prepare"):
        prepare([], data_dir=data)
    assert not data.exists()


def test_the_command_that_a_folder_of_code_is_told_makes_it_readable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, data = tmp_path / "my code's", tmp_path / "data"
    (code / "deep").mkdir(parents=True)
    (code / "a.py").write_text("first = 1\n")
    (code / "deep/b.py").write_text("second = 2\n")
    (code / "settings.json").write_text('{"width": 88}')  # the most frequent reason counts
    with pytest.raises(DataError, match=r"left out: 2, \.py files .*; if these are plain text, join") as error:
        prepare(code, data_dir=data)
    command = re.search(r"`(find .*)`", str(error.value))
    assert command
    subprocess.run(["bash", "-euc", command[1]], check=True)
    assert sorted(Path("my.txt").read_text().splitlines()) == ["first = 1", "second = 2"]
    for i in range(5):  # compiled programs are more than their sources, and no text
        py_compile.compile(str(code / "a.py"), str(code / f"__pycache__/a{i}.pyc"))
        (code / f"font{i}.ttf").write_bytes(b"\0\1\0\0")
        (code / f"LICENSE{i}").write_text("free")
    with pytest.raises(DataError, match=r"5, \.pyc files .*; if these are plain text, join them with") as error:
        prepare(code, data_dir=data)
    assert command[0] in str(error.value)
    with pytest.raises(DataError, match=r"left out: 5, \.pyc files .*; put such a file there, or give another folder"):
        prepare(code / "__pycache__", data_dir=data)
    assert prepare("my.txt", tokenizer="bytes", data_dir=data)
    (drawn := tmp_path / "drawn").mkdir()
    (drawn / "a.PNG").write_bytes(b"\x89PNG")
    with pytest.raises(DataError, match=r"\.PNG files .*; to train a model that draws, add --as images"):
        prepare(drawn, data_dir=data)
    with pytest.raises(DataError, match=r"cannot read \.PNG files; .*a folder of pictures with --as images"):
        prepare(drawn / "a.PNG", data_dir=data)
    rows = tmp_path / "rows"
    rows.mkdir()
    (rows / "a.csv").write_text("body\n" + "To be\n" * 9)
    with pytest.raises(
        DataError, match=r"without a field 'text'.*; name the field that holds .* with --text-field KEY"
    ):
        prepare(rows, data_dir=data)
    assert prepare(rows, tokenizer="bytes", text_field="body", data_dir=data)


def test_a_path_wins_over_a_catalogue_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("stdlib").mkdir()
    Path("stdlib/a.txt").write_text("one\ntwo\n")
    with caplog.at_level(logging.WARNING, "daybreak"):
        assert prepare("stdlib", tokenizer="bytes").train.bytes == 4
    assert "'stdlib' is a file or folder here and a catalogue name" in caplog.text


def test_only_the_same_dataset_is_replaced(tmp_path: Path) -> None:
    text, data = tmp_path / "a.txt", tmp_path / "data"
    text.write_text("one\ntwo\n")
    prepare(text, data_dir=data)
    text.write_text("one\ntwo\nthree\n")
    assert prepare(text, data_dir=data).train.bytes == 8
    assert [path.name for path in data.iterdir()] == ["a"]
    with pytest.raises(ConfigError, match=r"made from .* with tokenizer 'gpt2'; choose another --name"):
        prepare(text, data_dir=data, name="a", tokenizer="bytes")
    with pytest.raises(ConfigError, match="exists, made from"):
        prepare("stdlib", data_dir=data, name="a")
    (data / "a" / "notes").write_text("mine")
    with pytest.raises(ConfigError, match="also holds 'notes'"):
        prepare(text, data_dir=data)
    (data / "b").mkdir()
    with pytest.raises(ConfigError, match="exists and is not a prepared dataset"):
        prepare(text, data_dir=data, name="b")


def test_progress_ends_at_the_total(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    texts = [prose(3000, i) for i in range(20)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    calls: list[tuple[int, int, int]] = []
    manifest = prepare(path, data_dir=tmp_path, tokenizer="bytes", progress=lambda *call: calls.append(call))
    assert len(calls) > 2
    assert calls == sorted(calls, key=lambda call: (call[0], call[2]))
    assert all(done <= total for done, total, _ in calls)
    size = sum(len(text.encode()) for text in texts)
    assert calls[-1] == (size, size, manifest.train.tokens + manifest.val.tokens)


SLOW = """
    import sys, time
    from daybreak.data.prepare import prepare
    def progress(done, total, tokens):
        print(tokens, flush=True)
        time.sleep(600)
    prepare(sys.argv[1], data_dir=sys.argv[2], name="book", tokenizer="bytes", shard_tokens=500_000, progress=progress)
"""


def test_a_killed_prepare_leaves_nothing_half_written(tmp_path: Path) -> None:
    text, data = tmp_path / "book.txt", tmp_path / "data"
    text.write_text(prose(60_000))
    command = [sys.executable, "-c", textwrap.dedent(SLOW), str(text), str(data)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None
            assert int(process.stdout.readline()) > 500_000  # it has finished shards
            holder = re.escape(
                f"process {process.pid} on {socket.gethostname()}; wait for it or choose another --name."
            )
            with pytest.raises(DataError, match=f"is being prepared by {holder}"):
                prepare(text, data_dir=data, name="book", tokenizer="bytes")
        finally:
            process.kill()
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in data.iterdir()] == [".book.tmp"]
    assert list((data / ".book.tmp").iterdir())
    with pytest.raises(DataError, match="no dataset 'book'"):
        open_dataset("book", data)
    prepare(text, data_dir=data, name="book", tokenizer="bytes")
    assert [path.name for path in data.iterdir()] == ["book"]
    documents = [*read_documents(data / "book", "train", "bytes"), *read_documents(data / "book", "val", "bytes")]
    assert "".join(documents) == text.read_text()


def test_memory_does_not_grow_with_the_text(tmp_path: Path) -> None:
    path = tmp_path / "big.txt"
    with path.open("w") as file:
        for _ in range(64):
            file.write("all work and no play " * 50_000)  # 67 MB on one line
    code = """
        import resource, sys
        from daybreak.data.prepare import prepare
        unit = 1024 if sys.platform == "darwin" else 1
        def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // unit
        before = peak()
        prepare(sys.argv[1], data_dir=sys.argv[2], tokenizer="bytes", workers=2)
        print(peak() - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(path), str(tmp_path / "data")]
    grown = int(subprocess.run(command, stdout=subprocess.PIPE, check=True).stdout)
    assert grown < 48_000, f"{grown} KiB for a text of 65,000 KiB"


def test_resolve_source_names_several_files(tmp_path: Path) -> None:
    for name in ("b.txt", "a.txt"):
        (tmp_path / name).write_text(name)
    source = resolve_source([tmp_path / "b.txt", tmp_path / "a.txt"])
    assert source.name == "b"
    assert source.size == 10
    assert [(piece.split, piece.text) for piece in source.pieces()] == [("train", "b.txt"), ("val", "a.txt")]


def test_what_it_takes_is_said_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "texts").mkdir()
    for i in range(2):
        (tmp_path / f"texts/{i}.txt").write_text("it is one byte a token. " * 25_000)
    caplog.set_level(logging.INFO, "daybreak")

    def attempt(free: int, tokenizer: str = "bytes") -> str:
        monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": free})())
        caplog.clear()
        prepare([tmp_path / "texts"], data_dir=tmp_path / "data", tokenizer=tokenizer)
        return caplog.text

    # 1.2 MB of text are as many bytes' tokens, of two bytes each.
    line = "texts: 1.2 MB of text, about 1.2e+06 tokens, 2.4 MB of shards (estimated from the files' sizes); "
    assert f"{line}2.5 MB are free" in attempt(2_500_000)
    assert "too small" not in caplog.text
    assert "the disk may be too small" in attempt(1_300_000)
    shutil.rmtree(tmp_path / "data/texts-bytes")
    with pytest.raises(DataError, match=r"texts needs about 2.4 MB of disk, 1.1 MB are free at .*; make room"):
        attempt(1_100_000)
    assert not list((tmp_path / "data").iterdir())
    said = attempt(10**9, "gpt2")
    tokens = float(said.partition("about ")[2].partition(" tokens")[0])
    assert 0.6 < tokens / (50_000 * 7) < 1.6  # each of these sentences has seven of GPT-2's


@pytest.mark.parametrize("ends", ["fsync", "rename"])
def test_the_old_data_set_stays_if_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """A disk that fails to flush, and Ctrl-C between the two renames."""
    book = tmp_path / "book.txt"
    book.write_text("first line\n" * 200)
    prepare(book, data_dir=tmp_path, tokenizer="bytes", name="b")
    before = {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    book.write_text("another line\n" * 200)
    usual = Path.rename

    def failing(path: Path) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def rename(path: Path, target: Path) -> Path:
        if path.name == ".b.tmp":
            raise KeyboardInterrupt
        return usual(path, target)

    if ends == "fsync":
        monkeypatch.setattr("daybreak.data.prepare.fsync_folder", failing)
    else:
        monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(DataError if ends == "fsync" else KeyboardInterrupt):
        prepare(book, data_dir=tmp_path, tokenizer="bytes", name="b")
    assert {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "book.txt"]
