"""Packed rows: the packing, files written by hand from the specification, the loader, and runs on them."""

from __future__ import annotations

import hashlib
import json
import random
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import recovery
from hypothesis import given, settings
from hypothesis import strategies as st

import daybreak
from daybreak.data.dataset import Manifest, open_dataset
from daybreak.data.loader import Loader
from daybreak.data.mixing import MixLoader
from daybreak.data.packing import Example, PackedLoader, RowWriter, pack, read_examples
from daybreak.data.shards import read_header
from daybreak.errors import DataError

Examples = list[tuple[list[int], list[int]]]  # ids of each, and which are learned (0 or 1)


def write_packed(path: Path, rows: list[Examples], T: int, padding: int = 7) -> Path:
    """A shard of packed rows and its marks, by hand."""
    ids, marks = list[int](), list[int]()
    for row in rows:
        for tokens, learned in row:
            ids += tokens
            marks += [1, *(2 * bit for bit in learned[1:])]
        if left := -len(ids) % T:
            ids += [padding] * left
            marks += [1, *[0] * (left - 1)]
    recovery.write_shard(path, np.array(ids))
    header = struct.pack("<256i", 20261129, 1, len(ids), T, *[0] * 252)
    path.with_suffix(".marks").write_bytes(header + bytes(marks))
    return path


def expected(row: Examples, T: int) -> tuple[list[int], list[int], list[int]]:
    """Tokens, targets and positions of a row, token by token."""
    tokens, targets, positions = list[int](), list[int](), list[int]()
    for ids, learned in row:
        tokens += ids
        targets += [ids[i + 1] if learned[i + 1] else -1 for i in range(len(ids) - 1)] + [-1]
        positions += range(len(ids))
    left = T - len(tokens)
    return tokens + [7] * left, targets + [-1] * left, positions + list(range(left))


def drawn(rng: random.Random, T: int, count: int, V: int = recovery.V) -> list[Examples]:
    """Rows of random examples, the last answer of each learned."""
    rows = []
    for _ in range(count):
        row, room = list[tuple[list[int], list[int]]](), T
        while room > 4 and len(row) < 5:
            n = rng.randint(3, room)
            asked = rng.randint(1, n - 2)
            row.append(([rng.randrange(V) for _ in range(n)], [0] * asked + [1] * (n - asked)))
            room -= n
        rows.append(row)
    return rows


@settings(deadline=None, max_examples=200)
@given(st.integers(1, 40), st.data())
def test_every_example_is_in_one_row_and_fits(T: int, data: Any) -> None:
    lengths = data.draw(st.lists(st.integers(1, T), max_size=60))
    rows = pack(lengths, T)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in row) for row in rows]
    assert all(total <= T for total in sums)
    # Best fit decreasing opens a row only when no other has room: no two rows are at most half full.
    assert sum(2 * total <= T for total in sums) <= 1
    assert pack(lengths, T) == rows


def test_best_fit_takes_the_fullest_row_that_has_room() -> None:
    assert pack([6, 7, 3, 4, 1, 9], 10) == [[0, 3], [1, 2], [4, 5]]
    assert pack([], 10) == []
    assert pack([10] * 3, 10) == [[0], [1], [2]]


def test_packing_wastes_little(tmp_path: Path) -> None:
    """Of lengths as chats have them, 97 % of the rows are filled."""
    rng = random.Random(1)
    lengths = [min(int(rng.lognormvariate(5.3, 0.8)) + 8, 2048) for _ in range(8192)]
    rows = pack(lengths, 2048)
    assert sum(lengths) / (2048 * len(rows)) > 0.97


@pytest.mark.parametrize("width", [2, 4])
def test_the_writer_writes_what_the_specification_says(tmp_path: Path, width: int) -> None:
    """Rows in several shards, and the manifest's sums."""
    rows = drawn(random.Random(2), 16, 7)
    writer = RowWriter(tmp_path, "x_train", 16, width, 40, 7)  # two rows a shard
    for row in rows:
        for ids, learned in row:
            writer.add(Example(np.array(ids), np.array([0, *learned[1:]], bool), len(ids)))
    record = writer.finish()
    examples = [example for row in rows for example in row]
    packed = pack([len(ids) for ids, _ in examples], 16)
    assert record.documents == len(examples)
    assert record.bytes == sum(len(ids) for ids, _ in examples)
    assert record.tokens == 16 * len(packed)
    kind, found = ("<u2", list[int]()) if width == 2 else ("<u4", list[int]())
    marks = b""
    for shard in record.shards:
        path = tmp_path / shard.file
        data, side = path.read_bytes(), path.with_suffix(".marks").read_bytes()
        assert (hashlib.sha256(data).hexdigest(), hashlib.sha256(side).hexdigest()) == (shard.sha256, shard.marks)
        assert struct.unpack_from("<5i", side) == (20261129, 1, shard.tokens, 16, 0)
        assert shard.tokens in (32, 16)
        found += np.frombuffer(data[1024:], kind).tolist()
        marks += side[1024:]
    assert found == [t for row in packed for t in expected([examples[i] for i in row], 16)[0]]
    write_packed(tmp_path / "hand.bin", [[examples[i] for i in row] for row in packed], 16)
    assert marks == (tmp_path / "hand.marks").read_bytes()[1024:]


