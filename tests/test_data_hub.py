"""Data sets from a local server that speaks the Hub's protocol: configurations, faults, restarts, ready-made shards."""

from __future__ import annotations

import hashlib
import io
import json
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import COMMIT, Hub, serve
from test_prepare import prose, read_documents, read_split

from daybreak.cli.main import main
from daybreak.data import hub as client
from daybreak.data.dataset import open_dataset
from daybreak.data.prepare import prepare, pretokenized
from daybreak.errors import ConfigError, DataError


def parquet(texts: list[str], column: str = "text") -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.table({"id": list(range(len(texts))), column: texts}), out, row_group_size=100)
    return out.getvalue()


TEXTS = [f"document {i}\n{prose(i % 5, i)}" for i in range(600)]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    with serve() as found:
        monkeypatch.setenv("HF_ENDPOINT", found.url)
        monkeypatch.setattr(client, "WAIT", 0.01)
        parts = {f"sample/10BT/{k:03d}.parquet": parquet(TEXTS[200 * k : 200 * k + 200]) for k in range(3)}
        other = {"data/train.parquet": parquet(["t"], "body"), "data/validation.parquet": parquet(["v"], "body")}
        other["data/test.parquet"] = parquet(["never read"], "body")
        card = {"license": "odc-by", "configs": [
            {"config_name": "default", "data_files": [{"split": s, "path": f"data/{s}.parquet"} for s in
                                                      ("train", "validation", "test")]},
            {"config_name": "sample-10BT", "data_files": [{"split": "train", "path": "sample/10BT/*"}]},
        ]}  # fmt: skip
        found.add("org/web", {"README.md": b"# web", **parts, **other}, card)
        yield found


def test_a_configuration_is_streamed_and_checked(hub: Hub, tmp_path: Path) -> None:
    manifest = prepare("hf:org/web:sample-10BT", data_dir=tmp_path, tokenizer="bytes", val_fraction=0.05)
    assert (manifest.name, manifest.source) == ("web-sample-10BT-bytes", "hf:org/web:sample-10BT")
    assert (manifest.revision, manifest.licence) == (COMMIT, "odc-by")
    val, train = (read_documents(tmp_path / manifest.name, split, "bytes") for split in ("val", "train"))
    assert sorted(val + train) == sorted(TEXTS)
    assert 10 < len(val) < 60
    assert (manifest.train.documents, manifest.val.documents) == (len(train), len(val))
    assert manifest.train.bytes == sum(len(t.encode()) for t in train)
    assert sorted(p.suffix for p in (tmp_path / manifest.name).iterdir()) == [".bin", ".bin", ".json"]
    assert set(hub.gets) == {f"sample/10BT/{k:03d}.parquet" for k in range(3)}


def test_the_cards_splits_and_a_column(hub: Hub, tmp_path: Path) -> None:
    manifest = prepare("hf:org/web#body", data_dir=tmp_path, tokenizer="bytes")
    assert read_documents(tmp_path / manifest.name, "train", "bytes") == ["t"]
    assert read_documents(tmp_path / manifest.name, "val", "bytes") == ["v"]
    globbed = prepare("hf:org/web:sample/10BT/000*", data_dir=tmp_path, tokenizer="bytes", name="g")
    assert globbed.train.documents + globbed.val.documents == 200
    for spec, said in (
        ("hf:org/web:sample-99BT", "there is no configuration 'sample-99BT'; it has: default, sample-10BT"),
        ("hf:org/nowhere", "hf:org/nowhere cannot be listed at http://127"),
        ("hf:org/web:nothing/*.json.gz", "cannot be listed|has no .parquet"),
        ("hf:org/web#text", r"has no text column 'text' \(it has: 'id', 'body'\)"),
    ):
        with pytest.raises(DataError, match=said):
            prepare(spec, data_dir=tmp_path, name="x")
    with pytest.raises(ConfigError, match="must be one hf:owner/name"):
        prepare("hf:web", data_dir=tmp_path)


