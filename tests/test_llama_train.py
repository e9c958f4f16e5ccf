"""The decoder family in training: ranks, saving and resuming, frozen parameters, and every command of a user."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import evaldata
import pytest
import ranks
import torch
from llama_oracle import Decoder, Model, random_values
from oracle import AdamW
from snapshots import facts
from test_training import losses, markov, write_shard
from torch import Tensor

import daybreak
from daybreak.cli.main import main
from daybreak.config import Config, recipe_names, resolve
from daybreak.engine import Engine, EngineSpec
from daybreak.engine.collectives import Sharding
from daybreak.engine.moments import final_moments
from daybreak.engine.params import ParamTable
from daybreak.models.registry import build_model
from daybreak.models.rotary import rotary, window_rotary
from daybreak.parallel import ALONE, Group, connect
from daybreak.shapes import LlamaConfig, model_config
from daybreak.state.checkpoint import load_checkpoint, save_checkpoint
from daybreak.state.restore import restore, snapshot

torch.set_num_threads(1)
V, T, SAMPLES = 61, 12, 12
TIED = Decoder(L=3, NKV=1, HS=8, qkv_bias=True, layers="fwn", window=5, max_T=16)
UNTIED = Decoder(L=2, HS=8, qk_norm=True, tied=False, attproj_bias=True, mlp_bias=True, max_T=16)
GEMMA = Decoder(
    L=2, NKV=1, HS=8, qk_norm=True, layers="wf", window=5, window_theta=50.0, act="gelu", query_scalar=12,
    post_norms=True, norm_plus_one=True, embed_scale=True, max_T=16,
)  # fmt: skip
SHAPES = {"tied": TIED, "untied": UNTIED, "gemma": GEMMA}


def batch(step: int) -> Tensor:
    return torch.randint(V, (SAMPLES, T + 1), generator=torch.Generator().manual_seed(step))


def build(s: Decoder, group: Group = ALONE, values: bool = True, **options: Any) -> Engine:
    """An engine for six of the twelve samples of a step, on all ranks together."""
    options = {"compute": "fp64", "bucket_bytes": 1 << 14, **options}
    spec = EngineSpec(LlamaConfig(**s._asdict()), B=6, T=T, **options)
    engine = Engine(replace(spec, B=6 // group.world), group=group, init=False)
    if values:
        engine.load_params(random_values(s, 1))
    return engine


def train(engine: Engine, steps: Sequence[int]) -> list[float]:
    group, found = engine.comm.group, []
    mine = SAMPLES // group.world
    for step in steps:
        rows = batch(step)[group.rank * mine : (group.rank + 1) * mine].view(-1, engine.B, T + 1)
        engine.train_step(rows[..., :-1], rows[..., 1:], lr=1e-2, step=step)
        found.append(engine.stats()["loss"])
    engine.finish()
    return found


def bits(engine: Engine) -> dict[str, Tensor]:
    """All that a step depends on."""
    kept = {e.name: engine.state[e.name].clone() for e in engine.arena.entries if e.saved}
    return kept | {name: engine.param(name).clone() for name in engine.names()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(x, b[name]) for name, x in a.items())


FROZEN: list[tuple[str, tuple[str, ...]]] = [
    ("tied", ("*",)), ("untied", ("*",)),
    ("untied", ("headw",)), ("untied", ("wte", "*normw")), ("untied", ("h.1.*",)), ("tied", ("wte",)),
    ("tied", ("h.1.qkvb", "h.2.gateupw", "lnfw")), ("untied", ("*b", "h.0.ln1w")),
    ("gemma", ("*",)), ("gemma", ("h.1.ln*pw", "h.0.fcprojw")),
]  # fmt: skip


@pytest.mark.parametrize(("of", "trainable"), FROZEN, ids=str)
@pytest.mark.parametrize("recompute", [0, 3])
def test_training_is_the_oracles_with_and_without_frozen_parameters(
    of: str, trainable: tuple[str, ...], recompute: int
) -> None:
    """Three steps of two micro-steps, in memory that is NaN where it may be."""
    s = SHAPES[of]
    engine, start = build(s, trainable=trainable, recompute=recompute), random_values(s, 1)
    for name in ("activations", "scratch"):
        engine.frame.buffers[name].fill_(0xFF)
    model = Model(s, start)
    model.freq, model.window_freq = (made(LlamaConfig(**s._asdict()))[0] for made in (rotary, window_rotary))
    params = {name: p.detach() for name, p in model.p.items() if name in engine.table.offsets}
    assert params
    adamw, wanted = AdamW(params), []
    found = train(engine, range(3))
    for step in range(3):
        loss, grads = model.gradients(batch(step)[:, :-1], batch(step)[:, 1:])
        norm = adamw.step({name: grads[name] for name in params}, 1e-2, step)
        wanted.append(loss)
    assert found == pytest.approx(wanted, rel=1e-10)
    assert engine.stats()["norm"] == pytest.approx(norm, rel=1e-9)
    for name, x in start.items():
        if name in params:
            assert (engine.param(name) - params[name]).norm() <= 1e-9 * params[name].norm(), name
            assert not torch.equal(engine.param(name), x), name
        else:
            assert torch.equal(engine.param(name), x), name


def on_two_ranks(args: list[str]) -> int:
    """Each shape at each stage: four steps, and the last two once more from a checkpoint. args: OUT."""
    out, group = Path(args[0]), connect(os.environ, 60)
    for of, s in SHAPES.items():
        for zero in (1, 2):
            straight, resumed = build(s, group, zero=zero), build(s, group, values=False, zero=zero)
            found = train(straight, range(2))
            path = save_checkpoint(out / f"{of}-{zero}", snapshot(straight, 2, facts(straight)), group)
            found += train(straight, range(2, 4))
            restore(resumed, load_checkpoint(path))
            assert train(resumed, range(2, 4)) == found[2:]
            assert same(bits(resumed), bits(straight))
            weights = {name: straight.param(name).clone() for name in straight.names()}
            torch.save((found, weights), out / f"{of}-{zero}-{group.rank}.pt")
    group.close()
    return 0


def test_two_ranks_at_stages_1_and_2_train_like_one(tmp_path: Path) -> None:
    assert ranks.finish(ranks.start(2, [tmp_path], tmp_path, run=on_two_ranks)) == [0, 0], ranks.said(tmp_path, 0)
    for of, s in SHAPES.items():
        one = build(s)
        wanted = train(one, range(4))
        for zero in (1, 2):
            for rank in range(2):
                found, weights = torch.load(tmp_path / f"{of}-{zero}-{rank}.pt")
                assert found == pytest.approx(wanted, rel=1e-9)
                for name, weight in weights.items():
                    assert (weight - one.param(name)).norm() < 1e-9 * one.param(name).norm(), (of, zero, name)


def test_gradients_are_exchanged_when_they_are_final() -> None:
    """A head's own weight before all others, then layer by layer. What is final at a moment changes no more."""
    model = build_model(LlamaConfig(**UNTIED._asdict()))
    table = ParamTable(model.rows())
    moments = final_moments(model, table)
    assert moments["headw"] == moments["h.1.qkvw"] == 0
    assert moments["wte"] == 1
    assert moments["h.0.gateupw"] == 2
    assert {moments[name] for name in table.offsets if not table.rows[name].decay} == {2}
    plan = Sharding(table, moments, Group(0, 2), 2, 1 << 12)
    assert sum(b.stop - b.start for b in plan.buckets) >= sum(row.numel for row in table.rows.values())


