"""`prepare --train-tokenizer`: a tokenizer made from the text, and what is prepared with it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import daybreak.data.train_tokenizer as train_tokenizer
from daybreak.cli.main import main
from daybreak.data.dataset import open_dataset
from daybreak.data.shards import open_shard
from daybreak.data.tokenizer import get_tokenizer
from daybreak.data.train_tokenizer import trained
from daybreak.errors import ConfigError

pytest.importorskip("tokenizers", reason="the extra data installs tokenizers")
TEXT = "the thin thief thought that 12345 thistles are 678 thorns, isn't it?\n"


def test_merges_are_the_most_frequent_pairs() -> None:
    """By hand: in `th th th t` the pair t h comes first. Digits never join to more than two, nor words over a space."""
    spec = json.loads(trained([TEXT] * 50, 285))
    vocabulary = spec["model"]["vocab"]
    assert len(vocabulary) == 285
    assert {"<|endoftext|>", "th", "12", "34"} <= {*vocabulary}
    merges = [pair if isinstance(pair, list) else pair.split(" ") for pair in spec["model"]["merges"]]
    assert merges[0] == ["t", "h"]
    tokens = [token.replace("\u0120", " ") for token in vocabulary if token != "<|endoftext|>"]
    assert not [t for t in tokens if sum(c.isdigit() for c in t) > 2 or " " in t[1:]]
    assert trained([TEXT] * 50, 285) == trained(iter([TEXT] * 50), 285)


@pytest.mark.parametrize("V", [0, 256])
def test_too_few_ids(V: int) -> None:
    with pytest.raises(ConfigError, match=f"--train-tokenizer {V} must be 257 at least"):
        trained([TEXT], V)


def test_too_little_text() -> None:
    with pytest.raises(ConfigError, match=r"--train-tokenizer 5000: the text has pairs for \d+ ids only"):
        trained([TEXT], 5000)


def test_only_the_beginning_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_tokenizer, "CHARACTERS", 1000)
    assert trained([TEXT * 20, *["zqzqzq"] * 999], 275) == trained([TEXT * 20], 275)


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The set keeps its tokenizer, and its ids give the text back, also what no training text had. Again: the same."""
    monkeypatch.chdir(tmp_path)
    pages = [f"{TEXT * 3}page {i} \u00e9\u4e16\U0001f600" for i in range(60)]
    Path("pages.jsonl").write_text("\n".join(json.dumps({"text": page}) for page in pages))
    command = ["prepare", "pages.jsonl", "--train-tokenizer", "288", "--name", "p"]
    assert main(command) == 0
    assert "--model.V 288" in capsys.readouterr().out
    data = open_dataset("data/p")
    tokenizer = get_tokenizer(json.loads(Path("data/p/manifest.json").read_text())["tokenizer"], Path("data/p"))
    assert tokenizer.V == 288
    ids = open_shard(data.train[0]).tolist()
    assert ids[0] == tokenizer.eot
    texts = [tokenizer.decode(part) for part in _documents(ids, tokenizer.eot)]
    assert {*texts} <= {*pages}
    assert tokenizer.decode(tokenizer.encode("Zebra \u6771 77")) == "Zebra \u6771 77"
    before = {path.name: path.read_bytes() for path in Path("data/p").iterdir()}
    assert main(command) == 0
    assert {path.name: path.read_bytes() for path in Path("data/p").iterdir()} == before
    assert main([*command, "--tokenizer", "bytes"]) == 2
    assert "takes the place of --tokenizer" in capsys.readouterr().err
    for other in ("--as", "images"), ("--as", "chat"), ("--pretokenized", "1"):
        assert main([*command, *other]) == 2
        assert "--train-tokenizer is for text" in capsys.readouterr().err


def test_standard_input_cannot_be_read_twice(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It is refused before it is read. Without the rule, the second reading found no file."""
    assert main(["prepare", "-", "--name", "p", "--train-tokenizer", "288", "--data-dir", str(tmp_path)]) == 2
    said = "--train-tokenizer 288 reads the text twice, and standard input can be read once; write the text to a file"
    assert capsys.readouterr().err == f"daybreak: {said}, and prepare that.\n"


def _documents(ids: list[int], eot: int) -> list[list[int]]:
    found: list[list[int]] = []
    for i in ids:
        if i == eot:
            found.append([])
        else:
            found[-1].append(i)
    return found
