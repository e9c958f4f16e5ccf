"""Rows that documents fill by best fit, cut only where none fits: the packing, the loader, and a run that resumes."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import recovery

from daybreak.cli.main import main
from daybreak.data import packing
from daybreak.data.dataset import open_dataset
from daybreak.data.loader import Loader
from daybreak.data.packing import FittedLoader, fit_documents, pack
from daybreak.data.shards import read_header
from daybreak.errors import DataError

EOT, V = 256, 257


def by_hand(documents: list[list[int]], size: int) -> list[list[int]]:
    """nanochat's rule over all documents at once, token by token: from those that wait, the longest that fits goes
    first (the earliest of equals); if none fits, the shortest is cut. A row that is not full at the end is left out.
    Documents longer than a row count as equally long."""
    waiting, rows = list(documents), []
    while True:
        row: list[int] = []
        while len(row) < size:
            if not waiting:
                return rows
            lengths = [min(len(d), size) for d in waiting]
            fitting = [n for n in lengths if n <= size - len(row)]
            taken = waiting.pop(lengths.index(max(fitting) if fitting else min(lengths)))
            row += taken[: size - len(row)]
        rows.append(row)


def corpus(seed: int, count: int, longest: int) -> list[list[int]]:
    """Documents, each with EOT in front; some are that token alone."""
    rng = random.Random(seed)
    return [[EOT, *(rng.randrange(V - 1) for _ in range(rng.randrange(longest)))] for _ in range(count)]


def write(path: Path, documents: list[list[int]], head: tuple[int, ...] = ()) -> Path:
    recovery.write_shard(path, np.array([*head, *(token for d in documents for token in d)]))
    return path


@pytest.mark.parametrize(("seed", "longest", "size"), [(1, 12, 16), (2, 40, 16), (3, 17, 16), (4, 3, 9), (5, 90, 8)])
def test_packing_equals_the_rule_by_hand(seed: int, longest: int, size: int) -> None:
    documents = corpus(seed, 120, longest)
    rows = pack([len(d) for d in documents], size, crop=True)
    assert [[t for i in row for t in documents[i]][:size] for row in rows] == by_hand(documents, size)
    used = [i for row in rows for i in row]
    assert len(set(used)) == len(used)
    assert all(sum(len(documents[i]) for i in row[:-1]) < size for row in rows)  # only the last is cut


def test_without_crop_nothing_has_changed() -> None:
    assert pack([5, 4, 3, 3, 1], 8) == [[0, 2], [1, 3, 4]]
    assert pack([5, 4, 3, 3, 1], 8, crop=True) == [[0, 2], [1, 3, 4]]
    assert pack([5, 5, 5], 8, crop=True) == [[0, 1]]  # the third fills no row
    assert pack([20], 8, crop=True) == [[0]]
    assert pack([], 8, crop=True) == pack([3], 8, crop=True) == []


def test_the_loader_reads_these_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two shards, in windows of 40 documents. A shard may begin inside a document, which is left out."""
    monkeypatch.setattr(packing, "WINDOW", 40)
    each, T = [corpus(7, 100, 30), corpus(8, 70, 60)], 15
    shards = [read_header(write(tmp_path / f"x_train_{i}.bin", d, (1, 2, 3))) for i, d in enumerate(each)]
    want = [row for d in each for at in range(0, len(d), 40) for row in by_hand(d[at : at + 40], T + 1)]
    loader = FittedLoader(shards, T, 5, shuffle=False, V=V, eot=EOT)
    tokens, targets = loader.batch(0, len(want))
    assert np.concatenate([tokens, targets[:, -1:]], 1).tolist() == want
    assert (tokens[:, 1:] == targets[:, :-1]).all()
    assert (tokens[:, 0] == EOT).all()
    assert loader.samples_per_epoch == len(want)
    assert loader.dropped_tokens == sum(s.tokens for s in shards) - len(want) * (T + 1)


