"""Compressed JSON Lines, Parquet, uint32 shards and tokenizer.json, each against an independent reading."""

from __future__ import annotations

import gzip
import json
import struct
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
import torch
import zstandard
from test_prepare import prose, read_documents

from daybreak.cli.main import main
from daybreak.data.dataset import open_dataset
from daybreak.data.formats import first_record
from daybreak.data.loader import Loader
from daybreak.data.prepare import JOURNAL, prepare
from daybreak.data.shards import open_shard, read_header
from daybreak.data.tokenizer import GPT2_PATTERN, get_tokenizer
from daybreak.engine import Engine, EngineSpec
from daybreak.errors import ConfigError, DataError
from daybreak.shapes import GPT2Config
from daybreak.state.run import Run

TEXTS = [f"text {i} " + prose(i % 4, i) for i in range(300)]
LINES = "".join(json.dumps({"text": t}) + "\n" for t in TEXTS).encode()


def write_parquet(path: Path) -> None:
    pq.write_table(pa.table({"text": pa.array([*TEXTS, None, ""], pa.large_string())}), path, compression="zstd")


WRITERS = {
    "a.jsonl": lambda p: p.write_bytes(LINES),
    "a.jsonl.gz": lambda p: p.write_bytes(gzip.compress(LINES[:999]) + gzip.compress(LINES[999:])),
    "a.json.gz": lambda p: p.write_bytes(gzip.compress(LINES)),
    "a.jsonl.zst": lambda p: p.write_bytes(zstandard.compress(LINES)),
    "a.parquet": write_parquet,
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    made = prepare(tmp_path / name, data_dir=tmp_path / "d", tokenizer="bytes")
    assert made.name == "a-bytes"
    documents = [t for s in ("val", "train") for t in read_documents(tmp_path / "d/a-bytes", s, "bytes")]
    assert sorted(documents) == sorted(TEXTS)


def test_folders_and_globs_of_them(tmp_path: Path) -> None:
    for i, name in enumerate(("train/x.jsonl.zst", "train/y.parquet", "validation/z.jsonl.gz")):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        WRITERS[("a.jsonl.zst", "a.parquet", "a.jsonl.gz")[i]](path)
    made = prepare(tmp_path / "in", data_dir=tmp_path / "d", tokenizer="bytes")
    assert (made.train.documents, made.val.documents) == (600, 300)
    made = prepare(str(tmp_path / "in/train/*.parquet"), data_dir=tmp_path / "d", tokenizer="bytes", name="g")
    assert made.train.documents + made.val.documents == 300


def test_a_table_of_a_spreadsheet_that_writes_semicolons(tmp_path: Path) -> None:
    rows = [f'{i};"Satz {i}; mit Semikolon, Komma"\n' for i in range(20)]
    (tmp_path / "s.csv").write_text("nr;text\n" + "".join(rows))
    (tmp_path / "c.csv").write_text("text,a;b\n" + "".join(f'"Satz {i}; mit Semikolon, Komma",0\n' for i in range(20)))
    for name in ("s", "c"):
        prepare(tmp_path / f"{name}.csv", data_dir=tmp_path / "d", tokenizer="bytes")
        documents = [t for s in ("train", "val") for t in read_documents(tmp_path / f"d/{name}-bytes", s, "bytes")]
        assert documents == [f"Satz {i}; mit Semikolon, Komma" for i in range(20)]


def test_what_daybreak_made_in_a_folder_is_no_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """People prepare the folder they work in, where earlier commands left runs and data."""
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text("own text\n" * 99)
    prepare("a.txt", tokenizer="bytes")
    for name in ("config.toml", "metrics.jsonl", "samples.txt"):
        (run := Path("runs/mine")).mkdir(parents=True, exist_ok=True)
        (run / name).write_text("a model's text\n" * 99)
    Path("runs/notes.txt").write_text("more of it\n" * 99)
    with caplog.at_level("INFO"):
        prepare(".", name="all", tokenizer="bytes")
    assert caplog.messages == [
        "files to read: 2; left out: 2, runs and data sets of daybreak (data/a-bytes, runs/mine)"
    ]
    texts = "".join(t for s in ("train", "val") for t in read_documents(Path("data/all"), s, "bytes"))
    assert texts == "own text\n" * 99 + "more of it\n" * 99
    Path("z.jsonl").write_text('{"messages": []}\n')
    assert first_record([Path()]) == {"messages": []}  # and not the manifest of the data set
    made = prepare(run / "samples.txt", name="asked", tokenizer="bytes")  # for what is named, the user knows why
    assert made.train.bytes + made.val.bytes == 15 * 99


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("дневник.txt", "дневник"),
        ("日記 2.md", "日記-2"),
        ("हिन्दी.txt", "हिन्दी"),
        ("U\u0308bung (neu).txt", "\u00dcbung-neu"),
        ("_chat.txt", "chat"),
        ("!.txt", "text"),
    ],
)
def test_the_name_of_a_set_keeps_every_script(tmp_path: Path, file: str, name: str) -> None:
    (tmp_path / file).write_text("ein Text\n" * 99)
    assert prepare(tmp_path / file, data_dir=tmp_path / "d").name == name
    assert open_dataset(name, tmp_path / "d").train[0].path == tmp_path / f"d/{name}/{name}_train_000000.bin"


