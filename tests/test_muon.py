"""Muon in the engine: its units, what its ranks own and plan, saving and resuming, and the rest that AdamW updates.

The oracle (muon_oracle.py) works by singular values, and its gradients are autograd's.
"""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import llama_oracle
import muon_oracle
import pytest
import ranks
import second_optimizer as second
import torch
from dist_engine import SHAPE, T, V, batch
from llama_oracle import Decoder
from oracle import GPT2, AdamW, Shape
from safetensors.torch import load_file
from snapshots import exact_weight, facts
from test_training import markov, write_shard
from torch import Tensor

from daybreak.cli.main import main
from daybreak.config import Config
from daybreak.config_keys import OptimConfig
from daybreak.engine import Engine, EngineSpec, plan_engine
from daybreak.engine.fit import plan_memory
from daybreak.errors import CheckpointError
from daybreak.optimizers.muon import Muon
from daybreak.parallel import ALONE, Group
from daybreak.report.plan import plan
from daybreak.shapes import GPT2Config, LlamaConfig, parse_shape
from daybreak.state.checkpoint import load_checkpoint, save_checkpoint
from daybreak.state.restore import restore, snapshot

torch.set_num_threads(1)
MUON, LR, STEPS = second.MUON, second.LR, second.STEPS
SHARED = Decoder(L=2, C=24, NH=3, NKV=1, HS=8, F=40, max_T=12, qk_norm=True, tied=False, V=V)
C, KV = 24, 8


def build(shape: Any, **options: Any) -> Engine:
    """An engine of one rank."""
    return Engine(EngineSpec(shape, B=6, T=T, optim=MUON, **{"compute": "fp64", **options}), seed=3)


def oracle_run(model: Any, sizes: dict[str, list[int]], steps: int) -> tuple[list[float], dict[str, Tensor]]:
    """The same training by formulas: losses, and the weights at the end."""
    values = dict(model.named_parameters()) if isinstance(model, torch.nn.Module) else model.p
    params = {name: p.detach() for name, p in values.items()}
    matrices = {name: p for name, p in params.items() if name.startswith("h.") and p.dim() == 2}
    muon = muon_oracle.Muon(matrices, sizes, beta2=MUON.muon_beta2, weight_decay=MUON.muon_weight_decay)
    rest = AdamW({n: p for n, p in params.items() if n not in matrices}, clip=math.inf)
    losses = []
    for step in range(steps):
        rows = batch(step)
        loss, grads = model.gradients(rows[:, :-1], rows[:, 1:])
        norm = math.sqrt(sum(float(g.square().sum()) for g in grads.values()))
        grads = {name: g * min(1.0, 1.0 / norm) for name, g in grads.items()}
        rest.step({name: grads[name] for name in rest.params}, LR, step)
        mu = 0.85 + (MUON.muon_momentum - 0.85) * min(1.0, step / MUON.muon_warmup)
        muon.step(grads, MUON.muon_lr / MUON.lr * LR, mu)
        losses.append(loss)
    return losses, params


def bits(engine: Engine) -> dict[str, Tensor]:
    """All that a step depends on."""
    kept = {e.name: engine.state[e.name].clone() for e in engine.arena.entries if e.saved}
    return kept | {name: exact_weight(engine, name).clone() for name in engine.names()}


