"""The search for the fastest algorithms without a GPU: the library is torch in fp32, the clock what the test says."""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import gelu

from daybreak.errors import ConfigError
from daybreak.kernels.cuda import products, quack, tune
from daybreak.kernels.cuda.cublaslt import Algo
from daybreak.kernels.cuda.products import dense

CPU = torch.device("cpu")
KEYS = [
    dense("bf16", "tn", 24, 16, 40, "bias"),
    dense("bf16", "tn", 24, 16, 40, "bias", "add"),
    dense("bf16", "tn", 32, 16, 40, "gelu"),
    dense("bf16", "nn", 24, 16, 40, "dgelu"),
    dense("bf16", "nn", 24, 16, 40),
    dense("bf16", "nt", 24, 16, 40),
    dense("bf16", "nt", 24, 16, 40, mode="beta1"),
    dense("tf32", "tn", 24, 16, 40),
    dense("e4m3", "tn", 32, 16, 48, "bias", "add"),
    dense("e5m2", "tn", 32, 16, 48),
    dense("e5m2slow", "tn", 32, 16, 48, mode="beta1"),
]
TWIN = "bf16 tn m32 n16 k40 bias beta0"  # tuned beside the product with GELU, which may use it
SPEEDS = [4e-6, 1.9e-6, 2e-6, 3.99e-6]  # of algorithms 0, the first heuristic, to 3; 1 is wrong
sets: dict[int, tune.Operands] = {}  # by the address of A


class Library:
    """Plays `PreparedMatmul`: algorithm 1 forgets a column of what is summed."""

    def __init__(self, blas: object, key: products.Key) -> None:
        self.key = key

    def offered(self, count: int) -> list[SimpleNamespace]:
        if self.key.mode == "beta1":  # as if all were slow but the first, and that within GAIN
            return [SimpleNamespace(algo=number(i)) for i in (0, 3)]
        return [SimpleNamespace(algo=number(i)) for i in range(4)]

    def config(self, algo: Algo) -> str:
        return f"algo{algo.data[0]}"

    def launch(
        self, algo: Algo, a: int, b: int, c: int, d: int, bias: int, aux: int, work: int, stream: int, *scales: int
    ) -> int:
        x, key = sets[a], self.key
        assert list(scales) == ([] if x.scales is None else [scale.data_ptr() for scale in x.scales])
        assert bool(scales) == key.dtype.startswith("e")
        assert not any(scale % 16 for scale in scales)  # cuBLASLt refuses other addresses
        if algo.data[0] == 1:
            cut = (x.a.float() * (torch.arange(x.a.shape[1]) > 0)).to(x.a.dtype)
            x = tune.Operands(cut, x.b, x.c, x.d, x.bias, x.aux, x.scales)
        with tune.full_precision():
            first = tune.product(key, x)
        if key.epilogue == "gelu":
            x.aux.copy_(first)
            first = gelu(first, approximate="tanh")
        elif key.epilogue == "dgelu":
            first = torch.ops.aten.gelu_backward(first, x.aux.float(), approximate="tanh")
        (x.d if d == x.d.data_ptr() else x.aux).copy_(first)
        return 0

    def destroy(self) -> None:
        pass


def number(i: int) -> Algo:
    algo = Algo()
    algo.data[0] = i
    return algo


class Tools(tune.Search):
    """A search on the CPU."""

    def __init__(self) -> None:
        self.device, self.workspace, self.noise = CPU, torch.empty(8, dtype=torch.uint8), None
        self.blas = SimpleNamespace(gpu="A GPU", version=130100)  # type: ignore[assignment]
        self.busy = torch.ones(2, 2)
        self.noise_out = torch.empty_like(self.busy)
        self.quack = False

    def stream(self) -> int:
        return 0

    def heat(self, seconds: float) -> None:
        pass

    def measure(self, candidates, sets, s, rounds):
        for c in candidates:
            c.launch(sets[0])
            algo = (c.launch.__defaults__ or (None,))[0]
            c.seconds = SPEEDS[algo.data[0]] if algo is not None else 1.5e-6  # a matmul, then gelu


@pytest.fixture
def search(monkeypatch: pytest.MonkeyPatch):
    plain = tune.operands

    def operands(key: products.Key, device: torch.device) -> tune.Operands:
        x = plain(key, device)
        sets[x.a.data_ptr()] = x
        return x

    monkeypatch.setattr(tune, "operands", operands)
    monkeypatch.setattr(tune, "PreparedMatmul", Library)
    monkeypatch.setattr(tune, "Search", Tools)
    monkeypatch.setattr(tune, "variations", lambda plan, offered: [])
    monkeypatch.setattr(tune, "ROTATE", 0)
    monkeypatch.setattr(
        tune.cublaslt, "gelu_pass", lambda out, x: out.copy_(torch.nn.functional.gelu(x.float(), approximate="tanh"))
    )
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    torch.manual_seed(0)
    yield tune.search
    sets.clear()


