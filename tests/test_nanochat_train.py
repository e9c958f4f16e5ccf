"""nanochat's family trains: its groups of parameters by their formulas, ranks, resuming, adapters, and every verb."""

from __future__ import annotations

import math
from pathlib import Path

import muon_oracle
import pytest
import torch
from nanochat_oracle import Model, Nano, random_values
from test_nanochat import apart, oracle_of, shape
from test_training import losses, markov, write_shard

import daybreak
from daybreak.cli.main import main
from daybreak.config_keys import OptimConfig, ScheduleConfig
from daybreak.engine import Engine, EngineSpec, plan_engine

torch.set_num_threads(1)
S, T, STEPS, LR = Nano(L=3, C=48, NH=2, max_T=16, V=257), 12, 3, 0.004
OPTIM = OptimConfig(
    name="muon", lr=LR, muon_lr=0.02, muon_beta2=0.9, muon_momentum=0.97, muon_warmup=1, muon_final_momentum=0.9,
    muon_weight_decay=0.1, muon_decay_schedule="cosine", clip=0, horizon=4,
)  # fmt: skip
SCHEDULE = ScheduleConfig(name="wsd-linear", wsd_frac=0.25)
MOMENTUM, FADES = (0.85, 0.97, 0.97 - 0.07 / 3), (1.0, 0.5 + 0.5**1.5, 0.5)  # of each step
OWN = ("smear", "smearw", "backout")  # their rate does not follow the others
# As nanochat's setup_optimizer and its run have them: learning rate at 768 channels, whether it falls with the root of
# the width, betas and weight decay.
RUN = {
    "headw": (0.008, True, 0.8, 0.96, 0.01), "wte": (0.3, True, 0.8, 0.995, 0.001),
    "ve": (0.15, True, 0.8, 0.995, 0.01), "resid": (0.005, False, 0.8, 0.95, 0.05),
    "x0": (0.5, False, 0.96, 0.95, 0.0), "smear": (0.2, False, 0.8, 0.95, 0.0),
    "smearw": (0.2, False, 0.8, 0.95, 0.0), "backout": (0.2, False, 0.8, 0.95, 0.0),
}  # fmt: skip


def trained_by_formulas(oracle: Model, tokens: torch.Tensor) -> list[float]:
    """AdamW written out with each group's numbers; Muon by singular values."""
    params = {name: p.detach() for name, p in oracle.p.items()}
    matrices = {n: p for n, p in params.items() if n.rpartition(".")[2] not in RUN}
    sizes = {f"h.{l}.qkvw": [48, 48, 48] for l in range(3)}
    muon = muon_oracle.Muon(matrices, sizes, beta2=0.9, weight_decay=0.1)
    m, v = ({n: torch.zeros_like(p) for n, p in params.items()} for _ in range(2))
    found = []
    for step in range(STEPS):
        loss, grads = oracle.gradients(tokens[step, :, :, :-1], tokens[step, :, :, 1:])
        found.append(loss)
        for name, p in params.items():
            if name in matrices:
                continue
            lr, falls, beta1, beta2, decay = RUN[name.rpartition(".")[2]]
            lr *= 1.0 if name in OWN else LR / 0.008 * ((48 / 768) ** -0.5 if falls else 1.0)
            m[name] = beta1 * m[name] + (1 - beta1) * grads[name]
            v[name] = beta2 * v[name] + (1 - beta2) * grads[name] ** 2
            m_hat, v_hat = m[name] / (1 - beta1 ** (step + 1)), v[name] / (1 - beta2 ** (step + 1))
            p -= lr * (m_hat / (v_hat.sqrt() + 1e-10) + decay * p)
        muon.weight_decay = 0.1 * FADES[step]
        muon.step(grads, 0.02, MOMENTUM[step])
    return found


def test_training_equals_the_formulas_of_every_group() -> None:
    values = random_values(S)
    tokens = torch.randint(S.V, (STEPS, 2, 3, T + 1), generator=torch.Generator().manual_seed(2))
    engine = Engine(EngineSpec(shape(S), B=3, T=T, compute="fp64", optim=OPTIM, schedule=SCHEDULE))
    engine.load_params(values)
    oracle, got = oracle_of(S, values), []
    for step in range(STEPS):
        engine.train_step(tokens[step, :, :, :-1], tokens[step, :, :, 1:], lr=LR, step=step)
        got.append(engine.stats()["loss"])
    assert got == pytest.approx(trained_by_formulas(oracle, tokens), rel=1e-8)
    for name, p in oracle.p.items():
        assert apart(engine.param(name), p.detach()) < 1e-7, name
        assert apart(engine.param(name), values[name]) > 1e-4, name  # it moved
    whole = {e.name.rpartition(".")[2] for e in engine.arena.entries if e.saved == "whole"}
    assert whole == {"qkvw", "attprojw", "fcw", "fcprojw", "gatew"}