def test_a_batch_is_what_was_packed(tmp_path: Path) -> None:
    """Every row once an epoch, in the order of (seed, epoch); its tokens, targets and positions."""
    T, rows = 24, drawn(random.Random(3), 24, 11)
    shards = [
        read_header(write_packed(tmp_path / f"x_{i}.bin", part, T)) for i, part in enumerate((rows[:4], rows[4:]))
    ]
    plain = PackedLoader(shards, T, shuffle=False, V=recovery.V)
    assert (plain.samples_per_epoch, plain.dropped_tokens) == (11, 0)
    want = [np.array(x) for x in zip(*(expected(row, T) for row in rows), strict=True)]
    for got, whole in zip(plain.batch(0, 11), want, strict=True):
        assert np.array_equal(got, whole)
    shuffled = PackedLoader(shards, T, seed=5, V=recovery.V)
    epochs = [shuffled.batch(11 * e, 11) for e in range(3)]
    for batch in epochs:
        assert sorted(map(tuple, batch[0].tolist())) == sorted(map(tuple, want[0].tolist()))
    assert not np.array_equal(epochs[0][0], epochs[1][0])
    again = PackedLoader(shards, T, seed=5, V=recovery.V)
    for i in (0, 10, 11, 27):  # a pure function of the place: no matter what was asked for before
        assert all(np.array_equal(x[0], y[i % 11]) for x, y in zip(again.batch(i, 1), epochs[i // 11], strict=True))


def test_a_mixture_gives_positions_to_rows_of_text(tmp_path: Path) -> None:
    T = 16
    packed = PackedLoader([read_header(write_packed(tmp_path / "p.bin", drawn(random.Random(4), T, 30), T))], T, V=97)
    recovery.write_shard(tmp_path / "t.bin", np.arange(1000) % 97)
    text = Loader([read_header(tmp_path / "t.bin")], T, V=97)
    mix = MixLoader([packed, text], [0.5, 0.5], seed=1)
    assert mix.documents
    tokens, targets, positions = mix.batch(100, 40)
    of_text = (targets >= 0).all(1)
    assert 10 < of_text.sum() < 30
    assert (positions[of_text] == np.arange(T)).all()
    assert (np.diff(tokens[of_text].astype(int), axis=1) % 97 == 1).all()
    assert (positions[~of_text] != np.arange(T)).any(1).sum() > 5


def test_examples_are_read_back(tmp_path: Path) -> None:
    row: list[Examples] = [[([1, 2, 3, 4, 5, 6], [0, 0, 1, 1, 0, 1]), ([9, 8, 7], [0, 0, 1])]]
    shard = read_header(write_packed(tmp_path / "x.bin", row, 12))
    runs = [[(ids.tolist(), learned) for ids, learned in example] for example in read_examples([shard], 5)]
    assert runs == [
        [([1, 2], False), ([3, 4], True), ([5], False), ([6], True)],
        [([9, 8], False), ([7], True)],
    ]  # fmt: skip
    assert len(read_examples([shard], 1)) == 1


def damaged(path: Path) -> dict[str, bytes]:
    """Marks that do not fit, and the words of the message."""
    good = path.with_suffix(".marks").read_bytes()

    def header(*numbers: int) -> bytes:
        return struct.pack(f"<{len(numbers)}i", *numbers) + good[4 * len(numbers) :]

    return {
        "begins with 1, 1": header(1),
        "begins with 20261129, 2": header(20261129, 2),
        "is for 10 tokens": header(20261129, 1, 10),
        "in rows of 7": header(20261129, 1, 32, 7),
        "in rows of 0": header(20261129, 1, 32, 0),
        "has 1055 bytes": good[:-1],
        "has 100 bytes": good[:100],
    }


def test_marks_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    path = write_packed(tmp_path / "x.bin", drawn(random.Random(1), 16, 2), 16)
    for said, data in damaged(path).items():
        path.with_suffix(".marks").write_bytes(data)
        with pytest.raises(DataError, match=said):
            PackedLoader([read_header(path)], 16, V=97)
    recovery.write_shard(tmp_path / "y.bin", np.arange(100))
    write_packed(path, drawn(random.Random(1), 16, 2), 16)
    with pytest.raises(DataError, match=r"has rows of 16 and .* has no rows; train on shards of one kind"):
        PackedLoader([read_header(path), read_header(tmp_path / "y.bin")], 16, V=97)
    with pytest.raises(DataError, match=r"rows of 16 tokens, not of batch\.T = 8; use --batch\.T 16"):
        PackedLoader([read_header(path)], 8, V=97)


def make_set(folder: Path, T: int = 16) -> Path:
    """A folder of packed shards for `recovery.config`."""
    folder.mkdir()
    rng = random.Random(6)
    for name, count in (("x_train_0", 60), ("x_train_1", 30), ("x_val_0", 20)):
        write_packed(folder / f"{name}.bin", drawn(rng, T, count), T)
    return folder


def test_a_killed_run_resumes_bit_for_bit(tmp_path: Path) -> None:
    """kill -9 in the middle of a run on packed rows, across an epoch's end; the same bits as without."""
    shards = make_set(tmp_path / "shards")
    whole, killed = (
        recovery.config(shards, tmp_path / "runs", name, run__steps=60, batch__total_tokens=64, eval__every=20)
        for name in ("whole", "killed")
    )
    assert recovery.train([recovery.recipe(whole, tmp_path)])[0] == 0
    process = recovery.spawn([recovery.recipe(killed, tmp_path)])
    recovery.wait_for(tmp_path / "runs/killed", process, 23)
    process.kill()
    process.wait()
    if process.stderr:
        process.stderr.close()
    code, err = recovery.train([tmp_path / "runs/killed"])
    assert code == 0, err
    a, b = (daybreak.Run(tmp_path / "runs" / name) for name in ("whole", "killed"))
    assert len(a.metrics("step")) == 60
    assert a.config.data.packed
    recovery.assert_same(a, b)


def test_a_run_on_packed_rows_moves_between_ranks(tmp_path: Path) -> None:
    """2 ranks of ZeRO stage 2, then 1, then 2 of stage 1: the run of one process, in fp64."""
    shards = make_set(tmp_path / "shards")
    base = {"batch__total_tokens": 128, "batch__B": 1, "precision__compute": "fp64", "optim__horizon": 9}
    one, moved = (
        recovery.config(shards, tmp_path, name, run__steps=steps, **base) for name, steps in (("one", 9), ("moved", 3))
    )
    straight = daybreak.train(one)
    command = ["train", recovery.recipe(moved, tmp_path), "--parallel.zero", 2, "--quiet"]
    assert ranks.finish(ranks.start(2, command, tmp_path)) == [0, 0], ranks.said(tmp_path, 0)
    run = daybreak.load(tmp_path / "moved")
    daybreak.train(run.config.override({"run.steps": 6, "parallel.zero": 0}), resume=run.path)
    command = ["train", run.path, "--parallel.zero", 1, "--steps", 9, "--quiet"]
    assert ranks.finish(ranks.start(2, command, tmp_path)) == [0, 0], ranks.said(tmp_path, 0)
    for a, b in zip(straight.metrics("step"), run.metrics("step"), strict=True):
        assert (b["loss"], b["norm"]) == pytest.approx((a["loss"], a["norm"]), rel=1e-9)
    assert run.metrics("val")[-1]["loss"] == pytest.approx(straight.metrics("val")[-1]["loss"], rel=1e-9)


def test_the_loss_counts_learned_tokens_alone(tmp_path: Path) -> None:
    """Micro-steps of rows with few and with many learned tokens: the step's loss is the mean over all of them."""
    shards = make_set(tmp_path / "shards")
    first = {
        B: daybreak.train(
            recovery.config(shards, tmp_path / "runs", f"b{B}", run__steps=1, batch__B=B, batch__total_tokens=256)
        ).metrics("step")[0]["loss"]
        for B in (16, 4, 1)
    }
    assert first[4] == pytest.approx(first[16], rel=1e-6)
    assert first[1] == pytest.approx(first[16], rel=1e-6)


def test_a_set_that_lost_its_marks_is_refused(tmp_path: Path) -> None:
    """Its rows would be taken for text."""
    folder = make_set(tmp_path / "x")
    records: dict[str, Any] = {}
    for split in ("train", "val"):
        infos = [read_header(p) for p in sorted(folder.glob(f"*{split}*.bin"))]
        shards = [{"file": s.path.name, "tokens": s.tokens, "size": s.size, "sha256": "0", "marks": "0"} for s in infos]
        records[split] = {"tokens": sum(s.tokens for s in infos), "documents": 1, "bytes": 1, "shards": shards}
    from daybreak.data.tokenizer import get_tokenizer

    named = {"name": "x", "tokenizer": "bytes", "tokenizer_fingerprint": get_tokenizer("bytes").fingerprint}
    rest = {"source": "", "revision": "", "licence": ""}
    (folder / "manifest.json").write_text(json.dumps({"format": 1, **named, **rest, **records, "rows": 16}))
    found = open_dataset("x", tmp_path)
    assert isinstance(found.manifest, Manifest)
    assert found.manifest.rows == 16
    assert set(found.manifest.sums()) == {p.name for p in folder.glob("*.bin")} | {
        p.name for p in folder.glob("*.marks")
    }
    (folder / "x_train_1.marks").unlink()
    with pytest.raises(DataError, match=r"x_train_1\.bin has no \.marks file beside it"):
        open_dataset("x", tmp_path)
