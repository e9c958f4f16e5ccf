"""Scalars that kernels read in fp32 beside bf16 weights: always the exact values, wherever weights come from."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import dist_engine
import pytest
import ranks
import torch
from nanochat_oracle import Nano, random_values
from snapshots import facts
from test_nanochat import apart, oracle_of, shape, tokens_of
from torch import Tensor

from daybreak.config_keys import LoraConfig, OptimConfig
from daybreak.engine import Engine, EngineSpec, plan_engine
from daybreak.engine.wide import LOW, PLACES, WIDE
from daybreak.models.frame import Mode
from daybreak.shapes import parse_shape
from daybreak.state.checkpoint import load_checkpoint, save_checkpoint
from daybreak.state.restore import restore, restore_weights, snapshot

torch.set_num_threads(1)
S, T, LR = Nano(L=4, C=48, NH=2, max_T=16, V=257), 16, 0.004
OPTIM = OptimConfig(name="muon", lr=LR, muon_lr=0.02, clip=0)
NAMES = ["smear", *(f"h.{l}.{name}" for l in range(4) for name in ("resid", "x0")), "backout"]
MASTERS = ("split", "fp32", "none")


def engine_of(masters: str = "auto", seed: int = 3, **options: Any) -> Engine:
    how = {"compute": "bf16", "optim": OPTIM, "masters": masters, **options}
    return Engine(EngineSpec(shape(S), B=2, T=T, **how), seed=seed)


def train(engine: Engine, steps: range) -> list[float]:
    found = []
    for step in steps:
        tokens = tokens_of(S, 1, 2, T + 1, seed=step)
        engine.train_step(tokens[..., :-1], tokens[..., 1:], lr=LR, step=step)
        found.append(engine.stats()["loss"])
    return found


def read(engine: Engine) -> dict[str, Tensor]:
    """What the model reads, as a layer asks for it."""
    found = {}
    for name in NAMES:
        prefix, dot, leaf = name.rpartition(".")
        found[name] = engine.training.layer(prefix + dot, 0, Mode()).w(leaf)
    return found


def exact(engine: Engine) -> dict[str, Tensor]:
    return {name: next(iter(engine.exact_parts(name)))[1].float().clone() for name in NAMES}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names whose bits are not the same. A reading in bf16 differs in its dtype."""
    return [name for name in a if a[name].dtype != b[name].dtype or not torch.equal(a[name], b[name])]


@pytest.mark.parametrize("compute", ["bf16", "fp8"])
@pytest.mark.parametrize("masters", MASTERS)
def test_the_model_reads_exact_values(masters: str, compute: str) -> None:
    """From the first weights on and after every update: weights plus masters, which bf16 cannot hold."""
    engine = engine_of(masters, compute=compute)
    assert list(engine.frame.wide) == sorted(NAMES, key=lambda name: engine.table.offsets[name])
    places = {name: x.data_ptr() for name, x in read(engine).items()}
    seen = [read(engine)["h.1.x0"].item()]
    assert differing(read(engine), exact(engine)) == []
    for step in range(3):
        train(engine, range(step, step + 1))
        assert differing(read(engine), exact(engine)) == []
        seen.append(read(engine)["h.1.x0"].item())
    assert len(set(seen)) == 4
    held = {name: engine.param(name).float() for name in NAMES}
    assert (len(differing(read(engine), held)) > 8) == (masters != "none")
    assert {name: x.data_ptr() for name, x in read(engine).items()} == places
    assert all(place % 16 == 0 for place in places.values())


def test_a_refused_update_changes_no_scalar() -> None:
    engine = engine_of()
    train(engine, range(2))
    before = {name: x.clone() for name, x in read(engine).items()}
    engine.state["loss"].fill_(torch.nan)
    engine.update()
    assert differing(read(engine), before) == []


@pytest.mark.parametrize(("old", "new"), [*product(("split", "fp32"), repeat=2), ("none", "none"), ("fp32", "none")])
def test_a_run_that_resumes_reads_the_same_scalars(old: str, new: str, tmp_path: Path) -> None:
    engine = engine_of(old)
    train(engine, range(2))
    kept = exact(engine)
    found = load_checkpoint(save_checkpoint(tmp_path, snapshot(engine, 2, facts(engine))))
    other = engine_of(new)
    restore(other, found)
    rounded = {name: x.bfloat16().float() for name, x in kept.items()}
    assert differing(read(other), rounded if new == "none" else kept) == []
    if old == new or new != "none":
        assert train(other, range(2, 4)) == train(engine, range(2, 4))
        assert differing(read(other), exact(engine)) == []
    alone = engine_of(train=False, seed=5)  # to evaluate and to generate
    restore_weights(alone, found)
    assert differing(read(alone), kept) == []
    assert WIDE in alone.state
    assert PLACES not in alone.state


