"""Mixtures by weight and BOS-aligned samples: exact counts, coverage, and order as a pure function."""

from __future__ import annotations

import json
import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from test_loader import Masked, rows, write_shard

from daybreak.cli.main import main
from daybreak.data.loader import Loader, document_starts
from daybreak.data.mixing import BLOCK, MixLoader, parse_mix, shares
from daybreak.errors import ConfigError


def loaders(folder: Path, sizes: list[int], T: int = 4) -> list[Loader]:
    """Source s holds the tokens 5000 s, 5000 s + 1, ..., so a sample tells its source and its place."""
    made = []
    for s, samples in enumerate(sizes):
        shard = write_shard(folder / f"s{s}.bin", range(5000 * s, 5000 * s + samples * T + 1))
        made.append(Loader([shard], T, seed=s, V=50257))
    return made


@pytest.mark.parametrize(
    ("weights", "expected"),
    [([1, 1], [512, 512]), ([0.7, 0.3], [717, 307]), ([1, 1, 1], [342, 341, 341]), ([1e6, 1], [1023, 1]),
     ([1e9, 1, 1], [1022, 1, 1]), ([3], [1024])],
)  # fmt: skip
def test_shares_of_a_block(weights: list[float], expected: list[int]) -> None:
    assert shares(weights) == expected


