"""Frozen parameters: no gradient, no optimizer state, no master weight, no bit changed, and a format of their own."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import oracle
import pytest
import ranks
import torch
from dist_engine import SAMPLES, T, V, batch
from safetensors.torch import load_file
from snapshots import facts
from torch import Tensor

from daybreak.engine import Engine, EngineSpec, plan_engine
from daybreak.engine.arena import Entry
from daybreak.errors import CheckpointError
from daybreak.parallel import ALONE, Group, connect
from daybreak.shapes import GPT2Config, parse_shape
from daybreak.state.checkpoint import load_checkpoint, save_checkpoint
from daybreak.state.restore import Staging, restore, snapshot, staged_bytes

SHAPE = oracle.Shape(L=3, C=24, NH=2, max_T=12, V=V)
ONE_LAYER = ("h.1.*",)
PATTERNS: list[tuple[str, ...]] = [
    ONE_LAYER, ("*b",), ("*ln*",), ("wpe",), ("wte",), ("lnfb",), ("h.0.fcw", "h.2.qkvb", "h.2.attprojw"),
]  # fmt: skip


def spec(trainable: tuple[str, ...], **options: Any) -> EngineSpec:
    options = {"compute": "fp64", "bucket_bytes": 1 << 14, **options}
    return EngineSpec(GPT2Config(**SHAPE._asdict()), B=6, T=T, trainable=trainable, **options)


def build(of: EngineSpec, values: bool = True, group: Group = ALONE) -> Engine:
    """An engine with weights of which every one matters."""
    engine = Engine(replace(of, B=of.B // group.world), group=group, init=False)
    if values:
        engine.load_params(oracle.random_values(SHAPE, 1))
    return engine


def train(engine: Engine, steps: Sequence[int]) -> list[float]:
    group, losses = engine.comm.group, []
    mine = SAMPLES // group.world
    for step in steps:
        rows = batch(step)[group.rank * mine : (group.rank + 1) * mine].view(-1, engine.B, T + 1)
        engine.train_step(rows[..., :-1], rows[..., 1:], lr=1e-2, step=step)
        losses.append(engine.stats()["loss"])
    engine.finish()
    return losses


def bits(engine: Engine) -> dict[str, Tensor]:
    """All that a step depends on."""
    kept = {e.name: engine.state[e.name].clone() for e in engine.arena.entries if e.saved}
    return kept | {name: engine.param(name).clone() for name in engine.names()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


@pytest.mark.parametrize("trainable", PATTERNS, ids=" ".join)
@pytest.mark.parametrize("recompute", [0, 2, 3])
def test_training_equals_the_oracles(trainable: tuple[str, ...], recompute: int) -> None:
    """Three steps of two micro-steps, in memory that is NaN where it may be."""
    engine = build(spec(trainable, recompute=recompute))
    for name in ("activations", "scratch"):
        engine.frame.buffers[name].fill_(0xFF)
    model = oracle.GPT2(SHAPE).load(start := oracle.random_values(SHAPE, 1))
    params = {name: p.detach() for name, p in model.named_parameters() if name in engine.table.offsets}
    assert 0 < len(params) < len(start)
    adamw, losses = oracle.AdamW(params), []
    found = train(engine, range(3))
    for step in range(3):
        loss, grads = model.gradients(batch(step)[:, :-1], batch(step)[:, 1:])
        norm = adamw.step({name: grads[name] for name in params}, 1e-2, step)
        losses.append(loss)
    assert found == pytest.approx(losses, rel=1e-11)
    assert engine.stats()["norm"] == pytest.approx(norm, rel=1e-10)
    for name in start:
        if name in params:
            error = engine.grad(name) - grads[name]
            assert error.norm() <= 1e-11 * grads[name].norm(), name
            assert (engine.param(name) - params[name]).norm() <= 1e-10 * params[name].norm(), name
            assert not torch.equal(engine.param(name), start[name]), name
        else:
            assert torch.equal(engine.param(name), start[name]), name
    norms = {name: (w, g) for name, w, g in engine.norms()}
    for name, weight in start.items():
        assert norms[name][0] == pytest.approx(engine.param(name).norm().item(), rel=1e-9)
        assert (norms[name][1] > 0) == (name in params), name
        assert weight.shape == engine.param(name).shape


def sizes(entries: list[Entry]) -> dict[str, int]:
    found: dict[str, int] = {}
    for e in entries:
        found[e.buffer] = found.get(e.buffer, 0) + math.prod(e.shape)
    return found


@pytest.mark.parametrize("zero", [0, 2])
def test_memory_is_planned_for_trainable_ones_alone_and_is_used(zero: int) -> None:
    """d12 of which one layer trains, in bf16. Activations below that layer are not kept for backward either."""
    whole = EngineSpec(parse_shape("d12"), B=2, T=64, compute="bf16", masters="split", zero=zero)
    group = Group(0, 4) if zero else ALONE
    _, table, arena = plan_engine(replace(whole, trainable=("h.6.*",)), group)
    full, part = plan_engine(whole, group)[2].sizes(), arena.sizes()
    n = sum(-(-row.numel // 128) * 128 for row in table.rows.values() if row.trainable)
    n = -(-n // 512) * 512 if zero else n
    found, held = sizes(arena.entries), n // 4 if zero else n
    assert [found[name] for name in ("weights", "masters", "m", "v", "grads")] == [n, held, held, held, held]
    assert found["frozen"] == sum(row.numel for row in table.rows.values() if not row.trainable)
    assert found["weights"] + found["frozen"] == pytest.approx(full["weights"] / 2, rel=1e-3)
    assert part["activations"] < 0.75 * full["activations"]
    assert staged_bytes(arena) < 0.1 * sum(full[name] for name in ("weights", "m", "v"))


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_an_engine_allocates_what_was_planned(compute: str) -> None:
    of = spec(ONE_LAYER, compute=compute, frozen={"*w": "bf16"})
    engine, planned = build(of), plan_engine(of)[2]
    allocated = {name: buffer.untyped_storage().nbytes() for name, buffer in engine.frame.buffers.items()}
    assert allocated == planned.sizes() == engine.arena.sizes()
    masters = [e.shape for e in planned.entries if e.name == "masters"]
    assert masters == ([(engine.table.numel,)] if compute == "bf16" else [])


@pytest.mark.parametrize("recompute", [0, 3])
def test_a_format_of_their_own_computes_as_their_values_do(recompute: int) -> None:
    """fp32 with matrices and layernorms held in bf16 equals, bit for bit, an engine that holds these values in fp32."""
    trainable = ("h.1.*", "wpe")
    narrow, wide = (
        build(spec(trainable, compute="fp32", recompute=recompute, rows=3, frozen=held))
        for held in ({"*w*": "bf16"}, {})
    )
    assert narrow.param("h.0.fcw").dtype == narrow.param("wte").dtype == torch.bfloat16
    assert narrow.param("h.0.fcb").dtype == narrow.param("wpe").dtype == torch.float32
    shapes = {e.name: (e.first, e.last) for e in narrow.arena.entries if e.name.startswith("h.2.fcw.")}
    assert shapes["h.2.fcw.forward"][1] < shapes["h.2.fcw.backward"][0]  # free in between
    tokens = batch(9)[:6, :-1]
    for step in range(2):
        assert train(narrow, [step]) == train(wide, [step])
        assert same({k: v.float() for k, v in bits(narrow).items()}, {k: v.float() for k, v in bits(wide).items()})
        results = []
        for engine in (narrow, wide):
            found = [
                engine.eval_losses(tokens, batch(9)[:6, 1:]),
                engine.logits(tokens),
                engine.prefill(0, [[1, 2, 3], [4]]),
            ]
            found += [engine.decode([5, 6], [3, 1]), engine.decode([7, 8], [4, 2])]  # the second from a tape
            results.append([x.clone() for x in found])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert narrow.arena.sizes()["frozen"] < 0.6 * wide.arena.sizes()["frozen"]


def test_saved_resumed_and_refused(tmp_path: Path) -> None:
    of = spec(ONE_LAYER, compute="fp32", frozen={"*": "bf16"})
    straight, first = build(of), build(of)
    losses = train(straight, range(4))
    assert train(first, range(2)) == losses[:2]
    staging = Staging(first)
    path = save_checkpoint(tmp_path / "staged", snapshot(first, 2, facts(first), staging))
    plain = save_checkpoint(tmp_path / "plain", snapshot(first, 2, facts(first)))
    for name in ("model.safetensors", "base.safetensors", "optimizer-00000-of-00001.safetensors"):
        assert (path / name).read_bytes() == (plain / name).read_bytes()
    resumed = build(of, values=False)
    restore(resumed, load_checkpoint(path))
    assert train(resumed, range(2, 4)) == losses[2:]
    assert same(bits(resumed), bits(straight))

    model, manifest = load_file(path / "model.safetensors"), json.loads((path / "manifest.json").read_text())
    trained = {name for name in first.names() if name.startswith("h.1.")}
    base = load_file(path / "base.safetensors")
    assert {name for name, tensor in model.items() if tensor.dtype == torch.float32} == trained == model.keys()
    assert {name for name, tensor in base.items() if tensor.dtype == torch.bfloat16} == base.keys()
    assert base.keys() == set(first.names()) - trained
    assert {name for name, _, _ in manifest["layout"]} == trained  # the checkpoint says for which it holds state
    moments = load_file(path / "optimizer-00000-of-00001.safetensors")
    assert {name: len(x) for name, x in moments.items() if "[" in name} == {
        f"{key}[0:{first.table.numel}]": first.table.numel for key in ("m", "v")
    }
    with pytest.raises(
        CheckpointError, match=r"trained with other trainable parameters: 'h\.0\.attprojb' is trainable"
    ):
        restore(build(spec(("*",)), values=False), load_checkpoint(path))


def two_ranks(args: list[str]) -> int:
    """Stage 2: four steps, and the last two of them once more from a checkpoint. args: OUT."""
    out, group = Path(args[0]), connect(os.environ, 60)
    of = spec(ONE_LAYER, zero=2, frozen={"*": "fp32"})
    straight, resumed = build(of, group=group), build(of, values=False, group=group)
    losses = train(straight, range(2))
    path = save_checkpoint(out, snapshot(straight, 2, facts(straight)), group)
    losses += train(straight, range(2, 4))
    restore(resumed, load_checkpoint(path))
    assert train(resumed, range(2, 4)) == losses[2:]
    assert same(bits(resumed), bits(straight))
    torch.save((losses, bits(straight)), out / f"{group.rank}.pt")
    group.close()
    return 0


def test_two_ranks_at_stage_2(tmp_path: Path) -> None:
    one = build(spec(ONE_LAYER, frozen={"*": "fp32"}))
    losses, start = train(one, range(4)), oracle.random_values(SHAPE, 1)
    assert ranks.finish(ranks.start(2, [tmp_path], tmp_path, run=two_ranks)) == [0, 0], ranks.said(tmp_path, 0)
    for rank in range(2):
        found, kept = torch.load(tmp_path / f"{rank}.pt")
        assert found == pytest.approx(losses, rel=1e-9)
        for name, weight in start.items():
            if name.startswith("h.1."):
                assert (kept[name] - one.param(name)).norm() < 1e-9 * one.param(name).norm()
            else:
                assert torch.equal(kept[name].double(), weight)
