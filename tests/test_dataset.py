"""open_dataset: prepared folders, other programs' shards, and what is refused; shards are laid out with struct."""

from __future__ import annotations

import json
import math
import shutil
import struct
from pathlib import Path

import pytest

from daybreak.data.dataset import Dataset, dataset_name, open_dataset, unigram_entropy
from daybreak.data.prepare import prepare
from daybreak.data.shards import ShardInfo
from daybreak.errors import ConfigError, DataError


def write_shard(path: Path, tokens: list[int]) -> ShardInfo:
    header = struct.pack("<3i", 20240520, 1, len(tokens)).ljust(1024, b"\0")
    path.write_bytes(header + struct.pack(f"<{len(tokens)}H", *tokens))
    return ShardInfo(path, len(tokens))


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text("The quick brown fox jumps over the lazy dog.\n" * 400)
    prepare(tmp_path / "a.txt", data_dir=tmp_path / "data", name="mine", tokenizer="bytes", shard_tokens=5000)
    return tmp_path / "data"


def test_open_by_name_and_by_path(prepared: Path) -> None:
    by_name = open_dataset("mine", prepared)
    assert by_name.name == "mine"
    assert by_name.tokenizer_name == "bytes"
    assert len(by_name.train) > 1
    assert (
        open_dataset(str(prepared / "mine"), "nowhere") == by_name == open_dataset("mine", prepared, tokenizer="bytes")
    )
    assert dataset_name("mine", "gpt2") == "mine"
    assert dataset_name("mine", "bytes") == "mine-bytes"


def test_open_unknown(prepared: Path) -> None:
    for name, tokenizer, message in (
        (
            "climbmix-bpe300",
            "",
            r"with: daybreak prepare 'https://[\w./-]+/shard_\{00000\.\.00169\}\.parquet' --name climbmix-bpe300 "
            r"--train-tokenizer 300 \(climbmix itself has many times the text that any recipe reads\)$",
        ),
        ("climbmix", "gpt2-1024", "00169}.parquet' --name climbmix --tokenizer gpt2-1024 "),
        ("openwebtext-bpe300", "", "prepare openwebtext --train-tokenizer 300 --name openwebtext-bpe300$"),
        ("mime", "", "no dataset 'mime' in .*; did you mean 'mine'.* daybreak prepare FILE --name mime$"),
        ("other", "bytes", r"\(it has mine\); .* daybreak prepare FILE --name other --tokenizer bytes$"),
        ("stdlib", "bytes", "daybreak prepare stdlib --tokenizer bytes$"),
        ("stdlib-gpt2-1024", "", "daybreak prepare stdlib --tokenizer gpt2-1024$"),
        ("fineweb-edu-100B", "gpt2", rf"in {prepared.resolve()} .* prepare fineweb-edu-100B --pretokenized N \("),
        ("fineweb-10B", "gpt2", "make it with: daybreak prepare fineweb-10B --pretokenized$"),
        ("fineweb-edu-100B", "bytes", "daybreak prepare fineweb-edu-100B --tokenizer bytes$"),
        (
            "mine",
            "gpt2",
            "made with tokenizer 'bytes', not 'gpt2'; give --data.tokenizer bytes --model.V 257 to train a",
        ),
    ):
        with pytest.raises(DataError, match=message):
            open_dataset(name, prepared, tokenizer=tokenizer)


def test_a_text_that_is_not_prepared_is_named_in_the_command(prepared: Path) -> None:
    text = prepared.parent / "a.txt"
    with pytest.raises(DataError, match=f"daybreak prepare {text} --tokenizer bytes$"):
        open_dataset(str(text), prepared, tokenizer="bytes")


def test_open_unknown_names_the_same_text_in_another_tokenizer(prepared: Path) -> None:
    text = (prepared.parent / "a.txt").rename(prepared.parent / "book.txt")
    prepare(text, data_dir=prepared, tokenizer="gpt2-1024")
    for tokenizer, made in (("", ""), ("gpt2", " --tokenizer gpt2"), ("bytes", " --tokenizer bytes")):
        with pytest.raises(DataError, match=rf"did you mean 'book-gpt2-1024'\? If not, .* --name book{made}$"):
            open_dataset("book", prepared, tokenizer=tokenizer)
    with pytest.raises(DataError, match=r"\(it has book-gpt2-1024, mine\);"):  # a part of the name is another text
        open_dataset("boo", prepared)


