"""The head of packed rows computes the learned rows alone: the losses and gradients of the head that computes all."""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import dist_engine
import numpy as np
import pytest
import ranks
import recovery
import torch
from test_packing import make_set
from torch import Tensor

import daybreak
from daybreak.config_keys import LoraConfig
from daybreak.engine import Engine, EngineSpec, plan_engine, step
from daybreak.engine.capture import Graphs
from daybreak.engine.passes import PARTS, rows_of
from daybreak.shapes import Shape, model_config

torch.set_num_threads(1)
V, MAX_T = 97, 48
SIZES = {"L": 2, "C": 32, "NH": 4, "max_T": MAX_T, "V": V}
SHAPES: dict[str, Shape] = {
    "gpt2": model_config({"arch": "gpt2", **SIZES}),
    "llama": model_config({"arch": "llama", **SIZES, "NKV": 2, "HS": 8, "F": 48}),
    "its own head": model_config({"arch": "llama", **SIZES, "NKV": 1, "HS": 8, "F": 48, "tied": False}),
    "nanochat": model_config({"arch": "nanochat", **SIZES}),
}
LEARNED: dict[str, Callable[[int], list[int]]] = {  # which of n targets
    "none": lambda n: [],
    "the first": lambda n: [0],
    "the last": lambda n: [n - 1],
    "every third": lambda n: [*range(0, n, 3)],
    "a span": lambda n: [*range(n // 5, n // 5 + n // 2)],
    "all but two": lambda n: [*range(1, n - 1)],
    "all": lambda n: [*range(n)],
}
Batch = tuple[Tensor, Tensor, Tensor]


def rows(B: int, T: int, learned: str, seed: int = 0) -> Batch:
    """Tokens, targets and positions (B, T) of documents of 1 to 9 tokens."""
    rng, g = random.Random(seed), torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(V, (B, T), generator=g), torch.full((B * T,), -1)
    chosen = LEARNED[learned](B * T)
    targets[chosen] = torch.randint(V, (len(chosen),), generator=g)
    positions = torch.empty(B, T, dtype=torch.int64)
    for row in positions:
        at = 0
        while at < T:
            n = min(rng.randint(1, 9), T - at)
            row[at : at + n], at = torch.arange(n), at + n
    return tokens, targets.view(B, T), positions


def build(name: str, B: int, T: int, **how: Any) -> Engine:
    """Weights of which every one matters, and NaN where something reads what nothing wrote."""
    made = Engine(EngineSpec(SHAPES[name], B=B, T=T, documents=True, **how))
    for i, parameter in enumerate(made.names()):
        value = torch.randn(made.param(parameter).shape, generator=torch.Generator().manual_seed(i))
        made.set_exact(parameter, 0.2 * value.bfloat16().double())
    return made


def poison(made: Engine) -> None:
    for buffer in ("activations", "scratch"):
        made.frame.buffers[buffer].fill_(0xFF)


def one_step(made: Engine, given: list[Batch]) -> dict[str, Tensor]:
    """Gradients of micro-steps, and the loss. What is left of earlier ones is NaN."""
    made.begin_step(lr=0.0, step=0, valid=sum(int((targets >= 0).sum()) for _, targets, _ in given))
    for i, part in enumerate(given):
        poison(made)
        made.micro_step(*part, first=not i, last=i == len(given) - 1)
    found = {name: made.grad(name).clone() for name in made.table.offsets}
    made.update()
    return found | {"loss": torch.tensor(made.stats()["loss"], dtype=torch.float64)}


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The eighths that heads compute from now on."""
    found: list[int] = []
    original = step.learned_part

    def noting(*args: Any) -> int:
        found.append(original(*args))
        return found[-1]

    monkeypatch.setattr(step, "learned_part", noting)
    return found


def whole(made: Engine, given: list[Batch]) -> dict[str, Tensor]:
    """The same by a head that computes all rows, and that is given no places."""
    with patch.object(step, "learned_part", lambda targets, at: at.fill(1 << 30) or PARTS):
        return one_step(made, given)


@pytest.mark.parametrize(("B", "T"), [(1, 1), (1, 5), (1, 13), (3, 7), (2, 48)])
@pytest.mark.parametrize("name", SHAPES)
def test_in_fp64_all_gradients_are_those_of_all_rows(name: str, B: int, T: int, parts: list[int]) -> None:
    """Of two micro-steps, whose numbers of rows differ; with logits in several chunks, too."""
    for rows_of_logits in (1 << 10, 4):
        made = build(name, B, T, compute="fp64")
        made.model.head_bytes = rows_of_logits * made.cfg.Vp * 8
        for i, learned in enumerate(LEARNED):
            given = [rows(B, T, learned, seed=i), rows(B, T, [*LEARNED][-i], seed=i + 50)]
            got, want = one_step(made, given), whole(made, given)
            largest = max(value.abs().max() for value in want.values())
            for key, value in want.items():
                # The terms of a single number, such as nanochat's `backout`, may cancel.
                size = largest if value.numel() == 1 else value.abs().max()
                assert (got[key] - value).abs().max() <= 1e-12 * size, (key, learned)
            assert abs(got["loss"] - want["loss"]) <= 1e-13 * want["loss"]
            assert (want["loss"] == 0) == (not any((targets >= 0).any() for _, targets, _ in given))
    assert len(set(parts)) >= (4 if B * T > 8 else 2)


@pytest.mark.parametrize("how", [{"compute": "fp32"}, {"compute": "bf16"}, {"lora": LoraConfig(4)}], ids=str)
def test_where_all_is_learned_all_bits_are_those_of_before(how: dict[str, Any]) -> None:
    made, given = build("llama", 2, MAX_T, **how), [rows(2, MAX_T, "all", 1), rows(2, MAX_T, "all but two", 2)]
    got, want = one_step(made, given), whole(made, given)
    assert all(torch.equal(got[key], value) for key, value in want.items())


def eights() -> list[dict[str, Any]]:
    patterns = {"compute": "fp8", "recompute": 2}
    return [patterns, {"compute": "fp32", "lora": LoraConfig(4, base="fp8")}, {"lora": LoraConfig(4, base="nf4")}]


@pytest.mark.parametrize("how", eights(), ids=["fp8", "a base in fp8", "a base in NF4"])
def test_narrow_formats(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The losses agree. Gradients do so up to the rounding of a narrow number that a last digit can turn."""
    shape = model_config({"arch": "llama", **SIZES, "C": 64, "NKV": 2, "HS": 16, "F": 64})
    monkeypatch.setitem(SHAPES, "llama", shape)
    made, given = build("llama", 2, MAX_T, **how), [rows(2, MAX_T, "a span", 1), rows(2, MAX_T, "the last", 2)]
    one_step(made, given)  # late scales now have a history
    got, again, want = one_step(made, given), one_step(made, given), whole(made, given)
    assert got["loss"].item() == pytest.approx(want["loss"].item(), rel=1e-6)
    for key in made.table.offsets:
        assert torch.equal(got[key], again[key])
        assert (got[key] - want[key]).norm() <= 0.02 * want[key].norm(), key


def head_rows(made: Engine, given: Batch) -> dict[str, int]:
    """Rows that each operation of the head computes: of matmuls, those with the head's weight or its gradient."""
    found: dict[str, int] = {}
    weight = made.param(made.model.head_weight)  # type: ignore[attr-defined]
    grad = made.frame.grads[made.model.head_weight]  # type: ignore[attr-defined]
    own = {x.data_ptr() for x in (weight, grad) if x is not None}
    kernels = made.training.k

    def noting(name: str, kernel: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **kwargs: Any) -> None:
            tensors = [x for x in args if isinstance(x, Tensor)]
            if name in ("classifier", "loss_sum") or any(x.data_ptr() in own for x in tensors if x.dim() == 2):
                found[name] = found.get(name, 0) + (len(tensors[0]) if name == "classifier" else len(tensors[1]))
            kernel(*args, **kwargs)

        return call

    made.training.k = kernels.each(noting)
    made.begin_step(lr=0.0, step=0, valid=1)
    made.micro_step(*given, first=True)
    made.training.k = kernels
    return found


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(4)], ids=["full", "frozen"])
@pytest.mark.parametrize("learned", LEARNED)
def test_the_head_computes_no_more_rows_than_it_must(learned: str, lora: LoraConfig) -> None:
    B, T = 2, 39  # 78 rows: an eighth is 10 of them
    made, given = build("its own head", B, T, lora=lora), rows(B, T, learned)
    found = head_rows(made, given)
    k = len(LEARNED[learned](B * T))
    most = rows_of(max(1, -(-PARTS * k // (B * T))), B * T)
    assert k <= most < k + 11
    operations = {"matmul_forward", "classifier", "matmul_backward_input", "loss_sum"}
    assert found == dict.fromkeys(operations | (set() if lora.rank else {"matmul_backward_weight"}), most)


def test_other_engines_have_no_such_rows() -> None:
    """Their targets may be masked; they keep their calls and bits. Evaluation has a loss for every token."""
    tokens, targets, positions = rows(2, MAX_T, "a span")
    spec = EngineSpec(SHAPES["llama"], B=2, T=MAX_T)
    assert not [e.name for e in plan_engine(spec)[2].entries if "picked" in e.name or e.name == "learned"]
    plain = Engine(spec)
    assert "learned" not in plain.state
    plain.train_step(tokens[None], targets[None], lr=0.0, step=0)
    assert torch.equal(plain.state["losses"].view(2, MAX_T) == 0, targets < 0)
    made = Engine(EngineSpec(SHAPES["llama"], B=2, T=MAX_T, documents=True))
    made.train_step(tokens[None], targets[None], positions[None], lr=0.0, step=0)
    assert torch.equal(made.eval_losses(tokens, targets, positions) == 0, targets < 0)


# ---------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(4)], ids=["full", "frozen"])
@pytest.mark.parametrize("recompute", [0, 1, 3])
@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_memory_is_planned_to_the_byte(compute: str, recompute: int, lora: LoraConfig) -> None:
    """All engines with packed rows plan the rows of seven eighths. Where the head learns, they have the bytes of others
    that are free meanwhile. A frozen head had the least memory alive, so there they are added."""
    B, T = 2, 40
    how: dict[str, Any] = {"compute": compute, "recompute": recompute, "lora": lora}
    made = build("llama", B, T, **how)
    allocated = {name: buffer.untyped_storage().nbytes() for name, buffer in made.frame.buffers.items()}
    assert allocated == made.arena.sizes() == plan_engine(made.spec)[2].sizes()
    n, C, width = B * T, SIZES["C"], {"fp32": 4, "bf16": 2}[compute]
    entries = {e.name: e for e in made.arena.entries}
    assert (entries["picked"].shape, entries["d_picked"].shape) == ((70, C), (70, C))
    assert entries["picked_targets"].nbytes == 70 * 8
    assert entries["batch"].nbytes == 4 * n * 8  # the places lie behind those of documents
    assert made.state["learned"].nbytes == made.state["lo"].nbytes == n * 4
    plain = plan_engine(EngineSpec(SHAPES["llama"], B=B, T=T, **how))[2].sizes()
    more = allocated["activations"] - plain["activations"]
    assert 0 <= more <= (rows_of(7, n) * C * width + 255) // 256 * 256 + (rows_of(7, n) * 8 + 255) // 256 * 256
    assert allocated["scratch"] >= plain["scratch"]


def test_at_full_size_training_takes_not_a_byte_more() -> None:
    shape = model_config(
        {"arch": "llama", **SIZES, "L": 8, "C": 576, "NH": 9, "NKV": 3, "HS": 64, "F": 1536, "V": 49152}
    )
    for recompute in (0, 1, 3):
        how: dict[str, Any] = {"B": 4, "T": 2048, "compute": "bf16", "recompute": recompute, "device_type": "cuda"}
        own, plain = (
            plan_engine(EngineSpec(shape, documents=d, kernels={"attention": "triton"}, **how))[2].sizes()
            for d in (True, False)
        )
        assert own["activations"] == plain["activations"]


# ---------------------------------------------------------------------------------------------------------- graphs


class Captured(Graphs):
    """Graphs without a GPU. It runs nothing that was not captured before the first step."""

    def __init__(self, enabled: bool) -> None:
        super().__init__(True)
        self.calls: dict[Hashable, Callable[[], object]] = {}

    def capture(self, key: Hashable, fn: Callable[[], object]) -> None:
        assert key not in self.calls
        self.calls[key] = fn

    def run(self, key: Hashable, fn: Callable[[], object]) -> None:
        self.calls[key]()


@pytest.mark.parametrize("how", [{}, {"lora": LoraConfig(4)}, {"compute": "fp8", "fp8_steps": 2}], ids=str)
def test_all_graphs_are_captured_before_the_first_step(how: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward do not depend on the rows that are learned, so only the head has a graph for each number."""
    shape = model_config({"arch": "llama", **SIZES, "C": 64, "NKV": 2, "HS": 16, "F": 64})
    monkeypatch.setitem(SHAPES, "llama", shape)
    want = build("llama", 2, MAX_T, **how)
    monkeypatch.setattr(step, "Graphs", Captured)
    made = build("llama", 2, MAX_T, **how)
    assert isinstance(made.graphs, Captured)
    kinds = 2 if "fp8_steps" in how else 1
    assert len(made.graphs.calls) == kinds * (2 + 2 * PARTS + 2 + 1)
    for i, learned in enumerate(LEARNED):
        given = [rows(2, MAX_T, x, seed=i) for x in (learned, "every third")]
        for engine in (want, made):
            engine.train_step(*(torch.stack(x) for x in zip(*given, strict=True)), lr=1e-3, step=i)
        assert str(made.stats()) == str(want.stats())  # z of the first steps is NaN
    assert all(torch.equal(made.param(name), want.param(name)) for name in made.names())


# ------------------------------------------------------------------------------------------------- ranks and runs


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_ranks_may_compute_different_numbers_of_rows(zero: int, tmp_path: Path) -> None:
    """Two ranks equal one process that has the batches of both, in fp64. Their exchanges are the same, in order."""
    assert ranks.finish(ranks.start(2, [tmp_path, zero], tmp_path, run=dist_engine.learned)) == [0, 0]
    one, two = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert one["parts"] != two["parts"]
    assert {*one["parts"], *two["parts"]} >= {1, 4, 8}
    assert one["exchanges"] == two["exchanges"]
    assert one["exchanges"] == one["of all rows"]
    assert one["losses"] == two["losses"]
    both = dist_engine.learned_engine(0, B=1)
    for i, loss in enumerate(one["losses"]):
        batches = [batch for rank in range(2) for batch in dist_engine.learned_batches(i, rank)]
        both.train_step(*(torch.stack(x) for x in zip(*batches, strict=True)), lr=1e-3, step=i)
        assert loss == pytest.approx(both.stats()["loss"], rel=1e-12)
    for name in both.names():
        assert torch.equal(one["weights"][name], two["weights"][name])
        assert (one["weights"][name] - both.param(name)).abs().max() <= 1e-11 * both.param(name).abs().max(), name


def test_a_resumed_run_has_the_same_bits(tmp_path: Path, parts: list[int]) -> None:
    """The numbers of rows are a function of seed and step, as batches are."""
    shards = make_set(tmp_path / "shards")
    base = {"batch__total_tokens": 64, "batch__B": 2, "run__steps": 8, "optim__horizon": 8, "eval__every": 4}
    straight = daybreak.train(recovery.config(shards, tmp_path, "straight", **base))
    want = parts.copy()
    parts.clear()
    first = daybreak.train(recovery.config(shards, tmp_path, "halves", **{**base, "run__steps": 4}))
    daybreak.train(first.config.override({"run.steps": 8}), resume=first.path)
    assert parts == want
    assert len(want) == 16
    assert len(set(want)) > 2
    a, b = (daybreak.Run(run.path).metrics("step") for run in (straight, first))
    assert [(x["loss"], x["norm"]) for x in a] == [(x["loss"], x["norm"]) for x in b]
    recovery.assert_same(daybreak.Run(straight.path), daybreak.Run(first.path))


def test_places_are_whole_numbers_of_32_bits(parts: list[int]) -> None:
    """The batch on the device has the places of the last micro-step."""
    made, given = build("gpt2", 2, 20), rows(2, 20, "every third")
    one_step(made, [given])
    at, learned = made.state["learned"].numpy(), given[1].view(-1).numpy() >= 0
    assert at.dtype == np.int32
    assert parts == [3]
    assert at[learned].tolist() == list(range(14))
    assert at[~learned].tolist() == list(range(14, 40))
    assert torch.equal(made.state["lo"], (torch.arange(20) - given[2]).int())