def test_plain_adamw_has_the_options_of_the_configuration() -> None:
    groups = plan_engine(EngineSpec(shape(S), B=1, T=T))[1].spans
    assert {span.group.names for span in groups} == {"*"}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_shard(tmp_path / "x_train_000000.bin", markov(1200, 1))
    write_shard(tmp_path / "x_val_000000.bin", markov(600, 3))
    path = tmp_path / "nano.toml"
    path.write_text(f"""[model]
arch = "nanochat"
L = 2
C = 32
NH = 2
max_T = 16
V = 257
window = 5
[data]
train = "{tmp_path}/*train*"
val = "{tmp_path}/*val*"
tokenizer = "bytes"
[batch]
B = 2
total_tokens = 128
[precision]
compute = "fp64"
[optim]
name = "muon"
lr = 8e-3
horizon = 6
[eval]
tokens = 512
sample_tokens = 8
[run]
steps = 6
device = "cpu"
""")  # fmt: skip
    return path


def test_every_verb(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Trained, and resumed in the middle at another level of recompute: the same bits. Then the other verbs."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(recipe), "--quiet"]) == 0
    assert main(["train", str(recipe), "--quiet", "--name", "moved", "--batch.recompute", "3", "--steps", "3"]) == 0
    assert main(["train", "runs/moved", "--quiet", "--batch.recompute", "2", "--steps", "6"]) == 0
    straight, moved = (daybreak.load(tmp_path / "runs" / run) for run in ("nano", "moved"))
    assert losses(moved) == losses(straight)
    assert losses(straight)[-1][1] < losses(straight)[0][1] - 0.2
    engines = [run.load_engine()[0] for run in (straight, moved)]
    assert all(torch.equal(engines[0].param(name), engines[1].param(name)) for name in engines[0].names())
    capsys.readouterr()
    assert main(["plan", str(recipe)]) == main(["doctor", "runs/nano"]) == 0
    assert main(["sample", "runs/nano", "--tokens", "20"]) == 0
    capsys.readouterr()
    for form in ("gguf", "llmc"):
        assert main(["export", "runs/nano", "--to", form, "out"]) == 2
        assert "daybreak: model.arch = 'nanochat' has no form in " in capsys.readouterr().err


@pytest.mark.parametrize("recompute", [0, 2])
def test_fp8_is_near_bf16(recompute: int) -> None:
    """Every matmul of the blocks in fp8: the same training to what its three bits of a fraction lose."""
    tokens = torch.randint(S.V, (STEPS, 1, 4, T + 1), generator=torch.Generator().manual_seed(2))
    found = []
    for compute in ("bf16", "fp8"):
        engine = Engine(EngineSpec(shape(S), B=4, T=T, compute=compute, optim=OPTIM, recompute=recompute))
        for step in range(STEPS):
            engine.train_step(tokens[step, :, :, :-1], tokens[step, :, :, 1:], lr=LR, step=step)
            found.append(engine.stats()["loss"])
    assert found[STEPS:] == pytest.approx(found[:STEPS], rel=0.02)
    assert found[STEPS:] != found[:STEPS]


def test_in_fp8_the_scale_of_a_norm_without_weights_is_its_bound() -> None:
    """No value of a norm exceeds sqrt(C). Its kernel on GPUs rounds rows with a scale that is known before, so not
    even the first micro-step may choose it from the values."""
    engine = Engine(EngineSpec(shape(S), B=4, T=T, compute="fp8", optim=OPTIM))
    tokens = torch.randint(S.V, (1, 4, T + 1), generator=torch.Generator().manual_seed(2))
    engine.train_step(tokens[..., :-1], tokens[..., 1:], lr=LR, step=0)
    norms = [f"h.{l}.{leaf}" for l in range(S.L) for leaf in ("ln1", "ln2")]
    assert list(engine.training.slots.norms) == norms
    for name in norms:
        slot = engine._measuring._slot(name)
        assert slot["scale"].item() == 2.0 ** math.ceil(math.log2(math.sqrt(S.C) / 448))
        assert not slot["current"]
        assert 1 < slot["amax"].item() <= math.sqrt(S.C)
    assert engine._measuring._slot("h.0.relu2")["current"]


def test_adapters_are_for_linear_layers_alone(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["train", str(recipe), "--quiet", "--steps", "2"]) == 0
    spec = ["--lora.rank", "2", "--optim.name", "adamw", "--steps", "2", "--quiet", "--optim.lr", "1e-3"]
    assert main(["finetune", "runs/nano", "--data", str(tmp_path), "--name", "low", *spec]) == 0
    engine = daybreak.load("runs/low").load_engine()[0]
    assert {name.rpartition(".")[2] for name in engine.table.offsets} == {
        f"{layer}_{side}" for layer in ("qkv", "attproj", "fc", "fcproj") for side in "AB"
    }
    assert math.isfinite(losses(daybreak.load("runs/low"))[-1][1])