def lines(*texts: str) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def test_a_revision_and_a_token(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_secret"
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with pytest.raises(DataError, match=r"hf:org/web@v1.0 cannot be listed|hf:org/web cannot be listed.*HF_TOKEN"):
        prepare("hf:org/web@v1.0:sample-10BT", data_dir=tmp_path)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.asked.clear()
    manifest = prepare("hf:org/web@v1.0:sample-10BT", data_dir=tmp_path, tokenizer="bytes")
    assert (manifest.source, manifest.revision) == ("hf:org/web@v1.0:sample-10BT", COMMIT)
    assert hub.asked[0] == "/api/datasets/org/web/revision/v1.0"
    assert {path.split("/")[5] for path in hub.asked if "/resolve/" in path} == {COMMIT}  # that commit's files


@pytest.mark.parametrize(
    ("files", "train", "val"),
    [
        ("*.jsonl", ["a", "b", "v"], []),
        (["a.jsonl", "b.jsonl"], ["a", "b"], []),
        ({"train": "a.jsonl", "validation": "v.jsonl", "test": "b.jsonl"}, ["a"], ["v"]),
        ({"train": ["a.jsonl", "b.jsonl"], "valid": ["v.jsonl"]}, ["a", "b"], ["v"]),
        ([{"split": "train", "path": ["b.jsonl"]}, {"split": "val", "path": "v.jsonl"}], ["b"], ["v"]),
    ],
)
def test_every_way_a_card_lists_its_files(
    hub: Hub, tmp_path: Path, files: object, train: list[str], val: list[str]
) -> None:
    there = {f"en/{name}.jsonl": lines(f"{name} 1", f"{name} 2") for name in "abv"}
    config = {"config_name": "c", "data_dir": "en/", "data_files": files}
    hub.add("o/n", {**there, "a.jsonl": lines("not in the folder")}, {"configs": [config]})
    prepare("hf:o/n:c", data_dir=tmp_path, tokenizer="bytes", name="n")
    found = {split: read_documents(tmp_path / "n", split, "bytes") for split in ("train", "val")}
    if not val:  # of files without a split the first document is
        found["train"] = sorted(found["train"] + found["val"])
        found["val"] = []
    assert found == {
        "train": [f"{n} {i}" for n in train for i in (1, 2)],
        "val": [f"{n} {i}" for n in val for i in (1, 2)],
    }


def test_json_is_read_and_what_is_not_is_said(hub: Hub, tmp_path: Path) -> None:
    hub.add("o/json", {"data.json": lines("a", "b"), "dataset_infos.json": b"{}", "eval/data.json": lines("test")})
    prepare("hf:o/json", data_dir=tmp_path, tokenizer="bytes", name="j")
    assert read_documents(tmp_path / "j", "train", "bytes") == ["a"]
    assert read_documents(tmp_path / "j", "val", "bytes") == ["b"]
    hub.add("o/other", {"data.xml": b"<a/>"})
    with pytest.raises(DataError, match=r"hf:o/other has no \.parquet, \.jsonl, .* file among \*\*"):
        prepare("hf:o/other", data_dir=tmp_path)


def test_a_cards_pattern_is_matched_in_bounded_time(hub: Hub, tmp_path: Path) -> None:
    name = "a" * 60
    for glob, path, expected in (
        ("*a" * 30 + "b", name, False),
        ("**a" * 30 + "*", name, True),
        ("**/*.txt", "x.txt", True),
        ("**/*.txt", "a/b/x.txt", True),
        ("data/*.txt", "data/b/x.txt", False),
        ("data/**.txt", "data/b/x.txt", True),
        ("data/**/x?.txt", "data/b/c/x1.txt", True),
        ("a/**/b/*c*", "a/1/b/2/b/xcx", True),
        ("a/**/b/*c*", "a/1/b/2/xcx", False),
        ("?", "/", False),
        ("x", "xy", False),
    ):
        assert client._matches(glob, path) is expected, (glob, path)
    config = {"config_name": "c", "data_files": "*a" * 600}
    hub.add("o/slow", {f"{name}.jsonl": lines("a", "b")}, {"configs": [config]})
    with pytest.raises(DataError, match=r"the card's file pattern .* is not a text of at most 1000"):
        prepare("hf:o/slow", data_dir=tmp_path)


@pytest.mark.parametrize(
    "faults", [["drop"], ["drop", "drop"], ["429"], ["500"], ["html"], ["short"], ["flip", "html"]]
)
def test_faults_on_the_way_are_overcome(hub: Hub, tmp_path: Path, faults: list[str]) -> None:
    hub.faults["sample/10BT/001.parquet"] = list(faults)
    manifest = prepare("hf:org/web:sample-10BT", data_dir=tmp_path, tokenizer="bytes")
    documents = [t for s in ("val", "train") for t in read_documents(tmp_path / manifest.name, s, "bytes")]
    assert sorted(documents) == sorted(TEXTS)
    assert hub.gets["sample/10BT/001.parquet"] == len(faults) + 1


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("html", "could not be downloaded in 2 attempts \\("),
        ("flip", "sha256 is not the one that the Hub lists"),
    ],
)
def test_what_stays_wrong_is_an_error_and_nothing_is_kept(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str, said: str
) -> None:
    monkeypatch.setattr(client, "ATTEMPTS", 2)
    hub.faults["sample/10BT/000.parquet"] = [fault] * 9
    with pytest.raises(DataError, match=said):
        prepare("hf:org/web:sample-10BT", data_dir=tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_not_the_networks_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Another try would end in the same way: the first one says what to install."""
    monkeypatch.chdir(tmp_path)
    for name in ("huggingface_hub", "huggingface_hub.file_download"):  # Python knows missing packages so
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["prepare", "tinyshakespeare"]) == 2
    said = capsys.readouterr().err
    assert "pip install -e '.[data]'" in said
    assert "trying again" not in said


def test_urls_with_a_range_and_without_sizes(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{hub.url}/datasets/org/web/resolve/main/sample/10BT/{{000..002}}.parquet"
    hub.faults["sample/10BT/000.parquet"] = ["html", "drop"]
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1000)  # our files are small
    manifest = prepare(url, data_dir=tmp_path, tokenizer="bytes", name="u")
    assert manifest.train.documents + manifest.val.documents == 600
    assert hub.ranges[0].startswith("bytes=")  # what had come was not asked for again
    with pytest.raises(DataError, match="cannot read files of this kind"):
        prepare(f"{hub.url}/page.html", data_dir=tmp_path)
    with pytest.raises(DataError, match=r"\{09\.\.03\} counts down"):
        prepare(f"{hub.url}/part-{{09..03}}.txt", data_dir=tmp_path)


def test_a_server_that_is_not_there_is_said_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Nothing listens at port 1. The library alone would try thirty times."""
    with pytest.raises(DataError) as error:
        prepare("http://127.0.0.1:1/part-{0..9}.txt", data_dir=tmp_path, name="u")
    assert str(error.value) == (
        "the server of http://127.0.0.1:1/part-0.txt cannot be reached ([Errno 111] Connection refused); check the "
        "address and the network, or download the file elsewhere and give its name here."
    )
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())