def test_patterns_of_any_depth(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each file once, whether ** finds it alone or in a folder that is read whole; hidden files never."""
    monkeypatch.chdir(tmp_path)
    for name in ("notes/a.md", "notes/deep/b.md", "notes/deep/er/c.md", "notes/deep/d.txt", "notes/.git/e.md"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_text(f"{name}\n")
    for i, (pattern, letters) in enumerate((
        ("notes/**/*.md", "abc"), ("notes/**", "abcd"), ("notes/*", "abcd"), ("n*/[ad]*", "abcd"), ("*/*/?.*", "bd"),
    )):  # fmt: skip
        prepare(pattern, data_dir="data", tokenizer="bytes", name=f"n{i}")
        folder = Path(f"data/n{i}")
        text = "".join(t for s in ("train", "val") for t in read_documents(folder, s, "bytes"))
        assert sorted(Path(line).stem for line in text.split()) == list(letters)
    with pytest.raises(DataError, match=r"no file or folder matches 'notes/\*\*/\*\.rst'; \*\* stands for"):
        prepare("notes/**/*.rst", data_dir="data")


@pytest.mark.parametrize(("name", "module"), [("a.parquet", "pyarrow"), ("a.jsonl.zst", "zstandard")])
def test_a_missing_library_is_a_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, module: str
) -> None:
    WRITERS[name](tmp_path / name)
    monkeypatch.setitem(sys.modules, module, None)
    assert main(["prepare", str(tmp_path / name), "--data-dir", str(tmp_path / "d")]) == 2
    assert capsys.readouterr().err.endswith(f"needs {module}: pip install -e '.[data]' in daybreak's folder.\n")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_damaged_file_is_named(tmp_path: Path, name: str) -> None:
    WRITERS[name](tmp_path / name)
    data = (tmp_path / name).read_bytes()
    for i, bad in enumerate((data[: len(data) // 2], b"\0" * 50 + data[50:])):
        (tmp_path / name).write_bytes(bad)
        with pytest.raises(DataError, match=rf"{name} (is damaged|line \d+ is not valid JSON|holds no doc)"):
            prepare(tmp_path / name, data_dir=tmp_path / f"d{i}")
        assert not list((tmp_path / f"d{i}").iterdir())


def test_an_interrupted_preparation_starts_over_when_the_text_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path, options = tmp_path / "a.jsonl", {"data_dir": tmp_path / "d", "tokenizer": "bytes", "shard_tokens": 3000}
    path.write_bytes(LINES)
    monkeypatch.setattr("daybreak.data.prepare.UNIT", 2000)
    calls = []

    def full_disk(*state: int) -> None:
        calls.append(state)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")

    with pytest.raises(DataError, match="No space left"):
        prepare(path, progress=full_disk, **options)
    assert (tmp_path / "d/.a-bytes.tmp" / JOURNAL).exists()
    made = prepare(path, progress=lambda *state: calls.append(state), **options)
    assert "continuing after" in caplog.text or calls[5][0] > calls[0][0]  # it went on
    assert made == prepare(path, **{**options, "data_dir": tmp_path / "whole"})
    calls.clear()
    with pytest.raises(DataError):
        prepare(path, progress=full_disk, **options)
    path.write_bytes(LINES + b'{"text": "one more"}\n')
    assert prepare(path, **options).train.documents + prepare(path, **options).val.documents == 301


def tokenizer_json(path: Path, extra: int = 0) -> None:
    """GPT-2's first 1,000 merges as a Hugging Face tokenizer, with `extra` further words."""
    ours = get_tokenizer("gpt2-1256")
    # As GPT-2 published it: printable bytes stand for themselves, the others for the letters from 256 on, in order.
    plain = {b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or b >= 174}
    others = [b for b in range(256) if b not in plain]
    table = {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}
    assert set(table.values()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    spelled = ["".join(table[b] for b in ours.token_bytes(i)) for i in range(ours.eot)]
    ranks = {word: i for i, word in enumerate(spelled)}
    merges = []
    for word in spelled[256:]:  # what the earlier merges make of it are the two parts that its own joins
        parts = list(word)
        while len(parts) > 2:
            rank = [ranks.get(a + b, 10**9) for a, b in pairwise(parts)]
            i = rank.index(min(rank))
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        merges.append((parts[0], parts[1]))
    vocabulary = ranks | {f"extra{i}": len(ranks) + 1 + i for i in range(extra)} | {"<|endoftext|>": len(ranks)}
    model = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, merges))
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(GPT2_PATTERN.replace("++", "+")), "isolated")
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([split, byte_level])
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens(["<|endoftext|>"])
    model.save(str(path))


