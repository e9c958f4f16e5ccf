"""Files as people have them: splits told by names, odd but good files, bad ones, bombs, and files of other kinds."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import logging
import os
import struct
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from test_prepare import prose, read_documents

from daybreak.cli.main import main
from daybreak.data import formats
from daybreak.data.prepare import JOURNAL, prepare
from daybreak.data.shards import read_header
from daybreak.data.sources import split_of
from daybreak.errors import CheckpointError, DataError
from daybreak.state.safetensors_io import SafetensorsFile


def lines(*texts: str | None) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write(folder: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder


def splits(tmp_path: Path, *names: Path, **options: object) -> dict[str, list[str]]:
    prepare(names, data_dir=tmp_path / "d", tokenizer="bytes", name="x", **options)  # type: ignore[arg-type]
    return {split: read_documents(tmp_path / "d/x", split, "bytes") for split in ("train", "val")}


# ---- splits


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train.csv", "train"), ("data/train-00000-of-00012.parquet", "train"), ("training/a.jsonl", "train"),
        ("my_train_file_00.txt", "train"), ("Tiny-Train.txt", "train"),
        ("validation.csv", "val"), ("valid.jsonl", "val"), ("dev.jsonl", "val"), ("a/val/b.txt", "val"),
        ("val2.txt", "val"), ("wiki.valid.tokens.txt", "val"), ("dev set/a.txt", "val"),
        ("test.csv", "test"), ("testing.txt", "test"), ("eval.jsonl", "test"), ("evaluation/a.txt", "test"),
        ("data/test-00000-of-00001.parquet", "test"), ("test/train.txt", "test"), ("train/test_a.txt", "train"),
        ("latest.txt", ""), ("developer.txt", ""), ("trains.txt", ""), ("contest/a.txt", ""), ("medieval.txt", ""),
    ],
)  # fmt: skip
def test_names_tell_splits_as_on_the_hub(name: str, split: str) -> None:
    assert split_of(name) == split


@pytest.mark.parametrize("form", ["{}.jsonl", "{}/a.jsonl", "data/{}-00000-of-00001.jsonl"])
@pytest.mark.parametrize("val", ["validation", "valid", "dev", "val"])
def test_test_files_are_never_trained_on(tmp_path: Path, form: str, val: str) -> None:
    folder = write(tmp_path / "in", {form.format(s): lines(f"{s} 1", f"{s} 2") for s in ("train", val, "test")})
    assert splits(tmp_path, folder) == {"train": ["train 1", "train 2"], "val": [f"{val} 1", f"{val} 2"]}


def test_splits_of_several_paths_and_of_a_test_file_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "daybreak")
    folder = write(tmp_path, {f"{s}/a.txt": s.encode() for s in ("train", "val", "test")})
    expected = {"train": ["train"], "val": ["val"]}
    assert splits(tmp_path, *(folder / s for s in ("train", "val", "test"))) == expected
    assert splits(tmp_path / "2", *(folder / s / "a.txt" for s in ("test", "train", "val"))) == expected
    assert (
        "files to read: 2 (1 for validation, as their names say); left out: 1, of a test split, as their "
        "names say (a.txt)" in caplog.text
    )
    write(tmp_path, {"test.jsonl": lines("one", "two")})
    assert splits(tmp_path / "3", tmp_path / "test.jsonl") == {"train": ["one"], "val": ["two"]}
    # Without a validation file the share comes from the training files.
    write(tmp_path / "n", {"train.jsonl": lines("one", "two"), "eval.jsonl": lines("never")})
    assert splits(tmp_path / "4", tmp_path / "n") == {"train": ["one"], "val": ["two"]}


@pytest.mark.parametrize(
    ("files", "fraction"),
    [
        ({"a.txt": b"A title\n" + b"word " * 1601}, 0.05),
        ({"a.txt": ("A title\n" + "x" * 4000 + "日本" * 4000).encode()}, 0.05),
        ({"a.jsonl": lines("word " * 9000, "short", "short")}, 0.05),
        ({"a.jsonl": lines("short", "short", "word " * 9000)}, 0.05),
        ({"a.jsonl": lines("word " * 90_000, *(f"document {i} of them" for i in range(2000)))}, 0.01),
        ({"a.jsonl": lines(*(f"document {i} of them" for i in range(1999)), "word " * 90_000)}, 0.01),
        ({f"{i:02}.txt": b"line of text\n" * 1000 for i in range(20)}, 0.05),
        ({"big.txt": b"line of text\n" * 9000, "z.txt": b"small"}, 0.05),
        ({"a.txt.gz": gzip.compress(b"line of text\n" * 9000)}, 0.05),
        ({"a.txt": zstandard.compress(b"line of text\n" * 9000)}, 0.05),
        ({"a.jsonl": lines(*("line of text\n" * 10 for _ in range(300)))}, 0.05),
    ],
)  # fmt: skip
def test_the_share_of_validation_is_near_the_one_that_was_asked(
    tmp_path: Path, files: dict[str, bytes], fraction: float
) -> None:
    for asked in (None, 0.2):
        prepare(write(tmp_path / "in", files), data_dir=tmp_path / f"{asked}", tokenizer="bytes", name="x",
                val_fraction=asked)  # fmt: skip
        manifest = json.loads((tmp_path / f"{asked}/x/manifest.json").read_text())
        share = manifest["val"]["bytes"] / (manifest["val"]["bytes"] + manifest["train"]["bytes"])
        assert 0.7 * (asked or fraction) < share < 1.5 * (asked or fraction), (asked, share)


def test_the_share_and_the_next_command_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("one line\n" * 1000)
    assert main(["prepare", "a.txt", "--tokenizer", "bytes"]) == 0
    manifest = json.loads(Path("data/a-bytes/manifest.json").read_text())
    share = 100 * manifest["val"]["tokens"] / (manifest["val"]["tokens"] + manifest["train"]["tokens"])
    assert 256 < manifest["val"]["tokens"] <= 512 < manifest["train"]["tokens"]  # a sample of 1,024 does not fit
    command = "daybreak train d6 --model.V 257 --batch.T 256 --data a-bytes --name a-bytes"
    tiny = "daybreak train tiny --data.tokenizer bytes --model.V 257 --data a-bytes --name a-bytes"
    advice = f"Without a GPU, train the smallest model on so small a text: {tiny}"
    assert capsys.readouterr().out.endswith(f"\nValidation is {share:.3g} % of the tokens. Next: {command}\n{advice}\n")
    assert main([*tiny.split()[1:], "--steps", "1", "--eval.sample_tokens", "0"]) == 0
    assert "\nruns/a-bytes: step 1, " in capsys.readouterr().out
    Path("c.txt").write_text("hi there\n")
    assert main(["prepare", "c.txt", "--tokenizer", "gpt2-1024"]) == 0
    assert capsys.readouterr().out.endswith("samples have 128 tokens each. Add text, and prepare it again.\n")
    Path("b.txt").write_text("one line\n" * 20_000)
    assert main(["prepare", "b.txt"]) == 0
    _, said, advice = capsys.readouterr().out.splitlines()
    assert said.endswith("Next: daybreak train d6 --data b --name b")
    assert "--tokenizer gpt2-1024, and train tiny" in advice


def test_a_tokenizer_of_a_data_set_that_is_not_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`tiny` reads stdlib unless --data says otherwise, and nothing says where this tokenizer's file is."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", "tiny", "--data.tokenizer", "hf-0123456789ab", "--model.V", "1500"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == (
        "daybreak: data.tokenizer = 'hf-0123456789ab': stdlib is not made with it; name the right --data."
    )
    assert not Path("data").exists()


# ---- good files


TEXTS = ["first\nof two lines", 'zweites, mit "Zeichen"', "日本\r\n", "fourth"]
LINES = lines(*TEXTS)


def zstd_frame(data: bytes, window_log: int) -> bytes:
    """By RFC 8878: no content size, no checksum, one raw block; the window descriptor's exponent is log - 10."""
    return struct.pack("<IBB", 0xFD2FB528, 0, window_log - 10 << 3) + (len(data) << 3 | 1).to_bytes(3, "little") + data