# --- as a user

FAMILY = ["--model.arch", "llama", "--model.NKV", "2", "--model.HS", "16", "--model.F", "48", "--model.qk_norm", "true"]


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_shard(tmp_path / "x_train_000000.bin", markov(1200, 1))
    write_shard(tmp_path / "x_val_000000.bin", markov(600, 3))
    path = tmp_path / "toy.toml"
    path.write_text(f"""[model]
arch = "llama"
L = 2
C = 32
NH = 4
NKV = 2
HS = 16
F = 48
layers = "fw"
window = 6
tied = false
max_T = 64
V = 257
[data]
train = "{tmp_path}/*train*"
val = "{tmp_path}/*val*"
tokenizer = "bytes"
[batch]
B = 2
total_tokens = 256
[optim]
lr = 3e-3
horizon = 6
[eval]
tokens = 512
sample_tokens = 8
[run]
steps = 6
device = "cpu"
""")  # fmt: skip
    return path


def test_every_command_of_a_user(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained straight, and stopped and resumed at another level of recompute: the same bits in the same files."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(recipe), "--name", "straight"]) == 0
    assert main(["train", str(recipe), "--name", "moved", "--steps", "3"]) == 0
    assert main(["train", "runs/moved", "--steps", "6", "--batch.recompute", "3"]) == 0
    straight, moved = (daybreak.load(tmp_path / "runs" / name) for name in ("straight", "moved"))
    assert losses(straight) == losses(moved)
    assert losses(straight)[-1][1] < losses(straight)[0][1]
    files = [tmp_path / f"runs/{name}/checkpoints/step-00000006" for name in ("straight", "moved")]
    for name in ("model.safetensors", "optimizer-00000-of-00001.safetensors"):
        assert (files[0] / name).read_bytes() == (files[1] / name).read_bytes()
    assert straight.config.model == LlamaConfig(
        L=2, C=32, NH=4, NKV=2, HS=16, F=48, layers="fw", window=6, tied=False, max_T=64, V=257
    )
    capsys.readouterr()
    assert main(["sample", "runs/straight", "--tokens", "20"]) == 0
    bits_per_byte = [r["bpb"] for r in straight.metrics("val")]
    assert bits_per_byte == [r["loss"] / math.log(2) for r in straight.metrics("val")]  # a token is a byte
    capsys.readouterr()
    (tmp_path / "h.jsonl").write_text("".join(json.dumps(r) + "\n" for r in evaldata.hellaswag(6)))
    assert main(["eval", "runs/straight", "--hellaswag", "h.jsonl", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)[0]["examples"] == 6
    assert main(["report", "runs/straight"]) == main(["doctor", "runs/straight"]) == 0
    assert (tmp_path / "runs/straight/report.html").stat().st_size > 10_000
    capsys.readouterr()
    assert main(["train", "runs/straight", "--model.window", "7"]) == 2
    assert "model.window is 6 in the saved run and cannot become 7; " in capsys.readouterr().err


def test_flags_print_config_and_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", "tiny", *FAMILY, "--print-config"]) == 0
    text = capsys.readouterr().out
    assert '\narch = "llama"  # family of models\n' in text
    assert "\nHS = 16  # size of a head; NH * HS need not be C\n" in text
    (tmp_path / "printed.toml").write_text(text)
    wanted = LlamaConfig(L=2, C=128, NH=4, NKV=2, HS=16, F=48, qk_norm=True, max_T=128, V=1025)
    assert resolve("printed.toml")[0].model == wanted
    assert resolve("tiny", list(zip((x[2:] for x in FAMILY[::2]), FAMILY[1::2], strict=True)))[0].model == wanted
    assert main(["plan", "printed.toml"]) == 0
    said = capsys.readouterr().out
    assert "llama L=2 C=128 NH=4 max_T=128 V=1025 NKV=2 HS=16 F=48 qk_norm=True, padded to 1152" in said
    assert main(["train", "tiny", *FAMILY, "--model.NKV", "3", "--print-config"]) == 2
    assert capsys.readouterr().err == "daybreak: model.NH = 4 must be a multiple of model.NKV = 3.\n"


# The recipes of this family: shape, T, tokens a step, learning rate, steps, data.
RECIPES = {
    "smollm-135M": ({"L": 30, "C": 576, "NH": 9, "NKV": 3, "HS": 64, "F": 1536, "theta": 1e4},
                    2048, 1 << 20, 3e-3, 9400, "fineweb-edu-10B"),
    "llama-1B": ({"L": 16, "C": 2048, "NH": 32, "NKV": 8, "HS": 64, "F": 8192, "theta": 5e5},
                 2048, 1 << 21, 4e-4, 47000, "fineweb-edu-100B"),
}  # fmt: skip


@pytest.mark.parametrize("name", RECIPES)
def test_recipes(name: str) -> None:
    assert name in recipe_names()
    shape, length, tokens, lr, steps, data = RECIPES[name]
    made = Config.from_target(name).concrete(10**12)
    assert made.model == model_config({"arch": "llama", "max_T": length, "V": 50257, **shape})
    assert (made.T, made.batch.total_tokens, made.optim.lr, made.run.steps) == (length, tokens, lr, steps)
    assert (made.data.name, made.data.tokenizer, made.eval.every) == (data, "gpt2", 250)
    assert math.isclose(made.tokens_between(0, steps), {"smollm-135M": 9.86e9, "llama-1B": 98.6e9}[name], rel_tol=1e-3)