def differing(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    assert a.keys() == b.keys()
    return [name for name, x in a.items() if not torch.equal(x, b[name])]


def apart(found: Tensor, want: Tensor) -> float:
    return ((found - want).norm() / want.norm()).item()


@pytest.fixture(scope="module")
def one() -> tuple[Engine, list[float], dict[str, Tensor]]:
    """One rank's engine after twice STEPS steps, its losses, and its weights after the first STEPS."""
    engine = build(SHAPE)
    losses = second.train(engine, ALONE, range(STEPS))
    halfway = {name: engine.param(name).clone() for name in engine.names()}
    return engine, losses + second.train(engine, ALONE, range(STEPS, 2 * STEPS)), halfway


def test_gpt2_equals_the_formulas(one: tuple[Engine, list[float], dict[str, Tensor]]) -> None:
    engine, losses, _ = one
    fresh = build(SHAPE)
    start = {name: fresh.param(name).clone() for name in fresh.names()}
    model = GPT2(Shape(SHAPE.L, SHAPE.C, SHAPE.NH, SHAPE.max_T, V)).load(start)
    want, params = oracle_run(model, {f"h.{l}.qkvw": [C, C, C] for l in range(2)}, 2 * STEPS)
    assert losses == pytest.approx(want, rel=1e-8)
    for name, p in params.items():
        assert apart(engine.param(name), p) < 1e-8, name
        assert apart(engine.param(name), start[name]) > 1e-3 or name.endswith("b"), name  # it moved


def test_shared_keys_and_gates_are_units_of_their_own() -> None:
    """q has 24 rows, k and v 8 each; of the last two the second moment has a value for each column. Norms of heads,
    the head and the embedding are AdamW's."""
    engine = build(LlamaConfig(**SHARED._asdict()))
    engine.load_params(llama_oracle.random_values(SHARED, 1))
    model = llama_oracle.Model(SHARED, llama_oracle.random_values(SHARED, 1))
    sizes = {f"h.{l}.{name}": rows for l in range(2) for name, rows in (("qkvw", [C, KV, KV]), ("gateupw", [40, 40]))}
    losses = second.train(engine, ALONE, range(STEPS))
    want, params = oracle_run(model, sizes, STEPS)
    assert losses == pytest.approx(want, rel=1e-8)
    for name, p in params.items():
        assert apart(engine.param(name), p) < 1e-8, name
    assert engine.state["second.h.0.qkvw"].shape == (C + C + C,)
    assert engine.state["second.h.0.fcprojw"].shape == (40,)
    whole = {e.name.rpartition(".")[2] for e in engine.arena.entries if e.saved == "whole"}
    assert whole == {"qkvw", "attprojw", "gateupw", "fcprojw"}


@pytest.mark.parametrize("compute", ["fp32", "bf16"])
def test_a_resumed_run_has_the_same_bits(compute: str, tmp_path: Path) -> None:
    straight = build(SHAPE, compute=compute)
    second.train(straight, ALONE, range(STEPS))
    save_checkpoint(tmp_path, snapshot(straight, STEPS, facts(straight)), ALONE)
    second.train(straight, ALONE, range(STEPS, 2 * STEPS))
    resumed = build(SHAPE, compute=compute)
    restore(resumed, load_checkpoint(tmp_path / f"step-{STEPS:08d}"))
    second.train(resumed, ALONE, range(STEPS, 2 * STEPS))
    assert not differing(bits(straight), bits(resumed))


def test_another_optimizers_checkpoint_is_refused(tmp_path: Path) -> None:
    engines = {"muon": build(SHAPE), "adamw": Engine(EngineSpec(SHAPE, B=6, T=T, compute="fp64"), seed=3)}
    for name, engine in engines.items():
        save_checkpoint(tmp_path / name, snapshot(engine, 1, facts(engine)), ALONE)
    for name, other in (("muon", "adamw"), ("adamw", "muon")):
        save_checkpoint(tmp_path / name, snapshot(engines[name], 0, facts(engines[name])), ALONE)
        restore(engines[other], load_checkpoint(tmp_path / name / "step-00000000"))  # it has no state yet
        with pytest.raises(CheckpointError, match=r"another optimizer; keep optim.name, .* --init-from"):
            restore(engines[other], load_checkpoint(tmp_path / name / "step-00000001"))


def test_every_layout_of_the_masters_serves_it() -> None:
    split, whole = (build(SHAPE, compute="bf16", masters=masters) for masters in ("split", "fp32"))
    assert second.train(split, ALONE, range(3)) == second.train(whole, ALONE, range(3))
    assert torch.equal(exact_weight(split, "h.0.qkvw"), exact_weight(whole, "h.0.qkvw"))
    rounded = build(SHAPE, compute="bf16", masters="none")
    assert second.train(rounded, ALONE, range(3)) == pytest.approx(
        second.train(build(SHAPE), ALONE, range(3)), rel=0.02
    )


def test_each_unit_is_rounded_by_bits_of_its_place() -> None:
    """Without master weights. q, k and v begin at places of their own."""
    engine, places = build(SHAPE, compute="bf16", masters="none"), list[tuple[int, int]]()
    first = engine.state["weights"].data_ptr()

    def noting(name: str, fn: Any) -> Any:
        def call(weights: Tensor, *args: Any, **options: Any) -> None:
            if name == "muon_update":
                places.append((options["offset"], (weights.data_ptr() - first) // 2))
            fn(weights, *args, **options)

        return call

    engine.frame.k = engine.frame.k.each(noting)
    second.train(engine, ALONE, range(1))
    assert len(places) == 2 * 6  # layers, and q, k, v, attproj, fc and fcproj of each
    assert all(told == real for told, real in places)
    assert len({real for _, real in places}) == len(places)


def test_a_skipped_update_changes_nothing() -> None:
    engine = build(SHAPE, compute="fp32")
    second.train(engine, ALONE, range(1))
    before = bits(engine)
    rows = batch(1)[:6].view(1, 6, T + 1)
    engine.forward_backward(rows[..., :-1], rows[..., 1:], lr=LR, step=1)
    engine.state["loss"].fill_(math.nan)
    engine.update()
    assert engine.stats()["skip"] == 1
    assert not differing(before, bits(engine))


def test_batches_change_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units that go one by one, and all of a shape together."""
    import daybreak.optimizers.muon as muon_file

    together = build(SHAPE)
    second.train(together, ALONE, range(2))
    monkeypatch.setattr(muon_file, "BATCH", 1)
    alone = build(SHAPE)
    second.train(alone, ALONE, range(2))
    assert alone.arena.sizes()["activations"] <= together.arena.sizes()["activations"]
    for name in together.names():
        assert apart(alone.param(name), together.param(name)) < 1e-10, name


def test_three_ranks_train_and_save_and_two_resume(
    one: tuple[Engine, list[float], dict[str, Tensor]], tmp_path: Path
) -> None:
    engine, losses, halfway = one
    end = {name: engine.param(name) for name in engine.names()}
    for world, first, want in ((3, 0, halfway), (2, STEPS, end)):
        codes = ranks.finish(ranks.start(world, [tmp_path, first, "muon"], tmp_path, run=second.ranks_train))
        assert codes == [0] * world, ranks.said(tmp_path, 0)
        for zero in (1, 2):
            for rank in range(world):
                found, weights = torch.load(tmp_path / f"{world}-{zero}-{rank}.pt")
                assert found == pytest.approx(losses[first : first + STEPS], rel=1e-8)
                assert all(apart(weights[name], w) < 1e-8 for name, w in want.items())
    for zero in (1, 2):  # a matrix's state is in one rank's file
        folder = tmp_path / f"stage{zero}" / f"step-{2 * STEPS:08d}"
        each = [load_file(folder / f"optimizer-{rank:05d}-of-00002.safetensors") for rank in range(2)]
        for name in (n for n in engine.names() if f"second.{n}" in engine.state):
            for key in ("momentum", "second"):
                want = engine.state[f"{key}.{name}"].view(-1)
                (found,) = [file[k] for file in each for k in file if k.startswith(f"{key}.{name}[")]
                assert apart(found, want) < 1e-8


@pytest.mark.parametrize("zero", [1, 2])
def test_eight_ranks_own_whole_matrices_with_little_padding(zero: int) -> None:
    """d24 of nanochat's width: 24 layers, C = 1536."""
    shape = GPT2Config(L=24, C=1536, NH=12, max_T=2048, V=32768)
    spec = EngineSpec(shape, B=1, T=64, compute="bf16", zero=zero, optim=MUON)
    owned: list[str] = []
    for rank in range(8):
        _, table, arena = plan_engine(spec, Group(rank, 8))
        mine = {e.name.partition(".")[2]: e for e in arena.entries if e.name.startswith("momentum.")}
        assert sorted(mine) == sorted(p.name for p in arena.sharding.launches() if p.name)
        owned += mine
    matrices = [name for name, row in table.rows.items() if name.startswith("h.") and row.decay]
    assert sorted(owned) == sorted(matrices)
    elements = sum(table.rows[name].numel for name in matrices)
    assert elements <= table.whole <= 1.1 * elements
    masters = next(e for e in arena.entries if e.name == "masters")
    assert masters.shape == (arena.sharding.numel // 8,)  # padding counts


@pytest.mark.parametrize(("shape", "gpus", "most"), [("nanochat:d24", 8, 0.001), ("nanochat:d12", 3, 0.07)])
def test_plan_counts_the_rank_that_holds_the_most(shape: str, gpus: int, most: float) -> None:
    """Its padding too: at most a tenth, and on 8 ranks next to nothing. Of d12 on 3 ranks, rank 2 has the most."""
    keys = {"optim.name": "muon", "batch.T": 64, "batch.B": 1, "run.steps": 1, "parallel.zero": 1}
    p = plan(Config(model=parse_shape(shape)).override(keys), gpu="h100", gpus=gpus)
    each = [plan_memory(p.config, torch.device("cuda"), p.fit.missing, Group(r, gpus))[0] for r in range(gpus)]
    sizes = [arena.nbytes for arena in each]
    assert p.nbytes == max(sizes) > min(sizes)
    assert shape == "nanochat:d24" or p.nbytes == sizes[2] > sizes[0]
    table = p.arena.sharding.table
    elements = sum(stop - start for span in table.spans for name, start, stop in span.parts if name)
    assert elements <= table.whole <= (1 + most) * elements
    held = [sum(math.prod(e.shape) for e in arena.entries if e.name.startswith("momentum.")) for arena in each]
    assert sum(held) == elements
    assert gpus * max(held) <= (1 + most) * elements


def test_plan_lists_its_state() -> None:
    """AdamW has two values for each element of a matrix, and Muon one and a few."""
    config = Config(model=parse_shape("d12")).override({"precision.compute": "fp32", "run.steps": 10})
    plans = {name: plan(config.override({"optim.name": name})) for name in ("adamw", "muon")}
    sizes = {name: p.arena.sizes() for name, p in plans.items()}
    assert sizes["muon"]["momentum"] == 4 * 12 * 12 * 768**2
    assert sizes["muon"]["second"] == 4 * 12 * (3 * 768 + 768 + 3072 + 3072)
    assert sizes["adamw"]["m"] - sizes["muon"]["m"] == sizes["muon"]["momentum"]
    assert sizes["muon"]["activations"] == sizes["adamw"]["activations"]  # its buffers have bytes that are free


def test_the_configuration_reaches_it() -> None:
    optim = replace(MUON, lr=0.0)
    table = plan_engine(EngineSpec(SHAPE, B=1, T=4, optim=optim))[1]
    scale = {type(optimizer): scale for optimizer, scale in table.hyper}
    assert scale[Muon] == 0  # a learning rate of 0 stops all of it
    table = plan_engine(EngineSpec(SHAPE, B=1, T=4, optim=OptimConfig(name="muon", lr=1e-3, muon_lr=0.03)))[1]
    ((muon, scale_of),) = [key for key in table.hyper if isinstance(key[0], Muon)]
    assert scale_of == pytest.approx(30)
    assert [round(muon.scalars(t)[0], 4) for t in (1, 151, 301, 10_000)] == [0.85, 0.9, 0.95, 0.95]
    assert Muon(0.95, 0, 0.9).scalars(1) == (0.95, 1.0)


def test_momentum_and_weight_decay_fall_as_in_nanochats_run() -> None:
    """Values of its get_muon_momentum and get_weight_decay for 1,000 steps, of which the last 65 % are the decay. A run
    whose decay begins before the warmup ends first finishes that; past the horizon all stays."""
    muon = Muon(0.97, 400, 0.9, final=0.9, start=350, stop=1000, fades=True)
    want = {0: 0.85, 200: 0.91, 399: 0.9697, 400: 0.964615385, 675: 0.935, 999: 0.900107692, 5000: 0.9}
    assert {step: round(muon.scalars(step + 1)[0], 9) for step in want} == want
    fades = {0: 1.0, 250: 0.853553391, 500: 0.5, 999: 2.467e-06, 5000: 0.0}
    assert {step: round(muon.scalars(step + 1)[1], 9) for step in fades} == fades
    short = plan_engine(EngineSpec(SHAPE, B=1, T=4, optim=replace(MUON, horizon=0, muon_final_momentum=0.5)))[1]
    ((muon, _),) = [key for key in short.hyper if isinstance(key[0], Muon)]
    assert muon.scalars(10_000) == (MUON.muon_momentum, 1.0)  # nobody knows yet where it ends


def test_a_user_s_commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Train, go on, change the optimizer of a copy, and start from the weights with another optimizer."""
    monkeypatch.chdir(tmp_path)
    write_shard(tmp_path / "text_train_0.bin", markov(4000, 0))
    write_shard(tmp_path / "text_val_0.bin", markov(1000, 1))
    shape = {"model.L": 1, "model.C": 24, "model.NH": 2, "model.max_T": 16, "model.V": 257}
    keys = {
        **shape,
        "data.tokenizer": "bytes",
        "data.train": "text_train_*.bin",
        "data.val": "text_val_*.bin",
        "eval.sample_tokens": 0,
    }
    flags = [x for key, value in keys.items() for x in (f"--{key}", str(value))]

    def train(*args: str) -> int:
        return main(["train", *args])

    assert train("d12", *flags, "--name", "m", "--steps", "4", "--optim.name", "muon", "--optim.horizon", "9") == 0
    assert train("runs/m", "--steps", "6") == 0
    capsys.readouterr()
    assert train("runs/m", "--steps", "7", "--optim.name", "adamw") == 2
    assert "start a new run from its weights with --init-from" in capsys.readouterr().err
    assert train("runs/m", "--steps", "7", "--optim.name", "adamw", "--fork", "f") == 2
    assert "has the state of muon; leave it out, or start a new run" in capsys.readouterr().err
    assert not (tmp_path / "runs/f").exists()
    assert train("d12", *flags, "--name", "w", "--steps", "2", "--init-from", "runs/m") == 0
    assert (tmp_path / "runs/w/checkpoints/step-00000002").is_dir()
