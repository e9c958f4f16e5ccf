"""Validation: which tokens a budget is, and bits per byte, both by hand."""

from __future__ import annotations

import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from test_loader import Masked, write_shard

import daybreak
from daybreak.cli.eval import _print
from daybreak.cli.main import main
from daybreak.data.loader import Loader
from daybreak.data.mixing import MixLoader
from daybreak.data.tokenizer import get_tokenizer
from daybreak.evaluate.harness import Score
from daybreak.evaluate.validation import validate


class Bits:
    """An engine whose token k costs bits[k] bits, whatever comes before it; it remembers what it was asked."""

    def __init__(self, B: int, T: int, bits: dict[int, float] | None = None) -> None:
        self.B, self.T, self.bits, self.targets = B, T, bits or {}, list[int]()

    def eval_losses(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        assert tokens.shape[0] <= self.B
        assert tokens.shape[1] == self.T
        self.targets += targets.flatten().tolist()
        costs = [[self.bits.get(t, 0.0) * math.log(2) for t in row] for row in targets.tolist()]  # 0 for -1
        return torch.tensor(costs, dtype=torch.float64)


def mixture(folder: Path, T: int, sizes: tuple[int, ...], weights: tuple[float, ...]) -> MixLoader:
    """Source s holds the tokens 10,000 s, 10,000 s + 1, ..."""
    shards = [write_shard(folder / f"{s}.bin", range(10_000 * s, 10_000 * s + n)) for s, n in enumerate(sizes)]
    return MixLoader([Loader([shard], T, shuffle=False, V=50257) for shard in shards], weights, 0, shuffle=False)


@pytest.mark.parametrize(
    ("budget", "sizes", "tokens"),
    [
        (2000, (5000, 5000, 5000), (1400, 400, 200)),  # weights 7, 2, 1
        (2001, (9999, 9999, 9999), (1400, 400, 200)),
        (9999, (5000, 101, 5000), (336, 96, 48)),  # the second is too small: no source is more than its share
        (1, (500, 500, 500), (1, 1, 1)),  # at least a sample of each
    ],
)
def test_a_mixtures_budget_is_the_same_tokens_whatever_B_and_T(
    tmp_path: Path, budget: int, sizes: tuple[int, ...], tokens: tuple[int, ...]
) -> None:
    seen = {}
    for B, T in ((1, 16), (4, 16), (3, 32)):
        engine = Bits(B, T)
        lengths = np.zeros(50257, np.int64)
        found = validate(engine, mixture(tmp_path, T, sizes, (7, 2, 1)), lengths, budget)  # type: ignore[arg-type]
        assert found.tokens == len(engine.targets)
        counts = Counter(token // 10_000 for token in engine.targets)
        for s, wanted in enumerate(tokens):
            assert abs(counts[s] - wanted) <= T
            mine = sorted(token for token in engine.targets if token // 10_000 == s)
            assert mine == list(range(10_000 * s + 1, 10_000 * s + 1 + counts[s]))  # from the source's beginning
        seen[B, T] = sorted(engine.targets)
    assert seen[1, 16] == seen[4, 16]


def test_ranks_share_the_same_samples_out(tmp_path: Path) -> None:
    mix, lengths, seen = mixture(tmp_path, 16, (5000, 5000), (2, 1)), np.zeros(50257, np.int64), list[int]()
    for rank in range(3):
        engine, group = Bits(4, 16), SimpleNamespace(rank=rank, world=3, numbers=lambda values: values)
        validate(engine, mix, lengths, 3000, group=group)  # type: ignore[arg-type]
        seen += engine.targets
    alone = Bits(4, 16)
    validate(alone, mix, lengths, 3000)  # type: ignore[arg-type]
    assert sorted(seen) == sorted(alone.targets)


def test_bits_per_byte_by_hand(tmp_path: Path) -> None:
    # "Hello café 日本!" is Hello (5 bytes), " café" (6), and the 3 + 3 bytes of 日本 behind a space in five tokens
    # (2, 1, 1, 2, 1), "!" (1): 19 bytes. The second time its end of text costs 40 bits, which count for the loss alone.
    tokenizer = get_tokenizer("gpt2")
    ids = [15496, 40304, 10545, 245, 98, 17312, 105, 0]
    assert tokenizer.encode("Hello café 日本!").tolist() == ids
    bits = dict(zip(ids, (9.0, 20.0, 7.0, 3.0, 1.0, 8.0, 2.0, 0.5), strict=True)) | {50256: 40.0}
    stream = [50256, *ids, 50256, *ids]
    loader = Loader([write_shard(tmp_path / "a.bin", stream)], 17, shuffle=False, V=50257)
    lengths = tokenizer.lengths(50304)
    assert [int(lengths[token]) for token in (*ids, 50256, 50300)] == [5, 6, 2, 1, 1, 2, 1, 1, 0, 0]
    found = validate(Bits(1, 17, bits), loader, lengths, 17)  # type: ignore[arg-type]
    assert found.bits_per_byte == pytest.approx(2 * 50.5 / (2 * 19), rel=1e-12)
    assert found.loss == pytest.approx((2 * 50.5 + 40) / 17 * math.log(2), rel=1e-12)
    nothing = Loader([write_shard(tmp_path / "b.bin", [50256] * 18)], 17, shuffle=False, V=50257)
    assert math.isnan(validate(Bits(1, 17, bits), nothing, lengths, 17).bits_per_byte)  # type: ignore[arg-type]
    # A mask that leaves the multiples of 5: 10545, 245, 105 and 0, of 2 + 1 + 1 + 1 bytes and 12.5 bits. Places of -1
    # have no length, whatever the last token of the vocabulary is.
    loader, nothing = (Masked(x.shards, 17, shuffle=False, V=50257) for x in (loader, nothing))
    loader.divisor = nothing.divisor = 5
    lengths[-1] = 99
    found = validate(Bits(1, 17, bits), loader, lengths, 17)  # type: ignore[arg-type]
    assert found.tokens == 8
    assert found.bits_per_byte == pytest.approx(2 * 12.5 / (2 * 5), rel=1e-12)
    assert found.loss == pytest.approx(2 * 12.5 / 8 * math.log(2), rel=1e-12)
    found = validate(Bits(1, 17, bits), nothing, lengths, 17)  # type: ignore[arg-type]
    assert found.tokens == 0
    assert math.isnan(found.loss)


def test_text_and_pictures_apart_by_hand(tmp_path: Path) -> None:
    # 4 codes from 257 on, then the marks 261 and 262: "A", mark, two codes, mark; and once more without the text.
    tokenizer = get_tokenizer("bytes").with_pictures("0" * 64, 4, 2, 6)
    bits = {256: 40.0, 65: 3.0, 261: 1.0, 257: 5.0, 260: 8.0, 262: 2.0}
    stream = [256, 65, 261, 257, 260, 262, 256, 256, 261, 260, 260, 262, 256]
    loader = Loader([write_shard(tmp_path / "a.bin", stream)], 12, shuffle=False, V=263)
    lengths = tokenizer.lengths(263)
    found = validate(Bits(1, 12, bits), loader, lengths, 12, pictures=tokenizer.pictures)  # type: ignore[arg-type]
    assert found.text == pytest.approx(3 * math.log(2), rel=1e-12)
    assert found.image == pytest.approx((5 + 3 * 8) / 4 * math.log(2), rel=1e-12)
    assert found.bits_per_byte == pytest.approx(3, rel=1e-12)
    assert found.loss == pytest.approx((3 * 40 + 3 + 2 * 1 + 5 + 3 * 8 + 2 * 2) / 12 * math.log(2), rel=1e-12)
    plain = validate(Bits(1, 12, bits), loader, lengths, 12)  # type: ignore[arg-type]
    assert plain.loss == found.loss
    assert math.isnan(plain.text)
    assert math.isnan(plain.image)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_score_that_is_not_finite_is_null_in_json(capsys, value: float) -> None:
    """As in train's result. Of two scores the second is one that JSON has."""
    _print([Score("b", "loss", value, 3, 0), Score("b", "bits", 0.5, 3, 0)], True, 64)
    odd = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert odd == [
        {"task": "b", "metric": "loss", "value": None, "examples": 3, "shots": 0},
        {"task": "b", "metric": "bits", "value": 0.5, "examples": 3, "shots": 0},
    ]


def test_a_run_scores_on_another_data_set_as_training_would(tmp_path: Path, monkeypatch, capsys) -> None:
    """The loss of `eval --data` is what a run that validates on that set reports for the same weights."""
    monkeypatch.chdir(tmp_path)
    for name, word in (("a", "spam and eggs. "), ("b", "ham and toast! ")):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(f"{i} {word * 40}" for i in range(60)))
        assert main(["prepare", f"{name}.txt", "--tokenizer", "bytes"]) == 0
    shape = ["--model.L", "1", "--model.C", "32", "--model.NH", "2", "--model.max_T", "64", "--model.V", "257"]
    quick = ["--run.device", "cpu", "--eval.tokens", "1024", "--eval.sample_tokens", "0", "--quiet"]
    assert main(["train", "d12", "--data", "a-bytes", "--name", "r", "--steps", "3", *shape, *quick]) == 0
    assert "model.V" not in capsys.readouterr().err
    assert main(["train", "d12", "--data", "a-bytes", "--name", "t", "--steps", "1", *shape[:-1], "515", *quick]) == 0
    assert "model.V = 515, but the data has 257 tokens: with --model.V 257 the model is" in capsys.readouterr().err
    args = ["train", "d12", "--data", "b-bytes", "--name", "s", "--init-from", "runs/r", "--steps", "1"]
    assert main([*args, *shape, *quick]) == 0
    wanted = daybreak.load("runs/s").metrics("val")[0]  # before its first step
    capsys.readouterr()
    assert main(["eval", "runs/r", "--data", "b-bytes", "--json"]) == 0
    loss, bits = json.loads(capsys.readouterr().out)
    assert (loss["task"], loss["examples"]) == ("b-bytes", wanted["tokens_evaluated"] // 64)
    assert loss["value"] == pytest.approx(wanted["loss"], rel=1e-6)
    assert bits["value"] == pytest.approx(wanted["bpb"], rel=1e-6)
    assert main(["prepare", "a.txt", "--tokenizer", "gpt2"]) == 0
    assert main(["eval", "runs/r", "--data", "data/a"]) == 4
    assert "was trained with tokenizer 'bytes', and data set 'a' is made with 'gpt2';" in capsys.readouterr().err
    assert main(["prepare", "b.txt", "--tokenizer", "gpt2"]) == 0
    assert main(["eval", "runs/r", "--data", "b"]) == 0  # as `train --data b` would: the run's tokenizer decides
    said = capsys.readouterr()
    assert said.err.count("data/b exists too; using data/b-bytes, which has this run's tokenizer.") == 1
    last = [line.split() for line in said.out.splitlines()[-2:]]
    assert [(words[0], words[-6], words[-5], " ".join(words[-4:])) for words in last] == [
        ("b", f"{value:.4f}", str(loss["examples"]), "sequences of 64 tokens")
        for value in (loss["value"], bits["value"])
    ]
    (tmp_path / "c.txt").write_text("an odd line\n" * 30)
    assert main(["prepare", "c.txt", "--tokenizer", "bytes"]) == 0
    assert main(["eval", "runs/r", "--data", "c-bytes"]) == 4
    fix = "use more data, for validation a larger --val-fraction of prepare, or a smaller --batch.T of train"
    assert f"{fix}, finetune or import.\n" in capsys.readouterr().err
    # Most of the text held out: the rest would be too small to train on, which scoring does not need.
    assert main(["prepare", "c.txt", "--tokenizer", "bytes", "--val-fraction", "0.9"]) == 0
    capsys.readouterr()
    assert main(["eval", "runs/r", "--data", "c-bytes"]) == 0
    assert capsys.readouterr().out.count("   5 sequences of 64 tokens\n") == 2
    assert main(["eval", "runs/r", "--data", "stdlib"]) == 4
    assert capsys.readouterr().err.endswith("make it with: daybreak prepare stdlib --tokenizer bytes\n")


@pytest.mark.parametrize("made", [["--tokenizer", "bytes"], ["--train-tokenizer", "288"]])
def test_shards_without_a_manifest_are_of_the_runs_tokenizer(tmp_path: Path, monkeypatch, capsys, made) -> None:
    """A folder of shards does not say its tokenizer. It was taken for GPT-2's, and so refused to other runs."""
    monkeypatch.chdir(tmp_path)
    text = "".join(f"{i * i} {'spam and eggs, ham and toast! '[i % 17 :]}\n" for i in range(600))
    (tmp_path / "a.txt").write_text(text)
    assert main(["prepare", "a.txt", "--name", "a", *made]) == 0
    shape = ["--model.L", "1", "--model.C", "32", "--model.NH", "2", "--model.max_T", "64", "--model.V", "288"]
    quick = ["--run.device", "cpu", "--eval.tokens", "256", "--eval.sample_tokens", "0", "--quiet"]
    assert main(["train", "d12", "--data", "a", "--name", "r", "--steps", "1", *shape, *quick]) == 0
    plain = tmp_path / "plain"
    plain.mkdir()
    for shard in Path("data/a").glob("*.bin"):
        (plain / shard.name).write_bytes(shard.read_bytes())
    capsys.readouterr()
    assert main(["eval", "runs/r", "--data", "a", "--json"]) == 0
    assert main(["eval", "runs/r", "--data", "plain", "--json"]) == 0
    assert main(["eval", "runs/r", "--data", "a=1,plain=1", "--json"]) == 0
    named, bare, both = (json.loads(line) for line in capsys.readouterr().out.splitlines())
    assert [score["value"] for score in bare] == [score["value"] for score in named]
    assert [score["value"] for score in both] == [pytest.approx(score["value"], abs=0.2) for score in named]