def test_a_tokenizer_json_gives_its_librarys_tokens(tmp_path: Path) -> None:
    tokenizer_json(tmp_path / "t.json")
    mine, ours = get_tokenizer(str(tmp_path / "t.json")), get_tokenizer("gpt2-1256")
    library = tokenizers.Tokenizer.from_file(str(tmp_path / "t.json"))
    text = prose(200) + "<|endoftext|> half \ud83d pair"
    assert mine.encode(prose(200)).tolist() == library.encode(prose(200)).ids == ours.encode(prose(200)).tolist()
    assert mine.encode(text).tolist() == ours.encode(text).tolist()  # special tokens in a text are text
    assert (mine.eot, mine.V, mine.encode("a").dtype) == (1256, 1257, np.uint16)
    assert [mine.token_bytes(i) for i in range(1257)] == [ours.token_bytes(i) for i in range(1257)]
    assert mine.decode(mine.encode(prose(9))) == prose(9)


def test_uint32_shards_and_the_tokenizers_way_through_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tokenizer_json(tmp_path / "t.json", extra=70_000)
    (tmp_path / "a.txt").write_text(prose(3000))
    assert main(["prepare", "a.txt", "--tokenizer", "t.json", "--name", "a"]) == 0
    data = (tmp_path / "data/a/a_train_000000.bin").read_bytes()
    magic, version, count = struct.unpack_from("<3i", data)
    assert (magic, version, len(data)) == (20240801, 7, 1024 + 4 * count)
    mine = get_tokenizer("t.json")
    assert mine.V == 71_257
    tokens = struct.unpack_from(f"<{count}I", data, 1024)
    train = mine.decode(tokens[1:])
    assert train == prose(3000)[: len(train)]
    assert len(train) > 0.9 * len(prose(3000))
    shard = read_header("data/a/a_train_000000.bin")
    assert open_shard(shard)[:5].tolist() == list(tokens[:5])
    inputs, targets = Loader([shard], 16, shuffle=False, V=mine.V).batch(0, 2)
    assert (inputs.dtype, inputs[1].tolist()) == (np.uint32, list(tokens[16:32]))
    assert (targets.dtype, targets[1].tolist()) == (np.uint32, list(tokens[17:33]))
    assert open_dataset("a").tokenizer_name == mine.name
    (tmp_path / "t.json").unlink()
    small = ["--model.L", "1", "--model.C", "8", "--model.NH", "1", "--model.max_T", "16", "--model.V", "71257"]
    assert main(["train", "d6", *small, "--data", "a", "--name", "r", "--steps", "1", "--eval.tokens", "64",
                 "--eval.sample_tokens", "3"]) == 0  # fmt: skip
    _, tokenizer = Run("runs/r").load_engine()
    assert (tokenizer.name, tokenizer.fingerprint) == (mine.name, mine.fingerprint)
    (tmp_path / "runs/r/tokenizer.json").write_text(mine.source.replace("extra7", "extra_7"))
    with pytest.raises((DataError, ConfigError), match="bring the old file back"):
        Run("runs/r").load_engine()


def test_losses_do_not_depend_on_the_width_of_the_tokens(tmp_path: Path) -> None:
    ids = list(range(40, 90))
    wide, narrow = tmp_path / "w.bin", tmp_path / "n.bin"
    wide.write_bytes(struct.pack("<3i", 20240801, 7, 50).ljust(1024, b"\0") + struct.pack("<50I", *ids))
    narrow.write_bytes(struct.pack("<3i", 20240520, 1, 50).ljust(1024, b"\0") + struct.pack("<50H", *ids))
    engine = Engine(EngineSpec(GPT2Config(L=1, C=8, NH=1, max_T=16, V=100), B=2, T=16, train=False))
    losses = []
    for path in (wide, narrow):
        inputs, targets = map(torch.from_numpy, Loader([read_header(path)], 16, seed=1, V=100).batch(0, 2))
        losses.append(engine.eval_losses(inputs, targets).clone())
    assert torch.equal(*losses)