def test_frozen_scalars_are_held_in_fp32(tmp_path: Path) -> None:
    """Beside adapters. A finetune of before had them in bf16, and goes on with those values."""
    base = engine_of()
    train(base, range(2))
    given = {name: next(iter(base.exact_parts(name)))[1].view(base.param(name).shape) for name in base.names()}
    for frozen, cut in (
        ({}, lambda x: x),
        (dict.fromkeys(("smear", "*.resid", "*.x0", "backout"), "bf16"), lambda x: x.bfloat16()),
    ):
        engine = engine_of(lora=LoraConfig(rank=2), optim=OptimConfig(), frozen=frozen)
        for name, x in given.items():
            engine.set_exact(name, x)
        want = {name: cut(x) for name, x in exact(base).items()}
        assert differing(read(engine), want) == []
        saved = load_checkpoint(save_checkpoint(tmp_path / str(len(frozen)), snapshot(engine, 0, facts(engine))))
        other = engine_of(lora=LoraConfig(rank=2), optim=OptimConfig(), seed=4)
        restore(other, saved)
        assert differing(read(other), {name: x.float() for name, x in want.items()}) == []
        train(other, range(1))
        assert differing(read(other), {name: x.float() for name, x in want.items()}) == []


@pytest.mark.parametrize("train", [True, False])
def test_what_bf16_would_lose_decides_a_stream(train: bool) -> None:
    """x0 takes the first block's stream away, up to a part that bf16 does not hold. Without it the norm is 0."""
    values, tokens = random_values(S), tokens_of(S, 2, T + 1)
    values["h.0.resid"], values["h.0.x0"] = (torch.tensor([x], dtype=torch.float64) for x in (1.003, -1.0))
    oracle = oracle_of(S, values)
    want = oracle.losses(tokens[:, :-1], tokens[:, 1:]).detach()
    engine = engine_of(train=train)
    engine.load_params(values)
    assert apart(engine.eval_losses(tokens[:, :-1], tokens[:, 1:]), want) < 0.02
    rounded = oracle_of(S, values | {"h.0.resid": torch.ones(1, dtype=torch.float64)})
    assert apart(rounded.losses(tokens[:, :-1], tokens[:, 1:]).detach(), want) > 0.1


def test_others_have_no_wide_weights() -> None:
    """GPT-2, Llama, and nanochat's family where all weights are wide: no memory, and no call."""
    for name, compute in (("d6", "bf16"), ("smollm2-135m", "bf16"), ("nanochat:d4", "fp32"), ("nanochat:d4", "fp64")):
        arena = plan_engine(EngineSpec(parse_shape(name), B=1, T=16, compute=compute))[2]
        assert not {e.name for e in arena.entries} & {WIDE, PLACES, LOW}
        assert "update_wide" not in {call.name for call in arena.calls}
    arena = plan_engine(EngineSpec(parse_shape("nanochat:d4"), B=1, T=16, compute="bf16"))[2]
    assert {e.name: e.nbytes for e in arena.entries if e.name.startswith("wide")} == {
        WIDE: 10 * 16, PLACES: 10 * 4 * 24, LOW: 10 * 8
    }  # fmt: skip
    assert [call.name for call in arena.calls][-1] == "update_wide"


@pytest.fixture(scope="module")
def ranked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("out")
    for world in (1, 2):
        codes = ranks.finish(ranks.start(world, [out], out, run=dist_engine.scalars))
        assert codes == [0] * world, ranks.said(out, 0)
    return out


@pytest.mark.parametrize(("zero", "masters"), list(product(range(3), MASTERS)))
def test_all_ranks_read_the_same_scalars(ranked: Path, zero: int, masters: str) -> None:
    """And each has those that it owns exactly. At stages 1 and 2 both own some."""
    found = [torch.load(ranked / f"2-{zero}-{masters}-{rank}.pt") for rank in range(2)]
    assert differing(found[0][0], found[1][0]) == []
    owners = []
    for values, parts, _ in found:
        owned = {name: each[0] for name, each in parts.items() if each}
        assert differing(owned, {name: values[name] for name in owned}) == []
        owners.append(set(owned))
    assert owners[0] | owners[1] == set(NAMES)
    assert not owners[0] & owners[1]
    assert all(owners)
    values = found[0][0]
    assert any(not torch.equal(x, x.bfloat16().float()) for x in values.values()) == (masters != "none")
    if masters == "none":  # rounded at random
        return
    alone, _, losses = torch.load(ranked / f"1-0-{masters}-0.pt")
    assert found[0][2] == pytest.approx(losses, rel=1e-3)
    for name in ("smear", "h.1.resid"):  # whose gradients are no mere rounding
        assert values[name].item() == pytest.approx(alone[name].item(), abs=1e-3)