def test_a_mixture_is_exact_covers_its_sources_and_does_not_depend_on_its_cuts(tmp_path: Path) -> None:
    sources = loaders(tmp_path, [1000, 400, 37])
    mix = MixLoader(sources, [0.6, 0.3, 0.1], seed=7)
    assert mix.shares == [615, 307, 102]
    n = 3 * BLOCK
    batch = rows(mix, 0, n)
    of = batch[:, 0] // 5000
    assert Counter(of.tolist()) == {0: 3 * 615, 1: 3 * 307, 2: 3 * 102}
    for block in range(3):
        assert np.bincount(of[block * BLOCK : (block + 1) * BLOCK]).tolist() == mix.shares
    for k in (0, 1, 500, 1024, 1025, n):  # counts at any point
        assert mix.counts(k) == [int((of[:k] == s).sum()) for s in range(3)]
    for s, loader in enumerate(sources):  # within a source its own order: every epoch covers it exactly
        mine = batch[of == s]
        assert (mine == rows(loader, 0, len(mine))).all()
        for epoch in range(len(mine) // loader.samples_per_epoch):
            seen = mine[epoch * loader.samples_per_epoch : (epoch + 1) * loader.samples_per_epoch, 0]
            assert len(set(seen.tolist())) == loader.samples_per_epoch
    rng = np.random.default_rng(0)
    for _ in range(30):
        first, count = int(rng.integers(0, n - 300)), int(rng.integers(0, 300))
        assert (rows(mix, first, count) == batch[first : first + count]).all()
    again, other = (MixLoader(sources, [6, 3, 1], seed=seed) for seed in (7, 8))
    assert (rows(again, 0, 200) == batch[:200]).all()
    assert (rows(other, 0, 200) // 5000 != batch[:200] // 5000).any()
    assert abs(np.corrcoef(of[:-1] == 0, of[1:] == 0)[0, 1]) < 0.1  # no pattern from place to place
    # The epoch ends when the first source has been read once: 37 samples at 102 a block.
    assert mix.samples_per_epoch == 37 * BLOCK // 102
    assert mix.fingerprint == again.fingerprint != MixLoader(sources, [5, 3, 2], seed=7).fingerprint


def test_a_mixture_keeps_the_mask_of_each_source(tmp_path: Path) -> None:
    plain, other = loaders(tmp_path, [1000, 400])
    masked = Masked(other.shards, 4, seed=1, V=50257)
    masked.target_dtype = np.dtype(np.int64)
    mix, both = MixLoader([plain, masked], [0.6, 0.4], seed=7), MixLoader([plain, other], [0.6, 0.4], seed=7)
    tokens, targets = mix.batch(3, 1500)
    assert (tokens == both.batch(3, 1500)[0]).all()
    want = both.batch(3, 1500)[1].astype(np.int64)
    want[(want >= 5000) & (want % 3 > 0)] = -1
    assert (targets == want).all()
    assert (mix.batch(903, 7)[1] == want[900:907]).all()


def test_names_of_mixtures() -> None:
    assert parse_mix("a=0.7,b=.3") == [("a", 0.7), ("b", 0.3)]
    assert parse_mix("fineweb-10B") == parse_mix("shards/*_{a,b}.bin") == []
    for bad in ("a=0,b=1", "a=x", "=1", "a=1,b", "a=-1", "a,b"):
        with pytest.raises(ConfigError, match="must be NAME=WEIGHT,NAME=WEIGHT with weights above 0"):
            parse_mix(bad)


def greedy_starts(tokens: list[int], eot: int, T: int) -> list[int]:
    starts, place = [], 0
    while place + T < len(tokens):
        if tokens[place] == eot:
            starts.append(place)
            place += T
        else:
            place += 1
    return starts


def test_aligned_samples_start_documents_and_what_is_dropped_is_counted(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    T, eot, shards = 16, 999, []
    for s in range(3):
        tokens: list[int] = []
        while len(tokens) < 3000:
            tokens += [eot, *rng.integers(0, 900, int(rng.integers(1, 50))).tolist()]
        shards.append(write_shard(tmp_path / f"{s}.bin", tokens))
    loader = Loader(shards, T, seed=1, V=1000, eot=eot)
    wanted, covered = [], 0
    for shard in shards:
        data = list(struct.unpack(f"<{shard.tokens}H", shard.path.read_bytes()[1024:]))
        starts = greedy_starts(data, eot, T)
        assert document_starts(np.array(data), eot, T).tolist() == starts
        wanted += [data[i : i + T + 1] for i in starts]
        covered += len({i + k for i in starts for k in range(T + 1)})
    assert loader.samples_per_epoch == len(wanted)
    assert loader.dropped_tokens == sum(s.tokens for s in shards) - covered
    for epoch in range(2):
        batch = rows(loader, epoch * len(wanted), len(wanted))
        assert (batch[:, 0] == eot).all()
        assert sorted(batch.tolist()) == sorted(wanted)


def test_training_on_a_mixture_resumes_and_tells_its_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text("".join(f'{{"text": "{name} {i} {name * 40}"}}\n' for i in range(200)))
        assert main(["prepare", f"{name}.jsonl", "--tokenizer", "bytes", "--name", name]) == 0
    argv = ["train", "d6", "--model.L", "1", "--model.C", "8", "--model.NH", "1", "--model.max_T", "16",
            "--model.V", "257", "--data", "a=0.25,b=0.75", "--data.bos", "true", "--eval.tokens", "64",
            "--eval.sample_tokens", "1"]  # fmt: skip
    assert main([*argv, "--name", "whole", "--steps", "6"]) == 0
    assert main([*argv, "--name", "cut", "--steps", "3", "--optim.horizon", "6"]) == 0
    assert main(["train", "runs/cut", "--steps", "6"]) == 0
    ends = [tmp_path / "runs" / name / "checkpoints/step-00000006" for name in ("whole", "cut")]
    assert (ends[0] / "model.safetensors").read_bytes() == (ends[1] / "model.safetensors").read_bytes()
    said = capsys.readouterr().err
    data = json.loads((ends[0] / "manifest.json").read_text())["data"]
    samples = data["samples"]
    assert data["tokens"] == {"a": 16 * samples[0], "b": 16 * samples[1]}
    assert said.count(f"tokens in all: a {16 * samples[0]}, b {16 * samples[1]}\n") == 2  # cut said three steps' first
    assert sum(samples) == 24
    assert samples[0] < samples[1]
    assert main([*argv[:-6], "--data", "a=1,nothere=1", "--name", "x"]) == 4
    (tmp_path / "c.txt").write_text("some text\n" * 50)
    assert main(["prepare", "c.txt", "--name", "c"]) == 0
    assert main([*argv[:-6], "--data", "a=1,c=1", "--name", "x"]) == 4
    said = capsys.readouterr().err
    assert "were made with tokenizers 'bytes' and 'gpt2'; a mixture needs one" in said
    assert "prepare the text of 'c' with --tokenizer bytes." in said
