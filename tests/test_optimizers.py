"""Optimizers per group of parameters: what a group sets, and a second optimizer that takes whole matrices.

The second one (second_optimizer.py) is held to formulas of its own on one rank. Three ranks then train with it at
stages 1 and 2, save, and two ranks resume; all of it equals what one rank does.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import ranks
import second_optimizer as second
import torch
from dist_engine import SHAPE, V, batch
from oracle import GPT2, AdamW, Shape
from safetensors.torch import load_file
from snapshots import exact_weight
from torch import Tensor

from daybreak.engine import Engine, EngineSpec, plan_engine
from daybreak.parallel import ALONE, Group
from daybreak.shapes import parse_shape

ORACLE = Shape(SHAPE.L, SHAPE.C, SHAPE.NH, SHAPE.max_T, V)
MATRICES = [f"h.{l}.{name}w" for l in range(SHAPE.L) for name in ("qkv", "attproj", "fc", "fcproj")]


def oracle_run(start: dict[str, Tensor], steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """The same training by formulas: losses, and the weights at the end."""
    model = GPT2(ORACLE).load(start)
    params = {name: p.detach() for name, p in model.named_parameters()}
    wpe = AdamW({"wpe": params["wpe"]}, weight_decay=0.0, clip=math.inf)
    rest = AdamW({n: p for n, p in params.items() if n not in ("wpe", *MATRICES)}, clip=math.inf)
    momentum = {name: torch.zeros_like(params[name]) for name in MATRICES}
    squares = {name: torch.zeros(len(params[name]), dtype=torch.float64) for name in MATRICES}
    losses = []
    for step in range(steps):
        rows = batch(step)
        loss, grads = model.gradients(rows[:, :-1], rows[:, 1:])
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        grads = {name: g * min(1.0, 1.0 / norm) for name, g in grads.items()}
        wpe.step({"wpe": grads["wpe"]}, second.WPE_SCALE * second.LR, step)
        rest.step({name: grads[name] for name in rest.params}, second.LR, step)
        for name in MATRICES:
            g, p, beta = grads[name], params[name], second.BETA
            momentum[name] = beta * momentum[name] + (1 - beta) * g
            squares[name] = beta * squares[name] + (1 - beta) * (g * g).mean(1)
            bias = 1 - beta ** (step + 1)
            update = momentum[name] / bias / (torch.sqrt(squares[name] / bias)[:, None] + 1e-8)
            parts = update.chunk(3) if "qkv" in name else [update]
            update = torch.cat([part / part.norm() for part in parts])
            p -= second.SCALE * second.LR * (update + second.DECAY * p)
        losses.append(loss)
    return losses, params


def apart(found: Tensor, want: Tensor) -> float:
    return ((found - want).norm() / want.norm()).item()


@pytest.fixture(scope="module")
def one() -> tuple[Engine, list[float], dict[str, Tensor]]:
    """One rank's engine after twice STEPS steps, its losses, and its weights after the first STEPS."""
    engine = second.build(ALONE, 0)
    losses = second.train(engine, ALONE, range(second.STEPS))
    halfway = {name: engine.param(name).clone() for name in engine.names()}
    return engine, losses + second.train(engine, ALONE, range(second.STEPS, 2 * second.STEPS)), halfway


def test_one_rank_equals_the_formulas(one: tuple[Engine, list[float], dict[str, Tensor]]) -> None:
    engine, losses, _ = one
    fresh = second.build(ALONE, 0)
    start = {name: fresh.param(name).clone() for name in fresh.names()}
    want, params = oracle_run(start, 2 * second.STEPS)
    assert losses == pytest.approx(want, rel=1e-9)
    for name, p in params.items():
        assert apart(engine.param(name), p) < 1e-9, name
        assert apart(engine.param(name), start[name]) > 1e-3 or name.endswith("b"), name  # it moved


def test_every_layout_of_the_masters_serves_it() -> None:
    split, whole = (second.build(ALONE, 0, compute="bf16", masters=masters) for masters in ("split", "fp32"))
    assert second.train(split, ALONE, range(3)) == second.train(whole, ALONE, range(3))
    for name in MATRICES:
        assert torch.equal(exact_weight(split, name), exact_weight(whole, name))
        assert not torch.equal(exact_weight(split, name), split.param(name).float())