def test_the_order_depends_on_seed_and_step_alone(tmp_path: Path) -> None:
    shards = [read_header(write(tmp_path / "x.bin", corpus(9, 200, 30)))]
    loaders = [FittedLoader(shards, 15, seed, V=V, eot=EOT) for seed in (3, 3, 4)]
    n = loaders[0].samples_per_epoch
    whole = loaders[0].batch(0, 3 * n)[0]
    for first, count in ((2 * n + 5, 7), (0, 3), (n - 2, 4)):  # another process, in any order
        assert np.array_equal(loaders[1].batch(first, count)[0], whole[first : first + count])
    epochs = [sorted(map(tuple, whole[e * n : (e + 1) * n].tolist())) for e in range(3)]
    assert epochs[0] == epochs[1] == epochs[2]
    assert not np.array_equal(whole[:n], whole[n : 2 * n])
    assert not np.array_equal(whole[:n], loaders[2].batch(0, n)[0])


def test_it_drops_less_than_rows_that_are_not_packed(tmp_path: Path) -> None:
    """Documents of 180 tokens on average, log-normal as web pages are, in rows of 256."""
    rng = np.random.default_rng(1)
    documents = [[EOT, *[1] * int(n)] for n in rng.lognormal(4.8, 0.9, 2000)]
    shards = [read_header(write(tmp_path / "x.bin", documents))]
    fitted, plain = FittedLoader(shards, 255, V=V, eot=EOT), Loader(shards, 255, V=V, eot=EOT)
    shares = [loader.dropped_tokens / shards[0].tokens for loader in (fitted, plain)]
    assert shares == pytest.approx([0.254, 0.412], abs=0.01)


def test_a_token_outside_the_vocabulary_is_found_in_its_shard(tmp_path: Path) -> None:
    documents = [[EOT, *[1] * 9], [EOT, *[1] * 4, 300], [EOT, 1, 1, 1]]
    shard = read_header(write(tmp_path / "x.bin", documents))
    rows = fit_documents(np.array([t for d in documents for t in d]), EOT, 10)
    assert [x.tolist() for x in rows] == [[1, 3], [0, 10, 16], [10, 6, 4]]
    with pytest.raises(DataError, match=r"x.bin has token 300 at position 15, outside the vocabulary of 257"):
        FittedLoader([shard], 9, V=V, shuffle=False, eot=EOT).batch(0, 2)
    with pytest.raises(DataError, match=r"the data is too small: a sample needs T \+ 1 = 65 tokens"):
        FittedLoader([shard], 64, V=V, eot=EOT)


def test_a_run_on_such_rows_resumes_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{i} {"abc " * (i % 9)}"}}\n' for i in range(200)))
    assert main(["prepare", "a.jsonl", "--tokenizer", "bytes", "--name", "a"]) == 0
    argv = ["train", "d6", "--model.L", "1", "--model.C", "8", "--model.NH", "1", "--model.max_T", "16", "--model.V",
            "257", "--data", "a", "--data.best_fit", "true", "--eval.tokens", "64",
            "--eval.sample_tokens", "0"]  # fmt: skip
    assert main([*argv, "--name", "whole", "--steps", "4"]) == 0
    assert main([*argv, "--name", "cut", "--steps", "2", "--optim.horizon", "4"]) == 0
    assert main(["train", "runs/cut", "--steps", "4"]) == 0
    ends = [tmp_path / "runs" / name / "checkpoints/step-00000004" for name in ("whole", "cut")]
    assert (ends[0] / "model.safetensors").read_bytes() == (ends[1] / "model.safetensors").read_bytes()
    said = capsys.readouterr().err
    dropped = int(said.partition(" samples of 16 tokens an epoch, ")[2].partition(" tokens of cut documents unused")[0])
    assert "data.best_fit leaves out" not in said
    assert main([*argv, "--name", "short", "--steps", "1", "--batch.T", "4"]) == 0  # most documents are longer
    said = capsys.readouterr().err
    assert (
        "because many documents are longer than batch.T = 4; use a larger --batch.T, or --data.best_fit false" in said
    )
    tokens = sum(shard.tokens for shard in open_dataset("a").train)
    assert 0 < dropped < tokens / 2