def parquet(array: pa.Array) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"n": pa.array(range(len(array))), "text": array}), out)
    return out.getvalue()


SKIPPABLE = struct.pack("<II", 0x184D2A53, 5) + b"table"
ARRAY = json.dumps([{"text": t} for t in TEXTS], indent=1, ensure_ascii=False).encode()
CSV = b"n,text\r\n" + b"".join(b'7,"' + t.replace('"', '""').encode() + b'"\r\n' for t in TEXTS)
TSV = ("text\tn\n" + "".join('"' + t.replace('"', '""') + '"\t7\n' for t in TEXTS)).encode()
NULLS = pa.array([None, *TEXTS, None, ""])
GOOD: dict[str, tuple[str, bytes]] = {
    "a long window": ("a.jsonl.zst", zstd_frame(LINES, 31)),
    "frames": ("a.jsonl.zst", zstandard.compress(LINES[:30]) + zstd_frame(LINES[30:50], 28)
               + zstd_frame(LINES[50:], 20)),
    "skippable frames": ("a.jsonl.zst", SKIPPABLE + zstandard.compress(LINES) + SKIPPABLE),
    "zstd padded": ("a.jsonl.zst", zstandard.compress(LINES) + bytes(512)),
    "gzip padded": ("a.jsonl.gz", gzip.compress(LINES[:30]) + gzip.compress(LINES[30:]) + bytes(512)),
    "unpacked on the way": ("a.jsonl.gz", LINES),
    "packed by another name": ("a.jsonl", gzip.compress(LINES)),
    "null": ("a.jsonl", lines(None, *TEXTS[:2], None, "", *TEXTS[2:])),
    "byte order marks": ("a.jsonl", b"\xef\xbb\xbf" + LINES[:LINES.index(b"\n") + 1] + b"\xef\xbb\xbf"
                         + LINES[LINES.index(b"\n") + 1:]),
    "CRLF and blank lines": ("a.jsonl", b"\r\n \r\n" + LINES.replace(b"\n", b"\r\n\r\n")),
    "no last line end": ("a.jsonl", LINES[:-1]),
    "zeros at the end": ("a.jsonl", LINES + bytes(100)),
    "capitals": ("A.JSONL", LINES),
    "ndjson": ("a.ndjson.gz", gzip.compress(LINES)),
    "json array": ("a.json", ARRAY),
    "json array with a mark": ("a.json.gz", gzip.compress(b"\xef\xbb\xbf \n" + ARRAY)),
    "json lines": ("a.json", LINES),
    "csv": ("a.csv", b"\xef\xbb\xbf" + CSV),
    "csv packed": ("a.csv.zst", zstandard.compress(CSV)),
    "tsv": ("a.tsv.gz", gzip.compress(TSV)),
    "parquet": ("a.parquet", parquet(NULLS)),
    "parquet, capitals": ("A.PARQUET", parquet(NULLS)),
    "parquet large": ("a.parquet", parquet(NULLS.cast(pa.large_string()))),
    "parquet dictionary": ("a.parquet", parquet(NULLS.dictionary_encode())),
    "parquet bytes": ("a.parquet", parquet(NULLS.cast(pa.binary()))),
}  # fmt: skip