def test_open_damaged(prepared: Path) -> None:
    good = shutil.copytree(prepared / "mine", prepared / "good")
    manifest = json.loads((good / "manifest.json").read_text())
    first = manifest["train"]["shards"][0]["file"]

    def refuses(message: str) -> None:
        with pytest.raises(DataError, match=message):
            open_dataset("mine", prepared)
        shutil.rmtree(prepared / "mine")
        shutil.copytree(good, prepared / "mine")

    (prepared / "mine" / first).unlink()
    refuses(f"cannot read the token shard .*{first}")
    with (prepared / "mine" / first).open("ab") as file:
        file.write(b"\0\0")
    refuses("its header says 5000 tokens")
    write_shard(prepared / "mine" / first, [1, 2, 3])
    refuses("has 3 tokens in 1030 bytes, its manifest says 5000 in 11024")
    for text, message in (
        ("{", "is not JSON"),
        ("[]", "must be an object"),
        (json.dumps({k: v for k, v in manifest.items() if k != "val"}), "is not a dataset manifest: val is missing"),
        (json.dumps(manifest | {"format": 2}), "has format 2, newer than this daybreak reads"),
        (json.dumps(manifest | {"tokenizer_fingerprint": "0"}), "made with another tokenizer called 'bytes'"),
    ):
        (prepared / "mine" / "manifest.json").write_text(text)
        refuses(message)
    assert open_dataset("mine", prepared).manifest is not None


def test_open_shards_of_other_programs(tmp_path: Path) -> None:
    folder = tmp_path / "fineweb10B"
    folder.mkdir()
    for name, count in (("val_000000", 3), ("train_000001", 4), ("train_000002", 5)):
        write_shard(folder / f"fineweb_{name}.bin", [50256] * count)
    expected = [ShardInfo(folder / f"fineweb_train_00000{i}.bin", i + 3) for i in (1, 2)]
    pattern = str(folder / "fineweb_*.bin")
    globs = str(folder / "*train*.bin"), str(folder / "fineweb_val_000000.bin")
    for dataset in (open_dataset(str(folder)), open_dataset(pattern), open_dataset("any", "nowhere", *globs)):
        assert dataset.train == expected
        assert [shard.tokens for shard in dataset.val] == [3]
        assert dataset.manifest is None
        assert dataset.tokenizer_name == "gpt2"
    with pytest.raises(ConfigError, match=r"data\.train and data\.val must be given together"):
        open_dataset("any", train_glob=globs[0])
    with pytest.raises(DataError, match="no token shard matches"):
        open_dataset("any", train_glob=globs[0], val_glob=str(folder / "test*"))
    (folder / "fineweb_val_000000.bin").unlink()
    with pytest.raises(DataError, match=r"has no \*val\*\.bin file"):
        open_dataset(str(folder))


def test_unigram_entropy_by_hand(tmp_path: Path) -> None:
    train = [write_shard(tmp_path / "t0.bin", [256, 97, 97]), write_shard(tmp_path / "t1.bin", [98])]
    val = [write_shard(tmp_path / "v.bin", [256, 97, 99, 97])]
    # Counts plus one over 257 ids: EOT 2, a 3, b 2, the other 254 one each: 261 in all.
    expected = -(math.log(2 / 261) + 2 * math.log(3 / 261) + math.log(1 / 261)) / 4
    assert unigram_entropy(Dataset("d", train, val, "bytes", None)) == pytest.approx(expected, rel=1e-12)
    bad = [write_shard(tmp_path / "bad.bin", [300])]
    with pytest.raises(DataError, match=r"bad\.bin has token 300, outside the tokenizer's 257 ids"):
        unigram_entropy(Dataset("d", train, bad, "bytes", None))