def test_what_a_tokenizer_json_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(DataError, match=r"bad.json is not a Hugging Face tokenizer"):
        get_tokenizer(str(tmp_path / "bad.json"))
    with pytest.raises(ConfigError, match=r"tokenizer '.*none.json': there is no such file; .*give that name"):
        get_tokenizer(str(tmp_path / "none.json"))
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0}, unk_token="a"))
    model.save(str(tmp_path / "plain.json"))
    with pytest.raises(ConfigError, match="has no token that could start a document"):
        get_tokenizer(str(tmp_path / "plain.json"))


HOSTILE = [r"(a+)+$", r"(?:\s*x)*y", r"((?i:b*)c?)+", r"(\p{L}{2,})+!", r"(a(b(c+)d)e)*"]
HARMLESS = [GPT2_PATTERN, r"(?:a+)++b", r"(?>a+)+b", r"[(+)]+", r"\(a+\)+", r"(?=(\d{3})+(?!\d))", r"(?:ab?)+",
            r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"]  # fmt: skip


def test_patterns_that_take_for_ever_and_dropout_are_refused(tmp_path: Path) -> None:
    """Wherever in the file a pattern stands; what models in use have is taken."""
    tokenizer_json(tmp_path / "t.json")
    plain = json.loads((tmp_path / "t.json").read_text())

    def load(spec: dict) -> None:
        (tmp_path / "u.json").write_text(json.dumps(spec))
        get_tokenizer(str(tmp_path / "u.json"))

    def split(pattern: str) -> dict:
        return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}

    for pattern in HARMLESS:
        load(plain | {"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split(pattern)]}})
    for pattern in HOSTILE:
        replace = {"type": "Replace", "pattern": {"Regex": pattern}, "content": " "}
        for part in ({"pre_tokenizer": split(pattern)}, {"normalizer": replace}):
            with pytest.raises(DataError, match=r"u.json has the pattern .* which repeats a repetition"):
                load(plain | part)
    with pytest.raises(ConfigError, match=r"model.dropout = 0.1, which encodes at random; set it to null"):
        load(plain | {"model": plain["model"] | {"dropout": 0.1}})
    load(plain | {"pre_tokenizer": split("(a|a)*$")})  # two ways for each letter, which the library gives up
    with pytest.raises(DataError, match=r"cannot encode 'aaaa.*retry-limit"):
        get_tokenizer(str(tmp_path / "u.json")).encode("a" * 40 + "b")


def test_bits_per_byte_of_a_tokenizer_that_loses_text(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A normalizer that takes all digits away: a run's bits per byte count the bytes of the documents."""
    monkeypatch.chdir(tmp_path)
    tokenizer_json(tmp_path / "t.json")
    spec = json.loads((tmp_path / "t.json").read_text())
    spec["normalizer"] = {"type": "Replace", "pattern": {"Regex": "[0-9]"}, "content": ""}
    (tmp_path / "t.json").write_text(json.dumps(spec))
    (tmp_path / "a.txt").write_text("".join(f"line {i}: some words\n" for i in range(900)))
    assert main(["prepare", "a.txt", "--tokenizer", "t.json", "--name", "a"]) == 0
    said = capsys.readouterr().err
    assert said.count("loses text") == 1
    assert "'0: some words\\nline 1' comes back as ': some words\\nline : '" in said
    dataset = open_dataset("a")
    assert dataset.manifest is not None
    val = dataset.manifest.val
    flags = ["--model.L", "1", "--model.C", "32", "--model.NH", "2", "--model.max_T", "16", "--batch.T", "16",
             "--batch.B", "4", "--batch.total_tokens", "64", "--run.device", "cpu",
             "--eval.tokens", "9999999"]  # fmt: skip
    assert main(["train", "d12", "--data", "a", "--name", "r", "--steps", "1", "--quiet", *flags]) == 0
    record = Run("runs/r").metrics("val")[-1]
    per_token = val.bytes / (val.tokens - val.documents)  # each token spells the same share of what is lost
    assert record["bpb"] == pytest.approx(record["loss"] / np.log(2) / per_token, rel=0.02)
    spelt = len("".join(c for c in (tmp_path / "a.txt").read_text()[-val.bytes :] if not c.isdigit()))
    assert val.bytes > 1.1 * spelt  # which would have been the wrong divisor