@pytest.mark.parametrize("what", GOOD)
def test_good_files_are_read(tmp_path: Path, what: str) -> None:
    name, data = GOOD[what]
    found = splits(tmp_path, write(tmp_path / "in", {name: data, "z/null.parquet": parquet(pa.nulls(3))}))
    assert found["train"] + found["val"] == TEXTS


def test_compressed_text_and_names_without_a_suffix(tmp_path: Path) -> None:
    text = prose(2000)
    for i, (name, data) in enumerate({
        "a.txt.gz": gzip.compress(text[:99].encode()) + gzip.compress(text[99:].encode()),
        "a.md.zst": zstandard.compress(text.encode()), "wiki_00": text.encode(), "A.TXT": text.encode(),
    }.items()):  # fmt: skip
        found = splits(tmp_path / f"{i}", write(tmp_path, {name: data}) / name)
        assert found["train"][0] + found["val"][0] == text


# ---- what a folder holds


def test_linked_folders_are_read_once_and_what_is_left_out_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "daybreak")
    far = write(tmp_path / "far", {"b.txt": b"bb", "c.json": b'[{"text": "cc"}]'})
    folder = write(tmp_path / "in", {
        "a.csv": b"id,text\n1,aa\n", "README.md": b"---\nlicense: mit\n---\n", "LICENSE": b"MIT", "x.jpg": b"\xff",
        "settings.json": b'{"lr": 1}', "dataset_infos.json": b"{}", "table.csv": b"x,y\n1,2\n", ".git/HEAD": b"x",
    })  # fmt: skip
    (folder / "link").symlink_to(far)
    (far / "loop").symlink_to(folder)
    (folder / "gone.txt").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "pipe.txt")
    found = splits(tmp_path, folder)
    assert found["train"] + found["val"] == ["aa", "bb", "cc"]
    said = caplog.text.partition("files to read: 3; left out: ")[2].partition("\n")[0]
    assert set(said.split("; ")) == {
        "1, hidden (.git)", "1, a data card (README.md)", "1, .jpg files (x.jpg)",
        "1, without a suffix, read as text where named (LICENSE)",
        "3, without a field 'text' (dataset_infos.json, settings.json, table.csv)",
        "2, no file, but a broken link, pipe or device (gone.txt, pipe.txt)",
    }  # fmt: skip