def test_a_server_that_goes_away_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """It answered once, so each attempt is told, in one line of ours."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    remote = client._url_file("http://127.0.0.1:1/a.txt")
    with pytest.raises(DataError, match=r"could not be downloaded in 5 attempts \(ConnectError: .*\); run the same"):
        client.download(remote, tmp_path)
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"{remote.name}: ConnectError: [Errno 111] Connection refused; trying again."
    ] * 4
    assert capfd.readouterr().err == ""


def test_killed_and_run_again_it_ends_in_the_same_bytes(hub: Hub, tmp_path: Path) -> None:
    argv = ["prepare", "hf:org/web:sample-10BT", "--tokenizer", "bytes", "--shard-tokens", "9000", "--name", "w",
            "--workers", "1", "--data-dir"]  # fmt: skip
    slow = """if True:
        import os, sys, time, daybreak.data.prepare as p, daybreak.cli.main as m
        p.UNIT, write, left = 4000, p.write_atomic, [int(os.environ["JOURNALS"])]
        def slowly(*args):
            write(*args)
            left[0] -= 1
            if not left[0]:
                print("here", flush=True)
                time.sleep(60)
        p.write_atomic = slowly
        sys.exit(m.main(sys.argv[1:]))
    """
    data, code = tmp_path / "killed", [sys.executable, "-c", slow]
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    assert subprocess.run([*code, *argv, str(tmp_path / "whole")], env=env | {"JOURNALS": "-1"}).returncode == 0
    kills = 0
    for journals in (1, 3, 2, -1):
        process = subprocess.Popen(
            [*code, *argv, str(data)], env=env | {"JOURNALS": str(journals)}, stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        if process.stdout.readline() == "here\n":
            process.send_signal(signal.SIGKILL)
            kills += 1
        process.communicate()
    assert (process.returncode, kills) == (0, 3)
    whole, again = (sorted((folder / "w").iterdir()) for folder in (tmp_path / "whole", data))
    assert [p.name for p in whole] == [p.name for p in again]
    assert all(a.read_bytes() == b.read_bytes() for a, b in zip(whole, again, strict=True))


def shard(tokens: list[int]) -> bytes:
    return struct.pack("<3i", 20240520, 1, len(tokens)).ljust(1024, b"\0") + struct.pack(f"<{len(tokens)}H", *tokens)


def test_ready_made_shards(hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokens = {f"edu_train_{i:06d}.bin": [50256, *range(100 * i, 100 * i + 50)] for i in range(1, 5)}
    tokens["edu_val_000000.bin"] = [50256, 15496, 995, 50256, 0]
    hub.add("karpathy/fineweb-edu-100B-gpt2-token-shards", {n: shard(t) for n, t in tokens.items()}, {"license": "mit"})
    hub.faults["edu_train_000002.bin"] = ["drop"]
    hub.faults["edu_val_000000.bin"] = ["flip"]
    assert main(["prepare", "fineweb-edu-100B", "--pretokenized", "3", "--data-dir", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "153 training and 5 validation tokens (gpt2)" in said.out
    assert "fineweb-edu-100B: 4 shards, 0.0 GB to download, " in said.err
    folder = tmp_path / "fineweb-edu-100B"
    assert read_split(folder, "train") == [t for i in (1, 2, 3) for t in tokens[f"edu_train_{i:06d}.bin"]]
    manifest = open_dataset("fineweb-edu-100B", tmp_path).manifest
    assert manifest is not None
    assert (manifest.val.documents, manifest.val.bytes) == (2, len("Hello world!"))
    assert manifest.train.shards[0].sha256 == hashlib.sha256(shard(tokens["edu_train_000001.bin"])).hexdigest()
    assert hub.gets["edu_train_000004.bin"] == 0

    before = hub.gets.copy()  # killed before the end: what is there is not downloaded again
    work = tmp_path / ".fineweb-edu-100B.tmp"
    folder.rename(work)
    (work / "manifest.json").unlink()
    (work / "fineweb-edu-100B_train_000001.bin").unlink()
    identity = ["karpathy/fineweb-edu-100B-gpt2-token-shards", COMMIT, "fineweb-edu-100B"]
    seal = hashlib.sha256(json.dumps({"identity": identity}).encode()).hexdigest()
    (work / "journal.json").write_text(json.dumps({"identity": identity, "checksum": seal}))
    assert pretokenized("fineweb-edu-100B", 3, data_dir=tmp_path) == manifest
    assert hub.gets - before == {"edu_train_000002.bin": 1}


def test_ready_made_shards_that_are_none(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = np.zeros(2000, np.uint8).tobytes()
    hub.add("o/bad", {"x_train_000001.bin": bad, "x_val_000000.bin": shard([1, 2])})
    with pytest.raises(DataError, match="is not a GPT-2 token shard: magic number 0"):
        pretokenized("hf:o/bad", data_dir=tmp_path)
    hub.add("o/none", {"x_train_000001.bin": shard([1, 2])})
    with pytest.raises(DataError, match=r"has no \*train\*.bin and \*val\*.bin"):
        pretokenized("hf:o/none", data_dir=tmp_path)
    with pytest.raises(ConfigError, match="no ready-made shards of 'tinystories'; there are of fineweb-edu-100B"):
        pretokenized("tinystories", data_dir=tmp_path)
    for other in (["--tokenizer", "bytes"], ["--as", "chat"]):
        assert main(["prepare", "hf:o/none", "--pretokenized", *other, "--data-dir", str(tmp_path)]) == 2
        assert "--pretokenized downloads text in GPT-2's tokens; leave out --tokenizer" in capsys.readouterr().err
    hub.add("o/big", {"x_train_000001.bin": shard([1] * 500_000), "x_val_000000.bin": shard([1, 2])})
    with monkeypatch.context() as full:
        full.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"free": 1_000_000})())
        with pytest.raises(DataError, match=r"big needs 0.0 GB, 0.0 are free; ask for fewer shards"):
            pretokenized("hf:o/big", data_dir=tmp_path)
    assert hub.gets["x_train_000001.bin"] == 1  # that of o/bad
