"""A third family, tests/grouped.py, in all that daybreak does: no module of the package knows it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grouped
import pytest
import ranks
import torch
from oracle import GPT2, Shape, random_values
from safetensors.torch import load_file
from test_training import losses, markov, write_shard
from torch import Tensor

import daybreak
from daybreak.cli.main import main
from daybreak.config import check_resume, resolve
from daybreak.engine import Engine, EngineSpec
from daybreak.errors import ConfigError
from daybreak.interop.families import FAMILIES
from daybreak.models.registry import MODELS
from daybreak.shapes import ARCHS

SHAPE, NKV, V = Shape(2, 32, 4, 16, 257), 2, 257
CONFIG = grouped.GroupedConfig(L=2, C=32, NH=4, NKV=NKV, max_T=16, V=V)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setitem(ARCHS, "grouped", grouped.GroupedConfig)
    monkeypatch.setitem(MODELS, "grouped", grouped.Grouped)
    monkeypatch.setitem(FAMILIES, "grouped", grouped.NAMES)
    yield
    ranks.end_all()


def heads(x: Tensor) -> Tensor:
    return x.view(NKV, -1, 8, *x.shape[1:])


def values() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of the family, and of a GPT-2 that computes the same: each key head repeated for its queries, and no MLP."""
    full = random_values(SHAPE, 1) | {
        f"h.{l}.fcproj{x}": torch.zeros(32, *[128] * (x == "w")) for l in (0, 1) for x in "wb"
    }
    ours = {n.replace(".ln1", ".ln"): v for n, v in full.items() if ".ln2" not in n and ".fc" not in n}
    for name in [n for n in ours if ".qkv" in n]:
        q, k, v = ours[name].split([32, 16, 16, 32])[:3]
        ours[name] = torch.cat([q, k, v])
        full[name] = torch.cat([q, *(heads(y).repeat_interleave(2, 1).flatten(0, 2) for y in (k, v))])
    return ours, full


def test_gradients_at_every_level_of_recompute() -> None:
    ours, full = values()
    tokens = torch.randint(V, (2, 2, 17), generator=torch.Generator().manual_seed(1))
    loss, grads = GPT2(SHAPE).load(full).gradients(tokens[..., :-1], tokens[..., 1:])
    found = []
    for level in range(4):
        engine = Engine(EngineSpec(CONFIG, B=2, T=16, compute="fp64", recompute=level))
        engine.load_params(ours)
        engine.train_step(tokens[..., :-1], tokens[..., 1:], lr=0.0, step=0)
        assert engine.stats()["loss"] == pytest.approx(loss, rel=1e-12)
        found.append({name: engine.grad(name).clone() for name in ours})
        assert all(torch.equal(found[0][name], grad) for name, grad in found[-1].items())
    for name, grad in found[0].items():
        want = grads[name.replace(".ln", ".ln1") if ".ln" in name else name]
        if ".qkv" in name:
            q, *shared = want.split(32)
            want = torch.cat([q, *(heads(y).sum(1).flatten(0, 1) for y in shared)])
        assert (grad - want).norm() <= 1e-12 * want.norm(), name