def test_a_folder_of_markdown_keeps_its_readme(tmp_path: Path) -> None:
    folder = write(tmp_path / "docs", {"README.md": b"the first page", "b.md": b"the second"})
    assert splits(tmp_path, folder) == {"train": ["the first page"], "val": ["the second"]}


def test_pipes_and_devices_are_refused_by_name(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.bin")
    for path in (tmp_path / "pipe.bin", Path("/dev/zero")):
        with pytest.raises(DataError, match=rf"{path} is a pipe or device, not a file"):
            prepare(path, data_dir=tmp_path / "d", name="x")
        with pytest.raises(DataError, match=rf"{path} is a folder, pipe or device, not a token shard"):
            read_header(path)


def test_standard_input(tmp_path: Path) -> None:
    for i, (data, found) in enumerate(((lines("one", "two"), ["one", "two"]), (b"a line\n" * 9, ["a line\n" * 9]))):
        command = [sys.executable, "-m", "daybreak", "prepare", "-", "--tokenizer", "bytes", "--name", "x"]
        subprocess.run([*command, "--data-dir", str(tmp_path / f"{i}")], input=data, check=True, capture_output=True)
        documents = [read_documents(tmp_path / f"{i}/x", split, "bytes")[0] for split in ("train", "val")]
        assert documents == found or "".join(documents) == found[0]
        assert {path.suffix for path in (tmp_path / f"{i}/x").iterdir()} == {".bin", ".json"}
        assert json.loads((tmp_path / f"{i}/x/manifest.json").read_text())["source"] == "standard input"


# ---- bad files


BAD = {
    "c.jsonl": b'{"text": "c 1"}\n{"text": \n{"id": 5}\n{"text": "\xff"}\n{"text": "c 2"}\n',
    "d.jsonl.zst": zstandard.compress(lines("d 1", "d 2"))[:-5],
    "e.txt": b"",
    "f.txt": b"fine\nna\xefve\n",
    "g.parquet": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
    "h.json": b'[{"text": "h"}',
    "i.txt": "UTF-16".encode("utf-16"),
}


def test_bad_files_are_counted_by_reason_and_the_rest_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "in", {"a.jsonl": lines("a 1", "a 2"), **BAD, "z.jsonl": lines("z 1", "z 2")})
    command = ["prepare", "in", "--tokenizer", "bytes", "--name", "x"]
    assert main(command) == 4
    assert "in/c.jsonl line 2 is not valid JSON" in capsys.readouterr().err
    assert main([*command, "--skip-bad"]) == 0
    said = capsys.readouterr().err
    assert "skipped 2 not JSON (first: in/c.jsonl line 2 is" in said
    for part in ("1 without text (first: in/c.jsonl line 3", "2 not UTF-8 (first: in/c.jsonl line 4: byte 0xff",
                 "1 damaged (first: in/d.jsonl.zst is damaged (it ends within a frame)", "1 empty (first: in/e.txt",
                 "2 unreadable (first: in/g.parquet is not Parquet but a Git LFS pointer"):  # fmt: skip
        assert part in said
    found = [t for split in ("train", "val") for t in read_documents(tmp_path / "data/x", split, "bytes")]
    assert found == ["a 1", "a 2", "c 1", "c 2", "z 1", "z 2"]