def entries(path: Path) -> dict[str, Any]:
    return products.read_table(path, "A GPU", 130100)


def test_the_fastest_sound_algorithm_is_taken(search, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = search(KEYS, tmp_path / "new" / "tables")
    plans = entries(path)
    assert {*plans} == {*map(str, KEYS), TWIN}
    for text, entry in plans.items():
        assert entry["tflops"] >= entry["first_tflops"]
        if "gelu" in text and "dgelu" not in text:
            assert entry["separate"] is True
        else:
            assert entry["algo"] == bytes(number(0 if "beta1" in text else 2)).hex()
    said = capsys.readouterr().out
    assert said.count("refused: algo1: off by") == len(KEYS) - 2  # beta1 has none, before GELU it is too slow
    assert re.search(rf"^{len(KEYS) + 1} of {len(KEYS) + 1} matmuls, 0 from before, in \d+ s$", said, re.M)
    assert path.name == products.table_path("A GPU", 130100).name
    table = json.loads(path.read_text())
    older = {"fp32 nn m1 n1 k1 plain beta0": {"algo": "00" * 64}}
    path.write_text(json.dumps(table | {"plans": older}))
    tune.write(table, path.parent)
    assert entries(path) == plans | older


def measured(monkeypatch: pytest.MonkeyPatch, stop: int = 0) -> list[str]:
    """The keys that searches measure from now on, in their order. A person interrupts the one after `stop` keys."""
    done: list[str] = []
    plain = tune.Search.tune

    def one(self: tune.Search, key: products.Key, bias_entry: dict[str, Any] | None) -> dict[str, Any] | None:
        if stop and len(done) == stop:
            raise KeyboardInterrupt
        done.append(str(key))
        return plain(self, key, bias_entry)

    monkeypatch.setattr(tune.Search, "tune", one)
    return done


@pytest.mark.parametrize("stop", range(1, len(KEYS) + 1))
def test_a_stopped_search_goes_on(
    search, stop: int, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Each key is measured once, in the order of a search that nobody stops, and the table is that search's."""
    with monkeypatch.context() as m:
        order = measured(m)
        whole = entries(search(KEYS, tmp_path / "whole"))
    assert len(order) == len(KEYS) + 1
    with monkeypatch.context() as m:
        first = measured(m, stop)
        with pytest.raises(KeyboardInterrupt):
            search(KEYS, tmp_path)
    kept = tmp_path / products.table_path("A GPU", 130100).name
    assert {*entries(kept)} == {*first}
    said = rf"{stop} of {len(order)} matmuls, 0 from before, in \d+ s; the same command tries the others"
    assert re.fullmatch(said, capsys.readouterr().out.splitlines()[-1])
    with monkeypatch.context() as m:
        second = measured(m)
        assert search(KEYS, tmp_path) == kept
        assert first + second == order
        assert entries(kept) == whole
        before = kept.read_bytes()
        search(KEYS, tmp_path)  # nothing is left
        assert first + second == order
    assert kept.read_bytes() == before
    said = f"{len(order)} of {len(order)} matmuls, {len(order)} from before"
    assert capsys.readouterr().out.splitlines()[-1].startswith(said)
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == [kept.name]


def test_a_spent_budget_leaves_the_rest_to_the_next_search(
    search, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A clock that moves 100 s when it is read: a search measures two keys, and the next one the two after them."""
    clock = itertools.count(0, 100)
    monkeypatch.setattr(tune.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(tune, "BUDGET_S", 250.0)
    done, sizes = measured(monkeypatch), []
    for _ in range(6):
        sizes.append(len(entries(search(KEYS, tmp_path))))
    assert sizes == [2, 4, 6, 8, 10, 12]
    assert sorted(done) == sorted({*map(str, KEYS), TWIN})


def test_tables_of_several_searches_are_merged(search, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Another shape's products come beside the first one's. A table for another GPU is replaced, not mixed in."""
    done = measured(monkeypatch)
    search(KEYS[4:6], tmp_path)
    path = search(KEYS[3:5], tmp_path)
    assert sorted(done) == sorted(entries(path)) == sorted(map(str, KEYS[3:6]))
    table = json.loads(path.read_text())
    path.write_text(json.dumps(table | {"card": "Another GPU"}))
    assert {*entries(search(KEYS[:1], tmp_path))} == {str(KEYS[0])}
    path.write_text("{")
    with pytest.raises(ConfigError, match="remove it, and write it again with daybreak bench --tune"):
        search(KEYS, tmp_path)
    assert path.read_text() == "{"


def test_what_is_left_out_is_said(
    search, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(tune, "PRUNE", 1.0)
    monkeypatch.setattr(Library, "offered", lambda self, count: [SimpleNamespace(algo=number(1))])
    assert entries(search(KEYS[:1], tmp_path)) == {}
    assert "m24 n16 k40 bias beta0: no sound algorithm\n0 of 1 matmuls" in capsys.readouterr().out
    monkeypatch.setattr(tune, "BUDGET_S", -1.0)
    assert entries(search(KEYS[:1], tmp_path)) == {}
    assert "left out, the budget" in capsys.readouterr().out


@pytest.mark.parametrize(("speed", "taken"), [(1e-6, "256x160 shared 2x1"), (9e-6, "")])
def test_quacks_tile_is_named_where_it_is_faster(search, monkeypatch, tmp_path, speed: float, taken: str) -> None:
    """Beside the library's best algorithm, which stays in the table for machines without quack."""
    monkeypatch.setattr(tune, "PRUNE", 100.0)
    monkeypatch.setattr(f"{__name__}.SPEEDS", [*SPEEDS, speed])

    def tiles(self: tune.Search, key: products.Key, x: tune.Operands) -> list[tune.Candidate]:
        def launch(x: tune.Operands, algo: Algo = number(len(SPEEDS) - 1)) -> int:  # noqa: B008
            with tune.full_precision():
                x.d.copy_(tune.product(key, x))
            return 0

        return [tune.Candidate(launch, None, "256x160 shared 2x1")] if key.epilogue in ("plain", "bias") else []

    monkeypatch.setattr(tune.Search, "tiles", tiles)
    plans = entries(search(KEYS, tmp_path))
    for text, entry in plans.items():
        assert entry.get("quack") == (None if "gelu" in text else taken)
        assert entry.get("algo") or entry["separate"]


def test_a_tile_in_words() -> None:
    for tile in tune.QUACK:
        assert quack.parse(str(tile)) == tile
    for wrong in ("", "128x160", "128x160 pair 2x1 ", "128x160 both 2x1"):
        with pytest.raises(ValueError, match="not a tile"):
            quack.parse(wrong)


def test_the_rule_for_tiles() -> None:
    """On 132 multiprocessors: whole waves of wide tiles; a cluster's padding counts; nothing that leaves it idle."""
    assert str(quack.tiling(16384, 1600, 132, (2, 1))) == "128x160 pair 2x1"  # 1280 tiles of a width that divides 1600
    assert str(quack.tiling(16384, 6400, 132, (1, 2))) == "128x160 pair 1x2"
    assert str(quack.tiling(1600, 6400, 132, (2, 1))) == "128x160 pair 1x2"  # 13 rows of tiles are odd
    assert quack.tiling(768, 768, 132, (2, 1)) is None
    assert quack.tiling(8, 50304, 132, (2, 1)) is None


def test_the_table_says_who_computes_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    table = {
        "bf16 tn m24 n16 k40 bias beta0": {"quack": "128x160 pair 2x1"},
        "bf16 nn m24 n16 k40 plain beta0": {"quack": ""},
    }
    monkeypatch.setattr(quack.cublaslt, "blas_of", lambda device: SimpleNamespace(table=table))
    quack._measured.cache_clear()
    try:
        assert quack._measured("tn", 24, 16, 40, "bias", "beta0", 0) == quack.Tile(128, 160, True, 2, 1)
        assert quack._measured("tn", 24, 32, 40, "bias", "beta0", 0) == quack.Tile(
            128, 160, True, 2, 1
        )  # twice the rows
        assert quack._measured("nn", 24, 16, 40, "plain", "beta0", 0) == "cublaslt"
        assert quack._measured("nt", 24, 16, 40, "plain", "beta0", 0) is None
    finally:
        quack._measured.cache_clear()


def test_every_product_in_the_shipped_tables_was_measured_with_quack() -> None:
    for path in products.TABLES.glob("*.json"):
        plans = json.loads(path.read_text())["plans"]
        keys = {text: products.parse(text) for text in plans}
        by_tile = [
            entry["quack"]
            for text, entry in plans.items()
            if keys[text].dtype == "bf16" and keys[text].epilogue in ("plain", "bias")
        ]
        assert all(tile == "" or quack.parse(tile) for tile in by_tile)
        assert any(by_tile)