def test_decoding_with_a_cache_of_the_key_heads() -> None:
    ours, full = values()
    engine = Engine(EngineSpec(CONFIG, B=2, T=16, compute="fp64", rows=3, train=False))
    engine.load_params(ours)
    assert engine.state["kv"].shape == (2, 2, 3, NKV, 16, 8)
    texts, more = [[1, 2, 3], [4], [5, 6]], [[7, 8, 9], [10, 11, 12]]
    engine.prefill(0, texts[:2])
    engine.prefill(2, texts[2:])
    for step, tokens in enumerate(more):
        got = engine.decode(tokens, [len(text) + step for text in texts]).double()
    for row, text in enumerate(texts):
        want = GPT2(SHAPE).load(full).logits(torch.tensor([[*text, more[0][row], more[1][row]]]))[0, -1]
        assert (got[row] - want).abs().max() < 1e-6  # logits come in fp32
    assert torch.equal(engine.decode([more[1][0]], [4])[0], engine.decode([more[1][0], 0], [4, 0])[0])


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    write_shard(tmp_path / "x_train_000000.bin", markov(1200, 1))
    write_shard(tmp_path / "x_val_000000.bin", markov(600, 3))
    path = tmp_path / "toy.toml"
    path.write_text(f"""[model]
arch = "grouped"
L = 2
C = 32
NH = 4
max_T = 16
V = 257
[data]
train = "{tmp_path}/*train*"
val = "{tmp_path}/*val*"
tokenizer = "bytes"
[batch]
B = 2
total_tokens = 128
[precision]
compute = "fp64"
[parallel]
bucket_bytes = 16384
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


def on_two_ranks(folder: Path, *args: Any) -> None:
    assert ranks.finish(ranks.start(2, ["train", *args, "--quiet"], folder, run=grouped.daybreak)) == [0, 0]


def test_runs_on_two_ranks_and_one(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """ZeRO 2, each level of recompute, resumed in the middle: the same bits. One process: the same to rounding."""
    monkeypatch.chdir(tmp_path)
    stage, name = ("--parallel.zero", 2), ("--name", "moved")
    on_two_ranks(tmp_path, recipe, *stage)
    on_two_ranks(tmp_path, recipe, *stage, *name, "--batch.recompute", 3, "--steps", 3)
    on_two_ranks(tmp_path, "runs/moved", "--batch.recompute", 2, "--steps", 6)
    assert main(["train", str(recipe), "--batch.recompute", "1", "--name", "one"]) == 0
    straight, moved, one = (daybreak.load(tmp_path / "runs" / run) for run in ("toy", "moved", "one"))
    assert straight.config.model == CONFIG
    assert losses(moved) == losses(straight)
    for (_, *got, _), (_, *want, _) in zip(losses(straight), losses(one), strict=True):
        assert got == pytest.approx(want, rel=1e-9)
    assert losses(one)[-1][1] < losses(one)[0][1]
    engines = [run.load_engine()[0] for run in (straight, moved, one)]
    for parameter in engines[0].names():
        a, b, c = (engine.param(parameter) for engine in engines)
        assert torch.equal(a, b)
        assert torch.allclose(a, c, rtol=0, atol=1e-9)
    assert main(["sample", "runs/one", "--tokens", "20"]) == main(["doctor", "runs/one"]) == 0
    capsys.readouterr()
    exported_and_imported_again(engines[2])
    for form in ("gguf", "llmc"):
        assert main(["export", "runs/one", "--to", form, "out"]) == 2
        assert "daybreak: model.arch = 'grouped' has no form in " in capsys.readouterr().err
    assert not Path("out").exists()
    (tmp_path / "other.toml").write_text(recipe.read_text().replace('"grouped"', '"gpt2"'))
    config = resolve("other.toml")[0]
    with pytest.raises(ConfigError, match=r'model\.arch is "grouped" in the saved run and cannot become "gpt2"'):
        check_resume(one.config, config)


def exported_and_imported_again(engine: Engine) -> None:
    """The table in both directions: q, k and v apart, the rows of k in the table's order, the vocabulary not padded."""
    assert main(["export", "runs/one", "--to", "hf", "theirs"]) == 0
    theirs, qkvw, wte = load_file("theirs/model.safetensors"), engine.param("h.1.qkvw").float(), engine.param("wte")
    assert torch.equal(theirs["model.embed.weight"], wte[:V].float())
    assert torch.equal(theirs["model.layers.1.q.weight"], qkvw[:32])
    assert torch.equal(theirs["model.layers.1.v.weight"], qkvw[48:])
    order = [0, 4, 1, 5, 2, 6, 3, 7]
    assert torch.equal(theirs["model.layers.1.k.weight"], qkvw[[32 + i for i in order] + [40 + i for i in order]])
    assert main(["import", "theirs", "--name", "again", "--data.tokenizer", "bytes"]) == 0
    again = daybreak.load("runs/again").load_engine()[0]
    assert again.cfg == CONFIG
    assert all(torch.equal(again.param(name).float(), engine.param(name).float()) for name in again.names())


def test_flags_configuration_and_plan(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = [grouped.__file__, "train", recipe, "--print-config", "--model.NKV"]
    assert ranks.finish([ranks.python([*program, 1], tmp_path, "printed.toml", {})]) == [0]
    text = (tmp_path / "printed.toml").read_text()
    assert "\nNKV = 1  # heads of keys and values\n" in text
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "printed.toml"]) == 0
    assert "grouped L=2 C=32 NH=4 max_T=16 V=257 NKV=1, padded to 384" in capsys.readouterr().out
    for wrong, said in {
        3: "model.NH = 4 must be a multiple of model.NKV = 3.",
        0: "model.NKV = 0 must be at least 1; ",
    }.items():
        (tmp_path / "wrong.toml").write_text(text.replace("NKV = 1", f"NKV = {wrong}"))
        assert main(["plan", "wrong.toml"]) == 2
        assert capsys.readouterr().err.startswith(f"daybreak: {said}")
    assert resolve("tiny", [("model.arch", "grouped")])[0].model == grouped.GroupedConfig(
        L=2, C=128, NH=4, max_T=128, V=1025
    )
    with pytest.raises(ConfigError, match=r"^model\.NKV is a key of model\.arch llama"):
        resolve("tiny", [("model.NKV", "2")])