def test_a_parquet_text_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    write(tmp_path, {"a.parquet": parquet(pa.array([b"one", b"\xff", b"two"]))})
    with pytest.raises(DataError, match=r"a.parquet row 2 is not UTF-8 in column 'text'"):
        prepare(tmp_path / "a.parquet", data_dir=tmp_path / "d")
    assert splits(tmp_path, tmp_path / "a.parquet", skip_bad=True) == {"train": ["one"], "val": ["two"]}


def test_empty_files_among_others_are_passed_over(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write(tmp_path / "in", {"a.jsonl": lines("a", "b"), "e.jsonl": b"", "f.txt": b"", "g.json": b"[]"})
    assert splits(tmp_path, folder) == {"train": ["a"], "val": ["b"]}
    assert f"skipped 3 empty (first: {folder}/e.jsonl holds no documents.)" in caplog.text


def test_mending_a_file_goes_on_from_the_journal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "daybreak")
    monkeypatch.setattr("daybreak.data.prepare.UNIT", 5000)
    texts = [f"{i} {prose(4, i)}" for i in range(600)]
    files = {f"{k}.jsonl": lines(*texts[100 * k : 100 * k + 100]) for k in range(6)}
    folder = write(tmp_path / "in", files)
    (folder / "4.jsonl").write_bytes(files["4.jsonl"] + b"{\n")
    options = {
        "data_dir": tmp_path / "d",
        "tokenizer": "bytes",
        "shard_tokens": 9000,
        "val_fraction": 0.05,
        "name": "x",
    }
    with pytest.raises(DataError, match=r"4.jsonl line 101 is not valid JSON"):
        prepare(folder, **options)
    assert (tmp_path / "d/.x.tmp" / JOURNAL).exists()
    write(folder, files)  # mended, so of another size and time
    made = prepare(folder, **options)
    assert "continuing after" in caplog.text
    assert "starting over" not in caplog.text
    assert made == prepare(folder, **{**options, "data_dir": tmp_path / "whole"})
    (folder / "4.jsonl").write_bytes(files["4.jsonl"] + b"{\n")
    with pytest.raises(DataError):
        prepare(folder, **{**options, "data_dir": tmp_path / "e"})
    changed = {**files, "1.jsonl": files["1.jsonl"].replace(b"100 ", b"l00 ")}  # written already
    made = prepare(write(folder, changed), **{**options, "data_dir": tmp_path / "e"})
    assert "x: the text written so far has changed since; starting over" in caplog.text
    assert made == prepare(folder, **{**options, "data_dir": tmp_path / "whole2"})


# ---- bombs