def test_three_ranks_train_and_save_and_two_resume(
    one: tuple[Engine, list[float], dict[str, Tensor]], tmp_path: Path
) -> None:
    engine, losses, halfway = one
    end = {name: engine.param(name) for name in engine.names()}
    for world, first, want in ((3, 0, halfway), (2, second.STEPS, end)):
        codes = ranks.finish(ranks.start(world, [tmp_path, first], tmp_path, run=second.ranks_train))
        assert codes == [0] * world, ranks.said(tmp_path, 0)
        for zero in (1, 2):
            for rank in range(world):
                found, weights = torch.load(tmp_path / f"{world}-{zero}-{rank}.pt")
                assert found == pytest.approx(losses[first : first + second.STEPS], rel=1e-9)
                assert all(apart(weights[name], w) < 1e-9 for name, w in want.items())
    for zero in (1, 2):  # a parameter's state is in one rank's file, AdamW's in ranges of all
        folder = tmp_path / f"stage{zero}" / f"step-{2 * second.STEPS:08d}"
        each = [load_file(folder / f"optimizer-{rank:05d}-of-00002.safetensors") for rank in range(2)]
        layout = json.loads((folder / "manifest.json").read_text())["layout"]
        for name in MATRICES:
            rows, values = engine.table.rows[name].shape[0], engine.table.rows[name].numel
            (rank,) = [rank for rank, file in enumerate(each) if f"rows.{name}[0:{rows}]" in file]
            for key, n in (("rows", rows), ("momentum", values)):
                assert apart(each[rank][f"{key}.{name}[0:{n}]"], engine.state[f"{key}.{name}"].view(-1)) < 1e-9
        first = min(at for name, at, _ in layout if name not in MATRICES)
        ranges = [name for file in each for name in file if name.startswith("m[")]
        assert sum(file[name].numel() for file in each for name in file if name in ranges) == sum(
            -(-engine.table.rows[name].numel // 128) * 128 for name in engine.names() if name not in MATRICES
        )
        assert min(int(name[2:].partition(":")[0]) for name in ranges) == first


@pytest.mark.parametrize("world", [2, 3, 8, 16])
def test_whole_matrices_lie_in_one_share_with_little_padding(world: int) -> None:
    """d12 in bf16: buckets span layers. Shares are equal, so that one reduce-scatter sums all of a bucket."""
    spec = EngineSpec(parse_shape("d12"), B=1, T=64, compute="bf16", zero=2, groups=(second.GROUPS[0],))
    for rank in (0, world - 1):
        _, table, arena = plan_engine(spec, Group(rank, world))
        plan = arena.sharding
        matrices = [name for name in table.rows if name.startswith("h.") and table.rows[name].decay]
        assert len(table.buckets) == {2: 5, 3: 5, 8: 1, 16: 1}[world]
        for start, stop in table.buckets:
            assert (start, stop) in [(b.start, b.stop) for b in plan.buckets]
            share = (stop - start) // world
            inside = [name for name in matrices if start <= table.offsets[name] < stop]
            assert {name.split(".")[1] for name in inside} != {inside[0].split(".")[1]}
            for name in inside:
                at = table.offsets[name] - start
                assert at // share == (at + table.rows[name].numel - 1) // share
        held = [name for name in matrices if any(plan.within(name, plan.held()))]
        assert sorted(p.name for p in plan.launches() if p.name) == sorted(held)
        state = {e.name: e.shape for e in arena.entries if e.saved == "whole"}
        shapes = {name: table.rows[name].shape for name in held}
        assert state == {
            f"{key}.{name}": shape[:n] for name, shape in shapes.items() for key, n in (("momentum", 2), ("rows", 1))
        }
        assert table.whole <= 10 / 9 * sum(table.rows[name].numel for name in matrices)
        flat = next(e for e in arena.entries if e.name == "m")
        assert flat.shape == ((plan.numel - table.whole) // world,)  # AdamW keeps nothing for the others