def test_a_line_that_unpacks_without_end_is_bounded(tmp_path: Path) -> None:
    line = b'{"text": "' + b"a" * (1 << 27) + b'"}\n'
    write(tmp_path, {"a.jsonl.gz": gzip.compress(line, 1), "b.jsonl.zst": zstandard.compress(line)})
    code = """
        import resource, sys
        from daybreak.data import formats
        from daybreak.data.prepare import prepare
        from daybreak.errors import DataError
        formats.LONGEST = 1 << 23
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for name in ("a.jsonl.gz", "b.jsonl.zst"):
            try:
                prepare(f"{sys.argv[1]}/{name}", data_dir=f"{sys.argv[1]}/d", workers=1)
            except DataError as error:
                print(error)
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    *said, grown = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout.splitlines()
    assert said == [f"{tmp_path}/{name} line 1 has over 8,388,608 bytes; make several documents of it."
                    for name in ("a.jsonl.gz", "b.jsonl.zst")]  # fmt: skip
    assert int(grown) < 120_000, f"{grown} KiB for a line of 131,072 KiB"


def test_a_long_line_alone_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "LONGEST", 1 << 20)
    write(tmp_path, {"a.jsonl": lines("a", "b") + lines("x" * (1 << 22)) + lines("c", "d")})
    assert splits(tmp_path, tmp_path / "a.jsonl", skip_bad=True) == {"train": ["a", "b", "c"], "val": ["d"]}


def test_a_text_that_unpacks_too_far_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "BOMB", 1 << 22)
    one = pa.DictionaryArray.from_arrays(pa.array([0] * 100, pa.int32()), pa.array(["word " * (1 << 15)]))
    write(tmp_path, {"a.txt.gz": gzip.compress(b"word " * (1 << 21)), "a.parquet": parquet(one)})
    for name in ("a.txt.gz", "a.parquet"):
        with pytest.raises(DataError, match=rf"{name} unpacks to more than [\d,]+ bytes, 500 times its size"):
            prepare(tmp_path / name, data_dir=tmp_path / "d")


# ---- files of other kinds


def saved(save: Callable[[io.BytesIO], None]) -> bytes:
    out = io.BytesIO()
    save(out)
    return out.getvalue()


IDS = np.array([50256, 464, 1492, 50256, 11, 198] * 500)
KINDS = {
    "nanoGPT's train.bin": (IDS.astype("<u2").tobytes(),
                            "a file of token ids without a header, as nanoGPT's train.bin; its ids need"),
    "nanoGPT's characters": ((np.arange(3000) % 65).astype("<u2").tobytes(), "a file of token ids without a header"),
    ".npy": (saved(lambda out: np.save(out, IDS)), "a NumPy array (.npy); its ids need llm.c's header"),
    ".npz": (saved(lambda out: np.savez(out, a=IDS)), "a zip or pickle (.pt, .npz), as PyTorch's ckpt.pt is"),
    "Word": (b"PK\3\4".ljust(30, b"\x14") + b"[Content_Types].xml".ljust(2000), "a document of an office program, or"),
    "e-book": (b"PK\3\4".ljust(30, b"\0") + b"mimetypeapplication/epub+zip".ljust(2000), "a document of an office"),
    "old Word": (b"\xd0\xcf\x11\xe0".ljust(2000, b"\0"), "a document of an office program, or an e-book; save it as"),
    ".gguf": (b"GGUF" + struct.pack("<IQQ", 3, 1, 1) + bytes(2000), "a GGUF model for llama.cpp"),
    "LFS": (BAD["g.parquet"], "a Git LFS pointer, not the file itself; run `git lfs pull`"),
    "UTF-16": ("Once upon a time\n".encode("utf-16") * 99,
               "UTF-16 text; convert it: `iconv -f UTF-16 -t UTF-8 OLD > NEW`"),
    "UTF-16, no mark": ("Once upon a time\n".encode("utf-16-le") * 99, "UTF-16 text; convert it"),
    "safetensors": (struct.pack("<Q", 50) + b'{"a":{"dtype":"F32"}}'.ljust(2000), "a safetensors file of weights"),
    "Parquet": (parquet(NULLS), "a Parquet table; name it .parquet and give it to `daybreak prepare`"),
    "llm.c's model": (struct.pack("<2i", 20240326, 3).ljust(2000, b"\0"), "llm.c's model file, which `daybreak imp"),
    "llm.c's eval": (struct.pack("<2i", 20240522, 1).ljust(2000, b"\0"), "another of llm.c's files"),
    "text": ("Es war einmal für 日本\n".encode() * 99, "plain text; `daybreak prepare` makes token shards of it"),
    "web page": (b"\n<!DOCTYPE html>".ljust(2000), "a web page, often an error page in place of a download"),
    "pyc": (importlib.util.MAGIC_NUMBER + bytes(12) + os.urandom(200), "a compiled program; give its source"),
    "so": (b"\x7fELF\2\1\1" + bytes(99), "a compiled program; give its source"),
    "gzip": (gzip.compress(os.urandom(2000)), "a compressed file; unpack it first"),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_that_is_no_shard_is_told_what_it_is(tmp_path: Path, kind: str) -> None:
    data, said = KINDS[kind]
    (tmp_path / "train.bin").write_bytes(data)
    with pytest.raises(DataError) as error:
        read_header(tmp_path / "train.bin")
    assert f"; it is {said}" in str(error.value)
    assert f"{tmp_path}/train.bin is not a" in str(error.value)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.json", "a.csv", "a.parquet"])
@pytest.mark.parametrize("kind", ["LFS", "UTF-16", ".npy", ".gguf", "pyc", "so"])
def test_a_file_that_is_no_text_is_told_what_it_is(tmp_path: Path, name: str, kind: str) -> None:
    (tmp_path / name).write_bytes(KINDS[kind][0])
    with pytest.raises(DataError) as error:
        prepare(tmp_path / name, data_dir=tmp_path / "d")
    assert KINDS[kind][1] in str(error.value)


def test_prepare_and_weights_tell_the_kind_too(tmp_path: Path) -> None:
    header = struct.pack("<3i", 20240520, 1, 9).ljust(1024, b"\0")
    for data, said in (
        (KINDS[".npy"][0], "a NumPy array"),
        (header, "a token shard; train on it with --data.train or"),
    ):
        (tmp_path / "a.bin").write_bytes(data)
        with pytest.raises(DataError, match=rf"a.bin: cannot read .bin files; this is {said}"):
            prepare(tmp_path / "a.bin", data_dir=tmp_path / "d")
    (tmp_path / "model.safetensors").write_bytes(KINDS["LFS"][0])
    with pytest.raises(CheckpointError, match="is not a readable safetensors file: it is a Git LFS pointer"):
        SafetensorsFile(tmp_path / "model.safetensors")


def test_open_files_are_few_however_many_sets_and_shards(tmp_path: Path) -> None:
    code = """
        import resource, struct, sys
        from pathlib import Path
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
        from daybreak.data.loader import Loader
        from daybreak.data.mixing import MixLoader
        from daybreak.data.shards import read_header
        sets = []
        for s in range(4):
            shards = []
            for k in range(30):
                path = Path(sys.argv[1], f"{s}-{k}.bin")
                ids = struct.pack("<9H", *range(9 * (30 * s + k), 9 * (30 * s + k) + 9))
                path.write_bytes(struct.pack("<3i", 20240520, 1, 9).ljust(1024, b"\\0") + ids)
                shards.append(read_header(path))
            sets.append(Loader(shards, 4, seed=s, V=2000))
        mix = MixLoader(sets, [1, 1, 1, 1], seed=1)
        print(sorted({int(i) for i in mix.batch(0, 1024)[0][:, 0]}) == [9 * k + j for k in range(120) for j in (0, 4)])
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(tmp_path)]
    assert subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout == "True\n"
